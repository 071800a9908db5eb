package stages

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/waystage/waystage/protocol"
)

// agree compares what the device holds of a table with the mirror's rows, given by a condition.
func (d *dev) agree(set, table, where string) {
	d.r.t.Helper()
	have := slices.Sorted(maps.Keys(d.set(set).rows[table]))
	rows, err := d.r.db.Query(d.r.ctx, fmt.Sprintf(`SELECT id::text, _ws_version::text FROM %s WHERE %s`, table, where))
	if err != nil {
		d.r.t.Fatal(err)
	}
	defer rows.Close()
	var want []string
	for rows.Next() {
		var id, version string
		if err := rows.Scan(&id, &version); err != nil {
			d.r.t.Fatal(err)
		}
		want = append(want, id)
		if got := d.set(set).rows[table][id].version; got != version {
			d.r.t.Fatalf("device %s: %s %s has version %q, the mirror %s", d.user, table, id, got, version)
		}
	}
	slices.Sort(want)
	if !slices.Equal(have, want) {
		d.r.t.Fatalf("device %s: %s has %v, want %v", d.user, table, have, want)
	}
}

// office writes to the mirror as down-apply does.
func (r *rig) office(sql string, args ...any) {
	r.t.Helper()
	r.exec(sql, args...)
}

func testDownload(t *testing.T, r *rig) {
	amy, _, ben := shared(r)
	const amys, bens = "id IN (SELECT patient FROM public.assignment WHERE nurse = 'amy')", "id IN (SELECT patient FROM public.assignment WHERE nurse = 'ben')"
	const amysVisits, bensVisits = "patient IN (SELECT patient FROM public.assignment WHERE nurse = 'amy')", "patient IN (SELECT patient FROM public.assignment WHERE nurse = 'ben')"
	check := func() {
		t.Helper()
		for _, d := range []*dev{amy, ben} {
			d.sync("care")
		}
		amy.agree("care", patients, amys)
		amy.agree("care", visits, amysVisits)
		ben.agree("care", patients, bens)
		ben.agree("care", visits, bensVisits)
	}
	check()
	r.office(`INSERT INTO public.visit (id, patient, note) VALUES ('a', 1, 'x'), ('b', 2, 'x'), ('c', 3, 'x'), ('d', NULL, 'x')`)
	check()
	// Only what changed is sent.
	r.office(`UPDATE public.visit SET note = 'y', _ws_version = DEFAULT WHERE id = 'b'`)
	amy.send(amy.request("care"))
	r.pump()
	if p := amy.pages(); len(p) != 1 || len(p[0].Tables) != 1 || len(p[0].Tables[0].Rows) != 1 || p[0].Rows != 1 || p[0].Refresh || p[0].Schema != nil {
		t.Fatalf("more than the change was sent: %+v", p[0])
	}
	amy.receive()
	check()
	// Moves: out of and into subsets, between two keys of one user, to nobody.
	r.office(`UPDATE public.visit SET patient = 2, _ws_version = DEFAULT WHERE id = 'a'`)
	check()
	r.office(`UPDATE public.visit SET patient = 1, _ws_version = DEFAULT WHERE id = 'b'`)
	check()
	r.office(`UPDATE public.visit SET patient = NULL, _ws_version = DEFAULT WHERE id = 'b'`)
	check()
	r.office(`UPDATE public.visit SET patient = 1, _ws_version = DEFAULT WHERE id IN ('c', 'd')`)
	check()
	// Deletes, and a key that comes back.
	r.office(`DELETE FROM public.visit WHERE id = 'd'`)
	r.office(`DELETE FROM public.visit WHERE id = 'c'`)
	r.office(`INSERT INTO public.visit (id, patient, note) VALUES ('c', 1, 'back')`)
	check()
	ben.want("back", "care", visits, "c", "note")
	// A key change of the mirror's row.
	r.office(`UPDATE public.visit SET id = 'cc', _ws_version = DEFAULT WHERE id = 'c'`)
	check()
	// Keys that come and go: whole rows, old ones too; gone rows.
	r.office(`INSERT INTO public.assignment VALUES ('ben', 2), ('ben', 3)`)
	check()
	ben.want("cyd", "care", patients, "3", "name")
	r.office(`DELETE FROM public.assignment WHERE nurse = 'ben' AND patient <> 3`)
	check()
	ben.want("<none>", "care", patients, "1", "name")
	r.office(`DELETE FROM public.assignment WHERE nurse = 'ben'`)
	check()
	r.office(`INSERT INTO public.assignment VALUES ('ben', 2)`)
	check()
	// Moved from a key that goes at the same time to one that stays.
	r.office(`INSERT INTO public.assignment VALUES ('ben', 3)`)
	r.office(`INSERT INTO public.visit (id, patient) VALUES ('m', 3)`)
	check()
	r.office(`UPDATE public.visit SET patient = 2, _ws_version = DEFAULT WHERE id = 'm'`)
	r.office(`DELETE FROM public.assignment WHERE nurse = 'ben' AND patient = 3`)
	check()
	ben.want("2", "care", visits, "m", "patient")
}

