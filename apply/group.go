package apply

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/schema"
)

// group is what is decided together: one change, an atomic unit (rule R8), or changes of one mirror transaction that need one
// another, such as rows that refer to each other in a ring.
type group []*upChange

// unitID names an atomic unit.
type unitID struct{ session, unit int64 }

func flat(list []group) []*upChange {
	var out []*upChange
	for _, g := range list {
		out = append(out, g...)
	}
	return out
}

// tables of a group, ascending.
func (g group) tables() []int {
	var ids []int
	for _, c := range g {
		ids = append(ids, c.t.ID)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// links of a change to others. Rows and unique values have names, see rowName.
type links struct {
	refers []reference
	makes  []string // the row that an insert makes, by all that foreign keys may call it
	ends   []string // the row that a delete ends, likewise
	leaves []string // rows that it referred to, and may not refer to any more
	takes  []string // unique values that it needs free
	frees  []string // unique values that it may free
}

// reference to a row by a foreign key that a change writes.
type reference struct {
	row string
	fk  *schema.ForeignKey
	key []string
}

// rowName names the row of a table that has these values in these columns; ok is false if one is null.
func rowName(table string, columns []string, value func(i int) *string) (name string, vals []string, ok bool) {
	var b strings.Builder
	b.WriteString(table)
	for i, c := range columns {
		v := value(i)
		if v == nil {
			return "", nil, false
		}
		vals = append(vals, *v)
		b.WriteString("\x00" + c + "\x00" + strconv.Itoa(len(*v)) + ":" + *v)
	}
	return b.String(), vals, true
}

// links are made once. Values are compared as text: those of one device have one form, and where forms differ the source's
// own constraints judge.
func (c *upChange) links() *links {
	if c.link != nil {
		return c.link
	}
	l := &links{}
	c.link = l
	t := c.t
	if len(t.Foreign)+len(t.referred)+len(t.Unique) == 0 {
		return l
	}
	var old map[string]*string
	if c.old != nil && c.op != conflict.Insert {
		old, _ = jsonValues(*c.old) // what cannot be read has no links; the change itself will say so
	}
	canonical := func(col string) *string {
		if i := slices.Index(t.Key, col); i >= 0 {
			return &c.key[i]
		}
		return c.img[col]
	}
	now := func(col string) *string {
		if v, ok := c.img[col]; ok {
			return v
		}
		return old[col]
	}
	was := func(col string) *string { return old[col] }
	touches := func(cols []string) bool {
		return c.op != conflict.Update || slices.ContainsFunc(cols, func(col string) bool { _, ok := c.img[col]; return ok })
	}
	add := func(to *[]string, table string, names, cols []string, value func(string) *string) {
		if id, _, ok := rowName(table, names, func(i int) *string { return value(cols[i]) }); ok && !slices.Contains(*to, id) {
			*to = append(*to, id)
		}
	}
	for i := range t.Foreign {
		fk := &t.Foreign[i]
		if len(fk.Columns) != len(fk.Refers) || !touches(fk.Columns) {
			continue
		}
		if c.op != conflict.Delete {
			if id, key, ok := rowName(fk.Table, fk.Refers, func(i int) *string { return now(fk.Columns[i]) }); ok {
				l.refers = append(l.refers, reference{id, fk, key})
			}
		}
		add(&l.leaves, fk.Table, fk.Refers, fk.Columns, was)
	}
	for _, cols := range t.referred {
		switch c.op {
		case conflict.Insert:
			add(&l.makes, t.FullName(), cols, cols, now)
			add(&l.makes, t.FullName(), cols, cols, canonical)
		case conflict.Delete:
			add(&l.ends, t.FullName(), cols, cols, was)
		}
	}
	for _, cols := range t.Unique {
		if !touches(cols) {
			continue
		}
		if c.op != conflict.Delete {
			add(&l.takes, t.FullName(), cols, cols, now)
		}
		add(&l.frees, t.FullName(), cols, cols, was)
	}
	return l
}

// groups cuts a list, which is in the order of mirror transactions, into what is decided together, in an order in which one
// can be written after the other.
func groups(list []*upChange) (out []group) {
	for len(list) > 0 {
		n := 1
		for n < len(list) && list[n].tx == list[0].tx {
			n++
		}
		out = append(out, groupsOf(list[:n])...)
		list = list[n:]
	}
	return out
}

// groupsOf does it for changes of one mirror transaction.
func groupsOf(list []*upChange) (out []group) {
	units, after := make([]int64, len(list)), make([][]int, len(list))
	numbers := map[unitID]int64{}
	last := map[string]int{} // the last change of a key
	makes, ends, frees := map[string]int{}, map[string]int{}, map[string]int{}
	for i, c := range list {
		if c.unit != 0 {
			u := unitID{c.session, c.unit}
			if numbers[u] == 0 {
				numbers[u] = int64(len(numbers) + 1)
			}
			units[i] = numbers[u]
		}
		key := authorKey(c.t.ID, keyID(c.key))
		if p, ok := last[key]; ok {
			after[i] = append(after[i], p)
		}
		last[key] = i
		l := c.links()
		for _, id := range l.makes {
			makes[id] = i
		}
		for _, id := range l.ends {
			ends[id] = i
		}
		for _, id := range l.frees {
			frees[id] = i
		}
	}
	needs := func(i int, of map[string]int, id string) {
		if p, ok := of[id]; ok && p != i {
			after[i] = append(after[i], p)
		}
	}
	for i, c := range list {
		l := c.links()
		for _, r := range l.refers {
			needs(i, makes, r.row)
		}
		for _, id := range l.takes {
			needs(i, frees, id)
		}
		for _, id := range l.leaves {
			if p, ok := ends[id]; ok && p != i {
				after[p] = append(after[p], i)
			}
		}
	}
	for _, part := range conflict.Order(units, after) {
		g := make(group, len(part))
		for j, i := range part {
			g[j] = list[i]
		}
		out = append(out, g)
	}
	return out
}

// levels says for inserts how many inserts of the list they come after by foreign keys, and for deletes the same the other way
// round: rows of one table may refer to each other. Those of a ring have one level, since only one statement can write them.
func levels(list []*upChange) []int {
	out := make([]int, len(list))
	makes, leaves := map[string]int{}, map[string][]int{}
	linked := false
	for i, c := range list {
		l := c.links()
		for _, id := range l.makes {
			makes[id], linked = i, true
		}
		if c.op == conflict.Delete {
			for _, id := range l.leaves {
				leaves[id], linked = append(leaves[id], i), true
			}
		}
	}
	if !linked {
		return out
	}
	after := make([][]int, len(list))
	for i, c := range list {
		l := c.links()
		for _, r := range l.refers {
			if p, ok := makes[r.row]; ok && p != i {
				after[i] = append(after[i], p)
			}
		}
		for _, id := range l.ends {
			after[i] = append(after[i], leaves[id]...)
		}
	}
	for _, part := range conflict.Order(make([]int64, len(list)), after) {
		level := 0
		for _, i := range part {
			for _, p := range after[i] {
				if !slices.Contains(part, p) {
					level = max(level, out[p]+1)
				}
			}
		}
		for _, i := range part {
			out[i] = level
		}
	}
	return out
}

// culprit is the change of a group that the source has refused. Where one statement wrote several, each is tried in a
// transaction that is rolled back; should none fail in the same way, it is the first of them.
func (s *upSession) culprit(ctx context.Context, g group, out outcome) (*upChange, error) {
	list := []*upChange(g)
	if out.at != nil {
		list = out.at.list
	}
	var refused *pgconn.PgError
	if !errors.As(out.refused, &refused) || len(list) == 1 {
		return list[0], nil
	}
	if of := slices.DeleteFunc(slices.Clone(list), func(c *upChange) bool { return c.t.Name != refused.TableName || c.t.Schema != refused.SchemaName }); len(of) > 0 {
		list = of // at the end only a deferred constraint refuses, and it names its table
	}
	if len(list) == 1 || out.at == nil {
		return list[0], nil
	}
	tx, err := s.source.Begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("look for a refused change: %w", err)
	}
	defer rollback(tx)
	for _, c := range list {
		cols, img, err := c.values()
		if err != nil {
			return nil, err
		}
		one := &stmt{t: c.t, f: out.at.f, cols: cols, list: []*upChange{c}, imgs: []image{img}}
		if _, err = tx.Exec(ctx, "SAVEPOINT ws_probe"); err == nil {
			_, err = tx.Exec(ctx, one.t.statement(one.f, one.cols), one.args()...)
		}
		if err == nil {
			continue
		}
		var again *pgconn.PgError
		if !errors.As(err, &again) {
			return nil, fmt.Errorf("look for a refused change: %w", err)
		}
		if again.Code == refused.Code && again.ConstraintName == refused.ConstraintName {
			return c, nil
		}
		if _, err := tx.Exec(ctx, "ROLLBACK TO SAVEPOINT ws_probe"); err != nil {
			return nil, fmt.Errorf("look for a refused change: %w", err)
		}
	}
	return list[0], nil
}

// refuse gives a change its verdict in the mirror, with all of its group that fall with it.
func (s *upSession) refuse(ctx context.Context, g group, c *upChange, why refusal) error {
	rest, err := s.refuseIn(ctx, g, c, why)
	if err != nil {
		return err
	}
	return s.decide(ctx, groups(rest), s.position)
}

// falls is who falls with a change of a group, and why, and who does not.
func (g group) falls(bad *upChange, why refusal) (down []verdictOf, rest []*upChange) {
	members := make([]conflict.Member, len(g))
	made := map[string]int{}
	for i, c := range g {
		for _, id := range c.links().makes {
			made[id] = i
		}
	}
	for i, c := range g {
		if c.unit != 0 {
			members[i].Unit = 1 // a group has no more than one, but for units that need one another: they are one
		}
		members[i].Failed = c == bad
		for _, r := range c.links().refers {
			if p, ok := made[r.row]; ok {
				members[i].Refers = append(members[i].Refers, p)
			}
		}
	}
	reasons := map[int]refusal{}
	fell := map[*upChange]bool{bad: true}
	down = append(down, verdictOf{bad, why})
	for _, f := range conflict.Fall(members) {
		with := g[f.With]
		cause := why
		if r, ok := reasons[f.With]; ok {
			cause = refusal{code: r.code}
		}
		r := refusal{code: string(f.Reason)}
		row := fmt.Sprintf("%s (%s)", with.t.FullName(), strings.Join(with.key, ", "))
		switch f.Reason {
		case conflict.Dependency:
			r.detail = "the row that the change refers to was refused: " + row + ": " + cause.code
		default:
			r.detail = "another change of the same transaction was refused: " + row + ": " + cause.code
		}
		if cause.detail != "" {
			r.detail += ": " + cause.detail
		}
		reasons[f.Member] = r
		fell[g[f.Member]] = true
		down = append(down, verdictOf{g[f.Member], r})
	}
	for _, c := range g {
		if !fell[c] {
			rest = append(rest, c)
		}
	}
	return down, rest
}
