package device

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// mostSessions bounds the sessions of one sync and set: a server that forks at every session must not hold us for ever.
const mostSessions = 1000

// Sync brings the file and the server together: one session per subscription set (more where the edits do not fit
// into one). Cancelled or broken off anywhere, the next Sync goes on with the first unfinished session.
func (d *Device) Sync(ctx context.Context, o SyncOptions) (rep Report, err error) {
	if !d.syncing.TryLock() {
		return rep, fmt.Errorf("device: %w", ErrSyncing)
	}
	defer d.syncing.Unlock()
	rep.Started = time.Now().UTC()
	defer func() {
		rep.Duration = time.Since(rep.Started)
		for _, s := range rep.Sets {
			rep.add(s.Totals)
		}
		if err != nil {
			rep.Error = err.Error()
		}
		if lerr := d.record(context.WithoutCancel(ctx), &rep); lerr != nil && err == nil {
			err = lerr
		}
	}()
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	if o.Wait != "" && o.Wait != protocol.WaitMerge && o.Wait != protocol.WaitSource {
		return rep, fmt.Errorf("device: wait %q is neither %q nor %q", o.Wait, protocol.WaitMerge, protocol.WaitSource)
	}
	st, err := d.begin(ctx, o, &rep)
	if err != nil {
		return rep, err
	}
	o.Progress(Progress{Stage: StageConnect})
	tr, err := d.connect(ctx, st)
	if err != nil {
		return rep, err
	}
	defer func() { _ = tr.Close() }()
	// Files that were put here go before the rows that name them; what goes wrong with files holds up no row that does not wait for one.
	files := &filing{d: d, rep: &rep.Files, o: o}
	if ftr, ok := tr.(FileTransport); ok && d.files != "" {
		files.tr = ftr
	}
	filesErr := files.before(ctx)
	if err := d.check(ctx, tr, &rep); err != nil {
		return rep, err
	}
	for range mostSessions {
		sess, err := d.next(ctx, o)
		if err != nil {
			return rep, err
		}
		if sess == nil {
			if err := d.write(ctx, func(t *txn) error { return t.exec(`UPDATE _ws_state SET running = 0`) }); err != nil {
				return rep, err
			}
			if err := files.after(ctx, filesErr); err != nil {
				return rep, err
			}
			return rep, d.renew(ctx, tr, &rep)
		}
		if err := d.session(ctx, tr, sess, files, o, &rep); err != nil {
			return rep, err
		}
	}
	return rep, fmt.Errorf("device: %w: %d sessions and no end", ErrReply, mostSessions)
}

// begin checks the capture and notes which sets are to be synced; a sync that was broken off keeps its list.
func (d *Device) begin(ctx context.Context, o SyncOptions, rep *Report) (st state, err error) {
	err = d.write(ctx, func(t *txn) error {
		if st, err = t.enrolled(); err != nil {
			return err
		}
		c, err := t.load()
		if err != nil {
			return err
		}
		for _, tab := range c.order {
			if err := t.verify(tab); err != nil {
				return err
			}
		}
		for _, name := range o.Sets {
			if s := c.set(name); s == nil || s.Gone {
				return fmt.Errorf("no subscription set %q: the user has %v", name, setNames(c))
			}
		}
		rep.Resumed = st.Running || st.Open.Valid
		now := time.Now()
		for _, s := range c.sets {
			todo := 1
			switch until := s.closed(now); {
			case s.Gone, len(o.Sets) > 0 && !slices.Contains(o.Sets, s.Name):
				todo = 0
			case !until.IsZero() && len(o.Sets) == 0: // a set that is named is asked for all the same
				todo = 0
				rep.Sets = append(rep.Sets, SetReport{Set: s.Name, ClosedUntil: until})
			case st.Running && s.Todo == 0: // done before the break: again, but only if there is something to send
				nothing, err := t.nothingFor(c, s)
				if err != nil {
					return err
				}
				todo = 2
				if nothing {
					todo = 0
				}
			}
			if err := t.exec(`UPDATE _ws_set SET todo = ? WHERE name = ?`, todo, s.Name); err != nil {
				return err
			}
		}
		return nil
	})
	return st, err
}

