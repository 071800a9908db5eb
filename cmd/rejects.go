package cmd

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/protocol"
)

// image is a row as column -> PostgreSQL text; a nil image: there was no row.
type image map[string]*string

// reject is one record of the server's rejected log.
type reject struct {
	ID         int64      `json:"id"`
	At         *time.Time `json:"at"`
	User       string     `json:"user"`
	Device     string     `json:"device"`
	Session    string     `json:"session"` // incarnation-n, as on the device
	Index      int        `json:"index"`   // place in that session
	Table      string     `json:"table"`
	Key        []*string  `json:"key"` // null where the device sent none
	Op         string     `json:"op"`
	State      string     `json:"state"` // rejected by the merge, refused by the source
	Code       string     `json:"code"`
	Detail     string     `json:"detail"`
	Constraint string     `json:"constraint,omitempty"`
	Winner     string     `json:"winner,omitempty"` // who had written what stood there
	Base       image      `json:"base"`             // what the edit was made on
	Sent       image      `json:"sent"`             // what the device sent: changed columns of an update, all of an insert
	Stood      image      `json:"stood"`            // what stood in the mirror
	Unit       int64      `json:"unit,omitempty"`   // number of the device's transaction within the session
	Status     string     `json:"status"`           // open, retried, discarded, superseded, settled
	Actions    []action   `json:"actions"`          // what operators did about it, the oldest first
}

// action is what an operator did about a rejected record.
type action struct {
	At     time.Time `json:"at"`
	Who    string    `json:"who"`
	Action string    `json:"action"` // retry, discard
	Note   string    `json:"note,omitempty"`
	Result *int64    `json:"result,omitempty"` // retry: number of the record that it became, from its merge on
	State  *string   `json:"state,omitempty"`  // and how far that has come
	Code   *string   `json:"code,omitempty"`
}

func (a action) words() string {
	s := a.Action + " by " + a.Who
	switch {
	case a.State == nil && a.Action == "retry":
		s += ": not merged yet"
	case a.State != nil:
		s += fmt.Sprintf(": became record %d, %s", *a.Result, *a.State)
	}
	if a.Code != nil {
		s += " (" + *a.Code + ")"
	}
	if a.Note != "" {
		s += "; " + a.Note
	}
	return s
}

// rejectFilter chooses records of the log.
type rejectFilter struct {
	user, device, table, reason, since, until string
	session                                   string
	unit                                      int64
	status                                    string
	limit                                     int
}

// rejectStatuses are the values of --state.
var rejectStatuses = []string{"open", "retried", "discarded", "superseded", "settled"}

// flags adds the filter's flags to a command; status is the default of --state.
func (f *rejectFilter) flags(a *app, c *cobra.Command, limit int, status string) {
	c.Flags().StringVar(&f.user, "user", "", "of this user")
	c.Flags().StringVar(&f.device, "device", "", "of this device")
	c.Flags().StringVar(&f.table, "table", "", "of this table (schema.table, or the name alone)")
	c.Flags().StringVar(&f.reason, "reason", "", "with this code, e.g. stale_version")
	c.Flags().StringVar(&f.since, "since", "", "from this time on: 24h, 7d, 2026-01-31 or RFC 3339")
	c.Flags().StringVar(&f.until, "until", "", "before this time")
	c.Flags().StringVar(&f.session, "session", "", "of this session (incarnation-number, as 'rejects show' and the device's log have it)")
	c.Flags().Int64Var(&f.unit, "unit", 0, "of this transaction of the device within --session")
	c.Flags().StringVar(&f.status, "state", status, "in this state: "+strings.Join(rejectStatuses, ", ")+" or all")
	if limit >= 0 {
		c.Flags().IntVar(&f.limit, "limit", limit, "at most so many, the newest; 0: all")
	}
	a.completeFilter(c)
	_ = c.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(append(slices.Clone(rejectStatuses), "all"), cobra.ShellCompDirectiveNoFileComp))
}

// given tells whether the filter chooses anything.
func (f *rejectFilter) given() bool {
	return f.user+f.device+f.table+f.reason+f.since+f.until+f.session != "" || f.unit != 0
}

