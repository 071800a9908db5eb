package cmd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
)

// fanoutDevices, fanoutRows and fanoutSingles: so many devices get so many changed rows, against one device, so many times since it
// costs too little to be measured once.
const (
	fanoutDevices = 100
	fanoutRows    = 1000
	fanoutSingles = 20
)

// fanout measures what it costs to bring the same rows to many devices.
func (b *bench) fanout(ctx context.Context) error {
	if err := b.addUser(ctx, "u0000", "field"); err != nil {
		return err
	}
	devices := make([]*loadDevice, fanoutDevices+1)
	defer closeAll(devices)
	for i := range devices {
		d, err := b.loadDevice(ctx, "u0000", fmt.Sprintf("load-%d", i), "own")
		if err != nil {
			return err
		}
		devices[i] = d
		token, err := d.put(ctx, nil)
		if err == nil {
			_, err = d.fetch(ctx, token)
		}
		if err != nil {
			return err
		}
	}
	change := func(ctx context.Context) error {
		if _, err := b.source.Exec(ctx, "UPDATE public.item SET version = version + 1 WHERE id < $1", fanoutRows); err != nil {
			return err
		}
		var want int
		if err := b.source.QueryRow(ctx, "SELECT min(version) FROM public.item WHERE id < $1", fanoutRows).Scan(&want); err != nil {
			return err
		}
		if _, err := until(ctx, b.mirror, "SELECT min(version) = $1 FROM public.item WHERE id < $2", want, fanoutRows); err != nil {
			return err
		}
		return sleep(ctx, 100*time.Millisecond) // what follows of the last one
	}
	bring := func(ctx context.Context, list []*loadDevice) error {
		pages := make([][]device.Payload, len(list))
		_, err := b.clock(func() error {
			return each(ctx, list, func(ctx context.Context, i int, d *loadDevice) error {
				token, err := d.put(ctx, nil)
				if err != nil {
					return err
				}
				pages[i], err = d.pages(ctx, token)
				return err
			})
		})
		if err != nil {
			return err
		}
		for i, d := range list { // what a device does is not the server's
			rows, last := 0, false
			for _, p := range pages[i] {
				body, err := protocol.Decompress(p.Data, p.Encoding, 64<<20)
				if err != nil {
					return err
				}
				page, err := protocol.DecodePage(body, p.ContentType, protocol.DefaultLimits())
				if err != nil {
					return err
				}
				if page.Error != nil {
					return page.Error
				}
				for _, t := range page.Tables {
					rows += len(t.Rows)
				}
				if last = page.Last; last {
					d.cursor, d.epoch = page.Cursor, page.Epoch
				}
			}
			if !last {
				return fmt.Errorf("a reply has more than %d pages", fanoutPages)
			}
			if rows != fanoutRows {
				return fmt.Errorf("a device got %d rows of %d", rows, fanoutRows)
			}
		}
		return nil
	}
	s := b.spec("fanout")
	s.rows = fanoutRows
	return b.compare(ctx, s, func(ctx context.Context) (float64, error) {
		if err := change(ctx); err != nil {
			return 0, err
		}
		err := bring(ctx, devices[:fanoutDevices])
		return b.sample.cpu.Seconds(), err
	}, func(ctx context.Context) (float64, error) {
		for range fanoutSingles {
			if err := change(ctx); err != nil {
				return 0, err
			}
			if err := bring(ctx, devices[fanoutDevices:]); err != nil {
				return 0, err
			}
		}
		return b.sample.cpu.Seconds() / fanoutSingles, nil
	})
}

// each has all devices work at the same time.
func each(ctx context.Context, list []*loadDevice, work func(context.Context, int, *loadDevice) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for i, d := range list {
		g.Go(func() error { return work(ctx, i, d) })
	}
	return g.Wait()
}

// fanoutPages is how many pages the changed rows fill.
const fanoutPages = 2

// pages reads a reply without looking into it.
func (d *loadDevice) pages(ctx context.Context, token string) (list []device.Payload, err error) {
	for len(list) < fanoutPages {
		p, err := d.t.Get(ctx, token, len(list)+1)
		var refused *protocol.Error
		if errors.As(err, &refused) && refused.Code == protocol.CodePending {
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	return list, d.t.Ack(ctx, token)
}

// The tables of flat_mirror: the larger one has fifty times --users times --rows rows (10,000,000 by default), the other a hundredth
// of that. A device has one group of a thousand rows of each.
const (
	flatSchema = `CREATE TABLE public.large (id bigint PRIMARY KEY, grp int NOT NULL, version int NOT NULL, note text);
		CREATE TABLE public.small (LIKE public.large INCLUDING ALL);
		CREATE TABLE public.item (id bigint PRIMARY KEY)`
	flatFill = `WITH l AS (INSERT INTO public.large SELECT i, i / 1000, 1, repeat(md5(i::text), 3) FROM generate_series(0, 50 * %[1]d * %[2]d - 1) AS i)
		INSERT INTO public.small SELECT i, i / 1000, 1, repeat(md5(i::text), 3) FROM generate_series(0, %[1]d * %[2]d / 2 - 1) AS i`
	flatDefinitions = `version: 1
subscriptions:
  large: {table: public.large, direction: download-only, key: grp, rows: "select 0"}
  small: {table: public.small, direction: download-only, key: grp, rows: "select 0"}
sets:
  large: [large]
  small: [small]
groups:
  field: {sets: [large, small]}
`
	flatSyncs = 30 // of a side of a round
)

// flatMirror measures whether a sync costs more in a larger mirror.
func (b *bench) flatMirror(ctx context.Context) error {
	if err := b.addUser(ctx, "u0000", "field"); err != nil {
		return err
	}
	if _, err := b.mirror.Exec(ctx, "VACUUM ANALYZE public.large, public.small"); err != nil {
		return err
	}
	side := func(table string) (func(context.Context) (float64, error), error) {
		d, err := b.loadDevice(ctx, "u0000", table, table)
		if err != nil {
			return nil, err
		}
		token, err := d.put(ctx, nil)
		if err == nil {
			_, err = d.fetch(ctx, token)
		}
		return func(ctx context.Context) (float64, error) {
			var times []time.Duration
			for range flatSyncs {
				var version int
				if _, err := b.source.Exec(ctx, "UPDATE public."+table+" SET version = version + 1 WHERE id < 10"); err != nil {
					return 0, err
				}
				if err := b.source.QueryRow(ctx, "SELECT version FROM public."+table+" WHERE id = 0").Scan(&version); err != nil {
					return 0, err
				}
				if _, err := until(ctx, b.mirror, "SELECT version = $1 FROM public."+table+" WHERE id = 9", version); err != nil {
					return 0, err
				}
				took, err := b.clock(func() error {
					token, err := d.put(ctx, nil)
					if err != nil {
						return err
					}
					_, err = d.fetch(ctx, token)
					return err
				})
				if err != nil {
					return 0, err
				}
				times = append(times, took)
			}
			slices.Sort(times)
			return percentile(times, 0.5), nil
		}, err
	}
	large, err := side("large")
	if err != nil {
		return err
	}
	small, err := side("small")
	if err != nil {
		return err
	}
	s := b.spec("flat_mirror")
	if err := b.mirror.QueryRow(ctx, "SELECT count(*) FROM public.large").Scan(&s.rows); err != nil {
		return err
	}
	return b.compare(ctx, s, large, small)
}
