package stages

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// RetentionConfig says how long what has been done is kept. The zero value of a field takes the default.
type RetentionConfig struct {
	Changes  time.Duration // applied changes whose devices have heard of it (default 7 days)
	Rejects  time.Duration // rejected and refused ones that no operator has handled (default 90 days)
	Handled  time.Duration // those that were retried or discarded, from then on (default 90 days)
	Cursors  time.Duration // a device that was away longer gets a full refresh of the rows (default 30 days)
	Sessions time.Duration // replied sessions, and refusals of whole requests (default 7 days)
	InFlight time.Duration // longest time that a reply takes from its snapshot to the storing of its cursor (default 1 hour)
	Every    time.Duration // how often Run prunes (default 10 minutes)
	Chunk    int           // rows of one transaction (default 5000)
}

func (c RetentionConfig) withDefaults() RetentionConfig {
	day := 24 * time.Hour
	def(&c.Changes, 7*day)
	def(&c.Rejects, 90*day)
	def(&c.Handled, 90*day)
	def(&c.Cursors, 30*day)
	def(&c.Sessions, 7*day)
	def(&c.InFlight, time.Hour)
	def(&c.Every, 10*time.Minute)
	def(&c.Chunk, 5000)
	return c
}

// Pruner removes what nobody needs any more, in short transactions.
type Pruner struct {
	cfg RetentionConfig
	db  *pgxpool.Pool
	log *zap.Logger
}

// NewPruner makes it. Any number may run at the same time.
func NewPruner(cfg RetentionConfig, db *pgxpool.Pool, log *zap.Logger) *Pruner {
	return &Pruner{cfg: cfg.withDefaults(), db: db, log: orNop(log)}
}

// Run prunes at intervals until ctx ends.
func (p *Pruner) Run(ctx context.Context) error {
	t := time.NewTicker(p.cfg.Every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if n, err := p.Prune(ctx); err != nil && ctx.Err() == nil {
			p.log.Warn("pruning failed, it is tried again", zap.Error(err))
		} else if n != (Pruned{}) {
			p.log.Info("pruned", zap.Any("rows", n))
		}
	}
}

// Pruned counts removed rows.
type Pruned struct {
	Changes, Sessions, Refusals, Cursors, Keysets, Tombstones, Devices, Tokens int64
}

