package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/waystage/waystage/cmd"
	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/files"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/queue"
)

// fileDefinitions are the nurses', with files, and visits that wait for the file that their remarks name.
func fileDefinitions() string {
	s := strings.Replace(nurse.Definitions(), "    table: vn.visit\n", "    table: vn.visit\n    file_column: remarks\n    file: before\n", 1)
	s = strings.Replace(s, "\nsets:\n", "\nfiles:\n  manuals: {path: \"manuals/**\"}\n  wounds: {path: \"patients/{key}/**\", rows: *mine, upload: true, max_size: 2MiB}\n\nsets:\n", 1)
	return strings.Replace(s, "visits, records]", "visits, records, manuals, wounds]", 1)
}

// fileStore is the operator's door to the files.
func (w *world) fileStore(info cmd.Info) *files.Store {
	w.t.Helper()
	nc, err := nats.Connect(info.NATS, nats.UserInfo("app", info.Keys.App))
	w.must(err)
	w.t.Cleanup(nc.Close)
	c, err := queue.NewChunks(nc)
	w.must(err)
	return files.New(files.Config{}, w.mirror, c, nil, nil)
}

func (w *world) publish(s *files.Store, path string, content []byte) {
	w.t.Helper()
	_, _, err := s.Publish(w.ctx, files.Publication{Path: path, By: "test"}, bytes.NewReader(content))
	w.must(err)
}

// read is what a device shows under a path; nil: there is no such file, or its content is not here.
func (w *world) read(d *device.Device, path string) []byte {
	w.t.Helper()
	f, _, err := d.Files().Open(w.ctx, path)
	if errors.Is(err, device.ErrNoFile) || errors.Is(err, device.ErrFileAway) {
		return nil
	}
	w.must(err)
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(f)
	w.must(err)
	return append([]byte{}, b...)
}

func (w *world) put(d *device.Device, path string, content []byte) {
	w.t.Helper()
	_, err := d.Files().Put(w.ctx, path, "image/jpeg", bytes.NewReader(content))
	w.must(err)
}

// contents counts the contents in a device's folder.
func (w *world) contents(name string) (n int) {
	w.t.Helper()
	err := filepath.WalkDir(filepath.Join(w.dir, name+".db-files"), func(_ string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			n++
		}
		return err
	})
	w.must(err)
	return n
}

