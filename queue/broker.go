package queue

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/zap"
)

// Broker says how this process reaches NATS.
type Broker struct {
	Embedded *Server     // a server in this process; the other fields are then ignored
	URLs     []string    // else: nats://, tls://, ws:// or wss:// addresses without credentials
	TLS      *tls.Config // for tls:// and wss://
	Secrets  Secrets     // as in the servers' configuration (see [ServerConfig])
}

func (b *Broker) secrets() *Secrets {
	if b.Embedded != nil {
		return &b.Embedded.secrets
	}
	return &b.Secrets
}

// connect opens a connection as one of the static users. It tries again until ctx ends, except after a refused login.
// The connection then lives until it is closed, whatever happens to the broker.
func (b *Broker) connect(ctx context.Context, user string, log *zap.Logger, reconnected func()) (*nats.Conn, error) {
	log = log.With(zap.String("connection", user))
	opts := []nats.Option{
		nats.Name("waystage " + user),
		nats.UserInfo(user, b.secrets().password(user)),
		nats.MaxReconnects(-1),
		// Quick, before the devices: while the callout is away, the broker lets each login wait in vain.
		nats.ReconnectWait(50 * time.Millisecond),
		nats.ReconnectJitter(100*time.Millisecond, 300*time.Millisecond),
		nats.IgnoreAuthErrorAbort(), // a server that restarts with other passwords may get the right ones back
		nats.PingInterval(10 * time.Second),
		nats.Timeout(5 * time.Second),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("lost the broker; reconnecting", zap.Error(err))
			}
		}),
		nats.ReconnectHandler(func(*nats.Conn) {
			log.Info("reached the broker again")
			if reconnected != nil {
				reconnected()
			}
		}),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			log.Error("the broker reports", zap.String("subject", subject), zap.Error(err))
		}),
	}
	url := strings.Join(b.URLs, ",")
	if b.Embedded != nil {
		opts = append(opts, nats.InProcessServer(b.Embedded.srv))
	} else if b.TLS != nil {
		opts = append(opts, nats.Secure(b.TLS))
	}
	for {
		nc, err := nats.Connect(url, opts...)
		switch {
		case err == nil:
			return nc, nil
		case errors.Is(err, nats.ErrAuthorization):
			return nil, fmt.Errorf("queue: the broker refuses user %q: its configuration must carry the passwords of this server's: %w", user, err)
		}
		log.Info("cannot reach the broker; trying again", zap.Error(err))
		if !sleep(ctx, time.Second) {
			return nil, fmt.Errorf("queue: cannot reach the broker: %w", err)
		}
	}
}

// closeConn closes a connection and waits until its callbacks have ended.
func closeConn(nc *nats.Conn) {
	if nc == nil || nc.IsClosed() {
		return
	}
	if nc.IsConnected() {
		_ = nc.FlushTimeout(time.Second) // the last answers
	}
	done := make(chan struct{})
	nc.SetClosedHandler(func(*nats.Conn) { close(done) })
	nc.Close()
	select {
	case <-done:
	case <-time.After(5 * time.Second): // closed by somebody else between the two calls
	}
}
