package schema

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/zap"

	"github.com/waystage/waystage/internal/pgerr"
)

// exportedSlot is a new slot with the snapshot that fits it exactly. The snapshot lives until close.
type exportedSlot struct {
	conn       *pgconn.PgConn
	consistent string // position from which on the slot delivers
	snapshot   string
}

func (e *exportedSlot) close() {
	if e.conn != nil {
		closeConn(e.conn)
		e.conn = nil
	}
}

// slotWarning is how long creating a slot may wait for open transactions before the log says so.
const slotWarning = 5 * time.Second

// createSlotDown makes the source's slot. The server waits until every transaction that is open now has ended.
func (s *setup) createSlotDown(ctx context.Context, epoch string) (*exportedSlot, error) {
	cfg, err := ReplicationConfig(s.SourceDSN, "waystage-setup")
	if err != nil {
		return nil, err
	}
	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("replication connection: %w", err)
	}
	version, err := serverVersion(ctx, s.source)
	if err != nil {
		closeConn(conn)
		return nil, err
	}
	options := "SNAPSHOT 'export'"
	if version >= 170000 {
		options += ", FAILOVER true"
	}
	e := &exportedSlot{conn: conn}
	done := make(chan error, 1)
	begun := time.Now()
	go func() {
		r, err := pglogrepl.ParseCreateReplicationSlot(conn.Exec(ctx, "CREATE_REPLICATION_SLOT "+Quote(SlotDown(epoch))+" LOGICAL pgoutput ("+options+")"))
		e.consistent, e.snapshot = r.ConsistentPoint, r.SnapshotName
		done <- err
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				e.close()
				return nil, slotError(err)
			}
			return e, nil
		case <-time.After(slotWarning):
			s.warnBlockers(ctx, time.Since(begun))
		}
	}
}

// warnBlockers names the transactions that creating a slot waits for.
func (s *setup) warnBlockers(ctx context.Context, waited time.Duration) {
	rows, err := s.source.Query(ctx, `SELECT format('pid %s (%s, %s, open since %s)', pid, usename, application_name, xact_start)
		FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() ORDER BY xact_start LIMIT 5`)
	if err != nil {
		return // the creation itself reports a lost server
	}
	who, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err == nil {
		s.log.Warn("creating the slot waits for transactions that are open at the source; end them to go on",
			zap.Duration("waited", waited.Round(time.Second)), zap.Strings("transactions", who))
	}
}

func slotError(err error) error {
	switch {
	case pgerr.Is(err, "53400"):
		return fmt.Errorf("%w; all max_replication_slots are taken: drop an unused slot or raise the setting", err)
	case pgerr.Is(err, "55000"):
		return fmt.Errorf("%w; set wal_level = logical and restart the server", err)
	case pgerr.Is(err, "42501"):
		return fmt.Errorf("%w; ALTER ROLE ... REPLICATION (managed servers: the provider's replication role)", err)
	}
	return err
}

// createSlotUp makes the mirror's publication and slot and returns the slot's position.
func (s *setup) createSlotUp(ctx context.Context, epoch string) (string, error) {
	var exists bool
	if err := s.mirror.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM pg_publication WHERE pubname = $1)", PublicationUp).Scan(&exists); err != nil {
		return "", err
	}
	if !exists {
		if _, err := s.mirror.Exec(ctx, "CREATE PUBLICATION "+PublicationUp+" FOR TABLE ONLY waystage.change WITH (publish = 'insert')"); err != nil {
			return "", err
		}
	}
	version, err := serverVersion(ctx, s.mirror)
	if err != nil {
		return "", err
	}
	create := "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput')"
	if version >= 170000 {
		create = "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput', failover => true)"
	}
	var lsn string
	if err := s.mirror.QueryRow(ctx, create, SlotUp(epoch)).Scan(&lsn); err != nil {
		return "", slotError(err)
	}
	return lsn, nil
}

func (s *setup) dropSlots(ctx context.Context, epoch string) error {
	if err := dropSlot(ctx, s.source, SlotDown(epoch)); err != nil {
		return err
	}
	return dropSlot(ctx, s.mirror, SlotUp(epoch))
}

