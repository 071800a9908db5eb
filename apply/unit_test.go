package apply_test

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/conflict"
)

// unit makes records one atomic unit of their session.
func unit(n int64, recs ...rec) []rec {
	for i := range recs {
		recs[i].unit = n
	}
	return recs
}

func (r *rig) wantVerdicts(ids []int64, want ...string) {
	r.t.Helper()
	if len(ids) != len(want) {
		r.t.Fatalf("%d changes, %d verdicts", len(ids), len(want))
	}
	for i, id := range ids {
		r.wantVerdict(id, want[i])
	}
}

func (r *rig) detail(id int64) string {
	return r.text(r.mirror, "SELECT coalesce(detail, '') FROM waystage.change WHERE id = $1", id)
}

// Rule R8: the source takes all records of an atomic unit or none, whatever stands against one of them.
func TestUnitIsAppliedWholeOrNotAtAll(t *testing.T) {
	r := newRig(t, `
		CREATE TABLE account (id int PRIMARY KEY, sum int CONSTRAINT not_below CHECK (sum >= 0), code text UNIQUE);
		CREATE TABLE entry (id int PRIMARY KEY, account int REFERENCES account, amount int, late int CONSTRAINT late_account REFERENCES account DEFERRABLE INITIALLY DEFERRED);
		CREATE TABLE other (id int PRIMARY KEY, v int);
		INSERT INTO account SELECT i, 100, 'c' || i FROM generate_series(1, 30) i;
		INSERT INTO other SELECT i, 0 FROM generate_series(1, 20) i;
		CREATE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF NEW.amount = 13 THEN RAISE EXCEPTION 'thirteen'; END IF; RETURN NEW; END $$;
		CREATE TRIGGER judge BEFORE INSERT OR UPDATE ON entry FOR EACH ROW EXECUTE FUNCTION judge();`,
		"public.account", "public.entry", "public.other")
	account, entry, other := "public.account", "public.entry", "public.other"
	sum := func(key string, v any) rec { return upd(account, key, map[string]any{"sum": v}) }
	one := func(key string) rec { return upd(other, key, map[string]any{"v": "1"}) }
	var ids [][]int64
	merge := func(recs ...rec) { ids = append(ids, r.merge(recs...)) }
	const tr = "refused transaction_rejected"
	var want [][]string
	expect := func(w ...string) { want = append(want, w) }

	merge(append(unit(1, sum("1", "50"), sum("2", "-50"), ins(entry, "1", map[string]any{"account": "1", "amount": "1"})), one("1"))...) // a constraint
	expect(tr, "refused source_constraint", tr, "applied")
	merge(append(unit(1, sum("3", "50"), ins(entry, "2", map[string]any{"account": "3", "amount": "13"})), unit(2, sum("4", "50"), sum("5", "150"))...)...) // a trigger, and another unit
	expect(tr, "refused source_trigger", "applied", "applied")
	merge(unit(1, sum("6", "50"), sum("7", "50"), del(other, "2"))...) // a foreign change of 7
	expect(tr, "refused source_conflict", tr)
	merge(unit(1, sum("8", "50"), ins(entry, "3", map[string]any{"account": "8", "late": "99"}), one("3"))...) // at commit
	expect(tr, "refused source_constraint", tr)
	merge(unit(1, sum("9", "50"), ins(account, "40", map[string]any{"sum": "1", "code": "c10"}), one("4"))...) // a unique value of several inserts
	expect(tr, "refused source_constraint", tr)
	merge(unit(1, ins(account, "41", map[string]any{"sum": "1"}), ins(account, "42", map[string]any{"sum": "1"}), ins(account, "43", map[string]any{"sum": "-1"}), one("5"))...)
	expect(tr, tr, "refused source_constraint", tr)
	merge(ins(entry, "4", map[string]any{"account": "41"})) // refers to what fell
	expect("refused dependency_rejected")
	merge(append(unit(1, sum("41", "7"), one("6")), one("7"))...) // on top of what fell
	expect("refused dependency_rejected", tr, "applied")
	merge(unit(1, ins(entry, "5", map[string]any{"account": "42"}), one("8"))...)
	expect("refused dependency_rejected", tr)
	merge(append(unit(-1, sum("11", "1"), one("9")), sum("12", "-1"))...) // an independent record of the session
	expect("applied", "applied", "refused source_constraint")
	merge(unit(1, del(account, "13"), one("10"))...) // there is nothing to delete any more
	expect("applied", "applied")
	r.foreign("UPDATE account SET sum = 77 WHERE id = 7", "DELETE FROM account WHERE id = 13")
	r.start(allWorkers...)
	r.settled()
	for i := range ids {
		r.wantVerdicts(ids[i], want[i]...)
	}
	if got := r.detail(ids[0][0]); got != "another change of the same transaction was refused: public.account (2): source_constraint: "+r.detail(ids[0][1]) {
		t.Errorf("detail: %s", got)
	}
	if got := r.text(r.mirror, "SELECT string_agg(DISTINCT unit::text, ' ') FROM waystage.change"); got != "-1 0 1 2" {
		t.Errorf("units: %s", got)
	}
	r.quiet()
}

