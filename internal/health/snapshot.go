package health

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/internal/trouble"
)

// Database is what a [Reader] needs of a connection or a pool.
type Database interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// Snapshot is the state of the whole system at one moment, as far as the databases and the broker know it. It is
// what `waystage status -o json` prints; fields are only ever added.
type Snapshot struct {
	At       time.Time         `json:"at"`
	Epoch    string            `json:"epoch"`
	Copy     string            `json:"copy"` // initial copy: none, running, done
	Tables   int               `json:"tables"`
	Down     Direction         `json:"down"` // source to mirror
	Up       Direction         `json:"up"`   // mirror to source
	Pending  Pending           `json:"pending"`
	Sessions Sessions          `json:"sessions"`
	Devices  Devices           `json:"devices"`
	Rejects  map[string]int64  `json:"rejects"` // records in the log that no operator has handled, by code
	Files    Files             `json:"files"`
	Queues   []Queue           `json:"queues"`
	Pools    []Pool            `json:"pools"`
	Troubles []trouble.Trouble `json:"troubles"` // parts that stand still until a person acts
	Stopped  []StoppedTable    `json:"stopped"`  // tables that do not take part until a person acts
	Source   Condition         `json:"source"`
	Mirror   Condition         `json:"mirror"`
}

// StoppedTable is a table whose changes are not applied, while all others flow.
type StoppedTable struct {
	Table    string    `json:"table"` // "schema.table"
	Code     string    `json:"code"`
	Detail   string    `json:"detail"`
	Since    time.Time `json:"since"`
	Position string    `json:"position"` // of the source, where the table was stopped
	Copying  bool      `json:"copying"`  // `waystage schema apply` or `resync` is at work, or was ended
	Waiting  int64     `json:"waiting"`  // devices' records that wait for it
}

// String is one line for people.
func (t StoppedTable) String() string {
	state := "is stopped"
	if t.Copying {
		state = "is being compared with the source"
	}
	return fmt.Sprintf("table %s %s (%s): %s; %d records of devices wait", t.Table, state, t.Code, t.Detail, t.Waiting)
}

// ReadStopped lists the stopped tables.
func ReadStopped(ctx context.Context, mirror Database) ([]StoppedTable, error) {
	rows, err := mirror.Query(ctx, `SELECT t.schema_name || '.' || t.table_name, t.stopped_code, t.stopped_detail, coalesce(t.stopped_at, now()), coalesce(t.stopped_position::text, ''),
			t.copying, (SELECT count(*) FROM waystage.change c WHERE c.tbl = t.id AND c.state = 'merged')
		FROM waystage.synced_table t WHERE t.stopped_code IS NOT NULL ORDER BY 1`)
	if err != nil {
		return nil, fmt.Errorf("stopped tables: %w", err)
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[StoppedTable])
	if err != nil {
		return nil, fmt.Errorf("stopped tables: %w", err)
	}
	return list, nil
}

// Direction is one way of replication.
type Direction struct {
	Slot          string     `json:"slot"`           // empty: there is none yet
	SlotStatus    string     `json:"slot_status"`    // reserved, extended, unreserved, lost; empty: no slot
	SlotReason    string     `json:"slot_reason"`    // why it is lost, in the server's words (PostgreSQL 17 and later); else empty
	SlotActive    bool       `json:"slot_active"`    // a capture reads it
	LagBytes      int64      `json:"lag_bytes"`      // WAL written and not yet applied at the other side
	LagSeconds    float64    `json:"lag_seconds"`    // upper bound of the age of the oldest change not yet applied
	RetainedBytes int64      `json:"retained_bytes"` // WAL that the slot keeps on the server's disk
	SafeBytes     *int64     `json:"safe_bytes"`     // WAL that may still be written before the slot is lost; null: no limit
	Position      string     `json:"position"`
	AppliedAt     *time.Time `json:"applied_at"` // commit time of the last transaction applied
	Rewind        bool       `json:"rewind"`     // the applier has asked its capture to begin again
}

// Pending are records that are merged and have no verdict of the source yet.
type Pending struct {
	Records       int64   `json:"records"`
	OldestSeconds float64 `json:"oldest_seconds"`
}

