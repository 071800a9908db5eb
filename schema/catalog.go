package schema

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// relation is a row of pg_class with what decides whether it can be synced.
type relation struct {
	oid                    uint32
	schema, name           string
	kind, persistence      string
	identity               string // relreplident
	identityIsPK           bool
	children, rowSecurity  bool
	pk                     []string // primary key columns in key order
	pkConstraint, pkMethod string
	pkImmediate            bool
	pkWithoutOverlaps      bool
	candidate              string // a unique index that could become the primary key
	candidateColumns       []string
	candidateIsConstraint  bool
	generated              []string
}

func (r *relation) full() string  { return r.schema + "." + r.name }
func (r *relation) ident() string { return Quote(r.schema) + "." + Quote(r.name) }

// ReadTables reads tables from the source's catalog by their full names ("schema.table"); no names: every table that
// can be synced or should be looked at (ordinary, partitioned and unlogged tables outside the system's schemas).
// Tables come ordered by rank, parents first; what cannot be synced is a problem with the statement that helps.
// The session's settings must be [Canonical].
func ReadTables(ctx context.Context, conn *pgx.Conn, names []string) ([]*Table, []Problem, error) {
	var tables []*Table
	var problems, unreadable []Problem
	// One snapshot: a table that is altered meanwhile is read before or after, not half and half.
	err := pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		rels, missing, err := readRelations(ctx, tx, names)
		if err != nil {
			return err
		}
		problems = append(problems, missing...)
		version, err := serverVersion(ctx, tx)
		if err != nil {
			return err
		}
		var good []*relation
		for _, r := range rels {
			if p, ok := r.refusal(version); ok {
				problems = append(problems, p)
				continue
			}
			good = append(good, r)
		}
		good, bad, err := whole(ctx, tx, good, version)
		if err != nil {
			return err
		}
		problems = append(problems, bad...)
		byOID := map[uint32]*Table{}
		for _, r := range good {
			t := &Table{Schema: r.schema, Name: r.name, Key: r.pk, Partitioned: r.kind == "p", OID: r.oid}
			byOID[r.oid] = t
			tables = append(tables, t)
		}
		if err := readColumns(ctx, tx, byOID); err != nil {
			return err
		}
		if unreadable, err = readParts(ctx, tx, byOID, version); err != nil {
			return err
		}
		if err := readConstraints(ctx, tx, byOID); err != nil {
			return err
		}
		return readDefaults(ctx, tx, byOID)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("read the source's catalog: %w", err)
	}
	tables = slices.DeleteFunc(tables, func(t *Table) bool {
		p := t.refusal()
		for _, u := range unreadable {
			if u.Table == t.FullName() {
				p = append(p, u)
			}
		}
		problems = append(problems, p...)
		return len(p) > 0
	})
	known := map[string]bool{}
	for _, t := range tables {
		known[t.FullName()] = true
	}
	for _, t := range tables {
		t.Foreign = slices.DeleteFunc(t.Foreign, func(f ForeignKey) bool { return !known[f.Table] })
	}
	Rank(tables)
	return tables, problems, nil
}

func serverVersion(ctx context.Context, q Querier) (int, error) {
	var v int
	err := q.QueryRow(ctx, "SELECT pg_catalog.current_setting('server_version_num')::int").Scan(&v)
	return v, err
}

