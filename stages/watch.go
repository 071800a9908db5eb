package stages

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// WatchConfig bounds a Watch. The zero value of a field takes the default.
type WatchConfig struct {
	Tick  time.Duration // how long news may take to be noticed (default 1 s)
	Rest  int           // after a look rest this many times what it took: the share of the mirror's time that looking may cost (default 4, a fifth)
	Batch int           // devices looked after in one snapshot (default 16)
}

// Watch tells connected devices that a sync would bring something: rows that entered, changed or left their subsets,
// verdicts on their records, other sets or definitions. It asks what the reply would ask, without composing one, and only
// when something was written to the mirror. What it says is a hint: a device that never hears it syncs all the same
// by its own clock. Rows queries whose answer changes although nothing was written (now()) are noticed with the next write.
type Watch struct {
	cfg   WatchConfig
	reply *Reply
	log   *zap.Logger

	mu      sync.Mutex
	waiting map[string]*waiter // by "user/device": one call each
	woken   chan struct{}
}

// waiter is a device that wants to hear.
type waiter struct {
	user, device string
	ask          protocol.Watch
	fresh        bool // not looked after yet
	failed       bool // what it asks for fails: not asked again during this call
	exact        bool // what only a session can bring is news, too
	news         chan []string
}

// NewWatch makes one that sees with the reply's eyes.
func NewWatch(cfg WatchConfig, reply *Reply, log *zap.Logger) *Watch {
	def(&cfg.Tick, time.Second)
	def(&cfg.Rest, 4)
	def(&cfg.Batch, 16)
	return &Watch{cfg: cfg, reply: reply, log: orNop(log), waiting: map[string]*waiter{}, woken: make(chan struct{}, 1)}
}

// News waits until a sync of the device would bring something, and names the sets. It returns none when ctx ends, and when
// the same device asks anew elsewhere.
func (w *Watch) News(ctx context.Context, user, device string, ask protocol.Watch) []string {
	one := &waiter{user: user, device: device, ask: ask, fresh: true, news: make(chan []string, 1)}
	name := user + "/" + device
	w.mu.Lock()
	if before := w.waiting[name]; before != nil {
		before.news <- nil // it is in the map, so nothing was sent yet
	}
	w.waiting[name] = one
	w.mu.Unlock()
	select {
	case w.woken <- struct{}{}:
	default:
	}
	select {
	case sets := <-one.news:
		return sets
	case <-ctx.Done():
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting[name] == one {
		delete(w.waiting, name)
	}
	return nil
}

// tell ends a device's waiting, unless it has ended.
func (w *Watch) tell(one *waiter, sets []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if name := one.user + "/" + one.device; w.waiting[name] == one {
		delete(w.waiting, name)
		one.news <- sets
	}
}

// Run looks until ctx ends. While nobody waits it does nothing at all.
func (w *Watch) Run(ctx context.Context) error {
	timer := time.NewTimer(w.cfg.Tick)
	defer timer.Stop()
	var seen string
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.woken:
		case <-timer.C:
		}
		began := time.Now()
		if now, err := w.look(ctx, seen); err == nil {
			seen = now
		} else if ctx.Err() == nil {
			w.log.Warn("looking for what waits for devices failed; it is tried again", zap.Error(err))
		}
		pause := max(w.cfg.Tick, time.Duration(w.cfg.Rest)*time.Since(began))
		if w.count() == 0 {
			timer.Stop()
			continue
		}
		timer.Reset(pause)
	}
}

func (w *Watch) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.waiting)
}

