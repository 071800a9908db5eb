package stages

import (
	"slices"

	"github.com/waystage/waystage/protocol"
)

// keep renders for the log what a change carried that was refused before it was read to the end, so far as it can be stored:
// an image of the layout's length and within the limit of a row. What is no text that PostgreSQL could store is shown as near to it as
// can be. Of an update with its base only the changed columns are kept, as of one that is taken.
func (j *judgement) keep(c *protocol.Change, r *record) {
	fits := func(img []protocol.Value) bool {
		size := 0
		for _, v := range img {
			if v != nil {
				size += len(*v)
			}
		}
		return len(img) > 0 && len(img) == len(j.layout) && (j.maxRow <= 0 || size <= j.maxRow)
	}
	layout := make([]string, len(j.layout))
	for i, name := range j.layout {
		layout[i] = clean(name)
	}
	isKey := func(i int) bool { return j.sub != nil && slices.Contains(j.sub.table.Key, j.layout[i]) }
	r.base, r.img = nil, nil
	if fits(c.Base) {
		r.base = appendImage(nil, layout, cleanKey(c.Base), nil)
	}
	if fits(c.New) {
		changed := func(i int) bool {
			return !isKey(i) && !equal(c.Base[i], c.New[i])
		}
		if c.Op != protocol.Update || r.base == nil {
			changed = nil
		}
		r.img = appendImage(nil, layout, cleanKey(c.New), changed)
	}
}
