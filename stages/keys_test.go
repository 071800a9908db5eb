package stages

import (
	"flag"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/protocol"
)

const keyTables = `
CREATE TABLE public.share (who text, k int, PRIMARY KEY (who, k));
CREATE TABLE public.item (id text PRIMARY KEY, k int, note text);
CREATE TABLE public.lot (id text PRIMARY KEY, k numeric, note text);
`

// The keys of a user: what is shared with the user, and one that an attribute names.
const keyDefinitions = `
version: 1
subscriptions:
  shares: {table: public.share, direction: download-only}
  items:
    table: public.item
    key: k
    rows: select k from public.share where who = :user union select :user.extra::int
  lots:
    table: public.lot
    key: k
    rows: select k::numeric / 1.0 from public.share where who = :user
sets:
  all: [items, lots]
groups:
  staff: {sets: [all]}
`

const items, lots = "public.item", "public.lot"

// TestKeySets is about rows that enter and leave devices because key sets or key values change.
func TestKeySets(t *testing.T) {
	base := newRigOf(t, keyTables, keyDefinitions)
	for name, run := range map[string]func(*testing.T, *rig){
		"moves":                   testKeyMoves,
		"numeric keys":            testNumericKeys,
		"the device moves rows":   testDeviceMovesRows,
		"own rows outside":        testOwnRowsOutside,
		"ten thousand keys":       testManyKeys,
		"horizon":                 testHorizon,
		"forced refresh":          testForcedRefresh,
		"explain":                 testExplain,
		"built for":               testBuiltFor,
		"built for, once":         testBuiltOnce,
		"random movement of keys": testRandomKeys,
	} {
		t.Run(name, func(t *testing.T) {
			r := *base
			r.t, r.ctx, r.q = t, testContext(t), newMemQueue()
			r.empty()
			run(t, &r)
		})
	}
}

// empty makes everything as new.
func (r *rig) empty() {
	for _, table := range []string{"public.share", "public.item", "public.lot", "waystage.staging", "waystage.change", "waystage.app_user", "waystage.tombstone", "waystage.keyset", "waystage.refresh", "waystage.built"} {
		r.exec(`DELETE FROM ` + table) // quicker than TRUNCATE while there is little in them
	}
	r.exec(`DELETE FROM waystage.meta WHERE key = 'prune_bound'`)
	r.stages()
}

// subset is what a user's device must hold of a table: id -> "version k note".
func (r *rig) subset(user, table string) map[string]string {
	r.t.Helper()
	rows, err := r.db.Query(r.ctx, fmt.Sprintf(`SELECT m.id, concat_ws(' ', m._ws_version, coalesce(m.k::text, '-'), coalesce(m.note, '-')) FROM %s m
		WHERE m.k IN (SELECT s.k FROM public.share s WHERE s.who = $1)
			OR $2 AND m.k IN (SELECT (u.attributes->>'extra')::int FROM waystage.app_user u WHERE u.name = $1)`, table), user, table == items)
	if err != nil {
		r.t.Fatal(err)
	}
	defer rows.Close()
	want := map[string]string{}
	for rows.Next() {
		var id, v string
		if err := rows.Scan(&id, &v); err != nil {
			r.t.Fatal(err)
		}
		want[id] = v
	}
	if err := rows.Err(); err != nil {
		r.t.Fatal(err)
	}
	return want
}

// holds is the same of what the device holds.
func (d *dev) holds(table string) map[string]string {
	have := map[string]string{}
	for key, r := range d.set("all").rows[table] {
		text := r.version
		for _, c := range []string{"k", "note"} {
			if v := r.vals[c]; v == nil {
				text += " -"
			} else {
				text += " " + *v
			}
		}
		have[key] = text
	}
	return have
}

