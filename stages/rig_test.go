package stages

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

func TestMain(m *testing.M) { pgtest.MainNoLeaks(m) }

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

const sourceTables = `
CREATE TYPE public.mood AS ENUM ('calm', 'upset');
CREATE TABLE public.assignment (nurse text, patient int, PRIMARY KEY (nurse, patient));
CREATE TABLE public.patient (id int PRIMARY KEY, name varchar(10), weight numeric(6,2), active boolean, mood public.mood, doc jsonb,
	pic bytea, tags text[], secret text);
CREATE TABLE public.visit (id text PRIMARY KEY, patient int, at timestamptz, note text);
CREATE TABLE public.code (k char(4), seq int, label text, PRIMARY KEY (k, seq));
CREATE TABLE public.region (id int PRIMARY KEY, name text);
CREATE TABLE public.measure (id numeric PRIMARY KEY, flag boolean);
`

const definitions = `
version: 1
subscriptions:
  assignments: {table: public.assignment, direction: download-only, key: nurse, rows: "select :user"}
  patients:
    table: public.patient
    columns: [id, name, weight, active, mood, doc, pic, tags]
    key: id
    rows: select patient from public.assignment where nurse = :user
  visits:
    table: public.visit
    key: patient
    rows: select patient from public.assignment where nurse = :user
    allow: [insert, update, delete]
  codes: {table: public.code, allow: [update]}
  regions: {table: public.region, direction: download-only}
  measures: {table: public.measure}
sets:
  care: [patients, visits, assignments]
  base: [codes, regions, measures]
groups:
  nurses: {sets: [care, base]}
  clerks: {sets: [base]}
`

// rig is a mirror with the test tables, the three stages, and a queue in memory.
type rig struct {
	t      testing.TB
	ctx    context.Context
	db     *pgxpool.Pool
	tables []*schema.Table
	cat    *Catalog
	follow *Follower // nil: cat stays as it is
	q      *memQueue
	intake *Intake
	merge  *Merge
	reply  *Reply
	mu     *sync.Mutex
	kicks  map[string]int
}

// TestStages runs all scenarios on one mirror, each on empty tables.
func TestStages(t *testing.T) {
	base := newRig(t)
	for name, run := range map[string]func(*testing.T, *rig){
		// merge_test.go
		"first sync, edit and verdict":      testFirstSyncEditAndVerdict,
		"rule D3":                           testRuleD3,
		"old epoch":                         testOldEpoch,
		"subset of uploads":                 testSubsetOfUploads,
		"one bad record is rejected alone":  testOneBadRecordIsRejectedAlone,
		"a hidden column cannot be written": testHiddenColumnCannotBeWritten,
		"equal keys of another form":        testEqualKeysOfAnotherForm,
		"rounds":                            testRounds,
		// intake_test.go
		"refused requests":     testRefusedRequests,
		"JSON and compression": testJSONAndCompression,
		"ledger":               testLedger,
		"series":               testSeries,
		"poison":               testPoison,
		// lease_test.go
		"two files of one device": testTwoFiles,
		"reset and removed":       testResetAndRemoved,
		"another key is wanted":   testNewKeyWanted,
		// window_test.go
		"window": testWindow,
		// reply_test.go
		"download":             testDownload,
		"commits overtake":     testCommitsOvertake,
		"one snapshot":         testOneSnapshot,
		"empty sync is cheap":  testEmptySyncIsCheap,
		"refresh":              testRefresh,
		"pages":                testPages,
		"verdicts until heard": testVerdictsUntilHeard,
		"wait for the source":  testWaitSource,
		"broken key query":     testBrokenKeyQuery,
		"key query is caged":   testKeyQueryIsCaged,
		"sessions and status":  testSessionsAndStatus,
		"prune":                testPrune,
		// watch_test.go
		"news":       testNews,
		"news once":  testNewsOnce,
		"watch loop": testWatchLoop,
		// check_test.go
		"check": testCheck,
		// verify_test.go
		"verification": testVerification,
		"findings":     testFindings,
		// pool_test.go
		"pool is worked": testPoolIsWorked,
		"pool survives":  testPoolSurvives,
		"pool shutdown":  testPoolShutdown,
		"pool rests":     testPoolRests,
		// crash_test.go, property_test.go
		"crash":                   testCrash,
		"merge is conflict.Merge": testMergeIsConflictMerge,
	} {
		t.Run(name, func(t *testing.T) { run(t, base.reset(t)) })
	}
}

