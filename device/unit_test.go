package device

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"github.com/waystage/waystage/protocol"
)

// uploads watches what a device sends.
type uploads struct{ sessions []*protocol.Request }

// watch has the server note every new session that it takes.
func watch(s *memServer) *uploads {
	u := &uploads{}
	s.taken = func(q *request) { u.sessions = append(u.sessions, q.req) }
	return u
}

// units gives "table key" -> unit of the session with the given position, from the end if negative.
func (u *uploads) units(t testing.TB, i int) map[string]int64 {
	t.Helper()
	if i < 0 {
		i += len(u.sessions)
	}
	if i < 0 || i >= len(u.sessions) {
		t.Fatalf("%d sessions were taken", len(u.sessions))
	}
	m := map[string]int64{}
	for _, ch := range u.sessions[i].Changes {
		m[ch.Table+" "+keyOf(ch.Key)] = ch.Unit
	}
	return m
}

// of gives the units of the newest session with changes of a table.
func (u *uploads) of(t testing.TB, table string) map[string]int64 {
	t.Helper()
	for _, r := range slices.Backward(u.sessions) {
		if len(r.Changes) > 0 && r.Changes[0].Table == table {
			return (&uploads{[]*protocol.Request{r}}).units(t, 0)
		}
	}
	t.Fatalf("no session with changes of %s", table)
	return nil
}

func wantUnits(t testing.TB, got map[string]int64, want map[string]int64) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("units %v, want %v", got, want)
	}
}

const insertItem = `INSERT INTO item VALUES (?, 1, 'x')`

// inUnit runs statements as one transaction of the application's, in plain SQL.
func inUnit(t testing.TB, d *Device, statements ...string) {
	t.Helper()
	q := "BEGIN; INSERT INTO waystage_unit DEFAULT VALUES; "
	for _, s := range statements {
		q += s + "; "
	}
	mustExec(t, d, q+"DELETE FROM waystage_unit; COMMIT")
}

