package device

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/waystage/waystage/protocol"
)

// table is a synced table as the file keeps it: the union of what the sets say of it.
type table struct {
	Wire  string   `json:"-"` // "schema.table"
	Local string   `json:"-"` // its name in the file
	Cols  []column `json:"columns"`
	Key   []string `json:"key"`

	capture string // hash of the installed capture
	key     []int  // positions of the key columns
	sql     tableSQL
}

type column struct {
	Wire    string `json:"wire"`
	Local   string `json:"local"` // differs where SQLite takes two names for one (it ignores case)
	Type    string `json:"type"`
	Default string `json:"default,omitempty"`
	kind    kind
}

// tableSQL are the statements for one row; parameters are the key, then what the name says.
type tableSQL struct {
	live, put, del                          string
	dirtyByKey, dirtyByID, dirtyDrop        string
	version, versionPut, versionDel, anyone string
	columns, keys, keyIs                    string
}

// shadow and versions are the names of a table's side tables.
func (t *table) shadow() string   { return "_ws_s_" + t.Local }
func (t *table) versions() string { return "_ws_v_" + t.Local }

// prime fills in what follows from the definition.
func (t *table) prime() error {
	t.key = t.key[:0]
	for i := range t.Cols {
		t.Cols[i].kind = kindOf(t.Cols[i].Type)
	}
	for _, k := range t.Key {
		i := t.index(k)
		if i < 0 {
			return fmt.Errorf("table %s: key column %s is not among its columns", t.Wire, k)
		}
		t.key = append(t.key, i)
	}
	if len(t.key) == 0 {
		return fmt.Errorf("table %s has no key", t.Wire)
	}
	q := tableSQL{}
	live, s, v := quote(t.Local), quote(t.shadow()), quote(t.versions())
	var cols, kKeys, is, kIs, bCols []string
	for _, c := range t.Cols {
		cols = append(cols, quote(c.Local))
		bCols = append(bCols, quote("b_"+c.Local))
	}
	for _, i := range t.key {
		c := t.Cols[i].Local
		kKeys = append(kKeys, quote("k_"+c))
		is, kIs = append(is, quote(c)+" = ?"), append(kIs, quote("k_"+c)+" = ?")
	}
	q.columns, q.keys, q.keyIs = strings.Join(cols, ", "), strings.Join(kKeys, ", "), strings.Join(kIs, " AND ")
	q.live = "SELECT " + q.columns + " FROM " + live + " WHERE " + strings.Join(is, " AND ")
	q.del = "DELETE FROM " + live + " WHERE " + strings.Join(is, " AND ")
	q.put = t.upsert(t.all())
	fields := "SELECT id, base, batch, idx, bver, sstate, simg, touched, " + q.keys + ", " + strings.Join(bCols, ", ") + " FROM " + s
	q.dirtyByID = fields + " WHERE id = ?"
	q.dirtyByKey = "SELECT id FROM " + s + " WHERE " + q.keyIs
	q.dirtyDrop = "DELETE FROM " + s + " WHERE id = ?"
	q.anyone = "SELECT EXISTS (SELECT 1 FROM " + s + ")"
	q.version = "SELECT sver, sets FROM " + v + " WHERE " + q.keyIs
	q.versionPut = "INSERT INTO " + v + " (" + q.keys + ", sver, sets, gen) VALUES (" + marks(len(t.key)+3) + ") ON CONFLICT (" + q.keys +
		") DO UPDATE SET sver = excluded.sver, sets = sets | excluded.sets, gen = excluded.gen"
	q.versionDel = "DELETE FROM " + v + " WHERE " + q.keyIs
	t.sql = q
	return nil
}

// upsert is the statement that writes the columns at the given positions, key included. Never INSERT OR REPLACE: that
// deletes the row first, and columns of the application's own with it.
func (t *table) upsert(cols []int) string {
	var names, sets, keys []string
	for _, i := range cols {
		c := quote(t.Cols[i].Local)
		names = append(names, c)
		if !slices.Contains(t.key, i) {
			sets = append(sets, c+" = excluded."+c)
		}
	}
	for _, i := range t.key {
		keys = append(keys, quote(t.Cols[i].Local))
	}
	action := "NOTHING"
	if len(sets) > 0 {
		action = "UPDATE SET " + strings.Join(sets, ", ")
	}
	return "INSERT INTO " + quote(t.Local) + " (" + strings.Join(names, ", ") + ") VALUES (" + marks(len(names)) +
		") ON CONFLICT (" + strings.Join(keys, ", ") + ") DO " + action
}

func marks(n int) string { return strings.TrimSuffix(strings.Repeat("?, ", n), ", ") }

// all are the positions of all columns.
func (t *table) all() []int {
	l := make([]int, len(t.Cols))
	for i := range l {
		l[i] = i
	}
	return l
}

// index finds a column by its wire name, -1 if there is none.
func (t *table) index(wire string) int {
	return slices.IndexFunc(t.Cols, func(c column) bool { return c.Wire == wire })
}

