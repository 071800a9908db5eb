package conflict

import (
	"fmt"
	"slices"
)

// The model of model_test.go with what goes wrong in life: the up worker dies at any point, its memory is lost and another
// begins; or it is only thought dead, and goes on beside the other; down is given a transaction again; foreign
// transactions delete a key and use it again; the source has a foreign key from key 1 (child) to key 0 (parent), which the
// mirror has not, and which may cascade (ADR 8); its trigger may be deferred to the commit; several records travel in one source transaction; two records of a session are an atomic unit (rule R8); a
// record refers to a row that a pending insert made.
//
// A new up worker moves the source's progress counter, writes what it then is to the mirror as its term, if no higher one
// stands there, waits until down has passed the counter's move, and begins with the first record, skipping what has its
// verdict. Every source transaction of a worker demands its counter, every refusal that it writes to the mirror its term.
// A failed compare-and-set waits until down has passed the moment of the failure, not until nothing is under way. The
// records of one session are tried in the order in which one statement after the other could write them.
//
// Checked in every state: no record is applied twice, or both applied and refused; no record overwrites a foreign image that its
// author had not seen; no record is refused without a cause; none is applied on top of a refused one, or on a stranger's row in
// the place of a refused insert's; a unit's records have one fate. Where nothing moves by itself any more: mirror == source,
// and nothing is pending.

const (
	parent int8 = 0
	child  int8 = 1
)

// sRules are the rules that can be broken; the zero value is the product's.
type sRules struct {
	noBarrier      bool // a new up worker does not wait for down
	noCounter      bool // source transactions demand no counter
	noTerm         bool // refusals demand no term
	termFirst      bool // a new up worker numbers its term at the mirror, before it moves the counter
	replays        bool // down applies a transaction that it has applied before
	impatient      bool // a failed compare-and-set is decided at once
	lastWriter     bool // base's writer is who wrote last: a foreign one does not stay
	expectsLater   bool // a rebased record expects base as it is when it is tried
	ignoresPending bool // R2: down writes the mirror row although changes are pending
	unsorted       bool // parent's deletes come before the child's
	rebasesAll     bool // R4: a record on top of a refused one is rebased when base's writer is our own
	forgetsParents bool // R8: nobody remembers refused inserts
	splitsUnits    bool // R8: a unit's records are applied one by one
	refusesAlone   bool // R8: a refusal is of the one record of its unit
	comparesLate   bool // R8: a unit compares each record's expectation when it writes it
	takesAll       bool // ADR 8: nobody looks at what a cascade takes along
	takesUnlooked  bool // ADR 8: what it takes is looked up in the mirror, not compared at the source
	takesPending   bool // ADR 8: it takes what has a pending change, whoever wrote base
}

type sScope struct {
	name          string
	start         [2]int8
	sessions, fwr int8
	pairs         bool // sessions may have a record of each key
	atomic        bool // and these are an atomic unit
	values        []int8
	lawful        bool // devices keep the foreign key in what they see
	restarts      int8 // up workers that die, or are thought dead
	reuse         bool // foreign transactions may delete a key and insert it again
	trigger       bool // the source answers a write of the parent by bumping the child
	deferred      bool // only at the commit
	foreignKey    bool
	cascade       bool // ON DELETE CASCADE: the child goes with the parent
	redelivers    bool // down dies and is sent again what it had taken last
	refuses       bool // the source may refuse any record
	finds         string
	sRules
}

// sChange is one record, as merge kept it.
type sChange struct {
	key      int8
	old, new int8
	seen     int8 // foreign writes of the key that the mirror row held
	unit     int8 // 0: none
	refers   int8 // the pending insert whose row it refers to; 0: none
	// Of a parent's delete where the source cascades: the child as the mirror had it, and foreign writes that that held.
	childOld, childSeen int8
	strange             uint8 // of the child's: what strange was before it
}

// sEvent is one transaction of the source's log.
type sEvent struct {
	own  uint8 // records that it carries, a bit each; 0: foreign
	pos  int8  // its place in the log, where down may be sent it again
	n    int8
	keys [4]int8
	vals [4]int8
	fw   [4]int8
}

type sPhase uint8

const (
	dead       sPhase = iota
	taking            // knows of nothing
	announcing        // has moved the counter
	starting          // waits for down
	running
	missed   // a compare-and-set failed: waits for down
	refusing // the source refused the record, the mirror does not know yet
)

