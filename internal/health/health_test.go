package health

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// serve runs a server on a free port and answers its base address.
func serve(t *testing.T, s *Server) string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l, err := s.Listen(ctx)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String()
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestReadiness(t *testing.T) {
	var broken atomic.Bool
	s := New(Config{Listen: "127.0.0.1:0", Version: "1.2.3", Checks: []Check{
		{Name: "mirror", Run: func(context.Context) error { return nil }},
		{Name: "source", Run: func(context.Context) error {
			if broken.Load() {
				return errors.New("host db-7 refuses")
			}
			return nil
		}},
	}}, nil)
	base := serve(t, s)
	if code, body := get(t, base+"/healthz"); code != 200 || !strings.Contains(body, "1.2.3") {
		t.Errorf("healthz: %d %s", code, body)
	}
	if code, body := get(t, base+"/readyz"); code != 200 || body != "ready\n" {
		t.Errorf("readyz: %d %q", code, body)
	}
	broken.Store(true)
	s.mu.Lock()
	s.at = time.Time{} // as if the second had passed
	s.mu.Unlock()
	code, body := get(t, base+"/readyz")
	if code != 503 || !strings.Contains(body, "not ready: source") || strings.Contains(body, "db-7") {
		t.Errorf("readyz with a broken source: %d %q", code, body)
	}
	code, body = get(t, base+"/readyz?verbose")
	var v struct {
		Ready  bool
		Checks []Outcome
	}
	if err := json.Unmarshal([]byte(body), &v); err != nil || code != 503 || v.Ready || len(v.Checks) != 2 || !v.Checks[0].OK || v.Checks[1].Error != "host db-7 refuses" {
		t.Errorf("readyz?verbose: %d %s %v", code, body, err)
	}
	if code, _ := get(t, base+"/healthz"); code != 200 {
		t.Errorf("a broken source makes the process look dead: %d", code)
	}
	if code, _ := get(t, base+"/metrics"); code != 404 {
		t.Errorf("metrics without a registry: %d", code)
	}
}

func TestLeavingIsNotReady(t *testing.T) {
	s := New(Config{Listen: "127.0.0.1:0"}, nil)
	base := serve(t, s)
	s.Leave()
	if code, body := get(t, base+"/readyz"); code != 503 || !strings.Contains(body, "shutdown") {
		t.Errorf("%d %q", code, body)
	}
}

func TestHangingCheckIsBounded(t *testing.T) {
	s := New(Config{Checks: []Check{{Name: "hangs", Run: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }}}}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // the caller has hung up: the check must not be counted as failed for that
	start := time.Now()
	out, ok := s.Check(ctx)
	if ok || len(out) != 1 || time.Since(start) < checkTimeout || time.Since(start) > 10*checkTimeout {
		t.Errorf("%v %v after %v", out, ok, time.Since(start))
	}
}

func TestChecksRunAtMostOnceASecond(t *testing.T) {
	var runs atomic.Int64
	s := New(Config{Checks: []Check{{Name: "counts", Run: func(context.Context) error { runs.Add(1); return nil }}}}, nil)
	start := time.Now()
	for range 1000 {
		s.Check(context.Background())
	}
	if most := 1 + int64(time.Since(start)/checkEvery); runs.Load() > most {
		t.Errorf("%d runs, want at most %d", runs.Load(), most)
	}
}

