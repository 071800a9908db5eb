package stages

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/internal/sabotage"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// cursor is what a device's cursor token stands for.
type cursor struct {
	token     string
	deviceID  int64
	set       string
	xmin      int64
	createdAt time.Time
	refresh   int64 // the last order to send everything that was carried out
	keysets   keysets
	hashes    map[string]string // keyset id -> hash in hex
}

// keysets is the jsonb of waystage.cursor.keysets.
type keysets struct {
	Schema string           `json:"schema"` // hash of the definitions that the reply was composed by
	Tables map[string]int64 `json:"tables"` // table -> keyset id, of the tables with a subset key
}

// subset is what a session gets of one table.
type subset struct {
	sub    *subscription
	all    []string // the user's keys, sorted
	hash   []byte
	keyset int64 // id of the stored key set, 0: not stored yet

	kept, fresh, gone []string
}

// replyBatch answers sessions from one snapshot.
type replyBatch struct {
	r        *Reply
	ctx      context.Context
	cat      *Catalog
	conn     *pgxpool.Conn
	tx       pgx.Tx
	sessions []*session
	xmin     int64
	snapshot string // the whole of it: the verdicts in it are told
}

func (b *replyBatch) ids() []int64 {
	ids := make([]int64, len(b.sessions))
	for i, s := range b.sessions {
		ids[i] = s.id
	}
	return ids
}

// run composes the replies, stores their cursors, and only then lets the last pages, which carry them, out.
func (b *replyBatch) run() error {
	var shared *common
	if len(b.sessions) > 1 {
		shared = &common{encoded: map[string]*encodedTables{}}
	}
	for _, s := range b.sessions {
		s.pages = newPages(s, b.r.output, b.r.cfg, b.cat.epoch)
		s.pages.common = shared
		b.admit(s)
	}
	if err := b.compose(); err != nil {
		if pgerr.Is(err, "0A000", "26000") {
			// A table was altered under the prepared statements of this connection.
			if err := b.conn.Conn().DeallocateAll(b.ctx); err != nil {
				b.r.log.Debug("prepared statements were not dropped", zap.Error(err))
			}
		}
		return err
	}
	if err := b.keepCursors(); err != nil {
		return fmt.Errorf("store cursors: %w", err)
	}
	var failed error
	for _, s := range b.sessions {
		if err := s.finish(b.ctx); err != nil {
			failed = err
			break
		}
		if s.refusal != nil {
			b.r.metrics.refused(s.refusal.Code)
		}
	}
	for _, s := range b.sessions {
		if err := s.pages.wait(b.ctx); failed == nil {
			failed = err
		}
	}
	if failed != nil {
		return failed
	}
	if err := b.close(); err != nil {
		return fmt.Errorf("note %d sessions as replied: %w", len(b.sessions), err)
	}
	for _, s := range b.sessions {
		if err := b.r.output.Ready(s.user, s.device, s.token, s.pages.number, s.contentType, s.encoding, s.pages.only); err != nil {
			b.r.log.Warn("gateways were not told of a reply", zap.String("session", s.token), zap.Error(err))
		}
		b.r.metrics.records("sent", int(s.pages.rows))
	}
	return nil
}

// admit refuses a session whose set its user does not have any more. One that had records is told their verdicts, and that the set
// is gone.
func (b *replyBatch) admit(s *session) {
	ok, sets := b.cat.allows(s.groups, s.set)
	s.pages.first.Sets, s.pages.first.NewKey = sets, s.newKey
	if s.gone = !ok && s.records > 0; s.gone {
		return
	}
	if !ok {
		s.refusal = &protocol.Error{Code: protocol.CodeUnknownSet, Message: fmt.Sprintf("user %s has no subscription set %q", s.user, s.set)}
		return
	}
	s.view = b.cat.view(s.set, s.built, s.builtOf)
	if wire := s.view.wireFor(s); wire != nil && wire.Hash != s.schema {
		s.pages.first.Schema = wire
	}
	if s.filesKnown != nil {
		for _, f := range s.view.files {
			s.files = append(s.files, fileset{file: f})
		}
	}
	for _, sub := range s.view.subs {
		if sub.Downloads() {
			s.tables = append(s.tables, subset{sub: sub})
		}
	}
}

