package device

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/protocol"
)

// memServer is a server in memory that follows rules D3 to D13 as docs/protocol.md states them: what the library is
// tested against. The source is part of it: its verdicts come when a test calls for them.
type memServer struct {
	mu       sync.Mutex
	epoch    string
	tx       int64   // last mirror transaction id given
	open     []int64 // ids taken by transactions that have not committed
	defs     map[string]*protocol.Definitions
	sets     []string
	rows     map[string]map[string]*mrow // by table and key
	tombs    []tomb
	led      []*ledger // verdicts
	all      []*ledger // the same, of all epochs
	incs     map[string]*incarnation
	curs     map[string]cursor
	out      map[string]map[int]Payload // pages by session
	parts    map[string]map[string]Payload
	seen     map[string]*request
	nkeys    map[string]string
	nextKeys map[string]string // announced
	reply    int
	seq      int

	subset    map[string]bool        // of item.grp; all devices see the same
	perPage   int                    // rows to a page
	canonical func(string) string    // how the server writes keys; nil: as they came
	lag       int                    // gets that are answered before a request is taken from the queue
	queue     []func()               // requests that wait
	lateMerge bool                   // compose replies before the merge
	waiting   []*request             // merges that are late
	deaf      map[string]bool        // devices that are blocked
	busy      func() *protocol.Error // refuses a request; nil: none
	taken     func(*request)         // told of each new session; nil: nobody

	asked []protocol.Watch // calls of devices that wait for news
	news  chan []string    // answers to them

	history  map[string]image // "table key version": every image that was ever sent
	problems []string         // broken invariants
}

type mrow struct {
	img   image // nil: deleted
	ver   int64 // 0 when absent
	stamp int64
	lw    string
	mver  int64
	pend  []*ledger
	base  *baseRow // under pending
}

type baseRow struct {
	img    image
	writer conflict.Writer
	lw     string
	mver   int64
}

type tomb struct {
	table, key, val string
	keys            []*string
	stamp           int64
}

type ledger struct {
	protocol.Verdict
	device string
	stamp  int64
	img    image
	row    *mrow
	change protocol.Change
}

type incarnation struct {
	device string
	last   int64
	hash   []byte
}

type cursor struct {
	xmin   int64
	subset map[string]bool
}

type request struct {
	device string
	req    *protocol.Request
	p      Payload
	merged bool
}

func ptr(s string) *string { return &s }

func newServer(t testing.TB) *memServer {
	s := &memServer{
		epoch: "e1", tx: 1, perPage: 3, sets: []string{"items", "notes"},
		rows: map[string]map[string]*mrow{"public.item": {}, "public.note": {}}, incs: map[string]*incarnation{}, curs: map[string]cursor{},
		out: map[string]map[int]Payload{}, parts: map[string]map[string]Payload{}, seen: map[string]*request{}, nkeys: map[string]string{}, nextKeys: map[string]string{},
		subset: map[string]bool{"1": true, "2": true}, history: map[string]image{}, deaf: map[string]bool{}, news: make(chan []string),
		defs: map[string]*protocol.Definitions{
			"items": {Hash: "i1", Tables: []protocol.Table{{
				Name: "public.item", Key: []string{"id"}, SubsetKey: "grp", Operations: "IUD",
				Columns: []protocol.Column{{Name: "id", Type: "integer", NotNull: true}, {Name: "grp", Type: "integer"}, {Name: "val", Type: "text"}},
			}}},
			"notes": {Hash: "n1", Tables: []protocol.Table{{
				Name: "public.note", Key: []string{"id"}, Operations: "IUD",
				Columns: []protocol.Column{{Name: "id", Type: "text", NotNull: true}, {Name: "done", Type: "boolean"}, {Name: "weight", Type: "double precision"}, {Name: "photo", Type: "bytea"}},
			}}},
		},
	}
	return s
}

func (s *memServer) problem(format string, args ...any) {
	s.problems = append(s.problems, fmt.Sprintf(format, args...))
}

func (s *memServer) begin() int64 { s.tx++; return s.tx }

func (s *memServer) xmin() int64 {
	m := s.tx + 1
	for _, t := range s.open {
		m = min(m, t)
	}
	return m
}

func keyOf(k []*string) string {
	var l []string
	for _, v := range k {
		if v == nil {
			l = append(l, "NULL")
		} else {
			l = append(l, strconv.Quote(*v))
		}
	}
	return strings.Join(l, ",")
}

