package device

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/protocol"
)

// actor is one device in the state machine, with the user's memory of what he wrote.
type actor struct {
	name string
	path string
	d    *Device
	cut  int  // calls until the connection breaks, before or after the call's effect; 0: it holds
	late bool // the break comes after the effect

	refuse  bool // the server takes nothing of the next session that it has not seen
	offered string

	mine     map[string]wrote // the user's last edit of a row, while it has no outcome
	groups   *grouping
	restored bool
	backup   string
	memory   map[string]wrote // mine at the time of the backup
	grouped  *grouping        // groups then
}

// wrote is an edit and what stood there when it was made.
type wrote struct{ img, base image }

type machine struct {
	t      *rapid.T
	srv    *memServer
	dir    string
	actors []*actor
	open   []int64
	edits  int
	epochs int
	trace  []string

	transactions int
}

func (m *machine) say(format string, args ...any) {
	m.trace = append(m.trace, fmt.Sprintf(format, args...))
}

func (m *machine) Helper() {}
func (m *machine) Fatalf(format string, args ...any) {
	m.t.Fatalf("%s\ntrace:\n  %s", fmt.Sprintf(format, args...), strings.Join(m.trace, "\n  "))
}

func (m *machine) openFile(a *actor) {
	d, err := Open(context.Background(), a.path, Options{MostChanges: 3, PartSize: 300, Encoding: "none", Dial: func(context.Context, Login) (Transport, error) {
		return &wire{s: m.srv, device: a.name, fail: func(call string, after bool) error {
			if call == "put" && !after {
				m.frozen(a)
				if e := m.refusal(a); e != nil {
					return e
				}
			}
			if a.cut == 0 || after != a.late {
				return nil
			}
			if a.cut--; a.cut == 0 {
				a.cut = 1 // it stays broken for this sync
				return errCut
			}
			return nil
		}}, nil
	}})
	if err != nil {
		m.Fatalf("open: %v", err)
	}
	d.patience, d.durability = impatient, "OFF" // what is tested is order, not the disk
	a.d = d
}

// refusal is the server's answer to a session of which it takes nothing.
func (m *machine) refusal(a *actor) error {
	s, err := m.openSession(a)
	if err != nil || s == nil {
		return err
	}
	first := a.offered != s.token()+s.Nonce
	a.offered = s.token() + s.Nonce
	if !a.refuse || !first {
		return nil
	}
	a.refuse = false
	a.groups.thawed()
	code := protocol.CodeMalformed
	if s.Records%2 == 0 {
		code = protocol.CodeTooBig
	}
	m.say("%s: the server refuses session %d with %d records: %s", a.name, s.N, s.Records, code)
	return &protocol.Error{Code: code, Message: "no"}
}

func (m *machine) openSession(a *actor) (s *session, err error) {
	err = a.d.read(context.Background(), func(tx *txn) error {
		s, err = tx.openSession()
		return err
	})
	return s, err
}

func (m *machine) reopen(a *actor) {
	_ = a.d.Close()
	m.openFile(a)
}

// statement is one thing that the user does.
func (m *machine) statement(a *actor) (table, q string, args []any) {
	t := m.t
	m.edits++
	val := fmt.Sprintf("%s%d", a.name, m.edits)
	table = "public.item"
	id := rapid.IntRange(1, 4).Draw(t, "id")
	grp := rapid.SampledFrom([]int{1, 1, 2, 3}).Draw(t, "grp")
	switch rapid.IntRange(0, 9).Draw(t, "edit") {
	case 0, 1:
		q, args = `INSERT OR IGNORE INTO item VALUES (?, ?, ?)`, []any{id, grp, val}
	case 2, 3:
		q, args = `UPDATE item SET val = ? WHERE id = ?`, []any{val, id}
	case 4:
		q, args = `UPDATE item SET grp = ? WHERE id = ?`, []any{grp, id}
	case 5:
		q, args = `DELETE FROM item WHERE id = ?`, []any{id}
	case 6:
		q, args = `INSERT OR REPLACE INTO item VALUES (?, ?, ?)`, []any{id, grp, rapid.SampledFrom([]string{val, val, "bad"}).Draw(t, "val")}
	case 7:
		q, args = `UPDATE OR REPLACE item SET id = ? WHERE id = ?`, []any{rapid.IntRange(1, 4).Draw(t, "to"), id}
	case 8:
		table, q, args = "public.note", `INSERT INTO note VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET done = excluded.done, weight = excluded.weight`,
			[]any{fmt.Sprintf("ñ %d", id), rapid.IntRange(0, 1).Draw(t, "done"), float64(m.edits) / 4, []byte{byte(m.edits), 0, 255}}
	case 9:
		table, q, args = "public.note", `DELETE FROM note WHERE id = ?`, []any{fmt.Sprintf("ñ %d", id)}
	}
	return table, q, args
}

