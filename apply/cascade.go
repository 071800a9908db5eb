package apply

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

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

// unseen finds deletes that would take a row along which was added or changed at the source since they were merged: a row that the
// mirror does not have, or that down has written after the merge. What a device's pending change is of is known.
func (s *upSession) unseen(ctx context.Context, list []victim) (map[*upChange]refusal, error) {
	out := map[*upChange]refusal{}
	for len(list) > 0 {
		t := list[0].t
		var of []victim
		list = slices.DeleteFunc(list, func(v victim) bool {
			if v.t == t {
				of = append(of, v)
			}
			return v.t == t
		})
		stamps := make([]int64, len(of))
		for i, v := range of {
			stamps[i] = v.of.stamp
		}
		args := append(t.keyArrays(len(of), func(r int) []string { return of[r].key }), stamps, t.ID)
		rows, err := s.mirror.Query(ctx, fmt.Sprintf(`SELECT u.i FROM %s LEFT JOIN %s AS m ON %s
			WHERE NOT coalesce(m.%s <= u.stamp OR m.%s IS NOT NULL, false)
				AND NOT EXISTS (SELECT FROM waystage.change AS c WHERE c.state = 'merged' AND c.tbl = $%d AND c.key = %s)`,
			t.unnest(t.keys, 1, "stamp bigint", ordinality), t.Ident(), t.table.match(), schema.ColVersion, schema.ColWriter, len(t.keys)+2, t.keyArray("u")), args...)
		if err != nil {
			return nil, fmt.Errorf("look for rows that a cascade takes: %w", err)
		}
		var i int64
		_, err = pgx.ForEachRow(rows, []any{&i}, func() error {
			v := of[i-1]
			out[v.of] = refusal{code: refusedConflict, detail: fmt.Sprintf("deleting the row would delete a row of %s (%s) too, which was added or changed at the source since",
				t.FullName(), strings.Join(v.key, ", "))}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("look for rows that a cascade takes: %w", err)
		}
	}
	return out, nil
}
