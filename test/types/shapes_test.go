package types

import (
	"fmt"
	"strings"
	"testing"

	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/schema"
)

// keyed is a type of primary keys.
type keyed struct {
	typ     string
	values  []string
	respelt string // equal to the first value, written otherwise; empty: there is no such text
	fresh   string // what a device inserts, as SQL of SQLite
	min     int
}

var keys = []keyed{
	{typ: "numeric", values: []string{"1.0", "2.50", "NaN", "-0.001"}, respelt: "1.00", fresh: "'3.10'"},
	{typ: "double precision", values: []string{"-0", "1e23", "NaN", "Infinity", "5e-324"}, respelt: "0", fresh: "2.5"},
	{typ: "real", values: []string{"-0", "0.1", "-Infinity"}, respelt: "0", fresh: "1.5"},
	{typ: "bigint", values: []string{"9223372036854775807", "-1"}, fresh: "77"},
	{typ: "smallint", values: []string{"1", "2"}, fresh: "3"},
	{typ: "boolean", values: []string{"t"}, fresh: "0"},
	{typ: "text", values: []string{"a", "", "A", "a ", "ä", "a\u0308", "x/y.z \"q\" 'p' \\b"}, fresh: "'new'"},
	{typ: "varchar(10)", values: []string{"a", "b "}, fresh: "'new'"},
	{typ: "char(5)", values: []string{"a", "abcde"}, fresh: "'new  '"},
	{typ: "bpchar", values: []string{"a ", "b"}, respelt: "a", fresh: "'new'"},
	{typ: "name", values: []string{"a", "B c"}, fresh: "'new'"},
	{typ: `text COLLATE own.blind`, values: []string{"Abc", "x"}, respelt: "ABC", fresh: "'new'"},
	{typ: "public.citext", values: []string{"Abc", "x"}, respelt: "ABC", fresh: "'new'"},
	{typ: "bytea", values: []string{`\x00`, `\x`, `\xff00`}, fresh: "x'00ff'"},
	{typ: "uuid", values: []string{"3B1E9C6A-58F4-4C0E-9D6B-2F60B1A4C7AA"}, fresh: "'00000000-0000-0000-0000-000000000001'"},
	{typ: "timestamptz", values: []string{"infinity", "2026-11-22 20:15:00+05:30", "0044-03-15 12:00:00+00 BC"}, fresh: "'2026-01-01 00:00:00+00'"},
	{typ: "timestamp", values: []string{"-infinity", "294276-12-31 23:59:59.999999"}, fresh: "'2026-01-01 00:00:00'"},
	{typ: "date", values: []string{"0044-03-15 BC", "infinity"}, fresh: "'2026-01-01'"},
	{typ: "time", values: []string{"24:00"}, fresh: "'12:00:00'"},
	{typ: "timetz", values: []string{"12:00+00", "13:00+01"}, fresh: "'12:00:00+05'"},
	{typ: "interval", values: []string{"1 mon", "1 day"}, respelt: "30 days", fresh: "'00:00:01'"},
	{typ: "inet", values: []string{"10.0.0.1", "10.0.0.1/8"}, fresh: "'::1'"},
	{typ: "cidr", values: []string{"10.0.0.0/8"}, fresh: "'10.0.0.1/32'"},
	{typ: "macaddr", values: []string{"08:00:2b:01:02:03"}, fresh: "'08:00:2b:01:02:04'"},
	{typ: "oid", values: []string{"4294967295"}, fresh: "'1'"},
	{typ: "money", values: []string{"$1.00"}, fresh: "'$2.00'"},
	{typ: "bit(3)", values: []string{"101"}, fresh: "'000'"},
	{typ: "varbit", values: []string{"", "0"}, fresh: "'00'"},
	{typ: "pg_lsn", values: []string{"0/0"}, fresh: "'16/B374D848'"},
	{typ: "xid8", values: []string{"1"}, fresh: "'2'"},
	{typ: `"char"`, values: []string{"x"}, fresh: "'y'", min: 16},
	{typ: "jsonb", values: []string{`{"a": 1.0}`, "null"}, respelt: `{"a": 1.00}`, fresh: "'[]'"},
	{typ: "integer[]", values: []string{"{1,NULL}", "{}"}, fresh: "'{2}'"},
	{typ: "numeric[]", values: []string{"{1.0}"}, respelt: "{1.00}", fresh: "'{2}'"},
	{typ: "int4range", values: []string{"[1,5)", "empty"}, fresh: "'[2,3)'"},
	{typ: "tsvector", values: []string{"'a':1"}, fresh: "'''b'':1'"},
	{typ: "own.mood", values: []string{"sad", `q"uote'd, \back`}, fresh: "'very happy'"},
	{typ: "own.positive", values: []string{"1"}, fresh: "2"},
	{typ: "own.code", values: []string{"ab"}, fresh: "'xyz'"},
	{typ: "own.pair", values: []string{`(1,"a b")`, `(,)`}, fresh: "'(2,b)'"},
	{typ: "public.ltree", values: []string{"Top.Science"}, fresh: "'Top.Art'"},
}

