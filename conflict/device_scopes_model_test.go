package conflict

import (
	"strings"
	"testing"
)

// by gives the numbers of devices A and B.
func by(a, b uint8) [2]uint8 { return [2]uint8{a, b} }

// The rules of the product, in every scope that fits. Names say where a bound is lower than it once was: with three
// sessions of A and a foreign transaction everywhere the same scopes have 1.3 to 1.8 million states, and hold too.
var deviceScopes = []deviceScope{
	{name: "one device, three edits", edits: by(3, 0), sessions: by(4, 0), foreign: 1},
	{name: "two overlapping foreign transactions", edits: by(2, 0), sessions: by(3, 0), foreign: 2, overlap: 2},
	{name: "refused by the source", edits: by(2, 0), sessions: by(4, 0), foreign: 1, refusals: 1, noUndo: true},
	{name: "two rows", keys: 2, edits: by(2, 0), sessions: by(3, 0), foreign: 1, noDeletes: true},
	{name: "two devices", devices: 2, edits: by(2, 1), sessions: by(3, 2), noUndo: true},
	{name: "two devices insert the same key", devices: 2, absent: true, edits: by(2, 1), sessions: by(3, 2)},
	{name: "two devices and the source", devices: 2, edits: by(1, 1), sessions: by(2, 2), foreign: 1, noDeletes: true, noUndo: true},
	{name: "two devices, refused by the source (two sessions of A)", devices: 2, edits: by(2, 1), sessions: by(2, 2), refusals: 1,
		noDeletes: true, noUndo: true},
	{name: "two rows, overlapping foreign transactions", keys: 2, edits: by(2, 0), sessions: by(3, 0), foreign: 2, overlap: 2,
		noDeletes: true, noUndo: true},
	{name: "rewritten and refused by the source", normalised: 1, refusals: 1, edits: by(2, 0), sessions: by(4, 0), foreign: 1, noUndo: true},
	{name: "rewritten and refused by the source, two devices (two sessions of A)", normalised: 1, refusals: 1, devices: 2,
		edits: by(2, 1), sessions: by(2, 2), noDeletes: true, noUndo: true},
	{name: "restored from a backup (two sessions)", restore: true, edits: by(2, 0), sessions: by(2, 0), foreign: 1, noDeletes: true, noUndo: true},
	{name: "two live clones (two sessions of A)", clone: true, devices: 2, edits: by(2, 1), sessions: by(2, 2), noDeletes: true, noUndo: true},
	{name: "mirror rebuilt", rebuild: true, edits: by(2, 0), sessions: by(3, 0), foreign: 1, noDeletes: true, noUndo: true},

	// More than the first fourteen.
	{name: "mirror rebuilt, with deletes", rebuild: true, edits: by(2, 0), sessions: by(3, 0), foreign: 1, noUndo: true},
	{name: "restored from a backup, three sessions, no foreign transaction", restore: true, edits: by(2, 0), sessions: by(3, 0), noDeletes: true, noUndo: true},
	{name: "two devices, foreign, rewritten and refused", devices: 2, normalised: 1, refusals: 1, foreign: 1,
		edits: by(1, 1), sessions: by(2, 1), noDeletes: true, noUndo: true},
	{name: "equal values, one device", equalValues: true, edits: by(3, 0), sessions: by(3, 0), foreign: 1},
	{name: "equal values, two devices", equalValues: true, devices: 2, edits: by(2, 1), sessions: by(3, 2), noDeletes: true},
	{name: "equal values, inserts", equalValues: true, absent: true, devices: 2, edits: by(2, 1), sessions: by(2, 2)},
	{name: "equal values, rewritten and refused", equalValues: true, normalised: 1, refusals: 1, foreign: 1, edits: by(2, 0), sessions: by(3, 0), noUndo: true},
	{name: "equal values, two devices, rewritten and refused", equalValues: true, devices: 2, normalised: 1, refusals: 1,
		edits: by(2, 1), sessions: by(2, 1), noDeletes: true, noUndo: true},
	{name: "equal values, restored from a backup", equalValues: true, restore: true, edits: by(2, 0), sessions: by(2, 0), foreign: 1, noDeletes: true, noUndo: true},
	{name: "equal values, clones", equalValues: true, clone: true, devices: 2, edits: by(1, 1), sessions: by(2, 2), noDeletes: true, noUndo: true},
	{name: "equal values, mirror rebuilt", equalValues: true, rebuild: true, edits: by(2, 0), sessions: by(2, 0), foreign: 1, noUndo: true},

	{name: "units of two rows", keys: 2, atomic: true, edits: by(2, 0), sessions: by(3, 0), foreign: 1, noDeletes: true},
	{name: "units of two rows, two devices", keys: 2, atomic: true, devices: 2, edits: by(1, 1), sessions: by(2, 2), noDeletes: true, noUndo: true},
	{name: "units of two rows, refused by the source", keys: 2, atomic: true, edits: by(2, 0), sessions: by(2, 0), refusals: 1, foreign: 1, noDeletes: true, noUndo: true},

	// Rules that may as well be otherwise. The device library does the second and the third.
	{name: "rows first, then the cursor", edits: by(2, 0), sessions: by(3, 0), foreign: 1, rules: rules{tornRows: true}},
	{name: "merged sets the image", edits: by(2, 0), sessions: by(3, 0), foreign: 2, overlap: 2, rules: rules{mergedSetsImage: true}},
	{name: "merged sets the image, rewritten and refused", normalised: 1, refusals: 1, edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		noUndo: true, rules: rules{mergedSetsImage: true}},
	{name: "rows before verdicts", edits: by(2, 0), sessions: by(3, 0), foreign: 1, rules: rules{rowsFirst: true}},
	{name: "own rows are not sent back, merged sets the image", edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		rules: rules{elideOwnRows: true, mergedSetsImage: true}},
	{name: "a roll-back's version is its writer's merge", normalised: 1, refusals: 1, edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		noUndo: true, rules: rules{rollbackNewMver: true}},
}

