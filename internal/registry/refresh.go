package registry

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
)

// RefreshOrder says who is to be sent everything anew. Empty fields do not restrict.
type RefreshOrder struct {
	User, Device string   // Device goes with User
	Sets         []string // nil: all
	Subscription string   // that the sets were named by, for the record
	Who, Note    string   // who orders it, and why
}

// Refresh is how far an order is for one set of one device.
type Refresh struct {
	Order        int64     `json:"order"`
	User         string    `json:"user"`
	Device       string    `json:"device"`
	Set          string    `json:"set"` // empty: the device has synced nothing that the server remembers
	Subscription string    `json:"subscription,omitempty"`
	State        string    `json:"state"` // waiting (for the next sync), sent, done
	AskedAt      time.Time `json:"asked_at"`
	Who          string    `json:"who"`
	Note         string    `json:"note,omitempty"`
}

// orderLock makes orders commit in the order of their numbers.
const orderLock = 7426190352

// OrderRefresh has devices sent all rows of their sets at their next sync, whatever their cursors say. It returns the
// order's number and for how many devices it is. Unsent changes are not touched.
func (r *Registry) OrderRefresh(ctx context.Context, o RefreshOrder) (id int64, devices int, err error) {
	err = pgx.BeginFunc(ctx, r.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, int64(orderLock)); err != nil {
			return err
		}
		var device *int64
		if o.User != "" {
			var known bool
			if err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM waystage.app_user WHERE name = $1 AND name <> $2)`, o.User, protocol.OperatorUser).Scan(&known); err != nil {
				return err
			}
			if !known {
				return ErrUnknownUser
			}
		}
		if o.Device != "" {
			err := tx.QueryRow(ctx, `SELECT id FROM waystage.device WHERE user_name = $1 AND name = $2`, o.User, o.Device).Scan(&device)
			if errors.Is(err, pgx.ErrNoRows) {
				return ErrUnknownDevice
			}
			if err != nil {
				return err
			}
		}
		err := tx.QueryRow(ctx, `INSERT INTO waystage.refresh (device_id, user_name, sets, subscription, who, note)
			VALUES ($1, nullif($2, ''), $3, $4, $5, $6) RETURNING id`, device, o.User, o.Sets, o.Subscription, o.Who, o.Note).Scan(&id)
		if err != nil {
			return err
		}
		return tx.QueryRow(ctx, `SELECT count(*) FROM waystage.device d WHERE ($1::bigint IS NULL OR d.id = $1) AND ($2 = '' OR d.user_name = $2) AND d.user_name <> $4
			AND ($3::text[] IS NULL OR EXISTS (SELECT FROM waystage.cursor c WHERE c.device_id = d.id AND c.set_name = ANY ($3)))`,
			device, o.User, o.Sets, protocol.OperatorUser).Scan(&devices)
	})
	var refused *Refusal
	if errors.As(err, &refused) {
		return 0, 0, refused
	}
	return id, devices, wrap("order a refresh", err)
}

// Refreshes tells of the last order that each device and set is under, by device; of all devices, or those of a user, or one.
func (r *Registry) Refreshes(ctx context.Context, user, device string) ([]Refresh, error) {
	return refreshes(ctx, r.pool, user, device)
}

func refreshes(ctx context.Context, db querier, user, device string) ([]Refresh, error) {
	rows, err := db.Query(ctx, `
		SELECT o.id, d.user_name, d.name, coalesce(k.set_name, ''), o.subscription, o.asked_at, o.who, o.note, CASE
				WHEN coalesce(k.refresh, 0) < o.id THEN 'waiting'
				WHEN EXISTS (SELECT FROM waystage.cursor c LEFT JOIN waystage.session s ON s.id = c.session_id
					WHERE c.device_id = d.id AND c.set_name = k.set_name AND c.refresh >= o.id AND coalesce(s.state, 'closed') = 'closed') THEN 'done'
				ELSE 'sent' END
		  FROM waystage.device d
		  LEFT JOIN LATERAL (SELECT c.set_name, max(c.refresh) AS refresh FROM waystage.cursor c WHERE c.device_id = d.id GROUP BY c.set_name) k ON true
		  JOIN LATERAL (SELECT * FROM waystage.refresh r WHERE (r.device_id IS NULL OR r.device_id = d.id)
				AND (r.user_name IS NULL OR r.user_name = d.user_name) AND (r.sets IS NULL OR k.set_name = ANY (r.sets)) ORDER BY r.id DESC LIMIT 1) o ON true
		 WHERE $1 IN ('', d.user_name) AND $2 IN ('', d.name) AND d.user_name <> $3 ORDER BY 2, 3, 4`, user, device, protocol.OperatorUser)
	if err != nil {
		return nil, wrap("list refreshes", err)
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (f Refresh, err error) {
		err = row.Scan(&f.Order, &f.User, &f.Device, &f.Set, &f.Subscription, &f.AskedAt, &f.Who, &f.Note, &f.State)
		return f, err
	})
	return list, wrap("list refreshes", err)
}
