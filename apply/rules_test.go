package apply_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/conflict"
)

func upd(table, key string, img map[string]any) rec {
	return rec{table: table, op: conflict.Update, key: []string{key}, img: img}
}

func ins(table, key string, img map[string]any) rec {
	return rec{table: table, op: conflict.Insert, key: []string{key}, img: img}
}

func del(table, key string) rec { return rec{table: table, op: conflict.Delete, key: []string{key}} }

func (r *rig) wantVerdict(id int64, want string) {
	r.t.Helper()
	if got := r.verdict(id); got != want {
		r.t.Errorf("change %d: %q, want %q (%s)", id, got, want, r.text(r.mirror, "SELECT coalesce(detail, '') FROM waystage.change WHERE id = $1", id))
	}
}

// Rule R4: what our own transactions do at the source besides what they carry is no conflict.
func TestHazardTriggers(t *testing.T) {
	r := newRig(t, `
		CREATE TABLE before (id int PRIMARY KEY, name text, updated int DEFAULT 0);
		CREATE TABLE after (id int PRIMARY KEY, name text, n int DEFAULT 0);
		CREATE TABLE total (id int PRIMARY KEY, sum int, note text);
		CREATE TABLE line (id int PRIMARY KEY, amount int);
		CREATE TABLE parent (id int PRIMARY KEY, name text);
		CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE, name text);
		INSERT INTO before VALUES (1, 'a'), (2, 'b'); INSERT INTO after VALUES (1, 'a'), (2, 'b');
		INSERT INTO total VALUES (1, 0, 'x'); INSERT INTO line VALUES (1, 0);
		INSERT INTO parent VALUES (1, 'p'), (2, 'q'); INSERT INTO child VALUES (1, 1, 'c'), (2, 1, 'd'), (3, 2, 'e');
		CREATE FUNCTION norm() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.name := upper(NEW.name); NEW.updated := NEW.updated + 1; RETURN NEW; END $$;
		CREATE TRIGGER t BEFORE INSERT OR UPDATE ON before FOR EACH ROW EXECUTE FUNCTION norm();
		-- unqualified, as customers write them: it works only with the customer's search path
		CREATE FUNCTION bump() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.n < 100 THEN UPDATE after SET n = 100 WHERE id = NEW.id; END IF; RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER t AFTER INSERT OR UPDATE ON after DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION bump();
		CREATE FUNCTION summing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE total SET sum = sum + NEW.amount; RETURN NULL; END $$;
		CREATE TRIGGER t AFTER INSERT OR UPDATE ON line FOR EACH ROW EXECUTE FUNCTION summing();`,
		"public.before", "public.after", "public.total", "public.line", "public.parent", "public.child")
	// Everything is merged before up begins, so it is all in the first batch.
	ids := r.merge(upd("public.before", "1", map[string]any{"name": "one"}))
	ids = append(ids, r.merge(upd("public.before", "1", map[string]any{"name": "two"}))...)
	ids = append(ids, r.merge(ins("public.before", "9", map[string]any{"name": "nine", "updated": "0"}))...)
	ids = append(ids, r.merge(upd("public.before", "9", map[string]any{"name": "ten"}))...)
	ids = append(ids, r.merge(upd("public.after", "1", map[string]any{"name": "one"}))...)
	ids = append(ids, r.merge(upd("public.after", "1", map[string]any{"name": "two"}))...)
	ids = append(ids, r.merge(upd("public.line", "1", map[string]any{"amount": "5"}), upd("public.total", "1", map[string]any{"note": "y"}))...)
	ids = append(ids, r.merge(upd("public.line", "1", map[string]any{"amount": "7"}))...)
	ids = append(ids, r.merge(del("public.parent", "1"))...)
	ids = append(ids, r.merge(del("public.child", "1"))...) // the cascade was there before
	ids = append(ids, r.merge(upd("public.child", "3", map[string]any{"name": "E"}), upd("public.parent", "2", map[string]any{"name": "Q"}))...)
	r.start(allWorkers...)
	r.settled()
	for _, id := range ids {
		r.wantVerdict(id, "applied")
	}
	for sql, want := range map[string]string{
		"SELECT name || updated FROM before WHERE id = 1":       "TWO2",
		"SELECT name || updated FROM before WHERE id = 9":       "TEN2",
		"SELECT name || n FROM after WHERE id = 1":              "two100",
		"SELECT sum || note FROM total":                         "12y",
		"SELECT string_agg(id || name, ' ') FROM public.child":  "3E",
		"SELECT string_agg(id || name, ' ') FROM public.parent": "2Q",
	} {
		if got := r.text(r.mirror, sql); got != want {
			t.Errorf("%s: mirror has %q, want %q", sql, got, want)
		}
	}
	// The device that wrote a row which a trigger rewrote is still its last writer (rule D3).
	if got := r.text(r.mirror, "SELECT _ws_lw || (_ws_mver < _ws_version) FROM before WHERE id = 1"); got != "devtrue" {
		t.Errorf("rewritten row: %s", got)
	}

	// The same one at a time, each after the other's echo, and quick: edits that overtake the echo.
	for i := range 5 {
		a := r.merge(upd("public.before", "2", map[string]any{"name": fmt.Sprint("v", i)}))
		b := r.merge(upd("public.before", "2", map[string]any{"name": fmt.Sprint("w", i)}), upd("public.after", "2", map[string]any{"name": fmt.Sprint("w", i)}))
		r.settled()
		for _, id := range append(a, b...) {
			r.wantVerdict(id, "applied")
		}
	}
	r.quiet()
}

