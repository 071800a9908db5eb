package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/waystage/waystage/cmd"
	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/protocol"
	shared "github.com/waystage/waystage/test/world"
)

// externalBroker starts a stock NATS server with the configuration that `waystage init --nats` writes.
func externalBroker(w *world) {
	w.t.Helper()
	path, keys, err := shared.Broker(filepath.Join(w.dir, "broker"), w.nats)
	w.must(err)
	o, err := server.ProcessConfigFile(path)
	w.must(err)
	o.NoLog, o.NoSigs = true, true
	s, err := server.NewServer(o)
	w.must(err)
	s.Start()
	w.t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	if !s.ReadyForConnections(patience) {
		w.t.Fatal("the broker does not get ready")
	}
	w.config.NATS.External.URLs = []string{"nats://" + w.nats}
	w.config.NATS.External.Credentials = keys
}

// TestTwoServersOnOneBroker runs two servers on a stock NATS server: devices are served by both, capture and apply are
// active in one, and when that one ends the other takes over.
func TestTwoServersOnOneBroker(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 3, Patients: 12, Records: 60})
	externalBroker(w)
	_, stopFirst := w.serve(t)
	w.config.Health.Listen = freeAddress(t)
	_, stopSecond := w.serve(t)
	w.addUsers(2)
	devices := map[*device.Device]nurse.Person{}
	var all []*device.Device
	for i, p := range w.nurses[:2] {
		d := w.enrol(p, fmt.Sprint("device-", i))
		devices[d] = p
		all = append(all, d)
	}
	round := func(name string) {
		t.Helper()
		for _, d := range all {
			w.exec(d, "UPDATE patient SET remarks = ? WHERE id = (SELECT max(id) FROM patient)", name+" "+devices[d].Login)
		}
		_, err := w.source.Exec(w.ctx, "UPDATE vn.medical_record SET note = $1", name)
		w.must(err)
		w.settle(all...)
		w.must(w.compare(devices))
		for _, d := range all {
			if got := w.text(d, "SELECT count(*) FROM medical_record WHERE note <> ?", name); got != "0" {
				t.Errorf("%s: %s records did not follow the source", name, got)
			}
		}
	}
	w.settle(all...)
	round("two servers")
	stopFirst()
	round("the second alone")
	w.config.Health.Listen = freeAddress(t)
	_, stopThird := w.serve(t)
	stopSecond()
	round("a third took over")
	stopThird()
}

// TestBlockingCutsTheConnection blocks a device that is connected and waits for a reply: by a third process, with two servers, of which
// neither knows whose gateway it waits at. Afterwards neither lets it in.
func TestBlockingCutsTheConnection(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 2, Patients: 8, Records: 20})
	externalBroker(w)
	w.serve(t)
	w.config.Health.Listen = freeAddress(t)
	w.serve(t)
	w.addUsers(1)
	d := w.enrol(w.nurses[0], "phone")
	w.sync(d, protocol.WaitMerge)
	waystage := func(args ...string) {
		t.Helper()
		if code := cmd.Main(append(args, "-c", w.configFile()), cmd.System()); code != 0 {
			t.Fatalf("waystage %v: exit code %d", args, code)
		}
	}
	hold, err := w.mirror.Begin(w.ctx) // no reply is finished meanwhile, so the sync waits for its
	w.must(err)
	defer func() { _ = hold.Rollback(w.ctx) }()
	_, err = hold.Exec(w.ctx, "LOCK TABLE waystage.cursor IN SHARE ROW EXCLUSIVE MODE")
	w.must(err)
	w.exec(d, "UPDATE patient SET remarks = 'kept' WHERE id = (SELECT min(id) FROM patient)")
	waiting, ended := make(chan struct{}, 1), make(chan error, 1)
	go func() {
		_, err := d.Sync(w.ctx, device.SyncOptions{Progress: func(p device.Progress) {
			if p.Stage == device.StageWait {
				select {
				case waiting <- struct{}{}:
				default:
				}
			}
		}})
		ended <- err
	}()
	<-waiting
	began := time.Now()
	waystage("devices", "block", w.nurses[0].Login+"/phone")
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the sync of a blocked device went through")
		}
		t.Logf("out after %s: %v", time.Since(began).Round(time.Millisecond), err)
	case <-time.After(patience):
		t.Fatal("the blocked device is still connected")
	}
	for range 4 { // each login is decided by one of the two
		if _, err := d.Sync(w.ctx, device.SyncOptions{}); !errors.Is(err, device.ErrLogin) {
			t.Errorf("a blocked device hears %v", err)
		}
	}
	waystage("devices", "unblock", w.nurses[0].Login+"/phone")
	w.must(hold.Rollback(w.ctx))
	w.settle(d)
	w.must(w.compare(map[*device.Device]nurse.Person{d: w.nurses[0]}))
	if got := w.text(d, "SELECT remarks FROM patient ORDER BY id LIMIT 1"); got != "kept" {
		t.Errorf("the edit of the blocked time is %q", got)
	}
}

// configFile writes the configuration for commands.
func (w *world) configFile() string {
	w.t.Helper()
	path := filepath.Join(w.dir, "waystage.yaml")
	w.must(shared.WriteConfig(path, w.config))
	return path
}
