package apply_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"pgregory.net/rapid"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/schema"
)

// The source of the random tests: a trigger that rewrites, one that writes another row, a cascade, a CHECK, a unique column;
// and an audit of who wrote what, from which the promises are checked afterwards.
const arena = `
	CREATE TABLE item (id text PRIMARY KEY, v text CHECK (v <> 'bad'), n int DEFAULT 0, u text UNIQUE);
	CREATE TABLE part (id text PRIMARY KEY, item text REFERENCES item ON DELETE CASCADE ON UPDATE CASCADE, v text);
	CREATE TABLE tally (id text PRIMARY KEY, v text, n int);
	INSERT INTO tally VALUES ('all', 'x', 0);
	CREATE TABLE audit (n bigserial, tbl text, key text, own boolean, depth int, op text, was text, is_now text);
	CREATE FUNCTION rewrite() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
		IF NEW.v = 'norm' THEN NEW.v := 'NORM'; END IF;
		RETURN NEW; END $$;
	CREATE TRIGGER a_rewrite BEFORE INSERT OR UPDATE ON item FOR EACH ROW EXECUTE FUNCTION rewrite();
	CREATE FUNCTION count_up() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
		IF NEW.v = 'count' THEN UPDATE tally SET n = n + 1 WHERE id = 'all'; END IF;
		RETURN NULL; END $$;
	CREATE TRIGGER b_count AFTER INSERT OR UPDATE ON part FOR EACH ROW EXECUTE FUNCTION count_up();
	CREATE FUNCTION write_audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
		IF TG_OP = 'UPDATE' AND OLD.id <> NEW.id THEN
			INSERT INTO audit (tbl, key, own, depth, op, was) VALUES (TG_TABLE_NAME, OLD.id, current_setting('application_name') = 'waystage apply up', pg_trigger_depth(), 'DELETE', OLD::text);
			INSERT INTO audit (tbl, key, own, depth, op, is_now) VALUES (TG_TABLE_NAME, NEW.id, current_setting('application_name') = 'waystage apply up', pg_trigger_depth(), 'INSERT', NEW::text);
			RETURN NULL;
		END IF;
		INSERT INTO audit (tbl, key, own, depth, op, was, is_now) VALUES (TG_TABLE_NAME, CASE WHEN TG_OP = 'DELETE' THEN OLD.id ELSE NEW.id END,
			current_setting('application_name') = 'waystage apply up', pg_trigger_depth(), TG_OP,
			CASE WHEN TG_OP <> 'INSERT' THEN OLD::text END, CASE WHEN TG_OP <> 'DELETE' THEN NEW::text END);
		RETURN NULL; END $$;
	CREATE TRIGGER z_audit AFTER INSERT OR UPDATE OR DELETE ON item FOR EACH ROW EXECUTE FUNCTION write_audit();
	CREATE TRIGGER z_audit AFTER INSERT OR UPDATE OR DELETE ON part FOR EACH ROW EXECUTE FUNCTION write_audit();
	CREATE TRIGGER z_audit AFTER INSERT OR UPDATE OR DELETE ON tally FOR EACH ROW EXECUTE FUNCTION write_audit();`

var arenaTables = []string{"public.item", "public.part", "public.tally"}

// chance draws numbers: rapid's, or plain random ones.
type chance func(n int) int

func pick[T any](c chance, of ...T) T { return of[c(len(of))] }

// anyForeign runs a random transaction of somebody else; what the source refuses is refused.
func (r *rig) anyForeign(conn *pgx.Conn, c chance) {
	var sqls []string
	for range 1 + c(3) {
		id, v := pick(c, "a", "b", "c", "d"), pick(c, "1", "2", "norm", "count", "bad")
		sqls = append(sqls, pick(c,
			fmt.Sprintf("INSERT INTO public.item VALUES ('%s', '%s', %d, '%s') ON CONFLICT DO NOTHING", id, v, c(3), pick(c, "u1", "u2", "u3")),
			fmt.Sprintf("UPDATE public.item SET v = '%s' WHERE id = '%s'", v, id),
			fmt.Sprintf("UPDATE public.item SET n = n + 1 WHERE id = '%s'", id),
			fmt.Sprintf("UPDATE public.item SET n = n WHERE id = '%s'", id),
			fmt.Sprintf("DELETE FROM public.item WHERE id = '%s'", id),
			fmt.Sprintf("UPDATE public.item SET id = '%s' WHERE id = '%s'", pick(c, "a", "b", "e"), id),
			fmt.Sprintf("INSERT INTO public.part VALUES ('%s', '%s', '%s') ON CONFLICT (id) DO UPDATE SET v = excluded.v", id, pick(c, "a", "b"), v),
			fmt.Sprintf("DELETE FROM public.part WHERE id = '%s'", id),
			"UPDATE public.tally SET v = v || 'f' WHERE length(v) < 9",
			"UPDATE public.tally SET v = 'x'",
			fmt.Sprintf("UPDATE public.item SET v = 'z%s' WHERE id = '%s'; UPDATE public.item SET v = '1' WHERE id = '%[2]s'", v, id),
		))
	}
	if c(40) == 0 {
		sqls = append(sqls, "TRUNCATE public.part")
	}
	_, err := conn.Exec(r.ctx, "BEGIN; "+strings.Join(sqls, "; ")+"; COMMIT")
	if err != nil {
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || (pgerr.Class(err) != pgerr.Refusal && pgerr.Class(err) != pgerr.Retryable) {
			r.t.Fatalf("foreign %q: %v", sqls, err)
		}
		r.exec(conn, "ROLLBACK")
	}
}

