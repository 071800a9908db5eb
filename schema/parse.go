package schema

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/waystage/waystage/internal/hours"
)

// DefinitionsVersion is the version of the definitions file that this program reads.
const DefinitionsVersion = 1

const maxDefinitions = 4 << 20 // bytes

// The keys of a definitions file; definitions.schema.json has the same.
var (
	fileKeys         = []string{"version", "subscriptions", "files", "sets", "groups"}
	subscriptionKeys = []string{"table", "columns", "key", "rows", "direction", "allow", "reject", "conflict", "file_column", "file"}
	setKeys          = []string{"subscriptions", "priority", "between", "zone"}
	groupKeys        = []string{"sets", "bandwidth"}
)

var defName = regexp.MustCompile(`^[a-z0-9_-]{1,64}$`)

// ParseDefinitions reads a definitions file. file is its name for messages. It is strict: an unknown or doubled setting is
// a problem with its place. With a problem that is not a warning the definitions are nil.
func ParseDefinitions(file string, body []byte) (*Definitions, []Problem) {
	p := &parser{file: file, d: &Definitions{File: file, Body: string(body)}}
	p.document(body)
	if _, err := Refusing(p.problems); err != nil {
		return nil, p.problems
	}
	return p.d, p.problems
}

type parser struct {
	file     string
	d        *Definitions
	problems []Problem
}

func (p *parser) bad(n *yaml.Node, message, remedy string) {
	p.problems = append(p.problems, Problem{File: p.file, Line: max(n.Line, 1), Column: max(n.Column, 1), Message: message, Remedy: remedy})
}

func at(n *yaml.Node) place { return place{n.Line, n.Column} }

var yamlLine = regexp.MustCompile(`line (\d+)`)

func (p *parser) document(body []byte) {
	if len(body) > maxDefinitions {
		p.bad(&yaml.Node{}, fmt.Sprintf("the file has %d bytes, more than %d", len(body), maxDefinitions), "shorten it")
		return
	}
	dec := yaml.NewDecoder(bytes.NewReader(body))
	var doc, more yaml.Node
	err := dec.Decode(&doc)
	if err == nil {
		if err = dec.Decode(&more); err == nil {
			p.bad(&more, "a second document", "write everything in one, without ---")
			return
		}
	} else if errors.Is(err, io.EOF) {
		p.bad(&yaml.Node{}, "the file is empty", "waystage init writes a beginning")
		return
	}
	if !errors.Is(err, io.EOF) {
		n := &yaml.Node{}
		if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
			n.Line, _ = strconv.Atoi(m[1])
		}
		p.bad(n, "not YAML: "+strings.TrimPrefix(err.Error(), "yaml: "), "mind indentation, colons and quotes")
		return
	}
	if len(doc.Content) == 0 {
		p.bad(&doc, "the file is empty", "waystage init writes a beginning")
		return
	}
	var version bool
	p.mapping(doc.Content[0], "the file", fileKeys, func(key string, k, v *yaml.Node) {
		switch key {
		case "version":
			version = true
			if n, err := strconv.Atoi(v.Value); v.Kind != yaml.ScalarNode || err != nil || n != DefinitionsVersion {
				p.bad(v, fmt.Sprintf("version %s is not known", v.Value), fmt.Sprintf("this program reads version %d", DefinitionsVersion))
			}
		case "subscriptions":
			p.named(v, "subscription", func(name string, k, v *yaml.Node) { p.subscription(name, k, v) })
		case "files":
			p.named(v, "file subscription", p.fileSubscription)
		case "sets":
			p.named(v, "set", func(name string, k, v *yaml.Node) {
				p.set(name, k, v)
			})
		case "groups":
			p.named(v, "group", func(name string, k, v *yaml.Node) { p.group(name, k, v) })
		}
	})
	if !version && len(p.problems) == 0 {
		p.bad(doc.Content[0], "version is missing", fmt.Sprintf("begin the file with version: %d", DefinitionsVersion))
	}
	p.references()
}

