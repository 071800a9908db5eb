package stages

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/waystage/waystage/protocol"
)

// testCrash kills the stages at random moments while devices sync, and restarts them. Every record is merged exactly
// once, and every device ends with the mirror's rows (promises I1, I2, I6, I7).
func testCrash(t *testing.T, r *rig) {
	const devices, sessions = 4, 8
	rng := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	r.exec(`INSERT INTO public.patient (id, name) VALUES (1, 'ann')`)
	devs := make([]*dev, devices)
	for i := range devs {
		name := fmt.Sprintf("n%d", i)
		r.exec(`INSERT INTO public.assignment VALUES ($1, 1)`, name)
		devs[i] = r.user(name, "nurses")
	}
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	var wg sync.WaitGroup
	// Two processes' workers, killed again and again.
	var mu sync.Mutex
	kills := 0
	for range 2 {
		for _, make := range []func() Worker{
			func() Worker { return r.intake.Worker() }, func() Worker { return r.merge.Worker() }, func() Worker { return r.reply.Worker() },
		} {
			wg.Go(func() {
				for ctx.Err() == nil {
					mu.Lock()
					d := time.Duration(rng.IntN(40)) * time.Millisecond
					if kills++; rng.IntN(8) == 0 || kills > 300 {
						d = time.Second // so that a slow machine gets on, too
					}
					mu.Unlock()
					life, end := context.WithTimeout(ctx, d)
					for w := make(); life.Err() == nil; {
						if n, err := w.Batch(life, life, noop); err != nil || n == 0 {
							time.Sleep(time.Millisecond)
						}
					}
					end()
					r.q.redeliver()
				}
			})
		}
	}
	verdicts := make([][]string, devices)
	var devs2 sync.WaitGroup
	for i, d := range devs {
		devs2.Go(func() {
			for s := range sessions {
				var changes []protocol.Change
				for c := range 3 {
					changes = append(changes, change(visits, "", nil, row("id", fmt.Sprintf("%s-%d-%d", d.user, s, c), "patient", 1, "note", "x")))
				}
				req := d.request("care", changes...)
				for done := false; !done && ctx.Err() == nil; {
					d.send(req) // again and again, as a device without an answer does
					for range 50 {
						time.Sleep(2 * time.Millisecond)
						pages, ok := d.whole()
						if !ok {
							continue
						}
						if pages[0].Error != nil {
							t.Errorf("session %s was refused: %v", d.token(), pages[0].Error)
							return
						}
						for _, v := range d.apply(pages) {
							verdicts[i] = append(verdicts[i], state(v))
						}
						done = true
						break
					}
				}
			}
		})
	}
	devs2.Wait()
	cancel()
	wg.Wait()
	if r.ctx.Err() != nil {
		t.Fatal(r.ctx.Err())
	}
	r.q.redeliver()
	r.pump()
	for i, d := range devs {
		if len(verdicts[i]) != sessions*3 {
			t.Fatalf("device %s heard %v", d.user, verdicts[i])
		}
		for _, v := range verdicts[i] {
			if v != "merged" {
				t.Fatalf("device %s heard %v", d.user, verdicts[i])
			}
		}
		d.sync("care")
		d.agree("care", visits, "true")
	}
	want := fmt.Sprint(devices * sessions * 3)
	r.want(want, `SELECT count(*) FROM waystage.change`)
	r.want(want, `SELECT count(*) FROM public.visit`)
	r.nothingStaged()
	r.want("0", `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
	t.Logf("%d lives", kills)
}

// whole reads the reply if all of its pages are there and of one composition.
func (d *dev) whole() ([]*protocol.Page, bool) {
	var list []*protocol.Page
	for i := 1; ; i++ {
		m, ok := d.r.q.get(d.user, d.name, d.token(), i)
		if !ok {
			return nil, false
		}
		p, err := protocol.DecodePage(m.body, m.contentType, protocol.Limits{})
		if err != nil {
			d.r.t.Error(err)
			return nil, false
		}
		if len(list) > 0 && p.Reply != list[0].Reply {
			return nil, false
		}
		if list = append(list, p); p.Last {
			return list, true
		}
	}
}