// exact syncs and compares; it tells how many rows, deletes and keys that are gone the reply carried.
func (d *dev) exact(changes ...protocol.Change) (rows, deletes, gone int) {
	d.r.t.Helper()
	d.sync("all", changes...)
	for _, table := range []string{items, lots} {
		if have, want := d.holds(table), d.r.subset(d.user, table); !maps.Equal(have, want) {
			d.r.t.Fatalf("%s/%s: %s is\n%v, want\n%v", d.user, d.name, table, have, want)
		}
	}
	if d.n > 1 && d.pages()[0].Refresh {
		d.r.t.Fatal("a full refresh")
	}
	for _, p := range d.pages() {
		for _, t := range p.Tables {
			rows, deletes, gone = rows+len(t.Rows), deletes+len(t.Deletes), gone+len(t.Gone)
		}
	}
	return rows, deletes, gone
}

func (d *dev) counts(rows, deletes, gone int) {
	d.r.t.Helper()
	r, del, g := d.exact()
	if r != rows || del != deletes || g != gone {
		d.r.t.Fatalf("%s/%s: %d rows, %d deletes, %d keys gone; want %d, %d, %d", d.user, d.name, r, del, g, rows, deletes, gone)
	}
}

func (r *rig) staff(names ...string) (list []*dev) {
	r.t.Helper()
	for _, n := range names {
		list = append(list, r.user(n, "staff"))
	}
	return list
}

func testKeyMoves(t *testing.T, r *rig) {
	d := r.staff("amy", "ben")
	amy, ben := d[0], d[1]
	r.office(`INSERT INTO public.share VALUES ('amy', 1), ('amy', 2), ('ben', 3)`)
	r.office(`INSERT INTO public.item SELECT 'i' || g, g % 4, 'n' FROM generate_series(0, 11) g`)
	amy.exact()
	ben.exact()
	both := func(what string, a, b [3]int) {
		t.Helper()
		t.Log(what)
		amy.counts(a[0], a[1], a[2])
		ben.counts(b[0], b[1], b[2])
	}
	both("nothing", [3]int{}, [3]int{})
	r.office(`UPDATE public.item SET k = 3, _ws_version = DEFAULT WHERE id = 'i1'`)
	both("from one's key to the other's", [3]int{0, 1, 0}, [3]int{1, 0, 0})
	r.office(`UPDATE public.item SET k = 2, _ws_version = DEFAULT WHERE id = 'i5'`)
	both("between two keys of one", [3]int{1, 0, 0}, [3]int{})
	r.office(`UPDATE public.item SET k = 3, _ws_version = DEFAULT WHERE id = 'i5'`)
	r.office(`UPDATE public.item SET k = 2, _ws_version = DEFAULT WHERE id = 'i5'`)
	both("away and back", [3]int{1, 0, 0}, [3]int{0, 1, 0}) // a delete of a row that is not there does no harm
	r.office(`UPDATE public.item SET k = NULL, _ws_version = DEFAULT WHERE id = 'i5'`)
	both("to nobody", [3]int{0, 1, 0}, [3]int{0, 0, 0})
	r.office(`UPDATE public.item SET k = 1, _ws_version = DEFAULT WHERE id IN ('i5', 'i0')`)
	both("from nobody", [3]int{2, 0, 0}, [3]int{})
	r.office(`DELETE FROM public.item WHERE id = 'i5'`)
	r.office(`INSERT INTO public.item VALUES ('i5', 3, 'again')`)
	both("deleted and inserted under another's key", [3]int{0, 1, 0}, [3]int{1, 0, 0})
	r.office(`DELETE FROM public.item WHERE id = 'i5'`)
	r.office(`INSERT INTO public.item VALUES ('i5', 3, 'again')`)
	both("deleted and inserted under the same key", [3]int{}, [3]int{1, 0, 0})
	r.office(`INSERT INTO public.share VALUES ('amy', 3)`)
	both("a key is new", [3]int{len(r.subset("ben", items)), 0, 0}, [3]int{})
	r.office(`UPDATE public.item SET k = 3, _ws_version = DEFAULT WHERE id = 'i9'`)
	r.office(`DELETE FROM public.share WHERE who = 'amy' AND k = 1`)
	both("a key is gone, and a row had just left it", [3]int{1, 0, 1}, [3]int{1, 0, 0})
	r.office(`DELETE FROM public.share WHERE k = 3`)
	r.office(`UPDATE public.item SET k = 2, _ws_version = DEFAULT WHERE id = 'i9'`)
	both("two users lose a key, and a row changes hands", [3]int{1, 0, 1}, [3]int{0, 0, 1})
	r.office(`DELETE FROM public.share WHERE who = 'amy'`)
	r.office(`INSERT INTO public.share VALUES ('amy', 2)`)
	both("a key goes and comes", [3]int{}, [3]int{})
	r.exec(`UPDATE waystage.app_user SET attributes = '{"extra": "3"}' WHERE name = 'amy'`)
	both("an attribute gives a key", [3]int{len(r.subset("amy", items)) - len(r.value2(`SELECT id FROM public.item WHERE k = 2`)), 0, 0}, [3]int{})
	r.exec(`UPDATE waystage.app_user SET attributes = '{}' WHERE name = 'amy'`)
	both("and takes it", [3]int{0, 0, 1}, [3]int{})
	// Another group: the set is no longer the user's.
	r.exec(`UPDATE waystage.app_user SET groups = '{}' WHERE name = 'ben'`)
	ben.send(ben.request("all"))
	r.pump()
	ben.refused(protocol.CodeUnknownSet)
	r.exec(`UPDATE waystage.app_user SET groups = '{staff}' WHERE name = 'ben'`)
	ben.n-- // the number of a refused session is free
	ben.exact()
}

