package schema

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"
)

// copier copies tables from one exported snapshot of the source to the mirror, as text in canonical form that no Go type
// ever touches. The mirror gets it in many short transactions: an open one holds back every device's cursor.
type copier struct {
	*setup
	run      string // fences the chunks, see stillOurs
	snapshot string
	side     bool // into side tables, see sideTable

	mu   sync.Mutex
	done map[*Table]*tally
}

type tally struct {
	rows, total int64
	left        int // chunks
}

// chunk is a range of the heap pages of a table or of one of its partitions.
type chunk struct {
	table    *Table
	heap     string // the name at the source, quoted
	from, to int64  // to < 0: to the end
}

const (
	chunkBytes = 16 << 20  // of table data, TOAST included, per mirror transaction
	countBytes = 256 << 20 // up to this size rows are counted for the progress, beyond the estimate must do
	slotWatch  = 5 * time.Second
)

// copy copies the tables.
func (c *copier) copy(ctx context.Context, tables []*Table) error {
	first, err := c.reader(ctx)
	if err != nil {
		return err
	}
	chunks, err := c.plan(ctx, first, tables)
	if err != nil {
		closeConn(first)
		return err
	}
	work := make(chan chunk)
	workers, cancel := context.WithCancel(ctx)
	defer cancel()
	g, gctx := errgroup.WithContext(workers)
	g.Go(func() error {
		defer close(work)
		for _, ch := range chunks {
			select {
			case work <- ch:
			case <-gctx.Done():
				return gctx.Err()
			}
		}
		return nil
	})
	for i := range max(1, min(c.Workers, len(chunks))) {
		src := first
		if i > 0 {
			src = nil
		}
		g.Go(func() error { return c.worker(gctx, src, work) })
	}
	done := make(chan error, 1)
	go func() { done <- g.Wait() }()
	for {
		select {
		case err := <-done:
			return err
		case <-time.After(slotWatch):
			if err := c.slotTrouble(ctx); err != nil {
				cancel()
				<-done
				return err
			}
		}
	}
}

// reader opens a source connection that sees the snapshot.
func (c *copier) reader(ctx context.Context) (*pgx.Conn, error) {
	conn, err := Connect(ctx, c.SourceDSN, "waystage-copy")
	if err != nil {
		return nil, err
	}
	for _, sql := range []string{
		"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
		"SET TRANSACTION SNAPSHOT " + Literal(c.snapshot),
		// Rows that row security would hide are an error, not a hole in the copy.
		"SET LOCAL row_security = off",
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			closeConn(conn)
			return nil, fmt.Errorf("%s: %w", sql, err)
		}
	}
	return conn, nil
}

// plan cuts the tables into chunks of about chunkBytes.
func (c *copier) plan(ctx context.Context, conn *pgx.Conn, tables []*Table) ([]chunk, error) {
	c.done = map[*Table]*tally{}
	var out []chunk
	for _, t := range tables {
		heaps := []string{t.Ident()}
		if t.Partitioned {
			rows, err := conn.Query(ctx, "SELECT relid::regclass::text FROM pg_partition_tree($1::text::regclass) WHERE isleaf ORDER BY relid", t.Ident())
			if err != nil {
				return nil, fmt.Errorf("partitions of %s: %w", t.FullName(), err)
			}
			if heaps, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
				return nil, fmt.Errorf("partitions of %s: %w", t.FullName(), err)
			}
		}
		tl := &tally{}
		c.done[t] = tl
		for _, heap := range heaps {
			chunks, rows, err := planHeap(ctx, conn, t, heap)
			if err != nil {
				return nil, err
			}
			out = append(out, chunks...)
			tl.left += len(chunks)
			tl.total += rows
		}
		c.report(t, 0, false)
	}
	return out, nil
}