// compose reads one snapshot. All pages but each session's last are stored on the way.
func (b *replyBatch) compose() (err error) {
	b.tx, err = b.conn.BeginTx(b.ctx, snapshotMode())
	if err != nil {
		return fmt.Errorf("begin a snapshot: %w", err)
	}
	defer rollback(b.tx)
	cursors, err := b.gather()
	if err != nil {
		return fmt.Errorf("read cursors, keys and verdicts: %w", err)
	}
	if err := b.resume(cursors); err != nil {
		return err
	}
	if err := b.verdicts(); err != nil {
		return fmt.Errorf("read verdicts: %w", err)
	}
	if err := b.rows(); err != nil {
		return err
	}
	if err := b.files(); err != nil {
		return err
	}
	if err := b.verify(); err != nil {
		return err
	}
	for _, s := range b.sessions {
		s.renew = s.from == nil || !s.pages.empty() || s.keysChanged() || time.Since(s.from.createdAt) > b.r.cfg.Renew
	}
	return nil
}

// resume finds what each session starts from, and how its key sets have moved since.
func (b *replyBatch) resume(cursors map[string]*cursor) error {
	for _, s := range b.sessions {
		c := cursors[s.cursorFrom]
		if c != nil && s.watching {
			b.showFiles(s, c)
		}
		if c != nil && c.deviceID == s.deviceID && c.set == s.set && strings.HasPrefix(s.cursorFrom, b.cat.epoch+".") && c.keysets.Schema == b.schemaHash(s) && c.refresh >= s.refresh {
			s.from = c
		}
		s.pages.first.Refresh = s.from == nil || s.gone
	}
	if err := b.compare(); err != nil {
		return fmt.Errorf("compare key sets: %w", err)
	}
	if err := b.compareFiles(); err != nil {
		return fmt.Errorf("compare key sets of files: %w", err)
	}
	return nil
}

func (b *replyBatch) schemaHash(s *session) string {
	if s.view != nil && s.view.wire != nil {
		return s.view.wireFor(s).Hash
	}
	return ""
}

// gather reads, in one round trip, the snapshot's horizon, the cursors and every user's keys; these as the role that
// may read the mirror and nothing else.
func (b *replyBatch) gather() (map[string]*cursor, error) {
	tokens := make([]string, 0, len(b.sessions))
	for _, s := range b.sessions {
		if s.cursorFrom != "" {
			tokens = append(tokens, s.cursorFrom)
		}
	}
	cursors := make(map[string]*cursor, len(tokens))
	batch := &pgx.Batch{}
	layout := b.cat.layout
	batch.Queue(`SELECT pg_snapshot_xmin(s)::text::bigint, s::text, (` + layoutSQL + `) FROM pg_current_snapshot() s`).
		QueryRow(func(row pgx.Row) error { return row.Scan(&b.xmin, &b.snapshot, &layout) })
	if len(tokens) > 0 {
		batch.Queue(cursorsSQL, tokens).Query(func(rows pgx.Rows) error {
			for rows.Next() {
				c := &cursor{}
				var sets, hashes string
				if err := rows.Scan(&c.token, &c.deviceID, &c.set, &c.xmin, &c.createdAt, &c.refresh, &sets, &hashes); err != nil {
					return err
				}
				if err := json.Unmarshal([]byte(sets), &c.keysets); err != nil {
					return fmt.Errorf("key sets of cursor %s: %w", c.token, err)
				}
				if err := json.Unmarshal([]byte(hashes), &c.hashes); err != nil {
					return fmt.Errorf("key sets of cursor %s: %w", c.token, err)
				}
				cursors[c.token] = c
			}
			return rows.Err()
		})
	}
	batch.Queue(ordersSQL, b.identities()...).Query(func(rows pgx.Rows) error {
		var i, id int64
		_, err := pgx.ForEachRow(rows, []any{&i, &id}, func() error {
			b.sessions[i-1].refresh = id
			return nil
		})
		return err
	})
	var bad *setError
	asked := false
	settings := func() {
		if !asked {
			asked = true
			for _, sql := range readerSettings {
				batch.Queue(sql)
			}
		}
	}
	for _, s := range b.sessions {
		s.fileKeys(batch, settings, func(e *setError) {
			if bad == nil {
				bad = e
			}
		})
		for i := range s.tables {
			t := &s.tables[i]
			if t.sub.Key == "" || s.refusal != nil {
				continue
			}
			settings()
			batch.Queue(t.sub.reply.keys, s.user, s.attributes).Query(func(rows pgx.Rows) (err error) {
				if t.all, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil && bad == nil {
					bad = &setError{set: s.set, table: t.sub.Table, err: err}
				}
				slices.Sort(t.all)
				t.hash = hashKeys(t.all)
				return err
			})
		}
	}
	if asked {
		batch.Queue("ROLLBACK TO SAVEPOINT ws_reader")
		batch.Queue("RELEASE SAVEPOINT ws_reader")
	}
	err := b.tx.SendBatch(b.ctx, batch).Close()
	if layout != b.cat.layout {
		return nil, &outdated{layout} // whatever else went wrong
	}
	if err != nil {
		if bad != nil && pgerr.Class(bad.err) != pgerr.Retryable {
			return nil, bad
		}
		return nil, err
	}
	return cursors, nil
}

