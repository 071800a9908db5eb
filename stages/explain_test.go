package stages

import (
	"errors"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/schema"
)

// testExplain goes through the branches of why a row is, or is not, on a device, and holds each answer against what the next sync does.
func testExplain(t *testing.T, r *rig) {
	amy := r.staff("amy")[0]
	r.exec(`UPDATE waystage.device SET public_key = 'U-' || id`)
	source, err := pgxpool.New(r.ctx, pgtest.Source(t))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if _, err := source.Exec(r.ctx, `CREATE TABLE public.item (id text PRIMARY KEY); INSERT INTO public.item SELECT 'i' || g FROM generate_series(1, 9) g;
		CREATE TABLE public.lot (id text PRIMARY KEY)`); err != nil {
		t.Fatal(err)
	}
	explain := func(table, key string) *Explanation {
		t.Helper()
		e, err := Explain(r.ctx, r.db, source, nil, r.cat, table, strings.Split(key, "|"), "amy", "phone")
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	part := func(e *Explanation, name string) string {
		for _, p := range e.Parts {
			if p.Part != name {
				continue
			}
			if p.Holds == nil {
				return "- " + p.Text
			}
			return map[bool]string{true: "yes ", false: "no "}[*p.Holds] + p.Text
		}
		return ""
	}
	want := func(table, key string, o Outcome, words string, parts ...string) {
		t.Helper()
		e := explain(table, key)
		if e.Outcome != o || !strings.Contains(e.Summary, words) {
			t.Fatalf("%s %s: %s, %q; want %s, %q\n%+v", table, key, e.Outcome, e.Summary, o, words, e.Parts)
		}
		for i := 0; i < len(parts); i += 2 {
			if got := part(e, parts[i]); !strings.HasPrefix(got, parts[i+1]) {
				t.Fatalf("%s %s: part %s is %q, want %q", table, key, parts[i], got, parts[i+1])
			}
		}
	}
	holds := func(key string, yes bool) {
		t.Helper()
		if _, ok := amy.set("all").rows[items][key]; ok != yes {
			t.Fatalf("the device has %s: %v", key, ok)
		}
	}
	r.office(`INSERT INTO public.share VALUES ('amy', 1), ('amy', 2)`)
	r.office(`INSERT INTO public.item VALUES ('i1', 1, 'n'), ('i2', 2, 'n'), ('i3', 3, 'n'), ('i4', NULL, 'n')`)
	want(items, "i1", Comes, "sends everything", "table", "yes", "user", "yes", "device", "yes", "subscription", "yes user amy is in groups staff: set all, subscription items",
		"direction", "yes two-way", "columns", "- all", "source", "yes", "mirror", "yes the row exists, version", "key", `yes k is "1", which the rows query gives`, "cursor", "- the server knows of no reply")
	want(items, "i3", Never, `its k, "3", is not among the user's keys`, "key", "no ")
	amy.exact()
	want(items, "i1", OnDevice, "if it has applied that reply", "key then", "yes", "version", "yes")
	amy.exact()
	want(items, "i1", OnDevice, "sent at the latest in session "+amy.inc, "key then", "yes", "version", "yes", "last sync", "- up: never")
	want("item", "i1", OnDevice, "") // without the schema
	want(items, "i4", Never, "its k is null", "key", "no k is null")
	want(items, "i5", Never, "the mirror does not have the row (yet)", "source", "yes", "mirror", "no")
	want(items, "nope", Never, "the row does not exist", "source", "no", "mirror", "no")
	// What the next sync does.
	r.office(`UPDATE public.item SET note = 'x', _ws_version = DEFAULT WHERE id = 'i1'`)
	want(items, "i1", Comes, "is newer than the last reply", "version", "no")
	r.office(`UPDATE public.item SET k = 3, _ws_version = DEFAULT WHERE id = 'i2'`)
	want(items, "i2", Leaves, `because its k, "3", is not among`, "tombstone", "- ")
	r.office(`INSERT INTO public.share VALUES ('amy', 4)`)
	r.office(`INSERT INTO public.item VALUES ('i6', 4, 'n')`)
	want(items, "i6", Comes, "its key is new", "key then", "no")
	amy.exact()
	holds("i1", true)
	holds("i2", false)
	holds("i6", true)
	amy.exact()
	want(items, "i2", Never, "is not among")
	r.office(`DELETE FROM public.item WHERE id = 'i1'`)
	want(items, "i1", Leaves, "because the mirror does not have the row", "tombstone", "- ", "mirror", "no")
	r.office(`DELETE FROM public.share WHERE k = 4`)
	want(items, "i6", Leaves, `because its k, "4", is not among`, "key", "no", "key then", "yes")
	amy.exact()
	holds("i1", false)
	holds("i6", false)
	amy.exact()
	want(items, "i1", Never, "")
	want(items, "i6", Never, "")
	// A numeric key.
	r.office(`INSERT INTO public.lot VALUES ('l', 2.00, 'n'), ('m', 2.50, 'n')`)
	want(lots, "l", Comes, "", "key", `yes k is "2"`)
	amy.exact()
	amy.exact()
	want(lots, "l", OnDevice, "")
	want(lots, "m", Never, "", "key", `no k is "2.5"`)
	r.office(`UPDATE public.lot SET k = 2.5, _ws_version = DEFAULT WHERE id = 'l'`)
	want(lots, "l", Leaves, "")
	amy.exact()
	amy.exact()
	want(lots, "l", Never, "")
	// The device's own record, which waits for the source.
	r.office(`INSERT INTO public.item VALUES ('i7', 1, 'n')`)
	amy.exact()
	amy.sync("all", amy.edit("all", items, "i7", "note", "y"))
	if e := explain(items, "i7"); len(e.Pending) != 1 || e.Pending[0].Device != "amy/phone" || e.Writer != "amy/phone" || e.Up == nil || !strings.HasPrefix(part(e, "pending"), "- record") {
		t.Fatalf("%+v", e)
	}
	amy.exact()
	want(items, "i7", OnDevice, "")
	// An order, other definitions, another mirror, what was forgotten: everything comes.
	if _, _, err := registry.New(r.db, nil).OrderRefresh(r.ctx, registry.RefreshOrder{User: "amy", Who: "op"}); err != nil {
		t.Fatal(err)
	}
	want(items, "i7", Comes, "sends everything", "refresh", "- the next sync sends everything: an operator has ordered it")
	amy.sync("all")
	amy.exact()
	want(items, "i7", OnDevice, "")
	r.exec(`UPDATE waystage.cursor SET keysets = jsonb_set(keysets, '{schema}', '"old"')`)
	want(items, "i7", Comes, "sends everything", "refresh", "- the next sync sends everything: the definitions")
	r.exec(`UPDATE waystage.cursor SET token = 'e0' || substr(token, 3)`)
	want(items, "i7", Comes, "sends everything", "refresh", "- the next sync sends everything: the mirror")
	amy.set("all").cursor = ""
	amy.sync("all")
	amy.sync("all")
	want(items, "i7", OnDevice, "")
	// Who may not sync.
	r.exec(`UPDATE waystage.app_user SET blocked = true`)
	want(items, "i7", OnDevice, "", "user", "no user amy is blocked")
	r.office(`INSERT INTO public.item VALUES ('i8', 1, 'n')`)
	want(items, "i8", Never, "nothing changes on the device, because user amy is blocked; otherwise: comes")
	r.exec(`UPDATE waystage.app_user SET blocked = false`)
	r.exec(`UPDATE waystage.device SET blocked = true`)
	want(items, "i8", Never, "because device phone is blocked", "device", "no")
	r.exec(`UPDATE waystage.device SET blocked = false, public_key = NULL`)
	want(items, "i8", Comes, "", "device", "- device phone is not enrolled")
	// A stopped table is said, and decides nothing.
	r.exec(`UPDATE waystage.synced_table SET stopped_code = 'column_missing', stopped_at = now() WHERE table_name = 'item'`)
	want(items, "i7", OnDevice, "", "table", "no public.item is stopped (column_missing)")
	r.exec(`UPDATE waystage.synced_table SET stopped_code = NULL, stopped_at = NULL`)
	// Another group.
	r.exec(`UPDATE waystage.app_user SET groups = '{}'`)
	want(items, "i7", Leaves, "no set of the user has table public.item", "subscription", "no user amy is in no group and has the sets [], none of which has the table; it is in all", "set", "- the device has had set all")
	want(items, "i8", Leaves, "", "subscription", "no") // the device may have it: nobody looked since
	want("public.share", "amy|1", Never, "no set of the user has table public.share", "subscription", "no")
	r.exec(`UPDATE waystage.app_user SET groups = '{staff}'`)
	// The source does not answer.
	e, err := Explain(r.ctx, r.db, nil, errTest, r.cat, items, []string{"i7"}, "amy", "phone")
	if err != nil || e.Outcome != OnDevice || part(e, "source") != "- cannot be asked: "+errTest.Error() {
		t.Fatalf("%+v, %v", e, err)
	}
	for code, ask := range map[string][4]string{
		"unknown_table": {"public.none", "1", "amy", "phone"}, "unknown_user": {items, "1", "nobody", "phone"}, "unknown_device": {items, "1", "amy", "none"},
		"invalid_key": {"public.share", "1", "amy", "phone"},
	} {
		_, err := Explain(r.ctx, r.db, schema.Querier(source), nil, r.cat, ask[0], []string{ask[1]}, ask[2], ask[3])
		var asked *ExplainError
		if !errors.As(err, &asked) || asked.Code != code {
			t.Errorf("%v: %v, want %s", ask, err, code)
		}
	}
	_, err = Explain(r.ctx, r.db, source, nil, r.cat, "public.share", []string{"amy", "x"}, "amy", "phone")
	var asked *ExplainError
	if !errors.As(err, &asked) || asked.Code != "invalid_key" {
		t.Errorf("a key that does not fit: %v", err)
	}
}
