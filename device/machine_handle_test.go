package device

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/protocol"
)

// What the machine knows of units, on its own: which of the user's transactions touched a row since it was last frozen.
// Rows that hang together so must be in one session under one number, or in none.

// grouping is the machine's own account of one file's units.
type grouping struct {
	of     map[string]map[int]bool    // by "table key": transactions since the last freeze
	seen   map[string]bool            // sessions, by token and nonce, that were looked at
	sent   map[int64]map[string]int64 // by the freeze's number in the file: "table key" -> unit
	before map[string]map[int]bool    // of the open session's rows, in case it is thawed
}

func newGrouping() *grouping {
	return &grouping{of: map[string]map[int]bool{}, seen: map[string]bool{}, sent: map[int64]map[string]int64{}, before: map[string]map[int]bool{}}
}

func (g *grouping) clone() *grouping {
	c := newGrouping()
	for k, v := range g.of {
		c.of[k] = maps.Clone(v)
	}
	for k, v := range g.before {
		c.before[k] = maps.Clone(v)
	}
	c.seen, c.sent = maps.Clone(g.seen), maps.Clone(g.sent)
	return c
}

func (g *grouping) add(row string, transaction int) {
	if g.of[row] == nil {
		g.of[row] = map[int]bool{}
	}
	g.of[row][transaction] = true
}

// thawed: the server took nothing of the open session.
func (g *grouping) thawed() {
	for row, l := range g.before {
		for n := range l {
			g.add(row, n)
		}
	}
	g.before = map[string]map[int]bool{}
}

// dirtyRows lists the rows that the file's shadow tables hold, with whether a session carries them.
func (m *machine) dirtyRows(tx *txn, c *catalogue) map[string]bool {
	out := map[string]bool{}
	for _, tab := range c.order {
		ids, err := tx.ids(tab)
		if err != nil {
			m.Fatalf("%v", err)
		}
		for _, id := range ids {
			d, err := tx.dirty(tab, id)
			if err != nil {
				m.Fatalf("%v", err)
			}
			out[tab.Wire+" "+keyOf(tab.toWire(tab.key, d.key))] = d.batch.Valid
		}
	}
	return out
}

// frozen looks at the open session, once.
func (m *machine) frozen(a *actor) {
	var problem string
	err := a.d.read(context.Background(), func(tx *txn) error {
		s, err := tx.openSession()
		if err != nil || s == nil || a.groups.seen[s.token()+s.Nonce] {
			return err
		}
		a.groups.seen[s.token()+s.Nonce] = true
		var seq int64
		if err := tx.get(`SELECT seq FROM _ws_outbox WHERE incarnation = ? AND n = ?`, []any{s.Incarnation, s.N}, &seq); err != nil {
			return err
		}
		req, err := s.Payload.request()
		if err != nil {
			return err
		}
		c, err := tx.load()
		if err != nil {
			return err
		}
		problem = a.groups.judge(seq, req, m.dirtyRows(tx, c))
		return nil
	})
	if err != nil {
		m.Fatalf("%v", err)
	}
	if problem != "" {
		m.Fatalf("%s: %s", a.name, problem)
	}
}

