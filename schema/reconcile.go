package schema

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// reconcile is the SQL that makes a mirror table equal to a copy of the source's, writing only what differs.
type reconcile struct {
	t    *Table
	side string // the copy
}

// key is the key of a row in the form of side tables.
func (r *reconcile) key(alias string) string {
	var out []string
	for _, k := range r.t.Key {
		c, _ := r.t.Column(k)
		out = append(out, c.Text(alias+"."+Quote(k)))
	}
	return "ARRAY[" + strings.Join(out, ", ") + "]::text[]"
}

// match compares the key columns of a row with a key of side tables.
func (r *reconcile) match(alias, key string) string {
	var out []string
	for n, k := range r.t.Key {
		c, _ := r.t.Column(k)
		out = append(out, fmt.Sprintf("%s.%s = (%s)[%d]::%s", alias, Quote(k), key, n+1, c.MirrorType))
	}
	return strings.Join(out, " AND ")
}

// idle tells whether a row's key has neither records that wait nor changes that were kept.
func (r *reconcile) idle(alias string) string {
	return fmt.Sprintf(`NOT EXISTS (SELECT 1 FROM waystage.change p WHERE p.state = 'merged' AND p.tbl = %d AND p.key = %s)
		AND NOT EXISTS (SELECT 1 FROM waystage.deferred d WHERE d.tbl = %[1]d AND d.key = %[2]s)`, r.t.ID, r.key(alias))
}

// upsert writes rows, of which query gives the columns, where they differ.
func (r *reconcile) upsert(query string) string {
	row := func(alias string) string {
		return "ROW(" + r.t.list(func(c Column) string { return alias + "." + Quote(c.Name) }) + ")"
	}
	sets := r.t.list(func(c Column) string { return Quote(c.Name) + " = excluded." + Quote(c.Name) })
	return "INSERT INTO " + r.t.Ident() + " AS m (" + quoteAll(r.t.names()) + ", " + ColVersion + ", " + ColWriter + ", " + ColMerged + ")" +
		" SELECT s.*, pg_current_xact_id()::text::bigint, NULL, 0 FROM (" + query + ") s" +
		" ON CONFLICT (" + quoteAll(r.t.Key) + ") DO UPDATE SET " + sets + ", " + ColVersion + " = excluded." + ColVersion + ", " +
		ColWriter + " = NULL, " + ColMerged + " = 0 WHERE NOT record_image_eq(" + row("m") + ", " + row("excluded") + ")"
}

// inPages runs a statement over a table's pages, in transactions that hold the table's lock for a moment only. The statement
// is made for a function that gives the condition of the pages for an alias.
func (s *setup) inPages(ctx context.Context, t *Table, table string, statement func(within func(alias string) string) string) (rows int64, err error) {
	var pages, step int64
	if err := s.mirror.QueryRow(ctx, `SELECT pg_relation_size(c) / b, greatest(1, $2::bigint / b)
		FROM (SELECT $1::text::regclass AS c, current_setting('block_size')::bigint AS b) x`, table, int64(chunkBytes)).Scan(&pages, &step); err != nil {
		return 0, err
	}
	for from := int64(0); from < pages; from += step {
		sql := statement(func(alias string) string {
			return fmt.Sprintf("%[1]s.ctid >= '(%[2]d,0)' AND %[1]s.ctid < '(%[3]d,0)'", alias, from, from+step)
		})
		err := pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "SET LOCAL jit = off"); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1, $2)", TableLockClass, t.ID); err != nil {
				return err
			}
			tag, err := tx.Exec(ctx, sql)
			rows += tag.RowsAffected()
			return err
		})
		if err != nil {
			return rows, err
		}
	}
	return rows, nil
}

