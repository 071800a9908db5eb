package queue

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// Headers of our own on stored messages.
const (
	headerReason = "Ws-Reason" // of a dead letter
)

// Fetch never takes more bytes at once, but for the last few parts.
const (
	fetchBytes = 32 << 20
	fetchChunk = 64
)

// Part is one part of a request, as the gateway stored it. User and Device are the broker's word, not the device's.
type Part struct {
	User, Device, Session string
	Index, Total          int // 1 <= Index <= Total
	ContentType, Encoding string
	Data                  []byte
	ReceivedAt            time.Time
	Deliveries            int    // 1 at the first delivery; 0 for a part that Series looked up
	Sequence              uint64 // of the input stream; two parts with the same are the same

	q   *Queue
	msg jetstream.Msg // nil: looked up by Series
}

// Fetch takes up to limit parts for this caller alone. It waits up to wait for the first and returns it with what else is
// there at that moment. No part within that time is not an error. A part that is neither acknowledged nor given back
// within AckWait is delivered again, to anybody.
func (q *Queue) Fetch(ctx context.Context, limit int, wait time.Duration) ([]*Part, error) {
	q.mu.Lock()
	cons := q.intake
	q.mu.Unlock()
	var parts []*Part
	size := 0
	take := func(b jetstream.MessageBatch, err error) (int, error) {
		if err != nil {
			return 0, err
		}
		n := 0
		for m := range b.Messages() {
			n++
			if p := q.part(ctx, m); p != nil {
				parts = append(parts, p)
				size += len(p.Data)
			}
		}
		return n, b.Error()
	}
	more := func() error {
		for len(parts) < limit && size < fetchBytes {
			want := min(fetchChunk, limit-len(parts))
			n, err := take(cons.FetchNoWait(want))
			if err != nil || n < want {
				return err
			}
		}
		return nil
	}
	err := more()
	if err == nil && len(parts) == 0 && wait > 0 {
		waiting, cancel := context.WithTimeout(ctx, wait)
		_, err = take(cons.Fetch(1, jetstream.FetchContext(waiting)))
		cancel()
		if err == nil && len(parts) > 0 {
			err = more()
		}
	}
	switch {
	case len(parts) > 0: // an error will come again
		return parts, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err == nil || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout) || errors.Is(err, jetstream.ErrNoMessages):
		return nil, nil
	}
	q.heal(err)
	return nil, fmt.Errorf("queue: fetch from %s: %w", StreamIn, err)
}

// part reads a delivered message. One that the gateway cannot have written is dead-lettered at once.
func (q *Queue) part(ctx context.Context, m jetstream.Msg) *Part {
	meta, err := m.Metadata()
	if err != nil {
		q.log.Error("a delivery without metadata", zap.String("subject", m.Subject()), zap.Error(err))
		return nil
	}
	p, err := q.parsePart(m.Subject(), m.Headers(), m.Data())
	p.msg, p.ReceivedAt, p.Deliveries, p.Sequence = m, meta.Timestamp, int(meta.NumDelivered), meta.Sequence.Stream
	if err != nil {
		q.log.Error("a message in the input that the gateway did not write", zap.String("subject", m.Subject()), zap.Error(err))
		if err := p.DeadLetter(ctx, err.Error()); err != nil && ctx.Err() == nil {
			q.log.Error("cannot dead-letter it; it will be delivered again", zap.String("subject", m.Subject()), zap.Error(err))
		}
		return nil
	}
	return p
}

func (q *Queue) parsePart(subject string, h nats.Header, data []byte) (*Part, error) {
	p := &Part{q: q, Data: data, ContentType: h.Get(protocol.HeaderContentType), Encoding: h.Get(protocol.HeaderContentEncoding)}
	t := strings.Split(subject, ".")
	if len(t) != 6 || !protocol.ValidName(t[2]) || !protocol.ValidName(t[3]) {
		return p, fmt.Errorf("%q is not an input subject", subject)
	}
	p.User, p.Device, p.Session = t[2], t[3], t[4]
	if _, _, err := protocol.ParseSession(p.Session); err != nil {
		return p, err
	}
	var err error
	p.Index, p.Total, err = protocol.ParsePart(t[5])
	return p, err
}

