package cmd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/stages"
)

// worldOptions say what a step runs on. The zero value is --users times --rows rows of public.item, all stages running.
type worldOptions struct {
	users, rows int    // 0: those of the command
	schema      string // of the source; empty: benchSchema
	fill        string // statement that makes the rows; empty: benchFill
	definitions string // empty: benchDefinitions
	peer        bool   // a third server, with the source's tables, empty
	cold        bool   // never shared: made anew for the step
}

// world is the servers of a step: source and mirror, a whole Waystage server in this process, maybe a peer.
type world struct {
	options  worldOptions
	dir      string
	clusters []*pgcluster.Cluster // source, mirror, peer

	source, mirror, peer *pgxpool.Pool
	config               Config
	operator             *broker
	url                  string

	stop  context.CancelFunc
	ended chan error
}

const benchSchema = `
	CREATE TABLE public.item (
		id bigint PRIMARY KEY, owner text NOT NULL, version int NOT NULL, mrn text NOT NULL, full_name text NOT NULL,
		ward int, balance numeric(12,2), updated_at timestamptz, notes text);
	CREATE TABLE public.visit (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, item_id bigint NOT NULL, note text)`

// benchFill makes the same rows in every run: about 200 bytes each. It is formatted with the numbers of users and of rows of each.
const benchFill = `INSERT INTO public.item SELECT i, 'u' || lpad((i %% %[1]d)::text, 4, '0'), 1, 'MRN' || lpad(i::text, 9, '0'),
	'Patient number ' || i, i %% 40, (i %% 100000) / 7.0, timestamptz '2026-01-01' + i * interval '1 minute', repeat(md5(i::text), 3)
	FROM generate_series(0, %[1]d * %[2]d - 1) AS i`

const benchDefinitions = `version: 1
subscriptions:
  own:
    table: public.item
    key: owner
    rows: "select cast(:user as text)"
  everything:
    table: public.item
    direction: download-only
sets:
  own: [own]
  everything: [everything]
groups:
  field: {sets: [own]}
  office: {sets: [everything]}
`

// benchParams are the settings of all servers. Nothing is bought with durability; vacuum runs between the rounds instead of in them.
var benchParams = map[string]string{"shared_buffers": "512MB", "max_wal_size": "16GB", "checkpoint_timeout": "30min", "max_connections": "250", "autovacuum": "off"}

// enter makes the world of a step, unless the last one's will do.
func (b *bench) enter(ctx context.Context, o worldOptions) error {
	if b.world != nil && b.options == o && !o.cold {
		return nil
	}
	if err := b.leave(); err != nil {
		return err
	}
	w := &world{options: o}
	b.world = w
	set := func(to *string, def string) {
		if *to == "" {
			*to = def
		}
	}
	set(&o.schema, benchSchema)
	set(&o.fill, benchFill)
	set(&o.definitions, benchDefinitions)
	if o.users == 0 {
		o.users = b.users
	}
	if o.rows == 0 {
		o.rows = b.rows
	}
	if err := b.setUp(ctx, o); err != nil {
		return err
	}
	fmt.Fprintf(b.out, "PostgreSQL %s: %d rows in source and mirror\n", b.version(), o.users*o.rows)
	return nil
}

// leave ends the current world.
func (b *bench) leave() error {
	if b.world == nil {
		return nil
	}
	w := b.world
	b.world = nil
	return w.close()
}

