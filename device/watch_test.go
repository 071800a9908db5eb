package device

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/waystage/waystage/protocol"
)

type awaited struct {
	wake Wake
	err  error
}

func await(ctx context.Context, d *Device, sets ...string) <-chan awaited {
	ch := make(chan awaited, 1)
	go func() {
		w, err := d.Await(ctx, sets...)
		ch <- awaited{w, err}
	}()
	return ch
}

func (s *memServer) lastAsked() (w protocol.Watch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.asked); n > 0 {
		w = s.asked[n-1]
	}
	return w
}

// TestAwait: a device that waits says what it holds, and wakes up for news, for edits of its own file, and when it is told to stop.
func TestAwait(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	srv := newServer(t)
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	hear := func(ch <-chan awaited) awaited {
		t.Helper()
		select {
		case a := <-ch:
			return a
		case <-ctx.Done():
			t.Fatal("it does not wake up")
			return awaited{}
		}
	}

	ch := await(ctx, d)
	srv.news <- []string{} // not held any longer by the gateway: it asks again by itself
	srv.news <- []string{"items", "extra"}
	if a := hear(ch); a.err != nil || a.wake.Edits || !slices.Equal(a.wake.Sets, []string{"items", "extra"}) {
		t.Fatalf("%+v", a)
	}
	asked := srv.lastAsked()
	if asked.Only || len(asked.Sets) != 2 || asked.Sets[0].Set != "items" || asked.Sets[0].Cursor != one[string](t, d, `SELECT cursor FROM _ws_set WHERE name = 'items'`) ||
		asked.Sets[0].Cursor == "" {
		t.Fatalf("it asked with %+v", asked)
	}

	ch = await(ctx, d, "notes")
	srv.news <- []string{"notes"}
	if a := hear(ch); a.err != nil || len(a.wake.Sets) != 1 {
		t.Fatalf("%+v", a)
	}
	if asked := srv.lastAsked(); !asked.Only || len(asked.Sets) != 1 || asked.Sets[0].Set != "notes" {
		t.Fatalf("it asked with %+v", asked)
	}

	// An edit while it waits, and one that is there already; of another set it is not spoken.
	ch = await(ctx, d)
	for srv.lastAsked().Only {
		time.Sleep(time.Millisecond)
	}
	if _, err := d.DB().ExecContext(ctx, `INSERT INTO item (id, grp, val) VALUES (1, 1, 'new')`); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if a := hear(ch); a.err != nil || !a.wake.Edits || a.wake.Sets != nil {
			t.Fatalf("%+v", a)
		}
		ch = await(ctx, d)
	}
	hear(ch)
	ch = await(ctx, d, "notes")
	srv.news <- []string{"notes"}
	if a := hear(ch); a.err != nil || a.wake.Edits {
		t.Fatalf("%+v", a)
	}
	srv.mustSync(t, d)
	if rep, err := d.Syncs(ctx); err != nil || rep[0].Sent != 1 {
		t.Fatalf("%v %+v", err, rep)
	}

	// Told to stop, and blocked.
	sctx, stop := context.WithCancel(ctx)
	ch = await(sctx, d)
	stop()
	if a := hear(ch); !errors.Is(a.err, context.Canceled) {
		t.Fatalf("%+v", a)
	}
	srv.mu.Lock()
	srv.deaf["a"] = true
	srv.mu.Unlock()
	if a := hear(await(ctx, d)); !errors.Is(a.err, ErrBlocked) {
		t.Fatalf("%+v", a)
	}
}
