package stages

import (
	"context"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/protocol"
)

// stage judges open requests and stages those that are taken, in one transaction. It returns the redelivered ones that
// have been replied to.
func (in *Intake) stage(ctx context.Context, cat *Catalog, reqs []*incoming) (back []*incoming, err error) {
	tx, err := beginPiped(ctx, in.db)
	if err != nil {
		return nil, fmt.Errorf("begin staging: %w", err)
	}
	defer tx.end()
	if err := in.devices(ctx, tx, cat, reqs); err != nil {
		return nil, fmt.Errorf("look up devices: %w", err)
	}
	if err := in.ledgers(ctx, tx, cat, reqs); err != nil {
		return nil, fmt.Errorf("check the session ledger: %w", err)
	}
	var fresh []*incoming
	for _, r := range reqs {
		switch {
		case r.outcome == taken:
			r.records = judge(r.req, cat.sets[r.req.Set], in.cfg.Limits.Row)
			fresh = append(fresh, r)
		case r.outcome == again && r.replied:
			back = append(back, r)
		}
	}
	if len(fresh) == 0 {
		return back, nil // the device rows were only locked
	}
	if err := in.insert(ctx, tx, cat, fresh); err != nil {
		return nil, fmt.Errorf("stage %d sessions: %w", len(fresh), err)
	}
	return back, nil
}

// rollback ends a transaction that was not committed; its own failure means that the connection is gone, and with
// it the transaction.
func rollback(tx pgx.Tx) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = tx.Rollback(ctx)
}

// devices finds the devices, locks their rows in order, and refuses what is refused before the ledger is looked at.
func (in *Intake) devices(ctx context.Context, tx *piped, cat *Catalog, reqs []*incoming) error {
	type identity struct{ user, device string }
	type known struct {
		id      int64
		blocked bool
		groups  []string
		resetAt time.Time
		newKey  bool
		built   string
	}
	users, devices := make([]string, len(reqs)), make([]string, len(reqs))
	for i, r := range reqs {
		users[i], devices[i] = r.user, r.device
	}
	found := map[identity]known{}
	layout := cat.layout
	b := &pgx.Batch{}
	b.Queue(`
		SELECT d.id, d.user_name, d.name, d.blocked OR u.blocked, u.groups, coalesce(d.reset_at, 'epoch'), d.new_key_asked_at IS NOT NULL, coalesce(d.built, ''),
			(SELECT value::bigint FROM waystage.meta WHERE key = 'layout')
		FROM waystage.device d JOIN waystage.app_user u ON u.name = d.user_name
		WHERE (d.user_name, d.name) IN (SELECT * FROM unnest($1::text[], $2::text[])) AND d.removed_at IS NULL
		ORDER BY d.id FOR NO KEY UPDATE OF d`, users, devices).Query(func(rows pgx.Rows) error {
		var k known
		var id identity
		_, err := pgx.ForEachRow(rows, []any{&k.id, &id.user, &id.device, &k.blocked, &k.groups, &k.resetAt, &k.newKey, &k.built, &layout}, func() error {
			found[id] = k
			k.groups = nil
			return nil
		})
		return err
	})
	if err := tx.send(ctx, b); err != nil {
		return err
	}
	if layout != cat.layout {
		return &outdated{layout} // a device may have learnt of it from another process
	}
	for _, r := range reqs {
		k, ok := found[identity{r.user, r.device}]
		r.deviceID, r.resetAt, r.built, r.newKey = k.id, k.resetAt, k.built, k.newKey && r.req.Library != ""
		switch {
		case !ok:
			r.refuse(protocol.CodeBlocked, "device %s of user %s is not known any more; enrol it again", r.device, r.user)
		case k.blocked:
			r.refuse(protocol.CodeBlocked, "device %s or user %s is blocked; ask the operator", r.device, r.user)
		case r.req.Epoch != "" && r.req.Epoch != cat.epoch:
			r.refuse(protocol.CodeEpoch, "the server's mirror was rebuilt: go on under a new incarnation with a full refresh; unsent changes stay")
		default:
			if ok, sets := cat.allows(k.groups, r.req.Set); !ok {
				r.sets = sets
				r.refuse(protocol.CodeUnknownSet, "user %s has no subscription set %q", r.user, r.req.Set)
			}
		}
	}
	return nil
}