const relationQuery = `
SELECT c.oid, n.nspname, c.relname, c.relkind::text, c.relpersistence::text, c.relreplident::text, c.relrowsecurity,
       coalesce(i.indisreplident, false),
       c.relkind = 'r' AND EXISTS (SELECT 1 FROM pg_inherits h WHERE h.inhparent = c.oid),
       coalesce((SELECT array_agg(a.attname::text ORDER BY k.ord) FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(num, ord)
           JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.num WHERE k.ord <= i.indnkeyatts), '{}'),
       coalesce(pk.conname, ''), coalesce(am.amname, ''), coalesce(i.indimmediate, false),
       coalesce(i.indisexclusion, false),
       coalesce(cand.name, ''), coalesce(cand.cols, '{}'), coalesce(cand.owned, false),
       coalesce((SELECT array_agg(a.attname::text) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND a.attgenerated <> ''), '{}')
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
  LEFT JOIN pg_constraint pk ON pk.conrelid = c.oid AND pk.contype = 'p'
  LEFT JOIN pg_class ic ON ic.oid = i.indexrelid
  LEFT JOIN pg_am am ON am.oid = ic.relam
  LEFT JOIN LATERAL (
       SELECT uc.relname::text AS name, (SELECT array_agg(a.attname::text ORDER BY k.ord) FROM unnest(u.indkey::int2[]) WITH ORDINALITY AS k(num, ord)
                  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.num WHERE k.ord <= u.indnkeyatts) AS cols,
              EXISTS (SELECT 1 FROM pg_constraint x WHERE x.conindid = u.indexrelid) AS owned
         FROM pg_index u JOIN pg_class uc ON uc.oid = u.indexrelid
        WHERE u.indrelid = c.oid AND u.indisunique AND u.indimmediate AND u.indisvalid AND u.indpred IS NULL AND u.indexprs IS NULL
          AND NOT EXISTS (SELECT 1 FROM unnest(u.indkey::int2[]) k(num) JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.num WHERE NOT a.attnotnull)
        ORDER BY uc.relname LIMIT 1) cand ON i.indexrelid IS NULL
 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')`

func readRelations(ctx context.Context, q Querier, names []string) ([]*relation, []Problem, error) {
	var rows pgx.Rows
	var err error
	if len(names) == 0 {
		rows, err = q.Query(ctx, relationQuery+` AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'
			AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' AND n.nspname !~ '^waystage'
			AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
			ORDER BY 2, 3`)
	} else {
		rows, err = q.Query(ctx, relationQuery+" AND n.nspname || '.' || c.relname = ANY($1::text[]) ORDER BY 2, 3", names)
	}
	if err != nil {
		return nil, nil, err
	}
	rels, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (*relation, error) {
		r := &relation{}
		return r, row.Scan(&r.oid, &r.schema, &r.name, &r.kind, &r.persistence, &r.identity, &r.rowSecurity, &r.identityIsPK, &r.children,
			&r.pk, &r.pkConstraint, &r.pkMethod, &r.pkImmediate, &r.pkWithoutOverlaps, &r.candidate, &r.candidateColumns, &r.candidateIsConstraint, &r.generated)
	})
	if err != nil {
		return nil, nil, err
	}
	found := map[string]int{}
	for _, r := range rels {
		found[r.full()]++
	}
	var problems []Problem
	var all []string
	for _, name := range slices.Compact(slices.Sorted(slices.Values(names))) {
		switch found[name] {
		case 1:
		case 0:
			if all == nil {
				rows, err := q.Query(ctx, `SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
					WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^(pg_|waystage|information_schema$)' ORDER BY 1`)
				if err != nil {
					return nil, nil, err
				}
				if all, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
					return nil, nil, err
				}
			}
			problems = append(problems, Problem{Table: name, Message: "does not exist at the source", Remedy: missingRemedy(name, all)})
		default:
			problems = append(problems, Problem{Table: name, Message: "the name is ambiguous: a dot in a schema's or table's name makes two tables read alike",
				Remedy: "rename one of them"})
		}
	}
	rels = slices.DeleteFunc(rels, func(r *relation) bool { return found[r.full()] > 1 })
	return rels, problems, nil
}

func missingRemedy(name string, all []string) string {
	if !strings.Contains(name, ".") {
		for _, a := range all {
			if strings.HasSuffix(a, "."+name) {
				return fmt.Sprintf("write it with its schema: %q", a)
			}
		}
	}
	if s := didYouMean(name, all); s != "" {
		return s
	}
	return "names are case-sensitive and written as schema.table without quotes"
}

