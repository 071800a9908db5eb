// Package pgtest gives tests databases on real PostgreSQL servers. Only tests import it.
//
// It promises each test a fresh, empty database on one of two clusters (a source and a mirror) that are started
// when first asked for and shared by the test binary, and that nothing of them is left when the binary ends.
// A machine without PostgreSQL fails the test and says what to run; it never skips it.
//
//	func TestMain(m *testing.M) { pgtest.Main(m) }
//
//	func TestSomething(t *testing.T) {
//		conn, err := pgx.Connect(ctx, pgtest.Source(t))
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/waystage/waystage/internal/pgcluster"
)

// EnvMajor names the environment variable that says which PostgreSQL major version the tests run on.
// Without it: 15 if there is one, else the newest found.
const EnvMajor = "WAYSTAGE_TEST_PG"

// startTimeout is generous: several test binaries start their clusters at the same time on small machines.
const startTimeout = 3 * time.Minute

// shared is a cluster of this test binary, started when first asked for.
type shared struct {
	name    string
	once    sync.Once
	cluster *pgcluster.Cluster
	err     error
}

var (
	source = shared{name: "source"}
	mirror = shared{name: "mirror"}

	folder struct {
		once sync.Once
		dir  string
		lock *os.File
		err  error
	}
	databases atomic.Int64 // numbers the databases
)

// Main runs the tests and removes the clusters. Call it from TestMain.
func Main(m *testing.M) {
	code := m.Run()
	os.Exit(max(code, removeAll()))
}

// MainNoLeaks is Main, and fails the run if the tests left goroutines behind.
func MainNoLeaks(m *testing.M, ignored ...goleak.Option) {
	code := m.Run()
	code = max(code, removeAll())
	if code == 0 {
		if err := goleak.Find(ignored...); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left behind:", err)
			code = 1
		}
	}
	os.Exit(code)
}

func removeAll() int {
	var errs []error
	for _, s := range []*shared{&source, &mirror} {
		if s.cluster != nil {
			errs = append(errs, s.cluster.Remove())
		}
	}
	if folder.dir != "" {
		errs = append(errs, os.RemoveAll(folder.dir), folder.lock.Close())
	}
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(os.Stderr, "pgtest: clean up:", err)
		return 1
	}
	return 0
}

// Major is the PostgreSQL major version that the tests run on.
func Major() (int, error) {
	if v := os.Getenv(EnvMajor); v != "" {
		major, err := strconv.Atoi(v)
		if err != nil {
			return 0, fmt.Errorf("%s=%q is not a PostgreSQL major version", EnvMajor, v)
		}
		return major, nil
	}
	if _, err := pgcluster.Find(pgcluster.MinMajor); err == nil {
		return pgcluster.MinMajor, nil
	}
	b, err := pgcluster.Find(0)
	return b.Major, err
}

// Source is the connection string of a fresh database on the source cluster. It is dropped when the test ends,
// with its replication slots and whoever is still connected.
func Source(t testing.TB) string {
	t.Helper()
	return database(t, SourceCluster(t))
}

// Mirror is the same on the mirror cluster.
func Mirror(t testing.TB) string {
	t.Helper()
	return database(t, MirrorCluster(t))
}

// SourceCluster is the shared source cluster. A test that stops it must start it again.
func SourceCluster(t testing.TB) *pgcluster.Cluster {
	t.Helper()
	return source.get(t)
}

// MirrorCluster is the shared mirror cluster. A test that stops it must start it again.
func MirrorCluster(t testing.TB) *pgcluster.Cluster {
	t.Helper()
	return mirror.get(t)
}

// Cluster starts a cluster for this test alone, to be killed or changed at will; it is removed when the test ends.
// It has the settings of the shared ones (no fsync) with params over them.
func Cluster(t testing.TB, params map[string]string) *pgcluster.Cluster {
	t.Helper()
	dir, err := testFolder()
	if err != nil {
		t.Fatal(err)
	}
	c, err := start(filepath.Join(dir, fmt.Sprintf("own-%d", databases.Add(1))), params)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(); err != nil {
			t.Errorf("remove cluster: %v", err)
		}
	})
	return c
}

