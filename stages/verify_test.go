package stages

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/waystage/waystage/protocol"
)

// verified joins what the pages of the reply say of a verification.
func (d *dev) verified() (tables map[string]*protocol.VerifiedTable, ask bool, pages int) {
	d.r.t.Helper()
	tables = map[string]*protocol.VerifiedTable{}
	for _, p := range d.pages() {
		if p.Verify == nil {
			continue
		}
		pages++
		ask = ask || p.Verify.Ask
		for _, part := range p.Verify.Tables {
			t := tables[part.Table]
			if t == nil {
				t = &protocol.VerifiedTable{Columns: part.Columns}
				tables[part.Table] = t
			}
			t.Sums, t.Rows = append(t.Sums, part.Sums...), append(t.Rows, part.Rows...)
		}
	}
	return tables, ask, pages
}

// ask opens a session with a verification.
func (d *dev) ask(set string, v *protocol.Verification) {
	d.r.t.Helper()
	req := d.request(set)
	req.Verify = v
	d.send(req)
	d.r.pump()
}

// testVerification: sums and rows are those of the device's subset, in the snapshot of the rows.
func testVerification(t *testing.T, r *rig) {
	amy, _, ben := shared(r)
	r.office(`INSERT INTO public.visit (id, patient, at, note) SELECT 'visit ' || i || E'\t"é,(', 1 + i % 3, '2026-05-01 10:00:00+00', CASE WHEN i % 4 > 0 THEN repeat('n', i % 3) END FROM generate_series(1, 300) i`)
	r.office(`UPDATE public.patient SET doc = '{"b": 1}', pic = '\x00ff', tags = '{a,NULL,""}', active = id = 1, mood = 'calm', _ws_version = DEFAULT`)
	amy.sync("care")
	// No request, no answer: neither to a device that does not know of it, nor to one that wants nothing.
	r.exec(`UPDATE waystage.device SET verify_asked_at = now()`)
	amy.sync("care")
	if tables, ask, pages := amy.verified(); len(tables) > 0 || ask || pages > 0 {
		t.Errorf("a device that knows nothing of it was told: %v %v", tables, ask)
	}
	amy.ask("care", &protocol.Verification{})
	if tables, ask, _ := amy.verified(); len(tables) > 0 || !ask {
		t.Errorf("the operator's wish: %v %v", tables, ask)
	}
	amy.receive()

	r.reply.cfg.PageSize = 4 << 10
	const buckets = 64
	r.office(`UPDATE public.visit SET note = 'late', _ws_version = DEFAULT WHERE patient = 1 AND id LIKE 'visit 3%'`)
	amy.ask("care", &protocol.Verification{Buckets: buckets})
	got, _, pages := amy.verified()
	if amy.receive(); pages < 2 {
		t.Errorf("%d pages carry sums: the test shows nothing of several", pages)
	}
	type sum struct {
		rows             int64
		versions, images uint64
	}
	for table, key := range map[string][]string{patients: {"id"}, visits: {"id"}, "public.assignment": {"nurse", "patient"}} {
		if got[table] == nil {
			t.Errorf("nothing is said of %s", table)
			continue
		}
		want := map[int]sum{}
		for _, row := range amy.set("care").rows[table] {
			var k, img []protocol.Value
			for _, c := range key {
				k = append(k, row.vals[c])
			}
			for _, c := range got[table].Columns {
				img = append(img, row.vals[c])
			}
			b := protocol.Bucket(k, buckets)
			s := want[b]
			want[b] = sum{s.rows + 1, s.versions ^ protocol.RowHash(append([]protocol.Value{str(row.version)}, k...)...), s.images ^ protocol.RowHash(img...)}
		}
		if len(got[table].Sums) != len(want) {
			t.Errorf("%s: %d buckets, want %d", table, len(got[table].Sums), len(want))
		}
		for _, s := range got[table].Sums {
			if w := want[s.Bucket]; w.rows != s.Rows || protocol.HashText(w.versions) != s.Versions || protocol.HashText(w.images) != s.Images {
				t.Errorf("%s bucket %d: %+v, want %+v", table, s.Bucket, s, w)
			}
		}
	}
	// The rows of some buckets, and of the device's subset only.
	ben.sync("care")
	ben.ask("care", &protocol.Verification{Buckets: buckets, Rows: []protocol.VerifyRows{{Table: visits, Buckets: []int{3, 4, 5, 6, 7, 8, 9}}, {Table: "public.secret", Buckets: []int{0}}}})
	got, _, _ = ben.verified()
	ben.receive()
	if len(got) != 1 {
		t.Fatalf("%v", slices.Collect(maps.Keys(got)))
	}
	want := 0
	for key, row := range ben.set("care").rows[visits] {
		if b := protocol.Bucket([]protocol.Value{row.vals["id"]}, buckets); b < 3 || b > 9 {
			continue
		}
		want++
		if !slices.ContainsFunc(got[visits].Rows, func(r protocol.Row) bool { return *r.Values[0] == *row.vals["id"] && r.Version == row.version }) {
			t.Errorf("row %s is not among them", key)
		}
	}
	if want == 0 || len(got[visits].Rows) != want {
		t.Errorf("%d rows, want %d", len(got[visits].Rows), want)
	}
}

// testFindings: what devices tell is kept, whatever they write into it, and ends the operator's wish.
func testFindings(t *testing.T, r *rig) {
	amy, tab, _ := shared(r)
	r.exec(`UPDATE waystage.device SET verify_asked_at = now()`)
	result := &protocol.VerifyResult{Cursor: "e1.7\x00", At: "0000-01-01T00:00:00Z", Rows: 3, Different: 2, More: true, Sample: []protocol.Difference{
		{Table: visits, Key: vals("a\x00b", nil), Kind: protocol.DiffValues, Columns: []string{"note\x00", `"`}}, {Table: strings.Repeat("x", 500), Kind: protocol.DiffExtra},
	}}
	amy.ask("care", &protocol.Verification{Result: result})
	amy.receive()
	r.want("3 2 0 true 2", `SELECT concat_ws(' ', rows, different, repaired, more::text, jsonb_array_length(sample)) FROM waystage.device_check`)
	r.want("true", `SELECT (checked_at > now() - interval '1 hour')::text FROM waystage.device_check`)
	amy.ask("care", &protocol.Verification{})
	if _, ask, _ := amy.verified(); ask {
		t.Error("a device that has verified is asked again")
	}
	amy.receive()
	tab.ask("care", &protocol.Verification{})
	if _, ask, _ := tab.verified(); !ask {
		t.Error("the other device is not asked any more")
	}
	tab.receive()
	result.Different, result.At = 0, "2026-05-01T10:00:00Z"
	amy.ask("care", &protocol.Verification{Result: result})
	amy.receive()
	r.want("0 2026-05-01", fmt.Sprintf(`SELECT concat_ws(' ', different, checked_at::date) FROM waystage.device_check WHERE device_id = (SELECT id FROM waystage.device WHERE user_name = '%s' AND name = '%s')`, amy.user, amy.name))
}
