// Package trouble keeps in the mirror why a part of the pipeline stands still until a person acts, so that `waystage
// status`, `pools ls` and /readyz say it, whichever process it happened in and after that has ended.
//
// It promises one entry for each part, which the part itself takes back once it works again. Capture and apply write, health
// and cmd read.
package trouble

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Trouble is an entry.
type Trouble struct {
	Part    string    `json:"part"`    // stage, as in pools ls: capture-down, apply-up ...
	Code    string    `json:"code"`    // stable name of the reason, e.g. slot_lost
	Detail  string    `json:"detail"`  // what was found
	Remedy  string    `json:"remedy"`  // what to do
	Process string    `json:"process"` // who found it last: host/pid
	Since   time.Time `json:"since"`
	At      time.Time `json:"at"` // when it was found last
}

// String is one line for people.
func (t Trouble) String() string {
	return fmt.Sprintf("%s stands still (%s): %s. %s", t.Part, t.Code, t.Detail, t.Remedy)
}

// Writer is a connection, a pool or a transaction to write through.
type Writer interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

// Reader is one to read through.
type Reader interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// Report notes that a part stands still.
func Report(ctx context.Context, mirror Writer, t Trouble) error {
	if t.Process == "" {
		host, _ := os.Hostname()
		t.Process = fmt.Sprintf("%s/%d", host, os.Getpid())
	}
	_, err := mirror.Exec(ctx, `INSERT INTO waystage.trouble AS t (part, code, detail, remedy, process) VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (part) DO UPDATE SET code = excluded.code, detail = excluded.detail, remedy = excluded.remedy, process = excluded.process,
			at = clock_timestamp(), since = CASE WHEN t.code = excluded.code THEN t.since ELSE clock_timestamp() END`,
		t.Part, t.Code, t.Detail, t.Remedy, t.Process)
	if err != nil {
		return fmt.Errorf("report trouble: %w", err)
	}
	return nil
}

// Clear takes a part's entry back.
func Clear(ctx context.Context, mirror Writer, part string) error {
	if _, err := mirror.Exec(ctx, "DELETE FROM waystage.trouble WHERE part = $1", part); err != nil {
		return fmt.Errorf("clear trouble: %w", err)
	}
	return nil
}

// List reads all entries, by part.
func List(ctx context.Context, mirror Reader) ([]Trouble, error) {
	rows, err := mirror.Query(ctx, "SELECT part, code, detail, remedy, process, since, at FROM waystage.trouble ORDER BY part")
	if err != nil {
		return nil, fmt.Errorf("read troubles: %w", err)
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Trouble])
	if err != nil {
		return nil, fmt.Errorf("read troubles: %w", err)
	}
	return list, nil
}
