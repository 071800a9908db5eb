package cmd

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/verify"
)

// verifyFlags are the flags of verify.
type verifyFlags struct {
	o        verify.Options
	noMarker bool
	values   bool
	devices  bool
	user     string
	device   string
}

func newVerify(a *app) *cobra.Command {
	var f format
	var v verifyFlags
	c := &cobra.Command{Use: "verify", Short: "Compare mirror and source, and name every row and column in which they differ", Args: cobra.NoArgs,
		Long: `Compare every synced table at the source with the mirror, by hashes of ranges, in short statements that only read. What is on its way
is looked at again when the mirror has passed it: a row is called different only if it stays so. Runs beside a serving system.

With --devices it asks devices to compare their files with the mirror at their next sync, and shows what they last found; with --wait it waits for them.

Values are shown with --values only: they may be personal data. See docs/verify.md.
Exit codes: 0 equal, 8 something differs, 6 something could not be decided (the mirror is behind, a table is stopped).`,
		RunE: func(c *cobra.Command, _ []string) error {
			if v.o.Chunk < 0 || v.o.Rate < 0 || v.o.Most < 0 || v.o.Pause < 0 || v.o.Timeout < 0 || v.o.Wait < 0 {
				return usage("--chunk, --rate, --limit, --pause, --timeout and --wait cannot be negative")
			}
			if !v.devices && v.user+v.device != "" {
				return usage("--user and --device go with --devices")
			}
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				if v.devices {
					wait := time.Duration(0)
					if c.Flags().Changed("wait") {
						wait = v.o.Wait
					}
					return a.verifyDevices(ctx, mirror, v.user, v.device, wait, f)
				}
				return a.verify(ctx, conf, mirror, v, f)
			})
		}}
	c.Flags().StringSliceVar(&v.o.Tables, "table", nil, "only this table (schema.table); may be given often")
	c.Flags().IntVar(&v.o.Chunk, "chunk", 20_000, "rows that one statement reads, about")
	c.Flags().IntVar(&v.o.Rate, "rate", 0, "rows a second that are read on each side at most; 0: as fast as they come")
	c.Flags().DurationVar(&v.o.Pause, "pause", 0, "pause between two statements")
	c.Flags().DurationVar(&v.o.Timeout, "timeout", 30*time.Second, "of one statement; one that takes longer is tried again on fewer rows")
	c.Flags().DurationVar(&v.o.Wait, "wait", time.Minute, "how long the mirror may take to pass what was read at the source; with --devices how long to wait for them (default: not)")
	c.Flags().BoolVar(&v.devices, "devices", false, "instead, ask devices to compare their files with the mirror, and show what they last found")
	c.Flags().StringVar(&v.user, "user", "", "with --devices: only this user's")
	c.Flags().StringVar(&v.device, "device", "", "with --devices: only those of this name")
	c.Flags().IntVar(&v.o.Most, "limit", 100, "rows to name for each table at most")
	c.Flags().BoolVar(&v.values, "values", false, "show the values that differ")
	c.Flags().BoolVar(&v.noMarker, "no-marker", false, "write nothing at all: on an idle source, wait for its next change instead of making one in waystage.progress")
	withOutput(c, &f)
	return c
}

// verify compares and prints.
func (a *app) verify(ctx context.Context, conf Config, mirror *pgxpool.Pool, v verifyFlags, f format) error {
	source, err := openPool(ctx, "source", conf.Source.DSN, 2)
	if err != nil {
		return err
	}
	defer source.Close()
	o := v.o
	o.Source, o.Mirror, o.Marker = source, mirror, !v.noMarker
	var p *progress
	table := ""
	o.Progress = func(g verify.Progress) {
		if p == nil || g.Table != table {
			if p != nil {
				p.stop()
			}
			table, p = g.Table, a.progress(g.Table, "rows", g.Total)
		}
		p.set(g.Done, g.Total)
	}
	rep, err := verify.Compare(ctx, o)
	if p != nil {
		p.stop()
	}
	if err != nil {
		return verifyFailure(err)
	}
	if rep.Values = v.values; !v.values {
		hideValues(rep)
	}
	if f != "table" {
		err = printOne(a.out, f, rep)
	} else {
		err = a.printVerify(rep, v.values)
	}
	if err != nil {
		return err
	}
	return a.verifyOutcome(rep)
}

