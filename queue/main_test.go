package queue_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/queue"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 90 * time.Second // for anything that must happen; tests share the machine

// refusal is what a registry says to a login or enrolment that it does not like.
type refusal protocol.Code

func (r refusal) Error() string            { return "refused: " + string(r) }
func (r refusal) ErrorCode() protocol.Code { return protocol.Code(r) }

// people is a registry in memory.
type people struct {
	mu        sync.Mutex
	passwords map[string]string // by user
	keys      map[string]string // public key -> user/device
	blocked   map[string]bool   // user/device
	refused   []string
	conn      func(string) // told of the connection of each login by key
	broken    error
}

func newPeople() *people {
	return &people{passwords: map[string]string{"alice": "alice-password", "bob": "bob-password", "a_b": "a_b-password", "a": "a-password"},
		keys: map[string]string{}, blocked: map[string]bool{}}
}

func (p *people) Mine(string) bool { return true }
func (p *people) Only() string     { return "" }

// Refused keeps what the operator is told, "user/device code".
func (p *people) Refused(_ context.Context, user, device string, code protocol.Code, _ string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused = append(p.refused, user+"/"+device+" "+string(code))
	return nil
}

func (p *people) Identify(_ context.Context, user, device, password string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.broken != nil:
		return p.broken
	case p.passwords[user] == "" || p.passwords[user] != password:
		return refusal("credentials")
	case p.blocked[user+"/"+device]:
		return refusal(protocol.CodeBlocked)
	}
	return nil
}

func (p *people) Key(_ context.Context, key, conn string) (string, string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn != nil {
		p.conn(conn)
	}
	who, ok := p.keys[key]
	if !ok || p.blocked[who] {
		return "", "", refusal("credentials")
	}
	user, device, _ := strings.Cut(who, "/")
	return user, device, nil
}

func (p *people) enrol(_ context.Context, user, device string, req protocol.Enrolment) (protocol.Enrolled, error) {
	if !nkeys.IsValidPublicUserKey(req.Key) {
		return protocol.Enrolled{}, refusal(protocol.CodeKey)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.keys[req.Key] = user + "/" + device
	return protocol.Enrolled{User: user, Device: device, Sets: []string{"visits"}, Epoch: "e1"}, nil
}

func (p *people) block(who string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.blocked[who] = true
}

// bench is a whole queue: server, streams, callout, gateway.
type bench struct {
	t         testing.TB
	server    *queue.Server
	q         *queue.Queue
	people    *people
	providers []queue.Provider // before the people's passwords
	gw        *queue.Gateway
	status    queue.StatusSource
	dir       string
	options   queue.ServerOptions
	cfg       queue.Config
	gwcfg     queue.GatewayConfig
	watched   chan watched
	stop      func()
	tcp       bool
	trust     *tls.Config
}

// overTCP makes a bench whose server can be restarted.
func overTCP(b *bench) { b.tcp = true }

func start(t testing.TB, changes ...func(*bench)) *bench {
	t.Helper()
	b := &bench{t: t, people: newPeople(), dir: t.TempDir(), watched: make(chan watched),
		status: func(context.Context, string, string, string) (protocol.Status, error) {
			return protocol.Status{State: "unknown"}, nil
		}}
	for _, f := range changes {
		f(b)
	}
	var err error
	if b.cfg.Broker.URLs == nil {
		b.options.StoreDir, b.options.Websocket = b.dir, true
		b.server, err = queue.StartServer(b.options, quiet(t))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.server.Shutdown)
		if b.tcp { // as if the server were another process
			b.options.Secrets = b.server.Secrets()
			_, port, _ := strings.Cut(strings.TrimPrefix(b.server.URL(), "nats://"), ":")
			if b.trust != nil {
				_, port, _ = strings.Cut(strings.TrimPrefix(b.server.URL(), "tls://"), ":")
			}
			if b.options.Port, err = strconv.Atoi(port); err != nil {
				t.Fatal(err)
			}
			b.cfg.Broker = queue.Broker{URLs: []string{b.server.URL()}, Secrets: b.options.Secrets, TLS: b.trust}
		} else {
			b.cfg.Broker.Embedded = b.server
		}
	}
	b.serve()
	t.Cleanup(func() { b.stop() })
	return b
}

