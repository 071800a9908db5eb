package device

import (
	"context"
	"fmt"
	"time"

	"github.com/waystage/waystage/protocol"
)

// refused follows the refusal of a session as a whole. again tells that the sync goes on.
func (d *Device) refused(ctx context.Context, sess *session, e *protocol.Error) (again bool, err error) {
	err = d.write(ctx, func(t *txn) error {
		open, err := t.openSession()
		if err != nil {
			return err
		}
		if open == nil || open.token() != sess.token() || open.Nonce != sess.Nonce {
			again = true // another process has dealt with it
			return nil
		}
		switch e.Code {
		case protocol.CodeForked, protocol.CodeEpoch:
			again = true
			return t.fork(e.Code == protocol.CodeEpoch)
		case protocol.CodeBusy, protocol.CodeInternal, protocol.CodeBlocked, protocol.CodeSeries, protocol.CodeSessionOpen:
			return nil // the session stays as it is
		case protocol.CodeTooBig:
			if sess.Records > 0 { // the server takes less than we thought
				again = true
				whole, err := t.rejectWhole(sess, e)
				if err != nil || whole {
					return err
				}
				if err := t.exec(`UPDATE _ws_state SET most_changes = ?`, max(sess.Records/4, 1)); err != nil {
					return err
				}
			}
		case protocol.CodeOutside: // the other sets go on; the edits are unsent again
			again = true
			now := time.Now()
			until := now.Add(max(time.Duration(e.Retry)*time.Second, time.Second))
			if err := t.exec(`UPDATE _ws_set SET todo = 0, closed_at = ?, closed_until = ? WHERE name = ?`, now.Unix(), until.Unix(), sess.Set); err != nil {
				return err
			}
		case protocol.CodeUnknownSet:
			again = true
			if err := t.thaw(sess); err != nil {
				return err
			}
			if err := t.capture(false); err != nil {
				return err
			}
			if err := t.exec(`UPDATE _ws_set SET gone = 1, todo = 0, cursor = '', hash = '' WHERE name = ?`, sess.Set); err != nil {
				return err
			}
			if err := t.dropGone(); err != nil {
				return err
			}
			return t.capture(true)
		}
		return t.thaw(sess)
	})
	return again, err
}

// rejectWhole rejects on the device what a session carries that is too big for the server and cannot be made smaller:
// one record, or one unit. It would hold up everything after it for ever.
func (t *txn) rejectWhole(sess *session, e *protocol.Error) (bool, error) {
	req, err := sess.Payload.request()
	if err != nil || !indivisible(req) {
		return false, err
	}
	c, err := t.load()
	if err != nil {
		return false, err
	}
	ids := make([]int64, len(req.Changes))
	for i, ch := range req.Changes {
		if tab := c.tables[ch.Table]; tab != nil {
			if ids[i], err = t.marked(tab, sess.N, i); err != nil {
				return false, err
			}
		}
	}
	if err := t.thaw(sess); err != nil {
		return false, err
	}
	if err := t.capture(false); err != nil {
		return false, err
	}
	unit, err := t.tick()
	if err != nil {
		return false, err
	}
	for i, ch := range req.Changes {
		if ids[i] == 0 {
			continue
		}
		tab := c.tables[ch.Table]
		d, err := t.dirty(tab, ids[i])
		if err != nil {
			return false, err
		}
		live, err := t.live(tab, d.key)
		if err != nil {
			return false, err
		}
		if tab.undone(d, live) {
			err = t.restore(tab, d)
		} else {
			err = t.rejectHere(sess.Set, tab, d, live, -unit, protocol.CodeTooBig, e.Message)
		}
		if err != nil {
			return false, err
		}
	}
	for _, tab := range c.order {
		if err := t.unpark(tab); err != nil {
			return false, err
		}
	}
	return true, t.capture(true)
}

