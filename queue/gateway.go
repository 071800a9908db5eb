package queue

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nats.go/micro"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// MaxPart is the largest part of a request that the gateway takes, in bytes.
const MaxPart = 512 << 10

// StatusSource tells how far a session of this device has come. State "unknown" makes the gateway look in the input queue.
type StatusSource func(ctx context.Context, user, device, session string) (protocol.Status, error)

// Enroller gives a device its key; with a token in the request, for that token. An error with a method ErrorCode() protocol.Code is
// told to the device.
type Enroller func(ctx context.Context, user, device string, req protocol.Enrolment) (protocol.Enrolled, error)

// GatewayConfig of a [Gateway]. Zero values mean the defaults.
type GatewayConfig struct {
	Hold        time.Duration // how long a get waits for its page (default 5 seconds)
	MaxHeld     int           // gets and watches waiting at the same time, over all devices (default 20,000)
	MaxStoring  int           // puts waiting for the input queue at the same time (default 2,048)
	CallsPerSec float64       // of one device on average (default 200); a user's devices together may have four times each of these limits
	CallBurst   int           // and at once (default 500)
	BytesPerSec float64       // that one device may put on average (default 4 MiB)
	BytesBurst  int           // and at once (default 32 MiB; at least MaxPart)

	// News waits until a sync would bring the device something, or ctx ends; nil: devices are told to ask again.
	News      func(ctx context.Context, user, device string, ask protocol.Watch) []string
	HoldWatch time.Duration // how long a watch waits for news (default 30 seconds)
	// Check tells at once for which sets a session would bring something; nil: for all that are asked for.
	Check func(ctx context.Context, user, device string, ask protocol.Watch) ([]string, error)

	// Rotate notes the key that a device will log in with from now on; errors as those of [Enroller]. nil: keys do not change.
	Rotate func(ctx context.Context, user, device string, req protocol.Rotation) error

	// Bandwidth is how many bytes per second each device of a user may send and receive; 0: no more is known than the limits
	// above. It is asked now and then; an error is logged, and what it said before holds.
	Bandwidth func(ctx context.Context, user string) (int64, error)

	// Applied hears that a device has applied the reply to a session, before its pages are removed; nil: nobody.
	Applied func(ctx context.Context, user, device, session string) error
	Files   Files // nil: there are none
}

// Gateway takes the calls of devices: it is the only thing between them and the streams. It runs as a NATS micro service
// in the devices' account, any number of times, in any process; each call goes to one of them.
//
// Identity is in the subject of a call, which the broker has checked against the login. What the broker does not check is
// the subject of the answer: an answer published to a subject that the device chose would be published with the
// gateway's rights. So the gateway answers into the inbox of that very device only and stays silent otherwise, and the
// broker lets the gateway's connection publish to device inboxes only. Headers of devices go no further.
type Gateway struct {
	cfg    GatewayConfig
	q      *Queue
	status StatusSource
	enrol  Enroller
	log    *zap.Logger
	rates  *rates
	ready  signal
	counts struct {
		puts, gets, acks, statuses, enrols, watches, files, refused, silent, held atomic.Int64
	}
}

// NewGateway makes one. It does no I/O.
func NewGateway(q *Queue, cfg GatewayConfig, enrol Enroller, status StatusSource, log *zap.Logger) *Gateway {
	if log == nil {
		log = zap.NewNop()
	}
	set(&cfg.Hold, 5*time.Second)
	set(&cfg.HoldWatch, 30*time.Second)
	set(&cfg.MaxHeld, 20_000)
	set(&cfg.MaxStoring, 2048)
	set(&cfg.CallsPerSec, 200)
	set(&cfg.CallBurst, 500)
	set(&cfg.BytesPerSec, 4<<20)
	set(&cfg.BytesBurst, 32<<20)
	cfg.BytesBurst = max(cfg.BytesBurst, MaxPart)
	return &Gateway{cfg: cfg, q: q, status: status, enrol: enrol, log: log.Named("gateway"), rates: newRates(cfg), ready: newSignal()}
}

// GatewayStats counts calls since the start, over all runs of one Gateway.
type GatewayStats struct {
	Puts     int64 `json:"puts"`
	Gets     int64 `json:"gets"`
	Acks     int64 `json:"acks"`
	Statuses int64 `json:"statuses"`
	Enrols   int64 `json:"enrols"`
	Watches  int64 `json:"watches"`
	Files    int64 `json:"files"`
	Refused  int64 `json:"refused"` // answered with an error other than pending
	Silent   int64 `json:"silent"`  // not answered: an attack or a broken client
	Held     int64 `json:"held"`    // gets and watches that wait now
}

