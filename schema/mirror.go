package schema

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/internal/pgerr"
)

// ReaderRole is the role as which rows queries are evaluated: it may read the mirror tables and nothing else.
const ReaderRole = "waystage_reader"

// EnsureMirror makes or completes everything that the mirror keeps for these tables: schemas, mirror tables with system
// columns, staging partitions, tombstone triggers, indexes, the reader role's rights, and the rows of waystage.synced_table.
// It fills in Table.ID. It can be repeated, and changes what is there only by adding; a change that needs more (a column's
// type, the primary key) is refused as a [*ProblemsError].
func EnsureMirror(ctx context.Context, conn *pgx.Conn, tables []*Table, d *Definitions) error {
	return ensureMirror(ctx, conn, tables, d, true)
}

// ensureMirror leaves the subset indexes for later when a bulk copy comes first.
func ensureMirror(ctx context.Context, conn *pgx.Conn, tables []*Table, d *Definitions, indexes bool) error {
	for _, role := range []string{ReaderRole, DeciderRole} {
		if err := ensureRole(ctx, conn, role); err != nil {
			return fmt.Errorf("role %s: %w", role, err)
		}
	}
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1, $2)", lockClass, lockDDL); err != nil {
			return err
		}
		if err := ensureDecide(ctx, tx); err != nil {
			return fmt.Errorf("waystage.decide: %w", err)
		}
		var problems []Problem
		for _, t := range tables {
			p, err := ensureTable(ctx, tx, t, d, indexes)
			if err != nil {
				return fmt.Errorf("table %s: %w", t.FullName(), err)
			}
			problems = append(problems, p...)
		}
		_, err := Refusing(problems)
		return err
	})
	if err != nil {
		return fmt.Errorf("mirror tables: %w", err)
	}
	return nil
}

// ensureRole makes a role, which all databases of a server share, and lets us act as it.
func ensureRole(ctx context.Context, conn *pgx.Conn, role string) error {
	for attempt := 0; ; attempt++ {
		var exists, member bool
		err := conn.QueryRow(ctx, `SELECT r.oid IS NOT NULL, coalesce(pg_has_role(current_user, r.oid, 'MEMBER'), false)
			FROM (SELECT 1) one LEFT JOIN pg_roles r ON r.rolname = $1`, role).Scan(&exists, &member)
		if err != nil {
			return err
		}
		switch {
		case !exists:
			_, err = conn.Exec(ctx, "CREATE ROLE "+role+" NOLOGIN NOINHERIT")
		case !member:
			_, err = conn.Exec(ctx, "GRANT "+role+" TO CURRENT_USER")
		default:
			return nil
		}
		switch {
		case err == nil:
		case pgerr.Is(err, "42501", "0LP01"):
			return &ProblemsError{[]Problem{{Message: "the mirror's user may not create the role " + role + " or become a member of it",
				Remedy: "run at the mirror as an administrator: CREATE ROLE " + role + " NOLOGIN; GRANT " + role + " TO " + Quote(conn.Config().User)}}}
		case pgerr.Is(err, "42710", "23505", "XX000", "42704") && attempt < 20: // another installation on the same server at the same moment
		default:
			return err
		}
	}
}

