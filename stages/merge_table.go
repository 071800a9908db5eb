package stages

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/zap"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/protocol"
)

// fact is what the merge knows of one record and the mirror row of its key.
type fact struct {
	session int64
	idx     int
	op      string
	unit    int64
	bver    int64
	key     string  // as the server writes it, for comparing in memory
	version *int64  // of the mirror row; nil: absent
	lw      *string // its last device writer
	mver    *int64  // version given by that device's merge
	same    bool    // the row already is what the record makes of it
	base    bool    // the base image is the row's
	from    *string // the row's value of the subset key column
	to      *string // the one that the record would leave; nil for a delete
}

// decision is what becomes of it.
type decision struct {
	fact    *fact
	effect  conflict.Effect
	code    protocol.Code
	detail  string
	version int64

	policy   conflict.Policy // that may decide otherwise; empty: none
	asked    bool            // it has
	merged   bool            // and took the record
	resolved string          // for the ledger
}

// table merges the records of one table. A value that does not fit its column fails the whole statement; then the
// records that have one are marked and the rest is merged without them.
func (b *mergeBatch) table(id int) error {
	q := b.cat.tables[id]
	if q == nil {
		b.bad = true
		_, err := b.tx.Exec(b.ctx, `UPDATE waystage.staging SET bad_code = $3, bad_detail = 'table ' || tname || ' is not in the device''s subscription set'
			WHERE tbl = $1 AND session_id = ANY ($2) AND bad_code IS NULL`, id, b.ids, string(protocol.CodeUnknownTable))
		return wrap("refuse records of a table that is no longer synced", err)
	}
	err := b.try(q, nil)
	if err == nil || !refusedData(err) {
		return wrap("merge "+q.table.FullName(), err)
	}
	b.m.log.Debug("a set statement failed, its bad values are looked for", zap.String("table", q.table.FullName()), zap.Error(err))
	b.bad = true
	tag, err := b.tx.Exec(b.ctx, q.invalid, b.ids)
	if err != nil {
		return fmt.Errorf("look for invalid values in %s: %w", q.table.FullName(), err)
	}
	if tag.RowsAffected() > 0 {
		if err = b.try(q, nil); err == nil || !refusedData(err) {
			return wrap("merge "+q.table.FullName(), err)
		}
	}
	return b.divide(q)
}

// refusedData tells whether the database refused the data, and not the statement.
func refusedData(err error) bool {
	var bad *setError
	return !errors.As(err, &bad) && pgerr.Class(err) == pgerr.Refusal && !pgerr.Is(err, "42501")
}

// divide merges the records in halves, and these in halves, until those that the database refuses (a key over the
// index's size, two keys that the type holds for equal) stand alone and are rejected.
func (b *mergeBatch) divide(q *tableSQL) error {
	rows, err := b.tx.Query(b.ctx, `SELECT session_id, idx FROM waystage.staging WHERE tbl = $1 AND session_id = ANY ($2) AND bad_code IS NULL ORDER BY 1, 2`, q.table.ID, b.ids)
	if err != nil {
		return fmt.Errorf("list records of %s: %w", q.table.FullName(), err)
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r recordID, err error) { return r, row.Scan(&r.session, &r.idx) })
	if err != nil {
		return fmt.Errorf("list records of %s: %w", q.table.FullName(), err)
	}
	var part func(list []recordID) error
	part = func(list []recordID) error {
		if len(list) == 0 {
			return nil
		}
		err := b.try(q, list)
		switch {
		case err == nil || !refusedData(err):
			return wrap("merge "+q.table.FullName(), err)
		case len(list) > 1:
			half := len(list) / 2
			return errors.Join(part(list[:half]), part(list[half:]))
		}
		detail := err.Error()
		var pg *pgconn.PgError
		if errors.As(err, &pg) {
			detail = pg.Message
		}
		_, err = b.tx.Exec(b.ctx, q.invalidOne, list[0].session, list[0].idx, string(protocol.CodeInvalidValue), detail)
		return wrap("mark an invalid record of "+q.table.FullName(), err)
	}
	return part(all)
}

type recordID struct {
	session int64
	idx     int
}