// setUp starts the clusters, fills the source, and starts the server.
func (b *bench) setUp(ctx context.Context, o worldOptions) (err error) {
	w := b.world
	if w.dir, err = pgcluster.TempDir("waystage-bench-*"); err != nil {
		return err
	}
	names := []string{"source", "mirror"}
	if o.peer {
		names = append(names, "peer")
	}
	for i, into := range []**pgxpool.Pool{&w.source, &w.mirror, &w.peer}[:len(names)] {
		params := maps.Clone(benchParams)
		params["wal_retrieve_retry_interval"] = "50ms" // a subscription that is enabled again starts at once
		cluster, err := pgcluster.Start(ctx, pgcluster.Options{Dir: filepath.Join(w.dir, names[i]), Major: b.major, Params: params})
		if err != nil {
			return err
		}
		w.clusters = append(w.clusters, cluster)
		if *into, err = openPool(ctx, names[i], cluster.DSN("postgres"), max(8, o.users+4)); err != nil {
			return err
		}
		if names[i] != "mirror" {
			if _, err := (*into).Exec(ctx, o.schema); err != nil {
				return err
			}
		}
	}
	if _, err := w.source.Exec(ctx, fmt.Sprintf(o.fill, o.users, o.rows)); err != nil {
		return err
	}
	c := Defaults()
	c.Source.DSN, c.Mirror.DSN = w.clusters[0].DSN("postgres"), w.clusters[1].DSN("postgres")
	c.Definitions = filepath.Join(w.dir, "definitions.yaml")
	c.NATS.Embedded.Store, c.NATS.Embedded.Listen = filepath.Join(w.dir, "nats"), "127.0.0.1:0"
	c.Health.Listen = ""
	w.config = c
	if err := os.WriteFile(c.Definitions, []byte(o.definitions), 0o600); err != nil {
		return err
	}
	var sctx context.Context
	sctx, w.stop = context.WithCancel(context.WithoutCancel(ctx)) // it ends in close, in order
	ended, ready := make(chan error, 1), make(chan Info, 1)
	w.ended = ended
	go func() { ended <- Serve(sctx, c, zap.NewNop(), func(i Info) { ready <- i }) }()
	select {
	case err := <-ended:
		w.ended = nil
		return fmt.Errorf("the server ended: %w", err)
	case <-ctx.Done():
		return ctx.Err()
	case i := <-ready:
		w.url = i.NATS
	}
	w.operator, err = b.app.broker(ctx, c)
	return err
}

func (w *world) close() error {
	var errs []error
	if w.operator != nil {
		w.operator.close()
	}
	if w.stop != nil {
		w.stop()
		if w.ended != nil {
			if err := <-w.ended; err != nil && !errors.Is(err, context.Canceled) {
				errs = append(errs, fmt.Errorf("the server ended: %w", err))
			}
		}
	}
	for _, p := range []*pgxpool.Pool{w.source, w.mirror, w.peer} {
		if p != nil {
			p.Close()
		}
	}
	for _, c := range w.clusters {
		errs = append(errs, c.Remove())
	}
	if w.dir != "" {
		errs = append(errs, os.RemoveAll(w.dir))
	}
	return errors.Join(errs...)
}

// version of PostgreSQL that the world runs on.
func (w *world) version() string {
	if w == nil || len(w.clusters) == 0 {
		return ""
	}
	return w.clusters[0].Binaries().Version
}

// cpu is what the clusters' processes have used since they started.
func (w *world) cpu() (total time.Duration) {
	for _, c := range w.clusters {
		total += c.CPU()
	}
	return total
}

// pools sets the mode of stages and waits until every process follows.
func (b *bench) pools(ctx context.Context, mode stages.Mode, names ...string) error {
	for _, n := range names {
		if err := stages.SetPool(ctx, b.mirror, n, -1, mode); err != nil {
			return err
		}
	}
	if err := b.operator.poolsChanged(); err != nil {
		return err
	}
	if mode != stages.ModePause {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		all, err := b.operator.pools(ctx)
		if err != nil {
			return err
		}
		busy := false
		for _, n := range names {
			for _, p := range all[n] {
				busy = busy || slices.ContainsFunc(p.Workers, func(w stages.WorkerInfo) bool { return w.State != stages.StatePaused })
			}
		}
		if !busy {
			return nil
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return fmt.Errorf("waited in vain for %v to pause: %w", names, err)
		}
	}
}

// untilEvery is how often until asks: seldom enough to cost nothing that counts, often enough for what takes a second.
const untilEvery = 20 * time.Millisecond

// until polls a query for a boolean, and returns how long it took to become true.
func until(ctx context.Context, db *pgxpool.Pool, query string, args ...any) (time.Duration, error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	for {
		var done bool
		if err := db.QueryRow(ctx, query, args...).Scan(&done); err != nil {
			return 0, err
		}
		if done {
			return time.Since(began), nil
		}
		if err := sleep(ctx, untilEvery); err != nil {
			return 0, fmt.Errorf("waited in vain for %s: %w", query, err)
		}
	}
}