const rejectColumns = `
	SELECT r.id, r.at, r.user_name, r.device_name, r.token, r.idx, r.tname, r.key, r.op, r.state, r.code, r.detail, r.constraint_name, r.winner,
	       r.base, r.img, r.old, r.unit, r.status,
	       coalesce((SELECT jsonb_agg(jsonb_build_object('at', a.at, 'who', a.actor, 'action', a.action, 'note', a.note,
	                   'result', n.id, 'state', n.state, 'code', n.code) ORDER BY a.id)
	          FROM waystage.reject_action a LEFT JOIN waystage.change n ON n.session_id = a.session_id AND n.idx = a.idx WHERE a.record = r.id), '[]')
	  FROM waystage.reject r WHERE true`

// where renders the filter as conditions on waystage.reject, with parameters from $(first+1) on.
func (f *rejectFilter) where(first int) (sql string, args []any, err error) {
	where := func(cond string, v any) {
		args = append(args, v)
		sql += " AND " + strings.ReplaceAll(cond, "?", "$"+strconv.Itoa(first+len(args)))
	}
	for _, c := range []struct{ cond, value string }{
		{"r.user_name = ?", f.user}, {"r.device_name = ?", f.device}, {"(r.tname = ? OR split_part(r.tname, '.', 2) = ?)", f.table}, {"r.code = ?", f.reason},
	} {
		if c.value != "" {
			where(c.cond, c.value)
		}
	}
	for _, c := range []struct{ cond, value string }{{"r.at >= ?", f.since}, {"r.at < ?", f.until}} {
		if c.value == "" {
			continue
		}
		at, err := moment(c.value, time.Now())
		if err != nil {
			return "", nil, usage("%v", err)
		}
		where(c.cond, at)
	}
	if f.session != "" {
		if _, _, err := protocol.ParseSession(f.session); err != nil {
			return "", nil, usage("%v", err)
		}
		where("r.token = ?", f.session)
	}
	switch {
	case f.unit != 0 && f.session == "":
		return "", nil, usage("--unit counts within a session: give --session too")
	case f.unit != 0:
		where("r.unit = ?", f.unit)
	}
	switch {
	case slices.Contains(rejectStatuses, f.status):
		where("r.status = ?", f.status)
	case f.status != "all":
		return "", nil, usage("--state wants %s or all, not %q", strings.Join(rejectStatuses, ", "), f.status)
	}
	return sql, args, nil
}

// query runs the filter; newest first, or oldest first for an export.
func (f *rejectFilter) query(ctx context.Context, db *pgxpool.Pool, oldestFirst bool) (pgx.Rows, error) {
	conds, args, err := f.where(0)
	if err != nil {
		return nil, err
	}
	sql := rejectColumns + conds
	if oldestFirst && f.limit <= 0 {
		return db.Query(ctx, sql+" ORDER BY r.id", args...)
	}
	sql += " ORDER BY r.id DESC"
	if f.limit > 0 {
		args = append(args, f.limit)
		sql += " LIMIT $" + strconv.Itoa(len(args))
	}
	if oldestFirst {
		sql = "SELECT * FROM (" + sql + ") newest ORDER BY 1"
	}
	return db.Query(ctx, sql, args...)
}

