package types

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/schema"
)

// TestEveryType sends every value of every family over every way.
func TestEveryType(t *testing.T) {
	major, err := pgtest.Major()
	if err != nil {
		t.Fatal(err)
	}
	setup := append(slices.Clone(owned), "CREATE SCHEMA families")
	var later []string
	names := slices.Sorted(maps.Keys(families))
	for _, f := range names {
		create, insert := ofFamily(f, major)
		setup = append(setup, create)
		setup = append(setup, insert(1)...)
		later = append(later, insert(101)...)
	}
	r := newRig(t, setup, "rig", "families")
	r.settle()
	r.agree("copied")

	// The stream.
	r.at(later...)
	r.settle()
	r.agree("streamed")

	// An application copies all rows, and edits another column of the others.
	r.at("CREATE SCHEMA before")
	for _, f := range names {
		r.at(fmt.Sprintf("CREATE TABLE before.%[1]s AS SELECT * FROM families.%[1]s", f))
		r.on(r.a, fmt.Sprintf("INSERT INTO %s SELECT id + 1000, note, %s FROM %[1]s WHERE id < 100", f, r.values(f)))
		r.on(r.a, fmt.Sprintf("UPDATE %s SET note = 'edited' WHERE id BETWEEN 101 AND 200", f))
	}
	r.settle()
	r.clean()
	r.agree("inserted by a device")
	for _, f := range names {
		t.Run("kept/"+f, func(t *testing.T) {
			cols := strings.Split(r.values(f), ", ")
			for _, c := range cols {
				n := r.one(fmt.Sprintf("SELECT count(*)::text FROM families.%[1]s s JOIN before.%[1]s o ON o.id = s.id WHERE NOT record_image_eq(ROW(s.%[2]s), ROW(o.%[2]s))", f, c))
				if n != "0" {
					t.Errorf("%s.%s: %s values beside an edited one are other bytes now", f, c, n)
				}
				n = r.one(fmt.Sprintf(`SELECT count(*)::text FROM families.%[1]s s JOIN families.%[1]s o ON o.id = s.id - 1000 WHERE s.id BETWEEN 1001 AND 1100 AND
					NOT (record_image_eq(ROW(s.%[2]s), ROW(o.%[2]s)) OR ROW(s.%[2]s)::text COLLATE "C" = ROW(o.%[2]s)::text COLLATE "C")`, f, c))
				if n != "0" {
					t.Errorf("%s.%s: %s values are not what the device copied", f, c, n)
				}
			}
			if n := r.one(fmt.Sprintf("SELECT count(*)::text FROM families.%s WHERE note = 'edited'", f)); n == "0" {
				t.Errorf("%s: no edit arrived", f)
			}
		})
	}

	// The source edits another column: out-of-line values are not in the log then. The other device deletes and overwrites.
	for _, f := range names {
		r.at(fmt.Sprintf("UPDATE families.%s SET note = 'at the source' WHERE id < 100", f))
		var sets []string
		for _, c := range strings.Split(r.values(f), ", ") {
			sets = append(sets, fmt.Sprintf("%s = (SELECT o.%[1]s FROM %s o WHERE o.id = %[2]s.id - 999)", c, f))
		}
		r.on(r.b, fmt.Sprintf("UPDATE %s SET %s WHERE id BETWEEN 1001 AND 1100 AND id < (SELECT max(id) FROM %[1]s)", f, strings.Join(sets, ", ")))
		r.on(r.b, fmt.Sprintf("DELETE FROM %s WHERE id BETWEEN 105 AND 200", f))
	}
	r.settle()
	r.clean()
	r.agree("overwritten by the other device")
	for _, f := range names {
		for _, c := range strings.Split(r.values(f), ", ") {
			n := r.one(fmt.Sprintf(`SELECT count(*)::text FROM families.%[1]s s JOIN families.%[1]s o ON o.id = s.id - 999 WHERE s.id BETWEEN 1001 AND 1100 AND
				s.id < (SELECT max(id) FROM families.%[1]s) AND NOT ROW(s.%[2]s)::text COLLATE "C" = ROW(o.%[2]s)::text COLLATE "C"`, f, c))
			if n != "0" {
				t.Errorf("%s.%s: %s values are not what the device wrote", f, c, n)
			}
		}
	}

	// A label is new at the source; and what does not fit is rejected alone, in the database's words.
	r.at("ALTER TYPE own.mood ADD VALUE 'brand new' BEFORE 'sad'", "INSERT INTO families.owned (id, c00) VALUES (2001, 'brand new')")
	r.on(r.a, "INSERT INTO owned (id, c00) VALUES (2002, 'brand new')")
	bad := []struct{ table, typ, value string }{
		{"owned", "own.mood", "no label"}, {"owned", "integer", "-1"}, {"owned", "own.pair", "(1"}, {"owned", "public.ltree", "a..b"}, {"numbers", "smallint", "40000"}, {"numbers", "numeric(12,2)", "10000000000"},
		{"numbers", "boolean", "2"}, {"numbers", "double precision", "1.5 or so"}, {"texts", "json", "{"}, {"texts", "uuid", "x"}, {"texts", "character varying(5)", "too long"},
		{"texts", "xml", "<a>"}, {"texts", "bit(3)", "1"}, {"times", "date", "2026-02-30"}, {"times", "timestamp with time zone", "yesterday-ish"}, {"ranges", "int4range", "[5,1)"},
		{"arrays", "integer[]", "{1,x}"}, {"places", "inet", "1.2.3.400"},
	}
	for i, x := range bad {
		r.on(r.b, fmt.Sprintf("INSERT INTO %s (id, %s) VALUES (?, ?)", x.table, r.column(x.table, x.typ)), 3000+i, x.value)
	}
	r.settle()
	r.agree("values that do not fit")
	if n := r.one("SELECT count(*)::text FROM families.owned WHERE c00 = 'brand new'"); n != "2" {
		t.Errorf("%s rows have the new label", n)
	}
	rejects, err := r.b.Rejects(r.ctx)
	r.must(err)
	found := map[string]bool{}
	for _, x := range rejects {
		found[texts(x.Key)] = true
		if x.Code == "" || x.Detail == "" {
			t.Errorf("%s %s is rejected without a reason", x.Table, texts(x.Key))
		}
	}
	for i, x := range bad {
		if !found[fmt.Sprintf("(%q)", fmt.Sprint(3000+i))] {
			t.Errorf("%s took %q", x.typ, x.value)
		}
	}
	if len(rejects) != len(bad) {
		t.Errorf("%d records were rejected, not %d", len(rejects), len(bad))
	}
}

// column is the first column of a type in a family's table.
func (r *rig) column(family, typ string) string {
	for _, t := range r.tables {
		for _, c := range t.Columns[1:] {
			if t.Name == family && c.Type == typ {
				return schema.Quote(c.Name)
			}
		}
	}
	r.t.Fatalf("table %s has no column of type %s", family, typ)
	return ""
}

// values lists the columns of a family's table.
func (r *rig) values(family string) string {
	for _, t := range r.tables {
		if t.Name == family {
			var l []string
			for _, c := range t.Columns[2:] {
				l = append(l, schema.Quote(c.Name))
			}
			return strings.Join(l, ", ")
		}
	}
	r.t.Fatalf("no table %s", family)
	return ""
}