func (s *memServer) row(table, key string) *mrow {
	r := s.rows[table][key]
	if r == nil {
		r = &mrow{}
		s.rows[table][key] = r
	}
	return r
}

func imgEqual(a, b image) bool {
	if (a == nil) != (b == nil) || len(a) != len(b) {
		return false
	}
	for k, v := range a {
		w, ok := b[k]
		if !ok || !sameWire(v, w) {
			return false
		}
	}
	return true
}

// write puts an image into the mirror by transaction tx.
func (s *memServer) write(table string, keys []*string, r *mrow, img image, tx int64, lw string, mver int64) {
	if r.img != nil && (img == nil || subsetKey(table, img) != subsetKey(table, r.img)) {
		s.tombs = append(s.tombs, tomb{table, keyOf(keys), subsetKey(table, r.img), keys, tx})
	}
	r.img, r.stamp, r.lw, r.mver = img, tx, lw, mver
	r.ver = tx
	if img == nil {
		r.ver = 0
	}
	s.history[fmt.Sprintf("%s %s %d", table, keyOf(keys), tx)] = img
}

func subsetKey(table string, img image) string {
	if table == "public.item" {
		if v := img["grp"]; v != nil {
			return *v
		}
		return "none"
	}
	return ""
}

func (s *memServer) visible(table string, img image, subset map[string]bool) bool {
	return img != nil && (table != "public.item" || subset[subsetKey(table, img)])
}

// foreign is a transaction of somebody else at the source that has come down.
func (s *memServer) foreign(table string, key []string, img image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.foreignAt(s.begin(), table, key, img)
}

func (s *memServer) foreignAt(tx int64, table string, key []string, img image) {
	var keys []*string
	for _, k := range key {
		keys = append(keys, ptr(k))
	}
	r := s.row(table, keyOf(keys))
	if len(r.pend) > 0 {
		r.base = &baseRow{img: img, writer: conflict.Foreign}
		return
	}
	if r.img == nil && img == nil {
		return
	}
	s.write(table, keys, r, img, tx, "", 0)
}

// intake and merge

func (s *memServer) refuse(q *request, e protocol.Error) {
	page := protocol.Page{V: 1, Incarnation: q.req.Incarnation, N: q.req.N, Nonce: q.req.Nonce, Page: 1, Last: true, Error: &e, Sets: s.sets}
	s.publish(q, []protocol.Page{page})
}

func (s *memServer) publish(q *request, pages []protocol.Page) {
	s.reply++
	token := protocol.SessionToken(q.req.Incarnation, q.req.N)
	if s.out[token] == nil {
		s.out[token] = map[int]Payload{}
	}
	for i := range pages {
		p := &pages[i]
		p.Reply, p.Page = fmt.Sprintf("r%d", s.reply), i+1
		data, err := protocol.Encode(p, q.p.ContentType)
		if err != nil {
			s.problem("encode: %v", err)
		}
		if data, err = protocol.Compress(data, q.p.Encoding); err != nil {
			s.problem("compress: %v", err)
		}
		s.out[token][i+1] = Payload{ContentType: q.p.ContentType, Encoding: q.p.Encoding, Data: data}
	}
}

// take is intake: rule D4 and D13, then the merge and the reply.
func (s *memServer) take(device string, p Payload) {
	data, err := protocol.Decompress(p.Data, p.Encoding, 1<<26)
	if err != nil {
		s.problem("request of %s: %v", device, err)
		return
	}
	req, err := protocol.DecodeRequest(data, p.ContentType, protocol.DefaultLimits())
	if err != nil {
		s.problem("request of %s: %v", device, err)
		return
	}
	q := &request{device: device, req: req, p: p}
	if req.Epoch != "" && req.Epoch != s.epoch {
		s.refuse(q, protocol.Error{Code: protocol.CodeEpoch, Message: "the mirror was rebuilt"})
		return
	}
	if s.defs[req.Set] == nil {
		s.refuse(q, protocol.Error{Code: protocol.CodeUnknownSet, Message: "no set " + req.Set})
		return
	}
	if s.busy != nil {
		if e := s.busy(); e != nil {
			s.refuse(q, *e)
			return
		}
	}
	inc := s.incs[req.Incarnation]
	if inc == nil {
		inc = &incarnation{device: device}
		s.incs[req.Incarnation] = inc
	}
	token := protocol.SessionToken(req.Incarnation, req.N)
	switch {
	case req.N == inc.last+1:
		inc.last, inc.hash = req.N, protocol.Hash(data)
		s.seen[token] = q
		if s.taken != nil {
			s.taken(q)
		}
		if s.lateMerge && len(req.Changes) > 0 {
			s.waiting = append(s.waiting, q)
		} else {
			s.merge(q)
		}
	case req.N == inc.last && bytes.Equal(inc.hash, protocol.Hash(data)):
		q = s.seen[token]
		if len(s.out[token]) > 0 {
			return
		}
	default:
		s.refuse(q, protocol.Error{Code: protocol.CodeForked, Message: "restored or copied"})
		return
	}
	s.compose(q)
}

