package cmd

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
)

var deviceRejectStatuses = []string{device.RejectOpen, device.RejectResubmitted, device.RejectRestored, device.RejectDiscarded, device.RejectSettled, "all"}

// deviceRejectFilter chooses entries of a device's rejected log.
type deviceRejectFilter struct{ table, reason, since, status string }

func (f *deviceRejectFilter) flags(c *cobra.Command) {
	c.Flags().StringVar(&f.table, "table", "", "of this table (at the server, or in the file)")
	c.Flags().StringVar(&f.reason, "reason", "", "with this code, e.g. stale_version")
	c.Flags().StringVar(&f.since, "since", "", "from this time on: 24h, 7d, 2026-01-31 or RFC 3339")
	var codes []string
	for _, code := range protocol.RecordCodes() {
		codes = append(codes, string(code))
	}
	_ = c.RegisterFlagCompletionFunc("reason", cobra.FixedCompletions(codes, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("since", cobra.FixedCompletions([]string{"1h", "24h", "7d", "30d"}, cobra.ShellCompDirectiveNoFileComp))
}

func (f *deviceRejectFilter) filter() (device.RejectFilter, error) {
	o := device.RejectFilter{Table: f.table, Reason: f.reason}
	if !slices.Contains(deviceRejectStatuses, f.status) {
		return o, usage("--state wants %s, not %q", strings.Join(deviceRejectStatuses, ", "), f.status)
	}
	if f.status != "all" {
		o.Status = f.status
	}
	if f.since == "" {
		return o, nil
	}
	at, err := moment(f.since, time.Now())
	if err != nil {
		return o, usage("%v", err)
	}
	o.Since = at
	return o, nil
}

// newDeviceRejects is the device's side of rejected records; without a subcommand it lists them.
func newDeviceRejects(a *app, path *string) *cobra.Command {
	list := func(c *cobra.Command) {
		f, o := &deviceRejectFilter{}, new(format)
		f.flags(c)
		c.Flags().StringVar(&f.status, "state", device.RejectOpen, "in this state: "+strings.Join(deviceRejectStatuses, ", "))
		_ = c.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(deviceRejectStatuses, cobra.ShellCompDirectiveNoFileComp))
		withOutput(c, o)
		c.Args = cobra.NoArgs
		c.RunE = func(c *cobra.Command, _ []string) error { return a.listDeviceRejects(c.Context(), *path, f, *o) }
	}
	c := &cobra.Command{Use: "rejects", Short: "Records of this device that were rejected: list, show, resubmit, restore, discard",
		Long: `Records of this device that were rejected.

resubmit puts what the edit changed on the row as it is now: what others have changed in other columns stays.
restore makes the row again what the edit had made of it, every column, whatever others have written since.
Either is an ordinary unsent edit: it goes with the next sync, and gets an outcome of its own.
discard marks the entry as seen. What was dealt with is kept for a while (waystage device keep).`}
	list(c)
	ls := &cobra.Command{Use: "ls", Short: "List rejected records that nobody has dealt with"}
	list(ls)
	c.AddCommand(ls, newDeviceRejectShow(a, path), newDeviceResubmit(a, path), newDeviceRestore(a, path), newDeviceDiscard(a, path))
	return c
}

func (a *app) listDeviceRejects(ctx context.Context, path string, f *deviceRejectFilter, o format) error {
	filter, err := f.filter()
	if err != nil {
		return err
	}
	return a.withDevice(ctx, path, false, "cannot read the rejected log", func(d *device.Device) error {
		l, err := d.RejectLog(ctx, filter)
		if err != nil {
			return err
		}
		if len(l) == 0 && o == "table" {
			a.say("nothing was rejected that is %s", f.status)
		}
		return printRows(a.out, o, l, []column[device.Reject]{
			{"entry", func(r device.Reject) string { return strconv.FormatInt(r.Entry, 10) }},
			{"at", func(r device.Reject) string { return r.At.Local().Format(time.DateTime) }},
			{"table", func(r device.Reject) string { return r.Table }},
			{"op", func(r device.Reject) string { return r.Op }},
			{"key", func(r device.Reject) string { return joinKey(r.Key) }},
			{"code", func(r device.Reject) string { return string(r.Code) }},
			{"state", func(r device.Reject) string { return r.Status }},
			{"detail", func(r device.Reject) string { return shorten(r.Detail, 80) }},
		})
	})
}

// entryArgs reads entry numbers.
func entryArgs(args []string) ([]int64, error) {
	var l []int64
	for _, s := range args {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n < 1 {
			return nil, usage("%q is not the number of an entry", s)
		}
		l = append(l, n)
	}
	return l, nil
}

// completeEntry completes numbers of entries that can be dealt with.
func (a *app) completeEntry(path *string) cobra.CompletionFunc {
	return func(c *cobra.Command, args []string, _ string) (found []string, _ cobra.ShellCompDirective) {
		_ = a.withDevice(c.Context(), *path, false, "cannot read the rejected log", func(d *device.Device) error {
			l, err := d.RejectLog(c.Context(), device.RejectFilter{})
			for _, r := range slices.Backward(l) {
				n := strconv.FormatInt(r.Entry, 10)
				if !slices.Contains(args, n) && (r.Status == device.RejectOpen || r.Status == device.RejectDiscarded) {
					found = append(found, n+"\t"+clean(fmt.Sprintf("%s %s, %s, %s", r.Table, joinKey(r.Key), r.Code, r.Status)))
				}
			}
			return err
		})
		return found, cobra.ShellCompDirectiveNoFileComp
	}
}

func newDeviceRejectShow(a *app, path *string) *cobra.Command {
	var f format
	var all bool
	c := &cobra.Command{Use: "show ENTRY", Short: "Show one: what was sent, what it was based on, and what the row is now", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeEntry(path),
		RunE: func(c *cobra.Command, args []string) error {
			n, err := entryArgs(args)
			if err != nil {
				return err
			}
			return a.withDevice(c.Context(), *path, false, "cannot show the entry", func(d *device.Device) error {
				r, err := d.Rejected(c.Context(), n[0])
				if err != nil {
					return err
				}
				if f != "table" {
					return printOne(a.out, f, r)
				}
				a.printDeviceReject(r, all)
				return nil
			})
		}}
	c.Flags().BoolVarP(&all, "all", "a", false, "show columns that are the same everywhere, too")
	withOutput(c, &f)
	return c
}

func (a *app) printDeviceReject(r device.RejectNow, all bool) {
	number := ""
	if r.ID != 0 {
		number = fmt.Sprintf(" (no. %d in the server's log)", r.ID)
	}
	words := map[string]string{protocol.Insert: "insert into", protocol.Update: "update of", protocol.Delete: "delete from"}
	fmt.Fprintf(a.out, "%d  %s  %s %s, key %s: %s, %s%s\n  %s\n", r.Entry, r.At.Local().Format(time.DateTime), words[r.Op], r.Table, clean(joinKey(r.Key)), r.State, r.Code, number, clean(r.Detail))
	show := func(label string, m map[string]*string) {
		if m == nil {
			fmt.Fprintf(a.out, "  %-12s no such row\n", label)
			return
		}
		var parts []string
		for _, n := range sortedKeys(m) {
			if all || !sameValue(r.Base, r.Right, n) || !sameValue(r.Sent, r.Right, n) || !sameValue(r.Right, r.Now, n) || !sameValue(r.Now, r.Row, n) {
				parts = append(parts, n+" = "+cell(m, n))
			}
		}
		fmt.Fprintf(a.out, "  %-12s %s\n", label, clean(orDash(strings.Join(parts, ", "))))
	}
	show("you sent", r.Sent)
	show("based on", r.Base)
	show("right then", r.Right)
	show("right now", r.Now)
	if r.Edited {
		show("in the file", r.Row)
		fmt.Fprintln(a.out, "  the row in the file has another edit that is not final")
	}
	if r.Op == protocol.Update {
		fmt.Fprintf(a.out, "  %-12s %s\n", "you changed", clean(orDash(strings.Join(r.Changed, ", "))))
	}
	if len(r.Partner) > 1 {
		fmt.Fprintf(a.out, "  %-12s entries %s; --transaction takes them all\n", "made with", joinInts(r.Partner))
	}
	if r.Status == device.RejectOpen {
		fmt.Fprintln(a.out, "  open: resubmit, restore or discard it")
		return
	}
	fmt.Fprintf(a.out, "  %s at %s\n", r.Status, r.Handled.Local().Format(time.DateTime))
}

func joinInts(l []int64) string {
	s := make([]string, len(l))
	for i, n := range l {
		s[i] = strconv.FormatInt(n, 10)
	}
	return strings.Join(s, ", ")
}

// sameValue tells that two images agree in a column, or that one of them does not have it.
func sameValue(a, b map[string]*string, name string) bool {
	x, ok1 := a[name]
	y, ok2 := b[name]
	switch {
	case a == nil || b == nil:
		return false
	case !ok1 || !ok2:
		return true
	case x == nil || y == nil:
		return x == y
	}
	return *x == *y
}

// withPartners adds the open entries of the transactions that the given ones belong to.
func withPartners(ctx context.Context, d *device.Device, entries []int64) ([]int64, error) {
	out := slices.Clone(entries)
	for _, n := range entries {
		r, err := d.Rejected(ctx, n)
		if err != nil {
			return nil, err
		}
		out = append(out, r.Partner...)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// printHandled tells what an action did.
func (a *app) printHandled(l []device.Handled, f format, path string) error {
	if f != "table" {
		return printRows(a.out, f, l, nil)
	}
	edits := 0
	for _, h := range l {
		what := "nothing to change"
		switch {
		case h.Edited:
			edits++
			what = "the row is changed"
		case h.Status == device.RejectDiscarded:
			what = "the row is left as it is"
		}
		if len(h.Skipped) > 0 {
			what += "; no longer in the table: " + strings.Join(h.Skipped, ", ")
		}
		fmt.Fprintf(a.out, "%d  %s: %s\n", h.Entry, h.Status, clean(what))
	}
	if edits > 0 {
		a.say("next: waystage device sync --file %s", path)
	}
	return nil
}

func newDeviceResubmit(a *app, path *string) *cobra.Command {
	var f format
	var values, nulls []string
	var whole bool
	c := &cobra.Command{Use: "resubmit ENTRY...", Short: "Put what a rejected edit changed on the row as it is now", Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.completeEntry(path),
		Long: `Put what a rejected edit changed on the row as it is now, with other values where --set says so. All entries or none.
Of an update only the columns that it changed are written. An insert of a key that exists wants another key (--set), a delete of a row that is gone
has nothing to do, an update of a row that is gone is refused (restore inserts it again). So is one of a row that has another edit of the same column
without an outcome. Entries of one transaction travel together again.`,
		RunE: func(c *cobra.Command, args []string) error {
			entries, err := entryArgs(args)
			if err != nil {
				return err
			}
			set := map[string]*string{}
			for _, s := range values {
				name, v, ok := strings.Cut(s, "=")
				if !ok || name == "" {
					return usage("--set wants COLUMN=VALUE, not %q", s)
				}
				set[name] = &v
			}
			for _, n := range nulls {
				if _, twice := set[n]; twice {
					return usage("column %s has both --set and --null", n)
				}
				set[n] = nil
			}
			if len(set) > 0 && (len(entries) > 1 || whole) {
				return usage("--set and --null are for one entry alone")
			}
			return a.withDevice(c.Context(), *path, false, "nothing was resubmitted", func(d *device.Device) error {
				if whole {
					if entries, err = withPartners(c.Context(), d, entries); err != nil {
						return err
					}
				}
				l, err := d.Resubmit(c.Context(), set, entries...)
				if err != nil {
					return err
				}
				return a.printHandled(l, f, *path)
			})
		}}
	c.Flags().StringArrayVar(&values, "set", nil, "COLUMN=VALUE: another value, as PostgreSQL writes it; may be given often")
	c.Flags().StringArrayVar(&nulls, "null", nil, "COLUMN: make it NULL; may be given often")
	c.Flags().BoolVar(&whole, "transaction", false, "with all open entries of the same transaction")
	withOutput(c, &f)
	return c
}

func newDeviceRestore(a *app, path *string) *cobra.Command {
	var f format
	var whole bool
	c := &cobra.Command{Use: "restore ENTRY...", Short: "Make a row again what the rejected edit had made of it", Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.completeEntry(path),
		Long: `Make rows again what the rejected edits had made of them: every column that was sent, whatever others have written since; a row that is gone
is inserted again. All entries or none. Refused where a row has another edit without an outcome.`,
		RunE: func(c *cobra.Command, args []string) error {
			entries, err := entryArgs(args)
			if err != nil {
				return err
			}
			return a.withDevice(c.Context(), *path, false, "nothing was restored", func(d *device.Device) error {
				if whole {
					if entries, err = withPartners(c.Context(), d, entries); err != nil {
						return err
					}
				}
				l, err := d.Restore(c.Context(), entries...)
				if err != nil {
					return err
				}
				return a.printHandled(l, f, *path)
			})
		}}
	c.Flags().BoolVar(&whole, "transaction", false, "with all open entries of the same transaction")
	withOutput(c, &f)
	return c
}

func newDeviceDiscard(a *app, path *string) *cobra.Command {
	var f format
	var filter deviceRejectFilter
	var all bool
	c := &cobra.Command{Use: "discard [ENTRY...]", Short: "Mark rejected records as dealt with", ValidArgsFunction: a.completeEntry(path),
		Long: `Mark rejected records as dealt with: the ones named, or with --all every open one that matches the filters. They are kept for a while, and can
be resubmitted or restored until then.`,
		Args: func(c *cobra.Command, args []string) error {
			switch {
			case all && len(args) > 0:
				return usage("name entries, or give --all and filters")
			case !all && (filter.table != "" || filter.reason != "" || filter.since != ""):
				return usage("filters go with --all")
			case !all && len(args) == 0:
				return usage("name entries, or give --all")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			entries, err := entryArgs(args)
			if err != nil {
				return err
			}
			filter.status = device.RejectOpen
			chosen, err := filter.filter()
			if err != nil {
				return err
			}
			return a.withDevice(c.Context(), *path, false, "nothing was discarded", func(d *device.Device) error {
				if all {
					l, err := d.RejectLog(c.Context(), chosen)
					if err != nil {
						return err
					}
					for _, r := range l {
						entries = append(entries, r.Entry)
					}
				}
				l, err := d.Discard(c.Context(), entries...)
				if err != nil {
					return err
				}
				if len(l) == 0 && f == "table" {
					a.say("no open entry matches")
				}
				return a.printHandled(l, f, *path)
			})
		}}
	c.Flags().BoolVar(&all, "all", false, "every open entry that matches the filters")
	filter.flags(c)
	withOutput(c, &f)
	return c
}