// toWire renders SQLite values of the columns at the given positions.
func (t *table) toWire(cols []int, vals []any) []*string {
	out := make([]*string, len(cols))
	for i, c := range cols {
		out[i] = toWire(t.Cols[c].kind, vals[i])
	}
	return out
}

// keyValues reads a key from the wire.
func (t *table) keyValues(key []protocol.Value) ([]any, error) {
	if len(key) != len(t.key) {
		return nil, fmt.Errorf("%w: a key of table %s with %d values, it has %d columns", ErrReply, t.Wire, len(key), len(t.key))
	}
	out := make([]any, len(key))
	for i, v := range key {
		if v == nil {
			return nil, fmt.Errorf("%w: a null in a key of table %s", ErrReply, t.Wire)
		}
		out[i] = fromWire(t.Cols[t.key[i]].kind, v)
	}
	return out, nil
}

// set is a subscription set as the file knows it.
type set struct {
	Name     string
	Bit      int64 // marks the set's rows in _ws_v_*
	Cursor   string
	Hash     string
	Todo     int  // in the running sync: 0 done, 1 to do, 2 to do again after those
	Gone     bool // the user no longer has it
	SyncedAt int64
	Tables   []member

	ClosedAt, ClosedUntil int64 // the server said then that it takes no session of the set until then; Unix time
}

// closed is when the server will take sessions of the set again; zero: it may now. A clock that was put back asks again.
func (s *set) closed(now time.Time) time.Time {
	if u := now.Unix(); s.ClosedAt <= u && u < s.ClosedUntil {
		return time.Unix(s.ClosedUntil, 0).UTC()
	}
	return time.Time{}
}

// member is a table as one set defines it.
type member struct {
	*table
	Def  protocol.Table
	cols []int // positions in table.Cols of the columns that this set carries, in its order
}

// catalogue is everything synced.
type catalogue struct {
	tables map[string]*table // by wire name
	order  []*table
	sets   []*set // in sync order
}

func (c *catalogue) set(name string) *set {
	for _, s := range c.sets {
		if s.Name == name {
			return s
		}
	}
	return nil
}

func (s *set) member(wire string) *member {
	for i := range s.Tables {
		if s.Tables[i].Wire == wire {
			return &s.Tables[i]
		}
	}
	return nil
}

// uploads tells whether changes of the table travel in this set: a table should be in one set of a user only; where
// it is in several, the one that carries most columns and allows uploads takes them.
func (c *catalogue) uploads(s *set, wire string) bool {
	var best *set
	most := -1
	for _, x := range c.sets {
		if m := x.member(wire); m != nil && !x.Gone {
			n := len(m.cols)
			if m.Def.Operations != "" {
				n += 10_000
			}
			if n > most {
				best, most = x, n
			}
		}
	}
	return best == s
}

// load reads the catalogue.
func (t *txn) load() (*catalogue, error) {
	c := &catalogue{tables: map[string]*table{}}
	err := t.each(`SELECT wire, local, def, capture FROM _ws_table ORDER BY rowid`, nil, func(scan func(...any) error) error {
		var tab table
		var def string
		if err := scan(&tab.Wire, &tab.Local, &def, &tab.capture); err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(def), &tab); err != nil {
			return err
		}
		c.tables[tab.Wire] = &tab
		c.order = append(c.order, &tab)
		return tab.prime()
	})
	if err != nil {
		return nil, err
	}
	err = t.each(`SELECT name, bit, cursor, hash, todo, gone, synced_at, closed_at, closed_until FROM _ws_set ORDER BY ord`, nil, func(scan func(...any) error) error {
		var s set
		c.sets = append(c.sets, &s)
		return scan(&s.Name, &s.Bit, &s.Cursor, &s.Hash, &s.Todo, &s.Gone, &s.SyncedAt, &s.ClosedAt, &s.ClosedUntil)
	})
	if err != nil {
		return nil, err
	}
	return c, t.each(`SELECT set_name, wire, def FROM _ws_set_table ORDER BY ord`, nil, func(scan func(...any) error) error {
		var name, wire, def string
		if err := scan(&name, &wire, &def); err != nil {
			return err
		}
		s, tab := c.set(name), c.tables[wire]
		if s == nil || tab == nil {
			return nil
		}
		m := member{table: tab}
		if err := json.Unmarshal([]byte(def), &m.Def); err != nil {
			return err
		}
		for _, col := range m.Def.Columns {
			m.cols = append(m.cols, tab.index(col.Name))
		}
		s.Tables = append(s.Tables, m)
		return nil
	})
}

// name finds a free name in the file for a table: its own, or with the schema in front, or numbered.
func (t *txn) name(wire string) (string, error) {
	schema, name, ok := strings.Cut(wire, ".")
	if !ok {
		schema, name = "", wire
	}
	for i := 0; ; i++ {
		try := name
		switch {
		case i == 1:
			try = schema + "_" + name
		case i > 1:
			try = fmt.Sprintf("%s_%s_%d", schema, name, i)
		}
		low := strings.ToLower(try)
		if try == "" || strings.HasPrefix(low, "sqlite_") || strings.HasPrefix(low, "_ws_") {
			continue
		}
		var one int
		err := t.get(`SELECT 1 FROM sqlite_master WHERE lower(name) = lower(?)`, []any{try}, &one)
		if errors.Is(err, sql.ErrNoRows) {
			return try, nil
		}
		if err != nil {
			return "", err
		}
	}
}