// mapping walks a mapping with the given keys, all optional.
func (p *parser) mapping(n *yaml.Node, what string, known []string, fn func(key string, k, v *yaml.Node)) {
	n = resolve(n)
	if n.Kind != yaml.MappingNode {
		p.bad(n, fmt.Sprintf("%s must be a mapping (key: value)", what), "its keys are "+strings.Join(known, ", "))
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], resolve(n.Content[i+1])
		if first, ok := seen[k.Value]; ok {
			p.bad(k, fmt.Sprintf("%q is given twice", k.Value), fmt.Sprintf("the first is in line %d", first))
			continue
		}
		seen[k.Value] = k.Line
		if known != nil && (k.Kind != yaml.ScalarNode || !slices.Contains(known, k.Value)) {
			remedy := didYouMean(k.Value, known)
			if remedy == "" {
				remedy = "known here: " + strings.Join(known, ", ")
			}
			p.bad(k, fmt.Sprintf("unknown setting %q", k.Value), remedy)
			continue
		}
		fn(k.Value, k, v)
	}
}

// named walks a mapping whose keys are names.
func (p *parser) named(n *yaml.Node, what string, fn func(name string, k, v *yaml.Node)) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return
	}
	p.mapping(n, what+"s", nil, func(name string, k, v *yaml.Node) {
		if !defName.MatchString(name) {
			p.bad(k, fmt.Sprintf("%q cannot be the name of a %s", name, what), "use up to 64 of a-z, 0-9, _ and -")
			return
		}
		fn(name, k, v)
	})
}

// MostPriority bounds the priority of a set, either way.
const MostPriority = 1000

// set reads a set: a list of subscriptions, or a mapping with the list and settings.
func (p *parser) set(name string, k, v *yaml.Node) {
	s := Set{Name: name, place: at(k)}
	list := v
	var zone *yaml.Node
	if v.Kind == yaml.MappingNode {
		list = nil
		p.mapping(v, "a set", setKeys, func(key string, _, v *yaml.Node) {
			switch key {
			case "subscriptions":
				list = v
			case "priority":
				n, err := strconv.Atoi(v.Value)
				if v.Kind != yaml.ScalarNode || v.Tag != "!!int" || err != nil || n < -MostPriority || n > MostPriority {
					p.bad(v, fmt.Sprintf("priority is a number from %d to %d", -MostPriority, MostPriority), "a device syncs sets of a higher priority first; 0 is that of all others")
				}
				s.Priority = n
			case "between":
				p.between(&s, v)
			case "zone":
				zone = v
				s.Zone = p.scalar(v, "a time zone such as Europe/Berlin")
				var err error
				if s.clock, err = time.LoadLocation(s.Zone); err != nil || s.Zone == "Local" {
					p.bad(v, fmt.Sprintf("no time zone %q", s.Zone), "write a name of the time zone database, such as Europe/Berlin or UTC")
				}
			}
		})
		if zone != nil && len(s.Between) == 0 {
			p.bad(zone, "zone is whose clock between goes by, but between is not given", `add between: ["22:00-06:00"], or remove zone`)
		}
		if list == nil {
			p.bad(k, fmt.Sprintf("set %q has no subscriptions", name), "add subscriptions: [...]")
			return
		}
	}
	if s.Subscriptions, s.places = p.list(list, "a set is a list of subscriptions"); len(s.Subscriptions) == 0 && list.Kind == yaml.SequenceNode {
		p.bad(list, fmt.Sprintf("set %q is empty", name), "name at least one subscription")
	}
	p.d.Sets = append(p.d.Sets, s)
}

func (p *parser) group(name string, k, v *yaml.Node) {
	g := Group{Name: name, place: at(k)}
	p.mapping(v, "a group", groupKeys, func(key string, _, v *yaml.Node) {
		switch key {
		case "sets":
			g.Sets, g.places = p.list(v, "sets is a list of set names")
		case "bandwidth":
			n, err := ParseSize(v.Value)
			if v.Kind != yaml.ScalarNode || err != nil || n < minBandwidth || n > maxBandwidth {
				p.bad(v, fmt.Sprintf("bandwidth is %q", v.Value), "write bytes per second of each device, from 8KiB to 1GiB, such as 256KiB")
			}
			g.Bandwidth = n
		}
	})
	p.d.Groups = append(p.d.Groups, g)
}

// between reads the spans of the day in which devices may sync a set.
func (p *parser) between(s *Set, v *yaml.Node) {
	texts, _ := p.list(v, "between is a list of spans of the day")
	for i, text := range texts {
		span, err := hours.Parse(text)
		if err != nil {
			p.bad(resolve(v.Content[i]), err.Error(), "write from-to by the 24-hour clock; it may go over midnight: 22:00-06:00")
			continue
		}
		s.Between = append(s.Between, span)
	}
	if len(texts) == 0 && v.Kind == yaml.SequenceNode {
		p.bad(v, "between is empty", "leave it out to let the set be synced at any time")
	}
}