// thaw undoes the freeze of a session that the server refused before it took anything of it: its edits are unsent
// again, and its number is free.
func (t *txn) thaw(sess *session) error {
	c, err := t.load()
	if err != nil {
		return err
	}
	if err := t.regroup(c, sess); err != nil {
		return err
	}
	for _, tab := range c.order {
		if err := t.exec("UPDATE "+quote(tab.shadow())+" SET batch = NULL, idx = NULL WHERE batch = ?", sess.N); err != nil {
			return err
		}
	}
	for _, q := range []string{
		`DELETE FROM _ws_record WHERE incarnation = ? AND n = ?`,
		`DELETE FROM _ws_receipt WHERE incarnation = ? AND n = ?`,
		`DELETE FROM _ws_session WHERE incarnation = ? AND n = ?`,
		`DELETE FROM _ws_outbox WHERE incarnation = ? AND n = ?`,
	} {
		if err := t.exec(q, sess.Incarnation, sess.N); err != nil {
			return err
		}
	}
	if err := t.exec(`DELETE FROM _ws_inbox`); err != nil {
		return err
	}
	return t.exec(`UPDATE _ws_state SET n = ?, open_n = NULL`, sess.N-1)
}

// fork begins a new incarnation (rules D12, D13): the numbers start again, every set is refreshed, what was frozen
// without a verdict is sent again as it was, and edits keep the versions that they were made on.
func (t *txn) fork(epoch bool) error {
	st, err := t.state()
	if err != nil {
		return err
	}
	c, err := t.load()
	if err != nil {
		return err
	}
	if epoch {
		// What had merged without reaching the source is lost with the mirror, unless it is sent again.
		for _, q := range []string{
			`UPDATE _ws_record SET state = 'sent' WHERE state = 'merged'`,
			`UPDATE _ws_receipt SET state = 'sent', merged = NULL, version = '' WHERE state = 'merged'`,
		} {
			if err := t.exec(q); err != nil {
				return err
			}
		}
	}
	type frozen struct {
		inc string
		n   int64
	}
	var again []frozen
	err = t.each(`SELECT incarnation, n FROM _ws_outbox o WHERE resend = 0
		AND EXISTS (SELECT 1 FROM _ws_record r WHERE r.incarnation = o.incarnation AND r.n = o.n AND state = 'sent') ORDER BY seq`, nil, func(scan func(...any) error) error {
		again = append(again, frozen{})
		return scan(&again[len(again)-1].inc, &again[len(again)-1].n)
	})
	if err != nil {
		return err
	}
	for _, f := range again {
		// Marks of the old numbers must not meet the new ones: they become negative, one number for each payload.
		mark, err := t.tick()
		if err != nil {
			return err
		}
		if err := t.exec(`UPDATE _ws_outbox SET resend = ? WHERE incarnation = ? AND n = ?`, mark, f.inc, f.n); err != nil {
			return err
		}
		if f.inc != st.Incarnation {
			continue
		}
		for _, tab := range c.order {
			if err := t.exec("UPDATE "+quote(tab.shadow())+" SET batch = ? WHERE batch = ?", -mark, f.n); err != nil {
				return err
			}
		}
	}
	if epoch {
		for _, tab := range c.order {
			if err := t.exec(fmt.Sprintf(`UPDATE %s SET sver = '%s' || sver WHERE sver <> '' AND sver NOT LIKE '%s%%'`, quote(tab.versions()), oldEpoch, oldEpoch)); err != nil {
				return err
			}
			if err := t.exec(fmt.Sprintf(`UPDATE %s SET bver = '%s' || bver WHERE bver <> '' AND bver NOT LIKE '%s%%'`, quote(tab.shadow()), oldEpoch, oldEpoch)); err != nil {
				return err
			}
		}
		if err := t.exec(`UPDATE _ws_state SET epoch = ''`); err != nil {
			return err
		}
	}
	if err := t.exec(`UPDATE _ws_state SET incarnation = ?, n = 0, open_n = NULL`, randomHex(16)); err != nil {
		return err
	}
	if err := t.exec(`UPDATE _ws_set SET cursor = '', todo = 1 - gone`); err != nil {
		return err
	}
	if err := t.exec(`DELETE FROM _ws_inbox`); err != nil {
		return err
	}
	return t.sweepOutbox()
}
