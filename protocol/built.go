package protocol

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// Built is the version of the subscriptions that an application was built for: it gets these tables and columns as far as its
// subscriptions have them, and no others, whatever is added later. Columns of keys come in any case.
type Built struct {
	Name   string   `cbor:"1,keyasint,omitempty" json:"name,omitempty"` // for the operator's eyes, e.g. "version 3"
	Tables []Layout `cbor:"2,keyasint" json:"tables"`                   // in any order, over all sets; a table without columns: all of its
}

// MaxBuilt bounds a Built: bytes of all its names together.
const MaxBuilt = 256 << 10

// ParseBuilt reads what 'waystage subscriptions built-for' wrote.
func ParseBuilt(text []byte) (*Built, error) {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	b := &Built{}
	if err := dec.Decode(b); err != nil {
		return nil, fmt.Errorf("what the application was built for: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("what the application was built for: more than one JSON value")
	}
	return b, b.Check()
}

// Check tells whether a server takes it.
func (b *Built) Check() error { return b.check(DefaultLimits()) }

func (b *Built) check(lim Limits) error {
	if b == nil {
		return nil
	}
	if lim.Name > 0 && len(b.Name) > lim.Name {
		return refuse(CodeMalformed, "field built.name must be at most %d bytes", lim.Name)
	}
	size := 0
	nul := strings.Contains(b.Name, "\x00")
	for i, l := range b.Tables {
		if l.Table == "" {
			return refuse(CodeMalformed, "built.tables[%d]: a table without a name", i)
		}
		size, nul = size+len(l.Table), nul || strings.Contains(l.Table, "\x00")
		for _, c := range l.Columns {
			size, nul = size+len(c), nul || strings.Contains(c, "\x00")
		}
	}
	if nul {
		return refuse(CodeMalformed, "built: a name with the character NUL")
	}
	if size > MaxBuilt {
		return refuse(CodeTooBig, "built: the names have %d bytes, the limit is %d", size, MaxBuilt)
	}
	return checkLayouts("built.tables", b.Tables, lim)
}
