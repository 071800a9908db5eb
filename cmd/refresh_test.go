package cmd

import (
	"database/sql"
	"path/filepath"
	"strings"
	"testing"

	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/stages"
)

// What an operator orders is done at the next sync, once, and what the device has not sent yet is kept; the row is explained before and after.
func TestRefreshAndExplain(t *testing.T) {
	o, dev := newFleet(t)
	o.sync(dev)
	db, err := sql.Open("sqlite", filepath.Join(o.dir, "amina.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	var id string
	if err := db.QueryRow(`SELECT min(id) FROM patient`).Scan(&id); err != nil {
		t.Fatal(err)
	}
	explain := func(key string) stages.Explanation {
		t.Helper()
		return data[stages.Explanation](o, exitOK, "explain row vn.patient "+key+" --device amina/phone -o json")
	}
	o.sync(dev)
	if e := explain(id); e.Outcome != stages.OnDevice || e.Set != "field" || e.Table != "vn.patient" {
		t.Errorf("%+v", e)
	}
	if got := o.run(exitOK, "", "explain row patient ["+id+"] --device amina/phone"); !strings.Contains(got.out, "The row is on the device as the mirror has it") || !strings.Contains(got.out, "rows query gives") {
		t.Errorf("explain:\n%s", got.out)
	}
	if e := explain(`{"id":` + id + `}`); e.Outcome != stages.OnDevice {
		t.Errorf("%+v", e)
	}
	if e := explain("1"); e.Outcome != stages.Never {
		t.Errorf("%+v", e)
	}
	if _, err := db.Exec(`UPDATE patient SET remarks = 'unsent' WHERE id = ?`, id); err != nil {
		t.Fatal(err)
	}
	o.run(exitOK, "", "devices refresh amina/phone --only field --note odd --as boss")
	o.run(exitOK, "", "users refresh amina --as boss")
	list := data[[]registry.Refresh](o, exitOK, "devices refreshes amina -o json")
	if len(list) != 1 || list[0].State != "waiting" || list[0].Who != "boss" || list[0].Set != "field" {
		t.Fatalf("%+v", list)
	}
	if d := data[registry.DeviceDetail](o, exitOK, "devices show amina/phone -o json"); len(d.Refreshes) != 1 || d.Refreshes[0] != list[0] {
		t.Errorf("%+v", d.Refreshes)
	}
	if got := o.run(exitOK, "", "devices show amina/phone").out; !strings.Contains(got, "refresh: set field: waits for the next sync; ordered") {
		t.Errorf("show:\n%s", got)
	}
	if e := explain(id); e.Outcome != stages.Comes || !strings.Contains(e.Summary, "sends everything") {
		t.Errorf("%+v", e)
	}
	rep, rows := o.sync(dev)
	if !rep.Sets[0].Refresh || rep.Sent != 1 || rep.Merged+rep.Applied != 1 || rows["patient"] != 3 {
		t.Errorf("%+v, %v", rep, rows)
	}
	if rep, _ := o.sync(dev); rep.Sets[0].Refresh {
		t.Error("refreshed twice")
	}
	if list := data[[]registry.Refresh](o, exitOK, "devices refreshes amina/phone -o json"); len(list) != 1 || list[0].State != "done" {
		t.Errorf("%+v", list)
	}
	o.run(exitUsage, "", "subscriptions refresh patients") // asks, and nobody is there to answer
	o.run(exitOK, "", "subscriptions refresh patients --yes")
	if rep, _ := o.sync(dev); !rep.Sets[0].Refresh {
		t.Error("the subscription was not refreshed")
	}
	if got := o.run(exitOK, "", "devices refreshes"); !strings.Contains(got.out, "amina/phone") {
		t.Errorf("refreshes:\n%s", got.out)
	}
	for line, code := range map[string]int{
		"devices refresh amina/none": exitPrecondition, "devices refresh amina": exitUsage, "devices refresh amina/phone --only office": exitPrecondition,
		"users refresh nobody": exitPrecondition, "users refresh nobody --only field": exitPrecondition, "subscriptions refresh none --yes": exitPrecondition,
		"users refresh amina --as Nobody!":           exitUsage,
		"explain row vn.none 1 --device amina/phone": exitPrecondition, "explain row vn.patient 1 --device amina/none": exitPrecondition,
		"explain row vn.patient 1 --device nobody/phone": exitPrecondition, "explain row vn.patient x --device amina/phone": exitUsage,
		"explain row vn.patient [1,2] --device amina/phone": exitUsage, `explain row vn.patient {"no":1} --device amina/phone`: exitUsage,
		"explain row vn.patient [[1]] --device amina/phone": exitUsage, "explain row vn.patient 1": exitUsage, "explain row vn.patient 1 --device amina": exitUsage,
	} {
		if got := o.run(code, "", line); strings.TrimSpace(got.err) == "" {
			t.Errorf("%s says nothing", line)
		}
	}
}
