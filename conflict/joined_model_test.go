package conflict

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// The joined model: devices, mirror and source in one state, so that what one hop promises is checked at the other end of
// the next. Two devices edit, sync in sessions, and are told verdicts; merge, up (with rule R4, crashes and refusals) and down
// run between; foreign transactions write at the source, whose triggers may rewrite the written row or another one.
// Every interleaving of their commits is visited. The decisions are those of this package.
//
// An image carries a ghost: which writes it was made over. No rule reads it, only the checks do.
//
// Checked in every state: a write replaces at the source only what its author had seen (end to end: from the
// device's screen to the source's row); no record is applied twice, or has two outcomes; every edit is still on its device, or
// has its verdict, or the user himself replaced it; no record is rejected without a cause. Where nothing moves by itself any more: source == mirror
// == each device, nothing is pending, and each rejection is in its device's log once.

// jImage is a row's image by columns: 0 is an absent row, and every write has a value of its own. A trigger's rewriting adds
// jRewritten. Scopes without a conflict policy have one column.
type jImage [2]struct {
	val  uint8
	over uint8 // ghost: numbers of the writes in the column's history
}

const jRewritten uint8 = 0x80

func (i jImage) there() bool { return i[0].val != 0 }

func (i jImage) history() uint16 { return uint16(i[0].over | i[1].over) }

// over is the image with another's history too.
func (i jImage) over(o jImage) jImage {
	for c := range i {
		i[c].over |= o[c].over
	}
	return i
}

func (i jImage) equals(o jImage) bool { return i[0].val == o[0].val && i[1].val == o[1].val }

// with is the image with another's columns; gone or come are whole images.
func (i jImage) with(o jImage, columns uint8) jImage {
	if !i.there() || !o.there() {
		return o
	}
	for c := range i {
		if columns&(1<<c) != 0 {
			i[c] = o[c]
		}
	}
	return i
}

// unseen are the writes in the history of these columns that the author of an image had not seen.
func (i jImage) unseen(by jImage, columns uint8) (out uint8) {
	for c := range i {
		if columns&(1<<c) != 0 {
			out |= i[c].over &^ by[c].over
		}
	}
	return out
}

// clash of a record that was made on base with a row.
func clash(op Op, columns uint8, base, mine, row jImage) Clash {
	out := Clash{Op: op, Exists: row.there(), Known: true}
	for c := range row {
		out.Overlap = out.Overlap || columns&(1<<c) != 0 && row[c].val != base[c].val && row[c].val != mine[c].val
	}
	return out
}

// resolve decides a clash by the scope's policy. Its function takes the device's columns, and brings deleted rows back.
func (sc *jScope) resolve(why Reason, c Clash) (Effect, Reason) {
	switch {
	case sc.policy != AskFunction:
		c.Overlap = c.Overlap && !sc.mergesOverlaps
		return Resolve(sc.policy.For(c.Op, true), why, c)
	case c.Op == Delete:
		return Answered(Absent, why, c)
	}
	return Answered(Another, why, c)
}

type jState8 = uint8

// States of a record.
const (
	jNone jState8 = iota
	jMerged
	jApplied
	jRejected
	jRefused
)

// jRecord is one record in the mirror's ledger.
type jRecord struct {
	dev, key   uint8
	state      jState8
	stamp, ver uint8
	op         Op
	columns    uint8 // that it changes, a bit each
	resolved   uint8 // a policy took it: 1 in the merge, 2 at the source
	edit       uint8 // ghost: number of the write
	first      uint8 // ghost: first record of the session
	unit       uint8 // records with the same one stand or fall together (rule R8); 0: alone
	old, img   jImage
}

type jMirrorRow struct {
	img        jImage
	ver, stamp uint8 // ver is 0 when the row is absent
	lw, mver   uint8 // last device writer, from 1, and the version of its merge
}

type jBase struct {
	has      bool
	img      jImage
	writer   Writer
	lw, mver uint8
	refused  bool // a change of the key was refused; kept where there is a policy only
}

type jDeviceRow struct {
	live, simg jImage
	sver, bver uint8
	dirty      bool
	sent       bool // carried by a session without a verdict
	sentImg    jImage
	sentBver   uint8
	bimg       jImage // what the edit was made on; kept where there is a policy only
	sentBase   jImage
}

