package conflict

import (
	"testing"

	"pgregory.net/rapid"
)

func TestPolicyResolves(t *testing.T) {
	for _, c := range []struct {
		name   string
		p      Policy
		c      Clash
		effect Effect
		why    Reason
	}{
		{"no policy", RejectClash, Clash{Op: Update, Exists: true, Known: true}, Reject, Stale},
		{"other columns", MergeColumns, Clash{Op: Update, Exists: true, Known: true}, Change, None},
		{"the same column", MergeColumns, Clash{Op: Update, Exists: true, Known: true, Overlap: true}, Reject, Stale},
		{"without a base image", MergeColumns, Clash{Op: Update, Exists: true}, Reject, Stale},
		{"columns of a row that is gone", MergeColumns, Clash{Op: Update, Known: true}, Reject, Stale},
		{"columns, a delete", MergeColumns, Clash{Op: Delete, Exists: true, Known: true}, Reject, Stale},
		{"columns, an insert", MergeColumns, Clash{Op: Insert, Exists: true, Known: true}, Reject, Stale},
		{"last", LastWriter, Clash{Op: Update, Exists: true, Overlap: true}, Change, None},
		{"last deletes", LastWriter, Clash{Op: Delete, Exists: true}, Remove, None},
		{"last inserts", LastWriter, Clash{Op: Insert, Exists: true}, Change, None},
		{"last updates a row that is gone", LastWriter, Clash{Op: Update}, Reject, Stale},
		{"last, another's row", LastWriter, Clash{Op: Update, Exists: true, Moved: true}, Reject, Stale},
		{"the source wins", SourceWins, Clash{Op: Update, Exists: true, Known: true}, Reject, Yields},
		{"the source wins by a delete", SourceWins, Clash{Op: Update}, Reject, Yields},
	} {
		t.Run(c.name, func(t *testing.T) {
			if e, why := Resolve(c.p, Stale, c.c); e != c.effect || why != c.why {
				t.Errorf("%d, %q; want %d, %q", e, why, c.effect, c.why)
			}
		})
	}
	if p := LastWriter.For(Insert, false); p != RejectClash {
		t.Errorf("an insert becomes an update where devices may not update: %s", p)
	}
	if p := Policy("").For(Update, true); p != RejectClash {
		t.Errorf("no policy is %q", p)
	}
}

// Whatever a policy or a function says, the effect fits the row, is refused with a reason or taken without one, and is never
// nothing: what is taken is written.
func TestPolicyEffectsFitTheRow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := func(n string) bool { return rapid.Bool().Draw(t, n) }
		c := Clash{Op: rapid.SampledFrom([]Op{Insert, Update, Delete}).Draw(t, "op"), Exists: b("exists"), Known: b("known"), Overlap: b("overlap"), Moved: b("moved")}
		check := func(e Effect, why Reason) {
			if (e == Reject) != (why != None) || e == Nothing || e == Create && c.Exists || (e == Change || e == Remove) && !c.Exists {
				t.Fatalf("%+v: effect %d, %q", c, e, why)
			}
		}
		check(Resolve(rapid.SampledFrom([]Policy{RejectClash, MergeColumns, LastWriter, SourceWins}).Draw(t, "policy"), Stale, c))
		e, why := Answered(AnswerOf(rapid.Byte().Draw(t, "answer")), Stale, c)
		check(e, why)
		w, on, n := rapid.SampledFrom([]Writer{Initial, Own, Foreign}).Draw(t, "writer"), b("on refused"), rapid.IntRange(0, MaxRebases+1).Draw(t, "rebases")
		plain, _ := Retry(w, on, n)
		if a, _ := Reconsider(w, on, n, e, why); a == Rebase && plain != Rebase && (w != Foreign || on || e == Reject || n >= MaxRebases) {
			t.Fatalf("rebased without a policy that took it: writer %d, on refused %v, effect %d, %d rebases", w, on, e, n)
		}
	})
}
