package protocol

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
)

// FuzzDecode: no input panics, every refusal has a code, and what is taken survives a round trip.
func FuzzDecode(f *testing.F) {
	for _, v := range vectors(f) {
		for _, ct := range []string{ContentCBOR, ContentJSON} {
			data := must(f, v.msg, ct)
			f.Add(data, ct == ContentJSON, false)
			f.Add(data, ct == ContentJSON, true)
			f.Add(data[:len(data)-1], ct == ContentJSON, false)
		}
	}
	f.Add([]byte(`{"v":1,"n":1e400}`), true, false)
	f.Add([]byte{0xbf, 0x9f, 0xff}, false, true)
	f.Fuzz(func(t *testing.T, data []byte, asJSON, page bool) {
		ct := ContentCBOR
		if asJSON {
			ct = ContentJSON
		}
		lim := DefaultLimits()
		lim.Values = 1 << 16
		read := func(data []byte) (any, error) {
			if page {
				return DecodePage(data, ct, lim)
			}
			return DecodeRequest(data, ct, lim)
		}
		msg, err := read(data)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Code == "" || e.Message == "" {
				t.Fatalf("a refusal without code: %v", err)
			}
			return
		}
		again, err := read(must(t, msg, ct))
		if err != nil {
			t.Fatalf("what was taken is refused when sent again: %v", err)
		}
		if a, b := must(t, msg, ct), must(t, again, ct); !bytes.Equal(a, b) || !reflect.DeepEqual(msg, again) && len(a) != len(b) {
			t.Fatalf("changed on the way:\n%q\n%q", a, b)
		}
	})
}

// FuzzDecompress: no input panics or gives more than the limit.
func FuzzDecompress(f *testing.F) {
	for _, enc := range []string{Identity, Zstd, Gzip} {
		data, err := Compress(bytes.Repeat([]byte("waystage "), 50), enc)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, enc)
	}
	f.Fuzz(func(t *testing.T, data []byte, enc string) {
		out, err := Decompress(data, enc, 1000)
		if err == nil && len(out) > 1000 {
			t.Fatalf("%d bytes", len(out))
		}
		var e *Error
		if err != nil && !errors.As(err, &e) {
			t.Fatalf("a refusal without code: %v", err)
		}
	})
}
