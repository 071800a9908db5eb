package conflict

// What the mirror does: intake, merge, foreign transactions, the source's verdicts, replies.

func (m *deviceModel) forks() bool { return (m.restore || m.clone) && !m.forkIgnored }

func (m *deviceModel) source() bool { return m.refusals+m.normalised > 0 } // the source gives verdicts

// oldEpoch says that a request is of an epoch that the mirror no longer has.
func (m *deviceModel) oldEpoch(s dState, q request) bool {
	return s.special == rebuilt && q.sid>>4 == 0 && !m.epochIgnored
}

func (m *deviceModel) serverSteps(s dState) {
	if m.rebuild && s.special == noBackup && !m.draining {
		m.emit(dStep{kind: stepRebuild}, m.rebuildMirror(s))
	}
	list := m.lists.all[s.requests]
	for i, q := range list.q[:list.n] {
		if m.forks() {
			if done := m.intake(s, list, q); done {
				continue
			}
		}
		if m.oldEpoch(s, q) {
			if d := m.devs.all[s.dev[q.dev]]; d.open && d.inc == 0 && d.sid() == q.sid {
				m.emit(dStep{kind: stepEpoch, dev: q.dev, arg: uint32(q.sid)}, m.setDevice(s, int(q.dev), m.forkDevice(d, 1)))
			}
			continue
		}
		c := m.contents.all[q.content]
		if c.rec[0].img == 0 && c.rec[1].img == 0 {
			continue // an empty upload needs no merge
		}
		t, _ := m.takens.all[s.taken].find(m.owner(int(q.dev)), q.sid)
		if t.merged > 0 && !m.noLedger || t.merged > 1 || contains(list.q[:i], q) {
			continue
		}
		m.emit(dStep{kind: stepMerge, dev: q.dev, again: t.merged > 0, arg: uint32(q.sid), arg2: uint32(q.content)}, m.merge(s, q))
	}
	m.foreignSteps(s)
	if m.source() {
		m.sourceSteps(s)
	}
	for _, q := range list.q[:list.n] {
		m.replySteps(s, q)
	}
}

func contains(l []request, q request) bool {
	for _, x := range l {
		if x == q {
			return true
		}
	}
	return false
}

// intake takes the next session of an incarnation, or tells the device that it has forked. It says whether the request
// stops here.
func (m *deviceModel) intake(s dState, list requestList, q request) bool {
	owner := m.owner(int(q.dev))
	set := m.takens.all[s.taken]
	last := q.sid &^ 15
	for _, t := range set.t[:set.n] {
		if t.dev == owner && t.sid>>4 == q.sid>>4 && t.content != 0 {
			last = max(last, t.sid)
		}
	}
	if q.sid == last+1 {
		t, _ := set.find(owner, q.sid)
		t.content = q.content
		to := s
		to.taken = m.takens.id(set.put(t))
		m.emit(dStep{kind: stepIntake, dev: q.dev, arg: uint32(q.sid)}, to)
		return true
	}
	t, _ := set.find(owner, q.sid)
	same := t.content == q.content
	if q.sid == last && same {
		return false
	}
	nonce := m.contents.all[q.content].nonce
	d := m.devs.all[s.dev[q.dev]]
	if d.open && d.sid() == q.sid && d.nonce == nonce {
		latest := q
		for _, x := range list.q[:list.n] {
			if x.dev == q.dev && x.sid == q.sid && m.contents.all[x.content].nonce == nonce {
				latest = x
			}
		}
		if latest == q {
			inc := d.inc + 2
			if d.inc == 0 {
				inc = 1 + q.dev
			}
			m.emit(dStep{kind: stepForked, dev: q.dev, arg: uint32(q.sid)}, m.setDevice(s, int(q.dev), m.forkDevice(d, inc)))
		}
	}
	return !same
}