// quiet checks that traffic stops (I12): nothing is published and no row gets a new version.
func (r *rig) quiet() {
	r.t.Helper()
	look := func() string {
		return fmt.Sprint(r.downQ.count(), r.upQ.count(), r.text(r.mirror, "SELECT string_agg(direction || seq, ' ' ORDER BY 1) FROM waystage.progress WHERE direction = 'down'"),
			r.text(r.source, "SELECT seq::text FROM waystage.progress"))
	}
	var last string
	since := time.Now()
	r.eventually("traffic stops", func() bool {
		if now := look(); now != last {
			last, since = now, time.Now()
		}
		return time.Since(since) > 1500*time.Millisecond
	})
}

func (q *memQueue) count() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.puts
}

// What the source refuses comes back with the database's own reason, alone, and the mirror row becomes base.
func TestHazardRefusalWithoutForeignChange(t *testing.T) {
	r := newRig(t, `
		CREATE TYPE mood AS ENUM ('sad', 'happy');
		CREATE DOMAIN percent AS int CONSTRAINT percent_range CHECK (VALUE BETWEEN 0 AND 100);
		CREATE TABLE ward (id int PRIMARY KEY, name text);
		CREATE TABLE patient (id int PRIMARY KEY, ward int CONSTRAINT patient_ward REFERENCES ward, name varchar(5) NOT NULL, code text CONSTRAINT patient_code UNIQUE,
			age int CONSTRAINT patient_age CHECK (age >= 0), mood mood, share percent, later int CONSTRAINT later_ward REFERENCES ward DEFERRABLE INITIALLY DEFERRED);
		CREATE TABLE locked (id int PRIMARY KEY, owner text, v int);
		CREATE TABLE silent (id int PRIMARY KEY, v int);
		CREATE TABLE always (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY, v int);
		INSERT INTO ward VALUES (1, 'one'); INSERT INTO silent VALUES (1, 1); INSERT INTO always (id, v) VALUES (1, 1);
		INSERT INTO patient SELECT i, 1, 'p' || i, 'c' || i, i, 'sad', 1, 1 FROM generate_series(1, 20) i;
		INSERT INTO locked VALUES (1, 'other', 1), (2, 'ours', 1), (4, 'other', 1);
		CREATE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF NEW.name = 'raise' THEN RAISE EXCEPTION 'no patient is called %', NEW.name USING HINT = 'choose another'; END IF;
			IF NEW.name = 'code' THEN RAISE EXCEPTION 'own code' USING ERRCODE = 'WS001'; END IF;
			IF NEW.name = 'bug' THEN PERFORM 1 FROM no_such_table; END IF;
			RETURN NEW; END $$;
		CREATE TRIGGER judge BEFORE INSERT OR UPDATE ON patient FOR EACH ROW EXECUTE FUNCTION judge();
		CREATE FUNCTION ignore() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
		CREATE TRIGGER ignore BEFORE INSERT OR UPDATE OR DELETE ON silent FOR EACH ROW EXECUTE FUNCTION ignore();
		ALTER TABLE locked ENABLE ROW LEVEL SECURITY;
		CREATE POLICY mine ON locked USING (owner = 'ours');`,
		"public.ward", "public.patient", "public.locked", "public.silent", "public.always")
	role := strings.ReplaceAll(r.text(r.source, "SELECT current_database()"), "-", "_") + "_up"
	r.exec(r.source, "CREATE ROLE "+role+" LOGIN PASSWORD 'x'", "GRANT USAGE ON SCHEMA public, waystage TO "+role,
		"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "+role, "GRANT SELECT, UPDATE ON waystage.progress TO "+role)
	t.Cleanup(func() {
		conn := r.connect(r.sourceDSN)
		r.stop(allWorkers...)
		r.exec(conn, "DROP OWNED BY "+role, "DROP ROLE "+role)
	})
	cfg, err := pgx.ParseConfig(r.sourceDSN)
	if err != nil {
		t.Fatal(err)
	}
	r.upCfg = func(c *apply.UpConfig) {
		c.Source = fmt.Sprintf("host=%s port=%d dbname=%s user=%s password=x", cfg.Host, cfg.Port, cfg.Database, role)
	}
	p := func(key string, img map[string]any) rec { return upd("public.patient", key, img) }
	cases := []struct {
		rec        rec
		want       string
		detail     string
		constraint string
	}{
		{p("1", map[string]any{"age": "-1"}), "refused source_constraint", "patient_age", "patient_age"},
		{p("2", map[string]any{"ward": "77"}), "refused source_constraint", "patient_ward", "patient_ward"},
		{p("3", map[string]any{"later": "77"}), "refused source_constraint", "later_ward", "later_ward"},
		{p("4", map[string]any{"code": "c5"}), "refused source_constraint", "patient_code", "patient_code"},
		{p("5", map[string]any{"name": nil}), "refused source_constraint", "null", ""},
		{p("6", map[string]any{"share": "101"}), "refused source_constraint", "percent_range", "percent_range"},
		{p("7", map[string]any{"mood": "angry"}), "refused source_value", "angry", ""},
		{p("8", map[string]any{"name": "raise"}), "refused source_trigger", "no patient is called raise", ""},
		{p("9", map[string]any{"name": "code"}), "refused source_trigger", "own code", ""},
		{p("10", map[string]any{"name": "bug"}), "refused source_trigger", "no_such_table", ""},
		{upd("public.locked", "1", map[string]any{"v": "2"}), "refused source_permission", "row security", ""},
		{upd("public.locked", "2", map[string]any{"owner": "other"}), "refused source_permission", "row-level security", ""},
		{ins("public.locked", "3", map[string]any{"owner": "other"}), "refused source_permission", "row-level security", ""},
		{del("public.locked", "4"), "refused source_permission", "row security", ""},
		{upd("public.silent", "1", map[string]any{"v": "2"}), "refused source_trigger", "ignores", ""},
		{ins("public.silent", "2", map[string]any{"v": "2"}), "refused source_trigger", "ignores", ""},
		{upd("public.always", "1", map[string]any{"n": "5"}), "refused source_value", "can only be updated to DEFAULT", ""},
		{ins("public.always", "2", map[string]any{"n": "50", "v": "1"}), "applied", "", ""},
		{p("11", map[string]any{"name": "good"}), "applied", "", ""},
		{p("12", map[string]any{"ward": nil}), "applied", "", ""},
		{ins("public.patient", "30", map[string]any{"name": "ins", "code": "c30"}), "applied", "", ""},
		{ins("public.patient", "31", map[string]any{"name": "ins", "code": "c30"}), "refused source_constraint", "patient_code", "patient_code"},
		{del("public.ward", "1"), "refused source_constraint", "still referenced", "patient_ward"},
	}
	var ids []int64
	for _, c := range cases {
		ids = append(ids, r.merge(c.rec)...)
	}
	before := r.text(r.mirror, "SELECT _ws_version::text FROM patient WHERE id = 1")
	r.start(allWorkers...)
	r.settled()
	for i, c := range cases {
		r.wantVerdict(ids[i], c.want)
		got := r.text(r.mirror, "SELECT concat_ws('|', detail, constraint_name) FROM waystage.change WHERE id = $1", ids[i])
		if !strings.Contains(got, c.detail) || (c.constraint != "" && !strings.HasSuffix(got, "|"+c.constraint)) {
			t.Errorf("case %d: %q, want %q of %q", i, got, c.detail, c.constraint)
		}
	}
	if after := r.text(r.mirror, "SELECT _ws_version::text FROM patient WHERE id = 1"); after == before {
		t.Error("a rolled back row kept its version")
	}
	if got := r.text(r.mirror, "SELECT count(*)::text FROM patient WHERE id = 1 AND _ws_lw IS NULL AND _ws_mver = 0"); got != "1" {
		t.Error("a rolled back row is not its former author's")
	}
}