// identities are the devices, users and sets of the sessions.
func (b *replyBatch) identities() []any {
	devices, users, sets := make([]int64, len(b.sessions)), make([]string, len(b.sessions)), make([]string, len(b.sessions))
	for i, s := range b.sessions {
		devices[i], users[i], sets[i] = s.deviceID, s.user, s.set
	}
	return []any{devices, users, sets}
}

// snapshotMode makes all queries of a reply see one state of the mirror.
func snapshotMode() pgx.TxOptions {
	if sabotage.On(sabotage.TornSnapshot) {
		return pgx.TxOptions{AccessMode: pgx.ReadOnly}
	}
	return pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
}

// readerSettings come before queries of definitions; a rollback to the savepoint undoes them, whatever the queries did.
var readerSettings = []string{
	"SAVEPOINT ws_reader",
	"SET LOCAL ROLE " + schema.Quote(schema.ReaderRole),
	"SET LOCAL transaction_read_only = on",
	"SET LOCAL enable_seqscan = on",
	"SET LOCAL enable_hashjoin = on",
	"SET LOCAL enable_mergejoin = on",
	"SET LOCAL plan_cache_mode = auto",
	"SET LOCAL statement_timeout = '30s'",
}

func hashKeys(keys []string) []byte {
	h := sha256.New()
	var n [8]byte
	for _, k := range keys {
		binary.BigEndian.PutUint64(n[:], uint64(len(k)))
		h.Write(n[:])
		h.Write([]byte(k))
	}
	return h.Sum(nil)
}

// compare finds which keys are new to the devices, gone, or kept. Old key sets are read only where they differ.
func (b *replyBatch) compare() error {
	var ids []int64
	for _, s := range b.sessions {
		for i := range s.tables {
			t := &s.tables[i]
			if s.from == nil || t.sub.Key == "" {
				t.fresh = t.all
				continue
			}
			id := s.from.keysets.Tables[t.sub.Table]
			if s.from.hashes[strconv.FormatInt(id, 10)] == hex.EncodeToString(t.hash) {
				t.keyset, t.kept = id, t.all
			} else {
				ids = append(ids, id)
			}
		}
	}
	if len(ids) == 0 {
		return nil
	}
	rows, err := b.tx.Query(b.ctx, `SELECT id, keys FROM waystage.keyset WHERE id = ANY ($1)`, ids)
	if err != nil {
		return err
	}
	old := map[int64][]string{}
	var id int64
	var keys []string
	_, err = pgx.ForEachRow(rows, []any{&id, &keys}, func() error {
		old[id], keys = keys, nil
		return nil
	})
	if err != nil {
		return err
	}
	for _, s := range b.sessions {
		for i := range s.tables {
			t := &s.tables[i]
			if s.from == nil || t.sub.Key == "" || t.keyset != 0 {
				continue
			}
			had, ok := old[s.from.keysets.Tables[t.sub.Table]]
			if !ok {
				// The key set is gone, so nobody knows what the device has.
				s.from, s.pages.first.Refresh = nil, true
				for i := range s.tables {
					s.tables[i].kept, s.tables[i].gone, s.tables[i].fresh = nil, nil, s.tables[i].all
				}
				break
			}
			t.kept, t.fresh, t.gone = diff(had, t.all)
			if sabotage.On(sabotage.LeakKey) {
				t.kept, t.gone = append(t.kept, t.gone...), nil
			}
		}
	}
	return nil
}

