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

// oldEpoch marks a version that an earlier mirror gave (rule D13). It never goes on the wire: a request with such
// versions names no epoch, and the server judges them by their base images.
const oldEpoch = "~"

// session is a frozen request.
type session struct {
	Incarnation string
	N           int64
	Set         string
	Nonce       string
	CursorFrom  string
	Records     int
	Payload     Payload
	resumed     bool // frozen by an earlier sync
	more        bool // edits were left for a session after this one
}

func (s *session) token() string { return protocol.SessionToken(s.Incarnation, s.N) }

// openSession is the session without an applied reply, if there is one (rule D1).
func (t *txn) openSession() (*session, error) {
	s := &session{resumed: true}
	err := t.get(`SELECT o.incarnation, o.n, set_name, nonce, cursor_from, records, content_type, encoding, payload
		FROM _ws_outbox o JOIN _ws_state s ON o.incarnation = s.incarnation AND o.n = s.open_n`, nil,
		&s.Incarnation, &s.N, &s.Set, &s.Nonce, &s.CursorFrom, &s.Records, &s.Payload.ContentType, &s.Payload.Encoding, &s.Payload.Data)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return s, err
}

// carried is a frozen change with the place of its row.
type carried struct {
	tab *table
	id  int64
	protocol.Change
	edited int64 // when the user first touched the row: milliseconds since 1970
}

// freeze opens the next session of a set: one durable commit of the request's bytes, its number and nonce, and the
// marks of the rows in it (rule D1). more tells that changes were left for another session.
func (d *Device) freeze(t *txn, c *catalogue, st state, s *set, wait string) (sess *session, more bool, err error) {
	req := protocol.Request{
		V: protocol.Version, Incarnation: st.Incarnation, N: st.N + 1, Nonce: randomHex(8), Set: s.Name,
		Cursor: s.Cursor, Schema: s.Hash, Epoch: st.Epoch, Wait: wait, App: d.opts.App, Library: Library, Built: st.Built,
	}
	if err := t.capture(false); err != nil {
		return nil, false, err
	}
	if err := t.exec(endUnit); err != nil { // nobody else writes now: whoever began it forgot to end it
		return nil, false, err
	}
	rows, seq, err := t.resend(c, st, s, &req)
	if err != nil {
		return nil, false, err
	}
	again := seq != 0
	if again {
		more = true // what else is unsent follows in a session of its own
	} else if rows, more, err = d.collect(t, c, st, s, &req); err != nil {
		return nil, false, err
	} else if seq, err = t.tick(); err != nil {
		return nil, false, err
	}
	for i, r := range rows {
		req.Changes = append(req.Changes, r.Change)
		if _, err := t.run(`INSERT INTO _ws_record (incarnation, n, idx, wire, state) VALUES (?, ?, ?, ?, 'sent')`, req.Incarnation, req.N, i, r.tab.Wire); err != nil {
			return nil, false, err
		}
		if err := t.receipt(req.Incarnation, req.N, int64(i), r.Change, r.edited); err != nil {
			return nil, false, err
		}
		if r.id == 0 {
			continue
		}
		if _, err := t.run("UPDATE "+quote(r.tab.shadow())+" SET batch = ?, idx = ? WHERE id = ?", req.N, i, r.id); err != nil {
			return nil, false, err
		}
		if again {
			continue // its edits since then belong where they belong
		}
		if _, err := t.run("DELETE FROM "+quote(r.tab.units())+" WHERE id = ?", r.id); err != nil {
			return nil, false, err
		}
	}
	if err := t.sweepBroken(c); err != nil {
		return nil, false, err
	}
	for _, tab := range c.order {
		if err := t.unpark(tab); err != nil {
			return nil, false, err
		}
	}
	if err := t.capture(true); err != nil {
		return nil, false, err
	}
	if req.Verify, err = t.verification(s, protocol.SessionToken(req.Incarnation, req.N)); err != nil {
		return nil, false, err
	}
	if req.Files, err = d.filesTold(t); err != nil {
		return nil, false, err
	}
	data, err := protocol.Encode(&req, d.opts.ContentType)
	if err != nil {
		return nil, false, err
	}
	encoding := protocol.Identity
	if len(data) > 1<<10 {
		encoding = d.opts.Encoding
	}
	if data, err = protocol.Compress(data, encoding); err != nil {
		return nil, false, err
	}
	sess = &session{
		Incarnation: req.Incarnation, N: req.N, Set: s.Name, Nonce: req.Nonce, CursorFrom: req.Cursor, Records: len(rows),
		Payload: Payload{ContentType: d.opts.ContentType, Encoding: encoding, Data: data},
	}
	if err := t.exec(`INSERT INTO _ws_outbox (incarnation, n, set_name, nonce, cursor_from, content_type, encoding, payload, records, seq, created)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`, sess.Incarnation, sess.N, sess.Set, sess.Nonce, sess.CursorFrom,
		sess.Payload.ContentType, sess.Payload.Encoding, sess.Payload.Data, sess.Records, seq, time.Now().Unix()); err != nil {
		return nil, false, err
	}
	if len(rows) > 0 {
		if err := t.exec(`INSERT INTO _ws_session (incarnation, n, set_name, frozen) VALUES (?, ?, ?, ?)`, sess.Incarnation, sess.N, sess.Set, now()); err != nil {
			return nil, false, err
		}
	}
	if err := t.exec(`DELETE FROM _ws_inbox`); err != nil {
		return nil, false, err
	}
	return sess, more, t.exec(`UPDATE _ws_state SET n = ?, open_n = ?`, sess.N, sess.N)
}

