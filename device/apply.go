package device

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/waystage/waystage/internal/sabotage"
	"github.com/waystage/waystage/protocol"
)

// errNotOurs says that a reply does not belong to the open session (rule D7): it is discarded.
var errNotOurs = errors.New("the reply is not for the open session")

// errOtherEpoch says that the reply comes from a mirror that was built after the one that the file follows.
var errOtherEpoch = errors.New("the reply is from another mirror")

// ours checks rule D7 for one page. A refusal of bytes that the server could not read has no nonce; that the device has
// forked is told with one only.
func (s *session) ours(p *protocol.Page) error {
	switch {
	case p.Incarnation != s.Incarnation || p.N != s.N:
		return errNotOurs
	case p.Error != nil && p.Nonce == "" && p.Error.Code != protocol.CodeForked && p.Error.Code != protocol.CodeEpoch:
		return nil
	case p.Nonce != s.Nonce, p.Error == nil && p.Page == 1 && p.CursorFrom != s.CursorFrom:
		return errNotOurs
	}
	return nil
}

// stored is a page in the inbox.
type stored struct {
	page     int
	verdicts bool
	last     bool
}

// apply takes a whole reply over in the caller's transaction: verdicts, rows, log, cursor and the session's end in one
// commit (rule D8).
func (d *Device) apply(t *txn, sess *session, rep *SetReport, progress func(done, total int64)) error {
	open, err := t.openSession()
	if err != nil {
		return err
	}
	if open == nil || open.token() != sess.token() || open.Nonce != sess.Nonce {
		return errNotOurs // another process has applied it meanwhile
	}
	if err := t.capture(false); err != nil {
		return err
	}
	pages, err := t.pages()
	if err != nil {
		return err
	}
	var cached *protocol.Page
	read := func(n int) (*protocol.Page, error) {
		if cached != nil && cached.Page == n {
			return cached, nil
		}
		p, err := d.page(t, n)
		cached = p
		return p, err
	}
	first, err := read(1)
	if err != nil {
		return err
	}
	st, err := t.state()
	if err != nil {
		return err
	}
	if st.Epoch != "" && first.Epoch != "" && first.Epoch != st.Epoch {
		return errOtherEpoch
	}
	total, again := first.Rows, false // again: only a refresh can fill what came to a table that has rows
	if first.Schema != nil {
		if again, err = t.define(sess.Set, first.Schema); err != nil {
			return err
		}
	}
	if first.Refresh {
		again = false
	}
	c, err := t.load()
	if err != nil {
		return err
	}
	s := c.set(sess.Set)
	if s == nil || s.Cursor != sess.CursorFrom {
		return errNotOurs
	}
	j := &judge{t: t, c: c, set: s, rep: rep, frozen: map[string]*protocol.Request{}}
	for _, p := range pages {
		if !p.verdicts {
			continue
		}
		page, err := read(p.page)
		if err != nil {
			return err
		}
		for _, v := range page.Verdicts {
			if err := j.verdict(v); err != nil {
				return err
			}
		}
	}
	var gen int64
	if err := t.get(`UPDATE _ws_state SET generation = generation + 1 RETURNING generation`, nil, &gen); err != nil {
		return err
	}
	in := &incoming{t: t, set: s, gen: gen, rep: rep, dirty: map[string]bool{}}
	var last *protocol.Page
	var verified []*protocol.Verified
	for _, p := range pages {
		page, err := read(p.page)
		if err != nil {
			return err
		}
		if page.Verify != nil {
			verified = append(verified, page.Verify)
		}
		for i := range page.Tables {
			if err := in.table(&page.Tables[i]); err != nil {
				return err
			}
			progress(rep.Rows+rep.Deleted, total)
		}
		for i := range page.Files {
			if err := d.filesPart(in, &page.Files[i]); err != nil {
				return err
			}
		}
		last = page
	}
	if !last.Last || last.Cursor == "" {
		return fmt.Errorf("%w: its last page has no cursor", ErrReply)
	}
	if first.Refresh {
		rep.Refresh = true
		if err := in.sweep(); err != nil {
			return err
		}
	}
	if err := d.settleFiles(in, sess, first.Refresh); err != nil {
		return err
	}
	if err := j.rights(); err != nil { // while the tables are there that leave with a set
		return err
	}
	if err := t.settle(c, sess, first, last, again); err != nil {
		return err
	}
	rep.More = last.More
	for _, tab := range c.order {
		if err := t.unpark(tab); err != nil {
			return err
		}
	}
	if !again { // a refresh follows, with all rows
		if err := t.verifyReply(c, sess, last.Cursor, verified, gen); err != nil {
			return err
		}
	}
	return t.capture(true)
}

