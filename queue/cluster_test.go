package queue_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/queue"
)

// external starts nats-servers from the generated configuration file, as they would run elsewhere.
func external(t testing.TB, s queue.Secrets, n int) []*server.Server {
	t.Helper()
	var routes, listen []string
	for range n {
		port, err := pgcluster.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // all at once, so that no port comes twice
		listen = append(listen, l.Addr().String())
		routes = append(routes, "nats-route://"+l.Addr().String())
	}
	nodes := make([]*server.Server, n)
	for i := range nodes {
		o := queue.ServerConfigOptions{Name: fmt.Sprintf("n%d", i), Host: "127.0.0.1", Port: -1, StoreDir: t.TempDir()}
		if n > 1 {
			o.Cluster, o.Listen, o.Routes = "test", listen[i], routes
		}
		text, err := queue.ServerConfig(s, o)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "nats.conf")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		opts, err := server.ProcessConfigFile(file)
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		opts.NoLog, opts.NoSigs = true, true
		opts.LameDuckGracePeriod, opts.LameDuckDuration = 50*time.Millisecond, 500*time.Millisecond
		if nodes[i], err = server.NewServer(opts); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { end(nodes[i]) })
	}
	return nodes
}

// end stops a server as [queue.Server.Shutdown] does, and for the same reason.
func end(s *server.Server) {
	s.LameDuckShutdown()
	s.Shutdown()
	s.WaitForShutdown()
}

func TestClusterOfServers(t *testing.T) {
	s, err := queue.NewSecrets()
	if err != nil {
		t.Fatal(err)
	}
	nodes := external(t, s, 3)
	var urls []string
	for _, n := range nodes {
		n.Start()
	}
	for _, n := range nodes {
		if !n.ReadyForConnections(patience) {
			t.Fatal("a node does not start")
		}
		urls = append(urls, n.ClientURL())
	}
	b := start(t, func(b *bench) {
		b.cfg.Broker = queue.Broker{URLs: urls[:1], Secrets: s}
		b.cfg.Replicas = 3
	})

	// Devices are on the other nodes than the server.
	phone := b.device("alice/phone", at(urls[1]))
	tablet, bob := b.device("alice/tablet", at(urls[2])), b.device("bob/phone", at(urls[2]))
	key := userKey(t)
	if e := decode[protocol.Enrolled](t, phone.ask("enrol", fmt.Appendf(nil, `{"key":%q}`, key.public), nil)); e.Error != nil {
		t.Fatal(e.Error)
	}
	keyed, err := nats.Connect(urls[2], nats.Nkey(key.public, key.sign), nats.CustomInboxPrefix(protocol.InboxPrefix("alice", "phone")), nats.Timeout(patience), nats.MaxReconnects(3),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	if err != nil {
		t.Fatal(err)
	}
	defer keyed.Close()
	for n := range 20 {
		if r := phone.put(session(n+1), "1-1", []byte("x"), nil); !r.Stored {
			t.Fatalf("%+v", r)
		}
		if err := b.q.PutPage(within(t), "alice", "phone", session(n+1), 1, "application/json", "", fmt.Appendf(nil, "page %d", n)); err != nil {
			t.Fatal(err)
		}
		// At once: a replica that is behind must not make it a missing page.
		if m := phone.ask("get", nil, nil, session(n+1), "1"); string(m.Data) != fmt.Sprintf("page %d", n) {
			t.Fatalf("%q %v", m.Data, m.Header)
		}
	}
	if err := b.q.AckAll(within(t), b.parts(20)); err != nil {
		t.Fatal(err)
	}
	r := b.reader(queue.Up)
	b.publish(queue.Up, "r1", 1, 200)
	expect(t, r, "r1", 1, 100)

	// A block reaches all nodes.
	b.people.block("alice/phone")
	if err := b.q.Disconnect(within(t), "alice", "phone", ""); err != nil {
		t.Fatal(err)
	}
	for _, nc := range []*nats.Conn{phone.nc, keyed} {
		eventually(t, "blocked device", func() error {
			if nc.IsConnected() {
				return errors.New("still connected")
			}
			return nil
		})
	}
	for _, d := range []*device{tablet, bob} {
		if r := d.put(session(1), "1-1", []byte("x"), nil); !r.Stored || d.nc.Stats().Reconnects > 0 {
			t.Fatalf("%s/%s was closed too: %+v", d.user, d.name, r)
		}
	}

	// One node goes: everything goes on.
	end(nodes[1])
	eventually(t, "put with two nodes", func() error {
		if r := bob.put(session(2), "1-1", []byte("x"), nil); !r.Stored {
			return r.Error
		}
		return nil
	})
	b.publish(queue.Up, "r1", 201, 300)
	expect(t, r, "r1", 101, 300)
}

func at(url string) nats.Option {
	return func(o *nats.Options) error {
		o.Servers, o.NoRandomize, o.IgnoreDiscoveredServers = []string{url}, true, true
		return nil
	}
}

func TestServerConfigText(t *testing.T) {
	s, err := queue.NewSecrets()
	if err != nil {
		t.Fatal(err)
	}
	s.App = "$WS_APP_PASSWORD"
	text, err := queue.ServerConfig(s, queue.ServerConfigOptions{Websocket: 8443, CertFile: "/tls/cert.pem", KeyFile: "/tls/key.pem", Sync: "always", HTTP: 8222})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"password: $WS_APP_PASSWORD", `password: "` + s.Sys + `"`, "sync_interval: always", `"_INBOX.*.*.>"`, `websocket { port: 8443, tls { cert_file: "/tls/cert.pem"`} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	for _, seed := range []string{s.IssuerSeed, s.SealSeed} {
		if strings.Contains(text, seed) {
			t.Error("a private key is in the configuration")
		}
	}
	for name, spoil := range map[string]func(*queue.Secrets){
		"issuer is a user key": func(s *queue.Secrets) { seed, _ := userKey(t).kp.Seed(); s.IssuerSeed = string(seed) },
		"issuer is no key":     func(s *queue.Secrets) { s.IssuerSeed = "x" },
		"seal is no key":       func(s *queue.Secrets) { s.SealSeed = "x" },
		"no password":          func(s *queue.Secrets) { s.Sys = "" },
		"quote in a password":  func(s *queue.Secrets) { s.Sys = `a"b` },
	} {
		bad := s
		spoil(&bad)
		if _, err := queue.ServerConfig(bad, queue.ServerConfigOptions{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := queue.StartServer(queue.ServerOptions{}, nil); err == nil {
		t.Error("a server without a folder was started")
	}
}
