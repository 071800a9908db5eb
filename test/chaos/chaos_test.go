// Package chaos runs random histories: devices in processes of their own, clerks at the source, two servers on a broker of
// their own, and everything that can break, breaking. When users and faults have stopped and all is at rest, it holds what happened
// against what is promised (docs/chaos.md).
package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/waystage/waystage/internal/nettest"
	"github.com/waystage/waystage/protocol"
)

// What the environment says. Without any of it a few histories with random seeds run.
const (
	EnvSeeds  = "WAYSTAGE_CHAOS_SEEDS"  // how many histories
	EnvSeed   = "WAYSTAGE_CHAOS_SEED"   // the first one's seed; the others follow it
	EnvShrink = "WAYSTAGE_CHAOS_SHRINK" // 1: a failing plan is run again with less and less in it
	EnvKeep   = "WAYSTAGE_CHAOS_KEEP"   // folder for what failed histories leave
	EnvStop   = "WAYSTAGE_CHAOS_STOP"   // 1: no history after the first that fails
	EnvBinary = "WAYSTAGE_CHAOS_BINARY" // server program to test; without it the present sources are built
)

// TestHistories runs histories and reports each in one line.
func TestHistories(t *testing.T) {
	seeds, seed := 2, uint64(time.Now().UnixNano())
	number := func(name string, into func(uint64)) {
		if s := os.Getenv(name); s != "" {
			n, err := strconv.ParseUint(s, 10, 64)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			into(n)
		}
	}
	number(EnvSeeds, func(n uint64) { seeds = int(n) })
	number(EnvSeed, func(n uint64) { seed = n })
	fmt.Printf("chaos: %d histories from seed %d\n", seeds, seed)
	r := newRig(t)
	var sum outcome
	sum.faults = map[string]int{}
	failed := 0
	began := time.Now()
	ran := 0
	for i := range seeds {
		p := newPlan(seed + uint64(i))
		ran++
		o := r.run(t, p)
		fmt.Println("chaos:", o)
		sum.add(o)
		if len(o.failures) == 0 {
			continue
		}
		failed++
		for _, f := range o.failures {
			fmt.Println("chaos:    ", f)
		}
		fmt.Println("chaos: to repeat: make chaos SEEDS=1 SEED=" + strconv.FormatUint(p.Seed, 10))
		if os.Getenv(EnvShrink) == "1" {
			r.shrink(t, p, o)
		} else {
			fmt.Print(p)
		}
		if os.Getenv(EnvStop) == "1" {
			break
		}
	}
	sum.seed, sum.took = 0, time.Since(began)
	fmt.Printf("chaos: %d histories, %d failed, %s\n", ran, failed, sum)
	if sum.applied == 0 || sum.rejected+sum.refused == 0 || sum.edits == 0 || sum.office == 0 || len(sum.faults) == 0 {
		t.Error("nothing happened: the test proves nothing")
	}
}

// outcome of a history.
type outcome struct {
	seed                       uint64
	took                       time.Duration
	edits, office              int
	applied, rejected, refused int
	lost, doubled, exits       int
	faults                     map[string]int
	failures                   []string
}

func (o *outcome) add(p outcome) {
	o.edits, o.office = o.edits+p.edits, o.office+p.office
	o.applied, o.rejected, o.refused = o.applied+p.applied, o.rejected+p.rejected, o.refused+p.refused
	o.lost, o.doubled, o.exits = o.lost+p.lost, o.doubled+p.doubled, o.exits+p.exits
	for k, n := range p.faults {
		o.faults[k] += n
	}
}

func (o outcome) String() string {
	var faults []string
	total := 0
	for _, k := range sorted(o.faults) {
		faults = append(faults, fmt.Sprintf("%s %d", k, o.faults[k]))
		total += o.faults[k]
	}
	state := "ok"
	if len(o.failures) > 0 {
		state = fmt.Sprintf("FAILED (%d)", len(o.failures))
	}
	seed := ""
	if o.seed != 0 {
		seed = fmt.Sprintf("seed %d %s, ", o.seed, state)
	}
	return fmt.Sprintf("%s%.1fs, %d edits on devices, %d transactions of clerks, records: %d applied, %d rejected, %d refused, faults: %d (%s), messages lost %d, doubled %d, servers started again %d",
		seed, o.took.Seconds(), o.edits, o.office, o.applied, o.rejected, o.refused, total, strings.Join(faults, ", "), o.lost, o.doubled, o.exits)
}

