package schema

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
)

// ErrRecopy is wrapped by errors that only a new copy of the source resolves: a slot is gone or lost, or one of the
// databases is another one than before.
var ErrRecopy = errors.New("a new copy is needed")

// ErrSuperseded stops a copy whose mirror another process has begun to set up anew.
var ErrSuperseded = errors.New("another process has taken the set-up over")

// CopyProgress reports the initial copy of one table.
type CopyProgress struct {
	Table string
	Rows  int64 // copied so far
	Total int64 // exact for small tables, else the server's estimate; 0: unknown
	Done  bool
}

// SetupOptions say what to set up.
type SetupOptions struct {
	SourceDSN   string
	MirrorDSN   string
	Definitions *Definitions // parsed, see ParseDefinitions; nil only with KeepStored
	KeepStored  bool         // the version that is in force goes before Definitions, which are for the first set-up then
	Author      Author       // of a new version
	Workers     int          // parallel copies; 0: 4
	Recopy      bool         // begin with a new epoch and copy everything anew
	Progress    func(CopyProgress)
	Log         *zap.Logger
}

// SetupResult is what stands afterwards.
type SetupResult struct {
	Epoch       string // of the mirror, 16 hex digits
	Tables      []*Table
	Definitions *Definitions // complete, see [Definitions.Check]
	Copied      []string     // tables that this call copied
	Warnings    []Problem
}

// Names at the two servers.
const (
	PublicationDown = "waystage"    // at the source: the synced tables and waystage.progress
	PublicationUp   = "waystage_up" // at the mirror: inserts of waystage.change
)

// SlotDown is the name of the slot at the source of a mirror epoch.
func SlotDown(epoch string) string { return "waystage_down_" + Suffix(epoch) }

// SlotUp is the name of the slot at the mirror.
func SlotUp(epoch string) string { return "waystage_up_" + Suffix(epoch) }

// Suffix is the part of the epoch that slot names end with.
func Suffix(epoch string) string { return epoch[:min(8, len(epoch))] }

// Epoch is the mirror's epoch, empty before the first set-up.
func Epoch(ctx context.Context, q Querier) (string, error) { return readMeta(ctx, q, "epoch") }

// Setup brings both databases to where the pipeline can run: our own tables, mirror tables, publications, slots, and a copy
// of the source's rows that is consistent with the slot. It can be killed at any point and run again; run on
// a finished set-up it changes nothing, or adds what the definitions have more. Concurrent calls wait for one another.
// Refusals are a [*ProblemsError] or wrap [ErrRecopy].
func Setup(ctx context.Context, o SetupOptions) (*SetupResult, error) {
	s := &setup{SetupOptions: o, log: o.Log}
	if s.log == nil {
		s.log = zap.NewNop()
	}
	if s.Workers <= 0 {
		s.Workers = 4
	}
	if s.Definitions == nil && !s.KeepStored {
		return nil, fmt.Errorf("set-up: %w", ErrNoDefinitions)
	}
	if err := s.run(ctx); err != nil {
		return nil, fmt.Errorf("set-up: %w", err)
	}
	return &s.result, nil
}

type setup struct {
	SetupOptions
	log      *zap.Logger
	source   *pgx.Conn
	mirror   *pgx.Conn // holds the set-up lock
	result   SetupResult
	identity map[string]string // meta key -> what the servers say now
	kept     []string          // tables that stay as the mirror has them, see keepStopped
}

