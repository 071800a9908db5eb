package schema

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/internal/pgtest"
)

const good = `version: 1
subscriptions:
  patients:
    table: public.patient
    columns: [id, name]
    key: id
    rows: |
      select patient_id from public.assignment  -- :user in a comment; ' too
      where nurse = :user
  assignments: {table: public.assignment, direction: download-only}
  notes: {table: public.note, direction: upload-only, allow: [delete, insert]}
sets:
  care: [patients, notes]
  office: [assignments]
groups:
  nurses: {sets: [care, office]}
  office: {sets: [office]}
`

func TestParseDefinitions(t *testing.T) {
	d := define(t, good)
	p := d.subscription("patients")
	if p.Direction != TwoWay || p.Allow != "IUD" || !p.Allows("U") || p.Allows("") || !p.Downloads() || p.Table != "public.patient" || !slices.Equal(p.Columns, []string{"id", "name"}) {
		t.Errorf("%+v", p)
	}
	if a := d.subscription("assignments"); a.Allow != "" || a.Direction != DownloadOnly {
		t.Errorf("%+v", a)
	}
	if n := d.subscription("notes"); n.Allow != "ID" || n.Downloads() {
		t.Errorf("%+v", n)
	}
	for text, want := range map[string]Subscription{
		"":                                    {Conflict: ConflictReject},
		", conflict: reject":                  {Conflict: ConflictReject},
		", conflict: columns":                 {Conflict: ConflictColumns},
		", conflict: last-writer":             {Conflict: ConflictLastWriter},
		", conflict: source":                  {Conflict: ConflictSource},
		", conflict: {function: care.decide}": {Conflict: ConflictFunction, Function: "care.decide"},
	} {
		n := define(t, strings.Replace(good, "[delete, insert]", "[delete, insert]"+text, 1)).subscription("notes")
		if n.Conflict != want.Conflict || n.Function != want.Function {
			t.Errorf("%q: %+v", text, n)
		}
	}
	equal(t, d.SetsFor([]string{"office", "nurses", "nobody"}), []string{"office", "care"})
	equal(t, d.TableNames(), []string{"public.assignment", "public.note", "public.patient"})
	if len(d.SubscriptionsOf("care")) != 2 || d.SubscriptionsOf("x") != nil || !d.HasGroup("nurses") || d.HasGroup("x") || len(d.Conflicts([]string{"nurses", "office"})) != 0 {
		t.Error("sets and groups")
	}
}

