package schema

import (
	"fmt"
	"strings"
)

// Problem is one thing that is wrong with a table or a definitions file: what, where, and what to do about it.
type Problem struct {
	File    string `json:"file,omitempty"`
	Line    int    `json:"line,omitempty"`   // from 1; 0: not a place in a file
	Column  int    `json:"column,omitempty"` // from 1
	Table   string `json:"table,omitempty"`  // "schema.table"
	Message string `json:"message"`
	Remedy  string `json:"remedy"`
	Warning bool   `json:"warning,omitempty"` // works, but probably not as meant
}

// String is "file:line:column: message; remedy".
func (p Problem) String() string {
	var b strings.Builder
	if p.File != "" {
		b.WriteString(p.File)
		if p.Line > 0 {
			fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
		}
		b.WriteString(": ")
	}
	if p.Table != "" {
		fmt.Fprintf(&b, "table %s: ", p.Table)
	}
	b.WriteString(p.Message)
	if p.Remedy != "" {
		b.WriteString("; " + p.Remedy)
	}
	return b.String()
}

// ProblemsError refuses because of problems, all of which it names.
type ProblemsError struct{ Problems []Problem }

func (e *ProblemsError) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// Refusing separates what refuses from what only warns. The error is nil when nothing refuses.
func Refusing(problems []Problem) (warnings []Problem, err error) {
	var bad []Problem
	for _, p := range problems {
		if p.Warning {
			warnings = append(warnings, p)
		} else {
			bad = append(bad, p)
		}
	}
	if len(bad) > 0 {
		return warnings, &ProblemsError{bad}
	}
	return warnings, nil
}

// nearest is the candidate that name is most likely a slip of, or empty.
func nearest(name string, candidates []string) string {
	best, limit := "", len(name)/3+1
	for _, c := range candidates {
		if d := distance(strings.ToLower(name), strings.ToLower(c)); d <= limit {
			best, limit = c, d-1
		}
	}
	return best
}

// distance is Levenshtein's, with a swap of neighbours counted once.
func distance(a, b string) int {
	x, y := []rune(a), []rune(b)
	prev2, prev, cur := make([]int, len(y)+1), make([]int, len(y)+1), make([]int, len(y)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(x); i++ {
		cur[0] = i
		for j := 1; j <= len(y); j++ {
			cost := 1
			if x[i-1] == y[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && x[i-1] == y[j-2] && x[i-2] == y[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return prev[len(y)]
}

func didYouMean(name string, candidates []string) string {
	if n := nearest(name, candidates); n != "" {
		return fmt.Sprintf("did you mean %q?", n)
	}
	return ""
}
