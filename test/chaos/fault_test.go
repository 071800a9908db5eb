package chaos

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/waystage/waystage/internal/nettest"
	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/test/world"
)

// breaker injects the plan's faults, each when its share of the steps is done. Faults of one target exclude each other,
// those of different targets overlap.
type breaker struct {
	h    *history
	busy map[string]*sync.Mutex
	wg   sync.WaitGroup

	mu   sync.Mutex
	errs []error // of mending: the history cannot go on
}

func (b *breaker) run(ctx context.Context) {
	b.busy = map[string]*sync.Mutex{}
	for _, f := range b.h.plan.Faults {
		for ctx.Err() == nil && b.h.done.Load()*1000 < int64(f.At)*b.h.total {
			time.Sleep(2 * time.Millisecond)
		}
		if ctx.Err() != nil {
			break
		}
		if b.busy[f.Target] == nil {
			b.busy[f.Target] = &sync.Mutex{}
		}
		lock := b.busy[f.Target]
		b.wg.Go(func() {
			lock.Lock()
			defer lock.Unlock()
			b.h.counts.Lock()
			b.h.counts.faults[f.Kind]++
			b.h.counts.Unlock()
			b.h.note("fault: %s", f)
			if err := b.inject(f); err != nil {
				b.mu.Lock()
				b.errs = append(b.errs, fmt.Errorf("%s: %w", f, err))
				b.mu.Unlock()
			}
			b.h.note("mended: %s", f)
		})
	}
	b.wg.Wait()
}

func (b *breaker) inject(f fault) error {
	h, long := b.h, time.Duration(f.For)*time.Millisecond
	restart := func(p *world.Process) error {
		time.Sleep(long)
		return p.Start()
	}
	switch f.Kind {
	case "kill-server":
		p := h.server(f.Target)
		p.Kill()
		return restart(p)
	case "kill-servers":
		for _, p := range h.servers {
			p.Kill()
		}
		time.Sleep(long)
		for _, p := range h.servers {
			if err := p.Start(); err != nil {
				return err
			}
		}
	case "stop-server":
		p := h.server(f.Target)
		_ = p.Stop(time.Minute) // how it ends is not judged here: its databases may be away
		return restart(p)
	case "pause-server":
		pause(h.server(f.Target), long)
	case "zombie":
		p, mirror, source := h.server(f.Target), h.links[f.Target+"-mirror"], h.links[f.Target+"-source"]
		late := f.R%2 != 0 // what it sends to the source comes there when another has taken over
		if late {
			source.Hold(nettest.ToServer, true)
			time.Sleep(time.Duration(50+f.R%400) * time.Millisecond)
		}
		p.Signal(syscall.SIGSTOP)
		time.Sleep(50 * time.Millisecond)
		mirror.Cut()
		if !late {
			source.Cut()
		}
		time.Sleep(long)
		source.Hold(nettest.ToServer, false)
		p.Signal(syscall.SIGCONT)
	case "kill-nats":
		h.nats.Kill()
		return restart(h.nats)
	case "wipe-nats":
		h.nats.Kill()
		if err := os.RemoveAll(h.natsStore); err != nil {
			return err
		}
		return restart(h.nats)
	case "rewind-nats":
		old := h.natsStore + ".old"
		h.nats.Signal(syscall.SIGSTOP)
		err := os.CopyFS(old, os.DirFS(h.natsStore))
		h.nats.Signal(syscall.SIGCONT)
		if errors.Is(err, fs.ErrNotExist) { // wiped a moment ago: there is no store yet to go back to
			return os.RemoveAll(old)
		}
		if err == nil {
			time.Sleep(long)
			h.nats.Kill()
			err = errors.Join(os.RemoveAll(h.natsStore), os.Rename(old, h.natsStore))
		}
		return errors.Join(err, os.RemoveAll(old), h.nats.Start())
	case "pause-nats":
		pause(h.nats, long)
	case "kill-postgres", "stop-postgres":
		c := h.cluster(f.Target)
		if f.Kind == "kill-postgres" {
			c.Kill()
		} else {
			c.Stop()
		}
		time.Sleep(long)
		ctx, cancel := context.WithTimeout(h.ctx, patience)
		defer cancel()
		return c.Restart(ctx)
	case "pause-walsender":
		for _, pid := range b.backends(f.Target, "backend_type = 'walsender'") {
			_ = syscall.Kill(pid, syscall.SIGSTOP)
			defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
		}
		time.Sleep(long)
	case "terminate":
		pids := b.backends(f.Target, "application_name LIKE 'waystage%'")
		r := rand.New(rand.NewPCG(f.R, 0))
		for _, pid := range pids {
			if r.IntN(2) == 0 {
				_ = syscall.Kill(pid, syscall.SIGTERM)
			}
		}
	case "kill-device":
		i, err := strconv.Atoi(f.Target)
		if err != nil {
			return err
		}
		if i < len(h.devices) {
			h.devices[i].strike()
		}
	case "cut":
		h.links[f.Target].Cut()
	case "refuse", "stall", "blackhole", "half-open":
		p := h.links[f.Target]
		switch f.Kind {
		case "refuse":
			p.Judge(func(nettest.Direction, []byte) nettest.Verdict { return nettest.CutNow })
			p.Cut()
		case "stall", "blackhole":
			p.Hold(nettest.ToServer, true)
			fallthrough
		case "half-open":
			p.Hold(nettest.ToClient, true)
		}
		time.Sleep(long)
		if f.Kind == "blackhole" || f.Kind == "half-open" {
			p.Cut()
		}
		p.Judge(nil)
		p.Hold(nettest.ToServer, false)
		p.Hold(nettest.ToClient, false)
	case "lose", "double":
		b.messages(f, long)
	case "purge":
		b.purge(f, long)
	default:
		return fmt.Errorf("there is no fault %q", f.Kind)
	}
	return nil
}

