// Package leader elects one active worker among any number of standbys, by a session-level advisory lock on the mirror.
//
// It promises that a worker runs only after it got the lock and is told to stop when the connection that holds it is
// lost. A worker that does not notice in time may still overlap with its successor for a moment: what it writes must be
// fenced by its own chain (waystage.progress), the lock only keeps the standbys out of each other's way. Capture and
// apply call it.
package leader

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
)

// Class is the first number of the lock; the second is the seat.
const Class = 22356

// Seat is what there is one of.
type Seat int32

// Seats.
const (
	CaptureDown Seat = 1
	ApplyDown   Seat = 2
	CaptureUp   Seat = 3
	ApplyUp     Seat = 4
	Directory   Seat = 5 // publishes files from a directory
)

const (
	retryEvery = time.Second     // a standby asks for the lock this often
	pingEvery  = time.Second     // the holder looks after its connection this often
	pingWithin = 5 * time.Second // and gives it up when it does not answer
	silentMost = "30s"           // a holder that is not heard for so long (its process is paused) loses the seat at the server
)

// Hold waits for the seat, runs work while it is held, and returns what work returned. It starts again when the lock's
// connection is lost, and ends when ctx does. Trouble with the mirror is retried, and logged when it begins.
func Hold(ctx context.Context, mirror string, seat Seat, log *zap.Logger, work func(context.Context) error) error {
	if log == nil {
		log = zap.NewNop()
	}
	troubled := false
	for {
		conn, err := take(ctx, mirror, seat)
		switch {
		case err != nil && ctx.Err() == nil && !troubled:
			troubled = true
			log.Warn("cannot ask the mirror for the leader lock; retrying", zap.Int32("seat", int32(seat)), zap.Error(err))
		case err == nil:
			troubled = false
		}
		if conn != nil {
			lost, err := serve(ctx, conn, work)
			if !lost || ctx.Err() != nil {
				return err
			}
			log.Warn("lost the connection that held the leader lock", zap.Int32("seat", int32(seat)))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retryEvery):
		}
	}
}

// take returns a connection that holds the lock, or nil if another one holds it.
func take(ctx context.Context, mirror string, seat Seat) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(mirror)
	if err != nil {
		return nil, fmt.Errorf("mirror connection string: %w", err)
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 10 * time.Second
	}
	// The server must notice a dead holder soon, or the standbys wait for nothing.
	for k, v := range map[string]string{
		"application_name": fmt.Sprintf("waystage leader %d", seat), "idle_session_timeout": silentMost,
		"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "3",
	} {
		cfg.RuntimeParams[k] = v
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	var got bool
	if err := conn.QueryRow(ctx, "SELECT pg_try_advisory_lock($1, $2)", Class, int32(seat)).Scan(&got); err != nil || !got {
		release(conn)
		return nil, err
	}
	return conn, nil
}

func release(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), pingWithin)
	defer cancel()
	_ = conn.Close(ctx) // closing is what frees the lock; an error means that it is gone already
}

// serve runs work until it returns or the connection is lost.
func serve(ctx context.Context, conn *pgx.Conn, work func(context.Context) error) (lost bool, err error) {
	defer release(conn)
	wctx, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- work(wctx) }()
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			return lost && errors.Is(err, context.Canceled), err
		case <-tick.C:
			if lost {
				continue
			}
			pctx, cancel := context.WithTimeout(wctx, pingWithin)
			if err := conn.Ping(pctx); err != nil && ctx.Err() == nil {
				lost = true
				stop()
			}
			cancel()
		}
	}
}