func (s *setup) run(ctx context.Context) (err error) {
	if s.source, err = Connect(ctx, s.SourceDSN, "waystage-setup"); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	defer closeConn(s.source)
	if s.mirror, err = Connect(ctx, s.MirrorDSN, "waystage-setup"); err != nil {
		return fmt.Errorf("mirror: %w", err)
	}
	defer closeConn(s.mirror)
	if err := s.identify(ctx); err != nil {
		return err
	}
	if err := MigrateMirror(ctx, s.MirrorDSN); err != nil {
		return err
	}
	// The lock ends with the connection, so a killed set-up leaves none.
	if _, err := s.mirror.Exec(ctx, "SELECT pg_advisory_lock($1, $2)", lockClass, lockSetup); err != nil {
		return err
	}
	if err := MigrateSource(ctx, s.SourceDSN); err != nil {
		return err
	}
	if s.Recopy {
		if err := s.reset(ctx); err != nil {
			return fmt.Errorf("begin anew: %w", err)
		}
	}
	state, err := readMeta(ctx, s.mirror, "copy")
	if err != nil {
		return err
	}
	if state == "done" {
		if err := s.sameDatabases(ctx); err != nil {
			return err
		}
	}
	if s.result.Epoch, err = s.ensureEpoch(ctx); err != nil {
		return err
	}
	if s.KeepStored {
		if err := s.stored(ctx); err != nil {
			return err
		}
	}
	if err := s.readDefinitions(ctx, state == "done"); err != nil {
		return err
	}
	if state == "done" {
		return s.resume(ctx)
	}
	return s.fresh(ctx)
}

// identify reads what tells this source and this mirror from every other database, and that they are not the same.
func (s *setup) identify(ctx context.Context) error {
	s.identity = map[string]string{}
	for key, conn := range map[string]*pgx.Conn{"source_system": s.source, "mirror_system": s.mirror} {
		var id string
		err := conn.QueryRow(ctx, `SELECT c.system_identifier::text || '/' || d.oid::text FROM pg_control_system() c, pg_database d
			WHERE d.datname = current_database()`).Scan(&id)
		if err != nil {
			return err
		}
		s.identity[key] = id
	}
	if s.identity["source_system"] == s.identity["mirror_system"] {
		return &ProblemsError{[]Problem{{Message: "source and mirror are the same database",
			Remedy: "create a database of its own for the mirror; it may be on the same server"}}}
	}
	return nil
}

// sameDatabases refuses to go on with another source, or with a mirror that was restored on another server: its row
// versions are transaction ids of the old one.
func (s *setup) sameDatabases(ctx context.Context) error {
	for _, key := range []string{"source_system", "mirror_system"} {
		was, err := readMeta(ctx, s.mirror, key)
		if err != nil {
			return err
		}
		if was != s.identity[key] {
			return fmt.Errorf("%w: the %s is another database (%s) than the one that was set up (%s); connect to that one, or %s",
				ErrRecopy, strings.TrimSuffix(key, "_system"), s.identity[key], was, recopyRemedy)
		}
	}
	return nil
}

func randomHex(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func (s *setup) ensureEpoch(ctx context.Context) (string, error) {
	if _, err := s.mirror.Exec(ctx, "INSERT INTO waystage.meta (key, value) VALUES ('epoch', $1) ON CONFLICT DO NOTHING", randomHex(8)); err != nil {
		return "", err
	}
	return Epoch(ctx, s.mirror)
}

// readDefinitions holds the definitions against the source.
func (s *setup) readDefinitions(ctx context.Context, running bool) error {
	names := s.Definitions.TableNames()
	if len(names) == 0 {
		return &ProblemsError{[]Problem{{File: s.Definitions.File, Message: "no subscription is defined, so there is nothing to sync",
			Remedy: "waystage init writes definitions from the source's tables"}}}
	}
	tables, problems, err := ReadTables(ctx, s.source, names)
	if err != nil {
		return err
	}
	if running {
		if tables, problems, err = s.keepStopped(ctx, tables, problems); err != nil {
			return err
		}
	}
	s.result.Tables, s.result.Definitions = tables, s.Definitions
	warnings, err := Refusing(append(problems, s.Definitions.Check(tables)...))
	s.result.Warnings = append(s.result.Warnings, warnings...)
	return err
}

// keepStopped puts tables that the source has altered so that they cannot go on, and those that have got columns with values,
// back to what the mirror has of them: they are stopped, or go on without the columns, and the server starts for all others.
func (s *setup) keepStopped(ctx context.Context, tables []*Table, problems []Problem) ([]*Table, []Problem, error) {
	found, err := Inspect(ctx, s.source, s.mirror, s.Definitions.TableNames())
	if err != nil {
		return nil, nil, err
	}
	for _, i := range found {
		if i.Stored == nil || i.Action == ActRefresh || i.Action == ActRemove {
			continue
		}
		_, stops := i.stops()
		if !stops && i.Stopped == "" {
			filled, err := s.filled(ctx, i)
			if err != nil {
				return nil, nil, err
			}
			if !filled {
				continue
			}
			s.result.Warnings = append(s.result.Warnings, Problem{Table: i.Table, Warning: true, Remedy: "waystage schema apply",
				Message: "has new columns with values, which are not synced yet: the change stream does not carry them"})
		}
		layout, err := Layout(ctx, s.mirror)
		if err != nil {
			return nil, nil, err
		}
		if err := actAlone(ctx, s.mirror, layout, i, s.log); err != nil {
			return nil, nil, err
		}
		problems = slices.DeleteFunc(problems, func(p Problem) bool { return p.Table == i.Table })
		tables = append(slices.DeleteFunc(tables, func(t *Table) bool { return t.FullName() == i.Table }), i.Stored)
		s.kept = append(s.kept, i.Table)
	}
	slices.SortStableFunc(tables, func(a, b *Table) int {
		return cmp.Or(cmp.Compare(a.Rank, b.Rank), cmp.Compare(a.FullName(), b.FullName()))
	})
	return tables, problems, nil
}

// filled tells whether a new column has values already: adding it emitted no row.
func (s *setup) filled(ctx context.Context, i *Inspection) (bool, error) {
	for _, c := range i.Live.Columns {
		if has(i.Stored, c.Name) {
			continue
		}
		var filled bool
		err := s.source.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM "+i.Live.Own()+" WHERE "+Quote(c.Name)+" IS NOT NULL)").Scan(&filled)
		if err != nil || filled {
			return filled, err
		}
	}
	return false, nil
}

