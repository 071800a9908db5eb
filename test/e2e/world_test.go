// Package e2e runs whole servers: real PostgreSQL on both sides, a real broker, real devices. The other packages test their
// part; here is tested that the parts make a whole.
package e2e

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/waystage/waystage/cmd"
	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
	shared "github.com/waystage/waystage/test/world"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// patience bounds every waiting; on an idle machine nothing takes a hundredth of it.
const patience = 90 * time.Second

const password = "visiting-hours"

// world is a source full of data, an empty mirror, and what a server needs to serve them.
type world struct {
	t      *testing.T
	ctx    context.Context
	config cmd.Config
	source *pgxpool.Pool
	mirror *pgxpool.Pool
	nurses []nurse.Person
	size   nurse.Size
	dir    string
	nats   string // address of the broker, the same over restarts
	mark   string // position of the source that the mirror must reach before things count as settled
}

func newWorld(t *testing.T, size nurse.Size) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	w := &world{t: t, ctx: ctx, size: size, nurses: nurse.Nurses(size.Nurses), dir: t.TempDir(), config: cmd.Defaults()}
	w.config.Log.Level = "warn"
	w.nats = freeAddress(t)
	c := &w.config
	c.Source.DSN, c.Mirror.DSN = pgtest.Source(t), pgtest.Mirror(t)
	c.Definitions = filepath.Join(w.dir, "definitions.yaml")
	c.NATS.Embedded.Store = filepath.Join(w.dir, "nats")
	c.NATS.Embedded.Listen = w.nats
	c.Health.Listen = freeAddress(t)
	w.must(os.WriteFile(c.Definitions, []byte(nurse.Definitions()), 0o644))
	conn, err := schema.Connect(ctx, c.Source.DSN, "test")
	w.must(err)
	w.must(nurse.Load(ctx, conn, size))
	w.must(conn.Close(ctx))
	w.source, w.mirror = w.pool(c.Source.DSN), w.pool(c.Mirror.DSN)
	return w
}

func (w *world) pool(dsn string) *pgxpool.Pool {
	cfg, err := schema.Config(dsn, "test")
	w.must(err)
	p, err := pgxpool.NewWithConfig(w.ctx, cfg)
	w.must(err)
	w.t.Cleanup(p.Close)
	return p
}

// step is t.Run with the world's checks reporting to the step.
func (w *world) step(name string, do func(t *testing.T)) {
	outer := w.t
	outer.Run(name, func(t *testing.T) {
		w.t = t
		defer func() { w.t = outer }()
		do(t)
	})
	if outer.Failed() {
		outer.FailNow() // what follows builds on it
	}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	address, err := shared.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return address
}

// serve runs a server in this process until the test ends or stop is called, and returns when devices can sync.
func (w *world) serve(t *testing.T) (info cmd.Info, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	ready, done := make(chan cmd.Info, 1), make(chan error, 1)
	log := zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel))
	go func() { done <- cmd.Serve(ctx, w.config, log, func(i cmd.Info) { ready <- i }) }()
	var once sync.Once
	stop = func() { once.Do(func() { w.stop(t, cancel, done) }) }
	t.Cleanup(stop)
	select {
	case info = <-ready:
	case err := <-done:
		once.Do(func() {}) // it has ended
		t.Fatalf("the server does not start: %v", err)
	case <-time.After(patience):
		t.Fatal("the server does not get ready")
	}
	return info, stop
}

// stop ends a server in order.
func (w *world) stop(t *testing.T, cancel context.CancelFunc, done <-chan error) {
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("the server ended with %v", err)
		}
	case <-time.After(patience):
		t.Error("the server does not stop")
	}
}

// addUsers makes users of the first n nurses.
func (w *world) addUsers(n int) {
	w.t.Helper()
	users := registry.New(w.mirror, nil)
	for _, p := range w.nurses[:n] {
		w.must(users.AddUser(w.ctx, p.Login, password, "nurses"))
	}
}

// enrol makes a device of a nurse's.
func (w *world) enrol(p nurse.Person, name string) *device.Device {
	w.t.Helper()
	d, err := device.Open(w.ctx, filepath.Join(w.dir, p.Login+"-"+name+".db"), device.Options{App: "e2e"})
	w.must(err)
	w.t.Cleanup(func() { _ = d.Close() })
	w.eventually("no enrolment", func() error { // a server on a loaded machine may refuse what it could not look up in time
		return d.Enrol(w.ctx, device.EnrolOptions{Servers: []string{"nats://" + w.nats}, User: p.Login, Device: name, Password: password})
	})
	return d
}

// sync syncs once and fails the test if that fails.
func (w *world) sync(d *device.Device, wait string) device.Report {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, patience)
	defer cancel()
	rep, err := d.Sync(ctx, device.SyncOptions{Wait: wait})
	w.must(err)
	return rep
}

// eventually polls until check is content.
func (w *world) eventually(what string, check func() error) {
	w.t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	w.t.Fatalf("%s: %v", what, err)
}

