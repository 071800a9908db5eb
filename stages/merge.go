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

// MergeConfig bounds merge. The zero value of a field takes the default.
type MergeConfig struct {
	MaxRecords  int           // records of one transaction, but for one larger session (default 5000)
	MaxSessions int           // sessions of one transaction (default 1000)
	Hold        time.Duration // how long a session or set that fails by itself is left alone before the next attempt (default 10 s)
}

func (c MergeConfig) withDefaults() MergeConfig {
	def(&c.MaxRecords, 5000)
	def(&c.MaxSessions, 1000)
	def(&c.Hold, 10*time.Second)
	return c
}

// Merge moves staged sessions into the mirror: verdicts by rule D3, set-based, one transaction for many sessions.
type Merge struct {
	cfg      MergeConfig
	db       *pgxpool.Pool
	catalogs Catalogs
	kick     kicks
	log      *zap.Logger
	metrics  *metrics
	held     *held
}

// NewMerge makes the stage. catalogs gives the newest catalog; kick wakes a stage in all processes.
func NewMerge(cfg MergeConfig, db *pgxpool.Pool, catalogs Catalogs, kick func(stage string), log *zap.Logger) *Merge {
	return &Merge{
		cfg: cfg.withDefaults(), db: db, catalogs: catalogs, kick: kick, log: orNop(log), metrics: newMetrics(StageMerge), held: newHeld(),
	}
}

// Metrics are the collectors of the stage.
func (m *Merge) Metrics() []prometheus.Collector { return m.metrics.collectors() }

// Worker makes a worker for a pool.
func (m *Merge) Worker() Worker { return m }

// Batch merges the oldest staged sessions.
func (m *Merge) Batch(_, work context.Context, doing func(string)) (int, error) {
	return byCatalog(work, m.catalogs, func(cat *Catalog) (int, error) { return m.batch(work, cat, doing) })
}

func (m *Merge) batch(work context.Context, cat *Catalog, doing func(string)) (int, error) {
	began := time.Now()
	b := &mergeBatch{m: m, ctx: work, cat: cat}
	err := b.run(doing)
	if err != nil {
		var old *outdated
		if work.Err() == nil && !errors.As(err, &old) {
			m.held.fail(err, b.ids, m.cfg.Hold)
		}
		return 0, err
	}
	if len(b.ids) == 0 {
		return 0, nil
	}
	m.kick.to(StageReply)
	m.metrics.batch(b.merged+b.rejected, time.Since(began))
	m.metrics.count("merged", len(b.ids))
	m.metrics.records(protocol.Merged, b.merged)
	m.metrics.records(protocol.Rejected, b.rejected)
	for code, n := range b.codes {
		m.metrics.rejected(code, n)
	}
	return len(b.ids), nil
}

// mergeBatch is one transaction of merge.
type mergeBatch struct {
	m   *Merge
	ctx context.Context
	cat *Catalog
	tx  *piped
	bad bool // some claimed records may be refused without looking at their rows

	ids      []int64 // claimed sessions in order
	sessions map[int64]*mergeSession
	stamp    int64 // this transaction
	merged   int
	rejected int
	codes    map[string]int
	judged   []judged // in this pass
}

type mergeSession struct {
	user, attributes, incarnation, set, epoch string
	judgedBy                                  int64 // layout that intake judged by

	seen map[string]int // table and key -> index, within the session
}

