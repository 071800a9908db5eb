package cmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/waystage/waystage/schema"
)

func newSubscriptions(a *app) *cobra.Command {
	c := &cobra.Command{Use: "subscriptions", Short: "The definitions: which part of which table who gets and may change",
		Long: `The definitions say which part of which table who gets and may change: subscriptions, sets and groups, in a YAML file. The mirror keeps every version that was
ever in force. The file of the configuration counts at the first start; afterwards the newest version in the mirror is in force, whatever the file says.`}
	c.AddCommand(newSubscriptionsValidate(a), newSubscriptionsPlan(a), newSubscriptionsLs(a), newSubscriptionsShow(a), newSubscriptionsExport(a), newSubscriptionsBuiltFor(a), newSubscriptionsSchema(a),
		newSubscriptionsApply(a), newSubscriptionsRollback(a))
	return c
}

// definitionsFile is the file of the argument, or else of the configuration.
func definitionsFile(conf Config, args []string) string {
	if len(args) > 0 {
		return args[0]
	}
	return conf.Definitions
}

func newSubscriptionsValidate(a *app) *cobra.Command {
	var f format
	var offline bool
	c := &cobra.Command{Use: "validate [FILE]", Short: "Check a definitions file; nothing is changed", Args: cobra.MaximumNArgs(1),
		Long: `Check a definitions file, by default that of the configuration, and name all that is wrong with it, each with file:line:column and remedy. Nothing is changed.
With the databases in reach, tables and columns are looked up at the source, and the mirror itself checks the rows queries, as the role that
may read the mirror and nothing else; foreign keys that a set does not close are warned of.
Exit codes: 0 good (maybe with warnings), 2 wrong.`,
		RunE: func(c *cobra.Command, args []string) error {
			conf, err := a.config()
			if err != nil {
				if len(args) == 0 {
					return err
				}
				offline = true // a file can be checked without a configuration
			}
			file := definitionsFile(conf, args)
			defs, problems, err := readDefinitions(file)
			if err != nil {
				return err
			}
			if defs != nil && !offline {
				var more []schema.Problem
				if more, err = a.examine(c.Context(), conf, defs); err != nil {
					return err
				}
				problems = append(problems, more...)
			}
			if err := printProblems(a.out, f, problems); err != nil {
				return err
			}
			warnings, refused := schema.Refusing(problems)
			if refused != nil {
				a.say("%s cannot be used: %d problems", file, len(problems)-len(warnings))
				return silent(exitUsage)
			}
			how := ""
			if offline {
				how = " (the databases were not asked)"
			}
			a.say("%s is good%s: %d subscriptions, %d sets, %d groups; %d warnings", file, how, len(defs.Subscriptions), len(defs.Sets), len(defs.Groups), len(warnings))
			return nil
		}}
	c.Flags().BoolVar(&offline, "offline", false, "do not ask the databases")
	c.ValidArgsFunction = completeFile
	withOutput(c, &f)
	return c
}

// completeFile completes one file name.
func completeFile(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return []string{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
}

// examine holds definitions against the databases; one that does not answer is said and left out.
func (a *app) examine(ctx context.Context, conf Config, defs *schema.Definitions) ([]schema.Problem, error) {
	source, err := schema.Connect(ctx, conf.Source.DSN, "waystage subscriptions")
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		a.say("the source was not asked: %s", oneLine(err.Error()))
		return nil, nil
	}
	defer func() { _ = source.Close(context.WithoutCancel(ctx)) }()
	mirror, err := schema.Connect(ctx, conf.Mirror.DSN, "waystage subscriptions")
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		a.say("the mirror was not asked, so rows queries are not checked: %s", oneLine(err.Error()))
	} else {
		defer func() { _ = mirror.Close(context.WithoutCancel(ctx)) }()
	}
	_, problems, err := defs.Examine(ctx, source, mirror)
	return problems, err
}

// printProblems prints problems as compilers do, a line each.
func printProblems(w io.Writer, f format, problems []schema.Problem) error {
	if f != "table" {
		return printRows(w, f, problems, nil)
	}
	for _, p := range problems {
		level := "error"
		if p.Warning {
			level = "warning"
		}
		if _, err := fmt.Fprintln(w, level+": "+clean(p.String())); err != nil {
			return err
		}
	}
	return nil
}