// dropSlot drops a slot of this database if it exists. Whoever still reads it is a process that was overtaken: after a
// moment its connection is ended.
func dropSlot(ctx context.Context, conn *pgx.Conn, name string) error {
	begun := time.Now()
	for {
		var pid *int32
		err := conn.QueryRow(ctx, "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1 AND database = current_database()", name).Scan(&pid)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		if pid == nil {
			_, err = conn.Exec(ctx, "SELECT pg_drop_replication_slot($1)", name)
		} else if time.Since(begun) > 2*time.Second {
			_, err = conn.Exec(ctx, "SELECT pg_terminate_backend($1)", *pid)
			if pgerr.Is(err, "42501") {
				err = nil // only waiting is left
			}
		}
		if err != nil && !pgerr.Is(err, "55006", "42704") {
			return fmt.Errorf("drop slot %s: %w", name, err)
		}
		if time.Since(begun) > time.Minute {
			return fmt.Errorf("drop slot %s: it is still in use; stop every other waystage process that uses this mirror", name)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// slotsStand refuses to go on without the slots: what they would have delivered is gone.
func (s *setup) slotsStand(ctx context.Context) error {
	for _, side := range []struct {
		name, slot string
		conn       *pgx.Conn
	}{{"source", SlotDown(s.result.Epoch), s.source}, {"mirror", SlotUp(s.result.Epoch), s.mirror}} {
		lost, err := slotLost(ctx, side.conn, side.slot)
		if err != nil {
			return err
		}
		if lost != "" {
			return fmt.Errorf("%w: slot %s at the %s %s, so changes are missing; %s", ErrRecopy, side.slot, side.name, lost, recopyRemedy)
		}
	}
	return nil
}

// slotLost says what has become of a slot, empty when it is good.
func slotLost(ctx context.Context, q Querier, name string) (string, error) {
	var status, reason string
	err := q.QueryRow(ctx, "SELECT coalesce(wal_status, 'lost'), coalesce(to_jsonb(s)->>'invalidation_reason', '') FROM pg_replication_slots s WHERE slot_name = $1 AND database = current_database()", name).
		Scan(&status, &reason)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return "does not exist", nil
	case err != nil:
		return "", err
	}
	return SlotTrouble(status, reason), nil
}

// SlotTrouble says why a slot cannot be read any more, from pg_replication_slots.wal_status and invalidation_reason (empty before
// PostgreSQL 17); empty when it can.
func SlotTrouble(status, reason string) string {
	switch reason {
	case "":
		if status != "lost" {
			return ""
		}
		return "is lost: the server removed log that it still needed (see max_slot_wal_keep_size)"
	case "wal_removed":
		return "is lost: the server removed log that it still needed (see max_slot_wal_keep_size)"
	case "idle_timeout":
		return "is lost: nobody read it for longer than the server's idle_replication_slot_timeout"
	case "rows_removed":
		return "is lost: the server removed rows of its catalog that it still needed"
	case "wal_level_insufficient":
		return "is lost: the server ran with a wal_level below logical"
	}
	return "is lost: " + reason
}

// member is a table in the source's publication.
type member struct {
	schema, name string
	partial      bool // with a row filter or a column list
}

func (s *setup) publication(ctx context.Context) (exists bool, members []member, err error) {
	var all, complete, root bool
	err = s.source.QueryRow(ctx, "SELECT puballtables, pubinsert AND pubupdate AND pubdelete AND pubtruncate, pubviaroot FROM pg_publication WHERE pubname = $1", PublicationDown).
		Scan(&all, &complete, &root)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil, nil
	}
	if err != nil {
		return false, nil, err
	}
	if all {
		return false, nil, &ProblemsError{[]Problem{{Message: "publication " + PublicationDown + " at the source is FOR ALL TABLES",
			Remedy: "run at the source: DROP PUBLICATION " + PublicationDown + "; waystage makes its own with the synced tables only"}}}
	}
	if !complete || !root {
		sql := "ALTER PUBLICATION " + PublicationDown + " SET (publish = 'insert, update, delete, truncate', " + viaRoot + ")"
		if _, err := s.source.Exec(ctx, sql); err != nil {
			return false, nil, s.publicationRemedy(err, sql)
		}
	}
	rows, err := s.source.Query(ctx, `SELECT n.nspname, c.relname, r.prqual IS NOT NULL OR r.prattrs IS NOT NULL FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
		JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = $1`, PublicationDown)
	if err != nil {
		return false, nil, err
	}
	members, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (m member, err error) {
		return m, row.Scan(&m.schema, &m.name, &m.partial)
	})
	return true, members, err
}

