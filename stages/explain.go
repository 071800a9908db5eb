package stages

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// Outcome says where a row stands with a device.
type Outcome string

// Outcomes.
const (
	OnDevice Outcome = "on_device" // as the mirror has it
	Comes    Outcome = "comes"     // with the next sync, new or changed
	Leaves   Outcome = "leaves"    // with the next sync
	Never    Outcome = "never"     // as things are
)

// Explanation says why a row is on a device, or is not. Times are nil until the thing has happened.
type Explanation struct {
	Table   string        `json:"table"`
	Key     []string      `json:"key"` // in the order of the primary key's columns, as the mirror writes it
	User    string        `json:"user"`
	Device  string        `json:"device"`
	Set     string        `json:"set,omitempty"`
	Outcome Outcome       `json:"outcome"`
	Summary string        `json:"summary"`           // one sentence
	Parts   []ExplainPart `json:"parts"`             // in the order in which they decide
	Version string        `json:"version,omitempty"` // of the mirror's row
	Writer  string        `json:"writer,omitempty"`  // source, or user/device
	Pending []ExplainEdit `json:"pending"`           // records on the row that the source has not answered
	Up      *time.Time    `json:"last_up_at"`        // the device's last session with records
	Down    *time.Time    `json:"last_down_at"`      // the last reply that it has applied
}

// ExplainPart is one part of the rule.
type ExplainPart struct {
	Part  string `json:"part"`
	Holds *bool  `json:"holds"` // nil: it decides nothing, or cannot be told
	Text  string `json:"text"`
}

// ExplainEdit is a record on its way.
type ExplainEdit struct {
	ID      int64  `json:"id"`
	Op      string `json:"op"`
	Device  string `json:"device"` // user/device
	Session string `json:"session"`
}

// ExplainError is a question that cannot be answered as it was asked.
type ExplainError struct {
	Code string // unknown_table, unknown_user, unknown_device, invalid_key
	Text string
}

func (e *ExplainError) Error() string { return e.Code + ": " + e.Text }

// explainer answers one question in one snapshot of the mirror.
type explainer struct {
	*Explanation
	ctx context.Context
	cat *Catalog
	tx  pgx.Tx

	table      *schema.Table
	where      string // m is the row of the key: its values are the parameters
	args       []any
	deviceID   int64
	built      string          // hash of what the device's application was built for
	builtOf    *protocol.Built // nil: everything
	groups     []string
	attributes string
	barred     string // why the device cannot sync; empty: it can

	sub    *subscription // by which the user has the table; nil: by none
	shape  *subscription // sub, or by which the device still has it
	view   *set          // the set as the device's application sees it
	exists bool
	value  *string // of the subset key column, canonical
	keyNow bool    // it is among the user's keys

	unbuilt bool // the application was not built for the table

	cur struct { // what the device was last sent
		known   bool   // there is a cursor for the set
		anew    string // why the next reply is one of everything; empty: it is not
		session int64
		token   string
		closed  bool // the device has applied that reply
		at      *time.Time
		had     bool // the value was among its keys
		seen    bool // the row as it is was in it
		left    bool // it was there under one of its keys, and has left since
	}
}

// Explain says why a row of a table is on a device, or is not. key are the values of the primary key; source is where the customer's
// rows are, and unreachable why it is not there. Errors of type [*ExplainError] are the caller's.
func Explain(ctx context.Context, mirror *pgxpool.Pool, source schema.Querier, unreachable error, cat *Catalog, table string, key []string, user, device string) (*Explanation, error) {
	e := &explainer{Explanation: &Explanation{Table: table, Key: key, User: user, Device: device, Parts: []ExplainPart{}, Pending: []ExplainEdit{}}, ctx: ctx, cat: cat}
	var err error
	if e.tx, err = mirror.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}); err != nil {
		return nil, fmt.Errorf("begin a snapshot: %w", err)
	}
	defer rollback(e.tx)
	for _, step := range []func() error{e.findTable, e.findDevice, e.findSubscription, func() error { return e.askSource(source, unreachable) },
		e.findRow, e.findKey, e.findCursor, e.findSyncs} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	e.conclude()
	return e.Explanation, nil
}