// What a unit's own writes do to its other records, by triggers and cascades, is no conflict; and what its records need of
// each other does not hang on the order in which they were sent.
func TestUnitIsNoConflictWithItself(t *testing.T) {
	r := newRig(t, `
		CREATE TABLE total (id int PRIMARY KEY, sum int DEFAULT 0, note text);
		CREATE TABLE line (id int PRIMARY KEY, total int REFERENCES total ON DELETE CASCADE, amount int);
		CREATE TABLE node (id int PRIMARY KEY, parent int REFERENCES node, name text, color text);
		CREATE TABLE ring (id int PRIMARY KEY, next int NOT NULL REFERENCES ring, v int CHECK (v < 10));
		CREATE TABLE spot (id int PRIMARY KEY, code text UNIQUE, v int);
		INSERT INTO total SELECT i, 0, 'n' FROM generate_series(1, 5) i; INSERT INTO line SELECT i, i, 0 FROM generate_series(1, 5) i;
		INSERT INTO spot SELECT i, 'c' || i, 0 FROM generate_series(1, 5) i;
		CREATE FUNCTION summing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE public.total SET sum = sum + NEW.amount WHERE id = NEW.total; RETURN NULL; END $$;
		CREATE TRIGGER summing AFTER INSERT OR UPDATE ON line FOR EACH ROW EXECUTE FUNCTION summing();`,
		"public.total", "public.line", "public.node", "public.ring", "public.spot")
	total, line, node, ring, spot := "public.total", "public.line", "public.node", "public.ring", "public.spot"
	n := func(key string, parent, name any, color ...string) rec {
		img := map[string]any{"parent": parent, "name": name}
		for _, c := range color {
			img["color"] = c
		}
		return ins(node, key, img)
	}
	next := func(key, next, v string) rec { return ins(ring, key, map[string]any{"next": next, "v": v}) }
	ids := r.merge(unit(1, upd(line, "1", map[string]any{"amount": "5"}), upd(total, "1", map[string]any{"note": "mine"}), ins(line, "11", map[string]any{"total": "1", "amount": "2"}))...)
	ids = append(ids, r.merge(unit(1, del(total, "2"), del(line, "2"))...)...)
	ids = append(ids, r.merge(unit(1, n("1", "2", "leaf"), n("2", "3", "branch", "green"), n("3", nil, "root"))...)...) // children before parents, in other columns
	ids = append(ids, r.merge(unit(1, del(node, "3"), del(node, "2"), del(node, "1"))...)...)
	ids = append(ids, r.merge(unit(1, next("1", "2", "1"), next("2", "1", "1"))...)...)
	ids = append(ids, r.merge(del(spot, "1"), ins(spot, "9", map[string]any{"code": "c1"}), upd(spot, "2", map[string]any{"code": "x"}), ins(spot, "10", map[string]any{"code": "c2"}))...) // values that move
	bad := r.merge(next("3", "4", "1"), next("4", "3", "77"), upd(line, "3", map[string]any{"amount": "1"}), n("7", "8", "leaf"), n("8", nil, "root"))                                      // beside one that fails
	r.start(allWorkers...)
	r.settled()
	for _, id := range ids {
		r.wantVerdict(id, "applied")
	}
	r.wantVerdicts(bad, "refused dependency_rejected", "refused source_constraint", "applied", "applied", "applied")
	for sql, want := range map[string]string{
		"SELECT sum || note FROM total WHERE id = 1":               "7mine",
		"SELECT string_agg(id || code, ' ' ORDER BY id) FROM spot": "2x 3c3 4c4 5c5 9c1 10c2",
	} {
		if got := r.text(r.mirror, sql); got != want {
			t.Errorf("%s: %s, want %s", sql, got, want)
		}
	}
	// On their own, each after the other: the unit is alone in its transaction.
	ids = r.merge(unit(1, upd(total, "4", map[string]any{"note": "mine"}), upd(line, "4", map[string]any{"amount": "5"}))...)
	ids = append(ids, r.merge(unit(1, upd(total, "4", map[string]any{"note": "again"}), upd(line, "4", map[string]any{"amount": "6"}))...)...)
	r.settled()
	for _, id := range ids {
		r.wantVerdict(id, "applied")
	}
}