func TestMetrics(t *testing.T) {
	safe := int64(1 << 30)
	full := Snapshot{At: time.Now(), Epoch: "e",
		Down:    Direction{Slot: "d", SlotStatus: "reserved", SlotActive: true, LagBytes: 77, LagSeconds: 1.5, RetainedBytes: 4096, SafeBytes: &safe},
		Up:      Direction{Slot: "u", SlotStatus: "lost"},
		Rejects: map[string]int64{"stale_version": 3}, Queues: []Queue{{Name: "WS_IN", Messages: 5, Bytes: 50}},
		Pools: []Pool{{"merge", 3, "pause"}}, Pending: Pending{Records: 9}}
	var failing atomic.Bool
	var reads atomic.Int64
	c := NewCollector(func(context.Context) (Snapshot, error) {
		reads.Add(1)
		if failing.Load() {
			return Snapshot{}, errors.New("gone")
		}
		return full, nil
	}, time.Hour, nil)
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(c)
	base := serve(t, New(Config{Listen: "127.0.0.1:0", Metrics: reg}, nil))
	for range 2 {
		_, body := get(t, base+"/metrics")
		for _, want := range []string{
			"waystage_snapshot_ok 1", `waystage_replication_lag_bytes{direction="down"} 77`, `waystage_replication_lag_seconds{direction="down"} 1.5`,
			`waystage_slot_retained_bytes{direction="down"} 4096`, `waystage_slot_ok{direction="up"} 0`, `waystage_slot_ok{direction="down"} 1`,
			`waystage_slot_safe_bytes{direction="down"} 1.073741824e+09`, `waystage_queue_messages{queue="WS_IN"} 5`,
			`waystage_rejected_records{reason="stale_version"} 3`, `waystage_pool_size{stage="merge"} 3`, `waystage_pool_running{stage="merge"} 0`,
			"waystage_pending_records 9", `waystage_xmin_age_transactions{database="mirror"} 0`,
		} {
			if !strings.Contains(body, want+"\n") {
				t.Errorf("no %s in\n%s", want, body)
			}
		}
	}
	if reads.Load() != 1 {
		t.Errorf("two scrapes read %d times", reads.Load())
	}
	failing.Store(true)
	c.mu.Lock()
	c.at = time.Time{}
	c.mu.Unlock()
	if code, body := get(t, base+"/metrics"); code != 200 || !strings.Contains(body, "waystage_snapshot_ok 0\n") {
		t.Errorf("%d %s", code, body)
	}
}

func TestBehind(t *testing.T) {
	at := time.Unix(1000, 0)
	var k track
	step := func(seconds int, written, applied int64, want float64, wantKnown bool) {
		t.Helper()
		got, known := k.behind(at.Add(time.Duration(seconds)*time.Second), written, applied)
		if got != want || known != wantKnown {
			t.Errorf("after %d s: %v %v, want %v %v", seconds, got, known, want, wantKnown)
		}
	}
	step(0, 100, 50, 0, false)  // a backlog at the first look: nobody knows how old
	step(1, 100, 100, 0, true)  // all applied
	step(2, 200, 100, 1, true)  // written within the last second
	step(5, 300, 100, 4, true)  // still
	step(6, 300, 250, 4, true)  // what stood there at 2 is applied since
	step(7, 300, 300, 0, true)  // all applied
	step(9, 50, 10, 0, false)   // another server
	step(10, 50, 50, 0, true)   //
	step(3600, 50, 50, 0, true) // an idle hour is no lag
}

func TestBehindKeepsBoundedHistory(t *testing.T) {
	var k track
	at := time.Unix(0, 0)
	for i := range 20_000 {
		k.behind(at.Add(time.Duration(i)*time.Second), int64(i+1), 0)
	}
	if len(k.seen) > 4096 {
		t.Errorf("%d marks are kept", len(k.seen))
	}
	if got, known := k.behind(at.Add(20_000*time.Second), 20_000, 0); !known || got < 19_000 {
		t.Errorf("%v %v", got, known)
	}
}

func TestAdvisoryChecksAreToldAndDoNotCount(t *testing.T) {
	s := New(Config{Checks: []Check{{Name: "tables", Advisory: true, Run: func(context.Context) error { return errors.New("table a is stopped") }}}}, nil)
	outcomes, ok := s.Check(t.Context())
	if !ok || !outcomes[0].OK || outcomes[0].Note != "table a is stopped" || outcomes[0].Error != "" {
		t.Fatalf("%v %+v", ok, outcomes)
	}
}
