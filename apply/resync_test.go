package apply_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/schema"
)

func definitions(t *testing.T, tables ...string) *schema.Definitions {
	t.Helper()
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
	return defs
}

// takeOver is `waystage schema apply`, with the tables of these definitions.
func (r *rig) takeOver(resync []string, tables ...string) map[string]schema.Applied {
	r.t.Helper()
	done, err := schema.Apply(r.ctx, schema.ApplyOptions{Resync: resync, SetupOptions: schema.SetupOptions{SourceDSN: r.sourceDSN, MirrorDSN: r.mirrorDSN,
		Definitions: definitions(r.t, tables...), Workers: 1, Log: r.log}})
	if err != nil {
		r.t.Fatal(err)
	}
	r.reload()
	out := map[string]schema.Applied{}
	for _, a := range done {
		out[a.Table] = a
	}
	return out
}

func (r *rig) reload() {
	r.t.Helper()
	tables, err := schema.LoadTables(r.ctx, r.mirror)
	if err != nil {
		r.t.Fatal(err)
	}
	clear(r.tables)
	for _, t := range tables {
		r.tables[t.FullName()] = t
	}
}

var ddlNames = []string{"public.a", "public.b", "public.kid"}

// After each change `schema apply` brings the table back, with the workers running: rows and pending records as they should be, no row
// touched that is equal, the other tables not at all.
func TestHazardDDLApply(t *testing.T) {
	for name, c := range map[string]struct {
		ddl, then string
		names     []string // tables of the definitions afterwards; nil: as before
		late      rec      // a record made before the change, held until after it
		verdict   string   // what becomes of it; empty: applied
		untouched string   // row of a whose version must not move
	}{
		"add column":                 {"ALTER TABLE a ADD COLUMN x int NOT NULL DEFAULT 7", "UPDATE a SET x = 8 WHERE id = 2", nil, setCol("public.a", "1", "v", "late"), "", ""},
		"add column, volatile":       {"ALTER TABLE a ADD COLUMN x float NOT NULL DEFAULT random()", "", nil, setCol("public.a", "1", "v", "late"), "", ""},
		"add column, null":           {"ALTER TABLE a ADD COLUMN x int", "UPDATE a SET x = 8 WHERE id = 2", nil, setCol("public.a", "1", "v", "late"), "", "3"},
		"drop column":                {"ALTER TABLE a DROP COLUMN w", "UPDATE a SET v = 'foreign' WHERE id = 2", nil, rec{table: "public.a", op: conflict.Update, key: []string{"1"}, img: map[string]any{"v": "late", "w": "5"}}, "", "3"},
		"drop the edited column":     {"ALTER TABLE a DROP COLUMN w", "UPDATE a SET v = 'foreign' WHERE id = 2", nil, setCol("public.a", "1", "w", "5"), "refused schema_changed", "3"},
		"rename column":              {"ALTER TABLE a RENAME w TO width", "UPDATE a SET width = 21 WHERE id = 2", nil, setCol("public.a", "1", "w", "5"), "", "3"},
		"retype column":              {"ALTER TABLE a ALTER w TYPE numeric(12,2)", "UPDATE a SET w = 2.5 WHERE id = 2", nil, setCol("public.a", "1", "w", "5"), "", ""},
		"retype to another kind":     {"ALTER TABLE a ALTER w TYPE date USING '2024-01-01'::date + w", "UPDATE a SET v = 'foreign' WHERE id = 2", nil, setCol("public.a", "1", "v", "late"), "refused source_value", ""},
		"other primary key":          {"ALTER TABLE kid DROP CONSTRAINT kid_a_id_fkey; ALTER TABLE a DROP CONSTRAINT a_pkey, ADD PRIMARY KEY (id, u)", "INSERT INTO a (id, u) VALUES (2, 1)", nil, setCol("public.a", "1", "v", "late"), "refused schema_changed", ""},
		"replica identity nothing":   {"ALTER TABLE a REPLICA IDENTITY NOTHING; INSERT INTO a VALUES (7); ALTER TABLE a REPLICA IDENTITY DEFAULT", "UPDATE a SET w = 1 WHERE id = 7", nil, setCol("public.a", "1", "v", "late"), "", "3"},
		"a foreign change meanwhile": {"ALTER TABLE a DROP COLUMN w", "UPDATE a SET v = 'foreign' WHERE id = 1", nil, setCol("public.a", "1", "v", "late"), "refused source_conflict", "3"},
		"deleted and inserted":       {"ALTER TABLE a DROP COLUMN w; DELETE FROM kid", "DELETE FROM a WHERE id = 2; INSERT INTO a (id, v) VALUES (12, 'new')", nil, setCol("public.a", "1", "v", "late"), "", "3"},
		"truncated":                  {"ALTER TABLE a DROP COLUMN w; TRUNCATE a CASCADE", "INSERT INTO a (id, v) VALUES (12, 'new')", nil, setCol("public.a", "1", "v", "late"), "refused source_conflict", ""},
		"drop and make again": {"DROP TABLE a CASCADE; CREATE TABLE a (id int PRIMARY KEY, v text, w int, m mood, d short, u int NOT NULL DEFAULT 0); INSERT INTO a VALUES (1, 'before', 10), (3, 'three', 30)",
			"", nil, setCol("public.a", "1", "v", "late"), "", "3"},
		"rename table": {"ALTER TABLE a RENAME TO a2", "UPDATE a2 SET v = 'foreign' WHERE id = 2", []string{"public.a2", "public.b", "public.kid"}, setCol("public.a", "1", "v", "late"), "refused schema_changed", ""},
		"drop table":   {"DROP TABLE a CASCADE", "", []string{"public.b", "public.kid"}, setCol("public.a", "1", "v", "late"), "refused schema_changed", ""},
		"add table":    {"CREATE TABLE extra (id int PRIMARY KEY, v text); INSERT INTO extra SELECT g, 'x' || g FROM generate_series(1, 500) g", "INSERT INTO extra VALUES (0, 'late')", append([]string{"public.extra"}, ddlNames...), setCol("public.a", "1", "v", "late"), "", "3"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, _ := newDDLRig(t)
			r.start(allWorkers...)
			r.foreign("INSERT INTO a VALUES (3, 'three', 30)")
			r.merge(setCol("public.a", "1", "v", "before"))
			r.settled()
			versions := func(table, id string) string {
				return r.text(r.mirror, "SELECT id || ' ' || _ws_version FROM "+table+" WHERE $1 IN ('', id::text) ORDER BY id", id)
			}
			before, beforeA := versions("b", ""), ""
			if c.untouched != "" {
				beforeA = versions("a", c.untouched)
			}
			r.stop("up")
			late := r.merge(c.late)
			r.exec(r.source, c.ddl)
			if c.then != "" {
				r.foreign(c.then)
			}
			if name == "replica identity nothing" { // it is over again: only the stream shows it
				r.eventually("the table stops", func() bool { return r.stopCode("public.a") == "replica_identity" })
			}
			r.start("up")
			names := c.names
			if names == nil {
				names = ddlNames
			}
			done := r.takeOver(nil, names...)
			r.settled()
			want := c.verdict
			if want == "" {
				want = "applied"
			}
			if got := r.verdict(late[0]); got != want {
				t.Errorf("the late record: %s, want %s; %s", got, want, r.text(r.mirror, "SELECT coalesce(detail, '') FROM waystage.change WHERE id = $1", late[0]))
			}
			if after := versions("b", ""); after != before {
				t.Errorf("rows of another table were touched:\n%s\nbefore:\n%s", after, before)
			}
			if c.untouched != "" {
				if after := versions("a", c.untouched); after != beforeA {
					t.Errorf("an equal row was touched: %s, before: %s", after, beforeA)
				}
			}
			for _, table := range names {
				if code := r.stopCode(table); code != "" {
					t.Errorf("%s is still stopped: %s", table, code)
				}
			}
			if left := r.text(r.mirror, "SELECT (SELECT count(*) FROM waystage.parked p JOIN waystage.change c ON c.id = p.change_id AND c.state = 'merged') + (SELECT count(*) FROM waystage.deferred) || ' ' || (SELECT count(*) FROM pg_class WHERE relname LIKE '~copy%')"); left != "0 0" {
				t.Errorf("left over: %s", left)
			}
			// And everything flows again, both ways.
			table := strings.Replace(names[0], "public.extra", "public.a", 1)
			r.foreign("INSERT INTO b VALUES (9, 'down')")
			if table == "public.a" && name != "other primary key" {
				r.foreign("UPDATE a SET v = 'down again' WHERE id = 3")
				r.settled()
				id := r.merge(rec{table: table, op: conflict.Insert, key: []string{"50"}, img: map[string]any{"v": "up again", "u": "1"}})
				r.settled()
				r.wantVerdict(id[0], "applied")
			}
			r.settled()
			if again := r.takeOver(nil, names...); len(again) > 0 {
				t.Errorf("a second time there is something to do: %+v (the first time %+v)", again, done)
			}
		})
	}
}