// Rules R3 and R4: what somebody else did to the row meanwhile is never overwritten.
func TestHazardForeignChangeMeanwhile(t *testing.T) {
	r := newRig(t, notes+`; CREATE TABLE parent (id int PRIMARY KEY, v int); CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent, v int)`,
		"public.note", "public.parent", "public.child")
	var ids []int64
	merge := func(c ...rec) { ids = append(ids, r.merge(c...)...) }
	note := "public.note"
	merge(upd(note, "1", map[string]any{"body": "mine"}))
	merge(upd(note, "1", map[string]any{"n": "5"})) // on top of the first
	merge(upd(note, "2", map[string]any{"body": "mine"}))
	merge(del(note, "3"))
	merge(del(note, "4"))
	merge(ins(note, "50", map[string]any{"body": "mine"}))
	merge(upd(note, "50", map[string]any{"body": "mine again"}))
	merge(upd(note, "5", map[string]any{"body": "mine"}))
	merge(ins("public.parent", "1", map[string]any{"v": "1"}))
	merge(ins("public.child", "1", map[string]any{"parent": "1", "v": "1"}))
	merge(ins("public.child", "2", map[string]any{"parent": nil, "v": "1"}))
	merge(upd("public.child", "2", map[string]any{"parent": "1"}))
	merge(upd(note, "6", map[string]any{"body": "mine"}))
	r.foreign("UPDATE note SET body = 'theirs' WHERE id = 1")
	r.foreign("DELETE FROM note WHERE id = 2")
	r.foreign("UPDATE note SET n = 33 WHERE id = 3")
	r.foreign("DELETE FROM note WHERE id = 4")
	r.foreign("INSERT INTO note VALUES (50, 'theirs', 1)")
	r.foreign("UPDATE note SET id = 500 WHERE id = 5")
	r.foreign("INSERT INTO parent VALUES (1, 99)")
	r.foreign("UPDATE note SET body = 'there' WHERE id = 6", "UPDATE note SET body = 'note 6' WHERE id = 6") // there and back again for 6
	r.start(allWorkers...)
	r.settled()
	for i, want := range []string{"refused source_conflict", "refused source_conflict", "refused source_conflict", "refused source_conflict", "applied",
		"refused source_conflict", "refused source_conflict", "refused source_conflict", "refused source_conflict", "refused dependency_rejected", "applied", "refused dependency_rejected", "applied"} {
		r.wantVerdict(ids[i], want)
	}
	if got := r.text(r.mirror, "SELECT winner FROM waystage.change WHERE id = $1", ids[0]); got != "source" {
		t.Errorf("winner %q", got)
	}
	r.quiet()
}

