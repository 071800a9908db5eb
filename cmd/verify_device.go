package cmd

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
)

// deviceCheck is what a device found when it last compared a set with the mirror.
type deviceCheck struct {
	User      string          `json:"user"`
	Device    string          `json:"device"`
	Set       string          `json:"set"`    // empty: the device has never verified
	At        *time.Time      `json:"at"`     // by the device's clock
	Told      *time.Time      `json:"told"`   // by the server's
	Cursor    string          `json:"cursor"` // of the reply that was verified
	Rows      int64           `json:"rows"`
	Different int64           `json:"different"`
	Repaired  int64           `json:"repaired"`
	More      bool            `json:"more"`
	Asked     bool            `json:"asked"` // it has been asked since and has not told yet
	Sample    json.RawMessage `json:"sample"`
}

func (c deviceCheck) state() string {
	switch {
	case c.Set == "":
		return "never verified"
	case c.Different > c.Repaired:
		return "different"
	case c.Different > 0:
		return "repaired"
	}
	return "equal"
}

// checkedDevices reads the last verifications of all enrolled devices, or of those of a user or name.
func checkedDevices(ctx context.Context, mirror *pgxpool.Pool, user, name string) ([]deviceCheck, error) {
	rows, err := mirror.Query(ctx, `SELECT d.user_name, d.name, coalesce(k.set_name, ''), k.checked_at, k.told_at, coalesce(k.cursor, ''), coalesce(k.rows, 0), coalesce(k.different, 0),
			coalesce(k.repaired, 0), coalesce(k.more, false), coalesce(d.verify_asked_at > coalesce(k.told_at, '-infinity'), false), coalesce(k.sample, '[]')::text
		FROM waystage.device d LEFT JOIN waystage.device_check k ON k.device_id = d.id
		WHERE d.public_key IS NOT NULL AND ($1 = '' OR d.user_name = $1) AND ($2 = '' OR d.name = $2) ORDER BY 1, 2, 3`, user, name)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (c deviceCheck, err error) {
		var sample string
		err = row.Scan(&c.User, &c.Device, &c.Set, &c.At, &c.Told, &c.Cursor, &c.Rows, &c.Different, &c.Repaired, &c.More, &c.Asked, &sample)
		c.Sample = json.RawMessage(sample)
		return c, err
	})
}