// rebuildMirror makes the mirror anew from the source: same images, ids from the beginning, no ledger.
func (m *deviceModel) rebuildMirror(s dState) dState {
	for k := range m.keys {
		r := m.rows.all[s.row[k]]
		s.row[k] = m.rows.id(mirrorRow{img: r.img, ver: newEpoch | firstID, stamp: newEpoch | firstID})
	}
	s.tx, s.open = newEpoch|(firstID+1), [2]uint8{}
	s.ledger, s.taken, s.replies, s.special = 0, 0, 0, rebuilt
	return s
}

// facts are what merge finds out about a record; production does it by SQL.
func (m *deviceModel) facts(r mirrorRow, c record, q request, cursor uint8, isRebuilt bool) Facts {
	old, now := m.image(r.img), m.image(c.img)
	f := Facts{Op: Update, Exists: old.alive()}
	switch {
	case !now.alive():
		f.Op = Delete
	case c.bval == noValue:
		f.Op = Insert
	}
	version := m.version(r.img, r.ver)
	if m.tombstoneVersion {
		version = r.ver
	}
	f.Version = c.bver == version
	if isRebuilt {
		f.Version = c.bver&^newEpoch == version&^newEpoch // the server sees numbers only
		f.OldEpoch = c.bver != 0 && c.bver&newEpoch == 0  // the device marks such versions, and its request names no epoch
		if m.epochByCursor {
			f.OldEpoch = c.bver != 0 && cursor == 0
		}
		if m.epochIgnored { // nobody told the device, so its request names the epoch that it knows
			f.OldEpoch = false
		}
		f.BaseImage = !m.noBaseImage && c.bval == old.value
	}
	w := m.writer(int(q.dev), q.sid)
	own := r.lw == w || m.writerIsDevice && r.lw != 0 && r.lw.device() == w.device()
	f.OwnEcho = own && c.bver != 0 && c.bver == r.mver
	if m.noOwnEcho {
		f.OwnEcho = false
	}
	if m.lastWriterWins {
		f.OwnEcho = own
	}
	f.SameImage = !m.noSameImage && f.Exists && old.value == now.value
	return f
}

func (m *deviceModel) merge(s dState, q request) dState {
	c := m.contents.all[q.content]
	owner := m.owner(int(q.dev))
	set := m.takens.all[s.taken]
	t, _ := set.find(owner, q.sid)
	again := t.merged > 0
	led := m.ledgers.all[s.ledger]
	var effects [2]Effect
	var members []Member
	var places []int
	for i, rec := range c.rec {
		if rec.img == 0 {
			continue
		}
		effects[i], _ = Merge(m.facts(m.rows.all[s.row[rec.key]], rec, q, c.cursor, s.special == rebuilt))
		one := Member{Failed: effects[i] == Reject}
		if m.atomic && !m.splitUnits {
			one.Unit = 1
		}
		members, places = append(members, one), append(places, i)
	}
	fell := [2]bool{}
	for _, f := range Fall(members) {
		effects[places[f.Member]], fell[places[f.Member]] = Reject, true
	}
	for i, rec := range c.rec {
		if rec.img == 0 {
			continue
		}
		r := m.rows.all[s.row[rec.key]]
		effect := effects[i]
		v := verdict{dev: owner, sid: q.sid, key: rec.key, state: 'M', stamp: s.tx, img: rec.img}
		if effect == Reject {
			if again {
				m.fail("DOUBLE VERDICT: merged, then rejected when it came again")
			}
			if !fell[i] && m.falselyRejected(s, r, rec, int(q.dev), led) {
				m.fail("FALSE REJECTION: nobody else wrote since the image that it was made on")
			}
			v.state = 'R'
			led.v[led.n] = v
			led.n++
			continue
		}
		old := r
		if effect != Nothing {
			if !m.seen(rec.img, r.img) {
				m.fail("OVERWRITE: accepted over an image that its author had not seen")
			}
			if i := m.image(r.img); i.value&rewritten != 0 && i.author() != authorA+int(q.dev) && !m.madeOver(rec.img, r.img) {
				m.fail("FOREIGN ECHO: accepted over a rewriting that another's change caused")
			}
			if again && m.image(rec.img).plain() != m.image(r.img).plain() {
				m.fail("DOUBLE: merged again over another image")
			}
			r.img, r.ver, r.stamp, r.lw, r.mver = rec.img, s.tx, s.tx, m.writer(int(q.dev), q.sid), s.tx
		}
		v.at, v.told = m.version(r.img, r.ver), m.version(r.img, r.ver)
		if effect == Nothing && m.nothingTellsOwnID && v.told != 0 {
			v.told = s.tx
		}
		if m.source() {
			if r.pendings == 0 {
				r.base = rowBase{img: old.img, lw: old.lw, mver: old.mver}
			}
			r.pending[r.pendings] = pendingChange{owner, q.sid, v.told, rec.img}
			r.pendings++
		}
		s.row[rec.key] = m.rows.id(r)
		led.v[led.n] = v
		led.n++
	}
	s.ledger = m.ledgers.id(led)
	t.merged++
	s.taken = m.takens.id(set.put(t))
	s.tx++
	if m.forgets() {
		d := m.devs.all[s.dev[q.dev]]
		if !(d.open && d.sid() == q.sid) {
			s.requests = m.lists.id(m.lists.all[s.requests].keep(func(x request) bool { return x != q }))
		}
	}
	return s
}

