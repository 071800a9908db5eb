package stages

import (
	"testing"

	"github.com/waystage/waystage/protocol"
)

func testFirstSyncEditAndVerdict(t *testing.T, r *rig) {
	r.exec(`INSERT INTO public.patient (id, name, weight, active, mood, doc, pic, tags, secret) VALUES
		(1, 'ann', 61.5, true, 'calm', '{"a": 1}', '\x00ff', '{x,y}', 'hidden'), (2, 'bob', 70, false, NULL, NULL, NULL, NULL, 'hidden')`)
	r.exec(`INSERT INTO public.assignment VALUES ('amy', 1)`)
	amy := r.user("amy", "nurses")
	amy.sync("care")
	amy.want("ann", "care", "public.patient", "1", "name")
	amy.want("t", "care", "public.patient", "1", "active")
	amy.want(`\x00ff`, "care", "public.patient", "1", "pic")
	amy.want("{x,y}", "care", "public.patient", "1", "tags")
	amy.want("<none>", "care", "public.patient", "2", "name")
	if _, ok := amy.set("care").rows["public.patient"]["1"].vals["secret"]; ok {
		t.Fatal("a column outside the subscription was sent")
	}

	v := amy.sync("care", amy.edit("care", "public.patient", "1", "weight", "62.25"),
		change("public.visit", "", nil, row("id", "v1", "patient", 1, "at", "2026-05-01 10:00:00+00", "note", "fine")))
	amy.verdict(v, "merged", "merged")
	r.want("62.25", `SELECT weight::text FROM public.patient WHERE id = 1`)
	r.want("hidden", `SELECT secret FROM public.patient WHERE id = 1`)
	r.want("fine", `SELECT note FROM public.visit WHERE id = 'v1'`)
	r.want("2", `SELECT count(*) FROM waystage.change WHERE state = 'merged'`)
	r.want(`{"weight": "62.25"}`, `SELECT img::text FROM waystage.change WHERE tname = 'public.patient'`)
	r.want(`t`, `SELECT old->>'active' FROM waystage.change WHERE tname = 'public.patient'`)
	r.want(`hidden`, `SELECT old->>'secret' FROM waystage.change WHERE tname = 'public.patient'`)
	r.want("0", `SELECT count(*) FROM waystage.staging`)
	amy.want("62.25", "care", "public.patient", "1", "weight")
	if got := amy.set("care").rows["public.patient"]["1"].version; got != v[0].Version {
		t.Fatalf("row has version %s, verdict says %s", got, v[0].Version)
	}
}

// two devices of two nurses who share patient 1; nurse amy has a second device.
func shared(r *rig) (amy, tab, ben *dev) {
	r.exec(`INSERT INTO public.patient (id, name, weight) VALUES (1, 'ann', 60), (2, 'bob', 70), (3, 'cyd', 80)`)
	r.exec(`INSERT INTO public.assignment VALUES ('amy', 1), ('amy', 2), ('ben', 1)`)
	amy, ben = r.user("amy", "nurses"), r.user("ben", "nurses")
	tab = r.device("amy", "tablet")
	for _, d := range []*dev{amy, tab, ben} {
		d.sync("care")
	}
	return amy, tab, ben
}

const patients, visits = "public.patient", "public.visit"