// Sessions counts sync sessions.
type Sessions struct {
	Staged        int64   `json:"staged"` // wait for merge
	Merged        int64   `json:"merged"` // wait for reply
	Total         int64   `json:"total"`  // ever taken (approximate)
	OldestSeconds float64 `json:"oldest_seconds"`
}

// Devices counts devices.
type Devices struct {
	Enrolled int64 `json:"enrolled"`
	Active   int64 `json:"active"` // synced within a day
	Stale    int64 `json:"stale"`  // did not sync for 30 days
	Blocked  int64 `json:"blocked"`
	Users    int64 `json:"users"`
}

// Files counts the files that devices subscribe to.
type Files struct {
	Count   int64 `json:"count"`
	Bytes   int64 `json:"bytes"`   // of the different contents
	Lost    int64 `json:"lost"`    // files whose content the queue's store has lost
	Uploads int64 `json:"uploads"` // of devices, under way
}

// Queue is one stream of the broker.
type Queue struct {
	Name          string  `json:"name"`
	Messages      uint64  `json:"messages"`
	Bytes         uint64  `json:"bytes"`
	MaxBytes      int64   `json:"max_bytes"` // -1: unbounded
	OldestSeconds float64 `json:"oldest_seconds"`
	Direction     string  `json:"direction,omitempty"` // of change data: down or up
}

// Pool is what the operator asked of one stage.
type Pool struct {
	Stage string `json:"stage"`
	Size  int    `json:"size"`
	Mode  string `json:"mode"`
}

// Condition is a database server's own condition.
type Condition struct {
	XminAge         int64   `json:"xmin_age"`          // transactions since the oldest one still running
	OldestTxSeconds float64 `json:"oldest_tx_seconds"` // age of the oldest transaction that writes
}

// Reader reads snapshots. One reader remembers positions between its reads, so that the lag in seconds is measured and
// not guessed; its methods may be called from several goroutines.
type Reader struct {
	source, mirror Database
	queues         func(context.Context) ([]Queue, error)

	mu       sync.Mutex
	down, up track
}

// NewReader makes a reader. queues may be nil.
func NewReader(source, mirror Database, queues func(context.Context) ([]Queue, error)) *Reader {
	return &Reader{source: source, mirror: mirror, queues: queues}
}

// track remembers where a server's log stood at earlier looks.
type track struct {
	seen []mark // ascending by lsn
}

// mark is a position that the log was seen at from first to last.
type mark struct {
	first, last time.Time
	lsn         int64
}

// behind adds a look and answers how old the oldest change that is not applied can be, at most: as old as the last look
// at which everything written then is applied now. Without such a look it is as old as the first look, at
// least; at the very first look with a backlog nothing is known.
func (k *track) behind(now time.Time, written, applied int64) (seconds float64, known bool) {
	if n := len(k.seen); n > 0 && k.seen[n-1].lsn > written {
		k.seen = nil // another server, or one that was rebuilt
	}
	done := 0 // marks that are applied
	for done < len(k.seen) && k.seen[done].lsn <= applied {
		done++
	}
	if done > 0 {
		k.seen, done = k.seen[done-1:], 1
	}
	if n := len(k.seen); n > 0 && k.seen[n-1].lsn == written {
		k.seen[n-1].last = now
	} else {
		k.seen = append(k.seen, mark{now, now, written})
	}
	const most = 4096
	if len(k.seen) > most { // thin out: every second one; the ends stay
		thin := k.seen[:1]
		for i := 2; i < len(k.seen)-1; i += 2 {
			thin = append(thin, k.seen[i])
		}
		k.seen = append(thin, k.seen[len(k.seen)-1])
	}
	switch {
	case applied >= written:
		return 0, true
	case done > 0:
		return now.Sub(k.seen[0].last).Seconds(), true
	default:
		return now.Sub(k.seen[0].first).Seconds(), len(k.seen) > 1 || k.seen[0].first != now
	}
}

