package device

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"time"

	"github.com/waystage/waystage/protocol"
)

// Status is how the file stands.
type Status struct {
	User        string      `json:"user,omitempty"`
	Device      string      `json:"device,omitempty"`
	Servers     []string    `json:"servers,omitempty"`
	Enrolled    bool        `json:"enrolled"`
	Fingerprint string      `json:"fingerprint,omitempty"` // of the device's key, as 'waystage devices show' prints it
	KeyAt       time.Time   `json:"key_at,omitzero"`       // since when it is that one
	Incarnation string      `json:"incarnation"`
	N           int64       `json:"n"`              // number of the last session
	Epoch       string      `json:"epoch"`          // of the mirror that the file follows
	Open        string      `json:"open,omitempty"` // token of the session that is not finished
	OpenSet     string      `json:"open_set,omitempty"`
	Unfinished  bool        `json:"unfinished"` // the last sync was broken off: the next goes on from there
	Sets        []SetStatus `json:"sets"`
	Unsent      int         `json:"unsent"`   // edits that no session carries
	Sent        int         `json:"sent"`     // edits on their way to the merge
	Merged      int         `json:"merged"`   // edits in the mirror, waiting for the source
	Rejects     int         `json:"rejects"`  // open entries of the rejected log
	Problems    []string    `json:"problems"` // of the capture
}

// SetStatus is how one subscription set stands.
type SetStatus struct {
	Name     string        `json:"name"`
	SyncedAt time.Time     `json:"synced_at,omitzero"`    // zero: never
	Done     bool          `json:"done"`                  // false: still to do in an unfinished sync
	Closed   time.Time     `json:"closed_until,omitzero"` // the server takes no session of it before that
	Tables   []TableStatus `json:"tables"`
}

// TableStatus is how one table stands.
type TableStatus struct {
	Name  string `json:"name"`  // at the server, "schema.table"
	Local string `json:"local"` // in the file
	Rows  int64  `json:"rows"`
}

// Status looks.
func (d *Device) Status(ctx context.Context) (s Status, err error) {
	err = d.read(ctx, func(t *txn) error {
		st, err := t.state()
		if err != nil {
			return err
		}
		s = Status{User: st.User, Device: st.Device, Enrolled: len(st.Seed) > 0, Incarnation: st.Incarnation, N: st.N, Epoch: st.Epoch, Unfinished: st.Running}
		if len(st.Seed) > 0 {
			public, err := publicKey(st.Seed)
			if err != nil {
				return err
			}
			s.Fingerprint = protocol.Fingerprint(public)
			if st.KeyAt > 0 {
				s.KeyAt = time.UnixMilli(st.KeyAt).UTC()
			}
		}
		if st.Servers != "" {
			if err := json.Unmarshal([]byte(st.Servers), &s.Servers); err != nil {
				return err
			}
		}
		open, err := t.openSession()
		if err != nil {
			return err
		}
		if open != nil {
			s.Open, s.OpenSet, s.Unfinished = open.token(), open.Set, true
		}
		c, err := t.load()
		if err != nil {
			return err
		}
		for _, x := range c.sets {
			if x.Gone {
				continue
			}
			ss := SetStatus{Name: x.Name, Done: x.Todo == 0, Closed: x.closed(time.Now())}
			if x.SyncedAt > 0 {
				ss.SyncedAt = time.Unix(x.SyncedAt, 0).UTC()
			}
			for _, m := range x.Tables {
				ts := TableStatus{Name: m.Wire, Local: m.Local}
				if err := t.get("SELECT count(*) FROM "+quote(m.versions()), nil, &ts.Rows); err != nil {
					return err
				}
				ss.Tables = append(ss.Tables, ts)
			}
			s.Sets = append(s.Sets, ss)
		}
		p, err := d.pending(t, c)
		if err != nil {
			return err
		}
		for _, e := range p {
			switch e.State {
			case Unsent:
				s.Unsent++
			case Sent:
				s.Sent++
			case protocol.Merged:
				s.Merged++
			}
		}
		for _, tab := range c.order {
			hash, _, err := t.installed(tab)
			if err != nil {
				return err
			}
			if hash != tab.capture {
				s.Problems = append(s.Problems, "table "+tab.Local+": the capture triggers are not as installed; see Repair")
			}
		}
		return t.get(`SELECT count(*) FROM _ws_rejected WHERE handling = 'open'`, nil, &s.Rejects)
	})
	return s, err
}

