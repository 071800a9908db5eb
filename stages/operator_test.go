package stages

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/waystage/waystage/protocol"
)

// TestOperator runs scenarios of acting on rejected records, all on one mirror.
func TestOperator(t *testing.T) {
	base := newRig(t)
	for name, run := range map[string]func(*testing.T, *rig){
		"an update again sends what the device changed": testRetryUpdate,
		"the version rule holds for a retry":            testRetryVersionRule,
		"correct, omit, insert, update":                 testRetryShapes,
		"what cannot be retried":                        testRetryProblems,
		"two operators, one retry":                      testRetryOnce,
		"same row in order":                             testRetrySameRow,
		"status":                                        testRejectStatus,
		"nobody answers an operator":                    testOperatorNoReply,
		"retention":                                     testRejectRetention,
		"refused requests are kept":                     testRefusalKept,
		"what was told":                                 testTold,
		"what was sent is kept":                         testSentIsKept,
	} {
		t.Run(name, func(t *testing.T) {
			r := base.reset(t)
			r.exec("TRUNCATE waystage.refusal")
			run(t, r)
		})
	}
}

func (r *rig) operator(name string) *Operator {
	r.t.Helper()
	o, err := NewOperator(r.db, name)
	if err != nil {
		r.t.Fatal(err)
	}
	return o
}

// retry submits, merges, and returns what became of it.
func (r *rig) retry(o *Operator, opt RetryOptions, ids ...int64) []Attempt {
	r.t.Helper()
	list, err := o.Retry(r.ctx, ids, opt)
	if err != nil {
		r.t.Fatal(err)
	}
	r.pump()
	if _, err := o.Follow(r.ctx, list); err != nil {
		r.t.Fatal(err)
	}
	return list
}

// openRecord is the number of the newest open record of the log.
func (r *rig) openRecord() int64 {
	r.t.Helper()
	var id int64
	if _, err := fmt.Sscan(r.value(`SELECT id FROM waystage.reject WHERE status = 'open' ORDER BY id`), &id); err != nil {
		r.t.Fatal(err)
	}
	return id
}

// stale makes amy lose a change of patient 1's name to the office, which changes the weight.
func stale(r *rig, amy *dev, name string) int64 {
	r.t.Helper()
	c := amy.edit("care", patients, "1", "name", name)
	r.office(`UPDATE public.patient SET _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0, weight = coalesce(weight, 0) + 1 WHERE id = 1`)
	amy.verdict(amy.sync("care", c), "rejected stale_version")
	return r.openRecord()
}

func (a *Attempt) short() string {
	return strings.TrimSpace(a.State + " " + string(a.Problem) + string(a.Code))
}

func (r *rig) attempts(got []Attempt, want ...string) {
	r.t.Helper()
	for i, w := range want {
		if i >= len(got) || got[i].short() != w {
			r.t.Fatalf("attempts are %+v, want %q", got, want)
		}
	}
}

func testRetryUpdate(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	id := stale(r, amy, "mine")
	o := r.operator("olga")
	got := r.retry(o, RetryOptions{Note: "asked her"}, id)
	r.attempts(got, "merged")
	r.want("mine", `SELECT name FROM public.patient WHERE id = 1`)
	r.want("false", `SELECT weight IS NULL FROM public.patient WHERE id = 1`) // what the office wrote survives
	r.want("{name}", `SELECT array_agg(k)::text FROM waystage.change c, jsonb_object_keys(c.img) k WHERE c.id = $1`, got[0].Result)
	r.want("@operator/olga", `SELECT d.user_name || '/' || d.name FROM waystage.change c JOIN waystage.device d ON d.id = c.device_id WHERE c.id = $1`, got[0].Result)
	r.want("olga retry asked her", `SELECT actor || ' ' || action || ' ' || note FROM waystage.reject_action WHERE record = $1`, id)
	r.want("retried", `SELECT status FROM waystage.reject WHERE id = $1`, id)
	// To the device it is somebody else's write: an edit on the old version loses, one on the new one passes.
	c := amy.edit("care", patients, "1", "name", "blind")
	amy.verdict(amy.sync("care", c), "rejected stale_version")
	r.want("@operator/olga", `SELECT winner FROM waystage.change WHERE state = 'rejected' ORDER BY id DESC LIMIT 1`)
	amy.want("mine", "care", patients, "1", "name")
	amy.verdict(amy.sync("care", amy.edit("care", patients, "1", "name", "seen")), "merged")
}

