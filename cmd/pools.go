package cmd

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/internal/trouble"
	"github.com/waystage/waystage/queue"
	"github.com/waystage/waystage/stages"
)

// poolRow is one stage of pools ls: what the operator asked for, and what the processes that answered do.
type poolRow struct {
	Stage     string          `json:"stage"`
	Size      int             `json:"size"` // workers per process
	Mode      stages.Mode     `json:"mode"`
	ChangedAt time.Time       `json:"changed_at"`
	Waiting   *backlog        `json:"waiting,omitempty"` // what the stage has before it; absent: not known
	Processes []processOfPool `json:"processes"`         // empty: no process answered

	Trouble *trouble.Trouble `json:"trouble,omitempty"` // why the stage stands still until a person acts
}

// backlog is what waits for a stage.
type backlog struct {
	N    int64  `json:"n"`
	Unit string `json:"unit"` // messages, sessions or bytes
}

func (b *backlog) String() string {
	switch {
	case b == nil:
		return "-"
	case b.Unit == "bytes":
		return human(b.N)
	}
	return count(int(b.N), strings.TrimSuffix(b.Unit, "s"))
}

// processOfPool is the pool of one process.
type processOfPool struct {
	ID string `json:"id"` // instance of the micro service
	stages.PoolInfo
}

func newPools(a *app) *cobra.Command {
	c := &cobra.Command{Use: "pools", Short: "The worker pools of the stages: sizes, modes, what each worker does"}
	var f format
	var workers bool
	ls := &cobra.Command{Use: "ls [STAGE]", Short: "List the pools of all processes", Args: cobra.MaximumNArgs(1), ValidArgsFunction: completeStage,
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkStage(args...); err != nil {
				return err
			}
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				rows, err := a.readPools(ctx, conf, mirror, args)
				if err != nil {
					return err
				}
				if f != "table" {
					return printRows(a.out, f, rows, nil)
				}
				if err := printPools(a.out, rows, workers); err != nil {
					return err
				}
				for _, r := range rows {
					if r.Trouble != nil {
						a.say("attention: %s", clean(r.Trouble.String()))
					}
				}
				return nil
			})
		}}
	withOutput(ls, &f)
	ls.Flags().BoolVarP(&workers, "workers", "w", false, "list every worker")

	set := func(use, short string, args int, apply func(args []string) (size int, mode stages.Mode, words string, err error)) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(args), ValidArgsFunction: completeStage,
			RunE: func(c *cobra.Command, args []string) error {
				if err := checkStage(args[0]); err != nil {
					return err
				}
				size, mode, words, err := apply(args)
				if err != nil {
					return err
				}
				return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
					if err := stages.SetPool(ctx, mirror, args[0], size, mode); err != nil {
						return err
					}
					a.say("pool %s: %s, in all processes", args[0], words)
					// The kick only saves the processes their next look at the table, a second away.
					if b, err := a.broker(ctx, conf); err == nil {
						defer b.close()
						return b.poolsChanged()
					}
					return nil
				})
			}}
	}
	c.AddCommand(ls,
		set("scale STAGE N", "Set the number of workers per process", 2, func(args []string) (int, stages.Mode, string, error) {
			n, err := strconv.Atoi(args[1])
			if err != nil || n < 0 || n > stages.MaxPoolSize {
				return 0, "", "", usage("want 0 to %d workers, not %q", stages.MaxPoolSize, args[1])
			}
			return n, "", fmt.Sprintf("%d workers per process", n), nil
		}),
		set("pause STAGE", "Take nothing more; what is under way is finished", 1, func([]string) (int, stages.Mode, string, error) {
			return -1, stages.ModePause, "paused", nil
		}),
		set("resume STAGE", "Work again", 1, func([]string) (int, stages.Mode, string, error) {
			return -1, stages.ModeRun, "running", nil
		}),
		set("drain STAGE", "Work off what is queued, then pause", 1, func(args []string) (int, stages.Mode, string, error) {
			switch args[0] {
			case stages.StageIntake, stages.StageMerge, stages.StageReply:
				return -1, stages.ModeDrain, "draining", nil
			}
			return -1, stages.ModePause, "paused (it has no backlog of its own to drain)", nil
		}))
	return c
}

func checkStage(args ...string) error {
	for _, s := range args {
		if !slices.Contains(stageNames, s) {
			return usage("there is no stage %q; the stages are %s", s, strings.Join(stageNames, ", "))
		}
	}
	return nil
}

func completeStage(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return stageNames, cobra.ShellCompDirectiveNoFileComp
}

