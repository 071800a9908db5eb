package apply

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/internal/sabotage"
)

// outcome of one source transaction. At most one of missed, short and refused is set; none: committed.
type outcome struct {
	missed  map[*upChange]bool // these did not find what they expected
	toll    toll               // or would take something along by a cascade that their author has not seen
	short   *stmt              // inserts of which some found a row; which ones is not known
	refused error              // the database refused one of the changes
	at      *stmt              // by this statement; nil: at the end
}

func (o outcome) committed() bool { return o.missed == nil && o.short == nil && o.refused == nil }

// manner of writing changes.
type manner byte

const (
	together manner = iota // as few statements as possible, each compares what it finds
	alone                  // a group: what it expects is looked at, and locked, before anything is written, since what differs after that is its own doing
)

// mannerOf a transaction that carries these groups only.
func mannerOf(list ...group) manner {
	if len(list) == 1 && len(list[0]) > 1 {
		return alone
	}
	return together
}

// tryOnce carries changes to the source in one transaction, all or none. An error says nothing about the changes: the
// session is to be started again, and finds out what happened.
func (s *upSession) tryOnce(ctx context.Context, list []*upChange, position change.LSN, how manner) (out outcome, err error) {
	stmts, err := plan(list, how)
	if err != nil {
		return out, err
	}
	ids := make([]int64, len(list))
	for i, c := range list {
		ids[i] = c.id
	}
	// The fence is the first row of the transaction: that is how down knows that it is ours (rule R3).
	fence := "seq = $2"
	if sabotage.On(sabotage.DropFence) {
		fence = "seq >= $2"
	}
	b := &pgx.Batch{}
	b.Queue("BEGIN ISOLATION LEVEL READ COMMITTED")
	b.Queue(`UPDATE waystage.progress SET seq = seq + 1, position = $3::text::pg_lsn, carries = $4, worker = $5, at = clock_timestamp()
		WHERE epoch = $1 AND `+fence, s.epoch, s.seq, position.String(), formatCarries(ids), s.u.cfg.Worker)
	out, fenced, err := s.write(ctx, b, stmts, how)
	if err == nil && !fenced && out.committed() {
		_, err = s.source.Exec(context.WithoutCancel(ctx), "COMMIT")
		if err == nil {
			s.seq++
			return out, nil
		}
		if s.source.IsClosed() || s.source.PgConn().TxStatus() != 'I' {
			return out, fmt.Errorf("commit at the source: %w", err) // whether it is there, the next session sees
		}
	}
	if !s.source.IsClosed() && s.source.PgConn().TxStatus() != 'I' {
		if _, rerr := s.source.Exec(context.WithoutCancel(ctx), "ROLLBACK"); rerr != nil {
			return out, fmt.Errorf("roll back at the source: %w", rerr)
		}
	}
	switch {
	case fenced:
		return out, fmt.Errorf("%w: the source's progress is no longer at seq %d", errFenced, s.seq)
	case err == nil:
		return out, nil
	}
	if _, ok := refusalOf(err); ok && len(list) > 0 {
		if out.missed != nil { // it may be for that
			return outcome{missed: out.missed, toll: out.toll}, nil
		}
		return outcome{refused: err, at: out.at}, nil
	}
	// A statement that the source does not even take: one change of the table is enough to stop it by.
	var f *fault
	if len(list) > 0 && !errors.As(err, &f) && errors.As(sourceFault(list[0].t.table, err), &f) {
		return outcome{refused: err, at: out.at}, nil
	}
	return out, fmt.Errorf("write to the source: %w", err)
}

