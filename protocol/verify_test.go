package protocol

import (
	"errors"
	"strings"
	"testing"
)

// TestVerificationRefused: what a server does not fully understand of a verification refuses the request.
func TestVerificationRefused(t *testing.T) {
	for name, c := range map[string]struct {
		verify string
		code   Code
	}{
		"not a power of two":     {`{"buckets":3}`, CodeMalformed},
		"negative":               {`{"buckets":-1}`, CodeMalformed},
		"too many buckets":       {`{"buckets":8192}`, CodeMalformed},
		"a bucket beyond":        {`{"buckets":4,"rows":[{"table":"a.b","buckets":[4]}]}`, CodeMalformed},
		"buckets not ascending":  {`{"buckets":4,"rows":[{"table":"a.b","buckets":[2,2]}]}`, CodeMalformed},
		"buckets without number": {`{"rows":[{"table":"a.b","buckets":[0]}]}`, CodeMalformed},
		"a table twice":          {`{"buckets":4,"rows":[{"table":"a.b","buckets":[0]},{"table":"a.b","buckets":[1]}]}`, CodeMalformed},
		"an endless list":        {`{"buckets":4,"rows":[{"table":"a.b","buckets":[` + strings.Repeat("0,", MaxVerifyBuckets) + `0]}]}`, CodeTooBig},
		"an unknown field":       {`{"bucket":4}`, CodeMalformed},
		"no time":                {`{"result":{"cursor":"","at":"now","rows":1,"different":0,"repaired":0,"more":false}}`, CodeMalformed},
		"a negative count":       {`{"result":{"cursor":"","at":"2026-11-22T20:15:00Z","rows":-1,"different":0,"repaired":0,"more":false}}`, CodeMalformed},
		"an unknown kind":        {`{"result":{"cursor":"","at":"2026-11-22T20:15:00Z","rows":1,"different":1,"repaired":0,"more":false,"sample":[{"table":"a.b","key":["1"],"kind":"odd"}]}}`, CodeMalformed},
		"an endless sample": {`{"result":{"cursor":"","at":"2026-11-22T20:15:00Z","rows":1,"different":1,"repaired":0,"more":false,"sample":[` +
			strings.Repeat(`{"table":"a.b","key":["1"],"kind":"extra"},`, MaxVerifySample) + `{"table":"a.b","key":["1"],"kind":"extra"}]}}`, CodeTooBig},
	} {
		body := `{"v":1,"incarnation":"` + inc + `","n":1,"nonce":"8c1f0a37d2b94e65","set":"field","verify":` + c.verify + `}`
		_, err := DecodeRequest([]byte(body), ContentJSON, DefaultLimits())
		var e *Error
		if !errors.As(err, &e) || e.Code != c.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := DecodeRequest([]byte(`{"v":1,"incarnation":"`+inc+`","n":1,"nonce":"8c1f0a37d2b94e65","set":"field","verify":{}}`), ContentJSON, DefaultLimits()); err != nil {
		t.Error(err)
	}
}

// TestRowHash: no two lists of values look alike, and the vector of docs/protocol.md is right.
func TestRowHash(t *testing.T) {
	seen := map[uint64]int{}
	for i, l := range [][]Value{nil, {nil}, {val("")}, {val("-")}, {nil, nil}, {val("a"), val("b")}, {val("ab")}, {val("1:a")}, {val("a"), nil}, {nil, val("a")}} {
		h := RowHash(l...)
		if j, ok := seen[h]; ok {
			t.Errorf("%d and %d have the same hash", i, j)
		}
		seen[h] = i
	}
	if got := HashText(RowHash(val("711"), val("2"), nil)); got != "26fd30a5808d859a" {
		t.Errorf("%s", got)
	}
}
