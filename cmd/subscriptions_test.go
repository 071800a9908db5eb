package cmd

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/schema"
)

// write makes a file in the operator's folder.
func (o *operator) write(name, body string) (path string) {
	o.t.Helper()
	path = filepath.Join(o.dir, name)
	if err := os.WriteFile(path, []byte(body), 0o600); err != nil {
		o.t.Fatal(err)
	}
	return path
}

// TestSubscriptionsValidate: what is wrong with a definitions file is said with its place, by the file alone, by the source's
// catalog and by the mirror itself; and nothing is changed.
func TestSubscriptionsValidate(t *testing.T) {
	if got := waystage(t, nil, "", "subscriptions", "schema"); got.code != exitOK || got.out != schema.JSONSchema() || !json.Valid([]byte(got.out)) {
		t.Errorf("%+v", got)
	}
	o := newOperator(t)
	alone := o.write("alone.yaml", "version: 1\nsubscriptions:\n  a: {table: vn.nurse, colums: [id]}\nsets:\n  s: [b]\n")
	got := waystage(t, nil, "", "subscriptions", "validate", alone, "-c", filepath.Join(o.dir, "none.yaml"))
	if got.code != exitUsage || !strings.Contains(got.out, alone+`:3:24: unknown setting "colums"; did you mean "columns"?`) ||
		!strings.Contains(got.out, alone+`:5:7: no subscription "b"`) || !strings.Contains(got.err, "2 problems") {
		t.Errorf("%+v", got)
	}
	o.init()
	o.run(exitUsage, "", "subscriptions validate "+filepath.Join(o.dir, "missing.yaml"))
	o.run(exitPrecondition, "", "subscriptions ls") // nothing is set up yet
	for _, when := range []string{"before the first start", "set up"} {
		if when == "set up" {
			o.serve(nurse.Definitions(), "health.listen=")()
		}
		before := o.at(o.mirror, "SELECT count(*)::text FROM pg_class")
		for _, c := range []struct{ body, at, want string }{
			{"  a: {table: vn.nurze}\n", "", "does not exist at the source"},
			{"  a: {table: vn.nurse, columns: [id, nam]}\n", ":3:38:", `no column "nam"`},
			{"  a:\n    table: vn.visit\n    key: id\n    rows: SELECT id FROM vn.visit WHERE nobody = :user\n", ":6:", `column "nobody" does not exist`},
			{"  a:\n    table: vn.visit\n    key: id\n    rows: SELECT 'x'::xml\n", ":6:", "values of type xml"},
			{"  a:\n    table: vn.visit\n    key: id\n    rows: SELECT name::text::uuid FROM waystage.app_user\n", ":6:",
				map[string]string{"set up": "permission denied", "before the first start": "does not exist"}[when]},
			{"  a:\n    table: vn.visit\n    key: id\n    rows: SELECT id FROM vn.nowhere\n", ":6:", "does not exist"},
		} {
			file := o.write("file.yaml", "version: 1\nsubscriptions:\n"+c.body)
			problems := data[[]schema.Problem](o, exitUsage, "subscriptions validate -o json "+file)
			found := false
			for _, p := range problems {
				found = found || !p.Warning && strings.Contains(p.String(), c.at) && strings.Contains(p.Message, c.want) && (p.Remedy != "" || p.Table != "")
			}
			if !found {
				t.Errorf("%s: %s gave %v", when, c.body, problems)
			}
		}
		// A set whose rows refer to rows that nobody gets.
		file := o.write("file.yaml", "version: 1\nsubscriptions:\n  v: {table: vn.visit}\nsets:\n  s: [v]\n")
		if got := o.run(exitOK, "", "subscriptions validate "+file); !strings.Contains(got.out, "warning: "+file+":5:7: set \"s\" has vn.visit, whose") {
			t.Errorf("%s: %+v", when, got)
		}
		if got := o.run(exitOK, "", "subscriptions validate --offline "+file); got.out != "" || !strings.Contains(got.err, "were not asked") {
			t.Errorf("%s: %+v", when, got)
		}
		if after := o.at(o.mirror, "SELECT count(*)::text FROM pg_class"); after != before {
			t.Errorf("%s: validate made something: %s relations, %s before", when, after, before)
		}
	}
}

