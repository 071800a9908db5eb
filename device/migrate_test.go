package device

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/protocol"
)

// migration is a random history of one device whose definitions change under unsent edits, and whose process is killed between
// statements. Every value that the user writes is another one, so that it can be looked for.
type migration struct {
	t   *rapid.T
	srv *memServer
	dir string
	m   *mortal
	db  *sql.DB
	d   *Device

	during  func() // the user's doing while a reply is on its way
	calls   int    // until the connection breaks; 0: it holds
	values  int
	written map[spot]string       // the last value that the user wrote, and has not overwritten or deleted himself
	deleted map[spot]int          // rows that the user deleted (no column), with how many outcomes of deletes there were
	hidden  []protocol.Column     // columns of item that have left and may come back
	notes   *protocol.Definitions // the set when it is not there
	trace   []string

	due bool // definitions have changed since the last sync that was not killed

	kills, migrations, changed int
}

type spot struct{ table, key, column string }

func (m *migration) say(format string, args ...any) {
	m.trace = append(m.trace, fmt.Sprintf(format, args...))
}
func (m *migration) Helper() {}
func (m *migration) Fatalf(format string, args ...any) {
	m.t.Fatalf("%s\ntrace:\n  %s", fmt.Sprintf(format, args...), strings.Join(m.trace, "\n  "))
}

func (m *migration) start(path string) {
	m.m = &mortal{path: path}
	m.db = m.m.open(m)
	d, err := Open(context.Background(), "", Options{DB: m.db, MostChanges: 3, Encoding: "none", Dial: func(context.Context, Login) (Transport, error) {
		return &wire{s: m.srv, device: "a", fail: func(call string, after bool) error {
			if call == "get" && after && m.during != nil && !m.m.dead {
				during := m.during
				m.during = nil
				during()
			}
			if m.calls > 0 {
				if m.calls--; m.calls == 0 {
					m.calls = 1
					return errCut
				}
			}
			return nil
		}}, nil
	}})
	if err != nil {
		m.Fatalf("open: %v", err)
	}
	d.patience, d.durability = impatient, "OFF"
	m.d = d
}

func (m *migration) stop() { _ = m.db.Close() }

// sync syncs, with what may go wrong on the way.
func (m *migration) sync(faults bool) {
	m.calls, m.during, m.m.changed = 0, nil, false
	if faults {
		switch fault := rapid.IntRange(0, 7).Draw(m.t, "fault"); {
		case fault == 0:
			m.calls = rapid.IntRange(1, 9).Draw(m.t, "calls")
		case fault == 1:
			m.m.left = rapid.IntRange(1, 250).Draw(m.t, "statements")
		case fault < 6 && m.due:
			m.m.left, m.m.schema = rapid.IntRange(1, 40).Draw(m.t, "statements of a migration"), true
		}
		edits := rapid.IntRange(0, 2).Draw(m.t, "edits meanwhile")
		if m.due {
			edits *= 2
		}
		if edits > 0 {
			m.during = func() {
				left := m.m.left
				m.m.left = 0 // not the user
				for range edits {
					m.edit()
				}
				m.m.left = left
			}
		}
	}
	rep, err := m.d.Sync(context.Background(), SyncOptions{})
	m.say("sync: sent %d merged %d rejected %d rows %d: %v", rep.Sent, rep.Merged, rep.Rejected, rep.Rows, err)
	m.calls, m.during = 0, nil
	m.m.left, m.m.schema = 0, false
	if m.m.changed {
		m.migrations++
	}
	if m.m.dead {
		m.kills++
		if m.m.changed {
			m.changed++
		}
		m.say("killed")
		m.stop()
		m.start(m.m.copied)
		return
	}
	m.due = false
	if err != nil && !errors.Is(err, errCut) && !errors.Is(err, ErrRefused) {
		m.Fatalf("sync: %v", err)
	}
}