// Read takes a snapshot. It fails only when nothing can be said: what one part cannot tell is left out and its error
// joined, so that the rest is still shown.
func (r *Reader) Read(ctx context.Context) (Snapshot, error) {
	s := Snapshot{At: time.Now(), Rejects: map[string]int64{}, Queues: []Queue{}, Pools: []Pool{}, Troubles: []trouble.Trouble{}, Stopped: []StoppedTable{}}
	var errs []error
	note := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	note("mirror", r.readMirror(ctx, &s))
	list, err := trouble.List(ctx, r.mirror)
	note("mirror", err)
	s.Troubles = append(s.Troubles, list...)
	stopped, err := ReadStopped(ctx, r.mirror)
	note("mirror", err)
	s.Stopped = append(s.Stopped, stopped...)
	if r.queues != nil {
		q, err := r.queues(ctx)
		note("broker", err)
		if q != nil {
			s.Queues = q
		}
	}
	empty := func(direction string) bool {
		return slices.ContainsFunc(s.Queues, func(q Queue) bool { return q.Direction == direction && q.Messages == 0 })
	}
	note("source", r.direction(ctx, r.source, "down", "waystage_down_", &s.Down, &r.down, s.Epoch, empty("down")))
	note("mirror", r.direction(ctx, r.mirror, "up", "waystage_up_", &s.Up, &r.up, s.Epoch, empty("up")))
	note("source", readServer(ctx, r.source, &s.Source))
	note("mirror", readServer(ctx, r.mirror, &s.Mirror))
	return s, errors.Join(errs...)
}

func (r *Reader) readMirror(ctx context.Context, s *Snapshot) error {
	if err := r.mirror.QueryRow(ctx, `
		SELECT coalesce((SELECT value FROM waystage.meta WHERE key = 'epoch'), ''),
		       coalesce((SELECT value FROM waystage.meta WHERE key = 'copy'), 'none'),
		       (SELECT count(*) FROM waystage.synced_table),
		       (SELECT count(*) FROM waystage.session WHERE state = 'staged'),
		       (SELECT count(*) FROM waystage.session WHERE state = 'merged'),
		       (SELECT coalesce(max(id), 0) FROM waystage.session),
		       (SELECT coalesce(extract(epoch FROM clock_timestamp() - min(received_at)), 0)::float8 FROM waystage.session WHERE state IN ('staged', 'merged')),
		       (SELECT count(*) FROM waystage.change WHERE state = 'merged'),
		       (SELECT coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8 FROM waystage.change WHERE state = 'merged'),
		       (SELECT count(*) FROM waystage.app_user WHERE name NOT LIKE '@%')`).Scan(
		&s.Epoch, &s.Copy, &s.Tables, &s.Sessions.Staged, &s.Sessions.Merged, &s.Sessions.Total, &s.Sessions.OldestSeconds,
		&s.Pending.Records, &s.Pending.OldestSeconds, &s.Devices.Users); err != nil {
		return err
	}
	if err := r.mirror.QueryRow(ctx, `
		SELECT count(*) FILTER (WHERE public_key IS NOT NULL),
		       count(*) FILTER (WHERE last_sync_at > now() - interval '1 day'),
		       count(*) FILTER (WHERE public_key IS NOT NULL AND coalesce(last_sync_at, enrolled_at) < now() - interval '30 days'),
		       count(*) FILTER (WHERE blocked)
		  FROM waystage.device`).Scan(&s.Devices.Enrolled, &s.Devices.Active, &s.Devices.Stale, &s.Devices.Blocked); err != nil {
		return err
	}
	if err := r.mirror.QueryRow(ctx, `
		SELECT (SELECT count(*) FROM waystage.file WHERE sha256 IS NOT NULL),
		       (SELECT coalesce(sum(size), 0)::bigint FROM waystage.blob),
		       (SELECT count(*) FROM waystage.blob b JOIN waystage.file f USING (sha256) WHERE b.lost_at IS NOT NULL),
		       (SELECT count(*) FROM waystage.upload WHERE state IN ('receiving', 'stored'))`).
		Scan(&s.Files.Count, &s.Files.Bytes, &s.Files.Lost, &s.Files.Uploads); err != nil {
		return err
	}
	rows, err := r.mirror.Query(ctx, `SELECT coalesce(c.code, ''), count(*) FROM waystage.change c WHERE c.state IN ('rejected', 'refused')
		AND NOT EXISTS (SELECT FROM waystage.reject_action a WHERE a.session_id = c.session_id AND a.idx = c.idx)
		AND NOT EXISTS (SELECT FROM (SELECT a.session_id, a.idx FROM waystage.reject_action a WHERE a.record = c.id ORDER BY a.id DESC LIMIT 1) a
			LEFT JOIN waystage.change r ON r.session_id = a.session_id AND r.idx = a.idx WHERE coalesce(r.state, '') NOT IN ('rejected', 'refused'))
		GROUP BY 1`)
	if err != nil {
		return err
	}
	var code string
	var n int64
	if _, err := pgx.ForEachRow(rows, []any{&code, &n}, func() error { s.Rejects[code] = n; return nil }); err != nil {
		return err
	}
	rows, err = r.mirror.Query(ctx, `SELECT stage, size, mode FROM waystage.pool ORDER BY stage`)
	if err != nil {
		return err
	}
	var p Pool
	_, err = pgx.ForEachRow(rows, []any{&p.Stage, &p.Size, &p.Mode}, func() error { s.Pools = append(s.Pools, p); return nil })
	return err
}