// moment reads a point in time: a span before now, a day, or RFC 3339.
func moment(s string, now time.Time) (time.Time, error) {
	var d Duration
	if d.UnmarshalText([]byte(s)) == nil {
		return now.Add(-time.Duration(d)), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04", "2006-01-02 15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is not a time: use 24h, 7d, 2026-01-31 or RFC 3339", s)
}

func newRejects(a *app) *cobra.Command {
	c := &cobra.Command{Use: "rejects", Short: "The log of rejected records: look, try again, discard, export, follow",
		Long: `The log of rejected records. What each reason means and what to do about it: docs/rejects.md.`}
	var f format
	var lsFilter, exFilter rejectFilter
	ls := &cobra.Command{Use: "ls", Short: "List rejected records, the newest first", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, _ Config, mirror *pgxpool.Pool) error {
				rows, err := collect[reject](lsFilter.query(ctx, mirror, false))
				if err != nil {
					return err
				}
				if err := printRows(a.out, f, rows, []column[reject]{
					{"id", func(r reject) string { return strconv.FormatInt(r.ID, 10) }},
					{"when", func(r reject) string { return ago(r.At) }},
					{"device", func(r reject) string { return r.User + "/" + r.Device }},
					{"record", func(r reject) string { return r.Op + " " + r.Table + " " + joinKey(r.Key) }},
					{"reason", func(r reject) string { return r.Code }},
					{"winner", func(r reject) string { return r.Winner }},
					{"state", func(r reject) string { return r.Status }},
				}); err != nil {
					return err
				}
				if f == "table" && len(rows) > 0 {
					a.say("details: waystage rejects show %d", rows[0].ID)
				}
				return nil
			})
		}}
	lsFilter.flags(a, ls, 50, "all")
	withOutput(ls, &f)

	var showFormat format
	show := &cobra.Command{Use: "show ID", Short: "Show one: what was sent, what it was based on, what stood there, who had won, what was done about it",
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeRecord,
		RunE: func(c *cobra.Command, args []string) error {
			id, err := strconv.ParseInt(args[0], 10, 64)
			if err != nil {
				return usage("want the number of a rejected record, not %q", args[0])
			}
			return a.withMirror(c.Context(), func(ctx context.Context, _ Config, mirror *pgxpool.Pool) error {
				rows, err := collect[reject](mirror.Query(ctx, rejectColumns+" AND r.id = $1", id))
				if err != nil {
					return err
				}
				if len(rows) == 0 {
					return &failure{code: exitPrecondition, what: "there is no rejected record " + args[0], remedy: "see 'waystage rejects ls'"}
				}
				if showFormat != "table" {
					return printOne(a.out, showFormat, rows[0])
				}
				return showReject(a.out, rows[0])
			})
		}}
	withOutput(show, &showFormat)

	var kind, file string
	export := &cobra.Command{Use: "export", Short: "Export rejected records, the oldest first", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			write, ok := exporters[kind]
			if !ok {
				return usage("-o wants json, ndjson or csv, not %q", kind)
			}
			return a.withMirror(c.Context(), func(ctx context.Context, _ Config, mirror *pgxpool.Pool) error {
				rows, err := exFilter.query(ctx, mirror, true)
				if err != nil {
					return err
				}
				defer rows.Close()
				n, err := toFile(file, a.out, func(w io.Writer) (int, error) { return write(w, rows) })
				if err != nil {
					return err
				}
				a.say("%d records exported", n)
				return nil
			})
		}}
	exFilter.flags(a, export, 0, "all")
	_ = export.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json", "ndjson", "csv"}, cobra.ShellCompDirectiveNoFileComp))
	export.Flags().StringVarP(&kind, "output", "o", "ndjson", "format: json, ndjson or csv")
	export.Flags().StringVarP(&file, "file", "f", "", "file to write (default stdout)")
	c.AddCommand(ls, show, newRetry(a), newDiscard(a), export, newRejectsWatch(a))
	return c
}

// exporters write rows one by one: an export may be larger than memory.
var exporters = map[string]func(io.Writer, pgx.Rows) (int, error){
	"ndjson": func(w io.Writer, rows pgx.Rows) (int, error) { return exportJSON(w, rows, "", "\n", "") },
	"json":   func(w io.Writer, rows pgx.Rows) (int, error) { return exportJSON(w, rows, "[", ",", "]\n") },
	"csv":    exportCSV,
}

func exportJSON(w io.Writer, rows pgx.Rows, head, between, foot string) (int, error) {
	n := 0
	_, err := io.WriteString(w, head)
	for err == nil && rows.Next() {
		var r reject
		if r, err = pgx.RowToStructByPos[reject](rows); err != nil {
			break
		}
		var b []byte
		if b, err = json.Marshal(r); err != nil {
			break
		}
		if n > 0 && foot != "" {
			b = append([]byte(between), b...)
		} else if foot == "" {
			b = append(b, between...)
		}
		_, err = w.Write(b)
		n++
	}
	if err = errors.Join(err, rows.Err()); err != nil {
		return n, err
	}
	_, err = io.WriteString(w, foot)
	return n, err
}