// Edit is a local change without a final outcome.
type Edit struct {
	Table   string             `json:"table"` // at the server
	Local   string             `json:"local"`
	Op      string             `json:"op"`
	Key     []*string          `json:"key"`
	State   string             `json:"state"`
	Session string             `json:"session,omitempty"`
	Since   time.Time          `json:"since,omitzero"`
	Base    map[string]*string `json:"base,omitempty"` // what it was made on
	Now     map[string]*string `json:"now,omitempty"`  // what the row is; for merged edits what was sent
}

// Pending lists the edits without a final outcome: unsent, sent, and merged ones that wait for the source.
func (d *Device) Pending(ctx context.Context) (l []Edit, err error) {
	err = d.read(ctx, func(t *txn) error {
		c, err := t.load()
		if err != nil {
			return err
		}
		l, err = d.pending(t, c)
		return err
	})
	return l, err
}

func (d *Device) pending(t *txn, c *catalogue) (l []Edit, err error) {
	for _, tab := range c.order {
		ids, err := t.ids(tab)
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			dr, err := t.dirty(tab, id)
			if err != nil {
				return nil, err
			}
			live, err := t.live(tab, dr.key)
			if err != nil {
				return nil, err
			}
			e := Edit{Table: tab.Wire, Local: tab.Local, Key: tab.toWire(tab.key, dr.key), State: Unsent, Since: time.Unix(dr.touched, 0).UTC(), Base: tab.image(dr.baseRow), Now: tab.image(live)}
			e.Op = operation(dr, live)
			if dr.batch.Valid {
				e.State = Sent
			} else if tab.undone(dr, live) {
				continue // put back by the user
			}
			l = append(l, e)
		}
	}
	type record struct {
		inc string
		n   int64
		idx int
	}
	var merged []record
	err = t.each(`SELECT incarnation, n, idx FROM _ws_record WHERE state = 'merged' ORDER BY incarnation, n, idx`, nil, func(scan func(...any) error) error {
		merged = append(merged, record{})
		r := &merged[len(merged)-1]
		return scan(&r.inc, &r.n, &r.idx)
	})
	if err != nil {
		return nil, err
	}
	j := &judge{t: t, c: c, frozen: map[string]*protocol.Request{}}
	for _, r := range merged {
		req, _, err := j.request(r.inc, r.n)
		if errors.Is(err, sql.ErrNoRows) || err == nil && r.idx >= len(req.Changes) {
			continue
		}
		if err != nil {
			return nil, err
		}
		f := frozen{Change: req.Changes[r.idx]}
		f.columns = columnsOf(req, f.Table)
		e := Edit{Table: f.Table, Op: f.Op, Key: f.Key, State: protocol.Merged, Session: protocol.SessionToken(r.inc, r.n), Base: f.image(f.Base), Now: f.image(f.New)}
		if tab := c.tables[f.Table]; tab != nil {
			e.Local = tab.Local
		}
		l = append(l, e)
	}
	return l, nil
}

// Syncs reads the reports of the last syncs, newest first.
func (d *Device) Syncs(ctx context.Context) (l []Report, err error) {
	err = d.read(ctx, func(t *txn) error {
		return t.each(`SELECT id, report FROM _ws_log ORDER BY id DESC`, nil, func(scan func(...any) error) error {
			var id int64
			var text string
			if err := scan(&id, &text); err != nil {
				return err
			}
			var r Report
			if err := json.Unmarshal([]byte(text), &r); err != nil {
				return err
			}
			r.ID = id
			l = append(l, r)
			return nil
		})
	})
	return l, err
}
