package schema

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/waystage/waystage/internal/pgtest"
)

// columns are n columns for CREATE TABLE.
func columns(n int) string {
	var l []string
	for i := range n {
		l = append(l, fmt.Sprintf("c%d int", i))
	}
	return strings.Join(l, ", ")
}

// Every refusal names the table and a remedy; a remedy that is a statement is run, and helps.
func TestReadTablesRefuses(t *testing.T) {
	ctx := testContext(t)
	conn := connect(t, pgtest.Source(t))
	var version int
	if err := conn.QueryRow(ctx, "SELECT current_setting('server_version_num')::int").Scan(&version); err != nil {
		t.Fatal(err)
	}
	type refusal struct{ name, ddl, message, statement string }
	cases := []refusal{
		{"nokey", "CREATE TABLE %s (a int)", "has no primary key", ""},
		{"nokey_index", "CREATE TABLE %s (a int NOT NULL); CREATE UNIQUE INDEX \"My Index\" ON %[1]s (a)", "has no primary key", `ALTER TABLE %s ADD PRIMARY KEY USING INDEX "My Index"`},
		{"nokey_unique", "CREATE TABLE %s (a int NOT NULL UNIQUE)", "has no primary key", `ALTER TABLE %s ADD PRIMARY KEY ("a")`},
		{"view", "CREATE VIEW %s AS SELECT 1 AS a", "is a view", ""},
		{"matview", "CREATE MATERIALIZED VIEW %s AS SELECT 1 AS a", "is a view", ""},
		{"root", "CREATE TABLE %s (a int PRIMARY KEY) PARTITION BY LIST (a); CREATE UNLOGGED TABLE test.leaf1 PARTITION OF %[1]s FOR VALUES IN (1)", "its partition test.leaf1 is unlogged", `ALTER TABLE test.leaf1 SET LOGGED`},
		{"root_nothing", "CREATE TABLE %s (a int PRIMARY KEY) PARTITION BY LIST (a); CREATE TABLE test.leaf2 PARTITION OF %[1]s DEFAULT; ALTER TABLE test.leaf2 REPLICA IDENTITY NOTHING", "do not carry the primary key", `ALTER TABLE test.leaf2 REPLICA IDENTITY DEFAULT`},
		{"root_foreign", "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER w FOREIGN DATA WRAPPER w; CREATE TABLE %s (a int) PARTITION BY LIST (a); CREATE FOREIGN TABLE test.leaf3 PARTITION OF %[1]s DEFAULT SERVER w", "has no primary key", ""},
		{"foreign", "CREATE FOREIGN TABLE %s (a int) SERVER w", "is a foreign table", ""},
		{"naming", "CREATE TABLE %s (a int PRIMARY KEY, b regclass)", "names an object of the database", `ALTER TABLE %s ALTER COLUMN "b" TYPE text`},
		{"naming_deep", "CREATE TYPE test.inner AS (r regrole[]); CREATE DOMAIN test.outer AS test.inner[]; CREATE TABLE %s (a int PRIMARY KEY, b test.outer)", "names an object of the database", ""},
		{"granted", "CREATE TABLE %s (a int PRIMARY KEY, b aclitem)", "names an object of the database", ""},
		{"mute", "CREATE TABLE %s (a int PRIMARY KEY, b pg_node_tree)", "cannot be read back from its text", ""},
		{"wide", "CREATE TABLE %s (a int PRIMARY KEY, " + columns(1590) + ")", "at most 1590", ""},
		{"unlogged", "CREATE UNLOGGED TABLE %s (a int PRIMARY KEY)", "is unlogged", `ALTER TABLE %s SET LOGGED`},
		{"nothing", "CREATE TABLE %s (a int PRIMARY KEY); ALTER TABLE %[1]s REPLICA IDENTITY NOTHING", "REPLICA IDENTITY NOTHING", `ALTER TABLE %s REPLICA IDENTITY DEFAULT`},
		{"byindex", "CREATE TABLE %s (a int PRIMARY KEY, b int NOT NULL UNIQUE); ALTER TABLE %[1]s REPLICA IDENTITY USING INDEX byindex_b_key", "another index", `ALTER TABLE %s REPLICA IDENTITY DEFAULT`},
		{"deferrable", "CREATE TABLE %s (a int, b int, PRIMARY KEY (b, a) DEFERRABLE)", "DEFERRABLE", `ALTER TABLE %s DROP CONSTRAINT "deferrable_pkey", ADD CONSTRAINT "deferrable_pkey" PRIMARY KEY ("b", "a")`},
		{"parent", "CREATE TABLE %s (a int PRIMARY KEY); CREATE TABLE test.heir () INHERITS (%[1]s)", "inheritance children", ""},
		{"system", `CREATE TABLE %s (a int PRIMARY KEY, "_WS_x" int)`, "begins with _ws_", `ALTER TABLE %s RENAME COLUMN "_WS_x" TO "x_"`},
		{"generated", "CREATE TABLE %s (a int, b int GENERATED ALWAYS AS (a) STORED PRIMARY KEY)", "is generated", ""},
	}
	if version >= 180000 {
		cases = append(cases, refusal{"full", "CREATE TABLE %s (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a) STORED); ALTER TABLE %[1]s REPLICA IDENTITY FULL", "REPLICA IDENTITY FULL", `ALTER TABLE %s REPLICA IDENTITY DEFAULT`},
			refusal{"period", "CREATE TABLE %s (a int4range, b daterange, PRIMARY KEY (a, b WITHOUT OVERLAPS))", "WITHOUT OVERLAPS", ""})
	}
	if version < 160000 {
		cases = append(cases, refusal{"byte", `CREATE TABLE %s (a int PRIMARY KEY, b "char")`, "no text for values above 127", `ALTER TABLE %s ALTER COLUMN "b" TYPE text`})
	}
	exec(t, conn, "CREATE SCHEMA test")
	for _, c := range cases {
		ident := `"test"."` + c.name + `"`
		if c.name == "period" {
			if _, err := conn.Exec(ctx, "CREATE EXTENSION btree_gist"); err != nil {
				continue // the server lacks the extension that makes such a key possible here
			}
		}
		for sql := range strings.SplitSeq(fmt.Sprintf(c.ddl, ident), ";") {
			if strings.Contains(sql, "%!") {
				sql = sql[:strings.Index(sql, "%!")]
			}
			exec(t, conn, sql)
		}
		tables, problems, err := ReadTables(ctx, conn, []string{"test." + c.name})
		if err != nil {
			t.Fatal(err)
		}
		if len(tables) != 0 || len(problems) != 1 || problems[0].Table != "test."+c.name || !strings.Contains(problems[0].Message, c.message) || problems[0].Remedy == "" {
			t.Errorf("%s: %v", c.name, problems)
			continue
		}
		if c.statement == "" {
			continue
		}
		statement := strings.ReplaceAll(c.statement, "%s", ident)
		if !strings.Contains(problems[0].Remedy, statement) {
			t.Errorf("%s: remedy %q, want %q", c.name, problems[0].Remedy, statement)
		}
		exec(t, conn, statement)
		if tables, problems, err := ReadTables(ctx, conn, []string{"test." + c.name}); err != nil || len(tables) != 1 {
			t.Errorf("%s: the remedy does not help: %v %v", c.name, problems, err)
		}
	}
	exec(t, conn, "CREATE TEMPORARY TABLE tmp (a int PRIMARY KEY)")
	temp := column(t, conn, "SELECT nspname || '.tmp' FROM pg_namespace WHERE oid = pg_my_temp_schema()")[0]
	for name, want := range map[string]string{
		temp:                  "belongs to PostgreSQL",
		"pg_catalog.pg_class": "belongs to PostgreSQL",
		"test.nokye_index":    `"test.nokey_index"`,
		"nokey_index":         `"test.nokey_index"`,
		"zzz.qqqqqqqqq":       "case-sensitive",
	} {
		tables, problems, err := ReadTables(ctx, conn, []string{name})
		if err != nil || len(tables) != 0 || len(problems) != 1 || !strings.Contains(problems[0].String(), want) {
			t.Errorf("%s: %v %v", name, problems, err)
		}
	}
	// A dot in a name must not let one table pass for another.
	exec(t, conn, `CREATE SCHEMA "a.b"`, "CREATE SCHEMA a", `CREATE TABLE "a.b".c (id int PRIMARY KEY)`, `CREATE TABLE a."b.c" (id int PRIMARY KEY)`)
	if _, problems, err := ReadTables(ctx, conn, []string{"a.b.c"}); err != nil || len(problems) != 1 || !strings.Contains(problems[0].Message, "ambiguous") {
		t.Errorf("ambiguous: %v %v", problems, err)
	}
}