func (e *explainer) part(name string, holds bool, format string, args ...any) {
	e.Parts = append(e.Parts, ExplainPart{name, &holds, fmt.Sprintf(format, args...)})
}

func (e *explainer) note(name, format string, args ...any) {
	e.Parts = append(e.Parts, ExplainPart{name, nil, fmt.Sprintf(format, args...)})
}

// named finds a synced table; a name without a schema will do where it is the only one. Nil: there is none.
func (c *Catalog) named(name string) *schema.Table {
	var found []*schema.Table
	for _, q := range c.tables {
		if q.table.FullName() == name {
			return q.table
		}
		if q.table.Name == name {
			found = append(found, q.table)
		}
	}
	if len(found) != 1 {
		return nil
	}
	return found[0]
}

// Key names the columns of a synced table's primary key; nil when there is no such table.
func (c *Catalog) Key(table string) []string {
	if t := c.named(table); t != nil {
		return t.Key
	}
	return nil
}

func (e *explainer) findTable() error {
	if e.table = e.cat.named(e.Table); e.table == nil {
		var all []string
		for _, q := range e.cat.tables {
			all = append(all, q.table.FullName())
		}
		slices.Sort(all)
		return &ExplainError{"unknown_table", fmt.Sprintf("no synced table is named %s; there are: %s", quoted(e.Table), strings.Join(all, ", "))}
	}
	t := e.table
	e.Table = t.FullName()
	if len(e.Key) != len(t.Key) {
		return &ExplainError{"invalid_key", fmt.Sprintf("the key of %s has %d columns (%s), not %d", e.Table, len(t.Key), strings.Join(t.Key, ", "), len(e.Key))}
	}
	var is, texts []string
	for i, k := range t.Key {
		c, _ := t.Column(k)
		param := fmt.Sprintf("($%d::text)::%s", i+1, textType(c.MirrorType))
		is, texts = append(is, fmt.Sprintf("m.%s = %s", schema.Quote(k), param)), append(texts, c.Text(param))
		e.args = append(e.args, e.Key[i])
	}
	e.where = strings.Join(is, " AND ")
	if err := e.tx.QueryRow(e.ctx, "SELECT ARRAY["+strings.Join(texts, ", ")+"]::text[]", e.args...).Scan(&e.Key); err != nil {
		if pgerr.Class(err) == pgerr.Refusal {
			return &ExplainError{"invalid_key", fmt.Sprintf("%s (%s): %v", e.Table, strings.Join(t.Key, ", "), err)}
		}
		return fmt.Errorf("read the key: %w", err)
	}
	for i := range e.Key { // as the mirror writes it
		e.args[i] = e.Key[i]
	}
	var code, detail *string
	if err := e.tx.QueryRow(e.ctx, `SELECT stopped_code, stopped_detail FROM waystage.synced_table WHERE id = $1`, t.ID).Scan(&code, &detail); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return fmt.Errorf("read the table's state: %w", err)
	}
	if code != nil {
		e.part("table", false, "%s is stopped (%s): the mirror does not follow the source; see 'waystage schema diff'", e.Table, *code)
	} else {
		e.part("table", true, "%s is synced", e.Table)
	}
	return nil
}

func (e *explainer) findDevice() error {
	var blocked bool
	err := e.tx.QueryRow(e.ctx, `SELECT blocked, groups, attributes::text FROM waystage.app_user WHERE name = $1 AND name <> $2`, e.User, protocol.OperatorUser).
		Scan(&blocked, &e.groups, &e.attributes)
	if errors.Is(err, pgx.ErrNoRows) {
		return &ExplainError{"unknown_user", "there is no user " + quoted(e.User)}
	}
	if err != nil {
		return fmt.Errorf("read the user: %w", err)
	}
	var barred, enrolled bool
	err = e.tx.QueryRow(e.ctx, `SELECT d.id, d.blocked, d.public_key IS NOT NULL, coalesce(b.hash, ''), b.built
		FROM waystage.device d LEFT JOIN waystage.built b ON b.hash = d.built WHERE d.user_name = $1 AND d.name = $2`, e.User, e.Device).
		Scan(&e.deviceID, &barred, &enrolled, &e.built, &e.builtOf)
	if errors.Is(err, pgx.ErrNoRows) {
		return &ExplainError{"unknown_device", fmt.Sprintf("user %s has no device %s", e.User, quoted(e.Device))}
	}
	if err != nil {
		return fmt.Errorf("read the device: %w", err)
	}
	say := func(name string, bad bool, good, why string) {
		if bad {
			e.barred = why
		}
		e.part(name, !bad, "%s", map[bool]string{true: why, false: good}[bad])
	}
	say("user", blocked, "user "+e.User+" may sync", "user "+e.User+" is blocked")
	switch {
	case barred:
		say("device", true, "", "device "+e.Device+" is blocked")
	case !enrolled:
		// With a password a device syncs without a key.
		e.note("device", "device %s is not enrolled", e.Device)
	default:
		say("device", false, "device "+e.Device+" is enrolled", "")
	}
	return nil
}

