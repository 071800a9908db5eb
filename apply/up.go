package apply

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/leader"
	"github.com/waystage/waystage/internal/trouble"
	"github.com/waystage/waystage/schema"
)

// DefaultBatchChanges of UpConfig.
const DefaultBatchChanges = 1000

// UpConfig of an Up.
type UpConfig struct {
	Mirror       string // connection strings; several hosts allowed
	Source       string
	Tables       func(ctx context.Context) ([]*schema.Table, error) // the synced tables; asked at the start of each session
	Changes      Changes
	Log          *zap.Logger
	Worker       string        // name of this process, for people who read the source's progress table
	BatchChanges int           // changes in one source transaction at most; 0: DefaultBatchChanges
	Linger       time.Duration // how long a batch waits for more while data flows; 0: DefaultLinger
	Silence      time.Duration // a server that does not answer for so long is taken to be gone; 0: DefaultSilence
}

// Up applies devices' merged changes to the source, in the mirror's commit order.
type Up struct {
	cfg   UpConfig
	log   *zap.Logger
	state state
}

// NewUp makes an Up; it connects in Run.
func NewUp(cfg UpConfig) *Up {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.BatchChanges <= 0 {
		cfg.BatchChanges = DefaultBatchChanges
	}
	if cfg.Linger <= 0 {
		cfg.Linger = DefaultLinger
	}
	if cfg.Silence <= 0 {
		cfg.Silence = DefaultSilence
	}
	if cfg.Worker == "" {
		host, _ := os.Hostname()
		cfg.Worker = fmt.Sprintf("%s/%d", host, os.Getpid())
	}
	return &Up{cfg: cfg, log: cfg.Log.Named("apply").With(zap.String("direction", "up"))}
}

// Run applies while it holds the seat, and returns ctx's error or an *Error, which an operator must mend.
func (u *Up) Run(ctx context.Context) error {
	return lead(ctx, u.cfg.Mirror, leader.ApplyUp, u.log, &u.state, u.session)
}

// Stats is a copy of the current figures.
func (u *Up) Stats() Stats { return u.state.get() }

// Metrics are the figures for Prometheus.
func (u *Up) Metrics() []prometheus.Collector {
	return []prometheus.Collector{collector{"up", u.Stats}}
}

// upSession is one session: its view of both databases is true until the chain moves without it.
type upSession struct {
	u      *Up
	mirror *pgx.Conn
	source *pgx.Conn
	in     *inbox
	feed   *feed
	ledger map[uint32]*ledger
	byName map[string]*table
	tables map[int]*target
	epoch  string
	layout int64
	purge  purger
	parked parked

	misfits bool // some change has no place in its table any more

	seq      int64      // of the source's progress row: the chain, which every source transaction demands and moves
	term     int64      // what seq was when the session began: every refusal demands it of the mirror
	position change.LSN // all changes of the mirror's transactions up to here are decided
	saved    change.LSN // what the mirror's progress row says
	saveDue  time.Time
	lastAt   time.Time  // commit time of the transaction that ends at position
	certain  change.LSN // changes committed behind this position were seen by no worker before this session

	queue   []*upChange              // read and not decided
	marks   []mark                   // where the mirror's transactions end in queue
	txs     int                      // mirror transactions read
	refused map[string]refusedInsert // refused inserts by the names of their rows
	began   time.Time                // when the first of queue came
	idleAt  time.Time                // when the last batch was decided
}

// mark is the end of a mirror transaction: all changes before the place in the queue belong to it or its predecessors.
type mark struct {
	before int
	end    change.LSN
	at     time.Time
}

func (u *Up) session(ctx context.Context) (err error) {
	u.state.set("starting", nil)
	s := &upSession{u: u, ledger: map[uint32]*ledger{}, refused: map[string]refusedInsert{}, purge: purger{q: u.cfg.Changes, log: u.log}}
	if s.mirror, err = connectMirror(ctx, u.cfg.Mirror, "waystage apply up"); err != nil {
		return err
	}
	defer closeConn(s.mirror)
	if s.source, err = openSource(ctx, u.cfg.Source); err != nil {
		return err
	}
	defer closeConn(s.source)
	ctx, watch := watchOver(ctx, u.cfg.Silence, u.cfg.Source, s.mirror, s.source)
	defer func() { err = watch.end(err) }()
	if err := s.load(ctx); err != nil {
		return stopFaulty(ctx, s.mirror, s.layout, err, u.log)
	}
	if s.in, err = openInbox(ctx, u.cfg.Changes); err != nil {
		return err
	}
	defer s.in.close()
	u.log.Info("applying", zap.Stringer("from", s.position), zap.Int64("seq", s.seq))
	if err := trouble.Clear(ctx, s.mirror, partOf(leader.ApplyUp)); err != nil {
		return err
	}
	u.state.begin(s.position)
	err = s.run(ctx)
	if errors.Is(err, errGap) || errors.Is(err, change.ErrNotChangeData) {
		u.log.Warn("change data is missing or damaged; asking capture to send it again", zap.Error(err))
		if err := askRewind(ctx, s.mirror, "up"); err != nil {
			return err
		}
	}
	if ctx.Err() != nil { // a clean stop: what is decided need not be sent again
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		_ = s.save(end, true)
	}
	return stopFaulty(ctx, s.mirror, s.layout, s.explain(ctx, err), u.log)
}

