package apply_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/capture"
	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/nettest"
	"github.com/waystage/waystage/internal/trouble"
	"github.com/waystage/waystage/schema"
)

// The tests of docs/hazards.md that concern both sides.

// through puts a proxy before a server.
func through(t *testing.T, dsn string) (*nettest.Proxy, string) {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	p, err := nettest.New(u.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	u.Host = p.Address()
	return p, u.String()
}

const docs = `
	CREATE TABLE doc (id int PRIMARY KEY, big text, n int);
	ALTER TABLE doc ALTER big SET STORAGE EXTERNAL;
	CREATE TABLE full_doc (id int PRIMARY KEY, big text, n int);
	ALTER TABLE full_doc ALTER big SET STORAGE EXTERNAL;
	ALTER TABLE full_doc REPLICA IDENTITY FULL;
	INSERT INTO doc SELECT i, repeat('0123456789', 1000) || i, i FROM generate_series(1, 10) i;
	INSERT INTO full_doc SELECT * FROM doc`

// Out-of-line values that the server does not send again: kept, with and without pending changes, whatever the key does.
func TestHazardUnchangedToast(t *testing.T) {
	r := newRig(t, docs, "public.doc", "public.full_doc")
	r.start(allWorkers...)
	for _, tbl := range []string{"doc", "full_doc"} {
		r.foreign("UPDATE "+tbl+" SET n = 100 WHERE id = 1", "UPDATE "+tbl+" SET n = 101, id = 11 WHERE id = 1", "UPDATE "+tbl+" SET n = 102 WHERE id = 11")
		r.foreign("UPDATE "+tbl+" SET id = 12 WHERE id = 2", "INSERT INTO "+tbl+" VALUES (2, 'small', 0)")
		r.foreign("INSERT INTO "+tbl+" VALUES (50, repeat('z', 9000), 0)", "UPDATE "+tbl+" SET n = 1 WHERE id = 50", "UPDATE "+tbl+" SET n = 2, id = 51 WHERE id = 50")
	}
	r.settled()
	// A pending change, and a foreign one that does not send the out-of-line value.
	r.stop("up")
	ids := r.merge(upd("public.doc", "5", map[string]any{"n": "1"}), upd("public.full_doc", "5", map[string]any{"n": "1"}),
		upd("public.doc", "7", map[string]any{"n": "1"}), upd("public.doc", "8", map[string]any{"big": "short"}))
	for _, tbl := range []string{"doc", "full_doc"} {
		r.foreign("UPDATE " + tbl + " SET n = 500 WHERE id = 5")
	}
	r.foreign("UPDATE doc SET n = 70 WHERE id = 7", "DELETE FROM doc WHERE id = 7", "INSERT INTO doc VALUES (7, 'again', 7)")
	r.eventually("base has the foreign images", func() bool {
		return r.text(r.mirror, "SELECT count(*)::text FROM waystage.base WHERE writer = 'foreign'") == "3"
	})
	if got := r.text(r.mirror, "SELECT min(length(img->>'big'))::text FROM waystage.base WHERE key = '{5}'"); got != "10001" {
		t.Errorf("base of a row with an unchanged out-of-line value: %s", got)
	}
	r.start("up")
	r.settled()
	r.wantVerdicts(ids, "refused source_conflict", "refused source_conflict", "refused source_conflict", "applied")
}

// Keys that change at the source: on top of a pending change, onto a key that a device has taken meanwhile, and in a ring.
func TestHazardKeyChange(t *testing.T) {
	r := newRig(t, docs, "public.doc", "public.full_doc")
	r.start(allWorkers...)
	for _, tbl := range []string{"doc", "full_doc"} {
		r.foreign("UPDATE "+tbl+" SET id = id + 100 WHERE id IN (3, 4)", "DELETE FROM "+tbl+" WHERE id = 103", "INSERT INTO "+tbl+" VALUES (3, 'new', 0)")
		r.foreign("UPDATE "+tbl+" SET id = -1 WHERE id = 1", "UPDATE "+tbl+" SET id = 1 WHERE id = 2", "UPDATE "+tbl+" SET id = 2 WHERE id = -1") // two swap their keys
		r.foreign("UPDATE " + tbl + " SET id = -id WHERE id > 4")
		r.foreign("UPDATE " + tbl + " SET id = -id + 1 WHERE id < 0") // each takes the key that its neighbour had
	}
	r.settled()
	r.stop("up")
	ids := r.merge(upd("public.doc", "6", map[string]any{"n": "1"}), ins("public.doc", "77", map[string]any{"big": "mine", "n": "1"}), ins("public.doc", "78", map[string]any{"n": "1"}),
		upd("public.doc", "8", map[string]any{"n": "1"}), del("public.doc", "9"))
	r.foreign("UPDATE doc SET id = 60 WHERE id = 6")                                            // the old key has a pending change
	r.foreign("UPDATE doc SET id = 77 WHERE id = 7")                                            // the new key has one
	r.foreign("UPDATE doc SET id = 80 WHERE id = 8", "UPDATE doc SET id = 8 WHERE id = 80")     // there and back again
	r.foreign("DELETE FROM doc WHERE id = 9", "UPDATE doc SET id = 9, n = n + 1 WHERE id = 10") // another row under the key
	r.start("up")
	r.settled()
	r.wantVerdicts(ids, "refused source_conflict", "refused source_conflict", "applied", "applied", "refused source_conflict")
	if got := r.text(r.mirror, "SELECT string_agg(id || ':' || length(big), ' ' ORDER BY id) FROM doc WHERE id IN (60, 77)"); got != "60:10001 77:10001" {
		t.Errorf("moved rows: %s", got)
	}
}

// TRUNCATE, with CASCADE and RESTART IDENTITY, in the middle of a transaction and over pending changes.
func TestHazardTruncate(t *testing.T) {
	r := newRig(t, docs+`;
		CREATE TABLE parent (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v text); CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent, v text);
		CREATE TABLE unsynced (parent int REFERENCES parent);
		INSERT INTO parent (v) VALUES ('a'), ('b'); INSERT INTO child VALUES (1, 1, 'c'), (2, 2, 'd')`, "public.doc", "public.full_doc", "public.parent", "public.child")
	r.start(allWorkers...)
	r.stop("up")
	ids := r.merge(upd("public.doc", "9", map[string]any{"n": "9"}), del("public.doc", "10"), ins("public.doc", "77", map[string]any{"n": "1"}))
	r.foreign("TRUNCATE doc, full_doc", "INSERT INTO doc VALUES (10, 'new', 1)", "INSERT INTO full_doc VALUES (1, 'new', 1)")
	r.foreign("INSERT INTO doc VALUES (11, 'x', 1)", "TRUNCATE doc", "INSERT INTO doc VALUES (12, 'x', 1)")
	r.start("up")
	r.settled()
	r.wantVerdicts(ids, "refused source_conflict", "applied", "applied")

	r.stop("up")
	ids = r.merge(upd("public.child", "1", map[string]any{"v": "mine"}), upd("public.parent", "2", map[string]any{"v": "mine"}), ins("public.child", "3", map[string]any{"parent": "2", "v": "x"}))
	r.foreign("UPDATE child SET v = 'before' WHERE id = 2", "TRUNCATE parent RESTART IDENTITY CASCADE", "INSERT INTO parent (v) VALUES ('again')")
	r.start("up")
	r.settled()
	r.wantVerdicts(ids, "refused source_conflict", "refused source_conflict", "refused source_constraint")
	if got := r.text(r.mirror, "SELECT string_agg(id || v, ' ') FROM parent"); got != "1again" {
		t.Errorf("parent: %q", got)
	}
}

// The customer's roles and databases may have any default settings: what is written does not depend on them, and triggers run
// under those that they expect.
func TestHazardSessionSettings(t *testing.T) {
	settings := []string{"datestyle = 'SQL, DMY'", "intervalstyle = 'sql_standard'", "extra_float_digits = 0", "bytea_output = 'escape'", "timezone = 'Asia/Kathmandu'",
		"search_path = customer, public", "standard_conforming_strings = off", "escape_string_warning = off", "lc_monetary = 'C.UTF-8'", "default_transaction_isolation = 'serializable'",
		"default_transaction_read_only = on", "default_transaction_deferrable = on", "statement_timeout = '50ms'", "lock_timeout = '50ms'", "idle_in_transaction_session_timeout = '50ms'",
		"idle_session_timeout = '50ms'", "synchronous_commit = off", "client_encoding = 'LATIN1'", "xmloption = 'document'", "quote_all_identifiers = on", "backslash_quote = off",
		"transform_null_equals = on", "array_nulls = off", "row_security = off", "client_min_messages = 'error'"}
	alter := func(quote string) string {
		var b strings.Builder
		for _, s := range settings {
			fmt.Fprintf(&b, "EXECUTE format('ALTER DATABASE %%I SET %s', current_database()); ", strings.ReplaceAll(s, "'", quote))
		}
		return "DO $do$ BEGIN " + b.String() + "END $do$"
	}
	r := newRig(t, `
		CREATE SCHEMA customer;
		CREATE TABLE v (id int PRIMARY KEY, d date, ts timestamp, tz timestamptz, iv interval, f8 double precision, f4 real, by bytea, t text, m money, a int[], x xml, n numeric, seen text);
		CREATE FUNCTION customer.spell(d date) RETURNS text LANGUAGE sql AS $$ SELECT d::text || ' ' || current_setting('timezone') $$;
		CREATE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.seen := spell(NEW.d); RETURN NEW; END $$;
		CREATE TRIGGER judge BEFORE INSERT OR UPDATE ON v FOR EACH ROW EXECUTE FUNCTION judge();
		`+alter("''"), "public.v")
	r.exec(r.mirror, alter("''"))
	// Connections of office users, too, begin with those defaults.
	r.source, r.mirror = r.connect(r.sourceDSN), r.connect(r.mirrorDSN)
	r.exec(r.source, "SET search_path = customer, public")
	r.exec(r.mirror, "SET search_path = public")
	row := map[string]any{"d": "2024-03-02", "ts": "2024-03-02 04:05:06.789", "tz": "2024-03-02 04:05:06+00", "iv": "1 mon 3 days 00:00:00.5", "f8": "0.1", "f4": "3.4028235e+38",
		"by": `\x00ff5c27`, "t": `back\slash 'quote' ü €`, "m": "$1,234.56", "a": "{1,NULL,3}", "x": "<a/><b/>", "n": "1.50"}
	ids := r.merge(ins("public.v", "1", row))
	r.start(allWorkers...)
	r.settled()
	r.wantVerdicts(ids, "applied")
	ids = append(ids, r.merge(upd("public.v", "1", map[string]any{"t": `again \ '`}))...)
	r.foreign("SET LOCAL datestyle = 'SQL, DMY'", `INSERT INTO v VALUES (2, '03/02/2024', '03/02/2024 04:05:06', '03/02/2024 04:05:06', '1-1', 0.30000000000000004, 0.1, '\x00ff', 'theirs', '12.34', '{1,NULL}', '<c/>', 2.50)`)
	r.settled()
	for _, id := range ids {
		r.wantVerdict(id, "applied")
	}
	for key, want := range map[int]string{1: "02/03/2024 Asia/Kathmandu", 2: "03/02/2024 UTC"} { // the test's own connection has timezone UTC
		if got := r.text(r.mirror, "SELECT seen FROM v WHERE id = $1", key); got != want {
			t.Errorf("the trigger saw %q, want %q", got, want)
		}
	}
	image := "SELECT md5(record_send(ROW(d, ts, tz, iv, f8, f4, by, t, m, a, n))::text) FROM v ORDER BY id"
	if s, m := r.text(r.source, image), r.text(r.mirror, image); s != m {
		t.Error("the values differ in their bytes")
	}
	// What is acknowledged is on disk, whatever the defaults say.
	for _, dsn := range []string{r.sourceDSN, r.mirrorDSN} {
		if got := r.text(r.connect(dsn), "SELECT current_setting('synchronous_commit')"); got != "on" {
			t.Errorf("synchronous_commit = %s", got)
		}
	}
}

// counting counts the writes to a table at the source.
const counting = notes + `;
	CREATE TABLE writes (id int, at timestamptz DEFAULT clock_timestamp());
	CREATE FUNCTION count_writes() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO writes VALUES (NEW.id); RETURN NULL; END $$;
	CREATE TRIGGER count_writes AFTER INSERT OR UPDATE ON note FOR EACH ROW EXECUTE FUNCTION count_writes()`

func (r *rig) wantOnce(id int) {
	r.t.Helper()
	if got := r.text(r.source, "SELECT count(*)::text FROM writes WHERE id = $1", id); got != "1" {
		r.t.Errorf("row %d was written %s times", id, got)
	}
}

// The connection is cut while the source commits. Whether it did is not known: the next session looks.
func TestHazardUnknownCommit(t *testing.T) {
	for name, verdict := range map[string]nettest.Verdict{"committed": nettest.CutAfter, "not committed": nettest.CutNow} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, counting, "public.note")
			proxy, far := through(t, r.sourceDSN)
			r.upCfg = func(c *apply.UpConfig) { c.Source = far }
			r.start(allWorkers...)
			first := r.merge(upd("public.note", "1", map[string]any{"body": "before"}))
			r.settled()
			var cuts atomic.Int32
			proxy.Judge(func(d nettest.Direction, b []byte) nettest.Verdict {
				if d == nettest.ToServer && bytes.Contains(b, []byte("COMMIT")) && cuts.Add(1) <= 2 {
					return verdict
				}
				return nettest.Pass
			})
			ids := r.merge(upd("public.note", "2", map[string]any{"body": "mine"}), upd("public.note", "3", map[string]any{"body": "mine"}))
			ids = append(ids, r.merge(upd("public.note", "4", map[string]any{"body": "mine"}))...)
			r.settled()
			r.wantVerdicts(append(first, ids...), "applied", "applied", "applied", "applied")
			for id := range 4 {
				r.wantOnce(id + 1)
			}
			if cuts.Load() == 0 {
				t.Error("no commit was cut")
			}
		})
	}
}

