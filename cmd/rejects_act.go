package cmd

import (
	"context"
	"errors"
	"fmt"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/stages"
)

// actChunk is how many records one transaction acts on.
const actChunk = 500

// chosen are the records that a command acts on: named, or all that a filter matches.
type chosen struct {
	rejectFilter
	all, yes, dryRun bool
	as, note         string
	format           format
}

func (s *chosen) flags(a *app, c *cobra.Command) {
	s.rejectFilter.flags(a, c, -1, "open")
	c.Flags().BoolVar(&s.all, "all", false, "all records that the filter matches")
	c.Flags().BoolVar(&s.dryRun, "dry-run", false, "say how many records match, and do nothing")
	c.Flags().BoolVar(&s.yes, "yes", false, "do not ask")
	c.Flags().StringVar(&s.as, "as", "", "login that the log of actions names (default: yours on this machine)")
	_ = c.RegisterFlagCompletionFunc("as", cobra.NoFileCompletions)
	withOutput(c, &s.format)
}

// actor is the login that acts.
func (s *chosen) actor() (string, error) {
	if s.as != "" {
		if !protocol.ValidName(s.as) {
			return "", usage("--as wants 1 to 64 of a-z, 0-9, '_' and '-', not %q", s.as)
		}
		return s.as, nil
	}
	who, err := user.Current()
	if err != nil {
		return "", &failure{code: exitUsage, what: "cannot tell who you are", err: err, remedy: "name yourself with --as"}
	}
	return loginName(who.Username), nil
}

// loginName makes a name that we can keep of a login of the machine ("DOMAIN\Jane.Doe").
func loginName(login string) string {
	if i := strings.LastIndexByte(login, '\\'); i >= 0 {
		login = login[i+1:]
	}
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '_' || r == '-' {
			return r
		}
		return '-'
	}, strings.ToLower(login))
	if name == "" {
		return "unknown"
	}
	return name[:min(len(name), 64)]
}

