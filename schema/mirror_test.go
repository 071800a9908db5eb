package schema

import (
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/internal/pgtest"
)

// mirrored makes mirror tables from tables at a source, without copying.
func mirrored(t *testing.T, d *Definitions, ddl ...string) (source, mirror interface {
	Querier
}, tables []*Table, mirrorDSN string) {
	t.Helper()
	ctx := testContext(t)
	src := connect(t, pgtest.Source(t))
	exec(t, src, ddl...)
	tables, problems, err := ReadTables(ctx, src, d.TableNames())
	if err != nil || len(problems) > 0 {
		t.Fatal(err, problems)
	}
	if problems := d.Check(tables); len(problems) > 0 {
		t.Fatal(problems)
	}
	dsn := pgtest.Mirror(t)
	if err := MigrateMirror(ctx, dsn); err != nil {
		t.Fatal(err)
	}
	m := connect(t, dsn)
	for range 2 { // twice: it can be repeated
		if err := EnsureMirror(ctx, m, tables, d); err != nil {
			t.Fatal(err)
		}
	}
	return src, m, tables, dsn
}

func TestTombstones(t *testing.T) {
	d := define(t, `version: 1
subscriptions:
  keyed: {table: public.keyed, key: owner, rows: "select 'x'"}
  plain: {table: public.plain}
`)
	_, mirror, tables, dsn := mirrored(t, d, "CREATE TABLE public.keyed (a int, b char(4), owner inet, t text, PRIMARY KEY (b, a))", "CREATE TABLE public.plain (id boolean PRIMARY KEY, t text)")
	conn := connect(t, dsn)
	id := map[string]int{}
	for _, tbl := range tables {
		id[tbl.Name] = tbl.ID
	}
	stones := func() []string {
		t.Helper()
		out := column(t, mirror, "WITH gone AS (DELETE FROM waystage.tombstone RETURNING *) SELECT tbl || ' ' || coalesce(val, 'null') || ' ' || key::text FROM gone ORDER BY 1")
		for i := range out {
			for name, n := range id {
				if rest, ok := strings.CutPrefix(out[i], string(rune('0'+n))+" "); ok {
					out[i] = name + " " + rest
				}
			}
		}
		return out
	}
	exec(t, conn, "INSERT INTO public.keyed VALUES (1, 'x', '10.0.0.1', 't'), (2, 'y', '10.0.0.1', 't'), (3, 'z', NULL, 't')", "INSERT INTO public.plain VALUES (true, 'a'), (false, 'b')")
	exec(t, conn, "UPDATE public.keyed SET t = 'other', owner = owner", "UPDATE public.plain SET t = 'c'")
	equal(t, stones(), nil)
	// The old place, in the text form of the wire: an address without its mask, a padded char, t and f.
	exec(t, conn, "UPDATE public.keyed SET owner = '10.0.0.2' WHERE a < 3", "UPDATE public.keyed SET owner = '10.0.0.9' WHERE a = 3", "UPDATE public.keyed SET a = 4 WHERE a = 3")
	equal(t, stones(), []string{`keyed 10.0.0.1 {"x   ",1}`, `keyed 10.0.0.1 {"y   ",2}`, `keyed 10.0.0.9 {"z   ",3}`, `keyed null {"z   ",3}`})
	exec(t, conn, "INSERT INTO public.keyed VALUES (4, 'z', '10.0.0.7', 't') ON CONFLICT (b, a) DO UPDATE SET owner = excluded.owner")
	equal(t, stones(), []string{`keyed 10.0.0.9 {"z   ",4}`})
	exec(t, conn, "BEGIN", "DELETE FROM public.keyed", "DELETE FROM public.plain WHERE id", "DELETE FROM public.plain WHERE id")
	equal(t, column(t, conn, "SELECT DISTINCT (stamp = pg_current_xact_id()::text::bigint)::text FROM waystage.tombstone"), []string{"true"})
	exec(t, conn, "COMMIT")
	equal(t, stones(), []string{`keyed 10.0.0.2 {"x   ",1}`, `keyed 10.0.0.2 {"y   ",2}`, `keyed 10.0.0.7 {"z   ",4}`, `plain null {t}`})
}

