package cmd

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/stages"
)

// loadDevice is a device without a database: it keeps what the protocol asks for and nothing else, so that the server
// is what is measured.
type loadDevice struct {
	t             device.Transport
	inc           string
	n             int64
	cursor, epoch string
	hash          string
	columns       []string
	rows          []protocol.Row
}

func (b *bench) loadDevice(ctx context.Context, user string) (*loadDevice, error) {
	// A hundred logins by password at once may keep one waiting for longer than the broker does.
	t, err := backoff.Retry(ctx, func() (device.Transport, error) {
		return device.DialNATS(ctx, device.Login{Servers: []string{b.url}, User: user, Device: "load", Password: benchPassword})
	}, backoff.WithMaxTries(5))
	if err != nil {
		return nil, err
	}
	inc := make([]byte, 16)
	if _, err := rand.Read(inc); err != nil {
		return nil, err
	}
	return &loadDevice{t: t, inc: hex.EncodeToString(inc)}, nil
}

// put sends a session with these changes and returns its token.
func (d *loadDevice) put(ctx context.Context, changes []protocol.Change) (string, error) {
	d.n++
	token := protocol.SessionToken(d.inc, d.n)
	req := protocol.Request{V: protocol.Version, Incarnation: d.inc, N: d.n, Nonce: token[len(token)-8:], Set: "own", Cursor: d.cursor, Schema: d.hash,
		Epoch: d.epoch, Changes: changes}
	if len(changes) > 0 {
		req.Columns = []protocol.Layout{{Table: "public.item", Columns: d.columns}}
	}
	body, err := protocol.Encode(&req, protocol.ContentCBOR)
	if err != nil {
		return "", err
	}
	if body, err = protocol.Compress(body, protocol.Zstd); err != nil {
		return "", err
	}
	const size = 256 << 10
	parts := slices.Collect(slices.Chunk(body, size))
	for i, p := range parts {
		for {
			r, err := d.t.Put(ctx, token, protocol.PartToken(i+1, len(parts)), device.Payload{ContentType: protocol.ContentCBOR, Encoding: protocol.Zstd, Data: p})
			if err == nil && r.Error != nil {
				err = r.Error
			}
			var refused *protocol.Error
			if errors.As(err, &refused) && refused.Code == protocol.CodeBusy {
				if err := sleep(ctx, time.Duration(refused.Retry)*time.Second); err != nil {
					return "", err
				}
				continue
			}
			if err != nil {
				return "", err
			}
			break
		}
	}
	return token, nil
}

// fetch reads the reply and keeps rows (of a refresh, or of keep) and cursor. It returns the states of the verdicts.
func (d *loadDevice) fetch(ctx context.Context, token string) (verdicts []protocol.Verdict, err error) {
	for page := 1; ; page++ {
		p, err := d.t.Get(ctx, token, page)
		var refused *protocol.Error
		if errors.As(err, &refused) && refused.Code == protocol.CodePending {
			page--
			continue
		}
		if err != nil {
			return nil, err
		}
		body, err := protocol.Decompress(p.Data, p.Encoding, 64<<20)
		if err != nil {
			return nil, err
		}
		got, err := protocol.DecodePage(body, p.ContentType, protocol.DefaultLimits())
		if err != nil {
			return nil, err
		}
		if got.Error != nil {
			return nil, got.Error
		}
		if got.Schema != nil {
			d.hash = got.Schema.Hash
		}
		if page == 1 && got.Refresh {
			d.rows = nil
		}
		for _, t := range got.Tables {
			d.columns = t.Columns
			if d.cursor == "" {
				d.rows = append(d.rows, t.Rows...)
				continue
			}
			for _, r := range t.Rows { // later sessions change the first rows only
				if i := slices.IndexFunc(d.rows, func(x protocol.Row) bool { return *x.Values[0] == *r.Values[0] }); i >= 0 {
					d.rows[i] = r
				}
			}
		}
		verdicts = append(verdicts, got.Verdicts...)
		if got.Last {
			d.cursor, d.epoch = got.Cursor, got.Epoch
			return verdicts, d.t.Ack(ctx, token)
		}
	}
}

// edit makes the change of a row: another ward and note.
func (d *loadDevice) edit(row protocol.Row, note string) protocol.Change {
	next := slices.Clone(row.Values)
	next[slices.Index(d.columns, "notes")] = &note
	return protocol.Change{Table: "public.item", Op: protocol.Update, Key: []protocol.Value{row.Values[slices.Index(d.columns, "id")]},
		Version: row.Version, Base: row.Values, New: next}
}