func testRetryVersionRule(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	id := stale(r, amy, "mine")
	o := r.operator("olga")
	list, err := o.Retry(r.ctx, []int64{id}, RetryOptions{})
	if err != nil || len(list) != 1 || list[0].State != AttemptStaged {
		t.Fatalf("%+v %v", list, err)
	}
	if open, err := o.Follow(r.ctx, list); open != 1 || err != nil || list[0].State != AttemptStaged {
		t.Fatalf("%d %v %+v", open, err, list)
	}
	r.want("retried", `SELECT status FROM waystage.reject WHERE id = $1`, id)
	r.office(`UPDATE public.patient SET _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0, name = 'office' WHERE id = 1`) // between the retry and its merge
	r.pump()
	if err := o.Await(r.ctx, list, false, time.Minute); err != nil {
		t.Fatal(err)
	}
	r.attempts(list, "rejected stale_version")
	r.want("office", `SELECT name FROM public.patient WHERE id = 1`)
	// It is open again, and what it became is not in anybody's way.
	r.want("open", `SELECT status FROM waystage.reject WHERE id = $1`, id)
	r.want("superseded", `SELECT status FROM waystage.reject WHERE id = $1`, list[0].Result)
	r.attempts(r.retry(o, RetryOptions{}, list[0].Result), "failed superseded")
	r.attempts(r.retry(o, RetryOptions{}, id), "merged")
	r.want("mine", `SELECT name FROM public.patient WHERE id = 1`)
	r.want("2", `SELECT count(*) FROM waystage.reject_action WHERE record = $1`, id)
	// Pending is not final.
	if open, err := o.Follow(r.ctx, list); open != 0 || err != nil {
		t.Fatal(open, err)
	}
}

func testRetryShapes(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	o := r.operator("olga")
	// A value corrected, one set to null, one left out.
	c := change(patients, "", nil, row("id", "1", "name", "x", "weight", "heavy", "active", "t", "tags", "{a}"))
	amy.verdict(amy.sync("care", c), "rejected invalid_value")
	id := r.openRecord()
	r.attempts(r.retry(o, RetryOptions{AsUpdate: true}, id), "rejected invalid_value")
	r.attempts(r.retry(o, RetryOptions{Values: map[string]*string{"weight": str("71.50")}}, id), "failed row_exists_now")
	r.attempts(r.retry(o, RetryOptions{AsUpdate: true, Values: map[string]*string{"weight": str("71.50"), "tags": nil}, Omit: []string{"active"}}, id), "merged")
	r.want("71.50 x t t", `SELECT concat_ws(' ', weight, name, tags IS NULL, active IS NULL) FROM public.patient WHERE id = 1`)
	// The row of an update has gone: the whole row is inserted, as the device had it, with its change.
	r.office(`INSERT INTO public.visit (id, patient, at, note) VALUES ('v', 1, '2026-01-01', 'old')`)
	amy.sync("care")
	edit := amy.edit("care", visits, "v", "note", "new")
	r.office(`DELETE FROM public.visit`)
	amy.verdict(amy.sync("care", edit), "rejected row_deleted")
	id = r.openRecord()
	r.attempts(r.retry(o, RetryOptions{}, id), "failed row_gone")
	r.attempts(r.retry(o, RetryOptions{AsInsert: true}, id), "merged")
	r.want("1 new 2026", `SELECT concat_ws(' ', patient, note, extract(year FROM at)) FROM public.visit WHERE id = 'v'`)
	// A delete, and one whose row has gone anyhow.
	amy.sync("care")
	gone := amy.remove("care", visits, "v")
	r.office(`UPDATE public.visit SET _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0, note = 'kept' WHERE id = 'v'`)
	amy.verdict(amy.sync("care", gone), "rejected stale_version")
	id = r.openRecord()
	r.attempts(r.retry(o, RetryOptions{Values: map[string]*string{"note": nil}}, id), "failed not_a_change")
	r.attempts(r.retry(o, RetryOptions{}, id), "merged")
	r.want("0", `SELECT count(*) FROM public.visit`)
	// The operator is not bound by the device's subset.
	amy.verdict(amy.sync("care", change(visits, "", nil, row("id", "w", "patient", "99", "note", "far"))), "rejected not_subscribed")
	r.attempts(r.retry(o, RetryOptions{}, r.openRecord()), "merged")
	r.want("99", `SELECT patient FROM public.visit WHERE id = 'w'`)
}

