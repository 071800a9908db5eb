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
	"github.com/waystage/waystage/internal/trouble"
	"github.com/waystage/waystage/schema"
)

// Defaults of DownConfig.
const (
	DefaultBatchRows = 5000
	DefaultHoldBytes = 64 << 20
	DefaultLinger    = 5 * time.Millisecond
	flushBytes       = 4 << 20
)

// DownConfig of a Down.
type DownConfig struct {
	Mirror    string                                             // connection string; several hosts allowed
	Tables    func(ctx context.Context) ([]*schema.Table, error) // the synced tables; asked at the start of each session
	Changes   Changes
	Log       *zap.Logger
	BatchRows int           // a mirror transaction is committed when it has this many rows; 0: DefaultBatchRows
	FlushRows int           // rows held in memory at most, and 4 MiB of values; 0: BatchRows
	HoldBytes int           // change data of one transaction that the queue keeps until it is committed; 0: DefaultHoldBytes
	Linger    time.Duration // how long a batch waits for more while data flows; 0: DefaultLinger
	Silence   time.Duration // a commit of a session that is to end is waited for so long; 0: DefaultSilence
}

// Down applies the source's transactions to the mirror, in commit order.
type Down struct {
	cfg   DownConfig
	log   *zap.Logger
	state state

	// Of the current session.
	epoch     string
	layout    int64
	byID      map[int]*table
	byName    map[string]*table
	relations map[uint32]*relation
	unknown   map[string]bool
}

// NewDown makes a Down; it connects in Run.
func NewDown(cfg DownConfig) *Down {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.BatchRows <= 0 {
		cfg.BatchRows = DefaultBatchRows
	}
	if cfg.FlushRows <= 0 {
		cfg.FlushRows = cfg.BatchRows
	}
	if cfg.HoldBytes <= 0 {
		cfg.HoldBytes = DefaultHoldBytes
	}
	if cfg.Linger <= 0 {
		cfg.Linger = DefaultLinger
	}
	if cfg.Silence <= 0 {
		cfg.Silence = DefaultSilence
	}
	return &Down{cfg: cfg, log: cfg.Log.Named("apply").With(zap.String("direction", "down"))}
}

// Run applies while it holds the seat, and returns ctx's error or an *Error, which an operator must mend.
func (d *Down) Run(ctx context.Context) error {
	return lead(ctx, d.cfg.Mirror, leader.ApplyDown, d.log, &d.state, d.session)
}

// load reads what a session needs to know of the mirror.
func (d *Down) load(ctx context.Context, conn *pgx.Conn) (position change.LSN, upSeq int64, err error) {
	if d.layout, err = schema.Layout(ctx, conn); err != nil {
		return 0, 0, fmt.Errorf("layout: %w", err)
	}
	tables, err := d.cfg.Tables(ctx)
	if err != nil {
		return 0, 0, fmt.Errorf("synced tables: %w", err)
	}
	d.byID, d.byName, d.relations, d.unknown = map[int]*table{}, map[string]*table{}, map[uint32]*relation{}, map[string]bool{}
	for _, st := range tables {
		t, err := newTable(st)
		if err != nil {
			return 0, 0, err
		}
		d.byID[t.ID], d.byName[t.FullName()] = t, t
	}
	if d.epoch, err = readEpoch(ctx, conn); err != nil {
		return 0, 0, err
	}
	var text string
	err = conn.QueryRow(ctx, "SELECT position::text, up_seq FROM waystage.progress WHERE direction = 'down'").Scan(&text, &upSeq)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, 0, &Error{CodeProgress, "waystage.progress of the mirror has no row 'down'", "Start `waystage serve` again: it finishes the set-up"}
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read progress: %w", err)
	}
	position, err = change.ParseLSN(text)
	return position, upSeq, err
}

func readEpoch(ctx context.Context, conn *pgx.Conn) (epoch string, err error) {
	err = conn.QueryRow(ctx, "SELECT value FROM waystage.meta WHERE key = 'epoch'").Scan(&epoch)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", &Error{CodeProgress, "the mirror has no epoch", "Start `waystage serve` again: it finishes the set-up"}
	}
	if err != nil {
		return "", fmt.Errorf("read the epoch: %w", err)
	}
	return epoch, nil
}

// session applies from the mirror's position until something breaks.
func (d *Down) session(ctx context.Context) (err error) {
	d.state.set("starting", nil)
	conn, err := connectMirror(ctx, d.cfg.Mirror, "waystage apply down")
	if err != nil {
		return err
	}
	defer closeConn(conn)
	ctx, watch := watchOver(ctx, d.cfg.Silence, "", conn)
	defer func() { err = watch.end(err) }()
	position, upSeq, err := d.load(ctx, conn)
	if err != nil {
		return err
	}
	in, err := openInbox(ctx, d.cfg.Changes)
	if err != nil {
		return err
	}
	defer in.close()
	s := &downSession{d: d, conn: conn, in: in, position: position, upSeq: upSeq, feed: newFeed(position),
		purge: purger{q: d.cfg.Changes, log: d.log}}
	defer s.abandon()
	d.log.Info("applying", zap.Stringer("from", position))
	if err := trouble.Clear(ctx, conn, partOf(leader.ApplyDown)); err != nil {
		return err
	}
	d.state.begin(position)
	err = s.run(ctx)
	if errors.Is(err, errGap) || errors.Is(err, change.ErrNotChangeData) {
		s.abandon()
		d.log.Warn("change data is missing or damaged; asking capture to send it again", zap.Error(err))
		if err := askRewind(ctx, conn, "down"); err != nil {
			return err
		}
	}
	s.abandon()
	return stopFaulty(ctx, conn, d.layout, err, d.log)
}

