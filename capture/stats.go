package capture

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/schema"
)

// Stats says how a capture is doing.
type Stats struct {
	State         string     `json:"state"` // standby, connecting, streaming, waiting, failed, stopped
	Error         string     `json:"error,omitempty"`
	Since         time.Time  `json:"since"`
	Run           string     `json:"run,omitempty"`
	ServerEnd     change.LSN `json:"server_end"`     // end of the server's log, as last heard
	Captured      change.LSN `json:"captured"`       // end of the last transaction handed to the queue
	Durable       change.LSN `json:"durable"`        // the target has everything up to here
	LagBytes      int64      `json:"lag_bytes"`      // log that the target does not have yet, 0 when nothing is in flight
	LastCommit    time.Time  `json:"last_commit"`    // commit time of the last captured transaction, by the server's clock
	RetainedBytes int64      `json:"retained_bytes"` // log that the server keeps for the slot
	SafeBytes     *int64     `json:"safe_bytes"`     // log that may still be written before the slot is lost; null: no limit
	WALStatus     string     `json:"wal_status"`     // reserved, extended, unreserved, lost
	Messages      uint64     `json:"messages"`
	Transactions  uint64     `json:"transactions"`
	Rows          uint64     `json:"rows"`
	Bytes         uint64     `json:"bytes"`
	Runs          uint64     `json:"runs"`
}

type state struct {
	mu sync.Mutex
	s  Stats
}

func (s *state) with(fn func(*Stats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fn(&s.s)
}

func (s *state) set(name string, err error) {
	s.with(func(st *Stats) {
		if st.State == "failed" && name == "stopped" {
			return // why it stopped says more
		}
		st.State, st.Since, st.Error = name, time.Now(), ""
		if err != nil {
			st.Error = err.Error()
		}
	})
}

func (s *state) begin(run string, durable change.LSN) {
	s.with(func(st *Stats) {
		st.State, st.Since, st.Error, st.Run = "streaming", time.Now(), "", run
		st.Captured, st.Durable = durable, durable
		st.Runs++
	})
}

func (s *state) server(end change.LSN) {
	s.with(func(st *Stats) { st.ServerEnd = max(st.ServerEnd, end) })
}
func (s *state) durable(lsn change.LSN) { s.with(func(st *Stats) { st.Durable = lsn }) }

func (s *state) captured(end change.LSN, committed time.Time) {
	s.with(func(st *Stats) {
		st.Captured, st.ServerEnd, st.LastCommit = max(st.Captured, end), max(st.ServerEnd, end), committed
	})
}

func (s *state) published(m *change.Message) {
	s.with(func(st *Stats) {
		st.Messages++
		st.Transactions += uint64(m.Txs)
		st.Rows += uint64(m.Rows)
		st.Bytes += uint64(len(m.Body))
	})
}

func (s *state) lagging() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.s.Captured > s.s.Durable
}

// Stats is a copy of the current figures.
func (c *Capture) Stats() Stats {
	c.state.mu.Lock()
	defer c.state.mu.Unlock()
	st := c.state.s
	if st.Captured > st.Durable {
		st.LagBytes = int64(max(st.ServerEnd, st.Captured) - st.Durable)
	}
	return st
}

const (
	watchEvery = 5 * time.Second
	warnSafe   = 512 << 20 // bytes of log left before the slot is lost
)

