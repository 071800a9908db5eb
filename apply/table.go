package apply

import (
	"fmt"
	"slices"
	"strings"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/schema"
)

// table is a synced table with the statements that apply needs. All of them take one text array for each value and
// leave every cast to the server (rule R5), and all work on any number of rows.
type table struct {
	*schema.Table
	keys  []int          // places of the key columns in Columns
	at    map[string]int // places of all columns
	floor change.LSN     // what the source committed before is in the mirror

	deleteRows string // keys
	upsertRows string // columns
	overwrite  string // columns, of rows that are there
	settleRows string // columns, lw, mver
	compare    string // columns: which rows are there, equal, and whose they are
	dropBase   string // keys
	putBase    string // keys, images, writers, lw, mver, refused
	route      string // keys
	images     string // keys, first changes
	load       string // keys: mirror rows as jsonb
	victims    string // keys, ids and stamps of the deletes: what is known of rows that a cascade takes
	overlap    string // images before, now and wanted: the columns that both have changed, to different images
}

func newTable(t *schema.Table) (*table, error) {
	w := &table{Table: t, at: make(map[string]int, len(t.Columns))}
	if t.Floor != "" {
		floor, err := change.ParseLSN(t.Floor)
		if err != nil {
			return nil, err
		}
		w.floor = floor
	}
	for i, c := range t.Columns {
		w.at[c.Name] = i
	}
	for _, k := range t.Key {
		i, ok := w.at[k]
		if !ok {
			return nil, fmt.Errorf("waystage.synced_table: key column %s of table %s is not among its columns", k, t.FullName())
		}
		w.keys = append(w.keys, i)
	}
	n, k := len(t.Columns), len(w.keys)
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	cols := w.list(all, func(i int) string { return schema.Quote(t.Columns[i].Name) })
	casts := w.list(all, func(i int) string { return w.cast(i) })
	rowOf := func(alias string) string {
		return "ROW(" + w.list(all, func(i int) string { return alias + "." + schema.Quote(t.Columns[i].Name) }) + ")"
	}
	sets := w.list(all, func(i int) string {
		q := schema.Quote(t.Columns[i].Name)
		return q + " = excluded." + q
	})
	keyNames := w.list(w.keys, func(i int) string { return schema.Quote(t.Columns[i].Name) })
	sys := schema.ColVersion + ", " + schema.ColWriter + ", " + schema.ColMerged
	const xid = "pg_current_xact_id()::text::bigint"

	w.deleteRows = fmt.Sprintf("DELETE FROM %s AS m USING %s WHERE %s", t.Ident(), w.unnest(w.keys, 1), w.match()+w.spelled())
	w.upsertRows = fmt.Sprintf(`INSERT INTO %s AS m (%s, %s) SELECT %s, %s, NULL::text, 0 FROM %s
		ON CONFLICT (%s) DO UPDATE SET %s, %[9]s = excluded.%[9]s, %[10]s = NULL, %[11]s = 0
		WHERE NOT record_image_eq(%s, %s)`, t.Ident(), cols, sys, casts, xid, w.unnest(all, 1), keyNames, sets,
		schema.ColVersion, schema.ColWriter, schema.ColMerged, rowOf("m"), rowOf("excluded"))
	w.overwrite = w.overwriteRows()
	w.settleRows = fmt.Sprintf(`INSERT INTO %s AS m (%s, %s) SELECT %s, %s, u.lw, u.mver FROM %s
		ON CONFLICT (%s) DO UPDATE SET %s, %[9]s = excluded.%[9]s, %[10]s = excluded.%[10]s, %[11]s = excluded.%[11]s`,
		t.Ident(), cols, sys, casts, xid, w.unnest(all, 1, "lw text", "mver bigint"), keyNames, sets,
		schema.ColVersion, schema.ColWriter, schema.ColMerged)
	w.compare = fmt.Sprintf(`SELECT u.i, m.%[1]s IS NOT NULL, m.%[1]s IS NOT NULL AND record_image_eq(%[2]s, ROW(%[3]s))
		FROM %[4]s LEFT JOIN %[5]s AS m ON %[6]s`, schema.ColVersion, rowOf("m"), casts,
		w.unnest(all, 1, ordinality), t.Ident(), w.match())
	key := w.keyArray("u")
	w.dropBase = fmt.Sprintf("DELETE FROM waystage.base AS b USING %s WHERE b.tbl = $%d AND b.key = %s", w.unnest(w.keys, 1), k+1, key)
	w.putBase = fmt.Sprintf(`INSERT INTO waystage.base AS b (tbl, key, img, writer, lw, mver, refused) SELECT $%d, %s, u.img, u.writer, u.lw, u.mver, u.refused FROM %s
		ON CONFLICT (tbl, key) DO UPDATE SET img = excluded.img, writer = excluded.writer, lw = excluded.lw, mver = excluded.mver, refused = b.refused OR excluded.refused`,
		k+6, key, w.unnest(w.keys, 1, "img jsonb", "writer text", "lw text", "mver bigint", "refused boolean"))
	w.route = fmt.Sprintf(`SELECT u.i, coalesce(p.n, 0), coalesce(p.first, 0), b.tbl IS NOT NULL, coalesce(b.writer, 'initial')
		FROM %s
		LEFT JOIN LATERAL (SELECT count(*) AS n, min(c.id) AS first FROM waystage.change AS c
			WHERE c.state = 'merged' AND c.tbl = $%d AND c.key = %s) AS p ON true
		LEFT JOIN waystage.base AS b ON b.tbl = $%[2]d AND b.key = %[3]s
		WHERE p.n > 0 OR b.tbl IS NOT NULL`, w.unnest(w.keys, 1, ordinality), k+1, key)
	w.images = fmt.Sprintf(`SELECT u.i, CASE WHEN b.tbl IS NULL THEN c.old ELSE b.img END::text, coalesce(b.writer, 'initial'),
		CASE WHEN b.tbl IS NULL THEN c.old_lw ELSE b.lw END, coalesce(CASE WHEN b.tbl IS NULL THEN c.old_mver ELSE b.mver END, 0), coalesce(b.refused, false)
		FROM %s LEFT JOIN waystage.base AS b ON b.tbl = $%d AND b.key = %s LEFT JOIN waystage.change AS c ON c.id = u.first`,
		w.unnest(w.keys, 1, "first bigint", ordinality), k+2, key)
	row := fmt.Sprintf("jsonb_object(ARRAY[%s]::text[], ARRAY[%s]::text[])", w.list(all, func(i int) string { return schema.Literal(t.Columns[i].Name) }),
		w.list(all, func(i int) string { return t.Columns[i].Text("m." + schema.Quote(t.Columns[i].Name)) }))
	w.load = fmt.Sprintf("SELECT %s::text FROM %s JOIN %s AS m ON %s", row, w.unnest(w.keys, 1), t.Ident(), w.match())
	w.victims = fmt.Sprintf(`SELECT u.i, coalesce(b.writer, 'initial'),
			CASE WHEN p.id IS NULL THEN coalesce(m.%[1]s <= u.stamp OR m.%[2]s IS NOT NULL, false)
				ELSE p.id < u.id OR p.old_version <= u.stamp OR p.old_lw IS NOT NULL END,
			CASE WHEN p.id IS NULL THEN %[3]s WHEN p.id < u.id THEN NULL WHEN b.tbl IS NULL THEN p.old ELSE b.img END::text
		FROM %[4]s LEFT JOIN %[5]s AS m ON %[6]s
		LEFT JOIN LATERAL (SELECT c.id, c.old, c.old_version, c.old_lw FROM waystage.change AS c
			WHERE c.state = 'merged' AND c.tbl = $%[7]d AND c.key = %[8]s ORDER BY c.id LIMIT 1) AS p ON true
		LEFT JOIN waystage.base AS b ON b.tbl = $%[7]d AND b.key = %[8]s`, schema.ColVersion, schema.ColWriter, row,
		w.unnest(w.keys, 1, "id bigint", "stamp bigint", ordinality), t.Ident(), w.match(), k+3, key)
	value := func(image string) func(schema.Column) string {
		return func(c schema.Column) string {
			return fmt.Sprintf("(%s->>%s)::%s", image, schema.Literal(c.Name), c.MirrorType)
		}
	}
	w.overlap = "SELECT " + t.Overlap(func(c schema.Column) string { return "i.mine ? " + schema.Literal(c.Name) }, value("i.old"), value("i.theirs"), value("i.mine")) +
		" FROM (SELECT $1::jsonb AS old, $2::jsonb AS theirs, $3::jsonb AS mine) AS i"
	return w, nil
}

