package device

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/waystage/waystage/protocol"
)

// locksmith is a server that goes by keys: a device logs in with its key, or with the announced one, which then is its only.
type locksmith struct {
	srv     *memServer
	key     string
	next    string
	token   string // good once
	usedBy  string
	calls   int
	cut     int // this call breaks: odd numbers before, even numbers after its effect; 0: none
	refused int
}

// at counts a call, before and after; the one that is to break breaks.
func (l *locksmith) at(do func() error) error {
	l.calls++
	if l.calls == l.cut {
		return fmt.Errorf("%w: %w", ErrUnreachable, errCut)
	}
	err := do()
	l.calls++
	if l.calls == l.cut {
		return fmt.Errorf("%w: %w", ErrUnreachable, errCut)
	}
	return err
}

func (l *locksmith) dial(_ context.Context, login Login) (Transport, error) {
	err := l.at(func() error {
		switch {
		case login.Password == "s3cret", login.EnrolOnly != "" && login.EnrolOnly == l.token:
			return nil
		case login.Seed == nil:
			return ErrLogin
		}
		kp, err := nkeys.FromSeed(login.Seed)
		if err != nil {
			return err
		}
		switch public, _ := kp.PublicKey(); public {
		case l.key:
		case l.next:
			l.key, l.next = l.next, ""
		default:
			l.refused++
			return ErrLogin
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &locked{wire: &wire{s: l.srv, device: "d"}, l: l}, nil
}

type locked struct {
	*wire
	l *locksmith
}

func (w *locked) Enrol(ctx context.Context, e protocol.Enrolment) (en protocol.Enrolled, err error) {
	err = w.l.at(func() error {
		if e.Token != "" && w.l.usedBy != "" && w.l.usedBy != e.Key {
			return &protocol.Error{Code: protocol.CodeTokenUsed, Message: "used"}
		}
		if e.Library != Library {
			return errors.New("no library")
		}
		if e.Token != "" {
			w.l.usedBy = e.Key
		}
		en, err = w.wire.Enrol(ctx, e)
		w.l.key, w.l.next = e.Key, ""
		return err
	})
	return en, err
}

func (w *locked) Rotate(ctx context.Context, r protocol.Rotation) error {
	return w.l.at(func() error {
		w.l.next = r.Key
		return w.wire.Rotate(ctx, r)
	})
}

func (l *locksmith) open(t *testing.T, path string) *Device {
	t.Helper()
	d, err := Open(context.Background(), path, Options{Dial: l.dial})
	if err != nil {
		t.Fatal(err)
	}
	d.patience, d.durability = impatient, "OFF"
	return d
}

var enrolD = EnrolOptions{Servers: []string{"nats://x"}, User: "anna", Device: "d", Password: "s3cret"}

// TestRotateBrokenOff breaks a change of key at every step: the device can log in whatever the step was, comes to its new key, and the
// old one is refused.
func TestRotateBrokenOff(t *testing.T) {
	ctx := context.Background()
	for cut := 0; ; cut++ {
		l := &locksmith{srv: newServer(t)}
		path := filepath.Join(t.TempDir(), "d.db")
		d := l.open(t, path)
		if err := d.Enrol(ctx, enrolD); err != nil {
			t.Fatal(err)
		}
		old := l.key
		l.calls, l.cut = 0, cut
		err := d.Rotate(ctx)
		calls := l.calls
		if cut > 0 && err == nil {
			if calls >= cut {
				t.Fatalf("cut at %d: not noticed", cut)
			}
			_ = d.Close()
			break // the last step was cut
		}
		// As after a crash: opened again, by another process.
		_ = d.Close()
		l.calls, l.cut = 0, 0
		d = l.open(t, path)
		if n := one[int](t, d, `SELECT next_seed IS NOT NULL FROM _ws_state`); n == 0 && l.key == old { // it had not begun
			if err := d.Rotate(ctx); err != nil {
				t.Fatalf("cut at %d: %v", cut, err)
			}
		}
		if rep := l.srv.mustSync(t, d); rep.KeyProblem != "" {
			t.Errorf("cut at %d: %+v", cut, rep)
		}
		if l.key == old || l.next != "" {
			t.Errorf("cut at %d: the key was not changed", cut)
		}
		if rep := l.srv.mustSync(t, d); rep.NewKey {
			t.Errorf("cut at %d: changed again", cut)
		}
		s, err := d.Status(ctx)
		if err != nil || s.Fingerprint != protocol.Fingerprint(l.key) || s.KeyAt.IsZero() {
			t.Errorf("cut at %d: %+v %v", cut, s, err)
		}
		if n := one[int](t, d, `SELECT next_seed IS NOT NULL FROM _ws_state`); n != 0 {
			t.Errorf("cut at %d: a second key is left", cut)
		}
		_ = d.Close()
	}
}

// TestEnrolByTokenBrokenOff breaks an enrolment by token at every step: given again, it gets through with the one token.
func TestEnrolByTokenBrokenOff(t *testing.T) {
	ctx := context.Background()
	by := enrolD
	by.Password, by.Token = "", "wst_x"
	for cut := 1; ; cut++ {
		l := &locksmith{srv: newServer(t), token: "wst_x", cut: cut}
		d := l.open(t, filepath.Join(t.TempDir(), "d.db"))
		err := d.Enrol(ctx, by)
		if err == nil {
			_ = d.Close()
			break
		}
		l.cut = 0
		if err := d.Enrol(ctx, by); err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		l.srv.mustSync(t, d)
		// Another file cannot use it.
		other := l.open(t, filepath.Join(t.TempDir(), "o.db"))
		wantErr(t, other.Enrol(ctx, by), ErrToken)
		_ = other.Close()
		_ = d.Close()
	}
}

func TestKeyIsDue(t *testing.T) {
	ctx := context.Background()
	l := &locksmith{srv: newServer(t)}
	path := filepath.Join(t.TempDir(), "d.db")
	d := l.open(t, path)
	defer func() { _ = d.Close() }()
	wantErr(t, d.Rotate(ctx), ErrNotEnrolled)
	both := enrolD
	both.JWT = "x.y.z"
	if err := d.Enrol(ctx, both); err == nil || !strings.Contains(err.Error(), "one of") {
		t.Error(err)
	}
	long := enrolD
	long.Password = strings.Repeat("x", protocol.MaxSecret+1)
	if err := d.Enrol(ctx, long); err == nil {
		t.Error("a password of any length")
	}
	if err := d.Enrol(ctx, enrolD); err != nil {
		t.Fatal(err)
	}
	first := l.key
	if rep := l.srv.mustSync(t, d); rep.NewKey {
		t.Error("not asked for")
	}
	// By age.
	if err := d.RotateEvery(ctx, -time.Hour); err == nil {
		t.Error("a negative age")
	}
	if err := d.RotateEvery(ctx, 24*time.Hour); err != nil {
		t.Fatal(err)
	}
	if rep := l.srv.mustSync(t, d); rep.NewKey {
		t.Error("too early")
	}
	mustExec(t, d, `UPDATE _ws_state SET key_at = key_at - 25 * 3600 * 1000`)
	if rep := l.srv.mustSync(t, d); !rep.NewKey || l.key == first {
		t.Error("it was due")
	}
	if rep := l.srv.mustSync(t, d); rep.NewKey {
		t.Error("twice")
	}
	if err := d.RotateEvery(ctx, 0); err != nil {
		t.Fatal(err)
	}
	mustExec(t, d, `UPDATE _ws_state SET key_at = 1`)
	if rep := l.srv.mustSync(t, d); rep.NewKey {
		t.Error("never means never")
	}
	// When the operator wants it; if it does not work the sync is complete all the same.
	mustExec(t, d, `UPDATE _ws_state SET new_key = 1`)
	second := l.key
	l.calls, l.cut = 0, 3 // the announcement, after the login
	if rep := l.srv.mustSync(t, d); rep.NewKey || rep.KeyProblem == "" || l.key != second {
		t.Errorf("%+v", rep)
	}
	l.cut = 0
	if rep := l.srv.mustSync(t, d); !rep.NewKey || l.key == second {
		t.Errorf("%+v", rep)
	}
	// A copy of the file from before is out.
	body, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	stale := filepath.Join(t.TempDir(), "stale.db")
	if err := os.WriteFile(stale, body, 0o600); err != nil {
		t.Fatal(err)
	}
	if wal, err := os.ReadFile(path + "-wal"); err == nil {
		if err := os.WriteFile(stale+"-wal", wal, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Rotate(ctx); err != nil {
		t.Fatal(err)
	}
	c := l.open(t, stale)
	defer func() { _ = c.Close() }()
	_, err = c.Sync(ctx, SyncOptions{})
	wantErr(t, err, ErrLogin)
}

// A session that waits for another copy of the file is sent again, as it was, and goes through when the other has ended.
func TestAnotherCopyIsSyncing(t *testing.T) {
	srv := newServer(t)
	srv.foreign(item(1, "1", "x"))
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	mustExec(t, d, `UPDATE item SET val = 'mine' WHERE id = 1`)
	busy := 2
	srv.busy = func() *protocol.Error {
		if busy--; busy < 0 {
			return nil
		}
		return &protocol.Error{Code: protocol.CodeSessionOpen, Message: "another copy", Retry: 1}
	}
	if rep := srv.mustSync(t, d); rep.Merged != 1 || rep.Forked {
		t.Fatalf("%+v", rep)
	}
	mustExec(t, d, `UPDATE item SET val = 'again' WHERE id = 1`)
	busy = 1000
	_, err := d.Sync(context.Background(), SyncOptions{})
	wantErr(t, err, ErrInUse)
	busy = 0
	if rep := srv.mustSync(t, d); rep.Merged != 1 {
		t.Fatalf("%+v", rep)
	}
}