func newRig(t testing.TB) *rig { return newRigOf(t, sourceTables, definitions) }

func newRigOf(t testing.TB, ddl, defs string) *rig {
	t.Helper()
	ctx := testContext(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, err := schema.Connect(ctx, sourceDSN, "test")
	must(err)
	defer source.Close(ctx)
	_, err = source.Exec(ctx, ddl)
	must(err)
	d, problems := schema.ParseDefinitions("test.yaml", []byte(defs))
	if d == nil {
		t.Fatal(problems)
	}
	tables, problems, err := schema.ReadTables(ctx, source, d.TableNames())
	must(err)
	problems = append(problems, d.Check(tables)...)
	if _, err := schema.Refusing(problems); err != nil {
		t.Fatal(err)
	}
	must(schema.MigrateMirror(ctx, mirrorDSN))
	conn, err := schema.Connect(ctx, mirrorDSN, "test")
	must(err)
	defer conn.Close(ctx)
	must(schema.EnsureMirror(ctx, conn, tables, d))
	cfg, err := schema.Config(mirrorDSN, "test")
	must(err)
	cfg.MaxConns = 8
	schema.ByIndex(cfg.ConnConfig)
	db, err := pgxpool.NewWithConfig(ctx, cfg)
	must(err)
	t.Cleanup(db.Close)
	layout, err := schema.Layout(ctx, db)
	must(err)
	r := &rig{t: t, ctx: ctx, db: db, tables: tables, cat: NewCatalog("e1", layout, d, tables), q: newMemQueue(), mu: new(sync.Mutex), kicks: map[string]int{}}
	r.stages()
	return r
}

// catalogOf is the catalog of other definitions of the same tables.
func (r *rig) catalogOf(defs string) *Catalog {
	r.t.Helper()
	d, problems := schema.ParseDefinitions("test.yaml", []byte(defs))
	if d == nil {
		r.t.Fatal(problems)
	}
	if _, err := schema.Refusing(append(problems, d.Check(r.tables)...)); err != nil {
		r.t.Fatal(err)
	}
	return NewCatalog("e1", r.cat.layout, d, r.tables)
}

// reset empties the mirror for the next scenario; making a new one costs more.
func (r *rig) reset(t *testing.T) *rig {
	t.Helper()
	n := *r // shares the database
	n.t, n.ctx, n.q, n.kicks, n.mu = t, testContext(t), newMemQueue(), map[string]int{}, new(sync.Mutex)
	n.exec(`TRUNCATE waystage.app_user, waystage.staging, waystage.change, waystage.base, waystage.tombstone, waystage.keyset, waystage.pool,
		public.assignment, public.patient, public.visit, public.code, public.region, public.measure CASCADE`)
	n.exec(`DELETE FROM waystage.meta WHERE key = 'prune_bound'`)
	n.stages()
	return &n
}

// stages makes the stages anew, as after a restart.
func (r *rig) stages() {
	var catalog Catalogs = fixed{r}
	if r.follow != nil {
		catalog = r.follow
	}
	kick := func(stage string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.kicks[stage]++
	}
	r.intake = NewIntake(IntakeConfig{Wait: time.Millisecond, SeriesRetry: time.Millisecond, Retry: time.Millisecond, Lease: time.Nanosecond}, r.db, catalog, r.q, r.q, kick, nil)
	r.merge = NewMerge(MergeConfig{Hold: 50 * time.Millisecond}, r.db, catalog, kick, nil)
	r.reply = NewReply(ReplyConfig{Hold: 50 * time.Millisecond}, r.db, catalog, r.q, nil)
}

// fixed is what the rig has, whatever else is in force.
type fixed struct{ r *rig }

func (f fixed) Now() *Catalog                      { return f.r.cat }
func (f fixed) Renew(context.Context, int64) error { return errors.New("a fixed catalog") }

func (r *rig) exec(sql string, args ...any) {
	r.t.Helper()
	if _, err := r.db.Exec(r.ctx, sql, args...); err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
}

// value reads one value as text; absent is "<none>".
func (r *rig) value(sql string, args ...any) string {
	r.t.Helper()
	rows, err := r.db.Query(r.ctx, sql, args...)
	if err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
	defer rows.Close()
	out := "<none>"
	for rows.Next() {
		v, err := rows.Values()
		if err != nil {
			r.t.Fatal(err)
		}
		if out = fmt.Sprint(v[0]); v[0] == nil {
			out = "<null>"
		}
	}
	if err := rows.Err(); err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
	return out
}

func (r *rig) want(want, sql string, args ...any) {
	r.t.Helper()
	if got := r.value(sql, args...); got != want {
		r.t.Fatalf("%s: got %s, want %s", sql, got, want)
	}
}

// user makes a user with a device in these groups, as the registry would.
func (r *rig) user(name string, groups ...string) *dev {
	r.t.Helper()
	r.exec(`INSERT INTO waystage.app_user (name, password_hash, groups) VALUES ($1, 'x', $2)`, name, groups)
	return r.device(name, "phone")
}

func (r *rig) device(user, name string) *dev {
	r.t.Helper()
	r.exec(`INSERT INTO waystage.device (user_name, name) VALUES ($1, $2)`, user, name)
	return &dev{r: r, user: user, name: name, inc: randomID() + randomID(), epoch: "e1", sets: map[string]*devSet{}}
}

func noop(string) {}

// pump runs the stages until nothing moves.
func (r *rig) pump() {
	r.t.Helper()
	for {
		n := 0
		for _, w := range []Worker{r.intake, r.merge, r.reply} {
			i, err := w.Batch(r.ctx, r.ctx, noop)
			if err != nil {
				r.t.Fatal(err)
			}
			n += i
		}
		if n == 0 {
			return
		}
	}
}

// dev is a device that applies replies as the rules demand.
type dev struct {
	r                *rig
	user, name, inc  string
	n                int64
	epoch            string
	sets             map[string]*devSet
	contentType, enc string
	wait             string
	built            *protocol.Built   // what its application was built for
	last             *protocol.Request // the open or last request
}

type devSet struct {
	cursor string
	schema *protocol.Definitions
	rows   map[string]map[string]devRow // table -> key -> row
}

type devRow struct {
	version string
	vals    map[string]*string
}

func (d *dev) set(name string) *devSet {
	if d.sets[name] == nil {
		d.sets[name] = &devSet{rows: map[string]map[string]devRow{}}
	}
	return d.sets[name]
}

func str(s string) *string { return &s }

func vals(list ...any) []protocol.Value {
	out := make([]protocol.Value, len(list))
	for i, v := range list {
		if v != nil {
			out[i] = str(fmt.Sprint(v))
		}
	}
	return out
}

func row(kv ...any) map[string]*string {
	m := map[string]*string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i].(string)] = nil
		if kv[i+1] != nil {
			m[kv[i].(string)] = str(fmt.Sprint(kv[i+1]))
		}
	}
	return m
}

