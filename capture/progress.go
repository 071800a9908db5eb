package capture

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/schema"
)

// progress reads the target's durable position from the mirror. Both directions keep theirs there: down moves it in the
// transaction that applies, up after the source's commit.
type progress struct {
	conn      *pgx.Conn
	direction string
}

func openProgress(ctx context.Context, c *Config) (*progress, error) {
	conn, err := schema.Connect(ctx, c.Mirror, c.application())
	if err != nil {
		return nil, fmt.Errorf("connect to the mirror: %w", err)
	}
	return &progress{conn, c.Direction}, nil
}

func (p *progress) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = p.conn.Close(ctx)
}

// read returns the durable position and whether the applier asks for a new run.
func (p *progress) read(ctx context.Context) (pos change.LSN, rewind bool, err error) {
	var text string
	err = p.conn.QueryRow(ctx, "SELECT position::text, rewind FROM waystage.progress WHERE direction = $1", p.direction).Scan(&text, &rewind)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, false, &Error{CodeProgress, fmt.Sprintf("waystage.progress has no row %q", p.direction), "Start `waystage serve` again: it finishes the set-up"}
	}
	if err != nil {
		return 0, false, fmt.Errorf("read the target's position: %w", err)
	}
	pos, err = change.ParseLSN(text)
	return pos, rewind, err
}

// standing is what the target has of which server, when a run begins.
type standing struct {
	position  change.LSN
	committed *time.Time // commit time of the transaction that ends at position; nil: not known, or none was applied yet
	system    string     // the server that position belongs to; empty: no run has begun yet
	timeline  int32
	told      change.LSN // what the slot may have been told beyond position
}

func (p *progress) standing(ctx context.Context) (s standing, err error) {
	if s.position, _, err = p.read(ctx); err != nil {
		return s, err
	}
	err = p.conn.QueryRow(ctx, "SELECT system, timeline, committed_at FROM waystage.progress WHERE direction = $1 AND position = $2::text::pg_lsn", p.direction, s.position.String()).
		Scan(&s.system, &s.timeline, &s.committed)
	if err != nil {
		return s, fmt.Errorf("read what the target's position belongs to: %w", err) // it has just moved, at worst
	}
	s.told, err = p.told(ctx)
	return s, err
}

// belongs notes which server and timeline the target's positions are of from now on.
func (p *progress) belongs(ctx context.Context, h hello) error {
	_, err := p.conn.Exec(ctx, "UPDATE waystage.progress SET system = $2, timeline = $3 WHERE direction = $1 AND (system, timeline) <> ($2, $3)", p.direction, h.system, h.timeline)
	if err != nil {
		return fmt.Errorf("note the server and its timeline: %w", err)
	}
	return nil
}

// rewound clears the applier's wish.
func (p *progress) rewound(ctx context.Context) error {
	_, err := p.conn.Exec(ctx, "UPDATE waystage.progress SET rewind = false WHERE direction = $1 AND rewind", p.direction)
	return err
}

// What the slot was told beyond the target's position (log that had nothing for us) is noted before it is told, so that
// a slot which somebody else has moved is recognised.
func (p *progress) key() string { return "slot_told_" + p.direction }

func (p *progress) told(ctx context.Context) (change.LSN, error) {
	var text string
	err := p.conn.QueryRow(ctx, "SELECT value FROM waystage.meta WHERE key = $1", p.key()).Scan(&text)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return change.ParseLSN(text)
}

func (p *progress) tell(ctx context.Context, lsn change.LSN) error {
	_, err := p.conn.Exec(ctx, `INSERT INTO waystage.meta (key, value) VALUES ($1, $2)
		ON CONFLICT (key) DO UPDATE SET value = excluded.value`, p.key(), lsn.String())
	return err
}