func exportCSV(w io.Writer, rows pgx.Rows) (int, error) {
	out, n := csv.NewWriter(w), 0
	err := out.Write([]string{"id", "at", "user", "device", "session", "index", "table", "key", "op", "state", "code", "detail", "constraint", "winner", "base", "sent", "stood", "unit", "status", "actions"})
	for err == nil && rows.Next() {
		var r reject
		if r, err = pgx.RowToStructByPos[reject](rows); err != nil {
			break
		}
		at := ""
		if r.At != nil {
			at = r.At.UTC().Format(time.RFC3339Nano)
		}
		line := []string{strconv.FormatInt(r.ID, 10), at, r.User, r.Device, r.Session, strconv.Itoa(r.Index), r.Table, asJSON(r.Key),
			r.Op, r.State, r.Code, r.Detail, r.Constraint, r.Winner, asJSON(r.Base), asJSON(r.Sent), asJSON(r.Stood),
			strconv.FormatInt(r.Unit, 10), r.Status, asJSON(r.Actions)}
		for i, cell := range line { // a spreadsheet would run such a cell as a formula
			if cell != "" && strings.ContainsRune("=+-@\t\r", rune(cell[0])) {
				line[i] = "'" + cell
			}
		}
		err = out.Write(line)
		n++
	}
	out.Flush()
	return n, errors.Join(err, rows.Err(), out.Error())
}

func asJSON(v any) string {
	if m, ok := v.(image); ok && m == nil {
		return ""
	}
	b, err := json.Marshal(v)
	if err != nil {
		return ""
	}
	return string(b)
}

// toFile writes to a file that appears under its name only when it is complete, or to out.
func toFile(name string, out io.Writer, write func(io.Writer) (int, error)) (int, error) {
	if name == "" {
		return write(out)
	}
	f, err := os.OpenFile(name+".part", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, &failure{code: exitUsage, what: "cannot write the file", where: name, err: bare(err)}
	}
	n, err := write(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return n, errors.Join(err, os.Remove(f.Name()))
	}
	return n, os.Rename(f.Name(), name)
}

// showReject prints the images beside one another, the sent columns marked where they differ from the base.
func showReject(w io.Writer, r reject) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	at := "-"
	if r.At != nil {
		at = r.At.Local().Format(time.DateTime)
	}
	words := map[string]string{"I": "insert into", "U": "update of", "D": "delete from"}
	fmt.Fprintf(tw, "record\t%d\nwhen\t%s\ndevice\t%s/%s\nsession\t%s, record %d\nchange\t%s %s, key %s\noutcome\t%s: %s\nbecause\t%s\n",
		r.ID, at, r.User, r.Device, r.Session, r.Index, words[r.Op], r.Table, clean(joinKey(r.Key)), r.State, r.Code, clean(r.Detail))
	if r.Constraint != "" {
		fmt.Fprintf(tw, "constraint\t%s\n", clean(r.Constraint))
	}
	if r.Winner != "" {
		fmt.Fprintf(tw, "winner\t%s\n", clean(r.Winner))
	}
	if r.Unit != 0 {
		fmt.Fprintf(tw, "transaction\t%d of the session\n", r.Unit)
	}
	fmt.Fprintf(tw, "state\t%s\n", r.Status)
	for _, act := range r.Actions {
		fmt.Fprintf(tw, "%s\t%s\n", act.At.Local().Format(time.DateTime), clean(act.words()))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	names := map[string]bool{}
	for _, m := range []image{r.Base, r.Sent, r.Stood} {
		for n := range m {
			names[n] = true
		}
	}
	if len(names) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	tw = tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "COLUMN\tBASED ON\tSENT\tSTOOD THERE")
	for _, n := range slices.Sorted(maps.Keys(names)) {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", clean(n), cell(r.Base, n), cell(r.Sent, n), cell(r.Stood, n))
	}
	return tw.Flush()
}

func joinKey(key []*string) string {
	parts := make([]string, len(key))
	for i, k := range key {
		parts[i] = "null"
		if k != nil {
			parts[i] = *k
		}
	}
	return strings.Join(parts, ", ")
}

func sortedKeys(m map[string]*string) []string { return slices.Sorted(maps.Keys(m)) }

func cell(m map[string]*string, name string) string {
	v, ok := m[name]
	switch {
	case !ok:
		return ""
	case v == nil:
		return "null"
	case len(*v) > 60:
		return clean(strings.ToValidUTF8((*v)[:57], "")) + "..."
	}
	return clean(*v)
}
