package device

import (
	"context"
	"database/sql"
	"fmt"
	"path/filepath"
	"reflect"
	"sort"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/protocol"
)

// testDefs are tables of many types; public.child refers to public.parent.
func testDefs() *protocol.Definitions {
	return &protocol.Definitions{Hash: "h1", Tables: []protocol.Table{
		{Name: "public.parent", Key: []string{"id"}, Operations: "IUD", Columns: []protocol.Column{
			{Name: "id", Type: "integer", NotNull: true}, {Name: "code", Type: "text"}, {Name: "qty", Type: "integer"},
		}},
		{Name: "public.child", Key: []string{"pid", "no"}, Operations: "IUD", Columns: []protocol.Column{
			{Name: "pid", Type: "integer", NotNull: true}, {Name: "no", Type: "integer", NotNull: true}, {Name: "note", Type: "text"},
		}},
	}}
}

// dump reads whole tables as {table: {key: row}}.
func dump(t fataler, q interface {
	QueryContext(context.Context, string, ...any) (*sql.Rows, error)
}, keys map[string]int) map[string]map[string][]any {
	out := map[string]map[string][]any{}
	for table, nkey := range keys {
		rows, err := q.QueryContext(context.Background(), "SELECT * FROM "+table)
		if err != nil {
			t.Fatalf("%v", err)
		}
		cols, err := rows.Columns()
		if err != nil {
			t.Fatalf("%v", err)
		}
		out[table] = map[string][]any{}
		for rows.Next() {
			vals, into := make([]any, len(cols)), make([]any, len(cols))
			for i := range vals {
				into[i] = &vals[i]
			}
			if err := rows.Scan(into...); err != nil {
				t.Fatalf("%v", err)
			}
			out[table][fmt.Sprint(vals[:nkey]...)] = vals
		}
		if err := rows.Err(); err != nil {
			t.Fatalf("%v", err)
		}
		_ = rows.Close()
	}
	return out
}

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

