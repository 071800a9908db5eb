package stages

import (
	"fmt"
	"slices"
	"strings"

	"github.com/waystage/waystage/schema"
)

// tableSQL is the merge's SQL for one table. In all of it s is the staged record, m the mirror row of its key, e its
// session.
type tableSQL struct {
	table *schema.Table
	key   string // subset key column, the same in all subscriptions that have one; empty: none

	facts      string // $1 sessions
	factsOf    string // $1 sessions, $2 indexes: of these records only
	clashes    string // what conflict policies need; $1 sessions, $2 indexes
	change     string // the ledger's rows
	insert     string
	update     string
	delete     string
	invalid    string // marks records whose values do not fit; $1 sessions
	invalidOne string // marks one record; $1 session, $2 index, $3 code, $4 detail
}

func newTableSQL(t *schema.Table, key string) *tableSQL {
	q := &tableSQL{table: t, key: key}
	var (
		join   []string // m's key = s's key
		canon  []string // the key's text as the server writes it
		real   []string // the same, but as the row has it if there is one: 1.0 and 1.00 are one key
		object []string // the key as arguments of jsonb_build_object
		names  []string // column names as literals
		texts  []string // m's values as text
		same   []string // values that the record would leave
		based  []string // values of the base image
		now    []string // m's values
		set    []string
		cols   []string // of the insert
		vals   []string
	)
	for i, k := range t.Key {
		c, _ := t.Column(k)
		ref := fmt.Sprintf("s.key[%d]", i+1)
		join = append(join, fmt.Sprintf("m.%s = (%s)::%s", schema.Quote(k), ref, castType(c.MirrorType)))
		canon = append(canon, c.Text(fmt.Sprintf("(%s)::%s", ref, textType(c.MirrorType))))
		real = append(real, "coalesce("+c.Text("m."+schema.Quote(k))+", "+canon[i]+")")
		object = append(object, schema.Literal(k), ref)
		cols, vals = append(cols, schema.Quote(k)), append(vals, fmt.Sprintf("(%s)::%s", ref, castType(c.MirrorType)))
	}
	value := func(from string, c schema.Column) string {
		return fmt.Sprintf("(s.%s->>%s)::%s", from, schema.Literal(c.Name), castType(c.MirrorType))
	}
	left := func(from string, c schema.Column) string {
		return fmt.Sprintf("CASE WHEN s.%s ? %s THEN %s ELSE m.%s END", from, schema.Literal(c.Name), value(from, c), schema.Quote(c.Name))
	}
	// The whole new image counts, columns that the device did not change too: told "merged" at a version whose other
	// columns it has never seen, the device would overwrite them with its next edit.
	whole := func(c schema.Column) string {
		return fmt.Sprintf("CASE WHEN s.img ? %[1]s THEN %[2]s WHEN s.base ? %[1]s THEN %[3]s ELSE m.%[4]s END", schema.Literal(c.Name), value("img", c), value("base", c), schema.Quote(c.Name))
	}
	for _, c := range t.Columns {
		m := "m." + schema.Quote(c.Name)
		names, texts = append(names, schema.Literal(c.Name)), append(texts, c.Text(m))
		if t.IsKey(c.Name) {
			continue
		}
		now, same, based = append(now, m), append(same, whole(c)), append(based, left("base", c))
		set = append(set, schema.Quote(c.Name)+" = "+left("img", c))
		cols, vals = append(cols, schema.Quote(c.Name)), append(vals, value("img", c))
	}
	sameImage, baseImage := "true", "true"
	if len(now) > 0 {
		sameImage = fmt.Sprintf("record_image_eq(ROW(%s), ROW(%s))", strings.Join(same, ", "), strings.Join(now, ", "))
		baseImage = fmt.Sprintf("record_image_eq(ROW(%s), ROW(%s))", strings.Join(based, ", "), strings.Join(now, ", "))
	}
	oldValue, newValue := "NULL::text", "NULL::text"
	if c, ok := t.Column(key); ok {
		oldValue = c.Text("m." + schema.Quote(key))
		newValue = c.Text(fmt.Sprintf("CASE WHEN s.img ? %s THEN (s.img->>%[1]s)::%s ELSE m.%s END", schema.Literal(key), textType(c.MirrorType), schema.Quote(key)))
		if i := slices.Index(t.Key, key); i >= 0 {
			newValue = canon[i]
		}
	}
	on := strings.Join(join, " AND ")
	selectFacts := fmt.Sprintf(`SELECT s.session_id, s.idx, s.op, s.unit, s.bver, ARRAY[%s]::text[], m._ws_version, m._ws_lw, m._ws_mver,
	CASE WHEN m._ws_version IS NULL OR s.op = 'D' THEN false ELSE %s END,
	CASE WHEN e.epoch <> '' OR s.bver = 0 THEN false WHEN m._ws_version IS NULL OR s.base IS NULL THEN m._ws_version IS NULL AND s.base IS NULL ELSE %s END,
	%s, CASE WHEN s.op <> 'D' THEN %s END`,
		strings.Join(real, ", "), sameImage, baseImage, oldValue, newValue)
	rest := fmt.Sprintf(`
JOIN waystage.session e ON e.id = s.session_id
LEFT JOIN %s m ON %s`, t.Ident(), on)
	q.facts = selectFacts + fmt.Sprintf("\nFROM waystage.staging s %s\nWHERE s.tbl = %d AND s.session_id = ANY ($1::bigint[]) AND s.bad_code IS NULL\nORDER BY s.session_id, s.idx", rest, t.ID)
	// The records stand in a subquery of their own (OFFSET 0), so that no value of another staged record is cast.
	records := fmt.Sprintf(`(SELECT s.* FROM unnest($1::bigint[], $2::int[]) AS d(sid, idx)
	JOIN waystage.staging s ON s.tbl = %d AND s.session_id = d.sid AND s.idx = d.idx WHERE s.bad_code IS NULL OFFSET 0) s`, t.ID)
	q.factsOf = selectFacts + "\nFROM " + records + rest + "\nORDER BY s.session_id, s.idx"

	changes := func(c schema.Column) string { return "s.img ? " + schema.Literal(c.Name) }
	base := func(c schema.Column) string { return value("base", c) }
	mine := func(c schema.Column) string { return value("img", c) }
	stands := func(c schema.Column) string { return "m." + schema.Quote(c.Name) }
	both := func(c schema.Column) string { return changes(c) + " AND s.base ? " + schema.Literal(c.Name) }
	q.clashes = fmt.Sprintf(`SELECT s.session_id, s.idx, coalesce(s.base ?& ARRAY(SELECT jsonb_object_keys(s.img)), false),
	CASE WHEN s.op = 'U' AND m._ws_version IS NOT NULL THEN %s ELSE '{}' END,
	CASE WHEN s.op = 'U' THEN %s ELSE '{}' END,
	s.img::text, s.base::text, CASE WHEN m._ws_version IS NOT NULL THEN jsonb_object(ARRAY[%s]::text[], ARRAY[%s]::text[])::text END,
	CASE s.op WHEN 'D' THEN 'null' ELSE (coalesce(s.base, '{}') || s.img)::text END,
	jsonb_build_object('at', 'merge', 'table', s.tname, 'op', s.op, 'key', s.key, 'user', e.user_name, 'device', e.device_name,
		'attributes', coalesce((SELECT u.attributes FROM waystage.app_user u WHERE u.name = e.user_name), '{}'),
		'received_at', e.received_at, 'stood_by', CASE WHEN m._ws_version IS NOT NULL THEN coalesce(
			(SELECT v.user_name || '/' || v.name FROM waystage.incarnation i JOIN waystage.device v ON v.id = i.device_id WHERE i.id = m._ws_lw), 'source') END)::text
FROM %s%s
ORDER BY s.session_id, s.idx`, t.Overlap(changes, base, stands, mine), t.Idle(both, base, mine), strings.Join(names, ", "), strings.Join(texts, ", "), records, rest)

	q.change = fmt.Sprintf(`INSERT INTO waystage.change (session_id, idx, device_id, incarnation, n, tbl, tname, op, key, state, stamp, version, bver,
	base, img, unit, old, old_version, old_lw, old_mver, code, detail, policy, resolved, winner, decided_at)
SELECT s.session_id, s.idx, e.device_id, e.incarnation, e.n, s.tbl, s.tname, s.op, ARRAY[%s]::text[], s.state, $7::bigint, s.version, s.bver,
	s.base, s.img, s.unit, CASE WHEN m._ws_version IS NOT NULL THEN jsonb_object(ARRAY[%s]::text[], ARRAY[%s]::text[]) END,
	coalesce(m._ws_version, 0), m._ws_lw, coalesce(m._ws_mver, 0), nullif(s.code, ''), nullif(s.detail, ''),
	nullif(s.policy, '')::jsonb, nullif(s.resolved, '')::jsonb,
	CASE WHEN s.state = 'rejected' OR s.resolved <> '' THEN CASE
		WHEN m._ws_version IS NULL THEN (SELECT v.user_name || '/' || v.name FROM waystage.change c JOIN waystage.device v ON v.id = c.device_id
			WHERE c.tbl = s.tbl AND c.key = ARRAY[%s]::text[] AND c.state = 'merged' AND c.op = 'D' ORDER BY c.id DESC LIMIT 1)
		ELSE coalesce((SELECT v.user_name || '/' || v.name FROM waystage.incarnation i JOIN waystage.device v ON v.id = i.device_id WHERE i.id = m._ws_lw), 'source')
	END END,
	CASE WHEN s.state = 'rejected' THEN clock_timestamp() END
FROM (SELECT d.state, d.version, d.code, d.detail, d.policy, d.resolved, d.ord, s.*
	FROM unnest($1::bigint[], $2::int[], $3::text[], $4::bigint[], $5::text[], $6::text[], $8::text[], $9::text[])
		WITH ORDINALITY AS d(sid, idx, state, version, code, detail, policy, resolved, ord)
	JOIN waystage.staging s ON s.tbl = %d AND s.session_id = d.sid AND s.idx = d.idx OFFSET 0) s%s
ORDER BY s.ord`, strings.Join(real, ", "), strings.Join(names, ", "), strings.Join(texts, ", "), strings.Join(canon, ", "), t.ID, rest)

	q.insert = fmt.Sprintf(`INSERT INTO %s (%s, _ws_version, _ws_lw, _ws_mver)
SELECT %s, $3::bigint, e.incarnation, $3::bigint
FROM %s
JOIN waystage.session e ON e.id = s.session_id`, t.Ident(), strings.Join(cols, ", "), strings.Join(vals, ", "), records)
	set = append(set, "_ws_version = $3::bigint", "_ws_lw = e.incarnation", "_ws_mver = $3::bigint")
	q.update = fmt.Sprintf("UPDATE %s m SET %s\nFROM %s\nJOIN waystage.session e ON e.id = s.session_id\nWHERE %s", t.Ident(), strings.Join(set, ", "), records, on)
	q.delete = fmt.Sprintf("DELETE FROM %s m\nUSING %s\nWHERE %s", t.Ident(), records, on)

	q.invalid = fmt.Sprintf(`UPDATE waystage.staging s SET bad_code = 'invalid_value', bad_detail = left('column ' || b.col || ': ' || b.why, %d)
FROM (SELECT s.session_id, s.idx, v.col, v.why
	FROM waystage.staging s, LATERAL (
		SELECT * FROM waystage.bad_value(%[2]s::regclass, coalesce(s.img, '{}') || jsonb_build_object(%[3]s))
		UNION ALL SELECT * FROM waystage.bad_value(%[2]s::regclass, coalesce(s.base, '{}'))) v
	WHERE s.tbl = %[4]d AND s.session_id = ANY ($1::bigint[]) AND s.bad_code IS NULL AND v.why IS NOT NULL OFFSET 0) b
WHERE s.tbl = %[4]d AND s.session_id = b.session_id AND s.idx = b.idx`, maxDetail, schema.Literal(t.Ident()), strings.Join(object, ", "), t.ID)
	q.invalidOne = fmt.Sprintf(`UPDATE waystage.staging SET bad_code = $3, bad_detail = left($4, %d) WHERE tbl = %d AND session_id = $1 AND idx = $2`, maxDetail, t.ID)
	return q
}

// claimSQL takes staged sessions, oldest first: $1 records, $2 sessions and $3 sets to leave alone, $4 sessions.
const claimSQL = `
SELECT s.id, s.user_name, coalesce(u.attributes::text, '{}'), s.incarnation, s.set_name, s.epoch, s.judged_by, s.records
FROM waystage.session s LEFT JOIN waystage.app_user u ON u.name = s.user_name
WHERE s.state = 'staged' AND s.id IN (
	SELECT q.id FROM (
		SELECT c.id, sum(c.records) OVER (ORDER BY c.id) - c.records AS before FROM (
			SELECT id, records FROM waystage.session
			WHERE state = 'staged' AND NOT id = ANY ($2::bigint[]) AND NOT set_name = ANY ($3::text[])
			ORDER BY id LIMIT $4) c) q
	WHERE q.before < $1)
ORDER BY s.id FOR UPDATE OF s SKIP LOCKED`

// lockSQL locks the tables of the claimed sessions against down-apply, settlement and other merges, in the order
// that all of them keep: $1 sessions, $2 schema.TableLockClass.
const lockSQL = `
SELECT t.tbl, pg_advisory_xact_lock($2, t.tbl) IS NULL
FROM (SELECT DISTINCT tbl FROM waystage.staging WHERE session_id = ANY ($1) AND tbl <> 0 ORDER BY tbl) t`

// badSQL moves the records that were refused without looking at their rows into the ledger: $1 sessions, $2 stamp.
const badSQL = `
INSERT INTO waystage.change (session_id, idx, device_id, incarnation, n, tbl, tname, op, key, state, stamp, bver, base, img, unit, code, detail, decided_at)
SELECT s.session_id, s.idx, e.device_id, e.incarnation, e.n, s.tbl, s.tname, s.op, s.key, 'rejected', $2, s.bver, s.base, s.img, s.unit,
	s.bad_code, s.bad_detail, clock_timestamp()
FROM waystage.staging s JOIN waystage.session e ON e.id = s.session_id
WHERE s.session_id = ANY ($1) AND s.bad_code IS NOT NULL ORDER BY s.session_id, s.idx
RETURNING session_id, idx, op, unit, code, tname, key`
