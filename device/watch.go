package device

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/waystage/waystage/protocol"
)

// Wake says what Await has noticed.
type Wake struct {
	Sets  []string `json:"sets,omitempty"`  // the server has something new for them; a set may be new itself
	Edits bool     `json:"edits,omitempty"` // the file has edits that were not sent
	// The time has come from which the server takes sessions of a set again.
	Opened bool `json:"opened,omitempty"`
}

// lookForEdits is how often Await looks into the file for edits of other connections and processes.
const lookForEdits = time.Second

// Await stays connected and returns when a sync would bring something: the server has news, or the file unsent edits. sets
// limits it to some subscription sets; none: all, and those that the user gets meanwhile. It may run beside a sync. The error of ctx is returned when that ends first.
//
// News is a hint: it may be lost with a connection or a server, so sync by the clock, too.
func (d *Device) Await(ctx context.Context, sets ...string) (Wake, error) {
	var st state
	var opens time.Time // the first of the closed sets
	ask := protocol.Watch{Sets: []protocol.WatchSet{}, Only: len(sets) > 0}
	err := d.read(ctx, func(t *txn) (err error) {
		if st, err = t.enrolled(); err != nil {
			return err
		}
		c, err := t.load()
		if err != nil {
			return err
		}
		for _, s := range c.sets {
			if s.Gone || len(sets) > 0 && !slices.Contains(sets, s.Name) {
				continue
			}
			ask.Sets = append(ask.Sets, protocol.WatchSet{Set: s.Name, Cursor: s.Cursor})
			if until := s.closed(time.Now()); !until.IsZero() && (opens.IsZero() || until.Before(opens)) {
				opens = until
			}
		}
		return nil
	})
	if err != nil {
		return Wake{}, err
	}
	if edits, err := d.edits(ctx, sets); edits || err != nil {
		return Wake{Edits: edits}, err
	}
	tr, err := d.connect(ctx, st)
	if err != nil {
		return Wake{}, err
	}
	defer func() { _ = tr.Close() }()

	type heard struct {
		sets []string
		err  error
	}
	wctx, stop := context.WithCancel(ctx)
	news := make(chan heard, 1)
	go func() {
		sets, err := listen(wctx, tr, ask, d.patience.busy)
		news <- heard{sets, err}
	}()
	ended := false
	defer func() {
		stop()
		if !ended {
			<-news
		}
	}()
	look := time.NewTicker(lookForEdits)
	defer look.Stop()
	for {
		select {
		case n := <-news:
			ended = true
			return Wake{Sets: n.sets}, errors.Join(n.err, d.reopen(ctx, n.sets))
		case <-look.C:
			if edits, err := d.edits(ctx, sets); edits || err != nil {
				return Wake{Edits: edits}, err
			}
			if !opens.IsZero() && !time.Now().Before(opens) {
				return Wake{Opened: true}, nil
			}
		}
	}
}

// reopen forgets that sets were closed: the server offers something of them.
func (d *Device) reopen(ctx context.Context, sets []string) error {
	if len(sets) == 0 {
		return nil
	}
	return d.write(ctx, func(t *txn) error {
		for _, s := range sets {
			if err := t.exec(`UPDATE _ws_set SET closed_until = 0 WHERE name = ?`, s); err != nil {
				return err
			}
		}
		return nil
	})
}

// listen asks until there is news.
func listen(ctx context.Context, tr Transport, ask protocol.Watch, busy time.Duration) ([]string, error) {
	for {
		n, err := tr.News(ctx, ask)
		var e *protocol.Error
		switch {
		case errors.As(err, &e) && e.Retry > 0:
			if err := pause(ctx, max(busy, time.Duration(e.Retry)*time.Second)); err != nil {
				return nil, err
			}
		case err != nil:
			return nil, explain("waiting for news", err)
		case len(n.Sets) > 0:
			return n.Sets, nil
		}
	}
}

// edits tells whether a set has something to send.
func (d *Device) edits(ctx context.Context, sets []string) (found bool, err error) {
	err = d.read(ctx, func(t *txn) error {
		c, err := t.load()
		if err != nil {
			return err
		}
		for _, s := range c.sets {
			if s.Gone || len(sets) > 0 && !slices.Contains(sets, s.Name) {
				continue
			}
			if !s.closed(time.Now()).IsZero() { // they wait
				continue
			}
			nothing, err := t.nothingFor(c, s)
			if found = found || !nothing; err != nil || found {
				return err
			}
		}
		return nil
	})
	return found, err
}
