package cmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/waystage/waystage/internal/registry"
)

// bench measures the pipeline on servers of its own, and what PostgreSQL does with the same work beside it.
type bench struct {
	*app
	users   int     // devices, one each
	rows    int     // rows of each user
	seconds int     // of measurements that go on for a time
	rounds  int     // of each comparison
	scale   float64 // of the sizes that the figures are defined for
	memory  int     // MiB of this process, 0: no limit
	profile string  // folder for profiles, empty: none
	only    []string

	major   int
	figures []figure
	sample  sample // costs of the side that is measured now
	*world         // what the current step measures on
}

// step measures figures that share their preparations.
type step struct {
	family  string
	figures []figureSpec
	world   worldOptions // what it runs on; steps with equal ones share it
	run     func(*bench, context.Context) error
}

// benchSteps is everything that can be measured, in the order in which it is.
func benchSteps() []step {
	return append(pipelineSteps(), []step{
		{"apply", applyFigures, applyWorld, (*bench).applyAll},
		{"capture", captureFigures, worldOptions{schema: applyWorld.schema, definitions: applyWorld.definitions}, (*bench).captureAlone},
		{"neighbour", []figureSpec{{name: "neighbour_p99", unit: "ms", atMost: true}}, worldOptions{}, (*bench).neighbour},
	}...)
}

