package cmd

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/waystage/waystage/schema"
)

func newTeardown(a *app) *cobra.Command {
	var everything, yes bool
	c := &cobra.Command{Use: "teardown", Short: "Take back what the set-up left at both servers: slots, publications", Args: cobra.NoArgs,
		Long: `Take back what the set-up left at both servers: replication slots first (they hold WAL back), then publications and the
progress row at the source. Stop all servers before. The next 'serve' sets up anew, with a new copy.
With --everything also Waystage's own schemas and the mirror's tables: users, devices and the ledger are gone then.`,
		RunE: func(c *cobra.Command, _ []string) error {
			conf, err := a.config()
			if err != nil {
				return err
			}
			what := "This removes slots and publications; what devices have sent and the source has not answered yet is sent again by them"
			if everything {
				what = "This removes slots, publications, the whole mirror, all users and devices, and the ledger"
			}
			if err := a.confirm(yes, what, "teardown"); err != nil {
				return err
			}
			err = schema.Teardown(c.Context(), schema.TeardownOptions{SourceDSN: conf.Source.DSN, MirrorDSN: conf.Mirror.DSN, Everything: everything})
			if err != nil {
				return &failure{code: exitCode(err), what: "the teardown is not complete", err: errors.New(oneLine(err.Error())), remedy: "are all servers stopped? it can be repeated"}
			}
			a.say("both servers are free of slots and publications of this installation")
			return nil
		}}
	c.Flags().BoolVar(&everything, "everything", false, "also Waystage's schemas, the mirror's tables, users and the ledger")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}
