package apply

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/conflict"
	"github.com/waystage/waystage/internal/sabotage"
	"github.com/waystage/waystage/schema"
)

// ownTx is a transaction of the up worker, recognised by its first row: the move of our row in the source's progress table.
type ownTx struct {
	ids     []int64
	end     change.LSN        // where it ends in the source's log, once it has
	at      time.Time         // and when it was committed
	authors map[string]author // by table and key: who wrote it; known at flush
}

// rowState is what a batch knows of a key: the last image, and who wrote.
type rowState struct {
	key     []string
	img     image  // nil: deleted
	fresh   bool   // the source had no row of this key before
	last    *ownTx // the last writer; nil: foreign
	own     bool   // some transaction of ours wrote it
	foreign bool   // some other did
}

// writer continues base's writer with what the batch saw.
func (r *rowState) writer(before conflict.Writer) conflict.Writer {
	if r.foreign {
		before = before.After(false)
	}
	if r.own {
		before = before.After(true)
	}
	return before
}

type tableRows struct {
	*table
	rows  map[string]*rowState
	order []*rowState
}

// batch collects source transactions and writes them in one mirror transaction. Several changes of a key become one: the
// mirror has no constraints that could see the states between (rule R6).
type batch struct {
	d  *Down
	tx pgx.Tx

	tables   map[int]*tableRows
	verdicts []*ownTx   // committed transactions of ours whose verdicts are to be written
	cur      *ownTx     // the open transaction, if it is ours
	first    bool       // no row of the open transaction has come yet
	at       change.LSN // where the open transaction was committed
	locked   bool       // all tables are locked

	rows      int // since the last flush
	bytes     int // of their values
	upSeq     int64
	committed time.Time
	txs       int
	applied   int // rows in all
	decided   int
}

func (b *batch) table(t *table) *tableRows {
	tr := b.tables[t.ID]
	if tr == nil {
		tr = &tableRows{table: t, rows: map[string]*rowState{}}
		b.tables[t.ID] = tr
	}
	return tr
}