func newSubscriptionsLs(a *app) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "ls", Short: "List the versions of the definitions, the newest first: it is in force", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, _ Config, mirror *pgxpool.Pool) error {
				list, err := schema.Versions(ctx, mirror)
				if err != nil {
					return err
				}
				return printRows(a.out, f, list, []column[schema.Version]{
					{"version", func(v schema.Version) string { return strconv.Itoa(v.Number) }},
					{"", func(v schema.Version) string { return map[bool]string{true: "in force"}[v.Current] }},
					{"applied", func(v schema.Version) string { return v.AppliedAt.Local().Format("2006-01-02 15:04:05") }},
					{"who", func(v schema.Version) string { return orDash(v.Who) }},
					{"sha256", func(v schema.Version) string { return v.SHA256[:min(12, len(v.SHA256))] }},
					{"bytes", func(v schema.Version) string { return strconv.Itoa(v.Bytes) }},
					{"note", func(v schema.Version) string { return orDash(v.Note) }},
				})
			})
		}}
	withOutput(c, &f)
	return c
}

// stored reads the version of an argument, or else the one in force.
func stored(ctx context.Context, mirror *pgxpool.Pool, args []string) (*schema.Version, error) {
	number := 0
	if len(args) > 0 {
		n, err := strconv.Atoi(args[0])
		if err != nil || n < 1 {
			return nil, usage("%q is not the number of a version", args[0])
		}
		number = n
	}
	v, err := schema.LoadVersion(ctx, mirror, number)
	if errors.Is(err, schema.ErrNoVersion) {
		f := &failure{code: exitPrecondition, what: fmt.Sprintf("there is no version %d of the definitions", number), remedy: "'waystage subscriptions ls' lists them"}
		if number == 0 {
			f.what, f.remedy = "the mirror has no definitions yet", "'waystage serve' takes those of the configuration at its first start"
		}
		return nil, f
	}
	return v, err
}

// parsed reads a stored version's body.
func parsed(v *schema.Version) (*schema.Definitions, error) {
	d, problems := v.Parse()
	if _, err := schema.Refusing(problems); err != nil {
		return nil, &failure{code: exitFailed, what: fmt.Sprintf("version %d of the definitions is not one that this program reads", v.Number), err: err,
			remedy: "use the program that applied it; 'waystage subscriptions export' prints it as it was written"}
	}
	return d, nil
}

// completeVersion completes the number of a version.
func (a *app) completeVersion(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeFrom(`SELECT version || E'\t' || to_char(applied_at, 'YYYY-MM-DD HH24:MI') || ' ' || who || ' ' || note FROM waystage.definition ORDER BY version DESC LIMIT 50`)(c, args, typed)
}

func newSubscriptionsExport(a *app) *cobra.Command {
	return &cobra.Command{Use: "export [VERSION]", Short: "Print a version of the definitions as it was written; by default the one in force", Args: cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeVersion,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, _ Config, mirror *pgxpool.Pool) error {
				v, err := stored(ctx, mirror, args)
				if err != nil {
					return err
				}
				_, err = io.WriteString(a.out, v.Body)
				return err
			})
		}}
}

func newSubscriptionsSchema(a *app) *cobra.Command {
	return &cobra.Command{Use: "schema", Short: "Print the JSON Schema of definitions files, for editors", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := io.WriteString(a.out, schema.JSONSchema())
			return err
		}}
}

// shownVersion is a version with what it says.
type shownVersion struct {
	schema.Version
	Subscriptions []shownSubscription `json:"subscriptions"`
	Sets          []schema.Set        `json:"sets"`
	Groups        []schema.Group      `json:"groups"`
}

// shownSubscription is a subscription as it is shown.
type shownSubscription struct {
	Name      string   `json:"name"`
	Table     string   `json:"table"`
	Columns   []string `json:"columns"` // empty: all
	Key       string   `json:"key,omitempty"`
	Rows      string   `json:"rows,omitempty"`
	Direction string   `json:"direction"`
	Allow     []string `json:"allow"`
	Reject    string   `json:"reject"`
	Conflict  string   `json:"conflict"`
	Function  string   `json:"function,omitempty"`
	Sets      []string `json:"sets"`
	Groups    []string `json:"groups"` // whose members have it
}

