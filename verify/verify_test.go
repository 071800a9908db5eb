package verify_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/verify"
)

// equal fails unless nothing differs, and everything was decided.
func equal(t *testing.T, rep *verify.Report) {
	t.Helper()
	if rep.Different() || !rep.Complete() {
		t.Fatalf("%+v\n%+v", rep.Tables, rep.Checks)
	}
}

// TestEqual: types whose text depends on settings, odd names, composite and text keys, a partitioned table.
func TestEqual(t *testing.T) {
	r := newRig(t)
	r.serve()
	r.exec(r.source, `UPDATE public.kinds SET ts = now(), b = '\x5c00' WHERE id = 2; INSERT INTO public.words VALUES ('ÿ');
		UPDATE public.parts SET region = 's' WHERE id = 2; DELETE FROM public.pair WHERE a = 3`)
	rep := r.compare(nil)
	equal(t, rep)
	for name, rows := range map[string]int64{"public.kinds": 300, "public.words": 407, "public.parts": 100} {
		if tr := table(t, rep, name); tr.SourceRows != rows {
			t.Errorf("%s: %d rows were seen, want %d", name, tr.SourceRows, rows)
		}
	}
	rep = r.compare(func(o *verify.Options) { o.Tables = []string{"public.pair"} })
	if equal(t, rep); len(rep.Tables) != 1 {
		t.Errorf("%+v", rep.Tables)
	}
}

// TestDifferencesAreNamed: each kind of corruption is found, with its row and columns, and nothing else.
func TestDifferencesAreNamed(t *testing.T) {
	r := newRig(t)
	r.serve()
	equal(t, r.compare(nil))
	const unpublished = `BEGIN; ALTER PUBLICATION waystage DROP TABLE public.%[1]s; %[2]s; ALTER PUBLICATION waystage ADD TABLE public.%[1]s; COMMIT`
	for _, c := range []struct {
		name, mirror, source string
		table, kind          string
		key                  []string
		columns              []string
		undo                 string // at the mirror
	}{
		{name: "a mirror row altered", mirror: `UPDATE public.kinds SET f = f + 1e-12, c = 'zz' WHERE id = 1`,
			table: "public.kinds", kind: verify.ValuesDiffer, key: []string{"1"}, columns: []string{"f", "c"}, undo: `UPDATE public.kinds SET f = 0.1::float8 + 0.2, c = 'ab' WHERE id = 1`},
		{name: "null and empty", mirror: `UPDATE public.words SET n = NULL WHERE w = md5('1')`,
			table: "public.words", kind: verify.ValuesDiffer, key: []string{"c4ca4238a0b923820dcc509a6f75849b"}, columns: []string{"n"}, undo: `UPDATE public.words SET n = 1 WHERE w = md5('1')`},
		{name: "numeric scale", source: fmt.Sprintf(unpublished, "kinds", `UPDATE public.kinds SET n = 1.50 WHERE id = 7`),
			table: "public.kinds", kind: verify.ValuesDiffer, key: []string{"7"}, columns: []string{"n"}, undo: `UPDATE public.kinds SET n = 1.50 WHERE id = 7`},
		{name: "a mirror row lost", mirror: `DELETE FROM public.pair WHERE v = 'v8'`,
			table: "public.pair", kind: verify.MissingInMirror, key: []string{"1", `key 8 "\,()`}, undo: `INSERT INTO public.pair VALUES (1, E'key 8 "\\,()', 'v8')`},
		{name: "a mirror row too many", mirror: `INSERT INTO public.words VALUES ('nobody knows', 'ok', 0)`,
			table: "public.words", kind: verify.MissingInSource, key: []string{"nobody knows"}, undo: `DELETE FROM public.words WHERE w = 'nobody knows'`},
		{name: "a source row that never came", source: fmt.Sprintf(unpublished, "parts", `INSERT INTO public.parts VALUES (1000, 'n', 'new')`),
			table: "public.parts", kind: verify.MissingInMirror, key: []string{"1000", "n"}, undo: `INSERT INTO public.parts VALUES (1000, 'n', 'new')`},
		{name: "an enum label that the source does not know", mirror: `UPDATE public.words SET m = 'furious' WHERE w = 'a'`,
			table: "public.words", kind: verify.ValuesDiffer, key: []string{"a"}, columns: []string{"m"}, undo: `UPDATE public.words SET m = 'ok' WHERE w = 'a'`},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.t = t
			if c.mirror != "" {
				r.exec(r.mirror, c.mirror)
			}
			if c.source != "" {
				r.exec(r.source, c.source)
			}
			rep := r.compare(nil)
			for _, tr := range rep.Tables {
				if tr.Table != c.table && tr.State != verify.Equal {
					t.Errorf("%+v", tr)
				}
			}
			tr := table(t, rep, c.table)
			if tr.State != verify.Differs || tr.Different != 1 || len(tr.Rows) != 1 || tr.More || !rep.Different() {
				t.Fatalf("%+v", tr)
			}
			row := tr.Rows[0]
			if row.Kind != c.kind || !slices.Equal(row.Key, c.key) || row.Pending {
				t.Errorf("%+v", row)
			}
			var names []string
			for _, col := range row.Columns {
				names = append(names, col.Name)
			}
			if c.columns != nil && !slices.Equal(names, c.columns) {
				t.Errorf("columns %v, want %v", names, c.columns)
			}
			r.exec(r.mirror, c.undo)
		})
	}
	r.t = t
	equal(t, r.compare(nil))
	// More than are to be named.
	r.exec(r.mirror, `UPDATE public.pair SET v = 'x'`)
	if tr := table(t, r.compare(func(o *verify.Options) { o.Most = 7 }), "public.pair"); tr.Different < 7 || len(tr.Rows) != 7 {
		t.Errorf("%+v", tr)
	}
	r.exec(r.mirror, `TRUNCATE public.pair`)
	if tr := table(t, r.compare(nil), "public.pair"); tr.Different < 100 || tr.MirrorRows != 0 || tr.SourceRows != 500 {
		t.Errorf("%d of %d", tr.Different, tr.SourceRows)
	}
}

