package device

import (
	"context"
	"fmt"
	"math"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/protocol"
)

// canonical are values as PostgreSQL prints them, by type; each must come back from SQLite letter for letter.
var canonical = map[string][]string{
	"smallint":                    {"0", "-32768", "32767"},
	"integer":                     {"0", "-1", "2147483647"},
	"bigint":                      {"9223372036854775807", "-9223372036854775808", "9007199254740993"},
	"boolean":                     {"t", "f"},
	"double precision":            {"0", "-0", "1", "-1.5", "0.1", "1e+15", "100000000000000", "1e-05", "0.0001", "5e-324", "1.7976931348623157e+308", "NaN", "Infinity", "-Infinity", "123456.789", "9.999999999999999e+22", "-8.409999999999999e+21", "9.007199254740992e+15"},
	"real":                        {"0", "0.1", "1e+06", "999999", "3.4028235e+38", "1e-45", "NaN", "Infinity", "-Infinity", "1.1", "-0"},
	"bytea":                       {`\x`, `\x00`, `\x00ff7f80`, `\xdeadbeef`},
	"numeric(12,2)":               {"0.00", "12.50", "-0.01", "9999999999.99"},
	"numeric":                     {"NaN", "Infinity", "0.000000000000000000000000001", "123456789012345678901234567890", "1.0", "1.00"},
	"text":                        {"", " ", "späť", "日本語 🚑", "line\nbreak\ttab", "0", "007", "1e3", "t", `\x41`, "null", `'"; drop table`, "e\u0301"},
	"character varying(10)":       {"abc", "12"},
	"character(3)":                {"a  "},
	"date":                        {"2026-11-22", "infinity", "-infinity", "0044-03-15 BC"},
	"timestamp without time zone": {"2026-11-22 20:15:00.123456", "infinity"},
	"timestamp with time zone":    {"2026-11-22 20:15:00+00", "2026-11-22 20:15:00.5+00"},
	"time without time zone":      {"24:00:00"},
	"interval":                    {"1 year 2 mons -3 days +04:05:06.7"},
	"uuid":                        {"3b1e9c6a-58f4-4c0e-9d6b-2f60b1a4c7aa"},
	"json":                        {`{"a": 1,  "a": 2}`},
	"jsonb":                       {`{"a": [1, null, "x"]}`, "1", "null"},
	"integer[]":                   {"{}", "{1,NULL,3}", "{{1,2},{3,4}}"},
	"text[]":                      {`{"a b","c\"d",NULL,"NULL"}`},
	"inet":                        {"10.0.0.1/8"},
	"point":                       {"(1,2)"},
	"int4range":                   {"[1,5)"},
	"oid":                         {"4294967295"},
	"money":                       {"$1.00"},
	"xml":                         {"<a/>"},
	"bit(3)":                      {"101"},
	"\"char\"":                    {"x"},
	"name":                        {"n"},
}

// TestValuesRoundTrip sends every value down into SQLite, where an application could read it, and up again.
func TestValuesRoundTrip(t *testing.T) {
	ctx := context.Background()
	d, err := Open(ctx, filepath.Join(t.TempDir(), "v.db"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	n := 0
	for typ, values := range canonical {
		n++
		wire := fmt.Sprintf("public.t%d", n)
		err := d.write(ctx, func(tx *txn) error {
			tab, err := tx.define1(protocol.Table{Name: wire, Key: []string{"v"}, Columns: []protocol.Column{{Name: "v", Type: typ, NotNull: true}, {Name: "w", Type: typ, Default: values[len(values)-1]}}})
			if err != nil {
				return err
			}
			odd := []string{"not of the type", ""}
			if typ == "bytea" {
				odd = nil
			}
			for _, s := range append(odd, values...) {
				v := fromWire(tab.Cols[0].kind, &s)
				if err := tx.put(tab, []int{0, 1}, []any{v, nil}); err != nil {
					return err
				}
				row, err := tx.live(tab, []any{v})
				if err != nil || row == nil {
					return fmt.Errorf("%s %q: no row by its own key: %w", typ, s, err)
				}
				if got := toWire(tab.Cols[0].kind, row[0]); *got != s {
					t.Errorf("%s: %q came back as %q (SQLite holds %T %v)", typ, s, *got, row[0], row[0])
				}
				if toWire(tab.Cols[1].kind, row[1]) != nil {
					t.Errorf("%s: null came back as %v", typ, row[1])
				}
				// What was read can be written again.
				if err := tx.put(tab, []int{0, 1}, []any{row[0], row[0]}); err != nil {
					return err
				}
				row, err = tx.live(tab, row[:1])
				if err != nil || row == nil {
					return fmt.Errorf("%s %q: no row by its key as it was read: %w", typ, s, err)
				}
				if got := toWire(tab.Cols[1].kind, row[1]); got == nil || *got != s {
					t.Errorf("%s: %q was read and written, and is %v", typ, s, row[1])
				}
				if err := tx.remove(tab, row[:1]); err != nil {
					return err
				}
			}
			// The default is the same value.
			if err := tx.exec("INSERT INTO "+quote(tab.Local)+" (v) VALUES (?)", fromWire(tab.Cols[0].kind, &values[0])); err != nil {
				return err
			}
			row, err := tx.live(tab, []any{fromWire(tab.Cols[0].kind, &values[0])})
			if err != nil {
				return err
			}
			if got := toWire(tab.Cols[1].kind, row[1]); values[len(values)-1] != "" && (got == nil || *got != values[len(values)-1]) {
				t.Errorf("%s: the default %q is %v", typ, values[len(values)-1], row[1])
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", typ, err)
		}
	}
}

// TestValuesAsApplicationsWrite: what an application may store, as the server gets it.
func TestValuesAsApplicationsWrite(t *testing.T) {
	for _, c := range []struct {
		k    kind
		v    any
		want string
	}{
		{kindInt, int64(7), "7"}, {kindInt, 1.5, "1.5"}, {kindInt, "abc", "abc"}, {kindInt, []byte("x"), "x"},
		{kindBool, int64(1), "t"}, {kindBool, int64(0), "f"}, {kindBool, int64(2), "2"}, {kindBool, "true", "true"}, {kindBool, true, "t"},
		{kindFloat, int64(3), "3"}, {kindFloat, math.Inf(1), "Infinity"}, {kindFloat, math.NaN(), "NaN"}, {kindFloat, 1e6, "1000000"}, {kindFloat4, 1e6, "1e+06"},
		{kindBlob, []byte{}, `\x`}, {kindBlob, "AB", `\x4142`}, {kindBlob, int64(5), "5"},
		{kindText, []byte("späť"), "späť"}, {kindText, int64(12), "12"}, {kindText, 12.5, "12.5"},
	} {
		if got := toWire(c.k, c.v); got == nil || *got != c.want {
			t.Errorf("%v %T %v: %v, want %s", c.k, c.v, c.v, got, c.want)
		}
	}
}

// TestValuesStable: whatever text comes, it goes back letter for letter.
func TestValuesStable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := kind(rapid.IntRange(int(kindText), int(kindBlob)).Draw(t, "kind"))
		s := rapid.OneOf(rapid.String(), rapid.StringMatching(`-?[0-9.e+x\\-]{0,12}`), rapid.Custom(func(t *rapid.T) string {
			return formatFloat(rapid.Float64().Draw(t, "f"), rapid.Bool().Draw(t, "single"))
		})).Draw(t, "text")
		if got := toWire(k, fromWire(k, &s)); *got != s && !(k == kindBlob && fromWire(k, &s) == any(s)) {
			t.Fatalf("%v: %q became %q", k, s, *got)
		}
	})
}
