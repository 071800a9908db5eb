package conflict

import (
	"fmt"
	"slices"
)

// The steps of the joined model, in the order of one change's way.

type jStep struct {
	what string
	self bool
	to   jState
}

func (sc *jScope) start() (s jState) {
	s.tx = 2
	for k := range s.mirror {
		if !sc.absent {
			s.source[k] = sc.image(1, 0, jImage{}, sc.all())
			s.mirror[k].ver = 1
		}
		s.mirror[k].img, s.mirror[k].stamp = s.source[k], 1
		for d := range s.dev {
			s.dev[d].row[k] = jDeviceRow{live: s.source[k], simg: s.source[k], sver: s.mirror[k].ver}
			s.dev[d].cursor = 2
		}
	}
	return s
}

// all are the columns, a bit each.
func (sc *jScope) all() uint8 {
	if sc.policy == "" {
		return 1
	}
	return 3
}

// image is an image after the write of a value into columns; number is the write's, from 1, or 0.
func (sc *jScope) image(val, number uint8, before jImage, columns uint8) jImage {
	for c := range before {
		if columns&(1<<c) == 0 {
			continue
		}
		before[c].val = val
		if number > 0 {
			before[c].over |= 1 << (number - 1)
		}
	}
	return before
}

// writes are the sets of columns that one write of a row may change.
func (sc *jScope) writes(row jImage) []uint8 {
	if sc.policy == "" || !row.there() {
		return []uint8{sc.all()}
	}
	return []uint8{1, 2}
}

func (sc *jScope) next(s jState) (out []jStep) {
	step := func(self bool, to jState, what string, args ...any) {
		out = append(out, jStep{fmt.Sprintf(what, args...), self, to})
	}
	for d := range sc.devices {
		sc.device(s, d, step)
	}
	sc.foreign(s, step)
	sc.upSteps(s, step)
	if s.logs > 0 {
		t := s
		e := t.log[0]
		copy(t.log[:], s.log[1:])
		t.log[len(t.log)-1] = jEvent{}
		t.logs--
		t.up.wait = max(t.up.wait, 1) - 1
		sc.down(&t, e)
		step(true, t, "down takes %v", e)
	}
	if s.crashes < sc.crashes {
		t := s
		t.crashes++
		t.up = jUp{starting: true, wait: s.logs}
		if sc.noBarrier {
			t.up.wait = 0
		}
		step(false, t, "up dies, another begins")
	}
	return out
}

// device is what a device and its sessions do.
func (sc *jScope) device(s jState, d uint8, step func(bool, jState, string, ...any)) {
	name := string("AB"[d])
	if s.edits[d] < sc.edits[d] {
		for k := range sc.keys {
			edit := func(columns uint8, val func(n uint8) uint8, what string) {
				t := s
				t.edits[d]++
				n := t.write(d + 1)
				r := &t.dev[d].row[k]
				if !r.dirty {
					r.dirty, r.bver = true, r.sver
					if sc.policy != "" {
						r.bimg = r.simg
					}
				}
				before := r.live
				r.live = sc.image(val(n), n, before, columns)
				if !r.sent || before != r.sentImg { // the user replaces his own unsent edit
					t.dev[d].owed &^= t.newest(before, d)
				}
				t.dev[d].owed |= 1 << (n - 1)
				step(false, t, "%s %s key%d", name, what, k)
			}
			for _, columns := range sc.writes(s.dev[d].row[k].live) {
				edit(columns, func(n uint8) uint8 { return 1 + n }, fmt.Sprintf("edits columns %b of", columns))
			}
			if sc.deletes && s.dev[d].row[k].live.there() {
				edit(sc.all(), func(uint8) uint8 { return 0 }, "deletes")
			}
		}
	}
	dev := &s.dev[d]
	switch {
	case !dev.open:
		need := false
		for k := range sc.keys {
			need = need || dev.row[k].dirty && !dev.row[k].sent || s.mirror[k].stamp >= dev.cursor
		}
		for _, r := range s.rec[:s.recs] {
			need = need || r.dev == d && r.stamp >= dev.cursor
		}
		if !need {
			return
		}
		t := s
		td := &t.dev[d]
		td.open = true
		for k := range sc.keys {
			if r := &td.row[k]; r.dirty && !r.sent {
				r.sent, r.sentImg, r.sentBver, r.sentBase = true, r.live, r.bver, r.bimg
			}
		}
		step(true, t, "%s begins a session", name)
	case !dev.taken:
		t := s
		if sc.merge(&t, d) {
			step(true, t, "merge takes the session of %s", name)
		}
	default:
		if p := sc.compose(&s, d); p != dev.reply {
			t := s
			t.dev[d].reply = p
			step(!dev.reply.has, t, "a reply to %s is composed", name)
		}
		if dev.reply.has {
			t := s
			sc.apply(&t, d)
			step(true, t, "%s applies its reply", name)
		}
	}
}

