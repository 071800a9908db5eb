package device

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/waystage/waystage/protocol"
)

// TestBuilt: what the application was built for is noted in the file and goes with every request, until another is named.
func TestBuilt(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	path := filepath.Join(t.TempDir(), "a.db")
	var told *protocol.Built
	srv.taken = func(q *request) { told = q.req.Built }
	dial := func(context.Context, Login) (Transport, error) { return &wire{s: srv, device: "a"}, nil }
	enrolled := false
	for _, tc := range []struct {
		name, want string
		built      *protocol.Built
	}{
		{"nothing is said", "", nil},
		{"said", "spring", &protocol.Built{Name: "spring", Tables: []protocol.Layout{{Table: "public.item", Columns: []string{"id", "val"}}}}},
		{"opened by a program that does not say", "spring", nil},
		{"another", "summer", &protocol.Built{Name: "summer", Tables: []protocol.Layout{{Table: "public.item"}, {Table: "public.note"}}}},
		{"everything", "", &protocol.Built{Name: "all"}},
	} {
		d, err := Open(ctx, path, Options{Dial: dial, Built: tc.built})
		if err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		d.patience = impatient
		if !enrolled {
			if err := d.Enrol(ctx, EnrolOptions{Servers: []string{"mem"}, User: "anna", Device: "a"}); err != nil {
				t.Fatal(err)
			}
			enrolled = true
		}
		srv.mustSync(t, d)
		got := ""
		if told != nil {
			got = told.Name
		}
		noted, err := d.Built(ctx)
		if err != nil || got != tc.want || (noted == nil) != (tc.want == "") || noted != nil && (noted.Name != tc.want || len(noted.Tables) != len(told.Tables)) {
			t.Errorf("%s: %v: the server is told %+v, the file says %+v; want %q", tc.name, err, told, noted, tc.want)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	// One that stays open tells of a change, too.
	d, err := Open(ctx, path, Options{Dial: dial})
	if err != nil {
		t.Fatal(err)
	}
	d.patience = impatient
	srv.mustSync(t, d)
	if err := d.BuildFor(ctx, protocol.Built{Name: "autumn", Tables: []protocol.Layout{{Table: "public.item"}}}); err != nil {
		t.Fatal(err)
	}
	if n := one[int](t, d, `SELECT count(*) FROM _ws_set WHERE hash <> ''`); n != 0 {
		t.Errorf("%d sets would be taken for known", n)
	}
	srv.mustSync(t, d)
	if told == nil || told.Name != "autumn" {
		t.Errorf("the server is told %+v", told)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if d, err := Open(ctx, path, Options{Built: &protocol.Built{Tables: []protocol.Layout{{Table: "a.b"}, {Table: "a.b"}}}}); err == nil {
		_ = d.Close()
		t.Error("a table that is named twice was taken")
	}
}
