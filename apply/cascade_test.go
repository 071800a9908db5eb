package apply_test

import (
	"strconv"
	"strings"
	"testing"

	"github.com/waystage/waystage/apply"
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

// What somebody has changed at the source, and down has not brought yet, is no more for a cascade to take than what the mirror
// shows already; nor is it when the device has a change of its own on the way to the same row.
func TestCascadeWaitsForWhatIsUnderWay(t *testing.T) {
	r := newRig(t, `
		CREATE TABLE p (id int PRIMARY KEY, v int);
		CREATE TABLE c (id int PRIMARY KEY, p int REFERENCES p ON DELETE CASCADE, v int, w int);
		CREATE TABLE g (id int PRIMARY KEY, c int REFERENCES c ON DELETE CASCADE, v int);
		INSERT INTO p SELECT i, i FROM generate_series(1, 5) i;
		INSERT INTO c SELECT i, i, 0, 0 FROM generate_series(1, 5) i;
		INSERT INTO g SELECT i, i, 0 FROM generate_series(1, 5) i`, "public.p", "public.c", "public.g")
	r.start(allWorkers...)
	r.settled()
	up := r.workers["up"].obj.(*apply.Up)
	r.eventually("up has begun", func() bool { return up.Stats().State == "applying" })
	for i, c := range []struct{ foreign, want, says string }{
		{"UPDATE c SET v = 1 WHERE id = 1", "refused source_conflict", "public.c (1)"},
		{"UPDATE g SET v = 1 WHERE id = 2", "refused source_conflict", "public.g (2)"},
		{"UPDATE p SET v = 99 WHERE id = 5", "applied", ""}, // another row is none of its business
	} {
		r.stop("down")
		before := up.Stats().Barriers
		r.foreign(c.foreign)
		id := r.merge(del("public.p", strconv.Itoa(i+1)))[0]
		r.eventually("up has decided, or waits", func() bool {
			return up.Stats().Barriers > before || r.text(r.source, "SELECT count(*)::text FROM p WHERE id = $1", i+1) == "0"
		})
		r.start("down")
		r.settled()
		r.wantVerdict(id, c.want)
		if got := r.detail(id); !strings.Contains(got, c.says) {
			t.Errorf("%q does not name %s", got, c.says)
		}
	}

	// It does not hide behind a later change of a device that knew of it; and that is applied.
	r.stop("up")
	gone := r.merge(del("public.p", "4"))[0]
	r.foreign("UPDATE c SET v = 5 WHERE id = 4")
	r.eventually("the mirror has it", func() bool { return r.text(r.mirror, "SELECT v::text FROM c WHERE id = 4") == "5" })
	edit := r.merge(upd("public.c", "4", map[string]any{"w": "1"}))[0]
	r.start("up")
	r.settled()
	r.wantVerdict(gone, "refused source_conflict")
	r.wantVerdict(edit, "applied")
	// What a device has changed before is taken along, once that has come down.
	r.stop("down")
	edit = r.merge(upd("public.c", "5", map[string]any{"w": "1"}))[0]
	r.eventually("the edit is at the source", func() bool { return r.text(r.source, "SELECT w::text FROM c WHERE id = 5") == "1" })
	gone = r.merge(del("public.p", "5"))[0]
	r.start("down")
	r.settled()
	r.wantVerdict(edit, "applied")
	r.wantVerdict(gone, "applied")
}
