package stages

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/protocol"
)

// policyRig has the visits' conflict policy, and functions that a policy may name.
func policyRig(t *testing.T) *rig {
	r := newRig(t)
	r.exec(`CREATE SCHEMA care`)
	r.exec(`GRANT USAGE ON SCHEMA care TO waystage_decider`)
	for name, body := range map[string]string{
		"mine":                            `SELECT CASE WHEN mine = 'null' OR theirs IS NOT NULL OR mine IS NOT NULL THEN mine END`,
		"theirs":                          `SELECT theirs`,
		"both":                            `SELECT theirs || jsonb_build_object('note', (theirs->>'note') || ' / ' || (mine->>'note') || ' by ' || (info->>'user') || ' against ' || (info->>'stood_by'))`,
		"silent":                          `SELECT NULL::jsonb`,
		"column":                          `SELECT '{"colour": "red"}'::jsonb`,
		"value":                           `SELECT '{"at": "not a time"}'::jsonb`,
		"list":                            `SELECT '[1]'::jsonb`,
		"key":                             `SELECT '{"id": "other"}'::jsonb`,
		"null":                            `SELECT 'null'::jsonb`,
		"reads":                           `SELECT jsonb_build_object('note', (SELECT secret FROM public.patient LIMIT 1))`,
		"x'; DROP TABLE public.visit; --": `SELECT mine`,
	} {
		r.exec(fmt.Sprintf(`CREATE FUNCTION care.%s(base jsonb, theirs jsonb, mine jsonb, info jsonb) RETURNS jsonb LANGUAGE sql STABLE AS $f$ %s $f$`, `"`+name+`"`, body))
	}
	for name, body := range map[string]string{
		"raises": `RAISE EXCEPTION 'ask the office about %', base->>'id'`,
		"fails":  `RETURN jsonb_build_object('note', 1 / (length(mine->>'note') - length(mine->>'note')))`,
		"hangs":  `IF mine->>'note' LIKE 'hang%' THEN PERFORM pg_sleep(600); END IF; RETURN mine`,
		"escape": `PERFORM set_config('role', 'none', true); RETURN mine`,
		"writes": `EXECUTE 'DELETE FROM public.visit'; RETURN mine`,
	} {
		r.exec(fmt.Sprintf(`CREATE FUNCTION care.%s(base jsonb, theirs jsonb, mine jsonb, info jsonb) RETURNS jsonb LANGUAGE plpgsql STABLE AS $f$ BEGIN %s; END $f$`, name, body))
	}
	return r
}

// by puts a policy in force for the visits.
func (r *rig) by(policy string) {
	r.t.Helper()
	defs := strings.Replace(definitions, "allow: [insert, update, delete]", "allow: [insert, update, delete]\n    conflict: "+policy, 1)
	r.cat = r.catalogOf(defs)
	r.stages()
}

const at = "2026-05-01 10:00:00+00"

// TestPolicies runs all scenarios on one mirror.
func TestPolicies(t *testing.T) {
	base := policyRig(t)
	for name, run := range map[string]func(*testing.T, *rig){
		"every clash": testEveryClash, "edit on top of a merged one": testEditOnTopOfAMergedOne, "a function hangs": testFunctionHangs,
		"many conflicts": testManyConflicts, "names of functions": testFunctionNames, "columns are a simple rule": testColumnsAreASimpleRule,
	} {
		t.Run(name, func(t *testing.T) { run(t, base.reset(t)) })
	}
}

