package verify_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/waystage/waystage/cmd"
	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/test/world"
	"github.com/waystage/waystage/verify"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

const patience = 90 * time.Second

const tables = `
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE DOMAIN consent AS boolean;
CREATE TABLE kinds (id int PRIMARY KEY, d date, ts timestamptz, iv interval, f float8, r real, n numeric, b bytea, bo boolean, c char(5),
	j json, jb jsonb, m mood, y consent, arr text[], tz timetz, "50% ""off""" text);
INSERT INTO kinds VALUES (1, '2026-03-04', '2026-03-04 05:06:07.5+02', '1 mon -3 days 04:05:06', 0.1::float8 + 0.2, 1e-7, 'NaN', '\x00ff5c', true, 'ab',
	'{"b" : 1,  "a":2}', '{"b": 1}', 'sad', true, '{NULL,"a b","NULL",""}', '12:00:00+05:30', 'x');
INSERT INTO kinds (id, ts, iv, n, c, y) SELECT i, 'infinity', make_interval(secs => i), i::numeric / 7, i::text, i % 2 = 0 FROM generate_series(2, 300) AS i;
CREATE TABLE pair (a int, b text, v text, PRIMARY KEY (a, b));
INSERT INTO pair SELECT i % 7, 'key ' || i || E' "\\,()', 'v' || i FROM generate_series(1, 500) AS i;
CREATE TABLE words (w text COLLATE "C" PRIMARY KEY, m mood NOT NULL DEFAULT 'ok', n int);
INSERT INTO words (w, n) SELECT md5(i::text), i FROM generate_series(1, 400) AS i;
INSERT INTO words (w) VALUES ('Ä'), ('a'), ('B'), ('é'), (''), ('z z');
CREATE TABLE parts (id int, region text, v text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE parts_n PARTITION OF parts FOR VALUES IN ('n');
CREATE TABLE parts_s PARTITION OF parts FOR VALUES IN ('s');
INSERT INTO parts SELECT i, CASE WHEN i % 2 = 0 THEN 'n' ELSE 's' END, 'v' FROM generate_series(1, 100) AS i;`

const definitions = `version: 1
subscriptions:
  kinds: {table: public.kinds}
  pair: {table: public.pair}
  words: {table: public.words}
  parts: {table: public.parts, direction: download-only}
sets:
  all: [kinds, pair, words, parts]
groups:
  staff:
    sets: [all]
`

// rig is a server over the tables.
type rig struct {
	t              *testing.T
	ctx            context.Context
	config         cmd.Config
	source, mirror *pgxpool.Pool
}

func newRig(t *testing.T) *rig {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	r := &rig{t: t, ctx: ctx, config: cmd.Defaults()}
	dir := t.TempDir()
	c := &r.config
	c.Source.DSN, c.Mirror.DSN = pgtest.Source(t), pgtest.Mirror(t)
	c.Definitions, c.NATS.Embedded.Store = filepath.Join(dir, "definitions.yaml"), filepath.Join(dir, "nats")
	var err error
	if c.NATS.Embedded.Listen, err = world.FreeAddress(); err != nil {
		t.Fatal(err)
	}
	c.Health.Listen = ""
	if err := os.WriteFile(c.Definitions, []byte(definitions), 0o600); err != nil {
		t.Fatal(err)
	}
	r.source, r.mirror = r.pool(c.Source.DSN), r.pool(c.Mirror.DSN)
	r.exec(r.source, "SET search_path = public; "+tables)
	// The databases' own settings differ, and from ours.
	for db, sql := range map[*pgxpool.Pool]string{
		r.source: "datestyle = 'German'", r.mirror: "intervalstyle = 'iso_8601'",
	} {
		for _, s := range []string{sql, "timezone = 'Asia/Kolkata'", "bytea_output = 'escape'", "extra_float_digits = -3"} {
			r.exec(db, "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET "+fmt.Sprint(quoted(s))+"', current_database()); END $$")
		}
	}
	return r
}

func quoted(s string) string {
	out := ""
	for _, c := range s {
		if c == '\'' {
			out += "'"
		}
		out += string(c)
	}
	return out
}

func (r *rig) pool(dsn string) *pgxpool.Pool {
	r.t.Helper()
	cfg, err := schema.Config(dsn, "test")
	if err != nil {
		r.t.Fatal(err)
	}
	p, err := pgxpool.NewWithConfig(r.ctx, cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(p.Close)
	return p
}

// as is a pool of the source that works as another role.
func (r *rig) as(role string) *pgxpool.Pool {
	r.t.Helper()
	cfg, err := schema.Config(r.config.Source.DSN, "test")
	if err != nil {
		r.t.Fatal(err)
	}
	cfg.ConnConfig.RuntimeParams["role"] = role
	p, err := pgxpool.NewWithConfig(r.ctx, cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(p.Close)
	return p
}

func (r *rig) exec(db *pgxpool.Pool, sql string) {
	r.t.Helper()
	conn, err := db.Acquire(r.ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Release()
	if _, err := conn.Conn().PgConn().Exec(r.ctx, sql).ReadAll(); err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
}

func (r *rig) value(db *pgxpool.Pool, sql string) string {
	r.t.Helper()
	var s string
	if err := db.QueryRow(r.ctx, sql).Scan(&s); err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
	return s
}

func (r *rig) eventually(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%s: never", what)
		}
	}
}

// serve runs a server until stop or the test's end.
func (r *rig) serve() (stop func()) {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.ctx)
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- cmd.Serve(ctx, r.config, zaptest.NewLogger(r.t, zaptest.Level(zap.ErrorLevel)), func(cmd.Info) { close(ready) })
	}()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("the server ended with %v", err)
		}
	}
	r.t.Cleanup(stop)
	select {
	case <-ready:
	case err := <-done:
		ended = true
		r.t.Fatalf("the server does not start: %v", err)
	case <-time.After(patience):
		r.t.Fatal("the server does not get ready")
	}
	return stop
}

func (r *rig) device(user string) *device.Device {
	r.t.Helper()
	if err := registry.New(r.mirror, nil).AddUser(r.ctx, user, "visiting-hours", "staff"); err != nil {
		r.t.Fatal(err)
	}
	d, err := device.Open(r.ctx, filepath.Join(r.t.TempDir(), user+".db"), device.Options{})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = d.Close() })
	r.enrol(d, user)
	return d
}

func (r *rig) enrol(d *device.Device, user string) {
	r.t.Helper()
	r.eventually("the device is enrolled", func() bool { // a server on a loaded machine may refuse what it could not look up in time
		err := d.Enrol(r.ctx, device.EnrolOptions{Servers: []string{"nats://" + r.config.NATS.Embedded.Listen}, User: user, Device: "phone", Password: "visiting-hours"})
		if err != nil {
			r.t.Log(err)
		}
		return err == nil
	})
}

// compare runs a comparison with small chunks.
func (r *rig) compare(set func(*verify.Options)) *verify.Report {
	r.t.Helper()
	o := verify.Options{Source: r.source, Mirror: r.mirror, Chunk: 50, Wait: patience, Marker: true}
	if set != nil {
		set(&o)
	}
	rep, err := verify.Compare(r.ctx, o)
	if err != nil {
		r.t.Fatal(err)
	}
	return rep
}

// table is the report of one table.
func table(t *testing.T, rep *verify.Report, name string) verify.TableReport {
	t.Helper()
	for _, tr := range rep.Tables {
		if tr.Table == name {
			return tr
		}
	}
	t.Fatalf("nothing is said of %s", name)
	return verify.TableReport{}
}
