package chaos

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/test/world"
)

// checker holds the evidence against the promises. Every complaint begins with the promise's name.
type checker struct {
	h *history
	*evidence
	byRecord map[string]*record    // device, session and index
	rows     map[string][]*written // the source's writes of a row, in order
	failures []string
}

func (c *checker) fail(promise, format string, args ...any) {
	c.failures = append(c.failures, promise+": "+fmt.Sprintf(format, args...))
}

func (c *checker) check(ctx context.Context) error {
	c.rows = map[string][]*written{}
	for _, w := range c.source {
		c.rows[w.row()] = append(c.rows[w.row()], w)
	}
	c.witness()
	c.records()
	c.edits()
	c.verdicts()
	c.units()
	c.onceAtSource()
	c.versionsAtSource()
	c.versionsAtMirror()
	c.subsets()
	c.broken()
	c.takeovers()
	return errors.Join(c.h.acks.check(ctx, c), c.equal(ctx))
}

// witness makes sure that the audit itself is whole: each write of a row begins with what the one before left.
func (c *checker) witness() {
	for _, list := range c.rows {
		for i := 1; i < len(list); i++ {
			if !same(list[i-1].New, list[i].Old, nil) {
				c.fail("bench", "the audit of %s has a gap between %d and %d", list[i].row(), list[i-1].ID, list[i].ID)
			}
		}
	}
}

func same(a, b image, but []string) bool {
	if (a == nil) != (b == nil) {
		return false
	}
	for k, v := range a {
		w, ok := b[k]
		if slices.Contains(but, k) {
			continue
		}
		if !ok || (v == nil) != (w == nil) || v != nil && *v != *w {
			return false
		}
	}
	return true
}

// records: every record that a device sent is in the ledger, once, as it was sent, with a final state; and nothing else is
// (I1, I2). What the device was told and logged is what the ledger says.
func (c *checker) records() {
	c.byRecord = map[string]*record{}
	for _, r := range c.ledger {
		id := fmt.Sprintf("%s %s/%d", r.Device, protocol.SessionToken(r.Incarnation, r.N), r.Index)
		if c.byRecord[id] != nil {
			c.fail("I2", "%s is in the ledger twice", r.name())
		}
		c.byRecord[id] = r
		switch r.State {
		case protocol.Applied, protocol.Rejected, protocol.Refused:
		default:
			c.fail("I1", "%s is still %q", r.name(), r.State)
		}
	}
	for i, journal := range c.journals {
		name := c.h.devices[i].task.User + "/" + c.h.devices[i].task.Name
		first := map[string][]sent{}
		for _, e := range journal {
			if e.Sent == nil {
				continue
			}
			if old, again := first[e.Session]; again {
				if fmt.Sprint(shape(old)) != fmt.Sprint(shape(e.Sent)) {
					c.fail("I1", "%s sent session %s twice, with different records", name, e.Session)
				}
				continue
			}
			first[e.Session] = e.Sent
			for k := range e.Sent {
				s := &e.Sent[k]
				r := c.byRecord[fmt.Sprintf("%s %s/%d", name, e.Session, s.Index)]
				switch {
				case r == nil:
					c.fail("I1", "%s sent %s %s %v in session %s as record %d, and the ledger does not have it", name, s.Op, s.Table, s.Key, e.Session, s.Index)
				case r.Sent != nil:
					c.fail("bench", "%s twice in the journal", r.name())
				default:
					r.Sent = s
					if r.Table != s.Table || r.Op != s.Op || !slices.Equal(r.Key, s.Key) || r.Img != nil && s.New["tag"] != nil && r.Img["tag"] != nil && *r.Img["tag"] != *s.New["tag"] {
						c.fail("I2", "%s is not what was sent: %s %s %v", r.name(), s.Op, s.Table, s.Key)
					}
				}
			}
		}
		c.log(name, c.rejected[i])
	}
	for _, r := range c.ledger {
		if r.Sent == nil {
			c.fail("I2", "nobody sent %s", r.name())
		}
	}
}

// shape is what must be equal of two sendings.
func shape(l []sent) (out []string) {
	text := func(g map[string]*string) string {
		var cols []string
		for k, v := range g {
			if v == nil {
				cols = append(cols, k)
			} else {
				cols = append(cols, k+"="+*v)
			}
		}
		slices.Sort(cols)
		return strings.Join(cols, "|")
	}
	for _, s := range l {
		out = append(out, fmt.Sprint(s.Index, s.Table, s.Op, s.Key, text(s.Base), text(s.New)))
	}
	return out
}

