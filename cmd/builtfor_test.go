package cmd

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/stages"
)

// editionOf has the given columns of patients and records, settings of the records, and subscriptions that are in the set beside them.
func editionOf(patients, records, settings, more string) string {
	return fmt.Sprintf(`version: 1
subscriptions:
  patients: {table: vn.patient, columns: [%s], allow: [update]}
  records: {table: vn.medical_record, columns: [%s]%s}
  visits: {table: vn.visit, columns: [id, patient_id, remarks]}
sets:
  field: [patients, records%s]
groups:
  nurses: {sets: [field]}
`, patients, records, settings, more)
}

// columns are a device's columns of its tables, as the application finds them.
func (o *operator) columns(dev string) map[string]string {
	o.t.Helper()
	d, err := device.Open(o.t.Context(), strings.TrimPrefix(dev, " --file "), device.Options{})
	if err != nil {
		o.t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	rows, err := d.DB().Query(`SELECT m.name, group_concat(c.name, ' ') FROM sqlite_master m, pragma_table_info(m.name) c
		WHERE m.type = 'table' AND m.name NOT LIKE '\_ws%' ESCAPE '\' AND m.name NOT LIKE 'sqlite%' AND m.name <> 'waystage_unit' GROUP BY m.name`)
	if err != nil {
		o.t.Fatal(err)
	}
	defer func() { _ = rows.Close() }()
	out := map[string]string{}
	for rows.Next() {
		var table, columns string
		if err := rows.Scan(&table, &columns); err != nil {
			o.t.Fatal(err)
		}
		out[table] = columns
	}
	if err := rows.Err(); err != nil {
		o.t.Fatal(err)
	}
	return out
}

// value reads one value of a device's file.
func (o *operator) value(dev, q string) (s string) {
	o.t.Helper()
	d, err := device.Open(o.t.Context(), strings.TrimPrefix(dev, " --file "), device.Options{})
	if err != nil {
		o.t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	var v sql.NullString
	if err := d.DB().QueryRow(q).Scan(&v); err != nil {
		o.t.Fatalf("%s: %v", q, err)
	}
	return v.String
}

// Old and new versions of an application side by side: the old one gets what it was built for, whatever is added; neither resets what the
// other writes; what does not fit any more is rejected record by record, and the operator sees beforehand whom it hits.
func TestApplicationsOfDifferentAge(t *testing.T) {
	o := newOperator(t)
	o.init()
	o.at(o.source, "ALTER TABLE vn.medical_record ALTER COLUMN weight SET DEFAULT 71.5")
	stop := o.serve(editionOf("id, name, remarks", "id, patient_id, nurse_id, taken, pulse, note", "", ""), "health.listen=")
	t.Cleanup(stop)
	dev := map[string]string{}
	for _, who := range []string{"amina/phone", "bruno/tablet"} {
		user, name, _ := strings.Cut(who, "/")
		o.run(exitOK, testPassword, "users add "+user+" --group nurses")
		dev[name] = " --file " + filepath.Join(o.dir, user+".db")
		o.run(exitOK, testPassword, "device enrol --server nats://"+o.nats+" --user "+user+" --device "+name+dev[name])
	}
	phone, tablet := dev["phone"], dev["tablet"]
	sync := func(code int, dev string) device.Report {
		t.Helper()
		return data[device.Report](o, code, "device sync --wait source -o json"+dev)
	}

	// The developer prints what the application is built for, and the application names it.
	o.run(exitPrecondition, "", "subscriptions built-for nowhere")
	text := o.run(exitOK, "", "subscriptions built-for field").out
	built, err := protocol.ParseBuilt([]byte(text))
	if err != nil || built.Name != "version 1" || len(built.Tables) != 2 || !slices.Equal(built.Tables[0].Columns, []string{"id", "name", "remarks"}) {
		t.Fatalf("%v: %s", err, text)
	}
	o.run(exitUsage, "", "device built-for "+o.write("bad.json", `{"tables": [{"table": "a.b", "colums": []}]}`)+phone)
	o.run(exitOK, "", "device built-for "+o.write("built-for.json", text)+phone)
	if got := o.run(exitOK, "", "device built-for"+phone); !strings.Contains(got.out, "id, name, remarks") || !strings.Contains(got.err, "version 1") {
		t.Errorf("%+v", got)
	}
	sync(exitOK, phone)
	sync(exitOK, tablet)
	before := o.columns(phone)
	if before["patient"] != "id name remarks" || len(before) != 2 || o.columns(tablet)["patient"] != before["patient"] {
		t.Fatalf("%v", before)
	}

	// Columns and a table are added. Who is concerned is told before.
	second := o.write("second.yaml", editionOf("id, name, remarks, address", "id, patient_id, nurse_id, taken, pulse, note, urgent, weight", "", ", visits"))
	plan := data[schema.Plan](o, exitDiffers, "subscriptions plan -o json "+second)
	if len(plan.Built) != 2 || plan.Built[0].Hash != "" || plan.Built[0].Devices != 1 || plan.Built[1].Name != "version 1" || plan.Built[1].Devices != 1 || plan.Built[1].Concern != 0 {
		t.Errorf("%+v", plan.Built)
	}
	if len(plan.Refresh) != 1 || plan.Refresh[0].Devices != 1 { // not the phone
		t.Errorf("%+v", plan.Refresh)
	}
	o.run(exitOK, "", "subscriptions apply --yes "+second)
	if rep := sync(exitOK, phone); rep.Rows != 0 {
		t.Errorf("%d rows came", rep.Rows)
	}
	sync(exitOK, tablet)
	sync(exitOK, tablet) // the refresh that fills what has come
	if got := o.columns(phone); fmt.Sprint(got) != fmt.Sprint(before) {
		t.Errorf("the old application has %v", got)
	}
	if got := o.columns(tablet); !strings.Contains(got["patient"], "address") || got["visit"] == "" {
		t.Errorf("the new application has %v", got)
	}
	patient := o.value(phone, "SELECT min(id) FROM patient")
	o.exec(tablet, "UPDATE patient SET address = 'Hill 1' WHERE id = "+patient)
	sync(exitOK, tablet)
	sync(exitOK, phone)
	const record = "0e000000-0000-4000-8000-000000000001"
	o.exec(phone, "UPDATE patient SET remarks = 'dog' WHERE id = "+patient+
		"; INSERT INTO medical_record (id, patient_id, nurse_id, taken, note) VALUES ('"+record+"', "+patient+", 1, '2026-01-01 00:00:00+00', 'old app')")
	sync(exitOK, phone)
	o.eventually("both edits are at the source", func() bool {
		return o.at(o.source, "SELECT coalesce(max(address || ' ' || remarks), '') FROM vn.patient WHERE id = "+patient) == "Hill 1 dog" &&
			o.at(o.source, "SELECT coalesce(max(note || ' ' || weight || ' ' || urgent), '') FROM vn.medical_record WHERE id = '"+record+"'") == "old app 71.50 false"
	})
	o.exec(tablet, "UPDATE medical_record SET weight = '60' WHERE id IN (SELECT id FROM medical_record WHERE id <> '"+record+"' LIMIT 1)")
	o.eventually("the new application has what the source filled in", func() bool {
		sync(exitOK, tablet)
		return o.value(tablet, "SELECT coalesce(max(weight || ' ' || urgent), '') FROM medical_record WHERE id = '"+record+"'") == "71.50 0"
	})
	o.exec(phone, "UPDATE medical_record SET note = 'still old app' WHERE id = '"+record+"'")
	o.eventually("an update leaves alone what the old application does not know", func() bool {
		sync(exitOK, phone)
		return o.at(o.source, "SELECT note || ' ' || weight FROM vn.medical_record WHERE id = '"+record+"'") == "still old app 71.50"
	})

	// The operator sees which is which.
	if d := data[registry.DeviceDetail](o, exitOK, "devices show amina/phone -o json"); d.Built == nil || d.Built.Name != "version 1" || len(d.Built.Hash) != 64 {
		t.Errorf("%+v", d.Built)
	}
	if got := o.run(exitOK, "", "devices show amina/phone").out; !strings.Contains(got, "built for: version 1 (") {
		t.Errorf("%s", got)
	}
	if got := o.run(exitOK, "", "devices show bruno/tablet").out; !strings.Contains(got, "built for: everything") {
		t.Errorf("%s", got)
	}
	hash := plan.Built[1].Hash[:8]
	if l := data[[]registry.Device](o, exitOK, "devices ls --built-for "+hash+" -o json"); len(l) != 1 || l[0].Name != "phone" {
		t.Errorf("%+v", l)
	}
	if got := o.run(exitOK, "", "devices ls").out; !strings.Contains(got, "version 1") {
		t.Errorf("%s", got)
	}
	visit := o.at(o.source, "SELECT min(id::text) FROM vn.visit")
	for who, want := range map[string]stages.Outcome{"amina/phone": stages.Never, "bruno/tablet": stages.OnDevice} {
		e := data[stages.Explanation](o, exitOK, "explain row vn.visit "+visit+" --device "+who+" -o json")
		if e.Outcome != want || want == stages.Never && !strings.Contains(e.Summary, "was not built for table vn.visit") {
			t.Errorf("%s: %s: %s", who, e.Outcome, e.Summary)
		}
	}
	if got := o.run(exitOK, "", "explain row vn.patient "+patient+" --device amina/phone").out; !strings.Contains(got, `built for "version 1"`) || !strings.Contains(got, "id, name, remarks; not: ") {
		t.Errorf("%s", got)
	}

	// What no longer fits: a column has left, records are not to be uploaded any more. What fits goes through beside it.
	second2 := o.value(phone, "SELECT min(id) FROM patient WHERE id > "+patient)
	o.exec(phone, "UPDATE patient SET remarks = 'lost' WHERE id = "+patient+"; UPDATE patient SET name = 'Kept' WHERE id = "+second2+
		"; UPDATE medical_record SET note = 'too late' WHERE id = '"+record+"'")
	third := o.write("third.yaml", editionOf("id, name, address", "id, patient_id, nurse_id, taken, pulse, note, urgent, weight", ", direction: download-only", ", visits"))
	plan = data[schema.Plan](o, exitDiffers, "subscriptions plan -o json "+third)
	if len(plan.Built) != 2 || plan.Built[1].Concern != 1 || !slices.Equal(plan.Built[1].Lost, []string{"vn.patient.remarks"}) {
		t.Errorf("%+v", plan.Built)
	}
	if got := o.run(exitDiffers, "", "subscriptions plan "+third).out; !strings.Contains(got, "version 1 ("+hash+")") || !strings.Contains(got, "vn.patient.remarks") {
		t.Errorf("%s", got)
	}
	o.run(exitOK, "", "subscriptions apply --yes "+third)
	sync(exitRejected, phone)
	codes := map[string]string{}
	for _, r := range data[[]device.Reject](o, exitOK, "device rejects -o json"+phone) {
		codes[r.Table] += string(r.Code)
	}
	if len(codes) != 2 || codes["vn.patient"] != string(protocol.CodeUnknownColumn) || codes["vn.medical_record"] != string(protocol.CodeOperation) {
		t.Errorf("the device's log: %v", codes)
	}
	if l := data[[]reject](o, exitOK, "rejects ls -o json --user amina"); len(l) != 2 {
		t.Errorf("the server's log: %+v", l)
	}
	o.eventually("the record that fits goes through", func() bool {
		return o.at(o.source, "SELECT name FROM vn.patient WHERE id = "+second2) == "Kept"
	})
	if got := o.at(o.source, "SELECT remarks FROM vn.patient WHERE id = "+patient); got != "dog" {
		t.Errorf("the source has %s", got)
	}
	sync(exitOK, phone)
	if got := o.columns(phone); got["patient"] != "id name" {
		t.Errorf("%v", got)
	}

	// A new version of the application takes all.
	o.run(exitOK, "", "device built-for --everything"+phone)
	sync(exitOK, phone)
	sync(exitOK, phone)
	if got := o.columns(phone); !strings.Contains(got["patient"], "address") || got["visit"] == "" || o.value(phone, "SELECT address FROM patient WHERE id = "+patient) != "Hill 1" {
		t.Errorf("%v", got)
	}
	if d := data[registry.DeviceDetail](o, exitOK, "devices show amina/phone -o json"); d.Built != nil {
		t.Errorf("%+v", d.Built)
	}
}

// What a device had edited before columns were dropped or retyped at the source, and before a table left its set, is judged record by record, with a receipt
// for each; the others of the same request go through.
func TestUploadsThatNoLongerFit(t *testing.T) {
	o := newOperator(t)
	o.init()
	o.at(o.source, "CREATE TABLE vn.more (id int PRIMARY KEY, dropped text, retyped text, kept text)")
	o.at(o.source, "INSERT INTO vn.more SELECT i, 'd', i::text, 'k' FROM generate_series(1, 4) i")
	definitions := "version: 1\nsubscriptions:\n  more: {table: vn.more}\n  nurses: {table: vn.nurse, columns: [id, phone], allow: [update]}\nsets:\n  all: [more, nurses]\ngroups:\n  nurses: {sets: [all]}\n"
	t.Cleanup(o.serve(definitions, "health.listen="))
	o.run(exitOK, testPassword, "users add amina --group nurses")
	dev := " --file " + filepath.Join(o.dir, "amina.db")
	o.run(exitOK, testPassword, "device enrol --server nats://"+o.nats+" --user amina --device phone"+dev)
	data[device.Report](o, exitOK, "device sync -o json"+dev)
	o.exec(dev, `UPDATE more SET dropped = 'lost' WHERE id = 1; UPDATE more SET retyped = 'no number' WHERE id = 2; UPDATE more SET kept = 'new' WHERE id = 3;
		UPDATE more SET retyped = '44', kept = 'new' WHERE id = 4; INSERT INTO more (id, kept) VALUES (5, 'new'); INSERT INTO more (id, dropped) VALUES (6, 'lost');
		UPDATE nurse SET phone = '+123456' WHERE id = 1`)
	o.at(o.source, "ALTER TABLE vn.more DROP COLUMN dropped, ALTER COLUMN retyped TYPE int USING retyped::int")
	o.run(exitOK, "", "schema apply --yes")
	next := o.write("next.yaml", strings.Replace(definitions, "all: [more, nurses]", "all: [more]", 1))
	o.run(exitOK, "", "subscriptions apply --yes "+next)
	var rep device.Report
	o.eventually("the device syncs", func() bool { // the stages take the new form over
		got := waystage(t, nil, "", strings.Fields("device sync --wait source -o json"+dev+" -c "+o.config)...)
		return got.code == exitRejected && json.Unmarshal([]byte(got.out), &rep) == nil
	})
	if rep.Sent != 7 || rep.Rejected != 4 {
		t.Errorf("%+v", rep)
	}
	got := map[string]string{}
	for _, r := range data[[]device.Receipt](o, exitOK, "device log -o json"+dev) {
		got[r.Table+" "+*r.Key[0]] = string(r.Code)
	}
	want := map[string]string{"vn.more 1": "unknown_column", "vn.more 2": "invalid_value", "vn.more 3": "", "vn.more 4": "", "vn.more 5": "", "vn.more 6": "unknown_column", "vn.nurse 1": "unknown_table"}
	if !maps.Equal(got, want) {
		t.Errorf("the receipts are %v, want %v", got, want)
	}
	if l := data[[]reject](o, exitOK, "rejects ls -o json --user amina"); len(l) != 4 {
		t.Errorf("the server's log: %+v", l)
	}
	o.eventually("the others are at the source", func() bool {
		return o.at(o.source, "SELECT string_agg(id || ' ' || coalesce(retyped::text, '-') || ' ' || kept, ', ' ORDER BY id) FROM vn.more") == "1 1 k, 2 2 k, 3 3 new, 4 44 new, 5 - new"
	})
}
