package cmd

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
)

// pipelineSteps measure what devices see of the server, and the stages between the queues.
func pipelineSteps() []step {
	return []step{
		{"sync", []figureSpec{
			{name: "empty_sync", unit: "syncs/s", bar: 0.5, what: "syncs of concurrent devices that have nothing to send or to get, against as many clients doing SELECT 1"},
			{name: "sessions", unit: "sessions/s", bar: 0.25, what: "two-way sessions of concurrent devices: a row up, its verdict of the merge, what changed down; against as many clients doing an INSERT and a SELECT at the source"},
			{name: "session_p50", unit: "ms", bar: 10, atMost: true, what: "median of such sessions of one device, nothing else going on; against the same two statements"},
			{name: "session_p99", unit: "ms", what: "99th percentile of the sessions of concurrent devices; against the same of the two statements", atMost: true},
		}, worldOptions{}, (*bench).syncs},
		{"flat-devices", []figureSpec{{name: "flat_devices", unit: "ms", bar: 1.3, atMost: true, what: "99th percentile of a session, of all concurrent devices, with a hundred times as many enrolled; against none but these"}},
			worldOptions{}, (*bench).flatDevices},
		{"first-sync", []figureSpec{{name: "first_sync", unit: "rows/s", bar: 0.5, what: "a new device's first sync, against inserting the same rows into the same SQLite table with a prepared statement in one transaction"}},
			worldOptions{}, (*bench).firstSync},
		{"stages", []figureSpec{
			{name: "intake", unit: "rows/s", bar: 0.5, what: "requests in the input queue to staged rows, against COPY of the same rows into such a table"},
			{name: "merge", unit: "rows/s", bar: 0.7, what: "staged rows (one in ten stale) to mirror tables and ledger; against COPY of the same rows to a logged table and INSERT ... ON CONFLICT DO UPDATE"},
		}, worldOptions{}, (*bench).stagesAlone},
		{"fanout", []figureSpec{{name: "fanout", unit: "CPU s", bar: 10, atMost: true, what: "CPU of the server, the devices' clients included, to bring 1,000 changed rows to 100 devices with the same subset; against to one"}},
			worldOptions{users: 1, rows: 2000}, (*bench).fanout},
		{"flat-mirror", []figureSpec{{name: "flat_mirror", unit: "ms", bar: 1.3, atMost: true, what: "a sync with 10 changed rows of a mirror table of 50 times --users times --rows rows; against one of a hundredth of that"}},
			worldOptions{schema: flatSchema, fill: flatFill, definitions: flatDefinitions, cold: true}, (*bench).flatMirror},
	}
}

// clients has n clients work for a while, each one call after the other, and returns how long each call took, sorted.
func (b *bench) clients(ctx context.Context, n int, work func(ctx context.Context, i int) error) (times []time.Duration, perSecond float64, err error) {
	var mu sync.Mutex
	took, err := b.clock(func() error {
		end := time.Now().Add(time.Duration(b.seconds) * time.Second)
		g, gctx := errgroup.WithContext(ctx)
		for i := range n {
			g.Go(func() error {
				var mine []time.Duration
				for time.Now().Before(end) {
					t := time.Now()
					if err := work(gctx, i); err != nil {
						return err
					}
					mine = append(mine, time.Since(t))
				}
				mu.Lock()
				defer mu.Unlock()
				times = append(times, mine...)
				return nil
			})
		}
		return g.Wait()
	})
	slices.Sort(times)
	return times, rate(len(times), took), err
}

// percentile of sorted times, in milliseconds.
func percentile(times []time.Duration, q float64) float64 {
	if len(times) == 0 {
		return 0
	}
	return float64(times[int(q*float64(len(times)-1))].Microseconds()) / 1000
}

// check asks whether a session would bring anything, as a device does that has nothing to send.
func (d *loadDevice) check(ctx context.Context) error {
	var news protocol.News
	err := unhurried(ctx, func() (err error) {
		news, err = d.t.(device.Checker).Check(ctx, protocol.Watch{Sets: []protocol.WatchSet{{Set: d.set, Cursor: d.cursor}}, Only: true})
		return err
	})
	if err == nil && len(news.Sets) > 0 {
		err = fmt.Errorf("there is news for a device that has everything: %v", news.Sets)
	}
	return err
}

