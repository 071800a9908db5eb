package cmd

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/waystage/waystage/internal/registry"
)

// maxImport bounds a file of users, in bytes.
const maxImport = 64 << 20

// imported is one user of a file, or what is wrong in that place.
type imported struct {
	line   int
	name   string
	change registry.UserChange
	err    error
}

// importedLine is what became of it.
type importedLine struct {
	Line  int    `json:"line"`
	User  string `json:"user"`
	State string `json:"state"` // added, changed, unchanged, refused
	Code  string `json:"code,omitempty"`
	Error string `json:"error,omitempty"`
}

func newUsersImport(a *app) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "import FILE", Short: "Add and change many users from a .csv or .yaml file", Args: cobra.ExactArgs(1),
		Long: `Add and change many users from a .csv or .yaml file; users who are not in it stay as they are. Each line stands for itself: what is wrong with
one does not stop the others. Exit code 3: complete, and lines were refused.

CSV has a head line with the columns user, groups (names with blanks between them), password and attr.NAME for each attribute. Only user must be there. An empty
cell in groups takes the user out of all; in attr.NAME it takes the attribute away; in password it leaves the password alone.

    user,groups,attr.ward
    amina,nurses night,north

YAML is a list of users; what is left out stays as it is, and an attribute with ~ is taken away:

    - user: amina
      groups: [nurses, night]
      attributes: {ward: north}

New users without a password are enrolled in another way.`,
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"csv", "yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
		},
		RunE: func(c *cobra.Command, args []string) error {
			users, err := readUsers(args[0])
			if err != nil {
				return &failure{code: exitUsage, what: "cannot read the users", where: args[0], err: err, remedy: "see 'waystage users import --help'"}
			}
			return a.withRegistry(c.Context(), "the import is not complete", func(ctx context.Context, r *registry.Registry) error {
				return a.importUsers(ctx, r, users, f)
			})
		}}
	withOutput(c, &f)
	return c
}

func (a *app) importUsers(ctx context.Context, r *registry.Registry, users []imported, f format) error {
	count, lines, first := map[string]int{}, []importedLine{}, map[string]int{}
	p := a.progress("users", "users", int64(len(users)))
	for i, u := range users {
		l := importedLine{Line: u.line, User: u.name, State: "refused"}
		err := u.err
		if before := first[u.name]; err == nil && before > 0 {
			err = fmt.Errorf("the user stands in line %d already", before)
		} else if err == nil {
			first[u.name] = u.line
			var added, changed bool
			added, changed, err = r.PutUser(ctx, u.name, u.change)
			switch {
			case err != nil:
			case added:
				l.State = "added"
			case changed:
				l.State = "changed"
			default:
				l.State = "unchanged"
			}
		}
		if err != nil {
			var refused *registry.Refusal
			if errors.As(err, &refused) {
				l.Code = string(refused.ErrorCode())
			} else if u.err == nil && first[u.name] == u.line {
				p.stop()
				return fmt.Errorf("line %d, user %s (%d users before it are done): %w", u.line, u.name, i, err)
			} else {
				l.Code = "invalid_line"
			}
			l.Error = oneLine(err.Error())
		}
		count[l.State]++
		lines = append(lines, l)
		p.set(int64(i+1), int64(len(users)))
	}
	p.end(fmt.Sprintf("%d users added, %d changed, %d unchanged, %d lines refused", count["added"], count["changed"], count["unchanged"], count["refused"]))
	if f == "table" {
		lines = slices.DeleteFunc(lines, func(l importedLine) bool { return l.State != "refused" })
	}
	if f != "table" || len(lines) > 0 {
		err := printRows(a.out, f, lines, []column[importedLine]{
			{"line", func(l importedLine) string { return strconv.Itoa(l.Line) }},
			{"user", func(l importedLine) string { return l.User }},
			{"code", func(l importedLine) string { return l.Code }},
			{"refused because", func(l importedLine) string { return l.Error }},
		})
		if err != nil {
			return err
		}
	}
	if count["refused"] > 0 {
		return silent(exitRejected)
	}
	return nil
}

