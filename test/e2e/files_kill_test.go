package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	shared "github.com/waystage/waystage/test/world"
)

// TestKilledDuringATransfer: a device whose process is killed again and again while contents come and go has in the end every content
// whole, and the server has what it put, once.
func TestKilledDuringATransfer(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 2, Patients: 4, Records: 1})
	w.must(os.WriteFile(w.config.Definitions, []byte(`version: 1
subscriptions:
  patients: {table: vn.patient, columns: [id, name]}
files:
  manuals: {path: manuals/**}
  photos: {path: photos/**, upload: true}
sets:
  field: [patients, manuals, photos]
groups:
  nurses: {sets: [field]}
`), 0o600))
	info, _ := w.serve(t)
	store := w.fileStore(info)
	w.addUsers(1)
	const size = 6 << 20 // 24 chunks
	down := [][]byte{noise(1, size), noise(2, size), noise(3, 1000)}
	for i, content := range down {
		w.publish(store, fmt.Sprintf("manuals/%d.pdf", i), content)
	}
	d := w.enrol(w.nurses[0], "phone")
	rep, err := d.Sync(w.ctx, device.SyncOptions{}) // it knows its subscriptions
	w.must(err)
	if rep.Files.Fetched != len(down) {
		t.Fatalf("%+v", rep.Files)
	}
	up := noise(4, size)
	w.put(d, "photos/wound.jpg", up)
	for i := range down { // other contents under the same paths
		down[i] = noise(uint64(10+i), len(down[i]))
		w.publish(store, fmt.Sprintf("manuals/%d.pdf", i), down[i])
	}
	file := filepath.Join(w.dir, w.nurses[0].Login+"-phone.db")
	w.must(d.Close())

	binary := filepath.Join(w.dir, "waystage")
	w.must(shared.Build(binary, ""))
	r := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	killed := 0
	for most := time.Duration(40); ; most += 10 { // milliseconds; longer and longer, so that it gets through on any machine
		p := &shared.Process{Args: []string{binary, "device", "sync", "--file", file}, Log: filepath.Join(w.dir, "device.log")}
		w.must(p.Start())
		ended := false
		select {
		case <-p.Ended():
			ended = true
		case <-time.After(time.Duration(r.Int64N(int64(most * time.Millisecond)))):
		}
		p.Kill()
		if ended {
			break
		}
		killed++
		if most > 60_000 {
			t.Fatalf("after %d kills the sync does not get through:\n%s", killed, p.Tail(20))
		}
	}
	if killed < 3 {
		t.Errorf("killed only %d times", killed)
	}
	t.Logf("killed %d times", killed)

	d, err = device.Open(w.ctx, file, device.Options{App: "e2e"})
	w.must(err)
	defer func() { _ = d.Close() }()
	if rep := w.sync(d, "merge"); rep.Files.Fetched+rep.Files.Sent+rep.Files.Missing != 0 {
		t.Errorf("after the last sync was through: %+v", rep.Files)
	}
	for i, content := range down {
		if got := w.read(d, fmt.Sprintf("manuals/%d.pdf", i)); !bytes.Equal(got, content) {
			t.Errorf("content %d: %d bytes, which are not those that were published", i, len(got))
		}
	}
	if got := w.read(d, "photos/wound.jpg"); !bytes.Equal(got, up) {
		t.Error("the device's own content is another")
	}
	var at bytes.Buffer
	if _, err := store.Copy(w.ctx, "photos/wound.jpg", &at); err != nil || !bytes.Equal(at.Bytes(), up) {
		t.Errorf("%v: the server has %d bytes, not those that were put", err, at.Len())
	}
	var uploads, applied int
	w.must(w.mirror.QueryRow(w.ctx, `SELECT count(*), count(*) FILTER (WHERE state = 'applied') FROM waystage.upload`).Scan(&uploads, &applied))
	if uploads != 1 || applied != 1 {
		t.Errorf("%d uploads, %d of them applied: want one", uploads, applied)
	}
	left, err := os.ReadDir(filepath.Join(file+"-files", "tmp"))
	if err == nil && len(left) > 0 {
		t.Errorf("%d unfinished contents are left, %s first", len(left), left[0].Name())
	}
	if report, err := d.Files().Check(w.ctx); err != nil || len(report.Bad) > 0 {
		t.Errorf("%v: damaged: %v", err, report.Bad)
	}
}
