package conflict

// What a device does: edit, undo, freeze and send, apply a reply, be told that it has forked.

func (m *deviceModel) deviceSteps(s dState) {
	for i := range m.devices {
		d := m.devs.all[s.dev[i]]
		if !m.draining {
			m.editSteps(s, i, d)
		}
		if !d.open && (d.n < m.sessions[i] || m.draining) {
			m.freezeStep(s, i, d)
		}
		if d.open && m.rebuiltBatch {
			m.rebuildStep(s, i, d)
		}
		if m.restore && !m.clone && i == 0 {
			if s.special == noBackup {
				to := s
				to.special, to.backup = hasBackup, s.dev[0]
				m.emit(dStep{kind: stepBackup}, to)
			}
			if s.special == hasBackup && s.backup != s.dev[0] {
				b := m.devs.all[s.backup]
				b.made = d.made
				to := m.setDevice(s, 0, b)
				to.replies, to.special, to.backup = s.replies, usedBackup, 0
				m.emit(dStep{kind: stepRestore}, to)
			}
		}
	}
	set := m.sets.all[s.replies]
	for _, id := range set.r[:set.n] {
		p := m.replyOf.all[id]
		for i := range m.devices {
			if !m.clone && i != int(p.dev) {
				continue
			}
			d := m.devs.all[s.dev[i]]
			valid := d.open && d.sid() == p.sid && d.cursor == p.from && d.nonce == p.nonce
			if m.anyReply {
				valid = p.sid <= d.sid()
			}
			if !valid {
				continue
			}
			m.emit(dStep{kind: stepApply, dev: uint8(i), arg: id}, m.apply(s, p, i, whole))
			if m.tornCursor {
				m.emit(dStep{kind: stepTorn, dev: uint8(i), arg: id}, m.apply(s, p, i, cursorOnly))
			}
			if m.tornRows {
				m.emit(dStep{kind: stepTorn, dev: uint8(i), arg: id}, m.apply(s, p, i, rowsOnly))
			}
		}
	}
}

func (m *deviceModel) editSteps(s dState, i int, d deviceState) {
	for k := range m.keys {
		r := d.row[k]
		if d.made < m.edits[i] {
			live := m.image(r.live)
			values := []uint16{uint16(authorA+i)<<8 | uint16(d.made+1)}
			if m.equalValues {
				values = []uint16{sharedNew, sharedBase}
			}
			if live.alive() && !m.noDeletes {
				values = append(values, noValue)
			}
			for _, value := range values {
				if m.equalValues && (value == live.value || r.unsent() && r.marks == 0 && value == m.image(r.bimg).value) {
					continue // no edit, or an undoing one
				}
				e := m.newImage(authorA+i, int(d.made)+1, value, r.live)
				n, nd := r, d
				if r.unsent() { // coalesced by the user himself
					nd.owed &^= m.owes(i, k, r.live)
				}
				nd.owed |= owedBit(k, m.image(e).name)
				nd.made++
				n.live = e
				if !r.shadow {
					n.shadow, n.bver, n.bimg = true, r.sver, r.simg
				}
				nd.row[k] = n
				m.emit(dStep{kind: stepEdit, dev: uint8(i), key: uint8(k), img: e}, m.setDevice(s, i, nd))
			}
		}
		if !m.noUndo && r.unsent() && r.marks == 0 {
			nd := d
			nd.owed &^= m.owes(i, k, r.live)
			nd.row[k] = cleanRow(r.simg, r.sver)
			if m.baseMoves || m.skipDirty { // the shadow is dropped: what was first seen comes back
				nd.row[k] = cleanRow(r.bimg, r.bver)
			}
			m.emit(dStep{kind: stepUndo, dev: uint8(i), key: uint8(k), img: r.live}, m.setDevice(s, i, nd))
		}
	}
}

// owes is the bit of an edit of that device, or nothing for another's image.
func (m *deviceModel) owes(dev, key int, e imageID) uint16 {
	if m.image(e).author() != authorA+dev {
		return 0
	}
	return owedBit(key, m.image(e).name)
}

