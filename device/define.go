package device

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/waystage/waystage/protocol"
)

// define makes the tables of a set what the server says they are. New tables are created; new columns are added in
// place, so that unsent edits live on. more tells that a table that already had rows got something that only a full
// refresh can fill.
func (t *txn) define(name string, defs *protocol.Definitions) (more bool, err error) {
	c, err := t.load()
	if err != nil {
		return false, err
	}
	if s := c.set(name); s != nil {
		in := &incoming{t: t, set: s, gen: -1, rep: &SetReport{}, dirty: map[string]bool{}}
		for _, m := range s.Tables {
			if !slices.ContainsFunc(defs.Tables, func(d protocol.Table) bool { return d.Name == m.Wire }) {
				if err := in.sweep1(m.table); err != nil {
					return false, err
				}
			}
		}
	}
	if err := t.exec(`DELETE FROM _ws_set_table WHERE set_name = ?`, name); err != nil {
		return false, err
	}
	for ord, def := range defs.Tables {
		tab := c.tables[def.Name]
		if tab != nil && tab.rekeyed(def) {
			if err := t.discard(name, tab); err != nil {
				return false, err
			}
			tab, more = nil, true
		}
		if tab == nil {
			if tab, err = t.define1(def); err != nil {
				return false, err
			}
			c.tables[def.Name] = tab
		} else {
			grown, err := t.extend(tab, def)
			if err != nil {
				return false, err
			}
			more = more || grown
		}
		if def.SubsetKey != "" {
			i := tab.index(def.SubsetKey)
			if i < 0 {
				return false, fmt.Errorf("%w: subset key %s is not a column of table %s", ErrReply, def.SubsetKey, def.Name)
			}
			if err := t.exec("CREATE INDEX IF NOT EXISTS " + quote("_ws_k_"+tab.Local+"_"+tab.Cols[i].Local) + " ON " + quote(tab.Local) + " (" + quote(tab.Cols[i].Local) + ")"); err != nil {
				return false, err
			}
		}
		text, err := json.Marshal(def)
		if err != nil {
			return false, err
		}
		if err := t.exec(`INSERT INTO _ws_set_table (set_name, wire, ord, def) VALUES (?, ?, ?, ?)`, name, def.Name, ord, string(text)); err != nil {
			return false, err
		}
	}
	if err := t.defineFiles(name, defs.Files); err != nil {
		return false, err
	}
	if err := t.exec(`UPDATE _ws_set SET hash = ? WHERE name = ?`, defs.Hash, name); err != nil {
		return false, err
	}
	return more, t.shrink()
}

// rekeyed tells whether the table's rows have other keys now: other columns, or values that SQLite keeps in another way.
func (tab *table) rekeyed(def protocol.Table) bool {
	if !slices.Equal(tab.Key, def.Key) {
		return true
	}
	return slices.ContainsFunc(def.Columns, func(c protocol.Column) bool {
		i := tab.index(c.Name)
		return i >= 0 && slices.Contains(tab.key, i) && kindOf(c.Type) != tab.Cols[i].kind
	})
}

func (t *txn) define1(def protocol.Table) (*table, error) {
	local, err := t.name(def.Name)
	if err != nil {
		return nil, err
	}
	tab := &table{Wire: def.Name, Local: local, Key: def.Key}
	for _, c := range def.Columns {
		tab.add(c, nil)
	}
	if err := t.create(tab); err != nil {
		return nil, err
	}
	return tab, t.install(tab)
}

// extend adds columns, and converts those whose type is kept otherwise in SQLite.
func (t *txn) extend(tab *table, def protocol.Table) (grown bool, err error) {
	var have []string
	err = t.each(`SELECT name FROM pragma_table_info(?)`, []any{tab.Local}, func(scan func(...any) error) error {
		have = append(have, "")
		return scan(&have[len(have)-1])
	})
	if err != nil {
		return false, err
	}
	changed := false
	for _, c := range def.Columns {
		i := tab.index(c.Name)
		switch {
		case i < 0:
			col := tab.add(c, have)
			if err := t.addColumn(tab, col); err != nil {
				return false, err
			}
			grown, changed = true, true
		case tab.Cols[i].Type != c.Type:
			was := tab.Cols[i].kind
			tab.Cols[i].Type = c.Type
			if k := kindOf(c.Type); k != was {
				if err := t.convert(tab, i, was, k); err != nil {
					return false, err
				}
				grown = true
			}
			changed = true
		}
	}
	if !changed {
		return false, nil
	}
	if err := t.saveTable(tab); err != nil {
		return false, err
	}
	return grown, t.install(tab)
}