type sWorker struct {
	phase         sPhase
	next          int8    // records before it are done with
	wait          int8    // transactions that down must take first
	failed        int8    // the record that missed or was refused
	victim        bool    // it missed because of what a cascade would take along
	rebases       [2]int8 // of the next record and of the one with it in its unit
	expect        [2]int8 // base when the rebasing was decided
	expectSeen    [2]int8 // foreign writes that it held
	counter, term int8
}

// done goes on behind a record.
func (w *sWorker) done(rec int8) {
	*w = sWorker{phase: running, next: rec, counter: w.counter, term: w.term}
}

type sState struct {
	mirror, source   [2]int8
	changes          [4]sChange
	merged           int8
	locals, foreigns int8
	restarts         int8
	log              [6]sEvent
	logLen           int8
	last             sEvent // kept only where down may replay it
	pending          [2]uint8
	base             [2]mBase
	refused, applied uint8
	writes, seen     [2]int8
	strange          uint8 // records merged before somebody who is no device wrote the mirror's child row
	commits, at      int8  // transactions in the source's log, and how many of them down has taken
	counter, term    int8
	up               [2]sWorker // the second is a zombie
	bad              uint8
}

var sBad = []string{"", "DOUBLE: a record was applied twice", "TWO VERDICTS: a record was applied and refused",
	"OVERWRITE: a record replaced a foreign image that its author had not seen", "FALSE REFUSAL: nothing stood against the record",
	"ON TOP: a record was applied on top of a refused one", "HUNG: a record was applied although the insert that it refers to was refused"}

const (
	bDouble uint8 = 1 + iota
	bTwo
	bOverwrite
	bFalse
	bOnTop
	bHung
)

func (s *sState) fail(b uint8) {
	if s.bad == 0 {
		s.bad = b
	}
}

func (s *sState) isPending(rec int8) bool { return s.pending[s.changes[rec-1].key]&(1<<rec) != 0 }

// breaks says that the source's foreign key forbids a write.
func (sc *sScope) breaks(rows [2]int8, key, val int8) bool {
	orphan := key == child && val != absent && rows[parent] == absent
	return sc.cascade && orphan || sc.foreignKey && (orphan || key == parent && val == absent && rows[child] != absent)
}

// write does one write at the source, with its trigger, as a part of e.
func (sc *sScope) write(s *sState, e *sEvent, key, val int8) {
	add := func(k, v int8) {
		if e.own == 0 {
			s.writes[k]++
		}
		s.source[k] = v
		e.keys[e.n], e.vals[e.n], e.fw[e.n] = k, v, s.writes[k]
		e.n++
	}
	if val == s.source[key] && val == absent {
		return // a statement that finds nothing to delete fires no trigger and leaves nothing in the log
	}
	add(key, val)
	if sc.cascade && key == parent && val == absent && s.source[child] != absent {
		add(child, absent)
	}
	if !sc.deferred {
		sc.fire(s, e, add)
	}
}

// fire is the source's trigger on a write of the parent.
func (sc *sScope) fire(s *sState, e *sEvent, add func(k, v int8)) {
	at := slices.Index(e.keys[:e.n], parent)
	if sc.trigger && at >= 0 && (sc.deferred || e.keys[e.n-1] == parent) && bump(s.source[child]) != s.source[child] {
		add(child, bump(s.source[child]))
	}
}

func (sc *sScope) commit(s *sState, e sEvent) {
	if sc.deferred {
		sc.fire(s, &e, func(k, v int8) {
			if e.own == 0 {
				s.writes[k]++
			}
			s.source[k] = v
			e.keys[e.n], e.vals[e.n], e.fw[e.n] = k, v, s.writes[k]
			e.n++
		})
	}
	if sc.redelivers {
		s.commits++
		e.pos = s.commits
	}
	s.log[s.logLen] = e
	s.logLen++
}

// fate is what becomes of the child that a delete of the parent would take along, at a source with these rows. compared: the same
// transaction has compared the child already.
func (sc *sScope) fate(s *sState, rec int8, rows [2]int8, compared bool) Fate {
	c := s.changes[rec-1]
	if !sc.cascade || c.key != parent || c.new != absent || rows[parent] == absent || rows[child] == absent || sc.takesAll {
		return Goes
	}
	v := Victim{Writer: s.base[child].writer, Known: s.mirror[child] != absent && s.strange&(1<<rec) == 0}
	v.Same = s.mirror[child] == rows[child]
	for first := int8(1); first <= s.merged; first++ { // the child's first pending change, if it has any
		if s.changes[first-1].key == child && s.isPending(first) {
			v.Known = first < rec || s.changes[first-1].strange&(1<<rec) == 0
			v.Same = first > rec && s.base[child].val == rows[child]
			if sc.takesPending {
				v.Writer, v.Known = Initial, true
			}
			break
		}
	}
	v.Same = v.Same || compared || sc.takesUnlooked
	return Cascade(v)
}