// TestNoFalseAlarm: while the office and a device write, nothing is called different.
func TestNoFalseAlarm(t *testing.T) {
	r := newRig(t)
	r.serve()
	d := r.device("alice")
	if _, err := d.Sync(r.ctx, device.SyncOptions{}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(r.ctx)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var broken []error
	worker := func(do func(i int) error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; ctx.Err() == nil; i++ {
				if err := do(i); err != nil && ctx.Err() == nil {
					mu.Lock()
					broken = append(broken, err)
					mu.Unlock()
					return
				}
			}
		}()
	}
	worker(func(i int) error {
		n := rand.IntN(300)
		for _, sql := range []string{
			fmt.Sprintf("UPDATE public.kinds SET f = %d, ts = clock_timestamp() WHERE id = %d", i, n),
			fmt.Sprintf("UPDATE public.words SET n = %d WHERE w < 'c'", i),
			fmt.Sprintf("DELETE FROM public.pair WHERE a = %d AND v LIKE 'v%d%%'", n%7, n%10),
			fmt.Sprintf("INSERT INTO public.pair SELECT %d, 'k' || i, 'v%d' FROM generate_series(1, 5) AS i ON CONFLICT (a, b) DO UPDATE SET v = excluded.v", n%7, n%10),
			fmt.Sprintf("UPDATE public.parts SET region = CASE region WHEN 'n' THEN 's' ELSE 'n' END WHERE id = %d", n%100),
		} {
			if _, err := r.source.Exec(ctx, sql); err != nil {
				return err
			}
		}
		return sleep(ctx, 5*time.Millisecond)
	})
	worker(func(i int) error {
		if _, err := d.DB().ExecContext(ctx, "UPDATE kinds SET n = ? WHERE id IN (?, ?)", fmt.Sprint(i), rand.IntN(300), rand.IntN(300)); err != nil {
			return err
		}
		if _, err := d.DB().ExecContext(ctx, "INSERT INTO words (w, m, n) VALUES (?, 'ok', 1)", fmt.Sprintf("device %d", i)); err != nil {
			return err
		}
		_, err := d.Sync(ctx, device.SyncOptions{})
		return err
	})
	var inFlight int64
	for range 6 {
		rep := r.compare(func(o *verify.Options) { o.Chunk = 20 })
		if rep.Different() {
			t.Errorf("%+v\n%+v", rep.Tables, rep.Checks)
		}
		for _, tr := range rep.Tables {
			if tr.State == verify.Failed {
				t.Errorf("%+v", tr)
			}
			inFlight += tr.InFlight
		}
	}
	stop()
	wg.Wait()
	if len(broken) > 0 {
		t.Fatal(broken)
	}
	t.Logf("%d rows were in flight at a first look", inFlight)
	if inFlight == 0 {
		t.Error("nothing was ever in flight: the test shows nothing")
	}
	// A real difference is found in the middle of what has happened.
	r.exec(r.mirror, "UPDATE public.kinds SET j = '[]' WHERE id = 299")
	if tr := table(t, r.compare(nil), "public.kinds"); tr.Different != 1 || tr.Rows[0].Key[0] != "299" {
		t.Errorf("%+v", tr)
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
	return nil
}

// TestPending: of a key with a pending change its base is compared, not the mirror's row.
func TestPending(t *testing.T) {
	r := newRig(t)
	r.serve()
	d := r.device("alice")
	if _, err := d.Sync(r.ctx, device.SyncOptions{}); err != nil {
		t.Fatal(err)
	}
	// The row is locked at the source, so that the device's change stays pending.
	tx, err := r.source.Begin(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(r.ctx)) }()
	if _, err := tx.Exec(r.ctx, "SELECT FROM public.kinds WHERE id = 1 FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	if _, err := d.DB().ExecContext(r.ctx, "UPDATE kinds SET c = 'new' WHERE id = 1"); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Sync(r.ctx, device.SyncOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := r.value(r.mirror, "SELECT count(*)::text FROM waystage.change WHERE state = 'merged'") + r.value(r.mirror, "SELECT c::text FROM public.kinds WHERE id = 1"); strings.TrimSpace(got) != "1new" {
		t.Fatalf("the change is not pending: %s", got)
	}
	equal(t, r.compare(nil))
	// A base image that is not the source's row is a difference.
	r.exec(r.mirror, `UPDATE waystage.change SET old = jsonb_set(old, '{c}', '"other"') WHERE state = 'merged'`)
	tr := table(t, r.compare(func(o *verify.Options) { o.Wait = 100 * time.Millisecond }), "public.kinds")
	if tr.Undecided+tr.Different != 1 {
		t.Errorf("%+v", tr)
	}
	r.exec(r.mirror, `UPDATE waystage.change SET old = jsonb_set(old, '{c}', '"ab   "') WHERE state = 'merged'`)
	if err := tx.Rollback(r.ctx); err != nil {
		t.Fatal(err)
	}
	r.eventually("the change gets its verdict", func() bool {
		return r.value(r.mirror, "SELECT count(*)::text FROM waystage.change WHERE state = 'merged'") == "0"
	})
	equal(t, r.compare(nil))
}

