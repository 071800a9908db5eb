package files

import "github.com/prometheus/client_golang/prometheus"

// metrics count what devices do; how many files there are is in the health snapshot.
type metrics struct {
	chunks, bytes *prometheus.CounterVec
	refused       prometheus.Counter
	uploads       *prometheus.CounterVec
}

func newMetrics() *metrics {
	opts := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "waystage", Subsystem: "file", Name: name, Help: help}
	}
	m := &metrics{
		chunks:  prometheus.NewCounterVec(opts("chunks_total", "Chunks of files that went to devices (down) or came from them (up)."), []string{"direction"}),
		bytes:   prometheus.NewCounterVec(opts("bytes_total", "Bytes of them."), []string{"direction"}),
		refused: prometheus.NewCounter(opts("refused_total", "Chunks that a device asked for and may not have, or that are no more.")),
		uploads: prometheus.NewCounterVec(opts("uploads_total", "Changes of files by devices that got their outcome."), []string{"outcome"}),
	}
	for _, d := range []string{"down", "up"} {
		m.chunks.WithLabelValues(d)
		m.bytes.WithLabelValues(d)
	}
	return m
}

func (m *metrics) down(n int) { m.count("down", n) }
func (m *metrics) up(n int)   { m.count("up", n) }

func (m *metrics) count(direction string, n int) {
	m.chunks.WithLabelValues(direction).Inc()
	m.bytes.WithLabelValues(direction).Add(float64(n))
}

// Metrics are the collectors of the store.
func (s *Store) Metrics() []prometheus.Collector {
	return []prometheus.Collector{s.metrics.chunks, s.metrics.bytes, s.metrics.refused, s.metrics.uploads}
}
