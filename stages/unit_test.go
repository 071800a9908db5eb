package stages

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/protocol"
)

const unitTables = `
CREATE TABLE public.ord (id int PRIMARY KEY, name text, code text UNIQUE);
CREATE TABLE public.line (ord int, no int, amount int, part_of_ord int, part_of_no int, PRIMARY KEY (ord, no),
	FOREIGN KEY (ord) REFERENCES public.ord, FOREIGN KEY (part_of_no, part_of_ord) REFERENCES public.line (no, ord));
CREATE TABLE public.note (id int PRIMARY KEY, code text REFERENCES public.ord (code), line_ord int, line_no int, body text,
	FOREIGN KEY (line_ord, line_no) REFERENCES public.line (ord, no));
CREATE TABLE public.tree (id int PRIMARY KEY, parent int REFERENCES public.tree, v int);
CREATE TABLE public.free (id int PRIMARY KEY, v int);
`

const unitDefinitions = `
version: 1
subscriptions:
  orders: {table: public.ord, reject: transaction}
  lines: {table: public.line}
  notes: {table: public.note}
  trees: {table: public.tree, reject: record}
  free: {table: public.free, reject: transaction}
sets:
  work: [orders, lines, notes, trees]
  free: [free]
groups:
  all: {sets: [work, free]}
`

func init() {
	layouts["public.ord"], layouts["public.line"] = []string{"id", "name", "code"}, []string{"ord", "no", "amount", "part_of_ord", "part_of_no"}
	layouts["public.note"], layouts["public.tree"] = []string{"id", "code", "line_ord", "line_no", "body"}, []string{"id", "parent", "v"}
	layouts["public.free"] = []string{"id", "v"}
	keyColumns["public.line"] = 2
}

func unitOf(u int64, c protocol.Change) protocol.Change {
	c.Unit = u
	return c
}

// told checks the verdict on one record: "state code", and what the detail must say.
func (d *dev) told(v map[int]protocol.Verdict, i int, want, says string) {
	d.r.t.Helper()
	if got := strings.TrimSpace(v[i].State + " " + string(v[i].Code)); got != want || !strings.Contains(v[i].Detail, says) {
		d.r.t.Errorf("record %d: %q (%s), want %q that says %q", i, got, v[i].Detail, want, says)
	}
}

