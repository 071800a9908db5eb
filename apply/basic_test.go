package apply_test

import (
	"testing"

	"github.com/waystage/waystage/conflict"
)

const notes = `CREATE TABLE note (id int PRIMARY KEY, body text, n int);
	INSERT INTO note SELECT i, 'note ' || i, i FROM generate_series(1, 10) i`

func TestRoundTrip(t *testing.T) {
	r := newRig(t, notes, "public.note")
	r.start(allWorkers...)
	r.foreign("UPDATE note SET body = 'from the office' WHERE id = 1", "DELETE FROM note WHERE id = 2", "INSERT INTO note VALUES (11, 'new', NULL)")
	r.settled()
	ids := r.merge(
		rec{table: "public.note", op: conflict.Update, key: []string{"1"}, img: map[string]any{"body": "from the ward"}},
		rec{table: "public.note", op: conflict.Insert, key: []string{"20"}, img: map[string]any{"body": "inserted", "n": nil}},
		rec{table: "public.note", op: conflict.Delete, key: []string{"3"}},
	)
	version := r.text(r.mirror, "SELECT _ws_version::text FROM note WHERE id = 1")
	r.settled()
	for _, id := range ids {
		if v := r.verdict(id); v != "applied" {
			t.Errorf("change %d: %s", id, v)
		}
	}
	if got := r.text(r.source, "SELECT format('%s %s %s', id, body, n) FROM note WHERE id IN (1, 3, 20) ORDER BY id"); got != "1 from the ward 1\n20 inserted " {
		t.Errorf("source has %q", got)
	}
	if got := r.text(r.mirror, "SELECT format('%s %s', _ws_version, _ws_lw) FROM note WHERE id = 1"); got != version+" dev" {
		t.Errorf("the echo of an own change gave a new version: %s, was %s", got, version)
	}
}
