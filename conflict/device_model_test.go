package conflict

// The exhaustive model of rules D1 to D13, between devices and the mirror. This file holds what its states are made
// of; device_server_model_test.go what the mirror does, device_client_model_test.go what a device does,
// device_explore_model_test.go the search and what is checked, device_scopes_model_test.go the scopes and the
// sabotages. The decisions are those of this package: Merge, Settle and Writer.After.
//
// The network is a set: what was sent is delivered never, late, again, or out of order. A step of a device is one
// local commit, so a crash between two commits is a reachable state. Foreign transactions take their id first and
// commit later, so ids and commits overtake one another. An image carries a ghost, its parent: what its author saw
// when he made it. No rule reads the ghost, only the checks do.

// rules are the protocol's rules, one switch for each that can be broken. The zero value is the rule set of the product.
type rules struct {
	cursorMax           bool // D6: the cursor is the next transaction id, not the snapshot's xmin
	newerOnly           bool // D6: a device ignores a row whose version is lower than the one that it has
	ownSessionVerdicts  bool // D5: a verdict is told only in a reply to its own session
	splitSnapshot       bool // D5: verdicts are read before the rows, in another snapshot
	oneShotVerdicts     bool // D5: a verdict is forgotten as soon as a reply told it
	elideOwnRows        bool // D6: a row that the device itself merged is not sent back
	rejectedRowsSent    bool // the row of a rejected key is sent whatever its stamp
	baseMoves           bool // D10: an incoming row moves the base of a dirty one
	skipDirty           bool // D10: an incoming row is dropped when its row is dirty
	mergedSetsImage     bool // D9: merged(v) also sets the latest server image
	rowsFirst           bool // D9: rows are applied before the verdicts
	dropEdit            bool // D9: an edit made over a rejected one is dropped with it
	rebaseEdit          bool // D9: it gets the new version instead
	anyReply            bool // D7: a reply is applied although its session is closed
	noNonce             bool // D7: requests carry no nonce
	tornCursor          bool // D8: the cursor may be committed without the rows
	tornRows            bool // D8: the rows may be committed without cursor and session
	unkeyedLog          bool // D8: the device's log has no key
	rebuiltBatch        bool // D1: a retry collects the dirty rows anew under the same number
	pipelined           bool // D2: a row without a verdict is frozen again
	noLedger            bool // D4: a redelivered request is merged again
	forkIgnored         bool // D4, D12: the server does not look whether a session continues its incarnation
	marksOff            bool // D12: a new incarnation forgets the frozen changes and sends what is there now
	writerIsDevice      bool // D3: the last writer names the device, not the incarnation
	lastWriterWins      bool // D3: accepted if the last writer is this incarnation, whatever the version
	noOwnEcho           bool // D3: without the own-echo rule
	noSameImage         bool // D3: without "the row already is so"
	tombstoneVersion    bool // D3: a record on an absent row must name the tombstone's version
	nothingTellsOwnID   bool // D3: a record that changes nothing is told the merge's id as its version
	rollbackKeepsWriter bool // D11: a roll-back leaves the last device writer
	rewriteKeepsWriter  bool // D11: a row that the source's trigger rewrote keeps its last device writer
	rollbackNewMver     bool // D11: a roll-back gives the base's writer the new version as that of its merge
	noBaseImage         bool // D13: an old base version is never equal
	epochIgnored        bool // D13: a request of an older epoch is merged, its device only gets all rows
	splitUnits          bool // R8: merge rejects the records of a unit one by one
	splitAtSource       bool // R8: so does the source
	epochByCursor       bool // D13: base images count in a request with an empty cursor only, not for every version of an old epoch
}