func ensureTable(ctx context.Context, tx pgx.Tx, t *Table, d *Definitions, indexes bool) ([]Problem, error) {
	old, copied, err := storedTable(ctx, tx, t)
	if err != nil {
		return nil, err
	}
	var exists bool
	if err := tx.QueryRow(ctx, "SELECT to_regclass($1) IS NOT NULL", t.Ident()).Scan(&exists); err != nil {
		return nil, err
	}
	if exists && old == nil {
		return []Problem{{Table: t.FullName(), Message: "the mirror database has a table of this name that Waystage did not make",
			Remedy: "give Waystage an empty database as mirror, or drop the table there"}}, nil
	}
	if old != nil && copied {
		if p := t.changedSince(old); len(p) > 0 {
			return p, nil
		}
	}
	def, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	err = tx.QueryRow(ctx, `INSERT INTO waystage.synced_table (schema_name, table_name, rank, definition) VALUES ($1, $2, $3, $4)
		ON CONFLICT (schema_name, table_name) DO UPDATE SET rank = excluded.rank, definition = excluded.definition
		RETURNING id`, t.Schema, t.Name, t.Rank, string(def)).Scan(&t.ID)
	if err != nil {
		return nil, err
	}
	key, all := d.SubsetKey(t.FullName())
	want := t.ddlHash(key, all, indexes)
	if have, err := readMeta(ctx, tx, t.ddlKey()); err != nil || (have == want && exists) {
		return nil, err
	}
	if exists && !copied && !slices.Equal(t.columnDDL(), old.columnDDL()) {
		// Nothing in it yet that counts: an earlier set-up did not get to the end, and the source was altered since.
		if _, err := tx.Exec(ctx, "DROP TABLE "+t.Ident()); err != nil {
			return nil, err
		}
		exists = false
	}
	var schemaThere bool
	if err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = $1)", t.Schema).Scan(&schemaThere); err != nil {
		return nil, err
	}
	var run []string
	if !schemaThere {
		run = append(run, "CREATE SCHEMA "+Quote(t.Schema))
	}
	if !exists {
		run = append(run, t.createDDL())
	} else {
		for _, c := range t.Columns {
			if _, ok := old.Column(c.Name); !ok {
				// The mirror keeps a column that the source dropped; made again there, it begins empty here too.
				run = append(run, "ALTER TABLE "+t.Ident()+" DROP COLUMN IF EXISTS "+Quote(c.Name)+", ADD COLUMN "+Quote(c.Name)+" "+c.MirrorType)
			}
		}
	}
	run = append(run, t.partitionDDL()...)
	run = append(run, t.triggerDDL(key)...)
	if indexes {
		drops, err := subsetIndexDrops(ctx, tx, t, t.indexes(key, all))
		if err != nil {
			return nil, err
		}
		run = append(append(run, drops...), t.indexDDL(key, all)...)
	}
	run = append(run, "GRANT SELECT ON "+t.Ident()+" TO "+ReaderRole)
	for _, sql := range run {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return nil, err
		}
	}
	var usage bool
	if err := tx.QueryRow(ctx, "SELECT has_schema_privilege($1, $2, 'USAGE')", ReaderRole, t.Schema).Scan(&usage); err != nil {
		return nil, err
	}
	if !usage {
		if _, err := tx.Exec(ctx, "GRANT USAGE ON SCHEMA "+Quote(t.Schema)+" TO "+ReaderRole); err != nil {
			return nil, err
		}
	}
	return nil, writeMeta(ctx, tx, t.ddlKey(), want)
}

// storedTable is the table as waystage.synced_table has it, nil if it does not.
func storedTable(ctx context.Context, q Querier, t *Table) (*Table, bool, error) {
	var def []byte
	var copied bool
	err := q.QueryRow(ctx, "SELECT definition, copied FROM waystage.synced_table WHERE schema_name = $1 AND table_name = $2", t.Schema, t.Name).Scan(&def, &copied)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	old := &Table{}
	return old, copied, json.Unmarshal(def, old)
}

// changedSince names what has changed at the source in a way that the mirror cannot follow while it runs.
func (t *Table) changedSince(old *Table) []Problem {
	var out []Problem
	bad := func(format string, args ...any) {
		out = append(out, Problem{Table: t.FullName(), Message: fmt.Sprintf(format, args...), Remedy: recopyRemedy})
	}
	if !slices.Equal(t.Key, old.Key) {
		bad("its primary key was (%s) and is (%s) now", strings.Join(old.Key, ", "), strings.Join(t.Key, ", "))
	}
	for _, c := range t.Columns {
		o, ok := old.Column(c.Name)
		if !ok {
			continue
		}
		if o.MirrorType != c.MirrorType {
			bad("column %q was of type %s and is %s now", c.Name, o.Type, c.Type)
		} else if why := c.reshaped(&o); why != "" {
			bad("the values of column %q have another text now: %s", c.Name, why)
		}
	}
	return out
}