// layouts that the test device uses.
var layouts = map[string][]string{
	"public.patient": {"id", "name", "weight", "active", "mood", "doc", "pic", "tags"},
	"public.visit":   {"id", "patient", "at", "note"},
	"public.code":    {"k", "seq", "label"},
	"public.region":  {"id", "name"},
	"public.measure": {"id", "flag"},
	"public.item":    {"id", "k", "note"},
	"public.lot":     {"id", "k", "note"},
}

var keyColumns = map[string]int{"public.code": 2}

// change makes a change from the base (nil: none) and new (nil: delete) rows.
func change(table, version string, base, img map[string]*string) protocol.Change {
	cols := layouts[table]
	c := protocol.Change{Table: table, Version: version, Op: protocol.Update}
	from := img
	image := func(m map[string]*string) []protocol.Value {
		out := make([]protocol.Value, len(cols))
		for i, name := range cols {
			out[i] = m[name]
		}
		return out
	}
	switch {
	case img == nil:
		c.Op, from = protocol.Delete, base
	case base == nil && version == "":
		c.Op = protocol.Insert
	}
	if base != nil {
		c.Base = image(base)
	}
	if img != nil {
		c.New = image(img)
	}
	for _, name := range cols[:max(1, keyColumns[table])] {
		c.Key = append(c.Key, from[name])
	}
	return c
}

