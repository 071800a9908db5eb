package cmd

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/schema"
)

// TestRejectFilters: each filter of the rejected log, alone and together, chooses what it says and nothing else.
func TestRejectFilters(t *testing.T) {
	dsn := pgtest.Mirror(t)
	if err := schema.MigrateMirror(t.Context(), dsn); err != nil {
		t.Fatal(err)
	}
	cfg, err := schema.Config(dsn, "test")
	if err != nil {
		t.Fatal(err)
	}
	db, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := db.Exec(context.Background(), sql, args...); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	for id, d := range [][2]string{{"amina", "phone"}, {"amina", "tablet"}, {"bruno", "phone"}} {
		exec(`INSERT INTO waystage.app_user (name, password_hash) VALUES ($1, '!') ON CONFLICT DO NOTHING`, d[0])
		exec(`INSERT INTO waystage.device (id, user_name, name) OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3)`, id+1, d[0], d[1])
	}
	for i, r := range []struct {
		device int
		table  string
		code   string
		days   int // ago
	}{
		{1, "public.job", "stale_version", 1}, {1, "public.job", "row_exists", 3}, {2, "public.region", "stale_version", 5}, {3, "other.job", "stale_version", 10}, {3, "public.region", "invalid_value", 0},
	} {
		exec(`INSERT INTO waystage.change (id, session_id, idx, device_id, incarnation, n, tbl, tname, op, key, state, stamp, code, decided_at)
			OVERRIDING SYSTEM VALUE VALUES ($1, $1, 0, $2, 'i', 1, 1, $3, 'U', '{1}', 'rejected', 1, $4, now() - make_interval(days => $5, mins => 1))`, i+1, r.device, r.table, r.code, r.days)
	}
	for _, c := range []struct {
		f    rejectFilter
		want []int64
	}{
		{rejectFilter{}, []int64{5, 4, 3, 2, 1}},
		{rejectFilter{user: "amina"}, []int64{3, 2, 1}},
		{rejectFilter{device: "phone"}, []int64{5, 4, 2, 1}},
		{rejectFilter{user: "amina", device: "phone"}, []int64{2, 1}},
		{rejectFilter{table: "job"}, []int64{4, 2, 1}},
		{rejectFilter{table: "public.job"}, []int64{2, 1}},
		{rejectFilter{reason: "stale_version"}, []int64{4, 3, 1}},
		{rejectFilter{since: "4d"}, []int64{5, 2, 1}},
		{rejectFilter{until: "4d"}, []int64{4, 3}},
		{rejectFilter{since: "6d", until: "2d"}, []int64{3, 2}},
		{rejectFilter{user: "amina", table: "region", reason: "stale_version", since: "6d", until: "2d"}, []int64{3}},
		{rejectFilter{user: "amina", reason: "invalid_value"}, nil},
		{rejectFilter{user: "' OR true --"}, nil},
		{rejectFilter{limit: 2}, []int64{5, 4}},
	} {
		c.f.status = "all"
		rows, err := collect[reject](c.f.query(t.Context(), db, false))
		if err != nil {
			t.Fatalf("%+v: %v", c.f, err)
		}
		var got []int64
		for _, r := range rows {
			got = append(got, r.ID)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%+v chooses %v, want %v", c.f, got, c.want)
		}
	}
	for _, f := range []rejectFilter{{since: "yesterday"}, {until: "31.1.2026"}, {session: "x"}, {unit: 1}, {status: "lost"}} {
		if f.status == "" {
			f.status = "all"
		}
		if _, err := f.query(t.Context(), db, false); err == nil {
			t.Error(fmt.Sprintf("%+v", f), "is taken")
		}
	}
}
