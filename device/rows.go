package device

import (
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Where the server's image of a dirty row is.
const (
	serverIsBase = 0 // it has not moved since the first touch
	serverIsSimg = 1
	serverAbsent = 2
)

// dirty is one row of a shadow table: what a touched row was, and what has become of it since.
type dirty struct {
	id      int64
	key     []any
	base    bool // the row existed at first touch; baseRow holds it
	baseRow []any
	batch   sql.NullInt64 // session that carries the row and has no verdict yet
	idx     sql.NullInt64 // its position there
	bver    sql.NullString
	sstate  int
	simg    sql.NullString // JSON {column: text or null}
	touched int64
}

// undone tells that the user has put a dirty row back to what it was.
func (tab *table) undone(d *dirty, live []any) bool {
	return d.base == (live != nil) && (live == nil || sameImage(tab.toWire(tab.all(), d.baseRow), tab.toWire(tab.all(), live)))
}

// image is a row as the wire carries it, by column name.
type image map[string]*string

// values are a key as the wire carries it.
type values []*string

// The JSON of images and keys in our own tables has text that is not UTF-8 as {"hex": "..."}: it cannot be sent, but
// what the user wrote is not to be lost.

func (m image) MarshalJSON() ([]byte, error) {
	if m == nil {
		return []byte("null"), nil
	}
	out := make(map[string]any, len(m))
	for c, v := range m {
		out[c] = kept(v)
	}
	return json.Marshal(out)
}

func (m *image) UnmarshalJSON(text []byte) error {
	var in map[string]cell
	if err := json.Unmarshal(text, &in); err != nil {
		return err
	}
	*m = make(image, len(in))
	for c, v := range in {
		(*m)[c] = v.v
	}
	return nil
}

func (l values) MarshalJSON() ([]byte, error) {
	out := make([]any, len(l))
	for i, v := range l {
		out[i] = kept(v)
	}
	return json.Marshal(out)
}

func (l *values) UnmarshalJSON(text []byte) error {
	var in []cell
	if err := json.Unmarshal(text, &in); err != nil {
		return err
	}
	for _, v := range in {
		*l = append(*l, v.v)
	}
	return nil
}

func kept(v *string) any {
	switch {
	case v == nil:
		return nil
	case utf8.ValidString(*v):
		return *v
	}
	return map[string]string{"hex": hex.EncodeToString([]byte(*v))}
}

type cell struct{ v *string }

func (c *cell) UnmarshalJSON(text []byte) error {
	if len(text) == 0 || text[0] != '{' {
		return json.Unmarshal(text, &c.v)
	}
	var raw struct{ Hex string }
	if err := json.Unmarshal(text, &raw); err != nil {
		return err
	}
	b, err := hex.DecodeString(raw.Hex)
	s := string(b)
	c.v = &s
	return err
}

func (tab *table) image(row []any) image {
	if row == nil {
		return nil
	}
	m := make(image, len(tab.Cols))
	for i, c := range tab.Cols {
		m[c.Wire] = toWire(c.kind, row[i])
	}
	return m
}

// dirtyID finds the shadow row of a key; 0: the row is clean.
func (t *txn) dirtyID(tab *table, key []any) (int64, error) {
	var id int64
	err := t.get(tab.sql.dirtyByKey, key, &id)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return id, err
}

func (t *txn) dirty(tab *table, id int64) (*dirty, error) {
	d := &dirty{key: make([]any, len(tab.key)), baseRow: make([]any, len(tab.Cols))}
	into := []any{&d.id, &d.base, &d.batch, &d.idx, &d.bver, &d.sstate, &d.simg, &d.touched}
	for i := range d.key {
		into = append(into, &d.key[i])
	}
	for i := range d.baseRow {
		into = append(into, &d.baseRow[i])
	}
	err := t.get(tab.sql.dirtyByID, []any{id}, into...)
	if !d.base {
		d.baseRow = nil
	}
	return d, err
}

// live reads the row as it is; nil: there is none.
func (t *txn) live(tab *table, key []any) ([]any, error) {
	vals, ok, err := t.values(len(tab.Cols), tab.sql.live, key...)
	if err == nil && !ok && t.parked[tab] {
		vals, ok, err = t.values(len(tab.Cols), strings.Replace(tab.sql.live, " FROM "+quote(tab.Local), " FROM temp."+quote(tab.parking()), 1), key...)
	}
	if !ok {
		return nil, err
	}
	return vals, err
}

// remove deletes a live row.
func (t *txn) remove(tab *table, key []any) error {
	_, err := t.run(tab.sql.del, key...)
	if err == nil && t.parked[tab] {
		_, err = t.run(strings.Replace(tab.sql.del, " FROM "+quote(tab.Local), " FROM temp."+quote(tab.parking()), 1), key...)
	}
	return err
}

// version is the version of the server's last image of a row ("": the server has none), and the sets that hold it.
func (t *txn) version(tab *table, key []any) (sver string, sets int64, err error) {
	err = t.get(tab.sql.version, key, &sver, &sets)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return sver, sets, err
}

func (t *txn) setVersion(tab *table, key []any, sver string, bit, gen int64) error {
	_, err := t.run(tab.sql.versionPut, append(slices.Clone(key), sver, bit, gen)...)
	return err
}

func (t *txn) dropVersion(tab *table, key []any) error {
	_, err := t.run(tab.sql.versionDel, key...)
	return err
}

// baseVersion is the version that the user's first edit was made on; "": there was no row.
func (t *txn) baseVersion(tab *table, d *dirty) (string, error) {
	if !d.base {
		return "", nil
	}
	if d.bver.Valid {
		return d.bver.String, nil
	}
	v, _, err := t.version(tab, d.key)
	return v, err
}

// fix writes the base version down before the server's version moves away from it (rule D10).
func (t *txn) fix(tab *table, d *dirty) error {
	if d.bver.Valid {
		return nil
	}
	v, err := t.baseVersion(tab, d)
	if err != nil {
		return err
	}
	d.bver = sql.NullString{String: v, Valid: true}
	_, err = t.run("UPDATE "+quote(tab.shadow())+" SET bver = ? WHERE id = ?", v, d.id)
	return err
}

// server is the server's last image of a dirty row, as the columns that it names; nil: the server has no such row.
func (tab *table) server(d *dirty) (cols []int, vals []any, err error) {
	switch {
	case d.sstate == serverAbsent, d.sstate == serverIsBase && !d.base:
		return nil, nil, nil
	case d.sstate == serverIsBase:
		return tab.all(), d.baseRow, nil
	}
	var m image
	if err := json.Unmarshal([]byte(d.simg.String), &m); err != nil {
		return nil, nil, err
	}
	for i, c := range tab.Cols {
		if v, ok := m[c.Wire]; ok {
			cols, vals = append(cols, i), append(vals, fromWire(c.kind, v))
		}
	}
	return cols, vals, nil
}

// restore makes the row what the server has and clean.
func (t *txn) restore(tab *table, d *dirty) error {
	cols, vals, err := tab.server(d)
	if err != nil {
		return err
	}
	if cols == nil {
		if err := t.remove(tab, d.key); err != nil {
			return err
		}
	} else if err := t.put(tab, cols, vals); err != nil {
		return err
	}
	return t.forget(tab, d)
}

// forget drops the shadow row: the row is clean.
func (t *txn) forget(tab *table, d *dirty) error {
	_, err := t.run(tab.sql.dirtyDrop, d.id)
	return err
}

// unmark takes the batch mark off.
func (t *txn) unmark(tab *table, d *dirty) error {
	_, err := t.run("UPDATE "+quote(tab.shadow())+" SET batch = NULL, idx = NULL WHERE id = ?", d.id)
	d.batch, d.idx = sql.NullInt64{}, sql.NullInt64{}
	return err
}

// put writes columns of a live row, key included. Where the application's own unique indexes stand in the way (two
// rows may swap a value, and SQLite has no deferred uniqueness), the rows that hold the value step aside until unpark.
func (t *txn) put(tab *table, cols []int, vals []any) error {
	q := tab.sql.put
	if len(cols) != len(tab.Cols) || !slices.IsSorted(cols) {
		q = tab.upsert(cols)
	}
	_, err := t.run(q, vals...)
	if err == nil || t.ctx.Err() != nil {
		return err
	}
	parked, perr := t.park(tab, cols, vals)
	if perr != nil {
		return perr
	}
	if !parked {
		return err
	}
	_, err = t.run(q, vals...)
	return err
}

func (tab *table) parking() string { return "_ws_p_" + tab.Local }

func (t *txn) park(tab *table, cols []int, vals []any) (parked bool, err error) {
	uniques, err := t.uniques(tab)
	if err != nil {
		return false, err
	}
	byName := map[string]any{}
	for i, c := range cols {
		byName[tab.Cols[c].Local] = vals[i]
	}
	var other []string
	var key []any
	for _, k := range tab.key {
		c := tab.Cols[k].Local
		other, key = append(other, quote(c)+" = ?"), append(key, byName[c])
	}
	for _, u := range uniques {
		var is []string
		var args []any
		for _, c := range u {
			v, ok := byName[c.col]
			if !ok || v == nil {
				is = nil
				break
			}
			is, args = append(is, quote(c.col)+" = ?"+c.collate()), append(args, v)
		}
		if is == nil {
			continue
		}
		where := " WHERE " + strings.Join(is, " AND ") + " AND NOT (" + strings.Join(other, " AND ") + ")"
		args = append(args, key...)
		t.parked[tab] = true
		if err := t.exec("CREATE TEMP TABLE IF NOT EXISTS " + quote(tab.parking()) + " AS SELECT * FROM main." + quote(tab.Local) + " WHERE 0"); err != nil {
			return false, err
		}
		if err := t.exec("INSERT INTO temp."+quote(tab.parking())+" SELECT * FROM main."+quote(tab.Local)+where, args...); err != nil {
			return false, err
		}
		n, err := t.run("DELETE FROM main."+quote(tab.Local)+where, args...)
		if err != nil {
			return false, err
		}
		parked = parked || n > 0
	}
	return parked, nil
}

// unpark brings back the rows that stepped aside, but for those that the reply has written since.
func (t *txn) unpark(tab *table) error {
	if !t.parked[tab] {
		return nil
	}
	var is []string
	for _, k := range tab.key {
		c := quote(tab.Cols[k].Local)
		is = append(is, "l."+c+" = p."+c)
	}
	// The application's own columns of a row that the reply wrote anew come back with it.
	var own []string
	err := t.each(`SELECT name FROM pragma_table_info(?)`, []any{tab.Local}, func(scan func(...any) error) error {
		var n string
		if err := scan(&n); err != nil {
			return err
		}
		if !slices.ContainsFunc(tab.Cols, func(c column) bool { return c.Local == n }) {
			own = append(own, n)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, c := range own {
		if err := t.exec("UPDATE main." + quote(tab.Local) + " AS l SET " + quote(c) + " = p." + quote(c) + " FROM temp." + quote(tab.parking()) + " AS p WHERE " + strings.Join(is, " AND ")); err != nil {
			return err
		}
	}
	err = t.exec("INSERT INTO main." + quote(tab.Local) + " SELECT * FROM temp." + quote(tab.parking()) + " AS p WHERE NOT EXISTS (SELECT 1 FROM main." + quote(tab.Local) + " AS l WHERE " + strings.Join(is, " AND ") + ")")
	if err != nil {
		return fmt.Errorf("table %s: the server has rows that your unique index does not allow together; drop the index: %w", tab.Local, err)
	}
	t.close()
	delete(t.parked, tab)
	return t.exec("DROP TABLE temp." + quote(tab.parking()))
}