// watch looks at the slot from outside: what it costs the server, and whether it still exists. Trouble with its own
// connection is not the stream's.
func (c *Capture) watch(ctx context.Context) error {
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close(context.WithoutCancel(ctx))
		}
	}()
	guard := guard{c: c}
	defer guard.close()
	for warned := false; ; {
		if conn == nil || conn.IsClosed() {
			if next, err := schema.Connect(ctx, c.cfg.Server, c.cfg.application()); err == nil {
				conn = next
			}
		}
		if conn != nil && !conn.IsClosed() {
			var status, reason string
			var retained int64
			var safe *int64
			look, cancel := context.WithTimeout(ctx, c.cfg.Silence)
			err := conn.QueryRow(look, `SELECT coalesce(wal_status, ''), coalesce(to_jsonb(s)->>'invalidation_reason', ''),
				coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint, safe_wal_size
				FROM pg_replication_slots s WHERE slot_name = $1`, c.cfg.Slot).Scan(&status, &reason, &retained, &safe)
			cancel()
			if err == nil {
				c.state.with(func(st *Stats) { st.WALStatus, st.RetainedBytes, st.SafeBytes = status, retained, safe })
				if lost := schema.SlotTrouble(status, reason); lost != "" {
					return &Error{CodeSlotLost, fmt.Sprintf("slot %q %s", c.cfg.Slot, lost), remedyResync}
				}
				if low := safe != nil && *safe < warnSafe; low != warned {
					warned = low
					if low {
						c.log.Warn("the server will soon give the slot up: the target lags too far behind")
					}
				}
				if err := guard.look(ctx, conn); err != nil {
					return err
				}
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(watchEvery):
		}
	}
}

// guard looks after the source's publication.
type guard struct {
	c      *Capture
	mirror *pgx.Conn
	failed string // the trouble that was logged last
}

func (g *guard) close() {
	if g.mirror != nil {
		closePg(g.mirror.PgConn())
	}
}

// look returns an *Error only.
func (g *guard) look(ctx context.Context, source *pgx.Conn) error {
	if g.c.cfg.Direction != Down {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, g.c.cfg.Silence)
	defer cancel()
	if g.mirror == nil || g.mirror.IsClosed() {
		conn, err := schema.Connect(ctx, g.c.cfg.Mirror, g.c.cfg.application())
		if err != nil {
			return nil // the run notices too
		}
		g.mirror = conn
	}
	found, err := schema.GuardPublication(ctx, g.c.cfg.Publication, source, g.mirror, g.c.log)
	for _, f := range found {
		g.c.log.Error("the source's publication has changed", zap.String("found", f))
	}
	switch {
	case errors.Is(err, schema.ErrNoPublication):
		return &Error{CodePublication, fmt.Sprintf("publication %q is gone from the source, or was dropped and made again: changes are missing", g.c.cfg.Publication), remedyResync}
	case err != nil && ctx.Err() == nil && err.Error() != g.failed:
		g.failed = err.Error()
		g.c.log.Error("the source's publication cannot be looked after", zap.Error(err))
	}
	return nil
}

// Metrics are the capture's figures for Prometheus.
func (c *Capture) Metrics() []prometheus.Collector { return []prometheus.Collector{collector{c}} }

type collector struct{ c *Capture }

// Describe implements prometheus.Collector. It sends nothing: both directions have the same names.
func (collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (k collector) Collect(ch chan<- prometheus.Metric) {
	st := k.c.Stats()
	labels := prometheus.Labels{"direction": k.c.cfg.Direction}
	send := func(kind prometheus.ValueType, name, help string, v float64) {
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("waystage_capture_"+name, help, nil, labels), kind, v)
	}
	up := 0.0
	if st.State == "streaming" {
		up = 1
	}
	send(prometheus.GaugeValue, "streaming", "1 while this process captures.", up)
	send(prometheus.GaugeValue, "lag_bytes", "Log that the target does not have yet.", float64(st.LagBytes))
	send(prometheus.GaugeValue, "slot_retained_bytes", "Log that the server keeps for the slot.", float64(st.RetainedBytes))
	if st.SafeBytes != nil {
		send(prometheus.GaugeValue, "slot_safe_bytes", "Log that may be written before the slot is lost.", float64(*st.SafeBytes))
	}
	send(prometheus.CounterValue, "messages_total", "Change data messages published.", float64(st.Messages))
	send(prometheus.CounterValue, "transactions_total", "Transactions published.", float64(st.Transactions))
	send(prometheus.CounterValue, "rows_total", "Row changes published.", float64(st.Rows))
	send(prometheus.CounterValue, "bytes_total", "Bytes of change data published.", float64(st.Bytes))
	send(prometheus.CounterValue, "runs_total", "Runs begun: every one reads the slot again from what the target has.", float64(st.Runs))
}