// findSubscription goes from the user's groups to the subscription that has the table.
func (e *explainer) findSubscription() error {
	_, sets := e.cat.allows(e.groups, "")
	for _, name := range sets {
		if sub := e.cat.subscription(name, e.Table); sub != nil {
			e.sub, e.shape, e.Set = sub, sub, name
			break
		}
	}
	groups := "no group"
	if len(e.groups) > 0 {
		groups = "groups " + strings.Join(e.groups, ", ")
	}
	if e.sub == nil {
		var elsewhere []string
		for _, s := range e.cat.defs.Sets {
			if e.cat.subscription(s.Name, e.Table) != nil {
				elsewhere = append(elsewhere, s.Name)
			}
		}
		slices.Sort(elsewhere)
		where := "no set has it"
		if len(elsewhere) > 0 {
			where = "it is in " + strings.Join(elsewhere, ", ")
		}
		e.part("subscription", false, "user %s is in %s and has the sets [%s], none of which has the table; %s", e.User, groups, strings.Join(sets, ", "), where)
		err := e.tx.QueryRow(e.ctx, `SELECT set_name FROM waystage.cursor WHERE device_id = $1 AND set_name = ANY ($2) ORDER BY session_id DESC LIMIT 1`, e.deviceID, elsewhere).Scan(&e.Set)
		switch {
		case err == nil:
			e.shape = e.cat.subscription(e.Set, e.Table)
			e.note("set", "the device has had set %s", e.Set)
		case !errors.Is(err, pgx.ErrNoRows):
			return fmt.Errorf("look for what the device has had: %w", err)
		}
		return nil
	}
	e.view = e.cat.view(e.Set, e.built, e.builtOf)
	s := e.sub
	if s = e.view.byID[e.Table]; s == nil {
		s, e.unbuilt = e.sub, true
	}
	e.part("subscription", true, "user %s is in %s: set %s, subscription %s", e.User, groups, e.Set, s.Name)
	e.part("direction", s.Downloads(), "%s, uploads allowed: %s", s.Direction, orNone(s.Allow))
	if e.builtOf != nil {
		e.part("application", !e.unbuilt, "the device's application was built for %s, which %s the table", builtName(e.built, e.builtOf), map[bool]string{true: "does not have", false: "has"}[e.unbuilt])
	}
	var out []string
	for _, c := range e.table.Columns {
		if !slices.Contains(s.columns, c.Name) {
			out = append(out, c.Name)
		}
	}
	if len(out) == 0 {
		e.note("columns", "all")
	} else {
		e.note("columns", "%s; not: %s", strings.Join(s.columns, ", "), strings.Join(out, ", "))
	}
	return nil
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// askSource looks whether the row is there. That it cannot be asked decides nothing.
func (e *explainer) askSource(source schema.Querier, unreachable error) error {
	if source == nil {
		if unreachable != nil {
			e.note("source", "cannot be asked: %v", unreachable)
		}
		return nil
	}
	var is []string
	for i, k := range e.table.Key {
		c, _ := e.table.Column(k)
		is = append(is, fmt.Sprintf("m.%s = ($%d::text)::%s", schema.Quote(k), i+1, c.Type))
	}
	var there bool
	if err := source.QueryRow(e.ctx, "SELECT EXISTS (SELECT FROM "+e.table.Ident()+" m WHERE "+strings.Join(is, " AND ")+")", e.args...).Scan(&there); err != nil {
		e.note("source", "cannot be asked: %v", err)
		return nil
	}
	e.part("source", there, "%s", map[bool]string{true: "the row exists", false: "the row does not exist"}[there])
	return nil
}

func (e *explainer) findRow() error {
	value := "NULL::text"
	if s := e.shape; s != nil && s.Key != "" {
		c, _ := e.table.Column(s.Key)
		value = c.Text("m." + schema.Quote(s.Key))
		if s.LooseKey() {
			value = "trim_scale(m." + schema.Quote(s.Key) + ")::text"
		}
	}
	err := e.tx.QueryRow(e.ctx, `SELECT m._ws_version::text, coalesce((SELECT d.user_name || '/' || d.name FROM waystage.incarnation i JOIN waystage.device d ON d.id = i.device_id
		WHERE i.id = m._ws_lw), 'source'), `+value+` FROM `+e.table.Ident()+` m WHERE `+e.where, e.args...).Scan(&e.Version, &e.Writer, &e.value)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		e.part("mirror", false, "the row does not exist")
	case err != nil:
		return fmt.Errorf("read the mirror's row: %w", err)
	default:
		e.exists = true
		e.part("mirror", true, "the row exists, version %s, last written by %s", e.Version, e.Writer)
	}
	rows, err := e.tx.Query(e.ctx, `SELECT c.id, c.op, d.user_name || '/' || d.name, c.incarnation || '-' || c.n
		FROM waystage.change c JOIN waystage.device d ON d.id = c.device_id WHERE c.tbl = $1 AND c.key = $2 AND c.state = 'merged' ORDER BY c.id`, e.table.ID, e.Key)
	if err != nil {
		return fmt.Errorf("read pending records: %w", err)
	}
	e.Pending, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (p ExplainEdit, err error) {
		return p, row.Scan(&p.ID, &p.Op, &p.Device, &p.Session)
	})
	if err != nil {
		return fmt.Errorf("read pending records: %w", err)
	}
	if e.Pending == nil {
		e.Pending = []ExplainEdit{}
	}
	for _, p := range e.Pending {
		e.note("pending", "record %d (%s) of %s waits for the source", p.ID, p.Op, p.Device)
	}
	return nil
}