// The source is gone without a word, in the middle of a transaction too: noticed within a bound, and gone on with.
func TestHazardHalfOpenSource(t *testing.T) {
	r := newRig(t, counting, "public.note")
	proxy, far := through(t, r.sourceDSN)
	r.upCfg = func(c *apply.UpConfig) { c.Source, c.Silence = far, 6*time.Second }
	r.start(allWorkers...)
	ids := r.merge(upd("public.note", "1", map[string]any{"body": "before"}))
	r.settled()
	up := r.workers["up"].obj.(*apply.Up)
	for i, at := range []string{r.epoch, "COMMIT"} { // the epoch is in the transaction's first statement
		var caught atomic.Bool
		proxy.Judge(func(d nettest.Direction, b []byte) nettest.Verdict {
			if d == nettest.ToServer && bytes.Contains(b, []byte(at)) && caught.CompareAndSwap(false, true) {
				return nettest.HoldNow
			}
			return nettest.Pass
		})
		ids = append(ids, r.merge(upd("public.note", fmt.Sprint(i+2), map[string]any{"body": "mine"}))...)
		r.eventually("a transaction is under way", caught.Load)
		proxy.Hold(nettest.ToClient, true)
		began := time.Now()
		r.eventually("the dead connection is noticed", func() bool { return up.Stats().State == "waiting" || up.Stats().State == "starting" })
		t.Logf("dead at %q: noticed after %s", at, time.Since(began))
		proxy.Judge(nil)
		proxy.Hold(nettest.ToServer, false)
		proxy.Hold(nettest.ToClient, false)
		r.settled()
	}
	r.wantVerdicts(ids, "applied", "applied", "applied")
	for id := range 3 {
		r.wantOnce(id + 1)
	}
}

