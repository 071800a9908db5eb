package schema

import (
	"slices"
	"strings"
	"testing"

	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/internal/pgtest"
)

// codes lists the findings of a level, as "where code".
func codes(findings []Finding, level Level) []string {
	var out []string
	for _, f := range findings {
		if f.Level == level {
			out = append(out, f.Where+" "+f.Code)
		}
	}
	slices.Sort(out)
	return out
}

func TestPreflight(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source := connect(t, sourceDSN)
	exec(t, source, "CREATE TABLE public.good (id int PRIMARY KEY)", "CREATE TABLE public.busy (id numeric PRIMARY KEY, good int REFERENCES public.good ON DELETE CASCADE)",
		"CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'", "CREATE TRIGGER x BEFORE INSERT ON public.busy FOR EACH ROW EXECUTE FUNCTION public.f()",
		"CREATE TABLE public.nokey (a int)", "CREATE TABLE public.hidden (id int PRIMARY KEY)", "ALTER TABLE public.hidden ENABLE ROW LEVEL SECURITY",
		"CREATE ROLE ws_check LOGIN", "CREATE ROLE ws_check_owner")
	t.Cleanup(func() {
		exec(t, source, "DROP OWNED BY ws_check, ws_check_owner CASCADE", "DROP ROLE ws_check, ws_check_owner")
	})
	look := func(source, mirror string, tables ...string) []Finding {
		t.Helper()
		found, err := Preflight(ctx, source, mirror, tables, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if f.What == "" || f.Where == "" || f.Code == "" || (f.Remedy == "" && (f.Level == Failure || f.Level == Warning)) {
				t.Errorf("incomplete: %+v", f)
			}
		}
		return found
	}
	all := look(sourceDSN, mirrorDSN, "public.good", "public.busy", "public.hidden")
	equal(t, codes(all, Failure), nil)
	equal(t, codes(all, Info), []string{"public.busy triggers", "public.good cascades"})
	equal(t, slices.DeleteFunc(codes(all, Warning), func(c string) bool { return strings.HasSuffix(c, "max_slot_wal_keep_size") }), []string{"public.busy key_type"})
	equal(t, codes(look(sourceDSN, mirrorDSN, "public.good", "public.nokey", "public.none"), Failure), []string{"public.nokey table", "public.none table"})

	weak := func(dsn string) string { return strings.Replace(dsn, pgcluster.Superuser+"@", "ws_check@", 1) }
	exec(t, source, "GRANT USAGE ON SCHEMA public TO ws_check", "GRANT SELECT ON public.hidden TO ws_check")
	equal(t, codes(look(weak(sourceDSN), mirrorDSN, "public.good", "public.hidden"), Failure),
		[]string{"public.good owner", "public.good privileges", "public.hidden owner", "public.hidden row_security", "source create", "source replication"})
	// What the remedies and the script say is enough.
	var db string
	if err := source.QueryRow(ctx, "SELECT current_database()").Scan(&db); err != nil {
		t.Fatal(err)
	}
	for _, f := range look(weak(sourceDSN), mirrorDSN, "public.good", "public.hidden") {
		if f.Level == Failure && f.Code != "owner" {
			statement, _, _ := strings.Cut(f.Remedy, ";")
			exec(t, source, statement)
		}
	}
	exec(t, source, "CREATE PUBLICATION waystage FOR TABLE public.good, public.hidden")
	equal(t, codes(look(weak(sourceDSN), mirrorDSN, "public.good", "public.hidden"), Failure), nil)

	equal(t, codes(look("postgres://nobody@127.0.0.1:1/x", mirrorDSN), Failure), []string{"source connect"})
	exec(t, source, "SELECT pg_create_logical_replication_slot('waystage_down_orphan"+db[1:3]+"', 'pgoutput')")
	if w := codes(look(sourceDSN, mirrorDSN, "public.good"), Warning); !slices.Contains(w, "source slot_orphan") {
		t.Errorf("an orphaned slot is not named: %q", w)
	}
}

// A server that is not made for it is named as such, setting by setting.
func TestPreflightServerSettings(t *testing.T) {
	ctx := testContext(t)
	poor := pgtest.Cluster(t, map[string]string{"wal_level": "replica", "max_replication_slots": "0", "max_wal_senders": "0"})
	found, err := Preflight(ctx, poor.DSN("postgres"), pgtest.Mirror(t), nil, "")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, codes(found, Failure), []string{"source max_replication_slots", "source max_wal_senders", "source wal_level"})
	_, err = Setup(ctx, SetupOptions{SourceDSN: poor.DSN("postgres"), MirrorDSN: pgtest.Mirror(t), Definitions: define(t, "version: 1\n")})
	if err == nil || !strings.Contains(err.Error(), "waystage init") {
		t.Errorf("empty definitions: %v", err)
	}
}

// What does not reach devices, and what no text stands for, is said before anything is set up.
func TestPreflightOfTypes(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source := connect(t, sourceDSN)
	exec(t, source, "CREATE TABLE public.sums (id int PRIMARY KEY, a int, b int GENERATED ALWAYS AS (a + 1) STORED)",
		"CREATE TABLE public.root (id int PRIMARY KEY) PARTITION BY HASH (id)", "CREATE TABLE public.leaf PARTITION OF public.root FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
		"CREATE TABLE public.names (id int PRIMARY KEY, what regproc)", "CREATE TABLE public.spelt (id jsonb PRIMARY KEY)")
	found, err := Preflight(ctx, sourceDSN, mirrorDSN, []string{"public.sums", "public.root", "public.names", "public.spelt"}, "")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, codes(found, Failure), []string{"public.names table"})
	equal(t, slices.DeleteFunc(codes(found, Warning), func(c string) bool { return strings.HasSuffix(c, "max_slot_wal_keep_size") }),
		[]string{"public.root partitions", "public.spelt key_type", "public.sums generated"})
	for _, f := range found {
		if f.Code == "generated" && !strings.HasSuffix(f.What, ": b") || f.Where == "public.names" && !strings.Contains(f.What, `"what"`) {
			t.Errorf("%s does not name the column: %s", f.Where, f.What)
		}
	}
	both, err := Preflight(ctx, sourceDSN, mirrorDSN, []string{"public.root", "public.leaf"}, "")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, codes(both, Failure), []string{"public.leaf table"})

	exec(t, source, "CREATE DATABASE ws_bytes ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
	t.Cleanup(func() { exec(t, source, "DROP DATABASE ws_bytes") })
	bytes := pgtest.SourceCluster(t).DSN("ws_bytes")
	both, err = Preflight(ctx, bytes, bytes, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, codes(both, Failure), []string{"mirror encoding", "source encoding"})
}