func TestReadTablesReads(t *testing.T) {
	ctx := testContext(t)
	conn := connect(t, pgtest.Source(t))
	exec(t, conn, "CREATE TYPE public.mood AS ENUM ('a', 'b')",
		`CREATE TABLE public.p (b int, a text, PRIMARY KEY (a, b))`,
		`CREATE FUNCTION public.f() RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT 1'`,
		`CREATE TABLE public.c (id serial PRIMARY KEY, x int, y text, dropped int,
			d1 varchar(9) DEFAULT 'it''s', d2 numeric(9,2) DEFAULT 1, d3 boolean DEFAULT true, d4 timestamptz DEFAULT now(), d5 date DEFAULT CURRENT_DATE, d6 jsonb DEFAULT '{}',
			d7 text[] DEFAULT ARRAY['a', NULL], d8 public.mood DEFAULT 'b', d9 int DEFAULT public.f(), d10 text DEFAULT 'now'::text::date::text, d11 uuid DEFAULT gen_random_uuid(),
			d12 char(4) DEFAULT 'x', d13 interval DEFAULT '1 day', d14 int DEFAULT -1, d15 int DEFAULT 1/1 + 2, d16 int DEFAULT NULL, d17 timestamptz DEFAULT '2020-01-01 00:00:00+02',
			FOREIGN KEY (y, x) REFERENCES public.p (a, b), UNIQUE (y, x), UNIQUE (y) INCLUDE (x))`,
		"ALTER TABLE public.c DROP COLUMN dropped", "CREATE UNIQUE INDEX ON public.c (x) WHERE x > 0", "CREATE UNIQUE INDEX ON public.c (lower(y))")
	tables, problems, err := ReadTables(ctx, conn, nil)
	if err != nil || len(problems) > 0 || len(tables) != 2 {
		t.Fatal(tables, problems, err)
	}
	p, c := tables[0], tables[1]
	equal(t, p.Key, []string{"a", "b"})
	if p.Rank != 0 || c.Rank != 1 {
		t.Errorf("ranks %d %d", p.Rank, c.Rank)
	}
	if len(c.Foreign) != 1 || c.Foreign[0].Table != "public.p" || !slices.Equal(c.Foreign[0].Columns, []string{"y", "x"}) || !slices.Equal(c.Foreign[0].Refers, []string{"a", "b"}) {
		t.Errorf("foreign keys %+v", c.Foreign)
	}
	if fmt.Sprint(c.Unique) != "[[y x] [y]]" {
		t.Errorf("unique keys %v", c.Unique)
	}
	defaults := map[string]string{}
	for _, col := range c.Columns {
		defaults[col.Name] = col.Default
	}
	for name, want := range map[string]string{"id": "", "d1": "it's", "d2": "1.00", "d3": "t", "d4": "", "d5": "", "d6": "{}", "d7": "{a,NULL}", "d8": "b", "d9": "", "d10": "", "d11": "",
		"d12": "x   ", "d13": "1 day", "d14": "-1", "d15": "3", "d16": "", "d17": "2019-12-31 22:00:00+00"} {
		if defaults[name] != want {
			t.Errorf("default of %s: %q, want %q", name, defaults[name], want)
		}
	}
}

