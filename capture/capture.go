// Package capture reads one PostgreSQL server's logical replication stream and relays it, transaction by transaction
// and unopened, into change data.
//
// It promises that the replication slot is never told more than what the target has committed (rule R7), so whatever
// the queue or this process loses is read from the slot again; that the server always gets its keepalive answers, also
// while the queue is full; and that it stops with a named reason when going on would lose changes. It does not promise
// to publish anything only once: apply skips what it has. cmd runs one for each direction, any number of standbys.
package capture

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/leader"
	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/internal/trouble"
	"github.com/waystage/waystage/schema"
)

// Directions.
const (
	Down = "down" // from the source to the mirror
	Up   = "up"   // from the mirror to the source
)

// Defaults of Config.
const (
	DefaultMessageBytes = 256 << 10
	DefaultIdleBytes    = 1 << 20
	DefaultSilence      = time.Minute
)

// Config of a capture. Connection strings may name several hosts.
type Config struct {
	Direction    string // Down or Up
	Server       string // connection string of the captured server: the source for Down, the mirror for Up
	Mirror       string // connection string of the mirror, which has waystage.progress
	Slot         string
	Publication  string
	Queue        Publisher
	Log          *zap.Logger
	MessageBytes int        // a message's body is cut at this size; 0: DefaultMessageBytes
	IdleBytes    change.LSN // log without anything for us is acknowledged when it exceeds this; 0: DefaultIdleBytes

	// A connection on which nothing was heard for so long, although the server was asked to answer, is given up.
	// 0: DefaultSilence.
	Silence time.Duration
}

func (c *Config) application() string { return "waystage capture " + c.Direction }

// part is the capture's name among the troubles.
func (c *Config) part() string { return "capture-" + c.Direction }

func (c *Config) seat() leader.Seat {
	if c.Direction == Up {
		return leader.CaptureUp
	}
	return leader.CaptureDown
}

// Capture of one direction.
type Capture struct {
	cfg   Config
	log   *zap.Logger
	state state
}

// New makes a capture; it connects in Run.
func New(cfg Config) *Capture {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.MessageBytes <= 0 {
		cfg.MessageBytes = DefaultMessageBytes
	}
	if cfg.IdleBytes <= 0 {
		cfg.IdleBytes = DefaultIdleBytes
	}
	if cfg.Silence <= 0 {
		cfg.Silence = DefaultSilence
	}
	return &Capture{cfg: cfg, log: cfg.Log.Named("capture").With(zap.String("direction", cfg.Direction))}
}

// errRewind ends a run because the applier asked for another one.
var errRewind = errors.New("the applier asked to start again")

const (
	pollEvery    = time.Second            // the target's position is read this often
	pollFast     = 100 * time.Millisecond // while something is in flight
	flushAfter   = 2 * time.Millisecond   // a group waits this long for more transactions
	flushMost    = 5 * time.Millisecond   // also while they keep coming
	quietAfter   = 20 * time.Millisecond  // a group that comes after such a pause does not wait
	readAtMost   = 250 * time.Millisecond // so that a stop is noticed
	beatFirst    = 5 * time.Second        // between heartbeats while the target lags and nothing comes
	beatMost     = time.Minute
	backoffFirst = 200 * time.Millisecond
	backoffMost  = 10 * time.Second
	queueDepth   = 16 // messages between the reader and the publisher
)

// Run captures while it holds the direction's seat, and returns ctx's error or an *Error, which an operator must mend.
func (c *Capture) Run(ctx context.Context) error {
	c.state.set("standby", nil)
	defer c.state.set("stopped", nil)
	return leader.Hold(ctx, c.cfg.Mirror, c.cfg.seat(), c.log, func(ctx context.Context) error {
		wait := backoffFirst
		for {
			began := time.Now()
			err := c.session(ctx)
			if ctx.Err() != nil {
				c.state.set("standby", nil)
				return ctx.Err()
			}
			if fatal := c.cfg.fatal(err); fatal != nil {
				c.state.set("failed", fatal)
				c.report(ctx, fatal)
				return fatal
			}
			c.state.set("waiting", err)
			if errors.Is(err, errRewind) || errors.Is(err, errReordered) || errors.Is(err, ErrStreamLost) {
				c.log.Warn("starting a new run from the slot's position", zap.NamedError("reason", err))
			} else {
				c.log.Warn("capture interrupted; trying again", zap.Error(err), zap.Duration("in", wait))
			}
			if pgerr.Is(err, "55006") {
				c.evict(ctx)
			}
			if time.Since(began) > time.Minute {
				wait = backoffFirst
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(wait):
			}
			wait = min(2*wait, backoffMost)
		}
	})
}

