// Package queue is everything between the devices and the stages that is NATS: the embedded server, the accounts and
// their permissions, the authentication of devices, the gateway that takes their calls, and the streams.
//
// It promises
//
//   - that identity is the broker's: whatever reaches a stage under "user/device" came over a connection that was
//     authenticated as that device, and nothing a device sends can be stored under, delivered to, or delete what
//     belongs to, another (see gateway.go: devices never touch JetStream);
//   - that what was acknowledged to a device is in the input queue, and stays there until a stage acknowledges it;
//   - that change data is stored in the order in which it was published, without gap or double, or the run ends.
//
// It does not promise that a stored message survives a broken broker: nothing rests on that (the device's outbox, the
// replication slots and the cursors can each make again what a queue lost). Package stages uses the input and output
// side, capture and apply the change data; cmd wires them, starts [Server] when NATS is embedded, and runs [Callout]
// and [Gateway].
package queue

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"
)

// Config of a [Queue]. Zero values mean the defaults.
type Config struct {
	Broker   Broker
	Replicas int // of the streams: 1 (default) or 3 in a cluster

	InputBytes  int64         // what devices sent and no stage has taken yet; full: "busy" (default 512 MiB)
	OutputBytes int64         // reply pages; full: the oldest go and are composed again when asked for (default 1 GiB)
	OutputAge   time.Duration // how long a reply waits for its device (default 7 days)
	ChangeBytes int64         // change data of one direction; full: capture waits (default 512 MiB)
	DeadBytes   int64         // dead letters; full: the oldest go (default 256 MiB)
	FileBytes   int64         // chunks of files; full: no more are taken (default 2 GiB)
	AckWait     time.Duration // how long a stage may hold a part without a sign of life (default 1 minute)
}

func (c *Config) defaults() {
	set(&c.Replicas, 1)
	set(&c.InputBytes, 512<<20)
	set(&c.OutputBytes, 1<<30)
	set(&c.OutputAge, 7*24*time.Hour)
	set(&c.ChangeBytes, 512<<20)
	set(&c.DeadBytes, 256<<20)
	set(&c.FileBytes, 2<<30)
	set(&c.AckWait, time.Minute)
}

func set[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// Queue is the server's side of the streams: a connection to account APP, one to SYS. It is safe for concurrent use and
// reconnects by itself; calls made while the broker is away fail and may be repeated.
type Queue struct {
	cfg Config
	log *zap.Logger

	app, sys *nats.Conn
	js       jetstream.JetStream // everything but change data
	cd       jetstream.JetStream // publishes change data; its window is not shared with the gateway's

	ctx     context.Context // ends in Close
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	writers map[string]*changeWriter

	mu      sync.Mutex
	intake  jetstream.Consumer
	handles map[string]jetstream.Stream
	kicks   map[chan struct{}]struct{} // every Kicked channel, to be poked after a reconnect
	healed  time.Time                  // last attempt to make lost streams again
	healing sync.Mutex
}

// Open connects, makes the streams, and returns when everything stands. It tries again until ctx ends if the broker
// cannot be reached, and gives up at once if it refuses the credentials.
func Open(ctx context.Context, cfg Config, log *zap.Logger) (*Queue, error) {
	if log == nil {
		log = zap.NewNop()
	}
	cfg.defaults()
	q := &Queue{cfg: cfg, log: log.Named("queue"), kicks: map[chan struct{}]struct{}{}, writers: map[string]*changeWriter{}}
	q.ctx, q.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := q.open(ctx); err != nil {
		q.Close()
		return nil, err
	}
	return q, nil
}

func (q *Queue) open(ctx context.Context) (err error) {
	if q.app, err = q.cfg.Broker.connect(ctx, userApp, q.log, q.reconnected); err != nil {
		return err
	}
	if q.sys, err = q.cfg.Broker.connect(ctx, userSys, q.log, nil); err != nil {
		return err
	}
	if q.js, err = jetstream.New(q.app, jetstream.WithPublishAsyncMaxPending(4096), jetstream.WithPublishAsyncTimeout(publishTimeout)); err != nil {
		return err
	}
	if q.cd, err = jetstream.New(q.app, jetstream.WithPublishAsyncMaxPending(4096), jetstream.WithPublishAsyncTimeout(publishTimeout)); err != nil {
		return err
	}
	for {
		try, cancel := bounded(ctx) // a cluster that has no leader yet does not answer at all
		err = q.ensure(try)
		cancel()
		if err == nil {
			break
		}
		var api *jetstream.APIError
		if errors.As(err, &api) && api.Code < 500 && api.ErrorCode != jetstream.JSErrCodeJetStreamNotEnabled {
			return fmt.Errorf("queue: make the streams: %w", err) // it will say the same the next time
		}
		q.log.Info("the streams cannot be made yet; trying again", zap.Error(err))
		if !sleep(ctx, 500*time.Millisecond) {
			return fmt.Errorf("queue: make the streams: %w", err)
		}
	}
	for _, dir := range directions {
		w := newChangeWriter(q, dir)
		q.writers[dir] = w
		q.wg.Go(w.run)
	}
	return nil
}

// Close ends all of the queue's own work and its connections, and waits for them.
func (q *Queue) Close() {
	q.mu.Lock()
	q.cancel() // under the lock: nothing more starts
	q.mu.Unlock()
	q.wg.Wait()
	closeConn(q.app)
	closeConn(q.sys)
}

// Connected tells whether the broker can be reached now.
func (q *Queue) Connected() bool { return q.app.IsConnected() }

// reconnected wakes whoever waits for a kick, since kicks may have been lost meanwhile, and looks after the streams,
// since this may be a broker whose store was lost.
func (q *Queue) reconnected() {
	q.mu.Lock()
	for ch := range q.kicks {
		poke(ch)
	}
	q.mu.Unlock()
	q.heal(nil)
}

// heal makes lost streams again if err may come from a lost stream (nil: look in any case), at most once a second.
func (q *Queue) heal(err error) {
	if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) && !errors.Is(err, jetstream.ErrConsumerNotFound) &&
		!errors.Is(err, jetstream.ErrConsumerDeleted) && !errors.Is(err, jetstream.ErrNoStreamResponse) && !errors.Is(err, nats.ErrNoResponders) {
		return
	}
	q.mu.Lock()
	due := time.Since(q.healed) > time.Second && q.ctx.Err() == nil
	if due {
		q.healed = time.Now()
		q.wg.Add(1)
	}
	q.mu.Unlock()
	if !due {
		return
	}
	go func() {
		defer q.wg.Done()
		ctx, cancel := bounded(q.ctx)
		defer cancel()
		if err := q.ensure(ctx); err != nil && q.ctx.Err() == nil {
			q.log.Warn("the streams cannot be looked after; trying again", zap.Error(err))
		}
	}()
}

// signal is given once, however often.
type signal struct {
	c    chan struct{}
	once *sync.Once
}

func newSignal() signal { return signal{make(chan struct{}), new(sync.Once)} }

func (s signal) give() { s.once.Do(func() { close(s.c) }) }

func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default: // a poke waits already
	}
}

// sleep reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// bounded gives one exchange with the broker a limit: an answer that was lost does not come later.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, callTimeout)
}

// tasks are goroutines that are waited for; none starts once that has begun.
type tasks struct {
	mu   sync.Mutex
	over bool
	wg   sync.WaitGroup
}

// run starts f, unless it is too late.
func (t *tasks) run(f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.over {
		t.wg.Go(f)
	}
	return !t.over
}

func (t *tasks) wait() {
	t.mu.Lock()
	t.over = true
	t.mu.Unlock()
	t.wg.Wait()
}
