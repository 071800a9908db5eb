package schema

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// whole refuses partitioned tables of which a partition cannot be synced, and partitions whose rows would come with the
// table above them already. The others' changes are published in the name of the table that is synced.
func whole(ctx context.Context, q Querier, rels []*relation, version int) (good []*relation, out []Problem, err error) {
	roots := map[uint32]*relation{}
	var ids []uint32
	for _, r := range rels {
		if r.kind == "p" {
			roots[r.oid] = r
			ids = append(ids, r.oid)
		}
	}
	if len(ids) == 0 {
		return rels, nil, nil
	}
	rows, err := q.Query(ctx, `
SELECT r.oid, t.relid::oid, t.relid::text, c.relkind::text, c.relpersistence::text,
       CASE c.relreplident WHEN 'i' THEN NOT EXISTS (SELECT 1 FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident AND i.indisprimary)
           ELSE c.relreplident = 'n' END,
       c.relreplident = 'f' AND EXISTS (SELECT 1 FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND a.attgenerated <> ''),
       t.isleaf
  FROM unnest($1::oid[]) AS r(oid), pg_partition_tree(r.oid) AS t JOIN pg_class c ON c.oid = t.relid
 WHERE t.relid <> r.oid ORDER BY 1, 3`, ids)
	if err != nil {
		return nil, nil, fmt.Errorf("partitions: %w", err)
	}
	var root, part uint32
	var name, kind, persistence string
	var anonymous, fullGenerated, leaf bool
	bad := map[uint32]bool{}
	_, err = pgx.ForEachRow(rows, []any{&root, &part, &name, &kind, &persistence, &anonymous, &fullGenerated, &leaf}, func() error {
		r := roots[root]
		no := func(message, remedy string) {
			bad[root] = true
			out = append(out, Problem{Table: r.full(), Message: message, Remedy: remedy})
		}
		alter := "run at the source: ALTER TABLE " + name
		switch {
		case kind == "f":
			no("its partition "+name+" is a foreign table, and foreign tables have no change stream", "subscribe to the other partitions one by one, or detach this one: ALTER TABLE "+r.ident()+" DETACH PARTITION "+name)
		case persistence == "u" && leaf:
			no("its partition "+name+" is unlogged, so its changes are not in the write-ahead log", alter+" SET LOGGED")
		case anonymous && leaf:
			no("the changes of its partition "+name+" do not carry the primary key", alter+" REPLICA IDENTITY DEFAULT")
		case fullGenerated && leaf && version >= 180000:
			no("its partition "+name+" has REPLICA IDENTITY FULL and generated columns, so that its own updates would fail once it is published",
				alter+" REPLICA IDENTITY DEFAULT")
		}
		if i := slices.IndexFunc(rels, func(x *relation) bool { return x.oid == part }); i >= 0 {
			bad[part] = true
			out = append(out, Problem{Table: rels[i].full(), Message: "is a partition of " + r.full() + ", which is synced too: a row would be synced twice",
				Remedy: "subscribe to one of the two"})
		}
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("partitions: %w", err)
	}
	return slices.DeleteFunc(slices.Clone(rels), func(r *relation) bool { return bad[r.oid] }), out, nil
}

// lookAtPartitions warns of what the change stream of a partitioned table leaves out.
func lookAtPartitions(ctx context.Context, q Querier, f *findings, t *Table, user string) error {
	rows, err := q.Query(ctx, `SELECT relid::regclass::text FROM pg_partition_tree($1::text::regclass)
		WHERE isleaf AND relid <> $1::text::regclass AND NOT has_table_privilege(relid, 'SELECT') ORDER BY 1`, t.Ident())
	if err != nil {
		return err
	}
	closed, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	if len(closed) > 0 {
		f.add(Failure, "privileges", "GRANT SELECT ON "+strings.Join(closed, ", ")+" TO "+Quote(user)+";", "role %s may not read %d partition(s), and the copy reads them one by one", user, len(closed))
	}
	f.add(Warning, "partitions", "delete rows with DELETE, or TRUNCATE the whole table; after such a statement compare and mend: see docs/types.md, section Partitions",
		"TRUNCATE, ATTACH, DETACH and DROP of a single partition are not in the change stream of the table, so its rows would stay or stay away in the mirror")
	return nil
}