// write sends what opens the transaction, and the statements. Before a statement that deletes rows which others hang on, it looks
// at what goes with them; for a group before anything is written, since what differs after that is its own doing.
func (s *upSession) write(ctx context.Context, b *pgx.Batch, stmts []*stmt, how manner) (out outcome, fenced bool, err error) {
	guarded := func(st *stmt) bool {
		return (st.f == formDelete || st.f == formRemove) && len(st.t.cascades) > 0
	}
	looks := func(st *stmt) bool { return st.at.round < 0 }
	var done []*stmt
	for opened := false; ; opened = true {
		rest := stmts[len(done):]
		n := 0
		switch {
		case how == alone && opened: // all is looked at
			n = len(rest)
		case how == alone && slices.ContainsFunc(rest, guarded):
			for n < len(rest) && looks(rest[n]) {
				n++
			}
		default:
			for n < len(rest) && (n == 0 && opened || !guarded(rest[n])) {
				n++
			}
		}
		for _, st := range rest[:n] {
			b.Queue(st.t.statement(st.f, st.cols), st.args()...)
		}
		res := s.source.SendBatch(ctx, b)
		fenced, err = s.results(res, rest[:n], opened, &out)
		if cerr := res.Close(); err == nil {
			err = cerr
		}
		done, rest = stmts[:len(done)+n], rest[n:]
		if err != nil || fenced || len(rest) == 0 || !out.committed() {
			return out, fenced, err
		}
		if how != alone {
			rest = rest[:1]
		}
		var list []victim
		for _, st := range rest {
			if !guarded(st) {
				continue
			}
			more, err := s.victims(ctx, st)
			if err != nil {
				return out, false, fmt.Errorf("look for rows that a cascade takes: %w", err)
			}
			list = append(list, more...)
		}
		if out.toll, err = s.judge(ctx, list, done); err != nil {
			return out, false, err
		}
		if len(out.toll.refused)+len(out.toll.unclear) > 0 {
			out.missed = map[*upChange]bool{}
			for c := range out.toll.refused {
				out.missed[c] = true
			}
			for c := range out.toll.unclear {
				out.missed[c] = true
			}
			return out, false, nil
		}
		b = &pgx.Batch{}
	}
}

// results reads the answers of a transaction that is still open; opened: its first two were read before.
func (s *upSession) results(res pgx.BatchResults, stmts []*stmt, opened bool, out *outcome) (fenced bool, err error) {
	if !opened {
		if _, err := res.Exec(); err != nil {
			return false, err
		}
		tag, err := res.Exec()
		if err != nil {
			return false, err
		}
		if tag.RowsAffected() != 1 {
			return true, nil
		}
	}
	for _, st := range stmts {
		out.at = st
		if st.f == formInsert || st.f == formRemove {
			tag, err := res.Exec()
			if err != nil {
				return false, sourceFault(st.t.table, err)
			}
			if st.f == formInsert && int(tag.RowsAffected()) != len(st.list) && out.committed() {
				out.short = st
			}
			continue
		}
		rows, err := res.Query()
		if err != nil {
			return false, sourceFault(st.t.table, err)
		}
		named := make([]bool, len(st.list))
		var i int64
		if _, err := pgx.ForEachRow(rows, []any{&i}, func() error { named[i-1] = true; return nil }); err != nil {
			return false, sourceFault(st.t.table, err)
		}
		for r, c := range st.list {
			if named[r] == (st.f == formGone) { // a hit is named, except by formGone
				if out.missed == nil {
					out.missed = map[*upChange]bool{}
				}
				out.missed[c] = true
			}
		}
	}
	out.at = nil
	return false, nil
}

// process decides changes, in order. The last transaction moves the source's position to end.
func (s *upSession) process(ctx context.Context, list []*upChange, end change.LSN) error {
	if len(list) == 0 {
		return nil
	}
	if len(list) > 1 && len(s.refused) == 0 && !s.misfits { // the common case needs no groups
		out, err := s.try(ctx, list, end, together)
		if err != nil {
			return err
		}
		if out.committed() {
			s.accepted(list)
			return nil
		}
		return s.split(ctx, groups(list), out, end)
	}
	return s.decide(ctx, groups(list), end)
}

func (s *upSession) accepted(list []*upChange) {
	s.u.state.with(func(st *Stats) { st.Accepted += uint64(len(list)) })
	for _, c := range list {
		for _, id := range c.links().makes {
			delete(s.refused, id)
		}
	}
}

