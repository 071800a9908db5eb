package schema

import (
	"slices"
	"strings"
	"testing"
)

func TestParseRows(t *testing.T) {
	for sql, want := range map[string][]string{
		"select :user":                            {""},
		"select :user.region, :USER.Region":       {"region", "Region"},
		"select :user::int, a::text, b:=1":        {""},
		"select ':user', \":user\", $$:user$$":    nil,
		"select $a$ :user $$ ; $a$, :user.a":      {"a"},
		"select E'\\':user', :user.b":             {"b"},
		"select e'it''s \\\\', :user.c":           {"c"},
		"select 'it''s :user', :user.d":           {"d"},
		"select 1 -- :user ; '\n, :user.e":        {"e"},
		"select 1 /* /* ' */ :user ; */, :user.f": {"f"},
		"select a$1, b$$, :user.g":                {"g"},
		"select x[1 : 2], :user. from t":          {""},
		"select :user.ä":                          {"ä"},
		"select name'x', type'y', :user":          {""},
		"select ':user":                           {"!"},
		"select \":user":                          {"!"},
		"select /* :user":                         {"!"},
		"select $x$ :user":                        {"!"},
		"select (1":                               {"!"},
		"select 1)":                               {"!"},
		"select 1; drop table x":                  {"!"},
		"select :users":                           {"!"},
		"select x[1:n]":                           {"!"},
		"select $1":                               {"!"},
		"select \x00":                             {"!"},
	} {
		q, err := parseRows(sql)
		switch {
		case err != nil && (len(want) != 1 || want[0] != "!"):
			t.Errorf("%q: %s", sql, err.message)
		case err == nil && !slices.Equal(q.params, want):
			t.Errorf("%q: %q, want %q", sql, q.params, want)
		case err != nil && (err.offset < 0 || err.offset > len(sql) || err.remedy == ""):
			t.Errorf("%q: %+v", sql, err)
		}
	}
}

// Whatever is written, what is not a parameter comes out as it went in, and places map back.
func FuzzParseRows(f *testing.F) {
	f.Add("select :user.a from t where x = ':user' and y = $$ $$ -- :user")
	f.Add("e'\\'':user")
	f.Add("$a$:user$a$:user")
	f.Add("/*/**/:user*/:user")
	f.Fuzz(func(t *testing.T, sql string) {
		q, err := parseRows(sql)
		if err != nil {
			return
		}
		if len(q.text) != len(q.params)+1 {
			t.Fatalf("%d pieces, %d parameters", len(q.text), len(q.params))
		}
		var back strings.Builder
		for i, p := range q.text {
			back.WriteString(p)
			if i < len(q.params) {
				back.WriteString(sql[q.at[i] : q.at[i]+q.length[i]])
			}
		}
		if back.String() != sql {
			t.Fatalf("%q came back as %q", sql, back.String())
		}
		out := q.render("U", "A")
		for i := range len(out) + 1 {
			if o := q.sourceOffset(i, "U", "A"); o < 0 || o > len(sql) {
				t.Fatalf("offset %d of %q maps to %d of %q", i, out, o, sql)
			}
		}
	})
}

func FuzzParseDefinitions(f *testing.F) {
	f.Add(good)
	f.Add("version: 1\nsubscriptions: {a: {table: x.y, rows: \"select :user\\n;\"}}\n")
	f.Add("a: &a [*a]\n")
	f.Add("subscriptions: {a: {rows: >\n")
	f.Fuzz(func(t *testing.T, body string) {
		d, problems := ParseDefinitions("f", []byte(body))
		if d == nil && len(problems) == 0 {
			t.Fatal("refused without a problem")
		}
		for _, p := range problems {
			if p.Line < 1 || p.Column < 1 || p.Message == "" || p.Remedy == "" {
				t.Fatalf("%+v", p)
			}
		}
		if d != nil {
			d.Check(nil)
			d.Wire("a", nil)
		}
	})
}
