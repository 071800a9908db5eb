package apply

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/schema"
)

// Codes of refusals; their texts are the protocol's.
const (
	refusedConstraint = "source_constraint"
	refusedTrigger    = "source_trigger"
	refusedConflict   = "source_conflict"
	refusedValue      = "source_value"
	refusedPermission = "source_permission"
	refusedDependency = "dependency_rejected"
)

// refusal says why the source does not have a change.
type refusal struct {
	code, detail, constraint string
}

// refusalOf turns a database's refusal into one; ok is false for an error that says nothing against the change.
func refusalOf(err error) (r refusal, ok bool) {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return r, false
	}
	generated := pg.Code == "428C9" // a value for a column that is GENERATED ALWAYS
	if pgerr.Class(err) != pgerr.Refusal && !generated {
		return r, false
	}
	r.detail, r.constraint = pg.Message, pg.ConstraintName
	// "Failing row contains (...)" would tell the device columns that it is not subscribed to.
	if showsRow := pg.Code == "23514" || pg.Code == "23502" || pg.Code == "44000"; pg.Detail != "" && !showsRow {
		r.detail += ": " + pg.Detail
	}
	switch class := pg.Code[:2]; {
	case class == "23" || class == "44" || pg.Code == "40002":
		r.code = refusedConstraint
	case class == "22" || class == "54" || pg.Code == "42601" || generated:
		r.code = refusedValue
	case pg.Code == "42501":
		r.code = refusedPermission
	default:
		r.code = refusedTrigger
	}
	return r, true
}

// reasons of package conflict as refusals.
func (c *upChange) conflicting(reason conflict.Reason) refusal {
	switch reason {
	case conflict.Dependency:
		return refusal{code: refusedDependency, detail: fmt.Sprintf("the change was made on top of a change of %s that was refused", c.t.FullName())}
	default:
		return refusal{code: refusedConflict, detail: fmt.Sprintf("the row of %s was changed at the source since the change was made", c.t.FullName())}
	}
}

// dependsOn finds a refused insert that the change refers to by a foreign key. The source would refuse the change too,
// or, if somebody else has inserted a row with that key, hang it on a stranger's row.
func (s *upSession) dependsOn(c *upChange) (refusal, bool) {
	if len(s.refused) == 0 || c.op == conflict.Delete {
		return refusal{}, false
	}
	for _, fk := range c.t.Foreign {
		parent := s.byName[fk.Table]
		if parent == nil {
			continue
		}
		key, touched, complete := c.refersTo(fk, parent)
		if !touched || !complete {
			continue
		}
		decided, ok := s.refused[authorKey(parent.ID, keyID(key))]
		// A device that already knew of the refusal means the row that is there now.
		if ok && !c.created.After(decided) {
			return refusal{code: refusedDependency, constraint: fk.Name,
				detail: fmt.Sprintf("the row of %s that the change refers to (%s) was refused", parent.FullName(), strings.Join(key, ", "))}, true
		}
	}
	return refusal{}, false
}

// refersTo is the primary key of the parent row that a change refers to by a foreign key; touched tells whether the change
// writes a column of it, complete whether the key is known and not null.
func (c *upChange) refersTo(fk schema.ForeignKey, parent *table) (key []string, touched, complete bool) {
	if len(fk.Refers) != len(parent.Key) {
		return nil, false, false
	}
	key = make([]string, len(parent.Key))
	for j, name := range parent.Key {
		at := slices.Index(fk.Refers, name)
		if at < 0 || at >= len(fk.Columns) {
			return nil, touched, false
		}
		v, ok := c.img[fk.Columns[at]]
		touched = touched || ok
		if !ok && c.op == conflict.Update && c.old != nil {
			if old, err := jsonValues(*c.old); err == nil {
				v = old[fk.Columns[at]]
			}
		}
		if v == nil {
			return nil, touched, false
		}
		key[j] = *v
	}
	return key, touched, true
}

