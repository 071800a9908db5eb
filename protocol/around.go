package protocol

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
)

// EncodeTables renders the tables of a page in CBOR, for [EncodeAround].
func EncodeTables(t []TableRows) ([]byte, error) {
	enc, err := cborEncoder()
	if err != nil {
		return nil, err
	}
	return enc.Marshal(t)
}

// EncodeAround renders a page in CBOR but for its tables: head, the tables' bytes and tail make the page, as [Encode] would. So
// tables that many pages have in common are rendered once. Compressed one by one with [Zstd], the three are a compressed page as well.
func EncodeAround(p *Page) (head, tail []byte, err error) {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	place := []TableRows{{Table: hex.EncodeToString(id[:])}}
	mark, err := EncodeTables(place)
	if err != nil {
		return nil, nil, err
	}
	around := *p
	around.Tables = place
	body, err := Encode(&around, ContentCBOR)
	if err != nil {
		return nil, nil, err
	}
	head, tail, ok := bytes.Cut(body, mark)
	if !ok {
		return nil, nil, errors.New("a page without a place for its tables")
	}
	return head, tail, nil
}
