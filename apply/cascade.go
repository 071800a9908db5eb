package apply

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/schema"
)

// cascade is a foreign key of the source by which a delete of a row deletes others.
type cascade struct {
	child   *target
	columns []string // of the child
	refers  []string // of the table that is deleted from
}

// readCascades learns from the source's catalog which deletes take rows of other synced tables along. SET NULL and SET DEFAULT are
// not among them: the row that somebody else added stays, as its owner wants it without its parent, and comes back by down.
func readCascades(ctx context.Context, conn *pgx.Conn, targets map[int]*target) error {
	byName := map[string]*target{}
	for _, t := range targets {
		t.cascades = nil
		byName[t.FullName()] = t
	}
	rows, err := conn.Query(ctx, `SELECT pn.nspname || '.' || p.relname, cn.nspname || '.' || c.relname,
			ARRAY(SELECT a.attname::text FROM unnest(f.conkey) WITH ORDINALITY AS k(n, i) JOIN pg_attribute AS a ON a.attrelid = f.conrelid AND a.attnum = k.n ORDER BY k.i),
			ARRAY(SELECT a.attname::text FROM unnest(f.confkey) WITH ORDINALITY AS k(n, i) JOIN pg_attribute AS a ON a.attrelid = f.confrelid AND a.attnum = k.n ORDER BY k.i)
		FROM pg_constraint AS f JOIN pg_class AS p ON p.oid = f.confrelid JOIN pg_namespace AS pn ON pn.oid = p.relnamespace
		JOIN pg_class AS c ON c.oid = f.conrelid JOIN pg_namespace AS cn ON cn.oid = c.relnamespace
		WHERE f.contype = 'f' AND f.confdeltype = 'c' AND f.conparentid = 0 ORDER BY f.oid`)
	if err != nil {
		return fmt.Errorf("read the source's cascades: %w", err)
	}
	var parent, child string
	var k cascade
	_, err = pgx.ForEachRow(rows, []any{&parent, &child, &k.columns, &k.refers}, func() error {
		one := k
		k.columns, k.refers = nil, nil
		p := byName[parent]
		if one.child = byName[child]; p == nil || one.child == nil || p.Stop != nil || one.child.Stop != nil {
			return nil
		}
		p.cascades = append(p.cascades, one)
		return nil
	})
	if err != nil {
		return fmt.Errorf("read the source's cascades: %w", err)
	}
	return nil
}

// victim is a row that would go with a deleted one.
type victim struct {
	of  *upChange
	t   *target
	key []string
}

// victims locks, inside the open source transaction, the rows that a statement is about to delete, so that nobody can add a
// child, and finds all rows that go with them.
func (s *upSession) victims(ctx context.Context, st *stmt) (out []victim, err error) {
	// Keys are texts here, in the form that the mirror has.
	if _, err := s.source.Exec(ctx, "SET LOCAL datestyle = 'ISO'; SET LOCAL timezone = 'UTC'"); err != nil {
		return nil, err
	}
	level := make([]victim, len(st.list))
	for i, c := range st.list {
		level[i] = victim{c, st.t, c.key}
	}
	seen := map[string]bool{}
	for len(level) > 0 {
		byTable := map[*target][]victim{}
		var order []*target
		for _, v := range level {
			if byTable[v.t] == nil {
				order = append(order, v.t)
			}
			byTable[v.t] = append(byTable[v.t], v)
		}
		level = nil
		for _, t := range order {
			if len(t.cascades) == 0 {
				continue
			}
			list := byTable[t]
			keys := t.keyArrays(len(list), func(r int) []string { return list[r].key })
			if _, err := s.source.Exec(ctx, fmt.Sprintf("SELECT FROM %s JOIN %s AS m ON %s FOR UPDATE OF m", t.unnest(t.keys, 1), t.Ident(), t.match()), keys...); err != nil {
				return nil, err
			}
			for _, k := range t.cascades {
				on := make([]string, len(k.columns))
				for i := range k.columns {
					on[i] = fmt.Sprintf("x.%s = m.%s", schema.Quote(k.columns[i]), schema.Quote(k.refers[i]))
				}
				rows, err := s.source.Query(ctx, fmt.Sprintf("SELECT u.i, ARRAY[%s]::text[] FROM %s JOIN %s AS m ON %s JOIN %s AS x ON %s",
					k.child.list(k.child.keys, func(i int) string {
						c := k.child.Columns[i]
						c.MirrorType = c.Type
						return c.Text("x." + k.child.quoted(i))
					}), t.unnest(t.keys, 1, ordinality), t.Ident(), t.match(), k.child.Ident(), strings.Join(on, " AND ")), keys...)
				if err != nil {
					return nil, err
				}
				var i int64
				var key []string
				_, err = pgx.ForEachRow(rows, []any{&i, &key}, func() error {
					v := victim{list[i-1].of, k.child, key}
					key = nil
					if id := authorKey(v.t.ID, keyID(v.key)); !seen[id] {
						seen[id] = true
						level = append(level, v)
					}
					return nil
				})
				if err != nil {
					return nil, err
				}
			}
		}
		out = append(out, level...)
	}
	_, err = s.source.Exec(ctx, "SET LOCAL datestyle TO DEFAULT; SET LOCAL timezone TO DEFAULT")
	return out, err
}

