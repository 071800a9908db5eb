package e2e

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/waystage/waystage/internal/pgtest"
	shared "github.com/waystage/waystage/test/world"
)

// TestFleetFromAnEmptyDatabase runs the walk-through of docs/operate.md as it stands.
func TestFleetFromAnEmptyDatabase(t *testing.T) {
	_, rest, ok := strings.Cut(read(t, filepath.Join(root(t), "docs", "operate.md")), "<!-- walk-through -->\n```sh\n")
	script, _, ok2 := strings.Cut(rest, "\n```")
	if !ok || !ok2 {
		t.Fatal("docs/operate.md has no walk-through")
	}
	dir := t.TempDir()
	if err := shared.Build(filepath.Join(dir, "waystage"), ""); err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(freeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	postgres := pgtest.SourceCluster(t).Binaries().Dir
	// The server is a job of the shell's: it ends with it, whatever happened.
	body := "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n" + script + "\necho; echo walked through\n"
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, "bash", "-c", body)
	c.Dir = dir
	c.Env = append(os.Environ(), "PATH="+dir+":"+postgres+":"+os.Getenv("PATH"), "SOURCE="+pgtest.Source(t), "MIRROR="+pgtest.Mirror(t), "PORT="+port)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"received 2 rows", "received 1 rows, removed 2", "the device has a new key", "amina/phone", "walked through"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the walk-through does not say %q:\n%s", want, out)
		}
	}
}
