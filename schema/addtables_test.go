package schema

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/internal/pgtest"
)

// A table that is added while it is written to, by a transaction too that was open before: the copy with the stream
// played over it is the source's table, although the stream repeats part of what the copy has.
func TestHazardAddTableRace(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror := connect(t, sourceDSN), connect(t, mirrorDSN)
	exec(t, source, "CREATE TABLE public.a (id int PRIMARY KEY)", "CREATE TABLE public.b (id int PRIMARY KEY, v text)")
	first, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.a")})
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for w := range 2 {
		conn := connect(t, sourceDSN)
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 7))
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				sql := "INSERT INTO public.b VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET v = excluded.v"
				if i%3 == 2 {
					sql = "DELETE FROM public.b WHERE id = $1 AND v <> $2"
				}
				if _, err := conn.Exec(ctx, sql, rng.IntN(50), fmt.Sprint(w, i)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	early := connect(t, sourceDSN)
	exec(t, early, "BEGIN", "INSERT INTO public.b VALUES (1000, 'open before')")
	late := time.AfterFunc(300*time.Millisecond, func() {
		if _, err := early.Exec(ctx, "COMMIT"); err != nil {
			t.Error(err)
		}
	})
	defer late.Stop()
	r, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.a", "public.b")})
	close(stop)
	writers.Wait()
	if err != nil {
		t.Fatal(err)
	}
	equal(t, r.Copied, []string{"public.b"})
	contents := func(q Querier) map[string]string {
		out := map[string]string{}
		for _, row := range column(t, q, "SELECT id || '=' || v FROM public.b") {
			k, v, _ := strings.Cut(row, "=")
			out[k] = v
		}
		return out
	}
	rows, err := source.Query(ctx, "SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1', 'publication_names', 'waystage')", SlotDown(first.Epoch))
	if err != nil {
		t.Fatal(err)
	}
	got, relation := contents(mirror), map[uint32]string{}
	var data []byte
	played := 0
	if _, err := pgx.ForEachRow(rows, []any{&data}, func() error {
		m, err := pglogrepl.Parse(data)
		switch m := m.(type) {
		case *pglogrepl.RelationMessage:
			relation[m.RelationID] = m.RelationName
		case *pglogrepl.InsertMessage:
			if relation[m.RelationID] == "b" {
				got[string(m.Tuple.Columns[0].Data)] = string(m.Tuple.Columns[1].Data)
				played++
			}
		case *pglogrepl.UpdateMessage:
			if relation[m.RelationID] == "b" {
				got[string(m.NewTuple.Columns[0].Data)] = string(m.NewTuple.Columns[1].Data)
				played++
			}
		case *pglogrepl.DeleteMessage:
			if relation[m.RelationID] == "b" {
				delete(got, string(m.OldTuple.Columns[0].Data))
				played++
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want := contents(source)
	if want["1000"] != "open before" || !maps.Equal(got, want) {
		t.Errorf("%d changes played: got %v, want %v", played, got, want)
	}
}

// Nothing is added while somebody applies.
func TestAddingWaitsForAppliers(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror := connect(t, sourceDSN), connect(t, mirrorDSN)
	exec(t, source, "CREATE TABLE public.a (id int PRIMARY KEY)")
	o := SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.a")}
	if _, err := Setup(ctx, o); err != nil {
		t.Fatal(err)
	}
	exec(t, mirror, fmt.Sprintf("SELECT pg_advisory_lock(%d, %d)", seatClass, seatApplyUp))
	if _, err := Setup(ctx, o); err != nil {
		t.Fatalf("nothing to add: %v", err)
	}
	exec(t, source, "ALTER TABLE public.a ADD COLUMN v int")
	done := make(chan error, 1)
	go func() {
		_, err := Setup(ctx, o)
		done <- err
	}()
	waiting := func() bool {
		return len(column(t, mirror, "SELECT 'x' FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND objid = $2 AND granted", seatClass, seatApplyDown)) > 0
	}
	for !waiting() {
		select {
		case err := <-done:
			t.Fatalf("did not wait: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	equal(t, column(t, mirror, "SELECT attname::text FROM pg_attribute WHERE attrelid = 'public.a'::regclass AND attname = 'v'"), nil)
	exec(t, mirror, fmt.Sprintf("SELECT pg_advisory_unlock(%d, %d)", seatClass, seatApplyUp))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	equal(t, column(t, mirror, "SELECT attname::text FROM pg_attribute WHERE attrelid = 'public.a'::regclass AND attname = 'v'"), []string{"v"})
}