const recopyRemedy = "copy everything anew with `waystage serve --recopy` (devices keep their unsent changes)"

func (t *Table) columnDDL() []string {
	out := make([]string, 0, len(t.Columns)+1)
	for _, c := range t.Columns {
		out = append(out, Quote(c.Name)+" "+c.MirrorType)
	}
	return append(out, "PRIMARY KEY ("+quoteAll(t.Key)+")")
}

// createDDL makes the mirror table: no constraint but the key (rule R6), no defaults but the system columns'.
func (t *Table) createDDL() string {
	cols := t.columnDDL()
	system := []string{
		ColVersion + " bigint NOT NULL DEFAULT pg_catalog.pg_current_xact_id()::pg_catalog.text::bigint",
		ColWriter + " text",
		ColMerged + " bigint NOT NULL DEFAULT 0",
	}
	cols = slices.Insert(cols, len(cols)-1, system...)
	return "CREATE TABLE " + t.Ident() + " (\n    " + strings.Join(cols, ",\n    ") + "\n) WITH (fillfactor = 85)"
}

// stagingName is "schema.table", shortened where PostgreSQL would cut it off.
func (t *Table) stagingName() string {
	const limit = 63 // bytes
	name := t.FullName()
	if len(name) <= limit && name != "unknown" {
		return name
	}
	tail := fmt.Sprintf("~%d", t.ID)
	return strings.ToValidUTF8(name[:min(len(name), limit-len(tail))], "") + tail
}

func (t *Table) partitionDDL() []string {
	return []string{fmt.Sprintf("CREATE TABLE IF NOT EXISTS waystage_staging.%s PARTITION OF waystage.staging FOR VALUES IN (%d)", Quote(t.stagingName()), t.ID)}
}

// triggerDDL writes a tombstone for every deleted key, and for the old place of a row whose key or subset key changed.
func (t *Table) triggerDDL(subsetKey string) []string {
	columns := func(row string) (val, key string) {
		val = "NULL"
		if c, ok := t.Column(subsetKey); ok {
			val = c.Text(row + "." + Quote(c.Name))
		}
		var keys []string
		for _, k := range t.Key {
			c, _ := t.Column(k)
			keys = append(keys, c.Text(row+"."+Quote(k)))
		}
		return val, "ARRAY[" + strings.Join(keys, ", ") + "]::pg_catalog.text[]"
	}
	goneVal, goneKey := columns("gone")
	oldVal, oldKey := columns("OLD")
	differs := func(c Column) string {
		was, is := "OLD."+Quote(c.Name), "NEW."+Quote(c.Name)
		if c.Loose() {
			was, is = c.Text(was), c.Text(is)
		}
		return was + " IS DISTINCT FROM " + is
	}
	var moved []string
	for _, k := range t.Key {
		c, _ := t.Column(k)
		moved = append(moved, differs(c))
	}
	if c, ok := t.Column(subsetKey); ok && !t.IsKey(subsetKey) {
		moved = append(moved, differs(c))
	}
	return []string{
		triggerFunction(fmt.Sprintf("tombstone_delete_%d", t.ID), fmt.Sprintf("SELECT %d, %s, %s FROM gone", t.ID, goneVal, goneKey)),
		triggerFunction(fmt.Sprintf("tombstone_move_%d", t.ID), fmt.Sprintf("VALUES (%d, %s, %s)", t.ID, oldVal, oldKey)),
		fmt.Sprintf(`CREATE OR REPLACE TRIGGER _ws_delete AFTER DELETE ON %s REFERENCING OLD TABLE AS gone
FOR EACH STATEMENT EXECUTE FUNCTION waystage.tombstone_delete_%d()`, t.Ident(), t.ID),
		fmt.Sprintf(`CREATE OR REPLACE TRIGGER _ws_move AFTER UPDATE ON %s FOR EACH ROW WHEN (%s)
EXECUTE FUNCTION waystage.tombstone_move_%d()`, t.Ident(), strings.Join(moved, " OR "), t.ID),
	}
}

