package conflict

import (
	"fmt"
	"slices"
	"strings"
)

// The search: breadth first, so that a trace is a shortest one; and what must hold in each state, and once users stop.

type stepKind uint8

// Kinds of steps. Their order is the order in which a drain takes them: what is under way at the server comes first.
const (
	stepCommit stepKind = iota
	stepIntake
	stepMerge
	stepForked
	stepEpoch
	stepApplied
	stepRefused
	lastServerStep = stepRefused

	stepFreeze stepKind = iota
	stepApply
	stepNormalised
	stepBegin
	stepCompose
	stepEdit
	stepUndo
	stepRetry
	stepTorn
	stepBackup
	stepRestore
	stepRebuild
)

// dStep is one transition, with what it takes to describe it.
type dStep struct {
	kind      stepKind
	dev, key  uint8
	again     bool
	img       imageID
	arg, arg2 uint32
	bad       string
	to        dState
}

func (m *deviceModel) emit(st dStep, to dState) {
	st.to, st.bad = to, m.bad
	m.bad = ""
	m.steps = append(m.steps, st)
}

func (m *deviceModel) next(s dState) []dStep {
	m.steps = m.steps[:0]
	m.deviceSteps(s)
	m.serverSteps(s)
	return m.steps
}

// check names what is wrong with a state.
func (m *deviceModel) check(s dState) string {
	if led := m.ledgers.all[s.ledger]; m.atomic {
		for i, v := range led.v[:led.n] {
			for _, x := range led.v[:i] {
				if x.dev == v.dev && x.sid == v.sid && x.state != v.state {
					return "SPLIT: records of one unit have two fates"
				}
			}
		}
	}
	for i := range m.devices {
		d := &m.devs.all[s.dev[i]]
		var here uint16
		for k := range m.keys {
			row, r := &m.rows.all[s.row[k]], &d.row[k]
			if r.shadow {
				here |= m.owes(i, k, r.live)
			}
			for _, f := range r.mark[:r.marks] {
				here |= m.owes(i, k, f.img)
			}
			if row.stamp < d.cursor && !(m.skipDirty && r.shadow) &&
				(m.image(r.simg).value != m.image(row.img).value || r.sver != m.version(row.img, row.ver)) {
				return "STALE: the cursor is past a row that the device does not have"
			}
		}
		if d.owed&^here != 0 {
			return "LOST: an edit is neither pending nor has it a verdict"
		}
		for j, l := range d.log[:d.logs] {
			if slices.Contains(d.log[:j], l) {
				return "LOGGED TWICE"
			}
		}
	}
	return ""
}

// drain lets all users stop and delivers everything: each device must end equal to the mirror, with nothing pending and
// every rejection in its log. Resumed is then the same as never interrupted. States that a drain has passed are safe.
func (m *deviceModel) drain(s dState, safe map[dState]struct{}, trace *[]string) string {
	m.draining = true
	answers := m.answers
	m.answers = 255
	defer func() { m.draining, m.answers = false, answers }()
	if !m.rebuild {
		s.special, s.backup = usedBackup, 0
	}
	var passed []dState
	for {
		if _, ok := safe[s]; ok && trace == nil {
			break
		}
		passed = append(passed, s)
		to, what, bad := m.drainStep(s, trace != nil)
		if trace != nil && what != "" {
			*trace = append(*trace, what)
		}
		if bad != "" {
			return bad
		}
		if what == "" {
			if bad := m.drained(s); bad != "" {
				return bad
			}
			break
		}
		s = to
	}
	for _, p := range passed {
		safe[p] = struct{}{}
	}
	return ""
}

