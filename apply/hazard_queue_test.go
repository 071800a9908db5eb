package apply_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/capture"
	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/nettest"
	"github.com/waystage/waystage/queue"
	"github.com/waystage/waystage/schema"
)

// broker is a real one between capture and apply.
type broker struct {
	r      *rig
	server *queue.Server
	o      queue.ServerOptions
	q      *queue.Queue
	js     jetstream.JetStream
}

type brokerPublisher struct {
	q         *queue.Queue
	direction string
}

func (p brokerPublisher) PublishChange(ctx context.Context, m *change.Message) (capture.Receipt, error) {
	stored, err := p.q.PublishChange(ctx, p.direction, m)
	return brokerReceipt(stored), err
}

func (p brokerPublisher) ResetChanges(ctx context.Context) error {
	return p.q.ResetChanges(ctx, p.direction)
}

type brokerReceipt <-chan error

func (r brokerReceipt) Wait(ctx context.Context) error {
	select {
	case err := <-r:
		if errors.Is(err, queue.ErrRunBroken) {
			return fmt.Errorf("%w: %w", capture.ErrStreamLost, err)
		}
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

type brokerChanges struct {
	q         *queue.Queue
	direction string
}

func (c brokerChanges) Read(context.Context) (apply.Reader, error) { return c.q.Changes(c.direction) }
func (c brokerChanges) Purge(ctx context.Context, through uint64) error {
	return c.q.PurgeChanges(ctx, c.direction, through)
}

// withBroker has the rig's workers use a real broker, which they reach by the address that at makes of the broker's own.
func withBroker(t *testing.T, r *rig, at func(address string) string) *broker {
	t.Helper()
	secrets, err := queue.NewSecrets()
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{r: r, o: queue.ServerOptions{StoreDir: t.TempDir(), Secrets: secrets}}
	if b.server, err = queue.StartServer(b.o, zap.NewNop()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.server.Shutdown() })
	b.q, err = queue.Open(r.ctx, queue.Config{Broker: queue.Broker{URLs: []string{at(b.server.URL())}, Secrets: secrets}}, r.log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.q.Close)
	nc, err := nats.Connect(b.server.URL(), nats.UserInfo("app", secrets.App), nats.MaxReconnects(-1), nats.Timeout(deadline))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	if b.js, err = jetstream.New(nc); err != nil {
		t.Fatal(err)
	}
	r.define("capture down", func() interface{ Run(context.Context) error } {
		return r.capture(capture.Config{Direction: capture.Down, Server: r.sourceDSN, Slot: schema.SlotDown(r.epoch), Publication: schema.PublicationDown, Queue: brokerPublisher{b.q, queue.Down}})
	})
	r.define("capture up", func() interface{ Run(context.Context) error } {
		return r.capture(capture.Config{Direction: capture.Up, Server: r.mirrorDSN, Slot: schema.SlotUp(r.epoch), Publication: schema.PublicationUp, Queue: brokerPublisher{b.q, queue.Up}})
	})
	r.define("down", func() interface{ Run(context.Context) error } {
		return apply.NewDown(apply.DownConfig{Mirror: r.mirrorDSN, Tables: r.load, Changes: brokerChanges{b.q, queue.Down}, Log: r.log})
	})
	r.define("up", func() interface{ Run(context.Context) error } {
		return apply.NewUp(apply.UpConfig{Mirror: r.mirrorDSN, Source: r.sourceDSN, Tables: r.load, Changes: brokerChanges{b.q, queue.Up}, Log: r.log})
	})
	t.Cleanup(func() { r.stop(allWorkers...) }) // before the queue is closed
	return b
}

// state of a stream, empty when it does not exist.
func (b *broker) state(stream string) jetstream.StreamState {
	s, err := b.js.Stream(b.r.ctx, stream)
	if err != nil {
		return jetstream.StreamState{}
	}
	return s.CachedInfo().State
}

func (b *broker) must(err error) {
	b.r.t.Helper()
	if err != nil {
		b.r.t.Fatal(err)
	}
}

// The broker loses messages that it had confirmed: one from the middle, the last ones, the whole store; or the stream is made anew, so that its
// sequence begins again. Nothing is lost: the slots have it all.
func TestHazardQueueLosesAcknowledged(t *testing.T) {
	r := newRig(t, notes, "public.note")
	b := withBroker(t, r, func(address string) string { return address })
	r.start(allWorkers...)
	r.foreign("UPDATE note SET n = 0 WHERE id = 1")
	first := r.merge(upd("public.note", "10", map[string]any{"body": "first"}))
	r.settled()
	r.wantVerdicts(first, "applied")
	streams := []string{queue.StreamDown, queue.StreamUp}
	each := func(do func(stream string, s jetstream.Stream, st jetstream.StreamState) error) func() {
		return func() {
			for _, name := range streams {
				s, err := b.js.Stream(r.ctx, name)
				b.must(err)
				b.must(do(name, s, s.CachedInfo().State))
			}
		}
	}
	losses := []struct {
		name string
		live bool // also while apply is reading: it then may have been too quick for single messages
		lose func()
	}{
		{"one from the middle", false, each(func(_ string, s jetstream.Stream, st jetstream.StreamState) error {
			return s.DeleteMsg(r.ctx, (st.FirstSeq+st.LastSeq)/2)
		})},
		{"the first", false, each(func(_ string, s jetstream.Stream, st jetstream.StreamState) error {
			return s.DeleteMsg(r.ctx, st.FirstSeq)
		})},
		{"the last two", false, each(func(_ string, s jetstream.Stream, st jetstream.StreamState) error {
			return errors.Join(s.DeleteMsg(r.ctx, st.LastSeq), s.DeleteMsg(r.ctx, st.LastSeq-1))
		})},
		{"all", true, each(func(_ string, s jetstream.Stream, _ jetstream.StreamState) error { return s.Purge(r.ctx) })},
		{"the streams", true, each(func(name string, _ jetstream.Stream, _ jetstream.StreamState) error {
			return b.js.DeleteStream(r.ctx, name)
		})},
		{"the streams, made anew at once", true, each(func(name string, s jetstream.Stream, _ jetstream.StreamState) error {
			if err := b.js.DeleteStream(r.ctx, name); err != nil {
				return err
			}
			_, err := b.js.CreateStream(r.ctx, s.CachedInfo().Config)
			return err
		})},
		{"the broker's store", true, func() {
			u, err := url.Parse(b.server.URL())
			b.must(err)
			b.o.Port, err = strconv.Atoi(u.Port())
			b.must(err)
			b.server.Shutdown()
			b.must(os.RemoveAll(b.o.StoreDir))
			b.server, err = queue.StartServer(b.o, zap.NewNop())
			b.must(err)
		}},
	}
	appliers := []string{"down", "up"}
	lose := func(what string, live bool, loss func()) {
		var ids []int64
		write := func(tag string) {
			for k := range 6 {
				r.foreign(fmt.Sprintf("UPDATE note SET n = n + 1, body = '%s' WHERE id = %d", tag, k+1))
				ids = append(ids, r.merge(upd("public.note", "10", map[string]any{"body": fmt.Sprint(what, tag, k)}))...)
			}
		}
		if !live {
			r.stop(appliers...)
		}
		write("before")
		if !live {
			for _, name := range streams {
				r.eventually(name+" has messages", func() bool { return b.state(name).Msgs >= 3 })
			}
		}
		loss()
		r.start(appliers...)
		write("after")
		began := time.Now()
		r.settled()
		t.Logf("lost %s, live %v: settled after %s", what, live, time.Since(began).Round(time.Millisecond))
		for _, id := range ids {
			r.wantVerdict(id, "applied")
		}
	}
	for _, l := range losses {
		lose(l.name, false, l.lose)
		if l.live {
			lose(l.name, true, l.lose)
		}
	}
}

// The broker is gone without a word: noticed within a bound, and gone on with when it is back.
func TestHazardHalfOpenBroker(t *testing.T) {
	r := newRig(t, notes, "public.note")
	var proxy *nettest.Proxy
	b := withBroker(t, r, func(address string) string {
		proxy, address = through(t, address)
		return address
	})
	r.start(allWorkers...)
	ids := r.merge(upd("public.note", "1", map[string]any{"body": "before"}))
	r.foreign("UPDATE note SET n = 20 WHERE id = 2")
	r.settled()
	proxy.Hold(nettest.ToClient, true)
	ids = append(ids, r.merge(upd("public.note", "3", map[string]any{"body": "meanwhile"}))...)
	r.foreign("UPDATE note SET n = 40 WHERE id = 4")
	began := time.Now()
	r.eventually("the dead connection is noticed", func() bool { return !b.q.Connected() })
	t.Logf("noticed after %s", time.Since(began))
	proxy.Hold(nettest.ToClient, false)
	r.settled()
	r.wantVerdicts(ids, "applied", "applied")
}