// look looks after those who wait: all of them if something was committed since the snapshot seen, else those who came since.
func (w *Watch) look(ctx context.Context, seen string) (now string, err error) {
	if w.count() == 0 {
		return seen, nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	conn, err := w.reply.db.Acquire(ctx)
	if err != nil {
		return "", err
	}
	defer conn.Release()
	if err := conn.QueryRow(ctx, `SELECT pg_current_snapshot()::text`).Scan(&now); err != nil {
		return "", err
	}
	var list []*waiter
	w.mu.Lock()
	for _, one := range w.waiting {
		if !one.failed && (one.fresh || now != seen) {
			list = append(list, one)
		}
		one.fresh = false
	}
	w.mu.Unlock()
	for part := range slices.Chunk(list, w.cfg.Batch) {
		err := w.ask(ctx, conn, part)
		if err == nil {
			continue
		}
		if ctx.Err() != nil || conn.Conn().IsClosed() {
			return "", err
		}
		for _, one := range part { // one of them fails, which shall not concern the others
			if err := w.ask(ctx, conn, []*waiter{one}); err != nil {
				if ctx.Err() != nil || conn.Conn().IsClosed() {
					return "", err
				}
				w.log.Warn("what waits for a device cannot be looked up", zap.String("device", one.user+"/"+one.device), zap.Error(err))
				w.mu.Lock()
				one.failed = true
				w.mu.Unlock()
			}
		}
	}
	return now, nil
}

// ask tells those of list for whom a reply composed now would carry something.
func (w *Watch) ask(ctx context.Context, conn *pgxpool.Conn, list []*waiter) error {
	var news map[*waiter][]string
	_, err := byCatalog(ctx, w.reply.catalogs, func(cat *Catalog) (_ int, err error) {
		news, err = w.reply.news(ctx, conn, cat, list)
		return 0, err
	})
	if err != nil {
		return err
	}
	for one, sets := range news {
		w.tell(one, sets)
	}
	return nil
}

// watchersSQL reads what decides about the devices' sets: $1 users, $2 devices.
const watchersSQL = `
SELECT u.i, d.id, a.groups, a.attributes::text, coalesce(b.hash, ''), b.built, d.new_key_asked_at IS NOT NULL,
	d.verify_asked_at IS NOT NULL, ARRAY(SELECT k.set_name FROM waystage.device_check k WHERE k.device_id = d.id AND k.told_at >= d.verify_asked_at)
FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS u(user_name, device, i)
JOIN waystage.device d ON d.user_name = u.user_name AND d.name = u.device
JOIN waystage.app_user a ON a.name = u.user_name
LEFT JOIN waystage.built b ON b.hash = d.built`

// news tells for which sets of each device a reply would carry something.
func (r *Reply) news(ctx context.Context, conn *pgxpool.Conn, cat *Catalog, list []*waiter) (map[*waiter][]string, error) {
	b := &replyBatch{r: r, ctx: ctx, cat: cat, conn: conn}
	news := map[*waiter][]string{}
	owner := map[*session]*waiter{}
	users, devices := make([]string, len(list)), make([]string, len(list))
	for i, one := range list {
		users[i], devices[i] = one.user, one.device
	}
	rows, err := conn.Query(ctx, watchersSQL, users, devices)
	if err != nil {
		return nil, err
	}
	var i, id int64
	var groups, verified []string
	var newKey, verify bool
	var attributes, hash string
	var built *protocol.Built
	_, err = pgx.ForEachRow(rows, []any{&i, &id, &groups, &attributes, &hash, &built, &newKey, &verify, &verified}, func() error {
		one := list[i-1]
		_, sets := cat.allows(groups, "")
		held := map[string]bool{}
		for _, ask := range one.ask.Sets {
			if held[ask.Set] = true; cat.opens(ask.Set) > 0 { // nothing that a sync could bring now
				continue
			}
			s := &session{deviceID: id, user: one.user, device: one.device, groups: groups, attributes: attributes, set: ask.Set, cursorFrom: ask.Cursor,
				watching: true, filesKnown: &protocol.FilesRequest{}, built: hash, builtOf: built}
			s.pages = newPages(s, nil, r.cfg, cat.epoch)
			ordered := one.exact && (newKey || verify && !slices.Contains(verified, ask.Set))
			if b.admit(s); s.refusal != nil || ask.Cursor == "" || ordered {
				news[one] = append(news[one], ask.Set)
				continue
			}
			b.sessions = append(b.sessions, s)
			owner[s] = one
		}
		for _, set := range sets {
			if !held[set] && !one.ask.Only && cat.opens(set) == 0 {
				news[one] = append(news[one], set)
			}
		}
		groups, verified, built = nil, nil, nil
		return nil
	})
	if err != nil || len(b.sessions) == 0 {
		return news, err
	}
	if b.tx, err = conn.BeginTx(ctx, snapshotMode()); err != nil {
		return nil, fmt.Errorf("begin a snapshot: %w", err)
	}
	defer rollback(b.tx)
	cursors, err := b.gather()
	if err != nil {
		return nil, fmt.Errorf("read cursors and keys: %w", err)
	}
	if err := b.resume(cursors); err != nil {
		return nil, err
	}
	if err := b.rowsWait(func(s *session) bool { return owner[s].exact }, func(s *session) { news[owner[s]] = append(news[owner[s]], s.set) }); err != nil {
		return nil, err
	}
	return news, nil
}

// renewUnheard is the age of a cursor that a session renews although there is nothing else to tell: far below the time for which
// tombstones are kept.
const renewUnheard = 12 * time.Hour

// rowsWait calls found once for each session that starts anew, whose keys have moved, or for which there is something that
// the reply of its cursor did not see.
func (b *replyBatch) rowsWait(exact func(*session) bool, found func(*session)) error {
	var ask []*session
	var tokens []string
	for _, s := range b.sessions {
		if s.from == nil || s.keysChanged() || exact(s) && time.Since(s.from.createdAt) > renewUnheard {
			found(s)
			continue
		}
		ask, tokens = append(ask, s), append(tokens, s.from.token)
	}
	if len(ask) == 0 {
		return nil
	}
	rows, err := b.tx.Query(b.ctx, `SELECT c.token, s.told::text FROM waystage.cursor c JOIN waystage.session s ON s.id = c.session_id
		WHERE c.token = ANY ($1) AND s.told IS NOT NULL`, tokens)
	if err != nil {
		return err
	}
	told := map[string]*string{}
	var token, snapshot string
	_, err = pgx.ForEachRow(rows, []any{&token, &snapshot}, func() error {
		one := snapshot
		told[token] = &one
		return nil
	})
	if err != nil {
		return err
	}
	// The reply of any set tells a device's verdicts.
	type heard struct {
		first *session
		since int64
		seen  []string
	}
	verdicts := map[int64]*heard{}
	for _, s := range ask {
		v := verdicts[s.deviceID]
		if v == nil {
			v = &heard{first: s, since: s.from.xmin, seen: []string{}}
			verdicts[s.deviceID] = v
		}
		v.since = min(v.since, s.from.xmin)
		if seen := told[s.from.token]; seen != nil {
			v.seen = append(v.seen, *seen)
		}
	}
	batch := &pgx.Batch{}
	yes := map[*session]bool{}
	for _, s := range ask {
		answer := func(row pgx.Row) error {
			var more bool
			err := row.Scan(&more)
			yes[s] = yes[s] || more
			return err
		}
		seen := told[s.from.token]
		if v := verdicts[s.deviceID]; v.first == s {
			batch.Queue(newVerdictsSQL, s.deviceID, v.since, v.seen).QueryRow(answer)
		}
		for i := range s.tables {
			t := &s.tables[i]
			switch {
			case t.sub.Key == "":
				batch.Queue(t.sub.reply.news, s.from.xmin, seen).QueryRow(answer)
			case len(t.kept) > 0:
				batch.Queue(t.sub.reply.news, s.from.xmin, t.kept, t.all, seen).QueryRow(answer)
			}
		}
		for i := range s.files {
			f := &s.files[i]
			switch {
			case !f.file.Pattern.HasKey:
				batch.Queue(f.file.news, s.from.xmin, seen).QueryRow(answer)
			case len(f.kept) > 0:
				batch.Queue(f.file.news, s.from.xmin, seen, f.kept).QueryRow(answer)
			}
		}
	}
	if err := b.tx.SendBatch(b.ctx, batch).Close(); err != nil {
		return fmt.Errorf("look for what waits: %w", err)
	}
	for _, s := range ask {
		if yes[s] {
			found(s)
		}
	}
	return nil
}
