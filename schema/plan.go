package schema

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/protocol"
)

// Plan says what would change if definitions came into force.
type Plan struct {
	From    int           `json:"from"`    // version in force
	Changes []PlanChange  `json:"changes"` // of the definitions
	Tables  []PlanTable   `json:"tables"`  // that would be copied, or kept for nobody
	Rows    []PlanRows    `json:"rows"`    // that enter and leave devices
	Files   []PlanFiles   `json:"files"`   // that enter and leave devices
	Refresh []PlanRefresh `json:"refresh"` // sets whose devices get all rows anew
	Built   []PlanBuilt   `json:"built"`   // devices by what their applications were built for
	Uploads []PlanUpload  `json:"uploads"` // records on their way to the merge that would be rejected
	Users   int           `json:"users"`   // for whom something changes
	Devices int           `json:"devices"` // of theirs
	Unsent  int           `json:"unsent"`  // of these, devices that told of unsent changes with their last sync
}

// PlanChange is a difference between two versions of the definitions.
type PlanChange struct {
	Kind   string   `json:"kind"` // subscription, file subscription, set, group
	Name   string   `json:"name"`
	Action string   `json:"action"`         // add, remove, change
	Keys   []string `json:"keys,omitempty"` // of a change: "key: old -> new"
}

// PlanTable is a table that the mirror gets, or that stays without a subscription.
type PlanTable struct {
	Table  string `json:"table"`
	Action string `json:"action"` // copy, keep
	Rows   int64  `json:"rows"`   // the source's or the mirror's estimate; -1: none
}

// How a number of rows was found.
const (
	PlanExact    = "exact"
	PlanEstimate = "estimate" // some users were counted, or the database's statistics
	PlanUnknown  = "unknown"  // not in the time given, or the table is not in the mirror yet
)

// PlanRows is what one table's rows do on the devices of those who have it in these sets before and after.
type PlanRows struct {
	Table   string   `json:"table"`
	Was     string   `json:"was"` // set, empty: none
	Set     string   `json:"set"` // set, empty: none
	Users   int      `json:"users"`
	Devices int      `json:"devices"`
	Enter   int64    `json:"enter"` // rows, summed over devices
	Leave   int64    `json:"leave"`
	How     string   `json:"how"`
	Gained  []string `json:"gained,omitempty"` // columns
	Lost    []string `json:"lost,omitempty"`
}

// PlanRefresh is a set that devices get whole again, because its tables, columns or keys are others.
type PlanRefresh struct {
	Set     string `json:"set"`
	Devices int    `json:"devices"`
}

// PlanUpload counts staged records that would be rejected.
type PlanUpload struct {
	Set     string        `json:"set"`
	Table   string        `json:"table"`
	Op      string        `json:"op"`
	Code    protocol.Code `json:"code"`
	Records int64         `json:"records"`
}

// Empty tells that nothing would change.
func (p *Plan) Empty() bool { return len(p.Changes) == 0 }

// PlanOptions say what [MakePlan] works on.
type PlanOptions struct {
	Source, Mirror *pgx.Conn
	Definitions    *Definitions  // checked, see [Definitions.Examine]
	Tables         []*Table      // of the source, that they were checked against
	Within         time.Duration // for counting rows; what is not counted by then is estimated
}

// MakePlan compares definitions with those in force and changes nothing. Rows are counted in the mirror, as [ReaderRole].
func MakePlan(ctx context.Context, o PlanOptions) (*Plan, error) {
	v, err := LoadVersion(ctx, o.Mirror, 0)
	if err != nil {
		return nil, err
	}
	old, stored, err := LoadDefinitions(ctx, o.Mirror)
	if err != nil {
		return nil, err
	}
	p := &planner{PlanOptions: o, old: old, stored: byFullName(stored), live: byFullName(o.Tables), deadline: time.Now().Add(o.Within),
		out: &Plan{From: v.Number, Changes: difference(old, o.Definitions), Tables: []PlanTable{}, Rows: []PlanRows{}, Files: []PlanFiles{}, Refresh: []PlanRefresh{}, Built: []PlanBuilt{}, Uploads: []PlanUpload{}}}
	if p.out.Empty() {
		return p.out, nil
	}
	for _, step := range []func(context.Context) error{p.tables, p.members, p.built, p.rows, p.countFiles, p.uploads} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return p.out, nil
}

func byFullName(tables []*Table) map[string]*Table {
	out := make(map[string]*Table, len(tables))
	for _, t := range tables {
		out[t.FullName()] = t
	}
	return out
}