// fresh makes the first copy, or makes it again when the last one did not get to its end.
func (s *setup) fresh(ctx context.Context) error {
	run := randomHex(8)
	epoch := s.result.Epoch
	if err := s.dropSlots(ctx, epoch); err != nil {
		return err
	}
	if err := s.empty(ctx, run); err != nil {
		return fmt.Errorf("empty the mirror: %w", err)
	}
	if err := ensureMirror(ctx, s.mirror, s.result.Tables, s.Definitions, false); err != nil {
		return err
	}
	if err := s.checkLive(ctx); err != nil {
		return err
	}
	// The publication before the slot: a slot that is older than its publication never sees it.
	if err := s.ensurePublication(ctx, s.result.Tables, true); err != nil {
		return fmt.Errorf("publication %s at the source: %w", PublicationDown, err)
	}
	if _, err := s.source.Exec(ctx, "INSERT INTO waystage.progress (epoch, seq, position) VALUES ($1, 0, '0/0') ON CONFLICT (epoch) DO NOTHING", epoch); err != nil {
		return fmt.Errorf("progress at the source: %w", err)
	}
	slot, err := s.createSlotDown(ctx, epoch)
	if err != nil {
		return fmt.Errorf("slot %s: %w", SlotDown(epoch), err)
	}
	defer slot.close()
	c := &copier{setup: s, run: run, snapshot: slot.snapshot}
	if err := c.copy(ctx, s.result.Tables); err != nil {
		return fmt.Errorf("initial copy: %w", err)
	}
	slot.close()
	if err := s.finishTables(ctx, s.result.Tables); err != nil {
		return err
	}
	return s.finish(ctx, run, slot.consistent)
}

// finishTables makes the indexes that a bulk copy is faster without, and tells the planner what is there now.
func (s *setup) finishTables(ctx context.Context, tables []*Table) error {
	if err := EnsureMirror(ctx, s.mirror, tables, s.Definitions); err != nil {
		return err
	}
	for _, t := range tables {
		if _, err := s.mirror.Exec(ctx, "ANALYZE "+t.Ident()); err != nil {
			return fmt.Errorf("analyse %s: %w", t.FullName(), err)
		}
		s.result.Copied = append(s.result.Copied, t.FullName())
	}
	return nil
}

