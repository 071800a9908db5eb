package stages

import (
	"maps"
	"testing"

	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
)

// testForcedRefresh: an order to send everything counts at the next sync, once, whatever happens to its reply; edits are judged as ever.
func testForcedRefresh(t *testing.T, r *rig) {
	devs := r.staff("amy", "ben")
	amy, ben, tab := devs[0], devs[1], r.device("amy", "tablet")
	all := []*dev{amy, tab, ben}
	r.office(`INSERT INTO public.share VALUES ('amy', 1), ('ben', 1)`)
	r.office(`INSERT INTO public.item SELECT 'i' || g, 1, 'n' FROM generate_series(1, 3) g`)
	reg := registry.New(r.db, nil)
	order := func(o registry.RefreshOrder, devices int) {
		t.Helper()
		o.Who = "op"
		if _, n, err := reg.OrderRefresh(r.ctx, o); err != nil || n != devices {
			t.Fatalf("%d devices, %v; want %d", n, err, devices)
		}
	}
	state := func(d *dev, want string) {
		t.Helper()
		list, err := reg.Refreshes(r.ctx, d.user, d.name)
		if err != nil {
			t.Fatal(err)
		}
		got := "none"
		if len(list) == 1 {
			got = list[0].State
		}
		if got != want || len(list) == 1 && (list[0].Who != "op" || list[0].Set != "all") {
			t.Fatalf("%s/%s: %+v, want %s", d.user, d.name, list, want)
		}
	}
	// refreshed syncs and tells whether everything came.
	refreshed := func(d *dev, want bool, changes ...protocol.Change) map[int]protocol.Verdict {
		t.Helper()
		v := d.sync("all", changes...)
		if got := d.pages()[0].Refresh; got != want {
			t.Fatalf("%s/%s: refresh %v, want %v", d.user, d.name, got, want)
		}
		if have, want := d.holds(items), r.subset(d.user, items); !maps.Equal(have, want) {
			t.Fatalf("the device has %v, want %v", have, want)
		}
		return v
	}
	for _, d := range all {
		refreshed(d, true)
		state(d, "none")
	}
	order(registry.RefreshOrder{User: "amy", Device: "phone"}, 1)
	order(registry.RefreshOrder{User: "amy", Device: "phone", Sets: []string{"all"}}, 1) // again: nothing more
	state(amy, "waiting")
	refreshed(tab, false)
	refreshed(ben, false)
	state(tab, "none")
	// A row that the device should not have, one that it has lost, and an edit.
	edit := amy.edit("all", items, "i1", "note", "amy's")
	amy.set("all").rows[items]["stray"] = devRow{"1", row("id", "stray", "k", 1, "note", "x")}
	delete(amy.set("all").rows[items], "i2")
	amy.verdict(refreshed(amy, true, edit), "merged")
	state(amy, "sent")
	refreshed(amy, false)
	state(amy, "done")
	refreshed(amy, false)
	refreshed(tab, false)

	// A user's devices; the reply is lost again and again, and is one of everything each time.
	order(registry.RefreshOrder{User: "amy"}, 2)
	amy.send(amy.request("all"))
	r.pump()
	for range 2 {
		if !amy.pages()[0].Refresh {
			t.Fatal("the reply that was composed again is not one of everything")
		}
		r.q.purge()
		amy.send(amy.last)
		r.pump()
	}
	// The order comes while a reply is under way: it counts at the next sync.
	order(registry.RefreshOrder{User: "amy", Device: "phone"}, 1)
	amy.receive()
	state(amy, "waiting")
	refreshed(amy, true)
	refreshed(amy, false)
	state(tab, "waiting")
	refreshed(tab, true)
	refreshed(tab, false)
	refreshed(ben, false)

	// A set of everybody's; the order of another set concerns nobody.
	order(registry.RefreshOrder{Sets: []string{"other"}}, 0)
	order(registry.RefreshOrder{Sets: []string{"all"}, Subscription: "items", Note: "why"}, 3)
	r.stages() // as after a crash of all processes
	for _, d := range all {
		refreshed(d, true)
		refreshed(d, false)
		state(d, "done")
	}
	// A refresh that cannot be sent is not over.
	order(registry.RefreshOrder{User: "ben"}, 1)
	r.office(`UPDATE public.item SET note = repeat('x', 9000), _ws_version = DEFAULT WHERE id = 'i3'`)
	r.reply.cfg.MaxPage = 8 << 10
	ben.send(ben.request("all"))
	r.pump()
	ben.refused(protocol.CodeTooBig)
	r.stages()

	refreshed(ben, true)
	for _, o := range []registry.RefreshOrder{{User: "nobody"}, {User: "amy", Device: "none"}, {User: protocol.OperatorUser}} {
		if _, _, err := reg.OrderRefresh(r.ctx, o); err == nil {
			t.Fatalf("%+v was taken", o)
		}
	}
	// A new device under an old order gets everything once.
	late := r.device("ben", "late")
	refreshed(late, true)
	refreshed(late, false)
	// The record stays as long as it can be asked for, and then goes.
	r.exec(`UPDATE waystage.refresh SET asked_at = now() - interval '91 days' WHERE subscription = 'items'`)
	if _, err := NewPruner(RetentionConfig{}, r.db, nil).Prune(r.ctx); err != nil {
		t.Fatal(err)
	}
	r.want("0", `SELECT count(*) FROM waystage.refresh WHERE subscription = 'items'`)
	r.want("true", `SELECT count(*) > 3 FROM waystage.refresh`)
	refreshed(amy, false)
}
