package stages

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/internal/sabotage"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// Rule R8 in the merge. A pass judges all claimed sessions as if every record stood for itself. If then records must fall
// with others (conflict.Fall), the pass is undone, they are marked, and another one judges what is left: a record that fell has
// written nothing, so those that came after it on the same row may fare otherwise now.

// wholeSession is the atomic unit of a session's records that the device has not numbered.
const wholeSession = -1

// atomicUnits tells the records which unit they stand or fall with: a device transaction is atomic when one of its records
// is of a subscription with reject: transaction. The definitions in force at intake decide.
func atomicUnits(changes []protocol.Change, s *set, records []record) {
	atomic := map[int64]bool{}
	for i := range changes {
		c := &changes[i]
		if sub := s.byID[c.Table]; sub == nil || sub.Reject != schema.RejectTransaction {
			continue
		}
		if c.Unit == 0 {
			records[i].unit = wholeSession
		}
		atomic[c.Unit] = true
	}
	for i := range changes {
		if u := changes[i].Unit; u != 0 && atomic[u] {
			records[i].unit = u
		}
	}
}

// judged is what a pass made of one record.
type judged struct {
	session int64
	idx     int
	row     string // table and key
	op      string
	unit    int64
	effect  conflict.Effect
	failed  bool
}

// fallen is a record that falls with another of its session.
type fallen struct {
	session      int64
	idx          int
	code, detail string
}

// pass judges and writes all records of the claimed sessions.
func (b *mergeBatch) pass(tables []int) error {
	b.codes, b.merged, b.rejected, b.judged = map[string]int{}, 0, 0, nil
	for _, s := range b.sessions {
		s.seen = map[string]int{}
	}
	for _, id := range tables {
		if err := b.table(id); err != nil {
			return err
		}
	}
	if !b.bad {
		return nil
	}
	bad := badSQL
	if sabotage.On(sabotage.SwallowBad) {
		bad = strings.Replace(bad, "s.bad_code IS NOT NULL", "false", 1)
	}
	rows, err := b.tx.Query(b.ctx, bad, b.ids, b.stamp)
	if err != nil {
		return fmt.Errorf("log refused records: %w", err)
	}
	j := judged{failed: true}
	var code, tbl string
	var key []*string
	_, err = pgx.ForEachRow(rows, []any{&j.session, &j.idx, &j.op, &j.unit, &code, &tbl, &key}, func() error {
		b.rejected++
		b.codes[code]++
		j.row = tbl + "\x00" + keyString(key)
		b.judged = append(b.judged, j)
		return nil
	})
	return wrap("log refused records", err)
}

// fall finds who must fall with records that failed in this pass, and is certain to: of sessions whose failures cannot be the
// doing of a record that falls itself.
func (b *mergeBatch) fall() ([]fallen, error) {
	var affected []int64
	for _, j := range b.judged {
		if j.failed && (j.unit != 0 || j.op == protocol.Insert) {
			affected = append(affected, j.session)
		}
	}
	if len(affected) == 0 {
		return nil, nil
	}
	slices.Sort(affected)
	bySession, err := b.fallenOf(slices.Compact(affected))
	if err != nil || len(bySession) == 0 {
		return nil, err
	}
	place := make(map[int64]int, len(b.ids))
	for i, id := range b.ids {
		place[id] = i
	}
	of := make([][]judged, len(b.ids))
	for _, j := range b.judged {
		of[place[j.session]] = append(of[place[j.session]], j)
	}
	var out []fallen
	doubtful := map[string]bool{} // rows that may look otherwise in the next pass
	for i, id := range b.ids {
		sure, touched := true, false
		for _, j := range of[i] {
			touched = touched || doubtful[j.row]
			sure = sure && !(j.failed && doubtful[j.row])
		}
		falls := bySession[id]
		if sure {
			out = append(out, falls...)
		}
		for _, j := range of[i] {
			falling := slices.ContainsFunc(falls, func(f fallen) bool { return f.idx == j.idx })
			if j.effect != conflict.Reject && j.effect != conflict.Nothing && (touched || falling) {
				doubtful[j.row] = true
			}
		}
	}
	return out, nil
}

// ledgerRecord is a record of an affected session, as this pass has written it to the ledger.
type ledgerRecord struct {
	idx          int
	tbl          int
	tname, op    string
	key          []*string
	img          map[string]*string
	unit         int64
	state        string
	code, detail *string
}