func (t *txn) addColumn(tab *table, col *column) error {
	t.close()
	if err := t.uninstall(tab); err != nil {
		return err
	}
	if err := t.exec("ALTER TABLE " + quote(tab.Local) + " ADD COLUMN " + col.declare(false)); err != nil {
		return err
	}
	if err := t.exec("ALTER TABLE " + quote(tab.shadow()) + " ADD COLUMN " + quote("b_"+col.Local) + " " + col.kind.declared()); err != nil || col.Default == "" {
		return err
	}
	// Rows that are there do not take the default: the server's values follow, and until then null means "not told yet", in the base too. But those that the
	// user has added and that no session carries: they are sent whole, and a null would be the user's word.
	return t.exec("UPDATE " + quote(tab.Local) + " SET " + quote(col.Local) + " = NULL WHERE NOT EXISTS (SELECT 1 FROM " + quote(tab.shadow()) + " AS s WHERE s.base = 0 AND s.batch IS NULL AND " +
		tab.joined(quote(tab.Local), "s") + ")")
}

// convert changes how the values of a column outside the key are kept, live ones and bases.
func (t *txn) convert(tab *table, i int, was, is kind) error {
	t.close()
	if err := t.uninstall(tab); err != nil {
		return err
	}
	for _, where := range []struct{ table, col, id string }{{tab.Local, tab.Cols[i].Local, "rowid"}, {tab.shadow(), "b_" + tab.Cols[i].Local, "id"}} {
		type cell struct {
			id int64
			v  any
		}
		var cells []cell
		err := t.each("SELECT "+where.id+", "+quote(where.col)+" FROM "+quote(where.table), nil, func(scan func(...any) error) error {
			cells = append(cells, cell{})
			return scan(&cells[len(cells)-1].id, &cells[len(cells)-1].v)
		})
		if err != nil {
			return err
		}
		tmp := quote("_ws_tmp")
		for _, q := range []string{
			"ALTER TABLE " + quote(where.table) + " ADD COLUMN " + tmp + " " + is.declared(),
		} {
			if err := t.exec(q); err != nil {
				return err
			}
		}
		for _, c := range cells {
			if _, err := t.run("UPDATE "+quote(where.table)+" SET "+tmp+" = ? WHERE "+where.id+" = ?", fromWire(is, toWire(was, c.v)), c.id); err != nil {
				return err
			}
		}
		t.close()
		for _, q := range []string{
			"ALTER TABLE " + quote(where.table) + " DROP COLUMN " + quote(where.col),
			"ALTER TABLE " + quote(where.table) + " RENAME COLUMN " + tmp + " TO " + quote(where.col),
		} {
			if err := t.exec(q); err != nil {
				return err
			}
		}
	}
	return nil
}

// keepLost writes edits of columns that leave into the rejected log, one entry a row. What else was edited in the row stays unsent; a row
// of a unit is rejected whole, and its unit with it.
func (t *txn) keepLost(tab *table, drop []column) error {
	name, err := t.setOf(tab)
	if err != nil {
		return err
	}
	return t.eachDirty(tab, func(d *dirty, live []any, unit int64) error {
		if live == nil {
			return nil
		}
		lost, err := t.lost(tab, d, live, drop)
		if err != nil || len(lost) == 0 {
			return err
		}
		detail := fmt.Sprintf("left the subscription, so what was written has no place any more: %s", strings.Join(lost, ", "))
		if unit != 0 && !d.batch.Valid {
			return t.rejectHere(name, tab, d, live, unit, protocol.CodeSchema, detail)
		}
		return t.rejectPart(name, tab, d, live, unit, protocol.CodeSchema, detail)
	})
}

