package protocol

import (
	"strconv"
	"unicode/utf8"
)

// checkJSON walks one value of the given shape and demands that nothing but white space follows it.
func checkJSON(data []byte, s *shape, lim Limits) error {
	w := jsonWalk{newWalk(data, lim)}
	w.space()
	if w.pos == len(data) {
		return refuse(CodeMalformed, "empty message")
	}
	if err := w.item(s); err != nil {
		return err
	}
	w.space()
	if w.pos != len(data) {
		return refuse(CodeMalformed, "%d bytes after the end of the message, at byte %d", len(data)-w.pos, w.pos)
	}
	return nil
}

type jsonWalk struct{ walk }

func (w *jsonWalk) space() {
	for w.pos < len(w.data) {
		switch w.data[w.pos] {
		case ' ', '\t', '\r', '\n':
			w.pos++
		default:
			return
		}
	}
}

// peek is the next byte after white space, 0 at the end.
func (w *jsonWalk) peek() byte {
	w.space()
	if w.pos == len(w.data) {
		return 0
	}
	return w.data[w.pos]
}

func (w *jsonWalk) literal(word string) bool {
	if len(w.data)-w.pos < len(word) || string(w.data[w.pos:w.pos+len(word)]) != word {
		return false
	}
	w.pos += len(word)
	return true
}

func (w *jsonWalk) item(s *shape) error {
	c := w.peek()
	if c == 0 {
		return w.malformed("the message ends too early")
	}
	switch s.kind {
	case kText, kValue:
		if c == '"' {
			_, err := w.text(false)
			return err
		}
		if s.kind == kValue && w.literal("null") {
			return nil
		}
	case kInt:
		if c == '-' || c >= '0' && c <= '9' {
			return w.number()
		}
	case kBool:
		if w.literal("true") || w.literal("false") {
			return nil
		}
	case kList:
		if c == '[' {
			return w.list(s)
		}
		if w.literal("null") { // encoders that know no difference between none and empty
			return nil
		}
	case kObject, kTuple:
		if c == '{' {
			return w.object(s)
		}
	}
	got := map[byte]string{'"': "a text", '[': "a list", '{': "an object", 't': "true", 'f': "false", 'n': "null"}[c]
	if got == "" {
		got = "a number"
		if c != '-' && (c < '0' || c > '9') {
			got = strconv.QuoteRuneToASCII(rune(c))
		}
	}
	return w.malformed("%s where %s is expected", got, s.typ)
}

// text walks a string; its content is returned when want is set.
func (w *jsonWalk) text(want bool) (string, error) {
	start := w.pos
	w.pos++
	for w.pos < len(w.data) {
		switch c := w.data[w.pos]; {
		case c == '"':
			raw := w.data[start+1 : w.pos]
			w.pos++
			if !utf8.Valid(raw) {
				return "", w.malformed("text that is not UTF-8")
			}
			if !want {
				return "", nil
			}
			s, err := strconv.Unquote(string(w.data[start:w.pos]))
			if err != nil { // an escape that Go does not have, such as \/: no field name needs one
				s = string(raw)
			}
			return s, nil
		case c < 0x20:
			return "", w.malformed("a control character in a text: write it as \\u%04x", c)
		case c == '\\':
			if err := w.escape(); err != nil {
				return "", err
			}
		default:
			w.pos++
		}
	}
	return "", w.malformed("the message ends inside a text")
}

func (w *jsonWalk) escape() error {
	if w.pos+1 >= len(w.data) {
		return w.malformed("the message ends inside a text")
	}
	switch w.data[w.pos+1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		w.pos += 2
		return nil
	case 'u':
		r, ok := w.hex4(w.pos + 2)
		switch {
		case !ok:
			return w.malformed("\\u without four hex digits")
		case r >= 0xDC00 && r <= 0xDFFF:
			return w.malformed("half of a surrogate pair")
		case r >= 0xD800 && r <= 0xDBFF:
			if w.pos+7 >= len(w.data) || w.data[w.pos+6] != '\\' || w.data[w.pos+7] != 'u' {
				return w.malformed("half of a surrogate pair")
			}
			if lo, ok := w.hex4(w.pos + 8); !ok || lo < 0xDC00 || lo > 0xDFFF {
				return w.malformed("half of a surrogate pair")
			}
			w.pos += 12
		default:
			w.pos += 6
		}
		return nil
	}
	return w.malformed("unknown escape in a text")
}

func (w *jsonWalk) hex4(at int) (uint64, bool) {
	if at+4 > len(w.data) {
		return 0, false
	}
	for _, c := range w.data[at : at+4] {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') && (c < 'A' || c > 'F') {
			return 0, false
		}
	}
	r, err := strconv.ParseUint(string(w.data[at:at+4]), 16, 32)
	return r, err == nil
}

func (w *jsonWalk) number() error {
	start := w.pos
	for w.pos < len(w.data) {
		c := w.data[w.pos]
		if (c < '0' || c > '9') && c != '-' && c != '+' && c != '.' && c != 'e' && c != 'E' {
			break
		}
		w.pos++
	}
	text := string(w.data[start:w.pos])
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || strconv.FormatInt(n, 10) != text {
		w.pos = start
		return w.malformed("%s where a whole number of 64 bits is expected", excerpt(text))
	}
	return nil
}

func (w *jsonWalk) list(s *shape) error {
	w.pos++
	if w.peek() == ']' {
		w.pos++
		return nil
	}
	for i := 0; ; i++ {
		w.pushIndex(i)
		if err := w.count(s, i, 1); err != nil {
			return err
		}
		if err := w.item(s.elem); err != nil {
			return err
		}
		more, err := w.next(']')
		w.pop()
		if err != nil || !more {
			return err
		}
	}
}

// next takes a comma, or the closing bracket.
func (w *jsonWalk) next(end byte) (more bool, err error) {
	switch w.peek() {
	case ',':
		w.pos++
		return true, nil
	case end:
		w.pos++
		return false, nil
	case 0:
		return false, w.malformed("the message ends too early")
	}
	return false, w.malformed("neither a comma nor %c", end)
}

func (w *jsonWalk) object(s *shape) error {
	w.pos++
	var seen uint64
	if w.peek() == '}' {
		w.pos++
		return w.whole(s, seen)
	}
	for {
		if w.peek() != '"' {
			return w.malformed("a field name is expected")
		}
		at := w.pos
		name, err := w.text(true)
		if err != nil {
			return err
		}
		i, known := s.byName[name]
		if !known {
			w.pos = at
			return w.malformed("unknown field %s (names are case sensitive)", excerpt(name))
		}
		if seen&(1<<i) != 0 {
			w.pos = at
			return w.malformed("field %s comes twice", excerpt(name))
		}
		seen |= 1 << i
		if w.peek() != ':' {
			return w.malformed("a colon is expected after %s", excerpt(name))
		}
		w.pos++
		w.push(name)
		if err := w.item(s.fields[i].shape); err != nil {
			return err
		}
		w.pop()
		more, err := w.next('}')
		if err != nil {
			return err
		}
		if !more {
			return w.whole(s, seen)
		}
	}
}

// whole demands every field of what is a tuple in CBOR, so that both forms carry the same.
func (w *jsonWalk) whole(s *shape, seen uint64) error {
	if s.kind != kTuple {
		return nil
	}
	for i, f := range s.fields {
		if seen&(1<<i) == 0 {
			return w.malformed("field %s is missing", f.name)
		}
	}
	return nil
}
