package apply_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/conflict"
)

// Somebody writes at the source after a device's change was merged and before up has it there: the record's policy decides.
func TestPolicyAtTheSource(t *testing.T) {
	r := newRig(t, `
		CREATE TABLE job (id int PRIMARY KEY, fitter text, state text, note text, hours numeric(6,2));
		INSERT INTO job SELECT i, 'al', 'open', 'old', 1 FROM generate_series(1, 40) i;`, "public.job")
	r.exec(r.mirror, `CREATE SCHEMA care`, `GRANT USAGE ON SCHEMA care TO waystage_decider`)
	for name, body := range map[string]string{
		"mine":   `RETURN mine`,
		"theirs": `RETURN theirs`,
		"both":   `RETURN theirs || jsonb_build_object('note', (theirs->>'note') || '+' || (mine->>'note') || '+' || (info->>'at'))`,
		"raises": `RAISE EXCEPTION 'not this one'`,
		"hangs":  `PERFORM pg_sleep(600); RETURN mine`,
		"silent": `RETURN NULL`,
	} {
		r.exec(r.mirror, fmt.Sprintf(`CREATE FUNCTION care.%s(base jsonb, theirs jsonb, mine jsonb, info jsonb) RETURNS jsonb LANGUAGE plpgsql STABLE AS $f$ BEGIN %s; END $f$`, name, body))
	}
	const update, remove, insert, move = `UPDATE job SET note = 'office' WHERE id = %d`, `DELETE FROM job WHERE id = %d`,
		`INSERT INTO job VALUES (%d, 'al', 'open', 'office', 2)`, `UPDATE job SET fitter = 'bo' WHERE id = %d`
	function := func(name string) string { return `{"policy": "function", "function": "care.` + name + `"}` }
	const columns, last, source, own = `{"policy": "columns"}`, `{"policy": "last-writer"}`, `{"policy": "source"}`, `{"policy": "last-writer", "key": "fitter"}`
	const lost = "refused source_conflict"
	type test struct {
		policy  string
		op      conflict.Op
		img     map[string]any
		foreign string
		verdict string
		row     string // state note; empty: none
	}
	state, note := map[string]any{"state": "done"}, map[string]any{"note": "mine"}
	all := map[string]any{"fitter": "al", "state": "new", "note": "mine", "hours": "3"}
	tests := []test{
		{"", conflict.Update, state, update, lost, "open office"},
		{columns, conflict.Update, state, update, "applied", "done office"},
		{columns, conflict.Update, note, update, lost, "open office"},
		{columns, conflict.Update, map[string]any{"state": "done", "note": "office"}, update, "applied", "done office"}, // both to the same
		{columns, conflict.Update, state, remove, lost, ""},
		{columns, conflict.Delete, nil, update, lost, "open office"},
		{last, conflict.Update, note, update, "applied", "open mine"},
		{last, conflict.Delete, nil, update, "applied", ""},
		{last, conflict.Update, note, remove, lost, ""},
		{own, conflict.Update, note, move, lost, "open old"},
		{own, conflict.Update, note, update, "applied", "open mine"},
		{source, conflict.Update, state, update, "refused source_wins", "open office"},
		{function("mine"), conflict.Update, note, update, "applied", "open mine"},
		{function("theirs"), conflict.Update, note, update, "refused source_wins", "open office"},
		{function("both"), conflict.Update, note, update, "applied", "open office+mine+source"},
		{function("raises"), conflict.Update, note, update, "refused function_refused", "open office"},
		{function("hangs"), conflict.Update, note, update, "refused function_failed", "open office"},
		{function("nosuch"), conflict.Update, note, update, "refused function_failed", "open office"},
		{function("silent"), conflict.Update, note, update, lost, "open office"},
		{function("mine"), conflict.Update, note, remove, "applied", "open mine"},
		{function("mine"), conflict.Delete, nil, update, "applied", ""},
		{columns, conflict.Insert, all, insert, lost, "open office"},
		{last, conflict.Insert, all, insert, "applied", "new mine"},
	}
	ids := make([]int64, len(tests))
	for i, c := range tests {
		key := i + 1
		if c.op == conflict.Insert {
			key += 100
		}
		ids[i] = r.merge(rec{table: "public.job", op: c.op, key: []string{fmt.Sprint(key)}, img: c.img, policy: c.policy})[0]
		r.foreign(fmt.Sprintf(c.foreign, key))
	}
	r.start(allWorkers...)
	r.settled()
	for i, c := range tests {
		key := i + 1
		if c.op == conflict.Insert {
			key += 100
		}
		name := fmt.Sprintf("%d %s %c, %s", i, c.policy, c.op, strings.Fields(c.foreign)[0])
		if got := r.verdict(ids[i]); got != c.verdict {
			t.Errorf("%s: %q, want %q (%s)", name, got, c.verdict, r.text(r.mirror, "SELECT coalesce(detail, '') FROM waystage.change WHERE id = $1", ids[i]))
		}
		if got := r.text(r.source, "SELECT state || ' ' || note FROM job WHERE id = $1", key); got != c.row {
			t.Errorf("%s: the row is %q, want %q", name, got, c.row)
		}
		// What a policy took names whom it met and what it overwrote; to devices the row is the source's now, for its author has not seen it all.
		got := r.text(r.mirror, "SELECT concat_ws(' ', resolved->'source'->>'policy', winner, resolved->'source'->'stood'->>'note') FROM waystage.change WHERE id = $1", ids[i])
		switch {
		case c.verdict != "applied":
			if strings.Contains(got, "columns") || strings.Contains(got, "last-writer") || strings.Contains(got, "function") {
				t.Errorf("%s: refused, and resolved as %q", name, got)
			}
		case c.foreign != remove && !strings.HasSuffix(got, " source office"):
			t.Errorf("%s: the ledger says %q", name, got)
		}
		if lw := r.text(r.mirror, "SELECT coalesce(_ws_lw, 'source') FROM job WHERE id = $1", key); lw != "" && lw != "source" && c.verdict == "applied" {
			t.Errorf("%s: the row's last device writer is %s", name, lw)
		}
	}
	r.quiet()
}

