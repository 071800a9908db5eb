package stages

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// loop is a worker that works until it is told to stop, as a capture does.
type loop func(context.Context) error

func (l loop) Batch(take, _ context.Context, doing func(string)) (int, error) {
	doing("leading")
	if err := l(take); take.Err() == nil {
		return 0, err
	}
	return 0, nil
}

// jobs is a queue of numbers for a pool.
type jobs struct {
	mu      sync.Mutex
	left    int
	done    atomic.Int64
	running atomic.Int64
	most    atomic.Int64
	hold    chan struct{} // not nil: a batch waits for it
	fail    atomic.Pointer[func() error]
}

func (j *jobs) Batch(_, work context.Context, doing func(string)) (int, error) {
	j.mu.Lock()
	if j.left == 0 {
		j.mu.Unlock()
		return 0, nil
	}
	j.left--
	hold := j.hold
	j.mu.Unlock()
	doing("a number")
	n := j.running.Add(1)
	defer j.running.Add(-1)
	for m := j.most.Load(); n > m && !j.most.CompareAndSwap(m, n); m = j.most.Load() {
	}
	if f := j.fail.Load(); f != nil {
		if err := (*f)(); err != nil {
			return 0, err
		}
	}
	if hold != nil {
		select {
		case <-hold:
		case <-work.Done():
			return 0, work.Err()
		}
	}
	j.done.Add(1)
	return 1, nil
}

func (j *jobs) add(n int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.left += n
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not come about", what)
		}
	}
}

// startPool runs a pool until the test ends. stop tells it to end, calls what is to happen then, and waits.
func startPool(t *testing.T, r *rig, cfg PoolConfig, make func() Worker) (p *Pool, stop func(then ...func())) {
	t.Helper()
	def(&cfg.Stage, "test")
	def(&cfg.Poll, 5*time.Millisecond)
	cfg.Backoff, cfg.Follow = time.Millisecond, 20*time.Millisecond
	p = NewPool(cfg, r.db, make, nil)
	ctx, cancel := context.WithCancel(r.ctx)
	ended := newSignal()
	go func() {
		if err := p.Run(ctx); err != nil {
			t.Error(err)
		}
		close(ended)
	}()
	stop = func(then ...func()) {
		cancel()
		for _, f := range then {
			f()
		}
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			t.Error("the pool does not end")
		}
	}
	t.Cleanup(func() { stop() })
	return p, stop
}

func newSignal() chan struct{} { return make(chan struct{}) }

func (p *Pool) count(state string) (n int) {
	for _, w := range p.Snapshot().Workers {
		if w.State == state {
			n++
		}
	}
	return n
}

func testPoolIsWorked(t *testing.T, r *rig) {
	j := &jobs{hold: make(chan struct{})}
	p, stop := startPool(t, r, PoolConfig{Size: 2}, func() Worker { return j })
	set := func(size int, mode Mode) {
		t.Helper()
		if err := SetPool(r.ctx, r.db, "test", size, mode); err != nil {
			t.Fatal(err)
		}
		p.Wake()
	}
	j.add(100)
	eventually(t, "two busy workers", func() bool { return p.count(StateBusy) == 2 })
	if w := p.Snapshot().Workers; w[0].ID != 1 || w[0].Doing != "a number" || w[0].Since.IsZero() {
		t.Fatalf("%+v", w)
	}
	set(5, "")
	eventually(t, "five busy workers", func() bool { return p.count(StateBusy) == 5 })
	// Smaller: workers finish first.
	set(1, "")
	eventually(t, "the new size", func() bool { return p.Snapshot().Size == 1 })
	if p.count(StateBusy) != 5 {
		t.Fatal("a running batch was broken off")
	}
	for range 5 {
		j.hold <- struct{}{}
	}
	eventually(t, "one worker", func() bool { return len(p.Snapshot().Workers) == 1 && p.count(StateBusy) == 1 })
	// Paused: the running batch ends, nothing more is taken.
	set(3, ModePause)
	eventually(t, "pause", func() bool { return p.count(StatePaused) == 2 })
	j.hold <- struct{}{}
	eventually(t, "pause of all", func() bool { return p.count(StatePaused) == 3 })
	if n := j.done.Load(); n != 6 {
		t.Fatalf("%d done", n)
	}
	// Drained: what is there is worked off, then it pauses, though more comes.
	close(j.hold)
	set(-1, ModeDrain)
	eventually(t, "all of it, and its rate", func() bool { return j.done.Load() == 100 && p.Snapshot().Rate > 0 })
	eventually(t, "drained", func() bool { return p.count(StatePaused) == 3 })
	j.add(1)
	p.Kick()
	time.Sleep(20 * time.Millisecond)
	if n := j.done.Load(); n != 100 {
		t.Fatal("a drained pool took more")
	}
	set(-1, ModeRun)
	eventually(t, "the last", func() bool { return j.done.Load() == 101 })
	set(0, "")
	eventually(t, "nobody", func() bool { return len(p.Snapshot().Workers) == 0 })
	list, err := ListPools(r.ctx, r.db)
	if err != nil || len(list) != 1 || list[0].Stage != "test" || list[0].Size != 0 || list[0].Mode != ModeRun {
		t.Fatalf("%+v, %v", list, err)
	}
	for _, bad := range []struct {
		size int
		mode Mode
	}{{MaxPoolSize + 1, ""}, {1, "stop"}} {
		if err := SetPool(r.ctx, r.db, "test", bad.size, bad.mode); err == nil {
			t.Fatalf("%+v was taken", bad)
		}
	}
	stop()
	if info := p.Snapshot(); info.Items != 101 {
		t.Fatalf("%+v", info)
	}
}

