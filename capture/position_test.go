package capture

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/change"
)

// Rule R7 as a property: whatever happens in whatever order, the slot is told nothing behind which a transaction of ours
// is not durable, and everything once nothing is in flight.
func TestHazardAckIsNeverAheadOfTheTarget(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		log := change.LSN(100)
		p := newPosition(log)
		var ours []change.LSN // ends of transactions with rows that are not durable
		var told change.LSN
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 0:
				p.begin()
				if p.flush() != p.durable {
					t.Fatal("told more than durable inside a transaction")
				}
				log += change.LSN(rapid.IntRange(1, 50).Draw(t, "size"))
				if rapid.Bool().Draw(t, "keepalive inside") {
					p.keepalive(log)
				}
				log += 10
				empty := rapid.Bool().Draw(t, "empty")
				p.commit(log, empty)
				if !empty {
					ours = append(ours, log)
				}
			case 1:
				log += change.LSN(rapid.IntRange(0, 1000).Draw(t, "others"))
				p.keepalive(log)
			case 2, 3:
				if n := rapid.IntRange(0, len(ours)).Draw(t, "durable"); n > 0 {
					p.target(ours[n-1])
					ours = ours[n:]
				}
			case 4:
				p.target(rapid.SampledFrom([]change.LSN{0, 1, p.durable}).Draw(t, "old news"))
			}
			f := p.flush()
			if len(ours) > 0 && f >= ours[0] {
				t.Fatalf("told %d, a transaction that ends at %d is not durable", f, ours[0])
			}
			if len(ours) == 0 && f < log && f < p.quiet {
				t.Fatalf("told %d, nothing is in flight up to %d", f, log)
			}
			if f < told && len(ours) == 0 {
				t.Fatalf("went back from %d to %d", told, f)
			}
			told = f
			if p.write() < f {
				t.Fatalf("written %d is behind flushed %d", p.write(), f)
			}
		}
	})
}