// judge compares a frozen request with the account; dirty are the rows that have edits, with whether a session carries them.
func (g *grouping) judge(seq int64, req *protocol.Request, dirty map[string]bool) string {
	units := map[string]int64{}
	for _, ch := range req.Changes {
		units[ch.Table+" "+keyOf(ch.Key)] = ch.Unit
	}
	if len(units) == 0 {
		return ""
	}
	if first := g.sent[seq]; first != nil { // sent again after a fork
		for row, u := range units {
			if first[row] != u {
				return fmt.Sprintf("%s was frozen in unit %d and is sent again in %d", row, first[row], u)
			}
		}
		g.before = map[string]map[int]bool{}
		return ""
	}
	g.sent[seq] = units
	// Which rows hang together?
	group := map[string]int{} // row -> group
	var rows []string
	for row := range g.of {
		if _, ok := dirty[row]; ok && tableOf(row) == req.Changes[0].Table {
			rows = append(rows, row)
		}
	}
	slices.Sort(rows)
	for i, row := range rows {
		group[row] = i
	}
	for changed := true; changed; {
		changed = false
		for _, x := range rows {
			for _, y := range rows {
				if group[x] < group[y] && shares(g.of[x], g.of[y]) {
					group[y], changed = group[x], true
				}
			}
		}
	}
	for _, x := range rows {
		for _, y := range rows {
			if group[x] != group[y] {
				continue
			}
			ux, inx := units[x]
			uy, iny := units[y]
			if inx != iny {
				return fmt.Sprintf("%s and %s hang together, and one of them is in session %d without the other", x, y, req.N)
			}
			if inx && (ux == 0 || ux != uy) {
				return fmt.Sprintf("%s and %s hang together, and have units %d and %d", x, y, ux, uy)
			}
		}
	}
	g.before = map[string]map[int]bool{}
	for row, u := range units {
		if u == 0 && len(g.of[row]) > 0 {
			return fmt.Sprintf("%s was edited in a transaction and has no unit", row)
		}
		g.before[row] = g.of[row]
		delete(g.of, row)
	}
	return ""
}

func tableOf(row string) string {
	for i := range row {
		if row[i] == ' ' {
			return row[:i]
		}
	}
	return row
}

func shares(a, b map[int]bool) bool {
	for n := range a {
		if b[n] {
			return true
		}
	}
	return false
}

// settleGroups forgets rows that have no edit any more.
func (m *machine) settleGroups(a *actor) {
	err := a.d.read(context.Background(), func(tx *txn) error {
		c, err := tx.load()
		if err != nil {
			return err
		}
		dirty := m.dirtyRows(tx, c)
		for row := range a.groups.of {
			if _, ok := dirty[row]; !ok {
				delete(a.groups.of, row)
			}
		}
		return nil
	})
	if err != nil {
		m.Fatalf("%v", err)
	}
}

// state is everything that an action on a rejected record may touch.
func (m *machine) state(a *actor) (rejects []Reject, pending []Edit, rows map[string]map[string]image) {
	rejects, err := a.d.Rejects(context.Background())
	if err != nil {
		m.Fatalf("%v", err)
	}
	if pending, err = a.d.Pending(context.Background()); err != nil {
		m.Fatalf("%v", err)
	}
	return rejects, pending, map[string]map[string]image{"public.item": m.view(a, "public.item"), "public.note": m.view(a, "public.note")}
}

