package schema

import (
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/waystage/waystage/protocol"
)

// FileSubscription says which files a device holds, by a pattern of their paths, and which it may change. Whose file one is
// decides the key in its path, like a row's key column.
type FileSubscription struct {
	Name    string
	Path    string // pattern, see protocol.ParsePattern
	Rows    string // SQL query for the keys that a user may see; given with {key} in Path, and only then
	Upload  bool   // devices may put and remove such files
	MaxSize int64  // of a file that a device puts, bytes

	Pattern *protocol.Pattern
	query   *Subscription // carries the rows query, so that both kinds of keys are evaluated by the same code
	place   place
	places  map[string]place
}

// File rules of a table subscription.
const (
	FileAny    = "any"    // rows come when they come
	FileBefore = "before" // a device applies a row when it has the file that the row names
)

// DefaultMaxSize of a file that a device puts, bytes.
const DefaultMaxSize = 64 << 20

var fileSubscriptionKeys = []string{"path", "rows", "upload", "max_size"}

// KeyQuery is [Subscription.KeyQuery] for the keys in the paths; empty for files that everybody gets who has the set.
func (f *FileSubscription) KeyQuery(userExpr, attrExpr string) string {
	if f.query == nil {
		return ""
	}
	return f.query.KeyQuery(userExpr, attrExpr)
}

// KeyOf is an SQL expression for the key in a path that the pattern matches.
func (f *FileSubscription) KeyOf(path string) string {
	return "pg_catalog.substring(" + path + ", " + Literal(f.Pattern.Regexp) + ")"
}

// Covers is an SQL condition: the pattern matches the path. path must be a column of collation "C", so that its index serves.
func (f *FileSubscription) Covers(path string) string {
	cond := path + " ~ " + Literal(f.Pattern.Regexp)
	if p := f.Pattern.Prefix; p != "" {
		cond = fmt.Sprintf("%s >= %s AND %s < %s AND %s", path, Literal(p), path, Literal(p+lastRune), cond)
	}
	return cond
}

// lastRune follows, in collation "C", everything that may follow in a path.
const lastRune = "\U0010ffff"

// FilesOf are a set's file subscriptions in order.
func (d *Definitions) FilesOf(set string) []*FileSubscription {
	var out []*FileSubscription
	for _, s := range d.Sets {
		if s.Name != set {
			continue
		}
		for _, name := range s.Subscriptions {
			if f := d.file(name); f != nil {
				out = append(out, f)
			}
		}
	}
	return out
}

// FilesFor are the file subscriptions of a member of these groups, each once, in sync order.
func (d *Definitions) FilesFor(groups []string) []*FileSubscription {
	var out []*FileSubscription
	for _, set := range d.SetsFor(groups) {
		for _, f := range d.FilesOf(set) {
			if !slices.Contains(out, f) {
				out = append(out, f)
			}
		}
	}
	return out
}

func (d *Definitions) file(name string) *FileSubscription {
	for _, f := range d.Files {
		if f.Name == name {
			return f
		}
	}
	return nil
}

// wireFiles describes a set's file subscriptions to a device.
func (d *Definitions) wireFiles(set string) []protocol.FileSubscription {
	var out []protocol.FileSubscription
	for _, f := range d.FilesOf(set) {
		w := protocol.FileSubscription{Name: f.Name, Path: f.Path, Upload: f.Upload}
		if f.Upload {
			w.MaxSize = f.MaxSize
		}
		out = append(out, w)
	}
	return out
}

// fileQueries are the rows queries of file subscriptions, for the checks that all rows queries get.
func (d *Definitions) fileQueries() []*Subscription {
	var out []*Subscription
	for _, f := range d.Files {
		if f.query != nil {
			out = append(out, f.query)
		}
	}
	return out
}

