package schema

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
)

// ApplyOptions say what [Apply] works on.
type ApplyOptions struct {
	SetupOptions
	Resync []string // tables to compare with the source although nothing is known to differ
}

// Applied is what [Apply] has done to one table.
type Applied struct {
	Table    string `json:"table"`
	Action   Action `json:"action"`
	Compared int64  `json:"compared"` // rows of the source
	Written  int64  `json:"written"`  // rows of the mirror that were inserted or changed
	Removed  int64  `json:"removed"`  // rows that the source does not have
	Rebased  int64  `json:"rebased"`  // rows with devices' records that wait: they have the source's image as base now
	Refused  int64  `json:"refused"`  // records of devices that have no place in the table any more
}

// Apply brings the mirror into step with the source's tables while servers run: it changes mirror tables, copies what the change
// stream did not bring, and compares. Tables that nothing has happened to are not touched, nor are rows that are equal. It
// can be killed at any point and run again. What somebody must do first is a [*ProblemsError], and nothing is done
// then.
func Apply(ctx context.Context, o ApplyOptions) ([]Applied, error) {
	s := &setup{SetupOptions: o.SetupOptions, log: o.Log}
	if s.log == nil {
		s.log = zap.NewNop()
	}
	if s.Workers <= 0 {
		s.Workers = 4
	}
	out, err := s.apply(ctx, o.Resync)
	if err != nil {
		return out, fmt.Errorf("apply: %w", err)
	}
	return out, nil
}

func (s *setup) apply(ctx context.Context, resync []string) (out []Applied, err error) {
	if s.source, err = Connect(ctx, s.SourceDSN, "waystage-schema"); err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	defer closeConn(s.source)
	if s.mirror, err = Connect(ctx, s.MirrorDSN, "waystage-schema"); err != nil {
		return nil, fmt.Errorf("mirror: %w", err)
	}
	defer closeConn(s.mirror)
	if _, err := s.mirror.Exec(ctx, "SELECT pg_advisory_lock($1, $2)", lockClass, lockSetup); err != nil {
		return nil, err
	}
	if err := s.standing(ctx); err != nil {
		return nil, err
	}
	found, err := Inspect(ctx, s.source, s.mirror, s.Definitions.TableNames())
	if err != nil {
		return nil, err
	}
	if found, err = s.alsoResync(ctx, found, resync); err != nil {
		return nil, err
	}
	if err := s.agree(ctx, found); err != nil {
		return nil, err
	}
	act := func(i *Inspection) error {
		a := Applied{Table: i.Table, Action: i.Action}
		var err error
		switch i.Action {
		case ActRefresh:
			err = s.refresh(ctx, i)
		case ActRemove:
			err = s.patiently(ctx, reshapeWait, "the mirror table is read by replies that take long", func() error { return s.remove(ctx, i, &a) })
		case ActResync, ActRebuild, ActAdd:
			err = s.resync(ctx, i, &a)
		}
		if err != nil {
			return fmt.Errorf("table %s: %w", i.Table, err)
		}
		out = append(out, a)
		return nil
	}
	if err := s.checkBefore(ctx, found); err != nil {
		return nil, err
	}
	for _, i := range found {
		if i.Action == ActRemove {
			continue
		}
		if err := act(i); err != nil {
			return out, err
		}
	}
	if err := s.checkLive(ctx); err != nil {
		return out, err
	}
	if err := s.enforce(ctx); err != nil {
		return out, fmt.Errorf("put the definitions in force: %w", err)
	}
	if err := s.expire(ctx); err != nil {
		return out, err
	}
	// Only now: until here the definitions before needed them.
	for _, i := range found {
		if i.Action == ActRemove {
			if err := act(i); err != nil {
				return out, err
			}
		}
	}
	return out, nil
}

// checkBefore has the mirror check the rows queries before anything is changed, with stand-ins for new tables. Where tables are to be
// altered it cannot: then they are checked afterwards only.
func (s *setup) checkBefore(ctx context.Context, found []*Inspection) error {
	for _, i := range found {
		if i.Stored != nil && (i.Action == ActResync || i.Action == ActRebuild) {
			return nil
		}
	}
	tx, err := s.mirror.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	if err := standIn(ctx, tx, s.result.Tables); err != nil {
		return fmt.Errorf("stand-ins for new tables: %w", err)
	}
	problems, err := s.Definitions.CheckLive(ctx, tx)
	if err != nil {
		return err
	}
	_, err = Refusing(problems)
	return err
}

