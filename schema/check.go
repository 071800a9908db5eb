package schema

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// Check holds the definitions against the tables: that what they name exists, that keys are included, that a device can
// hold the result. Afterwards the definitions are complete ([Subscription.KeyQuery]). A table that is missing from
// tables because it cannot be synced is reported by its own problem (see [ReadTables]), not here.
func (d *Definitions) Check(tables []*Table) []Problem {
	c := &checker{d: d}
	byName := map[string]*Table{}
	for _, t := range tables {
		byName[t.FullName()] = t
	}
	keys := map[string]*Subscription{}
	for _, s := range d.Subscriptions {
		t, ok := byName[s.Table]
		if !ok {
			continue
		}
		c.columns(s, t)
		c.fileColumn(s, t)
		if s.Key == "" {
			continue
		}
		c.key(s, t)
		if first, ok := keys[s.Table]; ok && first.Key != s.Key {
			c.bad(s.places["key"], fmt.Sprintf("%s has the key %q here and %q in subscription %q", s.Table, s.Key, first.Key, first.Name),
				"a table's subscriptions must share one key column; let one of the queries translate")
		}
		keys[s.Table] = s
	}
	for _, set := range d.Sets {
		folded := map[string]string{}
		for i, name := range set.Subscriptions {
			sub := d.subscription(name)
			if sub == nil {
				continue
			}
			if other, ok := folded[fold(sub.Table)]; ok && other != sub.Table {
				c.bad(set.places[i], fmt.Sprintf("%s and %s differ in case only, which a device's SQLite does not tell apart", sub.Table, other),
					"leave one out, or put them into sets of different groups")
			}
			folded[fold(sub.Table)] = sub.Table
		}
	}
	return c.problems
}

type checker struct {
	d        *Definitions
	problems []Problem
}

func (c *checker) bad(at place, message, remedy string) {
	c.problems = append(c.problems, Problem{File: c.d.File, Line: at.line, Column: at.column, Message: message, Remedy: remedy})
}

func (c *checker) warn(at place, message, remedy string) {
	c.problems = append(c.problems, Problem{File: c.d.File, Line: at.line, Column: at.column, Message: message, Remedy: remedy, Warning: true})
}

// fold is SQLite's idea of the same name: ASCII letters without case.
func fold(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}

func (c *checker) columns(s *Subscription, t *Table) {
	var names []string
	for _, col := range t.Columns {
		names = append(names, col.Name)
	}
	for i, name := range s.Columns {
		if !slices.Contains(names, name) {
			c.bad(s.columns[i], fmt.Sprintf("%s has no column %q (or it is generated, and computed where it is needed)", s.Table, name),
				orElse(didYouMean(name, names), "columns: "+strings.Join(names, ", ")))
		}
	}
	included := s.ColumnsOf(t)
	has := func(name string) bool {
		return slices.ContainsFunc(included, func(c Column) bool { return c.Name == name })
	}
	for _, k := range t.Key {
		if !has(k) {
			c.bad(s.places["columns"], fmt.Sprintf("columns leaves out %q, which is part of the primary key of %s", k, s.Table), fmt.Sprintf("add %q", k))
		}
	}
	folded := map[string]string{}
	for _, col := range included {
		if other, ok := folded[fold(col.Name)]; ok {
			c.bad(s.place, fmt.Sprintf("the columns %q and %q of %s differ in case only, which a device's SQLite does not tell apart", other, col.Name, s.Table),
				"leave one out by naming the others under columns")
		}
		folded[fold(col.Name)] = col.Name
	}
	if !s.Allows("I") {
		return
	}
	for _, col := range t.Columns {
		if col.NotNull && !has(col.Name) && col.Default == "" && col.Identity == "" {
			c.warn(s.places["columns"], fmt.Sprintf("columns leaves out %q, which must not be null and has no constant default: inserts by devices "+
				"are refused by the source unless a default or trigger there fills it", col.Name),
				"add the column, or allow: [update, delete]")
		}
	}
}

// unordered types have no index order, so they cannot select rows.
var unordered = []string{"json", "xml", "point", "line", "lseg", "box", "path", "polygon", "circle", "jsonpath", "txid_snapshot", "pg_snapshot", "refcursor"}

func (c *checker) key(s *Subscription, t *Table) {
	col, ok := t.Column(s.Key)
	if !ok {
		var names []string
		for _, col := range t.Columns {
			names = append(names, col.Name)
		}
		c.bad(s.places["key"], fmt.Sprintf("%s has no column %q", s.Table, s.Key), orElse(didYouMean(s.Key, names), "columns: "+strings.Join(names, ", ")))
		return
	}
	if !slices.ContainsFunc(s.ColumnsOf(t), func(c Column) bool { return c.Name == s.Key }) {
		c.bad(s.places["columns"], fmt.Sprintf("columns leaves out the key %q, by which the device knows what leaves its subset", s.Key), fmt.Sprintf("add %q", s.Key))
	}
	if slices.Contains(unordered, col.MirrorType) {
		c.bad(s.places["key"], fmt.Sprintf("the key %q is of type %s, which cannot be indexed", s.Key, col.Type), "use a column of another type")
	} else if base, _, _ := strings.Cut(col.MirrorType, "("); col.Loose() && base != "numeric" {
		c.bad(s.places["key"], fmt.Sprintf("the key %q is of type %s, of which equal values can be written in different ways", s.Key, col.Type),
			"use a column of another type")
	}
	s.keyType = col.MirrorType
}

// checkTimeout bounds planning of one rows query, seconds.
const checkTimeout = 10 * time.Second

