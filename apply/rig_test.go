package apply_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/capture"
	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/schema"
)

func TestMain(m *testing.M) { pgtest.MainNoLeaks(m) }

// deadline is generous: the machine may be busy.
const deadline = 90 * time.Second

// memQueue is an ordered queue in memory that can lose, double, cut and refuse.
type memQueue struct {
	mu      sync.Mutex
	changed chan struct{}
	msgs    []stored
	place   uint64
	refuse  bool                                // full: nothing is taken
	onPut   func(m *change.Message) (times int) // how often a message is stored; nil: once
	resets  int
	puts    int
	hold    bool // readers get nothing
}

type stored struct {
	m     change.Message
	place uint64
}

func newMemQueue() *memQueue { return &memQueue{changed: make(chan struct{})} }

func (q *memQueue) wake() {
	close(q.changed)
	q.changed = make(chan struct{})
}

type receipt struct{ err error }

func (r receipt) Wait(context.Context) error { return r.err }

func (q *memQueue) PublishChange(_ context.Context, m *change.Message) (capture.Receipt, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.refuse {
		return receipt{errors.New("the queue is full")}, nil
	}
	// The header and the body travel as the queue carries them.
	c, err := change.Parse(m.Header(), slices.Clone(m.Body))
	if err != nil {
		return nil, err
	}
	times := 1
	if q.onPut != nil {
		times = q.onPut(m)
	}
	q.puts++
	for range times {
		q.place++
		q.msgs = append(q.msgs, stored{c, q.place})
	}
	q.wake()
	return receipt{}, nil
}

func (q *memQueue) ResetChanges(context.Context) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.msgs = nil
	q.resets++
	return nil
}

func (q *memQueue) set(fn func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	fn()
	q.wake()
}

func (q *memQueue) Read(context.Context) (apply.Reader, error) { return &memReader{q: q}, nil }

func (q *memQueue) Purge(_ context.Context, through uint64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.msgs = slices.DeleteFunc(q.msgs, func(s stored) bool { return s.place <= through })
	return nil
}

type memReader struct {
	q    *memQueue
	last uint64
}

func (r *memReader) Close() {}

func (r *memReader) Next(ctx context.Context) (change.Message, uint64, error) {
	for {
		r.q.mu.Lock()
		for _, s := range r.q.msgs {
			if s.place > r.last && !r.q.hold {
				r.last = s.place
				r.q.mu.Unlock()
				return s.m, s.place, nil
			}
		}
		changed := r.q.changed
		r.q.mu.Unlock()
		select {
		case <-ctx.Done():
			return change.Message{}, 0, ctx.Err()
		case <-changed:
		}
	}
}

// worker is one of the four long-runners, stopped and started at will.
type worker struct {
	name string
	make func() interface{ Run(context.Context) error }
	stop context.CancelFunc
	done chan error
	obj  interface{ Run(context.Context) error }
}

// rig is a source and a mirror with everything between them.
type rig struct {
	t              *testing.T
	ctx            context.Context
	sourceDSN      string
	mirrorDSN      string
	source, mirror *pgx.Conn
	tables         map[string]*schema.Table
	epoch          string
	downQ, upQ     *memQueue
	workers        map[string]*worker
	log            *zap.Logger

	downCfg func(*apply.DownConfig)
	upCfg   func(*apply.UpConfig)
	capCfg  func(*capture.Config)
	session int64
}