// log compares a device's rejected log with the server's: the same records, each once.
func (c *checker) log(name string, l []device.Reject) {
	have := map[string]int{}
	for _, r := range l {
		have[fmt.Sprintf("%s %s/%d", name, r.Session, r.Index)]++
	}
	for _, id := range sorted(have) {
		r := c.byRecord[id]
		switch {
		case have[id] > 1:
			c.fail("I1", "%s logged the rejection of %s %d times", name, id, have[id])
		case r == nil:
			c.fail("I1", "%s logged the rejection of %s, which the server does not know", name, id)
		case r.State == protocol.Applied:
			c.fail("I1", "%s logged the rejection of %s, which was applied", name, r.name())
		}
	}
	for _, r := range c.ledger {
		id := fmt.Sprintf("%s %s/%d", r.Device, protocol.SessionToken(r.Incarnation, r.N), r.Index)
		if r.Device == name && (r.State == protocol.Rejected || r.State == protocol.Refused) && have[id] == 0 {
			c.fail("I1", "%s does not know that %s was %s (%s)", name, r.name(), r.State, r.Code)
		}
	}
}

func sorted[V any](m map[string]V) []string {
	var l []string
	for k := range m {
		l = append(l, k)
	}
	slices.Sort(l)
	return l
}

// edits: the last edit that a user made of a row was sent, or there was nothing left of it to send; what must be refused was
// not accepted.
func (c *checker) edits() {
	for i, journal := range c.journals {
		name := c.h.devices[i].task.User + "/" + c.h.devices[i].task.Name
		last := map[string]edit{}
		inserted := map[string]bool{} // by row: the file made it itself and never sent it
		uploads := map[string]bool{}
		poison := map[string]bool{}
		for _, e := range journal {
			for _, s := range e.Sent {
				row := s.Table + "\x00" + strings.Join(s.Key, "\x00")
				if s.New != nil {
					uploads[row+"\x00"+image(s.New).text("tag")] = true
				} else {
					uploads[row+"\x00D"] = true
				}
				inserted[row] = false
			}
			if e.Step == 0 || !c.done[i][e.Step] {
				continue
			}
			for _, ed := range e.Edits {
				row := ed.Table + "\x00" + strings.Join(ed.Key, "\x00")
				if ed.Op == "I" {
					inserted[row] = true
				}
				if ed.Op == "D" && inserted[row] {
					delete(last, row)
					continue
				}
				last[row] = ed
				if ed.Poison {
					poison[row+"\x00"+ed.Tag] = true
				}
			}
		}
		refused := map[string]bool{} // by row: the last that the server heard of it from here was an insert that it refused
		for _, r := range c.ledger {
			if r.Device == name {
				refused["c."+r.row()] = r.Op == "I" && r.State != protocol.Applied
			}
		}
		for _, row := range sorted(last) {
			ed := last[row]
			what := ed.Tag
			if ed.Op == "D" {
				what = "D"
			}
			if ed.Op == "D" && refused[row] {
				continue // of a row that never came to be
			}
			if !uploads[row+"\x00"+what] && !c.logged(i, ed) {
				c.fail("I1", "%s: the edit %s %s %v (%s) was never sent", name, ed.Op, ed.Table, ed.Key, ed.Tag)
			}
		}
		for _, r := range c.ledger {
			if r.Device == name && r.Sent != nil && r.State == protocol.Applied && poison[r.Table+"\x00"+strings.Join(r.Key, "\x00")+"\x00"+image(r.Sent.New).text("tag")] {
				c.fail("I1", "%s must be refused and was applied", r.name())
			}
		}
	}
}

// logged tells whether the device itself rejected an edit.
func (c *checker) logged(i int, ed edit) bool {
	return slices.ContainsFunc(c.rejected[i], func(r device.Reject) bool {
		return r.Table == ed.Table && r.Op == ed.Op && (ed.Op == "D" || image(r.Sent).text("tag") == ed.Tag)
	})
}

