package capture

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/schema"
)

func TestMain(m *testing.M) { pgtest.MainNoLeaks(m) }

// fakeQueue keeps what is published, or refuses it.
type fakeQueue struct {
	mu     sync.Mutex
	msgs   []change.Message
	refuse error
	fail   int // the next so many messages are refused, later ones are not
	resets int
}

type fakeReceipt struct{ err error }

func (r fakeReceipt) Wait(context.Context) error { return r.err }

func (q *fakeQueue) PublishChange(_ context.Context, m *change.Message) (Receipt, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.refuse != nil {
		return fakeReceipt{q.refuse}, nil
	}
	if q.fail > 0 {
		q.fail--
		return fakeReceipt{errors.New("refused")}, nil
	}
	c := *m
	c.Body = slices.Clone(m.Body)
	q.msgs = append(q.msgs, c)
	return fakeReceipt{}, nil
}

func (q *fakeQueue) ResetChanges(context.Context) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.resets++
	q.msgs = nil
	return nil
}

func (q *fakeQueue) set(fn func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	fn()
}

// rows counts the row messages that wait in the queue, and the end of the last group.
func (q *fakeQueue) rows() (n int, end change.LSN) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, m := range q.msgs {
		n += m.Rows
		if m.Last {
			end = max(end, m.End)
		}
	}
	return n, end
}

type rig struct {
	t       *testing.T
	ctx     context.Context
	cfg     Config
	q       *fakeQueue
	server  *pgx.Conn
	mirror  *pgx.Conn
	capture *Capture
	stop    context.CancelFunc
	done    chan error
}

func newRig(t *testing.T, server string) *rig {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	mirror := pgtest.Mirror(t)
	if err := schema.MigrateMirror(ctx, mirror); err != nil {
		t.Fatal(err)
	}
	q := &fakeQueue{}
	slot := fmt.Sprintf("waystage_test_%d", time.Now().UnixNano())
	r := &rig{t: t, ctx: ctx, q: q, cfg: Config{Direction: Down, Server: server, Mirror: mirror, Slot: slot, Publication: "odd \"pub's", Queue: q, Log: zap.NewNop()}}
	if testing.Verbose() {
		r.cfg.Log = zaptest.NewLogger(t)
	}
	r.server, r.mirror = r.connect(server), r.connect(mirror)
	r.exec(r.server, "CREATE TABLE public.t (id int PRIMARY KEY, v text)", "CREATE TABLE public.unpublished (v text)", `CREATE PUBLICATION "odd ""pub's" FOR TABLE public.t`)
	var at string
	if err := r.server.QueryRow(ctx, "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput')", slot).Scan(&at); err != nil {
		t.Fatal(err)
	}
	r.exec(r.mirror, fmt.Sprintf("INSERT INTO waystage.progress (direction, position) VALUES ('down', '%s')", at))
	t.Cleanup(r.halt)
	return r
}

func (r *rig) connect(dsn string) *pgx.Conn {
	r.t.Helper()
	conn, err := schema.Connect(r.ctx, dsn, "test")
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func (r *rig) exec(conn *pgx.Conn, sqls ...string) {
	r.t.Helper()
	for _, sql := range sqls {
		if _, err := conn.Exec(r.ctx, sql); err != nil {
			r.t.Fatalf("%s: %v", sql, err)
		}
	}
}

func (r *rig) run() {
	r.capture = New(r.cfg)
	ctx, stop := context.WithCancel(r.ctx)
	r.stop, r.done = stop, make(chan error, 1)
	c, done := r.capture, r.done
	go func() { done <- c.Run(ctx) }()
}

func (r *rig) halt() {
	if r.done == nil {
		return
	}
	r.stop()
	if err := <-r.done; !errors.Is(err, context.Canceled) {
		r.t.Errorf("capture ended: %v", err)
	}
	r.done = nil
}

// fatal waits for the capture to give up and returns why.
func (r *rig) fatal() *Error {
	r.t.Helper()
	select {
	case err := <-r.done:
		r.done = nil
		var own *Error
		if !errors.As(err, &own) || own.Remedy == "" {
			r.t.Fatalf("ended with %v", err)
		}
		if st := r.capture.Stats(); st.State != "failed" || st.Error == "" {
			r.t.Errorf("state after a fatal error: %+v", st)
		}
		return own
	case <-time.After(time.Minute):
		r.t.Fatalf("did not give up: %+v", r.capture.Stats())
		return nil
	}
}

func (r *rig) eventually(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%s: never. %+v", what, r.capture.Stats())
		}
	}
}

func (r *rig) lsn(conn *pgx.Conn, sql string, args ...any) change.LSN {
	r.t.Helper()
	var text string
	if err := conn.QueryRow(r.ctx, sql, args...).Scan(&text); err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
	l, err := change.ParseLSN(text)
	if err != nil {
		r.t.Fatal(err)
	}
	return l
}

