// Package registry keeps the users and devices that may sync: names, password hashes, device keys and blocks, all in
// the mirror database, so that every server sees the same.
//
// It promises that a name in the tables is always a valid subject token, that a password is never stored or logged,
// that a refused login takes as long for an unknown user as for a wrong password, and that every server hears of a
// block or removal at once. The auth callout (package queue) asks it at each login, the gateway when a device enrols,
// the users and device commands work it for the operator.
package registry

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nkeys"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// Bounds of one user. MaxDevices: with a user's password anybody can make device names up.
const (
	MaxDevices    = 256
	MaxGroups     = 64
	MaxAttributes = 64

	maxAttribute = 1024 // bytes of a value
)

// Refusal is an error that the caller can do something about: not a failure of the database.
type Refusal struct {
	code protocol.Code
	text string
}

func (r *Refusal) Error() string { return r.text }

// ErrorCode is the stable name of the refusal on the wire.
func (r *Refusal) ErrorCode() protocol.Code { return r.code }

// Refusals.
var (
	ErrName          = &Refusal{protocol.CodeName, "the name is not valid: use 1 to 64 of a-z, 0-9, '_' and '-'"}
	ErrAttribute     = &Refusal{"invalid_attribute", fmt.Sprintf("an attribute is not valid: names are 1 to 63 letters, digits and '_' and begin with no digit, values up to %d bytes of UTF-8 without NUL; a user has at most %d", maxAttribute, MaxAttributes)}
	ErrGroups        = &Refusal{"too_many_groups", fmt.Sprintf("a user can be in at most %d groups", MaxGroups)}
	ErrPassword      = &Refusal{"invalid_password", "the password is not usable: use 8 to 1024 bytes"}
	ErrCredentials   = &Refusal{"credentials", "unknown user, wrong password or unknown device key"}
	ErrBlocked       = &Refusal{protocol.CodeBlocked, "the user or device is blocked: ask the operator to unblock it"}
	ErrUserExists    = &Refusal{"user_exists", "a user with this name exists already"}
	ErrUnknownUser   = &Refusal{"unknown_user", "there is no user with this name"}
	ErrUnknownDevice = &Refusal{"unknown_device", "there is no such device of this user"}
	ErrTooMany       = &Refusal{"too_many_devices", fmt.Sprintf("the user has %d devices already: remove one that is no longer used", MaxDevices)}
	ErrKey           = &Refusal{protocol.CodeKey, "the key is not a public user NKEY (56 characters that begin with U)"}
	ErrKeyInUse      = &Refusal{protocol.CodeKey, "the key belongs to another device: make a key of its own for each device"}
)

// Registry works on the mirror database. It is safe for concurrent use.
type Registry struct {
	pool *pgxpool.Pool
	log  *zap.Logger
	hash *hasher
}

// New makes a registry on a pool of the mirror database. It does no I/O. A nil log logs nothing.
func New(pool *pgxpool.Pool, log *zap.Logger) *Registry {
	if log == nil {
		log = zap.NewNop()
	}
	return &Registry{pool: pool, log: log.Named("registry"), hash: newHasher()}
}

// User is a person who syncs.
type User struct {
	Name       string            `json:"name"`
	Groups     []string          `json:"groups"`
	Attributes map[string]string `json:"attributes,omitempty"`
	Password   bool              `json:"password"` // has one; without, devices are enrolled by token or by the company's provider
	Blocked    bool              `json:"blocked"`
	Devices    int               `json:"devices"` // number of devices
	CreatedAt  time.Time         `json:"created_at"`
}

// Device is one database file of a user. Times are nil until the thing has happened.
type Device struct {
	ID             int64      `json:"id"`
	User           string     `json:"user"`
	Name           string     `json:"name"`
	PublicKey      string     `json:"public_key,omitempty"` // empty: not enrolled
	Blocked        bool       `json:"blocked"`              // the device itself; its user may be blocked too
	App            string     `json:"app,omitempty"`
	EnrolledAt     *time.Time `json:"enrolled_at,omitempty"`
	LastSeenAt     *time.Time `json:"last_seen_at,omitempty"` // login, exact to a minute
	LastSyncAt     *time.Time `json:"last_sync_at,omitempty"`
	OldestUnsentAt *time.Time `json:"oldest_unsent_at,omitempty"`
}

// RemoveUser removes a user with all devices and what the server keeps for them, and closes their connections.
func (r *Registry) RemoveUser(ctx context.Context, name string) error {
	return r.one(ctx, "remove user", ErrUnknownUser,
		`WITH gone AS (DELETE FROM waystage.app_user WHERE name = $1 RETURNING name)
		 SELECT pg_notify('`+channel+`', name || '/') FROM gone`, name)
}

// BlockUser keeps a user out and closes the connections of all the user's devices.
func (r *Registry) BlockUser(ctx context.Context, name string) error {
	return r.one(ctx, "block user", ErrUnknownUser,
		`WITH b AS (UPDATE waystage.app_user SET blocked = true WHERE name = $1 RETURNING name)
		 SELECT pg_notify('`+channel+`', name || '/') FROM b`, name)
}

// UnblockUser lets a user in again; devices that are blocked themselves stay so.
func (r *Registry) UnblockUser(ctx context.Context, name string) error {
	return r.one(ctx, "unblock user", ErrUnknownUser, `UPDATE waystage.app_user SET blocked = false WHERE name = $1`, name)
}