func (s *memServer) keyText(key []*string) []*string {
	if s.canonical == nil {
		return key
	}
	out := make([]*string, len(key))
	for i, k := range key {
		out[i] = ptr(s.canonical(*k))
	}
	return out
}

// work takes what waits in the queue, unless it is to wait on.
func (s *memServer) work(lag int) {
	if lag > 0 {
		return
	}
	for _, take := range s.queue {
		take()
	}
	s.queue = nil
}

func (s *memServer) late() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, q := range s.waiting {
		s.merge(q)
	}
	s.waiting = nil
}

func (s *memServer) merge(q *request) {
	q.merged = true
	if len(q.req.Changes) == 0 {
		return
	}
	tx := s.begin()
	for i, ch := range q.req.Changes {
		sent := ch
		ch.Key = s.keyText(ch.Key)
		v := &ledger{device: q.device, stamp: tx, change: sent, Verdict: protocol.Verdict{Incarnation: q.req.Incarnation, N: q.req.N, Index: i, Table: ch.Table, Key: ch.Key}}
		s.led, s.all = append(s.led, v), append(s.all, v)
		s.seq++
		v.ID = int64(s.seq)
		var cols []string
		for _, l := range q.req.Columns {
			if l.Table == ch.Table {
				cols = l.Columns
			}
		}
		f := frozen{columns: cols}
		base, img := f.image(ch.Base), f.image(ch.New)
		for i, k := range map[string][]string{"public.item": {"id"}, "public.note": {"id"}}[ch.Table] {
			if img != nil && len(s.defs[q.req.Set].Tables[0].Key) == 1 {
				img[k] = ch.Key[i]
			}
		}
		r := s.row(ch.Table, keyOf(ch.Key))
		v.row = r
		reject := func(code protocol.Code, detail string) {
			v.State, v.Code, v.Detail = protocol.Rejected, code, detail
		}
		if code := s.unfit(q.req.Set, ch, base, img); code != "" {
			reject(code, "not in the subscription")
			continue
		}
		if val := img["val"]; val != nil && *val == "bad" {
			reject(protocol.CodeInvalidValue, "bad value")
			continue
		}
		if ch.Table == "public.item" && (img != nil && !s.subset[subsetKey(ch.Table, img)] || r.img != nil && !s.subset[subsetKey(ch.Table, r.img)]) {
			reject(protocol.CodeNotSubscribed, "outside")
			continue
		}
		// An update writes the changed columns.
		want := img
		if ch.Op == protocol.Update && r.img != nil {
			want = image{}
			for c, x := range r.img {
				want[c] = x
			}
			for c, x := range img {
				if b, ok := base[c]; !ok || !sameWire(b, x) {
					want[c] = x
				}
			}
		}
		whole := image{}
		for c, x := range r.img {
			whole[c] = x
		}
		for c, x := range img {
			whole[c] = x
		}
		old := q.req.Epoch == "" && ch.Version != ""
		facts := conflict.Facts{
			Op: conflict.Op(ch.Op[0]), Exists: r.img != nil, Version: ch.Version == version(r.ver),
			OwnEcho: r.lw == q.req.Incarnation && r.mver != 0 && ch.Version == version(r.mver), SameImage: r.img != nil && imgEqual(whole, r.img),
			OldEpoch: old, BaseImage: imgEqual(base, r.img),
		}
		if old {
			facts.OwnEcho = false
		}
		effect, reason := conflict.Merge(facts)
		if effect == conflict.Reject {
			reject(protocol.Code(reason), "the row has changed")
			continue
		}
		if effect != conflict.Nothing && facts.Version && !old {
			// Nothing that the author has not seen is written over.
			for c, x := range r.img {
				if b, ok := base[c]; !sameWire(b, x) && (ok || base == nil) && (!ok || ch.Op == protocol.Delete || !sameWire(b, img[c])) {
					s.problem("rule I3: %s %s of %s accepted at version %s, made on %s, but the row is %s", ch.Op, keyOf(ch.Key), q.device, ch.Version, show(base), show(r.img))
				}
			}
		}
		if len(r.pend) == 0 {
			r.base = &baseRow{img: r.img, writer: conflict.Initial, lw: r.lw, mver: r.mver}
		}
		if effect != conflict.Nothing {
			s.write(ch.Table, ch.Key, r, want, tx, q.req.Incarnation, tx)
		}
		v.State, v.img = protocol.Merged, want
		if ch.Op == protocol.Delete {
			v.img = nil
		}
		v.Version = version(r.ver)
		r.pend = append(r.pend, v)
	}
}