// Stats are the counts now.
func (g *Gateway) Stats() GatewayStats {
	c := &g.counts
	return GatewayStats{
		Puts: c.puts.Load(), Gets: c.gets.Load(), Acks: c.acks.Load(), Statuses: c.statuses.Load(), Enrols: c.enrols.Load(),
		Watches: c.watches.Load(), Files: c.files.Load(), Refused: c.refused.Load(), Silent: c.silent.Load(), Held: c.held.Load(),
	}
}

// shift is one run of a gateway.
type shift struct {
	*Gateway
	ctx     context.Context // ends when the run shall end
	work    tasks
	storing chan struct{} // puts on their way to the input queue
	doing   chan struct{} // calls that wait for a database or a purge
	filing  filing        // calls about files
	applied chan reply    // whose pages are to be removed

	mu      sync.Mutex
	waiting map[string][]chan *nats.Msg // by ready subject: held gets
	sent    map[string]time.Time        // by ready subject: requests that this gateway has put and heard no reply of
	swept   time.Time                   // when sent was last cleared of old ones
}

// Run serves until ctx ends, then answers the calls that it has taken. It may run several times at once.
func (g *Gateway) Run(ctx context.Context) error {
	s := &shift{Gateway: g, ctx: ctx, storing: make(chan struct{}, g.cfg.MaxStoring),
		doing: make(chan struct{}, maxDoing), filing: filing{of: map[string]int{}}, applied: make(chan reply, maxApplied), waiting: map[string][]chan *nats.Msg{}, sent: map[string]time.Time{}}
	err := s.serve()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (s *shift) serve() error {
	broker := &s.q.cfg.Broker
	devices, err := broker.connect(s.ctx, userGateway, s.log, nil)
	if err != nil {
		return err
	}
	defer closeConn(devices)
	notices, err := broker.connect(s.ctx, userNotify, s.log, nil)
	if err != nil {
		return err
	}
	defer closeConn(notices)

	// Each gateway wakes its own held gets; one of them all forwards the notice.
	wake, err := s.q.app.Subscribe("ws.ready.>", s.wake)
	if err != nil {
		return fmt.Errorf("queue: gateway: %w", err)
	}
	defer func() { _ = wake.Unsubscribe() }()
	forward, err := s.q.app.QueueSubscribe("ws.ready.*.*.*", "notify", func(m *nats.Msg) {
		t := strings.Split(m.Subject, ".")
		pages, _ := strconv.Atoi(m.Header.Get(headerPages)) // of our own making
		body, err := json.Marshal(Notice{Session: t[4], Pages: pages})
		if err == nil {
			err = notices.Publish(protocol.NoticeSubject(t[2], t[3]), body)
		}
		if err != nil {
			s.log.Debug("a notice was not sent", zap.String("subject", m.Subject), zap.Error(err))
		}
	})
	if err != nil {
		return fmt.Errorf("queue: gateway: %w", err)
	}
	defer func() { _ = forward.Unsubscribe() }()

	s.work.run(s.remove)
	// Deferred calls run backwards: no more calls are taken, those taken are answered, then the connections close.
	defer s.work.wait()
	svc, err := micro.AddService(devices, micro.Config{
		Name: "waystage-gateway", Version: "1.0.0", Description: "takes the calls of devices", QueueGroup: "gw",
		StatsHandler: func(*micro.Endpoint) any { return s.Stats() },
		ErrorHandler: func(_ micro.Service, err *micro.NATSError) {
			s.log.Error("the broker reports", zap.String("subject", err.Subject), zap.String("error", err.Description))
		},
	})
	if err != nil {
		return fmt.Errorf("queue: gateway: %w", err)
	}
	defer func() { _ = svc.Stop() }()
	type endpoint struct {
		verb, tokens string
		handle       func(*call)
	}
	ofSession := []endpoint{
		{protocol.VerbPut, ".*.*", s.put},
		{protocol.VerbGet, ".*.*", s.get},
		{protocol.VerbAck, ".*", s.ack},
		{protocol.VerbStatus, ".*", s.tell},
	}
	others := []endpoint{{protocol.VerbEnrol, "", s.enter}, {protocol.VerbWatch, "", s.watch}, {protocol.VerbRedeem, "", s.redeem}, {protocol.VerbRotate, "", s.rotate}}
	if s.cfg.Files != nil {
		others = append(others, endpoint{protocol.VerbFileGet, ".*.*", s.fileGet}, endpoint{protocol.VerbFileOffer, ".*", s.fileOffer},
			endpoint{protocol.VerbFilePut, ".*.*", s.filePut}, endpoint{protocol.VerbFileCommit, ".*", s.fileCommit})
	}
	for i, e := range append(ofSession, others...) {
		handler := micro.HandlerFunc(func(r micro.Request) {
			if c := s.accept(r, i < len(ofSession)); c != nil {
				e.handle(c)
			}
		})
		if err := svc.AddEndpoint(e.verb, handler, micro.WithEndpointSubject("rq.*.*."+e.verb+e.tokens)); err != nil {
			return fmt.Errorf("queue: gateway: endpoint %s: %w", e.verb, err)
		}
	}
	if err := devices.Flush(); err == nil {
		s.ready.give()
	}
	<-s.ctx.Done()
	return nil
}

// Ready is closed when a run of the gateway takes calls for the first time.
func (g *Gateway) Ready() <-chan struct{} { return g.ready.c }

// call is a device's call that may be answered.
type call struct {
	g            *Gateway
	r            micro.Request
	user, device string
	args         []string // tokens after the verb
}

// accept makes the checks on which everything rests; nil: no answer. session tells that the first token after the verb is one.
func (s *shift) accept(r micro.Request, session bool) *call {
	t := strings.Split(r.Subject(), ".") // rq.<user>.<device>.<verb>...
	if len(t) < 4 || !protocol.ValidName(t[1]) || !protocol.ValidName(t[2]) || !ownInbox(r.Reply(), t[1], t[2]) {
		if n := s.counts.silent.Add(1); n < 100 || n%1000 == 0 { // whoever does this can do it often
			s.log.Warn("a call with a foreign or unusable reply subject gets no answer",
				zap.String("subject", oneLine(r.Subject())), zap.String("reply", oneLine(r.Reply())))
		}
		return nil
	}
	c := &call{g: s.Gateway, r: r, user: t[1], device: t[2], args: t[4:]}
	if !s.rates.call(c.user, c.device) {
		c.refuse(protocol.CodeBusy, 1, "this device calls too often: wait a second")
		return nil
	}
	if session {
		if _, _, err := protocol.ParseSession(c.args[0]); err != nil {
			c.refuseError(err)
			return nil
		}
	}
	return c
}

// ownInbox tells whether reply is a literal subject in the device's inbox.
func ownInbox(reply, user, device string) bool {
	rest, ok := strings.CutPrefix(reply, protocol.InboxPrefix(user, device)+".")
	return ok && rest != "" && !strings.ContainsAny(rest, "*> \t\r\n") && !strings.HasPrefix(rest, ".") &&
		!strings.HasSuffix(rest, ".") && !strings.Contains(rest, "..")
}

func (c *call) answer(v any) {
	if err := c.r.RespondJSON(v); err != nil {
		c.g.log.Debug("an answer was not sent", zap.String("subject", c.r.Subject()), zap.Error(err))
	}
}

// refuse answers with an error, in the form that belongs to the verb. retry is in seconds.
func (c *call) refuse(code protocol.Code, retry int, format string, args ...any) {
	c.refuseWith(&protocol.Error{Code: code, Retry: retry, Message: fmt.Sprintf(format, args...)})
}

func (c *call) refuseWith(e *protocol.Error) {
	if e.Code != protocol.CodePending {
		c.g.counts.refused.Add(1)
	}
	switch strings.SplitN(c.r.Subject(), ".", 5)[3] {
	case protocol.VerbPut:
		c.answer(protocol.Receipt{Error: e})
	case protocol.VerbStatus:
		c.answer(protocol.Status{State: "unknown", Error: e})
	case protocol.VerbFileOffer, protocol.VerbFilePut, protocol.VerbFileCommit:
		c.answer(protocol.FileReceipt{Error: e})
	case protocol.VerbEnrol, protocol.VerbRedeem:
		c.answer(protocol.Enrolled{User: c.user, Device: c.device, Error: e})
	case protocol.VerbWatch:
		c.answer(protocol.News{Sets: []string{}, Error: e})
	case protocol.VerbRotate:
		c.answer(protocol.Rotated{Error: e})
	default:
		err := c.r.RespondJSON(e, micro.WithHeaders(micro.Headers{protocol.HeaderError: {string(e.Code)}}))
		if err != nil {
			c.g.log.Debug("an answer was not sent", zap.String("subject", c.r.Subject()), zap.Error(err))
		}
	}
}

// refuseError answers with the code of a refusal; a failure of the server is logged, and told as one.
func (c *call) refuseError(err error) {
	var e *protocol.Error
	var r coded
	switch {
	case errors.As(err, &e):
		c.refuseWith(e)
	case errors.As(err, &r):
		c.refuse(r.ErrorCode(), 0, "%s", err.Error())
	default:
		c.g.log.Error("a call failed", zap.String("subject", c.r.Subject()), zap.Error(err))
		c.refuse(protocol.CodeInternal, 5, "the server could not do this now: try again later")
	}
}

// put stores one part of a request in the input queue, and answers when it is there.
func (s *shift) put(c *call) {
	s.counts.puts.Add(1)
	contentType, encoding, err := contentOf(c.r.Headers())
	if err != nil {
		c.refuseError(err)
		return
	}
	data := c.r.Data()
	if _, _, err := protocol.ParsePart(c.args[1]); err != nil {
		c.refuseError(err)
		return
	}
	if len(data) > MaxPart {
		c.refuse(protocol.CodeTooBig, 0, "part %s has %d bytes, more than %d: send the request in more parts", c.args[1], len(data), MaxPart)
		return
	}
	if len(data) == 0 {
		c.refuse(protocol.CodeMalformed, 0, "part %s is empty", c.args[1])
		return
	}
	if !s.mayPut(c, len(data)) {
		return
	}
	select {
	case s.storing <- struct{}{}:
	default:
		c.busy(nil)
		return
	}
	m := &nats.Msg{Subject: inSubject(c.user, c.device, c.args[0], c.args[1]), Data: data, Header: contentHeader(contentType, encoding)}
	// Ids are known in the whole stream: the identity in front keeps devices apart. The content is in it because the same
	// part with other bytes is not a retry: intake must see it to refuse it.
	sum := sha256.Sum256(data)
	m.Header.Set(nats.MsgIdHdr, c.user+"/"+c.device+"/"+c.args[0]+"/"+c.args[1]+"/"+hex.EncodeToString(sum[:8]))
	ready := readySubject(c.user, c.device, c.args[0])
	s.putting(ready)
	stored, err := s.q.js.PublishMsgAsync(m, jetstream.WithStallWait(10*time.Millisecond))
	if err != nil {
		<-s.storing
		s.answered(ready)
		c.busy(err)
		return
	}
	if !s.work.run(func() {
		defer func() { <-s.storing }()
		select {
		case a := <-stored.Ok():
			if a.Duplicate {
				s.answered(ready) // maybe long ago
				if a, err = s.again(m, a); err != nil {
					c.busy(err)
					return
				}
			}
			c.answer(protocol.Receipt{Stored: true, Sequence: a.Sequence, Duplicate: a.Duplicate})
		case err := <-stored.Err():
			s.answered(ready)
			c.busy(err)
		}
	}) {
		<-s.storing // too late for an answer: the device asks again
	}
}

// again looks after a part that the queue takes for a retry. If the queue does not have it any more, the device asks again for
// a reply that was lost, or the queue has lost the part: it is stored once more.
func (s *shift) again(m *nats.Msg, a *jetstream.PubAck) (*jetstream.PubAck, error) {
	ctx, cancel := bounded(context.WithoutCancel(s.ctx))
	defer cancel()
	in, err := s.q.stream(ctx, StreamIn)
	if err != nil {
		return nil, err
	}
	switch there, err := in.GetLastMsgForSubject(ctx, m.Subject); {
	case err == nil && bytes.Equal(there.Data, m.Data):
		a.Sequence = there.Sequence
		return a, nil
	case err != nil && !errors.Is(err, jetstream.ErrMsgNotFound):
		return nil, err
	}
	m.Header.Del(nats.MsgIdHdr)
	return s.q.js.PublishMsg(ctx, m)
}

// busy answers a put that could not be stored. Whatever the reason: the device has the request, and tries again.
func (c *call) busy(err error) {
	what := "too many requests at once"
	switch {
	case isFull(err):
		what = "the input queue is full"
	case err != nil:
		what = "the input queue cannot be reached"
		c.g.log.Warn("a part could not be stored", zap.String("subject", c.r.Subject()), zap.Error(err))
		c.g.q.heal(err)
	}
	c.refuse(protocol.CodeBusy, 2, "%s: send the part again after the given time", what)
}

// get answers with a page, and waits for it if it is not there yet.
func (s *shift) get(c *call) {
	s.counts.gets.Add(1)
	n, err := strconv.Atoi(c.args[1])
	if err != nil || n < 1 || strconv.Itoa(n) != c.args[1] {
		c.refuse(protocol.CodeNotFound, 0, "%q is not a page number", oneLine(c.args[1]))
		return
	}
	if s.slowed(c) {
		return
	}
	s.held(c, func() { s.hold(c, n) })
}

// held runs a call that waits, if not too many do.
func (s *shift) held(c *call, wait func()) {
	s.work.run(func() {
		if s.counts.held.Add(1) > int64(s.cfg.MaxHeld) {
			s.counts.held.Add(-1)
			c.refuse(protocol.CodeBusy, 2, "too many calls are waiting: ask again after the given time")
			return
		}
		defer s.counts.held.Add(-1)
		wait()
	})
}

func (s *shift) hold(c *call, page int) {
	subject := outSubject(c.user, c.device, c.args[0], page)
	give := func(m *nats.Msg) {
		h := micro.Headers{protocol.HeaderContentType: {m.Header.Get(protocol.HeaderContentType)}}
		if e := m.Header.Get(protocol.HeaderContentEncoding); e != "" {
			h[protocol.HeaderContentEncoding] = []string{e}
		}
		s.rates.spend(c.user, c.device, len(m.Data))
		if err := c.r.Respond(m.Data, micro.WithHeaders(h)); err != nil {
			s.log.Debug("a page was not sent", zap.String("subject", c.r.Subject()), zap.Error(err))
		}
	}
	end := time.NewTimer(s.cfg.Hold)
	defer end.Stop()
	again := time.NewTicker(s.cfg.Hold/2 + time.Millisecond) // a wake-up may be lost
	defer again.Stop()
	for {
		ready, early, forget := s.await(readySubject(c.user, c.device, c.args[0])) // before looking, so that nothing falls between
		if !early {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), s.cfg.Hold+2*time.Second)
			m, err := s.q.page(ctx, subject)
			cancel()
			if err == nil {
				forget()
				give(m)
				return
			}
			if !errors.Is(err, errNoPage) {
				forget()
				c.refuseError(err)
				return
			}
		}
		select {
		case m := <-ready:
			if page == 1 && len(m.Data) > 0 {
				give(m)
				return
			}
			continue
		case <-again.C:
			forget()
			continue
		case <-end.C:
		case <-s.ctx.Done():
		}
		forget()
		c.refuse(protocol.CodePending, 0, "page %d is not there yet: ask again", page)
		return
	}
}

