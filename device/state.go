package device

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/waystage/waystage/protocol"
)

// format is the version of the layout of our own tables in the file.
const format = 1

// Our own tables. They live in the application's file so that they commit together with its rows.
//
//	_ws_state     one row: identity, incarnation and number of the last session, the open session, the capture switch
//	_ws_set       subscription sets, their cursors, and which are done in the running sync
//	_ws_table     synced tables by wire name; _ws_set_table says how each set defines them
//	_ws_outbox    frozen requests, kept until every record in them has its final verdict (rule D1)
//	_ws_record    those records; gone when final
//	_ws_inbox     pages of the reply that is being fetched
//	_ws_rejected  the rejected log
//	_ws_receipt   what has become of each record, for Log; the times of what a session has in common are in _ws_session
//	_ws_verify    of each set, the verification that is under way and what the last one found
//	_ws_log       a ring of the last syncs
//	_ws_broken    units of which the device itself rejected a row
//	_ws_file      files by path: what the server has, and which content is here; _ws_file_member says by which sets and
//	              subscriptions, _ws_file_def what these are
//	_ws_upload    changes of files made here, and what has become of them
//	waystage_unit the application's: while it has its one row, edits belong together (see unit.go)
//
// For each synced table t also _ws_s_t (one row per dirty row, written by the triggers), _ws_u_t (the units of those
// rows) and _ws_v_t (one row per row that the server sent: its version).
const ownTables = `
CREATE TABLE IF NOT EXISTS _ws_state (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  format INTEGER NOT NULL,
  capture INTEGER NOT NULL DEFAULT 1,
  incarnation TEXT NOT NULL,
  n INTEGER NOT NULL DEFAULT 0,
  open_n INTEGER,
  epoch TEXT NOT NULL DEFAULT '',
  running INTEGER NOT NULL DEFAULT 0,
  generation INTEGER NOT NULL DEFAULT 0,
  local_rejects INTEGER NOT NULL DEFAULT 0,
  most_changes INTEGER NOT NULL DEFAULT 0,
  keep_rejects INTEGER NOT NULL DEFAULT 0,
  keep_receipts INTEGER NOT NULL DEFAULT 0,
  keep_syncs INTEGER NOT NULL DEFAULT 0,
  user TEXT NOT NULL DEFAULT '',
  device TEXT NOT NULL DEFAULT '',
  servers TEXT NOT NULL DEFAULT '',
  seed BLOB,
  next_seed BLOB,
  key_at INTEGER NOT NULL DEFAULT 0,
  key_life INTEGER NOT NULL DEFAULT 0,
  new_key INTEGER NOT NULL DEFAULT 0,
  built TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS _ws_set (
  name TEXT PRIMARY KEY,
  bit INTEGER NOT NULL UNIQUE,
  ord INTEGER NOT NULL,
  cursor TEXT NOT NULL DEFAULT '',
  hash TEXT NOT NULL DEFAULT '',
  todo INTEGER NOT NULL DEFAULT 0,
  gone INTEGER NOT NULL DEFAULT 0,
  synced_at INTEGER NOT NULL DEFAULT 0,
  closed_at INTEGER NOT NULL DEFAULT 0,
  closed_until INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS _ws_table (
  wire TEXT PRIMARY KEY,
  local TEXT NOT NULL UNIQUE,
  def TEXT NOT NULL,
  capture TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS _ws_set_table (
  set_name TEXT NOT NULL,
  wire TEXT NOT NULL,
  ord INTEGER NOT NULL,
  def TEXT NOT NULL,
  PRIMARY KEY (set_name, wire)
);
CREATE TABLE IF NOT EXISTS _ws_outbox (
  incarnation TEXT NOT NULL,
  n INTEGER NOT NULL,
  set_name TEXT NOT NULL,
  nonce TEXT NOT NULL,
  cursor_from TEXT NOT NULL,
  content_type TEXT NOT NULL,
  encoding TEXT NOT NULL,
  payload BLOB NOT NULL,
  records INTEGER NOT NULL,
  resend INTEGER NOT NULL DEFAULT 0,
  seq INTEGER NOT NULL,
  created INTEGER NOT NULL,
  PRIMARY KEY (incarnation, n)
);
CREATE TABLE IF NOT EXISTS _ws_record (
  incarnation TEXT NOT NULL,
  n INTEGER NOT NULL,
  idx INTEGER NOT NULL,
  wire TEXT NOT NULL,
  state TEXT NOT NULL,
  PRIMARY KEY (incarnation, n, idx)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _ws_inbox (
  page INTEGER PRIMARY KEY,
  reply TEXT NOT NULL,
  content_type TEXT NOT NULL,
  encoding TEXT NOT NULL,
  verdicts INTEGER NOT NULL,
  last INTEGER NOT NULL,
  body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS _ws_rejected (
  entry INTEGER PRIMARY KEY AUTOINCREMENT,
  incarnation TEXT NOT NULL,
  n INTEGER NOT NULL,
  idx INTEGER NOT NULL,
  id INTEGER NOT NULL DEFAULT 0,
  unit INTEGER NOT NULL DEFAULT 0,
  at INTEGER NOT NULL,
  set_name TEXT NOT NULL,
  wire TEXT NOT NULL,
  local TEXT NOT NULL,
  op TEXT NOT NULL,
  key TEXT NOT NULL,
  base TEXT,
  sent TEXT,
  right TEXT,
  right_version TEXT NOT NULL DEFAULT '',
  state TEXT NOT NULL,
  code TEXT NOT NULL,
  detail TEXT NOT NULL,
  constraint_name TEXT NOT NULL DEFAULT '',
  handling TEXT NOT NULL DEFAULT 'open',
  handled INTEGER,
  UNIQUE (incarnation, n, idx)
);
CREATE INDEX IF NOT EXISTS _ws_rejected_handled ON _ws_rejected (handled) WHERE handled IS NOT NULL;
CREATE TABLE IF NOT EXISTS _ws_verify (
  set_name TEXT PRIMARY KEY,
  step INTEGER NOT NULL DEFAULT 0,
  repair INTEGER NOT NULL DEFAULT 0,
  rounds INTEGER NOT NULL DEFAULT 0,
  buckets INTEGER NOT NULL DEFAULT 0,
  wanted TEXT,
  more INTEGER NOT NULL DEFAULT 0,
  session TEXT NOT NULL DEFAULT '',
  found TEXT,
  result TEXT,
  told INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE IF NOT EXISTS _ws_log (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  report TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS _ws_session (
  incarnation TEXT NOT NULL,
  n INTEGER NOT NULL,
  set_name TEXT NOT NULL,
  frozen INTEGER NOT NULL,
  received INTEGER,
  staged INTEGER,
  PRIMARY KEY (incarnation, n)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS _ws_session_frozen ON _ws_session (frozen);
CREATE TABLE IF NOT EXISTS _ws_receipt (
  incarnation TEXT NOT NULL,
  n INTEGER NOT NULL,
  idx INTEGER NOT NULL,
  wire TEXT NOT NULL,
  op TEXT NOT NULL,
  key TEXT NOT NULL,
  unit INTEGER NOT NULL,
  edited INTEGER NOT NULL,
  state TEXT NOT NULL,
  merged INTEGER,
  final INTEGER,
  version TEXT NOT NULL DEFAULT '',
  code TEXT NOT NULL DEFAULT '',
  detail TEXT NOT NULL DEFAULT '',
  constraint_name TEXT NOT NULL DEFAULT '',
  id INTEGER NOT NULL DEFAULT 0,
  policy TEXT NOT NULL DEFAULT '',
  PRIMARY KEY (incarnation, n, idx)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS _ws_receipt_final ON _ws_receipt (final) WHERE final IS NOT NULL;
CREATE TABLE IF NOT EXISTS _ws_broken (
  unit INTEGER PRIMARY KEY,
  why TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS _ws_file (
  path TEXT PRIMARY KEY,
  version TEXT NOT NULL,
  sha TEXT NOT NULL,
  size INTEGER NOT NULL,
  type TEXT NOT NULL,
  have TEXT NOT NULL DEFAULT '',
  why TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS _ws_file_sha ON _ws_file (sha);
CREATE TABLE IF NOT EXISTS _ws_file_member (
  set_name TEXT NOT NULL,
  sub TEXT NOT NULL,
  path TEXT NOT NULL,
  key TEXT NOT NULL,
  gen INTEGER NOT NULL,
  PRIMARY KEY (set_name, sub, path)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS _ws_file_member_path ON _ws_file_member (path);
CREATE TABLE IF NOT EXISTS _ws_file_def (
  set_name TEXT NOT NULL,
  ord INTEGER NOT NULL,
  name TEXT NOT NULL,
  pattern TEXT NOT NULL,
  upload INTEGER NOT NULL,
  max_size INTEGER NOT NULL,
  PRIMARY KEY (set_name, ord)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _ws_upload (
  id TEXT PRIMARY KEY,
  seq INTEGER NOT NULL,
  set_name TEXT NOT NULL,
  path TEXT NOT NULL,
  op TEXT NOT NULL,
  base TEXT NOT NULL,
  after TEXT NOT NULL DEFAULT '',
  sha TEXT NOT NULL,
  size INTEGER NOT NULL,
  type TEXT NOT NULL,
  state TEXT NOT NULL,
  made INTEGER NOT NULL,
  final INTEGER,
  final_seq INTEGER,
  settled INTEGER NOT NULL DEFAULT 0,
  heal INTEGER NOT NULL DEFAULT 0,
  version TEXT NOT NULL DEFAULT '',
  code TEXT NOT NULL DEFAULT '',
  detail TEXT NOT NULL DEFAULT '',
  right TEXT NOT NULL DEFAULT '',
  record TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS _ws_upload_path ON _ws_upload (path, seq);
CREATE TABLE IF NOT EXISTS waystage_unit (
  id INTEGER PRIMARY KEY AUTOINCREMENT
);
CREATE TRIGGER IF NOT EXISTS _ws_unit BEFORE INSERT ON waystage_unit BEGIN DELETE FROM waystage_unit; END;`

