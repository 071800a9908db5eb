package apply

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/schema"
)

// lookEvery is how often an idle up worker with parked changes looks whether their tables go on.
const lookEvery = time.Second

// parked are the changes that up has passed because their table is stopped, or because they depend on one that is. They
// stand in waystage.parked before the position moves past them.
type parked struct {
	waits bool            // there are some, or may come
	keys  map[string]bool // their keys, by authorKey
	taken map[int]bool    // tables of parked deletes and updates: they may take references away that deletes of parents wait for
	back  map[int64]bool  // taken up again by this session: the stream may bring them once more
}

// sameLayout ends the session when the tables have changed since it began.
func (s *upSession) sameLayout(ctx context.Context, q querier) error {
	now, err := schema.Layout(ctx, q)
	if err != nil {
		return fmt.Errorf("layout: %w", err)
	}
	if now != s.layout {
		return errLayout
	}
	return nil
}

// waits tells whether a change must wait for a stopped table, and notes it if so.
func (s *upSession) waits(c *upChange) bool {
	if s.parked.keys == nil {
		s.parked.keys, s.parked.taken, s.parked.back = map[string]bool{}, map[int]bool{}, map[int64]bool{}
	}
	p := &s.parked
	wait := c.t == nil || c.t.Stop != nil || len(c.key) != len(c.t.keys)
	if !wait && p.waits {
		wait = p.keys[authorKey(c.tbl, keyID(c.key))] || s.refersParked(c) || c.op == conflict.Delete && s.referredParked(c)
	}
	if wait {
		s.wait(c)
	}
	return wait
}

// wait notes that a change waits.
func (s *upSession) wait(c *upChange) {
	p := &s.parked
	p.waits = true
	p.keys[authorKey(c.tbl, keyID(c.key))] = true
	if c.op != conflict.Insert {
		p.taken[c.tbl] = true
	}
}

// waiting are those of a list that must wait; an atomic unit waits whole (rule R8). The list has no unit in part.
func (s *upSession) waiting(list []*upChange) map[*upChange]bool {
	out := map[*upChange]bool{}
	units := map[unitID]bool{}
	for before := -1; before != len(out); {
		before = len(out)
		for _, c := range list {
			u := unitID{c.session, c.unit}
			switch {
			case out[c]:
			case c.unit != 0 && units[u]:
				s.wait(c)
				out[c] = true
			case s.waits(c):
				units[u], out[c] = true, true
			}
		}
		if len(units) == 0 {
			break
		}
	}
	return out
}

// refersParked tells whether a change refers to a row of which a change is parked: without it the source would refuse.
func (s *upSession) refersParked(c *upChange) bool {
	for _, fk := range c.t.Foreign {
		parent := s.byName[fk.Table]
		if parent == nil {
			continue
		}
		key, touched, complete := c.refersTo(fk, parent)
		if touched && complete && s.parked.keys[authorKey(parent.ID, keyID(key))] {
			return true
		}
	}
	return false
}

// referredParked tells whether parked changes may take references to the deleted row away.
func (s *upSession) referredParked(c *upChange) bool {
	for _, child := range s.byName {
		for _, fk := range child.Foreign {
			if fk.Table == c.t.FullName() && s.parked.taken[child.ID] {
				return true
			}
		}
	}
	return false
}

// park takes out of a list what must wait, and notes it in the mirror.
func (s *upSession) park(ctx context.Context, list []*upChange) ([]*upChange, error) {
	var ids []int64
	var tbls []int
	rest := make([]*upChange, 0, len(list))
	waiting := s.waiting(list)
	for _, c := range list {
		if !waiting[c] {
			rest = append(rest, c)
			continue
		}
		ids, tbls = append(ids, c.id), append(tbls, c.tbl)
	}
	if len(ids) == 0 {
		return rest, nil
	}
	_, err := s.mirror.Exec(ctx, "INSERT INTO waystage.parked (change_id, tbl) SELECT * FROM unnest($1::bigint[], $2::int[]) ON CONFLICT DO NOTHING", ids, tbls)
	if err != nil {
		return nil, fmt.Errorf("park changes of stopped tables: %w", err)
	}
	return rest, nil
}