type jReply struct {
	has    bool
	to     uint8
	rows   [2]jMirrorRow
	news   [2]bool
	record [4]struct{ state, ver uint8 } // by record
}

type jDevice struct {
	row    [2]jDeviceRow
	cursor uint8
	open   bool
	taken  bool // the open session is merged
	reply  jReply
	log    [4]uint8 // by record: times that its rejection was logged
	owed   uint16   // ghost: edits without an outcome
}

type jUp struct {
	next, wait uint8 // records done with; source transactions that down must take first
	missed     bool
	starting   bool
	at         uint8 // the record that missed
	rebases    uint8
	rebased    [2]bool // by key: expects this, not what the mirror had
	expect     [2]jImage
}

type jEvent struct {
	own  uint8 // records that it carries, a bit each; 0: foreign
	n    uint8
	keys [2]uint8
	imgs [2]jImage
}

type jState struct {
	source   [2]jImage
	mirror   [2]jMirrorRow
	base     [2]jBase
	rec      [4]jRecord
	recs     uint8
	tx       uint8 // next mirror transaction
	log      [5]jEvent
	logs     uint8
	up       jUp
	dev      [2]jDevice
	writes   uint8 // numbers given to writes
	foreigns uint8
	edits    [2]uint8
	crashes  uint8
	refusals uint8
	refused  uint16 // ghost: writes that were refused or rejected
	given    uint8  // ghost: writes that a policy gave up, which the record that replaced them says
	applied  uint8  // ghost: records applied, a bit each
	bad      uint8
	authorOf [8]uint8 // ghost: device of each write, from 1; 0: foreign
	_        struct{}
}

// jRules are the rules that can be broken; the zero value is the product's.
type jRules struct {
	skipEchoes     bool // R2: down ignores what our own transactions wrote
	ignoresPending bool // R2: down writes the mirror row although changes are pending
	lastWriter     bool // R4: base's foreign writer does not stay
	impatient      bool // R4: a failed compare-and-set is decided at once
	blind          bool // R3: up writes without comparing
	keepsRefused   bool // R3: a refused record stays in the mirror
	stale          bool // D3: merge does not look at the base version
	noOwnEcho      bool // D3: nor at the device's own last merge
	baseMoves      bool // D10: an incoming row moves the base version of a dirty one
	dropsEdit      bool // D9: an edit made over a rejected one goes with it
	lateCursor     bool // D6: the cursor begins one version too late
	noBarrier      bool // a new up worker does not wait for down
	comparesLate   bool // R8: up compares a unit's rows one by one between its writes, not all before the first
	tornUnit       bool // R8: up refuses the one record of a unit that the source does not take
	mergesOverlaps bool // the policy columns merges although both have changed a column
	tellsVersion   bool // a device is told the row's version for what a policy merged
	keepsAuthor    bool // what a policy merged at the source counts as its device's image
}

type jScope struct {
	name     string
	keys     uint8
	devices  uint8
	edits    [2]uint8
	fwr      uint8
	absent   bool // the rows do not exist at first
	deletes  bool
	moves    bool // foreign transactions may give the row of key 0 the key 1
	atomic   bool // a session's records stand or fall together
	policy   Policy
	sameRow  bool // the source's trigger rewrites the row that a device wrote
	otherRow bool // a write of key 0 makes the source rewrite key 1
	crashes  uint8
	refusals uint8
	limit    int
	finds    string
	jRules
}

var jBad = []string{"", "OVERWRITE: a write replaced what its author had not seen", "DOUBLE: a record was applied twice", "TWO VERDICTS", "FALSE REJECTION: nothing stood against the record",
	"LOST: an edit is neither on its device nor has it a verdict", "LOGGED TWICE: a rejection stands in the device's log twice"}

const (
	jOverwrite uint8 = 1 + iota
	jDouble
	jTwo
	jFalse
	jLost
	jLogged
)

func (s *jState) fail(b uint8) {
	if s.bad == 0 {
		s.bad = b
	}
}

func (s *jState) write(author uint8) (number uint8) {
	s.authorOf[s.writes] = author
	s.writes++
	return s.writes
}

