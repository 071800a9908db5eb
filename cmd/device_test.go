package cmd

import (
	"strings"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
)

// handleOnDevice deals with the one rejected record of a device: an insert of a visit, outside its subset.
func (o *operator) handleOnDevice(dev string) {
	t := o.t
	t.Helper()
	log := data[[]device.Receipt](o, exitOK, "device log -o json --state rejected"+dev)
	if len(log) != 1 || log[0].Entry != 1 || log[0].Code != protocol.CodeNotSubscribed || log[0].Handling != device.RejectOpen || log[0].Frozen.IsZero() || log[0].Received.IsZero() || log[0].Staged.IsZero() || log[0].Final.IsZero() {
		t.Errorf("log: %+v", log)
	}
	shown := data[device.RejectNow](o, exitOK, "device rejects show 1 -o json"+dev)
	if shown.Now != nil || shown.Row != nil || shown.Sent["patient_id"] == nil || len(shown.Changed) == 0 {
		t.Errorf("show: %+v", shown)
	}
	o.run(exitPrecondition, "", "device rejects show 77"+dev)
	o.run(exitUsage, "", "device rejects show one"+dev)
	o.run(exitUsage, "", "device rejects ls --state closed"+dev)
	o.run(exitUsage, "", "device rejects ls --since yesterday-ish"+dev)
	o.run(exitUsage, "", "device rejects discard"+dev)
	o.run(exitUsage, "", "device rejects discard 1 --all"+dev)
	o.run(exitUsage, "", "device rejects discard 1 --table visit"+dev)
	o.run(exitUsage, "", "device rejects resubmit 1 --set patient_id"+dev)
	o.run(exitUsage, "", "device rejects resubmit 1 --set nonsense=1"+dev)
	o.run(exitUsage, "", "device rejects resubmit 1 --null id"+dev)
	o.run(exitUsage, "", "device rejects resubmit 1 --set state=done --null state"+dev)
	o.run(exitUsage, "", "device keep --syncs 0"+dev)
	o.run(exitUsage, "", "device log --state gone"+dev)
	o.run(exitUsage, "", "device log --follow -o json"+dev)

	if l := data[[]device.Handled](o, exitOK, "device rejects discard --all --table visit --reason not_subscribed --since 1h -o json"+dev); len(l) != 1 || l[0].Status != device.RejectDiscarded {
		t.Errorf("discard: %+v", l)
	}
	if l := data[[]device.Reject](o, exitOK, "device rejects -o json"+dev); len(l) != 0 {
		t.Errorf("still open: %+v", l)
	}
	if l := data[[]device.Reject](o, exitOK, "device rejects ls --state all -o json"+dev); len(l) != 1 || l[0].Status != device.RejectDiscarded {
		t.Errorf("all: %+v", l)
	}
	if got := waystage(t, nil, "", append(strings.Fields("__complete device rejects restore"+dev), "")...); !strings.Contains(got.out, "1\tvn.visit") {
		t.Errorf("completion: %q", got.out)
	}
	// Discarding is no end: restored, it is an unsent edit again, and a second time nothing.
	if l := data[[]device.Handled](o, exitOK, "device rejects restore 1 -o json"+dev); len(l) != 1 || !l[0].Edited {
		t.Errorf("restore: %+v", l)
	}
	if l := data[[]device.Handled](o, exitOK, "device rejects restore 1 -o json"+dev); len(l) != 1 || l[0].Edited {
		t.Errorf("restore again: %+v", l)
	}
	o.run(exitPrecondition, "", "device rejects resubmit 1"+dev)
	if l := data[[]device.Receipt](o, exitOK, "device log -o json --state unsent"+dev); len(l) != 1 || l[0].Op != protocol.Insert {
		t.Errorf("unsent: %+v", l)
	}
	o.run(exitRejected, "", "device sync"+dev)
	// Corrected to a patient of hers it goes with the next sync.
	d, err := device.Open(t.Context(), strings.TrimPrefix(dev, " --file "), device.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var patient string
	if err := d.DB().QueryRow("SELECT min(id) FROM patient").Scan(&patient); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if got := o.run(exitOK, "", "device rejects resubmit 2 --set patient_id="+patient+" --null remarks"+dev); !strings.Contains(got.out, "the row is changed") {
		t.Errorf("resubmit: %q", got.out)
	}
	o.run(exitPrecondition, "", "device rejects discard 2"+dev)
	o.run(exitOK, "", "device keep --rejects 90d --receipts 12h"+dev)
	if got := o.run(exitOK, "", "device keep"+dev); !strings.Contains(got.out, "90 days") || !strings.Contains(got.out, "12 h") {
		t.Errorf("keep: %q", got.out)
	}
}