func (w *table) list(idx []int, fn func(int) string) string {
	parts := make([]string, len(idx))
	for j, i := range idx {
		parts[j] = fn(i)
	}
	return strings.Join(parts, ", ")
}

func (w *table) cast(i int) string {
	if typ := w.Columns[i].MirrorType; typ != "text" {
		return fmt.Sprintf("u.c%d::%s", i, typ)
	}
	return fmt.Sprintf("u.c%d", i)
}

const ordinality = "i"

// unnest is a FROM item u that turns array parameters, from number first on, into rows: c0, c1, ... are the columns with
// these places, then come further ones ("name type"), and i, the row's number from 1, if ordinality is the last.
func (w *table) unnest(idx []int, first int, more ...string) string {
	var args, names []string
	for _, i := range idx {
		args = append(args, fmt.Sprintf("$%d::text[]", first+len(args)))
		names = append(names, fmt.Sprintf("c%d", i))
	}
	with := ""
	for _, m := range more {
		name, typ, ok := strings.Cut(m, " ")
		names = append(names, name)
		if !ok {
			with = " WITH ORDINALITY"
			continue
		}
		args = append(args, fmt.Sprintf("$%d::%s[]", first+len(args), typ))
	}
	return fmt.Sprintf("unnest(%s)%s AS u(%s)", strings.Join(args, ", "), with, strings.Join(names, ", "))
}

