package cmd

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/registry"
)

// twoGroups has one set by an attribute of the user, and one of all rows.
const twoGroups = `version: 1
subscriptions:
  patients:
    table: vn.patient
    key: id
    rows: select id from vn.patient where id < (select min(id) from vn.patient) + (:user.upto)::bigint
    allow: [update]
  colleagues:
    table: vn.nurse
    columns: [id, login, name]
    direction: download-only
sets:
  field: [patients]
  office: [colleagues]
groups:
  nurses: {sets: [field]}
  clerks: {sets: [office]}
`

// fleet is an operator with a server and a user amina, whose phone is enrolled.
func newFleet(t testing.TB) (o *operator, dev string) {
	o = newOperator(t)
	o.init()
	t.Cleanup(o.serve(twoGroups, "health.listen="))
	o.run(exitOK, testPassword, "users add amina --group nurses --attr upto=3")
	dev = " --file " + filepath.Join(o.dir, "amina.db")
	o.run(exitOK, testPassword, "device enrol --server nats://"+o.nats+" --user amina --device phone"+dev)
	return o, dev
}

// sync syncs, and counts the rows of each table after it.
func (o *operator) sync(dev string) (device.Report, map[string]int64) {
	o.t.Helper()
	rep := data[device.Report](o, exitOK, "device sync -o json"+dev)
	rows := map[string]int64{}
	for _, set := range data[device.Status](o, exitOK, "device status -o json"+dev).Sets {
		for _, t := range set.Tables {
			rows[t.Local] = t.Rows
		}
	}
	return rep, rows
}