func (p *parser) fileSubscription(name string, k, v *yaml.Node) {
	f := &FileSubscription{Name: name, MaxSize: DefaultMaxSize, place: at(k), places: map[string]place{}}
	var query *Subscription
	var maxSize *yaml.Node
	p.mapping(v, "a file subscription", fileSubscriptionKeys, func(key string, _, v *yaml.Node) {
		f.places[key] = at(v)
		switch key {
		case "path":
			f.Path = p.scalar(v, "a pattern of paths, e.g. manuals/**")
			if f.Path == "" {
				return
			}
			var err error
			if f.Pattern, err = protocol.ParsePattern(f.Path); err != nil {
				p.bad(v, "path: "+err.Error(), "write names separated by slashes, with *, ** and {key}, e.g. patients/{key}/**")
			}
		case "rows":
			query = &Subscription{Name: name, Key: "key", keyType: "text", places: map[string]place{}}
			p.rowsQuery(query, v)
			f.Rows = query.Rows
		case "upload":
			if v.Kind != yaml.ScalarNode || v.Tag != "!!bool" {
				p.bad(v, fmt.Sprintf("upload is %q", v.Value), "write true or false")
			}
			f.Upload = v.Value == "true"
		case "max_size":
			maxSize = v
			n, err := ParseSize(v.Value)
			if v.Kind != yaml.ScalarNode || err != nil || n < 1 || n > protocol.MaxFileSize {
				p.bad(v, fmt.Sprintf("max_size is %q", v.Value), "write a size such as 512KiB or 10MiB, at most 64GiB")
			}
			f.MaxSize = n
		}
	})
	if resolve(v).Kind != yaml.MappingNode {
		return
	}
	switch {
	case f.places["path"].line == 0:
		p.bad(k, fmt.Sprintf("file subscription %q has no path", name), "add path, a pattern such as manuals/**")
	case f.Pattern == nil:
	case f.Pattern.HasKey && query == nil:
		p.bad(k, fmt.Sprintf("file subscription %q has {key} in its path, but no rows", name), "add rows, the SQL query for the keys that a user may see")
	case !f.Pattern.HasKey && query != nil:
		p.bad(k, fmt.Sprintf("file subscription %q has rows, but no {key} in its path", name), "write {key} where the key stands in the path, or leave rows out to give everybody all such files")
	}
	if maxSize != nil && !f.Upload {
		p.bad(maxSize, "max_size bounds what devices put, but upload is not true", "add upload: true, or remove max_size")
	}
	if query != nil && f.Pattern != nil && f.Pattern.HasKey {
		f.query = query
	}
	p.d.Files = append(p.d.Files, f)
}

// fileRule reads file_column and file of a table subscription.
func (p *parser) fileRule(s *Subscription, rule *yaml.Node) {
	if rule == nil {
		return
	}
	switch s.File {
	case FileAny, FileBefore:
	default:
		if s.File != "" {
			p.bad(rule, fmt.Sprintf("unknown file rule %q", s.File), orElse(didYouMean(s.File, []string{FileAny, FileBefore}), "any or before"))
		}
		return
	}
	if s.FileColumn == "" {
		p.bad(rule, "file needs to know which column names the file", "add file_column")
	}
	if s.File == FileBefore && s.Direction == UploadOnly {
		p.bad(rule, "an upload-only subscription gets no rows that could wait for a file", "remove file, or let devices download")
	}
}

// fileColumn checks a table subscription's file column.
func (c *checker) fileColumn(s *Subscription, t *Table) {
	if s.FileColumn == "" {
		return
	}
	col, ok := t.Column(s.FileColumn)
	switch {
	case !ok:
		c.bad(s.places["file_column"], fmt.Sprintf("%s has no column %q", s.Table, s.FileColumn), "name the text column that holds a file's path")
	case !slices.ContainsFunc(s.ColumnsOf(t), func(c Column) bool { return c.Name == s.FileColumn }):
		c.bad(s.places["columns"], fmt.Sprintf("columns leaves out the file column %q", s.FileColumn), fmt.Sprintf("add %q", s.FileColumn))
	case col.MirrorType != "text" && !strings.HasPrefix(col.MirrorType, "character varying"):
		c.bad(s.places["file_column"], fmt.Sprintf("the file column %q is of type %s", s.FileColumn, col.Type), "use a column of type text or varchar: it holds a path")
	}
}

// sizeUnits are what a size may be given in.
var sizeUnits = []struct {
	suffix string
	factor int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"B", 1}}

// ParseSize reads a whole number of bytes with or without a unit: 1048576, 512KiB, 10 MiB.
func ParseSize(s string) (int64, error) {
	digits, factor := strings.TrimSpace(s), int64(1)
	for _, u := range sizeUnits {
		if n, ok := strings.CutSuffix(digits, u.suffix); ok {
			digits, factor = strings.TrimSpace(n), u.factor
			break
		}
	}
	var n int64
	if digits == "" || len(digits) > 12 || strings.Trim(digits, "0123456789") != "" {
		return 0, fmt.Errorf("%q is not a size", s)
	}
	for _, d := range digits {
		n = n*10 + int64(d-'0')
	}
	return n * factor, nil
}
