package device

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/waystage/waystage/protocol"
)

func mustExec(t testing.TB, d *Device, q string, args ...any) {
	t.Helper()
	if _, err := d.DB().Exec(q, args...); err != nil {
		t.Fatalf("%s: %v", q, err)
	}
}

func one[T any](t testing.TB, d *Device, q string, args ...any) (v T) {
	t.Helper()
	if err := d.DB().QueryRow(q, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", q, err)
	}
	return v
}

func item(id int, grp, val string) (string, []string, image) {
	return "public.item", []string{fmt.Sprint(id)}, image{"id": ptr(fmt.Sprint(id)), "grp": ptr(grp), "val": ptr(val)}
}

// TestConflict: two devices edit one row; the second is told in the same sync, with the right version.
func TestConflict(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	srv.foreign(item(1, "1", "old"))
	a, b := srv.device(t, "a", Options{}), srv.device(t, "b", Options{})
	srv.mustSync(t, a)
	srv.mustSync(t, b)
	mustExec(t, a, `UPDATE item SET val = 'from a' WHERE id = 1`)
	mustExec(t, b, `UPDATE item SET val = 'from b' WHERE id = 1`)
	if rep := srv.mustSync(t, a); rep.Sent != 1 || rep.Merged != 1 || rep.Rejected != 0 {
		t.Fatalf("%+v", rep)
	}
	rep := srv.mustSync(t, b)
	if rep.Sent != 1 || rep.Merged != 0 || rep.Rejected != 1 || len(rep.Sets) != 2 {
		t.Fatalf("%+v", rep)
	}
	if v := one[string](t, b, `SELECT val FROM item WHERE id = 1`); v != "from a" {
		t.Fatalf("b shows %q", v)
	}
	l, err := b.Rejects(ctx)
	if err != nil || len(l) != 1 {
		t.Fatalf("%v %+v", err, l)
	}
	r := l[0]
	if r.Code != protocol.CodeStale || *r.Sent["val"] != "from b" || *r.Base["val"] != "old" || *r.Right["val"] != "from a" || r.RightVersion == "" || r.Table != "public.item" || r.Local != "item" || r.Set != "items" || r.ID == 0 {
		t.Fatalf("%+v", r)
	}
	// The source refuses what the mirror took: the row goes back, and the log says why.
	srv.mu.Lock()
	srv.verdict(srv.pending()[0], true, false)
	srv.mu.Unlock()
	if rep := srv.mustSync(t, a); rep.Rejected != 1 {
		t.Fatalf("%+v", rep)
	}
	l, err = a.Rejects(ctx)
	if err != nil || len(l) != 1 || l[0].State != protocol.Refused || l[0].Constraint != "some_check" || *l[0].Right["val"] != "old" {
		t.Fatalf("%v %+v", err, l)
	}
	srv.mustSync(t, b)
	srv.same(t, a)
	srv.same(t, b)
	log, err := a.Syncs(ctx)
	if err != nil || len(log) != 3 || log[0].Rejected != 1 || log[0].ID != 3 {
		t.Fatalf("%v %+v", err, log)
	}
}