// refusal says why the relation cannot be synced, judged by what it is.
func (r *relation) refusal(version int) (Problem, bool) {
	no := func(message, remedy string) (Problem, bool) {
		return Problem{Table: r.full(), Message: message, Remedy: remedy}, true
	}
	alter := "run at the source: ALTER TABLE " + r.ident()
	switch {
	case strings.HasPrefix(r.schema, "pg_") || r.schema == "information_schema" || r.schema == "waystage" || r.schema == "waystage_staging":
		return no("belongs to PostgreSQL or to Waystage itself", "sync tables of your own schemas only")
	case strings.ContainsFunc(r.full(), func(c rune) bool { return c < 0x20 || c == 0x7f }):
		return no("its name contains control characters", alter+" RENAME TO a name without them")
	case r.kind == "v" || r.kind == "m":
		return no("is a view, and views have no change stream", "subscribe to the tables that it reads")
	case r.kind == "f":
		return no("is a foreign table, and foreign tables have no change stream", "connect Waystage to the server that owns it")
	case r.persistence == "t":
		return no("is a temporary table", "make it an ordinary table")
	case r.persistence == "u":
		return no("is unlogged, so its changes are not in the write-ahead log", alter+" SET LOGGED")
	case r.children:
		return no("has inheritance children, whose rows would be taken for its own", "subscribe to the children, or end the inheritance: ALTER TABLE child NO INHERIT "+r.ident())
	case len(r.pk) == 0:
		return no("has no primary key", r.keyRemedy(alter))
	case r.pkMethod != "btree" || r.pkWithoutOverlaps:
		return no("its primary key is not an ordinary one (WITHOUT OVERLAPS)",
			alter+" DROP CONSTRAINT "+Quote(r.pkConstraint)+", ADD PRIMARY KEY (columns that identify a row)")
	case !r.pkImmediate:
		return no("its primary key is DEFERRABLE, which serves neither as replica identity nor for ON CONFLICT",
			alter+" DROP CONSTRAINT "+Quote(r.pkConstraint)+", ADD CONSTRAINT "+Quote(r.pkConstraint)+" PRIMARY KEY ("+quoteAll(r.pk)+")")
	case r.identity == "n":
		return no("has REPLICA IDENTITY NOTHING, so its changes carry no key", alter+" REPLICA IDENTITY DEFAULT")
	case r.identity == "i" && !r.identityIsPK:
		return no("its replica identity is another index than the primary key", alter+" REPLICA IDENTITY DEFAULT")
	case r.identity == "f" && len(r.generated) > 0 && version >= 180000:
		return no("has REPLICA IDENTITY FULL and generated columns, so that its own updates would fail once it is published", alter+" REPLICA IDENTITY DEFAULT")
	}
	for _, k := range r.pk {
		if slices.Contains(r.generated, k) {
			return no(fmt.Sprintf("the key column %q is generated, and generated columns are not carried", k),
				alter+" DROP CONSTRAINT "+Quote(r.pkConstraint)+", ADD PRIMARY KEY (columns that are not generated)")
		}
	}
	return Problem{}, false
}

func (r *relation) keyRemedy(alter string) string {
	switch {
	case r.candidate != "" && !r.candidateIsConstraint:
		return alter + " ADD PRIMARY KEY USING INDEX " + Quote(r.candidate)
	case r.candidate != "":
		return alter + " ADD PRIMARY KEY (" + quoteAll(r.candidateColumns) + ")"
	}
	return alter + " ADD PRIMARY KEY (columns that identify a row); if there are none: " +
		strings.TrimPrefix(alter, "run at the source: ") + " ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
}