// readUsers reads a file. An error means that nothing of it can be used.
func readUsers(path string) ([]imported, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, bare(err)
	}
	defer func() { _ = file.Close() }()
	body, err := io.ReadAll(io.LimitReader(file, maxImport+1))
	switch {
	case err != nil:
		return nil, bare(err)
	case len(body) > maxImport:
		return nil, fmt.Errorf("the file has more than %s: divide it", human(maxImport))
	}
	body = bytes.TrimPrefix(body, []byte("\xef\xbb\xbf"))
	switch strings.ToLower(filepath.Ext(path)) {
	case ".csv":
		return usersOfCSV(body)
	case ".yaml", ".yml":
		return usersOfYAML(body)
	}
	return nil, errors.New("the file's name ends neither in .csv nor in .yaml")
}

func usersOfCSV(body []byte) ([]imported, error) {
	r := csv.NewReader(bytes.NewReader(body))
	r.FieldsPerRecord = -1
	head, err := r.Read()
	if errors.Is(err, io.EOF) {
		return nil, errors.New("the file is empty: it begins with the line user,groups,attr.NAME")
	}
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for i, h := range head {
		head[i] = strings.TrimSpace(h)
		attr, isAttr := strings.CutPrefix(head[i], "attr.")
		if known := head[i] == "user" || head[i] == "groups" || head[i] == "password" || isAttr && attr != ""; !known || seen[head[i]] {
			return nil, fmt.Errorf("line 1: column %q is unknown or there twice; columns are user, groups, password and attr.NAME", head[i])
		}
		seen[head[i]] = true
	}
	if !seen["user"] {
		return nil, errors.New("line 1: there is no column user")
	}
	var out []imported
	for {
		fields, err := r.Read()
		var bad *csv.ParseError
		switch {
		case errors.Is(err, io.EOF):
			return out, nil
		case errors.As(err, &bad):
			out = append(out, imported{line: bad.Line, err: bad.Err})
			continue
		case err != nil:
			return nil, err
		}
		u := imported{change: registry.UserChange{Set: map[string]string{}}}
		u.line, _ = r.FieldPos(0)
		if len(fields) != len(head) {
			u.err = fmt.Errorf("%d fields, and the head line has %d", len(fields), len(head))
			out = append(out, u)
			continue
		}
		for i, h := range head {
			attr, isAttr := strings.CutPrefix(h, "attr.")
			switch v := fields[i]; {
			case h == "user":
				u.name = strings.TrimSpace(v)
			case h == "groups":
				u.change.Groups = append([]string{}, strings.Fields(v)...)
			case h == "password":
				u.change.Password = v
			case isAttr && v == "":
				u.change.Unset = append(u.change.Unset, attr)
			case isAttr:
				u.change.Set[attr] = v
			}
		}
		out = append(out, u)
	}
}

func usersOfYAML(body []byte) ([]imported, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(body, &doc); err != nil {
		return nil, errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if len(doc.Content) != 1 || doc.Content[0].Kind != yaml.SequenceNode {
		return nil, errors.New("the file is not a list of users")
	}
	var out []imported
	for _, n := range doc.Content[0].Content {
		u := imported{line: n.Line}
		var entry struct {
			User       string             `yaml:"user"`
			Groups     *[]string          `yaml:"groups"`
			Password   string             `yaml:"password"`
			Attributes map[string]*string `yaml:"attributes"`
		}
		u.err = n.Decode(&entry)
		if u.err == nil && n.Kind == yaml.MappingNode {
			for i := 0; i < len(n.Content); i += 2 {
				if k := n.Content[i]; !slices.Contains([]string{"user", "groups", "password", "attributes"}, k.Value) {
					u.err = fmt.Errorf("line %d: unknown key %q; keys are user, groups, password and attributes", k.Line, k.Value)
				}
			}
		}
		if u.err != nil {
			u.err = errors.New(strings.TrimPrefix(oneLine(u.err.Error()), "yaml: "))
		}
		u.name, u.change.Password, u.change.Set = entry.User, entry.Password, map[string]string{}
		if entry.Groups != nil {
			u.change.Groups = append([]string{}, *entry.Groups...)
		}
		for k, v := range entry.Attributes {
			if v == nil {
				u.change.Unset = append(u.change.Unset, k)
			} else {
				u.change.Set[k] = *v
			}
		}
		out = append(out, u)
	}
	return out, nil
}