// decide decides groups, in order.
func (s *upSession) decide(ctx context.Context, list []group, end change.LSN) error {
	if len(list) == 0 {
		return nil
	}
	if len(s.refused) > 0 || s.misfits {
		for i, g := range list {
			c, why, err := s.dependsOn(ctx, g)
			if err != nil {
				return err
			}
			if c == nil {
				continue
			}
			// It falls, but not before those that come before it: they may be changes of the same row.
			if err := s.decide(ctx, list[:i], s.position); err != nil {
				return err
			}
			if err := s.refuse(ctx, g, c, why); err != nil {
				return err
			}
			return s.decide(ctx, list[i+1:], end)
		}
	}
	all := flat(list)
	out, err := s.try(ctx, all, end, mannerOf(list...))
	if err != nil {
		return err
	}
	if out.committed() {
		s.accepted(all)
		return nil
	}
	if len(list) == 1 {
		return s.single(ctx, list[0], out, end)
	}
	return s.split(ctx, list, out, end)
}

// split decides groups that failed together in parts.
func (s *upSession) split(ctx context.Context, list []group, out outcome, end change.LSN) (err error) {
	if len(list) == 1 {
		return s.decide(ctx, list, end)
	}
	missed := out.missed
	if out.short != nil {
		if missed, err = s.existing(ctx, out.short); err != nil {
			return err
		}
	}
	if len(missed) == 0 { // unknown which: halve
		half := len(list) / 2
		if err := s.decide(ctx, list[:half], s.position); err != nil {
			return err
		}
		return s.decide(ctx, list[half:], end)
	}
	if some, err := s.resolveTogether(ctx, list, missed); err != nil {
		return err
	} else if some {
		return s.decide(ctx, list, end)
	}
	// Decide those that missed one by one, and what is between them as sets, all in their order.
	from := 0
	for i, g := range list {
		if !slices.ContainsFunc(g, func(c *upChange) bool { return missed[c] }) {
			continue
		}
		if err := s.decide(ctx, list[from:i], s.position); err != nil {
			return err
		}
		if err := s.decide(ctx, list[i:i+1], s.position); err != nil {
			return err
		}
		from = i + 1
	}
	return s.decide(ctx, list[from:], end)
}

// existing finds the inserts of a statement whose key the source has.
func (s *upSession) existing(ctx context.Context, st *stmt) (map[*upChange]bool, error) {
	rows, err := s.source.Query(ctx, st.t.statement(formGone, nil), st.t.keyArrays(len(st.list), func(r int) []string { return st.list[r].key })...)
	if err != nil {
		return nil, fmt.Errorf("look for rows of %s: %w", st.t.FullName(), err)
	}
	out := map[*upChange]bool{}
	var i int64
	_, err = pgx.ForEachRow(rows, []any{&i}, func() error { out[st.list[i-1]] = true; return nil })
	if err != nil {
		return nil, fmt.Errorf("look for rows of %s: %w", st.t.FullName(), err)
	}
	return out, nil
}

// single decides a group that failed alone: all before it are decided, none behind it was tried.
func (s *upSession) single(ctx context.Context, g group, out outcome, end change.LSN) error {
	for {
		if out.committed() {
			s.accepted(g)
			return nil
		}
		if out.refused != nil {
			c, err := s.culprit(ctx, g, out)
			if err != nil {
				return err
			}
			why, ok := refusalOf(out.refused)
			if !ok {
				return sourceFault(c.t.table, out.refused)
			}
			return s.refuseAndGoOn(ctx, g, c, why, end)
		}
		for _, c := range g {
			if why, ok := out.toll.refused[c]; ok {
				return s.refuseAndGoOn(ctx, g, c, why, end)
			}
		}
		missed := out.missed
		if missed == nil { // of some rows that are there by now, those that are not are no worse off for being looked at
			missed = map[*upChange]bool{}
			for _, c := range out.short.list {
				missed[c] = true
			}
		}
		// A failed compare-and-set is not yet a conflict: look at who wrote what is there (rule R4).
		if err := s.barrier(ctx); err != nil {
			return err
		}
		c, why, err := s.reconsider(ctx, g, missed, out.toll.unclear)
		if err != nil {
			return err
		}
		if c != nil {
			return s.refuseAndGoOn(ctx, g, c, why, end)
		}
		if out, err = s.try(ctx, g, end, mannerOf(g)); err != nil {
			return err
		}
	}
}

// refuseAndGoOn refuses a change of a group with all that fall with it, and decides the others, if any stand.
func (s *upSession) refuseAndGoOn(ctx context.Context, g group, c *upChange, why refusal, end change.LSN) error {
	rest, err := s.refuseIn(ctx, g, c, why)
	if err != nil {
		return err
	}
	return s.decide(ctx, groups(rest), end)
}