func showVersion(v *schema.Version, d *schema.Definitions) shownVersion {
	out := shownVersion{Version: *v, Subscriptions: []shownSubscription{}, Sets: d.Sets, Groups: d.Groups}
	for _, s := range d.Subscriptions {
		one := shownSubscription{Name: s.Name, Table: s.Table, Columns: append([]string{}, s.Columns...), Key: s.Key, Rows: s.Rows, Direction: string(s.Direction),
			Allow: []string{}, Reject: string(s.Reject), Conflict: string(s.Conflict), Function: s.Function, Sets: []string{}, Groups: []string{}}
		for _, op := range []struct{ code, word string }{{"I", "insert"}, {"U", "update"}, {"D", "delete"}} {
			if s.Allows(op.code) {
				one.Allow = append(one.Allow, op.word)
			}
		}
		for _, set := range d.Sets {
			if !slices.Contains(set.Subscriptions, s.Name) {
				continue
			}
			one.Sets = append(one.Sets, set.Name)
			for _, g := range d.Groups {
				if slices.Contains(g.Sets, set.Name) && !slices.Contains(one.Groups, g.Name) {
					one.Groups = append(one.Groups, g.Name)
				}
			}
		}
		out.Subscriptions = append(out.Subscriptions, one)
	}
	return out
}

func newSubscriptionsShow(a *app) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "show [VERSION]", Short: "Show what a version of the definitions says; by default the one in force", Args: cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeVersion,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, _ Config, mirror *pgxpool.Pool) error {
				v, err := stored(ctx, mirror, args)
				if err != nil {
					return err
				}
				d, err := parsed(v)
				if err != nil {
					return err
				}
				all := showVersion(v, d)
				switch f {
				case "json":
					return printJSON(a.out, all)
				case "ndjson":
					return printRows(a.out, f, []shownVersion{all}, nil)
				}
				a.say("version %d, applied %s by %s%s", v.Number, v.AppliedAt.Local().Format("2006-01-02 15:04:05"), orDash(v.Who), map[bool]string{true: ", in force"}[v.Current])
				return printRows(a.out, f, all.Subscriptions, []column[shownSubscription]{
					{"subscription", func(s shownSubscription) string { return s.Name }},
					{"table", func(s shownSubscription) string { return s.Table }},
					{"columns", func(s shownSubscription) string {
						if len(s.Columns) == 0 {
							return "all"
						}
						return strconv.Itoa(len(s.Columns))
					}},
					{"key", func(s shownSubscription) string { return orDash(s.Key) }},
					{"direction", func(s shownSubscription) string { return s.Direction }},
					{"allow", func(s shownSubscription) string { return orDash(strings.Join(s.Allow, ",")) }},
					{"reject", func(s shownSubscription) string { return s.Reject }},
					{"conflict", func(s shownSubscription) string { return strings.TrimSpace(s.Conflict + " " + s.Function) }},
					{"sets", func(s shownSubscription) string { return orDash(strings.Join(s.Sets, ",")) }},
					{"groups", func(s shownSubscription) string { return orDash(strings.Join(s.Groups, ",")) }},
				})
			})
		}}
	withOutput(c, &f)
	return c
}

func newSubscriptionsApply(a *app) *cobra.Command {
	var f format
	var note string
	var yes bool
	c := &cobra.Command{Use: "apply [FILE]", Short: "Put a definitions file in force, as a new version", Args: cobra.MaximumNArgs(1),
		Long: `Put a definitions file in force as a new version, by default that of the configuration. It is checked first, as 'validate' does; one that is wrong changes nothing.
New tables are copied while everything else goes on. It can be ended at any point and run again: the version that was in force stays so until the
new one is complete.`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				defs, err := usableDefinitions(definitionsFile(conf, args))
				if err != nil {
					return err
				}
				return a.enforce(ctx, conf, mirror, f, defs, note, yes)
			})
		}}
	c.ValidArgsFunction = completeFile
	enforceFlags(c, &f, &note, &yes)
	return c
}

