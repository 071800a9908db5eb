package cmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/waystage/waystage/schema"
)

func newSchema(a *app) *cobra.Command {
	c := &cobra.Command{Use: "schema", Short: "What has changed in the source's tables, and taking it over",
		Long: `A table whose shape changes at the source stops alone when it cannot be followed: its changes are not applied, devices' records for it
wait, and all other tables go on. 'schema diff' says what differs and what would be done about it, 'schema apply' does it.`}
	c.AddCommand(newSchemaDiff(a), newSchemaApply(a))
	return c
}

// inspectSource compares the source's catalog with the tables as they were set up, and with the definitions.
func inspectSource(ctx context.Context, conf Config, mirror *pgxpool.Pool, defs *schema.Definitions) ([]*schema.Inspection, error) {
	source, err := schema.Connect(ctx, conf.Source.DSN, "waystage schema diff")
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	defer func() { _ = source.Close(context.WithoutCancel(ctx)) }()
	conn, err := mirror.Acquire(ctx)
	if err != nil {
		return nil, fmt.Errorf("mirror: %w", err)
	}
	defer conn.Release()
	return schema.Inspect(ctx, source, conn.Conn(), defs.TableNames())
}

// definitionsOf reads the definitions of a configuration, or says all that is wrong with them.
func definitionsOf(conf Config) (*schema.Definitions, error) {
	defs, problems, err := readDefinitions(conf.Definitions)
	if err != nil {
		return nil, err
	}
	if _, err := schema.Refusing(problems); err != nil {
		return nil, definitionsFailure(conf, err)
	}
	return defs, nil
}

// withDefinitions is withMirror with the definitions in force.
func (a *app) withDefinitions(ctx context.Context, do func(context.Context, Config, *pgxpool.Pool, *schema.Definitions) error) error {
	return a.withMirror(ctx, func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
		v, err := stored(ctx, mirror, nil)
		if err != nil {
			return err
		}
		defs, err := parsed(v)
		if err != nil {
			return err
		}
		return do(ctx, conf, mirror, defs)
	})
}

func newSchemaDiff(a *app) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "diff", Short: "Compare the source's tables with the mirror's and the definitions; nothing is changed", Args: cobra.NoArgs,
		Long: "Compare the source's tables with the mirror's and the definitions, and say what 'schema apply' would do. Nothing is changed.\n" +
			"Exit codes: 0 nothing differs, 8 something does, 6 somebody must do something first.",
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDefinitions(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool, defs *schema.Definitions) error {
				found, err := inspectSource(ctx, conf, mirror, defs)
				if err != nil {
					return schemaFailure(conf, err)
				}
				if err := printRows(a.out, f, found, []column[*schema.Inspection]{
					{"table", func(i *schema.Inspection) string { return i.Table }},
					{"action", func(i *schema.Inspection) string { return orDash(string(i.Action)) }},
					{"stopped", func(i *schema.Inspection) string { return orDash(string(i.Stopped)) }},
					{"waiting", func(i *schema.Inspection) string { return strconv.FormatInt(i.Pending, 10) }},
					{"differences", func(i *schema.Inspection) string { return differences(i) }},
				}); err != nil {
					return err
				}
				blocked := false
				for _, i := range found {
					if i.Action == schema.ActBlocked {
						blocked = true
						a.say("table %s: first %s", clean(i.Table), clean(i.Remedy))
					}
				}
				switch {
				case blocked:
					return silent(exitPrecondition)
				case len(found) > 0:
					a.say("take it over with 'waystage schema apply'")
					return silent(exitDiffers)
				}
				a.say("the tables are as they were set up")
				return nil
			})
		}}
	withOutput(c, &f)
	return c
}

func differences(i *schema.Inspection) string {
	var out []string
	for _, d := range i.Differences {
		if d.Column != "" {
			out = append(out, "column "+d.Column+" "+d.What)
		} else {
			out = append(out, d.What)
		}
	}
	return strings.Join(out, "; ")
}

func newSchemaApply(a *app) *cobra.Command {
	var f format
	var resync []string
	var yes bool
	c := &cobra.Command{Use: "apply", Short: "Take over what has changed in the source's tables", Args: cobra.NoArgs,
		Long: `Take over what has changed in the source's tables: mirror tables are altered, and their rows compared with the source's. Rows that
are equal are not touched, and tables that nothing has happened to are not looked at; devices' records that wait go on, or are refused where the table
has no place for them any more (schema_changed). It can be ended at any point and run again. Servers that run
take the tables over at once, and devices with their next session.`,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDefinitions(c.Context(), func(ctx context.Context, conf Config, _ *pgxpool.Pool, defs *schema.Definitions) error {
				if err := a.confirm(yes, "This alters mirror tables as the source's were altered, and refuses records of devices that have no place in them any more", "schema apply"); err != nil {
					return err
				}
				done, err := schema.Apply(ctx, schema.ApplyOptions{Resync: resync, SetupOptions: schema.SetupOptions{
					SourceDSN: conf.Source.DSN, MirrorDSN: conf.Mirror.DSN, Definitions: defs, Log: zap.NewNop()}})
				if perr := printApplied(a.out, f, done); perr != nil {
					return errors.Join(err, perr)
				}
				if err != nil {
					return schemaFailure(conf, err)
				}
				return nil
			})
		}}
	c.Flags().StringSliceVar(&resync, "resync", nil, "compare this table's rows (schema.table) although nothing is known to differ; may be given often")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	withOutput(c, &f)
	return c
}

// printApplied prints what was done to tables.
func printApplied(w io.Writer, f format, done []schema.Applied) error {
	number := func(n int64) string { return strconv.FormatInt(n, 10) }
	return printRows(w, f, done, []column[schema.Applied]{
		{"table", func(d schema.Applied) string { return d.Table }},
		{"action", func(d schema.Applied) string { return orDash(string(d.Action)) }},
		{"compared", func(d schema.Applied) string { return number(d.Compared) }},
		{"written", func(d schema.Applied) string { return number(d.Written) }},
		{"removed", func(d schema.Applied) string { return number(d.Removed) }},
		{"rebased", func(d schema.Applied) string { return number(d.Rebased) }},
		{"refused", func(d schema.Applied) string { return number(d.Refused) }},
	})
}

func schemaFailure(conf Config, err error) error {
	var problems *schema.ProblemsError
	switch {
	case errors.As(err, &problems):
		return &failure{code: exitPrecondition, what: "the tables cannot be taken over yet", where: conf.Definitions, err: problems, remedy: "see 'waystage schema diff'"}
	case errors.Is(err, schema.ErrUnderWay):
		return &failure{code: exitAttention, what: "the change is in force, and an older reply still under way", err: err, remedy: "run it again: it waits for what is under way"}
	case errors.Is(err, schema.ErrNotSetUp):
		return &failure{code: exitPrecondition, what: "the mirror is not set up", err: errors.New(oneLine(err.Error())), remedy: "'waystage serve' sets it up"}
	}
	return &failure{code: exitCode(err), what: "the tables were not taken over", err: err, remedy: "it can be run again: it goes on where it ended"}
}
