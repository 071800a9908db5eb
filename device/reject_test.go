package device

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"modernc.org/sqlite"

	"github.com/waystage/waystage/protocol"
)

// rejected gives a device with one rejected record: its statement met a foreign write of row 1 ("office"), or what before did.
func rejected(t *testing.T, statement string, before func(*memServer)) (*memServer, *Device, Reject) {
	t.Helper()
	srv := newServer(t)
	srv.foreign(item(1, "1", "old"))
	srv.foreign(item(2, "1", "two"))
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	mustExec(t, d, statement)
	if before == nil {
		srv.foreign(item(1, "1", "office"))
	} else {
		before(srv)
	}
	srv.mustSync(t, d)
	l, err := d.RejectLog(context.Background(), RejectFilter{Status: RejectOpen})
	if err != nil || len(l) == 0 {
		t.Fatalf("%v: %+v", err, l)
	}
	return srv, d, l[0]
}

// TestRejectActions: what each action does to each operation, and when it is refused.
func TestRejectActions(t *testing.T) {
	ctx := context.Background()
	gone := func(s *memServer) { s.foreign("public.item", []string{"1"}, nil) }
	exists := func(s *memServer) { s.foreign(item(9, "1", "office")) }
	moved := func(s *memServer) {
		_, k, img := item(1, "2", "old")
		s.foreign("public.item", k, img)
	}
	for _, c := range []struct {
		name      string
		statement string
		before    func(*memServer)
		meanwhile string
		resubmit  error
		restore   error
		set       map[string]*string
		resubmits string // what item holds then, by id, "-" when nothing is changed
		restores  string
	}{
		{name: "update, another column changed", statement: `UPDATE item SET val = 'mine' WHERE id = 1`, before: moved, resubmits: "1/2/mine 2/1/two", restores: "1/1/mine 2/1/two"},
		{name: "update, same column", statement: `UPDATE item SET val = 'mine' WHERE id = 1`, resubmits: "1/1/mine 2/1/two", restores: "1/1/mine 2/1/two"},
		{name: "update, set", statement: `UPDATE item SET val = 'mine' WHERE id = 1`, before: moved, set: map[string]*string{"val": ptr("other"), "grp": nil}, resubmits: "1//other 2/1/two", restores: "1/1/mine 2/1/two"},
		{name: "update, row gone", statement: `UPDATE item SET val = 'mine' WHERE id = 1`, before: gone, resubmit: ErrRowGone, restores: "1/1/mine 2/1/two"},
		{name: "update, edited since", statement: `UPDATE item SET val = 'mine' WHERE id = 1`, meanwhile: `UPDATE item SET val = 'new' WHERE id = 1`, resubmit: ErrRowEdited, restore: ErrRowEdited},
		{name: "update, other column edited since", statement: `UPDATE item SET val = 'mine' WHERE id = 1`, meanwhile: `UPDATE item SET grp = 2 WHERE id = 1`, restore: ErrRowEdited, resubmits: "1/2/mine 2/1/two"},
		{name: "update, deleted here since", statement: `UPDATE item SET val = 'mine' WHERE id = 1`, meanwhile: `DELETE FROM item WHERE id = 1`, resubmit: ErrRowEdited, restore: ErrRowEdited},
		{name: "update, made here already", statement: `UPDATE item SET val = 'mine' WHERE id = 1`, meanwhile: `UPDATE item SET val = 'mine' WHERE id = 1`, resubmits: "-", restores: "-"},
		{name: "insert, key exists", statement: `INSERT INTO item VALUES (9, 1, 'mine')`, before: exists, resubmit: ErrRowExists, restores: "1/1/old 2/1/two 9/1/mine"},
		{name: "insert, another key", statement: `INSERT INTO item VALUES (9, 1, 'mine')`, before: exists, set: map[string]*string{"id": ptr("10")}, resubmits: "1/1/old 10/1/mine 2/1/two 9/1/office", restores: "1/1/old 2/1/two 9/1/mine"},
		{name: "insert, no row now", statement: `INSERT INTO item VALUES (9, 3, 'mine')`, before: func(*memServer) {}, resubmits: "1/1/old 2/1/two 9/3/mine", restores: "1/1/old 2/1/two 9/3/mine"},
		{name: "delete", statement: `DELETE FROM item WHERE id = 1`, resubmits: "2/1/two", restores: "2/1/two"},
		{name: "delete, edited since", statement: `DELETE FROM item WHERE id = 1`, meanwhile: `UPDATE item SET val = 'new' WHERE id = 1`, resubmit: ErrRowEdited, restore: ErrRowEdited},
		{name: "delete, gone here", statement: `DELETE FROM item WHERE id = 1`, meanwhile: `DELETE FROM item WHERE id = 1`, resubmits: "-", restores: "-"},
	} {
		for _, action := range []string{RejectResubmitted, RejectRestored} {
			t.Run(c.name+"/"+action, func(t *testing.T) {
				srv, d, r := rejected(t, c.statement, c.before)
				if c.meanwhile != "" {
					mustExec(t, d, c.meanwhile)
				}
				holds := func() string {
					return one[string](t, d, `SELECT group_concat(id || '/' || ifnull(grp, '') || '/' || val, ' ') FROM (SELECT * FROM item ORDER BY CAST(id AS TEXT))`)
				}
				was, want, wantError := holds(), c.resubmits, c.resubmit
				act := func() ([]Handled, error) { return d.Resubmit(ctx, c.set, r.Entry) }
				if action == RejectRestored {
					want, wantError = c.restores, c.restore
					act = func() ([]Handled, error) { return d.Restore(ctx, r.Entry) }
				}
				l, err := act()
				if !errors.Is(err, wantError) {
					t.Fatalf("got %v, want %v", err, wantError)
				}
				now, err := d.Rejected(ctx, r.Entry)
				if err != nil {
					t.Fatal(err)
				}
				if wantError != nil {
					if holds() != was || now.Status != RejectOpen {
						t.Fatalf("refused, and the rows are %s, the entry %s", holds(), now.Status)
					}
					return
				}
				edited := want != "-"
				if !edited {
					want = was
				}
				if holds() != want || now.Status != action || len(l) != 1 || l[0].Edited != edited {
					t.Fatalf("the rows are %s, want %s; entry %s, %+v", holds(), want, now.Status, l)
				}
				srv.subset["3"], srv.subset["none"] = true, true // the operator has mended what was refused
				srv.mustSync(t, d)
				srv.settleAll()
				srv.mustSync(t, d)
				srv.same(t, d)
				if open, err := d.RejectLog(ctx, RejectFilter{Status: RejectOpen}); err != nil || c.meanwhile == "" && len(open) != 0 {
					t.Fatalf("%v: rejected again: %+v", err, open)
				}
			})
		}
	}
	_, d, r := rejected(t, `UPDATE item SET val = 'mine' WHERE id = 1`, nil)
	for _, c := range []struct {
		set  map[string]*string
		want error
	}{{map[string]*string{"nonsense": nil}, ErrNoColumn}, {map[string]*string{"id": ptr("5")}, ErrNoColumn}} {
		_, err := d.Resubmit(ctx, c.set, r.Entry)
		wantErr(t, err, c.want)
	}
	_, err := d.Discard(ctx, r.Entry, 99)
	wantErr(t, err, ErrNoReject)
	if l, err := d.Resubmit(ctx, nil, r.Entry); err != nil || !l[0].Edited {
		t.Fatal(l, err)
	}
	_, err = d.Restore(ctx, r.Entry)
	wantErr(t, err, ErrHandled)
	mustExec(t, d, `DROP TRIGGER _ws_bu_item`)
	mustExec(t, d, `UPDATE _ws_rejected SET handling = 'open', handled = NULL`)
	_, err = d.Restore(ctx, r.Entry)
	wantErr(t, err, ErrCapture)
}