func newSubscriptionsRollback(a *app) *cobra.Command {
	var f format
	var note string
	var yes bool
	c := &cobra.Command{Use: "rollback [VERSION]", Short: "Put an earlier version of the definitions in force again, as a new version", Args: cobra.MaximumNArgs(1),
		Long: `Put an earlier version of the definitions in force again, by default the one before the present one. It becomes a new version with the old words: nothing
of the history is lost, and a rollback can be rolled back. Everything else is as with 'apply'.`,
		ValidArgsFunction: a.completeVersion,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				now, err := stored(ctx, mirror, nil)
				if err != nil {
					return err
				}
				if len(args) == 0 {
					if now.Number == 1 {
						return &failure{code: exitPrecondition, what: "there is no version before version 1", remedy: "'waystage subscriptions apply' puts a file in force"}
					}
					args = []string{strconv.Itoa(now.Number - 1)}
				}
				v, err := stored(ctx, mirror, args)
				if err != nil {
					return err
				}
				defs, err := parsed(v)
				if err != nil {
					return err
				}
				if note == "" {
					note = fmt.Sprintf("back to version %d", v.Number)
				}
				return a.enforce(ctx, conf, mirror, f, defs, note, yes)
			})
		}}
	enforceFlags(c, &f, &note, &yes)
	return c
}

func enforceFlags(c *cobra.Command, f *format, note *string, yes *bool) {
	c.Flags().StringVar(note, "note", "", "why; kept with the version")
	_ = c.RegisterFlagCompletionFunc("note", cobra.NoFileCompletions)
	c.Flags().BoolVar(yes, "yes", false, "do not ask")
	withOutput(c, f)
}

// usableDefinitions reads a definitions file that is to be compared with what is in force, or to take its place.
func usableDefinitions(file string) (*schema.Definitions, error) {
	defs, problems, err := readDefinitions(file)
	if err != nil {
		return nil, err
	}
	if _, err := schema.Refusing(problems); err != nil {
		return nil, notUsable(file, err)
	}
	return defs, nil
}

func notUsable(file string, err error) error {
	return &failure{code: exitUsage, what: "the definitions cannot be used; those in force stay so", where: file, err: err, remedy: "'waystage subscriptions validate' names everything at once"}
}

// foresee shows somebody who is asked what they are asked about.
func (a *app) foresee(ctx context.Context, conf Config, mirror *pgxpool.Pool, defs *schema.Definitions, yes bool) error {
	if yes || !a.inTTY {
		return nil
	}
	plan, err := a.plan(ctx, conf, mirror, defs, planWithin)
	if err != nil {
		return err
	}
	return a.printPlan(a.err, plan)
}

// enforce puts definitions in force, once somebody has agreed.
func (a *app) enforce(ctx context.Context, conf Config, mirror *pgxpool.Pool, f format, defs *schema.Definitions, note string, yes bool) error {
	if len(note) > schema.MostNote || strings.ContainsFunc(note, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return usage("--note takes one line of at most %d bytes", schema.MostNote)
	}
	now, err := stored(ctx, mirror, nil)
	if err != nil {
		return err
	}
	who, err := (&chosen{}).actor()
	if err != nil {
		return err
	}
	if defs.SHA256() == now.SHA256 {
		a.say("version %d, which is in force, says the same: there is nothing to do but what an attempt that was cut off has left", now.Number)
	} else if err := a.foresee(ctx, conf, mirror, defs, yes); err != nil {
		return err
	} else if err := a.confirm(yes, fmt.Sprintf("This puts %s in force in place of version %d, for all devices", defs.File, now.Number), "apply"); err != nil {
		return err
	}
	done, err := schema.Apply(ctx, schema.ApplyOptions{SetupOptions: schema.SetupOptions{SourceDSN: conf.Source.DSN, MirrorDSN: conf.Mirror.DSN, Definitions: defs,
		Author: schema.Author{Who: who, Note: note}, Log: zap.NewNop()}})
	if perr := printApplied(a.out, f, done); perr != nil {
		return errors.Join(err, perr)
	}
	var problems *schema.ProblemsError
	if errors.As(err, &problems) {
		return notUsable(defs.File, problems)
	}
	if err != nil {
		return schemaFailure(conf, err)
	}
	if now, err = stored(ctx, mirror, nil); err != nil {
		return err
	}
	a.say("version %d is in force, in all servers", now.Number)
	return nil
}