func TestUnits(t *testing.T) {
	ctx := context.Background()
	start := func(t *testing.T, o Options) (*memServer, *Device, *uploads) {
		srv := newServer(t)
		for i := range 4 {
			srv.foreign(item(i+1, "1", "old"))
		}
		d := srv.device(t, "a", o)
		srv.mustSync(t, d)
		return srv, d, watch(srv)
	}
	t.Run("plain SQL and the helper", func(t *testing.T) {
		srv, d, up := start(t, Options{})
		mustExec(t, d, insertItem, 10)
		inUnit(t, d, `UPDATE item SET val = 'u' WHERE id IN (1, 2)`, `DELETE FROM item WHERE id = 3`, `INSERT INTO note (id) VALUES ('n')`)
		if err := d.Transaction(ctx, func(tx *sql.Tx) error { _, err := tx.Exec(insertItem, 11); return err }); err != nil {
			t.Fatal(err)
		}
		no := errors.New("no")
		err := d.Transaction(ctx, func(tx *sql.Tx) error { _, _ = tx.Exec(insertItem, 12); return no })
		wantErr(t, err, no)
		mustExec(t, d, insertItem, 13)
		srv.mustSync(t, d)
		wantUnits(t, up.of(t, "public.item"), map[string]int64{`public.item "1"`: 1, `public.item "2"`: 1, `public.item "3"`: 1, `public.item "10"`: 0, `public.item "11"`: 2, `public.item "13"`: 0})
		wantUnits(t, up.of(t, "public.note"), map[string]int64{`public.note "n"`: 1}) // another set: a session of its own
		if n := one[int](t, d, `SELECT count(*) FROM _ws_u_item`); n != 0 {
			t.Fatalf("%d unit numbers are left", n)
		}
	})
	t.Run("rows join units", func(t *testing.T) {
		srv, d, up := start(t, Options{})
		inUnit(t, d, `UPDATE item SET val = 'a' WHERE id IN (1, 2)`)
		inUnit(t, d, `UPDATE item SET val = 'b' WHERE id IN (2, 3)`)
		mustExec(t, d, `UPDATE item SET val = 'alone' WHERE id = 4`)
		inUnit(t, d, insertOf(20), `UPDATE item SET val = 'later' WHERE id = 4`)
		srv.mustSync(t, d)
		wantUnits(t, up.of(t, "public.item"), map[string]int64{`public.item "1"`: 1, `public.item "2"`: 1, `public.item "3"`: 1, `public.item "4"`: 2, `public.item "20"`: 2})
	})
	t.Run("what is put back leaves", func(t *testing.T) {
		srv, d, up := start(t, Options{})
		inUnit(t, d, `UPDATE item SET val = 'a' WHERE id IN (1, 2)`)
		inUnit(t, d, `UPDATE item SET val = 'b' WHERE id IN (2, 3)`)
		mustExec(t, d, `UPDATE item SET val = 'old' WHERE id = 2`)
		srv.mustSync(t, d)
		wantUnits(t, up.of(t, "public.item"), map[string]int64{`public.item "1"`: 1, `public.item "3"`: 2})
	})
	t.Run("replaced rows belong to it", func(t *testing.T) {
		srv, d, up := start(t, Options{})
		inUnit(t, d, `UPDATE OR REPLACE item SET id = 2, val = 'moved' WHERE id = 1`, `INSERT OR REPLACE INTO item VALUES (3, 1, 'r')`)
		srv.mustSync(t, d)
		wantUnits(t, up.of(t, "public.item"), map[string]int64{`public.item "1"`: 1, `public.item "2"`: 1, `public.item "3"`: 1})
	})
	t.Run("one session, whatever the limits", func(t *testing.T) {
		srv, d, up := start(t, Options{MostChanges: 2})
		mustExec(t, d, `UPDATE item SET val = 'alone' WHERE id = 1`)
		inUnit(t, d, insertOf(20), insertOf(21), insertOf(22), insertOf(23), insertOf(24))
		inUnit(t, d, insertOf(30), insertOf(31))
		srv.mustSync(t, d)
		var sizes []int
		for _, r := range up.sessions {
			if r.Set == "items" {
				sizes = append(sizes, len(r.Changes))
			}
		}
		if !slices.Equal(sizes, []int{1, 5, 2}) {
			t.Fatalf("sessions of %v records", sizes)
		}
	})
	t.Run("a row on its way holds its unit back", func(t *testing.T) {
		srv, d, up := start(t, Options{})
		srv.lateMerge = true
		mustExec(t, d, `UPDATE item SET val = 'first' WHERE id = 1`)
		srv.mustSync(t, d)
		inUnit(t, d, `UPDATE item SET val = 'second' WHERE id IN (1, 2)`)
		mustExec(t, d, `UPDATE item SET val = 'alone' WHERE id = 3`)
		srv.mustSync(t, d)
		wantUnits(t, up.of(t, "public.item"), map[string]int64{`public.item "3"`: 0})
		srv.late()
		srv.lateMerge = false
		srv.mustSync(t, d) // learns the verdict
		srv.mustSync(t, d)
		wantUnits(t, up.of(t, "public.item"), map[string]int64{`public.item "1"`: 1, `public.item "2"`: 1})
		srv.settleAll()
		srv.mustSync(t, d)
		srv.same(t, d)
	})
	t.Run("a forgotten end", func(t *testing.T) {
		srv, d, up := start(t, Options{})
		mustExec(t, d, `INSERT INTO waystage_unit DEFAULT VALUES`)
		mustExec(t, d, `UPDATE item SET val = 'a' WHERE id = 1`)
		mustExec(t, d, `INSERT INTO waystage_unit DEFAULT VALUES`) // begins another
		mustExec(t, d, `UPDATE item SET val = 'b' WHERE id = 2`)
		srv.mustSync(t, d) // ends it
		wantUnits(t, up.of(t, "public.item"), map[string]int64{`public.item "1"`: 1, `public.item "2"`: 2})
		mustExec(t, d, `UPDATE item SET val = 'c' WHERE id = 3`)
		srv.mustSync(t, d)
		wantUnits(t, up.of(t, "public.item"), map[string]int64{`public.item "3"`: 0})
	})
	t.Run("a restored file sends them again whole", func(t *testing.T) {
		srv, d, up := start(t, Options{})
		inUnit(t, d, `UPDATE item SET val = 'a' WHERE id IN (1, 2)`, insertOf(20))
		inUnit(t, d, `UPDATE item SET val = 'b' WHERE id = 3`)
		backup := filepath.Join(t.TempDir(), "backup.db")
		mustExec(t, d, `VACUUM INTO ?`, backup)
		srv.mustSync(t, d)
		want := map[string]int64{`public.item "1"`: 1, `public.item "2"`: 1, `public.item "3"`: 2, `public.item "20"`: 1}
		wantUnits(t, up.of(t, "public.item"), want)
		b, err := Open(ctx, backup, Options{Dial: srv.dial("a")})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = b.Close() }()
		b.patience = impatient
		if rep := srv.mustSync(t, b); !rep.Forked {
			t.Fatal("the copy was not told that it is one")
		}
		wantUnits(t, up.of(t, "public.item"), want)
	})
	t.Run("a rebuilt mirror: rows of two epochs in one unit", func(t *testing.T) {
		srv, d, up := start(t, Options{})
		mustExec(t, d, `UPDATE item SET val = 'a' WHERE id = 1`)
		srv.rebuild("e2")
		d.opts.Dial = func(context.Context, Login) (Transport, error) {
			return &wire{s: srv, device: "a", fail: func(call string, after bool) error {
				if call == "put" && one[string](t, d, `SELECT epoch FROM _ws_state`) == "" {
					return errCut // the new mirror's rows have not come yet: a sync of nothing but them would hide what is tested
				}
				return nil
			}}, nil
		}
		_, err := d.Sync(ctx, SyncOptions{})
		wantErr(t, err, errCut)
		d.opts.Dial = srv.dial("a")
		inUnit(t, d, `UPDATE item SET val = 'b' WHERE id IN (1, 2)`, insertOf(20))
		srv.mustSync(t, d)
		srv.mustSync(t, d)
		got := up.of(t, "public.item")
		if got[`public.item "2"`] == 0 || got[`public.item "2"`] != got[`public.item "20"`] {
			t.Fatalf("units %v", got)
		}
		srv.settleAll()
		srv.mustSync(t, d)
		srv.same(t, d)
	})
}