// diff compares two sorted lists.
func diff(old, now []string) (kept, fresh, gone []string) {
	i, j := 0, 0
	for i < len(old) || j < len(now) {
		switch {
		case j == len(now) || i < len(old) && old[i] < now[j]:
			gone = append(gone, old[i])
			i++
		case i == len(old) || now[j] < old[i]:
			fresh = append(fresh, now[j])
			j++
		default:
			kept = append(kept, now[j])
			i, j = i+1, j+1
		}
	}
	return kept, fresh, gone
}

func (s *session) keysChanged() bool {
	return slices.ContainsFunc(s.tables, func(t subset) bool { return t.sub.Key != "" && t.keyset == 0 }) ||
		slices.ContainsFunc(s.files, func(f fileset) bool { return f.file.Pattern.HasKey && f.keyset == 0 })
}

// nobodysVersion is set in the version that a device is told for what a policy merged with others' work: no row has such a version. What
// the device sent is not what the row is, so its next edit on top of that must be judged by its base image.
const nobodysVersion = 1 << 62

// carriedOut is the last order to send everything that the device has done with once it has applied the reply.
func (s *session) carriedOut() int64 {
	if s.from != nil {
		return max(s.refresh, s.from.refresh)
	}
	return s.refresh
}

// verdicts reads what is told of the sessions' records, and of earlier ones (rule D5), in the rows' snapshot; and, for
// those that get everything, about how much that is.
func (b *replyBatch) verdicts() error {
	batch := &pgx.Batch{}
	for _, s := range b.sessions {
		if s.refusal != nil {
			continue
		}
		var xmin int64
		if s.from != nil {
			xmin = s.from.xmin
		}
		batch.Queue(verdictsSQL, s.deviceID, xmin, s.id).Query(func(rows pgx.Rows) error {
			for rows.Next() {
				var v protocol.Verdict
				var version int64
				var own, merged bool
				err := rows.Scan(&v.Incarnation, &v.N, &v.Index, &v.Table, &v.Key, &v.State, &version, &v.Code, &v.Detail, &v.Constraint, &v.ID, &own, &merged, &v.Policy)
				if err != nil {
					return err
				}
				if merged && version != 0 && !sabotage.On(sabotage.MergeVersion) {
					version |= nobodysVersion
				}
				if version != 0 && (v.State == protocol.Merged || v.State == protocol.Applied) {
					v.Version = strconv.FormatInt(version, 10)
				}
				s.open = s.open || own && v.State == protocol.Merged
				s.verdicts = append(s.verdicts, v)
			}
			return rows.Err()
		})
		if s.from != nil {
			continue
		}
		for i := range s.tables {
			t := &s.tables[i]
			var args []any
			if t.sub.Key != "" {
				args = append(args, t.fresh)
			}
			batch.Queue(t.sub.reply.count, args...).QueryRow(func(row pgx.Row) error {
				var n int64
				err := row.Scan(&n)
				s.pages.first.Rows += n
				return err
			})
		}
	}
	if batch.Len() == 0 {
		return nil
	}
	return b.tx.SendBatch(b.ctx, batch).Close()
}

