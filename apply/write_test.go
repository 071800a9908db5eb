package apply_test

import (
	"fmt"
	"strings"
	"testing"
)

// New rows are copied and rows that were there are updated; where the mirror has it otherwise than the source says, the result is the
// same. What did not change keeps its version.
func TestManyRowsAreWrittenAsTheyAre(t *testing.T) {
	const rows = 1000 // so many are copied
	r := newRig(t, `CREATE TABLE w (id int PRIMARY KEY, t text, n numeric, c char(4), a text[])`, "public.w")
	r.start(allWorkers...)
	fill := func(from int) string {
		return fmt.Sprintf(`INSERT INTO w SELECT i, (ARRAY[E'tab\tline\nreturn\r', E'\\N', '', NULL, E'\\.', 'a\b', E'\\\\t', ' "x" '])[1 + i %% 8],
			(ARRAY['1.0', '1.00', 'NaN', NULL])[1 + i %% 4]::numeric, (ARRAY['ab', '', NULL])[1 + i %% 3], ARRAY[E'a\tb', NULL, E'\\', i::text] FROM generate_series(%d, %d) AS i`, from, from+rows-1)
	}
	version := func(where string) string {
		return r.text(r.mirror, "SELECT string_agg(DISTINCT _ws_version::text, ' ') FROM public.w WHERE "+where)
	}
	r.foreign(fill(1))
	r.settled()
	if v := version("true"); v == "" || strings.Contains(v, " ") {
		t.Errorf("rows of one transaction have the versions %q", v)
	}
	// The mirror has one of the new rows already, otherwise than the source.
	r.exec(r.mirror, "INSERT INTO public.w (id, t, _ws_version) VALUES (5000, 'stranger', 1)")
	r.foreign(fill(4600))
	r.settled()
	// One of those to be updated is missing, and some are as they should be.
	r.exec(r.mirror, "DELETE FROM public.w WHERE id = 17")
	before := version("id <= 1000 AND id % 2 = 1 AND id <> 17")
	r.foreign("UPDATE w SET t = t || 'x', n = CASE WHEN id % 2 = 0 THEN 2.50 ELSE n END WHERE id % 2 = 0 AND id <= 1000", "UPDATE w SET t = t WHERE id % 2 = 1 AND id <= 1000")
	r.settled()
	if now := version("id <= 1000 AND id % 2 = 1 AND id <> 17"); now != before {
		t.Errorf("rows that did not change had version %s and have %s", before, now)
	}
	// Of rows that come and go in one transaction only the last state counts.
	r.foreign(fill(20000), "DELETE FROM w WHERE id BETWEEN 20000 AND 20499", "UPDATE w SET t = 'last' WHERE id >= 20500", "DELETE FROM w WHERE id < 500", fill(20000-rows))
	r.settled()
}
