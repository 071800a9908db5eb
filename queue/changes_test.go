package queue_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/queue"
)

func message(run string, seq int, body []byte) *change.Message {
	return &change.Message{Run: run, Seq: uint64(seq), Start: 100, Prev: change.LSN(100 + seq - 1), End: change.LSN(100 + seq), Part: 1, Last: true, Txs: 1, Rows: 2,
		Tables: []string{"public.patient"}, Body: body}
}

// publish appends messages from..to of a run and waits until all are stored.
func (b *bench) publish(dir, run string, from, to int) {
	b.t.Helper()
	var all []<-chan error
	for i := from; i <= to; i++ {
		ack, err := b.q.PublishChange(within(b.t), dir, message(run, i, fmt.Appendf(nil, "%s %d", run, i)))
		if err != nil {
			b.t.Fatal(err)
		}
		all = append(all, ack)
	}
	for i, ack := range all {
		if err := receive(b.t, ack); err != nil {
			b.t.Fatal(from+i, err)
		}
	}
}

func receive[T any](t testing.TB, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(patience):
		t.Fatal("nothing came")
	}
	return v
}

// expect reads messages from..to of a run, in order.
func expect(t testing.TB, r *queue.ChangeReader, run string, from, to int) (last uint64) {
	t.Helper()
	for i := from; i <= to; i++ {
		m, seq, err := r.Next(within(t))
		if err != nil {
			t.Fatal(i, err)
		}
		if m.Run != run || m.Seq != uint64(i) || string(m.Body) != fmt.Sprintf("%s %d", run, i) || m.End != change.LSN(100+i) || m.Tables[0] != "public.patient" || seq <= last {
			t.Fatalf("message %d: %+v %q at %d after %d", i, m, m.Body, seq, last)
		}
		last = seq
	}
	return last
}

// silent fails if a message comes.
func silent(t testing.TB, r *queue.ChangeReader) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if m, _, err := r.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%+v %v", m, err)
	}
}

func (b *bench) reader(dir string) *queue.ChangeReader {
	b.t.Helper()
	r, err := b.q.Changes(dir)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(r.Close)
	return r
}

func TestChangeDataInOrder(t *testing.T) {
	b := start(t)
	down, up := b.reader(queue.Down), b.reader(queue.Up)
	b.publish(queue.Down, "r1", 1, 500)
	b.publish(queue.Up, "u1", 1, 3)
	expect(t, up, "u1", 1, 3)
	half := expect(t, down, "r1", 1, 250)

	// What is applied is purged; another reader begins behind it, this one goes on.
	if err := b.q.PurgeChanges(within(t), queue.Down, half); err != nil {
		t.Fatal(err)
	}
	late := b.reader(queue.Down)
	expect(t, late, "r1", 251, 500)
	last := expect(t, down, "r1", 251, 500)
	silent(t, down)
	if err := b.q.PurgeChanges(within(t), queue.Down, last); err != nil {
		t.Fatal(err)
	}
	b.publish(queue.Down, "r1", 501, 510)
	expect(t, down, "r1", 501, 510)

	// A reset empties one direction; the new run follows at once, also for who reads.
	if err := b.q.ResetChanges(within(t), queue.Down); err != nil {
		t.Fatal(err)
	}
	b.publish(queue.Down, "r2", 1, 10)
	expect(t, down, "r2", 1, 10)
	expect(t, b.reader(queue.Down), "r2", 1, 10)
	expect(t, b.reader(queue.Up), "u1", 1, 3)

	if _, err := b.q.PublishChange(within(t), "sideways", message("x", 1, nil)); err == nil {
		t.Error("a direction that does not exist was taken")
	}
}

func TestChangeDataWaitsWhenFull(t *testing.T) {
	b := start(t, func(b *bench) { b.cfg.ChangeBytes = 256 << 10 })
	const n = 40
	body := bytes.Repeat([]byte("x"), 20<<10)
	acks := make(chan (<-chan error), n)
	go func() {
		defer close(acks)
		for i := 1; i <= n; i++ {
			ack, err := b.q.PublishChange(context.Background(), queue.Down, message("r", i, body))
			if err != nil {
				t.Error(err)
				return
			}
			acks <- ack
		}
	}()
	r := b.reader(queue.Down)
	for i := 1; i <= n; i++ {
		m, seq, err := r.Next(within(t))
		if err != nil || m.Seq != uint64(i) {
			t.Fatalf("want message %d, got %d: %v", i, m.Seq, err)
		}
		if i%3 == 0 {
			if err := b.q.PurgeChanges(within(t), queue.Down, seq); err != nil {
				t.Fatal(err)
			}
		}
	}
	for ack := range acks {
		if err := receive(t, ack); err != nil {
			t.Fatal(err)
		}
	}
}