// settle syncs the devices until nothing is in flight: no edit without an outcome, nothing new, three times in a row.
func (w *world) settle(devices ...*device.Device) {
	w.t.Helper()
	quiet := 0
	w.mark = ""
	w.eventually("the devices do not come to rest", func() error {
		for _, d := range devices {
			rep := w.sync(d, protocol.WaitSource)
			s, err := d.Status(w.ctx)
			w.must(err)
			if s.Unsent+s.Sent+s.Merged > 0 || rep.Rows+rep.Deleted > 0 {
				quiet = 0
				return fmt.Errorf("%s/%s: %d unsent, %d sent, %d merged; %d rows came, %d went", s.User, s.Device, s.Unsent, s.Sent, s.Merged, rep.Rows, rep.Deleted)
			}
		}
		if err := w.applied(); err != nil {
			quiet = 0
			return err
		}
		if quiet++; quiet < 3 {
			return errors.New("not yet for long enough")
		}
		return nil
	})
}

// applied tells whether nothing is on its way between mirror and source: no record without a verdict, and everything
// that was committed at the source by now has been applied (the slot is told what the mirror has).
func (w *world) applied() error {
	var pending int
	if err := w.mirror.QueryRow(w.ctx, "SELECT count(*) FROM waystage.change WHERE state = 'merged'").Scan(&pending); err != nil {
		return err
	}
	if pending > 0 {
		return fmt.Errorf("%d records are pending", pending)
	}
	// A transaction with an id is written to the log, and with it everything before: what the slot has passed is applied.
	var mark string
	if err := w.source.QueryRow(w.ctx, "SELECT pg_current_wal_insert_lsn()::text").Scan(&mark); err != nil {
		return err
	}
	if w.mark == "" {
		w.mark = mark
	}
	var passed bool
	if err := w.mirror.QueryRow(w.ctx, "SELECT position >= $1::pg_lsn FROM waystage.progress WHERE direction = 'down'", w.mark).Scan(&passed); err != nil {
		return err
	}
	if !passed {
		// The position moves with transactions that are published: make one.
		_, err := w.source.Exec(w.ctx, "UPDATE vn.nurse SET active = active WHERE id = $1", w.nurses[len(w.nurses)-1].ID)
		return errors.Join(fmt.Errorf("the mirror is not at %s yet", w.mark), err)
	}
	return nil
}

// compare checks I4: every mirror row equals its source row, every device holds exactly its subset.
func (w *world) compare(devices map[*device.Device]nurse.Person) error {
	return w.compareWith(nurse.Definitions(), devices)
}

// compareWith is compare under other definitions.
func (w *world) compareWith(definitions string, devices map[*device.Device]nurse.Person) error {
	tables, err := schema.LoadTables(w.ctx, w.mirror)
	if err != nil {
		return err
	}
	defs, problems := schema.ParseDefinitions("definitions", []byte(definitions))
	if defs == nil {
		return fmt.Errorf("definitions: %v", problems)
	}
	for _, t := range tables {
		source, err := shared.Rows(w.ctx, w.source, t, t.Columns, "")
		if err != nil {
			return err
		}
		mirror, err := shared.Rows(w.ctx, w.mirror, t, t.Columns, "")
		if err != nil {
			return err
		}
		if d := shared.Difference(source, mirror); d != "" {
			return fmt.Errorf("%s: source and mirror differ: %s", t.FullName(), d)
		}
		i := slices.IndexFunc(defs.Subscriptions, func(s *schema.Subscription) bool { return s.Table == t.FullName() })
		columns, key := defs.Subscriptions[i].ColumnsOf(t), defs.Subscriptions[i].Key
		for d, p := range devices {
			want, err := shared.Rows(w.ctx, w.mirror, t, columns, ofNurse(key, p.Login))
			if err != nil {
				return err
			}
			got, err := shared.DeviceRows(w.ctx, d.DB(), t, columns)
			if err != nil {
				return err
			}
			if diff := shared.Difference(want, got); diff != "" {
				return fmt.Errorf("%s: mirror and %s's device differ: %s", t.FullName(), p.Login, diff)
			}
		}
	}
	return nil
}

// ofNurse is the condition for a nurse's part of a table with a subset key.
func ofNurse(key, login string) string {
	if key == "" {
		return ""
	}
	return schema.Quote(key) + " IN (SELECT a.patient_id FROM vn.assignment a JOIN vn.nurse n ON n.id = a.nurse_id WHERE n.login = " + schema.Literal(login) + ")"
}

// exec runs SQL on a device's file and checks that it changed one row.
func (w *world) exec(d *device.Device, q string, args ...any) {
	w.t.Helper()
	r, err := d.DB().ExecContext(w.ctx, q, args...)
	w.must(err)
	if n, err := r.RowsAffected(); err != nil || n != 1 {
		w.t.Fatalf("%s: %d rows, %v", q, n, err)
	}
}

// text reads one value of a device's file.
func (w *world) text(d *device.Device, q string, args ...any) string {
	w.t.Helper()
	var s sql.NullString
	err := d.DB().QueryRowContext(w.ctx, q, args...).Scan(&s)
	if errors.Is(err, sql.ErrNoRows) {
		return "(no row)"
	}
	w.must(err)
	return s.String
}
