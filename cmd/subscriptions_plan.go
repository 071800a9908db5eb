package cmd

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/schema"
)

// planWithin is how long rows are counted for a plan, if nothing else is said.
const planWithin = 10 * time.Second

func newSubscriptionsPlan(a *app) *cobra.Command {
	var f format
	within := planWithin
	c := &cobra.Command{Use: "plan [FILE]", Short: "Say what a definitions file would change; nothing is changed", Args: cobra.MaximumNArgs(1),
		Long: `Say what a definitions file, by default that of the configuration, would change against the version in force: subscriptions, sets and groups; tables that would be
copied; for how many users and devices; how many rows would enter and leave devices, which columns they would get and lose; and which records that are on their
way would be rejected. Nothing is changed. Rows are counted in the mirror, as the role that may read it and nothing else; what is not counted in the time of --within is an
estimate by the users that were counted, and said to be one.
Exit codes: 0 nothing would change, 8 something would, 2 the file is wrong.`,
		RunE: func(c *cobra.Command, args []string) error {
			if within <= 0 {
				return usage("--within wants a time such as 10s")
			}
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				defs, err := usableDefinitions(definitionsFile(conf, args))
				if err != nil {
					return err
				}
				plan, err := a.plan(ctx, conf, mirror, defs, within)
				if err != nil {
					return err
				}
				if f == "table" {
					err = a.printPlan(a.out, plan)
				} else {
					err = printOne(a.out, f, plan)
				}
				if err != nil || plan.Empty() {
					return err
				}
				a.say("put it in force with 'waystage subscriptions apply'")
				return silent(exitDiffers)
			})
		}}
	c.Flags().DurationVar(&within, "within", within, "how long to count rows")
	c.ValidArgsFunction = completeFile
	withOutput(c, &f)
	return c
}

// plan checks definitions against both databases and compares them with those in force.
func (a *app) plan(ctx context.Context, conf Config, pool *pgxpool.Pool, defs *schema.Definitions, within time.Duration) (*schema.Plan, error) {
	if _, err := stored(ctx, pool, nil); err != nil {
		return nil, err
	}
	source, err := schema.Connect(ctx, conf.Source.DSN, "waystage subscriptions")
	if err != nil {
		return nil, schemaFailure(conf, fmt.Errorf("source: %w", err))
	}
	defer func() { _ = source.Close(context.WithoutCancel(ctx)) }()
	mirror, err := schema.Connect(ctx, conf.Mirror.DSN, "waystage subscriptions")
	if err != nil {
		return nil, schemaFailure(conf, fmt.Errorf("mirror: %w", err))
	}
	defer func() { _ = mirror.Close(context.WithoutCancel(ctx)) }()
	tables, problems, err := defs.Examine(ctx, source, mirror)
	if err != nil {
		return nil, schemaFailure(conf, err)
	}
	if _, err := schema.Refusing(problems); err != nil {
		return nil, notUsable(defs.File, err)
	}
	plan, err := schema.MakePlan(ctx, schema.PlanOptions{Source: source, Mirror: mirror, Definitions: defs, Tables: tables, Within: within})
	if err != nil {
		return nil, schemaFailure(conf, err)
	}
	return plan, nil
}

