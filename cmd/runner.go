package cmd

import (
	"context"
	"fmt"
	"time"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/capture"
	"github.com/waystage/waystage/queue"
	"github.com/waystage/waystage/stages"
)

// runner is a worker whose whole life is one batch: a capture, an applier, a gateway.
type runner struct {
	seat chan struct{} // holds one token; nil: all workers run
	run  func(context.Context) error
	tell func() string // what it does now, for pools ls
}

// newRunners makes workers that all run.
func newRunners(run func(context.Context) error, tell func() string) func() stages.Worker {
	return func() stages.Worker { return runner{run: run, tell: tell} }
}

// newRunner makes workers of which one runs and the others of this process stand by, as those of other processes do.
func newRunner(run func(context.Context) error, tell func() string) func() stages.Worker {
	r := runner{seat: make(chan struct{}, 1), run: run, tell: tell}
	r.seat <- struct{}{}
	return func() stages.Worker { return r }
}

// tellEvery is how often a runner's words are refreshed.
const tellEvery = time.Second

// Batch runs until take ends. It returns when the long-runner has ended, whatever happens.
func (r runner) Batch(take, _ context.Context, doing func(string)) (int, error) {
	if r.seat != nil {
		doing("standby in this process")
		select {
		case <-r.seat:
			defer func() { r.seat <- struct{}{} }()
		case <-take.Done():
			return 0, nil
		}
	}
	done := make(chan error, 1)
	go func() { done <- r.run(take) }()
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		doing(r.tell())
		select {
		case err := <-done:
			switch {
			case take.Err() != nil:
				return 0, nil
			case err == nil:
				return 0, fmt.Errorf("ended by itself")
			}
			return 0, err
		case <-tick.C:
		}
	}
}

func tellCapture(c *capture.Capture) func() string {
	return func() string {
		s := c.Stats()
		if s.State != "streaming" {
			return s.State
		}
		return fmt.Sprintf("streaming: %d transactions, %d rows, lag %s", s.Transactions, s.Rows, human(s.LagBytes))
	}
}

func tellApply(stats func() apply.Stats) func() string {
	return func() string {
		s := stats()
		if s.State != "applying" {
			return s.State
		}
		return fmt.Sprintf("applying: %d transactions, %d rows, at %s", s.Transactions, s.Rows, s.Position)
	}
}

func tellGateway(g *queue.Gateway) func() string {
	return func() string {
		s := g.Stats()
		return fmt.Sprintf("answers devices: %d puts, %d gets, %d held now", s.Puts, s.Gets, s.Held)
	}
}

// What a runner has done, and how far it is behind, for its pool.

func captured(c *capture.Capture) func() int64 {
	return func() int64 { return int64(c.Stats().Rows) }
}

func lagging(c *capture.Capture) func() int64 {
	return func() int64 { return c.Stats().LagBytes }
}

func applied(stats func() apply.Stats) func() int64 {
	return func() int64 { return int64(stats().Rows) }
}
