package registry

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/protocol"
)

// Device is one database file of a user. Times are nil until the thing has happened.
type Device struct {
	ID             int64      `json:"id"`
	User           string     `json:"user"`
	Name           string     `json:"name"`
	PublicKey      string     `json:"public_key,omitempty"` // empty: not enrolled
	Blocked        bool       `json:"blocked"`              // the device itself; its user may be blocked too
	App            string     `json:"app,omitempty"`
	Library        string     `json:"library,omitempty"`
	Built          *BuiltFor  `json:"built_for,omitempty"` // nil: the application did not say, and gets everything
	EnrolledAt     *time.Time `json:"enrolled_at,omitempty"`
	LastSeenAt     *time.Time `json:"last_seen_at,omitempty"` // login, exact to a minute
	LastSyncAt     *time.Time `json:"last_sync_at,omitempty"`
	OldestUnsentAt *time.Time `json:"oldest_unsent_at,omitempty"` // as the device said it when its last session began
	Forks          int        `json:"forks"`                      // how often its file turned out to be restored or copied
}

// BuiltFor is what a device's application was built for, as it said last.
type BuiltFor struct {
	protocol.Built
	Hash string `json:"hash"` // of what it said, hex
}

// querier is a pool or a transaction.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// EnsureDevice makes a device known, if it is not yet or has been removed, and returns its id. It does not say whether it is
// blocked.
func (r *Registry) EnsureDevice(ctx context.Context, user, device string) (int64, error) {
	return ensureDevice(ctx, r.pool, user, device)
}

func ensureDevice(ctx context.Context, db querier, user, device string) (int64, error) {
	if !protocol.ValidName(user) || !protocol.ValidName(device) {
		return 0, ErrName
	}
	const find = `SELECT id FROM waystage.device WHERE user_name = $1 AND name = $2 AND removed_at IS NULL`
	var id int64
	err := db.QueryRow(ctx, find, user, device).Scan(&id)
	if !errors.Is(err, pgx.ErrNoRows) {
		return id, wrap("find device", err)
	}
	tag, err := db.Exec(ctx, `
		INSERT INTO waystage.device AS d (user_name, name)
		SELECT u.name, $2 FROM waystage.app_user u
		 WHERE u.name = $1 AND (SELECT count(*) FROM waystage.device d WHERE d.user_name = $1 AND d.removed_at IS NULL) < $3
		ON CONFLICT (user_name, name) DO UPDATE SET removed_at = NULL WHERE d.removed_at IS NOT NULL`, user, device, MaxDevices)
	if err != nil {
		return 0, wrap("add device", err)
	}
	if err = db.QueryRow(ctx, find, user, device).Scan(&id); !errors.Is(err, pgx.ErrNoRows) || tag.RowsAffected() > 0 {
		return id, wrap("find device", err)
	}
	var known bool
	if err := db.QueryRow(ctx, `SELECT EXISTS (SELECT FROM waystage.app_user WHERE name = $1)`, user).Scan(&known); err != nil {
		return 0, wrap("find user", err)
	}
	if known {
		return 0, ErrTooMany
	}
	return 0, ErrUnknownUser
}

// DeviceFilter selects devices. A zero field asks nothing.
type DeviceFilter struct {
	User        string
	Group       string
	App         string        // the application's version, as the device tells it
	BuiltFor    string        // what the application was built for: its name, or the beginning of the hash
	Blocked     bool          // those that are kept out, themselves or with their user
	NotEnrolled bool          // those without a key
	Forked      bool          // those whose file turned out to be restored or copied
	StaleFor    time.Duration // those without a complete sync for so long
}

// ListDevices lists devices by name; not the operators' own.
func (r *Registry) ListDevices(ctx context.Context, f DeviceFilter) ([]Device, error) {
	rows, err := r.pool.Query(ctx, `
		SELECT d.id, d.user_name, d.name, coalesce(d.public_key, ''), d.blocked, d.app, d.library, d.enrolled_at, d.last_seen_at, d.last_sync_at,
			d.oldest_unsent_at, d.forks, `+builtColumn+`
		  FROM waystage.device d JOIN waystage.app_user u ON u.name = d.user_name LEFT JOIN waystage.built b ON b.hash = d.built
		 WHERE d.removed_at IS NULL AND d.user_name <> $1 AND $2 IN ('', d.user_name) AND ($3 = '' OR $3 = ANY (u.groups)) AND $4 IN ('', d.app)
			AND (NOT $5 OR d.blocked OR u.blocked) AND (NOT $6 OR d.public_key IS NULL) AND (NOT $7 OR d.forks > 0)
			AND ($9 = '' OR b.built->>'name' = $9 OR $9 ~ '^[0-9a-f]{8,64}$' AND starts_with(b.hash, $9))
			AND ($8 = 0 OR coalesce(d.last_sync_at, '-infinity') < now() - make_interval(secs => $8))
		 ORDER BY d.user_name, d.name`, protocol.OperatorUser, f.User, f.Group, f.App, f.Blocked, f.NotEnrolled, f.Forked, f.StaleFor.Seconds(), f.BuiltFor)
	if err != nil {
		return nil, wrap("list devices", err)
	}
	devices, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (d Device, err error) {
		err = row.Scan(&d.ID, &d.User, &d.Name, &d.PublicKey, &d.Blocked, &d.App, &d.Library, &d.EnrolledAt, &d.LastSeenAt, &d.LastSyncAt,
			&d.OldestUnsentAt, &d.Forks, &d.Built)
		return d, err
	})
	return devices, wrap("list devices", err)
}