// serve starts everything but the server.
func (b *bench) serve() {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	log := quiet(b.t)
	run, end := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var err error
	if b.q, err = queue.Open(ctx, b.cfg, log); err != nil {
		end()
		b.t.Fatal(err)
	}
	callout := queue.NewCallout(b.cfg.Broker, b.people, append(b.providers, b.people), log)
	cfg := b.gwcfg
	cfg.News = b.news
	b.gw = queue.NewGateway(b.q, cfg, b.people.enrol, b.status, log)
	for _, f := range []func(context.Context) error{callout.Run, b.gw.Run} {
		wg.Go(func() {
			if err := f(run); err != nil {
				b.t.Error(err)
			}
		})
	}
	b.stop = sync.OnceFunc(func() {
		end()
		wg.Wait()
		b.q.Close()
	})
}

// quiet logs errors to the test, as long as it runs: a NATS server has goroutines that log after its shutdown.
func quiet(t testing.TB) *zap.Logger {
	s := &sink{t: t}
	t.Cleanup(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.over = true
	})
	return zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(zap.NewDevelopmentEncoderConfig()), s, zap.ErrorLevel))
}

type sink struct {
	t    testing.TB
	mu   sync.Mutex
	over bool
}

func (s *sink) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		s.t.Logf("%s", b)
	}
	return len(b), nil
}

func (s *sink) Sync() error { return nil }

func (b *bench) url() string {
	if b.server != nil {
		return b.server.URL()
	}
	return strings.Join(b.cfg.Broker.URLs, ",")
}

// device connects as a device by password; "user/device".
func (b *bench) device(who string, more ...nats.Option) *device {
	b.t.Helper()
	user, name, _ := strings.Cut(who, "/")
	d := &device{t: b.t, user: user, name: name}
	opts := append([]nats.Option{
		nats.UserInfo(who, user+"-password"),
		nats.CustomInboxPrefix(protocol.InboxPrefix(user, name)),
		nats.Timeout(patience), nats.ReconnectWait(20 * time.Millisecond), nats.MaxReconnects(-1),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { d.note(err) }),
	}, more...)
	eventually(b.t, "login of "+who, func() error { // the callout may not listen yet
		var err error
		d.nc, err = nats.Connect(b.url(), opts...)
		return err
	})
	b.t.Cleanup(d.nc.Close)
	return d
}

type device struct {
	t          testing.TB
	user, name string
	nc         *nats.Conn

	mu     sync.Mutex
	errors []error
}

func (d *device) note(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.errors = append(d.errors, err)
}

// heard is what the broker has reported.
func (d *device) heard() []error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.errors)
}

// violations counts the permission errors that the broker has reported.
func (d *device) violations() (n int) {
	for _, err := range d.heard() {
		if errors.Is(err, nats.ErrPermissionViolation) {
			n++
		}
	}
	return n
}

// ask makes a gateway call. It is repeated while there is no gateway yet.
func (d *device) ask(verb string, data []byte, h nats.Header, tokens ...string) *nats.Msg {
	d.t.Helper()
	m := &nats.Msg{Subject: protocol.RequestSubject(d.user, d.name, verb, tokens...), Data: data, Header: h}
	var r *nats.Msg
	eventually(d.t, m.Subject, func() error {
		var err error
		r, err = d.nc.RequestMsg(m, 15*time.Second)
		return err
	})
	return r
}

func (d *device) put(session, part string, data []byte, h nats.Header) protocol.Receipt {
	d.t.Helper()
	if h == nil {
		h = nats.Header{"Content-Type": {"application/json"}}
	}
	return decode[protocol.Receipt](d.t, d.ask("put", data, h, session, part))
}

func decode[T any](t testing.TB, m *nats.Msg) (v T) {
	t.Helper()
	if err := json.Unmarshal(m.Data, &v); err != nil {
		t.Fatalf("%q: %v", m.Data, err)
	}
	return v
}

// eventually repeats f until it returns nil.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// session is a session token.
func session(n int) string { return fmt.Sprintf("%032x-%d", 0xabc, n) }

// parts fetches until n parts have come.
func (b *bench) parts(n int) []*queue.Part {
	b.t.Helper()
	var all []*queue.Part
	eventually(b.t, fmt.Sprintf("%d parts", n), func() error {
		parts, err := b.q.Fetch(within(b.t), 100, 100*time.Millisecond)
		all = append(all, parts...)
		if err == nil && len(all) < n {
			err = fmt.Errorf("%d parts so far", len(all))
		}
		return err
	})
	return all
}