// A refused insert is remembered: over a restart, by any unique columns that a foreign key may use, and for a session
// that came later from a device which had not heard of it.
func TestRefusedInsertTakesItsChildrenAlong(t *testing.T) {
	r := newRig(t, `
		CREATE TABLE p (a int, b int, code text UNIQUE, v int CHECK (v < 10), PRIMARY KEY (a, b));
		CREATE TABLE c (id int PRIMARY KEY, b int, a int, code text REFERENCES p (code), FOREIGN KEY (b, a) REFERENCES p (b, a));
		CREATE TABLE tree (id int PRIMARY KEY, parent int REFERENCES tree, v int CHECK (v < 10));`, "public.p", "public.c", "public.tree")
	p := func(a, b, code, v string) rec {
		return rec{table: "public.p", op: conflict.Insert, key: []string{a, b}, img: map[string]any{"code": code, "v": v}}
	}
	c := func(key string, img map[string]any) rec { return ins("public.c", key, img) }
	tree := func(key string, parent any, v string) rec {
		return ins("public.tree", key, map[string]any{"parent": parent, "v": v})
	}
	ids := r.merge(p("1", "2", "x", "99"), p("1", "3", "y", "1"))
	ids = append(ids, r.merge(c("1", map[string]any{"b": "2", "a": "1"}), c("2", map[string]any{"code": "x"}), c("3", map[string]any{"b": "3", "a": "1", "code": "y"}), c("4", map[string]any{"b": "2", "a": nil}))...)
	ids = append(ids, r.merge(tree("3", "2", "1"), tree("2", "1", "1"), tree("1", nil, "99"), tree("5", nil, "1"), tree("4", "5", "1"))...)
	ids = append(ids, r.merge(upd("public.tree", "5", map[string]any{"parent": "1"}), upd("public.c", "4", map[string]any{"a": "1"}))...)
	r.start(allWorkers...)
	r.settled()
	dep := "refused dependency_rejected"
	r.wantVerdicts(ids, "refused source_constraint", "applied", dep, dep, "applied", "applied", dep, dep, "refused source_constraint", "applied", "applied", dep, dep)

	// Somebody else makes the row. Sessions of devices that had not heard of the refusal do not mean it.
	r.stop("up")
	r.foreign("INSERT INTO p VALUES (1, 2, 'x', 5)")
	r.settled()
	stamp := r.text(r.mirror, "SELECT stamp::text FROM waystage.change WHERE id = $1", ids[0])
	session := func(n int, told string) {
		r.exec(r.mirror, fmt.Sprintf(`INSERT INTO waystage.session (id, device_id, user_name, device_name, token, incarnation, n, hash, nonce, set_name, content_type, encoding, received_at, state, told)
			OVERRIDING SYSTEM VALUE VALUES (%d, (SELECT min(id) FROM waystage.device), 'u', 'd', 'i-%[1]d', 'i', %[1]d, '', '', 's', '', '', now(), 'closed', %[2]s)`, n, told))
	}
	r.exec(r.mirror, "INSERT INTO waystage.app_user (name, password_hash) VALUES ('u', '')", "INSERT INTO waystage.device (user_name, name) VALUES ('u', 'd')")
	at := int(r.session)
	session(at, fmt.Sprintf("'%s:%[1]s:'", stamp)) // a reply that did not see the refusal
	session(at+1, "pg_current_snapshot()")
	session(at+2, "NULL")
	late := r.merge(c("20", map[string]any{"code": "x"}))
	late = append(late, r.merge(c("21", map[string]any{"code": "x"}))...)
	r.start("up")
	r.settled()
	r.wantVerdicts(late, dep, "applied")
}