type sStep struct {
	what string
	self bool // happens without users and accidents
	to   sState
}

func (sc *sScope) next(s sState) (out []sStep) {
	step := func(self bool, to sState, what string, args ...any) {
		if len(args) > 0 {
			what = fmt.Sprintf(what, args...)
		}
		out = append(out, sStep{what, self, to})
	}
	sc.users(s, func(to sState, what string, args ...any) { step(false, to, what, args...) })
	for i := range s.up {
		who := [2]string{"up", "zombie"}[i]
		sc.worker(s, i, func(to sState, what string, args ...any) { step(true, to, who+" "+what, args...) })
	}
	if s.restarts < sc.restarts && s.up[1].phase == dead { // one more worker; the old one is dead, or a zombie
		t := s
		t.restarts++
		t.up[0] = sWorker{phase: taking}
		step(false, t, "up dies, another begins")
		t.up[1] = s.up[0]
		step(false, t, "up is thought dead, another begins")
	}
	if s.logLen > 0 {
		t := s
		e := t.log[0]
		copy(t.log[:], s.log[1:])
		t.log[len(t.log)-1] = sEvent{}
		t.logLen--
		for i := range t.up {
			t.up[i].wait = max(0, t.up[i].wait-1)
		}
		if sc.replays || sc.redelivers {
			t.last = e
		}
		sc.down(&t, e)
		step(true, t, "down takes %v", e)
	}
	if s.last.n > 0 {
		t := s
		t.last = sEvent{}
		sc.down(&t, s.last)
		step(false, t, "down crashes and takes again %v", s.last)
	}
	return out
}

func (e sEvent) String() string {
	s := "foreign"
	if e.own != 0 {
		s = "own"
	}
	for i := range e.n {
		s += fmt.Sprintf(" key%d=%d", e.keys[i], e.vals[i])
	}
	return s
}

// users are device sessions, merged at once, and foreign transactions.
func (sc *sScope) users(s sState, step func(to sState, what string, args ...any)) {
	merge := func(what string, recs ...[2]int8) {
		t := s
		t.locals++
		for _, r := range recs {
			if sc.lawful && sc.breaks(t.mirror, r[0], r[1]) {
				return
			}
			if t.merged == int8(len(t.changes)) || r[1] == t.mirror[r[0]] {
				return
			}
			t.merged++
			k := r[0]
			c := sChange{key: k, old: t.mirror[k], new: r[1], seen: t.seen[k]}
			if sc.cascade && k == parent && r[1] == absent {
				c.childOld, c.childSeen = t.mirror[child], t.seen[child]
			}
			if sc.atomic && len(recs) > 1 {
				c.unit = t.locals
			}
			if sc.foreignKey && k == child && c.new != absent && t.mirror[parent] != absent {
				for p := int8(1); p < t.merged; p++ {
					if x := t.changes[p-1]; x.key == parent && x.old == absent && t.isPending(p) {
						c.refers = p
					}
				}
			}
			t.changes[t.merged-1] = c
			if !t.base[k].has {
				t.base[k] = mBase{has: true, val: t.mirror[k], seen: t.seen[k]}
			}
			t.pending[k] |= 1 << t.merged
			t.mirror[k] = r[1]
			if k == child {
				t.changes[t.merged-1].strange, t.strange = t.strange, 0
			}
		}
		if sc.unsorted && len(recs) == 2 && recs[1][1] == absent { // as merge meets the tables: the parent's first
			c := t.changes
			t.changes[t.merged-1], t.changes[t.merged-2] = c[t.merged-2], c[t.merged-1]
			a, b := uint8(1)<<t.merged, uint8(1)<<(t.merged-1)
			t.pending[recs[0][0]] ^= a | b
			t.pending[recs[1][0]] ^= a | b
		}
		step(t, what)
	}
	if s.locals < sc.sessions {
		for _, val := range sc.values {
			for key := range int8(2) {
				merge(fmt.Sprintf("device key%d=%d", key, val), [2]int8{key, val})
			}
			if !sc.pairs {
				continue
			}
			if val == absent {
				merge("device deletes child and parent", [2]int8{child, val}, [2]int8{parent, val})
			} else {
				merge(fmt.Sprintf("device key0=%d,key1=%[1]d", val), [2]int8{parent, val}, [2]int8{child, val})
			}
		}
	}
	if s.foreigns >= sc.fwr || int(s.logLen) == len(s.log) {
		return
	}
	foreign := func(what string, key int8, vals ...int8) {
		t := s
		t.foreigns++
		var e sEvent
		for _, v := range vals {
			if sc.breaks(t.source, key, v) {
				return
			}
			sc.write(&t, &e, key, v)
		}
		sc.commit(&t, e)
		step(t, what)
	}
	for key := range int8(2) {
		for _, val := range []int8{5, absent} {
			if val != s.source[key] {
				foreign(fmt.Sprintf("foreign key%d=%d", key, val), key, val)
			}
		}
		if sc.reuse && s.source[key] != absent {
			foreign(fmt.Sprintf("foreign re-uses key%d", key), key, absent, 5)
			foreign(fmt.Sprintf("foreign deletes key%d and inserts what it was at first", key), key, absent, sc.start[key])
		}
	}
}

