package stages

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// Operator acts on rejected records for a person at the server. What it submits again goes the way of every device's
// changes, as user [protocol.OperatorUser] on a device with the person's login: staging, merge, source. Only the subset
// and the operations of the subscriptions do not bind it. Every action is kept in waystage.reject_action.
type Operator struct {
	db   *pgxpool.Pool
	name string
}

// NewOperator makes one; name is a login of [a-z0-9_-]{1,64}.
func NewOperator(db *pgxpool.Pool, name string) (*Operator, error) {
	if !protocol.ValidName(name) {
		return nil, fmt.Errorf("%q is not a login: use 1 to 64 of a-z, 0-9, '_' and '-'", name)
	}
	return &Operator{db: db, name: name}, nil
}

// Problem is a stable name for why an action on a record was not done; docs/rejects.md lists each with its remedy.
type Problem string

// Problems.
const (
	ProblemUnknown    Problem = "no_such_record"     // there is no rejected record with the number
	ProblemRetried    Problem = "already_retried"    // a retry is on its way, or was applied
	ProblemDiscarded  Problem = "already_discarded"  // a discard of what is discarded
	ProblemSuperseded Problem = "superseded"         // the record is itself a retry: the first record is the one to act on
	ProblemNotSynced  Problem = "table_not_synced"   // the table is not synced (any more)
	ProblemUnreadable Problem = "not_a_change"       // the device sent no change that could be made: key or images are not in order
	ProblemNotKept    Problem = "image_not_kept"     // what the device sent, or what it was made on, is not in the log
	ProblemColumn     Problem = "no_such_column"     // the record has a column that the table does not have (any more)
	ProblemKeyColumn  Problem = "key_column"         // a correction names a primary key column
	ProblemKey        Problem = "invalid_key"        // the key is no value of its column's type
	ProblemMangled    Problem = "value_not_kept"     // a value could not be stored as it was sent: give the right one
	ProblemRowGone    Problem = "row_gone"           // an update of a row that does not exist now
	ProblemRowExists  Problem = "row_exists_now"     // an insert of a row that exists now
	ProblemRowBusy    Problem = "earlier_not_merged" // an earlier record of the same row has not been merged yet
)

// RetryOptions says how records are submitted again.
type RetryOptions struct {
	Values   map[string]*string // corrected values as PostgreSQL text, nil for null; not of key columns
	Omit     []string           // columns that are not sent
	AsInsert bool               // an update whose row is gone becomes an insert of the whole row
	AsUpdate bool               // an insert whose row exists becomes an update
	Note     string             // for the log of actions
}

// Attempt is what became of an action on one record.
type Attempt struct {
	Record     int64         `json:"record"`
	State      string        `json:"state"`                // failed, discarded, staged, merged, applied, rejected, refused
	Problem    Problem       `json:"problem,omitempty"`    // failed
	Result     int64         `json:"result,omitempty"`     // number of the record that it became, from its merge on
	Code       protocol.Code `json:"code,omitempty"`       // rejected, refused
	Detail     string        `json:"detail,omitempty"`     // one sentence for a person
	Constraint string        `json:"constraint,omitempty"` // refused
	Session    string        `json:"session,omitempty"`    // token of the operator's session
	Later      bool          `json:"-"`                    // not done: another record of the row comes first; call again after its merge

	sessionID int64
	idx       int
}

// Open tells whether the attempt may still get another state.
func (a *Attempt) Open() bool { return a.State == AttemptStaged || a.State == protocol.Merged }

// States of an attempt beside the protocol's.
const (
	AttemptFailed    = "failed"
	AttemptDiscarded = "discarded"
	AttemptStaged    = "staged"
)

func (a *Attempt) fail(p Problem, format string, args ...any) {
	a.State, a.Problem, a.Detail = AttemptFailed, p, fmt.Sprintf(format, args...)
}

// rejected is a record of the log as an action needs it.
type rejected struct {
	id         int64
	tname, op  string
	key        []*string
	code       protocol.Code
	base, sent map[string]*string
	status     string
	last       string // "retried by anna on ...", for the refusal of a second action

	table   *schema.Table
	row     map[string]*string // as it stands now; nil: absent
	version int64
	img     map[string]*string // what is sent
}

