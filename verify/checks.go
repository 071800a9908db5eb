package verify

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Check is something that must hold among Waystage's own tables on the mirror.
type Check struct {
	Name   string   `json:"name"`
	What   string   `json:"what"`
	Count  int64    `json:"count"` // offences; 0: it holds
	Sample []string `json:"sample"`
}

// Every query gives the offences as texts; none needs more than indexes or a small table.
var checks = []struct{ name, what, sql string }{
	{"base_without_pending", "a base image whose key has no pending change: it hides the mirror row's difference from the source",
		`SELECT b.tbl || ' ' || b.key::text FROM waystage.base AS b
		WHERE NOT EXISTS (SELECT FROM waystage.change AS c WHERE c.state = 'merged' AND c.tbl = b.tbl AND c.key = b.key)`},
	{"pending_without_session", "a pending change whose session does not exist or was not merged",
		`SELECT 'change ' || c.id FROM waystage.change AS c LEFT JOIN waystage.session AS s ON s.id = c.session_id
		WHERE c.state = 'merged' AND c.device_id > 0 AND (s.id IS NULL OR s.state = 'staged')`},
	{"pending_of_unknown_table", "a pending change of a table that is not synced: nothing will ever decide it",
		`SELECT 'change ' || c.id FROM waystage.change AS c WHERE c.state = 'merged' AND NOT EXISTS (SELECT FROM waystage.synced_table AS t WHERE t.id = c.tbl)`},
	{"staging_of_merged", "a staged record whose session is merged already",
		`SELECT 'session ' || g.session_id FROM (SELECT DISTINCT session_id FROM waystage.staging) AS g
		LEFT JOIN waystage.session AS s ON s.id = g.session_id WHERE s.id IS NULL OR s.state <> 'staged'`},
	{"session_ahead", "a session with a higher number than its incarnation has taken",
		`SELECT s.token FROM waystage.session AS s JOIN waystage.incarnation AS i ON i.id = s.incarnation WHERE s.n > i.last_n`},
	{"cursor_without_keys", "a cursor whose key set is gone: its device gets all rows again",
		`SELECT c.token FROM waystage.cursor AS c, pg_catalog.jsonb_each_text(c.keysets->'tables') AS e
		WHERE NOT EXISTS (SELECT FROM waystage.keyset AS k WHERE k.id = e.value::bigint)`},
	{"tombstone_from_the_future", "a tombstone of a transaction that has not begun: devices get it with every sync",
		`SELECT 'stamp ' || stamp FROM waystage.tombstone WHERE stamp >= pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint`},
	{"mirror_trigger", "a mirror table without its triggers: deletes do not reach the devices",
		`SELECT t.schema_name || '.' || t.table_name || ' ' || w.name FROM waystage.synced_table AS t, (VALUES ('_ws_delete'), ('_ws_move')) AS w(name)
		WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_trigger AS g JOIN pg_catalog.pg_class AS c ON c.oid = g.tgrelid JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
			WHERE n.nspname = t.schema_name AND c.relname = t.table_name AND g.tgname = w.name AND g.tgenabled IN ('O', 'A'))`},
	{"mirror_constraint", "a constraint or unique index on a mirror table: it would stop the source's changes",
		`SELECT t.schema_name || '.' || t.table_name || ' ' || x.relname FROM waystage.synced_table AS t
		JOIN pg_catalog.pg_namespace AS n ON n.nspname = t.schema_name JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid AND c.relname = t.table_name
		JOIN pg_catalog.pg_index AS i ON i.indrelid = c.oid AND i.indisunique AND NOT i.indisprimary JOIN pg_catalog.pg_class AS x ON x.oid = i.indexrelid
		UNION ALL
		SELECT t.schema_name || '.' || t.table_name || ' ' || k.conname FROM waystage.synced_table AS t
		JOIN pg_catalog.pg_namespace AS n ON n.nspname = t.schema_name JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid AND c.relname = t.table_name
		JOIN pg_catalog.pg_constraint AS k ON k.conrelid = c.oid AND k.contype IN ('c', 'f')`},
}

// mostSampled offences are named, and counted up to a bound.
const (
	mostSampled = 5
	mostCounted = 10_000
)

// checks looks at them in one snapshot.
func (r *run) checks(ctx context.Context) ([]Check, error) {
	var out []Check
	err := r.read(ctx, &side{name: "mirror", db: r.o.Mirror}, func(tx pgx.Tx) error {
		for _, k := range checks {
			c := Check{Name: k.name, What: k.what, Sample: []string{}}
			rows, err := tx.Query(ctx, fmt.Sprintf("SELECT x FROM (%s) AS o(x) LIMIT %d", k.sql, mostCounted))
			if err != nil {
				return fmt.Errorf("check %s: %w", k.name, err)
			}
			var text string
			_, err = pgx.ForEachRow(rows, []any{&text}, func() error {
				if c.Count++; len(c.Sample) < mostSampled {
					c.Sample = append(c.Sample, strings.Clone(text))
				}
				return nil
			})
			if err != nil {
				return fmt.Errorf("check %s: %w", k.name, err)
			}
			out = append(out, c)
		}
		return nil
	})
	return out, err
}
