package cmd

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/queue"
)

// recordReceipt is one uploaded record on its way. Times are nil until the thing has happened, or when it is no longer known.
type recordReceipt struct {
	ID           *int64     `json:"id"` // number in the ledger, from the merge on
	Table        string     `json:"table"`
	Key          []*string  `json:"key"`
	Op           string     `json:"op"`
	User         string     `json:"user"`
	Device       string     `json:"device"`
	Session      string     `json:"session"`
	Index        int        `json:"index"`
	Unit         int64      `json:"unit,omitempty"`
	State        string     `json:"state"` // staged, merged, applied, rejected, refused
	Received     *time.Time `json:"received_at"`
	Staged       *time.Time `json:"staged_at"`
	Merged       *time.Time `json:"merged_at"`                 // or rejected by the merge
	Version      string     `json:"version,omitempty"`         // that the merge gave to the mirror's row
	Decided      *time.Time `json:"decided_at"`                // when the mirror had the final outcome
	Applied      *time.Time `json:"applied_at"`                // commit at the source
	Position     string     `json:"source_position,omitempty"` // end of that transaction in the source's log
	Code         string     `json:"code,omitempty"`
	Detail       string     `json:"detail,omitempty"`
	Constraint   string     `json:"constraint,omitempty"`
	Winner       string     `json:"winner,omitempty"`
	Policy       string     `json:"policy,omitempty"`        // the conflict policy that took it although somebody else had changed the row
	Against      string     `json:"against,omitempty"`       // and who that was
	Sent         image      `json:"sent,omitempty"`          // what the device sent, where a function had something else written
	Overwrote    image      `json:"overwrote,omitempty"`     // taken by a policy at the source: what stood there
	Stood        image      `json:"stood,omitempty"`         // rejected, or taken by a policy: what stood in the mirror
	RightVersion string     `json:"right_version,omitempty"` // and its version
	Replied      *time.Time `json:"told_at"`                 // when the reply that tells this state was made
	ToldIn       string     `json:"told_in,omitempty"`       // session of that reply
	Confirmed    *time.Time `json:"confirmed_at"`            // when the device was known to have applied it
}

// sessionRow is one session on its way.
type sessionRow struct {
	Session  string     `json:"session"`
	User     string     `json:"user"`
	Device   string     `json:"device"`
	Set      string     `json:"set,omitempty"`
	State    string     `json:"state"` // received, staged, merged, replied, closed, refused
	Records  int        `json:"records"`
	Pages    int        `json:"pages"`
	Received *time.Time `json:"received_at"`
	Staged   *time.Time `json:"staged_at"`
	Merged   *time.Time `json:"merged_at"`
	Replied  *time.Time `json:"replied_at"`
	Closed   *time.Time `json:"closed_at"`
	Refused  *time.Time `json:"refused_at"`
	Code     string     `json:"code,omitempty"` // refused
	Message  string     `json:"message,omitempty"`
	Times    int        `json:"times,omitempty"` // refused so often
	Parts    string     `json:"parts,omitempty"` // received: "2 of 3", what the input queue has of a series
}

// receiptFilter chooses records or sessions.
type receiptFilter struct {
	user, device, session, table, state, since, until string
	key                                               []string
	record                                            int64
	limit                                             int
}

func (f *receiptFilter) flags(a *app, c *cobra.Command, states []string) {
	c.Flags().StringVar(&f.user, "user", "", "of this user; @operator: what operators submitted")
	c.Flags().StringVar(&f.device, "device", "", "of this device")
	c.Flags().StringVar(&f.session, "session", "", "of this session (incarnation-number, as the device's log has it)")
	c.Flags().StringVar(&f.state, "state", "", "in this state: "+strings.Join(states, ", "))
	c.Flags().StringVar(&f.since, "since", "", "received from this time on: 24h, 7d, 2026-01-31 or RFC 3339")
	c.Flags().StringVar(&f.until, "until", "", "received before this time")
	c.Flags().IntVar(&f.limit, "limit", 50, "at most so many, the newest; 0: all")
	_ = c.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(states, cobra.ShellCompDirectiveNoFileComp))
}

// conditions collects SQL conditions and their parameters.
type conditions struct {
	sql  string
	args []any
	err  error
}

func (w *conditions) add(cond string, v any) {
	w.args = append(w.args, v)
	w.sql += " AND " + strings.ReplaceAll(cond, "?", "$"+strconv.Itoa(len(w.args)))
}

func (w *conditions) text(cond, v string) {
	if v != "" {
		w.add(cond, v)
	}
}

