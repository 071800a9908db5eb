package conflict

import (
	"strings"
	"testing"
)

var sourceScopes = []sScope{
	{name: "up restarts", sessions: 3, fwr: 1, values: []int8{1, absent}, restarts: 1},
	{name: "up restarts, two foreign writes", sessions: 2, fwr: 2, values: []int8{1, absent}, restarts: 1},
	{name: "up restarts twice", sessions: 2, fwr: 1, values: []int8{1, absent}, restarts: 2},
	{name: "up restarts twice, two foreign writes", sessions: 1, fwr: 2, values: []int8{1, absent}, restarts: 2},
	{name: "up restarts, trigger", sessions: 3, fwr: 1, values: []int8{1, absent}, restarts: 1, trigger: true},
	{name: "up restarts, refusals", sessions: 2, fwr: 1, values: []int8{1, absent}, restarts: 1, refuses: true},
	{name: "up restarts, trigger and refusals", sessions: 2, fwr: 2, values: []int8{1}, restarts: 1, trigger: true, refuses: true},
	{name: "up restarts, key re-use", sessions: 2, fwr: 2, values: []int8{1}, restarts: 1, reuse: true},
	{name: "key re-use", sessions: 3, fwr: 2, values: []int8{1}, reuse: true},
	{name: "key re-use, trigger", sessions: 2, fwr: 2, values: []int8{1, absent}, reuse: true, trigger: true},
	{name: "foreign key, rows present", sessions: 3, fwr: 2, values: []int8{1, absent}, pairs: true, foreignKey: true},
	{name: "foreign key, rows absent", start: [2]int8{absent, absent}, sessions: 3, fwr: 2, values: []int8{1, absent}, pairs: true, foreignKey: true},
	{name: "foreign key, lawful devices", start: [2]int8{absent, absent}, sessions: 4, fwr: 1, values: []int8{1, absent}, pairs: true, foreignKey: true, lawful: true},
	{name: "foreign key, up restarts, key re-use", start: [2]int8{absent, absent}, sessions: 2, fwr: 2, values: []int8{1, absent}, pairs: true, foreignKey: true,
		restarts: 1, reuse: true},
	{name: "units", sessions: 2, fwr: 2, values: []int8{1, absent}, pairs: true, atomic: true},
	{name: "units, trigger", sessions: 2, fwr: 1, values: []int8{1, absent}, pairs: true, atomic: true, trigger: true},
	{name: "units, refusals", sessions: 2, fwr: 1, values: []int8{1, absent}, pairs: true, atomic: true, refuses: true},
	{name: "units, trigger and refusals, up restarts", sessions: 2, fwr: 1, values: []int8{1}, pairs: true, atomic: true, trigger: true, refuses: true, restarts: 1},
	{name: "units, up restarts", sessions: 2, fwr: 1, values: []int8{1, absent}, pairs: true, atomic: true, restarts: 1},
	{name: "units, foreign key, rows absent", start: [2]int8{absent, absent}, sessions: 2, fwr: 2, values: []int8{1, absent}, pairs: true, atomic: true, foreignKey: true},
	{name: "units, foreign key, refusals, key re-use", start: [2]int8{absent, absent}, sessions: 2, fwr: 2, values: []int8{1}, pairs: true, atomic: true,
		foreignKey: true, refuses: true, reuse: true},
	{name: "units, foreign key, lawful devices, up restarts", start: [2]int8{absent, absent}, sessions: 2, fwr: 1, values: []int8{1, absent}, pairs: true, atomic: true,
		foreignKey: true, lawful: true, restarts: 1},
	{name: "three sessions, trigger and refusals", sessions: 3, fwr: 1, values: []int8{1, 2}, trigger: true, refuses: true},
	{name: "deferred trigger", sessions: 3, fwr: 2, values: []int8{1, absent}, pairs: true, trigger: true, deferred: true},
	{name: "deferred trigger, refusals, up restarts", sessions: 2, fwr: 1, values: []int8{1}, pairs: true, trigger: true, deferred: true, refuses: true, restarts: 1},
	{name: "units, deferred trigger and refusals", sessions: 2, fwr: 1, values: []int8{1}, pairs: true, atomic: true, trigger: true, deferred: true, refuses: true},
	{name: "cascade", sessions: 3, fwr: 2, values: []int8{1, absent}, cascade: true},
	{name: "cascade, sessions of two records", sessions: 2, fwr: 2, values: []int8{1, absent}, pairs: true, cascade: true},
	{name: "cascade, rows absent", start: [2]int8{absent, absent}, sessions: 3, fwr: 2, values: []int8{1, absent}, pairs: true, cascade: true},
	{name: "cascade, units", sessions: 2, fwr: 2, values: []int8{1, absent}, pairs: true, atomic: true, cascade: true},
	{name: "cascade, trigger, key re-use", sessions: 2, fwr: 2, values: []int8{1, absent}, trigger: true, reuse: true, cascade: true},
	{name: "cascade, refusals, up restarts", sessions: 2, fwr: 1, values: []int8{1, absent}, refuses: true, restarts: 1, cascade: true},
	{name: "down is sent transactions again", sessions: 3, fwr: 1, values: []int8{1, absent}, trigger: true, redelivers: true},
	{name: "down is sent transactions again, up restarts, refusals", sessions: 2, fwr: 1, values: []int8{1, absent}, refuses: true, restarts: 1, redelivers: true},
	{name: "foreign key, trigger, refusals", sessions: 2, fwr: 2, values: []int8{1, absent}, pairs: true, foreignKey: true, trigger: true, refuses: true},
}