// edit makes an update of a row that the device has.
func (d *dev) edit(set, table, key string, kv ...any) protocol.Change {
	d.r.t.Helper()
	have, ok := d.set(set).rows[table][key]
	if !ok {
		d.r.t.Fatalf("device %s has no %s %s", d.user, table, key)
	}
	img := maps.Clone(have.vals)
	maps.Copy(img, row(kv...))
	return change(table, have.version, have.vals, img)
}

func (d *dev) remove(set, table, key string) protocol.Change {
	d.r.t.Helper()
	have, ok := d.set(set).rows[table][key]
	if !ok {
		d.r.t.Fatalf("device %s has no %s %s", d.user, table, key)
	}
	return change(table, have.version, have.vals, nil)
}

// request makes the next request.
func (d *dev) request(set string, changes ...protocol.Change) *protocol.Request {
	d.n++
	req := &protocol.Request{
		V: 1, Incarnation: d.inc, N: d.n, Nonce: randomID(), Set: set, Cursor: d.set(set).cursor, Epoch: d.epoch, Changes: changes, Wait: d.wait, Built: d.built,
	}
	if s := d.set(set).schema; s != nil {
		req.Schema = s.Hash
	}
	for _, name := range slices.Sorted(maps.Keys(layouts)) {
		if slices.ContainsFunc(changes, func(c protocol.Change) bool { return c.Table == name }) {
			req.Columns = append(req.Columns, protocol.Layout{Table: name, Columns: layouts[name]})
		}
	}
	d.last = req
	return req
}

func (d *dev) token() string { return protocol.SessionToken(d.last.Incarnation, d.last.N) }

func (d *dev) encode(req *protocol.Request) []byte {
	d.r.t.Helper()
	if d.contentType == "" {
		d.contentType = protocol.ContentCBOR
	}
	body, err := protocol.Encode(req, d.contentType)
	if err == nil {
		body, err = protocol.Compress(body, d.enc)
	}
	if err != nil {
		d.r.t.Fatal(err)
	}
	return body
}

func (d *dev) send(req *protocol.Request) {
	d.r.t.Helper()
	d.r.q.put(d.user, d.name, protocol.SessionToken(req.Incarnation, req.N), 1, 1, d.contentType, d.enc, d.encode(req))
}

// sync does a whole session.
func (d *dev) sync(set string, changes ...protocol.Change) map[int]protocol.Verdict {
	d.r.t.Helper()
	d.send(d.request(set, changes...))
	d.r.pump()
	return d.receive()
}

// pages reads the reply to the open session, if it is whole.
func (d *dev) pages() []*protocol.Page {
	d.r.t.Helper()
	var list []*protocol.Page
	for i := 1; ; i++ {
		m, ok := d.r.q.get(d.user, d.name, d.token(), i)
		if !ok {
			d.r.t.Fatalf("page %d of session %s is not there", i, d.token())
		}
		body, err := protocol.Decompress(m.body, m.encoding, 0)
		if err != nil {
			d.r.t.Fatal(err)
		}
		p, err := protocol.DecodePage(body, m.contentType, protocol.Limits{})
		if err != nil {
			d.r.t.Fatal(err)
		}
		if len(list) > 0 && p.Reply != list[0].Reply {
			d.r.t.Fatalf("pages of two compositions: %s, %s", list[0].Reply, p.Reply)
		}
		if p.Page != i {
			d.r.t.Fatalf("page %d says that it is page %d", i, p.Page)
		}
		list = append(list, p)
		if p.Last {
			return list
		}
	}
}

// receive applies the reply in one go and returns the verdicts on this session's records.
func (d *dev) receive() map[int]protocol.Verdict {
	d.r.t.Helper()
	pages := d.pages()
	if pages[0].Error != nil {
		d.r.t.Fatalf("session %s was refused: %v", d.token(), pages[0].Error)
	}
	return d.apply(pages)
}