// TestSubscriptionsVersions: the file counts at the first start; afterwards the version in the mirror does, and a file that
// differs, or cannot be read, is said.
func TestSubscriptionsVersions(t *testing.T) {
	o := newOperator(t)
	o.init()
	first := nurse.Definitions()
	o.serve(first, "health.listen=")()
	list := data[[]schema.Version](o, exitOK, "subscriptions ls -o json")
	if len(list) != 1 || list[0].Number != 1 || !list[0].Current || list[0].Who != "serve" || list[0].Bytes != len(first) {
		t.Errorf("%+v", list)
	}
	if got := o.run(exitOK, "", "subscriptions export"); got.out != first {
		t.Errorf("exported %q", got.out)
	}
	for _, body := range []string{"version: 1\nsubscriptions:\n  nurses: {table: vn.nurse}\n", "version: 7\n"} {
		o.serve(body, "health.listen=")()
		if got := o.run(exitOK, "", "subscriptions export 1"); got.out != first {
			t.Errorf("exported %q", got.out)
		}
		if list := data[[]schema.Version](o, exitOK, "subscriptions ls -o json"); len(list) != 1 {
			t.Errorf("%+v", list)
		}
	}
	o.write("definitions.yaml", "version: 1\nsubscriptions:\n  nurses: {table: vn.nurse}\n")
	if got := o.run(exitOK, "", "check"); !strings.Contains(got.out, "differs from version 1") {
		t.Errorf("%+v", got)
	}
	shown := data[shownVersion](o, exitOK, "subscriptions show -o json")
	if shown.Number != 1 || len(shown.Subscriptions) == 0 || len(shown.Sets) == 0 || len(shown.Groups) == 0 || len(shown.Subscriptions[0].Sets) == 0 {
		t.Errorf("%+v", shown)
	}
	if got := o.run(exitOK, "", "subscriptions show 1"); !strings.Contains(got.out, "vn.visit") || !strings.Contains(got.err, "in force") {
		t.Errorf("%+v", got)
	}
	o.run(exitPrecondition, "", "subscriptions show 2")
	o.run(exitPrecondition, "", "subscriptions export 2")
	o.run(exitUsage, "", "subscriptions export x")
}

