package cmd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
)

// neighbourPace is how often each device of the measurement sends a session; the flooding one sends floodFactor times as often.
const (
	neighbourPace = 200 * time.Millisecond
	floodFactor   = 100
)

// neighbour measures how long devices wait for the receipts of their requests while one device sends a hundred times as much, against
// the same without it.
func (b *bench) neighbour(ctx context.Context) error {
	devices, err := b.fleet(ctx)
	if err != nil {
		return err
	}
	for _, d := range devices {
		defer func() { _ = d.t.Close() }()
	}
	flooder, others := devices[0], devices[1:min(len(devices), 21)]
	if len(others) == 0 {
		return errors.New("the measurement of neighbours wants two users at least")
	}
	quiet, err := b.receipts(ctx, others)
	if err != nil {
		return err
	}
	fctx, stop := context.WithCancel(ctx)
	defer stop()
	g, fctx := errgroup.WithContext(fctx)
	calls, busy := 0, 0
	g.Go(func() (err error) {
		calls, busy, err = flooder.flood(fctx)
		return err
	})
	loud, err := b.receipts(ctx, others)
	stop()
	if err = errors.Join(err, g.Wait()); err != nil {
		return err
	}
	const p99 = 0.99
	at := func(times []time.Duration) float64 {
		return float64(times[int(p99*float64(len(times)-1))].Microseconds()) / 1000
	}
	b.record("neighbour_p99", at(loud), "ms", at(quiet), fmt.Sprintf(
		"receipt of a request, 99th percentile of %d devices, while another sends %d times as much as one of them (%d calls, %d told to wait); against without it", len(others), floodFactor, calls, busy))
	return nil
}

// receipts measures the time from put to receipt of devices that each send a session every now and then.
func (b *bench) receipts(ctx context.Context, devices []*loadDevice) ([]time.Duration, error) {
	var mu sync.Mutex
	var times []time.Duration
	end := time.Now().Add(time.Duration(b.seconds) * time.Second)
	g, ctx := errgroup.WithContext(ctx)
	for _, d := range devices {
		g.Go(func() error {
			for next := time.Now(); next.Before(end); next = next.Add(neighbourPace) {
				if err := sleep(ctx, time.Until(next)); err != nil {
					return err
				}
				began := time.Now()
				token, err := d.put(ctx, []protocol.Change{d.edit(d.rows[int(d.n)%len(d.rows)], fmt.Sprint("neighbour ", d.n))})
				if err != nil {
					return err
				}
				took := time.Since(began)
				if _, err := d.fetch(ctx, token); err != nil {
					return err
				}
				mu.Lock()
				times = append(times, took)
				mu.Unlock()
			}
			return nil
		})
	}
	err := g.Wait()
	slices.Sort(times)
	return times, err
}

// flood sends the same small part again and again until ctx ends, whatever the server says; it counts the calls, and those that
// were told to wait.
func (d *loadDevice) flood(ctx context.Context) (calls, busy int, err error) {
	token := protocol.SessionToken(d.inc, d.n+1)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(64)
	var mu sync.Mutex
	tick := time.NewTicker(neighbourPace / floodFactor)
	defer tick.Stop()
	for gctx.Err() == nil {
		select {
		case <-gctx.Done():
			continue
		case <-tick.C:
		}
		part := protocol.PartToken(1+calls%protocol.MaxParts, protocol.MaxParts) // of a request that never becomes whole
		calls++
		g.Go(func() error {
			_, err := d.t.Put(gctx, token, part, device.Payload{ContentType: protocol.ContentCBOR, Data: []byte("flood")})
			var refused *protocol.Error
			switch {
			case err == nil, gctx.Err() != nil:
				return nil
			case errors.As(err, &refused) && refused.Code == protocol.CodeBusy:
				mu.Lock()
				busy++
				mu.Unlock()
				return nil
			}
			return err
		})
	}
	err = g.Wait()
	return calls, busy, err
}