// direction reads the slot at the captured server and the progress at the mirror. What the slot's reader has confirmed
// is applied, and so is what progress says; and when no change data waits in the queue, so is what the server has sent,
// for the rest of the log concerns nobody here. The greatest counts.
func (r *Reader) direction(ctx context.Context, captured Database, name, prefix string, d *Direction, k *track, epoch string, empty bool) error {
	var position int64
	err := r.mirror.QueryRow(ctx, `SELECT position::text, (position - '0/0')::int8, committed_at, rewind FROM waystage.progress WHERE direction = $1`, name).
		Scan(&d.Position, &position, &d.AppliedAt, &d.Rewind)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil // not set up yet
	}
	if err != nil {
		return err
	}
	slot := prefix + epoch[:min(8, len(epoch))]
	var written, confirmed, sent int64
	err = captured.QueryRow(ctx, `
		SELECT slot_name, active, coalesce(wal_status, ''), coalesce(to_jsonb(s)->>'invalidation_reason', ''), safe_wal_size,
		       (w.lsn - coalesce(restart_lsn, w.lsn))::int8, (coalesce(confirmed_flush_lsn, '0/0') - '0/0')::int8, (w.lsn - '0/0')::int8,
		       coalesce((SELECT r.sent_lsn - '0/0' FROM pg_stat_replication r WHERE r.pid = active_pid), 0)::int8
		  FROM pg_replication_slots s,
		       (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn) w
		 WHERE slot_name = $1`, slot).
		Scan(&d.Slot, &d.SlotActive, &d.SlotStatus, &d.SlotReason, &d.SafeBytes, &d.RetainedBytes, &confirmed, &written, &sent)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil // the slots check names it
	}
	if err != nil {
		return err
	}
	applied := max(position, confirmed)
	if empty {
		applied = max(applied, sent)
	}
	d.LagBytes = max(written-applied, 0)
	r.mu.Lock()
	defer r.mu.Unlock()
	seconds, known := k.behind(time.Now(), written, applied)
	switch {
	case known:
		d.LagSeconds = seconds
	case d.AppliedAt != nil:
		d.LagSeconds = max(time.Since(*d.AppliedAt).Seconds(), 0)
	}
	return nil
}

func readServer(ctx context.Context, db Database, s *Condition) error {
	return db.QueryRow(ctx, `
		SELECT (pg_snapshot_xmax(pg_current_snapshot())::text::int8 - pg_snapshot_xmin(pg_current_snapshot())::text::int8),
		       coalesce((SELECT extract(epoch FROM clock_timestamp() - min(xact_start))::float8 FROM pg_stat_activity WHERE backend_xid IS NOT NULL), 0)`).
		Scan(&s.XminAge, &s.OldestTxSeconds)
}
