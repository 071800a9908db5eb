package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nats.go/micro"

	"github.com/waystage/waystage/protocol"
)

// PutPage stores one page of a reply, encoded, and returns when the queue has it. A page that is there is replaced.
func (q *Queue) PutPage(ctx context.Context, user, device, session string, page int, contentType, encoding string, data []byte) error {
	return q.StartPage(user, device, session, page, contentType, encoding, data)(ctx)
}

// StartPage begins to store a page, as PutPage does. The queue has it when stored, which must be called, returns without an error.
// Many pages on their way at once cost the broker and the network little more than one.
func (q *Queue) StartPage(user, device, session string, page int, contentType, encoding string, data []byte) (stored func(context.Context) error) {
	failed := func(err error) error {
		q.heal(err)
		return fmt.Errorf("queue: put page %d for %s/%s: %w", page, user, device, err)
	}
	if err := checkNames(user, device, session); err != nil {
		return func(context.Context) error { return err }
	}
	m := &nats.Msg{Subject: outSubject(user, device, session, page), Data: data, Header: contentHeader(contentType, encoding)}
	f, err := q.js.PublishMsgAsync(m)
	if err != nil {
		return func(context.Context) error { return failed(err) }
	}
	return func(ctx context.Context) error {
		ctx, cancel := bounded(ctx)
		defer cancel()
		select {
		case <-f.Ok():
			return nil
		case err := <-f.Err():
			return failed(err)
		case <-ctx.Done():
			return failed(ctx.Err())
		}
	}
}

func contentHeader(contentType, encoding string) nats.Header {
	h := nats.Header{protocol.HeaderContentType: {contentType}}
	if encoding != protocol.Identity {
		h[protocol.HeaderContentEncoding] = []string{encoding}
	}
	return h
}

// mostTold is the largest page that goes along with the news that it is stored.
const mostTold = 8 << 10

// Ready tells the gateways that a reply is complete: held calls are answered, a connected device gets a notice. It may be
// lost; a device asks again by itself. only is the page of a reply that has no other, nil if it is not at hand: a gateway
// that is asked for it then need not look it up.
func (q *Queue) Ready(user, device, session string, pages int, contentType, encoding string, only []byte) error {
	if err := checkNames(user, device, session); err != nil {
		return err
	}
	m := &nats.Msg{Subject: readySubject(user, device, session), Header: nats.Header{}}
	if pages == 1 && len(only) > 0 && len(only) <= mostTold {
		m.Header, m.Data = contentHeader(contentType, encoding), only
	}
	m.Header[headerPages] = []string{strconv.Itoa(pages)}
	if err := q.app.PublishMsg(m); err != nil {
		return fmt.Errorf("queue: ready: %w", err)
	}
	return nil
}

// headerPages says in a ready message how many pages the reply has.
const headerPages = "Ws-Pages"

// Notice is what a connected device hears on its notice subject.
type Notice struct {
	Session string `json:"session"`
	Pages   int    `json:"pages"`
}

// Pages counts the pages of a reply that are stored now.
func (q *Queue) Pages(ctx context.Context, user, device, session string) (int, error) {
	return q.count(ctx, StreamOut, "sync.out."+user+"."+device+"."+session+".*")
}

// Waiting counts the parts of a request that are in the input queue now.
func (q *Queue) Waiting(ctx context.Context, user, device, session string) (int, error) {
	return q.count(ctx, StreamIn, "sync.in."+user+"."+device+"."+session+".*")
}

func (q *Queue) count(ctx context.Context, stream, filter string) (int, error) {
	subjects, err := q.subjects(ctx, stream, filter)
	return len(subjects), err
}

// subjects lists the subjects of a stream's messages that the filter takes, with the number of messages on each.
func (q *Queue) subjects(ctx context.Context, stream, filter string) (map[string]uint64, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	s, err := q.stream(ctx, stream)
	if err != nil {
		return nil, fmt.Errorf("queue: count %s: %w", filter, err)
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(filter))
	if err != nil {
		q.heal(err)
		return nil, fmt.Errorf("queue: count %s: %w", filter, err)
	}
	return info.State.Subjects, nil
}

// PurgePages removes a reply.
func (q *Queue) PurgePages(ctx context.Context, user, device, session string) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	if err := checkNames(user, device, session); err != nil {
		return err
	}
	s, err := q.stream(ctx, StreamOut)
	if err == nil {
		err = s.Purge(ctx, jetstream.WithPurgeSubject("sync.out."+user+"."+device+"."+session+".>"))
	}
	if err != nil {
		return fmt.Errorf("queue: purge pages of %s/%s: %w", user, device, err)
	}
	return nil
}

// errNoPage means that a page is not stored.
var errNoPage = errors.New("queue: no such page")

// page reads one page by its literal subject, without a consumer. In a cluster the nearest replica answers, which may
// not have what was just written: what it does not have is asked of the leader before it counts as missing.
func (q *Queue) page(ctx context.Context, subject string) (*nats.Msg, error) {
	m, err := last(ctx, q.app, StreamOut, subject, q.cfg.Replicas)
	if err != nil && !errors.Is(err, errNoPage) {
		q.heal(err)
	}
	return m, err
}