// load takes the chain over and waits until the mirror shows what predecessors did: from then on a change is merged in
// the mirror exactly if it is not at the source.
func (s *upSession) load(ctx context.Context) (err error) {
	if s.layout, err = schema.Layout(ctx, s.mirror); err != nil {
		return fmt.Errorf("layout: %w", err)
	}
	tables, err := s.u.cfg.Tables(ctx)
	if err != nil {
		return fmt.Errorf("synced tables: %w", err)
	}
	byID := map[int]*table{}
	s.byName = map[string]*table{}
	for _, st := range tables {
		t, err := newTable(st)
		if err != nil {
			return err
		}
		byID[t.ID], s.byName[t.FullName()] = t, t
	}
	if s.tables, err = readTargets(ctx, s.source, byID); err != nil {
		return err
	}
	if s.epoch, err = readEpoch(ctx, s.mirror); err != nil {
		return err
	}
	var at string
	var seen int64
	if err := s.mirror.QueryRow(ctx, "SELECT coalesce(max(up_seq), 0) FROM waystage.progress WHERE direction = 'down'").Scan(&seen); err != nil {
		return fmt.Errorf("read progress: %w", err)
	}
	err = s.source.QueryRow(context.WithoutCancel(ctx), `UPDATE waystage.progress SET seq = seq + 1, carries = '', worker = $2, at = clock_timestamp()
		WHERE epoch = $1 AND seq >= $3 RETURNING seq, position::text`, s.epoch, s.u.cfg.Worker, seen).Scan(&s.seq, &at)
	if errors.Is(err, pgx.ErrNoRows) {
		return s.noChain(ctx, seen)
	}
	if err != nil {
		return fmt.Errorf("take the chain over: %w", err)
	}
	if s.position, err = change.ParseLSN(at); err != nil {
		return err
	}
	if err := s.mirrorStands(ctx); err != nil {
		return err
	}
	if err := s.beginTerm(ctx); err != nil {
		return err
	}
	if err := s.await(ctx); err != nil {
		return err
	}
	var certain string
	err = s.mirror.QueryRow(ctx, "SELECT position::text, pg_current_wal_insert_lsn()::text FROM waystage.progress WHERE direction = 'up'").Scan(&at, &certain)
	if errors.Is(err, pgx.ErrNoRows) {
		return &Error{CodeProgress, "waystage.progress of the mirror has no row 'up'", "Start `waystage serve` again: it finishes the set-up"}
	}
	if err != nil {
		return fmt.Errorf("read progress: %w", err)
	}
	if s.saved, err = change.ParseLSN(at); err != nil {
		return err
	}
	if s.certain, err = change.ParseLSN(certain); err != nil {
		return err
	}
	s.position = max(s.position, s.saved)
	s.feed = newFeed(s.position)
	if err := s.recallRefused(ctx); err != nil {
		return err
	}
	return s.unpark(ctx)
}

// noChain says why the chain cannot be taken over: the source has no row of this epoch, or one that is older than what the
// mirror has seen of it.
func (s *upSession) noChain(ctx context.Context, seen int64) error {
	var seq int64
	err := s.source.QueryRow(ctx, "SELECT seq FROM waystage.progress WHERE epoch = $1", s.epoch).Scan(&seq)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return &Error{CodeProgress, fmt.Sprintf("the source's waystage.progress has no row for epoch %q", s.epoch), "Start `waystage serve` again: it finishes the set-up"}
	case err != nil:
		return fmt.Errorf("take the chain over: %w", err)
	}
	return &Error{CodeServerBack, fmt.Sprintf("the mirror has seen transaction %d of ours from the source, which is at %d", seen, seq), remedyBack}
}

// mirrorStands makes sure that the mirror's log is as long as the source says that it was applied.
func (s *upSession) mirrorStands(ctx context.Context) error {
	var end string
	if err := s.mirror.QueryRow(ctx, "SELECT pg_current_wal_insert_lsn()::text").Scan(&end); err != nil {
		return fmt.Errorf("read the mirror's position: %w", err)
	}
	lsn, err := change.ParseLSN(end)
	if err == nil && s.position > lsn {
		return &Error{CodeServerBack, fmt.Sprintf("the source has the mirror's changes up to %s, the mirror's log ends at %s", s.position, lsn), remedyBack}
	}
	return err
}

