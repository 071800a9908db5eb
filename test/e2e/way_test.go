package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/protocol"
)

// TestTheWholeWay takes changes along the whole way, both ways, between two devices and the source.
func TestTheWholeWay(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 4, Patients: 24, Records: 120})
	_, stop := w.serve(t)
	w.addUsers(2)
	amina, bruno := w.nurses[0], w.nurses[1]
	phone, tablet := w.enrol(amina, "phone"), w.enrol(bruno, "tablet")
	devices := map[*device.Device]nurse.Person{phone: amina, tablet: bruno}
	outer := t
	agree := func() {
		w.t.Helper()
		w.settle(phone, tablet)
		w.must(w.compare(devices))
	}
	const record = "e2e00000-0000-4000-8000-000000000001"
	patient := nurse.FirstPatient // has both nurses

	w.step("first sync", func(t *testing.T) {
		if rep := w.sync(phone, protocol.WaitMerge); rep.Rows == 0 {
			t.Error("nothing came")
		}
		w.sync(tablet, protocol.WaitMerge)
		agree()
	})

	w.step("up", func(t *testing.T) {
		w.exec(phone, "UPDATE patient SET phone = '+49 30 1', remarks = 'x' WHERE id = ?", patient)
		w.exec(phone, `INSERT INTO medical_record (id, patient_id, nurse_id, taken, pulse, note) VALUES (?, ?, ?, '2026-01-01 00:00:00+00', 70, 'new')`,
			record, patient, amina.ID)
		rep := w.sync(phone, protocol.WaitSource)
		if rep.Sent != 2 || rep.Rejected != 0 {
			t.Errorf("sent %d, rejected %d", rep.Sent, rep.Rejected)
		}
		w.settle(phone)
		var number, note string
		w.must(w.source.QueryRow(w.ctx, "SELECT p.phone, r.note FROM vn.patient p, vn.medical_record r WHERE p.id = $1 AND r.id = $2", patient, record).Scan(&number, &note))
		if number != "+49301" || note != "new" { // a trigger of the source's writes the number in its own way
			t.Errorf("the source has %q, %q", number, note)
		}
		agree()
		if got := w.text(phone, "SELECT phone FROM patient WHERE id = ?", patient); got != "+49301" {
			t.Errorf("the trigger's rewriting did not come back: %q", got)
		}
	})

	w.step("down", func(t *testing.T) {
		_, err := w.source.Exec(w.ctx, "UPDATE vn.patient SET address = 'Hill 1' WHERE id = $1", patient)
		w.must(err)
		for d := range devices {
			w.eventually("the office's change does not come down", func() error {
				w.sync(d, protocol.WaitMerge)
				if got := w.text(d, "SELECT address FROM patient WHERE id = ?", patient); got != "Hill 1" {
					return fmt.Errorf("address is %q", got)
				}
				return nil
			})
		}
		agree()
	})

	w.step("subset", func(t *testing.T) {
		var other int64 // a patient of neither
		w.must(w.source.QueryRow(w.ctx, "SELECT id FROM vn.patient WHERE id NOT IN (SELECT patient_id FROM vn.assignment WHERE nurse_id = $1) ORDER BY id LIMIT 1", amina.ID).Scan(&other))
		if got := w.text(phone, "SELECT count(*) FROM medical_record WHERE patient_id = ?", other); got != "0" {
			t.Errorf("%s records of somebody else's patient are on the device", got)
		}
		_, err := w.source.Exec(w.ctx, "INSERT INTO vn.assignment VALUES ($1, $2, '2026-01-01')", amina.ID, other)
		w.must(err)
		agree() // what enters the subset comes whole
		if got := w.text(phone, "SELECT count(*) FROM patient WHERE id = ?", other); got != "1" {
			t.Error("the new patient did not come")
		}
		_, err = w.source.Exec(w.ctx, "DELETE FROM vn.assignment WHERE nurse_id = $1 AND patient_id = $2", amina.ID, other)
		w.must(err)
		agree() // what leaves it goes
		if got := w.text(phone, "SELECT count(*) FROM patient WHERE id = ?", other); got != "0" {
			t.Error("the patient of somebody else is still there")
		}
		w.exec(phone, `INSERT INTO medical_record (id, patient_id, nurse_id, taken) VALUES ('e2e00000-0000-4000-8000-000000000002', ?, ?, '2026-01-01 00:00:00+00')`, other, amina.ID)
		w.sync(phone, protocol.WaitMerge)
		w.lastReject(phone, protocol.Rejected, protocol.CodeNotSubscribed)
		agree()
	})

	w.step("conflict", func(t *testing.T) {
		w.exec(phone, "UPDATE medical_record SET note = 'first' WHERE id = ?", record)
		w.exec(tablet, "UPDATE medical_record SET note = 'second' WHERE id = ?", record)
		if rep := w.sync(phone, protocol.WaitSource); rep.Rejected != 0 {
			t.Errorf("%d rejected", rep.Rejected)
		}
		if rep := w.sync(tablet, protocol.WaitMerge); rep.Rejected != 1 {
			t.Errorf("%d rejected in the same sync", rep.Rejected)
		}
		r := w.lastReject(tablet, protocol.Rejected, protocol.CodeStale)
		if *r.Sent["note"] != "second" || *r.Right["note"] != "first" {
			t.Errorf("the log says sent %q, right %q", *r.Sent["note"], *r.Right["note"])
		}
		var winner string
		w.must(w.mirror.QueryRow(w.ctx, "SELECT winner FROM waystage.change WHERE id = $1", r.ID).Scan(&winner))
		if winner != amina.Login+"/phone" && winner != "source" {
			t.Errorf("the server's log says that %q had won", winner)
		}
		agree()
	})

	w.step("refused by the source", func(t *testing.T) {
		w.exec(phone, "UPDATE medical_record SET pulse = 7 WHERE id = ?", record)
		w.sync(phone, protocol.WaitSource)
		agree()
		if r := w.lastReject(phone, protocol.Refused, protocol.CodeConstraint); r.Constraint != "pulse_possible" {
			t.Errorf("constraint %q", r.Constraint)
		}
		if got := w.text(phone, "SELECT pulse FROM medical_record WHERE id = ?", record); got != "70" {
			t.Errorf("pulse is %s on the device", got)
		}
	})

	w.step("cancelled and resumed, over a restart of the server", func(t *testing.T) {
		w.exec(phone, "UPDATE medical_record SET note = 'resumed' WHERE id = ?", record)
		ctx, cancel := context.WithCancel(w.ctx)
		_, err := phone.Sync(ctx, device.SyncOptions{Progress: func(p device.Progress) {
			if p.Stage == device.StageWait {
				cancel() // the request is in the queue, the reply is not fetched
			}
		}})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the cancelled sync ended with %v", err)
		}
		s, err := phone.Status(w.ctx)
		w.must(err)
		if s.Open == "" {
			t.Error("no session is open")
		}
		stop()
		if _, err := phone.Sync(w.ctx, device.SyncOptions{}); !errors.Is(err, device.ErrUnreachable) {
			t.Errorf("a sync without a server ended with %v", err)
		}
		w.serve(outer)
		rep := w.sync(phone, protocol.WaitSource)
		if !rep.Resumed || len(rep.Sets) == 0 || rep.Sets[0].Session != s.Open {
			t.Errorf("%s was not resumed: %+v", s.Open, rep)
		}
		agree()
		var note string
		var times int
		w.must(w.source.QueryRow(w.ctx, "SELECT note FROM vn.medical_record WHERE id = $1", record).Scan(&note))
		w.must(w.mirror.QueryRow(w.ctx, "SELECT count(*) FROM waystage.session WHERE token = $1", s.Open).Scan(&times))
		if note != "resumed" || times != 1 {
			t.Errorf("note %q, %d sessions", note, times)
		}
	})

	w.step("quiet", func(t *testing.T) { // I12: no echo circulates
		var before, after int64
		count := "SELECT count(*) + coalesce(sum(seq), 0)::bigint FROM waystage.progress"
		w.must(w.source.QueryRow(w.ctx, count).Scan(&before))
		w.sync(phone, protocol.WaitSource)
		w.sync(tablet, protocol.WaitSource)
		w.must(w.source.QueryRow(w.ctx, count).Scan(&after))
		if before != after {
			t.Errorf("the up worker wrote to the source %d times although nobody changed anything", after-before)
		}
	})
}

// lastReject is the newest entry of a device's rejected log, which must be of that kind.
func (w *world) lastReject(d *device.Device, state string, code protocol.Code) device.Reject {
	w.t.Helper()
	var last device.Reject
	w.eventually("no entry in the rejected log", func() error {
		l, err := d.Rejects(w.ctx)
		w.must(err)
		if len(l) == 0 {
			w.sync(d, protocol.WaitSource)
			return errors.New("the log is empty")
		}
		last = l[len(l)-1]
		return nil
	})
	if last.State != state || last.Code != code {
		w.t.Fatalf("the newest entry is %s %s (%s), want %s %s", last.State, last.Code, last.Detail, state, code)
	}
	return last
}
