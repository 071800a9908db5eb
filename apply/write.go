package apply

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/schema"
)

// copyLeast is from how many new rows on they are copied into the mirror and not inserted.
const copyLeast = 200

// overwriteRows updates whole rows that are there, and leaves those that are as they should be; parameters: columns. Unlike
// upsertRows it neither locks a row before it writes it nor looks for room in the index first.
func (w *table) overwriteRows() string {
	all := w.all()
	typed := w.list(all, func(i int) string { return fmt.Sprintf("%s AS c%d", w.cast(i), i) })
	sets := w.list(all, func(i int) string { return fmt.Sprintf("%s = u.c%d", schema.Quote(w.Columns[i].Name), i) })
	match := make([]string, len(w.keys))
	for j, i := range w.keys {
		match[j] = fmt.Sprintf("m.%s = u.c%d", schema.Quote(w.Columns[i].Name), i)
	}
	return fmt.Sprintf(`UPDATE %s AS m SET %s, %s = pg_current_xact_id()::text::bigint, %s = NULL, %s = 0
		FROM (SELECT %s FROM %s OFFSET 0) AS u WHERE %s AND NOT record_image_eq(ROW(%s), ROW(%s))`,
		w.Ident(), sets, schema.ColVersion, schema.ColWriter, schema.ColMerged, typed, w.unnest(all, 1), strings.Join(match, " AND "),
		w.list(all, func(i int) string { return "m." + schema.Quote(w.Columns[i].Name) }), w.list(all, func(i int) string { return fmt.Sprintf("u.c%d", i) }))
}

// put writes whole rows. The source says which are new and which were there; where the mirror has it otherwise, upsertRows does what
// is right for either.
func (tr *tableRows) put(ctx context.Context, tx pgx.Tx, states []*rowState) error {
	var fresh, known []image
	for _, st := range states {
		if st.fresh {
			fresh = append(fresh, st.img)
		} else {
			known = append(known, st.img)
		}
	}
	if len(known) > 0 {
		args := columnArrays(tr.all(), len(known), func(r int) image { return known[r] })
		tag, err := tx.Exec(ctx, tr.overwrite, args...)
		if err != nil {
			return fmt.Errorf("write %s: %w", tr.FullName(), err)
		}
		if tag.RowsAffected() != int64(len(known)) { // rows that are missing, or that are as they should be
			if err := tr.upsert(ctx, tx, known); err != nil {
				return err
			}
		}
	}
	if len(fresh) >= copyLeast {
		done, err := tr.copyIn(ctx, tx, fresh)
		if err != nil || done {
			return err
		}
	}
	return tr.upsert(ctx, tx, fresh)
}

func (tr *tableRows) upsert(ctx context.Context, tx pgx.Tx, rows []image) error {
	if len(rows) == 0 {
		return nil
	}
	if _, err := tx.Exec(ctx, tr.upsertRows, columnArrays(tr.all(), len(rows), func(r int) image { return rows[r] })...); err != nil {
		return fmt.Errorf("write %s: %w", tr.FullName(), err)
	}
	return nil
}

// copyIn copies new rows into the mirror: that costs half of an insert. It returns false, and has changed nothing, if the mirror does
// not take them so: it may have one of them.
func (tr *tableRows) copyIn(ctx context.Context, tx pgx.Tx, rows []image) (done bool, err error) {
	var version string
	if err := tx.QueryRow(ctx, "SELECT pg_current_xact_id()::text").Scan(&version); err != nil {
		return false, fmt.Errorf("write %s: %w", tr.FullName(), err)
	}
	var data bytes.Buffer
	for _, img := range rows {
		for _, v := range img {
			appendCopy(&data, v)
			data.WriteByte('\t')
		}
		data.WriteString(version + "\t\\N\t0\n")
	}
	if _, err := tx.Exec(ctx, "SAVEPOINT ws_copy"); err != nil {
		return false, fmt.Errorf("write %s: %w", tr.FullName(), err)
	}
	columns := tr.list(tr.all(), func(i int) string { return schema.Quote(tr.Columns[i].Name) })
	_, err = tx.Conn().PgConn().CopyFrom(ctx, &data, fmt.Sprintf("COPY %s (%s, %s, %s, %s) FROM STDIN", tr.Ident(), columns,
		schema.ColVersion, schema.ColWriter, schema.ColMerged))
	end := "RELEASE SAVEPOINT ws_copy"
	var refused *pgconn.PgError
	if errors.As(err, &refused) {
		end = "ROLLBACK TO SAVEPOINT ws_copy"
	} else if err != nil {
		return false, fmt.Errorf("write %s: %w", tr.FullName(), err)
	}
	if _, err := tx.Exec(ctx, end); err != nil {
		return false, fmt.Errorf("write %s: %w", tr.FullName(), err)
	}
	return refused == nil, nil
}

// copyEscapes are the characters that COPY's text format reads otherwise.
var copyEscapes = strings.NewReplacer(`\`, `\\`, "\n", `\n`, "\r", `\r`, "\t", `\t`)

func appendCopy(to *bytes.Buffer, v *string) {
	switch {
	case v == nil:
		to.WriteString(`\N`)
	case strings.ContainsAny(*v, "\\\n\r\t"):
		_, _ = copyEscapes.WriteString(to, *v) // a buffer takes everything
	default:
		to.WriteString(*v)
	}
}
