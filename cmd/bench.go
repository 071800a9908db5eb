package cmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/stages"
)

// figure is one measured number. Absolute figures say little about another machine; a ratio was measured side by side
// with its baseline, in the same run.
type figure struct {
	Name     string   `json:"name"`
	Value    float64  `json:"value"`
	Unit     string   `json:"unit"`
	Baseline *float64 `json:"baseline,omitempty"`
	Ratio    *float64 `json:"ratio,omitempty"` // value / baseline
	What     string   `json:"what"`            // what was measured, and against what
}

// bench measures the pipeline, stage by stage, on servers of its own: the pools of all other stages rest meanwhile.
type bench struct {
	*app
	users   int // devices, one each
	rows    int // rows of each user
	seconds int // of the concurrent sessions
	only    []string

	dir            string
	clusters       []*pgcluster.Cluster
	source, mirror *pgxpool.Pool
	broker         *broker
	url            string
	figures        []figure
}

func newBench(a *app) *cobra.Command {
	b := &bench{app: a}
	var out string
	var major int
	c := &cobra.Command{Use: "bench", Short: "Measure intake, merge, up, down, first sync and sessions, on servers of its own", Args: cobra.NoArgs,
		Long: `Start two PostgreSQL servers (with fsync) and a broker in a temporary folder, measure each stage alone and the whole with concurrent
devices, and write the figures as a list of {name, value, unit, baseline, ratio}. All of it shares this machine's cores, devices
included; compare ratios, not absolute figures.`,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			defer func() { err = errors.Join(err, b.cleanUp()) }()
			if err := b.run(c.Context(), major); err != nil {
				return &failure{code: exitFailed, what: "the measurement failed", err: err}
			}
			data, err := json.MarshalIndent(b.figures, "", "  ")
			if err != nil {
				return err
			}
			if err := os.WriteFile(out, append(data, '\n'), 0o644); err != nil {
				return &failure{code: exitFailed, what: "cannot write the figures", where: out, err: bare(err)}
			}
			fmt.Fprintf(b.out, "\n%d figures are in %s.\n", len(b.figures), out)
			return nil
		}}
	c.Flags().StringVar(&out, "out", "bench.json", "file for the figures")
	c.Flags().IntVar(&major, "postgresql", 0, "PostgreSQL major version; 0: the first that is found")
	c.Flags().IntVar(&b.users, "users", 100, "concurrent devices, of a user each")
	c.Flags().IntVar(&b.rows, "rows", 2000, "rows of each user")
	c.Flags().IntVar(&b.seconds, "seconds", 10, "how long the concurrent sessions run")
	c.Flags().StringSliceVar(&b.only, "only", nil, "only these: first-sync, stages, down, sessions, neighbour")
	return c
}

const benchSchema = `
	CREATE TABLE public.item (
		id bigint PRIMARY KEY, owner text NOT NULL, version int NOT NULL, mrn text NOT NULL, full_name text NOT NULL,
		ward int, balance numeric(12,2), updated_at timestamptz, notes text);
	CREATE TABLE public.visit (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, item_id bigint NOT NULL, note text)`

// benchFill makes the same rows in every run: about 200 bytes each.
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

func (b *bench) run(ctx context.Context, major int) error {
	c, err := b.setUp(ctx, major)
	if err != nil {
		return err
	}
	server := make(chan error, 1)
	ready := make(chan Info, 1)
	sctx, stop := context.WithCancel(ctx)
	defer func() {
		stop()
		<-server
	}()
	go func() { server <- Serve(sctx, c, zap.NewNop(), func(i Info) { ready <- i }) }()
	select {
	case err := <-server:
		server <- err
		return err
	case i := <-ready:
		b.url = i.NATS
	}
	if b.broker, err = b.app.broker(ctx, c); err != nil {
		return err
	}
	defer b.broker.close()
	fmt.Fprintf(b.out, "%d rows in source and mirror; measuring\n\n", b.users*b.rows)
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{{"first-sync", b.firstSync}, {"stages", b.stagesAlone}, {"down", b.down}, {"sessions", b.sessions}, {"neighbour", b.neighbour}} {
		if len(b.only) > 0 && !slices.Contains(b.only, step.name) {
			continue
		}
		if err := step.run(ctx); err != nil {
			return err
		}
	}
	return nil
}

