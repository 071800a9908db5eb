package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/schema"
)

// image is a row: PostgreSQL text by column, nil for NULL; a nil image is an absent row.
type image []*string

func (a image) equal(b image) bool {
	if (a == nil) != (b == nil) {
		return false
	}
	for i := range a {
		if !same(a[i], b[i]) {
			return false
		}
	}
	return true
}

func same(a, b *string) bool { return a == b || a != nil && b != nil && *a == *b }

// found is a row as a side has it.
type found struct {
	img     image
	print   string // another one when the row was written in between, even if it looks the same again
	pending bool
}

const (
	perRecheck = 500 // keys looked at together
	mostRounds = 8   // looks at a key that keeps changing
	confirmed  = 2   // looks in a row that must find the same difference
)

// recheck decides the suspects: equal by now, different for good, or undecided.
func (c *comparison) recheck(ctx context.Context, suspects map[string][]string, rep *TableReport) error {
	ids := slices.Sorted(maps.Keys(suspects))
	for len(ids) > 0 {
		part := ids[:min(len(ids), perRecheck)]
		ids = ids[len(part):]
		if err := c.decide(ctx, part, suspects, rep); err != nil {
			return err
		}
		if rep.Different >= int64(c.o.Most) && len(ids) > 0 {
			rep.More = true
			break
		}
	}
	slices.SortFunc(rep.Rows, func(a, b Row) int { return slices.Compare(a.Key, b.Key) })
	return nil
}

func (c *comparison) decide(ctx context.Context, ids []string, suspects map[string][]string, rep *TableReport) error {
	keys := func() [][]string {
		out := make([][]string, len(ids))
		for i, id := range ids {
			out[i] = suspects[id]
		}
		return out
	}
	// At first without waiting for anything: most of what was on its way has arrived by now.
	before, _, err := c.sourceRows(ctx, keys())
	if err != nil {
		return err
	}
	expected, err := c.expected(ctx, keys())
	if err != nil {
		return err
	}
	var left []string
	for i, id := range ids {
		if before[i].img.equal(expected[i].img) {
			rep.InFlight++
		} else {
			left = append(left, id)
		}
	}
	ids = left
	type sight struct {
		print  string
		mirror image
		times  int
	}
	seen := map[string]sight{}
	for round := 1; len(ids) > 0; round++ {
		if round > mostRounds {
			rep.Undecided += int64(len(ids))
			return nil
		}
		if round > 1 {
			if err := sleep(ctx, time.Duration(round)*50*time.Millisecond); err != nil {
				return err
			}
		}
		before, position, err := c.sourceRows(ctx, keys())
		if err != nil {
			return err
		}
		if err := c.pass(ctx, position); err != nil {
			rep.Undecided += int64(len(ids))
			return err
		}
		expected, err := c.expected(ctx, keys())
		if err != nil {
			return err
		}
		// What the mirror has may come from a transaction that is in the source's log and not visible there yet.
		ended, err := c.fence(ctx)
		if err != nil {
			return err
		}
		after, _, err := c.sourceRows(ctx, keys())
		if err != nil {
			return err
		}
		left = nil
		for i, id := range ids {
			m := expected[i]
			if m.img.equal(before[i].img) || m.img.equal(after[i].img) {
				rep.InFlight++
				continue
			}
			s := seen[id]
			switch {
			case !ended || before[i].print != after[i].print:
				s = sight{}
			case s.times > 0 && s.print == after[i].print && s.mirror.equal(m.img):
				s.times++
			default:
				s = sight{after[i].print, m.img, 1}
			}
			seen[id] = s
			if s.times < confirmed {
				left = append(left, id)
				continue
			}
			rep.Different++
			if len(rep.Rows) < c.o.Most {
				rep.Rows = append(rep.Rows, c.row(suspects[id], after[i].img, m))
			}
		}
		ids = left
	}
	return nil
}

// row describes a difference.
func (c *comparison) row(key []string, source image, mirror found) Row {
	r := Row{Kind: ValuesDiffer, Key: key, Pending: mirror.pending, Columns: []Column{}}
	switch {
	case source == nil:
		r.Kind = MissingInSource
	case mirror.img == nil:
		r.Kind = MissingInMirror
	}
	for i, col := range c.t.Columns {
		d := Column{Name: col.Name}
		if source != nil {
			d.Source = source[i]
		}
		if mirror.img != nil {
			d.Mirror = mirror.img[i]
		}
		if r.Kind != ValuesDiffer || !same(d.Source, d.Mirror) {
			r.Columns = append(r.Columns, d)
		}
	}
	return r
}

// sourceRows reads rows by key, and a position of the source at which all that was read is in the log.
func (c *comparison) sourceRows(ctx context.Context, keys [][]string) (rows []found, position string, err error) {
	err = c.read(ctx, &c.source, func(tx pgx.Tx) error {
		if rows, err = c.rows(ctx, tx, &c.source, keys); err != nil {
			return err
		}
		return tx.QueryRow(ctx, `SELECT (CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() ELSE pg_catalog.pg_current_wal_insert_lsn() END)::text`).Scan(&position)
	})
	return rows, position, err
}