// worker is what an up worker may do.
func (sc *sScope) worker(s sState, i int, step func(to sState, what string, args ...any)) {
	w := s.up[i]
	rec := w.next + 1
	t := s
	me := &t.up[i]
	if w.phase == dead {
		return
	}
	stop := func(why string) {
		t := s
		t.up[i] = sWorker{}
		if i == 0 { // it is the elected one, so it begins again; a zombie does not
			t.up[0] = sWorker{phase: taking}
		}
		step(t, "finds %s and stops", why)
	}
	switch {
	case w.phase == taking && sc.termFirst || w.phase == announcing && !sc.termFirst:
		if sc.termFirst {
			me.term = s.term + 1
		}
		if me.term <= s.term {
			stop("a higher term")
			return
		}
		t.term, me.phase = me.term, me.phase+1
		if me.phase > announcing && sc.noBarrier {
			me.wait = 0
		}
		step(t, "begins its term")
		return
	case w.phase == taking || w.phase == announcing:
		t.counter++
		me.counter, me.wait, me.phase = t.counter, s.logLen, me.phase+1
		if !sc.termFirst {
			me.term = t.counter
		}
		step(t, "moves the counter")
		return
	case w.phase == starting:
		if w.wait == 0 {
			me.phase = running
			step(t, "begins")
		}
		return
	}
	if rec > s.merged {
		if i == 1 { // nothing left to do, and nothing will be asked of it
			t.up[1] = sWorker{}
			step(t, "ends")
		}
		return
	}
	last := s.unitEnd(rec)
	if sc.splitsUnits {
		last = rec
	}
	if w.phase == refusing || w.phase == missed {
		if w.phase == missed && w.wait > 0 && !sc.impatient {
			return
		}
		if w.term != s.term && !sc.noTerm {
			stop("another term")
			return
		}
		if !s.isPending(w.failed) {
			me.done(last)
			step(t, "skips %d", rec)
			return
		}
		c := s.changes[w.failed-1]
		if w.victim { // the next try looks again
			me.phase, me.victim, me.failed = running, false, 0
			step(t, "looks again at what %d takes along", rec)
			return
		}
		if w.phase == missed {
			j := w.failed - rec
			a, why := Retry(s.base[c.key].writer, s.base[c.key].refused && !sc.rebasesAll, int(w.rebases[j]))
			if a == Rebase {
				me.rebases[j]++
				me.expect[j], me.expectSeen[j], me.phase = s.base[c.key].val, s.base[c.key].seen, running
				step(t, "rebases %d", w.failed)
				return
			}
			caused := why == Source && s.writes[c.key] != c.seen
			for r := int8(1); r < rec; r++ {
				caused = caused || why == Dependency && s.changes[r-1].key == c.key && s.refused&(1<<r) != 0
			}
			if !caused {
				t.fail(bFalse)
			}
		}
		sc.refuse(&t, rec, last, w.failed)
		me.done(last)
		step(t, "refuses %d of %d to %d", w.failed, rec, last)
		return
	}
	if !s.isPending(rec) { // it has its verdict
		me.done(last)
		step(t, "skips %d", rec)
		return
	}
	for n := rec; n <= last; n++ {
		if r := s.changes[n-1].refers; r > 0 && s.refused&(1<<r) != 0 && !sc.forgetsParents {
			me.phase, me.failed = refusing, n
			step(t, "sees that %d refers to the refused %d", n, r)
			return
		}
	}
	if w.counter != s.counter && !sc.noCounter {
		stop("another counter")
		return
	}
	if int(s.logLen) == len(s.log) {
		return
	}
	if sc.refuses {
		for n := rec; n <= last; n++ {
			x := t
			x.up[i].phase, x.up[i].failed = refusing, n
			step(x, "has %d refused by the source", n)
		}
	}
	// One record or unit, or two records, in one transaction: all of them hit, or the first is tried alone.
	var e sEvent
	onChild := func(from, to int8) bool {
		return slices.ContainsFunc(s.changes[from-1:to], func(c sChange) bool { return c.key == child })
	}
	for n := rec; n <= max(last, min(rec+1, s.merged)); n++ {
		c := s.changes[n-1]
		if n > last && (s.unitEnd(n) != n || c.refers > 0 && s.refused&(1<<c.refers) != 0) {
			return
		}
		expected, seen, rebased := c.old, c.seen, false
		if j := n - rec; n <= last && w.rebases[j] > 0 {
			expected, seen, rebased = w.expect[j], w.expectSeen[j], true
			if sc.expectsLater {
				expected, seen = s.base[c.key].val, s.base[c.key].seen
			}
		}
		stands := t.source[c.key]
		if n <= last && !sc.comparesLate { // a unit compares all that it expects, and locks it, before it writes: what differs then is its own doing
			stands = s.source[c.key]
		}
		hit := stands == expected || c.new == absent && stands == absent
		forbidden := hit && t.source[c.key] != c.new && sc.breaks(t.source, c.key, c.new)
		fate := sc.fate(&t, n, t.source, n > rec && onChild(rec, n-1))
		if n <= last { // a unit looks before it writes
			fate = sc.fate(&s, n, s.source, last > rec && onChild(rec, last))
		}
		if n > last && (!hit || forbidden || fate != Goes || !s.isPending(n)) {
			return
		}
		if hit && !forbidden && fate != Goes {
			x := s
			x.bad = t.bad
			caused := sc.trigger || s.writes[child] != c.childSeen
			me := &x.up[i]
			me.failed = n
			if fate == Stranger {
				if !caused {
					x.fail(bFalse)
				}
				me.phase = refusing
				step(x, "finds that %d would take a stranger's row along", n)
				return
			}
			if s.logLen == 0 && !caused { // nothing is under way that could make it clear
				x.fail(bFalse)
			}
			me.phase, me.victim, me.wait = missed, true, s.logLen
			step(x, "does not know what %d would take along", n)
			return
		}
		t := &t
		if forbidden || !hit {
			x := s
			x.bad = t.bad
			me := &x.up[i]
			me.failed = n
			if forbidden {
				if s.foreigns == 0 && s.refused == 0 && sc.lawful {
					x.fail(bFalse)
				}
				me.phase = refusing
				step(x, "has %d refused by the foreign key", n)
				return
			}
			me.phase, me.wait = missed, s.logLen
			step(x, "misses %d", n)
			return
		}
		if expected != c.old && expected != absent && seen != c.seen {
			t.fail(bOverwrite)
		}
		if sc.cascade && c.key == parent && c.new == absent && t.source[parent] != absent && t.source[child] != absent &&
			t.source[child] != c.childOld && s.writes[child] != c.childSeen && !onChild(rec, n) {
			t.fail(bOverwrite)
		}
		if rebased && expected != c.old && c.new != absent && s.base[c.key].refused {
			t.fail(bOnTop)
		}
		if c.refers > 0 && t.refused&(1<<c.refers) != 0 {
			t.fail(bHung)
		}
		if t.applied&(1<<n) != 0 {
			t.fail(bDouble)
		}
		if t.refused&(1<<n) != 0 {
			t.fail(bTwo)
		}
		e.own |= 1 << n
		sc.write(t, &e, c.key, c.new)
		t.applied |= 1 << n
		if n < last {
			continue
		}
		t.up[i].done(n)
		x := *t
		sc.commit(&x, e)
		step(x, "applies %d to %d", rec, n)
	}
}