// viaRoot has the rows of partitions published as those of the partitioned table that is synced.
const viaRoot = "publish_via_partition_root = true"

var progressTable = &Table{Schema: "waystage", Name: "progress"}

// ensurePublication makes the source's publication, or completes one that an administrator made. exact also takes out
// what does not belong: good only while nobody reads it.
func (s *setup) ensurePublication(ctx context.Context, tables []*Table, exact bool) error {
	want := append([]*Table{progressTable}, tables...)
	exists, members, err := s.publication(ctx)
	if err != nil {
		return err
	}
	if !exists {
		sql := "CREATE PUBLICATION " + PublicationDown + " FOR TABLE " + idents(want) + " WITH (" + viaRoot + ")"
		_, err := s.source.Exec(ctx, sql)
		return s.publicationRemedy(err, sql)
	}
	var run []string
	var missing []*Table
	for _, t := range want {
		i := slices.IndexFunc(members, func(m member) bool { return m.schema == t.Schema && m.name == t.Name })
		if i >= 0 && members[i].partial {
			run = append(run, "ALTER PUBLICATION "+PublicationDown+" DROP TABLE "+t.Ident())
		}
		if i < 0 || members[i].partial {
			missing = append(missing, t)
		}
	}
	for _, m := range members {
		known := slices.ContainsFunc(want, func(t *Table) bool { return m.schema == t.Schema && m.name == t.Name })
		if exact && !known {
			run = append(run, "ALTER PUBLICATION "+PublicationDown+" DROP TABLE "+(&Table{Schema: m.schema, Name: m.name}).Ident())
		}
	}
	if len(missing) > 0 {
		run = append(run, "ALTER PUBLICATION "+PublicationDown+" ADD TABLE "+idents(missing))
	}
	for _, sql := range run {
		if _, err := s.source.Exec(ctx, sql); err != nil {
			return s.publicationRemedy(err, sql)
		}
	}
	return nil
}

// publishLocked adds tables to the publication that is in use. The lock waits for open writers: what they wrote before
// would be neither in the stream nor in the copy.
func (s *setup) publishLocked(ctx context.Context, tables []*Table) error {
	_, members, err := s.publication(ctx)
	if err != nil {
		return err
	}
	missing := slices.DeleteFunc(slices.Clone(tables), func(t *Table) bool {
		return slices.ContainsFunc(members, func(m member) bool { return m.schema == t.Schema && m.name == t.Name })
	})
	return pgx.BeginFunc(ctx, s.source, func(tx pgx.Tx) error {
		// Tables that an earlier attempt has published are locked too: whoever wrote before is waited for.
		if _, err := tx.Exec(ctx, "LOCK TABLE "+idents(tables)+" IN SHARE MODE"); err != nil {
			return err
		}
		if len(missing) == 0 {
			return nil
		}
		sql := "ALTER PUBLICATION " + PublicationDown + " ADD TABLE " + idents(missing)
		_, err := tx.Exec(ctx, sql)
		return s.publicationRemedy(err, sql)
	})
}

// published refuses to go on when a copied table is no longer published: it was dropped and made again, or somebody took
// it out. Its changes meanwhile are lost to the stream.
func (s *setup) published(ctx context.Context, tables []*Table) error {
	exists, members, err := s.publication(ctx)
	if err != nil {
		return err
	}
	if !exists {
		return fmt.Errorf("%w: publication %s is gone from the source; %s", ErrRecopy, PublicationDown, recopyRemedy)
	}
	for _, t := range append([]*Table{progressTable}, tables...) {
		if !slices.ContainsFunc(members, func(m member) bool { return m.schema == t.Schema && m.name == t.Name && !m.partial }) {
			return fmt.Errorf("%w: table %s is no longer in publication %s (dropped and made again, or taken out), so its changes are missing; %s",
				ErrRecopy, t.FullName(), PublicationDown, recopyRemedy)
		}
	}
	return nil
}

// publicationRemedy says what an administrator has to run when we may not.
func (s *setup) publicationRemedy(err error, sql string) error {
	if !pgerr.Is(err, "42501") {
		return err
	}
	return &ProblemsError{[]Problem{{Message: "the source's user may not publish the tables: only their owner may",
		Remedy: "run at the source as their owner or as an administrator: " + sql}}}
}

func idents(tables []*Table) string {
	out := make([]string, len(tables))
	for i, t := range tables {
		out[i] = t.Own()
	}
	return strings.Join(out, ", ")
}
