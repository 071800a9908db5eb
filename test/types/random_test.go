package types

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/waystage/waystage/schema"
)

// random is a type with values that nobody chose: an SQL expression of PostgreSQL's random(), and a generator of what an
// application binds when it writes to the device's file.
type random struct {
	typ  string
	sql  string
	from *rapid.Generator[any]
}

func as[T any](g *rapid.Generator[T]) *rapid.Generator[any] {
	return rapid.Map(g, func(v T) any { return v })
}

func shaped(pattern string) *rapid.Generator[any] { return as(rapid.StringMatching(pattern)) }

// sentence is any text that PostgreSQL stores.
var sentence = rapid.Map(rapid.String(), func(s string) string { return strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", ""), "?") })

var micros = rapid.Map(rapid.Int64Range(-62_000_000_000, 250_000_000_000), func(s int64) time.Time { return time.Unix(s, s&0xfffff*1000).UTC() })

var finite = rapid.Custom(func(t *rapid.T) float64 {
	if rapid.Bool().Draw(t, "decimal") { // decimal numbers come half-way between two doubles more often than others
		f, _ := strconv.ParseFloat(fmt.Sprintf("%de%d", rapid.IntRange(1, 9999).Draw(t, "d"), rapid.IntRange(-30, 40).Draw(t, "e")), 64)
		return f
	}
	return rapid.Float64().Draw(t, "f")
})

var randoms = []random{
	{"double precision", "(random() - 0.5) * 10.0::float8 ^ (random() * 600 - 300)::int", as(finite)},
	{"double precision", "((random() * 99)::int || 'e' || (random() * 60 - 30)::int)::float8", as(rapid.Map(finite, func(f float64) float64 { return -f }))},
	{"real", "((random() - 0.5) * 10.0::float8 ^ (random() * 60 - 30)::int)::real", as(rapid.Map(rapid.Float32(), func(f float32) float64 { return float64(f) }))},
	{"bigint", "(random() * 9e18)::bigint - 4500000000000000000", as(rapid.Int64())},
	{"boolean", "random() < 0.5", as(rapid.Map(rapid.Bool(), func(b bool) int64 {
		if b {
			return 1
		}
		return 0
	}))},
	{"numeric", "round((random() * 10::numeric ^ (random() * 30)::int)::numeric, (random() * 20)::int)", shaped(`-?[0-9]{1,60}(\.[0-9]{0,60})?`)},
	{"numeric(20,5)", "(random() * 1e14)::numeric(20,5)", shaped(`-?[0-9]{1,15}\.[0-9]{5}`)},
	{"money", "(random() * 1e10)::numeric::money", shaped(`-?[0-9]{1,15}\.[0-9]{2}`)},
	{"text", "chr(1 + (random() * 55000)::int) || repeat(chr(57344 + (random() * 1000000)::int), (random() * 5)::int)", as(sentence)},
	{"char(9)", "left(md5(random()::text), (random() * 9)::int)", shaped(`[a-zäß日]{0,9}`)},
	{"bytea", "decode(left(md5(random()::text), 2 * (random() * 16)::int), 'hex')", as(rapid.SliceOf(rapid.Byte()))},
	{"uuid", "gen_random_uuid()", shaped(`[0-9a-f]{8}-[0-9A-F]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)},
	{"date", "'4713-01-01 BC'::date + (random() * 2e9)::int", as(rapid.Map(micros, func(t time.Time) string { return t.Format("2006-01-02") }))},
	{"timestamp", "'4713-01-01 BC'::timestamp + random() * interval '290000 years'", as(rapid.Map(micros, func(t time.Time) string { return t.Format("2006-01-02 15:04:05.000000") }))},
	{"timestamptz", "'4713-01-01 BC'::timestamptz + random() * interval '290000 years'", as(rapid.Map(micros, func(t time.Time) string { return t.Format(time.RFC3339Nano) }))},
	{"time", "'00:00'::time + random() * interval '1 day'", shaped(`([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?`)},
	{"timetz", "('00:00'::time + random() * interval '1 day')::text || format('+%s:%s', (random() * 14)::int, 10 + (random() * 49)::int)", shaped(`([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9][+-](0[0-9]|1[0-4]):[0-5][0-9]`)},
	{"interval", "make_interval((random() * 1e4)::int - 5000, (random() * 24)::int - 12, 0, (random() * 62)::int - 31, 0, 0, random() * 1e6 - 5e5)", shaped(`-?[0-9]{1,4} mons -?[0-9]{1,4} days -?[0-9]{1,4}:[0-5][0-9]:[0-5][0-9]\.[0-9]{1,6}`)},
	{"inet", "host('0.0.0.0'::inet + (random() * 4294967295)::bigint) || '/' || (random() * 32)::int", shaped(`(1?[0-9]{1,2}\.){3}1?[0-9]{1,2}(/[12]?[0-9])?`)},
	{"bit(12)", "((random() * 4095)::int)::bit(12)", shaped(`[01]{12}`)},
	{"varbit", "substring(((random() * 2147483647)::int)::bit(32) FROM 1 FOR (random() * 32)::int)", shaped(`[01]{0,40}`)},
	{"json", "format('{\"a\" :%s,  \"a\":%s}', random(), to_json(md5(random()::text)))", as(rapid.Map(sentence, func(s string) string { b, _ := json.Marshal(s); return " [ " + string(b) + " ,1.0]" }))},
	{"jsonb", "jsonb_build_object(md5(random()::text), random(), 'n', (random() * 1e9)::numeric(12,3), 'l', jsonb_build_array(null, true, random()::text))",
		as(rapid.Map(sentence, func(s string) string {
			b, _ := json.Marshal(map[string]any{"k": s, s: []any{nil, 1.5}})
			return string(b)
		}))},
	{"xml", "xmlelement(name a, xmlattributes(random() AS x), md5(random()::text))", shaped(`<a b="[a-z]{0,5}">[a-zé ]{0,9}</a>`)},
	{"tsvector", "to_tsvector('simple', md5(random()::text) || ' ' || md5(random()::text))", shaped(`([a-z]{1,5}:[1-9][0-9]?[ABCD]? ){0,5}`)},
	{"point", "point(random() * 1e10, (random() - 0.5) * 1e-10)", shaped(`\(-?[0-9]{1,5}\.[0-9]{1,15},-?[0-9]{1,5}e-?[0-9]\)`)},
	{"int4range", "int4range((random() * 1000)::int, 1000 + (random() * 1000)::int, (ARRAY['[]','()','[)','(]'])[1 + (random() * 3)::int])", shaped(`[\[(][0-9]{1,4},1[0-9]{4}[\])]`)},
	{"nummultirange", "nummultirange(numrange(random()::numeric, 1 + random()::numeric), numrange(3, (4 + random())::numeric))", shaped(`\{[\[(][0-9]\.[0-9]{1,9},1[0-9]\.0[\])]\}`)},
	{"integer[]", "ARRAY(SELECT nullif((random() * 10)::int, 5) FROM generate_series(1, (random() * 6)::int))", shaped(`\{(-?[0-9]{1,9},|NULL,){0,5}-?[0-9]{1,9}\}`)},
	{"text[]", "ARRAY(SELECT chr(32 + (random() * 95)::int) || chr(32 + (random() * 95)::int) FROM generate_series(1, (random() * 6)::int))",
		as(rapid.Map(rapid.SliceOfN(sentence, 0, 4), func(l []string) string {
			for i, s := range l {
				l[i] = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
			}
			return "{" + strings.Join(l, ",") + "}"
		}))},
	{"double precision[]", "ARRAY(SELECT random() * 10.0::float8 ^ (random() * 40)::int FROM generate_series(1, 3))", shaped(`\{-?[0-9]{1,3}e[0-9]{1,2},NaN,-0\}`)},
	{"own.mood", "(enum_range(NULL::own.mood))[1 + (random() * 3)::int]", as(rapid.SampledFrom([]string{"sad", "very happy", `q"uote'd, \back`, ""}))},
	{"own.pair", "ROW((random() * 100)::int, chr(32 + (random() * 95)::int) || ' ')::own.pair", shaped(`\((-?[0-9]{1,5})?,"[a-z ,()]{0,5}"\)`)},
	{"public.hstore", "public.hstore(md5(random()::text), chr(32 + (random() * 95)::int))", shaped(`("[a-z ]{1,4}"=>("[a-z, ]{0,4}"|NULL), ){0,3}z=>1`)},
	{"public.citext", "md5(random()::text)", as(sentence)},
}

// TestRandomValues sends values that nobody chose, from the source to devices and from a device to the source.
func TestRandomValues(t *testing.T) {
	seed := time.Now().UnixNano()
	if s := os.Getenv("WAYSTAGE_TEST_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseInt(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	seed %= 1 << 31
	t.Logf("WAYSTAGE_TEST_SEED=%d makes the same values", seed)
	const rows = 150
	var cols, exprs, names []string
	for i, x := range randoms {
		name := fmt.Sprintf("c%02d", i)
		names = append(names, name)
		cols = append(cols, name+" "+x.typ)
		exprs = append(exprs, fmt.Sprintf("(%s)::%s", x.sql, x.typ))
	}
	insert := func(from, to int) string {
		return fmt.Sprintf("INSERT INTO random.t SELECT g, 'n', %s FROM generate_series(%d, %d) g", strings.Join(exprs, ", "), from, to)
	}
	setup := append(append([]string{}, owned...), "CREATE SCHEMA random", "CREATE TABLE random.t (id int PRIMARY KEY, note text, "+strings.Join(cols, ", ")+")",
		fmt.Sprintf("SELECT setseed(%d::float8 / 2147483648)", seed), insert(1, rows))
	r := newRig(t, setup, "rig", "random")
	r.settle()
	r.agree("copied random values")
	r.at(insert(1001, 1000+rows))
	type written struct {
		ids   []int32
		texts []*string
	}
	wrote := make([]written, len(randoms))
	for i := range rows {
		id := 2001 + i
		args := []any{id}
		for j, x := range randoms {
			v := x.from.Example(int(seed) + i*len(randoms) + j)
			args = append(args, v)
			s := asWritten(x.typ, v)
			wrote[j].ids, wrote[j].texts = append(wrote[j].ids, int32(id)), append(wrote[j].texts, &s)
		}
		r.on(r.a, "INSERT INTO t (id, "+strings.Join(names, ", ")+") VALUES (?"+strings.Repeat(", ?", len(names))+")", args...)
	}
	r.settle()
	r.clean()
	r.agree("random values")
	for j, x := range randoms {
		rows, err := r.source.Query(r.ctx, fmt.Sprintf(`SELECT w.id, w.v, ROW(s.%[1]s)::text FROM unnest($1::int[], $2::text[]) AS w(id, v) LEFT JOIN random.t s ON s.id = w.id
			WHERE s.id IS NULL OR NOT (record_image_eq(ROW(s.%[1]s), ROW(w.v::%[2]s)) OR ROW(s.%[1]s)::text COLLATE "C" = ROW(w.v::%[2]s)::text COLLATE "C") LIMIT 3`, names[j], x.typ), wrote[j].ids, wrote[j].texts)
		r.must(err)
		var id int
		var was string
		var is *string
		_, err = pgx.ForEachRow(rows, []any{&id, &was, &is}, func() error {
			t.Errorf("row %d column %s (%s): the device wrote %s, the source has %s", id, names[j], x.typ, texts(row{&was}), texts(row{is}))
			return nil
		})
		r.must(err)
	}
	// And all of them beside an edit, of rows of every origin.
	r.at("CREATE SCHEMA before", "CREATE TABLE before.t AS SELECT * FROM random.t")
	r.on(r.b, "UPDATE t SET note = 'edited'")
	r.settle()
	r.clean()
	r.agree("edited beside random values")
	for j, name := range names {
		n := r.one(fmt.Sprintf("SELECT count(*)::text FROM random.t s JOIN before.t o USING (id) WHERE s.note = 'edited' AND record_image_eq(ROW(s.%[1]s), ROW(o.%[1]s))", schema.Quote(name)))
		if n != fmt.Sprint(3*rows) {
			t.Errorf("%s (%s): %s of %d values are what they were", name, randoms[j].typ, n, 3*rows)
		}
	}
}

// asWritten is the text of a bound value that PostgreSQL reads as the same value. SQLite's REAL columns have no minus zero.
func asWritten(typ string, v any) string {
	switch v := v.(type) {
	case int64:
		if typ == "boolean" {
			return strconv.FormatBool(v == 1)
		}
		return strconv.FormatInt(v, 10)
	case float64:
		if v == 0 {
			v = math.Abs(v)
		}
		return strconv.FormatFloat(v, 'g', -1, 64)
	case []byte:
		return `\x` + hex.EncodeToString(v)
	}
	return v.(string)
}
