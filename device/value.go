package device

import (
	"encoding/hex"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"unicode/utf8"
)

// kind says how a column's values are kept in SQLite. On the wire every value is PostgreSQL text.
type kind byte

const (
	kindText   kind = iota // everything without a type of SQLite's: numeric, dates, uuid, json, arrays ...
	kindInt                // smallint, integer, bigint
	kindBool               // 0 and 1
	kindFloat              // double precision; NaN and the infinities are texts
	kindFloat4             // real: the same, with PostgreSQL's shorter notation
	kindBlob               // bytea
)

func kindOf(pgType string) kind {
	switch pgType {
	case "smallint", "integer", "bigint":
		return kindInt
	case "boolean":
		return kindBool
	case "double precision":
		return kindFloat
	case "real":
		return kindFloat4
	case "bytea":
		return kindBlob
	}
	return kindText
}

// declared is the column type in CREATE TABLE. BIGINT where INTEGER would make the column an alias of the rowid,
// which SQLite fills in by itself: two devices would then invent the same keys.
func (k kind) declared() string {
	switch k {
	case kindInt, kindBool:
		return "BIGINT"
	case kindFloat, kindFloat4:
		return "REAL"
	case kindBlob:
		return "BLOB"
	}
	return "TEXT"
}

// toWire renders what SQLite holds as canonical PostgreSQL text. SQLite lets any type stand in any column; what does
// not fit is rendered as it is, and the server refuses that record alone.
func toWire(k kind, v any) *string {
	var s string
	switch v := v.(type) {
	case nil:
		return nil
	case int64:
		switch {
		case k == kindBool && v == 0:
			s = "f"
		case k == kindBool && v == 1:
			s = "t"
		default:
			s = strconv.FormatInt(v, 10)
		}
	case float64:
		s = formatFloat(v, k == kindFloat4)
	case bool:
		s = "f"
		if v {
			s = "t"
		}
	case string:
		s = v
		if k == kindBlob {
			s = `\x` + hex.EncodeToString([]byte(v))
		}
	case []byte:
		s = string(v)
		if k == kindBlob {
			s = `\x` + hex.EncodeToString(v)
		}
	}
	return &s
}

// fromWire gives what SQLite shall hold for a PostgreSQL text. It takes only what toWire gives back letter for
// letter; anything else stays text, so that nothing is lost on the way. SQLite's REAL columns turn minus zero into zero,
// also when it is a text: it is the blob x'2d30' there.
func fromWire(k kind, s *string) any {
	if s == nil {
		return nil
	}
	switch k {
	case kindInt:
		if n, err := strconv.ParseInt(*s, 10, 64); err == nil && strconv.FormatInt(n, 10) == *s {
			return n
		}
	case kindBool:
		switch *s {
		case "t":
			return int64(1)
		case "f":
			return int64(0)
		}
	case kindFloat, kindFloat4:
		if strings.TrimLeft(*s, "-0123456789.e+") != "" { // NaN and Infinity; ParseFloat would take hexadecimal too
			break
		}
		if *s == "-0" {
			return []byte(*s)
		}
		if f, err := strconv.ParseFloat(*s, 64); err == nil && formatFloat(f, k == kindFloat4) == *s {
			return f
		}
	case kindBlob:
		if h, ok := strings.CutPrefix(*s, `\x`); ok {
			if b, err := hex.DecodeString(h); err == nil && strings.ToLower(h) == h {
				return b
			}
		}
	}
	return *s
}

// formatFloat is PostgreSQL's output with extra_float_digits above 0: the shortest text that reads back as the same
// number, with an exponent below -4 and from 15 digits on (6 for real).
func formatFloat(f float64, single bool) string {
	switch {
	case math.IsNaN(f):
		return "NaN"
	case math.IsInf(f, 1):
		return "Infinity"
	case math.IsInf(f, -1):
		return "-Infinity"
	case f == 0:
		if math.Signbit(f) {
			return "-0"
		}
		return "0"
	}
	sci := strconv.FormatFloat(f, 'e', -1, 64)
	if halfway(sci) {
		// A text just between two numbers reads back as this one by rounding to even only. PostgreSQL does not count on
		// that: it writes more digits.
		for n := 0; n <= 17; n++ {
			if s := strconv.FormatFloat(f, 'e', n, 64); !halfway(s) {
				if g, err := strconv.ParseFloat(s, 64); err == nil && g == f {
					sci = s
					break
				}
			}
		}
	}
	mantissa, e, _ := strings.Cut(sci, "e")
	exp, _ := strconv.Atoi(e)
	most := 15
	if single {
		most = 6
	}
	if exp < -4 || exp >= most {
		return sci
	}
	digits := strings.Count(mantissa, "") - 1 - strings.Count(mantissa, "-") - strings.Count(mantissa, ".")
	return strconv.FormatFloat(f, 'f', max(0, digits-1-exp), 64)
}

// halfway tells whether a number in scientific notation is exactly the middle of two neighbouring doubles: then its odd
// part has 54 bits, one more than fit.
func halfway(sci string) bool {
	mantissa, e, _ := strings.Cut(strings.TrimLeft(sci, "-"), "e")
	whole, fraction, _ := strings.Cut(mantissa, ".")
	exp, _ := strconv.Atoi(e)
	exp -= len(fraction)
	q, err := strconv.ParseUint(whole+fraction, 10, 64)
	if err != nil || q == 0 {
		return false
	}
	for ; exp < 0; exp++ {
		if q%5 != 0 { // not a fraction of powers of two
			return false
		}
		q /= 5
	}
	for ; exp > 0; exp-- {
		if q >>= bits.TrailingZeros64(q); q >= 1<<54 {
			return false
		}
		q *= 5
	}
	return bits.Len64(q>>bits.TrailingZeros64(q)) == 54
}

// sameWire compares two values as the wire would carry them: what differs only in SQLite's storage is no edit.
func sameWire(a, b *string) bool {
	return a == b || a != nil && b != nil && *a == *b
}

func sameImage(a, b []*string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !sameWire(a[i], b[i]) {
			return false
		}
	}
	return true
}

func validText(vals []*string) (bad int, ok bool) {
	for i, v := range vals {
		if v != nil && !utf8.ValidString(*v) {
			return i, false
		}
	}
	return 0, true
}

func imageSize(vals []*string) int {
	n := len(vals)
	for _, v := range vals {
		if v != nil {
			n += len(*v) + 4
		}
	}
	return n
}
