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

var receiptStates = []string{device.Unsent, device.Sent, device.Received, device.Staged, protocol.Merged, protocol.Applied, protocol.Rejected, protocol.Refused}

func newDeviceLog(a *app, path *string) *cobra.Command {
	var f format
	var o device.LogFilter
	var since string
	var follow bool
	c := &cobra.Command{Use: "log", Short: "Show what has become of each edit: unsent, sent, received, staged, merged, applied, or rejected and why", Args: cobra.NoArgs,
		Long: `Show what has become of each edit, unsent ones first, then the newest session first. The states of a record, in their order:
  unsent    no session carries it
  sent      in a session; whether that has arrived is not known
  received  in the server's queue
  staged    in the server's staging tables: the merge will decide
  merged    in the mirror; the source has not answered yet
  applied   at the source: final
  rejected  by the merge or the device, refused by the source: final, and in the rejected log
Times are those at which the device was told. With --follow it goes on, and prints each record again when its state changes.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.State != "" && !slices.Contains(receiptStates, o.State) {
				return usage("--state wants one of %s, not %q", strings.Join(receiptStates, ", "), o.State)
			}
			if since != "" {
				at, err := moment(since, time.Now())
				if err != nil {
					return usage("%v", err)
				}
				o.Since = at
			}
			if follow && f == "json" {
				return usage("--follow prints a stream: use -o ndjson")
			}
			return a.withDevice(c.Context(), *path, false, "cannot read the log", func(d *device.Device) error {
				l, err := d.Log(c.Context(), o)
				if err != nil {
					return err
				}
				if !follow {
					return printRows(a.out, f, l, receiptColumns)
				}
				return a.followLog(c.Context(), d, o, f, l)
			})
		}}
	c.Flags().StringVar(&o.Table, "table", "", "of this table (schema.table)")
	c.Flags().StringVar(&o.State, "state", "", "in this state")
	c.Flags().StringVar(&since, "since", "", "heard of from this time on: 24h, 7d, 2026-01-31 or RFC 3339")
	c.Flags().IntVar(&o.Limit, "limit", 50, "at most so many; 0: all")
	c.Flags().BoolVar(&follow, "follow", false, "go on until interrupted")
	_ = c.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(receiptStates, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("since", cobra.FixedCompletions([]string{"1h", "24h", "7d", "30d"}, cobra.ShellCompDirectiveNoFileComp))
	withOutput(c, &f)
	return c
}

var receiptColumns = []column[device.Receipt]{
	{"state", func(r device.Receipt) string { return r.State }},
	{"since", func(r device.Receipt) string { return receiptTime(r).Local().Format(time.DateTime) }},
	{"table", func(r device.Receipt) string { return r.Table }},
	{"op", func(r device.Receipt) string { return r.Op }},
	{"key", func(r device.Receipt) string { return joinKey(r.Key) }},
	{"session", func(r device.Receipt) string { return r.Session }},
	{"why", func(r device.Receipt) string {
		if r.Policy != "" {
			return "merged with others' changes, conflict policy " + r.Policy
		}
		if r.Code == "" {
			return ""
		}
		why := fmt.Sprintf("%s: %s", r.Code, r.Detail)
		if r.Entry != 0 {
			why = fmt.Sprintf("entry %d, %s; %s", r.Entry, r.Handling, why)
		}
		return shorten(why, 100)
	}},
}

// receiptTime is when a record came to its state.
func receiptTime(r device.Receipt) (at time.Time) {
	for _, t := range []time.Time{r.Edited, r.Frozen, r.Received, r.Staged, r.Merged, r.Final} {
		if !t.IsZero() {
			at = t
		}
	}
	return at
}

// followLog prints records whenever their state changes, the oldest first, until it is interrupted.
func (a *app) followLog(ctx context.Context, d *device.Device, o device.LogFilter, f format, l []device.Receipt) error {
	if f == "table" {
		f = "" // line by line, without heads
	}
	told := map[string]string{}
	for {
		for _, r := range slices.Backward(l) {
			id := fmt.Sprintf("%s/%d %s %s", r.Session, r.Index, r.Table, joinKey(r.Key))
			if now := r.State + r.Handling; told[id] != now {
				told[id] = now
				if f == "ndjson" {
					if err := printOne(a.out, f, r); err != nil {
						return err
					}
					continue
				}
				cells := make([]string, len(receiptColumns))
				for i, c := range receiptColumns {
					cells[i] = clean(c.cell(r))
				}
				fmt.Fprintln(a.out, strings.Join(cells, "  "))
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
		var err error
		if l, err = d.Log(ctx, o); err != nil {
			return err
		}
	}
}

func newDeviceSyncs(a *app, path *string) *cobra.Command {
	var f format
	var limit int
	c := &cobra.Command{Use: "syncs", Short: "Show the last syncs, the newest first", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDevice(c.Context(), *path, false, "cannot read the log of syncs", func(d *device.Device) error {
				l, err := d.Syncs(c.Context())
				if err != nil {
					return err
				}
				if limit > 0 && len(l) > limit {
					l = l[:limit]
				}
				number := func(get func(device.Report) int) func(device.Report) string {
					return func(r device.Report) string { return strconv.Itoa(get(r)) }
				}
				return printRows(a.out, f, l, []column[device.Report]{
					{"started", func(r device.Report) string { return r.Started.Local().Format(time.DateTime) }},
					{"took", func(r device.Report) string { return span(r.Duration) }},
					{"sent", number(func(r device.Report) int { return r.Sent })},
					{"applied", number(func(r device.Report) int { return r.Applied })},
					{"rejected", number(func(r device.Report) int { return r.Rejected })},
					{"received", number(func(r device.Report) int { return int(r.Rows) })},
					{"error", func(r device.Report) string { return shorten(r.Error, 80) }},
				})
			})
		}}
	c.Flags().IntVar(&limit, "limit", 20, "at most so many; 0: all")
	withOutput(c, &f)
	return c
}

// newKeep shows and changes how long the file keeps its logs.
func newKeep(a *app, path *string) *cobra.Command {
	var f format
	var rejects, receipts Duration
	var syncs int
	c := &cobra.Command{Use: "keep", Short: "Show or change how long the file keeps its logs", Args: cobra.NoArgs,
		Long: `Show or change how long the file keeps its logs. Rejected records that nobody has dealt with stay for ever.`,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDevice(c.Context(), *path, false, "cannot change what is kept", func(d *device.Device) error {
				r, err := d.Retention(c.Context())
				if err != nil {
					return err
				}
				changed := false
				for flag, set := range map[string]func(){
					"rejects":  func() { r.Rejects = time.Duration(rejects) },
					"receipts": func() { r.Receipts = time.Duration(receipts) },
					"syncs":    func() { r.Syncs = syncs },
				} {
					if c.Flags().Changed(flag) {
						set()
						changed = true
					}
				}
				if changed {
					if r.Rejects <= 0 || r.Receipts <= 0 || r.Syncs <= 0 {
						return usage("nothing can be kept for no time: give more than 0")
					}
					if err := d.SetRetention(c.Context(), r); err != nil {
						return err
					}
				}
				if f != "table" {
					return printOne(a.out, f, map[string]any{"rejects": r.Rejects.String(), "receipts": r.Receipts.String(), "syncs": r.Syncs})
				}
				fmt.Fprintf(a.out, "rejected records that were dealt with: %s\nreceipts of final records: %s\nreports of syncs: %d\n", span(r.Rejects), span(r.Receipts), r.Syncs)
				return nil
			})
		}}
	c.Flags().TextVar(&rejects, "rejects", Duration(0), "rejected records that were dealt with, e.g. 30d")
	c.Flags().TextVar(&receipts, "receipts", Duration(0), "what became of records, from when it was final, e.g. 30d")
	c.Flags().IntVar(&syncs, "syncs", 0, "so many reports of syncs")
	for _, n := range []string{"rejects", "receipts"} {
		_ = c.RegisterFlagCompletionFunc(n, cobra.FixedCompletions([]string{"7d", "30d", "90d", "365d"}, cobra.ShellCompDirectiveNoFileComp))
	}
	withOutput(c, &f)
	return c
}