func TestModelSourceSurvivesAccidents(t *testing.T) {
	for _, sc := range sourceScopes {
		t.Run(sc.name, func(t *testing.T) {
			states, bad, trace := sc.explore(1_000_000)
			if bad != "" {
				t.Fatalf("after %d states: %s", states, told(bad, trace))
			}
			t.Logf("%d states", states)
		})
	}
}

// brokenSourceRules change one rule each. The model must find what that breaks.
var brokenSourceRules = []sScope{
	{finds: "DOUBLE", name: "a new up worker does not wait for down", sessions: 2, fwr: 2, values: []int8{1, absent}, restarts: 1, sRules: sRules{noBarrier: true}},
	{finds: "DOUBLE", name: "source transactions demand no counter", sessions: 2, fwr: 2, values: []int8{1, absent}, restarts: 1, sRules: sRules{noCounter: true}},
	{finds: "TWO VERDICTS", name: "a refusal demands no term", sessions: 1, fwr: 1, values: []int8{1, absent}, restarts: 1, refuses: true, sRules: sRules{noTerm: true}},
	{finds: "TWO VERDICTS", name: "a refusal demands no term, foreign key", start: [2]int8{absent, absent}, sessions: 1, fwr: 1, values: []int8{1, absent}, restarts: 1,
		foreignKey: true, sRules: sRules{noTerm: true}},
	{finds: "TWO VERDICTS", name: "a refusal demands no term, compare-and-set", sessions: 1, fwr: 2, values: []int8{1}, restarts: 1, reuse: true, sRules: sRules{noTerm: true}},
	{finds: "TWO VERDICTS", name: "a term is numbered before the counter is moved", sessions: 1, fwr: 2, values: []int8{1, absent}, restarts: 2, sRules: sRules{termFirst: true}},
	{finds: "FALSE REFUSAL", name: "down applies a transaction again", sessions: 2, fwr: 1, values: []int8{1}, trigger: true, sRules: sRules{replays: true}},
	{finds: "FALSE REFUSAL", name: "a failed compare-and-set is decided at once", sessions: 2, fwr: 1, values: []int8{1, absent}, trigger: true, sRules: sRules{impatient: true}},
	{finds: "OVERWRITE", name: "nobody looks at what a cascade takes", sessions: 1, fwr: 1, values: []int8{absent}, cascade: true, sRules: sRules{takesAll: true}},
	{finds: "OVERWRITE", name: "what a cascade takes is looked up in the mirror only", sessions: 1, fwr: 1, values: []int8{absent}, cascade: true, sRules: sRules{takesUnlooked: true}},
	{finds: "OVERWRITE", name: "a cascade takes what has a pending change", sessions: 2, fwr: 1, values: []int8{1, absent}, cascade: true, sRules: sRules{takesPending: true}},
	{finds: "OVERWRITE", name: "a foreign writer of base does not stay", sessions: 2, fwr: 1, values: []int8{1}, trigger: true, sRules: sRules{lastWriter: true}},
	{finds: "OVERWRITE", name: "a rebased record expects base as it is later", sessions: 3, fwr: 2, values: []int8{1, 2}, trigger: true, sRules: sRules{expectsLater: true}},
	{finds: "DIVERGED", name: "down writes the mirror although changes are pending", sessions: 2, fwr: 1, values: []int8{1}, sRules: sRules{ignoresPending: true}},
	{finds: "ON TOP", name: "a record on top of a refused one is rebased when base is our own", sessions: 3, values: []int8{1, 2}, refuses: true, sRules: sRules{rebasesAll: true}},
	{finds: "HUNG", name: "refused inserts are forgotten", start: [2]int8{absent, absent}, sessions: 2, fwr: 1, values: []int8{1}, foreignKey: true, sRules: sRules{forgetsParents: true}},
	{finds: "SPLIT", name: "a unit's records are applied one by one", sessions: 1, fwr: 1, values: []int8{1}, pairs: true, atomic: true, sRules: sRules{splitsUnits: true}},
	{finds: "SPLIT", name: "a unit's record is refused alone", sessions: 1, fwr: 1, values: []int8{1}, pairs: true, atomic: true, sRules: sRules{refusesAlone: true}},
	{finds: "FALSE REFUSAL", name: "a unit compares while it writes", sessions: 1, values: []int8{1}, pairs: true, atomic: true, trigger: true, sRules: sRules{comparesLate: true}},
	{finds: "FALSE REFUSAL", name: "a session's records are tried in table order", sessions: 1, values: []int8{1, absent}, pairs: true, foreignKey: true, lawful: true, sRules: sRules{unsorted: true}},
}

func TestModelFindsBrokenSourceRules(t *testing.T) {
	for _, sc := range brokenSourceRules {
		t.Run(sc.name, func(t *testing.T) {
			states, bad, trace := sc.explore(500_000)
			if !strings.HasPrefix(bad, sc.finds) {
				t.Fatalf("after %d states the model does not find %s, but: %s", states, sc.finds, told(bad, trace))
			}
			t.Logf("after %d states: %s", states, told(bad, trace))
		})
	}
}