func pause(p *world.Process, long time.Duration) {
	p.Signal(syscall.SIGSTOP)
	time.Sleep(long)
	p.Signal(syscall.SIGCONT)
}

func (h *history) server(name string) *world.Process {
	i, _ := strconv.Atoi(strings.TrimPrefix(name, "server-"))
	return h.servers[i]
}

func (h *history) cluster(name string) *pgcluster.Cluster {
	if name == "source" {
		return h.rig.source
	}
	return h.rig.mirror
}

// backends are the processes of a database's connections.
func (b *breaker) backends(side, where string) []int {
	dsn := b.h.sourceDB
	if side == "mirror" {
		dsn = b.h.mirrorDB
	}
	ctx, cancel := context.WithTimeout(b.h.ctx, 3*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return nil // it is down
	}
	defer func() { _ = conn.Close(ctx) }()
	rows, err := conn.Query(ctx, "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND "+where+" ORDER BY pid")
	if err != nil {
		return nil
	}
	pids, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil {
		return nil
	}
	return pids
}

// messages loses or doubles what passes through a stream, for a while: every second message, say.
func (b *breaker) messages(f fault, long time.Duration) {
	nc, err := b.h.streams()
	if err != nil {
		time.Sleep(long)
		return // there is no broker now
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(b.h.ctx, long)
	defer cancel()
	subject := map[string]string{"WS_IN": "sync.in.>", "WS_OUT": "sync.out.>", "WS_CD_UP": "cd.up", "WS_CD_DOWN": "cd.down"}[f.Target]
	passing := make(chan *nats.Msg, 1000)
	sub, err := nc.ChanSubscribe(subject, passing)
	if err != nil {
		return
	}
	defer func() { _ = sub.Unsubscribe() }()
	r := rand.New(rand.NewPCG(f.R, 0))
	for n := 0; ; {
		select {
		case <-ctx.Done():
			b.h.counts.Lock()
			if f.Kind == "lose" {
				b.h.counts.lost += n
			} else {
				b.h.counts.doubled += n
			}
			b.h.counts.Unlock()
			return
		case m := <-passing:
			switch {
			case r.IntN(2) == 0 || m.Header.Get(headerAgain) != "":
			case f.Kind == "double":
				again := nats.NewMsg(m.Subject)
				again.Data = m.Data
				for k, v := range m.Header {
					if k != nats.MsgIdHdr && !strings.HasPrefix(k, "Nats-Expected") {
						again.Header[k] = v
					}
				}
				again.Header.Set(headerAgain, "1")
				if r.IntN(2) == 0 { // later
					time.AfterFunc(time.Duration(r.IntN(500))*time.Millisecond, func() { _ = nc.PublishMsg(again) })
				} else {
					_ = nc.PublishMsg(again)
				}
				n++
			default:
				s, err := js.Stream(ctx, f.Target)
				if err != nil {
					continue
				}
				last, err := s.GetLastMsgForSubject(ctx, m.Subject)
				if err == nil && s.DeleteMsg(ctx, last.Sequence) == nil {
					n++
				}
			}
		}
	}
}

// purge empties a stream again and again for a while.
func (b *breaker) purge(f fault, long time.Duration) {
	ctx, cancel := context.WithTimeout(b.h.ctx, long)
	defer cancel()
	nc, err := b.h.streams()
	if err != nil {
		return // there is no broker now
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return
	}
	for ctx.Err() == nil {
		if s, err := js.Stream(ctx, f.Target); err == nil {
			n := int(s.CachedInfo().State.Msgs)
			if n > 0 && s.Purge(ctx) == nil {
				b.h.counts.Lock()
				b.h.counts.lost += n
				b.h.counts.Unlock()
			}
		}
		time.Sleep(15 * time.Millisecond)
	}
}

// headerAgain marks a doubled message, so that it is not doubled again.
const headerAgain = "Chaos-Again"