// reconsider looks at base after a barrier: it gives changes that missed another expectation, or names one that is to be refused.
// What was unclear about the victims of a delete is looked at again by the next try.
func (s *upSession) reconsider(ctx context.Context, g group, missed map[*upChange]bool, unclear map[*upChange]refusal) (bad *upChange, why refusal, err error) {
	tx, err := s.mirror.Begin(ctx)
	if err != nil {
		return nil, why, fmt.Errorf("read base: %w", err)
	}
	defer rollback(tx)
	if err := s.holdTerm(ctx, tx); err != nil {
		return nil, why, err
	}
	// The locks also wait for the changes' own merge to become visible.
	if err := lockTables(ctx, tx, g.tables()); err != nil {
		return nil, why, fmt.Errorf("read base: %w", err)
	}
	resolved := map[*upChange]resolution{}
	for _, c := range g {
		if !missed[c] {
			continue
		}
		if why, ok := unclear[c]; ok {
			if c.rebases >= conflict.MaxRebases {
				return c, why, nil
			}
			c.rebases++
			continue
		}
		base, err := s.base(ctx, tx, c)
		if err != nil {
			return nil, why, err
		}
		res, refused, err := s.reconsiderOne(ctx, tx, c, base)
		if err != nil {
			return nil, why, err
		}
		if refused != nil {
			bad, why = c, *refused
			break
		}
		if res != nil {
			resolved[c] = *res
		}
	}
	return bad, why, noteResolved(ctx, tx, resolved)
}

// reconsiderOne does it for one change: a refusal, or another expectation, which by its policy may be that of somebody else's image.
func (s *upSession) reconsiderOne(ctx context.Context, tx pgx.Tx, c *upChange, base baseRow) (_ *resolution, _ *refusal, err error) {
	if c.op == conflict.Delete && base.img == nil && c.rebases < conflict.MaxRebases {
		// What the change wants is so already, whoever did it. The next try makes sure.
		c.expect = nil
		c.rebases++
		return nil, nil, nil
	}
	var res *resolution
	var effect conflict.Effect
	var why refusal
	reason := conflict.Source
	if c.policy.Policy != "" && conflict.Met(base.writer, base.refused, c.rebases) {
		var r resolution
		if effect, why, r, err = s.resolve(ctx, tx, c, base.img); err != nil {
			return nil, nil, err
		}
		res, reason = &r, conflict.Reason(why.code)
	}
	attempt, reason := conflict.Reconsider(base.writer, base.refused, c.rebases, effect, reason)
	if attempt == conflict.Rebase {
		c.expect = c.t.json(base.img)
		c.rebases++
		s.u.state.with(func(st *Stats) { st.Rebased++ })
		if res != nil && res.Wrote != nil {
			c.op, c.img = res.op, res.img
		}
		return res, nil, nil
	}
	if res == nil {
		why = c.conflicting(reason)
	}
	if base.writer == conflict.Initial {
		expected, err := c.t.image(c.expect)
		if err != nil {
			return nil, nil, err
		}
		if equalImages(expected, base.img) {
			if why, err = s.suppressed(ctx, c); err != nil {
				return nil, nil, err
			}
		}
	}
	return nil, &why, nil
}

// base reads the base of a change's key in the mirror: its row or, without one, the old image of the first change that has no
// verdict.
func (s *upSession) base(ctx context.Context, tx querier, c *upChange) (baseRow, error) {
	keys := [][]string{c.key}
	at, err := c.t.standings(ctx, tx, keys)
	if err != nil {
		return baseRow{}, err
	}
	rows, err := c.t.baseImages(ctx, tx, keys, []int64{firstOf(c, at[0])})
	if err != nil {
		return baseRow{}, err
	}
	return rows[0], nil
}

// firstOf is the first change without a verdict of a change's key.
func firstOf(c *upChange, at standing) int64 {
	if at.first > 0 {
		return min(c.id, at.first)
	}
	return c.id
}

func equalImages(a, b image) bool {
	if (a == nil) != (b == nil) || len(a) != len(b) {
		return false
	}
	for i := range a {
		if (a[i] == nil) != (b[i] == nil) || (a[i] != nil && *a[i] != *b[i]) {
			return false
		}
	}
	return true
}
