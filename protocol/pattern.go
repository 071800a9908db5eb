package protocol

import (
	"fmt"
	"regexp"
	"strings"
)

// Pattern says which paths a file subscription has: names separated by slashes, in which * stands for any characters of one
// name, ** as a whole name for any number of levels, and {key}, once, for the key that decides whose file it is.
type Pattern struct {
	Text   string
	Prefix string // literal beginning of every path that matches, up to the first wildcard or key
	HasKey bool
	Regexp string // anchored; the key is its only capturing group. The same for Go and PostgreSQL

	re *regexp.Regexp
}

const keyMark = "{key}"

// ParsePattern reads a pattern; an error is one sentence.
func ParsePattern(text string) (*Pattern, error) {
	p := &Pattern{Text: text}
	segments := strings.Split(text, "/")
	var re strings.Builder
	re.WriteString("^")
	literal, wild := true, false
	for i, s := range segments {
		last := i == len(segments)-1
		switch {
		case s == "**" && i > 0 && segments[i-1] == "**":
			return nil, fmt.Errorf("** twice in a row")
		case s == "**" && last:
			literal, wild = false, true
			re.WriteString(".+")
			continue
		case s == "**":
			literal, wild = false, true
			re.WriteString("(?:[^/]+/)*")
			continue
		case strings.Contains(s, "**"):
			return nil, fmt.Errorf("** must stand alone between slashes, not in %q", s)
		}
		if n := strings.Count(text, keyMark); n > 1 {
			return nil, fmt.Errorf("{key} may stand there once, not %d times", n)
		}
		if strings.Contains(s, keyMark) {
			switch {
			case strings.Contains(s, "*"):
				return nil, fmt.Errorf("{key} and * cannot share the name %q", s)
			case wild:
				return nil, fmt.Errorf("{key} must stand before any *")
			}
		}
		sample := strings.NewReplacer(keyMark, "k", "*", "x").Replace(s)
		if strings.ContainsAny(sample, "{}") {
			return nil, fmt.Errorf("the only name in braces is {key}, not %q", s)
		}
		if err := CheckPath(sample); err != nil {
			return nil, fmt.Errorf("%q cannot be a part of a path", s)
		}
		for rest := s; rest != ""; {
			switch {
			case strings.HasPrefix(rest, keyMark):
				p.HasKey, literal = true, false
				re.WriteString("([^/]+)")
				rest = rest[len(keyMark):]
			case rest[0] == '*':
				literal, wild = false, true
				re.WriteString("[^/]*")
				rest = rest[1:]
			default:
				n := strings.IndexAny(rest, "*{")
				if n < 0 {
					n = len(rest)
				}
				re.WriteString(regexp.QuoteMeta(rest[:n]))
				if literal {
					p.Prefix += rest[:n]
				}
				rest = rest[n:]
			}
		}
		if !last {
			re.WriteString("/")
			if literal {
				p.Prefix += "/"
			}
		}
	}
	re.WriteString("$")
	p.Regexp = re.String()
	var err error
	p.re, err = regexp.Compile(p.Regexp)
	return p, err
}

// Match tells whether a path is one of the pattern's, and its key.
func (p *Pattern) Match(path string) (key string, ok bool) {
	m := p.re.FindStringSubmatch(path)
	if m == nil {
		return "", false
	}
	if p.HasKey {
		key = m[1]
	}
	return key, true
}