// A chain of changes on a refused one falls with it.
func TestDependentsFall(t *testing.T) {
	r := newRig(t, `CREATE TABLE a (id int PRIMARY KEY, v int CHECK (v < 10), w int); INSERT INTO a VALUES (1, 1, 1), (2, 2, 2);
		CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a, v int)`, "public.a", "public.b")
	ids := r.merge(upd("public.a", "1", map[string]any{"v": "11"}))
	ids = append(ids, r.merge(upd("public.a", "1", map[string]any{"w": "5"}))...)
	ids = append(ids, r.merge(ins("public.a", "3", map[string]any{"v": "12"}))...)
	ids = append(ids, r.merge(ins("public.b", "1", map[string]any{"a": "3"}))...)
	ids = append(ids, r.merge(upd("public.b", "1", map[string]any{"v": "1"}))...)
	ids = append(ids, r.merge(upd("public.a", "3", map[string]any{"v": "1"}))...)
	ids = append(ids, r.merge(upd("public.a", "2", map[string]any{"v": "3"}))...)
	r.start(allWorkers...)
	r.settled()
	for i, want := range []string{"refused source_constraint", "refused dependency_rejected", "refused source_constraint", "refused dependency_rejected",
		"refused dependency_rejected", "refused dependency_rejected", "applied"} {
		r.wantVerdict(ids[i], want)
	}
	// The row is there again: what refers to it then is judged on its own. (Decided in one go with its row, it would be for the record of
	// what its device had been told, which changes of this rig have none of.)
	ids = r.merge(ins("public.a", "3", map[string]any{"v": "1"}))
	r.settled()
	ids = append(ids, r.merge(ins("public.b", "1", map[string]any{"a": "3"}))...)
	r.settled()
	r.wantVerdict(ids[0], "applied")
	r.wantVerdict(ids[1], "applied")
}

