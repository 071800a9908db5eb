package queue

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"
	"golang.org/x/sync/semaphore"

	"github.com/waystage/waystage/change"
)

// ErrRunBroken ends a capture's run: the change data stream is not what this run has written so far (its store was lost,
// or another capture writes to it). Start a new one with ResetChanges, from the position that the target has.
var ErrRunBroken = errors.New("queue: the change data stream does not continue this run: start a new run")

// ErrChangesReset is returned once by a reader when the stream was made anew under it. The next call reads the new
// stream from its first message.
var ErrChangesReset = errors.New("queue: the change data stream was made anew: read again from its start")

const changeWindow = 32 << 20 // bytes of change data on their way to the broker, per direction

// PublishChange appends a message to a direction's stream, after all that were appended before. It returns when the message
// is on its way, which may take as long as the stream is full; stored gets exactly one value: nil when the broker has it, else
// an error after which the run must end (ErrRunBroken, or the queue was closed). A lost answer, a full stream and a
// broker that is away are waited out. The message's body must not change until then.
func (q *Queue) PublishChange(ctx context.Context, direction string, m *change.Message) (stored <-chan error, err error) {
	w := q.writers[direction]
	if w == nil {
		_, _, err := changeStream(direction)
		return nil, err
	}
	e := &changeEntry{size: min(int64(len(m.Body))+4096, changeWindow), done: make(chan error, 1),
		msg: &nats.Msg{Subject: w.subject, Data: m.Body, Header: m.Header()}}
	e.run, e.seq = m.Run, m.Seq
	e.msg.Header.Set(nats.MsgIdHdr, m.Run+"/"+strconv.FormatUint(m.Seq, 10))
	if err := w.window.Acquire(ctx, e.size); err != nil {
		return nil, err
	}
	select {
	case w.in <- e:
		return e.done, nil
	case <-ctx.Done():
		w.window.Release(e.size)
		return nil, ctx.Err()
	case <-q.ctx.Done():
		w.window.Release(e.size)
		return nil, errClosed
	}
}

// ResetChanges empties a direction's stream for a new run. Messages of the old one that are still on their way are not
// stored after it.
func (q *Queue) ResetChanges(ctx context.Context, direction string) error {
	w := q.writers[direction]
	if w == nil {
		_, _, err := changeStream(direction)
		return err
	}
	r := &changeEntry{reset: true, done: make(chan error, 1)}
	select {
	case w.in <- r:
	case <-ctx.Done():
		return ctx.Err()
	case <-q.ctx.Done():
		return errClosed
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// PurgeChanges removes what the applier has durably applied: every message up to and including stream sequence upto.
func (q *Queue) PurgeChanges(ctx context.Context, direction string, upto uint64) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	stream, _, err := changeStream(direction)
	if err != nil {
		return err
	}
	s, err := q.js.Stream(ctx, stream)
	if err == nil {
		err = s.Purge(ctx, jetstream.WithPurgeSequence(upto+1))
	}
	if err != nil {
		q.heal(err)
		return fmt.Errorf("queue: purge %s: %w", stream, err)
	}
	return nil
}

var errClosed = errors.New("queue: closed")

// changeEntry is one message between PublishChange and its confirmation, or a request to empty the stream.
type changeEntry struct {
	msg   *nats.Msg
	run   string
	seq   uint64 // of the run
	size  int64
	reset bool
	done  chan error // one value, buffered

	at     uint64 // sequence in the stream that the message must get
	future jetstream.PubAckFuture
	failed error // publishing failed before there was a future
	stored bool  // confirmed, but not yet told: one before it is not
}

// changeWriter keeps one direction's messages in order. Each is published with the stream sequence that it must follow, so
// that the broker refuses whatever would leave a gap: after one refused message all that are on their way behind it
// are refused too, and are sent again in order. It also keeps two captures from mixing their runs.
type changeWriter struct {
	q               *Queue
	stream, subject string
	in              chan *changeEntry
	window          *semaphore.Weighted

	// Of run alone.
	known   bool   // last is the stream's
	last    uint64 // sequence of the last message that was sent
	broken  bool
	pending []*changeEntry // sent and not confirmed, in order
}

func newChangeWriter(q *Queue, direction string) *changeWriter {
	stream, subject, _ := changeStream(direction)
	return &changeWriter{q: q, stream: stream, subject: subject, in: make(chan *changeEntry), window: semaphore.NewWeighted(changeWindow)}
}

func (w *changeWriter) run() {
	ctx := w.q.ctx
	defer func() {
		for _, e := range w.pending {
			w.finish(e, errClosed)
		}
	}()
	for {
		var stored <-chan *jetstream.PubAck
		var failed <-chan error
		if len(w.pending) > 0 {
			if head := w.pending[0]; head.failed != nil {
				w.recover(ctx, head.failed)
				continue
			} else {
				stored, failed = head.future.Ok(), head.future.Err()
			}
		}
		select {
		case <-ctx.Done():
			return
		case e := <-w.in:
			switch {
			case e.reset:
				e.done <- w.reset(ctx)
			case w.broken:
				w.finish(e, ErrRunBroken)
			default:
				w.send(ctx, e)
			}
		case ack := <-stored:
			head := w.pending[0]
			if head.future = nil; ack.Sequence != head.at {
				w.recover(ctx, ErrRunBroken)
				continue
			}
			w.pending = w.pending[1:]
			w.finish(head, nil)
		case err := <-failed:
			w.pending[0].future = nil // its answer is taken
			w.recover(ctx, err)
		}
	}
}

func (w *changeWriter) finish(e *changeEntry, err error) {
	w.window.Release(e.size)
	e.done <- err
}

func (w *changeWriter) send(ctx context.Context, e *changeEntry) {
	w.pending = append(w.pending, e)
	if !w.known {
		last, err := w.lastSequence(ctx)
		if err != nil {
			e.failed = err
			return
		}
		w.last, w.known = last, true
	}
	w.last++
	e.at = w.last
	e.msg.Header.Set(nats.ExpectedLastSeqHdr, strconv.FormatUint(e.at-1, 10))
	e.future, e.failed = w.q.cd.PublishMsgAsync(e.msg, jetstream.WithStallWait(100*time.Millisecond))
}

func (w *changeWriter) lastSequence(ctx context.Context) (uint64, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	s, err := w.q.js.Stream(ctx, w.stream)
	if err != nil {
		return 0, err
	}
	return s.CachedInfo().State.LastSeq, nil
}

// settle waits until the broker has answered for everything on its way, or the answer is overdue.
func (w *changeWriter) settle(ctx context.Context) {
	for _, e := range w.pending {
		if e.future == nil {
			continue
		}
		select {
		case ack := <-e.future.Ok():
			e.stored = ack.Sequence == e.at
		case <-e.future.Err():
		case <-ctx.Done():
			return
		}
		e.future = nil
	}
}

// recover sends again, in order and one by one, what was not confirmed.
func (w *changeWriter) recover(ctx context.Context, cause error) {
	w.q.log.Debug("change data is sent again", zap.String("stream", w.stream), zap.Int("messages", len(w.pending)), zap.Error(cause))
	w.settle(ctx)
	wait := 20 * time.Millisecond
	told := false
	for len(w.pending) > 0 && !w.broken {
		e := w.pending[0]
		var err error
		if !e.stored {
			err = w.again(ctx, e)
		}
		switch {
		case err == nil:
			w.pending = w.pending[1:]
			w.finish(e, nil)
			wait = 20 * time.Millisecond
			continue
		case ctx.Err() != nil:
			return
		case errors.Is(err, ErrRunBroken):
			w.broken = true
			continue
		case !told:
			told = true
			w.q.log.Info("change data has to wait", zap.String("stream", w.stream), zap.Bool("full", isFull(err)), zap.Error(err))
		}
		w.q.heal(err)
		// A reset must be heard while the stream is full or the broker away.
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
		case n := <-w.in:
			switch {
			case n.reset:
				n.done <- w.reset(ctx)
			default:
				n.at = 0 // not sent yet: its turn comes
				w.pending = append(w.pending, n)
			}
		}
		t.Stop()
		wait = min(2*wait, time.Second)
	}
	for _, e := range w.pending { // broken
		w.finish(e, ErrRunBroken)
	}
	w.pending = nil
}

