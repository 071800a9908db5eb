package queue_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/queue"
)

// vouchers lets in who has one of its secrets, for one call.
type vouchers struct{ verb string }

func (v vouchers) Mine(secret string) bool { return strings.HasPrefix(secret, v.verb+":") }
func (v vouchers) Only() string            { return v.verb }
func (v vouchers) Identify(_ context.Context, user, device, secret string) error {
	if secret == v.verb+":"+user+"/"+device || len(secret) > 8000 {
		return nil
	}
	return refusal("voucher")
}

// A connection that came by a secret for one call can make that call and hear its answer, and nothing else.
func TestEnrolOnly(t *testing.T) {
	for _, verb := range []string{protocol.VerbEnrol, protocol.VerbRedeem} {
		t.Run(verb, func(t *testing.T) {
			b := start(t, func(b *bench) { b.providers = []queue.Provider{vouchers{verb}} })
			phone := b.device("alice/phone")
			secret := verb + ":alice/phone"
			inbox := protocol.EnrolInbox("alice", "phone", secret)
			d := b.device("alice/phone", nats.UserInfo("alice/phone", secret), nats.CustomInboxPrefix(inbox))
			refused(t, b, nats.UserInfo("alice/tablet", secret))
			refused(t, b, nats.UserInfo("bob/phone", secret))
			key := userKey(t)
			e := decode[protocol.Enrolled](t, d.ask(verb, fmt.Appendf(nil, `{"key":%q,"token":"x"}`, key.public), nil))
			if e.Error != nil || e.User != "alice" {
				t.Fatalf("%+v", e)
			}
			b.device("alice/phone", func(o *nats.Options) error {
				o.User, o.Password, o.Nkey, o.SignatureCB = "", "", key.public, key.sign
				return nil
			})
			publish := []string{"rq.alice.phone.put." + session(1) + ".1-1", "rq.alice.phone.get." + session(1) + ".1", "rq.alice.phone.ack." + session(1),
				"rq.alice.phone.status." + session(1), "rq.alice.phone.rotate", "rq.alice.phone.watch", "rq.alice.phone." + map[string]string{protocol.VerbEnrol: protocol.VerbRedeem, protocol.VerbRedeem: protocol.VerbEnrol}[verb],
				"rq.alice.tablet." + verb, "rq.bob.phone." + verb, "sync.in.x"}
			subscribe := []string{"_INBOX.alice.phone.>", "_INBOX.alice.phone.*.>", "ev.alice.phone", ">", "_INBOX.alice.phone.enrol-0000000000000000.>"}
			for _, s := range publish {
				if err := d.nc.Publish(s, nil); err != nil {
					t.Fatal(err)
				}
			}
			for _, s := range subscribe {
				if _, err := d.nc.SubscribeSync(s); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "violations", func() error {
				if n := d.violations(); n != len(publish)+len(subscribe) {
					return fmt.Errorf("%d of %d refused", n, len(publish)+len(subscribe))
				}
				return nil
			})
			// The device's own connection goes on.
			if r := phone.put(session(1), "1-1", []byte("x"), nil); !r.Stored {
				t.Fatalf("%+v", r)
			}
			if depth, err := b.q.Depth(within(t)); err != nil || depth.Input.Messages != 1 {
				t.Fatal(depth, err)
			}
		})
	}
}

func TestLargeAndTooLargeSecrets(t *testing.T) {
	b := start(t, func(b *bench) { b.providers = []queue.Provider{vouchers{protocol.VerbEnrol}} })
	b.device("alice/phone")
	long := func(n int) string { return protocol.VerbEnrol + ":" + strings.Repeat("x", n-len(protocol.VerbEnrol)-1) }
	b.device("alice/phone", nats.UserInfo("alice/phone", long(protocol.MaxSecret)))
	refused(t, b, nats.UserInfo("alice/phone", long(protocol.MaxSecret+1)))
	// What is longer than a line of the protocol does not come as far as the callout.
	if nc, err := nats.Connect(b.url(), nats.UserInfo("alice/phone", long(1<<20))); err == nil {
		nc.Close()
		t.Error("a login of a megabyte was let in")
	}
	b.device("alice/phone") // and the broker is well
}

