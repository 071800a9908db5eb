package stages

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// ReplyConfig bounds reply. The zero value of a field takes the default.
type ReplyConfig struct {
	MaxSessions int           // sessions answered from one snapshot (default 64)
	PageSize    int           // bytes of a page before compression, but for one larger row (default 256 KiB)
	MaxPage     int           // bytes of a message that the queue takes (default 1 MiB less 16 KiB for its header)
	WaitSource  time.Duration // how long a session that asked for the source's verdict waits for it (default 5 s)
	Renew       time.Duration // a cursor older than this is renewed even when nothing has changed (default 10 min)
	Hold        time.Duration // how long a session or set that fails by itself is left alone (default 10 s)
}

func (c ReplyConfig) withDefaults() ReplyConfig {
	def(&c.MaxSessions, 64)
	def(&c.PageSize, 256<<10)
	def(&c.MaxPage, 1<<20-16<<10)
	def(&c.WaitSource, 5*time.Second)
	def(&c.Renew, 10*time.Minute)
	def(&c.Hold, 10*time.Second)
	return c
}

// Reply answers merged sessions: what changed in their subsets since their cursors, and their verdicts, from one
// snapshot, as pages in the output queue.
type Reply struct {
	cfg      ReplyConfig
	db       *pgxpool.Pool
	catalogs Catalogs
	output   Output
	log      *zap.Logger
	metrics  *metrics
	held     *held
}

// NewReply makes the stage. catalogs gives the newest catalog.
func NewReply(cfg ReplyConfig, db *pgxpool.Pool, catalogs Catalogs, output Output, log *zap.Logger) *Reply {
	return &Reply{
		cfg: cfg.withDefaults(), db: db, catalogs: catalogs, output: output, log: orNop(log), metrics: newMetrics(StageReply), held: newHeld(),
	}
}

// Metrics are the collectors of the stage.
func (r *Reply) Metrics() []prometheus.Collector { return r.metrics.collectors() }

// Worker makes a worker for a pool.
func (r *Reply) Worker() Worker { return r }

// Batch answers the oldest merged sessions. Those that begin with everything are answered one at a time: their
// snapshot is held long.
func (r *Reply) Batch(_, work context.Context, doing func(string)) (int, error) {
	return byCatalog(work, r.catalogs, func(cat *Catalog) (int, error) { return r.batch(work, cat, doing) })
}

func (r *Reply) batch(work context.Context, cat *Catalog, doing func(string)) (int, error) {
	began := time.Now()
	conn, err := r.db.Acquire(work)
	if err != nil {
		return 0, fmt.Errorf("connect for replies: %w", err)
	}
	defer conn.Release()
	locked, sessions, err := r.claim(work, conn, cat)
	if locked || err != nil {
		defer unlock(conn)
	}
	if err != nil {
		return 0, fmt.Errorf("find sessions to answer: %w", err)
	}
	if len(sessions) == 0 {
		return 0, nil
	}
	doing(fmt.Sprintf("replies to %d sessions, from session %d", len(sessions), sessions[0].id))
	var small []*session
	done := 0
	answer := func(list []*session) error {
		b := &replyBatch{r: r, ctx: work, cat: cat, conn: conn, sessions: list}
		if err := b.run(); err != nil {
			var old *outdated
			if work.Err() == nil && !errors.As(err, &old) {
				r.held.fail(err, b.ids(), r.cfg.Hold)
			}
			return err
		}
		done += len(list)
		return nil
	}
	for _, s := range sessions {
		if s.cursorFrom != "" {
			small = append(small, s)
		}
	}
	var errs []error
	if len(small) > 0 {
		errs = append(errs, answer(small))
	}
	for _, s := range sessions {
		if s.cursorFrom == "" && !conn.Conn().IsClosed() {
			errs = append(errs, answer([]*session{s}))
		}
	}
	r.metrics.count("replied", done)
	r.metrics.batch(done, time.Since(began))
	return done, errors.Join(errs...)
}

// session is one that is to be answered.
type session struct {
	id, deviceID          int64
	user, device          string
	groups                []string
	attributes            string
	token, incarnation    string
	n                     int64
	nonce, set            string
	cursorFrom, schema    string
	contentType, encoding string
	records               int                    // that it carried
	verify                *protocol.Verification // nil: the device knows of none
	asked                 bool                   // the operator wants the set verified
	filesKnown            *protocol.FilesRequest // nil: the device knows of no files
	watching              bool                   // no reply is composed; whether the device knows files shows its cursor
	newKey                bool                   // the operator wants the device to take another key

	built   string          // hash of what the device's application was built for
	builtOf *protocol.Built // nil: everything
	view    *set            // what that leaves of the set; nil: there is no such set

	from     *cursor // nil: everything
	gone     bool    // its set is not the user's any more: verdicts are told, and all rows leave
	refresh  int64   // the last order to send everything that the device and set are under
	tables   []subset
	files    []fileset // none if the device knows no files
	verdicts []protocol.Verdict
	open     bool // verdicts of the session's own records are still to come
	pages    *pages
	cursor   string // of the reply
	renew    bool   // it is a new one
	refusal  *protocol.Error
}

// claim locks sessions for this worker. The locks are of the connection, not of a transaction: a transaction that had
// locked rows would hold back the horizon of all cursors while pages are made.
func (r *Reply) claim(ctx context.Context, conn *pgxpool.Conn, cat *Catalog) (locked bool, sessions []*session, err error) {
	heldSessions, heldSets, one := r.held.now()
	limit := r.cfg.MaxSessions
	if one {
		limit = 1
	}
	rows, err := conn.Query(ctx, openSQL, r.cfg.WaitSource.Seconds(), heldSessions, heldSets, limit)
	if err != nil {
		return false, nil, err
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil || len(ids) == 0 {
		return false, nil, err
	}
	b := &pgx.Batch{}
	// Before the snapshot: who applies new definitions waits for replies by the old ones.
	b.Queue(`SELECT pg_advisory_lock_shared($1, $2::int)`, schema.LayoutLockClass, schema.LayoutLock(cat.layout))
	// Looked at again, now that they are locked: another worker may have answered them.
	b.Queue(sessionsSQL, ids).Query(func(rows pgx.Rows) (err error) {
		sessions, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (*session, error) {
			s := &session{}
			return s, row.Scan(&s.id, &s.deviceID, &s.user, &s.device, &s.groups, &s.attributes, &s.token, &s.incarnation, &s.n, &s.nonce, &s.set,
				&s.cursorFrom, &s.schema, &s.contentType, &s.encoding, &s.records, &s.verify, &s.asked, &s.filesKnown, &s.newKey, &s.built, &s.builtOf)
		})
		return err
	})
	err = conn.SendBatch(ctx, b).Close()
	return true, sessions, err
}

// unlock gives the sessions free. If that fails the connection is closed, which does the same.
func unlock(conn *pgxpool.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_unlock_all()`); err != nil {
		_ = conn.Conn().Close(ctx)
	}
}
