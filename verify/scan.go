package verify

import (
	"context"
	"fmt"
	"math/bits"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/schema"
)

// side is one server's copy of a table.
type side struct {
	name  string // "source" or "mirror"
	db    *pgxpool.Pool
	from  string // FROM item with alias m
	types []string
	pages int64 // blocks of the largest part
	rows  int64 // estimate
}

// comparison of one table.
type comparison struct {
	*run
	t       *schema.Table
	key     []int  // places of the key columns
	keyText string // SQL: the key of row m as one text
	rowText string // SQL: all columns of row m as one text
	source  side
	mirror  side
}

// read is how every transaction begins: short, read-only, waiting for nobody, and refusing to see half a table.
func (r *run) read(ctx context.Context, s *side, do func(pgx.Tx) error) error {
	begin := fmt.Sprintf(`BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL statement_timeout = %d; SET LOCAL lock_timeout = 2000;
		SET LOCAL row_security = off; SET LOCAL max_parallel_workers_per_gather = 0; SET LOCAL jit = off; SET LOCAL synchronize_seqscans = off`, r.o.Timeout.Milliseconds())
	err := pgx.BeginTxFunc(ctx, s.db, pgx.TxOptions{BeginQuery: begin}, do)
	if err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	return nil
}

func (r *run) comparison(ctx context.Context, t *schema.Table) (*comparison, error) {
	c := &comparison{run: r, t: t}
	var all, keys []string
	for _, col := range t.Columns {
		all = append(all, "m."+schema.Quote(col.Name))
		c.source.types = append(c.source.types, col.Type)
		c.mirror.types = append(c.mirror.types, col.MirrorType)
	}
	for _, k := range t.Key {
		for i, col := range t.Columns {
			if col.Name == k {
				c.key = append(c.key, i)
				keys = append(keys, all[i])
			}
		}
	}
	// The text of a record is made by the columns' output functions, which is what change data and devices get.
	c.keyText, c.rowText = "ROW("+strings.Join(keys, ", ")+")::pg_catalog.text", "ROW("+strings.Join(all, ", ")+")::pg_catalog.text"
	c.source.name, c.source.db = "source", r.o.Source
	c.mirror.name, c.mirror.db = "mirror", r.o.Mirror
	for _, s := range []*side{&c.source, &c.mirror} {
		// A partitioned table is read in the same ranges of blocks of all its partitions.
		err := r.read(ctx, s, func(tx pgx.Tx) error {
			var parts bool
			err := tx.QueryRow(ctx, `SELECT c.relkind = 'p',
				(SELECT coalesce(max(pg_catalog.pg_relation_size(p.relid)), 0) / pg_catalog.current_setting('block_size')::bigint FROM pg_catalog.pg_partition_tree(c.oid) AS p WHERE p.isleaf),
				(SELECT coalesce(sum(greatest(l.reltuples, 0)), 0)::bigint FROM pg_catalog.pg_partition_tree(c.oid) AS p JOIN pg_catalog.pg_class AS l ON l.oid = p.relid WHERE p.isleaf)
				FROM pg_catalog.pg_class AS c WHERE c.oid = $1::text::regclass`, t.Ident()).Scan(&parts, &s.pages, &s.rows)
			if s.from = t.Ident() + " AS m"; !parts {
				s.from = "ONLY " + s.from
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	if c.source.rows == 0 { // never analysed
		c.source.rows = c.mirror.rows
	}
	if c.mirror.rows == 0 {
		c.mirror.rows = c.source.rows
	}
	return c, nil
}

// bucket is what a side has in one bucket of keys; order does not matter to it.
type bucket struct {
	n   int64
	sum int64 // exclusive or of the rows' hashes
}

// perBucket is how many rows a bucket has, about: what has to be listed for one row that differs.
const (
	perBucket  = 64
	mostBits   = 17      // buckets: two to the power of this
	mostListed = 300_000 // rows listed at a time
)

// scan reads both sides once into buckets, and lists the keys of those that differ. What it returns may well be only on its
// way; what it does not return is equal.
func (c *comparison) scan(ctx context.Context, rep *TableReport) (map[string][]string, error) {
	n := 1 << min(max(bits.Len64(uint64(max(c.source.rows, c.mirror.rows)/perBucket)), 6), mostBits)
	var sums [2][]bucket
	read := progress{c: c, total: c.source.rows + c.mirror.rows}
	g, gctx := errgroup.WithContext(ctx)
	for i, s := range []*side{&c.source, &c.mirror} {
		sums[i] = make([]bucket, n)
		g.Go(func() error {
			sql := fmt.Sprintf(`SELECT b, count(*), bit_xor(h) FROM (SELECT %s & %d AS b, %s AS h FROM %s WHERE %s) AS x GROUP BY b`,
				c.hash(c.keyText), n-1, c.hash(c.rowText), s.from, here)
			return c.chunks(gctx, s, sql, nil, func(rows pgx.Rows) (seen int64, err error) {
				var b int
				var one bucket
				_, err = pgx.ForEachRow(rows, []any{&b, &one.n, &one.sum}, func() error {
					sums[i][b].n += one.n
					sums[i][b].sum ^= one.sum
					seen += one.n
					return nil
				})
				return seen, err
			}, read.add)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	rep.SourceRows, rep.MirrorRows = 0, 0
	var differ []int64
	for b := range n {
		rep.SourceRows += sums[0][b].n
		rep.MirrorRows += sums[1][b].n
		if sums[0][b] != sums[1][b] {
			differ = append(differ, int64(b))
		}
	}
	suspects := map[string][]string{}
	for len(differ) > 0 && len(suspects) < mostListed {
		size, k := int64(0), 0
		for k < len(differ) && (k == 0 || size < mostListed) {
			size += max(sums[0][differ[k]].n, sums[1][differ[k]].n)
			k++
		}
		if err := c.list(ctx, n, differ[:k], suspects); err != nil {
			return nil, err
		}
		differ = differ[k:]
	}
	rep.More = len(differ) > 0
	return suspects, nil
}

// list reads the keys and hashes of the rows in some buckets, and adds the keys that do not have the same on both sides.
func (c *comparison) list(ctx context.Context, n int, buckets []int64, suspects map[string][]string) error {
	type entry struct {
		key []string
		sum string
	}
	var found [2]map[string]entry
	g, gctx := errgroup.WithContext(ctx)
	var cols []string
	for _, i := range c.key {
		cols = append(cols, "m."+schema.Quote(c.t.Columns[i].Name))
	}
	for i, s := range []*side{&c.source, &c.mirror} {
		found[i] = map[string]entry{}
		g.Go(func() error {
			sql := fmt.Sprintf("SELECT %s, %s FROM %s WHERE %s AND (%s & %d) = ANY ($1::bigint[])", c.hash(c.rowText), strings.Join(cols, ", "), s.from, here, c.hash(c.keyText), n-1)
			return c.chunks(gctx, s, sql, []any{buckets}, func(rows pgx.Rows) (seen int64, err error) {
				defer rows.Close()
				for rows.Next() {
					raw := rows.RawValues()
					e := entry{sum: string(raw[0])}
					for _, v := range raw[1:] {
						e.key = append(e.key, string(v))
					}
					id := keyID(e.key)
					if was, ok := found[i][id]; ok && was.sum != e.sum { // it moved while we read
						e.sum = "moved"
					}
					found[i][id] = e
					seen++
				}
				return seen, rows.Err()
			}, func(int64) {})
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for id, e := range found[0] {
		if o, ok := found[1][id]; !ok || o.sum != e.sum || e.sum == "moved" {
			suspects[id] = e.key
		}
	}
	for id, e := range found[1] {
		if _, ok := found[0][id]; !ok {
			suspects[id] = e.key
		}
	}
	return nil
}

// keyID is a key as a map key.
func keyID(key []string) string {
	var b strings.Builder
	for _, k := range key {
		fmt.Fprintf(&b, "%d:%s", len(k), k)
	}
	return b.String()
}

// here stands in a statement for the condition on blocks. No name contains it: names have no zero bytes.
const here = "\x00blocks\x00"

// chunks runs a statement on one range of blocks after the other, each in a snapshot of its own: nothing is held open for
// long. Rows that move to another block meanwhile show as differences, which the second look settles. sql says by here
// where the range's condition stands.
func (c *comparison) chunks(ctx context.Context, s *side, sql string, args []any, take func(pgx.Rows) (int64, error), done func(int64)) error {
	perPage := max(s.rows/max(s.pages, 1), 1)
	step := max(int64(c.o.Chunk)/perPage, 1)
	for at, failures := int64(0), 0; at == 0 || at < s.pages; {
		where := fmt.Sprintf("m.ctid >= '(%d,0)'::tid", at)
		if at+step < s.pages { // the last one has no end: the table may have grown
			where += fmt.Sprintf(" AND m.ctid < '(%d,0)'::tid", at+step)
		}
		var seen int64
		began := time.Now()
		err := c.read(ctx, s, func(tx pgx.Tx) error {
			rows, err := tx.Query(ctx, strings.Replace(sql, here, where, 1), append([]any{pgx.QueryExecModeExec, pgx.QueryResultFormats{pgx.TextFormatCode}}, args...)...)
			if err != nil {
				return err
			}
			seen, err = take(rows)
			return err
		})
		if err != nil {
			// The timeout was ours, or a lock is held: fewer rows, a little later. Nothing was taken: the statements aggregate or fail before
			// their first row as a rule, and a bucket that was counted in part only shows as different.
			if failures++; failures > 6 || !pgerr.Is(err, "57014", "55P03") || ctx.Err() != nil {
				return err
			}
			step = max(step/4, 1)
			if err := sleep(ctx, 500*time.Millisecond); err != nil {
				return err
			}
			continue
		}
		failures = 0
		at += step
		done(seen)
		pause := c.o.Pause
		if c.o.Rate > 0 {
			pause = max(pause, time.Duration(float64(seen)/float64(c.o.Rate)*float64(time.Second))-time.Since(began))
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
