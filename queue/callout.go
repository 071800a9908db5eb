package queue

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/waystage/waystage/protocol"
)

// Authenticator knows users and devices. An error that has a method ErrorCode() protocol.Code is a refusal, any other a
// failure; neither lets the login in. Both must answer within two seconds when all is well.
type Authenticator interface {
	// Password checks a user's password for a login of one of the user's devices.
	Password(ctx context.Context, user, device, password string) error
	// Key finds the device that has the public key. That the connection can sign with it has been checked.
	Key(ctx context.Context, publicKey string) (user, device string, err error)
}

// Callout decides the logins of devices, for the broker. Any number may run, in any process.
type Callout struct {
	broker Broker
	auth   Authenticator
	log    *zap.Logger
	ready  signal
}

// NewCallout makes one. It does no I/O.
func NewCallout(b Broker, auth Authenticator, log *zap.Logger) *Callout {
	if log == nil {
		log = zap.NewNop()
	}
	return &Callout{broker: b, auth: auth, log: log.Named("callout"), ready: newSignal()}
}

const (
	calloutAtOnce = 256             // logins being decided at the same time; the others wait in the connection
	calloutTime   = 4 * time.Second // for one; the broker has given up after authTimeout
)

// Run answers the broker until ctx ends.
func (c *Callout) Run(ctx context.Context) error {
	k, err := c.broker.secrets().keys()
	if err != nil {
		return err
	}
	nc, err := c.broker.connect(ctx, userCallout, c.log, nil)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer closeConn(nc)
	var logins tasks
	defer logins.wait()
	slots := make(chan struct{}, calloutAtOnce)
	_, err = nc.QueueSubscribe(server.AuthCalloutSubject, "callout", func(m *nats.Msg) {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		logins.run(func() {
			defer func() { <-slots }()
			c.answer(context.WithoutCancel(ctx), k, m) // who has knocked is answered
		})
	})
	if err != nil {
		return fmt.Errorf("queue: callout: %w", err)
	}
	if err := nc.Flush(); err == nil {
		c.ready.give()
	}
	<-ctx.Done()
	return nil
}

// Ready is closed when the broker knows of the callout.
func (c *Callout) Ready() <-chan struct{} { return c.ready.c }

// answer decides one login. A request that is not the broker's gets no answer.
func (c *Callout) answer(ctx context.Context, k keys, m *nats.Msg) {
	data, seal := m.Data, m.Header.Get(server.AuthRequestXKeyHeader)
	if seal == "" {
		c.log.Error("a login came unsealed: the broker's configuration lacks the xkey of auth_callout")
		return
	}
	data, err := k.seal.Open(data, seal)
	if err != nil {
		c.log.Error("a login cannot be unsealed: the broker's xkey is not that of this server's seal seed", zap.Error(err))
		return
	}
	req, err := jwt.DecodeAuthorizationRequestClaims(string(data))
	if err != nil || req.Audience != server.AuthRequestSubject || req.Server.XKey != seal {
		c.log.Error("a login that the broker did not write", zap.Error(err))
		return
	}
	if req.Expires > 0 && time.Now().Unix() > req.Expires {
		return // the broker has given up: not worth the work
	}
	ctx, cancel := context.WithTimeout(ctx, calloutTime)
	defer cancel()
	user, device, err := c.decide(ctx, req)
	resp := jwt.NewAuthorizationResponseClaims(req.UserNkey)
	resp.Audience = req.Server.ID
	if err == nil {
		resp.Jwt, err = token(k, req.UserNkey, user, device)
	}
	if err != nil {
		resp.Error = "login refused" // the reason is for the operator: the broker would tell it to whoever asks
		c.log.Log(levelOf(err), "login refused", zap.String("host", req.ClientInformation.Host),
			zap.String("login", oneLine(req.ConnectOptions.Username)), zap.String("key", oneLine(req.ConnectOptions.Nkey)), zap.Error(err))
	}
	out, err := resp.Encode(k.issuer)
	if err != nil {
		c.log.Error("cannot sign the answer to a login", zap.Error(err))
		return
	}
	sealed, err := k.seal.Seal([]byte(out), seal)
	if err != nil {
		c.log.Error("cannot seal the answer to a login", zap.Error(err))
		return
	}
	if err := m.Respond(sealed); err != nil {
		c.log.Warn("cannot answer a login", zap.Error(err))
	}
}

