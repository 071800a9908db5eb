package cmd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"time"
)

// figureSpec is what is fixed of a figure before it is measured.
type figureSpec struct {
	name   string
	unit   string
	what   string  // what is measured, and against what
	bar    float64 // what the ratio has to reach; 0: nothing is asked
	bar18  float64 // from PostgreSQL 18 on, if that is another
	atMost bool    // smaller is better: the ratio may be that of the bar at most

	// Of a comparison, set where it is made.
	rows   int                                        // that it was measured with
	before func(ctx context.Context, round int) error // prepares a round for both sides; not measured
	check  func(ctx context.Context, round int) error // compares the results of both sides: without it there is no figure
}

// figure is one measured number. Absolute figures say little about another machine; a ratio was measured side by side
// with its baseline, in the same run.
type figure struct {
	Name     string   `json:"name"`
	Value    float64  `json:"value"`
	Unit     string   `json:"unit"`
	Baseline *float64 `json:"baseline,omitempty"`
	Ratio    *float64 `json:"ratio,omitempty"` // of a comparison the median of its rounds' ratios
	What     string   `json:"what"`            // what was measured, and against what

	Bar     *float64   `json:"bar,omitempty"`
	AtMost  bool       `json:"at_most,omitempty"` // the ratio is to be the bar at most
	Reached *bool      `json:"reached,omitempty"`
	Rounds  int        `json:"rounds,omitempty"`
	Spread  *spread    `json:"spread,omitempty"` // of the rounds' ratios
	Samples []round    `json:"samples,omitempty"`
	Memory  float64    `json:"memory_mib,omitempty"` // most that this process had in memory; devices of the measurement included
	On      measuredOn `json:"on"`
	Error   string     `json:"error,omitempty"` // why there is no figure
}

type spread struct {
	Min float64 `json:"min"`
	Max float64 `json:"max"`
}

// round is one pair of a comparison. CPU seconds are those of all servers and this process, where they were measured.
type round struct {
	Value       float64 `json:"value"`
	Baseline    float64 `json:"baseline"`
	Ratio       float64 `json:"ratio"`
	CPU         float64 `json:"cpu_s,omitempty"`
	BaselineCPU float64 `json:"baseline_cpu_s,omitempty"`
}

// measuredOn are what a figure was measured on.
type measuredOn struct {
	PostgreSQL string `json:"postgresql"`
	Cores      int    `json:"cores"`
	FSync      bool   `json:"fsync"`
	Rows       int    `json:"rows,omitempty"`
}

// memoryBar is what this process may have in memory in any measurement, in MiB.
const memoryBar = 512

// spec of a figure by its name.
func (b *bench) spec(name string) figureSpec {
	for _, s := range benchSteps() {
		for _, f := range s.figures {
			if f.name == name {
				return f
			}
		}
	}
	panic("no figure " + name)
}

func (b *bench) measuredOn(rows int) measuredOn {
	return measuredOn{PostgreSQL: b.version(), Cores: cores(), FSync: true, Rows: rows}
}

// record keeps a figure that was measured once and shows it. baseline 0: there is none.
func (b *bench) record(name string, value float64, unit string, baseline float64, what string) {
	f := figure{Name: name, Value: value, Unit: unit, What: what, On: b.measuredOn(b.users * b.rows)}
	line := fmt.Sprintf("%-22s %12s %-10s", name, short(value), unit)
	if baseline > 0 {
		ratio := value / baseline
		f.Baseline, f.Ratio = &baseline, &ratio
		line += fmt.Sprintf(" %5.2f of %s", ratio, short(baseline))
	}
	b.keep(f, b.spec(name))
	fmt.Fprintln(b.out, line+"   "+what)
}

// keep holds a figure against its bar.
func (b *bench) keep(f figure, s figureSpec) {
	f.AtMost = s.atMost
	bar := s.bar
	if s.bar18 != 0 && b.world != nil && b.clusters[0].Binaries().Major >= 18 {
		bar = s.bar18
	}
	if bar != 0 && f.Ratio != nil {
		reached := *f.Ratio >= bar
		if s.atMost {
			reached = *f.Ratio <= bar
		}
		f.Bar, f.Reached = &bar, &reached
	}
	b.figures = append(b.figures, f)
}

// fail notes a figure that could not be measured.
func (b *bench) fail(s figureSpec, why error) {
	fmt.Fprintf(b.out, "%-22s failed: %s\n", s.name, oneLine(why.Error()))
	b.figures = append(b.figures, figure{Name: s.name, Unit: s.unit, What: s.what, Error: oneLine(why.Error()), On: b.measuredOn(s.rows)})
}

