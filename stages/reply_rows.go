package stages

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/protocol"
)

// rowQuery is one query of a reply's rows, and what to do with each of its rows.
type rowQuery struct {
	s      *session
	sub    *subscription
	sql    string
	params [][]byte
	take   func(ctx context.Context, sub *subscription, raw [][]byte) error
	row    bool // it gives rows, and not keys
}

// rows reads the rows of all sessions. The queries go out in one go; their results are read as text and put on
// pages as they come, in memory bounded by a page.
func (b *replyBatch) rows() error {
	var queries []rowQuery
	for _, s := range b.sessions {
		if s.refusal != nil {
			continue
		}
		if err := s.refuseOn(b.heads(s)); err != nil {
			return err
		}
		queries = append(queries, b.queries(s)...)
	}
	if len(queries) == 0 {
		return nil
	}
	asked := together(queries)
	names := make([]string, len(asked))
	for i, of := range asked {
		q := of[0]
		sum := sha256.Sum256([]byte(q.sql))
		names[i] = "ws_" + hex.EncodeToString(sum[:12])
		if _, err := b.conn.Conn().Prepare(b.ctx, names[i], q.sql); err != nil {
			return fmt.Errorf("prepare the rows of %s: %w", q.sub.Table, err)
		}
	}
	pipe := b.conn.Conn().PgConn().StartPipeline(b.ctx)
	for i, of := range asked {
		pipe.SendQueryPrepared(names[i], of[0].params, nil, nil)
	}
	err := pipe.Sync()
	for i := 0; err == nil && i < len(asked); i++ {
		err = b.read(pipe, asked[i])
	}
	if cerr := pipe.Close(); err == nil {
		err = wrap("read rows", cerr)
	}
	return err
}

// together finds the queries that are the same: devices with the same keys and cursor's horizon get the same rows, which are read once.
func together(queries []rowQuery) (asked [][]rowQuery) {
	at := map[string]int{}
	var id []byte
	for _, q := range queries {
		id = append(append(id[:0], q.s.contentType...), q.sql...)
		for _, p := range q.params {
			id = binary.AppendUvarint(append(id, 0), uint64(len(p)))
			id = append(id, p...)
		}
		i, ok := at[string(id)]
		if !ok {
			i, at[string(id)] = len(asked), len(asked)
			asked = append(asked, nil)
		}
		asked[i] = append(asked[i], q)
	}
	return asked
}

// read takes the result of one query for all sessions that asked it.
func (b *replyBatch) read(pipe *pgconn.Pipeline, of []rowQuery) error {
	q := of[0]
	got, err := pipe.GetResults()
	if err != nil {
		return fmt.Errorf("read rows of %s: %w", q.sub.Table, err)
	}
	rows, ok := got.(*pgconn.ResultReader)
	if !ok {
		return fmt.Errorf("read rows of %s: the connection answered %T", q.sub.Table, got)
	}
	for rows.NextRow() {
		raw := rows.Values()
		var one protocol.Row
		var size int
		if q.row && len(of) > 1 {
			one, size = q.s.pages.read(raw)
		}
		for _, q := range of {
			if q.s.refusal != nil {
				continue // the connection must still be read to the end
			}
			var err error
			if size > 0 {
				err = q.s.pages.add(b.ctx, q.sub, one, size)
			} else {
				err = q.take(b.ctx, q.sub, raw)
			}
			if err != nil {
				if err = q.s.refuseOn(err); err != nil {
					return err
				}
			}
		}
	}
	if _, err := rows.Close(); err != nil {
		return fmt.Errorf("read rows of %s: %w", q.sub.Table, err)
	}
	return nil
}

// refuseOn turns what makes this reply impossible into its refusal; other errors stay errors.
func (s *session) refuseOn(err error) error {
	var page *pageError
	if errors.As(err, &page) {
		s.refusal = &page.refusal
		return nil
	}
	return err
}

// heads puts on the pages what comes before the rows: verdicts, and the keys that are gone.
func (b *replyBatch) heads(s *session) error {
	for _, v := range s.verdicts {
		if err := s.pages.verdict(b.ctx, v); err != nil {
			return err
		}
	}
	for i := range s.tables {
		if s.tables[i].sub.reply.left != "" {
			continue
		}
		for _, key := range s.tables[i].gone {
			if err := s.pages.gone(b.ctx, s.tables[i].sub, key); err != nil {
				return err
			}
		}
	}
	return nil
}

// queries of one session: per table, keys of rows that left, rows that changed, and all rows of new keys.
func (b *replyBatch) queries(s *session) []rowQuery {
	var list []rowQuery
	add := func(sub *subscription, sql string, take func(context.Context, *subscription, [][]byte) error, params ...[]byte) {
		list = append(list, rowQuery{s: s, sub: sub, sql: sql, params: params, take: take})
	}
	rows := func(sub *subscription, sql string, params ...[]byte) {
		list = append(list, rowQuery{s: s, sub: sub, sql: sql, params: params, take: s.pages.row, row: true})
	}
	var xmin []byte
	if s.from != nil {
		xmin = strconv.AppendInt(nil, s.from.xmin, 10)
	}
	for i := range s.tables {
		t := &s.tables[i]
		sub, q := t.sub, t.sub.reply
		switch {
		case sub.Key == "" && s.from == nil:
			rows(sub, q.whole)
		case sub.Key == "":
			add(sub, q.deleted, s.pages.deleted, xmin)
			rows(sub, q.changed, xmin)
		default:
			all := textArray(t.all)
			before := t.kept
			if q.left != "" && len(t.gone) > 0 {
				before = slices.Concat(t.kept, t.gone)
				add(sub, q.left, s.pages.deleted, textArray(t.gone))
			}
			if len(before) > 0 {
				add(sub, q.deleted, s.pages.deleted, xmin, textArray(before), all)
			}
			// What the session itself wrote need not be of a key that the device had, or has now.
			if s.records > 0 && s.from != nil {
				add(sub, q.own, s.pages.deleted, strconv.AppendInt(nil, s.id, 10), all)
			}
			if len(t.kept) > 0 {
				rows(sub, q.changed, xmin, textArray(t.kept))
			}
			if len(t.fresh) > 0 {
				rows(sub, q.whole, textArray(t.fresh))
			}
		}
	}
	return list
}

// textArray renders a text[] literal.
func textArray(list []string) []byte {
	size := 2
	for _, s := range list {
		size += len(s) + 3
	}
	b := append(make([]byte, 0, size), '{')
	for i, s := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, '"')
		if strings.ContainsAny(s, `"\`) {
			s = strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s)
		}
		b = append(b, s...)
		b = append(b, '"')
	}
	return append(b, '}')
}
