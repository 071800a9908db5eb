package schema

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Level says how much a finding matters.
type Level string

// Levels.
const (
	OK      Level = "ok"
	Info    Level = "info"    // worth knowing
	Warning Level = "warning" // works, with a risk
	Failure Level = "error"   // would not work, or not safely
)

// Finding is one result of the preflight.
type Finding struct {
	Level  Level  `json:"level"`
	Code   string `json:"code"`             // stable name, e.g. "wal_level"
	Where  string `json:"where"`            // source, mirror, or a table
	What   string `json:"what"`             // what was found, and why it matters
	Remedy string `json:"remedy,omitempty"` // what to run
}

// findings collects them under one place.
type findings struct {
	where string
	list  []Finding
}

func (f *findings) add(level Level, code, remedy, format string, args ...any) {
	f.list = append(f.list, Finding{Level: level, Code: code, Where: f.where, What: fmt.Sprintf(format, args...), Remedy: remedy})
}

const (
	minMajor  = 15
	clockSkew = 5 * time.Second
)

// Preflight looks at both databases and names everything that would keep Waystage from working safely with these
// tables ("schema.table"), each with its remedy. suffix is that of an existing installation's slots, "" before the first start. It changes
// nothing. An unreachable database is a finding too; the error is for a cancelled context only.
func Preflight(ctx context.Context, sourceDSN, mirrorDSN string, tables []string, suffix string) ([]Finding, error) {
	var all []Finding
	for _, side := range []struct {
		name, dsn string
		look      func(context.Context, *pgx.Conn, *findings) error
	}{
		{"source", sourceDSN, func(ctx context.Context, c *pgx.Conn, f *findings) error {
			return lookAtSource(ctx, c, f, tables, suffix)
		}},
		{"mirror", mirrorDSN, func(ctx context.Context, c *pgx.Conn, f *findings) error { return lookAtMirror(ctx, c, f, suffix) }},
	} {
		f := &findings{where: side.name}
		conn, err := Connect(ctx, side.dsn, "waystage-check")
		if err == nil {
			f.add(OK, "connect", "", "reached %s as %s", conn.Config().Database, conn.Config().User)
			err = side.look(ctx, conn, f)
			closeConn(conn)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			f.add(Failure, "connect", "check "+side.name+".dsn: host, port, database, user, password and TLS mode", "%v", err)
		}
		all = append(all, f.list...)
	}
	return all, nil
}

// lookAtServer checks what both sides need of their server.
func lookAtServer(ctx context.Context, c *pgx.Conn, f *findings, slot string) error {
	var version, maxSlots, usedSlots, maxSenders, usedSenders int
	var walLevel, keep, idle, versionText string
	var standby, replication, exists bool
	err := c.QueryRow(ctx, `SELECT current_setting('server_version_num')::int, current_setting('server_version'), current_setting('wal_level'), pg_is_in_recovery(),
		current_setting('max_replication_slots')::int, (SELECT count(*) FROM pg_replication_slots),
		current_setting('max_wal_senders')::int, (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender'),
		current_setting('max_slot_wal_keep_size'), coalesce(current_setting('idle_replication_slot_timeout', true), ''),
		(SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user)
			OR EXISTS (SELECT 1 FROM pg_roles r WHERE r.rolname IN ('rds_replication', 'rds_superuser', 'cloudsqlsuperuser', 'azure_pg_admin') AND pg_has_role(r.oid, 'member')),
		EXISTS (SELECT 1 FROM pg_replication_slots WHERE slot_name = $1)`, slot).
		Scan(&version, &versionText, &walLevel, &standby, &maxSlots, &usedSlots, &maxSenders, &usedSenders, &keep, &idle, &replication, &exists)
	if err != nil {
		return err
	}
	if version/10000 < minMajor {
		f.add(Failure, "version", fmt.Sprintf("upgrade the server to PostgreSQL %d or later", minMajor), "PostgreSQL %s is too old: column lists and row filters of publications are missing", versionText)
	} else {
		f.add(OK, "version", "", "PostgreSQL %s", versionText)
	}
	if standby {
		f.add(Failure, "standby", "name the primary in the connection string; with several hosts add target_session_attrs=read-write", "the server is a standby: nothing can be written there")
	}
	if walLevel == "logical" {
		f.add(OK, "wal_level", "", "wal_level = logical")
	} else {
		f.add(Failure, "wal_level", "ALTER SYSTEM SET wal_level = logical; then restart the server (managed servers: set it in the parameter group, e.g. rds.logical_replication = 1)",
			"wal_level = %s: changes can't be read from the log", walLevel)
	}
	if !exists && usedSlots >= maxSlots {
		f.add(Failure, "max_replication_slots", fmt.Sprintf("drop an unused slot, or ALTER SYSTEM SET max_replication_slots = %d; then restart", maxSlots+2), "all %d replication slots are taken; Waystage needs one", maxSlots)
	} else {
		f.add(OK, "max_replication_slots", "", "%d of %d replication slots are taken", usedSlots, maxSlots)
	}
	if usedSenders >= maxSenders {
		f.add(Failure, "max_wal_senders", fmt.Sprintf("ALTER SYSTEM SET max_wal_senders = %d; then restart", maxSenders+2), "all %d WAL senders are taken; Waystage needs one, and one more for the initial copy", maxSenders)
	}
	if keep == "-1" {
		f.add(Warning, "max_slot_wal_keep_size", "ALTER SYSTEM SET max_slot_wal_keep_size = '20GB'; SELECT pg_reload_conf();",
			"max_slot_wal_keep_size is unlimited: if Waystage is down for long, kept WAL can fill the disk")
	}
	if idle != "" && idle != "0" {
		f.add(Warning, "idle_replication_slot_timeout", "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf(); max_slot_wal_keep_size bounds the disk already",
			"idle_replication_slot_timeout is %s: if Waystage is down for longer, its slot is lost and everything must be copied anew", idle)
	}
	if !replication {
		f.add(Failure, "replication", "ALTER ROLE "+Quote(c.Config().User)+" REPLICATION; (managed servers: GRANT rds_replication or the provider's role)", "role %s may not read the log", c.Config().User)
	}
	return lookAtSlot(ctx, c, f, slot)
}