// value2 reads a column of texts.
func (r *rig) value2(sql string) (out []string) {
	r.t.Helper()
	rows, err := r.db.Query(r.ctx, sql)
	if err != nil {
		r.t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var v string
		if err := rows.Scan(&v); err != nil {
			r.t.Fatal(err)
		}
		out = append(out, v)
	}
	return out
}

// testNumericKeys: 1, 1.0 and 1.00 are one key; rows keep the text that they have.
func testNumericKeys(t *testing.T, r *rig) {
	amy := r.staff("amy")[0]
	r.office(`INSERT INTO public.share VALUES ('amy', 1), ('amy', 2)`)
	r.office(`INSERT INTO public.lot VALUES ('a', 1.00, 'n'), ('b', 1, 'n'), ('c', 2.0, 'n'), ('d', 3.00, 'n')`)
	amy.counts(3, 0, 0)
	amy.counts(0, 0, 0)
	r.office(`UPDATE public.lot SET k = 3.0, _ws_version = DEFAULT WHERE id = 'a'`)
	amy.counts(0, 1, 0)
	r.office(`DELETE FROM public.lot WHERE id = 'c'`)
	amy.counts(0, 1, 0)
	r.office(`UPDATE public.lot SET k = 1.000, _ws_version = DEFAULT WHERE id = 'b'`)
	amy.counts(1, 0, 0)
	r.office(`DELETE FROM public.share WHERE k = 1`)
	rows, deletes, _ := amy.exact()
	if rows != 0 || deletes != 1 {
		t.Fatalf("%d rows, %d deletes", rows, deletes)
	}
	// The device writes the key in its own way.
	amy.verdict(amy.sync("all", change(lots, "", nil, row("id", "e", "k", "2.50e0", "note", "x"))), "rejected not_subscribed")
	amy.verdict(amy.sync("all", change(lots, "", nil, row("id", "e", "k", "2.000", "note", "x"))), "merged")
	amy.exact()
	r.office(`UPDATE public.share SET k = 3`)
	amy.exact()
}