// freezeStep opens a session: payload, number, nonce, marks, one commit (rules D1 and D2).
func (m *deviceModel) freezeStep(s dState, i int, d deviceState) {
	if d.n++; d.n > maxSession {
		return // a drain that needs as many does not end; explored sessions are fewer
	}
	c := content{cursor: d.cursor, n: d.n}
	if (m.restore || m.clone) && !m.noNonce {
		switch {
		case m.clone:
			c.nonce = uint8(i) + 1
		case s.special == usedBackup:
			c.nonce = 1
		}
	}
	for k := range m.keys {
		r := &d.row[k]
		switch {
		case !m.marksOff && r.marks > 0 && r.mark[r.marks-1].sid>>4 != d.inc: // frozen by an older incarnation: the same change goes first
			f := r.mark[r.marks-1]
			c.rec[k] = record{uint8(k), f.bver, f.img, f.bval}
			f.sid = d.sid()
			r.mark, r.marks = [3]frozen{f}, 1
		case r.unsent() && (r.marks == 0 || m.pipelined):
			f := frozen{d.sid(), r.bver, r.live, m.image(r.bimg).value}
			c.rec[k] = record{uint8(k), f.bver, f.img, f.bval}
			r.mark[r.marks] = f
			r.marks++
		}
	}
	d.open, d.nonce = true, c.nonce
	to := m.setDevice(s, i, d)
	id := uint16(m.contents.id(c))
	to.requests = m.lists.id(m.lists.all[to.requests].add(request{uint8(i), d.sid(), id}))
	m.emit(dStep{kind: stepFreeze, dev: uint8(i), arg: uint32(d.sid()), arg2: uint32(id)}, to)
}

// rebuildStep is the sabotage of D1: a retry that collects anew.
func (m *deviceModel) rebuildStep(s dState, i int, d deviceState) {
	c := content{cursor: d.cursor, nonce: d.nonce, n: d.n}
	changed := false
	for k := range m.keys {
		r := &d.row[k]
		if r.unsent() {
			changed = true
			r.mark, r.marks = [3]frozen{{d.sid(), r.bver, r.live, m.image(r.bimg).value}}, 1
		}
		if r.marks > 0 {
			f := r.mark[r.marks-1]
			c.rec[k] = record{uint8(k), f.bver, f.img, f.bval}
		}
	}
	if !changed {
		return
	}
	to := m.setDevice(s, i, d)
	id := uint16(m.contents.id(c))
	to.requests = m.lists.id(m.lists.all[to.requests].add(request{uint8(i), d.sid(), id}))
	m.emit(dStep{kind: stepRetry, dev: uint8(i), arg: uint32(d.sid()), arg2: uint32(id)}, to)
}

// forgets says that a redelivered request does nothing, so that closed sessions need not be kept in the state.
func (m *deviceModel) forgets() bool {
	return !m.anyReply && !m.noLedger && !m.rebuiltBatch && !m.restore && !m.clone && !m.rebuild
}

// setDevice stores a device and lets go what can have no effect any more.
func (m *deviceModel) setDevice(s dState, i int, d deviceState) dState {
	s.dev[i] = m.devs.id(d)
	current := func(sid uint8) bool { return d.open && sid == d.sid() }
	if m.forgets() {
		set := m.takens.all[s.taken]
		s.requests = m.lists.id(m.lists.all[s.requests].keep(func(q request) bool {
			if int(q.dev) != i || current(q.sid) {
				return true
			}
			t, _ := set.find(uint8(i), q.sid)
			c := &m.contents.all[q.content]
			return t.merged == 0 && (c.rec[0].img != 0 || c.rec[1].img != 0)
		}))
		var asked composedSet
		old := m.askedOf.all[s.asked]
		for _, x := range old.c[:old.n] {
			if int(x>>7) != i || current(x&0x7f) {
				asked = asked.add(x)
			}
		}
		s.asked = m.askedOf.id(asked)
	}
	if !m.anyReply && s.replies != 0 {
		var set replySet
		old := m.sets.all[s.replies]
		for _, id := range old.r[:old.n] {
			if p := m.replyOf.all[id]; int(p.dev) != i || current(p.sid) {
				set = set.add(id)
			}
		}
		s.replies = m.sets.id(set)
	}
	return s
}

// forkDevice begins a new incarnation (rules D12 and D13): cursor 0, so that all rows come; edits keep their base.
func (m *deviceModel) forkDevice(d deviceState, inc uint8) deviceState {
	if m.marksOff {
		for k := range m.keys {
			r := &d.row[k]
			for _, f := range r.mark[:r.marks] {
				if f.img != r.live { // coalesced by the user's later edit
					d.owed &^= owedBit(k, m.image(f.img).name)
				}
			}
			r.mark, r.marks = [3]frozen{}, 0
		}
	}
	d.n, d.inc, d.cursor, d.open = 0, inc, 0, false
	return d
}

type extent byte

const (
	whole extent = iota
	cursorOnly
	rowsOnly
)

// applied is a reply on its way into the rows of a device.
type applied struct {
	*deviceModel
	dev     int
	d       deviceState
	clean   [2]bool // merged and not edited since: the image comes with the rows
	follows [2]bool // sabotage: the base becomes the latest version
	refused bool
}