// difference lists what differs in what was written.
func difference(old, new *Definitions) []PlanChange {
	out := []PlanChange{}
	type settings []struct{ key, value string }
	compare := func(kind string, was, is []string, of func(d *Definitions, name string) settings) {
		for _, name := range is {
			if !slices.Contains(was, name) {
				out = append(out, PlanChange{Kind: kind, Name: name, Action: "add"})
				continue
			}
			var keys []string
			before, after := of(old, name), of(new, name)
			for i := range after {
				if a, b := before[i].value, after[i].value; a != b {
					keys = append(keys, fmt.Sprintf("%s: %s -> %s", after[i].key, orElse(a, "-"), orElse(b, "-")))
				}
			}
			if keys != nil {
				out = append(out, PlanChange{Kind: kind, Name: name, Action: "change", Keys: keys})
			}
		}
		for _, name := range was {
			if !slices.Contains(is, name) {
				out = append(out, PlanChange{Kind: kind, Name: name, Action: "remove"})
			}
		}
	}
	names := func(d *Definitions) (subs, files, sets, groups []string) {
		for _, s := range d.Subscriptions {
			subs = append(subs, s.Name)
		}
		for _, f := range d.Files {
			files = append(files, f.Name)
		}
		for _, s := range d.Sets {
			sets = append(sets, s.Name)
		}
		for _, g := range d.Groups {
			groups = append(groups, g.Name)
		}
		return subs, files, sets, groups
	}
	oldSubs, oldFiles, oldSets, oldGroups := names(old)
	newSubs, newFiles, newSets, newGroups := names(new)
	compare("subscription", oldSubs, newSubs, func(d *Definitions, name string) settings {
		s := d.subscription(name)
		columns := orElse(strings.Join(s.Columns, ", "), "all")
		return settings{{"table", s.Table}, {"columns", columns}, {"key", s.Key}, {"rows", strings.Join(strings.Fields(s.Rows), " ")}, {"direction", string(s.Direction)},
			{"allow", s.Allow}, {"reject", string(s.Reject)}, {"conflict", strings.TrimSpace(string(s.Conflict) + " " + s.Function)},
			{"file_column", s.FileColumn}, {"file", s.File}}
	})
	compare("file subscription", oldFiles, newFiles, func(d *Definitions, name string) settings {
		f := d.file(name).settings()
		return settings{{"path", f.path}, {"rows", f.rows}, {"upload", strconv.FormatBool(f.upload)}, {"max_size", strconv.FormatInt(f.maxSize, 10)}}
	})
	compare("set", oldSets, newSets, func(d *Definitions, name string) settings {
		s := d.Set(name)
		var between []string
		for _, h := range s.Between {
			between = append(between, h.String())
		}
		return settings{{"subscriptions", strings.Join(s.Subscriptions, ", ")}, {"priority", strconv.Itoa(s.Priority)},
			{"between", strings.Join(between, ", ")}, {"zone", s.Zone}}
	})
	compare("group", oldGroups, newGroups, func(d *Definitions, name string) settings {
		i := slices.IndexFunc(d.Groups, func(g Group) bool { return g.Name == name })
		bandwidth := ""
		if n := d.Groups[i].Bandwidth; n > 0 {
			bandwidth = strconv.FormatInt(n, 10)
		}
		return settings{{"sets", strings.Join(d.Groups[i].Sets, ", ")}, {"bandwidth", bandwidth}}
	})
	return out
}

// planner makes one plan.
type planner struct {
	PlanOptions
	old          *Definitions
	stored, live map[string]*Table // the mirror's and the source's
	deadline     time.Time
	moves        []*move
	files        []*fileMove
	out          *Plan
}

// move is what happens to one table on the devices of some users.
type move struct {
	table    string
	was, set string
	old, new *Subscription // nil: none
	users    int
	owners   []owner // those with devices
	devices  int
}

// owner is a user with devices.
type owner struct {
	Member
	Devices, Unsent int
}

func (p *planner) tables(ctx context.Context) error {
	now := p.Definitions.TableNames()
	rows := func(q Querier, ident string) (n int64, err error) {
		err = q.QueryRow(ctx, "SELECT coalesce((SELECT reltuples::bigint FROM pg_class WHERE oid = to_regclass($1)), -1)", ident).Scan(&n)
		return n, err
	}
	for _, name := range now {
		t := p.live[name]
		if t == nil || p.stored[name] != nil {
			continue
		}
		n, err := rows(p.Source, t.Ident())
		if err != nil {
			return fmt.Errorf("size of %s: %w", name, err)
		}
		p.out.Tables = append(p.out.Tables, PlanTable{Table: name, Action: "copy", Rows: n})
	}
	for _, name := range p.old.TableNames() {
		if t := p.stored[name]; t != nil && !slices.Contains(now, name) {
			n, err := rows(p.Mirror, t.Ident())
			if err != nil {
				return fmt.Errorf("size of %s: %w", name, err)
			}
			p.out.Tables = append(p.out.Tables, PlanTable{Table: name, Action: "keep", Rows: n})
		}
	}
	return nil
}