// settle stores the cursor, closes the session, and follows what the reply says of the user's sets.
func (t *txn) settle(c *catalogue, sess *session, first, last *protocol.Page, again bool) error {
	cursor := last.Cursor
	if again {
		cursor = ""
	}
	todo := 0
	if again || sess.more {
		todo = 1
	} else if sess.resumed { // it was frozen by an earlier sync: what was edited since follows
		nothing, err := t.nothingFor(c, c.set(sess.Set))
		if err != nil {
			return err
		}
		if !nothing {
			todo = 1
		}
	}
	if err := t.exec(`UPDATE _ws_set SET cursor = ?, todo = ?, synced_at = ?, closed_until = 0 WHERE name = ?`, cursor, todo, time.Now().Unix(), sess.Set); err != nil {
		return err
	}
	if epoch := cmp.Or(first.Epoch, last.Epoch); epoch != "" {
		if err := t.exec(`UPDATE _ws_state SET epoch = ?`, epoch); err != nil {
			return err
		}
	}
	if err := t.exec(`UPDATE _ws_state SET open_n = NULL, new_key = new_key OR ?`, first.NewKey); err != nil {
		return err
	}
	if err := t.reached(sess, "staged"); err != nil { // or there would be no reply
		return err
	}
	if err := t.exec(`DELETE FROM _ws_inbox`); err != nil {
		return err
	}
	if err := t.sweepOutbox(); err != nil {
		return err
	}
	if first.Sets != nil {
		if err := t.adopt(c, first.Sets, 1); err != nil {
			return err
		}
	}
	return t.dropGone()
}

// pages lists the inbox; it must be whole.
func (t *txn) pages() ([]stored, error) {
	var l []stored
	err := t.each(`SELECT page, verdicts, last FROM _ws_inbox ORDER BY page`, nil, func(scan func(...any) error) error {
		var p stored
		defer func() { l = append(l, p) }()
		return scan(&p.page, &p.verdicts, &p.last)
	})
	if err != nil {
		return nil, err
	}
	for i, p := range l {
		if p.page != i+1 || p.last != (i == len(l)-1) {
			return nil, errNotOurs // another process works on the same session
		}
	}
	if len(l) == 0 {
		return nil, errNotOurs
	}
	return l, nil
}

func (d *Device) page(t *txn, n int) (*protocol.Page, error) {
	var p Payload
	if err := t.get(`SELECT content_type, encoding, body FROM _ws_inbox WHERE page = ?`, []any{n}, &p.ContentType, &p.Encoding, &p.Data); err != nil {
		return nil, err
	}
	return p.page(d.opts.Limits)
}

func (p Payload) page(lim protocol.Limits) (*protocol.Page, error) {
	ct, err := protocol.ContentType(p.ContentType)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrReply, err)
	}
	data, err := protocol.Decompress(p.Data, p.Encoding, lim.Decompressed)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrReply, err)
	}
	page, err := protocol.DecodePage(data, ct, lim)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrReply, err)
	}
	return page, nil
}

// incoming applies the rows of a reply by rule D10.
type incoming struct {
	t     *txn
	set   *set
	gen   int64
	rep   *SetReport
	dirty map[string]bool // by table: has it dirty rows at all
}

func (in *incoming) anyDirty(tab *table) (bool, error) {
	if v, ok := in.dirty[tab.Wire]; ok {
		return v, nil
	}
	var v bool
	err := in.t.get(tab.sql.anyone, nil, &v)
	in.dirty[tab.Wire] = v
	return v, err
}

