package stages

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"
)

// Worker does one stage's work, a batch at a time. A pool calls it from one goroutine.
type Worker interface {
	// Batch takes what waits and works it off. It may wait for work until take ends, and must then return soon without
	// taking more; what it has taken it finishes under work. It returns how many items it did: 0 means that nothing
	// was found. doing tells the operator what is going on, and that the worker is busy.
	Batch(take, work context.Context, doing func(string)) (items int, err error)
}

// Mode is what an operator wants of a pool.
type Mode string

// Modes.
const (
	ModeRun   Mode = "run"
	ModePause Mode = "pause" // take nothing more
	ModeDrain Mode = "drain" // work off what is queued, then pause
)

// States of a worker.
const (
	StateIdle   = "idle"
	StateBusy   = "busy"
	StatePaused = "paused"
)

// PoolConfig says how a pool runs. The zero value of a field takes the default.
type PoolConfig struct {
	Stage   string
	Size    int           // workers when nobody has set another number (default 1)
	Poll    time.Duration // how often an idle pool looks for work without being kicked (default 200 ms); negative: never, its workers wait by themselves
	Follow  time.Duration // how often waystage.pool is read (default 1 s)
	Grace   time.Duration // how long running batches may take to end at shutdown (default 30 s)
	Backoff time.Duration // first rest after a failure (default 100 ms); doubles up to MaxBackoff
	MaxBack time.Duration // longest rest after failures (default 15 s)

	// Of a stage whose batches do not end: how many items it has done so far in this process, and how many bytes it lags
	// behind. Both may be nil.
	Done func() int64
	Lag  func() int64
}

func (c PoolConfig) withDefaults() PoolConfig {
	def(&c.Size, 1)
	def(&c.Poll, 200*time.Millisecond)
	def(&c.Follow, time.Second)
	def(&c.Grace, 30*time.Second)
	def(&c.Backoff, 100*time.Millisecond)
	def(&c.MaxBack, 15*time.Second)
	return c
}

// def sets a field that was left at zero.
func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Pool runs workers of one stage, as many and in the mode that waystage.pool says.
type Pool struct {
	cfg  PoolConfig
	db   *pgxpool.Pool
	make func() Worker
	log  *zap.Logger
	wake chan struct{} // settings may have changed

	mu      sync.Mutex
	size    int
	mode    Mode
	running bool
	members map[int]*member // by worker number, from 1
	failure string          // of reading the settings
	rate    rate
	items   int64
	batches int64
	errs    int64
}

// member is one running worker. Its fields are guarded by the pool's mu, but for the channels and contexts.
type member struct {
	id      int
	leave   context.Context // ends when the worker is to leave
	dismiss context.CancelFunc
	work    context.Context
	kick    chan struct{} // work may have come; one pending
	changed chan struct{} // the mode has changed; one pending
	done    chan struct{}
	stop    context.CancelFunc // ends the taking of the current batch

	drained   bool // found nothing since the mode became drain
	state     string
	since     time.Time
	doing     string
	items     int64
	batches   int64
	lastError string
	errorAt   time.Time
}

// NewPool makes a pool; newWorker is called for every worker, and again after a worker failed.
func NewPool(cfg PoolConfig, db *pgxpool.Pool, newWorker func() Worker, log *zap.Logger) *Pool {
	if log == nil {
		log = zap.NewNop()
	}
	cfg = cfg.withDefaults()
	return &Pool{
		cfg: cfg, db: db, make: newWorker, log: log.With(zap.String("stage", cfg.Stage)), wake: make(chan struct{}, 1),
		size: cfg.Size, mode: ModeRun, members: map[int]*member{},
	}
}

// Stage is the name of the pool's stage.
func (p *Pool) Stage() string { return p.cfg.Stage }

// Wake makes the pool read its settings now.
func (p *Pool) Wake() { signal(p.wake) }

