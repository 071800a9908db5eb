package cmd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/capture"
	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/queue"
	"github.com/waystage/waystage/stages"
)

// The types of this file let packages meet that do not know one another: queue as the stages, capture and apply want to
// see it. They hold no logic of their own.

// input is the input queue as intake sees it.
type input struct{ *queue.Queue }

func (i input) Fetch(ctx context.Context, limit int, wait time.Duration) ([]*stages.Part, error) {
	parts, err := i.Queue.Fetch(ctx, limit, wait)
	return partsForStages(parts), err
}

func (i input) AckAll(ctx context.Context, parts []*stages.Part) error {
	own := make([]*queue.Part, 0, len(parts))
	for _, p := range parts {
		own = append(own, p.Delivery.(delivery).Part)
	}
	return i.Queue.AckAll(ctx, own)
}

// delivery is one part as intake settles it.
type delivery struct{ *queue.Part }

func (d delivery) Series(ctx context.Context) ([]*stages.Part, int, error) {
	parts, missing, err := d.Part.Series(ctx)
	return partsForStages(parts), missing, err
}

func partsForStages(parts []*queue.Part) []*stages.Part {
	out := make([]*stages.Part, len(parts))
	for i, p := range parts {
		out[i] = &stages.Part{User: p.User, Device: p.Device, Session: p.Session, Index: p.Index, Total: p.Total,
			ContentType: p.ContentType, Encoding: p.Encoding, Data: p.Data, ReceivedAt: p.ReceivedAt, Deliveries: p.Deliveries, Delivery: delivery{p}}
	}
	return out
}

// publisher is one direction's change data as capture sees it.
type publisher struct {
	q         *queue.Queue
	direction string
}

func (p publisher) PublishChange(ctx context.Context, m *change.Message) (capture.Receipt, error) {
	stored, err := p.q.PublishChange(ctx, p.direction, m)
	if err != nil {
		return nil, streamLost(err)
	}
	return receipt{stored}, nil
}

func (p publisher) ResetChanges(ctx context.Context) error { return p.q.ResetChanges(ctx, p.direction) }

// receipt is a change message on its way.
type receipt struct{ stored <-chan error }

func (r receipt) Wait(ctx context.Context) error {
	select {
	case err := <-r.stored:
		return streamLost(err)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// streamLost translates the queue's word for a stream that no longer continues a run into capture's.
func streamLost(err error) error {
	if errors.Is(err, queue.ErrRunBroken) {
		return fmt.Errorf("%w: %w", capture.ErrStreamLost, err)
	}
	return err
}

// changes is one direction's change data as apply sees it.
type changes struct {
	q         *queue.Queue
	direction string
}

func (c changes) Read(context.Context) (apply.Reader, error) { return c.q.Changes(c.direction) }

func (c changes) Purge(ctx context.Context, through uint64) error {
	return c.q.PurgeChanges(ctx, c.direction, through)
}