func (s *shared) get(t testing.TB) *pgcluster.Cluster {
	t.Helper()
	s.once.Do(func() {
		dir, err := testFolder()
		if err != nil {
			s.err = err
			return
		}
		s.cluster, s.err = start(filepath.Join(dir, s.name), nil)
	})
	if s.err != nil {
		t.Fatal(s.err)
	}
	return s.cluster
}

func start(dir string, params map[string]string) (*pgcluster.Cluster, error) {
	major, err := Major()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	all := map[string]string{"max_prepared_transactions": "10"}
	maps.Copy(all, params)
	return pgcluster.Start(ctx, pgcluster.Options{Dir: dir, Major: major, Params: all, Unsafe: true})
}

const folderPattern = "waystage-test-"

// testFolder is this binary's folder for clusters. A file in it is locked while the binary runs; folders whose lock is
// free were left by binaries that were killed, and are removed.
func testFolder() (string, error) {
	folder.once.Do(func() {
		dir, err := pgcluster.TempDir(folderPattern + "*")
		if err != nil {
			folder.err = err
			return
		}
		folder.lock, folder.err = lockFile(dir)
		folder.dir = dir
		sweep(filepath.Dir(dir))
	})
	return folder.dir, folder.err
}

func lockFile(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
	}
	return f, nil
}

// sweep is best effort: what it cannot remove (another user's, or one just being made) is left alone.
func sweep(base string) {
	dirs, _ := filepath.Glob(filepath.Join(base, folderPattern+"*"))
	for _, dir := range dirs {
		info, err := os.Stat(filepath.Join(dir, "lock"))
		if err != nil || time.Since(info.ModTime()) < time.Minute {
			continue
		}
		if f, err := lockFile(dir); err == nil {
			_ = os.RemoveAll(dir)
			_ = f.Close()
		}
	}
}

func database(t testing.TB, c *pgcluster.Cluster) string {
	t.Helper()
	name := databaseName(t.Name(), databases.Add(1))
	if err := admin(c, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize()+" TEMPLATE template0")
		return err
	}); err != nil {
		t.Fatalf("create database: %v", err)
	}
	t.Cleanup(func() {
		if !c.Running() {
			t.Errorf("the shared cluster in %s was not started again", c.Dir())
			return
		}
		if err := admin(c, func(ctx context.Context, conn *pgx.Conn) error { return drop(ctx, conn, name) }); err != nil {
			t.Errorf("drop database %s: %v", name, err)
		}
	})
	return c.DSN(name)
}

// databaseName carries the test's name, so that server logs can be read.
func databaseName(test string, n int64) string {
	clean := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '_':
			return r
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		}
		return '_'
	}, test)
	const longest = 50 // of PostgreSQL's 63
	return fmt.Sprintf("t%d_%s", n, clean[:min(len(clean), longest)])
}

func admin(c *pgcluster.Cluster, do func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, c.DSN("postgres"))
	if err != nil {
		return err
	}
	return errors.Join(do(ctx, conn), conn.Close(ctx))
}

// drop removes the database with its replication slots, in whoever's use they are.
func drop(ctx context.Context, conn *pgx.Conn, name string) error {
	for {
		var left int
		if err := conn.QueryRow(ctx, `
			SELECT count(CASE WHEN active_pid IS NOT NULL
				THEN pg_terminate_backend(active_pid)::text
				ELSE pg_drop_replication_slot(slot_name)::text END)
			  FROM pg_replication_slots WHERE database = $1`, name).Scan(&left); err != nil {
			// A slot may be taken or dropped between reading the view and dropping it: look again until time is up.
			if ctx.Err() != nil {
				return err
			}
		} else if left == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("slots of %s are still in use: %w", name, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
	_, err := conn.Exec(ctx, "DROP DATABASE "+pgx.Identifier{name}.Sanitize()+" WITH (FORCE)")
	return err
}
