package schema

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/internal/pgtest"
)

// everyType has a column of every type that is likely to be met, and values at the edges of each.
const everyType = `
CREATE TYPE mood AS ENUM ('sad', 'it''s ok', 'happy "\');
CREATE TYPE pair AS (a int, b text);
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE DOMAIN short AS varchar(7);
CREATE DOMAIN moods AS mood;
CREATE DOMAIN ints AS int[];
CREATE TABLE everything (
	id bigint PRIMARY KEY,
	b boolean, i2 smallint, i4 integer, i8 bigint, n numeric, n2 numeric(12,2), f4 real, f8 double precision, m money,
	t text, v varchar(20), c char(6), q bpchar, nm name, by bytea, d date, ts timestamp(3), tz timestamptz, ti time, tt timetz,
	iv interval, u uuid, j json, jb jsonb, x xml, pt point, bx box, ci circle, pa path, net inet, ci4 cidr, mac macaddr, bt bit(5), vb varbit,
	tv tsvector, tq tsquery, ir int4range, mr datemultirange, lsn pg_lsn, o oid, rc text COLLATE "C",
	ia int[], ta text[], ba boolean[], tza timestamptz[], e mood, ea mood[], pr pair, po positive, sh short, mo moods, da ints,
	gen int GENERATED ALWAYS AS (i2 * 2) STORED, ident bigint GENERATED ALWAYS AS IDENTITY, ser serial
);
INSERT INTO everything VALUES (1, true, 32767, -2147483648, 9223372036854775807, 'NaN', 12345678.90, 'NaN', '-0', '-12.34',
	E'tab\tnewline\nbackslash\\ quote'' "double" \U0001F600\U0010FFFF', ' padded ', 'ab', 'x  ', 'name', '\x00ff5c', 'infinity', '294276-12-31 23:59:59.999', '-infinity', '24:00:00', '00:00:00+15:59',
	'1 mon -3 days +00:00:00.000001', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '{"a": 1,  "a": 2}', '{"b": null, "a": 1.00}', '<a>&amp;</a>', '(1e300,-0)', '((1,2),(3,4))', '<(1,2),3>', '[(1,2),(3,4)]',
	'10.0.0.1/32', '10.0.0.0/8', '08:00:2b:01:02:03', B'10101', B'', 'a:1 b:2', 'a & b', '[1,5)', '{[2020-01-01,2020-02-01)}', '16/B374D848', 4294967295, 'pg_class',
	'[0:1]={1,NULL}', '{"a,b","",NULL,"NULL"}', '{t,f}', '{"2020-01-01 12:00:00+02"}', 'it''s ok', '{sad,"happy \"\\"}', '(1,"x ""y"" \\ ,")', 5, 'short', 'happy "\', '{1,2}');
INSERT INTO everything (id) VALUES (2);
INSERT INTO everything (id, n, d, tz, t, f8, iv, by) VALUES (3, 1.000, '4713-01-01 BC', '0044-03-15 12:00:00 BC', '', 1e-320, '0', ''), (4, '-Infinity', '5874897-12-31', '2024-02-29 12:00:00.123456+05:30', '\N', 'Infinity', '-178000000 years', repeat('x', 100)::bytea);
INSERT INTO everything (id, t) SELECT 5, string_agg(md5(i::text), '') FROM generate_series(1, 2000) i;
`

// sameContents compares a table on both sides, row for row, as text and, in the types that both have, byte for byte.
func sameContents(t *testing.T, source, mirror *pgx.Conn, tbl *Table) int {
	t.Helper()
	var cols []string
	for _, c := range tbl.Columns {
		cols = append(cols, Column{MirrorType: c.Type}.Text(Quote(c.Name)))
	}
	dump := func(conn *pgx.Conn, from string) []string {
		return column(t, conn, "SELECT array_to_string(ARRAY["+strings.Join(cols, ", ")+"]::text[], '|', '<null>') FROM "+from+" ORDER BY 1")
	}
	a, b := dump(source, "ONLY "+tbl.Ident()), dump(mirror, tbl.Ident())
	equal(t, b, a)
	image := func(conn *pgx.Conn) []string {
		var same []string
		for _, c := range tbl.Columns {
			if c.Type == c.MirrorType {
				same = append(same, Quote(c.Name)+"::"+c.MirrorType) // a domain has a type of its own
			}
		}
		// record_send gives every value's internal form.
		return column(t, conn, "SELECT md5(record_send(ROW("+strings.Join(same, ", ")+"))::text) FROM ONLY "+tbl.Ident()+" ORDER BY 1")
	}
	equal(t, image(mirror), image(source))
	return len(a)
}