// TestResume: a sync that broke off after its first set goes on with the second, with the same bytes and without
// composing the reply again.
func TestResume(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	for i := range 10 {
		srv.foreign("public.note", []string{fmt.Sprint(i)}, image{"id": ptr(fmt.Sprint(i)), "done": ptr("t"), "weight": nil, "photo": nil})
	}
	var gets, puts []string
	broken := true
	dial := func(context.Context, Login) (Transport, error) {
		w := &wire{s: srv, device: "a"}
		n := 0
		w.fail = func(call string, after bool) error {
			if after {
				return nil
			}
			n++
			switch call {
			case "get":
				gets = append(gets, fmt.Sprint(n))
			case "put":
				puts = append(puts, fmt.Sprint(n))
			}
			if broken && n > 5 { // put get ack (items), put get (notes): the second page does not come
				return errCut
			}
			return nil
		}
		return w, nil
	}
	d := srv.device(t, "a", Options{Dial: dial})
	mustStatus := func() Status {
		s, err := d.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	_, err := d.Sync(ctx, SyncOptions{})
	wantErr(t, err, errCut)
	if s := mustStatus(); !s.Unfinished || s.OpenSet != "notes" || !s.Sets[0].Done || s.Sets[1].Done {
		t.Fatalf("%+v", s)
	}
	if n := one[int](t, d, `SELECT count(*) FROM _ws_inbox`); n != 1 {
		t.Fatalf("%d pages kept", n)
	}
	broken = false
	gets, puts = nil, nil
	composed := srv.reply
	rep, err := d.Sync(ctx, SyncOptions{})
	if err != nil || !rep.Resumed || len(rep.Sets) != 1 || rep.Sets[0].Set != "notes" || !rep.Sets[0].Resumed || rep.Rows != 10 {
		t.Fatalf("%v %+v", err, rep)
	}
	if len(puts) != 0 || len(gets) != 3 || srv.reply != composed {
		t.Fatalf("puts %v gets %v, composed %d replies more", puts, gets, srv.reply-composed)
	}
	srv.same(t, d)
	if s := mustStatus(); s.Unfinished || s.Open != "" {
		t.Fatalf("%+v", s)
	}
	if rep, err = d.Sync(ctx, SyncOptions{}); err != nil || rep.Resumed || len(rep.Sets) != 2 {
		t.Fatalf("%v %+v", err, rep)
	}
}

// TestResumeCarriesNewEdits: edits made after the break go up in the same sync that resumes.
func TestResumeCarriesNewEdits(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	srv.foreign(item(1, "1", "old"))
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	mustExec(t, d, `UPDATE item SET val = 'one' WHERE id = 1`)
	cctx, cancel := context.WithCancel(ctx)
	_, err := d.Sync(cctx, SyncOptions{Progress: func(p Progress) {
		if p.Stage == StageUpload {
			cancel()
		}
	}})
	wantErr(t, err, context.Canceled)
	mustExec(t, d, `UPDATE item SET val = 'two' WHERE id = 1`)
	mustExec(t, d, `INSERT INTO item VALUES (2, 1, 'new')`)
	if rep := srv.mustSync(t, d); rep.Sent != 3 || rep.Merged != 3 {
		t.Fatalf("%+v", rep)
	}
	srv.same(t, d)
	if v := one[string](t, d, `SELECT val FROM item WHERE id = 1`); v != "two" {
		t.Fatal(v)
	}
}

// TestEditDuringASync: an edit made while a sync is under way is based on what the user saw then, whatever the sync brings.
func TestEditDuringASync(t *testing.T) {
	const edit = `UPDATE item SET val = 'later' WHERE id = 1`
	during := func(t *testing.T, d *Device) Report {
		t.Helper()
		did := false
		rep, err := d.Sync(context.Background(), SyncOptions{Progress: func(p Progress) {
			if p.Stage == StageUpload && !did {
				did = true
				mustExec(t, d, edit)
			}
		}})
		if err != nil || !did {
			t.Fatalf("%v, edited: %t", err, did)
		}
		return rep
	}
	next := func(t *testing.T, srv *memServer, d *Device) { // somebody else was first: neither edit may win
		t.Helper()
		if v := one[string](t, d, `SELECT val FROM item WHERE id = 1`); v != "later" {
			t.Fatalf("the edit made during the sync is gone: %q", v)
		}
		if rep := srv.mustSync(t, d); rep.Sent != 1 || rep.Rejected != 1 {
			t.Fatalf("%+v", rep)
		}
		l, err := d.Rejects(context.Background())
		if err != nil || len(l) == 0 || l[len(l)-1].Code != protocol.CodeStale || *l[len(l)-1].Sent["val"] != "later" {
			t.Fatalf("%v %+v", err, l)
		}
		if v := one[string](t, d, `SELECT val FROM item WHERE id = 1`); v != "office" {
			t.Fatalf("the row is %q", v)
		}
		srv.same(t, d)
	}
	t.Run("the earlier edit is rejected", func(t *testing.T) {
		srv := newServer(t)
		srv.foreign(item(1, "1", "old"))
		d := srv.device(t, "a", Options{})
		srv.mustSync(t, d)
		mustExec(t, d, `UPDATE item SET val = 'earlier' WHERE id = 1`)
		srv.foreign(item(1, "1", "office"))
		if rep := during(t, d); rep.Sent != 1 || rep.Rejected != 1 {
			t.Fatalf("%+v", rep)
		}
		next(t, srv, d)
	})
	t.Run("the row comes changed", func(t *testing.T) {
		srv := newServer(t)
		srv.foreign(item(1, "1", "old"))
		srv.foreign(item(2, "1", "other"))
		d := srv.device(t, "a", Options{})
		srv.mustSync(t, d)
		mustExec(t, d, `UPDATE item SET val = 'mine' WHERE id = 2`)
		srv.foreign(item(1, "1", "office"))
		if rep := during(t, d); rep.Sent != 1 || rep.Merged != 1 {
			t.Fatalf("%+v", rep)
		}
		next(t, srv, d)
	})
}

// TestLostReply: a reply that was lost on the server, none or one of its pages fetched, is asked for at once: a sync need
// not last for as long as one waits for a page that never comes.
func TestLostReply(t *testing.T) {
	for _, fetched := range []int{0, 1} {
		ctx := context.Background()
		srv := newServer(t)
		srv.perPage = 5
		var lost bool
		puts := 0
		cut := func(call string, after bool) bool { return call == "get" && !after } // of the first sync
		gets := 0
		dial := func(context.Context, Login) (Transport, error) {
			w := &wire{s: srv, device: "a"}
			w.fail = func(call string, after bool) error {
				switch {
				case !lost && cut(call, after):
					if gets++; gets > fetched {
						return errCut
					}
				case lost && call == "put" && !after:
					puts++
				case lost && call == "get" && !after && puts == 0: // the gateway holds the call and gives up
					return &protocol.Error{Code: protocol.CodePending}
				}
				return nil
			}
			return w, nil
		}
		d := srv.device(t, "a", Options{Dial: srv.dial("a")})
		srv.mustSync(t, d)
		for i := range 20 {
			srv.foreign(item(i, "1", "new"))
		}
		d.opts.Dial = dial
		if _, err := d.Sync(ctx, SyncOptions{}); !errors.Is(err, errCut) {
			t.Fatal(err)
		}
		if n := one[int](t, d, `SELECT count(*) FROM _ws_inbox`); n != fetched {
			t.Fatalf("%d pages fetched, not %d", n, fetched)
		}
		lost = true
		clear(srv.out)
		d.patience.check, d.patience.most = time.Hour, time.Hour // whoever waits, waits for ever
		short, cancel := context.WithTimeout(ctx, time.Minute)
		_, err := d.Sync(short, SyncOptions{})
		cancel()
		if err != nil || puts < 1 {
			t.Fatalf("%v after %d puts", err, puts)
		}
		srv.same(t, d)
	}
}

// TestLargeSessions: many edits go in several sessions, large requests in parts, and everything arrives.
func TestLargeSessions(t *testing.T) {
	for _, o := range []Options{{MostChanges: 7}, {Encoding: "none", PartSize: 1000}, {ContentType: protocol.ContentJSON, Encoding: protocol.Gzip}} {
		srv := newServer(t)
		srv.perPage = 1000
		d := srv.device(t, "a", o)
		srv.mustSync(t, d)
		for i := range 30 {
			mustExec(t, d, `INSERT INTO item VALUES (?, 1, ?)`, i, strings.Repeat("x", 100))
		}
		rep := srv.mustSync(t, d)
		if rep.Sent != 30 || rep.Merged != 30 || o.MostChanges == 7 && len(rep.Sets) != 6 {
			t.Fatalf("%+v", rep)
		}
		srv.settleAll()
		srv.mustSync(t, d)
		srv.same(t, d)
		if len(srv.problems) > 0 {
			t.Fatal(srv.problems)
		}
		if n := one[int](t, d, `SELECT count(*) FROM _ws_outbox`); n != 0 {
			t.Fatalf("%d requests kept although all is final", n)
		}
	}
}

// TestResumedUpload: a request of which only some parts have arrived is sent again at once, although the server knows of it.
func TestResumedUpload(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	puts, broken := 0, false
	dial := func(context.Context, Login) (Transport, error) {
		return &wire{s: srv, device: "a", fail: func(call string, after bool) error {
			if call != "put" || after {
				return nil
			}
			if puts++; broken && puts > 2 {
				return errCut
			}
			return nil
		}}, nil
	}
	d := srv.device(t, "a", Options{Dial: dial, Encoding: "none", PartSize: 1000})
	d.patience.check = time.Hour
	srv.mustSync(t, d)
	for i := range 30 {
		mustExec(t, d, `INSERT INTO item VALUES (?, 1, ?)`, i, strings.Repeat("x", 100))
	}
	puts, broken = 0, true
	_, err := d.Sync(ctx, SyncOptions{})
	wantErr(t, err, errCut)
	puts, broken = 0, false
	rep, err := d.Sync(ctx, SyncOptions{})
	if err != nil || !rep.Resumed || rep.Merged != 30 || puts < 3 {
		t.Fatalf("%v %+v, %d parts sent", err, rep, puts)
	}
	srv.settleAll()
	srv.mustSync(t, d)
	srv.same(t, d)
}

// refuser answers the first put with a refusal.
type refuser struct {
	Transport
	e *protocol.Error
	n *int
}

func (r refuser) Put(ctx context.Context, session, part string, p Payload) (protocol.Receipt, error) {
	if *r.n > 0 {
		*r.n--
		return protocol.Receipt{}, r.e
	}
	return r.Transport.Put(ctx, session, part, p)
}

// TestRefusedWhole: what a refusal of the whole session does to its edits.
func TestRefusedWhole(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		code  protocol.Code
		times int
		err   error
	}{
		{protocol.CodeBusy, 2, nil},             // waits and goes on
		{protocol.CodeBusy, 99, ErrRefused},     // not for ever; the session stays as it is
		{protocol.CodeTooBig, 1, nil},           // smaller sessions
		{protocol.CodeMalformed, 1, ErrRefused}, // the edits are unsent again
		{protocol.CodeBlocked, 1, ErrBlocked},
		{protocol.CodeForked, 1, nil},
		{protocol.CodeEpoch, 1, nil},
	} {
		t.Run(fmt.Sprint(c.code, c.times), func(t *testing.T) {
			srv := newServer(t)
			srv.foreign(item(1, "1", "old"))
			times := 0
			d := srv.device(t, "a", Options{Dial: func(context.Context, Login) (Transport, error) {
				return refuser{&wire{s: srv, device: "a"}, &protocol.Error{Code: c.code, Message: "no", Retry: 1}, &times}, nil
			}})
			srv.mustSync(t, d)
			for i := range 10 {
				mustExec(t, d, `INSERT INTO item VALUES (?, 1, 'x') ON CONFLICT DO UPDATE SET val = 'x'`, i)
			}
			times = c.times
			_, err := d.Sync(ctx, SyncOptions{})
			if !errors.Is(err, c.err) {
				t.Fatal(err)
			}
			if c.code == protocol.CodeForked || c.code == protocol.CodeEpoch { // told at put, it has no nonce: still the session's own answer
				srv.same(t, d)
			}
			if p, err := d.Pending(ctx); err != nil || len(p) != 10 {
				t.Fatalf("%v: %d pending", err, len(p))
			}
			times = 0
			srv.mustSync(t, d)
			srv.settleAll()
			srv.mustSync(t, d)
			srv.same(t, d)
			if p, err := d.Pending(ctx); err != nil || len(p) != 0 {
				t.Fatalf("%v: %+v", err, p)
			}
		})
	}
}

