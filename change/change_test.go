package change

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestHeaderRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := Message{Run: "a1b2", Seq: rapid.Uint64Min(1).Draw(t, "seq"), Start: LSN(rapid.Uint64().Draw(t, "start")), Prev: LSN(rapid.Uint64().Draw(t, "prev")),
			Part: rapid.IntRange(1, 1<<20).Draw(t, "part"), Last: rapid.Bool().Draw(t, "last"), Txs: rapid.IntRange(0, 1<<20).Draw(t, "txs"),
			Rows: rapid.IntRange(0, 1<<20).Draw(t, "rows"), Body: []byte("body")}
		if m.Last {
			m.End = LSN(rapid.Uint64().Draw(t, "end"))
		}
		if rapid.Bool().Draw(t, "tables") {
			m.Tables = []string{"public.a", "public.b"}
		}
		got, err := Parse(m.Header(), m.Body)
		if err != nil || !reflect.DeepEqual(got, m) {
			t.Fatalf("got %+v, %v; want %+v", got, err, m)
		}
	})
}

func TestParseRefusesWhatIsNotChangeData(t *testing.T) {
	good := (&Message{Run: "r", Seq: 1, Part: 1, Last: true}).Header()
	if _, err := Parse(good, nil); err != nil {
		t.Fatal(err)
	}
	for name := range good {
		if name == hLast {
			continue
		}
		for _, v := range [][]string{nil, {}, {""}, {"x"}, {"1", "1"}, {"-1"}, {"99999999999999999999999"}} {
			h := map[string][]string{}
			for k, w := range good {
				h[k] = w
			}
			h[name] = v
			if name == hRun && len(v) == 1 && v[0] != "" {
				continue
			}
			if (name == hTxs || name == hRows) && len(v) == 1 && v[0] == "-1" {
				continue
			}
			if _, err := Parse(h, nil); !errors.Is(err, ErrNotChangeData) {
				t.Errorf("%s=%q: %v", name, v, err)
			}
		}
	}
}

func TestLSN(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := LSN(rapid.Uint64().Draw(t, "lsn"))
		if got, err := ParseLSN(l.String()); err != nil || got != l {
			t.Fatalf("%s: %v %v", l, got, err)
		}
	})
	for _, bad := range []string{"", "/", "1", "1/", "/1", "1/2/3", "g/1", "100000000/0", "0/100000000", " 0/1", "-1/0"} {
		if l, err := ParseLSN(bad); err == nil {
			t.Errorf("%q is %s", bad, l)
		}
	}
}

// Frames come out as they went in, however the body was cut.
func TestFramesSurviveCutting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 0, 300), 0, 20).Draw(t, "frames")
		var body []byte
		for _, f := range want {
			body = AppendFrame(body, f)
		}
		var f Frames
		var got [][]byte
		for len(body) > 0 {
			n := rapid.IntRange(1, len(body)).Draw(t, "cut")
			part := bytes.Clone(body[:n])
			if err := f.Feed(part, func(frame []byte) error { got = append(got, bytes.Clone(frame)); return nil }); err != nil {
				t.Fatal(err)
			}
			clear(part) // nothing may hold on to it
			body = body[n:]
		}
		if !f.Done() || len(got) != len(want) || !slices.EqualFunc(got, want, bytes.Equal) {
			t.Fatalf("got %q, want %q, done %v", got, want, f.Done())
		}
	})
}

// A frame over many parts must not cost its length squared.
func TestLargeFrameOverManyParts(t *testing.T) {
	body := AppendFrame(nil, bytes.Repeat([]byte("x"), 64<<20))
	var f Frames
	began, got := time.Now(), 0
	for len(body) > 0 {
		n := min(len(body), 8<<10)
		if err := f.Feed(body[:n], func(frame []byte) error { got = len(frame); return nil }); err != nil {
			t.Fatal(err)
		}
		body = body[n:]
	}
	if got != 64<<20 || !f.Done() {
		t.Fatalf("%d bytes", got)
	}
	if took := time.Since(began); took > 20*time.Second { // squared it would copy 256 GiB
		t.Errorf("took %s", took)
	}
}

func relation(id uint32, identity byte, columns ...string) []byte {
	b := binary.BigEndian.AppendUint32([]byte{'R'}, id)
	b = append(b, "public\x00tbl\x00"...)
	b = append(b, identity)
	b = binary.BigEndian.AppendUint16(b, uint16(len(columns)))
	for i, c := range columns {
		b = append(b, byte(1-min(i, 1)))
		b = append(b, c+"\x00"...)
		b = binary.BigEndian.AppendUint32(b, 25)
		b = binary.BigEndian.AppendUint32(b, 0xffffffff)
	}
	return b
}

func tuple(b []byte, vals ...*string) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(vals)))
	for _, v := range vals {
		switch {
		case v == nil:
			b = append(b, 'n')
		case *v == "<unchanged>":
			b = append(b, 'u')
		default:
			b = binary.BigEndian.AppendUint32(append(b, 't'), uint32(len(*v)))
			b = append(b, *v...)
		}
	}
	return b
}

func p(s string) *string { return &s }