// setUp starts the clusters, fills the source and writes the configuration.
func (b *bench) setUp(ctx context.Context, major int) (c Config, err error) {
	if b.dir, err = pgcluster.TempDir("waystage-bench-*"); err != nil {
		return c, err
	}
	var dsn [2]string
	for i, name := range []string{"source", "mirror"} {
		fmt.Fprintf(b.out, "starting PostgreSQL: %s\n", name)
		cluster, err := pgcluster.Start(ctx, pgcluster.Options{Dir: filepath.Join(b.dir, name), Major: major,
			Params: map[string]string{"shared_buffers": "512MB", "max_wal_size": "8GB", "max_connections": "250"}})
		if err != nil {
			return c, err
		}
		b.clusters = append(b.clusters, cluster)
		dsn[i] = cluster.DSN("postgres")
	}
	if b.source, err = openPool(ctx, "source", dsn[0], b.users+4); err != nil {
		return c, err
	}
	if _, err := b.source.Exec(ctx, benchSchema); err != nil {
		return c, err
	}
	if _, err := b.source.Exec(ctx, fmt.Sprintf(benchFill, b.users, b.rows)); err != nil {
		return c, err
	}
	if b.mirror, err = openPool(ctx, "mirror", dsn[1], 8); err != nil {
		return c, err
	}
	c = Defaults()
	c.Source.DSN, c.Mirror.DSN = dsn[0], dsn[1]
	c.Definitions = filepath.Join(b.dir, "definitions.yaml")
	c.NATS.Embedded.Store, c.NATS.Embedded.Listen = filepath.Join(b.dir, "nats"), "127.0.0.1:0"
	c.Health.Listen = ""
	if err := os.WriteFile(c.Definitions, []byte(benchDefinitions), 0o600); err != nil {
		return c, err
	}
	return c, nil
}

func (b *bench) cleanUp() error {
	for _, p := range []*pgxpool.Pool{b.source, b.mirror} {
		if p != nil {
			p.Close()
		}
	}
	var errs []error
	for _, c := range b.clusters {
		errs = append(errs, c.Remove())
	}
	if b.dir != "" {
		errs = append(errs, os.RemoveAll(b.dir))
	}
	return errors.Join(errs...)
}

// record keeps a figure and shows it. baseline 0: there is none.
func (b *bench) record(name string, value float64, unit string, baseline float64, what string) {
	f := figure{Name: name, Value: value, Unit: unit, What: what}
	line := fmt.Sprintf("%-14s %12.0f %-10s", name, value, unit)
	if value < 100 {
		line = fmt.Sprintf("%-14s %12.2f %-10s", name, value, unit)
	}
	if baseline > 0 {
		ratio := value / baseline
		f.Baseline, f.Ratio = &baseline, &ratio
		line += fmt.Sprintf(" %5.2f of %.0f", ratio, baseline)
	}
	b.figures = append(b.figures, f)
	fmt.Fprintln(b.out, line+"   "+what)
}

// pools sets the mode of stages and waits until every process follows.
func (b *bench) pools(ctx context.Context, mode stages.Mode, names ...string) error {
	for _, n := range names {
		if err := stages.SetPool(ctx, b.mirror, n, -1, mode); err != nil {
			return err
		}
	}
	if err := b.broker.poolsChanged(); err != nil {
		return err
	}
	if mode == stages.ModePause {
		return sleep(ctx, 2*time.Second) // for the batches under way
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// until polls a query for a boolean every few milliseconds, and returns how long that took.
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
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return 0, fmt.Errorf("waited in vain for %s: %w", query, err)
		}
	}
}

// addUser makes a user that may log in from any device.
func (b *bench) addUser(ctx context.Context, name, group string) error {
	return registry.New(b.mirror, nil).AddUser(ctx, name, benchPassword, group)
}

const benchPassword = "only for this measurement"

func rate(n int, d time.Duration) float64 { return float64(n) / d.Seconds() }

// firstSync measures a new device's first download, against inserting the same rows into the same SQLite tables.
func (b *bench) firstSync(ctx context.Context) error {
	if err := b.addUser(ctx, "office", "office"); err != nil {
		return err
	}
	file := filepath.Join(b.dir, "office.db")
	d, err := device.Open(ctx, file, device.Options{})
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	if err := d.Enrol(ctx, device.EnrolOptions{Servers: []string{b.url}, User: "office", Device: "desk", Password: benchPassword}); err != nil {
		return err
	}
	began := time.Now()
	if _, err := d.Sync(ctx, device.SyncOptions{}); err != nil {
		return err
	}
	took := time.Since(began)
	var n int
	if err := d.DB().QueryRowContext(ctx, "SELECT count(*) FROM item").Scan(&n); err != nil {
		return err
	}
	if n != b.users*b.rows {
		return fmt.Errorf("the first sync brought %d rows of %d", n, b.users*b.rows)
	}
	base, err := plainInsert(ctx, d.DB(), filepath.Join(b.dir, "plain.db"))
	if err != nil {
		return err
	}
	b.record("first_sync", rate(n, took), "rows/s", rate(n, base), "a new device's first sync, against inserting the same rows into the same SQLite table in one transaction")
	return nil
}
