package protocol

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// text draws what may stand on the wire: any valid UTF-8, NUL included.
func text(t *rapid.T, name string) string {
	return rapid.StringOfN(rapid.Rune(), 0, 12, -1).Draw(t, name)
}

func values(t *rapid.T, name string) []Value {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Value {
		if rapid.Bool().Draw(t, "null") {
			return nil
		}
		s := text(t, "value")
		return &s
	}), 0, 5).Draw(t, name)
}

// some draws nil rather than an empty list: both are the same message where the field is left out when empty.
func some[T any](t *rapid.T, name string, gen func(*rapid.T) T) []T {
	l := rapid.SliceOfN(rapid.Custom(gen), 0, 4).Draw(t, name)
	if len(l) == 0 {
		return nil
	}
	return l
}

func orNil[T any](l []T) []T {
	if len(l) == 0 {
		return nil
	}
	return l
}

func drawRequest(t *rapid.T) *Request {
	r := &Request{
		V:           Version,
		Incarnation: rapid.StringMatching(`[0-9a-f]{32}`).Draw(t, "incarnation"),
		N:           rapid.Int64Range(1, 1<<62).Draw(t, "n"),
		Nonce:       rapid.StringMatching(`[0-9a-f]{16}`).Draw(t, "nonce"),
		Set:         rapid.StringMatching(`[a-z0-9_-]{1,20}`).Draw(t, "set"),
		Cursor:      text(t, "cursor"),
		Schema:      text(t, "schema"),
		Epoch:       text(t, "epoch"),
		Wait:        rapid.SampledFrom([]string{"", WaitMerge, WaitSource}).Draw(t, "wait"),
		App:         text(t, "app"),
		Changes: some(t, "changes", func(t *rapid.T) Change {
			return Change{
				Table: text(t, "table"), Op: rapid.SampledFrom([]string{Insert, Update, Delete, "x"}).Draw(t, "op"),
				Key: values(t, "key"), Version: text(t, "version"), Base: orNil(values(t, "base")), New: orNil(values(t, "new")),
				Unit: rapid.OneOf(rapid.Just(int64(0)), rapid.Int64Range(1, 1<<62)).Draw(t, "unit"),
			}
		}),
	}
	for i, n := 0, rapid.IntRange(0, 3).Draw(t, "layouts"); i < n; i++ {
		r.Columns = append(r.Columns, Layout{Table: strings.Repeat("t", i+1), Columns: rapid.SliceOfNDistinct(rapid.StringN(1, 9, -1), 0, 5, rapid.ID[string]).Draw(t, "columns")})
	}
	return r
}

func drawPage(t *rapid.T) *Page {
	p := &Page{
		V: Version, Incarnation: text(t, "incarnation"), N: rapid.Int64().Draw(t, "n"), Nonce: text(t, "nonce"),
		Reply: text(t, "reply"), Page: rapid.IntRange(1, 1<<30).Draw(t, "page"), Last: rapid.Bool().Draw(t, "last"),
		CursorFrom: text(t, "from"), Cursor: text(t, "to"), Epoch: text(t, "epoch"), Refresh: rapid.Bool().Draw(t, "refresh"),
		Sets: some(t, "sets", func(t *rapid.T) string { return text(t, "set") }), More: rapid.Bool().Draw(t, "more"), Rows: rapid.Int64().Draw(t, "rows"),
		Tables: some(t, "tables", func(t *rapid.T) TableRows {
			return TableRows{
				Table: text(t, "table"), Columns: some(t, "columns", func(t *rapid.T) string { return text(t, "column") }),
				Gone:    some(t, "gone", func(t *rapid.T) string { return text(t, "key") }),
				Deletes: some(t, "deletes", func(t *rapid.T) []Value { return values(t, "key") }),
				Rows:    some(t, "rows", func(t *rapid.T) Row { return Row{Version: text(t, "version"), Values: values(t, "values")} }),
			}
		}),
		Verdicts: some(t, "verdicts", func(t *rapid.T) Verdict {
			return Verdict{
				Incarnation: text(t, "incarnation"), N: rapid.Int64().Draw(t, "n"), Index: rapid.IntRange(0, 1<<30).Draw(t, "index"),
				Table: text(t, "table"), Key: values(t, "key"), State: text(t, "state"), Version: text(t, "version"),
				Code: Code(text(t, "code")), Detail: text(t, "detail"), Constraint: text(t, "constraint"), ID: rapid.Int64().Draw(t, "id"),
				Policy: text(t, "policy"),
			}
		}),
	}
	if rapid.Bool().Draw(t, "schema") {
		p.Schema = &Definitions{Hash: text(t, "hash"), Tables: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Table {
			return Table{
				Name: text(t, "name"), Key: rapid.SliceOfN(rapid.String(), 0, 2).Draw(t, "key"), SubsetKey: text(t, "subset"), Operations: "IUD",
				Columns: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Column {
					return Column{Name: text(t, "name"), Type: text(t, "type"), NotNull: rapid.Bool().Draw(t, "nn"), Default: text(t, "default")}
				}), 0, 3).Draw(t, "columns"),
				Unique: some(t, "unique", func(t *rapid.T) []string { return rapid.SliceOfN(rapid.String(), 0, 2).Draw(t, "u") }),
				Foreign: some(t, "foreign", func(t *rapid.T) ForeignKey {
					return ForeignKey{Columns: []string{text(t, "c")}, Table: text(t, "t"), Refers: []string{text(t, "r")}}
				}),
			}
		}), 0, 3).Draw(t, "tables")}
	}
	if rapid.Bool().Draw(t, "error") {
		p.Error = &Error{Code: CodeForked, Message: text(t, "message"), Retry: rapid.IntRange(0, 100).Draw(t, "retry")}
	}
	return p
}

