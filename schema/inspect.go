package schema

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
)

// Difference between a synced table as the source has it and as it was set up.
type Difference struct {
	Column string   `json:"column,omitempty"`
	What   string   `json:"what"`            // in words
	Stops  StopCode `json:"stops,omitempty"` // as which the table stops; empty: it goes on
}

// Action is what brings a table back into step.
type Action string

// Actions.
const (
	ActNone    Action = ""        // nothing to do
	ActRefresh Action = "refresh" // note what devices and the merge are told: labels, defaults, constraints. Done by a running server too
	ActResync  Action = "resync"  // change the mirror table and compare its rows with the source's
	ActRebuild Action = "rebuild" // make the mirror table anew: the primary key is another one
	ActAdd     Action = "add"     // the definitions have a table that the mirror does not have
	ActRemove  Action = "remove"  // neither the definitions nor the source have the table any more
	ActBlocked Action = "blocked" // somebody must do something first
)

// Inspection is what was found of one table.
type Inspection struct {
	Table       string       `json:"table"`
	Action      Action       `json:"action,omitempty"`
	Stopped     StopCode     `json:"stopped,omitempty"` // it is stopped already
	Differences []Difference `json:"differences,omitempty"`
	Remedy      string       `json:"remedy,omitempty"` // for ActBlocked
	Pending     int64        `json:"pending"`          // devices' records that have no verdict yet

	Stored *Table `json:"-"` // nil: new
	Live   *Table `json:"-"` // nil: not at the source, or not to be synced
}

// stops is the first difference for which the table stops, if there is one.
func (i *Inspection) stops() (d Difference, ok bool) {
	n := slices.IndexFunc(i.Differences, func(d Difference) bool { return d.Stops != "" })
	if n < 0 {
		return d, false
	}
	return i.Differences[n], true
}

// Inspect compares the source's catalog with the synced tables. wanted are the tables of the definitions, nil for those that
// are synced now. Only what differs, is stopped, or is to be added or removed is returned. source must be [Canonical].
func Inspect(ctx context.Context, source, mirror *pgx.Conn, wanted []string) ([]*Inspection, error) {
	stored, err := LoadTables(ctx, mirror)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, t := range stored {
		names = append(names, t.FullName())
	}
	if wanted == nil {
		wanted = names
	}
	all := slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(wanted), names...))))
	if len(all) == 0 {
		return nil, nil
	}
	live, problems, err := ReadTables(ctx, source, all)
	if err != nil {
		return nil, err
	}
	s := &setup{source: source}
	exists, members, err := s.publication(ctx)
	if err != nil {
		return nil, err
	}
	if !exists {
		return nil, fmt.Errorf("%w: publication %s is gone from the source; %s", ErrRecopy, PublicationDown, recopyRemedy)
	}
	var out []*Inspection
	for _, name := range all {
		i := &Inspection{Table: name}
		if n := slices.IndexFunc(stored, func(t *Table) bool { return t.FullName() == name }); n >= 0 {
			i.Stored = stored[n]
		}
		if n := slices.IndexFunc(live, func(t *Table) bool { return t.FullName() == name }); n >= 0 {
			i.Live = live[n]
		}
		published := slices.ContainsFunc(members, func(m member) bool { return m.schema+"."+m.name == name && !m.partial })
		n := slices.IndexFunc(problems, func(p Problem) bool { return p.Table == name && !p.Warning })
		var problem Problem
		if n >= 0 {
			problem = problems[n]
		}
		if err := i.judge(ctx, source, problem, published, slices.Contains(wanted, name)); err != nil {
			return nil, err
		}
		if i.Action == ActNone {
			continue
		}
		if i.Stored != nil {
			if err := mirror.QueryRow(ctx, "SELECT count(*) FROM waystage.change WHERE tbl = $1 AND state = 'merged'", i.Stored.ID).Scan(&i.Pending); err != nil {
				return nil, err
			}
		}
		out = append(out, i)
	}
	return out, nil
}

func (i *Inspection) judge(ctx context.Context, source *pgx.Conn, problem Problem, published, wanted bool) error {
	add := func(column string, stops StopCode, format string, args ...any) {
		i.Differences = append(i.Differences, Difference{column, fmt.Sprintf(format, args...), stops})
	}
	if i.Stored == nil {
		i.Action = ActAdd
		if i.Live == nil {
			i.Action, i.Remedy = ActBlocked, problem.Remedy
			add("", "", "%s", problem.Message)
		}
		return nil
	}
	if i.Stored.Stop != nil {
		i.Stopped = i.Stored.Stop.Code
	}
	if i.Live == nil {
		i.Action = ActBlocked
		var now string
		err := source.QueryRow(ctx, `SELECT coalesce((SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1), '')`,
			i.Stored.OID).Scan(&now)
		if err != nil {
			return err
		}
		switch {
		case now != "" && now != i.Table:
			add("", StopRenamed, "it is called %s at the source now", now)
			i.Remedy = fmt.Sprintf("write %s in the definitions in place of %s, or rename it back at the source", now, i.Table)
		case now == "":
			add("", StopMissing, "it is gone from the source")
			i.Remedy = "take it out of the definitions, or make it again at the source"
		default:
			add("", StopUnsyncable, "%s", problem.Message)
			i.Remedy = problem.Remedy
		}
		if !wanted {
			i.Action, i.Remedy = ActRemove, ""
		}
		return nil
	}
	i.compare()
	if !published {
		add("", StopUnpublished, "it is not in the publication %s, or only in part", PublicationDown)
	}
	_, stops := i.stops()
	switch {
	case slices.ContainsFunc(i.Differences, func(d Difference) bool { return d.Stops == StopKey }):
		i.Action = ActRebuild
	case stops, i.Stored.Stop != nil, slices.ContainsFunc(i.Live.Columns, func(c Column) bool { return !has(i.Stored, c.Name) }):
		i.Action = ActResync
	case len(i.Differences) > 0:
		i.Action = ActRefresh
	}
	return nil
}

