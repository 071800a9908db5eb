package capture

import (
	"context"
	"fmt"
	"time"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/sabotage"
)

// run is the state of one session. Its fields belong to read, except for the channels.
//
//	server ──▶ read ──out──▶ publish ──▶ queue
//	             ▲ │
//	     targets │ │ tells
//	             │ ▼
//	            poll ◀──▶ waystage.progress, waystage.meta
type run struct {
	c     *Capture
	ctx   context.Context
	s     *stream
	prog  *progress // poll's while the run lasts
	pos   position
	group *grouper
	told  change.LSN // what the slot may be told at most beyond the target's position: noted in the mirror

	out     chan change.Message
	targets chan change.LSN // poll to read: the target's durable position; the latest only
	tells   chan change.LSN // read to poll: note this position before the slot is told
	noted   chan change.LSN // poll to read: noted

	groupAge  time.Time // when the waiting group got its first transaction
	flushed   time.Time
	statusDue time.Time
	lastFlush change.LSN // what the slot was told last
	asked     bool       // the server wants an answer now
	heard     time.Time  // when the server last sent something, or we had no time to listen
	doubted   bool       // it was silent for long and has been asked to answer
	beatDue   time.Time
	beatWait  time.Duration
}

// read is the session's main loop: the only user of the replication connection.
func (r *run) read() error {
	r.statusDue, r.heard = time.Now(), time.Now()
	r.beat(true)
	for {
		if err := r.ctx.Err(); err != nil {
			return r.leave(err)
		}
		if err := r.chores(); err != nil {
			return err
		}
		wait := readAtMost
		if r.group.pending() {
			wait = flushAfter
		}
		kind, frame, end, reply, err := r.s.next(time.Now().Add(wait))
		if err != nil {
			return err
		}
		if err := r.listen(kind); err != nil {
			return err
		}
		switch kind {
		case gotData:
			waited := r.group.pending()
			if err := r.group.add(frame, &r.pos); err != nil {
				return err
			}
			if !waited && r.group.pending() {
				r.beat(true)
				r.groupAge = time.Now()
			}
		case gotKeepalive:
			r.pos.keepalive(end)
			r.asked = r.asked || reply
			r.c.state.server(end)
			// The server has nothing more to send. If it was quiet before, what we have goes at once.
			if r.group.pending() && time.Since(r.flushed) > quietAfter {
				if err := r.flush(); err != nil {
					return err
				}
			}
		case gotNothing:
			if r.group.pending() {
				if err := r.flush(); err != nil {
					return err
				}
			}
		}
	}
}

// listen notices a connection that is dead without anybody having said so: the server is asked to answer, and then it
// must. Left to the network this would take a quarter of an hour.
func (r *run) listen(kind received) error {
	if kind != gotNothing {
		r.heard, r.doubted = time.Now(), false
		return nil
	}
	switch silent := time.Since(r.heard); {
	case silent > r.c.cfg.Silence:
		return fmt.Errorf("replication stream: the server has not answered for %s", silent.Round(time.Millisecond))
	case silent > r.c.cfg.Silence/2 && !r.doubted:
		r.doubted, r.statusDue = true, time.Time{}
	}
	return nil
}

func (r *run) flush() error {
	r.flushed = time.Now()
	return r.group.flush()
}