// lock takes the records so that nobody else acts on them, and reads them afterwards: a second operator, who waited for
// the first, sees what that one has done.
func (o *Operator) lock(ctx context.Context, tx pgx.Tx, ids []int64) (map[int64]*rejected, error) {
	rows, err := tx.Query(ctx, `SELECT id FROM waystage.change WHERE id = ANY ($1) AND state IN ('rejected', 'refused') ORDER BY id FOR UPDATE`, ids)
	if err == nil {
		_, err = pgx.CollectRows(rows, pgx.RowTo[int64])
	}
	if err != nil {
		return nil, fmt.Errorf("lock rejected records: %w", err)
	}
	rows, err = tx.Query(ctx, `SELECT r.id, r.tname, r.op, r.key, r.code, r.base, r.img, r.status,
			coalesce((SELECT a.action || ' by ' || a.actor || ' at ' || to_char(a.at, 'YYYY-MM-DD HH24:MI:SS') FROM waystage.reject_action a
				WHERE a.record = r.id ORDER BY a.id DESC LIMIT 1), '')
		FROM waystage.reject r WHERE r.id = ANY ($1)`, ids)
	if err != nil {
		return nil, fmt.Errorf("read rejected records: %w", err)
	}
	found := map[int64]*rejected{}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (*rejected, error) {
		r := &rejected{}
		return r, row.Scan(&r.id, &r.tname, &r.op, &r.key, &r.code, &r.base, &r.sent, &r.status, &r.last)
	})
	if err != nil {
		return nil, fmt.Errorf("read rejected records: %w", err)
	}
	for _, r := range list {
		found[r.id] = r
	}
	return found, nil
}

// Discard marks records as handled. It is no less a decision than a retry: the device's change stays undone.
func (o *Operator) Discard(ctx context.Context, ids []int64, note string) ([]Attempt, error) {
	tx, err := o.db.Begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("discard: %w", err)
	}
	defer rollback(tx)
	found, err := o.lock(ctx, tx, ids)
	if err != nil {
		return nil, err
	}
	out := make([]Attempt, len(ids))
	var done []int64
	for i, id := range ids {
		a := &out[i]
		a.Record = id
		switch r := found[id]; {
		case r == nil:
			a.fail(ProblemUnknown, "there is no rejected record %d", id)
		case r.status == "retried":
			a.fail(ProblemRetried, "%s, and that stands", r.last)
		case r.status == "discarded":
			a.fail(ProblemDiscarded, "%s", r.last)
		default:
			a.State = AttemptDiscarded
			r.status = AttemptDiscarded // the same number again
			done = append(done, id)
		}
	}
	_, err = tx.Exec(ctx, `INSERT INTO waystage.reject_action (record, actor, action, note) SELECT u, $2, 'discard', $3 FROM unnest($1::bigint[]) u`,
		done, o.name, clean(note))
	if err == nil {
		err = tx.Commit(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("discard: %w", err)
	}
	return out, nil
}

// Retry submits records again, in one session, each based on its row as it stands now: the version rule holds for it as
// for any other change. An update sends only the columns that the device had changed. A record that cannot be submitted is
// told alone. [Operator.Follow] tells what becomes of the others.
func (o *Operator) Retry(ctx context.Context, ids []int64, opt RetryOptions) ([]Attempt, error) {
	tx, err := o.db.Begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("retry: %w", err)
	}
	defer rollback(tx)
	found, err := o.lock(ctx, tx, ids)
	if err != nil {
		return nil, err
	}
	tables, err := schema.LoadTables(ctx, tx)
	if err != nil {
		return nil, err
	}
	byName := map[string]*schema.Table{}
	for _, t := range tables {
		byName[t.FullName()] = t
	}
	out := make([]Attempt, len(ids))
	todo := map[*schema.Table][]*rejected{}
	at := map[int64]*Attempt{}
	taken := map[string]bool{}
	for i, id := range ids {
		a := &out[i]
		a.Record = id
		r := found[id]
		if r == nil {
			a.fail(ProblemUnknown, "there is no rejected record %d", id)
			continue
		}
		if r.table = byName[r.tname]; !r.admissible(a, opt) {
			continue
		}
		key := r.tname + "\x00" + keyString(r.key)
		if taken[key] {
			a.Later = true
			a.fail(ProblemRowBusy, "an earlier record of the same row comes first")
			continue
		}
		taken[key], at[id] = true, a
		todo[r.table] = append(todo[r.table], r)
	}
	var staged []*rejected
	for _, t := range tables {
		if len(todo[t]) == 0 {
			continue
		}
		if err := o.stand(ctx, tx, t, todo[t], at); err != nil {
			return nil, err
		}
		for _, r := range todo[t] {
			if a := at[r.id]; a.State == "" && r.shape(a, opt) {
				staged = append(staged, r)
			}
		}
	}
	if len(staged) == 0 {
		return out, nil
	}
	if err := o.stage(ctx, tx, staged, at, opt.Note); err != nil {
		return nil, fmt.Errorf("stage %d records again: %w", len(staged), err)
	}
	if err := tx.Commit(ctx); err != nil {
		return nil, fmt.Errorf("stage %d records again: %w", len(staged), err)
	}
	return out, nil
}