// TestSchema: columns come, change and go while there are unsent edits.
func TestSchema(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	srv.foreign(item(1, "1", "old"))
	srv.foreign(item(2, "1", "5"))
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	mustExec(t, d, `ALTER TABLE item ADD COLUMN seen INTEGER`) // the application's own
	mustExec(t, d, `UPDATE item SET seen = 1`)
	mustExec(t, d, `UPDATE item SET val = 'edited' WHERE id = 1`)
	change := func(fn func(tab *protocol.Table)) { srv.redefine("items", fn) }
	// A column comes. The edit goes up in the old shape, and nothing is lost.
	change(func(tab *protocol.Table) {
		tab.Columns = append(tab.Columns, protocol.Column{Name: "Extra", Type: "boolean"}, protocol.Column{Name: "seen", Type: "text"})
	})
	srv.mu.Lock()
	for _, r := range srv.rows["public.item"] {
		r.img["Extra"], r.img["seen"] = ptr("t"), ptr("s")
	}
	srv.mu.Unlock()
	rep := srv.mustSync(t, d)
	if rep.Merged != 1 || len(rep.Sets) != 3 || !rep.Sets[1].Refresh {
		t.Fatalf("%+v: want the new column to be fetched at once", rep)
	}
	srv.same(t, d)
	if one[int](t, d, `SELECT "Extra" FROM item WHERE id = 2`) != 1 || one[int](t, d, `SELECT seen FROM item WHERE id = 2`) != 1 || one[string](t, d, `SELECT seen_2 FROM item WHERE id = 2`) != "s" {
		t.Fatal("columns")
	}
	mustExec(t, d, `UPDATE item SET "Extra" = 0 WHERE id = 2`)
	if rep := srv.mustSync(t, d); rep.Merged != 1 {
		t.Fatalf("%+v", rep)
	}
	srv.same(t, d)
	// A column changes its type, and another goes, with an edit under way.
	mustExec(t, d, `UPDATE item SET val = '6' WHERE id = 2`)
	change(func(tab *protocol.Table) {
		tab.Columns = tab.Columns[:4]
		tab.Columns[2].Type = "integer"
	})
	srv.mu.Lock()
	for _, r := range srv.rows["public.item"] {
		delete(r.img, "seen")
	}
	srv.mu.Unlock()
	srv.mustSync(t, d)
	srv.settleAll()
	srv.mustSync(t, d)
	if typ := one[string](t, d, `SELECT typeof(val) FROM item WHERE id = 2`); typ != "integer" {
		t.Fatalf("val is %s", typ)
	}
	if _, err := d.DB().ExecContext(ctx, `SELECT seen_2 FROM item`); err == nil {
		t.Fatal("a column that left the subset is still there")
	}
	// The key changes: the table is made anew, and unsent edits of it are in the log.
	mustExec(t, d, `UPDATE item SET val = 7 WHERE id = 2`)
	change(func(tab *protocol.Table) { tab.Key = []string{"grp", "id"} })
	srv.mu.Lock()
	rows := map[string]*mrow{}
	for _, r := range srv.rows["public.item"] {
		if r.img != nil {
			rows[keyOf([]*string{r.img["grp"], r.img["id"]})] = r
		}
	}
	srv.rows["public.item"] = rows
	srv.mu.Unlock()
	d.opts.MostChanges = 1
	srv.mustSync(t, d)
	srv.mustSync(t, d)
	srv.same(t, d)
}

