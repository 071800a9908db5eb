// Package types runs one whole pipeline (source, mirror, broker, server, two devices) over tables of every kind of type and
// shape that PostgreSQL has, and checks that no value changes on any way: source to device, device to source to the other
// device, and untouched beside an edited column. docs/types.md is what it proves.
package types

import (
	"context"
	"encoding/hex"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/waystage/waystage/cmd"
	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/test/world"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// patience bounds every waiting; on an idle machine nothing takes a hundredth of it.
const patience = 5 * time.Minute

const password = "every-type-there-is"

// rig is a pipeline whose two devices, a and b, hold all rows of all tables.
type rig struct {
	t      *testing.T
	ctx    context.Context
	major  int // of the servers
	source *pgxpool.Pool
	mirror *pgxpool.Pool
	config cmd.Config
	dir    string
	tables []*schema.Table
	a, b   *device.Device
}

// newRig makes a source with these statements and starts a server whose definitions have all tables of these schemas.
func newRig(t *testing.T, statements []string, schemas ...string) *rig {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	r := &rig{t: t, ctx: ctx, dir: t.TempDir(), config: cmd.Defaults()}
	var err error
	r.major, err = pgtest.Major()
	r.must(err)
	c := &r.config
	c.Source.DSN, c.Mirror.DSN = pgtest.Source(t), pgtest.Mirror(t)
	c.Definitions = filepath.Join(r.dir, "definitions.yaml")
	c.NATS.Embedded.Store, c.NATS.Embedded.Listen = filepath.Join(r.dir, "nats"), freeAddress(t)
	c.Health.Listen = freeAddress(t)
	r.source, r.mirror = r.pool(c.Source.DSN), r.pool(c.Mirror.DSN)
	for _, s := range statements {
		if _, err := r.source.Exec(ctx, s, pgx.QueryExecModeSimpleProtocol); err != nil {
			t.Fatalf("%s: %v", short(s), err)
		}
	}
	rows, err := r.source.Query(ctx, `SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname = ANY ($1) ORDER BY 1`, schemas)
	r.must(err)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	r.must(err)
	var defs strings.Builder
	defs.WriteString("version: 1\nsubscriptions:\n")
	var subs []string
	for i, n := range names {
		subs = append(subs, fmt.Sprintf("s%d", i))
		fmt.Fprintf(&defs, "  s%d: {table: %s}\n", i, strconv.Quote(n))
	}
	fmt.Fprintf(&defs, "sets:\n  all: [%s]\ngroups:\n  everybody:\n    sets: [all]\n", strings.Join(subs, ", "))
	r.must(os.WriteFile(c.Definitions, []byte(defs.String()), 0o644))
	r.serve()
	r.must(registry.New(r.mirror, nil).AddUser(ctx, "amy", password, "everybody"))
	r.a, r.b = r.enrol("a"), r.enrol("b")
	r.tables, err = schema.LoadTables(ctx, r.mirror)
	r.must(err)
	if len(r.tables) != len(names) {
		t.Fatalf("%d tables of %d are synced", len(r.tables), len(names))
	}
	return r
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) pool(dsn string) *pgxpool.Pool {
	cfg, err := schema.Config(dsn, "test")
	r.must(err)
	p, err := pgxpool.NewWithConfig(r.ctx, cfg)
	r.must(err)
	r.t.Cleanup(p.Close)
	return p
}

func freeAddress(t *testing.T) string {
	t.Helper()
	address, err := world.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return address
}

func (r *rig) serve() {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.ctx)
	ready, done := make(chan cmd.Info, 1), make(chan error, 1)
	log := zaptest.NewLogger(r.t, zaptest.Level(zap.WarnLevel))
	go func() { done <- cmd.Serve(ctx, r.config, log, func(i cmd.Info) { ready <- i }) }()
	r.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("the server ended with %v", err)
		}
	})
	select {
	case <-ready:
	case err := <-done:
		done <- nil
		r.t.Fatalf("the server does not start: %v", err)
	case <-time.After(patience):
		r.t.Fatal("the server does not get ready")
	}
}

func (r *rig) enrol(name string) *device.Device {
	r.t.Helper()
	d, err := device.Open(r.ctx, filepath.Join(r.dir, name+".db"), device.Options{App: "types"})
	r.must(err)
	r.t.Cleanup(func() { _ = d.Close() })
	r.patiently(func() error {
		return d.Enrol(r.ctx, device.EnrolOptions{Servers: []string{"nats://" + r.config.NATS.Embedded.Listen}, User: "amy", Device: name, Password: password})
	})
	return d
}