// testRuleD3 goes through the accept and reject matrix on the real statements.
func testRuleD3(t *testing.T, r *rig) {
	amy, _, ben := shared(r)
	newVisit := func(id, note string) map[string]*string {
		return row("id", id, "patient", 1, "at", "2026-05-01 10:00:00+00", "note", note)
	}
	t.Run("version equal", func(t *testing.T) {
		r.t = t
		amy.verdict(amy.sync("care", amy.edit("care", patients, "1", "name", "anna")), "merged")
		r.want("anna", `SELECT name FROM public.patient WHERE id = 1`)
		r.want(amy.inc, `SELECT _ws_lw FROM public.patient WHERE id = 1`)
		r.want("true", `SELECT _ws_version = _ws_mver FROM public.patient WHERE id = 1`)
	})
	t.Run("stale", func(t *testing.T) {
		ben.verdict(ben.sync("care", ben.edit("care", patients, "1", "name", "benna")), "rejected stale_version")
		r.want("anna", `SELECT name FROM public.patient WHERE id = 1`)
		ben.want("anna", "care", patients, "1", "name")
		r.want("amy/phone", `SELECT winner FROM waystage.change WHERE state = 'rejected'`)
		r.want("benna", `SELECT img->>'name' FROM waystage.change WHERE state = 'rejected'`)
		r.want("ann", `SELECT base->>'name' FROM waystage.change WHERE state = 'rejected'`)
		r.want("anna", `SELECT old->>'name' FROM waystage.change WHERE state = 'rejected'`)
	})
	t.Run("stale by the source", func(t *testing.T) {
		r.exec(`UPDATE public.patient SET name = 'office', _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0 WHERE id = 1`)
		ben.verdict(ben.sync("care", ben.edit("care", patients, "1", "weight", "61")), "rejected stale_version")
		r.want("source", `SELECT winner FROM waystage.change WHERE state = 'rejected' ORDER BY id DESC LIMIT 1`)
	})
	t.Run("image is there already", func(t *testing.T) {
		r.exec(`UPDATE public.patient SET name = 'eve', weight = 62, _ws_version = DEFAULT WHERE id = 1`)
		v := ben.sync("care", ben.edit("care", patients, "1", "name", "eve", "weight", "62.00"))
		ben.verdict(v, "merged")
		if v[0].Version != r.value(`SELECT _ws_version::text FROM public.patient WHERE id = 1`) {
			t.Fatalf("version %s", v[0].Version)
		}
		r.want("<null>", `SELECT _ws_lw FROM public.patient WHERE id = 1`)
	})
	t.Run("own echo", func(t *testing.T) {
		before := ben.edit("care", patients, "1", "name", "b1")
		ben.verdict(ben.sync("care", before), "merged")
		next := ben.edit("care", patients, "1", "name", "b2")
		// A trigger at the source rewrites ben's row; its author stays.
		r.exec(`UPDATE public.patient SET name = 'B1', _ws_version = DEFAULT WHERE id = 1`)
		ben.verdict(ben.sync("care", next), "merged")
		r.want("b2", `SELECT name FROM public.patient WHERE id = 1`)
	})
	t.Run("no own echo over a foreign write", func(t *testing.T) {
		next := ben.edit("care", patients, "1", "name", "b3")
		r.exec(`UPDATE public.patient SET name = 'F', _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0 WHERE id = 1`)
		ben.verdict(ben.sync("care", next), "rejected stale_version")
	})
	t.Run("insert, insert over it, delete, delete again, edit of the deleted", func(t *testing.T) {
		amy.verdict(amy.sync("care", change(visits, "", nil, newVisit("v1", "a"))), "merged")
		ben.verdict(ben.sync("care", change(visits, "", nil, newVisit("v1", "b"))), "rejected row_exists")
		ben.verdict(ben.sync("care"))
		amy.sync("care")
		gone, stale := amy.remove("care", visits, "v1"), ben.edit("care", visits, "v1", "note", "c")
		again := ben.remove("care", visits, "v1")
		v := amy.sync("care", gone)
		amy.verdict(v, "merged")
		if v[0].Version != "" {
			t.Fatalf("a deleted row has version %s", v[0].Version)
		}
		amy.want("<none>", "care", visits, "v1", "id")
		ben.verdict(ben.sync("care", stale), "rejected row_deleted")
		r.want("amy/phone", `SELECT winner FROM waystage.change WHERE code = 'row_deleted'`)
		ben.want("<none>", "care", visits, "v1", "id")
		ben.verdict(ben.sync("care", again), "merged")
		// Same insert as an existing row: accepted, nothing written.
		amy.verdict(amy.sync("care", change(visits, "", nil, newVisit("v2", "x"))), "merged")
		version := r.value(`SELECT _ws_version::text FROM public.visit WHERE id = 'v2'`)
		ben.verdict(ben.sync("care", change(visits, "", nil, newVisit("v2", "x"))), "merged")
		r.want(version, `SELECT _ws_version::text FROM public.visit WHERE id = 'v2'`)
	})
	t.Run("delete of a stale row", func(t *testing.T) {
		ben.sync("care")
		gone := ben.remove("care", visits, "v2")
		amy.sync("care")
		amy.verdict(amy.sync("care", amy.edit("care", visits, "v2", "note", "y")), "merged")
		ben.verdict(ben.sync("care", gone), "rejected stale_version")
		ben.want("y", "care", visits, "v2", "note")
	})
}