// TestChecks: what must hold among our own tables is looked at.
func TestChecks(t *testing.T) {
	r := newRig(t)
	r.serve()
	d := r.device("alice")
	if _, err := d.Sync(r.ctx, device.SyncOptions{}); err != nil {
		t.Fatal(err)
	}
	equal(t, r.compare(nil))
	for name, c := range map[string][2]string{
		"base_without_pending":      {"INSERT INTO waystage.base (tbl, key, img, writer) VALUES (1, '{1}', NULL, 'foreign')", "DELETE FROM waystage.base"},
		"staging_of_merged":         {"INSERT INTO waystage.staging (tbl, session_id, idx, tname, op, key) VALUES (0, 1, 0, 'x', 'U', '{1}')", "DELETE FROM waystage.staging"},
		"tombstone_from_the_future": {"INSERT INTO waystage.tombstone (tbl, key, stamp) VALUES (1, '{1}', 1::bigint << 60)", "DELETE FROM waystage.tombstone WHERE stamp = 1::bigint << 60"},
		"mirror_trigger":            {"ALTER TABLE public.pair DISABLE TRIGGER _ws_delete", "ALTER TABLE public.pair ENABLE TRIGGER _ws_delete"},
		"mirror_constraint":         {"CREATE UNIQUE INDEX extra ON public.kinds (id, f)", "DROP INDEX public.extra"},
		"session_ahead":             {"UPDATE waystage.incarnation SET last_n = last_n - 1", "UPDATE waystage.incarnation SET last_n = last_n + 1"},
	} {
		t.Run(name, func(t *testing.T) {
			r.t = t
			r.exec(r.mirror, c[0])
			rep := r.compare(func(o *verify.Options) { o.Tables = []string{"public.parts"} })
			r.exec(r.mirror, c[1])
			for _, k := range rep.Checks {
				if (k.Count > 0) != (k.Name == name) || (k.Count > 0) != (len(k.Sample) > 0) {
					t.Errorf("%+v", k)
				}
			}
		})
	}
}

