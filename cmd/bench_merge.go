package cmd

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/stages"
)

// staleEvery is which records of the measurement of merge are based on an obsolete version: one in so many.
const staleEvery = 10

// stageLoad is a round of intake or merge: a session of each device, with changes of half its rows.
type stageLoad struct {
	devices []*loadDevice
	tokens  []string
	records int
	stale   int
}

// send puts the sessions while nothing takes them.
func (b *bench) send(ctx context.Context, l *stageLoad, stale bool) error {
	if err := b.pools(ctx, stages.ModePause, "intake", "merge", "reply"); err != nil {
		return err
	}
	l.records, l.stale, l.tokens = 0, 0, make([]string, len(l.devices))
	for i, d := range l.devices {
		var changes []protocol.Change
		for j, r := range d.rows[:len(d.rows)/2] {
			c := d.edit(r, fmt.Sprintf("edited on device %s in session %d", d.inc, d.n+1))
			if stale && j%staleEvery == 0 {
				c.Version = "1"
				l.stale++
			}
			changes = append(changes, c)
		}
		l.records += len(changes)
		var err error
		if l.tokens[i], err = d.put(ctx, changes); err != nil {
			return err
		}
	}
	return nil
}

// take lets intake work until everything is staged.
func (b *bench) take(ctx context.Context, l *stageLoad) error {
	if err := b.pools(ctx, stages.ModeRun, "intake"); err != nil {
		return err
	}
	_, err := until(ctx, b.mirror, "SELECT count(*) = $1 FROM waystage.session WHERE state = 'staged'", len(l.devices))
	return err
}

// finish lets everything work, reads the replies, and looks whether each record has the verdict that it should have.
func (b *bench) finish(ctx context.Context, l *stageLoad) error {
	if err := b.pools(ctx, stages.ModeRun, "intake", "merge", "reply"); err != nil {
		return err
	}
	rejected := 0
	for i, d := range l.devices {
		verdicts, err := d.fetch(ctx, l.tokens[i])
		if err != nil {
			return err
		}
		own := 0
		for _, v := range verdicts {
			if v.Incarnation != d.inc || v.N != d.n {
				continue
			}
			own++
			switch {
			case v.State == protocol.Rejected && v.Code == protocol.CodeStale:
				rejected++
			case v.State != protocol.Merged && v.State != protocol.Applied:
				return fmt.Errorf("a record was %s: %s %s", v.State, v.Code, v.Detail)
			}
		}
		if own != len(d.rows)/2 {
			return fmt.Errorf("%d verdicts for %d records", own, len(d.rows)/2)
		}
	}
	if rejected != l.stale {
		return fmt.Errorf("%d records were refused as stale, and %d were", rejected, l.stale)
	}
	return b.settled(ctx, 0)
}

// copyOut reads what a query gives, as COPY writes it.
func copyOut(ctx context.Context, db *pgxpool.Pool, query string) ([]byte, error) {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Release()
	var rows bytes.Buffer
	_, err = conn.Conn().PgConn().CopyTo(ctx, &rows, "COPY ("+query+") TO STDOUT (FORMAT binary)")
	return rows.Bytes(), err
}

func copyIn(ctx context.Context, db *pgxpool.Pool, table string, rows []byte) (int, error) {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Release()
	tag, err := conn.Conn().PgConn().CopyFrom(ctx, bytes.NewReader(rows), "COPY "+table+" FROM STDIN (FORMAT binary)")
	return int(tag.RowsAffected()), err
}

// stagesAlone measures intake and merge, by letting one pool work while the others rest.
func (b *bench) stagesAlone(ctx context.Context) error {
	devices, err := b.fleet(ctx)
	defer closeAll(devices)
	if err != nil {
		return err
	}
	l := &stageLoad{devices: devices}
	return errors.Join(b.intake(ctx, l), b.merge(ctx, l))
}