// enforce puts the definitions in force, and with them what the mirror tables need for them, in one commit. The tables are in step.
func (s *setup) enforce(ctx context.Context) error {
	tables, err := s.reindex(ctx)
	if err != nil {
		return err
	}
	err = s.patiently(ctx, reshapeWait, "mirror tables are written by transactions that take long", func() error {
		return pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", fenceLock.Milliseconds())); err != nil {
				return err
			}
			return s.enforceIn(ctx, tx, tables)
		})
	})
	if err != nil {
		return err
	}
	return s.dropIndexes(ctx)
}

func (s *setup) enforceIn(ctx context.Context, tx pgx.Tx, tables []*Table) error {
	// A tombstone's value is that of the subset key: down and merge are kept out while that changes, in the order of [setup.exclude].
	var at string
	if err := tx.QueryRow(ctx, "SELECT position::text FROM waystage.progress WHERE direction = 'down' FOR UPDATE").Scan(&at); err != nil {
		return err
	}
	for _, t := range tables {
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1, $2)", TableLockClass, t.ID); err != nil {
			return err
		}
	}
	if _, err := lockLayout(ctx, tx); err != nil {
		return err
	}
	for _, t := range tables {
		key, all := s.Definitions.SubsetKey(t.FullName())
		for _, sql := range t.triggerDDL(key) {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return fmt.Errorf("table %s: %w", t.FullName(), err)
			}
		}
		if err := writeMeta(ctx, tx, t.ddlKey(), t.ddlHash(key, all, true)); err != nil {
			return err
		}
	}
	var before int
	if err := tx.QueryRow(ctx, "SELECT coalesce(max(version), 0) FROM waystage.definition").Scan(&before); err != nil {
		return err
	}
	version, err := saveDefinitions(ctx, tx, s.Definitions, s.Author)
	if err != nil || version == before && len(tables) == 0 {
		return err
	}
	return moveLayout(ctx, tx)
}

// expirePatience bounds the waiting for replies by an older version.
const expirePatience = 2 * time.Minute

// ErrUnderWay is returned by [Apply] when all is done, the new version in force, and something that was begun by an older one still
// under way.
var ErrUnderWay = errors.New("the new version is in force, but a reply or merge that was begun by the one before has not ended yet")

// expire waits for merges and replies that go by an older layout. All that begin now go by the present one: what it does not give goes to nobody
// after this.
func (s *setup) expire(ctx context.Context) error {
	layout, err := Layout(ctx, s.mirror)
	if err != nil {
		return err
	}
	for began := time.Now(); ; {
		var old int
		err := s.mirror.QueryRow(ctx, `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND classid::bigint = $1 AND objid::bigint < $2`,
			LayoutLockClass, LayoutLock(layout)).Scan(&old)
		switch {
		case err != nil:
			return fmt.Errorf("look for replies by an older version: %w", err)
		case old == 0:
			return nil
		case time.Since(began) > expirePatience:
			return fmt.Errorf("%w (%d of them, after %s)", ErrUnderWay, old, expirePatience)
		}
		t := time.NewTimer(20 * time.Millisecond)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

// reindex makes the subset indexes that the definitions need, beside those that are there, while the tables are written; it returns
// the tables of which something else must be changed too, by number.
func (s *setup) reindex(ctx context.Context) (changed []*Table, err error) {
	stored, err := LoadTables(ctx, s.mirror)
	if err != nil {
		return nil, err
	}
	wanted := s.Definitions.TableNames()
	for _, t := range stored {
		if !slices.Contains(wanted, t.FullName()) {
			continue // it stays in step, for nobody
		}
		key, all := s.Definitions.SubsetKey(t.FullName())
		have, err := readMeta(ctx, s.mirror, t.ddlKey())
		if err != nil {
			return nil, err
		}
		if have == t.ddlHash(key, all, true) {
			continue
		}
		changed = append(changed, t)
		for name, columns := range t.indexes(key, all) {
			// One that was cut off is there and of no use.
			var broken bool
			ident := Quote(t.Schema) + "." + Quote(name)
			if err := s.mirror.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM pg_index WHERE indexrelid = to_regclass($1) AND NOT indisvalid)", ident).Scan(&broken); err != nil {
				return nil, err
			}
			if broken {
				if _, err := s.mirror.Exec(ctx, "DROP INDEX CONCURRENTLY IF EXISTS "+ident); err != nil {
					return nil, err
				}
			}
			if _, err := s.mirror.Exec(ctx, "CREATE INDEX CONCURRENTLY IF NOT EXISTS "+Quote(name)+" ON "+t.Ident()+" ("+columns+")"); err != nil {
				return nil, fmt.Errorf("index of %s: %w", t.FullName(), err)
			}
		}
	}
	slices.SortFunc(changed, func(a, b *Table) int { return a.ID - b.ID })
	return changed, nil
}