// What an operator says of a user is in force at the device's next sync: rows enter and leave.
func TestAttributesAndGroups(t *testing.T) {
	o, dev := newFleet(t)
	if _, rows := o.sync(dev); rows["patient"] != 3 || len(rows) != 1 {
		t.Fatalf("upto=3: %v", rows)
	}
	o.run(exitOK, "", "users set amina upto=5 ward=north")
	if rep, rows := o.sync(dev); rows["patient"] != 5 || rep.Rows != 2 {
		t.Errorf("upto=5: %v, %d rows came", rows, rep.Rows)
	}
	o.run(exitOK, "", "users set amina upto=2")
	if rep, rows := o.sync(dev); rows["patient"] != 2 || rep.Sets[0].Refresh {
		t.Errorf("upto=2: %v", rows)
	}
	o.run(exitOK, "", "users set amina --unset upto")
	if _, rows := o.sync(dev); rows["patient"] != 0 {
		t.Errorf("without the attribute: %v", rows)
	}
	o.run(exitOK, "", "users set amina upto=1")

	u := data[shownUser](o, exitOK, "users show amina -o json")
	if u.Attributes["upto"] != "1" || u.Attributes["ward"] != "north" || !u.Password || len(u.List) != 1 || u.List[0].Name != "phone" {
		t.Errorf("show: %+v", u)
	}
	if got := o.run(exitOK, "", "users show amina"); !strings.Contains(got.out, "ward=north") || !strings.Contains(got.out, "amina/phone") {
		t.Errorf("show:\n%s", got.out)
	}
	for _, line := range []string{"users show amina -o json", "users ls -o json", "users ls", "users show amina"} {
		if got := o.run(exitOK, "", line); strings.Contains(got.out, "argon2") || strings.Contains(got.out, testPassword) {
			t.Errorf("%s prints a secret:\n%s", line, got.out)
		}
	}
	o.run(exitPrecondition, "", "users show nobody")
	o.run(exitPrecondition, "", "users set nobody ward=north")
	o.run(exitUsage, "", "users set amina")
	o.run(exitUsage, "", "users set amina ward")
	o.run(exitUsage, "", "users set amina no-name=x")
	o.run(exitUsage, "", "users set amina long="+strings.Repeat("x", 1025))

	// Groups: a set comes, and goes.
	o.run(exitOK, "", "users add bruno --no-password")
	if got := o.run(exitRejected, "", "groups add clerks amina nobody bruno"); !strings.Contains(got.err, "nobody") {
		t.Errorf("groups add: %s", got.err)
	}
	o.sync(dev) // hears of the set
	if _, rows := o.sync(dev); rows["nurse"] != 3 || rows["patient"] != 1 {
		t.Errorf("in both groups: %v", rows)
	}
	o.run(exitOK, "", "groups add clerks amina") // again
	groups := data[[]group](o, exitOK, "groups ls -o json")
	if len(groups) != 2 || groups[0].Name != "clerks" || groups[0].Members != 2 || groups[1].Members != 1 || !slices.Equal(groups[1].Sets, []string{"field"}) {
		t.Errorf("groups: %+v", groups)
	}
	if m := data[[]registry.User](o, exitOK, "groups members clerks -o json"); len(m) != 2 || m[1].Name != "bruno" || m[1].Password {
		t.Errorf("members: %+v", m)
	}
	o.run(exitOK, "", "groups remove clerks amina")
	o.sync(dev)
	if _, rows := o.sync(dev); len(rows) != 1 || rows["patient"] != 1 {
		t.Errorf("out of the group: %v", rows)
	}
	if got := o.run(exitOK, "", "groups add typo bruno"); !strings.Contains(got.err, "note:") {
		t.Errorf("a group that is not defined: %s", got.err)
	}
	if g := data[group](o, exitOK, "groups show typo -o json"); g.Defined || g.Members != 1 {
		t.Errorf("%+v", g)
	}
	o.run(exitPrecondition, "", "groups show nowhere")
	o.run(exitPrecondition, "", "groups members nowhere")
	o.run(exitPrecondition, "", "groups add clerks nobody")
	o.run(exitUsage, "", "groups add No-Good amina")
	o.run(exitAuth, testPassword, "device enrol --server nats://"+o.nats+" --user bruno --device phone --file "+filepath.Join(o.dir, "bruno.db"))

	// Many users at once.
	csv := "user,groups,attr.upto,password\namina,nurses,4,\ncarla,nurses clerks,2,visiting-hours\nDora,nurses,1,\nemil,nurses\nfritz,nurses,1,short\n" +
		"carla,,,\ngerd,no.good,,\nhanna\"x,,,\nida,clerks,,\n"
	lines := data[[]importedLine](o, exitRejected, "users import -o json "+tempFile(t, "users.csv", csv))
	var states []string
	for _, l := range lines {
		states = append(states, l.State+" "+l.Code)
	}
	if want := []string{"changed ", "added ", "refused invalid_name", "refused invalid_line", "refused invalid_password", "refused invalid_line", "refused invalid_name", "refused invalid_line", "added "}; !slices.Equal(states, want) {
		t.Errorf("import: %q\n%+v", states, lines)
	}
	if lines[3].Line != 5 {
		t.Errorf("line numbers: %+v", lines)
	}
	if _, rows := o.sync(dev); rows["patient"] != 4 {
		t.Errorf("after the import: %v", rows)
	}
	good := tempFile(t, "users.yaml", "- {user: carla, groups: [clerks], attributes: {upto: ~, floor: 2}}\n- {user: ida}\n")
	lines = data[[]importedLine](o, exitOK, "users import -o json "+good)
	if len(lines) != 2 || lines[0].State != "changed" || lines[1].State != "unchanged" {
		t.Errorf("import: %+v", lines)
	}
	if got := o.run(exitOK, "", "users import "+good); !strings.Contains(got.err, "2 unchanged") || got.out != "" {
		t.Errorf("again: %+v", got)
	}
	if u := data[registry.User](o, exitOK, "users show carla -o json"); len(u.Attributes) != 1 || u.Attributes["floor"] != "2" || !slices.Equal(u.Groups, []string{"clerks"}) || !u.Password {
		t.Errorf("carla: %+v", u)
	}
	bad := tempFile(t, "bad.yaml", "- {user: carla, grups: [x]}\n- {user: carla, groups: x}\n- 7\n- {user: jens}\n")
	if got := o.run(exitRejected, "", "users import "+bad); !strings.Contains(got.out, `unknown key "grups"`) || strings.Count(got.out, "\n") != 4 {
		t.Errorf("bad.yaml: %+v", got)
	}
	for name, body := range map[string]string{"e.csv": "", "h.csv": "user,group\n", "n.csv": "groups\n", "d.csv": "user,user\n", "m.yaml": "user: x\n", "x.yaml": "- [", "x.txt": "user\n"} {
		o.run(exitUsage, "", "users import "+tempFile(t, name, body))
	}
	o.run(exitUsage, "", "users import "+filepath.Join(o.dir, "nothing.csv"))
}
