package device

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/waystage/waystage/protocol"
)

// VerifyOptions of one verification.
type VerifyOptions struct {
	Sets     []string // only these subscription sets; empty: all
	Repair   bool     // give rows that differ what the server has; unsent edits stay
	Progress func(Progress)
}

// Verification is what was found in one set. Compared are the images that the server has sent with those that it has, at
// the position of a reply: edits that it has not seen are no differences.
type Verification struct {
	Set         string       `json:"set"`
	At          time.Time    `json:"at"`
	Cursor      string       `json:"cursor"`    // of the reply: the position
	Rows        int64        `json:"rows"`      // that the server has
	Different   int64        `json:"different"` // of them, or that the device alone has
	Repaired    int64        `json:"repaired"`
	More        bool         `json:"more"`        // there may be more: not all were looked at
	Differences []Difference `json:"differences"` // the first of them
}

// Difference is a row that differs.
type Difference struct {
	Table   string    `json:"table"`
	Key     []*string `json:"key"`
	Kind    string    `json:"kind"`    // protocol.DiffMissing, DiffExtra, DiffValues or DiffVersion
	Columns []Unequal `json:"columns"` // for DiffValues
}

// Unequal is a column that differs: PostgreSQL text, null for NULL.
type Unequal struct {
	Name   string  `json:"name"`
	Device *string `json:"device"`
	Server *string `json:"server"`
}

// ErrNotVerified says that the server did not answer to a verification.
var ErrNotVerified = errors.New("the server does not know verification")

