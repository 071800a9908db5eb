package pgtest_test

import (
	"context"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.MainNoLeaks(m) }

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) }) // may have been ended with its database
	return conn
}

func scan(t *testing.T, conn *pgx.Conn, sql string, args ...any) string {
	t.Helper()
	var v string
	if err := conn.QueryRow(context.Background(), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

func TestDatabasesAreFreshAndSeparate(t *testing.T) {
	t.Parallel()
	a, b, m := pgtest.Source(t), pgtest.Source(t), pgtest.Mirror(t)
	if a == b || pgtest.SourceCluster(t) == pgtest.MirrorCluster(t) {
		t.Fatal("shared where it must not be")
	}
	for _, dsn := range []string{a, b, m} {
		conn := connect(t, dsn)
		if got := scan(t, conn, "select count(*)::text from pg_class where relnamespace = 'public'::regnamespace"); got != "0" {
			t.Errorf("%s relations in a fresh database", got)
		}
		if _, err := conn.Exec(context.Background(), "create table t ()"); err != nil {
			t.Error(err)
		}
	}
	identifier := "select system_identifier::text from pg_control_system()"
	if scan(t, connect(t, a), identifier) == scan(t, connect(t, m), identifier) {
		t.Error("source and mirror have the same system identifier")
	}
}

func TestMajor(t *testing.T) {
	t.Parallel()
	want, err := pgtest.Major()
	if err != nil {
		t.Fatal(err)
	}
	got := scan(t, connect(t, pgtest.Mirror(t)), "select current_setting('server_version_num')")
	if !strings.HasPrefix(got, strconv.Itoa(want)) {
		t.Errorf("server version %s, want major %d", got, want)
	}
}

// A database goes with its slots, also one that a replication connection is using, and with open connections.
func TestDatabaseIsDroppedWithItsSlots(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	var name string
	var repl *pgconn.PgConn
	t.Cleanup(func() { _ = repl.Close(ctx) }) // ended with its database
	t.Run("use", func(t *testing.T) {
		dsn := pgtest.Source(t)
		conn := connect(t, dsn)
		name = scan(t, conn, "select current_database()")
		idle, used := name+"_idle", name+"_used"
		for _, slot := range []string{idle, used} {
			if _, err := conn.Exec(ctx, "select pg_create_logical_replication_slot($1, 'pgoutput')", slot); err != nil {
				t.Fatal(err)
			}
		}
		var err error
		if repl, err = pgconn.Connect(ctx, dsn+"&replication=database"); err != nil {
			t.Fatal(err)
		}
		if err := pglogrepl.StartReplication(ctx, repl, used, 0, pglogrepl.StartReplicationOptions{
			PluginArgs: []string{"proto_version '1'", "publication_names 'none'"},
		}); err != nil {
			t.Fatal(err)
		}
	})
	conn := connect(t, pgtest.Source(t))
	if got := scan(t, conn, "select count(*)::text from pg_database where datname = $1", name); got != "0" {
		t.Errorf("database %s is still there", name)
	}
	if got := scan(t, conn, "select count(*)::text from pg_replication_slots where database = $1", name); got != "0" {
		t.Errorf("slots of %s are still there", name)
	}
}

func TestOwnCluster(t *testing.T) {
	t.Parallel()
	c := pgtest.Cluster(t, map[string]string{"max_connections": "17"})
	conn := connect(t, c.DSN("postgres"))
	if got := scan(t, conn, "select current_setting('max_connections')"); got != "17" {
		t.Errorf("max_connections = %s", got)
	}
	c.Kill()
	if err := c.Restart(context.Background()); err != nil {
		t.Fatal(err)
	}
	scan(t, connect(t, c.DSN("postgres")), "select 1::text")
}