// unitEnd is the last record of the unit that begins with rec.
func (s *sState) unitEnd(rec int8) int8 {
	u := s.changes[rec-1].unit
	for u != 0 && rec < s.merged && s.changes[rec].unit == u {
		rec++
	}
	return rec
}

// refuse gives a record its verdict, and with it those of its unit that fall.
func (sc *sScope) refuse(s *sState, first, last, failed int8) {
	var list []Member
	for n := first; n <= last; n++ {
		list = append(list, Member{Unit: int64(s.changes[n-1].unit), Failed: n == failed})
	}
	down := []int8{failed}
	for _, f := range Fall(list) {
		if !sc.refusesAlone {
			down = append(down, first+int8(f.Member))
		}
	}
	for _, n := range down {
		if s.applied&(1<<n) != 0 {
			s.fail(bTwo)
		}
		s.refused |= 1 << n
		sc.settle(s, n, false)
	}
}

// down applies one whole transaction of the source to the mirror.
func (sc *sScope) down(s *sState, e sEvent) {
	if sc.redelivers && !sc.replays {
		if e.pos <= s.at {
			return
		}
		s.at = e.pos
	}
	for i := range e.n {
		k := e.keys[i]
		if !Route(popcount(s.pending[k])) || sc.ignoresPending {
			s.mirror[k], s.seen[k] = e.vals[i], e.fw[i]
			if k == child {
				sc.written(s, e.own)
			}
			continue
		}
		w := s.base[k].writer.After(e.own != 0)
		if sc.lastWriter && e.own != 0 {
			w = Own
		}
		s.base[k] = mBase{true, e.vals[i], e.fw[i], w, s.base[k].refused}
	}
	for rec := int8(1); rec <= s.merged; rec++ {
		if e.own&(1<<rec) != 0 && s.isPending(rec) {
			sc.settle(s, rec, true)
		}
	}
}

