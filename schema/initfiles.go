package schema

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// InitDefinitions writes a definitions file from the source's tables: each table that can be synced as a
// subscription of its own, in one set and one group, and each other as a comment with the reason and the remedy.
// What it returns can be used as it is; everybody then gets all rows. left names what a device does not get, tables
// and (as a warning) parts of them.
func InitDefinitions(ctx context.Context, source *pgx.Conn) (text string, left []Problem, err error) {
	found, problems, err := ReadTables(ctx, source, nil)
	if err != nil {
		return "", nil, err
	}
	var tables []*Table
	for _, t := range found {
		if a, b := alike(t.Key); a != "" {
			problems = append(problems, Problem{Table: t.FullName(), Message: fmt.Sprintf("has the key columns %q and %q, which %s", a, b, inCaseOnly),
				Remedy: "rename one of them at the source"})
			continue
		}
		tables = append(tables, t)
	}
	var b strings.Builder
	b.WriteString(definitionsHead)
	names := map[string]string{} // subscription -> table
	var order []string
	if len(tables) == 0 {
		b.WriteString("subscriptions: {}\n")
	} else {
		b.WriteString("subscriptions:\n")
	}
	for _, t := range tables {
		name := subscriptionName(t, names)
		names[name] = t.FullName()
		order = append(order, name)
		left = append(left, writeSubscription(&b, name, t)...)
	}
	if len(problems) > 0 {
		b.WriteString("\n# Tables that cannot be synced as they are:\n")
		for _, p := range problems {
			fmt.Fprintf(&b, "#  %s %s\n#    %s\n", oneLine(p.Table), oneLine(p.Message), oneLine(p.Remedy))
		}
	}
	left = append(problems, left...)
	if len(order) == 0 {
		b.WriteString("\nsets: {}\n\ngroups: {}\n")
		return b.String(), left, nil
	}
	b.WriteString("\n# A set is synced in one session, in this order: parents before the tables that refer to them.\nsets:\n  all:\n")
	folded := map[string]string{}
	for _, name := range order {
		if other, taken := folded[fold(names[name])]; taken {
			fmt.Fprintf(&b, "    # - %s: its table and %s %s\n", name, oneLine(other), inCaseOnly)
			left = append(left, Problem{Table: names[name], Message: fmt.Sprintf("is in no set: it and %s %s", other, inCaseOnly),
				Remedy: "put it into a set of another group, or instead of the other one", Warning: true})
			continue
		}
		folded[fold(names[name])] = names[name]
		fmt.Fprintf(&b, "    - %s\n", name)
	}
	b.WriteString("\n# A group gives its members sets. Users are put into groups with `waystage users add NAME --group everybody`.\ngroups:\n  everybody: {sets: [all]}\n")
	return b.String(), left, nil
}

// inCaseOnly is what a device cannot hold beside each other.
const inCaseOnly = "differ in case only, which a device's SQLite does not tell apart"

// alike finds two names that a device does not tell apart; empty: there are none.
func alike(names []string) (a, b string) {
	folded := map[string]string{}
	for _, n := range names {
		if other, taken := folded[fold(n)]; taken {
			return other, n
		}
		folded[fold(n)] = n
	}
	return "", ""
}

const definitionsHead = `# What devices hold and may change. Written by waystage init from the tables of the source; edit it, then check it
# with ` + "`waystage check`" + `. The first start of waystage serve puts it in force; what you change later,
# ` + "`waystage subscriptions apply`" + ` does. Every key: docs/subscriptions.md.
version: 1

# A subscription is a part of one table:
#   table:     schema.table
#   columns:   [id, name]       leave it out for all columns; the primary key must be among them
#   key:       patient_id       the column that decides whose row it is; with rows
#   rows: |                     SQL for the key values that a user may see; without key and rows everybody gets all rows
#     select patient_id from public.assignment where nurse = :user and region = :user.region
#   direction: two-way          or download-only, upload-only
#   allow:     [insert, update, delete]
#   reject:    record           or transaction: what a device did in one transaction is accepted or rejected whole
# In rows, :user is the user's name and :user.x the user's attribute x, both text: cast where needed (:user::int).
# Write tables with their schema. A table that only a rows query needs must have a subscription, too, but need
# not be in a set.
`

// writeSubscription writes all of a table that a device can hold, and returns the columns that it cannot.
func writeSubscription(b *strings.Builder, name string, t *Table) (left []Problem) {
	fmt.Fprintf(b, "  %s:\n    table: %s\n", name, yamlText(t.FullName()))
	folded := map[string]string{}
	for _, k := range t.Key { // the key stays
		folded[fold(k)] = k
	}
	var cols []string
	for _, c := range t.Columns {
		if other, taken := folded[fold(c.Name)]; taken && other != c.Name {
			left = append(left, Problem{Table: t.FullName(), Message: fmt.Sprintf("the column %q is left out: it and %q %s", c.Name, other, inCaseOnly),
				Remedy: "rename one of them at the source to have both", Warning: true})
			continue
		}
		folded[fold(c.Name)] = c.Name
		cols = append(cols, yamlText(c.Name))
	}
	mark := "# "
	if len(left) > 0 {
		mark = ""
	}
	fmt.Fprintf(b, "    %scolumns: [%s]\n", mark, strings.Join(cols, ", "))
	for _, f := range t.Foreign {
		if len(f.Columns) == 1 {
			fmt.Fprintf(b, "    # key: %s   # refers to %s\n    # rows: select ... from ... where ... = :user\n", yamlText(f.Columns[0]), oneLine(f.Table))
			break
		}
	}
	b.WriteString("    direction: two-way\n    allow: [insert, update, delete]\n")
	return left
}

var notName = regexp.MustCompile(`[^a-z0-9_-]+`)

// subscriptionName is the table's name, with its schema where that is not public or the name is taken.
func subscriptionName(t *Table, taken map[string]string) string {
	clean := func(s string) string {
		return strings.Trim(notName.ReplaceAllString(strings.ToLower(s), "_"), "_")
	}
	name := clean(t.Name)
	if t.Schema != "public" {
		name = clean(t.Schema) + "_" + name
	}
	if name == "" {
		name = "table"
	}
	name = name[:min(len(name), 56)]
	for i := 2; ; i++ {
		if _, ok := taken[name]; !ok {
			return name
		}
		base, _, _ := strings.Cut(name, "--")
		name = fmt.Sprintf("%s--%d", base, i)
	}
}

var plainYAML = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)

// words that YAML takes for something else than a text.
var yamlWords = []string{"null", "true", "false", "yes", "no", "on", "off", "y", "n"}

// yamlText writes a text so that YAML reads exactly it, on one line.
func yamlText(s string) string {
	if plainYAML.MatchString(s) && !slices.Contains(yamlWords, strings.ToLower(s)) {
		return s
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < 0x20 || r == 0x7f || r == 0x85 || r == 0x2028 || r == 0x2029 || r == 0xfeff:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// oneLine keeps a comment a comment.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f || r == 0x85 || r == 0x2028 || r == 0x2029 {
			return ' '
		}
		return r
	}, s)
}