func (b *mergeBatch) run(doing func(string)) (err error) {
	if b.tx, err = beginPiped(b.ctx, b.m.db); err != nil {
		return fmt.Errorf("begin merging: %w", err)
	}
	defer b.tx.end()
	records, err := b.claim()
	if err != nil || len(b.ids) == 0 {
		return wrap("claim staged sessions", err)
	}
	doing(fmt.Sprintf("%d records of %d sessions, from session %d", records, len(b.ids), b.ids[0]))
	tables, err := b.lock()
	if err != nil {
		return fmt.Errorf("lock mirror tables: %w", err)
	}
	if err := b.rejudge(); err != nil {
		return fmt.Errorf("judge anew what was staged under other definitions: %w", err)
	}
	for n := 1; ; n++ {
		if err := b.pass(tables); err != nil {
			return err
		}
		falls, err := b.fall()
		if err != nil {
			return err
		}
		if len(falls) == 0 {
			break
		}
		if _, err := b.tx.Exec(b.ctx, "ROLLBACK TO SAVEPOINT ws_pass"); err != nil {
			return fmt.Errorf("undo a pass: %w", err)
		}
		if err := b.mark(falls); err != nil {
			return err
		}
		if _, err := b.tx.Exec(b.ctx, "SAVEPOINT ws_pass"); err != nil {
			return fmt.Errorf("begin a pass: %w", err)
		}
		if n%passesOfAll == 0 && len(b.ids) > 1 { // falls hang on falls: fewer sessions at a time
			b.ids = b.ids[:len(b.ids)/2]
		}
	}
	if err := b.finish(); err != nil {
		return fmt.Errorf("finish merging: %w", err)
	}
	return nil
}

// passesOfAll is after how many passes the batch is halved; what is left out stays staged for the next.
const passesOfAll = 4

func wrap(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// claim takes sessions.
func (b *mergeBatch) claim() (records int, err error) {
	sessions, sets, one := b.m.held.now()
	limit := b.m.cfg.MaxSessions
	if one {
		limit = 1
	}
	b.sessions = map[int64]*mergeSession{}
	q := &pgx.Batch{}
	q.Queue(claimSQL, b.m.cfg.MaxRecords, sessions, sets, limit).Query(func(rows pgx.Rows) error {
		var id int64
		var n int
		var s mergeSession
		_, err := pgx.ForEachRow(rows, []any{&id, &s.user, &s.attributes, &s.incarnation, &s.set, &s.epoch, &s.judgedBy, &n}, func() error {
			c := s
			b.ids, b.sessions[id] = append(b.ids, id), &c
			records += n
			return nil
		})
		return err
	})
	err = b.tx.send(b.ctx, q)
	return records, err
}

func (b *mergeBatch) lock() (tables []int, err error) {
	q := &pgx.Batch{}
	q.Queue(`SELECT pg_advisory_xact_lock_shared($1, $2::int)`, schema.LayoutLockClass, schema.LayoutLock(b.cat.layout))
	q.Queue(`SELECT pg_current_xact_id()::text::bigint`).QueryRow(func(row pgx.Row) error { return row.Scan(&b.stamp) })
	q.Queue(lockSQL, b.ids, schema.TableLockClass).Query(func(rows pgx.Rows) error {
		var tbl int
		var locked bool
		_, err := pgx.ForEachRow(rows, []any{&tbl, &locked}, func() error {
			tables = append(tables, tbl)
			return nil
		})
		return err
	})
	q.Queue(`SELECT EXISTS (SELECT FROM waystage.staging WHERE session_id = ANY ($1) AND bad_code IS NOT NULL)`, b.ids).QueryRow(func(row pgx.Row) error { return row.Scan(&b.bad) })
	// When the tables are locked: they do not change any more now.
	layout := b.cat.layout
	q.Queue(layoutSQL).QueryRow(func(row pgx.Row) error { return row.Scan(&layout) })
	q.Queue("SAVEPOINT ws_pass")
	if err := b.tx.SendBatch(b.ctx, q).Close(); err != nil {
		return nil, err
	}
	if layout != b.cat.layout {
		return nil, &outdated{layout}
	}
	return tables, nil
}

// finish ends the sessions' staging, and commits.
func (b *mergeBatch) finish() error {
	q := &pgx.Batch{}
	q.Queue(`DELETE FROM waystage.staging WHERE session_id = ANY ($1)`, b.ids)
	// Nobody fetches a reply to an operator's session.
	q.Queue(`UPDATE waystage.session SET state = CASE WHEN user_name = $2 THEN 'closed' ELSE 'merged' END, merged_at = clock_timestamp()
		WHERE id = ANY ($1)`, b.ids, protocol.OperatorUser)
	return b.tx.commit(b.ctx, q)
}
