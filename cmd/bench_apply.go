package cmd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/queue"
	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/stages"
)

// applyWorld has the source's tables at a peer, too, which PostgreSQL's own subscription keeps in step. A row of public.mark shows
// how far a side has come.
var applyWorld = worldOptions{peer: true, schema: benchSchema + `;
	CREATE TABLE public.mark (id int PRIMARY KEY, n bigint NOT NULL); INSERT INTO public.mark VALUES (1, 0)`,
	definitions: `version: 1
subscriptions:
  own:
    table: public.item
    key: owner
    rows: "select cast(:user as text)"
  mark:
    table: public.mark
    direction: download-only
sets:
  own: [own, mark]
groups:
  field: {sets: [own]}
`}

// applyFigures are catch-ups of the mirror with the source, the whole way through capture, queue and apply, against PostgreSQL's own
// subscription of a third server on the same backlog.
var applyFigures = []figureSpec{
	{name: "apply_small_tx", unit: "rows/s", bar: 2.0, bar18: 1.4, what: "catch-up with one-row update transactions, against a subscription with synchronous_commit off (ours is on)"},
	{name: "apply_small_tx_durable", unit: "rows/s", bar: 5, what: "the same, against a subscription with synchronous_commit on"},
	{name: "apply_bulk_tx", unit: "rows/s", bar: 1.1, what: "catch-up with transactions of 1,000 updated rows, against a subscription"},
	{name: "apply_deletes", unit: "rows/s", bar: 1.4, what: "catch-up with transactions of 1,000 deleted rows, against a subscription"},
	{name: "apply_one_big_tx", unit: "rows/s", bar: 1.1, what: "catch-up with one transaction of inserted rows, our process limited to 256 MiB, against a subscription"},
}

var captureFigures = []figureSpec{
	{name: "capture", unit: "rows/s", bar: 0.9, what: "one-row update transactions from the source's log into the queue, against pg_recvlogical that writes to /dev/null"},
}

// catchUp is a backlog and how it is made at the source.
type catchUp struct {
	name    string
	n       int    // rows of the backlog
	prepare string // what both sides get before it
	write   string
	commit  string // of the subscription
	memory  int    // limit of this process, MiB
}

const bulkRows = 1000

func inTransactions(n int, statement string) string {
	return fmt.Sprintf("DO $$ BEGIN FOR i IN 0..%d LOOP %s; COMMIT; END LOOP; END $$", n-1, statement)
}

func insertItems(from, n int) string {
	return fmt.Sprintf(`INSERT INTO public.item SELECT i, 'u0000', 1, 'MRN' || i, 'Patient number ' || i, i %% 40, (i %% 100000) / 7.0,
		timestamptz '2026-01-01' + i * interval '1 second', repeat(md5(i::text), 3) FROM generate_series(%d, %d) AS i`, from, from+n-1)
}

func (b *bench) catchUps() []catchUp {
	small := min(b.size(100_000, 1000), b.users*b.rows)
	bulk := b.size(300, 3)
	big := b.size(1_000_000, 10_000)
	spans := max(1, b.users*b.rows/bulkRows)
	one := inTransactions(small, "UPDATE public.item SET version = version + 1 WHERE id = i")
	const beyond = 100_000_000 // ids of rows that come and go
	return []catchUp{
		{name: "apply_small_tx", n: small, write: one},
		{name: "apply_small_tx_durable", n: small, write: one, commit: "on"},
		{name: "apply_bulk_tx", n: bulk * bulkRows, write: inTransactions(bulk, fmt.Sprintf(
			"UPDATE public.item SET version = version + 1 WHERE id BETWEEN i %% %[1]d * %[2]d AND i %% %[1]d * %[2]d + %[2]d - 1", spans, bulkRows))},
		{name: "apply_deletes", n: bulk * bulkRows, prepare: insertItems(beyond, bulk*bulkRows), write: inTransactions(bulk, fmt.Sprintf(
			"DELETE FROM public.item WHERE id BETWEEN %[1]d + i * %[2]d AND %[1]d + i * %[2]d + %[2]d - 1", beyond, bulkRows))},
		{name: "apply_one_big_tx", n: big, prepare: fmt.Sprintf("DELETE FROM public.item WHERE id >= %d", beyond), write: insertItems(beyond, big), memory: 256},
	}
}

const benchPeer = "bench_peer" // publication and subscription of the peer

// applyAll measures the catch-ups.
func (b *bench) applyAll(ctx context.Context) error {
	if err := b.subscribePeer(ctx); err != nil {
		return err
	}
	var errs []error
	for _, k := range b.catchUps() {
		if !b.wants(k.name) {
			continue
		}
		s := b.spec(k.name)
		if err := b.catchUp(ctx, k, s); err != nil {
			b.fail(s, err)
			if ctx.Err() != nil {
				return err
			}
		}
	}
	return errors.Join(errs...)
}