// add appends a column under a name that is free in the table.
func (tab *table) add(c protocol.Column, taken []string) *column {
	free := func(n string) bool {
		return !slices.ContainsFunc(taken, func(x string) bool { return strings.EqualFold(x, n) }) &&
			!slices.ContainsFunc(tab.Cols, func(x column) bool { return strings.EqualFold(x.Local, n) })
	}
	local := strings.ReplaceAll(c.Name, "\x00", "")
	for i := 2; !free(local); i++ {
		local = fmt.Sprintf("%s_%d", c.Name, i)
	}
	tab.Cols = append(tab.Cols, column{Wire: c.Name, Local: local, Type: c.Type, Default: c.Default, kind: kindOf(c.Type)})
	return &tab.Cols[len(tab.Cols)-1]
}

// declare is the column's definition in CREATE TABLE and ALTER TABLE. Nothing but the key is NOT NULL: what a reply
// brings must always find room.
func (c *column) declare(key bool) string {
	s := quote(c.Local) + " " + c.kind.declared()
	if key {
		s += " NOT NULL"
	}
	if c.Default != "" {
		switch v := fromWire(c.kind, &c.Default).(type) {
		case int64:
			s += fmt.Sprintf(" DEFAULT %d", v)
		case float64:
			s += " DEFAULT " + formatFloat(v, false)
		case []byte:
			s += fmt.Sprintf(" DEFAULT x'%x'", v)
		case string:
			s += " DEFAULT " + literal(strings.ReplaceAll(v, "\x00", ""))
		}
	}
	return s
}

// create makes a table and its side tables.
func (t *txn) create(tab *table) error {
	if err := tab.prime(); err != nil {
		return err
	}
	var cols, keys, kCols, bCols []string
	for i := range tab.Cols {
		c := &tab.Cols[i]
		cols = append(cols, c.declare(slices.Contains(tab.key, i)))
		bCols = append(bCols, quote("b_"+c.Local)+" "+c.kind.declared())
	}
	for _, i := range tab.key {
		c := tab.Cols[i]
		keys = append(keys, quote(c.Local))
		kCols = append(kCols, quote("k_"+c.Local)+" "+c.kind.declared()+" NOT NULL")
	}
	kNames := tab.sql.keys
	for _, q := range []string{
		"CREATE TABLE " + quote(tab.Local) + " (" + strings.Join(cols, ", ") + ", PRIMARY KEY (" + strings.Join(keys, ", ") + "))",
		// base 0: the row did not exist at first touch. bver null: the version in _ws_v_* (it has not moved since).
		// sstate: the server's image is 0 the base, 1 in simg, 2 absent.
		"CREATE TABLE " + quote(tab.shadow()) + " (id INTEGER PRIMARY KEY, base INTEGER NOT NULL, batch INTEGER, idx INTEGER, bver TEXT, " +
			"sstate INTEGER NOT NULL DEFAULT 0, simg TEXT, touched INTEGER NOT NULL, " + strings.Join(kCols, ", ") + ", " + strings.Join(bCols, ", ") +
			", UNIQUE (" + kNames + "))",
		"CREATE INDEX " + quote("_ws_b_"+tab.Local) + " ON " + quote(tab.shadow()) + " (batch, idx)",
		"CREATE TABLE " + quote(tab.versions()) + " (" + strings.Join(kCols, ", ") + ", sver TEXT NOT NULL, sets INTEGER NOT NULL, gen INTEGER NOT NULL, PRIMARY KEY (" + kNames + ")) WITHOUT ROWID",
	} {
		if err := t.exec(q); err != nil {
			return err
		}
	}
	if err := t.createUnits(tab); err != nil {
		return err
	}
	return t.saveTable(tab)
}

func (t *txn) saveTable(tab *table) error {
	if err := tab.prime(); err != nil {
		return err
	}
	def, err := json.Marshal(tab)
	if err != nil {
		return err
	}
	return t.exec(`INSERT INTO _ws_table (wire, local, def) VALUES (?, ?, ?) ON CONFLICT (wire) DO UPDATE SET def = excluded.def`, tab.Wire, tab.Local, string(def))
}

// drop removes a table with everything in it.
func (t *txn) drop(tab *table) error {
	t.close() // statements on the table would hold it
	for _, q := range []string{
		"DROP TABLE IF EXISTS " + quote(tab.Local), "DROP TABLE " + quote(tab.shadow()), "DROP TABLE " + quote(tab.versions()), "DROP TABLE " + quote(tab.units()),
	} {
		if err := t.exec(q); err != nil {
			return err
		}
	}
	if err := t.exec(`DELETE FROM _ws_set_table WHERE wire = ?`, tab.Wire); err != nil {
		return err
	}
	return t.exec(`DELETE FROM _ws_table WHERE wire = ?`, tab.Wire)
}
