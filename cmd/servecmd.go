package cmd

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/schema"
)

func newServe(a *app) *cobra.Command {
	var dev string
	var recopy bool
	c := &cobra.Command{Use: "serve", Short: "Run the server", Args: cobra.NoArgs,
		Long: `Run the server until it is interrupted: the first signal lets it finish what it has in hand, the second ends it at once.
The first start sets up both databases and copies the tables.

--dev needs no configuration: what is not configured (source, mirror, definitions) is made in a folder and kept there, PostgreSQL
clusters from this machine's server programs and the sample data of the demo. Not for real data: anybody on the machine can connect to them.`,
		RunE: func(c *cobra.Command, _ []string) error {
			conf, err := load(a.terminal, a.file, a.set)
			if err != nil {
				return err
			}
			log := a.logger(conf.Log)
			defer func() { _ = log.Sync() }()
			ctx := c.Context()
			if dev != "" {
				stop, err := a.develop(ctx, dev, &conf, log)
				defer stop()
				if err != nil {
					return err
				}
			}
			for _, name := range a.strayVariables() {
				a.say("warning: $%s sets no key of the configuration", name)
			}
			conf.Recopy = recopy
			copying := a.copyProgress()
			conf.Progress = copying.hear
			collectLess()
			return Serve(ctx, conf, log, func(i Info) {
				copying.end()
				a.say("ready: devices connect to %s (%d tables, epoch %s)", i.NATS, i.Tables, i.Epoch)
				if i.Health != "" {
					a.say("health: %s/readyz?verbose, metrics: %s/metrics", i.Health, i.Health)
				}
				if dev != "" {
					a.say("source: psql '%s'\nnext: waystage users add NAME --group nurses -c %s", conf.Source.DSN, filepath.Join(dev, "waystage.yaml"))
				}
			})
		}}
	c.Flags().StringVar(&dev, "dev", "", "make what is not configured in this folder")
	c.Flags().Lookup("dev").NoOptDefVal = "waystage-dev"
	c.Flags().BoolVar(&recopy, "recopy", false, "begin with a new epoch and copy all tables anew; devices keep their unsent changes and fetch their rows")
	return c
}

// logger writes to stderr, as text for a person and as JSON for programs.
func (a *app) logger(l Log) *zap.Logger {
	level, err := zapcore.ParseLevel(l.Level)
	if err != nil {
		level = zapcore.InfoLevel
	}
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.ISO8601TimeEncoder
	encoder := zapcore.NewJSONEncoder(enc)
	if l.Format == "text" || l.Format == "auto" && a.errTTY {
		enc = zap.NewDevelopmentEncoderConfig()
		enc.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
		if a.colour() {
			enc.EncodeLevel = zapcore.CapitalColorLevelEncoder
		}
		encoder = zapcore.NewConsoleEncoder(enc)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(zapcore.AddSync(a.err)), level))
}

