package stages

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/protocol"
)

// Sessions answers the gateway's questions about sessions. The state is the database's: any server may be asked.
type Sessions struct {
	db *pgxpool.Pool

	mu      sync.Mutex
	closing bool       // somebody closes, and takes what comes meanwhile
	waiting []*closing // to be closed together
}

// NewSessions makes it.
func NewSessions(db *pgxpool.Pool) *Sessions { return &Sessions{db: db} }

// closing is a session whose device has applied the reply.
type closing struct {
	user, device, incarnation string
	n                         int64
	done                      chan error // one
}

// Close notes that the device has applied the reply to a session. Closing one twice, or one that is not there, is no error.
// Sessions that come while others are being closed are closed together, in one commit.
func (s *Sessions) Close(ctx context.Context, user, device, token string) error {
	one := &closing{user: user, device: device, done: make(chan error, 1)}
	var err error
	if one.incarnation, one.n, err = protocol.ParseSession(token); err != nil {
		return err
	}
	s.mu.Lock()
	s.waiting = append(s.waiting, one)
	first := !s.closing
	s.closing = true
	s.mu.Unlock()
	if first {
		go s.closeAll()
	}
	select {
	case err = <-one.done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("close session %s: %w", token, err)
	}
	return nil
}

// mostClosed bounds the sessions that are closed in one commit.
const mostClosed = 500

// closeAll closes until nothing waits.
func (s *Sessions) closeAll() {
	for {
		s.mu.Lock()
		n := min(len(s.waiting), mostClosed)
		list := s.waiting[:n:n]
		s.waiting = s.waiting[n:]
		if n == 0 {
			s.closing, s.waiting = false, nil
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		err := s.close(list)
		for _, one := range list {
			one.done <- err
		}
	}
}

// closeSQL notes it at the devices, in the order in which intake locks them, and closes the sessions: $1 incarnations, $2 numbers,
// $3 users, $4 devices.
var closeSQL = [...]string{`
	UPDATE waystage.device d SET last_sync_at = now()
	FROM (SELECT DISTINCT s.device_id FROM ` + closedSessions + ` ORDER BY s.device_id) c WHERE d.id = c.device_id`, `
	UPDATE waystage.session c SET state = 'closed', closed_at = clock_timestamp() FROM (SELECT s.id FROM ` + closedSessions + `) s WHERE c.id = s.id AND c.state = 'replied'`}

const closedSessions = `unnest($1::text[], $2::bigint[], $3::text[], $4::text[]) AS u(incarnation, n, user_name, device_name)
	JOIN waystage.session s USING (incarnation, n, user_name, device_name) WHERE s.state = 'replied'`

func (s *Sessions) close(list []*closing) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	incarnations, ns, users, devices := make([]string, len(list)), make([]int64, len(list)), make([]string, len(list)), make([]string, len(list))
	for i, one := range list {
		incarnations[i], ns[i], users[i], devices[i] = one.incarnation, one.n, one.user, one.device
	}
	b := &pgx.Batch{} // one transaction
	for _, sql := range closeSQL {
		b.Queue(sql, incarnations, ns, users, devices)
	}
	return s.db.SendBatch(ctx, b).Close()
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