// session is a two-way one: a row up, its verdict and what changed down.
func (d *loadDevice) session(ctx context.Context) error {
	token, err := d.put(ctx, []protocol.Change{d.edit(d.rows[int(d.n)%len(d.rows)], fmt.Sprint("session ", d.n))})
	if err != nil {
		return err
	}
	verdicts, err := d.fetch(ctx, token)
	if err != nil {
		return err
	}
	told := false
	for _, v := range verdicts {
		if v.State != protocol.Merged && v.State != protocol.Applied {
			return fmt.Errorf("a record was %s: %s", v.State, v.Detail)
		}
		told = told || v.N == d.n && v.Incarnation == d.inc
	}
	if !told {
		return errors.New("a session ended without the verdict of its record")
	}
	return nil
}

// direct is what a client without Waystage would do at the source.
func (b *bench) direct(ctx context.Context, i int) error {
	if _, err := b.source.Exec(ctx, "INSERT INTO public.visit (item_id, note) VALUES ($1, 'seen')", i); err != nil {
		return err
	}
	var version int
	return b.source.QueryRow(ctx, "SELECT version FROM public.item WHERE id = $1", i).Scan(&version)
}

// settled waits until every change of a device has its final verdict, and compares mirror and source.
func (b *bench) settled(ctx context.Context, _ int) error {
	if _, err := until(ctx, b.mirror, "SELECT NOT EXISTS (SELECT 1 FROM waystage.change WHERE state = 'merged')"); err != nil {
		return err
	}
	var source, mirror string
	if err := b.source.QueryRow(ctx, itemSum).Scan(&source); err != nil {
		return err
	}
	if err := b.mirror.QueryRow(ctx, itemSum).Scan(&mirror); err != nil {
		return err
	}
	if source != mirror {
		return errors.New("mirror and source differ")
	}
	return nil
}

const itemSum = "SELECT md5(string_agg(md5(i::text), '' ORDER BY id)) FROM (SELECT id, owner, version, mrn, full_name, ward, balance, updated_at, notes FROM public.item) AS i"

func closeAll(devices []*loadDevice) {
	for _, d := range devices {
		if d != nil {
			_ = d.t.Close()
		}
	}
}

func (b *bench) syncs(ctx context.Context) error {
	devices, err := b.fleet(ctx)
	defer closeAll(devices)
	if err != nil {
		return err
	}
	some := func(figure string, n int, check func(context.Context, int) error, ours, base func(ctx context.Context, i int) error, value func([]time.Duration, float64) float64) error {
		if !b.wants(figure) {
			return nil
		}
		s := b.spec(figure)
		s.rows, s.check = b.users*b.rows, check
		side := func(work func(context.Context, int) error) func(context.Context) (float64, error) {
			return func(ctx context.Context) (float64, error) {
				times, perSecond, err := b.clients(ctx, n, work)
				return value(times, perSecond), err
			}
		}
		return b.compare(ctx, s, side(ours), side(base))
	}
	perSecond := func(_ []time.Duration, r float64) float64 { return r }
	at := func(q float64) func([]time.Duration, float64) float64 {
		return func(times []time.Duration, _ float64) float64 { return percentile(times, q) }
	}
	session := func(ctx context.Context, i int) error { return devices[i].session(ctx) }
	return errors.Join(
		some("empty_sync", b.users, nil, func(ctx context.Context, i int) error { return devices[i].check(ctx) }, func(ctx context.Context, _ int) error {
			var one int
			return b.source.QueryRow(ctx, "SELECT 1").Scan(&one)
		}, perSecond),
		some("sessions", b.users, b.settled, session, b.direct, perSecond),
		some("session_p50", 1, b.settled, session, b.direct, at(0.5)),
		some("session_p99", b.users, b.settled, session, b.direct, at(0.99)),
	)
}

