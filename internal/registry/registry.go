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

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
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
	ErrPassword      = &Refusal{"invalid_password", "the password is not usable: use 8 to 1024 bytes, and another beginning than " + protocol.TokenPrefix}
	ErrCredentials   = &Refusal{"credentials", "unknown user, wrong password or unknown device key"}
	ErrReplacedKey   = &Refusal{"replaced_key", "the device has another key by now: it was enrolled again, or another copy of its file has taken a new key"}
	ErrBlocked       = &Refusal{protocol.CodeBlocked, "the user or device is blocked: ask the operator to unblock it"}
	ErrUserExists    = &Refusal{"user_exists", "a user with this name exists already"}
	ErrUnknownUser   = &Refusal{"unknown_user", "there is no user with this name"}
	ErrUnknownDevice = &Refusal{"unknown_device", "there is no such device of this user"}
	ErrTooMany       = &Refusal{"too_many_devices", fmt.Sprintf("the user has %d devices already: remove one that is no longer used", MaxDevices)}
	ErrKey           = &Refusal{protocol.CodeKey, "the key is not a public user NKEY (56 characters that begin with U)"}
	ErrTokenLife     = &Refusal{"invalid_expiry", "a token is good for a minute at least and a year at most"}
	ErrTokenUnknown  = &Refusal{protocol.CodeTokenUnknown, "there is no such enrolment token for this device"}
	ErrTokenExpired  = &Refusal{protocol.CodeTokenExpired, "the enrolment token is too old: ask the operator for another"}
	ErrTokenUsed     = &Refusal{protocol.CodeTokenUsed, "the enrolment token has enrolled a device already: ask the operator for another"}
	ErrTokenRevoked  = &Refusal{protocol.CodeTokenRevoked, "the operator has taken the enrolment token back"}
	ErrNotEnrolled   = &Refusal{"not_enrolled", "the device has no key that could be changed: enrol it"}
	ErrInFlight      = &Refusal{"in_flight", "records of the user are waiting to be merged; the user is blocked now: run the command again when they have been (waystage receipts sessions)"}
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