// falselyRejected says that nothing stood between a rejected record and its row but the rules themselves. Refusals,
// restored devices and clones make rejections that are safe and accepted, so it does not look there.
func (m *deviceModel) falselyRejected(s dState, r mirrorRow, rec record, dev int, led ledger) bool {
	img := m.image(r.img)
	if s.refusals > 0 || m.restore || m.clone {
		return false
	}
	for _, v := range led.v[:led.n] {
		if !v.refused() {
			continue
		}
		for p := rec.img; p != 0; p = m.image(p).parent {
			if m.image(p).name == m.image(v.img).name {
				return false
			}
		}
	}
	if m.equalValues { // the row still is as the merge of the edit below this one left it, and there is no refusal
		for _, v := range led.v[:led.n] {
			if v.img == m.image(rec.img).parent && v.at == r.ver && img.alive() {
				return true
			}
		}
		return false
	}
	exact := rec.img == r.img || m.descends(rec.img, r.img)
	if !m.madeOver(rec.img, r.img) && !exact {
		return false
	}
	return img.value&rewritten == 0 || img.author() == authorA+dev || exact
}

// foreignSteps are transactions of the source that reach the mirror through down: begin takes the id, commit writes.
func (m *deviceModel) foreignSteps(s dState) {
	open := 0
	for _, t := range s.open {
		if t != 0 {
			open++
		}
	}
	if s.foreigns < m.foreign && open < m.overlap && !m.draining {
		to := s
		to.open[open] = s.tx
		to.tx++
		to.foreigns++
		m.emit(dStep{kind: stepBegin, arg: uint32(s.tx)}, to)
	}
	for i := range open {
		t := s.open[i]
		rest := s.open
		if i == 0 {
			rest[0] = rest[1]
		}
		rest[1] = 0
		for k := range m.keys {
			r := m.rows.all[s.row[k]]
			stands := r.img
			if Route(int(r.pendings)) {
				stands = r.base.img
			}
			values := []uint16{authorSource<<8 | uint16(t)}
			if m.equalValues {
				values = []uint16{sharedNew, sharedBase}
			}
			if m.image(stands).alive() && !m.noDeletes {
				values = append(values, noValue)
			}
			for _, value := range values {
				f := m.newImage(authorSource, int(t), value, 0)
				n := r
				if Route(int(r.pendings)) {
					n.base = rowBase{img: f, writer: r.base.writer.After(false)}
				} else {
					n = mirrorRow{img: f, ver: t, stamp: t}
				}
				to := s
				to.open = rest
				to.row[k] = m.rows.id(n)
				m.emit(dStep{kind: stepCommit, key: uint8(k), arg: uint32(t), img: f}, to)
			}
		}
	}
}