// event takes one event of the source.
func (b *batch) event(ctx context.Context, ev *change.Event) error {
	switch ev.Kind {
	case change.KindBegin:
		b.cur, b.first, b.at = nil, true, ev.LSN
		return nil
	case change.KindCommit:
		if b.cur != nil {
			b.cur.end, b.cur.at = ev.LSN, ev.Time
			b.verdicts = append(b.verdicts, b.cur)
			b.cur = nil
		}
		b.committed = ev.Time
		b.txs++
		return nil
	case change.KindRelation:
		b.d.describe(ev.Relation)
		return nil
	case change.KindTruncate:
		b.first = false
		for _, id := range ev.IDs {
			rel, ok := b.d.relations[id]
			if !ok {
				return fmt.Errorf("%w: truncate of a relation that was not described", change.ErrNotChangeData)
			}
			var err error
			switch t := rel.table; {
			case t == nil || b.passed(t):
			case rel.err != nil:
				err = rel.err
			case t.Stop != nil:
				err = b.keepTruncate(ctx, t)
			default:
				err = b.truncate(ctx, t)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	rel, ok := b.d.relations[ev.ID]
	if !ok {
		return fmt.Errorf("%w: a row of a relation that was not described", change.ErrNotChangeData)
	}
	first := b.first
	b.first = false
	if rel.marker {
		return b.marker(rel, ev, first)
	}
	if rel.table == nil || b.cur != nil && sabotage.On(sabotage.SkipEchoes) {
		return nil
	}
	if b.passed(rel.table) {
		return nil
	}
	if rel.err != nil {
		return rel.err
	}
	if err := b.row(ctx, rel, ev); err != nil {
		return err
	}
	b.rows++
	b.applied++
	for _, v := range ev.New {
		b.bytes += len(v.Text)
	}
	if b.rows >= b.d.cfg.FlushRows || b.bytes >= flushBytes {
		return b.flush(ctx, false)
	}
	return nil
}

// marker takes a row of the source's progress table. Only an update of our row that comes first makes a transaction
// ours: anything else is somebody playing with the table, and foreign.
func (b *batch) marker(rel *relation, ev *change.Event, first bool) error {
	if ev.Kind != change.KindUpdate || !first {
		return nil
	}
	vals := map[string]string{}
	for i, v := range ev.New {
		if v.State == change.Text && i < len(rel.desc.Columns) {
			vals[rel.desc.Columns[i].Name] = v.Text
		}
	}
	if vals["epoch"] != b.d.epoch {
		return nil
	}
	if _, ok := vals["carries"]; !ok { // it never repeats, so it is always sent
		return fmt.Errorf("%w: a marker without its changes", change.ErrNotChangeData)
	}
	seq, err := strconv.ParseInt(vals["seq"], 10, 64)
	if err != nil {
		return fmt.Errorf("%w: marker seq %q", change.ErrNotChangeData, vals["seq"])
	}
	ids, err := parseCarries(vals["carries"])
	if err != nil {
		return err
	}
	b.upSeq = max(b.upSeq, seq)
	b.cur = &ownTx{ids: ids}
	return nil
}

func (b *batch) row(ctx context.Context, rel *relation, ev *change.Event) error {
	t := rel.table
	var img, old image
	var err error
	if ev.Old != nil {
		if old, err = rel.image(ev.Old); err != nil {
			return err
		}
	}
	if ev.Kind == change.KindDelete {
		key, err := t.keyOf(old)
		if err != nil {
			return err
		}
		return b.set(t, key, nil, false)
	}
	if img, err = rel.image(ev.New); err != nil {
		return err
	}
	if old == nil {
		key, err := t.keyOf(img)
		if err != nil {
			return err
		}
		return b.set(t, key, img, ev.Kind == change.KindInsert)
	}
	// The old tuple was sent: the key may have changed, or the replica identity is full. Only of the latter are the other
	// columns data; in a key tuple they are null because they were not sent.
	for i, v := range img {
		if v == hole && (!ev.Key || slices.Contains(t.keys, i)) {
			img[i] = old[i]
		}
	}
	was, err := t.keyOf(old)
	if err != nil {
		return err
	}
	key, err := t.keyOf(img)
	if err != nil {
		return err
	}
	if keyID(was) == keyID(key) {
		return b.set(t, key, img, false)
	}
	if img.holes() {
		whole, err := b.current(ctx, t, was)
		if err != nil {
			return err
		}
		img.fill(whole)
	}
	if err := b.set(t, was, nil, false); err != nil {
		return err
	}
	return b.set(t, key, img, false)
}

// set notes a key's new image; fresh: the source had no row of it.
func (b *batch) set(t *table, key []string, img image, fresh bool) error {
	tr, id := b.table(t), keyID(key)
	st := tr.rows[id]
	if st == nil {
		st = &rowState{key: key, fresh: fresh}
		tr.rows[id] = st
		tr.order = append(tr.order, st)
	} else if img.holes() {
		if st.img == nil {
			return diverged(t, key, "updates a row that it deleted before")
		}
		img.fill(st.img)
	}
	st.img, st.last = img, b.cur
	if b.cur != nil {
		st.own = true
	} else {
		st.foreign = true
	}
	return nil
}

// current is the source's image of a key at this point of its log. It is called for a changed key with out-of-line
// values only.
func (b *batch) current(ctx context.Context, t *table, key []string) (image, error) {
	if st := b.table(t).rows[keyID(key)]; st != nil && st.img != nil && !st.img.holes() {
		return st.img, nil
	}
	if t.Stop != nil {
		return nil, &fault{t: t, code: schema.StopOperator, detail: fmt.Sprintf("key %q was changed to another during the copy, which is to be made again", key)}
	}
	if err := b.flush(ctx, false); err != nil {
		return nil, err
	}
	keys := [][]string{key}
	at, err := t.standings(ctx, b.tx, keys)
	if err != nil {
		return nil, err
	}
	if s, ok := at[0]; ok {
		rows, err := t.baseImages(ctx, b.tx, keys, []int64{s.first})
		if err != nil {
			return nil, err
		}
		if rows[0].img == nil {
			return nil, diverged(t, key, "moves a row that is absent in base")
		}
		return rows[0].img, nil
	}
	var text *string
	err = b.tx.QueryRow(ctx, t.load, t.keyArrays(1, func(int) []string { return key })...).Scan(&text)
	if err == pgx.ErrNoRows {
		return nil, diverged(t, key, "moves a row that the mirror does not have")
	}
	if err != nil {
		return nil, fmt.Errorf("read a row of %s: %w", t.FullName(), err)
	}
	return t.image(text)
}

func diverged(t *table, key []string, what string) error {
	return &fault{t: t, code: schema.StopDiverged, detail: fmt.Sprintf("the source %s: key %q", what, key)}
}

// lock takes the locks of all that the flush will read or write.
func (b *batch) lock(ctx context.Context, last bool) error {
	if b.locked {
		return nil
	}
	if last {
		ids := slices.Collect(maps.Keys(b.tables))
		var carried []int64
		for _, o := range b.verdicts {
			carried = append(carried, o.ids...)
		}
		all := false
		if len(carried) > 0 {
			rows, err := b.tx.Query(ctx, "SELECT tbl, count(*) FROM waystage.change WHERE id = ANY($1) GROUP BY tbl", carried)
			if err != nil {
				return fmt.Errorf("carried changes: %w", err)
			}
			var tbl, n, found int
			if _, err := pgx.ForEachRow(rows, []any{&tbl, &n}, func() error { ids = append(ids, tbl); found += n; return nil }); err != nil {
				return fmt.Errorf("carried changes: %w", err)
			}
			// A merge's commit may be in the log and not visible yet. It still holds its table lock then, whichever that is.
			all = found < len(carried)
		}
		if !all {
			slices.Sort(ids)
			return lockTables(ctx, b.tx, slices.Compact(ids))
		}
	}
	b.locked = true
	return lockTables(ctx, b.tx, slices.Sorted(maps.Keys(b.d.byID)))
}

// flush writes what was collected. last: nothing follows in this mirror transaction; otherwise all tables are locked,
// since their locks must be taken in order and what follows is not known.
func (b *batch) flush(ctx context.Context, last bool) error {
	if last && len(b.tables) == 0 && len(b.verdicts) == 0 {
		return nil
	}
	if err := b.lock(ctx, last); err != nil {
		return err
	}
	decided, err := b.decide(ctx)
	if err != nil {
		return err
	}
	for id := range decided {
		if t := b.d.byID[id]; t != nil {
			b.table(t)
		}
	}
	ids := slices.Sorted(maps.Keys(b.tables))
	busy, err := b.busy(ctx, ids)
	if err != nil {
		return err
	}
	for _, id := range ids {
		tr := b.tables[id]
		switch {
		case tr.Stop != nil:
			if err = tr.keep(ctx, b.tx); err == nil && len(decided[id]) > 0 {
				err = b.dropIdleBases(ctx, id)
			}
		case !busy[id] && len(decided[id]) == 0:
			err = tr.write(ctx, b.tx, tr.order)
		default:
			err = tr.routed(ctx, b.tx, decided[id])
		}
		if err != nil {
			return mirrorFault(tr.table, err)
		}
	}
	clear(b.tables)
	b.rows, b.bytes = 0, 0
	return nil
}

// verdict of one key in this flush.
type verdict struct {
	key   []string
	first int64 // the earliest change decided
}

// decide writes the acceptances and learns whose images our transactions wrote. By table and key.
func (b *batch) decide(ctx context.Context) (map[int]map[string]*verdict, error) {
	out := map[int]map[string]*verdict{}
	learn := func(sql string, own []*ownTx, accept bool) error {
		of := map[int64]*ownTx{}
		var ids []int64
		var ends []string
		var times []time.Time
		for _, o := range own {
			o.authors = map[string]author{}
			for _, id := range o.ids {
				of[id] = o
				ids, ends, times = append(ids, id), append(ends, o.end.String()), append(times, o.at)
			}
		}
		if len(ids) == 0 {
			return nil
		}
		args := []any{ids}
		if accept {
			args = append(args, ends, times)
		}
		rows, err := b.tx.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		latest := map[*ownTx]map[string]int64{}
		var id, version int64
		var tbl int
		var key []string
		var inc string
		var resolved bool
		_, err = pgx.ForEachRow(rows, []any{&id, &tbl, &key, &inc, &version, &resolved}, func() error {
			k, o := keyID(key), of[id]
			at := authorKey(tbl, k)
			if latest[o] == nil {
				latest[o] = map[string]int64{}
			}
			if id > latest[o][at] {
				latest[o][at] = id
				lw := strings.Clone(inc)
				o.authors[at] = author{&lw, version}
				if resolved { // it holds what the device has not seen: to devices it is the source's image (docs/adr/0010-conflict-policies.md)
					o.authors[at] = author{}
				}
			}
			if !accept {
				return nil
			}
			b.decided++
			if out[tbl] == nil {
				out[tbl] = map[string]*verdict{}
			}
			v := out[tbl][k]
			if v == nil {
				v = &verdict{slices.Clone(key), id}
				out[tbl][k] = v
			}
			v.first = min(v.first, id)
			return nil
		})
		return err
	}
	err := learn(`UPDATE waystage.change c SET state = 'applied', stamp = pg_current_xact_id()::text::bigint, decided_at = clock_timestamp(),
			source_end = u.source_end::pg_lsn, source_at = u.source_at
		FROM unnest($1::bigint[], $2::text[], $3::timestamptz[]) AS u(id, source_end, source_at)
		WHERE c.id = u.id AND c.state = 'merged' RETURNING c.id, c.tbl, c.key, c.incarnation, c.version, coalesce(c.resolved ? 'source', false)`, b.verdicts, true)
	if err != nil {
		return nil, fmt.Errorf("write verdicts: %w", err)
	}
	if b.cur != nil {
		// A large transaction of ours, of which more rows will come: its verdicts wait for its end.
		err := learn("SELECT id, tbl, key, incarnation, version, coalesce(resolved ? 'source', false) FROM waystage.change WHERE id = ANY($1)", []*ownTx{b.cur}, false)
		if err != nil {
			return nil, fmt.Errorf("read carried changes: %w", err)
		}
	}
	b.verdicts = nil
	return out, nil
}

func authorKey(tbl int, key string) string { return strconv.Itoa(tbl) + ":" + key }

// busy tells which tables have pending changes at all.
func (b *batch) busy(ctx context.Context, ids []int) (map[int]bool, error) {
	rows, err := b.tx.Query(ctx, `SELECT t FROM unnest($1::int[]) AS t
		WHERE EXISTS (SELECT 1 FROM waystage.change AS c WHERE c.state = 'merged' AND c.tbl = t)`, ids)
	if err != nil {
		return nil, fmt.Errorf("tables with pending changes: %w", err)
	}
	out := map[int]bool{}
	var id int
	_, err = pgx.ForEachRow(rows, []any{&id}, func() error { out[id] = true; return nil })
	return out, err
}

// write puts rows without pending changes into the mirror: deletes first, so that a key that moved is free.
func (tr *tableRows) write(ctx context.Context, tx pgx.Tx, states []*rowState) error {
	var gone [][]string
	var whole []*rowState
	parts := map[string][]*rowState{} // by the columns that are known
	for _, st := range states {
		switch {
		case st.img == nil:
			gone = append(gone, st.key)
		case st.img.holes():
			mask := make([]byte, len(st.img))
			for i, v := range st.img {
				mask[i] = '0'
				if v != hole && !slices.Contains(tr.keys, i) {
					mask[i] = '1'
				}
			}
			parts[string(mask)] = append(parts[string(mask)], st)
		default:
			whole = append(whole, st)
		}
	}
	if len(gone) > 0 {
		if _, err := tx.Exec(ctx, tr.deleteRows, tr.keyArrays(len(gone), func(r int) []string { return gone[r] })...); err != nil {
			return fmt.Errorf("delete from %s: %w", tr.FullName(), err)
		}
	}
	if err := tr.put(ctx, tx, whole); err != nil {
		return err
	}
	for _, mask := range slices.Sorted(maps.Keys(parts)) {
		var cols []int
		for i, c := range []byte(mask) {
			if c == '1' {
				cols = append(cols, i)
			}
		}
		if len(cols) == 0 {
			continue // nothing but the key and values that did not change
		}
		states := parts[mask]
		args := append(tr.keyArrays(len(states), func(r int) []string { return states[r].key }),
			columnArrays(cols, len(states), func(r int) image { return states[r].img })...)
		tag, err := tx.Exec(ctx, tr.updateRows(cols), args...)
		if err != nil {
			return fmt.Errorf("update %s: %w", tr.FullName(), err)
		}
		if tag.RowsAffected() != int64(len(states)) {
			return diverged(tr.table, states[0].key, fmt.Sprintf("updates %d rows of which the mirror has %d, this key or a later one", len(states), tag.RowsAffected()))
		}
	}
	return nil
}

// routed writes rows of a table that has pending changes: to the mirror, to base, or by settlement (rules R2, R3).
func (tr *tableRows) routed(ctx context.Context, tx pgx.Tx, decided map[string]*verdict) error {
	keys := make([][]string, 0, len(tr.order)+len(decided))
	for _, st := range tr.order {
		keys = append(keys, st.key)
	}
	for id, v := range decided {
		if tr.rows[id] == nil {
			keys = append(keys, v.key)
		}
	}
	at, err := tr.standings(ctx, tx, keys)
	if err != nil {
		return err
	}
	type task struct {
		st     *rowState // nil: the key has a verdict but no new image
		key    []string
		s      standing
		v      *verdict
		settle bool
	}
	var direct []*rowState
	var tasks []task
	var lookKeys [][]string // keys whose base image is needed, for the tasks in look
	var lookFirst []int64
	var look []int
	for i, key := range keys {
		id := keyID(key)
		st, v, s := tr.rows[id], decided[id], at[i]
		if (!conflict.Route(int(s.pending)) || sabotage.On(sabotage.ForgetPending)) && v == nil {
			direct = append(direct, st)
			continue
		}
		k := task{st: st, key: key, s: s, v: v, settle: !conflict.Route(int(s.pending))}
		if st == nil && !k.settle && s.hasBase {
			continue // a verdict without an image, others pending, base as it is
		}
		if st == nil || st.img.holes() {
			first := s.first
			if v != nil && (first == 0 || v.first < first) {
				first = v.first
			}
			look, lookKeys, lookFirst = append(look, len(tasks)), append(lookKeys, key), append(lookFirst, first)
		}
		tasks = append(tasks, k)
	}
	bases := map[int]baseRow{}
	if len(look) > 0 {
		rows, err := tr.baseImages(ctx, tx, lookKeys, lookFirst)
		if err != nil {
			return err
		}
		for j, i := range look {
			bases[i] = rows[j]
		}
	}
	var puts []baseRow
	var drops [][]string
	var settled []settlement
	for i, k := range tasks {
		b := bases[i]
		b.key = k.key
		if k.st != nil {
			img := k.st.img
			if img.holes() {
				if b.img == nil {
					return diverged(tr.table, k.key, "updates a row that is absent in base")
				}
				img.fill(b.img)
			}
			before := conflict.Initial
			if k.s.hasBase {
				before = k.s.writer
			}
			b.img, b.writer, b.by = img, k.st.writer(before), author{}
			if k.st.last != nil {
				b.by = k.st.last.authors[authorKey(tr.ID, keyID(k.key))]
			}
		}
		if !k.settle {
			puts = append(puts, b)
			continue
		}
		settled = append(settled, settlement{key: k.key, base: b.img, writer: b.writer, by: b.by, accepted: true})
		if k.s.hasBase {
			drops = append(drops, k.key)
		}
	}
	if err := tr.write(ctx, tx, direct); err != nil {
		return err
	}
	if err := tr.putBases(ctx, tx, puts); err != nil {
		return err
	}
	if err := tr.settle(ctx, tx, settled); err != nil {
		return err
	}
	return tr.dropBases(ctx, tx, drops)
}

// truncate empties a table. Keys with pending changes are absent in base from now on.
func (b *batch) truncate(ctx context.Context, t *table) error {
	if err := b.flush(ctx, false); err != nil {
		return err
	}
	_, err := b.tx.Exec(ctx, fmt.Sprintf(`DELETE FROM %s AS m WHERE NOT EXISTS (SELECT 1 FROM waystage.change AS c
		WHERE c.state = 'merged' AND c.tbl = $1 AND c.key = %s)`, t.Ident(), t.mirrorKey("m")), t.ID)
	if err != nil {
		return fmt.Errorf("truncate %s: %w", t.FullName(), err)
	}
	own := b.cur != nil
	_, err = b.tx.Exec(ctx, `INSERT INTO waystage.base AS b (tbl, key, img, writer)
		SELECT DISTINCT tbl, key, NULL::jsonb, $2::text FROM waystage.change WHERE state = 'merged' AND tbl = $1
		ON CONFLICT (tbl, key) DO UPDATE SET img = NULL, lw = NULL, mver = 0,
			writer = CASE b.writer WHEN 'own' THEN $3 WHEN 'initial' THEN $2 ELSE $4 END`, t.ID,
		writerName[conflict.Initial.After(own)], writerName[conflict.Own.After(own)], writerName[conflict.Foreign.After(own)])
	if err != nil {
		return fmt.Errorf("truncate base of %s: %w", t.FullName(), err)
	}
	return nil
}