// subscribePeer brings the source's rows to the peer and leaves the subscription disabled.
func (b *bench) subscribePeer(ctx context.Context) error {
	if _, err := b.source.Exec(ctx, "CREATE PUBLICATION "+benchPeer+" FOR TABLE public.item, public.mark"); err != nil {
		return err
	}
	if _, err := b.peer.Exec(ctx, "TRUNCATE public.mark"); err != nil {
		return err
	}
	dsn := b.clusters[0].DSN("postgres")
	if _, err := b.peer.Exec(ctx, fmt.Sprintf("CREATE SUBSCRIPTION %s CONNECTION %s PUBLICATION %[1]s", benchPeer, schema.Literal(dsn)), pgx.QueryExecModeSimpleProtocol); err != nil {
		return err
	}
	_, err := until(ctx, b.peer, "SELECT count(*) = 2 AND bool_and(srsubstate = 'r') FROM pg_subscription_rel")
	return err
}

// rest stops the subscription and our stages, so that a backlog grows.
func (b *bench) rest(ctx context.Context) error {
	if _, err := b.peer.Exec(ctx, "ALTER SUBSCRIPTION "+benchPeer+" DISABLE"); err != nil {
		return err
	}
	if _, err := until(ctx, b.peer, "SELECT NOT EXISTS (SELECT 1 FROM pg_stat_activity WHERE backend_type LIKE 'logical replication%worker')"); err != nil {
		return err
	}
	return b.pools(ctx, stages.ModePause, "capture-down", "apply-down")
}

// mark moves the mark at the source and returns its number.
func (b *bench) mark(ctx context.Context) (n int64, err error) {
	err = b.source.QueryRow(ctx, "UPDATE public.mark SET n = n + 1 WHERE id = 1 RETURNING n").Scan(&n)
	return n, err
}

const benchArrived = "SELECT n = $1 FROM public.mark WHERE id = 1"

func (b *bench) startOurs(ctx context.Context) error {
	return b.pools(ctx, stages.ModeRun, "capture-down", "apply-down")
}

func (b *bench) startPeer(ctx context.Context) error {
	_, err := b.peer.Exec(ctx, "ALTER SUBSCRIPTION "+benchPeer+" ENABLE")
	return err
}

// settle vacuums and writes everything out, on all servers, so that no side pays for what came before.
func (b *bench) settle(ctx context.Context) error {
	for _, p := range []*pgxpool.Pool{b.source, b.mirror, b.peer} {
		for _, sql := range []string{"VACUUM ANALYZE", "CHECKPOINT"} {
			if _, err := p.Exec(ctx, sql); err != nil {
				return err
			}
		}
	}
	return nil
}

// backlog makes one behind both sides, which rest, and returns the mark that ends it.
func (b *bench) backlog(ctx context.Context, k catchUp) (n int64, err error) {
	if k.prepare != "" {
		if _, err := b.source.Exec(ctx, k.prepare); err != nil {
			return 0, err
		}
		if n, err = b.mark(ctx); err != nil {
			return 0, err
		}
		if err := errors.Join(b.startOurs(ctx), b.startPeer(ctx)); err != nil {
			return 0, err
		}
		for _, p := range []*pgxpool.Pool{b.mirror, b.peer} {
			if _, err := until(ctx, p, benchArrived, n); err != nil {
				return 0, err
			}
		}
	}
	if err := b.rest(ctx); err != nil {
		return 0, err
	}
	if err := b.settle(ctx); err != nil {
		return 0, err
	}
	if err := b.write(ctx, k.write); err != nil {
		return 0, err
	}
	if n, err = b.mark(ctx); err != nil {
		return 0, err
	}
	_, err = b.source.Exec(ctx, "CHECKPOINT")
	return n, err
}

