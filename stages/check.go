package stages

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// CheckConfig bounds a Check. The zero value of a field takes the default.
type CheckConfig struct {
	Batch int           // devices looked after in one snapshot (default 64)
	Trust time.Duration // how long an answer holds while nothing is written to the mirror (default 10 s): rows queries may ask for now()
	Seen  time.Duration // how often it is noted when devices have asked (default 10 s)
	Rest  time.Duration // between two snapshots while devices keep asking (default 1 ms)
}

// Check answers devices that have nothing to send whether a session would bring them anything. Unlike what a Watch says, the answer is
// no hint: it is that of a reply composed now. Those that ask at the same time are answered from one snapshot, and a device that asks
// again before anything was written to the mirror is answered from memory.
type Check struct {
	cfg   CheckConfig
	reply *Reply
	log   *zap.Logger

	mu       sync.Mutex
	running  bool
	answered time.Time // when the last were
	waiting  []*checking
	known    map[string]knowledge // by "user/device"
	last     map[string]knowledge // those of before, until they are asked for again: together they bound the memory
	seen     map[[2]string]bool   // user and device, since it was noted
	notedAt  time.Time
	knownMax int
}

// checking is a device that asks.
type checking struct {
	waiter
	asked string // the question's bytes
	sets  []string
	err   error
	done  chan struct{}
}

// knowledge is that a device's question had the answer "nothing" in a snapshot.
type knowledge struct {
	asked, snapshot string
	at              time.Time
}

// NewCheck makes one that sees with the reply's eyes.
func NewCheck(cfg CheckConfig, reply *Reply, log *zap.Logger) *Check {
	def(&cfg.Batch, 64)
	def(&cfg.Trust, 10*time.Second)
	def(&cfg.Seen, 10*time.Second)
	def(&cfg.Rest, time.Millisecond)
	return &Check{cfg: cfg, reply: reply, log: orNop(log), known: map[string]knowledge{}, seen: map[[2]string]bool{}, notedAt: time.Now(), knownMax: 50_000}
}

// News names the sets of the device for which a session would bring something now.
func (k *Check) News(ctx context.Context, user, device string, ask protocol.Watch) ([]string, error) {
	text, err := json.Marshal(ask)
	if err != nil {
		return nil, err
	}
	one := &checking{waiter: waiter{user: user, device: device, ask: ask, exact: true}, asked: string(text), done: make(chan struct{})}
	k.mu.Lock()
	k.waiting = append(k.waiting, one)
	first := !k.running
	k.running = true
	k.mu.Unlock()
	if first {
		go k.run()
	}
	select {
	case <-one.done:
		return one.sets, one.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// run answers until nobody waits.
func (k *Check) run() {
	for {
		k.mu.Lock()
		if rest := k.cfg.Rest - time.Since(k.answered); rest > 0 {
			k.mu.Unlock()
			time.Sleep(rest) // many ask: together they cost little more than one
			k.mu.Lock()
		}
		list := k.waiting
		k.waiting = nil
		if len(list) == 0 {
			k.running = false
			k.mu.Unlock()
			return
		}
		k.mu.Unlock()
		k.answer(list)
		k.mu.Lock()
		k.answered = time.Now()
		k.mu.Unlock()
	}
}

func (k *Check) answer(list []*checking) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	fail := func(list []*checking, err error) {
		for _, one := range list {
			one.err = err
			close(one.done)
		}
	}
	conn, err := k.reply.db.Acquire(ctx)
	if err != nil {
		fail(list, err)
		return
	}
	defer conn.Release()
	var now string
	if err := conn.QueryRow(ctx, `SELECT pg_current_snapshot()::text`).Scan(&now); err != nil {
		fail(list, err)
		return
	}
	list = k.remembered(list, now)
	for len(list) > 0 {
		n := min(len(list), k.cfg.Batch)
		part := list[:n]
		list = list[n:]
		err := k.look(ctx, conn, part, now)
		if err != nil && len(part) > 1 && !conn.Conn().IsClosed() { // one of them fails, which shall not concern the others
			for i := range part {
				if err := k.look(ctx, conn, part[i:i+1], now); err != nil {
					k.log.Warn("whether there is news for a device cannot be looked up", zap.String("device", part[i].user+"/"+part[i].device), zap.Error(err))
					fail(part[i:i+1], err)
				}
			}
		} else if err != nil {
			fail(part, err)
		}
	}
	k.note(ctx, conn)
}

// remembered answers those whose answer has not changed, and returns the others.
func (k *Check) remembered(list []*checking, now string) (open []*checking) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, one := range list {
		name := one.user + "/" + one.device
		k.seen[[2]string{one.user, one.device}] = true
		was, ok := k.known[name]
		if !ok {
			if was, ok = k.last[name]; ok {
				k.known[name] = was
			}
		}
		if ok && was.snapshot == now && was.asked == one.asked && time.Since(was.at) < k.cfg.Trust {
			close(one.done)
			continue
		}
		open = append(open, one)
	}
	return open
}

// look answers from one snapshot, which is not older than now. After an error nobody was answered.
func (k *Check) look(ctx context.Context, conn *pgxpool.Conn, list []*checking, now string) error {
	waiters := make([]*waiter, len(list))
	for i, one := range list {
		waiters[i] = &one.waiter
	}
	var news map[*waiter][]string
	_, err := byCatalog(ctx, k.reply.catalogs, func(cat *Catalog) (_ int, err error) {
		news, err = k.reply.news(ctx, conn, cat, waiters)
		return 0, err
	})
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.known) >= k.knownMax {
		k.last, k.known = k.known, map[string]knowledge{}
	}
	for _, one := range list {
		one.sets = news[&one.waiter]
		if name := one.user + "/" + one.device; len(one.sets) == 0 {
			k.known[name] = knowledge{one.asked, now, time.Now()}
		} else {
			delete(k.known, name)
			delete(k.last, name)
		}
		close(one.done)
	}
	return nil
}

// note writes down now and then which devices have asked, exact to a minute.
func (k *Check) note(ctx context.Context, conn *pgxpool.Conn) {
	k.mu.Lock()
	if time.Since(k.notedAt) < k.cfg.Seen {
		k.mu.Unlock()
		return
	}
	seen := k.seen
	k.seen, k.notedAt = map[[2]string]bool{}, time.Now()
	k.mu.Unlock()
	users, devices := make([]string, 0, len(seen)), make([]string, 0, len(seen))
	for name := range seen {
		users, devices = append(users, name[0]), append(devices, name[1])
	}
	_, err := conn.Exec(ctx, `UPDATE waystage.device d SET last_seen_at = now(), last_sync_at = now()
		WHERE id IN (SELECT d.id FROM unnest($1::text[], $2::text[]) AS u(user_name, name) JOIN waystage.device d USING (user_name, name)
			WHERE coalesce(d.last_sync_at, '-infinity') < now() - interval '1 minute' ORDER BY d.id FOR NO KEY UPDATE OF d SKIP LOCKED)`, users, devices)
	if err != nil {
		k.log.Debug("it was not noted which devices have asked", zap.Error(err))
	}
}
