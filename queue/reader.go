package queue

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/waystage/waystage/change"
)

const (
	readAheadMessages = 256
	readAheadBytes    = 16 << 20

	// While nothing comes, the reader looks this often whether the stream is still the one that it reads.
	readerCheck = time.Second
)

// ChangeReader reads one direction's change data in order. It is for one goroutine.
type ChangeReader struct {
	q      *Queue
	stream string

	created time.Time // of the stream that is being read
	last    uint64    // stream sequence of the last message returned
	cons    jetstream.Consumer
	iter    jetstream.MessagesContext
	want    uint64 // next delivery of the consumer
}

// Changes opens a reader at the first stored message. It does no I/O; Next connects.
func (q *Queue) Changes(direction string) (*ChangeReader, error) {
	stream, _, err := changeStream(direction)
	if err != nil {
		return nil, err
	}
	return &ChangeReader{q: q, stream: stream}, nil
}

// Next waits for the next message and returns it with its sequence in the stream, to be given to PurgeChanges when the
// message is applied. It makes a lost consumer anew behind the last message returned, so no message comes twice; a
// gap (messages that were purged unread) shows in the messages' own numbers. Errors: ctx's; [ErrChangesReset]; one that
// wraps [change.ErrNotChangeData] for a message that no capture wrote. A broker that is away is waited out.
func (r *ChangeReader) Next(ctx context.Context) (change.Message, uint64, error) {
	wait := 50 * time.Millisecond
	for {
		m, err := r.next(ctx)
		switch {
		case err == nil:
			c, err := change.Parse(m.Headers(), m.Data())
			if err != nil {
				return change.Message{}, r.last, fmt.Errorf("queue: message %d of %s: %w", r.last, r.stream, err)
			}
			return c, r.last, nil
		case ctx.Err() != nil:
			return change.Message{}, 0, ctx.Err()
		case r.q.ctx.Err() != nil:
			return change.Message{}, 0, errClosed
		case errors.Is(err, ErrChangesReset):
			r.stop()
			r.created, r.last = time.Time{}, 0
			return change.Message{}, 0, err
		}
		r.q.log.Debug("change data is read anew", zap.String("stream", r.stream), zap.Uint64("after", r.last), zap.Error(err))
		r.q.heal(err)
		r.stop()
		if !sleep(ctx, wait) {
			return change.Message{}, 0, ctx.Err()
		}
		wait = min(2*wait, time.Second)
	}
}

// next returns one message, or why there must be a new consumer.
func (r *ChangeReader) next(ctx context.Context) (jetstream.Msg, error) {
	if r.iter == nil {
		if err := r.open(ctx); err != nil {
			return nil, err
		}
	}
	for {
		slice, cancel := context.WithTimeout(ctx, readerCheck)
		m, err := r.iter.Next(jetstream.NextContext(slice))
		cancel()
		if err != nil {
			if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
				return nil, err
			}
			if err := r.check(ctx); err != nil {
				return nil, err
			}
			continue
		}
		meta, err := m.Metadata()
		if err != nil {
			return nil, err
		}
		if meta.Sequence.Consumer != r.want {
			return nil, fmt.Errorf("delivery %d came instead of %d", meta.Sequence.Consumer, r.want)
		}
		r.want++
		r.last = meta.Sequence.Stream
		return m, nil
	}
}

// check finds out whether the stream is still the one that was read so far, and has a consumer of ours.
func (r *ChangeReader) check(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	s, err := r.q.js.Stream(ctx, r.stream)
	if err != nil {
		return err
	}
	info := s.CachedInfo()
	if r.created.IsZero() {
		r.created = info.Created
	}
	if !info.Created.Equal(r.created) || info.State.LastSeq < r.last {
		return ErrChangesReset
	}
	if r.cons != nil {
		_, err = r.cons.Info(ctx)
	}
	return err
}

func (r *ChangeReader) open(ctx context.Context) error {
	if err := r.check(ctx); err != nil {
		return err
	}
	make, cancel := bounded(ctx)
	defer cancel()
	cons, err := r.q.js.CreateConsumer(make, r.stream, jetstream.ConsumerConfig{
		Description: "reader of change data", DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: r.last + 1,
		AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true, Replicas: 1, InactiveThreshold: time.Minute,
	})
	if err != nil {
		return err
	}
	iter, err := cons.Messages(jetstream.PullMaxMessagesWithBytesLimit(readAheadMessages, readAheadBytes), jetstream.PullExpiry(10*time.Second))
	if err != nil {
		return err
	}
	r.cons, r.iter, r.want = cons, iter, 1
	return nil
}

func (r *ChangeReader) stop() {
	if r.iter != nil {
		r.iter.Stop()
		r.iter = nil
	}
	r.cons = nil // ends by itself: deleting it could hang while the broker is away
}

// Close ends the reader's consumer.
func (r *ChangeReader) Close() {
	if r.iter != nil {
		r.iter.Stop()
		r.iter = nil
	}
	if r.cons != nil && r.q.app.IsConnected() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = r.q.js.DeleteConsumer(ctx, r.stream, r.cons.CachedInfo().Name) // else it ends after a minute without reader
	}
	r.cons = nil
}
