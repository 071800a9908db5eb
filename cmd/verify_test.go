package cmd

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/verify"
)

// TestVerify: what the command prints, and by which code it ends.
func TestVerify(t *testing.T) {
	o := newOperator(t)
	o.init()
	if got := o.run(exitPrecondition, "", "verify"); !strings.Contains(got.err, "waystage serve") {
		t.Errorf("%s", got.err)
	}
	stop := o.serve(nurse.Definitions(), "health.listen=")
	defer stop()
	if got := o.run(exitOK, "", "verify"); !strings.Contains(got.out, "vn.patient") || !strings.Contains(got.err, "are equal") {
		t.Errorf("%s%s", got.out, got.err)
	}
	if got := o.run(exitUsage, "", "verify --table vn.patent"); !strings.Contains(got.err, "vn.patient") {
		t.Errorf("%s", got.err)
	}
	o.run(exitUsage, "", "verify --rate -1")
	o.run(exitUsage, "", "verify vn.patient")

	conn, err := schema.Connect(t.Context(), o.mirror, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql, pgx.QueryExecModeExec); err != nil {
			t.Fatal(err)
		}
	}
	// Devices.
	file := filepath.Join(o.dir, "ann.db")
	user := nurse.Nurses(3)[0].Login
	o.run(exitOK, testPassword+"\n", "users add "+user+" --group nurses")
	o.run(exitOK, testPassword+"\n", "device enrol --file "+file+" --server nats://"+o.nats+" --user "+user+" --device phone")
	o.run(exitUsage, "", "verify --user "+user)
	o.run(exitPrecondition, "", "verify --devices --user nobody")
	if got := o.run(exitPrecondition, "", "verify --devices --wait 10ms"); !strings.Contains(got.out, "never verified") {
		t.Errorf("%s%s", got.out, got.err)
	}
	o.run(exitOK, "", "device sync --file "+file) // does what the operator asks
	if got := o.run(exitOK, "", "device verify --file "+file); !strings.Contains(got.err, "are equal") {
		t.Errorf("%s%s", got.out, got.err)
	}
	if l := data[[]deviceCheck](o, exitOK, "verify --devices -o json"); len(l) != 1 || l[0].state() != "equal" || !l[0].Asked || l[0].Rows == 0 {
		t.Errorf("%+v", l)
	}
	d, err := device.Open(t.Context(), file, device.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{"UPDATE _ws_state SET capture = 0", "UPDATE patient SET name = 'Hidden' WHERE id = (SELECT min(id) FROM patient)", "UPDATE _ws_state SET capture = 1"} {
		if _, err := d.DB().ExecContext(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if got := o.run(exitDiffers, "", "device verify --file "+file); !strings.Contains(got.out, ": values\n  column name\n") || strings.Contains(got.out, "Hidden") {
		t.Errorf("%s%s", got.out, got.err)
	}
	if got := o.run(exitDiffers, "", "verify --devices --user "+user+" --device phone"); !strings.Contains(got.out, user+"/phone: vn.patient, key ") || !strings.Contains(got.out, "values, columns name") {
		t.Errorf("%s%s", got.out, got.err)
	}
	if l := data[[]device.Verification](o, exitOK, "device verify -o json --repair --values --file "+file); len(l) != 1 || l[0].Repaired != 1 || *l[0].Differences[0].Columns[0].Device != "Hidden" {
		t.Errorf("%+v", l)
	}

	exec("UPDATE vn.patient SET name = 'Somebody Else' WHERE id = 100001")
	got := o.run(exitDiffers, "", "verify")
	if !strings.Contains(got.out, "vn.patient, key 100001: different\n  column name\n") || strings.Contains(got.out, "Somebody Else") || !strings.Contains(got.err, "1 rows of") {
		t.Errorf("%s%s", got.out, got.err)
	}
	if got := o.run(exitDiffers, "", "verify --values --table vn.patient"); !strings.Contains(got.out, `mirror "Somebody Else"`) {
		t.Errorf("%s", got.out)
	}
	rep := data[verify.Report](o, exitDiffers, "verify -o json --table vn.patient --rate 1000000 --pause 1ms")
	if len(rep.Tables) != 1 || rep.Tables[0].Different != 1 || rep.Values || rep.Tables[0].Rows[0].Columns[0].Name != "name" || rep.Tables[0].Rows[0].Columns[0].Mirror != nil {
		t.Errorf("%+v", rep)
	}
	rep = data[verify.Report](o, exitDiffers, "verify -o json --values")
	if c := rep.Tables[len(rep.Tables)-1]; !rep.Values || !rep.Different() || c.Table == "" {
		t.Errorf("%+v", rep)
	}
	exec("ALTER TABLE vn.visit DISABLE TRIGGER _ws_move")
	if got := o.run(exitDiffers, "", "verify --table vn.visit"); !strings.Contains(got.out, "vn.visit _ws_move") {
		t.Errorf("%s", got.out)
	}
}