// lookAtSlot checks a slot that exists already.
func lookAtSlot(ctx context.Context, c *pgx.Conn, f *findings, slot string) error {
	var status, reason, plugin string
	var retained int64
	err := c.QueryRow(ctx, `SELECT coalesce(wal_status, ''), coalesce(to_jsonb(s)->>'invalidation_reason', ''), coalesce(plugin, ''),
			CASE WHEN pg_is_in_recovery() THEN 0 ELSE coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0) END::bigint
		FROM pg_replication_slots s WHERE slot_name = $1 AND NOT pg_is_in_recovery()`, slot).Scan(&status, &reason, &plugin, &retained)
	switch {
	case err == pgx.ErrNoRows:
		return nil
	case err != nil:
		return err
	case SlotTrouble(status, reason) != "":
		f.add(Failure, "slot_lost", "waystage serve --recopy makes a new slot and copies the tables anew; unsent device changes stay", "slot %s %s", slot, SlotTrouble(status, reason))
	case plugin != "pgoutput":
		f.add(Failure, "slot_plugin", "SELECT pg_drop_replication_slot("+Literal(slot)+"), if nothing else uses it", "slot %s belongs to plugin %q", slot, plugin)
	default:
		f.add(OK, "slot", "", "slot %s holds back %s of WAL (%s)", slot, byteSize(retained), status)
	}
	return nil
}

func lookAtSource(ctx context.Context, c *pgx.Conn, f *findings, tables []string, suffix string) error {
	if err := lookAtServer(ctx, c, f, "waystage_down_"+suffix); err != nil {
		return err
	}
	var create, made bool
	var now time.Time
	err := c.QueryRow(ctx, `SELECT has_database_privilege(current_database(), 'CREATE'),
		EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = 'waystage' AND has_schema_privilege(oid, 'CREATE')) AND EXISTS (SELECT 1 FROM pg_publication WHERE pubname = $1),
		clock_timestamp()`, PublicationDown).Scan(&create, &made, &now)
	if err != nil {
		return err
	}
	if !create && !made {
		f.add(Failure, "create", "GRANT CREATE ON DATABASE "+Quote(c.Config().Database)+" TO "+Quote(c.Config().User)+";", "role %s may not create schema waystage and the publication", c.Config().User)
	}
	if skew := time.Since(now).Abs(); skew > clockSkew {
		f.add(Warning, "clock", "let both machines follow a time server", "this machine's clock and the server's differ by %s: times in logs and lags are wrong by as much (nothing is decided by clocks)", skew.Round(time.Second))
	}
	var encoding string
	if err := c.QueryRow(ctx, "SHOW server_encoding").Scan(&encoding); err != nil {
		return err
	}
	if encoding == "SQL_ASCII" {
		f.add(Failure, "encoding", "make a database with ENCODING 'UTF8' from a dump that was cleaned with iconv",
			"the database has the encoding SQL_ASCII: its texts are bytes of no known encoding, and what is not valid UTF-8 cannot be carried")
	}
	if err := lookAtOrphans(ctx, c, f, suffix); err != nil {
		return err
	}
	if err := lookAtMarker(ctx, c, f); err != nil {
		return err
	}
	found, problems, err := ReadTables(ctx, c, tables)
	if err != nil {
		return err
	}
	for _, p := range problems {
		level := Failure
		if p.Warning {
			level = Warning
		}
		f.list = append(f.list, Finding{Level: level, Code: "table", Where: p.Table, What: p.Message, Remedy: p.Remedy})
	}
	for _, t := range found {
		if err := lookAtTable(ctx, c, f, t); err != nil {
			return err
		}
	}
	return nil
}

