package device

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"slices"

	"github.com/waystage/waystage/protocol"
)

// Units: edits that the application made in one transaction and that shall travel, and be judged, together.
//
// Plain SQL of any language says so: while waystage_unit has its one row, the capture's triggers note the row's number
// beside every shadow row that they touch (_ws_u_t). A row may have several numbers, and so join their edits: capture
// keeps one image of a row, not one for each edit. A freeze takes all rows that hang together so or none of them, and
// forgets their numbers; an edit that was put back hangs together with nothing.

// Transaction runs fn in one local transaction and has all edits of synced tables that it makes travel together, in one
// session and under one number (protocol.Change.Unit): a subscription with `reject: transaction` takes them whole or
// not at all. Any error of fn rolls everything back. The edits of two transactions that touched the same unsent row
// travel together, too. fn must not begin a unit of its own.
//
// The same in plain SQL, from any program:
//
//	BEGIN;
//	INSERT INTO waystage_unit DEFAULT VALUES;
//	... edits ...
//	DELETE FROM waystage_unit;
//	COMMIT;
func (d *Device) Transaction(ctx context.Context, fn func(tx *sql.Tx) error) error {
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("device: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // without effect after Commit
	if _, err := tx.ExecContext(ctx, beginUnit); err != nil {
		return fmt.Errorf("device: %w", err)
	}
	if err := fn(tx); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, endUnit); err != nil {
		return fmt.Errorf("device: %w", err)
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("device: %w", err)
	}
	return nil
}

const (
	beginUnit = `INSERT INTO waystage_unit DEFAULT VALUES`
	endUnit   = `DELETE FROM waystage_unit`
)

func (t *table) units() string { return "_ws_u_" + t.Local }

// createUnits makes the side table of a table's unit numbers; they go with their shadow row.
func (t *txn) createUnits(tab *table) error {
	if err := t.exec("CREATE TABLE " + quote(tab.units()) + " (id INTEGER NOT NULL, unit INTEGER NOT NULL, PRIMARY KEY (id, unit)) WITHOUT ROWID"); err != nil {
		return err
	}
	return t.exec("CREATE TRIGGER " + quote("_ws_sd_"+tab.Local) + " AFTER DELETE ON " + quote(tab.shadow()) +
		" BEGIN DELETE FROM " + quote(tab.units()) + " WHERE id = OLD.id; END")
}

// place is a dirty row: its table's position in the set, and its id in the shadow table.
type place struct {
	ord int
	id  int64
}

func (p place) compare(q place) int { return cmp.Or(p.ord-q.ord, cmp.Compare(p.id, q.id)) }

// unit is a group of rows that go into one session or into none.
type unit struct {
	number int64   // one of its numbers in the file
	rows   []place // unsent, changed, in sending order
	held   bool    // another row of it is in a session without verdict (rule D2)
	why    string  // a row of it was rejected on the device: what was said of that
	taken  bool
}

// units groups the dirty rows of a set that have unit numbers. Rows that the user has put back become what the server
// has, and join nothing. Capture must be off.
func (t *txn) units(c *catalogue, s *set) (map[place]*unit, error) {
	type numbered struct {
		place
		held    bool
		numbers []int64
	}
	var rows []*numbered
	root := map[int64]int64{} // of each number, the one that stands for its group
	find := func(n int64) int64 {
		for root[n] != n {
			root[n] = root[root[n]]
			n = root[n]
		}
		return n
	}
	for ord, m := range s.Tables {
		if !c.uploads(s, m.Wire) {
			continue
		}
		var here []*numbered
		err := t.each("SELECT id, unit FROM "+quote(m.units())+" ORDER BY id, unit", nil, func(scan func(...any) error) error {
			var id, n int64
			if err := scan(&id, &n); err != nil {
				return err
			}
			if len(here) == 0 || here[len(here)-1].id != id {
				here = append(here, &numbered{place: place{ord, id}})
			}
			last := here[len(here)-1]
			last.numbers = append(last.numbers, n)
			return nil
		})
		if err != nil {
			return nil, err
		}
		for _, r := range here {
			d, err := t.dirty(m.table, r.id)
			if err != nil {
				return nil, err
			}
			if r.held = d.batch.Valid; !r.held {
				ch, _, err := t.derive(&m, d)
				if err != nil {
					return nil, err
				}
				if ch == nil {
					if err := t.restore(m.table, d); err != nil {
						return nil, err
					}
					continue
				}
			}
			for _, n := range r.numbers {
				if _, ok := root[n]; !ok {
					root[n] = n
				}
				root[find(n)] = find(r.numbers[0])
			}
			rows = append(rows, r)
		}
	}
	if len(rows) == 0 {
		return nil, nil
	}
	groups, out := map[int64]*unit{}, map[place]*unit{}
	for _, r := range rows { // in sending order
		n := find(r.numbers[0])
		if groups[n] == nil {
			groups[n] = &unit{number: n}
		}
		g := groups[n]
		if r.held {
			g.held = true
			continue
		}
		g.rows = append(g.rows, r.place)
		out[r.place] = g
	}
	return out, t.each(`SELECT unit, why FROM _ws_broken ORDER BY unit`, nil, func(scan func(...any) error) error {
		var n int64
		var why string
		if err := scan(&n, &why); err != nil {
			return err
		}
		if _, ok := root[n]; ok {
			groups[find(n)].why = why
		}
		return nil
	})
}

// breakUnit notes that a row of a unit was rejected on the device, so that the rest does not travel without it.
func (t *txn) breakUnit(tab *table, d *dirty, why string) error {
	return t.exec("INSERT INTO _ws_broken (unit, why) SELECT unit, ? FROM "+quote(tab.units())+" WHERE id = ? ON CONFLICT DO NOTHING", why, d.id)
}

// sweepBroken forgets rejected units of which nothing is left.
func (t *txn) sweepBroken(c *catalogue) error {
	var any bool
	if err := t.get(`SELECT EXISTS (SELECT 1 FROM _ws_broken)`, nil, &any); err != nil || !any {
		return err
	}
	q := `DELETE FROM _ws_broken WHERE 1`
	for _, tab := range c.order {
		q += " AND NOT EXISTS (SELECT 1 FROM " + quote(tab.units()) + " AS u WHERE u.unit = _ws_broken.unit)"
	}
	return t.exec(q)
}

// regroup gives the rows of a request that was never taken their units back. They are still marked with its number.
func (t *txn) regroup(c *catalogue, sess *session) error {
	req, err := sess.Payload.request()
	if err != nil {
		return err
	}
	numbers := map[int64]int64{}
	for i, ch := range req.Changes {
		tab := c.tables[ch.Table]
		if ch.Unit == 0 || tab == nil {
			continue
		}
		if numbers[ch.Unit] == 0 {
			n, err := t.tick()
			if err != nil {
				return err
			}
			numbers[ch.Unit] = -n // never one of waystage_unit's
		}
		id, err := t.marked(tab, sess.N, i)
		if err != nil {
			return err
		}
		if id == 0 {
			continue
		}
		if _, err := t.run("INSERT INTO "+quote(tab.units())+" (id, unit) VALUES (?, ?) ON CONFLICT DO NOTHING", id, numbers[ch.Unit]); err != nil {
			return err
		}
	}
	return nil
}

// indivisible tells that a request holds nothing that a smaller one could leave out: one record, or one unit.
func indivisible(req *protocol.Request) bool {
	return len(req.Changes) > 0 && !slices.ContainsFunc(req.Changes[1:], func(ch protocol.Change) bool {
		return ch.Unit == 0 || ch.Unit != req.Changes[0].Unit
	})
}
