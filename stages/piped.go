package stages

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// piped is a transaction whose BEGIN and COMMIT travel with its first and last statements: of a small one, the waiting for the network
// is most of what it costs.
type piped struct {
	conn  *pgxpool.Conn
	begin string // not sent yet
}

func beginPiped(ctx context.Context, db *pgxpool.Pool) (*piped, error) {
	conn, err := db.Acquire(ctx)
	return &piped{conn: conn, begin: "BEGIN"}, err
}

// send runs the statements of a batch.
func (p *piped) send(ctx context.Context, b *pgx.Batch) error { return p.SendBatch(ctx, b).Close() }

// SendBatch is what send does, as pgx has it. The first one begins the transaction.
func (p *piped) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if p.begin != "" {
		b.QueuedQueries = slices.Insert(b.QueuedQueries, 0, &pgx.QueuedQuery{SQL: p.begin})
		p.begin = ""
	}
	return p.conn.SendBatch(ctx, b)
}

// Exec, Query and QueryRow come after the first batch.
func (p *piped) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	return p.conn.Exec(ctx, sql, args...)
}

func (p *piped) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return p.conn.Query(ctx, sql, args...)
}

func (p *piped) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return p.conn.QueryRow(ctx, sql, args...)
}

// commit runs them and commits. After an error nothing is committed, unless the connection was lost: then nobody knows.
func (p *piped) commit(ctx context.Context, b *pgx.Batch) error {
	var tag string
	b.Queue("COMMIT").Exec(func(t pgconn.CommandTag) error {
		tag = t.String()
		return nil
	})
	err := p.send(ctx, b)
	if err == nil && tag != "COMMIT" {
		err = fmt.Errorf("commit: %w", pgx.ErrTxCommitRollback)
	}
	return err
}

// Conn is the connection, for who wants to know whether it is still there.
func (p *piped) Conn() *pgx.Conn { return p.conn.Conn() }

// end undoes what was not committed and gives the connection back.
func (p *piped) end() {
	defer p.conn.Release()
	p.undo()
}

// undo undoes what was not committed. Its own failure means that the connection is gone, and with it the transaction.
func (p *piped) undo() {
	if c := p.Conn(); !c.IsClosed() && c.PgConn().TxStatus() != 'I' {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, _ = p.conn.Exec(ctx, "ROLLBACK")
	}
}
