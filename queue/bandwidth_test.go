package queue_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/waystage/waystage/protocol"
)

// TestBandwidth: what a device of a user with a bandwidth sends and fetches beyond it has to wait, whatever was sent before the bandwidth
// was known; nobody else waits, and no longer than the bandwidth says.
func TestBandwidth(t *testing.T) {
	var limit atomic.Int64
	limit.Store(32 << 10)
	b := start(t, func(b *bench) {
		b.gwcfg.Bandwidth = func(_ context.Context, user string) (int64, error) {
			switch user {
			case "alice":
				return limit.Load(), nil
			case "a_b":
				return 0, errors.New("the database is away")
			}
			return 0, nil
		}
	})
	part := bytes.Repeat([]byte("x"), 320<<10) // ten seconds' worth
	for _, free := range []string{"bob/phone", "a_b/phone"} {
		d := b.device(free)
		for n := range 3 {
			if r := d.put(session(n+1), "1-1", part, nil); !r.Stored {
				t.Fatalf("%s waits, who has no bandwidth: %+v", free, r.Error)
			}
		}
	}
	d := b.device("alice/phone")
	if r := d.put(session(1), "1-1", part, nil); !r.Stored {
		t.Fatalf("the first part of all: %+v", r.Error)
	}
	var e *protocol.Error
	eventually(t, "the bandwidth is not known", func() error {
		if e = d.put(session(2), "1-1", []byte("x"), nil).Error; e == nil {
			return errors.New("the part is taken")
		}
		return nil
	})
	if e.Code != protocol.CodeBusy || e.Retry < 2 || e.Retry > 10 {
		t.Errorf("%+v: want busy for nearly ten seconds", e)
	}
	// A page counts as well as a part, for another device of the user on its own.
	if err := b.q.PutPage(within(t), "alice", "tablet", session(1), 1, "application/cbor", "", part); err != nil {
		t.Fatal(err)
	}
	tablet := b.device("alice/tablet")
	if m := tablet.ask("get", nil, nil, session(1), "1"); len(m.Data) != len(part) {
		t.Fatalf("the first page: %d bytes, %v", len(m.Data), m.Header)
	}
	if m := tablet.ask("get", nil, nil, session(1), "1"); m.Header.Get("Ws-Error") != string(protocol.CodeBusy) {
		t.Errorf("the page again: %d bytes, %v", len(m.Data), m.Header)
	}
	if st := decode[protocol.Status](t, d.ask("status", nil, nil, session(1))); st.Error != nil {
		t.Errorf("a call that carries nothing waits: %+v", st.Error)
	}
}
