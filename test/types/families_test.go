package types

import (
	"fmt"
	"strings"

	"github.com/waystage/waystage/schema"
)

// column is a type with the values that it is tested with, as PostgreSQL may read them. {n} stands for a text of n characters.
type column struct {
	typ    string
	values []string
	min    int // the first major version that has it; 0: all
}

// big is an incompressible text of about n bytes, so that it is stored out of line.
func big(n int) string { return fmt.Sprintf("\x00%d", n) }

// families are tables: one column for each type, one row for each value.
var families = map[string][]column{
	"numbers": {
		{typ: "smallint", values: []string{"0", "-32768", "32767"}},
		{typ: "integer", values: []string{"-1", "-2147483648", "2147483647"}},
		{typ: "bigint", values: []string{"9223372036854775807", "-9223372036854775808", "9007199254740993"}},
		{typ: "numeric", values: []string{"NaN", "Infinity", "-Infinity", "1.0", "1.00", "0", "0.000", "-0.5", "1e-1000", "1e1000",
			strings.Repeat("123456789.", 1) + strings.Repeat("98765432101234567890", 50), strings.Repeat("9", 131072), "0." + strings.Repeat("0", 16382) + "1"}},
		{typ: "numeric(12,2)", values: []string{"12.5", "-9999999999.99", "NaN", "0"}},
		{typ: "numeric(3,-2)", values: []string{"12345", "-99900"}},
		{typ: "numeric(2,4)", values: []string{"0.0012"}},
		{typ: "real", values: []string{"0", "-0", "NaN", "Infinity", "-Infinity", "1e-45", "3.4028235e+38", "0.1", "1e6", "999999", "16777217", "1.17549435e-38"}},
		{typ: "double precision", values: []string{"0", "-0", "NaN", "Infinity", "-Infinity", "5e-324", "2.2250738585072011e-308", "1.7976931348623157e308", "0.1",
			"0.30000000000000004", "1e15", "1e23", "8.41e21", "9007199254740993", "1e-5", "123456789012345680", "100000"}},
		{typ: "money", values: []string{"$1,234.56", "-92233720368547758.08", "92233720368547758.07", "0.00", "-0.01"}},
		{typ: "boolean", values: []string{"t", "f"}},
		{typ: "oid", values: []string{"0", "4294967295"}},
		{typ: "xid", values: []string{"4294967295"}},
		{typ: "xid8", values: []string{"18446744073709551615"}},
		{typ: "cid", values: []string{"7"}},
		{typ: "tid", values: []string{"(4294967295,65535)"}},
		{typ: "pg_lsn", values: []string{"0/0", "FFFFFFFF/FFFFFFFF", "16/B374D848"}},
		{typ: "pg_snapshot", values: []string{"10:20:10,14,15"}},
		{typ: "txid_snapshot", values: []string{"10:20:10,14,15"}},
		{typ: "int2vector", values: []string{"1 2 -3", ""}},
		{typ: "oidvector", values: []string{"1 2 4294967295"}},
	},
	"texts": {
		{typ: "text", values: []string{"", " ", "a  ", "späť", "日本語 🚑", "\U0010ffff", "line\r\nbreak\ttab\v\f", "0", "-0", "007", "1e3", "t", `\x41`, `\N`, "null", "NULL", `'"; drop table`, "e\u0301",
			"\u0001\u001f\u007f", "\ufeffbom", "\u202e", "{}", "<a>&amp;</a>\u2028", big(20000), strings.Repeat("compressible ", 20000)}},
		{typ: "varchar", values: []string{"abc ", ""}},
		{typ: "varchar(5)", values: []string{"abc  ", "äöüßé", "12"}},
		{typ: "char(5)", values: []string{"a", "", "äö", "abcde", "  b"}},
		{typ: "char", values: []string{"x", " "}},
		{typ: "bpchar", values: []string{"a  ", "b"}},
		{typ: "name", values: []string{"", "Mixed \"Case\"", strings.Repeat("n", 63)}},
		{typ: `"char"`, values: []string{"x", "", "'", `\303`}, min: 16},
		{typ: `text COLLATE "C"`, values: []string{"b", "A"}},
		{typ: "bytea", values: []string{`\x`, `\x00`, `\x00ff7f80`, `\xdeadbeef00`, `\x2d30`, big(9000)}},
		{typ: "uuid", values: []string{"3B1E9C6A-58F4-4C0E-9D6B-2F60B1A4C7AA", "00000000-0000-0000-0000-000000000000"}},
		{typ: "bit(3)", values: []string{"101", "000"}},
		{typ: "bit", values: []string{"1"}},
		{typ: "varbit", values: []string{"", "1", "0101010101011111"}},
		{typ: "bit varying(5)", values: []string{"", "01011"}},
		{typ: "json", values: []string{`{"a": 1,  "a":2, "b":[1, 1.0, 1e0] }`, "  null ", `"\u00e9\n"`, "1.10", `{"":{}}`, `"` + big(9000) + `"`, " [ ] "}},
		{typ: "jsonb", values: []string{`{"b": 1, "a": [1, null, "x", 1.0, 1.00, -0]}`, "null", `"\u00e9"`, "1e400", "[]", `{"a":"` + big(9000) + `"}`}},
		{typ: "jsonpath", values: []string{`$.a[*] ? (@ > 1)`, `strict $`}},
		{typ: "xml", values: []string{"<a/>", `<?xml version="1.0" encoding="UTF-8"?><a b='c'>é &lt;</a>`, "text and <b>element</b>", "", "<!-- c -->", `<?xml version="1.0" standalone="yes"?><a/>`}},
		{typ: "tsvector", values: []string{"'a':1A,2B 'b c':3 'd''e'", ""}},
		{typ: "tsquery", values: []string{"'a' & !('b' | 'c':*) <-> 'd'", ""}},
		{typ: "refcursor", values: []string{"cursor"}},
	},
	"times": {
		{typ: "date", values: []string{"2026-11-22", "infinity", "-infinity", "0044-03-15 BC", "4713-01-01 BC", "5874897-12-31", "0001-01-01", "2024-02-29"}},
		{typ: "time", values: []string{"00:00", "24:00:00", "23:59:59.999999", "12:00:00.5"}},
		{typ: "time(0)", values: []string{"12:00:01"}},
		{typ: "timetz", values: []string{"12:00:00+15:59:59", "00:00-08", "24:00:00+00", "23:59:59.999999-15:59"}},
		{typ: "timestamp", values: []string{"infinity", "-infinity", "4714-11-24 00:00:00 BC", "294276-12-31 23:59:59.999999", "2026-11-22 20:15:00.1", "10000-01-01 00:00:00", "0001-12-31 23:59:59 BC"}},
		{typ: "timestamptz", values: []string{"infinity", "-infinity", "4714-11-24 00:00:00+00 BC", "294276-12-31 23:59:59.999999+00", "2026-11-22 20:15:00.123456+05:30", "1890-01-01 00:00:00+00:17:30"}},
		{typ: "timestamptz(2)", values: []string{"2026-11-22 20:15:00.12+00"}},
		{typ: "interval", values: []string{"1 mon", "30 days", "720:00:00", "1 year -2 mons 3 days -04:05:06.789", "178000000 years", "-178000000 years", "0", "-0.000001 s", "2562047788:00:54.775807", "@ 1 year ago"}},
		{typ: "interval", values: []string{"infinity", "-infinity"}, min: 17},
		{typ: "interval(3)", values: []string{"1.234 s"}},
		{typ: "interval year to month", values: []string{"1-2", "-5 mons"}},
		{typ: "interval day to second(0)", values: []string{"1 12:59:10"}},
	},
	"places": {
		{typ: "point", values: []string{"(1,2)", "(-0,NaN)", "(Infinity,-1e-300)", "(0.1,0.30000000000000004)"}},
		{typ: "line", values: []string{"{1,-1,0}", "{0.1,2,-3}"}},
		{typ: "lseg", values: []string{"[(0,0),(1,1)]"}},
		{typ: "box", values: []string{"(1,1),(0,0)", "((2,0.1),(-1,5))"}},
		{typ: "path", values: []string{"[(0,0),(1,1)]", "((0,0),(1,1),(2,0))"}},
		{typ: "polygon", values: []string{"((0,0),(1,1),(2,0))"}},
		{typ: "circle", values: []string{"<(1,2),3>", "<(0,-0),0.1>"}},
		{typ: "inet", values: []string{"10.0.0.1", "10.0.0.1/8", "::1", "2001:db8::/32", "0.0.0.0/0", "::ffff:1.2.3.4"}},
		{typ: "cidr", values: []string{"10.0.0.0/8", "10.0.0.1/32", "::/0", "2001:db8::1/128"}},
		{typ: "macaddr", values: []string{"08-00-2b-01-02-03"}},
		{typ: "macaddr8", values: []string{"08:00:2b:01:02:03:04:05"}},
	},
	"ranges": {
		{typ: "int4range", values: []string{"[1,5)", "empty", "(,)", "[3,3]", "(,5]"}},
		{typ: "int8range", values: []string{"[-9223372036854775808,9223372036854775807)"}},
		{typ: "numrange", values: []string{"[1.0,2.00]", "(1.10,)", "[NaN,NaN]"}},
		{typ: "tsrange", values: []string{`["2020-01-01 00:00:00","infinity")`, "(,)", `["0044-01-01 00:00:00 BC",)`}},
		{typ: "tstzrange", values: []string{`["2020-01-01 00:00:00+02","2021-01-01 00:00:00+00"]`}},
		{typ: "daterange", values: []string{"[2020-01-01,2020-01-31]", "[-infinity,infinity]"}},
		{typ: "int4multirange", values: []string{"{}", "{[1,3),[5,9)}", "{[1,2],[2,5]}"}},
		{typ: "nummultirange", values: []string{"{[1.0,1.00]}"}},
		{typ: "datemultirange", values: []string{"{[2020-01-01,2020-01-31]}"}},
		{typ: "tstzmultirange", values: []string{`{["2020-01-01 00:00:00+00","2021-01-01 00:00:00+00"]}`}},
		{typ: "own.textrange", values: []string{`["a b","c""d\\"]`, "empty"}},
		{typ: "own.textmultirange", values: []string{`{[a,b],[x,y]}`, "{}"}},
	},
	"arrays": {
		{typ: "integer[]", values: []string{"{}", "{1,NULL,3}", "{{1,2},{3,4}}", "[0:2]={1,2,3}", "[-5:-4][7:8]={{1,2},{3,4}}", "{NULL}"}},
		{typ: "text[]", values: []string{`{"a b","c\"d\\",NULL,"NULL",null,""}`, "{}", `{"{","}",","}`, "{{a},{b}}", "{" + big(9000) + "}"}},
		{typ: "varchar(3)[]", values: []string{"{abc,d}"}},
		{typ: "char(3)[]", values: []string{"{a,bcd}"}},
		{typ: "bit(3)[]", values: []string{"{101,000}"}},
		{typ: "bytea[]", values: []string{`{"\\x00ff","\\x",NULL}`}},
		{typ: "numeric(6,2)[]", values: []string{"{1,2.5,NaN}"}},
		{typ: "numeric[]", values: []string{"{1.0,1.00,Infinity}"}},
		{typ: "real[]", values: []string{"{-0,NaN,1e-45,0.1}"}},
		{typ: "double precision[]", values: []string{"{-0,1e23,Infinity}"}},
		{typ: "boolean[]", values: []string{"{t,f,NULL}"}},
		{typ: "timestamptz[]", values: []string{`{infinity,"2020-01-01 00:00:00+00"}`}},
		{typ: "interval[]", values: []string{`{"1 mon","30 days"}`}},
		{typ: "json[]", values: []string{`{"{\"a\":  1}","null",NULL}`}},
		{typ: "jsonb[]", values: []string{`{"{\"a\": 1}","null",NULL}`}},
		{typ: "uuid[]", values: []string{"{3b1e9c6a-58f4-4c0e-9d6b-2f60b1a4c7aa}"}},
		{typ: "inet[]", values: []string{"{10.0.0.1,10.0.0.0/8}"}},
		{typ: "xml[]", values: []string{`{<a/>,"<b>x y</b>"}`}},
		{typ: "point[]", values: []string{`{"(1,2)","(-0,0)"}`}},
		{typ: "box[]", values: []string{`{(1,1),(0,0);(3,3),(2,2)}`}},
		{typ: "name[]", values: []string{`{a,"B c"}`}},
		{typ: "int4range[]", values: []string{`{"[1,5)",empty}`}},
		{typ: "own.mood[]", values: []string{`{"very happy",sad,NULL}`}},
		{typ: "own.pair[]", values: []string{`{"(1,\"a \"\"b\")",NULL}`}},
		{typ: "own.positive[]", values: []string{"{1,2}"}},
	},
	"owned": {
		{typ: "own.mood", values: []string{"sad", "very happy", `q"uote'd, \back`, ""}},
		{typ: "own.positive", values: []string{"1", "2147483647"}},
		{typ: "own.code", values: []string{"ab ", "xyz"}},
		{typ: "own.exact", values: []string{"1", "1.25"}},
		{typ: "own.days", values: []string{"{mon,tue}", "{}"}},
		{typ: "own.deep", values: []string{"5"}},
		{typ: "own.doc", values: []string{`{"a":  1, "a": 2}`}},
		{typ: "own.pair", values: []string{`(1,"a ""b"", (c)")`, "(,)", `(2," ")`, `(3,"\\")`}},
		{typ: "own.nested", values: []string{`("(1,""x,y"")","{1,NULL}",sad)`, "(,,)"}},
		{typ: "public.citext", values: []string{"Abc", "ABC", ""}},
		{typ: "public.hstore", values: []string{`"a"=>"1", "b c"=>NULL, "d"=>"x\"y"`, ""}},
		{typ: "public.ltree", values: []string{"Top.Science.Astronomy", ""}},
		{typ: "public.lquery", values: []string{"*.Astro*%.!pizza@{1,2}"}},
		{typ: "public.cube", values: []string{"(1, 2, 3),(4, 5, 6)", "(0.1)"}},
		{typ: "public.seg", values: []string{"1.50 .. ~3.0", "<5"}},
		{typ: "public.isbn13", values: []string{"978-0-393-04002-9"}},
		{typ: "public.citext[]", values: []string{`{Abc,"d e"}`}},
		{typ: "public.query_int", values: []string{"1&(2|3)"}},
	},
}