func testPoolSurvives(t *testing.T, r *rig) {
	j := &jobs{}
	var made atomic.Int64
	p, _ := startPool(t, r, PoolConfig{Size: 2}, func() Worker { made.Add(1); return j })
	failing := func() error { return errTest }
	j.fail.Store(&failing)
	j.add(3)
	eventually(t, "failures", func() bool { return p.Snapshot().Errors >= 3 })
	panicking := func() error { panic("of the test") }
	j.fail.Store(&panicking)
	j.add(3)
	eventually(t, "panics", func() bool {
		for _, w := range p.Snapshot().Workers {
			if w.LastError == "panic: of the test" && !w.ErrorAt.IsZero() {
				return true
			}
		}
		return false
	})
	j.fail.Store(nil)
	j.add(10)
	eventually(t, "work", func() bool { return j.done.Load() >= 10 })
	if made.Load() < 6 {
		t.Fatalf("only %d workers were made", made.Load())
	}
	// The settings cannot be read: the pool goes on with the last ones and says so.
	r.exec(`ALTER TABLE waystage.pool RENAME TO pool2`)
	eventually(t, "the settings' failure", func() bool { return p.Snapshot().Settings != "" })
	j.add(10)
	eventually(t, "work", func() bool { return j.done.Load() >= 20 })
	r.exec(`ALTER TABLE waystage.pool2 RENAME TO pool`)
	eventually(t, "the settings", func() bool { return p.Snapshot().Settings == "" })
}

func testPoolShutdown(t *testing.T, r *rig) {
	j := &jobs{hold: make(chan struct{})}
	j.add(3)
	p, stop := startPool(t, r, PoolConfig{Size: 2}, func() Worker { return j })
	eventually(t, "two busy workers", func() bool { return p.count(StateBusy) == 2 })
	stop(func() { close(j.hold) }) // waits for both, and takes nothing more
	if n := j.done.Load(); n != 2 {
		t.Fatalf("%d done", n)
	}
	// What does not end within the grace is broken off.
	j = &jobs{hold: make(chan struct{})}
	j.add(1)
	p, stop = startPool(t, r, PoolConfig{Stage: "hasty", Grace: time.Millisecond}, func() Worker { return j })
	eventually(t, "a busy worker", func() bool { return p.count(StateBusy) == 1 })
	stop()
	if j.done.Load() != 0 {
		t.Fatal("done after all")
	}
	// A long-runner ends with the pool and is started again when it fails.
	var runs atomic.Int64
	var written atomic.Int64
	written.Store(7)
	p, stop = startPool(t, r, PoolConfig{Stage: "loop", Done: written.Load, Lag: func() int64 { return 42 }}, func() Worker {
		return loop(func(ctx context.Context) error {
			if runs.Add(1) < 3 {
				return errors.New("lost the lead")
			}
			<-ctx.Done()
			return ctx.Err()
		})
	})
	eventually(t, "the third run", func() bool { return runs.Load() == 3 && p.count(StateBusy) == 1 })
	written.Store(20)
	if s := p.Snapshot(); s.Items != 20 || s.Rate <= 0 || s.LagBytes != 42 {
		t.Fatalf("%+v", s)
	}
	if w := p.Snapshot().Workers[0]; w.Doing != "leading" || w.LastError != "lost the lead" {
		t.Fatalf("%+v", w)
	}
	if err := SetPool(r.ctx, r.db, "loop", -1, ModePause); err != nil {
		t.Fatal(err)
	}
	p.Wake()
	eventually(t, "pause", func() bool { return p.count(StatePaused) == 1 })
	stop()
}

// looks counts how often a worker looked for work, and finds none.
type looks struct{ n atomic.Int64 }

func (l *looks) Batch(context.Context, context.Context, func(string)) (int, error) {
	l.n.Add(1)
	return 0, nil
}

// An idle worker looks once and then waits for a kick or its time: it does not burn the machine.
func testPoolRests(t *testing.T, r *rig) {
	l := &looks{}
	p, stop := startPool(t, r, PoolConfig{Stage: "resting", Poll: time.Hour}, func() Worker { return l })
	const kicks = 50
	for i := int64(1); i <= kicks; i++ {
		eventually(t, "a look", func() bool { return l.n.Load() >= i })
		if n := l.n.Load(); n != i {
			t.Fatalf("%d looks after %d kicks", n, i-1)
		}
		p.Kick()
	}
	stop()
	if n := l.n.Load(); n > kicks+1 {
		t.Fatalf("%d looks after %d kicks", n, kicks)
	}
}
