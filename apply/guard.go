package apply

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/internal/trouble"
	"github.com/waystage/waystage/schema"
)

// DefaultSilence of UpConfig and DownConfig.
const DefaultSilence = 30 * time.Second

// errSilent ends a session whose server does not answer any more.
var errSilent = errors.New("the server does not answer")

// guard keeps a session from waiting for a server that is gone without a word. The mirror is looked after by the leader's
// seat, which is lost with it; the source by a second connection. Statements end with the context. A commit is not cancelled,
// but it is not waited for without end either: whether it is there, the next session sees.
type guard struct {
	cancel context.CancelCauseFunc
	ctx    context.Context
	over   chan struct{} // the session has ended
	done   chan struct{}
}

// watchOver guards a session's connections until end. source is asked now and then whether it is there; empty: it is not.
func watchOver(ctx context.Context, silence time.Duration, source string, conns ...*pgx.Conn) (context.Context, *guard) {
	ctx, cancel := context.WithCancelCause(ctx)
	g := &guard{cancel: cancel, ctx: ctx, over: make(chan struct{}), done: make(chan struct{})}
	var raw []io.Closer
	for _, c := range conns {
		raw = append(raw, c.PgConn().Conn())
	}
	go func() {
		defer close(g.done)
		if source != "" {
			g.ask(source, silence)
		}
		<-ctx.Done()
		t := time.NewTimer(silence)
		defer t.Stop()
		select {
		case <-g.over:
		case <-t.C: // it still waits for an answer, to a commit
			for _, c := range raw {
				_ = c.Close()
			}
		}
	}()
	return ctx, g
}

// ask returns when the context has ended, which it sees to if the server does not answer.
func (g *guard) ask(dsn string, silence time.Duration) {
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			closeConn(conn)
		}
	}()
	for {
		ctx, cancel := context.WithTimeout(g.ctx, silence/2)
		var err error
		if conn == nil || conn.IsClosed() {
			conn, err = schema.Connect(ctx, dsn, "waystage watch")
		} else {
			err = conn.Ping(ctx)
		}
		late := err != nil && ctx.Err() != nil && g.ctx.Err() == nil
		cancel()
		if late { // any other error the session's own connection has too
			g.cancel(fmt.Errorf("%w: nothing was heard of the source for %s", errSilent, silence/2))
			return
		}
		select {
		case <-g.ctx.Done():
			return
		case <-time.After(silence / 6):
		}
	}
}

// end ends the watch and returns why the session ended: err, unless it was the guard that ended it.
func (g *guard) end(err error) error {
	close(g.over)
	cause := context.Cause(g.ctx)
	g.cancel(nil)
	<-g.done
	if errors.Is(cause, errSilent) {
		return cause
	}
	return err
}

// takeOver ends the connections of a predecessor that did not notice that it lost the seat, and the locks that they hold. Nobody but
// us uses the mirror under this name.
func takeOver(ctx context.Context, mirror *pgx.Conn) error {
	_, err := mirror.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE datname = current_database() AND application_name = current_setting('application_name') AND pid <> pg_backend_pid()`)
	if err != nil && !pgerr.Is(err, "42501") { // another role's: it ends when its server notices
		return fmt.Errorf("end the predecessor's connections: %w", err)
	}
	return nil
}

// report notes in the mirror why the direction stands still.
func report(ctx context.Context, mirror, part string, e *Error, log *zap.Logger) {
	ctx, cancel := context.WithTimeout(ctx, DefaultSilence)
	defer cancel()
	conn, err := schema.Connect(ctx, mirror, "waystage "+part)
	if err == nil {
		err = trouble.Report(ctx, conn, trouble.Trouble{Part: part, Code: string(e.Code), Detail: e.Detail, Remedy: e.Remedy})
		closeConn(conn)
	}
	if err != nil {
		log.Warn("the mirror could not be told why apply stands still", zap.Error(err))
	}
}
