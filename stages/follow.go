package stages

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/waystage/waystage/schema"
)

// Catalogs gives the stages what they judge by. A batch takes one catalog and looks, in its own snapshot or transaction, whether that
// is still the one in force; if not it writes nothing and is done again by the newer one (docs/adr/0015-applied-while-running.md).
type Catalogs interface {
	// Now is the newest catalog that is known; nil: none that may be used.
	Now() *Catalog
	// Renew makes sure that Now is not older than the mirror's layout of this number. Its error says why this process can not go
	// by that one.
	Renew(ctx context.Context, layout int64) error
}

// outdated ends a batch that finds another layout in force than that of its catalog.
type outdated struct{ layout int64 }

func (o *outdated) Error() string {
	return fmt.Sprintf("other definitions or tables are in force by now (layout %d)", o.layout)
}

// mostRenewals bounds how often one batch is begun anew because definitions or tables have changed.
const mostRenewals = 5

// byCatalog runs a batch by the newest catalog, and again when it was not that.
func byCatalog(ctx context.Context, c Catalogs, batch func(*Catalog) (int, error)) (int, error) {
	done := 0
	for renewed := 0; ; renewed++ {
		cat := c.Now()
		if cat == nil {
			return done, errNoCatalog
		}
		n, err := batch(cat)
		done += n
		var old *outdated
		if !errors.As(err, &old) || renewed == mostRenewals {
			return done, err
		}
		if err := c.Renew(ctx, old.layout); err != nil {
			return done, &unusable{err}
		}
	}
}

// unusable says that what is in force cannot be used here: no fault of the work that waits.
type unusable struct{ err error }

func (u *unusable) Error() string { return u.err.Error() }
func (u *unusable) Unwrap() error { return u.err }

// Follower keeps a process at the definitions and tables that are in force. It hears of a change at once and asks now and then as well.
type Follower struct {
	db   *pgxpool.Pool
	poll time.Duration
	log  *zap.Logger

	loading sync.Mutex
	now     atomic.Pointer[Catalog]

	mu   sync.Mutex
	err  error // why the newest cannot be used
	seen int64 // layout that err is about
}

// NewFollower makes one. It does no I/O; [Follower.Load] reads the first catalog.
func NewFollower(db *pgxpool.Pool, log *zap.Logger) *Follower {
	return &Follower{db: db, poll: 5 * time.Second, log: orNop(log)}
}

// Now is the newest catalog that was read, nil before the first.
func (f *Follower) Now() *Catalog { return f.now.Load() }

// Err says why this process does not go by what is in force; nil when it does, as far as it knows.
func (f *Follower) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Renew implements [Catalogs].
func (f *Follower) Renew(ctx context.Context, layout int64) error {
	f.loading.Lock()
	defer f.loading.Unlock()
	if now := f.now.Load(); now != nil && now.layout == layout {
		return nil
	}
	return f.load(ctx)
}

// Load reads what is in force.
func (f *Follower) Load(ctx context.Context) error {
	f.loading.Lock()
	defer f.loading.Unlock()
	return f.load(ctx)
}

func (f *Follower) load(ctx context.Context) error {
	var layout int64
	var next *Catalog
	err := pgx.BeginTxFunc(ctx, f.db, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) (err error) {
		if layout, err = schema.Layout(ctx, tx); err != nil {
			return err
		}
		if now := f.now.Load(); now != nil && now.layout == layout {
			next = now
			return nil
		}
		epoch, err := schema.Epoch(ctx, tx)
		if err != nil {
			return err
		}
		defs, tables, err := schema.LoadDefinitions(ctx, tx)
		if err != nil {
			return err
		}
		next = NewCatalog(epoch, layout, defs, tables)
		return nil
	})
	if err != nil {
		err = fmt.Errorf("read the definitions in force: %w", err)
		f.failed(layout, err)
		return err
	}
	was := f.now.Swap(next)
	f.mu.Lock()
	mended := f.err != nil
	f.err = nil
	f.mu.Unlock()
	if mended || was != nil && was.defs.SHA256() != next.defs.SHA256() {
		f.log.Info("goes by the definitions in force", zap.String("sha256", next.defs.SHA256()), zap.Int64("layout", next.layout))
	}
	return nil
}

