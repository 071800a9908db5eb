package stages

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/waystage/waystage/protocol"
)

// held is what a device says that it holds of sets.
func (d *dev) held(sets ...string) protocol.Watch {
	w := protocol.Watch{Sets: []protocol.WatchSet{}}
	for _, s := range sets {
		w.Sets = append(w.Sets, protocol.WatchSet{Set: s, Cursor: d.set(s).cursor})
	}
	return w
}

// wantNews asks once for all devices, and compares what each would hear: "user/device: sets".
func (r *rig) wantNews(want string, asks ...*waiter) {
	r.t.Helper()
	conn, err := r.db.Acquire(r.ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Release()
	news, err := r.reply.news(r.ctx, conn, r.cat, asks)
	if err != nil {
		r.t.Fatal(err)
	}
	var got []string
	for one, sets := range news {
		got = append(got, one.user+": "+strings.Join(sets, " "))
	}
	slices.Sort(got)
	if have := strings.Join(got, ", "); have != want {
		r.t.Fatalf("news is %q, want %q", have, want)
	}
}

func (d *dev) waiter(sets ...string) *waiter {
	return &waiter{user: d.user, device: d.name, ask: d.held(sets...), news: make(chan []string, 1)}
}

// testNews: a device hears of what the next reply would carry, and of nothing else.
func testNews(t *testing.T, r *rig) {
	amy, tab, ben := shared(r)
	all := []*dev{amy, tab, ben}
	sync := func() {
		t.Helper()
		for _, d := range all {
			d.sync("care")
			d.sync("base")
		}
	}
	want := func(news string) {
		t.Helper()
		r.wantNews(news, amy.waiter("care", "base"), ben.waiter("care", "base"))
	}
	sync()
	want("")
	for _, step := range []struct{ sql, news string }{
		{`INSERT INTO public.visit (id, patient, note) VALUES ('n1', 2, 'x')`, "amy: care"},
		{`INSERT INTO public.visit (id, patient, note) VALUES ('n2', 1, 'x')`, "amy: care, ben: care"},
		{`INSERT INTO public.visit (id, patient, note) VALUES ('n3', 3, 'x'), ('n4', NULL, 'x')`, ""},
		{`UPDATE public.visit SET note = 'y', _ws_version = DEFAULT WHERE id = 'n3'`, ""},
		{`UPDATE public.visit SET patient = 2, _ws_version = DEFAULT WHERE id = 'n3'`, "amy: care"},
		{`UPDATE public.visit SET patient = 3, _ws_version = DEFAULT WHERE id = 'n1'`, "amy: care"},
		{`DELETE FROM public.visit WHERE id = 'n2'`, "amy: care, ben: care"},
		{`INSERT INTO public.assignment VALUES ('ben', 3)`, "ben: care"},
		{`DELETE FROM public.assignment WHERE nurse = 'ben' AND patient = 3`, "ben: care"},
		{`INSERT INTO public.region VALUES (77, 'new')`, "amy: base, ben: base"},
	} {
		r.office(step.sql)
		want(step.news)
		sync()
		want("")
	}

	// A set that is not his any more.
	r.exec(`UPDATE waystage.app_user SET groups = '{clerks}' WHERE name = 'ben'`)
	want("ben: care")
	r.exec(`UPDATE waystage.app_user SET groups = '{nurses}' WHERE name = 'ben'`)
	want("")

	// Sets that the device does not have yet; unless it asks for some only.
	r.wantNews("amy: base", amy.waiter("care"))
	some := amy.waiter("care")
	some.ask.Only = true
	r.wantNews("", some)
	// No cursor, a stranger's, or one of another life of the mirror: everything is news.
	for _, token := range []string{"", "garbage", "e0.1.x", ben.set("care").cursor} {
		w := some
		w.ask.Sets = []protocol.WatchSet{{Set: "care", Cursor: token}}
		r.wantNews("amy: care", w)
	}
	// A device that nobody knows hears nothing.
	r.wantNews("", &waiter{user: "amy", device: "nobody", ask: amy.held("care")})

	// Verdicts: merged was told with the session, applied comes later.
	got := amy.sync("care", amy.edit("care", patients, "2", "name", "mine"))
	amy.verdict(got, "merged")
	tab.sync("care")
	r.wantNews("", amy.waiter("care", "base"), tab.waiter("care", "base"))
	r.exec(`UPDATE waystage.change SET state = 'applied', stamp = pg_current_xact_id()::text::bigint, decided_at = now() WHERE state = 'merged'`)
	r.wantNews("amy: care", amy.waiter("care", "base")) // it comes with any set
	sync()
	want("")
}

// testNewsOnce: while a transaction that is open holds the horizon back, a reply sends again what it has sent before; that is no news.
func testNewsOnce(t *testing.T, r *rig) {
	_, _, ben := shared(r)
	r.office(`INSERT INTO public.visit (id, patient) VALUES ('old', 1)`)
	ben.sync("care")
	slow, err := r.db.Begin(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = slow.Rollback(context.WithoutCancel(r.ctx)) }()
	if _, err := slow.Exec(r.ctx, `UPDATE public.patient SET name = 'slow', _ws_version = DEFAULT WHERE id = 1`); err != nil {
		t.Fatal(err)
	}
	r.office(`INSERT INTO public.visit (id, patient) VALUES ('fast', 1)`)
	r.office(`DELETE FROM public.visit WHERE id = 'old'`)
	ben.sync("base")
	r.wantNews("ben: care", ben.waiter("care", "base"))
	ben.sync("care")
	r.wantNews("", ben.waiter("care", "base"))
	if err := slow.Commit(r.ctx); err != nil {
		t.Fatal(err)
	}
	r.wantNews("ben: care", ben.waiter("care", "base"))
	ben.sync("care")
	ben.want("slow", "care", patients, "1", "name")
	r.wantNews("", ben.waiter("care", "base"))
}

// testWatchLoop: who waits is told, also when what somebody else asks for fails; nobody waits for ever.
func testWatchLoop(t *testing.T, r *rig) {
	amy, _, ben := shared(r)
	for _, d := range []*dev{amy, ben} {
		d.sync("care")
		d.sync("base")
	}
	w := NewWatch(WatchConfig{Tick: 10 * time.Millisecond}, r.reply, nil)
	ctx, stop := context.WithCancel(r.ctx)
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if n := w.count(); n != 0 {
			t.Errorf("%d still wait", n)
		}
	}()
	listen := func(ctx context.Context, d *dev) <-chan []string {
		ch := make(chan []string, 1)
		ask := d.held("care", "base")
		go func() { ch <- w.News(ctx, d.user, d.name, ask) }()
		return ch
	}
	hear := func(ch <-chan []string, want string) {
		t.Helper()
		select {
		case got := <-ch:
			if strings.Join(got, " ") != want {
				t.Fatalf("heard %q, want %q", got, want)
			}
		case <-r.ctx.Done():
			t.Fatalf("nothing was heard, want %q", want)
		}
	}
	waits := func(n int) {
		t.Helper()
		for w.count() != n {
			if r.ctx.Err() != nil {
				t.Fatalf("%d wait, want %d", w.count(), n)
			}
			time.Sleep(time.Millisecond)
		}
	}

	first, other := listen(ctx, amy), listen(ctx, ben)
	waits(2)
	r.office(`INSERT INTO public.visit (id, patient) VALUES ('w1', 2)`)
	hear(first, "care")
	r.office(`INSERT INTO public.visit (id, patient) VALUES ('w2', 1)`)
	hear(other, "care")

	// The same device asks anew: the call before ends empty.
	amy.sync("care")
	first = listen(ctx, amy)
	waits(1)
	again := listen(ctx, amy)
	hear(first, "")
	r.office(`INSERT INTO public.region VALUES (78, 'new')`)
	hear(again, "base")

	// Whoever gives up is forgotten.
	amy.sync("care")
	amy.sync("base")
	cctx, cancel := context.WithCancel(ctx)
	gone := listen(cctx, amy)
	waits(1)
	cancel()
	hear(gone, "")
	waits(0)

	// A rows query that fails for one user is that user's affair.
	ben.sync("care")
	ben.sync("base")
	r.exec(`CREATE FUNCTION public.picky(nurse text) RETURNS text LANGUAGE plpgsql STABLE AS $$ BEGIN IF nurse = 'amy' THEN RAISE 'not amy'; END IF; RETURN nurse; END $$`)
	defer r.exec(`DROP FUNCTION public.picky`)
	was := r.cat.sets["care"].byID[visits].reply.keys
	r.cat.sets["care"].byID[visits].reply.keys = strings.Replace(was, "where nurse =", "where nurse = public.picky(nurse) and nurse =", 1)
	defer func() { r.cat.sets["care"].byID[visits].reply.keys = was }()
	if was == r.cat.sets["care"].byID[visits].reply.keys {
		t.Fatal("the query is as before")
	}
	cctx, cancel = context.WithCancel(ctx)
	bad, good := listen(cctx, amy), listen(ctx, ben)
	waits(2)
	r.office(`INSERT INTO public.visit (id, patient) VALUES ('w3', 1)`)
	hear(good, "care")
	cancel()
	hear(bad, "")
}