// fallenOf decides for sessions, each by itself: nobody but its device has seen what it made.
func (b *mergeBatch) fallenOf(sessions []int64) (map[int64][]fallen, error) {
	rows, err := b.tx.Query(b.ctx, `SELECT session_id, idx, tbl, tname, op, key, img, unit, state, code, detail FROM waystage.change
		WHERE session_id = ANY ($1) ORDER BY session_id, idx`, sessions)
	if err != nil {
		return nil, fmt.Errorf("read records of units: %w", err)
	}
	lists := map[int64][]ledgerRecord{}
	_, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (r ledgerRecord, err error) {
		var session int64
		if err = row.Scan(&session, &r.idx, &r.tbl, &r.tname, &r.op, &r.key, &r.img, &r.unit, &r.state, &r.code, &r.detail); err == nil {
			lists[session] = append(lists[session], r)
		}
		return r, err
	})
	if err != nil {
		return nil, fmt.Errorf("read records of units: %w", err)
	}
	out := map[int64][]fallen{}
	for session, list := range lists {
		members := make([]conflict.Member, len(list))
		for i, r := range list {
			members[i] = conflict.Member{Unit: r.unit, Failed: r.state == protocol.Rejected}
		}
		b.references(list, members)
		for _, f := range conflict.Fall(members) {
			with := &list[f.With]
			one := fallen{session: session, idx: list[f.Member].idx, code: string(f.Reason)}
			switch {
			case f.Reason == conflict.Dependency:
				one.detail = fmt.Sprintf("the row of %s that the change refers to (%s) was not inserted (change %d)", with.tname, with.keyText(), with.idx)
			default:
				one.detail = fmt.Sprintf("change %d of the same transaction was rejected: %s (%s)", with.idx, with.tname, with.keyText())
			}
			if with.code != nil && *with.code != "" {
				one.detail += ": " + *with.code
			}
			if with.detail != nil {
				one.detail += ": " + *with.detail
			}
			if len(one.detail) > maxDetail {
				one.detail = strings.ToValidUTF8(one.detail[:maxDetail], "") + "..."
			}
			// Who falls with this one hears of this one's reason.
			with = &list[f.Member]
			with.code, with.detail = &one.code, nil
			out[session] = append(out[session], one)
		}
	}
	return out, nil
}

func (r *ledgerRecord) keyText() string {
	texts := make([]string, len(r.key))
	for i, v := range r.key {
		texts[i] = "null"
		if v != nil {
			texts[i] = quoted(*v)
		}
	}
	return strings.Join(texts, ", ")
}

// references finds which records refer by a foreign key to rows that inserts of the same session make. Values are compared as
// the device wrote them: it has both from one file.
func (b *mergeBatch) references(list []ledgerRecord, members []conflict.Member) {
	made := map[string]int{} // table, columns, values -> place of the insert
	for i := range list {
		q := b.cat.tables[list[i].tbl]
		if q == nil {
			continue
		}
		for j := range list {
			child := b.cat.tables[list[j].tbl]
			if child == nil || list[i].op != protocol.Insert {
				continue
			}
			for _, fk := range child.table.Foreign {
				if fk.Table != q.table.FullName() {
					continue
				}
				if id, ok := rowID(fk.Table, fk.Refers, fk.Refers, list[i].img); ok {
					made[id] = i
				}
			}
		}
	}
	for i := range list {
		q := b.cat.tables[list[i].tbl]
		if q == nil || list[i].op == protocol.Delete {
			continue
		}
		for _, fk := range q.table.Foreign {
			if id, ok := rowID(fk.Table, fk.Refers, fk.Columns, list[i].img); ok {
				if p, ok := made[id]; ok && p != i {
					members[i].Refers = append(members[i].Refers, p)
				}
			}
		}
	}
}

// rowID names the row of a table whose columns refers have the values that an image has in columns.
func rowID(table string, refers, columns []string, img map[string]*string) (string, bool) {
	var s strings.Builder
	s.WriteString(table)
	for i, c := range columns {
		v := img[c]
		if v == nil {
			return "", false
		}
		s.WriteString("\x00" + refers[i] + "\x00" + strconv.Itoa(len(*v)) + ":" + *v)
	}
	return s.String(), true
}

// mark notes in staging who falls.
func (b *mergeBatch) mark(list []fallen) error {
	n := len(list)
	sessions, idx, codes, details := make([]int64, n), make([]int, n), make([]string, n), make([]string, n)
	for i, f := range list {
		sessions[i], idx[i], codes[i], details[i] = f.session, f.idx, f.code, f.detail
	}
	b.bad = true
	_, err := b.tx.Exec(b.ctx, `UPDATE waystage.staging s SET bad_code = u.code, bad_detail = u.detail
		FROM unnest($1::bigint[], $2::int[], $3::text[], $4::text[]) AS u(session_id, idx, code, detail)
		WHERE s.session_id = u.session_id AND s.idx = u.idx AND s.bad_code IS NULL`, sessions, idx, codes, details)
	return wrap("mark records that fall with others", err)
}
