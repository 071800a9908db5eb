package schema

import (
	"fmt"
	"strings"
)

// Overlap is SQL for the names (text[]) of the columns that a change touches and that somebody else has changed since, to another image
// (rule R5): touches is a condition, the others are the column's value in what the change was made on, in what stands there, and in
// what the change would leave, all of one type.
func (t *Table) Overlap(touches, base, theirs, mine func(Column) string) string {
	return t.columnsWhere(func(c Column) string {
		return touches(c) + " AND NOT " + sameImage(theirs(c), base(c)) + " AND NOT " + sameImage(theirs(c), mine(c))
	})
}

// Idle is SQL for the names of the columns that a change names although their image is what it was.
func (t *Table) Idle(touches, base, mine func(Column) string) string {
	return t.columnsWhere(func(c Column) string { return touches(c) + " AND " + sameImage(base(c), mine(c)) })
}

func (t *Table) columnsWhere(cond func(Column) string) string {
	var parts []string
	for _, c := range t.Columns {
		if !t.IsKey(c.Name) {
			parts = append(parts, "CASE WHEN "+cond(c)+" THEN "+Literal(c.Name)+" END")
		}
	}
	return "array_remove(ARRAY[" + strings.Join(parts, ", ") + "]::text[], NULL)"
}

func sameImage(a, b string) string { return fmt.Sprintf("record_image_eq(ROW(%s), ROW(%s))", a, b) }