// testEveryClash has every policy decide every kind of clash on the real statements.
func testEveryClash(t *testing.T, base *rig) {
	// What happens to an edit of the note, of the time, of both, to a delete, to an insert of the key, and to an edit of a row
	// that is gone, when ben has changed the note (or deleted, or inserted the row) before.
	const merged, stale, gone, there = "merged", "rejected stale_version", "rejected row_deleted", "rejected row_exists"
	const yields, refused, failed = "rejected source_wins", "rejected function_refused", "rejected function_failed"
	for policy, want := range map[string]map[string]string{
		"reject":      {"note": stale, "time": stale, "delete": stale, "insert": there, "lost": gone},
		"columns":     {"note": stale, "time": merged, "delete": stale, "insert": there, "lost": gone},
		"last-writer": {"note": merged, "time": merged, "delete": merged, "insert": merged, "lost": gone},
		"source":      {"note": yields, "time": yields, "delete": yields, "insert": yields, "lost": yields},

		"{function: care.mine}":   {"note": merged, "time": merged, "delete": merged, "insert": merged, "lost": merged},
		"{function: care.theirs}": {"note": yields, "time": yields, "delete": yields, "insert": yields, "lost": gone},
		"{function: care.silent}": {"note": stale, "time": stale, "delete": stale, "insert": there, "lost": gone},
		"{function: care.raises}": {"note": refused, "delete": refused},
		"{function: care.fails}":  {"note": failed},
		"{function: care.column}": {"note": failed, "delete": failed},
		"{function: care.value}":  {"note": failed},
		"{function: care.list}":   {"note": failed},
		"{function: care.key}":    {"note": failed},
		"{function: care.null}":   {"note": failed, "delete": merged},
		"{function: care.reads}":  {"note": failed},
		"{function: care.escape}": {"note": failed},
		"{function: care.writes}": {"note": failed},
		"{function: care.hangs}":  {"note": merged},
	} {
		t.Run(policy, func(t *testing.T) {
			r := base.reset(t)
			r.by(policy)
			amy, _, ben := shared(r)
			visit := func(id, note string) map[string]*string { return row("id", id, "patient", 1, "at", at, "note", note) }
			for clash, want := range want {
				id := "v-" + clash
				if clash != "insert" {
					amy.verdict(amy.sync("care", change(visits, "", nil, visit(id, "old"))), merged)
					amy.sync("care")
					ben.sync("care")
				}
				var mine, theirs protocol.Change
				theirs = change(visits, "", nil, visit(id, "bens"))
				if clash != "insert" {
					theirs = ben.edit("care", visits, id, "note", "bens")
				}
				switch clash {
				case "note":
					mine = amy.edit("care", visits, id, "note", "amys")
				case "time":
					mine = amy.edit("care", visits, id, "at", "2026-06-01 10:00:00+00")
				case "delete":
					mine = amy.remove("care", visits, id)
				case "insert":
					mine = change(visits, "", nil, visit(id, "amys"))
				case "lost":
					mine, theirs = amy.edit("care", visits, id, "note", "amys"), ben.remove("care", visits, id)
				}
				ben.verdict(ben.sync("care", theirs), merged)
				v := amy.sync("care", mine)
				if got := state(v[0]); got != want {
					t.Errorf("%s: %s (%s), want %s", clash, got, v[0].Detail, want)
					continue
				}
				stands := r.value(`SELECT at::date || ' ' || note FROM public.visit WHERE id = $1`, id)
				expect := "2026-05-01 bens"
				switch {
				case want != merged && clash == "lost", want == merged && clash == "delete":
					expect = "<none>"
				case want == merged && clash == "time" && policy == "{function: care.mine}":
					expect = "2026-06-01 old" // the function took the whole row
				case want == merged && clash == "time":
					expect = "2026-06-01 bens"
				case want == merged:
					expect = "2026-05-01 amys"
				}
				if stands != expect {
					t.Errorf("%s: the row is %q, want %q", clash, stands, expect)
				}
				if amyHas := amy.has("care", visits, id, "note"); amyHas != "<none>" && !strings.HasSuffix(expect, " "+amyHas) || amyHas == "<none>" && expect != "<none>" {
					t.Errorf("%s: the device has the note %q, the mirror %q", clash, amyHas, expect)
				}
				name := policy
				if strings.HasPrefix(policy, "{") {
					name = "function"
				}
				if want != merged {
					r.want("<null>", `SELECT resolved FROM waystage.change WHERE key = ARRAY[$1::text] ORDER BY id DESC LIMIT 1`, id)
					continue
				}
				r.want(name+" ben/phone", `SELECT (resolved->'merge'->>'policy') || ' ' || winner FROM waystage.change WHERE key = ARRAY[$1::text] ORDER BY id DESC LIMIT 1`, id)
				if v[0].Policy != name {
					t.Errorf("%s: the verdict names the policy %q", clash, v[0].Policy)
				}
				if clash != "lost" {
					r.want("bens", `SELECT old->>'note' FROM waystage.change WHERE key = ARRAY[$1::text] ORDER BY id DESC LIMIT 1`, id)
				}
				// The device is told a version that no row has: what it sent is not what the row is.
				if clash != "delete" {
					r.want("0", `SELECT count(*) FROM public.visit WHERE _ws_version = $1::text::bigint`, v[0].Version)
				}
			}
			r.want("hidden", `SELECT coalesce((SELECT secret FROM public.patient WHERE id = 1), 'hidden')`)
		})
	}
}