// findKey evaluates the rows query as a reply would.
func (e *explainer) findKey() error {
	if e.sub == nil || !e.exists {
		return nil
	}
	if e.sub.Key == "" {
		e.keyNow = true
		e.note("key", "the subscription has no key: everybody gets all rows")
		return nil
	}
	if e.value == nil {
		e.part("key", false, "%s is null: nobody's row", e.sub.Key)
		return nil
	}
	found := false
	batch := &pgx.Batch{}
	for _, setting := range readerSettings {
		batch.Queue(setting)
	}
	batch.Queue("SELECT EXISTS (SELECT FROM ("+e.sub.KeyQuery("$1", "$2")+") k WHERE k.key = $3)", e.User, e.attributes, *e.value).
		QueryRow(func(row pgx.Row) error { return row.Scan(&found) })
	batch.Queue("ROLLBACK TO SAVEPOINT ws_reader")
	batch.Queue("RELEASE SAVEPOINT ws_reader")
	if err := e.tx.SendBatch(e.ctx, batch).Close(); err != nil {
		return fmt.Errorf("evaluate the rows query of subscription %s: %w", e.sub.Name, err)
	}
	e.keyNow = found
	e.part("key", found, "%s is %s, which the rows query %s for user %s now", e.sub.Key, quoted(*e.value), map[bool]string{true: "gives", false: "does not give"}[found], e.User)
	return nil
}