// flatDevices has many more devices enrolled in one side: with what a device that synced once leaves in the mirror.
func (b *bench) flatDevices(ctx context.Context) error {
	devices, err := b.fleet(ctx)
	defer closeAll(devices)
	if err != nil {
		return err
	}
	s := b.spec("flat_devices")
	s.rows, s.check = b.users*b.rows, b.settled
	side := func(prepare string) func(context.Context) (float64, error) {
		return func(ctx context.Context) (float64, error) {
			if _, err := b.mirror.Exec(ctx, prepare); err != nil {
				return 0, err
			}
			if _, err := b.mirror.Exec(ctx, "VACUUM ANALYZE waystage.device, waystage.incarnation, waystage.session, waystage.cursor"); err != nil {
				return 0, err
			}
			times, _, err := b.clients(ctx, b.users, func(ctx context.Context, i int) error { return devices[i].session(ctx) })
			return percentile(times, 0.99), err
		}
	}
	const remove = `DELETE FROM waystage.device WHERE name LIKE 'idle-%'`
	return b.compare(ctx, s, side(fmt.Sprintf(`WITH d AS (
			INSERT INTO waystage.device (user_name, name, public_key, enrolled_at, last_seen_at, last_sync_at)
			SELECT 'u' || lpad((i %% %d)::text, 4, '0'), 'idle-' || i, 'key of idle ' || i, now(), now(), now() FROM generate_series(1, 99 * %[1]d) AS i
			ON CONFLICT DO NOTHING RETURNING id, user_name, name),
		n AS (INSERT INTO waystage.incarnation (id, device_id, last_n) SELECT md5(id::text), id, 1 FROM d),
		s AS (INSERT INTO waystage.session (device_id, user_name, device_name, token, incarnation, n, hash, nonce, set_name, content_type, encoding, received_at, state)
			SELECT id, user_name, name, md5(id::text) || '-1', md5(id::text), 1, '', '', 'own', 'application/cbor', '', now(), 'closed' FROM d RETURNING id, device_id, incarnation)
		INSERT INTO waystage.cursor (token, device_id, incarnation, set_name, session_id, since) SELECT 'idle.' || device_id, device_id, incarnation, 'own', id, 1 FROM s`, b.users)), side(remove))
}

// firstSync measures a new device's first download.
func (b *bench) firstSync(ctx context.Context) error {
	if err := b.addUser(ctx, "office", "office"); err != nil {
		return err
	}
	s := b.spec("first_sync")
	s.rows = b.users * b.rows
	var last *device.Device
	defer func() {
		if last != nil {
			_ = last.Close()
		}
	}()
	n := 0
	sync := func(ctx context.Context) (time.Duration, error) {
		if last != nil {
			if err := last.Close(); err != nil {
				return 0, err
			}
		}
		n++
		var err error
		if last, err = device.Open(ctx, filepath.Join(b.dir, fmt.Sprintf("office-%d.db", n)), device.Options{}); err != nil {
			return 0, err
		}
		err = last.Enrol(ctx, device.EnrolOptions{Servers: []string{b.url}, User: "office", Device: fmt.Sprintf("desk-%d", n), Password: benchPassword})
		if err != nil {
			return 0, err
		}
		return b.clock(func() error {
			_, err := last.Sync(ctx, device.SyncOptions{})
			return err
		})
	}
	if _, err := sync(ctx); err != nil { // the rows that the other side inserts
		return err
	}
	s.check = func(ctx context.Context, _ int) error {
		var rows int
		if err := last.DB().QueryRowContext(ctx, "SELECT count(*) FROM item").Scan(&rows); err != nil {
			return err
		}
		if rows != s.rows {
			return fmt.Errorf("the first sync brought %d rows of %d", rows, s.rows)
		}
		return nil
	}
	return b.compare(ctx, s, func(ctx context.Context) (float64, error) {
		took, err := sync(ctx)
		return rate(s.rows, took), err
	}, func(ctx context.Context) (float64, error) {
		n++
		took, err := plainInsert(ctx, last.DB(), filepath.Join(b.dir, fmt.Sprintf("plain-%d.db", n)))
		return rate(s.rows, took), err
	})
}