// Each mistake is reported at its place, with a remedy.
func TestParseDefinitionsProblems(t *testing.T) {
	for _, c := range []struct{ from, to, want string }{
		{"table: public.patient", "tabel: public.patient", `4:5: unknown setting "tabel"; did you mean "table"?`},
		{"table: public.patient", "table:", "4:11: a text is missing"},
		{"table: public.patient", "table: [a]", "4:12: a text is missing"},
		{"    table: public.patient\n", "", `3:3: subscription "patients" has no table`},
		{"version: 1", "version: 2", "1:10: version 2 is not known; this program reads version 1"},
		{"version: 1\n", "", "version is missing"},
		{"subscriptions:", "subscription:", `2:1: unknown setting "subscription"; did you mean "subscriptions"?`},
		{"    key: id\n", "", "3:3: subscription \"patients\" has only one of key and rows"},
		{"    key: id", "    key: id\n    key: x", "7:5: \"key\" is given twice; the first is in line 6"},
		{"[id, name]", "[id, id]", "5:19: \"id\" is given twice"},
		{"[id, name]", "[]", "5:14: columns is empty"},
		{"[id, name]", "id", "5:14: a list is missing"},
		{":user\n", ":usr\n", "9:21: rows: unknown parameter :usr"},
		{":user\n", ":user;\n", "9:26: rows: more than one statement"},
		{":user\n", "(:user\n", "10:7: rows: an opening parenthesis"},
		{":user\n", "$1\n", "9:21: rows: a numbered parameter"},
		{":user\n", "'x\n", "9:21: rows: a string that does not end"},
		{"download-only", "down", `10:54: unknown direction "down"; one of two-way, download-only, upload-only`},
		{"direction: download-only", "direction: download-only, allow: [insert]", "10:76: a download-only subscription allows no uploads"},
		{"allow: [delete, insert]", "reject: both", `11:63: unknown reject unit "both"; one of record, transaction`},
		{"allow: [delete, insert]", "reject: transactions", `11:63: unknown reject unit "transactions"; did you mean "transaction"?`},
		{"allow: [delete, insert]", "reject: [record]", "11:63: a text is missing here; write record or transaction"},
		{"direction: download-only", "direction: download-only, reject: transaction", "10:77: a download-only subscription has no uploads to reject"},
		{"allow: [delete, insert]", "conflict: both", `11:65: unknown conflict policy "both"; one of reject, columns, last-writer, source`},
		{"allow: [delete, insert]", "conflict: column", `11:65: unknown conflict policy "column"; did you mean "columns"?`},
		{"allow: [delete, insert]", "conflict: function", "11:65: conflict: function needs the function's name"},
		{"allow: [delete, insert]", "conflict: [columns]", "11:65: a text is missing here"},
		{"allow: [delete, insert]", "conflict: {}", "11:65: conflict is empty"},
		{"allow: [delete, insert]", "conflict: {functio: a.b}", `11:66: unknown setting "functio"; did you mean "function"?`},
		{"allow: [delete, insert]", "conflict: {function: b}", `11:76: "b" is not the full name of a function`},
		{"allow: [delete, insert]", "conflict: {function: waystage.b}", "11:76: schema waystage is Waystage's own"},
		{"direction: download-only", "direction: download-only, conflict: columns", "10:79: a download-only subscription has no uploads that could conflict"},
		{"[delete, insert]", "[delete, upsert]", `11:71: unknown operation "upsert"`},
		{"care: [patients, notes]", "care: [patient, notes]", `13:10: no subscription "patient"; did you mean "patients"?`},
		{"care: [patients, notes]", "care: []", `13:9: set "care" is empty`},
		{"{sets: [care, office]}", "{sets: [car, office]}", `16:19: no set "car"; did you mean "care"?`},
		{"{sets: [care, office]}", "{set: [care, office]}", `16:12: unknown setting "set"; did you mean "sets"?`},
		{"  care: [patients", "  Care: [patients", `13:3: "Care" cannot be the name of a set`},
		{"table: public.note,", "table: public.patient,", `13:20: set "care" has table public.patient twice, by "patients" and "notes"`},
		{"office: [assignments]", "office: [assignments, patients]", `16:25: group "nurses" gets table public.patient twice, by the sets "care" and "office"`},
		{"sets:\n", "sets:\n\t", "13:1: not YAML"},
		{good, "", "the file is empty"},
		{good, "# nothing\n", "the file is empty"},
		{good, "- a\n", "1:1: the file must be a mapping"},
		{"groups:", "---\ngroups:", "a second document"},
	} {
		d, problems := ParseDefinitions("d.yaml", []byte(strings.Replace(good, c.from, c.to, 1)))
		found := slices.ContainsFunc(problems, func(p Problem) bool { return strings.Contains(p.String(), c.want) && p.Remedy != "" })
		if d != nil || !found {
			t.Errorf("%q for %q: want %q, got %v", c.to, c.from, c.want, problems)
		}
	}
}