func (w *conditions) moment(cond, v string) {
	if v == "" || w.err != nil {
		return
	}
	at, err := moment(v, time.Now())
	if err != nil {
		w.err = usage("%v", err)
		return
	}
	w.add(cond, at)
}

// common adds what records and sessions have in common; s is the session.
func (f *receiptFilter) common(states []string) *conditions {
	w := &conditions{}
	w.text("s.user_name = ?", f.user)
	w.text("s.device_name = ?", f.device)
	w.moment("s.received_at >= ?", f.since)
	w.moment("s.received_at < ?", f.until)
	if f.session != "" {
		if _, _, err := protocol.ParseSession(f.session); err != nil && w.err == nil {
			w.err = usage("%v", err)
		}
		w.add("s.token = ?", f.session)
	}
	if f.state != "" && !slices.Contains(states, f.state) && w.err == nil {
		w.err = usage("--state wants %s, not %q", strings.Join(states, ", "), f.state)
	}
	return w
}

// recordsSQL lists records of the ledger or, when staged, of the staging tables; the newest first. A state is told when a reply's
// snapshot had the transaction that gave it.
func recordsSQL(staged bool) string {
	from := `waystage.change x`
	if staged {
		from = `(SELECT NULL::bigint AS id, g.session_id, NULL::bigint AS device_id, '' AS incarnation, 0 AS n, g.idx, g.tname, g.key, g.op, g.unit, 'staged' AS state,
			0::bigint AS stamp, NULL::timestamptz AS created_at, 0::bigint AS version, NULL::timestamptz AS decided_at, NULL::timestamptz AS source_at, NULL::pg_lsn AS source_end,
			NULL AS code, NULL AS detail, NULL AS constraint_name, NULL AS winner, NULL::jsonb AS resolved, NULL::jsonb AS old, 0::bigint AS old_version FROM waystage.staging g) x`
	}
	return `
	SELECT x.id, x.tname, x.key, x.op, coalesce(s.user_name, ''), coalesce(s.device_name, ''), coalesce(s.token, x.incarnation || '-' || x.n), x.idx, x.unit, x.state,
	       s.received_at, s.staged_at, x.created_at, coalesce(nullif(x.version, 0)::text, ''),
	       x.decided_at, x.source_at, coalesce(x.source_end::text, ''), coalesce(x.code, ''), coalesce(x.detail, ''), coalesce(x.constraint_name, ''),
	       CASE WHEN x.state IN ('rejected', 'refused') THEN coalesce(x.winner, '')
	            WHEN coalesce(x.resolved->'source'->>'policy', x.resolved->'merge'->>'policy') = 'last-writer' THEN s.user_name || '/' || s.device_name ELSE '' END,
	       CASE WHEN x.state IN ('rejected', 'refused') THEN '' ELSE coalesce(x.resolved->'source'->>'policy', x.resolved->'merge'->>'policy', '') END,
	       CASE WHEN x.state NOT IN ('rejected', 'refused') AND x.resolved IS NOT NULL THEN coalesce(x.winner, '') ELSE '' END,
	       x.resolved->'merge'->'sent', nullif(x.resolved->'source'->'stood', 'null'),
	       CASE WHEN x.state IN ('rejected', 'refused') OR x.resolved ? 'merge' THEN x.old END,
	       CASE WHEN (x.state IN ('rejected', 'refused') OR x.resolved ? 'merge') AND x.old IS NOT NULL THEN x.old_version::text ELSE '' END,
	       t.replied_at, coalesce(t.token, ''), t.closed_at
	  FROM ` + from + `
	  LEFT JOIN waystage.session s ON s.id = x.session_id
	  LEFT JOIN LATERAL (SELECT l.replied_at, l.token, l.closed_at FROM waystage.session l
	          WHERE l.device_id = x.device_id AND l.id >= x.session_id AND pg_visible_in_snapshot(x.stamp::text::xid8, l.told)
	          ORDER BY l.id LIMIT 1) t ON true
	 WHERE true`
}

var recordStates = []string{"staged", protocol.Merged, protocol.Applied, protocol.Rejected, protocol.Refused}