// An edit that a device makes on top of what a policy has merged, before it has seen the result, is judged by its base image: it does
// not overwrite the others' columns unseen.
func testEditOnTopOfAMergedOne(t *testing.T, r *rig) {
	r.by("columns")
	amy, _, ben := shared(r)
	visit := row("id", "v", "patient", 1, "at", at, "note", "old")
	amy.sync("care", change(visits, "", nil, visit))
	amy.sync("care")
	ben.sync("care")
	first := amy.edit("care", visits, "v", "at", "2026-06-01 10:00:00+00")
	ben.verdict(ben.sync("care", ben.edit("care", visits, "v", "note", "bens")), "merged")
	v := amy.sync("care", first)
	amy.verdict(v, "merged")
	sent := maps.Clone(visit)
	sent["at"] = str("2026-06-01 10:00:00+00")
	next := maps.Clone(sent)
	next["note"] = str("amys")
	amy.verdict(amy.sync("care", change(visits, v[0].Version, sent, next)), "rejected stale_version")
	r.want("bens", `SELECT note FROM public.visit`)
	if d := r.value(`SELECT detail FROM waystage.change WHERE state = 'rejected'`); !strings.Contains(d, "note") {
		t.Errorf("the rejection does not name the column: %s", d)
	}
	next["note"], next["at"] = sent["note"], str("2026-07-01 10:00:00+00")
	amy.verdict(amy.sync("care", change(visits, v[0].Version, sent, next)), "merged")
	r.want("2026-07-01 bens", `SELECT at::date || ' ' || note FROM public.visit`)
}

// A function that hangs on some records holds up nobody for long, and takes no other record with it.
func testFunctionHangs(t *testing.T, r *rig) {
	r.by("{function: care.hangs}")
	amy, _, ben := shared(r)
	var made, bens, amys []protocol.Change
	for i := range 9 {
		made = append(made, change(visits, "", nil, row("id", fmt.Sprint("v", i), "patient", 1, "at", at, "note", "old")))
	}
	amy.sync("care", made...)
	amy.sync("care")
	ben.sync("care")
	for i := range 9 {
		note := "amys"
		if i%4 == 1 {
			note = "hang"
		}
		bens = append(bens, ben.edit("care", visits, fmt.Sprint("v", i), "note", "bens"))
		amys = append(amys, amy.edit("care", visits, fmt.Sprint("v", i), "note", note))
	}
	ben.sync("care", bens...)
	began := time.Now()
	v := amy.sync("care", amys...)
	t.Logf("two of nine records hang: %s", time.Since(began))
	for i := range 9 {
		want := "merged"
		if i%4 == 1 {
			want = "rejected function_failed"
		}
		if got := state(v[i]); got != want {
			t.Errorf("record %d: %s (%s), want %s", i, got, v[i].Detail, want)
		}
	}
	r.want("bens", `SELECT note FROM public.visit WHERE id = 'v1'`)
	r.want("amys", `SELECT note FROM public.visit WHERE id = 'v2'`)
}

// Many changes of one row, and many rows in conflict, are merged in one go.
func testManyConflicts(t *testing.T, r *rig) {
	r.by("last-writer")
	amy, _, ben := shared(r)
	var made, bens, amys []protocol.Change
	const rows = 300
	for i := range rows {
		made = append(made, change(visits, "", nil, row("id", fmt.Sprint("v", i), "patient", 1, "at", at, "note", "old")))
	}
	amy.sync("care", made...)
	amy.sync("care")
	ben.sync("care")
	for i := range rows {
		bens = append(bens, ben.edit("care", visits, fmt.Sprint("v", i), "note", "bens"))
		amys = append(amys, amy.edit("care", visits, fmt.Sprint("v", i), "note", "amys"))
	}
	ben.sync("care", bens...)
	began := time.Now()
	v := amy.sync("care", amys...)
	t.Logf("%d rows in conflict: %s", rows, time.Since(began))
	for i := range rows {
		if got := state(v[i]); got != "merged" {
			t.Fatalf("record %d: %s", i, got)
		}
	}
	r.want(fmt.Sprint(rows), `SELECT count(*) FROM public.visit WHERE note = 'amys'`)
	// Many devices edit one row; all are staged when the merge begins.
	var devices []*dev
	for i := range 60 {
		d := r.device("amy", fmt.Sprint("d", i))
		d.sync("care")
		devices = append(devices, d)
	}
	for i, d := range devices {
		d.send(d.request("care", d.edit("care", visits, "v0", "note", fmt.Sprint("n", i))))
	}
	began = time.Now()
	r.pump()
	t.Logf("%d devices edit one row: %s", len(devices), time.Since(began))
	for _, d := range devices {
		d.verdict(d.receive(), "merged")
	}
	r.want("n59", `SELECT note FROM public.visit WHERE id = 'v0'`)
}