// A worker's process is paused in the middle of a transaction, with its connections open. Its seat goes to another one, which does not
// wait for what the paused one holds; when that wakes up, it changes nothing.
func TestHazardPausedWorker(t *testing.T) {
	r := newRig(t, counting, "public.note")
	r.capCfg = func(c *capture.Config) { c.MessageBytes = 4 << 10 }
	mirror, far := through(t, r.mirrorDSN)
	r.define("paused down", func() interface{ Run(context.Context) error } {
		return apply.NewDown(apply.DownConfig{Mirror: far, Tables: r.load, Changes: r.downQ, Log: r.log, FlushRows: 10})
	})
	all := []string{"paused down", "capture down", "capture up", "down", "up", "paused up"}
	source, farSource := through(t, r.sourceDSN)
	r.define("paused up", func() interface{ Run(context.Context) error } {
		return apply.NewUp(apply.UpConfig{Mirror: r.mirrorDSN, Source: farSource, Tables: r.load, Changes: r.upQ, Log: r.log})
	})
	t.Cleanup(func() { r.stop(all...) })
	parts := 0
	r.downQ.onPut = func(*change.Message) int {
		if parts++; parts == 3 {
			r.downQ.refuse = true // the rest of a large transaction does not come yet; a queue calls this under its lock
		}
		return 1
	}
	r.start("capture down", "paused down")
	r.foreign("INSERT INTO note SELECT i, repeat('x', 200), i FROM generate_series(100, 300) i")
	r.eventually("down is in the middle of a transaction", func() bool {
		return r.text(r.mirror, "SELECT count(*)::text FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'waystage apply down' AND state LIKE 'idle in transaction%'") == "1"
	})
	mirror.Hold(nettest.ToServer, true)
	mirror.Hold(nettest.ToClient, true)
	r.start("down") // waits for the seat, which the paused one loses when it has been silent for half a minute
	r.downQ.set(func() { r.downQ.refuse, r.downQ.onPut = false, nil })
	r.settled()
	mirror.Hold(nettest.ToServer, false)
	mirror.Hold(nettest.ToClient, false)
	r.foreign("UPDATE note SET n = -1 WHERE id = 200")
	r.settled()

	// Up is paused just before its commit, which arrives when its successor has begun.
	var caught atomic.Bool
	source.Judge(func(d nettest.Direction, b []byte) nettest.Verdict {
		if d == nettest.ToServer && bytes.Contains(b, []byte("COMMIT")) && caught.CompareAndSwap(false, true) {
			return nettest.HoldNow
		}
		return nettest.Pass
	})
	r.start("capture up", "paused up")
	id := r.merge(upd("public.note", "1", map[string]any{"body": "once"}))[0]
	r.eventually("up is about to commit", caught.Load)
	source.Judge(nil)
	r.start("up")
	r.exec(r.mirror, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'waystage leader 4'")
	r.eventually("the successor waits for what the paused one holds", func() bool {
		return r.text(r.source, "SELECT count(*)::text FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'waystage apply up' AND wait_event_type = 'Lock'") == "1" ||
			r.verdict(id) == "applied"
	})
	source.Hold(nettest.ToServer, false)
	r.settled()
	r.wantVerdict(id, "applied")
	r.wantOnce(1)
}

// boundedQueue holds no more than a number of bytes: whoever publishes waits.
type boundedQueue struct {
	*memQueue
	limit int
}

func (q boundedQueue) PublishChange(ctx context.Context, m *change.Message) (capture.Receipt, error) {
	for {
		q.mu.Lock()
		size, changed := 0, q.changed
		for _, s := range q.msgs {
			size += len(s.m.Body)
		}
		q.mu.Unlock()
		if size < q.limit {
			return q.memQueue.PublishChange(ctx, m)
		}
		select {
		case <-changed:
		case <-time.After(5 * time.Millisecond): // a purge wakes nobody
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// A transaction many times larger than the memory that we take for it, with capture and apply stopped in its middle.
func TestHazardHugeTransaction(t *testing.T) {
	const rows, width = 40_000, 8_000 // 305 MiB
	r := newRig(t, `CREATE TABLE big (id int PRIMARY KEY, a text, b int); CREATE TABLE other (id int PRIMARY KEY, v int)`, "public.big", "public.other")
	q := boundedQueue{r.downQ, 4 << 20}
	r.define("capture down", func() interface{ Run(context.Context) error } {
		return r.capture(capture.Config{Direction: capture.Down, Server: r.sourceDSN, Slot: schema.SlotDown(r.epoch), Publication: schema.PublicationDown, Queue: q})
	})
	r.downCfg = func(c *apply.DownConfig) { c.HoldBytes = 2 << 20 }
	r.start("capture down", "down")
	r.foreign("INSERT INTO other VALUES (1, 1)")
	r.settledWithin(3 * time.Minute)
	r.foreign(fmt.Sprintf("INSERT INTO big SELECT i, repeat(md5(i::text), %d), i FROM generate_series(1, %d) i", width/32, rows), "UPDATE other SET v = 2")

	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	before, most := m.HeapAlloc, uint64(0)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				most = max(most, m.HeapAlloc)
			}
		}
	}()
	began := time.Now()
	for i, w := range []string{"capture down", "down"} {
		at := r.downQ.count() + 100*(i+1)
		r.eventually("in the middle", func() bool { return r.downQ.count() >= at })
		r.stop(w)
		if got := r.text(r.mirror, "SELECT count(*)::text FROM big"); got != "0" {
			t.Errorf("%s rows of an unfinished transaction are visible", got)
		}
		r.start(w)
	}
	for end := time.Now().Add(5 * time.Minute); r.text(r.mirror, "SELECT v::text FROM other") != "2"; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not applied: %s", r.states())
		}
	}
	took := time.Since(began)
	close(stop)
	<-stopped
	sum := "SELECT count(*) || ' ' || sum(b) || ' ' || md5(string_agg(md5(a), '' ORDER BY id)) FROM big"
	if s, m := r.text(r.source, sum), r.text(r.mirror, sum); s != m {
		t.Errorf("source %s, mirror %s", s, m)
	}
	t.Logf("%d rows, %d MiB of values in %s; heap grew by %d MiB at most", rows, rows*width>>20, took.Round(time.Second), (most-min(most, before))>>20)
	if most > before+rows*width/2 { // garbage included; it depends on the sizes of buffers, not of the transaction
		t.Errorf("the heap grew by %d MiB for a transaction of %d MiB", (most-before)>>20, rows*width>>20)
	}
}