// A mirror transaction with units is not cut, however small the batches are, and a restart in between finds whole units.
func TestUnitsLargerThanBatches(t *testing.T) {
	r := newRig(t, `CREATE TABLE a (id int PRIMARY KEY, v int); CREATE TABLE b (id int PRIMARY KEY, v int CHECK (v < 1000)); INSERT INTO a SELECT i, 0 FROM generate_series(1, 300) i`, "public.a", "public.b")
	r.upCfg = func(c *apply.UpConfig) { c.BatchChanges = 7 }
	var recs []rec
	for u := range 30 { // table by table, as the ledger has them
		for k := range 3 {
			recs = append(recs, unit(int64(u+1), upd("public.a", fmt.Sprint(u*3+k+1), map[string]any{"v": "1"}))...)
		}
	}
	for u := range 30 {
		v := "1"
		if u%10 == 4 {
			v = "1000"
		}
		recs = append(recs, unit(int64(u+1), ins("public.b", fmt.Sprint(u), map[string]any{"v": v}))...)
	}
	r.start("capture down", "capture up", "down")
	before := r.merge(upd("public.a", "300", map[string]any{"v": "1"}))
	r.merge(recs...)
	after := r.merge(upd("public.a", "299", map[string]any{"v": "1"}))
	r.start("up")
	r.eventually("some are decided", func() bool {
		return r.text(r.mirror, "SELECT count(*)::text FROM waystage.change WHERE state <> 'merged'") != "0"
	})
	r.stop("up")
	r.start("up")
	r.settled()
	if got := r.text(r.mirror, "SELECT string_agg(concat_ws(' ', n, states), ', ' ORDER BY 1) FROM (SELECT count(*) AS n, states FROM (SELECT unit, string_agg(concat_ws(':', state, code), ' ' ORDER BY id) AS states FROM waystage.change WHERE unit > 0 GROUP BY unit) q GROUP BY states) q"); got !=
		"27 applied applied applied applied, 3 refused:transaction_rejected refused:transaction_rejected refused:transaction_rejected refused:source_constraint" {
		t.Errorf("units: %s", got)
	}
	r.wantVerdicts(append(before, after...), "applied", "applied")
}

// Random units on few rows with a check, a summing trigger, foreign keys and foreign writers: each unit has one fate, and mirror and source
// agree.
func TestUnitsRandomly(t *testing.T) {
	r := newRig(t, `
		CREATE TABLE p (id int PRIMARY KEY, v int CHECK (v < 8), n int DEFAULT 0); CREATE TABLE c (id int PRIMARY KEY, p int REFERENCES p ON DELETE CASCADE, v int CHECK (v < 8));
		INSERT INTO p SELECT i, 0 FROM generate_series(1, 4) i; INSERT INTO c SELECT i, i, 0 FROM generate_series(1, 4) i;
		CREATE FUNCTION bump() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE public.p SET n = n + 1 WHERE id = NEW.p; RETURN NULL; END $$;
		CREATE TRIGGER bump AFTER INSERT OR UPDATE ON c FOR EACH ROW EXECUTE FUNCTION bump();`, "public.p", "public.c")
	r.start(allWorkers...)
	rapid.Check(t, func(t *rapid.T) {
		for range rapid.IntRange(1, 4).Draw(t, "steps") {
			if rapid.IntRange(0, 3).Draw(t, "who") == 0 {
				id, v := rapid.IntRange(1, 6).Draw(t, "id"), rapid.IntRange(0, 7).Draw(t, "v")
				sql := rapid.SampledFrom([]string{"UPDATE p SET v = %[2]d WHERE id = %[1]d", "DELETE FROM c WHERE id = %[1]d AND %[2]d >= 0",
					"UPDATE c SET v = %[2]d WHERE id = %[1]d", "INSERT INTO p VALUES (%[1]d, %[2]d) ON CONFLICT DO NOTHING"}).Draw(t, "sql")
				_, err := r.source.Exec(r.ctx, fmt.Sprintf(sql, id, v))
				if err != nil {
					t.Fatal(err)
				}
				continue
			}
			var recs []rec
			for _, table := range []string{"public.p", "public.c"} {
				for key := 1; key <= 6; key++ {
					if rapid.IntRange(0, 2).Draw(t, "touch") > 0 {
						continue
					}
					there := r.text(r.mirror, "SELECT count(*)::text FROM "+table+" WHERE id = $1", key) == "1"
					img := map[string]any{"v": fmt.Sprint(rapid.IntRange(0, 8).Draw(t, "v"))}
					if table == "public.c" && rapid.Bool().Draw(t, "refer") {
						img["p"] = fmt.Sprint(rapid.IntRange(1, 6).Draw(t, "p"))
					}
					c := upd(table, fmt.Sprint(key), img)
					switch {
					case !there:
						c.op = conflict.Insert
					case rapid.IntRange(0, 3).Draw(t, "op") == 0:
						c.op, c.img = conflict.Delete, nil
					}
					c.unit = rapid.Int64Range(0, 2).Draw(t, "unit")
					recs = append(recs, c)
				}
			}
			if len(recs) > 0 {
				if _, err := r.tryMerge(r.mirror, recs...); err != nil && !strings.Contains(err.Error(), "test mistake") {
					t.Fatal(err)
				}
			}
		}
		r.settled()
		if got := r.text(r.mirror, "SELECT session_id || '.' || unit FROM (SELECT session_id, unit FROM waystage.change WHERE unit <> 0 GROUP BY 1, 2 HAVING count(DISTINCT state) > 1) q"); got != "" {
			t.Fatalf("units with two fates: %s", got)
		}
	})
}

