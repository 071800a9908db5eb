package stages

import (
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
)

// rejudge refuses, of sessions that were staged under another layout, the records that the present definitions do not take: table,
// operation and columns, as intake judges. What intake has refused stays refused. Everything else (rows, versions) the merge
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
	rows, err := b.tx.Query(b.ctx, `SELECT session_id, idx, tname, op, ARRAY(SELECT jsonb_object_keys(coalesce(base, '{}') || coalesce(img, '{}')))
		FROM waystage.staging WHERE session_id = ANY ($1) AND bad_code IS NULL ORDER BY 1, 2`, ids)
	if err != nil {
		return err
	}
	var sessions []int64
	var indexes []int
	var codes, details []string
	var r record
	var session int64
	var idx int
	var columns []string
	_, err = pgx.ForEachRow(rows, []any{&session, &idx, &r.tname, &r.op, &columns}, func() error {
		if code, why := b.cat.refuses(b.sessions[session].set, r.tname, r.op, columns); code != "" {
			sessions, indexes, codes, details = append(sessions, session), append(indexes, idx), append(codes, string(code)), append(details, why)
		}
		columns = nil
		return nil
	})
	if err != nil || len(sessions) == 0 {
		return err
	}
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

// refuses tells why the definitions do not take an operation on these columns of a set's table; an empty code: they do.
func (c *Catalog) refuses(setName, table, op string, columns []string) (protocol.Code, string) {
	sub := c.subscription(setName, table)
	if sub == nil {
		return protocol.CodeUnknownTable, fmt.Sprintf("table %s is not in the device's subscription set any more", quoted(table))
	}
	return sub.Refuses(sub.table, op, columns)
}
