package apply

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/internal/sabotage"
	"github.com/waystage/waystage/schema"
)

// target is a synced table as up writes it at the source: the same names, the source's own types.
type target struct {
	*table
	full     []string   // the columns' types with modifiers, for images that the source has had
	bare     []string   // without: new values are assigned, so that one which does not fit is an error and not cut off
	identity []bool     // GENERATED ALWAYS
	filled   []bool     // NOT NULL, with a default or an identity: what a device leaves empty, the source fills in
	deferred bool       // the primary key is deferrable: ON CONFLICT does not take it
	referred [][]string // columns by which foreign keys of synced tables refer to rows of this one
	cascades []cascade  // which rows of synced tables go with a deleted one
	sql      map[string]string
}

// openSource connects to the source. Triggers of the customer run in this session, so it keeps the customer's search
// path, time zone and date style; what up sends is unambiguous under any of them. The other settings stay canonical.
func openSource(ctx context.Context, dsn string) (*pgx.Conn, error) {
	cfg, err := schema.ConnConfig(dsn, "waystage apply up")
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	customers := []string{"search_path", "timezone", "datestyle"}
	for _, name := range customers {
		delete(cfg.RuntimeParams, name)
	}
	for k, v := range map[string]string{
		"lock_timeout": "5s", "statement_timeout": "5min", "idle_in_transaction_session_timeout": "60s", "idle_session_timeout": "0",
		"default_transaction_isolation": "read committed", "default_transaction_read_only": "off",
	} {
		cfg.RuntimeParams[k] = v
	}
	before := cfg.AfterConnect
	cfg.AfterConnect = func(ctx context.Context, c *pgconn.PgConn) error {
		if before != nil {
			if err := before(ctx, c); err != nil {
				return err
			}
		}
		_, err := c.Exec(ctx, "RESET "+strings.Join(customers, "; RESET ")).ReadAll()
		return err
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to the source: %w", err)
	}
	return conn, nil
}