// TestRejectedUnit: a transaction that was rejected whole is resubmitted whole.
func TestRejectedUnit(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	inUnit(t, d, insertOf(1), `INSERT INTO item VALUES (2, 1, CAST(x'ff' AS TEXT))`, insertOf(3))
	srv.mustSync(t, d)
	now, err := d.Rejected(ctx, 2)
	if err != nil || !slices.Equal(now.Partner, []int64{1, 2, 3}) {
		t.Fatalf("%v: %+v", err, now)
	}
	bad := slices.IndexFunc(now.Partner, func(n int64) bool { r, err := d.Rejected(ctx, n); return err == nil && *r.Key[0] == "2" })
	if r, err := d.Rejected(ctx, now.Partner[bad]); err != nil || *r.Sent["val"] != "\xff" {
		t.Fatalf("what cannot be sent was not kept as it was: %q %v", *r.Sent["val"], err)
	}
	others := slices.Delete(slices.Clone(now.Partner), bad, bad+1)
	if _, err := d.Resubmit(ctx, nil, others...); err != nil {
		t.Fatal(err)
	}
	up := watch(srv)
	srv.mustSync(t, d)
	wantUnits(t, up.of(t, "public.item"), map[string]int64{`public.item "1"`: 1, `public.item "3"`: 1})
	if l, err := d.Resubmit(ctx, map[string]*string{"val": ptr("good")}, now.Partner[bad]); err != nil || !l[0].Edited {
		t.Fatal(l, err)
	}
	srv.mustSync(t, d)
	wantUnits(t, up.of(t, "public.item"), map[string]int64{`public.item "2"`: 1})
	srv.settleAll()
	srv.mustSync(t, d)
	srv.same(t, d)
}