// builtColumn reads a BuiltFor.
const builtColumn = `b.built || jsonb_build_object('hash', b.hash)`

// DeviceDetail is everything that the server knows of a device.
type DeviceDetail struct {
	Device
	Groups      []string   `json:"groups"`       // of its user
	UserBlocked bool       `json:"user_blocked"` // then the device is kept out too
	Fingerprint string     `json:"fingerprint,omitempty"`
	KeyAt       *time.Time `json:"key_at,omitempty"`           // since when it has this key
	NewKeyAsked *time.Time `json:"new_key_asked_at,omitempty"` // the operator wants another
	NewKey      string     `json:"new_fingerprint,omitempty"`  // the device has announced it, and has not logged in with it yet
	ResetAt     *time.Time `json:"reset_at,omitempty"`
	ForkedAt    *time.Time `json:"forked_at,omitempty"`

	Refused *RefusedLogin `json:"refused,omitempty"` // the last one

	Unmerged    int64 `json:"unmerged"`     // records that wait for the merge
	Unapplied   int64 `json:"unapplied"`    // merged ones that wait for the source
	RejectsOpen int64 `json:"rejects_open"` // that nobody has dealt with

	Sets         []DeviceSet   `json:"sets"`
	Refreshes    []Refresh     `json:"refreshes"`    // the last order that each set is under
	Incarnations []Incarnation `json:"incarnations"` // newest first, at most 20
}

// RefusedLogin is a login in the device's name that was not let in, or an enrolment that was refused after it. The name in it was
// claimed, not proven. Host is empty where it is not known.
type RefusedLogin struct {
	At   time.Time     `json:"at"`
	Code protocol.Code `json:"code"`
	Host string        `json:"host"`
}

// DeviceSet is how one subscription set of a device stands, as far back as sessions are kept.
type DeviceSet struct {
	Set    string     `json:"set"`
	UpAt   *time.Time `json:"up_at,omitempty"`   // the last time that records of the device were merged
	DownAt *time.Time `json:"down_at,omitempty"` // the last time that the device had applied a reply
	OpenAt *time.Time `json:"open_at,omitempty"` // the last session, when it is not at its end
}

// Incarnation is one life of a device's file.
type Incarnation struct {
	ID        string    `json:"id"`
	CreatedAt time.Time `json:"created_at"`
	Sessions  int64     `json:"sessions"` // number of the last one
}