// What is over again when `schema apply` looks leaves it nothing to do. When the stream shows it, the table stops after all: its
// records wait, and the next one takes them on.
func TestHazardDDLApplyComesBeforeTheStop(t *testing.T) {
	r, logs := newDDLRig(t)
	r.start(allWorkers...)
	r.settled()
	r.stop("down", "up")
	late := r.merge(setCol("public.a", "1", "v", "late"))
	r.exec(r.source, "ALTER TABLE a REPLICA IDENTITY NOTHING; INSERT INTO a VALUES (7); ALTER TABLE a REPLICA IDENTITY DEFAULT")
	if done := r.takeOver(nil, ddlNames...); len(done) > 0 {
		t.Errorf("there is something to do: %+v", done)
	}
	r.start("down")
	r.eventually("the table stops", func() bool { return r.stopCode("public.a") == "replica_identity" })
	r.start("up")
	r.eventually("the record waits", func() bool {
		return r.text(r.mirror, "SELECT count(*)::text FROM waystage.parked WHERE change_id = $1", late[0]) == "1"
	})
	r.wantVerdict(late[0], "merged")
	if n := logs.FilterMessageSnippet("a table is stopped").Len(); n != 1 {
		t.Errorf("the log names the stop %d times: %v", n, logs.All())
	}
	if done := r.takeOver(nil, ddlNames...); done["public.a"].Action != schema.ActResync {
		t.Errorf("%+v", done)
	}
	r.settled()
	r.wantVerdict(late[0], "applied")
}