// TestReceipts: the log has every hop of a record, for as long as is asked for.
func TestReceipts(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	srv.foreign(item(1, "1", "old"))
	cut := ""
	d := srv.device(t, "a", Options{Dial: func(context.Context, Login) (Transport, error) {
		return &wire{s: srv, device: "a", fail: func(call string, after bool) error {
			if call == cut && !after {
				return errCut
			}
			return nil
		}}, nil
	}})
	srv.mustSync(t, d)
	only := func(state string) Receipt {
		t.Helper()
		l, err := d.Log(ctx, LogFilter{State: state, Table: "public.item"})
		all, err2 := d.Log(ctx, LogFilter{})
		if err != nil || err2 != nil || len(l) != 1 || len(all) != 1 {
			t.Fatalf("%s: %v %+v, all %+v", state, err, l, all)
		}
		return l[0]
	}
	broken := func(call string) {
		t.Helper()
		cut = call
		_, err := d.Sync(ctx, SyncOptions{})
		cut = ""
		wantErr(t, err, errCut)
	}
	mustExec(t, d, `UPDATE item SET val = 'mine' WHERE id = 1`)
	if r := only(Unsent); r.Op != protocol.Update || r.Edited.IsZero() || r.Session != "" {
		t.Fatalf("%+v", r)
	}
	broken("put")
	if r := only(Sent); r.Frozen.IsZero() || !r.Received.IsZero() {
		t.Fatalf("%+v", r)
	}
	srv.lateMerge = true
	broken("get")
	if r := only(Received); r.Received.IsZero() || !r.Staged.IsZero() {
		t.Fatalf("%+v", r)
	}
	srv.mustSync(t, d)
	if r := only(Staged); r.Staged.IsZero() || !r.Merged.IsZero() {
		t.Fatalf("%+v", r)
	}
	srv.late()
	srv.lateMerge = false
	srv.mustSync(t, d)
	if r := only(protocol.Merged); r.Version == "" || r.Merged.IsZero() || !r.Final.IsZero() {
		t.Fatalf("%+v", r)
	}
	srv.mu.Lock()
	for _, r := range srv.pending() {
		srv.verdict(r, true, false)
	}
	srv.mu.Unlock()
	srv.mustSync(t, d)
	r := only(protocol.Refused)
	if r.Code != protocol.CodeConstraint || r.Constraint != "some_check" || r.Final.IsZero() || r.Entry == 0 || r.Handling != RejectOpen || r.Right == nil || *r.Right["val"] != "old" || r.RightVersion == "" || r.ID == 0 {
		t.Fatalf("%+v", r)
	}
	// What is final goes after its time, what nobody has dealt with stays.
	if err := d.SetRetention(ctx, Retention{Rejects: time.Nanosecond, Receipts: -1}); err == nil {
		t.Fatal("a negative time was taken")
	}
	age := func() {
		mustExec(t, d, `UPDATE _ws_receipt SET final = final - 40 * 86400000`)
		mustExec(t, d, `UPDATE _ws_session SET frozen = frozen - 40 * 86400000`)
		mustExec(t, d, `UPDATE _ws_rejected SET handled = handled - 40 * 86400`)
		srv.mustSync(t, d)
	}
	if err := d.SetRetention(ctx, Retention{Rejects: 50 * 24 * time.Hour, Receipts: 50 * 24 * time.Hour, Syncs: 2}); err != nil {
		t.Fatal(err)
	}
	age()
	only(protocol.Refused)
	if l, err := d.Syncs(ctx); err != nil || len(l) != 2 {
		t.Fatalf("%v: %d reports", err, len(l))
	}
	if err := d.SetRetention(ctx, Retention{}); err != nil {
		t.Fatal(err)
	}
	age()
	if l, err := d.Log(ctx, LogFilter{}); err != nil || len(l) != 0 {
		t.Fatalf("%v: %+v", err, l)
	}
	if n := one[int](t, d, `SELECT count(*) FROM _ws_session`); n != 0 {
		t.Fatalf("%d sessions are kept", n)
	}
	if l, err := d.Rejects(ctx); err != nil || len(l) != 1 {
		t.Fatalf("%v: the open entry went: %+v", err, l)
	}
	if _, err := d.Discard(ctx, r.Entry); err != nil {
		t.Fatal(err)
	}
	age()
	if l, err := d.Rejects(ctx); err != nil || len(l) != 0 {
		t.Fatalf("%v: %+v", err, l)
	}
	// What the device itself refuses is in the log, too.
	mustExec(t, d, `INSERT INTO item VALUES (5, 1, CAST(x'ff' AS TEXT))`)
	srv.mustSync(t, d)
	if r := only(protocol.Rejected); r.Code != protocol.CodeInvalidValue || r.Set != "items" || r.Entry == 0 || r.Final.IsZero() {
		t.Fatalf("%+v", r)
	}
}

