package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/files"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
)

// filesModel says what must be: one server, and devices that sync one after the other.
type filesModel struct {
	server map[string]string // path -> content; none: no such file
	device []*modelDevice
}

type modelDevice struct {
	user    string
	keys    map[string]bool // patients of the user
	view    map[string]string
	pending []modelChange
}

// modelChange is a change made on a device: on what it showed, or on top of an earlier one.
type modelChange struct {
	path, base, content string // content "": removed
}

// shows is what a device shows under a path.
func (d *modelDevice) shows(path string) string {
	for _, c := range slices.Backward(d.pending) {
		if c.path == path {
			return c.content
		}
	}
	return d.view[path]
}

// change notes one, by the rule that what was not sent yet is replaced.
func (d *modelDevice) change(path, content string) {
	base := d.view[path]
	for i, c := range d.pending {
		if c.path == path {
			base = c.base
			d.pending = slices.Delete(d.pending, i, i+1)
			break
		}
	}
	if base == "" && content == "" {
		return
	}
	d.pending = append(d.pending, modelChange{path, base, content})
}

// sync tells how many changes are rejected.
func (m *filesModel) sync(d *modelDevice) (sent, rejected int) {
	for _, c := range d.pending {
		sent++
		key := strings.Split(c.path, "/")[1]
		now := m.server[c.path]
		switch {
		case !d.keys[key], now != c.base && now != c.content:
			rejected++
		case c.content == "":
			delete(m.server, c.path)
		default:
			m.server[c.path] = c.content
		}
	}
	d.pending, d.view = nil, map[string]string{}
	for path, content := range m.server {
		if parts := strings.Split(path, "/"); parts[0] == "manuals" || d.keys[parts[1]] {
			d.view[path] = content
		}
	}
	return sent, rejected
}

// TestFilesRandomHistory publishes, removes, assigns, puts and syncs at random, cuts connections between any two calls, closes and opens
// devices, and holds every device after every sync against a model of what must be.
func TestFilesRandomHistory(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv(EnvSeed); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("to repeat: %s=%d", EnvSeed, seed)
	w := newWorld(t, nurse.Size{Nurses: 2, Patients: 4, Records: 4})
	defs := strings.Replace(nurse.Definitions(), "\nsets:\n", `
files:
  manuals: {path: "manuals/**"}
  wounds: {path: "patients/{key}/*", rows: "select unnest(string_to_array(:user.patients, ','))", upload: true}

sets:
`, 1)
	w.must(os.WriteFile(w.config.Definitions, []byte(strings.Replace(defs, "visits, records]", "visits, records, manuals, wounds]", 1)), 0o644))
	info, _ := w.serve(t)
	store := w.fileStore(info)
	w.addUsers(2)
	users := registry.New(w.mirror, nil)
	r := rand.New(rand.NewPCG(seed, 3))
	m := &filesModel{server: map[string]string{}}
	var devices []*device.Device
	var names []string
	var left atomic.Int64
	reopen := func(i int) {
		w.must(devices[i].Close())
		d, err := device.Open(w.ctx, filepath.Join(w.dir, names[i]+".db"), device.Options{Dial: cutting(&left)})
		w.must(err)
		devices[i] = d
	}
	for i, p := range []nurse.Person{w.nurses[0], w.nurses[0], w.nurses[1]} {
		name := fmt.Sprintf("device-%d", i)
		devices, names = append(devices, w.enrol(p, name)), append(names, p.Login+"-"+name)
		m.device = append(m.device, &modelDevice{user: p.Login, keys: map[string]bool{}, view: map[string]string{}})
		reopen(i)
		t.Cleanup(func() { _ = devices[i].Close() })
	}
	texts := []string{"a", "b", strings.Repeat("c", protocol.FileChunk), strings.Repeat("d", 2*protocol.FileChunk+1)}
	text := func() string { return texts[r.IntN(len(texts))] }
	path := func() string { return fmt.Sprintf("patients/%d/%d", r.IntN(3), r.IntN(2)) }
	syncs, cuts := 0, 0
	for range 60 {
		switch op := r.IntN(10); {
		case op == 0: // publish
			p, c := fmt.Sprintf("manuals/%d", r.IntN(3)), text()
			if r.IntN(2) == 0 {
				p = path()
			}
			w.publish(store, p, []byte(c))
			m.server[p] = c
		case op == 1: // remove
			p := path()
			if err := store.Remove(w.ctx, p, "test"); err != nil && !errors.Is(err, files.ErrNoFile) {
				t.Fatal(err)
			}
			delete(m.server, p)
		case op == 2: // assign
			u := m.device[r.IntN(3)].user
			keys, list := map[string]bool{}, []string{}
			for k := range 3 {
				if key := strconv.Itoa(k); r.IntN(3) > 0 {
					keys[key], list = true, append(list, key)
				}
			}
			w.must(users.ChangeUser(w.ctx, u, registry.UserChange{Set: map[string]string{"patients": strings.Join(list, ",")}}))
			for _, d := range m.device {
				if d.user == u {
					d.keys = keys
				}
			}
		case op < 6: // put or remove on a device
			i := r.IntN(3)
			p, c := path(), text()
			if r.IntN(4) == 0 {
				c = ""
			}
			if c == "" && m.device[i].shows(p) == "" || m.device[i].shows(p) == c {
				continue
			}
			var err error
			if c == "" {
				_, err = devices[i].Files().Remove(w.ctx, p)
			} else {
				_, err = devices[i].Files().Put(w.ctx, p, "", strings.NewReader(c))
			}
			if errors.Is(err, device.ErrNoUpload) { // it has not synced yet, and knows of no subscription
				continue
			}
			w.must(err)
			m.device[i].change(p, c)
		default:
			i := r.IntN(3)
			sent, rejected := m.sync(m.device[i])
			gotSent, gotRejected := 0, 0
			for left.Store(int64(r.IntN(4))); ; left.Store(int64(1 + r.IntN(8))) {
				rep, err := devices[i].Sync(w.ctx, device.SyncOptions{})
				gotSent, gotRejected = gotSent+rep.Files.Sent, gotRejected+rep.Files.Rejected
				if err == nil {
					break
				}
				if !errors.Is(err, errCut) {
					t.Fatal(err)
				}
				cuts++
				reopen(i)
			}
			syncs++
			if gotSent != sent || gotRejected != rejected {
				t.Fatalf("%s: sent %d, rejected %d; want %d, %d", names[i], gotSent, gotRejected, sent, rejected)
			}
			list, err := devices[i].Files().List(w.ctx)
			w.must(err)
			if len(list) != len(m.device[i].view) {
				t.Fatalf("%s has %+v, want %d files", names[i], list, len(m.device[i].view))
			}
			for p, c := range m.device[i].view {
				if got := w.read(devices[i], p); !bytes.Equal(got, []byte(c)) {
					t.Fatalf("%s: %s has %d bytes, want %d", names[i], p, len(got), len(c))
				}
			}
		}
	}
	left.Store(1 << 40)
	list, err := store.List(w.ctx, "", false)
	w.must(err)
	if len(list) != len(m.server) {
		t.Errorf("the server has %d files, want %d", len(list), len(m.server))
	}
	for _, f := range list {
		if f.SHA256 != protocol.FileHash([]byte(m.server[f.Path])) {
			t.Errorf("the server has another %s", f.Path)
		}
	}
	if syncs == 0 {
		t.Error("nothing happened: the test proves nothing")
	}
	t.Logf("%d syncs, %d cuts", syncs, cuts)
}