// verdicts: a final verdict that a device was told is the one of the ledger (I1).
func (c *checker) verdicts() {
	for i, journal := range c.journals {
		name := c.h.devices[i].task.User + "/" + c.h.devices[i].task.Name
		for _, e := range journal {
			for _, v := range e.Told {
				r := c.byRecord[fmt.Sprintf("%s %s/%d", name, protocol.SessionToken(v.Incarnation, v.N), v.Index)]
				switch {
				case r == nil:
					c.fail("I1", "%s was told of a record that is not in the ledger: session %d index %d", name, v.N, v.Index)
				case v.State != protocol.Merged && v.State != r.State, v.State == protocol.Merged && r.State == protocol.Rejected:
					c.fail("I1", "%s was told %q of %s, which is %q", name, v.State, r.name(), r.State)
				}
			}
		}
	}
}

// units: where a subscription says `reject: transaction`, the records of a local transaction stand or fall together, and those that
// stand are one transaction of the source (I6). Records of such a subscription without a number are one unit.
func (c *checker) units() {
	at := map[int64]int64{}
	for xid, ids := range c.carries {
		for _, id := range ids {
			at[id] = xid
		}
	}
	units := map[string][]*record{}
	atomic := map[string]bool{}
	for _, r := range c.ledger {
		if r.Sent == nil {
			continue
		}
		whole := r.Table == "c.memo"
		if r.Sent.Unit == 0 && !whole {
			continue
		}
		id := fmt.Sprintf("%s-%d unit %d", r.Incarnation, r.N, r.Sent.Unit)
		units[id] = append(units[id], r)
		atomic[id] = atomic[id] || whole
	}
	for _, id := range sorted(units) {
		if !atomic[id] {
			continue
		}
		for _, r := range units[id][1:] {
			first := units[id][0]
			switch {
			case (r.State == protocol.Applied) != (first.State == protocol.Applied):
				c.fail("I6", "%s is %s, and %s of the same local transaction is %s", r.name(), r.State, first.name(), first.State)
			case r.State == protocol.Applied && at[r.ID] != at[first.ID]:
				c.fail("I6", "%s and %s of the same local transaction are two transactions of the source", r.name(), first.name())
			}
		}
	}
}

// onceAtSource: each applied record was carried to the source once, by a transaction that wrote its row so; no other record was,
// and the up worker wrote nothing else (I2).
func (c *checker) onceAtSource() {
	byID := map[int64]*record{}
	for _, r := range c.ledger {
		byID[r.ID] = r
	}
	direct := map[int64]map[string][]*written{}
	for _, w := range c.source {
		if w.Carried && w.Depth == 1 {
			if direct[w.Xid] == nil {
				direct[w.Xid] = map[string][]*written{}
			}
			direct[w.Xid][w.row()] = append(direct[w.Xid][w.row()], w)
		}
	}
	carried := map[int64]int{}
	for xid, ids := range c.carries {
		slices.Sort(ids)
		byRow := map[string][]*record{}
		for _, id := range ids {
			carried[id]++
			r := byID[id]
			if r == nil {
				c.fail("I2", "a transaction of the source carries record %d, which the ledger does not know", id)
				continue
			}
			byRow[r.row()] = append(byRow[r.row()], r)
		}
		for row, list := range byRow {
			writes := direct[xid][row]
			for _, r := range list {
				at := slices.IndexFunc(writes, func(w *written) bool { return wrote(r, w) })
				switch {
				case at >= 0:
					writes = slices.Delete(slices.Clone(writes), at, at+1)
				case r.Op == "D": // there was nothing to delete
				default:
					c.fail("I2", "%s counts as applied, but its transaction did not write it", r.name())
				}
			}
			writes = slices.DeleteFunc(slices.Clone(writes), func(w *written) bool { return w.Cascade })
			if len(writes) > 0 {
				c.fail("I2", "the up worker wrote %s at the source (audit %d), which nobody asked for", strings.ReplaceAll(row, "\x00", " "), writes[0].ID)
			}
			delete(direct[xid], row)
		}
		for row, writes := range direct[xid] {
			if !writes[0].Cascade {
				c.fail("I2", "the up worker wrote %s at the source (audit %d), which nobody asked for", strings.ReplaceAll(row, "\x00", " "), writes[0].ID)
			}
		}
	}
	for _, r := range c.ledger {
		switch n := carried[r.ID]; {
		case r.State == protocol.Applied && n != 1:
			c.fail("I2", "%s is applied, and %d transactions of the source carried it", r.name(), n)
		case r.State != protocol.Applied && n != 0:
			c.fail("I2", "%s is %s, and %d transactions of the source carried it", r.name(), r.State, n)
		}
	}
}