func (d *dev) apply(pages []*protocol.Page) map[int]protocol.Verdict {
	d.r.t.Helper()
	set := d.set(d.last.Set)
	verdicts := map[int]protocol.Verdict{}
	for _, p := range pages {
		if p.Incarnation != d.last.Incarnation || p.N != d.last.N || p.Nonce != d.last.Nonce || p.CursorFrom != d.last.Cursor {
			d.r.t.Fatalf("page %d is not an answer to the open session", p.Page)
		}
		if p.Schema != nil {
			set.schema = p.Schema
		}
		for _, v := range p.Verdicts {
			if v.Incarnation == d.inc && v.N == d.last.N {
				verdicts[v.Index] = v
				set.merged(v, d.last)
			}
		}
	}
	for _, p := range pages {
		if p.Refresh {
			set.rows = map[string]map[string]devRow{}
		}
		for _, t := range p.Tables {
			rows := set.rows[t.Table]
			if rows == nil {
				rows = map[string]devRow{}
				set.rows[t.Table] = rows
			}
			def := set.schema.Tables[slices.IndexFunc(set.schema.Tables, func(x protocol.Table) bool { return x.Name == t.Table })]
			gone := map[string]bool{}
			for _, key := range t.Gone {
				gone[key] = true
			}
			maps.DeleteFunc(rows, func(_ string, r devRow) bool { v := r.vals[def.SubsetKey]; return v != nil && gone[*v] })
			for _, key := range t.Deletes {
				delete(rows, showKey(key))
			}
			for _, r := range t.Rows {
				img := map[string]*string{}
				for i, c := range t.Columns {
					img[c] = r.Values[i]
				}
				var key []protocol.Value
				for _, k := range def.Key {
					key = append(key, img[k])
				}
				rows[showKey(key)] = devRow{r.Version, img}
			}
		}
		if p.Last {
			set.cursor = p.Cursor
		}
	}
	return verdicts
}

// merged makes what was sent the row, at the version that the merge gave it (rule D9).
func (s *devSet) merged(v protocol.Verdict, req *protocol.Request) {
	if v.State != protocol.Merged && v.State != protocol.Applied {
		return
	}
	c := req.Changes[v.Index]
	rows := s.rows[c.Table]
	if rows == nil {
		rows = map[string]devRow{}
		s.rows[c.Table] = rows
	}
	if c.New == nil {
		delete(rows, showKey(c.Key))
		return
	}
	img := map[string]*string{}
	for i, name := range req.Columns[slices.IndexFunc(req.Columns, func(l protocol.Layout) bool { return l.Table == c.Table })].Columns {
		img[name] = c.New[i]
	}
	rows[showKey(c.Key)] = devRow{v.Version, img}
}

func showKey(key []protocol.Value) string {
	s := ""
	for i, k := range key {
		if i > 0 {
			s += "|"
		}
		s += *k
	}
	return s
}

// has tells the value of a column, "<none>" without the row.
func (d *dev) has(set, table, key, column string) string {
	r, ok := d.set(set).rows[table][key]
	switch {
	case !ok:
		return "<none>"
	case r.vals[column] == nil:
		return "<null>"
	}
	return *r.vals[column]
}

func (d *dev) want(want, set, table, key, column string) {
	d.r.t.Helper()
	if got := d.has(set, table, key, column); got != want {
		d.r.t.Fatalf("device %s: %s %s.%s is %s, want %s", d.user, table, key, column, got, want)
	}
}

// state tells a verdict in short.
func state(v protocol.Verdict) string {
	if v.Code != "" {
		return v.State + " " + string(v.Code)
	}
	return v.State
}

func (d *dev) verdict(got map[int]protocol.Verdict, want ...string) {
	d.r.t.Helper()
	if len(got) != len(want) {
		d.r.t.Fatalf("%d verdicts, want %d: %v", len(got), len(want), got)
	}
	for i, w := range want {
		if s := state(got[i]); s != w {
			d.r.t.Fatalf("record %d: %s (%s), want %s", i, s, got[i].Detail, w)
		}
	}
}