func TestCopyKeepsEveryValue(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror := connect(t, sourceDSN), connect(t, mirrorDSN)
	exec(t, source, "SET search_path = public", everyType, "RESET search_path", "SET search_path = ''")
	// The customer's own settings must not leak into the text form.
	var db string
	if err := source.QueryRow(ctx, "SELECT current_database()").Scan(&db); err != nil {
		t.Fatal(err)
	}
	for _, set := range []string{"datestyle = 'SQL, DMY'", "intervalstyle = 'iso_8601'", "bytea_output = 'escape'", "timezone = 'Asia/Tokyo'", "extra_float_digits = 0",
		"search_path = 'public'", "statement_timeout = '1ms'", "default_transaction_isolation = 'serializable'", "lc_monetary = 'C.UTF-8'"} {
		exec(t, source, "ALTER DATABASE "+Quote(db)+" SET "+set)
	}
	var reports []CopyProgress
	r, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.everything"),
		Progress: func(p CopyProgress) { reports = append(reports, p) }})
	if err != nil {
		t.Fatal(err)
	}
	if n := sameContents(t, source, mirror, r.Tables[0]); n != 5 {
		t.Fatalf("%d rows", n)
	}
	last := reports[len(reports)-1]
	if !last.Done || last.Rows != 5 || last.Total != 5 {
		t.Errorf("last report %+v", last)
	}
	for name, want := range map[string]string{"n2": "numeric(12,2)", "c": "character(6)", "e": "text", "ea": "text", "pr": "text", "po": "integer", "sh": "character varying(7)",
		"mo": "text", "da": "integer[]", "rc": "text", "ts": "timestamp(3) without time zone", "q": "bpchar"} {
		if c, _ := r.Tables[0].Column(name); c.MirrorType != want {
			t.Errorf("column %s is %s in the mirror, want %s", name, c.MirrorType, want)
		}
	}
	if _, ok := r.Tables[0].Column("gen"); ok {
		t.Error("a generated column is carried")
	}
	if c, _ := r.Tables[0].Column("ident"); c.Identity != "a" {
		t.Error("identity is not known")
	}
	if c, _ := r.Tables[0].Column("mo"); len(c.Labels) != 3 || c.Labels[1] != "it's ok" {
		t.Errorf("labels %q", c.Labels)
	}
}

var oddNames = []string{`Mixed "Case" Table`, `we ird`, `"; drop table x; --`, "emoji \U0001F600", `$ws$ $1 :user`, `back\slash's`, strings.Repeat("long", 15) + "abc"}

