package device

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/waystage/waystage/protocol"
)

// States of a record on its way, in their order; then protocol.Merged, and at last protocol.Applied, Rejected or Refused.
const (
	Unsent   = "unsent"   // no session carries it
	Sent     = "sent"     // frozen in a session; whether that has arrived is not known
	Received = "received" // in the server's queue
	Staged   = "staged"   // in the server's staging tables: the merge will decide
)

// Receipt is the way of one record. Times that have not come, or were not told, are zero: a record may be told applied
// at once.
type Receipt struct {
	Session      string             `json:"session,omitempty"` // token; empty while unsent, with number 0 for what the device itself refused
	Index        int64              `json:"index"`
	Set          string             `json:"set,omitempty"`
	Table        string             `json:"table"`
	Op           string             `json:"op"`
	Key          []*string          `json:"key"`
	Unit         int64              `json:"unit,omitempty"` // the device's transaction, in the session
	State        string             `json:"state"`
	Edited       time.Time          `json:"edited,omitzero"`   // first touched by the user
	Frozen       time.Time          `json:"frozen,omitzero"`   // put into the session
	Received     time.Time          `json:"received,omitzero"` // the device had the queue's receipt
	Staged       time.Time          `json:"staged,omitzero"`   // the device was told, at the latest by the reply
	Merged       time.Time          `json:"merged,omitzero"`   // the device was told
	Final        time.Time          `json:"final,omitzero"`    // the device was told
	Version      string             `json:"version,omitempty"` // merged, applied: that the row has by it
	Code         protocol.Code      `json:"code,omitempty"`    // rejected, refused: why
	Detail       string             `json:"detail,omitempty"`
	Constraint   string             `json:"constraint,omitempty"`
	Policy       string             `json:"policy,omitempty"` // merged, applied: the conflict policy that took it although somebody else had changed the row
	ID           int64              `json:"id,omitempty"`     // number in the server's log
	Right        map[string]*string `json:"right,omitempty"`  // rejected, refused: what the server had instead; null: no such row
	RightVersion string             `json:"right_version,omitempty"`
	Entry        int64              `json:"entry,omitempty"`    // in the rejected log
	Handling     string             `json:"handling,omitempty"` // of that entry: open, resubmitted, restored, discarded, settled
}

// LogFilter chooses records; zero fields choose all.
type LogFilter struct {
	Table string    // "schema.table"
	State string    // unsent, sent, received, staged, merged, applied, rejected or refused
	Since time.Time // something was heard of it from this time on
	Limit int       // at most so many; 0: all
}

var receiptStates = []string{Unsent, Sent, Received, Staged, protocol.Merged, protocol.Applied, protocol.Rejected, protocol.Refused}

// Log reads what has become of each edit: unsent ones first, then what was sent, the newest session first. Final ones
// are kept for a while (see Retention).
func (d *Device) Log(ctx context.Context, f LogFilter) (l []Receipt, err error) {
	if f.State != "" && !slices.Contains(receiptStates, f.State) {
		return nil, fmt.Errorf("device: %q is no state of a record: %v", f.State, receiptStates)
	}
	err = d.read(ctx, func(t *txn) error {
		c, err := t.load()
		if err != nil {
			return err
		}
		l = nil
		if f.State == "" || f.State == Unsent {
			if err := t.unsentReceipts(c, f, &l); err != nil {
				return err
			}
		}
		return t.receipts(f, &l)
	})
	if f.Limit > 0 && len(l) > f.Limit {
		l = l[:f.Limit]
	}
	return l, err
}

func (t *txn) unsentReceipts(c *catalogue, f LogFilter, l *[]Receipt) error {
	for _, tab := range c.order {
		if f.Table != "" && f.Table != tab.Wire {
			continue
		}
		ids, err := t.unsent(tab)
		if err != nil {
			return err
		}
		for _, id := range ids {
			dr, err := t.dirty(tab, id)
			if err != nil {
				return err
			}
			live, err := t.live(tab, dr.key)
			if err != nil {
				return err
			}
			at := time.Unix(dr.touched, 0).UTC()
			if tab.undone(dr, live) || at.Before(f.Since) {
				continue
			}
			*l = append(*l, Receipt{Table: tab.Wire, Op: operation(dr, live), Key: tab.toWire(tab.key, dr.key), State: Unsent, Edited: at})
		}
	}
	return nil
}