// lookAtOrphans names slots of mirrors that are gone: nobody reads them, and they hold back log for ever.
func lookAtOrphans(ctx context.Context, c *pgx.Conn, f *findings, suffix string) error {
	rows, err := c.Query(ctx, `SELECT slot_name, coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint FROM pg_replication_slots
		WHERE slot_name LIKE 'waystage\_down\_%' AND slot_name <> 'waystage_down_' || $1 AND NOT active AND database = current_database() AND NOT pg_is_in_recovery()`, suffix)
	if err != nil {
		return err
	}
	var name string
	var retained int64
	_, err = pgx.ForEachRow(rows, []any{&name, &retained}, func() error {
		f.add(Warning, "slot_orphan", "if no other Waystage uses this source: SELECT pg_drop_replication_slot("+Literal(name)+");",
			"slot %s belongs to another mirror, nobody reads it, and it holds back %s of WAL", name, byteSize(retained))
		return nil
	})
	return err
}

// lookAtMarker names who else may write the source's progress table: its row says which of the devices' changes have arrived.
func lookAtMarker(ctx context.Context, c *pgx.Conn, f *findings) error {
	var who []string
	err := c.QueryRow(ctx, `SELECT coalesce(array_agg(DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END), '{}')
		FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = to_regclass('waystage.progress')
			AND a.privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE') AND a.grantee NOT IN (c.relowner, current_user::regrole)`).Scan(&who)
	if err == nil && len(who) > 0 {
		f.add(Warning, "marker_rights", "REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON waystage.progress FROM "+strings.Join(who, ", ")+";",
			"%s may write waystage.progress: a forged row there would pass devices' changes off as applied", strings.Join(who, ", "))
	}
	return err
}