// testDeviceMovesRows: a device that changes the key of its rows.
func testDeviceMovesRows(t *testing.T, r *rig) {
	d := r.staff("amy", "ben")
	amy, ben := d[0], d[1]
	r.office(`INSERT INTO public.share VALUES ('amy', 1), ('amy', 2), ('ben', 2), ('ben', 3)`)
	r.office(`INSERT INTO public.item VALUES ('a', 1, 'n'), ('b', 2, 'n'), ('c', 3, 'n')`)
	amy.exact()
	ben.exact()
	// Between two keys of its own: others see the row come.
	amy.verdict(amy.sync("all", amy.edit("all", items, "a", "k", 2)), "merged")
	amy.counts(0, 0, 0)
	ben.counts(1, 0, 0)
	// Out of its subset: not its to give away. The row stays, in the mirror and on the device.
	amy.verdict(amy.sync("all", amy.edit("all", items, "a", "k", 3)), "rejected not_subscribed")
	amy.counts(0, 0, 0)
	amy.verdict(amy.sync("all", amy.edit("all", items, "a", "k", nil)), "rejected not_subscribed")
	amy.verdict(amy.sync("all", change(items, "", nil, row("id", "z", "k", nil, "note", "x"))), "rejected not_subscribed")
	amy.counts(0, 0, 0)
	// An edit of a row that has left meanwhile gets its verdict, and is in the server's log.
	edit, kill := ben.edit("all", items, "a", "note", "late"), ben.remove("all", items, "b")
	r.office(`DELETE FROM public.share WHERE who = 'ben' AND k = 2`)
	ben.verdict(ben.sync("all", edit, kill), "rejected not_subscribed", "rejected not_subscribed")
	ben.counts(0, 0, 0)
	r.want("2", `SELECT count(*) FROM waystage.reject WHERE user_name = 'ben' AND status = 'open' AND code = 'not_subscribed'`)
	// The row moved instead of the key.
	stale := amy.edit("all", items, "b", "note", "late")
	r.office(`UPDATE public.item SET k = 3, _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0 WHERE id = 'b'`)
	amy.verdict(amy.sync("all", stale), "rejected not_subscribed")
	amy.exact()
	// Merged, then gone, then refused by the source: the row goes back to a key that is not the device's.
	amy.verdict(amy.sync("all", amy.edit("all", items, "a", "note", "v")), "merged")
	r.office(`DELETE FROM public.share WHERE who = 'amy' AND k = 2`)
	amy.counts(0, 0, 1)
	r.exec(`UPDATE waystage.change SET state = 'refused', code = 'source_constraint', stamp = pg_current_xact_id()::text::bigint, decided_at = now() WHERE state = 'merged'`)
	r.office(`UPDATE public.item SET note = 'n', _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0 WHERE id = 'a'`)
	amy.counts(0, 0, 0)
}

// testOwnRowsOutside: a row that the session itself wrote and that is outside the subset when the reply is composed does
// not stay on the device, though neither its last cursor nor the new one knows the key.
func testOwnRowsOutside(t *testing.T, r *rig) {
	amy := r.staff("amy")[0]
	r.office(`INSERT INTO public.share VALUES ('amy', 1)`)
	r.office(`INSERT INTO public.item VALUES ('a', 1, 'n')`)
	amy.exact()
	between := func(change protocol.Change, before, after string) {
		t.Helper()
		r.office(before)
		amy.send(amy.request("all", change))
		for _, w := range []Worker{r.intake, r.merge} {
			if _, err := w.Batch(r.ctx, r.ctx, noop); err != nil {
				t.Fatal(err)
			}
		}
		r.office(after)
		r.pump()
		amy.verdict(amy.receive(), "merged")
		if have, want := amy.holds(items), r.subset("amy", items); !maps.Equal(have, want) {
			t.Fatalf("the device has %v, want %v", have, want)
		}
	}
	between(change(items, "", nil, row("id", "b", "k", 2, "note", "x")), `INSERT INTO public.share VALUES ('amy', 2)`, `DELETE FROM public.share WHERE k = 2`)
	between(amy.edit("all", items, "a", "k", 3), `INSERT INTO public.share VALUES ('amy', 3)`, `DELETE FROM public.share`)
	r.office(`INSERT INTO public.share VALUES ('amy', 1)`)
	amy.exact()
	between(change(items, "", nil, row("id", "c", "k", 4, "note", "x")), `INSERT INTO public.share VALUES ('amy', 4)`,
		`WITH gone AS (DELETE FROM public.share WHERE k = 4) DELETE FROM public.item WHERE id = 'c'`)
	amy.exact()
}