// findCursor finds what the device was last sent of the set: the newest reply that it has applied, else the newest one.
func (e *explainer) findCursor() error {
	if e.Set == "" {
		return nil
	}
	var since, refresh, order int64
	var body string
	var told *string
	err := e.tx.QueryRow(e.ctx, `
		SELECT c.session_id, coalesce(s.token, ''), coalesce(s.state, 'closed') = 'closed', s.replied_at, c.since, c.refresh, s.told::text, c.keysets::text, c.token LIKE $5 || '.%',
			coalesce((SELECT max(r.id) FROM waystage.refresh r WHERE (r.device_id IS NULL OR r.device_id = c.device_id)
				AND (r.user_name IS NULL OR r.user_name = $3) AND (r.sets IS NULL OR c.set_name = ANY (r.sets))), 0)
		FROM waystage.cursor c LEFT JOIN waystage.session s ON s.id = c.session_id
		WHERE c.device_id = $1 AND c.set_name = $2 AND $4::text IS NOT NULL ORDER BY coalesce(s.state, 'closed') = 'closed' DESC, c.session_id DESC LIMIT 1`,
		e.deviceID, e.Set, e.User, e.Device, e.cat.epoch).
		Scan(&e.cur.session, &e.cur.token, &e.cur.closed, &e.cur.at, &since, &refresh, &told, &body, &e.cur.known, &order)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		e.cur.anew = "the server knows of no reply to this device (never synced, or longer ago than cursors are kept)"
		e.note("cursor", "%s", e.cur.anew)
		return nil
	case err != nil:
		return fmt.Errorf("read the device's cursor: %w", err)
	}
	var k keysets
	if err := json.Unmarshal([]byte(body), &k); err != nil {
		return fmt.Errorf("read the device's cursor: %w", err)
	}
	switch {
	case !e.cur.known:
		e.cur.anew = "the mirror was built anew since"
	case refresh < order:
		e.cur.anew = fmt.Sprintf("an operator has ordered it (order %d, see 'waystage devices refreshes')", order)
	case e.sub != nil && e.view.wire != nil && k.Schema != e.view.wire.Hash && k.Schema != e.view.plain.Hash:
		e.cur.anew = "the definitions of the set have changed since"
	}
	e.cur.known = true
	if id, ok := k.Tables[e.Table]; ok && e.value != nil {
		if err := e.tx.QueryRow(e.ctx, `SELECT EXISTS (SELECT FROM waystage.keyset WHERE id = $1 AND $2 = ANY (keys))`, id, *e.value).Scan(&e.cur.had); err != nil {
			return fmt.Errorf("read the cursor's keys: %w", err)
		}
	} else if !ok {
		e.cur.had = e.exists
	}
	// What was committed before the reply's snapshot was in it.
	seen := func(stamp string) string {
		return `coalesce(pg_visible_in_snapshot(` + stamp + `::text::xid8, $1::pg_snapshot), ` + stamp + ` < $2::bigint)`
	}
	if e.exists {
		if err := e.tx.QueryRow(e.ctx, `SELECT `+seen("v.v")+` FROM (VALUES ($3::bigint)) v(v)`, told, since, e.Version).Scan(&e.cur.seen); err != nil {
			return fmt.Errorf("compare the row with the cursor: %w", err)
		}
	}
	var keyset *int64
	if id, ok := k.Tables[e.Table]; ok {
		keyset = &id
	}
	was := "t.val"
	if e.shape != nil && e.shape.LooseKey() {
		was = "CASE WHEN t.val ~ " + schema.Literal(number) + " THEN trim_scale(t.val::numeric)::text END"
	}
	err = e.tx.QueryRow(e.ctx, `SELECT EXISTS (SELECT FROM waystage.tombstone t WHERE t.tbl = $3 AND t.key = $4 AND NOT `+seen("t.stamp")+`
		AND ($5::bigint IS NULL OR EXISTS (SELECT FROM waystage.keyset s WHERE s.id = $5 AND `+was+` = ANY (s.keys))))`, told, since, e.table.ID, e.Key, keyset).Scan(&e.cur.left)
	if err != nil {
		return fmt.Errorf("read tombstones: %w", err)
	}
	if e.unbuilt && e.cur.anew == "" { // that reply was composed without the table
		e.cur.had, e.cur.left = false, false
	}
	which := "session " + e.cur.token
	if e.cur.token == "" {
		which = "a session of long ago"
	}
	confirmed := "which the device has applied"
	if !e.cur.closed {
		confirmed = "of which the device has not said that it applied it"
	}
	e.note("cursor", "the last reply was that to %s, %s", which, confirmed)
	if e.shape != nil && e.shape.Key != "" && e.exists && e.value != nil && !e.unbuilt {
		e.part("key then", e.cur.had, "%s was %samong the user's keys in that reply", quoted(*e.value), map[bool]string{true: "", false: "not "}[e.cur.had])
	}
	if e.exists {
		e.part("version", e.cur.seen, "version %s is %s that reply", e.Version, map[bool]string{true: "older than", false: "newer than"}[e.cur.seen])
	}
	if e.cur.left {
		e.note("tombstone", "the row was deleted, or left one of the user's keys, since that reply")
	}
	if e.cur.anew != "" {
		e.note("refresh", "the next sync sends everything: %s", e.cur.anew)
	}
	return nil
}

