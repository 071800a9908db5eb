package apply

import (
	"context"
	"errors"
	"fmt"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/sabotage"
)

// Changes is one direction's change data stream, as apply sees it.
type Changes interface {
	// Read begins at the oldest message that the queue still has.
	Read(ctx context.Context) (Reader, error)
	// Purge removes everything up to and including the message with that place.
	Purge(ctx context.Context, through uint64) error
}

// Reader brings messages in the queue's order. One goroutine uses it.
type Reader interface {
	// Next waits for the next message and returns it with its place in the queue.
	Next(ctx context.Context) (m change.Message, place uint64, err error)
	Close()
}

// errGap means that change data is missing: the queue lost it. Capture must send it again.
var errGap = errors.New("change data is missing")

// errCut means that capture began a new run in the middle of a group: read on from the new run's beginning.
var errCut = errors.New("capture began a new run")

// feed puts messages together to transactions, and notices what the queue lost, doubled or reordered. What counts is
// what a group says of itself: it holds everything between prev and end. So a group is good when it begins at or before
// what is applied, whoever wrote it; transactions that are applied already are left out.
type feed struct {
	applied change.LSN // end of the last transaction handed on, or known to be applied

	open bool // a group has begun whose last part has not come
	run  string
	seq  uint64
	part int

	frames change.Frames
	ev     change.Event
	skip   bool // the current transaction is applied already
	inTx   bool
}

// newFeed begins behind a position.
func newFeed(applied change.LSN) *feed { return &feed{applied: applied} }

// take hands the events of one message to fn, transaction by transaction. It returns errGap when something is missing.
func (f *feed) take(m *change.Message, fn func(*change.Event) error) error {
	switch {
	case m.Part == 1:
		if f.open && f.inTx && !f.skip { // part of a transaction was handed on: the caller rolls back
			return fmt.Errorf("%w: a group was cut off after part %d", errCut, f.part)
		}
		f.open, f.frames, f.inTx, f.skip = false, change.Frames{}, false, false
		if m.Prev > f.applied && !sabotage.On(sabotage.IgnoreGap) {
			return fmt.Errorf("%w: everything up to %s is applied, the next group begins at %s", errGap, f.applied, m.Prev)
		}
		if m.Last && m.End <= f.applied {
			return nil
		}
		f.open, f.run, f.seq, f.part = true, m.Run, m.Seq, 1
	case f.open && m.Run == f.run && m.Seq == f.seq+1 && m.Part == f.part+1:
		f.seq, f.part = m.Seq, m.Part
	case f.open && m.Run == f.run && m.Seq <= f.seq:
		return nil // doubled
	case f.open && m.Run == f.run:
		return fmt.Errorf("%w: part %d is followed by part %d", errGap, f.part, m.Part)
	default:
		// The tail of a group that was purged because it is applied, or that a stopped capture still wrote.
		if m.Last && m.End > f.applied {
			return fmt.Errorf("%w: the beginning of the group that ends at %s", errGap, m.End)
		}
		return nil
	}
	if err := f.frames.Feed(m.Body, func(frame []byte) error { return f.frame(frame, fn) }); err != nil {
		return err
	}
	if m.Last {
		if !f.frames.Done() || f.inTx {
			return fmt.Errorf("%w: a group ends in the middle of a transaction", change.ErrNotChangeData)
		}
		f.open = false
		f.applied = max(f.applied, m.End)
	}
	return nil
}

func (f *feed) frame(frame []byte, fn func(*change.Event) error) error {
	ok, err := change.Decode(frame, &f.ev)
	if err != nil || !ok {
		return err
	}
	switch f.ev.Kind {
	case change.KindBegin:
		// The start of a commit record before the applied position means that its end is not behind it.
		f.inTx, f.skip = true, f.ev.LSN < f.applied
	case change.KindCommit:
		skipped := f.skip
		f.inTx, f.skip = false, false
		if skipped {
			return nil
		}
		f.applied = f.ev.LSN
		return fn(&f.ev)
	case change.KindRelation:
		return fn(&f.ev)
	}
	if f.skip {
		return nil
	}
	return fn(&f.ev)
}
