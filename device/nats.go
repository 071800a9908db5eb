package device

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/waystage/waystage/protocol"
)

// DialNATS connects to the server's NATS listener.
func DialNATS(ctx context.Context, l Login) (Transport, error) {
	if len(l.Servers) == 0 {
		return nil, fmt.Errorf("device: no server address")
	}
	opts := []nats.Option{
		nats.Name("waystage device " + l.User + "/" + l.Device),
		nats.MaxReconnects(20),
		nats.ReconnectWait(500 * time.Millisecond),
		// Without a handler the client prints; a refused call shows as its own error.
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
	}
	timeout := 10 * time.Second
	if deadline, ok := ctx.Deadline(); ok {
		timeout = min(timeout, max(time.Until(deadline), 100*time.Millisecond))
	}
	opts = append(opts, nats.Timeout(timeout))
	if l.Seed != nil {
		kp, err := nkeys.FromSeed(l.Seed)
		if err != nil {
			return nil, fmt.Errorf("device: the stored key is damaged: %w; enrol again", err)
		}
		pub, err := kp.PublicKey()
		if err != nil {
			return nil, fmt.Errorf("device: the stored key is damaged: %w; enrol again", err)
		}
		// The name beside the key is for the operator, who sees whose login was refused.
		opts = append(opts, nats.Nkey(pub, kp.Sign), nats.UserInfo(l.User+"/"+l.Device, ""), nats.CustomInboxPrefix(protocol.InboxPrefix(l.User, l.Device)))
	} else if l.EnrolOnly != "" {
		opts = append(opts, nats.UserInfo(l.User+"/"+l.Device, l.EnrolOnly), nats.CustomInboxPrefix(protocol.EnrolInbox(l.User, l.Device, l.EnrolOnly)))
	} else {
		opts = append(opts, nats.UserInfo(l.User+"/"+l.Device, l.Password), nats.CustomInboxPrefix(protocol.InboxPrefix(l.User, l.Device)))
	}
	urls := strings.Join(l.Servers, ",")
	type dialled struct {
		nc  *nats.Conn
		err error
	}
	ch := make(chan dialled, 1)
	go func() {
		nc, err := nats.Connect(urls, opts...)
		ch <- dialled{nc, err}
	}()
	select {
	case <-ctx.Done():
		go func() { // the connection attempt ends by its own timeout
			if c := <-ch; c.nc != nil {
				c.nc.Close()
			}
		}()
		return nil, fmt.Errorf("device: connecting to %s: %w", urls, ctx.Err())
	case c := <-ch:
		switch {
		case c.err == nil:
			return &natsTransport{nc: c.nc, user: l.User, device: l.Device}, nil
		case isAuth(c.err):
			if l.EnrolOnly != "" {
				return nil, fmt.Errorf("device: %w as %s/%s at %s: the token or JWT is not known, is not for this device, or is too old; the server's log says why", ErrLogin, l.User, l.Device, urls)
			}
			if l.Seed == nil {
				return nil, fmt.Errorf("device: %w as %s/%s at %s: unknown user, wrong password, or blocked; or the server cannot look it up just now, then its log says so", ErrLogin, l.User, l.Device, urls)
			}
			return nil, fmt.Errorf("device: %w with the key of %s/%s at %s: the device or user is blocked, was removed or reset, was enrolled again elsewhere, or another copy of its file has taken a new key; or the server cannot look it up just now, then its log says so", ErrLogin, l.User, l.Device, urls)
		default:
			return nil, fmt.Errorf("device: %w at %s: %w", ErrUnreachable, urls, c.err)
		}
	}
}

func isAuth(err error) bool {
	return errors.Is(err, nats.ErrAuthorization) || errors.Is(err, nats.ErrAuthExpired) || errors.Is(err, nats.ErrAuthRevoked) ||
		errors.Is(err, nats.ErrAccountAuthExpired) || errors.Is(err, nats.ErrPermissionViolation)
}

type natsTransport struct {
	nc           *nats.Conn
	user, device string
}

// Timeouts of one call. The gateway holds a get for up to five seconds, a watch for half a minute.
const (
	callTimeout = 10 * time.Second

	commitTimeout = 2 * time.Minute // the server reads the whole content

	getTimeout   = 20 * time.Second
	watchTimeout = 45 * time.Second
)

func (t *natsTransport) call(ctx context.Context, timeout time.Duration, p Payload, verb string, tokens ...string) (*nats.Msg, error) {
	m := nats.NewMsg(protocol.RequestSubject(t.user, t.device, verb, tokens...))
	m.Data = p.Data
	if p.ContentType != "" {
		m.Header.Set(protocol.HeaderContentType, p.ContentType)
	}
	if p.Encoding != "" {
		m.Header.Set(protocol.HeaderContentEncoding, p.Encoding)
	}
	cctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	reply, err := t.nc.RequestMsgWithContext(cctx, m)
	switch {
	case err == nil:
		return reply, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case isAuth(err), isAuth(t.nc.LastError()) && t.nc.IsClosed():
		return nil, fmt.Errorf("device: %w: the server closed the connection of %s/%s: the device or user was blocked", ErrBlocked, t.user, t.device)
	case errors.Is(err, nats.ErrNoResponders):
		return nil, fmt.Errorf("device: %w: the broker is there, but no gateway answers", ErrUnreachable)
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("device: %w: no answer to %s within %s", ErrUnreachable, verb, timeout)
	default:
		return nil, fmt.Errorf("device: %w: %s: %w", ErrUnreachable, verb, err)
	}
}

