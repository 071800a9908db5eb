package stages

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/waystage/waystage/protocol"
)

// metrics of one stage.
type metrics struct {
	sessions *prometheus.CounterVec // by outcome
	record   *prometheus.CounterVec // by verdict
	rejects  *prometheus.CounterVec // by code
	refusals *prometheus.CounterVec // by code
	size     prometheus.Histogram
	duration prometheus.Histogram
}

func newMetrics(stage string) *metrics {
	labels := prometheus.Labels{"stage": stage}
	vec := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "waystage", Subsystem: "stage", Name: name, Help: help, ConstLabels: labels}, []string{label})
	}
	return &metrics{
		sessions: vec("sessions_total", "Sessions that the stage has done, by outcome.", "outcome"),
		record:   vec("records_total", "Uploaded records that the stage has done, by verdict.", "verdict"),
		rejects:  vec("rejects_total", "Records refused alone, by reason.", "reason"),
		refusals: vec("refusals_total", "Requests refused as a whole, by code.", "code"),
		size: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "waystage", Subsystem: "stage", Name: "batch_items", Help: "Items of one batch.", ConstLabels: labels,
			Buckets: prometheus.ExponentialBuckets(1, 4, 8),
		}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "waystage", Subsystem: "stage", Name: "batch_seconds", Help: "Duration of one batch.", ConstLabels: labels,
			Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 12),
		}),
	}
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.sessions, m.record, m.rejects, m.refusals, m.size, m.duration}
}

func (m *metrics) batch(items int, d time.Duration) {
	m.size.Observe(float64(items))
	m.duration.Observe(d.Seconds())
}

func (m *metrics) count(outcome string, n int) {
	if n > 0 {
		m.sessions.WithLabelValues(outcome).Add(float64(n))
	}
}

func (m *metrics) records(verdict string, n int) {
	if n > 0 {
		m.record.WithLabelValues(verdict).Add(float64(n))
	}
}

func (m *metrics) rejected(code string, n int) {
	if n > 0 {
		m.rejects.WithLabelValues(code).Add(float64(n))
	}
}

func (m *metrics) refused(code protocol.Code) { m.refusals.WithLabelValues(string(code)).Inc() }