// Rule R8: a device transaction is merged whole or not at all, and what refers to a rejected insert falls with it.
func TestUnits(t *testing.T) {
	r := newRigOf(t, unitTables, unitDefinitions)
	r.exec(`INSERT INTO public.ord (id, name) SELECT i, 'o' || i FROM generate_series(1, 9) i`)
	r.exec(`INSERT INTO public.line (ord, no, amount) SELECT i, 1, i FROM generate_series(1, 9) i`)
	amy, ben := r.user("amy", "all"), r.user("ben", "all")
	amy.sync("work")
	ben.sync("work")
	ord, line, note, tree := "public.ord", "public.line", "public.note", "public.tree"
	newOrd := func(id int, name any) protocol.Change { return change(ord, "", nil, row("id", id, "name", name)) }
	newLine := func(o, no int, amount any) protocol.Change {
		return change(line, "", nil, row("ord", o, "no", no, "amount", amount))
	}
	newTree := func(id int, parent any, v any) protocol.Change {
		return change(tree, "", nil, row("id", id, "parent", parent, "v", v))
	}

	t.Run("all or none, and others stand", func(t *testing.T) {
		r.t = t
		ben.verdict(ben.sync("work", ben.edit("work", line, "1|1", "amount", 100)), "merged")
		v := amy.sync("work",
			unitOf(1, amy.edit("work", ord, "1", "name", "mine")), unitOf(1, amy.edit("work", line, "1|1", "amount", 7)), unitOf(1, amy.edit("work", line, "2|1", "amount", 7)),
			unitOf(2, amy.edit("work", ord, "2", "name", "mine")), unitOf(2, amy.edit("work", line, "3|1", "amount", 7)),
			unitOf(3, amy.edit("work", line, "4|1", "amount", 7)))
		amy.told(v, 0, "rejected transaction_rejected", "change 1 of the same transaction was rejected: public.line")
		amy.told(v, 0, "rejected transaction_rejected", "stale_version")
		amy.told(v, 1, "rejected stale_version", "")
		amy.told(v, 2, "rejected transaction_rejected", "")
		for _, i := range []int{3, 4, 5} {
			amy.told(v, i, "merged", "")
		}
		r.want("o1 mine", `SELECT string_agg(name, ' ' ORDER BY id) FROM public.ord WHERE id < 3`)
		r.want("100 2 7 7", `SELECT string_agg(amount::text, ' ' ORDER BY ord) FROM public.line WHERE ord < 5`)
		r.want("1,1,1,2,2,0", `SELECT string_agg(unit::text, ',' ORDER BY idx) FROM waystage.change WHERE session_id = (SELECT max(id) FROM waystage.session)`)
		r.want("7", `SELECT img->>'amount' FROM waystage.change WHERE code = 'transaction_rejected' AND tname = 'public.line'`) // as every rejected record
	})
	t.Run("a unit of independent tables is no unit", func(t *testing.T) {
		r.t = t
		v := amy.sync("work", unitOf(1, newLine(5, 1, 1)), unitOf(1, amy.edit("work", line, "6|1", "amount", 60)))
		amy.told(v, 0, "rejected row_exists", "")
		amy.told(v, 1, "merged", "")
	})
	t.Run("without numbers the session is the unit of the atomic tables", func(t *testing.T) {
		r.t = t
		amy.sync("free")
		v := amy.sync("work", amy.edit("work", ord, "3", "name", "x"), newOrd(4, "exists"), amy.edit("work", line, "7|1", "amount", 70))
		amy.told(v, 0, "rejected transaction_rejected", "row_exists")
		amy.told(v, 1, "rejected row_exists", "")
		amy.told(v, 2, "merged", "")
		r.want("-1 -1 0", `SELECT string_agg(unit::text, ' ' ORDER BY idx) FROM waystage.change WHERE session_id = (SELECT max(id) FROM waystage.session)`)
	})
	t.Run("refused unseen", func(t *testing.T) {
		r.t = t
		unknown := newOrd(40, "x")
		unknown.Table = "public.nothing"
		v := amy.sync("work", unitOf(1, newOrd(41, "a")), unitOf(1, newLine(41, 1, "zero")), unitOf(2, newOrd(42, "b")), unitOf(2, unknown),
			unitOf(3, newOrd(43, "c\x00")), unitOf(3, newLine(43, 1, 1)), unitOf(4, newOrd(44, "d")), unitOf(4, newLine(44, 1, 1)))
		amy.told(v, 0, "rejected transaction_rejected", "invalid_value")
		amy.told(v, 1, "rejected invalid_value", "")
		amy.told(v, 2, "rejected transaction_rejected", "unknown_table")
		amy.told(v, 3, "rejected unknown_table", "")
		amy.told(v, 4, "rejected invalid_value", "")
		amy.told(v, 5, "rejected transaction_rejected", "invalid_value")
		amy.told(v, 6, "merged", "")
		amy.told(v, 7, "merged", "")
		r.want("44", `SELECT string_agg(id::text, ' ') FROM public.ord WHERE id > 40`)
	})
	t.Run("what refers to a rejected insert", func(t *testing.T) {
		r.t = t
		amy.sync("work")
		v := amy.sync("work",
			newTree(3, 2, 0), newTree(2, 1, 0), newTree(1, nil, "bad"), newTree(4, nil, 0), newTree(5, 4, 0), // a child before its parent
			change(line, "", nil, row("ord", 5, "no", 1, "amount", 3)),                                    // exists: rejected
			change(line, "", nil, row("ord", 5, "no", 2, "amount", 3, "part_of_ord", 5, "part_of_no", 1)), // composite, other order, itself
			change(note, "", nil, row("id", 1, "line_ord", 5, "line_no", 2)), change(note, "", nil, row("id", 2, "line_ord", 5, "line_no", nil)),
			unitOf(1, change(ord, "", nil, row("id", 50, "name", "x", "code", "C"))), unitOf(1, newOrd(4, "exists")), change(note, "", nil, row("id", 3, "code", "C")))
		for i, want := range []string{"rejected dependency_rejected", "rejected dependency_rejected", "rejected invalid_value", "merged", "merged",
			"rejected row_exists", "rejected dependency_rejected", "rejected dependency_rejected", "merged",
			"rejected transaction_rejected", "rejected row_exists", "rejected dependency_rejected"} {
			amy.told(v, i, want, "")
		}
		amy.told(v, 6, "rejected dependency_rejected", `the row of public.line that the change refers to ("5", "1") was not inserted`)
		r.want("4 5", `SELECT string_agg(id::text, ' ' ORDER BY id) FROM public.tree`)
		r.want("2", `SELECT string_agg(id::text, ' ' ORDER BY id) FROM public.note`)
	})
	t.Run("what falls makes room for others of the batch", func(t *testing.T) {
		r.t = t
		amy.sync("work")
		ben.sync("work")
		// Amy's unit falls, so Ben's change of the same row, merged in the same batch, is not stale; and his unit stands.
		amy.send(amy.request("work", unitOf(1, amy.edit("work", ord, "8", "name", "amy")), unitOf(1, newOrd(9, "exists"))))
		ben.send(ben.request("work", unitOf(1, ben.edit("work", ord, "8", "name", "ben")), unitOf(1, ben.edit("work", line, "8|1", "amount", 88))))
		r.pump()
		amy.verdict(amy.receive(), "rejected transaction_rejected", "rejected row_exists")
		ben.verdict(ben.receive(), "merged", "merged")
		r.want("ben", `SELECT name FROM public.ord WHERE id = 8`)
	})
	t.Run("a redelivery changes nothing", func(t *testing.T) {
		r.t = t
		n := r.value(`SELECT count(*) FROM waystage.change`)
		amy.send(amy.last)
		r.pump()
		amy.verdict(amy.receive(), "rejected transaction_rejected", "rejected row_exists")
		r.want(n, `SELECT count(*) FROM waystage.change`)
	})
}