// failed notes a failure; the same one is logged once.
func (f *Follower) failed(layout int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil || f.seen != layout || f.err.Error() != err.Error() {
		f.log.Error("cannot go by the definitions in force: intake, merge and reply of this process stand still until it can", zap.Error(err))
	}
	f.err, f.seen = err, layout
}

// SetsOf are the sets that a user has by the definitions in force, in sync order, and the mirror's epoch.
func (f *Follower) SetsOf(ctx context.Context, user string) (sets []string, epoch string, err error) {
	_, err = byCatalog(ctx, f, func(cat *Catalog) (int, error) {
		var groups []string
		var layout int64
		err := f.db.QueryRow(ctx, "SELECT groups, ("+layoutSQL+") FROM waystage.app_user WHERE name = $1", user).Scan(&groups, &layout)
		if err != nil {
			return 0, fmt.Errorf("groups of %s: %w", user, err)
		}
		if layout != cat.layout {
			return 0, &outdated{layout}
		}
		sets, epoch = cat.defs.SetsFor(groups), cat.epoch
		return 0, nil
	})
	return sets, epoch, err
}

// Bandwidth is how many bytes per second each device of a user may send and receive; 0: no limit. That a moment's old definitions
// answer does no harm.
func (f *Follower) Bandwidth(ctx context.Context, user string) (int64, error) {
	cat := f.Now()
	if cat == nil || !slices.ContainsFunc(cat.defs.Groups, func(g schema.Group) bool { return g.Bandwidth > 0 }) {
		return 0, nil
	}
	var groups []string
	if err := f.db.QueryRow(ctx, "SELECT groups FROM waystage.app_user WHERE name = $1", user).Scan(&groups); err != nil {
		return 0, fmt.Errorf("groups of %s: %w", user, err)
	}
	return cat.defs.Bandwidth(groups), nil
}

// Definitions are those in force now, for what stands outside the stages.
func (f *Follower) Definitions(ctx context.Context) (defs *schema.Definitions, err error) {
	_, err = byCatalog(ctx, f, func(cat *Catalog) (int, error) {
		var layout int64
		if err := f.db.QueryRow(ctx, layoutSQL).Scan(&layout); err != nil {
			return 0, fmt.Errorf("definitions in force: %w", err)
		}
		if layout != cat.layout {
			return 0, &outdated{layout}
		}
		defs = cat.defs
		return 0, nil
	})
	return defs, err
}

// Follow keeps up until ctx ends.
func (f *Follower) Follow(ctx context.Context) error {
	for ctx.Err() == nil {
		err := f.listen(ctx)
		if ctx.Err() != nil {
			break
		}
		f.log.Warn("lost the connection that listens for new definitions; trying again", zap.Error(err))
		pause(ctx, time.Second, nil)
	}
	return nil
}

func (f *Follower) listen(ctx context.Context) error {
	conn, err := pgx.ConnectConfig(ctx, f.db.Config().ConnConfig)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	defer func() {
		bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(bye)
	}()
	if _, err := conn.Exec(ctx, "LISTEN "+schema.LayoutChannel); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	for ctx.Err() == nil {
		layout, err := schema.Layout(ctx, conn) // after LISTEN, so that nothing falls between the two
		if err != nil {
			return fmt.Errorf("ask for the layout: %w", err)
		}
		if now := f.now.Load(); now == nil || now.layout != layout {
			_ = f.Load(ctx) // noted and logged; asked again with the next turn
		}
		turn, cancel := context.WithTimeout(ctx, f.poll)
		_, err = conn.WaitForNotification(turn)
		timeout := turn.Err() != nil
		cancel()
		if err != nil && !timeout {
			return fmt.Errorf("listen: %w", err)
		}
	}
	return ctx.Err()
}