// Prune does it once.
func (p *Pruner) Prune(ctx context.Context) (n Pruned, err error) {
	if n.Cursors, n.Tombstones, err = p.horizon(ctx); err != nil {
		return n, err
	}
	// A verdict may go when the incarnation's last request had a cursor that had passed it (rule D5), or when the life of the device's file
	// that waited for it is over. Nobody waits for an operator's. What a rejected record became stays as long as the record.
	heard := `(NOT EXISTS (SELECT FROM waystage.incarnation i JOIN waystage.device d ON d.id = i.device_id
				WHERE i.id = c.incarnation AND d.user_name <> '` + protocol.OperatorUser + `')
			OR EXISTS (SELECT FROM waystage.incarnation i JOIN waystage.session s ON s.incarnation = i.id AND s.n = i.last_n
				JOIN waystage.cursor k ON k.token = s.cursor_from
				WHERE i.id = c.incarnation AND s.n > c.n AND k.since > c.stamp)
			OR EXISTS (SELECT FROM waystage.incarnation mine JOIN waystage.incarnation later
				ON later.device_id = mine.device_id AND later.created_at > mine.created_at AND later.last_n > 0 WHERE mine.id = c.incarnation))
		AND NOT EXISTS (SELECT FROM waystage.reject_action a WHERE a.session_id = c.session_id AND a.idx = c.idx)`
	// Handled is what was discarded, settled by a policy, or retried and applied. The log of actions goes with its record.
	rejected, err := p.chunks(ctx, "rejected changes", `
		DELETE FROM waystage.change WHERE id IN (
			SELECT c.id FROM waystage.change c JOIN waystage.reject r ON r.id = c.id
			WHERE c.state IN ('rejected', 'refused') AND c.decided_at < now() - least($2::interval, $3::interval) AND CASE
				WHEN r.status IN ('discarded', 'settled') OR r.status = 'retried' AND EXISTS (SELECT FROM waystage.reject_action a
						JOIN waystage.change n ON n.session_id = a.session_id AND n.idx = a.idx WHERE a.record = c.id AND n.state = 'applied')
					THEN coalesce((SELECT max(a.at) FROM waystage.reject_action a WHERE a.record = c.id), c.decided_at) < now() - $3::interval
				ELSE r.status <> 'retried' AND c.decided_at < now() - $2::interval END
				AND `+heard+`
			ORDER BY c.id LIMIT $1)`, p.cfg.Rejects, p.cfg.Handled)
	if err != nil {
		return n, err
	}
	n.Changes, err = p.chunks(ctx, "changes", `
		DELETE FROM waystage.change WHERE id IN (
			SELECT c.id FROM waystage.change c
			WHERE c.state = 'applied' AND coalesce(c.decided_at, c.created_at) < now() - $2::interval AND `+heard+`
			ORDER BY c.id LIMIT $1)`, p.cfg.Changes)
	n.Changes += rejected
	if err != nil {
		return n, err
	}
	// The last session of an incarnation stays: its request may come again.
	n.Sessions, err = p.chunks(ctx, "sessions", `
		DELETE FROM waystage.session WHERE id IN (
			SELECT s.id FROM waystage.session s
			WHERE s.state IN ('replied', 'closed') AND coalesce(s.replied_at, s.merged_at) < now() - $2::interval
				AND s.n < (SELECT i.last_n FROM waystage.incarnation i WHERE i.id = s.incarnation)
				AND NOT EXISTS (SELECT FROM waystage.change c WHERE c.session_id = s.id)
			ORDER BY s.id LIMIT $1)`, p.cfg.Sessions)
	if err != nil {
		return n, err
	}
	n.Refusals, err = p.chunks(ctx, "refusals", `
		DELETE FROM waystage.refusal WHERE ctid = ANY (ARRAY(SELECT f.ctid FROM waystage.refusal f WHERE f.refused_at < now() - $2::interval LIMIT $1))`, p.cfg.Sessions)
	if err != nil {
		return n, err
	}
	// A removed device goes when everything that was taken from it has its verdict, and a device of the same name would have heard.
	n.Devices, err = p.chunks(ctx, "removed devices", `
		DELETE FROM waystage.device WHERE removed_at < now() - $2::interval AND id IN (
			SELECT d.id FROM waystage.device d
			WHERE d.removed_at < now() - $2::interval
				AND NOT EXISTS (SELECT FROM waystage.session s WHERE s.device_id = d.id AND s.state = 'staged')
				AND NOT EXISTS (SELECT FROM waystage.change c WHERE c.device_id = d.id AND c.state = 'merged')
			ORDER BY d.id LIMIT $1)`, p.cfg.Sessions)
	if err != nil {
		return n, err
	}
	n.Tokens, err = p.chunks(ctx, "enrolment tokens", `
		DELETE FROM waystage.enrol_token WHERE id IN (
			SELECT t.id FROM waystage.enrol_token t WHERE greatest(t.expires_at, t.used_at) < now() - $2::interval ORDER BY t.id LIMIT $1)`, p.cfg.Sessions)
	if err != nil {
		return n, err
	}
	if _, err = p.chunks(ctx, "what applications were built for", builtPrune); err != nil {
		return n, err
	}
	// One that is stored again meanwhile has a new date, which this statement looks at before it removes it.
	n.Keysets, err = p.chunks(ctx, "key sets", `
		DELETE FROM waystage.keyset WHERE created_at < now() - interval '1 hour' AND id IN (
			SELECT k.id FROM waystage.keyset k
			WHERE k.created_at < now() - interval '1 hour'
				AND k.id NOT IN (SELECT e.value::bigint FROM waystage.cursor c, jsonb_each_text(c.keysets->'tables') e WHERE e.value IS NOT NULL)
			ORDER BY k.id LIMIT $1)`)
	return n, err
}