// members sorts the users by what happens to their tables.
func (p *planner) members(ctx context.Context) error {
	rows, err := p.Mirror.Query(ctx, `SELECT u.name, u.attributes::text, u.groups, count(d.id)::int, count(d.oldest_unsent_at)::int
		FROM waystage.app_user u LEFT JOIN waystage.device d ON d.user_name = u.name WHERE u.name <> $1 GROUP BY u.name ORDER BY u.name`, protocol.OperatorUser)
	if err != nil {
		return fmt.Errorf("list users: %w", err)
	}
	users, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (u owner, err error) {
		return u, row.Scan(&u.Name, &u.Attributes, &u.Groups, &u.Devices, &u.Unsent)
	})
	if err != nil {
		return fmt.Errorf("list users: %w", err)
	}
	type place struct {
		set string
		sub *Subscription
	}
	placesOf := func(d *Definitions, groups []string) map[string]place {
		out := map[string]place{}
		for _, set := range d.SetsFor(groups) {
			for _, s := range d.SubscriptionsOf(set) {
				out[s.Table] = place{set, s}
			}
		}
		return out
	}
	moves := map[string]*move{}
	refreshed := map[string]bool{}
	for _, u := range users {
		before, after := placesOf(p.old, u.Groups), placesOf(p.Definitions, u.Groups)
		touched := p.filesOf(u) || !slices.Equal(p.old.SetsFor(u.Groups), p.Definitions.SetsFor(u.Groups))
		names := slices.Sorted(func(yield func(string) bool) {
			for t := range before {
				if !yield(t) {
					return
				}
			}
			for t := range after {
				if _, both := before[t]; !both && !yield(t) {
					return
				}
			}
		})
		for _, table := range names {
			b, a := before[table], after[table]
			if a.sub != nil && b.sub != nil && a.set == b.set && sameRights(a.sub, b.sub) {
				continue
			}
			touched = true
			id := strings.Join([]string{table, b.set, a.set, nameOf(b.sub), nameOf(a.sub)}, "\x00")
			m := moves[id]
			if m == nil {
				m = &move{table: table, was: b.set, set: a.set, old: b.sub, new: a.sub}
				moves[id] = m
				p.moves = append(p.moves, m)
			}
			m.users++
			if m.devices += u.Devices; u.Devices > 0 {
				m.owners = append(m.owners, u)
			}
		}
		for _, set := range p.Definitions.SetsFor(u.Groups) {
			was, is := p.old.Wire(set, p.tablesOf(p.stored)), p.Definitions.Wire(set, p.Tables)
			if was != nil && is != nil && was.Hash != is.Hash && slices.Contains(p.old.SetsFor(u.Groups), set) {
				refreshed[set] = true
				touched = true
			}
		}
		if touched {
			p.out.Users++
			p.out.Devices += u.Devices
			p.out.Unsent += u.Unsent
		}
	}
	for _, s := range p.Definitions.Sets {
		if refreshed[s.Name] {
			p.out.Refresh = append(p.out.Refresh, PlanRefresh{Set: s.Name})
		}
	}
	slices.SortStableFunc(p.moves, func(a, b *move) int { return strings.Compare(a.table, b.table) })
	return nil
}

func (p *planner) tablesOf(m map[string]*Table) (out []*Table) {
	for _, t := range m {
		out = append(out, t)
	}
	return out
}

func nameOf(s *Subscription) string {
	if s == nil {
		return ""
	}
	return s.Name
}

// sameRights tells whether two versions of a subscription give the same rows and rights.
func sameRights(a, b *Subscription) bool {
	return a.Table == b.Table && slices.Equal(a.Columns, b.Columns) && a.Key == b.Key && a.Rows == b.Rows && a.Direction == b.Direction && a.Allow == b.Allow &&
		a.Reject == b.Reject && a.Conflict == b.Conflict && a.Function == b.Function
}

func (p *planner) rows(ctx context.Context) error {
	for _, m := range p.moves {
		r := PlanRows{Table: m.table, Was: m.was, Set: m.set, Users: m.users, Devices: m.devices, How: PlanExact}
		r.Gained, r.Lost = p.columns(m)
		if err := p.count(ctx, m, &r); err != nil {
			return fmt.Errorf("rows of %s: %w", m.table, err)
		}
		p.out.Rows = append(p.out.Rows, r)
	}
	return nil
}

