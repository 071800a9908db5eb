package stages

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// incoming is one request on its way through intake.
type incoming struct {
	parts        []*Part // delivered parts to be settled with it
	user, device string
	session      string // token of the subject
	incarnation  string // from the token
	n            int64
	contentType  string
	encoding     string
	received     time.Time
	deliveries   int

	req     *protocol.Request
	hash    []byte
	refusal *protocol.Error // answer with this, stage nothing
	sets    []string        // told with a refusal

	outcome   outcome
	deviceID  int64
	resetAt   time.Time // incarnations from before do not go on
	reset     bool      // it was refused for that
	newKey    bool      // the reply asks for another key
	built     string    // hash of what the application was built for: as the device has said before, then as it says
	records   []record
	sessionID int64
	replied   bool // a redelivered one: the session has been replied to, in so many pages
	pages     int
}

type outcome byte

const (
	undecided outcome = iota
	taken             // new, staged
	again             // a redelivery: nothing to stage
	refused           // answered with an error page
)

func (r *incoming) refuse(code protocol.Code, format string, args ...any) {
	r.refusal = &protocol.Error{Code: code, Message: fmt.Sprintf(format, args...)}
	r.outcome = refused
}

// assemble makes requests of parts. A series is complete when the queue holds all its parts, whichever workers they
// were delivered to: the worker that sees this looks the others up in the queue. So no part is kept in memory and
// series survive any crash; the parts of a series that is not complete are given back to come again.
func (in *Intake) assemble(ctx context.Context, parts []*Part) ([]*incoming, error) {
	type key struct{ user, device, session string }
	var order []key
	groups := map[key][]*Part{}
	for _, p := range parts {
		k := key{p.User, p.Device, p.Session}
		if groups[k] == nil {
			order = append(order, k)
		}
		groups[k] = append(groups[k], p)
	}
	var reqs []*incoming
	for _, k := range order {
		group := groups[k]
		if slices.ContainsFunc(group, func(p *Part) bool { return p.Total > 1 }) {
			r, err := in.series(ctx, group)
			if err != nil {
				return nil, err
			}
			if r != nil {
				reqs = append(reqs, r)
			}
			continue
		}
		for _, p := range group {
			reqs = append(reqs, in.request([]*Part{p}, p.Data))
		}
	}
	return reqs, nil
}

// series makes a request of one session's parts; nil if the series is not complete.
func (in *Intake) series(ctx context.Context, parts []*Part) (*incoming, error) {
	first := parts[0]
	contradiction := func(format string, args ...any) (*incoming, error) {
		r := newIncoming(parts)
		r.refuse(protocol.CodeSeries, format+"; send the whole request again under the same number", args...)
		return r, nil
	}
	all := make([]*Part, first.Total)
	have, again := 0, false
	for _, p := range parts {
		if p.Total != first.Total || p.ContentType != first.ContentType || p.Encoding != first.Encoding {
			return contradiction("the parts of session %s contradict one another in their number, content type or encoding", first.Session)
		}
		switch other := all[p.Index-1]; {
		case other == nil:
			all[p.Index-1] = p
			have++
		case !bytes.Equal(other.Data, p.Data):
			return contradiction("part %d of session %s came twice with different contents", p.Index, first.Session)
		}
		again = again || p.Deliveries > 1
	}
	if have < len(all) {
		if all[len(all)-1] == nil && !again {
			// The last part is on its way: whoever gets it will find these.
			in.incomplete(parts)
			return nil, nil
		}
		stored, missing, err := first.Delivery.Series(ctx)
		if err != nil {
			return nil, fmt.Errorf("look for the parts of session %s: %w", first.Session, err)
		}
		if missing > 0 {
			return in.unfinished(ctx, parts, missing)
		}
		for i, p := range stored {
			switch {
			case all[i] != nil:
			case p.ContentType != first.ContentType || p.Encoding != first.Encoding:
				return contradiction("the parts of session %s contradict one another in their content type or encoding", first.Session)
			default:
				all[i] = p
				parts = append(parts, p)
			}
		}
	}
	size := 0
	for _, p := range all {
		size += len(p.Data)
	}
	if in.cfg.Limits.Encoded > 0 && size > in.cfg.Limits.Encoded {
		r := newIncoming(parts)
		r.refuse(protocol.CodeTooBig, "the request of session %s has %d bytes, the limit is %d; send smaller sessions", first.Session, size, in.cfg.Limits.Encoded)
		return r, nil
	}
	body := make([]byte, 0, size)
	for _, p := range all {
		body = append(body, p.Data...)
	}
	return in.request(parts, body), nil
}