// Any mixture of units of several devices on few rows: each unit has one fate, a record falls only with another of its unit, and
// the mirror is what the merged records make of it, one session after the other.
func TestUnitsAreMergedAsOneByOne(t *testing.T) {
	r := newRigOf(t, unitTables, unitDefinitions)
	devs := []*dev{r.user("a", "all"), r.user("b", "all"), r.user("c", "all")}
	rapid.Check(t, func(t *rapid.T) {
		r.exec(`TRUNCATE waystage.staging, waystage.change, waystage.session, public.free CASCADE; UPDATE waystage.incarnation SET last_n = 0`)
		r.exec(`INSERT INTO public.free SELECT i, 0 FROM generate_series(1, 4) i`)
		var reqs [][]protocol.Change
		for _, d := range devs {
			d.inc, d.n, d.sets = randomID()+randomID(), 0, map[string]*devSet{}
			d.sync("free")
		}
		for _, d := range devs {
			var list []protocol.Change
			for k := 1; k <= 5; k++ {
				if !rapid.Bool().Draw(t, "touch") {
					continue
				}
				c := change("public.free", "", nil, row("id", k, "v", fmt.Sprintf("%d", rapid.IntRange(1, 2).Draw(t, "v"))))
				if k < 5 {
					c = d.edit("free", "public.free", fmt.Sprint(k), "v", rapid.IntRange(1, 2).Draw(t, "v"))
				}
				list = append(list, unitOf(rapid.Int64Range(0, 2).Draw(t, "unit"), c))
			}
			reqs = append(reqs, list)
			d.send(d.request("free", list...))
		}
		r.pump()
		model, by := map[string]string{"1": "0", "2": "0", "3": "0", "4": "0"}, map[string]bool{}
		for i, d := range devs {
			v := d.receive()
			bad := map[int64]bool{}
			own := make([]bool, len(reqs[i]))
			for j, c := range reqs[i] {
				key, want := *c.Key[0], *c.New[1]
				own[j] = by[key] && model[key] != want
				bad[c.Unit] = bad[c.Unit] || own[j]
			}
			for j, c := range reqs[i] {
				want := "merged "
				switch {
				case own[j] && c.Op == protocol.Insert:
					want = "rejected row_exists"
				case own[j]:
					want = "rejected stale_version"
				case bad[c.Unit]:
					want = "rejected transaction_rejected"
				default:
					by[*c.Key[0]], model[*c.Key[0]] = true, *c.New[1]
				}
				if got := v[j].State + " " + string(v[j].Code); got != want {
					t.Fatalf("device %d, record %d (%v): %q, want %q", i, j, c, got, want)
				}
			}
		}
		for key, want := range model {
			if got := r.value(`SELECT v FROM public.free WHERE id = $1::text::int`, key); got != want {
				t.Fatalf("row %s: %s, want %s", key, got, want)
			}
		}
	})
}