func TestRoundTrip(t *testing.T) {
	for _, ct := range []string{ContentCBOR, ContentJSON} {
		t.Run(ct, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				r := drawRequest(t)
				data := must(t, r, ct)
				back, err := DecodeRequest(data, ct, DefaultLimits())
				if err != nil {
					t.Fatalf("%v in %q", err, data)
				}
				if !reflect.DeepEqual(r, back) {
					t.Fatalf("sent %+v\nread %+v", r, back)
				}
				p := drawPage(t)
				data = must(t, p, ct)
				pback, err := DecodePage(data, ct, DefaultLimits())
				if err != nil {
					t.Fatalf("%v in %q", err, data)
				}
				if again := must(t, pback, ct); !bytes.Equal(data, again) {
					t.Fatalf("not deterministic:\n%q\n%q", data, again)
				}
				if !reflect.DeepEqual(p, pback) {
					t.Fatalf("sent %+v\nread %+v", p, pback)
				}
			})
		})
	}
}

func TestCompressRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		data := rapid.SliceOf(rapid.Byte()).Draw(t, "data")
		enc := rapid.SampledFrom([]string{Identity, Zstd, Gzip}).Draw(t, "encoding")
		small, err := Compress(data, enc)
		if err != nil {
			t.Fatal(err)
		}
		back, err := Decompress(small, enc, len(data)+1)
		if err != nil || !bytes.Equal(data, back) {
			t.Fatalf("%v: %x, not %x", err, back, data)
		}
	})
}

func TestDecompressRefuses(t *testing.T) {
	bomb := make([]byte, 64<<20)
	for _, enc := range []string{Zstd, Gzip} {
		small, err := Compress(bomb, enc)
		if err != nil {
			t.Fatal(err)
		}
		_, err = Decompress(small, enc, 1<<20)
		wantCode(t, err, CodeTooBig)
		_, err = Decompress(small[:len(small)/2], enc, 0)
		wantCode(t, err, CodeMalformed)
		_, err = Decompress([]byte("plain text"), enc, 0)
		wantCode(t, err, CodeMalformed)
		_, err = Decompress(append(small, "tail"...), enc, len(bomb))
		wantCode(t, err, CodeMalformed)
	}
	_, err := Decompress(make([]byte, 11), Identity, 10)
	wantCode(t, err, CodeTooBig)
	_, err = Decompress(nil, "br", 10)
	wantCode(t, err, CodeContentType)
	_, err = Compress(nil, "br")
	wantCode(t, err, CodeContentType)
	// A frame that asks for a window of 512 MiB must not get it.
	huge := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x98, 0x01, 0x00, 0x00}
	_, err = Decompress(huge, Zstd, 1<<30)
	wantCode(t, err, CodeTooBig)
}