// newRig makes the tables at the source by ddl, and sets both sides up. Nothing runs yet.
func newRig(t *testing.T, ddl string, tables ...string) *rig {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	r := &rig{t: t, ctx: ctx, sourceDSN: pgtest.Source(t), mirrorDSN: pgtest.Mirror(t), tables: map[string]*schema.Table{},
		downQ: newMemQueue(), upQ: newMemQueue(), workers: map[string]*worker{}, log: zap.NewNop()}
	if testing.Verbose() {
		r.log = zaptest.NewLogger(t)
	}
	r.source, r.mirror = r.connect(r.sourceDSN), r.connect(r.mirrorDSN)
	r.exec(r.source, "SET search_path = public")
	r.exec(r.mirror, "SET search_path = public")
	r.exec(r.source, ddl)
	var b strings.Builder
	b.WriteString("version: 1\nsubscriptions:\n")
	for i, name := range tables {
		q, _ := json.Marshal(name)
		fmt.Fprintf(&b, "  s%d:\n    table: %s\n", i, q)
	}
	defs, problems := schema.ParseDefinitions("test.yaml", []byte(b.String()))
	if defs == nil {
		t.Fatalf("definitions: %v", problems)
	}
	res, err := schema.Setup(ctx, schema.SetupOptions{SourceDSN: r.sourceDSN, MirrorDSN: r.mirrorDSN, Definitions: defs, Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	r.epoch = res.Epoch
	load, err := schema.LoadTables(ctx, r.mirror)
	if err != nil {
		t.Fatal(err)
	}
	for _, tbl := range load {
		r.tables[tbl.FullName()] = tbl
	}
	r.define("capture down", func() interface{ Run(context.Context) error } {
		return r.capture(capture.Config{Direction: capture.Down, Server: r.sourceDSN, Slot: schema.SlotDown(r.epoch), Publication: schema.PublicationDown, Queue: r.downQ})
	})
	r.define("capture up", func() interface{ Run(context.Context) error } {
		return r.capture(capture.Config{Direction: capture.Up, Server: r.mirrorDSN, Slot: schema.SlotUp(r.epoch), Publication: schema.PublicationUp, Queue: r.upQ})
	})
	r.define("down", func() interface{ Run(context.Context) error } {
		cfg := apply.DownConfig{Mirror: r.mirrorDSN, Tables: r.load, Changes: r.downQ, Log: r.log}
		if r.downCfg != nil {
			r.downCfg(&cfg)
		}
		return apply.NewDown(cfg)
	})
	r.define("up", func() interface{ Run(context.Context) error } {
		cfg := apply.UpConfig{Mirror: r.mirrorDSN, Source: r.sourceDSN, Tables: r.load, Changes: r.upQ, Log: r.log}
		if r.upCfg != nil {
			r.upCfg(&cfg)
		}
		return apply.NewUp(cfg)
	})
	t.Cleanup(func() { r.stop(allWorkers...) })
	return r
}

func (r *rig) capture(cfg capture.Config) *capture.Capture {
	cfg.Mirror, cfg.Log = r.mirrorDSN, r.log
	if r.capCfg != nil {
		r.capCfg(&cfg)
	}
	return capture.New(cfg)
}

func (r *rig) load(ctx context.Context) ([]*schema.Table, error) {
	conn, err := schema.Connect(ctx, r.mirrorDSN, "test")
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return schema.LoadTables(ctx, conn)
}

var allWorkers = []string{"capture down", "capture up", "down", "up"}

func (r *rig) define(name string, make func() interface{ Run(context.Context) error }) {
	r.workers[name] = &worker{name: name, make: make}
}

func (r *rig) start(names ...string) {
	for _, name := range names {
		w := r.workers[name]
		if w.done != nil {
			continue
		}
		ctx, stop := context.WithCancel(r.ctx)
		w.stop, w.done, w.obj = stop, make(chan error, 1), w.make()
		go func() { w.done <- w.obj.Run(ctx) }()
	}
}

func (r *rig) stop(names ...string) {
	r.t.Helper()
	for _, name := range names {
		if w := r.workers[name]; w.done != nil {
			w.stop()
		}
	}
	for _, name := range names {
		w := r.workers[name]
		if w.done == nil {
			continue
		}
		if err := <-w.done; !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			r.t.Errorf("%s ended: %v", name, err)
		}
		w.done = nil
	}
}

func (r *rig) connect(dsn string) *pgx.Conn {
	r.t.Helper()
	conn, err := schema.Connect(r.ctx, dsn, "test")
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func (r *rig) exec(conn *pgx.Conn, sqls ...string) {
	r.t.Helper()
	for _, sql := range sqls {
		if _, err := conn.Exec(r.ctx, sql); err != nil {
			r.t.Fatalf("%s: %v", sql, err)
		}
	}
}

// foreign runs one transaction of somebody else at the source.
func (r *rig) foreign(sqls ...string) {
	r.t.Helper()
	if err := pgx.BeginFunc(r.ctx, r.source, func(tx pgx.Tx) error {
		for _, sql := range sqls {
			if _, err := tx.Exec(r.ctx, sql); err != nil {
				return fmt.Errorf("%s: %w", sql, err)
			}
		}
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) text(conn *pgx.Conn, sql string, args ...any) string {
	r.t.Helper()
	rows, err := conn.Query(r.ctx, sql, args...)
	if err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
	return strings.Join(lines, "\n")
}

// rec is one record of a device.
type rec struct {
	table string
	op    conflict.Op
	key   []string
	img   map[string]any // string, nil or *string
	dev   string         // incarnation; empty: "dev"
	unit  int64          // atomic unit

	policy string // conflict policy as the merge notes it, JSON; empty: reject
}

// merge does to the mirror what the merge stage does: the ledger row and the mirror row, in one transaction under the
// tables' locks. The records are based on what the mirror has. It returns the ledger's ids, 0 for what the rules refuse.
func (r *rig) merge(recs ...rec) []int64 {
	r.t.Helper()
	ids, err := r.tryMerge(r.mirror, recs...)
	if err != nil {
		r.t.Fatal(err)
	}
	return ids
}

func (r *rig) tryMerge(conn *pgx.Conn, recs ...rec) (ids []int64, err error) {
	r.session++
	session := r.session
	err = pgx.BeginFunc(r.ctx, conn, func(tx pgx.Tx) error {
		var tbls []int
		for _, c := range recs {
			tbls = append(tbls, r.tables[c.table].ID)
		}
		slices.Sort(tbls)
		for _, id := range slices.Compact(tbls) {
			if _, err := tx.Exec(r.ctx, "SELECT pg_advisory_xact_lock($1, $2)", schema.TableLockClass, id); err != nil {
				return err
			}
		}
		for i, c := range recs {
			id, err := r.mergeOne(tx, session, i, c)
			if err != nil {
				return fmt.Errorf("%s %c %v: %w", c.table, c.op, c.key, err)
			}
			ids = append(ids, id)
		}
		return nil
	})
	return ids, err
}

func (r *rig) mergeOne(tx pgx.Tx, session int64, idx int, c rec) (int64, error) {
	t := r.tables[c.table]
	if c.dev == "" {
		c.dev = "dev"
	}
	var names, texts, where, canon []string
	var args []any
	for _, col := range t.Columns {
		names = append(names, schema.Literal(col.Name))
		texts = append(texts, col.Text("m."+schema.Quote(col.Name)))
	}
	for i, k := range t.Key {
		col, _ := t.Column(k)
		args = append(args, c.key[i])
		where = append(where, fmt.Sprintf("m.%s = $%d::text::%s", schema.Quote(k), i+1, col.MirrorType))
		canon = append(canon, col.Text(fmt.Sprintf("$%d::text::%s", i+1, col.MirrorType)))
	}
	var key []string
	if err := tx.QueryRow(r.ctx, "SELECT ARRAY["+strings.Join(canon, ", ")+"]::text[]", args...).Scan(&key); err != nil {
		return 0, err
	}
	var old, lw *string
	var version, mver int64
	err := tx.QueryRow(r.ctx, fmt.Sprintf("SELECT jsonb_object(ARRAY[%s], ARRAY[%s]::text[])::text, _ws_version, _ws_lw, _ws_mver FROM %s m WHERE %s",
		strings.Join(names, ", "), strings.Join(texts, ", "), t.Ident(), strings.Join(where, " AND ")), args...).Scan(&old, &version, &lw, &mver)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return 0, err
	}
	effect, reason := conflict.Merge(conflict.Facts{Op: c.op, Exists: old != nil, Version: true})
	if effect == conflict.Reject {
		return 0, fmt.Errorf("test mistake: merge refuses: %s", reason)
	}
	var img *string
	if c.op != conflict.Delete {
		full := map[string]any{}
		for k, v := range c.img {
			full[k] = v
		}
		if c.op == conflict.Insert {
			for i, k := range t.Key {
				full[k] = c.key[i]
			}
		}
		b, err := json.Marshal(full)
		if err != nil {
			return 0, err
		}
		s := string(b)
		img = &s
	}
	after := "pg_current_xact_id()::text::bigint"
	if c.op == conflict.Delete {
		after = "0"
	}
	var id int64
	err = tx.QueryRow(r.ctx, `INSERT INTO waystage.change (session_id, idx, device_id, incarnation, n, tbl, tname, op, key, state, stamp, version, bver, img, old, old_version, old_lw, old_mver, unit, policy)
		VALUES ($1, $2, 1, $3, $1, $4, $5, $6, $7, 'merged', pg_current_xact_id()::text::bigint, `+after+`, $8, $9::text::jsonb, $10::text::jsonb, $8, $11, $12, $13, nullif($14, '')::jsonb) RETURNING id`,
		session, idx, c.dev, t.ID, c.table, string(rune(c.op)), key, version, img, old, lw, mver, c.unit, c.policy).Scan(&id)
	if err != nil {
		return 0, err
	}
	var sets, cols, vals []string
	args2 := slices.Clone(args)
	for _, col := range t.Columns {
		v, ok := c.img[col.Name]
		if !ok {
			continue
		}
		args2 = append(args2, v)
		val := fmt.Sprintf("$%d::text::%s", len(args2), col.MirrorType)
		sets = append(sets, schema.Quote(col.Name)+" = "+val)
		if !t.IsKey(col.Name) {
			cols, vals = append(cols, schema.Quote(col.Name)), append(vals, val)
		}
	}
	switch effect {
	case conflict.Create:
		for i, k := range t.Key {
			col, _ := t.Column(k)
			cols, vals = append(cols, schema.Quote(k)), append(vals, fmt.Sprintf("$%d::text::%s", i+1, col.MirrorType))
		}
		_, err = tx.Exec(r.ctx, fmt.Sprintf("INSERT INTO %s (%s, _ws_lw, _ws_mver) VALUES (%s, %s, pg_current_xact_id()::text::bigint)", t.Ident(),
			strings.Join(cols, ", "), strings.Join(vals, ", "), schema.Literal(c.dev)), args2...)
	case conflict.Change:
		sets = append(sets, "_ws_version = pg_current_xact_id()::text::bigint", "_ws_mver = pg_current_xact_id()::text::bigint", "_ws_lw = "+schema.Literal(c.dev))
		_, err = tx.Exec(r.ctx, fmt.Sprintf("UPDATE %s m SET %s WHERE %s", t.Ident(), strings.Join(sets, ", "), strings.Join(where, " AND ")), args2...)
	case conflict.Remove:
		_, err = tx.Exec(r.ctx, fmt.Sprintf("DELETE FROM %s m WHERE %s", t.Ident(), strings.Join(where, " AND ")), args...)
	}
	return id, err
}

// verdict of a change: "state" or "state code".
func (r *rig) verdict(id int64) string {
	return r.text(r.mirror, "SELECT concat_ws(' ', state, code) FROM waystage.change WHERE id = $1", id)
}

// settled waits until nothing is in flight and the mirror equals the source byte for byte.
func (r *rig) settled() {
	r.t.Helper()
	r.settledWithin(deadline)
}

func (r *rig) settledWithin(d time.Duration) {
	r.t.Helper()
	var why string
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if why = r.unsettled(); why == "" {
			return
		}
	}
	r.t.Fatalf("not settled: %s\nchanges:\n%s\nbase:\n%s\nprogress:\n%s\nsource:\n%s\nworkers: %s", why,
		r.text(r.mirror, "SELECT format('%s %s %s %s %s old=%s img=%s %s %s', id, tname, op, key, state, old, img, code, detail) FROM waystage.change ORDER BY id DESC LIMIT 20"),
		r.text(r.mirror, "SELECT format('%s %s %s %s', tbl, key, img, writer) FROM waystage.base"),
		r.text(r.mirror, "SELECT p::text FROM waystage.progress p"), r.text(r.source, "SELECT p::text FROM waystage.progress p"), r.states())
}

func (r *rig) states() string {
	var b strings.Builder
	for _, name := range allWorkers {
		if w := r.workers[name]; w.obj != nil {
			switch o := w.obj.(type) {
			case *capture.Capture:
				fmt.Fprintf(&b, "\n  %s: %+v", name, o.Stats())
			case *apply.Down:
				fmt.Fprintf(&b, "\n  %s: %+v", name, o.Stats())
			case *apply.Up:
				fmt.Fprintf(&b, "\n  %s: %+v", name, o.Stats())
			}
		}
	}
	return b.String()
}

func (r *rig) unsettled() string {
	r.t.Helper()
	if n := r.text(r.mirror, "SELECT count(*)::text FROM waystage.change WHERE state = 'merged'"); n != "0" {
		return n + " changes pending"
	}
	if n := r.text(r.mirror, "SELECT count(*)::text FROM waystage.base"); n != "0" {
		return n + " rows in base"
	}
	for name := range r.tables {
		if d := r.diff(name); d != "" {
			return d
		}
	}
	return ""
}

// diff compares a table on both sides: as canonical text and, where the types are the same, byte for byte.
func (r *rig) diff(name string) string {
	r.t.Helper()
	t := r.tables[name]
	var texts, images []string
	for _, c := range t.Columns {
		texts = append(texts, schema.Column{MirrorType: c.Type}.Text(schema.Quote(c.Name)))
		if c.Type == c.MirrorType {
			images = append(images, schema.Quote(c.Name)+"::"+c.MirrorType) // a domain has a type of its own
		}
	}
	sql := "SELECT ARRAY[" + strings.Join(texts, ", ") + "]::text[]::text || md5(record_send(ROW(" + strings.Join(images, ", ") + "))::text) FROM " + t.Ident() + " ORDER BY 1"
	src, mir := r.text(r.source, sql), r.text(r.mirror, sql)
	if src != mir {
		if len(src)+len(mir) > 4000 {
			return fmt.Sprintf("%s differs (%d, %d bytes)", name, len(src), len(mir))
		}
		return fmt.Sprintf("%s differs\nsource:\n%s\nmirror:\n%s", name, src, mir)
	}
	return ""
}

// eventually waits for a condition.
func (r *rig) eventually(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(deadline); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%s: never. workers: %s", what, r.states())
		}
	}
}