// testOldEpoch: after FORKED or a rebuilt mirror the base image judges (rule D13).
func testOldEpoch(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	good, stale := amy.edit("care", patients, "1", "name", "new"), amy.edit("care", patients, "2", "name", "new")
	gone := amy.edit("care", patients, "1", "name", "late")
	r.exec(`UPDATE public.patient SET weight = 1, _ws_version = DEFAULT WHERE id = 2`)
	r.exec(`UPDATE public.patient SET _ws_version = DEFAULT WHERE id = 1`) // another version of the same image
	amy.inc, amy.n, amy.epoch, amy.sets = randomID()+randomID(), 0, "", map[string]*devSet{}
	amy.verdict(amy.sync("care", good, stale), "merged", "rejected stale_version")
	amy.verdict(amy.sync("care", gone), "rejected stale_version")
	r.want("new", `SELECT name FROM public.patient WHERE id = 1`)
}

func testSubsetOfUploads(t *testing.T, r *rig) {
	amy, _, ben := shared(r)
	r.exec(`INSERT INTO public.visit (id, patient, note) VALUES ('mine', 1, 'n'), ('amys', 2, 'n'), ('nobodys', NULL, 'n')`)
	amy.sync("care")
	ben.sync("care")
	amys := amy.edit("care", visits, "amys", "note", "stolen")
	version := amy.set("care").rows[visits]["amys"].version
	steal, kill := amys, amy.remove("care", visits, "amys")
	img := row("id", "mine", "patient", 2, "at", nil, "note", "n")
	base := row("id", "mine", "patient", 1, "at", nil, "note", "n")
	v := ben.sync("care",
		steal, // update of a row outside
		change(visits, "", nil, row("id", "w1", "patient", 2, "at", nil, "note", "in")),         // insert outside
		change(visits, ben.set("care").rows[visits]["mine"].version, base, img),                 // moving a row out
		change(visits, "", nil, row("id", "w2", "patient", nil, "at", nil, "note", "in")),       // in nobody's subset
		change(visits, "77", row("id", "nobodys", "patient", nil, "at", nil, "note", "n"), nil), // delete of nobody's
		change(visits, "", nil, row("id", "w3", "patient", 1, "at", nil, "note", "in")),
	)
	ben.verdict(v, "rejected not_subscribed", "rejected not_subscribed", "rejected not_subscribed", "rejected not_subscribed", "rejected not_subscribed", "merged")
	// Pulling a row in: an insert over it, and an update that claims another key.
	pull := row("id", "amys", "patient", 1, "at", nil, "note", "n")
	v = ben.sync("care", kill, change(visits, version, row("id", "amys", "patient", 1, "at", nil, "note", "n"), pull))
	ben.verdict(v, "rejected not_subscribed", "rejected duplicate_row")
	ben.verdict(ben.sync("care", change(visits, "", nil, pull)), "rejected not_subscribed")
	// A patient that is nobody's: an insert of the key itself.
	ben.verdict(ben.sync("care", change(patients, "", nil, row("id", 9, "name", "new"))), "rejected not_subscribed")
	r.want("amys 2 n", `SELECT concat_ws(' ', id, patient, note) FROM public.visit WHERE id = 'amys'`)
	r.want("mine 1 n", `SELECT concat_ws(' ', id, patient, note) FROM public.visit WHERE id = 'mine'`)
	r.want("4", `SELECT count(*) FROM public.visit`)
	// The source's own columns say nothing of a foreign row in the verdict.
	for _, x := range v {
		if x.Version != "" || len(x.Key) != 1 {
			t.Fatalf("verdict %+v", x)
		}
	}
}

