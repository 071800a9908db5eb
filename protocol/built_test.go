package protocol

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

// TestBuilt: what an application says that it was built for is taken or refused alike on the device and at the server.
func TestBuilt(t *testing.T) {
	long := strings.Repeat("x", 400)
	many := make([]Layout, 700)
	for i := range many {
		many[i] = Layout{Table: long + string(rune('a'+i%26)) + strings.Repeat("y", i/26)}
	}
	for _, tc := range []struct {
		name  string
		built Built
		want  Code
	}{
		{"nothing", Built{}, ""},
		{"a table whole, another by columns", Built{Name: "spring", Tables: []Layout{{Table: "a.b"}, {Table: "a.c", Columns: []string{"x", "y"}}}}, ""},
		{"a table twice", Built{Tables: []Layout{{Table: "a.b"}, {Table: "a.b"}}}, CodeMalformed},
		{"a column twice", Built{Tables: []Layout{{Table: "a.b", Columns: []string{"x", "x"}}}}, CodeMalformed},
		{"no table", Built{Tables: []Layout{{Columns: []string{"x"}}}}, CodeMalformed},
		{"a NUL, which PostgreSQL cannot store", Built{Tables: []Layout{{Table: "a.b", Columns: []string{"x\x00"}}}}, CodeMalformed},
		{"a NUL in the name", Built{Name: "\x00", Tables: []Layout{{Table: "a.b"}}}, CodeMalformed},
		{"a long name", Built{Name: long + long}, CodeMalformed},
		{"a long column", Built{Tables: []Layout{{Table: "a.b", Columns: []string{long + long}}}}, CodeMalformed},
		{"much", Built{Tables: many}, CodeTooBig},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req := Request{V: Version, Incarnation: inc, N: 1, Nonce: "n", Set: "s", Built: &tc.built}
			for _, ct := range []string{ContentCBOR, ContentJSON} {
				data, err := Encode(&req, ct)
				if err != nil {
					t.Fatal(err)
				}
				back, err := DecodeRequest(data, ct, DefaultLimits())
				if code(err) != tc.want || tc.want == "" && !reflect.DeepEqual(back.Built.Tables, tc.built.Tables) && len(tc.built.Tables) > 0 {
					t.Errorf("%s: %v, want %q", ct, err, tc.want)
				}
			}
			if err := tc.built.Check(); code(err) != tc.want {
				t.Errorf("on the device: %v, want %q", err, tc.want)
			}
		})
	}
	for _, text := range []string{``, `{`, `[]`, `{"tables": []} {}`, `{"table": []}`, `{"tables": [{"table": "a.b"}, {"table": "a.b"}]}`} {
		if b, err := ParseBuilt([]byte(text)); err == nil {
			t.Errorf("%s was read as %+v", text, b)
		}
	}
}

func code(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}
