//go:build sabotage

package sabotage

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// catches says which test notices each bug, alone and in the first run. Random histories must notice them too, but need
// time (test/chaos).
var catches = map[Bug]struct{ folder, test string }{
	AckEarly:      {"capture", "TestHazardAckBeforeDurable"},
	SkipEchoes:    {"apply", "TestRoundTrip"},
	ForgetPending: {"apply", "TestHazardTriggers"},
	CompareKey:    {"apply", "TestHazardForeignChangeMeanwhile"},
	CompareEqual:  {"apply", "TestValuesArriveByteForByte"},
	DropFence:     {"apply", "TestHazardZombie"},
	IgnoreAgain:   {"stages", "TestStages/ledger"},
	LeakKey:       {"stages", "TestStages/download"},
	SkipTombstone: {"stages", "TestStages/download"},
	OffByOne:      {"stages", "TestStages/commits_overtake"},
	HalfPage:      {"device", "TestLostReply"},
	LogTwice:      {"device", "TestConflict"},
	SwallowBad:    {"stages", "TestStages/one_bad_record_is_rejected_alone"},
	KeepRefused:   {"apply", "TestHazardRefusalWithoutForeignChange"},
	MergeStale:    {"conflict", "TestMergeDecidesRuleD3"},
	IgnoreGap:     {"apply", "TestHazardQueueLosesAndDoubles"},
	TornSnapshot:  {"stages", "TestStages/one_snapshot"},
	DropLater:     {"device", "TestEditDuringASync"},
	MoveBase:      {"device", "TestEditDuringASync"},
	MergeColumns:  {"conflict", "TestPolicyResolves"},
	MergeVersion:  {"stages", "TestPolicies/edit_on_top_of_a_merged_one"},
}

// TestEveryBugIsCaught runs each bug's test with and without the bug: it must fail with it, and pass without.
func TestEveryBugIsCaught(t *testing.T) {
	if name := os.Getenv(Env); name != "" {
		t.Fatalf("%s=%s is set: this test sets it itself", Env, name)
	}
	dir := t.TempDir()
	programs := map[string]string{}
	for bug, c := range catches {
		if !slices.Contains(All, bug) {
			t.Errorf("there is no bug %s", bug)
		}
		if programs[c.folder] != "" {
			continue
		}
		programs[c.folder] = filepath.Join(dir, c.folder+".test")
		build := exec.CommandContext(t.Context(), "go", "test", "-c", "-tags", "sabotage", "-o", programs[c.folder], ".")
		build.Dir = filepath.Join("..", "..", c.folder)
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build the tests of %s: %v\n%s", c.folder, err, out)
		}
	}
	run := func(t *testing.T, bug Bug, folder, test string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		parts := strings.Split(test, "/")
		for i := range parts {
			parts[i] = "^" + parts[i] + "$"
		}
		cmd := exec.CommandContext(ctx, programs[folder], "-test.run", strings.Join(parts, "/"), "-test.timeout", "9m", "-test.v")
		cmd.Dir = filepath.Join("..", "..", folder)
		cmd.Env = append(os.Environ(), Env+"="+string(bug))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, bug := range All {
		t.Run(string(bug), func(t *testing.T) {
			t.Parallel()
			c, ok := catches[bug]
			if !ok {
				t.Fatal("no test is known to catch it")
			}
			switch out, err := run(t, bug, c.folder, c.test); {
			case err == nil:
				t.Errorf("%s of %s passes", c.test, c.folder)
			case !strings.Contains(out, "--- FAIL: "+c.test): // it must fail by a check, not break off
				t.Errorf("%s of %s did not fail, it broke off: %v\n%s", c.test, c.folder, err, out[max(0, len(out)-2000):])
			}
		})
	}
	tests := map[string]string{} // test by folder and name, each once
	for _, c := range catches {
		tests[c.folder+" "+c.test] = c.test
	}
	for name, test := range tests {
		t.Run("none/"+strings.ReplaceAll(name, "/", " "), func(t *testing.T) {
			t.Parallel()
			folder, _, _ := strings.Cut(name, " ")
			if out, err := run(t, "", folder, test); err != nil || !strings.Contains(out, "--- PASS: "+test) {
				t.Errorf("%s of %s fails without any bug: %v\n%s", test, folder, err, out[max(0, len(out)-2000):])
			}
		})
	}
}
