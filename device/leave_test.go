package device

import (
	"cmp"
	"context"
	"slices"
	"testing"

	"github.com/waystage/waystage/protocol"
)

// redefine changes the definition of the first table of a set from now on.
func (s *memServer) redefine(set string, change func(tab *protocol.Table)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.defs[set]
	tab := old.Tables[0]
	tab.Columns = slices.Clone(tab.Columns)
	change(&tab)
	s.defs[set] = &protocol.Definitions{Hash: old.Hash + "+", Tables: append([]protocol.Table{tab}, old.Tables[1:]...)}
}

// during is a connection on which *now is called once, if it is set, after the next call of this name: in the middle of a sync.
func (s *memServer) during(name string, now *func()) Dialer {
	return func(context.Context, Login) (Transport, error) {
		return &wire{s: s, device: "a", fail: func(call string, after bool) error {
			if f := *now; call == name && after && f != nil {
				*now = nil
				f()
			}
			return nil
		}}, nil
	}
}

// TestEditOfAColumnThatLeaves: what was written to a column after the request was frozen, and before the device heard that the column
// leaves the subscription, is in the rejected log; what else was edited in the row goes up.
func TestEditOfAColumnThatLeaves(t *testing.T) {
	for _, tc := range []struct {
		name   string
		before []string // sent
		during []string // while the reply is on its way that takes val away
		want   []string // what the log says was written to val
		unsent int
	}{
		{name: "nothing was written to it", during: []string{`UPDATE item SET grp = 2 WHERE id = 1`}, unsent: 1},
		{name: "an edit", during: []string{`UPDATE item SET val = 'late' WHERE id = 1`}, want: []string{"late"}},
		{name: "an edit of another column, too", during: []string{`UPDATE item SET val = 'late', grp = 2 WHERE id = 1`}, want: []string{"late"}, unsent: 1},
		{name: "a new row", during: []string{`INSERT INTO item (id, grp, val) VALUES (3, 1, 'fresh')`}, want: []string{"fresh"}, unsent: 1},
		{name: "a row that is deleted", during: []string{`UPDATE item SET val = 'late' WHERE id = 1`, `DELETE FROM item WHERE id = 1`}, unsent: 1},
		{name: "written and taken back", during: []string{`UPDATE item SET val = 'late' WHERE id = 1`, `UPDATE item SET val = 'one' WHERE id = 1`}},
		{name: "sent, and written again", before: []string{`UPDATE item SET val = 'sent' WHERE id = 1`}, during: []string{`UPDATE item SET val = 'late' WHERE id = 1`}, want: []string{"late", "sent"}},
		{name: "sent", before: []string{`UPDATE item SET val = 'sent' WHERE id = 1`}, want: []string{"sent"}},
		{name: "a transaction", during: []string{`BEGIN; INSERT INTO waystage_unit DEFAULT VALUES; UPDATE item SET val = 'late' WHERE id = 1; UPDATE item SET grp = 2 WHERE id = 2; DELETE FROM waystage_unit; COMMIT`}, want: []string{"2", "late"}, unsent: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := context.Background()
			srv := newServer(t)
			srv.sets = []string{"items"}
			srv.subset = map[string]bool{"1": true, "2": true}
			srv.foreign(item(1, "1", "one"))
			srv.foreign(item(2, "1", "two"))
			var now func()
			d := srv.device(t, "a", Options{Dial: srv.during("get", &now)})
			srv.mustSync(t, d)
			for _, q := range tc.before {
				mustExec(t, d, q)
			}
			srv.redefine("items", func(tab *protocol.Table) {
				tab.Columns = slices.DeleteFunc(tab.Columns, func(c protocol.Column) bool { return c.Name == "val" })
			})
			now = func() {
				for _, q := range tc.during {
					mustExec(t, d, q)
				}
			}
			if _, err := d.Sync(ctx, SyncOptions{}); err != nil {
				t.Fatal(err)
			}
			if now != nil {
				t.Fatal("nothing was edited during the sync")
			}
			if st, err := d.Status(ctx); err != nil || st.Unsent != tc.unsent {
				t.Errorf("%v: %d unsent edits, want %d", err, st.Unsent, tc.unsent)
			}
			srv.mustSync(t, d)
			srv.settleAll()
			srv.mustSync(t, d)
			srv.mu.Lock()
			for _, r := range srv.rows["public.item"] {
				delete(r.img, "val") // of no interest to the device
			}
			srv.mu.Unlock()
			srv.same(t, d)
			if p, err := d.Pending(ctx); err != nil || len(p) != 0 {
				t.Errorf("%v: still to be sent: %+v", err, p)
			}
			rejects, err := d.Rejects(ctx)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, r := range rejects {
				if want := map[bool]protocol.Code{true: protocol.CodeUnknownColumn, false: protocol.CodeSchema}[r.Sent["val"] != nil && *r.Sent["val"] == "sent"]; r.Code != want && r.Code != protocol.CodeTransaction {
					t.Errorf("%+v: want the code %s", r, want)
				}
				got = append(got, *cmp.Or(r.Sent["val"], r.Sent["grp"]))
			}
			slices.Sort(got)
			if !slices.Equal(got, tc.want) {
				t.Errorf("the rejected log has %q, want %q", got, tc.want)
			}
		})
	}
}