// report notes in the mirror why the capture stands still, where every process and the operator can read it.
func (c *Capture) report(ctx context.Context, e *Error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Silence)
	defer cancel()
	conn, err := schema.Connect(ctx, c.cfg.Mirror, c.cfg.application())
	if err == nil {
		err = trouble.Report(ctx, conn, trouble.Trouble{Part: c.cfg.part(), Code: string(e.Code), Detail: e.Detail, Remedy: e.Remedy})
		closePg(conn.PgConn())
	}
	if err != nil {
		c.log.Warn("the mirror could not be told why the capture stands still", zap.Error(err))
	}
}

// evict ends a predecessor's walsender that the server has not given up yet. We hold the seat, so it is nobody's.
func (c *Capture) evict(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := schema.Connect(ctx, c.cfg.Server, c.cfg.application())
	if err != nil {
		return
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	_, err = conn.Exec(ctx, `SELECT pg_terminate_backend(s.active_pid) FROM pg_replication_slots s JOIN pg_stat_activity a ON a.pid = s.active_pid
		WHERE s.slot_name = $1 AND a.application_name = $2`, c.cfg.Slot, c.cfg.application())
	if err != nil {
		c.log.Debug("cannot end the slot's former reader; it will time out", zap.Error(err))
	}
}

// session is one run: from the target's durable position until something breaks.
func (c *Capture) session(ctx context.Context) error {
	c.state.set("connecting", nil)
	// Until the stream runs, every exchange is a short one: a server that does not answer is away.
	begin, cancel := context.WithTimeout(ctx, 2*c.cfg.Silence)
	defer cancel()
	prog, err := openProgress(begin, &c.cfg)
	if err != nil {
		return err
	}
	defer prog.close()
	have, err := prog.standing(begin)
	if err != nil {
		return err
	}
	durable, told := have.position, have.told
	conn, in, h, err := dial(begin, &c.cfg)
	if err != nil {
		return err
	}
	defer closePg(conn) // does nothing once the stream has taken the connection over
	switch {
	case have.system != "" && have.system != h.system:
		return &Error{CodeSystem, fmt.Sprintf("the server's system identifier is %s, the target's position is of %s", h.system, have.system),
			"Connect to the server that was set up, or copy everything anew with `waystage serve --recopy`"}
	case durable > h.flushed:
		return &Error{CodeServerBack, fmt.Sprintf("the target has everything up to %s, but the server's log ends at %s", durable, h.flushed), remedyBack}
	case h.confirmed > max(durable, told):
		return &Error{CodeSlotAhead, fmt.Sprintf("slot %q was moved to %s, the target has everything up to %s only", c.cfg.Slot, h.confirmed, durable), remedyResync}
	}
	if err := sameHistory(begin, conn, have, h); err != nil {
		return err
	}
	if err := prog.belongs(begin, h); err != nil {
		return err
	}
	// What the queue still holds of earlier runs will all be sent again.
	if err := c.cfg.Queue.ResetChanges(ctx); err != nil {
		return fmt.Errorf("reset the change data stream: %w", err)
	}
	begin, cancel = context.WithTimeout(ctx, 2*c.cfg.Silence)
	defer cancel()
	if err := prog.rewound(begin); err != nil {
		return err
	}
	if err := trouble.Clear(begin, prog.conn, c.cfg.part()); err != nil {
		return err
	}
	s, err := start(begin, &c.cfg, conn, in)
	if err != nil {
		return err
	}
	defer s.close()

	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	r := &run{c: c, s: s, prog: prog, pos: newPosition(durable), told: max(told, h.confirmed),
		out: make(chan change.Message, queueDepth), targets: make(chan change.LSN, 1), tells: make(chan change.LSN, 1), noted: make(chan change.LSN, 1)}
	r.group = newGrouper(hex.EncodeToString(id[:]), durable, c.cfg.MessageBytes, r.emit)
	// The server will send the target's last transaction again, unless the slot was told of it: then it is the same server.
	if h.confirmed < durable && have.committed != nil {
		r.group.proof = have.committed
		r.lastFlush = h.confirmed
	}
	c.log.Info("capturing", zap.String("slot", c.cfg.Slot), zap.Stringer("from", durable), zap.String("run", r.group.run), zap.Int32("timeline", h.timeline))
	c.state.begin(r.group.run, durable)

	g, ctx := errgroup.WithContext(ctx)
	r.ctx = ctx
	g.Go(func() error { return r.read() })
	g.Go(func() error { return publish(ctx, c.cfg.Queue, r.out, c.log, c.state.published) })
	g.Go(func() error { return r.poll(ctx) })
	g.Go(func() error { return c.watch(ctx) })
	return g.Wait()
}
