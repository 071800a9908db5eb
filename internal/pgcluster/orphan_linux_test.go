package pgcluster_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/waystage/waystage/internal/pgcluster"
)

const envOrphan = "WAYSTAGE_TEST_ORPHAN_DIR"

// TestMain lets the test binary play the starter that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv(envOrphan); dir != "" {
		c, err := pgcluster.Start(context.Background(), pgcluster.Options{Dir: dir, Unsafe: true})
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		var pids []string
		for _, pid := range append(pgcluster.Processes(c), pgcluster.Children(c)...) {
			pids = append(pids, strconv.Itoa(pid))
		}
		fmt.Println("pids", strings.Join(pids, " "))
		time.Sleep(5 * time.Minute) // killed long before
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func TestServerEndsWithItsStarter(t *testing.T) {
	t.Parallel()
	dir, err := pgcluster.TempDir("waystage-pg-test-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	starter := exec.Command(os.Args[0])
	starter.Env = append(os.Environ(), envOrphan+"="+dir)
	out, err := starter.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := starter.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "pids ") {
		t.Fatalf("starter said %q: %v", line, err)
	}
	var pids []int
	for _, f := range strings.Fields(line)[1:] {
		pid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	if err := starter.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = starter.Wait() // killed: an error for sure
	gone(t, pids)
}