// drainStep is the next step of a drain; what is empty at its end.
func (m *deviceModel) drainStep(s dState, tell bool) (to dState, what, bad string) {
	describe := func(st dStep) string {
		if tell {
			return m.describe(st)
		}
		return "."
	}
	steps := m.next(s)
	best := -1
	for i, st := range steps {
		if st.kind <= lastServerStep && !st.again && (best < 0 || st.kind < steps[best].kind) {
			best = i
		}
	}
	if best >= 0 {
		return steps[best].to, describe(steps[best]), steps[best].bad
	}
	for i := range m.devices {
		d := m.devs.all[s.dev[i]]
		need := d.open
		for k := range m.keys {
			need = need || d.row[k].shadow || m.rows.all[s.row[k]].stamp >= d.cursor
		}
		led := m.ledgers.all[s.ledger]
		for _, v := range led.v[:led.n] {
			need = need || v.dev == m.owner(i) && v.sid>>4 == d.inc && v.stamp >= d.cursor
		}
		if !need {
			continue
		}
		if !d.open {
			for _, st := range steps {
				if st.kind == stepFreeze && int(st.dev) == i {
					return st.to, describe(st), st.bad
				}
			}
			return s, "", "NO QUIESCENCE: traffic goes on"
		}
		list := m.lists.all[s.requests]
		for j := int(list.n) - 1; j >= 0; j-- {
			q := list.q[j]
			if int(q.dev) != i || q.sid != d.sid() {
				continue
			}
			s.replies, s.asked = 0, 0
			p := m.compose(s, q)
			to := m.apply(s, p, i, whole)
			bad, m.bad = m.bad, ""
			return to, describe(dStep{kind: stepApply, dev: uint8(i), arg: m.replyOf.id(p)}), bad
		}
		panic("an open session without a request")
	}
	return s, "", ""
}

// drained checks the end of a drain.
func (m *deviceModel) drained(s dState) string {
	for i := range m.devices {
		d := m.devs.all[s.dev[i]]
		for k := range m.keys {
			switch r := d.row[k]; {
			case m.image(r.live).value != m.image(m.rows.all[s.row[k]].img).value:
				return "DIVERGED: a device shows another image than the mirror has"
			case r.shadow:
				return "STUCK: a row stays dirty"
			}
		}
		if d.owed != 0 {
			return "NO VERDICT for an edit"
		}
		if m.restore || m.clone || m.rebuild {
			continue // a new incarnation does not repeat the log of the one before
		}
		led := m.ledgers.all[s.ledger]
		n := 0
		for _, v := range led.v[:led.n] {
			if int(v.dev) != i || !v.refused() {
				continue
			}
			n++
			if !slices.Contains(d.log[:d.logs], logEntry{v.sid, v.key, m.image(v.img).name}) {
				return "LOG: a rejection is missing on the device"
			}
		}
		if n != int(d.logs) {
			return "LOG: the device logged a rejection that the server did not give"
		}
	}
	return ""
}

// explore visits every state of the scope. It returns their number, and the first thing that is wrong with its trace.
func (m *deviceModel) explore(limit, drainEvery int) (states int, bad string, trace []string) {
	type from struct {
		prev uint32
		step uint16
	}
	start := m.start()
	all, how := []dState{start}, []from{{}}
	seen := map[dState]struct{}{start: {}}
	safe := map[dState]struct{}{}
	path := func(i uint32) (out []string) {
		for i != 0 {
			out = append(out, m.describe(m.next(all[how[i].prev])[how[i].step]))
			i = how[i].prev
		}
		slices.Reverse(out)
		return out
	}
	var steps []dStep
	for i := uint32(0); int(i) < len(all); i++ {
		steps = append(steps[:0], m.next(all[i])...)
		for j, st := range steps {
			if st.bad != "" {
				return len(all), st.bad, append(path(i), m.describe(st))
			}
			if _, ok := seen[st.to]; ok {
				continue
			}
			seen[st.to] = struct{}{}
			all, how = append(all, st.to), append(how, from{i, uint16(j)})
			if bad := m.check(st.to); bad != "" {
				return len(all), bad, path(uint32(len(all) - 1))
			}
			if len(all)%drainEvery == 0 {
				if bad := m.drain(st.to, safe, nil); bad != "" {
					trace := append(path(uint32(len(all)-1)), "then the users stop and everything is delivered:")
					m.drain(st.to, safe, &trace)
					return len(all), bad, trace
				}
			}
		}
		if len(all) > limit {
			return len(all), "more states than the limit: the scope is too large to be exhaustive", nil
		}
	}
	return len(all), "", nil
}

