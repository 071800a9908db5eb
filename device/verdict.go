package device

import (
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/waystage/waystage/internal/sabotage"
	"github.com/waystage/waystage/protocol"
)

// rejection is an entry of the rejected log.
type rejection struct {
	incarnation string
	n, idx, id  int64
	unit        int64 // the device's transaction, in that session; here: in the file
	set         string
	tab         *table
	op          string
	key         []*string
	base, sent  image
	state       string
	code        protocol.Code
	detail      string
	constraint  string
}

// reject writes the log entry, once (rule D9).
func (t *txn) reject(r *rejection) error {
	key, err := jsonText(values(r.key))
	if err != nil {
		return err
	}
	base, err := jsonText(r.base)
	if err != nil {
		return err
	}
	sent, err := jsonText(r.sent)
	if err != nil {
		return err
	}
	at := time.Now().Unix()
	handling, handled := RejectOpen, sql.NullInt64{}
	if r.code == protocol.CodeYields {
		handling, handled = RejectSettled, sql.NullInt64{Int64: at, Valid: true}
	}
	return t.exec(`INSERT INTO _ws_rejected (incarnation, n, idx, id, unit, at, set_name, wire, local, op, key, base, sent, state, code, detail, constraint_name, handling, handled)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING`,
		r.incarnation, r.n, r.idx, r.id, r.unit, at, r.set, r.tab.Wire, r.tab.Local, r.op, key.String, base, sent, r.state, string(r.code), r.detail, r.constraint, handling, handled)
}

// setRight notes in a log entry what the server has for the row.
func (t *txn) setRight(r *rejection, key []any) error {
	right, err := t.serverImage(r.tab, key)
	if err != nil {
		return err
	}
	text, err := jsonText(right)
	if err != nil {
		return err
	}
	sver, _, err := t.version(r.tab, key)
	if err != nil {
		return err
	}
	return t.exec(`UPDATE _ws_rejected SET right = ?, right_version = ? WHERE incarnation = ? AND n = ? AND idx = ?`, text, sver, r.incarnation, r.n, r.idx)
}

// serverImage is the server's last image of a row, clean or dirty.
func (t *txn) serverImage(tab *table, key []any) (image, error) {
	id, err := t.dirtyID(tab, key)
	if err != nil {
		return nil, err
	}
	if id == 0 {
		live, err := t.live(tab, key)
		return tab.image(live), err
	}
	d, err := t.dirty(tab, id)
	if err != nil {
		return nil, err
	}
	cols, vals, err := tab.server(d)
	if err != nil || cols == nil {
		return nil, err
	}
	m := image{}
	for i, c := range cols {
		m[tab.Cols[c].Wire] = toWire(tab.Cols[c].kind, vals[i])
	}
	return m, nil
}

// judge applies verdicts by rule D9.
type judge struct {
	t       *txn
	c       *catalogue
	set     *set
	rep     *SetReport
	frozen  map[string]*protocol.Request // requests that verdicts refer to, by session token
	refused []*rejection                 // of this reply: their right version is known when its rows are in
	keys    [][]any
}

func (j *judge) request(inc string, n int64) (*protocol.Request, string, error) {
	token := protocol.SessionToken(inc, n)
	var p Payload
	var name string
	if r := j.frozen[token]; r != nil {
		return r, r.Set, nil
	}
	err := j.t.get(`SELECT set_name, content_type, encoding, payload FROM _ws_outbox WHERE incarnation = ? AND n = ?`, []any{inc, n}, &name, &p.ContentType, &p.Encoding, &p.Data)
	if err != nil {
		return nil, "", err
	}
	r, err := p.request()
	if err != nil {
		return nil, "", err
	}
	j.frozen[token] = r
	return r, name, nil
}

