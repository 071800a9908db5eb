package apply

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/internal/sabotage"
)

// outcome of one source transaction. At most one field is set; none: committed.
type outcome struct {
	missed  map[*upChange]bool // these did not find what they expected
	short   *unit              // inserts of which some found a row; which ones is not known
	refused error              // the database refused one of the changes
}

func (o outcome) committed() bool { return o.missed == nil && o.short == nil && o.refused == nil }

// try carries changes to the source in one transaction, all or none. An error says nothing about the changes: the
// session is to be started again, and finds out what happened.
func (s *upSession) try(ctx context.Context, list []*upChange, position change.LSN) (out outcome, err error) {
	units, err := plan(list)
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
	for _, un := range units {
		b.Queue(un.t.statement(un.f, un.cols), un.args()...)
	}
	res := s.source.SendBatch(ctx, b)
	out, fenced, err := s.results(res, units)
	if cerr := res.Close(); err == nil {
		err = cerr
	}
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
		return outcome{refused: err}, nil
	}
	// A statement that the source does not even take: one change of the table is enough to stop it by.
	var f *fault
	if len(list) > 0 && !errors.As(err, &f) && errors.As(sourceFault(list[0].t.table, err), &f) {
		return outcome{refused: err}, nil
	}
	return out, fmt.Errorf("write to the source: %w", err)
}

// results reads the answers of a transaction that is still open.
func (s *upSession) results(res pgx.BatchResults, units []*unit) (out outcome, fenced bool, err error) {
	if _, err := res.Exec(); err != nil {
		return out, false, err
	}
	tag, err := res.Exec()
	if err != nil {
		return out, false, err
	}
	if tag.RowsAffected() != 1 {
		return out, true, nil
	}
	for _, un := range units {
		if un.f == formInsert {
			tag, err := res.Exec()
			if err != nil {
				return out, false, sourceFault(un.t.table, err)
			}
			if int(tag.RowsAffected()) != len(un.list) && out.committed() {
				out.short = un
			}
			continue
		}
		rows, err := res.Query()
		if err != nil {
			return out, false, sourceFault(un.t.table, err)
		}
		named := make([]bool, len(un.list))
		var i int64
		if _, err := pgx.ForEachRow(rows, []any{&i}, func() error { named[i-1] = true; return nil }); err != nil {
			return out, false, sourceFault(un.t.table, err)
		}
		for r, c := range un.list {
			if named[r] == (un.f == formGone) { // a hit is named, except by formGone
				if out.missed == nil {
					out.missed = map[*upChange]bool{}
				}
				out.missed[c] = true
			}
		}
	}
	return out, false, nil
}

// process decides changes, in order. The last transaction moves the source's position to end.
func (s *upSession) process(ctx context.Context, list []*upChange, end change.LSN) error {
	if len(list) == 0 {
		return nil
	}
	if len(s.refused) > 0 {
		for i, c := range list {
			why, depends := s.dependsOn(c)
			if !depends {
				continue
			}
			// It falls, but not before those that come before it: they may be changes of the same row.
			if err := s.process(ctx, list[:i], s.position); err != nil {
				return err
			}
			if err := s.refuse(ctx, c, why); err != nil {
				return err
			}
			return s.process(ctx, list[i+1:], end)
		}
	}
	out, err := s.try(ctx, list, end)
	if err != nil {
		return err
	}
	if out.committed() {
		s.u.state.with(func(st *Stats) { st.Accepted += uint64(len(list)) })
		return nil
	}
	if len(list) == 1 {
		return s.single(ctx, list[0], out, end)
	}
	missed := out.missed
	if out.short != nil {
		if missed, err = s.existing(ctx, out.short); err != nil {
			return err
		}
	}
	if len(missed) == 0 { // unknown which: halve
		half := len(list) / 2
		if err := s.process(ctx, list[:half], s.position); err != nil {
			return err
		}
		return s.process(ctx, list[half:], end)
	}
	// Decide those that missed one by one, and what is between them as sets, all in their order.
	from := 0
	for i, c := range list {
		if !missed[c] {
			continue
		}
		if err := s.process(ctx, list[from:i], s.position); err != nil {
			return err
		}
		if err := s.process(ctx, list[i:i+1], s.position); err != nil {
			return err
		}
		from = i + 1
	}
	return s.process(ctx, list[from:], end)
}