// A unique value moves from row to row in one transaction: the mirror, which does not check it, has no trouble in any order;
// a device's swap is judged by the source.
func TestHazardUniqueValueMoves(t *testing.T) {
	r := newRig(t, `CREATE TABLE u (id int PRIMARY KEY, code text UNIQUE, later text UNIQUE DEFERRABLE INITIALLY DEFERRED);
		INSERT INTO u SELECT i, 'c' || i, 'l' || i FROM generate_series(1, 20) i`, "public.u")
	r.start(allWorkers...)
	r.foreign("DELETE FROM u WHERE id = 1", "INSERT INTO u VALUES (101, 'c1', 'l1')")
	r.foreign("UPDATE u SET code = 'x' WHERE id = 2", "UPDATE u SET code = 'c2' WHERE id = 3", "UPDATE u SET code = 'c3' WHERE id = 2")
	r.foreign("UPDATE u SET later = 'l' || (id % 17 + 4) WHERE id BETWEEN 4 AND 20") // a ring, in one statement
	r.foreign("UPDATE u SET id = 200, code = 'c5' WHERE id = 4 AND false", "DELETE FROM u WHERE id = 5", "UPDATE u SET code = 'c5', id = 5 WHERE id = 6")
	r.settled()
	// A swap in one session: the deferred constraint takes it, the other one does not, and both rows say so.
	good := r.merge(upd("public.u", "7", map[string]any{"later": "swap8"}), upd("public.u", "8", map[string]any{"later": "swap7"}))
	r.settled()
	r.wantVerdicts(good, "applied", "applied")
	bad := r.merge(upd("public.u", "9", map[string]any{"code": "c10"}), upd("public.u", "10", map[string]any{"code": "c9"}))
	moved := r.merge(upd("public.u", "11", map[string]any{"code": "free"}))
	moved = append(moved, r.merge(upd("public.u", "12", map[string]any{"code": "c11"}))...)
	r.settled()
	r.wantVerdicts(bad, "refused source_constraint", "refused source_constraint")
	r.wantVerdicts(moved, "applied", "applied")
}

