package conflict

import (
	"slices"
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
		if a, _ := Retry(Own, false, n); a != Rebase {
			t.Fatalf("our own writer made a conflict at attempt %d", n)
		}
	}
	if a, r := Retry(Own, false, MaxRebases); a != Refuse || r != Source {
		t.Error("rebasing is not bounded")
	}
	for _, on := range []bool{false, true} {
		if a, r := Retry(Foreign, on, 0); a != Refuse || r != Source {
			t.Error("a foreign writer is a conflict")
		}
	}
	for _, w := range []Writer{Initial, Own} {
		if a, r := Retry(w, true, 0); a != Refuse || r != Dependency {
			t.Errorf("a change on top of a refused one does not fall with it (writer %d)", w)
		}
	}
}

func TestFall(t *testing.T) {
	for _, c := range []struct {
		name string
		list []Member
		want []Fallen
	}{
		{"nobody failed", []Member{{Unit: 1}, {Unit: 1, Refers: []int{0}}}, nil},
		{"independent records stand", []Member{{Failed: true}, {}, {Unit: 1}}, nil},
		{"a unit falls whole", []Member{{Unit: 1}, {Unit: 2}, {Unit: 1, Failed: true}, {Unit: 1}}, []Fallen{{0, 2, Transaction}, {3, 2, Transaction}}},
		{"who refers to a failed insert falls, and who refers to that", []Member{{Refers: []int{1}}, {Refers: []int{2}}, {Failed: true}}, []Fallen{{1, 2, Dependency}, {0, 1, Dependency}}},
		{"a dependent takes its unit along", []Member{{Failed: true}, {Unit: 7, Refers: []int{0}}, {Unit: 7}, {Refers: []int{2}}, {Unit: 8}},
			[]Fallen{{1, 0, Dependency}, {2, 1, Transaction}, {3, 2, Dependency}}},
		{"who failed by itself does not fall", []Member{{Failed: true}, {Failed: true, Refers: []int{0}}}, nil},
	} {
		if got := Fall(c.list); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// What stands after Fall has no cause to fall, and what fell has one.
func TestFallIsTheLeastClosure(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 12).Draw(t, "n")
		list := make([]Member, n)
		for i := range list {
			list[i] = Member{Unit: rapid.Int64Range(0, 3).Draw(t, "unit"), Failed: rapid.IntRange(0, 3).Draw(t, "failed") == 0,
				Refers: rapid.SliceOfN(rapid.IntRange(0, n-1), 0, 2).Draw(t, "refers")}
		}
		down := make([]bool, n)
		for i, m := range list {
			down[i] = m.Failed
		}
		for _, f := range Fall(list) {
			if down[f.Member] || !down[f.With] {
				t.Fatalf("%v: named twice, or falls with one that stands", f)
			}
			m := list[f.Member]
			if cause := f.Reason == Dependency && slices.Contains(m.Refers, f.With) || f.Reason == Transaction && m.Unit != 0 && m.Unit == list[f.With].Unit; !cause {
				t.Fatalf("%v has no cause", f)
			}
			down[f.Member] = true
		}
		for i, m := range list {
			for j, o := range list {
				if !down[i] && down[j] && (m.Unit != 0 && m.Unit == o.Unit || slices.Contains(m.Refers, j)) {
					t.Fatalf("%d stands although %d fell", i, j)
				}
			}
		}
	})
}

func TestOrderKeepsUnitsTogetherAndNeedsFirst(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 12).Draw(t, "n")
		units, after := make([]int64, n), make([][]int, n)
		for i := range n {
			units[i] = rapid.Int64Range(0, 3).Draw(t, "unit")
			after[i] = rapid.SliceOfN(rapid.IntRange(0, n-1), 0, 2).Draw(t, "after")
		}
		place := make([]int, n)
		for i := range place {
			place[i] = -1
		}
		order := Order(units, after)
		for p, part := range order {
			for _, i := range part {
				if place[i] >= 0 {
					t.Fatalf("%d comes twice in %v", i, order)
				}
				place[i] = p
			}
		}
		// need[i][j]: i needs j, by a chain.
		need := make([][]bool, n)
		for i := range n {
			need[i] = make([]bool, n)
			for j := range n {
				need[i][j] = i == j || units[i] != 0 && units[i] == units[j] || slices.Contains(after[i], j)
			}
		}
		for k := range n {
			for i := range n {
				for j := range n {
					need[i][j] = need[i][j] || need[i][k] && need[k][j]
				}
			}
		}
		for i := range n {
			for j := range n {
				if need[i][j] && place[j] > place[i] {
					t.Fatalf("%d needs %d, which comes later in %v", i, j, order)
				}
				if together := place[i] == place[j]; together != (need[i][j] && need[j][i]) {
					t.Fatalf("%d and %d: together %v in %v", i, j, together, order)
				}
			}
		}
	})
	if got := Order([]int64{0, 0, 0}, [][]int{nil, {2}, nil}); !slices.EqualFunc(got, [][]int{{0}, {2}, {1}}, slices.Equal[[]int]) {
		t.Errorf("order %v", got)
	}
}
