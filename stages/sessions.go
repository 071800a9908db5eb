package stages

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/protocol"
)

// Sessions answers the gateway's questions about sessions. The state is the database's: any server may be asked.
type Sessions struct{ db *pgxpool.Pool }

// NewSessions makes it.
func NewSessions(db *pgxpool.Pool) *Sessions { return &Sessions{db: db} }

// Close notes that the device has applied the reply to a session. Closing one twice, or one that is not there, is no error.
func (s *Sessions) Close(ctx context.Context, user, device, token string) error {
	incarnation, n, err := protocol.ParseSession(token)
	if err != nil {
		return err
	}
	_, err = s.db.Exec(ctx, `
		WITH closed AS (
			UPDATE waystage.session SET state = 'closed', closed_at = clock_timestamp()
			WHERE incarnation = $1 AND n = $2 AND user_name = $3 AND device_name = $4 AND state = 'replied' RETURNING device_id)
		UPDATE waystage.device d SET last_sync_at = now() FROM closed WHERE d.id = closed.device_id`, incarnation, n, user, device)
	if err != nil {
		return fmt.Errorf("close session %s: %w", token, err)
	}
	return nil
}

// refusalSQL keeps the refusal of a whole request: $1 user, $2 device, $3 token, $4 code, $5 message, $6 when it was received.
const refusalSQL = `
INSERT INTO waystage.refusal (user_name, device_name, token, code, message, received_at) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (user_name, device_name, token) DO UPDATE SET code = excluded.code, message = excluded.message, received_at = excluded.received_at,
	refused_at = clock_timestamp(), times = refusal.times + 1`

// forkedSQL counts, at the device, a request that does not continue its incarnation, once however often it comes.
const forkedSQL = `
UPDATE waystage.device d SET forks = forks + 1, forked_at = now()
FROM waystage.refusal r WHERE d.user_name = $1 AND d.name = $2
	AND r.user_name = $1 AND r.device_name = $2 AND r.token = $3 AND r.times = 1`

// Status tells how far a session of the device has come; state "unknown" if it was not staged (yet).
func (s *Sessions) Status(ctx context.Context, user, device, token string) (protocol.Status, error) {
	incarnation, n, err := protocol.ParseSession(token)
	if err != nil {
		return protocol.Status{}, err
	}
	var st protocol.Status
	err = s.db.QueryRow(ctx, `
		SELECT CASE state WHEN 'closed' THEN 'replied' ELSE state END, CASE WHEN state IN ('replied', 'closed') THEN pages ELSE 0 END, records
		FROM waystage.session WHERE incarnation = $1 AND n = $2 AND user_name = $3 AND device_name = $4`, incarnation, n, user, device).
		Scan(&st.State, &st.Pages, &st.Records)
	if errors.Is(err, pgx.ErrNoRows) {
		st.Error = &protocol.Error{}
		err = s.db.QueryRow(ctx, `SELECT 'refused', code, message FROM waystage.refusal WHERE user_name = $1 AND device_name = $2 AND token = $3`,
			user, device, token).Scan(&st.State, &st.Error.Code, &st.Error.Message)
		if errors.Is(err, pgx.ErrNoRows) {
			return protocol.Status{State: "unknown"}, nil
		}
	}
	if err != nil {
		return protocol.Status{}, fmt.Errorf("status of session %s: %w", token, err)
	}
	return st, nil
}