func TestModelDeviceAndMirrorConverge(t *testing.T) {
	for _, sc := range deviceScopes {
		t.Run(sc.name, func(t *testing.T) {
			states, bad, trace := newDeviceModel(sc).explore(700_000, 7)
			if bad != "" {
				t.Fatalf("after %d states: %s", states, told(bad, trace))
			}
			t.Logf("%d states", states)
		})
	}
}

func told(bad string, trace []string) string {
	return bad + "\n   " + strings.Join(trace, "\n   ")
}

// brokenDeviceRules change one rule each. The model must find what that breaks.
var brokenDeviceRules = []struct {
	finds string
	deviceScope
}{
	{"DIVERGED", deviceScope{name: "the cursor is the next id, not xmin", edits: by(1, 0), sessions: by(3, 0), foreign: 2, overlap: 2,
		rules: rules{cursorMax: true}}},
	{"DIVERGED", deviceScope{name: "a lower version is ignored", keys: 2, edits: by(2, 0), sessions: by(3, 0), foreign: 1, noDeletes: true, noUndo: true,
		rules: rules{newerOnly: true}}},
	{"OVERWRITE", deviceScope{name: "the base moves with an incoming row", edits: by(1, 0), sessions: by(3, 0), foreign: 1, rules: rules{baseMoves: true}}},
	{"STALE", deviceScope{name: "an incoming row is dropped when its row is dirty", edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		rules: rules{skipDirty: true, mergedSetsImage: true, rejectedRowsSent: true}}},
	{"REGRESS", deviceScope{name: "a reply to a closed session is applied", edits: by(1, 0), sessions: by(3, 0), foreign: 1, answers: 2, rules: rules{anyReply: true}}},
	{"LOST", deviceScope{name: "a retry collects the batch anew", edits: by(2, 0), sessions: by(3, 0), rules: rules{rebuiltBatch: true}}},
	{"DOUBLE", deviceScope{name: "a redelivery is merged again", edits: by(1, 0), sessions: by(2, 0), foreign: 1, rules: rules{noLedger: true}}},
	{"DIVERGED", deviceScope{name: "rows before verdicts that set the image", edits: by(1, 0), sessions: by(3, 0), foreign: 1,
		rules: rules{rowsFirst: true, mergedSetsImage: true}}},
	{"NO QUIESCENCE", deviceScope{name: "verdicts and rows of two snapshots", edits: by(1, 0), sessions: by(3, 0), foreign: 1, rules: rules{splitSnapshot: true}}},
	{"LOST", deviceScope{name: "an edit is dropped with the rejected one below it", edits: by(2, 0), sessions: by(3, 0), foreign: 1, rules: rules{dropEdit: true}}},
	{"OVERWRITE", deviceScope{name: "an edit over a rejected one gets the new version", edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		rules: rules{rebaseEdit: true}}},
	{"NO QUIESCENCE", deviceScope{name: "a verdict is told in its own session only", edits: by(1, 0), sessions: by(3, 0), foreign: 1,
		rules: rules{ownSessionVerdicts: true}}},
	{"NO QUIESCENCE", deviceScope{name: "a verdict is forgotten once told", edits: by(1, 0), sessions: by(3, 0), foreign: 1, rules: rules{oneShotVerdicts: true}}},
	{"FALSE REJECTION", deviceScope{name: "an absent row demands its tombstone's version", edits: by(2, 0), sessions: by(3, 0), rules: rules{tombstoneVersion: true}}},
	{"STALE", deviceScope{name: "cursor first, then the rows", edits: by(1, 0), sessions: by(2, 0), foreign: 1, rules: rules{tornCursor: true}}},
	{"LOG", deviceScope{name: "rows first, and a log without key", edits: by(1, 0), sessions: by(2, 0), foreign: 1, rules: rules{tornRows: true, unkeyedLog: true}}},
	{"REGRESS", deviceScope{name: "own rows are not sent back", edits: by(1, 0), sessions: by(3, 0), foreign: 1, rules: rules{elideOwnRows: true}}},
	{"OVERWRITE", deviceScope{name: "the same last writer is enough, pipelined", edits: by(3, 0), sessions: by(4, 0), foreign: 1, noDeletes: true, noUndo: true,
		rules: rules{lastWriterWins: true, pipelined: true}}},
	{"OVERWRITE", deviceScope{name: "the same last writer is enough, and stays at roll-back", edits: by(2, 0), sessions: by(3, 0), foreign: 1, refusals: 1,
		noDeletes: true, noUndo: true, rules: rules{lastWriterWins: true, rollbackKeepsWriter: true}}},
	{"FALSE REJECTION", deviceScope{name: "a row is frozen again before its verdict", edits: by(2, 0), sessions: by(3, 0), noDeletes: true, noUndo: true,
		rules: rules{pipelined: true}}},
	{"FALSE REJECTION", deviceScope{name: "no own-echo rule", normalised: 1, edits: by(2, 0), sessions: by(3, 0), noDeletes: true, noUndo: true,
		rules: rules{noOwnEcho: true}}},
	{"FOREIGN ECHO", deviceScope{name: "a rewritten row keeps its last writer", equalValues: true, devices: 2, normalised: 1, refusals: 1,
		edits: by(2, 1), sessions: by(2, 1), noDeletes: true, noUndo: true, rules: rules{rewriteKeepsWriter: true}}},
	{"FALSE REJECTION", deviceScope{name: "who changed nothing is told his merge's id", equalValues: true, edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		noDeletes: true, noUndo: true, rules: rules{nothingTellsOwnID: true}}},
	{"WRONG VERDICT", deviceScope{name: "a restored device goes on in its incarnation", restore: true, edits: by(2, 0), sessions: by(3, 0),
		noDeletes: true, noUndo: true, rules: rules{forkIgnored: true}}},
	{"OVERWRITE", deviceScope{name: "the last writer is the device, and that is enough", restore: true, edits: by(2, 0), sessions: by(3, 0),
		noDeletes: true, noUndo: true, rules: rules{lastWriterWins: true, writerIsDevice: true}}},
	{"NO QUIESCENCE", deviceScope{name: "a restored device, no nonce", restore: true, edits: by(2, 0), sessions: by(3, 0),
		noDeletes: true, noUndo: true, rules: rules{noNonce: true}}},
	{"WRONG VERDICT", deviceScope{name: "clones go on in their incarnation", clone: true, devices: 2, edits: by(2, 1), sessions: by(2, 2),
		noDeletes: true, noUndo: true, rules: rules{forkIgnored: true}}},
	{"NO QUIESCENCE", deviceScope{name: "clones, no nonce", clone: true, devices: 2, edits: by(2, 1), sessions: by(2, 2),
		noDeletes: true, noUndo: true, rules: rules{noNonce: true}}},
	{"SPLIT", deviceScope{name: "merge rejects a unit's records one by one", keys: 2, atomic: true, edits: by(2, 0), sessions: by(2, 0), foreign: 1, noDeletes: true,
		noUndo: true, rules: rules{splitUnits: true}}},
	{"SPLIT", deviceScope{name: "the source refuses a unit's records one by one", keys: 2, atomic: true, edits: by(2, 0), sessions: by(2, 0), refusals: 1, noDeletes: true,
		noUndo: true, rules: rules{splitAtSource: true}}},
	{"FALSE REJECTION", deviceScope{name: "rebuilt, no base image", rebuild: true, edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		noDeletes: true, noUndo: true, rules: rules{noBaseImage: true}}},
	{"OVERWRITE", deviceScope{name: "rebuilt, base images count with an empty cursor only", rebuild: true, edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		noDeletes: true, noUndo: true, rules: rules{epochByCursor: true}}},
	{"OVERWRITE", deviceScope{name: "rebuilt, EPOCH ignored", rebuild: true, edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		noDeletes: true, noUndo: true, rules: rules{epochIgnored: true}}},
	{"FALSE REJECTION", deviceScope{name: "rebuilt, an image that is already there is a conflict", rebuild: true, edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		noDeletes: true, noUndo: true, rules: rules{noSameImage: true}}},
	{"FALSE REJECTION", deviceScope{name: "rebuilt, frozen changes are forgotten", rebuild: true, edits: by(2, 0), sessions: by(3, 0), foreign: 1,
		noDeletes: true, noUndo: true, rules: rules{marksOff: true}}},
}

func TestModelFindsBrokenDeviceRules(t *testing.T) {
	for _, sb := range brokenDeviceRules {
		t.Run(sb.name, func(t *testing.T) {
			states, bad, trace := newDeviceModel(sb.deviceScope).explore(500_000, 1)
			if !strings.HasPrefix(bad, sb.finds) {
				t.Fatalf("after %d states the model does not find %s, but: %s", states, sb.finds, told(bad, trace))
			}
			t.Logf("after %d states: %s", states, told(bad, trace))
		})
	}
}
