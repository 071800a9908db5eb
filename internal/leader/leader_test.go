package leader

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.MainNoLeaks(m) }

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: never", what)
		}
	}
}

func TestOneLeads(t *testing.T) {
	dsn := pgtest.Mirror(t)
	ctx, cancel := context.WithCancel(context.Background())
	var active, most atomic.Int32
	var terms atomic.Int64
	done := make(chan error, 3)
	for range 3 {
		go func() {
			done <- Hold(ctx, dsn, ApplyUp, nil, func(ctx context.Context) error {
				terms.Add(1)
				n := active.Add(1)
				most.Store(max(most.Load(), n))
				<-ctx.Done()
				active.Add(-1)
				return ctx.Err()
			})
		}()
	}
	eventually(t, "the first leader", func() bool { return active.Load() == 1 })

	conn, err := pgx.Connect(context.Background(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE application_name = 'waystage leader 4' AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)`); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the next leader", func() bool { return terms.Load() >= 2 && active.Load() == 1 })
	cancel()
	for range 3 {
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Hold ended with %v", err)
		}
	}
}

func TestHoldReturnsWhatWorkReturned(t *testing.T) {
	want := errors.New("work is broken")
	if err := Hold(context.Background(), pgtest.Mirror(t), CaptureUp, nil, func(context.Context) error { return want }); !errors.Is(err, want) {
		t.Fatalf("got %v", err)
	}
}
