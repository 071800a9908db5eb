package schema

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
)

// StopCode is a stable name of a reason why a table is stopped; docs/schema-changes.md lists them.
type StopCode string

// Stop codes.
const (
	StopColumn        StopCode = "column_missing"   // a column was dropped or renamed at the source
	StopType          StopCode = "column_type"      // a column has another type
	StopKey           StopCode = "key_changed"      // the primary key has other columns
	StopIdentity      StopCode = "replica_identity" // the change stream does not carry the primary key
	StopMissing       StopCode = "table_missing"    // the table was dropped
	StopRenamed       StopCode = "table_renamed"    // the table has another name
	StopReplaced      StopCode = "table_replaced"   // another table has the name
	StopUnpublished   StopCode = "not_published"    // the table is not in the publication: its changes do not reach us
	StopUnsyncable    StopCode = "not_syncable"     // the table has become one that cannot be synced
	StopSourceRefuses StopCode = "source_refuses"   // the source refuses our statements on the table, whatever their values
	StopMirrorRefuses StopCode = "mirror_refuses"   // the mirror table cannot take the source's rows
	StopDiverged      StopCode = "mirror_diverged"  // the mirror lacks a row that the source updates
	StopOperator      StopCode = "resync"           // an operator has its rows compared with the source
)

// Stop says why and since when a table does not take part: the source's changes of it are not applied, and devices' records
// for it wait. All other tables go on.
type Stop struct {
	Code     StopCode
	Detail   string
	At       time.Time
	Position string // the source's position that the mirror stood at
	Copying  bool   // a new copy is under way: changes behind Table.Floor are kept for it
}

// Beginner is a connection or a pool.
type Beginner interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}

// Layout is the number of the present layout of tables and definitions. Whoever works with [LoadTables]' or [LoadDefinitions]' answer reads
// it before or in the same snapshot, and asks anew when it has moved.
func Layout(ctx context.Context, q Querier) (int64, error) {
	text, err := readMeta(ctx, q, "layout")
	if err != nil || text == "" {
		return 0, err
	}
	return strconv.ParseInt(text, 10, 64)
}

// lockLayout reads the layout's number and keeps it from moving until the transaction ends.
func lockLayout(ctx context.Context, tx pgx.Tx) (int64, error) {
	var text string
	err := tx.QueryRow(ctx, "SELECT value FROM waystage.meta WHERE key = 'layout' FOR UPDATE").Scan(&text)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, ErrNotSetUp
	}
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(text, 10, 64)
}

// LayoutChannel is notified with each new layout, that is for new tables and new definitions.
const LayoutChannel = "waystage_layout"

// moveLayout gives the layout another number, once per transaction at most for each change of what it stands for.
func moveLayout(ctx context.Context, q Querier) error {
	_, err := q.Exec(ctx, `WITH moved AS (UPDATE waystage.meta SET value = (value::bigint + 1)::text WHERE key = 'layout' RETURNING value)
		SELECT pg_notify($1, value) FROM moved`, LayoutChannel)
	return err
}

// StopTable takes a table out of replication, if the layout is still the one that the caller judged by, and tells the log if it was
// this call that did it. A copy of the table that is under way ends.
func StopTable(ctx context.Context, db Beginner, id int, name string, layout int64, code StopCode, detail string, log *zap.Logger) error {
	stopped := false
	err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		now, err := lockLayout(ctx, tx)
		if err != nil || now != layout {
			return err
		}
		tag, err := tx.Exec(ctx, `UPDATE waystage.synced_table SET stopped_code = $2, stopped_detail = $3, stopped_at = clock_timestamp(), copying = false,
				stopped_position = coalesce(stopped_position, (SELECT position FROM waystage.progress WHERE direction = 'down'))
			WHERE id = $1 AND (stopped_code IS NULL OR copying)`, id, string(code), detail)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		stopped = true
		return moveLayout(ctx, tx)
	})
	if err != nil {
		return fmt.Errorf("stop table %s: %w", name, err)
	}
	if stopped {
		log.Error("a table is stopped; all others go on. Look with `waystage schema diff`, go on with `waystage schema apply`",
			zap.String("table", name), zap.String("code", string(code)), zap.String("detail", detail))
	}
	return nil
}