// toll is what a cascade's victims say about the deletes that would take them along.
type toll struct {
	refused map[*upChange]refusal // somebody else wrote what the device cannot have seen
	unclear map[*upChange]refusal // so it may be: down has not passed this moment yet. What it is to be refused for, should that not end
}

// judge decides what becomes of victims (conflict.Cascade). Those that are not the deletes' end are locked then. done are the statements
// that this transaction has carried out: what they compared needs no other look.
func (s *upSession) judge(ctx context.Context, list []victim, done []*stmt) (out toll, err error) {
	out = toll{map[*upChange]refusal{}, map[*upChange]refusal{}}
	compared := map[string]bool{}
	for _, st := range done {
		for _, c := range st.list {
			compared[authorKey(c.t.ID, keyID(c.key))] = true
		}
	}
	for len(list) > 0 {
		t := list[0].t
		var of []victim
		list = slices.DeleteFunc(list, func(v victim) bool {
			if v.t == t {
				of = append(of, v)
			}
			return v.t == t
		})
		if err := s.judgeOf(ctx, t, of, compared, out); err != nil {
			return out, fmt.Errorf("look at rows of %s that a cascade takes: %w", t.FullName(), err)
		}
	}
	return out, nil
}

// judgeOf does it for the rows of one table.
func (s *upSession) judgeOf(ctx context.Context, t *target, of []victim, compared map[string]bool, out toll) error {
	facts, images := make([]conflict.Victim, len(of)), make([]*string, len(of))
	ids, stamps := make([]int64, len(of)), make([]int64, len(of))
	for i, v := range of {
		ids[i], stamps[i] = v.of.id, v.of.stamp
	}
	rows, err := s.mirror.Query(ctx, t.victims, append(t.keyArrays(len(of), func(r int) []string { return of[r].key }), ids, stamps, t.ID)...)
	if err != nil {
		return err
	}
	var i int64
	var v conflict.Victim
	var writer string
	var img *string
	if _, err := pgx.ForEachRow(rows, []any{&i, &writer, &v.Known, &img}, func() error {
		v.Writer = writerOf[writer]
		facts[i-1], images[i-1] = v, img
		return nil
	}); err != nil {
		return err
	}
	var look []int
	for i, v := range of {
		facts[i].Same = compared[authorKey(t.ID, keyID(v.key))]
		if conflict.Cascade(facts[i]) == conflict.Unclear {
			look = append(look, i)
		}
	}
	if len(look) > 0 {
		expect := make([]*string, len(look))
		for r, i := range look {
			expect[r] = images[i]
		}
		rows, err := s.source.Query(ctx, t.statement(formLock, nil), append(t.keyArrays(len(look), func(r int) []string { return of[look[r]].key }), expect)...)
		if err != nil {
			return sourceFault(t.table, err)
		}
		if _, err := pgx.ForEachRow(rows, []any{&i}, func() error { facts[look[i-1]].Same = true; return nil }); err != nil {
			return sourceFault(t.table, err)
		}
	}
	for i, v := range of {
		why := refusal{code: refusedConflict, detail: fmt.Sprintf("deleting the row would delete a row of %s (%s) too, which was added or changed at the source since",
			t.FullName(), strings.Join(v.key, ", "))}
		switch conflict.Cascade(facts[i]) {
		case conflict.Stranger:
			out.refused[v.of] = why
		case conflict.Unclear:
			out.unclear[v.of] = why
		}
	}
	return nil
}