// admissible checks what can be checked without the row.
func (r *rejected) admissible(a *Attempt, opt RetryOptions) bool {
	switch {
	case r.status == "retried":
		a.fail(ProblemRetried, "%s, and that stands", r.last)
	case r.status == "superseded":
		a.fail(ProblemSuperseded, "the record is itself a retry, or its device has got through the same change since")
	case r.table == nil:
		a.fail(ProblemNotSynced, "table %s is not synced", quoted(r.tname))
	case r.code == protocol.CodeMissingKey || r.code == protocol.CodeKeyChange || r.code == protocol.CodeInvalidRecord || len(r.key) != len(r.table.Key):
		a.fail(ProblemUnreadable, "the device sent nothing that could be written (%s): let the user make the change again", r.code)
	case r.op != protocol.Delete && r.sent == nil:
		a.fail(ProblemNotKept, "what the device sent is not in the log (%s)", r.code)
	case r.op == protocol.Delete && len(opt.Values)+len(opt.Omit) > 0:
		a.fail(ProblemUnreadable, "a delete has no values to correct")
	default:
		return r.corrected(a, opt)
	}
	return false
}

// corrected makes the image that is sent, key columns left out.
func (r *rejected) corrected(a *Attempt, opt RetryOptions) bool {
	if r.op == protocol.Delete {
		return true
	}
	for name := range opt.Values {
		if r.table.IsKey(name) {
			a.fail(ProblemKeyColumn, "%s is a primary key column of %s: another key is another row", name, r.tname)
			return false
		}
	}
	r.img = map[string]*string{}
	for name, v := range r.sent {
		if !r.table.IsKey(name) {
			r.img[name] = v
		}
	}
	for _, name := range opt.Omit {
		delete(r.img, name)
	}
	for name, v := range opt.Values {
		r.img[name] = v
	}
	for name, v := range r.img {
		if _, ok := r.table.Column(name); !ok {
			a.fail(ProblemColumn, "%s has no column %s", r.tname, quoted(name))
			return false
		}
		if _, given := opt.Values[name]; !given && r.code == protocol.CodeInvalidValue && v != nil && strings.ContainsRune(*v, '\uFFFD') {
			a.fail(ProblemMangled, "the value of column %s could not be kept as it was sent: give the right one", name)
			return false
		}
	}
	return true
}

// stand reads the rows of the records' keys as they stand now.
func (o *Operator) stand(ctx context.Context, tx pgx.Tx, t *schema.Table, list []*rejected, at map[int64]*Attempt) error {
	if _, err := tx.Exec(ctx, "SAVEPOINT ws_rows"); err != nil {
		return err
	}
	err := readRows(ctx, tx, t, list)
	if err == nil {
		_, err = tx.Exec(ctx, "RELEASE SAVEPOINT ws_rows")
		return err
	}
	if !refusedData(err) {
		return fmt.Errorf("read rows of %s: %w", t.FullName(), err)
	}
	if _, err := tx.Exec(ctx, "ROLLBACK TO SAVEPOINT ws_rows"); err != nil {
		return err
	}
	if len(list) == 1 { // a key that is no value of its column's type
		at[list[0].id].fail(ProblemKey, "the key does not fit its column: %v", errors.Unwrap(err))
		return nil
	}
	half := len(list) / 2
	return errors.Join(o.stand(ctx, tx, t, list[:half], at), o.stand(ctx, tx, t, list[half:], at))
}

