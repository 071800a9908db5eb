package apply

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/leader"
	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/internal/trouble"
	"github.com/waystage/waystage/schema"
)

// codeLocked of the trouble that up reports while somebody holds a row at the source.
const codeLocked Code = "row_locked"

const (
	lookAfter     = time.Second // a source transaction that takes longer is looked after
	lockRetryMost = 5 * time.Second
)

// Blocked says what up waits for at the source.
type Blocked struct {
	Since time.Time `json:"since"`
	Table string    `json:"table,omitempty"` // empty: not a row's lock, or not known
	Key   []string  `json:"key,omitempty"`
	By    []string  `json:"by"` // "pid 123 (user, application, state, transaction since ...)"
}

func (b *Blocked) String() string {
	what := "a lock"
	if b.Table != "" {
		what = fmt.Sprintf("a row of %s (%s)", b.Table, strings.Join(b.Key, ", "))
	}
	return fmt.Sprintf("waits since %s for %s, which is held by %s", b.Since.UTC().Format(time.RFC3339), what, strings.Join(b.By, "; "))
}

// try is tryOnce, again and again while others hold what it needs: a lock that is not given in time, a deadlock, a serialization
// failure. The whole transaction is repeated; nothing is skipped, what comes behind waits in its order. Who is in the way stands in
// Stats, in the metrics and among the mirror's troubles.
func (s *upSession) try(ctx context.Context, list []*upChange, position change.LSN, how manner) (outcome, error) {
	wait := backoffFirst
	w := &lockWatch{s: s, began: time.Now()}
	defer w.over(ctx)
	for {
		stop := w.look(ctx)
		out, err := s.tryOnce(ctx, list, position, how)
		stop()
		if ctx.Err() != nil || s.source.IsClosed() || !pgerr.Is(err, "55P03", "40P01", "40001") {
			return out, err
		}
		s.u.state.with(func(st *Stats) { st.LockRetries++ })
		s.u.log.Warn("the source's locks stood against a transaction; trying again", zap.Error(err), zap.Duration("in", wait))
		select {
		case <-ctx.Done():
			return out, ctx.Err()
		case <-time.After(wait/2 + rand.N(wait)):
		}
		wait = min(2*wait, lockRetryMost)
	}
}

// lockWatch looks after one transaction and its repetitions.
type lockWatch struct {
	s     *upSession
	began time.Time
	told  bool
}

// look begins to look after a transaction that is about to be sent; stop ends it.
func (w *lockWatch) look(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	pid := w.s.source.PgConn().PID()
	t := time.AfterFunc(lookAfter, func() {
		defer close(done)
		w.watch(ctx, pid)
	})
	return func() {
		cancel()
		if !t.Stop() {
			<-done
		}
	}
}

func (w *lockWatch) watch(ctx context.Context, pid uint32) {
	conn, err := schema.Connect(ctx, w.s.u.cfg.Source, "waystage watch")
	if err != nil {
		return // whatever it is, the session's own connection will say it
	}
	defer closeConn(conn)
	for {
		b, err := w.blockers(ctx, conn, pid)
		if err != nil {
			return
		}
		if b != nil {
			w.s.u.state.with(func(st *Stats) { st.Blocked = b })
			if !w.told {
				w.told = true
				w.s.u.log.Warn("somebody's lock at the source is in the way", zap.Stringer("blocked", b))
			}
			report(ctx, w.s.u.cfg.Mirror, partOf(leader.ApplyUp), &Error{codeLocked, b.String(),
				"It goes on by itself when the lock is given free; to end its holder: SELECT pg_terminate_backend(pid) at the source"}, w.s.u.log)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(lookAfter):
		}
	}
}

// blockers finds who keeps a backend waiting, and for which row; nil: nobody.
func (w *lockWatch) blockers(ctx context.Context, conn *pgx.Conn, pid uint32) (*Blocked, error) {
	rows, err := conn.Query(ctx, `SELECT format('pid %s (%s)', b.pid, concat_ws(', ', a.usename, nullif(a.application_name, ''), a.state, 'transaction since ' || to_char(a.xact_start, 'YYYY-MM-DD HH24:MI:SSOF')))
		FROM unnest(pg_blocking_pids($1)) AS b(pid) LEFT JOIN pg_stat_activity AS a ON a.pid = b.pid ORDER BY b.pid`, int32(pid))
	if err != nil {
		return nil, err
	}
	by, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(by) == 0 {
		return nil, err
	}
	b := &Blocked{Since: w.began, By: by}
	// Whoever waits for a row's owner holds the row's place in the queue.
	var table, at string
	err = conn.QueryRow(ctx, `SELECT n.nspname || '.' || c.relname, format('(%s,%s)', l.page, l.tuple) FROM pg_locks AS l
		JOIN pg_class AS c ON c.oid = l.relation JOIN pg_namespace AS n ON n.oid = c.relnamespace
		WHERE l.pid = $1 AND l.locktype = 'tuple' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) LIMIT 1`, int32(pid)).Scan(&table, &at)
	if err != nil {
		return b, nil
	}
	b.Table = table
	if t := w.s.byName[table]; t != nil {
		var keys []string
		for _, i := range t.keys {
			keys = append(keys, schema.Quote(t.Columns[i].Name)+"::text")
		}
		_ = conn.QueryRow(ctx, fmt.Sprintf("SELECT ARRAY[%s]::text[] FROM %s WHERE ctid = $1::text::tid", strings.Join(keys, ", "), t.Ident()), at).Scan(&b.Key) // the table's name says enough
	}
	return b, nil
}

// over takes back what was told.
func (w *lockWatch) over(ctx context.Context) {
	if !w.told {
		return
	}
	w.s.u.state.with(func(st *Stats) { st.Blocked = nil })
	if err := trouble.Clear(ctx, w.s.mirror, partOf(leader.ApplyUp)); err != nil && ctx.Err() == nil {
		w.s.u.log.Warn("the mirror could not be told that apply goes on", zap.Error(err))
	}
}