// handle deals with a rejected record, and checks the outcome against a second account of what it should be.
func (m *machine) handle(a *actor) {
	t, ctx := m.t, context.Background()
	rejects, pending, rows := m.state(a)
	if len(rejects) == 0 {
		return
	}
	r := rapid.SampledFrom(rejects).Draw(t, "entry")
	what := rapid.SampledFrom([]string{RejectResubmitted, RejectResubmitted, RejectRestored, RejectDiscarded}).Draw(t, "action")
	entries := []int64{r.Entry}
	if rapid.IntRange(0, 2).Draw(t, "whole") == 0 {
		now, err := a.d.Rejected(ctx, r.Entry)
		if err != nil {
			m.Fatalf("%v", err)
		}
		entries = append(entries, now.Partner...)
	}
	var set map[string]*string
	if what == RejectResubmitted && r.Op != protocol.Delete && len(entries) == 1 && r.Table == "public.item" && rapid.IntRange(0, 2).Draw(t, "set") == 0 {
		m.edits++
		set = map[string]*string{"val": ptr(fmt.Sprintf("%s%d", a.name, m.edits))}
	}
	act := func() ([]Handled, error) {
		switch what {
		case RejectResubmitted:
			return a.d.Resubmit(ctx, set, entries...)
		case RejectRestored:
			return a.d.Restore(ctx, entries...)
		}
		return a.d.Discard(ctx, entries...)
	}
	done, err := act()
	m.say("%s: %s %v set=%v: %+v %v", a.name, what, entries, show(set), done, err)
	after, nowPending, nowRows := m.state(a)
	if err != nil {
		known := false
		for _, e := range []error{ErrHandled, ErrRowGone, ErrRowExists, ErrRowEdited, ErrNoTable} {
			known = known || errors.Is(err, e)
		}
		if !known {
			m.Fatalf("%s %v: %v", what, entries, err)
		}
		if everything(after, nowPending, nowRows) != everything(rejects, pending, rows) {
			m.Fatalf("%s %v was refused with %v, and has changed something", what, entries, err)
		}
		return
	}
	edited := map[string]bool{} // rows that the action may have changed
	byEntry := map[int64]Reject{}
	for _, x := range after {
		byEntry[x.Entry] = x
	}
	for _, h := range done {
		x := byEntry[h.Entry]
		if x.Status != what {
			m.Fatalf("entry %d is %s after %s", h.Entry, x.Status, what)
		}
		row := x.Table + " " + keyOf(x.Key)
		edited[row] = edited[row] || h.Edited
		if h.Edited && x.Unit != 0 {
			m.transactions++
			for _, y := range done { // those of one transaction make one again
				if p := byEntry[y.Entry]; y.Edited && p.Unit == x.Unit && p.Session == x.Session {
					a.groups.add(p.Table+" "+keyOf(p.Key), m.transactions)
				}
			}
		}
		// Several entries of one row act in their order: the last one says what it is.
		last := true
		for _, y := range done {
			p := byEntry[y.Entry]
			last = last && !(y.Entry > h.Entry && p.Table == x.Table && keyOf(p.Key) == keyOf(x.Key))
		}
		was := slices.IndexFunc(rejects, func(p Reject) bool { return p.Entry == h.Entry })
		if what == RejectDiscarded || !last || rejects[was].Status == what {
			if h.Edited && (what == RejectDiscarded || rejects[was].Status == what) {
				m.Fatalf("entry %d: an edit was made twice, or by discarding", h.Entry)
			}
			continue
		}
		m.expect(x, what, set, rows[x.Table][keyOf(x.Key)], nowRows[x.Table][keyOf(x.Key)], len(done) == 1)
	}
	for name := range rows {
		for k := range union(rows[name], nowRows[name]) {
			if changed := !imgEqual(rows[name][k], nowRows[name][k]); changed && !edited[name+" "+k] {
				m.Fatalf("%s %v changed row %s %s", what, entries, name, k)
			}
		}
		m.remember(a, name, rows[name])
	}
	// Once more: nothing happens.
	if again, err := act(); err != nil || slices.ContainsFunc(again, func(h Handled) bool { return h.Edited }) {
		m.Fatalf("%s %v again: %+v %v", what, entries, again, err)
	}
	if l, p, r := m.state(a); everything(l, p, r) != everything(after, nowPending, nowRows) {
		m.Fatalf("%s %v again has changed something", what, entries)
	}
}

// expect says what a row must be after an action.
func (m *machine) expect(r Reject, what string, set map[string]*string, was, is image, alone bool) {
	if r.Op == protocol.Delete {
		if is != nil {
			m.Fatalf("entry %d: %s of a delete left %s", r.Entry, what, show(is))
		}
		return
	}
	for c, v := range r.Sent {
		b, based := r.Base[c]
		want := v
		if what == RejectResubmitted && r.Op == protocol.Update && based && sameWire(b, v) {
			if !alone {
				continue
			}
			want = was[c]
		}
		if s, ok := set[c]; ok {
			want = s
		}
		if !sameWire(is[c], want) {
			m.Fatalf("entry %d: %s made %s of %s, column %s is not right; sent %s on %s", r.Entry, what, show(is), show(was), c, show(r.Sent), show(r.Base))
		}
	}
}

// everything makes states comparable.
func everything(rejects []Reject, pending []Edit, rows map[string]map[string]image) string {
	b, err := json.Marshal([]any{rejects, pending, rows})
	if err != nil {
		return err.Error()
	}
	return string(b)
}
