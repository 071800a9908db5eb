// Package health tells the outside world how the server is: one HTTP listener with /healthz (the process lives),
// /readyz (it can work: databases, broker, migrations, slots; ?verbose lists the checks) and /metrics (Prometheus).
//
// It promises that a question is answered within seconds, whatever hangs behind it, that lag never makes a process
// unready (or all of them would drop out together), and that checks cost the databases at most one query a second.
// cmd calls it; the status command uses the same snapshot.
package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
)

// Check is one condition of readiness.
type Check struct {
	Name     string
	Run      func(context.Context) error
	Advisory bool // what it finds is told, but does not make the process unready
}

// Config says what to serve.
type Config struct {
	Listen  string              // address, e.g. "127.0.0.1:8222"; port 0 takes a free one
	Checks  []Check             // run at most once a second, each at most 3 s
	Metrics prometheus.Gatherer // nil: no /metrics
	Version string              // told by /healthz
}

// Server is the listener.
type Server struct {
	config   Config
	log      *zap.Logger
	leaving  atomic.Bool
	mu       sync.Mutex // held while the checks run
	at       time.Time
	outcomes []Outcome
}

// Outcome is what one check found.
type Outcome struct {
	Name  string    `json:"name"`
	OK    bool      `json:"ok"`
	Error string    `json:"error,omitempty"`
	Note  string    `json:"note,omitempty"` // what an advisory check found
	At    time.Time `json:"at"`
	Took  float64   `json:"took_seconds"`
}

// New makes a server; Listen and Run start it.
func New(c Config, log *zap.Logger) *Server {
	if log == nil {
		log = zap.NewNop()
	}
	return &Server{config: c, log: log}
}

// Leave makes /readyz fail from now on: the process is shutting down and wants no new work.
func (s *Server) Leave() { s.leaving.Store(true) }

// Listen opens the address, so that the caller can name it before Run serves it.
func (s *Server) Listen(ctx context.Context) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", s.config.Listen)
	if err != nil {
		return nil, fmt.Errorf("health.listen %s: %w", s.config.Listen, err)
	}
	return l, nil
}

// Run serves until the context ends.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	h := &http.Server{Handler: s.Handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		IdleTimeout: time.Minute, ErrorLog: zap.NewStdLog(s.log)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if h.Shutdown(stop) != nil {
			_ = h.Close()
		}
	}()
	err := h.Serve(l)
	if errors.Is(err, http.ErrServerClosed) {
		<-done
		return nil
	}
	return fmt.Errorf("health: %w", err)
}

// Handler serves the three paths.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	live := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "ok %s\n", s.config.Version)
	}
	mux.HandleFunc("GET /healthz", live)
	mux.HandleFunc("GET /livez", live)
	mux.HandleFunc("GET /readyz", s.ready)
	if s.config.Metrics != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(s.config.Metrics, promhttp.HandlerOpts{ErrorLog: zap.NewStdLog(s.log)}))
	}
	return mux
}

func (s *Server) ready(w http.ResponseWriter, r *http.Request) {
	outcomes, ok := s.Check(r.Context())
	code := http.StatusOK
	if !ok {
		code = http.StatusServiceUnavailable
	}
	if r.URL.Query().Has("verbose") {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(struct {
			Ready  bool      `json:"ready"`
			Checks []Outcome `json:"checks"`
		}{ok, outcomes})
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	if ok {
		fmt.Fprintln(w, "ready")
		return
	}
	for _, o := range outcomes {
		if !o.OK {
			fmt.Fprintf(w, "not ready: %s\n", o.Name) // the reason may name hosts: only ?verbose tells it
		}
	}
}

const (
	checkEvery   = time.Second
	checkTimeout = 3 * time.Second
)

// Check runs the checks, or answers what they found within the last second.
func (s *Server) Check(ctx context.Context) ([]Outcome, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.at) >= checkEvery || s.outcomes == nil {
		s.outcomes = s.runAll(context.WithoutCancel(ctx)) // one caller's hanging up must not colour the others' answer
		s.at = time.Now()
	}
	all := s.outcomes
	if s.leaving.Load() {
		all = append([]Outcome{{Name: "shutdown", Error: "the process is leaving", At: time.Now()}}, all...)
	}
	ok := true
	for _, o := range all {
		ok = ok && o.OK
	}
	return all, ok
}

func (s *Server) runAll(ctx context.Context) []Outcome {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	out := make([]Outcome, len(s.config.Checks))
	var wg sync.WaitGroup
	for i, c := range s.config.Checks {
		wg.Go(func() {
			start := time.Now()
			err := c.Run(ctx)
			out[i] = Outcome{Name: c.Name, OK: err == nil || c.Advisory, At: time.Now(), Took: time.Since(start).Seconds()}
			switch {
			case err == nil:
			case c.Advisory:
				out[i].Note = err.Error()
			default:
				out[i].Error = err.Error()
			}
		})
	}
	wg.Wait()
	return out
}
