package queue

import (
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"go.uber.org/zap"
)

// ServerOptions of an embedded server.
type ServerOptions struct {
	Name       string      // default "waystage"
	Host       string      // default 127.0.0.1
	Port       int         // 0: any free port
	StoreDir   string      // of JetStream; required
	MaxStore   int64       // bytes that JetStream may use; 0: three quarters of what is free
	SyncAlways bool        // fsync each message: 5 to 30 times slower, and nothing rests on it
	TLS        *tls.Config // nil: none

	Websocket     bool // also listen for websocket connections, with TLS if there is TLS
	WebsocketPort int  // 0: any free port

	Closed bool // take no connections from outside until Open; those of this process work. Not for websockets

	Secrets Secrets // zero: random ones, new at each start
}

// Server is a NATS server in this process, with JetStream and Waystage's accounts.
type Server struct {
	srv     *server.Server
	secrets Secrets
	once    sync.Once
}

// StartServer starts a server and waits until it takes connections.
func StartServer(o ServerOptions, log *zap.Logger) (*Server, error) {
	if log == nil {
		log = zap.NewNop()
	}
	if o.StoreDir == "" {
		return nil, errors.New("queue: the embedded server needs a folder for its store")
	}
	if o.Secrets == (Secrets{}) {
		var err error
		if o.Secrets, err = NewSecrets(); err != nil {
			return nil, err
		}
	}
	opts, err := options(o)
	if err != nil {
		return nil, err
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("queue: embedded server: %w", err)
	}
	srv.SetLoggerV2(serverLog{log.Named("nats").Sugar()}, false, false, false)
	srv.Start()
	s := &Server{srv: srv, secrets: o.Secrets}
	if !srv.ReadyForConnections(30 * time.Second) {
		s.Shutdown()
		return nil, fmt.Errorf("queue: the embedded server does not take connections on %s:%d; is the port in use?", opts.Host, opts.Port)
	}
	return s, nil
}

func options(o ServerOptions) (*server.Options, error) {
	k, err := o.Secrets.keys()
	if err != nil {
		return nil, err
	}
	set(&o.Name, "waystage")
	set(&o.Host, "127.0.0.1")
	set(&o.Port, server.RANDOM_PORT)
	set(&o.WebsocketPort, server.RANDOM_PORT)
	opts := &server.Options{}
	// As text, because only so JetStream is on in its account before the first client comes.
	if err := opts.ProcessConfigString(accountsText(o.Secrets, k, "")); err != nil {
		return nil, fmt.Errorf("queue: configuration of the embedded server: %w", err)
	}
	opts.ServerName, opts.Host, opts.Port, opts.NoSigs = o.Name, o.Host, o.Port, true
	opts.JetStream, opts.StoreDir, opts.JetStreamMaxStore, opts.SyncAlways = true, o.StoreDir, o.MaxStore, o.SyncAlways
	opts.MaxPayload, opts.MaxControlLine = maxPayload, maxLine
	// The first ping of the server comes after two seconds even to a client that is still logging in, which then gives
	// up: many devices that come back at once must not be turned away for that.
	opts.DisableShortFirstPing = true
	// Devices log in by signing the server's nonce; the callout checks it.
	opts.AlwaysEnableNonce = true
	// How long closing the connections takes; see Shutdown.
	opts.LameDuckGracePeriod, opts.LameDuckDuration = 50*time.Millisecond, 500*time.Millisecond
	if o.TLS != nil {
		opts.TLS, opts.TLSConfig, opts.TLSTimeout = true, o.TLS, 5
	}
	if o.Websocket {
		opts.Websocket = server.WebsocketOpts{
			Host: o.Host, Port: o.WebsocketPort, TLSConfig: o.TLS, NoTLS: o.TLS == nil,
			Compression: true, HandshakeTimeout: 5 * time.Second,
		}
	}
	return opts, nil
}

// Open begins to take connections, on a server that was started with Closed: a device that comes before anybody can
// decide its login would be turned away as if its password were wrong.
func (s *Server) Open() error {
	listening := make(chan struct{})
	s.srv.AcceptLoop(listening)
	<-listening
	if s.srv.Addr() == nil {
		return errors.New("queue: the embedded server cannot listen; is the port in use?")
	}
	return nil
}

// URL is where devices connect.
func (s *Server) URL() string { return s.srv.ClientURL() }

// WebsocketURL is where devices connect by websocket, empty without that.
func (s *Server) WebsocketURL() string { return s.srv.WebsocketURL() }

// Secrets are those in force, for people who explore the streams with the nats tool.
func (s *Server) Secrets() Secrets { return s.secrets }

// Shutdown stops the server and waits until it has ended and its store is closed. Connections are closed first, and no
// new ones taken: a login that asks the callout while nats-server (2.15.2) takes its event system down would crash the process.
func (s *Server) Shutdown() {
	s.once.Do(func() {
		s.srv.LameDuckShutdown()
		s.srv.Shutdown() // if there was no listener yet
		s.srv.WaitForShutdown()
	})
}

// serverLog hands the server's messages on. Its notices tell of each start in thirty lines: debug. So are what nobody can or need
// do anything about: the passwords of its configuration are ours, and of a refused login the callout says why.
type serverLog struct{ log *zap.SugaredLogger }

func (l serverLog) Noticef(format string, v ...any) { l.log.Debugf(format, v...) }
func (l serverLog) Warnf(format string, v ...any) {
	if strings.HasPrefix(format, "Plaintext passwords detected") || strings.HasPrefix(format, "Auth callout service returned an error") {
		l.log.Debugf(format, v...)
		return
	}
	l.log.Warnf(format, v...)
}

func (l serverLog) Errorf(format string, v ...any) {
	if strings.Contains(format, server.ErrAuthentication.Error()) {
		l.log.Debugf(format, v...)
		return
	}
	l.log.Errorf(format, v...)
}
func (l serverLog) Fatalf(format string, v ...any) { l.log.Errorf(format, v...) }
func (l serverLog) Debugf(string, ...any)          {}
func (l serverLog) Tracef(string, ...any)          {}
