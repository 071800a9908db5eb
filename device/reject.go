package device

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/waystage/waystage/protocol"
)

// Status of an entry of the rejected log.
const (
	RejectOpen        = "open"        // nobody has dealt with it; kept until somebody does
	RejectResubmitted = "resubmitted" // its changes were put on the row again
	RejectRestored    = "restored"    // its row was made again what it was
	RejectDiscarded   = "discarded"   // somebody has seen it, and that is all
	RejectSettled     = "settled"     // the server's conflict policy is that what it had wins: nobody has to do anything
)

// Reject is an entry of the rejected log: what was sent, what it was based on, and what the server had instead.
// Images are {column: PostgreSQL text or null}.
type Reject struct {
	Entry        int64              `json:"entry"`   // number in this log: what Resubmit, Restore and Discard take
	Session      string             `json:"session"` // token; with number 0 for an edit that the device itself refused
	Index        int64              `json:"index"`
	Unit         int64              `json:"unit,omitempty"` // with Session: the device's transaction
	ID           int64              `json:"id,omitempty"`   // number in the server's log
	At           time.Time          `json:"at"`             // when the device learned of it
	Set          string             `json:"set"`
	Table        string             `json:"table"`
	Local        string             `json:"local"`
	Op           string             `json:"op"`
	Key          []*string          `json:"key"`
	Base         map[string]*string `json:"base,omitempty"`
	Sent         map[string]*string `json:"sent,omitempty"`  // null: a delete
	Right        map[string]*string `json:"right,omitempty"` // null: the server had no such row
	RightVersion string             `json:"right_version,omitempty"`
	State        string             `json:"state"` // protocol.Rejected (by the merge, or here) or protocol.Refused (by the source)
	Code         protocol.Code      `json:"code"`
	Detail       string             `json:"detail"`
	Constraint   string             `json:"constraint,omitempty"`
	Status       string             `json:"status"`           // RejectOpen, RejectResubmitted, RejectRestored or RejectDiscarded
	Handled      time.Time          `json:"handled,omitzero"` // when it ceased to be open
}

// RejectFilter chooses entries of the rejected log; zero fields choose all.
type RejectFilter struct {
	Table  string    // at the server ("schema.table" or the name alone), or in the file
	Reason string    // a code, e.g. "stale_version"
	Status string    // RejectOpen, RejectResubmitted, RejectRestored or RejectDiscarded
	Since  time.Time // learned of from this time on
}

// Rejects reads the whole rejected log, oldest first.
func (d *Device) Rejects(ctx context.Context) ([]Reject, error) {
	return d.RejectLog(ctx, RejectFilter{})
}

// RejectLog reads entries of the rejected log, oldest first.
func (d *Device) RejectLog(ctx context.Context, f RejectFilter) (l []Reject, err error) {
	if f.Status != "" && !slices.Contains([]string{RejectOpen, RejectResubmitted, RejectRestored, RejectDiscarded, RejectSettled}, f.Status) {
		return nil, fmt.Errorf("device: %q is no status of a rejected record: %s, %s, %s, %s or %s", f.Status, RejectOpen, RejectResubmitted, RejectRestored, RejectDiscarded, RejectSettled)
	}
	where, args := "1", []any{}
	if f.Table != "" {
		where, args = where+" AND (wire = ? OR local = ? OR substr(wire, instr(wire, '.') + 1) = ?)", append(args, f.Table, f.Table, f.Table)
	}
	if f.Reason != "" {
		where, args = where+" AND code = ?", append(args, f.Reason)
	}
	if f.Status != "" {
		where, args = where+" AND handling = ?", append(args, f.Status)
	}
	if !f.Since.IsZero() {
		where, args = where+" AND at >= ?", append(args, f.Since.Unix())
	}
	err = d.read(ctx, func(t *txn) error {
		l, err = t.rejects(where, args...)
		return err
	})
	return l, err
}

// rejects reads entries.
func (t *txn) rejects(where string, args ...any) (l []Reject, err error) {
	return l, t.each(`SELECT entry, incarnation, n, idx, unit, id, at, set_name, wire, local, op, key, base, sent, right, right_version, state, code, detail, constraint_name, handling, handled
		FROM _ws_rejected WHERE `+where+` ORDER BY entry`, args, func(scan func(...any) error) error {
		var r Reject
		var inc string
		var n, at int64
		var key, base, sent, right sql.NullString
		var handled sql.NullInt64
		if err := scan(&r.Entry, &inc, &n, &r.Index, &r.Unit, &r.ID, &at, &r.Set, &r.Table, &r.Local, &r.Op, &key, &base, &sent, &right, &r.RightVersion,
			&r.State, &r.Code, &r.Detail, &r.Constraint, &r.Status, &handled); err != nil {
			return err
		}
		r.Session, r.At = protocol.SessionToken(inc, n), time.Unix(at, 0).UTC()
		if handled.Valid {
			r.Handled = time.Unix(handled.Int64, 0).UTC()
		}
		for _, x := range []struct {
			text sql.NullString
			into any
		}{{key, (*values)(&r.Key)}, {base, (*image)(&r.Base)}, {sent, (*image)(&r.Sent)}, {right, (*image)(&r.Right)}} {
			if x.text.Valid {
				if err := json.Unmarshal([]byte(x.text.String), x.into); err != nil {
					return err
				}
			}
		}
		l = append(l, r)
		return nil
	})
}

// RejectNow is an entry beside the row as it is today.
type RejectNow struct {
	Reject
	Changed []string           `json:"changed"`            // columns that the rejected edit changed: what Resubmit puts on the row
	Now     map[string]*string `json:"now,omitempty"`      // what the server has, as far as the device knows; null: no such row
	Version string             `json:"version,omitempty"`  // of Now
	Row     map[string]*string `json:"row,omitempty"`      // the row in the file; null: none
	Edited  bool               `json:"edited"`             // the row in the file has another edit that is not final
	Partner []int64            `json:"partners,omitempty"` // the open entries of the same transaction, this one among them
}

// Rejected reads one entry and what has become of its row.
func (d *Device) Rejected(ctx context.Context, entry int64) (r RejectNow, err error) {
	err = d.read(ctx, func(t *txn) error {
		one, err := t.entry(entry)
		if err != nil {
			return err
		}
		r = RejectNow{Reject: *one, Changed: one.changed()}
		if r.Partner, err = t.partners(one); err != nil {
			return err
		}
		c, err := t.load()
		if err != nil {
			return err
		}
		tab := c.tables[one.Table]
		if tab == nil {
			return nil
		}
		key, err := tab.keyValues(one.Key)
		if err != nil {
			return nil // the table has another key now
		}
		now, err := t.serverImage(tab, key)
		if err != nil {
			return err
		}
		live, err := t.live(tab, key)
		if err != nil {
			return err
		}
		r.Now, r.Row = now, tab.image(live)
		if r.Version, _, err = t.version(tab, key); err != nil {
			return err
		}
		r.Version = strings.TrimPrefix(r.Version, oldEpoch)
		id, err := t.dirtyID(tab, key)
		if err != nil || id == 0 {
			return err
		}
		dr, err := t.dirty(tab, id)
		r.Edited = err == nil && (dr.batch.Valid || !tab.undone(dr, live))
		return err
	})
	return r, err
}

func (t *txn) entry(n int64) (*Reject, error) {
	l, err := t.rejects("entry = ?", n)
	if err != nil {
		return nil, err
	}
	if len(l) == 0 {
		return nil, fmt.Errorf("%w: %d", ErrNoReject, n)
	}
	return &l[0], nil
}

// partners are the open entries of the same transaction.
func (t *txn) partners(r *Reject) (l []int64, err error) {
	if r.Unit == 0 {
		return nil, nil
	}
	rejects, err := t.rejects("incarnation || '-' || n = ? AND unit = ? AND handling = ?", r.Session, r.Unit, RejectOpen)
	for _, x := range rejects {
		l = append(l, x.Entry)
	}
	return l, err
}

// changed are the columns that the edit changed, sorted; of an insert all.
func (r *Reject) changed() []string {
	l := []string{}
	for c, v := range r.Sent {
		if b, ok := r.Base[c]; r.Op != protocol.Update || !ok || !sameWire(b, v) {
			l = append(l, c)
		}
	}
	sort.Strings(l)
	return l
}

// Handled is what an action did to one entry.
type Handled struct {
	Entry   int64    `json:"entry"`
	Status  string   `json:"status"`            // of the entry now
	Edited  bool     `json:"edited"`            // the row was changed; false: it was so already, or the entry had this status already
	Skipped []string `json:"skipped,omitempty"` // columns of the rejected edit that the table no longer has
}

// Resubmit makes rejected edits again, on the rows as they are now: of an update only the columns that it changed are
// written, so what others have changed meanwhile stays. set gives columns other values (nil: NULL). The result is an
// ordinary unsent edit, based on the server's present version. Entries of one transaction travel together again.
//
// One call is one local transaction: all entries or none. Entries that are resubmitted already are left alone. Refused
// with ErrRowGone: an update of a row that is no more (Restore makes it again). ErrRowExists: an insert of a key that
// exists (set gives it another). ErrRowEdited: the row has an unsent or unanswered edit of the same column. A delete of
// a row that is gone has nothing to do. Further: ErrNoReject, ErrHandled, ErrNoColumn, ErrNoTable, ErrCapture.
func (d *Device) Resubmit(ctx context.Context, set map[string]*string, entries ...int64) ([]Handled, error) {
	return d.handle(ctx, RejectResubmitted, set, entries)
}

// Restore makes rows again what the rejected edits had made of them: every column that was sent, whatever others have
// written since; a row that is gone is inserted again; the row of a rejected delete is deleted. The result is an
// ordinary unsent edit, based on the server's present version. Otherwise as Resubmit, but that there is no ErrRowGone
// and no ErrRowExists.
func (d *Device) Restore(ctx context.Context, entries ...int64) ([]Handled, error) {
	return d.handle(ctx, RejectRestored, nil, entries)
}

// Discard marks entries as dealt with. They are kept for a while (see Retention), and can be resubmitted or restored
// until then. Refused with ErrNoReject, ErrHandled.
func (d *Device) Discard(ctx context.Context, entries ...int64) ([]Handled, error) {
	return d.handle(ctx, RejectDiscarded, nil, entries)
}

