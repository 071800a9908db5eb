package apply

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/conflict"
)

// upChange is a device's change on its way to the source.
type upChange struct {
	id      int64
	tbl     int
	t       *target // nil: not synced any more
	misfit  string  // why the change has no place in its table as it is now
	op      conflict.Op
	key     []string
	img     map[string]*string
	old     *string // image of the mirror row that it was made on, as JSON; nil: absent
	created time.Time
	tx      int   // the mirror transaction that it came with
	stamp   int64 // and its id
	session int64 // the device's session
	unit    int64 // atomic unit within the session (rule R8); 0: none
	policy  policy

	expect  *string // what it expects at the source: old, until it is rebased
	rebases int
	link    *links // see links()
}

// ledger reads inserts of waystage.change from change data.
type ledger struct {
	at    map[string]int
	types *pgtype.Map
}

func newLedger(desc *change.Relation) *ledger {
	l := &ledger{at: map[string]int{}, types: pgtype.NewMap()}
	for i, c := range desc.Columns {
		l.at[c.Name] = i
	}
	return l
}

// change reads one; nil: the merge refused it, it is none of up's business.
func (l *ledger) change(vals []change.Value, targets map[int]*target) (*upChange, error) {
	text := func(name string) *string {
		i, ok := l.at[name]
		if !ok || i >= len(vals) || vals[i].State != change.Text {
			return nil
		}
		return &vals[i].Text
	}
	must := func(name string) string {
		if p := text(name); p != nil {
			return *p
		}
		return ""
	}
	if must("state") != "merged" {
		return nil, nil
	}
	c := &upChange{}
	var err error
	if c.id, err = strconv.ParseInt(must("id"), 10, 64); err != nil {
		return nil, fmt.Errorf("%w: ledger id: %v", change.ErrNotChangeData, err)
	}
	tbl, err := strconv.Atoi(must("tbl"))
	if err != nil {
		return nil, fmt.Errorf("%w: table of change %d: %v", change.ErrNotChangeData, c.id, err)
	}
	c.tbl, c.t = tbl, targets[tbl]
	if op := must("op"); len(op) == 1 {
		c.op = conflict.Op(op[0])
	}
	if c.op != conflict.Insert && c.op != conflict.Update && c.op != conflict.Delete {
		return nil, fmt.Errorf("%w: operation %q of change %d", change.ErrNotChangeData, must("op"), c.id)
	}
	if err := l.types.Scan(pgtype.TextArrayOID, pgtype.TextFormatCode, []byte(must("key")), &c.key); err != nil {
		return nil, fmt.Errorf("%w: key %q of change %d", change.ErrNotChangeData, must("key"), c.id)
	}
	for name, to := range map[string]*int64{"session_id": &c.session, "unit": &c.unit, "stamp": &c.stamp} {
		if *to, err = strconv.ParseInt(must(name), 10, 64); err != nil {
			return nil, fmt.Errorf("%w: %s of change %d: %v", change.ErrNotChangeData, name, c.id, err)
		}
	}
	if img := text("img"); img != nil {
		if c.img, err = jsonValues(*img); err != nil {
			return nil, fmt.Errorf("change %d: %w", c.id, err)
		}
	}
	if old := text("old"); old != nil {
		s := *old
		c.old = &s
	}
	if c.policy, err = readPolicy(text("policy")); err != nil {
		return nil, fmt.Errorf("%w: policy of change %d: %v", change.ErrNotChangeData, c.id, err)
	}
	if c.created, err = time.Parse("2006-01-02 15:04:05.999999999-07", must("created_at")); err != nil {
		return nil, fmt.Errorf("%w: time of change %d: %v", change.ErrNotChangeData, c.id, err)
	}
	c.expect = c.old
	return c, nil
}

// form is what the change has to do, given what it expects.
func (c *upChange) form() form {
	switch {
	case c.op == conflict.Delete && c.expect == nil:
		return formGone
	case c.op == conflict.Delete:
		return formDelete
	case c.expect == nil:
		return formInsert
	default:
		return formUpdate
	}
}