// state is the row of _ws_state.
type state struct {
	Incarnation  string
	N            int64
	Open         sql.NullInt64
	Epoch        string
	Running      bool
	MostChanges  int
	User, Device string
	Built        *protocol.Built // what the application was built for; nil: everything
	Servers      string
	Seed         []byte
	NextSeed     []byte // of the key that is to take its place
	KeyAt        int64  // since when it is the file's: milliseconds since 1970
	KeyLife      int64  // after so many milliseconds another is taken, 0: never
	NewKey       bool   // the operator wants another
}

// randomHex gives n random bytes as hex digits.
func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

// prepare makes our own tables and checks that the file is one that we understand.
func (d *Device) prepare(ctx context.Context) error {
	return d.write(ctx, func(t *txn) error {
		for _, stmt := range strings.Split(ownTables, ";\n") {
			if strings.TrimSpace(stmt) == "" {
				continue
			}
			if err := t.exec(stmt); err != nil {
				return err
			}
		}
		if err := t.exec(`INSERT INTO _ws_state (one, format, incarnation) VALUES (1, ?, ?) ON CONFLICT DO NOTHING`, format, randomHex(16)); err != nil {
			return err
		}
		var f int
		if err := t.get(`SELECT format FROM _ws_state`, nil, &f); err != nil {
			return err
		}
		if f != format {
			return fmt.Errorf("the file has format %d, this program knows format %d: use the program that wrote it, or newer", f, format)
		}
		if err := t.buildFor(d.opts.Built); err != nil {
			return err
		}
		return selfTest(t)
	})
}