func TestOddNames(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror := connect(t, sourceDSN), connect(t, mirrorDSN)
	var names []string
	for i, n := range oddNames {
		tbl := &Table{Schema: oddNames[(i+1)%len(oddNames)], Name: n}
		col := Quote(oddNames[(i+2)%len(oddNames)])
		exec(t, source, "CREATE SCHEMA IF NOT EXISTS "+Quote(tbl.Schema), "CREATE TABLE "+tbl.Ident()+" ("+Quote(n)+" text PRIMARY KEY, "+col+" int DEFAULT 7)",
			"INSERT INTO "+tbl.Ident()+" SELECT 'k' || i, i FROM generate_series(1, 10) i")
		names = append(names, tbl.FullName())
	}
	var b strings.Builder
	b.WriteString("version: 1\nsubscriptions:\n")
	for i, n := range names {
		fmt.Fprintf(&b, "  s%d:\n    table: %s\n    key: %s\n    rows: select 'k1' where :user <> ''\n", i, yamlText(n), yamlText(oddNames[i]))
	}
	r, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: define(t, b.String())})
	if err != nil {
		t.Fatal(err)
	}
	for _, tbl := range r.Tables {
		if n := sameContents(t, source, mirror, tbl); n != 10 {
			t.Errorf("%s: %d rows", tbl.FullName(), n)
		}
		for _, c := range tbl.Columns {
			if !tbl.IsKey(c.Name) && c.Default != "7" {
				t.Errorf("%s: default %q", tbl.FullName(), c.Default)
			}
		}
		exec(t, mirror, "DELETE FROM "+tbl.Ident()+" WHERE "+Quote(tbl.Key[0])+" = 'k3'", "UPDATE "+tbl.Ident()+" SET "+Quote(tbl.Key[0])+" = 'new' WHERE "+Quote(tbl.Key[0])+" = 'k4'")
		equal(t, column(t, mirror, "SELECT val || ' ' || key::text FROM waystage.tombstone WHERE tbl = $1 ORDER BY 1", tbl.ID), []string{"k3 {k3}", "k4 {k4}"})
		equal(t, column(t, mirror, r.Definitions.subscriptionFor(tbl).KeyQuery("$1", "$2"), "me", "{}"), []string{"k1"})
	}
	if len(r.Tables) != len(oddNames) {
		t.Errorf("%d tables", len(r.Tables))
	}
}

func (d *Definitions) subscriptionFor(t *Table) *Subscription {
	for _, s := range d.Subscriptions {
		if s.Table == t.FullName() {
			return s
		}
	}
	return nil
}

// A set-up that is cancelled again and again, while the source is written to, ends in a mirror that is the snapshot of
// the slot, with nothing left over.
func TestHazardSnapshotKilled(t *testing.T) {
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror := connect(t, sourceDSN), connect(t, mirrorDSN)
	exec(t, source, "CREATE TABLE public.parent (id int PRIMARY KEY, t text)",
		"CREATE TABLE public.child (id int PRIMARY KEY, parent int NOT NULL REFERENCES public.parent, t text)",
		"INSERT INTO public.parent SELECT i, repeat('x', 400) FROM generate_series(1, 50000) i",
		"INSERT INTO public.child SELECT i, i, md5(i::text) FROM generate_series(1, 20000) i")
	d := define(t, "version: 1\nsubscriptions:\n  child: {table: public.child, key: parent, rows: 'select id from public.parent where t = :user'}\n  parent: {table: public.parent}\n")
	if _, err := Setup(testContext(t), SetupOptions{SourceDSN: pgtest.Source(t), MirrorDSN: mirrorDSN, Definitions: d}); err == nil {
		t.Fatal("a source without the tables was taken")
	}
	options := SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: d}
	rng := rand.New(rand.NewPCG(1, 2))
	// Longer and longer, so that every stage is cut somewhere, whatever the machine's speed.
	limit := 20 * time.Millisecond
	kills := 0
	for {
		ctx, cancel := context.WithTimeout(testContext(t), limit+time.Duration(rng.Int64N(int64(limit))))
		o := options
		if kills%3 == 2 { // right in the copy
			rows := rng.Int64N(80000)
			o.Progress = func(p CopyProgress) {
				if p.Rows > rows {
					cancel()
				}
			}
		}
		_, err := Setup(ctx, o)
		deadline, _ := ctx.Deadline()
		stopped := ctx.Err() != nil || time.Until(deadline) < 20*time.Millisecond // the network layer has a clock of its own
		cancel()
		if err == nil {
			break
		}
		if !stopped {
			t.Fatalf("attempt %d: %v", kills, err)
		}
		if kills++; kills > 10 {
			limit = limit * 3 / 2
		}
		exec(t, source, fmt.Sprintf("UPDATE public.parent SET t = t || '%d' WHERE id %% 50 = %d", kills, kills%50))
	}
	t.Logf("%d kills", kills)
	r, err := Setup(testContext(t), options)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Copied) != 0 {
		t.Errorf("a finished set-up copied %v", r.Copied)
	}
	for _, tbl := range r.Tables {
		sameContents(t, source, mirror, tbl)
	}
	equal(t, column(t, source, "SELECT slot_name::text FROM pg_replication_slots WHERE database = current_database()"), []string{SlotDown(r.Epoch)})
	equal(t, column(t, mirror, "SELECT slot_name::text FROM pg_replication_slots WHERE database = current_database()"), []string{SlotUp(r.Epoch)})
	equal(t, column(t, source, "SELECT schemaname || '.' || tablename FROM pg_publication_tables WHERE pubname = 'waystage' ORDER BY 1"), []string{"public.child", "public.parent", "waystage.progress"})
	equal(t, column(t, mirror, "SELECT direction || ' ' || (position > '0/0') FROM waystage.progress ORDER BY 1"), []string{"down true", "up true"})
	equal(t, column(t, source, "SELECT epoch || seq || (position > '0/0') FROM waystage.progress"), []string{r.Epoch + "0true"})
	equal(t, column(t, mirror, "SELECT count(*)::text FROM waystage.tombstone"), []string{"0"})
	if r.Tables[0].Name != "parent" || r.Tables[1].Rank <= r.Tables[0].Rank {
		t.Error("the child is not ranked behind its parent")
	}
	equal(t, column(t, mirror, "SELECT count(*)::text FROM pg_indexes WHERE tablename = 'child' AND indexdef LIKE '%(parent, _ws_version)'"), []string{"1"})
}