// values are the columns to write and the image that has them.
func (c *upChange) values() (cols []int, g image, err error) {
	f := c.form()
	if f == formDelete || f == formGone {
		return nil, nil, nil
	}
	g = make(image, len(c.t.Columns))
	has := make([]bool, len(c.t.Columns))
	if f == formInsert {
		if c.op == conflict.Update && c.old != nil {
			// The row that was updated is gone by our own doing (a cascade): write it whole, the source judges.
			old, err := c.t.image(c.old)
			if err != nil {
				return nil, nil, err
			}
			copy(g, old)
			for i := range has {
				has[i] = true
			}
		}
		for j, i := range c.t.keys {
			g[i], has[i] = &c.key[j], true
		}
	}
	for i, col := range c.t.Columns {
		v, ok := c.img[col.Name]
		if !ok || (slices.Contains(c.t.keys, i) && f == formUpdate) {
			continue
		}
		g[i], has[i] = v, true
	}
	for i, ok := range has {
		if ok && f == formInsert && g[i] == nil && c.t.filled[i] {
			continue
		}
		if ok {
			cols = append(cols, i)
		}
	}
	return cols, g, nil
}

// stmt is one set statement: changes of one table and form that write the same columns.
type stmt struct {
	t    *target
	f    form
	cols []int
	list []*upChange
	imgs []image
	at   place
}

// place of a change among those of its mirror transaction. A key's k-th change is of round k; within a round rows are
// written before they are deleted, what others refer to is written before them and deleted after them.
type place struct{ round, order, level, rank int }

func (p place) compare(q place) int {
	return cmp.Or(cmp.Compare(p.round, q.round), cmp.Compare(p.order, q.order), cmp.Compare(p.level, q.level), cmp.Compare(p.rank, q.rank))
}

// places of the changes of a list.
func places(list []*upChange) []place {
	rounds := map[string]int{}
	level := levels(list)
	out := make([]place, len(list))
	for i, c := range list {
		k := authorKey(c.t.ID, keyID(c.key))
		p := place{round: rounds[k], level: level[i], rank: c.t.Rank}
		rounds[k]++
		switch c.form() {
		case formInsert:
		case formUpdate:
			p.order = 1
		default:
			p.order, p.rank = 2, -p.rank
		}
		out[i] = p
	}
	return out
}

// inOrder sorts the changes of one mirror transaction so that they can be written one after the other: the ledger has
// them table by table.
func inOrder(list []*upChange) {
	at := map[*upChange]place{}
	for i, p := range places(list) {
		at[list[i]] = p
	}
	slices.SortStableFunc(list, func(a, b *upChange) int { return at[a].compare(at[b]) })
}

// plan sorts changes into statements. What is written alone is compared first, and then written without comparing.
func plan(list []*upChange, how manner) ([]*stmt, error) {
	byID := map[string]*stmt{}
	var first, out []*stmt
	add := func(to *[]*stmt, c *upChange, f form, cols []int, g image, at place) {
		id := fmt.Sprint(at, f, c.t.ID, cols)
		st := byID[id]
		if st == nil || len(st.list) >= maxStmt {
			st = &stmt{t: c.t, f: f, cols: cols, at: at}
			byID[id] = st
			*to = append(*to, st)
		}
		st.list, st.imgs = append(st.list, c), append(st.imgs, g)
	}
	at := places(list)
	for i, c := range list {
		cols, g, err := c.values()
		if err != nil {
			return nil, err
		}
		f := c.form()
		if how != together && at[i].round == 0 {
			look := formLock
			if c.expect == nil {
				look = formGone
			}
			add(&first, c, look, nil, nil, place{round: -1})
		}
		if how != together && f == formUpdate {
			f = formRewrite
		}
		if how != together && f == formDelete {
			// That the row is gone by then is the doing of a cascade of this transaction. But it must be gone after it.
			add(&out, c, formRemove, nil, nil, at[i])
			f = formGone
		}
		add(&out, c, f, cols, g, at[i])
	}
	slices.SortStableFunc(out, func(a, b *stmt) int { return a.at.compare(b.at) })
	return append(first, out...), nil
}

// maxStmt bounds a statement: up to this size the source's planner goes by the index without being told to.
const maxStmt = 500

func (st *stmt) args() []any {
	n := len(st.list)
	key := func(r int) []string { return st.list[r].key }
	if st.f == formInsert {
		return columnArrays(st.cols, n, func(r int) image { return st.imgs[r] })
	}
	args := st.t.keyArrays(n, key)
	if st.f == formUpdate || st.f == formRewrite {
		args = append(args, columnArrays(st.cols, n, func(r int) image { return st.imgs[r] })...)
	}
	if st.f == formUpdate || st.f == formDelete || st.f == formLock {
		expect := make([]*string, n)
		for r, c := range st.list {
			expect[r] = c.expect
		}
		args = append(args, expect)
	}
	return args
}
