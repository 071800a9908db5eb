// Package cmd is the command line: it reads flags and configuration, wires the other packages together and turns
// their errors into words and exit codes. It is the only package that knows two neighbours at once.
//
// Data goes to stdout, talk to stderr; -o json prints data for programs; the exit codes are those of exit.go.
// serve.go is the place to start reading: the server is wired there in one function.
package cmd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// app is what the commands of one invocation share.
type app struct {
	*terminal
	file string   // -c
	set  []string // --set
}

// config loads and validates the configuration.
func (a *app) config() (Config, error) {
	c, err := load(a.terminal, a.file, a.set)
	if err != nil {
		return c, err
	}
	return c, c.Validate()
}

// Main runs one command line and returns its exit code. The first SIGINT or SIGTERM asks the command to end in
// order, the second ends the process.
func Main(args []string, t *terminal) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	go func() {
		<-ctx.Done()
		stop() // from here on the runtime's default applies: the next signal kills
	}()
	return run(ctx, args, t)
}

// run is Main without signals, for tests.
func run(ctx context.Context, args []string, t *terminal) int {
	root := newRoot(&app{terminal: t})
	root.SetArgs(args)
	root.SetIn(t.in)
	root.SetOut(t.out)
	root.SetErr(t.err)
	err := root.ExecuteContext(ctx)
	if err != nil && ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = silent(exitInterrupted)
	}
	report(t.err, err)
	return exitCode(err)
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "waystage",
		Short: "Keep occasionally connected devices in step with a PostgreSQL database",
		Long: `Waystage keeps the local SQLite databases of occasionally connected devices in step with your PostgreSQL database.

Start here:   waystage demo                            see everything work, on this machine, with invented data
Your data:    waystage init, waystage check, waystage serve
A device:     waystage device enrol, waystage device sync

Exit codes: 0 ok, 1 failed, 2 usage, 3 finished with rejected records, 4 not allowed, 5 unreachable,
6 precondition or conflict, 7 data needs attention, 8 verify found differences, 130 interrupted.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return &failure{code: exitUsage, what: oneLine(err.Error()), remedy: "see '" + c.CommandPath() + " --help'"}
	})
	root.PersistentFlags().StringVarP(&a.file, "config", "c", "", "configuration file (default $WAYSTAGE_CONFIG, ./waystage.yaml, /etc/waystage/waystage.yaml)")
	root.PersistentFlags().StringArrayVar(&a.set, "set", nil, "set a key of the configuration, as key=value; may be given often")
	root.CompletionOptions.HiddenDefaultCmd = false
	root.AddGroup(&cobra.Group{ID: "server", Title: "Server:"}, &cobra.Group{ID: "operate", Title: "Operate:"},
		&cobra.Group{ID: "device", Title: "Device:"})
	in := func(group string, cs ...*cobra.Command) {
		for _, c := range cs {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	in("server", newDemo(a), newServe(a), newInit(a), newCheck(a), newConfig(a))
	subscriptions, users, devices := newSubscriptions(a), newUsers(a), newDevices(a)
	addRefresh(a, users, devices, subscriptions)
	in("operate", newStatus(a), newVerify(a), subscriptions, newSchema(a), newPools(a), newRejects(a), newReceipts(a), newExplain(a), users, newGroups(a), devices, newFiles(a), newTeardown(a), newBench(a))
	in("device", newDevice(a))
	root.AddCommand(newVersion(a))
	checkArgs(root)
	return root
}

// checkArgs gives wrong arguments the usage exit code, and groups without a verb their help.
func checkArgs(c *cobra.Command) {
	for _, sub := range c.Commands() {
		checkArgs(sub)
	}
	if c.HasSubCommands() && !c.Runnable() {
		c.Args = cobra.ArbitraryArgs
		c.SuggestionsMinimumDistance = 2
		c.RunE = func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			hint := ""
			if s := c.SuggestionsFor(args[0]); len(s) > 0 {
				hint = fmt.Sprintf("; did you mean %q?", s[0])
			}
			return &failure{code: exitUsage, what: fmt.Sprintf("unknown command %q for %q%s", args[0], c.CommandPath(), hint),
				remedy: "see '" + c.CommandPath() + " --help'"}
		}
		return
	}
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return &failure{code: exitUsage, what: strings.TrimSpace(oneLine(err.Error())), remedy: "see '" + c.CommandPath() + " --help'"}
			}
			return nil
		}
	}
}
