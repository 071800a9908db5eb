package queue

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Streams of account APP.
const (
	StreamIn   = "WS_IN"      // what devices sent: sync.in.<user>.<device>.<session>.<i>-<k>
	StreamOut  = "WS_OUT"     // reply pages: sync.out.<user>.<device>.<session>.<page>
	StreamDead = "WS_DLQ"     // parts that no stage could handle, with the reason
	StreamDown = "WS_CD_DOWN" // change data source -> mirror
	StreamUp   = "WS_CD_UP"   // change data mirror -> source
	StreamFile = "WS_FILES"   // chunks of files: sync.file.<sha256 of the chunk>
)

// Directions of change data.
const (
	Down = "down" // source -> mirror
	Up   = "up"   // mirror -> source
)

var directions = []string{Down, Up}

const (
	intakeConsumer = "intake"
	publishTimeout = 10 * time.Second // an asynchronous publish whose answer was lost fails then
	callTimeout    = 5 * time.Second  // and any other call

	// dedupe is how long the input recognises a part that was sent twice. It only has to cover a retry after a lost
	// receipt. A part that it recognises and does not have any more is stored again: see shift.again.
	dedupe = time.Minute
)

func inSubject(user, device, session, part string) string {
	return "sync.in." + user + "." + device + "." + session + "." + part
}

func outSubject(user, device, session string, page int) string {
	return "sync.out." + user + "." + device + "." + session + "." + strconv.Itoa(page)
}

func readySubject(user, device, session string) string {
	return "ws.ready." + user + "." + device + "." + session
}

func changeStream(direction string) (stream, subject string, err error) {
	switch direction {
	case Down:
		return StreamDown, "cd.down", nil
	case Up:
		return StreamUp, "cd.up", nil
	}
	return "", "", fmt.Errorf("queue: %q is not a direction of change data", direction)
}

func (q *Queue) streams() []jetstream.StreamConfig {
	all := []jetstream.StreamConfig{
		{
			Name: StreamIn, Subjects: []string{"sync.in.*.*.*.*"}, Description: "requests of devices, to be taken by intake",
			Retention: jetstream.WorkQueuePolicy, Discard: jetstream.DiscardNew, MaxBytes: q.cfg.InputBytes, Duplicates: dedupe,
		},
		{
			Name: StreamOut, Subjects: []string{"sync.out.*.*.*.*"}, Description: "reply pages, to be fetched by devices",
			MaxMsgsPerSubject: 1, AllowDirect: true, AllowMsgTTL: true, MaxAge: q.cfg.OutputAge, MaxBytes: q.cfg.OutputBytes,
		},
		{
			Name: StreamDead, Subjects: []string{"sync.dlq.>"}, Description: "parts that could not be handled",
			MaxAge: 90 * 24 * time.Hour, MaxBytes: q.cfg.DeadBytes,
		},
		{
			// A chunk that is stored again takes its own place, with a new time.
			Name: StreamFile, Subjects: []string{"sync.file.*"}, Description: "chunks of files, by their hash",
			Discard: jetstream.DiscardNew, MaxMsgsPerSubject: 1, MaxBytes: q.cfg.FileBytes, AllowDirect: true,
		},
	}
	for _, dir := range directions {
		name, subject, _ := changeStream(dir)
		all = append(all, jetstream.StreamConfig{
			Name: name, Subjects: []string{subject}, Description: "change data, " + dir,
			Discard: jetstream.DiscardNew, MaxBytes: q.cfg.ChangeBytes, AllowDirect: true,
		})
	}
	for i := range all {
		all[i].Storage = jetstream.FileStorage
		all[i].Replicas = q.cfg.Replicas
	}
	return all
}