// newest is the bit of the edit that an image is the last of, if it is this device's and its row was not sent since.
func (s *jState) newest(i jImage, d uint8) uint16 {
	for n := int(s.writes) - 2; n >= 0; n-- { // the newest write is the one that replaces it
		if i.history()&(1<<n) != 0 {
			if s.authorOf[n] == d+1 {
				return 1 << n
			}
			return 0
		}
	}
	return 0
}

// merge decides a session's records (rules D3, R1, R8) in one mirror transaction.
func (sc *jScope) merge(s *jState, d uint8) bool {
	dev := &s.dev[d]
	tx, first := s.tx, s.recs
	var effects [2]Effect
	var members []Member
	for k := range sc.keys {
		r := &dev.row[k]
		if !r.sent || s.carries(d, k, r.sentImg) {
			continue
		}
		if int(s.recs) == len(s.rec) {
			return false
		}
		m := &s.mirror[k]
		op := Update
		switch {
		case !r.sentImg.there():
			op = Delete
		case r.sentBver == 0:
			op = Insert
		}
		exists := m.img.there()
		effect, why := Merge(Facts{Op: op, Exists: exists, Version: r.sentBver == m.ver || sc.stale && exists && op != Insert,
			OwnEcho: m.lw == d+1 && m.mver != 0 && r.sentBver == m.mver && !sc.noOwnEcho, SameImage: exists && m.img.equals(r.sentImg)})
		rec := jRecord{dev: d, key: k, state: jMerged, stamp: tx, ver: tx, old: m.img, img: r.sentImg, op: op, columns: sc.all(), edit: s.top(r.sentImg), first: first}
		if sc.policy != "" && op == Update {
			for c := range r.sentImg {
				if r.sentImg[c].val == r.sentBase[c].val {
					rec.columns &^= 1 << c
				}
			}
		}
		if effect == Reject && sc.policy != "" {
			if effect, _ = sc.resolve(why, clash(op, rec.columns, r.sentBase, r.sentImg, m.img)); effect != Reject {
				rec.resolved = 1
			} else if sc.mustTake(s, &rec, m.img) {
				s.fail(jFalse)
			}
		}
		if sc.atomic {
			rec.unit = first + 1
		}
		if effect == Reject && m.lw == d+1 && rec.img.history()&s.refused == 0 && sc.policy == "" { // nobody else wrote, and no edit that it was made over fell
			s.fail(jFalse)
		}
		effects[len(members)] = effect
		members = append(members, Member{Unit: int64(rec.unit), Failed: effect == Reject})
		s.rec[s.recs] = rec
		s.recs++
	}
	for _, f := range Fall(members) {
		effects[f.Member] = Reject
	}
	for i := range members {
		rec := &s.rec[first+uint8(i)]
		k, m := rec.key, &s.mirror[rec.key]
		before := *m
		switch effects[i] {
		case Reject:
			rec.state, rec.ver = jRejected, 0
			s.refused |= 1 << rec.edit
			continue
		case Nothing:
			rec.ver = m.ver
		default:
			if rec.resolved != 0 && sc.policy != MergeColumns {
				s.given |= m.img.unseen(rec.img, rec.columns)
			}
			*m = jMirrorRow{img: m.img.with(rec.img, rec.columns), ver: tx, stamp: tx, lw: d + 1, mver: tx}
			if !rec.img.there() {
				m.ver, rec.ver = 0, 0
			}
		}
		if !s.base[k].has { // it is the key's first pending change
			s.base[k] = jBase{has: true, img: before.img, writer: Initial, lw: before.lw, mver: before.mver}
		}
	}
	if len(members) > 0 {
		s.tx++
	}
	dev.taken = true
	return true
}

// top is the number of the newest write in an image's history.
func (s *jState) top(i jImage) uint8 {
	for n := int(s.writes) - 1; n >= 0; n-- {
		if i.history()&(1<<n) != 0 {
			return uint8(n)
		}
	}
	return 15
}