// columns of a table that devices keep.
func (p *planner) columns(m *move) (gained, lost []string) {
	if m.old == nil || m.new == nil || p.stored[m.table] == nil || p.live[m.table] == nil {
		return nil, nil
	}
	was, is := m.old.ColumnsOf(p.stored[m.table]), m.new.ColumnsOf(p.live[m.table])
	without := func(list, other []Column) (out []string) {
		for _, c := range list {
			if !slices.ContainsFunc(other, func(o Column) bool { return o.Name == c.Name }) {
				out = append(out, c.Name)
			}
		}
		return out
	}
	return without(is, was), without(was, is)
}

// planChunk is how many users' rows are counted by one query.
const planChunk = 50

// planExactRows is the size of a table, by the database's statistics, up to which all of its rows are counted.
const planExactRows = 2_000_000

// count finds how many rows enter and leave.
func (p *planner) count(ctx context.Context, m *move, r *PlanRows) error {
	old, new := m.old, m.new
	if old != nil && !old.Downloads() {
		old = nil
	}
	if new != nil && !new.Downloads() {
		new = nil
	}
	if m.devices == 0 || old == nil && new == nil || old != nil && new != nil && old.Key == new.Key && old.Rows == new.Rows {
		return nil
	}
	t := p.stored[m.table]
	if t == nil {
		r.How = PlanUnknown
		if i := slices.IndexFunc(p.out.Tables, func(t PlanTable) bool { return t.Table == m.table }); i >= 0 && new.Key == "" && p.out.Tables[i].Rows >= 0 {
			r.Enter, r.How = p.out.Tables[i].Rows*int64(m.devices), PlanEstimate
		}
		return nil
	}
	all := func(s *Subscription) bool { return s != nil && s.Key == "" }
	var whole int64
	if all(old) || all(new) {
		n, how, err := p.whole(ctx, t)
		if err != nil || how == PlanUnknown {
			r.How = how
			return err
		}
		whole, r.How = n*int64(m.devices), how
	}
	switch {
	case all(new) && old == nil:
		r.Enter = whole
		return nil
	case all(old) && new == nil:
		r.Leave = whole
		return nil
	}
	enter, leave, how, err := p.keyed(ctx, t, m, old, new)
	if err != nil {
		return err
	}
	if how != PlanExact {
		r.How = how
	}
	if how == PlanUnknown {
		return nil
	}
	switch {
	case all(new):
		r.Enter = max(whole-leave, 0)
	case all(old):
		r.Leave = max(whole-enter, 0)
	default:
		r.Enter, r.Leave = enter, leave
	}
	return nil
}

// whole counts a table's rows.
func (p *planner) whole(ctx context.Context, t *Table) (n int64, how string, err error) {
	err = p.Mirror.QueryRow(ctx, "SELECT reltuples::bigint FROM pg_class WHERE oid = to_regclass($1)", t.Ident()).Scan(&n)
	if err != nil {
		return 0, PlanUnknown, err
	}
	if n > planExactRows {
		return n, PlanEstimate, nil
	}
	estimate := n
	err = p.bounded(ctx, func(tx pgx.Tx) error { return tx.QueryRow(ctx, "SELECT count(*) FROM "+t.Ident()).Scan(&n) })
	switch {
	case !late(err):
		return n, PlanExact, err
	case estimate >= 0:
		return estimate, PlanEstimate, nil
	}
	return 0, PlanUnknown, nil
}

