package cmd

import (
	"fmt"
	"io"
	"reflect"
	"sort"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

func newConfig(a *app) *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Show and check the configuration"}
	var f format
	show := &cobra.Command{Use: "print", Short: "Print every value and where it comes from; secrets are hidden", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			conf, err := load(a.terminal, a.file, a.set)
			if err != nil {
				return err
			}
			return printRows(a.out, f, conf.values(), []column[configValue]{
				{"key", func(v configValue) string { return v.Key }},
				{"value", func(v configValue) string { return v.Value }},
				{"from", func(v configValue) string { return v.From }},
			})
		}}
	withOutput(show, &f)
	check := &cobra.Command{Use: "check", Short: "Check the configuration without connecting anywhere", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			conf, err := a.config()
			if err != nil {
				return err
			}
			for _, name := range a.strayVariables() {
				a.say("warning: $%s sets no key of the configuration", name)
			}
			from := conf.file
			if from == "" {
				from = "(no file)"
			}
			a.say("%s is in order", from)
			return nil
		}}
	reference := &cobra.Command{Use: "reference", Short: "Print a configuration file with every key, its meaning and its default", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return writeReference(a.out, nil) }}
	c.AddCommand(show, check, reference)
	return c
}

// configValue is one line of config print.
type configValue struct {
	Key   string `json:"key"`
	Value string `json:"value"`
	From  string `json:"from"` // default, file, environment or flag
}

// values lists the configuration with secrets hidden.
func (c *Config) values() []configValue {
	var out []configValue
	for _, k := range keys() {
		v := reflect.ValueOf(c).Elem().FieldByIndex(k.field)
		text := fmt.Sprint(v.Interface())
		if v.Kind() == reflect.Slice {
			text = strings.Join(v.Interface().([]string), ",")
		}
		if k.secret {
			text = redactDSN(text)
		}
		out = append(out, configValue{Key: k.path, Value: text, From: c.origins[k.path]})
	}
	return out
}

// strayVariables lists WAYSTAGE_ variables that mean nothing: misspelt ones, mostly.
func (t *terminal) strayVariables() []string {
	known := map[string]bool{"WAYSTAGE_CONFIG": true}
	for _, k := range keys() {
		known[envName(k.path)] = true
	}
	var out []string
	for _, e := range t.env {
		if name, _, _ := strings.Cut(e, "="); strings.HasPrefix(name, "WAYSTAGE_") && !known[name] {
			out = append(out, name)
		}
	}
	sort.Strings(out)
	return out
}

// writeReference writes a configuration file with every key and its comment. Keys in set are written with that value,
// the others commented out with their default.
func writeReference(w io.Writer, set map[string]string) error {
	defaults := Defaults()
	var b strings.Builder
	b.WriteString("# Waystage configuration. Values: flags (--set key=value) over environment (WAYSTAGE_SOURCE_DSN ...) over this\n" +
		"# file over defaults. What is commented out shows the default. Durations: 90s, 12h, 30d; sizes: 256KiB, 64MiB, 1GiB.\n")
	var walk func(t reflect.Type, v reflect.Value, prefix, indent string) error
	walk = func(t reflect.Type, v reflect.Value, prefix, indent string) error {
		for f := range fieldsOf(t) {
			name, at := f.Tag.Get("koanf"), v.FieldByIndex(f.Index)
			if indent == "" {
				b.WriteString("\n")
			}
			wrap(&b, indent+"# ", f.Tag.Get("doc"), 118)
			if f.Type.Kind() == reflect.Struct {
				fmt.Fprintf(&b, "%s%s:\n", indent, name)
				if err := walk(f.Type, at, prefix+name+".", indent+"  "); err != nil {
					return err
				}
				continue
			}
			value, given := set[prefix+name]
			var text string
			var err error
			if given {
				text, err = scalar(value)
			} else {
				text, err = scalar(at.Interface())
			}
			if err != nil {
				return err
			}
			mark := "# "
			if given {
				mark = ""
			}
			fmt.Fprintf(&b, "%s%s%s: %s\n", indent, mark, name, text)
		}
		return nil
	}
	if err := walk(reflect.TypeFor[Config](), reflect.ValueOf(defaults), "", ""); err != nil {
		return err
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// scalar writes one value as YAML on one line.
func scalar(v any) (string, error) {
	if s, ok := v.([]string); ok {
		return "[" + strings.Join(s, ", ") + "]", nil
	}
	b, err := yaml.Marshal(v)
	return strings.TrimSpace(string(b)), err
}

// wrap writes words in lines of at most width, each with the prefix.
func wrap(b *strings.Builder, prefix, text string, width int) {
	line := prefix
	for _, w := range strings.Fields(text) {
		if len(line)+len(w) > width && line != prefix {
			b.WriteString(strings.TrimRight(line, " ") + "\n")
			line = prefix
		}
		line += w + " "
	}
	b.WriteString(strings.TrimRight(line, " ") + "\n")
}