// state reads what the file says of itself, outside any other transaction.
func (d *Device) state(ctx context.Context) (st state, err error) {
	err = d.read(ctx, func(t *txn) (err error) {
		st, err = t.state()
		return err
	})
	return st, err
}

// enrolled is state of a file that can log in; ErrNotEnrolled: it cannot.
func (t *txn) enrolled() (state, error) {
	st, err := t.state()
	if err == nil {
		_, err = st.login()
	}
	return st, err
}

func (t *txn) state() (state, error) {
	var s state
	var built string
	err := t.get(`SELECT incarnation, n, open_n, epoch, running, most_changes, user, device, servers, seed,
		next_seed, key_at, key_life, new_key, built FROM _ws_state`, nil,
		&s.Incarnation, &s.N, &s.Open, &s.Epoch, &s.Running, &s.MostChanges, &s.User, &s.Device, &s.Servers, &s.Seed, &s.NextSeed, &s.KeyAt, &s.KeyLife, &s.NewKey, &built)
	if err == nil && built != "" {
		err = json.Unmarshal([]byte(built), &s.Built)
	}
	return s, err
}

// txn is one transaction on a connection of its own.
type txn struct {
	ctx   context.Context
	conn  *sql.Conn
	stmts map[string]*sql.Stmt

	parked map[*table]bool // tables with rows that stepped aside, see put
}

// write runs fn in one transaction that is durable when write returns nil. The connection has foreign keys off: a
// reply is the truth whatever order its rows come in, and a parent may lie outside the device's subset. (SQLite
// ignores that pragma inside a transaction, so it is set before and undone after.)
func (d *Device) write(ctx context.Context, fn func(*txn) error) error {
	return d.transact(ctx, "BEGIN IMMEDIATE", fn)
}

// read runs fn on one consistent snapshot.
func (d *Device) read(ctx context.Context, fn func(*txn) error) error {
	return d.transact(ctx, "BEGIN", fn)
}