// patiently tries again: a server on a loaded machine may refuse what it could not look up in time.
func (r *rig) patiently(do func() error) {
	r.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Second) {
		err := do()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			r.t.Fatal(err)
		}
	}
}

// at runs statements at the source, each in a transaction of its own.
func (r *rig) at(statements ...string) {
	r.t.Helper()
	for _, s := range statements {
		if _, err := r.source.Exec(r.ctx, s, pgx.QueryExecModeSimpleProtocol); err != nil {
			r.t.Fatalf("%s: %v", short(s), err)
		}
	}
}

// on runs a statement on a device's file.
func (r *rig) on(d *device.Device, q string, args ...any) {
	r.t.Helper()
	if _, err := d.DB().ExecContext(r.ctx, q, args...); err != nil {
		r.t.Fatalf("%s: %v", short(q), err)
	}
}

// one reads one value of the source as text.
func (r *rig) one(q string, args ...any) string {
	r.t.Helper()
	var s string
	if err := r.source.QueryRow(r.ctx, q, args...).Scan(&s); err != nil {
		r.t.Fatalf("%s: %v", short(q), err)
	}
	return s
}

// settle syncs both devices until nothing is in flight: twice in a row no edit without an outcome, nothing new, and the
// mirror past everything that the source had committed.
func (r *rig) settle() {
	r.t.Helper()
	var mark string
	r.must(r.source.QueryRow(r.ctx, "SELECT pg_current_wal_insert_lsn()::text").Scan(&mark))
	quiet, why := 0, ""
	for end := time.Now().Add(patience); quiet < 2; {
		if time.Now().After(end) {
			r.t.Fatalf("the devices do not come to rest: %s", why)
		}
		// The position moves with transactions that are published: make one.
		r.at("UPDATE rig.beat SET n = n + 1")
		var passed bool
		var pending int
		r.must(r.mirror.QueryRow(r.ctx, `SELECT (SELECT position >= $1::pg_lsn FROM waystage.progress WHERE direction = 'down'),
			(SELECT count(*) FROM waystage.change WHERE state = 'merged')`, mark).Scan(&passed, &pending))
		if !passed {
			quiet, why = 0, "the mirror is not at "+mark
			time.Sleep(20 * time.Millisecond)
			continue
		}
		still := pending == 0
		why = fmt.Sprintf("%d records pending", pending)
		for _, d := range []*device.Device{r.a, r.b} {
			var rep device.Report
			r.patiently(func() (err error) {
				rep, err = d.Sync(r.ctx, device.SyncOptions{Wait: protocol.WaitSource})
				return err
			})
			s, err := d.Status(r.ctx)
			r.must(err)
			if n := s.Unsent + s.Sent + s.Merged; n > 0 || rep.Rows+rep.Deleted > 1 { // the beat's row
				still = false
				why += fmt.Sprintf("; %s: %d edits without an outcome, %d rows came, %d went", s.Device, n, rep.Rows, rep.Deleted)
			}
		}
		if quiet++; !still {
			quiet = 0
		}
	}
}

// clean fails the test if a device's edit was rejected.
func (r *rig) clean() {
	r.t.Helper()
	for _, d := range []*device.Device{r.a, r.b} {
		l, err := d.Rejects(r.ctx)
		r.must(err)
		for i, x := range l {
			if i == 20 {
				r.t.Errorf("... and %d more", len(l)-i)
				break
			}
			r.t.Errorf("%s %s %s: %s %s: %s", x.Table, x.Op, texts(x.Key), x.State, x.Code, x.Detail)
		}
	}
}

// agree checks that source, mirror and both devices have the same rows, text for text.
func (r *rig) agree(step string) {
	r.t.Helper()
	for _, t := range r.tables {
		if t.Schema == "rig" {
			continue
		}
		want := r.rows(r.source, t)
		r.same(step+": mirror", t, want, r.rows(r.mirror, t))
		r.same(step+": device a", t, want, r.held(r.a, t))
		r.same(step+": device b", t, want, r.held(r.b, t))
	}
}

// row is the values of a row, in the order of the table's columns.
type row []*string

// rows reads a table's rows as the server prints them, by key.
func (r *rig) rows(db *pgxpool.Pool, t *schema.Table) map[string]row {
	r.t.Helper()
	var cols []string
	for _, c := range t.Columns {
		cols = append(cols, schema.Quote(c.Name))
	}
	rows, err := db.Query(r.ctx, "SELECT "+strings.Join(cols, ", ")+" FROM "+t.Ident(), pgx.QueryExecModeSimpleProtocol)
	r.must(err)
	defer rows.Close()
	out := map[string]row{}
	for rows.Next() {
		var l row
		for _, v := range rows.RawValues() {
			if v == nil {
				l = append(l, nil)
				continue
			}
			s := string(v)
			l = append(l, &s)
		}
		out[keyOf(t, l)] = l
	}
	r.must(rows.Err())
	return out
}