// try merges records under a savepoint: all of the table's, or those listed. A failure leaves no trace.
func (b *mergeBatch) try(q *tableSQL, list []recordID) (err error) {
	merged, rejected, judged, codes := b.merged, b.rejected, len(b.judged), map[string]int{}
	var fresh []func() // undo for keys seen
	err = b.rounds(q, list, codes, &fresh)
	if err == nil {
		for c, n := range codes {
			b.codes[c] += n
		}
		return nil
	}
	b.merged, b.rejected, b.judged = merged, rejected, b.judged[:judged]
	for _, undo := range fresh {
		undo()
	}
	if b.tx.Conn().IsClosed() || b.ctx.Err() != nil {
		return err
	}
	if _, rerr := b.tx.Exec(b.ctx, "ROLLBACK TO SAVEPOINT ws_table"); rerr != nil {
		return errors.Join(err, rerr)
	}
	return err
}

// rounds merges, between a savepoint and its release, in as few set statements as possible. Facts hold until a record of the same key has changed the row:
// what follows on that key waits for the next round, which reads the facts anew. What follows on a key whose records
// changed nothing needs no new round.
func (b *mergeBatch) rounds(q *tableSQL, list []recordID, codes map[string]int, undo *[]func()) error {
	var later waiting
	for round := 1; ; round++ {
		facts, err := b.facts(q, list, round == 1)
		if err != nil {
			return err
		}
		if len(facts) == 0 {
			_, err := b.tx.Exec(b.ctx, releaseTable)
			return err
		}
		allowed, err := b.subset(q, facts)
		if err != nil {
			return err
		}
		first, clashing, asked := map[string]bool{}, []int(nil), map[string]bool{}
		judged := make([]decision, len(facts))
		for i := range facts {
			f := &facts[i]
			judged[i] = b.decide(q, f, allowed)
			if judged[i].policy != "" && !first[f.key] {
				clashing = append(clashing, i)
			}
			asked[f.key] = asked[f.key] || judged[i].policy != ""
			first[f.key] = first[f.key] || judged[i].policy != "" || judged[i].writes()
		}
		if len(clashing) > 0 {
			if err := b.resolve(q, facts, judged, clashing); err != nil {
				return err
			}
		}
		changed := map[string]bool{}
		decisions := make([]decision, 0, len(facts))
		for i := range facts {
			f := &facts[i]
			s := b.sessions[f.session]
			if at, ok := s.seen[q.table.FullName()+"\x00"+f.key]; ok && at != f.idx {
				decisions = append(decisions, decision{fact: f, code: protocol.CodeDuplicate,
					detail: fmt.Sprintf("the row was changed twice in one session (change %d too); send one change with its final state", at)})
				continue
			} else if !ok {
				id := q.table.FullName() + "\x00" + f.key
				s.seen[id] = f.idx
				*undo = append(*undo, func() { delete(s.seen, id) })
			}
			d := judged[i]
			if changed[f.key] || d.policy != "" && !d.asked {
				later = append(later, waitingRecord{recordID{f.session, f.idx}, f.key})
				changed[f.key] = true
				continue
			}
			if d.merged && d.effect != conflict.Remove {
				d.version = b.stamp
			}
			decisions = append(decisions, d)
			if d.writes() {
				changed[f.key] = true
			}
		}
		list, later = later.due(asked)
		if err := b.apply(q, decisions, codes, len(list) == 0); err != nil || len(list) == 0 {
			return err
		}
	}
}

func (d *decision) writes() bool {
	return d.effect == conflict.Create || d.effect == conflict.Change || d.effect == conflict.Remove
}

// facts reads what rule D3 needs. A round after the first, and a part of the table, name their records.
func (b *mergeBatch) facts(q *tableSQL, list []recordID, first bool) ([]fact, error) {
	batch := &pgx.Batch{}
	if first {
		batch.Queue("SAVEPOINT ws_table")
	}
	sql, args := q.facts, []any{b.ids}
	if !first || list != nil {
		sessions, idx := columnsOf(list)
		sql, args = q.factsOf, []any{sessions, idx}
	}
	var facts []fact
	batch.Queue(sql, args...).Query(func(rows pgx.Rows) (err error) {
		facts, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (f fact, err error) {
			var key []*string
			err = row.Scan(&f.session, &f.idx, &f.op, &f.unit, &f.bver, &key, &f.version, &f.lw, &f.mver, &f.same, &f.base, &f.from, &f.to)
			f.key = keyString(key)
			return f, err
		})
		return err
	})
	err := b.tx.send(b.ctx, batch)
	return facts, err
}