// last reads the last message of a literal subject.
func last(ctx context.Context, nc *nats.Conn, stream, subject string, replicas int) (*nats.Msg, error) {
	r, err := nc.RequestWithContext(ctx, "$JS.API.DIRECT.GET."+stream+"."+subject, nil)
	if err != nil {
		return nil, fmt.Errorf("queue: read %s: %w", subject, err)
	}
	switch status := r.Header.Get("Status"); {
	case status == "":
		return r, nil
	case status != "404":
		return nil, fmt.Errorf("queue: read %s: the broker says %s %s", subject, status, r.Header.Get("Description"))
	case replicas == 1:
		return nil, errNoPage
	}
	body, err := json.Marshal(map[string]string{"last_by_subj": subject})
	if err != nil {
		return nil, err
	}
	if r, err = nc.RequestWithContext(ctx, "$JS.API.STREAM.MSG.GET."+stream, body); err != nil {
		return nil, fmt.Errorf("queue: read %s from the leader: %w", subject, err)
	}
	var got struct {
		Error   *jetstream.APIError `json:"error"`
		Message struct {
			Header []byte `json:"hdrs"`
			Data   []byte `json:"data"`
		} `json:"message"`
	}
	if err := json.Unmarshal(r.Data, &got); err != nil {
		return nil, fmt.Errorf("queue: read %s from the leader: %w", subject, err)
	}
	if got.Error != nil {
		if got.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound {
			return nil, errNoPage
		}
		return nil, fmt.Errorf("queue: read %s from the leader: %w", subject, got.Error)
	}
	m := &nats.Msg{Data: got.Message.Data, Header: nats.Header{}}
	if len(got.Message.Header) > 0 {
		if m.Header, err = nats.DecodeHeadersMsg(got.Message.Header); err != nil {
			return nil, fmt.Errorf("queue: read %s from the leader: %w", subject, err)
		}
	}
	return m, nil
}

func checkNames(user, device, session string) error {
	if !protocol.ValidName(user) || !protocol.ValidName(device) {
		return fmt.Errorf("queue: %q, %q: not a user and a device", user, device)
	}
	_, _, err := protocol.ParseSession(session)
	return err
}

// Kick wakes the workers of a stage in all processes. It may be lost: a stage also looks for work by itself.
func (q *Queue) Kick(stage string) error {
	if !protocol.ValidName(stage) {
		return fmt.Errorf("queue: %q is not a stage", stage)
	}
	return q.app.Publish("ws.kick."+stage, nil)
}

// Kicked returns a channel that gets something after each Kick of the stage (many may become one), and after each
// reconnect. Call stop when it is no longer needed.
func (q *Queue) Kicked(stage string) (kicks <-chan struct{}, stop func(), err error) {
	return q.listen("ws.kick." + stage)
}

// PoolsChanged tells all processes to look at the pool settings.
func (q *Queue) PoolsChanged() error { return q.app.Publish("ws.pools", nil) }

// WatchPools is Kicked for PoolsChanged.
func (q *Queue) WatchPools() (changes <-chan struct{}, stop func(), err error) {
	return q.listen("ws.pools")
}

func (q *Queue) listen(subject string) (<-chan struct{}, func(), error) {
	ch := make(chan struct{}, 1)
	sub, err := q.app.Subscribe(subject, func(*nats.Msg) { poke(ch) })
	if err != nil {
		return nil, nil, fmt.Errorf("queue: subscribe to %s: %w", subject, err)
	}
	if err := q.app.Flush(); err != nil { // so that no kick after the return is missed
		_ = sub.Unsubscribe()
		return nil, nil, fmt.Errorf("queue: subscribe to %s: %w", subject, err)
	}
	q.mu.Lock()
	q.kicks[ch] = struct{}{}
	q.mu.Unlock()
	return ch, func() {
		q.mu.Lock()
		delete(q.kicks, ch)
		q.mu.Unlock()
		_ = sub.Unsubscribe() // fails only when the connection is closed
	}, nil
}

// Announce makes a stage visible as the NATS micro service "waystage-<stage>" of account APP until stop is called. Each
// ask for its statistics calls stats, whose value must be encodable as JSON.
func (q *Queue) Announce(stage, version string, stats func() any) (stop func(), err error) {
	if !protocol.ValidName(strings.ToLower(stage)) {
		return nil, fmt.Errorf("queue: %q is not a stage", stage)
	}
	svc, err := micro.AddService(q.app, micro.Config{
		Name: "waystage-" + stage, Version: version, Description: "workers of stage " + stage,
		StatsHandler: func(*micro.Endpoint) any { return stats() },
	})
	if err != nil {
		return nil, fmt.Errorf("queue: announce %s: %w", stage, err)
	}
	// Statistics belong to an endpoint: this one answers with the same figures.
	err = svc.AddEndpoint("workers", micro.HandlerFunc(func(r micro.Request) {
		if strings.HasPrefix(r.Reply(), "_INBOX.") {
			_ = r.RespondJSON(stats())
		}
	}), micro.WithEndpointSubject("ws.stage."+stage), micro.WithEndpointQueueGroupDisabled())
	if err != nil {
		_ = svc.Stop()
		return nil, fmt.Errorf("queue: announce %s: %w", stage, err)
	}
	if err := q.app.FlushTimeout(callTimeout); err != nil { // so that who asks after the return is answered
		_ = svc.Stop()
		return nil, fmt.Errorf("queue: announce %s: %w", stage, err)
	}
	return func() { _ = svc.Stop() }, nil
}