// TestRefusals: what cannot be compared is said, and compared is what can be.
func TestRefusals(t *testing.T) {
	r := newRig(t)
	if _, err := verify.Compare(r.ctx, verify.Options{Source: r.source, Mirror: r.mirror}); err == nil {
		t.Error("a mirror that is not set up was compared")
	}
	stop := r.serve()
	var unknown *verify.UnknownTableError
	if _, err := verify.Compare(r.ctx, verify.Options{Source: r.source, Mirror: r.mirror, Tables: []string{"public.nothing"}}); !errors.As(err, &unknown) || !slices.Contains(unknown.Known, "public.pair") {
		t.Errorf("%v", err)
	}
	stop()
	// Nobody applies: equal tables are equal all the same, and a difference cannot be decided.
	equal(t, r.compare(nil))
	r.exec(r.source, "UPDATE public.pair SET v = 'on its way' WHERE a = 1")
	rep := r.compare(func(o *verify.Options) { o.Wait = 100 * time.Millisecond })
	tr := table(t, rep, "public.pair")
	if tr.State != verify.Undecided || tr.Different != 0 || tr.Undecided == 0 || !strings.Contains(tr.Why, "waystage status") || rep.Different() || rep.Complete() {
		t.Errorf("%+v", tr)
	}
	// A role that may read one table, and of another not all rows.
	name := r.value(r.source, "SELECT 'verify_' || oid FROM pg_database WHERE datname = current_database()")
	role := schema.Quote(name)
	r.exec(r.source, "CREATE ROLE "+role+" LOGIN; GRANT SELECT ON public.words, public.kinds TO "+role+"; GRANT USAGE ON SCHEMA waystage TO "+role+
		"; ALTER TABLE public.kinds ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON public.kinds USING (id < 10)")
	t.Cleanup(func() { r.exec(r.source, "DROP OWNED BY "+role+"; DROP ROLE "+role) })
	limited := r.as(name)
	rep = r.compare(func(o *verify.Options) {
		o.Source, o.Tables = limited, []string{"public.words", "public.kinds", "public.parts"}
	})
	if w := table(t, rep, "public.words"); w.State != verify.Equal {
		t.Errorf("%+v", w)
	}
	for _, table := range rep.Tables[1:] {
		if table.Table != "public.words" && table.State != verify.Failed {
			t.Errorf("%+v", table)
		}
	}
	if rep.Err() == nil || rep.Complete() {
		t.Errorf("the failures are not told: %v", rep.Err())
	}
}

// TestCost tells what a comparison costs, in plain reads of the same table in the same run.
func TestCost(t *testing.T) {
	r := newRig(t)
	r.exec(r.source, "INSERT INTO public.pair SELECT i, 'key ' || i, repeat('v', 80) FROM generate_series(1, 200000) AS i; ANALYZE public.pair")
	r.serve()()
	r.exec(r.mirror, "ANALYZE public.pair")
	best := func(do func()) time.Duration {
		took := time.Hour
		for range 3 {
			began := time.Now()
			do()
			took = min(took, time.Since(began))
		}
		return took
	}
	compare := best(func() {
		equal(t, r.compare(func(o *verify.Options) { o.Chunk, o.Tables = 0, []string{"public.pair"} }))
	})
	plain := best(func() {
		r.value(r.source, "SELECT count(*)::text FROM public.pair")
		r.value(r.mirror, "SELECT count(*)::text FROM public.pair")
	})
	md5 := best(func() {
		r.value(r.source, "SELECT max(md5(p::text)) FROM public.pair AS p")
		r.value(r.mirror, "SELECT max(md5(p::text)) FROM public.pair AS p")
	})
	t.Logf("200,000 rows on each side: %s; %.1f times a count of both sides, %.2f times an md5 of them", compare.Round(time.Millisecond),
		float64(compare)/float64(plain), float64(compare)/float64(md5))
}
