package apply

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/leader"
	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/schema"
)

const (
	backoffFirst = 100 * time.Millisecond
	backoffMost  = 10 * time.Second
	readAhead    = 32 // messages fetched before they are needed
	purgeEvery   = 500 * time.Millisecond
	worked       = 5 * time.Second       // a session that lasted this long begins the back-off anew
	flowing      = 20 * time.Millisecond // a batch that follows its predecessor so soon waits for company
)

// errRead means that the reader of change data failed: the broker was away, or capture has emptied the stream.
var errRead = errors.New("read change data")

// errFenced means that another worker has moved the chain: this one's view is out of date.
var errFenced = errors.New("another worker has moved the chain")

// lead runs sessions while the seat is held. What can be mended by trying again is tried again, whatever it takes.
func lead(ctx context.Context, mirror string, seat leader.Seat, log *zap.Logger, st *state, session func(context.Context) error) error {
	st.set("standby", nil)
	defer st.set("stopped", nil)
	return leader.Hold(ctx, mirror, seat, log, func(ctx context.Context) error {
		wait := backoffFirst
		for {
			began := time.Now()
			err := session(ctx)
			if ctx.Err() != nil {
				st.set("standby", nil)
				return ctx.Err()
			}
			var own *Error
			if errors.As(err, &own) {
				st.set("failed", err)
				report(ctx, mirror, partOf(seat), own, log)
				return err
			}
			if time.Since(began) > worked {
				wait = backoffFirst
			}
			st.set("waiting", err)
			switch {
			case errors.Is(err, errCut):
				log.Info("capture began a new run; reading on from its beginning")
				wait = backoffFirst
			case errors.Is(err, errLayout):
				log.Info("the layout of the tables has changed; beginning anew with it")
				wait = backoffFirst
			case errors.Is(err, errRead):
				log.Info("reading change data anew", zap.Error(err), zap.Duration("in", wait))
			case pgerr.Class(err) == pgerr.Retryable:
				log.Warn("apply interrupted; trying again", zap.Error(err), zap.Duration("in", wait))
			default:
				log.Error("apply cannot go on; trying again", zap.Error(err), zap.Duration("in", wait))
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

// partOf is a direction's name among the troubles.
func partOf(seat leader.Seat) string {
	if seat == leader.ApplyUp {
		return "apply-up"
	}
	return "apply-down"
}

// connectMirror opens the connection that applies.
func connectMirror(ctx context.Context, dsn, app string) (*pgx.Conn, error) {
	cfg, err := schema.ConnConfig(dsn, app)
	if err != nil {
		return nil, fmt.Errorf("mirror: %w", err)
	}
	schema.ByIndex(cfg)
	cfg.RuntimeParams["idle_in_transaction_session_timeout"] = "10min"
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to the mirror: %w", err)
	}
	if err := takeOver(ctx, conn); err != nil {
		closeConn(conn)
		return nil, err
	}
	return conn, nil
}

func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}

// commit ends a transaction. It is never cancelled: a commit whose answer nobody waited for is worse than a late stop.
func commit(ctx context.Context, tx pgx.Tx) error { return tx.Commit(context.WithoutCancel(ctx)) }

func rollback(tx pgx.Tx) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = tx.Rollback(ctx) // after a commit it says so; after a lost connection there is nothing to roll back
}

// arrival is a message with its place in the queue.
type arrival struct {
	m     change.Message
	place uint64
}

// inbox reads ahead of its user.
type inbox struct {
	ch   chan arrival
	err  error // valid once ch is closed
	stop context.CancelFunc
	done chan struct{}
}

func openInbox(ctx context.Context, q Changes) (*inbox, error) {
	ctx, stop := context.WithCancel(ctx)
	r, err := q.Read(ctx)
	if err != nil {
		stop()
		return nil, fmt.Errorf("%w: %w", errRead, err)
	}
	in := &inbox{ch: make(chan arrival, readAhead), stop: stop, done: make(chan struct{})}
	go func() {
		defer close(in.done)
		defer r.Close()
		defer close(in.ch)
		for {
			m, place, err := r.Next(ctx)
			if err != nil {
				in.err = fmt.Errorf("%w: %w", errRead, err)
				return
			}
			select {
			case in.ch <- arrival{m, place}:
			case <-ctx.Done():
				in.err = ctx.Err()
				return
			}
		}
	}()
	return in, nil
}

func (in *inbox) close() {
	in.stop()
	<-in.done
}

// next waits for a message; a negative wait has no end, zero does not wait. ok is false when none came in time.
func (in *inbox) next(ctx context.Context, wait time.Duration) (a arrival, ok bool, err error) {
	take := func(a arrival, open bool) (arrival, bool, error) {
		if !open {
			return a, false, in.err
		}
		return a, true, nil
	}
	switch {
	case wait < 0:
		select {
		case a, open := <-in.ch:
			return take(a, open)
		case <-ctx.Done():
			return a, false, ctx.Err()
		}
	case wait == 0:
		select {
		case a, open := <-in.ch:
			return take(a, open)
		default:
			return a, false, nil
		}
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case a, open := <-in.ch:
		return take(a, open)
	case <-ctx.Done():
		return a, false, ctx.Err()
	case <-t.C:
		return a, false, nil
	}
}

// purger removes what is applied from the queue, now and then.
type purger struct {
	q    Changes
	log  *zap.Logger
	upTo uint64
	done uint64
	due  time.Time
}

func (p *purger) purge(ctx context.Context, force bool) {
	if p.upTo == p.done || (!force && time.Now().Before(p.due)) {
		return
	}
	p.due = time.Now().Add(purgeEvery)
	if err := p.q.Purge(ctx, p.upTo); err != nil {
		if ctx.Err() == nil {
			p.log.Warn("cannot remove applied change data from the queue; it will be tried again", zap.Error(err))
		}
		return
	}
	p.done = p.upTo
}

// askRewind tells capture that something is missing.
func askRewind(ctx context.Context, conn *pgx.Conn, direction string) error {
	_, err := conn.Exec(ctx, "UPDATE waystage.progress SET rewind = true WHERE direction = $1 AND NOT rewind", direction)
	return err
}