// refusal says why the table cannot be synced, judged by its columns.
func (t *Table) refusal() []Problem {
	var out []Problem
	alter := "run at the source: ALTER TABLE " + t.Ident()
	for _, c := range t.Columns {
		if strings.HasPrefix(strings.ToLower(c.Name), "_ws_") {
			out = append(out, Problem{Table: t.FullName(), Message: fmt.Sprintf("the column name %q begins with _ws_, which Waystage keeps for itself", c.Name),
				Remedy: alter + " RENAME COLUMN " + Quote(c.Name) + " TO " + Quote(strings.TrimLeft(c.Name[4:], "_")+"_")})
		}
	}
	// The mirror table has three columns more, of PostgreSQL's 1600.
	if len(t.Columns) > 1590 {
		out = append(out, Problem{Table: t.FullName(), Message: fmt.Sprintf("has %d columns; at most 1590 can be mirrored", len(t.Columns)),
			Remedy: "split the table"})
	}
	return out
}

func readColumns(ctx context.Context, q Querier, byOID map[uint32]*Table) error {
	rows, err := q.Query(ctx, `
WITH RECURSIVE col AS (
    SELECT a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull, a.attidentity
      FROM pg_attribute a WHERE a.attrelid = ANY($1::oid[]) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
), base AS ( -- down the domains
    SELECT attrelid, attnum, atttypid AS typ, atttypmod AS typmod, 0 AS depth FROM col
    UNION ALL
    SELECT b.attrelid, b.attnum, t.typbasetype, t.typtypmod, b.depth + 1 FROM base b JOIN pg_type t ON t.oid = b.typ WHERE t.typtype = 'd'
), bottom AS (
    SELECT DISTINCT ON (attrelid, attnum) attrelid, attnum, typ, typmod FROM base ORDER BY attrelid, attnum, depth DESC
)
SELECT c.attrelid, c.attnum, c.atttypid, c.atttypmod, c.attname, format_type(c.atttypid, c.atttypmod), format_type(b.typ, b.typmod),
       bt.typnamespace = 'pg_catalog'::regnamespace AND coalesce(et.typtype, bt.typtype) IN ('b', 'r', 'm'),
       c.attnotnull, c.attidentity::text,
       coalesce((SELECT array_agg(e.enumlabel::text ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = b.typ), '{}')
  FROM col c JOIN bottom b USING (attrelid, attnum) JOIN pg_type bt ON bt.oid = b.typ
  LEFT JOIN pg_type et ON et.oid = bt.typelem AND bt.typcategory = 'A'
 ORDER BY c.attrelid, c.attnum`, oids(byOID))
	if err != nil {
		return err
	}
	var (
		oid      uint32
		c        Column
		baseType string
		builtin  bool
	)
	_, err = pgx.ForEachRow(rows, []any{&oid, &c.Num, &c.TypeOID, &c.TypeMod, &c.Name, &c.Type, &baseType, &builtin, &c.NotNull, &c.Identity, &c.Labels}, func() error {
		col := c
		col.Labels = slices.Clone(c.Labels)
		if len(col.Labels) == 0 {
			col.Labels = nil
		}
		col.MirrorType = "text"
		if builtin {
			col.Type, col.MirrorType = baseType, baseType
		}
		byOID[oid].Columns = append(byOID[oid].Columns, col)
		return nil
	})
	return err
}