func readRows(ctx context.Context, tx pgx.Tx, t *schema.Table, list []*rejected) error {
	var params, aliases, join, names, texts []string
	var args []any
	for i, k := range t.Key {
		c, _ := t.Column(k)
		params, aliases = append(params, fmt.Sprintf("$%d::text[]", i+1)), append(aliases, fmt.Sprintf("k%d", i+1))
		join = append(join, fmt.Sprintf("m.%s = (p.k%d)::%s", schema.Quote(k), i+1, castType(c.MirrorType)))
		values := make([]*string, len(list))
		for j, r := range list {
			values[j] = r.key[i]
		}
		args = append(args, values)
	}
	for _, c := range t.Columns {
		names, texts = append(names, schema.Literal(c.Name)), append(texts, c.Text("m."+schema.Quote(c.Name)))
	}
	rows, err := tx.Query(ctx, fmt.Sprintf(`SELECT p.ord, coalesce(m._ws_version, 0),
			CASE WHEN m._ws_version IS NOT NULL THEN jsonb_object(ARRAY[%s]::text[], ARRAY[%s]::text[]) END
		FROM unnest(%s) WITH ORDINALITY AS p(%s, ord) LEFT JOIN %s m ON %s`,
		strings.Join(names, ", "), strings.Join(texts, ", "), strings.Join(params, ", "), strings.Join(aliases, ", "), t.Ident(), strings.Join(join, " AND ")), args...)
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	var ord, version int64
	var row map[string]*string
	_, err = pgx.ForEachRow(rows, []any{&ord, &version, &row}, func() error {
		list[ord-1].row, list[ord-1].version, row = row, version, nil
		return nil
	})
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	return nil
}

// shape makes the operation fit the row as it stands.
func (r *rejected) shape(a *Attempt, opt RetryOptions) bool {
	switch {
	case r.op == protocol.Insert && r.row != nil && !opt.AsUpdate:
		a.fail(ProblemRowExists, "a row of %s with this key exists now", r.tname)
		return false
	case r.op == protocol.Insert && r.row != nil:
		r.op = protocol.Update
	case r.op == protocol.Update && r.row == nil && !opt.AsInsert:
		a.fail(ProblemRowGone, "the row of %s does not exist any more", r.tname)
		return false
	case r.op == protocol.Update && r.row == nil:
		if r.base == nil {
			a.fail(ProblemNotKept, "the record does not have the whole row")
			return false
		}
		r.op = protocol.Insert
		for name, v := range r.base {
			if _, sent := r.img[name]; !sent && !r.table.IsKey(name) {
				r.img[name] = v
			}
		}
		for _, name := range opt.Omit {
			delete(r.img, name)
		}
		for name := range r.img {
			if _, ok := r.table.Column(name); !ok {
				a.fail(ProblemColumn, "%s has no column %s", r.tname, quoted(name))
				return false
			}
		}
	}
	if r.op == protocol.Insert {
		for i, name := range r.table.Key {
			r.img[name] = r.key[i]
		}
	}
	return true
}

