package cmd

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/waystage/waystage/internal/pgtest"
)

// The figures say nothing at this size; that all of them are made, and that the result was compared, is the point.
func TestBenchMeasuresEveryStage(t *testing.T) {
	major, err := pgtest.Major()
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "bench.json")
	got := waystage(t, nil, "", "bench", "--out", out, "--users", "3", "--rows", "1000", "--seconds", "1", "--postgresql", strconv.Itoa(major))
	if got.code != exitOK {
		t.Fatalf("exit status %d:\n%s%s", got.code, got.out, got.err)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	var figures []figure
	if err := json.Unmarshal(data, &figures); err != nil {
		t.Fatal(err)
	}
	made := map[string]figure{}
	for _, f := range figures {
		made[f.Name] = f
		if f.Value <= 0 || f.Unit == "" || f.What == "" {
			t.Errorf("%+v says nothing", f)
		}
		if (f.Baseline == nil) != (f.Ratio == nil) {
			t.Errorf("%s has a baseline without a ratio, or the other way round", f.Name)
		}
	}
	for _, name := range []string{"first_sync", "intake", "merge", "up", "down_small_tx", "down_bulk_tx", "sessions", "session_p50", "session_p99", "neighbour_p99"} {
		if _, ok := made[name]; !ok {
			t.Errorf("no figure %s", name)
		}
	}
}
