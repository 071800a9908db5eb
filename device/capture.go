package device

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"sort"
	"strings"
)

// Capture is six triggers per table that write the row as it was at first touch into the shadow table, and the open unit
// beside it; what was done
// to it is derived later by comparing with the row as it is. Snapshots are taken before the statement acts, because
// REPLACE deletes rows without firing delete triggers. Every write into the shadow ends with a target-less
// ON CONFLICT DO NOTHING: "INSERT OR IGNORE" would become REPLACE under an outer INSERT OR REPLACE and lose the base.

const guard = " WHEN (SELECT capture FROM _ws_state) = 1 BEGIN "

// indexed is one column of a unique index, with the collation that the index compares by.
type indexed struct{ col, collation string }

// triggers generates the capture of a table; uniques are its unique indexes beside the key.
func (tab *table) triggers(uniques [][]indexed) []string {
	live, s := quote(tab.Local), quote(tab.shadow())
	var keyNames []string
	for _, i := range tab.key {
		keyNames = append(keyNames, tab.Cols[i].Local)
	}
	from := func(alias, prefix string) string { // the columns' values of a row
		var l []string
		for _, k := range keyNames {
			l = append(l, alias+"."+quote(k))
		}
		if prefix != "" {
			for _, c := range tab.Cols {
				l = append(l, alias+"."+quote(c.Local))
			}
		}
		return strings.Join(l, ", ")
	}
	now := "CAST(strftime('%s', 'now') AS INTEGER)"
	var bNames []string
	for _, c := range tab.Cols {
		bNames = append(bNames, quote("b_"+c.Local))
	}
	into := "INSERT INTO " + s + " (base, touched, " + tab.sql.keys + ", " + strings.Join(bNames, ", ") + ") "
	// Beside each touched row the number of the unit that is open, if one is (see unit.go); the empty table comes first,
	// so that it costs next to nothing then.
	join := func(row, tables, where string) string {
		for _, k := range keyNames {
			where += " AND s." + quote("k_"+k) + " = " + row + "." + quote(k)
		}
		return "INSERT INTO " + quote(tab.units()) + " (id, unit) SELECT s.id, u.id FROM waystage_unit AS u " + tables + "CROSS JOIN " + s + " AS s WHERE " + where + " ON CONFLICT DO NOTHING; "
	}
	snapshotOld := into + "VALUES (1, " + now + ", " + from("OLD", "b") + ") ON CONFLICT DO NOTHING; " + join("OLD", "", "1")
	absentNew := "INSERT INTO " + s + " (base, touched, " + tab.sql.keys + ") VALUES (0, " + now + ", " + from("NEW", "") + ") ON CONFLICT DO NOTHING; " + join("NEW", "", "1")
	probe := func(cols []indexed) string {
		var l []string
		for _, c := range cols {
			l = append(l, "x."+quote(c.col)+" = NEW."+quote(c.col)+c.collate())
		}
		is := strings.Join(l, " AND ")
		return into + "SELECT 1, " + now + ", " + from("x", "b") + " FROM " + live + " AS x WHERE " + is + " ON CONFLICT DO NOTHING; " +
			join("x", "CROSS JOIN "+live+" AS x ", is)
	}
	var keyCols []indexed
	watched := map[string]bool{}
	for _, k := range keyNames {
		watched[quote(k)] = true
		keyCols = append(keyCols, indexed{col: k})
	}
	probes := probe(keyCols)
	for _, u := range uniques {
		probes += probe(u)
		for _, c := range u {
			watched[quote(c.col)] = true
		}
	}
	var cols, keys, replacing []string
	for _, c := range tab.Cols {
		cols = append(cols, quote(c.Local))
	}
	for _, k := range keyNames {
		keys = append(keys, quote(k))
	}
	for c := range watched {
		replacing = append(replacing, c)
	}
	sort.Strings(replacing)
	make := func(name, event, body string) string {
		return "CREATE TRIGGER " + quote(name+tab.Local) + " " + event + " ON " + live + guard + body + "END"
	}
	return []string{
		make("_ws_bi_", "BEFORE INSERT", probes),
		make("_ws_ai_", "AFTER INSERT", absentNew),
		make("_ws_bu_", "BEFORE UPDATE OF "+strings.Join(cols, ", "), snapshotOld),
		make("_ws_br_", "BEFORE UPDATE OF "+strings.Join(replacing, ", "), probes),
		make("_ws_au_", "AFTER UPDATE OF "+strings.Join(keys, ", "), absentNew),
		make("_ws_ad_", "AFTER DELETE", snapshotOld),
	}
}

var triggerNames = []string{"_ws_bi_", "_ws_ai_", "_ws_bu_", "_ws_br_", "_ws_au_", "_ws_ad_"}

func (i indexed) collate() string {
	if i.collation == "" {
		return ""
	}
	return " COLLATE " + quote(i.collation)
}

