package pgcluster_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/internal/pgtest"
)

func start(t *testing.T, o pgcluster.Options) *pgcluster.Cluster {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var err error
	if o.Major, err = pgtest.Major(); err != nil {
		t.Fatal(err)
	}
	c, err := pgcluster.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func query(t *testing.T, c *pgcluster.Cluster, sql string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, c.DSN("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var v string
	if err := conn.QueryRow(ctx, sql).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

func run(t *testing.T, c *pgcluster.Cluster, sql string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, c.DSN("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// alive does not count a process that has ended and whose new parent has not asked for its exit status yet.
func alive(pid int) bool {
	if syscall.Kill(pid, 0) != nil {
		return false
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || !strings.Contains(string(text), ") Z ")
}

func gone(t *testing.T, pids []int) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for _, pid := range pids {
		for alive(pid) {
			if time.Now().After(deadline) {
				t.Fatalf("process %d is still there", pid)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func TestClusterLife(t *testing.T) {
	t.Parallel()
	c := start(t, pgcluster.Options{Params: map[string]string{"work_mem": "5MB"}})
	for setting, want := range map[string]string{
		"wal_level": "logical", "max_replication_slots": "100", "max_wal_senders": "100", "fsync": "on",
		"server_encoding": "UTF8", "work_mem": "5MB", "listen_addresses": "127.0.0.1", "unix_socket_directories": "",
	} {
		if got := query(t, c, "select current_setting('"+setting+"')"); got != want {
			t.Errorf("%s = %q, want %q", setting, got, want)
		}
	}
	if got := query(t, c, "select datctype || ' ' || datcollate from pg_database where datname = current_database()"); got != "C C" {
		t.Errorf("locale %s", got)
	}
	if got := query(t, c, "select current_user || ' ' || usesuper from pg_user where usename = current_user"); got != "waystage true" {
		t.Errorf("connected as %s", got)
	}
	owner, err := os.Stat(filepath.Join(c.Dir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	if uid := owner.Sys().(*syscall.Stat_t).Uid; uid == 0 {
		t.Error("the cluster belongs to root")
	}

	run(t, c, "create table kept as select 7 as v")
	port := c.Port()
	c.Stop()
	c.Stop()
	if c.Running() {
		t.Fatal("running after Stop")
	}
	if _, err := os.Stat(filepath.Join(c.Dir(), "data", "postmaster.pid")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("not shut down in order: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := c.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if c.Port() != port {
		t.Errorf("port changed from %d to %d", port, c.Port())
	}

	run(t, c, "insert into kept values (8)")
	pids := append(pgcluster.Processes(c), pgcluster.Children(c)...)
	if len(pids) < 5 {
		t.Errorf("only %d server processes seen", len(pids))
	}
	c.Kill()
	gone(t, pids)
	if err := c.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if got := query(t, c, "select string_agg(v::text, ',' order by v) from kept"); got != "7,8" {
		t.Errorf("after the kill: %s", got)
	}
	if err := c.Restart(ctx); err != nil { // of a running cluster
		t.Fatal(err)
	}
	if got := query(t, c, "select count(*)::text from kept"); got != "2" {
		t.Errorf("after the restart: %s", got)
	}
}

func TestRemoveLeavesNothing(t *testing.T) {
	t.Parallel()
	c := start(t, pgcluster.Options{Unsafe: true})
	if got := query(t, c, "select current_setting('fsync')"); got != "off" {
		t.Errorf("fsync = %s", got)
	}
	pids := append(pgcluster.Processes(c), pgcluster.Children(c)...)
	if err := c.Remove(); err != nil {
		t.Fatal(err)
	}
	gone(t, pids)
	if _, err := os.Stat(c.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is still there: %v", err)
	}
}

func TestExistingClusterIsStartedAgain(t *testing.T) {
	t.Parallel()
	dir, err := pgcluster.TempDir("waystage-pg-test-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := start(t, pgcluster.Options{Dir: filepath.Join(dir, "source"), Unsafe: true})
	run(t, c, "create table kept ()")
	c.Stop()
	again := start(t, pgcluster.Options{Dir: c.Dir(), Unsafe: true})
	if got := query(t, again, "select to_regclass('kept')::text"); got != "kept" {
		t.Errorf("the cluster was not kept: %q", got)
	}
}

func TestStartFailureSaysWhy(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	c, err := pgcluster.Start(ctx, pgcluster.Options{Params: map[string]string{"no_such_setting": "1"}})
	if err == nil {
		c.Remove()
		t.Fatal("started with a setting that does not exist")
	}
	if !strings.Contains(err.Error(), `unrecognized configuration parameter "no_such_setting"`) {
		t.Errorf("the error does not show the server's log: %v", err)
	}
}

func TestNoServer(t *testing.T) {
	t.Parallel()
	_, err := pgcluster.Find(1)
	if !errors.Is(err, pgcluster.ErrNoServer) || !strings.Contains(err.Error(), "scripts/postgresql.sh 1") {
		t.Errorf("got %v", err)
	}
}

func TestFindPrefersEnvironment(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"initdb":   "#!/bin/sh\n",
		"postgres": "#!/bin/sh\necho 'postgres (PostgreSQL) 99.3 (Test)'\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv(pgcluster.EnvBin, "/no/such/folder:"+dir)
	for _, major := range []int{0, 99} {
		b, err := pgcluster.Find(major)
		if err != nil {
			t.Fatal(err)
		}
		if b.Dir != dir || b.Major != 99 || b.Version != "99.3" {
			t.Errorf("Find(%d) = %+v", major, b)
		}
	}
	if b, err := pgcluster.Find(15); err == nil && b.Major != 15 {
		t.Errorf("Find(15) = %+v", b)
	}
}

// TestScript: scripts/postgresql.sh, which make runs, finds programs where Find does.
func TestScript(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"initdb":   "#!/bin/sh\n",
		"postgres": "#!/bin/sh\necho 'postgres (PostgreSQL) 18.99 (Test)'\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script := filepath.Join("..", "..", "scripts", "postgresql.sh")
	for _, wanted := range []string{"18", "any"} {
		c := exec.Command(script, wanted)
		c.Env = append(os.Environ(), pgcluster.EnvBin+"=/no/such/folder:"+dir)
		if out, err := c.CombinedOutput(); err != nil || string(out) != dir+"\n" {
			t.Errorf("%s: %v, %s", wanted, err, out)
		}
	}
	if out, err := exec.Command(script, "14").CombinedOutput(); err == nil || !strings.Contains(string(out), "15, 16, 17, 18 or any") {
		t.Errorf("14: %v, %s", err, out)
	}
}