// operation is what was done to a dirty row.
func operation(d *dirty, live []any) string {
	switch {
	case live == nil:
		return protocol.Delete
	case !d.base:
		return protocol.Insert
	}
	return protocol.Update
}

func (t *txn) receipts(f LogFilter, l *[]Receipt) error {
	const state = `CASE WHEN r.state <> 'sent' THEN r.state WHEN s.staged IS NOT NULL THEN 'staged' WHEN s.received IS NOT NULL THEN 'received' ELSE 'sent' END`
	q, args := `SELECT r.incarnation, r.n, r.idx, coalesce(s.set_name, j.set_name, ''), r.wire, r.op, r.key, r.unit, `+state+`, r.edited, s.frozen, s.received, s.staged, r.merged, r.final,
		r.version, r.code, r.detail, r.constraint_name, r.id, r.policy, j.right, coalesce(j.right_version, ''), coalesce(j.entry, 0), coalesce(j.handling, '')
		FROM _ws_receipt r LEFT JOIN _ws_session s ON s.incarnation = r.incarnation AND s.n = r.n
		LEFT JOIN _ws_rejected j ON j.incarnation = r.incarnation AND j.n = r.n AND j.idx = r.idx WHERE 1`, []any{}
	if f.Table != "" {
		q, args = q+` AND r.wire = ?`, append(args, f.Table)
	}
	if f.State != "" {
		q, args = q+` AND `+state+` = ?`, append(args, f.State)
	}
	if !f.Since.IsZero() {
		q, args = q+` AND coalesce(r.final, r.merged, s.staged, s.received, s.frozen) >= ?`, append(args, f.Since.UnixMilli())
	}
	q += ` ORDER BY coalesce(s.frozen, r.final) DESC, r.n DESC, r.idx`
	if f.Limit > 0 {
		q, args = q+` LIMIT ?`, append(args, f.Limit)
	}
	return t.each(q, args, func(scan func(...any) error) error {
		var r Receipt
		var inc, key string
		var n int64
		var edited, frozen, received, staged, merged, final sql.NullInt64
		var right sql.NullString
		if err := scan(&inc, &n, &r.Index, &r.Set, &r.Table, &r.Op, &key, &r.Unit, &r.State, &edited, &frozen, &received, &staged, &merged, &final,
			&r.Version, &r.Code, &r.Detail, &r.Constraint, &r.ID, &r.Policy, &right, &r.RightVersion, &r.Entry, &r.Handling); err != nil {
			return err
		}
		r.Session = protocol.SessionToken(inc, n)
		for _, x := range []struct {
			ms   sql.NullInt64
			into *time.Time
		}{{edited, &r.Edited}, {frozen, &r.Frozen}, {received, &r.Received}, {staged, &r.Staged}, {merged, &r.Merged}, {final, &r.Final}} {
			if x.ms.Valid && x.ms.Int64 > 0 {
				*x.into = time.UnixMilli(x.ms.Int64).UTC()
			}
		}
		if err := json.Unmarshal([]byte(key), (*values)(&r.Key)); err != nil {
			return err
		}
		if right.Valid {
			if err := json.Unmarshal([]byte(right.String), (*image)(&r.Right)); err != nil {
				return err
			}
		}
		*l = append(*l, r)
		return nil
	})
}

func now() int64 { return time.Now().UnixMilli() }

// receipt begins the way of a record.
func (t *txn) receipt(incarnation string, n, idx int64, ch protocol.Change, edited int64) error {
	key, err := jsonText(values(ch.Key))
	if err != nil {
		return err
	}
	_, err = t.run(`INSERT INTO _ws_receipt (incarnation, n, idx, wire, op, key, unit, edited, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'sent')`,
		incarnation, n, idx, ch.Table, ch.Op, key.String, ch.Unit, edited)
	return err
}