func TestCheck(t *testing.T) {
	tables := []*Table{
		{Schema: "public", Name: "patient", Key: []string{"id"}, Columns: []Column{{Name: "id", Type: "integer", MirrorType: "integer", NotNull: true}, {Name: "name", Type: "text", MirrorType: "text"},
			{Name: "NAME", Type: "text", MirrorType: "text"}, {Name: "doc", Type: "json", MirrorType: "json"}, {Name: "must", Type: "text", MirrorType: "text", NotNull: true}}},
		{Schema: "public", Name: "note", Key: []string{"id"}, Columns: []Column{{Name: "id", Type: "integer", MirrorType: "integer", NotNull: true}}},
		{Schema: "public", Name: "NOTE", Key: []string{"id"}, Columns: []Column{{Name: "id", Type: "integer", MirrorType: "integer", NotNull: true}}},
	}
	d := define(t, good)
	problems := d.Check(tables)
	if len(problems) != 1 || !problems[0].Warning || !strings.Contains(problems[0].String(), `leaves out "must"`) {
		t.Errorf("%v", problems)
	}
	if q := d.subscription("patients").KeyQuery("u.name", "u.attributes"); !strings.Contains(q, "where nurse = ((u.name)::pg_catalog.text)") || !strings.Contains(q, "-- :user in a comment") || !strings.Contains(q, "q.k::integer") {
		t.Error(q)
	}
	for _, c := range []struct{ from, to, want string }{
		{"[id, name]", "[id, nmae]", `5:19: public.patient has no column "nmae" (or it is generated, and computed where it is needed); did you mean "name"?`},
		{"[id, name]", "[name]", `5:14: columns leaves out "id", which is part of the primary key of public.patient; add "id"`},
		{"[id, name]", "[id, name, NAME]", `3:3: the columns "name" and "NAME" of public.patient differ in case only`},
		{"key: id", "key: idd", `6:10: public.patient has no column "idd"; did you mean "id"?`},
		{"key: id", "key: doc", `6:10: the key "doc" is of type json`},
		{"key: id", "key: must", `columns leaves out the key "must"`},
		{"table: public.assignment,", "key: name, rows: select 1, table: public.patient,", `10:22: public.patient has the key "name" here and "id" in subscription "patients"`},
		{"[patients, notes]", "[notes, caps]", `13:17: public.NOTE and public.note differ in case only`},
	} {
		body := strings.Replace(good, c.from, c.to, 1)
		body = strings.Replace(body, "sets:\n  care", "  caps: {table: public.NOTE}\nsets:\n  care", 1)
		if strings.Contains(c.to, "table: public.patient,") {
			body = strings.Replace(body, "{sets: [care, office]}", "{sets: [care]}", 1)
		}
		if strings.Contains(c.want, "13:") {
			c.want = strings.Replace(c.want, "13:", "14:", 1)
		}
		problems := define(t, body).Check(tables)
		if !slices.ContainsFunc(problems, func(p Problem) bool { return strings.Contains(p.String(), c.want) && p.Remedy != "" && !p.Warning }) {
			t.Errorf("%q for %q: want %q, got %v", c.to, c.from, c.want, problems)
		}
	}
}