// What is written between the slot and the copy's snapshot is exactly what the slot delivers: nothing is in both, nothing in none.
func TestHazardSnapshotRace(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror := connect(t, sourceDSN), connect(t, mirrorDSN)
	exec(t, source, "CREATE TABLE public.t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY)")
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for range 3 {
		conn := connect(t, sourceDSN)
		writers.Add(1)
		go func() {
			defer writers.Done()
			for {
				select {
				case <-stop:
					return
				default:
					if _, err := conn.Exec(ctx, "INSERT INTO public.t DEFAULT VALUES"); err != nil {
						t.Error(err)
						return
					}
				}
			}
		}()
	}
	r, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.t")})
	close(stop)
	writers.Wait()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, id := range column(t, mirror, "SELECT id::text FROM public.t") {
		seen[id]++
	}
	copied := len(seen)
	rows, err := source.Query(ctx, "SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1', 'publication_names', 'waystage')", SlotDown(r.Epoch))
	if err != nil {
		t.Fatal(err)
	}
	var data []byte
	if _, err := pgx.ForEachRow(rows, []any{&data}, func() error {
		m, err := pglogrepl.Parse(data)
		if i, ok := m.(*pglogrepl.InsertMessage); ok {
			seen[string(i.Tuple.Columns[0].Data)]++
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	all := column(t, source, "SELECT id::text FROM public.t")
	for _, id := range all {
		if seen[id] != 1 {
			t.Errorf("row %s is there %d times", id, seen[id])
		}
	}
	if len(all) != len(seen) || copied == 0 {
		t.Errorf("%d rows at the source, %d copied, %d in all", len(all), copied, len(seen))
	}
}

func TestSetupAddsTables(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror := connect(t, sourceDSN), connect(t, mirrorDSN)
	exec(t, source, "CREATE TABLE public.a (id int PRIMARY KEY, t text)", "CREATE TABLE public.b (id int PRIMARY KEY, t text)",
		"INSERT INTO public.a SELECT i FROM generate_series(1, 100) i", "INSERT INTO public.b SELECT i FROM generate_series(1, 100) i")
	first, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.a")})
	if err != nil {
		t.Fatal(err)
	}
	second, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.a", "public.b")})
	if err != nil {
		t.Fatal(err)
	}
	if second.Epoch != first.Epoch {
		t.Error("another epoch")
	}
	equal(t, second.Copied, []string{"public.b"})
	for _, tbl := range second.Tables {
		sameContents(t, source, mirror, tbl)
	}
	d, tables, err := LoadDefinitions(ctx, mirror)
	if err != nil || len(tables) != 2 || len(d.Subscriptions) != 2 || tables[0].ID == 0 {
		t.Fatalf("%v %v %v", d, tables, err)
	}
	equal(t, column(t, mirror, "SELECT version::text FROM waystage.definition ORDER BY 1"), []string{"1", "2"})
	// A new column that is empty is added; one with values is refused.
	exec(t, source, "ALTER TABLE public.a ADD COLUMN more numeric(5,2)")
	third, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: d})
	if err != nil {
		t.Fatal(err)
	}
	sameContents(t, source, mirror, third.Tables[0])
	// A table that cannot go on is stopped, and the set-up stands for all others.
	for _, c := range []struct{ change, stop, warning string }{
		{"ALTER TABLE public.a ADD COLUMN filled int DEFAULT 3", "", "waystage schema apply"},
		{"ALTER TABLE public.a ALTER COLUMN t TYPE varchar(9)", "column_type", ""},
		{"ALTER TABLE public.b DROP CONSTRAINT b_pkey", "not_syncable", ""},
	} {
		exec(t, source, c.change)
		got, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: d})
		if err != nil {
			t.Fatalf("%s: %v", c.change, err)
		}
		if len(got.Tables) != 2 || (len(got.Warnings) > 0) != (c.warning != "") || c.warning != "" && !strings.Contains(got.Warnings[0].String(), c.warning) {
			t.Errorf("%s: %d tables, %v", c.change, len(got.Tables), got.Warnings)
		}
		if c.stop != "" {
			equal(t, column(t, mirror, "SELECT stopped_code FROM waystage.synced_table WHERE stopped_code = $1", c.stop), []string{c.stop})
		}
	}
	exec(t, source, "ALTER TABLE public.b ADD PRIMARY KEY (id)")
	exec(t, source, "UPDATE public.a SET more = id")
	exec(t, source, "ALTER TABLE public.a DROP CONSTRAINT a_pkey, ADD PRIMARY KEY (id, more)")
	// A new copy takes all of it, and a new epoch. Records that the source has not answered end with the old one, and their devices send them again.
	for i, state := range []string{"merged", "applied"} {
		exec(t, mirror, fmt.Sprintf(`INSERT INTO waystage.change (session_id, idx, device_id, incarnation, n, tbl, tname, op, key, state, stamp)
			VALUES (1, %d, 1, 'i', 1, 1, 'public.a', 'D', '{1}', '%s', pg_current_xact_id()::text::bigint)`, i, state))
	}
	fourth, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: d, Recopy: true})
	if err != nil {
		t.Fatal(err)
	}
	if fourth.Epoch == first.Epoch || len(fourth.Copied) != 2 {
		t.Errorf("recopy: %+v", fourth)
	}
	for _, tbl := range fourth.Tables {
		sameContents(t, source, mirror, tbl)
	}
	equal(t, column(t, mirror, "SELECT concat_ws(' ', state, code) FROM waystage.change ORDER BY idx"), []string{"refused epoch", "applied"})
	equal(t, column(t, source, "SELECT slot_name::text FROM pg_replication_slots WHERE database = current_database()"), []string{SlotDown(fourth.Epoch)})
	equal(t, column(t, source, "SELECT epoch FROM waystage.progress"), []string{fourth.Epoch})
}