// carries tells whether the ledger has the record of an image already.
func (s *jState) carries(d, k uint8, img jImage) bool {
	for _, r := range s.rec[:s.recs] {
		if r.dev == d && r.key == k && r.img == img {
			return true
		}
	}
	return false
}

// compose reads the mirror in one snapshot (rules D5, D6).
func (sc *jScope) compose(s *jState, d uint8) (p jReply) {
	dev := &s.dev[d]
	p = jReply{has: true, to: s.tx}
	if sc.lateCursor {
		p.to++
	}
	for k := range sc.keys {
		if s.mirror[k].stamp >= dev.cursor {
			p.news[k], p.rows[k] = true, s.mirror[k]
			p.rows[k].lw, p.rows[k].mver = 0, 0
		}
	}
	for i, r := range s.rec[:s.recs] {
		if r.dev == d && (r.stamp >= dev.cursor || dev.row[r.key].sent && dev.row[r.key].sentImg == r.img) {
			p.record[i].state, p.record[i].ver = r.state, r.ver
			if r.resolved&1 != 0 && r.ver != 0 && !sc.tellsVersion {
				p.record[i].ver |= jNobodys
			}
		}
	}
	return p
}

// jNobodys marks a version that no row has: what a device is told that a policy merged.
const jNobodys uint8 = 0x80

// apply takes a reply over (rules D8 to D10).
func (sc *jScope) apply(s *jState, d uint8) {
	dev := &s.dev[d]
	p := dev.reply
	for i, v := range p.record {
		if v.state == jNone {
			continue
		}
		rec := &s.rec[i]
		r := &dev.row[rec.key]
		marked := r.sent && r.sentImg == rec.img
		if v.state == jMerged || v.state == jApplied {
			dev.owed &^= 1 << rec.edit
			if !marked {
				continue
			}
			r.sent = false
			if r.live == r.sentImg {
				r.dirty, r.simg, r.sver = false, rec.img, v.ver
			} else {
				r.bver = v.ver
				if sc.policy != "" {
					r.bimg = r.sentImg
				}
			}
			r.sentImg, r.sentBver, r.sentBase = jImage{}, 0, jImage{}
			continue
		}
		if dev.log[i] == 0 {
			dev.log[i]++
		}
		if dev.log[i] > 1 {
			s.fail(jLogged)
		}
		dev.owed &^= 1 << rec.edit
		if !marked {
			continue
		}
		r.sent = false
		if r.live == r.sentImg || sc.dropsEdit {
			r.live, r.dirty, r.bver = r.simg, false, 0
		}
		r.sentImg, r.sentBver, r.sentBase = jImage{}, 0, jImage{}
	}
	for k := range sc.keys {
		if !p.news[k] {
			continue
		}
		r, in := &dev.row[k], p.rows[k]
		r.simg, r.sver = in.img, in.ver
		switch {
		case !r.dirty:
			r.live, r.bver = in.img, 0
		case sc.baseMoves && !r.sent:
			r.bver = in.ver
		}
	}
	for k := range sc.keys {
		if r := &dev.row[k]; !r.dirty {
			r.bver, r.bimg = 0, jImage{}
		}
	}
	var here uint16
	for k := range sc.keys {
		if r := &dev.row[k]; r.dirty {
			here |= r.live.history() | r.sentImg.history()
		}
	}
	if dev.owed&^here != 0 {
		s.fail(jLost)
	}
	dev.open, dev.taken, dev.cursor, dev.reply = false, false, p.to, jReply{}
}

// foreign transactions at the source.
func (sc *jScope) foreign(s jState, step func(bool, jState, string, ...any)) {
	if s.foreigns >= sc.fwr || int(s.logs) == len(s.log) {
		return
	}
	for k := range sc.keys {
		writes := sc.writes(s.source[k])
		if sc.deletes && s.source[k].there() {
			writes = append(writes, 0) // it deletes the row
		}
		for _, columns := range writes {
			t := s
			t.foreigns++
			n := t.write(0)
			img, what := sc.image(1+n, n, s.source[k], columns), fmt.Sprintf("writes columns %b of", columns)
			if columns == 0 {
				img, what = sc.image(0, n, s.source[k], sc.all()), "deletes"
			}
			t.commit(sc.sourceWrite(&t, jEvent{}, k, img))
			step(false, t, "a foreign transaction %s key%d", what, k)
		}
	}
	if sc.moves && s.source[0].there() && !s.source[1].there() {
		t := s
		t.foreigns++
		n := t.write(0)
		e := sc.sourceWrite(&t, jEvent{}, 0, sc.image(0, n, s.source[0], sc.all()))
		t.commit(sc.sourceWrite(&t, e, 1, sc.image(1+n, n, s.source[1], sc.all())))
		step(false, t, "a foreign transaction moves key0 to key1")
	}
}