// finish makes the up side and declares the copy done, in one commit that counts.
func (s *setup) finish(ctx context.Context, run, down string) error {
	epoch := s.result.Epoch
	// Only now: an older slot would have to read all of the copy's log.
	up, err := s.createSlotUp(ctx, epoch)
	if err != nil {
		return fmt.Errorf("slot %s at the mirror: %w", SlotUp(epoch), err)
	}
	if _, err := s.source.Exec(ctx, "UPDATE waystage.progress SET position = $2 WHERE epoch = $1 AND seq = 0", epoch, up); err != nil {
		return fmt.Errorf("progress at the source: %w", err)
	}
	publication, err := publicationID(ctx, s.source, PublicationDown)
	if err != nil {
		return err
	}
	err = pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
		if err := stillOurs(ctx, tx, run, "FOR UPDATE"); err != nil {
			return err
		}
		for key, value := range map[string]string{"copy": "done", metaPublication: publication, "source_system": s.identity["source_system"], "mirror_system": s.identity["mirror_system"]} {
			if err := writeMeta(ctx, tx, key, value); err != nil {
				return err
			}
		}
		if _, err := tx.Exec(ctx, `INSERT INTO waystage.progress (direction, position) VALUES ('down', $1), ('up', $2)
			ON CONFLICT (direction) DO UPDATE SET position = excluded.position, seq = 0, up_seq = 0, rewind = false, committed_at = NULL, updated_at = now()`, down, up); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "UPDATE waystage.synced_table SET copied = true WHERE id = ANY($1)", tableIDs(s.result.Tables)); err != nil {
			return err
		}
		_, err := saveDefinitions(ctx, tx, s.Definitions, s.Author)
		return err
	})
	if err != nil {
		return fmt.Errorf("finish: %w", err)
	}
	s.log.Info("set-up complete", zap.String("epoch", epoch), zap.Int("tables", len(s.result.Tables)), zap.String("down", down), zap.String("up", up))
	return nil
}

// stillOurs fences a set-up that was overtaken while it was cut off.
func stillOurs(ctx context.Context, q Querier, run, lock string) error {
	var ours bool
	err := q.QueryRow(ctx, "SELECT value = $1 FROM waystage.meta WHERE key = 'copy_run' "+lock, run).Scan(&ours)
	if err != nil {
		return err
	}
	if !ours {
		return ErrSuperseded
	}
	return nil
}