// TestSetGoes: a set that the user no longer has leaves the device; its unsent edits are logged.
func TestSetGoes(t *testing.T) {
	for _, unsent := range []bool{false, true} {
		t.Run(fmt.Sprint("unsent=", unsent), func(t *testing.T) {
			ctx := context.Background()
			srv := newServer(t)
			srv.foreign("public.note", []string{"n"}, image{"id": ptr("n"), "done": ptr("t"), "weight": nil, "photo": nil})
			d := srv.device(t, "a", Options{})
			srv.mustSync(t, d)
			if unsent {
				mustExec(t, d, `UPDATE note SET weight = 1.5`)
			}
			srv.mu.Lock()
			srv.sets = []string{"items"}
			delete(srv.defs, "notes")
			srv.mu.Unlock()
			srv.mustSync(t, d)
			st, err := d.Status(ctx)
			if err != nil || len(st.Sets) != 1 || st.Unsent != 0 {
				t.Fatalf("%v %+v", err, st)
			}
			if _, err := d.DB().Exec(`SELECT * FROM note`); err == nil {
				t.Fatal("the table is still there")
			}
			l, err := d.Rejects(ctx)
			if err != nil || len(l) != map[bool]int{true: 1}[unsent] {
				t.Fatalf("%v %+v", err, l)
			}
			if unsent && (l[0].Code != protocol.CodeNotSubscribed || *l[0].Sent["weight"] != "1.5") {
				t.Fatalf("%+v", l[0])
			}
		})
	}
}

