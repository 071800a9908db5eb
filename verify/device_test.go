package verify_test

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
)

// TestDeviceIsVerified: each kind of damage to a device's file is found, named, told and repaired, and edits stay.
func TestDeviceIsVerified(t *testing.T) {
	r := newRig(t)
	r.serve()
	if err := registry.New(r.mirror, nil).AddUser(r.ctx, "alice", "visiting-hours", "staff"); err != nil {
		t.Fatal(err)
	}
	// One change a session, so that there are rows with edits while others are on their way.
	d, err := device.Open(r.ctx, filepath.Join(t.TempDir(), "alice.db"), device.Options{MostChanges: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	r.enrol(d, "alice")
	verified := func(repair bool) device.Verification {
		t.Helper()
		l, err := d.Verify(r.ctx, device.VerifyOptions{Repair: repair})
		if err != nil || len(l) != 1 {
			t.Fatalf("%+v %v", l, err)
		}
		return l[0]
	}
	exec := func(sqls ...string) {
		t.Helper()
		for _, sql := range sqls {
			if _, err := d.DB().ExecContext(r.ctx, sql); err != nil {
				t.Fatalf("%s: %v", sql, err)
			}
		}
	}
	text := func(sql string) (s string) {
		t.Helper()
		if err := d.DB().QueryRowContext(r.ctx, sql).Scan(&s); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		return s
	}
	told := func() string {
		t.Helper()
		return r.value(r.mirror, "SELECT concat_ws(' ', rows, different, repaired, sample->0->>'kind', sample->0->>'table') FROM waystage.device_check")
	}
	if v := verified(false); v.Different != 0 || v.Rows != 300+500+406+100 || v.More {
		t.Fatalf("%+v", v)
	}
	if got := told(); got != "1306 0 0" {
		t.Errorf("told: %s", got)
	}
	behind := func(sqls ...string) []string { // as something would that knows nothing of the capture
		return append(append([]string{"UPDATE _ws_state SET capture = 0"}, sqls...), "UPDATE _ws_state SET capture = 1")
	}
	edits := func(id int, more ...string) (sqls []string) { // the third is still unsent when rows are compared
		for i := range 3 {
			sqls = append(sqls, fmt.Sprintf("UPDATE kinds SET n = '7.70' WHERE id = %d", id-2+i))
		}
		return append(sqls, more...)
	}
	for _, c := range []struct {
		name    string
		damage  []string
		edits   []string // and damage beneath them
		table   string
		kind    string
		key     string
		columns []string
	}{
		{name: "altered", damage: behind("UPDATE kinds SET j = '{}', bo = 0 WHERE id = 1"), table: "public.kinds", kind: protocol.DiffValues, key: "1", columns: []string{"bo", "j"}},
		{name: "lost", damage: behind("DELETE FROM words WHERE w = 'é'"), table: "public.words", kind: protocol.DiffMissing, key: "é"},
		{name: "too many", damage: behind("INSERT INTO words (w, n) VALUES ('nobody knows', 1)"), table: "public.words", kind: protocol.DiffExtra, key: "nobody knows"},
		{name: "version", damage: []string{"UPDATE _ws_v_kinds SET sver = '1' WHERE k_id = 3"}, table: "public.kinds", kind: protocol.DiffVersion, key: "3"},
		{name: "version lost", damage: []string{"DELETE FROM _ws_v_kinds WHERE k_id = 4"}, table: "public.kinds", kind: protocol.DiffVersion, key: "4"},
		{name: "set lost", damage: []string{"UPDATE _ws_v_kinds SET sets = 0 WHERE k_id = 5"}, table: "public.kinds", kind: protocol.DiffMissing, key: "5"},
		{name: "row and version lost", damage: behind("DELETE FROM kinds WHERE id = 6", "DELETE FROM _ws_v_kinds WHERE k_id = 6"), table: "public.kinds", kind: protocol.DiffMissing, key: "6"},
		{name: "base of an edit", edits: edits(13, "UPDATE _ws_s_kinds SET b_c = 'wrong' WHERE k_id = 13"), table: "public.kinds", kind: protocol.DiffValues, key: "13", columns: []string{"c"}},
		{name: "server's image beneath an edit", edits: edits(23, "UPDATE _ws_s_kinds SET sstate = 1, simg = '{\"id\":\"23\"}' WHERE k_id = 23"), table: "public.kinds", kind: protocol.DiffValues, key: "23"},
		{name: "nothing but an edit", edits: edits(33)},
	} {
		t.Run(c.name, func(t *testing.T) {
			check := func(v device.Verification) {
				t.Helper()
				if c.kind == "" {
					if v.Different != 0 {
						t.Errorf("an edit is called a difference: %+v", v.Differences)
					}
					return
				}
				if v.Different != 1 || len(v.Differences) != 1 || v.More {
					t.Fatalf("%+v", v)
				}
				got := v.Differences[0]
				var columns []string
				for _, col := range got.Columns {
					columns = append(columns, col.Name)
				}
				if got.Table != c.table || got.Kind != c.kind || *got.Key[0] != c.key || c.columns != nil && !slices.Equal(columns, c.columns) {
					t.Errorf("%+v %v", got, columns)
				}
			}
			exec(c.damage...)
			exec(c.edits...)
			if c.edits == nil { // what is damaged stays so until it is repaired
				check(verified(false))
				if got := told(); got != fmt.Sprintf("1306 1 0 %s %s", c.kind, c.table) {
					t.Errorf("told: %s", got)
				}
				v := verified(true)
				if check(v); v.Repaired != 1 {
					t.Errorf("%d rows were repaired", v.Repaired)
				}
			} else {
				check(verified(true))
				if got := text("SELECT n FROM kinds WHERE id = " + cmp.Or(c.key, "33")); got != "7.70" {
					t.Errorf("the edit is gone: %s", got)
				}
				if _, err := d.Sync(r.ctx, device.SyncOptions{Wait: protocol.WaitSource}); err != nil {
					t.Fatal(err)
				}
				r.eventually("the edit reaches the source", func() bool {
					return r.value(r.source, "SELECT n::text FROM public.kinds WHERE id = "+cmp.Or(c.key, "33")) == "7.70"
				})
			}
			if v := verified(false); v.Different != 0 {
				t.Errorf("%+v", v)
			}
		})
	}
	// All of a table, which is more than one round of a repair takes.
	exec(behind("DELETE FROM pair", "DELETE FROM _ws_v_pair WHERE k_a < 5")...)
	if v := verified(true); v.Different != 500 || v.Repaired != 500 {
		t.Errorf("%d, %d", v.Different, v.Repaired)
	}
	// The operator asks: the device verifies with its next sync, and tells.
	r.exec(r.mirror, "DELETE FROM waystage.device_check; UPDATE waystage.device SET verify_asked_at = clock_timestamp()")
	exec(behind("UPDATE kinds SET f = 1.5 WHERE id = 1")...)
	if _, err := d.Sync(r.ctx, device.SyncOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := told(); got != "1306 1 0 values public.kinds" {
		t.Errorf("told: %s", got)
	}
	rep, err := d.Sync(r.ctx, device.SyncOptions{})
	if err != nil || len(rep.Sets) != 0 || len(rep.Nothing) != 1 {
		t.Errorf("%d sessions, %v: a verification that is over goes on, or the set is not asked about", len(rep.Sets), err)
	}
	if l, err := d.Verified(r.ctx); err != nil || len(l) != 1 || l[0].Different != 1 {
		t.Errorf("%+v %v", l, err)
	}
}