// TestSubscriptionsApply: a file becomes a new version, also with a table more and another key; what is wrong changes nothing;
// an earlier version can be had again.
func TestSubscriptionsApply(t *testing.T) {
	o := newOperator(t)
	o.init()
	stop := o.serve(nurse.Definitions(), "health.listen=")
	defer stop()
	version := func() string { return o.at(o.mirror, "SELECT max(version)::text FROM waystage.definition") }
	few := o.write("few.yaml", "version: 1\nsubscriptions:\n  visits: {table: vn.visit}\n  nurses: {table: vn.nurse}\nsets:\n  all: [visits]\ngroups:\n  nurses: {sets: [all]}\n")
	bad := o.write("bad.yaml", "version: 1\nsubscriptions:\n  visits:\n    table: vn.visit\n    key: id\n    rows: SELECT nothing FROM vn.visit\n")
	o.at(o.source, "CREATE TABLE vn.more (id int PRIMARY KEY, owner text)")
	o.at(o.source, "INSERT INTO vn.more SELECT i, 'o' || i % 3 FROM generate_series(1, 50) i")
	more := o.write("more.yaml", strings.Replace(nurse.Definitions(), "subscriptions:\n", "subscriptions:\n  more:\n    table: vn.more\n    key: owner\n    rows: SELECT :user\n", 1))

	for _, c := range []struct {
		code       int
		line, want string
	}{
		{exitUsage, "subscriptions apply --yes " + bad, bad + ":6:"},
		{exitUsage, "subscriptions apply --yes " + o.write("form.yaml", "version: 3\n"), "version 3 is not known"},
		{exitUsage, "subscriptions apply --yes " + o.dir + "/none.yaml", "none.yaml"},
		{exitUsage, "subscriptions apply " + few, "--yes"}, // nobody can be asked
		{exitPrecondition, "subscriptions rollback --yes", "before version 1"},
		{exitPrecondition, "subscriptions rollback --yes 9", "no version 9"},
		{exitUsage, "subscriptions apply --yes --note " + strings.Repeat("x", schema.MostNote+1), "--note"},
	} {
		if got := o.run(c.code, "", c.line); !strings.Contains(got.err, c.want) {
			t.Errorf("%s: %s", c.line, got.err)
		}
		if got := version(); got != "1" {
			t.Fatalf("%s: version %s", c.line, got)
		}
	}
	if got := o.run(exitOK, "", "subscriptions apply --yes"); !strings.Contains(got.err, "says the same") || version() != "1" {
		t.Errorf("%+v", got)
	}
	o.run(exitOK, "", "subscriptions apply --yes --note trial "+more)
	if got := o.at(o.mirror, "SELECT count(*)::text FROM vn.more"); got != "50" {
		t.Errorf("%s rows were copied", got)
	}
	list := data[[]schema.Version](o, exitOK, "subscriptions ls -o json")
	if len(list) != 2 || list[0].Number != 2 || !list[0].Current || list[0].Note != "trial" || list[0].Who == "" || list[1].Current {
		t.Errorf("%+v", list)
	}
	o.at(o.mirror, "DELETE FROM waystage.tombstone")
	o.at(o.source, "DELETE FROM vn.more WHERE id = 7")
	o.eventually("the tombstone has the key's value", func() bool { return o.at(o.mirror, "SELECT coalesce(max(val), '') FROM waystage.tombstone") == "o1" })
	// Another key: tombstones have its values from the same commit on, and the index is another.
	keyed := o.write("keyed.yaml", strings.Replace(nurse.Definitions(), "subscriptions:\n", "subscriptions:\n  more:\n    table: vn.more\n    key: id\n    rows: SELECT 3\n", 1))
	o.run(exitOK, "", "subscriptions apply --yes "+keyed)
	o.at(o.mirror, "DELETE FROM waystage.tombstone")
	o.at(o.source, "DELETE FROM vn.more WHERE id = 3")
	o.eventually("the tombstone has the other key's value", func() bool { return o.at(o.mirror, "SELECT coalesce(max(val), '') FROM waystage.tombstone") == "3" })
	if got := o.at(o.mirror, "SELECT string_agg(indexdef, ';') FROM pg_indexes WHERE tablename = 'more' AND indexname LIKE '\\_ws%'"); !strings.Contains(got, "(id, _ws_version)") || strings.Contains(got, "owner") {
		t.Errorf("indexes: %s", got)
	}
	o.run(exitOK, "", "subscriptions rollback --yes 1")
	if list := data[[]schema.Version](o, exitOK, "subscriptions ls -o json"); len(list) != 4 || list[0].Note != "back to version 1" || list[0].SHA256 != list[3].SHA256 {
		t.Errorf("%+v", list)
	}
	if got := o.run(exitOK, "", "subscriptions export"); got.out != nurse.Definitions() {
		t.Errorf("%s", got.out)
	}
	o.run(exitOK, "", "subscriptions rollback --yes")
	if list := data[[]schema.Version](o, exitOK, "subscriptions ls -o json"); list[0].SHA256 != list[2].SHA256 {
		t.Errorf("%+v", list)
	}
}