func (s *jState) pending(key uint8) (n int) {
	for _, r := range s.rec[:s.recs] {
		if r.key == key && r.state == jMerged {
			n++
		}
	}
	return n
}

// caused tells whether something stands against an image: the row holds a write that its author had not seen, or one that it
// was made over was refused.
func (s *jState) caused(img, row jImage) bool {
	return row.history()&^img.history() != 0 || img.history()&s.refused != 0
}

// mustTake tells whether a record's policy cannot but take it, whatever the row holds that its author had not seen.
func (sc *jScope) mustTake(s *jState, r *jRecord, row jImage) bool {
	switch {
	case r.img.history()&s.refused != 0 || !row.there() && sc.policy != AskFunction || sc.sameRow || sc.otherRow:
		return false
	case sc.policy == MergeColumns:
		return r.op == Update && row.unseen(r.img, r.columns) == 0
	}
	return sc.policy == LastWriter || sc.policy == AskFunction
}

func (sc *jScope) check(s *jState, still bool) string {
	if s.bad != 0 {
		return jBad[s.bad]
	}
	if !still {
		return ""
	}
	for k := range sc.keys {
		if !s.mirror[k].img.equals(s.source[k]) {
			return fmt.Sprintf("DIVERGED: key%d is %v in the mirror and %v at the source", k, s.mirror[k].img, s.source[k])
		}
		if s.pending(k) > 0 || s.base[k].has {
			return fmt.Sprintf("STUCK: a change of key%d is pending", k)
		}
		for d := range sc.devices {
			r := &s.dev[d].row[k]
			if r.dirty || !r.live.equals(s.mirror[k].img) {
				return fmt.Sprintf("DIVERGED: key%d is %v on device %c and %v in the mirror", k, r.live, "AB"[d], s.mirror[k].img)
			}
		}
	}
	for i, r := range s.rec[:s.recs] {
		want := uint8(0)
		if r.state == jRejected || r.state == jRefused {
			want = 1
		}
		if s.dev[r.dev].log[i] != want {
			return "LOG: the device's log is not the server's"
		}
		for _, o := range s.rec[:i] {
			if sc.atomic && o.dev == r.dev && o.edit != r.edit && o.first == r.first && o.state != r.state {
				return "TORN: a unit has two outcomes"
			}
		}
	}
	return ""
}

func (sc *jScope) explore() (states int, bad string, trace []string) {
	type from struct {
		prev uint32
		step uint8
	}
	start := sc.start()
	all, how := []jState{start}, []from{{}}
	seen := map[jState]struct{}{start: {}}
	for i := uint32(0); int(i) < len(all); i++ {
		steps := sc.next(all[i])
		still := !slices.ContainsFunc(steps, func(n jStep) bool { return n.self })
		if bad := sc.check(&all[i], still); bad != "" {
			for ; i != 0; i = how[i].prev {
				trace = append(trace, sc.next(all[how[i].prev])[how[i].step].what)
			}
			slices.Reverse(trace)
			return len(all), bad, trace
		}
		for j, n := range steps {
			if _, ok := seen[n.to]; !ok {
				seen[n.to] = struct{}{}
				all, how = append(all, n.to), append(how, from{i, uint8(j)})
			}
		}
		if len(all) > sc.limit {
			return len(all), "more states than the limit: the scope is too large to be exhaustive", nil
		}
	}
	return len(all), "", nil
}