// eachDirty calls f for every dirty row of a table, with the row as it is (nil: there is none) and a number of its unit in the file (0:
// it is in none). f may make the row clean.
func (t *txn) eachDirty(tab *table, f func(d *dirty, live []any, unit int64) error) error {
	ids, err := t.ids(tab)
	if err != nil {
		return err
	}
	for _, id := range ids {
		d, err := t.dirty(tab, id)
		if err != nil {
			return err
		}
		live, err := t.live(tab, d.key)
		if err != nil {
			return err
		}
		var unit int64
		if err := t.get("SELECT coalesce(min(unit), 0) FROM "+quote(tab.units())+" WHERE id = ?", []any{d.id}, &unit); err != nil {
			return err
		}
		if err := f(d, live, unit); err != nil {
			return err
		}
	}
	return nil
}

// lost names those of the columns whose content no server has or will have a verdict for.
func (t *txn) lost(tab *table, d *dirty, live []any, drop []column) (names []string, err error) {
	known := image{}
	if d.base {
		known = tab.image(d.baseRow)
	}
	if d.batch.Valid {
		sent, err := t.sent(tab, d)
		if err != nil {
			return nil, err
		}
		maps.Copy(known, sent)
	}
	for _, col := range drop {
		if !sameWire(toWire(col.kind, live[tab.index(col.Wire)]), known[col.Wire]) {
			names = append(names, col.Wire)
		}
	}
	return names, nil
}

// sent is the new image in the record that carries a row.
func (t *txn) sent(tab *table, d *dirty) (image, error) {
	var p Payload
	err := t.get(`SELECT o.content_type, o.encoding, o.payload FROM _ws_outbox o, _ws_state s WHERE `+markOf+` = ?`,
		[]any{d.batch.Int64}, &p.ContentType, &p.Encoding, &p.Data)
	if err != nil {
		return nil, err
	}
	req, err := p.request()
	if err != nil {
		return nil, err
	}
	i := int(d.idx.Int64)
	if i >= len(req.Changes) {
		return nil, fmt.Errorf("the request in the outbox has no record %d: the file is damaged", i)
	}
	f := frozen{Change: req.Changes[i], columns: columnsOf(req, tab.Wire)}
	return f.image(f.New), nil
}

// setOf names a set that the table is, or was, in.
func (t *txn) setOf(tab *table) (name string, err error) {
	err = t.get(`SELECT coalesce(min(set_name), '') FROM _ws_set_table WHERE wire = ?`, []any{tab.Wire}, &name)
	return name, err
}

// shrink takes away columns that no set carries any more: what leaves the subset leaves the device.
func (t *txn) shrink() error {
	c, err := t.load()
	if err != nil {
		return err
	}
	for _, tab := range c.order {
		used, members := map[string]bool{}, 0
		for _, s := range c.sets {
			if m := s.member(tab.Wire); m != nil && !s.Gone {
				members++
				for _, col := range m.Def.Columns {
					used[col.Name] = true
				}
			}
		}
		var drop []column
		keep := tab.Cols[:0:0]
		for _, col := range tab.Cols {
			if used[col.Wire] || slices.Contains(tab.Key, col.Wire) {
				keep = append(keep, col)
			} else {
				drop = append(drop, col)
			}
		}
		if members == 0 || len(drop) == 0 {
			continue
		}
		if err := t.keepLost(tab, drop); err != nil {
			return err
		}
		if err := t.uninstall(tab); err != nil {
			return err
		}
		t.close()
		for _, col := range drop {
			if err := t.exec("DROP INDEX IF EXISTS " + quote("_ws_k_"+tab.Local+"_"+col.Local)); err != nil {
				return err
			}
			// The application may have put an index or a view on the column: then its content goes, and the column stays.
			if t.exec("ALTER TABLE "+quote(tab.Local)+" DROP COLUMN "+quote(col.Local)) != nil {
				if err := t.exec("UPDATE " + quote(tab.Local) + " SET " + quote(col.Local) + " = NULL"); err != nil {
					return err
				}
			}
			if err := t.exec("ALTER TABLE " + quote(tab.shadow()) + " DROP COLUMN " + quote("b_"+col.Local)); err != nil {
				return err
			}
		}
		tab.Cols = keep
		if err := t.saveTable(tab); err != nil {
			return err
		}
		if err := t.install(tab); err != nil {
			return err
		}
	}
	return nil
}

