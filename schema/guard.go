package schema

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/internal/pgerr"
)

// Connection is a connection or a pool that can begin transactions.
type Connection interface {
	Querier
	Beginner
}

// ErrNoPublication: the source's publication is not the one that was set up: it is gone, or was dropped and made again. PostgreSQL
// 18 goes on as if nothing had happened, and sends nothing of what was written meanwhile.
var ErrNoPublication = errors.New("the publication is gone, or was dropped and made again")

// GuardPublication looks after the source's publication while it is in use, and returns what it found, for the log; [ErrNoPublication]
// if it is gone or another one. A table
// that has lost its replica identity makes the customer's own updates and deletes fail as long as it is published
// (SQLSTATE 55000): it is taken out. A synced table that is not published any more is stopped, for its changes do not come.
func GuardPublication(ctx context.Context, publication string, source Querier, mirror Connection, log *zap.Logger) (found []string, err error) {
	layout, err := Layout(ctx, mirror)
	if err != nil {
		return nil, err
	}
	synced, err := guarded(ctx, mirror)
	if err != nil {
		return nil, err
	}
	now, err := publicationID(ctx, source, publication)
	if err != nil {
		return nil, err
	}
	was, err := readMeta(ctx, mirror, metaPublication)
	if err != nil {
		return nil, err
	}
	if now == "" || was != "" && was != now {
		return nil, ErrNoPublication
	}
	stop := func(table string, code StopCode, detail string) error {
		t, ok := synced[table]
		if !ok {
			return nil
		}
		return StopTable(ctx, mirror, t.id, table, layout, code, detail, log)
	}
	rows, err := source.Query(ctx, `SELECT n.nspname, c.relname, n.nspname || '.' || c.relname,
			c.relreplident = 'f' OR EXISTS (SELECT 1 FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
				AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END)
		FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE p.pubname = $1`, publication)
	if err != nil {
		return nil, err
	}
	type published struct {
		Schema, Name, Full string
		Identity           bool
	}
	tables, err := pgx.CollectRows(rows, pgx.RowToStructByPos[published])
	if err != nil {
		return nil, err
	}
	there := map[string]bool{}
	var errs []error
	for _, t := range tables {
		there[t.Full] = true
		if t.Identity {
			continue
		}
		sql := "ALTER PUBLICATION " + Quote(publication) + " DROP TABLE ONLY " + (&Table{Schema: t.Schema, Name: t.Name}).Ident()
		if _, err := source.Exec(ctx, sql); err != nil {
			if !pgerr.Is(err, "42704") { // somebody was quicker
				errs = append(errs, fmt.Errorf("table %s has lost its replica identity, so its own users cannot update it; run at the source: %s: %w", t.Full, sql, err))
			}
			continue
		}
		found = append(found, fmt.Sprintf("table %s has lost its replica identity and was taken out of the publication, so that its own users can update it", t.Full))
		if err := stop(t.Full, StopIdentity, "the table has lost its primary key; it was taken out of the publication, or its own users could not update it"); err != nil {
			errs = append(errs, err)
		}
	}
	for table, t := range synced {
		if there[table] {
			continue
		}
		code, detail, err := t.gone(ctx, source)
		if err == nil {
			found = append(found, fmt.Sprintf("table %s: %s", table, detail))
			err = stop(table, code, detail)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return found, errors.Join(errs...)
}

// metaPublication is the key under which the mirror keeps the publication's number at the source.
const metaPublication = "publication"

// publicationID is the number of a publication; empty: there is none.
func publicationID(ctx context.Context, source Querier, name string) (id string, err error) {
	err = source.QueryRow(ctx, "SELECT coalesce((SELECT oid::text FROM pg_publication WHERE pubname = $1), '')", name).Scan(&id)
	return id, err
}

// guardedTable is a table whose changes must come.
type guardedTable struct {
	id           int
	schema, name string
	oid          int64 // at the source; 0: not known
}

// gone says why a table is not published under its name.
func (t *guardedTable) gone(ctx context.Context, source Querier) (StopCode, string, error) {
	var now int64
	var other string
	err := source.QueryRow(ctx, `SELECT coalesce((SELECT c.oid::bigint FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2), 0),
		coalesce((SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid::bigint = $3), '')`,
		t.schema, t.name, t.oid).Scan(&now, &other)
	switch {
	case err != nil:
		return "", "", err
	case now == 0 && other != "":
		return StopRenamed, "the table is called " + other + " now", nil
	case now == 0:
		return StopMissing, "the source has no table of this name", nil
	case t.oid != 0 && t.oid != now:
		return StopReplaced, "another table has this name at the source now", nil
	}
	return StopUnpublished, "the table is not in publication " + PublicationDown + " any more: somebody has taken it out", nil
}

// guarded are the tables whose changes must come, by name.
func guarded(ctx context.Context, q Querier) (map[string]*guardedTable, error) {
	rows, err := q.Query(ctx, `SELECT id, schema_name, table_name, coalesce((definition->>'oid')::bigint, 0) FROM waystage.synced_table
		WHERE copied AND stopped_code IS NULL`)
	if err != nil {
		return nil, err
	}
	out := map[string]*guardedTable{}
	var t guardedTable
	_, err = pgx.ForEachRow(rows, []any{&t.id, &t.schema, &t.name, &t.oid}, func() error {
		one := t
		out[t.schema+"."+t.name] = &one
		return nil
	})
	return out, err
}