func testOneBadRecordIsRejectedAlone(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	r.exec(`INSERT INTO public.code VALUES ('ab', 1, 'x')`)
	amy.sync("base")
	p := func(id any, kv ...any) map[string]*string {
		m := row("id", id, "name", "n")
		for k, v := range row(kv...) {
			m[k] = v
		}
		return m
	}
	r.exec(`INSERT INTO public.assignment SELECT 'amy', g FROM generate_series(100, 140) g`)
	amy.sync("care")
	good := amy.edit("care", patients, "1", "name", "good")
	c := change(patients, "", nil, p(100))
	wrongOp, shortKey, nullKey, longKey, noNew, noImage, baseOnInsert, badVersion := c, c, c, c, c, c, c, c
	wrongOp.Op = "X"
	shortKey.Key, nullKey.Key, longKey.Key = nil, vals(nil), vals(1, 2)
	noNew.New = noNew.New[:3]
	noImage.New = nil
	baseOnInsert.Base = c.New
	badVersion.Version = "-3"
	keyChange := amy.edit("care", patients, "1", "name", "k")
	keyChange.New = vals(5, "k", nil, nil, nil, nil, nil, nil)
	keyUnlike := c
	keyUnlike.Key = vals(101)
	unknown := c
	unknown.Table = "public.secret\x00"
	list := []struct {
		c    protocol.Change
		want string
	}{
		{good, "merged"},
		{wrongOp, "rejected invalid_record"},
		{shortKey, "rejected missing_key"},
		{nullKey, "rejected missing_key"},
		{longKey, "rejected missing_key"},
		{noNew, "rejected invalid_record"},
		{noImage, "rejected invalid_record"},
		{baseOnInsert, "rejected invalid_record"},
		{badVersion, "rejected invalid_record"},
		{keyChange, "rejected key_change"},
		{keyUnlike, "rejected missing_key"},
		{unknown, "rejected unknown_table"},
		{change(patients, "", nil, p(102, "name", "n\x00")), "rejected invalid_value"},
		{change(patients, "", nil, p(103, "mood", "furious")), "merged"}, // the source may have got the label meanwhile
		{change(patients, "", nil, p(104, "weight", "heavy")), "rejected invalid_value"},
		{change(patients, "", nil, p(105, "weight", "10000.00")), "rejected invalid_value"},
		{change(patients, "", nil, p(106, "name", "longer than ten")), "rejected invalid_value"},
		{change(patients, "", nil, p(107, "active", "maybe")), "rejected invalid_value"},
		{change(patients, "", nil, p(108, "doc", `{"a": "\u0000"}`)), "rejected invalid_value"},
		{change(patients, "", nil, p(109, "doc", `{`)), "rejected invalid_value"},
		{change(patients, "", nil, p(110, "pic", `\xzz`)), "rejected invalid_value"},
		{change(patients, "", nil, p(111, "tags", `{x`)), "rejected invalid_value"},
		{change(patients, "", nil, p("x12")), "rejected invalid_value"},
		{change(patients, "", nil, p("3000000000")), "rejected invalid_value"},
		{change(patients, "", nil, p(113)), "merged"},
		{change(patients, "", nil, p(113, "name", "m")), "rejected duplicate_row"},
		{change(patients, "", nil, p("0113", "name", "m")), "rejected duplicate_row"},
		{change(visits, "", nil, row("id", "v9", "patient", 1, "at", "2026-13-41", "note", "x")), "rejected invalid_value"},
		{change(visits, "", nil, row("id", "v8", "patient", 1, "at", "2026-12-01 00:00+02", "note", "x")), "merged"},
	}
	var changes []protocol.Change
	var want []string
	for _, l := range list {
		changes, want = append(changes, l.c), append(want, l.want)
	}
	amy.verdict(amy.sync("care", changes...), want...)
	r.want("good", `SELECT name FROM public.patient WHERE id = 1`)
	r.want("n", `SELECT name FROM public.patient WHERE id = 113`)
	r.want("2026-11-30 22:00:00+00", `SELECT at::text FROM public.visit WHERE id = 'v8'`)
	r.want("column weight: invalid input syntax for type numeric: \"heavy\"", `SELECT detail FROM waystage.change WHERE key = '{104}'`)
	r.want("column name: value too long for type character varying(10)", `SELECT detail FROM waystage.change WHERE key = '{106}'`)
	r.want("true", `SELECT bool_and(detail LIKE 'column doc: %') FROM waystage.change WHERE key IN ('{108}', '{109}')`)

	// In the other set: operations, tables of other sets, columns that are not subscribed.
	amy.sync("base")
	v := amy.sync("base",
		change("public.code", "", nil, row("k", "zz", "seq", 1, "label", "x")),
		amy.edit("base", "public.code", "ab  |1", "label", "y"),
		change("public.region", "", nil, row("id", 1, "name", "x")),
		change(patients, "", nil, p(1)))
	amy.verdict(v, "rejected operation_not_allowed", "merged", "rejected operation_not_allowed", "rejected unknown_table")
	r.want("y", `SELECT label FROM public.code`)
	r.want(`{"ab  ",1}`, `SELECT key::text FROM waystage.change WHERE tname = 'public.code' AND state = 'merged'`)
}