func newBench(a *app) *cobra.Command {
	b := &bench{app: a}
	var out string
	var majors []int
	var quick bool
	c := &cobra.Command{Use: "bench", Short: "Measure the stages, and PostgreSQL's own means beside them, on servers of its own", Args: cobra.NoArgs,
		Long: `Start PostgreSQL servers (with fsync) and a broker in a temporary folder and measure the stages, alternating with what each is compared
with: PostgreSQL's own subscription, plain COPY, plain statements. Figures are medians over the rounds; the ratio is that of the
rounds' ratios, and its spread shows what it is worth. All of it shares this machine's cores, devices included: compare ratios,
not absolute figures. A result that is not what it should be is no figure: it is reported as failed, and so does the command.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if quick {
				b.quick(c.Flags().Changed)
			}
			if err := b.check(); err != nil {
				return err
			}
			collectLess() // as a server does
			for _, b.major = range majors {
				if err := b.run(c.Context()); err != nil {
					return &failure{code: exitFailed, what: "the measurement failed", err: err}
				}
			}
			data, err := json.MarshalIndent(b.figures, "", "  ")
			if err != nil {
				return err
			}
			if err := os.WriteFile(out, append(data, '\n'), 0o644); err != nil {
				return &failure{code: exitFailed, what: "cannot write the figures", where: out, err: bare(err)}
			}
			fmt.Fprintf(b.out, "\n%d figures are in %s.\n", len(b.figures), out)
			return b.verdict()
		}}
	f := c.Flags()
	f.StringVar(&out, "out", "bench.json", "file for the figures")
	f.IntSliceVar(&majors, "postgresql", []int{0}, "PostgreSQL major versions, one after the other; 0: the first that is found")
	f.IntVar(&b.users, "users", 100, "concurrent devices, of a user each")
	f.IntVar(&b.rows, "rows", 2000, "rows of each user")
	f.IntVar(&b.seconds, "seconds", 10, "how long the concurrent sessions run")
	f.IntVar(&b.rounds, "rounds", 5, "rounds of each comparison")
	f.Float64Var(&b.scale, "scale", 1, "part of the sizes that the figures are defined for")
	f.IntVar(&b.memory, "memory", 0, "limit of this process's memory, in MiB; 0: none but that of a figure")
	f.StringVar(&b.profile, "profile", "", "folder for CPU and allocation profiles of each figure")
	f.BoolVar(&quick, "quick", false, "small sizes and one round: shows that all can be measured, and nothing more")
	var names []string
	for _, s := range benchSteps() {
		names = append(names, s.family)
		for _, f := range s.figures {
			names = append(names, f.name)
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	f.StringSliceVar(&b.only, "only", nil, "only these figures or families: "+strings.Join(names, ", "))
	for name, fn := range map[string]cobra.CompletionFunc{
		"only":       completeList(names),
		"postgresql": cobra.FixedCompletions([]string{"15", "16", "17", "18", "15,18"}, cobra.ShellCompDirectiveNoFileComp),
		"profile": func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
	} {
		_ = c.RegisterFlagCompletionFunc(name, fn)
	}
	for _, name := range []string{"users", "rows", "seconds", "rounds", "scale", "memory"} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
	return c
}

// completeList completes the last name of a list with commas.
func completeList(names []string) cobra.CompletionFunc {
	return func(_ *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
		before := typed[:strings.LastIndex(typed, ",")+1]
		var out []string
		for _, n := range names {
			if strings.HasPrefix(before+n, typed) {
				out = append(out, before+n)
			}
		}
		return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}
}

// quick makes everything small that the caller has not set.
func (b *bench) quick(given func(string) bool) {
	for name, set := range map[string]func(){
		"users": func() { b.users = 3 }, "rows": func() { b.rows = 1000 }, "seconds": func() { b.seconds = 1 },
		"rounds": func() { b.rounds = 1 }, "scale": func() { b.scale = 0.01 },
	} {
		if !given(name) {
			set()
		}
	}
}

func (b *bench) check() error {
	if b.users < 2 || b.rows < 10 || b.seconds < 1 || b.rounds < 1 || b.scale <= 0 || b.memory < 0 {
		return usage("want --users 2, --rows 10, --seconds 1 and --rounds 1 at least, --scale above 0, and no negative --memory")
	}
	for _, name := range b.only {
		if !slices.ContainsFunc(benchSteps(), func(s step) bool { return s.is(name) }) {
			return usage("--only %s: there is no such figure or family", name)
		}
	}
	if b.profile != "" {
		if err := os.MkdirAll(b.profile, 0o755); err != nil {
			return &failure{code: exitFailed, what: "cannot make the folder for profiles", where: b.profile, err: bare(err)}
		}
	}
	return nil
}

// is tells whether a step or one of its figures has this name.
func (s step) is(name string) bool {
	return s.family == name || slices.ContainsFunc(s.figures, func(f figureSpec) bool { return f.name == name })
}

// wants tells whether a figure is asked for; a step with several asks before each.
func (b *bench) wants(name string) bool {
	return len(b.only) == 0 || slices.ContainsFunc(benchSteps(), func(s step) bool {
		return s.is(name) && (slices.Contains(b.only, name) || slices.Contains(b.only, s.family))
	})
}

// size is the part of a figure's size that is measured, n at full scale, and no less than least.
func (b *bench) size(n, least int) int { return max(least, int(float64(n)*b.scale)) }

// run measures what is wanted on one version of PostgreSQL. A step that fails leaves its figures marked as failed; the others go
// on, on servers of their own.
func (b *bench) run(ctx context.Context) (err error) {
	limit := func() { limitMemory(b.memory) }
	limit()
	defer limitMemory(0)
	defer func() { err = errors.Join(err, b.leave()) }()
	for _, s := range benchSteps() {
		wanted := slices.DeleteFunc(slices.Clone(s.figures), func(f figureSpec) bool { return !b.wants(f.name) })
		if len(wanted) == 0 {
			continue
		}
		before := len(b.figures)
		stepErr := b.enter(ctx, s.world)
		if stepErr == nil {
			stepErr = s.run(b, ctx)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		limit()
		for _, f := range wanted {
			if slices.ContainsFunc(b.figures[before:], func(made figure) bool { return made.Name == f.name }) {
				continue
			}
			cause := stepErr
			if cause == nil {
				cause = errors.New("its step did not measure it")
			}
			b.fail(f, cause)
		}
		if stepErr != nil { // whatever it has left behind is nobody's base
			if err := b.leave(); err != nil {
				return err
			}
		}
	}
	return nil
}

// verdict ends the command with a word about what failed, and what is short of its bar.
func (b *bench) verdict() error {
	failed := 0
	for _, f := range b.figures {
		if f.Error != "" {
			failed++
		}
		if f.Reached != nil && !*f.Reached {
			fmt.Fprintf(b.out, "%s on PostgreSQL %s is short of its bar: %.2f, and %.2f is asked for.\n", f.Name, f.On.PostgreSQL, *f.Ratio, *f.Bar)
		}
	}
	if failed > 0 {
		return &failure{code: exitFailed, what: count(failed, "figure") + " could not be measured", remedy: "the reasons are above, and in the file of the figures"}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// addUser makes a user that may log in from any device; one that is there already is left.
func (b *bench) addUser(ctx context.Context, name, group string) error {
	err := registry.New(b.mirror, nil).AddUser(ctx, name, benchPassword, group)
	if errors.Is(err, registry.ErrUserExists) {
		return nil
	}
	return err
}

const benchPassword = "only for this measurement"

func rate(n int, d time.Duration) float64 { return float64(n) / d.Seconds() }

// cores is how many the measurement has.
func cores() int { return runtime.GOMAXPROCS(0) }