// The bandwidth of a group, in bytes per second.
const (
	minBandwidth = 8 << 10
	maxBandwidth = 1 << 30
)

func (p *parser) subscription(name string, k, v *yaml.Node) {
	s := &Subscription{Name: name, Direction: TwoWay, Allow: "IUD", Reject: RejectRecord, Conflict: ConflictReject, place: at(k), places: map[string]place{}}
	var allow, reject, policy, file *yaml.Node
	p.mapping(v, "a subscription", subscriptionKeys, func(key string, k, v *yaml.Node) {
		s.places[key] = at(v)
		switch key {
		case "table":
			s.Table = p.scalar(v, "the table's full name, schema.table")
		case "columns":
			s.Columns, s.columns = p.list(v, "columns is a list of column names")
			if len(s.Columns) == 0 && v.Kind == yaml.SequenceNode {
				p.bad(v, "columns is empty", "leave it out to subscribe to all columns")
			}
		case "key":
			s.Key = p.scalar(v, "the name of the column that decides whose row it is")
		case "rows":
			p.rowsQuery(s, v)
		case "direction":
			s.Direction = Direction(p.scalar(v, "two-way, download-only or upload-only"))
			all := []string{string(TwoWay), string(DownloadOnly), string(UploadOnly)}
			if !slices.Contains(all, string(s.Direction)) && v.Kind == yaml.ScalarNode {
				p.bad(v, fmt.Sprintf("unknown direction %q", s.Direction), "one of "+strings.Join(all, ", "))
			}
		case "allow":
			allow = v
			p.allow(s, v)
		case "reject":
			reject = v
			s.Reject = RejectUnit(p.scalar(v, "record or transaction"))
			if all := []string{string(RejectRecord), string(RejectTransaction)}; !slices.Contains(all, string(s.Reject)) && s.Reject != "" {
				p.bad(v, fmt.Sprintf("unknown reject unit %q", s.Reject), orElse(didYouMean(string(s.Reject), all), "one of "+strings.Join(all, ", ")))
			}
		case "conflict":
			policy = v
			p.conflict(s, v)
		case "file_column":
			s.FileColumn = p.scalar(v, "the name of the column that holds a file's path")
		case "file":
			file = v
			s.File = p.scalar(v, "any or before")
		}
	})
	if resolve(v).Kind != yaml.MappingNode {
		return
	}
	if s.Table == "" && s.places["table"].line == 0 {
		p.bad(k, fmt.Sprintf("subscription %q has no table", name), "add table: schema.table")
	}
	if (s.Key == "") != (s.Rows == "") {
		p.bad(k, fmt.Sprintf("subscription %q has only one of key and rows", name),
			"key names the column, rows the query for its values; leave both out to give everybody all rows")
	}
	if s.Direction == DownloadOnly {
		if allow != nil && s.Allow != "" {
			p.bad(allow, "a download-only subscription allows no uploads", "remove allow, or use direction: two-way")
		}
		s.Allow = ""
		if reject != nil && s.Reject == RejectTransaction {
			p.bad(reject, "a download-only subscription has no uploads to reject", "remove reject, or use direction: two-way")
		}
		if policy != nil && s.Conflict != ConflictReject {
			p.bad(policy, "a download-only subscription has no uploads that could conflict", "remove conflict, or use direction: two-way")
		}
	}
	p.fileRule(s, file)
	p.d.Subscriptions = append(p.d.Subscriptions, s)
}

// rowsQuery reads a query for key values.
func (p *parser) rowsQuery(s *Subscription, v *yaml.Node) {
	s.Rows = p.scalar(v, "an SQL query for the key values that a user may see")
	q, qe := parseRows(s.Rows)
	if qe != nil {
		at := p.inText(v, s.Rows, qe.offset)
		p.bad(&yaml.Node{Line: at.line, Column: at.column}, "rows: "+qe.message, qe.remedy)
	}
	s.rows = q
	s.places["rows"] = p.inText(v, s.Rows, 0)
}

var operations = map[string]string{"insert": "I", "update": "U", "delete": "D"}

func (p *parser) allow(s *Subscription, v *yaml.Node) {
	values, places := p.list(v, "allow is a list of insert, update, delete")
	given := map[string]bool{}
	for i, o := range values {
		code, ok := operations[o]
		if !ok {
			p.bad(&yaml.Node{Line: places[i].line, Column: places[i].column}, fmt.Sprintf("unknown operation %q", o), "one of insert, update, delete")
		}
		given[code] = true
	}
	s.Allow = ""
	for _, code := range []string{"I", "U", "D"} {
		if given[code] {
			s.Allow += code
		}
	}
}

