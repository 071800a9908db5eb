package stages

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// demand is what a request asks of a verification, as waystage.session.verify keeps it; nil: its device knows of none.
func demand(v *protocol.Verification) (*string, error) {
	if v == nil {
		return nil, nil
	}
	ask := protocol.Verification{Buckets: v.Buckets}
	for _, r := range v.Rows {
		ask.Rows = append(ask.Rows, protocol.VerifyRows{Table: clean(r.Table), Buckets: r.Buckets})
	}
	text, err := json.Marshal(ask)
	s := string(text)
	return &s, err
}

// findings queues what devices have found in earlier verifications.
func findings(b *pgx.Batch, reqs []*incoming) error {
	for _, r := range reqs {
		if r.req.Verify == nil || r.req.Verify.Result == nil {
			continue
		}
		f := r.req.Verify.Result
		sample := slices.Clone(f.Sample)
		for i := range sample {
			d := &sample[i]
			d.Table, d.Key, d.Columns = clean(d.Table), cleanKey(d.Key), slices.Clone(d.Columns)
			for j := range d.Columns {
				d.Columns[j] = clean(d.Columns[j])
			}
		}
		if sample == nil {
			sample = []protocol.Difference{}
		}
		text, err := json.Marshal(sample)
		if err != nil {
			return fmt.Errorf("sample of a verification: %w", err)
		}
		at, err := time.Parse(time.RFC3339, f.At)
		if err != nil || at.Year() < 2000 || at.Year() > 9999 { // a clock that was never set
			at = time.Now()
		}
		b.Queue(`INSERT INTO waystage.device_check (device_id, set_name, session_id, cursor, checked_at, told_at, rows, different, repaired, more, sample)
			VALUES ($1, $2, $3, $4, $5, clock_timestamp(), $6, $7, $8, $9, $10::text::jsonb)
			ON CONFLICT (device_id, set_name) DO UPDATE SET session_id = excluded.session_id, cursor = excluded.cursor, checked_at = excluded.checked_at,
			told_at = excluded.told_at, rows = excluded.rows, different = excluded.different, repaired = excluded.repaired, more = excluded.more, sample = excluded.sample`,
			r.deviceID, r.req.Set, r.sessionID, clean(f.Cursor), at, f.Rows, f.Different, f.Repaired, f.More, string(text))
	}
	return nil
}

// verifySQL is the verification's SQL for one subscription; n is the number of buckets. The parameters are those of
// replySQL.whole; rows takes the buckets after them.
func verifySQL(s *subscription, n int) (sums, rows string) {
	t := s.table
	text := func(name string) string {
		c, _ := t.Column(name)
		return c.Text("m." + schema.Quote(name))
	}
	var key, image []string
	for _, k := range t.Key {
		key = append(key, text(k))
	}
	for _, name := range s.columns {
		image = append(image, text(name))
	}
	where := ""
	from := "FROM " + t.Ident() + " m"
	if _, cond, ok := strings.Cut(s.reply.whole, from); ok {
		where = strings.TrimPrefix(cond, " WHERE ")
	}
	if where == "" {
		where = "true"
	}
	sums = fmt.Sprintf(`SELECT (x.k & %d)::text, count(*)::text, lpad(to_hex(bit_xor(x.v)), 16, '0'), lpad(to_hex(bit_xor(x.i)), 16, '0')
FROM (SELECT %s AS k, %s AS v, %s AS i %s WHERE %s) x GROUP BY x.k & %[1]d`, n-1, hashSQL(key), hashSQL(append([]string{"m._ws_version::text"}, key...)), hashSQL(image), from, where)
	head, _, _ := strings.Cut(s.reply.whole, from)
	next := "$1"
	if s.Key != "" {
		next = "$2"
	}
	rows = fmt.Sprintf("%s%s WHERE %s AND (%s & %d) = ANY (%s::bigint[])", head, from, where, hashSQL(key), n-1, next)
	return sums, rows
}

