package device

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/waystage/waystage/protocol"
)

// transient is how often busy, internal or not_found is taken before giving up for now.
const transient = 5

// patience of one session. All are far below what a person would call stuck; the next sync goes on anyway.
type patience struct {
	busy     time.Duration // pause when the server is busy and names no time
	longest  time.Duration // pause that we make although the server names more
	poll     time.Duration // between two gets, for a gateway that does not hold the call
	mismatch time.Duration // after a page that is not ours
	check    time.Duration // of pending, until the server is asked whether it has the request at all
	most     time.Duration // without a page
}

var usual = patience{
	busy: time.Second, longest: 30 * time.Second, poll: 20 * time.Millisecond, mismatch: 500 * time.Millisecond,
	check: 6 * time.Second, most: 5 * time.Minute,
}

// exchange sends one frozen request and fetches the pages of its reply into the inbox.
type exchange struct {
	d        *Device
	tr       Transport
	sess     *session
	rep      *SetReport
	progress func(stage string, done, total int64)
}

// run ends with the whole reply in the inbox, or with a refusal of the session as a whole.
func (x *exchange) run(ctx context.Context) (*protocol.Error, error) {
	have, err := x.have(ctx)
	if err != nil {
		return nil, err
	}
	if have.last {
		return nil, nil
	}
	if send, err := x.mustSend(ctx, have); err != nil {
		return nil, err
	} else if send {
		if err := x.clear(ctx, &have); err != nil {
			return nil, err
		}
		if refusal, err := x.put(ctx); refusal != nil || err != nil {
			return refusal, err
		}
	}
	return x.fetch(ctx, have)
}

// inbox is what has been fetched of the reply.
type inbox struct {
	pages int
	reply string
	last  bool
}

func (x *exchange) have(ctx context.Context) (h inbox, err error) {
	err = x.d.read(ctx, func(t *txn) error {
		return t.get(`SELECT count(*), coalesce(max(reply), ''), coalesce(max(last), 0) FROM _ws_inbox`, nil, &h.pages, &h.reply, &h.last)
	})
	return h, err
}

// mustSend tells whether the request has to be sent. A resumed one may be at the server already: it asks, since the
// answer is small and the request may be large.
func (x *exchange) mustSend(ctx context.Context, have inbox) (bool, error) {
	if !x.sess.resumed {
		return true, nil
	}
	st, err := x.tr.Status(ctx, x.sess.token())
	var e *protocol.Error
	switch {
	case err == nil && st.State == "replied":
		// Without pages it is lost, or has expired. Waiting for it first would take longer than some syncs last.
		return st.Pages == 0, x.learned(ctx, st)
	case err == nil:
		return have.pages == 0 && !x.arrived(st), x.learned(ctx, st)
	case errors.As(err, &e):
		if e.Code == protocol.CodeBlocked {
			return false, explain("session "+x.sess.token(), err)
		}
		return have.pages == 0, nil
	}
	return have.pages == 0, ctx.Err()
}

// arrived tells whether the server has the whole request. Of one in parts, "received" says only that some part waits in
// the queue; sent again, parts that are there already do no harm.
func (x *exchange) arrived(st protocol.Status) bool {
	switch st.State {
	case "", "unknown":
		return false
	case "received":
		return len(x.sess.Payload.Data) <= x.d.opts.PartSize
	}
	return true
}

// put sends the request in parts.
func (x *exchange) put(ctx context.Context) (*protocol.Error, error) {
	data, size := x.sess.Payload.Data, x.d.opts.PartSize
	parts := (len(data) + size - 1) / size
	if parts > protocol.MaxParts {
		return &protocol.Error{Code: protocol.CodeTooBig, Message: fmt.Sprintf("the session has %d parts, the limit is %d", parts, protocol.MaxParts)}, nil
	}
	for i := range parts {
		part := Payload{ContentType: x.sess.Payload.ContentType, Encoding: x.sess.Payload.Encoding, Data: data[i*size : min((i+1)*size, len(data))]}
		x.progress(StageUpload, int64(i*size), int64(len(data)))
		for tries := 1; ; tries++ {
			_, err := x.tr.Put(ctx, x.sess.token(), protocol.PartToken(i+1, parts), part)
			if err == nil {
				break
			}
			refusal, err := x.take(ctx, err, tries)
			if refusal != nil || err != nil {
				return refusal, err
			}
		}
		x.rep.BytesUp += int64(len(part.Data))
	}
	x.progress(StageUpload, int64(len(data)), int64(len(data)))
	return nil, x.reached(ctx, "received")
}

// reached notes how far the session's records have come.
func (x *exchange) reached(ctx context.Context, hop string) error {
	if x.sess.Records == 0 {
		return nil
	}
	return x.d.write(ctx, func(t *txn) error { return t.reached(x.sess, hop) })
}

// learned notes what the server says of a session.
func (x *exchange) learned(ctx context.Context, st protocol.Status) error {
	switch st.State {
	case "staged", "merged", "replied":
		return x.reached(ctx, "staged")
	}
	return nil
}

