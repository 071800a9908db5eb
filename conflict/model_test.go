package conflict

import (
	"fmt"
	"strings"
	"testing"
)

// The exhaustive model of rules R1 to R4: two keys, device sessions that write one or both of them, foreign writes at
// the source, a source trigger that answers a write of key 0 by writing key 1, and a source that may refuse any record.
// Every interleaving of merge, up and down is visited; the decisions are those of this package. Checked: when nothing
// is in flight, mirror == source and nothing is pending; a record whose key no foreigner touched is never refused
// unless the source itself refuses; a record never overwrites a foreign image that its author had not seen.

const absent = int8(-1)

// change of one key by one record.
type mChange struct {
	key      int8
	old, new int8 // mirror row before the merge, image after
	seen     int8 // foreign writes of the key that the mirror row held then
}

// event of the source's log: one transaction.
type mEvent struct {
	own  int8    // number of the record that it carried, from 1; 0: foreign
	n    int8    // rows used
	keys [2]int8 // rows in order
	vals [2]int8
	fw   [2]int8 // foreign writes that the source's row held after it
}

type mBase struct {
	has     bool
	val     int8
	seen    int8
	writer  Writer
	refused bool // a change of the key was refused while others were pending
}

type mState struct {
	mirror, source [2]int8
	changes        [4]mChange // by record number - 1
	merged         int8       // records merged
	tried          int8       // records that have left the up queue
	log            [8]mEvent
	logLen         int8
	foreign        int8 // foreign writes done
	locals         int8 // device sessions merged
	pending        [2]uint8
	base           [2]mBase
	refused        uint8
	writes         [2]int8 // foreign writes of each key at the source
	seen           [2]int8 // of these, how many the mirror row holds
	rebases        int8
	unseen         bool // a record overwrote a foreign image that its author had not seen
	expect         int8 // what a rebased record expects: base as it was when the decision fell, never as it is later
}

type mScope struct {
	name            string
	sessions, fwr   int8
	trigger         bool // the source answers a write of key 0 by bumping key 1
	refuses         bool // the source may refuse any record
	recordsPerVisit int8
}

func bump(v int8) int8 {
	if v == absent || v >= 10 {
		return v
	}
	return v + 10
}

// sourceWrite applies a write and its trigger, and returns the event.
func (sc mScope) sourceWrite(s *mState, own, key, val int8) {
	if own == 0 {
		s.writes[key]++
	}
	e := mEvent{own: own, n: 1, keys: [2]int8{key}, vals: [2]int8{val}, fw: [2]int8{s.writes[key]}}
	s.source[key] = val
	if sc.trigger && key == 0 && bump(s.source[1]) != s.source[1] {
		s.source[1] = bump(s.source[1])
		e.n, e.keys[1], e.vals[1], e.fw[1] = 2, 1, s.source[1], s.writes[1]
	}
	s.log[s.logLen] = e
	s.logLen++
}

// settle ends the record's pending entry: the shared end of an acceptance (through down) and of a refusal (by up).
func (s *mState) settle(rec int8, accepted bool) {
	k := s.changes[rec-1].key
	s.pending[k] &^= 1 << rec
	if Route(popcount(s.pending[k])) {
		s.base[k].refused = s.base[k].refused || !accepted
		return
	}
	b := s.base[k]
	switch Settle(accepted, b.val == s.mirror[k], b.writer) {
	case Keep:
		if b.val != s.mirror[k] {
			panic("kept a row that differs from base")
		}
	default:
		s.mirror[k], s.seen[k] = b.val, b.seen
	}
	s.base[k] = mBase{}
}

func popcount(b uint8) (n int) {
	for ; b != 0; b &= b - 1 {
		n++
	}
	return n
}

func (sc mScope) merge(s *mState, key, val int8) {
	s.merged++
	s.changes[s.merged-1] = mChange{key, s.mirror[key], val, s.seen[key]}
	if !s.base[key].has {
		s.base[key] = mBase{has: true, val: s.mirror[key], seen: s.seen[key]}
	}
	s.pending[key] |= 1 << s.merged
	s.mirror[key] = val
}

type mStep struct {
	what string
	to   mState
}

