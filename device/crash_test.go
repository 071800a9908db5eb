package device

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"os"
	"strings"
	"testing"
)

// errKilled is what the statements of a process that was killed come to.
var errKilled = errors.New("killed")

// mortal opens files as a process that can be killed between any two statements: what the disk holds at that moment is copied, and no
// statement has an effect any more.
type mortal struct {
	path    string
	left    int  // statements until the end; 0: it lives on
	schema  bool // they count from the first one that changes the schema
	changed bool // there was one
	dead    bool
	copied  string // what the disk held, if it is dead
}

// open gives a handle for Options.DB.
func (m *mortal) open(t interface{ Fatalf(string, ...any) }) *sql.DB {
	plain, err := openFile(m.path)
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer func() { _ = plain.Close() }()
	return sql.OpenDB(&mortalConnector{m: m, driver: plain.Driver(), dsn: "file:" + m.path + "?_pragma=busy_timeout(15000)&_pragma=journal_mode(WAL)&_pragma=synchronous(OFF)"})
}

// statement comes before each one.
func (m *mortal) statement(q string) error {
	if m.dead {
		return errKilled
	}
	for _, verb := range []string{"ALTER TABLE", "DROP TABLE", "CREATE TABLE "} {
		m.changed = m.changed || strings.HasPrefix(q, verb)
	}
	if m.left == 0 || m.schema && !m.changed {
		return nil
	}
	if m.left--; m.left > 0 {
		return nil
	}
	m.dead, m.copied = true, m.path+"+"
	for _, tail := range []string{"", "-wal"} {
		data, err := os.ReadFile(m.path + tail)
		if err == nil {
			err = os.WriteFile(m.copied+tail, data, 0o600)
		}
		if err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return errKilled
}

type mortalConnector struct {
	m      *mortal
	driver driver.Driver
	dsn    string
}

func (c *mortalConnector) Driver() driver.Driver { return c.driver }

func (c *mortalConnector) Connect(context.Context) (driver.Conn, error) {
	if c.m.dead {
		return nil, errKilled
	}
	conn, err := c.driver.Open(c.dsn)
	if err != nil {
		return nil, err
	}
	return &mortalConn{conn, c.m}, nil
}

type mortalConn struct {
	driver.Conn
	m *mortal
}

func (c *mortalConn) ExecContext(ctx context.Context, q string, args []driver.NamedValue) (driver.Result, error) {
	if err := c.m.statement(q); err != nil {
		return nil, err
	}
	return c.Conn.(driver.ExecerContext).ExecContext(ctx, q, args)
}

func (c *mortalConn) QueryContext(ctx context.Context, q string, args []driver.NamedValue) (driver.Rows, error) {
	if err := c.m.statement(q); err != nil {
		return nil, err
	}
	return c.Conn.(driver.QueryerContext).QueryContext(ctx, q, args)
}

func (c *mortalConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	if err := c.m.statement("BEGIN"); err != nil {
		return nil, err
	}
	return c.Conn.(driver.ConnBeginTx).BeginTx(ctx, opts)
}

func (c *mortalConn) PrepareContext(ctx context.Context, q string) (driver.Stmt, error) {
	if c.m.dead {
		return nil, errKilled
	}
	s, err := c.Conn.(driver.ConnPrepareContext).PrepareContext(ctx, q)
	if err != nil {
		return nil, err
	}
	return &mortalStmt{s, c.m, q}, nil
}

type mortalStmt struct {
	driver.Stmt
	m *mortal
	q string
}

func (s *mortalStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	if err := s.m.statement(s.q); err != nil {
		return nil, err
	}
	return s.Stmt.(driver.StmtExecContext).ExecContext(ctx, args)
}

func (s *mortalStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	if err := s.m.statement(s.q); err != nil {
		return nil, err
	}
	return s.Stmt.(driver.StmtQueryContext).QueryContext(ctx, args)
}

// TestMortal: the copy of a process that was killed in a transaction has what was committed, and no more.
func TestMortal(t *testing.T) {
	m := &mortal{path: t.TempDir() + "/a.db"}
	db := m.open(t)
	for _, q := range []string{"CREATE TABLE a (x)", "INSERT INTO a VALUES (1)"} {
		if _, err := db.Exec(q); err != nil {
			t.Fatal(err)
		}
	}
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	m.left = 3
	for i := range 4 {
		if _, err := tx.Exec("INSERT INTO a VALUES (2)"); (i >= 2) != errors.Is(err, errKilled) {
			t.Fatalf("%d: %v", i, err)
		}
	}
	_ = tx.Rollback()
	_ = db.Close()
	db = (&mortal{path: m.copied}).open(t)
	defer func() { _ = db.Close() }()
	var n int
	if err := db.QueryRow("SELECT sum(x) FROM a").Scan(&n); err != nil || n != 1 {
		t.Errorf("%d, %v", n, err)
	}
}
