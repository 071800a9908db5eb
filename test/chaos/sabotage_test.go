//go:build sabotage

package chaos

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/waystage/waystage/internal/sabotage"
)

// EnvRuns bounds the histories in which a deliberate bug must be found.
const EnvRuns = "WAYSTAGE_CHAOS_RUNS"

var brokenPromise = regexp.MustCompile(`(?m)^chaos: +(I\d+(?:, I\d+)*): (.*)$`)

// TestEveryBugIsFound runs histories with one deliberate bug built into servers and devices, for each bug, until a promise is
// found broken. A bug that passes them all means that the checks are blind for it.
func TestEveryBugIsFound(t *testing.T) {
	if name := os.Getenv(sabotage.Env); name != "" {
		t.Fatalf("%s=%s is set: this test sets it itself", sabotage.Env, name)
	}
	runs := 6
	if s := os.Getenv(EnvRuns); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("%s: %v", EnvRuns, err)
		}
		runs = n
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv(EnvSeed); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", EnvSeed, err)
		}
		seed = n
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, bug := range sabotage.All {
		t.Run(string(bug), func(t *testing.T) {
			for i := range runs {
				promise, what := oneHistory(t, self, bug, seed+uint64(i))
				if promise != "" {
					fmt.Printf("sabotage: %-16s found in history %d: %s: %.160s\n", bug, i+1, promise, what)
					return
				}
			}
			t.Errorf("%d histories from seed %d found nothing", runs, seed)
		})
	}
}

// oneHistory runs one in a process of its own, which has the bug as its servers and devices do, and returns the first promise
// that it found broken.
func oneHistory(t *testing.T, self string, bug sabotage.Bug, seed uint64) (promise, what string) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, "-test.run", "^TestHistories$", "-test.timeout", "0")
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "WAYSTAGE_CHAOS_") }),
		fmt.Sprintf("%s=%s", sabotage.Env, bug), EnvSeeds+"=1", fmt.Sprintf("%s=%d", EnvSeed, seed))
	out, err := cmd.CombinedOutput()
	if m := brokenPromise.FindSubmatch(out); m != nil {
		return string(m[1]), string(m[2])
	}
	if err != nil {
		t.Logf("seed %d: the history broke off without naming a promise:\n%s", seed, out[max(0, len(out)-3000):])
	}
	return "", ""
}