// Series looks up the other parts of p's series and returns all Total of them in order, or, when they are not all in the queue, the
// number of the first that is missing. That costs the same however long the series says it is. Parts of one series may have been delivered to different workers: whoever finds the series complete may take
// all of it. Acknowledging a looked up part removes it from the queue, also from under another worker.
func (p *Part) Series(ctx context.Context) (all []*Part, missing int, err error) {
	subject := func(i int) string {
		return inSubject(p.User, p.Device, p.Session, protocol.PartToken(i, p.Total))
	}
	there, err := p.q.subjects(ctx, StreamIn, inSubject(p.User, p.Device, p.Session, "*"))
	if err != nil {
		return nil, 0, err
	}
	for i := 1; i <= p.Total; i++ {
		if there[subject(i)] == 0 && i != p.Index {
			return nil, i, nil
		}
	}
	first, cancel := bounded(ctx)
	s, err := p.q.stream(first, StreamIn)
	cancel()
	if err != nil {
		return nil, 0, fmt.Errorf("queue: look up series: %w", err)
	}
	all = make([]*Part, p.Total)
	for i := range all {
		if i == p.Index-1 {
			all[i] = p
			continue
		}
		one, cancel := bounded(ctx)
		m, err := s.GetLastMsgForSubject(one, subject(i+1))
		cancel()
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil, i + 1, nil // acknowledged meanwhile
		}
		if err != nil {
			return nil, 0, fmt.Errorf("queue: look up series: %w", err)
		}
		if all[i], err = p.q.parsePart(m.Subject, m.Header, m.Data); err != nil {
			return nil, 0, fmt.Errorf("queue: look up series: %w", err)
		}
		all[i].ReceivedAt, all[i].Sequence = m.Time, m.Sequence
	}
	return all, 0, nil
}

// Ack removes the part from the queue and waits until the queue has confirmed it. Call it after the database commit.
func (p *Part) Ack(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	var err error
	if p.msg == nil {
		err = p.remove(ctx)
	} else if err = p.msg.DoubleAck(ctx); errors.Is(err, jetstream.ErrMsgAlreadyAckd) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("queue: acknowledge %s: %w", p.name(), err)
	}
	return nil
}

func (p *Part) remove(ctx context.Context) error {
	s, err := p.q.stream(ctx, StreamIn)
	if err != nil {
		return err
	}
	if err := s.DeleteMsg(ctx, p.Sequence); err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) && !errors.Is(err, jetstream.ErrMsgDeleteUnsuccessful) {
		return err
	}
	return nil
}

// AckAll acknowledges the parts of one Fetch. It waits for the confirmation of the last only: the broker works off one
// connection's acknowledgements in order, and one that is lost after all costs a redelivery.
func (q *Queue) AckAll(ctx context.Context, parts []*Part) error {
	var last *Part
	var errs []error
	for _, p := range parts {
		if p.msg == nil {
			errs = append(errs, p.Ack(ctx))
			continue
		}
		if last != nil {
			if err := last.msg.Ack(); err != nil && !errors.Is(err, jetstream.ErrMsgAlreadyAckd) {
				errs = append(errs, fmt.Errorf("queue: acknowledge %s: %w", last.name(), err))
			}
		}
		last = p
	}
	if last != nil {
		errs = append(errs, last.Ack(ctx))
	}
	return errors.Join(errs...)
}

// Nak gives the part back, to be delivered again (to anybody) after the delay.
func (p *Part) Nak(delay time.Duration) error {
	if p.msg == nil {
		return nil
	}
	if err := p.msg.NakWithDelay(delay); err != nil && !errors.Is(err, jetstream.ErrMsgAlreadyAckd) {
		return fmt.Errorf("queue: give back %s: %w", p.name(), err)
	}
	return nil
}

// InProgress keeps the part with this worker for another AckWait.
func (p *Part) InProgress() error {
	if p.msg == nil {
		return nil
	}
	if err := p.msg.InProgress(); err != nil && !errors.Is(err, jetstream.ErrMsgAlreadyAckd) {
		return fmt.Errorf("queue: hold %s: %w", p.name(), err)
	}
	return nil
}

// DeadLetter puts a copy with the reason aside, for the operator, and then removes the part from the input.
func (p *Part) DeadLetter(ctx context.Context, reason string) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	subject := "sync.dlq.unreadable"
	if p.User != "" {
		subject = "sync.dlq." + p.name()
	}
	m := nats.NewMsg(subject)
	m.Data = p.Data
	m.Header.Set(headerReason, oneLine(reason))
	m.Header.Set(nats.MsgIdHdr, fmt.Sprintf("%d", p.Sequence))
	if p.ContentType != "" {
		m.Header.Set(protocol.HeaderContentType, oneLine(p.ContentType))
	}
	if p.Encoding != "" {
		m.Header.Set(protocol.HeaderContentEncoding, oneLine(p.Encoding))
	}
	if _, err := p.q.js.PublishMsg(ctx, m); err != nil {
		p.q.heal(err)
		return fmt.Errorf("queue: dead-letter %s: %w", p.name(), err)
	}
	if p.msg == nil {
		return p.Ack(ctx)
	}
	if err := p.msg.TermWithReason(oneLine(reason)); err != nil && !errors.Is(err, jetstream.ErrMsgAlreadyAckd) {
		return fmt.Errorf("queue: dead-letter %s: %w", p.name(), err)
	}
	return nil
}

func (p *Part) name() string {
	return p.User + "." + p.Device + "." + p.Session + "." + protocol.PartToken(p.Index, p.Total)
}

// oneLine makes a text fit for a header or a protocol line.
func oneLine(s string) string {
	const most = 500
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