// When a set fails, records are tried one by one, in an order in which statements could have been written: the ledger has
// them table by table, parents' deletes before children's.
func TestOneByOneKeepsToForeignKeys(t *testing.T) {
	r := newRig(t, `CREATE TABLE p (id int PRIMARY KEY, v int CHECK (v < 10)); CREATE TABLE c (id int PRIMARY KEY, p int REFERENCES p, v int);
		INSERT INTO p SELECT i, i FROM generate_series(1, 5) i; INSERT INTO c SELECT i, i, i FROM generate_series(1, 5) i`, "public.p", "public.c")
	bad := r.merge(upd("public.p", "5", map[string]any{"v": "99"}))
	ids := r.merge(
		del("public.p", "1"), upd("public.p", "2", map[string]any{"v": "99"}), ins("public.p", "6", map[string]any{"v": "6"}),
		del("public.c", "1"), ins("public.c", "6", map[string]any{"p": "6"}), upd("public.c", "3", map[string]any{"p": "6"}),
	)
	// The other way round: children before their parents in the ledger.
	ids = append(ids, r.merge(ins("public.c", "7", map[string]any{"p": "7"}), del("public.c", "4"), ins("public.p", "7", map[string]any{"v": "7"}), del("public.p", "4"))...)
	r.start(allWorkers...)
	r.settled()
	r.wantVerdict(bad[0], "refused source_constraint")
	for i, id := range ids {
		if i == 1 {
			r.wantVerdict(id, "refused source_constraint")
			continue
		}
		r.wantVerdict(id, "applied")
	}
}

// Only a transaction that begins with the move of our own progress row is ours.
func TestHazardSpoofedMarker(t *testing.T) {
	r := newRig(t, notes, "public.note")
	id := r.merge(upd("public.note", "1", map[string]any{"body": "mine"}))[0]
	r.exec(r.source, "INSERT INTO waystage.progress (epoch, seq, position) VALUES ('another', 0, '0/0')")
	r.start("capture down", "down")
	carries := fmt.Sprintf("'%d'", id)
	r.foreign("UPDATE note SET body = 'theirs' WHERE id = 1", "UPDATE waystage.progress SET carries = "+carries)
	r.foreign("UPDATE waystage.progress SET seq = seq + 1, carries = "+carries+" WHERE epoch = 'another'", "UPDATE note SET n = 7 WHERE id = 1")
	r.foreign("UPDATE note SET n = 8 WHERE id = 2")
	r.eventually("down has it", func() bool { return r.text(r.mirror, "SELECT n::text FROM note WHERE id = 2") == "8" })
	r.wantVerdict(id, "merged")
	if got := r.text(r.mirror, "SELECT writer || (img->>'n') FROM waystage.base"); got != "foreign7" {
		t.Errorf("base: %s", got)
	}
	r.start("capture up", "up")
	r.settled()
	r.wantVerdict(id, "refused source_conflict")
}

// A change that falls with a refused insert it refers to waits for its predecessors on the same row: refused before them,
// it would leave their image behind.
func TestDependentWaitsForItsPredecessors(t *testing.T) {
	r := newRig(t, `CREATE TABLE p (id int PRIMARY KEY, v int CHECK (v < 10)); CREATE TABLE c (id int PRIMARY KEY, p int REFERENCES p, v int CHECK (v < 10))`, "public.p", "public.c")
	ids := r.merge(ins("public.p", "1", map[string]any{"v": "99"}))
	ids = append(ids, r.merge(ins("public.c", "1", map[string]any{"v": "99"}))...)
	ids = append(ids, r.merge(ins("public.c", "2", map[string]any{"v": "2"}))...)
	ids = append(ids, r.merge(upd("public.c", "1", map[string]any{"p": "1", "v": "3"}), upd("public.c", "2", map[string]any{"p": "1"}))...)
	ids = append(ids, r.merge(upd("public.c", "1", map[string]any{"p": nil, "v": "4"}), upd("public.c", "2", map[string]any{"v": "5"}))...)
	r.start(allWorkers...)
	r.settled()
	for i, want := range []string{"refused source_constraint", "refused source_constraint", "applied", "refused dependency_rejected", "refused dependency_rejected",
		"refused dependency_rejected", "refused dependency_rejected"} { // the last one was made on top of one that fell
		r.wantVerdict(ids[i], want)
	}
	if got := r.text(r.mirror, "SELECT string_agg(concat_ws(':', id, p, v), ' ') FROM c"); got != "2:2" {
		t.Errorf("mirror has %q", got)
	}
}