func (j *judge) verdict(v protocol.Verdict) error {
	var wire, state string
	err := j.t.get(`SELECT wire, state FROM _ws_record WHERE incarnation = ? AND n = ? AND idx = ?`, []any{v.Incarnation, v.N, v.Index}, &wire, &state)
	if errors.Is(err, sql.ErrNoRows) {
		return nil // final already: verdicts are told again until the cursor has passed them
	}
	if err != nil {
		return err
	}
	if state == protocol.Merged && v.State == protocol.Merged {
		return nil
	}
	req, setName, err := j.request(v.Incarnation, v.N)
	if err != nil {
		return err
	}
	if v.Index < 0 || v.Index >= len(req.Changes) {
		return fmt.Errorf("%w: a verdict on record %d of a session with %d", ErrReply, v.Index, len(req.Changes))
	}
	f := frozen{Change: req.Changes[v.Index], columns: columnsOf(req, wire), set: setName, tab: j.c.tables[wire]}
	var d *dirty
	if f.tab != nil && state == "sent" {
		if d, err = j.carried(f.tab, v); err != nil {
			return err
		}
	}
	if err := j.t.told(v.Incarnation, v.N, int64(v.Index), v); err != nil {
		return err
	}
	switch v.State {
	case protocol.Merged:
		j.rep.Merged++
		if d != nil {
			if err := j.merged(&f, d, v); err != nil {
				return err
			}
		}
		return j.t.exec(`UPDATE _ws_record SET state = 'merged' WHERE incarnation = ? AND n = ? AND idx = ?`, v.Incarnation, v.N, v.Index)
	case protocol.Applied:
		// Merged may have been told in the same breath or never: then this is it.
		j.rep.Applied++
		if d != nil {
			if err := j.merged(&f, d, v); err != nil {
				return err
			}
		}
	case protocol.Rejected, protocol.Refused:
		if v.Code == protocol.CodeYields {
			j.rep.Settled++
		} else {
			j.rep.Rejected++
		}
		if d != nil {
			if err := j.refuse(&f, d); err != nil {
				return err
			}
		}
		if f.tab != nil {
			if err := j.log(&f, v); err != nil {
				return err
			}
		}
		if err := j.t.recordRejected(setName, j.c, &f, v); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%w: unknown verdict state %q", ErrReply, v.State)
	}
	return j.t.exec(`DELETE FROM _ws_record WHERE incarnation = ? AND n = ? AND idx = ?`, v.Incarnation, v.N, v.Index)
}

// frozen is a change as it was sent.
type frozen struct {
	protocol.Change
	columns []string
	set     string
	tab     *table
}

func columnsOf(r *protocol.Request, wire string) []string {
	for _, l := range r.Columns {
		if l.Table == wire {
			return l.Columns
		}
	}
	return nil
}

// image names the columns of a sent image.
func (f *frozen) image(vals []*string) image {
	if vals == nil {
		return nil
	}
	m := image{}
	for i, c := range f.columns {
		if i < len(vals) {
			m[c] = vals[i]
		}
	}
	return m
}

// markOf is the mark in the shadow rows that a session of the outbox carries.
const markOf = `CASE WHEN o.incarnation = s.incarnation THEN o.n ELSE -o.resend END`

// carried finds the dirty row that a record carries; nil: the device has moved on.
func (j *judge) carried(tab *table, v protocol.Verdict) (*dirty, error) {
	var mark int64
	err := j.t.get(`SELECT `+markOf+` FROM _ws_outbox o, _ws_state s WHERE o.incarnation = ? AND o.n = ?`,
		[]any{v.Incarnation, v.N}, &mark)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	id, err := j.t.marked(tab, mark, v.Index)
	if err != nil || id == 0 {
		return nil, err
	}
	return j.t.dirty(tab, id)
}

// untouched tells whether the row is still what was sent.
func (j *judge) untouched(f *frozen, d *dirty) (bool, error) {
	live, err := j.t.live(f.tab, d.key)
	if err != nil {
		return false, err
	}
	if live == nil || f.New == nil {
		return live == nil && f.New == nil, nil
	}
	sent, now := f.image(f.New), f.tab.image(live)
	for c, v := range now {
		s, ok := sent[c]
		if !ok { // a column that was not sent: compare with what it was
			if !d.base {
				continue
			}
			s = toWire(f.tab.Cols[f.tab.index(c)].kind, d.baseRow[f.tab.index(c)])
		}
		if !sameWire(s, v) {
			return false, nil
		}
	}
	return true, nil
}