// Many changes that meet somebody else's work are decided after one barrier.
func TestPolicyManyAtTheSource(t *testing.T) {
	const n = 120
	r := newRig(t, fmt.Sprintf(`CREATE TABLE job (id int PRIMARY KEY, state text, note text); INSERT INTO job SELECT i, 'open', 'old' FROM generate_series(1, %d) i;`, n), "public.job")
	var recs []rec
	for i := range n {
		img := map[string]any{"state": "done"}
		if i%40 == 7 {
			img["note"] = "mine"
		}
		recs = append(recs, rec{table: "public.job", op: conflict.Update, key: []string{fmt.Sprint(i + 1)}, img: img, policy: `{"policy": "columns"}`})
	}
	ids := r.merge(recs...)
	r.foreign(`UPDATE job SET note = 'office'`)
	r.start(allWorkers...)
	r.settled()
	for i, id := range ids {
		want := "applied"
		if i%40 == 7 {
			want = "refused source_conflict"
		}
		r.wantVerdict(id, want)
	}
	if got := r.text(r.source, "SELECT string_agg(DISTINCT state || note, ' ' ORDER BY state || note) FROM job"); got != "doneoffice openoffice" {
		t.Errorf("the source has %q", got)
	}
	if st := r.workers["up"].obj.(*apply.Up).Stats(); st.Barriers > 20 {
		t.Errorf("%d barriers for %d changes", st.Barriers, n)
	}
}

// Changes of a row that follow one another each meet what somebody else wrote; a unit stands or falls whole by it.
func TestPolicyChainsAndUnits(t *testing.T) {
	r := newRig(t, `
		CREATE TABLE job (id int PRIMARY KEY, state text, note text, hours int);
		INSERT INTO job SELECT i, 'open', 'old', 1 FROM generate_series(1, 9) i;`, "public.job")
	const columns = `{"policy": "columns"}`
	edit := func(key string, img map[string]any, unit int64, policy string) rec {
		return rec{table: "public.job", op: conflict.Update, key: []string{key}, img: img, unit: unit, policy: policy}
	}
	a := r.merge(edit("1", map[string]any{"state": "a"}, 0, columns))
	b := r.merge(edit("1", map[string]any{"hours": "2"}, 0, columns))
	c := r.merge(edit("1", map[string]any{"note": "c"}, 0, columns))
	d := r.merge(edit("1", map[string]any{"hours": "3"}, 0, columns)) // on top of the refused one
	u := r.merge(edit("2", map[string]any{"state": "u"}, 1, columns), edit("3", map[string]any{"state": "u"}, 1, columns))
	v := r.merge(edit("4", map[string]any{"state": "v"}, 1, columns), edit("5", map[string]any{"note": "v"}, 1, columns))
	r.foreign(`UPDATE job SET note = 'office' WHERE id IN (1, 2, 5)`)
	r.start(allWorkers...)
	r.settled()
	for _, id := range slices.Concat(a, b, u) {
		r.wantVerdict(id, "applied")
	}
	r.wantVerdict(c[0], "refused source_conflict")
	if got := r.verdict(d[0]); !strings.HasPrefix(got, "refused ") {
		t.Errorf("what was made on top of a refused change: %q", got)
	}
	r.wantVerdict(v[0], "refused transaction_rejected")
	r.wantVerdict(v[1], "refused source_conflict")
	for key, want := range map[int]string{1: "a office 2", 2: "u office 1", 3: "u old 1", 4: "open old 1", 5: "open office 1"} {
		if got := r.text(r.mirror, "SELECT state || ' ' || note || ' ' || hours FROM job WHERE id = $1", key); got != want {
			t.Errorf("row %d is %q, want %q", key, got, want)
		}
	}
}