// collect derives the changes of a set's dirty rows that no session carries (rule D2), each unit whole. Rows that the
// user has put back become what the server has (rule D10).
func (d *Device) collect(t *txn, c *catalogue, st state, s *set, req *protocol.Request) (rows []carried, more bool, err error) {
	most, bytes := d.opts.MostChanges, 0
	if st.MostChanges > 0 && st.MostChanges < most {
		most = st.MostChanges
	}
	units, err := t.units(c, s)
	if err != nil {
		return nil, false, err
	}
	var chosen []candidate
	var numbers int64
	old := false // versions of two epochs do not travel in one session
gather:
	for ord, m := range s.Tables {
		if !c.uploads(s, m.Wire) {
			continue
		}
		ids, err := t.unsent(m.table)
		if err != nil {
			return nil, false, err
		}
		for _, id := range ids {
			p := place{ord, id}
			u, alone := units[p], false
			if u == nil {
				u, alone = &unit{rows: []place{p}}, true
			}
			if u.taken || u.held {
				continue
			}
			if len(chosen) >= most || bytes > d.opts.MostBytes {
				more = true
				break gather
			}
			u.taken = true
			load, err := d.candidates(t, s, u)
			if err != nil {
				return nil, false, err
			}
			if len(load.rows) == 0 {
				continue
			}
			if len(chosen) == 0 {
				old = load.old
			}
			switch {
			case load.old != old:
				more = true
				continue
			case len(chosen) > 0 && (len(chosen)+len(load.rows) > most || bytes+load.bytes > d.opts.MostBytes):
				more = true
				break gather
			}
			if !alone {
				numbers++
				for i := range load.rows {
					load.rows[i].Unit = numbers
				}
			}
			chosen, bytes = append(chosen, load.rows...), bytes+load.bytes
		}
	}
	slices.SortFunc(chosen, func(a, b candidate) int { return a.compare(b.place) })
	oldest := int64(0)
	for i, x := range chosen {
		m := &s.Tables[x.ord]
		if err := t.fix(m.table, x.dirty); err != nil {
			return nil, false, err
		}
		if old { // the whole session is judged by its base images
			x.Version, req.Epoch = strings.TrimPrefix(x.Version, oldEpoch), ""
		}
		if i == 0 || chosen[i-1].ord != x.ord {
			req.Columns = append(req.Columns, m.layout())
		}
		if oldest == 0 || x.dirty.touched < oldest {
			oldest = x.dirty.touched
			req.Oldest = time.Unix(oldest, 0).UTC().Format(time.RFC3339)
		}
		rows = append(rows, carried{m.table, x.id, *x.Change, x.dirty.touched * 1000})
	}
	return rows, more, nil
}