// planHeap cuts one heap; rows is about how many it has.
func planHeap(ctx context.Context, conn *pgx.Conn, t *Table, heap string) (out []chunk, rows int64, err error) {
	var pages, size, all int64
	err = conn.QueryRow(ctx, `SELECT pg_relation_size(c.oid) / current_setting('block_size')::int, pg_relation_size(c.oid), pg_table_size(c.oid), greatest(c.reltuples, 0)::bigint
		FROM pg_class c WHERE c.oid = $1::text::regclass`, heap).Scan(&pages, &size, &all, &rows)
	if err != nil {
		return nil, 0, fmt.Errorf("size of %s: %w", heap, err)
	}
	if size <= countBytes {
		if err := conn.QueryRow(ctx, "SELECT count(*) FROM ONLY "+heap).Scan(&rows); err != nil {
			return nil, 0, fmt.Errorf("count %s: %w", heap, err)
		}
	}
	step := max(1, pages)
	if all > chunkBytes {
		step = max(1, chunkBytes*pages/all)
	}
	for from := int64(0); from == 0 || from < pages; from += step {
		to := from + step
		if to >= pages {
			to = -1 // pages that are newer than this look hold nothing that the snapshot sees
		}
		out = append(out, chunk{t, heap, from, to})
	}
	return out, rows, nil
}

func (c *copier) worker(ctx context.Context, src *pgx.Conn, work <-chan chunk) (err error) {
	if src == nil {
		if src, err = c.reader(ctx); err != nil {
			return err
		}
	}
	defer closeConn(src)
	dst, err := Connect(ctx, c.MirrorDSN, "waystage-copy")
	if err != nil {
		return err
	}
	defer closeConn(dst)
	// The commit that declares the copy done is synchronous, and everything before it in the log with it.
	if _, err := dst.Exec(ctx, "SET synchronous_commit = off"); err != nil {
		return err
	}
	for ch := range work {
		n, err := c.chunk(ctx, src.PgConn(), dst, ch)
		if err != nil {
			return fmt.Errorf("copy %s: %w", ch.table.FullName(), err)
		}
		c.report(ch.table, n, true)
	}
	return nil
}

// chunk copies one range in one mirror transaction.
func (c *copier) chunk(ctx context.Context, src *pgconn.PgConn, dst *pgx.Conn, ch chunk) (rows int64, err error) {
	var names []string
	for _, col := range ch.table.Columns {
		names = append(names, col.Name)
	}
	where := fmt.Sprintf(" WHERE ctid >= '(%d,0)'", ch.from)
	if ch.to >= 0 {
		where += fmt.Sprintf(" AND ctid < '(%d,0)'", ch.to)
	}
	from := "COPY (SELECT " + quoteAll(names) + " FROM ONLY " + ch.heap + where + ") TO STDOUT"
	into := ch.table.Ident()
	if c.side {
		into = ch.table.sideTable()
	}
	to := "COPY " + into + " (" + quoteAll(names) + ") FROM STDIN"
	err = pgx.BeginFunc(ctx, dst, func(tx pgx.Tx) error {
		if err := stillOurs(ctx, tx, c.run, "FOR SHARE"); err != nil {
			return err
		}
		r, w := io.Pipe()
		sent := make(chan error, 1)
		go func() {
			_, err := src.CopyTo(ctx, w, from)
			// An end without error is an end of the data for the mirror, anything else must fail it.
			w.CloseWithError(err)
			sent <- err
		}()
		tag, err := tx.Conn().PgConn().CopyFrom(ctx, r, to)
		r.CloseWithError(errors.Join(err, io.ErrClosedPipe))
		if sendErr := <-sent; sendErr != nil && !errors.Is(sendErr, io.ErrClosedPipe) {
			return errors.Join(sendErr, err)
		}
		rows = tag.RowsAffected()
		return err
	})
	return rows, err
}

// report counts rows and tells the caller, one call at a time.
func (c *copier) report(t *Table, rows int64, chunkDone bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	tl := c.done[t]
	tl.rows += rows
	if chunkDone {
		tl.left--
	}
	p := CopyProgress{Table: t.FullName(), Rows: tl.rows, Total: max(tl.total, tl.rows), Done: tl.left == 0}
	if p.Done {
		p.Total = p.Rows
	}
	if c.Progress != nil {
		c.Progress(p)
	}
}

// slotTrouble looks after the slot that the copy belongs to: without it the copy would be worth nothing.
func (c *copier) slotTrouble(ctx context.Context) error {
	lost, err := slotLost(ctx, c.source, SlotDown(c.result.Epoch))
	if err != nil {
		return fmt.Errorf("look after the slot: %w", err)
	}
	if lost != "" {
		return fmt.Errorf("slot %s at the source %s during the copy; raise max_slot_wal_keep_size and start again", SlotDown(c.result.Epoch), lost)
	}
	return nil
}