// TestKeyOfAnotherType: a key column whose values SQLite keeps in another way makes the table anew; unsent edits are in the log.
func TestKeyOfAnotherType(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	srv.foreign(item(1, "1", "one"))
	srv.foreign(item(2, "1", "two"))
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	mustExec(t, d, `UPDATE item SET val = 'edited' WHERE id = 2`)
	srv.redefine("items", func(tab *protocol.Table) { tab.Columns[0].Type = "text" })
	srv.mustSync(t, d)
	srv.settleAll()
	srv.mustSync(t, d)
	if got := one[string](t, d, `SELECT typeof(id) FROM item WHERE val = 'one'`); got != "text" {
		t.Errorf("the key is kept as %s", got)
	}
	if got := one[string](t, d, `SELECT val FROM item WHERE id = '2'`); got != "edited" {
		rejects, err := d.Rejects(ctx)
		if err != nil || len(rejects) != 1 || *rejects[0].Sent["val"] != "edited" {
			t.Errorf("%v: the row has %q, and the log %+v", err, got, rejects)
		}
	}
	mustExec(t, d, `UPDATE item SET val = 'again' WHERE id = '2'`)
	if rep := srv.mustSync(t, d); rep.Merged != 1 {
		t.Errorf("%+v", rep)
	}
	srv.same(t, d)
}

// TestColumnThatComes: a row that was inserted before a column came is sent with the column's default, as one that is inserted afterwards; rows of the server
// have what the server says, and an edit of them does not write the column.
func TestColumnThatComes(t *testing.T) {
	srv := newServer(t)
	srv.sets = []string{"items"}
	srv.foreign(item(1, "1", "one"))
	srv.foreign(item(2, "1", "two"))
	var now func()
	d := srv.device(t, "a", Options{Dial: srv.during("get", &now)})
	srv.mustSync(t, d)
	srv.redefine("items", func(tab *protocol.Table) {
		tab.Columns = append(tab.Columns, protocol.Column{Name: "filled", Type: "text", Default: "seven"})
	})
	srv.mu.Lock()
	for _, r := range srv.rows["public.item"] {
		r.img["filled"] = ptr("of the server")
	}
	srv.mu.Unlock()
	now = func() { // while the reply is on its way that brings the column
		mustExec(t, d, `INSERT INTO item (id, grp, val) VALUES (3, 1, 'before')`)
		mustExec(t, d, `UPDATE item SET val = 'edited' WHERE id = 2`)
	}
	srv.mustSync(t, d)
	mustExec(t, d, `INSERT INTO item (id, grp, val) VALUES (4, 1, 'after')`)
	srv.mustSync(t, d)
	srv.settleAll()
	srv.mustSync(t, d)
	for id, want := range map[string]string{"1": "one of the server", "2": "edited of the server", "3": "before seven", "4": "after seven"} {
		img := srv.rows["public.item"][`"`+id+`"`].img
		if got := *cmp.Or(img["val"], ptr("-")) + " " + *cmp.Or(img["filled"], ptr("-")); got != want {
			t.Errorf("row %s is %q at the server, want %q", id, got, want)
		}
	}
	srv.same(t, d)
}

// TestRefusedAsItsSetLeaves: the source's refusal of a record is in the log, and the device goes on, although the record's table leaves with the same reply.
func TestRefusedAsItsSetLeaves(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	mustExec(t, d, `INSERT INTO note (id, done) VALUES ('n', 1)`)
	if rep := srv.mustSync(t, d); rep.Merged != 1 {
		t.Fatalf("%+v", rep)
	}
	srv.mu.Lock()
	srv.verdict(srv.pending()[0], true, false)
	srv.sets = []string{"items"}
	delete(srv.defs, "notes")
	srv.mu.Unlock()
	if rep := srv.mustSync(t, d); rep.Rejected != 1 {
		t.Errorf("%+v", rep)
	}
	l, err := d.Rejects(ctx)
	if err != nil || len(l) != 1 || l[0].State != protocol.Refused || *l[0].Sent["done"] != "t" {
		t.Errorf("%v: %+v", err, l)
	}
	srv.mustSync(t, d)
	if got := one[int](t, d, `SELECT count(*) FROM sqlite_master WHERE name = 'note'`); got != 0 {
		t.Error("the table is still there")
	}
}

// TestPutBackAsTheKeyChanges: a row that was inserted, sent and deleted again is not forgotten when its table is made anew: the delete is in the log.
func TestPutBackAsTheKeyChanges(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	srv.sets = []string{"items"}
	var now func()
	d := srv.device(t, "a", Options{Dial: srv.during("get", &now)})
	srv.mustSync(t, d)
	mustExec(t, d, `INSERT INTO item (id, grp, val) VALUES (3, 1, 'sent')`)
	srv.redefine("items", func(tab *protocol.Table) { tab.Columns[0].Type = "text" })
	now = func() { mustExec(t, d, `DELETE FROM item WHERE id = 3`) }
	srv.mustSync(t, d)
	l, err := d.Rejects(ctx)
	if err != nil || len(l) != 1 || l[0].Op != protocol.Delete || l[0].Code != protocol.CodeSchema {
		t.Errorf("%v: %+v", err, l)
	}
	srv.settleAll()
	srv.mustSync(t, d)
	srv.same(t, d)
}
