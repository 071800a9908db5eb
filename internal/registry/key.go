package registry

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nkeys"

	"github.com/waystage/waystage/protocol"
)

// A key changes in three steps, each of which may be the last before a crash: the device stores the new key beside the old
// one, announces it ([Registry.Rotate]), and logs in with it ([Registry.Key]), which makes it the device's only key. Until
// then the old one is good.

// Key finds the device that a public key belongs to. The caller has checked that the connection, which conn names for the
// broker, can sign with it. The first login with an announced key ends the old one, and closes all other connections of the
// device. Refusals are [ErrCredentials] and [ErrBlocked].
func (r *Registry) Key(ctx context.Context, publicKey, conn string) (user, device string, err error) {
	if publicKey == "" {
		return "", "", ErrCredentials
	}
	var id int64
	var blocked, next bool
	err = r.pool.QueryRow(ctx, `
		SELECT d.id, d.user_name, d.name, d.blocked OR u.blocked, d.public_key IS DISTINCT FROM $1
		  FROM waystage.device d JOIN waystage.app_user u ON u.name = d.user_name
		 WHERE d.public_key = $1 OR d.next_key = $1`, publicKey).Scan(&id, &user, &device, &blocked, &next)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return "", "", ErrCredentials
	case err != nil:
		return "", "", wrap("key login", err)
	case blocked:
		return "", "", ErrBlocked
	}
	if next {
		// Nothing to do if another login with the same key was faster.
		_, err := r.pool.Exec(ctx, `
			WITH changed AS (
				UPDATE waystage.device SET public_key = next_key, next_key = NULL, key_at = now(), new_key_asked_at = NULL
				 WHERE next_key = $1 RETURNING user_name || '/' || name || '/' || $2 AS who)
			SELECT pg_notify('`+channel+`', who) FROM changed`, publicKey, conn)
		if err != nil {
			return "", "", wrap("change of key", err)
		}
	}
	r.seen(ctx, id)
	return user, device, nil
}

// Rotate notes the key that a device will log in with from its next login on. Refusals are [ErrKey], [ErrKeyInUse],
// [ErrNotEnrolled] and [ErrBlocked].
func (r *Registry) Rotate(ctx context.Context, user, device, publicKey string) error {
	return r.transact(ctx, "rotate key", func(tx pgx.Tx) error {
		if err := freeKey(ctx, tx, user, device, publicKey); err != nil {
			return err
		}
		var blocked, enrolled bool
		err := tx.QueryRow(ctx, `
			UPDATE waystage.device d SET next_key = CASE WHEN d.public_key = $3 THEN NULL ELSE $3 END
			  FROM waystage.app_user u
			 WHERE u.name = d.user_name AND d.user_name = $1 AND d.name = $2 AND d.removed_at IS NULL
			RETURNING d.blocked OR u.blocked, d.public_key IS NOT NULL`, user, device, publicKey).Scan(&blocked, &enrolled)
		switch {
		case errors.Is(err, pgx.ErrNoRows), err == nil && !enrolled:
			return ErrNotEnrolled
		case err == nil && blocked:
			return ErrBlocked
		}
		return err
	})
}

// AskNewKey has a device take another key: it hears of it with its next sync.
func (r *Registry) AskNewKey(ctx context.Context, user, device string) error {
	err := r.one(ctx, "ask for a new key", ErrNotEnrolled, `
		UPDATE waystage.device SET new_key_asked_at = now() WHERE user_name = $1 AND name = $2 AND public_key IS NOT NULL`, user, device)
	if errors.Is(err, ErrNotEnrolled) {
		if _, derr := r.Device(ctx, user, device); derr != nil {
			return derr
		}
	}
	return err
}

// freeKey refuses a key that is none, or that another device has or has announced. Whoever asks for the same key waits.
func freeKey(ctx context.Context, tx pgx.Tx, user, device, publicKey string) error {
	if !nkeys.IsValidPublicUserKey(publicKey) {
		return ErrKey
	}
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtextextended($1, 4711))`, publicKey); err != nil {
		return err
	}
	var taken bool
	err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM waystage.device WHERE (public_key = $1 OR next_key = $1) AND (user_name, name) <> ($2, $3))`,
		publicKey, user, device).Scan(&taken)
	if err == nil && taken {
		return ErrKeyInUse
	}
	return err
}

// Refused notes a login in a device's name that was not let in, for the operator: why, and where from. The name was claimed,
// not proven. Nothing is noted for a device that is not known.
func (r *Registry) Refused(ctx context.Context, user, device string, code protocol.Code, host string) error {
	if !protocol.ValidName(user) || !protocol.ValidName(device) {
		return nil
	}
	// Whoever tries a thousand times causes one write a second for each reason.
	_, err := r.pool.Exec(ctx, `
		UPDATE waystage.device SET refused_at = now(), refused_code = $3, refused_host = $4
		 WHERE user_name = $1 AND name = $2 AND removed_at IS NULL AND (refused_at IS NULL OR refused_at < now() - interval '1 second' OR refused_code IS DISTINCT FROM $3)`,
		user, device, string(code), shortText(host))
	return wrap("note a refused login", err)
}