// killer is a driver that calls a function before each statement: the file as it is then is what a killed process leaves.
type killer struct{ before atomic.Pointer[func()] }

type killerConn struct {
	driver.Conn
	k *killer
}

func (k *killer) Open(name string) (driver.Conn, error) {
	c, err := (&sqlite.Driver{}).Open(name)
	return &killerConn{c, k}, err
}

func (c *killerConn) now() {
	if f := c.k.before.Load(); f != nil {
		(*f)()
	}
}

func (c *killerConn) ExecContext(ctx context.Context, q string, args []driver.NamedValue) (driver.Result, error) {
	c.now()
	return c.Conn.(driver.ExecerContext).ExecContext(ctx, q, args)
}

func (c *killerConn) QueryContext(ctx context.Context, q string, args []driver.NamedValue) (driver.Rows, error) {
	c.now()
	return c.Conn.(driver.QueryerContext).QueryContext(ctx, q, args)
}

func (c *killerConn) PrepareContext(ctx context.Context, q string) (driver.Stmt, error) {
	c.now() // each statement that is prepared is run at once the first time
	return c.Conn.(driver.ConnPrepareContext).PrepareContext(ctx, q)
}

func (c *killerConn) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	return c.Conn.(driver.ConnBeginTx).BeginTx(ctx, o)
}

type connector struct {
	k    *killer
	name string
}