func (b *bench) intake(ctx context.Context, l *stageLoad) error {
	if !b.wants("intake") {
		return nil
	}
	if _, err := b.mirror.Exec(ctx, "CREATE TABLE public.bench_staging (LIKE waystage.staging INCLUDING ALL)"); err != nil {
		return err
	}
	var rows []byte
	keep := func(ctx context.Context) (err error) {
		rows, err = copyOut(ctx, b.mirror, "SELECT * FROM waystage.staging")
		return err
	}
	// The first load shows what is to be copied.
	if err := b.send(ctx, l, false); err != nil {
		return err
	}
	if err := b.take(ctx, l); err != nil {
		return err
	}
	if err := errors.Join(keep(ctx), b.finish(ctx, l)); err != nil {
		return err
	}
	s := b.spec("intake")
	s.rows = l.records
	s.before = func(ctx context.Context, _ int) error {
		if err := b.send(ctx, l, false); err != nil {
			return err
		}
		_, err := b.mirror.Exec(ctx, "TRUNCATE public.bench_staging")
		return err
	}
	s.check = func(ctx context.Context, _ int) error { return b.finish(ctx, l) }
	return b.compare(ctx, s, func(ctx context.Context) (float64, error) {
		took, err := b.clock(func() error { return b.take(ctx, l) })
		return rate(l.records, took), err
	}, func(ctx context.Context) (float64, error) {
		var n int
		took, err := b.clock(func() (err error) {
			n, err = copyIn(ctx, b.mirror, "public.bench_staging", rows)
			return err
		})
		if err == nil && n != l.records {
			err = fmt.Errorf("%d rows were copied of %d", n, l.records)
		}
		return rate(n, took), err
	})
}

func (b *bench) merge(ctx context.Context, l *stageLoad) error {
	if !b.wants("merge") {
		return nil
	}
	for _, sql := range []string{"CREATE TABLE public.bench_item (LIKE public.item INCLUDING ALL)", "INSERT INTO public.bench_item TABLE public.item",
		"CREATE TABLE public.bench_batch (LIKE public.item)", "VACUUM ANALYZE public.bench_item"} {
		if _, err := b.mirror.Exec(ctx, sql); err != nil {
			return err
		}
	}
	rows, err := copyOut(ctx, b.mirror, fmt.Sprintf("SELECT * FROM public.item ORDER BY owner, id %% 7, id LIMIT %d", len(l.devices)*(b.rows/2)))
	if err != nil {
		return err
	}
	s := b.spec("merge")
	s.rows = len(l.devices) * (b.rows / 2)
	s.before = func(ctx context.Context, _ int) error {
		if err := b.send(ctx, l, true); err != nil {
			return err
		}
		if err := b.take(ctx, l); err != nil {
			return err
		}
		for _, sql := range []string{"TRUNCATE public.bench_batch", "VACUUM ANALYZE", "CHECKPOINT"} {
			if _, err := b.mirror.Exec(ctx, sql); err != nil {
				return err
			}
		}
		return nil
	}
	s.check = func(ctx context.Context, _ int) error { return b.finish(ctx, l) }
	return b.compare(ctx, s, func(ctx context.Context) (float64, error) {
		took, err := b.clock(func() error {
			if err := b.pools(ctx, stages.ModeRun, "merge"); err != nil {
				return err
			}
			_, err := until(ctx, b.mirror, "SELECT NOT EXISTS (SELECT 1 FROM waystage.session WHERE state = 'staged')")
			return err
		})
		return rate(l.records, took), err
	}, func(ctx context.Context) (float64, error) {
		var n int
		took, err := b.clock(func() (err error) {
			if n, err = copyIn(ctx, b.mirror, "public.bench_batch", rows); err != nil {
				return err
			}
			_, err = b.mirror.Exec(ctx, `INSERT INTO public.bench_item TABLE public.bench_batch
				ON CONFLICT (id) DO UPDATE SET notes = excluded.notes || '.', _ws_version = excluded._ws_version + 1`)
			return err
		})
		return rate(n, took), err
	})
}