// Two captures at once cannot mix their runs unseen, and a reset makes a full stream usable.
func TestChangeDataOfTwoWriters(t *testing.T) {
	b := start(t)
	other, err := queue.Open(within(t), b.cfg, quiet(t))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	b.publish(queue.Down, "r1", 1, 5)
	ack, err := other.PublishChange(within(t), queue.Down, message("z", 1, nil)) // knows that the stream is at 5
	if err != nil {
		t.Fatal(err)
	}
	if err := receive(t, ack); err != nil {
		t.Fatal(err)
	}
	ack, err = b.q.PublishChange(within(t), queue.Down, message("r1", 6, nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := receive(t, ack); !errors.Is(err, queue.ErrRunBroken) {
		t.Fatal(err)
	}
	ack, err = b.q.PublishChange(within(t), queue.Down, message("r1", 7, nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := receive(t, ack); !errors.Is(err, queue.ErrRunBroken) {
		t.Fatal(err)
	}
	if err := b.q.ResetChanges(within(t), queue.Down); err != nil {
		t.Fatal(err)
	}
	b.publish(queue.Down, "r2", 1, 5)
	expect(t, b.reader(queue.Down), "r2", 1, 5)
}

func TestResetOfAFullStream(t *testing.T) {
	b := start(t, func(b *bench) { b.cfg.ChangeBytes = 64 << 10 })
	body := bytes.Repeat([]byte("x"), 20<<10)
	var acks []<-chan error
	for i := 1; i <= 6; i++ {
		ack, err := b.q.PublishChange(within(t), queue.Down, message("r1", i, body))
		if err != nil {
			t.Fatal(err)
		}
		acks = append(acks, ack)
	}
	if err := receive(t, acks[0]); err != nil {
		t.Fatal(err)
	}
	if err := b.q.ResetChanges(within(t), queue.Down); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, acks[5]); !errors.Is(err, queue.ErrRunBroken) {
		t.Fatal(err)
	}
	b.publish(queue.Down, "r2", 1, 2)
	expect(t, b.reader(queue.Down), "r2", 1, 2)
}

func TestForeignMessageInChangeData(t *testing.T) {
	b := start(t)
	nc, err := nats.Connect(b.url(), nats.UserInfo("app", b.server.Secrets().App), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(within(t), "cd.down", []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.reader(queue.Down).Next(within(t)); !errors.Is(err, change.ErrNotChangeData) {
		t.Fatal(err)
	}
}

// restart stops the embedded server and starts another on the same port and folder, which may be emptied before.
func (b *bench) restart(wipe bool) {
	b.t.Helper()
	b.server.Shutdown()
	if wipe {
		if err := os.RemoveAll(b.dir); err != nil {
			b.t.Fatal(err)
		}
	}
	o := b.options
	var err error
	if b.server, err = queue.StartServer(o, quiet(b.t)); err != nil {
		b.t.Fatal(err)
	}
	server := b.server
	b.t.Cleanup(server.Shutdown)
}

func TestRestartOfTheServer(t *testing.T) {
	for _, wipe := range []bool{false, true} {
		t.Run(fmt.Sprintf("wiped=%v", wipe), func(t *testing.T) {
			b := start(t, overTCP)
			d := b.device("alice/phone")
			r := b.reader(queue.Down)
			b.publish(queue.Down, "r1", 1, 20)
			expect(t, r, "r1", 1, 10)
			if s := d.put(session(1), "1-1", []byte("one"), nil); !s.Stored {
				t.Fatalf("%+v", s)
			}
			if err := b.q.PutPage(within(t), "alice", "phone", session(1), 1, "application/json", "", []byte("page")); err != nil {
				t.Fatal(err)
			}
			kicks, stop, err := b.q.Kicked("merge")
			if err != nil {
				t.Fatal(err)
			}
			defer stop()

			b.restart(wipe)
			receive(t, kicks) // kicks may have been lost

			var err2 error
			if wipe {
				// Streams are made anew, readers and writers are told.
				eventually(t, "reset", func() error {
					_, _, err2 = r.Next(within(t))
					if err2 == nil {
						return errors.New("a message that was read ahead")
					}
					return nil
				})
				if !errors.Is(err2, queue.ErrChangesReset) {
					t.Fatal(err2)
				}
				ack, err := b.q.PublishChange(within(t), queue.Down, message("r1", 21, nil))
				if err != nil {
					t.Fatal(err)
				}
				if err := receive(t, ack); !errors.Is(err, queue.ErrRunBroken) {
					t.Fatal(err)
				}
				if err := b.q.ResetChanges(within(t), queue.Down); err != nil {
					t.Fatal(err)
				}
				b.publish(queue.Down, "r2", 1, 5)
				expect(t, r, "r2", 1, 5)
			} else {
				b.publish(queue.Down, "r1", 21, 30)
				expect(t, r, "r1", 11, 30)
				if p := b.parts(1); string(p[0].Data) != "one" || p[0].Ack(within(t)) != nil {
					t.Fatalf("%+v", p[0])
				}
				if m := d.ask("get", nil, nil, session(1), "1"); string(m.Data) != "page" {
					t.Fatalf("%q", m.Data)
				}
			}
			eventually(t, "put", func() error {
				if s := d.put(session(2), "1-1", []byte("two"), nil); !s.Stored {
					return s.Error
				}
				return nil
			})
			if p := b.parts(1); string(p[0].Data) != "two" || p[0].Ack(within(t)) != nil {
				t.Fatalf("%+v", p[0])
			}
		})
	}
}

// An empty stream keeps counting over a restart: what is published next follows what was purged.
func TestRestartOfAPurgedStream(t *testing.T) {
	b := start(t, overTCP)
	r := b.reader(queue.Down)
	b.publish(queue.Down, "r1", 1, 20)
	if err := b.q.PurgeChanges(within(t), queue.Down, expect(t, r, "r1", 1, 20)); err != nil {
		t.Fatal(err)
	}
	b.restart(false)
	b.publish(queue.Down, "r1", 21, 30)
	expect(t, r, "r1", 21, 30)
}

// Devices that log in while the server stops must not take the process with them.
func TestShutdownUnderLogins(t *testing.T) {
	b := start(t)
	b.device("alice/phone")
	url, over := b.url(), make(chan struct{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				nc, err := nats.Connect(url, nats.UserInfo("alice/phone", "alice-password"), nats.Timeout(time.Second), nats.NoReconnect())
				if err == nil {
					nc.Close()
				}
			}
		})
	}
	time.Sleep(100 * time.Millisecond) // logins are under way
	b.stop()                           // the callout goes first: from now on they wait
	b.server.Shutdown()
	b.server.Shutdown() // twice does no harm
	close(over)
	wg.Wait()
}