func wantCode(t testing.TB, err error, code Code) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("got %v, want %s", err, code)
	}
	if len(e.Message) < 10 {
		t.Fatalf("the message %q explains nothing", e.Message)
	}
}

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

func must(t fataler, msg any, ct string) []byte {
	t.Helper()
	data, err := Encode(msg, ct)
	if err != nil {
		t.Fatalf("encode: %v", err)
	}
	return data
}

const inc = "00112233445566778899aabbccddeeff"

func TestDecodeRefusesJSON(t *testing.T) {
	head := `{"v":1,"incarnation":"` + inc + `","n":1,"nonce":"x","set":"s"`
	for name, c := range map[string]struct {
		data string
		code Code
		says string
	}{
		"empty":             {"", CodeMalformed, "empty"},
		"blank":             {"  \n", CodeMalformed, "empty"},
		"not json":          {"hello", CodeMalformed, "'h'"},
		"list":              {"[]", CodeMalformed, "a list where an object"},
		"truncated":         {head, CodeMalformed, "too early"},
		"truncated text":    {head + `,"app":"x`, CodeMalformed, "inside a text"},
		"trailing":          {head + "} {}", CodeMalformed, "after the end"},
		"unknown field":     {head + `,"user":"eve"}`, CodeMalformed, `"user"`},
		"unknown deep":      {head + `,"changes":[{"table":"t","color":1}]}`, CodeMalformed, "changes[0]"},
		"other case":        {head + `,"Epoch":"x"}`, CodeMalformed, `"Epoch"`},
		"duplicate":         {head + `,"n":2}`, CodeMalformed, `"n" comes twice`},
		"duplicate escaped": {head + `,"\u006e":2}`, CodeMalformed, `"n" comes twice`},
		"null number":       {strings.Replace(head, `"n":1`, `"n":null`, 1) + "}", CodeMalformed, "null where a whole number"},
		"null text":         {head + `,"epoch":null}`, CodeMalformed, "null where a text"},
		"float":             {strings.Replace(head, `"n":1`, `"n":1.0`, 1) + "}", CodeMalformed, "1.0"},
		"exponent":          {strings.Replace(head, `"n":1`, `"n":1e400`, 1) + "}", CodeMalformed, "1e400"},
		"over 64 bits":      {strings.Replace(head, `"n":1`, `"n":9223372036854775808`, 1) + "}", CodeMalformed, "64 bits"},
		"minus zero":        {strings.Replace(head, `"n":1`, `"n":-0`, 1) + "}", CodeMalformed, "-0"},
		"number value":      {head + `,"changes":[{"table":"t","op":"I","key":[1]}]}`, CodeMalformed, "changes[0].key[0]"},
		"not utf-8":         {head + ",\"app\":\"\xff\"}", CodeMalformed, "UTF-8"},
		"half surrogate":    {head + `,"app":"\ud800"}`, CodeMalformed, "surrogate"},
		"control":           {head + ",\"app\":\"a\nb\"}", CodeMalformed, "control"},
		"bad escape":        {head + `,"app":"\x"}`, CodeMalformed, "escape"},
		"no comma":          {head + ` "app":"x"}`, CodeMalformed, "comma"},
		"deep":              {head + `,"changes":` + strings.Repeat("[", 5000), CodeMalformed, "a list where an object"},
		"version 0":         {strings.Replace(head, `"v":1`, `"v":0`, 1) + "}", CodeVersion, "version 0"},
		"version 999":       {strings.Replace(head, `"v":1`, `"v":999`, 1) + `,"future":{"a":[1]}}`, CodeVersion, "version 999"},
		"no version":        {`{}`, CodeVersion, "version 0"},
		"incarnation":       {strings.Replace(head, inc, "abc", 1) + "}", CodeMalformed, "incarnation"},
		"n 0":               {strings.Replace(head, `"n":1`, `"n":0`, 1) + "}", CodeMalformed, "field n"},
		"set":               {strings.Replace(head, `"s"`, `"a.b"`, 1) + "}", CodeName, `"a.b"`},
		"wait":              {head + `,"wait":"long"}`, CodeMalformed, "wait"},
		"oldest":            {head + `,"oldest":"yesterday"}`, CodeMalformed, "oldest"},
		"app too long":      {head + `,"app":"` + strings.Repeat("x", 513) + `"}`, CodeMalformed, "app"},
		"layout twice":      {head + `,"columns":[{"table":"t","columns":[]},{"table":"t","columns":[]}]}`, CodeMalformed, "twice"},
		"negative unit":     {head + `,"changes":[{"table":"t","op":"D","key":["1"],"unit":-1}]}`, CodeMalformed, "changes[0].unit"},
		"unit as text":      {head + `,"changes":[{"table":"t","op":"D","key":["1"],"unit":"1"}]}`, CodeMalformed, "a text where a whole number"},
		"column twice":      {head + `,"columns":[{"table":"t","columns":["a","a"]}]}`, CodeMalformed, "twice"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := DecodeRequest([]byte(c.data), ContentJSON, DefaultLimits())
			wantCode(t, err, c.code)
			if !strings.Contains(err.Error(), c.says) {
				t.Fatalf("%q does not say %q", err, c.says)
			}
		})
	}
}

