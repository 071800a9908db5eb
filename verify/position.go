package verify

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/schema"
)

// BehindError says that the mirror did not get to a position of the source in time.
type BehindError struct {
	Want, At string // positions in the source's log
	Waited   time.Duration
}

func (e *BehindError) Error() string {
	return fmt.Sprintf("the mirror stands at %s of the source's log and did not pass %s within %s; is a server running? See 'waystage status'",
		e.At, e.Want, e.Waited.Round(time.Second))
}

// markAfter is how long the mirror has to pass a position by itself, before it is given something to pass.
const markAfter = 500 * time.Millisecond

// pass waits until down has applied everything of the source up to a position: its own position says so, or that of the
// slot, which is told only what is durable in the mirror (rule R7).
func (r *run) pass(ctx context.Context, position string) error {
	began, marked := time.Now(), !r.o.Marker
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		var at string
		var passed bool
		err := r.o.Mirror.QueryRow(ctx, "SELECT position::text, position >= $1::text::pg_lsn FROM waystage.progress WHERE direction = 'down'", position).Scan(&at, &passed)
		if err != nil {
			return fmt.Errorf("read the mirror's position: %w", err)
		}
		if !passed {
			err := r.o.Source.QueryRow(ctx, `SELECT coalesce((SELECT confirmed_flush_lsn >= $2::text::pg_lsn FROM pg_catalog.pg_replication_slots
				WHERE slot_name = $1 AND database = pg_catalog.current_database()), false)`, schema.SlotDown(r.epoch), position).Scan(&passed)
			if err != nil {
				return fmt.Errorf("read the slot's position: %w", err)
			}
		}
		if passed {
			r.position = position
			return nil
		}
		if !marked && time.Since(began) > markAfter {
			marked = true
			if err := r.mark(ctx); err != nil {
				return err
			}
			pause = 5 * time.Millisecond
		}
		if waited := time.Since(began); waited > r.o.Wait {
			return &BehindError{Want: position, At: at, Waited: waited}
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// mark gives the mirror something to pass: a row of Waystage's own published table, gone in the same transaction, which down
// takes for nobody's. Without the right to do it one waits for the source's own next change.
func (r *run) mark(ctx context.Context) error {
	err := pgx.BeginFunc(ctx, r.o.Source, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SET LOCAL lock_timeout = 2000; SET LOCAL statement_timeout = 5000"); err != nil {
			return err
		}
		key := fmt.Sprintf("verify-%x", time.Now().UnixNano())
		if _, err := tx.Exec(ctx, "INSERT INTO waystage.progress (epoch, seq, position) VALUES ($1, 0, '0/0')", key); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "DELETE FROM waystage.progress WHERE epoch = $1", key)
		return err
	})
	if pgerr.Is(err, "42501", "25006", "55P03", "57014") {
		return nil
	}
	if err != nil {
		return fmt.Errorf("mark a position at the source: %w", err)
	}
	return nil
}

// fence waits until all transactions that run at the source now have ended; false: one has not.
func (r *run) fence(ctx context.Context) (bool, error) {
	var upTo int64
	if err := r.o.Source.QueryRow(ctx, "SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint").Scan(&upTo); err != nil {
		return false, fmt.Errorf("source: read the snapshot: %w", err)
	}
	most := min(r.o.Wait, 10*time.Second)
	for began, pause := time.Now(), 5*time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		var ended bool
		err := r.o.Source.QueryRow(ctx, "SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::bigint >= $1", upTo).Scan(&ended)
		if err != nil {
			return false, fmt.Errorf("source: read the snapshot: %w", err)
		}
		if ended || time.Since(began) > most {
			return ended, nil
		}
		if err := sleep(ctx, pause); err != nil {
			return false, err
		}
	}
}