func (p *parser) scalar(n *yaml.Node, what string) string {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || strings.TrimSpace(n.Value) == "" {
		p.bad(n, "a text is missing here", "write "+what)
		return ""
	}
	return n.Value
}

// list reads a sequence of texts, each at most once.
func (p *parser) list(n *yaml.Node, what string) (values []string, places []place) {
	if n.Kind != yaml.SequenceNode {
		p.bad(n, "a list is missing here", what+": [a, b, c]")
		return nil, nil
	}
	for _, item := range n.Content {
		item = resolve(item)
		v := p.scalar(item, "a name")
		if v == "" {
			continue
		}
		if slices.Contains(values, v) {
			p.bad(item, fmt.Sprintf("%q is given twice", v), "remove one")
			continue
		}
		values, places = append(values, v), append(places, at(item))
	}
	return values, places
}

func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode && n.Alias != nil {
		return n.Alias
	}
	return n
}

// references checks that names refer to something and that no group gets a table twice.
func (p *parser) references() {
	var subs, sets []string
	for _, s := range p.d.Subscriptions {
		subs = append(subs, s.Name)
	}
	for _, f := range p.d.Files {
		if s := p.d.subscription(f.Name); s != nil {
			p.badAt(f.place, fmt.Sprintf("%q is the name of a subscription, too", f.Name), "give the file subscription another name: sets name both kinds")
		}
		subs = append(subs, f.Name)
	}
	for _, s := range p.d.Sets {
		sets = append(sets, s.Name)
	}
	for _, s := range p.d.Sets {
		tables := map[string]string{}
		for i, name := range s.Subscriptions {
			sub := p.d.subscription(name)
			if sub == nil && p.d.file(name) != nil {
				continue
			}
			if sub == nil {
				p.badAt(s.places[i], fmt.Sprintf("no subscription %q", name), orElse(didYouMean(name, subs), "define it under subscriptions or files"))
				continue
			}
			if first, ok := tables[sub.Table]; ok {
				p.badAt(s.places[i], fmt.Sprintf("set %q has table %s twice, by %q and %q", s.Name, sub.Table, first, name), "keep one of them")
			}
			tables[sub.Table] = name
		}
	}
	for _, g := range p.d.Groups {
		tables := map[string]string{}
		for i, name := range g.Sets {
			if !slices.Contains(sets, name) {
				p.badAt(g.places[i], fmt.Sprintf("no set %q", name), orElse(didYouMean(name, sets), "define it under sets"))
			}
			for _, sub := range p.d.SubscriptionsOf(name) {
				if first, ok := tables[sub.Table]; ok && first != name {
					p.badAt(g.places[i], fmt.Sprintf("group %q gets table %s twice, by the sets %q and %q", g.Name, sub.Table, first, name),
						"a device keeps a table once: leave it out of one of the sets")
				}
				tables[sub.Table] = name
			}
		}
	}
}

func (p *parser) badAt(at place, message, remedy string) {
	p.bad(&yaml.Node{Line: at.line, Column: at.column}, message, remedy)
}

func orElse(s, other string) string {
	if s != "" {
		return s
	}
	return other
}

// inText is the place in the file of a byte offset in a scalar's value, as well as the style of the scalar allows.
func (p *parser) inText(n *yaml.Node, value string, offset int) place {
	return textPlace(p.d.Body, at(n), value, offset, n.Style)
}

func textPlace(body string, start place, value string, offset int, style yaml.Style) place {
	offset = min(max(offset, 0), len(value))
	before := value[:offset]
	line := strings.Count(before, "\n")
	column := len([]rune(before[strings.LastIndexByte(before, '\n')+1:]))
	lines := strings.Split(body, "\n")
	switch {
	case style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0 && start.line < len(lines):
		text := lines[start.line] // the line behind the |
		if style&yaml.FoldedStyle != 0 {
			line, column = 0, 0
		}
		return place{start.line + 1 + line, len(text) - len(strings.TrimLeft(text, " ")) + column + 1}
	case style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) != 0:
		return place{start.line, start.column + 1}
	case line == 0 && start.line <= len(lines) && start.line > 0 && strings.Contains(lines[start.line-1], value):
		return place{start.line, start.column + column}
	}
	return start
}
