package cmd

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"

	"go.uber.org/zap"

	"github.com/waystage/waystage/queue"
)

// startBroker starts the embedded NATS server, for this process alone until open is called, or says how to reach the
// external one. stop ends what was started.
func startBroker(c Config, log *zap.Logger) (b queue.Broker, open func() error, stop func(), err error) {
	if len(c.NATS.External.URLs) > 0 {
		b, err = c.external()
		return b, func() error { return nil }, func() {}, err
	}
	e := c.NATS.Embedded
	o := queue.ServerOptions{StoreDir: e.Store, SyncAlways: e.Sync, Closed: true}
	if o.Host, o.Port, err = splitAddress("nats.embedded.listen", e.Listen); err != nil {
		return b, nil, nil, err
	}
	if e.Websocket != "" {
		host, port, err := splitAddress("nats.embedded.websocket", e.Websocket)
		if err != nil {
			return b, nil, nil, err
		}
		if host != o.Host {
			return b, nil, nil, &failure{code: exitUsage, what: "nats.embedded.websocket must listen on the same host as nats.embedded.listen", where: host + ", " + o.Host}
		}
		o.Websocket, o.WebsocketPort = true, port
	}
	if e.TLSCert != "" {
		pair, err := tls.LoadX509KeyPair(e.TLSCert, e.TLSKey)
		if err != nil {
			return b, nil, nil, &failure{code: exitUsage, what: "cannot read the broker's certificate", where: e.TLSCert, err: err}
		}
		o.TLS = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
	}
	// Two servers on one store would spoil it, so the address is tried before the store is opened.
	for key, address := range map[string]string{"nats.embedded.listen": e.Listen, "nats.embedded.websocket": e.Websocket} {
		if address == "" {
			continue
		}
		l, err := net.Listen("tcp", address)
		if err == nil {
			err = l.Close()
		}
		if err != nil {
			return b, nil, nil, &failure{code: exitPrecondition, what: "the broker's address cannot be used", where: address, err: err,
				remedy: "is another server running? change " + key}
		}
	}
	path := filepath.Join(e.Store, brokerFile)
	k, err := readKeys(path)
	switch {
	case err == nil && k.Secrets != (queue.Secrets{}):
	case err == nil || errors.Is(err, os.ErrNotExist):
		if k.Secrets, err = queue.NewSecrets(); err != nil {
			return b, nil, nil, err
		}
	default:
		return b, nil, nil, &failure{code: exitFailed, what: "cannot read the broker's keys", where: path, err: bare(err),
			remedy: "remove the file: the server makes new ones"}
	}
	o.Secrets = k.Secrets
	if err := os.MkdirAll(e.Store, 0o700); err != nil {
		return b, nil, nil, &failure{code: exitFailed, what: "cannot make the broker's folder", where: e.Store, err: bare(err)}
	}
	srv, err := queue.StartServer(o, log)
	if err != nil {
		return b, nil, nil, &failure{code: exitFailed, what: "the embedded broker does not start", where: e.Listen, err: err}
	}
	// The keys are kept before anybody uses them; the operator's commands find the address when there is one.
	k.URL = ""
	if err := writeKeys(path, k); err != nil {
		srv.Shutdown()
		return b, nil, nil, &failure{code: exitFailed, what: "cannot write the broker's keys", where: path, err: bare(err)}
	}
	open = func() error {
		if err := srv.Open(); err != nil {
			return &failure{code: exitPrecondition, what: "the broker's address cannot be used", where: e.Listen, err: err}
		}
		k.URL = srv.URL()
		return writeKeys(path, k)
	}
	return queue.Broker{Embedded: srv}, open, srv.Shutdown, nil
}
