package queue_test

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/queue"
)

// refused fails the test if the login works, or fails for another reason than a refusal.
func refused(t *testing.T, b *bench, opts ...nats.Option) {
	t.Helper()
	nc, err := nats.Connect(b.url(), append(opts, nats.Timeout(patience))...)
	if err == nil {
		nc.Close()
		t.Error("the login was let in")
	} else if !errors.Is(err, nats.ErrAuthorization) {
		t.Error("want an authorization violation, got:", err)
	}
}

func TestRefusedLogins(t *testing.T) {
	b := start(t)
	b.device("alice/phone") // the callout listens
	b.people.block("alice/stolen")
	password := func(login, pass string) []nats.Option { return []nats.Option{nats.UserInfo(login, pass)} }
	key, other := userKey(t), userKey(t)
	if _, err := b.people.enrol(within(t), "alice", "keyed", protocol.Enrolment{Key: key.public}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.people.enrol(within(t), "alice", "stolen", protocol.Enrolment{Key: other.public}); err != nil {
		t.Fatal(err)
	}
	for name, opts := range map[string][]nats.Option{
		"no credentials":       nil,
		"unknown user":         password("mallory/phone", "alice-password"),
		"wrong password":       password("alice/phone", "bob-password"),
		"empty password":       password("alice/phone", ""),
		"no device":            password("alice", "alice-password"),
		"empty device":         password("alice/", "alice-password"),
		"two slashes":          password("alice/phone/x", "alice-password"),
		"device is a star":     password("alice/*", "alice-password"),
		"device is >":          password("alice/>", "alice-password"),
		"user is a star":       password("*/phone", "alice-password"),
		"device with a dot":    password("alice/pho.ne", "alice-password"),
		"device with a blank":  password("alice/pho ne", "alice-password"),
		"device of capitals":   password("alice/Phone", "alice-password"),
		"device in Cyrillic":   password("alice/рhone", "alice-password"),
		"device too long":      password("alice/"+fmt.Sprintf("%065d", 1), "alice-password"),
		"device with newline":  password("alice/phone\r\nPUB x", "alice-password"),
		"blocked device":       password("alice/stolen", "alice-password"),
		"token":                {nats.Token("alice-password")},
		"static user":          password("app", "wrong"),
		"static user as nkey":  {nats.UserInfo("gw", ""), nats.Nkey(key.public, key.sign)},
		"unknown key":          {unknownKey(t)},
		"key not possessed":    {nats.Nkey(key.public, other.sign)},
		"signature of nothing": {nats.Nkey(key.public, func([]byte) ([]byte, error) { return nil, nil })},
		"key of blocked":       {nats.Nkey(other.public, other.sign)},
		"key, other's name":    {nats.Nkey(key.public, key.sign), nats.UserInfo("alice/phone", "")},
	} {
		t.Run(name, func(t *testing.T) { refused(t, b, opts...) })
	}
	b.people.mu.Lock()
	b.people.broken = errors.New("database is away")
	b.people.mu.Unlock()
	t.Run("registry fails", func(t *testing.T) {
		b := *b
		b.t = t
		refused(t, &b, password("alice/phone", "alice-password")...)
	})
}

type pair struct {
	public string
	kp     nkeys.KeyPair
}

func (p pair) sign(nonce []byte) ([]byte, error) { return p.kp.Sign(nonce) }

func userKey(t testing.TB) pair {
	t.Helper()
	kp, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	public, err := kp.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	return pair{public, kp}
}

func unknownKey(t testing.TB) nats.Option {
	k := userKey(t)
	return nats.Nkey(k.public, k.sign)
}

func TestKeyLogin(t *testing.T) {
	b := start(t)
	byPassword := b.device("alice/phone")
	key := userKey(t)
	e := decode[protocol.Enrolled](t, byPassword.ask("enrol", fmt.Appendf(nil, `{"key":%q,"app":"nurse 1.0"}`, key.public), nil))
	if e.Error != nil || e.User != "alice" || e.Device != "phone" || len(e.Sets) != 1 || e.Epoch != "e1" {
		t.Fatalf("%+v", e)
	}
	// The password is not asked for any more.
	b.people.mu.Lock()
	b.people.passwords["alice"] = "another-password"
	b.people.mu.Unlock()
	var again atomic.Int64
	d := b.device("alice/phone", func(o *nats.Options) error {
		o.User, o.Password, o.Nkey, o.SignatureCB = "", "", key.public, key.sign
		o.ReconnectedCB = func(*nats.Conn) { again.Add(1) }
		return nil
	})
	if r := d.put(session(1), "1-1", []byte("x"), nil); !r.Stored {
		t.Fatalf("%+v", r)
	}
	// A connection that is closed comes back by itself, with a new nonce.
	if err := b.q.Disconnect(within(t), "alice", "phone", ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, "reconnect", func() error {
		if again.Load() == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	if r := d.put(session(2), "1-1", []byte("x"), nil); !r.Stored {
		t.Fatalf("%+v", r)
	}
	// And over websocket.
	ws, err := nats.Connect(b.server.WebsocketURL(), nats.Nkey(key.public, key.sign), nats.CustomInboxPrefix(protocol.InboxPrefix("alice", "phone")), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	m, err := ws.Request(protocol.RequestSubject("alice", "phone", "status", session(1)), nil, patience)
	if err != nil || decode[protocol.Status](t, m).State != "received" {
		t.Fatal(m, err)
	}
}

func TestBlockedDeviceIsOut(t *testing.T) {
	b := start(t)
	var d [3]*device
	for i := range d {
		d[i] = b.device("alice/phone", nats.MaxReconnects(5))
	}
	tablet, bob := b.device("alice/tablet"), b.device("bob/phone")
	b.people.block("alice/phone")
	if err := b.q.Disconnect(within(t), "alice", "phone", ""); err != nil {
		t.Fatal(err)
	}
	for i := range d {
		eventually(t, "blocked device", func() error {
			if !d[i].nc.IsClosed() { // it was refused twice
				return errors.New("still there: " + d[i].nc.Status().String())
			}
			return nil
		})
	}
	for _, d := range []*device{tablet, bob} {
		if r := d.put(session(1), "1-1", []byte("x"), nil); !r.Stored || d.nc.Stats().Reconnects > 0 {
			t.Fatalf("%s/%s was closed too: %+v", d.user, d.name, r)
		}
	}
	// A user with all devices.
	b.people.block("alice/tablet")
	if err := b.q.Disconnect(within(t), "alice", "", ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, "blocked user", func() error {
		if tablet.nc.IsConnected() {
			return errors.New("still there")
		}
		return nil
	})
	if r := bob.put(session(2), "1-1", []byte("x"), nil); !r.Stored || bob.nc.Stats().Reconnects > 0 {
		t.Fatalf("bob was closed too: %+v", r)
	}
}

// The broker must refuse everything but the device's own calls, inbox and notices.
func TestDevicePermissions(t *testing.T) {
	b := start(t)
	// The two names must not run together: a_b/c and a/b_c.
	for _, who := range []string{"alice/phone", "a_b/c"} {
		d := b.device(who)
		publish := []string{
			"rq.bob.phone.put." + session(1) + ".1-1", "rq.alice.tablet.put." + session(1) + ".1-1", "rq.*.*.put.x.1-1", "rq.*.phone.ack.x", "rq.>",
			"rq.a.b_c.status.x", "rq." + d.user + "." + d.name, "sync.in.alice.phone.x.1-1", "sync.out.bob.phone.x.1", "sync.dlq.x", "cd.down", "cd.up",
			"ws.kick.merge", "ws.ready.bob.phone.x", "ws.pools", "ev.alice.phone", "ev.bob.phone", "_INBOX.bob.phone.x", "_INBOX.alice.phone.x", "_INBOX.x",
			"$JS.API.INFO", "$JS.API.STREAM.DELETE.WS_OUT", "$JS.API.STREAM.PURGE.WS_OUT", "$JS.API.DIRECT.GET.WS_OUT.sync.out.bob.phone.x.1",
			"$SRV.PING", "$SRV.STATS.waystage-gateway", "$SYS.REQ.SERVER.PING", "$SYS.REQ.USER.AUTH", "$SYS.REQ.USER.INFO", "$SYS.ACCOUNT.DEVICES.CONNS",
		}
		for _, s := range publish {
			if err := d.nc.Publish(s, []byte("x")); err != nil && !errors.Is(err, nats.ErrBadSubject) {
				t.Fatal(s, err)
			}
		}
		subscribe := []string{
			">", "*", "*.*.*.>", "rq.>", "rq.alice.phone.>", "rq.bob.phone.put.>", "rq.*.*.put.*.*", "ev.>", "ev.*.*", "ev.bob.phone", "ev.alice.*",
			"_INBOX.>", "_INBOX.*.>", "_INBOX.bob.>", "_INBOX.bob.phone.>", "_INBOX.alice.>", "_INBOX.alice.*.>", "_INBOX.a.b_c.>", "sync.>", "cd.down", "ws.>",
			"$JS.>", "$SRV.>", "$SYS.>", "$SYS.REQ.USER.AUTH",
		}
		for _, s := range subscribe {
			if _, err := d.nc.SubscribeSync(s); err != nil {
				t.Fatal(s, err)
			}
		}
		if _, err := d.nc.QueueSubscribeSync("rq.*.*.put.*.*", "gw"); err != nil { // to take the gateway's place
			t.Fatal(err)
		}
		if err := d.nc.FlushTimeout(patience); err != nil {
			t.Fatal(err)
		}
		want := len(publish) + len(subscribe) + 1
		eventually(t, "violations", func() error {
			if n := d.violations(); n != want {
				return fmt.Errorf("%d of %d refused", n, want)
			}
			return nil
		})
		// What it may do.
		before := d.violations()
		for _, s := range []string{"ev." + d.user + "." + d.name, "_INBOX." + d.user + "." + d.name + ".mine.>"} {
			sub, err := d.nc.SubscribeSync(s)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = sub.Unsubscribe() }()
		}
		if r := d.put(session(1), "1-1", []byte("x"), nil); !r.Stored {
			t.Fatalf("%+v", r)
		}
		if d.violations() != before {
			t.Error("what a device may do was refused", d.heard())
		}
	}
	if depth, err := b.q.Depth(within(t)); err != nil || depth.Input.Messages != 2 || depth.Output.Messages != 0 || depth.Dead.Messages != 0 || depth.Down.Messages != 0 {
		t.Fatalf("%+v %v", depth, err)
	}
}

// The attacks of a device that sets the reply subject of its calls: none may have an effect.
func TestReplySubjectAttacks(t *testing.T) {
	b := start(t, func(b *bench) { b.gwcfg.Hold = 20 * time.Millisecond })
	bob, alice := b.device("bob/d9"), b.device("alice/d1")
	for n := range 4 {
		if err := b.q.PutPage(within(t), "alice", "d1", session(1), n+1, "application/json", "", []byte("alice's page")); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.q.PutPage(within(t), "bob", "d9", session(1), 1, "application/json", "", []byte("bob's page")); err != nil {
		t.Fatal(err)
	}
	everything, err := alice.nc.SubscribeSync("_INBOX.alice.d1.>")
	if err != nil {
		t.Fatal(err)
	}
	notice, err := alice.nc.SubscribeSync("ev.alice.d1")
	if err != nil {
		t.Fatal(err)
	}
	if err := alice.nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	before := b.gw.Stats()
	calls := []string{"put." + session(5) + ".1-1", "get." + session(1) + ".1", "get." + session(1) + ".77", "ack." + session(6), "status." + session(1), "enrol"}
	replies := []string{
		"rq.alice.d1.put." + session(1) + ".1-1", "sync.in.alice.d1." + session(1) + ".1-1", "sync.out.alice.d1." + session(1) + ".1",
		"$JS.API.STREAM.PURGE.WS_OUT", "$JS.API.STREAM.DELETE.WS_OUT", "$JS.API.STREAM.DELETE.WS_IN", "_INBOX.alice.d1.x", "_INBOX.alice.d1", "ev.alice.d1",
		"_INBOX.bob.d9", "_INBOX.bob.d9.", "_INBOX.bob.d9x.y", "_INBOX.bob.d9..x", "_INBOX.bob.d9.*", "_INBOX.bob.d9.>", "_INBOX.bob.*.x", "ws.ready.alice.d1." + session(1), "$SYS.REQ.USER.AUTH",
	}
	sent := 0
	for _, c := range calls {
		for _, r := range replies {
			m := &nats.Msg{Subject: "rq.bob.d9." + c, Reply: r, Data: []byte(`{"key":"x"}`), Header: nats.Header{"Content-Type": {"application/json"}}}
			if err := bob.nc.PublishMsg(m); err == nil {
				sent++
			}
		}
		// No reply subject at all.
		if err := bob.nc.Publish("rq.bob.d9."+c, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		sent++
	}
	// The broker itself drops some; the gateway must have seen all that came, and be silent.
	if m := bob.ask("get", nil, nil, session(1), "1"); string(m.Data) != "bob's page" {
		t.Fatalf("%q", m.Data)
	}
	eventually(t, "silence", func() error {
		if s := b.gw.Stats(); s.Silent-before.Silent < int64(len(calls)*10) {
			return fmt.Errorf("only %d of %d calls were met with silence", s.Silent-before.Silent, sent)
		}
		return nil
	})
	if got := b.gw.Stats(); got.Puts != before.Puts || got.Acks != before.Acks || got.Enrols != before.Enrols {
		t.Errorf("an attack was carried out: %+v, before %+v", got, before)
	}
	depth, err := b.q.Depth(within(t))
	if err != nil || depth.Input.Messages != 0 || depth.Output.Messages != 5 {
		t.Errorf("the streams have changed: %+v %v", depth, err)
	}
	for n := range 4 {
		if m := alice.ask("get", nil, nil, session(1), fmt.Sprint(n+1)); string(m.Data) != "alice's page" {
			t.Errorf("alice's page %d is %q", n+1, m.Data)
		}
	}
	if m, err := everything.NextMsg(10 * time.Millisecond); err == nil && string(m.Data) != "alice's page" {
		t.Errorf("alice got %q on %s", m.Data, m.Subject)
	}
	if m, err := notice.NextMsg(10 * time.Millisecond); err == nil {
		t.Errorf("alice got a notice %q", m.Data)
	}
}

// Even a gateway that does not check must not be able to write anywhere but to device inboxes.
func TestSecondLineOfDefence(t *testing.T) {
	b := start(t)
	s := b.server.Secrets()
	connect := func(user, pass string) (*nats.Conn, *device) {
		d := &device{t: t}
		nc, err := nats.Connect(b.url(), nats.UserInfo(user, pass), nats.Timeout(patience), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { d.note(err) }))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc, d
	}
	refusedAll := func(nc *nats.Conn, d *device, publish, subscribe []string) {
		t.Helper()
		for _, s := range publish {
			if err := nc.Publish(s, nil); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range subscribe {
			if _, err := nc.SubscribeSync(s); err != nil {
				t.Fatal(err)
			}
		}
		if err := nc.FlushTimeout(patience); err != nil {
			t.Fatal(err)
		}
		eventually(t, "violations", func() error {
			if n := d.violations(); n != len(publish)+len(subscribe) {
				return fmt.Errorf("%d of %d refused: %v", n, len(publish)+len(subscribe), d.heard())
			}
			return nil
		})
	}
	nc, d := connect("gw", s.Gateway)
	refusedAll(nc, d, []string{"rq.alice.d1.put.x.1-1", "ev.alice.d1", "$JS.API.STREAM.DELETE.WS_OUT", "sync.in.alice.d1.x.1-1", "_INBOX.alice", "$SRV.PING"}, []string{">", "ev.>"})
	nc, d = connect("notify", s.Notify)
	refusedAll(nc, d, []string{"rq.alice.d1.put.x.1-1", "ev.alice", "_INBOX.alice.d1.x"}, []string{"ev.alice.d1", ">", "_INBOX.>"})
	nc, d = connect("app", s.App)
	refusedAll(nc, d, []string{"rq.alice.d1.put.x.1-1", "ev.alice.d1", "$SYS.REQ.SERVER.PING.CONNZ", "anything"}, []string{">", "sync.>", "$SYS.>"})
	nc, d = connect("sys", s.Sys)
	refusedAll(nc, d, []string{"$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.x.RELOAD", "anything"}, []string{">", "$SYS.>"})

	// The monitor sees the gateways, in an inbox that no device can have.
	mon, err := nats.Connect(b.url(), nats.UserInfo("monitor", s.Monitor), nats.CustomInboxPrefix("_INBOX.MON"), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	defer mon.Close()
	eventually(t, "statistics", func() error {
		_, err := mon.Request("$SRV.STATS.waystage-gateway", nil, time.Second)
		return err
	})
}

func TestStrangersBroker(t *testing.T) {
	b := start(t)
	s, err := queue.NewSecrets()
	if err != nil {
		t.Fatal(err)
	}
	_, err = queue.Open(within(t), queue.Config{Broker: queue.Broker{URLs: []string{b.url()}, Secrets: s}}, nil)
	if !errors.Is(err, nats.ErrAuthorization) {
		t.Fatal(err)
	}
}
