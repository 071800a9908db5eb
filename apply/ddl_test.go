package apply_test

import (
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/waystage/waystage/conflict"
)

// ddlTables are a table to be altered, one beside it, and a child of the first.
const ddlTables = `
	CREATE TYPE mood AS ENUM ('ok', 'bad');
	CREATE DOMAIN short AS text CHECK (length(value) < 10);
	CREATE TABLE a (id int PRIMARY KEY, v text, w int, m mood, d short, u int NOT NULL DEFAULT 0);
	CREATE TABLE b (id int PRIMARY KEY, v text);
	CREATE TABLE kid (id int PRIMARY KEY, a_id int REFERENCES a);
	INSERT INTO a VALUES (1, 'one', 10), (2, 'two', 20);
	INSERT INTO b VALUES (1, 'one');
	INSERT INTO kid VALUES (1, 1)`

func newDDLRig(t *testing.T) (*rig, *observer.ObservedLogs) {
	t.Helper()
	r := newRig(t, ddlTables, "public.a", "public.b", "public.kid")
	core, logs := observer.New(zapcore.ErrorLevel)
	r.log = zap.New(zapcore.NewTee(r.log.Core(), core))
	return r, logs
}

// stop is the code of a table's stop, empty when it takes part.
func (r *rig) stopCode(table string) string {
	return r.text(r.mirror, "SELECT coalesce(stopped_code, '') FROM waystage.synced_table WHERE schema_name || '.' || table_name = $1", table)
}

func setCol(table, key, column, value string) rec {
	return rec{table: table, op: conflict.Update, key: []string{key}, img: map[string]any{column: value}}
}

// What adds to a table, or changes only what the source judges by, goes on without anybody doing anything.
func TestHazardDDLHandled(t *testing.T) {
	for name, c := range map[string]struct {
		ddl  []string
		then string // at the source
	}{
		"add column":                  {[]string{"ALTER TABLE a ADD COLUMN x text"}, "UPDATE a SET x = 'x', v = 'uno' WHERE id = 1"},
		"add column with a default":   {[]string{"ALTER TABLE a ADD COLUMN x int NOT NULL DEFAULT 7"}, "INSERT INTO a VALUES (3, 'three', 30)"},
		"add column, volatile":        {[]string{"ALTER TABLE a ADD COLUMN x float NOT NULL DEFAULT random()"}, "UPDATE a SET w = 11 WHERE id = 1"},
		"drop an added column":        {[]string{"ALTER TABLE a ADD COLUMN x text", "ALTER TABLE a DROP COLUMN x"}, "UPDATE a SET w = 11 WHERE id = 1"},
		"add and drop constraints":    {[]string{"ALTER TABLE a ADD CHECK (w < 1000), ADD UNIQUE (v)", "ALTER TABLE kid DROP CONSTRAINT kid_a_id_fkey", "ALTER TABLE b ADD FOREIGN KEY (id) REFERENCES a"}, "UPDATE a SET w = 11 WHERE id = 1"},
		"add an enum label":           {[]string{"ALTER TYPE mood ADD VALUE 'better'"}, "UPDATE a SET m = 'better' WHERE id = 1"},
		"change a domain":             {[]string{"ALTER DOMAIN short DROP CONSTRAINT short_check"}, "UPDATE a SET d = 'much longer than before' WHERE id = 1"},
		"replica identity full":       {[]string{"ALTER TABLE a REPLICA IDENTITY FULL"}, "UPDATE a SET w = 11 WHERE id = 1; INSERT INTO a VALUES (4, 'four', 40); UPDATE a SET w = 44 WHERE id = 4; DELETE FROM a WHERE id = 4"},
		"drop default and not null":   {[]string{"ALTER TABLE a ALTER u DROP DEFAULT, ALTER u DROP NOT NULL"}, "INSERT INTO a (id) VALUES (3)"},
		"add an index and a trigger":  {[]string{"CREATE INDEX ON a (v)", "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.w := 77; RETURN NEW; END'", "CREATE TRIGGER t BEFORE UPDATE ON a FOR EACH ROW EXECUTE FUNCTION f()"}, "UPDATE a SET v = 'uno' WHERE id = 1"},
		"rename the key's constraint": {[]string{"ALTER TABLE a RENAME CONSTRAINT a_pkey TO other"}, "UPDATE a SET w = 11 WHERE id = 1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, logs := newDDLRig(t)
			r.start(allWorkers...)
			r.merge(setCol("public.a", "1", "v", "before"))
			r.settled()
			for _, ddl := range c.ddl {
				r.exec(r.source, ddl)
			}
			r.foreign(c.then)
			ids := r.merge(setCol("public.a", "2", "v", "after"), rec{table: "public.a", op: conflict.Insert, key: []string{"9"}, img: map[string]any{"v": "new", "u": "5"}})
			r.merge(setCol("public.b", "1", "v", "after"))
			r.settled()
			for _, id := range ids {
				if v := r.verdict(id); v != "applied" {
					t.Errorf("change %d: %s", id, v)
				}
			}
			if code := r.stopCode("public.a"); code != "" || logs.Len() > 0 {
				t.Errorf("stopped: %q, %v", code, logs.All())
			}
		})
	}
}