// Triggers that do not leave the row where it was put: deleted at once, moved to another key, nobody's business; and those that act
// for a whole statement.
func TestHazardTriggersThatMove(t *testing.T) {
	r := newRig(t, `
		CREATE TABLE gone (id int PRIMARY KEY, v text);
		CREATE TABLE moved (id int PRIMARY KEY, v text);
		CREATE TABLE renamed (id int PRIMARY KEY, v text);
		CREATE TABLE noted (id int PRIMARY KEY, v text); CREATE TABLE statements (id int PRIMARY KEY, n int);
		INSERT INTO moved VALUES (1, 'a'), (2, 'b'); INSERT INTO noted VALUES (1, 'a'), (2, 'b'); INSERT INTO statements VALUES (1, 0);
		CREATE FUNCTION vanish() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN DELETE FROM gone WHERE id = NEW.id; RETURN NULL; END $$;
		CREATE TRIGGER t AFTER INSERT ON gone FOR EACH ROW EXECUTE FUNCTION vanish();
		CREATE FUNCTION move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.v = 'move' THEN UPDATE moved SET id = id + 1000, v = 'moved' WHERE id = NEW.id; END IF; RETURN NULL; END $$;
		CREATE TRIGGER t AFTER INSERT OR UPDATE ON moved FOR EACH ROW EXECUTE FUNCTION move();
		CREATE FUNCTION renumber() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.id := NEW.id + 500; RETURN NEW; END $$;
		CREATE TRIGGER t BEFORE INSERT ON renamed FOR EACH ROW EXECUTE FUNCTION renumber();
		CREATE FUNCTION note_statement() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE statements SET n = n + 1; RETURN NULL; END $$;
		CREATE TRIGGER t AFTER UPDATE ON noted REFERENCING NEW TABLE AS now FOR EACH STATEMENT EXECUTE FUNCTION note_statement();
		CREATE VIEW seen AS SELECT * FROM noted;
		CREATE FUNCTION instead() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE noted SET v = NEW.v WHERE id = OLD.id; RETURN NEW; END $$;
		CREATE TRIGGER t INSTEAD OF UPDATE ON seen FOR EACH ROW EXECUTE FUNCTION instead()`,
		"public.gone", "public.moved", "public.renamed", "public.noted", "public.statements")
	ids := r.merge(ins("public.gone", "1", map[string]any{"v": "x"}))
	ids = append(ids, r.merge(upd("public.moved", "1", map[string]any{"v": "move"}))...)
	ids = append(ids, r.merge(ins("public.renamed", "1", map[string]any{"v": "x"}))...)
	ids = append(ids, r.merge(upd("public.noted", "1", map[string]any{"v": "x"}), upd("public.noted", "2", map[string]any{"v": "y"}))...)
	ids = append(ids, r.merge(upd("public.statements", "1", map[string]any{"n": "0"}))...)
	r.start(allWorkers...)
	r.settled()
	r.wantVerdicts(ids, "applied", "applied", "applied", "applied", "applied", "applied")
	again := r.merge(upd("public.moved", "1001", map[string]any{"v": "move"}), ins("public.moved", "5", map[string]any{"v": "move"}))
	r.settled()
	r.wantVerdicts(again, "applied", "applied")
	r.foreign("UPDATE seen SET v = 'through the view' WHERE id = 2")
	r.settled()
	for sql, want := range map[string]string{
		"SELECT count(*)::text FROM gone":                             "0",
		"SELECT string_agg(id || v, ' ' ORDER BY id) FROM moved":      "2b 1005moved 2001moved",
		"SELECT string_agg(id || v, ' ') FROM renamed":                "501x",
		"SELECT string_agg(id || v, ' ' ORDER BY id) FROM noted":      "1x 2through the view",
		"SELECT count(*)::text FROM waystage.base":                    "0",
		"SELECT count(*)::text FROM waystage.change WHERE code <> ''": "0",
	} {
		if got := r.text(r.mirror, sql); got != want {
			t.Errorf("%s: %q, want %q", sql, got, want)
		}
	}
	// A view itself cannot be synced: it has no rows of its own in the log.
	if _, problems, err := schema.ReadTables(r.ctx, r.source, []string{"public.seen"}); err != nil || len(problems) != 1 {
		t.Errorf("a view with an INSTEAD OF trigger: %v %v", problems, err)
	}
	r.quiet()
}