// errLogin refuses a login that is not of a form that devices use.
type errLogin string

func (e errLogin) Error() string            { return string(e) }
func (e errLogin) ErrorCode() protocol.Code { return protocol.CodeName }

// decide says whose login it is.
func (c *Callout) decide(ctx context.Context, req *jwt.AuthorizationRequestClaims) (user, device string, err error) {
	o := req.ConnectOptions
	switch {
	case o.JWT != "" || o.Token != "":
		return "", "", errLogin("a login by token; devices log in with a key, or with user/device and a password")
	case o.Nkey != "":
		if err := signed(o.Nkey, req.ClientInformation.Nonce, o.SignedNonce); err != nil {
			return "", "", err
		}
		user, device, err = c.auth.Key(ctx, o.Nkey)
		if err == nil && o.Username != "" && o.Username != user+"/"+device {
			err = errLogin("the key is another device's")
		}
	default:
		var ok bool
		user, device, ok = strings.Cut(o.Username, "/")
		if !ok || !protocol.ValidName(user) || !protocol.ValidName(device) {
			return "", "", errLogin("the login name is not <user>/<device> with names of 1 to 64 of a-z, 0-9, '_' and '-'")
		}
		err = c.auth.Password(ctx, user, device, o.Password)
	}
	if err == nil && (!protocol.ValidName(user) || !protocol.ValidName(device)) {
		err = errLogin("the device's name cannot be part of a subject")
	}
	return user, device, err
}

// signed checks that the client has the key's private half: it signed the nonce that the broker sent it.
func signed(public, nonce, signature string) error {
	sig, err := base64.RawURLEncoding.DecodeString(signature)
	if err != nil {
		if sig, err = base64.StdEncoding.DecodeString(signature); err != nil {
			return errLogin("the signature of the nonce is not base64")
		}
	}
	if !nkeys.IsValidPublicUserKey(public) || nonce == "" || len(sig) == 0 {
		return errLogin("a login by key without a public user NKEY and a signed nonce")
	}
	key, err := nkeys.FromPublicKey(public)
	if err == nil {
		err = key.Verify([]byte(nonce), sig)
	}
	if err != nil {
		return errLogin("the nonce was not signed with the key: " + err.Error())
	}
	return nil
}

// token is what the broker binds the connection to.
func token(k keys, userKey, user, device string) (string, error) {
	g := deviceGrant(user, device)
	uc := jwt.NewUserClaims(userKey)
	uc.Audience = g.account
	uc.Name = g.user // Connz shows it; Disconnect finds connections by it
	uc.Pub.Allow.Add(g.pub...)
	uc.Sub.Allow.Add(g.sub...)
	uc.Limits.Subs, uc.Limits.Payload = deviceSubs, devicePayload
	uc.AllowedConnectionTypes.Add(jwt.ConnectionTypeStandard, jwt.ConnectionTypeWebsocket, jwt.ConnectionTypeInProcess)
	// Spread, so that devices that came back together do not all log in again together.
	life := tokenLife - rand.N(tokenLife/4)
	uc.Expires = time.Now().Add(life).Unix()
	return uc.Encode(k.issuer)
}

// coded is a refusal: an error that its cause can do something about.
type coded interface{ ErrorCode() protocol.Code }

func levelOf(err error) zapcore.Level {
	var c coded
	if errors.As(err, &c) {
		return zap.InfoLevel
	}
	return zap.ErrorLevel
}