func testRetryProblems(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	o := r.operator("olga")
	id := stale(r, amy, "mine")
	r.attempts(r.retry(o, RetryOptions{Values: map[string]*string{"nonsense": nil}}, id), "failed no_such_column")
	r.attempts(r.retry(o, RetryOptions{Values: map[string]*string{"id": str("2")}}, id), "failed key_column")
	r.attempts(r.retry(o, RetryOptions{}, 987654, id), "failed no_such_record", "merged")
	r.attempts(r.retry(o, RetryOptions{}, id), "failed already_retried")
	if list, err := o.Discard(r.ctx, []int64{id, 987654}, ""); err != nil || list[0].short() != "failed already_retried" || list[1].short() != "failed no_such_record" {
		t.Fatalf("%+v %v", list, err)
	}
	for _, c := range []struct {
		change protocol.Change
		code   string
		want   string
		opt    RetryOptions
	}{
		{protocol.Change{Table: "public.nothing", Op: "U", Key: vals("1"), New: vals("1")}, "unknown_table", "failed table_not_synced", RetryOptions{}},
		{protocol.Change{Table: patients, Op: "U", Key: vals(), New: vals("1", nil, nil, nil, nil, nil, nil, nil)}, "missing_key", "failed not_a_change", RetryOptions{}},
		{protocol.Change{Table: patients, Op: "U", Key: vals("1"), New: vals("2", nil, nil, nil, nil, nil, nil, nil)}, "key_change", "failed not_a_change", RetryOptions{}},
		{protocol.Change{Table: patients, Op: "X", Key: vals("1")}, "invalid_record", "failed not_a_change", RetryOptions{}},
		{change(patients, "", nil, row("id", "one", "name", "x")), "invalid_value", "failed invalid_key", RetryOptions{}},
		{change(patients, "", nil, row("id", "1", "name", "a\x00b")), "invalid_value", "failed value_not_kept", RetryOptions{AsUpdate: true}},
		{change(patients, "", nil, row("id", "1", "name", strings.Repeat("x", 2<<20))), "row_too_big", "failed image_not_kept", RetryOptions{AsUpdate: true}},
	} {
		amy.verdict(amy.sync("care", c.change), "rejected "+c.code)
		id := r.openRecord()
		r.attempts(r.retry(o, c.opt, id), c.want)
		r.want("open", `SELECT status FROM waystage.reject WHERE id = $1`, id)
		if list, err := o.Discard(r.ctx, []int64{id, id}, "no use"); err != nil || list[0].short() != "discarded" || list[1].short() != "failed already_discarded" {
			t.Fatalf("%+v %v", list, err)
		}
		r.want("1", `SELECT count(*) FROM waystage.reject_action WHERE record = $1`, id)
	}
	// One that cannot be retried stops no other, not even one with a key that fails its statement.
	first := stale(r, amy, "one")
	amy.verdict(amy.sync("care", change(patients, "", nil, row("id", "one", "name", "x"))), "rejected invalid_value")
	bad := r.openRecord()
	r.attempts(r.retry(o, RetryOptions{}, bad, first), "failed invalid_key", "merged")
	if _, err := NewOperator(r.db, "Olga.K"); err == nil {
		t.Error("a login that is no name is taken")
	}
}