// compareRows makes the mirror's rows the copy's, but for keys that something is under way for.
func (s *setup) compareRows(ctx context.Context, r *reconcile, a *Applied) (err error) {
	if err := s.mirror.QueryRow(ctx, "SELECT count(*) FROM "+r.side).Scan(&a.Compared); err != nil {
		return err
	}
	columns := r.t.list(func(c Column) string { return "c." + Quote(c.Name) })
	a.Written, err = s.inPages(ctx, r.t, r.side, func(within func(string) string) string {
		return r.upsert("SELECT " + columns + " FROM " + r.side + " c WHERE " + within("c") + " AND " + r.idle("c"))
	})
	if err != nil {
		return err
	}
	a.Removed, err = s.inPages(ctx, r.t, r.t.Ident(), func(within func(string) string) string {
		return "DELETE FROM " + r.t.Ident() + " m WHERE " + within("m") + " AND NOT EXISTS (SELECT 1 FROM " + r.side + " c WHERE " + r.same("c", "m") + ") AND " + r.idle("m")
	})
	return err
}

// same tells whether two rows have the same key.
func (r *reconcile) same(a, b string) string {
	var out []string
	for _, k := range r.t.Key {
		out = append(out, a+"."+Quote(k)+" = "+b+"."+Quote(k))
	}
	return strings.Join(out, " AND ")
}

// recast is a text as another type would have it; null when it cannot be.
const recast = `CREATE OR REPLACE FUNCTION pg_temp.recast(v text, typ text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE out text;
BEGIN
    EXECUTE format('SELECT ($1::%s)::text', typ) INTO out USING v;
    RETURN out;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END $$`

// finishResync deals with the keys that were left alone, and lets the table go on. Down and merge are held meanwhile.
func (s *setup) finishResync(ctx context.Context, r *reconcile, a *Applied) error {
	t := r.t
	return pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
		if err := s.exclude(ctx, tx, t.ID); err != nil {
			return err
		}
		var copying, emptied bool
		var why string
		if err := tx.QueryRow(ctx, "SELECT copying, emptied, coalesce(stopped_code || ': ' || stopped_detail, '') FROM waystage.synced_table WHERE id = $1", t.ID).
			Scan(&copying, &emptied, &why); err != nil {
			return err
		}
		if !copying {
			return fmt.Errorf("%w: %s", errMoved, why)
		}
		if emptied {
			// The source has emptied the table since: of the copy nothing is left, of the mirror what is under way.
			if _, err := tx.Exec(ctx, "TRUNCATE "+r.side); err != nil {
				return err
			}
			tag, err := tx.Exec(ctx, "DELETE FROM "+t.Ident()+" m WHERE "+r.idle("m"))
			if err != nil {
				return err
			}
			a.Removed += tag.RowsAffected()
		}
		for _, sql := range []string{recast, r.effective(), "ANALYZE ws_effective"} {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return err
			}
		}
		tag, err := tx.Exec(ctx, r.upsert("SELECT "+t.list(func(c Column) string { return "(e.img->>" + Literal(c.Name) + ")::" + c.MirrorType })+
			" FROM ws_effective e WHERE e.first IS NULL AND e.img IS NOT NULL"))
		if err != nil {
			return err
		}
		a.Written += tag.RowsAffected()
		tag, err = tx.Exec(ctx, "DELETE FROM "+t.Ident()+" m USING ws_effective e WHERE e.first IS NULL AND e.img IS NULL AND "+r.match("m", "e.key"))
		if err != nil {
			return err
		}
		a.Removed += tag.RowsAffected()
		if a.Rebased, err = r.rebase(ctx, tx); err != nil {
			return err
		}
		for _, sql := range []string{
			"DELETE FROM waystage.base b USING ws_effective e WHERE b.tbl = $1 AND b.key = e.key AND e.first IS NULL",
			"DELETE FROM waystage.deferred WHERE tbl = $1",
			`UPDATE waystage.synced_table SET stopped_code = NULL, stopped_detail = '', stopped_at = NULL, stopped_position = NULL, copying = false,
				emptied = false, copied = true WHERE id = $1`,
		} {
			if _, err := tx.Exec(ctx, sql, t.ID); err != nil {
				return err
			}
		}
		if _, err := tx.Exec(ctx, "DROP TABLE ws_effective, "+r.side); err != nil {
			return err
		}
		return moveLayout(ctx, tx)
	})
}