// sourceSteps are the source's verdicts, in the order of the merges. The source itself must refuse a change whose author
// has not seen what stands there (rules R1 to R4, model_test.go); it may refuse any.
func (m *deviceModel) sourceSteps(s dState) {
	for k := range m.keys {
		r := m.rows.all[s.row[k]]
		if r.pendings == 0 {
			continue
		}
		p := r.pending[0]
		if m.atomic && !m.splitAtSource {
			m.unitSteps(s, k, p)
			continue
		}
		led := m.ledgers.all[s.ledger]
		entry := 0
		for i, v := range led.v[:led.n] {
			if v.dev == p.dev && v.sid == p.sid && v.key == uint8(k) && v.img == p.img {
				entry = i
				break
			}
		}
		rest := r
		copy(rest.pending[:], r.pending[1:])
		rest.pending[len(rest.pending)-1] = pendingChange{}
		rest.pendings--
		step := func(kind stepKind, state byte, row mirrorRow, to dState) {
			to.row[k] = m.rows.id(row)
			led := led
			led.v[entry].state, led.v[entry].stamp = state, s.tx
			to.ledger = m.ledgers.id(led)
			to.tx++
			m.emit(dStep{kind: kind, key: uint8(k), img: p.img}, to)
		}
		ok := m.seen(p.img, r.base.img)
		if ok {
			applied := rest
			if m.image(p.img).alive() || m.image(r.base.img).alive() { // else there was nothing to delete, so nothing comes back
				applied.base = rowBase{p.img, writerOf(p), p.told, r.base.writer.After(true)}
			}
			step(stepApplied, 'A', m.settled(applied, true, s.tx), s)
			if e := m.image(p.img); s.normals < m.normalised && e.alive() {
				applied.base.img = imageID(m.images.id(image{e.name, p.img, e.value | rewritten}))
				to := s
				to.normals++
				step(stepNormalised, 'A', m.settled(applied, true, s.tx), to)
			}
		}
		if s.refusals < m.refusals || !ok && m.refusals > 0 {
			to := s
			if ok {
				to.refusals++
			}
			step(stepRefused, 'X', m.settled(rest, false, s.tx), to)
		}
	}
}

// unitSteps are the source's verdicts on an atomic unit: one for all its records, when each is the first of its row.
func (m *deviceModel) unitSteps(s dState, k int, p pendingChange) {
	ok := true
	var keys []int
	for j := range m.keys {
		r := m.rows.all[s.row[j]]
		for i, x := range r.pending[:r.pendings] {
			if x.dev != p.dev || x.sid != p.sid {
				continue
			}
			if j < k || i > 0 {
				return // the other key's turn, or not its turn yet
			}
			keys = append(keys, j)
			ok = ok && m.seen(x.img, r.base.img)
		}
	}
	decide := func(kind stepKind, state byte, to dState) {
		led := m.ledgers.all[s.ledger]
		for _, j := range keys {
			r := m.rows.all[s.row[j]]
			x := r.pending[0]
			copy(r.pending[:], r.pending[1:])
			r.pending[len(r.pending)-1] = pendingChange{}
			r.pendings--
			if state == 'A' && (m.image(x.img).alive() || m.image(r.base.img).alive()) {
				r.base = rowBase{x.img, writerOf(x), x.told, r.base.writer.After(true)}
			}
			to.row[j] = m.rows.id(m.settled(r, state == 'A', s.tx))
			for i, v := range led.v[:led.n] {
				if v.dev == x.dev && v.sid == x.sid && v.key == uint8(j) && v.img == x.img {
					led.v[i].state, led.v[i].stamp = state, s.tx
					break
				}
			}
		}
		to.ledger = m.ledgers.id(led)
		to.tx++
		m.emit(dStep{kind: kind, key: uint8(k), img: p.img}, to)
	}
	if ok {
		decide(stepApplied, 'A', s)
	}
	if s.refusals < m.refusals || !ok && m.refusals > 0 {
		to := s
		if ok {
			to.refusals++
		}
		decide(stepRefused, 'X', to)
	}
}

func writerOf(p pendingChange) writerID { return writerID(1 + p.dev<<3 + p.sid>>4) }

