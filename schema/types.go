package schema

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// names are types of pg_catalog whose text names an object of the database: a renaming there changes the text without a
// change of the row, and where the object is missing the text cannot be read.
var naming = []string{"regclass", "regcollation", "regconfig", "regdatabase", "regdictionary", "regnamespace", "regoper", "regoperator", "regproc",
	"regprocedure", "regrole", "regtype", "aclitem"}

// mute are types of pg_catalog whose text PostgreSQL does not read back.
var mute = []string{"pg_node_tree", "pg_ndistinct", "pg_dependencies", "pg_mcv_list", "gtsvector", "pg_brin_bloom_summary", "pg_brin_minmax_multi_summary"}

// readParts looks at all types that the columns' types are made of: domains' bases, elements of arrays, attributes of
// composites, bounds of ranges. It refuses columns whose values have no text that stands for them, and notes the shape of
// user-defined types in [Column.Shape].
func readParts(ctx context.Context, q Querier, byOID map[uint32]*Table, version int) ([]Problem, error) {
	rows, err := q.Query(ctx, `
WITH RECURSIVE part AS (
    SELECT a.attrelid AS rel, a.attnum AS num, a.attname AS name, a.atttypid AS typ
      FROM pg_attribute a WHERE a.attrelid = ANY($1::oid[]) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
    UNION
    SELECT p.rel, p.num, p.name, x.typ FROM part p JOIN pg_type t ON t.oid = p.typ, LATERAL (
        SELECT t.typbasetype WHERE t.typtype = 'd'
        UNION ALL SELECT t.typelem WHERE t.typcategory = 'A' AND t.typelem <> 0
        UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE r.rngtypid = t.oid
        UNION ALL SELECT r.rngtypid FROM pg_range r WHERE r.rngmultitypid = t.oid) AS x(typ)
)
SELECT p.rel, p.name, t.typname, t.typnamespace = 'pg_catalog'::regnamespace, format_type(t.oid, NULL), t.typtype::text,
       CASE t.typtype
       WHEN 'e' THEN coalesce((SELECT array_agg(e.enumlabel::text ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = t.oid), '{}')
       WHEN 'c' THEN coalesce((SELECT array_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod) ORDER BY a.attnum) FROM pg_attribute a
           WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped), '{}')
       END
  FROM part p JOIN pg_type t ON t.oid = p.typ ORDER BY p.rel, p.num, 5`, oids(byOID))
	if err != nil {
		return nil, err
	}
	var (
		oid                       uint32
		name, typname, full, kind string
		builtin                   bool
		members                   []string
		out                       []Problem
	)
	_, err = pgx.ForEachRow(rows, []any{&oid, &name, &typname, &builtin, &full, &kind, &members}, func() error {
		t := byOID[oid]
		i := slices.IndexFunc(t.Columns, func(c Column) bool { return c.Name == name })
		if members != nil {
			if t.Columns[i].Shape == nil {
				t.Columns[i].Shape = map[string][]string{}
			}
			t.Columns[i].Shape[map[string]string{"e": "enum ", "c": "row "}[kind]+full] = slices.Clone(members)
		}
		why := ""
		switch {
		case !builtin:
		case slices.Contains(naming, typname):
			why = "names an object of the database, and a renaming there changes it without a change of the row"
		case slices.Contains(mute, typname):
			why = "cannot be read back from its text"
		case typname == "char" && version < 160000:
			why = "is no text for values above 127 before PostgreSQL 16"
		}
		if why != "" {
			out = append(out, Problem{Table: t.FullName(), Message: fmt.Sprintf("column %q holds a value of type %s, which %s", name, full, why),
				Remedy: "run at the source: ALTER TABLE " + t.Ident() + " ALTER COLUMN " + Quote(name) + " TYPE text; or keep the column in a table of its own"})
		}
		return nil
	})
	return out, err
}

// reshaped says how a user-defined type in a column has changed so that rows that did not change have another text now;
// empty: in no such way. New labels of an enum do no harm.
func (c *Column) reshaped(old *Column) string {
	for _, typ := range slices.Sorted(maps.Keys(old.Shape)) {
		was, is := old.Shape[typ], c.Shape[typ]
		if is == nil {
			continue // another type: that is said elsewhere
		}
		for _, m := range was {
			if !slices.Contains(is, m) {
				return fmt.Sprintf("%s had %q, which was renamed or removed", typ, m)
			}
		}
		if strings.HasPrefix(typ, "row ") && !slices.Equal(is, was) {
			return typ + " has other attributes or another order of them"
		}
	}
	return ""
}