func (f *receiptFilter) records(ctx context.Context, db *pgxpool.Pool) ([]recordReceipt, error) {
	w := f.common(recordStates)
	w.text("(x.tname = ? OR split_part(x.tname, '.', 2) = ?)", f.table)
	w.text("x.state = ?", f.state)
	if f.record != 0 {
		w.add("x.id = ?", f.record)
	}
	if len(f.key) > 0 {
		w.add("x.key = ?", f.key)
	}
	if w.err != nil {
		return nil, w.err
	}
	limit := ""
	if f.limit > 0 {
		limit = " LIMIT " + strconv.Itoa(f.limit)
	}
	// Staging first: what is merged meanwhile is found in the ledger, not missed; it may be found in both.
	rows, err := collect[recordReceipt](db.Query(ctx, recordsSQL(true)+w.sql+" ORDER BY x.session_id DESC, x.idx DESC"+limit, w.args...))
	if err != nil {
		return nil, err
	}
	merged, err := collect[recordReceipt](db.Query(ctx, recordsSQL(false)+w.sql+" ORDER BY x.id DESC"+limit, w.args...))
	if err != nil {
		return nil, err
	}
	rows = append(slices.DeleteFunc(rows, func(r recordReceipt) bool {
		return slices.ContainsFunc(merged, func(m recordReceipt) bool { return m.Session == r.Session && m.Index == r.Index })
	}), merged...)
	if f.limit > 0 {
		rows = rows[:min(len(rows), f.limit)]
	}
	return rows, nil
}

var sessionStates = []string{"received", "staged", "merged", "replied", "closed", "refused"}

// sessions lists sessions of the ledger, refusals, and what the input queue has; the newest first.
func (f *receiptFilter) sessions(ctx context.Context, db *pgxpool.Pool, queued func(context.Context) ([]sessionRow, error)) ([]sessionRow, error) {
	w := f.common(sessionStates)
	if w.err != nil {
		return nil, w.err
	}
	sql := `
	SELECT s.* FROM (
		SELECT s.token, s.user_name, s.device_name, s.set_name, CASE WHEN f.refused_at = s.replied_at THEN 'refused' ELSE s.state END AS state,
		       s.records, s.pages, s.received_at, s.staged_at, s.merged_at, s.replied_at, s.closed_at, f.refused_at, coalesce(f.code, ''), coalesce(f.message, ''), coalesce(f.times, 0), ''
		  FROM waystage.session s LEFT JOIN waystage.refusal f ON (f.user_name, f.device_name, f.token) = (s.user_name, s.device_name, s.token)
		UNION ALL
		SELECT f.token, f.user_name, f.device_name, '', 'refused', 0, 0, f.received_at, NULL, NULL, NULL, NULL, f.refused_at, f.code, f.message, f.times, ''
		  FROM waystage.refusal f WHERE NOT EXISTS (SELECT FROM waystage.session s WHERE (s.user_name, s.device_name, s.token) = (f.user_name, f.device_name, f.token))) s
	 WHERE true` + w.sql
	if f.state != "" {
		w.add("s.state = ?", f.state)
		sql = sql[:strings.LastIndex(sql, "WHERE true")] + "WHERE true" + w.sql
	}
	sql += " ORDER BY s.received_at DESC"
	if f.limit > 0 {
		w.args = append(w.args, f.limit)
		sql += " LIMIT $" + strconv.Itoa(len(w.args))
	}
	// The queue first: what leaves it meanwhile is seen in the database, not missed.
	waiting, err := queued(ctx)
	if err != nil {
		return nil, err
	}
	rows, err := collect[sessionRow](db.Query(ctx, sql, w.args...))
	if err != nil {
		return nil, err
	}
	for _, q := range waiting {
		known := slices.ContainsFunc(rows, func(r sessionRow) bool {
			return r.Session == q.Session && r.User == q.User && r.Device == q.Device && r.State != "refused"
		})
		if known || !f.matches(q) {
			continue
		}
		rows = slices.DeleteFunc(rows, func(r sessionRow) bool { return r.Session == q.Session && r.User == q.User && r.Device == q.Device })
		rows = append(rows, q)
	}
	slices.SortStableFunc(rows, func(x, y sessionRow) int { return y.Received.Compare(*x.Received) })
	if f.limit > 0 {
		rows = rows[:min(len(rows), f.limit)]
	}
	return rows, nil
}

// matches applies the filter to what the input queue has.
func (f *receiptFilter) matches(s sessionRow) bool {
	within := true
	for text, ok := range map[string]func(time.Time) bool{
		f.since: func(t time.Time) bool { return !s.Received.Before(t) }, f.until: func(t time.Time) bool { return s.Received.Before(t) },
	} {
		if at, err := moment(text, time.Now()); text != "" && err == nil {
			within = within && ok(at)
		}
	}
	is := func(want, have string) bool { return want == "" || want == have }
	return within && is(f.user, s.User) && is(f.device, s.Device) && is(f.session, s.Session) && is(f.state, s.State)
}

