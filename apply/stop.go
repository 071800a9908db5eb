package apply

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/schema"
)

// fault is trouble with one table that retrying cannot mend. The session ends, the table is stopped, and the next session
// goes on without it.
type fault struct {
	t      *table
	code   schema.StopCode
	detail string
	err    error // nil: found by comparing
}

func (f *fault) Error() string {
	if f.err != nil {
		return fmt.Sprintf("table %s: %s: %v", f.t.FullName(), f.code, f.err)
	}
	return fmt.Sprintf("table %s: %s: %s", f.t.FullName(), f.code, f.detail)
}

func (f *fault) Unwrap() error { return f.err }

// errLayout ends a session whose view of the tables is out of date.
var errLayout = errors.New("the layout of the synced tables has changed")

// stopFaulty takes the table of a fault out of replication. It returns what is to be done about err: errLayout when the
// table is stopped, by whomever.
func stopFaulty(ctx context.Context, conn *pgx.Conn, layout int64, err error, log *zap.Logger) error {
	var f *fault
	if !errors.As(err, &f) || ctx.Err() != nil {
		return err
	}
	detail := f.detail
	if detail == "" {
		detail = clean(f.err.Error())
	}
	if serr := schema.StopTable(ctx, conn, f.t.ID, f.t.FullName(), layout, f.code, detail, log); serr != nil {
		return errors.Join(err, serr)
	}
	return fmt.Errorf("%w: %w", errLayout, err)
}

// mirrorFault makes a fault of an error by which the mirror refuses a table's rows. Others stay what they are.
func mirrorFault(t *table, err error) error {
	var f *fault
	if err == nil || errors.As(err, &f) {
		return err
	}
	switch pgerr.Class(err) {
	case pgerr.Refusal:
	case pgerr.Fatal:
		if !strings.HasPrefix(pgerr.Code(err), "42") {
			return err
		}
	default:
		return err
	}
	return &fault{t: t, code: schema.StopMirrorRefuses, err: err}
}

// sourceFault makes a fault of an error that says nothing against the values, only against the statement.
func sourceFault(t *table, err error) error {
	if pgerr.Class(err) != pgerr.Fatal {
		return err
	}
	if code := pgerr.Code(err); !strings.HasPrefix(code, "42") && !strings.HasPrefix(code, "55") && !strings.HasPrefix(code, "0A") {
		return err
	}
	return &fault{t: t, code: schema.StopSourceRefuses, err: err}
}

// explain looks whether the source's catalog says why it has refused our statements on a table.
func (s *upSession) explain(ctx context.Context, err error) error {
	var f, why *fault
	if !errors.As(err, &f) || f.code != schema.StopSourceRefuses || s.source.IsClosed() {
		return err
	}
	if _, cerr := readTargets(ctx, s.source, map[int]*table{f.t.ID: f.t}); errors.As(cerr, &why) {
		return why
	}
	return err
}

// describe says what kind of thing a relation description is: the marker, a synced table, or none of ours. What is wrong
// with it counts when a row comes that needs it.
func (d *Down) describe(desc *change.Relation) {
	if desc.Schema == "waystage" && desc.Name == "progress" {
		d.relations[desc.ID] = &relation{marker: true, desc: desc}
		return
	}
	name := desc.Schema + "." + desc.Name
	if t := d.byName[name]; t != nil {
		d.relations[desc.ID] = t.bind(desc)
		return
	}
	for _, t := range d.byID {
		if t.OID == desc.ID {
			d.relations[desc.ID] = &relation{table: t, desc: desc,
				err: &fault{t: t, code: schema.StopRenamed, detail: fmt.Sprintf("the table is called %s at the source now", name)}}
			return
		}
	}
	if !d.unknown[name] {
		d.unknown[name] = true
		d.log.Warn("change data of a table that is not synced is ignored", zap.String("table", name))
	}
	d.relations[desc.ID] = &relation{desc: desc}
}

// passed tells whether the open transaction's events of a table are passed over: the table is stopped, or a copy has them.
func (b *batch) passed(t *table) bool { return t.Stop != nil && !t.Stop.Copying || b.at < t.floor }

// keep notes what the source has done to a table whose new copy is under way.
func (tr *tableRows) keep(ctx context.Context, tx pgx.Tx) error {
	n := len(tr.order)
	if n == 0 {
		return nil
	}
	imgs, others := make([]*string, n), make([]bool, n)
	for r, st := range tr.order {
		imgs[r], others[r] = tr.json(st.img), st.foreign
	}
	args := append(tr.keyArrays(n, func(r int) []string { return tr.order[r].key }), imgs, others, tr.ID)
	// What did not change keeps the image before; without one, the copy has it.
	_, err := tx.Exec(ctx, fmt.Sprintf(`INSERT INTO waystage.deferred AS d (tbl, key, img, others) SELECT $%d, %s, u.img, u.others FROM %s
		ON CONFLICT (tbl, key) DO UPDATE SET others = d.others OR excluded.others,
			img = CASE WHEN excluded.img IS NOT NULL THEN coalesce(d.img, '{}') || excluded.img END`,
		len(tr.keys)+3, tr.keyArray("u"), tr.unnest(tr.keys, 1, "img jsonb", "others boolean")), args...)
	if err != nil {
		return fmt.Errorf("keep changes of %s: %w", tr.FullName(), err)
	}
	return nil
}

// keepTruncate notes that the source has emptied such a table.
func (b *batch) keepTruncate(ctx context.Context, t *table) error {
	if err := b.flush(ctx, false); err != nil {
		return err
	}
	for _, sql := range []string{"DELETE FROM waystage.deferred WHERE tbl = $1", "UPDATE waystage.synced_table SET emptied = true WHERE id = $1"} {
		if _, err := b.tx.Exec(ctx, sql, t.ID); err != nil {
			return fmt.Errorf("keep the truncation of %s: %w", t.FullName(), err)
		}
	}
	return nil
}

// dropIdleBases removes the base images of keys of a stopped table without pending changes. Its rows stay as the devices left
// them: the next copy says what they are.
func (b *batch) dropIdleBases(ctx context.Context, tbl int) error {
	_, err := b.tx.Exec(ctx, `DELETE FROM waystage.base AS b WHERE b.tbl = $1
		AND NOT EXISTS (SELECT 1 FROM waystage.change AS c WHERE c.state = 'merged' AND c.tbl = b.tbl AND c.key = b.key)`, tbl)
	if err != nil {
		return fmt.Errorf("drop bases of a stopped table: %w", err)
	}
	return nil
}