func TestSetupRefusesWhatIsGone(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror := connect(t, sourceDSN), connect(t, mirrorDSN)
	exec(t, source, "CREATE TABLE public.a (id int PRIMARY KEY)")
	o := SetupOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Definitions: defineAll(t, "public.a")}
	r, err := Setup(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string) {
		t.Helper()
		if _, err := Setup(ctx, o); !errors.Is(err, ErrRecopy) || !strings.Contains(err.Error(), "--recopy") {
			t.Errorf("%s: %v", what, err)
		}
	}
	exec(t, source, "ALTER PUBLICATION waystage DROP TABLE public.a")
	if _, err := Setup(ctx, o); err != nil {
		t.Error(err)
	}
	equal(t, column(t, mirror, "SELECT stopped_code FROM waystage.synced_table"), []string{"not_published"})
	exec(t, mirror, "UPDATE waystage.meta SET value = 'other' WHERE key = 'mirror_system'")
	refused("restored mirror")
	o2 := o
	o2.SourceDSN = pgtest.Source(t)
	if _, err := Setup(ctx, o2); !errors.Is(err, ErrRecopy) {
		t.Errorf("another source: %v", err)
	}
	exec(t, mirror, "UPDATE waystage.meta SET value = (SELECT system_identifier || '/' || d.oid FROM pg_control_system(), pg_database d WHERE datname = current_database()) WHERE key = 'mirror_system'")
	exec(t, source, "SELECT pg_drop_replication_slot('"+SlotDown(r.Epoch)+"')")
	refused("slot gone")
	o.Recopy = true
	if _, err := Setup(ctx, o); err != nil {
		t.Fatal(err)
	}
	same := SetupOptions{SourceDSN: sourceDSN, MirrorDSN: sourceDSN, Definitions: o.Definitions}
	if _, err := Setup(ctx, same); err == nil || !strings.Contains(err.Error(), "same database") {
		t.Errorf("source as mirror: %v", err)
	}
	foreign := pgtest.Mirror(t)
	exec(t, connect(t, foreign), "CREATE TABLE public.a (id int)")
	if _, err := Setup(ctx, SetupOptions{SourceDSN: sourceDSN, MirrorDSN: foreign, Definitions: o.Definitions}); err == nil || !strings.Contains(err.Error(), "did not make") {
		t.Errorf("mirror with tables of its own: %v", err)
	}
	if err := Teardown(ctx, TeardownOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN}); err != nil {
		t.Fatal(err)
	}
	equal(t, column(t, source, "SELECT slot_name::text FROM pg_replication_slots WHERE database = current_database()"), nil)
	o.Recopy = false
	if _, err := Setup(ctx, o); err != nil {
		t.Fatalf("after a teardown: %v", err)
	}
	if err := Teardown(ctx, TeardownOptions{SourceDSN: sourceDSN, MirrorDSN: mirrorDSN, Everything: true}); err != nil {
		t.Fatal(err)
	}
	equal(t, column(t, mirror, "SELECT relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = 'public' OR nspname ~ '^waystage'"), nil)
}