func (c connector) Connect(context.Context) (driver.Conn, error) { return c.k.Open(c.name) }
func (c connector) Driver() driver.Driver                        { return c.k }

// TestActionsAreWhole: killed between any two statements of resubmit, restore, discard or a transaction of the
// application's, the file is as before; and what comes after the restart is what would have come without the kill.
func TestActionsAreWhole(t *testing.T) {
	ctx := context.Background()
	for _, action := range []string{RejectResubmitted, RejectRestored, RejectDiscarded, "transaction"} {
		t.Run(action, func(t *testing.T) {
			srv := newServer(t)
			dir := t.TempDir()
			path := filepath.Join(dir, "a.db")
			k := &killer{}
			db := sql.OpenDB(connector{k, "file:" + path + "?_pragma=busy_timeout(15000)&_pragma=journal_mode(WAL)&_pragma=wal_autocheckpoint(0)"})
			defer func() { _ = db.Close() }()
			d := srv.device(t, "a", Options{DB: db})
			srv.foreign(item(1, "1", "old"))
			srv.foreign(item(2, "1", "old"))
			srv.mustSync(t, d)
			inUnit(t, d, `UPDATE item SET val = 'bad' WHERE id = 1`, `DELETE FROM item WHERE id = 2`)
			srv.foreign(item(1, "2", "office"))
			srv.foreign(item(2, "1", "office"))
			srv.mustSync(t, d)
			mustExec(t, d, insertItem, 7)
			act := func(d *Device) error {
				var err error
				switch action {
				case RejectResubmitted:
					_, err = d.Resubmit(ctx, nil, 1, 2)
				case RejectRestored:
					_, err = d.Restore(ctx, 1, 2)
				case RejectDiscarded:
					_, err = d.Discard(ctx, 1, 2)
				default:
					err = d.Transaction(ctx, func(tx *sql.Tx) error {
						_, err := tx.Exec(`UPDATE item SET val = 'u'`)
						return err
					})
				}
				return err
			}
			look := func(d *Device) string {
				log, err := d.Rejects(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for i := range log {
					log[i].Handled = time.Time{}
				}
				p, err := d.Pending(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for i := range p {
					p[i].Since = time.Time{}
				}
				return everything(log, p, map[string]map[string]image{"item": images(t, d, "public.item")}) +
					fmt.Sprint(one[int](t, d, `SELECT count(*) FROM _ws_u_item`), one[int](t, d, `SELECT count(*) FROM waystage_unit`), one[int](t, d, `SELECT capture FROM _ws_state`))
			}
			before := look(d)
			n := 0
			kill := func() {
				n++
				for _, tail := range []string{"", "-wal"} {
					copyFile(t, path+tail, filepath.Join(dir, fmt.Sprintf("%d.db%s", n, tail)))
				}
			}
			k.before.Store(&kill)
			err := act(d)
			k.before.Store(nil)
			if err != nil {
				t.Fatal(err)
			}
			after := look(d)
			if n < 3 || after == before {
				t.Fatalf("%d statements, changed %v", n, after != before)
			}
			for i := range n {
				left, err := Open(ctx, filepath.Join(dir, fmt.Sprintf("%d.db", i+1)), Options{})
				if err != nil {
					t.Fatal(err)
				}
				got := look(left)
				if got != before && got != after { // after: the commit is done, only the connection's settings are put back
					t.Fatalf("killed before statement %d of %d, the file is\n%s\ninstead of\n%s", i+1, n, got, before)
				}
				if got == before {
					if err := act(left); err != nil {
						t.Fatal(err)
					}
					if got := look(left); got != after {
						t.Fatalf("killed before statement %d of %d and done again, the file is\n%s\ninstead of\n%s", i+1, n, got, after)
					}
				}
				_ = left.Close()
			}
			t.Logf("killed at %d places", n)
		})
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		if strings.HasSuffix(from, "-wal") && errors.Is(err, os.ErrNotExist) {
			return
		}
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}