// A device that cannot know what the source's default will be sends NULL; the value comes back to it as its own row's.
func TestSourceFillsInDefaults(t *testing.T) {
	r := newRig(t, `CREATE TABLE d (id int PRIMARY KEY, no serial, at timestamptz NOT NULL DEFAULT now(), u uuid NOT NULL DEFAULT gen_random_uuid(), ident int GENERATED BY DEFAULT AS IDENTITY,
		maybe int DEFAULT 7, must int NOT NULL, name text NOT NULL DEFAULT 'x')`, "public.d")
	none := map[string]any{"no": nil, "at": nil, "u": nil, "ident": nil, "maybe": nil, "must": "1", "name": "mine"}
	some := map[string]any{"no": "50", "at": "2020-01-01 00:00:00+00", "u": nil, "ident": "60", "maybe": "1", "must": "1", "name": nil}
	bad := map[string]any{"no": nil, "must": nil}
	ids := r.merge(ins("public.d", "1", none), ins("public.d", "2", some), ins("public.d", "3", bad))
	ids = append(ids, r.merge(upd("public.d", "1", map[string]any{"name": "again"}))...) // before the echo
	ids = append(ids, r.merge(upd("public.d", "2", map[string]any{"no": nil}))...)       // an update says what it says
	ids = append(ids, r.merge(unit(1, ins("public.d", "4", none), ins("public.d", "5", none))...)...)
	r.start(allWorkers...)
	r.settled()
	r.wantVerdicts(ids, "applied", "applied", "refused source_constraint", "applied", "refused source_constraint", "applied", "applied")
	for sql, want := range map[string]string{
		"SELECT concat_ws(' ', no IS NOT NULL, at > now() - interval '1 hour', length(u::text), ident IS NOT NULL, maybe IS NULL, name) FROM d WHERE id = 1": "t t 36 t t again",
		"SELECT concat_ws(' ', no, at, length(u::text), ident, maybe, name) FROM d WHERE id = 2":                                                             "50 2020-01-01 00:00:00+00 36 60 1 x",
		"SELECT string_agg(_ws_lw, ' ') FROM d": "dev dev dev dev", // its next edit, made on its own merge, is not stale
	} {
		if got := r.text(r.mirror, sql); got != want {
			t.Errorf("%s: %q, want %q", sql, got, want)
		}
	}
}

// A unit with a record of a table that is stopped waits whole; what is beside it goes on.
func TestUnitWaitsWholeForAStoppedTable(t *testing.T) {
	r, _ := newDDLRig(t)
	r.start(allWorkers...)
	r.exec(r.source, "ALTER TABLE a DROP COLUMN w")
	r.foreign("UPDATE a SET v = 'uno' WHERE id = 1")
	r.eventually("the table stops", func() bool { return r.stopCode("public.a") != "" })
	ids := r.merge(append(unit(1, setCol("public.b", "1", "v", "with a"), setCol("public.a", "2", "v", "x")), ins("public.b", "5", map[string]any{"v": "alone"}))...)
	later := r.merge(setCol("public.b", "1", "v", "on top"), setCol("public.b", "5", "v", "again"))
	r.eventually("what is beside it goes on", func() bool { return r.verdict(ids[2]) == "applied" && r.verdict(later[1]) == "applied" })
	r.wantVerdicts(append(ids[:2:2], later[0]), "merged", "merged", "merged")
	r.stop("up") // and once more from where they are parked
	r.start("up")
	last := r.merge(ins("public.b", "6", map[string]any{"v": "last"}))
	r.eventually("up goes on", func() bool { return r.verdict(last[0]) == "applied" })
	r.wantVerdicts(append(ids[:2:2], later[0]), "merged", "merged", "merged")
	if got := r.text(r.mirror, "SELECT string_agg(change_id::text, ' ' ORDER BY change_id) FROM waystage.parked"); got != fmt.Sprint(ids[0], " ", ids[1], " ", later[0]) {
		t.Errorf("parked: %s, want %d %d %d", got, ids[0], ids[1], later[0])
	}
}
