package apply

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/waystage/waystage/change"
)

// Stats says how an apply is doing.
type Stats struct {
	State        string     `json:"state"` // standby, starting, applying, waiting, failed, stopped
	Error        string     `json:"error,omitempty"`
	Since        time.Time  `json:"since"`
	Position     change.LSN `json:"position"`    // everything up to here is applied
	LastCommit   time.Time  `json:"last_commit"` // commit time of the last applied transaction, by its server's clock
	Batches      uint64     `json:"batches"`
	Transactions uint64     `json:"transactions"`
	Rows         uint64     `json:"rows"`
	Accepted     uint64     `json:"accepted"`          // changes that the source has taken
	Refused      uint64     `json:"refused"`           // changes that the source has refused
	Rebased      uint64     `json:"rebased"`           // changes that expected another image at the source and were tried again
	Barriers     uint64     `json:"barriers"`          // times that up waited for down to decide about a conflict
	LockRetries  uint64     `json:"lock_retries"`      // transactions that up repeated because of locks at the source
	Blocked      *Blocked   `json:"blocked,omitempty"` // what up waits for at the source
	Seconds      float64    `json:"seconds"`           // spent in target transactions
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

func (s *state) get() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.s
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

func (s *state) begin(position change.LSN) {
	s.with(func(st *Stats) {
		st.State, st.Since, st.Error, st.Position = "applying", time.Now(), "", position
	})
}

func (s *state) committed(end change.LSN, at time.Time, txs, rows, accepted int, took time.Duration) {
	s.with(func(st *Stats) {
		st.Position = end
		if !at.IsZero() {
			st.LastCommit = at
		}
		st.Batches++
		st.Transactions += uint64(txs)
		st.Rows += uint64(rows)
		st.Accepted += uint64(accepted)
		st.Seconds += took.Seconds()
	})
}

type collector struct {
	direction string
	get       func() Stats
}

// Describe implements prometheus.Collector. It sends nothing: both directions have the same names.
func (collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (k collector) Collect(ch chan<- prometheus.Metric) {
	st := k.get()
	labels := prometheus.Labels{"direction": k.direction}
	send := func(kind prometheus.ValueType, name, help string, v float64) {
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("waystage_apply_"+name, help, nil, labels), kind, v)
	}
	active := 0.0
	if st.State == "applying" {
		active = 1
	}
	send(prometheus.GaugeValue, "active", "1 while this process applies.", active)
	send(prometheus.CounterValue, "batches_total", "Target transactions committed.", float64(st.Batches))
	send(prometheus.CounterValue, "transactions_total", "Captured transactions applied.", float64(st.Transactions))
	send(prometheus.CounterValue, "rows_total", "Row changes applied.", float64(st.Rows))
	send(prometheus.CounterValue, "accepted_total", "Devices' changes whose acceptance was seen or sent.", float64(st.Accepted))
	send(prometheus.CounterValue, "refused_total", "Devices' changes that the source refused.", float64(st.Refused))
	send(prometheus.CounterValue, "rebased_total", "Devices' changes that were tried again on a newer base of our own making.", float64(st.Rebased))
	send(prometheus.CounterValue, "barriers_total", "Times that up waited for down to decide about a conflict.", float64(st.Barriers))
	send(prometheus.CounterValue, "lock_retries_total", "Source transactions that up repeated because of somebody's locks.", float64(st.LockRetries))
	blocked := 0.0
	if st.Blocked != nil {
		blocked = time.Since(st.Blocked.Since).Seconds()
	}
	send(prometheus.GaugeValue, "blocked_seconds", "How long up has been waiting for somebody's lock at the source; 0: it is not.", blocked)
	send(prometheus.CounterValue, "seconds_total", "Time spent in target transactions.", st.Seconds)
}

// Stats is a copy of the current figures.
func (d *Down) Stats() Stats { return d.state.get() }

// Metrics are the figures for Prometheus.
func (d *Down) Metrics() []prometheus.Collector {
	return []prometheus.Collector{collector{"down", d.Stats}}
}