func (d *Device) transact(ctx context.Context, begin string, fn func(*txn) error) (err error) {
	conn, err := d.db.Conn(ctx)
	if err != nil {
		return fmt.Errorf("device: %w", err)
	}
	t := &txn{ctx: ctx, conn: conn, stmts: map[string]*sql.Stmt{}, parked: map[*table]bool{}}
	after := context.WithoutCancel(ctx) // what follows must happen even when the caller has gone
	var fk, sync int
	known := false
	defer func() {
		t.close()
		if known {
			_, _ = conn.ExecContext(after, fmt.Sprintf("PRAGMA foreign_keys=%d", fk))
			_, _ = conn.ExecContext(after, fmt.Sprintf("PRAGMA synchronous=%d", sync))
		}
		if cerr := conn.Close(); err == nil && cerr != nil {
			err = cerr
		}
		if err != nil && !strings.HasPrefix(err.Error(), "device: ") {
			err = fmt.Errorf("device: %w", err)
		}
	}()
	if err := t.get("PRAGMA foreign_keys", nil, &fk); err != nil {
		return err
	}
	if err := t.get("PRAGMA synchronous", nil, &sync); err != nil {
		return err
	}
	known = true
	done := false
	defer func() {
		if !done {
			t.close()
			// Even if beginning failed: a driver whose context ends while a statement runs says so although it has run.
			_, _ = conn.ExecContext(after, "ROLLBACK")
		}
	}()
	for _, p := range []string{"PRAGMA foreign_keys=OFF", "PRAGMA synchronous=" + d.durability, begin} {
		if _, err := conn.ExecContext(ctx, p); err != nil {
			return err
		}
	}
	if err := fn(t); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	t.close()
	if _, err := conn.ExecContext(after, "COMMIT"); err != nil {
		return err
	}
	done = true
	return nil
}

func (t *txn) close() {
	for q, s := range t.stmts {
		_ = s.Close()
		delete(t.stmts, q)
	}
}

// exec runs a statement that will not come again in this transaction.
func (t *txn) exec(q string, args ...any) error {
	_, err := t.conn.ExecContext(t.ctx, q, bound(args)...)
	if err != nil {
		return fmt.Errorf("%w (in %s)", err, abridged(q))
	}
	return nil
}

// bound keeps empty blobs from becoming nulls: a driver may read them as nil, and binds nil as null.
func bound(args []any) []any {
	for i, a := range args {
		if b, ok := a.([]byte); ok && b == nil {
			args[i] = []byte{}
		}
	}
	return args
}

func (t *txn) prepared(q string) (*sql.Stmt, error) {
	if s := t.stmts[q]; s != nil {
		return s, nil
	}
	s, err := t.conn.PrepareContext(t.ctx, q)
	if err != nil {
		return nil, fmt.Errorf("%w (in %s)", err, abridged(q))
	}
	t.stmts[q] = s
	return s, nil
}

// run executes a statement that is kept prepared, and says how many rows it touched.
func (t *txn) run(q string, args ...any) (int64, error) {
	s, err := t.prepared(q)
	if err != nil {
		return 0, err
	}
	res, err := s.ExecContext(t.ctx, bound(args)...)
	if err != nil {
		return 0, fmt.Errorf("%w (in %s)", err, abridged(q))
	}
	return res.RowsAffected()
}

// get reads one row; sql.ErrNoRows when there is none.
func (t *txn) get(q string, args []any, into ...any) error {
	s, err := t.prepared(q)
	if err != nil {
		return err
	}
	err = s.QueryRowContext(t.ctx, bound(args)...).Scan(into...)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("%w (in %s)", err, abridged(q))
	}
	return err
}

// each calls fn for every row; scan reads the columns. fn must not use the transaction.
func (t *txn) each(q string, args []any, fn func(scan func(...any) error) error) error {
	rows, err := t.conn.QueryContext(t.ctx, q, bound(args)...)
	if err != nil {
		return fmt.Errorf("%w (in %s)", err, abridged(q))
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		if err := fn(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// values reads n columns of one row as SQLite holds them.
func (t *txn) values(n int, q string, args ...any) ([]any, bool, error) {
	vals, into := make([]any, n), make([]any, n)
	for i := range vals {
		into[i] = &vals[i]
	}
	err := t.get(q, args, into...)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, false, nil
	}
	return vals, err == nil, err
}

func abridged(q string) string {
	q = strings.Join(strings.Fields(q), " ")
	if len(q) > 120 {
		q = q[:120] + "..."
	}
	return q
}

// quote quotes an SQL identifier.
func quote(name string) string {
	return `"` + strings.ReplaceAll(strings.ReplaceAll(name, "\x00", ""), `"`, `""`) + `"`
}

// literal quotes an SQL string.
func literal(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }
