package stages

import (
	"fmt"
	"strings"

	"github.com/waystage/waystage/internal/sabotage"
	"github.com/waystage/waystage/schema"
)

// replySQL is the reply's SQL for one subscription. All parameters and results are text.
type replySQL struct {
	keys    string // the user's keys: $1 user, $2 attributes; empty: all rows
	changed string // rows of kept keys since the cursor: $1 xmin, $2 keys
	whole   string // all rows of new keys: $1 keys
	deleted string // keys of rows that left: $1 xmin, $2 kept keys, $3 all keys
	news    string // whether changed or deleted give something that a snapshot did not see: their parameters, $4 (all rows: $2) snapshot
	left    string // keys of the rows of keys that are gone: $1 those; empty: the device finds them by the keys' texts
	own     string // keys of rows that a session's records wrote and that are not the user's (any more): $1 session, $2 all keys
	count   string // about how many rows whole gives: $1 keys
	width   int    // columns of a primary key
}

func newReplySQL(s *subscription) *replySQL {
	t := s.table
	tombstone := "waystage.tombstone"
	if sabotage.On(sabotage.SkipTombstone) {
		tombstone = "(SELECT * FROM waystage.tombstone WHERE hashtext(key::text) % 3 <> 0)"
	}
	cols := make([]string, 0, len(s.columns)+1)
	cols = append(cols, "m._ws_version")
	for _, name := range s.columns {
		cols = append(cols, "m."+schema.Quote(name))
	}
	list := strings.Join(cols, ", ")
	var dead, alive []string
	for i, k := range t.Key {
		c, _ := t.Column(k)
		dead = append(dead, fmt.Sprintf("t.key[%d]", i+1))
		alive = append(alive, fmt.Sprintf("m.%s = (t.key[%d])::%s", schema.Quote(k), i+1, castType(c.MirrorType)))
		if c.Loose() { // an equal key that is written otherwise is another row to a device
			alive = append(alive, fmt.Sprintf("%s = t.key[%d]", c.Text("m."+schema.Quote(k)), i+1))
		}
	}
	from := "\nFROM " + t.Ident() + " m"
	q := &replySQL{width: len(t.Key)}
	if s.Key == "" {
		q.changed = "SELECT " + list + from + " WHERE m._ws_version >= $1::bigint"
		q.whole = "SELECT " + list + from
		q.count = "SELECT greatest(c.reltuples, 0)::bigint FROM pg_class c WHERE c.oid = " + schema.Literal(t.Ident()) + "::regclass"
		q.deleted = fmt.Sprintf("SELECT DISTINCT %s\nFROM %s t WHERE t.tbl = %d AND t.stamp >= $1::bigint AND NOT EXISTS (SELECT%s WHERE %s OFFSET 0)",
			strings.Join(dead, ", "), tombstone, t.ID, from, strings.Join(alive, " AND "))
		q.news = newsSQL(q.changed, q.deleted, "$2")
		return q
	}
	c, _ := t.Column(s.Key)
	in := func(param string) string {
		return fmt.Sprintf("m.%s = ANY ((%s::text[])::%s[])", schema.Quote(s.Key), param, castType(c.MirrorType))
	}
	q.keys = s.KeyQuery("$1", "$2")
	q.changed = "SELECT " + list + from + " WHERE " + in("$2") + " AND m._ws_version >= $1::bigint"
	q.whole = "SELECT " + list + from + " WHERE " + in("$1")
	q.count = "SELECT count(*)" + from + " WHERE " + in("$1")
	// A row that moved from one key of the user to another has a tombstone and is alive. It is looked up by its primary
	// key (OFFSET 0), not by the user's keys, of which there may be many.
	outside := func(all string) string {
		return fmt.Sprintf("NOT EXISTS (SELECT FROM (SELECT m.*%s WHERE %s OFFSET 0) m WHERE %s)", from, strings.Join(alive, " AND "), in(all))
	}
	before := "t.val = ANY ($2::text[])"
	if s.LooseKey() {
		// Compared as values. A tombstone from when the table had another subset key is nobody's: its text may be no number.
		before = fmt.Sprintf("CASE WHEN t.val ~ %s THEN (t.val)::numeric = ANY (($2::text[])::numeric[]) END", schema.Literal(number))
		var keys []string
		for _, k := range t.Key {
			pk, _ := t.Column(k)
			keys = append(keys, pk.Text("m."+schema.Quote(k)))
		}
		q.left = "SELECT " + strings.Join(keys, ", ") + from + " WHERE " + in("$1")
	}
	q.deleted = fmt.Sprintf("SELECT DISTINCT %s\nFROM %s t WHERE t.tbl = %d AND %s AND t.stamp >= $1::bigint AND %s",
		strings.Join(dead, ", "), tombstone, t.ID, before, outside("$3"))
	q.own = fmt.Sprintf("SELECT DISTINCT %s\nFROM waystage.change t WHERE t.session_id = $1::bigint AND t.tbl = %d AND t.op <> 'D' AND t.state IN ('merged', 'applied') AND %s",
		strings.Join(dead, ", "), t.ID, outside("$2"))
	q.news = newsSQL(q.changed, q.deleted, "$4")
	return q
}

// number is what PostgreSQL writes for a numeric.
const number = `^(-?[0-9]+(\.[0-9]+)?|NaN|-?Infinity)$`

