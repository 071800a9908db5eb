package schema

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// PlanFiles is what the files of one subscription do on the devices of those who have it in these sets before and after.
type PlanFiles struct {
	Subscription string `json:"subscription"`
	Was          string `json:"was"` // set, empty: none
	Set          string `json:"set"` // set, empty: none
	Users        int    `json:"users"`
	Devices      int    `json:"devices"`
	Enter        int64  `json:"enter"` // files, summed over devices
	Leave        int64  `json:"leave"`
	Bytes        int64  `json:"bytes"` // size of those that enter
	How          string `json:"how"`
}

// fileMove is what happens to the files of one subscription on the devices of some users.
type fileMove struct {
	PlanFiles
	old, new *FileSubscription // nil: none
	owners   []owner           // those with devices
}

// filePlace is a file subscription in one of a user's sets.
type filePlace struct {
	set string
	sub *FileSubscription
}

func (d *Definitions) filePlaces(groups []string) map[string]filePlace {
	out := map[string]filePlace{}
	for _, set := range d.SetsFor(groups) {
		for _, f := range d.FilesOf(set) {
			out[f.Name] = filePlace{set, f}
		}
	}
	return out
}

// filesOf notes what happens to a user's files, and tells whether anything does.
func (p *planner) filesOf(u owner) (touched bool) {
	before, after := p.old.filePlaces(u.Groups), p.Definitions.filePlaces(u.Groups)
	var names []string
	for name := range before {
		names = append(names, name)
	}
	for name := range after {
		if _, both := before[name]; !both {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		b, a := before[name], after[name]
		same := a.sub != nil && b.sub != nil && a.set == b.set
		if same && *a.sub.settings() == *b.sub.settings() {
			continue
		}
		if touched = true; same && a.sub.Path == b.sub.Path && a.sub.Rows == b.sub.Rows {
			continue // other rights, the same files
		}
		i := slices.IndexFunc(p.files, func(m *fileMove) bool { return m.Subscription == name && m.Was == b.set && m.Set == a.set })
		if i < 0 {
			i = len(p.files)
			p.files = append(p.files, &fileMove{PlanFiles: PlanFiles{Subscription: name, Was: b.set, Set: a.set, How: PlanExact}, old: b.sub, new: a.sub})
		}
		m := p.files[i]
		m.Users++
		if m.Devices += u.Devices; u.Devices > 0 {
			m.owners = append(m.owners, u)
		}
	}
	return touched
}

// fileSettings is what was written of a file subscription.
type fileSettings struct {
	path, rows string
	upload     bool
	maxSize    int64
}

func (f *FileSubscription) settings() *fileSettings {
	return &fileSettings{f.Path, strings.Join(strings.Fields(f.Rows), " "), f.Upload, f.MaxSize}
}

// countFiles counts the files that enter and leave.
func (p *planner) countFiles(ctx context.Context) error {
	for _, m := range p.files {
		done := 0
		for chunk := range slices.Chunk(m.owners, planChunk) {
			var one PlanFiles
			err := p.countFilesOf(ctx, m, chunk, &one)
			if late(err) {
				if m.How = PlanUnknown; done > 0 {
					scale := func(n int64) int64 { return n * int64(m.Devices) / int64(done) }
					m.Enter, m.Leave, m.Bytes, m.How = scale(m.Enter), scale(m.Leave), scale(m.Bytes), PlanEstimate
				}
				break
			}
			if err != nil {
				return fmt.Errorf("files of %s: %w", m.Subscription, err)
			}
			m.Enter, m.Leave, m.Bytes = m.Enter+one.Enter, m.Leave+one.Leave, m.Bytes+one.Bytes
			for _, u := range chunk {
				done += u.Devices
			}
		}
		p.out.Files = append(p.out.Files, m.PlanFiles)
	}
	return nil
}

// countFilesOf does so for some users. Their keys are asked for as the reader, who sees no files; the files themselves as who plans.
func (p *planner) countFilesOf(ctx context.Context, m *fileMove, users []owner, out *PlanFiles) error {
	var names, attributes []string
	var devices []int
	for _, u := range users {
		names, attributes, devices = append(names, u.Name), append(attributes, u.Attributes), append(devices, u.Devices)
	}
	args := []any{names, devices}
	// files is a query of the users and the files that a subscription gives them.
	files := func(f *FileSubscription) (string, error) {
		switch {
		case f == nil:
			return "SELECT u.name, u.devices, NULL::text AS path, 0::bigint AS size FROM u WHERE false", nil
		case f.query == nil:
			return "SELECT u.name, u.devices, f.path, f.size FROM u CROSS JOIN waystage.file f WHERE f.sha256 IS NOT NULL AND " + f.Covers("f.path"), nil
		}
		var who, keys []string
		err := p.bounded(ctx, func(tx pgx.Tx) error {
			rows, err := tx.Query(ctx, "SELECT u.name, k.key FROM unnest($1::text[], $2::text[]) AS u(name, attributes) CROSS JOIN LATERAL ("+
				f.KeyQuery("u.name", "u.attributes")+") k", names, attributes)
			if err != nil {
				return err
			}
			var name, key string
			_, err = pgx.ForEachRow(rows, []any{&name, &key}, func() error {
				who, keys = append(who, name), append(keys, key)
				return nil
			})
			return err
		})
		args = append(args, who, keys)
		return fmt.Sprintf("SELECT u.name, u.devices, f.path, f.size FROM u JOIN unnest($%d::text[], $%d::text[]) AS k(name, key) USING (name) JOIN waystage.file f ON %s = k.key WHERE f.sha256 IS NOT NULL AND %s",
			len(args)-1, len(args), f.KeyOf("f.path"), f.Covers("f.path")), err
	}
	was, err := files(m.old)
	if err != nil {
		return err
	}
	is, err := files(m.new)
	if err != nil {
		return err
	}
	sum := func(what, a, b string) string {
		return fmt.Sprintf("coalesce((SELECT sum(%[2]s.devices * %[1]s) FROM %[2]s WHERE NOT EXISTS (SELECT FROM %[3]s WHERE %[3]s.name = %[2]s.name AND %[3]s.path = %[2]s.path)), 0)::bigint", what, a, b)
	}
	return p.timed(ctx, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, "WITH u AS (SELECT * FROM unnest($1::text[], $2::int[]) AS u(name, devices)), o AS ("+was+"), n AS ("+is+") SELECT "+
			sum("1", "n", "o")+", "+sum("n.size", "n", "o")+", "+sum("1", "o", "n"), args...).Scan(&out.Enter, &out.Bytes, &out.Leave)
	})
}

// timed runs a query in what is left of the time, without the rights of the reader.
func (p *planner) timed(ctx context.Context, fn func(pgx.Tx) error) error {
	left, err := p.left()
	if err != nil {
		return err
	}
	return pgx.BeginTxFunc(ctx, p.Mirror, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, left); err != nil {
			return err
		}
		return fn(tx)
	})
}
