package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
)

// clerk works at the source, past Waystage and its proxies. What became of his transactions the audit tells.
type clerk struct {
	h    *history
	i    int
	conn *pgx.Conn
}

func (c *clerk) work(steps []step) {
	defer func() {
		if c.conn != nil {
			_ = c.conn.Close(context.WithoutCancel(c.h.ctx))
		}
	}()
	for n, s := range steps {
		err := c.transaction(rand.New(rand.NewPCG(s.R, uint64(n))), fmt.Sprintf("office-%d.%d", c.i, n+1))
		if err == nil {
			c.h.counts.Lock()
			c.h.counts.office++
			c.h.counts.Unlock()
		}
		c.h.done.Add(1)
		time.Sleep(time.Duration(s.Pause) * time.Millisecond)
	}
}

var errChangedMind = errors.New("the clerk rolls back")

func (c *clerk) transaction(r *rand.Rand, tag string) error {
	ctx, cancel := context.WithTimeout(c.h.ctx, 10*time.Second)
	defer cancel()
	if c.conn == nil || c.conn.IsClosed() {
		var err error
		if c.conn, err = pgx.Connect(ctx, c.h.sourceDB); err != nil {
			return err
		}
	}
	return pgx.BeginFunc(ctx, c.conn, func(tx pgx.Tx) error {
		n := 1
		if r.IntN(4) == 0 {
			n += r.IntN(4)
		}
		for i := range n {
			if err := act(ctx, tx, r, fmt.Sprintf("%s.%d", tag, i)); err != nil {
				return err
			}
		}
		switch r.IntN(30) {
		case 0:
			return errChangedMind
		case 1: // a long transaction, over the commits of others
			time.Sleep(time.Duration(r.IntN(400)) * time.Millisecond)
		}
		return nil
	})
}

// act is one thing that a clerk does.
func act(ctx context.Context, tx pgx.Tx, r *rand.Rand, tag string) error {
	area := 1 + r.IntN(5)
	item := area*100 + 1 + r.IntN(4)
	if r.IntN(8) == 0 {
		item = 700 + r.IntN(16)
	}
	exec := func(q string, args ...any) error {
		_, err := tx.Exec(ctx, q, args...)
		return err
	}
	switch n := r.IntN(100); {
	case n < 20:
		return exec("UPDATE c.item SET name = $1, qty = $2, tag = $3 WHERE id = $4", fmt.Sprint("Office ", r.IntN(100)), r.IntN(100), tag, item)
	case n < 24: // nothing changes but what triggers write
		return exec("UPDATE c.item SET qty = qty WHERE id = $1", item)
	case n < 36: // the sum of pot and purses stays
		from, to, sum := area*10+1+r.IntN(3), area*10+1+r.IntN(3), 1+r.IntN(50)
		if err := exec("UPDATE c.purse SET amount = amount - $1 WHERE id = $2", sum, from); err != nil {
			return err
		}
		if r.IntN(2) == 0 {
			return exec("UPDATE c.purse SET amount = amount + $1 WHERE id = $2", sum, to)
		}
		return exec("UPDATE c.area SET pot = pot + $1 WHERE id = $2", sum, area)
	case n < 40: // an area goes to somebody else, with all that is in it
		owners := []string{"ada", "ben", "nobody"}
		return exec("UPDATE c.area SET owner = $1, helper = $2 WHERE id = 5", owners[r.IntN(3)], owners[r.IntN(3)])
	case n < 43:
		return exec("UPDATE c.area SET helper = $1 WHERE id = $2", []string{"ada", "ben", ""}[r.IntN(3)], 1+r.IntN(4))
	case n < 47: // an item moves, and its lines with it
		return exec("UPDATE c.item SET area_id = $1, tag = $2 WHERE id = $3", 1+r.IntN(6), tag, item)
	case n < 50:
		return exec("DELETE FROM c.item WHERE id = $1", item)
	case n < 58:
		return exec("INSERT INTO c.item (id, area_id, name, qty, tag) VALUES ($1, $2, 'office', 1, $3) ON CONFLICT DO NOTHING", item, area, tag)
	case n < 60: // a deleted and made again key
		if err := exec("DELETE FROM c.memo WHERE area_id = $1 AND title = 'Memo 1'", area); err != nil {
			return err
		}
		return exec("INSERT INTO c.memo VALUES ($1, 'Memo 1', 'again', 1, $2)", area, tag)
	case n < 64: // a unique value goes from row to row
		var code *string
		if err := tx.QueryRow(ctx, "UPDATE c.item i SET code = NULL, tag = $2 FROM c.item o WHERE i.id = $1 AND o.id = i.id RETURNING o.code", item, tag).Scan(&code); err != nil {
			if errors.Is(err, pgx.ErrNoRows) {
				return nil
			}
			return err
		}
		return exec("UPDATE c.item SET code = $1, tag = $2 WHERE id = $3", code, tag, area*100+1+r.IntN(4))
	case n < 70:
		return exec("INSERT INTO c.line (item_id, pos, area_id, note, tag) SELECT id, $1, area_id, 'office', $2 FROM c.item WHERE id = $3 ON CONFLICT DO NOTHING", fmt.Sprint("pos ", r.IntN(5)), tag, item)
	case n < 76:
		return exec("UPDATE c.line SET note = $1, amount = amount + 1, tag = $1 WHERE item_id = $2", tag, item)
	case n < 80:
		return exec("DELETE FROM c.line WHERE item_id = $1 AND pos = $2", item, fmt.Sprint("pos ", r.IntN(5)))
	case n < 82: // another key
		return exec("UPDATE c.line SET pos = $1, tag = $2 WHERE item_id = $3 AND pos = $4", fmt.Sprint("pos ", 5+r.IntN(3)), tag, item, fmt.Sprint("pos ", r.IntN(5)))
	case n < 90:
		return exec("UPDATE c.memo SET body = $1, tag = $1 WHERE area_id = $2 AND title = $3", tag, area, fmt.Sprint("Memo ", r.IntN(6)))
	case n < 95: // equal, but not the same: 1.0 and 1.00
		return exec("UPDATE c.memo SET weight = CASE weight::text WHEN '1.0' THEN 1.00 WHEN '1.00' THEN 1.0 ELSE 1.0 END WHERE area_id = $1 AND title = $2", area, fmt.Sprint("Memo ", r.IntN(6)))
	case n < 97:
		return exec("DELETE FROM c.memo WHERE area_id = $1 AND title = $2", area, fmt.Sprint("Memo ", r.IntN(6)))
	default: // many rows
		return exec("UPDATE c.item SET qty = least(qty + 1, 100), tag = $1 WHERE area_id = $2", tag, area)
	}
}
