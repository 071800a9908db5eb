package device

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/waystage/waystage/protocol"
)

// door lets anna's devices in by password or by an enrolled key, with the permissions of docs/protocol.md.
type door struct {
	mem *memServer

	mu      sync.Mutex
	blocked bool
}

func (d *door) Check(c server.ClientAuthentication) bool {
	o := c.GetOpts()
	if o.Username == "gateway" {
		return o.Password == "gw"
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	device := ""
	switch {
	case d.blocked:
		return false
	case o.Nkey != "":
		pub, err := nkeys.FromPublicKey(o.Nkey)
		if err != nil {
			return false
		}
		sig, err := decodeSig(o.Sig)
		if err != nil || pub.Verify(c.GetNonce(), sig) != nil {
			return false
		}
		d.mem.mu.Lock()
		for name, key := range d.mem.nkeys {
			if key == o.Nkey {
				device = name
			}
		}
		d.mem.mu.Unlock()
	case o.Password == "s3cret":
		user, name, _ := strings.Cut(o.Username, "/")
		if user == "anna" {
			device = name
		}
	}
	if device == "" {
		return false
	}
	c.RegisterUser(&server.User{Username: "anna/" + device, Permissions: &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: []string{"rq.anna." + device + ".>"}},
		Subscribe: &server.SubjectPermission{Allow: []string{protocol.InboxPrefix("anna", device) + ".>", protocol.NoticeSubject("anna", device)}},
	}})
	return true
}

func decodeSig(s string) ([]byte, error) {
	// The client sends base64url without padding.
	return base64.RawURLEncoding.DecodeString(s)
}

// startBroker runs a broker with the door in it.
func startBroker(t *testing.T, mem *memServer) (*door, *server.Server) {
	t.Helper()
	d := &door{mem: mem}
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true, CustomClientAuthentication: d, AlwaysEnableNonce: true, MaxPayload: 512 << 10})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(20 * time.Second) {
		t.Fatal("the broker does not start")
	}
	return d, s
}

// startGateway answers the calls of devices out of the in-memory server.
func startGateway(t *testing.T, mem *memServer, url string) {
	t.Helper()
	nc, err := nats.Connect(url, nats.UserInfo("gateway", "gw"), nats.Timeout(20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	_, err = nc.QueueSubscribe("rq.>", "gw", func(m *nats.Msg) {
		tok := strings.Split(m.Subject, ".")
		if !strings.HasPrefix(m.Reply, protocol.InboxPrefix(tok[1], tok[2])+".") {
			return
		}
		w := &wire{s: mem, device: tok[2]}
		ctx := context.Background()
		out := nats.NewMsg(m.Reply)
		say := func(v any, err error) {
			var e *protocol.Error
			if errors.As(err, &e) {
				out.Header.Set(protocol.HeaderError, string(e.Code))
				v = e
			}
			out.Data, _ = json.Marshal(v)
			_ = nc.PublishMsg(out)
		}
		switch tok[3] {
		case protocol.VerbEnrol:
			var e protocol.Enrolment
			_ = json.Unmarshal(m.Data, &e)
			r, err := w.Enrol(ctx, e)
			say(r, err)
		case protocol.VerbPut:
			r, err := w.Put(ctx, tok[4], tok[5], Payload{m.Header.Get(protocol.HeaderContentType), m.Header.Get(protocol.HeaderContentEncoding), m.Data})
			var e *protocol.Error
			if errors.As(err, &e) { // this refusal is in the receipt
				r, err = protocol.Receipt{Error: e}, nil
			}
			say(r, err)
		case protocol.VerbGet:
			n, _ := strconv.Atoi(tok[5])
			p, err := w.Get(ctx, tok[4], n)
			if err != nil {
				say(nil, err)
				return
			}
			out.Header.Set(protocol.HeaderContentType, p.ContentType)
			if p.Encoding != "" {
				out.Header.Set(protocol.HeaderContentEncoding, p.Encoding)
			}
			out.Data = p.Data
			_ = nc.PublishMsg(out)
		case protocol.VerbAck:
			say(map[string]bool{"ok": true}, w.Ack(ctx, tok[4]))
		case protocol.VerbStatus:
			r, err := w.Status(ctx, tok[4])
			say(r, err)
		}
	})
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestNATS goes the whole way over a real broker: wrong password, enrolment, key login, parts, blocking.
func TestNATS(t *testing.T) {
	ctx := context.Background()
	mem := newServer(t)
	mem.foreign(item(1, "1", "x"))
	door, broker := startBroker(t, mem)
	url := broker.ClientURL()
	d, err := Open(ctx, filepath.Join(t.TempDir(), "n.db"), Options{Encoding: "none"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	en := EnrolOptions{Servers: []string{url}, User: "anna", Device: "phone-1", Password: "wrong"}
	wantErr(t, d.Enrol(ctx, en), ErrLogin)
	en.Password = "s3cret"
	err = d.Enrol(ctx, en)
	wantErr(t, err, ErrUnreachable) // no gateway yet
	if !strings.Contains(err.Error(), "no gateway") {
		t.Fatal(err)
	}
	startGateway(t, mem, url)
	if err := d.Enrol(ctx, en); err != nil {
		t.Fatal(err)
	}
	mem.mustSync(t, d)
	mem.same(t, d)
	for i := range 12 { // more than one part of 480 KiB
		mustExec(t, d, `INSERT INTO item VALUES (?, 1, ?)`, i+10, strings.Repeat("x", 100_000))
	}
	rep := mem.mustSync(t, d)
	if rep.Merged != 12 || rep.BytesUp < 1_000_000 {
		t.Fatalf("%+v", rep)
	}
	mem.same(t, d)
	// An enrolment that the server refuses.
	mem.mu.Lock()
	mem.deaf["phone-1"] = true
	mem.mu.Unlock()
	_, err = d.Sync(ctx, SyncOptions{})
	wantErr(t, err, ErrBlocked)
	mem.mu.Lock()
	mem.deaf["phone-1"] = false
	mem.mu.Unlock()
	door.mu.Lock()
	door.blocked = true
	door.mu.Unlock()
	_, err = d.Sync(ctx, SyncOptions{})
	wantErr(t, err, ErrLogin)
	door.mu.Lock()
	door.blocked = false
	door.mu.Unlock()
	mem.mustSync(t, d)
	// A broker that is gone, and a context that ends while we look for it.
	broker.Shutdown()
	_, err = d.Sync(ctx, SyncOptions{})
	wantErr(t, err, ErrUnreachable)
	short, cancel := context.WithCancel(ctx)
	cancel()
	_, err = d.Sync(short, SyncOptions{})
	wantErr(t, err, context.Canceled)
}