// A transaction that is prepared arrives when it is committed, or not at all; rolled back savepoints leave nothing.
func TestHazardPreparedAndSubtransactions(t *testing.T) {
	r := newRig(t, notes, "public.note")
	r.start(allWorkers...)
	other := r.connect(r.sourceDSN)
	r.exec(other, "BEGIN", "UPDATE public.note SET body = 'prepared' WHERE id = 1", "PREPARE TRANSACTION 'ws_kept'",
		"BEGIN", "UPDATE public.note SET body = 'never' WHERE id = 2", "PREPARE TRANSACTION 'ws_dropped'")
	defer func() { // whatever happens, no prepared transaction may keep the database
		for _, sql := range []string{"ROLLBACK PREPARED 'ws_kept'", "ROLLBACK PREPARED 'ws_dropped'"} {
			_, _ = other.Exec(context.Background(), sql)
		}
	}()
	mine := r.merge(upd("public.note", "3", map[string]any{"body": "mine"}))
	r.foreign("UPDATE note SET n = 40 WHERE id = 4") // later, and committed earlier
	r.settled()
	r.wantVerdicts(mine, "applied")
	if got := r.text(r.mirror, "SELECT body FROM note WHERE id = 1"); got != "note 1" {
		t.Errorf("a transaction that is only prepared arrived: %q", got)
	}
	late := r.merge(upd("public.note", "1", map[string]any{"n": "11"}))
	r.exec(other, "COMMIT PREPARED 'ws_kept'", "ROLLBACK PREPARED 'ws_dropped'")
	r.settled()
	r.wantVerdicts(late, "refused source_conflict")
	r.foreign("INSERT INTO note VALUES (50, 'kept', 0)", "SAVEPOINT a", "UPDATE note SET body = 'undone' WHERE id = 5", "SAVEPOINT b", "DELETE FROM note WHERE id = 6",
		"ROLLBACK TO b", "UPDATE note SET n = 60 WHERE id = 6", "ROLLBACK TO a", "UPDATE note SET n = 61 WHERE id = 6", "SAVEPOINT c", "TRUNCATE note", "ROLLBACK TO c",
		"INSERT INTO note VALUES (51, 'kept too', 0)", "RELEASE c")
	r.foreign(`DO $$ BEGIN FOR i IN 1..200 LOOP BEGIN
		INSERT INTO note VALUES (1000 + i, 'loop', i); IF i % 3 = 0 THEN RAISE EXCEPTION 'undo'; END IF; EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$`)
	r.settled()
	if got := r.text(r.mirror, "SELECT string_agg(concat(id, body, n), ' ' ORDER BY id) FROM note WHERE id IN (1, 5, 6, 50, 51)"); got != "1prepared1 5note 55 6note 661 50kept0 51kept too0" {
		t.Errorf("mirror has %q", got)
	}
}