// again stores one message, all before it being stored.
func (w *changeWriter) again(ctx context.Context, e *changeEntry) error {
	if !w.known {
		last, err := w.lastSequence(ctx)
		if err != nil {
			return err
		}
		w.last, w.known = last, true
	}
	if e.at == 0 {
		w.last++
		e.at = w.last
		e.msg.Header.Set(nats.ExpectedLastSeqHdr, strconv.FormatUint(e.at-1, 10))
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	ack, err := w.q.cd.PublishMsg(ctx, e.msg, jetstream.WithRetryAttempts(0))
	if err == nil {
		if ack.Sequence != e.at { // a duplicate of something else
			return ErrRunBroken
		}
		return nil
	}
	var api *jetstream.APIError
	if !errors.As(err, &api) || api.ErrorCode != errCodeWrongLastSequence {
		return err
	}
	// Either it is stored and only the answer was lost, or the stream is not ours any more.
	s, err := w.q.js.Stream(ctx, w.stream)
	if err != nil {
		return err
	}
	if m, err := s.GetMsg(ctx, e.at); err == nil {
		if got, err := change.Parse(m.Header, nil); err == nil && got.Run == e.run && got.Seq == e.seq {
			return nil
		}
	} else if !errors.Is(err, jetstream.ErrMsgNotFound) {
		return err
	}
	return fmt.Errorf("%w: %s", ErrRunBroken, api.Description)
}

// reset empties the stream. What is pending is of the old run and fails.
func (w *changeWriter) reset(ctx context.Context) error {
	w.settle(ctx)
	for _, e := range w.pending {
		w.finish(e, ErrRunBroken)
	}
	w.pending = nil
	ctx, cancel := bounded(ctx)
	defer cancel()
	s, err := w.q.js.Stream(ctx, w.stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if err = w.q.ensure(ctx); err == nil {
			s, err = w.q.js.Stream(ctx, w.stream)
		}
	}
	if err == nil {
		err = s.Purge(ctx)
	}
	if err == nil {
		w.last, err = w.lastSequence(ctx)
	}
	w.known, w.broken = err == nil, err != nil
	if err != nil {
		return fmt.Errorf("queue: reset %s: %w", w.stream, err)
	}
	return nil
}
