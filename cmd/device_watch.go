package cmd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/waystage/waystage/device"
)

// watchEvery is how often a watching device syncs though it hears of nothing: what it should have heard may be lost.
const watchEvery = 15 * time.Minute

// schedule says when a device syncs.
type schedule struct {
	every   time.Duration // at the latest so long after the last sync
	watch   bool          // and as soon as something waits at the server or was edited
	between hours         // but only then
}

// syncBy syncs again and again. What can mend itself is told and tried again, after pauses that grow; the rest ends it.
func (a *app) syncBy(ctx context.Context, path string, o device.SyncOptions, f format, s schedule) error {
	failures, closed := 0, false
	for {
		if wait := s.between.until(time.Now()); wait > 0 {
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
		if err == nil && len(wake.Sets) > 0 {
			a.say("something waits at the server: %s", strings.Join(wake.Sets, ", "))
			return sleep(wctx, rand.N(500*time.Millisecond)) // others may have heard the same
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

// hours is a span of the day; the zero value is all of it. It may go over midnight.
type hours struct{ from, to int } // minutes since midnight

func parseHours(s string) (hours, error) {
	if s == "" {
		return hours{}, nil
	}
	from, to, ok := strings.Cut(s, "-")
	a, err1 := time.Parse("15:04", strings.TrimSpace(from))
	b, err2 := time.Parse("15:04", strings.TrimSpace(to))
	if !ok || err1 != nil || err2 != nil {
		return hours{}, usage("--between wants hours such as 09:00-22:00, not %q", s)
	}
	return hours{a.Hour()*60 + a.Minute(), b.Hour()*60 + b.Minute()}, nil
}

func (h hours) String() string {
	return fmt.Sprintf("%02d:%02d-%02d:%02d", h.from/60, h.from%60, h.to/60, h.to%60)
}

func (h hours) include(t time.Time) bool {
	m := t.Hour()*60 + t.Minute()
	switch {
	case h.from == h.to:
		return true
	case h.from < h.to:
		return m >= h.from && m < h.to
	default:
		return m >= h.from || m < h.to
	}
}

// until is how long it takes until the span begins, 0 in it.
func (h hours) until(t time.Time) time.Duration {
	if h.include(t) {
		return 0
	}
	start := time.Date(t.Year(), t.Month(), t.Day(), h.from/60, h.from%60, 0, 0, t.Location())
	if !start.After(t) {
		start = start.AddDate(0, 0, 1)
	}
	return start.Sub(t)
}