func (m *deviceModel) apply(s dState, p reply, i int, how extent) dState {
	before := m.devs.all[s.dev[i]]
	a := applied{deviceModel: m, dev: i, d: before}
	if how != cursorOnly {
		if m.rowsFirst {
			a.rows(p)
			a.verdicts(p)
		} else {
			a.verdicts(p)
			a.rows(p)
		}
	}
	for k := range m.keys {
		r := &a.d.row[k]
		if a.clean[k] {
			*r = cleanRow(r.simg, r.sver)
		}
		if a.follows[k] {
			r.bver, r.bimg = r.sver, r.simg
		}
		old := before.row[k]
		if old.live == r.live {
			continue
		}
		if bit := m.owes(i, k, old.live); before.owed&bit != 0 && a.d.owed&bit != 0 {
			m.fail("LOST: a local edit was replaced without a verdict")
		}
		if m.image(old.live).value == m.image(r.live).value {
			continue
		}
		if !a.refused && m.image(old.live).author() == authorA+i && m.descends(old.live, r.live) && !m.anyRefused(s, i) {
			m.fail("REGRESS: the device shows an image from before its own edit again")
		}
	}
	if how != rowsOnly {
		a.d.open, a.d.cursor = false, p.to
	}
	return m.setDevice(s, i, a.d)
}

func (m *deviceModel) anyRefused(s dState, dev int) bool {
	led := m.ledgers.all[s.ledger]
	for _, v := range led.v[:led.n] {
		if int(v.dev) == dev && v.refused() {
			return true
		}
	}
	return false
}

// verdicts applies rule D9.
func (a *applied) verdicts(p reply) {
	told := a.ledgers.all[p.verdicts]
	for _, v := range told.v[:told.n] {
		k := int(v.key)
		r := &a.d.row[k]
		name := a.image(v.img).name
		var marked, rest deviceRow // the mark of this session, and the marks without it
		for _, f := range r.mark[:r.marks] {
			if f.sid == v.sid && marked.marks == 0 {
				marked.mark[0], marked.marks = f, 1
			}
			if f.sid > v.sid || v.refused() && f.sid != v.sid {
				rest.mark[rest.marks] = f
				rest.marks++
			}
		}
		if marked.marks > 0 && a.image(marked.mark[0].img).name != name {
			a.fail("WRONG VERDICT: the device takes it for another edit than the server judged")
		}
		if v.refused() {
			a.refuse(v, k, name, marked.marks > 0, rest)
			continue
		}
		if marked.marks == 0 {
			continue
		}
		a.d.owed &^= a.owes(a.dev, k, v.img)
		live := r.live
		r.mark, r.marks = rest.mark, rest.marks
		switch {
		case a.mergedSetsImage:
			r.simg, r.sver, r.bver, r.bimg = v.img, v.told, v.told, v.img
			r.shadow = live != v.img || r.marks > 0
		case live == v.img && r.marks == 0:
			a.clean[k] = true
		default:
			r.bver, r.bimg = v.told, v.img
		}
	}
}

func (a *applied) refuse(v verdict, k int, name uint16, marked bool, rest deviceRow) {
	entry := logEntry{v.sid, v.key, name}
	if !a.unkeyedLog {
		for _, l := range a.d.log[:a.d.logs] {
			if l == entry {
				return
			}
		}
	}
	a.d.log[a.d.logs] = entry
	a.d.logs++
	a.d.owed &^= a.owes(a.dev, k, v.img)
	a.refused = true
	r := &a.d.row[k]
	r.mark, r.marks = rest.mark, rest.marks
	switch edited := r.live != r.simg; {
	case !a.clean[k] && a.image(r.live).name == name && a.image(r.live).value == a.image(v.img).value:
		if r.marks == 0 {
			*r = cleanRow(r.simg, r.sver)
		} else {
			r.live = r.mark[r.marks-1].img
		}
	case a.dropEdit && (marked || edited):
		*r = cleanRow(r.simg, r.sver)
	case a.rebaseEdit && marked:
		a.follows[k] = true
	}
}

// rows applies rule D10.
func (a *applied) rows(p reply) {
	for _, in := range p.row[:p.rows] {
		r := &a.d.row[in.key]
		switch {
		case a.clean[in.key]:
			*r, a.clean[in.key] = cleanRow(in.img, in.ver), false
		case a.newerOnly && in.ver <= r.sver:
		case !r.shadow:
			*r = cleanRow(in.img, in.ver)
		case a.baseMoves:
			r.simg, r.sver, r.bimg, r.bver = in.img, in.ver, in.img, in.ver
		case a.skipDirty:
		default:
			r.simg, r.sver = in.img, in.ver
		}
	}
}