func TestDecodeRefusesCBOR(t *testing.T) {
	good := must(t, &Request{V: 1, Incarnation: inc, N: 1, Nonce: "x", Set: "s", App: "a"}, ContentCBOR)
	if good[0] != 0xa6 {
		t.Fatalf("%x is not a map of six", good[0])
	}
	grown := func(tail ...byte) []byte { // one pair more
		b := append([]byte{good[0] + 1}, good[1:]...)
		return append(b, tail...)
	}
	for name, c := range map[string]struct {
		data []byte
		code Code
		says string
	}{
		"empty":           {nil, CodeMalformed, "empty"},
		"random":          {[]byte{0xff, 0x00, 0x17}, CodeMalformed, "indefinite"},
		"list":            {[]byte{0x80}, CodeMalformed, "a list where an object"},
		"truncated":       {good[:len(good)-1], CodeMalformed, "only 0 follow"},
		"truncated head":  {good[:1], CodeMalformed, "too early"},
		"trailing":        {append(good[:len(good):len(good)], 0), CodeMalformed, "1 bytes after"},
		"unknown field":   {grown(0x18, 99, 0), CodeMalformed, "unknown field 99"},
		"text key":        {grown(0x61, 'v', 1), CodeMalformed, "a text as a map key"},
		"duplicate":       {grown(3, 2), CodeMalformed, "field 3 (n) comes twice"},
		"null text":       {grown(8, 0xf6), CodeMalformed, "null where a text"},
		"byte string":     {grown(8, 0x41, 'x'), CodeMalformed, "a byte string where a text"},
		"float":           {grown(8, 0xf9, 0, 0), CodeMalformed, "floats"},
		"tag":             {grown(8, 0xc0, 0x61, 'x'), CodeMalformed, "a tag where a text"},
		"indefinite":      {grown(11, 0x9f, 0xff), CodeMalformed, "indefinite"},
		"reserved":        {grown(11, 0x9c), CodeMalformed, "reserved"},
		"huge list":       {grown(11, 0x9b, 0, 0, 0, 0xff, 0, 0, 0, 0), CodeMalformed, "only 0 bytes follow"},
		"huge text":       {grown(8, 0x7b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), CodeMalformed, "only 0 follow"},
		"not utf-8":       {grown(8, 0x61, 0xff), CodeMalformed, "UTF-8"},
		"version 999":     {[]byte{0xa2, 1, 0x19, 0x03, 0xe7, 0x18, 0x63, 0x80}, CodeVersion, "999"},
		"negative n":      {[]byte{0xa5, 1, 1, 2, 0x60, 3, 0x20, 4, 0x60, 5, 0x60}, CodeMalformed, "incarnation"},
		"n over 63 bits":  {[]byte{0xa1, 3, 0x1b, 0xff, 0, 0, 0, 0, 0, 0, 0}, CodeMalformed, "64 bits"},
		"value is number": {grown(11, 0x81, 0xa1, 3, 0x81, 1), CodeMalformed, "changes[0].key[0]"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := DecodeRequest(c.data, ContentCBOR, DefaultLimits())
			wantCode(t, err, c.code)
			if !strings.Contains(err.Error(), c.says) {
				t.Fatalf("%q does not say %q", err, c.says)
			}
		})
	}
	row := must(t, &Page{V: 1, Tables: []TableRows{{Table: "t", Rows: []Row{{Version: "1", Values: nil}}}}}, ContentCBOR)
	if i := bytes.LastIndexByte(row, 0x82); i < 0 {
		t.Fatal("no row found")
	} else {
		row[i] = 0x81
	}
	_, err := DecodePage(row, ContentCBOR, DefaultLimits())
	wantCode(t, err, CodeMalformed)
}

