package cmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/internal/pgtest"
)

// watched is an output that can be waited for.
type watched struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func newWatched() *watched { return &watched{more: make(chan struct{}, 1)} }

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case w.more <- struct{}{}:
	default:
	}
	return w.text.Write(p)
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String()
}

// wait returns when the output has the text, or the command has ended.
func (w *watched) wait(t *testing.T, text string, ended <-chan int) {
	t.Helper()
	deadline := time.After(5 * time.Minute)
	for !strings.Contains(w.String(), text) {
		select {
		case <-w.more:
		case code := <-ended:
			t.Fatalf("the demonstration ended with status %d before it said %q:\n%s", code, text, w)
		case <-deadline:
			t.Fatalf("the demonstration did not say %q:\n%s", text, w)
		}
	}
}

// startDemo runs the command in this process, on the PostgreSQL that the tests run on.
func startDemo(t *testing.T, args ...string) (out *watched, interrupt func(), ended <-chan int) {
	t.Helper()
	major, err := pgtest.Major()
	if err != nil {
		t.Fatal(err)
	}
	bin, err := pgcluster.Find(major)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(pgcluster.EnvBin, bin.Dir)
	ctx, cancel := context.WithCancel(context.Background())
	out = newWatched()
	done := make(chan int, 1)
	go func() {
		done <- run(ctx, append([]string{"demo"}, args...), &terminal{in: strings.NewReader(""), out: out, err: out})
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return out, cancel, done
}

var demoFolder = regexp.MustCompile(`\S+/waystage-demo-\d+`)

func removed(t *testing.T, out *watched) {
	t.Helper()
	dir := demoFolder.FindString(out.String())
	if dir == "" {
		t.Fatalf("no folder was named:\n%s", out)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", dir, err)
	}
}

// TestDemo goes through the whole demonstration, tries what it proposes to try, and ends it.
func TestDemo(t *testing.T) {
	out, interrupt, ended := startDemo(t, "--keep")
	out.wait(t, "Ctrl-C ends it", ended)
	if strings.Contains(out.String(), "✗") {
		t.Errorf("a step has failed:\n%s", out)
	}
	dir := demoFolder.FindString(out.String())
	call := func(args ...string) string {
		t.Helper()
		var stdout, stderr bytes.Buffer
		if code := run(context.Background(), args, &terminal{in: strings.NewReader(""), out: &stdout, err: &stderr,
			env: []string{"WAYSTAGE_CONFIG=" + filepath.Join(dir, "waystage.yaml")}}); code != exitOK {
			t.Errorf("waystage %s: exit status %d\n%s%s", strings.Join(args, " "), code, &stdout, &stderr)
		}
		return stdout.String()
	}
	call("device", "sync", "--file", filepath.Join(dir, "amina.db"))
	call("status")
	call("pools", "ls")
	var rejects []struct {
		Code string `json:"code"`
	}
	if err := json.Unmarshal([]byte(call("rejects", "ls", "-o", "json")), &rejects); err != nil || len(rejects) != 2 {
		t.Errorf("%d rejected records, want the conflict and the refusal (%v)", len(rejects), err)
	}
	interrupt()
	if code := <-ended; code != exitOK {
		t.Errorf("exit status %d after Ctrl-C:\n%s", code, out)
	}
	removed(t, out)
}

// TestDemoInterrupted: Ctrl-C in the middle leaves nothing behind.
func TestDemoInterrupted(t *testing.T) {
	out, interrupt, ended := startDemo(t)
	out.wait(t, " 4. Two nurses", ended)
	interrupt()
	if code := <-ended; code != exitInterrupted {
		t.Errorf("exit status %d after Ctrl-C:\n%s", code, out)
	}
	removed(t, out)
}