// empty takes the mirror back to before the copy: whatever an earlier one left is gone.
func (s *setup) empty(ctx context.Context, run string) error {
	return pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
		// Waits for chunks that an earlier set-up is still committing, and turns away its next ones.
		if err := writeMeta(ctx, tx, "copy_run", run); err != nil {
			return err
		}
		if err := writeMeta(ctx, tx, "copy", "running"); err != nil {
			return err
		}
		tables, err := LoadTables(ctx, tx)
		if err != nil {
			return err
		}
		wanted := s.Definitions.TableNames()
		for _, t := range tables {
			if !slices.Contains(wanted, t.FullName()) {
				if err := dropMirrorTable(ctx, tx, t); err != nil {
					return err
				}
				continue
			}
			if _, err := tx.Exec(ctx, "TRUNCATE "+t.Ident()); err != nil {
				return err
			}
			drops, err := subsetIndexDrops(ctx, tx, t, nil) // they come after the copy
			if err != nil {
				return err
			}
			for _, sql := range drops {
				if _, err := tx.Exec(ctx, sql); err != nil {
					return err
				}
			}
		}
		if _, err := tx.Exec(ctx, "TRUNCATE waystage.parked, waystage.deferred"); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE waystage.synced_table SET copied = false, stopped_code = NULL, stopped_detail = '', stopped_at = NULL,
			stopped_position = NULL, floor = NULL, copying = false, emptied = false`); err != nil {
			return err
		}
		return moveLayout(ctx, tx)
	})
}

// reset gives the mirror a new epoch (rule D13). What devices have sent and not got an outcome for is closed
// here; they send it again under the new epoch.
func (s *setup) reset(ctx context.Context) error {
	epoch, err := Epoch(ctx, s.mirror)
	if err != nil {
		return err
	}
	if epoch == "" {
		return nil
	}
	if err := s.dropSlots(ctx, epoch); err != nil {
		return err
	}
	// An up worker that still runs somewhere is fenced by the missing row.
	if _, err := s.source.Exec(ctx, "DELETE FROM waystage.progress WHERE epoch = $1", epoch); err != nil {
		return err
	}
	return pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
		for key, value := range map[string]string{"epoch": randomHex(8), "copy": "none"} {
			if err := writeMeta(ctx, tx, key, value); err != nil {
				return err
			}
		}
		for _, sql := range []string{
			`UPDATE waystage.change SET state = 'refused', code = 'epoch', stamp = pg_current_xact_id()::text::bigint, decided_at = clock_timestamp(),
				detail = 'the mirror was copied anew before the source had answered; the device sends the record again' WHERE state = 'merged'`,
			"UPDATE waystage.session SET state = 'closed' WHERE state <> 'closed'",
			"DELETE FROM waystage.progress",
			"DELETE FROM waystage.trouble",
			"DELETE FROM waystage.meta WHERE key LIKE 'slot\\_told\\_%'",
			"TRUNCATE waystage.staging, waystage.base, waystage.tombstone, waystage.cursor, waystage.keyset",
		} {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return err
			}
		}
		return nil
	})
}

// checkLive has the mirror check the rows queries.
func (s *setup) checkLive(ctx context.Context) error {
	problems, err := s.Definitions.CheckLive(ctx, s.mirror)
	if err != nil {
		return err
	}
	warnings, err := Refusing(problems)
	s.result.Warnings = append(s.result.Warnings, warnings...)
	return err
}

// resume completes a finished set-up: checks that it still stands, and adds what the definitions have more.
func (s *setup) resume(ctx context.Context) error {
	if err := s.slotsStand(ctx); err != nil {
		return err
	}
	rows, err := s.mirror.Query(ctx, "SELECT schema_name || '.' || table_name FROM waystage.synced_table WHERE copied")
	if err != nil {
		return err
	}
	copied, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	var old, added []*Table
	for _, t := range s.result.Tables {
		switch {
		case slices.Contains(s.kept, t.FullName()):
		case slices.Contains(copied, t.FullName()):
			old = append(old, t)
		default:
			added = append(added, t)
		}
	}
	before, err := definitionsInMirror(ctx, s.mirror)
	if err != nil {
		return err
	}
	if err := s.published(ctx, old); err != nil {
		return err
	}
	columns, err := s.newColumns(ctx, old)
	if err != nil {
		return err
	}
	// Appliers know the tables as they were when they began. Who changes what is mirrored takes their seats meanwhile.
	if len(added) > 0 || len(columns) > 0 {
		if err := s.takeSeats(ctx); err != nil {
			return err
		}
		defer s.leaveSeats(ctx)
	}
	if err := EnsureMirror(ctx, s.mirror, s.result.Tables, s.Definitions); err != nil {
		return err
	}
	if err := s.checkLive(ctx); err != nil {
		return err
	}
	if len(added) > 0 {
		if err := s.addTables(ctx, added); err != nil {
			return fmt.Errorf("add tables: %w", err)
		}
	}
	return pgx.BeginFunc(ctx, s.mirror, func(tx pgx.Tx) error {
		if _, err := saveDefinitions(ctx, tx, s.Definitions, s.Author); err != nil {
			return err
		}
		after, err := definitionsInMirror(ctx, tx)
		if err != nil || after == before {
			return err
		}
		return moveLayout(ctx, tx) // other servers take it over
	})
}

// definitionsInMirror stands for the tables and the definitions in force.
func definitionsInMirror(ctx context.Context, q Querier) (sum string, err error) {
	err = q.QueryRow(ctx, `SELECT md5((SELECT coalesce(string_agg(definition::text, ',' ORDER BY id), '') FROM waystage.synced_table)
		|| (SELECT coalesce(max(version), 0)::text FROM waystage.definition))`).Scan(&sum)
	return sum, err
}

func tableIDs(tables []*Table) []int32 {
	out := make([]int32, 0, len(tables))
	for _, t := range tables {
		out = append(out, int32(t.ID))
	}
	return out
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
