package cmd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/hours"
	"github.com/waystage/waystage/protocol"
)

func newDevice(a *app) *cobra.Command {
	c := &cobra.Command{Use: "device", Short: "Keep a SQLite file in step with a server"}
	var path string
	c.PersistentFlags().StringVarP(&path, "file", "f", "", "the device's SQLite file")
	_ = c.MarkPersistentFlagFilename("file", "db", "sqlite")
	c.AddCommand(newEnrol(a, &path), newSync(a, &path), newDeviceStatus(a, &path), newDeviceLog(a, &path), newDeviceSyncs(a, &path),
		newDeviceRejects(a, &path), newPending(a, &path), newKeep(a, &path), newDeviceBuiltFor(a, &path), newRepair(a, &path), newDeviceVerify(a, &path), newDeviceFiles(a, &path), newRotate(a, &path))
	return c
}

// withDevice opens the file, which must exist unless it is to be enrolled, and gives the library's errors their codes.
func (a *app) withDevice(ctx context.Context, path string, fresh bool, what string, do func(d *device.Device) error) error {
	if path == "" {
		return usage("name the device's SQLite file with --file")
	}
	if _, err := os.Stat(path); err != nil && !fresh {
		return &failure{code: exitPrecondition, what: what, where: path, err: bare(err), remedy: "'waystage device enrol' makes the file"}
	}
	d, err := device.Open(ctx, path, device.Options{App: "waystage " + version})
	if err == nil {
		err = errors.Join(do(d), d.Close())
	}
	if err == nil {
		return nil
	}
	var f *failure
	var s silent
	if errors.As(err, &f) || errors.As(err, &s) {
		return err
	}
	return &failure{code: deviceCode(err), what: what, where: path, err: errors.New(strings.ReplaceAll(err.Error(), "device: ", "")), remedy: deviceRemedy(err)}
}

func deviceCode(err error) int {
	switch {
	case errors.Is(err, device.ErrLogin), errors.Is(err, device.ErrBlocked), errors.Is(err, device.ErrToken):
		return exitAuth
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	case errors.Is(err, device.ErrUnreachable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, device.ErrInUse):
		return exitUnreachable
	case errors.Is(err, device.ErrNotEnrolled), errors.Is(err, device.ErrSyncing), errors.Is(err, device.ErrNoReject), errors.Is(err, device.ErrHandled),
		errors.Is(err, device.ErrRowGone), errors.Is(err, device.ErrRowExists), errors.Is(err, device.ErrRowEdited), errors.Is(err, device.ErrNoTable):
		return exitPrecondition
	case errors.Is(err, device.ErrNoColumn):
		return exitUsage
	case errors.Is(err, device.ErrCapture):
		return exitAttention
	}
	return exitFailed
}

func deviceRemedy(err error) string {
	switch {
	case errors.Is(err, device.ErrBlocked):
		return "ask the operator: 'waystage devices unblock USER/DEVICE' lets the device go on where it stopped"
	case errors.Is(err, device.ErrToken):
		return "ask the operator for another token: 'waystage devices token USER/DEVICE'"
	case errors.Is(err, device.ErrInUse):
		return "two copies of the file are in use: enrol one of them as a device of its own, from a new file; if the other has stopped, sync again in some seconds"
	case errors.Is(err, device.ErrLogin):
		return "check user and password, token or JWT; enrol again if the device was removed or reset; the operator sees the reason in 'waystage devices show'; if it is none of these, sync again later: edits are kept in the file"
	case errors.Is(err, device.ErrDisk):
		return "make room; the next sync goes on with the files where this one stopped"
	case errors.Is(err, device.ErrFiles):
		return "the next sync goes on with the files where this one stopped; 'waystage device files ls' shows what is missing"
	case errors.Is(err, device.ErrUnreachable):
		return "edits are kept in the file; sync again later, it goes on where it stopped"
	case errors.Is(err, device.ErrNotEnrolled):
		return "run 'waystage device enrol' first"
	case errors.Is(err, device.ErrNoReject):
		return "see 'waystage device rejects ls --state all'"
	case errors.Is(err, device.ErrHandled):
		return "what became of it is in 'waystage device log'"
	case errors.Is(err, device.ErrRowGone):
		return "'waystage device rejects restore' inserts the row again; 'discard' leaves things as they are"
	case errors.Is(err, device.ErrRowExists):
		return "--set gives it another key; 'waystage device rejects restore' writes over the row that is there; 'discard' leaves it"
	case errors.Is(err, device.ErrRowEdited):
		return "sync, and try again when that edit has its outcome; or discard the entry"
	case errors.Is(err, device.ErrNoColumn), errors.Is(err, device.ErrNoTable):
		return "'waystage device rejects show' names the columns; 'discard' leaves things as they are"
	case errors.Is(err, device.ErrCapture):
		return "'waystage device repair' installs the triggers anew; edits made while they were missing are overwritten"
	}
	return ""
}