// deviceScope bounds one search.
type deviceScope struct {
	name           string
	keys, devices  int      // 0: one
	edits          [2]uint8 // by each device
	sessions       [2]uint8 // of each incarnation of a device
	foreign        uint8    // foreign transactions at the mirror
	overlap        int      // of these, how many may be open at a time; 0: one
	refusals       uint8    // free refusals by the source; those that it must make come on top
	normalised     uint8    // rows that a trigger of the source rewrites when it applies a change
	answers        uint8    // compositions of each session's reply; 0: one
	absent         bool     // the rows do not exist at first
	noDeletes      bool
	noUndo         bool
	atomic         bool // the records of a session are one unit (rule R8)
	equalValues    bool // all writers choose between the same two values, so images of different authors are equal
	restore, clone bool // device A is restored from a backup; both devices are copies of one
	rebuild        bool // the mirror is rebuilt: new epoch, ids from the beginning, no ledger
	rules
}

// Versions, stamps and cursors are transaction ids. After a rebuild they begin again from 1; the bit marks them as
// of the new epoch, so that the checks can tell what a rule that compares numbers only cannot.
const (
	firstID  uint8 = 1
	newEpoch uint8 = 0x80
)

// image is one state of a row: who made it, and over which image.
type image struct {
	name   uint16  // author << 8 | number
	parent imageID // what the author saw; 0: not known
	value  uint16  // equal images have equal values; 0: absent
}

type imageID uint16

const (
	authorStart  = 1
	authorA      = 2 // authorA + device
	authorSource = 4

	noValue    uint16 = 0
	rewritten  uint16 = 0x8000 // set in the value of an image that the source's trigger rewrote
	sharedNew  uint16 = 1      // the two values of scopes with equal values
	sharedBase uint16 = 2
)

func (i image) alive() bool   { return i.value != noValue }
func (i image) plain() uint16 { return i.value &^ rewritten }
func (i image) author() int   { return int(i.name >> 8) }

// mirrorRow is one row of the mirror with what hangs on its key.
type mirrorRow struct {
	img        imageID
	ver, stamp uint8
	lw         writerID // last device writer; 0: the source
	mver       uint8    // version of its merge
	pending    [4]pendingChange
	pendings   uint8
	base       rowBase
}

// writerID names an incarnation: 1 + device<<3 + incarnation.
type writerID uint8

func (w writerID) device() uint8 { return uint8(w-1) >> 3 }

type pendingChange struct {
	dev, sid, told uint8
	img            imageID
}

// rowBase is the source's image of a key with changes pending, and its author.
type rowBase struct {
	img    imageID
	lw     writerID
	mver   uint8
	writer Writer
}

// deviceRow is one row on a device, with its shadow when it is dirty.
type deviceRow struct {
	live, simg, bimg imageID
	sver, bver       uint8
	shadow           bool // dirty: edited since bimg, or carried by a session without verdict
	marks            uint8
	mark             [3]frozen // more than one only when pipelined
}

// frozen is a change in the outbox.
type frozen struct {
	sid, bver uint8
	img       imageID
	bval      uint16 // value of its base image
}

// unsent says that the live row holds an edit that no frozen change carries.
func (r deviceRow) unsent() bool {
	return r.shadow && (r.marks == 0 || r.mark[r.marks-1].img != r.live)
}

func cleanRow(img imageID, ver uint8) deviceRow {
	return deviceRow{live: img, simg: img, bimg: img, sver: ver, bver: ver}
}

type logEntry struct {
	sid, key uint8
	name     uint16
}

// deviceState is one device's file.
type deviceState struct {
	n, inc, nonce, cursor uint8
	open                  bool
	row                   [2]deviceRow
	logs                  uint8
	log                   [8]logEntry
	made                  uint8  // ghost: edits made, also by a future that a restored backup has forgotten
	owed                  uint16 // ghost: own edits that have neither been coalesced nor got a verdict; key*8 + number
}

const maxSession = 9

// sid numbers a session within all incarnations of a device.
func (d deviceState) sid() uint8 { return d.inc<<4 | d.n }

func owedBit(key int, name uint16) uint16 { return 1 << (8*key + int(name&7)) }

// record is one change of a request.
type record struct {
	key, bver uint8
	img       imageID
	bval      uint16
}