var joinedScopes = []jScope{
	{name: "one device, two edits, one foreign write", keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, deletes: true},
	{name: "one device, two edits, two foreign writes", keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 2},
	{name: "one device, three edits, the row is rewritten", keys: 1, devices: 1, edits: [2]uint8{3}, sameRow: true, deletes: true},
	{name: "one device, the row is rewritten, a foreign write", keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, sameRow: true},
	{name: "one device, two edits, refusals", keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, refusals: 1},
	{name: "one device, up dies", keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, crashes: 1},
	{name: "two devices", keys: 1, devices: 2, edits: [2]uint8{1, 1}, deletes: true},
	{name: "two devices, a foreign write", keys: 1, devices: 2, edits: [2]uint8{1, 1}, fwr: 1},
	{name: "two devices, the row is absent", keys: 1, devices: 2, edits: [2]uint8{1, 1}, absent: true, fwr: 1},
	{name: "two devices, the row is rewritten, up dies", keys: 1, devices: 2, edits: [2]uint8{1, 1}, sameRow: true, crashes: 1},
	{name: "two devices, refusals", keys: 1, devices: 2, edits: [2]uint8{1, 1}, refusals: 2, sameRow: true},
	{name: "two devices, deletes, refusals", keys: 1, devices: 2, edits: [2]uint8{1, 1}, deletes: true, refusals: 1},
	{name: "two devices, three edits, refusals", keys: 1, devices: 2, edits: [2]uint8{2, 1}},
	{name: "two keys, one rewrites the other", keys: 2, devices: 1, edits: [2]uint8{2}, fwr: 1, otherRow: true},
	{name: "two keys, one rewrites the other, up dies", keys: 2, devices: 1, edits: [2]uint8{2}, otherRow: true, crashes: 1, refusals: 1},
	{name: "a key changes", keys: 2, devices: 1, edits: [2]uint8{1}, fwr: 2, deletes: true, moves: true},
	{name: "atomic sessions", keys: 2, devices: 1, edits: [2]uint8{2}, fwr: 1, atomic: true, refusals: 1},
	{name: "atomic sessions, up dies, triggers", keys: 2, devices: 1, edits: [2]uint8{2}, atomic: true, refusals: 1, crashes: 1, otherRow: true, sameRow: true},
	{name: "atomic sessions of two devices", keys: 2, devices: 2, edits: [2]uint8{2, 1}, atomic: true},

	{name: "columns", policy: MergeColumns, keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, deletes: true},
	{name: "columns, two foreign writes", policy: MergeColumns, keys: 1, devices: 1, edits: [2]uint8{1}, fwr: 2, deletes: true},
	{name: "columns, up dies, refusals", policy: MergeColumns, keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, crashes: 1, refusals: 1},
	{name: "columns, the row is rewritten", policy: MergeColumns, keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, sameRow: true},
	{name: "columns, two devices", policy: MergeColumns, keys: 1, devices: 2, edits: [2]uint8{2, 1}},
	{name: "columns, two devices, refusals", policy: MergeColumns, keys: 1, devices: 2, edits: [2]uint8{1, 1}, refusals: 1, deletes: true},
	{name: "columns, atomic sessions", policy: MergeColumns, keys: 2, devices: 1, edits: [2]uint8{2}, fwr: 1, atomic: true, refusals: 1},
	{name: "last writer", policy: LastWriter, keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, deletes: true},
	{name: "last writer, two foreign writes", policy: LastWriter, keys: 1, devices: 1, edits: [2]uint8{1}, fwr: 2, deletes: true},
	{name: "last writer, the row is absent", policy: LastWriter, keys: 1, devices: 2, edits: [2]uint8{1, 1}, absent: true, deletes: true},
	{name: "last writer, up dies, refusals", policy: LastWriter, keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, crashes: 1, refusals: 1},
	{name: "last writer, two devices, the row is rewritten", policy: LastWriter, keys: 1, devices: 2, edits: [2]uint8{1, 1}, sameRow: true},
	{name: "last writer, atomic sessions", policy: LastWriter, keys: 2, devices: 1, edits: [2]uint8{2}, fwr: 1, atomic: true, refusals: 1},
	{name: "source wins", policy: SourceWins, keys: 1, devices: 2, edits: [2]uint8{1, 1}},
	{name: "source wins, deletes", policy: SourceWins, keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, deletes: true},
	{name: "a function", policy: AskFunction, keys: 1, devices: 1, edits: [2]uint8{2}, fwr: 1, deletes: true},
	{name: "a function, two devices, up dies", policy: AskFunction, keys: 1, devices: 2, edits: [2]uint8{1, 1}, crashes: 1, deletes: true},
}

func TestModelOfAllThreeConverges(t *testing.T) {
	for _, sc := range joinedScopes {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			sc.limit = 1_000_000
			states, bad, trace := sc.explore()
			if bad != "" {
				t.Fatalf("after %d states: %s", states, told(bad, trace))
			}
			t.Logf("%d states", states)
		})
	}
}