func short(v float64) string {
	if math.Abs(v) < 100 {
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

// compare measures both sides in turn, for as many rounds as are asked for, and swaps who begins. Each side returns its value in
// the figure's unit; what of its work counts it passes to clock.
func (b *bench) compare(ctx context.Context, s figureSpec, ours, base func(context.Context) (float64, error)) error {
	f := figure{Name: s.name, Unit: s.unit, What: s.what, Rounds: b.rounds, On: b.measuredOn(s.rows)}
	one := func(side func(context.Context) (float64, error)) (float64, sample, error) {
		runtime.GC()
		debug.FreeOSMemory()
		b.sample = sample{}
		v, err := side(ctx)
		if err == nil && (v <= 0 || math.IsInf(v, 0) || math.IsNaN(v)) {
			err = fmt.Errorf("%g %s is no measurement", v, s.unit)
		}
		return v, b.sample, err
	}
	stop, err := b.startProfile(s.name)
	if err != nil {
		return err
	}
	defer stop()
	for n := range b.rounds {
		if s.before != nil {
			if err := s.before(ctx, n); err != nil {
				return fmt.Errorf("prepare: %w", err)
			}
		}
		var r round
		for _, mine := range []bool{n%2 == 0, n%2 != 0} {
			if mine {
				v, cost, err := one(ours)
				if err != nil {
					return err
				}
				r.Value, r.CPU = v, cost.cpu.Seconds()
				f.Memory = max(f.Memory, cost.memory)
				continue
			}
			v, cost, err := one(base)
			if err != nil {
				return fmt.Errorf("the baseline: %w", err)
			}
			r.Baseline, r.BaselineCPU = v, cost.cpu.Seconds()
		}
		if s.check != nil {
			if err := s.check(ctx, n); err != nil {
				return err
			}
		}
		r.Ratio = r.Value / r.Baseline
		f.Samples = append(f.Samples, r)
		cpu := ""
		if r.CPU > 0 && r.BaselineCPU > 0 {
			cpu = fmt.Sprintf("; CPU %.2f s against %.2f s", r.CPU, r.BaselineCPU)
		}
		fmt.Fprintf(b.out, "%-22s round %d of %d: %s %s against %s, ratio %.2f%s\n", s.name, n+1, b.rounds, short(r.Value), s.unit, short(r.Baseline), r.Ratio, cpu)
	}
	if f.Memory > memoryBar {
		return fmt.Errorf("the process had %.0f MiB in memory, and %d are allowed", f.Memory, memoryBar)
	}
	of := func(get func(round) float64) []float64 {
		var out []float64
		for _, r := range f.Samples {
			out = append(out, get(r))
		}
		slices.Sort(out)
		return out
	}
	ratios := of(func(r round) float64 { return r.Ratio })
	baseline, ratio := median(of(func(r round) float64 { return r.Baseline })), median(ratios)
	f.Value, f.Baseline, f.Ratio = median(of(func(r round) float64 { return r.Value })), &baseline, &ratio
	f.Spread = &spread{ratios[0], ratios[len(ratios)-1]}
	b.keep(f, s)
	f = b.figures[len(b.figures)-1]
	bar := ""
	if f.Bar != nil {
		sign, word := "≥", "reached"
		if f.AtMost {
			sign = "≤"
		}
		if !*f.Reached {
			word = "NOT reached"
		}
		bar = fmt.Sprintf(", %s %.2f %s", sign, *f.Bar, word)
	}
	fmt.Fprintf(b.out, "%-22s %12s %-10s %.2f of %s [%.2f..%.2f]%s; %.0f MiB   %s\n", s.name, short(f.Value), f.Unit, ratio, short(baseline), f.Spread.Min, f.Spread.Max, bar, f.Memory, s.what)
	return nil
}

// median of sorted numbers.
func median(sorted []float64) float64 {
	n := len(sorted)
	if n == 0 {
		return 0
	}
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// sample is what the measured parts of one side cost.
type sample struct {
	cpu    time.Duration // of all servers and this process
	memory float64       // most that this process had in memory, MiB
}

// clock times a part of a side's work, and notes what it costs.
func (b *bench) clock(work func() error) (time.Duration, error) {
	servers := func() time.Duration {
		if b.world == nil {
			return 0
		}
		return b.cpu()
	}
	resetPeak()
	used := servers() // reading it costs this process some milliseconds, which are no part of the work
	own, began := ownCPU(), time.Now()
	err := work()
	took := time.Since(began)
	own = ownCPU() - own
	b.sample.cpu += own + servers() - used
	b.sample.memory = max(b.sample.memory, float64(peakMemory())/(1<<20))
	return took, err
}

// startProfile profiles this process until stop, which writes the files. The folder is the command's; without one nothing happens.
func (b *bench) startProfile(name string) (stop func(), err error) {
	if b.profile == "" {
		return func() {}, nil
	}
	path := filepath.Join(b.profile, fmt.Sprintf("%s-%d", name, b.clusters[0].Binaries().Major))
	cpu, err := os.Create(path + ".cpu.prof")
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(cpu); err != nil {
		return nil, errors.Join(err, cpu.Close())
	}
	return func() {
		pprof.StopCPUProfile()
		err := cpu.Close()
		allocs, cerr := os.Create(path + ".allocs.prof")
		if cerr == nil {
			err = errors.Join(err, pprof.Lookup("allocs").WriteTo(allocs, 0), allocs.Close())
		}
		if err = errors.Join(err, cerr); err != nil {
			fmt.Fprintf(b.out, "cannot write the profile of %s: %v\n", name, err)
		}
	}, nil
}

// limitMemory limits this process's memory, in MiB; 0: it has no limit.
func limitMemory(mib int) {
	if mib == 0 {
		debug.SetMemoryLimit(math.MaxInt64)
		return
	}
	debug.SetMemoryLimit(int64(mib) << 20)
}