// owned are the user-defined types of the families.
var owned = []string{
	"CREATE SCHEMA rig", "CREATE TABLE rig.beat (id int PRIMARY KEY, n int NOT NULL)", "INSERT INTO rig.beat VALUES (1, 0)",
	"CREATE EXTENSION citext SCHEMA public", "CREATE EXTENSION hstore SCHEMA public", "CREATE EXTENSION ltree SCHEMA public", "CREATE EXTENSION cube SCHEMA public", "CREATE EXTENSION seg SCHEMA public",
	"CREATE EXTENSION isn SCHEMA public", "CREATE EXTENSION intarray SCHEMA public",
	"CREATE SCHEMA own",
	`CREATE TYPE own.mood AS ENUM ('sad', 'very happy', 'q"uote''d, \back', '')`,
	"CREATE DOMAIN own.positive AS int CHECK (VALUE > 0)",
	"CREATE DOMAIN own.code AS char(3)",
	"CREATE DOMAIN own.exact AS numeric(10,4)",
	"CREATE DOMAIN own.days AS text[] CHECK (array_length(VALUE, 1) IS NULL OR array_length(VALUE, 1) < 8)",
	"CREATE DOMAIN own.deep AS own.positive CHECK (VALUE < 10)",
	"CREATE DOMAIN own.doc AS json",
	"CREATE TYPE own.pair AS (n int, t text)",
	"CREATE TYPE own.nested AS (p own.pair, a int[], m own.mood)",
	"CREATE TYPE own.textrange AS RANGE (subtype = text, collation = \"C\")",
}