// Killed at any moment and started again, with writers on both sides all the time, the result is the same.
func TestHazardDDLApplyIsKilled(t *testing.T) {
	r, _ := newDDLRig(t)
	r.foreign("INSERT INTO a SELECT g, 'v' || g, g FROM generate_series(100, 3000) g")
	r.start(allWorkers...)
	r.settled()
	r.exec(r.source, "ALTER TABLE a RENAME w TO width; ALTER TABLE a ADD COLUMN x float DEFAULT random(); ALTER TABLE a ALTER d TYPE text")
	ctx, stop := context.WithCancel(r.ctx)
	writing := make(chan error, 1)
	go func() {
		conn, err := schema.Connect(ctx, r.sourceDSN, "test")
		for n := 0; err == nil && ctx.Err() == nil; n++ {
			_, err = conn.Exec(ctx, fmt.Sprintf(`UPDATE public.a SET width = width + 1, v = 'w%[1]d' WHERE id %% 97 = %[1]d %% 97;
				DELETE FROM public.a WHERE id = %[1]d + 150; INSERT INTO public.a (id, v) VALUES (%[1]d + 10000, 'new') ON CONFLICT DO NOTHING; UPDATE public.b SET v = 'b%[1]d'`, n))
			time.Sleep(5 * time.Millisecond)
		}
		if ctx.Err() != nil {
			err = nil
		}
		writing <- err
	}()
	for n := range 8 {
		r.reload() // a killed one may have got to its end
		r.merge(setCol("public.a", fmt.Sprint(2000+n), "v", fmt.Sprint("device ", n)))
		killed, cancel := context.WithTimeout(r.ctx, time.Duration(20+60*n)*time.Millisecond)
		_, err := schema.Apply(killed, schema.ApplyOptions{Resync: []string{"public.a"}, SetupOptions: schema.SetupOptions{SourceDSN: r.sourceDSN, MirrorDSN: r.mirrorDSN,
			Definitions: definitions(t, ddlNames...), Workers: 1, Log: r.log}})
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) && killed.Err() == nil {
			t.Fatal(err)
		}
	}
	r.takeOver([]string{"public.a"}, ddlNames...)
	stop()
	if err := <-writing; err != nil {
		t.Fatal(err)
	}
	r.settled()
	if code := r.stopCode("public.a"); code != "" {
		t.Fatalf("still stopped: %s", code)
	}
}

// A mirror that lacks what it should have is mended by a comparison, without a new epoch.
func TestHazardDDLResyncMendsAMirror(t *testing.T) {
	r, _ := newDDLRig(t)
	r.start(allWorkers...)
	r.foreign("INSERT INTO a SELECT g, 'v' || g, g FROM generate_series(100, 200) g")
	r.settled()
	r.exec(r.mirror, "DELETE FROM a WHERE id = 150", "UPDATE a SET v = 'wrong', _ws_version = 1 WHERE id = 151", "INSERT INTO a (id, v) VALUES (999, 'nobody''s')")
	done := r.takeOver([]string{"public.a"}, ddlNames...)
	if a := done["public.a"]; a.Compared != 103 || a.Written != 2 || a.Removed != 1 {
		t.Errorf("%+v", a)
	}
	r.settled()
	if n := r.text(r.mirror, "SELECT count(*)::text FROM waystage.tombstone WHERE key = '{999}'"); n != "1" {
		t.Errorf("%s tombstones for the row that the source does not have", n)
	}
}