func insertOf(id int) string { return fmt.Sprintf(`INSERT INTO item VALUES (%d, 1, 'new')`, id) }

// TestUnitRejectedHere: a record that no server can take takes its transaction with it, and nothing else.
func TestUnitRejectedHere(t *testing.T) {
	ctx := context.Background()
	codes := func(t *testing.T, d *Device) (l []string) {
		rejects, err := d.Rejects(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rejects {
			l = append(l, fmt.Sprint(keyOf(r.Key), " ", r.Code))
		}
		slices.Sort(l)
		return l
	}
	t.Run("a row that cannot be sent", func(t *testing.T) {
		srv := newServer(t)
		d := srv.device(t, "a", Options{})
		srv.mustSync(t, d)
		inUnit(t, d, insertOf(1), `INSERT INTO item VALUES (2, 1, CAST(x'ff' AS TEXT))`, `INSERT INTO note (id) VALUES ('other set')`)
		mustExec(t, d, insertItem, 3)
		rep := srv.mustSync(t, d)
		if got := codes(t, d); !slices.Equal(got, []string{`"1" transaction_rejected`, `"2" invalid_value`, `"other set" transaction_rejected`}) || rep.Sent != 1 {
			t.Fatalf("%v, sent %d", got, rep.Sent)
		}
		if n := one[int](t, d, `SELECT count(*) FROM _ws_broken`); n != 0 {
			t.Fatalf("%d broken units are kept", n)
		}
		srv.same(t, d)
	})
	for _, unit := range []bool{true, false} {
		t.Run(fmt.Sprintf("too big for the server, unit=%v", unit), func(t *testing.T) {
			srv := newServer(t)
			d := srv.device(t, "a", Options{Dial: func(context.Context, Login) (Transport, error) {
				return &sizer{&wire{s: srv, device: "a"}, 400}, nil
			}, Encoding: "none"})
			srv.mustSync(t, d)
			want := []string{`"1" too_big`}
			if unit {
				var big []string
				want = nil
				for i := range 9 {
					big = append(big, insertOf(10+i))
					want = append(want, fmt.Sprintf(`"%d" too_big`, 10+i))
				}
				inUnit(t, d, big...)
			} else {
				mustExec(t, d, `INSERT INTO item VALUES (1, 1, hex(zeroblob(300)))`)
			}
			mustExec(t, d, insertItem, 3)
			mustExec(t, d, insertItem, 4)
			srv.mustSync(t, d)
			if got := codes(t, d); !slices.Equal(got, want) {
				t.Fatalf("%v", got)
			}
			srv.settleAll()
			srv.mustSync(t, d)
			srv.same(t, d)
			if n := one[int](t, d, `SELECT count(*) FROM item`); n != 2 {
				t.Fatalf("%d rows", n)
			}
		})
	}
}

// sizer refuses requests over a size.
type sizer struct {
	Transport
	most int
}

func (s *sizer) Put(ctx context.Context, session, part string, p Payload) (protocol.Receipt, error) {
	if len(p.Data) > s.most {
		return protocol.Receipt{}, &protocol.Error{Code: protocol.CodeTooBig, Message: "too big"}
	}
	return s.Transport.Put(ctx, session, part, p)
}
