package schema

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
)

// BuiltFor are those of the subscription's columns that an application gets which was built for this: the ones that it names, and those of the
// primary key and the subset key. Nil, and a table without columns, names all. False: it was not built for the table.
func (s *Subscription) BuiltFor(t *Table, built *protocol.Built) ([]Column, bool) {
	cols := s.ColumnsOf(t)
	if built == nil {
		return cols, true
	}
	i := slices.IndexFunc(built.Tables, func(l protocol.Layout) bool { return l.Table == s.Table })
	if i < 0 {
		return nil, false
	}
	names := built.Tables[i].Columns
	if len(names) == 0 {
		return cols, true
	}
	return slices.DeleteFunc(slices.Clone(cols), func(c Column) bool {
		return !t.IsKey(c.Name) && c.Name != s.Key && !slices.Contains(names, c.Name)
	}), true
}

// Built is what an application is built for that uses these sets as they are.
func (d *Definitions) Built(name string, sets []string, tables []*Table) *protocol.Built {
	out := &protocol.Built{Name: name, Tables: []protocol.Layout{}}
	for _, set := range sets {
		wire := d.Wire(set, tables)
		if wire == nil {
			continue
		}
		for _, t := range wire.Tables {
			i := slices.IndexFunc(out.Tables, func(l protocol.Layout) bool { return l.Table == t.Name })
			if i < 0 {
				i, out.Tables = len(out.Tables), append(out.Tables, protocol.Layout{Table: t.Name})
			}
			l := &out.Tables[i]
			for _, c := range t.Columns {
				if !slices.Contains(l.Columns, c.Name) {
					l.Columns = append(l.Columns, c.Name)
				}
			}
		}
	}
	return out
}

// PlanBuilt is what definitions do to devices whose applications were built for the same.
type PlanBuilt struct {
	Name    string   `json:"name"` // as the application says it
	Hash    string   `json:"hash"` // of what it says; empty: it names nothing and gets everything
	Devices int      `json:"devices"`
	Concern int      `json:"concerned"`      // of them, devices that lose some of what their application knows
	Lost    []string `json:"lost,omitempty"` // that: "schema.table" or "schema.table.column"
}

// built counts devices by what their applications were built for: who loses what he knows, and who gets sets anew.
func (p *planner) built(ctx context.Context) error {
	rows, err := p.Mirror.Query(ctx, `SELECT coalesce(b.hash, ''), b.built, u.groups, count(*)::int
		FROM waystage.device d JOIN waystage.app_user u ON u.name = d.user_name LEFT JOIN waystage.built b ON b.hash = d.built
		WHERE d.removed_at IS NULL AND u.name <> $1 GROUP BY b.hash, u.groups ORDER BY b.built->>'name' NULLS FIRST, b.hash, u.groups`, protocol.OperatorUser)
	if err != nil {
		return fmt.Errorf("count devices by what they were built for: %w", err)
	}
	was, is := p.tablesOf(p.stored), p.Tables
	var hash string
	var built *protocol.Built
	var groups []string
	var devices int
	_, err = pgx.ForEachRow(rows, []any{&hash, &built, &groups, &devices}, func() error {
		if n := len(p.out.Built); n == 0 || p.out.Built[n-1].Hash != hash {
			one := PlanBuilt{Hash: hash}
			if built != nil {
				one.Name = built.Name
			}
			p.out.Built = append(p.out.Built, one)
		}
		one := &p.out.Built[len(p.out.Built)-1]
		one.Devices += devices
		before := map[string][]string{}
		after := map[string][]string{}
		for _, set := range p.old.SetsFor(groups) {
			p.old.names(set, was, built, before)
		}
		for _, set := range p.Definitions.SetsFor(groups) {
			p.Definitions.names(set, is, built, after)
		}
		if lost := without(before, after); len(lost) > 0 {
			one.Concern += devices
			one.Lost = append(one.Lost, lost...)
			slices.Sort(one.Lost)
			one.Lost = slices.Compact(one.Lost)
		}
		for i := range p.out.Refresh {
			set := p.out.Refresh[i].Set
			a, b := p.old.WireFor(set, was, built), p.Definitions.WireFor(set, is, built)
			if a != nil && b != nil && a.Hash != b.Hash && slices.Contains(p.old.SetsFor(groups), set) && slices.Contains(p.Definitions.SetsFor(groups), set) {
				p.out.Refresh[i].Devices += devices
			}
		}
		built, groups = nil, nil
		return nil
	})
	if err != nil {
		return fmt.Errorf("count devices by what they were built for: %w", err)
	}
	return nil
}

// names adds what an application gets of a set: table -> columns.
func (d *Definitions) names(set string, tables []*Table, built *protocol.Built, into map[string][]string) {
	wire := d.WireFor(set, tables, built)
	if wire == nil {
		return
	}
	for _, t := range wire.Tables {
		for _, c := range t.Columns {
			into[t.Name] = append(into[t.Name], c.Name)
		}
	}
}

// without lists what the first has and the second has not.
func without(a, b map[string][]string) (lost []string) {
	for table, columns := range a {
		rest, ok := b[table]
		if !ok {
			lost = append(lost, table)
			continue
		}
		for _, c := range columns {
			if !slices.Contains(rest, c) {
				lost = append(lost, table+"."+c)
			}
		}
	}
	slices.Sort(lost)
	return lost
}

// String names it for a person.
func (b PlanBuilt) String() string {
	if b.Hash == "" {
		return "everything"
	}
	return strings.TrimSpace(fmt.Sprintf("%s (%.8s)", b.Name, b.Hash))
}
