package capture

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/waystage/waystage/change"
)

// Publisher is the queue as capture sees it. One capture calls it from one goroutine.
type Publisher interface {
	// PublishChange hands a message over. Messages that are accepted are stored in the order of the calls. It may block.
	PublishChange(ctx context.Context, m *change.Message) (Receipt, error)
	// ResetChanges empties the stream of this direction, and makes it if it is not there.
	ResetChanges(ctx context.Context) error
}

// Receipt is a message on its way into the queue.
type Receipt interface {
	// Wait returns nil once the queue has the message.
	Wait(ctx context.Context) error
}

// ErrStreamLost is returned (wrapped) by a Publisher whose stream has vanished. The capture starts a new run.
var ErrStreamLost = errors.New("the change data stream is gone")

// errReordered ends a run: a message was refused but a later one was stored.
var errReordered = errors.New("the queue stored a message behind one that it refused")

const (
	windowMessages = 64
	windowBytes    = 8 << 20
	retryFirst     = 50 * time.Millisecond
	retryMost      = 5 * time.Second
)

type outstanding struct {
	m *change.Message
	r Receipt
}

// publish moves messages from in to the queue, many at a time, and keeps their order whatever fails.
func publish(ctx context.Context, q Publisher, in <-chan change.Message, log *zap.Logger, done func(*change.Message)) error {
	var out []outstanding
	bytes := 0
	for {
		if len(out) < windowMessages && bytes < windowBytes {
			m, ok, err := receive(ctx, in, len(out) == 0)
			if err != nil {
				return err
			}
			if ok {
				r, err := q.PublishChange(ctx, &m)
				if err != nil {
					r = failed{err}
				}
				out = append(out, outstanding{&m, r})
				bytes += len(m.Body)
				continue
			}
		}
		err := out[0].r.Wait(ctx)
		if err != nil {
			if err := republish(ctx, q, out, err, log); err != nil {
				return err
			}
			for _, o := range out {
				done(o.m)
			}
			out, bytes = out[:0], 0
			continue
		}
		done(out[0].m)
		bytes -= len(out[0].m.Body)
		out = out[1:]
	}
}

// receive takes the next message; it blocks only if told to.
func receive(ctx context.Context, in <-chan change.Message, block bool) (change.Message, bool, error) {
	if block {
		select {
		case m := <-in:
			return m, true, nil
		case <-ctx.Done():
			return change.Message{}, false, ctx.Err()
		}
	}
	select {
	case m := <-in:
		return m, true, nil
	default:
		return change.Message{}, false, nil
	}
}

type failed struct{ err error }

func (f failed) Wait(context.Context) error { return f.err }

// republish is called when the first of out failed with cause. It waits for the fate of the others, then sends all
// again, one at a time: a full queue is waited for, however long it takes.
func republish(ctx context.Context, q Publisher, out []outstanding, cause error, log *zap.Logger) error {
	if errors.Is(cause, ErrStreamLost) {
		return cause
	}
	for _, o := range out[1:] {
		if o.r.Wait(ctx) == nil {
			return fmt.Errorf("%w: %w", errReordered, cause)
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	log.Warn("the queue does not take change data; waiting", zap.Uint64("seq", out[0].m.Seq), zap.Error(cause))
	began := time.Now()
	for _, o := range out {
		for wait := retryFirst; ; wait = min(2*wait, retryMost) {
			r, err := q.PublishChange(ctx, o.m)
			if err == nil {
				err = r.Wait(ctx)
			}
			if err == nil {
				break
			}
			if errors.Is(err, ErrStreamLost) {
				return err
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(wait):
			}
		}
	}
	log.Info("the queue takes change data again", zap.Duration("after", time.Since(began)))
	return nil
}