// readTargets reads the source's types of the tables, and compares what it has with what was set up: a *fault if something
// that we write or compare is another thing now. Stopped tables are not compared.
func readTargets(ctx context.Context, conn *pgx.Conn, tables map[int]*table) (map[int]*target, error) {
	out := map[int]*target{}
	var ids []int
	var schemas, names []string
	for id, t := range tables {
		n := len(t.Columns)
		out[id] = &target{table: t, full: make([]string, n), bare: make([]string, n), identity: make([]bool, n), filled: make([]bool, n), sql: map[string]string{}}
		ids, schemas, names = append(ids, id), append(schemas, t.Schema), append(names, t.Name)
	}
	rows, err := conn.Query(ctx, `SELECT q.id, c.oid, a.attname, a.atttypid, a.atttypmod, format_type(a.atttypid, a.atttypmod), format_type(a.atttypid, -1),
			a.attidentity = 'a', a.attnotnull AND (a.atthasdef OR a.attidentity <> ''), coalesce(NOT i.indimmediate, false), coalesce(a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]), false)
		FROM unnest($1::int[], $2::text[], $3::text[]) AS q(id, s, n)
		JOIN pg_namespace AS s ON s.nspname = q.s JOIN pg_class AS c ON c.relnamespace = s.oid AND c.relname = q.n
		LEFT JOIN pg_index AS i ON i.indrelid = c.oid AND i.indisprimary
		JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped`, ids, schemas, names)
	if err != nil {
		return nil, fmt.Errorf("read the source's catalog: %w", err)
	}
	var id int
	var oid, typ uint32
	var mod int32
	var name, full, bare string
	var identity, filled, deferred, key bool
	there, keys := map[int]bool{}, map[int][]string{}
	var found *fault
	bad := func(t *target, code schema.StopCode, format string, args ...any) {
		if t.Stop == nil && found == nil {
			found = &fault{t: t.table, code: code, detail: fmt.Sprintf(format, args...)}
		}
	}
	_, err = pgx.ForEachRow(rows, []any{&id, &oid, &name, &typ, &mod, &full, &bare, &identity, &filled, &deferred, &key}, func() error {
		t := out[id]
		there[id] = true
		if t.OID != 0 && t.OID != oid {
			bad(t, schema.StopReplaced, "another table has this name at the source now")
		}
		if key {
			keys[id] = append(keys[id], name)
		}
		if i, ok := t.at[name]; ok {
			t.full[i], t.bare[i], t.identity[i], t.filled[i] = full, bare, identity, filled
			if was := t.Columns[i]; was.TypeOID != 0 && (was.TypeOID != typ || was.TypeMod != mod) {
				bad(t, schema.StopType, "column %s was %s and is %s now", name, was.Type, full)
			}
		}
		t.deferred = deferred
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the source's catalog: %w", err)
	}
	for id, t := range out {
		if !there[id] {
			bad(t, schema.StopMissing, "the source has no table of this name")
			continue
		}
		if i := slices.Index(t.full, ""); i >= 0 {
			bad(t, schema.StopColumn, "column %s is gone at the source", t.Columns[i].Name)
		}
		was, is := slices.Sorted(slices.Values(t.Key)), slices.Sorted(slices.Values(keys[id]))
		if !slices.Equal(was, is) {
			bad(t, schema.StopKey, "the primary key was (%s) and is (%s) now", strings.Join(was, ", "), strings.Join(is, ", "))
		}
	}
	if found != nil {
		return nil, found
	}
	if err := readCascades(ctx, conn, out); err != nil {
		return nil, err
	}
	for _, child := range out {
		for _, fk := range child.Foreign {
			for _, t := range out {
				if t.FullName() == fk.Table && !slices.ContainsFunc(t.referred, func(cols []string) bool { return slices.Equal(cols, fk.Refers) }) {
					t.referred = append(t.referred, fk.Refers)
				}
			}
		}
	}
	return out, nil
}

// form is what a change has to do at the source, given what it expects there.
type form byte

const (
	formInsert form = 'I' // expects no row
	formUpdate form = 'U' // expects a row
	formDelete form = 'D' // expects a row
	formGone   form = 'G' // a delete that expects no row: nothing to do but to look

	// Of a group that is written alone:
	formLock    form = 'L' // looks whether a row is as expected, and locks it
	formRewrite form = 'R' // formUpdate of a locked row
	formRemove  form = 'X' // formDelete of a locked row, if this transaction has left it there
)

func (t *target) quoted(i int) string { return schema.Quote(t.Columns[i].Name) }

func (t *target) match() string {
	parts := make([]string, len(t.keys))
	for j, i := range t.keys {
		parts[j] = fmt.Sprintf("m.%s = u.c%d::%s", t.quoted(i), i, t.full[i])
	}
	return strings.Join(parts, " AND ")
}

// same compares the source's row with the expected image, byte for byte (rule R5). Should the bytes differ where the
// text does not (an array's unused null bitmap, an XML declaration), the text decides: it is all that devices see.
func (t *target) same() string {
	row := "ROW(" + t.list(t.all(), func(i int) string { return "m." + t.quoted(i) }) + ")"
	old := "ROW(" + t.list(t.all(), func(i int) string {
		return fmt.Sprintf("(u.old->>%s)::%s", schema.Literal(t.Columns[i].Name), t.full[i])
	}) + ")"
	switch {
	case sabotage.On(sabotage.CompareKey):
		return "true"
	case sabotage.On(sabotage.CompareEqual):
		return row + " = " + old
	}
	return fmt.Sprintf(`(record_image_eq(%[1]s, %[2]s) OR %[1]s::text COLLATE "C" = %[2]s::text COLLATE "C")`, row, old)
}

// statement is the SQL for any number of changes of one form that write the same columns. Parameters: the keys, the columns,
// and for formUpdate and formDelete the expected images. It returns the numbers (from 1) of the changes that hit;
// formInsert returns nothing and is counted; formGone returns those that missed.
func (t *target) statement(f form, cols []int) string {
	id := fmt.Sprint(f, cols)
	if sql, ok := t.sql[id]; ok {
		return sql
	}
	var sql string
	switch f {
	case formInsert:
		overriding := ""
		if slices.ContainsFunc(cols, func(i int) bool { return t.identity[i] }) {
			overriding = "OVERRIDING SYSTEM VALUE "
		}
		sql = fmt.Sprintf("INSERT INTO %s (%s) %sSELECT %s FROM %s", t.Ident(), t.list(cols, t.quoted), overriding,
			t.list(cols, func(i int) string { return fmt.Sprintf("u.c%d::%s", i, t.bare[i]) }), t.unnest(cols, 1))
		if t.deferred {
			sql += fmt.Sprintf(" WHERE NOT EXISTS (SELECT 1 FROM %s AS m WHERE %s)", t.Ident(), t.match())
		} else {
			sql += fmt.Sprintf(" ON CONFLICT (%s) DO NOTHING", t.list(t.keys, t.quoted))
		}
	case formUpdate, formRewrite:
		sets := t.list(cols, func(i int) string { return fmt.Sprintf("%s = u.c%d::%s", t.quoted(i), i, t.bare[i]) })
		if len(cols) == 0 { // no column to write: touch the row, so that its triggers and ours see the change
			touch := 0
			for i := range t.Columns {
				if !t.IsKey(t.Columns[i].Name) && !t.identity[i] {
					touch = i
					break
				}
			}
			sets = fmt.Sprintf("%[1]s = m.%[1]s", t.quoted(touch))
		}
		more, same := []string{"old jsonb", ordinality}, " AND "+t.same()
		if f == formRewrite {
			more, same = more[1:], ""
		}
		sql = fmt.Sprintf("UPDATE %s AS m SET %s FROM %s WHERE %s%s RETURNING u.i", t.Ident(), sets,
			t.unnest(append(slices.Clone(t.keys), cols...), 1, more...), t.match(), same)
	case formDelete:
		sql = fmt.Sprintf("DELETE FROM %s AS m USING %s WHERE %s AND %s RETURNING u.i", t.Ident(),
			t.unnest(t.keys, 1, "old jsonb", ordinality), t.match(), t.same())
	case formRemove:
		sql = fmt.Sprintf("DELETE FROM %s AS m USING %s WHERE %s", t.Ident(), t.unnest(t.keys, 1), t.match())
	case formLock:
		sql = fmt.Sprintf("SELECT u.i FROM %s JOIN %s AS m ON %s WHERE %s FOR UPDATE OF m", t.unnest(t.keys, 1, "old jsonb", ordinality), t.Ident(), t.match(), t.same())
	case formGone:
		sql = fmt.Sprintf("SELECT u.i FROM %s WHERE EXISTS (SELECT 1 FROM %s AS m WHERE %s)", t.unnest(t.keys, 1, ordinality), t.Ident(), t.match())
	}
	t.sql[id] = sql
	return sql
}