// dropIndexes drops subset indexes that the definitions do not need any more.
func (s *setup) dropIndexes(ctx context.Context) error {
	stored, err := LoadTables(ctx, s.mirror)
	if err != nil {
		return err
	}
	wanted := s.Definitions.TableNames()
	for _, t := range stored {
		if !slices.Contains(wanted, t.FullName()) {
			continue
		}
		drops, err := subsetIndexDrops(ctx, s.mirror, t, t.indexes(s.Definitions.SubsetKey(t.FullName())))
		if err != nil {
			return err
		}
		for _, sql := range drops {
			if _, err := s.mirror.Exec(ctx, strings.Replace(sql, "DROP INDEX ", "DROP INDEX CONCURRENTLY IF EXISTS ", 1)); err != nil {
				return fmt.Errorf("index of %s: %w", t.FullName(), err)
			}
		}
	}
	return nil
}

// standing makes sure that there is a set-up, of these two databases, that a stream still feeds.
func (s *setup) standing(ctx context.Context) error {
	state, err := readMeta(ctx, s.mirror, "copy")
	if err != nil {
		return err
	}
	if state != "done" {
		return ErrNotSetUp
	}
	if err := s.identify(ctx); err != nil {
		return err
	}
	if err := s.sameDatabases(ctx); err != nil {
		return err
	}
	if s.result.Epoch, err = Epoch(ctx, s.mirror); err != nil {
		return err
	}
	return s.slotsStand(ctx)
}

// alsoResync adds the tables that an operator wants compared.
func (s *setup) alsoResync(ctx context.Context, found []*Inspection, names []string) ([]*Inspection, error) {
	var problems []Problem
	for _, name := range names {
		if n := slices.IndexFunc(found, func(i *Inspection) bool { return i.Table == name }); n >= 0 {
			if found[n].Action == ActRefresh {
				found[n].Action = ActResync
			}
			continue
		}
		live, p, err := ReadTables(ctx, s.source, s.Definitions.TableNames())
		if err != nil {
			return nil, err
		}
		stored, err := LoadTables(ctx, s.mirror)
		if err != nil {
			return nil, err
		}
		byName := func(t *Table) bool { return t.FullName() == name }
		l, m := slices.IndexFunc(live, byName), slices.IndexFunc(stored, byName)
		if l < 0 || m < 0 {
			var all []string
			for _, t := range stored {
				all = append(all, t.FullName())
			}
			problems = append(problems, Problem{Table: name, Message: "is not synced", Remedy: orElse(didYouMean(name, all), "write it as schema.table")})
			problems = append(problems, slices.DeleteFunc(p, func(p Problem) bool { return p.Table != name })...)
			continue
		}
		found = append(found, &Inspection{Table: name, Action: ActResync, Stored: stored[m], Live: live[l]})
	}
	_, err := Refusing(problems)
	return found, err
}