// match compares the key of mirror row m with u's.
func (w *table) match() string {
	parts := make([]string, len(w.keys))
	for j, i := range w.keys {
		parts[j] = "m." + schema.Quote(w.Columns[i].Name) + " = " + w.cast(i)
	}
	return strings.Join(parts, " AND ")
}

// spelled further asks that the key is written in the same way: where the source has rewritten 1.0 as 1.00, the row is
// another one to side tables and devices, and what is said of the old one is not said of it.
func (w *table) spelled() string {
	var out strings.Builder
	for _, i := range w.keys {
		if c := w.Columns[i]; c.Loose() {
			fmt.Fprintf(&out, " AND %s = u.c%d", c.Text("m."+schema.Quote(c.Name)), i)
		}
	}
	return out.String()
}

// keyArray is the key as side tables have it.
func (w *table) keyArray(alias string) string {
	return "ARRAY[" + w.list(w.keys, func(i int) string { return fmt.Sprintf("%s.c%d", alias, i) }) + "]"
}

// mirrorKey is the same of a mirror row.
func (w *table) mirrorKey(alias string) string {
	return "ARRAY[" + w.list(w.keys, func(i int) string { return w.Columns[i].Text(alias + "." + schema.Quote(w.Columns[i].Name)) }) + "]"
}

// updateRows writes only the columns with these places; parameters: keys, then they.
func (w *table) updateRows(cols []int) string {
	idx := append(slices.Clone(w.keys), cols...)
	return fmt.Sprintf("UPDATE %s AS m SET %s, %s = pg_current_xact_id()::text::bigint, %s = NULL, %s = 0 FROM %s WHERE %s",
		w.Ident(), w.list(cols, func(i int) string { return schema.Quote(w.Columns[i].Name) + " = " + w.cast(i) }),
		schema.ColVersion, schema.ColWriter, schema.ColMerged, w.unnest(idx, 1), w.match())
}

// keyOf is the key of an image in the form of side tables.
func (w *table) keyOf(g image) ([]string, error) {
	key := make([]string, len(w.keys))
	for j, i := range w.keys {
		if g[i] == nil || g[i] == hole {
			return nil, &fault{t: w, code: schema.StopIdentity, detail: "a row came without its primary key; " + remedyIdentity}
		}
		key[j] = *g[i] // the output function's text, which is the canonical one
	}
	return key, nil
}

