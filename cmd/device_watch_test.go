package cmd

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
)

// told is what a running command has printed.
type told struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (w *told) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

func (w *told) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// within repeats f until it returns nil, for as long as the bound says.
func within(t testing.TB, bound time.Duration, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(bound)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// TestSyncWatch: with --watch what the office writes comes down, and what is edited in the file goes up, without another command;
// by the clock neither would happen within this test.
func TestSyncWatch(t *testing.T) {
	o := newOperator(t)
	o.init()
	defer o.serve(nurse.Definitions(), "health.listen=")()
	o.run(exitOK, testPassword, "users add amina --group nurses")
	file := filepath.Join(o.dir, "amina.db")
	dev := " --file " + file
	o.run(exitOK, testPassword, "device enrol --server nats://"+o.nats+" --user amina --device phone"+dev)
	for _, bad := range []string{"--every 1ms", "--every 10m --between 9-10", "--between 09:00-10:00", "--watch --wait nothing"} {
		o.run(exitUsage, "", "device sync "+bad+dev)
	}

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var out, errs told
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, strings.Fields("device sync --watch --every 1h"+dev), &terminal{in: strings.NewReader(""), out: &out, err: &errs})
	}()
	defer func() {
		if t.Failed() {
			t.Logf("it said\n%s%s", out.String(), errs.String())
		}
	}()

	d, err := device.Open(t.Context(), file, device.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	var patient string
	within(t, 90*time.Second, "the first sync", func() error {
		return d.DB().QueryRow("SELECT min(id) FROM patient HAVING min(id) IS NOT NULL").Scan(&patient)
	})
	source, err := pgx.Connect(t.Context(), o.source)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close(context.Background()) }()

	for _, words := range []string{"from the office", "from the office again"} {
		if _, err := source.Exec(t.Context(), "UPDATE vn.patient SET remarks = $2 WHERE id::text = $1", patient, words); err != nil {
			t.Fatal(err)
		}
		within(t, 90*time.Second, "the office's words on the device", func() error {
			var have string
			if err := d.DB().QueryRow("SELECT coalesce(remarks, '') FROM patient WHERE id = ?", patient).Scan(&have); err != nil {
				return err
			}
			if have != words {
				return errors.New("the device has " + have)
			}
			return nil
		})
	}
	if !strings.Contains(errs.String(), "something waits at the server: field") {
		t.Errorf("it does not say why it syncs: %s", errs.String())
	}

	if _, err := d.DB().Exec("UPDATE patient SET remarks = 'from the field' WHERE id = ?", patient); err != nil {
		t.Fatal(err)
	}
	within(t, 90*time.Second, "the nurse's words at the source", func() error {
		var have string
		if err := source.QueryRow(t.Context(), "SELECT remarks FROM vn.patient WHERE id::text = $1", patient).Scan(&have); err != nil {
			return err
		}
		if have != "from the field" {
			return errors.New("the source has " + have)
		}
		return nil
	})
	// The source's verdict is news, too.
	within(t, 90*time.Second, "the verdict", func() error {
		s, err := d.Status(t.Context())
		if err != nil {
			return err
		}
		if s.Unsent+s.Sent+s.Merged > 0 {
			return errors.New("not final")
		}
		return nil
	})
	stop()
	if code := <-ended; code != exitInterrupted {
		t.Errorf("exit code %d", code)
	}
}

func TestBackOff(t *testing.T) {
	for n := range 20 {
		if d := backOff(n); d < time.Second/2 || d > 90*time.Second {
			t.Errorf("after %d failures: %s", n, d)
		}
	}
}