// TestCaptureFuzz runs random programs and rebuilds the state before them from the rows and the shadow, whatever
// REPLACE, IGNORE, upserts, key changes, unique keys and cascades did.
func TestCaptureFuzz(t *testing.T) {
	for _, recursive := range []bool{false, true} {
		t.Run(fmt.Sprintf("recursive=%v", recursive), func(t *testing.T) {
			ctx := context.Background()
			d, err := Open(ctx, filepath.Join(t.TempDir(), "f.db"), Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = d.Close() }()
			conn, err := d.db.Conn(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			exec := func(t fataler, q string, args ...any) error {
				_, err := conn.ExecContext(ctx, q, args...)
				return err
			}
			if err := d.write(ctx, func(tx *txn) error {
				if err := tx.exec(`INSERT INTO _ws_set (name, bit, ord) VALUES ('s', 1, 0)`); err != nil {
					return err
				}
				// The application rebuilt child with a foreign key and put a unique index on parent.
				if _, err := tx.define("s", testDefs()); err != nil {
					return err
				}
				for _, q := range []string{
					`DROP TABLE child`,
					`CREATE TABLE child (pid BIGINT NOT NULL REFERENCES parent (id) ON DELETE CASCADE ON UPDATE CASCADE, no BIGINT NOT NULL, note TEXT, PRIMARY KEY (pid, no))`,
					`CREATE UNIQUE INDEX parent_code ON parent (code COLLATE NOCASE)`,
				} {
					if err := tx.exec(q); err != nil {
						return err
					}
				}
				c, err := tx.load()
				if err != nil {
					return err
				}
				for _, tab := range c.order {
					if err := tx.install(tab); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			for _, p := range []string{"PRAGMA foreign_keys=ON", fmt.Sprintf("PRAGMA recursive_triggers=%v", recursive), "PRAGMA synchronous=OFF"} {
				if err := exec(t, p); err != nil {
					t.Fatal(err)
				}
			}
			keys := map[string]int{"parent": 1, "child": 2}
			rapid.Check(t, func(t *rapid.T) {
				must := func(q string, args ...any) {
					if err := exec(t, q, args...); err != nil {
						t.Fatalf("%s: %v", q, err)
					}
				}
				must("UPDATE _ws_state SET capture = 0")
				for _, q := range []string{"DELETE FROM child", "DELETE FROM parent", "DELETE FROM _ws_s_parent", "DELETE FROM _ws_s_child"} {
					must(q)
				}
				for i := range rapid.IntRange(0, 4).Draw(t, "parents") {
					must("INSERT INTO parent VALUES (?, ?, ?)", i, fmt.Sprintf("c%d", i), i)
					for n := range rapid.IntRange(0, 2).Draw(t, "children") {
						must("INSERT INTO child VALUES (?, ?, ?)", i, n, "x")
					}
				}
				must("UPDATE _ws_state SET capture = 1")
				before := dump(t, conn, keys)
				var program []string
				id := func() int { return rapid.IntRange(0, 5).Draw(t, "id") }
				code := func() string {
					return rapid.SampledFrom([]string{"NULL", "'c0'", "'C1'", "'c2'", "'c3'", "'d'"}).Draw(t, "code")
				}
				or := func() string {
					return rapid.SampledFrom([]string{"", "OR REPLACE ", "OR IGNORE ", "OR FAIL ", "OR ABORT "}).Draw(t, "or")
				}
				for range rapid.IntRange(1, 8).Draw(t, "steps") {
					q := ""
					switch rapid.IntRange(0, 10).Draw(t, "what") {
					case 0, 1:
						q = fmt.Sprintf("INSERT %sINTO parent VALUES (%d, %s, %d)", or(), id(), code(), id())
					case 2:
						q = fmt.Sprintf("INSERT INTO parent VALUES (%d, %s, 7) ON CONFLICT (id) DO UPDATE SET code = excluded.code, qty = 8", id(), code())
					case 3:
						q = fmt.Sprintf("UPDATE %sparent SET qty = qty + 1 WHERE id = %d", or(), id())
					case 4:
						q = fmt.Sprintf("UPDATE %sparent SET id = %d WHERE id = %d", or(), id(), id())
					case 5:
						q = fmt.Sprintf("UPDATE %sparent SET code = %s WHERE id = %d", or(), code(), id())
					case 6:
						q = fmt.Sprintf("DELETE FROM parent WHERE id = %d", id())
					case 7:
						q = "DELETE FROM " + rapid.SampledFrom([]string{"parent", "child"}).Draw(t, "all")
					case 8:
						q = fmt.Sprintf("INSERT %sINTO child VALUES (%d, %d, 'y')", or(), id(), id())
					case 9:
						q = fmt.Sprintf("UPDATE %schild SET no = %d, note = note || '!'", or(), id())
					case 10:
						q = fmt.Sprintf("REPLACE INTO parent SELECT id + %d, code, qty FROM parent", rapid.IntRange(0, 2).Draw(t, "shift"))
					}
					if err := exec(t, q); err != nil {
						q += " -- " + err.Error() // a refused statement is part of the program
					}
					program = append(program, q)
				}
				after := dump(t, conn, keys)
				for table, nkey := range keys {
					rows, err := conn.QueryContext(ctx, "SELECT * FROM _ws_s_"+table)
					if err != nil {
						t.Fatal(err)
					}
					cols, _ := rows.Columns()
					at := map[string]int{}
					for i, c := range cols {
						at[c] = i
					}
					for rows.Next() {
						vals, into := make([]any, len(cols)), make([]any, len(cols))
						for i := range vals {
							into[i] = &vals[i]
						}
						if err := rows.Scan(into...); err != nil {
							t.Fatal(err)
						}
						var key, base []any
						for i, c := range cols {
							if strings.HasPrefix(c, "k_") {
								key = append(key, vals[i])
							}
							if strings.HasPrefix(c, "b_") {
								base = append(base, vals[i])
							}
						}
						if len(key) != nkey {
							t.Fatalf("shadow of %s has %d key columns", table, len(key))
						}
						if vals[at["base"]] == int64(1) {
							after[table][fmt.Sprint(key...)] = base
						} else {
							delete(after[table], fmt.Sprint(key...))
						}
					}
					if err := rows.Err(); err != nil {
						t.Fatal(err)
					}
					_ = rows.Close()
				}
				if !reflect.DeepEqual(before, after) {
					t.Fatalf("not rebuilt:\nbefore %v\nrebuilt %v\nprogram:\n%s", sorted(before), sorted(after), strings.Join(program, "\n"))
				}
			})
		})
	}
}

func sorted(m map[string]map[string][]any) (out []string) {
	for t, rows := range m {
		for k, r := range rows {
			out = append(out, fmt.Sprint(t, " ", k, ": ", r))
		}
	}
	sort.Strings(out)
	return out
}

// TestCaptureDamage: a table whose triggers are gone is not synced, and Repair puts that right.
func TestCaptureDamage(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	for _, q := range []string{
		`CREATE TABLE copy AS SELECT * FROM item`, `DROP TABLE item`, `ALTER TABLE copy RENAME TO item`,
	} {
		if _, err := d.db.ExecContext(ctx, q); err != nil {
			t.Fatal(err)
		}
	}
	_, err := d.Sync(ctx, SyncOptions{})
	wantErr(t, err, ErrCapture)
	st, err := d.Status(ctx)
	if err != nil || len(st.Problems) != 1 {
		t.Fatalf("%v: %v", err, st.Problems)
	}
	if _, err := d.db.ExecContext(ctx, `DROP TABLE item`); err != nil {
		t.Fatal(err)
	}
	if _, err := d.db.ExecContext(ctx, `CREATE TABLE item (id BIGINT NOT NULL, grp BIGINT, val TEXT, PRIMARY KEY (id))`); err != nil {
		t.Fatal(err)
	}
	if err := d.Repair(ctx); err != nil {
		t.Fatal(err)
	}
	srv.mustSync(t, d)
	srv.same(t, d)
}

// TestCaptureUniqueIndex: an index that the application adds later is taken into the capture at the next sync.
func TestCaptureUniqueIndex(t *testing.T) {
	ctx := context.Background()
	srv := newServer(t)
	srv.foreign("public.item", []string{"1"}, image{"id": ptr("1"), "grp": ptr("1"), "val": ptr("a")})
	srv.foreign("public.item", []string{"2"}, image{"id": ptr("2"), "grp": ptr("1"), "val": ptr("b")})
	d := srv.device(t, "a", Options{})
	srv.mustSync(t, d)
	if _, err := d.db.ExecContext(ctx, `CREATE UNIQUE INDEX item_val ON item (val)`); err != nil {
		t.Fatal(err)
	}
	srv.mustSync(t, d)
	if _, err := d.db.ExecContext(ctx, `INSERT OR REPLACE INTO item VALUES (3, 1, 'a')`); err != nil {
		t.Fatal(err)
	}
	p, err := d.Pending(ctx)
	if err != nil || len(p) != 2 {
		t.Fatalf("%v: %+v, want the insert and the delete that REPLACE made of row 1", err, p)
	}
	// The server swaps the values of two rows: SQLite has no deferred uniqueness.
	srv.mustSync(t, d)
	srv.settleAll()
	srv.foreign("public.item", []string{"2"}, image{"id": ptr("2"), "grp": ptr("1"), "val": ptr("a")})
	srv.foreign("public.item", []string{"3"}, image{"id": ptr("3"), "grp": ptr("1"), "val": ptr("b")})
	srv.mustSync(t, d)
	srv.same(t, d)
	// An index on an expression cannot be watched.
	if _, err := d.db.ExecContext(ctx, `CREATE UNIQUE INDEX item_low ON item (lower(val))`); err != nil {
		t.Fatal(err)
	}
	_, err = d.Sync(ctx, SyncOptions{})
	wantErr(t, err, ErrCapture)
}
