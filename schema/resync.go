package schema

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/internal/pgerr"
)

// A table is taken over while everything runs, in four steps, each of which may be the last one before a crash: the next
// attempt begins with the first again.
//
//  1. reshape  The mirror table gets the source's columns. The table is stopped from here to the end.
//  2. fence    A short lock at the source parts its log: what was committed before is in a snapshot, what comes after goes to
//              waystage.deferred, which the down worker keeps by key.
//  3. copy     The snapshot's rows go to a side table and are compared with the mirror's, in short transactions. Keys with
//              records that wait, and those in waystage.deferred, are left alone.
//  4. finish   One short transaction, with the down worker held, deals with these and lets the table go on.

const (
	fenceLock    = 2 * time.Second // writers of the source wait behind us no longer than this at a time
	fenceWait    = 2 * time.Minute // how long a gap between their transactions is looked for
	reshapeWait  = 2 * time.Minute // the same for readers of the mirror table
	moveAttempts = 3
)

func (s *setup) resync(ctx context.Context, i *Inspection, a *Applied) error {
	for attempt := 1; ; attempt++ {
		err := s.resyncOnce(ctx, i, a)
		if !errors.Is(err, errMoved) || attempt == moveAttempts {
			return err
		}
		s.log.Info("the table was changed meanwhile; once more", zap.String("table", i.Table))
		tables, problems, err := ReadTables(ctx, s.source, s.Definitions.TableNames())
		if err != nil {
			return err
		}
		n := slices.IndexFunc(tables, func(t *Table) bool { return t.FullName() == i.Table })
		if n < 0 {
			return &ProblemsError{slices.DeleteFunc(problems, func(p Problem) bool { return p.Table != i.Table })}
		}
		stored, err := LoadTables(ctx, s.mirror)
		if err != nil {
			return err
		}
		if m := slices.IndexFunc(stored, func(t *Table) bool { return t.FullName() == i.Table }); m >= 0 {
			i.Stored = stored[m]
		}
		i.Live, i.Differences = tables[n], nil
		if i.Stored != nil {
			if i.compare(); slices.ContainsFunc(i.Differences, func(d Difference) bool { return d.Stops == StopKey }) {
				i.Action = ActRebuild
			}
		}
	}
}

func (s *setup) resyncOnce(ctx context.Context, i *Inspection, a *Applied) error {
	if err := s.patiently(ctx, reshapeWait, "the mirror table is read by replies that take long", func() error { return s.reshape(ctx, i, a) }); err != nil {
		return fmt.Errorf("change the mirror table: %w", err)
	}
	c := &copier{setup: s, run: randomHex(8), side: true}
	if err := writeMeta(ctx, s.mirror, "copy_run", c.run); err != nil {
		return err
	}
	holder, err := Connect(ctx, s.SourceDSN, "waystage-copy")
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	defer closeConn(holder)
	if err := s.patiently(ctx, fenceWait, "the table is never without an open transaction that has written it", func() error {
		var err error
		c.snapshot, err = s.fence(ctx, i, holder)
		return err
	}); err != nil {
		return fmt.Errorf("part the source's log: %w", err)
	}
	if err := c.copy(ctx, []*Table{i.Live}); err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	closeConn(holder)
	r := &reconcile{t: i.Live, side: i.Live.sideTable()}
	for _, sql := range []string{"ALTER TABLE " + r.side + " ADD PRIMARY KEY (" + quoteAll(i.Live.Key) + ")", "ANALYZE " + r.side} {
		if _, err := s.mirror.Exec(ctx, sql); err != nil {
			return fmt.Errorf("prepare the comparison: %w", err)
		}
	}
	if err := s.compareRows(ctx, r, a); err != nil {
		return fmt.Errorf("compare: %w", err)
	}
	if err := s.finishResync(ctx, r, a); err != nil {
		return fmt.Errorf("finish: %w", err)
	}
	s.result.Copied = append(s.result.Copied, i.Table)
	return nil
}

// patiently tries again what gave way to others.
func (s *setup) patiently(ctx context.Context, atMost time.Duration, why string, fn func() error) error {
	for begun := time.Now(); ; {
		err := fn()
		if !pgerr.Is(err, "55P03", "40P01") {
			return err
		}
		if time.Since(begun) > atMost {
			return fmt.Errorf("%w (for %s; %s)", err, atMost, why)
		}
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
	}
}