// answer reads a JSON answer; a refusal in its header is returned as the error.
func answer[T any](m *nats.Msg, err error, refusal func(*T) *protocol.Error) (T, error) {
	var a T
	if err != nil {
		return a, err
	}
	if e := refused(m); e != nil {
		return a, e
	}
	if err := json.Unmarshal(m.Data, &a); err != nil {
		return a, fmt.Errorf("device: %w: not an answer of a gateway: %w", ErrReply, err)
	}
	if e := refusal(&a); e != nil {
		return a, e
	}
	return a, nil
}

func refused(m *nats.Msg) *protocol.Error {
	code := m.Header.Get(protocol.HeaderError)
	if code == "" {
		return nil
	}
	e := &protocol.Error{}
	if json.Unmarshal(m.Data, e) != nil || e.Code == "" {
		e = &protocol.Error{Code: protocol.Code(code), Message: "the gateway gave no reason"}
	}
	return e
}

func (t *natsTransport) Enrol(ctx context.Context, e protocol.Enrolment) (protocol.Enrolled, error) {
	data, err := json.Marshal(e)
	if err != nil {
		return protocol.Enrolled{}, err
	}
	verb := protocol.VerbEnrol
	if e.Token != "" {
		verb = protocol.VerbRedeem
	}
	m, err := t.call(ctx, callTimeout, Payload{ContentType: protocol.ContentJSON, Data: data}, verb)
	return answer(m, err, func(a *protocol.Enrolled) *protocol.Error { return a.Error })
}

func (t *natsTransport) Rotate(ctx context.Context, r protocol.Rotation) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	m, err := t.call(ctx, callTimeout, Payload{ContentType: protocol.ContentJSON, Data: data}, protocol.VerbRotate)
	_, err = answer(m, err, func(a *protocol.Rotated) *protocol.Error { return a.Error })
	return err
}

func (t *natsTransport) Put(ctx context.Context, session, part string, p Payload) (protocol.Receipt, error) {
	m, err := t.call(ctx, callTimeout, p, protocol.VerbPut, session, part)
	return answer(m, err, func(a *protocol.Receipt) *protocol.Error { return a.Error })
}

func (t *natsTransport) Get(ctx context.Context, session string, page int) (Payload, error) {
	m, err := t.call(ctx, getTimeout, Payload{}, protocol.VerbGet, session, strconv.Itoa(page))
	if err != nil {
		return Payload{}, err
	}
	if e := refused(m); e != nil {
		return Payload{}, e
	}
	return Payload{ContentType: m.Header.Get(protocol.HeaderContentType), Encoding: m.Header.Get(protocol.HeaderContentEncoding), Data: m.Data}, nil
}

func (t *natsTransport) Ack(ctx context.Context, session string) error {
	m, err := t.call(ctx, callTimeout, Payload{}, protocol.VerbAck, session)
	if err != nil {
		return err
	}
	if e := refused(m); e != nil {
		return e
	}
	return nil
}

func (t *natsTransport) Status(ctx context.Context, session string) (protocol.Status, error) {
	m, err := t.call(ctx, callTimeout, Payload{}, protocol.VerbStatus, session)
	// Status.Error is the state of the session, not a refusal of the call.
	return answer(m, err, func(*protocol.Status) *protocol.Error { return nil })
}

func (t *natsTransport) News(ctx context.Context, ask protocol.Watch) (protocol.News, error) {
	data, err := json.Marshal(ask)
	if err != nil {
		return protocol.News{}, err
	}
	m, err := t.call(ctx, watchTimeout, Payload{ContentType: protocol.ContentJSON, Data: data}, protocol.VerbWatch)
	return answer(m, err, func(a *protocol.News) *protocol.Error { return a.Error })
}

func (t *natsTransport) Check(ctx context.Context, ask protocol.Watch) (protocol.News, error) {
	ask.Now = true
	data, err := json.Marshal(ask)
	if err != nil {
		return protocol.News{}, err
	}
	m, err := t.call(ctx, callTimeout, Payload{ContentType: protocol.ContentJSON, Data: data}, protocol.VerbWatch)
	return answer(m, err, func(a *protocol.News) *protocol.Error { return a.Error })
}

func (t *natsTransport) FileGet(ctx context.Context, sha256 string, n int) ([]byte, error) {
	m, err := t.call(ctx, callTimeout, Payload{}, protocol.VerbFileGet, sha256, strconv.Itoa(n))
	if err != nil {
		return nil, err
	}
	if e := refused(m); e != nil {
		return nil, e
	}
	return m.Data, nil
}

func (t *natsTransport) fileReceipt(ctx context.Context, timeout time.Duration, data []byte, verb string, tokens ...string) (protocol.FileReceipt, error) {
	m, err := t.call(ctx, timeout, Payload{Data: data}, verb, tokens...)
	return answer(m, err, func(a *protocol.FileReceipt) *protocol.Error { return a.Error })
}

func (t *natsTransport) FileOffer(ctx context.Context, id string, o protocol.FileOffer) (protocol.FileReceipt, error) {
	data, err := json.Marshal(o)
	if err != nil {
		return protocol.FileReceipt{}, err
	}
	return t.fileReceipt(ctx, callTimeout, data, protocol.VerbFileOffer, id)
}

func (t *natsTransport) FilePut(ctx context.Context, id string, n int, data []byte) (protocol.FileReceipt, error) {
	return t.fileReceipt(ctx, callTimeout, data, protocol.VerbFilePut, id, strconv.Itoa(n))
}

func (t *natsTransport) FileCommit(ctx context.Context, id string) (protocol.FileReceipt, error) {
	return t.fileReceipt(ctx, commitTimeout, nil, protocol.VerbFileCommit, id)
}

func (t *natsTransport) Close() error {
	t.nc.Close()
	return nil
}
