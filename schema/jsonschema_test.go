package schema

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"

	"github.com/waystage/waystage/internal/nurse"
)

// TestJSONSchema holds the published schema and the parser together: what is wrong in form both refuse, what is right both take, and
// both know the same keys and words.
func TestJSONSchema(t *testing.T) {
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(JSONSchema()))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("definitions.schema.json", doc); err != nil {
		t.Fatal(err)
	}
	published, err := c.Compile("definitions.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	verdicts := func(body string) (bySchema, byParser error) {
		t.Helper()
		var v any
		if err := yaml.Unmarshal([]byte(body), &v); err != nil {
			t.Fatalf("%s: %v", body, err)
		}
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatalf("%s: %v", body, err)
		}
		value, err := jsonschema.UnmarshalJSON(strings.NewReader(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		_, problems := ParseDefinitions("test.yaml", []byte(body))
		_, byParser = Refusing(problems)
		return published.Validate(value), byParser
	}
	with := func(setting string) string {
		return "version: 1\nsubscriptions:\n  s:\n    table: public.t\n" + setting
	}
	right := []string{good, nurse.Definitions(), "version: 1\n", "version: 1\nsubscriptions:\nsets:\ngroups:\n",
		"version: 1\nsubscriptions: {a: {table: a.b}}\nsets: {s: {subscriptions: [a]}}\n", "version: 1\nsubscriptions: {a: {table: a.b}}\nsets: {s: {subscriptions: [a], priority: -5}}\n",
		"version: 1\nsubscriptions: {a: {table: a.b}}\nsets: {s: {subscriptions: [a], between: ['22:00-06:00', '12:30 - 13:00'], zone: Europe/Berlin}}\n",
		"version: 1\ngroups: {g: {bandwidth: 64KiB}}\n", "version: 1\ngroups: {g: {sets: [], bandwidth: 8192}}\n"}
	for _, s := range []string{"", "    columns: [a, b]\n", "    key: k\n    rows: SELECT 1\n", "    direction: two-way\n", "    direction: upload-only\n", "    direction: download-only\n",
		"    direction: download-only\n    allow: []\n", "    direction: download-only\n    reject: record\n    conflict: reject\n",
		"    allow: [delete, insert, update]\n", "    allow: []\n", "    reject: record\n", "    reject: transaction\n",
		"    conflict: reject\n", "    conflict: columns\n", "    conflict: last-writer\n", "    conflict: source\n", "    conflict: {function: a.b}\n"} {
		right = append(right, with(s))
	}
	file := func(settings string) string { return "version: 1\nfiles:\n  f:\n" + settings }
	for _, s := range []string{"    path: manuals/**\n", "    path: p/{key}/*\n    rows: SELECT 1\n", "    path: p/**\n    upload: true\n    max_size: 10MiB\n", "    path: p/**\n    upload: true\n    max_size: 4096\n"} {
		right = append(right, file(s))
	}
	right = append(right, with("    file_column: photo\n"), with("    file_column: photo\n    file: before\n"), "version: 1\nfiles:\n")
	for _, body := range right {
		if s, p := verdicts(body); s != nil || p != nil {
			t.Errorf("%s\nthe schema says %v\nthe parser says %v", body, s, p)
		}
	}
	wrong := []string{"[]", "{}", "version: 2\n", "version: 1\nmore: 1\n", "version: 1\nsubscriptions: []\n", "version: 1\nsubscriptions: {s: {}}\n", "version: 1\nsubscriptions: {S: {table: a.b}}\n",
		"version: 1\nsets: {s: []}\n", "version: 1\nsets: {s: x}\n", "version: 1\nsets: {s: {}}\n", "version: 1\nsets: {s: {subscriptions: []}}\n", "version: 1\nsets: {s: {priority: 1}}\n",
		"version: 1\nsubscriptions: {a: {table: a.b}}\nsets: {s: {subscriptions: [a], priority: high}}\n", "version: 1\nsubscriptions: {a: {table: a.b}}\nsets: {s: {subscriptions: [a], priority: 1001}}\n",
		"version: 1\nsubscriptions: {a: {table: a.b}}\nsets: {s: {subscriptions: [a], prio: 1}}\n",
		"version: 1\nsubscriptions: {a: {table: a.b}}\nsets: {s: {subscriptions: [a], between: []}}\n", "version: 1\nsubscriptions: {a: {table: a.b}}\nsets: {s: {subscriptions: [a], between: '22:00-06:00'}}\n",
		"version: 1\nsubscriptions: {a: {table: a.b}}\nsets: {s: {subscriptions: [a], between: ['24:00-06:00']}}\n", "version: 1\nsubscriptions: {a: {table: a.b}}\nsets: {s: {subscriptions: [a], zone: UTC}}\n",
		"version: 1\ngroups: {g: {bandwidth: fast}}\n", "version: 1\ngroups: {g: {bandwidth: -1}}\n", "version: 1\ngroups: {g: []}\n", "version: 1\ngroups: {g: {set: []}}\n", "version: 1\ngroups: {g: {sets: x}}\n"}
	for _, s := range []string{"    colums: [a]\n", "    columns: []\n", "    columns: a\n", "    columns: [a, a]\n", "    key: k\n", "    rows: SELECT 1\n", "    key: ''\n    rows: SELECT 1\n",
		"    direction: both\n", "    allow: [upsert]\n", "    allow: insert\n", "    allow: [insert, insert]\n", "    direction: download-only\n    allow: [insert]\n",
		"    direction: download-only\n    reject: transaction\n", "    direction: download-only\n    conflict: source\n", "    reject: all\n", "    conflict: newest\n",
		"    conflict: function\n", "    conflict: {}\n", "    conflict: {function: f}\n", "    conflict: {function: a.b, more: 1}\n"} {
		wrong = append(wrong, with(s))
	}
	for _, s := range []string{"    {}\n", "    path: ''\n", "    path: p/{key}/*\n", "    path: p/*\n    rows: SELECT 1\n", "    path: p/*\n    max_size: 1MiB\n", "    path: p/*\n    upload: perhaps\n",
		"    path: p/*\n    upload: true\n    max_size: big\n", "    path: p/*\n    key: x\n"} {
		wrong = append(wrong, file(s))
	}
	wrong = append(wrong, with("    file: before\n"), with("    file_column: photo\n    file: after\n"), "version: 1\nfiles: []\n")
	for _, body := range wrong {
		if s, p := verdicts(body); s == nil || p == nil {
			t.Errorf("%s\nthe schema says %v\nthe parser says %v", body, s, p)
		}
	}
	root := doc.(map[string]any)
	at := func(path ...string) map[string]any {
		v := root
		for _, p := range path {
			v = v[p].(map[string]any)
		}
		return v
	}
	same := func(what string, m map[string]any, want []string) {
		t.Helper()
		var got []string
		for k := range m {
			got = append(got, k)
		}
		slices.Sort(got)
		if want := slices.Sorted(slices.Values(want)); !slices.Equal(got, want) {
			t.Errorf("%s: the schema has %q, the parser %q", what, got, want)
		}
	}
	same("file", at("properties"), fileKeys)
	same("subscription", at("$defs", "subscription", "properties"), subscriptionKeys)
	same("file subscription", at("$defs", "file", "properties"), fileSubscriptionKeys)
	set := at("properties", "sets", "additionalProperties")["oneOf"].([]any)[1].(map[string]any)
	same("set", set["properties"].(map[string]any), setKeys)
	same("group", at("properties", "groups", "additionalProperties", "properties"), groupKeys)
}