// unfit judges a change by the set's definitions: the table, and the columns that it writes. What it does not write to a column that is not there
// (any more) is taken out of the images.
func (s *memServer) unfit(set string, ch protocol.Change, base, img image) protocol.Code {
	def := s.table(set, ch.Table)
	if def == nil {
		return protocol.CodeUnknownTable
	}
	for c, x := range img {
		if slices.ContainsFunc(def.Columns, func(d protocol.Column) bool { return d.Name == c }) {
			continue
		}
		if b, ok := base[c]; ok && !sameWire(b, x) || !ok && x != nil {
			return protocol.CodeUnknownColumn
		}
		delete(img, c)
	}
	for c := range base {
		if !slices.ContainsFunc(def.Columns, func(d protocol.Column) bool { return d.Name == c }) {
			delete(base, c)
		}
	}
	return ""
}

func (s *memServer) table(set, name string) *protocol.Table {
	if s.defs[set] != nil {
		for i := range s.defs[set].Tables {
			if s.defs[set].Tables[i].Name == name {
				return &s.defs[set].Tables[i]
			}
		}
	}
	return nil
}

func version(v int64) string {
	if v == 0 {
		return ""
	}
	return strconv.FormatInt(v, 10)
}

func show(i image) string {
	if i == nil {
		return "absent"
	}
	b, _ := json.Marshal(i)
	return string(b)
}

// verdict lets the source answer the oldest pending change of a row: accept, accept and normalise, or refuse.
func (s *memServer) verdict(r *mrow, refuse, normalise bool) {
	if len(r.pend) == 0 {
		return
	}
	v := r.pend[0]
	r.pend = r.pend[1:]
	tx := s.begin()
	v.stamp = tx
	// A change on top of a refused one, or over a foreign write, fails its compare-and-set.
	if r.base.writer == conflict.Foreign {
		refuse = true
	}
	if refuse {
		v.State, v.Code, v.Detail, v.Constraint = protocol.Refused, protocol.CodeConstraint, "the source said no", "some_check"
		for len(r.pend) > 0 { // what was made on top of it
			x := r.pend[0]
			r.pend = r.pend[1:]
			x.stamp, x.State, x.Code, x.Detail = tx, protocol.Refused, protocol.CodeDependency, "its predecessor was refused"
		}
		if !imgEqual(r.base.img, r.img) {
			s.write(v.Table, v.Key, r, r.base.img, tx, r.base.lw, r.base.mver)
		}
		r.base = nil
		return
	}
	v.State = protocol.Applied
	img := v.img
	if normalise && img != nil && img["val"] != nil && !strings.HasSuffix(*img["val"], "'") {
		img = image{}
		for k, x := range v.img {
			img[k] = x
		}
		img["val"] = ptr(*v.img["val"] + "'")
	}
	r.base = &baseRow{img: img, writer: conflict.Own, lw: v.Incarnation, mver: r.mver}
	if len(r.pend) == 0 {
		if !imgEqual(img, r.img) {
			s.write(v.Table, v.Key, r, img, tx, r.lw, r.mver)
		}
		r.base = nil
	}
}

// pending lists the rows with changes that the source has not answered, in a stable order.
func (s *memServer) pending() (l []*mrow) {
	for _, t := range []string{"public.item", "public.note"} {
		var keys []string
		for k := range s.rows[t] {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			if r := s.rows[t][k]; len(r.pend) > 0 {
				l = append(l, r)
			}
		}
	}
	return l
}

func (s *memServer) settleAll() {
	s.late()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.pending() {
		for len(r.pend) > 0 {
			s.verdict(r, false, false)
		}
	}
}