// develop fills the gaps of a configuration with what it makes in a folder. stop ends the clusters that it started.
func (a *app) develop(ctx context.Context, dir string, c *Config, log *zap.Logger) (stop func(), err error) {
	var clusters []*pgcluster.Cluster
	stop = func() {
		for _, cl := range clusters {
			cl.Stop()
		}
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return stop, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return stop, err
	}
	written := map[string]string{}
	start := func(name string, db *Database) (fresh bool, err error) {
		if db.DSN != "" {
			return false, nil
		}
		_, statErr := os.Stat(filepath.Join(dir, name))
		a.say("starting the %s cluster in %s", name, filepath.Join(dir, name))
		cl, err := pgcluster.Start(ctx, pgcluster.Options{Dir: filepath.Join(dir, name), Log: log.Named("pg")})
		if err != nil {
			return false, &failure{code: exitPrecondition, what: "cannot start a PostgreSQL cluster", where: filepath.Join(dir, name), err: err}
		}
		clusters = append(clusters, cl)
		db.DSN = cl.DSN("postgres")
		written[name+".dsn"] = db.DSN
		return statErr != nil, nil
	}
	fresh, err := start("source", &c.Source)
	if err != nil {
		return stop, err
	}
	if _, err := start("mirror", &c.Mirror); err != nil {
		return stop, err
	}
	if fresh {
		a.say("filling the source with the sample data of a visiting-nurse service")
		conn, err := schema.Connect(ctx, c.Source.DSN, "waystage-dev")
		if err != nil {
			return stop, err
		}
		err = nurse.Load(ctx, conn, nurse.Default)
		_ = conn.Close(context.WithoutCancel(ctx))
		if err != nil {
			return stop, fmt.Errorf("load the sample data: %w", err)
		}
	}
	if c.origins["definitions"] == "default" {
		if c.Definitions, err = a.developDefinitions(ctx, dir, *c); err != nil {
			return stop, err
		}
	}
	written["definitions"] = c.Definitions
	if c.origins["nats.embedded.store"] == "default" {
		c.NATS.Embedded.Store = filepath.Join(dir, "nats")
	}
	written["nats.embedded.store"] = c.NATS.Embedded.Store
	if c.file != "" {
		return stop, nil // the other commands use the user's own file
	}
	path := filepath.Join(dir, "waystage.yaml")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return stop, err
	}
	if err := writeReference(f, written); err != nil {
		_ = f.Close()
		return stop, err
	}
	return stop, f.Close()
}

// developDefinitions finds or writes the definitions of a development server.
func (a *app) developDefinitions(ctx context.Context, dir string, c Config) (string, error) {
	path := filepath.Join(dir, "definitions.yaml")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	conn, err := schema.Connect(ctx, c.Source.DSN, "waystage-dev")
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	var sample bool
	if err := conn.QueryRow(ctx, "SELECT to_regclass('vn.medical_record') IS NOT NULL").Scan(&sample); err != nil {
		return "", err
	}
	body := nurse.Definitions()
	if !sample {
		var left []schema.Problem
		if body, left, err = schema.InitDefinitions(ctx, conn); err != nil {
			return "", err
		}
		for _, p := range left {
			a.say("note: %s", p)
		}
	}
	return path, os.WriteFile(path, []byte(body), 0o644)
}

// copyProgress shows the initial copy as one bar over all tables.
func (a *app) copyProgress() *copyProgress {
	return &copyProgress{t: a.terminal, tables: map[string]schema.CopyProgress{}}
}

type copyProgress struct {
	t *terminal

	mu     sync.Mutex
	tables map[string]schema.CopyProgress
	bar    *progress
	since  time.Time
}

// hear takes one report; several copies report at the same time.
func (c *copyProgress) hear(p schema.CopyProgress) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bar == nil {
		c.bar, c.since = c.t.progress("initial copy", "rows", p.Total), time.Now()
	}
	c.tables[p.Table] = p
	rows, total := c.sum()
	c.bar.set(rows, total)
}

func (c *copyProgress) sum() (rows, total int64) {
	for _, p := range c.tables {
		rows += p.Rows
		if p.Done {
			total += p.Rows
		} else {
			total += max(p.Total, p.Rows)
		}
	}
	return rows, total
}

func (c *copyProgress) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bar == nil {
		return
	}
	rows, _ := c.sum()
	c.bar.end(fmt.Sprintf("initial copy: %d rows of %d tables in %s", rows, len(c.tables), span(time.Since(c.since))))
	c.bar = nil
}

// connectSource opens one connection to the source for a command.
func connectSource(ctx context.Context, dsn string) (*pgx.Conn, error) {
	conn, err := schema.Connect(ctx, dsn, "waystage-init")
	if err != nil {
		return nil, &failure{code: codeFor(err), what: "cannot connect to the source database", where: redactDSN(dsn), err: err,
			remedy: "is the server running, and do address, user and password fit together?"}
	}
	return conn, nil
}