// run runs a plan as a subtest.
func (r *rig) run(t *testing.T, p *plan) (o outcome) {
	o = outcome{seed: p.Seed, faults: map[string]int{}}
	began := time.Now()
	done := false
	t.Run(strconv.FormatUint(p.Seed, 10), func(t *testing.T) {
		dir, err := os.MkdirTemp(os.Getenv(EnvKeep), fmt.Sprintf("chaos-%d-", p.Seed))
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if t.Failed() {
				o.failures = append(o.failures, "see "+dir)
				return
			}
			_ = os.RemoveAll(dir)
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		t.Cleanup(cancel)
		h := &history{rig: r, t: t, ctx: ctx, plan: p, dir: dir, links: map[string]*nettest.Proxy{}, total: int64(p.steps()), began: began}
		h.counts.faults = o.faults
		h.must(os.WriteFile(filepath.Join(dir, "plan.txt"), []byte(p.String()), 0o600))
		h.build()
		h.storm()
		o.failures = h.judge(&o)
		o.office, o.lost, o.doubled = h.counts.office, h.counts.lost, h.counts.doubled
		for _, s := range h.servers {
			o.exits += s.Exits()
		}
		for _, f := range o.failures {
			t.Error(f)
		}
		done = true
	})
	o.took = time.Since(began)
	if !done {
		o.failures = append([]string{"bench: the history did not come to its end (see above)"}, o.failures...)
	}
	return o
}