// takeovers: a process writes to the source as the up worker only after it has taken the chain over, which is a transaction that carries
// nothing. One that was passed over and goes on nevertheless shows here, whatever became of its changes.
func (c *checker) takeovers() {
	for i := 1; i < len(c.chain); i++ {
		if was, is := c.chain[i-1], c.chain[i]; was.worker != is.worker && is.carries != "" {
			c.fail("I2", "process %s carried %s to the source while the chain was %s's", is.worker, is.carries, was.worker)
		}
	}
}

// wrote tells whether a write is what a record asks for. Triggers have the last word on some columns.
func wrote(r *record, w *written) bool {
	if r.Op == "D" {
		return w.New == nil
	}
	if w.New == nil {
		return false
	}
	for k, v := range r.Img {
		switch {
		case k == "updated_at" || k == "rev" || k == "area_id" && w.Table == "line":
		case k == "name":
			if strings.ToLower(strings.TrimSpace(image{k: v}.text(k))) != w.New.text(k) {
				return false
			}
		case image{k: v}.text(k) != w.New.text(k):
			return false
		}
	}
	return true
}

// seenAll tells whether an edit made on base knows of everything that others did to the row until at (an index into the row's
// writes at the source). Only what our own transactions' triggers and cascades did may be new to it (rule R4).
func (c *checker) seenAll(row string, base image, at int) string {
	list := c.rows[row]
	from := -1
	switch rev := base.number("rev"); {
	case base == nil || strings.HasPrefix(row, "memo\x00"):
		from = at - 1
	case rev == 0: // made on the device's own insert, before the source's answer came
		for i := at - 1; i >= 0; i-- {
			if list[i].Op == "I" && list[i].Carried {
				from = i
				break
			}
		}
	default:
		for i, w := range list[:at] {
			if w.New.number("rev") == rev {
				from = i
			}
		}
	}
	for _, w := range list[from+1 : at] {
		if !w.Carried {
			return fmt.Sprintf("the row was written by others since (audit %d)", w.ID)
		}
	}
	return ""
}

// versionsAtSource: what the up worker overwrote is what the device had seen (I3).
func (c *checker) versionsAtSource() {
	byID := map[int64]*record{}
	for _, r := range c.ledger {
		byID[r.ID] = r
	}
	for row, list := range c.rows {
		used := map[int64]bool{}
		for at, w := range list {
			if !w.Carried || w.Depth != 1 {
				continue
			}
			var r *record
			for _, id := range c.carries[w.Xid] {
				if x := byID[id]; x != nil && !used[id] && x.row() == row && wrote(x, w) {
					r, used[id] = x, true
					break
				}
			}
			if r == nil || r.Sent == nil {
				continue // told by others
			}
			base := image(r.Sent.Base)
			switch {
			case r.Op == "I" && w.Old != nil:
				c.fail("I3", "%s overwrote a row that was there (audit %d)", r.name(), w.ID)
			case r.Op == "I", w.Old == nil:
				continue
			case base.text("tag") != w.Old.text("tag"):
				c.fail("I3", "%s was made on the row by %q and overwrote the row by %q at the source (audit %d)", r.name(), base.text("tag"), w.Old.text("tag"), w.ID)
			case w.Table == "memo" && !same(base, w.Old, nil):
				c.fail("I3", "%s was made on %v and overwrote %v at the source (audit %d)", r.name(), show(base), show(w.Old), w.ID)
			}
			if why := c.seenAll(row, base, at); why != "" {
				c.fail("I3", "%s was applied at the source although %s; its base was rev %s", r.name(), why, base.text("rev"))
			}
		}
	}
}

func show(g image) string {
	var l []string
	for k := range g {
		l = append(l, k+"="+g.text(k))
	}
	slices.Sort(l)
	return strings.Join(l, " ")
}