// keyed counts rows that the keyed one of two subscriptions gives and the other does not; an unkeyed one counts as none. Some users at a time, until the time is over: then
// for all by those that were counted.
func (p *planner) keyed(ctx context.Context, t *Table, m *move, old, new *Subscription) (enter, leave int64, how string, err error) {
	of := func(name string, s *Subscription) string {
		if s == nil || s.Key == "" {
			return name + " AS (SELECT u.name, u.devices, NULL::tid AS r FROM u WHERE false)"
		}
		return fmt.Sprintf("%s AS (SELECT u.name, u.devices, m.ctid AS r FROM u CROSS JOIN LATERAL (%s) k JOIN %s m ON m.%s = k.key::%s)",
			name, s.KeyQuery("u.name", "u.attributes"), t.Ident(), Quote(s.Key), s.keyType)
	}
	without := func(a, b string) string {
		return fmt.Sprintf("coalesce((SELECT sum(%[1]s.devices) FROM %[1]s WHERE NOT EXISTS (SELECT FROM %[2]s WHERE %[2]s.name = %[1]s.name AND %[2]s.r = %[1]s.r)), 0)::bigint", a, b)
	}
	sql := "WITH u AS (SELECT * FROM unnest($1::text[], $2::text[], $3::int[]) AS u(name, attributes, devices)), " + of("o", old) + ", " + of("n", new) +
		" SELECT " + without("n", "o") + ", " + without("o", "n")
	done := 0
	for chunk := range slices.Chunk(m.owners, planChunk) {
		var names, attributes []string
		var devices []int
		weight := 0
		for _, u := range chunk {
			names, attributes, devices = append(names, u.Name), append(attributes, u.Attributes), append(devices, u.Devices)
			weight += u.Devices
		}
		var in, out int64
		err := p.bounded(ctx, func(tx pgx.Tx) error { return tx.QueryRow(ctx, sql, names, attributes, devices).Scan(&in, &out) })
		if late(err) {
			if done == 0 {
				return 0, 0, PlanUnknown, nil
			}
			return enter * int64(m.devices) / int64(done), leave * int64(m.devices) / int64(done), PlanEstimate, nil
		}
		if err != nil {
			return 0, 0, PlanUnknown, err
		}
		enter, leave, done = enter+in, leave+out, done+weight
	}
	return enter, leave, PlanExact, nil
}

var errLate = errors.New("the time for counting is over")

// late tells that there was not enough time.
func late(err error) bool {
	var pg *pgconn.PgError
	return errors.Is(err, errLate) || errors.As(err, &pg) && pg.Code == "57014"
}

// bounded runs a query as the reader, in what is left of the time.
func (p *planner) bounded(ctx context.Context, fn func(pgx.Tx) error) error {
	left, err := p.left()
	if err != nil {
		return err
	}
	return asReader(ctx, p.Mirror, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, left); err != nil {
			return err
		}
		return fn(tx)
	})
}

// left is a statement that bounds those after it to what is left of the time.
func (p *planner) left() (string, error) {
	left := time.Until(p.deadline)
	if left < time.Millisecond {
		return "", errLate
	}
	return fmt.Sprintf("SET LOCAL statement_timeout = %d", left.Milliseconds()), nil
}

// uploads judges what is staged now by the new definitions.
func (p *planner) uploads(ctx context.Context) error {
	rows, err := p.Mirror.Query(ctx, `SELECT e.set_name, s.tname, s.op, c.columns, count(*)
		FROM waystage.staging s JOIN waystage.session e ON e.id = s.session_id,
			LATERAL (SELECT `+WrittenColumns+` AS columns) c
		WHERE s.bad_code IS NULL AND e.user_name <> $1 GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3`, protocol.OperatorUser)
	if err != nil {
		return fmt.Errorf("look at staged records: %w", err)
	}
	var u PlanUpload
	var columns []string
	_, err = pgx.ForEachRow(rows, []any{&u.Set, &u.Table, &u.Op, &columns, &u.Records}, func() error {
		u.Code = protocol.CodeUnknownTable
		for _, s := range p.Definitions.SubscriptionsOf(u.Set) {
			if t := p.live[s.Table]; s.Table == u.Table && t != nil {
				u.Code, _ = s.Refuses(t, u.Op, columns)
			}
		}
		if u.Code != "" {
			p.out.Uploads = append(p.out.Uploads, u)
		}
		columns = nil
		return nil
	})
	if err != nil {
		return fmt.Errorf("look at staged records: %w", err)
	}
	return nil
}

// WrittenColumns is an SQL expression for the columns that a staged record s writes. An insert that leaves a column null does not.
const WrittenColumns = `ARRAY(SELECT w.key FROM jsonb_each_text(coalesce(s.img, '{}')) w WHERE s.op <> 'I' OR w.value IS NOT NULL ORDER BY 1)`

// Refuses tells why devices may not upload an operation that writes these columns of the subscription's table; an empty code: they may.
func (s *Subscription) Refuses(t *Table, op string, columns []string) (code protocol.Code, why string) {
	if !s.Allows(op) {
		return protocol.CodeOperation, fmt.Sprintf("the subscription of %s does not allow devices the operation %s (allowed: %q)", s.Table, op, s.Allow)
	}
	given := s.ColumnsOf(t)
	for _, name := range columns {
		if !slices.ContainsFunc(given, func(c Column) bool { return c.Name == name }) {
			return protocol.CodeUnknownColumn, fmt.Sprintf("column %s of %s is not in the device's subscription set", name, s.Table)
		}
	}
	return "", ""
}