// await registers a held get. The channel gets the news that the reply is ready; forget takes it back. early tells that the request
// went through this gateway just now and no reply has been heard of: looking for one would be in vain. Should the news have been lost,
// the get looks when it asks again.
func (s *shift) await(subject string) (ready <-chan *nats.Msg, early bool, forget func()) {
	ch := make(chan *nats.Msg, 1)
	s.mu.Lock()
	s.waiting[subject] = append(s.waiting[subject], ch)
	_, early = s.sent[subject]
	delete(s.sent, subject) // the next time it looks
	s.mu.Unlock()
	return ch, early, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		list := s.waiting[subject]
		for i := range list {
			if list[i] == ch {
				list[i] = list[len(list)-1]
				list = list[:len(list)-1]
				break
			}
		}
		if s.waiting[subject] = list; len(list) == 0 {
			delete(s.waiting, subject)
		}
	}
}

// wake tells held gets, each once, that a reply is ready.
func (s *shift) wake(m *nats.Msg) {
	s.mu.Lock()
	list := s.waiting[m.Subject]
	delete(s.waiting, m.Subject)
	delete(s.sent, m.Subject)
	s.mu.Unlock()
	for _, ch := range list {
		ch <- m
	}
}

// putting notes that a request is on its way, before there can be a reply to it.
func (s *shift) putting(subject string) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.swept) > s.cfg.Hold {
		s.swept = now
		maps.DeleteFunc(s.sent, func(_ string, at time.Time) bool { return now.Sub(at) > s.cfg.Hold }) // their devices ask elsewhere, or have gone
	}
	s.sent[subject] = now
}

