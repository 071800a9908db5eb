package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/waystage/waystage/cmd"
	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// TestLostSlot takes the source's slot away while the server is down. The server refuses to go on as if nothing had
// happened; copied anew under a new epoch (rule D13) it serves the same devices, whose unsent edits arrive.
func TestLostSlot(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 3, Patients: 12, Records: 60})
	info, stop := w.serve(t)
	w.addUsers(2)
	first, second := w.enrol(w.nurses[0], "phone"), w.enrol(w.nurses[1], "phone")
	devices := map[*device.Device]nurse.Person{first: w.nurses[0], second: w.nurses[1]}
	w.settle(first, second)
	stop()

	patient := nurse.FirstPatient
	w.exec(first, "UPDATE patient SET remarks = 'made offline' WHERE id = ?", patient)
	w.exec(second, "UPDATE patient SET remarks = 'stale' WHERE id = ?", patient+1)
	_, err := w.source.Exec(w.ctx, "UPDATE vn.patient SET remarks = 'unseen by the lost slot' WHERE id = $1", patient+1)
	w.must(err)
	_, err = w.source.Exec(w.ctx, "SELECT pg_drop_replication_slot($1)", schema.SlotDown(info.Epoch))
	w.must(err)

	if err := cmd.Serve(w.ctx, w.config, nil, func(cmd.Info) { t.Error("it serves without its slot") }); !errors.Is(err, schema.ErrRecopy) {
		t.Fatalf("without its slot the server ended with %v", err)
	}
	w.config.Recopy = true
	again, _ := w.serve(t)
	if again.Epoch == info.Epoch {
		t.Error("the epoch is the old one")
	}
	rep := w.sync(first, protocol.WaitSource)
	if !rep.Forked {
		t.Error("the device does not know of the new epoch")
	}
	w.settle(first, second)
	w.must(w.compare(devices))
	var arrived, kept string
	w.must(w.source.QueryRow(w.ctx, "SELECT a.remarks, b.remarks FROM vn.patient a, vn.patient b WHERE a.id = $1 AND b.id = $2", patient, patient+1).Scan(&arrived, &kept))
	if arrived != "made offline" {
		t.Errorf("the edit that was made meanwhile did not arrive: %q", arrived)
	}
	if shared := w.text(second, "SELECT count(*) FROM patient WHERE id = ?", patient+1); shared == "1" && kept != "unseen by the lost slot" {
		t.Errorf("an edit based on an old version overwrote a newer one: %q", kept)
	}
}

// TestShutdownInTheMiddle asks the server to end while a device syncs, again and again: it ends in order, and nothing is
// lost.
func TestShutdownInTheMiddle(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 2, Patients: 8, Records: 40})
	_, stop := w.serve(t)
	w.addUsers(1)
	d := w.enrol(w.nurses[0], "phone")
	w.settle(d)
	for i := range 3 {
		w.exec(d, "UPDATE patient SET remarks = ? WHERE id = (SELECT min(id) FROM patient)", fmt.Sprint("round ", i))
		ctx, cancel := context.WithTimeout(w.ctx, 3*time.Second) // the device would look for its server for longer
		done := make(chan error, 1)
		go func() {
			_, err := d.Sync(ctx, device.SyncOptions{Progress: func(p device.Progress) {
				if p.Stage == device.StageWait {
					go stop()
				}
			}})
			done <- err
		}()
		if err := <-done; err != nil && !errors.Is(err, device.ErrUnreachable) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("round %d: %v", i, err)
		}
		cancel()
		stop()
		_, stop = w.serve(t)
	}
	w.settle(d)
	w.must(w.compare(map[*device.Device]nurse.Person{d: w.nurses[0]}))
	if got := w.text(d, "SELECT remarks FROM patient ORDER BY id LIMIT 1"); got != "round 2" {
		t.Errorf("the last edit is %q", got)
	}
}