// unpark puts the parked changes that need not wait any more at the head of the queue. It is called when every change that is
// at the source has its verdict.
func (s *upSession) unpark(ctx context.Context) error {
	if _, err := s.mirror.Exec(ctx, `DELETE FROM waystage.parked AS p
		WHERE NOT EXISTS (SELECT 1 FROM waystage.change AS c WHERE c.id = p.change_id AND c.state = 'merged')`); err != nil {
		return fmt.Errorf("parked changes: %w", err)
	}
	for _, t := range s.byName {
		s.parked.waits = s.parked.waits || t.Stop != nil
	}
	rows, err := s.mirror.Query(ctx, `SELECT c.id, c.tbl, c.op, c.key, c.img::text, c.old::text, c.created_at, c.session_id, c.unit, c.stamp, c.policy::text
		FROM waystage.parked AS p JOIN waystage.change AS c ON c.id = p.change_id ORDER BY min(c.id) OVER (PARTITION BY c.stamp), c.id`)
	if err != nil {
		return fmt.Errorf("parked changes: %w", err)
	}
	var op string
	var img, by *string
	var last int64
	var c upChange
	var list []*upChange
	tx := 0
	_, err = pgx.ForEachRow(rows, []any{&c.id, &c.tbl, &op, &c.key, &img, &c.old, &c.created, &c.session, &c.unit, &c.stamp, &by}, func() error {
		if c.stamp != last {
			last = c.stamp
			tx-- // none of the numbers that transactions of the stream get
		}
		one := c
		one.t, one.op, one.tx, one.expect = s.tables[c.tbl], conflict.Op(op[0]), tx, c.old
		c.key, c.old = nil, nil
		var err error
		if one.policy, err = readPolicy(by); err != nil {
			return err
		}
		if img != nil {
			vals, err := jsonValues(*img)
			if err != nil {
				return err
			}
			one.img = vals
		}
		list = append(list, &one)
		return nil
	})
	if err != nil {
		return fmt.Errorf("parked changes: %w", err)
	}
	waiting := s.waiting(list)
	for _, c := range list {
		if !waiting[c] {
			s.queue = append(s.queue, c)
			s.parked.back[c.id] = true
		}
	}
	s.began = time.Now()
	return nil
}

// fit deals with changes that were made under another layout of their table. Columns that were renamed since have their new
// name in the mirror; values of columns that are gone have no place, and a change of nothing else is refused.
func (s *upSession) fit(ctx context.Context, list []*upChange) error {
	s.misfits = false
	byID := map[int64]*upChange{}
	var ids []int64
	for _, c := range list {
		for col := range c.img {
			if _, ok := c.t.at[col]; !ok {
				byID[c.id] = c
				ids = append(ids, c.id)
				break
			}
		}
	}
	if len(ids) == 0 {
		return nil
	}
	rows, err := s.mirror.Query(ctx, "SELECT id, img::text, old::text FROM waystage.change WHERE id = ANY ($1)", ids)
	if err != nil {
		return fmt.Errorf("changes of another layout: %w", err)
	}
	var id int64
	var img, old *string
	_, err = pgx.ForEachRow(rows, []any{&id, &img, &old}, func() error {
		c := byID[id]
		if img == nil {
			return nil
		}
		vals, err := jsonValues(*img)
		if err != nil {
			return err
		}
		var gone []string
		for col := range vals {
			if _, ok := c.t.at[col]; !ok {
				gone = append(gone, col)
				delete(vals, col)
			}
		}
		left := 0
		for col := range vals {
			if !c.t.IsKey(col) {
				left++
			}
		}
		if left == 0 && c.op == conflict.Update {
			slices.Sort(gone)
			c.misfit = fmt.Sprintf("table %s has no column %s any more", c.t.FullName(), strings.Join(gone, ", "))
			s.misfits = true
		}
		c.img = vals
		if old != nil {
			before := *old
			c.old, c.expect = &before, &before
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("changes of another layout: %w", err)
	}
	return nil
}