func readConstraints(ctx context.Context, q Querier, byOID map[uint32]*Table) error {
	const columnNames = `(SELECT array_agg(a.attname::text ORDER BY k.ord) FROM unnest(%s) WITH ORDINALITY AS k(num, ord)
		JOIN pg_attribute a ON a.attrelid = %s AND a.attnum = k.num)`
	rows, err := q.Query(ctx, `SELECT i.indrelid, `+fmt.Sprintf(columnNames, "(i.indkey::int2[])[0:i.indnkeyatts - 1]", "i.indrelid")+`
		FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
		WHERE i.indrelid = ANY($1::oid[]) AND i.indisunique AND NOT i.indisprimary AND i.indpred IS NULL AND i.indexprs IS NULL ORDER BY c.relname`, oids(byOID))
	if err != nil {
		return err
	}
	var oid, other uint32
	var columns, refers []string
	if _, err := pgx.ForEachRow(rows, []any{&oid, &columns}, func() error {
		byOID[oid].Unique = append(byOID[oid].Unique, slices.Clone(columns))
		return nil
	}); err != nil {
		return err
	}
	rows, err = q.Query(ctx, `SELECT f.conrelid, f.confrelid, f.conname, `+fmt.Sprintf(columnNames, "f.conkey", "f.conrelid")+", "+
		fmt.Sprintf(columnNames, "f.confkey", "f.confrelid")+`
		FROM pg_constraint f WHERE f.contype = 'f' AND f.conrelid = ANY($1::oid[]) AND f.confrelid = ANY($1::oid[]) ORDER BY f.conname`, oids(byOID))
	if err != nil {
		return err
	}
	var name string
	_, err = pgx.ForEachRow(rows, []any{&oid, &other, &name, &columns, &refers}, func() error {
		byOID[oid].Foreign = append(byOID[oid].Foreign, ForeignKey{Name: name, Columns: slices.Clone(columns),
			Table: byOID[other].FullName(), Refers: slices.Clone(refers)})
		return nil
	})
	return err
}

var functionID = regexp.MustCompile(`:(?:funcid|opfuncid|inputfuncid|outfuncid) (\d+)`)

// readDefaults finds the defaults that are constants: expressions of built-in immutable functions only. They are
// evaluated by the source itself.
func readDefaults(ctx context.Context, tx pgx.Tx, byOID map[uint32]*Table) error {
	rows, err := tx.Query(ctx, `SELECT d.adrelid, a.attname, pg_get_expr(d.adbin, d.adrelid), d.adbin::text
		FROM pg_attrdef d JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
		WHERE d.adrelid = ANY($1::oid[]) AND a.attgenerated = ''`, oids(byOID))
	if err != nil {
		return err
	}
	type found struct {
		oid        uint32
		name, expr string
		functions  []int64
	}
	var candidates []found
	var f found
	var tree string
	var functions []int64
	if _, err := pgx.ForEachRow(rows, []any{&f.oid, &f.name, &f.expr, &tree}, func() error {
		for _, node := range []string{"{SQLVALUEFUNCTION", "{NEXTVALUEEXPR", "{SUBLINK", "{COERCEVIAIO", "{PARAM", "{COERCETODOMAIN"} {
			if strings.Contains(tree, node) {
				return nil
			}
		}
		f.functions = nil
		for _, m := range functionID.FindAllStringSubmatch(tree, -1) {
			id, err := strconv.ParseInt(m[1], 10, 64)
			if err != nil || id >= 16384 { // the first oid that is not the system's
				return nil
			}
			if id != 0 {
				f.functions = append(f.functions, id)
			}
		}
		functions = append(functions, f.functions...)
		candidates = append(candidates, f)
		return nil
	}); err != nil {
		return err
	}
	rows, err = tx.Query(ctx, "SELECT oid::int8 FROM pg_proc WHERE oid::int8 = ANY($1::int8[]) AND provolatile <> 'i'", functions)
	if err != nil {
		return err
	}
	moving, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return err
	}
	for _, f := range candidates {
		if slices.ContainsFunc(f.functions, func(id int64) bool { return slices.Contains(moving, id) }) {
			continue
		}
		t := byOID[f.oid]
		for i := range t.Columns {
			c := &t.Columns[i]
			if c.Name != f.name {
				continue
			}
			// With the column's own scale and length, which the printed expression leaves out.
			value, ok, err := evaluate(ctx, tx, "("+f.expr+")::"+c.Type)
			if err != nil {
				return err
			}
			if ok {
				c.Default = value
			}
		}
	}
	return nil
}