// awkward is a table and columns with names that must be quoted everywhere.
var awkward = []string{`My "Odd" Table`, "a.b", "select", "größe 🚑", strings.Repeat("t", 63)}
var awkwardColumns = []string{"Mixed", "with.dot", "sp ace", `quo"te`, "größe", "select", "$1", "a'b", `back\slash`, "%s", strings.Repeat("ü", 31) + "x"}

// TestEveryShape does the same with keys of every kind, and with tables of every kind.
func TestEveryShape(t *testing.T) {
	major, err := pgtest.Major()
	if err != nil {
		t.Fatal(err)
	}
	setup := append(append([]string{}, owned...), "CREATE COLLATION own.blind (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
		"CREATE SCHEMA keys", "CREATE SCHEMA odd", "CREATE SCHEMA part", "CREATE SCHEMA shapes")
	var use []keyed
	for _, k := range keys {
		if k.min <= major {
			use = append(use, k)
		}
	}
	value := func(k keyed, v string) string {
		typ, _, _ := strings.Cut(k.typ, " COLLATE")
		return literal(v) + "::" + typ
	}
	for i, k := range use {
		setup = append(setup, fmt.Sprintf("CREATE TABLE keys.k%02d (k %s PRIMARY KEY, note text, big text)", i, k.typ))
		setup = append(setup, fmt.Sprintf("INSERT INTO keys.k%02d VALUES (%s, 'copied', (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 200) i))", i, value(k, k.values[0])))
	}
	var odd []string
	for _, c := range awkwardColumns {
		odd = append(odd, schema.Quote(c)+" text DEFAULT "+schema.Literal(c))
	}
	for _, n := range awkward {
		name := "odd." + schema.Quote(n)
		setup = append(setup, fmt.Sprintf(`CREATE TABLE %s ("The ""Key""." int, %s, PRIMARY KEY ("The ""Key"".", "Mixed"))`, name, strings.Join(odd, ", ")),
			fmt.Sprintf("INSERT INTO %s VALUES (1)", name))
	}
	var wide, values []string
	for i := range 1588 {
		wide, values = append(wide, fmt.Sprintf("c%d smallint", i)), append(values, fmt.Sprint(i))
	}
	var sixty []string
	for i := range 60 {
		sixty = append(sixty, fmt.Sprintf("c%d int DEFAULT %[1]d", i))
	}
	random := "(SELECT string_agg(md5((i * %d)::text), '') FROM generate_series(1, 4000) i)"
	setup = append(setup,
		"CREATE TABLE shapes.wide (id int, note text, "+strings.Join(wide, ", ")+", PRIMARY KEY (id))",
		"INSERT INTO shapes.wide VALUES (1, 'n', "+strings.Join(values, ", ")+")",
		"CREATE TABLE shapes.sixty (id int PRIMARY KEY, big text, "+strings.Join(sixty, ", ")+")",
		"CREATE TABLE shapes.only (a int, b text, c timestamptz, PRIMARY KEY (c, a, b))",
		"INSERT INTO shapes.only VALUES (1, '', 'infinity'), (1, 'x', '2020-01-01')",
		"CREATE TABLE shapes.always (id bigint GENERATED ALWAYS AS IDENTITY (START 100) PRIMARY KEY, note text)",
		"INSERT INTO shapes.always (note) VALUES ('copied')",
		"CREATE TABLE shapes.bydefault (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, note text)",
		"INSERT INTO shapes.bydefault (note) VALUES ('copied')",
		`CREATE TABLE shapes.filled (id int PRIMARY KEY, n bigint GENERATED ALWAYS AS IDENTITY, s serial, at timestamptz NOT NULL DEFAULT clock_timestamp(),
			u uuid NOT NULL DEFAULT gen_random_uuid(), k int NOT NULL DEFAULT 7, free int DEFAULT 8, note text)`,
		"INSERT INTO shapes.filled (id) VALUES (1)",
		"CREATE TABLE shapes.computed (id int PRIMARY KEY, a int, double int GENERATED ALWAYS AS (a * 2) STORED, b text)",
		"INSERT INTO shapes.computed VALUES (1, 1, DEFAULT, 'copied')",
	)
	if major >= 18 {
		setup = append(setup, "ALTER TABLE shapes.computed ADD COLUMN half int GENERATED ALWAYS AS (a / 2) VIRTUAL")
	}
	for _, identity := range []string{"DEFAULT", "FULL", "USING INDEX toast_using_pkey"} {
		name := "toast_" + strings.ToLower(strings.Fields(identity)[0])
		setup = append(setup, fmt.Sprintf("CREATE TABLE shapes.%s (id int PRIMARY KEY, external text, compressed text, list text[], doc jsonb, n int)", name),
			fmt.Sprintf("ALTER TABLE shapes.%s ALTER external SET STORAGE EXTERNAL, REPLICA IDENTITY %s", name, identity),
			fmt.Sprintf(`INSERT INTO shapes.%s SELECT g, repeat('external', 2000 * g), `+random+`, ARRAY[repeat('x', 100000), `+random+`], jsonb_build_object('a', `+random+`), 0 FROM generate_series(1, 3) g`, name, 1, 2, 3))
	}
	setup = append(setup, `INSERT INTO shapes.sixty (id, big) SELECT g, `+fmt.Sprintf(random, 5)+` FROM generate_series(1, 3) g`,
		"CREATE TABLE part.list (id int, region text, note text, big text, PRIMARY KEY (region, id)) PARTITION BY LIST (region)",
		"CREATE TABLE part.list_eu (big text, region text NOT NULL, dropped int, id int NOT NULL, note text)", "ALTER TABLE part.list_eu DROP COLUMN dropped",
		"ALTER TABLE part.list ATTACH PARTITION part.list_eu FOR VALUES IN ('eu')",
		"CREATE TABLE part.list_rest PARTITION OF part.list DEFAULT",
		`INSERT INTO part.list SELECT g, CASE WHEN g % 2 = 0 THEN 'eu' ELSE 'us' END, 'copied', `+fmt.Sprintf(random, 7)+` FROM generate_series(1, 6) g`,
		"CREATE TABLE part.range (day date, id int, note text, PRIMARY KEY (day, id)) PARTITION BY RANGE (day)",
		"CREATE TABLE part.range_old PARTITION OF part.range FOR VALUES FROM (MINVALUE) TO ('2026-01-01') PARTITION BY HASH (id)",
		"CREATE TABLE part.range_old_0 PARTITION OF part.range_old FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
		"CREATE TABLE part.range_old_1 PARTITION OF part.range_old FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
		"CREATE TABLE part.range_new PARTITION OF part.range FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')",
		"INSERT INTO part.range SELECT '2025-12-30'::date + g, g, 'copied' FROM generate_series(1, 6) g",
		"CREATE TABLE part.hash (id text PRIMARY KEY, note text) PARTITION BY HASH (id)",
		"CREATE TABLE part.hash_0 PARTITION OF part.hash FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
		"CREATE TABLE part.hash_1 PARTITION OF part.hash FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
		"INSERT INTO part.hash SELECT g::text, 'copied' FROM generate_series(1, 6) g",
		"CREATE TABLE part.empty (id int PRIMARY KEY) PARTITION BY RANGE (id)",
	)
	r := newRig(t, setup, "rig", "keys", "odd", "part", "shapes")
	r.settle()
	r.agree("copied")

	for i, k := range use {
		for _, v := range k.values[1:] {
			r.at(fmt.Sprintf("INSERT INTO keys.k%02d VALUES (%s, 'streamed')", i, value(k, v)))
		}
		r.on(r.a, fmt.Sprintf("UPDATE k%02d SET note = 'by a'", i)) // the copied one
		r.on(r.b, fmt.Sprintf("INSERT INTO k%02d VALUES (%s, 'by b', NULL)", i, k.fresh))
	}
	for _, n := range awkward {
		r.at(fmt.Sprintf(`INSERT INTO odd.%s VALUES (2)`, schema.Quote(n)))
		r.on(r.a, fmt.Sprintf(`UPDATE %s SET "quo""te" = 'edited', "größe" = NULL`, r.local("odd."+n)))
		r.on(r.b, fmt.Sprintf(`INSERT INTO %s ("The ""Key"".") VALUES (3)`, r.local("odd."+n)))
	}
	r.at("INSERT INTO shapes.wide VALUES (2, 'n', "+strings.Join(values, ", ")+")", "INSERT INTO shapes.wide (id) VALUES (3)",
		"INSERT INTO shapes.only VALUES (2, 'y', '-infinity')", "DELETE FROM shapes.only WHERE b = ''")
	r.on(r.a, "UPDATE wide SET note = 'edited', c1587 = -1")
	r.on(r.b, "INSERT INTO wide (id, c5) VALUES (4, 5)")
	r.on(r.a, "INSERT INTO only VALUES (3, 'by a', '2021-01-01 00:00:00+00')")
	r.on(r.b, "DELETE FROM only WHERE b = 'x'")
	r.on(r.a, "INSERT INTO always VALUES (7, 'by a')")
	r.on(r.b, "INSERT INTO bydefault VALUES (8, 'by b')")
	r.on(r.b, "UPDATE always SET note = 'by b'")
	r.on(r.a, "INSERT INTO filled (id, note, free) VALUES (2, 'left empty', NULL)")
	r.on(r.b, "INSERT INTO filled (id, n, s, at, u, k, note) VALUES (3, 99, 98, '2020-01-01 00:00:00+00', '00000000-0000-0000-0000-000000000001', 6, 'given')")
	r.on(r.a, "UPDATE filled SET note = 'edited' WHERE id = 1")
	r.at("INSERT INTO shapes.computed VALUES (2, 2, DEFAULT, 'streamed')")
	r.on(r.a, "UPDATE computed SET a = 21 WHERE id = 1")
	r.on(r.b, "INSERT INTO computed (id, a, b) VALUES (3, 3, 'by b')")
	for _, name := range []string{"toast_default", "toast_full", "toast_using"} {
		r.at(fmt.Sprintf("UPDATE shapes.%s SET n = n + 1 WHERE id < 3", name), fmt.Sprintf("UPDATE shapes.%s SET id = 4 WHERE id = 1", name),
			fmt.Sprintf("UPDATE shapes.%s SET compressed = 'short' WHERE id = 4", name))
		r.on(r.b, fmt.Sprintf("UPDATE %s SET external = external || 'x' WHERE id = 3", name))
	}
	r.at("UPDATE shapes.sixty SET id = 4, c5 = 0 WHERE id = 1")
	r.on(r.a, "UPDATE sixty SET c1 = 5 WHERE id = 2")
	r.at("UPDATE part.list SET region = 'us' WHERE id = 2", "UPDATE part.list SET region = 'eu', note = 'moved' WHERE id = 1", "UPDATE part.list SET note = 'x' WHERE id = 4",
		"INSERT INTO part.list_eu (id, region, note) VALUES (20, 'eu', 'into the partition')", "DELETE FROM part.list_rest WHERE id = 5",
		"UPDATE part.range SET day = '2025-06-01' WHERE id = 4", "CREATE TABLE part.range_later PARTITION OF part.range FOR VALUES FROM ('2027-01-01') TO ('2028-01-01')",
		"INSERT INTO part.range VALUES ('2027-05-05', 9, 'later')", "UPDATE part.hash SET id = id || 'x' WHERE id < '3'")
	r.on(r.a, "UPDATE list SET note = 'by a' WHERE id = 6")
	r.on(r.a, "DELETE FROM list WHERE id = 3")
	r.on(r.b, "INSERT INTO list VALUES (30, 'asia', 'by b', NULL), (31, 'eu', 'by b', 'big')")
	r.on(r.b, `INSERT INTO range VALUES ('2024-01-01', 40, 'by b'), ('2027-01-01', 41, 'by b')`)
	r.on(r.a, "INSERT INTO hash VALUES ('by a', 'n')")
	r.on(r.b, "UPDATE range SET note = 'by b' WHERE id = 5")
	r.settle()
	r.agree("edited on all sides")
	r.clean()
	for q, want := range map[string]string{
		"SELECT count(*)::text FROM shapes.wide WHERE note = 'edited' AND c1587 = -1 AND c1586 = 1586": "1",
		"SELECT string_agg(id::text, ',' ORDER BY id) FROM shapes.always":                              "7,100",
		"SELECT count(*)::text FROM shapes.filled WHERE id = 2 AND k = 7 AND free IS NULL":             "1",
		"SELECT n || ' ' || s || ' ' || k FROM shapes.filled WHERE id = 3":                             "99 98 6",
		"SELECT string_agg(double::text, ',' ORDER BY id) FROM shapes.computed":                        "42,4,6",
		"SELECT tableoid::regclass::text FROM part.list WHERE id = 31":                                 "part.list_eu",
		"SELECT tableoid::regclass::text FROM part.list WHERE id = 30":                                 "part.list_rest",
		"SELECT note FROM part.list WHERE id = 6":                                                      "by a",
		"SELECT count(*)::text FROM part.range WHERE note = 'by b'":                                    "3",
	} {
		if got := r.one(q); got != want {
			t.Errorf("%s: %s, want %s", q, got, want)
		}
	}

	// The source writes equal keys in another way; devices edit and delete.
	for i, k := range use {
		if k.respelt != "" {
			typ, _, _ := strings.Cut(k.typ, " COLLATE")
			r.at(fmt.Sprintf("UPDATE keys.k%02d SET k = %s::%s, note = 'respelt' WHERE k = %s", i, literal(k.respelt), typ, value(k, k.values[0])))
		}
		r.on(r.b, fmt.Sprintf("UPDATE k%02d SET note = 'by b again' WHERE k = %s", i, k.fresh))
		if len(k.values) > 1 {
			r.on(r.a, fmt.Sprintf("DELETE FROM k%02d WHERE note = 'streamed'", i))
		}
	}
	r.at("TRUNCATE part.hash")
	r.settle()
	r.agree("keys written in another way")
	for i, k := range use {
		if k.respelt != "" {
			typ, _, _ := strings.Cut(k.typ, " COLLATE")
			if n := r.one(fmt.Sprintf("SELECT count(*)::text FROM keys.k%02d WHERE record_image_eq(ROW(k), ROW(%s::%s)) AND note = 'respelt'", i, literal(k.respelt), typ)); n != "1" {
				t.Errorf("%s: the new notation is not there", k.typ)
			}
		}
		if n := r.one(fmt.Sprintf("SELECT count(*)::text FROM keys.k%02d WHERE note = 'by b again'", i)); n != "1" {
			t.Errorf("%s: %s rows have the second edit", k.typ, n)
		}
	}

	// Now while a device has an edit of such a row.
	for i, k := range use {
		if k.respelt != "" {
			r.on(r.a, fmt.Sprintf("UPDATE k%02d SET note = 'too late' WHERE note = 'respelt'", i))
			r.at(fmt.Sprintf("UPDATE keys.k%02d SET k = %s WHERE note = 'respelt'", i, value(k, k.values[0])))
		}
	}
	r.settle()
	r.agree("keys written in another way under an edit")
}

// local is a table's name on the devices, quoted.
func (r *rig) local(wire string) string {
	r.t.Helper()
	var s string
	if err := r.a.DB().QueryRowContext(r.ctx, "SELECT local FROM _ws_table WHERE wire = ?", wire).Scan(&s); err != nil {
		r.t.Fatalf("%s: %v", wire, err)
	}
	return schema.Quote(s)
}