// reached notes that a session has come to a hop, "received" or "staged", and to those before it.
func (t *txn) reached(sess *session, hop string) error {
	q := `UPDATE _ws_session SET received = coalesce(received, ?)`
	args := []any{now()}
	if hop == "staged" {
		q, args = q+`, staged = coalesce(staged, ?)`, append(args, args[0])
	}
	return t.exec(q+` WHERE incarnation = ? AND n = ?`, append(args, sess.Incarnation, sess.N)...)
}

// told notes a verdict.
func (t *txn) told(incarnation string, n, idx int64, v protocol.Verdict) error {
	when := "final"
	if v.State == protocol.Merged {
		when = "merged"
	}
	_, err := t.run(`UPDATE _ws_receipt SET state = ?, `+when+` = ?, version = ?, code = ?, detail = ?, constraint_name = ?, id = ?, policy = ? WHERE incarnation = ? AND n = ? AND idx = ?`,
		v.State, now(), v.Version, string(v.Code), v.Detail, v.Constraint, v.ID, v.Policy, incarnation, n, idx)
	return err
}

// Retention says how long the file keeps what is only for people to read. It is kept in the file: every program that
// opens it goes by it. Zero fields are the defaults.
type Retention struct {
	Rejects  time.Duration `json:"rejects"`  // entries of the rejected log, from when they were dealt with; open ones stay. Default 30 days
	Receipts time.Duration `json:"receipts"` // records, from when they were final. Default 30 days
	Syncs    int           `json:"syncs"`    // reports of syncs. Default 200
}

var usualRetention = Retention{Rejects: 30 * 24 * time.Hour, Receipts: 30 * 24 * time.Hour, Syncs: 200}

// Retention reads what is in force.
func (d *Device) Retention(ctx context.Context) (r Retention, err error) {
	err = d.read(ctx, func(t *txn) error {
		r, err = t.retention()
		return err
	})
	return r, err
}

// SetRetention changes it. What is kept too long then goes with the next sync.
func (d *Device) SetRetention(ctx context.Context, r Retention) error {
	if r.Rejects < 0 || r.Receipts < 0 || r.Syncs < 0 {
		return fmt.Errorf("device: nothing can be kept for less than no time: %+v", r)
	}
	return d.write(ctx, func(t *txn) error {
		return t.exec(`UPDATE _ws_state SET keep_rejects = ?, keep_receipts = ?, keep_syncs = ?`, r.Rejects.Milliseconds(), r.Receipts.Milliseconds(), r.Syncs)
	})
}

func (t *txn) retention() (Retention, error) {
	r := usualRetention
	var rejects, receipts int64
	var syncs int
	if err := t.get(`SELECT keep_rejects, keep_receipts, keep_syncs FROM _ws_state`, nil, &rejects, &receipts, &syncs); err != nil {
		return r, err
	}
	if rejects > 0 {
		r.Rejects = time.Duration(rejects) * time.Millisecond
	}
	if receipts > 0 {
		r.Receipts = time.Duration(receipts) * time.Millisecond
	}
	if syncs > 0 {
		r.Syncs = syncs
	}
	return r, nil
}

// prune forgets what was kept long enough; newest is the id of the newest report.
func (t *txn) prune(newest int64) error {
	r, err := t.retention()
	if err != nil {
		return err
	}
	at := time.Now()
	if err := t.exec(`DELETE FROM _ws_log WHERE id <= ?`, newest-int64(r.Syncs)); err != nil {
		return err
	}
	if err := t.exec(`DELETE FROM _ws_rejected WHERE handled IS NOT NULL AND handled < ?`, at.Add(-r.Rejects).Unix()); err != nil {
		return err
	}
	if err := t.exec(`DELETE FROM _ws_receipt WHERE final IS NOT NULL AND final < ?`, at.Add(-r.Receipts).UnixMilli()); err != nil {
		return err
	}
	return t.exec(`DELETE FROM _ws_session WHERE frozen < ? AND NOT EXISTS (SELECT 1 FROM _ws_receipt r WHERE r.incarnation = _ws_session.incarnation AND r.n = _ws_session.n)`,
		at.Add(-r.Receipts).UnixMilli())
}