// printPlan prints a plan for people.
func (a *app) printPlan(w io.Writer, p *schema.Plan) error {
	if p.Empty() {
		a.say("nothing would change: version %d, which is in force, says the same", p.From)
		return nil
	}
	part := func(print func() error) error {
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
		return print()
	}
	err := printRows(w, "table", p.Changes, []column[schema.PlanChange]{
		{"action", func(c schema.PlanChange) string { return c.Action }},
		{"what", func(c schema.PlanChange) string { return c.Kind + " " + c.Name }},
		{"keys", func(c schema.PlanChange) string { return orDash(clean(strings.Join(c.Keys, "; "))) }},
	})
	if err == nil && len(p.Tables) > 0 {
		err = part(func() error {
			return printRows(w, "table", p.Tables, []column[schema.PlanTable]{
				{"table", func(t schema.PlanTable) string { return t.Table }},
				{"mirror", func(t schema.PlanTable) string {
					return map[string]string{"copy": "is copied", "keep": "stays, for nobody"}[t.Action]
				}},
				{"rows, about", func(t schema.PlanTable) string { return atLeast(t.Rows) }},
			})
		})
	}
	if err == nil && len(p.Rows) > 0 {
		err = part(func() error {
			return printRows(w, "table", p.Rows, []column[schema.PlanRows]{
				{"table", func(r schema.PlanRows) string { return r.Table }},
				{"set", func(r schema.PlanRows) string { return fromTo(r.Was, r.Set) }},
				{"users", func(r schema.PlanRows) string { return strconv.Itoa(r.Users) }},
				{"devices", func(r schema.PlanRows) string { return strconv.Itoa(r.Devices) }},
				{"rows enter", func(r schema.PlanRows) string { return planned(r.Enter, r.How) }},
				{"rows leave", func(r schema.PlanRows) string { return planned(r.Leave, r.How) }},
				{"columns", func(r schema.PlanRows) string {
					var out []string
					for _, c := range r.Gained {
						out = append(out, "+"+c)
					}
					for _, c := range r.Lost {
						out = append(out, "-"+c)
					}
					return orDash(clean(strings.Join(out, " ")))
				}},
			})
		})
	}
	if err == nil && len(p.Files) > 0 {
		err = part(func() error {
			return printRows(w, "table", p.Files, []column[schema.PlanFiles]{
				{"files of", func(r schema.PlanFiles) string { return r.Subscription }},
				{"set", func(r schema.PlanFiles) string { return fromTo(r.Was, r.Set) }},
				{"users", func(r schema.PlanFiles) string { return strconv.Itoa(r.Users) }},
				{"devices", func(r schema.PlanFiles) string { return strconv.Itoa(r.Devices) }},
				{"files enter", func(r schema.PlanFiles) string { return planned(r.Enter, r.How) }},
				{"files leave", func(r schema.PlanFiles) string { return planned(r.Leave, r.How) }},
				{"size of what enters", func(r schema.PlanFiles) string {
					if r.How == schema.PlanUnknown {
						return planned(0, r.How)
					}
					return human(r.Bytes)
				}},
			})
		})
	}
	if err == nil && slices.ContainsFunc(p.Built, func(b schema.PlanBuilt) bool { return b.Hash != "" || b.Concern > 0 }) {
		err = part(func() error {
			return printRows(w, "table", p.Built, []column[schema.PlanBuilt]{
				{"built for", func(b schema.PlanBuilt) string { return clean(b.String()) }},
				{"devices", func(b schema.PlanBuilt) string { return strconv.Itoa(b.Devices) }},
				{"that lose", func(b schema.PlanBuilt) string { return strconv.Itoa(b.Concern) }},
				{"what they know", func(b schema.PlanBuilt) string { return orDash(clean(strings.Join(b.Lost, " "))) }},
			})
		})
	}
	if err == nil && len(p.Uploads) > 0 {
		err = part(func() error {
			return printRows(w, "table", p.Uploads, []column[schema.PlanUpload]{
				{"records on their way", func(u schema.PlanUpload) string { return strconv.FormatInt(u.Records, 10) }},
				{"set", func(u schema.PlanUpload) string { return u.Set }},
				{"table", func(u schema.PlanUpload) string { return clean(u.Table) }},
				{"op", func(u schema.PlanUpload) string { return clean(u.Op) }},
				{"are rejected as", func(u schema.PlanUpload) string { return string(u.Code) }},
			})
		})
	}
	if err != nil {
		return err
	}
	a.say("against version %d: %d users and %d of their devices are concerned; %d of these told of unsent changes with their last sync", p.From, p.Users, p.Devices, p.Unsent)
	for _, r := range p.Refresh {
		a.say("set %s: its %d devices get all of its rows anew, since tables, columns or rights are others; unsent changes stay", r.Set, r.Devices)
	}
	return nil
}

// fromTo names a set before and after; empty: none.
func fromTo(was, is string) string {
	if was == is {
		return is
	}
	return orDash(was) + " -> " + orDash(is)
}

// planned is a number of rows and how far it can be trusted.
func planned(n int64, how string) string {
	switch how {
	case schema.PlanEstimate:
		return "about " + strconv.FormatInt(n, 10)
	case schema.PlanUnknown:
		return "not known"
	}
	return strconv.FormatInt(n, 10)
}

// atLeast is an estimate of the database's; it may have none.
func atLeast(n int64) string {
	if n < 0 {
		return "not known"
	}
	return strconv.FormatInt(n, 10)
}