// versionsAtMirror: the same for the merge.
func (c *checker) versionsAtMirror() {
	byVersion := map[string]*record{}
	for _, r := range c.ledger {
		if r.State != protocol.Rejected && r.Version != 0 {
			byVersion[fmt.Sprint(r.row(), "\x00", r.Version)] = r
		}
	}
	for _, w := range c.mirror {
		if w.New == nil || w.Old == nil || w.New.number("_ws_version") != w.Xid {
			continue
		}
		r := byVersion[fmt.Sprint(w.row(), "\x00", w.Xid)]
		if r == nil || r.Sent == nil || r.Op != "U" || w.Table == "area" {
			continue
		}
		base := image(r.Sent.Base)
		if base.text("tag") != w.Old.text("tag") && image(r.Sent.New).text("tag") != w.Old.text("tag") {
			c.fail("I3", "%s was made on the row by %q and overwrote the row by %q in the mirror (audit %d)", r.name(), base.text("tag"), w.Old.text("tag"), w.ID)
			continue
		}
		list := c.rows[w.row()]
		at := slices.IndexFunc(list, func(x *written) bool { return x.New != nil && x.New.number("rev") == w.Old.number("rev") })
		if at < 0 || w.Table == "memo" || base.number("rev") == w.Old.number("rev") {
			continue
		}
		if why := c.seenAll(w.row(), base, at+1); why != "" {
			c.fail("I3", "%s was merged although %s; its base was rev %s", r.name(), why, base.text("rev"))
		}
	}
}

// subsets: no row was ever sent to a device whose user never had its area (I5); area 6 is nobody's.
func (c *checker) subsets() {
	had := map[string]bool{"ada 1": true, "ada 2": true, "ada 3": true, "ben 1": true, "ben 3": true, "ben 4": true}
	for _, w := range c.source {
		if w.Table == "area" && w.New != nil {
			had[w.New.text("owner")+" "+w.New.text("id")] = true
			had[w.New.text("helper")+" "+w.New.text("id")] = true
		}
	}
	for i, journal := range c.journals {
		task := c.h.devices[i].task
		for _, e := range journal {
			for _, s := range e.Seen {
				column := "area_id"
				if s.Table == "c.area" {
					column = "id"
				}
				at := slices.Index(s.Columns, column)
				owner, helper := slices.Index(s.Columns, "owner"), slices.Index(s.Columns, "helper")
				for _, row := range s.Rows {
					if at < 0 || row[at] == nil {
						c.fail("I5", "%s got a row of %s without its area", task.Name, s.Table)
						continue
					}
					if area := *row[at]; !had[task.User+" "+area] {
						c.fail("I5", "%s of %s got a row of %s in area %s, which was never the user's", task.Name, task.User, s.Table, area)
					}
					if s.Table == "c.area" && *row[owner] != task.User && *row[helper] != task.User {
						c.fail("I5", "%s of %s got area %s of %s and %s", task.Name, task.User, *row[at], *row[owner], *row[helper])
					}
				}
			}
		}
	}
}

// broken: what devices saw themselves.
func (c *checker) broken() {
	for i, journal := range c.journals {
		for _, e := range journal {
			if promise, what, ok := strings.Cut(e.Broken, ": "); ok {
				c.fail(promise, "%s: %s", c.h.devices[i].task.Name, what)
			}
		}
	}
}

// equal: the three sides agree, byte for byte (I4).
func (c *checker) equal(ctx context.Context) error {
	tables, err := schema.LoadTables(ctx, c.h.mirror)
	if err != nil {
		return err
	}
	for _, t := range tables {
		source, err := world.Rows(ctx, c.h.source, t, t.Columns, "")
		if err != nil {
			return err
		}
		mirror, err := world.Rows(ctx, c.h.mirror, t, t.Columns, "")
		if err != nil {
			return err
		}
		if d := world.Difference(source, mirror); d != "" {
			c.fail("I4", "%s: source and mirror differ: %s", t.FullName(), d)
		}
		column := "area_id"
		if t.Name == "area" {
			column = "id"
		}
		for _, u := range c.h.devices {
			want, err := world.Rows(ctx, c.h.source, t, t.Columns, fmt.Sprintf("%s IN (SELECT id FROM c.area WHERE %s IN (owner, helper))", column, schema.Literal(u.task.User)))
			if err != nil {
				return err
			}
			d, err := device.Open(ctx, u.task.File, device.Options{})
			if err != nil {
				return err
			}
			got, err := world.DeviceRows(ctx, d.DB(), t, t.Columns)
			if cerr := d.Close(); err == nil {
				err = cerr
			}
			if err != nil {
				return err
			}
			if diff := world.Difference(want, got); diff != "" {
				c.fail("I4", "%s: source and %s differ: %s", t.FullName(), u.task.Name, diff)
			}
		}
	}
	return nil
}