// beginTerm tells the mirror who may refuse from now on. A worker that was overtaken without noticing would else refuse
// what its successor has just written to the source. It comes after the chain was moved, so that the numbers of terms and
// the order in which workers took the chain are the same.
func (s *upSession) beginTerm(ctx context.Context) error {
	s.term = s.seq
	tag, err := s.mirror.Exec(ctx, "UPDATE waystage.progress SET seq = $1 WHERE direction = 'up' AND seq < $1", s.term)
	if err != nil {
		return fmt.Errorf("begin the term: %w", err)
	}
	if tag.RowsAffected() != 1 {
		return fmt.Errorf("%w: the mirror has a term after %d, or no row 'up' in waystage.progress", errFenced, s.term)
	}
	return nil
}

// holdTerm makes sure in a mirror transaction that the session's term lasts until its end.
func (s *upSession) holdTerm(ctx context.Context, tx querier) error {
	var term int64
	err := tx.QueryRow(ctx, "SELECT seq FROM waystage.progress WHERE direction = 'up' FOR SHARE").Scan(&term)
	if err == nil && term != s.term || errors.Is(err, pgx.ErrNoRows) {
		return fmt.Errorf("%w: the mirror is in term %d, this session is %d", errFenced, term, s.term)
	}
	if err != nil {
		return fmt.Errorf("look at the term: %w", err)
	}
	return nil
}