func (sc mScope) next(s mState) (out []mStep) {
	add := func(what string, to mState) { out = append(out, mStep{what, to}) }
	if s.locals < sc.sessions {
		for key := int8(0); key < 2; key++ {
			for _, val := range []int8{1, 2, absent} {
				if val == s.mirror[key] || (val == absent && s.mirror[key] == absent) {
					continue
				}
				t := s
				t.locals++
				sc.merge(&t, key, val)
				add(fmt.Sprintf("device key%d=%d", key, val), t)
			}
		}
		if sc.recordsPerVisit > 1 && s.merged+2 <= int8(len(s.changes)) && s.mirror[0] != absent && s.mirror[1] != absent && s.mirror[0] != 3 && s.mirror[1] != 3 {
			t := s
			t.locals++
			sc.merge(&t, 0, 3)
			sc.merge(&t, 1, 3)
			add("device key0=3,key1=3", t)
		}
	}
	if s.foreign < sc.fwr {
		for key := int8(0); key < 2; key++ {
			for _, val := range []int8{5, absent} {
				if val == s.source[key] {
					continue
				}
				t := s
				t.foreign++
				sc.sourceWrite(&t, 0, key, val)
				add(fmt.Sprintf("foreign key%d=%d", key, val), t)
			}
		}
	}
	if s.tried < s.merged { // up
		rec := s.tried + 1
		c := s.changes[rec-1]
		expected := c.old
		if s.rebases > 0 {
			expected = s.expect
		}
		switch {
		case s.source[c.key] == expected || (c.new == absent && s.source[c.key] == absent):
			t := s
			t.unseen = s.source[c.key] != c.old && s.source[c.key] != absent && s.writes[c.key] != c.seen
			t.tried, t.rebases, t.expect = rec, 0, 0
			sc.sourceWrite(&t, rec, c.key, c.new)
			add(fmt.Sprintf("up accepts %d", rec), t)
		case s.logLen > 0: // rule R4: down has not passed the failure yet, up waits
		default:
			t := s
			if a, _ := Retry(s.base[c.key].writer, s.base[c.key].refused, int(s.rebases)); a == Rebase {
				t.rebases++
				t.expect = s.base[c.key].val
				add(fmt.Sprintf("up rebases %d", rec), t)
			} else {
				sc.refuse(&t, rec)
				add(fmt.Sprintf("up refuses %d", rec), t)
			}
		}
		if sc.refuses {
			t := s
			sc.refuse(&t, rec)
			add(fmt.Sprintf("source refuses %d", rec), t)
		}
	}
	if s.logLen > 0 { // down: one whole transaction
		t := s
		e := t.log[0]
		copy(t.log[:], s.log[1:])
		t.log[len(t.log)-1] = mEvent{}
		t.logLen--
		for i := int8(0); i < e.n; i++ {
			k := e.keys[i]
			if !Route(popcount(t.pending[k])) {
				t.mirror[k], t.seen[k] = e.vals[i], e.fw[i]
				continue
			}
			t.base[k] = mBase{true, e.vals[i], e.fw[i], t.base[k].writer.After(e.own > 0), t.base[k].refused}
		}
		if e.own > 0 {
			t.settle(e.own, true)
		}
		add(fmt.Sprintf("down takes %+v", e), t)
	}
	return out
}

func (sc mScope) refuse(s *mState, rec int8) {
	s.tried, s.rebases, s.expect = rec, 0, 0
	s.refused |= 1 << rec
	s.settle(rec, false)
}

// check names what is wrong with a state in which nothing is in flight.
func (sc mScope) check(s mState) string {
	if s.unseen {
		return "overwrote a foreign image that the record's author had not seen"
	}
	if s.logLen > 0 || s.tried < s.merged {
		return ""
	}
	switch {
	case s.mirror != s.source:
		return fmt.Sprintf("diverged: mirror %v, source %v", s.mirror, s.source)
	case s.pending != [2]uint8{} || s.base != [2]mBase{}:
		return "a pending entry is left"
	case !sc.refuses && s.refused != 0:
		if s.foreign == 0 {
			return "refused without a foreign write"
		}
	}
	return ""
}

func (sc mScope) explore(t *testing.T, limit int) {
	type from struct {
		prev mState
		what string
	}
	start := mState{}
	seen := map[mState]from{start: {}}
	queue := []mState{start}
	for len(queue) > 0 {
		s := queue[0]
		queue = queue[1:]
		if bad := sc.check(s); bad != "" {
			var path []string
			for s != start {
				f := seen[s]
				path = append([]string{f.what}, path...)
				s = f.prev
			}
			t.Fatalf("%s after: %s", bad, strings.Join(path, "; "))
		}
		for _, n := range sc.next(s) {
			if _, ok := seen[n.to]; !ok {
				seen[n.to] = from{s, n.what}
				queue = append(queue, n.to)
			}
		}
		if len(seen) > limit {
			t.Fatalf("more than %d states: the scope is too large to be exhaustive", limit)
		}
	}
	t.Logf("%d states, all converge", len(seen))
}

func TestModelMirrorAndSourceConverge(t *testing.T) {
	for _, sc := range []mScope{
		{name: "three sessions, one foreign write", sessions: 3, fwr: 1},
		{name: "two sessions, two foreign writes", sessions: 2, fwr: 2},
		{name: "trigger", sessions: 2, fwr: 1, trigger: true},
		{name: "trigger, two foreign writes", sessions: 2, fwr: 2, trigger: true},
		{name: "refusals", sessions: 2, fwr: 1, refuses: true},
		{name: "refusals and trigger", sessions: 2, fwr: 2, trigger: true, refuses: true},
		{name: "sessions of two records", sessions: 2, fwr: 1, recordsPerVisit: 2},
		{name: "sessions of two records, trigger, refusals", sessions: 2, fwr: 1, recordsPerVisit: 2, trigger: true, refuses: true},
	} {
		t.Run(sc.name, func(t *testing.T) { t.Parallel(); sc.explore(t, 3_000_000) })
	}
}