// anyDevice merges a random session of a device that has seen what the mirror has.
func (r *rig) anyDevice(conn *pgx.Conn, c chance, ids *[]int64) {
	var recs []rec
	used := map[string]bool{}
	for range 1 + c(3) {
		table := pick(c, arenaTables...)
		id := pick(c, "a", "b", "c", "d")
		if table == "public.tally" {
			id = "all"
		}
		if used[table+id] {
			continue
		}
		used[table+id] = true
		var there bool
		if err := conn.QueryRow(r.ctx, "SELECT EXISTS (SELECT 1 FROM "+table+" WHERE id = $1)", id).Scan(&there); err != nil {
			r.t.Fatal(err)
		}
		img := map[string]any{"v": pick(c, "1", "2", "norm", "count", "bad")}
		switch {
		case table == "public.part" && c(3) > 0:
			img["item"] = pick(c, "a", "b", "c", "d")
		case table == "public.item" && c(3) > 0:
			img["u"] = pick(c, "u1", "u2", "u3", "u4")
		case table == "public.tally":
			img["v"] = pick(c, "x", "y", "z")
		}
		k := rec{table: table, key: []string{id}, img: img, dev: pick(c, "dev1", "dev2")}
		switch {
		case !there && c(5) == 0:
			k.op, k.img = conflict.Delete, nil
		case !there:
			k.op = conflict.Insert
		case c(4) == 0 && table != "public.tally":
			k.op, k.img = conflict.Delete, nil
		default:
			k.op = conflict.Update
		}
		recs = append(recs, k)
	}
	got, err := r.tryMerge(conn, recs...)
	if err != nil {
		if strings.Contains(err.Error(), "merge refuses") { // down was between the look and the lock
			return
		}
		if pgerr.Class(err) != pgerr.Retryable {
			r.t.Fatal(err)
		}
		return
	}
	*ids = append(*ids, got...)
}

// check looks at the promises after everything has settled.
func (r *rig) check(ids []int64) {
	r.t.Helper()
	if len(ids) == 0 {
		return
	}
	// I1: every change has exactly one verdict.
	if got := r.text(r.mirror, "SELECT count(*)::text FROM waystage.change WHERE id = ANY($1) AND state IN ('applied', 'refused')", ids); got != fmt.Sprint(len(ids)) {
		r.t.Fatalf("%s of %d changes have a verdict", got, len(ids))
	}
	if got := r.text(r.mirror, "SELECT coalesce(string_agg(format('%s %s %s', id, code, detail), E'\n'), '') FROM waystage.change WHERE id = ANY($1) AND state = 'refused' AND (code IS NULL OR detail IS NULL OR decided_at IS NULL)", ids); got != "" {
		r.t.Fatalf("refused without a reason: %s", got)
	}
	// I2: applied exactly once. A delete of what was gone leaves no trace at the source; a cascade's deletes of parts look
	// as if we had written them ourselves.
	for _, tbl := range []string{"item", "part", "tally"} {
		count := func(conn *pgx.Conn, sql string, args ...any) (n int) {
			if err := conn.QueryRow(r.ctx, sql, args...).Scan(&n); err != nil {
				r.t.Fatal(err)
			}
			return n
		}
		const applied = "SELECT count(*) FROM waystage.change WHERE id = ANY($1) AND state = 'applied' AND tname = 'public.' || $2 AND (op = 'D') = $3"
		const written = "SELECT count(*) FROM audit WHERE own AND depth = 1 AND tbl = $1 AND (op = 'DELETE') = $2"
		if a, w := count(r.mirror, applied, ids, tbl, false), count(r.source, written, tbl, false); a != w {
			r.t.Fatalf("%s: %d inserts and updates applied, %d written at the source", tbl, a, w)
		}
		if a, w := count(r.mirror, applied, ids, tbl, true), count(r.source, written, tbl, true); w > a && tbl != "part" {
			r.t.Fatalf("%s: %d deletes applied, %d rows deleted at the source", tbl, a, w)
		}
	}
	// I3: what overwrote a foreign image was made on exactly that image.
	rows, err := r.source.Query(r.ctx, `SELECT tbl, key, was, op FROM (SELECT *, lag(own) OVER (PARTITION BY tbl, key ORDER BY n) AS before FROM audit) q
		WHERE own AND depth = 1 AND NOT before AND was IS NOT NULL AND NOT (tbl = 'part' AND op = 'DELETE')`)
	if err != nil {
		r.t.Fatal(err)
	}
	entries, err := pgx.CollectRows(rows, pgx.RowToStructByPos[struct{ Tbl, Key, Was, Op string }])
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range entries {
		tbl := r.tables["public."+e.Tbl]
		var fields []string
		for _, c := range tbl.Columns {
			fields = append(fields, fmt.Sprintf("(old->>'%s')::%s", c.Name, c.MirrorType))
		}
		n := r.text(r.mirror, "SELECT count(*)::text FROM waystage.change WHERE id = ANY($1) AND state = 'applied' AND tbl = $2 AND key = ARRAY[$3] AND old IS NOT NULL AND ROW("+strings.Join(fields, ", ")+")::text = $4",
			ids, tbl.ID, e.Key, e.Was)
		if n == "0" {
			r.t.Fatalf("%s of %s %s overwrote %s, which no applied change was made on", e.Op, e.Tbl, e.Key, e.Was)
		}
	}
}