// take sorts an error of a call: wait and try again (nil, nil), a refusal of the session, or the end of this sync.
func (x *exchange) take(ctx context.Context, err error, tries int) (*protocol.Error, error) {
	var e *protocol.Error
	if !errors.As(err, &e) {
		if tries >= 2 || ctx.Err() != nil {
			return nil, err
		}
		return nil, pause(ctx, x.d.patience.busy) // the connection may be on its way to another server
	}
	switch e.Code {
	case protocol.CodeBusy, protocol.CodeInternal:
		if tries >= transient {
			return nil, explain("session "+x.sess.token(), e)
		}
		wait := x.d.patience.busy
		if e.Retry > 0 {
			wait = min(time.Duration(e.Retry)*time.Second, x.d.patience.longest)
		}
		return nil, pause(ctx, wait)
	case protocol.CodeBlocked:
		return nil, explain("session "+x.sess.token(), e)
	}
	return e, nil
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// fetch brings the pages into the inbox, each durable before the next is asked for.
func (x *exchange) fetch(ctx context.Context, have inbox) (*protocol.Error, error) {
	var since, asked time.Time                 // since when nothing new has come, and when the server was last asked about it
	again := func() (*protocol.Error, error) { // the server makes the reply again, or refuses: that comes as page 1
		if err := x.clear(ctx, &have); err != nil {
			return nil, err
		}
		return x.put(ctx)
	}
	wait := func() (*protocol.Error, error) {
		now := time.Now()
		if since.IsZero() {
			since, asked = now, now
		}
		if now.Sub(since) > x.d.patience.most {
			return nil, fmt.Errorf("device: %w: no reply to session %s for %s; it stays open, sync again later", ErrUnreachable, x.sess.token(), x.d.patience.most)
		}
		if now.Sub(asked) < x.d.patience.check {
			return nil, nil
		}
		asked = now
		if st, err := x.tr.Status(ctx, x.sess.token()); err == nil && x.arrived(st) && st.State != "replied" {
			return nil, x.learned(ctx, st) // it is being worked on
		}
		return again() // not there, or its pages have expired
	}
	tries, others := 0, 0
	for {
		x.progress(StageWait, int64(have.pages), 0)
		p, err := x.tr.Get(ctx, x.sess.token(), have.pages+1)
		var e *protocol.Error
		switch {
		case errors.As(err, &e) && e.Code == protocol.CodePending:
			if refusal, err := wait(); refusal != nil || err != nil {
				return refusal, err
			}
			if err := pause(ctx, x.d.patience.poll); err != nil {
				return nil, err
			}
			continue
		case errors.As(err, &e) && e.Code == protocol.CodeNotFound:
			// The reply expired or was lost: the server composes it again when it sees the request again.
			if tries++; tries >= transient {
				return nil, explain("session "+x.sess.token(), e)
			}
			if refusal, err := again(); refusal != nil || err != nil {
				return refusal, err
			}
			continue
		case err != nil:
			tries++
			if refusal, err := x.take(ctx, err, tries); refusal != nil || err != nil {
				return refusal, err
			}
			continue
		}
		page, err := p.page(x.d.opts.Limits)
		if err != nil {
			return nil, fmt.Errorf("device: %w", err)
		}
		if err := x.sess.ours(page); err != nil {
			// An older reply under the same name, or one to a copy of this file (rule D7). Ours will take its place; if the
			// copy's has taken ours, the server makes it again when it sees the request again.
			if others++; others%4 == 2 {
				if refusal, err := again(); refusal != nil || err != nil {
					return refusal, err
				}
			}
			if refusal, err := wait(); refusal != nil || err != nil {
				return refusal, err
			}
			if err := pause(ctx, x.d.patience.mismatch); err != nil {
				return nil, err
			}
			continue
		}
		if e := page.Error; e != nil {
			if tries++; e.Code != protocol.CodeSeries && e.Code != protocol.CodeSessionOpen || tries >= transient {
				return e, nil
			}
			// The parts did not come together, or another copy of the file is there too: the whole request goes again, in the
			// place of the refusal.
			if e.Retry > 0 {
				if err := pause(ctx, min(time.Duration(e.Retry)*time.Second, x.d.patience.longest)); err != nil {
					return nil, err
				}
			}
			x.d.ack(ctx, x.tr, x.sess)
			if refusal, err := again(); refusal != nil || err != nil {
				return refusal, err
			}
			continue
		}
		if page.Page != have.pages+1 || have.pages > 0 && page.Reply != have.reply {
			// The reply was composed anew while we fetched: its pages do not go with those that we have.
			if have.pages == 0 {
				return nil, fmt.Errorf("device: %w: page %d in the place of page 1", ErrReply, page.Page)
			}
			if err := x.clear(ctx, &have); err != nil {
				return nil, err
			}
			continue
		}
		if err := x.store(ctx, page, p); err != nil {
			return nil, err
		}
		tries, since = 0, time.Time{}
		have = inbox{pages: page.Page, reply: page.Reply, last: page.Last}
		x.rep.Pages++
		x.rep.BytesDown += int64(len(p.Data))
		x.progress(StageDownload, int64(have.pages), 0)
		if have.last {
			return nil, nil
		}
	}
}

func (x *exchange) store(ctx context.Context, page *protocol.Page, p Payload) error {
	return x.d.write(ctx, func(t *txn) error {
		return t.exec(`INSERT INTO _ws_inbox (page, reply, content_type, encoding, verdicts, last, body) VALUES (?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (page) DO UPDATE SET reply = excluded.reply, content_type = excluded.content_type, encoding = excluded.encoding,
			verdicts = excluded.verdicts, last = excluded.last, body = excluded.body`,
			page.Page, page.Reply, p.ContentType, p.Encoding, len(page.Verdicts) > 0, page.Last, p.Data)
	})
}

func (x *exchange) clear(ctx context.Context, have *inbox) error {
	*have = inbox{}
	return x.d.write(ctx, func(t *txn) error { return t.exec(`DELETE FROM _ws_inbox`) })
}
