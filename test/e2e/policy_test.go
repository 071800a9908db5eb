package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/protocol"
)

// TestConflictPolicies lets two devices and the office change the same rows under other policies than rejecting.
func TestConflictPolicies(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 4, Patients: 12, Records: 20})
	body := strings.Replace(nurse.Definitions(), "    table: vn.patient\n", "    table: vn.patient\n    conflict: columns\n", 1)
	body = strings.Replace(body, "    table: vn.medical_record\n", "    table: vn.medical_record\n    conflict: last-writer\n", 1)
	body = strings.Replace(body, "    table: vn.visit\n", "    table: vn.visit\n    conflict: source\n", 1)
	if strings.Count(body, "conflict: ") != 3 {
		t.Fatal("the definitions do not have the tables as this test expects")
	}
	w.must(os.WriteFile(w.config.Definitions, []byte(body), 0o644))
	w.serve(t)
	w.addUsers(2)
	amina, bruno := w.nurses[0], w.nurses[1]
	phone, tablet := w.enrol(amina, "phone"), w.enrol(bruno, "tablet")
	devices := map[*device.Device]nurse.Person{phone: amina, tablet: bruno}
	const record = "e2e00000-0000-4000-8000-000000000001"
	patient := nurse.FirstPatient // has both nurses
	both := func() {
		w.t.Helper()
		w.settle(phone, tablet)
		w.must(w.compare(devices))
	}
	clean := func(rep device.Report) {
		w.t.Helper()
		if rep.Rejected != 0 {
			w.t.Errorf("%d rejected", rep.Rejected)
		}
	}
	w.sync(phone, protocol.WaitMerge)
	w.sync(tablet, protocol.WaitMerge)
	w.exec(phone, `INSERT INTO medical_record (id, patient_id, nurse_id, taken, pulse, note) VALUES (?, ?, ?, '2026-01-01 00:00:00+00', 70, 'new')`, record, patient, amina.ID)
	w.sync(phone, protocol.WaitSource)
	both()

	w.step("columns: what both have changed is on both devices and at the source", func(t *testing.T) {
		w.exec(phone, "UPDATE patient SET address = 'Hill 1' WHERE id = ?", patient)
		w.exec(tablet, "UPDATE patient SET remarks = 'dog' WHERE id = ?", patient)
		clean(w.sync(phone, protocol.WaitMerge))
		clean(w.sync(tablet, protocol.WaitMerge))
		_, err := w.source.Exec(w.ctx, "UPDATE vn.patient SET name = 'Eva' WHERE id = $1", patient)
		w.must(err)
		both()
		var got string
		w.must(w.source.QueryRow(w.ctx, "SELECT name || ' ' || address || ' ' || remarks FROM vn.patient WHERE id = $1", patient).Scan(&got))
		if got != "Eva Hill 1 dog" {
			t.Errorf("the source has %q", got)
		}
		log, err := tablet.Log(w.ctx, device.LogFilter{Table: "vn.patient", Limit: 1})
		w.must(err)
		if len(log) != 1 || log[0].Policy != "columns" {
			t.Errorf("the device's log does not say who merged: %+v", log)
		}
	})

	w.step("columns: the same column is rejected", func(t *testing.T) {
		w.exec(phone, "UPDATE patient SET remarks = 'cat' WHERE id = ?", patient)
		w.exec(tablet, "UPDATE patient SET remarks = 'bird', address = 'Lane 2' WHERE id = ?", patient)
		clean(w.sync(phone, protocol.WaitMerge))
		if rep := w.sync(tablet, protocol.WaitMerge); rep.Rejected != 1 {
			t.Errorf("%d rejected", rep.Rejected)
		}
		if r := w.lastReject(tablet, protocol.Rejected, protocol.CodeStale); !strings.Contains(r.Detail, "remarks") {
			t.Errorf("the reason does not name the column: %s", r.Detail)
		}
		both()
	})

	w.step("last-writer: who syncs last", func(t *testing.T) {
		w.exec(phone, "UPDATE medical_record SET note = 'first' WHERE id = ?", record)
		w.exec(tablet, "UPDATE medical_record SET note = 'second' WHERE id = ?", record)
		clean(w.sync(phone, protocol.WaitMerge))
		clean(w.sync(tablet, protocol.WaitMerge))
		both()
		if got := w.text(phone, "SELECT note FROM medical_record WHERE id = ?", record); got != "second" {
			t.Errorf("the note is %q", got)
		}
		var overwritten, winner string
		w.must(w.mirror.QueryRow(w.ctx, "SELECT old->>'note', winner FROM waystage.change WHERE tname = 'vn.medical_record' ORDER BY id DESC LIMIT 1").Scan(&overwritten, &winner))
		if overwritten != "first" {
			t.Errorf("the ledger says that %q of %s was overwritten", overwritten, winner)
		}
	})

	w.step("source: dropped, with a receipt", func(t *testing.T) {
		var visit string
		w.must(w.source.QueryRow(w.ctx, "SELECT id::text FROM vn.visit WHERE patient_id = $1 ORDER BY id LIMIT 1", patient).Scan(&visit))
		w.exec(phone, "UPDATE visit SET remarks = 'first' WHERE id = ?", visit)
		w.exec(tablet, "UPDATE visit SET remarks = 'second' WHERE id = ?", visit)
		clean(w.sync(phone, protocol.WaitMerge))
		rep := w.sync(tablet, protocol.WaitMerge)
		clean(rep)
		if rep.Settled != 1 {
			t.Errorf("%d settled", rep.Settled)
		}
		r := w.lastReject(tablet, protocol.Rejected, protocol.CodeYields)
		if r.Status != device.RejectSettled || *r.Sent["remarks"] != "second" {
			t.Errorf("the entry is %s, with %q", r.Status, *r.Sent["remarks"])
		}
		var status string
		w.must(w.mirror.QueryRow(w.ctx, "SELECT status FROM waystage.reject WHERE id = $1", r.ID).Scan(&status))
		if status != "settled" {
			t.Errorf("on the server it is %s", status)
		}
		both()
		if got := w.text(tablet, "SELECT remarks FROM visit WHERE id = ?", visit); got != "first" {
			t.Errorf("the device has %q", got)
		}
	})
}