// sourceWrite does one write of a source transaction, with its triggers.
func (sc *jScope) sourceWrite(s *jState, e jEvent, key uint8, img jImage) jEvent {
	add := func(k uint8, img jImage) {
		s.source[k] = img
		for i := range e.n {
			if e.keys[i] == k {
				e.imgs[i] = img
				return
			}
		}
		e.keys[e.n], e.imgs[e.n] = k, img
		e.n++
	}
	if sc.sameRow && e.own != 0 && img.there() {
		img[0].val |= jRewritten
	}
	add(key, img)
	if other := s.source[1]; sc.otherRow && key == 0 && other.there() && other[0].val&jRewritten == 0 {
		other[0].val |= jRewritten
		if e.own == 0 {
			other[0].over |= 1 << (s.writes - 1)
		}
		add(1, other)
	}
	return e
}

func (s *jState) commit(e jEvent) {
	s.log[s.logs] = e
	s.logs++
}

// unit is the range of records that are tried in one transaction.
func (s *jState) unit(from uint8) (to uint8) {
	for to = from + 1; to < s.recs && s.rec[from].unit != 0 && s.rec[to].unit == s.rec[from].unit; to++ {
	}
	return to
}

func (sc *jScope) upSteps(s jState, step func(bool, jState, string, ...any)) {
	w := s.up
	t := s
	if w.starting {
		if w.wait == 0 {
			t.up.starting = false
			step(true, t, "up begins")
		}
		return
	}
	if w.next >= s.recs {
		return
	}
	end := s.unit(w.next)
	if s.rec[w.next].state != jMerged {
		t.up = jUp{next: end}
		step(true, t, "up skips %d", w.next)
		return
	}
	if w.missed {
		if w.wait > 0 && !sc.impatient {
			return
		}
		c := &s.rec[w.at]
		b := s.base[c.key]
		effect, why := sc.resolve(Source, clash(c.op, c.columns, c.old, c.img, b.img))
		attempt, why := Reconsider(b.writer, s.onRefused(w.at), int(w.rebases), effect, why)
		if attempt == Rebase && Met(b.writer, s.onRefused(w.at), int(w.rebases)) {
			t.rec[w.at].resolved |= 2
		}
		if !c.img.there() && !b.img.there() && w.rebases < MaxRebases {
			attempt = Rebase // what it wants is so already, whoever did it
		}
		if attempt == Rebase {
			t.up.missed, t.up.wait, t.up.at = false, 0, 0
			t.up.rebased[c.key], t.up.expect[c.key] = true, b.img
			t.up.rebases++
			step(true, t, "up rebases %d", w.at)
			return
		}
		if !s.caused(c.img, b.img) && !s.caused(c.img, s.source[c.key]) && !s.onRefused(w.at) || !s.onRefused(w.at) && sc.mustTake(&s, c, b.img) {
			t.fail(jFalse)
		}
		sc.refuse(&t, w.next, w.at, end)
		step(true, t, "up refuses %d: %s", w.at, why)
		return
	}
	if s.refusals < sc.refusals {
		for i := w.next; i < end; i++ {
			x := t
			x.refusals++
			sc.refuse(&x, w.next, i, end)
			step(false, x, "the source refuses %d", i)
		}
	}
	if int(s.logs) == len(s.log) {
		return
	}
	var e jEvent
	for i := w.next; i < end; i++ {
		e.own |= 1 << i
	}
	for i := w.next; i < end; i++ {
		c := &s.rec[i]
		expect := c.old
		if w.rebased[c.key] {
			expect = w.expect[c.key]
		}
		now := s.source[c.key] // before the unit's own writes and their triggers
		if sc.comparesLate {
			now = t.source[c.key]
		}
		if !now.equals(expect) && (now.there() || c.img.there()) && !sc.blind {
			x := s
			x.up.missed, x.up.at, x.up.wait = true, i, s.logs
			step(true, x, "up misses %d", i)
			return
		}
		if unseen := now.unseen(c.img, c.columns) &^ t.given; unseen != 0 {
			if now.there() && (c.resolved == 0 || sc.policy == MergeColumns) {
				t.fail(jOverwrite)
			}
			t.given |= unseen
		}
		if s.applied&(1<<i) != 0 {
			t.fail(jDouble)
		}
		t.applied |= 1 << i
		img := now.with(c.img, c.columns).over(now)
		e = sc.sourceWrite(&t, e, c.key, img)
	}
	t.up = jUp{next: end}
	t.commit(e)
	step(true, t, "up applies %d to %d", w.next, end-1)
}

