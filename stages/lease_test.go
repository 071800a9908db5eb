package stages

import (
	"maps"
	"testing"
	"time"

	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
)

// copyOf is another file of the same device, under an incarnation of its own.
func copyOf(d *dev) *dev {
	c := *d
	c.inc, c.n, c.sets = randomID()+randomID(), 0, map[string]*devSet{}
	maps.Copy(c.sets, d.sets)
	return &c
}

// anew begins a new incarnation, as a device does that has forked.
func (d *dev) anew() {
	d.inc, d.n, d.epoch, d.sets = randomID()+randomID(), 0, "", map[string]*devSet{}
}

// testTwoFiles: of two files of one device, one waits while the other has a session under way.
func testTwoFiles(t *testing.T, r *rig) {
	r.intake.cfg.Lease = time.Hour
	amy, tab, ben := shared(r)
	twin := copyOf(amy)
	twin.send(twin.request("care"))
	r.pump()
	twin.refused(protocol.CodeSessionOpen)
	if e := twin.pages()[0].Error; e.Retry < 1 || e.Retry > 3600 {
		t.Fatalf("%+v", e)
	}
	r.want("0", `SELECT count(*) FROM waystage.session WHERE incarnation = $1`, twin.inc)
	// Its own file goes on, and other devices too; the same request again is no second session.
	amy.sync("care")
	amy.send(amy.last)
	r.pump()
	amy.receive()
	tab.sync("care")
	ben.sync("care")
	// Over: the device has applied the reply.
	if err := NewSessions(r.db).Close(r.ctx, amy.user, amy.name, amy.token()); err != nil {
		t.Fatal(err)
	}
	twin.send(twin.last)
	r.pump()
	twin.apply(twin.pages())
	// Both at once: one of them.
	if err := NewSessions(r.db).Close(r.ctx, twin.user, twin.name, twin.token()); err != nil {
		t.Fatal(err)
	}
	amy.send(amy.request("care"))
	twin.send(twin.request("care"))
	r.pump()
	errs := 0
	for _, d := range []*dev{amy, twin} {
		if e := d.pages()[0].Error; e != nil && e.Code == protocol.CodeSessionOpen {
			errs++
		}
	}
	if errs != 1 {
		t.Fatalf("%d of two were refused", errs)
	}
	// A session that was broken off does not keep the others out for ever, whatever the broker's clock says.
	if _, err := r.db.Exec(r.ctx, `UPDATE waystage.session SET received_at = received_at + interval '2 hours'`); err != nil {
		t.Fatal(err)
	}
	r.intake.cfg.Lease = time.Nanosecond
	for _, d := range []*dev{amy, twin} {
		d.send(d.last)
		r.pump()
		pages := d.pages()
		if e := pages[0].Error; e != nil {
			t.Fatalf("refused: %+v", e)
		}
		d.apply(pages)
	}
	// A copy with the numbers of the other is no open session: it has forked.
	r.intake.cfg.Lease = time.Hour
	forked := *amy
	forked.n--
	for range 2 { // asked twice, it has forked once
		forked.send(forked.request("care", forked.edit("care", patients, "2", "name", "clone")))
		forked.n--
		r.pump()
		forked.refused(protocol.CodeForked)
		forked.send(forked.last)
		r.pump()
		forked.refused(protocol.CodeForked)
	}
	d, err := registry.New(r.db, nil).Device(r.ctx, amy.user, amy.name)
	if err != nil || d.Forks != 1 || d.ForkedAt == nil || len(d.Incarnations) != 2 {
		t.Fatalf("%+v %v", d, err)
	}
}

// testResetAndRemoved: a device that was reset begins anew, at once; one that was removed is not let on, and what was taken
// from both gets its verdict.
func testResetAndRemoved(t *testing.T, r *rig) {
	r.intake.cfg.Lease = time.Hour
	amy, tab, _ := shared(r)
	users := registry.New(r.db, nil)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	amy.send(amy.request("care", amy.edit("care", patients, "1", "name", "sent")))
	if _, err := r.intake.Batch(r.ctx, r.ctx, noop); err != nil { // staged
		t.Fatal(err)
	}
	if d, err := users.Device(r.ctx, "amy", "phone"); err != nil || d.Unmerged != 1 || len(d.Sets) != 1 || d.Sets[0].OpenAt == nil {
		t.Fatalf("%+v %v", d, err)
	}
	must(users.ResetDevice(r.ctx, "amy", "phone"))
	r.pump()
	r.want("sent", `SELECT name FROM public.patient WHERE id = 1`)
	if d, err := users.Device(r.ctx, "amy", "phone"); err != nil || d.Unapplied != 1 || d.Unmerged != 0 || d.Sets[0].UpAt == nil {
		t.Fatalf("%+v %v", d, err)
	}
	amy.send(amy.last)
	r.pump()
	amy.refused(protocol.CodeForked)
	amy.anew()
	verdicts := amy.sync("care") // not kept waiting by what it had open before
	if len(verdicts) != 0 {      // those of the session itself
		t.Fatalf("%+v", verdicts)
	}
	told := 0
	for _, p := range amy.pages() {
		told += len(p.Verdicts)
	}
	if told != 1 || amy.pages()[0].Refresh != true {
		t.Fatalf("%d verdicts were told", told)
	}
	r.want("0", `SELECT forks FROM waystage.device WHERE user_name = 'amy' AND name = 'phone'`)

	tab.send(tab.request("care", tab.edit("care", patients, "2", "name", "on its way")))
	if _, err := r.intake.Batch(r.ctx, r.ctx, noop); err != nil {
		t.Fatal(err)
	}
	must(users.RemoveDevice(r.ctx, "amy", "tablet"))
	r.pump()
	r.want("on its way", `SELECT name FROM public.patient WHERE id = 2`)
	r.want("merged", `SELECT state FROM waystage.change WHERE key = '{2}'`)
	tab.send(tab.request("care"))
	r.pump()
	tab.refused(protocol.CodeBlocked)
	// Not forgotten before the verdict, and then it is.
	pruner := NewPruner(RetentionConfig{Sessions: time.Nanosecond}, r.db, nil)
	if n, err := pruner.Prune(r.ctx); err != nil || n.Devices != 0 {
		t.Fatalf("%+v %v", n, err)
	}
	r.exec(`UPDATE waystage.change SET state = 'applied', decided_at = now(), stamp = pg_current_xact_id()::text::bigint WHERE key = '{2}'`)
	if n, err := pruner.Prune(r.ctx); err != nil || n.Devices != 1 {
		t.Fatalf("%+v %v", n, err)
	}
}

// testNewKeyWanted: the device hears of it, if its library knows what that is.
func testNewKeyWanted(t *testing.T, r *rig) {
	amy, tab, _ := shared(r)
	r.exec(`UPDATE waystage.device SET new_key_asked_at = now()`)
	ask := func(d *dev, library string) bool {
		t.Helper()
		req := d.request("care")
		req.Library = library
		d.send(req)
		r.pump()
		d.receive()
		return d.pages()[0].NewKey
	}
	if !ask(amy, "waystage-go/1") || ask(tab, "") {
		t.Error("told to the wrong one")
	}
	r.want("waystage-go/1", `SELECT library FROM waystage.device WHERE user_name = 'amy' AND name = 'phone'`)
	r.exec(`UPDATE waystage.device SET new_key_asked_at = NULL`)
	if ask(amy, "waystage-go/1") {
		t.Error("told for nothing")
	}
}
