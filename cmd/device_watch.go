package cmd

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/hours"
)

// watchEvery is how often a watching device syncs though it hears of nothing: what it should have heard may be lost.
const watchEvery = 15 * time.Minute

// schedule says when a device syncs.
type schedule struct {
	every   time.Duration // at the latest so long after the last sync
	watch   bool          // and as soon as something waits at the server or was edited
	between hours.Span    // but only then
}

// syncBy syncs again and again. What can mend itself is told and tried again, after pauses that grow; the rest ends it.
func (a *app) syncBy(ctx context.Context, path string, o device.SyncOptions, f format, s schedule) error {
	failures, closed := 0, false
	for {
		if wait := s.between.Until(time.Now()); wait > 0 {
			if !closed {
				a.say("outside %s: syncs go on in %s", s.between, span(wait))
			}
			closed = true
			if err := sleep(ctx, min(wait, time.Minute)); err != nil { // in steps: the clock may be set, the machine may have slept
				return err
			}
			continue
		}
		closed = false
		err := a.sync(ctx, path, o, f)
		switch code := exitCode(err); code {
		case exitOK, exitRejected:
			failures = 0
			err = a.awaitNext(ctx, path, o.Sets, s)
		}
		switch code := exitCode(err); code {
		case exitOK, exitRejected:
		case exitUnreachable, exitFailed:
			report(a.err, err)
			failures++
			if err := sleep(ctx, min(s.every, backOff(failures))); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// backOff grows from about two seconds to about a minute. It differs from device to device: they do not all come back at once.
func backOff(failures int) time.Duration {
	d := min(time.Second<<min(failures, 6), time.Minute)
	return d/2 + rand.N(d)
}

// awaitNext returns when the next sync is due.
func (a *app) awaitNext(ctx context.Context, path string, sets []string, s schedule) error {
	if !s.watch {
		return sleep(ctx, s.every)
	}
	wctx, cancel := context.WithTimeout(ctx, s.every)
	defer cancel()
	err := a.withDevice(wctx, path, false, "cannot watch", func(d *device.Device) error {
		wake, err := d.Await(wctx, sets...)
		switch { // others may have heard the same
		case err == nil && len(wake.Sets) > 0:
			a.say("something waits at the server: %s", strings.Join(wake.Sets, ", "))
			return sleep(wctx, rand.N(500*time.Millisecond))
		case err == nil && wake.Opened:
			return sleep(wctx, rand.N(10*time.Second))
		}
		return err
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(wctx.Err(), context.DeadlineExceeded):
		return nil
	}
	return err
}