// evaluate asks for an expression's value in the type's own text form; ok is false when it is null or fails.
func evaluate(ctx context.Context, tx pgx.Tx, expr string) (value string, ok bool, err error) {
	if _, err := tx.Exec(ctx, "SAVEPOINT constant"); err != nil {
		return "", false, err
	}
	r := tx.Conn().PgConn().ExecParams(ctx, "SELECT "+expr, nil, nil, nil, nil).Read()
	if r.Err != nil {
		_, err := tx.Exec(ctx, "ROLLBACK TO SAVEPOINT constant")
		return "", false, err
	}
	if len(r.Rows) == 1 && r.Rows[0][0] != nil {
		value, ok = string(r.Rows[0][0]), true
	}
	_, err = tx.Exec(ctx, "RELEASE SAVEPOINT constant")
	return value, ok, err
}

func oids(byOID map[uint32]*Table) []uint32 {
	out := make([]uint32, 0, len(byOID))
	for o := range byOID {
		out = append(out, o)
	}
	slices.Sort(out)
	return out
}

func quoteAll(names []string) string {
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = Quote(n)
	}
	return strings.Join(out, ", ")
}

// Rank sets every table's rank so that a table's rank is above those of the tables that it refers to, and orders the
// tables by it. In a cycle of foreign keys the keys that may be null are left out; what is a cycle even then shares a rank
// (its constraints must be deferrable to be used at all).
func Rank(tables []*Table) {
	index := map[string]int{}
	for i, t := range tables {
		index[t.FullName()] = i
	}
	// child -> parents, but for the edges that leave refuses.
	graph := func(leave func(child, parent int, t *Table, f ForeignKey) bool) [][]int {
		edges := make([][]int, len(tables))
		for i, t := range tables {
			for _, f := range t.Foreign {
				if p, ok := index[f.Table]; ok && p != i && !leave(i, p, t, f) {
					edges[i] = append(edges[i], p)
				}
			}
		}
		return edges
	}
	all := cycles(graph(func(int, int, *Table, ForeignKey) bool { return false }))
	edges := graph(func(child, parent int, t *Table, f ForeignKey) bool {
		return all[child] == all[parent] && t.nullable(f.Columns)
	})
	group := cycles(edges)
	rank := map[int]int{} // by group
	for changed := true; changed; {
		changed = false
		for i := range tables {
			for _, p := range edges[i] {
				if group[p] != group[i] && rank[group[i]] <= rank[group[p]] {
					rank[group[i]] = rank[group[p]] + 1
					changed = true
				}
			}
		}
	}
	for i, t := range tables {
		t.Rank = rank[group[i]]
	}
	sort.SliceStable(tables, func(a, b int) bool {
		if tables[a].Rank != tables[b].Rank {
			return tables[a].Rank < tables[b].Rank
		}
		return tables[a].FullName() < tables[b].FullName()
	})
}

func (t *Table) nullable(columns []string) bool {
	return slices.ContainsFunc(columns, func(n string) bool { c, ok := t.Column(n); return ok && !c.NotNull })
}

// cycles numbers the strongly connected components of a graph (Tarjan).
func cycles(edges [][]int) []int {
	n := len(edges)
	group, order, low := make([]int, n), make([]int, n), make([]int, n)
	onStack := make([]bool, n)
	var stack []int
	next, groups := 1, 0
	var visit func(v int)
	visit = func(v int) {
		order[v], low[v] = next, next
		next++
		stack, onStack[v] = append(stack, v), true
		for _, w := range edges[v] {
			if order[w] == 0 {
				visit(w)
				low[v] = min(low[v], low[w])
			} else if onStack[w] {
				low[v] = min(low[v], order[w])
			}
		}
		if low[v] == order[v] {
			for {
				w := stack[len(stack)-1]
				stack, onStack[w] = stack[:len(stack)-1], false
				group[w] = groups
				if w == v {
					break
				}
			}
			groups++
		}
	}
	for v := range n {
		if order[v] == 0 {
			visit(v)
		}
	}
	return group
}