// content is what the bytes of a request say; its hash is the content's number.
type content struct {
	cursor, nonce uint8
	n             uint8
	rec           [2]record
}

type request struct {
	dev, sid uint8
	content  uint16
}

// verdict is an entry of the server's ledger.
type verdict struct {
	dev, sid, key uint8
	state         byte // M merged, A applied, R rejected, X refused by the source
	stamp, told   uint8
	at            uint8 // ghost: the version that the row really had after the merge
	img           imageID
}

func (v verdict) refused() bool { return v.state == 'R' || v.state == 'X' }

type ledger struct {
	n uint8
	v [9]verdict
}

// taken is what the server remembers of a session.
type taken struct {
	dev, sid, merged uint8
	content          uint16 // what intake took; 0: nothing
}

type takenSet struct {
	n uint8
	t [16]taken
}

type requestList struct {
	n uint8
	q [24]request
}

type reply struct {
	dev, sid, nonce, from, to uint8
	rows                      uint8
	row                       [2]replyRow
	verdicts                  uint32 // ledger number
}

type replyRow struct {
	key, ver uint8
	img      imageID
}

// replySet is sorted; so are equal sets equal.
type replySet struct {
	n uint8
	r [8]uint32
}

type composedSet struct {
	n uint8
	c [16]uint8 // device<<7 | sid, sorted
}

// backup states of device A, and of the mirror.
const (
	noBackup uint8 = iota
	hasBackup
	usedBackup
	rebuilt
)

// dState is one state of everything. Lists and structures are numbers into the model's pools.
type dState struct {
	tx                                      uint8 // next transaction id
	open                                    [2]uint8
	foreigns, refusals, normals             uint8
	special                                 uint8 // backup state
	backup                                  uint32
	row, dev                                [2]uint32
	ledger, taken, requests, replies, asked uint32
}

// pool numbers equal values.
type pool[T comparable] struct {
	ids map[T]uint32
	all []T
}

func newPool[T comparable]() pool[T] {
	var zero T
	return pool[T]{map[T]uint32{zero: 0}, []T{zero}}
}

func (p *pool[T]) id(v T) uint32 {
	if i, ok := p.ids[v]; ok {
		return i
	}
	i := uint32(len(p.all))
	p.ids[v], p.all = i, append(p.all, v)
	return i
}

// deviceModel runs one scope.
type deviceModel struct {
	deviceScope
	images   pool[image]
	rows     pool[mirrorRow]
	devs     pool[deviceState]
	contents pool[content]
	ledgers  pool[ledger]
	takens   pool[takenSet]
	lists    pool[requestList]
	replyOf  pool[reply]
	sets     pool[replySet]
	askedOf  pool[composedSet]
	draining bool
	bad      string // a rule was broken inside a step
	steps    []dStep
}

func newDeviceModel(sc deviceScope) *deviceModel {
	sc.keys, sc.devices, sc.overlap, sc.answers = max(sc.keys, 1), max(sc.devices, 1), max(sc.overlap, 1), max(sc.answers, 1)
	return &deviceModel{deviceScope: sc, images: newPool[image](), rows: newPool[mirrorRow](), devs: newPool[deviceState](),
		contents: newPool[content](), ledgers: newPool[ledger](), takens: newPool[takenSet](), lists: newPool[requestList](),
		replyOf: newPool[reply](), sets: newPool[replySet](), askedOf: newPool[composedSet]()}
}

func (m *deviceModel) image(i imageID) image { return m.images.all[i] }

func (m *deviceModel) newImage(author, number int, value uint16, parent imageID) imageID {
	return imageID(m.images.id(image{uint16(author<<8 | number), parent, value}))
}