// Device tells all of one device.
func (r *Registry) Device(ctx context.Context, user, device string) (DeviceDetail, error) {
	var d DeviceDetail
	if user == protocol.OperatorUser {
		return d, ErrUnknownDevice
	}
	tx, err := r.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return d, wrap("show device", err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	var refusedAt *time.Time
	var refused RefusedLogin
	var next string
	err = tx.QueryRow(ctx, `
		SELECT d.id, d.user_name, d.name, coalesce(d.public_key, ''), d.blocked, d.app, d.library, d.enrolled_at, d.last_seen_at, d.last_sync_at,
			d.oldest_unsent_at, d.forks, `+builtColumn+`, u.groups, u.blocked, d.key_at, d.new_key_asked_at, coalesce(d.next_key, ''), d.reset_at, d.forked_at,
			d.refused_at, d.refused_code, d.refused_host,
			(SELECT coalesce(sum(s.records), 0) FROM waystage.session s WHERE s.device_id = d.id AND s.state = 'staged'),
			(SELECT count(*) FROM waystage.change c WHERE c.device_id = d.id AND c.state = 'merged'),
			(SELECT count(*) FROM waystage.reject j WHERE j.user_name = d.user_name AND j.device_name = d.name AND j.status = 'open')
		  FROM waystage.device d JOIN waystage.app_user u ON u.name = d.user_name LEFT JOIN waystage.built b ON b.hash = d.built
		 WHERE d.user_name = $1 AND d.name = $2 AND d.removed_at IS NULL`, user, device).
		Scan(&d.ID, &d.User, &d.Name, &d.PublicKey, &d.Blocked, &d.App, &d.Library, &d.EnrolledAt, &d.LastSeenAt, &d.LastSyncAt,
			&d.OldestUnsentAt, &d.Forks, &d.Built, &d.Groups, &d.UserBlocked, &d.KeyAt, &d.NewKeyAsked, &next, &d.ResetAt, &d.ForkedAt,
			&refusedAt, &refused.Code, &refused.Host, &d.Unmerged, &d.Unapplied, &d.RejectsOpen)
	if errors.Is(err, pgx.ErrNoRows) {
		return d, ErrUnknownDevice
	} else if err != nil {
		return d, wrap("show device", err)
	}
	if d.PublicKey != "" {
		d.Fingerprint = protocol.Fingerprint(d.PublicKey)
	}
	if next != "" {
		d.NewKey = protocol.Fingerprint(next)
	}
	if refusedAt != nil {
		refused.At = *refusedAt
		d.Refused = &refused
	}
	rows, err := tx.Query(ctx, `
		SELECT set_name, max(merged_at) FILTER (WHERE records > 0), max(closed_at),
			CASE WHEN (array_agg(state ORDER BY id DESC))[1] <> 'closed' THEN (array_agg(received_at ORDER BY id DESC))[1] END
		  FROM waystage.session WHERE device_id = $1 GROUP BY set_name ORDER BY set_name`, d.ID)
	if err != nil {
		return d, wrap("show device", err)
	}
	if d.Sets, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (s DeviceSet, err error) {
		err = row.Scan(&s.Set, &s.UpAt, &s.DownAt, &s.OpenAt)
		return s, err
	}); err != nil {
		return d, wrap("show device", err)
	}
	if d.Refreshes, err = refreshes(ctx, tx, user, device); err != nil {
		return d, err
	}
	if rows, err = tx.Query(ctx, `SELECT id, created_at, last_n FROM waystage.incarnation WHERE device_id = $1 ORDER BY created_at DESC LIMIT 20`, d.ID); err != nil {
		return d, wrap("show device", err)
	}
	d.Incarnations, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (i Incarnation, err error) {
		err = row.Scan(&i.ID, &i.CreatedAt, &i.Sessions)
		return i, err
	})
	return d, wrap("show device", err)
}

// BlockDevice keeps a device out and closes its connections. A device that is not known yet can be blocked too.
func (r *Registry) BlockDevice(ctx context.Context, user, device string) error {
	if _, err := r.EnsureDevice(ctx, user, device); err != nil {
		return err
	}
	return r.one(ctx, "block device", ErrUnknownDevice,
		`WITH b AS (UPDATE waystage.device SET blocked = true WHERE user_name = $1 AND name = $2 AND removed_at IS NULL RETURNING user_name || '/' || name AS who)
		 SELECT pg_notify('`+channel+`', who) FROM b`, user, device)
}

// UnblockDevice lets a device in again.
func (r *Registry) UnblockDevice(ctx context.Context, user, device string) error {
	return r.one(ctx, "unblock device", ErrUnknownDevice,
		`UPDATE waystage.device SET blocked = false WHERE user_name = $1 AND name = $2 AND removed_at IS NULL`, user, device)
}

// withoutKey is what a device loses that must enrol again; incarnations from before do not go on (rule D12).
const withoutKey = `public_key = NULL, key_at = NULL, next_key = NULL, new_key_asked_at = NULL, enrolled_at = NULL, reset_at = clock_timestamp()`

// ResetDevice takes a device's key away and closes its connections. Once it is enrolled again its file goes on under a new
// incarnation: all rows are fetched anew; edits that are not sent, and those that were sent and have no verdict yet, are sent
// (again). What the server has taken from it goes its way.
func (r *Registry) ResetDevice(ctx context.Context, user, device string) error {
	return r.one(ctx, "reset device", ErrUnknownDevice,
		`WITH b AS (UPDATE waystage.device SET `+withoutKey+` WHERE user_name = $1 AND name = $2 AND removed_at IS NULL RETURNING user_name || '/' || name AS who)
		 SELECT pg_notify('`+channel+`', who) FROM b`, user, device)
}

