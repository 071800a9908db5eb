package protocol

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"mime"
	"strings"
	"sync"
	"time"

	"github.com/fxamacker/cbor/v2"
)

var cborEncoder = sync.OnceValues(func() (cbor.EncMode, error) { return cbor.CoreDetEncOptions().EncMode() })

var cborDecoder = sync.OnceValues(func() (cbor.DecMode, error) {
	return cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		UTF8:              cbor.UTF8RejectInvalid,
		MaxNestedLevels:   16,
		// The walk along the shape has counted before; the library's own limits must not be narrower.
		MaxArrayElements: math.MaxInt32,
	}.DecMode()
})

// ContentType reduces a Content-Type header to ContentCBOR or ContentJSON. A parameter other than charset=utf-8 is refused.
func ContentType(header string) (string, error) {
	t, params, err := mime.ParseMediaType(header)
	if err == nil && (t == ContentCBOR || t == ContentJSON) {
		cs, ok := params["charset"]
		if len(params) == 0 || len(params) == 1 && ok && strings.EqualFold(cs, "utf-8") {
			return t, nil
		}
	}
	return "", refuse(CodeContentType, "content type %s is not known: use %s or %s", excerpt(header), ContentCBOR, ContentJSON)
}

// Encode renders a message. Equal messages give equal bytes.
func Encode(msg any, contentType string) ([]byte, error) {
	switch contentType {
	case ContentCBOR:
		enc, err := cborEncoder()
		if err != nil {
			return nil, err
		}
		return enc.Marshal(msg)
	case ContentJSON:
		var out bytes.Buffer
		enc := json.NewEncoder(&out)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(msg); err != nil {
			return nil, err
		}
		return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
	}
	return nil, refuse(CodeContentType, "content type %s is not known: use %s or %s", excerpt(contentType), ContentCBOR, ContentJSON)
}

// DecodeRequest reads a request from its decompressed bytes. It refuses as a whole what is not fully understood
// (malformed), another version (protocol_version), and what is over a limit (too_big). What is wrong with one
// change alone (unknown table, missing key, bad value ...) is left to intake, which refuses that change alone.
func DecodeRequest(data []byte, contentType string, lim Limits) (*Request, error) {
	if lim.Decompressed > 0 && len(data) > lim.Decompressed {
		return nil, refuse(CodeTooBig, "the request has %d bytes, the limit is %d: send smaller sessions", len(data), lim.Decompressed)
	}
	var r Request
	if err := decode(data, contentType, requestShape(), lim, &r); err != nil {
		return nil, err
	}
	return &r, r.check(lim)
}

// DecodePage reads one page of a reply from its decompressed bytes.
func DecodePage(data []byte, contentType string, lim Limits) (*Page, error) {
	if lim.Decompressed > 0 && len(data) > lim.Decompressed {
		return nil, refuse(CodeTooBig, "the page has %d bytes, the limit is %d", len(data), lim.Decompressed)
	}
	var p Page
	if err := decode(data, contentType, pageShape(), lim, &p); err != nil {
		return nil, err
	}
	if p.V != Version {
		return nil, versionError(int64(p.V))
	}
	return &p, nil
}

func decode(data []byte, contentType string, s *shape, lim Limits, into any) error {
	var check func([]byte, *shape, Limits) error
	var unmarshal, peek func([]byte, any) error
	switch contentType {
	case ContentCBOR:
		dec, err := cborDecoder()
		if err != nil {
			return err
		}
		check, unmarshal, peek = checkCBOR, dec.Unmarshal, cbor.Unmarshal
	case ContentJSON:
		check, unmarshal, peek = checkJSON, json.Unmarshal, json.Unmarshal
	default:
		return refuse(CodeContentType, "content type %s is not known: use %s or %s", excerpt(contentType), ContentCBOR, ContentJSON)
	}
	if err := check(data, s, lim); err != nil {
		// A later version may well look different: then its number is the answer, not the first difference.
		var v struct {
			V int64 `cbor:"1,keyasint" json:"v"`
		}
		var e *Error
		if errors.As(err, &e) && e.Code == CodeMalformed && peek(data, &v) == nil && v.V != Version && v.V != 0 {
			return versionError(v.V)
		}
		return err
	}
	if err := unmarshal(data, into); err != nil {
		return refuse(CodeMalformed, "%v", err)
	}
	return nil
}

func versionError(v int64) error {
	return refuse(CodeVersion, "protocol version %d: this server speaks version %d; update the device or the server", v, Version)
}

// check judges what concerns the request as a whole.
func (r *Request) check(lim Limits) error {
	if r.V != Version {
		return versionError(int64(r.V))
	}
	bad := func(field, want string) error {
		return refuse(CodeMalformed, "field %s must be %s", field, want)
	}
	switch {
	case !ValidIncarnation(r.Incarnation):
		return bad("incarnation", "32 lower-case hex digits")
	case r.N < 1:
		return bad("n", "a number from 1")
	case r.Nonce == "" || len(r.Nonce) > 64:
		return bad("nonce", "1 to 64 bytes of text")
	case !ValidName(r.Set):
		return refuse(CodeName, "set name %s is not [a-z0-9_-]{1,64}", excerpt(r.Set))
	case r.Wait != "" && r.Wait != WaitMerge && r.Wait != WaitSource:
		return bad("wait", `"", "merge" or "source"`)
	}
	if r.Oldest != "" {
		if _, err := time.Parse(time.RFC3339, r.Oldest); err != nil {
			return bad("oldest", "an RFC 3339 time")
		}
	}
	for _, f := range []struct{ name, value string }{{"cursor", r.Cursor}, {"schema", r.Schema}, {"epoch", r.Epoch}, {"app", r.App}} {
		if lim.Name > 0 && len(f.value) > lim.Name {
			return bad(f.name, fmt.Sprintf("at most %d bytes", lim.Name))
		}
	}
	for i := range r.Changes {
		if r.Changes[i].Unit < 0 {
			return bad(fmt.Sprintf("changes[%d].unit", i), "a number from 1, or left out")
		}
	}
	if err := r.Verify.check(lim); err != nil {
		return err
	}
	if err := checkLayouts("columns", r.Columns, lim); err != nil {
		return err
	}
	return r.Built.check(lim)
}

func checkLayouts(field string, layouts []Layout, lim Limits) error {
	tables := make(map[string]bool, len(layouts))
	for i, l := range layouts {
		if tables[l.Table] {
			return refuse(CodeMalformed, "%s[%d]: table %s comes twice", field, i, excerpt(l.Table))
		}
		tables[l.Table] = true
		if lim.Columns > 0 && len(l.Columns) > lim.Columns {
			return refuse(CodeTooBig, "%s[%d]: %d columns, the limit is %d", field, i, len(l.Columns), lim.Columns)
		}
		if lim.Name > 0 && len(l.Table) > lim.Name {
			return refuse(CodeMalformed, "%s[%d]: a table name of %d bytes", field, i, len(l.Table))
		}
		names := make(map[string]bool, len(l.Columns))
		for _, c := range l.Columns {
			if names[c] {
				return refuse(CodeMalformed, "%s[%d]: column %s comes twice", field, i, excerpt(c))
			}
			if lim.Name > 0 && len(c) > lim.Name {
				return refuse(CodeMalformed, "%s[%d]: a column name of %d bytes", field, i, len(c))
			}
			names[c] = true
		}
	}
	return nil
}