// TestRejectedHere: what no server can take is refused on the device, alone.
func TestRejectedHere(t *testing.T) {
	srv := newServer(t)
	srv.foreign(item(1, "1", "old"))
	d := srv.device(t, "a", Options{Limits: protocol.Limits{Row: 1000, Decompressed: 1 << 20}})
	srv.mustSync(t, d)
	mustExec(t, d, `UPDATE item SET val = CAST(x'ff' AS TEXT) WHERE id = 1`)
	mustExec(t, d, `INSERT INTO item VALUES (2, 1, ?)`, strings.Repeat("x", 2000))
	mustExec(t, d, `INSERT INTO item VALUES (3, 1, 'good')`)
	if rep := srv.mustSync(t, d); rep.Merged != 1 {
		t.Fatalf("%+v", rep)
	}
	srv.same(t, d)
	l, err := d.Rejects(context.Background())
	if err != nil || len(l) != 2 || l[0].Code != protocol.CodeInvalidValue || l[1].Code != protocol.CodeRowTooBig || *l[0].Right["val"] != "old" || l[1].Right != nil {
		t.Fatalf("%v %+v", err, l)
	}
}

// TestOwnHandle: a database handle of the application's own, with settings of its own, which survive.
func TestOwnHandle(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	db, err := sql.Open("sqlite", filepath.Join(t.TempDir(), "own.db")+"?_pragma=foreign_keys(1)&_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	if _, err := db.Exec(`CREATE TABLE item (mine TEXT)`); err != nil {
		t.Fatal(err)
	}
	srv.foreign(item(1, "1", "x"))
	d := srv.device(t, "a", Options{DB: db})
	srv.mustSync(t, d)
	srv.same(t, d)
	st, err := d.Status(ctx)
	if err != nil || st.Sets[0].Tables[0].Local != "public_item" || st.Sets[0].Tables[0].Rows != 1 {
		t.Fatalf("%v %+v", err, st)
	}
	if on := one[int](t, d, `PRAGMA foreign_keys`); on != 1 {
		t.Fatal("the application's foreign_keys setting was lost")
	}
}