func setNames(c *catalogue) (names []string) {
	for _, s := range c.sets {
		if !s.Gone {
			names = append(names, s.Name)
		}
	}
	return names
}

// nothingFor tells that a set has nothing to send.
func (t *txn) nothingFor(c *catalogue, s *set) (bool, error) {
	var waiting bool
	if err := t.get(`SELECT EXISTS (SELECT 1 FROM _ws_outbox WHERE set_name = ? AND resend > 0)`, []any{s.Name}, &waiting); err != nil || waiting {
		return false, err
	}
	if open, err := t.verifyOpen(s.Name); err != nil || open {
		return false, err
	}
	for _, m := range s.Tables {
		if !c.uploads(s, m.Wire) {
			continue
		}
		ids, err := t.unsent(m.table)
		if err != nil || len(ids) > 0 {
			return false, err
		}
	}
	return true, nil
}

// next is the open session, or a new one for the first set that is not done; nil: all are.
func (d *Device) next(ctx context.Context, o SyncOptions) (sess *session, err error) {
	err = d.write(ctx, func(t *txn) error {
		if sess, err = t.openSession(); err != nil || sess != nil {
			return err
		}
		c, err := t.load()
		if err != nil {
			return err
		}
		i := -1
		for todo := 1; todo <= 2 && i < 0; todo++ {
			i = slices.IndexFunc(c.sets, func(s *set) bool { return s.Todo == todo && !s.Gone })
		}
		if i < 0 {
			return nil
		}
		st, err := t.state()
		if err != nil {
			return err
		}
		var more bool
		if sess, more, err = d.freeze(t, c, st, c.sets[i], o.Wait); err != nil {
			return err
		}
		sess.more = more
		return t.exec(`UPDATE _ws_state SET running = 1`)
	})
	return sess, err
}

// session brings one frozen session to its end: applied, or refused as a whole.
func (d *Device) session(ctx context.Context, tr Transport, sess *session, files *filing, o SyncOptions, rep *Report) error {
	start := time.Now()
	sr := SetReport{Set: sess.Set, Session: sess.token(), Resumed: sess.resumed, Totals: Totals{Sent: sess.Records}}
	defer func() {
		sr.Duration = time.Since(start)
		rep.Sets = append(rep.Sets, sr)
	}()
	p := func(stage string, done, total int64) {
		o.Progress(Progress{Set: sess.Set, Session: sess.N, Stage: stage, Done: done, Total: total})
	}
	ex := &exchange{d: d, tr: tr, sess: sess, rep: &sr, progress: p}
	refusal, err := ex.run(ctx)
	if err != nil {
		return err
	}
	if refusal != nil {
		again, err := d.refused(ctx, sess, refusal)
		if err != nil {
			return err
		}
		d.ack(ctx, tr, sess)
		if !again {
			return explain("session "+sess.token(), refusal)
		}
		if refusal.Code == protocol.CodeOutside {
			sr.Totals, sr.ClosedUntil = Totals{BytesUp: sr.BytesUp, BytesDown: sr.BytesDown}, time.Now().Add(time.Duration(refusal.Retry)*time.Second).UTC().Truncate(time.Second)
		}
		rep.Forked = rep.Forked || refusal.Code == protocol.CodeForked || refusal.Code == protocol.CodeEpoch
		return nil
	}
	if err := files.required(ctx, sess); err != nil {
		if errors.Is(err, ErrReply) { // not for ever
			return errors.Join(err, d.write(ctx, func(t *txn) error { return t.exec(`DELETE FROM _ws_inbox`) }))
		}
		return err
	}
	p(StageApply, 0, 0)
	applied := sr
	err = d.write(ctx, func(t *txn) error {
		return d.apply(t, sess, &applied, func(done, total int64) { p(StageApply, done, total) })
	})
	switch {
	case errors.Is(err, errNotOurs):
		// Another process has applied it, or has put its pages in disorder: look again.
		return d.write(ctx, func(t *txn) error { return t.exec(`DELETE FROM _ws_inbox`) })
	case errors.Is(err, errOtherEpoch):
		rep.Forked = true
		_, err = d.refused(ctx, sess, &protocol.Error{Code: protocol.CodeEpoch})
		return err
	case errors.Is(err, ErrReply):
		// Not for ever: the next sync fetches the reply again, and may find the server mended.
		return errors.Join(err, d.write(ctx, func(t *txn) error { return t.exec(`DELETE FROM _ws_inbox`) }))
	case err != nil:
		return err
	}
	sr = applied
	if d.told == nil {
		d.told = map[string]bool{}
	}
	d.told[sess.Set] = true
	d.ack(ctx, tr, sess)
	return nil
}