func (m *deviceModel) start() dState {
	value := uint16(authorStart << 8)
	if m.equalValues {
		value = sharedBase
	}
	if m.absent {
		value = noValue
	}
	img := m.newImage(authorStart, 0, value, 0)
	s := dState{tx: firstID + 1}
	d := deviceState{cursor: s.tx}
	for k := range m.keys {
		s.row[k] = m.rows.id(mirrorRow{img: img, ver: firstID, stamp: firstID})
		d.row[k] = cleanRow(img, m.version(img, firstID))
	}
	for i := range m.devices {
		s.dev[i] = m.devs.id(d)
	}
	return s
}

// version is what a device knows as a row's version: 0 for an absent one.
func (m *deviceModel) version(img imageID, ver uint8) uint8 {
	if m.image(img).alive() {
		return ver
	}
	return 0
}

// seen says that who made e had seen an image like c: c is among the images that e was made over, or c is an absence and so
// was one of them, or e too.
func (m *deviceModel) seen(e, c imageID) bool {
	ci := m.image(c)
	for p := m.image(e).parent; p != 0; p = m.image(p).parent {
		if m.image(p).plain() == ci.plain() {
			return true
		}
	}
	return !ci.alive() && !m.image(e).alive()
}

// madeOver says that e was made over exactly c, or over own edits on top of it.
func (m *deviceModel) madeOver(e, c imageID) bool {
	for p := m.image(e).parent; p != 0; p = m.image(p).parent {
		if m.image(p).name == m.image(c).name {
			return true
		}
	}
	return false
}

// descends says that c itself is among the images that e was made over.
func (m *deviceModel) descends(e, c imageID) bool {
	for p := m.image(e).parent; p != 0; p = m.image(p).parent {
		if p == c {
			return true
		}
	}
	return false
}

func (m *deviceModel) fail(what string) {
	if m.bad == "" {
		m.bad = what
	}
}

// owner is the identity under which a device's sessions run: clones share one.
func (m *deviceModel) owner(dev int) uint8 {
	if m.clone {
		return 0
	}
	return uint8(dev)
}

func (m *deviceModel) writer(dev int, sid uint8) writerID {
	return writerID(1 + m.owner(dev)<<3 + sid>>4)
}

// find is what the server remembers of a session, with its place; -1: nothing.
func (t takenSet) find(dev, sid uint8) (taken, int) {
	for i, e := range t.t[:t.n] {
		if e.dev == dev && e.sid == sid {
			return e, i
		}
	}
	return taken{dev: dev, sid: sid}, -1
}

// put replaces or adds an entry, in order.
func (t takenSet) put(e taken) takenSet {
	if _, i := t.find(e.dev, e.sid); i >= 0 {
		t.t[i] = e
		return t
	}
	i := int(t.n)
	for ; i > 0 && (t.t[i-1].dev > e.dev || t.t[i-1].dev == e.dev && t.t[i-1].sid > e.sid); i-- {
		t.t[i] = t.t[i-1]
	}
	t.t[i] = e
	t.n++
	return t
}

func (l requestList) keep(ok func(request) bool) (out requestList) {
	for _, q := range l.q[:l.n] {
		if ok(q) {
			out.q[out.n] = q
			out.n++
		}
	}
	return out
}

func (l requestList) add(q request) requestList {
	l.q[l.n] = q
	l.n++
	return l
}

func (s replySet) add(id uint32) replySet {
	i := int(s.n)
	for ; i > 0 && s.r[i-1] >= id; i-- {
		if s.r[i-1] == id {
			return s
		}
	}
	copy(s.r[i+1:], s.r[i:])
	s.r[i] = id
	s.n++
	return s
}

func (s replySet) has(id uint32) bool {
	for _, r := range s.r[:s.n] {
		if r == id {
			return true
		}
	}
	return false
}

func (c composedSet) add(e uint8) composedSet {
	i := int(c.n)
	for ; i > 0 && c.c[i-1] > e; i-- {
		c.c[i] = c.c[i-1]
	}
	c.c[i] = e
	c.n++
	return c
}

func (c composedSet) count(e uint8) (n uint8) {
	for _, x := range c.c[:c.n] {
		if x == e {
			n++
		}
	}
	return n
}