// ledgers applies rule D4 to the requests that are still open, in the order in which they came.
func (in *Intake) ledgers(ctx context.Context, tx *piped, cat *Catalog, reqs []*incoming) error {
	var all, newIDs []string
	var devices, newDevices []int64
	for _, r := range reqs {
		if r.outcome != undecided {
			continue
		}
		all, devices = append(all, r.req.Incarnation), append(devices, r.deviceID)
		if r.req.N == 1 {
			newIDs, newDevices = append(newIDs, r.req.Incarnation), append(newDevices, r.deviceID)
		}
	}
	if len(all) == 0 {
		return nil
	}
	b := &pgx.Batch{}
	b.Queue(`INSERT INTO waystage.incarnation (id, device_id)
		SELECT u.id, min(u.device_id) FROM unnest($1::text[], $2::bigint[]) AS u(id, device_id) GROUP BY u.id ORDER BY u.id
		ON CONFLICT (id) DO NOTHING`, newIDs, newDevices)
	ledgers := map[string]*ledger{}
	b.Queue(`SELECT id, device_id, last_n, last_hash, created_at FROM waystage.incarnation WHERE id = ANY ($1) ORDER BY id FOR UPDATE`, all).
		Query(func(rows pgx.Rows) error {
			for rows.Next() {
				var id string
				l := &ledger{}
				if err := rows.Scan(&id, &l.deviceID, &l.lastN, &l.lastHash, &l.createdAt); err != nil {
					return err
				}
				ledgers[id] = l
			}
			return rows.Err()
		})
	under := map[int64][]lease{}
	b.Queue(leasesSQL, devices, in.cfg.Lease.Seconds()).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var device int64
			var l lease
			if err := rows.Scan(&device, &l.incarnation, &l.left); err != nil {
				return err
			}
			under[device] = append(under[device], l)
		}
		return rows.Err()
	})
	var numbers []int64 // for those that are taken: given while their devices are locked, so that they are in order
	b.Queue(`SELECT nextval('waystage.session_id_seq') FROM generate_series(1, $1::int)`, len(all)).Query(func(rows pgx.Rows) (err error) {
		numbers, err = pgx.CollectRows(rows, pgx.RowTo[int64])
		return err
	})
	if err := tx.send(ctx, b); err != nil {
		return err
	}
	var ids []string
	var ns []int64
	redelivered := map[string][]*incoming{}
	for _, r := range reqs {
		if r.outcome != undecided {
			continue
		}
		if other := ofAnother(under[r.deviceID], r.req.Incarnation); other != nil && ledgers[r.req.Incarnation].next(r) {
			r.refuse(protocol.CodeSessionOpen, "another copy of this device's file has a session under way: a copy is a device of its own, enrol it as one; "+
				"this file may go on in %d s if the other has stopped", other.left)
			r.refusal.Retry = other.left
			continue
		}
		// One that was taken before is answered at any time: its device waits for it.
		if wait := cat.opens(r.req.Set); wait > 0 && ledgers[r.req.Incarnation].next(r) {
			r.refuse(protocol.CodeOutside, "set %s is not synced at this time: it opens in %s", r.req.Set, wait.Round(time.Minute))
			r.refusal.Retry = int(math.Ceil(wait.Seconds()))
			continue
		}
		if r.outcome = ledgers[r.req.Incarnation].decide(r); r.outcome == taken {
			under[r.deviceID] = append(under[r.deviceID], lease{r.req.Incarnation, max(1, int(in.cfg.Lease.Seconds()))})
			r.sessionID, numbers = numbers[0], numbers[1:]
		} else if r.outcome == again {
			ids, ns = append(ids, r.req.Incarnation), append(ns, r.req.N)
			redelivered[r.session] = append(redelivered[r.session], r)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	rows, err := tx.conn.Query(ctx, `
		SELECT s.token, s.id, s.pages, s.state IN ('replied', 'closed')
		FROM waystage.session s WHERE (s.incarnation, s.n) IN (SELECT * FROM unnest($1::text[], $2::bigint[]))`, ids, ns)
	if err != nil {
		return err
	}
	var token string
	var id int64
	var pages int
	var replied bool
	_, err = pgx.ForEachRow(rows, []any{&token, &id, &pages, &replied}, func() error {
		for _, r := range redelivered[token] {
			r.sessionID, r.pages, r.replied = id, pages, replied
		}
		return nil
	})
	return err
}

// insert writes sessions, records and ledger, one set statement each, and commits.
func (in *Intake) insert(ctx context.Context, tx *piped, cat *Catalog, reqs []*incoming) error {
	if err := builtFor(ctx, tx.conn, reqs); err != nil {
		return err
	}
	b := &pgx.Batch{}
	if err := in.insertSessions(b, cat, reqs); err != nil {
		return err
	}
	records := 0
	for _, r := range reqs {
		records += len(r.records)
	}
	if records > mostInserted {
		if err := tx.send(ctx, b); err != nil {
			return err
		}
		if err := copyRecords(ctx, tx.conn, reqs); err != nil {
			return err
		}
		b = &pgx.Batch{}
	} else if records > 0 {
		insertRecords(b, reqs, records)
	}
	if err := in.moveLedgers(b, reqs); err != nil {
		return err
	}
	return tx.commit(ctx, b)
}

// mostInserted is up to how many records are inserted with the other statements. COPY costs less for each, and more to begin with.
const mostInserted = 300

// insertRecords queues the records of requests.
func insertRecords(b *pgx.Batch, reqs []*incoming, n int) {
	tbls, sessions, idxs, tnames, ops, keys := make([]int, 0, n), make([]int64, 0, n), make([]int, 0, n), make([]string, 0, n), make([]string, 0, n), make([]string, 0, n)
	bvers, units := make([]int64, 0, n), make([]int64, 0, n)
	bases, imgs, codes, whys := make([]*string, 0, n), make([]*string, 0, n), make([]*string, 0, n), make([]*string, 0, n)
	text := func(b []byte) *string {
		if b == nil {
			return nil
		}
		s := string(b)
		return &s
	}
	for _, q := range reqs {
		for i := range q.records {
			r := &q.records[i]
			tbls, sessions, idxs, tnames, ops = append(tbls, r.tbl), append(sessions, q.sessionID), append(idxs, i), append(tnames, r.tname), append(ops, r.op)
			keys, bvers, units = append(keys, keyArray(r.key)), append(bvers, r.bver), append(units, r.unit)
			bases, imgs = append(bases, text(r.base)), append(imgs, text(r.img))
			var code, why *string
			if r.code != "" {
				c := string(r.code)
				code, why = &c, &r.why
			}
			codes, whys = append(codes, code), append(whys, why)
		}
	}
	b.Queue(`INSERT INTO waystage.staging (tbl, session_id, idx, tname, op, key, bver, base, img, unit, bad_code, bad_detail)
		SELECT tbl, session_id, idx, tname, op, key::text[], bver, base::jsonb, img::jsonb, unit, code, why
		FROM unnest($1::int[], $2::bigint[], $3::int[], $4::text[], $5::text[], $6::text[], $7::bigint[], $8::text[], $9::text[], $10::bigint[], $11::text[], $12::text[])
			AS u(tbl, session_id, idx, tname, op, key, bver, base, img, unit, code, why)`,
		tbls, sessions, idxs, tnames, ops, keys, bvers, bases, imgs, units, codes, whys)
}

// keyArray renders a key as the text of an array.
func keyArray(key []protocol.Value) string {
	b := []byte{'{'}
	for i, v := range key {
		if i > 0 {
			b = append(b, ',')
		}
		if v == nil {
			b = append(b, "NULL"...)
			continue
		}
		b = append(b, '"')
		b = append(b, arrayQuotes.Replace(*v)...)
		b = append(b, '"')
	}
	return string(append(b, '}'))
}

var arrayQuotes = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

// copyRecords copies the records of requests.
func copyRecords(ctx context.Context, conn *pgxpool.Conn, reqs []*incoming) error {
	var at, idx = 0, -1
	next := func() ([]any, error) {
		for idx++; at < len(reqs) && idx >= len(reqs[at].records); {
			at, idx = at+1, 0
		}
		if at == len(reqs) {
			return nil, nil
		}
		r := &reqs[at].records[idx]
		var code, why *string
		if r.code != "" {
			c := string(r.code)
			code, why = &c, &r.why
		}
		return []any{r.tbl, reqs[at].sessionID, idx, r.tname, r.op, r.key, r.bver, r.base, r.img, r.unit, code, why}, nil
	}
	_, err := conn.CopyFrom(ctx, pgx.Identifier{"waystage", "staging"},
		[]string{"tbl", "session_id", "idx", "tname", "op", "key", "bver", "base", "img", "unit", "bad_code", "bad_detail"},
		pgx.CopyFromFunc(next))
	return err
}

// moveLedgers queues what the sessions move in the ledgers and at the devices.
func (in *Intake) moveLedgers(b *pgx.Batch, reqs []*incoming) error {
	var ids, apps, libraries, built []string
	var ns, devices []int64
	var hashes [][]byte
	var oldest []*time.Time
	last := map[string]int{} // the last session of each incarnation stands for it
	for i, r := range reqs {
		last[r.req.Incarnation] = i
	}
	for i, r := range reqs {
		apps, libraries, built, devices = append(apps, clean(r.req.App)), append(libraries, clean(r.req.Library)), append(built, r.built), append(devices, r.deviceID)
		t, err := time.Parse(time.RFC3339, r.req.Oldest)
		if err != nil {
			oldest = append(oldest, nil)
		} else {
			oldest = append(oldest, &t)
		}
		if last[r.req.Incarnation] != i {
			continue
		}
		ids, ns, hashes = append(ids, r.req.Incarnation), append(ns, r.req.N), append(hashes, r.hash)
	}
	b.Queue(`UPDATE waystage.incarnation i SET last_n = u.n, last_hash = u.hash
		FROM unnest($1::text[], $2::bigint[], $3::bytea[]) AS u(id, n, hash) WHERE i.id = u.id`, ids, ns, hashes)
	b.Queue(`UPDATE waystage.device d SET last_seen_at = now(), app = u.app, library = u.library, built = nullif(u.built, ''), oldest_unsent_at = u.oldest
		FROM (SELECT DISTINCT ON (id) * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::timestamptz[], $5::text[]) WITH ORDINALITY AS v(id, app, library, oldest, built, ord) ORDER BY id, ord DESC) u
		WHERE d.id = u.id`, devices, apps, libraries, oldest, built)
	// Whoever opens a session has applied the reply to the one before (rule D1).
	b.Queue(`UPDATE waystage.session s SET state = 'closed', closed_at = clock_timestamp()
		FROM unnest($1::text[], $2::bigint[]) AS u(id, n) WHERE s.incarnation = u.id AND s.n = u.n - 1 AND s.state = 'replied'`, ids, ns)
	return findings(b, reqs)
}

func (in *Intake) insertSessions(b *pgx.Batch, cat *Catalog, reqs []*incoming) error {
	n := len(reqs)
	var (
		ids, devices, ns                                  = make([]int64, n), make([]int64, n), make([]int64, n)
		users, names, tokens, incs, nonces, sets          = make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
		cursors, epochs, schemas, contentTypes, encodings = make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
		hashes                                            = make([][]byte, n)
		waits, newKeys                                    = make([]bool, n), make([]bool, n)
		records                                           = make([]int, n)
		received                                          = make([]time.Time, n)
		verify, files                                     = make([]*string, n), make([]*string, n)
	)
	for i, r := range reqs {
		ids[i], devices[i], ns[i], users[i], names[i], tokens[i] = r.sessionID, r.deviceID, r.req.N, r.user, r.device, r.session
		incs[i], nonces[i], sets[i], cursors[i], epochs[i] = r.req.Incarnation, r.req.Nonce, r.req.Set, r.req.Cursor, r.req.Epoch
		schemas[i], contentTypes[i], encodings[i], hashes[i] = r.req.Schema, r.contentType, r.encoding, r.hash
		newKeys[i] = r.newKey
		waits[i], records[i], received[i] = r.req.Wait == protocol.WaitSource, len(r.records), r.received
		var err error
		if verify[i], err = demand(r.req.Verify); err != nil {
			return err
		}
		if files[i], err = filesDemand(r.req.Files); err != nil {
			return err
		}
	}
	// A session without records has nothing to be merged.
	b.Queue(`
		INSERT INTO waystage.session (id, device_id, n, user_name, device_name, token, incarnation, nonce, set_name, cursor_from, epoch,
			schema_hash, content_type, encoding, hash, wait_source, records, received_at, verify, files, new_key, judged_by, state, merged_at)
		OVERRIDING SYSTEM VALUE
		SELECT id, device_id, n, user_name, device_name, token, incarnation, nonce, set_name, cursor_from, epoch,
			schema_hash, content_type, encoding, hash, wait_source, records, received_at, verify::jsonb, files::jsonb, new_key, $21,
			CASE WHEN records = 0 THEN 'merged' ELSE 'staged' END, CASE WHEN records = 0 THEN clock_timestamp() END
		FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[],
			$11::text[], $12::text[], $13::text[], $14::bytea[], $15::boolean[], $16::int[], $17::timestamptz[], $18::text[], $19::text[], $20::boolean[], $22::bigint[])
			AS u(device_id, n, user_name, device_name, token, incarnation, nonce, set_name, cursor_from, epoch,
			schema_hash, content_type, encoding, hash, wait_source, records, received_at, verify, files, new_key, id)`,
		devices, ns, users, names, tokens, incs, nonces, sets, cursors, epochs, schemas, contentTypes, encodings, hashes, waits, records, received, verify, files, newKeys, cat.layout, ids)
	return nil
}