func verifyFailure(err error) error {
	var unknown *verify.UnknownTableError
	switch {
	case errors.As(err, &unknown):
		return usage("%s", unknown.Error())
	case errors.Is(err, schema.ErrNotSetUp), errors.Is(err, verify.ErrCopying):
		return &failure{code: exitPrecondition, what: "there is nothing to compare yet", err: err, remedy: "start 'waystage serve' and wait until it is ready"}
	}
	return err
}

// hideValues leaves the names of the columns only.
func hideValues(r *verify.Report) {
	for i := range r.Tables {
		for j := range r.Tables[i].Rows {
			for k := range r.Tables[i].Rows[j].Columns {
				c := &r.Tables[i].Rows[j].Columns[k]
				c.Source, c.Mirror = nil, nil
			}
		}
	}
}

func (a *app) printVerify(r *verify.Report, values bool) error {
	count := func(get func(verify.TableReport) int64) func(verify.TableReport) string {
		return func(t verify.TableReport) string { return strconv.FormatInt(get(t), 10) }
	}
	err := printRows(a.out, "table", r.Tables, []column[verify.TableReport]{
		{"table", func(t verify.TableReport) string { return t.Table }},
		{"state", func(t verify.TableReport) string { return t.State }},
		{"source", count(func(t verify.TableReport) int64 { return t.SourceRows })},
		{"mirror", count(func(t verify.TableReport) int64 { return t.MirrorRows })},
		{"in flight", count(func(t verify.TableReport) int64 { return t.InFlight })},
		{"different", func(t verify.TableReport) string {
			if t.More {
				return strconv.FormatInt(t.Different, 10) + " or more"
			}
			return strconv.FormatInt(t.Different, 10)
		}},
		{"undecided", count(func(t verify.TableReport) int64 { return t.Undecided })},
		{"why", func(t verify.TableReport) string { return oneLine(t.Why) }},
	})
	if err != nil {
		return err
	}
	kinds := map[string]string{verify.MissingInMirror: "missing in the mirror", verify.MissingInSource: "missing at the source", verify.ValuesDiffer: "different"}
	for _, t := range r.Tables {
		for _, row := range t.Rows {
			pending := ""
			if row.Pending {
				pending = " (base of pending changes)"
			}
			key := make([]*string, len(row.Key))
			for i := range row.Key {
				key[i] = &row.Key[i]
			}
			fmt.Fprintf(a.out, "\n%s, key %s: %s%s\n", clean(t.Table), clean(joinKey(key)), kinds[row.Kind], pending)
			if row.Kind == verify.ValuesDiffer || values {
				for _, c := range row.Columns {
					if !values {
						fmt.Fprintf(a.out, "  column %s\n", clean(c.Name))
						continue
					}
					fmt.Fprintf(a.out, "  column %s: source %s, mirror %s\n", clean(c.Name), shown(c.Source, row.Kind == verify.MissingInSource), shown(c.Mirror, row.Kind == verify.MissingInMirror))
				}
			}
		}
	}
	for _, c := range r.Checks {
		if c.Count > 0 {
			fmt.Fprintf(a.out, "\n%s: %d times: %s\n  e.g. %s\n", c.Name, c.Count, c.What, clean(strings.Join(c.Sample, "; ")))
		}
	}
	return nil
}

// shown prints a value for a person.
func shown(v *string, absent bool) string {
	switch {
	case absent:
		return "-"
	case v == nil:
		return "NULL"
	}
	return shorten(strconv.Quote(*v), 120)
}

// verifyOutcome says in a line and by the exit code what was found.
func (a *app) verifyOutcome(r *verify.Report) error {
	var rows, different, undecided int64
	for _, t := range r.Tables {
		rows, different, undecided = rows+t.MirrorRows, different+t.Different, undecided+t.Undecided
	}
	broken := 0
	for _, c := range r.Checks {
		if c.Count > 0 {
			broken++
		}
	}
	took := span(r.Took)
	switch {
	case r.Different():
		a.say("%d rows of %d differ, %d checks failed (%s)", different, rows, broken, took)
		return silent(exitDiffers)
	case r.Err() != nil:
		return &failure{code: codeOf(r.Err()), what: "not everything could be compared", err: r.Err(), remedy: "the roles of source.dsn and mirror.dsn must be able to read every row of the table"}
	case !r.Complete():
		a.say("no difference found, but not everything could be decided: %d rows (%s)", undecided, took)
		return silent(exitPrecondition)
	}
	a.say("mirror and source are equal: %d tables, %d rows (%s)", len(r.Tables), rows, took)
	return nil
}

// codeOf is the exit code of an error that is not the whole command's.
func codeOf(err error) int {
	if code := exitCode(err); code != exitFailed {
		return code
	}
	return exitPrecondition
}
