package apply

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// image is a row: PostgreSQL text for each column of the table, nil for NULL, hole for a value that is not known because it
// did not change (an out-of-line value that the server did not send again). A nil image is an absent row.
type image []*string

var holeMark string
var hole = &holeMark

func (g image) holes() bool {
	for _, v := range g {
		if v == hole {
			return true
		}
	}
	return false
}

// fill takes what g does not know from an older image of the row.
func (g image) fill(older image) {
	for i, v := range g {
		if v == hole {
			g[i] = older[i]
		}
	}
}

// json is the form in which side tables keep images: {column: text or null}. What is not known is left out.
func (t *table) json(g image) *string {
	if g == nil {
		return nil
	}
	var b bytes.Buffer
	b.WriteByte('{')
	for i, v := range g {
		if v == hole {
			continue
		}
		if b.Len() > 1 {
			b.WriteByte(',')
		}
		name, _ := json.Marshal(t.Columns[i].Name) // a string always has a JSON form
		b.Write(name)
		b.WriteByte(':')
		if v == nil {
			b.WriteString("null")
			continue
		}
		text, _ := json.Marshal(*v)
		b.Write(text)
	}
	b.WriteByte('}')
	s := b.String()
	return &s
}

// image reads the form of side tables; nil is an absent row. A column that is not named is NULL.
func (t *table) image(text *string) (image, error) {
	if text == nil {
		return nil, nil
	}
	vals, err := jsonValues(*text)
	if err != nil {
		return nil, err
	}
	g := make(image, len(t.Columns))
	for i, c := range t.Columns {
		g[i] = vals[c.Name]
	}
	return g, nil
}

func jsonValues(text string) (map[string]*string, error) {
	var vals map[string]*string
	if err := json.Unmarshal([]byte(text), &vals); err != nil {
		return nil, fmt.Errorf("row image: %w", err)
	}
	return vals, nil
}
