package conflict

import (
	"testing"

	"pgregory.net/rapid"
)

func TestMergeDecidesRuleD3(t *testing.T) {
	for _, c := range []struct {
		name string
		f    Facts
		e    Effect
		r    Reason
	}{
		{"insert of an absent row", Facts{Op: Insert, Version: true}, Create, None},
		{"insert over a row", Facts{Op: Insert, Exists: true}, Reject, RowExists},
		{"insert of what is already there", Facts{Op: Insert, Exists: true, SameImage: true}, Nothing, None},
		{"update on the row's version", Facts{Op: Update, Exists: true, Version: true}, Change, None},
		{"update on an obsolete version", Facts{Op: Update, Exists: true}, Reject, Stale},
		{"update on an obsolete version to what is already there", Facts{Op: Update, Exists: true, SameImage: true}, Nothing, None},
		{"update on the own last merge that a trigger rewrote", Facts{Op: Update, Exists: true, OwnEcho: true}, Change, None},
		{"update of a deleted row", Facts{Op: Update}, Reject, RowDeleted},
		{"delete on the row's version", Facts{Op: Delete, Exists: true, Version: true}, Remove, None},
		{"delete on an obsolete version", Facts{Op: Delete, Exists: true}, Reject, Stale},
		{"delete of an absent row, whatever the version", Facts{Op: Delete}, Nothing, None},
		{"insert based on a version of a row that is gone", Facts{Op: Insert}, Reject, RowDeleted},
		{"after a rebuild the version means nothing", Facts{Op: Update, Exists: true, Version: true, OldEpoch: true}, Reject, Stale},
		{"after a rebuild the base image counts", Facts{Op: Update, Exists: true, OldEpoch: true, BaseImage: true}, Change, None},
	} {
		t.Run(c.name, func(t *testing.T) {
			if e, r := Merge(c.f); e != c.e || r != c.r {
				t.Errorf("Merge(%+v) = %d, %q; want %d, %q", c.f, e, r, c.e, c.r)
			}
		})
	}
}

func TestMergeNeverOverwritesAnUnseenImage(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := func(n string) bool { return rapid.Bool().Draw(t, n) }
		f := Facts{Op: rapid.SampledFrom([]Op{Insert, Update, Delete}).Draw(t, "op"), Exists: b("exists"), Version: b("version"),
			OwnEcho: b("own"), SameImage: b("same"), OldEpoch: b("epoch"), BaseImage: b("base")}
		e, r := Merge(f)
		if (e == Reject) != (r != None) {
			t.Fatalf("%+v: effect %d with reason %q", f, e, r)
		}
		writes := e == Create || e == Change || e == Remove
		seen := f.OwnEcho || (f.OldEpoch && f.BaseImage) || (!f.OldEpoch && f.Version)
		if writes && !seen {
			t.Fatalf("%+v writes (%d) over an image that its author has not seen", f, e)
		}
		if (e == Create) == f.Exists && writes {
			t.Fatalf("%+v: effect %d does not fit the row's existence", f, e)
		}
	})
}

func TestRetryRefusesOnlyConflicts(t *testing.T) {
	for n := 0; n < MaxRebases; n++ {
		if a, _ := Retry(Own, n); a != Rebase {
			t.Fatalf("our own writer made a conflict at attempt %d", n)
		}
	}
	if a, r := Retry(Own, MaxRebases); a != Refuse || r != Source {
		t.Error("rebasing is not bounded")
	}
	if a, r := Retry(Foreign, 0); a != Refuse || r != Source {
		t.Error("a foreign writer is a conflict")
	}
	if a, r := Retry(Initial, 0); a != Refuse || r != Dependency {
		t.Error("an expectation that the source never had comes from a refused predecessor")
	}
}