// edit is one statement, or some in one transaction.
func (m *machine) edit(a *actor) {
	n := max(rapid.IntRange(-2, 4).Draw(m.t, "statements"), 0) // 0: not in a transaction
	before := map[string]map[string]image{"public.item": m.view(a, "public.item"), "public.note": m.view(a, "public.note")}
	run := func(db interface {
		Exec(string, ...any) (sql.Result, error)
	}) error {
		_, q, args := m.statement(a)
		_, err := db.Exec(q, args...)
		m.say("%s: %s %v: %v", a.name, q, args, err)
		return err
	}
	var err error
	if n == 0 {
		err = run(a.d.db)
	} else {
		err = a.d.Transaction(context.Background(), func(tx *sql.Tx) error {
			m.say("%s: a transaction of %d statements", a.name, n)
			for range n {
				if err := run(tx); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		if strings.Contains(err.Error(), "no such table") {
			return // not synced yet
		}
		m.Fatalf("%v", err)
	}
	m.transactions++
	for table, was := range before {
		now := m.view(a, table)
		for k := range union(was, now) {
			if n > 0 && !imgEqual(was[k], now[k]) {
				a.groups.add(table+" "+k, m.transactions)
			}
		}
		m.remember(a, table, was)
	}
}

// undo puts a dirty row back to what it was.
func (m *machine) undo(a *actor) {
	before := m.view(a, "public.item")
	err := a.d.write(context.Background(), func(tx *txn) error {
		c, err := tx.load()
		if err != nil || c.tables["public.item"] == nil {
			return err
		}
		tab := c.tables["public.item"]
		ids, err := tx.ids(tab)
		if err != nil || len(ids) == 0 {
			return err
		}
		d, err := tx.dirty(tab, rapid.SampledFrom(ids).Draw(m.t, "undo"))
		if err != nil {
			return err
		}
		m.say("%s: undoes %v", a.name, d.key)
		if !d.base {
			return tx.remove(tab, d.key)
		}
		return tx.put(tab, tab.all(), d.baseRow)
	})
	if err != nil {
		m.Fatalf("undo: %v", err)
	}
	m.remember(a, "public.item", before)
}

func (m *machine) view(a *actor, table string) map[string]image { return images(m, a.d, table) }

// remember notes which rows the user has just changed, and to what.
func (m *machine) remember(a *actor, table string, before map[string]image) {
	now := m.view(a, table)
	base := map[string]image{}
	p, err := a.d.Pending(context.Background())
	if err != nil {
		m.Fatalf("pending: %v", err)
	}
	dirty := map[string]bool{}
	for _, e := range p {
		if e.State != protocol.Merged {
			dirty[e.Table+" "+keyOf(e.Key)] = true
			base[e.Table+" "+keyOf(e.Key)] = e.Base
		}
	}
	for k := range union(before, now) {
		if imgEqual(before[k], now[k]) {
			continue
		}
		full := table + " " + k
		if !dirty[full] { // put back to the base: nothing to carry
			delete(a.mine, full)
			continue
		}
		a.mine[full] = wrote{now[k], base[full]}
	}
}

func union(a, b map[string]image) map[string]bool {
	u := map[string]bool{}
	for k := range a {
		u[k] = true
	}
	for k := range b {
		u[k] = true
	}
	return u
}

// sync runs one sync, perhaps broken off or crashed.
func (m *machine) sync(a *actor, faults bool) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	o := SyncOptions{}
	a.cut, a.refuse = 0, false
	crash := false
	if faults {
		switch rapid.IntRange(0, 5).Draw(m.t, "fault") {
		case 0, 1:
			a.cut, a.late = rapid.IntRange(1, 12).Draw(m.t, "cut"), rapid.Bool().Draw(m.t, "after")
		case 3:
			a.refuse = rapid.IntRange(0, 2).Draw(m.t, "refuse session") == 0
		case 2:
			n := rapid.IntRange(1, 25).Draw(m.t, "cancel")
			o.Progress = func(Progress) {
				if n--; n == 0 {
					cancel()
				}
			}
		}
		crash = rapid.IntRange(0, 3).Draw(m.t, "crash") == 0
	}
	rep, err := a.d.Sync(ctx, o)
	m.say("%s: sync cut=%d: sent %d merged %d applied %d rejected %d rows %d deleted %d forked %v resumed %v: %v", a.name, a.cut, rep.Sent, rep.Merged, rep.Applied, rep.Rejected, rep.Rows, rep.Deleted, rep.Forked, rep.Resumed, err)
	a.refuse = false
	if err != nil && !errors.Is(err, errCut) && !errors.Is(err, ErrRefused) && !errors.Is(err, context.Canceled) && !strings.Contains(err.Error(), "interrupted") {
		m.Fatalf("sync: %v", err)
	}
	a.cut = 0
	if crash {
		m.reopen(a)
	}
}

// check holds in every state.
func (m *machine) check() {
	m.srv.mu.Lock()
	problems := m.srv.problems
	m.srv.mu.Unlock()
	if len(problems) > 0 {
		m.Fatalf("%s", strings.Join(problems, "\n"))
	}
	for _, a := range m.actors {
		for _, table := range []string{"public.item", "public.note"} {
			m.checkTable(a, table)
		}
		m.frozen(a)
		m.settleGroups(a)
	}
}

func (m *machine) checkTable(a *actor, wire string) {
	live := m.view(a, wire)
	err := a.d.read(context.Background(), func(tx *txn) error {
		c, err := tx.load()
		if err != nil || c.tables[wire] == nil {
			return err
		}
		tab := c.tables[wire]
		dirty := map[string]bool{}
		ids, err := tx.ids(tab)
		if err != nil {
			return err
		}
		for _, id := range ids {
			d, err := tx.dirty(tab, id)
			if err != nil {
				return err
			}
			k := keyOf(tab.toWire(tab.key, d.key))
			dirty[k] = true
			sver, _, err := tx.version(tab, d.key)
			if err != nil {
				return err
			}
			img, err := tx.serverImage(tab, d.key)
			if err != nil {
				return err
			}
			if (sver == "") != (img == nil) || sver != "" && !imgEqual(m.srv.history[wire+" "+k+" "+strings.TrimPrefix(sver, oldEpoch)], img) {
				m.Fatalf("%s %s %s: dirty, server image %s at version %s, which was %s", a.name, wire, k, show(img), sver, show(m.srv.history[wire+" "+k+" "+strings.TrimPrefix(sver, oldEpoch)]))
			}
		}
		// A clean row is exactly the image that the server gave under its version.
		keys, err := tx.keys(tab, "SELECT "+tab.sql.keys+" FROM "+quote(tab.versions()))
		if err != nil {
			return err
		}
		known := map[string]bool{}
		for _, key := range keys {
			k := keyOf(tab.toWire(tab.key, key))
			known[k] = true
			if dirty[k] {
				continue
			}
			sver, _, err := tx.version(tab, key)
			if err != nil {
				return err
			}
			if want := m.srv.history[wire+" "+k+" "+strings.TrimPrefix(sver, oldEpoch)]; !imgEqual(live[k], want) {
				m.Fatalf("%s %s %s: clean at version %s, but %s instead of %s", a.name, wire, k, sver, show(live[k]), show(want))
			}
		}
		for k := range live {
			if !dirty[k] && !known[k] {
				m.Fatalf("%s %s %s: clean, but no version is known of it", a.name, wire, k)
			}
		}
		return nil
	})
	if err != nil {
		m.Fatalf("check: %v", err)
	}
	// No edit goes without an outcome.
	var rejects []Reject
	for full, w := range a.mine {
		img := w.img
		k, ok := strings.CutPrefix(full, wire+" ")
		if !ok || imgEqual(live[k], img) {
			continue
		}
		if rejects == nil {
			if rejects, err = a.d.Rejects(context.Background()); err != nil {
				m.Fatalf("rejects: %v", err)
			}
		}
		logged := slices.ContainsFunc(rejects, func(r Reject) bool {
			// Putting an edit back while it travels is an edit if it was accepted, and nothing if it was not.
			return r.Table == wire && keyOf(r.Key) == k && (imgEqual(r.Sent, img) || imgEqual(w.base, img))
		})
		accepted := false
		for _, v := range m.srv.all {
			if v.device == a.name && v.Table == wire && keyOf(v.Key) == k && (v.State == protocol.Merged || v.State == protocol.Applied || v.State == protocol.Refused) {
				f := frozen{columns: []string{"id", "grp", "val"}}
				if wire == "public.note" {
					f.columns = []string{"id", "done", "weight", "photo"}
				}
				accepted = accepted || imgEqual(f.image(v.change.New), img)
			}
		}
		if !logged && !accepted {
			m.Fatalf("%s %s: the edit %s is gone without an outcome; the row is %s", a.name, full, show(img), show(live[k]))
		}
		delete(a.mine, full)
	}
}

// quiesce: users stop, everything is delivered. Then device == mirror, nothing is pending, and the log is the server's.
func (m *machine) quiesce() {
	m.say("users stop")
	for _, tx := range m.open {
		m.commitForeign(tx)
	}
	m.open = nil
	m.srv.lateMerge, m.srv.lag = false, 0
	for range 5 {
		m.srv.settleAll()
		for _, a := range m.actors {
			m.sync(a, false)
			m.check()
		}
	}
	for _, a := range m.actors {
		m.say("compare %s", a.name)
		m.srv.same(m, a.d)
		p, err := a.d.Pending(context.Background())
		if err != nil {
			m.Fatalf("pending: %v", err)
		}
		for _, e := range p {
			// A verdict of an earlier life of a restored file may have been told to that life only.
			if !(a.restored && e.State == protocol.Merged) {
				m.Fatalf("%s: still pending: %+v", a.name, e)
			}
		}
		rep, err := a.d.Sync(context.Background(), SyncOptions{})
		if err != nil || rep.Sent+rep.Merged+rep.Applied+rep.Rejected != 0 || rep.Rows != 0 {
			m.Fatalf("%s: traffic does not end: %+v %v", a.name, rep, err)
		}
		m.checkLog(a)
	}
}

func (m *machine) checkLog(a *actor) {
	rejects, err := a.d.Rejects(context.Background())
	if err != nil {
		m.Fatalf("rejects: %v", err)
	}
	server := map[string]*ledger{}
	for _, v := range m.srv.all {
		if v.device == a.name && (v.State == protocol.Rejected || v.State == protocol.Refused) {
			server[fmt.Sprintf("%s/%d", protocol.SessionToken(v.Incarnation, v.N), v.Index)] = v
		}
	}
	logged := map[string]bool{}
	for _, r := range rejects {
		k := fmt.Sprintf("%s/%d", r.Session, r.Index)
		if strings.HasSuffix(r.Session, "-0") {
			continue // the device's own
		}
		v := server[k]
		if v == nil || logged[k] || v.Code != r.Code || v.State != r.State || keyOf(v.Key) != keyOf(r.Key) {
			m.Fatalf("%s: log entry %+v is not the server's %+v", a.name, r, v)
		}
		logged[k] = true
	}
	if a.restored || m.epochs > 0 {
		return // what a lost life or a lost mirror knew is gone with it
	}
	for k := range server {
		if !logged[k] {
			m.Fatalf("%s: the server refused %s, the device's log does not say so", a.name, k)
		}
	}
}

func (m *machine) commitForeign(tx int64) {
	t := m.t
	m.srv.mu.Lock()
	defer m.srv.mu.Unlock()
	m.edits++
	id := fmt.Sprint(rapid.IntRange(1, 4).Draw(t, "foreign id"))
	if rapid.IntRange(0, 4).Draw(t, "foreign table") == 0 {
		key := "ñ " + id
		img := image{"id": ptr(key), "done": ptr("t"), "weight": ptr("1e+20"), "photo": nil}
		if rapid.Bool().Draw(t, "absent") {
			img = nil
		}
		m.say("foreign tx %d commits note %s %s", tx, key, show(img))
		m.srv.foreignAt(tx, "public.note", []string{key}, img)
	} else {
		img := image{"id": ptr(id), "grp": ptr(rapid.SampledFrom([]string{"1", "2", "3"}).Draw(t, "foreign grp")), "val": ptr(fmt.Sprintf("f%d", m.edits))}
		if rapid.IntRange(0, 3).Draw(t, "absent") == 0 {
			img = nil
		}
		m.say("foreign tx %d commits item %s %s", tx, id, show(img))
		m.srv.foreignAt(tx, "public.item", []string{id}, img)
	}
	m.srv.open = slices.DeleteFunc(m.srv.open, func(x int64) bool { return x == tx })
}

func (m *machine) step() {
	t := m.t
	a := rapid.SampledFrom(m.actors).Draw(t, "actor")
	switch rapid.IntRange(0, 22).Draw(t, "step") {
	case 20, 21, 22:
		m.handle(a)
	case 0, 1, 2, 3, 4:
		m.edit(a)
	case 5:
		m.undo(a)
	case 6, 7, 8, 9, 10, 11:
		m.sync(a, true)
	case 12:
		m.srv.mu.Lock()
		tx := m.srv.begin()
		m.srv.open = append(m.srv.open, tx)
		m.srv.mu.Unlock()
		m.open = append(m.open, tx)
	case 13, 14:
		if len(m.open) == 0 {
			m.srv.mu.Lock()
			tx := m.srv.begin()
			m.srv.mu.Unlock()
			m.commitForeign(tx)
			return
		}
		i := rapid.IntRange(0, len(m.open)-1).Draw(t, "tx")
		m.commitForeign(m.open[i])
		m.open = slices.Delete(m.open, i, i+1)
	case 15, 16:
		m.srv.mu.Lock()
		defer m.srv.mu.Unlock()
		if p := m.srv.pending(); len(p) > 0 {
			r := rapid.SampledFrom(p).Draw(t, "pending")
			refuse, normalise := rapid.IntRange(0, 2).Draw(t, "refuse") == 0, rapid.Bool().Draw(t, "normalise")
			m.say("source answers %s refuse=%v normalise=%v", keyOf(r.pend[0].Key), refuse, normalise)
			m.srv.verdict(r, refuse, normalise)
		}
	case 17:
		switch rapid.IntRange(0, 3).Draw(t, "server") {
		case 3:
			m.srv.mu.Lock()
			m.srv.lag = 1 - m.srv.lag
			m.srv.mu.Unlock()
			m.say("lag %d", m.srv.lag)
		case 0:
			m.srv.mu.Lock()
			m.srv.subset["2"] = !m.srv.subset["2"]
			m.say("subset %v", m.srv.subset)
			m.srv.mu.Unlock()
		case 1:
			m.srv.lateMerge = !m.srv.lateMerge
			m.srv.late()
			m.say("late merge %v", m.srv.lateMerge)
		case 2:
			// Pages expire, and an old request is delivered again.
			m.srv.mu.Lock()
			m.srv.out = map[string]map[int]Payload{}
			var tokens []string
			for k := range m.srv.seen {
				tokens = append(tokens, k)
			}
			slices.Sort(tokens)
			if len(tokens) > 0 {
				q := m.srv.seen[rapid.SampledFrom(tokens).Draw(t, "again")]
				m.say("session %d of %s delivered again", q.req.N, q.device)
				m.srv.take(q.device, q.p)
			}
			m.srv.mu.Unlock()
		}
	case 18:
		m.backupOrRestore(a)
	case 19:
		if m.epochs == 0 && rapid.IntRange(0, 3).Draw(t, "epoch") == 0 {
			m.epochs++
			m.say("the mirror is rebuilt")
			m.open = nil
			m.srv.rebuild(fmt.Sprintf("e%d", m.epochs+1))
		}
	}
}

// backupOrRestore copies a device's file, and later puts the copy in its place.
func (m *machine) backupOrRestore(a *actor) {
	if a.backup == "" {
		a.backup = a.path + ".backup"
		_ = os.Remove(a.backup)
		if _, err := a.d.db.Exec(`VACUUM INTO ?`, a.backup); err != nil {
			m.Fatalf("backup: %v", err)
		}
		a.memory, a.grouped = map[string]wrote{}, a.groups.clone()
		for k, v := range a.mine {
			a.memory[k] = v
		}
		m.say("%s: backup", a.name)
		return
	}
	_ = a.d.Close()
	for _, tail := range []string{"", "-wal", "-shm"} {
		_ = os.Remove(a.path + tail)
	}
	if err := os.Rename(a.backup, a.path); err != nil {
		m.Fatalf("restore: %v", err)
	}
	a.backup, a.mine, a.groups, a.restored = "", a.memory, a.grouped, true
	m.openFile(a)
	m.say("%s: restored", a.name)
}

// TestMachine explores random histories of two devices, the source, a network that loses and repeats, crashes,
// backups and a rebuilt mirror.
func TestMachine(t *testing.T) {
	dir := t.TempDir()
	run := 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		m := &machine{t: t, srv: newServer(nil), dir: filepath.Join(dir, fmt.Sprint(run))}
		if err := os.Mkdir(m.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		defer func() {
			for _, a := range m.actors {
				_ = a.d.Close()
			}
			_ = os.RemoveAll(m.dir)
		}()
		for _, name := range []string{"a", "b"} {
			a := &actor{name: name, path: filepath.Join(m.dir, name+".db"), mine: map[string]wrote{}, groups: newGrouping()}
			m.openFile(a)
			if err := a.d.Enrol(context.Background(), EnrolOptions{Servers: []string{"mem"}, User: "anna", Device: name}); err != nil {
				t.Fatal(err)
			}
			m.actors = append(m.actors, a)
		}
		m.srv.foreign("public.item", []string{"1"}, image{"id": ptr("1"), "grp": ptr("1"), "val": ptr("first")})
		m.srv.foreign("public.item", []string{"2"}, image{"id": ptr("2"), "grp": ptr("2"), "val": ptr("second")})
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			m.step()
			m.check()
		}
		m.quiesce()
	})
}