// TestFileIsPrivate: the file holds the device's key.
func TestFileIsPrivate(t *testing.T) {
	srv := newServer(t)
	d := srv.device(t, "a", Options{})
	path := one[string](t, d, `SELECT file FROM pragma_database_list WHERE name = 'main'`)
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", err, fi.Mode())
	}
	raw, err := os.ReadFile(path)
	if err != nil || bytes.Contains(raw, []byte("s3cret")) {
		t.Fatal("the password is in the file", err)
	}
	// Not another device's file.
	err = d.Enrol(context.Background(), EnrolOptions{Servers: []string{"x"}, User: "anna", Device: "b", Password: "s3cret"})
	if err == nil || !strings.Contains(err.Error(), "belongs to anna/a") {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "A", "a.b", "*", "a b", "ä"} {
		if err := d.Enrol(context.Background(), EnrolOptions{User: bad, Device: "a"}); err == nil {
			t.Errorf("user %q taken", bad)
		}
	}
}

// TestNotEnrolled and other states in which a sync cannot begin.
func TestNotEnrolled(t *testing.T) {
	ctx := context.Background()
	d, err := Open(ctx, filepath.Join(t.TempDir(), "n.db"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	_, err = d.Sync(ctx, SyncOptions{})
	wantErr(t, err, ErrNotEnrolled)
	if _, err := d.Sync(ctx, SyncOptions{Wait: "long"}); err == nil {
		t.Fatal("wait taken")
	}
	d.syncing.Lock()
	_, err = d.Sync(ctx, SyncOptions{})
	d.syncing.Unlock()
	wantErr(t, err, ErrSyncing)
	mustExec(t, d, `UPDATE _ws_state SET format = 99`)
	if _, err := Open(ctx, one[string](t, d, `SELECT file FROM pragma_database_list WHERE name = 'main'`), Options{}); err == nil || !strings.Contains(err.Error(), "format 99") {
		t.Fatal(err)
	}
}

// TestSharedTable: a row that two sets hold stays until both have let it go.
func TestSharedTable(t *testing.T) {
	srv := newServer(t)
	srv.sets = []string{"items", "notes", "more"}
	srv.defs["more"] = &protocol.Definitions{Hash: "m1", Tables: srv.defs["items"].Tables}
	srv.foreign(item(1, "1", "x"))
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	srv.mu.Lock()
	srv.sets = []string{"items", "notes"}
	delete(srv.defs, "more")
	srv.mu.Unlock()
	srv.mustSync(t, d)
	srv.same(t, d)
	mustExec(t, d, `UPDATE item SET val = 'y'`)
	if rep := srv.mustSync(t, d); rep.Sent != 1 || rep.Merged != 1 {
		t.Fatalf("%+v", rep)
	}
	srv.same(t, d)
}

// TestTableMovesBetweenSets: a table that another set takes over with fewer columns loses the others, and a set that comes back is synced at once.
func TestTableMovesBetweenSets(t *testing.T) {
	srv := newServer(t)
	srv.sets = []string{"notes", "items"} // notes hears of it first
	srv.foreign(item(1, "1", "x"))
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	columns := func() (n int) {
		if err := d.DB().QueryRow(`SELECT count(*) FROM pragma_table_info('item')`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := columns()
	srv.mu.Lock()
	items, notes := srv.defs["items"], srv.defs["notes"]
	narrow := items.Tables[0]
	narrow.Columns = slices.DeleteFunc(slices.Clone(narrow.Columns), func(c protocol.Column) bool { return c.Name == "val" })
	srv.defs["notes"] = &protocol.Definitions{Hash: "n2", Tables: append(slices.Clone(notes.Tables), narrow)}
	srv.sets = []string{"notes"}
	delete(srv.defs, "items")
	srv.mu.Unlock()
	srv.mustSync(t, d)
	if got := columns(); got != before-1 {
		t.Fatalf("%d columns, %d before", got, before)
	}
	srv.mu.Lock()
	srv.defs["items"], srv.defs["notes"], srv.sets = items, notes, []string{"notes", "items"}
	srv.mu.Unlock()
	srv.mustSync(t, d)
	if got := columns(); got != before {
		t.Fatalf("%d columns, %d before", got, before)
	}
	srv.same(t, d)
}

// TestNonce: a restored file does not take the reply to its lost life for its own (rule D7).
func TestNonce(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	srv.foreign(item(1, "1", "old"))
	deaf := true
	dial := func(context.Context, Login) (Transport, error) {
		return &wire{s: srv, device: "a", fail: func(call string, after bool) error {
			if call == "ack" && deaf {
				return errCut // the pages stay
			}
			return nil
		}}, nil
	}
	d := srv.device(t, "a", Options{Dial: dial})
	srv.mustSync(t, d)
	backup := filepath.Join(t.TempDir(), "backup.db")
	mustExec(t, d, `VACUUM INTO ?`, backup)
	mustExec(t, d, `UPDATE item SET val = 'lost life'`)
	srv.mustSync(t, d)
	r, err := Open(ctx, backup, Options{Dial: dial})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	r.patience = impatient
	mustExec(t, r, `UPDATE item SET val = 'second life'`)
	srv.lag = 1 // the old page is read before the new request is taken
	rep := srv.mustSync(t, r)
	srv.lag = 0
	if !rep.Forked || rep.Rejected != 1 {
		t.Fatalf("%+v", rep)
	}
	if v := one[string](t, r, `SELECT val FROM item`); v != "lost life" {
		t.Fatal(v)
	}
	srv.settleAll()
	srv.mustSync(t, r)
	srv.same(t, r)
	// The first life goes on too: it is the one that has forked now.
	mustExec(t, d, `UPDATE item SET val = 'third'`)
	srv.mustSync(t, d)
	srv.mustSync(t, r)
	srv.same(t, d)
	srv.same(t, r)
}

// TestKeyNotation: the server writes a key in another way than the application did; there is still one row.
func TestKeyNotation(t *testing.T) {
	srv := newServer(t)
	srv.canonical = strings.ToLower
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	mustExec(t, d, `INSERT INTO note VALUES ('ABC', 1, 1.5, NULL)`)
	mustExec(t, d, `INSERT INTO note VALUES ('abd', 1, 1.5, NULL)`)
	if rep := srv.mustSync(t, d); rep.Merged != 2 {
		t.Fatalf("%+v", rep)
	}
	srv.same(t, d)
	if n := one[int](t, d, `SELECT count(*) FROM note WHERE id IN ('abc', 'ABC')`); n != 1 {
		t.Fatalf("%d rows", n)
	}
	// Edited on while the insert travelled: the edit moves with the row.
	mustExec(t, d, `INSERT INTO note VALUES ('XYZ', 1, 1.5, NULL)`)
	_, err := d.Sync(context.Background(), SyncOptions{Progress: func(p Progress) {
		if p.Stage == StageWait && p.Set == "notes" {
			mustExec(t, d, `UPDATE note SET weight = 2.5 WHERE id = 'XYZ'`)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if w := one[float64](t, d, `SELECT weight FROM note WHERE id = 'xyz'`); w != 2.5 {
		t.Fatal(w)
	}
	if rep := srv.mustSync(t, d); rep.Sent != 1 || rep.Merged != 1 {
		t.Fatalf("%+v", rep)
	}
	srv.settleAll()
	srv.mustSync(t, d)
	srv.same(t, d)
	// A row that is there under the canonical key.
	mustExec(t, d, `INSERT INTO note VALUES ('XyZ', 0, 0, NULL)`)
	if rep := srv.mustSync(t, d); rep.Rejected != 1 {
		t.Fatalf("%+v", rep)
	}
	srv.same(t, d)
	l, err := d.Rejects(context.Background())
	if err != nil || len(l) != 1 || l[0].Code != protocol.CodeRowExists || *l[0].Right["weight"] != "2.5" || *l[0].Sent["id"] != "XyZ" {
		t.Fatalf("%v %+v", err, l)
	}
}
