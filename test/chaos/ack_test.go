package chaos

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/schema"
)

// acks watches what the slots are told (rule R7). A slot that was told too much loses data only if something else
// breaks just then, and much of that mends itself: so the telling is looked at, not the loss.
type acks struct {
	h     *history
	slots []*watched
}

// watched is one slot of Waystage's, and a slot of the bench's own beside it that remembers where transactions ended.
type watched struct {
	server      *pgxpool.Pool // has the slot
	direction   string
	slot, own   string
	publication string

	mu    sync.Mutex
	ahead []told
}

// told is a moment at which the slot was told more than the target had.
type told struct{ slot, target change.LSN }

// watchAcks makes the bench's slots. Replication must have begun.
func (h *history) watchAcks() *acks {
	epoch, err := schema.Epoch(h.ctx, h.mirror)
	h.must(err)
	a := &acks{h: h, slots: []*watched{
		{server: h.source, direction: "down", slot: schema.SlotDown(epoch), publication: schema.PublicationDown},
		{server: h.mirror, direction: "up", slot: schema.SlotUp(epoch), publication: schema.PublicationUp},
	}}
	for _, w := range a.slots {
		w.own = fmt.Sprintf("chaos_%s_%s", w.direction, schema.Suffix(epoch))
		_, err := w.server.Exec(h.ctx, "SELECT pg_create_logical_replication_slot($1, 'pgoutput')", w.own)
		h.must(err)
		h.t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if _, err := w.server.Exec(ctx, "SELECT pg_drop_replication_slot($1)", w.own); err != nil {
				h.t.Errorf("drop the bench's slot %s: %v", w.own, err)
			}
		})
	}
	return a
}

// run looks until ctx ends. What cannot be asked just now is asked again.
func (a *acks) run(ctx context.Context) {
	var all sync.WaitGroup
	for _, w := range a.slots {
		all.Go(func() {
			for ctx.Err() == nil {
				w.look(ctx, a.h.mirror)
				select {
				case <-ctx.Done():
				case <-time.After(40 * time.Millisecond):
				}
			}
		})
	}
	all.Wait()
}

// look asks the slot first: the target's position, read later, is not less than it was then.
func (w *watched) look(ctx context.Context, mirror *pgxpool.Pool) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var slot, target string
	if w.server.QueryRow(ctx, "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1", w.slot).Scan(&slot) != nil ||
		mirror.QueryRow(ctx, "SELECT position::text FROM waystage.progress WHERE direction = $1", w.direction).Scan(&target) != nil {
		return
	}
	s, err := change.ParseLSN(slot)
	if err != nil {
		return
	}
	if t, err := change.ParseLSN(target); err == nil && s > t {
		w.mu.Lock()
		w.ahead = append(w.ahead, told{s, t})
		w.mu.Unlock()
	}
}

// check names moments at which a slot was told more than the target had, with a transaction of ours in between: being ahead of
// the target is right only where the log has nothing for it.
func (a *acks) check(ctx context.Context, c *checker) error {
	for _, w := range a.slots {
		ends, err := w.ends(ctx)
		if err != nil {
			return fmt.Errorf("read the bench's slot %s: %w", w.own, err)
		}
		if len(ends) == 0 {
			c.fail("bench", "the slot %s has seen no transaction", w.own)
		}
	moments:
		for _, m := range w.ahead {
			for _, end := range ends {
				if end > m.target && end <= m.slot {
					c.fail("I1", "slot %s was told %s when the target was at %s, and a transaction ends at %s: it could have been lost (R7)", w.slot, m.slot, m.target, end)
					break moments
				}
			}
		}
	}
	return nil
}

// ends are the ends of all transactions with rows of the publication.
func (w *watched) ends(ctx context.Context) (out []change.LSN, err error) {
	rows, err := w.server.Query(ctx, "SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1', 'publication_names', $2)", w.own, w.publication)
	if err != nil {
		return nil, err
	}
	var data []byte
	filled := false
	_, err = pgx.ForEachRow(rows, []any{&data}, func() error {
		switch data[0] {
		case 'B':
			filled = false
		case 'I', 'U', 'D', 'T':
			filled = true
		case 'C': // flags, commit, end, time
			if filled {
				out = append(out, change.LSN(binary.BigEndian.Uint64(data[10:18])))
			}
		}
		return nil
	})
	return out, err
}