// newsSQL asks whether the queries give something that a snapshot did not see. What is at or above the cursor's horizon may
// have been sent already, as long as a transaction that was open then holds the horizon back.
func newsSQL(changed, deleted, snapshot string) string {
	return "SELECT EXISTS (" + changed + unseen("m._ws_version", snapshot) + ") OR EXISTS (" + deleted + unseen("t.stamp", snapshot) + ")"
}

// unseen restricts to stamps that a snapshot did not see; of a snapshot that is not known any more, it saw none.
func unseen(stamp, snapshot string) string {
	return " AND NOT coalesce(pg_visible_in_snapshot(" + stamp + "::text::xid8, " + snapshot + "::pg_snapshot), false)"
}

// openSQL finds sessions to be answered: $1 how long a session may wait for the source, in seconds; $2 sessions and $3 sets
// to leave alone; $4 how many. A session-level advisory lock keeps other workers off without writing anything; the
// limit ends the locking.
const openSQL = `
SELECT c.id FROM (
	SELECT s.id FROM waystage.session s
	WHERE s.state = 'merged' AND NOT s.id = ANY ($2::bigint[]) AND NOT s.set_name = ANY ($3::text[])
		AND (NOT s.wait_source OR s.merged_at < clock_timestamp() - make_interval(secs => $1)
			OR NOT EXISTS (SELECT FROM waystage.change c WHERE c.session_id = s.id AND c.state = 'merged'))
	ORDER BY s.id LIMIT 4 * $4) c
WHERE pg_try_advisory_lock(6291456000000000000 + c.id)
LIMIT $4`

// sessionsSQL reads the locked sessions that nobody has answered meanwhile.
const sessionsSQL = `
SELECT s.id, s.device_id, s.user_name, s.device_name, u.groups, u.attributes::text, s.token, s.incarnation, s.n, s.nonce, s.set_name,
	s.cursor_from, s.schema_hash, s.content_type, s.encoding, s.records, s.verify,
	s.verify IS NOT NULL AND EXISTS (SELECT FROM waystage.device d LEFT JOIN waystage.device_check k ON k.device_id = d.id AND k.set_name = s.set_name
		WHERE d.id = s.device_id AND d.verify_asked_at > coalesce(k.told_at, '-infinity')),
	s.files, s.new_key, coalesce(b.hash, ''), b.built
FROM waystage.session s JOIN waystage.app_user u ON u.name = s.user_name
	JOIN waystage.device v ON v.id = s.device_id LEFT JOIN waystage.built b ON b.hash = v.built
WHERE s.id = ANY ($1) AND s.state = 'merged' ORDER BY s.id`

// layoutSQL reads which layout is in force.
const layoutSQL = `SELECT value::bigint FROM waystage.meta WHERE key = 'layout'`

// cursorsSQL reads the cursors that the sessions start from, with the hashes of their key sets.
const cursorsSQL = `
SELECT c.token, c.device_id, c.set_name, c.since, c.created_at, c.refresh, c.keysets::text,
	coalesce((SELECT jsonb_object_agg(k.id::text, encode(k.hash, 'hex'))::text
		FROM jsonb_each_text(c.keysets->'tables') e JOIN waystage.keyset k ON k.id = e.value::bigint), '{}')
FROM waystage.cursor c WHERE c.token = ANY ($1)`

// newVerdictsSQL asks whether a verdict waits that no reply has told: $1 device, $2 least xmin of its cursors, $3 their snapshots.
var newVerdictsSQL = "SELECT EXISTS (SELECT FROM waystage.change c WHERE c.device_id = $1 AND c.stamp >= $2" +
	" AND NOT EXISTS (SELECT FROM unnest($3::text[]) AS seen WHERE pg_visible_in_snapshot(c.stamp::text::xid8, seen::pg_snapshot)))"

// ordersSQL reads the last order to send everything that each session's device and set is under: $1 devices, $2 users, $3 sets.
const ordersSQL = `
SELECT u.i, o.id FROM unnest($1::bigint[], $2::text[], $3::text[]) WITH ORDINALITY AS u(device, name, set_name, i)
JOIN LATERAL (SELECT r.id FROM waystage.refresh r WHERE (r.device_id IS NULL OR r.device_id = u.device)
	AND (r.user_name IS NULL OR r.user_name = u.name) AND (r.sets IS NULL OR u.set_name = ANY (r.sets)) ORDER BY r.id DESC LIMIT 1) o ON true`

// verdictsSQL reads the verdicts that a reply tells (rule D5): $1 device, $2 xmin of the cursor, $3 session. They are of all
// the device's incarnations: what a restored file's earlier life had merged may still be refused by the source. stamp + 0 keeps the planner from reading all older stamps in the index.
const verdictsSQL = `
SELECT v.incarnation, v.n, v.idx, v.tname, v.key, v.state, v.version, coalesce(v.code, ''), coalesce(v.detail, ''),
	coalesce(v.constraint_name, ''), v.id, v.session_id = $3, coalesce(v.resolved ? 'merge', false),
	coalesce(v.resolved->'source'->>'policy', v.resolved->'merge'->>'policy', '')
FROM (
	SELECT * FROM waystage.change WHERE device_id = $1 AND stamp >= $2
	UNION ALL
	SELECT * FROM waystage.change WHERE session_id = $3 AND stamp + 0 < $2) v
ORDER BY v.session_id, v.idx`