const releaseTable = "RELEASE SAVEPOINT ws_table"

// decide applies the subset check and rule D3.
func (b *mergeBatch) decide(q *tableSQL, f *fact, allowed map[pair]bool) decision {
	d := decision{fact: f}
	s := b.sessions[f.session]
	sub := b.cat.subscription(s.set, q.table.FullName())
	switch {
	case s.user == protocol.OperatorUser: // bound by no subscription
	case sub == nil:
		d.code, d.detail = protocol.CodeUnknownTable, fmt.Sprintf("table %s is not in the device's subscription set", q.table.FullName())
		return d
	case !sub.Allows(f.op):
		d.code, d.detail = protocol.CodeOperation, fmt.Sprintf("the subscription of %s does not allow devices the operation %s", q.table.FullName(), f.op)
		return d
	}
	if sub != nil && sub.Key != "" {
		inside := func(v *string) bool { return v != nil && allowed[pair{sub, s.user, *v}] }
		// An absent row has no value before, a deleted one none after.
		before := f.version == nil || inside(f.from)
		after := f.op == protocol.Delete || f.op == protocol.Update && f.version == nil || inside(f.to)
		if !before || !after {
			d.code, d.detail = protocol.CodeNotSubscribed, "the row is, or would be, outside the device's subset"
			return d
		}
	}
	effect, reason := conflict.Merge(conflict.Facts{
		Op:        conflict.Op(f.op[0]),
		Exists:    f.version != nil,
		Version:   f.version == nil && f.bver == 0 || f.version != nil && f.bver == *f.version,
		OwnEcho:   f.version != nil && f.lw != nil && *f.lw == s.incarnation && f.bver != 0 && f.bver == *f.mver,
		SameImage: f.same,
		OldEpoch:  s.epoch == "" && f.bver != 0,
		BaseImage: f.base,
	})
	d.effect = effect
	switch effect {
	case conflict.Reject:
		d.code, d.detail = protocol.Code(reason), reasons[reason]
		if sub != nil && s.user != protocol.OperatorUser {
			if p, _ := sub.policyOf(f.op); p != conflict.RejectClash {
				d.policy = p
			}
		}
	case conflict.Create, conflict.Change:
		d.version = b.stamp
	case conflict.Nothing:
		if f.version != nil && f.op != protocol.Delete {
			d.version = *f.version
		}
	}
	return d
}

var reasons = map[conflict.Reason]string{
	conflict.Stale:      "the row has changed since the version that the edit was made on",
	conflict.RowDeleted: "the row that was edited no longer exists",
	conflict.RowExists:  "another row with this key exists already",

	conflict.Yields:          "what stands there wins",
	conflict.FunctionRefuses: "the function that decides about conflicts refused the change",
	conflict.FunctionFails:   "the function that decides about conflicts failed",
}

// apply writes the decisions: the ledger first, which keeps the old images, then the mirror rows. last tells that the table has no more.
func (b *mergeBatch) apply(q *tableSQL, decisions []decision, codes map[string]int, last bool) error {
	n := len(decisions)
	if n == 0 {
		if last {
			_, err := b.tx.Exec(b.ctx, releaseTable)
			return err
		}
		return nil
	}
	sessions, idx, versions := make([]int64, n), make([]int, n), make([]int64, n)
	states, why, details := make([]string, n), make([]string, n), make([]string, n)
	policies, resolved := make([]string, n), make([]string, n)
	var bySession [conflict.Nothing + 1][]int64
	var byIdx [conflict.Nothing + 1][]int
	for i, d := range decisions {
		b.judged = append(b.judged, judged{d.fact.session, d.fact.idx, q.table.FullName() + "\x00" + d.fact.key, d.fact.op, d.fact.unit, d.effect, d.code != ""})
		sessions[i], idx[i], versions[i], why[i], details[i] = d.fact.session, d.fact.idx, d.version, string(d.code), d.detail
		if d.code != "" {
			states[i] = protocol.Rejected
			codes[string(d.code)]++
			b.rejected++
			continue
		}
		states[i] = protocol.Merged
		resolved[i] = d.resolved
		if s := b.sessions[d.fact.session]; s.user != protocol.OperatorUser {
			if sub := b.cat.subscription(s.set, q.table.FullName()); sub != nil {
				_, policies[i] = sub.policyOf(d.fact.op)
			}
		}
		b.merged++
		bySession[d.effect], byIdx[d.effect] = append(bySession[d.effect], d.fact.session), append(byIdx[d.effect], d.fact.idx)
	}
	batch := &pgx.Batch{}
	batch.Queue(q.change, sessions, idx, states, versions, why, details, b.stamp, policies, resolved)
	check := func(e conflict.Effect, sql string, args ...any) {
		want := int64(len(byIdx[e]))
		if want == 0 {
			return
		}
		batch.Queue(sql, append([]any{bySession[e], byIdx[e]}, args...)...).Exec(func(tag pgconn.CommandTag) error {
			if tag.RowsAffected() != want {
				return fmt.Errorf("%s changed %d rows of %s, not %d: the mirror was written without its lock", tag, tag.RowsAffected(), q.table.FullName(), want)
			}
			return nil
		})
	}
	check(conflict.Remove, q.delete)
	check(conflict.Change, q.update, b.stamp)
	check(conflict.Create, q.insert, b.stamp)
	if last {
		batch.Queue(releaseTable)
	}
	return b.tx.SendBatch(b.ctx, batch).Close()
}

