package schema

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// newColumn is a column that the mirror does not have yet.
type newColumn struct {
	table  *Table
	column string
}

func (s *setup) newColumns(ctx context.Context, tables []*Table) (out []newColumn, err error) {
	for _, t := range tables {
		was, _, err := storedTable(ctx, s.mirror, t)
		if err != nil {
			return nil, err
		}
		for _, c := range t.Columns {
			if was == nil {
				break
			}
			if _, known := was.Column(c.Name); !known {
				out = append(out, newColumn{t, c.Name})
			}
		}
	}
	return out, nil
}

// The seats of the appliers, as the leader election has them (an advisory lock's two keys).
const (
	seatClass     = 22356
	seatApplyDown = 2
	seatApplyUp   = 4
	seatWait      = 30 * time.Second
)

// takeSeats keeps every applier out, on all servers, until [setup.leaveSeats] or the end of the connection.
func (s *setup) takeSeats(ctx context.Context) error {
	begun := time.Now()
	for _, seat := range []int{seatApplyDown, seatApplyUp} {
		for {
			var ok bool
			if err := s.mirror.QueryRow(ctx, "SELECT pg_try_advisory_lock($1, $2)", seatClass, seat).Scan(&ok); err != nil {
				return err
			}
			if ok {
				break
			}
			if time.Since(begun) > seatWait {
				return &ProblemsError{[]Problem{{Message: "tables or columns are to be added, and another server applies changes at the moment",
					Remedy: "stop the other servers until this one has started"}}}
			}
			if err := sleep(ctx, 200*time.Millisecond); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *setup) leaveSeats(ctx context.Context) {
	for _, seat := range []int{seatApplyDown, seatApplyUp} {
		// A failure means that the connection is lost, and the lock with it.
		_, _ = s.mirror.Exec(ctx, "SELECT pg_advisory_unlock($1, $2)", seatClass, seat)
	}
}

// addTables takes tables into a running set-up, while no applier runs: their changes since they were published wait in
// the stream, are applied afterwards, and repeat at most what the copy has already.
func (s *setup) addTables(ctx context.Context, added []*Table) error {
	run := randomHex(8)
	if err := pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
		if err := writeMeta(ctx, tx, "copy_run", run); err != nil {
			return err
		}
		for _, t := range added {
			if _, err := tx.Exec(ctx, "TRUNCATE "+t.Ident()); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	if err := s.publishLocked(ctx, added); err != nil {
		return err
	}
	holder, err := Connect(ctx, s.SourceDSN, "waystage-setup")
	if err != nil {
		return err
	}
	defer closeConn(holder)
	tx, err := holder.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	c := &copier{setup: s, run: run}
	if err := tx.QueryRow(ctx, "SELECT pg_export_snapshot()").Scan(&c.snapshot); err != nil {
		return err
	}
	if err := c.copy(ctx, added); err != nil {
		return err
	}
	if err := s.finishTables(ctx, added); err != nil {
		return err
	}
	return pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
		if err := stillOurs(ctx, tx, run, "FOR UPDATE"); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "UPDATE waystage.synced_table SET copied = true WHERE id = ANY($1)", tableIDs(added))
		return err
	})
}
