package apply

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
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
	refusedSchema     = "schema_changed"
	refusedYields     = string(conflict.Yields)
	refusedByFunction = string(conflict.FunctionRefuses)
	refusedFunction   = string(conflict.FunctionFails)
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

// refusedInsert is when and in which mirror transaction an insert was refused.
type refusedInsert struct {
	at    time.Time
	stamp int64
}

// dependsOn finds a change of a group that refers by a foreign key to a refused insert. The source would refuse it too, or, if
// somebody else has inserted such a row, hang it on a stranger's.
func (s *upSession) dependsOn(ctx context.Context, g group) (*upChange, refusal, error) {
	for _, c := range g {
		if c.misfit != "" {
			return c, refusal{code: refusedSchema, detail: c.misfit}, nil
		}
		for _, r := range c.links().refers {
			known, ok := s.refused[r.row]
			if ok && c.created.After(known.at) {
				heard, err := s.heard(ctx, c, known)
				if err != nil {
					return nil, refusal{}, err
				}
				ok = !heard
			}
			if ok {
				return c, refusal{code: refusedDependency, constraint: r.fk.Name,
					detail: fmt.Sprintf("the row of %s that the change refers to (%s) was refused", r.fk.Table, strings.Join(r.key, ", "))}, nil
			}
		}
	}
	return nil, refusal{}, nil
}