// candidate is a dirty row with what its change would be.
type candidate struct {
	place
	*protocol.Change
	dirty *dirty
	live  []any
}

// load is a unit (or a row of none) on its way into a session.
type load struct {
	rows  []candidate
	bytes int
	old   bool // a version of it is from an earlier mirror
}

// candidates derives the changes of a unit. What no server can take is rejected here, and the rest of its unit with it.
func (d *Device) candidates(t *txn, s *set, u *unit) (l load, err error) {
	why, culprit, lim := u.why, -1, d.opts.Limits
	var code protocol.Code
	var detail string
	for _, p := range u.rows {
		m := &s.Tables[p.ord]
		dr, err := t.dirty(m.table, p.id)
		if err != nil {
			return l, err
		}
		ch, live, err := t.derive(m, dr)
		if err != nil {
			return l, err
		}
		if ch == nil {
			if err := t.restore(m.table, dr); err != nil {
				return l, err
			}
			continue
		}
		if c, text := unsendable(m, ch, lim); c != "" && culprit < 0 {
			culprit, code, detail = len(l.rows), c, text
			why = failing(ch, c, text)
		}
		l.rows = append(l.rows, candidate{p, ch, dr, live})
		l.bytes += imageSize(ch.Base) + imageSize(ch.New)
		l.old = l.old || strings.HasPrefix(ch.Version, oldEpoch)
	}
	tooBig := ""
	if lim.Changes > 0 && len(l.rows) > lim.Changes || lim.Decompressed > 0 && l.bytes > lim.Decompressed {
		tooBig = fmt.Sprintf("the transaction has %d records with %d bytes; a session takes %d with %d", len(l.rows), l.bytes, lim.Changes, lim.Decompressed)
	}
	if why == "" && tooBig == "" {
		return l, nil
	}
	for i, x := range l.rows {
		code, detail := code, detail
		if i != culprit {
			code, detail = protocol.CodeTransaction, why
		}
		if tooBig != "" {
			code, detail = protocol.CodeTooBig, tooBig
		}
		if err := t.rejectHere(s.Name, s.Tables[x.ord].table, x.dirty, x.live, u.number, code, detail); err != nil {
			return l, err
		}
	}
	return load{}, nil
}

// failing names a rejected record in the detail of those that fall with it.
func failing(ch *protocol.Change, code protocol.Code, detail string) string {
	key := make([]string, len(ch.Key))
	for i, v := range ch.Key {
		key[i] = "NULL"
		if v != nil {
			key[i] = strings.ToValidUTF8(*v, "?")
		}
	}
	return fmt.Sprintf("the record of table %s with key %s was rejected: %s: %s", ch.Table, strings.Join(key, ", "), code, detail)
}

func (m *member) layout() protocol.Layout {
	l := protocol.Layout{Table: m.Wire}
	for _, i := range m.cols {
		l.Columns = append(l.Columns, m.Cols[i].Wire)
	}
	return l
}

// unsent lists the dirty rows of a table that no session carries, in the order of their first touch.
func (t *txn) unsent(tab *table) ([]int64, error) {
	var ids []int64
	err := t.each("SELECT id FROM "+quote(tab.shadow())+" WHERE batch IS NULL ORDER BY id", nil, func(scan func(...any) error) error {
		ids = append(ids, 0)
		return scan(&ids[len(ids)-1])
	})
	return ids, err
}

// derive compares a dirty row with its base; nil: nothing has changed in the set's columns. live is the row as it is.
func (t *txn) derive(m *member, d *dirty) (*protocol.Change, []any, error) {
	live, err := t.live(m.table, d.key)
	if err != nil {
		return nil, nil, err
	}
	ch := protocol.Change{Table: m.Wire, Key: m.toWire(m.key, d.key)}
	if d.base {
		ch.Base = m.pick(d.baseRow)
	}
	if live != nil {
		ch.New = m.pick(live)
	}
	switch {
	case d.base && live == nil:
		ch.Op = protocol.Delete
	case d.base && !sameImage(ch.Base, ch.New):
		ch.Op = protocol.Update
	case !d.base && live != nil:
		ch.Op = protocol.Insert
	default:
		return nil, live, nil
	}
	ch.Version, err = t.baseVersion(m.table, d)
	return &ch, live, err
}

