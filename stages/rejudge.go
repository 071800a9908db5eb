package stages

import (
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// rejudge refuses, of sessions that were staged under another layout, the records that the present definitions do not take: table,
// operation and columns that they write, as intake judges. What intake has refused stays refused. Everything else (rows, versions) the merge
// judges in any case.
func (b *mergeBatch) rejudge() error {
	var ids []int64
	for id, s := range b.sessions {
		if s.judgedBy != b.cat.layout && s.user != protocol.OperatorUser {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	rows, err := b.tx.Query(b.ctx, `SELECT s.session_id, s.idx, s.tname, s.op, `+schema.WrittenColumns+`, ARRAY(SELECT jsonb_object_keys(coalesce(s.base, '{}') || coalesce(s.img, '{}')))
		FROM waystage.staging s WHERE s.session_id = ANY ($1) AND s.bad_code IS NULL ORDER BY 1, 2`, ids)
	if err != nil {
		return err
	}
	var sessions []int64
	var indexes []int
	var codes, details []string
	var r record
	var session int64
	var idx int
	var written, columns []string
	var left leftColumns
	_, err = pgx.ForEachRow(rows, []any{&session, &idx, &r.tname, &r.op, &written, &columns}, func() error {
		set := b.sessions[session].set
		if code, why := b.cat.refuses(set, r.tname, r.op, written); code != "" {
			sessions, indexes, codes, details = append(sessions, session), append(indexes, idx), append(codes, string(code)), append(details, why)
		} else {
			left.add(b.cat.subscription(set, r.tname), session, idx, columns)
		}
		written, columns = nil, nil
		return nil
	})
	if err != nil {
		return err
	}
	if err := left.drop(b); err != nil || len(sessions) == 0 {
		return err
	}
	b.bad = true
	_, err = b.tx.Exec(b.ctx, `UPDATE waystage.staging s SET bad_code = u.code, bad_detail = left(u.why, $5)
		FROM unnest($1::bigint[], $2::int[], $3::text[], $4::text[]) AS u(session, idx, code, why) WHERE s.session_id = u.session AND s.idx = u.idx`,
		sessions, indexes, codes, details, maxDetail)
	if err != nil {
		return err
	}
	// Passes are undone to here.
	_, err = b.tx.Exec(b.ctx, "SAVEPOINT ws_pass")
	return err
}

// leftColumns are columns that have left the subscription, of records that write nothing to them.
type leftColumns struct {
	sessions []int64
	indexes  []int
	columns  []string
}

func (l *leftColumns) add(sub *subscription, session int64, idx int, columns []string) {
	for _, c := range columns {
		if !slices.Contains(sub.columns, c) {
			l.sessions, l.indexes, l.columns = append(l.sessions, session), append(l.indexes, idx), append(l.columns, c)
		}
	}
}

// drop takes them out of the images, as intake does.
func (l *leftColumns) drop(b *mergeBatch) error {
	if len(l.sessions) == 0 {
		return nil
	}
	_, err := b.tx.Exec(b.ctx, `UPDATE waystage.staging s SET base = s.base - u.columns, img = s.img - u.columns
		FROM (SELECT v.session, v.idx, array_agg(v.col) AS columns FROM unnest($1::bigint[], $2::int[], $3::text[]) AS v(session, idx, col) GROUP BY 1, 2) u
		WHERE s.session_id = u.session AND s.idx = u.idx`, l.sessions, l.indexes, l.columns)
	if err == nil {
		_, err = b.tx.Exec(b.ctx, "SAVEPOINT ws_pass") // passes are undone to here
	}
	return err
}

// refuses tells why the definitions do not take an operation on these columns of a set's table; an empty code: they do.
func (c *Catalog) refuses(setName, table, op string, columns []string) (protocol.Code, string) {
	sub := c.subscription(setName, table)
	if sub == nil {
		return protocol.CodeUnknownTable, fmt.Sprintf("table %s is not in the device's subscription set any more", quoted(table))
	}
	return sub.Refuses(sub.table, op, columns)
}