// merged makes the frozen image the base, at the version that the merge gave it.
func (j *judge) merged(f *frozen, d *dirty, v protocol.Verdict) error {
	t, tab, version := j.t, f.tab, v.Version
	if err := t.unmark(tab, d); err != nil {
		return err
	}
	same, err := j.untouched(f, d)
	if err != nil {
		return err
	}
	sent := f.image(f.New)
	if f.New != nil && !sameImage(v.Key, f.Key) {
		// The server writes the key in another way (an uuid in upper case, 1.0 for 1.00): its row will come under that key.
		if err := j.rename(f, d, v.Key, same); err != nil || same {
			return err
		}
		for i, k := range tab.Key {
			sent[k] = v.Key[i]
		}
	}
	if f.New == nil {
		if err := t.dropVersion(tab, d.key); err != nil {
			return err
		}
		if same {
			return t.forget(tab, d)
		}
		_, err := t.run("UPDATE "+quote(tab.shadow())+" SET base = 0, bver = '', sstate = 0, simg = NULL WHERE id = ?", d.id)
		return err
	}
	bit := j.set.Bit
	if own := j.c.set(f.set); own != nil {
		bit = own.Bit
	}
	sver, _, err := t.version(tab, d.key)
	if err != nil {
		return err
	}
	q, args := "UPDATE "+quote(tab.shadow())+" SET base = 1, bver = ?", []any{version}
	if sver != "" && sver == version {
		// The row was already so at the server, and the device has that image; it may differ from the one sent in columns
		// that were not edited, or in notation. It will not be sent again.
		if same {
			return t.restore(tab, d)
		}
		if d.sstate == serverIsBase {
			text, err := jsonText(tab.image(d.baseRow))
			if err != nil {
				return err
			}
			q, args = q+", sstate = 1, simg = ?", append(args, text)
		}
	} else {
		// The server's image comes with the rows of this reply; until then it is what was sent.
		if err := t.setVersion(tab, d.key, version, bit, 0); err != nil {
			return err
		}
		if same {
			return t.forget(tab, d)
		}
		q += ", sstate = 0, simg = NULL"
	}
	for _, c := range tab.Cols {
		if v, ok := sent[c.Wire]; ok {
			q += ", " + quote("b_"+c.Local) + " = ?"
			args = append(args, fromWire(c.kind, v))
		}
	}
	_, err = t.run(q+" WHERE id = ?", append(args, d.id)...)
	return err
}

// rename moves a row to the key that the server gave it; an unedited one just goes, since the server's comes.
func (j *judge) rename(f *frozen, d *dirty, key []*string, same bool) error {
	t, tab := j.t, f.tab
	canonical, err := tab.keyValues(key)
	if err != nil {
		return err
	}
	live, err := t.live(tab, d.key)
	if err != nil {
		return err
	}
	if err := t.remove(tab, d.key); err != nil {
		return err
	}
	if same {
		return t.forget(tab, d)
	}
	if live != nil {
		for i, k := range tab.key {
			live[k] = canonical[i]
		}
		if err := t.put(tab, tab.all(), live); err != nil {
			return err
		}
	}
	if id, err := t.dirtyID(tab, canonical); err != nil {
		return err
	} else if id != 0 {
		if _, err := t.run("UPDATE OR IGNORE "+quote(tab.units())+" SET id = ? WHERE id = ?", d.id, id); err != nil {
			return err
		}
		if _, err := t.run(tab.sql.dirtyDrop, id); err != nil {
			return err
		}
	}
	d.key = canonical
	_, err = t.run("UPDATE "+quote(tab.shadow())+" SET ("+tab.sql.keys+") = ("+marks(len(canonical))+") WHERE id = ?", append(slices.Clone(canonical), d.id)...)
	return err
}

// refuse takes the edit back, unless the user has edited on: that edit stays, with its old base version, and gets its
// own verdict.
func (j *judge) refuse(f *frozen, d *dirty) error {
	same, err := j.untouched(f, d)
	if err != nil {
		return err
	}
	if same || sabotage.On(sabotage.DropLater) {
		return j.t.restore(f.tab, d)
	}
	if err := j.t.fix(f.tab, d); err != nil {
		return err
	}
	return j.t.unmark(f.tab, d)
}

func (j *judge) log(f *frozen, v protocol.Verdict) error {
	r := &rejection{
		incarnation: v.Incarnation, n: v.N, idx: int64(v.Index), id: v.ID, unit: f.Unit, set: f.set, tab: f.tab, op: f.Op, key: f.Key,
		base: f.image(f.Base), sent: f.image(f.New), state: v.State, code: v.Code, detail: v.Detail, constraint: v.Constraint,
	}
	key, err := f.tab.keyValues(v.Key) // as the server writes it: a row that stands in the way has it so
	if err != nil {
		if key, err = f.tab.keyValues(f.Key); err != nil {
			return err
		}
	}
	j.refused, j.keys = append(j.refused, r), append(j.keys, key)
	if sabotage.On(sabotage.LogTwice) {
		again := *r
		again.idx += 1000
		if err := j.t.reject(&again); err != nil {
			return err
		}
	}
	return j.t.reject(r)
}

// rights completes the log when the reply's rows are in.
func (j *judge) rights() error {
	for i, r := range j.refused {
		if err := j.t.setRight(r, j.keys[i]); err != nil {
			return err
		}
	}
	return nil
}