// answered forgets a request of which there may be a reply.
func (s *shift) answered(subject string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sent, subject)
}

// ack notes that the device has applied a reply.
func (s *shift) ack(c *call) {
	s.counts.acks.Add(1)
	s.do(c, func(ctx context.Context) (any, error) {
		if s.cfg.Applied != nil {
			if err := s.cfg.Applied(ctx, c.user, c.device, c.args[0]); err != nil {
				return nil, err
			}
		}
		select {
		case s.applied <- reply{c.user, c.device, c.args[0]}:
		default: // they take room until they expire
		}
		return map[string]bool{"ok": true}, nil
	})
}

// reply names one.
type reply struct{ user, device, session string }

// maxApplied bounds the replies whose pages wait to be removed.
const maxApplied = 4096

// remove removes the pages of applied replies; no device waits for that.
func (s *shift) remove() {
	for {
		select {
		case r := <-s.applied:
			if err := s.q.PurgePages(s.ctx, r.user, r.device, r.session); err != nil && s.ctx.Err() == nil {
				s.log.Debug("pages of an applied reply were not removed", zap.Error(err))
			}
		case <-s.ctx.Done():
			return
		}
	}
}

// tell answers how far a session has come.
func (s *shift) tell(c *call) {
	s.counts.statuses.Add(1)
	s.do(c, func(ctx context.Context) (any, error) {
		st, err := s.status(ctx, c.user, c.device, c.args[0])
		if err == nil && st.State == "replied" {
			n, err := s.q.Pages(ctx, c.user, c.device, c.args[0])
			if n < st.Pages {
				st.Pages = 0 // acknowledged, expired, or lost with the broker's store
			}
			return st, err
		}
		if err != nil || st.State != "unknown" && st.State != "refused" && st.State != "" {
			return st, err
		}
		n, err := s.q.Waiting(ctx, c.user, c.device, c.args[0])
		switch {
		case n > 0: // it came, or came again after the refusal
			st = protocol.Status{State: "received"}
		case st.State == "":
			st.State = "unknown"
		}
		return st, err
	})
}

