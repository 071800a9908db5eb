package world

import (
	"context"
	"database/sql"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/schema"
)

func list(columns []schema.Column) string {
	var cols []string
	for _, c := range columns {
		cols = append(cols, schema.Quote(c.Name))
	}
	return strings.Join(cols, ", ")
}

// Rows reads columns of a table as sorted lines of text, all rows or those that meet a condition ("" or SQL).
func Rows(ctx context.Context, db *pgxpool.Pool, t *schema.Table, columns []schema.Column, where string) ([]string, error) {
	q := "SELECT " + list(columns) + " FROM " + t.Ident()
	if where != "" {
		q += " WHERE " + where
	}
	rows, err := db.Query(ctx, q, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var line []string
		for _, v := range rows.RawValues() {
			if v == nil {
				line = append(line, "null")
			} else {
				line = append(line, strconv.Quote(string(v)))
			}
		}
		out = append(out, strings.Join(line, "|"))
	}
	slices.Sort(out)
	return out, rows.Err()
}

// DeviceRows reads the same of a device's file.
func DeviceRows(ctx context.Context, db *sql.DB, t *schema.Table, columns []schema.Column) ([]string, error) {
	rows, err := db.QueryContext(ctx, "SELECT "+list(columns)+" FROM "+schema.Quote(t.Name))
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var out []string
	for rows.Next() {
		values, into := make([]any, len(columns)), make([]any, len(columns))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			return nil, err
		}
		line := make([]string, len(columns))
		for i, v := range values {
			line[i] = asPostgres(columns[i].Type, v)
		}
		out = append(out, strings.Join(line, "|"))
	}
	slices.Sort(out)
	return out, rows.Err()
}

// asPostgres writes a SQLite value as PostgreSQL does.
func asPostgres(typ string, v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case int64:
		if typ == "boolean" {
			return strconv.Quote(map[int64]string{0: "f", 1: "t"}[v])
		}
		return strconv.Quote(strconv.FormatInt(v, 10))
	case []byte:
		return strconv.Quote(`\x` + hex.EncodeToString(v))
	default:
		return strconv.Quote(fmt.Sprint(v))
	}
}

// Difference names the first lines that only one of two sorted lists has; empty: they are equal.
func Difference(a, b []string) string {
	only := func(x, y []string) []string {
		var out []string
		for _, l := range x {
			if _, found := slices.BinarySearch(y, l); !found {
				out = append(out, l)
			}
		}
		return out
	}
	left, right := only(a, b), only(b, a)
	if len(left)+len(right) == 0 && len(a) == len(b) {
		return ""
	}
	first := func(l []string) string {
		if len(l) == 0 {
			return "-"
		}
		return l[0]
	}
	return fmt.Sprintf("%d and %d rows, %d and %d of them alone; first: %s and %s", len(a), len(b), len(left), len(right), first(left), first(right))
}