// readPools joins the table of settings with what the processes answer over the broker; without a broker the settings
// are shown alone.
func (a *app) readPools(ctx context.Context, conf Config, mirror *pgxpool.Pool, only []string) ([]poolRow, error) {
	settings, err := stages.ListPools(ctx, mirror)
	if err != nil {
		return nil, err
	}
	troubles, err := trouble.List(ctx, mirror)
	if err != nil {
		return nil, err
	}
	running := map[string][]processOfPool{}
	waiting := map[string]*backlog{}
	var staged, merged int64
	if err := mirror.QueryRow(ctx, `SELECT count(*) FILTER (WHERE state = 'staged'), count(*) FILTER (WHERE state = 'merged') FROM waystage.session
		WHERE state IN ('staged', 'merged')`).Scan(&staged, &merged); err != nil {
		return nil, err
	}
	waiting[stages.StageMerge], waiting[stages.StageReply] = &backlog{staged, "sessions"}, &backlog{merged, "sessions"}
	if b, err := a.broker(ctx, conf); err != nil {
		a.say("the broker does not answer, so only the settings are shown: %s", oneLine(rootCause(err)))
	} else {
		defer b.close()
		if running, err = b.pools(ctx); err != nil {
			return nil, err
		}
		queues, err := b.queues(ctx)
		if err != nil {
			return nil, err
		}
		reader := map[string]string{queue.StreamIn: stages.StageIntake, queue.StreamUp: "apply-up", queue.StreamDown: "apply-down"}
		for _, q := range queues {
			if stage, ok := reader[q.Name]; ok {
				waiting[stage] = &backlog{int64(q.Messages), "messages"}
			}
		}
		for _, stage := range []string{"capture-up", "capture-down"} {
			for _, p := range running[stage] { // one of them captures, the others know of no lag
				if w := waiting[stage]; w == nil || w.N < p.LagBytes {
					waiting[stage] = &backlog{p.LagBytes, "bytes"}
				}
			}
		}
	}
	rows := []poolRow{}
	for _, stage := range stageNames {
		i := slices.IndexFunc(settings, func(s stages.PoolSetting) bool { return s.Stage == stage })
		if i < 0 || len(only) > 0 && only[0] != stage {
			continue
		}
		s := settings[i]
		row := poolRow{Stage: s.Stage, Size: s.Size, Mode: s.Mode, ChangedAt: s.ChangedAt, Waiting: waiting[stage], Processes: running[stage]}
		if row.Processes == nil {
			row.Processes = []processOfPool{}
		}
		if i := slices.IndexFunc(troubles, func(t trouble.Trouble) bool { return t.Part == stage }); i >= 0 {
			row.Trouble = &troubles[i]
		}
		rows = append(rows, row)
	}
	return rows, nil
}

func printPools(w io.Writer, rows []poolRow, workers bool) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "STAGE\tMODE\tSIZE\tPROCESSES\tBUSY\tITEMS\tRATE\tWAITING\tERRORS\tLAST ERROR")
	for _, r := range rows {
		var busy, total int
		var items, errs int64
		var rate float64
		var last stages.WorkerInfo
		for _, p := range r.Processes {
			items, errs, rate, total = items+p.Items, errs+p.Errors, rate+p.Rate, total+len(p.Workers)
			for _, m := range p.Workers {
				if m.State == stages.StateBusy {
					busy++
				}
				if m.ErrorAt.After(last.ErrorAt) {
					last = m
				}
			}
		}
		failed := "-"
		if last.LastError != "" {
			failed = ago(&last.ErrorAt) + ": " + shorten(clean(last.LastError), 60)
		}
		fmt.Fprintf(tw, "%s\t%s\t%d\t%d\t%d of %d\t%d\t%.1f/s\t%s\t%d\t%s\n", r.Stage, r.Mode, r.Size, len(r.Processes), busy, total, items, rate, r.Waiting, errs, failed)
	}
	if err := tw.Flush(); err != nil || !workers {
		return err
	}
	fmt.Fprintln(w)
	fmt.Fprintln(tw, "WORKER\tSTATE\tSINCE\tDOING\tITEMS\tLAST ERROR")
	for _, r := range rows {
		for _, p := range r.Processes {
			for _, m := range p.Workers {
				items := "-" // of a worker whose batch does not end: the pool counts
				if m.Items > 0 {
					items = strconv.FormatInt(m.Items, 10)
				}
				fmt.Fprintf(tw, "%s/%s/%d\t%s\t%s\t%s\t%s\t%s\n", r.Stage, p.ID, m.ID, m.State, ago(&m.Since), clean(m.Doing), items, clean(m.LastError))
			}
		}
	}
	return tw.Flush()
}

func shorten(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-3]) + "..."
	}
	return s
}
