package health

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

// Collector turns snapshots into metrics. Labels are bounded: tables may be one, no user, device or key ever is.
type Collector struct {
	read func(context.Context) (Snapshot, error)
	age  time.Duration
	log  *zap.Logger

	mu   sync.Mutex // one read at a time
	last Snapshot
	at   time.Time
	ok   bool
}

// NewCollector makes a collector that reads at most once per age, however often it is scraped.
func NewCollector(read func(context.Context) (Snapshot, error), age time.Duration, log *zap.Logger) *Collector {
	if log == nil {
		log = zap.NewNop()
	}
	return &Collector{read: read, age: age, log: log}
}

// scrapeTimeout bounds one read; Prometheus gives up after 10 s by default.
const scrapeTimeout = 8 * time.Second

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("waystage_"+name, help, labels, nil)
}

var (
	descScrape    = desc("snapshot_ok", "1 if the last look at databases and broker succeeded.")
	descLagBytes  = desc("replication_lag_bytes", "WAL written and not yet applied at the other side.", "direction")
	descLagSecs   = desc("replication_lag_seconds", "Upper bound of the age of the oldest change that is not applied.", "direction")
	descRetained  = desc("slot_retained_bytes", "WAL that the slot keeps on the server's disk.", "direction")
	descSafe      = desc("slot_safe_bytes", "WAL that may be written before the slot is lost; absent without a limit.", "direction")
	descSlotOK    = desc("slot_ok", "1 if the slot exists and is not lost.", "direction")
	descSlotUsed  = desc("slot_active", "1 if a capture reads the slot.", "direction")
	descQueue     = desc("queue_messages", "Messages in a queue.", "queue")
	descQueueSize = desc("queue_bytes", "Bytes in a queue.", "queue")
	descQueueAge  = desc("queue_oldest_seconds", "Age of a queue's oldest message.", "queue")
	descSessions  = desc("sessions", "Sync sessions that wait for a stage.", "state")
	descTaken     = desc("sessions_taken_total", "Sync sessions taken since the mirror was made.")
	descOldest    = desc("session_oldest_seconds", "Age of the oldest session without a reply.")
	descPending   = desc("pending_records", "Merged records without the source's verdict.")
	descPendOld   = desc("pending_oldest_seconds", "Age of the oldest of them.")
	descRejects   = desc("rejected_records", "Records in the rejected log that no operator has retried or discarded.", "reason")
	descDevices   = desc("devices", "Devices.", "state")
	descStopped   = desc("table_stopped", "1 for each table that does not take part in replication until a person acts.", "table", "code")
	descWaiting   = desc("table_waiting_records", "Devices' records that wait for a stopped table.", "table")
	descFiles     = desc("files", "Files that devices subscribe to.")
	descFileBytes = desc("files_bytes", "Bytes of their different contents.")
	descFilesLost = desc("files_lost", "Files whose content the queue's store has lost.")
	descUploads   = desc("file_uploads_open", "Uploads of files by devices that are under way.")
	descPoolSize  = desc("pool_size", "Workers asked of a stage, per process.", "stage")
	descPoolRuns  = desc("pool_running", "1 if the stage is not paused or drained.", "stage")
	descXmin      = desc("xmin_age_transactions", "Transactions since the oldest one still running; replies send again what is newer than it.", "database")
	descOldTx     = desc("oldest_transaction_seconds", "Age of the oldest writing transaction on the server.", "database")
)

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descScrape, descLagBytes, descLagSecs, descRetained, descSafe, descSlotOK, descSlotUsed, descQueue, descQueueSize,
		descQueueAge, descSessions, descTaken, descOldest, descPending, descPendOld, descRejects, descStopped, descWaiting, descDevices, descFiles, descFileBytes, descFilesLost, descUploads, descPoolSize, descPoolRuns, descXmin, descOldTx} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	s, ok := c.snapshot()
	gauge(descScrape, number(ok))
	if s.At.IsZero() {
		return
	}
	for name, d := range map[string]Direction{"down": s.Down, "up": s.Up} {
		gauge(descSlotOK, number(d.Slot != "" && d.SlotStatus != "lost"), name)
		if d.Slot == "" {
			continue
		}
		gauge(descSlotUsed, number(d.SlotActive), name)
		gauge(descLagBytes, float64(d.LagBytes), name)
		gauge(descLagSecs, d.LagSeconds, name)
		gauge(descRetained, float64(d.RetainedBytes), name)
		if d.SafeBytes != nil {
			gauge(descSafe, float64(*d.SafeBytes), name)
		}
	}
	for _, q := range s.Queues {
		gauge(descQueue, float64(q.Messages), q.Name)
		gauge(descQueueSize, float64(q.Bytes), q.Name)
		gauge(descQueueAge, q.OldestSeconds, q.Name)
	}
	gauge(descSessions, float64(s.Sessions.Staged), "staged")
	gauge(descSessions, float64(s.Sessions.Merged), "merged")
	ch <- prometheus.MustNewConstMetric(descTaken, prometheus.CounterValue, float64(s.Sessions.Total))
	gauge(descOldest, s.Sessions.OldestSeconds)
	gauge(descPending, float64(s.Pending.Records))
	gauge(descPendOld, s.Pending.OldestSeconds)
	for code, n := range s.Rejects {
		gauge(descRejects, float64(n), code)
	}
	for _, t := range s.Stopped {
		gauge(descStopped, 1, t.Table, t.Code)
		gauge(descWaiting, float64(t.Waiting), t.Table)
	}
	gauge(descDevices, float64(s.Devices.Enrolled), "enrolled")
	gauge(descDevices, float64(s.Devices.Active), "active")
	gauge(descDevices, float64(s.Devices.Stale), "stale")
	gauge(descDevices, float64(s.Devices.Blocked), "blocked")
	gauge(descFiles, float64(s.Files.Count))
	gauge(descFileBytes, float64(s.Files.Bytes))
	gauge(descFilesLost, float64(s.Files.Lost))
	gauge(descUploads, float64(s.Files.Uploads))
	for _, p := range s.Pools {
		gauge(descPoolSize, float64(p.Size), p.Stage)
		gauge(descPoolRuns, number(p.Mode == "run"), p.Stage)
	}
	for name, db := range map[string]Condition{"source": s.Source, "mirror": s.Mirror} {
		gauge(descXmin, float64(db.XminAge), name)
		gauge(descOldTx, db.OldestTxSeconds, name)
	}
}

func (c *Collector) snapshot() (Snapshot, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.at) < c.age {
		return c.last, c.ok
	}
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	s, err := c.read(ctx)
	if err != nil && c.ok {
		c.log.Warn("metrics are incomplete", zap.Error(err)) // once per outage
	}
	c.last, c.at, c.ok = s, time.Now(), err == nil
	return s, c.ok
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
