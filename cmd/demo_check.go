package cmd

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/schema"
)

// The demonstration's last word: device, mirror and source are compared value by value, with plain SQL on each of the
// three and none of the pipeline's own book-keeping.

// comparison is what was compared, for a person.
type comparison struct {
	tables     int
	rows       int // at the source
	deviceRows int // on all devices together
}

// compare fails with the first difference between source and mirror (all rows), or between the source's rows
// of a nurse's patients and her device.
func (d *demo) compare(ctx context.Context) (comparison, error) {
	var c comparison
	for _, t := range d.tables {
		n, want, err := fingerprint(ctx, d.source, t, "")
		if err != nil {
			return c, fmt.Errorf("read %s at the source: %w", t.FullName(), err)
		}
		m, got, err := fingerprint(ctx, d.mirror, t, "")
		if err != nil {
			return c, fmt.Errorf("read %s in the mirror: %w", t.FullName(), err)
		}
		if got != want {
			return c, fmt.Errorf("%s differs: %d rows at the source, %d in the mirror", t.FullName(), n, m)
		}
		c.tables++
		c.rows += n
	}
	for _, n := range d.nurses {
		rows, err := d.compareDevice(ctx, n)
		if err != nil {
			return c, fmt.Errorf("%s's device: %w", n.Name, err)
		}
		c.deviceRows += rows
	}
	return c, nil
}

// fingerprint is the number of rows of a table and a hash of all of them.
func fingerprint(ctx context.Context, conn *pgx.Conn, t *schema.Table, where string, args ...any) (rows int, sum string, err error) {
	var columns []string
	for _, c := range t.Columns {
		columns = append(columns, schema.Quote(c.Name)+"::text") // an enum is text in the mirror
	}
	err = conn.QueryRow(ctx, `SELECT count(*), coalesce(md5(string_agg(x, E'\n' ORDER BY x COLLATE "C")), '')
		FROM (SELECT ROW(`+strings.Join(columns, ", ")+`)::text AS x FROM `+t.Ident()+` `+where+`) AS r`, args...).Scan(&rows, &sum)
	return rows, sum, err
}

// compareDevice compares one device with the source and returns the number of its rows.
func (d *demo) compareDevice(ctx context.Context, n *demoNurse) (int, error) {
	status, err := n.dev.Status(ctx)
	if err != nil {
		return 0, err
	}
	total := 0
	for _, set := range status.Sets {
		for _, there := range set.Tables {
			i := slices.IndexFunc(d.tables, func(t *schema.Table) bool { return t.FullName() == there.Name })
			j := slices.IndexFunc(d.definitions.Subscriptions, func(s *schema.Subscription) bool { return s.Table == there.Name })
			if i < 0 || j < 0 {
				return 0, fmt.Errorf("it has a table %s, which nobody subscribed to", there.Name)
			}
			want, err := sourceRows(ctx, d.source, d.tables[i], d.definitions.Subscriptions[j], n.Login)
			if err != nil {
				return 0, err
			}
			got, err := deviceRows(ctx, n.dev, there, d.tables[i], d.definitions.Subscriptions[j])
			if err != nil {
				return 0, err
			}
			if !slices.Equal(got, want) {
				return 0, fmt.Errorf("%s differs: %d rows for %s at the source, %d on the device", there.Name, len(want), n.Login, len(got))
			}
			total += len(got)
		}
	}
	return total, nil
}

// sourceRows are the rows that a nurse should have: a hash for each, sorted.
func sourceRows(ctx context.Context, conn *pgx.Conn, t *schema.Table, s *schema.Subscription, login string) ([]string, error) {
	columns := s.ColumnsOf(t)
	list := make([]string, len(columns))
	for i, c := range columns {
		list[i] = schema.Quote(c.Name)
	}
	query := "SELECT " + strings.Join(list, ", ") + " FROM " + t.Ident()
	var args []any
	if s.Key != "" {
		query += " WHERE " + schema.Quote(s.Key) + ` IN (SELECT a.patient_id FROM vn.assignment a JOIN vn.nurse n ON n.id = a.nurse_id WHERE n.login = $1)`
		args = append(args, login)
	}
	// Simple protocol: every value arrives as the text that PostgreSQL prints.
	rows, err := conn.Query(ctx, query, append([]any{pgx.QueryExecModeSimpleProtocol}, args...)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		raw := rows.RawValues()
		values := make([]*string, len(raw))
		for i, b := range raw {
			if b != nil {
				text := string(b)
				values[i] = &text
			}
		}
		out = append(out, rowHash(values))
	}
	slices.Sort(out)
	return out, rows.Err()
}

// deviceRows are the rows of a device in the same form.
func deviceRows(ctx context.Context, dev *device.Device, there device.TableStatus, t *schema.Table, s *schema.Subscription) ([]string, error) {
	columns := s.ColumnsOf(t)
	list := make([]string, len(columns))
	for i, c := range columns {
		list[i] = schema.Quote(c.Name)
	}
	rows, err := dev.DB().QueryContext(ctx, "SELECT "+strings.Join(list, ", ")+" FROM "+schema.Quote(there.Local))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		into := make([]any, len(columns))
		for i := range into {
			into[i] = new(any)
		}
		if err := rows.Scan(into...); err != nil {
			return nil, err
		}
		values := make([]*string, len(columns))
		for i, c := range columns {
			values[i] = fromSQLite(c, *into[i].(*any))
		}
		out = append(out, rowHash(values))
	}
	slices.Sort(out)
	return out, rows.Err()
}

// fromSQLite prints a value of SQLite's as PostgreSQL does.
func fromSQLite(c schema.Column, v any) *string {
	var s string
	switch v := v.(type) {
	case nil:
		return nil
	case int64:
		s = strconv.FormatInt(v, 10)
		if c.Type == "boolean" {
			s = map[int64]string{0: "f", 1: "t"}[v]
		}
	case []byte:
		s = `\x` + hex.EncodeToString(v)
	default:
		s = fmt.Sprint(v)
	}
	return &s
}

// rowHash makes rows with the same values equal, and no others.
func rowHash(values []*string) string {
	h := sha256.New()
	for _, v := range values {
		if v == nil {
			h.Write([]byte{0})
			continue
		}
		fmt.Fprintf(h, "\x01%d:%s", len(*v), *v)
	}
	return string(h.Sum(nil))
}

// scanOne reads one row of a device's file, each column as text; sql.ErrNoRows when there is none.
func scanOne(ctx context.Context, db *sql.DB, columns int, query string, args ...any) ([]string, error) {
	values := make([]sql.NullString, columns)
	into := make([]any, columns)
	for i := range values {
		into[i] = &values[i]
	}
	if err := db.QueryRowContext(ctx, query, args...).Scan(into...); err != nil {
		return nil, err
	}
	out := make([]string, columns)
	for i, v := range values {
		out[i] = v.String
	}
	return out, nil
}