// reshape gives the mirror table the source's columns, and stops it.
func (s *setup) reshape(ctx context.Context, i *Inspection, a *Applied) error {
	t := i.Live
	return pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", fenceLock.Milliseconds())); err != nil {
			return err
		}
		if i.Stored != nil {
			t.ID = i.Stored.ID
		}
		if err := s.exclude(ctx, tx, t.ID); err != nil {
			return err
		}
		// As EnsureMirror.
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1, $2)", lockClass, lockDDL); err != nil {
			return err
		}
		if i.Stored != nil {
			if err := s.alter(ctx, tx, i, a); err != nil {
				return err
			}
		}
		problems, err := ensureTable(ctx, tx, t, s.Definitions, true)
		if err == nil {
			_, err = Refusing(problems)
		}
		if err != nil {
			return err
		}
		if i.Stored == nil {
			if _, err := tx.Exec(ctx, "TRUNCATE "+t.Ident()); err != nil {
				return err
			}
		}
		if _, err := tx.Exec(ctx, `UPDATE waystage.synced_table SET copying = false, stopped_code = coalesce(stopped_code, $2), stopped_at = coalesce(stopped_at, clock_timestamp()),
				stopped_detail = CASE WHEN stopped_code IS NULL THEN 'its rows are compared with the source' ELSE stopped_detail END,
				stopped_position = coalesce(stopped_position, (SELECT position FROM waystage.progress WHERE direction = 'down'))
			WHERE id = $1`, t.ID, string(StopOperator)); err != nil {
			return err
		}
		i.Stored = t
		return moveLayout(ctx, tx)
	})
}

// alter changes the columns of a mirror table that is there.
func (s *setup) alter(ctx context.Context, tx pgx.Tx, i *Inspection, a *Applied) error {
	was, t := i.Stored, i.Live
	exec := func(sql string, args ...any) error {
		_, err := tx.Exec(ctx, sql, args...)
		return err
	}
	if i.Action == ActRebuild {
		var err error
		if a.Refused, err = refusePending(ctx, tx, t.ID, "the table has another primary key now; make the change again"); err != nil {
			return err
		}
		for _, side := range []string{"base", "tombstone", "deferred"} {
			if err := exec("DELETE FROM waystage."+side+" WHERE tbl = $1", t.ID); err != nil {
				return err
			}
		}
		if err := exec("DROP TABLE IF EXISTS " + t.Ident()); err != nil {
			return err
		}
	} else {
		run := []string{"DROP TRIGGER IF EXISTS _ws_delete ON " + t.Ident(), "DROP TRIGGER IF EXISTS _ws_move ON " + t.Ident()}
		alter := "ALTER TABLE " + t.Ident() + " "
		moved := map[string]bool{}
		for _, o := range was.Columns {
			if to := i.renamed(o); to != "" {
				moved[to] = true
				run = append(run, alter+"RENAME COLUMN "+Quote(o.Name)+" TO "+Quote(to))
				if err := renamePending(ctx, tx, t.ID, o.Name, to); err != nil {
					return err
				}
			} else if !has(t, o.Name) {
				run = append(run, alter+"DROP COLUMN IF EXISTS "+Quote(o.Name))
			}
		}
		for _, n := range t.Columns {
			if !has(was, n.Name) && !moved[n.Name] {
				run = append(run, alter+"DROP COLUMN IF EXISTS "+Quote(n.Name)+", ADD COLUMN "+Quote(n.Name)+" "+n.MirrorType)
			}
		}
		for _, sql := range run {
			if err := exec(sql); err != nil {
				return err
			}
		}
		for _, o := range was.Columns {
			name := o.Name
			if to := i.renamed(o); to != "" {
				name = to
			}
			n, ok := t.Column(name)
			if !ok || o.MirrorType == n.MirrorType {
				continue
			}
			if err := s.retype(ctx, tx, t, o, n); err != nil {
				return err
			}
		}
	}
	if err := exec("DELETE FROM waystage.meta WHERE key = $1", t.ddlKey()); err != nil {
		return err
	}
	return storeTable(ctx, tx, t)
}

// retype gives a column of the mirror another type. Values that do not pass over become null; the comparison fills them.
func (s *setup) retype(ctx context.Context, tx pgx.Tx, t *Table, was, is Column) error {
	alter := "ALTER TABLE " + t.Ident() + " "
	if t.IsKey(is.Name) {
		// Rows cannot be without a key.
		_, err := tx.Exec(ctx, alter+"ALTER COLUMN "+Quote(is.Name)+" TYPE "+is.MirrorType+" USING "+was.Text(Quote(is.Name))+"::"+is.MirrorType)
		return err
	}
	inner, err := tx.Begin(ctx)
	if err != nil {
		return err
	}
	if _, err = inner.Exec(ctx, alter+"ALTER COLUMN "+Quote(is.Name)+" TYPE "+is.MirrorType+" USING "+was.Text(Quote(is.Name))+"::"+is.MirrorType); err == nil {
		return inner.Commit(ctx)
	}
	if rerr := inner.Rollback(ctx); rerr != nil || pgerr.Class(err) == pgerr.Retryable {
		return errors.Join(err, rerr)
	}
	_, err = tx.Exec(ctx, alter+"DROP COLUMN "+Quote(is.Name)+", ADD COLUMN "+Quote(is.Name)+" "+is.MirrorType)
	return err
}

// renamePending renames a column in what devices have sent and the source has not answered yet.
func renamePending(ctx context.Context, tx pgx.Tx, id int, from, to string) error {
	for _, img := range []string{"img", "old", "base"} {
		if _, err := tx.Exec(ctx, fmt.Sprintf(`UPDATE waystage.change SET %[1]s = (%[1]s - $2::text) || jsonb_build_object($3::text, %[1]s->$2::text)
			WHERE tbl = $1 AND state = 'merged' AND %[1]s ? $2::text`, img), id, from, to); err != nil {
			return err
		}
	}
	_, err := tx.Exec(ctx, `UPDATE waystage.base SET img = (img - $2::text) || jsonb_build_object($3::text, img->$2::text) WHERE tbl = $1 AND img ? $2::text`, id, from, to)
	return err
}