func frames() map[string][]byte {
	begin := binary.BigEndian.AppendUint64([]byte{'B'}, 0x16B374D848)
	begin = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(begin, 1_000_001), 77)
	commit := binary.BigEndian.AppendUint64([]byte{'C', 0}, 0x10)
	commit = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(commit, 0x18), 0)
	id := binary.BigEndian.AppendUint32(nil, 5)
	return map[string][]byte{
		"begin":    begin,
		"commit":   commit,
		"relation": relation(5, 'd', "id", "v"),
		"insert":   tuple(append(append([]byte{'I'}, id...), 'N'), p("1"), nil),
		"update":   tuple(append(append([]byte{'U'}, id...), 'N'), p("1"), p("<unchanged>")),
		"move":     tuple(append(tuple(append(append([]byte{'U'}, id...), 'K'), p("0"), nil), 'N'), p("1"), p("x")),
		"delete":   tuple(append(append([]byte{'D'}, id...), 'O'), p("1"), p("x")),
		"truncate": append(binary.BigEndian.AppendUint32([]byte{'T'}, 1), append([]byte{0}, id...)...),
	}
}

func TestDecode(t *testing.T) {
	var ev Event
	decode := func(name string) *Event {
		t.Helper()
		if ok, err := Decode(frames()[name], &ev); !ok || err != nil {
			t.Fatalf("%s: %v %v", name, ok, err)
		}
		return &ev
	}
	if e := decode("begin"); e.LSN.String() != "16/B374D848" || e.XID != 77 || e.Time.Format(time.RFC3339Nano) != "2000-01-01T00:00:01.000001Z" {
		t.Errorf("begin %+v", e)
	}
	if e := decode("relation"); e.Relation.Name != "tbl" || e.Relation.Schema != "public" || len(e.Relation.Columns) != 2 || !e.Relation.Columns[0].Key || e.Relation.Columns[1].Key {
		t.Errorf("relation %+v", e.Relation)
	}
	if e := decode("update"); e.Old != nil || len(e.New) != 2 || e.New[0] != (Value{Text, "1"}) || e.New[1].State != Unchanged {
		t.Errorf("update %+v", e)
	}
	if e := decode("move"); !e.Key || e.Old[0].Text != "0" || e.New[1].Text != "x" {
		t.Errorf("move %+v", e)
	}
	kept := ev.New[1].Text
	if e := decode("delete"); e.Key || e.New != nil || e.Old[1].Text != "x" {
		t.Errorf("delete %+v", e)
	}
	if e := decode("insert"); e.Old != nil || e.New[1].State != Null {
		t.Errorf("insert %+v", e)
	}
	if e := decode("truncate"); len(e.IDs) != 1 || e.IDs[0] != 5 {
		t.Errorf("truncate %+v", e)
	}
	if e := decode("commit"); e.LSN != 0x18 || e.New != nil || e.Old != nil {
		t.Errorf("commit %+v", e)
	}
	if kept != "x" {
		t.Errorf("a kept string became %q", kept)
	}
	for _, quiet := range []string{"O", "Y", "M"} {
		if ok, err := Decode([]byte(quiet+"anything"), &ev); ok || err != nil {
			t.Errorf("%s: %v %v", quiet, ok, err)
		}
	}
	for name, frame := range frames() {
		for n := range len(frame) {
			if _, err := Decode(frame[:n], &ev); !errors.Is(err, ErrNotChangeData) {
				t.Errorf("%s cut to %d bytes: %v", name, n, err)
			}
		}
		if _, err := Decode(append(slices.Clone(frame), 0), &ev); !errors.Is(err, ErrNotChangeData) {
			t.Errorf("%s with a trailing byte: %v", name, err)
		}
	}
	if _, err := Decode([]byte("Z"), &ev); !errors.Is(err, ErrNotChangeData) {
		t.Errorf("an unknown kind: %v", err)
	}
}

// No input may panic, hang or be taken for something else than it is.
func FuzzDecode(f *testing.F) {
	for _, frame := range frames() {
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		var ev Event
		ok, err := Decode(frame, &ev)
		if err != nil && !errors.Is(err, ErrNotChangeData) {
			t.Fatalf("error of another kind: %v", err)
		}
		ids, rerr := RelationOf(frame, nil)
		if err == nil && ok {
			if rerr != nil {
				t.Fatalf("decodes, but its relations do not: %v", rerr)
			}
			if ev.Kind == KindInsert && (len(ids) != 1 || ids[0] != ev.ID) {
				t.Fatalf("relations %v of %+v", ids, ev)
			}
		}
		if lsn, _, berr := BoundaryOf(frame); berr == nil && err == nil && lsn != ev.LSN {
			t.Fatalf("boundary %s, decoded %s", lsn, ev.LSN)
		}
	})
}

func FuzzFrames(f *testing.F) {
	f.Add([]byte{3, 'a', 'b', 'c', 0, 1}, 2)
	f.Add(bytes.Repeat([]byte{0xff}, 20), 5)
	f.Fuzz(func(t *testing.T, body []byte, cut int) {
		cut = max(0, min(cut, len(body)))
		var one, two Frames
		var a, b []string
		err1 := one.Feed(body, func(frame []byte) error { a = append(a, string(frame)); return nil })
		err2 := two.Feed(body[:cut], func(frame []byte) error { b = append(b, string(frame)); return nil })
		if err2 == nil {
			err2 = two.Feed(body[cut:], func(frame []byte) error { b = append(b, string(frame)); return nil })
		}
		if (err1 == nil) != (err2 == nil) || strings.Join(a, "|") != strings.Join(b, "|") || (err1 == nil && one.Done() != two.Done()) {
			t.Fatalf("whole: %q %v; cut at %d: %q %v", a, err1, cut, b, err2)
		}
	})
}
