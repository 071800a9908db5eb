package cmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/stages"
)

func newExplain(a *app) *cobra.Command {
	c := &cobra.Command{Use: "explain", Short: "Say why things are as they are"}
	c.AddCommand(newExplainRow(a))
	return c
}

func newExplainRow(a *app) *cobra.Command {
	var f format
	var device string
	c := &cobra.Command{Use: "row TABLE KEY", Short: "Say why a row is, or is not, on a device", Args: cobra.ExactArgs(2),
		Long: `Go through everything that decides whether a row is on a device, in order, and say where it stands.

KEY is the primary key as PostgreSQL writes it. A key of several columns is JSON: '["a", 1]' in the key's order, or
'{"column": "value"}'. Nothing is changed.`,
		Example: `  waystage explain row public.work_order 4711 --device anna/phone
  waystage explain row public.code '["ABC", 2]' --device anna/phone -o json`,
		RunE: func(c *cobra.Command, args []string) error {
			user, name, ok := strings.Cut(device, "/")
			if !ok {
				return usage("--device wants USER/DEVICE, not %q", device)
			}
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				follower := stages.NewFollower(mirror, nil)
				if err := follower.Load(ctx); err != nil {
					return err
				}
				cat := follower.Now()
				key, err := rowKey(cat, args[0], args[1])
				if err != nil {
					return err
				}
				var source schema.Querier
				short, cancel := context.WithTimeout(ctx, sourcePatience)
				conn, unreachable := schema.Connect(short, conf.Source.DSN, "waystage-explain")
				cancel()
				if unreachable == nil {
					defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
					source = conn
				}
				e, err := stages.Explain(ctx, mirror, source, unreachable, cat, args[0], key, user, name)
				var asked *stages.ExplainError
				if errors.As(err, &asked) {
					code := exitPrecondition
					if asked.Code == "invalid_key" {
						code = exitUsage
					}
					return &failure{code: code, what: "cannot explain the row", err: asked}
				}
				if err != nil {
					return err
				}
				if f != "table" {
					return printOne(a.out, f, e)
				}
				return a.printExplanation(e)
			})
		}}
	c.Flags().StringVar(&device, "device", "", "USER/DEVICE")
	_ = c.RegisterFlagCompletionFunc("device", a.completeFrom(`SELECT user_name || '/' || name FROM waystage.device ORDER BY 1`))
	tables := a.completeFrom(`SELECT schema_name || '.' || table_name FROM waystage.synced_table ORDER BY 1`)
	c.ValidArgsFunction = func(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return tables(c, args, typed)
	}
	withOutput(c, &f)
	return c
}

// rowKey reads a key from the command line: the values in the key's order.
func rowKey(cat *stages.Catalog, table, text string) ([]string, error) {
	bad := func(format string, args ...any) ([]string, error) {
		return nil, &failure{code: exitUsage, what: "the key cannot be read", err: fmt.Errorf("invalid_key: "+format, args...),
			remedy: `write one value as it is, several as JSON: '["a", 1]' or '{"column": "value"}'`}
	}
	value := func(raw json.RawMessage) (string, bool) {
		var s string
		if json.Unmarshal(raw, &s) == nil && string(raw) != "null" {
			return s, true
		}
		switch raw[0] {
		case '[', '{', 'n':
			return "", false
		}
		return string(raw), true // a number or truth value, as it is written
	}
	columns := cat.Key(table) // nil: not known, which is said later
	switch trimmed := strings.TrimSpace(text); {
	case strings.HasPrefix(trimmed, "["):
		var list []json.RawMessage
		if err := json.Unmarshal([]byte(trimmed), &list); err != nil {
			if len(columns) == 1 {
				break // a value that begins so
			}
			return bad("%v", err)
		}
		var key []string
		for _, raw := range list {
			v, ok := value(raw)
			if !ok {
				return bad("%s is no value of a key", raw)
			}
			key = append(key, v)
		}
		return key, nil
	case strings.HasPrefix(trimmed, "{"):
		var named map[string]json.RawMessage
		if err := json.Unmarshal([]byte(trimmed), &named); err != nil {
			if len(columns) == 1 {
				break
			}
			return bad("%v", err)
		}
		var key []string
		for _, col := range columns {
			raw, ok := named[col]
			if !ok {
				return bad("column %s is missing; the key of %s is (%s)", col, table, strings.Join(columns, ", "))
			}
			v, ok := value(raw)
			if !ok {
				return bad("%s is no value of a key", raw)
			}
			key = append(key, v)
			delete(named, col)
		}
		for col := range named {
			if columns != nil {
				return bad("%s is not a column of the key (%s)", col, strings.Join(columns, ", "))
			}
		}
		return key, nil
	}
	return []string{text}, nil
}

func (a *app) printExplanation(e *stages.Explanation) error {
	fmt.Fprintf(a.out, "%s, key %s, device %s/%s\n\n", clean(e.Table), clean(strings.Join(e.Key, ", ")), e.User, e.Device)
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	for _, p := range e.Parts {
		mark := " "
		if p.Holds != nil {
			mark = map[bool]string{true: "yes", false: "no"}[*p.Holds]
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", p.Part, mark, clean(oneLine(p.Text)))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(a.out, "\nThe row %s.\n", clean(e.Summary))
	return err
}

// sourcePatience bounds how long the source is tried: without it everything else can be said.
const sourcePatience = 5 * time.Second
