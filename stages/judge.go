package stages

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/waystage/waystage/protocol"
)

// record is one change of a request, as it is staged.
type record struct {
	tbl   int // 0: unknown
	tname string
	op    string
	key   []protocol.Value
	bver  int64
	base  []byte // jsonb or nil
	img   []byte // jsonb or nil
	unit  int64  // atomic unit, see atomicUnits
	code  protocol.Code
	why   string
}

// judge checks what can be checked of a request's changes without the mirror. Every change gives a record; one that is
// refused here carries its code.
func judge(req *protocol.Request, s *set, maxRow int) []record {
	layouts := make(map[string][]string, len(req.Columns))
	for _, l := range req.Columns {
		layouts[l.Table] = l.Columns
	}
	seen := make(map[string]bool, len(req.Changes))
	records := make([]record, len(req.Changes))
	for i := range req.Changes {
		c := &req.Changes[i]
		r := &records[i]
		r.tname, r.op, r.key = clean(c.Table), clean(c.Op), cleanKey(c.Key)
		sub := s.byID[c.Table]
		if sub != nil {
			r.tbl = sub.table.ID
		}
		j := judgement{sub: sub, layout: layouts[c.Table], maxRow: maxRow}
		if r.code, r.why = j.change(c, r); r.code != "" {
			j.keep(c, r)
		} else {
			id := c.Table + "\x00" + keyString(c.Key)
			if seen[id] {
				r.code, r.why = protocol.CodeDuplicate, "the row was changed twice in one session; send one change with its final state"
			}
			seen[id] = true
		}
		if r.code != "" && len(r.why) > maxDetail {
			r.why = strings.ToValidUTF8(r.why[:maxDetail], "") + "..."
		}
	}
	atomicUnits(req.Changes, s, records)
	return records
}

// maxDetail bounds the sentence that is stored with a rejected record, in bytes.
const maxDetail = 500

// judgement is the judging of one change.
type judgement struct {
	sub    *subscription
	layout []string
	maxRow int
}

func (j *judgement) change(c *protocol.Change, r *record) (protocol.Code, string) {
	if j.sub == nil {
		// The same words whether the table exists or not.
		return protocol.CodeUnknownTable, fmt.Sprintf("table %s is not in the device's subscription set", quoted(c.Table))
	}
	t := j.sub.table
	if c.Op != protocol.Insert && c.Op != protocol.Update && c.Op != protocol.Delete {
		return protocol.CodeInvalidRecord, fmt.Sprintf("operation %s is not I, U or D", quoted(c.Op))
	}
	if !j.sub.Allows(c.Op) {
		return protocol.CodeOperation, fmt.Sprintf("the subscription of %s does not allow devices the operation %s (allowed: %q)", t.FullName(), c.Op, j.sub.Allow)
	}
	if c.Version != "" {
		v, err := strconv.ParseInt(c.Version, 10, 64)
		if err != nil || v <= 0 {
			return protocol.CodeInvalidRecord, fmt.Sprintf("base version %s is not one that this server gave", quoted(c.Version))
		}
		r.bver = v
	}
	if len(c.Key) != len(t.Key) {
		return protocol.CodeMissingKey, fmt.Sprintf("the key has %d values, the primary key of %s has %d (%s)", len(c.Key), t.FullName(), len(t.Key), strings.Join(t.Key, ", "))
	}
	for i, v := range c.Key {
		if v == nil {
			return protocol.CodeMissingKey, fmt.Sprintf("key column %s is null", t.Key[i])
		}
		if code, why := j.value(t.Key[i], v); code != "" {
			return code, why
		}
	}
	if (len(c.New) > 0) != (c.Op != protocol.Delete) {
		return protocol.CodeInvalidRecord, fmt.Sprintf("operation %s with %d values of a new image", c.Op, len(c.New))
	}
	if len(c.Base) > 0 && c.Op == protocol.Insert {
		return protocol.CodeInvalidRecord, "an insert with a base image"
	}
	if len(c.New)+len(c.Base) > 0 {
		if code, why := j.columns(c, t.FullName()); code != "" {
			return code, why
		}
	}
	if code, why := j.image(c, c.Base, "base", protocol.CodeMissingKey); code != "" {
		return code, why
	}
	unlike := protocol.CodeMissingKey
	if c.Op == protocol.Update {
		unlike = protocol.CodeKeyChange
	}
	if code, why := j.image(c, c.New, "new", unlike); code != "" {
		return code, why
	}
	if len(c.Base) > 0 {
		r.base = appendImage(nil, j.layout, c.Base, func(i int) bool { return j.known(j.layout[i]) })
	}
	switch c.Op {
	case protocol.Insert:
		r.img = j.insertImage(c)
	case protocol.Update:
		r.img = appendImage(nil, j.layout, c.New, func(i int) bool {
			return !t.IsKey(j.layout[i]) && j.known(j.layout[i]) && (len(c.Base) == 0 || !equal(c.Base[i], c.New[i]))
		})
	}
	return "", ""
}

