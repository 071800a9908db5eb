package stages

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/protocol"
)

// What an application was built for: a device whose application names tables and columns gets those of a set that it names, and hears of
// no others, until it names more. What is left of the set is a set of its own to everything that composes replies.

// views are sets as applications see them that were built for less.
type views struct {
	mu   sync.Mutex
	sets map[string]*set // by set and hash
}

// mostViews bounds how many are remembered.
const mostViews = 1000

// view is a set as an application sees it that was built for this, which has this hash; nil: the whole set. Nil: there is no such set.
func (c *Catalog) view(name, hash string, built *protocol.Built) *set {
	whole := c.sets[name]
	if whole == nil || built == nil {
		return whole
	}
	id := name + "\x00" + hash
	c.views.mu.Lock()
	defer c.views.mu.Unlock()
	v := c.views.sets[id]
	if v == nil {
		if c.views.sets == nil || len(c.views.sets) >= mostViews {
			c.views.sets = map[string]*set{}
		}
		v = c.newSet(name, built)
		c.views.sets[id] = v
	}
	return v
}

// builtFor keeps, once for all devices, what the requests' applications were built for that have not said so before, and notes the hashes.
func builtFor(ctx context.Context, tx *pgxpool.Conn, reqs []*incoming) error {
	news := map[string]string{}
	for _, r := range reqs {
		if r.req.Built == nil || len(r.req.Built.Tables) == 0 {
			r.built = ""
			continue
		}
		text, err := json.Marshal(r.req.Built)
		if err != nil {
			return err
		}
		hash := hex.EncodeToString(protocol.Hash(text))
		if hash != r.built {
			news[hash] = string(text)
		}
		r.built = hash
	}
	if len(news) == 0 {
		return nil
	}
	// Locked, so that they are not pruned before the devices refer to them.
	rows, err := tx.Query(ctx, `SELECT hash FROM waystage.built WHERE hash = ANY ($1) FOR KEY SHARE`, slices.Collect(maps.Keys(news)))
	if err != nil {
		return err
	}
	known, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, hash := range known {
		delete(news, hash)
	}
	for _, hash := range slices.Sorted(maps.Keys(news)) { // in order, so that workers do not lock them crosswise
		if _, err := tx.Exec(ctx, `INSERT INTO waystage.built (hash, built) VALUES ($1, $2) ON CONFLICT (hash) DO NOTHING`, hash, news[hash]); err != nil {
			return err
		}
	}
	return nil
}

// builtPrune removes what no device says any more.
const builtPrune = `
DELETE FROM waystage.built WHERE hash IN (
	SELECT b.hash FROM waystage.built b
	WHERE b.told_at < now() - interval '1 hour' AND NOT EXISTS (SELECT FROM waystage.device d WHERE d.built = b.hash)
	LIMIT $1 FOR UPDATE SKIP LOCKED)`

// builtName is what a person calls it.
func builtName(hash string, built *protocol.Built) string {
	if built.Name == "" {
		return fmt.Sprintf("what it names (%.8s)", hash)
	}
	return fmt.Sprintf("%s (%.8s)", quoted(built.Name), hash)
}