func (r *rig) confirmed() change.LSN {
	return r.lsn(r.server, "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1", r.cfg.Slot)
}

// apply makes everything that is in the queue durable at the target.
func (r *rig) apply() {
	r.t.Helper()
	_, end := r.q.rows()
	r.exec(r.mirror, fmt.Sprintf("UPDATE waystage.progress SET position = greatest(position, '%s') WHERE direction = 'down'", end))
}

func TestStandbyWaitsForTheSlot(t *testing.T) {
	r := newRig(t, pgtest.Source(t))
	r.run()
	second := New(r.cfg)
	ctx, stop := context.WithCancel(r.ctx)
	done := make(chan error, 1)
	go func() { done <- second.Run(ctx) }()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.eventually("one of them captures", func() bool { n, _ := r.q.rows(); return n == 1 })
	r.halt()
	r.exec(r.server, "INSERT INTO public.t VALUES (2, 'x')")
	r.eventually("the other one", func() bool { n, _ := r.q.rows(); return n == 2 })
	stop()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("ended: %v", err)
	}
}

func TestFatalTrouble(t *testing.T) {
	r := newRig(t, pgtest.Source(t))
	expect := func(code Code) {
		t.Helper()
		r.run()
		if err := r.fatal(); err.Code != code {
			t.Errorf("%s, want %s", err, code)
		}
	}
	r.exec(r.mirror, "UPDATE waystage.progress SET system = '1'")
	expect(CodeSystem)
	r.exec(r.mirror, "UPDATE waystage.progress SET system = ''")

	r.exec(r.mirror, "UPDATE waystage.progress SET position = '7FFFFFFF/0'")
	expect(CodeServerBack)
	r.exec(r.mirror, "UPDATE waystage.progress SET position = '0/1'")
	expect(CodeSlotAhead) // somebody else has read it
	r.exec(r.mirror, "DELETE FROM waystage.progress")
	expect(CodeProgress)
	r.exec(r.mirror, "INSERT INTO waystage.progress (direction, position) VALUES ('down', '"+r.confirmed().String()+"')")

	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.eventually("streaming", func() bool { n, _ := r.q.rows(); return n == 1 })
	r.halt()
	r.eventually("the slot is free", func() bool {
		_, err := r.server.Exec(r.ctx, "SELECT pg_drop_replication_slot($1)", r.cfg.Slot)
		return err == nil
	})
	expect(CodeSlotMissing)
	r.exec(r.server, "SELECT pg_create_physical_replication_slot('"+r.cfg.Slot+"')")
	expect(CodeSlotForeign)
	r.exec(r.server, "SELECT pg_drop_replication_slot('"+r.cfg.Slot+"')")
}

func TestCaptureGoesOn(t *testing.T) {
	r := newRig(t, pgtest.Source(t))
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')", "INSERT INTO public.t VALUES (2, 'x')")
	r.eventually("the first rows", func() bool { n, _ := r.q.rows(); return n == 2 })

	// The walsender is ended: another run.
	r.exec(r.server, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '"+r.cfg.Slot+"'")
	r.eventually("another run", func() bool { return r.capture.Stats().Runs == 2 })
	r.eventually("everything that is not durable again", func() bool { n, _ := r.q.rows(); return n == 2 })

	// The applier asks for another run.
	r.apply()
	r.exec(r.mirror, "UPDATE waystage.progress SET rewind = true")
	r.eventually("a run on request", func() bool { return r.capture.Stats().Runs == 3 })
	r.exec(r.server, "INSERT INTO public.t VALUES (1000, 'x')")
	r.eventually("only what is new", func() bool { n, _ := r.q.rows(); return n == 1 })
	var rewind bool
	if err := r.mirror.QueryRow(r.ctx, "SELECT rewind FROM waystage.progress").Scan(&rewind); err != nil || rewind {
		t.Errorf("rewind is still set: %v %v", rewind, err)
	}

	// The stream vanishes, or stores messages out of order.
	r.q.set(func() { r.q.refuse = fmt.Errorf("wrapped: %w", ErrStreamLost) })
	r.exec(r.server, "INSERT INTO public.t VALUES (1001, 'x')")
	r.eventually("a run because the stream is gone", func() bool { return r.capture.Stats().State == "waiting" })
	r.q.set(func() { r.q.refuse = nil })
	r.eventually("all of it again", func() bool { n, _ := r.q.rows(); return n == 2 })
	r.q.set(func() { r.q.fail = 1 })
	r.exec(r.server, "INSERT INTO public.t VALUES (1002, 'x')")
	r.exec(r.server, "INSERT INTO public.t VALUES (1003, 'x')")
	r.eventually("nothing is missing", func() bool { n, _ := r.q.rows(); return n == 4 })
}