// pair is a user and a value of a subscription's subset key column.
type pair struct {
	sub         *subscription
	user, value string
}

// subset finds which rows are inside the subsets of the users that changed them (promise I5): one query for each
// subscription, that evaluates each user's keys once.
func (b *mergeBatch) subset(q *tableSQL, facts []fact) (map[pair]bool, error) {
	type question struct {
		asker, values     []string // the pairs
		users, attributes []string
		known             map[string]bool
	}
	questions := map[*subscription]*question{}
	allowed := map[pair]bool{}
	for i := range facts {
		f := &facts[i]
		s := b.sessions[f.session]
		sub := b.cat.subscription(s.set, q.table.FullName())
		if sub == nil || sub.Key == "" {
			continue
		}
		ask := questions[sub]
		if ask == nil {
			ask = &question{known: map[string]bool{}}
			questions[sub] = ask
		}
		for _, v := range []*string{f.from, f.to} {
			if v == nil {
				continue
			}
			p := pair{sub, s.user, *v}
			if _, ok := allowed[p]; ok {
				continue
			}
			allowed[p] = false
			ask.asker, ask.values = append(ask.asker, s.user), append(ask.values, *v)
			if !ask.known[s.user] {
				ask.known[s.user] = true
				ask.users, ask.attributes = append(ask.users, s.user), append(ask.attributes, s.attributes)
			}
		}
	}
	for sub, ask := range questions {
		if len(ask.values) == 0 {
			continue
		}
		inside, err := asReader(b.ctx, b.tx, sub.contains(), ask.asker, ask.values, ask.users, ask.attributes)
		if err != nil {
			return nil, &setError{set: sub.set, table: sub.Table, err: err}
		}
		for _, i := range inside {
			allowed[pair{sub, ask.asker[i-1], ask.values[i-1]}] = true
		}
	}
	return allowed, nil
}

// contains is the query for the numbers of the (user, value) pairs $1, $2 that the subscription contains. $3 and $4 are
// the users and their attributes.
func (s *subscription) contains() string {
	equal := "p.val = x.key"
	if s.LooseKey() {
		equal = "(p.val)::numeric = (x.key)::numeric"
	}
	return `SELECT p.i FROM (
	SELECT u.name, k.key FROM unnest($3::text[], $4::text[]) AS u(name, attributes), LATERAL (` + s.KeyQuery("u.name", "u.attributes") + `) AS k) x
JOIN unnest($1::text[], $2::text[]) WITH ORDINALITY AS p(usr, val, i) ON p.usr = x.name AND ` + equal
}

// asReader runs a definition's query as the role that may read the mirror and nothing else.
func asReader(ctx context.Context, tx interface {
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
}, sql string, args ...any) (found []int64, err error) {
	batch := &pgx.Batch{}
	for _, setting := range readerSettings {
		batch.Queue(setting)
	}
	batch.Queue(sql, args...).Query(func(rows pgx.Rows) error {
		found, err = pgx.CollectRows(rows, pgx.RowTo[int64])
		return err
	})
	batch.Queue("ROLLBACK TO SAVEPOINT ws_reader")
	batch.Queue("RELEASE SAVEPOINT ws_reader")
	err = tx.SendBatch(ctx, batch).Close()
	return found, err
}