// verifyDevices asks devices to verify, waits for them if that is wanted, and shows what they found.
func (a *app) verifyDevices(ctx context.Context, mirror *pgxpool.Pool, user, name string, wait time.Duration, f format) error {
	tag, err := mirror.Exec(ctx, `UPDATE waystage.device SET verify_asked_at = clock_timestamp() WHERE public_key IS NOT NULL AND NOT blocked
		AND ($1 = '' OR user_name = $1) AND ($2 = '' OR name = $2)`, user, name)
	if err != nil {
		return err
	}
	if tag.RowsAffected() == 0 {
		return &failure{code: exitPrecondition, what: "there is no such device", where: user + "/" + name, remedy: "'waystage devices ls' lists them"}
	}
	var list []deviceCheck
	open := 0
	for deadline := time.Now().Add(wait); ; {
		if list, err = checkedDevices(ctx, mirror, user, name); err != nil {
			return err
		}
		open = 0
		for _, c := range list {
			if c.Asked {
				open++
			}
		}
		if open == 0 || !time.Now().Before(deadline) {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
	err = printRows(a.out, f, list, []column[deviceCheck]{
		{"device", func(c deviceCheck) string { return c.User + "/" + c.Device }},
		{"set", func(c deviceCheck) string { return c.Set }},
		{"state", deviceCheck.state},
		{"verified", func(c deviceCheck) string { return ago(c.Told) }},
		{"rows", func(c deviceCheck) string { return strconv.FormatInt(c.Rows, 10) }},
		{"different", func(c deviceCheck) string { return strconv.FormatInt(c.Different, 10) }},
		{"repaired", func(c deviceCheck) string { return strconv.FormatInt(c.Repaired, 10) }},
		{"asked", func(c deviceCheck) string {
			if c.Asked {
				return "waits for its next sync"
			}
			return ""
		}},
	})
	if err != nil {
		return err
	}
	different := 0
	for _, c := range list {
		if c.state() != "different" {
			continue
		}
		different++
		if f != "table" {
			continue
		}
		var sample []protocol.Difference
		if err := json.Unmarshal(c.Sample, &sample); err != nil {
			return err
		}
		for i, d := range sample {
			if i == 10 {
				break
			}
			fmt.Fprintf(a.out, "\n%s/%s: %s, key %s: %s%s\n", c.User, c.Device, clean(d.Table), clean(joinKey(d.Key)), d.Kind, columnNames(d.Columns))
		}
	}
	switch {
	case different > 0:
		a.say("%d of %d sets differ; on the device: waystage device verify --repair", different, len(list))
		return silent(exitDiffers)
	case open > 0 && wait > 0:
		a.say("%d of %d have not verified within %s: they do with their next sync", open, len(list), span(wait))
		return silent(exitPrecondition)
	case open > 0:
		a.say("%d devices verify with their next sync; look again with the same command, or wait with --wait", open)
	}
	return nil
}

func columnNames(names []string) string {
	text := ""
	for i, n := range names {
		if text += ", "; i == 0 {
			text = ", columns "
		}
		text += clean(n)
	}
	return text
}

func newDeviceVerify(a *app, path *string) *cobra.Command {
	var f format
	var o device.VerifyOptions
	var values bool
	c := &cobra.Command{Use: "verify", Short: "Sync, and compare the rows of the file with the server's", Args: cobra.NoArgs,
		Long: `Sync, and compare the rows of the file, as the server has sent them, with those that the server has. Edits of yours are no differences.
--repair gives rows that differ what the server has; unsent edits stay. What was found is told to the server.

Values are shown with --values only. Exit code 8 when rows differ and were not repaired.`,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withDevice(c.Context(), *path, false, "cannot verify the file", func(d *device.Device) error {
				l, err := d.Verify(c.Context(), o)
				if err != nil {
					return err
				}
				return a.printVerified(l, f, values)
			})
		}}
	c.Flags().StringSliceVar(&o.Sets, "only", nil, "only this subscription set; may be given often")
	c.Flags().BoolVar(&o.Repair, "repair", false, "give rows that differ what the server has")
	c.Flags().BoolVar(&values, "values", false, "show the values that differ")
	withOutput(c, &f)
	return c
}

func (a *app) printVerified(l []device.Verification, f format, values bool) error {
	var rows, different, repaired int64
	for i := range l {
		rows, different, repaired = rows+l[i].Rows, different+l[i].Different, repaired+l[i].Repaired
		for j := range l[i].Differences {
			for k := range l[i].Differences[j].Columns {
				if col := &l[i].Differences[j].Columns[k]; !values {
					col.Device, col.Server = nil, nil
				}
			}
		}
	}
	if f != "table" {
		if err := printRows(a.out, f, l, nil); err != nil {
			return err
		}
	} else {
		for _, v := range l {
			fmt.Fprintf(a.out, "%s: %d rows, %d different, %d repaired\n", v.Set, v.Rows, v.Different, v.Repaired)
			for _, d := range v.Differences {
				fmt.Fprintf(a.out, "%s, key %s: %s\n", clean(d.Table), clean(joinKey(d.Key)), d.Kind)
				for _, c := range d.Columns {
					if values {
						fmt.Fprintf(a.out, "  column %s: here %s, at the server %s\n", clean(c.Name), shown(c.Device, false), shown(c.Server, false))
					} else {
						fmt.Fprintf(a.out, "  column %s\n", clean(c.Name))
					}
				}
			}
		}
	}
	switch {
	case different == 0:
		a.say("file and server are equal: %d rows", rows)
	case repaired == different:
		a.say("%d rows of %d differed and were repaired", different, rows)
	default:
		a.say("%d rows of %d differ; 'waystage device verify --repair' gives them what the server has", different, rows)
		return silent(exitDiffers)
	}
	return nil
}