func testHiddenColumnCannotBeWritten(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	req := amy.request("care", amy.edit("care", patients, "1", "name", "x"))
	req.Columns[0].Columns = append(req.Columns[0].Columns[:7:7], "secret")
	req.Changes[0].New[7] = str("mine")
	amy.send(req)
	r.pump()
	amy.verdict(amy.receive(), "rejected unknown_column")
	req = amy.request("care", amy.edit("care", patients, "1", "name", "x"))
	req.Columns = nil
	amy.send(req)
	r.pump()
	amy.verdict(amy.receive(), "rejected invalid_record")
}

// testEqualKeysOfAnotherForm: two texts that the key's type holds for equal are one row.
func testEqualKeysOfAnotherForm(t *testing.T, r *rig) {
	amy, tab, _ := shared(r)
	m := func(id, flag string) protocol.Change {
		return change("public.measure", "", nil, row("id", id, "flag", flag))
	}
	amy.sync("base")
	tab.sync("base")
	amy.send(amy.request("base", m("1.0", "t"), m("2", "t")))
	tab.send(tab.request("base", m("1.00", "f"), m("3", "f")))
	r.pump()
	amy.verdict(amy.receive(), "merged", "merged")
	got := tab.receive()
	tab.verdict(got, "rejected row_exists", "merged")
	r.want("3", `SELECT count(*) FROM public.measure`)
	r.want("1.0 true", `SELECT concat_ws(' ', id, flag::text) FROM public.measure WHERE id = 1`)
	// Within one session the second one meets the first.
	amy.verdict(amy.sync("base", m("5", "t"), m("5.0", "t")), "merged", "rejected duplicate_row")
	r.want("4", `SELECT count(*) FROM public.measure`)
	// Updates of an existing row: its own key counts.
	tab.sync("base")
	a, b := amy.edit("base", "public.measure", "1.0", "flag", "f"), tab.edit("base", "public.measure", "1.0", "flag", nil)
	b.Key, b.Base, b.New = vals("1.000"), vals("1.000", "t"), vals("1.000", nil)
	amy.send(amy.request("base", a))
	tab.send(tab.request("base", b))
	r.pump()
	amy.verdict(amy.receive(), "merged")
	tab.verdict(tab.receive(), "rejected stale_version")
	r.want("{1.0}", `SELECT DISTINCT key::text FROM waystage.change WHERE op = 'U'`)
}

// testRounds: several sessions change one row in one batch.
func testRounds(t *testing.T, r *rig) {
	amy, tab, ben := shared(r)
	amy.send(amy.request("care", amy.edit("care", patients, "1", "name", "first"), change(visits, "", nil, row("id", "v", "patient", 1, "note", "a"))))
	tab.send(tab.request("care", tab.edit("care", patients, "1", "name", "second"), change(visits, "", nil, row("id", "v", "patient", 1, "note", "a"))))
	ben.send(ben.request("care", ben.edit("care", patients, "1", "name", "first"), change(visits, "", nil, row("id", "v", "patient", 1, "note", "b"))))
	r.pump()
	amy.verdict(amy.receive(), "merged", "merged")
	tab.verdict(tab.receive(), "rejected stale_version", "merged")
	ben.verdict(ben.receive(), "merged", "rejected row_exists")
	r.want("first", `SELECT name FROM public.patient WHERE id = 1`)
	tab.want("first", "care", patients, "1", "name")
	// Delete, delete of the absent, insert again, in one batch.
	amy.sync("care")
	tab.sync("care")
	ben.sync("care")
	amy.send(amy.request("care", amy.remove("care", visits, "v")))
	tab.send(tab.request("care", tab.remove("care", visits, "v")))
	ben.send(ben.request("care", change(visits, "", nil, row("id", "v", "patient", 1, "note", "again"))))
	r.pump()
	amy.verdict(amy.receive(), "merged")
	tab.verdict(tab.receive(), "merged")
	ben.verdict(ben.receive(), "merged")
	r.want("again", `SELECT note FROM public.visit WHERE id = 'v'`)
	amy.want("again", "care", visits, "v", "note")
	r.want("1", `SELECT count(DISTINCT stamp) FROM waystage.change WHERE tname = 'public.visit' AND (op = 'D' OR img->>'note' = 'again')`)
}