// What takes away from a table stops it alone: the other tables flow in both directions, and records for the stopped one, or
// that depend on it, wait.
func TestHazardDDLStopsTheTableAlone(t *testing.T) {
	for name, c := range map[string]struct {
		ddl, then string // at the source; then makes the stream show it
		code      string
		device    bool // noticed by the up side: nothing comes down
	}{
		"drop column":              {"ALTER TABLE a DROP COLUMN w", "UPDATE a SET v = 'uno' WHERE id = 1", "column_missing", false},
		"rename column":            {"ALTER TABLE a RENAME w TO width", "UPDATE a SET v = 'uno' WHERE id = 1", "column_missing", false},
		"retype column":            {"ALTER TABLE a ALTER w TYPE bigint", "INSERT INTO a VALUES (3, 'three', 30000000000)", "column_type", false},
		"retype column, modifier":  {"ALTER TABLE a ALTER v TYPE varchar(50)", "DELETE FROM a WHERE id = 2", "column_type", false},
		"rename table":             {"ALTER TABLE a RENAME TO a2", "UPDATE a2 SET v = 'uno' WHERE id = 1", "table_renamed", false},
		"move table":               {"CREATE SCHEMA s2; ALTER TABLE a SET SCHEMA s2", "UPDATE s2.a SET v = 'uno' WHERE id = 1", "table_renamed", false},
		"drop table":               {"DROP TABLE a CASCADE", "", "table_missing", true},
		"drop column, no traffic":  {"ALTER TABLE a DROP COLUMN v", "", "column_missing", true},
		"other primary key":        {"ALTER TABLE kid DROP CONSTRAINT kid_a_id_fkey; ALTER TABLE a DROP CONSTRAINT a_pkey, ADD PRIMARY KEY (id, u)", "UPDATE a SET v = 'uno' WHERE id = 1", "key_changed", false},
		"primary key elsewhere":    {"ALTER TABLE kid DROP CONSTRAINT kid_a_id_fkey; UPDATE a SET u = id; ALTER TABLE a DROP CONSTRAINT a_pkey, ADD PRIMARY KEY (u)", "UPDATE a SET v = 'uno' WHERE id = 1", "key_changed", false},
		"no primary key":           {"ALTER TABLE kid DROP CONSTRAINT kid_a_id_fkey; ALTER TABLE a DROP CONSTRAINT a_pkey", "INSERT INTO a VALUES (3)", "replica_identity", false},
		"replica identity nothing": {"ALTER TABLE a REPLICA IDENTITY NOTHING", "INSERT INTO a VALUES (3)", "replica_identity", false},
		"replica identity elsewhere": {"UPDATE a SET u = id; CREATE UNIQUE INDEX i ON a (u); ALTER TABLE a REPLICA IDENTITY USING INDEX i",
			"UPDATE a SET v = 'uno' WHERE id = 1", "replica_identity", false},
		"drop and make again": {"DROP TABLE a CASCADE; CREATE TABLE a (id int PRIMARY KEY, v text, w int, m mood, d short, u int NOT NULL DEFAULT 0); ALTER PUBLICATION waystage ADD TABLE a",
			"INSERT INTO a VALUES (1)", "table_replaced", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, logs := newDDLRig(t)
			r.start(allWorkers...)
			r.merge(setCol("public.a", "1", "v", "before"))
			r.settled()
			r.foreign("INSERT INTO b VALUES (2, 'before')")
			r.exec(r.source, c.ddl)
			if c.then != "" {
				r.foreign(c.then, "INSERT INTO b VALUES (3, 'in the same transaction')")
			}
			if !c.device {
				r.eventually("the table stops", func() bool { return r.stopCode("public.a") != "" })
			}
			waiting := r.merge(setCol("public.a", "1", "v", "after"), rec{table: "public.a", op: conflict.Insert, key: []string{"9"}, img: map[string]any{"v": "new"}},
				rec{table: "public.kid", op: conflict.Insert, key: []string{"9"}, img: map[string]any{"a_id": "9"}})
			r.eventually("the table stops", func() bool { return r.stopCode("public.a") != "" })
			if code := r.stopCode("public.a"); code != c.code {
				t.Errorf("stopped as %s, want %s", code, c.code)
			}
			delete(r.tables, "public.a") // the others are what must agree
			delete(r.tables, "public.kid")
			for range 3 {
				flowing := r.merge(rec{table: "public.b", op: conflict.Update, key: []string{"1"}, img: map[string]any{"v": "after"}})
				r.foreign("UPDATE b SET v = v || '+' WHERE id = 2")
				r.eventually("records of other tables go up", func() bool { return r.verdict(flowing[0]) == "applied" })
				r.eventually("changes of other tables come down", func() bool { return r.diff("public.b") == "" })
			}
			if code := r.stopCode("public.b"); code != "" {
				t.Errorf("the other table is stopped too: %s", code)
			}
			r.eventually("records for the stopped table are parked", func() bool {
				return r.text(r.mirror, "SELECT count(*)::text FROM waystage.parked") == "3"
			})
			for _, id := range waiting {
				if v := r.verdict(id); v != "merged" {
					t.Errorf("change %d of a stopped table, or of one that depends on it: %s", id, v)
				}
			}
			if n := logs.FilterMessageSnippet("a table is stopped").Len(); n != 1 {
				t.Errorf("the log names the stop %d times: %v", n, logs.All())
			}
			// A restart finds it as it was.
			r.stop("down", "up")
			r.start("down", "up")
			flowing := r.merge(setCol("public.b", "1", "v", "later"))
			r.eventually("records of other tables go up after a restart", func() bool { return r.verdict(flowing[0]) == "applied" })
		})
	}
}
