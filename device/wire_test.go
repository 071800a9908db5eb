package device

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/waystage/waystage/protocol"
)

// errCut is what a broken connection looks like.
var errCut = errors.New("the connection broke")

// impatient makes a test's waits short.
var impatient = patience{busy: time.Millisecond, longest: time.Millisecond, poll: time.Millisecond, mismatch: time.Millisecond, check: 2 * time.Millisecond, most: time.Second}

// wire is the Transport of one device. fail is asked before and after every call.
type wire struct {
	s      *memServer
	device string
	fail   func(call string, after bool) error
}

func (w *wire) at(call string, after bool) error {
	if w.fail == nil {
		return nil
	}
	return w.fail(call, after)
}

// do runs a call that may fail before or after its effect.
func (w *wire) do(call string, fn func() error) error {
	if err := w.at(call, false); err != nil {
		return err
	}
	w.s.mu.Lock()
	blocked := w.s.deaf[w.device]
	var err error
	if blocked {
		err = &protocol.Error{Code: protocol.CodeBlocked, Message: "blocked"}
	} else {
		err = fn()
	}
	w.s.mu.Unlock()
	if cut := w.at(call, true); cut != nil {
		return cut
	}
	return err
}

func (w *wire) Enrol(_ context.Context, e protocol.Enrolment) (en protocol.Enrolled, err error) {
	err = w.do("enrol", func() error {
		if !nkeys.IsValidPublicUserKey(e.Key) {
			return &protocol.Error{Code: protocol.CodeKey, Message: "not a user key"}
		}
		w.s.nkeys[w.device] = e.Key
		en = protocol.Enrolled{User: "anna", Device: w.device, Sets: w.s.sets, Epoch: w.s.epoch}
		return nil
	})
	return en, err
}

func (w *wire) Rotate(_ context.Context, r protocol.Rotation) error {
	return w.do("rotate", func() error {
		if !nkeys.IsValidPublicUserKey(r.Key) {
			return &protocol.Error{Code: protocol.CodeKey, Message: "not a user key"}
		}
		w.s.nextKeys[w.device] = r.Key
		return nil
	})
}

func (w *wire) Put(_ context.Context, session, part string, p Payload) (r protocol.Receipt, err error) {
	err = w.do("put", func() error {
		i, k, err := protocol.ParsePart(part)
		if err != nil {
			return err
		}
		if len(p.Data) > 512<<10 {
			w.s.problem("a part of %d bytes", len(p.Data))
		}
		if w.s.parts[session] == nil {
			w.s.parts[session] = map[string]Payload{}
		}
		if old, ok := w.s.parts[session][part]; ok && bytes.Equal(old.Data, p.Data) {
			r.Duplicate = true
		}
		w.s.parts[session][part] = Payload{p.ContentType, p.Encoding, bytes.Clone(p.Data)}
		r.Stored = true
		whole := Payload{ContentType: p.ContentType, Encoding: p.Encoding}
		for j := 1; j <= k; j++ {
			x, ok := w.s.parts[session][protocol.PartToken(j, k)]
			if !ok {
				return nil
			}
			whole.Data = append(whole.Data, x.Data...)
		}
		if i == k || !r.Duplicate {
			delete(w.s.parts, session) // taken from the queue
			w.s.queue = append(w.s.queue, func() { w.s.take(w.device, whole) })
			w.s.work(w.s.lag)
		}
		return nil
	})
	return r, err
}

func (w *wire) Get(_ context.Context, session string, page int) (p Payload, err error) {
	err = w.do("get", func() error {
		defer w.s.work(0)
		var ok bool
		if p, ok = w.s.out[session][page]; ok {
			return nil
		}
		if w.s.seen[session] == nil {
			return &protocol.Error{Code: protocol.CodePending, Message: "no such page yet"}
		}
		return &protocol.Error{Code: protocol.CodeNotFound, Message: "the reply expired"}
	})
	return p, err
}

func (w *wire) Ack(_ context.Context, session string) error {
	return w.do("ack", func() error {
		delete(w.s.out, session)
		return nil
	})
}

func (w *wire) Status(_ context.Context, session string) (st protocol.Status, err error) {
	err = w.do("status", func() error {
		st.State = "unknown"
		switch {
		case w.s.seen[session] != nil:
			st.State, st.Pages = "replied", len(w.s.out[session])
		case len(w.s.parts[session]) > 0:
			st.State = "received" // some part is in the queue
		}
		return nil
	})
	return st, err
}

func (w *wire) News(ctx context.Context, ask protocol.Watch) (n protocol.News, err error) {
	err = w.do("watch", func() error {
		w.s.asked = append(w.s.asked, ask)
		return nil
	})
	if err != nil {
		return n, err
	}
	select {
	case n.Sets = <-w.s.news:
		return n, nil
	case <-ctx.Done():
		return n, ctx.Err()
	}
}

func (w *wire) Close() error { return nil }

// dial connects a device without faults.
func (s *memServer) dial(device string) Dialer {
	return func(context.Context, Login) (Transport, error) { return &wire{s: s, device: device}, nil }
}

// device opens a new file and enrols it.
func (s *memServer) device(t testing.TB, name string, o Options) *Device {
	t.Helper()
	if o.Dial == nil {
		o.Dial = s.dial(name)
	}
	d, err := Open(context.Background(), filepath.Join(t.TempDir(), name+".db"), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	d.patience, d.durability = impatient, "OFF"
	if err := d.Enrol(context.Background(), EnrolOptions{Servers: []string{"mem"}, User: "anna", Device: name, Password: "x"}); err != nil {
		t.Fatal(err)
	}
	return d
}

func (s *memServer) mustSync(t testing.TB, d *Device) Report {
	t.Helper()
	rep, err := d.Sync(context.Background(), SyncOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

// same demands that the device holds exactly its subset of the mirror.
func (s *memServer) same(t fataler, d *Device) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for table, local := range map[string]string{"public.item": "item", "public.note": "note"} {
		have := images(t, d, table)
		want := map[string]image{}
		for k, r := range s.rows[table] {
			if s.visible(table, r.img, s.subset) {
				want[k] = r.img
			}
		}
		for k, img := range want {
			if !imgEqual(have[k], img) {
				t.Fatalf("%s %s: the device has %s, the server %s", local, k, show(have[k]), show(img))
			}
		}
		for k, img := range have {
			if want[k] == nil {
				t.Fatalf("%s %s: the device has %s, the server nothing", local, k, show(img))
			}
		}
	}
}

// images reads a device's table in wire form.
func images(t fataler, d *Device, wire string) map[string]image {
	t.Helper()
	out := map[string]image{}
	err := d.read(context.Background(), func(tx *txn) error {
		c, err := tx.load()
		if err != nil {
			return err
		}
		tab := c.tables[wire]
		if tab == nil {
			return nil
		}
		return tx.each("SELECT "+tab.sql.columns+" FROM "+quote(tab.Local), nil, func(scan func(...any) error) error {
			vals, into := make([]any, len(tab.Cols)), make([]any, len(tab.Cols))
			for i := range vals {
				into[i] = &vals[i]
			}
			if err := scan(into...); err != nil {
				return err
			}
			img := tab.image(vals)
			var key []*string
			for _, k := range tab.Key {
				key = append(key, img[k])
			}
			out[keyOf(key)] = img
			return nil
		})
	})
	if err != nil {
		t.Fatalf("%v", err)
	}
	return out
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}