// stagesAlone measures intake, merge and up one after the other, by letting one pool work while the others rest.
func (b *bench) stagesAlone(ctx context.Context) error {
	devices, err := b.fleet(ctx)
	if err != nil {
		return err
	}
	records := 0
	if err := b.pools(ctx, stages.ModePause, "intake", "merge", "reply", "apply-up"); err != nil {
		return err
	}
	tokens := make([]string, len(devices))
	for i, d := range devices {
		var changes []protocol.Change
		for _, r := range d.rows[:len(d.rows)/2] {
			changes = append(changes, d.edit(r, "edited on device "+d.inc))
		}
		records += len(changes)
		if tokens[i], err = d.put(ctx, changes); err != nil {
			return err
		}
	}
	if err := b.pools(ctx, stages.ModeRun, "intake"); err != nil {
		return err
	}
	took, err := until(ctx, b.mirror, "SELECT count(*) = $1 FROM waystage.session WHERE state = 'staged'", len(devices))
	if err != nil {
		return err
	}
	base, err := b.timed(ctx, "CREATE TABLE public.bench_staging (LIKE waystage.staging)", "INSERT INTO public.bench_staging TABLE waystage.staging", "DROP TABLE public.bench_staging")
	if err != nil {
		return err
	}
	b.record("intake", rate(records, took), "rows/s", rate(records, base), "requests in the input queue to staged rows, against INSERT ... SELECT of the staged rows into a table like it")

	if err := b.pools(ctx, stages.ModeRun, "merge"); err != nil {
		return err
	}
	if took, err = until(ctx, b.mirror, "SELECT NOT EXISTS (SELECT 1 FROM waystage.session WHERE state = 'staged')"); err != nil {
		return err
	}
	base, err = b.timed(ctx, "CREATE TABLE public.bench_item (LIKE public.item INCLUDING ALL); INSERT INTO public.bench_item TABLE public.item; CREATE TABLE public.bench_batch (LIKE public.item); ANALYZE public.bench_item",
		fmt.Sprintf(`INSERT INTO public.bench_batch SELECT * FROM public.item WHERE notes LIKE 'edited on device%%' LIMIT %d;
			INSERT INTO public.bench_item SELECT * FROM public.bench_batch ON CONFLICT (id) DO UPDATE SET notes = excluded.notes, _ws_version = excluded._ws_version`, records),
		"DROP TABLE public.bench_item, public.bench_batch")
	if err != nil {
		return err
	}
	b.record("merge", rate(records, took), "rows/s", rate(records, base), "staged rows to mirror tables and ledger, against copying the same rows to a table and INSERT ... ON CONFLICT DO UPDATE")

	if err := b.pools(ctx, stages.ModeRun, "apply-up"); err != nil {
		return err
	}
	if took, err = until(ctx, b.source, "SELECT count(*) = $1 FROM public.item WHERE notes LIKE 'edited on device%'", records); err != nil {
		return err
	}
	b.record("up", rate(records, took), "rows/s", 0, "pending rows of the mirror to the source, with compare-and-set")

	if err := b.pools(ctx, stages.ModeRun, "reply"); err != nil {
		return err
	}
	for i, d := range devices {
		verdicts, err := d.fetch(ctx, tokens[i])
		if err != nil {
			return err
		}
		for _, v := range verdicts {
			if v.State != protocol.Merged && v.State != protocol.Applied {
				return fmt.Errorf("a record was %s: %s %s", v.State, v.Code, v.Detail)
			}
		}
		if err := d.t.Close(); err != nil {
			return err
		}
	}
	_, err = until(ctx, b.mirror, "SELECT NOT EXISTS (SELECT 1 FROM waystage.change WHERE state = 'merged')")
	return err
}

// fleet makes the devices, with their rows.
func (b *bench) fleet(ctx context.Context) ([]*loadDevice, error) {
	devices := make([]*loadDevice, b.users)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range devices {
		g.Go(func() error {
			user := fmt.Sprintf("u%04d", i)
			if err := b.addUser(gctx, user, "field"); err != nil {
				return err
			}
			d, err := b.loadDevice(gctx, user)
			if err != nil {
				return err
			}
			devices[i] = d
			token, err := d.put(gctx, nil)
			if err != nil {
				return err
			}
			if _, err := d.fetch(gctx, token); err != nil {
				return err
			}
			if len(d.rows) != b.rows {
				return fmt.Errorf("%s has %d rows of %d", user, len(d.rows), b.rows)
			}
			return nil
		})
	}
	return devices, g.Wait()
}

