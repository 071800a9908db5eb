package schema

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
)

// Unclosed warns of foreign keys that a set does not close: devices get rows whose parents they do not get.
func (d *Definitions) Unclosed(tables []*Table) []Problem {
	c := &checker{d: d}
	d.references(tables, func(r reference) {
		remedy := fmt.Sprintf("add a subscription of %s to the set, or leave the columns out", r.foreign.Table)
		switch {
		case r.parent == nil:
			c.warn(r.at, fmt.Sprintf("set %q has %s, whose (%s) refers to %s, which is not in the set: devices get rows without the rows that they refer to",
				r.set, r.child.Table, strings.Join(r.foreign.Columns, ", "), r.foreign.Table), remedy)
		case !r.parent.Downloads():
			c.warn(r.at, fmt.Sprintf("set %q has %s, whose (%s) refers to %s, of which devices get no rows (upload-only)",
				r.set, r.child.Table, strings.Join(r.foreign.Columns, ", "), r.foreign.Table), "let devices download the parents")
		case r.parent.Key != "" && r.child.Key == "":
			c.warn(r.at, fmt.Sprintf("set %q has all rows of %s, and of %s, which these refer to, only a user's: devices get rows without the rows that they refer to",
				r.set, r.child.Table, r.foreign.Table), fmt.Sprintf("give %s a key, or %s none", r.child.Table, r.foreign.Table))
		}
	})
	return c.problems
}

// reference is a foreign key that devices of a set see.
type reference struct {
	set           string
	at            place
	child, parent *Subscription // parent nil: not in the set
	from, to      *Table        // to nil: not known
	foreign       ForeignKey
}

// references walks the foreign keys of all sets.
func (d *Definitions) references(tables []*Table, fn func(reference)) {
	byName := map[string]*Table{}
	for _, t := range tables {
		byName[t.FullName()] = t
	}
	for _, set := range d.Sets {
		subs := d.SubscriptionsOf(set.Name)
		for i, s := range subs {
			t := byName[s.Table]
			if t == nil || !s.Downloads() {
				continue
			}
			for _, f := range t.Foreign {
				if !covers(s.ColumnsOf(t), f.Columns) || f.Table == s.Table {
					continue
				}
				r := reference{set: set.Name, child: s, from: t, to: byName[f.Table], foreign: f}
				if i < len(set.places) {
					r.at = set.places[i]
				}
				if n := slices.IndexFunc(subs, func(s *Subscription) bool { return s.Table == f.Table }); n >= 0 {
					r.parent = subs[n]
				}
				fn(r)
			}
		}
	}
}

// Member is a user as rows queries see one.
type Member struct {
	Name       string
	Attributes string // JSON
	Groups     []string
}

// closureMembers bounds the users whose rows are looked at for one foreign key.
const closureMembers = 20

// UnclosedFor looks at the mirror's rows: for which of these users a set has rows whose parents are not theirs. At most
// 20 users of a set are looked at. The definitions must be checked, and the mirror tables exist.
func (d *Definitions) UnclosedFor(ctx context.Context, db Beginner, tables []*Table, members []Member) ([]Problem, error) {
	c := &checker{d: d}
	var failed error
	d.references(tables, func(r reference) {
		if failed != nil || r.parent == nil || r.to == nil || !r.parent.Downloads() || r.parent.Key == "" || r.child.Key == "" {
			return
		}
		for _, m := range d.membersOf(r.set, members) {
			var n int64
			err := asReader(ctx, db, func(tx pgx.Tx) error {
				return tx.QueryRow(ctx, r.orphans(), m.Name, m.Attributes).Scan(&n)
			})
			if err != nil {
				failed = fmt.Errorf("rows of %s for user %s: %w", r.child.Table, m.Name, err)
				return
			}
			if n > 0 {
				c.warn(r.at, fmt.Sprintf("set %q: user %s gets %d rows of %s whose row of %s is not theirs", r.set, m.Name, n, r.child.Table, r.foreign.Table),
					fmt.Sprintf("let the rows query of %q give the keys that these rows need", r.parent.Name))
				return
			}
		}
	})
	return c.problems, failed
}

// membersOf are some of the users who have a set.
func (d *Definitions) membersOf(set string, members []Member) (out []Member) {
	for _, m := range members {
		if len(out) < closureMembers && slices.Contains(d.SetsFor(m.Groups), set) {
			out = append(out, m)
		}
	}
	return out
}