// write makes a backlog at the source, which need not wait for the disk: that is not measured.
func (b *bench) write(ctx context.Context, sql string) error {
	conn, err := b.source.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	for _, s := range []string{"SET synchronous_commit = off", sql, "RESET synchronous_commit"} {
		if _, err := conn.Exec(ctx, s, pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) catchUp(ctx context.Context, k catchUp, s figureSpec) error {
	commit := "off"
	if k.commit != "" {
		commit = k.commit
	}
	if _, err := b.peer.Exec(ctx, "ALTER SUBSCRIPTION "+benchPeer+" SET (synchronous_commit = "+commit+")"); err != nil {
		return err
	}
	var mark int64
	s.rows = k.n
	s.before = func(ctx context.Context, _ int) (err error) {
		mark, err = b.backlog(ctx, k)
		return err
	}
	s.check = func(ctx context.Context, _ int) error { return b.sameItems(ctx) }
	side := func(start func(context.Context) error, at *pgxpool.Pool) func(context.Context) (float64, error) {
		return func(ctx context.Context) (float64, error) {
			took, err := b.clock(func() error {
				if err := start(ctx); err != nil {
					return err
				}
				_, err := until(ctx, at, benchArrived, mark)
				return err
			})
			return rate(k.n, took), err
		}
	}
	ours := side(b.startOurs, b.mirror)
	return b.compare(ctx, s, func(ctx context.Context) (float64, error) {
		if k.memory != 0 {
			limitMemory(k.memory)
			defer limitMemory(b.memory)
		}
		return ours(ctx)
	}, side(b.startPeer, b.peer))
}

// sameItems compares the rows of all servers.
func (b *bench) sameItems(ctx context.Context) error {
	const sum = `SELECT count(*) || ' rows, sum ' || coalesce(sum(hashtextextended(i::text, 0)::numeric), 0)
		FROM (SELECT id, owner, version, mrn, full_name, ward, balance, updated_at, notes FROM public.item) AS i`
	var want string
	if err := b.source.QueryRow(ctx, sum).Scan(&want); err != nil {
		return err
	}
	for name, p := range map[string]*pgxpool.Pool{"the mirror": b.mirror, "the peer": b.peer} {
		var got string
		if p == nil {
			continue
		}
		if err := p.QueryRow(ctx, sum).Scan(&got); err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("%s differs from the source after the measurement: %s, not %s", name, got, want)
		}
	}
	return nil
}

// captureAlone measures capture into the queue, apply resting.
func (b *bench) captureAlone(ctx context.Context) error {
	tool, err := recvlogical(b.clusters[0].Binaries())
	if err != nil {
		return err
	}
	const slot = "bench_recv"
	if _, err := b.source.Exec(ctx, "CREATE PUBLICATION bench_recv FOR TABLE public.item, public.mark"); err != nil {
		return err
	}
	if _, err := b.source.Exec(ctx, "SELECT pg_create_logical_replication_slot($1, 'pgoutput')", slot); err != nil {
		return err
	}
	js, err := jetstream.New(b.operator.nc)
	if err != nil {
		return err
	}
	k := b.catchUps()[0]
	var mark int64
	var end string
	s := b.spec("capture")
	s.rows = k.n
	s.before = func(ctx context.Context, round int) error {
		if err := b.startOurs(ctx); err != nil {
			return err
		}
		if round > 0 {
			if _, err := until(ctx, b.mirror, benchArrived, mark); err != nil {
				return err
			}
		}
		if err := b.pools(ctx, stages.ModePause, "capture-down", "apply-down"); err != nil {
			return err
		}
		if err := b.write(ctx, k.write); err != nil {
			return err
		}
		var err error
		if mark, err = b.mark(ctx); err != nil {
			return err
		}
		if err := b.source.QueryRow(ctx, "SELECT pg_current_wal_lsn()::text").Scan(&end); err != nil {
			return err
		}
		_, err = b.source.Exec(ctx, "CHECKPOINT")
		return err
	}
	var brought change.LSN
	s.check = func(ctx context.Context, _ int) error { // what was captured is what the mirror gets
		if err := b.startOurs(ctx); err != nil {
			return err
		}
		if _, err := until(ctx, b.mirror, benchArrived, mark); err != nil {
			return err
		}
		return b.sameItems(ctx)
	}
	ours := func(ctx context.Context) (float64, error) {
		want, err := change.ParseLSN(end)
		if err != nil {
			return 0, err
		}
		took, err := b.clock(func() error {
			if err := b.pools(ctx, stages.ModeRun, "capture-down"); err != nil {
				return err
			}
			stream, err := js.Stream(ctx, queue.StreamDown)
			if err != nil {
				return err
			}
			for before := brought; ; {
				m, err := stream.GetLastMsgForSubject(ctx, "cd.down")
				if err == nil {
					c, err := change.Parse(m.Header, nil)
					if err != nil {
						return err
					}
					// The last group ends with the mark's transaction, which ends at most where the log did.
					if c.Last && c.End > before && c.End+1024 >= want && c.Txs > 0 {
						brought = c.End
						return nil
					}
				} else if !errors.Is(err, jetstream.ErrMsgNotFound) {
					return err
				}
				if err := sleep(ctx, 5*time.Millisecond); err != nil {
					return err
				}
			}
		})
		return rate(k.n, took), err
	}
	base := func(ctx context.Context) (float64, error) {
		took, err := b.clock(func() error {
			cmd := exec.CommandContext(ctx, tool, "--dbname", b.clusters[0].DSN("postgres"), "--slot", slot, "--start", "--no-loop", "--endpos", end, "--file", os.DevNull,
				"--option", "proto_version=1", "--option", "publication_names="+slot, "--fsync-interval", "0")
			if text, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("pg_recvlogical: %w: %s", err, text)
			}
			return nil
		})
		return rate(k.n, took), err
	}
	return b.compare(ctx, s, ours, base)
}

// recvlogical is the program of these binaries, or of any other version on this machine: it speaks to all.
func recvlogical(first pgcluster.Binaries) (string, error) {
	all, _ := pgcluster.FindAll()
	for _, b := range append([]pgcluster.Binaries{first}, all...) {
		path := filepath.Join(b.Dir, "pg_recvlogical")
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", errors.New("no pg_recvlogical on this machine")
}
