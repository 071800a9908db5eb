package schema

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.MainNoLeaks(m) }

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := Connect(testContext(t), dsn, "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeConn(conn) })
	return conn
}

func exec(t *testing.T, conn *pgx.Conn, sqls ...string) {
	t.Helper()
	for _, sql := range sqls {
		if _, err := conn.Exec(testContext(t), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
}

// column reads a query's only column as text.
func column(t *testing.T, q Querier, sql string, args ...any) []string {
	t.Helper()
	rows, err := q.Query(testContext(t), sql, args...)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	out, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return out
}

func equal(t *testing.T, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("got  %q\nwant %q", got, want)
	}
}

// define parses definitions that must be good.
func define(t *testing.T, body string) *Definitions {
	t.Helper()
	d, problems := ParseDefinitions("test.yaml", []byte(body))
	if d == nil {
		t.Fatalf("definitions: %v", problems)
	}
	return d
}

// defineAll subscribes to whole tables.
func defineAll(t *testing.T, tables ...string) *Definitions {
	t.Helper()
	var b strings.Builder
	b.WriteString("version: 1\nsubscriptions:\n")
	for i, name := range tables {
		b.WriteString("  s" + string(rune('a'+i)) + ":\n    table: " + yamlText(name) + "\n")
	}
	return define(t, b.String())
}