// EnsureDevice makes a device known, if it is not yet, and returns its id. It does not say whether it is blocked.
func (r *Registry) EnsureDevice(ctx context.Context, user, device string) (int64, error) {
	if !protocol.ValidName(user) || !protocol.ValidName(device) {
		return 0, ErrName
	}
	const find = `SELECT id FROM waystage.device WHERE user_name = $1 AND name = $2`
	var id int64
	err := r.pool.QueryRow(ctx, find, user, device).Scan(&id)
	if !errors.Is(err, pgx.ErrNoRows) {
		return id, wrap("find device", err)
	}
	tag, err := r.pool.Exec(ctx, `
		INSERT INTO waystage.device (user_name, name)
		SELECT u.name, $2 FROM waystage.app_user u
		 WHERE u.name = $1 AND (SELECT count(*) FROM waystage.device d WHERE d.user_name = $1) < $3
		ON CONFLICT DO NOTHING`, user, device, MaxDevices)
	if err != nil {
		return 0, wrap("add device", err)
	}
	if err = r.pool.QueryRow(ctx, find, user, device).Scan(&id); !errors.Is(err, pgx.ErrNoRows) || tag.RowsAffected() > 0 {
		return id, wrap("find device", err)
	}
	var known bool
	if err := r.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM waystage.app_user WHERE name = $1)`, user).Scan(&known); err != nil {
		return 0, wrap("find user", err)
	}
	if known {
		return 0, ErrTooMany
	}
	return 0, ErrUnknownUser
}

// ListDevices lists the devices of a user, or of all users when user is empty; not the operators' own.
func (r *Registry) ListDevices(ctx context.Context, user string) ([]Device, error) {
	rows, err := r.pool.Query(ctx, `
		SELECT id, user_name, name, coalesce(public_key, ''), blocked, app, enrolled_at, last_seen_at, last_sync_at, oldest_unsent_at
		  FROM waystage.device WHERE $1 IN ('', user_name) AND user_name <> $2 ORDER BY user_name, name`, user, protocol.OperatorUser)
	if err != nil {
		return nil, wrap("list devices", err)
	}
	devices, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (d Device, err error) {
		err = row.Scan(&d.ID, &d.User, &d.Name, &d.PublicKey, &d.Blocked, &d.App, &d.EnrolledAt, &d.LastSeenAt, &d.LastSyncAt, &d.OldestUnsentAt)
		return d, err
	})
	return devices, wrap("list devices", err)
}

// BlockDevice keeps a device out and closes its connections. A device that is not known yet can be blocked too.
func (r *Registry) BlockDevice(ctx context.Context, user, device string) error {
	if _, err := r.EnsureDevice(ctx, user, device); err != nil {
		return err
	}
	return r.one(ctx, "block device", ErrUnknownDevice,
		`WITH b AS (UPDATE waystage.device SET blocked = true WHERE user_name = $1 AND name = $2 RETURNING user_name || '/' || name AS who)
		 SELECT pg_notify('`+channel+`', who) FROM b`, user, device)
}

// UnblockDevice lets a device in again.
func (r *Registry) UnblockDevice(ctx context.Context, user, device string) error {
	return r.one(ctx, "unblock device", ErrUnknownDevice,
		`UPDATE waystage.device SET blocked = false WHERE user_name = $1 AND name = $2`, user, device)
}

// RemoveDevice forgets a device with its key, sessions' owner and cursors, and closes its connections. Whoever has the
// user's password can enrol a device of that name again; to keep a device out, block it.
func (r *Registry) RemoveDevice(ctx context.Context, user, device string) error {
	return r.one(ctx, "remove device", ErrUnknownDevice,
		`WITH gone AS (DELETE FROM waystage.device WHERE user_name = $1 AND name = $2 RETURNING user_name || '/' || name AS who)
		 SELECT pg_notify('`+channel+`', who) FROM gone`, user, device)
}

// Enrol gives a device its key, replacing an older one: from then on it logs in by signing with it.
func (r *Registry) Enrol(ctx context.Context, user, device, publicKey, app string) error {
	if !nkeys.IsValidPublicUserKey(publicKey) {
		return ErrKey
	}
	if len(app) > 200 {
		app = app[:200]
	}
	if _, err := r.EnsureDevice(ctx, user, device); err != nil {
		return err
	}
	err := r.one(ctx, "enrol", ErrBlocked, `
		UPDATE waystage.device d SET public_key = $3, app = $4, enrolled_at = now()
		  FROM waystage.app_user u
		 WHERE u.name = d.user_name AND d.user_name = $1 AND d.name = $2 AND NOT u.blocked AND NOT d.blocked`,
		user, device, publicKey, validText(app))
	if isUnique(err) {
		return ErrKeyInUse
	}
	return err
}

// one runs a statement that must touch exactly one row; its first argument is the user.
func (r *Registry) one(ctx context.Context, what string, none *Refusal, sql string, args ...any) error {
	if args[0] == protocol.OperatorUser { // nobody's to change
		return none
	}
	tag, err := r.pool.Exec(ctx, sql, args...)
	if err != nil {
		return wrap(what, err)
	}
	if tag.RowsAffected() == 0 {
		return none
	}
	return nil
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("registry: %s: %w", what, err)
}

func isUnique(err error) bool { return hasState(err, "23505") }

func isCheck(err error) bool { return hasState(err, "23514") }

func hasState(err error, state string) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == state
}