// lookAtTable checks privileges and warns of what the source does by itself when our changes arrive.
func lookAtTable(ctx context.Context, c *pgx.Conn, server *findings, t *Table) error {
	f := &findings{where: t.FullName()}
	user := c.Config().User
	var sel, ins, upd, del, owner, published, rls, bypass bool
	var triggers, cascades int
	err := c.QueryRow(ctx, `SELECT has_table_privilege(c.oid, 'SELECT'), has_table_privilege(c.oid, 'INSERT'), has_table_privilege(c.oid, 'UPDATE'), has_table_privilege(c.oid, 'DELETE'),
			pg_has_role(c.relowner, 'USAGE'),
			EXISTS (SELECT 1 FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid WHERE p.pubname = $2 AND r.prrelid = c.oid),
			c.relrowsecurity AND (c.relforcerowsecurity OR NOT pg_has_role(c.relowner, 'USAGE')),
			(SELECT rolbypassrls OR rolsuper FROM pg_roles WHERE rolname = current_user),
			(SELECT count(*) FROM pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal AND tgenabled <> 'D'),
			(SELECT count(*) FROM pg_constraint WHERE confrelid = c.oid AND contype = 'f' AND confdeltype IN ('c', 'n', 'd'))
		FROM pg_class c WHERE c.oid = $1::text::regclass`, t.Ident(), PublicationDown).Scan(&sel, &ins, &upd, &del, &owner, &published, &rls, &bypass, &triggers, &cascades)
	if err != nil {
		return err
	}
	var missing []string
	for _, p := range []struct {
		name string
		has  bool
	}{{"SELECT", sel}, {"INSERT", ins}, {"UPDATE", upd}, {"DELETE", del}} {
		if !p.has {
			missing = append(missing, p.name)
		}
	}
	if len(missing) > 0 {
		level := Warning
		if !sel {
			level = Failure
		}
		f.add(level, "privileges", fmt.Sprintf("GRANT %s ON %s TO %s;", strings.Join(missing, ", "), t.Ident(), Quote(user)),
			"role %s lacks %s: devices' changes of this kind will be refused by the source", user, strings.Join(missing, ", "))
	}
	if !owner && !published {
		f.add(Failure, "owner", fmt.Sprintf("as the owner or a superuser: CREATE PUBLICATION %[1]s FOR TABLE %[2]s; ALTER PUBLICATION %[1]s OWNER TO %[3]s; (with all tables that are to be synced)",
			PublicationDown, t.Ident(), Quote(user)), "role %s does not own the table, so it can't add it to a publication", user)
	}
	// A device that writes a key in another way than the server has a row of its own until the source answers.
	for _, k := range t.Key {
		if c, _ := t.Column(k); c.Loose() || strings.HasSuffix(c.Type, "citext") {
			f.add(Warning, "key_type", "let devices write keys exactly as the server does, or use another type",
				"the key column %q is of type %s, in which equal values may be written in different ways", k, c.Type)
		}
	}
	if rls && !bypass {
		f.add(Failure, "row_security", "ALTER ROLE "+Quote(user)+" BYPASSRLS;", "row security hides rows from role %s: a hidden row would look like a deleted one", user)
	}
	if triggers > 0 {
		f.add(Info, "triggers", "", "%d trigger(s) run when devices' changes arrive; what they do to the row comes back to the devices", triggers)
	}
	if cascades > 0 {
		f.add(Info, "cascades", "", "%d foreign key(s) of other tables act when a row is deleted here; rows they remove leave the devices too", cascades)
	}
	var generated []string
	err = c.QueryRow(ctx, `SELECT coalesce(array_agg(attname::text ORDER BY attnum), '{}') FROM pg_attribute
		WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated <> ''`, t.Ident()).Scan(&generated)
	if err != nil {
		return err
	}
	if len(generated) > 0 {
		f.add(Warning, "generated", "compute them on the device, in a view; or let an ordinary column be filled by a trigger: that is carried",
			"generated columns are not carried, so devices do not have them: %s", strings.Join(generated, ", "))
	}
	if t.Partitioned {
		if err := lookAtPartitions(ctx, c, f, t, user); err != nil {
			return err
		}
	}
	if len(f.list) == 0 {
		f.add(OK, "table", "", "%d columns, key (%s)", len(t.Columns), strings.Join(t.Key, ", "))
	}
	server.list = append(server.list, f.list...)
	return nil
}

func lookAtMirror(ctx context.Context, c *pgx.Conn, f *findings, suffix string) error {
	if err := lookAtServer(ctx, c, f, "waystage_up_"+suffix); err != nil {
		return err
	}
	var encoding string
	if err := c.QueryRow(ctx, "SHOW server_encoding").Scan(&encoding); err != nil {
		return err
	}
	if encoding != "UTF8" {
		f.add(Failure, "encoding", "CREATE DATABASE "+Quote(c.Config().Database)+" ENCODING 'UTF8' TEMPLATE template0;", "the mirror has the encoding %s, which does not hold every text", encoding)
	}
	var create, role, mayCreateRole bool
	var age int64
	err := c.QueryRow(ctx, `SELECT has_database_privilege(current_database(), 'CREATE'), EXISTS (SELECT 1 FROM pg_roles WHERE rolname = 'waystage_reader'),
			(SELECT rolcreaterole OR rolsuper FROM pg_roles WHERE rolname = current_user),
			coalesce((SELECT extract(epoch FROM max(now() - xact_start)) FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()), 0)::bigint`).
		Scan(&create, &role, &mayCreateRole, &age)
	if err != nil {
		return err
	}
	if !create {
		f.add(Failure, "create", "GRANT CREATE ON DATABASE "+Quote(c.Config().Database)+" TO "+Quote(c.Config().User)+";", "role %s may not create schemas", c.Config().User)
	}
	if !role && !mayCreateRole {
		f.add(Failure, "reader_role", "CREATE ROLE waystage_reader NOLOGIN; GRANT waystage_reader TO "+Quote(c.Config().User)+";", "role waystage_reader, under which the subscriptions' queries run, does not exist and can't be created")
	}
	if age > 300 {
		f.add(Warning, "old_transaction", "SELECT pid, xact_start, query FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start; end the oldest",
			"a writing transaction on the mirror's server has been open for %d s: meanwhile every sync sends again what changed since it began", age)
	}
	return nil
}

// byteSize renders a number of bytes for people.
func byteSize(n int64) string {
	const units = "kMGTP"
	if n < 1024 {
		return strconv.FormatInt(n, 10) + " B"
	}
	f, i := float64(n)/1024, 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}