// ids reads or finds the records; what the command line says against itself is refused.
func (s *chosen) ids(ctx context.Context, mirror *pgxpool.Pool, args []string) ([]int64, error) {
	switch {
	case len(args) > 0 && (s.all || s.given()):
		return nil, usage("give numbers of records, or a filter with --all, not both")
	case len(args) == 0 && !s.all:
		return nil, usage("give numbers of records, or --all for all that the filter matches")
	}
	var ids []int64
	for _, arg := range args {
		id, err := strconv.ParseInt(arg, 10, 64)
		if err != nil || id < 1 {
			return nil, usage("want the number of a rejected record, not %q", arg)
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	if len(args) > 0 {
		return ids, nil
	}
	conds, params, err := s.where(0)
	if err != nil {
		return nil, err
	}
	rows, err := mirror.Query(ctx, "SELECT r.id FROM waystage.reject r WHERE true"+conds+" ORDER BY r.id", params...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[int64])
}

// act chooses records, asks, and acts in chunks; do acts on some and returns what became of them. stop ends it between
// chunks, with what was done so far.
func (a *app) act(ctx context.Context, conf Config, mirror *pgxpool.Pool, s *chosen, args []string, verb string,
	act func(o *stages.Operator, b *broker, ids []int64) ([]stages.Attempt, error)) error {
	name, err := s.actor()
	if err != nil {
		return err
	}
	ids, err := s.ids(ctx, mirror, args)
	if err != nil {
		return err
	}
	records := fmt.Sprintf("%d records", len(ids))
	if len(ids) == 1 {
		records = "1 record"
	}
	if s.dryRun {
		a.say("%s would be %s", records, verb)
		return printRows(a.out, s.format, dryRun(ids), []column[dry]{{"record", func(d dry) string { return strconv.FormatInt(d.Record, 10) }}})
	}
	if s.all && len(ids) > 0 {
		if err := a.confirm(s.yes, records+" will be "+verb, strconv.Itoa(len(ids))); err != nil {
			return err
		}
	}
	o, err := stages.NewOperator(mirror, name)
	if err != nil {
		return err
	}
	b, berr := a.broker(ctx, conf) // only to wake the merge: it also looks by itself
	if berr == nil {
		defer b.close()
	} else {
		b = nil
	}
	p := a.progress("records "+verb, "records", int64(len(ids)))
	var done []stages.Attempt
	for todo := ids; len(todo) > 0 && err == nil; {
		n := min(len(todo), actChunk)
		var list []stages.Attempt
		list, err = act(o, b, todo[:n])
		// Later ones of a row come after the merge of the earlier, by which they are based on its outcome.
		var later []int64
		for _, one := range list {
			if one.Later {
				later = append(later, one.Record)
				continue
			}
			done = append(done, one)
		}
		todo = append(later, todo[n:]...)
		p.set(int64(len(done)), int64(len(ids)))
	}
	p.stop()
	return errors.Join(a.attempts(s, done, verb), err)
}

type dry struct {
	Record int64 `json:"record"`
}

func dryRun(ids []int64) []dry {
	out := make([]dry, len(ids))
	for i, id := range ids {
		out[i].Record = id
	}
	return out
}

// attempts prints what became of the records; the exit code tells the worst of it.
func (a *app) attempts(s *chosen, list []stages.Attempt, verb string) error {
	slices.SortFunc(list, func(x, y stages.Attempt) int { return int(x.Record - y.Record) })
	count := map[string]int{}
	for _, one := range list {
		count[one.State]++
	}
	if err := printRows(a.out, s.format, list, []column[stages.Attempt]{
		{"record", func(t stages.Attempt) string { return strconv.FormatInt(t.Record, 10) }},
		{"state", func(t stages.Attempt) string { return t.State }},
		{"became", func(t stages.Attempt) string {
			if t.Result == 0 {
				return ""
			}
			return strconv.FormatInt(t.Result, 10)
		}},
		{"reason", func(t stages.Attempt) string { return string(t.Problem) + string(t.Code) }},
		{"because", func(t stages.Attempt) string { return shorten(t.Detail, 100) }},
	}); err != nil {
		return err
	}
	var words []string
	for _, state := range []string{protocol.Applied, stages.AttemptDiscarded, protocol.Merged, stages.AttemptStaged, protocol.Rejected, protocol.Refused, stages.AttemptFailed} {
		if n := count[state]; n > 0 {
			words = append(words, fmt.Sprintf("%d %s", n, state))
		}
	}
	if len(words) == 0 {
		words = []string{"no record matches"}
	}
	a.say("%s: %s", verb, strings.Join(words, ", "))
	switch {
	case count[protocol.Rejected]+count[protocol.Refused] > 0:
		return silent(exitRejected)
	case count[stages.AttemptFailed] > 0:
		return silent(exitPrecondition)
	case count[stages.AttemptStaged]+count[protocol.Merged] > 0:
		a.say("not all outcomes are known yet: 'waystage rejects show' tells them later; is the server running, and no pool paused?")
		return silent(exitUnreachable)
	}
	return nil
}

func newRetry(a *app) *cobra.Command {
	var s chosen
	var opt stages.RetryOptions
	var set, null []string
	var wait Duration
	c := &cobra.Command{Use: "retry ID... | --all [filter]", Short: "Submit rejected records again, based on the rows as they stand now",
		ValidArgsFunction: a.completeRecord,
		Long: `Submit rejected records again, based on the rows as they stand now, as an operator's own change: staging, merge, source.
An update sends only the columns that the device had changed, so what others changed meanwhile in other columns stays. Should
somebody change a row between, its record is rejected again. The device sees the outcome as a change by somebody else.

Exit code 0: all applied. 3: some were rejected or refused again. 6: some could not be submitted. 5: some outcomes are not known
yet. With several of these, the first named.`,
		Example: `  waystage rejects retry 4711
  waystage rejects retry 4711 --set weight=71.5 --null remarks
  waystage rejects retry --all --reason source_constraint --since 7d --note "region 9 exists now"`,
		RunE: func(c *cobra.Command, args []string) error {
			opt.Values = map[string]*string{}
			for _, kv := range set {
				name, v, ok := strings.Cut(kv, "=")
				if !ok || name == "" {
					return usage("--set wants column=value, not %q", kv)
				}
				opt.Values[name] = &v
			}
			for _, name := range null {
				if opt.Values[name] != nil {
					return usage("column %s cannot be set and null", name)
				}
				opt.Values[name] = nil
			}
			for _, name := range opt.Omit {
				if _, ok := opt.Values[name]; ok {
					return usage("column %s cannot be given and omitted", name)
				}
			}
			if len(opt.Values)+len(opt.Omit) > 0 && (s.all || len(args) > 1) {
				return usage("--set, --null and --omit correct one record; give its number alone")
			}
			if wait < 0 {
				return usage("--wait must not be negative")
			}
			opt.Note = s.note
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				return a.act(ctx, conf, mirror, &s, args, "retried", func(o *stages.Operator, b *broker, ids []int64) ([]stages.Attempt, error) {
					list, err := o.Retry(ctx, ids, opt)
					if err != nil {
						return nil, err
					}
					if b != nil {
						_ = b.nc.Publish("ws.kick."+stages.StageMerge, nil)
					}
					if err := o.Await(ctx, list, false, time.Duration(wait)); err != nil {
						return list, err
					}
					// Without its predecessor's merge a later record of the same row would only be rejected.
					for i := range list {
						if list[i].Later && slices.ContainsFunc(list, func(t stages.Attempt) bool { return t.State == stages.AttemptStaged }) {
							list[i].Later = false
						}
					}
					return list, nil
				})
			})
		}}
	s.flags(a, c)
	c.Flags().StringArrayVar(&set, "set", nil, "column=value: send this value (PostgreSQL text); may be given often")
	c.Flags().StringArrayVar(&null, "null", nil, "column: send null; may be given often")
	c.Flags().StringArrayVar(&opt.Omit, "omit", nil, "column: do not send it; may be given often")
	c.Flags().BoolVar(&opt.AsInsert, "as-insert", false, "an update whose row is gone inserts the whole row, as the device had it")
	c.Flags().BoolVar(&opt.AsUpdate, "as-update", false, "an insert whose row exists updates it")
	c.Flags().StringVar(&s.note, "note", "", "words for the log of actions")
	wait = Duration(15 * time.Second)
	c.Flags().Var(&durationFlag{&wait}, "wait", "how long to wait for merge and source, per 500 records")
	return c
}

func newDiscard(a *app) *cobra.Command {
	var s chosen
	c := &cobra.Command{Use: "discard ID... | --all [filter]", Short: "Mark rejected records as handled: what the device wanted stays undone",
		ValidArgsFunction: a.completeRecord,
		Example: `  waystage rejects discard 4711 --note "entered by the office"
  waystage rejects discard --all --user amina --reason duplicate_row --yes`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.withMirror(c.Context(), func(ctx context.Context, conf Config, mirror *pgxpool.Pool) error {
				return a.act(ctx, conf, mirror, &s, args, "discarded", func(o *stages.Operator, _ *broker, ids []int64) ([]stages.Attempt, error) {
					return o.Discard(ctx, ids, s.note)
				})
			})
		}}
	s.flags(a, c)
	c.Flags().StringVar(&s.note, "note", "", "why, for the log of actions")
	return c
}

// durationFlag is a Duration as a flag.
type durationFlag struct{ d *Duration }

func (f *durationFlag) String() string {
	if f.d == nil {
		return ""
	}
	return f.d.String()
}
func (f *durationFlag) Type() string       { return "duration" }
func (f *durationFlag) Set(s string) error { return f.d.UnmarshalText([]byte(s)) }