// A role that owns nothing and can do only what the script says is enough.
func TestLeastPrivileges(t *testing.T) {
	ctx := testContext(t)
	sourceDSN, mirrorDSN := pgtest.Source(t), pgtest.Mirror(t)
	source, mirror := connect(t, sourceDSN), connect(t, mirrorDSN)
	exec(t, source, "CREATE TABLE public.a (id int PRIMARY KEY)", "INSERT INTO public.a VALUES (1)", "CREATE ROLE ws_least LOGIN REPLICATION")
	t.Cleanup(func() { exec(t, source, "DROP OWNED BY ws_least CASCADE", "DROP ROLE ws_least") })
	d := defineAll(t, "public.a")
	dsn := strings.Replace(sourceDSN, pgcluster.Superuser+"@", "ws_least@", 1)
	_, err := Setup(ctx, SetupOptions{SourceDSN: dsn, MirrorDSN: mirrorDSN, Definitions: d})
	if pgerr.Code(err) != "42501" {
		t.Fatalf("without privileges: %v", err)
	}
	var db string
	if err := source.QueryRow(ctx, "SELECT current_database()").Scan(&db); err != nil {
		t.Fatal(err)
	}
	tables, _, err := ReadTables(ctx, source, d.TableNames())
	if err != nil {
		t.Fatal(err)
	}
	script := RolesScript("ws_least", db, "ws_mirror", "unused", tables)
	for _, line := range strings.Split(strings.Split(script, "-- At the mirror")[0], "\n") {
		if line != "" && !strings.HasPrefix(line, "--") && !strings.HasPrefix(line, "CREATE ROLE") {
			exec(t, source, line)
		}
	}
	r, err := Setup(ctx, SetupOptions{SourceDSN: dsn, MirrorDSN: mirrorDSN, Definitions: d})
	if err != nil {
		t.Fatal(err)
	}
	sameContents(t, source, mirror, r.Tables[0])
	// Row security without BYPASSRLS must refuse, not hide.
	exec(t, source, "ALTER TABLE public.a ENABLE ROW LEVEL SECURITY")
	_, err = Setup(ctx, SetupOptions{SourceDSN: dsn, MirrorDSN: mirrorDSN, Definitions: d, Recopy: true})
	if pgerr.Code(err) != "42501" {
		t.Fatalf("row security: %v", err)
	}
}