// CheckLive has the mirror itself check conflict functions and every rows query: these are prepared and planned as role [ReaderRole] in a read only
// transaction, by the extended protocol, which takes a single statement. The mirror tables must exist.
func (d *Definitions) CheckLive(ctx context.Context, conn Beginner) ([]Problem, error) {
	c := &checker{d: d}
	for _, s := range d.Subscriptions {
		if s.Conflict == ConflictFunction {
			if err := c.function(ctx, conn, s); err != nil {
				return nil, fmt.Errorf("check the conflict function of subscription %s: %w", s.Name, err)
			}
		}
	}
	for _, s := range append(slices.Clip(d.Subscriptions), d.fileQueries()...) {
		if s.Key == "" || s.rows == nil || s.keyType == "" {
			continue
		}
		if err := c.live(ctx, conn, s); err != nil {
			return nil, fmt.Errorf("check the rows query of subscription %s: %w", s.Name, err)
		}
	}
	return c.problems, nil
}

const userParam, attrParam = "$1::pg_catalog.text", "$2::pg_catalog.jsonb"

func (c *checker) live(ctx context.Context, conn Beginner, s *Subscription) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	for _, sql := range []string{"SET LOCAL transaction_read_only = on", "SET LOCAL ROLE " + ReaderRole} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	pg := tx.Conn().PgConn()
	// The types are told: a query that reads attributes alone says nothing of $1.
	raw, err := pg.Prepare(ctx, "", s.rows.render(userParam, attrParam), []uint32{pgtype.TextOID, pgtype.JSONBOID})
	if err != nil {
		return c.refused(s, err, true)
	}
	if len(raw.Fields) != 1 {
		c.bad(s.places["rows"], fmt.Sprintf("rows gives %d columns", len(raw.Fields)), "select exactly one: the values of "+s.Key)
		return nil
	}
	if s.Table == "" {
		return c.plans(ctx, pg, s) // a key in a path: any type has a text
	}
	// An implicit cast at most: anything else could fail for one user's values in the middle of a sync.
	var good bool
	var got string
	err = tx.QueryRow(ctx, `SELECT pg_catalog.format_type(g.oid, $3), g.oid = w.oid
		 OR EXISTS (SELECT 1 FROM pg_catalog.pg_cast c WHERE c.castsource = g.oid AND c.casttarget = w.oid AND c.castcontext = 'i')
		 OR (g.typcategory = 'S' AND w.typcategory = 'S')
		 OR (g.typtype = 'd' AND g.typbasetype = w.oid)
		 OR g.typname = 'unknown'
		FROM pg_catalog.pg_type g, pg_catalog.pg_type w WHERE g.oid = $1 AND w.oid = $2::pg_catalog.text::pg_catalog.regtype`,
		raw.Fields[0].DataTypeOID, s.keyType, raw.Fields[0].TypeModifier).Scan(&got, &good)
	if err != nil {
		return err
	}
	if !good {
		c.bad(s.places["rows"], fmt.Sprintf("rows gives values of type %s, but the key %s.%s is %s", got, s.Table, s.Key, s.keyType),
			fmt.Sprintf("cast in the query: (...)::%s", s.keyType))
		return nil
	}
	return c.plans(ctx, pg, s)
}

// plans has a rows query planned.
func (c *checker) plans(ctx context.Context, pg *pgconn.PgConn, s *Subscription) error {
	// Planning starts the executor, which checks the privileges. As the whole key query, so that nothing can hide in how it is
	// used; with nulls, which no cast refuses.
	r := pg.ExecParams(ctx, "EXPLAIN "+s.KeyQuery("$1", "$2"), [][]byte{nil, nil}, nil, nil, nil).Read()
	if r.Err != nil {
		return c.refused(s, r.Err, false)
	}
	return nil
}

// refused turns a server's complaint into a problem at its place in the file.
func (c *checker) refused(s *Subscription, err error, raw bool) error {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return err
	}
	at := s.places["rows"]
	if raw && pg.Position > 0 {
		rendered := []rune(s.rows.render(userParam, attrParam))
		offset := s.rows.sourceOffset(len(string(rendered[:min(int(pg.Position)-1, len(rendered))])), userParam, attrParam)
		at = c.inRows(s, offset)
	}
	remedy := "try it in psql on the mirror: SET ROLE " + ReaderRole
	switch pg.Code {
	case "42P01":
		remedy = "write tables with their schema; a table that only a query needs must have a subscription too, which need not be in a set"
	case "42501":
		remedy = "a query may read synced tables only"
	case "42883", "42804", "42846":
		remedy = "parameters are texts: cast them, e.g. :user::int"
	case "25006", "0A000":
		remedy = "a query may only read"
	}
	if pg.Hint != "" {
		remedy += " (" + pg.Hint + ")"
	}
	c.bad(at, "rows: "+pg.Message, remedy)
	return nil
}

// inRows is the place in the file of an offset in a rows query. Positions are counted from where the text begins.
func (c *checker) inRows(s *Subscription, offset int) place {
	start := s.places["rows"]
	lines := strings.Split(c.d.Body, "\n")
	if start.line < 1 || start.line > len(lines) {
		return start
	}
	before := s.Rows[:min(offset, len(s.Rows))]
	first := strings.SplitN(s.Rows, "\n", 2)[0]
	text := []rune(lines[start.line-1])
	if start.column > len(text) || !strings.HasPrefix(string(text[start.column-1:]), strings.TrimRight(first, " ")) {
		return start // folded or with escapes: the beginning is all that can be said
	}
	column := len([]rune(before[strings.LastIndexByte(before, '\n')+1:]))
	return place{start.line + strings.Count(before, "\n"), start.column + column}
}