// discard removes a table whose key has changed; unsent edits of it are logged as rejected.
func (t *txn) discard(setName string, tab *table) error {
	if err := t.rejectAll(setName, tab, true, protocol.CodeSchema, "the table's key was changed at the server"); err != nil {
		return err
	}
	if err := t.exec(`UPDATE _ws_set SET hash = '', cursor = '' WHERE name <> ? AND name IN (SELECT set_name FROM _ws_set_table WHERE wire = ?)`, setName, tab.Wire); err != nil {
		return err
	}
	// Their receipts go on as those of the rejections just made.
	if err := t.exec(`DELETE FROM _ws_receipt WHERE (incarnation, n, idx) IN (SELECT incarnation, n, idx FROM _ws_record WHERE wire = ? AND state = 'sent')`, tab.Wire); err != nil {
		return err
	}
	if err := t.exec(`DELETE FROM _ws_record WHERE wire = ? AND state = 'sent'`, tab.Wire); err != nil {
		return err
	}
	return t.drop(tab)
}

// rejectAll refuses the edits of a table on the device itself; marked ones, whose verdict may still come, only if all is set.
func (t *txn) rejectAll(setName string, tab *table, all bool, code protocol.Code, detail string) error {
	return t.eachDirty(tab, func(d *dirty, live []any, unit int64) error {
		switch {
		case d.batch.Valid && !all:
			return nil
		case !d.batch.Valid && tab.undone(d, live): // putting back what is on its way is an edit
			return t.restore(tab, d)
		}
		return t.rejectHere(setName, tab, d, live, unit, code, detail)
	})
}

// adopt takes over the list of the user's sets. What is new has todo as its place in the running sync.
func (t *txn) adopt(c *catalogue, names []string, todo int) error {
	var used int64
	for _, s := range c.sets {
		used |= s.Bit
	}
	for ord, name := range names {
		if c.set(name) != nil {
			// One that comes back before it was forgotten is new as well.
			if err := t.exec(`UPDATE _ws_set SET ord = ?, todo = CASE WHEN gone = 1 THEN ? ELSE todo END, gone = 0 WHERE name = ?`, ord, todo, name); err != nil {
				return err
			}
			continue
		}
		bit := int64(1)
		for used&bit != 0 {
			bit <<= 1
		}
		if bit <= 0 {
			return fmt.Errorf("more than 63 subscription sets")
		}
		used |= bit
		if err := t.exec(`INSERT INTO _ws_set (name, bit, ord, todo) VALUES (?, ?, ?, ?)`, name, bit, ord, todo); err != nil {
			return err
		}
	}
	for _, s := range c.sets {
		if !slices.Contains(names, s.Name) && !s.Gone {
			if err := t.exec(`UPDATE _ws_set SET gone = 1, todo = 0, cursor = '', hash = '' WHERE name = ?`, s.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// dropGone removes what belongs to sets that the user no longer has: unsent edits go to the rejected log, rows leave
// the device. Edits that are on their way keep their rows until the verdict. Capture must be off.
func (t *txn) dropGone() error {
	c, err := t.load()
	if err != nil {
		return err
	}
	if err := t.leaveFiles(); err != nil {
		return err
	}
	for _, tab := range c.order {
		inUse := false
		for _, s := range c.sets {
			inUse = inUse || !s.Gone && s.member(tab.Wire) != nil
		}
		var from *set
		for _, s := range c.sets {
			if s.Gone && s.member(tab.Wire) != nil {
				from = s
				in := &incoming{t: t, set: s, gen: -1, rep: &SetReport{}, dirty: map[string]bool{}}
				if err := in.sweep1(tab); err != nil {
					return err
				}
			}
		}
		if inUse {
			continue
		}
		name := ""
		if from != nil {
			name = from.Name
		}
		if err := t.rejectAll(name, tab, false, protocol.CodeNotSubscribed, "the table is no longer subscribed to"); err != nil {
			return err
		}
		left, err := t.ids(tab)
		if err != nil {
			return err
		}
		if err := t.unpark(tab); err != nil {
			return err
		}
		if len(left) == 0 {
			if err := t.drop(tab); err != nil {
				return err
			}
		}
	}
	if slices.ContainsFunc(c.sets, func(s *set) bool { return s.Gone }) {
		if err := t.shrink(); err != nil { // another set may have taken over a table, with fewer columns
			return err
		}
	}
	return t.exec(`DELETE FROM _ws_set WHERE gone = 1 AND NOT EXISTS (SELECT 1 FROM _ws_set_table m WHERE m.set_name = name) AND NOT EXISTS (SELECT 1 FROM _ws_outbox o WHERE o.set_name = name)`)
}