// received lists the sessions of which the input queue holds parts.
func (b *broker) received(ctx context.Context, f *receiptFilter) ([]sessionRow, error) {
	js, err := jetstream.New(b.nc)
	if err != nil {
		return nil, err
	}
	stream, err := js.Stream(ctx, queue.StreamIn)
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", queue.StreamIn, err)
	}
	any := func(s string) string { return cmp.Or(s, "*") }
	if f.user != "" && !protocol.ValidName(f.user) || f.device != "" && !protocol.ValidName(f.device) {
		return nil, nil // no subject can have it
	}
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(strings.Join([]string{"sync.in", any(f.user), any(f.device), any(f.session), "*"}, ".")))
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", queue.StreamIn, err)
	}
	found := map[string]*sessionRow{}
	parts := map[string][2]int{}
	for subject := range info.State.Subjects {
		t := strings.Split(subject, ".")
		if len(t) != 6 {
			continue
		}
		_, total, err := protocol.ParsePart(t[5])
		if err != nil {
			continue
		}
		id := strings.Join(t[2:5], ".")
		if found[id] == nil {
			m, err := stream.GetLastMsgForSubject(ctx, subject)
			if err != nil {
				continue // taken meanwhile
			}
			found[id] = &sessionRow{Session: t[4], User: t[2], Device: t[3], State: "received", Received: &m.Time}
		}
		parts[id] = [2]int{parts[id][0] + 1, total}
	}
	out := []sessionRow{}
	for id, s := range found {
		if p := parts[id]; p[1] > 1 {
			s.Parts = fmt.Sprintf("%d of %d", p[0], p[1])
		}
		out = append(out, *s)
	}
	return out, nil
}

func newReceipts(a *app) *cobra.Command {
	var f, sf receiptFilter
	var out, sout format
	c := &cobra.Command{Use: "receipts", Short: "How far each uploaded record has come, with times; 'receipts sessions' for whole sessions", Args: cobra.NoArgs,
		Long: `How far each uploaded record has come: received, staged, merged, applied at the source, or rejected or refused and why; and when its device
was told. Applied records are kept for retention.ledger, rejected ones for retention.rejects or retention.handled.

A request that is still in the input queue, or was refused as a whole, has no records yet: see 'waystage receipts sessions'.`,
		Example: `  waystage receipts --user amina --since 1h
  waystage receipts --table visit --key 4711 -o json
  waystage receipts --record 815
  waystage receipts sessions --state refused`,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				rows, err := f.records(ctx, mirror)
				if err != nil {
					return err
				}
				if len(rows) == 0 && f.session != "" {
					if list, err := f.sessions(ctx, mirror, a.inputQueue(conf, &f)); err == nil && len(list) == 1 {
						a.say("session %s is %s%s", f.session, list[0].State, because(list[0]))
					}
				}
				if f.record != 0 && len(rows) == 0 {
					return &failure{code: exitPrecondition, what: fmt.Sprintf("there is no record %d", f.record), remedy: "applied records are kept for retention.ledger"}
				}
				if out == "table" && len(rows) == 1 && f.record != 0 {
					return showReceipt(a.out, rows[0])
				}
				return printRows(a.out, out, rows, []column[recordReceipt]{
					{"record", func(r recordReceipt) string {
						if r.ID == nil {
							return ""
						}
						return strconv.FormatInt(*r.ID, 10)
					}},
					{"change", func(r recordReceipt) string { return r.Op + " " + r.Table + " " + joinKey(r.Key) }},
					{"device", func(r recordReceipt) string { return r.User + "/" + r.Device }},
					{"state", func(r recordReceipt) string { return r.State }},
					{"reason", func(r recordReceipt) string { return cmp.Or(r.Code, r.Policy) }},
					{"received", func(r recordReceipt) string { return ago(r.Received) }},
					{"merged", func(r recordReceipt) string { return after(r.Received, r.Merged) }},
					{"applied", func(r recordReceipt) string { return after(r.Received, r.Applied) }},
					{"told", func(r recordReceipt) string { return after(r.Received, r.Replied) }},
				})
			})
		}}
	f.flags(a, c, recordStates)
	c.Flags().StringVar(&f.table, "table", "", "of this table (schema.table, or the name alone)")
	c.Flags().StringArrayVar(&f.key, "key", nil, "of the row with this primary key; once for each key column, in key order")
	c.Flags().Int64Var(&f.record, "record", 0, "the record with this number, in full")
	_ = c.RegisterFlagCompletionFunc("key", cobra.NoFileCompletions)
	_ = c.RegisterFlagCompletionFunc("record", cobra.NoFileCompletions)
	a.completeFilter(c)
	withOutput(c, &out)

	sessions := &cobra.Command{Use: "sessions", Short: "How far each session has come, also those in the input queue and those refused as a whole", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				rows, err := sf.sessions(ctx, mirror, a.inputQueue(conf, &sf))
				if err != nil {
					return err
				}
				return printRows(a.out, sout, rows, []column[sessionRow]{
					{"session", func(s sessionRow) string { return s.Session }},
					{"device", func(s sessionRow) string { return s.User + "/" + s.Device }},
					{"set", func(s sessionRow) string { return s.Set }},
					{"state", func(s sessionRow) string { return s.State + because(s) }},
					{"records", func(s sessionRow) string { return strconv.Itoa(s.Records) }},
					{"pages", func(s sessionRow) string { return strconv.Itoa(s.Pages) }},
					{"received", func(s sessionRow) string { return ago(s.Received) }},
					{"merged", func(s sessionRow) string { return after(s.Received, s.Merged) }},
					{"replied", func(s sessionRow) string { return after(s.Received, s.Replied) }},
				})
			})
		}}
	sf.flags(a, sessions, sessionStates)
	a.completeFilter(sessions)
	withOutput(sessions, &sout)
	c.AddCommand(sessions)
	return c
}

