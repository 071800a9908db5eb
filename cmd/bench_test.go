package cmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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
	var said, complaints bytes.Buffer
	code := run(t.Context(), []string{"bench", "--out", out, "--quick", "--postgresql", strconv.Itoa(major)}, &terminal{in: strings.NewReader(""), out: &said, err: &complaints})
	if code != exitOK {
		t.Fatalf("exit status %d:\n%s%s", code, said.String(), complaints.String())
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
		if _, twice := made[f.Name]; twice {
			t.Errorf("%s was made twice", f.Name)
		}
		made[f.Name] = f
		if f.Error != "" {
			t.Errorf("%s: %s", f.Name, f.Error)
		}
		if f.On.PostgreSQL == "" || f.On.Cores == 0 || !f.On.FSync {
			t.Errorf("%s does not say what it was measured on: %+v", f.Name, f.On)
		}
		if f.Rounds > 0 && (len(f.Samples) != f.Rounds || f.Spread == nil || f.Spread.Min > *f.Ratio || f.Spread.Max < *f.Ratio) {
			t.Errorf("%s does not show its rounds: %+v", f.Name, f)
		}
		if f.Value <= 0 || f.Unit == "" || f.What == "" {
			t.Errorf("%+v says nothing", f)
		}
		if (f.Baseline == nil) != (f.Ratio == nil) {
			t.Errorf("%s has a baseline without a ratio, or the other way round", f.Name)
		}
	}
	for _, s := range benchSteps() {
		for _, f := range s.figures {
			if _, ok := made[f.name]; !ok {
				t.Errorf("no figure %s", f.name)
			}
		}
	}
}

// What fails is said and does not keep the others from being measured.
func TestBenchCompares(t *testing.T) {
	var out bytes.Buffer
	b := &bench{app: &app{terminal: &terminal{out: &out}}, rounds: 3}
	var order []string
	side := func(name string, values ...float64) func(context.Context) (float64, error) {
		return func(context.Context) (float64, error) {
			order = append(order, name)
			v := values[0]
			values = values[1:]
			return v, nil
		}
	}
	checked := 0
	s := figureSpec{name: "first_sync", unit: "rows/s", bar: 2, check: func(context.Context, int) error { checked++; return nil }}
	if err := b.compare(t.Context(), s, side("ours", 20, 90, 60), side("base", 10, 20, 30)); err != nil {
		t.Fatal(err)
	}
	f := b.figures[0]
	if f.Value != 60 || *f.Baseline != 20 || *f.Ratio != 2 || *f.Spread != (spread{2, 4.5}) || !*f.Reached || checked != 3 {
		t.Errorf("%+v, ratio %g, spread %+v, checked %d times", f, *f.Ratio, *f.Spread, checked)
	}
	if got := strings.Join(order, " "); got != "ours base base ours ours base" {
		t.Errorf("order: %s", got)
	}
	s.atMost = true
	s.bar = 1.9
	if err := b.compare(t.Context(), s, side("ours", 2, 2, 2), side("base", 1, 1, 1)); err != nil || *b.figures[1].Reached {
		t.Errorf("2 of at most 1.9: %v", err)
	}
	s.check = func(context.Context, int) error { return errors.New("the sides differ") }
	if err := b.compare(t.Context(), s, side("ours", 2), side("base", 1)); err == nil || len(b.figures) != 2 {
		t.Errorf("sides that differ made a figure: %v", err)
	}
	s.check = nil
	if err := b.compare(t.Context(), s, side("ours", 0), side("base", 1)); err == nil {
		t.Error("nothing is no measurement")
	}
	b.fail(s, errors.New("no luck"))
	var f2 *failure
	if err := b.verdict(); !errors.As(err, &f2) || f2.code != exitFailed || !strings.Contains(out.String(), "no luck") {
		t.Errorf("%v:\n%s", err, out.String())
	}
}

func TestBenchRefusesWhatItCannotMeasure(t *testing.T) {
	for _, args := range [][]string{{"--only", "warp_speed"}, {"--rounds", "0"}, {"--users", "1"}, {"--scale", "0"}} {
		if got := waystage(t, nil, "", append([]string{"bench", "--out", filepath.Join(t.TempDir(), "x.json")}, args...)...); got.code != exitUsage {
			t.Errorf("%v: exit status %d: %s", args, got.code, got.err)
		}
	}
}