func (in *incoming) table(r *protocol.TableRows) error {
	m := in.set.member(r.Table)
	if m == nil {
		return fmt.Errorf("%w: it names table %s, which is not in set %s", ErrReply, r.Table, in.set.Name)
	}
	if err := in.gone(m, r.Gone); err != nil {
		return err
	}
	for _, k := range r.Deletes {
		key, err := m.keyValues(k)
		if err != nil {
			return err
		}
		if err := in.delete(m.table, key); err != nil {
			return err
		}
	}
	if len(r.Rows) == 0 {
		return nil
	}
	cols := make([]int, len(r.Columns))
	for i, name := range r.Columns {
		if cols[i] = m.index(name); cols[i] < 0 {
			return fmt.Errorf("%w: it names column %s of table %s, which is not in the definitions", ErrReply, name, r.Table)
		}
	}
	at := make([]int, len(m.key)) // of the key columns in Columns
	for i, k := range m.key {
		if at[i] = slices.Index(cols, k); at[i] < 0 {
			return fmt.Errorf("%w: rows of table %s without key column %s", ErrReply, r.Table, m.Cols[k].Wire)
		}
	}
	rows := r.Rows
	if sabotage.On(sabotage.HalfPage) {
		rows = rows[:(len(rows)+1)/2]
	}
	for _, row := range rows {
		if len(row.Values) != len(cols) {
			return fmt.Errorf("%w: a row of table %s with %d values for %d columns", ErrReply, r.Table, len(row.Values), len(cols))
		}
		if err := in.row(m.table, cols, at, row); err != nil {
			return err
		}
	}
	return nil
}

func (in *incoming) row(tab *table, cols, at []int, row protocol.Row) error {
	in.rep.Rows++
	vals := make([]any, len(cols))
	for i, c := range cols {
		vals[i] = fromWire(tab.Cols[c].kind, row.Values[i])
	}
	key := make([]any, len(at))
	for i, a := range at {
		if vals[a] == nil {
			return fmt.Errorf("%w: a null in a key of table %s", ErrReply, tab.Wire)
		}
		key[i] = vals[a]
	}
	d, err := in.find(tab, key)
	if err != nil {
		return err
	}
	if d == nil {
		if err := in.t.put(tab, cols, vals); err != nil {
			return err
		}
	} else {
		if err := in.t.fix(tab, d); err != nil {
			return err
		}
		// A column that this set does not carry keeps what another set has told.
		m := image{}
		have, was, err := tab.server(d)
		if err != nil {
			return err
		}
		for i, c := range have {
			m[tab.Cols[c].Wire] = toWire(tab.Cols[c].kind, was[i])
		}
		for i, c := range cols {
			m[tab.Cols[c].Wire] = row.Values[i]
		}
		text, err := json.Marshal(m)
		if err != nil {
			return err
		}
		if _, err := in.t.run("UPDATE "+quote(tab.shadow())+" SET sstate = ?, simg = ? WHERE id = ?", serverIsSimg, string(text), d.id); err != nil {
			return err
		}
		if sabotage.On(sabotage.MoveBase) {
			if _, err := in.t.run("UPDATE "+quote(tab.shadow())+" SET bver = ? WHERE id = ? AND base = 1", row.Version, d.id); err != nil {
				return err
			}
		}
	}
	return in.t.setVersion(tab, key, row.Version, in.set.Bit, in.gen)
}

// find gives the shadow row of a key; nil: the row is clean.
func (in *incoming) find(tab *table, key []any) (*dirty, error) {
	if any, err := in.anyDirty(tab); err != nil || !any {
		return nil, err
	}
	id, err := in.t.dirtyID(tab, key)
	if err != nil || id == 0 {
		return nil, err
	}
	return in.t.dirty(tab, id)
}

// delete takes a row away that the server no longer has, or that left the set's subset.
func (in *incoming) delete(tab *table, key []any) error {
	_, sets, err := in.t.version(tab, key)
	if err != nil {
		return err
	}
	if rest := sets &^ in.set.Bit; rest != 0 { // another set still holds the row
		_, err := in.t.run("UPDATE "+quote(tab.versions())+" SET sets = ? WHERE "+tab.sql.keyIs, append([]any{rest}, key...)...)
		return err
	}
	d, err := in.find(tab, key)
	if err != nil {
		return err
	}
	if d == nil {
		if sets != 0 {
			in.rep.Deleted++
		}
		if err := in.t.remove(tab, key); err != nil {
			return err
		}
	} else if sets != 0 {
		if err := in.t.fix(tab, d); err != nil {
			return err
		}
		if _, err := in.t.run("UPDATE "+quote(tab.shadow())+" SET sstate = ?, simg = NULL WHERE id = ?", serverAbsent, d.id); err != nil {
			return err
		}
	}
	return in.t.dropVersion(tab, key)
}