// Parents come before children whatever the graph; where it has cycles, all edges that cannot be null and are in
// none keep the order.
func TestRank(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 8).Draw(t, "tables")
		tables := make([]*Table, n)
		for i := range tables {
			tables[i] = &Table{Schema: "s", Name: fmt.Sprint(i), Columns: []Column{{Name: "null"}, {Name: "not", NotNull: true}}}
		}
		acyclic := rapid.Bool().Draw(t, "acyclic")
		order := rapid.Permutation(slices.Collect(func(yield func(int) bool) {
			for i := range n {
				if !yield(i) {
					return
				}
			}
		})).Draw(t, "order")
		for range rapid.IntRange(0, 12).Draw(t, "edges") {
			a, b := rapid.IntRange(0, n-1).Draw(t, "a"), rapid.IntRange(0, n-1).Draw(t, "b")
			if acyclic && a < b {
				a, b = b, a
			}
			col := rapid.SampledFrom([]string{"null", "not"}).Draw(t, "column")
			child := tables[order[a]]
			child.Foreign = append(child.Foreign, ForeignKey{Columns: []string{col}, Table: tables[order[b]].FullName()})
		}
		byName := map[string]*Table{}
		for _, tbl := range tables {
			byName[tbl.FullName()] = tbl
		}
		Rank(tables)
		for i, tbl := range tables {
			if i > 0 && tables[i-1].Rank > tbl.Rank {
				t.Fatal("not in the order of ranks")
			}
			for _, f := range tbl.Foreign {
				parent := byName[f.Table]
				if acyclic && parent != tbl && parent.Rank >= tbl.Rank {
					t.Fatalf("%s refers to %s, ranks %d and %d", tbl.Name, parent.Name, tbl.Rank, parent.Rank)
				}
			}
		}
	})
	// A cycle that one nullable key closes is no cycle for the order.
	a := &Table{Schema: "s", Name: "a", Columns: []Column{{Name: "b"}}, Foreign: []ForeignKey{{Columns: []string{"b"}, Table: "s.b"}}}
	b := &Table{Schema: "s", Name: "b", Columns: []Column{{Name: "a", NotNull: true}}, Foreign: []ForeignKey{{Columns: []string{"a"}, Table: "s.a"}, {Columns: []string{"a"}, Table: "s.b"}}}
	Rank([]*Table{b, a})
	if a.Rank != 0 || b.Rank != 1 {
		t.Errorf("ranks %d %d", a.Rank, b.Rank)
	}
}