func (sc *sScope) settle(s *sState, rec int8, accepted bool) {
	k := s.changes[rec-1].key
	s.pending[k] &^= 1 << rec
	if Route(popcount(s.pending[k])) {
		s.base[k].refused = s.base[k].refused || !accepted
		return
	}
	b := s.base[k]
	if Settle(accepted, b.val == s.mirror[k], b.writer) != Keep {
		s.mirror[k], s.seen[k] = b.val, b.seen
		if k == child && b.writer == Foreign {
			sc.written(s, 0)
		}
	}
	s.base[k] = mBase{}
}

// written notes who wrote the mirror's child row: a device by one of these records, or somebody else.
func (sc *sScope) written(s *sState, own uint8) {
	if !sc.cascade {
		return
	}
	s.strange = 1<<(s.merged+1) - 1
	for rec := int8(1); rec <= s.merged; rec++ {
		if own&(1<<rec) != 0 && s.changes[rec-1].key == child {
			s.strange = 0
		}
	}
}

// check names what is wrong with a state; still says that nothing moves by itself any more.
func (sc *sScope) check(s sState, still bool) string {
	for rec := int8(1); rec <= s.merged; rec = s.unitEnd(rec) + 1 {
		whole := uint8(1<<(s.unitEnd(rec)+1) - 1<<rec)
		if a, r := s.applied&whole, s.refused&whole; a != 0 && a != whole || r != 0 && r != whole {
			return fmt.Sprintf("SPLIT: of the records of a unit (%b) %b are applied and %b refused", whole, a, r)
		}
	}
	switch {
	case s.bad != 0:
		return sBad[s.bad]
	case !still:
		return ""
	case s.pending != [2]uint8{} || s.base != [2]mBase{}:
		return fmt.Sprintf("STUCK: a change has no verdict, and nothing will give it one (pending %b)", s.pending)
	case s.mirror != s.source:
		return fmt.Sprintf("DIVERGED: mirror %v, source %v", s.mirror, s.source)
	}
	return ""
}

func (sc *sScope) explore(limit int) (states int, bad string, trace []string) {
	start := sState{mirror: sc.start, source: sc.start}
	start.up[0] = sWorker{phase: running}
	type from struct {
		prev uint32
		what string
	}
	all, how := []sState{start}, []from{{}}
	seen := map[sState]struct{}{start: {}}
	for i := uint32(0); int(i) < len(all); i++ {
		steps := sc.next(all[i])
		still := true
		for _, n := range steps {
			still = still && !n.self
		}
		if bad := sc.check(all[i], still); bad != "" {
			for ; i != 0; i = how[i].prev {
				trace = append(trace, how[i].what)
			}
			slices.Reverse(trace)
			return len(all), bad, trace
		}
		for _, n := range steps {
			if _, ok := seen[n.to]; !ok {
				seen[n.to] = struct{}{}
				all, how = append(all, n.to), append(how, from{i, n.what})
			}
		}
		if len(all) > limit {
			return len(all), "more states than the limit: the scope is too large to be exhaustive", nil
		}
	}
	return len(all), "", nil
}