// testCommitsOvertake: a transaction with a lower id that commits after a reply is not missed (rule D6).
func testCommitsOvertake(t *testing.T, r *rig) {
	_, _, ben := shared(r)
	slow, err := r.db.Begin(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := slow.Exec(r.ctx, `UPDATE public.patient SET name = 'slow', _ws_version = DEFAULT WHERE id = 1`); err != nil {
		t.Fatal(err)
	}
	r.office(`INSERT INTO public.visit (id, patient) VALUES ('fast', 1)`)
	ben.sync("care")
	ben.want("1", "care", visits, "fast", "patient")
	ben.want("ann", "care", patients, "1", "name")
	if err := slow.Commit(r.ctx); err != nil {
		t.Fatal(err)
	}
	ben.sync("care")
	ben.want("slow", "care", patients, "1", "name")
}

// testOneSnapshot: what commits while a reply is being read is in all of it or in nothing of it (I6). The reply is held after it
// has read the key sets and before it reads rows.
func testOneSnapshot(t *testing.T, r *rig) {
	_, _, ben := shared(r)
	other, err := r.db.Begin(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Rollback(context.WithoutCancel(r.ctx)) }()
	ben.sync("care") // makes the statements known to the connection that is used again: from here on each takes its locks when it is run
	ben.want("<none>", "care", patients, "2", "name")
	for _, q := range []string{`LOCK TABLE public.visit IN ACCESS EXCLUSIVE MODE`, `INSERT INTO public.assignment VALUES ('ben', 2)`} {
		if _, err := other.Exec(r.ctx, q); err != nil {
			t.Fatal(err)
		}
	}
	ben.send(ben.request("care"))
	for _, w := range []Worker{r.intake, r.merge} {
		if _, err := w.Batch(r.ctx, r.ctx, noop); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error, 1)
	go func() {
		_, err := r.reply.Batch(r.ctx, r.ctx, noop)
		done <- err
	}()
	for r.value(`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`) == "0" {
		select {
		case err := <-done:
			t.Fatalf("the reply did not come to the locked table: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := other.Commit(r.ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	ben.receive()
	assigned, patient := ben.has("care", "public.assignment", "ben|2", "nurse") != "<none>", ben.has("care", patients, "2", "name") != "<none>"
	if assigned != patient {
		t.Fatalf("the device has half of a transaction: the assignment %v, the patient %v", assigned, patient)
	}
	ben.sync("care")
	ben.want("ben", "care", "public.assignment", "ben|2", "nurse")
	ben.want("bob", "care", patients, "2", "name")
}

func testEmptySyncIsCheap(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	amy.sync("care")
	before, cursors := amy.set("care").cursor, r.value(`SELECT count(*) FROM waystage.cursor`)
	for range 3 {
		amy.sync("care")
	}
	if amy.set("care").cursor != before {
		t.Fatal("nothing has changed, but the cursor has")
	}
	r.want(cursors, `SELECT count(*) FROM waystage.cursor`)
	r.exec(`UPDATE waystage.cursor SET created_at = now() - interval '1 hour'`)
	amy.sync("care")
	if amy.set("care").cursor == before {
		t.Fatal("an old cursor was not renewed")
	}
	// Unchanged key sets are stored once, for all devices that have the same.
	keysets := r.value(`SELECT count(*) FROM waystage.keyset`)
	r.office(`UPDATE public.patient SET name = 'x', _ws_version = DEFAULT`)
	amy.sync("care")
	r.want(keysets, `SELECT count(*) FROM waystage.keyset`)
	r.want("1", `SELECT count(*) FROM waystage.cursor WHERE set_name = 'care' AND device_id = (SELECT id FROM waystage.device WHERE user_name = 'amy' AND name = 'phone') AND token = $1`, amy.set("care").cursor)
}

func testRefresh(t *testing.T, r *rig) {
	amy, tab, ben := shared(r)
	refreshed := func(d *dev, want bool) {
		t.Helper()
		d.send(d.request("care"))
		r.pump()
		if got := d.pages()[0].Refresh; got != want {
			t.Fatalf("refresh: %v, want %v", got, want)
		}
		d.receive()
		d.agree("care", patients, fmt.Sprintf("id IN (SELECT patient FROM public.assignment WHERE nurse = '%s')", d.user))
	}
	refreshed(amy, false)
	for _, token := range []string{"garbage", "e1.1.x", "e0" + amy.set("care").cursor[2:], tab.set("care").cursor, ""} {
		amy.set("care").cursor = token
		refreshed(amy, true)
		if amy.pages()[0].Rows != 4 { // 2 patients, 2 assignments
			t.Fatalf("%d rows announced", amy.pages()[0].Rows)
		}
		refreshed(amy, false)
	}
	r.exec(`DELETE FROM waystage.keyset`)
	refreshed(ben, true) // nobody knows what it has
	r.exec(`DELETE FROM waystage.cursor WHERE token = $1`, ben.set("care").cursor)
	refreshed(ben, true)
	// Other definitions: their hash is in the cursor.
	r.exec(`UPDATE waystage.cursor SET keysets = jsonb_set(keysets, '{schema}', '"old"') WHERE token = $1`, ben.set("care").cursor)
	refreshed(ben, true)
	// The device's hash decides only whether the definitions are sent.
	ben.set("care").schema = &protocol.Definitions{Hash: "other"}
	ben.send(ben.request("care"))
	r.pump()
	if p := ben.pages()[0]; p.Schema == nil || p.Refresh || len(p.Schema.Tables) != 3 {
		t.Fatalf("definitions: %+v", p.Schema)
	}
	if sets := ben.pages()[0].Sets; !slices.Equal(sets, []string{"care", "base"}) {
		t.Fatalf("sets: %v", sets)
	}
}

func testPages(t *testing.T, r *rig) {
	clerk := r.user("clerk", "clerks")
	r.reply.cfg.PageSize = 4 << 10
	r.office(`INSERT INTO public.region SELECT g, repeat(chr(8232) || '"' || chr(7), g % 50) FROM generate_series(1, 500) g`)
	r.exec(`ANALYZE public.region`) // all rows of a table are estimated
	for _, ct := range []string{protocol.ContentCBOR, protocol.ContentJSON} {
		clerk.contentType = ct
		clerk.sync("base")
		pages := clerk.pages()
		if len(pages) < 8 {
			t.Fatalf("%d pages", len(pages))
		}
		for i, p := range pages {
			m, _ := r.q.get(clerk.user, clerk.name, clerk.token(), i+1)
			if len(m.body) > 4<<10 {
				t.Fatalf("page %d has %d bytes", i+1, len(m.body))
			}
			if p.Last != (i == len(pages)-1) || (p.Cursor != "") != p.Last || (p.Schema != nil) != (i == 0 && clerk.n == 1) || (p.Rows > 0) != (i == 0) {
				t.Fatalf("page %d: %+v", i+1, p)
			}
		}
		clerk.agree("base", "public.region", "true")
		r.want(fmt.Sprint(len(pages)), `SELECT pages FROM waystage.session ORDER BY id DESC LIMIT 1`)
		if r.q.ready[len(r.q.ready)-1] != fmt.Sprintf("clerk.phone.%s %d", clerk.token(), len(pages)) {
			t.Fatal(r.q.ready)
		}
		r.office(`UPDATE public.region SET _ws_version = DEFAULT`)
		clerk.set("base").cursor = ""
	}
	// One row larger than a page has a page of its own; one that the queue does not take refuses the session.
	r.office(`UPDATE public.region SET name = repeat('x', 9000), _ws_version = DEFAULT WHERE id = 7`)
	clerk.contentType = protocol.ContentCBOR
	clerk.sync("base")
	clerk.agree("base", "public.region", "true")
	r.reply.cfg.MaxPage = 8 << 10
	clerk.set("base").cursor = ""
	clerk.send(clerk.request("base"))
	other := r.user("other", "nurses")
	other.send(other.request("care"))
	r.pump()
	clerk.refused(protocol.CodeTooBig)
	if e := clerk.refusal(); !strings.Contains(e.Message, "public.region") {
		t.Fatal(e.Message)
	}
	other.receive()
}

// testVerdictsUntilHeard: a verdict is told again until a cursor has passed it (rule D5).
func testVerdictsUntilHeard(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	told := func(pages []*protocol.Page) (list []string) {
		for _, p := range pages {
			for _, v := range p.Verdicts {
				list = append(list, fmt.Sprintf("%d/%d %s", v.N, v.Index, state(v)))
			}
		}
		return list
	}
	next := func(want ...string) []*protocol.Page {
		t.Helper()
		amy.send(amy.request("care"))
		r.pump()
		p := amy.pages()
		if got := told(p); !slices.Equal(got, want) {
			t.Fatalf("verdicts %v, want %v", got, want)
		}
		return p
	}
	amy.send(amy.request("care", amy.edit("care", patients, "1", "name", "v"), amy.edit("care", patients, "1", "name", "w")))
	r.pump()
	p := amy.pages()
	if got := told(p); !slices.Equal(got, []string{"2/0 merged", "2/1 rejected duplicate_row"}) || !p[len(p)-1].More {
		t.Fatalf("%v, more %v", got, p[len(p)-1].More)
	}
	if v := p[0].Verdicts[0]; v.ID == 0 || v.Table != patients || showKey(v.Key) != "1" || v.Version == "" {
		t.Fatalf("%+v", v)
	}
	// The reply is lost and the device goes on with its old cursor.
	next("2/0 merged", "2/1 rejected duplicate_row")
	amy.receive()
	p = next()
	if p[len(p)-1].More {
		t.Fatal("a session without records has nothing open")
	}
	amy.receive()
	// The source answers.
	r.exec(`UPDATE waystage.change SET state = 'refused', code = 'source_constraint', constraint_name = 'chk', detail = 'violates chk',
		stamp = pg_current_xact_id()::text::bigint, decided_at = now() WHERE state = 'merged'`)
	p = next("2/0 refused source_constraint")
	if v := p[0].Verdicts[0]; v.Constraint != "chk" || v.Detail != "violates chk" || v.Version != "" {
		t.Fatalf("%+v", v)
	}
	next("2/0 refused source_constraint")
	amy.receive()
	next()
	// Told by whichever set is synced.
	amy.receive()
	amy.sync("care", amy.edit("care", patients, "2", "name", "z"))
	r.exec(`UPDATE waystage.change SET state = 'applied', stamp = pg_current_xact_id()::text::bigint, decided_at = now() WHERE state = 'merged'`)
	amy.send(amy.request("base"))
	r.pump()
	if got := told(amy.pages()); !slices.Contains(got, "8/0 applied") {
		t.Fatalf("%v", got)
	}
}

func testWaitSource(t *testing.T, r *rig) {
	amy, tab, _ := shared(r)
	r.reply.cfg.WaitSource = time.Hour
	amy.wait = protocol.WaitSource
	amy.send(amy.request("care", amy.edit("care", patients, "1", "name", "w")))
	tab.send(tab.request("care"))
	r.pump()
	if _, ok := r.q.get(amy.user, amy.name, amy.token(), 1); ok {
		t.Fatal("answered before the source")
	}
	tab.receive()
	r.exec(`UPDATE waystage.change SET state = 'applied', stamp = pg_current_xact_id()::text::bigint, decided_at = now() WHERE state = 'merged'`)
	r.pump()
	v := amy.receive()
	amy.verdict(v, "applied")
	if v[0].Version == "" || amy.pages()[0].More {
		t.Fatalf("%+v", v[0])
	}
	// The wait has a bound.
	amy.send(amy.request("care", amy.edit("care", patients, "1", "name", "x")))
	r.pump()
	r.reply.cfg.WaitSource = time.Nanosecond
	r.pump()
	amy.verdict(amy.receive(), "merged")
	if p := amy.pages(); !p[len(p)-1].More {
		t.Fatal("the source's verdict is open")
	}
}

// testBrokenKeyQuery: a set whose query fails stops nobody else, and goes on when it works again.
func testBrokenKeyQuery(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	clerk := r.user("clerk", "clerks")
	r.exec(`ALTER TABLE public.assignment RENAME TO assignment2`)
	amy.send(amy.request("care", amy.edit("care", patients, "1", "name", "q")))
	clerk.send(clerk.request("base", change("public.measure", "", nil, row("id", 1, "flag", "t"))))
	failures := 0
	work := func(done func() bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !done(); {
			for _, w := range []Worker{r.intake, r.merge, r.reply} {
				if _, err := w.Batch(r.ctx, r.ctx, noop); err != nil {
					failures++
				}
			}
			if time.Now().After(end) {
				t.Fatal("no progress")
			}
		}
	}
	replied := func(d *dev) func() bool {
		return func() bool { _, ok := r.q.get(d.user, d.name, d.token(), 1); return ok }
	}
	work(replied(clerk))
	clerk.verdict(clerk.receive(), "merged")
	if replied(amy)() || failures == 0 {
		t.Fatalf("%d failures", failures)
	}
	r.exec(`ALTER TABLE public.assignment2 RENAME TO assignment`)
	work(replied(amy))
	amy.verdict(amy.receive(), "merged")
	// The same for the reply alone, and for a page that the queue refuses.
	r.exec(`ALTER TABLE public.assignment RENAME TO assignment2`)
	amy.send(amy.request("care"))
	clerk.send(clerk.request("base"))
	work(replied(clerk))
	r.exec(`ALTER TABLE public.assignment2 RENAME TO assignment`)
	work(replied(amy))
	amy.receive()
	r.q.fail = func(op, subject string) error {
		if op == "page" && strings.HasPrefix(subject, "amy.phone") {
			return errTest
		}
		return nil
	}
	amy.send(amy.request("care"))
	clerk.send(clerk.request("base"))
	work(replied(clerk))
	clerk.receive()
	r.q.fail = nil
	work(replied(amy))
	amy.receive()
}

// testKeyQueryIsCaged: a definition's query can neither write nor read what is not the mirror's.
func testKeyQueryIsCaged(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	tx, err := r.db.Begin(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer rollback(tx)
	for _, sql := range []string{
		`SELECT 1::bigint FROM waystage.app_user`,
		`WITH x AS (INSERT INTO public.region VALUES (1, 'x') RETURNING 1) SELECT 1::bigint FROM x`,
		`WITH x AS (DELETE FROM public.patient RETURNING 1) SELECT 1::bigint FROM x`,
	} {
		sub, err := tx.Begin(r.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := asReader(r.ctx, sub, sql); err == nil {
			t.Fatalf("%s was run", sql)
		}
		rollback(sub)
	}
	role := ""
	if _, err := asReader(r.ctx, tx, `SELECT 1::bigint WHERE set_config('role', 'none', true) IS NOT NULL AND set_config('work_mem', '64kB', false) IS NOT NULL`); err != nil {
		t.Fatal(err)
	}
	if err := tx.QueryRow(r.ctx, `SELECT current_user = session_user AND current_setting('transaction_read_only') = 'off' AND current_setting('work_mem') <> '64kB'`).Scan(new(bool)); err != nil {
		t.Fatal(err, role)
	}
	amy.sync("care")
}

func testSessionsAndStatus(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	s := NewSessions(r.db)
	status := func(user string) protocol.Status {
		t.Helper()
		st, err := s.Status(r.ctx, user, "phone", amy.token())
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	amy.send(amy.request("care", amy.edit("care", patients, "1", "name", "s")))
	if st := status("amy"); st.State != "unknown" {
		t.Fatalf("%+v", st)
	}
	for i, want := range []protocol.Status{{State: "staged", Records: 1}, {State: "merged", Records: 1}, {State: "replied", Records: 1, Pages: 1}} {
		if _, err := []Worker{r.intake, r.merge, r.reply}[i].Batch(r.ctx, r.ctx, noop); err != nil {
			t.Fatal(err)
		}
		if st := status("amy"); st != want {
			t.Fatalf("%+v, want %+v", st, want)
		}
	}
	if st := status("ben"); st.State != "unknown" {
		t.Fatal("another user sees the session")
	}
	amy.receive()
	for _, user := range []string{"ben", "amy", "amy"} {
		if err := s.Close(r.ctx, user, "phone", amy.token()); err != nil {
			t.Fatal(err)
		}
		if user == "ben" {
			r.want("replied", `SELECT state FROM waystage.session WHERE token = $1`, amy.token())
		}
	}
	r.want("closed", `SELECT state FROM waystage.session WHERE token = $1`, amy.token())
	r.want("false", `SELECT last_sync_at IS NULL FROM waystage.device WHERE user_name = 'amy' AND name = 'phone'`)
	if st := status("amy"); st.State != "replied" || st.Pages != 1 {
		t.Fatalf("%+v", st)
	}
	if _, err := s.Status(r.ctx, "amy", "phone", "x"); err == nil {
		t.Fatal("a bad token")
	}
	// Without the device's word the next session closes the one before.
	amy.sync("care")
	before := amy.token()
	amy.sync("care")
	r.want("closed", `SELECT state FROM waystage.session WHERE token = $1`, before)
}

func testPrune(t *testing.T, r *rig) {
	amy, tab, ben := shared(r)
	p := NewPruner(RetentionConfig{InFlight: time.Nanosecond, Chunk: 2}, r.db, nil)
	prune := func() Pruned {
		t.Helper()
		n, err := p.Prune(r.ctx)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	r.office(`INSERT INTO public.visit (id, patient) SELECT 'v' || g, 1 FROM generate_series(1, 5) g`)
	amy.sync("care", amy.edit("care", patients, "1", "name", "p"), change(patients, "", nil, row("id", "bad")))
	ben.sync("care")
	tab.sync("care")
	r.office(`DELETE FROM public.visit`)
	r.exec(`UPDATE waystage.change SET state = 'applied', stamp = pg_current_xact_id()::text::bigint WHERE state = 'merged'`)
	r.exec(`UPDATE waystage.change SET decided_at = now() - interval '100 days'`)
	prune()
	time.Sleep(1100 * time.Millisecond) // the bound's clock counts seconds
	if n := prune(); n.Tombstones != 0 || n.Changes != 0 {
		t.Fatalf("what devices have not heard of was pruned: %+v", n)
	}
	for _, d := range []*dev{amy, tab, ben} {
		d.sync("care")
		if len(d.set("care").rows[visits]) != 0 {
			t.Fatal("deletes were not sent")
		}
	}
	// The rejection's reply was applied: the request told so. The later verdict was only sent.
	if n := prune(); n.Changes != 1 {
		t.Fatalf("%+v", n)
	}
	r.want("applied", `SELECT state FROM waystage.change`)
	r.office(`UPDATE public.patient SET _ws_version = DEFAULT`)
	for _, d := range []*dev{amy, tab, ben} {
		d.sync("care")
	}
	time.Sleep(1100 * time.Millisecond)
	if n := prune(); n.Changes != 1 || n.Tombstones != 5 {
		t.Fatalf("%+v", n)
	}
	// Closed sessions go, but for the last of each incarnation.
	r.exec(`UPDATE waystage.session SET replied_at = now() - interval '8 days'`)
	if n := prune(); n.Sessions == 0 {
		t.Fatalf("%+v", n)
	}
	r.want("3", `SELECT count(*) FROM waystage.session`)
	amy.send(amy.last)
	r.pump()
	amy.receive()
	// A device that was away for long gets everything.
	r.exec(`UPDATE waystage.cursor SET created_at = now() - interval '31 days' WHERE token = $1`, ben.set("care").cursor)
	if n := prune(); n.Cursors != 1 {
		t.Fatalf("%+v", n)
	}
	ben.send(ben.request("care"))
	r.pump()
	if !ben.pages()[0].Refresh {
		t.Fatal("no refresh behind the horizon")
	}
	ben.receive()
	r.exec(`UPDATE waystage.keyset SET created_at = now() - interval '2 hours'`)
	r.exec(`INSERT INTO waystage.keyset (hash, keys, created_at) VALUES ('x', '{1}', now() - interval '2 hours')`)
	if n := prune(); n.Keysets != 1 {
		t.Fatalf("%+v", n)
	}
	amy.sync("care")
	amy.agree("care", patients, "id IN (1, 2)")
}