// note writes a line to the history's timeline.
func (h *history) note(format string, args ...any) {
	h.timeline.Lock()
	defer h.timeline.Unlock()
	f, err := os.OpenFile(filepath.Join(h.dir, "timeline.txt"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	_, _ = fmt.Fprintf(f, "%s %7.3fs step %d: %s\n", time.Now().UTC().Format("15:04:05.000"), time.Since(h.began).Seconds(), h.done.Load(), fmt.Sprintf(format, args...))
	_ = f.Close()
}

// storm lets users work and things break, until all have done what the plan says.
func (h *history) storm() {
	h.note("begin")
	ctx, cancel := context.WithCancel(h.ctx)
	defer cancel()
	b := &breaker{h: h}
	var users, breaking, watching sync.WaitGroup
	h.acks = h.watchAcks()
	watch, stop := context.WithCancel(ctx)
	watching.Go(func() { h.acks.run(watch) })
	defer watching.Wait()
	defer stop()
	breaking.Go(func() { b.run(ctx) })
	errs := make([]error, len(h.devices))
	for i, u := range h.devices {
		users.Go(func() { errs[i] = u.work() })
	}
	for i, steps := range h.plan.Clerks {
		users.Go(func() { (&clerk{h: h, i: i}).work(steps) })
	}
	users.Wait()
	if errors.Join(errs...) != nil {
		cancel()
	}
	breaking.Wait()
	h.note("end")
	h.must(errors.Join(errs...))
	h.must(errors.Join(b.errs...))
}

// judge waits until all is at rest and checks what is promised.
func (h *history) judge(o *outcome) []string {
	if err := h.rest(); err != nil {
		h.note("%v", err)
		o.failures = append(o.failures, err.Error())
	} else {
		h.note("at rest")
		if err := h.stillness(); err != nil {
			o.failures = append(o.failures, err.Error())
		}
	}
	for _, u := range h.devices {
		if err := u.states(); err != nil {
			o.failures = append(o.failures, err.Error())
		}
		h.must(u.tell("end"))
		if _, err := u.until(func(answer) bool { return false }); !errors.Is(err, errEnded) {
			h.must(err)
		}
	}
	e, err := collect(h.ctx, h)
	h.must(err)
	c := &checker{h: h, evidence: e}
	h.must(c.check(h.ctx))
	slices.Sort(c.failures)
	o.failures = append(o.failures, c.failures...)
	if len(o.failures) > 0 {
		h.must(e.write(h.dir))
	}
	for i, journal := range e.journals {
		for _, j := range journal {
			if e.done[i][j.Step] {
				o.edits += len(j.Edits)
			}
		}
	}
	for _, r := range e.ledger {
		switch r.State {
		case protocol.Applied:
			o.applied++
		case protocol.Rejected:
			o.rejected++
		case protocol.Refused:
			o.refused++
		}
	}
	return o.failures
}

// rest syncs all devices until nothing is in flight: no edit without an outcome, nothing new, three times in a row.
func (h *history) rest() error {
	calm, mark := 0, ""
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = h.calm(&mark); err != nil {
			calm = 0
			h.note("not at rest: %v; %s", err, h.waiting())
			continue
		}
		if calm++; calm == 3 {
			return nil
		}
	}
	return fmt.Errorf("I1, I4: not at rest after %s: %w", patience, err)
}

// waiting tells where requests and records are, for the timeline.
func (h *history) waiting() string {
	ctx, cancel := context.WithTimeout(h.ctx, 10*time.Second)
	defer cancel()
	var out string
	if err := h.mirror.QueryRow(ctx, `SELECT format('sessions without a reply: %s; records pending: %s', (SELECT string_agg(user_name || '/' || device_name || '-' || n || ' ' || state, ', ') FROM waystage.session WHERE state IN ('staged', 'merged')),
		(SELECT count(*) FROM waystage.change WHERE state = 'merged'))`).Scan(&out); err != nil {
		return err.Error()
	}
	if nc, err := h.streams(); err == nil {
		defer nc.Close()
		if js, err := jetstream.New(nc); err == nil {
			if c, err := js.Consumer(ctx, "WS_IN", "intake"); err == nil {
				info := c.CachedInfo()
				out += fmt.Sprintf("; input queue: %d waiting, %d with a worker", info.NumPending, info.NumAckPending)
			}
		}
	}
	return out
}

func (h *history) calm(mark *string) error {
	for _, u := range h.devices {
		if err := u.tell("settle"); err != nil {
			return err
		}
	}
	var errs []error
	for _, u := range h.devices {
		a, err := u.until(func(a answer) bool { return a.Settled != nil })
		switch s := a.Settled; {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", u.task.Name, err))
		case s.Error != "":
			errs = append(errs, fmt.Errorf("%s: %s", u.task.Name, s.Error))
		case s.Unsent+s.Sent+s.Merged > 0 || s.Rows+s.Deleted > 0:
			errs = append(errs, fmt.Errorf("%s: %d unsent, %d sent, %d merged; %d rows came, %d went", u.task.Name, s.Unsent, s.Sent, s.Merged, s.Rows, s.Deleted))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(h.ctx, 10*time.Second)
	defer cancel()
	var pending int
	if err := h.mirror.QueryRow(ctx, "SELECT (SELECT count(*) FROM waystage.change WHERE state = 'merged') + (SELECT count(*) FROM waystage.staging)").Scan(&pending); err != nil {
		return err
	}
	if pending > 0 {
		return fmt.Errorf("%d records are pending", pending)
	}
	if *mark == "" {
		if err := h.source.QueryRow(ctx, "SELECT pg_current_wal_insert_lsn()::text").Scan(mark); err != nil {
			return err
		}
	}
	var passed bool
	if err := h.mirror.QueryRow(ctx, "SELECT position >= $1::text::pg_lsn FROM waystage.progress WHERE direction = 'down'", *mark).Scan(&passed); err != nil {
		return err
	}
	if !passed { // the position moves with transactions that are published: make one
		_, err := h.source.Exec(ctx, "UPDATE c.area SET owner = owner WHERE id = 6")
		return errors.Join(fmt.Errorf("the mirror is not at %s yet", *mark), err)
	}
	return nil
}

// stillness waits for a time in which nothing moves: no position, no counter, no message (I12).
func (h *history) stillness() error {
	var last []string
	since := time.Now()
	var moved string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		now, err := h.figures()
		if err != nil {
			return err
		}
		if !slices.Equal(now, last) {
			for i := range last {
				if last[i] != now[i] {
					moved = last[i] + " -> " + now[i]
				}
			}
			last, since = now, time.Now()
			continue
		}
		if time.Since(since) >= quiet {
			return nil
		}
	}
	return fmt.Errorf("I12: with no user at work something still moves: %s", moved)
}

func (h *history) figures() ([]string, error) {
	ctx, cancel := context.WithTimeout(h.ctx, 10*time.Second)
	defer cancel()
	var out []string
	rows, err := h.source.Query(ctx, "SELECT 'source: seq ' || seq || ' position ' || position FROM waystage.progress UNION ALL SELECT 'source: writes ' || count(*) FROM audit.entry")
	if err != nil {
		return nil, err
	}
	list, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	out = append(out, list...)
	rows, err = h.mirror.Query(ctx, `(SELECT 'mirror: ' || direction || ' seq ' || seq || ' position ' || position || ' up_seq ' || up_seq FROM waystage.progress ORDER BY direction)
		UNION ALL SELECT 'mirror: writes ' || count(*) FROM audit.entry
		UNION ALL SELECT 'mirror: ledger ' || count(*) || ', last stamp ' || coalesce(max(stamp), 0) FROM waystage.change
		UNION ALL SELECT 'mirror: tombstones ' || count(*) FROM waystage.tombstone
		UNION ALL SELECT 'mirror: sessions ' || count(*) FROM waystage.session`)
	if err != nil {
		return nil, err
	}
	if list, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
		return nil, err
	}
	out = append(out, list...)
	nc, err := h.streams()
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"WS_IN", "WS_OUT", "WS_CD_UP", "WS_CD_DOWN", "WS_DLQ"} {
		s, err := js.Stream(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("stream %s: %w", name, err)
		}
		st := s.CachedInfo().State
		out = append(out, fmt.Sprintf("stream %s: %d messages, last %d", name, st.Msgs, st.LastSeq))
	}
	return out, nil
}

