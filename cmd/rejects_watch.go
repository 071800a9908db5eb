package cmd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/internal/pgerr"
)

// watchPause is how long a watch waits between two looks, and at first after a lost connection.
const watchPause = 500 * time.Millisecond

func newRejectsWatch(a *app) *cobra.Command {
	var f rejectFilter
	var out format
	var count int
	c := &cobra.Command{Use: "watch", Short: "Follow the log: print each record when it is rejected, until Ctrl-C", Args: cobra.NoArgs,
		Long: `Follow the log: print each record when it is rejected or refused, once, until Ctrl-C. A lost connection is made again, and nothing
is missed meanwhile. With --since it begins with those of that time.`,
		Example: `  waystage rejects watch -o ndjson --since 1h | while read -r record; do ...; done`,
		RunE: func(c *cobra.Command, _ []string) error {
			if out == "json" {
				return usage("a list that does not end cannot be json: use -o ndjson")
			}
			return a.withMirror(c.Context(), func(ctx context.Context, _ Config, mirror *pgxpool.Pool) error {
				w := &rejectWatch{filter: f}
				n := 0
				return w.run(ctx, mirror, a.say, func(r reject) (bool, error) {
					n++
					if out == "table" {
						fmt.Fprintf(a.out, "%s  %d  %s/%s  %s %s %s  %s: %s\n", r.At.Local().Format(time.DateTime), r.ID, r.User, r.Device,
							r.Op, r.Table, clean(joinKey(r.Key)), r.Code, clean(r.Detail))
						return n == count, nil
					}
					return n == count, printOne(a.out, out, r)
				})
			})
		}}
	f.flags(a, c, -1, "all")
	withOutput(c, &out)
	c.Flags().IntVar(&count, "count", 0, "end after so many records; 0: go on")
	return c
}

// rejectWatch remembers how far a watch has come. A rejection is found by its stamp, the mirror transaction that gave it:
// everything from the oldest transaction on that was open at the last look is looked at again, since it may have committed
// meanwhile, and what was told already is passed over.
type rejectWatch struct {
	filter rejectFilter
	since  int64 // xmin of the last look's snapshot
	begun  bool
	told   map[int64]int64 // record -> stamp, of those that may be seen again
}

// run tells each record once, until tell says that it is enough or ctx ends.
func (w *rejectWatch) run(ctx context.Context, db *pgxpool.Pool, say func(string, ...any), tell func(reject) (enough bool, err error)) error {
	for lost := time.Duration(0); ; {
		list, err := w.look(ctx, db)
		pause := watchPause
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && !transientDB(err):
			return err
		case err != nil:
			if lost == 0 {
				say("the mirror does not answer, trying again: %s", oneLine(err.Error()))
			}
			lost = min(max(2*lost, watchPause), 10*time.Second)
			pause = lost
		case lost > 0:
			say("the mirror answers again")
			lost = 0
		}
		for _, r := range list {
			if enough, err := tell(r); enough || err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// stampedReject is a record with the mirror transaction that rejected it.
type stampedReject struct {
	Stamp int64
	reject
}

// transientDB tells an unreachable server from a question that it refuses.
func transientDB(err error) bool {
	var f *failure
	return !errors.As(err, &f) && pgerr.Class(err) == pgerr.Retryable
}

// look reads what is new, the oldest first. Nothing is remembered of a look that failed.
func (w *rejectWatch) look(ctx context.Context, db *pgxpool.Pool) ([]reject, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tx, err := db.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	var xmin int64
	if err := tx.QueryRow(ctx, `SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint`).Scan(&xmin); err != nil {
		return nil, err
	}
	told := map[int64]int64{}
	for id, stamp := range w.told {
		if stamp >= xmin {
			told[id] = stamp
		}
	}
	var list []reject
	filter := w.filter
	if w.begun {
		filter.since = "" // what is new is new, and a span before now would move
	}
	conds, args, err := filter.where(1)
	if err != nil {
		return nil, err
	}
	if !w.begun && w.filter.since == "" {
		// From now on: what is there, and may be seen again, counts as told.
		rows, err := tx.Query(ctx, `SELECT id, stamp FROM waystage.change WHERE state IN ('rejected', 'refused') AND stamp >= $1`, xmin)
		if err != nil {
			return nil, err
		}
		var id, stamp int64
		if _, err := pgx.ForEachRow(rows, []any{&id, &stamp}, func() error { told[id] = stamp; return nil }); err != nil {
			return nil, err
		}
	} else {
		rows, err := tx.Query(ctx, strings.Replace(rejectColumns, "SELECT r.id", "SELECT r.stamp, r.id", 1)+" AND r.stamp >= $1"+conds+" ORDER BY r.at, r.id", append([]any{w.since}, args...)...)
		if err != nil {
			return nil, err
		}
		found, err := pgx.CollectRows(rows, pgx.RowToStructByPos[stampedReject])
		if err != nil {
			return nil, err
		}
		for _, r := range found {
			if _, again := w.told[r.ID]; again {
				continue
			}
			list = append(list, r.reject)
			if r.Stamp >= xmin {
				told[r.ID] = r.Stamp
			}
		}
	}
	w.since, w.told, w.begun = xmin, told, true
	return list, nil
}