// existing finds the inserts of a unit whose key the source has.
func (s *upSession) existing(ctx context.Context, un *unit) (map[*upChange]bool, error) {
	rows, err := s.source.Query(ctx, un.t.statement(formGone, nil), un.t.keyArrays(len(un.list), func(r int) []string { return un.list[r].key })...)
	if err != nil {
		return nil, fmt.Errorf("look for rows of %s: %w", un.t.FullName(), err)
	}
	out := map[*upChange]bool{}
	var i int64
	_, err = pgx.ForEachRow(rows, []any{&i}, func() error { out[un.list[i-1]] = true; return nil })
	if err != nil {
		return nil, fmt.Errorf("look for rows of %s: %w", un.t.FullName(), err)
	}
	return out, nil
}

// single decides a change that failed alone: all before it are decided, none behind it was tried.
func (s *upSession) single(ctx context.Context, c *upChange, out outcome, end change.LSN) error {
	for {
		if out.committed() {
			s.u.state.with(func(st *Stats) { st.Accepted++ })
			return nil
		}
		if out.refused != nil {
			why, ok := refusalOf(out.refused)
			if !ok {
				return sourceFault(c.t.table, out.refused)
			}
			return s.refuse(ctx, c, why)
		}
		// A failed compare-and-set is not yet a conflict: look at who wrote what is there (rule R4).
		if err := s.barrier(ctx); err != nil {
			return err
		}
		refused, err := s.reconsider(ctx, c)
		if err != nil || refused {
			return err
		}
		if out, err = s.try(ctx, []*upChange{c}, end); err != nil {
			return err
		}
	}
}

// reconsider looks at base after a barrier: it gives the change another expectation, or refuses it.
func (s *upSession) reconsider(ctx context.Context, c *upChange) (refused bool, err error) {
	tx, err := s.mirror.Begin(ctx)
	if err != nil {
		return false, fmt.Errorf("read base: %w", err)
	}
	defer rollback(tx)
	if err := s.holdTerm(ctx, tx); err != nil {
		return false, err
	}
	// The lock also waits for the change's own merge to become visible.
	if err := lockTables(ctx, tx, []int{c.t.ID}); err != nil {
		return false, fmt.Errorf("read base: %w", err)
	}
	_, base, err := s.base(ctx, tx, c)
	if err != nil {
		return false, err
	}
	if c.op == conflict.Delete && base.img == nil && c.rebases < conflict.MaxRebases {
		// What the change wants is so already, whoever did it. The next try makes sure.
		c.expect = nil
		c.rebases++
		return false, nil
	}
	attempt, reason := conflict.Retry(base.writer, base.refused, c.rebases)
	if attempt == conflict.Rebase {
		c.expect = c.t.json(base.img)
		c.rebases++
		s.u.state.with(func(st *Stats) { st.Rebased++ })
		return false, nil
	}
	why := c.conflicting(reason)
	if base.writer == conflict.Initial {
		expected, err := c.t.image(c.expect)
		if err != nil {
			return false, err
		}
		if equalImages(expected, base.img) {
			if why, err = s.suppressed(ctx, c); err != nil {
				return false, err
			}
		}
	}
	return true, s.refuseLocked(ctx, tx, c, why)
}

// base reads what stands beside a change's key in the mirror, and the key's base: its row or, without one, the old image of
// the first change that has no verdict.
func (s *upSession) base(ctx context.Context, tx querier, c *upChange) (standing, baseRow, error) {
	keys := [][]string{c.key}
	at, err := c.t.standings(ctx, tx, keys)
	if err != nil {
		return standing{}, baseRow{}, err
	}
	first := c.id
	if n := at[0].first; n > 0 {
		first = min(first, n)
	}
	rows, err := c.t.baseImages(ctx, tx, keys, []int64{first})
	if err != nil {
		return standing{}, baseRow{}, err
	}
	return at[0], rows[0], nil
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