func newSync(a *app, path *string) *cobra.Command {
	var o device.SyncOptions
	var f format
	var s schedule
	var between string
	c := &cobra.Command{Use: "sync", Short: "Send what changed, fetch what changed", Args: cobra.NoArgs,
		Long: `Send what changed in the file, fetch what changed at the server. Cancelled anywhere, the next sync goes on where this one stopped.
With --watch it stays connected and syncs as soon as something waits at the server or was edited in the file; with --every it syncs by the
clock; both until it is interrupted, one sync after the other. Exit code 3: complete, and records were rejected.`,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if o.Wait != protocol.WaitMerge && o.Wait != protocol.WaitSource {
				return usage("--wait wants merge or source, not %q", o.Wait)
			}
			if between != "" {
				if s.between, err = hours.Parse(between); err != nil {
					return usage("--between: %s", err)
				}
			}
			switch {
			case c.Flags().Changed("every") && s.every < time.Second:
				return usage("--every wants a time of a second or more, such as 10m, not %s", s.every)
			case s.watch && s.every == 0:
				s.every = watchEvery
			case s.every == 0 && between != "":
				return usage("--between goes with --every or --watch")
			case s.every == 0:
				return a.sync(c.Context(), *path, o, f)
			}
			return a.syncBy(c.Context(), *path, o, f, s)
		}}
	c.Flags().StringVar(&o.Wait, "wait", protocol.WaitMerge, "what the reply waits for: merge, or source (bounded) for the source's verdict")
	c.Flags().StringSliceVar(&o.Sets, "only", nil, "only this subscription set; may be given often")
	c.Flags().BoolVarP(&s.watch, "watch", "w", false, "stay connected, and sync when something waits at the server or was edited, until interrupted")
	c.Flags().DurationVar(&s.every, "every", 0, "sync again after this time, until interrupted; with --watch: at the latest (default "+span(watchEvery)+")")
	c.Flags().StringVar(&between, "between", "", "with --every or --watch: only at these hours, e.g. 09:00-22:00")
	withOutput(c, &f)
	return c
}

// sync runs one sync and prints its report.
func (a *app) sync(ctx context.Context, path string, o device.SyncOptions, f format) error {
	return a.withDevice(ctx, path, false, "the sync is not complete", func(d *device.Device) error {
		var p *progress
		var label string
		o.Progress = func(g device.Progress) {
			if g.Total <= 0 || f != "table" {
				return
			}
			if l := strings.TrimSpace(g.Set + " " + g.Stage); p == nil || l != label {
				if p != nil {
					p.stop()
				}
				label, p = l, a.progress(l, map[string]string{device.StageUpload: "bytes", device.StageDownload: "pages", device.StageApply: "rows"}[g.Stage], g.Total)
			}
			p.set(g.Done, g.Total)
		}
		rep, err := d.Sync(ctx, o)
		if p != nil {
			p.stop()
		}
		if f != "table" {
			if perr := printOne(a.out, f, rep); perr != nil {
				return errors.Join(err, perr)
			}
		} else if err == nil {
			a.printReport(rep)
		}
		if err != nil {
			return err
		}
		if rep.Files.Rejected > 0 {
			a.say("%d changes of files were rejected: waystage device files log --file %s", rep.Files.Rejected, path)
		}
		if rep.Rejected == 0 && rep.Files.Rejected > 0 {
			return silent(exitRejected)
		}
		if rep.Rejected > 0 {
			a.say("%d records were rejected: waystage device rejects ls --file %s", rep.Rejected, path)
			return silent(exitRejected)
		}
		return nil
	})
}

