package protocol

import (
	"reflect"
	"strconv"
	"strings"
	"sync"
	"unsafe"
)

// A shape is what a message type looks like on the wire. Both decoders walk their input along the shape before
// anything is allocated for it, so that what the libraries would let pass (null for a number, keys in another case,
// doubled keys, huge counts) is refused with the place where it stands.
type shape struct {
	kind   kind
	typ    string           // for messages: "a text", "a list" ...
	elem   *shape           // of a list
	fields []field          // of an object or tuple, in wire order
	byName map[string]int   // JSON name -> index
	byKey  map[uint64]int   // CBOR key -> index
	weight int              // memory of one element in units of 16 bytes
	limit  func(Limits) int // of a list: most elements
	noun   string           // of that limit
}

type field struct {
	name  string
	key   uint64
	shape *shape
}

type kind byte

const (
	kText kind = iota
	kInt
	kBool
	kValue
	kList
	kObject
	kTuple // array in CBOR, object in JSON
)

var (
	requestShape = sync.OnceValue(func() *shape { return shapeOf(reflect.TypeFor[Request]()) })
	pageShape    = sync.OnceValue(func() *shape { return shapeOf(reflect.TypeFor[Page]()) })
)

func shapeOf(t reflect.Type) *shape {
	s := &shape{weight: int(t.Size()+15) / 16}
	switch t.Kind() {
	case reflect.String:
		s.kind, s.typ = kText, "a text"
	case reflect.Int, reflect.Int64:
		s.kind, s.typ = kInt, "a whole number"
	case reflect.Bool:
		s.kind, s.typ = kBool, "true or false"
	case reflect.Pointer:
		if t.Elem().Kind() == reflect.String {
			s.kind, s.typ, s.weight = kValue, "a text or null", 1+int(unsafe.Sizeof(""))/16
			return s
		}
		return shapeOf(t.Elem())
	case reflect.Slice:
		s.kind, s.typ, s.elem = kList, "a list", shapeOf(t.Elem())
		switch t.Elem() {
		case reflect.TypeFor[Change]():
			s.limit, s.noun = func(l Limits) int { return l.Changes }, "changes"
		case reflect.TypeFor[Layout](), reflect.TypeFor[VerifyRows]():
			s.limit, s.noun = func(l Limits) int { return l.Tables }, "tables"
		case reflect.TypeFor[int]():
			s.limit, s.noun = func(Limits) int { return MaxVerifyBuckets }, "buckets"
		case reflect.TypeFor[Value](), reflect.TypeFor[Column]():
			s.limit, s.noun = func(l Limits) int { return l.Columns }, "columns"
		}
	case reflect.Struct:
		s.kind, s.typ = kObject, "an object"
		s.byName, s.byKey = map[string]int{}, map[uint64]int{}
		for i := range t.NumField() {
			f := t.Field(i)
			if f.Name == "_" {
				s.kind = kTuple
				continue
			}
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			key := uint64(len(s.fields))
			if num, _, ok := strings.Cut(f.Tag.Get("cbor"), ","); ok {
				key, _ = strconv.ParseUint(num, 10, 64)
			}
			s.byName[name], s.byKey[key] = len(s.fields), len(s.fields)
			s.fields = append(s.fields, field{name: name, key: key, shape: shapeOf(f.Type)})
		}
	default:
		panic("protocol: no wire form for " + t.String())
	}
	return s
}

// walk is what both walkers share.
type walk struct {
	data []byte
	pos  int
	lim  Limits
	left int // values that may still come
	path []string
}

func newWalk(data []byte, lim Limits) walk {
	left := lim.Values
	if left <= 0 {
		left = int(^uint(0) >> 1)
	}
	return walk{data: data, lim: lim, left: left}
}

func (w *walk) push(name string) { w.path = append(w.path, name) }
func (w *walk) pushIndex(i int)  { w.path = append(w.path, "["+strconv.Itoa(i)+"]") }
func (w *walk) pop()             { w.path = w.path[:len(w.path)-1] }

// where names the place of the walk in the message.
func (w *walk) where() string {
	if len(w.path) == 0 {
		return "byte " + strconv.Itoa(w.pos)
	}
	var b strings.Builder
	for i, p := range w.path {
		if i > 0 && p[0] != '[' {
			b.WriteByte('.')
		}
		b.WriteString(p)
	}
	return b.String() + " (byte " + strconv.Itoa(w.pos) + ")"
}

func (w *walk) malformed(format string, args ...any) error {
	e := refuse(CodeMalformed, format, args...)
	e.Message += ", at " + w.where()
	return e
}

// count takes n further elements of a list.
func (w *walk) count(s *shape, seen, n int) error {
	if s.limit != nil {
		if most := s.limit(w.lim); most > 0 && seen+n > most {
			return refuse(CodeTooBig, "more than %d %s at %s: send them in several sessions", most, s.noun, w.where())
		}
	}
	if n > w.left/s.elem.weight {
		return refuse(CodeTooBig, "more than %d values in one message, at %s: send smaller sessions", w.lim.Values, w.where())
	}
	w.left -= n * s.elem.weight
	return nil
}
