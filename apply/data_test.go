package apply_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/capture"
	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/conflict"
)

// Rule R5: values travel as text and arrive byte for byte, both ways.
func TestValuesArriveByteForByte(t *testing.T) {
	r := newRig(t, `
		CREATE TYPE mood AS ENUM ('sad', 'it''s ok'); CREATE TYPE pair AS (a int, b text); CREATE DOMAIN moods AS mood;
		CREATE TABLE v (id int PRIMARY KEY, b boolean, n numeric, n2 numeric(12,2), f4 real, f8 double precision, m money, t text, vc varchar(20), c char(6), q name,
			by bytea, d date, ts timestamp(3), tz timestamptz, tt timetz, iv interval, j json, jb jsonb, x xml, pt point, net inet, bt bit(5), ia int[], ta text[],
			e mood, ea mood[], pr pair, mo moods, ir int4range, gen int GENERATED ALWAYS AS (id * 2) STORED);
		CREATE TABLE k (b boolean, c char(4), i inet, n numeric, t text, v text, PRIMARY KEY (b, c, i, n, t));
		CREATE SCHEMA "odd ""schema";
		CREATE TABLE "odd ""schema"."a 'table' $1" ("the ""key""; --" text, "select" int, "a.b" text, "back\slash" text, PRIMARY KEY ("select", "the ""key""; --"))`,
		"public.v", "public.k", `odd "schema.a 'table' $1`)
	// The customer's settings must not leak into what is sent or compared.
	db := r.text(r.source, "SELECT quote_ident(current_database())")
	for _, set := range []string{"datestyle = 'SQL, DMY'", "intervalstyle = 'sql_standard'", "bytea_output = 'escape'", "timezone = 'Asia/Tokyo'", "extra_float_digits = 0"} {
		r.exec(r.source, "ALTER DATABASE "+db+" SET "+set)
	}
	rows := map[string]map[string]any{
		"1": {"b": "t", "n": "1.00", "n2": "5.10", "f4": "NaN", "f8": "-0", "m": "-$12.34", "t": "tab\tnl\n\\ ' \" \U0010FFFF", "vc": " pad ", "c": "ab", "q": "x",
			"by": `\x00ff5c`, "d": "infinity", "ts": "294276-12-31 23:59:59.999", "tz": "-infinity", "tt": "00:00:00+15:59", "iv": "1 mon -3 days +00:00:00.000001",
			"j": `{"a": 1,  "a": 2}`, "jb": `{"a": 1.00, "b": null}`, "x": "<a>&amp;</a>", "pt": "(1e300,-0)", "net": "10.0.0.1", "bt": "10101", "ia": "[0:1]={1,NULL}",
			"ta": `{"a,b","",NULL,"NULL"}`, "e": "it's ok", "ea": `{sad,"it's ok"}`, "pr": `(1,"x ""y"" \\ ,")`, "mo": "sad", "ir": "[1,5)"},
		"2": {"n": "NaN", "f8": "1e-320", "d": "4713-01-01 BC", "tz": "0044-03-15 12:00:00+00 BC", "iv": "00:00:00", "t": "", "by": `\x`, "j": "null", "jb": "null", "ta": "{}"},
		"3": {"n": "1.000", "f8": "Infinity", "d": "5874897-12-31", "tz": "2024-02-29 12:00:00.123456+00", "iv": "30 days", "t": `\N`, "c": "abcdef"},
	}
	var ids []int64
	for key, img := range rows {
		ids = append(ids, r.merge(ins("public.v", key, img))...)
	}
	odd := `odd "schema.a 'table' $1`
	ids = append(ids, r.merge(rec{table: odd, op: conflict.Insert, key: []string{"1", `k"e'y\ $1`}, img: map[string]any{"a.b": "x", `back\slash`: `\`}},
		rec{table: "public.k", op: conflict.Insert, key: []string{"true", "ab", "10.0.0.1/32", "1.0", ""}, img: map[string]any{"v": "1"}})...)
	r.start(allWorkers...)
	r.settled()
	// Every column of every row is compared byte for byte by these: nothing else must have come between.
	for key, img := range rows {
		one := map[string]any{}
		for c, v := range img {
			one[c] = v
		}
		one["t"] = "changed"
		ids = append(ids, r.merge(upd("public.v", key, one))...)
	}
	ids = append(ids, r.merge(rec{table: odd, op: conflict.Update, key: []string{"1", `k"e'y\ $1`}, img: map[string]any{"a.b": nil}},
		rec{table: "public.k", op: conflict.Update, key: []string{"t", "ab  ", "10.0.0.1", "1.0", ""}, img: map[string]any{"v": "2"}})...)
	r.settled()
	r.foreign(`UPDATE v SET n = '1.0000', iv = '1 day', f8 = '0', j = '{"a":1}'`, "INSERT INTO v SELECT 10 + id, NOT b, n, n2, f4, f8, m, t, vc, c, q, by, d, ts, tz, tt, iv, j, jb, x, pt, net, bt, ia, ta, e, ea, pr, mo, ir FROM v",
		`UPDATE "odd ""schema"."a 'table' $1" SET "a.b" = 'y', "select" = 2`, "UPDATE k SET v = '3', n = 1.00, c = 'abc'")
	r.settled()
	ids = append(ids, r.merge(rec{table: "public.k", op: conflict.Delete, key: []string{"t", "abc", "10.0.0.1", "1.00", ""}}, del("public.v", "11"), del("public.v", "1"))...)
	r.settled()
	for _, id := range ids {
		r.wantVerdict(id, "applied")
	}
	// A value that does not fit is an error at the source, not cut off there.
	id := r.merge(upd("public.v", "2", map[string]any{"c": "ab"}))[0]
	r.settled()
	r.wantVerdict(id, "applied")
	id = r.merge(upd("public.v", "2", map[string]any{"vc": strings.Repeat("x", 21)}))[0]
	r.settled()
	r.wantVerdict(id, "refused source_value")
}

// A transaction far larger than what is held in memory, foreign and from a device, cut into many parts.
func TestHazardTransactionInParts(t *testing.T) {
	const rows = 20000
	r := newRig(t, `CREATE TABLE big (id int PRIMARY KEY, a text, b int); CREATE TABLE other (id int PRIMARY KEY, v int)`, "public.big", "public.other")
	r.capCfg = func(c *capture.Config) { c.MessageBytes = 16 << 10 }
	r.downCfg = func(c *apply.DownConfig) { c.FlushRows, c.BatchRows, c.HoldBytes = 500, 500, 1<<20 }
	r.upCfg = func(c *apply.UpConfig) { c.BatchChanges = 200 }
	r.start(allWorkers...)
	r.foreign("INSERT INTO other VALUES (1, 1)")
	r.foreign(fmt.Sprintf("INSERT INTO big SELECT i, repeat('x', 200) || i, i FROM generate_series(1, %d) i", rows), "UPDATE big SET b = b + 1 WHERE id % 2 = 0", "DELETE FROM big WHERE id % 10 = 0",
		fmt.Sprintf("INSERT INTO big SELECT i, 'again', 0 FROM generate_series(10, %d, 100) i", rows))
	r.foreign("INSERT INTO other VALUES (2, 1)", "INSERT INTO big VALUES (0, repeat('one large row', 100000), 1)")
	var most uint64
	var m runtime.MemStats
	r.eventually("applied", func() bool {
		runtime.ReadMemStats(&m)
		most = max(most, m.HeapInuse)
		return r.text(r.mirror, "SELECT count(*)::text FROM other") == "2"
	})
	r.settled()
	if r.downQ.count() < 150 {
		t.Errorf("only %d messages: not cut", r.downQ.count())
	}
	if most > 256<<20 {
		t.Errorf("heap grew to %d MiB", most>>20)
	}
	var recs []rec
	for i := range 1500 {
		recs = append(recs, upd("public.big", fmt.Sprint(i*4+1), map[string]any{"a": "mine"}))
	}
	recs[700].img = map[string]any{"b": "-77"}
	r.foreign("ALTER TABLE big ADD CONSTRAINT no77 CHECK (b <> -77)")
	ids := r.merge(recs...)
	r.settled()
	if got := r.text(r.mirror, "SELECT string_agg(concat_ws(' ', state, code, n), ', ' ORDER BY 1) FROM (SELECT state, code, count(*) AS n FROM waystage.change GROUP BY 1, 2) q"); got != "applied 1499, refused source_constraint 1" {
		t.Errorf("verdicts: %s", got)
	}
	r.wantVerdict(ids[700], "refused source_constraint")
}

// The queue may lose, double, cut and reorder: capture makes it again, apply takes every transaction once.
func TestHazardQueueLosesAndDoubles(t *testing.T) {
	r := newRig(t, notes, "public.note")
	fault := func() func(*change.Message) int {
		n := 0 // a queue calls it under its lock
		return func(*change.Message) int {
			n++
			switch {
			case n%7 == 3:
				return 0
			case n%5 == 2:
				return 2
			}
			return 1
		}
	}
	r.downQ.onPut, r.upQ.onPut = fault(), fault()
	r.start(allWorkers...)
	var ids []int64
	for i := range 12 {
		r.foreign(fmt.Sprintf("UPDATE note SET n = n + 1 WHERE id = %d", i%5+1))
		ids = append(ids, r.merge(upd("public.note", fmt.Sprint(6+i%4), map[string]any{"body": fmt.Sprint("b", i)}))...)
		time.Sleep(20 * time.Millisecond)
	}
	r.downQ.set(func() { r.downQ.onPut = nil })
	r.upQ.set(func() { r.upQ.onPut = nil })
	r.settled()
	for _, id := range ids {
		r.wantVerdict(id, "applied")
	}
	// The whole store is wiped while messages wait: nothing later comes that could show the gap.
	r.stop("down", "up")
	r.foreign("UPDATE note SET n = 1000 WHERE id = 1")
	id := r.merge(upd("public.note", "9", map[string]any{"body": "after the wipe"}))[0]
	r.eventually("both are in the queue", func() bool { return len(r.downQ.all()) > 0 && len(r.upQ.all()) > 0 })
	r.downQ.set(func() { r.downQ.msgs = nil })
	r.upQ.set(func() { r.upQ.msgs = nil })
	r.start("down", "up")
	r.settled()
	r.wantVerdict(id, "applied")
	// A full queue is waited for.
	r.downQ.set(func() { r.downQ.refuse = true })
	for i := range 20 {
		r.foreign(fmt.Sprintf("UPDATE note SET n = %d WHERE id = 2", i))
	}
	time.Sleep(300 * time.Millisecond)
	r.downQ.set(func() { r.downQ.refuse = false })
	r.settled()
}

func (q *memQueue) all() []stored {
	q.mu.Lock()
	defer q.mu.Unlock()
	return append([]stored(nil), q.msgs...)
}