// settled is the row after a verdict of the source.
func (m *deviceModel) settled(r mirrorRow, accepted bool, tx uint8) mirrorRow {
	if Route(int(r.pendings)) {
		return r
	}
	b := r.base
	r.base = rowBase{}
	switch Settle(accepted, m.image(b.img).value == m.image(r.img).value, b.writer) {
	case Keep:
	case Restore:
		r.img, r.ver, r.stamp = b.img, tx, tx
		rewritten := accepted && b.writer == Own // by a trigger of our own transaction; all else is a roll-back
		if rewritten && m.rewriteKeepsWriter || !rewritten && m.rollbackKeepsWriter {
			break
		}
		r.lw, r.mver = b.lw, b.mver
		if m.rollbackNewMver && !rewritten {
			r.mver = tx
		}
	}
	return r
}

func (m *deviceModel) replySteps(s dState, q request) {
	d := m.devs.all[s.dev[q.dev]]
	if !m.anyReply && !(d.open && d.sid() == q.sid) {
		return
	}
	if t, _ := m.takens.all[s.taken].find(m.owner(int(q.dev)), q.sid); m.forks() && t.content != q.content {
		return
	}
	asked := m.askedOf.all[s.asked]
	mark := q.dev<<7 | q.sid
	if m.oldEpoch(s, q) || asked.count(mark) >= m.answers {
		return
	}
	to := s
	to.asked = m.askedOf.id(asked.add(mark))
	set := m.sets.all[s.replies]
	p := m.compose(s, q)
	told := m.ledgers.all[p.verdicts]
	if m.splitSnapshot {
		var early ledger
		for _, v := range told.v[:told.n] {
			if v.stamp < s.tx-1 {
				early.v[early.n] = v
				early.n++
			}
		}
		if early.n < told.n {
			x, to := p, to
			x.verdicts = m.ledgers.id(early)
			id := m.replyOf.id(x)
			to.replies = m.sets.id(set.add(id))
			m.emit(dStep{kind: stepCompose, dev: q.dev, arg: id}, to)
		}
	}
	id := m.replyOf.id(p)
	if set.has(id) {
		return
	}
	to.replies = m.sets.id(set.add(id))
	if m.oneShotVerdicts {
		led := m.ledgers.all[s.ledger]
		for i, v := range led.v[:led.n] {
			for _, x := range told.v[:told.n] {
				if v == x {
					led.v[i].stamp = 0
				}
			}
		}
		to.ledger = m.ledgers.id(led)
	}
	m.emit(dStep{kind: stepCompose, dev: q.dev, arg: id}, to)
}

// compose reads rows and verdicts of one snapshot.
func (m *deviceModel) compose(s dState, q request) reply {
	c := m.contents.all[q.content]
	p := reply{dev: q.dev, sid: q.sid, nonce: c.nonce, from: c.cursor, to: s.tx}
	if s.open[0] != 0 && !m.cursorMax {
		p.to = s.open[0]
	}
	led := m.ledgers.all[s.ledger]
	var told ledger
	var refused, mine [2]uint8 // of each key: refused at all; version of the own merge
	for _, v := range led.v[:led.n] {
		if v.dev != m.owner(int(q.dev)) || v.sid>>4 != q.sid>>4 {
			continue
		}
		if v.stamp < c.cursor && !m.ownSessionVerdicts || v.sid != q.sid && m.ownSessionVerdicts {
			continue
		}
		told.v[told.n] = v
		told.n++
		if v.refused() {
			refused[v.key] = 1
		} else {
			mine[v.key] = v.told
		}
	}
	p.verdicts = m.ledgers.id(told)
	for k := range m.keys {
		r := m.rows.all[s.row[k]]
		if r.stamp < c.cursor && !(m.rejectedRowsSent && refused[k] == 1) || m.elideOwnRows && mine[k] != 0 && r.stamp == mine[k] {
			continue
		}
		p.row[p.rows] = replyRow{uint8(k), m.version(r.img, r.ver), r.img}
		p.rows++
	}
	return p
}