// uniques reads the unique indexes that the application has put on a table: REPLACE removes rows by them.
func (t *txn) uniques(tab *table) ([][]indexed, error) {
	var names []string
	err := t.each(`SELECT name FROM pragma_index_list(?) WHERE "unique" AND origin <> 'pk' ORDER BY name`, []any{tab.Local}, func(scan func(...any) error) error {
		names = append(names, "")
		return scan(&names[len(names)-1])
	})
	if err != nil {
		return nil, err
	}
	var out [][]indexed
	for _, n := range names {
		var cols []indexed
		err := t.each(`SELECT name, coll FROM pragma_index_xinfo(?) WHERE key ORDER BY seqno`, []any{n}, func(scan func(...any) error) error {
			var c *string
			var coll string
			if err := scan(&c, &coll); err != nil {
				return err
			}
			if c == nil {
				return fmt.Errorf("%w: the unique index %s of table %s is on an expression, and rows that it replaces would be missed; make it an ordinary index or one on columns", ErrCapture, n, tab.Local)
			}
			cols = append(cols, indexed{*c, coll})
			return nil
		})
		if err != nil {
			return nil, err
		}
		out = append(out, cols)
	}
	return out, nil
}

// install (re)creates the capture of a table.
func (t *txn) install(tab *table) error {
	if err := t.uninstall(tab); err != nil {
		return err
	}
	uniques, err := t.uniques(tab)
	if err != nil {
		return err
	}
	for _, q := range tab.triggers(uniques) {
		if err := t.exec(q); err != nil {
			return err
		}
	}
	hash, _, err := t.installed(tab)
	if err != nil {
		return err
	}
	tab.capture = hash
	return t.exec(`UPDATE _ws_table SET capture = ? WHERE wire = ?`, hash, tab.Wire)
}

func (t *txn) uninstall(tab *table) error {
	for _, n := range triggerNames {
		if err := t.exec("DROP TRIGGER IF EXISTS " + quote(n+tab.Local)); err != nil {
			return err
		}
	}
	return nil
}

// installed hashes what capture there is: the triggers as the file holds them, and the columns they rely on.
func (t *txn) installed(tab *table) (hash string, triggers int, err error) {
	h := sha256.New()
	err = t.each(`SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? AND name LIKE '\_ws\_%' ESCAPE '\' ORDER BY name`, []any{tab.Local}, func(scan func(...any) error) error {
		var name, def string
		if err := scan(&name, &def); err != nil {
			return err
		}
		triggers++
		_, _ = fmt.Fprintf(h, "%s\n%s\n", name, def)
		return nil
	})
	if err != nil {
		return "", 0, err
	}
	have := map[string]bool{}
	err = t.each(`SELECT name FROM pragma_table_info(?)`, []any{tab.Local}, func(scan func(...any) error) error {
		var c string
		err := scan(&c)
		have[c] = true
		return err
	})
	for _, c := range tab.Cols {
		_, _ = fmt.Fprintf(h, "%s %v\n", c.Local, have[c.Local])
	}
	return hex.EncodeToString(h.Sum(nil)), triggers, err
}

// verify refuses to go on with a table whose capture is not what was installed: syncing incomplete data would be
// worse. New unique indexes are taken into the capture.
func (t *txn) verify(tab *table) error {
	hash, triggers, err := t.installed(tab)
	if err != nil {
		return err
	}
	if hash != tab.capture {
		return fmt.Errorf("%w: table %s has %d of %d capture triggers, or columns are missing (was it rebuilt?); edits since then may be unknown. Repair makes the capture anew and fetches the table again",
			ErrCapture, tab.Local, triggers, len(triggerNames))
	}
	uniques, err := t.uniques(tab)
	if err != nil {
		return err
	}
	for _, q := range tab.triggers(uniques) {
		var one int
		if err := t.get(`SELECT 1 FROM sqlite_master WHERE type = 'trigger' AND sql = ?`, []any{q}, &one); err != nil {
			return t.install(tab)
		}
	}
	return nil
}

// selfTest checks the one thing that the capture needs and SQLite's documentation does not promise in so many words:
// that the upsert clause in a trigger's body is not overridden by the conflict clause of the outer statement.
func selfTest(t *txn) error {
	for _, q := range []string{
		"DROP TABLE IF EXISTS temp._ws_probe_live", "DROP TABLE IF EXISTS temp._ws_probe_shadow",
		"CREATE TEMP TABLE _ws_probe_live (a INTEGER PRIMARY KEY, b)",
		"CREATE TEMP TABLE _ws_probe_shadow (a INTEGER PRIMARY KEY, b)",
		"CREATE TEMP TRIGGER _ws_probe BEFORE INSERT ON _ws_probe_live BEGIN INSERT INTO _ws_probe_shadow SELECT a, b FROM _ws_probe_live WHERE a = NEW.a ON CONFLICT DO NOTHING; END",
		"INSERT INTO _ws_probe_live VALUES (1, 'first')",
		"INSERT OR REPLACE INTO _ws_probe_live VALUES (1, 'second')",
		"INSERT OR REPLACE INTO _ws_probe_live VALUES (1, 'third')",
	} {
		if err := t.exec(q); err != nil {
			return err
		}
	}
	var b string
	if err := t.get("SELECT b FROM temp._ws_probe_shadow", nil, &b); err != nil {
		return err
	}
	if b != "first" {
		return errors.New("this build of SQLite lets REPLACE override the capture's upserts: use another driver")
	}
	t.close()
	if err := t.exec("DROP TABLE temp._ws_probe_live"); err != nil {
		return err
	}
	return t.exec("DROP TABLE temp._ws_probe_shadow")
}
