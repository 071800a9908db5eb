package stages

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/waystage/waystage/protocol"
)

// testCheck: a device that asks hears exactly what a session would bring now, also from memory, and beside many others.
func testCheck(t *testing.T, r *rig) {
	amy, _, ben := shared(r)
	for _, d := range []*dev{amy, ben} {
		d.sync("care")
		d.sync("base")
	}
	k := NewCheck(CheckConfig{Seen: time.Nanosecond}, r.reply, nil)
	want := func(d *dev, want string) {
		t.Helper()
		got, err := k.News(r.ctx, d.user, d.name, d.held("care", "base"))
		if err != nil {
			t.Fatal(err)
		}
		if have := strings.Join(got, " "); have != want {
			t.Fatalf("%s: news is %q, want %q", d.user, have, want)
		}
	}
	twice := func(d *dev, sets string) {
		t.Helper()
		want(d, sets)
		want(d, sets)
	}
	twice(amy, "")
	twice(ben, "")
	r.want("2", `SELECT count(*) FROM waystage.device WHERE last_sync_at IS NOT NULL AND user_name IN ('amy', 'ben') AND name IN ($1, $2)`, amy.name, ben.name)

	// What is written is seen at once, by whom it concerns.
	r.office(`INSERT INTO public.visit (id, patient, note) VALUES ('c1', 2, 'x')`)
	twice(amy, "care")
	twice(ben, "")
	amy.sync("care")
	twice(amy, "")

	// Many at once are answered together, each by its own; who gives up stops nobody.
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			d := []*dev{amy, ben}[i%2]
			ctx, cancel := context.WithCancel(r.ctx)
			defer cancel()
			if i%10 == 9 {
				cancel()
			}
			got, err := k.News(ctx, d.user, d.name, d.held("care", "base"))
			if len(got) > 0 || err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
	all.Wait()

	// What only a session can bring.
	r.exec(`UPDATE waystage.device SET new_key_asked_at = now() WHERE user_name = 'amy' AND name = $1`, amy.name)
	twice(amy, "care base")
	r.exec(`UPDATE waystage.device SET new_key_asked_at = NULL, verify_asked_at = now() WHERE user_name = 'amy' AND name = $1`, amy.name)
	twice(amy, "care base")
	r.exec(`UPDATE waystage.device SET verify_asked_at = NULL WHERE user_name = 'amy' AND name = $1`, amy.name)
	twice(amy, "")
	r.exec(`UPDATE waystage.cursor SET created_at = now() - interval '1 day' WHERE token = $1`, amy.set("base").cursor)
	twice(amy, "base")

	// A set that is not the device's, and one that it has no cursor of.
	got, err := k.News(r.ctx, ben.user, ben.name, protocol.Watch{Sets: []protocol.WatchSet{{Set: "care"}, {Set: "nothing of his"}}})
	if have := strings.Join(got, " "); err != nil || !strings.Contains(have, "care") || !strings.Contains(have, "nothing of his") {
		t.Fatalf("%q %v", have, err)
	}
}