// check asks the server about the sets that have nothing to send: those for which it has nothing either need no session. Whatever goes
// wrong with that, the sessions follow.
func (d *Device) check(ctx context.Context, tr Transport, rep *Report) error {
	ch, ok := tr.(Checker)
	if !ok || len(d.told) == 0 {
		return nil
	}
	ask := protocol.Watch{Sets: []protocol.WatchSet{}, Only: true}
	err := d.read(ctx, func(t *txn) error {
		return t.idle(d, func(c *catalogue, s *set) error {
			ask.Sets = append(ask.Sets, protocol.WatchSet{Set: s.Name, Cursor: s.Cursor})
			return nil
		})
	})
	if err != nil || len(ask.Sets) == 0 {
		return err
	}
	news, err := ch.Check(ctx, ask)
	if err != nil {
		d.log.Debug("could not ask for news; opening sessions", zap.Error(err))
		return ctx.Err()
	}
	asked := map[string]string{}
	for _, s := range ask.Sets {
		if !slices.Contains(news.Sets, s.Set) {
			asked[s.Set] = s.Cursor
		}
	}
	if len(asked) == 0 {
		return nil
	}
	return d.write(ctx, func(t *txn) error { // edits may have come meanwhile
		return t.idle(d, func(c *catalogue, s *set) error {
			if cursor, ok := asked[s.Name]; !ok || cursor != s.Cursor {
				return nil
			}
			rep.Nothing = append(rep.Nothing, s.Name)
			return t.exec(`UPDATE _ws_set SET todo = 0, synced_at = ? WHERE name = ?`, time.Now().Unix(), s.Name)
		})
	})
}

// idle calls f for the sets to be synced that have nothing to send and nothing open.
func (t *txn) idle(d *Device, f func(*catalogue, *set) error) error {
	st, err := t.state()
	if err != nil || st.Open.Valid || st.Running {
		return err
	}
	if files, err := d.filesTold(t); err != nil || files != nil && files.Waiting > 0 {
		return err
	}
	c, err := t.load()
	if err != nil {
		return err
	}
	for _, s := range c.sets {
		if s.Todo != 1 || s.Gone || s.Cursor == "" || s.Hash == "" || !d.told[s.Name] {
			continue
		}
		nothing, err := t.nothingFor(c, s)
		if err == nil && nothing {
			err = f(c, s)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ack tells the server that the pages are not needed any more. A failure costs the server some room until they expire.
func (d *Device) ack(ctx context.Context, tr Transport, sess *session) {
	if err := tr.Ack(ctx, sess.token()); err != nil {
		d.log.Debug("pages not acknowledged", zap.String("session", sess.token()), zap.Error(err))
	}
}

// record writes the log of syncs, and forgets what was kept long enough.
func (d *Device) record(ctx context.Context, rep *Report) error {
	return d.write(ctx, func(t *txn) error {
		text, err := json.Marshal(rep)
		if err != nil {
			return err
		}
		if err := t.get(`INSERT INTO _ws_log (report) VALUES (?) RETURNING id`, []any{string(text)}, &rep.ID); err != nil {
			return err
		}
		return t.prune(rep.ID)
	})
}