// rows reads rows by key; what is not there is an absent row.
func (c *comparison) rows(ctx context.Context, tx pgx.Tx, s *side, keys [][]string) ([]found, error) {
	var names, match []string
	for j, i := range c.key {
		names = append(names, fmt.Sprintf("c%d", j))
		match = append(match, fmt.Sprintf("m.%s = u.c%d::%s", schema.Quote(c.t.Columns[i].Name), j, s.types[i]))
	}
	u := "unnest(" + textArrays(len(names)) + ") WITH ORDINALITY AS u(" + strings.Join(names, ", ") + ", i)"
	out, err := c.fetch(ctx, tx, u+" JOIN "+s.from+" ON "+strings.Join(match, " AND "), keys)
	if err == nil || !pgerr.Is(err, "22P02", "22003", "22007", "22008", "42883", "22023") {
		return out, err
	}
	// A key of one side that the other side's type does not take: compare the texts, which no index helps with.
	match = match[:0]
	for j, i := range c.key {
		col := schema.Quote(c.t.Columns[i].Name)
		match = append(match, fmt.Sprintf(`pg_catalog.concat(m.%s) COLLATE "C" = u.c%d COLLATE "C"`, col, j))
	}
	return c.fetch(ctx, tx, u+" JOIN "+s.from+" ON "+strings.Join(match, " AND "), keys)
}

func textArrays(n int) string {
	var args []string
	for i := range n {
		args = append(args, fmt.Sprintf("$%d::text[]", i+1))
	}
	return strings.Join(args, ", ")
}

func keyArgs(keys [][]string, n int) []any {
	args := []any{pgx.QueryExecModeExec, pgx.QueryResultFormats{pgx.TextFormatCode}}
	for j := range n {
		col := make([]string, len(keys))
		for i, k := range keys {
			col[i] = k[j]
		}
		args = append(args, col)
	}
	return args
}

// fetch reads the rows that a FROM item joins to the numbered keys.
func (c *comparison) fetch(ctx context.Context, tx pgx.Tx, from string, keys [][]string) (out []found, err error) {
	var cols []string
	for _, col := range c.t.Columns {
		cols = append(cols, "m."+schema.Quote(col.Name))
	}
	inner, err := tx.Begin(ctx) // a key that the type does not take must not end the transaction
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, inner.Rollback(context.WithoutCancel(ctx)))
		} else {
			err = inner.Commit(ctx)
		}
	}()
	rows, err := inner.Query(ctx, "SELECT u.i, m.tableoid::text || m.ctid::text || m.xmin::text, "+strings.Join(cols, ", ")+" FROM "+from, keyArgs(keys, len(c.key))...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out = make([]found, len(keys))
	for rows.Next() {
		raw := rows.RawValues()
		var i int
		if _, err := fmt.Sscan(string(raw[0]), &i); err != nil {
			return nil, err
		}
		f := found{print: string(raw[1]), img: make(image, len(cols))}
		for j, v := range raw[2:] {
			if v != nil {
				text := string(v)
				f.img[j] = &text
			}
		}
		out[i-1] = f
	}
	return out, rows.Err()
}

// expected reads what the mirror holds the source's rows to be: base where changes are pending (rule R2), else the row.
func (c *comparison) expected(ctx context.Context, keys [][]string) (out []found, err error) {
	var names []string
	for j := range c.key {
		names = append(names, fmt.Sprintf("c%d", j))
	}
	sql := fmt.Sprintf(`SELECT u.i, CASE WHEN b.tbl IS NOT NULL THEN b.img ELSE p.old END::text
		FROM unnest(%s) WITH ORDINALITY AS u(%s, i)
		LEFT JOIN LATERAL (SELECT c.id, c.old FROM waystage.change AS c WHERE c.state = 'merged' AND c.tbl = %d AND c.key = ARRAY[u.%[4]s] ORDER BY c.id LIMIT 1) AS p ON true
		LEFT JOIN waystage.base AS b ON b.tbl = %[3]d AND b.key = ARRAY[u.%[4]s]
		WHERE p.id IS NOT NULL OR b.tbl IS NOT NULL`, textArrays(len(names)), strings.Join(names, ", "), c.t.ID, strings.Join(names, ", u."))
	err = c.read(ctx, &c.mirror, func(tx pgx.Tx) error {
		if out, err = c.rows(ctx, tx, &c.mirror, keys); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, sql, keyArgs(keys, len(c.key))...)
		if err != nil {
			return err
		}
		var i int
		var text *string
		_, err = pgx.ForEachRow(rows, []any{&i, &text}, func() error {
			f := found{pending: true}
			if text != nil {
				var vals map[string]*string
				if err := json.Unmarshal([]byte(*text), &vals); err != nil {
					return fmt.Errorf("base image: %w", err)
				}
				for _, col := range c.t.Columns {
					f.img = append(f.img, vals[col.Name])
				}
			}
			out[i-1] = f
			return nil
		})
		return err
	})
	return out, err
}

// pendingKeys are keys whose mirror row is not what the buckets should have seen. A great many of them are not all looked at.
func (c *comparison) pendingKeys(ctx context.Context) (map[string][]string, error) {
	out := map[string][]string{}
	err := c.read(ctx, &c.mirror, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `SELECT key FROM waystage.base WHERE tbl = $1 UNION SELECT key FROM waystage.change WHERE tbl = $1 AND state = 'merged' LIMIT 5000`, c.t.ID)
		if err != nil {
			return err
		}
		keys, err := pgx.CollectRows(rows, pgx.RowTo[[]string])
		for _, k := range keys {
			if len(k) == len(c.key) {
				out[keyID(k)] = k
			}
		}
		return err
	})
	return out, err
}

// progress counts rows of both sides.
type progress struct {
	c     *comparison
	mu    sync.Mutex
	done  int64
	total int64
}

func (p *progress) add(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += n
	p.c.o.Progress(Progress{Table: p.c.t.FullName(), Done: p.done, Total: max(p.total, p.done)})
}
