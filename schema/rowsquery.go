package schema

import (
	"fmt"
	"strings"
)

// rowsQuery is a subscription's rows query, cut at its parameters.
type rowsQuery struct {
	text   []string // literal pieces; one more than params
	params []string // "" for :user, else the attribute's name
	at     []int    // byte offset of each parameter in the source
	length []int    // its length there
}

// queryError is a place in a rows query.
type queryError struct {
	offset  int // bytes from the query's beginning
	message string
	remedy  string
}

// parseRows finds the parameters :user and :user.<attribute> outside strings, quoted names, dollar quotes and comments,
// and refuses what is not one statement. PostgreSQL itself checks the rest.
func parseRows(sql string) (*rowsQuery, *queryError) {
	q := &rowsQuery{}
	depth, last := 0, 0
	for i := 0; i < len(sql); {
		c := sql[i]
		switch {
		case c == 0:
			return nil, &queryError{i, "a NUL character", "remove it"}
		case c == '\'':
			end, ok := skipString(sql, i, i > 0 && (sql[i-1] == 'e' || sql[i-1] == 'E') && (i < 2 || !identChar(sql[i-2])))
			if !ok {
				return nil, &queryError{i, "a string that does not end", "close it with '"}
			}
			i = end
		case c == '"':
			end := i + 1
			for end < len(sql) && sql[end] != '"' {
				end++
			}
			if end == len(sql) {
				return nil, &queryError{i, "a quoted name that does not end", `close it with "`}
			}
			i = end + 1
		case c == '-' && strings.HasPrefix(sql[i:], "--"):
			if n := strings.IndexAny(sql[i:], "\r\n"); n >= 0 {
				i += n
			} else {
				i = len(sql)
			}
		case c == '/' && strings.HasPrefix(sql[i:], "/*"):
			end, ok := skipComment(sql, i)
			if !ok {
				return nil, &queryError{i, "a comment that does not end", "close it with */"}
			}
			i = end
		case c == '$':
			if i+1 < len(sql) && sql[i+1] >= '0' && sql[i+1] <= '9' {
				return nil, &queryError{i, "a numbered parameter", "write :user for the user's name, :user.attribute for one of the user's attributes"}
			}
			tag, ok := dollarTag(sql[i:])
			if !ok {
				i++
				continue
			}
			n := strings.Index(sql[i+len(tag):], tag)
			if n < 0 {
				return nil, &queryError{i, "a dollar-quoted string that does not end", "close it with " + tag}
			}
			i += len(tag) + n + len(tag)
		case c == ';':
			return nil, &queryError{i, "more than one statement, or a semicolon at the end", "write one SELECT without a semicolon"}
		case c == '(':
			depth++
			i++
		case c == ')':
			if depth--; depth < 0 {
				return nil, &queryError{i, "a closing parenthesis without an opening one", "remove it"}
			}
			i++
		case c == ':' && i+1 < len(sql) && (sql[i+1] == ':' || sql[i+1] == '='):
			i += 2
		case c == ':' && i+1 < len(sql) && identStart(sql[i+1]):
			name, attr, end := parameter(sql, i+1)
			if name != "user" {
				return nil, &queryError{i, fmt.Sprintf("unknown parameter :%s", sql[i+1:end]),
					"only :user and :user.<attribute> exist (in an array slice put a blank behind the colon)"}
			}
			q.text = append(q.text, sql[last:i])
			q.params = append(q.params, attr)
			q.at, q.length = append(q.at, i), append(q.length, end-i)
			i, last = end, end
		case identStart(c):
			// A name as a whole: a $ or a digit inside it begins nothing.
			for i < len(sql) && identChar(sql[i]) {
				i++
			}
		default:
			i++
		}
	}
	if depth > 0 {
		return nil, &queryError{len(sql), "an opening parenthesis without a closing one", "close it"}
	}
	q.text = append(q.text, sql[last:])
	return q, nil
}

// render puts SQL expressions in the parameters' places. In the result each parameter is surrounded by parentheses.
func (q *rowsQuery) render(userExpr, attrExpr string) string {
	var b strings.Builder
	for i, p := range q.params {
		b.WriteString(q.text[i])
		b.WriteString(q.param(p, userExpr, attrExpr))
	}
	b.WriteString(q.text[len(q.params)])
	return b.String()
}

func (q *rowsQuery) param(attr, userExpr, attrExpr string) string {
	if attr == "" {
		return "(" + userExpr + ")"
	}
	return "((" + attrExpr + ") OPERATOR(pg_catalog.->>) " + Literal(attr) + ")"
}

// sourceOffset maps a byte offset in what render made back to the query as written.
func (q *rowsQuery) sourceOffset(rendered int, userExpr, attrExpr string) int {
	out, src := 0, 0
	for i, p := range q.params {
		if rendered < out+len(q.text[i]) {
			return src + rendered - out
		}
		out += len(q.text[i]) + len(q.param(p, userExpr, attrExpr))
		if rendered < out {
			return q.at[i]
		}
		src = q.at[i] + q.length[i]
	}
	return src + rendered - out
}

// skipString returns the offset behind the string that begins at i.
func skipString(sql string, i int, escapes bool) (int, bool) {
	for j := i + 1; j < len(sql); j++ {
		switch {
		case escapes && sql[j] == '\\':
			j++
		case sql[j] == '\'' && j+1 < len(sql) && sql[j+1] == '\'':
			j++
		case sql[j] == '\'':
			return j + 1, true
		}
	}
	return 0, false
}

// skipComment returns the offset behind the comment that begins at i; they nest.
func skipComment(sql string, i int) (int, bool) {
	depth := 0
	for i < len(sql) {
		switch {
		case strings.HasPrefix(sql[i:], "/*"):
			depth++
			i += 2
		case strings.HasPrefix(sql[i:], "*/"):
			depth--
			i += 2
			if depth == 0 {
				return i, true
			}
		default:
			i++
		}
	}
	return 0, false
}

// dollarTag returns the $tag$ that s begins with.
func dollarTag(s string) (string, bool) {
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '$':
			return s[:i+1], true
		case i == 1 && !identStart(s[i]), !identChar(s[i]):
			return "", false
		}
	}
	return "", false
}

// parameter reads a name and, behind a dot, an attribute. Names fold to lower case, attributes do not.
func parameter(sql string, i int) (name, attr string, end int) {
	end = i
	for end < len(sql) && identChar(sql[end]) && sql[end] != '$' {
		end++
	}
	name = strings.ToLower(sql[i:end])
	if end+1 < len(sql) && sql[end] == '.' && identStart(sql[end+1]) {
		from := end + 1
		for end = from; end < len(sql) && identChar(sql[end]) && sql[end] != '$'; end++ {
		}
		attr = sql[from:end]
	}
	return name, attr, end
}

func identStart(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_' || c >= 0x80
}

func identChar(c byte) bool { return identStart(c) || c >= '0' && c <= '9' || c == '$' }