// Verify syncs, and compares the rows of the file with the server's in the same go. What was found is told to the server too.
func (d *Device) Verify(ctx context.Context, o VerifyOptions) ([]Verification, error) {
	var names []string
	err := d.write(ctx, func(t *txn) error {
		c, err := t.load()
		if err != nil {
			return err
		}
		for _, s := range c.sets {
			if s.Gone || len(o.Sets) > 0 && !slices.Contains(o.Sets, s.Name) {
				continue
			}
			names = append(names, s.Name)
			if err := t.beginVerify(s.Name, o.Repair); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	_, serr := d.Sync(ctx, SyncOptions{Sets: o.Sets, Progress: o.Progress})
	var out []Verification
	err = d.write(context.WithoutCancel(ctx), func(t *txn) error {
		for _, name := range names {
			v, ok, err := t.verifying(name)
			switch {
			case err != nil:
				return err
			case ok && v.Result != nil:
				out = append(out, *v.Result)
			case serr == nil:
				serr = fmt.Errorf("device: set %s: %w", name, ErrNotVerified)
			}
		}
		if serr != nil { // what was begun is not gone on with unasked
			return t.exec(`UPDATE _ws_verify SET step = 0 WHERE result IS NULL`)
		}
		return nil
	})
	return out, errors.Join(serr, err)
}

// Verified tells what the last verification of each set has found.
func (d *Device) Verified(ctx context.Context) (out []Verification, err error) {
	err = d.read(ctx, func(t *txn) error {
		return t.each(`SELECT result FROM _ws_verify WHERE result IS NOT NULL ORDER BY set_name`, nil, func(scan func(...any) error) error {
			var text string
			if err := scan(&text); err != nil {
				return err
			}
			out = append(out, Verification{})
			return json.Unmarshal([]byte(text), &out[len(out)-1])
		})
	})
	return out, err
}

// Steps of a verification. Each takes a session, and so does telling the result.
const (
	verifyIdle = 0
	verifySums = 1 // the next request asks for sums
	verifyRows = 2 // the next request asks for the rows of the buckets that differ
)

// What has become of the result.
const (
	resultOpen = 0 // to be told
	resultTold = 1 // told, or there is none
	resultSent = 2 // in a request without an applied reply
)

const (
	perVerifyBucket = 32
	mostWanted      = 512  // buckets of which rows are asked for at a time
	mostRepairs     = 30   // rounds of a repair
	mostNamed       = 1000 // differences kept
)

// verification is the row of _ws_verify of a set.
type verification struct {
	set     string
	step    int
	repair  bool
	rounds  int
	buckets int
	wanted  []protocol.VerifyRows
	more    bool // not all buckets that differ are wanted
	session string
	found   Verification  // so far
	Result  *Verification // of the last complete one
	told    int
}

func (t *txn) beginVerify(set string, repair bool) error {
	return t.exec(`INSERT INTO _ws_verify (set_name, step, repair) VALUES (?, ?, ?)
		ON CONFLICT (set_name) DO UPDATE SET step = excluded.step, repair = excluded.repair, rounds = 0, session = '', found = NULL, result = NULL, told = 1`,
		set, verifySums, repair)
}

func (t *txn) verifying(set string) (*verification, bool, error) {
	v := &verification{set: set}
	var wanted, found, result sql.NullString
	err := t.get(`SELECT step, repair, rounds, buckets, wanted, more, session, found, result, told FROM _ws_verify WHERE set_name = ?`, []any{set},
		&v.step, &v.repair, &v.rounds, &v.buckets, &wanted, &v.more, &v.session, &found, &result, &v.told)
	if errors.Is(err, sql.ErrNoRows) {
		return v, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	for _, f := range []struct {
		text sql.NullString
		into any
	}{{wanted, &v.wanted}, {found, &v.found}, {result, &v.Result}} {
		if f.text.Valid {
			if err := json.Unmarshal([]byte(f.text.String), f.into); err != nil {
				return nil, false, err
			}
		}
	}
	return v, true, nil
}

func (t *txn) saveVerify(v *verification) error {
	var texts [3]sql.NullString
	for i, x := range []any{v.wanted, v.found, v.Result} {
		var err error
		if texts[i], err = jsonText(x); err != nil {
			return err
		}
	}
	return t.exec(`UPDATE _ws_verify SET step = ?, repair = ?, rounds = ?, buckets = ?, wanted = ?, more = ?, session = ?, found = ?, result = ?, told = ? WHERE set_name = ?`,
		v.step, v.repair, v.rounds, v.buckets, texts[0], v.more, v.session, texts[1], texts[2], v.told, v.set)
}

// verifyOpen tells whether a set has a verification to go on with or a result to tell.
func (t *txn) verifyOpen(set string) (open bool, err error) {
	err = t.get(`SELECT EXISTS (SELECT 1 FROM _ws_verify WHERE set_name = ? AND (step > 0 OR told <> 1))`, []any{set}, &open)
	return open, err
}

// verification is what a request asks and tells; never nil, so that the server knows that it may ask.
func (t *txn) verification(s *set, session string) (*protocol.Verification, error) {
	req := &protocol.Verification{}
	v, ok, err := t.verifying(s.Name)
	if err != nil || !ok {
		return req, err
	}
	v.session = session
	switch v.step {
	case verifySums:
		most := int64(0)
		for _, m := range s.Tables {
			var n int64
			if err := t.get("SELECT count(*) FROM "+quote(m.versions())+" WHERE sets & ? <> 0", []any{s.Bit}, &n); err != nil {
				return nil, err
			}
			most = max(most, n)
		}
		v.buckets = min(1<<bits.Len64(uint64(most/perVerifyBucket)), protocol.MaxVerifyBuckets)
		req.Buckets = v.buckets
	case verifyRows:
		req.Buckets, req.Rows = v.buckets, v.wanted
	}
	if r := v.Result; r != nil && v.told != resultTold {
		v.told = resultSent
		req.Result = &protocol.VerifyResult{Cursor: r.Cursor, At: r.At.UTC().Format(time.RFC3339), Rows: r.Rows, Different: r.Different, Repaired: r.Repaired, More: r.More}
		for _, d := range r.Differences[:min(len(r.Differences), protocol.MaxVerifySample)] {
			p := protocol.Difference{Table: d.Table, Key: d.Key, Kind: d.Kind}
			for _, c := range d.Columns {
				p.Columns = append(p.Columns, c.Name)
			}
			if _, ok := validText(d.Key); ok { // what was never text cannot be told
				req.Result.Sample = append(req.Result.Sample, p)
			}
		}
	}
	return req, t.saveVerify(v)
}

// verifyReply goes on with a set's verification by what a reply says. The reply's rows are applied; capture is off.
func (t *txn) verifyReply(c *catalogue, sess *session, cursor string, pages []*protocol.Verified, gen int64) error {
	s := c.set(sess.Set)
	var gone bool
	if err := t.get(`SELECT gone FROM _ws_set WHERE name = ?`, []any{sess.Set}, &gone); err != nil || gone {
		return err
	}
	v, ok, err := t.verifying(s.Name)
	if err != nil {
		return err
	}
	ask := slices.ContainsFunc(pages, func(p *protocol.Verified) bool { return p.Ask })
	if !ok || v.step == verifyIdle && v.told == resultTold {
		if !ask {
			return nil
		}
		if err := t.beginVerify(s.Name, false); err != nil {
			return err
		}
		return t.again(s.Name)
	}
	if v.session != sess.token() {
		return t.again(s.Name) // the reply is to a request from before
	}
	if v.told == resultSent {
		v.told = resultTold
	}
	parts, err := s.parts(pages, v.buckets)
	if err != nil {
		return err
	}
	switch {
	case v.step == verifyIdle:
	case parts == nil:
		v.step = verifyIdle // the server does not answer
	case v.step == verifySums:
		err = t.verifySums(s, v, cursor, parts)
	default:
		err = t.verifyRows(c, s, v, cursor, parts, gen)
	}
	if err != nil {
		return err
	}
	if err := t.saveVerify(v); err != nil {
		return err
	}
	if v.step != verifyIdle || v.told != resultTold {
		return t.again(s.Name)
	}
	return nil
}

// again has the running sync open another session of the set.
func (t *txn) again(set string) error {
	return t.exec(`UPDATE _ws_set SET todo = 1 WHERE name = ? AND gone = 0`, set)
}

// parts joins what the pages say of each table; nil: they say nothing.
func (s *set) parts(pages []*protocol.Verified, buckets int) (map[string]*protocol.VerifiedTable, error) {
	var out map[string]*protocol.VerifiedTable
	for _, p := range pages {
		if len(p.Tables) > 0 && p.Buckets != buckets {
			return nil, fmt.Errorf("%w: it verifies in %d buckets, not %d", ErrReply, p.Buckets, buckets)
		}
		for _, part := range p.Tables {
			m := s.member(part.Table)
			if m == nil {
				return nil, fmt.Errorf("%w: it verifies table %s, which is not in set %s", ErrReply, part.Table, s.Name)
			}
			if i := slices.IndexFunc(part.Columns, func(name string) bool { return m.index(name) < 0 }); i >= 0 {
				return nil, fmt.Errorf("%w: it verifies column %s of table %s, which is not in the definitions", ErrReply, part.Columns[i], part.Table)
			}
			if slices.ContainsFunc(part.Rows, func(r protocol.Row) bool { return len(r.Values) != len(part.Columns) }) {
				return nil, fmt.Errorf("%w: it verifies a row of table %s with too few or too many values", ErrReply, part.Table)
			}
			if out == nil {
				out = map[string]*protocol.VerifiedTable{}
			}
			if out[part.Table] == nil {
				out[part.Table] = &protocol.VerifiedTable{Table: part.Table, Columns: part.Columns}
			}
			t := out[part.Table]
			t.Sums, t.Rows = append(t.Sums, part.Sums...), append(t.Rows, part.Rows...)
		}
	}
	return out, nil
}

// held is a row as the file holds it to be at the server.
type held struct {
	key   []any
	wire  []*string // the key
	sver  string    // empty: the file has no version of it, so nobody but the device knows the row
	known bool
	img   image // nil: there is no row although there is a version
}

// held calls fn for every row that the file has of the server's, and for live rows that should not be there.
func (t *txn) held(s *set, m *member, fn func(h held) error) error {
	live, shadow, versions := quote(m.Local), quote(m.shadow()), quote(m.versions())
	var sides, lives []string
	for _, k := range m.key {
		name := m.Cols[k].Local
		sides = append(sides, "v."+quote("k_"+name)+" = l."+quote(name))
		lives = append(lives, "s."+quote("k_"+name)+" = l."+quote(name))
	}
	var shadows, keys, cols []string
	for _, k := range m.key {
		name := m.Cols[k].Local
		shadows = append(shadows, "s."+quote("k_"+name)+" = v."+quote("k_"+name))
		keys = append(keys, "v."+quote("k_"+name))
	}
	for _, col := range m.Cols {
		cols = append(cols, "l."+quote(col.Local))
	}
	on := func(l []string) string { return strings.Join(l, " AND ") }
	first := cols[m.key[0]]
	var dirty []held
	var ids []int64
	scan := func(q string, args []any, nKeys int, sides bool) error {
		return t.each(q, args, func(scan func(...any) error) error {
			h := held{key: make([]any, nKeys), known: sides}
			row := make([]any, len(m.Cols))
			var id sql.NullInt64
			var there bool
			var into []any
			for i := range h.key {
				into = append(into, &h.key[i])
			}
			into = append(into, &h.sver, &id, &there)
			for i := range row {
				into = append(into, &row[i])
			}
			if err := scan(into...); err != nil {
				return err
			}
			h.wire = m.toWire(m.key, h.key)
			if id.Valid {
				dirty, ids = append(dirty, h), append(ids, id.Int64)
				return nil
			}
			if there {
				h.img = m.image(row)
			}
			return fn(h)
		})
	}
	err := scan("SELECT "+strings.Join(keys, ", ")+", v.sver, s.id, "+first+" IS NOT NULL, "+strings.Join(cols, ", ")+" FROM "+versions+" AS v LEFT JOIN "+live+" AS l ON "+on(sides)+
		" LEFT JOIN "+shadow+" AS s ON "+on(shadows)+" WHERE v.sets & ? <> 0", []any{s.Bit}, len(keys), true)
	if err != nil {
		return err
	}
	err = scan("SELECT "+m.liveKeys("l")+", '', NULL, 1, "+strings.Join(cols, ", ")+" FROM "+live+" AS l WHERE NOT EXISTS (SELECT 1 FROM "+versions+" AS v WHERE "+on(sides)+
		") AND NOT EXISTS (SELECT 1 FROM "+shadow+" AS s WHERE "+on(lives)+")", nil, len(keys), false)
	if err != nil {
		return err
	}
	for i, h := range dirty {
		d, err := t.dirty(m.table, ids[i])
		if err != nil {
			return err
		}
		places, vals, err := m.server(d)
		if err != nil {
			return err
		}
		if places != nil {
			h.img = image{}
			for j, p := range places {
				h.img[m.Cols[p].Wire] = toWire(m.Cols[p].kind, vals[j])
			}
		}
		if err := fn(h); err != nil {
			return err
		}
	}
	return nil
}

// values are the columns of an image in the server's order.
func (h *held) values(columns []string) []*string {
	out := make([]*string, len(columns))
	for i, c := range columns {
		out[i] = h.img[c]
	}
	return out
}

type bucketSum struct {
	rows             int64
	versions, images uint64
}

// verifySums finds the buckets that differ.
func (t *txn) verifySums(s *set, v *verification, cursor string, parts map[string]*protocol.VerifiedTable) error {
	v.wanted, v.more = nil, false
	rows, left := int64(0), mostWanted
	for _, name := range slices.Sorted(maps.Keys(parts)) {
		m, part := s.member(name), parts[name]
		here, there := map[int]bucketSum{}, map[int]bucketSum{}
		err := t.held(s, m, func(h held) error {
			b := protocol.Bucket(h.wire, v.buckets)
			sum := here[b]
			sum.rows++
			sum.versions ^= protocol.RowHash(append([]*string{&h.sver}, h.wire...)...)
			if h.img != nil {
				sum.images ^= protocol.RowHash(h.values(part.Columns)...)
			}
			here[b] = sum
			return nil
		})
		if err != nil {
			return err
		}
		for _, sum := range part.Sums {
			w := bucketSum{rows: sum.Rows}
			var err1, err2 error
			w.versions, err1 = strconv.ParseUint(sum.Versions, 16, 64)
			w.images, err2 = strconv.ParseUint(sum.Images, 16, 64)
			if err1 != nil || err2 != nil {
				return fmt.Errorf("%w: %q, %q are not sums", ErrReply, sum.Versions, sum.Images)
			}
			there[sum.Bucket] = w
			rows += sum.Rows
		}
		var differ []int
		for b := range v.buckets {
			if here[b] != there[b] {
				differ = append(differ, b)
			}
		}
		if len(differ) > left {
			differ, v.more = differ[:left], true
		}
		left -= len(differ)
		if len(differ) > 0 {
			v.wanted = append(v.wanted, protocol.VerifyRows{Table: name, Buckets: differ})
		}
	}
	v.found.Rows = rows
	if len(v.wanted) == 0 {
		v.finish(cursor)
		return nil
	}
	v.step = verifyRows
	return nil
}

// finish makes what was found the result.
func (v *verification) finish(cursor string) {
	r := v.found
	r.Set, r.At, r.Cursor = v.set, time.Now().UTC().Truncate(time.Second), cursor
	if r.Differences == nil {
		r.Differences = []Difference{}
	}
	v.step, v.wanted, v.found, v.Result, v.told = verifyIdle, nil, Verification{}, &r, resultOpen
}

// verifyRows names the rows that differ, and repairs them if that is wanted.
func (t *txn) verifyRows(c *catalogue, s *set, v *verification, cursor string, parts map[string]*protocol.VerifiedTable, gen int64) error {
	in := &incoming{t: t, set: s, gen: gen, rep: new(SetReport), dirty: map[string]bool{}}
	for _, w := range v.wanted {
		m, part := s.member(w.Table), parts[w.Table]
		if m == nil || part == nil {
			continue // no longer in the set
		}
		right := map[string]protocol.Row{}
		for _, row := range part.Rows {
			key := make([]*string, len(m.key))
			for i, k := range m.key {
				at := slices.Index(part.Columns, m.Cols[k].Wire)
				if at < 0 || row.Values[at] == nil {
					return fmt.Errorf("%w: rows of table %s without their key", ErrReply, w.Table)
				}
				key[i] = row.Values[at]
			}
			right[wireKey(key)] = row
		}
		var extra []held
		var wrong []protocol.Row
		err := t.held(s, m, func(h held) error {
			if _, ok := slices.BinarySearch(w.Buckets, protocol.Bucket(h.wire, v.buckets)); !ok {
				return nil
			}
			id := wireKey(h.wire)
			row, ok := right[id]
			if !ok {
				extra = append(extra, h)
				v.note(Difference{Table: w.Table, Key: h.wire, Kind: protocol.DiffExtra})
				return nil
			}
			delete(right, id)
			if h.img == nil {
				wrong = append(wrong, row)
				v.note(Difference{Table: w.Table, Key: h.wire, Kind: protocol.DiffMissing})
				return nil
			}
			d := Difference{Table: w.Table, Key: h.wire, Kind: protocol.DiffValues}
			for i, have := range h.values(part.Columns) {
				if !sameWire(have, row.Values[i]) {
					d.Columns = append(d.Columns, Unequal{part.Columns[i], have, row.Values[i]})
				}
			}
			if len(d.Columns) == 0 {
				d.Kind = protocol.DiffVersion
			}
			if len(d.Columns) > 0 || h.sver != row.Version {
				wrong = append(wrong, row)
				v.note(d)
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, id := range slices.Sorted(maps.Keys(right)) {
			row := right[id]
			key := make([]*string, len(m.key))
			for i, k := range m.key {
				key[i] = row.Values[slices.Index(part.Columns, m.Cols[k].Wire)]
			}
			wrong = append(wrong, row)
			v.note(Difference{Table: w.Table, Key: key, Kind: protocol.DiffMissing})
		}
		if !v.repair {
			continue
		}
		if err := in.repair(m, extra, protocol.TableRows{Table: w.Table, Columns: part.Columns, Rows: wrong}); err != nil {
			return err
		}
		v.found.Repaired += int64(len(extra) + len(wrong))
	}
	for _, tab := range c.order {
		if err := t.unpark(tab); err != nil {
			return err
		}
	}
	if v.rounds++; v.repair && v.rounds < mostRepairs {
		v.step = verifySums // looks whether it helped, and for more
		return nil
	}
	v.found.More = v.found.More || v.more
	v.finish(cursor)
	return nil
}

// note counts a difference.
func (v *verification) note(d Difference) {
	v.found.Different++
	if len(v.found.Differences) < mostNamed {
		v.found.Differences = append(v.found.Differences, d)
	} else {
		v.found.More = true
	}
}

// repair gives rows what the server has by the rules of any reply: of a dirty row only the server's image.
func (in *incoming) repair(m *member, extra []held, rows protocol.TableRows) error {
	for _, h := range extra {
		if h.known {
			if err := in.delete(m.table, h.key); err != nil {
				return err
			}
		} else if err := in.t.remove(m.table, h.key); err != nil {
			return err
		}
	}
	return in.table(&rows)
}

// wireKey is a key as a map key.
func wireKey(key []*string) string {
	var b strings.Builder
	for _, k := range key {
		if k == nil {
			b.WriteByte('-')
			continue
		}
		fmt.Fprintf(&b, "%d:%s", len(*k), *k)
	}
	return b.String()
}
