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

// Authenticator knows devices by their keys, and is told of refused logins. An error that has a method ErrorCode()
// protocol.Code is a refusal, any other a failure; neither lets the login in. It must answer within two seconds when all is well.
type Authenticator interface {
	// Key finds the device that has the public key. That the connection, which conn names, can sign with it has been checked.
	Key(ctx context.Context, publicKey, conn string) (user, device string, err error)
	// Refused hears of a refused login in a device's name, which was claimed and not proven. host is where it came from.
	Refused(ctx context.Context, user, device string, code protocol.Code, host string) error
}

// Provider is one way for a device that has no key yet to prove whose it is: the users' passwords, enrolment tokens, the
// company's identity provider. Another one is a type with these methods, and a line where the server is wired. Errors are as
// those of [Authenticator].
type Provider interface {
	// Mine tells from the form of a secret whether it is this provider's to judge.
	Mine(secret string) bool
	// Identify checks that whoever has the secret may log in as the user's device.
	Identify(ctx context.Context, user, device, secret string) error
	// Only names the one call that such a login is good for ([protocol.VerbEnrol] or [protocol.VerbRedeem]); empty: every call of the device.
	Only() string
}

// Callout decides the logins of devices, for the broker. Any number may run, in any process.
type Callout struct {
	broker    Broker
	auth      Authenticator
	providers []Provider
	log       *zap.Logger
	ready     signal
	failures  *failures
}

// NewCallout makes one. The first provider that takes a secret for its own decides. It does no I/O.
func NewCallout(b Broker, auth Authenticator, providers []Provider, log *zap.Logger) *Callout {
	if log == nil {
		log = zap.NewNop()
	}
	return &Callout{broker: b, auth: auth, providers: providers, log: log.Named("callout"), ready: newSignal(), failures: newFailures()}
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
	g, err := c.decide(ctx, req)
	resp := jwt.NewAuthorizationResponseClaims(req.UserNkey)
	resp.Audience = req.Server.ID
	if err == nil {
		resp.Jwt, err = token(k, req.UserNkey, g)
	}
	if err != nil {
		resp.Error = "login refused" // the reason is for the operator: the broker would tell it to whoever asks
		c.refused(ctx, req, err)
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

// refused tells the operator of a refused login: in the log, and at the device whose name was claimed.
func (c *Callout) refused(ctx context.Context, req *jwt.AuthorizationRequestClaims, err error) {
	host, login := req.ClientInformation.Host, oneLine(req.ConnectOptions.Username)
	c.log.Log(levelOf(err), "login refused", zap.String("host", host), zap.String("login", login),
		zap.String("key", oneLine(req.ConnectOptions.Nkey)), zap.String("code", string(codeOf(err))), zap.Error(err))
	user, device, ok := strings.Cut(login, "/")
	if !ok || !protocol.ValidName(user) || !protocol.ValidName(device) {
		return
	}
	if err := c.auth.Refused(ctx, user, device, codeOf(err), host); err != nil {
		c.log.Warn("cannot note a refused login", zap.Error(err))
	}
}

// decide says whose login it is, and what it is good for.
func (c *Callout) decide(ctx context.Context, req *jwt.AuthorizationRequestClaims) (grant, error) {
	o, from := req.ConnectOptions, req.ClientInformation
	switch {
	case o.JWT != "" || o.Token != "":
		return grant{}, errLogin("a login by token; devices log in with a key, or with user/device and a secret as the password")
	case o.Nkey != "":
		if err := signed(o.Nkey, from.Nonce, o.SignedNonce); err != nil {
			return grant{}, err
		}
		user, device, err := c.auth.Key(ctx, o.Nkey, connName(req.Server.ID, from.ID))
		switch {
		case err != nil:
			return grant{}, err
		case o.Username != "" && o.Username != user+"/"+device:
			return grant{}, errLogin("the key is another device's")
		case !protocol.ValidName(user) || !protocol.ValidName(device):
			return grant{}, errLogin("the device's name cannot be part of a subject")
		}
		return deviceGrant(user, device), nil
	}
	user, device, ok := strings.Cut(o.Username, "/")
	switch {
	case !ok || !protocol.ValidName(user) || !protocol.ValidName(device):
		return grant{}, errLogin("the login name is not <user>/<device> with names of 1 to 64 of a-z, 0-9, '_' and '-'")
	case len(o.Password) > protocol.MaxSecret:
		return grant{}, errLogin(fmt.Sprintf("the password, token or JWT has %d bytes, more than %d", len(o.Password), protocol.MaxSecret))
	case !c.failures.may(from.Host, user):
		return grant{}, errTooMany{}
	}
	for _, p := range c.providers {
		if !p.Mine(o.Password) {
			continue
		}
		if err := p.Identify(ctx, user, device, o.Password); err != nil {
			if codeOf(err) != "" {
				c.failures.note(from.Host, user)
			}
			return grant{}, err
		}
		if verb := p.Only(); verb != "" {
			return enrolGrant(user, device, verb, o.Password), nil
		}
		return deviceGrant(user, device), nil
	}
	return grant{}, errLogin("there is no identity provider for this kind of login")
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
func token(k keys, userKey string, g grant) (string, error) {
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

// codeOf is the stable name of a refusal; empty: a failure.
func codeOf(err error) protocol.Code {
	var c coded
	if errors.As(err, &c) {
		return c.ErrorCode()
	}
	return ""
}

func levelOf(err error) zapcore.Level {
	if codeOf(err) != "" {
		return zap.InfoLevel
	}
	return zap.ErrorLevel
}