// ofFamily is the table of a family and the statement that fills it, from a number on.
func ofFamily(name string, major int) (create string, insert func(from int) []string) {
	var cols []string
	var use []column
	rows := 1
	for _, c := range families[name] {
		if c.min > major {
			continue
		}
		cols = append(cols, fmt.Sprintf("%s %s", schema.Quote(fmt.Sprintf("c%02d", len(use))), c.typ))
		use = append(use, c)
		rows = max(rows, len(c.values)+1)
	}
	create = fmt.Sprintf("CREATE TABLE families.%s (id int PRIMARY KEY, note text, %s)", name, strings.Join(cols, ", "))
	return create, func(from int) (out []string) {
		for i := range rows { // the last row is all null
			vals := []string{fmt.Sprint(from + i), "'n'"}
			for _, c := range use {
				if i >= len(c.values) {
					vals = append(vals, "NULL")
					continue
				}
				typ, _, _ := strings.Cut(c.typ, " COLLATE")
				vals = append(vals, fmt.Sprintf("(%s)::%s", literal(c.values[i]), typ))
			}
			out = append(out, fmt.Sprintf("INSERT INTO families.%s VALUES (%s)", name, strings.Join(vals, ", ")))
		}
		return out
	}
}

// literal is an SQL expression for the text of a value.
func literal(v string) string {
	before, after, found := strings.Cut(v, "\x00")
	if !found {
		return schema.Literal(v)
	}
	n := strings.TrimLeft(after, "0123456789")
	count := strings.TrimSuffix(after, n)
	return schema.Literal(before) + " || (SELECT left(string_agg(md5(i::text), ''), " + count + ") FROM generate_series(1, " + count + " / 32 + 1) i) || " + schema.Literal(n)
}