// The source is older than what the mirror has seen of it, or the mirror older than what the source has had: not gone on with,
// said, and remembered.
func TestHazardRestoredDatabase(t *testing.T) {
	r := newRig(t, notes, "public.note")
	r.start(allWorkers...)
	id := r.merge(upd("public.note", "1", map[string]any{"body": "mine"}))[0]
	r.settled()
	r.wantVerdict(id, "applied")
	stands := func(detail string) {
		t.Helper()
		err := <-r.workers["up"].done
		r.workers["up"].done = nil
		var own *apply.Error
		if !errors.As(err, &own) || own.Code != apply.CodeServerBack || !strings.Contains(own.Detail, detail) || own.Remedy == "" {
			t.Errorf("up ended with %v, want %q", err, detail)
		}
		list, lerr := trouble.List(r.ctx, r.mirror)
		if lerr != nil || len(list) != 1 || list[0].Part != "apply-up" || list[0].Code != string(apply.CodeServerBack) {
			t.Errorf("the mirror says %v %v", list, lerr)
		}
	}
	r.stop("up", "down")
	seq := r.text(r.source, "SELECT seq::text FROM waystage.progress")
	r.exec(r.source, "UPDATE waystage.progress SET seq = seq - 2") // as an older copy has it
	for range 3 {                                                  // trying again does not make it newer
		r.start("up")
		stands("the mirror has seen transaction")
	}
	r.exec(r.source, "UPDATE waystage.progress SET seq = "+seq+", position = '7FFFFFFF/0'")
	r.start("up")
	stands("the mirror's log ends at")
	r.exec(r.source, "UPDATE waystage.progress SET seq = seq + 1, position = '0/0'")
	r.start("up", "down")
	id = r.merge(upd("public.note", "2", map[string]any{"body": "mine"}))[0]
	r.settled()
	r.wantVerdict(id, "applied")
	if list, err := trouble.List(r.ctx, r.mirror); err != nil || len(list) != 0 {
		t.Errorf("the trouble is over, the mirror still says %v %v", list, err)
	}
}

// A table that loses its key while it is published cannot be updated by its own users any more. It is taken out of the
// publication within seconds; it stops, all others go on.
func TestHazardKeyDroppedLater(t *testing.T) {
	r := newRig(t, notes+`; CREATE TABLE memo (id int CONSTRAINT memo_key PRIMARY KEY, v text); INSERT INTO memo VALUES (1, 'a'), (2, 'b')`, "public.note", "public.memo")
	r.start(allWorkers...)
	r.settled()
	r.exec(r.source, "ALTER TABLE memo DROP CONSTRAINT memo_key")
	r.eventually("its users can update it again", func() bool {
		_, err := r.source.Exec(r.ctx, "UPDATE memo SET v = 'theirs' WHERE id = 1")
		return err == nil
	})
	r.eventually("the table is stopped", func() bool {
		return r.text(r.mirror, "SELECT coalesce(stopped_code, '') FROM waystage.synced_table WHERE table_name = 'memo'") != ""
	})
	r.foreign("UPDATE note SET n = 77 WHERE id = 1")
	id := r.merge(upd("public.note", "2", map[string]any{"body": "mine"}))[0]
	r.eventually("the other table goes on", func() bool { return r.verdict(id) == "applied" && r.diff("public.note") == "" })
}