func TestLimits(t *testing.T) {
	lim := DefaultLimits()
	lim.Changes, lim.Columns, lim.Tables = 3, 3, 2
	many := &Request{V: 1, Incarnation: inc, N: 1, Nonce: "x", Set: "s"}
	for range 4 {
		many.Changes = append(many.Changes, Change{Table: "t", Op: Delete, Key: []Value{nil}})
	}
	wide := &Request{V: 1, Incarnation: inc, N: 1, Nonce: "x", Set: "s", Changes: []Change{{New: make([]Value, 4)}}}
	layout := &Request{V: 1, Incarnation: inc, N: 1, Nonce: "x", Set: "s", Columns: []Layout{{Table: "t", Columns: []string{"a", "b", "c", "d"}}}}
	layouts := &Request{V: 1, Incarnation: inc, N: 1, Nonce: "x", Set: "s", Columns: []Layout{{Table: "a"}, {Table: "b"}, {Table: "c"}}}
	for _, ct := range []string{ContentCBOR, ContentJSON} {
		for i, r := range []*Request{many, wide, layout, layouts} {
			_, err := DecodeRequest(must(t, r, ct), ct, lim)
			if err == nil {
				t.Fatalf("case %d passed", i)
			}
			wantCode(t, err, CodeTooBig)
		}
		few := lim
		few.Changes, few.Values = 0, 20
		_, err := DecodeRequest(must(t, many, ct), ct, few)
		wantCode(t, err, CodeTooBig)
		few = lim
		few.Decompressed = 10
		_, err = DecodeRequest(must(t, many, ct), ct, few)
		wantCode(t, err, CodeTooBig)
	}
	_, err := DecodeRequest(nil, "text/plain", lim)
	wantCode(t, err, CodeContentType)
	_, err = Encode(many, "text/plain")
	wantCode(t, err, CodeContentType)
}

func TestContentType(t *testing.T) {
	for in, want := range map[string]string{
		"application/cbor": ContentCBOR, "application/json": ContentJSON, "Application/JSON; charset=UTF-8": ContentJSON,
		"": "", "text/json": "", "application/json; charset=latin1": "", "application/json; x=y": "", "json": "",
	} {
		got, err := ContentType(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

func TestNames(t *testing.T) {
	for _, good := range []string{"a", "anna", "phone-1", "a_b", "0", strings.Repeat("x", 64)} {
		if !ValidName(good) {
			t.Errorf("%q refused", good)
		}
	}
	for _, bad := range []string{"", "A", "a.b", "*", ">", "a b", "a*", "ä", "日本", "a\x00", strings.Repeat("x", 65), "a/b", "a\n"} {
		if ValidName(bad) {
			t.Errorf("%q taken", bad)
		}
	}
	tok := SessionToken(inc, 42)
	if i, n, err := ParseSession(tok); err != nil || i != inc || n != 42 {
		t.Errorf("%s: %s %d %v", tok, i, n, err)
	}
	for _, bad := range []string{"", "-", inc, inc + "-", inc + "-0", inc + "-01", inc + "-+1", inc + "--1", inc + "-1-1", inc[1:] + "-1", strings.ToUpper(inc) + "-1", inc + "-99999999999999999999"} {
		_, _, err := ParseSession(bad)
		wantCode(t, err, CodeName)
	}
	if i, k, err := ParsePart(PartToken(2, 3)); err != nil || i != 2 || k != 3 {
		t.Errorf("%d %d %v", i, k, err)
	}
	for _, bad := range []string{"", "1", "0-1", "2-1", "1-0", "01-1", "1-10000", "-1-1", "a-b", "1-1-1"} {
		_, _, err := ParsePart(bad)
		wantCode(t, err, CodeSeries)
	}
}
