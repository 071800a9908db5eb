package protocol

import (
	"encoding/binary"
	"unicode/utf8"
)

// Major types of CBOR (RFC 8949 section 3.1).
const (
	majorUint, majorNeg, majorBytes, majorText, majorArray, majorMap, majorTag, majorSimple = 0, 1, 2, 3, 4, 5, 6, 7
)

var majorNames = [8]string{"a number", "a negative number", "a byte string", "a text", "a list", "a map", "a tag", "a simple value or float"}

const (
	simpleFalse, simpleTrue, simpleNull = 20, 21, 22
)

// checkCBOR walks one item of the given shape and demands that nothing follows it.
func checkCBOR(data []byte, s *shape, lim Limits) error {
	w := cborWalk{newWalk(data, lim)}
	if len(data) == 0 {
		return refuse(CodeMalformed, "empty message")
	}
	if err := w.item(s); err != nil {
		return err
	}
	if w.pos != len(data) {
		return refuse(CodeMalformed, "%d bytes after the end of the message, at byte %d", len(data)-w.pos, w.pos)
	}
	return nil
}

type cborWalk struct{ walk }

func (w *cborWalk) head() (major byte, arg uint64, err error) {
	if w.pos >= len(w.data) {
		return 0, 0, w.malformed("the message ends too early")
	}
	b := w.data[w.pos]
	w.pos++
	major, info := b>>5, b&31
	size := 0
	switch {
	case info < 24:
		return major, uint64(info), nil
	case info < 28:
		size = 1 << (info - 24)
	case info == 31:
		return 0, 0, w.malformed("indefinite lengths are not allowed")
	default:
		return 0, 0, w.malformed("reserved length code %d", info)
	}
	if major == majorSimple {
		return 0, 0, w.malformed("floats and extended simple values are not allowed")
	}
	if len(w.data)-w.pos < size {
		return 0, 0, w.malformed("the message ends too early")
	}
	var buf [8]byte
	copy(buf[8-size:], w.data[w.pos:w.pos+size])
	w.pos += size
	return major, binary.BigEndian.Uint64(buf[:]), nil
}

func (w *cborWalk) item(s *shape) error {
	start := w.pos
	major, arg, err := w.head()
	if err != nil {
		return err
	}
	switch s.kind {
	case kText:
		if major == majorText {
			return w.text(arg)
		}
	case kValue:
		if major == majorText {
			return w.text(arg)
		}
		if major == majorSimple && arg == simpleNull {
			return nil
		}
	case kInt:
		if major == majorUint || major == majorNeg {
			if arg > 1<<63-1 {
				return w.malformed("a whole number outside 64 bits")
			}
			return nil
		}
	case kBool:
		if major == majorSimple && (arg == simpleFalse || arg == simpleTrue) {
			return nil
		}
	case kList:
		if major == majorArray {
			return w.list(s, arg)
		}
		if major == majorSimple && arg == simpleNull { // encoders that know no difference between none and empty
			return nil
		}
	case kTuple:
		if major == majorArray {
			return w.tuple(s, arg)
		}
	case kObject:
		if major == majorMap {
			return w.object(s, arg)
		}
	}
	w.pos = start
	got := majorNames[major]
	if major == majorSimple && arg == simpleNull {
		got = "null"
	}
	return w.malformed("%s where %s is expected", got, s.typ)
}

func (w *cborWalk) text(n uint64) error {
	if n > uint64(len(w.data)-w.pos) {
		return w.malformed("a text of %d bytes, but only %d follow", n, len(w.data)-w.pos)
	}
	if !utf8.Valid(w.data[w.pos : w.pos+int(n)]) {
		return w.malformed("text that is not UTF-8")
	}
	w.pos += int(n)
	return nil
}

func (w *cborWalk) list(s *shape, n uint64) error {
	if n > uint64(len(w.data)-w.pos) {
		return w.malformed("a list of %d elements, but only %d bytes follow", n, len(w.data)-w.pos)
	}
	if err := w.count(s, 0, int(n)); err != nil {
		return err
	}
	for i := range int(n) {
		w.pushIndex(i)
		if err := w.item(s.elem); err != nil {
			return err
		}
		w.pop()
	}
	return nil
}

func (w *cborWalk) tuple(s *shape, n uint64) error {
	if n != uint64(len(s.fields)) {
		return w.malformed("a list of %d elements where %d are expected", n, len(s.fields))
	}
	for _, f := range s.fields {
		w.push(f.name)
		if err := w.item(f.shape); err != nil {
			return err
		}
		w.pop()
	}
	return nil
}

func (w *cborWalk) object(s *shape, n uint64) error {
	var seen uint64
	for range n {
		at := w.pos
		major, key, err := w.head()
		if err != nil {
			return err
		}
		i, known := s.byKey[key]
		if major != majorUint || !known {
			w.pos = at
			if major != majorUint {
				return w.malformed("%s as a map key: keys are numbers", majorNames[major])
			}
			return w.malformed("unknown field %d", key)
		}
		if seen&(1<<i) != 0 {
			w.pos = at
			return w.malformed("field %d (%s) comes twice", key, s.fields[i].name)
		}
		seen |= 1 << i
		w.push(s.fields[i].name)
		if err := w.item(s.fields[i].shape); err != nil {
			return err
		}
		w.pop()
	}
	return nil
}