// triggerFunction quotes its body as a string: a dollar quote could be ended by a column's name.
func triggerFunction(name, values string) string {
	return "CREATE OR REPLACE FUNCTION waystage." + name + "() RETURNS trigger LANGUAGE plpgsql AS " +
		Literal("BEGIN\n    INSERT INTO waystage.tombstone (tbl, val, key) "+values+";\n    RETURN NULL;\nEND")
}

// indexes are the subset indexes, columns by name; the name carries the column, so that another key column makes another index.
func (t *Table) indexes(key string, all bool) map[string]string {
	out := map[string]string{}
	if key != "" {
		out[fmt.Sprintf("_ws_%d_%08x", t.ID, crc32.ChecksumIEEE([]byte(key)))] = Quote(key) + ", " + ColVersion
	}
	if all || key == "" {
		out[fmt.Sprintf("_ws_%d_version", t.ID)] = ColVersion
	}
	return out
}

func (t *Table) indexDDL(key string, all bool) []string {
	var out []string
	for name, columns := range t.indexes(key, all) {
		out = append(out, "CREATE INDEX IF NOT EXISTS "+Quote(name)+" ON "+t.Ident()+" ("+columns+")")
	}
	slices.Sort(out)
	return out
}

// subsetIndexDrops drops the subset indexes that are there but for those to keep.
func subsetIndexDrops(ctx context.Context, q Querier, t *Table, keep map[string]string) ([]string, error) {
	rows, err := q.Query(ctx, `SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
		WHERE i.indrelid = to_regclass($1) AND NOT i.indisprimary AND c.relname LIKE '\_ws\_%'`, t.Ident())
	if err != nil {
		return nil, err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	var out []string
	for _, n := range names {
		if _, ok := keep[n]; !ok {
			out = append(out, "DROP INDEX "+Quote(t.Schema)+"."+Quote(n))
		}
	}
	return out, nil
}

func (t *Table) ddlKey() string { return fmt.Sprintf("ddl_%d", t.ID) }

// ddlHash stands for everything that ensureTable makes; equal means nothing to do.
func (t *Table) ddlHash(key string, all, indexes bool) string {
	h := sha256.New()
	for _, part := range [][]string{{t.createDDL()}, t.partitionDDL(), t.triggerDDL(key)} {
		h.Write([]byte(strings.Join(part, "\n")))
	}
	if indexes {
		h.Write([]byte(strings.Join(t.indexDDL(key, all), "\n")))
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// dropMirrorTable removes everything that ensureTable made.
func dropMirrorTable(ctx context.Context, q Querier, t *Table) error {
	for _, sql := range []string{
		"DROP TABLE IF EXISTS " + t.Ident(),
		"DROP TABLE IF EXISTS waystage_staging." + Quote(t.stagingName()),
		fmt.Sprintf("DROP FUNCTION IF EXISTS waystage.tombstone_delete_%d(), waystage.tombstone_move_%d()", t.ID, t.ID),
		"DELETE FROM waystage.meta WHERE key = " + Literal(t.ddlKey()),
		fmt.Sprintf("DELETE FROM waystage.synced_table WHERE id = %d", t.ID),
	} {
		if _, err := q.Exec(ctx, sql); err != nil {
			return fmt.Errorf("drop mirror table %s: %w", t.FullName(), err)
		}
	}
	return nil
}

// readMeta reads a single value of waystage.meta, empty when it is not there.
func readMeta(ctx context.Context, q Querier, key string) (string, error) {
	var v string
	err := q.QueryRow(ctx, "SELECT value FROM waystage.meta WHERE key = $1", key).Scan(&v)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", nil
	}
	return v, err
}

func writeMeta(ctx context.Context, q Querier, key, value string) error {
	_, err := q.Exec(ctx, "INSERT INTO waystage.meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value", key, value)
	return err
}