// brokenJoinedRules change one rule each. The model must find what that breaks.
var brokenJoinedRules = []jScope{
	{finds: "DIVERGED", name: "down skips our own echoes", edits: [2]uint8{1}, fwr: 1, jRules: jRules{skipEchoes: true}},
	{finds: "DIVERGED", name: "down writes the mirror row although changes are pending", edits: [2]uint8{1}, fwr: 1, jRules: jRules{ignoresPending: true}},
	{finds: "OVERWRITE", name: "a foreign writer of base does not stay", keys: 2, edits: [2]uint8{2}, fwr: 1, otherRow: true, jRules: jRules{lastWriter: true}},
	{finds: "FALSE REJECTION", name: "a failed compare-and-set is decided at once", edits: [2]uint8{2}, sameRow: true, jRules: jRules{impatient: true}},
	{finds: "OVERWRITE", name: "up writes without comparing", edits: [2]uint8{1}, fwr: 1, jRules: jRules{blind: true}},
	{finds: "DIVERGED", name: "a refused record stays in the mirror", edits: [2]uint8{1}, refusals: 1, jRules: jRules{keepsRefused: true}},
	{finds: "OVERWRITE", name: "merge does not look at the base version", devices: 2, edits: [2]uint8{1, 1}, jRules: jRules{stale: true}},
	{finds: "FALSE REJECTION", name: "no own echo", edits: [2]uint8{2}, sameRow: true, jRules: jRules{noOwnEcho: true}},
	{finds: "OVERWRITE", name: "an incoming row moves the base of a dirty one", edits: [2]uint8{1}, fwr: 1, jRules: jRules{baseMoves: true}},
	{finds: "LOST", name: "an edit made over a rejected one goes with it", edits: [2]uint8{2}, fwr: 1, jRules: jRules{dropsEdit: true}},
	{finds: "DIVERGED", name: "the cursor begins one version too late", edits: [2]uint8{1}, fwr: 1, jRules: jRules{lateCursor: true}},
	{finds: "DOUBLE", name: "a new up worker does not wait for down", edits: [2]uint8{1}, deletes: true, crashes: 1, jRules: jRules{noBarrier: true}},
	{finds: "FALSE REJECTION", name: "a unit's rows are compared between its writes", keys: 2, edits: [2]uint8{2}, atomic: true, otherRow: true, jRules: jRules{comparesLate: true}},
	{finds: "OVERWRITE", name: "columns that both have changed are merged", policy: MergeColumns, devices: 2, edits: [2]uint8{1, 1}, jRules: jRules{mergesOverlaps: true}},
	{finds: "OVERWRITE", name: "columns that both have changed are merged at the source", policy: MergeColumns, edits: [2]uint8{1}, fwr: 1, jRules: jRules{mergesOverlaps: true}},
	{finds: "OVERWRITE", name: "a device is told the version of what a policy merged", policy: MergeColumns, devices: 2, edits: [2]uint8{2, 1}, jRules: jRules{tellsVersion: true}},
	{finds: "OVERWRITE", name: "what a policy merged at the source is its device's", policy: MergeColumns, edits: [2]uint8{2}, fwr: 1, jRules: jRules{keepsAuthor: true}},
	{finds: "OVERWRITE", name: "what the last writer wrote at the source is its device's", policy: LastWriter, edits: [2]uint8{2}, fwr: 1, jRules: jRules{keepsAuthor: true}},
	{finds: "TORN", name: "a unit is refused in part", keys: 2, edits: [2]uint8{2}, refusals: 1, atomic: true, jRules: jRules{tornUnit: true}},
}

func TestModelOfAllThreeFindsBrokenRules(t *testing.T) {
	for _, sc := range brokenJoinedRules {
		t.Run(sc.name, func(t *testing.T) {
			sc.keys, sc.devices, sc.limit = max(sc.keys, 1), max(sc.devices, 1), 1_000_000
			states, bad, trace := sc.explore()
			if !strings.HasPrefix(bad, sc.finds) {
				t.Fatalf("after %d states the model does not find %s, but: %s", states, sc.finds, told(bad, trace))
			}
			t.Logf("after %d states: %s", states, told(bad, trace))
		})
	}
}
