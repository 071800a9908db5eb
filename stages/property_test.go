package stages

import (
	"fmt"
	"slices"
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/protocol"
)

// modelRow is a mirror row in the model.
type modelRow struct {
	label         string
	version, mver int64
	lw            string
}

// testMergeIsConflictMerge compares the set-based merge of random batches with conflict.Merge on a map, record by record
// in the order of sessions.
func testMergeIsConflictMerge(t *testing.T, r *rig) {
	run := 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		r.exec(`TRUNCATE waystage.app_user, waystage.change, waystage.tombstone, public.measure CASCADE`)
		r.q = newMemQueue()
		r.stages()
		model := map[string]modelRow{}
		devs := make([]*dev, 3)
		for i := range devs {
			devs[i] = r.user(fmt.Sprintf("p%d-%d", run, i), "clerks")
			devs[i].r = r
		}
		keys := []string{"1", "2", "3"}
		flags := []string{"t", "f"}
		// seen are versions that somebody was told, with the image that they stood for.
		type version struct {
			version int64
			label   string
		}
		seen := map[string][]version{}
		for range rapid.IntRange(1, 4).Draw(t, "batches") {
			// The source writes some rows.
			for _, k := range keys {
				if rapid.IntRange(0, 5).Draw(t, "source writes") > 0 {
					continue
				}
				if _, ok := model[k]; ok && rapid.Bool().Draw(t, "source deletes") {
					r.exec(`DELETE FROM public.measure WHERE id = $1::numeric`, k)
					delete(model, k)
					continue
				}
				label := rapid.SampledFrom(flags).Draw(t, "source value")
				var v int64
				if err := r.db.QueryRow(r.ctx, `INSERT INTO public.measure (id, flag) VALUES ($1::text::numeric, $2::text::boolean)
					ON CONFLICT (id) DO UPDATE SET flag = excluded.flag, _ws_version = excluded._ws_version, _ws_lw = NULL, _ws_mver = 0
					RETURNING _ws_version`, k, label).Scan(&v); err != nil {
					t.Fatal(err)
				}
				model[k] = modelRow{label: label, version: v}
				seen[k] = append(seen[k], version{v, label})
			}
			type sent struct {
				d      *dev
				req    *protocol.Request
				labels []string
			}
			var batch []sent
			for _, d := range devs {
				if rapid.IntRange(0, 3).Draw(t, "silent") == 0 {
					continue
				}
				var s sent
				s.d = d
				var changes []protocol.Change
				d.epoch = rapid.SampledFrom([]string{"e1", "e1", "e1", ""}).Draw(t, "epoch")
				for _, k := range keys {
					if rapid.Bool().Draw(t, "untouched") {
						continue
					}
					base := version{}
					if n := len(seen[k]); n > 0 && rapid.IntRange(0, 4).Draw(t, "knows a version") > 0 {
						base = seen[k][max(0, n-1-rapid.IntRange(0, 2).Draw(t, "how old"))]
					}
					op := rapid.SampledFrom([]string{"I", "U", "D"}).Draw(t, "op")
					label := rapid.SampledFrom(flags).Draw(t, "value")
					c := protocol.Change{Table: "public.measure", Op: op, Key: vals(k)}
					if base.version != 0 {
						c.Version = strconv.FormatInt(base.version, 10)
						if op != "I" {
							c.Base = vals(k, base.label)
						}
					}
					if op != "D" {
						c.New = vals(k, label)
					}
					changes, s.labels = append(changes, c), append(s.labels, base.label)
				}
				s.req = d.request("base", changes...)
				d.send(s.req)
				batch = append(batch, s)
			}
			if _, err := r.intake.Batch(r.ctx, r.ctx, noop); err != nil {
				t.Fatal(err)
			}
			if _, err := r.merge.Batch(r.ctx, r.ctx, noop); err != nil {
				t.Fatal(err)
			}
			var stamp int64
			if err := r.db.QueryRow(r.ctx, `SELECT coalesce(max(stamp), 0) FROM waystage.change`).Scan(&stamp); err != nil {
				t.Fatal(err)
			}
			for _, s := range batch {
				for i, c := range s.req.Changes {
					k := *c.Key[0]
					m, exists := model[k]
					bver, _ := strconv.ParseInt("0"+c.Version, 10, 64)
					image := m.label // an update without a changed column leaves it
					if c.New != nil && (len(c.Base) == 0 || *c.Base[1] != *c.New[1]) {
						image = *c.New[1]
					}
					effect, reason := conflict.Merge(conflict.Facts{
						Op: conflict.Op(c.Op[0]), Exists: exists, Version: bver == m.version,
						OwnEcho:   exists && m.lw == s.d.inc && bver != 0 && bver == m.mver,
						SameImage: exists && c.Op != "D" && *c.New[1] == m.label,
						OldEpoch:  s.req.Epoch == "" && bver != 0,
						BaseImage: !exists && len(c.Base) == 0 || exists && len(c.Base) > 0 && *c.Base[1] == m.label,
					})
					want := "merged"
					switch effect {
					case conflict.Reject:
						want = "rejected " + string(reason)
					case conflict.Create, conflict.Change:
						model[k] = modelRow{label: image, version: stamp, mver: stamp, lw: s.d.inc}
					case conflict.Remove:
						delete(model, k)
					}
					got := r.value(`SELECT concat_ws(' ', state, code) FROM waystage.change WHERE incarnation = $1 AND n = $2 AND idx = $3`, s.req.Incarnation, s.req.N, i)
					if got != want {
						t.Fatalf("%s %s of version %q: %s, want %s (row %+v, exists %v)", c.Op, k, c.Version, got, want, m, exists)
					}
				}
			}
			var have, want []string
			rows, err := r.db.Query(r.ctx, `SELECT concat_ws(' ', id, CASE WHEN flag THEN 't' ELSE 'f' END, _ws_version, _ws_mver, coalesce(_ws_lw, '-')) FROM public.measure`)
			if err != nil {
				t.Fatal(err)
			}
			for rows.Next() {
				var s string
				if err := rows.Scan(&s); err != nil {
					t.Fatal(err)
				}
				have = append(have, s)
			}
			rows.Close()
			for k, m := range model {
				lw := m.lw
				if lw == "" {
					lw = "-"
				}
				want = append(want, fmt.Sprintf("%s %s %d %d %s", k, m.label, m.version, m.mver, lw))
				if m.version == stamp {
					seen[k] = append(seen[k], version{m.version, m.label})
				}
			}
			slices.Sort(have)
			slices.Sort(want)
			if !slices.Equal(have, want) {
				t.Fatalf("mirror %v, model %v", have, want)
			}
			if _, err := r.reply.Batch(r.ctx, r.ctx, noop); err != nil {
				t.Fatal(err)
			}
		}
	})
}