// ensure makes the streams and the intake consumer, or changes them to what they should be.
func (q *Queue) ensure(ctx context.Context) error {
	q.healing.Lock()
	defer q.healing.Unlock()
	made := map[string]jetstream.Stream{}
	for _, cfg := range q.streams() {
		s, err := q.js.CreateOrUpdateStream(ctx, cfg)
		if err != nil {
			return fmt.Errorf("stream %s: %w", cfg.Name, err)
		}
		made[cfg.Name] = s
	}
	cons, err := q.js.CreateOrUpdateConsumer(ctx, StreamIn, jetstream.ConsumerConfig{
		Durable:   intakeConsumer,
		AckPolicy: jetstream.AckExplicitPolicy,
		AckWait:   q.cfg.AckWait,
		// Never given up by the queue: after MaxDeliver a message would stay in a work queue for ever, unseen. Intake
		// counts deliveries and dead-letters by itself.
		MaxDeliver:    -1,
		MaxAckPending: 20_000, // incomplete series are held unacknowledged
		Replicas:      q.cfg.Replicas,
	})
	if err != nil {
		return fmt.Errorf("consumer %s of stream %s: %w", intakeConsumer, StreamIn, err)
	}
	q.mu.Lock()
	q.intake, q.handles = cons, made
	q.mu.Unlock()
	return nil
}

// stream is a stream's handle, which is asked of the broker once: it stays good when the stream is made again.
func (q *Queue) stream(ctx context.Context, name string) (jetstream.Stream, error) {
	q.mu.Lock()
	s := q.handles[name]
	q.mu.Unlock()
	if s != nil {
		return s, nil
	}
	return q.js.Stream(ctx, name)
}

// isFull tells whether a bounded stream refused a message.
func isFull(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && api.ErrorCode == errCodeStreamStoreFailed
}

// Error codes of the JetStream API that nats.go does not name.
const (
	errCodeWrongLastSequence jetstream.ErrorCode = 10071
	errCodeStreamStoreFailed jetstream.ErrorCode = 10077 // "maximum messages/bytes exceeded" among others
)

// Depth is what waits in the queues now.
type Depth struct {
	Input  StreamDepth `json:"input"`
	Output StreamDepth `json:"output"`
	Dead   StreamDepth `json:"dead"`
	Down   StreamDepth `json:"down"`
	Up     StreamDepth `json:"up"`
	Files  StreamDepth `json:"files"`

	// Of the intake consumer.
	Undelivered uint64 `json:"undelivered"` // parts that no stage has seen
	Unacked     int    `json:"unacked"`     // parts that a stage holds
	Redelivered int    `json:"redelivered"` // of these, those that were delivered before
}

// StreamDepth is the content of one stream.
type StreamDepth struct {
	Messages uint64    `json:"messages"`
	Bytes    uint64    `json:"bytes"`
	Oldest   time.Time `json:"oldest,omitzero"` // when the first stored message came; zero: empty
}

// Depth asks the broker for the figures, for metrics.
func (q *Queue) Depth(ctx context.Context) (Depth, error) {
	var d Depth
	ctx, cancel := bounded(ctx)
	defer cancel()
	for name, into := range map[string]*StreamDepth{StreamIn: &d.Input, StreamOut: &d.Output, StreamDead: &d.Dead, StreamDown: &d.Down, StreamUp: &d.Up, StreamFile: &d.Files} {
		s, err := q.js.Stream(ctx, name)
		if err != nil {
			return Depth{}, fmt.Errorf("queue: depth of %s: %w", name, err)
		}
		st := s.CachedInfo().State
		*into = StreamDepth{Messages: st.Msgs, Bytes: st.Bytes}
		if st.Msgs > 0 {
			into.Oldest = st.FirstTime
		}
	}
	c, err := q.js.Consumer(ctx, StreamIn, intakeConsumer)
	if err != nil {
		return Depth{}, fmt.Errorf("queue: depth of consumer %s: %w", intakeConsumer, err)
	}
	info := c.CachedInfo()
	d.Undelivered, d.Unacked, d.Redelivered = info.NumPending, info.NumAckPending, info.NumRedelivered
	return d, nil
}