// states asks for every session of the device (I9).
func (u *unit) states() error {
	if err := u.tell("states"); err != nil {
		return err
	}
	a, err := u.until(func(a answer) bool { return a.Settled != nil })
	if err != nil {
		return err
	}
	if a.Settled.Error != "" {
		return fmt.Errorf("I9: %s cannot ask for the state of its sessions: %s", u.task.Name, a.Settled.Error)
	}
	for _, session := range sorted(a.Settled.States) {
		if state := a.Settled.States[session]; state != "replied" {
			return fmt.Errorf("I9: %s asks for session %s, which was answered, and hears %q", u.task.Name, session, state)
		}
	}
	return nil
}

// shrink runs a failing plan with less and less in it, for as long as the same promise breaks, and prints the least.
func (r *rig) shrink(t *testing.T, p *plan, o outcome) {
	const most = 40
	promise := func(o outcome) string {
		name, _, _ := strings.Cut(o.failures[0], ":")
		return name
	}
	want, runs := promise(o), 0
	breaks := func(q *plan) bool {
		for range 2 { // timing is not repeated: one run that passes says little
			if runs++; runs > most {
				return false
			}
			if o := r.run(t, q); len(o.failures) > 0 && promise(o) == want {
				return true
			}
		}
		return false
	}
	fmt.Printf("chaos: shrinking what broke %s\n", want)
	for size := (len(p.Faults) + 1) / 2; size > 0; size /= 2 {
		for at := 0; at < len(p.Faults); {
			q := *p
			q.Faults = slices.Delete(slices.Clone(p.Faults), at, min(at+size, len(p.Faults)))
			if breaks(&q) {
				p = &q
			} else {
				at += size
			}
		}
	}
	for i := len(p.Devices) - 1; i >= 0; i-- {
		q := *p
		q.Devices = slices.Delete(slices.Clone(p.Devices), i, i+1)
		if len(q.Devices) > 0 && breaks(&q) {
			p = &q
		}
	}
	for i := len(p.Clerks) - 1; i >= 0; i-- {
		q := *p
		q.Clerks = slices.Delete(slices.Clone(p.Clerks), i, i+1)
		if breaks(&q) {
			p = &q
		}
	}
	fmt.Printf("chaos: the least that broke %s, after %d runs:\n%s", want, runs, p)
}