// TestSubscriptionsPlan: a plan names what would change, for whom, and counts the rows as the devices would get them; it changes nothing. Where
// it has no time or no table to count in, it says so.
func TestSubscriptionsPlan(t *testing.T) {
	o := newOperator(t)
	o.init()
	stop := o.serve(nurse.Definitions(), "health.listen=")
	defer stop()
	o.at(o.source, "CREATE TABLE vn.more (id int PRIMARY KEY, owner text)")
	who := nurse.Nurses(2)
	for i, p := range who {
		o.at(o.mirror, "INSERT INTO waystage.app_user (name, password_hash, groups) VALUES ('"+p.Login+"', '!', '{nurses}')")
		for d := range i + 1 { // the second has two devices
			o.at(o.mirror, "INSERT INTO waystage.device (user_name, name, oldest_unsent_at) VALUES ('"+p.Login+"', 'd"+strconv.Itoa(d)+"', now())")
		}
	}
	same := o.write("same.yaml", nurse.Definitions())
	if got := o.run(exitOK, "", "subscriptions plan "+same); !strings.Contains(got.err, "nothing would change") || got.out != "" {
		t.Errorf("%+v", got)
	}
	o.run(exitUsage, "", "subscriptions plan "+o.write("bad.yaml", "version: 1\nsubscriptions:\n  a: {table: vn.nowhere}\n"))
	o.run(exitUsage, "", "subscriptions plan --within 0s "+same)

	body := strings.Replace(nurse.Definitions(), "where n.login = :user", "where n.login = :user and a.patient_id % 2 = 0", 1)
	body = strings.Replace(body, "columns: [id, login, name, phone, active]", "columns: [id, login, name, hired]", 1)
	body = strings.Replace(body, "field: [colleagues, medications, ", "field: [colleagues, more, ", 1)
	body = strings.Replace(body, "subscriptions:\n", "subscriptions:\n  more: {table: vn.more, key: owner, rows: 'select :user'}\n", 1)
	file := o.write("next.yaml", body)
	plan := data[schema.Plan](o, exitDiffers, "subscriptions plan -o json --within 5m "+file)
	if plan.From != 1 || plan.Users != 2 || plan.Devices != 3 || plan.Unsent != 3 || len(plan.Refresh) != 1 || plan.Refresh[0].Devices != 3 {
		t.Errorf("%+v", plan)
	}
	changed := map[string]string{}
	for _, c := range plan.Changes {
		changed[c.Kind+" "+c.Name] = c.Action
	}
	if changed["subscription more"] != "add" || changed["subscription patients"] != "change" || changed["set field"] != "change" || changed["group nurses"] != "" {
		t.Errorf("%v", changed)
	}
	if len(plan.Tables) != 1 || plan.Tables[0].Table != "vn.more" || plan.Tables[0].Action != "copy" {
		t.Errorf("%+v", plan.Tables)
	}
	rows := map[string]schema.PlanRows{}
	for _, r := range plan.Rows {
		rows[r.Table] = r
	}
	odd := o.at(o.mirror, "SELECT sum(CASE n.login WHEN '"+who[0].Login+"' THEN 1 ELSE 2 END)::text FROM vn.assignment a JOIN vn.nurse n ON n.id = a.nurse_id WHERE a.patient_id % 2 = 1 AND n.id <= 2")
	if r := rows["vn.patient"]; strconv.FormatInt(r.Leave, 10) != odd || odd == "0" || r.Enter != 0 || r.How != schema.PlanExact || r.Devices != 3 || r.Users != 2 {
		t.Errorf("%s patients leave: %+v", odd, r)
	}
	medications := o.at(o.mirror, "SELECT (3 * count(*))::text FROM vn.medication")
	if r := rows["vn.medication"]; r.Set != "" || r.Was != "field" || strconv.FormatInt(r.Leave, 10) != medications {
		t.Errorf("%s medications leave: %+v", medications, r)
	}
	if r := rows["vn.nurse"]; strings.Join(r.Gained, ",") != "hired" || strings.Join(r.Lost, ",") != "phone,active" || r.Enter+r.Leave != 0 {
		t.Errorf("%+v", r)
	}
	if r := rows["vn.more"]; r.How != schema.PlanUnknown {
		t.Errorf("%+v", r)
	}
	got := o.run(exitDiffers, "", "subscriptions plan "+file)
	for _, want := range []string{"subscription patients", "is copied", "+hired -phone -active", "field -> -", "not known"} {
		if !strings.Contains(got.out, want) {
			t.Errorf("%q is missing in\n%s", want, got.out)
		}
	}
	short := data[schema.Plan](o, exitDiffers, "subscriptions plan -o json --within 1ns "+file)
	for _, r := range short.Rows {
		if r.Table == "vn.patient" && r.How == schema.PlanExact {
			t.Errorf("counted in no time: %+v", r)
		}
	}
	if got := o.at(o.mirror, "SELECT max(version)::text FROM waystage.definition"); got != "1" {
		t.Errorf("version %s", got)
	}
	if got := o.at(o.mirror, "SELECT coalesce(to_regclass('vn.more')::text, 'none')"); got != "none" {
		t.Errorf("plan made a table")
	}
}

