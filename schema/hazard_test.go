package schema

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/internal/pgtest"
)

// The tests of docs/hazards.md that concern the set-up.

// streamed are the keys of the rows that the slot delivers, with their kinds.
func streamed(t *testing.T, source *pgx.Conn, slot string) (out []string) {
	t.Helper()
	rows, err := source.Query(testContext(t), "SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1', 'publication_names', 'waystage')", slot)
	if err != nil {
		t.Fatal(err)
	}
	var data []byte
	if _, err := pgx.ForEachRow(rows, []any{&data}, func() error {
		m, err := pglogrepl.Parse(data)
		switch m := m.(type) {
		case *pglogrepl.InsertMessage:
			out = append(out, "insert "+string(m.Tuple.Columns[0].Data))
		case *pglogrepl.UpdateMessage:
			out = append(out, "update "+string(m.NewTuple.Columns[0].Data))
		case *pglogrepl.DeleteMessage:
			out = append(out, "delete "+string(m.OldTuple.Columns[0].Data))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// What is committed between the making of the slot and the copy is not in the copy, and comes through the slot: exactly once.
func TestHazardCommitBetweenSlotAndCopy(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror, other := connect(t, sourceDSN), connect(t, mirrorDSN), connect(t, sourceDSN)
	exec(t, source, "CREATE TABLE public.t (id int PRIMARY KEY, v text)", "INSERT INTO public.t VALUES (1, 'a'), (2, 'b'), (3, 'c')")
	told := 0
	r, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.t"), Progress: func(p CopyProgress) {
		if told++; told == 1 { // the slot stands, no row has been copied
			if p.Rows != 0 {
				t.Errorf("the first report comes after %d rows", p.Rows)
			}
			exec(t, other, "INSERT INTO public.t VALUES (4, 'd')", "UPDATE public.t SET v = 'B' WHERE id = 2", "DELETE FROM public.t WHERE id = 3")
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, column(t, mirror, "SELECT id || v FROM public.t ORDER BY id"), []string{"1a", "2b", "3c"})
	got := slices.DeleteFunc(streamed(t, source, SlotDown(r.Epoch)), func(s string) bool { return strings.HasSuffix(s, r.Epoch) }) // set-up's own row
	equal(t, got, []string{"insert 4", "update 2", "delete 3"})
}

// Nothing that set-up does may break the customer's own statements: a table whose updates would fail is refused and not published,
// and a publication that an administrator made with a column list or a row filter is mended.
func TestHazardCustomersUpdates(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror := connect(t, sourceDSN), connect(t, mirrorDSN)
	exec(t, source, "CREATE TABLE public.nokey (a int)", "INSERT INTO public.nokey VALUES (1)", "CREATE TABLE public.nothing (a int PRIMARY KEY)", "ALTER TABLE public.nothing REPLICA IDENTITY NOTHING",
		"INSERT INTO public.nothing VALUES (1)", "CREATE TABLE public.good (id int PRIMARY KEY, v text, w text)", "INSERT INTO public.good VALUES (1, 'a', 'b')",
		"CREATE TABLE public.twice (a int PRIMARY KEY, b int NOT NULL UNIQUE, c text)", "INSERT INTO public.twice VALUES (1, 1, 'x')")
	theirs := func() {
		t.Helper()
		exec(t, source, "UPDATE public.nokey SET a = a + 1", "UPDATE public.nothing SET a = a + 1", "UPDATE public.good SET w = w || '.'", "UPDATE public.twice SET c = c || '.'", "DELETE FROM public.nokey WHERE a < 0")
	}
	for _, table := range []string{"public.nokey", "public.nothing"} {
		_, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.good", table)})
		var problems *ProblemsError
		if !errors.As(err, &problems) {
			t.Fatalf("%s: %v", table, err)
		}
		equal(t, column(t, source, "SELECT tablename::text FROM pg_publication_tables WHERE tablename <> 'progress'"), nil)
		theirs()
	}
	// An administrator's publication: with a column list that lacks a column, with a row filter, with a table that is not synced and has no
	// key (its own users cannot update it, which is not our doing, but ours to end).
	exec(t, source, "CREATE PUBLICATION waystage FOR TABLE public.good (id), public.twice WHERE (a > 0), public.nokey")
	if _, err := source.Exec(ctx, "UPDATE public.nokey SET a = 1"); pgerr.Code(err) != "55000" {
		t.Fatalf("the test's ground is gone: %v", err)
	}
	r, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.good", "public.twice")})
	if err != nil {
		t.Fatal(err)
	}
	theirs()
	exec(t, source, "UPDATE public.good SET v = 'published'", "UPDATE public.twice SET a = -1")
	equal(t, column(t, source, "SELECT c.relname::text FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid WHERE prattrs IS NULL AND prqual IS NULL ORDER BY 1"), []string{"good", "progress", "twice"})
	got := slices.DeleteFunc(streamed(t, source, SlotDown(r.Epoch)), func(s string) bool { return strings.HasSuffix(s, r.Epoch) })
	equal(t, got, []string{"update 1", "update 1", "update 1", "update -1"})

	// Later a published table loses its key. The guard takes it out within its next look.
	exec(t, source, "ALTER TABLE public.twice DROP CONSTRAINT twice_pkey")
	if _, err := source.Exec(ctx, "UPDATE public.twice SET c = 'x'"); pgerr.Code(err) != "55000" {
		t.Fatalf("the test's ground is gone: %v", err)
	}
	found, err := GuardPublication(ctx, PublicationDown, source, mirror, zap.NewNop())
	if err != nil || len(found) != 1 || !strings.Contains(found[0], "public.twice") {
		t.Fatalf("%q %v", found, err)
	}
	theirs()
	equal(t, column(t, mirror, "SELECT table_name || ' ' || coalesce(stopped_code, '-') FROM waystage.synced_table ORDER BY 1"), []string{"good -", "twice replica_identity"})
	// A role that may not alter the publication says what an administrator has to run.
	exec(t, source, "ALTER TABLE public.good DROP CONSTRAINT good_pkey", "CREATE ROLE ws_guard LOGIN", "GRANT USAGE ON SCHEMA waystage TO ws_guard")
	t.Cleanup(func() { exec(t, source, "DROP OWNED BY ws_guard CASCADE", "DROP ROLE ws_guard") })
	weak := connect(t, strings.Replace(sourceDSN, pgcluster.Superuser+"@", "ws_guard@", 1))
	if _, err := GuardPublication(ctx, PublicationDown, weak, mirror, zap.NewNop()); err == nil || !strings.Contains(err.Error(), `ALTER PUBLICATION "waystage" DROP TABLE ONLY`) {
		t.Errorf("%v", err)
	}
	found, err = GuardPublication(ctx, PublicationDown, source, mirror, zap.NewNop())
	if err != nil || len(found) != 1 {
		t.Errorf("%q %v", found, err)
	}
	if found, err = GuardPublication(ctx, PublicationDown, source, mirror, zap.NewNop()); err != nil || len(found) != 0 {
		t.Errorf("it goes on finding: %q %v", found, err)
	}
	exec(t, source, "DROP PUBLICATION waystage", "CREATE PUBLICATION waystage FOR TABLE waystage.progress")
	if _, err := GuardPublication(ctx, PublicationDown, source, mirror, zap.NewNop()); !errors.Is(err, ErrNoPublication) {
		t.Errorf("dropped and made again: %v", err)
	}
}

// Whoever is not Waystage's own role at the source can neither move the marker nor read what it carries.
func TestHazardMarkerRights(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source := connect(t, sourceDSN)
	exec(t, source, "CREATE TABLE public.t (id int PRIMARY KEY)", "CREATE ROLE ws_stranger LOGIN")
	t.Cleanup(func() { exec(t, source, "DROP OWNED BY ws_stranger CASCADE", "DROP ROLE ws_stranger") })
	r, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.t")})
	if err != nil {
		t.Fatal(err)
	}
	stranger := connect(t, strings.Replace(sourceDSN, pgcluster.Superuser+"@", "ws_stranger@", 1))
	refused := func(sqls ...string) {
		t.Helper()
		for _, sql := range sqls {
			if _, err := stranger.Exec(ctx, sql); pgerr.Code(err) != "42501" {
				t.Errorf("%s: %v", sql, err)
			}
		}
	}
	all := []string{"UPDATE waystage.progress SET seq = seq + 1, carries = '1'", "INSERT INTO waystage.progress (epoch, seq, position) VALUES ('" + r.Epoch + "x', 0, '0/0')",
		"DELETE FROM waystage.progress", "TRUNCATE waystage.progress", "SELECT * FROM waystage.progress", "SELECT * FROM waystage.progress FOR UPDATE"}
	refused(all...)
	exec(t, source, "GRANT USAGE ON SCHEMA waystage TO PUBLIC") // a careless administrator
	refused(all...)
	// A logical message, which anybody may write, is no marker.
	if _, err := stranger.Exec(ctx, "SELECT pg_logical_emit_message(true, 'waystage', '"+r.Epoch+" 1')"); err != nil {
		t.Fatal(err)
	}
	// Rights that were given away are named before they are used.
	exec(t, source, "GRANT UPDATE ON waystage.progress TO ws_stranger")
	found, err := Preflight(ctx, sourceDSN, mirrorDSN, []string{"public.t"}, Suffix(r.Epoch))
	if err != nil {
		t.Fatal(err)
	}
	if w := codes(found, Warning); !slices.Contains(w, "source marker_rights") {
		t.Errorf("the preflight does not warn: %q", w)
	}
}