// gone removes every row with one of the given values of the subset key column: clean rows by what they hold, dirty ones
// by what the server last sent.
func (in *incoming) gone(m *member, values []string) error {
	if len(values) == 0 {
		return nil
	}
	i := m.index(m.Def.SubsetKey)
	if i < 0 {
		return fmt.Errorf("%w: a subset key value of table %s left, but the table has no subset key", ErrReply, m.Wire)
	}
	left := make(map[string]bool, len(values))
	for _, v := range values {
		left[v] = true
	}
	ids, err := in.t.ids(m.table)
	if err != nil {
		return err
	}
	var keys [][]any
	for _, id := range ids {
		d, err := in.t.dirty(m.table, id)
		if err != nil {
			return err
		}
		cols, vals, err := m.server(d)
		if err != nil {
			return err
		}
		if at := slices.Index(cols, i); at >= 0 {
			if v := toWire(m.Cols[i].kind, vals[at]); v != nil && left[*v] {
				keys = append(keys, d.key)
			}
		}
	}
	clean := "SELECT " + m.liveKeys("l") + " FROM " + quote(m.Local) + " AS l JOIN " + quote(m.versions()) + " AS v ON " + m.joined("l", "v") +
		" WHERE l." + quote(m.Cols[i].Local) + " = ? AND v.sets & ? <> 0 AND NOT EXISTS (SELECT 1 FROM " + quote(m.shadow()) + " AS s WHERE " + m.joined("l", "s") + ")"
	for _, value := range values {
		more, err := in.t.keys(m.table, clean, fromWire(m.Cols[i].kind, &value), in.set.Bit)
		if err != nil {
			return err
		}
		keys = append(keys, more...)
	}
	for _, k := range keys {
		if err := in.delete(m.table, k); err != nil {
			return err
		}
	}
	return nil
}

// sweep ends a refresh: rows of the set that the reply did not name are gone.
func (in *incoming) sweep() error {
	for _, m := range in.set.Tables {
		if err := in.sweep1(m.table); err != nil {
			return err
		}
	}
	return nil
}

func (in *incoming) sweep1(tab *table) error {
	keys, err := in.t.keys(tab, "SELECT "+tab.sql.keys+" FROM "+quote(tab.versions())+" WHERE sets & ? <> 0 AND gen <> ?", in.set.Bit, in.gen)
	if err != nil {
		return err
	}
	for _, k := range keys {
		if err := in.delete(tab, k); err != nil {
			return err
		}
	}
	return nil
}

// keys reads the keys that a query gives.
func (t *txn) keys(tab *table, q string, args ...any) ([][]any, error) {
	var out [][]any
	err := t.each(q, args, func(scan func(...any) error) error {
		key, into := make([]any, len(tab.key)), make([]any, len(tab.key))
		for i := range key {
			into[i] = &key[i]
		}
		out = append(out, key)
		return scan(into...)
	})
	return out, err
}

// ids lists all dirty rows of a table.
func (t *txn) ids(tab *table) ([]int64, error) {
	var ids []int64
	err := t.each("SELECT id FROM "+quote(tab.shadow())+" ORDER BY id", nil, func(scan func(...any) error) error {
		ids = append(ids, 0)
		return scan(&ids[len(ids)-1])
	})
	return ids, err
}

// liveKeys are the key columns of a live row; joined compares them with a side table's.
func (tab *table) liveKeys(alias string) string {
	s := ""
	for i, k := range tab.key {
		if i > 0 {
			s += ", "
		}
		s += alias + "." + quote(tab.Cols[k].Local)
	}
	return s
}

func (tab *table) joined(live, side string) string {
	s := ""
	for i, k := range tab.key {
		if i > 0 {
			s += " AND "
		}
		c := tab.Cols[k].Local
		s += side + "." + quote("k_"+c) + " = " + live + "." + quote(c)
	}
	return s
}