// watch answers when a sync would bring something, or after a while.
func (s *shift) watch(c *call) {
	s.counts.watches.Add(1)
	var ask protocol.Watch
	if err := json.Unmarshal(c.r.Data(), &ask); err != nil || len(c.r.Data()) > 64<<10 || len(ask.Sets) > protocol.MaxWatched {
		c.refuse(protocol.CodeMalformed, 0, `a watch is JSON: {"sets": [{"set": "...", "cursor": "..."}]}, with at most %d sets`, protocol.MaxWatched)
		return
	}
	if ask.Now {
		s.do(c, func(ctx context.Context) (_ any, err error) {
			news := protocol.News{Sets: []string{}}
			if s.cfg.Check == nil {
				for _, set := range ask.Sets {
					news.Sets = append(news.Sets, set.Set)
				}
				return news, nil
			}
			sets, err := s.cfg.Check(ctx, c.user, c.device, ask)
			news.Sets = append(news.Sets, sets...)
			return news, err
		})
		return
	}
	s.held(c, func() {
		ctx, cancel := context.WithTimeout(s.ctx, s.cfg.HoldWatch) // ends with the run: the device asks another gateway
		defer cancel()
		var sets []string
		if s.cfg.News != nil {
			sets = s.cfg.News(ctx, c.user, c.device, ask)
		} else {
			<-ctx.Done()
		}
		if sets == nil {
			sets = []string{}
		}
		c.answer(protocol.News{Sets: sets})
	})
}