func (d *Device) handle(ctx context.Context, status string, set map[string]*string, entries []int64) (out []Handled, err error) {
	entries = slices.Clone(entries)
	slices.Sort(entries)
	entries = slices.Compact(entries)
	err = d.write(ctx, func(t *txn) error {
		c, err := t.load()
		if err != nil {
			return err
		}
		var todo []*Reject
		for _, n := range entries {
			r, err := t.entry(n)
			if err != nil {
				return err
			}
			switch r.Status {
			case status: // again: nothing happens
				out = append(out, Handled{Entry: n, Status: status})
			case RejectOpen, RejectDiscarded, RejectSettled:
				todo = append(todo, r)
			default:
				return fmt.Errorf("%w: %d was %s at %s", ErrHandled, n, r.Status, r.Handled.Format(time.RFC3339))
			}
		}
		for len(todo) > 0 {
			// Those of one transaction make one again.
			var now []*Reject
			first, rest := todo[0], todo[:0:0]
			for _, r := range todo {
				if r == first || r.Unit != 0 && r.Unit == first.Unit && r.Session == first.Session {
					now = append(now, r)
				} else {
					rest = append(rest, r)
				}
			}
			todo = rest
			begin := endUnit // an open one is none of ours
			if first.Unit != 0 {
				begin = beginUnit
			}
			if err := t.exec(begin); err != nil {
				return err
			}
			for _, r := range now {
				h := Handled{Entry: r.Entry, Status: status}
				if status != RejectDiscarded {
					if err := t.redo(c, r, status == RejectRestored, set, &h); err != nil {
						return fmt.Errorf("entry %d, table %s: %w", r.Entry, r.Local, err)
					}
				}
				if err := t.exec(`UPDATE _ws_rejected SET handling = ?, handled = ? WHERE entry = ?`, status, time.Now().Unix(), r.Entry); err != nil {
					return err
				}
				out = append(out, h)
			}
		}
		return t.exec(endUnit)
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(out, func(a, b Handled) int { return int(a.Entry - b.Entry) })
	return out, nil
}

// redo makes a rejected edit again, by statements that the capture sees like the application's own.
func (t *txn) redo(c *catalogue, r *Reject, whole bool, set map[string]*string, h *Handled) error {
	tab := c.tables[r.Table]
	if tab == nil || len(tab.key) != len(r.Key) {
		return fmt.Errorf("%w: it left the subscriptions, or has another key now", ErrNoTable)
	}
	if err := t.verify(tab); err != nil {
		return err
	}
	want, err := r.wanted(tab, whole, set, h)
	if err != nil {
		return err
	}
	keyTexts := slices.Clone(r.Key)
	if r.Op == protocol.Insert {
		for i, k := range tab.key {
			if v, ok := want[k]; ok {
				keyTexts[i] = v
			}
		}
	}
	key, err := tab.keyValues(keyTexts)
	if err != nil {
		return err
	}
	live, err := t.live(tab, key)
	if err != nil {
		return err
	}
	var dr *dirty
	id, err := t.dirtyID(tab, key)
	if err != nil {
		return err
	}
	if id != 0 {
		if dr, err = t.dirty(tab, id); err != nil {
			return err
		}
		if tab.undone(dr, live) {
			dr = nil
		}
	}
	if r.Op == protocol.Delete {
		switch {
		case live == nil:
			return nil
		case dr != nil:
			return fmt.Errorf("%w: it would be deleted with that edit", ErrRowEdited)
		}
		h.Edited = true
		_, err := t.run(tab.sql.del, key...)
		return err
	}
	var cols []int // that differ
	for i, v := range want {
		if live == nil || !sameWire(toWire(tab.Cols[i].kind, live[i]), v) {
			cols = append(cols, i)
		}
	}
	sort.Ints(cols)
	switch {
	case live == nil && dr != nil:
		return fmt.Errorf("%w: it was deleted here, and that is not final", ErrRowEdited)
	case live == nil && r.Op == protocol.Update && !whole:
		return fmt.Errorf("%w: restore the entry to insert it again", ErrRowGone)
	case live != nil && len(cols) == 0:
		return nil
	case live != nil && r.Op == protocol.Insert && !whole:
		return fmt.Errorf("%w: give it another key, or restore the entry to write over the row", ErrRowExists)
	}
	vals := make([]any, 0, len(cols)+len(key))
	names := make([]string, 0, len(cols))
	for _, i := range cols {
		col := tab.Cols[i]
		if dr != nil && live != nil && (!dr.base || !sameWire(toWire(col.kind, dr.baseRow[i]), toWire(col.kind, live[i]))) {
			return fmt.Errorf("%w: column %s; sync until it has an outcome, or take it back", ErrRowEdited, col.Local)
		}
		names, vals = append(names, quote(col.Local)), append(vals, fromWire(col.kind, want[i]))
	}
	h.Edited = true
	q := "INSERT INTO " + quote(tab.Local) + " (" + strings.Join(names, ", ") + ") VALUES (" + marks(len(names)) + ")"
	if live != nil {
		q = "UPDATE " + quote(tab.Local) + " SET " + strings.Join(names, " = ?, ") + " = ? WHERE " + tab.keyed()
		vals = append(vals, key...)
	}
	n, err := t.run(q, vals...)
	if err == nil && n != 1 {
		err = errors.New("a trigger of the application kept the row from being written")
	}
	return err
}

// keyed is the condition that finds a live row by its key.
func (tab *table) keyed() string {
	var l []string
	for _, k := range tab.key {
		l = append(l, quote(tab.Cols[k].Local)+" = ?")
	}
	return strings.Join(l, " AND ")
}

// wanted is what the row shall hold, by column position.
func (r *Reject) wanted(tab *table, whole bool, set map[string]*string, h *Handled) (map[int]*string, error) {
	want := map[int]*string{}
	names := r.changed()
	if whole {
		names = names[:0]
		for n := range r.Sent {
			names = append(names, n)
		}
		sort.Strings(names)
	}
	for _, n := range names {
		i := tab.index(n)
		if i < 0 {
			h.Skipped = append(h.Skipped, n)
			continue
		}
		want[i] = r.Sent[n]
	}
	for n, v := range set {
		i := tab.index(n)
		switch {
		case i < 0:
			return nil, fmt.Errorf("%w: %s has no column %s", ErrNoColumn, tab.Local, n)
		case r.Op == protocol.Delete:
			return nil, fmt.Errorf("%w: a delete has no values", ErrNoColumn)
		case slices.Contains(tab.key, i) && r.Op != protocol.Insert:
			return nil, fmt.Errorf("%w: %s is the key, and the row has it", ErrNoColumn, n)
		case slices.Contains(tab.key, i) && v == nil:
			return nil, fmt.Errorf("%w: %s is the key, it cannot be null", ErrNoColumn, n)
		}
		want[i] = v
	}
	return want, nil
}