// columns are a table's columns beside id and grp, as they are in the file; none: there is no table.
func (m *migration) columns(table string) (list []string) {
	rows, err := m.db.Query(`SELECT name FROM pragma_table_info(?) WHERE name NOT IN ('id', 'grp') ORDER BY name`, table)
	if err != nil {
		m.Fatalf("%v", err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var c string
		if err := rows.Scan(&c); err != nil {
			m.Fatalf("%v", err)
		}
		list = append(list, c)
	}
	if err := rows.Err(); err != nil {
		m.Fatalf("%v", err)
	}
	return list
}

// edit is one thing that the user does: one statement, or two in a transaction.
func (m *migration) edit() {
	if rapid.IntRange(0, 4).Draw(m.t, "transaction") > 0 {
		m.statement(m.db)
		return
	}
	m.say("a transaction")
	err := m.d.Transaction(context.Background(), func(tx *sql.Tx) error {
		m.statement(tx)
		m.statement(tx)
		return nil
	})
	if err != nil {
		m.Fatalf("%v", err)
	}
}

func (m *migration) statement(db interface {
	Exec(string, ...any) (sql.Result, error)
	QueryRow(string, ...any) *sql.Row
}) {
	table := rapid.SampledFrom([]string{"item", "item", "note"}).Draw(m.t, "table")
	columns := m.columns(table)
	if len(columns) == 0 {
		return
	}
	key := strconv.Itoa(rapid.IntRange(1, 4).Draw(m.t, "key"))
	m.values++
	value := strconv.Itoa(1000 + m.values)
	column := rapid.SampledFrom(columns).Draw(m.t, "column")
	var q string
	switch what := rapid.IntRange(0, 5).Draw(m.t, "statement"); {
	case what == 0:
		q = fmt.Sprintf(`DELETE FROM %s WHERE id = '%s'`, table, key)
	case what < 3 && table == "item":
		q = fmt.Sprintf(`INSERT OR IGNORE INTO item (id, grp, %s) VALUES ('%s', 1, '%s')`, quote(column), key, value)
	case what < 3:
		q = fmt.Sprintf(`INSERT OR IGNORE INTO note (id, %s) VALUES ('%s', '%s')`, quote(column), key, value)
	default:
		q = fmt.Sprintf(`UPDATE %s SET %s = '%s' WHERE id = '%s'`, table, quote(column), value, key)
	}
	res, err := db.Exec(q)
	if err != nil {
		m.Fatalf("%s: %v", q, err)
	}
	n, err := res.RowsAffected()
	m.say("%s: %d, %v", q, n, err)
	if n == 0 {
		return
	}
	wire := "public." + table
	if strings.HasPrefix(q, "UPDATE") {
		m.written[spot{wire, key, column}] = value
		return
	}
	maps.DeleteFunc(m.written, func(c spot, _ string) bool { return c.table == wire && c.key == key })
	delete(m.deleted, spot{wire, key, ""})
	if strings.HasPrefix(q, "INSERT") {
		m.written[spot{wire, key, column}] = value
		return
	}
	// Of a row that no server has heard of nothing is left.
	var known bool
	if err := db.QueryRow(fmt.Sprintf(`SELECT EXISTS (SELECT 1 FROM _ws_s_%s WHERE k_id = '%s' AND base = 1 OR k_id = '%[2]s' AND batch IS NOT NULL)`, table, key)).Scan(&known); err != nil {
		m.Fatalf("%v", err)
	}
	if known {
		m.deleted[spot{wire, key, ""}] = m.outcomes(wire, key)
	}
}

// outcomes counts deletes of a row that have an outcome.
func (m *migration) outcomes(table, key string) (n int) {
	m.srv.mu.Lock()
	defer m.srv.mu.Unlock()
	for _, v := range m.srv.all {
		if v.Table == table && *v.Key[0] == key && v.change.Op == protocol.Delete && v.State != protocol.Rejected && v.State != protocol.Refused {
			n++
		}
	}
	return n
}

// redefine changes what the server's definitions say.
func (m *migration) redefine() {
	m.due = true
	m.srv.settleAll() // images have the columns that there are
	m.srv.mu.Lock()
	defer m.srv.mu.Unlock()
	if rapid.IntRange(0, 3).Draw(m.t, "sets") == 0 {
		if m.notes == nil {
			m.notes, m.srv.sets = m.srv.defs["notes"], []string{"items"}
			delete(m.srv.defs, "notes")
		} else {
			m.srv.defs["notes"], m.notes, m.srv.sets = m.notes, nil, []string{"items", "notes"}
		}
		m.say("the sets are %v", m.srv.sets)
		return
	}
	old := m.srv.defs["items"].Tables[0]
	tab := old
	tab.Columns = slices.Clone(old.Columns)
	at := rapid.IntRange(2, max(2, len(tab.Columns)-1)).Draw(m.t, "column")
	switch rapid.IntRange(0, 6).Draw(m.t, "change") {
	case 0, 1: // a column comes
		if len(m.hidden) == 0 {
			return
		}
		i := rapid.IntRange(0, len(m.hidden)-1).Draw(m.t, "comes")
		c := m.hidden[i]
		m.hidden = slices.Delete(m.hidden, i, i+1)
		tab.Columns = append(tab.Columns, c)
		for _, r := range m.srv.rows["public.item"] {
			if _, ok := r.img[c.Name]; r.img != nil && !ok {
				r.img[c.Name] = nil
				if c.Default != "" {
					r.img[c.Name] = ptr(c.Default)
				}
			}
		}
	case 2, 3, 4: // one goes
		if len(tab.Columns) < 4 {
			return
		}
		m.hidden = append(m.hidden, tab.Columns[at])
		tab.Columns = slices.Delete(tab.Columns, at, at+1)
	case 5: // one is kept otherwise
		tab.Columns[at].Type = map[bool]string{true: "text", false: "bigint"}[tab.Columns[at].Type == "bigint"]
	case 6: // the key is
		tab.Columns[0].Type = map[bool]string{true: "text", false: "integer"}[tab.Columns[0].Type == "integer"]
	}
	m.values++
	m.srv.defs["items"] = &protocol.Definitions{Hash: fmt.Sprintf("h%d", m.values), Tables: []protocol.Table{tab}}
	m.say("definitions: %v", tab.Columns)
}

// check: each value that the user wrote is still to be sent, on its way, accepted by the server, or in the rejected log.
func (m *migration) check() {
	ctx := context.Background()
	pending, err := m.d.Pending(ctx)
	if err != nil {
		m.Fatalf("pending: %v", err)
	}
	rejects, err := m.d.Rejects(ctx)
	if err != nil {
		m.Fatalf("rejects: %v", err)
	}
	has := func(img map[string]*string, c spot, value string) bool {
		return img[c.column] != nil && *img[c.column] == value
	}
	for c, value := range m.written {
		row := func(table string, key []*string) bool { return table == c.table && *key[0] == c.key }
		found := slices.ContainsFunc(pending, func(e Edit) bool { return row(e.Table, e.Key) && has(e.Now, c, value) }) ||
			slices.ContainsFunc(rejects, func(r Reject) bool { return row(r.Table, r.Key) && has(r.Sent, c, value) })
		m.srv.mu.Lock()
		for _, v := range m.srv.all {
			found = found || row(v.Table, v.Key) && v.State != protocol.Rejected && v.State != protocol.Refused && has(v.img, c, value)
		}
		m.srv.mu.Unlock()
		if !found {
			m.Fatalf("%v: what the user wrote, %s, is gone without an outcome", c, value)
		}
	}
	for c, before := range m.deleted {
		m.srv.mu.Lock()
		r := m.srv.rows[c.table][`"`+c.key+`"`]
		there := r != nil && r.img != nil // deleted, inserted and deleted again while the first delete was on its way, the row has one record
		m.srv.mu.Unlock()
		if there && !slices.ContainsFunc(pending, func(e Edit) bool { return e.Table == c.table && *e.Key[0] == c.key && e.Op == protocol.Delete }) &&
			!slices.ContainsFunc(rejects, func(r Reject) bool { // of a row whose insert was rejected nothing was there to be deleted
				return r.Table == c.table && *r.Key[0] == c.key && (r.Sent == nil || r.Op == protocol.Insert)
			}) && m.outcomes(c.table, c.key) == before {
			m.Fatalf("%v: the user's delete is gone without an outcome", c)
		}
	}
}

// quiesce: nothing is left to be sent, and the device has what the server has.
func (m *migration) quiesce() {
	m.say("quiesce")
	for range 3 {
		m.srv.settleAll()
		m.sync(false)
		m.check()
	}
	if p, err := m.d.Pending(context.Background()); err != nil || len(p) > 0 {
		m.Fatalf("%v: still pending: %+v", err, p)
	}
	m.srv.mu.Lock()
	defer m.srv.mu.Unlock()
	for _, set := range m.srv.sets {
		def := m.srv.defs[set].Tables[0]
		have := images(m, m.d, def.Name)
		for key, r := range m.srv.rows[def.Name] {
			if !m.srv.visible(def.Name, r.img, m.srv.subset) {
				continue
			}
			for _, c := range def.Columns {
				if got, ok := have[key][c.Name]; !ok || !sameWire(got, r.img[c.Name]) {
					m.Fatalf("%s %s: the device has %s, the server %s", def.Name, key, show(have[key]), show(r.img))
				}
			}
			delete(have, key)
		}
		if len(have) > 0 {
			m.Fatalf("%s: the device has rows that the server does not have: %v", def.Name, have)
		}
	}
}

// TestMigrationKeepsEdits explores random histories of edits, changes of the definitions and syncs, in which the process is killed
// between any two statements, those of a migration above all.
func TestMigrationKeepsEdits(t *testing.T) {
	dir := t.TempDir()
	first := newServer(t).device(t, "a", Options{})
	if _, err := first.db.Exec(`VACUUM INTO ?`, filepath.Join(dir, "enrolled.db")); err != nil {
		t.Fatal(err)
	}
	enrolled, err := os.ReadFile(filepath.Join(dir, "enrolled.db"))
	if err != nil {
		t.Fatal(err)
	}
	runs, kills, migrations, changed := 0, 0, 0, 0
	rapid.Check(t, func(t *rapid.T) {
		runs++
		srv := newServer(nil)
		srv.defs["items"].Tables[0].Columns[2].Type = "text"
		srv.defs["notes"].Tables[0].Columns = []protocol.Column{{Name: "id", Type: "text", NotNull: true}, {Name: "body", Type: "text"}}
		m := &migration{t: t, srv: srv, dir: filepath.Join(dir, strconv.Itoa(runs)), written: map[spot]string{}, deleted: map[spot]int{},
			hidden: []protocol.Column{{Name: "extra", Type: "text"}, {Name: "number", Type: "bigint"}, {Name: "filled", Type: "text", Default: "7"}}}
		if err := os.Mkdir(m.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(m.dir, "a.db")
		if err := os.WriteFile(path, enrolled, 0o600); err != nil {
			t.Fatal(err)
		}
		m.start(path)
		defer func() {
			m.stop()
			_ = os.RemoveAll(m.dir)
			kills, migrations, changed = kills+m.kills, migrations+m.migrations, changed+m.changed
		}()
		srv.foreign(item(1, "1", "11"))
		srv.foreign(item(2, "1", "12"))
		m.sync(false)
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			switch rapid.IntRange(0, 10).Draw(t, "step") {
			case 10: // somebody else
				m.values++
				table, key, img := item(rapid.IntRange(1, 4).Draw(t, "foreign"), "1", strconv.Itoa(1000+m.values))
				if rapid.IntRange(0, 3).Draw(t, "absent") == 0 {
					img = nil
				}
				m.say("foreign: %s %s", key[0], show(img))
				srv.foreign(table, key, img)
			case 0, 1, 2, 3:
				m.edit()
			case 4, 5:
				m.redefine()
			case 6:
				srv.mu.Lock()
				if p := srv.pending(); len(p) > 0 {
					r, refuse := rapid.SampledFrom(p).Draw(t, "pending"), rapid.Bool().Draw(t, "refuse")
					m.say("source answers %s refuse=%v", keyOf(r.pend[0].Key), refuse)
					srv.verdict(r, refuse, false)
				}
				srv.mu.Unlock()
			default:
				m.sync(true)
			}
			m.check()
		}
		m.quiesce()
	})
	t.Logf("%d histories, %d migrations, %d kills, %d of them in a migration", runs, migrations, kills, changed)
	if !t.Failed() && runs > 50 && (migrations == 0 || changed == 0) {
		t.Error("no migration was cut: the test proves nothing")
	}
}
