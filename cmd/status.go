package cmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/internal/health"
	"github.com/waystage/waystage/schema"
)

func newStatus(a *app) *cobra.Command {
	var f format
	c := &cobra.Command{Use: "status", Short: "Show lag both ways, WAL kept by the slots, queues, sessions and rejects", Args: cobra.NoArgs,
		Long: `Show how the whole system is, as databases and broker know it: it works while no server runs.
Exit code 7 when data needs a person: a slot that is lost or missing, a part that stands still, a stopped table.`,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				source, err := openPool(ctx, "source", conf.Source.DSN, 2)
				if err != nil {
					return err
				}
				defer source.Close()
				broker, brokerErr := a.broker(ctx, conf)
				var queues func(context.Context) ([]health.Queue, error)
				if brokerErr == nil {
					defer broker.close()
					queues = broker.queues
				}
				reader := health.NewReader(source, mirror, queues)
				s, err := reader.Read(ctx)
				if err != nil {
					return err
				}
				if s.Down.LagBytes > 0 || s.Up.LagBytes > 0 { // a second look tells how old the backlog is
					select {
					case <-ctx.Done():
						return ctx.Err()
					case <-time.After(500 * time.Millisecond):
					}
					if s, err = reader.Read(ctx); err != nil {
						return err
					}
				}
				if f != "table" {
					err = printOne(a.out, f, s)
				} else {
					err = printStatus(a.out, s, brokerErr)
				}
				if err != nil {
					return err
				}
				return attention(a, conf, s)
			})
		}}
	withOutput(c, &f)
	return c
}

// attention says what a person must look at.
func attention(a *app, c Config, s health.Snapshot) error {
	broken := false
	for name, d := range map[string]health.Direction{"down": s.Down, "up": s.Up} {
		switch {
		case s.Copy == "done" && d.Slot == "" && d.Position != "":
			a.say("attention: the %s slot is missing: changes since %s cannot be read any more", name, d.Position)
			broken = true
		case schema.SlotTrouble(d.SlotStatus, d.SlotReason) != "":
			a.say("attention: the %s slot %s; 'waystage serve --recopy' makes a new one and copies the tables anew (devices keep their changes)",
				name, schema.SlotTrouble(d.SlotStatus, d.SlotReason))
			broken = true
		case c.Retention.WAL > 0 && d.RetainedBytes > int64(c.Retention.WAL):
			a.say("warning: the %s slot holds back %s of WAL", name, human(d.RetainedBytes))
		}
	}
	for _, t := range s.Troubles {
		a.say("attention: %s", clean(t.String()))
		broken = true
	}
	for _, t := range s.Stopped {
		a.say("attention: %s; look with 'waystage schema diff', go on with 'waystage schema apply'", clean(t.String()))
		broken = true
	}
	if s.Files.Lost > 0 {
		a.say("attention: the contents of %d files are lost; 'waystage files check' names them, 'waystage files sync' or 'put' brings them back", s.Files.Lost)
		broken = true
	}
	if broken {
		return silent(exitAttention)
	}
	return nil
}

func printStatus(w io.Writer, s health.Snapshot, brokerErr error) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(tw, "mirror\tepoch %s, %d tables, initial copy %s\n", orDash(s.Epoch), s.Tables, s.Copy)
	direction := func(name string, d health.Direction) {
		if d.Slot == "" {
			fmt.Fprintf(tw, "%s\tno slot\n", name)
			return
		}
		state := "no capture reads it"
		if d.SlotActive {
			state = "active"
		}
		fmt.Fprintf(tw, "%s\tlag %s, %s; last applied %s; slot %s (%s, %s) keeps %s of WAL\n", name, human(d.LagBytes),
			span(time.Duration(d.LagSeconds*float64(time.Second))), ago(d.AppliedAt), d.Slot, state, orDash(d.SlotStatus), human(d.RetainedBytes))
	}
	direction("source to mirror", s.Down)
	direction("mirror to source", s.Up)
	for _, t := range s.Troubles {
		fmt.Fprintf(tw, "%s\tSTANDS STILL: %s (first seen %s, last %s by %s)\n", t.Part, t.Code, ago(&t.Since), ago(&t.At), clean(t.Process))
	}
	for _, t := range s.Stopped {
		fmt.Fprintf(tw, "table %s\tSTOPPED: %s since %s, %d records wait\n", clean(t.Table), t.Code, ago(&t.Since), t.Waiting)
	}
	fmt.Fprintf(tw, "pending\t%d records wait for the source's verdict%s\n", s.Pending.Records, oldest(s.Pending.OldestSeconds))
	fmt.Fprintf(tw, "sessions\t%d wait for merge, %d for reply%s; %d taken\n", s.Sessions.Staged, s.Sessions.Merged, oldest(s.Sessions.OldestSeconds), s.Sessions.Total)
	fmt.Fprintf(tw, "devices\t%d enrolled, %d synced within a day, %d not for 30 days, %d blocked; %d users\n",
		s.Devices.Enrolled, s.Devices.Active, s.Devices.Stale, s.Devices.Blocked, s.Devices.Users)
	if s.Files.Count+s.Files.Uploads > 0 {
		lost := ""
		if s.Files.Lost > 0 {
			lost = fmt.Sprintf("; CONTENT LOST of %d", s.Files.Lost)
		}
		fmt.Fprintf(tw, "files\t%d, %s; %d uploads under way%s\n", s.Files.Count, human(s.Files.Bytes), s.Files.Uploads, lost)
	}
	if len(s.Rejects) == 0 {
		fmt.Fprintf(tw, "rejects\tnone\n")
	}
	for i, code := range slices.Sorted(maps.Keys(s.Rejects)) {
		label := "rejects"
		if i > 0 {
			label = ""
		}
		fmt.Fprintf(tw, "%s\t%d %s\n", label, s.Rejects[code], orDash(code))
	}
	if brokerErr != nil {
		fmt.Fprintf(tw, "queues\tthe broker does not answer: %s\n", oneLine(rootCause(brokerErr)))
	}
	for _, q := range s.Queues {
		fmt.Fprintf(tw, "queue %s\t%d messages, %s%s\n", q.Name, q.Messages, human(int64(q.Bytes)), oldest(q.OldestSeconds))
	}
	fmt.Fprintf(tw, "source server\toldest writing transaction %s\n", span(time.Duration(s.Source.OldestTxSeconds*float64(time.Second))))
	fmt.Fprintf(tw, "mirror server\toldest writing transaction %s\n", span(time.Duration(s.Mirror.OldestTxSeconds*float64(time.Second))))
	return tw.Flush()
}

func oldest(seconds float64) string {
	if seconds <= 0 {
		return ""
	}
	return " (oldest " + span(time.Duration(seconds*float64(time.Second))) + ")"
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// rootCause is the why of a failure without its what.
func rootCause(err error) string {
	var f *failure
	if errors.As(err, &f) && f.err != nil {
		return f.err.Error()
	}
	return err.Error()
}
