package apply_test

import (
	"strings"
	"testing"
)

// A delete whose cascade would take a row that somebody else added or changed meanwhile is refused, at any depth; what
// the mirror knows goes along, and what is deleted in the same upload is gone already.
func TestCascadeTakesNoStrangersRow(t *testing.T) {
	r := newRig(t, `
		CREATE TABLE p (id int PRIMARY KEY, v int);
		CREATE TABLE c (d date, n int, p int REFERENCES p ON DELETE CASCADE, v int, PRIMARY KEY (d, n));
		CREATE TABLE g (id int PRIMARY KEY, d date, n int, v int, FOREIGN KEY (d, n) REFERENCES c ON DELETE CASCADE);
		CREATE TABLE soft (id int PRIMARY KEY, p int REFERENCES p ON DELETE SET NULL, q int DEFAULT 99 REFERENCES p ON DELETE SET DEFAULT);
		CREATE TABLE tree (id int PRIMARY KEY, parent int REFERENCES tree ON DELETE CASCADE, v int);
		INSERT INTO p SELECT i, i FROM generate_series(1, 12) i; INSERT INTO p VALUES (99, 0);
		INSERT INTO c SELECT '2024-02-01'::date + i, i, i, 0 FROM generate_series(1, 12) i;
		INSERT INTO g SELECT i, '2024-02-01'::date + i, i, 0 FROM generate_series(1, 12) i;
		INSERT INTO tree VALUES (1, NULL, 0), (2, 1, 0), (3, 2, 0), (11, NULL, 0), (12, 11, 0), (13, 12, 0), (20, 20, 0);`,
		"public.p", "public.c", "public.g", "public.soft", "public.tree")
	db := r.text(r.source, "SELECT quote_ident(current_database())")
	r.exec(r.source, "ALTER DATABASE "+db+" SET datestyle = 'SQL, DMY'") // the customer's, under which up writes
	c := func(day, n string) rec { return rec{table: "public.c", op: 'D', key: []string{"2024-02-" + day, n}} }
	ids := r.merge(del("public.p", "1"))                                                                             // nobody has touched its children
	ids = append(ids, r.merge(del("public.p", "2"))...)                                                              // a child is added
	ids = append(ids, r.merge(del("public.p", "3"))...)                                                              // a grandchild is added
	ids = append(ids, r.merge(del("public.p", "4"))...)                                                              // a child is changed
	ids = append(ids, r.merge(del("public.p", "5"), c("06", "5"), del("public.g", "5"))...)                          // all three
	ids = append(ids, r.merge(del("public.p", "6"))...)                                                              // and its child in a later session
	ids = append(ids, r.merge(c("07", "6"), del("public.g", "6"))...)                                                //
	ids = append(ids, r.merge(unit(1, del("public.p", "7"), upd("public.p", "8", map[string]any{"v": "88"}))...)...) // a child of 7 is added
	ids = append(ids, r.merge(unit(1, del("public.p", "9"), c("10", "9"))...)...)                                    //
	ids = append(ids, r.merge(del("public.p", "10"))...)                                                             // rows that only refer to it are added
	ids = append(ids, r.merge(ins("public.g", "50", map[string]any{"d": "2024-02-12", "n": "11"}))...)               // a device adds a grandchild,
	ids = append(ids, r.merge(del("public.p", "11"))...)                                                             // another deletes, knowing of it
	ids = append(ids, r.merge(del("public.tree", "1"), del("public.tree", "11"), del("public.tree", "20"))...)
	r.foreign("INSERT INTO c VALUES ('2025-01-01', 1, 2, 0)", "INSERT INTO g VALUES (30, '2024-02-04', 3, 0)", "UPDATE c SET v = 1 WHERE n = 4", "INSERT INTO c VALUES ('2025-01-02', 7, 7, 0)",
		"INSERT INTO soft VALUES (1, 10, 10)", "INSERT INTO tree VALUES (14, 13, 0)")
	r.start(allWorkers...)
	r.settled()
	const conflict = "refused source_conflict"
	r.wantVerdicts(ids, "applied", conflict, conflict, conflict, "applied", "applied", "applied", "applied", "applied", "applied",
		conflict, "refused transaction_rejected", "applied", "applied", "applied", "applied", "applied", "applied", conflict, "applied")
	for i, says := range map[int]string{1: "public.c (2025-01-01, 1)", 2: "public.g (30)", 3: "public.c (2024-02-05, 4)", 10: "public.c (2025-01-02, 7)", 18: "public.tree (14)"} {
		if got := r.detail(ids[i]); !strings.Contains(got, says) {
			t.Errorf("change %d: %q does not name %s", i, got, says)
		}
	}
	if got := r.text(r.mirror, "SELECT concat_ws(' ', id, p, q) FROM soft"); got != "1 99" {
		t.Errorf("a row that only refers to the deleted one: %q", got)
	}
	if got := r.text(r.source, "SELECT string_agg(id::text, ' ' ORDER BY id) FROM g"); got != "2 3 4 7 8 12 30" {
		t.Errorf("grandchildren: %s", got)
	}
}