// testManyKeys: what a sync sends and stores follows what has changed, not how many keys the user has.
func testManyKeys(t *testing.T, r *rig) {
	d := r.staff("few", "many")
	r.office(`INSERT INTO public.share SELECT 'few', g FROM generate_series(1, 10) g`)
	r.office(`INSERT INTO public.share SELECT 'many', g FROM generate_series(1, 10000) g`)
	r.office(`INSERT INTO public.item SELECT 'i' || g, g, 'n' FROM generate_series(1, 20000) g`)
	for _, d := range d {
		d.exact()
		bytes := func() (n int) {
			for i := range d.pages() {
				p, _ := r.q.get(d.user, d.name, d.token(), i+1)
				n += len(p.body)
			}
			return n
		}
		// Key sets that are stored, whether one was written, and their bytes.
		const stored = `SELECT concat_ws(' ', (SELECT count(*) FROM waystage.keyset), (SELECT max(id) FROM waystage.keyset),
			(SELECT sum(pg_column_size(keys)) FROM waystage.keyset))`
		before := r.value(stored)
		d.counts(0, 0, 0)
		if n := bytes(); n > 300 {
			t.Fatalf("%s: nothing is new, and the reply has %d bytes", d.user, n)
		}
		r.want(before, stored)
		// One row of the user's: one row, still no keys.
		r.office(`UPDATE public.item SET note = 'x', _ws_version = DEFAULT WHERE id = 'i5'`)
		d.counts(1, 0, 0)
		if n := bytes(); n > 500 {
			t.Fatalf("%s: one row is new, and the reply has %d bytes", d.user, n)
		}
		r.want(before, stored)
		// A key goes, another comes: their rows, and one key set more for the old cursor.
		r.office(`UPDATE public.share SET k = 15000 WHERE who = $1 AND k = 7`, d.user)
		d.counts(1, 0, 1)
		if n := bytes(); n > 500 {
			t.Fatalf("%s: one key is new, and the reply has %d bytes", d.user, n)
		}
		// All devices of all users with the same keys share them.
		r.office(`UPDATE public.share SET k = 7 WHERE who = $1 AND k = 15000`, d.user)
		d.counts(1, 0, 1)
		known := r.value(`SELECT count(*) FROM waystage.keyset`)
		r.device(d.user, "second").exact()
		r.want(known, `SELECT count(*) FROM waystage.keyset`)
	}
	// Many keys go at once: told as keys, not as rows.
	r.office(`DELETE FROM public.share WHERE who = 'many' AND k > 100`)
	d[1].counts(0, 0, 9900)
}

