package schema

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
)

// Wire describes a set's tables and files to a device, in the set's order. The hash changes exactly when the description does.
// It is nil when there is no such set.
func (d *Definitions) Wire(set string, tables []*Table) *protocol.Definitions {
	return d.WireFor(set, tables, nil)
}

// WireFor is Wire for an application that was built for some tables and columns: what it does not name is left out (see
// [Subscription.BuiltFor]).
func (d *Definitions) WireFor(set string, tables []*Table, built *protocol.Built) *protocol.Definitions {
	subs, files := d.SubscriptionsOf(set), d.wireFiles(set)
	if len(subs)+len(files) == 0 {
		return nil
	}
	byName, inSet := map[string]*Table{}, map[string][]Column{}
	for _, t := range tables {
		byName[t.FullName()] = t
	}
	for _, s := range subs {
		if t := byName[s.Table]; t != nil {
			if cols, ok := s.BuiltFor(t, built); ok {
				inSet[s.Table] = cols
			}
		}
	}
	out := &protocol.Definitions{}
	for _, s := range subs {
		t := byName[s.Table]
		cols, ok := inSet[s.Table]
		if !ok {
			continue
		}
		pt := protocol.Table{Name: s.Table, Key: t.Key, SubsetKey: s.Key, Operations: s.Allow, FileColumn: s.FileColumn, FileBefore: s.File == FileBefore}
		if !covers(cols, []string{s.FileColumn}) {
			pt.FileColumn, pt.FileBefore = "", false
		}
		for _, c := range cols {
			pt.Columns = append(pt.Columns, protocol.Column{Name: c.Name, Type: c.Type, NotNull: c.NotNull, Default: c.Default})
		}
		for _, u := range t.Unique {
			if covers(cols, u) {
				pt.Unique = append(pt.Unique, u)
			}
		}
		for _, f := range t.Foreign {
			if parent, ok := inSet[f.Table]; ok && covers(cols, f.Columns) && covers(parent, f.Refers) {
				pt.Foreign = append(pt.Foreign, protocol.ForeignKey{Columns: f.Columns, Table: f.Table, Refers: f.Refers})
			}
		}
		out.Tables = append(out.Tables, pt)
	}
	// Only strings, booleans and lists of them: marshalling cannot fail.
	text, _ := json.Marshal(out.Tables)
	if out.Files = files; len(files) > 0 {
		more, _ := json.Marshal(files)
		text = append(text, more...)
	}
	sum := sha256.Sum256(text)
	out.Hash = hex.EncodeToString(sum[:8])
	return out
}

func covers(cols []Column, names []string) bool {
	return !slices.ContainsFunc(names, func(n string) bool {
		return !slices.ContainsFunc(cols, func(c Column) bool { return c.Name == n })
	})
}

// ErrNotSetUp is returned when the mirror has no tables or definitions yet.
var ErrNotSetUp = errors.New("the mirror is not set up yet: waystage serve does it when it starts")

// LoadTables reads the synced tables from the mirror, parents first, stopped ones too.
func LoadTables(ctx context.Context, q Querier) ([]*Table, error) {
	rows, err := q.Query(ctx, `SELECT id, definition, stopped_code, stopped_detail, stopped_at, stopped_position::text, copying, coalesce(floor::text, '')
		FROM waystage.synced_table ORDER BY rank, schema_name, table_name`)
	if err != nil {
		return nil, fmt.Errorf("load tables: %w", err)
	}
	tables, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (*Table, error) {
		var id int
		var def []byte
		var code, position *string
		var at *time.Time
		var stop Stop
		var floor string
		if err := row.Scan(&id, &def, &code, &stop.Detail, &at, &position, &stop.Copying, &floor); err != nil {
			return nil, err
		}
		t := &Table{}
		if err := json.Unmarshal(def, t); err != nil {
			return nil, err
		}
		t.ID, t.Floor = id, floor
		if code != nil {
			stop.Code = StopCode(*code)
			if at != nil {
				stop.At = *at
			}
			if position != nil {
				stop.Position = *position
			}
			t.Stop = &stop
		}
		return t, nil
	})
	if err != nil {
		return nil, fmt.Errorf("load tables: %w", err)
	}
	return tables, nil
}