// inputQueue asks the broker for what waits in the input queue; without a broker that part is left out, and said so.
func (a *app) inputQueue(conf Config, f *receiptFilter) func(context.Context) ([]sessionRow, error) {
	return func(ctx context.Context) ([]sessionRow, error) {
		b, err := a.broker(ctx, conf)
		if err == nil {
			defer b.close()
			var rows []sessionRow
			if rows, err = b.received(ctx, f); err == nil {
				return rows, nil
			}
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		a.say("the broker does not answer, so what waits in the input queue is not shown: %s", oneLine(rootCause(err)))
		return nil, nil
	}
}

// because explains a session's state where that is more than a word.
func because(s sessionRow) string {
	switch {
	case s.State == "refused":
		return ": " + s.Code + ", " + shorten(s.Message, 80)
	case s.Parts != "":
		return ", " + s.Parts + " parts"
	}
	return ""
}

// after prints how long something took since it began.
func after(from, to *time.Time) string {
	if to == nil || from == nil {
		return ""
	}
	return "+" + span(to.Sub(*from))
}

// showImage is an image in one line.
func showImage(m image) string {
	var out []string
	for _, name := range sortedKeys(m) {
		out = append(out, name+"="+cell(m, name))
	}
	return strings.Join(out, ", ")
}

// showReceipt prints a record's way, a line for each step.
func showReceipt(w io.Writer, r recordReceipt) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	words := map[string]string{"I": "insert into", "U": "update of", "D": "delete from"}
	fmt.Fprintf(tw, "record\t%d\t\nchange\t%s %s, key %s\t\ndevice\t%s/%s, session %s, record %d\t\nstate\t%s\t\n",
		*r.ID, words[r.Op], r.Table, clean(joinKey(r.Key)), r.User, r.Device, r.Session, r.Index, r.State)
	step := func(name string, at *time.Time, more string) {
		if at != nil {
			fmt.Fprintf(tw, "%s\t%s  %s\t%s\n", name, at.Local().Format(time.DateTime+".000"), after(r.Received, at), clean(more))
		}
	}
	version := ""
	if r.Version != "" {
		version = "version " + r.Version
	}
	step("received", r.Received, "in the input queue")
	step("staged", r.Staged, "")
	if r.State == protocol.Rejected {
		step("rejected", r.Decided, r.Code+": "+r.Detail)
	} else {
		step("merged", r.Merged, version)
	}
	if r.Policy != "" {
		fmt.Fprintf(tw, "policy\t%s\tagainst the change of %s\n", r.Policy, clean(r.Against))
		for i, img := range []image{r.Stood, r.Overwrote, r.Sent} {
			if len(img) > 0 {
				fmt.Fprintf(tw, "%s\t%s\t\n", []string{"stood", "overwrote", "sent"}[i], clean(showImage(img)))
			}
		}
	}
	if r.State == protocol.Refused {
		step("refused", r.Decided, r.Code+": "+r.Detail)
	}
	step("applied", r.Applied, "at the source, position "+r.Position)
	if r.State == protocol.Applied {
		step("known", r.Decided, "in the mirror")
	}
	step("told", r.Replied, "in the reply to session "+r.ToldIn)
	step("confirmed", r.Confirmed, "the device has it")
	return tw.Flush()
}