// testHorizon: tombstones go at the horizon, and a device whose cursor is older gets everything anew; its edits are judged as ever.
func testHorizon(t *testing.T, r *rig) {
	d := r.staff("amy", "ben")
	amy, ben := d[0], d[1]
	r.office(`INSERT INTO public.share VALUES ('amy', 1), ('ben', 1), ('amy', 2), ('ben', 2)`)
	r.office(`INSERT INTO public.item SELECT 'i' || g, 1, 'n' FROM generate_series(1, 5) g`)
	amy.exact()
	ben.exact()
	away := []protocol.Change{ben.edit("all", items, "i1", "note", "ben's"), ben.edit("all", items, "i2", "note", "ben's"),
		ben.edit("all", items, "i3", "k", 2), change(items, "", nil, row("id", "new", "k", 1, "note", "ben's"))}
	r.office(`DELETE FROM public.item WHERE id = 'i2'`)
	r.office(`UPDATE public.item SET k = 9, _ws_version = DEFAULT WHERE id = 'i4'`)
	p := NewPruner(RetentionConfig{InFlight: time.Nanosecond}, r.db, nil)
	prune := func() (n Pruned) {
		t.Helper()
		// The bound's clock counts seconds.
		r.exec(`UPDATE waystage.meta SET value = regexp_replace(value, '[0-9]+$', '1') WHERE key = 'prune_bound'`)
		n, err := p.Prune(r.ctx)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	prune()
	amy.exact()
	r.want("2", `SELECT count(*) FROM waystage.tombstone`)
	if n := prune(); n.Tombstones != 0 {
		t.Fatalf("%+v: ben has not heard of them", n)
	}
	r.exec(`UPDATE waystage.cursor SET created_at = now() - interval '31 days' WHERE token = $1`, ben.set("all").cursor)
	r.office(`UPDATE public.item SET note = 'later', _ws_version = DEFAULT WHERE id = 'i5'`)
	amy.exact()
	if n := prune(); n.Cursors != 1 || n.Tombstones != 2 {
		t.Fatalf("%+v", n)
	}
	v := ben.sync("all", away...)
	if !ben.pages()[0].Refresh {
		t.Fatal("no refresh behind the horizon")
	}
	ben.verdict(v, "merged", "rejected row_deleted", "merged", "merged")
	if have, want := ben.holds(items), r.subset("ben", items); !maps.Equal(have, want) || len(want) != 4 {
		t.Fatalf("the device has %v, want %v", have, want)
	}
	ben.counts(0, 0, 0)
	amy.exact()
}

// testRandomKeys: whatever happens to rows, keys, attributes, cursors and replies, and wherever between a session's steps, an applied
// reply leaves exactly the subset of its snapshot on the device.
func testRandomKeys(t *testing.T, r *rig) {
	if f := flag.Lookup("rapid.checks"); f != nil && f.Value.String() == f.DefValue {
		defer func() { _ = f.Value.Set(f.DefValue) }()
		_ = f.Value.Set("20") // each is some dozens of transactions
	}
	rapid.Check(t, func(t *rapid.T) {
		r.empty()
		type open struct {
			want map[string]map[string]string // by table: what the reply must leave, once it is composed
		}
		devs := r.staff("amy", "ben")
		devs = append(devs, r.device("amy", "tablet"))
		opened := map[*dev]*open{}
		name := func(of string, n int) string { return of + strconv.Itoa(rapid.IntRange(1, n).Draw(t, of)) }
		key := func() any {
			if k := rapid.IntRange(0, 4).Draw(t, "k"); k > 0 {
				return k
			}
			return nil
		}
		table := func() string { return rapid.SampledFrom([]string{items, items, lots}).Draw(t, "table") }
		batch := func(w Worker) {
			if _, err := w.Batch(r.ctx, r.ctx, noop); err != nil {
				t.Fatal(err)
			}
		}
		replied := func(d *dev) bool { _, ok := r.q.get(d.user, d.name, d.token(), 1); return ok }
		compose := func() {
			batch(r.reply)
			for d, o := range opened {
				if o.want == nil && replied(d) {
					o.want = map[string]map[string]string{items: r.subset(d.user, items), lots: r.subset(d.user, lots)}
				}
			}
		}
		receive := func(d *dev) {
			o := opened[d]
			if o == nil || o.want == nil {
				return
			}
			d.receive()
			for table, want := range o.want {
				if have := d.holds(table); !maps.Equal(have, want) {
					t.Fatalf("%s/%s: %s is\n%v, want\n%v", d.user, d.name, table, have, want)
				}
			}
			delete(opened, d)
		}
		edits := func(d *dev) (changes []protocol.Change) {
			for _, table := range []string{items, lots} {
				rows := d.set("all").rows[table]
				for _, id := range slices.Sorted(maps.Keys(rows)) {
					switch rapid.IntRange(0, 7).Draw(t, "edit") {
					case 0:
						changes = append(changes, d.edit("all", table, id, "k", key()))
					case 1:
						changes = append(changes, d.edit("all", table, id, "note", name("n", 3)))
					case 2:
						changes = append(changes, d.remove("all", table, id))
					}
				}
				if id := name("i", 6); rows[id].vals == nil && rapid.Bool().Draw(t, "insert") {
					changes = append(changes, change(table, "", nil, row("id", id, "k", key(), "note", name("n", 3))))
				}
			}
			return changes
		}
		drawn := func(list []*dev) *dev { return rapid.SampledFrom(list).Draw(t, "device") }
		t.Repeat(map[string]func(*rapid.T){
			"share": func(*rapid.T) {
				r.office(`INSERT INTO public.share VALUES ($1, $2) ON CONFLICT DO NOTHING`, drawn(devs).user, rapid.IntRange(1, 4).Draw(t, "k"))
			},
			"unshare": func(*rapid.T) {
				r.office(`DELETE FROM public.share WHERE who = $1 AND k = $2`, drawn(devs).user, rapid.IntRange(1, 4).Draw(t, "k"))
			},
			"attribute": func(*rapid.T) {
				r.exec(`UPDATE waystage.app_user SET attributes = jsonb_strip_nulls(jsonb_build_object('extra', $2::text)) WHERE name = $1`, drawn(devs).user, show(key()))
			},
			"write": func(*rapid.T) {
				// A numeric with a scale of its own: 1, 1.0, 1.00.
				k, scale, tab := key(), rapid.IntRange(0, 2).Draw(t, "scale"), table()
				if tab == items {
					scale = 0
				}
				r.office(`INSERT INTO `+tab+` (id, k, note) VALUES ($1, round($2::text::numeric, $3), $4)
					ON CONFLICT (id) DO UPDATE SET k = excluded.k, note = excluded.note, _ws_version = excluded._ws_version, _ws_lw = NULL, _ws_mver = 0`,
					name("i", 6), show(k), scale, name("n", 3))
			},
			"delete": func(*rapid.T) { r.office(`DELETE FROM `+table()+` WHERE id = $1`, name("i", 6)) },
			"rename": func(*rapid.T) {
				r.office(`UPDATE public.item SET id = $2, _ws_version = DEFAULT WHERE id = $1 AND NOT EXISTS (SELECT FROM public.item WHERE id = $2)`, name("i", 6), name("i", 6))
			},
			"empty": func(*rapid.T) { r.office(`DELETE FROM ` + table()) },
			"horizon": func(*rapid.T) {
				r.exec(`UPDATE waystage.cursor SET created_at = now() - interval '31 days' WHERE device_id = (SELECT id FROM waystage.device WHERE user_name = $1 AND name = $2)`,
					drawn(devs).user, drawn(devs).name)
				r.exec(`UPDATE waystage.meta SET value = regexp_replace(value, '[0-9]+$', '1') WHERE key = 'prune_bound'`)
				r.exec(`UPDATE waystage.keyset SET created_at = now() - interval '2 hours'`)
				if _, err := NewPruner(RetentionConfig{InFlight: time.Nanosecond}, r.db, nil).Prune(r.ctx); err != nil {
					t.Fatal(err)
				}
			},
			"open": func(*rapid.T) {
				d := drawn(devs)
				if opened[d] != nil {
					return
				}
				d.send(d.request("all", edits(d)...))
				opened[d] = &open{}
			},
			"intake":  func(*rapid.T) { batch(r.intake) },
			"merge":   func(*rapid.T) { batch(r.merge) },
			"reply":   func(*rapid.T) { compose() },
			"receive": func(*rapid.T) { receive(drawn(devs)) },
			"lose": func(*rapid.T) { // the device asks again, with the same bytes
				d := drawn(devs)
				if o := opened[d]; o != nil && o.want != nil {
					r.q.purge()
					for x, o := range opened {
						o.want = nil
						x.send(x.last)
					}
				}
			},
		})
		for range 3 { // what is open, and what came meanwhile
			for _, d := range devs {
				if opened[d] == nil {
					d.send(d.request("all"))
					opened[d] = &open{}
				}
			}
			batch(r.intake)
			batch(r.merge)
			for range 3 {
				compose()
			}
			for _, d := range devs {
				receive(d)
			}
		}
		for _, d := range devs {
			for _, table := range []string{items, lots} {
				if have, want := d.holds(table), r.subset(d.user, table); !maps.Equal(have, want) {
					t.Fatalf("in the end %s/%s: %s is\n%v, want\n%v", d.user, d.name, table, have, want)
				}
			}
		}
	})
}

// show is a parameter as text or null.
func show(v any) *string {
	if v == nil {
		return nil
	}
	s := fmt.Sprint(v)
	return &s
}