// fence parts the source's log, and gives a snapshot of what lies before. The lock waits for whoever has written the table
// and not finished: afterwards everything that the snapshot does not show is behind the floor.
func (s *setup) fence(ctx context.Context, i *Inspection, holder *pgx.Conn) (snapshot string, err error) {
	t := i.Live
	if holder.PgConn().TxStatus() != 'I' {
		if _, err := holder.Exec(ctx, "ROLLBACK"); err != nil {
			return "", err
		}
	}
	err = pgx.BeginFunc(ctx, s.source, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", fenceLock.Milliseconds())); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "LOCK TABLE "+t.Own()+" IN SHARE MODE"); err != nil {
			if pgerr.Is(err, "42P01") {
				return fmt.Errorf("%w: %w", errMoved, err)
			}
			return err
		}
		if err := s.unmoved(ctx, i, holder); err != nil {
			return err
		}
		if err := s.publish(ctx, tx, t); err != nil {
			return err
		}
		if _, err := holder.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"); err != nil {
			return err
		}
		if err := holder.QueryRow(ctx, "SELECT pg_export_snapshot()").Scan(&snapshot); err != nil {
			return err
		}
		var floor string
		if err := tx.QueryRow(ctx, "SELECT pg_current_wal_insert_lsn()::text").Scan(&floor); err != nil {
			return err
		}
		// Before the source's lock is gone, so that down knows the floor when the first change behind it comes.
		return s.keepFrom(ctx, t, floor)
	})
	return snapshot, err
}

// unmoved makes sure that the locked table is still as it was when the mirror table was made like it.
func (s *setup) unmoved(ctx context.Context, i *Inspection, conn *pgx.Conn) error {
	now, _, err := ReadTables(ctx, conn, s.Definitions.TableNames())
	if err != nil {
		return err
	}
	n := slices.IndexFunc(now, func(t *Table) bool { return t.FullName() == i.Table })
	if n < 0 {
		return errMoved
	}
	again := &Inspection{Stored: i.Live, Live: now[n]}
	again.compare()
	if len(again.Differences) > 0 {
		return fmt.Errorf("%w: %s %s", errMoved, again.Differences[0].Column, again.Differences[0].What)
	}
	return nil
}

// publish puts a locked table into the publication if it is not there.
func (s *setup) publish(ctx context.Context, tx pgx.Tx, t *Table) error {
	var there, partial bool
	err := tx.QueryRow(ctx, `SELECT count(*) > 0, coalesce(bool_or(r.prqual IS NOT NULL OR r.prattrs IS NOT NULL), false)
		FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid WHERE p.pubname = $1 AND r.prrelid = $2::text::regclass`, PublicationDown, t.Ident()).Scan(&there, &partial)
	if err != nil {
		return err
	}
	if partial {
		if _, err := tx.Exec(ctx, "ALTER PUBLICATION "+PublicationDown+" DROP TABLE "+t.Ident()); err != nil {
			return err
		}
	}
	if there && !partial {
		return nil
	}
	sql := "ALTER PUBLICATION " + PublicationDown + " ADD TABLE " + t.Own()
	_, err = tx.Exec(ctx, sql)
	return s.publicationRemedy(err, sql)
}

// keepFrom has down keep what the source does to the table behind the floor.
func (s *setup) keepFrom(ctx context.Context, t *Table, floor string) error {
	return pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", fenceLock.Milliseconds())); err != nil {
			return err
		}
		if err := s.exclude(ctx, tx, t.ID); err != nil {
			return err
		}
		for _, sql := range []string{
			"DROP TABLE IF EXISTS " + t.sideTable(),
			"CREATE UNLOGGED TABLE " + t.sideTable() + " AS SELECT " + quoteAll(t.names()) + " FROM " + t.Ident() + " WITH NO DATA",
			fmt.Sprintf("DELETE FROM waystage.deferred WHERE tbl = %d", t.ID),
			fmt.Sprintf("UPDATE waystage.synced_table SET floor = %s, copying = true, emptied = false WHERE id = %d AND stopped_code IS NOT NULL", Literal(floor), t.ID),
		} {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return err
			}
		}
		return moveLayout(ctx, tx)
	})
}

// sideTable is where a copy of the table waits for its comparison.
func (t *Table) sideTable() string { return "waystage_staging." + Quote(fmt.Sprintf("~copy_%d", t.ID)) }

func (t *Table) names() []string {
	out := make([]string, len(t.Columns))
	for i, c := range t.Columns {
		out[i] = c.Name
	}
	return out
}

// list renders something for each column.
func (t *Table) list(fn func(Column) string) string {
	out := make([]string, len(t.Columns))
	for i, c := range t.Columns {
		out[i] = fn(c)
	}
	return strings.Join(out, ", ")
}
