package registry

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
)

// channel is where PostgreSQL tells every server that a user ("name/") or device ("name/device") is out, or all of a device's
// connections but one ("name/device/connection").
const channel = "waystage_out"

const watchRetry = 2 * time.Second // between attempts to reach the database

// Watch calls disconnect whenever a user (device empty) or device was blocked, reset or removed, by whichever process, until
// ctx ends; then it returns nil. When a device has changed its key, except names the connection that may stay. After each lost database connection it first names everybody who is blocked, so that a
// block is never missed. It holds one connection of its own, outside the pool.
func (r *Registry) Watch(ctx context.Context, disconnect func(ctx context.Context, user, device, except string) error) error {
	for ctx.Err() == nil {
		err := r.listen(ctx, disconnect)
		if ctx.Err() != nil {
			break
		}
		r.log.Warn("lost the connection that listens for blocked devices; trying again", zap.Error(err))
		select {
		case <-ctx.Done():
		case <-time.After(watchRetry):
		}
	}
	return nil
}

func (r *Registry) listen(ctx context.Context, disconnect func(ctx context.Context, user, device, except string) error) error {
	conn, err := pgx.ConnectConfig(ctx, r.pool.Config().ConnConfig)
	if err != nil {
		return wrap("listen", err)
	}
	defer func() {
		bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		conn.Close(bye)
	}()
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return wrap("listen", err)
	}
	out := func(who string) {
		user, device, _ := strings.Cut(who, "/")
		device, except, _ := strings.Cut(device, "/")
		if err := disconnect(ctx, user, device, except); err != nil && ctx.Err() == nil {
			// The block itself is in force: no new login is let in, and a live one ends with its token.
			r.log.Error("cannot close the connections of a blocked or removed device", zap.String("who", who), zap.Error(err))
		}
	}
	// After LISTEN, so that nothing falls between the two.
	rows, err := conn.Query(ctx, `
		SELECT name || '/' FROM waystage.app_user WHERE blocked
		UNION ALL SELECT user_name || '/' || name FROM waystage.device WHERE blocked OR public_key IS NULL AND reset_at > now() - interval '2 hours'`)
	if err != nil {
		return wrap("list blocked", err)
	}
	blocked, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return wrap("list blocked", err)
	}
	for _, who := range blocked {
		out(who)
	}
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return wrap("listen", errors.Join(err, ctx.Err()))
		}
		out(n.Payload)
	}
}
