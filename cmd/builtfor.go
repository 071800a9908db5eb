package cmd

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

func newSubscriptionsBuiltFor(a *app) *cobra.Command {
	var name string
	c := &cobra.Command{Use: "built-for [SET...]", Short: "Print what an application is built for that uses the sets as they are",
		Long: `Print what an application is built for that uses these sets, by default all, as the version in force has them: tables and columns, as JSON. The application carries the file
and names it (device.Options.Built; 'waystage device built-for'): its devices get these tables and columns and no others, whatever is added to the subscriptions
later. Print it anew with each version of the application that uses more.`,
		Example: `  waystage subscriptions built-for field > built-for.json`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, _ Config, mirror *pgxpool.Pool) error {
				v, err := stored(ctx, mirror, nil)
				if err != nil {
					return err
				}
				defs, tables, err := schema.LoadDefinitions(ctx, mirror)
				if err != nil {
					return err
				}
				var all []string
				for _, s := range defs.Sets {
					all = append(all, s.Name)
				}
				for _, set := range args {
					if !slices.Contains(all, set) {
						return &failure{code: exitPrecondition, what: fmt.Sprintf("there is no set %q", set), remedy: "the sets are: " + strings.Join(all, ", ")}
					}
				}
				if len(args) == 0 {
					args = all
				}
				if name == "" {
					name = fmt.Sprintf("version %d", v.Number)
				}
				built := defs.Built(name, args, tables)
				if err := built.Check(); err != nil {
					return usage("%v", err)
				}
				return printJSON(a.out, built)
			})
		}}
	c.Flags().StringVar(&name, "name", "", "what operators see, e.g. the application's release (default \"version N\", of the version in force)")
	_ = c.RegisterFlagCompletionFunc("name", cobra.NoFileCompletions)
	c.ValidArgsFunction = a.completeFrom(`SELECT DISTINCT set_name FROM waystage.cursor ORDER BY 1`)
	return c
}

func newDeviceBuiltFor(a *app, path *string) *cobra.Command {
	var f format
	var everything bool
	c := &cobra.Command{Use: "built-for [FILE.json]", Short: "Say, or show, what the file's application was built for", Args: cobra.MaximumNArgs(1),
		Long: `Say what the application was built for that uses the file, by what 'waystage subscriptions built-for' printed: with the next sync the file gets these tables and columns
and no others, whatever is added to the subscriptions. It is noted in the file. An application that links the Go library says it with device.Options.Built when it opens
the file. Edits that have not been sent are kept; what was written to a column that leaves the file goes into the rejected log. Without FILE: show what is noted.`,
		RunE: func(c *cobra.Command, args []string) error {
			if everything && len(args) > 0 {
				return usage("--everything and a file are one too many")
			}
			built := &protocol.Built{}
			if len(args) > 0 {
				text, err := os.ReadFile(args[0])
				if err == nil {
					built, err = protocol.ParseBuilt(text)
				}
				if err != nil {
					return &failure{code: exitUsage, what: "cannot read what the application was built for", where: args[0], err: bare(err),
						remedy: "'waystage subscriptions built-for' prints it"}
				}
			}
			return a.withDevice(c.Context(), *path, false, "cannot read or note what the application was built for", func(d *device.Device) error {
				if everything || len(args) > 0 {
					if err := d.BuildFor(c.Context(), *built); err != nil {
						return err
					}
					a.say("noted; the next sync goes by it: waystage device sync --file %s", *path)
					return nil
				}
				b, err := d.Built(c.Context())
				if err != nil {
					return err
				}
				if f != "table" {
					return printOne(a.out, f, b)
				}
				if b == nil {
					a.say("everything that the subscriptions have")
					return nil
				}
				a.say("%s", clean(b.Name))
				return printRows(a.out, f, b.Tables, []column[protocol.Layout]{
					{"table", func(l protocol.Layout) string { return clean(l.Table) }},
					{"columns", func(l protocol.Layout) string {
						if len(l.Columns) == 0 {
							return "all"
						}
						return clean(strings.Join(l.Columns, ", "))
					}},
				})
			})
		}}
	withOutput(c, &f)
	c.Flags().BoolVar(&everything, "everything", false, "whatever the subscriptions have")
	c.ValidArgsFunction = func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return []string{"json"}, cobra.ShellCompDirectiveFilterFileExt
	}
	return c
}