// compose writes a reply: everything since the cursor, in one snapshot (rules D5, D6).
func (s *memServer) compose(q *request) {
	cur, known := s.curs[q.req.Cursor]
	if !known {
		cur = cursor{subset: map[string]bool{}}
	}
	defs := s.defs[q.req.Set]
	first := protocol.Page{CursorFrom: q.req.Cursor, Epoch: s.epoch, Refresh: !known, Sets: s.sets}
	if q.req.Schema != defs.Hash {
		first.Schema = defs
	}
	pages := []protocol.Page{first}
	last := func() *protocol.Page { return &pages[len(pages)-1] }
	room := s.perPage
	next := func() {
		if room--; room < 0 {
			room = s.perPage - 1
			pages = append(pages, protocol.Page{CursorFrom: q.req.Cursor, Epoch: s.epoch})
		}
	}
	for _, def := range defs.Tables {
		var names []string
		for _, c := range def.Columns {
			names = append(names, c.Name)
		}
		add := func() *protocol.TableRows {
			p := last()
			if n := len(p.Tables); n > 0 && p.Tables[n-1].Table == def.Name {
				return &p.Tables[n-1]
			}
			p.Tables = append(p.Tables, protocol.TableRows{Table: def.Name, Columns: names})
			return &p.Tables[len(p.Tables)-1]
		}
		if def.SubsetKey != "" {
			var gone []string
			for v := range cur.subset {
				if !s.subset[v] {
					gone = append(gone, v)
				}
			}
			sort.Strings(gone)
			for _, v := range gone {
				next()
				t := add()
				t.Gone = append(t.Gone, v)
			}
		}
		for _, t := range s.tombs {
			if t.table != def.Name || t.stamp < cur.xmin || def.SubsetKey != "" && !cur.subset[t.val] {
				continue
			}
			if r := s.rows[t.table][t.key]; r != nil && s.visible(t.table, r.img, s.subset) {
				continue
			}
			next()
			tr := add()
			tr.Deletes = append(tr.Deletes, t.keys)
		}
		var keys []string
		for k := range s.rows[def.Name] {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			r := s.rows[def.Name][k]
			if !s.visible(def.Name, r.img, s.subset) || r.stamp < cur.xmin && (def.SubsetKey == "" || cur.subset[subsetKey(def.Name, r.img)]) {
				continue
			}
			next()
			t := add()
			row := protocol.Row{Version: version(r.ver)}
			for _, n := range names {
				row.Values = append(row.Values, r.img[n])
			}
			t.Rows = append(t.Rows, row)
		}
	}
	more := false
	for _, v := range s.led {
		// All incarnations of the device: a restored one is told too what became of its earlier life.
		if v.device == q.device && (v.stamp >= cur.xmin || v.Incarnation == q.req.Incarnation && v.N == q.req.N) {
			next()
			last().Verdicts = append(last().Verdicts, v.Verdict)
		}
	}
	for _, w := range s.waiting {
		more = more || w == q
	}
	s.seq++
	token := fmt.Sprintf("%s.%d.%d", s.epoch, s.xmin(), s.seq)
	c := cursor{xmin: s.xmin(), subset: map[string]bool{}}
	for v, in := range s.subset {
		if in {
			c.subset[v] = true
		}
	}
	s.curs[token] = c
	last().Last, last().Cursor, last().More = true, token, more
	for i := range pages {
		pages[i].V, pages[i].Incarnation, pages[i].N, pages[i].Nonce = 1, q.req.Incarnation, q.req.N, q.req.Nonce
	}
	s.publish(q, pages)
}

// rebuild is a mirror that was lost and copied anew from the source: other versions, no ledger.
func (s *memServer) rebuild(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.work(0) // by the old mirror
	s.epoch = name
	s.open, s.waiting, s.tombs, s.led = nil, nil, nil, nil
	s.incs, s.curs, s.out, s.parts, s.seen = map[string]*incarnation{}, map[string]cursor{}, map[string]map[int]Payload{}, map[string]map[string]Payload{}, map[string]*request{}
	tx := s.begin()
	for table, rows := range s.rows {
		for k, r := range rows {
			img := r.img
			if len(r.pend) > 0 { // the source never had it
				img = r.base.img
			}
			n := &mrow{}
			if img != nil {
				n.img, n.ver, n.stamp = img, tx, tx
				s.history[fmt.Sprintf("%s %s %d", table, k, tx)] = img
			}
			rows[k] = n
		}
	}
}