// pick renders the columns that the set carries.
func (m *member) pick(row []any) []*string {
	out := make([]*string, len(m.cols))
	for i, c := range m.cols {
		out[i] = toWire(m.Cols[c].kind, row[c])
	}
	return out
}

// unsendable finds what no server can take, so that one such row does not hold up the others.
func unsendable(m *member, ch *protocol.Change, lim protocol.Limits) (protocol.Code, string) {
	if i, ok := validText(ch.New); !ok {
		return protocol.CodeInvalidValue, fmt.Sprintf("column %s holds text that is not UTF-8: store bytes in a bytea column", m.Cols[m.cols[i]].Wire)
	}
	if _, ok := validText(ch.Key); !ok {
		return protocol.CodeInvalidValue, "the key holds text that is not UTF-8"
	}
	if n := imageSize(ch.New); lim.Row > 0 && n > lim.Row {
		return protocol.CodeRowTooBig, fmt.Sprintf("the row has %d bytes, the limit is %d", n, lim.Row)
	}
	return "", ""
}

// rejectHere refuses an edit on the device itself: it is logged like any other rejection, and the row goes back to
// what the server has. unit is a number of its unit in the file, or 0. Capture must be off.
func (t *txn) rejectHere(setName string, tab *table, d *dirty, live []any, unit int64, code protocol.Code, detail string) error {
	if err := t.breakUnit(tab, d, failing(&protocol.Change{Table: tab.Wire, Key: tab.toWire(tab.key, d.key)}, code, detail)); err != nil {
		return err
	}
	r, err := t.logHere(setName, tab, d, live, unit, code, detail)
	if err != nil {
		return err
	}
	if err := t.restore(tab, d); err != nil {
		return err
	}
	if err := t.reject(r); err != nil {
		return err
	}
	return t.setRight(r, d.key)
}

// rejectPart logs that a part of an edit is refused on the device; the rest stays.
func (t *txn) rejectPart(setName string, tab *table, d *dirty, live []any, unit int64, code protocol.Code, detail string) error {
	r, err := t.logHere(setName, tab, d, live, unit, code, detail)
	if err != nil {
		return err
	}
	if err := t.reject(r); err != nil {
		return err
	}
	return t.setRight(r, d.key)
}

// logHere gives a rejection by the device its number and its receipt.
func (t *txn) logHere(setName string, tab *table, d *dirty, live []any, unit int64, code protocol.Code, detail string) (*rejection, error) {
	var n int64
	if err := t.get(`UPDATE _ws_state SET local_rejects = local_rejects + 1 RETURNING local_rejects`, nil, &n); err != nil {
		return nil, err
	}
	var inc string
	if err := t.get(`SELECT incarnation FROM _ws_state`, nil, &inc); err != nil {
		return nil, err
	}
	op := operation(d, live)
	r := &rejection{
		incarnation: inc, n: 0, idx: n, unit: unit, set: setName, tab: tab, op: op, key: tab.toWire(tab.key, d.key),
		base: tab.image(d.baseRow), sent: tab.image(live), state: protocol.Rejected, code: code, detail: detail,
	}
	if err := t.receipt(inc, 0, n, protocol.Change{Table: tab.Wire, Op: op, Key: r.key, Unit: unit}, d.touched*1000); err != nil {
		return nil, err
	}
	return r, t.told(inc, 0, n, protocol.Verdict{State: protocol.Rejected, Code: code, Detail: detail})
}

// capture switches the triggers; inside one transaction only.
func (t *txn) capture(on bool) error {
	n := 0
	if on {
		n = 1
	}
	return t.exec(`UPDATE _ws_state SET capture = ?`, n)
}

// tick counts the file's generations: freezes, replies, marks.
func (t *txn) tick() (n int64, err error) {
	err = t.get(`UPDATE _ws_state SET generation = generation + 1 RETURNING generation`, nil, &n)
	return n, err
}