// agree refuses when somebody must do something first: at the source, or with the definitions.
func (s *setup) agree(ctx context.Context, found []*Inspection) error {
	var problems []Problem
	for _, i := range found {
		if i.Action == ActBlocked {
			problems = append(problems, Problem{Table: i.Table, Message: i.Differences[0].What, Remedy: i.Remedy})
		}
	}
	tables, _, err := ReadTables(ctx, s.source, s.Definitions.TableNames())
	if err != nil {
		return err
	}
	s.result.Tables, s.result.Definitions = tables, s.Definitions
	s.result.Warnings, err = Refusing(append(problems, s.Definitions.Check(tables)...))
	return err
}

// refresh takes over what neither rows nor the mirror table depend on.
func (s *setup) refresh(ctx context.Context, i *Inspection) error { return Refresh(ctx, s.mirror, i) }

// Refresh notes a table's labels, defaults and constraints as the source has them, if nothing else has happened to it
// meanwhile. Workers and devices take them over by themselves.
func Refresh(ctx context.Context, mirror *pgx.Conn, i *Inspection) error {
	return pgx.BeginFunc(ctx, mirror, func(tx pgx.Tx) error {
		if _, err := lockLayout(ctx, tx); err != nil {
			return err
		}
		now, _, err := storedTable(ctx, tx, i.Live)
		if err != nil {
			return err
		}
		if now == nil {
			return nil
		}
		i.Live.ID, now.ID = i.Stored.ID, i.Stored.ID
		was, err := json.Marshal(i.Stored)
		if err != nil {
			return err
		}
		is, err := json.Marshal(now)
		if err != nil {
			return err
		}
		if string(was) != string(is) {
			return nil // somebody else was faster
		}
		if err := storeTable(ctx, tx, i.Live); err != nil {
			return err
		}
		return moveLayout(ctx, tx)
	})
}

// storeTable writes the definition of a table that is known.
func storeTable(ctx context.Context, tx pgx.Tx, t *Table) error {
	def, err := json.Marshal(t)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, "UPDATE waystage.synced_table SET rank = $2, definition = $3 WHERE id = $1", t.ID, t.Rank, string(def))
	return err
}

// remove ends a table that is wanted no more.
func (s *setup) remove(ctx context.Context, i *Inspection, a *Applied) error {
	return pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", fenceLock.Milliseconds())); err != nil {
			return err
		}
		if err := s.exclude(ctx, tx, i.Stored.ID); err != nil {
			return err
		}
		// Records that are staged get their verdict from the merge, as those of a table that it does not know.
		partition := "waystage_staging." + Quote(i.Stored.stagingName())
		for _, sql := range []string{"ALTER TABLE waystage.staging DETACH PARTITION " + partition, "INSERT INTO waystage.staging SELECT * FROM " + partition} {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return err
			}
		}
		var err error
		if a.Refused, err = refusePending(ctx, tx, i.Stored.ID, "the table was taken out of synchronisation"); err != nil {
			return err
		}
		for _, side := range []string{"base", "deferred"} {
			if _, err := tx.Exec(ctx, "DELETE FROM waystage."+side+" WHERE tbl = $1", i.Stored.ID); err != nil {
				return err
			}
		}
		if err := dropMirrorTable(ctx, tx, i.Stored); err != nil {
			return err
		}
		return moveLayout(ctx, tx)
	})
}

// exclude keeps down, merge and every other change of the layout out until the transaction ends.
func (s *setup) exclude(ctx context.Context, tx pgx.Tx, id int) error {
	var at string
	if err := tx.QueryRow(ctx, "SELECT position::text FROM waystage.progress WHERE direction = 'down' FOR UPDATE").Scan(&at); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1, $2)", TableLockClass, id); err != nil {
		return err
	}
	_, err := lockLayout(ctx, tx)
	return err
}

// refusePending refuses a table's records that have no place any more.
func refusePending(ctx context.Context, tx pgx.Tx, id int, why string) (int64, error) {
	tag, err := tx.Exec(ctx, `UPDATE waystage.change SET state = 'refused', code = 'schema_changed', detail = $2, stamp = pg_current_xact_id()::text::bigint,
		decided_at = clock_timestamp() WHERE tbl = $1 AND state = 'merged'`, id, why)
	return tag.RowsAffected(), err
}

// errMoved says that the source's table was changed once more while it was being taken over.
var errMoved = errors.New("the table was changed at the source meanwhile")