type downSession struct {
	d        *Down
	conn     *pgx.Conn
	in       *inbox
	feed     *feed
	position change.LSN // committed
	upSeq    int64
	purge    purger

	openBytes int // of the open group that the queue still holds

	tx       pgx.Tx
	b        *batch
	began    time.Time
	finished time.Time // when the last batch was committed
}

func (s *downSession) run(ctx context.Context) error {
	for {
		wait := time.Duration(-1)
		switch {
		case s.purge.upTo != s.purge.done && s.tx == nil:
			wait = purgeEvery
		case s.tx != nil && !s.feed.open:
			// Something can be committed. Wait for company only while data flows.
			wait = 0
			if s.began.Sub(s.finished) < flowing {
				wait = max(0, s.d.cfg.Linger-time.Since(s.began))
			}
		}
		a, ok, err := s.in.next(ctx, wait)
		if err != nil {
			return err
		}
		if ok {
			if err := s.feed.take(&a.m, func(ev *change.Event) error { return s.event(ctx, ev) }); err != nil {
				return err
			}
			s.openBytes += len(a.m.Body)
			if !s.feed.open {
				s.purge.upTo, s.openBytes = max(s.purge.upTo, a.place), 0
			} else if s.openBytes >= s.d.cfg.HoldBytes {
				// A transaction larger than the queue must pass through it. Should it not be committed, capture sends it again.
				s.purge.upTo, s.openBytes = max(s.purge.upTo, a.place), 0
				s.purge.purge(ctx, true)
			}
		}
		full := s.b != nil && s.b.applied >= s.d.cfg.BatchRows
		if s.tx != nil && !s.feed.open && (!ok || full) {
			if err := s.commit(ctx); err != nil {
				return err
			}
		}
		if s.tx == nil {
			s.purge.purge(ctx, false)
		}
	}
}

// event begins the mirror transaction when there is something to write.
func (s *downSession) event(ctx context.Context, ev *change.Event) error {
	if s.tx == nil && ev.Kind != change.KindRelation {
		tx, err := s.conn.Begin(ctx)
		if err != nil {
			return fmt.Errorf("begin: %w", err)
		}
		s.tx, s.began = tx, time.Now()
		// Whoever has this row is the only one who applies. The layout is read when it is ours: it does not move then.
		var at string
		var layout int64
		first := &pgx.Batch{}
		first.Queue("SELECT position::text FROM waystage.progress WHERE direction = 'down' FOR UPDATE").QueryRow(func(row pgx.Row) error { return row.Scan(&at) })
		first.Queue("SELECT value::bigint FROM waystage.meta WHERE key = 'layout'").QueryRow(func(row pgx.Row) error { return row.Scan(&layout) })
		if err := tx.SendBatch(ctx, first).Close(); err != nil {
			return fmt.Errorf("read progress: %w", err)
		}
		if layout != s.d.layout {
			return errLayout
		}
		if lsn, err := change.ParseLSN(at); err != nil || lsn != s.position {
			return fmt.Errorf("%w: down stands at %s, expected %s", errFenced, at, s.position)
		}
		s.b = &batch{d: s.d, tx: tx, tables: map[int]*tableRows{}, upSeq: s.upSeq}
	}
	if s.b == nil {
		s.d.describe(ev.Relation)
		return nil
	}
	return s.b.event(ctx, ev)
}

func (s *downSession) commit(ctx context.Context) error {
	if err := s.b.flush(ctx, true); err != nil {
		return err
	}
	end := s.feed.applied
	tag, err := s.tx.Exec(ctx, `UPDATE waystage.progress SET position = $1::text::pg_lsn, seq = seq + 1, up_seq = $2, committed_at = $3, updated_at = clock_timestamp()
		WHERE direction = 'down' AND position = $4::text::pg_lsn`, end.String(), s.b.upSeq, s.b.committed, s.position.String())
	if err != nil {
		return fmt.Errorf("move progress: %w", err)
	}
	if tag.RowsAffected() != 1 {
		return fmt.Errorf("%w: down is no longer at %s", errFenced, s.position)
	}
	if err := commit(ctx, s.tx); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	s.d.state.committed(end, s.b.committed, s.b.txs, s.b.applied, s.b.decided, time.Since(s.began))
	s.position, s.upSeq, s.finished = end, s.b.upSeq, time.Now()
	s.tx, s.b = nil, nil
	return nil
}

func (s *downSession) abandon() {
	if s.tx != nil {
		rollback(s.tx)
		s.tx, s.b = nil, nil
	}
}