// A name that is no plain word is a name and nothing else.
func testFunctionNames(t *testing.T, r *rig) {
	r.by("columns")
	for _, name := range []string{"x'; DROP TABLE public.visit; --", `mine"(NULL,NULL,NULL,NULL); DROP TABLE public.visit; --`, "nosuch"} {
		for _, set := range r.cat.sets {
			for _, sub := range set.subs {
				if sub.Table == visits {
					sub.Conflict, sub.Function = "function", "care."+name
				}
			}
		}
		id := "v" + fmt.Sprint(len(name))
		var amy, ben *dev
		if r.value(`SELECT count(*) FROM waystage.app_user`) == "0" {
			amy, _, ben = shared(r)
		} else {
			amy, ben = r.device("amy", "n"+id), r.device("ben", "n"+id)
		}
		amy.sync("care", change(visits, "", nil, row("id", id, "patient", 1, "at", at, "note", "old")))
		amy.sync("care")
		ben.sync("care")
		mine := amy.edit("care", visits, id, "note", "amys")
		ben.sync("care", ben.edit("care", visits, id, "note", "bens"))
		want := "rejected function_failed"
		if strings.HasPrefix(name, "x'") {
			want = "merged"
		}
		amy.verdict(amy.sync("care", mine), want)
	}
	r.want("3", `SELECT count(*) FROM public.visit`)
}

// The columns that a merge by columns takes, and refuses, are those of a simple rule on maps, for random rows.
func testColumnsAreASimpleRule(t *testing.T, r *rig) {
	r.by("columns")
	amy, _, ben := shared(r)
	n := 0
	cols := map[string][]any{"at": {nil, at, "2026-06-01 10:00:00+00"}, "note": {nil, "", "a", "A"}}
	rapid.Check(t, func(t *rapid.T) {
		if n++; n > 8 { // each is of many rows
			return
		}
		type clash struct{ base, theirs, mine map[string]*string }
		var clashes []clash
		var inserts, bens, amys []protocol.Change
		for i := range 25 {
			id := fmt.Sprintf("p%d-%d", n, i)
			draw := func(who string) map[string]*string {
				return row("id", id, "patient", 1, "at", rapid.SampledFrom(cols["at"]).Draw(t, who+" at"), "note", rapid.SampledFrom(cols["note"]).Draw(t, who+" note"))
			}
			c := clash{draw("base"), draw("theirs"), draw("mine")}
			clashes, inserts = append(clashes, c), append(inserts, change(visits, "", nil, c.base))
		}
		amy.sync("care", inserts...)
		amy.sync("care")
		ben.sync("care")
		for _, c := range clashes {
			version := ben.set("care").rows[visits][*c.base["id"]].version
			if !maps.EqualFunc(c.base, c.theirs, equal) {
				bens = append(bens, change(visits, version, c.base, c.theirs))
			}
			amys = append(amys, change(visits, version, c.base, c.mine))
		}
		ben.sync("care", bens...)
		v := amy.sync("care", amys...)
		ben.sync("care")
		for i, c := range clashes {
			want, result := "merged", maps.Clone(c.theirs)
			for col := range cols {
				if equal(c.mine[col], c.base[col]) {
					continue
				}
				if result[col] = c.mine[col]; !equal(c.theirs[col], c.base[col]) && !equal(c.theirs[col], c.mine[col]) {
					want = "rejected " + string(conflict.Stale)
				}
			}
			if want != "merged" {
				result = c.theirs
			}
			if got := state(v[i]); got != want {
				t.Fatalf("base %v theirs %v mine %v: %s (%s), want %s", showImage(c.base), showImage(c.theirs), showImage(c.mine), got, v[i].Detail, want)
			}
			if now := ben.set("care").rows[visits][*c.base["id"]].vals; !maps.EqualFunc(now, result, equal) {
				t.Fatalf("base %v theirs %v mine %v: the row is %v, want %v", showImage(c.base), showImage(c.theirs), showImage(c.mine), showImage(now), showImage(result))
			}
		}
	})
}

func showImage(m map[string]*string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		v := "null"
		if m[k] != nil {
			v = *m[k]
		}
		out = append(out, k+"="+v)
	}
	return strings.Join(out, " ")
}