// keyID is a key as a map key.
func keyID(key []string) string {
	if len(key) == 1 {
		return key[0]
	}
	var b strings.Builder
	for _, k := range key {
		fmt.Fprintf(&b, "%d:%s", len(k), k)
	}
	return b.String()
}

// keyArrays turns keys into one array for each key column.
func (w *table) keyArrays(n int, key func(int) []string) []any {
	out := make([]any, len(w.keys))
	for j := range w.keys {
		col := make([]string, n)
		for r := range n {
			col[r] = key(r)[j]
		}
		out[j] = col
	}
	return out
}

// columnArrays turns images into one array for each of the columns with these places.
func columnArrays(idx []int, n int, img func(int) image) []any {
	out := make([]any, len(idx))
	for j, i := range idx {
		col := make([]*string, n)
		for r := range n {
			col[r] = img(r)[i]
		}
		out[j] = col
	}
	return out
}

func (w *table) all() []int {
	idx := make([]int, len(w.Columns))
	for i := range idx {
		idx[i] = i
	}
	return idx
}

// relation maps the tuples of one relation description to a table.
type relation struct {
	table  *table // nil: not synced
	marker bool   // the source's waystage.progress
	desc   *change.Relation
	column []int // for each tuple column its place in the table, -1: not synced
	err    error // why its rows cannot be taken: a *fault
}

// bind compares the description with the table as it was set up. Columns that are new at the source are passed over.
func (w *table) bind(desc *change.Relation) *relation {
	r := &relation{table: w, desc: desc, column: make([]int, len(desc.Columns))}
	bad := func(code schema.StopCode, format string, args ...any) *relation {
		r.err = &fault{t: w, code: code, detail: fmt.Sprintf(format, args...)}
		return r
	}
	if w.OID != 0 && desc.ID != w.OID {
		return bad(schema.StopReplaced, "another table has this name at the source now")
	}
	seen := make([]bool, len(w.Columns))
	var key []string
	for i, c := range desc.Columns {
		if c.Key {
			key = append(key, c.Name)
		}
		j, ok := w.at[c.Name]
		if !ok {
			r.column[i] = -1
			continue
		}
		r.column[i], seen[j] = j, true
		if was := w.Columns[j]; was.TypeOID != 0 && (was.TypeOID != c.Type || was.TypeMod != c.Mod) {
			return bad(schema.StopType, "column %s was %s and has another type now", c.Name, was.Type)
		}
	}
	if j := slices.Index(seen, false); j >= 0 {
		return bad(schema.StopColumn, "column %s is gone at the source", w.Columns[j].Name)
	}
	// The full identity marks every column.
	if desc.Identity == 'f' {
		return r
	}
	for _, k := range w.Key {
		if !slices.Contains(key, k) {
			if desc.Identity == 'd' && len(key) > 0 {
				return bad(schema.StopKey, "the primary key was (%s) and is (%s) now", strings.Join(w.Key, ", "), strings.Join(key, ", "))
			}
			return bad(schema.StopIdentity, "the replica identity does not cover the primary key; %s", remedyIdentity)
		}
	}
	if len(key) > len(w.Key) {
		return bad(schema.StopKey, "the primary key was (%s) and is (%s) now", strings.Join(w.Key, ", "), strings.Join(key, ", "))
	}
	return r
}

// image maps a tuple. Values that were not sent are holes.
func (r *relation) image(vals []change.Value) (image, error) {
	if len(vals) != len(r.column) {
		return nil, fmt.Errorf("%w: a tuple of %d columns in a relation of %d", change.ErrNotChangeData, len(vals), len(r.column))
	}
	g := make(image, len(r.table.Columns))
	texts := make([]string, len(vals))
	for i, v := range vals {
		j := r.column[i]
		if j < 0 {
			continue
		}
		switch v.State {
		case change.Text:
			texts[i] = v.Text
			g[j] = &texts[i]
		case change.Unchanged:
			g[j] = hole
		}
	}
	return g, nil
}