// The mirror itself judges the queries; its complaint is reported at the place in the file.
func TestCheckLive(t *testing.T) {
	ctx := testContext(t)
	d := define(t, `version: 1
subscriptions:
  a:
    table: public.a
    key: owner
    rows: |
      select owner from public.a
      where t = :user or t = :user.region
  plain: {table: public.plain}
  attribute: {table: public.a, key: owner, rows: "select owner from public.a where t = :user.region"}
`)
	_, _, tables, dsn := mirrored(t, d, "CREATE TABLE public.a (id int PRIMARY KEY, owner bigint, t text)", "CREATE TABLE public.plain (id int PRIMARY KEY)")
	conn := connect(t, dsn)
	if problems, err := d.CheckLive(ctx, conn); err != nil || len(problems) > 0 {
		t.Fatal(problems, err)
	}
	rows := "|\n      select owner from public.a\n      where t = :user or t = :user.region\n"
	for _, c := range []struct{ rows, want string }{
		{"|\n      select owner from public.a\n      where tt = :user\n", `8:13: rows: column "tt" does not exist`},
		{"|\n      select owner\n      from\n        a\n", `9:9: rows: relation "a" does not exist; write tables with their schema`},
		{"select owner from public.a where :user = 'ü' and owner = :user", "6:66: rows: operator does not exist"},
		{"select owner from public.a where owner = :user", "cast them, e.g. :user::int"},
		{"select name from waystage.app_user", "permission denied"},
		{"select owner, t from public.a", "rows gives 2 columns"},
		{"select t from public.a", "rows gives values of type text, but the key public.a.owner is bigint; cast in the query: (...)::bigint"},
		{"delete from public.a returning owner", "rows: "},
		{"with x as (delete from public.a returning owner) select owner from x", "rows: "},
		{"select owner from public.a for update", "rows: "},
		{"select 1 where (:user", "an opening parenthesis"},
		{"drop table public.a", "rows gives 0 columns"},
		{"select", "rows gives 0 columns"},
		{"\"select 1 from\\n nowhere\"", "rows: relation \"nowhere\""},
	} {
		body := strings.Replace(d.Body, rows, c.rows+"\n", 1)
		bad, problems := ParseDefinitions("d.yaml", []byte(body))
		if bad != nil {
			bad.Check(tables)
			var err error
			if problems, err = bad.CheckLive(ctx, conn); err != nil {
				t.Fatal(err)
			}
		}
		if len(problems) != 1 || !strings.Contains(problems[0].String(), c.want) || problems[0].Remedy == "" {
			t.Errorf("%q: want %q, got %v", c.rows, c.want, problems)
		}
	}
	for _, good := range []string{"select 1", "select id from public.a", "select owner from public.a where t = :user -- end", "values (:user::int), ((:user.x)::int)", "select owner from public.a union select 3 order by 1 limit 5",
		"with x as (select 1) select * from x", "select unnest(array[1,2])", "select length($$:user$$) from public.plain"} {
		g := define(t, strings.Replace(d.Body, rows, yamlText(good)+"\n", 1))
		g.Check(tables)
		if problems, err := g.CheckLive(ctx, conn); err != nil || len(problems) != 0 {
			t.Errorf("%s: %v %v", good, problems, err)
		}
	}
	// One user, or many at once; text in the form of the wire; null is nobody's.
	exec(t, conn, "INSERT INTO public.a VALUES (1, 10, 'ann'), (2, 20, 'bob'), (3, 30, 'north'), (4, NULL, 'ann'), (5, 10, 'ann')")
	s := d.subscription("a")
	equal(t, column(t, conn, "SELECT key FROM ("+s.KeyQuery("$1", "$2")+") x ORDER BY 1", "ann", `{"region": "north"}`), []string{"10", "30"})
	equal(t, column(t, conn, "SELECT u.name || ' ' || k.key FROM unnest($1::text[], $2::text[]) u(name, attributes) CROSS JOIN LATERAL ("+s.KeyQuery("u.name", "u.attributes")+") k ORDER BY 1",
		[]string{"ann", "bob", "eve"}, []string{"{}", `{"region": "north"}`, "{}"}), []string{"ann 10", "bob 20", "bob 30"})
}

func TestWire(t *testing.T) {
	d := define(t, `version: 1
subscriptions:
  c: {table: public.c, columns: [id, p], key: p, rows: select 1, allow: [insert]}
  p: {table: public.p, direction: download-only}
sets: {s: [c, p], only: [c]}
`)
	_, _, tables, _ := mirrored(t, d, "CREATE TABLE public.p (id int PRIMARY KEY, name text NOT NULL DEFAULT 'x' UNIQUE)",
		"CREATE TABLE public.c (id int PRIMARY KEY, p int REFERENCES public.p, other int, UNIQUE (p, id), UNIQUE (other))")
	w := d.Wire("s", tables)
	if len(w.Tables) != 2 || w.Tables[0].Name != "public.c" || len(w.Tables[0].Columns) != 2 || w.Tables[0].Operations != "I" || w.Tables[0].SubsetKey != "p" || w.Tables[1].Operations != "" ||
		fmt.Sprint(w.Tables[0].Unique) != "[[p id]]" || len(w.Tables[0].Foreign) != 1 || w.Tables[1].Columns[1].Default != "x" || !w.Tables[1].Columns[1].NotNull {
		t.Errorf("%+v", w)
	}
	if again := d.Wire("s", tables); again.Hash != w.Hash || len(w.Hash) != 16 {
		t.Error("the hash is not stable")
	}
	only := d.Wire("only", tables)
	if only.Hash == w.Hash || len(only.Tables[0].Foreign) != 0 {
		t.Errorf("%+v", only)
	}
	if d.Wire("none", tables) != nil {
		t.Error("a set that does not exist is described")
	}
}