// effective is what the source has for the keys that were left alone: the copy, and over it what was kept since.
func (r *reconcile) effective() string {
	names := r.t.list(func(c Column) string { return Literal(c.Name) })
	texts := r.t.list(func(c Column) string { return c.Text("c." + Quote(c.Name)) })
	return fmt.Sprintf(`CREATE TEMPORARY TABLE ws_effective ON COMMIT DROP AS
		SELECT k.key, CASE WHEN d.key IS NULL THEN c.img WHEN d.img IS NULL THEN NULL ELSE coalesce(c.img, '{}') || d.img END AS img,
			d.key IS NOT NULL AS moved, coalesce(d.others, false) AS others,
			(SELECT min(p.id) FROM waystage.change p WHERE p.state = 'merged' AND p.tbl = %[1]d AND p.key = k.key) AS first
		FROM (SELECT key FROM waystage.deferred WHERE tbl = %[1]d UNION SELECT key FROM waystage.base WHERE tbl = %[1]d
			UNION SELECT key FROM waystage.change WHERE tbl = %[1]d AND state = 'merged') k
		LEFT JOIN waystage.deferred d ON d.tbl = %[1]d AND d.key = k.key
		LEFT JOIN LATERAL (SELECT jsonb_object(ARRAY[%[2]s]::text[], ARRAY[%[3]s]::text[]) AS img FROM %[4]s c WHERE %[5]s) c ON true`,
		r.t.ID, names, texts, r.side, r.match("c", "k.key"))
}

// rebase gives keys with waiting records their base (rule R2). Who wrote it decides what becomes of a record that does not find
// what it expects (rule R4): nobody else, as far as is known, when the row is what it was but for its columns and their
// types; then the record is made on top of the row as it is now.
func (r *reconcile) rebase(ctx context.Context, tx pgx.Tx) (int64, error) {
	types := make([]string, len(r.t.Columns))
	for n, c := range r.t.Columns {
		types[n] = c.MirrorType
	}
	tag, err := tx.Exec(ctx, `INSERT INTO waystage.base AS b (tbl, key, img, writer, lw, mver)
		SELECT $1, x.key, x.img, CASE WHEN x.others OR x.writer = 'foreign' OR NOT x.same AND NOT x.moved THEN 'foreign'
				WHEN x.reshaped OR x.moved THEN 'own' ELSE x.writer END,
			CASE WHEN x.same THEN x.lw END, CASE WHEN x.same THEN x.mver ELSE 0 END
		FROM (SELECT e.*, coalesce(b.writer, 'initial') AS writer,
				CASE WHEN b.tbl IS NULL THEN c.old_lw ELSE b.lw END AS lw, coalesce(CASE WHEN b.tbl IS NULL THEN c.old_mver ELSE b.mver END, 0) AS mver,
				was.img IS NOT NULL AND NOT was.img ?& $2::text[] OR diff.texts AS reshaped, (was.img IS NULL) = (e.img IS NULL) AND NOT diff.vals AS same
			FROM ws_effective e JOIN waystage.change c ON c.id = e.first
			LEFT JOIN waystage.base b ON b.tbl = $1 AND b.key = e.key
			CROSS JOIN LATERAL (SELECT CASE WHEN b.tbl IS NULL THEN c.old ELSE b.img END AS img) was
			CROSS JOIN LATERAL (SELECT count(*) > 0 AS texts, coalesce(bool_or(was.img->>k.c IS NULL OR e.img->>k.c IS NULL
					OR pg_temp.recast(was.img->>k.c, k.t) IS DISTINCT FROM pg_temp.recast(e.img->>k.c, k.t)), false) AS vals
				FROM unnest($2::text[], $3::text[]) AS k(c, t) WHERE was.img ? k.c AND e.img IS NOT NULL AND was.img->>k.c IS DISTINCT FROM e.img->>k.c) diff) x
		WHERE x.reshaped OR x.moved OR NOT x.same
		ON CONFLICT (tbl, key) DO UPDATE SET img = excluded.img, writer = excluded.writer, lw = excluded.lw, mver = excluded.mver`,
		r.t.ID, r.t.names(), types)
	if err != nil {
		return 0, fmt.Errorf("base of rows with waiting records: %w", err)
	}
	return tag.RowsAffected(), nil
}