func (r *rig) forget() {
	r.exec(r.source, "TRUNCATE audit")
}

// Random foreign transactions and random device changes, workers stopped and started between them: in the end both
// sides are equal, nothing is pending, and every change has one verdict.
func TestRandomChangesConverge(t *testing.T) {
	if f := flag.Lookup("rapid.checks"); f != nil && f.Value.String() == f.DefValue {
		if err := f.Value.Set("12"); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Value.Set(f.DefValue) }()
	}
	r := newRig(t, arena, arenaTables...)
	r.start(allWorkers...)
	rapid.Check(t, func(rt *rapid.T) {
		c := func(n int) int { return rapid.IntRange(0, n-1).Draw(rt, "n") }
		r.forget()
		var ids []int64
		for range 10 + c(30) {
			switch c(12) {
			case 0:
				w := pick(c, allWorkers...)
				r.stop(w)
				for range c(4) {
					r.anyForeign(r.source, c)
					r.anyDevice(r.mirror, c, &ids)
				}
				r.start(w)
			case 1, 2, 3, 4, 5:
				r.anyForeign(r.source, c)
			default:
				r.anyDevice(r.mirror, c, &ids)
			}
		}
		r.start(allWorkers...)
		r.settled()
		r.check(ids)
	})
}

// Workers are stopped, and their connections cut, at any moment under load.
func TestHazardKilledAtAnyMoment(t *testing.T) {
	r := newRig(t, arena, arenaTables...)
	r.start(allWorkers...)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	load := rand.New(rand.NewPCG(seed, 1))
	ctx, cancel := context.WithTimeout(r.ctx, 8*time.Second)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		rnd := rand.New(rand.NewPCG(seed, 2))
		src, mir := r.connect(r.sourceDSN), r.connect(r.mirrorDSN)
		for ctx.Err() == nil {
			time.Sleep(time.Duration(rnd.IntN(400)) * time.Millisecond)
			conn := pick(rnd.IntN, src, mir)
			app := pick(rnd.IntN, "waystage apply up", "waystage apply down", "waystage capture down", "waystage capture up", "waystage leader%")
			if _, err := conn.Exec(r.ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE $1 AND random() < 0.7", app); err != nil {
				t.Errorf("terminate: %v", err)
				return
			}
		}
	}()
	var ids []int64
	c := chance(load.IntN)
	for ctx.Err() == nil {
		switch c(20) {
		case 0:
			w := pick(c, allWorkers...)
			r.stop(w)
			r.start(w)
		case 1, 2, 3, 4, 5, 6, 7, 8:
			r.anyForeign(r.source, c)
		default:
			r.anyDevice(r.mirror, c, &ids)
		}
		time.Sleep(time.Duration(c(10)) * time.Millisecond)
	}
	<-done
	r.settled()
	r.check(ids)
	t.Logf("%d changes", len(ids))
}