// keepCursors stores the new cursors and their key sets, and drops those that the devices cannot hold any more: a
// device that asks with a cursor has no other of that set.
func (b *replyBatch) keepCursors() error {
	var renewed []*session
	for _, s := range b.sessions {
		switch {
		case s.refusal != nil:
		case s.renew:
			s.cursor = b.cat.epoch + "." + strconv.FormatInt(b.xmin, 10) + "." + randomID()
			renewed = append(renewed, s)
		default:
			s.cursor = s.cursorFrom
		}
	}
	if len(renewed) == 0 {
		return nil
	}
	// New key sets in the order of their hashes, so that workers do not lock them crosswise.
	var missing []*subset
	for _, s := range renewed {
		for i := range s.tables {
			if t := &s.tables[i]; t.sub.Key != "" && t.keyset == 0 {
				missing = append(missing, t)
			}
		}
		for i := range s.files {
			if f := &s.files[i]; f.file.Pattern.HasKey && f.keyset == 0 {
				missing = append(missing, &f.subset)
			}
		}
	}
	slices.SortFunc(missing, func(a, b *subset) int { return bytes.Compare(a.hash, b.hash) })
	tx := &piped{conn: b.conn, begin: "BEGIN"}
	defer tx.undo()
	if len(missing) > 0 {
		batch := &pgx.Batch{}
		for _, t := range missing {
			batch.Queue(`INSERT INTO waystage.keyset (hash, keys) VALUES ($1, $2) ON CONFLICT (hash) DO UPDATE SET created_at = now() RETURNING id`, t.hash, t.all).
				QueryRow(func(row pgx.Row) error { return row.Scan(&t.keyset) })
		}
		if err := tx.SendBatch(b.ctx, batch).Close(); err != nil {
			return err
		}
	}
	var tokens, incarnations, sets, froms, keys []string
	var devices, ids, orders []int64
	for _, s := range renewed {
		k := keysets{Schema: b.schemaHash(s), Tables: map[string]int64{}}
		for _, t := range s.tables {
			if t.sub.Key != "" {
				k.Tables[t.sub.Table] = t.keyset
			}
		}
		for _, f := range s.files {
			if f.file.Pattern.HasKey {
				k.Tables[f.keysetName()] = f.keyset
			}
		}
		body, err := json.Marshal(k)
		if err != nil {
			return err
		}
		tokens, incarnations, sets, froms = append(tokens, s.cursor), append(incarnations, s.incarnation), append(sets, s.set), append(froms, s.cursorFrom)
		devices, ids, keys, orders = append(devices, s.deviceID), append(ids, s.id), append(keys, string(body)), append(orders, s.carriedOut())
	}
	since := b.xmin
	if sabotage.On(sabotage.OffByOne) {
		since++
	}
	batch := &pgx.Batch{}
	batch.Queue(`DELETE FROM waystage.cursor c USING unnest($1::bigint[], $2::text[], $3::text[], $4::bigint[]) AS u(device, name, token, session)
		WHERE c.device_id = u.device AND c.set_name = u.name AND c.token <> u.token AND c.session_id < u.session`, devices, sets, froms, ids)
	batch.Queue(`INSERT INTO waystage.cursor (token, device_id, incarnation, set_name, session_id, since, keysets, refresh)
		SELECT token, device, inc, name, session, $8, keys::jsonb, refresh
		FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::bigint[]) AS u(token, device, inc, name, session, keys, refresh)`,
		tokens, devices, incarnations, sets, ids, keys, orders, since)
	return tx.commit(b.ctx, batch)
}

// close notes the sessions as replied. Were this lost they would be answered once more, which is as good: so nobody
// waits for the disk.
func (b *replyBatch) close() error {
	ids, counts := b.ids(), make([]int, len(b.sessions))
	for i, s := range b.sessions {
		counts[i] = s.pages.number
	}
	batch := &pgx.Batch{}
	batch.Queue("BEGIN")
	batch.Queue("SET LOCAL synchronous_commit = off")
	batch.Queue(`UPDATE waystage.session s SET state = 'replied', replied_at = clock_timestamp(), pages = u.pages, told = $3::pg_snapshot
		FROM unnest($1::bigint[], $2::int[]) AS u(id, pages) WHERE s.id = u.id AND s.state = 'merged'`, ids, counts, b.snapshot)
	for _, s := range b.sessions {
		if s.refusal != nil {
			batch.Queue(`INSERT INTO waystage.refusal (user_name, device_name, token, code, message, received_at, refused_at)
				SELECT user_name, device_name, token, $2, $3, received_at, replied_at FROM waystage.session WHERE id = $1
				ON CONFLICT (user_name, device_name, token) DO UPDATE SET code = excluded.code, message = excluded.message,
					refused_at = excluded.refused_at, times = refusal.times + 1`, s.id, string(s.refusal.Code), clean(s.refusal.Message))
		}
	}
	batch.Queue("COMMIT")
	return b.conn.SendBatch(b.ctx, batch).Close()
}

// finish begins to store the session's last page, or its refusal in place of the reply.
func (s *session) finish(ctx context.Context) error {
	if s.refusal == nil {
		if err := s.refuseOn(s.pages.put(ctx, true)); err != nil || s.refusal == nil {
			return err
		}
	}
	return s.pages.refuse(s.refusal)
}

func randomID() string {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	return hex.EncodeToString(id[:])
}