// Kick tells the workers that there may be work.
func (p *Pool) Kick() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.members {
		signal(m.kick)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run runs the pool until ctx ends: then no worker takes anything more, running batches are finished (for at most
// Grace), and Run returns nil.
func (p *Pool) Run(ctx context.Context) error {
	p.mu.Lock()
	if p.running {
		p.mu.Unlock()
		return fmt.Errorf("pool %s is running already", p.cfg.Stage)
	}
	p.running = true
	p.mu.Unlock()

	work, abort := context.WithCancel(context.WithoutCancel(ctx))
	defer abort()
	follow := time.NewTicker(p.cfg.Follow)
	defer follow.Stop()
	for ctx.Err() == nil {
		p.settings(ctx)
		p.resize(ctx, work)
		p.tally()
		select {
		case <-ctx.Done():
		case <-p.wake:
		case <-follow.C:
		}
	}
	grace := time.AfterFunc(p.cfg.Grace, abort)
	defer grace.Stop()
	p.mu.Lock()
	members := make([]*member, 0, len(p.members))
	for _, m := range p.members {
		members = append(members, m)
	}
	p.mu.Unlock()
	for _, m := range members {
		<-m.done
	}
	p.mu.Lock()
	clear(p.members)
	p.running = false
	p.mu.Unlock()
	return nil
}

// settings reads waystage.pool; what cannot be read stays as it is.
func (p *Pool) settings(ctx context.Context) {
	size, mode, err := readPool(ctx, p.db, p.cfg.Stage, p.cfg.Size)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		if ctx.Err() == nil && p.failure == "" {
			p.log.Warn("pool settings cannot be read, going on with the last ones", zap.Error(err))
		}
		p.failure = err.Error()
		return
	}
	p.failure = ""
	if mode != p.mode {
		p.log.Info("pool mode changed", zap.String("from", string(p.mode)), zap.String("to", string(mode)))
		p.mode = mode
		for _, m := range p.members {
			m.drained = false
			if mode == ModePause && m.stop != nil {
				m.stop()
			}
			signal(m.changed)
		}
	}
	if size != p.size {
		p.log.Info("pool size changed", zap.Int("from", p.size), zap.Int("to", size))
		p.size = size
	}
}

// tally takes over what a stage has done whose batches do not end.
func (p *Pool) tally() {
	if p.cfg.Done == nil {
		return
	}
	done := p.cfg.Done()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rate.add(time.Now(), done-p.items)
	p.items = done
}

func (p *Pool) resize(ctx, work context.Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, m := range p.members {
		select {
		case <-m.done:
			delete(p.members, id)
			continue
		default:
		}
		if id > p.size {
			m.dismiss()
		}
	}
	for id := 1; id <= p.size; id++ {
		if p.members[id] != nil {
			// A worker that was dismissed and has not left yet is replaced when it has.
			continue
		}
		m := &member{
			id: id, work: work, kick: make(chan struct{}, 1), changed: make(chan struct{}, 1), done: make(chan struct{}),
			state: StateIdle, since: time.Now(),
		}
		m.leave, m.dismiss = context.WithCancel(ctx)
		p.members[id] = m
		go p.member(m)
	}
}

// member is the life of one worker.
func (p *Pool) member(m *member) {
	defer p.Wake() // a replacement may be due
	defer close(m.done)
	defer m.dismiss()
	w := p.make()
	backoff := p.cfg.Backoff
	for m.leave.Err() == nil {
		take, ok := p.begin(m)
		if !ok {
			select {
			case <-m.leave.Done():
			case <-m.changed:
			}
			continue
		}
		n, err := p.batch(m, w, take)
		stopped := take.Err() != nil // the mode has changed, or the worker is to leave
		p.end(m, n, err)
		switch {
		case err != nil:
			w = p.make()
			pause(m.leave, backoff/2+rand.N(backoff), m.changed)
			backoff = min(2*backoff, p.cfg.MaxBack)
		case n == 0 && p.cfg.Poll > 0 && !stopped:
			backoff = p.cfg.Backoff
			p.rest(m)
		default:
			backoff = p.cfg.Backoff
		}
	}
}

// begin makes the context for taking the next batch; not if the worker is to take nothing.
func (p *Pool) begin(m *member) (take context.Context, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode == ModePause || p.mode == ModeDrain && m.drained {
		m.set(StatePaused, "")
		return nil, false
	}
	m.set(StateIdle, "")
	take, m.stop = context.WithCancel(m.leave)
	return take, true
}

func (p *Pool) end(m *member, n int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m.stop()
	m.stop = nil
	m.set(StateIdle, "")
	if err != nil {
		m.lastError, m.errorAt = err.Error(), time.Now()
		p.errs++
		p.log.Error("worker failed, it goes on after a rest", zap.Int("worker", m.id), zap.Error(err))
		return
	}
	if n == 0 {
		m.drained = p.mode == ModeDrain
		return
	}
	m.items += int64(n)
	m.batches++
	p.items += int64(n)
	p.batches++
	p.rate.add(time.Now(), int64(n))
}

func (m *member) set(state, doing string) {
	if m.state != state {
		m.since = time.Now()
	}
	m.state, m.doing = state, doing
}

// batch runs one batch; a panic is an error.
func (p *Pool) batch(m *member, w Worker, take context.Context) (n int, err error) {
	defer func() {
		if r := recover(); r != nil {
			p.log.Error("worker panicked", zap.Int("worker", m.id), zap.Any("panic", r), zap.ByteString("stack", debug.Stack()))
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return w.Batch(take, m.work, func(doing string) {
		p.mu.Lock()
		defer p.mu.Unlock()
		m.set(StateBusy, doing)
	})
}

// rest waits for a kick, at most for the poll interval.
func (p *Pool) rest(m *member) {
	// The pool as a whole looks once in Poll: its workers share the looking.
	p.mu.Lock()
	poll := p.cfg.Poll * time.Duration(max(1, len(p.members)))
	p.mu.Unlock()
	t := time.NewTimer(poll)
	defer t.Stop()
	select {
	case <-m.leave.Done():
	case <-m.changed:
	case <-m.kick:
	case <-t.C:
	}
}

func pause(ctx context.Context, d time.Duration, or <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-or:
	case <-t.C:
	}
}

// WorkerInfo is what one worker does now.
type WorkerInfo struct {
	ID        int       `json:"id"`
	State     string    `json:"state"`
	Since     time.Time `json:"since"`
	Doing     string    `json:"doing,omitempty"`
	Items     int64     `json:"items"`
	Batches   int64     `json:"batches"`
	LastError string    `json:"last_error,omitempty"`
	ErrorAt   time.Time `json:"error_at,omitzero"`
}

// PoolInfo is what a pool does now, in this process.
type PoolInfo struct {
	Stage    string       `json:"stage"`
	Size     int          `json:"size"`
	Mode     Mode         `json:"mode"`
	Items    int64        `json:"items"`
	Batches  int64        `json:"batches"`
	Errors   int64        `json:"errors"`
	Rate     float64      `json:"rate"`               // items per second, over the last 10 s
	LagBytes int64        `json:"lag_bytes"`          // of a capture: log that the target does not have yet
	Settings string       `json:"settings,omitempty"` // why the settings cannot be read
	Workers  []WorkerInfo `json:"workers"`
}

// Snapshot tells what the pool does now.
func (p *Pool) Snapshot() PoolInfo {
	p.tally()
	var lag int64
	if p.cfg.Lag != nil {
		lag = p.cfg.Lag()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	info := PoolInfo{
		Stage: p.cfg.Stage, Size: p.size, Mode: p.mode, Items: p.items, Batches: p.batches, Errors: p.errs,
		Rate: p.rate.perSecond(time.Now()), LagBytes: lag, Settings: p.failure, Workers: make([]WorkerInfo, 0, len(p.members)),
	}
	for _, m := range p.members {
		info.Workers = append(info.Workers, WorkerInfo{
			ID: m.id, State: m.state, Since: m.since, Doing: m.doing, Items: m.items, Batches: m.batches,
			LastError: m.lastError, ErrorAt: m.errorAt,
		})
	}
	slices.SortFunc(info.Workers, func(a, b WorkerInfo) int { return a.ID - b.ID })
	return info
}

// rate counts events in seconds of a ring.
type rate struct {
	seconds [10]int64
	counts  [10]int64
}

func (r *rate) add(now time.Time, n int64) {
	s := now.Unix()
	i := s % int64(len(r.seconds))
	if r.seconds[i] != s {
		r.seconds[i], r.counts[i] = s, 0
	}
	r.counts[i] += n
}

func (r *rate) perSecond(now time.Time) float64 {
	var sum int64
	for i, s := range r.seconds {
		if now.Unix()-s < int64(len(r.seconds)) {
			sum += r.counts[i]
		}
	}
	return float64(sum) / float64(len(r.seconds))
}

// PoolSetting is what an operator asked of a pool.
type PoolSetting struct {
	Stage     string    `json:"stage"`
	Size      int       `json:"size"`
	Mode      Mode      `json:"mode"`
	ChangedAt time.Time `json:"changed_at"`
}

// MaxPoolSize bounds the workers of one pool in one process.
const MaxPoolSize = 256

// SetPool changes the setting of a stage's pools in all processes: size if it is not negative, mode if it is not empty.
// The processes notice within a second, or at once when they are woken (Wake).
func SetPool(ctx context.Context, db *pgxpool.Pool, stage string, size int, mode Mode) error {
	switch {
	case size > MaxPoolSize:
		return fmt.Errorf("pool %s: size %d is over the limit of %d", stage, size, MaxPoolSize)
	case mode != "" && mode != ModeRun && mode != ModePause && mode != ModeDrain:
		return fmt.Errorf("pool %s: mode %q is not run, pause or drain", stage, mode)
	}
	_, err := db.Exec(ctx, `
		INSERT INTO waystage.pool (stage, size, mode)
		VALUES ($1, CASE WHEN $2 < 0 THEN 1 ELSE $2 END, coalesce(nullif($3, ''), 'run'))
		ON CONFLICT (stage) DO UPDATE SET
			size = CASE WHEN $2 < 0 THEN pool.size ELSE $2 END,
			mode = coalesce(nullif($3, ''), pool.mode),
			changed_at = now()`, stage, size, string(mode))
	if err != nil {
		return fmt.Errorf("set pool %s: %w", stage, err)
	}
	return nil
}

// ListPools lists the settings of all pools that ever ran.
func ListPools(ctx context.Context, db *pgxpool.Pool) ([]PoolSetting, error) {
	rows, err := db.Query(ctx, `SELECT stage, size, mode, changed_at FROM waystage.pool ORDER BY stage`)
	if err != nil {
		return nil, fmt.Errorf("list pools: %w", err)
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[PoolSetting])
	if err != nil {
		return nil, fmt.Errorf("list pools: %w", err)
	}
	return list, nil
}

// readPool reads a stage's setting, making it when it is not there.
func readPool(ctx context.Context, db *pgxpool.Pool, stage string, size int) (int, Mode, error) {
	var mode Mode
	read := func() error {
		return db.QueryRow(ctx, `SELECT size, mode FROM waystage.pool WHERE stage = $1`, stage).Scan(&size, &mode)
	}
	err := read()
	if errors.Is(err, pgx.ErrNoRows) {
		if _, err = db.Exec(ctx, `INSERT INTO waystage.pool (stage, size) VALUES ($1, $2) ON CONFLICT DO NOTHING`, stage, size); err == nil {
			err = read()
		}
	}
	if err != nil {
		return 0, "", fmt.Errorf("read setting of pool %s: %w", stage, err)
	}
	return size, mode, nil
}
