package chaos

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

// plan is one history: what users do and what is broken meanwhile. It is a function of its seed alone; when things
// happen to each other is the machine's.
type plan struct {
	Seed    uint64
	Devices []deviceplan
	Clerks  [][]step
	Faults  []fault
}

// deviceplan is one device and what its user does, in order.
type deviceplan struct {
	User, Name string
	Steps      []step
}

// step is one action. R decides everything about it that Kind leaves open.
type step struct {
	Kind  string
	R     uint64
	Pause int // milliseconds afterwards
}

// fault is one thing that breaks. At is when: so many of a thousand of all steps are done.
type fault struct {
	At     int
	Kind   string
	Target string
	For    int // milliseconds until it is mended
	R      uint64
}

// Kinds of a device's steps.
const (
	stepEdit  = "edit"   // one row
	stepTx    = "tx"     // some rows in one local transaction
	stepSync  = "sync"   // until it is done
	stepCut   = "cut"    // a sync that is cancelled soon
	stepBogus = "bogus"  // a request that nobody can read, in the device's name
	stepWork  = "office" // a clerk's transaction
)

// faults by kind, with how often each is drawn.
var faultKinds = []struct {
	kind    string
	weight  int
	targets []string
	low     int
	high    int
}{
	{"kill-server", 5, []string{"server-0", "server-1"}, 0, 800},
	{"kill-servers", 1, []string{"all"}, 0, 500},
	{"stop-server", 2, []string{"server-0", "server-1"}, 0, 300},
	{"pause-server", 3, []string{"server-0", "server-1"}, 200, 3000},
	{"zombie", 5, []string{"server-0", "server-1"}, 300, 3000}, // paused, its database connections are cut, and it wakes again
	{"kill-nats", 3, []string{"nats"}, 0, 800},
	{"wipe-nats", 3, []string{"nats"}, 0, 500},
	{"rewind-nats", 2, []string{"nats"}, 100, 1500}, // killed, and its store is what it was some time ago
	{"pause-nats", 1, []string{"nats"}, 200, 2000},
	{"kill-postgres", 4, []string{"source", "mirror"}, 0, 500},
	{"stop-postgres", 1, []string{"source", "mirror"}, 0, 300},
	{"pause-walsender", 3, []string{"source", "mirror"}, 200, 2500},
	{"terminate", 3, []string{"source", "mirror"}, 0, 0},
	{"kill-device", 4, []string{"0", "1", "2", "3"}, 0, 300},
	{"cut", 4, links, 0, 0},
	{"refuse", 2, links, 200, 1500},
	{"stall", 2, links, 200, 2500},     // nothing flows for a while, then everything
	{"blackhole", 2, links, 200, 2500}, // nothing flows for a while, then the connections break
	{"half-open", 2, links, 200, 2500}, // requests flow, answers do not; then the connections break
	{"lose", 4, []string{"WS_IN", "WS_OUT", "WS_CD_UP", "WS_CD_DOWN"}, 300, 1500},
	{"purge", 4, []string{"WS_IN", "WS_OUT", "WS_OUT"}, 300, 2000}, // emptied again and again
	{"double", 4, []string{"WS_IN", "WS_OUT", "WS_CD_UP", "WS_CD_DOWN"}, 300, 2000},
}

// links go through proxies.
var links = []string{"devices-nats", "server-0-nats", "server-1-nats", "server-0-mirror", "server-1-mirror", "server-0-source", "server-1-source"}

// newPlan draws the plan of a seed.
func newPlan(seed uint64) *plan {
	random := func(stream uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, stream)) }
	p := &plan{Seed: seed}
	for i, user := range []string{"ada", "ada", "ben", "ben"} {
		r := random(uint64(i))
		d := deviceplan{User: user, Name: fmt.Sprint("device-", i)}
		for len(d.Steps) < 56 {
			s := step{Kind: stepEdit, R: r.Uint64(), Pause: r.IntN(40)}
			switch n := r.IntN(100); {
			case n < 22:
				s.Kind = stepSync
			case n < 29:
				s.Kind = stepCut
			case n < 39:
				s.Kind = stepTx
			case n < 40:
				s.Kind = stepBogus
			}
			d.Steps = append(d.Steps, s)
		}
		p.Devices = append(p.Devices, d)
	}
	for i := range 2 {
		r := random(uint64(100 + i))
		var steps []step
		for range 90 {
			steps = append(steps, step{Kind: stepWork, R: r.Uint64(), Pause: 10 + r.IntN(70)})
		}
		p.Clerks = append(p.Clerks, steps)
	}
	r := random(200)
	total := 0
	for _, k := range faultKinds {
		total += k.weight
	}
	for range 5 + r.IntN(6) {
		n := r.IntN(total)
		for _, k := range faultKinds {
			if n -= k.weight; n < 0 {
				f := fault{At: 30 + r.IntN(850), Kind: k.kind, Target: k.targets[r.IntN(len(k.targets))], For: k.low, R: r.Uint64()}
				f.For += r.IntN(k.high - k.low + 1)
				p.Faults = append(p.Faults, f)
				break
			}
		}
	}
	slices.SortStableFunc(p.Faults, func(a, b fault) int { return a.At - b.At })
	return p
}

// steps counts them all.
func (p *plan) steps() int {
	n := 0
	for _, d := range p.Devices {
		n += len(d.Steps)
	}
	for _, c := range p.Clerks {
		n += len(c)
	}
	return n
}

func (p *plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d\n", p.Seed)
	write := func(name string, steps []step) {
		fmt.Fprintf(&b, "%s:", name)
		for i, s := range steps {
			fmt.Fprintf(&b, " %d:%s(%x)", i+1, s.Kind, s.R&0xffff)
		}
		b.WriteString("\n")
	}
	for _, d := range p.Devices {
		write(d.User+"/"+d.Name, d.Steps)
	}
	for i, c := range p.Clerks {
		write(fmt.Sprint("clerk ", i), c)
	}
	for _, f := range p.Faults {
		fmt.Fprintf(&b, "at %d of 1000 steps: %s\n", f.At, f)
	}
	return b.String()
}

func (f fault) String() string {
	if f.For == 0 {
		return f.Kind + " " + f.Target
	}
	return fmt.Sprintf("%s %s for %d ms", f.Kind, f.Target, f.For)
}