// chores is what must happen in time, whatever the stream brings.
func (r *run) chores() error {
	select {
	case lsn := <-r.targets:
		if lsn > r.pos.durable {
			r.beat(true)
		}
		r.pos.target(lsn)
		r.c.state.durable(lsn)
	case lsn := <-r.noted:
		r.told = max(r.told, lsn)
	default:
	}
	now := time.Now()
	if r.group.pending() && now.Sub(r.groupAge) > flushMost {
		if err := r.flush(); err != nil {
			return err
		}
	}
	if r.pos.inFlight() && !r.pos.inTx && !r.group.pending() && now.After(r.beatDue) {
		if err := r.group.heartbeat(); err != nil {
			return err
		}
		r.beat(false)
	}
	flush := r.pos.flush()
	if flush > max(r.pos.durable, r.told) {
		// Log without anything for us. Tell the slot only when it is worth noting: the server waits for it (it may be
		// shutting down), or much log is held back.
		if r.asked || flush-max(r.pos.durable, r.lastFlush) >= r.c.cfg.IdleBytes {
			select {
			case r.tells <- flush:
			default: // being noted
			}
		}
		flush = max(r.pos.durable, min(flush, r.told))
	}
	if r.group.proof != nil { // whether this is the server whose log the target has is not known yet
		flush = r.lastFlush
	}
	if sabotage.On(sabotage.AckEarly) {
		flush = r.pos.received
	}
	if r.asked || flush > r.lastFlush || now.After(r.statusDue) {
		if err := r.s.status(max(r.pos.write(), flush), flush, r.doubted); err != nil {
			return err
		}
		r.lastFlush, r.asked, r.statusDue = flush, false, now.Add(r.s.every)
	}
	return nil
}

// beat plans the next heartbeat; fresh: something has moved.
func (r *run) beat(fresh bool) {
	if fresh {
		r.beatWait = beatFirst
	} else {
		r.beatWait = min(2*r.beatWait, beatMost)
	}
	r.beatDue = time.Now().Add(r.beatWait)
}

// emit hands a message to the publisher; while that is stuck, the server still gets its answers.
func (r *run) emit(m change.Message) error {
	r.c.state.captured(r.pos.sent, r.group.committed)
	select {
	case r.out <- m:
		return nil
	default:
	}
	tick := time.NewTicker(readAtMost)
	defer tick.Stop()
	defer func() { r.heard = time.Now() }() // nobody listened meanwhile
	for {
		select {
		case r.out <- m:
			return nil
		case <-r.ctx.Done():
			return r.ctx.Err()
		case <-tick.C:
			if err := r.stalled(); err != nil {
				return err
			}
		}
	}
}

// stalled is chores without anything that could emit.
func (r *run) stalled() error {
	select {
	case lsn := <-r.targets:
		r.pos.target(lsn)
		r.c.state.durable(lsn)
	default:
	}
	if time.Now().Before(r.statusDue) {
		return nil
	}
	flush := max(r.lastFlush, r.pos.durable)
	if err := r.s.status(max(r.pos.write(), flush), flush, false); err != nil {
		return err
	}
	r.lastFlush, r.statusDue = flush, time.Now().Add(r.s.every)
	return nil
}

// leave tells the slot the latest position before a clean stop, so that nothing is sent twice after it.
func (r *run) leave(cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), 2*time.Second)
	defer cancel()
	prog, err := openProgress(ctx, &r.c.cfg) // the run's own connection may be in the middle of a query
	if err != nil {
		return cause
	}
	defer prog.close()
	lsn, _, err := prog.read(ctx)
	if err != nil {
		return cause
	}
	r.pos.target(lsn)
	flush := max(r.pos.durable, min(r.pos.flush(), r.told), r.lastFlush)
	if r.group.proof == nil {
		_ = r.s.status(max(r.pos.write(), flush), flush, false) // the stream is being left anyway
	}
	return cause
}

// bounded gives a short exchange with the mirror a limit: an answer that takes longer does not come.
func (r *run) bounded(ctx context.Context, exchange func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, r.c.cfg.Silence)
	defer cancel()
	return exchange(ctx)
}

// poll reads the target's position and notes what the slot may be told.
func (r *run) poll(ctx context.Context) error {
	every := pollEvery
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case lsn := <-r.tells:
			if err := r.bounded(ctx, func(ctx context.Context) error { return r.prog.tell(ctx, lsn) }); err != nil {
				return err
			}
			select {
			case r.noted <- lsn:
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		case <-time.After(every):
		}
		var lsn change.LSN
		var rewind bool
		err := r.bounded(ctx, func(ctx context.Context) (err error) { lsn, rewind, err = r.prog.read(ctx); return err })
		if err != nil {
			return err
		}
		if rewind {
			return errRewind
		}
		select { // the latest only
		case <-r.targets:
		default:
		}
		r.targets <- lsn
		every = pollEvery
		if r.c.state.lagging() {
			every = pollFast
		}
	}
}