// RemoveDevice forgets a device with its key, cursors and unused tokens, and closes its connections. What the server has taken
// from it gets its verdict all the same: until then its row stays, which nothing shows any more, and a device that is enrolled under the
// name again hears of it. Whoever has the user's password can do that; to keep a device out, block it.
func (r *Registry) RemoveDevice(ctx context.Context, user, device string) error {
	return r.one(ctx, "remove device", ErrUnknownDevice,
		`WITH gone AS (
			UPDATE waystage.device SET `+withoutKey+`, removed_at = clock_timestamp(), blocked = false, app = '', library = '', built = NULL, forks = 0, forked_at = NULL,
				refused_at = NULL, oldest_unsent_at = NULL, verify_asked_at = NULL
			 WHERE user_name = $1 AND name = $2 AND removed_at IS NULL RETURNING id, user_name || '/' || name AS who),
		 cursors AS (DELETE FROM waystage.cursor c USING gone WHERE c.device_id = gone.id),
		 checks AS (DELETE FROM waystage.device_check c USING gone WHERE c.device_id = gone.id),
		 tokens AS (UPDATE waystage.enrol_token SET revoked_at = now() WHERE user_name = $1 AND device_name = $2 AND used_at IS NULL AND revoked_at IS NULL
			AND EXISTS (SELECT FROM gone))
		 SELECT pg_notify('`+channel+`', who) FROM gone`, user, device)
}

// inFlightWait is how long the removal of a user waits for records that are about to be merged.
const inFlightWait = 10 * time.Second

// RemoveUser removes a user with all devices and what the server keeps for them, and closes their connections. Records that
// were merged go their way to the source. Those that wait for the merge are waited for: [ErrInFlight] says that they still
// wait, and that the user is blocked now.
func (r *Registry) RemoveUser(ctx context.Context, name string) error {
	if err := r.BlockUser(ctx, name); err != nil {
		return err
	}
	for end := time.Now().Add(inFlightWait); ; {
		gone, err := r.removeUser(ctx, name)
		if err != nil || gone {
			return wrap("remove user", err)
		}
		if time.Now().After(end) {
			return ErrInFlight
		}
		select {
		case <-ctx.Done():
			return wrap("remove user", ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (r *Registry) removeUser(ctx context.Context, name string) (gone bool, err error) {
	err = pgx.BeginFunc(ctx, r.pool, func(tx pgx.Tx) error {
		// Intake locks the device before it stages: what it had begun is seen, and it begins nothing more for a blocked user.
		if _, err := tx.Exec(ctx, `SELECT FROM waystage.device WHERE user_name = $1 ORDER BY id FOR UPDATE`, name); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `
			DELETE FROM waystage.app_user WHERE name = $1 AND NOT EXISTS (
				SELECT FROM waystage.session s JOIN waystage.device d ON d.id = s.device_id WHERE d.user_name = $1 AND s.state = 'staged')`, name)
		gone = tag.RowsAffected() > 0
		return err
	})
	return gone, err
}

// Enrol gives a device its key, replacing an older one: from then on it logs in by signing with it.
func (r *Registry) Enrol(ctx context.Context, user, device string, e protocol.Enrolment) error {
	return r.transact(ctx, "enrol", func(tx pgx.Tx) error { return enrol(ctx, tx, user, device, e) })
}

// transact runs one transaction, and lets refusals through as they are.
func (r *Registry) transact(ctx context.Context, what string, do func(pgx.Tx) error) error {
	err := pgx.BeginFunc(ctx, r.pool, do)
	var refused *Refusal
	if errors.As(err, &refused) {
		return refused
	}
	return wrap(what, err)
}

// maxApp bounds what a device says of its application and library, in bytes.
const maxApp = 200

func enrol(ctx context.Context, tx pgx.Tx, user, device string, e protocol.Enrolment) error {
	if err := freeKey(ctx, tx, user, device, e.Key); err != nil {
		return err
	}
	if _, err := ensureDevice(ctx, tx, user, device); err != nil {
		return err
	}
	tag, err := tx.Exec(ctx, `
		UPDATE waystage.device d SET public_key = $3, key_at = CASE WHEN d.public_key = $3 THEN d.key_at ELSE now() END, next_key = NULL,
			new_key_asked_at = NULL, app = $4, library = $5, enrolled_at = now()
		  FROM waystage.app_user u
		 WHERE u.name = d.user_name AND d.user_name = $1 AND d.name = $2 AND NOT u.blocked AND NOT d.blocked`,
		user, device, e.Key, shortText(e.App), shortText(e.Library))
	if err == nil && tag.RowsAffected() == 0 {
		return ErrBlocked
	}
	return err
}

func shortText(s string) string {
	if len(s) > maxApp {
		s = s[:maxApp]
	}
	return validText(s)
}