func has(t *Table, column string) bool {
	_, ok := t.Column(column)
	return ok
}

// compare lists what differs between the stored and the live table.
func (i *Inspection) compare() {
	was, is := i.Stored, i.Live
	add := func(column string, stops StopCode, format string, args ...any) {
		i.Differences = append(i.Differences, Difference{column, fmt.Sprintf(format, args...), stops})
	}
	if was.OID != 0 && was.OID != is.OID {
		add("", StopReplaced, "another table has this name at the source")
	}
	if !slices.Equal(was.Key, is.Key) {
		add("", StopKey, "the primary key was (%s) and is (%s)", strings.Join(was.Key, ", "), strings.Join(is.Key, ", "))
	}
	for _, o := range was.Columns {
		n, ok := is.Column(o.Name)
		if !ok {
			if to := i.renamed(o); to != "" {
				add(o.Name, StopColumn, "is called %s now", to)
			} else {
				add(o.Name, StopColumn, "was dropped")
			}
			continue
		}
		if o.Type != n.Type || o.MirrorType != n.MirrorType || was.OID == is.OID && (o.TypeOID != n.TypeOID || o.TypeMod != n.TypeMod) {
			add(o.Name, StopType, "was %s and is %s", o.Type, n.Type)
		} else if why := n.reshaped(&o); why != "" {
			add(o.Name, StopType, "has values that read otherwise now: %s", why)
		}
		switch {
		case o.NotNull != n.NotNull && n.NotNull:
			add(o.Name, "", "must not be null any more")
		case o.NotNull != n.NotNull:
			add(o.Name, "", "may be null now")
		}
		if o.Default != n.Default {
			add(o.Name, "", "has the default %q, had %q", n.Default, o.Default)
		}
		if o.Identity != n.Identity {
			add(o.Name, "", "is an identity column of another kind")
		}
		if !slices.Equal(o.Labels, n.Labels) {
			add(o.Name, "", "has the labels %s", strings.Join(n.Labels, ", "))
		}
	}
	for _, n := range is.Columns {
		if has(was, n.Name) || slices.ContainsFunc(was.Columns, func(o Column) bool { return i.renamed(o) == n.Name }) {
			continue
		}
		null := ""
		if n.NotNull {
			null = " NOT NULL"
		}
		add(n.Name, "", "is new: %s%s", n.Type, null)
	}
	text := func(list [][]string) (out []string) {
		for _, u := range list {
			out = append(out, "unique ("+strings.Join(u, ", ")+")")
		}
		return out
	}
	keys := func(t *Table) (out []string) {
		for _, f := range t.Foreign {
			out = append(out, fmt.Sprintf("foreign key (%s) to %s (%s)", strings.Join(f.Columns, ", "), f.Table, strings.Join(f.Refers, ", ")))
		}
		return out
	}
	before, after := append(text(was.Unique), keys(was)...), append(text(is.Unique), keys(is)...)
	for _, c := range after {
		if !slices.Contains(before, c) {
			add("", "", "%s was added", c)
		}
	}
	for _, c := range before {
		if !slices.Contains(after, c) {
			add("", "", "%s was dropped", c)
		}
	}
	if was.Rank != is.Rank {
		add("", "", "has another place in the order of foreign keys")
	}
}

// renamed is the present name of a column that is gone by its old one; empty when it was dropped.
func (i *Inspection) renamed(o Column) string {
	if i.Stored.OID != i.Live.OID || o.Num == 0 || has(i.Live, o.Name) {
		return ""
	}
	for _, n := range i.Live.Columns {
		if n.Num == o.Num && !has(i.Stored, n.Name) {
			return n.Name
		}
	}
	return ""
}

// actAlone does what can be done about one table without anybody.
func actAlone(ctx context.Context, mirror *pgx.Conn, layout int64, i *Inspection, log *zap.Logger) error {
	if i.Stopped != "" || i.Stored == nil {
		return nil
	}
	if d, ok := i.stops(); ok {
		detail := d.What
		if d.Column != "" {
			detail = "column " + d.Column + " " + d.What
		}
		return StopTable(ctx, mirror, i.Stored.ID, i.Table, layout, d.Stops, detail, log)
	}
	if i.Action == ActRefresh {
		if err := Refresh(ctx, mirror, i); err != nil {
			return err
		}
		log.Info("what devices are told of a table has changed at the source, and was taken over", zap.String("table", i.Table), zap.Any("differences", i.Differences))
	}
	return nil
}