// columns checks the layout of the images. A column that has left the subscription, or the table, does no harm where the change
// writes nothing to it.
func (j *judgement) columns(c *protocol.Change, table string) (protocol.Code, string) {
	if j.layout == nil {
		return protocol.CodeInvalidRecord, fmt.Sprintf("the request does not name the columns of %s", table)
	}
	for i, name := range j.layout {
		if !j.known(name) && j.writes(c, i) {
			return protocol.CodeUnknownColumn, fmt.Sprintf("column %s of %s is not in the device's subscription set", quoted(name), table)
		}
	}
	return "", ""
}

func (j *judgement) known(column string) bool { return slices.Contains(j.sub.columns, column) }

// writes tells whether a change writes the layout's i-th column.
func (j *judgement) writes(c *protocol.Change, i int) bool {
	switch {
	case c.Op == protocol.Delete, i >= len(c.New): // of another length: said later
		return false
	case c.Op == protocol.Update && i < len(c.Base):
		return !equal(c.Base[i], c.New[i])
	}
	return c.New[i] != nil
}

// image checks one image; unlike is the code for key columns that differ from the key.
func (j *judgement) image(c *protocol.Change, img []protocol.Value, which string, unlike protocol.Code) (protocol.Code, string) {
	if len(img) == 0 {
		return "", ""
	}
	if len(img) != len(j.layout) {
		return protocol.CodeInvalidRecord, fmt.Sprintf("the %s image has %d values for %d columns", which, len(img), len(j.layout))
	}
	size := 0
	for i, v := range img {
		name := j.layout[i]
		if v != nil {
			size += len(*v)
		}
		if code, why := j.value(name, v); code != "" {
			return code, why
		}
		if k := slices.Index(j.sub.table.Key, name); k >= 0 && !equal(v, c.Key[k]) {
			return unlike, fmt.Sprintf("key column %s of the %s image differs from the record's key; a new key is a new row: delete the old one and insert the new one", name, which)
		}
	}
	if j.maxRow > 0 && size > j.maxRow {
		return protocol.CodeRowTooBig, fmt.Sprintf("the %s image has %d bytes, the limit is %d", which, size, j.maxRow)
	}
	return "", ""
}

// value checks what no database could store in the column.
func (j *judgement) value(name string, v protocol.Value) (protocol.Code, string) {
	if v == nil {
		return "", ""
	}
	if strings.IndexByte(*v, 0) >= 0 {
		return protocol.CodeInvalidValue, fmt.Sprintf("column %s: the value contains a NUL character, which PostgreSQL cannot store", name)
	}
	if !utf8.ValidString(*v) {
		return protocol.CodeInvalidValue, fmt.Sprintf("column %s: the value is not valid UTF-8", name)
	}
	return "", ""
}

// insertImage is the new image, key columns included.
func (j *judgement) insertImage(c *protocol.Change) []byte {
	cols, vals := j.layout, c.New
	for k, name := range j.sub.table.Key {
		if !slices.Contains(j.layout, name) {
			cols, vals = append(slices.Clip(cols), name), append(slices.Clip(vals), c.Key[k])
		}
	}
	return appendImage(nil, cols, vals, func(i int) bool { return j.known(cols[i]) })
}

func equal(a, b protocol.Value) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

// keyString makes a map key of a row key.
func keyString(key []protocol.Value) string {
	var b strings.Builder
	for _, v := range key {
		if v == nil {
			b.WriteString("\x01")
		} else {
			b.WriteString(*v)
		}
		b.WriteByte(0)
	}
	return b.String()
}

// quoted quotes foreign text for a sentence, shortened.
func quoted(s string) string {
	const most = 80
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strconv.QuoteToGraphic(strings.ToValidUTF8(s, "\uFFFD"))
}

// clean makes text storable that is kept for the log only.
func clean(s string) string {
	return strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", "\uFFFD"), "\uFFFD")
}

func cleanKey(key []protocol.Value) []protocol.Value {
	bad := func(v protocol.Value) bool {
		return v != nil && (strings.IndexByte(*v, 0) >= 0 || !utf8.ValidString(*v))
	}
	if !slices.ContainsFunc(key, bad) {
		if key == nil {
			return []protocol.Value{}
		}
		return key
	}
	out := slices.Clone(key)
	for i, v := range out {
		if bad(v) {
			s := clean(*v)
			out[i] = &s
		}
	}
	return out
}

// appendImage renders an image as a JSON object of texts and nulls; only the columns that pick takes, if it is not nil.
func appendImage(b []byte, cols []string, vals []protocol.Value, pick func(int) bool) []byte {
	b = append(b, '{')
	first := true
	for i, name := range cols {
		if pick != nil && !pick(i) {
			continue
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		b = appendString(b, name)
		b = append(b, ':')
		if vals[i] == nil {
			b = append(b, "null"...)
		} else {
			b = appendString(b, *vals[i])
		}
	}
	return append(b, '}')
}

// appendString appends a JSON string.
func appendString(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= 0x20 && c != '"' && c != '\\' {
			continue
		}
		b = append(b, s[start:i]...)
		start = i + 1
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		default:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}
