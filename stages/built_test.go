package stages

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// testBuiltFor: old and new applications side by side. An application that says what it was built for gets no more, whatever is
// added, until it says that it can take it; what it sends is judged record by record.
func testBuiltFor(t *testing.T, r *rig) {
	whole := r.cat
	under := func(old, now string) {
		t.Helper()
		d, problems := schema.ParseDefinitions("test.yaml", []byte(strings.ReplaceAll(keyDefinitions, old, now)))
		if d == nil {
			t.Fatal(problems)
		}
		d.Check(r.tables)
		r.cat = NewCatalog("e1", whole.layout, d, r.tables)
		r.stages()
	}
	defer func() { r.cat = whole }()
	devs := r.staff("amy", "ben", "eve")
	old, now, eve := devs[0], devs[1], devs[2]
	devs = devs[:2]
	r.office(`INSERT INTO public.share VALUES ('amy', 1), ('amy', 2), ('ben', 1), ('ben', 2), ('eve', 1)`)
	r.office(`INSERT INTO public.item VALUES ('i1', 1, 'n'), ('i2', 2, 'n')`)
	r.office(`INSERT INTO public.lot VALUES ('l1', 1, 'n')`)
	under("table: public.item\n", "table: public.item\n    columns: [id, k]\n")
	old.built = &protocol.Built{Name: "spring", Tables: []protocol.Layout{{Table: items, Columns: []string{"id", "k", "unheard_of"}}, {Table: "public.none"}}}
	columns := func(d *dev, want ...string) {
		t.Helper()
		for id, row := range d.set("all").rows[items] {
			if got := slices.Sorted(maps.Keys(row.vals)); !slices.Equal(got, want) {
				t.Fatalf("%s: %s has the columns %v, want %v", d.user, id, got, want)
			}
		}
	}
	// told syncs and tells whether definitions came, and everything.
	told := func(d *dev, schema, refresh bool, changes ...protocol.Change) map[int]protocol.Verdict {
		t.Helper()
		v := d.sync("all", changes...)
		if p := d.pages()[0]; (p.Schema != nil) != schema || p.Refresh != refresh {
			t.Fatalf("%s: definitions %v, refresh %v; want %v, %v", d.user, p.Schema != nil, p.Refresh, schema, refresh)
		}
		return v
	}
	told(old, true, true)
	told(now, true, true)
	columns(old, "id", "k")
	columns(now, "id", "k")
	if len(old.set("all").rows[lots]) != 0 || len(old.set("all").schema.Tables) != 1 || len(now.set("all").rows[lots]) != 1 {
		t.Fatal("a table that the application was not built for was sent")
	}
	// What is named is no right.
	eve.built = &protocol.Built{Tables: []protocol.Layout{{Table: items, Columns: []string{"id", "note"}}, {Table: "public.share"}, {Table: `public.item"; --`, Columns: []string{`" from public.share; --`}}}}
	told(eve, true, true)
	columns(eve, "id", "k")
	if s := eve.set("all").schema; len(s.Tables) != 1 || len(s.Tables[0].Columns) != 2 {
		t.Fatalf("%+v", s)
	}
	// A column is added: only those who take everything hear of it.
	under("", "")
	told(old, false, false)
	told(now, true, true)
	columns(old, "id", "k")
	columns(now, "id", "k", "note")
	r.office(`UPDATE public.item SET note = 'x', _ws_version = DEFAULT WHERE id = 'i1'`)
	r.office(`UPDATE public.item SET k = 9, _ws_version = DEFAULT WHERE id = 'i2'`)
	told(old, false, false)
	told(now, false, false)
	for _, d := range devs {
		if rows := d.set("all").rows[items]; len(rows) != 1 || rows["i1"].vals == nil {
			t.Fatalf("%s has %v", d.user, rows)
		}
	}
	columns(old, "id", "k")
	// Its edits leave alone what it does not know.
	layouts[items] = []string{"id", "k"}
	v := told(old, false, false, old.edit("all", items, "i1", "k", 2), change(items, "", nil, row("id", "i3", "k", 1)))
	layouts[items] = []string{"id", "k", "note"}
	old.verdict(v, "merged", "merged")
	r.want("x", `SELECT note FROM public.item WHERE id = 'i1'`)
	r.want("<null>", `SELECT note FROM public.item WHERE id = 'i3'`)
	now.sync("all")
	// Nothing waits for either: a connected device is not made to sync again and again.
	told(old, false, false)
	conn, err := r.db.Acquire(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	waiting := func(d *dev) bool {
		t.Helper()
		one := &waiter{user: d.user, device: d.name}
		one.ask.Sets = []protocol.WatchSet{{Set: "all", Cursor: d.set("all").cursor}}
		news, err := r.reply.news(r.ctx, conn, r.cat, []*waiter{one})
		if err != nil {
			t.Fatal(err)
		}
		return len(news) > 0
	}
	told(old, false, false)
	if waiting(old) {
		t.Error("a sync is said to bring something, and would not")
	}
	conn.Release()
	// Why it has not the table.
	r.office(`UPDATE public.lot SET k = 1, _ws_version = DEFAULT`)
	e, err := Explain(r.ctx, r.db, nil, nil, r.cat, lots, []string{"l1"}, "amy", "phone")
	if err != nil || e.Outcome != Never || !strings.Contains(e.Summary, "was not built for table public.lot") {
		t.Errorf("%+v, %v", e, err)
	}
	if e, err = Explain(r.ctx, r.db, nil, nil, r.cat, items, []string{"i3"}, "amy", "phone"); err != nil || e.Outcome != OnDevice {
		t.Errorf("%+v, %v", e, err)
	}
	// A newer version of the application.
	old.built = &protocol.Built{Tables: []protocol.Layout{{Table: items}, {Table: lots, Columns: []string{"id"}}}}
	told(old, true, true)
	columns(old, "id", "k", "note")
	if len(old.set("all").rows[lots]) != 1 {
		t.Fatal("the table did not come")
	}
	told(old, false, false)
	old.built = nil
	told(old, true, true)

	// A column leaves, an operation is no longer allowed, a table leaves: each record is judged for itself.
	edits := []protocol.Change{
		now.edit("all", items, "i3", "k", 2),      // does not touch the column that is gone
		now.edit("all", items, "i1", "note", "y"), // does
		change(items, "", nil, row("id", "i5", "k", 1, "note", "z")),
		change(items, "", nil, row("id", "i6", "k", 1, "note", nil)),
		now.remove("all", lots, "l1"),
	}
	under("table: public.item\n", "table: public.item\n    columns: [id, k]\n    allow: [insert, update]\n")
	r.cat.defs.Sets[0].Subscriptions = []string{"items"} // the other table has left the set
	r.cat = NewCatalog("e1", whole.layout, r.cat.defs, r.tables)
	edits = append(edits, change(items, now.set("all").rows[items]["i1"].version, now.set("all").rows[items]["i1"].vals, nil))
	v = told(now, true, true, edits...)
	now.verdict(v, "merged", "rejected unknown_column", "rejected unknown_column", "merged", "rejected unknown_table", "rejected operation_not_allowed")
	r.want("1", `SELECT count(*) FROM public.lot`)
	told(now, false, false)
	r.want("y", `SELECT img->>'note' FROM waystage.reject WHERE code = 'unknown_column' AND key = '{i1}'`)
}

// testBuiltOnce: what many devices say is stored once, and goes when nobody says it any more.
func testBuiltOnce(t *testing.T, r *rig) {
	devs := r.staff("amy", "ben")
	for _, d := range devs {
		d.built = &protocol.Built{Name: "spring", Tables: []protocol.Layout{{Table: items}}}
		d.sync("all")
	}
	r.want("1", `SELECT count(*) FROM waystage.built`)
	r.want("2", `SELECT count(*) FROM waystage.device d JOIN waystage.built b ON b.hash = d.built WHERE b.built->>'name' = 'spring'`)
	devs[0].built = &protocol.Built{Name: "summer", Tables: []protocol.Layout{{Table: items}, {Table: lots}}}
	devs[1].built = nil
	for _, d := range devs {
		d.sync("all")
	}
	prune := func() {
		t.Helper()
		if _, err := NewPruner(RetentionConfig{}, r.db, nil).Prune(r.ctx); err != nil {
			t.Fatal(err)
		}
	}
	prune()
	r.want("2", `SELECT count(*) FROM waystage.built`) // young
	r.exec(`UPDATE waystage.built SET told_at = now() - interval '2 hours'`)
	prune()
	r.want("summer", `SELECT string_agg(built->>'name', ',') FROM waystage.built`)
	// Said again after it went.
	devs[1].built = &protocol.Built{Name: "spring", Tables: []protocol.Layout{{Table: items}}}
	devs[1].sync("all")
	r.want("2", `SELECT count(*) FROM waystage.built`)
}