// maxDoing bounds the calls other than put and get that are worked on at the same time.
const maxDoing = 1024

func (s *shift) do(c *call, f func(context.Context) (any, error)) {
	select {
	case s.doing <- struct{}{}:
	default:
		c.refuse(protocol.CodeBusy, 2, "too many calls at once: try again after the given time")
		return
	}
	s.work.run(func() {
		defer func() { <-s.doing }()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), 5*time.Second)
		defer cancel()
		v, err := f(ctx)
		if err != nil {
			c.refuseError(err)
			return
		}
		c.answer(v)
	})
}

// contentOf reads the two headers that a device may set; all others go no further.
func contentOf(h micro.Headers) (contentType, encoding string, err error) {
	contentType, encoding = h.Get(protocol.HeaderContentType), h.Get(protocol.HeaderContentEncoding)
	if contentType, err = protocol.ContentType(contentType); err != nil {
		return "", "", err
	}
	switch encoding {
	case protocol.Identity, protocol.Zstd, protocol.Gzip:
		return contentType, encoding, nil
	case "identity":
		return contentType, protocol.Identity, nil
	}
	return "", "", &protocol.Error{Code: protocol.CodeContentType,
		Message: fmt.Sprintf("content encoding %q is not known: use zstd, gzip or none", oneLine(encoding))}
}