// stage writes the operator's session with its records and the log of the actions.
func (o *Operator) stage(ctx context.Context, tx pgx.Tx, list []*rejected, at map[int64]*Attempt, note string) error {
	epoch, err := schema.Epoch(ctx, tx)
	if err != nil {
		return err
	}
	var device, n, session int64
	var incarnation string
	// The user's hash is no hash: no password fits it.
	if _, err := tx.Exec(ctx, `INSERT INTO waystage.app_user (name, password_hash) VALUES ($1, '!') ON CONFLICT DO NOTHING`, protocol.OperatorUser); err != nil {
		return err
	}
	if err := tx.QueryRow(ctx, `INSERT INTO waystage.device (user_name, name, last_seen_at) VALUES ($1, $2, now())
		ON CONFLICT (user_name, name) DO UPDATE SET last_seen_at = now() RETURNING id`, protocol.OperatorUser, o.name).Scan(&device); err != nil {
		return err
	}
	// The device's row is locked: one incarnation for all sessions of the login.
	err = tx.QueryRow(ctx, `UPDATE waystage.incarnation SET last_n = last_n + 1 WHERE device_id = $1 RETURNING id, last_n`, device).Scan(&incarnation, &n)
	if errors.Is(err, pgx.ErrNoRows) {
		incarnation, n = randomID()+randomID(), 1
		_, err = tx.Exec(ctx, `INSERT INTO waystage.incarnation (id, device_id, last_n) VALUES ($1, $2, 1)`, incarnation, device)
	}
	if err != nil {
		return err
	}
	token := protocol.SessionToken(incarnation, n)
	err = tx.QueryRow(ctx, `INSERT INTO waystage.session (device_id, user_name, device_name, token, incarnation, n, hash, nonce, set_name, epoch,
			content_type, encoding, records, received_at)
		VALUES ($1, $2, $3, $4, $5, $6, '', '', '', $7, '', '', $8, now()) RETURNING id`,
		device, protocol.OperatorUser, o.name, token, incarnation, n, epoch, len(list)).Scan(&session)
	if err != nil {
		return err
	}
	var ids []int64
	var idx []int
	_, err = tx.CopyFrom(ctx, pgx.Identifier{"waystage", "staging"},
		[]string{"tbl", "session_id", "idx", "tname", "op", "key", "bver", "base", "img"},
		pgx.CopyFromSlice(len(list), func(i int) ([]any, error) {
			r := list[i]
			var base, img any
			if r.row != nil {
				base = r.row
			}
			if r.op != protocol.Delete {
				img = r.img
			}
			return []any{r.table.ID, session, i, r.tname, r.op, r.key, r.version, base, img}, nil
		}))
	if err != nil {
		return err
	}
	for i, r := range list {
		a := at[r.id]
		a.State, a.Session, a.sessionID, a.idx = AttemptStaged, token, session, i
		ids, idx = append(ids, r.id), append(idx, i)
	}
	_, err = tx.Exec(ctx, `INSERT INTO waystage.reject_action (record, actor, action, note, session_id, idx)
		SELECT u.id, $3, 'retry', $4, $5, u.idx FROM unnest($1::bigint[], $2::int[]) AS u(id, idx)`, ids, idx, o.name, clean(note), session)
	return err
}

// Follow looks once what has become of the attempts that are still open, and returns how many remain so.
func (o *Operator) Follow(ctx context.Context, list []Attempt) (open int, err error) {
	type place struct {
		session int64
		idx     int
	}
	at := map[place]*Attempt{}
	var sessions []int64
	for i := range list {
		if a := &list[i]; a.Open() {
			at[place{a.sessionID, a.idx}] = a
			sessions = append(sessions, a.sessionID)
		}
	}
	if len(at) == 0 {
		return 0, nil
	}
	rows, err := o.db.Query(ctx, `SELECT session_id, idx, id, state, coalesce(code, ''), coalesce(detail, ''), coalesce(constraint_name, '')
		FROM waystage.change WHERE session_id = ANY ($1)`, sessions)
	if err != nil {
		return len(at), fmt.Errorf("look for outcomes: %w", err)
	}
	var p place
	var got Attempt
	_, err = pgx.ForEachRow(rows, []any{&p.session, &p.idx, &got.Result, &got.State, &got.Code, &got.Detail, &got.Constraint}, func() error {
		if a := at[p]; a != nil {
			a.Result, a.State, a.Code, a.Detail, a.Constraint = got.Result, got.State, got.Code, got.Detail, got.Constraint
			if !a.Open() {
				delete(at, p)
			}
		}
		return nil
	})
	if err != nil {
		return len(at), fmt.Errorf("look for outcomes: %w", err)
	}
	return len(at), nil
}

// Await follows attempts until none is open, or none is unmerged if merged suffices, or wait is over.
func (o *Operator) Await(ctx context.Context, list []Attempt, merged bool, wait time.Duration) error {
	end := time.Now().Add(wait)
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		open, err := o.Follow(ctx, list)
		if err != nil {
			return err
		}
		if merged {
			open = 0
			for i := range list {
				if list[i].State == AttemptStaged {
					open++
				}
			}
		}
		left := time.Until(end)
		if open == 0 || left <= 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(pause, left)):
		}
	}
}