// The demonstration's definitions and data pass everything.
func TestNurseDefinitions(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source := connect(t, sourceDSN)
	if err := nurse.Load(ctx, source, nurse.Size{Nurses: 3, Patients: 30, Records: 100}); err != nil {
		t.Fatal(err)
	}
	d := define(t, nurse.Definitions())
	r, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: d})
	if err != nil {
		t.Fatal(err)
	}
	mirror := connect(t, mirrorDSN)
	for _, tbl := range r.Tables {
		if n := sameContents(t, source, mirror, tbl); n == 0 {
			t.Errorf("%s is empty", tbl.FullName())
		}
	}
	for _, p := range r.Warnings {
		t.Log(p)
	}
}

// What only the parser sees of file subscriptions, with its place.
func TestParseFiles(t *testing.T) {
	d, problems := ParseDefinitions("d.yaml", []byte("version: 1\nfiles:\n  wounds: {path: \"patients/{key}/**\", rows: \"select :user\", upload: true, max_size: 10 MiB}\n  all: {path: \"**\"}\nsets: {s: [wounds, all]}\ngroups: {g: {sets: [s]}}\n"))
	if d == nil || len(problems) > 0 {
		t.Fatal(problems)
	}
	f := d.FilesFor([]string{"g"})
	if len(f) != 2 || f[0].MaxSize != 10<<20 || !f[0].Upload || f[1].Upload || f[0].KeyQuery("$1", "$2") == "" || f[1].KeyQuery("$1", "$2") != "" {
		t.Errorf("%+v", f)
	}
	if w := d.Wire("s", nil); w == nil || len(w.Files) != 2 || w.Files[0].MaxSize != 10<<20 || w.Files[1].MaxSize != 0 {
		t.Errorf("%+v", w)
	}
	for body, want := range map[string]string{
		"version: 1\nfiles: {f: {path: a**}}\n":                                       "d.yaml:2:19",
		"version: 1\nfiles: {f: {path: ../x}}\n":                                      "d.yaml:2:19",
		"version: 1\nfiles: {f: {path: \"{key}/*\", rows: select 1; select 2}}\n":     "rows:",
		"version: 1\nsubscriptions: {f: {table: a.b}}\nfiles: {f: {path: x}}\n":       "name of a subscription, too",
		"version: 1\nfiles: {f: {path: x}}\nsets: {s: [g]}\n":                         "no subscription \"g\"",
		"version: 1\nfiles: {f: {path: x, upload: true, max_size: 65GiB}}\n":          "max_size",
		"version: 1\nfiles: {f: {path: \"{key}/x\"}}\n":                               "no rows",
		"version: 1\nfiles: {f: {path: x, rows: select 1}}\n":                         "no {key}",
		"version: 1\nsubscriptions: {s: {table: a.b, file: before}}\n":                "file_column",
		"version: 1\nsubscriptions: {s: {table: a.b, file: befor, file_column: c}}\n": "unknown file rule",
	} {
		d, problems := ParseDefinitions("d.yaml", []byte(body))
		if d != nil || len(problems) != 1 || !strings.Contains(problems[0].String(), want) {
			t.Errorf("%s: %v, want one with %q", body, problems, want)
		}
	}
}