// await waits until down has seen our last transaction, and with it everything that the source committed before.
func (s *upSession) await(ctx context.Context) error {
	const first, most = 2 * time.Millisecond, 100 * time.Millisecond
	began, told := time.Now(), false
	for wait := first; ; wait = min(wait*5/4, most) {
		var seen int64
		err := s.mirror.QueryRow(ctx, "SELECT up_seq FROM waystage.progress WHERE direction = 'down'").Scan(&seen)
		if errors.Is(err, pgx.ErrNoRows) {
			return &Error{CodeProgress, "waystage.progress of the mirror has no row 'down'", "Start `waystage serve` again: it finishes the set-up"}
		}
		if err != nil {
			return fmt.Errorf("read progress: %w", err)
		}
		if seen >= s.seq {
			return nil
		}
		if !told && time.Since(began) > 5*time.Second {
			told = true
			s.u.log.Info("waiting for the down direction to catch up", zap.Int64("seq", s.seq), zap.Int64("seen", seen))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// barrier makes sure that base images show everything that the source had committed when it was called (rule R4).
func (s *upSession) barrier(ctx context.Context) error {
	s.u.state.with(func(st *Stats) { st.Barriers++ })
	out, err := s.try(ctx, nil, s.position, together)
	if err != nil {
		return err
	}
	if out.refused != nil {
		return out.refused
	}
	return s.await(ctx)
}

func (s *upSession) run(ctx context.Context) error {
	for {
		wait := time.Duration(-1)
		switch {
		case len(s.queue) > 0 && !s.feed.open:
			wait = 0
			if s.began.Sub(s.idleAt) < flowing {
				wait = max(0, s.u.cfg.Linger-time.Since(s.began))
			}
		case s.position > s.saved || s.purge.upTo != s.purge.done:
			wait = purgeEvery
		case s.parked.waits:
			wait = lookEvery
		}
		a, ok, err := s.in.next(ctx, wait)
		if err != nil {
			return err
		}
		if !ok && wait == lookEvery {
			if err := s.sameLayout(ctx, s.mirror); err != nil {
				return err
			}
		}
		if ok {
			if err := s.feed.take(&a.m, s.event); err != nil {
				return err
			}
			if !s.feed.open {
				s.purge.upTo = max(s.purge.upTo, a.place)
			}
		}
		for len(s.queue) >= s.u.cfg.BatchChanges || (len(s.queue) > 0 && !ok && !s.feed.open) {
			n := s.cut()
			if n == 0 {
				break
			}
			if err := s.batch(ctx, n); err != nil {
				return err
			}
		}
		if len(s.queue) == 0 && !s.feed.open {
			if n := len(s.marks); n > 0 { // transactions without anything for the source
				s.lastAt, s.marks = s.marks[n-1].at, s.marks[:0]
			}
			s.position = max(s.position, s.feed.applied)
			if err := s.save(ctx, !ok); err != nil {
				return err
			}
		}
	}
}

// cut is how many changes of the queue the next batch takes. A large transaction of the mirror is applied in parts, since its
// changes are records of their own; but one with atomic units (rule R8) is not cut. 0: its end must come first.
func (s *upSession) cut() int {
	n := min(len(s.queue), s.u.cfg.BatchChanges)
	tx := s.queue[n-1].tx
	begin := n
	whole := true
	for ; begin > 0 && s.queue[begin-1].tx == tx; begin-- {
		whole = whole && s.queue[begin-1].unit == 0
	}
	if whole {
		return n
	}
	for n < len(s.queue) && s.queue[n].tx == tx {
		n++
	}
	if n == len(s.queue) && s.feed.open && tx == s.txs {
		return begin
	}
	return n
}

// event takes one event of the mirror.
func (s *upSession) event(ev *change.Event) error {
	switch ev.Kind {
	case change.KindRelation:
		if ev.Relation.Schema == "waystage" && ev.Relation.Name == "change" {
			s.ledger[ev.Relation.ID] = newLedger(ev.Relation)
		}
	case change.KindCommit:
		s.txs++
		s.marks = append(s.marks, mark{len(s.queue), ev.LSN, ev.Time})
	case change.KindInsert:
		l := s.ledger[ev.ID]
		if l == nil {
			return nil
		}
		c, err := l.change(ev.New, s.tables)
		if err != nil || c == nil || s.parked.back[c.id] {
			return err
		}
		if len(s.queue) == 0 {
			s.began = time.Now()
		}
		c.tx = s.txs
		s.queue = append(s.queue, c)
	}
	return nil
}

// batch decides the first n changes of the queue.
func (s *upSession) batch(ctx context.Context, n int) error {
	list := s.queue[:n]
	end, at, used := s.position, s.lastAt, 0
	for _, m := range s.marks {
		if m.before > n {
			break
		}
		end, at = max(end, m.end), m.at
		used++
	}
	began := time.Now()
	if err := s.sameLayout(ctx, s.mirror); err != nil {
		return err
	}
	todo, err := s.undecided(ctx, list)
	if err != nil {
		return err
	}
	if todo, err = s.park(ctx, todo); err != nil {
		return err
	}
	if err := s.fit(ctx, todo); err != nil {
		return err
	}
	for rest := todo; len(rest) > 0; {
		same := 1
		for same < len(rest) && rest[same].tx == rest[0].tx {
			same++
		}
		inOrder(rest[:same])
		rest = rest[same:]
	}
	if err := s.process(ctx, todo, end); err != nil {
		return err
	}
	s.queue = append(s.queue[:0:0], s.queue[n:]...)
	s.marks = append(s.marks[:0:0], s.marks[used:]...)
	for i := range s.marks {
		s.marks[i].before -= n
	}
	s.position, s.lastAt, s.idleAt, s.began = end, at, time.Now(), time.Now()
	s.u.state.committed(end, at, used, len(todo), 0, time.Since(began))
	return nil
}

// undecided leaves out what a predecessor has brought to a verdict. A change that cannot be found is one whose commit is in
// the log but not visible yet.
func (s *upSession) undecided(ctx context.Context, list []*upChange) ([]*upChange, error) {
	if s.feed.applied > s.certain && len(s.marks) > 0 && s.marks[0].end > s.certain {
		return list, nil
	}
	ids := make([]int64, len(list))
	for i, c := range list {
		ids[i] = c.id
	}
	rows, err := s.mirror.Query(ctx, "SELECT id FROM waystage.change WHERE id = ANY($1) AND state <> 'merged'", ids)
	if err != nil {
		return nil, fmt.Errorf("verdicts: %w", err)
	}
	done := map[int64]bool{}
	var id int64
	if _, err := pgx.ForEachRow(rows, []any{&id}, func() error { done[id] = true; return nil }); err != nil {
		return nil, fmt.Errorf("verdicts: %w", err)
	}
	todo := make([]*upChange, 0, len(list))
	for _, c := range list {
		if !done[c.id] {
			todo = append(todo, c)
		}
	}
	return todo, nil
}

// save notes the position in the mirror, where capture reads it, and lets the queue go up to it.
func (s *upSession) save(ctx context.Context, idle bool) error {
	if s.position > s.saved && (idle || !time.Now().Before(s.saveDue)) {
		var at *time.Time
		if !s.lastAt.IsZero() {
			at = &s.lastAt
		}
		_, err := s.mirror.Exec(ctx, `UPDATE waystage.progress SET position = $1::text::pg_lsn, committed_at = $2, updated_at = clock_timestamp()
			WHERE direction = 'up' AND position < $1::text::pg_lsn`, s.position.String(), at)
		if err != nil {
			return fmt.Errorf("save progress: %w", err)
		}
		s.saved, s.saveDue = s.position, time.Now().Add(purgeEvery)
	}
	if s.position == s.saved {
		s.purge.purge(ctx, idle)
	}
	return nil
}
