package schema

import (
	"slices"
	"testing"
)

// TestSetsFor: a user's sets come by priority, then as groups and sets were written, each once; a priority below that of others goes last.
func TestSetsFor(t *testing.T) {
	d, problems := ParseDefinitions("test.yaml", []byte(`
version: 1
subscriptions: {a: {table: s.a}, b: {table: s.b}, c: {table: s.c}, d: {table: s.d}}
sets:
  one: [a]
  two: {subscriptions: [b], priority: 10}
  three: {subscriptions: [c], priority: -1}
  four: {subscriptions: [d], priority: 0}
groups:
  g: {sets: [three, one, two]}
  h: {sets: [four, one]}
`))
	if d == nil {
		t.Fatal(problems)
	}
	for _, c := range []struct{ groups, want []string }{
		{[]string{"g", "h"}, []string{"two", "one", "four", "three"}},
		{[]string{"h", "g"}, []string{"two", "four", "one", "three"}},
		{[]string{"h"}, []string{"four", "one"}},
		{[]string{"nobody"}, nil},
	} {
		if got := d.SetsFor(c.groups); !slices.Equal(got, c.want) {
			t.Errorf("%v: %v, not %v", c.groups, got, c.want)
		}
	}
}