// orphans counts a user's ($1, $2) rows without their parents.
func (r *reference) orphans() string {
	var has, same []string
	for i, col := range r.foreign.Columns {
		has = append(has, "m."+Quote(col)+" IS NOT NULL")
		same = append(same, "p."+Quote(r.foreign.Refers[i])+" = m."+Quote(col))
	}
	key := func(alias string, s *Subscription) string {
		return fmt.Sprintf("%s.%s IN (SELECT k.key::%s FROM (%s) k)", alias, Quote(s.Key), s.keyType, s.KeyQuery("$1", "$2"))
	}
	return "SELECT count(*) FROM " + r.from.Ident() + " m WHERE " + strings.Join(has, " AND ") + " AND " + key("m", r.child) +
		" AND NOT EXISTS (SELECT 1 FROM " + r.to.Ident() + " p WHERE " + strings.Join(same, " AND ") + " AND " + key("p", r.parent) + ")"
}

// asReader runs queries as the role that may read the mirror and nothing else.
func asReader(ctx context.Context, db Beginner, fn func(pgx.Tx) error) error {
	tx, err := db.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	for _, sql := range []string{"SET LOCAL transaction_read_only = on", "SET LOCAL statement_timeout = '30s'", "SET LOCAL ROLE " + ReaderRole} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return fn(tx)
}

// Examine holds definitions against both databases and changes nothing: tables and columns against the source's catalog, rows queries
// by the mirror itself, foreign keys by its rows. mirror may be nil: then what needs it is left out. Tables that the mirror does
// not have yet stand in a transaction that is undone.
func (d *Definitions) Examine(ctx context.Context, source, mirror *pgx.Conn) ([]*Table, []Problem, error) {
	tables, problems, err := ReadTables(ctx, source, d.TableNames())
	if err != nil {
		return nil, nil, err
	}
	problems = append(problems, d.Check(tables)...)
	all, _, err := ReadTables(ctx, source, nil) // with foreign keys to tables that have no subscription
	if err != nil {
		return nil, nil, err
	}
	problems = append(problems, d.Unclosed(all)...)
	if _, err := Refusing(problems); err != nil || mirror == nil {
		return tables, problems, nil //nolint:nilerr // the problems are the answer
	}
	tx, err := mirror.Begin(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	if err := standIn(ctx, tx, tables); err != nil {
		return nil, nil, fmt.Errorf("stand-ins for new tables: %w", err)
	}
	live, err := d.CheckLive(ctx, tx)
	if err != nil {
		return nil, nil, err
	}
	problems = append(problems, live...)
	if _, err := Refusing(live); err != nil {
		return tables, problems, nil //nolint:nilerr // the problems are the answer
	}
	members, err := Members(ctx, tx)
	if err != nil {
		return nil, nil, err
	}
	open, err := d.UnclosedFor(ctx, tx, tables, members)
	if err != nil {
		return nil, nil, err
	}
	return tables, append(problems, open...), nil
}

// Members lists the users, with what decides about their rows; none when there is no mirror yet.
func Members(ctx context.Context, q Querier) ([]Member, error) {
	var there bool
	if err := q.QueryRow(ctx, "SELECT to_regclass('waystage.app_user') IS NOT NULL").Scan(&there); err != nil || !there {
		return nil, err
	}
	rows, err := q.Query(ctx, "SELECT name, attributes::text, groups FROM waystage.app_user WHERE name <> $1 ORDER BY name", protocol.OperatorUser)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Member])
}

// standIn makes empty tables for those that the mirror does not have.
func standIn(ctx context.Context, tx pgx.Tx, tables []*Table) error {
	var run []string
	for _, role := range []string{ReaderRole, DeciderRole} {
		var there bool
		if err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = $1)", role).Scan(&there); err != nil {
			return err
		}
		if !there {
			run = append(run, "CREATE ROLE "+role+" NOLOGIN NOINHERIT", "GRANT "+role+" TO CURRENT_USER")
		}
	}
	schemas := map[string]bool{}
	for _, t := range tables {
		var exists, schema bool
		if err := tx.QueryRow(ctx, "SELECT to_regclass($1) IS NOT NULL, to_regnamespace($2) IS NOT NULL", t.Ident(), Quote(t.Schema)).Scan(&exists, &schema); err != nil {
			return err
		}
		if exists {
			continue
		}
		if !schema && !schemas[t.Schema] {
			run = append(run, "CREATE SCHEMA "+Quote(t.Schema))
		}
		if !schemas[t.Schema] {
			run = append(run, "GRANT USAGE ON SCHEMA "+Quote(t.Schema)+" TO "+ReaderRole)
		}
		schemas[t.Schema] = true
		run = append(run, t.createDDL(), "GRANT SELECT ON "+t.Ident()+" TO "+ReaderRole)
	}
	for _, sql := range run {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}