func (a *app) printReport(r device.Report) {
	for _, s := range r.Sets {
		notes := ""
		if !s.ClosedUntil.IsZero() {
			fmt.Fprintf(a.out, "%s: %s\n", s.Set, closedUntil(s.ClosedUntil))
			continue
		}
		if s.Resumed {
			notes += ", resumed"
		}
		if s.Refresh {
			notes += ", all rows"
		}
		if s.More {
			notes += "; verdicts are still open, they come with a later sync"
		}
		fmt.Fprintf(a.out, "%s: sent %d, merged %d, applied %d, rejected %d; received %d rows, removed %d (%s up, %s down, %s%s)\n",
			s.Set, s.Sent, s.Merged, s.Applied, s.Rejected, s.Rows, s.Deleted, human(s.BytesUp), human(s.BytesDown), span(s.Duration), notes)
	}
	if len(r.Nothing) > 0 {
		fmt.Fprintf(a.out, "nothing to do: %s\n", strings.Join(r.Nothing, ", "))
	}
	if n := r.Files; n.Fetched+n.Sent+n.Missing > 0 {
		fmt.Fprintf(a.out, "files: fetched %d (%s), sent %d, rejected %d; %d are still to be fetched\n", n.Fetched, human(n.Bytes), n.Sent, n.Rejected, n.Missing)
	}
	if r.NewKey {
		a.say("note: the device has a new key")
	}
	if r.KeyProblem != "" {
		a.say("note: the key was due to be changed, and was not; the next sync tries again: %s", oneLine(r.KeyProblem))
	}
	if r.Forked {
		a.say("note: the file goes on under a new incarnation (it was restored from a backup or copied, the operator has reset the device, or the mirror was made anew); its edits were kept. " +
			"If another copy of it is in use, enrol that one as a device of its own, from a new file")
	}
}

func closedUntil(t time.Time) string {
	return "the server does not sync it at this time; it opens at " + t.Local().Format("2006-01-02 15:04")
}

func newDeviceStatus(a *app, path *string) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "status", Short: "Show how the file stands: sets, rows, edits that are not final", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDevice(c.Context(), *path, false, "cannot read the status", func(d *device.Device) error {
				s, err := d.Status(c.Context())
				if err != nil {
					return err
				}
				if f != "table" {
					return printOne(a.out, f, s)
				}
				who := "not enrolled"
				if s.Enrolled {
					who = s.User + "/" + s.Device + " at " + strings.Join(s.Servers, ", ")
				}
				key := ""
				if s.Fingerprint != "" {
					key = "key: " + s.Fingerprint + " since " + at(&s.KeyAt) + "\n"
				}
				fmt.Fprintf(a.out, "device: %s\n"+key+"edits: %d unsent, %d sent, %d merged and waiting for the source; %d in the rejected log\n", who, s.Unsent, s.Sent, s.Merged, s.Rejects)
				if s.Unfinished {
					fmt.Fprintln(a.out, "the last sync was broken off: the next goes on from there")
				}
				for _, p := range s.Problems {
					fmt.Fprintln(a.out, "problem: "+clean(p))
				}
				type line struct {
					set, table, local, rows, synced string
				}
				var lines []line
				for _, set := range s.Sets {
					at := set.SyncedAt
					for _, t := range set.Tables {
						lines = append(lines, line{set.Name, t.Name, t.Local, strconv.FormatInt(t.Rows, 10), ago(&at)})
					}
					if !set.Closed.IsZero() {
						fmt.Fprintln(a.out, "set "+set.Name+": "+closedUntil(set.Closed))
					}
				}
				if len(lines) == 0 {
					return nil
				}
				fmt.Fprintln(a.out)
				return printRows(a.out, "table", lines, []column[line]{
					{"set", func(l line) string { return l.set }}, {"table", func(l line) string { return l.table }},
					{"in the file", func(l line) string { return l.local }}, {"rows", func(l line) string { return l.rows }},
					{"synced", func(l line) string { return l.synced }}})
			})
		}}
	withOutput(c, &f)
	return c
}

func newPending(a *app, path *string) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "pending", Short: "List edits without a final outcome", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDevice(c.Context(), *path, false, "cannot list the edits", func(d *device.Device) error {
				l, err := d.Pending(c.Context())
				if err != nil {
					return err
				}
				return printRows(a.out, f, l, []column[device.Edit]{
					{"table", func(e device.Edit) string { return e.Table }},
					{"op", func(e device.Edit) string { return e.Op }},
					{"key", func(e device.Edit) string { return joinKey(e.Key) }},
					{"state", func(e device.Edit) string { return e.State }},
					{"since", func(e device.Edit) string {
						if e.Since.IsZero() {
							return ""
						}
						return ago(&e.Since)
					}},
				})
			})
		}}
	withOutput(c, &f)
	return c
}

func newRepair(a *app, path *string) *cobra.Command {
	var yes bool
	c := &cobra.Command{Use: "repair", Short: "Install damaged capture triggers anew and fetch all rows with the next sync", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDevice(c.Context(), *path, false, "cannot repair the file", func(d *device.Device) error {
				if err := a.confirm(yes, "Edits made while the triggers were missing will be overwritten by what the server has", "repair"); err != nil {
					return err
				}
				if err := d.Repair(c.Context()); err != nil {
					return err
				}
				a.say("the triggers are installed; next: waystage device sync --file %s", *path)
				return nil
			})
		}}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}