// timed runs a statement between two others that are not measured, on the mirror.
func (b *bench) timed(ctx context.Context, before, statement, after string) (time.Duration, error) {
	for _, s := range []string{before, "CHECKPOINT"} {
		if _, err := b.mirror.Exec(ctx, s, pgx.QueryExecModeSimpleProtocol); err != nil {
			return 0, err
		}
	}
	began := time.Now()
	if _, err := b.mirror.Exec(ctx, statement, pgx.QueryExecModeSimpleProtocol); err != nil {
		return 0, err
	}
	took := time.Since(began)
	_, err := b.mirror.Exec(ctx, after)
	return took, err
}

// sessions measures concurrent two-way sessions, each with one changed row, against one INSERT and one SELECT commit of as many clients at the source.
func (b *bench) sessions(ctx context.Context) error {
	devices, err := b.fleet(ctx)
	if err != nil {
		return err
	}
	for _, d := range devices {
		defer func() { _ = d.t.Close() }()
	}
	measure := func(work func(ctx context.Context, i int) error) (times []time.Duration, took time.Duration, err error) {
		var mu sync.Mutex
		began := time.Now()
		end := began.Add(time.Duration(b.seconds) * time.Second)
		g, gctx := errgroup.WithContext(ctx)
		for i := range b.users {
			g.Go(func() error {
				for time.Now().Before(end) {
					t := time.Now()
					if err := work(gctx, i); err != nil {
						return err
					}
					mu.Lock()
					times = append(times, time.Since(t))
					mu.Unlock()
				}
				return nil
			})
		}
		err = g.Wait()
		slices.Sort(times)
		return times, time.Since(began), err
	}
	base, baseTook, err := measure(func(ctx context.Context, i int) error {
		if _, err := b.source.Exec(ctx, "INSERT INTO public.visit (item_id, note) VALUES ($1, 'seen')", i); err != nil {
			return err
		}
		var version int
		return b.source.QueryRow(ctx, "SELECT version FROM public.item WHERE id = $1", i).Scan(&version)
	})
	if err != nil {
		return err
	}
	times, took, err := measure(func(ctx context.Context, i int) error {
		d := devices[i]
		token, err := d.put(ctx, []protocol.Change{d.edit(d.rows[int(d.n)%len(d.rows)], "session "+fmt.Sprint(d.n))})
		if err != nil {
			return err
		}
		verdicts, err := d.fetch(ctx, token)
		if err != nil {
			return err
		}
		for _, v := range verdicts {
			if v.N == d.n && v.State != protocol.Merged && v.State != protocol.Applied {
				return fmt.Errorf("a record was %s: %s", v.State, v.Detail)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	ms := func(times []time.Duration, q float64) float64 {
		return float64(times[int(q*float64(len(times)-1))].Microseconds()) / 1000
	}
	what := fmt.Sprintf("%d concurrent devices: one row up, its verdict and what changed down; against an INSERT and a SELECT of as many clients at the source", b.users)
	b.record("sessions", rate(len(times), took), "sessions/s", rate(len(base), baseTook), what)
	b.record("session_p50", ms(times, 0.5), "ms", ms(base, 0.5), "median of the same")
	b.record("session_p99", ms(times, 0.99), "ms", ms(base, 0.99), "99th percentile of the same")
	return nil
}

// plainInsert copies the device's item table into another SQLite file with a prepared statement in one transaction.
func plainInsert(ctx context.Context, from *sql.DB, file string) (time.Duration, error) {
	var ddl string
	if err := from.QueryRowContext(ctx, "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'item'").Scan(&ddl); err != nil {
		return 0, err
	}
	to, err := sql.Open("sqlite", "file:"+file+"?_pragma=journal_mode(wal)&_pragma=synchronous(full)")
	if err != nil {
		return 0, err
	}
	defer func() { _ = to.Close() }()
	if _, err := to.ExecContext(ctx, ddl); err != nil {
		return 0, err
	}
	rows, err := from.QueryContext(ctx, "SELECT * FROM item")
	if err != nil {
		return 0, err
	}
	defer func() { _ = rows.Close() }()
	columns, err := rows.Columns()
	if err != nil {
		return 0, err
	}
	var all [][]any
	for rows.Next() {
		values, into := make([]any, len(columns)), make([]any, len(columns))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			return 0, err
		}
		all = append(all, values)
	}
	if err := rows.Err(); err != nil {
		return 0, err
	}
	began := time.Now()
	tx, err := to.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer func() { _ = tx.Rollback() }()
	insert, err := tx.PrepareContext(ctx, "INSERT INTO item VALUES (?"+strings.Repeat(", ?", len(columns)-1)+")")
	if err != nil {
		return 0, err
	}
	for _, v := range all {
		if _, err := insert.ExecContext(ctx, v...); err != nil {
			return 0, err
		}
	}
	if err := tx.Commit(); err != nil {
		return 0, err
	}
	return time.Since(began), nil
}
