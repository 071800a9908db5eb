package protocol

import (
	"bytes"
	"testing"
)

// Put together, head, tables and tail are the page's bytes; compressed one by one they are a compressed page.
func TestEncodeAround(t *testing.T) {
	one := "1"
	page := &Page{V: Version, Incarnation: "00112233445566778899aabbccddeeff", N: 3, Nonce: "n", Reply: "r", Page: 1, Last: true, Cursor: "e.2.x", Epoch: "e",
		Tables:   []TableRows{{Table: "public.item", Columns: []string{"id", "note"}, Rows: []Row{{Version: "7", Values: []Value{&one, nil}}}}},
		Verdicts: []Verdict{{Table: "public.item", State: Merged}}, Rows: 1}
	want, err := Encode(page, ContentCBOR)
	if err != nil {
		t.Fatal(err)
	}
	tables, err := EncodeTables(page.Tables)
	if err != nil {
		t.Fatal(err)
	}
	head, tail, err := EncodeAround(page)
	if err != nil {
		t.Fatal(err)
	}
	if got := bytes.Join([][]byte{head, tables, tail}, nil); !bytes.Equal(got, want) {
		t.Fatalf("%x, want %x", got, want)
	}
	for _, encoding := range []string{Identity, Zstd} {
		var body []byte
		for _, part := range [][]byte{head, tables, tail} {
			c, err := Compress(part, encoding)
			if err != nil {
				t.Fatal(err)
			}
			body = append(body, c...)
		}
		got, err := Decompress(body, encoding, len(want))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%q: %x %v", encoding, got, err)
		}
		if _, err := Decompress(body, encoding, len(want)-1); err == nil {
			t.Fatalf("%q: over the limit", encoding)
		}
	}
	if len(page.Tables) != 1 || page.Tables[0].Table != "public.item" {
		t.Fatal("the page was changed")
	}
}