// horizon drops old cursors, and the tombstones that no cursor needs, in one transaction: a reply that still sees a
// cursor sees the tombstones since. The owner of a cursor that is gone gets a full refresh.
func (p *Pruner) horizon(ctx context.Context) (cursors, tombstones int64, err error) {
	tx, err := p.db.Begin(ctx)
	if err != nil {
		return 0, 0, fmt.Errorf("prune cursors: %w", err)
	}
	defer rollback(tx)
	tag, err := tx.Exec(ctx, `DELETE FROM waystage.cursor WHERE created_at < now() - $1::interval`, p.cfg.Cursors)
	if err != nil {
		return 0, 0, fmt.Errorf("prune cursors: %w", err)
	}
	cursors = tag.RowsAffected()
	// An order to send everything concerns cursors of before only. They are the record of who ordered it, too.
	_, err = tx.Exec(ctx, `DELETE FROM waystage.refresh WHERE asked_at < now() - greatest($1::interval + 2 * $2::interval, $3::interval)`, p.cfg.Cursors, p.cfg.InFlight, p.cfg.Handled)
	if err != nil {
		return 0, 0, fmt.Errorf("prune orders of refreshes: %w", err)
	}
	bound, err := p.bound(ctx, tx)
	if err != nil {
		return 0, 0, fmt.Errorf("prune tombstones: %w", err)
	}
	tag, err = tx.Exec(ctx, `
		DELETE FROM waystage.tombstone WHERE ctid = ANY (ARRAY(
			SELECT t.ctid FROM waystage.tombstone t
			WHERE t.stamp < (SELECT least(min(c.since), $2) FROM waystage.cursor c)
			LIMIT $1))`, 20*p.cfg.Chunk, bound)
	if err != nil {
		return 0, 0, fmt.Errorf("prune tombstones: %w", err)
	}
	files, err := tx.Exec(ctx, `
		DELETE FROM waystage.file f WHERE f.sha256 IS NULL
			AND f.version < (SELECT least(min(c.since), $1) FROM waystage.cursor c)`, bound)
	if err != nil {
		return 0, 0, fmt.Errorf("prune removed files: %w", err)
	}
	if err := tx.Commit(ctx); err != nil {
		return 0, 0, fmt.Errorf("prune cursors and tombstones: %w", err)
	}
	return cursors, tag.RowsAffected() + files.RowsAffected(), nil
}

// bound is a horizon that was current InFlight ago: no cursor that is still to be stored is older. It is kept in
// waystage.meta as "<bound> <horizon> <unix time of the horizon>".
func (p *Pruner) bound(ctx context.Context, tx pgx.Tx) (bound int64, err error) {
	const key = "prune_bound"
	var now int64
	var value string
	if err = tx.QueryRow(ctx, `SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint`).Scan(&now); err != nil {
		return 0, err
	}
	_, err = tx.Exec(ctx, `INSERT INTO waystage.meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING`,
		key, fmt.Sprintf("0 %d %d", now, time.Now().Unix()))
	if err != nil {
		return 0, err
	}
	if err = tx.QueryRow(ctx, `SELECT value FROM waystage.meta WHERE key = $1 FOR UPDATE`, key).Scan(&value); err != nil {
		return 0, err
	}
	var horizon, at int64
	if _, err = fmt.Sscanf(value, "%d %d %d", &bound, &horizon, &at); err != nil {
		return 0, fmt.Errorf("%s in waystage.meta is %q: %w", key, value, err)
	}
	if time.Since(time.Unix(at, 0)) <= p.cfg.InFlight {
		return bound, nil
	}
	_, err = tx.Exec(ctx, `UPDATE waystage.meta SET value = $2 WHERE key = $1`, key, fmt.Sprintf("%d %d %d", horizon, now, time.Now().Unix()))
	return horizon, err
}

// chunks repeats a statement, that removes at most $1 rows, until it finds no more.
func (p *Pruner) chunks(ctx context.Context, what, sql string, args ...any) (total int64, err error) {
	for {
		tag, err := p.db.Exec(ctx, sql, append([]any{p.cfg.Chunk}, args...)...)
		if err != nil {
			return total, fmt.Errorf("prune %s: %w", what, err)
		}
		total += tag.RowsAffected()
		if tag.RowsAffected() < int64(p.cfg.Chunk) {
			return total, nil
		}
	}
}