// heard tells whether a change's device knew of a refusal when it made its session: then it means the row that is there now. What
// it had been told is what the reply before saw, which it has applied (rule D1).
func (s *upSession) heard(ctx context.Context, c *upChange, r refusedInsert) (heard bool, err error) {
	err = s.mirror.QueryRow(ctx, `SELECT EXISTS (SELECT FROM waystage.session AS s JOIN waystage.session AS p ON p.incarnation = s.incarnation AND p.n = s.n - 1
		WHERE s.id = $1 AND pg_visible_in_snapshot($2::text::xid8, p.told))`, c.session, strconv.FormatInt(r.stamp, 10)).Scan(&heard)
	if err != nil {
		return false, fmt.Errorf("what a device knew: %w", err)
	}
	return heard, nil
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

// recallRefused reads the latest refused inserts, which changes still to come may refer to.
func (s *upSession) recallRefused(ctx context.Context) error {
	rows, err := s.mirror.Query(ctx, `SELECT tbl, key, img::text, decided_at, stamp FROM waystage.change
		WHERE state IN ('rejected', 'refused') AND state = 'refused' AND op = 'I' ORDER BY id DESC LIMIT $1`, maxRefused/2)
	if err != nil {
		return fmt.Errorf("refused inserts: %w", err)
	}
	c := upChange{op: conflict.Insert}
	var tbl int
	var img *string
	var r refusedInsert
	_, err = pgx.ForEachRow(rows, []any{&tbl, &c.key, &img, &r.at, &r.stamp}, func() error {
		one := c
		c.key = nil
		if one.t = s.tables[tbl]; one.t == nil || img == nil || len(one.key) != len(one.t.keys) {
			return nil
		}
		var err error
		if one.img, err = jsonValues(*img); err == nil {
			s.remember(&one, r)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("refused inserts: %w", err)
	}
	return nil
}

// maxRefused bounds how many refused inserts are remembered; the source's foreign keys stand behind the others.
const maxRefused = 20000

func (s *upSession) remember(c *upChange, r refusedInsert) {
	if len(s.refused) >= maxRefused { // the older half goes
		var times []time.Time
		for _, r := range s.refused {
			times = append(times, r.at)
		}
		slices.SortFunc(times, time.Time.Compare)
		for id, r := range s.refused {
			if !r.at.After(times[len(times)/2]) {
				delete(s.refused, id)
			}
		}
	}
	for _, id := range c.links().makes {
		s.refused[id] = r
	}
}

// verdictOf is a change that is refused, and why.
type verdictOf struct {
	c   *upChange
	why refusal
}

// refuseIn refuses a change of a group with all that fall with it, in one transaction, and lets rows become base whose last
// pending change that was. It returns those that stand.
func (s *upSession) refuseIn(ctx context.Context, g group, bad *upChange, why refusal) (rest []*upChange, err error) {
	down, rest := g.falls(bad, why)
	tx, err := s.mirror.Begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("refuse: %w", err)
	}
	defer rollback(tx)
	if err := s.holdTerm(ctx, tx); err != nil {
		return nil, err
	}
	if err := lockTables(ctx, tx, g.tables()); err != nil {
		return nil, fmt.Errorf("refuse: %w", err)
	}
	// From a stop on nothing of the table is settled: the next copy says what its rows are.
	if err := s.sameLayout(ctx, tx); err != nil {
		return nil, err
	}
	n := len(down)
	ids, codes, details, constraints := make([]int64, n), make([]string, n), make([]string, n), make([]string, n)
	byTable := map[*target][]*upChange{}
	byID := map[int64]*upChange{}
	for i, v := range down {
		ids[i], codes[i], details[i], constraints[i] = v.c.id, v.why.code, clean(v.why.detail), v.why.constraint
		byTable[v.c.t] = append(byTable[v.c.t], v.c)
		byID[v.c.id] = v.c
	}
	rows, err := tx.Query(ctx, `UPDATE waystage.change AS c SET state = 'refused', stamp = pg_current_xact_id()::text::bigint, decided_at = clock_timestamp(),
			code = u.code, detail = u.detail, constraint_name = nullif(u.constr, ''), winner = CASE WHEN u.code = ANY ($5) THEN 'source' END, resolved = nullif(c.resolved - 'source', '{}')
		FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[]) AS u(id, code, detail, constr)
		WHERE c.id = u.id AND c.state = 'merged' RETURNING c.id, c.decided_at, c.stamp`, ids, codes, details, constraints,
		[]string{refusedConflict, refusedYields, refusedByFunction, refusedFunction})
	if err != nil {
		return nil, fmt.Errorf("refuse change %d: %w", bad.id, err)
	}
	known := map[*upChange]refusedInsert{}
	var id int64
	var r refusedInsert
	if _, err := pgx.ForEachRow(rows, []any{&id, &r.at, &r.stamp}, func() error { known[byID[id]] = r; return nil }); err != nil {
		return nil, fmt.Errorf("refuse change %d: %w", bad.id, err)
	}
	if len(known) != n {
		return nil, fmt.Errorf("%w: change %d, or one that falls with it, has a verdict already", errFenced, bad.id)
	}
	for t, list := range byTable {
		if err := s.settleRefused(ctx, tx, t, list); err != nil {
			return nil, err
		}
	}
	if err := commit(ctx, tx); err != nil {
		return nil, fmt.Errorf("refuse change %d: %w", bad.id, err)
	}
	s.u.state.with(func(st *Stats) { st.Refused += uint64(n) })
	for c, r := range known {
		if c.op == conflict.Insert {
			s.remember(c, r)
		}
	}
	return rest, nil
}

// settleRefused brings the rows of a table's refused changes in order.
func (s *upSession) settleRefused(ctx context.Context, tx pgx.Tx, t *target, list []*upChange) error {
	var keys [][]string
	var of []*upChange // the first refused one of each key
	seen := map[string]int{}
	for _, c := range list {
		if i, ok := seen[keyID(c.key)]; ok {
			if c.id < of[i].id {
				of[i] = c
			}
			continue
		}
		seen[keyID(c.key)] = len(keys)
		keys, of = append(keys, c.key), append(of, c)
	}
	at, err := t.standings(ctx, tx, keys)
	if err != nil {
		return err
	}
	first := make([]int64, len(keys))
	for i := range keys {
		first[i] = firstOf(of[i], at[i])
	}
	bases, err := t.baseImages(ctx, tx, keys, first)
	if err != nil {
		return err
	}
	var settled []settlement
	var drops [][]string
	var puts []baseRow
	for i, base := range bases {
		if conflict.Route(int(at[i].pending)) {
			base.refused = true // without a row, the first pending change's old image was the base until now
			puts = append(puts, base)
			continue
		}
		settled = append(settled, settlement{key: keys[i], base: base.img, writer: base.writer, by: base.by})
		if at[i].hasBase {
			drops = append(drops, keys[i])
		}
	}
	if err := t.putBases(ctx, tx, puts); err != nil {
		return err
	}
	if err := t.settle(ctx, tx, settled); err != nil {
		return err
	}
	return t.dropBases(ctx, tx, drops)
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