func TestMirrorTables(t *testing.T) {
	ctx := testContext(t)
	d := define(t, `version: 1
subscriptions:
  keyed: {table: other.keyed, key: owner, rows: "select 1"}
  plain: {table: public.plain}
`)
	_, mirror, tables, dsn := mirrored(t, d, "CREATE SCHEMA other", "CREATE TABLE public.plain (id int PRIMARY KEY, v varchar(3) NOT NULL UNIQUE DEFAULT 'abc' CHECK (v <> ''))",
		"CREATE TABLE other.keyed (id int PRIMARY KEY, owner int NOT NULL REFERENCES public.plain, UNIQUE (id, owner))")
	conn := connect(t, dsn)
	// No constraint but the key (rule R6).
	equal(t, column(t, mirror, "SELECT conrelid::regclass || ' ' || pg_get_constraintdef(oid) FROM pg_constraint WHERE contype <> 'n' AND conrelid::regclass::text IN ('public.plain', 'other.keyed') ORDER BY 1"),
		[]string{"other.keyed PRIMARY KEY (id)", "public.plain PRIMARY KEY (id)"})
	exec(t, conn, "BEGIN", "INSERT INTO public.plain (id) VALUES (1)")
	equal(t, column(t, conn, "SELECT (_ws_version = pg_current_xact_id()::text::bigint AND _ws_lw IS NULL AND _ws_mver = 0 AND v IS NULL)::text FROM public.plain"), []string{"true"})
	exec(t, conn, "COMMIT")
	equal(t, column(t, mirror, "SELECT indexdef FROM pg_indexes WHERE indexname LIKE '\\_ws%' ORDER BY tablename"), []string{
		column(t, mirror, "SELECT indexdef FROM pg_indexes WHERE tablename = 'keyed' AND indexdef LIKE '%(owner, _ws_version)'")[0],
		column(t, mirror, "SELECT indexdef FROM pg_indexes WHERE tablename = 'plain' AND indexdef LIKE '%(_ws_version)'")[0]})
	equal(t, column(t, mirror, "SELECT relname::text FROM pg_class WHERE relnamespace = 'waystage_staging'::regnamespace AND relkind = 'r' ORDER BY 1"), []string{"other.keyed", "public.plain", "unknown"})

	// The reader reads mirror tables, and nothing else.
	for sql, want := range map[string]string{
		"SELECT * FROM public.plain":             "",
		"SELECT * FROM other.keyed":              "",
		"SELECT * FROM waystage.app_user":        "42501",
		"SELECT * FROM waystage.staging":         "42501",
		"SELECT * FROM waystage_staging.unknown": "42501",
		"DELETE FROM public.plain":               "42501",
		"INSERT INTO public.plain VALUES (9)":    "42501",
		"CREATE TABLE other.x ()":                "42501",
	} {
		exec(t, conn, "BEGIN", "SET LOCAL ROLE "+ReaderRole)
		_, err := conn.Exec(ctx, sql)
		if got := pgerr.Code(err); got != want {
			t.Errorf("%s as %s: %q, want %q", sql, ReaderRole, got, want)
		}
		exec(t, conn, "ROLLBACK")
	}

	// Another key column makes another index, a new table is added, ids stay.
	d2 := define(t, strings.Replace(d.Body, "key: owner", "key: id", 1))
	ids := tableIDs(tables)
	if err := EnsureMirror(ctx, conn, tables, d2); err != nil {
		t.Fatal(err)
	}
	equal(t, column(t, mirror, "SELECT regexp_replace(indexdef, '.*btree ', '') FROM pg_indexes WHERE tablename = 'keyed' ORDER BY 1"), []string{"(id)", "(id, _ws_version)"})
	loaded, err := LoadTables(ctx, mirror)
	if err != nil || len(loaded) != 2 {
		t.Fatal(loaded, err)
	}
	for i, tbl := range loaded {
		a, _ := json.Marshal(tbl)
		b, _ := json.Marshal(tables[i])
		if string(a) != string(b) || int(ids[i]) != tbl.ID {
			t.Errorf("loaded %s, had %s", a, b)
		}
	}
	if loaded[0].FullName() != "public.plain" || loaded[1].Rank != 1 || loaded[0].Columns[1].Default != "abc" || len(loaded[0].Unique) != 1 {
		t.Errorf("loaded %+v", loaded[0])
	}
}

// Several servers start at once on an empty mirror.
func TestMigrateConcurrently(t *testing.T) {
	ctx := testContext(t)
	dsn := pgtest.Mirror(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := MigrateMirror(ctx, dsn); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	conn := connect(t, dsn)
	if err := MigrateSource(ctx, dsn); !errors.Is(err, ErrWrongDatabase) {
		t.Errorf("a mirror as source: %v", err)
	}
	exec(t, conn, "INSERT INTO waystage.migration_mirror (version_id, is_applied) VALUES (99999, true)")
	if err := MigrateMirror(ctx, dsn); !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "99999") {
		t.Errorf("downgrade: %v", err)
	}
}
