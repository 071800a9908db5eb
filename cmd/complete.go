package cmd

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/protocol"
)

// completeFrom completes with what a query on the mirror lists, each a text, maybe with a tab and words that explain it. A
// mirror that does not answer at once completes nothing.
func (a *app) completeFrom(sql string) cobra.CompletionFunc {
	return func(c *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(c.Context(), 2*time.Second)
		defer cancel()
		var found []string
		err := a.withMirror(ctx, func(ctx context.Context, _ Config, mirror *pgxpool.Pool) error {
			rows, err := mirror.Query(ctx, sql)
			if err != nil {
				return err
			}
			found, err = pgx.CollectRows(rows, pgx.RowTo[string])
			return err
		})
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return slices.DeleteFunc(found, func(s string) bool { return !strings.HasPrefix(s, typed) }), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFilter completes the flags by which records are chosen, those that the command has.
func (a *app) completeFilter(c *cobra.Command) {
	codes := []string{}
	for _, code := range protocol.RecordCodes() {
		codes = append(codes, string(code))
	}
	for name, f := range map[string]cobra.CompletionFunc{
		"user":    a.completeFrom(`SELECT name FROM waystage.app_user ORDER BY name`),
		"device":  a.completeFrom(`SELECT DISTINCT name FROM waystage.device WHERE removed_at IS NULL ORDER BY name`),
		"table":   a.completeFrom(`SELECT schema_name || '.' || table_name FROM waystage.synced_table ORDER BY 1`),
		"session": a.completeFrom(`SELECT token || E'\t' || user_name || '/' || device_name || ', ' || state FROM waystage.session ORDER BY id DESC LIMIT 50`),
		"reason":  cobra.FixedCompletions(codes, cobra.ShellCompDirectiveNoFileComp),
		"since":   cobra.FixedCompletions([]string{"1h", "24h", "7d", "30d"}, cobra.ShellCompDirectiveNoFileComp),
		"until":   cobra.NoFileCompletions,
		"unit":    cobra.NoFileCompletions,
		"limit":   cobra.NoFileCompletions,
	} {
		if c.Flags().Lookup(name) != nil {
			_ = c.RegisterFlagCompletionFunc(name, f)
		}
	}
}

// completeRecord completes numbers of rejected records, the newest first.
func (a *app) completeRecord(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	return a.completeFrom(`SELECT id || E'\t' || user_name || '/' || device_name || ', ' || tname || ', ' || code FROM waystage.reject
		WHERE status = 'open' ORDER BY id DESC LIMIT 50`)(c, args, typed)
}