func (m *deviceModel) imageName(i imageID) string {
	img := m.image(i)
	s := string("?iabf"[img.author()])
	if img.author() != authorStart {
		s += fmt.Sprint(img.name & 0x7f)
	}
	switch img.plain() {
	case noValue:
		s = "no " + s
	case sharedNew:
		s += "(new)"
	case sharedBase:
		s += "(base)"
	}
	if img.value&rewritten != 0 {
		s += "'"
	}
	return s
}

func idName(v uint8) string {
	if v&newEpoch != 0 {
		return fmt.Sprintf("%d*", v&^newEpoch)
	}
	return fmt.Sprint(v)
}

func (m *deviceModel) records(id uint32) string {
	var out []string
	for _, r := range m.contents.all[id].rec {
		if r.img != 0 {
			out = append(out, fmt.Sprintf("row%d=%s based on version %s", r.key, m.imageName(r.img), idName(r.bver)))
		}
	}
	if out == nil {
		return "nothing"
	}
	return strings.Join(out, ", ")
}

func (m *deviceModel) replyText(id uint32) string {
	p := m.replyOf.all[id]
	s := fmt.Sprintf("reply to session %s, cursor %s to %s", sessionName(p.sid), idName(p.from), idName(p.to))
	for _, r := range p.row[:p.rows] {
		s += fmt.Sprintf(", row%d=%s version %s", r.key, m.imageName(r.img), idName(r.ver))
	}
	told := m.ledgers.all[p.verdicts]
	for _, v := range told.v[:told.n] {
		s += fmt.Sprintf(", verdict %c on %s of session %s", v.state, m.imageName(v.img), sessionName(v.sid))
		if !v.refused() {
			s += " version " + idName(v.told)
		}
	}
	return s
}

func sessionName(sid uint8) string {
	if sid>>4 == 0 {
		return fmt.Sprint(sid & 15)
	}
	return fmt.Sprintf("%d.%d", sid>>4, sid&15)
}

// describe puts a step into words.
func (m *deviceModel) describe(st dStep) string {
	dev, img, sid := string("AB"[st.dev]), m.imageName(st.img), sessionName(uint8(st.arg))
	switch st.kind {
	case stepCommit:
		return fmt.Sprintf("foreign transaction %s commits row%d=%s", idName(uint8(st.arg)), st.key, img)
	case stepBegin:
		return fmt.Sprintf("foreign transaction %s begins", idName(uint8(st.arg)))
	case stepIntake:
		return fmt.Sprintf("intake takes session %s of %s", sid, dev)
	case stepMerge:
		s := fmt.Sprintf("merge of %s session %s: %s", dev, sid, m.records(st.arg2))
		if st.again {
			s += ", AGAIN"
		}
		return s
	case stepForked:
		return fmt.Sprintf("%s is told FORKED for session %s", dev, sid)
	case stepEpoch:
		return fmt.Sprintf("%s is told EPOCH for session %s", dev, sid)
	case stepApplied:
		return fmt.Sprintf("the source applies row%d=%s", st.key, img)
	case stepNormalised:
		return fmt.Sprintf("the source applies row%d=%s and its trigger rewrites it", st.key, img)
	case stepRefused:
		return fmt.Sprintf("the source refuses row%d=%s", st.key, img)
	case stepFreeze:
		return fmt.Sprintf("%s starts session %s: %s", dev, sid, m.records(st.arg2))
	case stepRetry:
		return fmt.Sprintf("%s retries session %s: %s", dev, sid, m.records(st.arg2))
	case stepCompose:
		return fmt.Sprintf("for %s is composed: %s", dev, m.replyText(st.arg))
	case stepApply:
		return fmt.Sprintf("%s applies %s", dev, m.replyText(st.arg))
	case stepTorn:
		return fmt.Sprintf("%s crashes in the middle of applying %s", dev, m.replyText(st.arg))
	case stepEdit:
		return fmt.Sprintf("%s edits row%d: %s", dev, st.key, img)
	case stepUndo:
		return fmt.Sprintf("%s undoes %s on row%d", dev, img, st.key)
	case stepBackup:
		return "A: backup taken"
	case stepRestore:
		return "A: backup restored"
	default:
		return "the mirror is rebuilt"
	}
}
