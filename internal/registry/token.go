package registry

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
)

// Bounds of the life of an enrolment token.
const (
	minTokenLife, maxTokenLife = time.Minute, 366 * 24 * time.Hour
	tokenSize                  = 32 // random bytes
)

// Token is an enrolment token as it is shown: without the token itself, which nobody keeps.
type Token struct {
	ID        int64      `json:"id"`
	User      string     `json:"user"`
	Device    string     `json:"device"`
	State     string     `json:"state"` // open, used, expired, revoked
	CreatedAt time.Time  `json:"created_at"`
	CreatedBy string     `json:"created_by,omitempty"`
	ExpiresAt time.Time  `json:"expires_at"`
	UsedAt    *time.Time `json:"used_at,omitempty"`
	RevokedAt *time.Time `json:"revoked_at,omitempty"`
}

// NewToken makes a token that enrols one device of a user once. Who wants it is noted. The secret is returned, and kept
// nowhere.
func (r *Registry) NewToken(ctx context.Context, user, device, who string, life time.Duration) (secret string, t Token, err error) {
	switch {
	case !protocol.ValidName(user), !protocol.ValidName(device):
		return "", t, ErrName
	case life < minTokenLife || life > maxTokenLife:
		return "", t, ErrTokenLife
	}
	b := make([]byte, tokenSize)
	rand.Read(b)
	secret = protocol.TokenPrefix + base64.RawURLEncoding.EncodeToString(b)
	t = Token{User: user, Device: device, State: "open", CreatedBy: shortText(who)}
	err = r.pool.QueryRow(ctx, `
		INSERT INTO waystage.enrol_token (hash, user_name, device_name, created_by, expires_at)
		VALUES ($1, $2, $3, $4, clock_timestamp() + make_interval(secs => $5)) RETURNING id, created_at, expires_at`,
		tokenHash(secret), user, device, t.CreatedBy, life.Seconds()).Scan(&t.ID, &t.CreatedAt, &t.ExpiresAt)
	if hasState(err, "23503") {
		return "", t, ErrUnknownUser
	}
	return secret, t, wrap("make a token", err)
}

func tokenHash(secret string) []byte {
	h := sha256.Sum256([]byte(secret))
	return h[:]
}

// Tokens lists the enrolment tokens of a user, or of all users when user is empty, newest first.
func (r *Registry) Tokens(ctx context.Context, user string) ([]Token, error) {
	rows, err := r.pool.Query(ctx, `
		SELECT id, user_name, device_name, CASE WHEN used_at IS NOT NULL THEN 'used' WHEN revoked_at IS NOT NULL THEN 'revoked'
			WHEN expires_at < clock_timestamp() THEN 'expired' ELSE 'open' END, created_at, created_by, expires_at, used_at, revoked_at
		  FROM waystage.enrol_token WHERE $1 IN ('', user_name) ORDER BY id DESC`, user)
	if err != nil {
		return nil, wrap("list tokens", err)
	}
	tokens, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (t Token, err error) {
		err = row.Scan(&t.ID, &t.User, &t.Device, &t.State, &t.CreatedAt, &t.CreatedBy, &t.ExpiresAt, &t.UsedAt, &t.RevokedAt)
		return t, err
	})
	return tokens, wrap("list tokens", err)
}

// RevokeToken takes a token back that has not been used.
func (r *Registry) RevokeToken(ctx context.Context, id int64) error {
	var used bool
	err := r.pool.QueryRow(ctx, `
		UPDATE waystage.enrol_token SET revoked_at = CASE WHEN used_at IS NULL THEN coalesce(revoked_at, clock_timestamp()) END
		 WHERE id = $1 RETURNING used_at IS NOT NULL`, id).Scan(&used)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return ErrTokenUnknown
	case err == nil && used:
		return ErrTokenUsed
	}
	return wrap("revoke a token", err)
}

// EnrolTokens lets devices in that have an enrolment token, to enrol and nothing else: it is a provider of the auth callout.
// Whoever has a token that was good once is told by [Registry.Redeem] what is wrong with it; here only unknown ones are refused.
type EnrolTokens struct{ *Registry }

// Mine tells whether a secret is an enrolment token.
func (EnrolTokens) Mine(secret string) bool { return strings.HasPrefix(secret, protocol.TokenPrefix) }

// Only is the one call that such a login is good for.
func (EnrolTokens) Only() string { return protocol.VerbRedeem }

// Identify refuses with [ErrTokenUnknown] a token that is none of the device's.
func (t EnrolTokens) Identify(ctx context.Context, user, device, secret string) error {
	var known bool
	err := t.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM waystage.enrol_token WHERE hash = $1 AND user_name = $2 AND device_name = $3)`,
		tokenHash(secret), user, device).Scan(&known)
	if err == nil && !known {
		return ErrTokenUnknown
	}
	return wrap("login by token", err)
}

// Redeem enrols a device with its token. It has its effect once: of two that come with the same token one is refused, and
// whoever lost the answer may ask again with the same key.
func (r *Registry) Redeem(ctx context.Context, user, device string, e protocol.Enrolment) error {
	return r.transact(ctx, "redeem a token", func(tx pgx.Tx) error {
		var id int64
		var expired, revoked, used, same bool
		err := tx.QueryRow(ctx, `
			SELECT id, expires_at < clock_timestamp(), revoked_at IS NOT NULL, used_at IS NOT NULL, coalesce(used_key = $4, false)
			  FROM waystage.enrol_token WHERE hash = $1 AND user_name = $2 AND device_name = $3 FOR UPDATE`,
			tokenHash(e.Token), user, device, e.Key).Scan(&id, &expired, &revoked, &used, &same)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return ErrTokenUnknown
		case err != nil:
			return err
		case used && same:
			var stands bool
			err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM waystage.device WHERE user_name = $1 AND name = $2 AND public_key = $3)`, user, device, e.Key).Scan(&stands)
			if err == nil && !stands { // reset or enrolled again since
				return ErrTokenUsed
			}
			return err
		case used:
			return ErrTokenUsed
		case revoked:
			return ErrTokenRevoked
		case expired:
			return ErrTokenExpired
		}
		if err := enrol(ctx, tx, user, device, e); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `UPDATE waystage.enrol_token SET used_at = clock_timestamp(), used_key = $2 WHERE id = $1`, id, e.Key)
		return err
	})
}