// held reads a table's rows as a device holds them, in the server's notation.
func (r *rig) held(d *device.Device, t *schema.Table) map[string]row {
	r.t.Helper()
	var local string
	r.must(d.DB().QueryRowContext(r.ctx, "SELECT local FROM _ws_table WHERE wire = ?", t.FullName()).Scan(&local))
	var cols []string
	for _, c := range t.Columns {
		cols = append(cols, schema.Quote(c.Name))
	}
	rows, err := d.DB().QueryContext(r.ctx, "SELECT "+strings.Join(cols, ", ")+" FROM "+schema.Quote(local))
	r.must(err)
	defer func() { _ = rows.Close() }()
	out := map[string]row{}
	for rows.Next() {
		values, into := make([]any, len(cols)), make([]any, len(cols))
		for i := range values {
			into[i] = &values[i]
		}
		r.must(rows.Scan(into...))
		var l row
		for i, v := range values {
			l = append(l, notation(t.Columns[i].MirrorType, v))
		}
		out[keyOf(t, l)] = l
	}
	r.must(rows.Err())
	return out
}

// notation writes what SQLite holds as PostgreSQL would, and marks what is not held in the documented form. A float is
// given by its bits.
func notation(typ string, v any) *string {
	s := fmt.Sprintf("(%T %v)", v, v)
	switch v := v.(type) {
	case nil:
		return nil
	case int64:
		switch {
		case typ == "boolean" && v == 0:
			s = "f"
		case typ == "boolean" && v == 1:
			s = "t"
		case typ == "smallint", typ == "integer", typ == "bigint":
			s = strconv.FormatInt(v, 10)
		}
	case float64:
		if typ == "real" || typ == "double precision" {
			s = bits(v)
		}
	case []byte:
		switch {
		case typ == "bytea":
			s = `\x` + hex.EncodeToString(v)
		case (typ == "real" || typ == "double precision") && string(v) == "-0":
			s = "-0"
		}
	case string:
		switch typ {
		case "smallint", "integer", "bigint", "boolean", "bytea":
		default:
			s = v
		}
	}
	return &s
}

func bits(f float64) string { return fmt.Sprintf("float %016x", math.Float64bits(f)) }

func keyOf(t *schema.Table, l row) string {
	var key []*string
	for _, k := range t.Key {
		for i, c := range t.Columns {
			if c.Name == k {
				key = append(key, floats(c.MirrorType, l[i]))
			}
		}
	}
	return texts(key)
}

// floats turns the text of a finite float other than minus zero into its bits, as [notation] does.
func floats(typ string, s *string) *string {
	if s != nil && (typ == "real" || typ == "double precision") && *s != "-0" && !strings.ContainsAny(*s, "Na ") {
		if f, err := strconv.ParseFloat(*s, 64); err == nil {
			b := bits(f)
			return &b
		}
	}
	return s
}

func texts(key []*string) string {
	var l []string
	for _, k := range key {
		if k == nil {
			l = append(l, "null")
		} else {
			l = append(l, strconv.Quote(short(*k)))
		}
	}
	return "(" + strings.Join(l, ", ") + ")"
}

// short bounds a text in a message; its length stands for the rest.
func short(s string) string {
	if len(s) > 120 {
		return fmt.Sprintf("%s... (%d bytes)", strings.ToValidUTF8(s[:120], ""), len(s))
	}
	return s
}

// same reports the first differences between what should be and what is.
func (r *rig) same(where string, t *schema.Table, want, got map[string]row) {
	r.t.Helper()
	var bad []string
	for k, w := range want {
		g, ok := got[k]
		if !ok {
			bad = append(bad, "no row "+k)
			continue
		}
		for i, c := range t.Columns {
			x, y := floats(c.MirrorType, w[i]), floats(c.MirrorType, g[i])
			if (x == nil) != (y == nil) || x != nil && *x != *y {
				bad = append(bad, fmt.Sprintf("row %s column %s (%s): %s, the source has %s", k, c.Name, c.Type, texts(row{y}), texts(row{x})))
			}
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			bad = append(bad, "row "+k+" too many")
		}
	}
	sort.Strings(bad)
	for i, b := range bad {
		if i == 12 {
			r.t.Errorf("%s: %s: ... and %d more", where, t.FullName(), len(bad)-i)
			break
		}
		r.t.Errorf("%s: %s: %s", where, t.FullName(), b)
	}
}