// hashSQL is protocol.RowHash of texts, in SQL, as a signed number.
func hashSQL(texts []string) string {
	parts := make([]string, len(texts))
	for i, t := range texts {
		parts[i] = fmt.Sprintf("CASE WHEN (%[1]s) IS NULL THEN '-' ELSE octet_length(%[1]s) || ':' || (%[1]s) END", t)
	}
	return "('x' || left(encode(sha256(convert_to(" + strings.Join(parts, " || ") + ", 'UTF8')), 'hex'), 16))::bit(64)::bigint"
}

// verify adds to the pages what the sessions want verified, from the rows' snapshot.
func (b *replyBatch) verify() error {
	for _, s := range b.sessions {
		if s.verify == nil || s.refusal != nil {
			continue
		}
		if n := s.verify.Buckets; n == 0 || n > protocol.MaxVerifyBuckets || n&(n-1) != 0 {
			continue
		}
		for i := range s.tables {
			if err := b.verifyTable(s, &s.tables[i]); err != nil {
				if err := s.refuseOn(err); err != nil {
					return fmt.Errorf("verify %s: %w", s.tables[i].sub.Table, err)
				}
				break
			}
		}
	}
	return nil
}

func (b *replyBatch) verifyTable(s *session, t *subset) error {
	sums, rows := verifySQL(t.sub, s.verify.Buckets)
	args := []any{pgx.QueryExecModeExec, pgx.QueryResultFormats{pgx.TextFormatCode}}
	if t.sub.Key != "" {
		args = append(args, t.all)
	}
	sql, listed := sums, len(s.verify.Rows) > 0
	if listed {
		i := slices.IndexFunc(s.verify.Rows, func(r protocol.VerifyRows) bool { return r.Table == t.sub.Table })
		if i < 0 {
			return nil
		}
		sql, args = rows, append(args, s.verify.Rows[i].Buckets)
	}
	if err := s.pages.verified(b.ctx, t.sub, protocol.VerifiedTable{}, 0); err != nil {
		return err
	}
	res, err := b.tx.Query(b.ctx, sql, args...)
	if err != nil {
		return err
	}
	defer res.Close()
	for res.Next() {
		raw := res.RawValues()
		if listed {
			vals, size := s.pages.texts(raw)
			if err := s.pages.verified(b.ctx, t.sub, protocol.VerifiedTable{Rows: []protocol.Row{{Version: *vals[0], Values: vals[1:]}}}, size+rowOverhead); err != nil {
				return err
			}
			continue
		}
		bucket, err := strconv.Atoi(string(raw[0]))
		if err != nil {
			return err
		}
		count, err := strconv.ParseInt(string(raw[1]), 10, 64)
		if err != nil {
			return err
		}
		sum := protocol.Sum{Bucket: bucket, Rows: count, Versions: string(raw[2]), Images: string(raw[3])}
		if err := s.pages.verified(b.ctx, t.sub, protocol.VerifiedTable{Sums: []protocol.Sum{sum}}, sumOverhead); err != nil {
			return err
		}
	}
	return res.Err()
}

// sumOverhead bounds what a sum takes in either encoding.
const sumOverhead = 128

// verified adds a part of a table's verification.
func (p *pages) verified(ctx context.Context, sub *subscription, part protocol.VerifiedTable, size int) error {
	last := func() *protocol.VerifiedTable {
		if p.verify != nil {
			if n := len(p.verify.Tables); n > 0 && p.verify.Tables[n-1].Table == sub.Table {
				return &p.verify.Tables[n-1]
			}
		}
		return nil
	}
	head := 0
	if last() == nil {
		head = tableOverhead + p.textSize(sub.Table)
		for _, c := range sub.columns {
			head += p.textSize(c)
		}
	}
	if err := p.room(ctx, nil, size+head); err != nil {
		return err
	}
	t := last()
	if t == nil {
		if p.verify == nil {
			p.verify = &protocol.Verified{Buckets: p.s.verify.Buckets}
		}
		p.verify.Tables = append(p.verify.Tables, protocol.VerifiedTable{Table: sub.Table, Columns: sub.columns})
		t = last()
	}
	t.Sums, t.Rows = append(t.Sums, part.Sums...), append(t.Rows, part.Rows...)
	return nil
}