func TestEnrolmentCalls(t *testing.T) {
	var mu sync.Mutex
	rotated := map[string]string{}
	b := start(t, func(b *bench) {
		b.gwcfg.Rotate = func(_ context.Context, user, device string, r protocol.Rotation) error {
			mu.Lock()
			defer mu.Unlock()
			if r.Key == "" {
				return refusal(protocol.CodeKey)
			}
			rotated[user+"/"+device] = r.Key
			return nil
		}
	})
	d := b.device("alice/phone")
	if r := decode[protocol.Rotated](t, d.ask(protocol.VerbRotate, []byte(`{"key":"U1"}`), nil)); !r.OK || r.Error != nil {
		t.Errorf("%+v", r)
	}
	mu.Lock()
	if rotated["alice/phone"] != "U1" {
		t.Error(rotated)
	}
	mu.Unlock()
	for verb, cases := range map[string]map[string]protocol.Code{
		protocol.VerbRotate: {"": protocol.CodeMalformed, "{": protocol.CodeMalformed, `{"key":7}`: protocol.CodeMalformed, `{}`: protocol.CodeKey, `{"key":"` + strings.Repeat("U", 5000) + `"}`: protocol.CodeMalformed},
		protocol.VerbRedeem: {"[]": protocol.CodeMalformed, `{"key":"U1"}`: protocol.CodeTokenUnknown, `{"token":"` + strings.Repeat("x", 5000) + `"}`: protocol.CodeMalformed},
		protocol.VerbEnrol:  {"x": protocol.CodeMalformed},
	} {
		for body, want := range cases {
			r := decode[protocol.Rotated](t, d.ask(verb, []byte(body), nil))
			if r.Error == nil || r.Error.Code != want {
				t.Errorf("%s %.40s: %+v, want %s", verb, body, r.Error, want)
			}
		}
	}
}

// Whoever guesses is slowed down, the others of the same name at other hosts are not, and the operator is told.
func TestGuessing(t *testing.T) {
	b := start(t)
	b.device("alice/phone")
	told := func(code string) (n int) {
		b.people.mu.Lock()
		defer b.people.mu.Unlock()
		for _, r := range b.people.refused {
			if r == "alice/phone "+code {
				n++
			}
		}
		return n
	}
	for tries := 0; told("too_many_logins") == 0; tries++ {
		if tries == 300 {
			t.Fatal("anybody may guess 300 times")
		}
		refused(t, b, nats.UserInfo("alice/phone", "wrong"))
	}
	if n := told("credentials"); n < 20 {
		t.Errorf("only %d wrong passwords were looked at", n)
	}
	b.device("bob/phone")
	// A key is no guess.
	key := userKey(t)
	if _, err := b.people.enrol(within(t), "alice", "phone", protocol.Enrolment{Key: key.public}); err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(b.url(), nats.Nkey(key.public, key.sign), nats.UserInfo("alice/phone", ""), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
}

// When a device has changed its key, the connection by the new one stays and the others are closed.
func TestDisconnectAllButOne(t *testing.T) {
	b := start(t)
	first := b.device("alice/phone")
	var conn string
	b.people.mu.Lock()
	b.people.conn = func(c string) { conn = c }
	b.people.mu.Unlock()
	key := userKey(t)
	if _, err := b.people.enrol(within(t), "alice", "phone", protocol.Enrolment{Key: key.public}); err != nil {
		t.Fatal(err)
	}
	second := b.device("alice/phone", func(o *nats.Options) error {
		o.User, o.Password, o.Nkey, o.SignatureCB = "", "", key.public, key.sign
		return nil
	})
	b.people.mu.Lock()
	except := conn
	b.people.mu.Unlock()
	if except == "" {
		t.Fatal("the login has no connection")
	}
	if err := b.q.Disconnect(within(t), "alice", "phone", except); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the old connection", func() error {
		if first.nc.Stats().Reconnects == 0 {
			return errors.New("was not closed")
		}
		return nil
	})
	if second.nc.Stats().Reconnects != 0 || !second.nc.IsConnected() {
		t.Error("the new connection was closed too")
	}
}

// A device that was blocked and let in again is left alone by the second look for its connections.
func TestBackAfterABlock(t *testing.T) {
	b := start(t)
	before := b.device("alice/phone")
	if err := b.q.Disconnect(within(t), "alice", "phone", ""); err != nil {
		t.Fatal(err)
	}
	after := b.device("alice/phone") // it was not blocked for long
	eventually(t, "the connection from before", func() error {
		if before.nc.Stats().Reconnects == 0 {
			return errors.New("was not closed")
		}
		return nil
	})
	time.Sleep(8 * time.Second) // the second look comes after 6; a late one is no failure
	if after.nc.Stats().Reconnects != 0 {
		t.Error("the connection that came later was closed")
	}
}
