package queue_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/waystage/waystage/protocol"
)

func TestPartsComeBack(t *testing.T) {
	b := start(t, func(b *bench) { b.cfg.AckWait = 300 * time.Millisecond })
	d := b.device("alice/phone")
	d.put(session(1), "1-1", []byte("x"), nil)

	// Given back: again after the delay.
	p := b.parts(1)[0]
	before := p.Deliveries
	if err := p.Nak(20 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	p = b.parts(1)[0]
	if p.Deliveries <= before {
		t.Fatal(p.Deliveries, before)
	}
	before = p.Deliveries
	// Held: not delivered to anybody else, for longer than AckWait.
	for range 8 {
		if err := p.InProgress(); err != nil {
			t.Fatal(err)
		}
		more, err := b.q.Fetch(within(t), 10, 100*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		if len(more) > 0 { // under load the sign of life itself may have come too late
			t.Log("a part that is held was delivered again:", more)
			p = more[0]
		}
	}
	// Forgotten: again after AckWait; acknowledged: never again, also twice.
	p = b.parts(1)[0]
	if p.Deliveries <= before {
		t.Fatal(p.Deliveries, before)
	}
	if err := errors.Join(p.Ack(within(t)), p.Ack(within(t)), p.Nak(0), p.InProgress()); err != nil {
		t.Fatal(err)
	}
	if more, err := b.q.Fetch(within(t), 10, 400*time.Millisecond); len(more) > 0 || err != nil {
		t.Fatal(more, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := b.q.Fetch(ctx, 10, time.Hour); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

func TestFetchTakesWhatIsThere(t *testing.T) {
	b := start(t)
	d := b.device("alice/phone")
	for n := range 150 {
		d.put(session(n+1), "1-1", fmt.Appendf(nil, "%d", n), nil)
	}
	eventually(t, "all parts", func() error {
		dep, err := b.q.Depth(within(t))
		if err == nil && dep.Undelivered != 150 {
			err = fmt.Errorf("%+v", dep)
		}
		return err
	})
	first, err := b.q.Fetch(within(t), 130, time.Second)
	if err != nil || len(first) != 130 {
		t.Fatal(len(first), err)
	}
	second, err := b.q.Fetch(within(t), 130, time.Second)
	if err != nil || len(second) != 20 {
		t.Fatal(len(second), err)
	}
	for i, p := range append(first, second...) {
		if string(p.Data) != fmt.Sprint(i) {
			t.Fatalf("part %d is %q", i, p.Data)
		}
	}
	if err := b.q.AckAll(within(t), append(first, second...)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "empty queue", func() error {
		dep, err := b.q.Depth(within(t))
		if err == nil && (dep.Input.Messages != 0 || dep.Unacked != 0) {
			err = fmt.Errorf("%+v", dep)
		}
		return err
	})
	// One that comes later ends the wait at once.
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		time.Sleep(20 * time.Millisecond)
		d.put(session(1000), "1-1", []byte("late"), nil)
	})
	if late, err := b.q.Fetch(within(t), 10, patience); err != nil || len(late) != 1 || string(late[0].Data) != "late" {
		t.Fatal(late, err)
	}
}

func TestDeadLetter(t *testing.T) {
	b := start(t)
	d := b.device("alice/phone")
	nc, err := nats.Connect(b.url(), nats.UserInfo("app", b.server.Secrets().App), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	d.put(session(1), "1-1", []byte("cannot be staged"), nats.Header{"Content-Type": {"application/cbor"}, "Content-Encoding": {"zstd"}})
	if err := b.parts(1)[0].DeadLetter(within(t), "seven\ntries"); err != nil {
		t.Fatal(err)
	}
	// What the gateway did not write goes the same way, unasked.
	if _, err := js.Publish(within(t), "sync.in.alice.phone.nonsense.1-1", []byte("stranger")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "dead letters", func() error {
		if parts, err := b.q.Fetch(within(t), 10, 100*time.Millisecond); len(parts) > 0 || err != nil {
			t.Fatal(parts, err)
		}
		dep, err := b.q.Depth(within(t))
		if err == nil && (dep.Input.Messages != 0 || dep.Dead.Messages != 2) {
			err = fmt.Errorf("%+v", dep)
		}
		return err
	})
	s, err := js.Stream(within(t), "WS_DLQ")
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.GetMsg(within(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	if m.Subject != "sync.dlq.alice.phone."+session(1)+".1-1" || string(m.Data) != "cannot be staged" || m.Header.Get("Ws-Reason") != "seven tries" ||
		m.Header.Get("Content-Type") != "application/cbor" || m.Header.Get("Content-Encoding") != "zstd" {
		t.Errorf("%s %v %q", m.Subject, m.Header, m.Data)
	}
}

// The parts of a series may be with different workers: one that finds them all takes them all.
func TestSeries(t *testing.T) {
	b := start(t)
	d := b.device("alice/phone")
	for _, i := range []int{3, 1} {
		d.put(session(1), protocol.PartToken(i, 3), fmt.Appendf(nil, "part %d", i), nil)
	}
	d.put(session(2), "2-3", []byte("another session's"), nil)
	mine, theirs := b.parts(3)[0], b.parts(0)
	if mine.Index != 3 || mine.Total != 3 || len(theirs) != 0 {
		t.Fatalf("%+v %v", mine, theirs)
	}
	all, missing, err := mine.Series(within(t))
	if err != nil || len(all) != 0 || missing != 2 {
		t.Fatalf("%v %d %v", all, missing, err)
	}
	d.put(session(1), "2-3", []byte("part 2"), nil)
	if all, missing, err = mine.Series(within(t)); err != nil || missing != 0 || len(all) != 3 || string(all[0].Data) != "part 1" || all[2] != mine ||
		string(all[1].Data) != "part 2" || all[1].ContentType != "application/json" || all[1].User != "alice" {
		t.Fatalf("%v %d %v", all, missing, err)
	}
	if err := b.q.AckAll(within(t), all); err != nil {
		t.Fatal(err)
	}
	if err := all[0].Ack(within(t)); err != nil { // gone already
		t.Fatal(err)
	}
	dep, err := b.q.Depth(within(t))
	if err != nil || dep.Input.Messages != 1 {
		t.Fatalf("%+v %v", dep, err)
	}
}

func TestKicksAndAnnouncements(t *testing.T) {
	b := start(t)
	kicks, stop, err := b.q.Kicked("merge")
	if err != nil {
		t.Fatal(err)
	}
	pools, stopPools, err := b.q.WatchPools()
	if err != nil {
		t.Fatal(err)
	}
	defer stopPools()
	if err := errors.Join(b.q.Kick("reply"), b.q.Kick("merge"), b.q.PoolsChanged()); err != nil {
		t.Fatal(err)
	}
	receive(t, kicks)
	receive(t, pools)
	stop()
	if err := b.q.Kick("merge.x"); err == nil {
		t.Error("a stage of two tokens was taken")
	}

	stopService, err := b.q.Announce("merge", "1.2.3", func() any { return map[string]int{"size": 4} })
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(b.url(), nats.UserInfo("app", b.server.Secrets().App), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	m, err := nc.Request("$SRV.STATS.waystage-merge", nil, patience)
	if err != nil {
		t.Fatal(err)
	}
	st := decode[struct {
		Name      string
		Endpoints []struct{ Data map[string]int }
	}](t, m)
	if st.Name != "waystage-merge" || len(st.Endpoints) != 1 || st.Endpoints[0].Data["size"] != 4 {
		t.Errorf("%s", m.Data)
	}
	stopService()
	eventually(t, "end of the service", func() error {
		if _, err := nc.Request("$SRV.STATS.waystage-merge", nil, time.Second); !errors.Is(err, nats.ErrNoResponders) {
			return fmt.Errorf("still announced: %w", err)
		}
		return nil
	})
}
