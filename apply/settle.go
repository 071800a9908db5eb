package apply

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/internal/sabotage"
	"github.com/waystage/waystage/schema"
)

// querier is a connection or a transaction.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// lockTables takes the locks of tables; ids is ascending.
func lockTables(ctx context.Context, tx querier, ids []int) error {
	_, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1, id) FROM (SELECT id FROM unnest($2::int[]) AS id ORDER BY id) AS t", schema.TableLockClass, ids)
	return err
}

// writers by their names in waystage.base.
var (
	writerName = map[conflict.Writer]string{conflict.Initial: "initial", conflict.Own: "own", conflict.Foreign: "foreign"}
	writerOf   = map[string]conflict.Writer{"initial": conflict.Initial, "own": conflict.Own, "foreign": conflict.Foreign}
)

// author of an image: the device that wrote it and the version that its merge gave; the zero value is the source.
type author struct {
	lw   *string
	mver int64
}

// settlement is a key whose last pending change has its verdict.
type settlement struct {
	key      []string
	base     image // the source's image, without holes; nil: absent
	writer   conflict.Writer
	by       author
	accepted bool // the last verdict was an acceptance
}

// settle lets mirror rows become their base (rule R3). The table is locked.
func (w *table) settle(ctx context.Context, tx querier, items []settlement) error {
	if len(items) == 0 {
		return nil
	}
	all := w.all()
	keyOnly := func(s settlement) image {
		g := make(image, len(w.Columns))
		for j, i := range w.keys {
			g[i] = &s.key[j]
		}
		return g
	}
	args := columnArrays(all, len(items), func(r int) image {
		if items[r].base == nil {
			return keyOnly(items[r])
		}
		return items[r].base
	})
	rows, err := tx.Query(ctx, w.compare, args...)
	if err != nil {
		return fmt.Errorf("compare %s with base: %w", w.FullName(), err)
	}
	var put []settlement
	var remove [][]string
	var i int64
	var there, equal bool
	_, err = pgx.ForEachRow(rows, []any{&i, &there, &equal}, func() error {
		s := items[i-1]
		if s.base == nil {
			equal = !there
		}
		writer := s.writer
		if writer == conflict.Own && s.by.lw == nil {
			// Our transaction's side effect, with no device behind the image: to devices it is the source's.
			writer = conflict.Foreign
		}
		if conflict.Settle(s.accepted, equal, writer) == conflict.Keep {
			return nil
		}
		switch {
		case s.base != nil:
			put = append(put, s)
		case there:
			remove = append(remove, s.key)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("compare %s with base: %w", w.FullName(), err)
	}
	if len(remove) > 0 {
		if _, err := tx.Exec(ctx, w.deleteRows, w.keyArrays(len(remove), func(r int) []string { return remove[r] })...); err != nil {
			return fmt.Errorf("settle %s: %w", w.FullName(), err)
		}
	}
	if sabotage.On(sabotage.KeepRefused) {
		put = slices.DeleteFunc(put, func(s settlement) bool { return !s.accepted })
	}
	if len(put) == 0 {
		return nil
	}
	lw, mver := make([]*string, len(put)), make([]int64, len(put))
	for r, s := range put {
		lw[r], mver[r] = s.by.lw, s.by.mver
	}
	args = append(columnArrays(all, len(put), func(r int) image { return put[r].base }), lw, mver)
	if _, err := tx.Exec(ctx, w.settleRows, args...); err != nil {
		return fmt.Errorf("settle %s: %w", w.FullName(), err)
	}
	return nil
}

// baseRow is a row of waystage.base to write.
type baseRow struct {
	key    []string
	img    image // nil: absent
	writer conflict.Writer
	by     author
	// A change of the key was refused: those that are pending were made on top of it. Once written it stays.
	refused bool
}

func (w *table) putBases(ctx context.Context, tx querier, rows []baseRow) error {
	if len(rows) == 0 {
		return nil
	}
	n := len(rows)
	img, writer, lw, mver, refused := make([]*string, n), make([]string, n), make([]*string, n), make([]int64, n), make([]bool, n)
	for r, b := range rows {
		img[r], writer[r], lw[r], mver[r], refused[r] = w.json(b.img), writerName[b.writer], b.by.lw, b.by.mver, b.refused
	}
	args := append(w.keyArrays(n, func(r int) []string { return rows[r].key }), img, writer, lw, mver, refused, w.ID)
	if _, err := tx.Exec(ctx, w.putBase, args...); err != nil {
		return fmt.Errorf("write base of %s: %w", w.FullName(), err)
	}
	return nil
}

func (w *table) dropBases(ctx context.Context, tx querier, keys [][]string) error {
	if len(keys) == 0 {
		return nil
	}
	args := append(w.keyArrays(len(keys), func(r int) []string { return keys[r] }), w.ID)
	if _, err := tx.Exec(ctx, w.dropBase, args...); err != nil {
		return fmt.Errorf("drop base of %s: %w", w.FullName(), err)
	}
	return nil
}

// standing is what a key's side tables say.
type standing struct {
	pending int64 // changes without a verdict
	first   int64 // the first of them
	hasBase bool
	writer  conflict.Writer
}

// standings reads them for keys of a table that is locked; keys without any are left out. By place in keys.
func (w *table) standings(ctx context.Context, tx querier, keys [][]string) (map[int]standing, error) {
	args := append(w.keyArrays(len(keys), func(r int) []string { return keys[r] }), w.ID)
	rows, err := tx.Query(ctx, w.route, args...)
	if err != nil {
		return nil, fmt.Errorf("pending changes of %s: %w", w.FullName(), err)
	}
	out := map[int]standing{}
	var i int64
	var s standing
	var writer string
	_, err = pgx.ForEachRow(rows, []any{&i, &s.pending, &s.first, &s.hasBase, &writer}, func() error {
		s.writer = writerOf[writer]
		out[int(i-1)] = s
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("pending changes of %s: %w", w.FullName(), err)
	}
	return out, nil
}

// baseImages reads the base of each key: its base row or, without one, the old image of the change with the number first.
func (w *table) baseImages(ctx context.Context, tx querier, keys [][]string, first []int64) ([]baseRow, error) {
	args := append(w.keyArrays(len(keys), func(r int) []string { return keys[r] }), first, w.ID)
	rows, err := tx.Query(ctx, w.images, args...)
	if err != nil {
		return nil, fmt.Errorf("base of %s: %w", w.FullName(), err)
	}
	out := make([]baseRow, len(keys))
	var i int64
	var img *string
	var writer string
	var by author
	var refused bool
	_, err = pgx.ForEachRow(rows, []any{&i, &img, &writer, &by.lw, &by.mver, &refused}, func() error {
		g, err := w.image(img)
		out[i-1] = baseRow{key: keys[i-1], img: g, writer: writerOf[writer], by: by, refused: refused}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("base of %s: %w", w.FullName(), err)
	}
	return out, nil
}