// recallRefused reads the refused inserts that changes still pending may depend on.
func (s *upSession) recallRefused(ctx context.Context) error {
	rows, err := s.mirror.Query(ctx, `SELECT tbl, key, decided_at FROM waystage.change
		WHERE state = 'refused' AND op = 'I' AND decided_at >= (SELECT min(created_at) FROM waystage.change WHERE state = 'merged')`)
	if err != nil {
		return fmt.Errorf("refused inserts: %w", err)
	}
	var tbl int
	var key []string
	var decided time.Time
	_, err = pgx.ForEachRow(rows, []any{&tbl, &key, &decided}, func() error {
		s.refused[authorKey(tbl, keyID(key))] = decided
		return nil
	})
	if err != nil {
		return fmt.Errorf("refused inserts: %w", err)
	}
	return nil
}

const maxRefused = 10000

// refuse gives a change its verdict in the mirror, and lets the row become base when it was the last one pending.
func (s *upSession) refuse(ctx context.Context, c *upChange, why refusal) error {
	tx, err := s.mirror.Begin(ctx)
	if err != nil {
		return fmt.Errorf("refuse: %w", err)
	}
	defer rollback(tx)
	if err := s.holdTerm(ctx, tx); err != nil {
		return err
	}
	if err := lockTables(ctx, tx, []int{c.t.ID}); err != nil {
		return fmt.Errorf("refuse: %w", err)
	}
	return s.refuseLocked(ctx, tx, c, why)
}

// refuseLocked is refuse in a transaction that holds the term and the table's lock; it commits.
func (s *upSession) refuseLocked(ctx context.Context, tx pgx.Tx, c *upChange, why refusal) error {
	var winner *string
	if why.code == refusedConflict {
		source := "source"
		winner = &source
	}
	var decided time.Time
	err := tx.QueryRow(ctx, `UPDATE waystage.change SET state = 'refused', stamp = pg_current_xact_id()::text::bigint, decided_at = clock_timestamp(),
			code = $2, detail = $3, constraint_name = nullif($4, ''), winner = coalesce($5, winner)
		WHERE id = $1 AND state = 'merged' RETURNING decided_at`, c.id, why.code, clean(why.detail), why.constraint, winner).Scan(&decided)
	if errors.Is(err, pgx.ErrNoRows) {
		return fmt.Errorf("%w: change %d has a verdict already", errFenced, c.id)
	}
	if err != nil {
		return fmt.Errorf("refuse change %d: %w", c.id, err)
	}
	at, base, err := s.base(ctx, tx, c)
	if err != nil {
		return err
	}
	switch {
	case !conflict.Route(int(at.pending)):
		err = c.t.settle(ctx, tx, []settlement{{key: c.key, base: base.img, writer: base.writer, by: base.by}})
		if err == nil && at.hasBase {
			err = c.t.dropBases(ctx, tx, [][]string{c.key})
		}
	default: // without a row, the first pending change's old image was the base until now
		base.refused = true
		err = c.t.putBases(ctx, tx, []baseRow{base})
	}
	if err != nil {
		return err
	}
	if err := commit(ctx, tx); err != nil {
		return fmt.Errorf("refuse change %d: %w", c.id, err)
	}
	s.u.state.with(func(st *Stats) { st.Refused++ })
	if c.op == conflict.Insert {
		if len(s.refused) >= maxRefused {
			for k, at := range s.refused {
				if c.created.Sub(at) > time.Minute { // later changes were made after it
					delete(s.refused, k)
				}
			}
		}
		s.refused[authorKey(c.t.ID, keyID(c.key))] = decided
	}
	return nil
}

// clean makes a server's message fit for a text column.
func clean(s string) string { return strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", ""), "?") }

// suppressed explains a compare-and-set that failed although the source's row is what was expected: what up writes is
// kept from taking effect.
func (s *upSession) suppressed(ctx context.Context, c *upChange) (refusal, error) {
	rows, err := s.source.Query(ctx, c.t.statement(formGone, nil), c.t.keyArrays(1, func(int) []string { return c.key })...)
	if err != nil {
		return refusal{}, err
	}
	visible, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	switch {
	case err != nil:
		return refusal{}, fmt.Errorf("look at a row of %s: %w", c.t.FullName(), err)
	case c.expect != nil && len(visible) == 0:
		return refusal{code: refusedPermission, detail: fmt.Sprintf("row security of %s at the source hides the row from Waystage's role", schema.Quote(c.t.Name))}, nil
	default:
		return refusal{code: refusedTrigger, detail: fmt.Sprintf("a trigger or row security of %s at the source ignores the change without an error", schema.Quote(c.t.Name))}, nil
	}
}