// incomplete gives the parts back, to come again when the others are there.
func (in *Intake) incomplete(parts []*Part) {
	for _, p := range parts {
		in.settled(p.Delivery.Nak(time.Duration(max(1, min(p.Deliveries, 10))) * in.cfg.SeriesRetry))
	}
}

// unfinished deals with parts of which one is missing. If the session was staged after they were received they are
// what is left of it; if they have waited too long the series is refused.
func (in *Intake) unfinished(ctx context.Context, parts []*Part, missing int) (*incoming, error) {
	r := newIncoming(parts)
	var staged time.Time
	err := in.db.QueryRow(ctx, `SELECT staged_at FROM waystage.session WHERE incarnation = $1 AND n = $2 AND user_name = $3 AND device_name = $4`,
		r.incarnation, r.n, r.user, r.device).Scan(&staged)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("look for session %s: %w", r.session, err)
	}
	waited := in.now().Sub(r.received)
	switch known := err == nil; {
	case known && (staged.After(r.received) || waited > in.cfg.SeriesTimeout):
		r.outcome = again
		return r, nil
	case waited > in.cfg.SeriesTimeout:
		r.refuse(protocol.CodeSeries, "part %d of %d of session %s did not come within %s; send the whole request again under the same number",
			missing, parts[0].Total, r.session, in.cfg.SeriesTimeout)
		return r, nil
	}
	in.incomplete(parts)
	return nil, nil
}

func newIncoming(parts []*Part) *incoming {
	p := parts[0]
	r := &incoming{
		parts: parts, user: p.User, device: p.Device, session: p.Session,
		contentType: p.ContentType, encoding: p.Encoding, received: p.ReceivedAt,
	}
	for _, p := range parts {
		r.deliveries = max(r.deliveries, p.Deliveries)
		if p.ReceivedAt.Before(r.received) {
			r.received = p.ReceivedAt
		}
	}
	// The gateway lets only session tokens pass.
	r.incarnation, r.n, _ = protocol.ParseSession(p.Session)
	return r
}

// request decodes a whole request.
func (in *Intake) request(parts []*Part, body []byte) (r *incoming) {
	r = newIncoming(parts)
	defer func() {
		if p := recover(); p != nil {
			in.log.Error("decoding panicked", zap.String("session", r.session), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
			r.refuse(protocol.CodeMalformed, "the request of session %s cannot be read", r.session)
		}
	}()
	if err := in.decode(r, body); err != nil {
		var e *protocol.Error
		if !errors.As(err, &e) {
			e = &protocol.Error{Code: protocol.CodeMalformed, Message: err.Error()}
		}
		r.refusal, r.outcome = e, refused
	}
	return r
}

func (in *Intake) decode(r *incoming, body []byte) error {
	contentType, err := protocol.ContentType(r.contentType)
	if err != nil {
		return err
	}
	r.contentType = contentType
	lim := in.cfg.Limits
	if lim.Encoded > 0 && len(body) > lim.Encoded {
		return &protocol.Error{Code: protocol.CodeTooBig, Message: fmt.Sprintf("the request has %d bytes, the limit is %d; send smaller sessions", len(body), lim.Encoded)}
	}
	plain, err := protocol.Decompress(body, r.encoding, lim.Decompressed)
	if err != nil {
		return err
	}
	req, err := protocol.DecodeRequest(plain, contentType, lim)
	if err != nil {
		return err
	}
	r.req, r.hash = req, protocol.Hash(plain)
	if token := protocol.SessionToken(req.Incarnation, req.N); token != r.session {
		r.req = nil // the answer goes to the session that the device asked under
		return &protocol.Error{Code: protocol.CodeMalformed, Message: fmt.Sprintf("the request is of session %s but was sent as session %s", token, r.session)}
	}
	for _, f := range [...]struct{ name, value string }{
		{"nonce", req.Nonce}, {"cursor", req.Cursor}, {"schema", req.Schema}, {"epoch", req.Epoch}, {"app", req.App},
	} {
		if bytes.IndexByte([]byte(f.value), 0) >= 0 {
			return &protocol.Error{Code: protocol.CodeMalformed, Message: "field " + f.name + " contains a NUL character"}
		}
	}
	return nil
}
