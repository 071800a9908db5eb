package stages

import (
	"encoding/binary"
	"unsafe"

	"github.com/waystage/waystage/protocol"
)

// common keeps the encoded tables of pages while a batch of replies is composed: devices with the same subset get the same rows,
// which are encoded, and compressed, once.
type common struct {
	encoded map[string]*encodedTables
	key     []byte
}

// encodedTables are kept with what they were made of: the names of rows are their addresses.
type encodedTables struct {
	tables []protocol.TableRows
	body   []byte
}

// leastCommon is how many rows a page must have for its tables to be kept.
const leastCommon = 32

// encode renders a page in the form of its request.
func (c *common) encode(page *protocol.Page, contentType, encoding string) ([]byte, error) {
	if c == nil || contentType != protocol.ContentCBOR || encoding != protocol.Identity && encoding != protocol.Zstd || !c.name(page.Tables, encoding) {
		return encodePage(page, contentType, encoding)
	}
	made := c.encoded[string(c.key)]
	if made == nil {
		body, err := protocol.EncodeTables(page.Tables)
		if err == nil {
			body, err = protocol.Compress(body, encoding)
		}
		if err != nil {
			return nil, err
		}
		made = &encodedTables{page.Tables, body}
		c.encoded[string(c.key)] = made
	}
	head, tail, err := protocol.EncodeAround(page)
	if err == nil {
		head, err = protocol.Compress(head, encoding)
	}
	if err == nil {
		tail, err = protocol.Compress(tail, encoding)
	}
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, len(head)+len(made.body)+len(tail))
	return append(append(append(out, head...), made.body...), tail...), nil
}

// name sets key to what tells these tables from any others, unless they are not worth it.
func (c *common) name(tables []protocol.TableRows, encoding string) bool {
	c.key = append(append(c.key[:0], encoding...), 0)
	rows := 0
	for i := range tables {
		t := &tables[i]
		if len(t.Gone)+len(t.Deletes) > 0 || len(t.Columns) == 0 {
			return false
		}
		c.key = append(append(c.key, t.Table...), 0)
		c.key = binary.NativeEndian.AppendUint64(c.key, address(unsafe.Pointer(unsafe.SliceData(t.Columns))))
		c.key = binary.AppendUvarint(c.key, uint64(len(t.Rows)))
		for j := range t.Rows {
			c.key = binary.NativeEndian.AppendUint64(c.key, address(unsafe.Pointer(unsafe.SliceData(t.Rows[j].Values))))
		}
		rows += len(t.Rows)
	}
	return rows >= leastCommon
}

func address(p unsafe.Pointer) uint64 { return uint64(uintptr(p)) }
