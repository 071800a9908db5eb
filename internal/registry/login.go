package registry

import (
	"context"
	"errors"
	"strings"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// Password checks a login of a user's device by password: the way in for a device that has no key yet, and for people
// with the nats tool. The device becomes known if it was not. Refusals are [ErrCredentials], [ErrBlocked], [ErrName]
// and [ErrTooMany]; who does not know the password learns nothing but the first.
func (r *Registry) Password(ctx context.Context, user, device, password string) error {
	if !protocol.ValidName(user) || !protocol.ValidName(device) {
		return ErrName
	}
	var phc string
	var blocked bool
	err := r.pool.QueryRow(ctx, `
		SELECT u.password_hash, u.blocked OR coalesce(d.blocked, false)
		  FROM waystage.app_user u LEFT JOIN waystage.device d ON d.user_name = u.name AND d.name = $2 AND d.removed_at IS NULL
		 WHERE u.name = $1`, user, device).Scan(&phc, &blocked)
	unknown := errors.Is(err, pgx.ErrNoRows)
	if err != nil && !unknown {
		return wrap("password login", err)
	}
	if unknown = unknown || phc == noPassword; unknown {
		phc = r.hash.decoy() // the same work as for a known user, or the time would tell
	}
	ok, err := r.hash.verify(ctx, phc, password)
	switch {
	case err != nil:
		return wrap("password login of "+user, err)
	case !ok || unknown:
		return ErrCredentials
	case blocked:
		return ErrBlocked
	}
	id, err := r.EnsureDevice(ctx, user, device)
	if err != nil {
		return err
	}
	r.seen(ctx, id)
	return nil
}

// Passwords lets users' devices in by password: it is a provider of the auth callout.
type Passwords struct{ *Registry }

// Mine tells that any secret may be a password; this provider is asked last.
func (Passwords) Mine(string) bool { return true }

// Only is empty: such a login is good for every call of the device.
func (Passwords) Only() string { return "" }

// Identify is [Registry.Password].
func (p Passwords) Identify(ctx context.Context, user, device, secret string) error {
	return p.Password(ctx, user, device, secret)
}

// seen notes the login, at most once a minute: a thousand devices that reconnect at once must not mean a thousand writes.
// A login does not fail for it.
func (r *Registry) seen(ctx context.Context, id int64) {
	_, err := r.pool.Exec(ctx, `
		UPDATE waystage.device SET last_seen_at = now()
		 WHERE id = $1 AND (last_seen_at IS NULL OR last_seen_at < now() - interval '1 minute')`, id)
	if err != nil {
		r.log.Warn("cannot note a login", zap.Int64("device", id), zap.Error(err))
	}
}

// validText makes text from outside acceptable to PostgreSQL, which stores neither NUL nor broken UTF-8.
func validText(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "?"), "\x00", "?")
}