// resend prepares what was frozen under an earlier incarnation and has no verdict to be sent again as it was, under
// the new number (rule D12): the oldest such session of the set. seq is its place in the order of freezes; 0: none.
func (t *txn) resend(c *catalogue, st state, s *set, req *protocol.Request) (rows []carried, seq int64, err error) {
	var inc string
	var n, mark int64
	var p Payload
	err = t.get(`SELECT incarnation, n, resend, seq, content_type, encoding, payload FROM _ws_outbox WHERE resend > 0 AND set_name = ? ORDER BY seq LIMIT 1`,
		[]any{s.Name}, &inc, &n, &mark, &seq, &p.ContentType, &p.Encoding, &p.Data)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	old, err := p.request()
	if err != nil {
		return nil, 0, err
	}
	var waiting []int
	err = t.each(`SELECT idx FROM _ws_record WHERE incarnation = ? AND n = ? AND state = 'sent' ORDER BY idx`, []any{inc, n}, func(scan func(...any) error) error {
		waiting = append(waiting, 0)
		return scan(&waiting[len(waiting)-1])
	})
	if err != nil {
		return nil, 0, err
	}
	for _, i := range waiting {
		if i >= len(old.Changes) {
			return nil, 0, fmt.Errorf("record %d of session %s is not in its payload", i, protocol.SessionToken(inc, n))
		}
		ch := old.Changes[i]
		tab := c.tables[ch.Table]
		if tab == nil {
			continue // its table was dropped meanwhile, and the edit logged
		}
		id, err := t.marked(tab, -mark, i) // the marks were set apart by fork
		if err != nil {
			return nil, 0, err
		}
		var edited int64
		if err := t.get(`DELETE FROM _ws_receipt WHERE incarnation = ? AND n = ? AND idx = ? RETURNING edited`, []any{inc, n, i}, &edited); err != nil && !errors.Is(err, sql.ErrNoRows) {
			return nil, 0, err
		}
		rows = append(rows, carried{tab, id, ch, edited}) // no mark: it had merged, in a mirror that is no more
	}
	if len(rows) > 0 {
		req.Columns = old.Columns
		if old.Epoch != st.Epoch { // the mirror was rebuilt since
			req.Epoch = ""
		}
	}
	if err := t.exec(`DELETE FROM _ws_record WHERE incarnation = ? AND n = ? AND state = 'sent'`, inc, n); err != nil {
		return nil, 0, err
	}
	if err := t.exec(`UPDATE _ws_outbox SET resend = 0 WHERE incarnation = ? AND n = ?`, inc, n); err != nil {
		return nil, 0, err
	}
	return rows, seq, t.sweepOutbox()
}

// marked finds the dirty row of a record; 0: none.
func (t *txn) marked(tab *table, batch int64, idx int) (int64, error) {
	var id int64
	err := t.get("SELECT id FROM "+quote(tab.shadow())+" WHERE batch = ? AND idx = ?", []any{batch, idx}, &id)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return id, err
}

// sweepOutbox forgets requests of closed sessions in which every record is final.
func (t *txn) sweepOutbox() error {
	return t.exec(`DELETE FROM _ws_outbox WHERE resend = 0
		AND NOT EXISTS (SELECT 1 FROM _ws_state s WHERE s.incarnation = _ws_outbox.incarnation AND s.open_n = _ws_outbox.n)
		AND NOT EXISTS (SELECT 1 FROM _ws_record r WHERE r.incarnation = _ws_outbox.incarnation AND r.n = _ws_outbox.n)`)
}

// request reads a frozen request back.
func (p Payload) request() (*protocol.Request, error) {
	data, err := protocol.Decompress(p.Data, p.Encoding, 0)
	if err != nil {
		return nil, err
	}
	return protocol.DecodeRequest(data, p.ContentType, protocol.Limits{})
}

func jsonText(v any) (sql.NullString, error) {
	b, err := json.Marshal(v)
	if err != nil || string(b) == "null" {
		return sql.NullString{}, err
	}
	return sql.NullString{String: string(b), Valid: true}, nil
}