func (e *explainer) findSyncs() error {
	err := e.tx.QueryRow(e.ctx, `SELECT (SELECT max(received_at) FROM waystage.session WHERE device_id = $1 AND records > 0), (SELECT max(closed_at) FROM waystage.session WHERE device_id = $1)`,
		e.deviceID).Scan(&e.Up, &e.Down)
	if err != nil {
		return fmt.Errorf("read the device's syncs: %w", err)
	}
	say := func(at *time.Time) string {
		if at == nil {
			return "never, as far as is known"
		}
		return at.UTC().Format(time.RFC3339)
	}
	e.note("last sync", "up: %s; down: %s", say(e.Up), say(e.Down))
	var told time.Time
	var rows, different, repaired int64
	err = e.tx.QueryRow(e.ctx, `SELECT told_at, rows, different, repaired FROM waystage.device_check WHERE device_id = $1 AND set_name = $2`, e.deviceID, e.Set).
		Scan(&told, &rows, &different, &repaired)
	switch {
	case err == nil:
		e.note("verified", "%s: %d rows compared, %d different, %d repaired", told.UTC().Format(time.RFC3339), rows, different, repaired)
	case !errors.Is(err, pgx.ErrNoRows):
		return fmt.Errorf("read the device's last verification: %w", err)
	}
	return nil
}

// conclude puts it in one sentence.
func (e *explainer) conclude() {
	// on: the device has an image of the row, maybe an older one.
	inside := e.sub != nil && e.sub.Downloads() && !e.unbuilt && e.exists && e.keyNow
	on := e.cur.known && (e.exists && e.cur.had || e.cur.left) && (e.shape == nil || e.shape.Downloads())
	say := func(o Outcome, format string, args ...any) {
		e.Outcome, e.Summary = o, fmt.Sprintf(format, args...)
		if e.barred != "" && (o == Comes || o == Leaves) {
			if o == Comes {
				e.Outcome = Never
			}
			e.Summary = "nothing changes on the device, because " + e.barred + "; otherwise: " + e.Summary
		}
	}
	sent := "session " + e.cur.token
	if e.cur.token == "" {
		sent = "an earlier session"
	}
	switch {
	case inside && e.cur.anew != "":
		say(Comes, "comes at the next sync, which sends everything")
	case inside && e.cur.seen && e.cur.had && e.cur.closed:
		say(OnDevice, "is on the device as the mirror has it: sent at the latest in %s", sent)
	case inside && e.cur.seen && e.cur.had:
		say(OnDevice, "was sent in %s, and is on the device if it has applied that reply", sent)
	case inside && !e.cur.had:
		say(Comes, "comes at the next sync: its key is new to the user's since the last reply")
	case inside:
		say(Comes, "comes at the next sync: version %s is newer than the last reply", e.Version)
	case on:
		say(Leaves, "leaves the device at the next sync, because %s", e.why())
	default:
		say(Never, "is not on the device and never comes, because %s", e.why())
	}
}

// why names the first thing that keeps the row from the device.
func (e *explainer) why() string {
	switch {
	case e.sub == nil:
		return "no set of the user has table " + e.Table
	case e.unbuilt:
		return "the device's application was not built for table " + e.Table
	case !e.sub.Downloads():
		return "the subscription is upload-only"
	case !e.exists:
		for _, p := range e.Parts {
			if p.Part == "source" && p.Holds != nil && *p.Holds {
				return "the mirror does not have the row (yet)"
			}
		}
		return "the row does not exist"
	case e.sub.Key != "" && e.value == nil:
		return "its " + e.sub.Key + " is null"
	}
	return "its " + e.sub.Key + ", " + strconv.Quote(*e.value) + ", is not among the user's keys"
}