// TestPlanOfFiles: a plan names what changes of file subscriptions, and counts the files that enter and leave, with their size.
func TestPlanOfFiles(t *testing.T) {
	o := newOperator(t)
	o.init()
	files := "files:\n  manuals: {path: manuals/**}\n  photos: {path: 'photos/{key}/**', rows: 'select :user'}\n"
	with := func(files, set string) string {
		return strings.Replace(strings.Replace(nurse.Definitions(), "sets:\n", files+"sets:\n", 1), "field: [", "field: ["+set, 1)
	}
	first := with(files, "manuals, photos, ")
	stop := o.serve(first, "health.listen=")
	defer stop()
	for i, p := range nurse.Nurses(2) {
		o.at(o.mirror, "INSERT INTO waystage.app_user (name, password_hash, groups) VALUES ('"+p.Login+"', '!', '{nurses}')")
		for d := range i + 1 { // the second has two devices
			o.at(o.mirror, "INSERT INTO waystage.device (user_name, name) VALUES ('"+p.Login+"', 'd"+strconv.Itoa(d)+"')")
		}
		o.at(o.mirror, fmt.Sprintf(`WITH b AS (INSERT INTO waystage.blob (sha256, size, chunks) VALUES (sha256('photo %[1]d'), 1000, '{}') RETURNING sha256)
			INSERT INTO waystage.file (path, sha256, size) SELECT 'photos/%[2]s/' || n || '.jpg', sha256, 1000 FROM b, generate_series(1, 3) n`, i, p.Login))
	}
	o.at(o.mirror, `WITH b AS (INSERT INTO waystage.blob (sha256, size, chunks) VALUES (sha256('manual'), 50, '{}') RETURNING sha256)
		INSERT INTO waystage.file (path, sha256, size) SELECT 'manuals/' || n || '.pdf', sha256, 50 FROM b, generate_series(1, 4) n`)
	o.at(o.mirror, `INSERT INTO waystage.file (path) VALUES ('manuals/removed.pdf')`)

	if got := o.run(exitOK, "", "subscriptions plan "+o.write("same.yaml", first)); !strings.Contains(got.err, "nothing would change") {
		t.Errorf("%+v", got)
	}
	next := strings.Replace(first, "rows: 'select :user'", "rows: \"select 'nobody' union select n.login from vn.nurse n where n.login <> :user and n.id <= 2\"", 1)
	next = strings.Replace(next, "path: manuals/**", "path: manuals/1*", 1)
	file := o.write("next.yaml", next)
	plan := data[schema.Plan](o, exitDiffers, "subscriptions plan -o json "+file)
	want := []schema.PlanFiles{
		{Subscription: "manuals", Was: "field", Set: "field", Users: 2, Devices: 3, Leave: 3 * 3, How: schema.PlanExact},
		{Subscription: "photos", Was: "field", Set: "field", Users: 2, Devices: 3, Enter: 3 * 3, Leave: 3 * 3, Bytes: 3 * 3 * 1000, How: schema.PlanExact},
	}
	if !slices.Equal(plan.Files, want) || plan.Users != 2 || plan.Devices != 3 {
		t.Errorf("%+v\nwant %+v", plan.Files, want)
	}
	var changed []string
	for _, c := range plan.Changes {
		changed = append(changed, c.Kind+" "+c.Name+": "+c.Action)
	}
	if !slices.Equal(changed, []string{"file subscription manuals: change", "file subscription photos: change"}) {
		t.Errorf("%q", changed)
	}
	got := o.run(exitDiffers, "", "subscriptions plan "+file)
	for _, want := range []string{"file subscription photos", "path: manuals/** -> manuals/1*", "photos", "8.8 KiB"} {
		if !strings.Contains(got.out, want) {
			t.Errorf("%q is missing in\n%s", want, got.out)
		}
	}
	// Gone altogether, and no time to count.
	without := o.write("without.yaml", nurse.Definitions())
	if plan := data[schema.Plan](o, exitDiffers, "subscriptions plan -o json "+without); len(plan.Files) != 2 || plan.Files[0].Leave != 4*3 || plan.Files[0].Set != "" || plan.Files[1].Leave != 3*3 {
		t.Errorf("%+v", plan.Files)
	}
	if plan := data[schema.Plan](o, exitDiffers, "subscriptions plan -o json --within 1ns "+without); len(plan.Files) != 2 || plan.Files[0].How != schema.PlanUnknown {
		t.Errorf("%+v", plan.Files)
	}
}