func testRetryOnce(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	var ids []int64
	for i := range 8 {
		r.office(`INSERT INTO public.visit (id, patient, note) VALUES ($1, 1, 'old')`, fmt.Sprint(i))
	}
	amy.sync("care")
	var changes []protocol.Change
	for i := range 8 {
		changes = append(changes, amy.edit("care", visits, fmt.Sprint(i), "note", "new"))
	}
	r.office(`UPDATE public.visit SET _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0, at = now()`)
	amy.sync("care", changes...)
	rows, err := r.db.Query(r.ctx, `SELECT id FROM waystage.reject WHERE status = 'open' ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	if len(ids) != 8 {
		t.Fatalf("%d records", len(ids))
	}
	var wg sync.WaitGroup
	results := make([][]Attempt, 6)
	for w := range results {
		wg.Go(func() {
			mine := slices.Clone(ids)
			if w%2 == 1 {
				slices.Reverse(mine)
			}
			var err error
			if results[w], err = r.operator(fmt.Sprintf("op%d", w%3)).Retry(r.ctx, mine, RetryOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	done := map[int64]int{}
	for _, list := range results {
		for _, a := range list {
			switch a.short() {
			case "staged":
				done[a.Record]++
			case "failed already_retried":
			default:
				t.Errorf("%+v", a)
			}
		}
	}
	for _, id := range ids {
		if done[id] != 1 {
			t.Errorf("record %d was retried %d times", id, done[id])
		}
	}
	r.pump()
	r.want("8", `SELECT count(*) FROM waystage.change WHERE state = 'merged'`)
	r.want("8", `SELECT count(*) FROM waystage.reject_action`)
}

func testRetrySameRow(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	first := stale(r, amy, "one")
	second := stale(r, amy, "two")
	o := r.operator("olga")
	got := r.retry(o, RetryOptions{}, first, second)
	r.attempts(got, "merged", "failed earlier_not_merged")
	if !got[1].Later {
		t.Fatal("the second is not told to come later")
	}
	r.want("open", `SELECT status FROM waystage.reject WHERE id = $1`, second)
	r.attempts(r.retry(o, RetryOptions{}, second), "merged")
	r.want("two", `SELECT name FROM public.patient WHERE id = 1`)
}

func testRejectStatus(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	o := r.operator("olga")
	status := func(id int64, want string) {
		t.Helper()
		r.want(want, `SELECT status FROM waystage.reject WHERE id = $1`, id)
	}
	id := stale(r, amy, "lost")
	// The user makes another change: it does not stand for the first. The same change again does.
	amy.verdict(amy.sync("care", amy.edit("care", patients, "1", "active", "t")), "merged")
	status(id, "open")
	amy.verdict(amy.sync("care", amy.edit("care", patients, "1", "name", "again", "active", "f")), "merged")
	status(id, "superseded")
	r.attempts(r.retry(o, RetryOptions{}, id), "failed superseded")
	// A discard can be thought over.
	id = stale(r, amy, "other")
	if _, err := o.Discard(r.ctx, []int64{id}, "a double"); err != nil {
		t.Fatal(err)
	}
	status(id, "discarded")
	r.attempts(r.retry(o, RetryOptions{}, id), "merged")
	status(id, "retried")
	r.want("discard retry", `SELECT string_agg(action, ' ' ORDER BY id) FROM waystage.reject_action WHERE record = $1`, id)
	// Refused by the source: open again.
	r.exec(`UPDATE waystage.change SET state = 'refused', code = 'source_constraint', decided_at = now() WHERE state = 'merged' AND device_id IN (SELECT id FROM waystage.device WHERE user_name = '@operator')`)
	status(id, "open")
}

func testOperatorNoReply(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	id := stale(r, amy, "mine")
	before := len(r.q.pages)
	r.attempts(r.retry(r.operator("olga"), RetryOptions{}, id), "merged")
	if len(r.q.pages) != before {
		t.Error("a reply was composed for an operator")
	}
	r.want("closed", `SELECT state FROM waystage.session WHERE user_name = '@operator'`)
	r.want("0", `SELECT count(*) FROM waystage.session WHERE state IN ('staged', 'merged')`)
	r.want("0", `SELECT count(*) FROM waystage.cursor c JOIN waystage.device d ON d.id = c.device_id WHERE d.user_name = '@operator'`)
	// A request that carries the operators' incarnation does not become theirs.
	inc := r.value(`SELECT i.id FROM waystage.incarnation i JOIN waystage.device d ON d.id = i.device_id WHERE d.user_name = '@operator'`)
	req := amy.request("care")
	req.Incarnation, req.N = inc, 2
	amy.send(req)
	r.pump()
	if p := amy.pages()[0]; p.Error == nil || p.Error.Code != protocol.CodeForked {
		t.Errorf("%+v", p)
	}
}

func testRejectRetention(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	o := r.operator("olga")
	open := stale(r, amy, "open")
	discarded := stale(r, amy, "discarded")
	retried := stale(r, amy, "retried")
	again := stale(r, amy, "again")
	settled := stale(r, amy, "settled")
	r.exec(`UPDATE waystage.change SET code = 'source_wins' WHERE id = $1`, settled)
	if _, err := o.Discard(r.ctx, []int64{discarded}, ""); err != nil {
		t.Fatal(err)
	}
	result := r.retry(o, RetryOptions{}, retried)[0].Result
	list, err := o.Retry(r.ctx, []int64{again}, RetryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r.office(`UPDATE public.patient SET _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0, name = 'office' WHERE id = 1`)
	r.pump()
	if _, err := o.Follow(r.ctx, list); err != nil || list[0].State != protocol.Rejected {
		t.Fatal(list, err)
	}
	r.exec(`UPDATE waystage.change SET state = 'applied', stamp = pg_current_xact_id()::text::bigint, decided_at = now() WHERE state = 'merged'`)
	r.office(`UPDATE public.patient SET _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0, name = 'x' WHERE id = 1`)
	amy.sync("care")
	r.office(`UPDATE public.patient SET _ws_version = DEFAULT, _ws_lw = NULL, _ws_mver = 0, name = 'y' WHERE id = 1`)
	amy.sync("care") // its cursor has passed all verdicts
	age := func(days int) {
		r.exec(`UPDATE waystage.change SET decided_at = now() - make_interval(days => $1)`, days)
		r.exec(`UPDATE waystage.reject_action SET at = now() - make_interval(days => $1)`, days)
	}
	day := 24 * time.Hour
	prune := func(rejects, handled int) {
		t.Helper()
		p := NewPruner(RetentionConfig{Changes: day, Rejects: time.Duration(rejects) * day, Handled: time.Duration(handled) * day, InFlight: time.Nanosecond}, r.db, nil)
		if _, err := p.Prune(r.ctx); err != nil {
			t.Fatal(err)
		}
	}
	there := func(want string) {
		t.Helper()
		names := map[int64]string{open: "open", discarded: "discarded", retried: "retried", again: "again", settled: "settled", result: "result", list[0].Result: "failed"}
		rows, err := r.db.Query(r.ctx, `SELECT id FROM waystage.change ORDER BY id`)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for rows.Next() {
			var id int64
			if err := rows.Scan(&id); err != nil {
				t.Fatal(err)
			}
			got = append(got, names[id])
		}
		if s := strings.Join(got, " "); s != want {
			t.Fatalf("the ledger has %q, want %q", s, want)
		}
	}
	age(40)
	prune(90, 60)
	there("open discarded retried again settled result failed")
	// Handled ones go after their own time; what nobody handled, and what failed again, stays.
	prune(90, 30)
	there("open again failed")
	age(100)
	prune(90, 30)
	prune(90, 30) // what a record became goes after it
	there("")
	// Sessions of operators go too, but for the last.
	r.exec(`UPDATE waystage.session SET merged_at = now() - interval '99 days', replied_at = replied_at - interval '99 days'`)
	prune(90, 30)
	r.want("1", `SELECT count(*) FROM waystage.session WHERE user_name = '@operator'`)
	// The records of a device that was removed are nobody's to wait for.
	last := stale(r, amy, "gone")
	r.exec(`DELETE FROM waystage.device`)
	r.exec(`UPDATE waystage.change SET decided_at = now() - interval '100 days'`)
	r.want(fmt.Sprint(last), `SELECT id FROM waystage.change`)
	prune(90, 30)
	there("")
}

func testRefusalKept(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	s := NewSessions(r.db)
	req := amy.request("nonsense")
	amy.send(req)
	r.pump()
	st, err := s.Status(r.ctx, "amy", "phone", amy.token())
	if err != nil || st.State != "refused" || st.Error == nil || st.Error.Code != protocol.CodeUnknownSet || st.Error.Message == "" {
		t.Fatalf("%+v %v", st, err)
	}
	if st, err := s.Status(r.ctx, "ben", "phone", amy.token()); err != nil || st.State != "unknown" || st.Error != nil {
		t.Fatalf("%+v %v", st, err)
	}
	amy.send(req)
	r.pump()
	r.want("2", `SELECT times FROM waystage.refusal WHERE token = $1`, amy.token())
	// The number was not used up: the next request under it is taken, and that is what is told.
	amy.n--
	amy.sync("care")
	if st, err := s.Status(r.ctx, "amy", "phone", amy.token()); err != nil || st.State != "replied" || st.Error != nil {
		t.Fatalf("%+v %v", st, err)
	}
	// A session that its reply refuses: the set was taken away meanwhile.
	amy.send(amy.request("care"))
	if _, err := r.intake.Batch(r.ctx, r.ctx, noop); err != nil {
		t.Fatal(err)
	}
	r.exec(`UPDATE waystage.app_user SET groups = '{}' WHERE name = 'amy'`)
	r.pump()
	r.want("unknown_set", `SELECT code FROM waystage.refusal WHERE token = $1`, amy.token())
	r.exec(`UPDATE waystage.refusal SET refused_at = now() - interval '8 days'`)
	if n, err := NewPruner(RetentionConfig{}, r.db, nil).Prune(r.ctx); err != nil || n.Refusals != 2 {
		t.Fatalf("%+v %v", n, err)
	}
}

func testTold(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	const told = `SELECT string_agg(s.n || ' ' || s.state, ', ' ORDER BY s.n) FROM waystage.change c JOIN waystage.session s ON s.device_id = c.device_id
		WHERE c.img ? 'name' AND s.n >= c.n AND pg_visible_in_snapshot(c.stamp::text::xid8, s.told)`
	amy.verdict(amy.sync("care", amy.edit("care", patients, "1", "name", "p")), "merged")
	n := amy.n
	r.want(fmt.Sprintf("%d replied", n), told)
	r.exec(`UPDATE waystage.change SET state = 'applied', stamp = pg_current_xact_id()::text::bigint, decided_at = clock_timestamp() WHERE state = 'merged'`)
	r.want("<null>", told) // it was told another state
	amy.sync("care")
	r.want(fmt.Sprintf("%d replied", n+1), told)
	if err := NewSessions(r.db).Close(r.ctx, "amy", "phone", amy.token()); err != nil {
		t.Fatal(err)
	}
	r.want(fmt.Sprintf("%d closed", n+1), told)
	r.want("false", `SELECT closed_at IS NULL FROM waystage.session WHERE token = $1`, amy.token())
}

func testSentIsKept(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	for _, c := range []struct {
		change     protocol.Change
		code       string
		base, sent string
	}{
		{change(patients, "", nil, row("id", "7", "name", "n", "mood", "mer\x00ry")), "invalid_value", "<null>", "mer\uFFFDry n 7"},
		{change(patients, "", nil, row("id", "7", "name", "a\x00b", "mood", "calm")), "invalid_value", "<null>", "calm a\uFFFDb 7"},
		{amy.edit("care", patients, "1", "mood", "mer\x00ry"), "invalid_value", "1", "mer\uFFFDry"},
		{protocol.Change{Table: patients, Op: "U", Key: vals("1"), New: vals("2", "n", nil, nil, nil, nil, nil, nil)}, "key_change", "<null>", "n 2"},
		{protocol.Change{Table: patients, Op: "U", Key: vals("1"), New: vals("2", "n")}, "invalid_record", "<null>", "<null>"},
		{change("public.code", "", nil, row("k", "abcd", "seq", "1", "label", "l")), "unknown_table", "<null>", "abcd 1"},
	} {
		amy.verdict(amy.sync("care", c.change), "rejected "+c.code)
		r.want(c.sent, `SELECT CASE WHEN img IS NOT NULL THEN concat_ws(' ', img->>'mood', img->>'name', img->>'id', img->>'k', img->>'seq') END FROM waystage.change ORDER BY id DESC LIMIT 1`)
		r.want(c.base, `SELECT base->>'id' FROM waystage.change ORDER BY id DESC LIMIT 1`)
	}
}