func noise(seed uint64, size int) []byte {
	b := make([]byte, size)
	r := rand.New(rand.NewPCG(seed, 7))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

var errCut = errors.New("the connection was cut")

// cutter is a transport whose calls for files fail from the nth on, before or after they have had their effect.
type cutter struct {
	device.Transport
	left *atomic.Int64
}

func cutting(left *atomic.Int64) device.Dialer {
	return func(ctx context.Context, l device.Login) (device.Transport, error) {
		tr, err := device.DialNATS(ctx, l)
		if err != nil {
			return nil, err
		}
		return cutter{tr, left}, nil
	}
}

func cut[T any](c cutter, f func(device.FileTransport) (T, error)) (v T, err error) {
	n := c.left.Add(-1)
	if n < 0 {
		return v, errCut
	}
	if v, err = f(c.Transport.(device.FileTransport)); n == 0 && err == nil {
		var none T
		return none, errCut // it was done, and the answer is lost
	}
	return v, err
}

func (c cutter) FileGet(ctx context.Context, sha string, n int) ([]byte, error) {
	return cut(c, func(t device.FileTransport) ([]byte, error) { return t.FileGet(ctx, sha, n) })
}

func (c cutter) FileOffer(ctx context.Context, id string, o protocol.FileOffer) (protocol.FileReceipt, error) {
	return cut(c, func(t device.FileTransport) (protocol.FileReceipt, error) { return t.FileOffer(ctx, id, o) })
}

func (c cutter) FilePut(ctx context.Context, id string, n int, data []byte) (protocol.FileReceipt, error) {
	return cut(c, func(t device.FileTransport) (protocol.FileReceipt, error) { return t.FilePut(ctx, id, n, data) })
}

func (c cutter) FileCommit(ctx context.Context, id string) (protocol.FileReceipt, error) {
	return cut(c, func(t device.FileTransport) (protocol.FileReceipt, error) { return t.FileCommit(ctx, id) })
}

// TestFilesTheWholeWay takes files along the whole way: published, fetched, put, removed, refused, lost and brought back.
func TestFilesTheWholeWay(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 4, Patients: 24, Records: 60})
	w.must(os.WriteFile(w.config.Definitions, []byte(fileDefinitions()), 0o644))
	outer := t
	amina, bruno := w.nurses[0], w.nurses[1]
	var hers int64 // a patient of amina's that is not bruno's
	w.must(w.source.QueryRow(w.ctx, `WITH p AS (SELECT max(id) AS id FROM vn.patient WHERE id NOT IN (SELECT patient_id FROM vn.assignment WHERE nurse_id IN ($1, $2)))
		INSERT INTO vn.assignment SELECT $1, id, '2026-01-01' FROM p RETURNING patient_id`, amina.ID, bruno.ID).Scan(&hers))
	info, stop := w.serve(t)
	store := w.fileStore(info)
	w.addUsers(2)
	phone, tablet := w.enrol(amina, "phone"), w.enrol(bruno, "tablet")
	both := int64(nurse.FirstPatient) // has both nurses
	of := func(patient int64, name string) string { return fmt.Sprintf("patients/%d/%s", patient, name) }
	manual, wound := noise(1, 3*protocol.FileChunk+17), noise(2, 1000)
	show := func(d *device.Device, path string, want []byte) {
		w.t.Helper()
		if got := w.read(d, path); !bytes.Equal(got, want) || (got == nil) != (want == nil) {
			w.t.Errorf("%s has %d bytes, want %d", path, len(got), len(want))
		}
	}

	w.step("down", func(t *testing.T) {
		w.publish(store, "manuals/pump.pdf", manual)
		w.publish(store, "manuals/empty", nil)
		w.publish(store, of(hers, "a.jpg"), wound)
		w.publish(store, "elsewhere", []byte("nobody's"))
		if rep := w.sync(phone, ""); rep.Files.Fetched != 3 || rep.Files.Bytes != int64(len(manual)+len(wound)) {
			t.Errorf("%+v", rep.Files)
		}
		w.sync(tablet, "")
		show(phone, "manuals/pump.pdf", manual)
		show(phone, "manuals/empty", []byte{})
		show(phone, of(hers, "a.jpg"), wound)
		show(phone, "elsewhere", nil)
		show(tablet, "manuals/pump.pdf", manual)
		show(tablet, of(hers, "a.jpg"), nil)
		// Only what changed, and equal contents once.
		w.publish(store, "manuals/copy.pdf", manual)
		w.publish(store, "manuals/new.txt", []byte("new"))
		if rep := w.sync(phone, ""); rep.Files.Fetched != 1 || rep.Files.Bytes != 3 {
			t.Errorf("%+v", rep.Files)
		}
		show(phone, "manuals/copy.pdf", manual)
		if rep := w.sync(phone, ""); rep.Files != (device.FileTotals{}) {
			t.Errorf("nothing was new: %+v", rep.Files)
		}
		w.must(store.Remove(w.ctx, "manuals/pump.pdf", "test"))
		w.sync(phone, "")
		show(phone, "manuals/pump.pdf", nil)
		show(phone, "manuals/copy.pdf", manual)
		if n := w.contents(amina.Login + "-phone"); n != 4 { // the manual, empty, the wound, new.txt
			t.Errorf("%d contents are on the device", n)
		}
	})

	w.step("by hash", func(t *testing.T) {
		tr, err := device.DialNATS(w.ctx, device.Login{Servers: []string{"nats://" + w.nats}, User: bruno.Login, Device: "tablet", Password: password})
		w.must(err)
		defer func() { _ = tr.Close() }()
		ftr := tr.(device.FileTransport)
		for _, sha := range []string{protocol.FileHash(wound), protocol.FileHash([]byte("nobody's")), "x"} {
			_, err := ftr.FileGet(w.ctx, sha, 1)
			var e *protocol.Error
			if !errors.As(err, &e) || e.Code != protocol.CodeNotFound {
				t.Errorf("%s: %v", sha, err)
			}
		}
		r, err := ftr.FileOffer(w.ctx, strings.Repeat("a", 32), protocol.FileOffer{Path: of(hers, "b.jpg"), Op: protocol.FilePut, SHA256: protocol.FileHash(wound), Size: 1000})
		if err != nil || r.State != protocol.Rejected || r.Code != protocol.CodeNotSubscribed {
			t.Errorf("%+v, %v", r, err)
		}
	})

	w.step("up", func(t *testing.T) {
		photo := noise(3, 2*protocol.FileChunk+1)
		w.put(phone, of(both, "photo.jpg"), photo)
		show(phone, of(both, "photo.jpg"), photo) // at once
		if rep := w.sync(phone, ""); rep.Files.Sent != 1 || rep.Files.Rejected != 0 || rep.Files.Fetched != 0 {
			t.Errorf("%+v", rep.Files)
		}
		show(phone, of(both, "photo.jpg"), photo)
		w.sync(tablet, "")
		show(tablet, of(both, "photo.jpg"), photo)
		// Both change it: one wins, the other is told with the right version, and nothing is lost.
		one, two := noise(4, 10), noise(5, 10)
		w.put(phone, of(both, "photo.jpg"), one)
		w.put(tablet, of(both, "photo.jpg"), two)
		w.sync(phone, "")
		if rep := w.sync(tablet, ""); rep.Files.Rejected != 1 {
			t.Errorf("%+v", rep.Files)
		}
		show(tablet, of(both, "photo.jpg"), one)
		ups, err := tablet.Files().Uploads(w.ctx)
		w.must(err)
		if len(ups) != 1 || ups[0].State != protocol.Rejected || ups[0].Code != protocol.CodeStale || ups[0].Right != protocol.FileHash(one) {
			t.Fatalf("%+v", ups)
		}
		kept, err := tablet.Files().OpenUpload(w.ctx, ups[0].ID)
		w.must(err)
		mine, err := io.ReadAll(kept)
		w.must(errors.Join(err, kept.Close()))
		if !bytes.Equal(mine, two) {
			t.Error("what was rejected is lost")
		}
		// Two edits in a row, one while the other is on its way: both get through.
		w.put(tablet, of(both, "photo.jpg"), two)
		w.sync(tablet, "")
		w.sync(phone, "")
		show(phone, of(both, "photo.jpg"), two)
		_, err = phone.Files().Remove(w.ctx, of(both, "photo.jpg"))
		w.must(err)
		show(phone, of(both, "photo.jpg"), nil)
		w.sync(phone, "")
		w.sync(tablet, "")
		show(tablet, of(both, "photo.jpg"), nil)
		// What no server would take is refused here.
		for path, want := range map[string]error{"manuals/x": device.ErrNoUpload, of(both, "big"): device.ErrFileLarge} {
			if _, err := phone.Files().Put(w.ctx, path, "", bytes.NewReader(make([]byte, 2<<20+1))); !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", path, err, want)
			}
		}
		var refused *protocol.Error
		if _, err := phone.Files().Put(w.ctx, of(both, "../x"), "", strings.NewReader("x")); !errors.As(err, &refused) || refused.Code != protocol.CodePath {
			t.Errorf("%v", err)
		}
	})

	w.step("cut between any two calls", func(t *testing.T) {
		down, up := noise(6, 4*protocol.FileChunk+5), noise(7, 2*protocol.FileChunk+5)
		w.publish(store, "manuals/cut.pdf", down)
		file := filepath.Join(w.dir, bruno.Login+"-tablet.db")
		w.must(tablet.Close())
		var left atomic.Int64
		d, err := device.Open(w.ctx, file, device.Options{Dial: cutting(&left)})
		w.must(err)
		w.put(d, of(both, "cut.jpg"), up)
		syncs, done := 0, false
		for ; !done && syncs < 60; syncs++ {
			left.Store(int64(1 + syncs%3))
			_, err := d.Sync(w.ctx, device.SyncOptions{})
			if err != nil && !errors.Is(err, errCut) {
				t.Fatal(err)
			}
			done = err == nil
			if got := w.read(d, "manuals/cut.pdf"); got != nil && !bytes.Equal(got, down) {
				t.Fatal("half a content is shown")
			}
			w.must(d.Close()) // and started again
			d, err = device.Open(w.ctx, file, device.Options{Dial: cutting(&left)})
			w.must(err)
		}
		if !done || syncs < 3 {
			t.Fatalf("%d syncs, done: %t", syncs, done)
		}
		show(d, "manuals/cut.pdf", down)
		show(d, of(both, "cut.jpg"), up)
		ups, err := store.Uploads(w.ctx, bruno.Login, "tablet", protocol.Applied, 10)
		if err != nil || len(ups) != 2 { // this one, and the photo before
			t.Errorf("%+v, %v", ups, err)
		}
		w.sync(phone, "")
		show(phone, of(both, "cut.jpg"), up)
		w.must(d.Close())
		tablet, err = device.Open(w.ctx, file, device.Options{})
		w.must(err)
		w.t.Cleanup(func() { _ = tablet.Close() })
		t.Logf("%d syncs", syncs)
	})

	w.step("a row comes with its file", func(t *testing.T) {
		const visit = "e2e00000-0000-4000-8000-00000000000f"
		plan := noise(8, 2*protocol.FileChunk)
		w.publish(store, of(both, "plan.pdf"), plan)
		_, err := w.source.Exec(w.ctx, "INSERT INTO vn.visit (id, patient_id, nurse_id, planned, remarks) VALUES ($1, $2, $3, now(), $4)", visit, both, bruno.ID, of(both, "plan.pdf"))
		w.must(err)
		w.eventually("the visit does not come", func() error {
			var there bool
			if err := w.mirror.QueryRow(w.ctx, "SELECT EXISTS (SELECT FROM vn.visit WHERE id = $1)", visit).Scan(&there); err != nil || !there {
				return fmt.Errorf("%t, %w", there, err)
			}
			return nil
		})
		w.must(tablet.Close())
		file := filepath.Join(w.dir, bruno.Login+"-tablet.db")
		var left atomic.Int64
		left.Store(1)
		d, err := device.Open(w.ctx, file, device.Options{Dial: cutting(&left)})
		w.must(err)
		if _, err := d.Sync(w.ctx, device.SyncOptions{}); !errors.Is(err, errCut) || !errors.Is(err, device.ErrFiles) {
			t.Errorf("the sync ends with %v", err)
		}
		if got := w.text(d, "SELECT remarks FROM visit WHERE id = ?", visit); got != "(no row)" {
			t.Errorf("the row has come before its file: %s", got)
		}
		left.Store(1 << 30)
		w.sync(d, "")
		if got := w.text(d, "SELECT remarks FROM visit WHERE id = ?", visit); got != of(both, "plan.pdf") {
			t.Errorf("the row has not come: %s", got)
		}
		show(d, of(both, "plan.pdf"), plan)
		w.must(d.Close())
		tablet, err = device.Open(w.ctx, file, device.Options{})
		w.must(err)
	})

	w.step("the broker loses its store", func(t *testing.T) {
		stop()
		w.must(os.RemoveAll(filepath.Join(w.dir, "nats")))
		info, stop = w.serve(outer) // beyond this step
		store = w.fileStore(info)
		late := w.enrol(amina, "late")
		c, err := store.Check(w.ctx, false, nil)
		w.must(err)
		if len(c.Lost) == 0 {
			t.Fatal("nothing is lost")
		}
		if rep := w.sync(late, ""); rep.Files.Missing == 0 || rep.Rows == 0 { // rows do not wait for what nobody has
			t.Errorf("%+v, %d rows", rep.Files, rep.Rows)
		}
		w.eventually("the devices do not bring the contents back", func() error {
			w.sync(phone, "")
			w.sync(tablet, "")
			c, err := store.Check(w.ctx, true, nil)
			if err != nil {
				return err
			}
			var lost []string
			for _, f := range c.Lost {
				if f.Path != "elsewhere" { // no device has it
					lost = append(lost, f.Path)
				}
			}
			if len(lost) > 0 {
				return fmt.Errorf("lost: %v", lost)
			}
			return nil
		})
		w.publish(store, "elsewhere", []byte("nobody's"))
		w.sync(late, "")
		show(late, "manuals/copy.pdf", manual)
		show(late, of(hers, "a.jpg"), wound)
	})

	w.step("what leaves the subset leaves the device", func(t *testing.T) {
		_, err := w.source.Exec(w.ctx, "DELETE FROM vn.assignment WHERE nurse_id = $1 AND patient_id = $2", amina.ID, hers)
		w.must(err)
		before := w.contents(amina.Login + "-phone")
		w.eventually("the file stays", func() error {
			w.sync(phone, "")
			if w.read(phone, of(hers, "a.jpg")) != nil {
				return errors.New("it is there")
			}
			return nil
		})
		if n := w.contents(amina.Login + "-phone"); n != before-1 {
			t.Errorf("%d contents, there were %d", n, before)
		}
		if c, err := phone.Files().Check(w.ctx); err != nil || len(c.Bad) > 0 {
			t.Errorf("%+v, %v", c, err)
		}
	})
}