// onRefused tells whether a record was made on top of one that was refused.
func (s *jState) onRefused(i uint8) bool {
	c := &s.rec[i]
	if s.base[c.key].refused {
		return true
	}
	return slices.ContainsFunc(s.rec[:i], func(r jRecord) bool { return r.key == c.key && r.state == jRefused && r.img.equals(c.old) })
}

// refuse ends record at, and those that fall with it.
func (sc *jScope) refuse(s *jState, from, at, end uint8) {
	var members []Member
	for i := from; i < end; i++ {
		members = append(members, Member{Unit: int64(s.rec[i].unit), Failed: i == at})
	}
	down := []uint8{at}
	if !sc.tornUnit {
		for _, f := range Fall(members) {
			down = append(down, from+uint8(f.Member))
		}
	}
	slices.Sort(down)
	for _, i := range down {
		if s.applied&(1<<i) != 0 {
			s.fail(jTwo)
		}
		s.refused |= 1 << s.rec[i].edit
		sc.verdict(s, i, jRefused)
	}
	s.tx++
	s.up = jUp{next: end}
	if sc.tornUnit && end-from > 1 {
		for i := from; i < end; i++ {
			if i != at {
				s.rec[i].unit, s.up.next = 0, min(s.up.next, i)
			}
		}
		s.rec[at].unit = 0
	}
}

// verdict ends a record; the key's last one lets the mirror row become base (rule R3).
func (sc *jScope) verdict(s *jState, i uint8, state jState8) {
	r := &s.rec[i]
	r.state, r.stamp = state, s.tx
	if Route(s.pending(r.key)) {
		if sc.policy != "" {
			s.base[r.key].refused = s.base[r.key].refused || state == jRefused
		}
		return
	}
	b, m := s.base[r.key], &s.mirror[r.key]
	s.base[r.key] = jBase{}
	writer := b.writer
	if writer == Own && b.lw == 0 {
		writer = Foreign
	}
	if sc.keepsRefused && state == jRefused {
		return
	}
	if Settle(state == jApplied, b.img.equals(m.img), writer) == Keep {
		m.img = b.img // equal, with its ghost
		return
	}
	*m = jMirrorRow{img: b.img, ver: s.tx, stamp: s.tx, lw: b.lw, mver: b.mver}
	if !b.img.there() {
		m.ver = 0
	}
}

// down applies one source transaction to the mirror, in one mirror transaction.
func (sc *jScope) down(s *jState, e jEvent) {
	for i := range e.n {
		k := e.keys[i]
		if e.own != 0 && sc.skipEchoes {
			continue
		}
		var lw, mver uint8
		for j, r := range s.rec[:s.recs] {
			if e.own&(1<<j) != 0 && r.key == k {
				lw, mver = r.dev+1, r.ver
				if r.resolved&2 != 0 && !sc.keepsAuthor {
					lw, mver = 0, 0
				}
			}
		}
		if Route(s.pending(k)) && !sc.ignoresPending {
			w := s.base[k].writer.After(e.own != 0)
			if sc.lastWriter && e.own != 0 {
				w = Own
			}
			s.base[k] = jBase{has: true, img: e.imgs[i], writer: w, lw: lw, mver: mver, refused: s.base[k].refused}
			continue
		}
		m := &s.mirror[k]
		if m.img.equals(e.imgs[i]) {
			m.img = e.imgs[i]
			continue
		}
		*m = jMirrorRow{img: e.imgs[i], ver: s.tx, stamp: s.tx, lw: lw, mver: mver}
		if !m.img.there() {
			m.ver = 0
		}
	}
	for i := range s.recs {
		if e.own&(1<<i) != 0 && s.rec[i].state == jMerged {
			sc.verdict(s, i, jApplied)
		}
	}
	s.tx++
}

func (e jEvent) String() string {
	s := "foreign"
	if e.own != 0 {
		s = fmt.Sprintf("own %b", e.own)
	}
	for i := range e.n {
		s += fmt.Sprintf(" key%d=%v", e.keys[i], e.imgs[i])
	}
	return s
}