// What init writes is a definitions file that the source's tables pass.
func TestInitDefinitions(t *testing.T) {
	ctx := testContext(t)
	conn := connect(t, pgtest.Source(t))
	empty, left, err := InitDefinitions(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	if define(t, empty); len(left) != 0 {
		t.Error(left)
	}
	for i, n := range append(slices.Clone(oddNames), "true", "a: b", "# c", "line\u2028x", "ünï") {
		exec(t, conn, "CREATE SCHEMA IF NOT EXISTS "+Quote(oddNames[i%3]), "CREATE TABLE "+(&Table{Schema: oddNames[i%3], Name: n}).Ident()+" ("+Quote(n)+" int PRIMARY KEY)")
	}
	exec(t, conn, "CREATE TABLE public.nokey (a int)", "CREATE TABLE public.parent (id int PRIMARY KEY)", "CREATE TABLE public.child (id int PRIMARY KEY, parent int REFERENCES public.parent)",
		// what a device's SQLite does not tell apart
		`CREATE TABLE public.alike (a text, id text, "ID" int PRIMARY KEY, "A" text)`, `CREATE TABLE public."Parent" (id int PRIMARY KEY)`,
		`CREATE TABLE public.keys (k int, "K" int, PRIMARY KEY (k, "K"))`)
	text, left, err := InitDefinitions(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	d := define(t, text)
	tables, problems, err := ReadTables(ctx, conn, d.TableNames())
	if err != nil || len(problems) != 0 || len(tables) != len(oddNames)+9 {
		t.Fatalf("%v %v %d", err, problems, len(tables))
	}
	if problems := d.Check(tables); len(problems) != 0 {
		t.Error(problems)
	}
	if !strings.Contains(text, "ALTER TABLE \"public\".\"nokey\"") || !strings.Contains(text, "# key: parent") {
		t.Error(text)
	}
	subs := d.SubscriptionsOf("all")
	if len(subs) != len(tables)-1 {
		t.Errorf("%d subscriptions in the set", len(subs))
	}
	var told []string
	for _, p := range left {
		told = append(told, fmt.Sprint(p.Warning, " ", p.Table, " ", p.Message))
	}
	slices.Sort(told)
	equal(t, told, []string{
		`false public.keys has the key columns "k" and "K", which ` + inCaseOnly,
		`false public.nokey has no primary key`,
		`true public.alike the column "A" is left out: it and "a" ` + inCaseOnly,
		`true public.alike the column "id" is left out: it and "ID" ` + inCaseOnly,
		`true public.parent is in no set: it and public.Parent ` + inCaseOnly,
	})
	if i, j := slices.IndexFunc(subs, func(s *Subscription) bool { return s.Name == "parent" }), slices.IndexFunc(subs, func(s *Subscription) bool { return s.Name == "child" }); i > j {
		t.Error("the child comes before its parent")
	}
}

func TestConfig(t *testing.T) {
	ctx := testContext(t)
	dsn := pgtest.Source(t)
	admin := connect(t, dsn)
	exec(t, admin, "ALTER DATABASE "+Quote(admin.Config().Database)+" SET timezone = 'Asia/Tokyo'")
	cfg, err := Config(dsn+"&options=-c%20timezone%3DEurope/Paris&statement_timeout=12345", "me")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.ConnectConfig(ctx, cfg.ConnConfig)
	if err != nil {
		t.Fatal(err)
	}
	defer closeConn(conn)
	for name, want := range Canonical {
		got := column(t, conn, "SELECT current_setting($1)", name)[0]
		if name == "datestyle" {
			got, _, _ = strings.Cut(got, ",")
		}
		if got != want && (name != "search_path" || strings.Trim(got, `"`) != "") {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	equal(t, column(t, conn, "SELECT current_setting('application_name') || current_setting('statement_timeout')"), []string{"me12345ms"})
	if _, err := Config("postgres://%%%", "me"); err == nil {
		t.Error("a broken connection string was taken")
	}
}

// A renamed label or another attribute changes the text of rows that did not change; a new label does not.
func TestReshapedTypes(t *testing.T) {
	ctx := testContext(t)
	conn := connect(t, pgtest.Source(t))
	exec(t, conn, "CREATE SCHEMA s", "CREATE TYPE s.mood AS ENUM ('sad', 'ok')", "CREATE TYPE s.pair AS (n int, m s.mood)",
		"CREATE DOMAIN s.moods AS s.mood[]", "CREATE TABLE s.t (id int PRIMARY KEY, a s.mood, b s.moods, c s.pair[])")
	read := func() *Table {
		t.Helper()
		tables, problems, err := ReadTables(ctx, conn, []string{"s.t"})
		if err != nil || len(tables) != 1 {
			t.Fatal(problems, err)
		}
		return tables[0]
	}
	before := read()
	for _, step := range []struct {
		sql     string
		columns []string
	}{
		{"ALTER TYPE s.mood ADD VALUE 'new' BEFORE 'sad'", nil},
		{"ALTER TYPE s.mood RENAME VALUE 'ok' TO 'well'", []string{"a", "b", "c"}},
		{"ALTER TYPE s.mood RENAME VALUE 'well' TO 'ok'", nil},
		{"ALTER TYPE s.pair RENAME ATTRIBUTE n TO k", []string{"c"}},
	} {
		exec(t, conn, step.sql)
		now := read()
		var changed []string
		for i := range now.Columns {
			if now.Columns[i].reshaped(&before.Columns[i]) != "" {
				changed = append(changed, now.Columns[i].Name)
			}
		}
		equal(t, changed, step.columns)
		if (len(now.changedSince(before)) > 0) != (step.columns != nil) {
			t.Errorf("%s: set-up says %v", step.sql, now.changedSince(before))
		}
	}
}
