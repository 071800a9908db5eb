package cmd

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nats.go/micro"

	"github.com/waystage/waystage/internal/health"
	"github.com/waystage/waystage/queue"
)

// brokerFile is what the embedded broker leaves in its folder for the operator's commands and for its next start: keys and
// passwords, and where it listens. It is as secret as the folder.
const brokerFile = "broker.json"

// brokerKeys is the content of broker.json and of nats.external.credentials_file.
type brokerKeys struct {
	URL     string        `json:"url,omitempty"` // of the embedded broker's last start
	Secrets queue.Secrets `json:"secrets"`
}

func readKeys(path string) (brokerKeys, error) {
	var k brokerKeys
	b, err := os.ReadFile(path)
	if err != nil {
		return k, err
	}
	return k, json.Unmarshal(b, &k)
}

// writeKeys replaces the file in one step, readable by its owner only.
func writeKeys(path string, k brokerKeys) error {
	b, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(path+".part", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".part", path)
}

// external says how to reach a broker that is not ours.
func (c *Config) external() (queue.Broker, error) {
	e := c.NATS.External
	k, err := readKeys(e.Credentials)
	if err != nil {
		return queue.Broker{}, &failure{code: exitUsage, what: "cannot read the broker's keys", where: e.Credentials, err: bare(err),
			remedy: "'waystage init --nats' writes them, with the configuration of the NATS servers"}
	}
	b := queue.Broker{URLs: e.URLs, Secrets: k.Secrets}
	if e.CA == "" {
		return b, nil
	}
	roots, err := os.ReadFile(e.CA)
	if err != nil {
		return b, &failure{code: exitUsage, what: "cannot read the certificate authority", where: e.CA, err: bare(err)}
	}
	b.TLS = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	if !b.TLS.RootCAs.AppendCertsFromPEM(roots) {
		return b, &failure{code: exitUsage, what: "the certificate authority file holds no certificate", where: e.CA}
	}
	return b, nil
}

// broker is an operator's connection to account APP of the broker that a server uses.
type broker struct{ nc *nats.Conn }

func (b *broker) close() { b.nc.Close() }

// broker connects to the external broker, or to the embedded one of a running server on this machine.
func (a *app) broker(ctx context.Context, c Config) (*broker, error) {
	var at queue.Broker
	if len(c.NATS.External.URLs) > 0 {
		var err error
		if at, err = c.external(); err != nil {
			return nil, err
		}
	} else {
		path := filepath.Join(c.NATS.Embedded.Store, brokerFile)
		k, err := readKeys(path)
		if err != nil || k.URL == "" {
			return nil, &failure{code: exitUnreachable, what: "cannot find the embedded broker", where: path, err: bare(err),
				remedy: "is 'waystage serve' running on this machine, with the same nats.embedded.store?"}
		}
		at = queue.Broker{URLs: []string{k.URL}, Secrets: k.Secrets}
		if c.NATS.Embedded.TLSCert != "" {
			if at.TLS, err = pinned(c.NATS.Embedded.TLSCert); err != nil {
				return nil, err
			}
		}
	}
	opts := []nats.Option{nats.Name("waystage operator"), nats.UserInfo("app", at.Secrets.App), nats.Timeout(3 * time.Second), nats.NoReconnect()}
	if at.TLS != nil {
		opts = append(opts, nats.Secure(at.TLS))
	}
	nc, err := nats.Connect(strings.Join(at.URLs, ","), opts...)
	if err != nil {
		return nil, &failure{code: exitUnreachable, what: "cannot connect to the broker", where: strings.Join(at.URLs, ", "), err: err,
			remedy: "is 'waystage serve' (embedded broker) or the NATS cluster (external) running?"}
	}
	if err := ctx.Err(); err != nil {
		nc.Close()
		return nil, err
	}
	return &broker{nc}, nil
}

// pinned trusts exactly the certificate in a file: our own server's, whatever name it carries.
func pinned(file string) (*tls.Config, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, &failure{code: exitUsage, what: "cannot read the certificate", where: file, err: bare(err)}
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, &failure{code: exitUsage, what: "the file holds no certificate", where: file}
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, // VerifyConnection is stricter
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 || subtle.ConstantTimeCompare(s.PeerCertificates[0].Raw, block.Bytes) != 1 {
				return errors.New("the broker shows another certificate than nats.embedded.tls_cert")
			}
			return nil
		}}, nil
}

// poolsChanged makes all processes read the pool settings now.
func (b *broker) poolsChanged() error {
	return errors.Join(b.nc.Publish("ws.pools", nil), b.nc.FlushTimeout(2*time.Second))
}

const (
	gatherFirst = 2 * time.Second        // the first answer may take this long
	gatherNext  = 300 * time.Millisecond // and each further one this much longer
)

// pools asks every process for its pools, by the statistics of their micro services.
func (b *broker) pools(ctx context.Context) (map[string][]processOfPool, error) {
	inbox := b.nc.NewRespInbox()
	sub, err := b.nc.SubscribeSync(inbox)
	if err != nil {
		return nil, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := b.nc.PublishRequest("$SRV.STATS", inbox, nil); err != nil {
		return nil, err
	}
	out := map[string][]processOfPool{}
	for wait := gatherFirst; ; wait = gatherNext {
		next, cancel := context.WithTimeout(ctx, wait)
		m, err := sub.NextMsgWithContext(next)
		cancel()
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			for _, list := range out {
				slices.SortFunc(list, func(a, b processOfPool) int { return strings.Compare(a.ID, b.ID) })
			}
			return out, nil // nobody more answers
		}
		var s micro.Stats
		if json.Unmarshal(m.Data, &s) != nil {
			continue // somebody else's service
		}
		stage, ours := strings.CutPrefix(s.Name, "waystage-")
		if !ours || len(s.Endpoints) == 0 {
			continue
		}
		p := processOfPool{ID: s.ID}
		if json.Unmarshal(s.Endpoints[0].Data, &p.PoolInfo) == nil && p.Stage == stage {
			out[stage] = append(out[stage], p)
		}
	}
}

// queues reads how full the streams are.
func (b *broker) queues(ctx context.Context) ([]health.Queue, error) {
	js, err := jetstream.New(b.nc)
	if err != nil {
		return nil, err
	}
	out := []health.Queue{}
	for _, name := range []string{queue.StreamIn, queue.StreamOut, queue.StreamDead, queue.StreamDown, queue.StreamUp, queue.StreamFile} {
		s, err := js.Stream(ctx, name)
		if err != nil {
			return out, fmt.Errorf("stream %s: %w", name, err)
		}
		info := s.CachedInfo()
		q := health.Queue{Name: name, Direction: directionOf(name), Messages: info.State.Msgs, Bytes: info.State.Bytes, MaxBytes: info.Config.MaxBytes}
		if info.State.Msgs > 0 {
			q.OldestSeconds = max(time.Since(info.State.FirstTime).Seconds(), 0)
		}
		out = append(out, q)
	}
	return out, nil
}

// account reads the limits of account APP.
func (b *broker) account(ctx context.Context) (*jetstream.AccountInfo, error) {
	js, err := jetstream.New(b.nc)
	if err != nil {
		return nil, err
	}
	return js.AccountInfo(ctx)
}