// An up worker that was overtaken without noticing writes nothing any more.
func TestHazardZombie(t *testing.T) {
	r := newRig(t, notes, "public.note")
	core, logs := observer.New(zap.WarnLevel)
	r.log = zap.New(zapcore.NewTee(r.log.Core(), core))
	begin := make(chan struct{}, 1) // a session of down begins while there is something in it
	begin <- struct{}{}
	r.downCfg = func(c *apply.DownConfig) {
		load := c.Tables
		c.Tables = func(ctx context.Context) ([]*schema.Table, error) {
			select {
			case <-begin:
				begin <- struct{}{}
				return load(ctx)
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
	r.start(allWorkers...)
	first := r.merge(upd("public.note", "1", map[string]any{"body": "one"}))[0]
	r.settled()
	r.wantVerdict(first, "applied")
	// Somebody else takes the chain over while our worker is at rest: its next transaction must not go through.
	r.exec(r.source, "UPDATE waystage.progress SET seq = seq + 1, carries = '', worker = 'successor'")
	id := r.merge(upd("public.note", "2", map[string]any{"body": "two"}))[0]
	r.settled()
	r.wantVerdict(id, "applied")
	if up := r.workers["up"].obj.(*apply.Up); up.Stats().State != "applying" {
		t.Errorf("up is %s", up.Stats().State)
	}
	if got := r.text(r.source, "SELECT count(*)::text FROM waystage.progress WHERE worker = 'successor'"); got != "0" {
		t.Error("the worker did not take the chain back by a new session")
	}

	// A successor has carried a change that is still in our worker's hands, and the row is again what it was before: the row alone
	// does not tell our worker that its time is over.
	r.upQ.set(func() { r.upQ.hold = true })
	id = r.merge(upd("public.note", "3", map[string]any{"body": "three"}))[0]
	was := r.text(r.source, "SELECT body FROM note WHERE id = 3")
	successor := r.connect(r.sourceDSN)
	r.exec(successor, "BEGIN", fmt.Sprintf("UPDATE waystage.progress SET seq = seq + 1, carries = '%d', worker = 'successor'", id),
		"UPDATE public.note SET body = 'three' WHERE id = 3", "UPDATE public.note SET body = '"+was+"' WHERE id = 3")
	r.upQ.set(func() { r.upQ.hold = false })
	r.eventually("our worker waits for the chain", func() bool {
		return r.text(r.source, "SELECT count(*)::text FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'") != "0"
	})
	r.exec(successor, "COMMIT")
	r.settled()
	r.wantVerdict(id, "applied")
	if got := r.text(r.source, "SELECT body FROM note WHERE id = 3"); got != was {
		t.Errorf("a fenced up wrote %q over %q", got, was)
	}

	// The same for down: its position is moved by another one, which it notices before it writes.
	r.downQ.set(func() { r.downQ.hold = true })
	r.foreign("UPDATE note SET n = 5 WHERE id = 3")
	<-begin // its next session, which may write, waits
	at := r.text(r.mirror, "SELECT position::text FROM waystage.progress WHERE direction = 'down'")
	r.exec(r.mirror, "UPDATE waystage.progress SET position = position - 8 WHERE direction = 'down'")
	r.downQ.set(func() { r.downQ.hold = false })
	r.eventually("down notices", func() bool {
		return slices.ContainsFunc(logs.All(), func(e observer.LoggedEntry) bool {
			f := e.ContextMap()
			return f["direction"] == "down" && strings.Contains(fmt.Sprint(f["error"]), "moved the chain")
		})
	})
	if got := r.text(r.mirror, "SELECT n::text FROM note WHERE id = 3"); got != "3" {
		t.Errorf("a fenced down wrote %s", got)
	}
	r.exec(r.mirror, "UPDATE waystage.progress SET position = '"+at+"' WHERE direction = 'down'")
	begin <- struct{}{}
	r.settled()
}

// Two whole sets of workers: standbys take over when the leaders go.
func TestStandbyTakesOver(t *testing.T) {
	r := newRig(t, notes, "public.note")
	for _, name := range slices.Clone(allWorkers) {
		r.define("second "+name, r.workers[name].make)
	}
	all := append(slices.Clone(allWorkers), "second capture down", "second capture up", "second down", "second up")
	t.Cleanup(func() { r.stop(all...) })
	r.start(all...)
	r.foreign("UPDATE note SET n = 7 WHERE id = 1")
	id := r.merge(upd("public.note", "2", map[string]any{"body": "x"}))[0]
	r.settled()
	r.wantVerdict(id, "applied")
	r.stop(allWorkers...)
	r.foreign("UPDATE note SET n = 8 WHERE id = 1")
	id = r.merge(upd("public.note", "2", map[string]any{"body": "y"}))[0]
	r.settled()
	r.wantVerdict(id, "applied")
}
