package queue_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/waystage/waystage/protocol"
)

func TestSessionThroughTheGateway(t *testing.T) {
	b := start(t)
	d := b.device("alice/phone")
	notices, err := d.nc.SubscribeSync(protocol.NoticeSubject("alice", "phone"))
	if err != nil {
		t.Fatal(err)
	}

	// Put: headers other than ours go no further.
	r := d.put(session(1), "1-1", []byte(`{"v":1}`), nats.Header{
		"Content-Type": {"application/json; charset=utf-8"}, "Content-Encoding": {"gzip"},
		"Nats-Msg-Id": {"x"}, "Nats-Rollup": {"all"}, "Nats-TTL": {"1s"}, "Nats-Expected-Stream": {"X"}, "Ws-Anything": {"x"},
	})
	if !r.Stored || r.Duplicate || r.Error != nil || r.Sequence != 1 {
		t.Fatalf("receipt %+v", r)
	}
	// Again with the same bytes: a retry. With other bytes: not, and for intake to judge.
	if r := d.put(session(1), "1-1", []byte(`{"v":1}`), nil); !r.Stored || !r.Duplicate || r.Sequence != 1 {
		t.Fatalf("receipt of a retry %+v", r)
	}
	if r := d.put(session(1), "1-1", []byte(`{"v":2}`), nil); !r.Stored || r.Duplicate {
		t.Fatalf("receipt of other bytes %+v", r)
	}
	if st := decode[protocol.Status](t, d.ask("status", nil, nil, session(1))); st.State != "received" {
		t.Fatalf("status %+v", st)
	}
	parts := b.parts(2)
	p := parts[0]
	if p.User != "alice" || p.Device != "phone" || p.Session != session(1) || p.Index != 1 || p.Total != 1 || p.Deliveries != 1 ||
		p.ContentType != "application/json" || p.Encoding != "gzip" || string(p.Data) != `{"v":1}` || p.ReceivedAt.IsZero() {
		t.Fatalf("part %+v", p)
	}
	if err := b.q.AckAll(within(t), parts); err != nil {
		t.Fatal(err)
	}
	if st := decode[protocol.Status](t, d.ask("status", nil, nil, session(1))); st.State != "unknown" {
		t.Fatalf("status %+v", st)
	}

	// Get: held until the page is there.
	got := make(chan *nats.Msg, 1)
	go func() { got <- d.ask("get", nil, nil, session(1), "1") }()
	eventually(t, "held get", func() error {
		if b.gw.Stats().Held != 1 {
			return errors.New("not held")
		}
		return nil
	})
	for n := range 3 {
		if err := b.q.PutPage(within(t), "alice", "phone", session(1), n+1, "application/cbor", "zstd", fmt.Appendf(nil, "page %d", n+1)); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	if err := b.q.Ready("alice", "phone", session(1), 3, "application/cbor", "zstd", nil); err != nil {
		t.Fatal(err)
	}
	m := <-got
	if string(m.Data) != "page 1" || m.Header.Get("Content-Type") != "application/cbor" || m.Header.Get("Content-Encoding") != "zstd" || m.Header.Get("Ws-Error") != "" {
		t.Fatalf("page %q %v", m.Data, m.Header)
	}
	if len(m.Header) != 2 {
		t.Errorf("the page came with headers %v", m.Header)
	}
	t.Log("woken after", time.Since(began))
	if n, err := notices.NextMsg(patience); err != nil || string(n.Data) != `{"session":"`+session(1)+`","pages":3}` {
		t.Fatalf("notice %v %v", n, err)
	}
	if m := d.ask("get", nil, nil, session(1), "3"); string(m.Data) != "page 3" {
		t.Fatalf("page %q", m.Data)
	}
	if n, err := b.q.Pages(within(t), "alice", "phone", session(1)); n != 3 || err != nil {
		t.Fatal(n, err)
	}

	// Put, then get at once: the page that comes with the news is the answer, stored or not.
	if r := d.put(session(3), "1-1", []byte("request"), nil); !r.Stored {
		t.Fatalf("receipt %+v", r)
	}
	go func() { got <- d.ask("get", nil, nil, session(3), "1") }()
	eventually(t, "held get", func() error {
		if b.gw.Stats().Held != 1 {
			return errors.New("not held")
		}
		return nil
	})
	if err := b.q.Ready("alice", "phone", session(3), 1, "application/cbor", "", []byte("told")); err != nil {
		t.Fatal(err)
	}
	if m := <-got; string(m.Data) != "told" || m.Header.Get("Content-Type") != "application/cbor" || len(m.Header) != 1 {
		t.Fatalf("page %q %v", m.Data, m.Header)
	}
	if err := b.q.AckAll(within(t), b.parts(1)); err != nil {
		t.Fatal(err)
	}

	// Ack: this session's pages go, no other's.
	if err := b.q.PutPage(within(t), "alice", "phone", session(2), 1, "application/cbor", "", []byte("other")); err != nil {
		t.Fatal(err)
	}
	if m := d.ask("ack", nil, nil, session(1)); string(m.Data) != `{"ok":true}` {
		t.Fatalf("ack %q", m.Data)
	}
	eventually(t, "pages gone after ack", func() error {
		n, err := b.q.Pages(within(t), "alice", "phone", session(1))
		if n != 0 {
			err = fmt.Errorf("%d are left", n)
		}
		return err
	})
	if m := d.ask("get", nil, nil, session(2), "1"); string(m.Data) != "other" {
		t.Fatalf("page %q", m.Data)
	}
	depth, err := b.q.Depth(within(t))
	if err != nil || depth.Input.Messages != 0 || depth.Output.Messages != 1 || depth.Unacked != 0 || depth.Output.Oldest.IsZero() {
		t.Fatalf("depth %+v %v", depth, err)
	}
}

// TestPutAgain: the queue recognises a retry, but what it does not have any more, because it was taken or was lost, it takes
// again: else a device whose reply was lost would ask for it in vain.
func TestPutAgain(t *testing.T) {
	b := start(t)
	d := b.device("alice/phone")
	for i := range 3 {
		if r := d.put(session(1), "1-1", []byte("request"), nil); !r.Stored || r.Duplicate {
			t.Fatalf("put %d: %+v", i, r)
		}
		if r := d.put(session(1), "1-1", []byte("request"), nil); !r.Stored || !r.Duplicate {
			t.Fatalf("retry %d: %+v", i, r)
		}
		if err := b.q.AckAll(within(t), b.parts(1)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStatusOfALostReply: a reply whose pages are not all there any more has none: the device sends its request again.
func TestStatusOfALostReply(t *testing.T) {
	b := start(t, func(b *bench) {
		b.status = func(context.Context, string, string, string) (protocol.Status, error) {
			return protocol.Status{State: "replied", Pages: 2, Records: 3}, nil
		}
	})
	d := b.device("alice/phone")
	for pages, want := range []int{0, 0, 2} {
		if pages > 0 {
			if err := b.q.PutPage(within(t), "alice", "phone", session(1), pages, "application/cbor", "", []byte("page")); err != nil {
				t.Fatal(err)
			}
		}
		if st := decode[protocol.Status](t, d.ask("status", nil, nil, session(1))); st.State != "replied" || st.Pages != want || st.Records != 3 {
			t.Errorf("with %d pages of 2: %+v", pages, st)
		}
	}
}

func TestGetAnswersPending(t *testing.T) {
	b := start(t, func(b *bench) { b.gwcfg.Hold = 50 * time.Millisecond })
	d := b.device("alice/phone")
	m := d.ask("get", nil, nil, session(1), "1")
	if e := decode[protocol.Error](t, m); e.Code != protocol.CodePending || m.Header.Get("Ws-Error") != string(protocol.CodePending) {
		t.Fatalf("%+v %v", e, m.Header)
	}
}

func TestRefusedCalls(t *testing.T) {
	b := start(t)
	d := b.device("alice/phone")
	json := nats.Header{"Content-Type": {"application/json"}}
	body := []byte("{}")
	for _, c := range []struct {
		name   string
		verb   string
		data   []byte
		header nats.Header
		tokens []string
		want   protocol.Code
	}{
		{"no content type", "put", body, nil, []string{session(1), "1-1"}, protocol.CodeContentType},
		{"foreign content type", "put", body, nats.Header{"Content-Type": {"text/xml"}}, []string{session(1), "1-1"}, protocol.CodeContentType},
		{"foreign encoding", "put", body, nats.Header{"Content-Type": {"application/json"}, "Content-Encoding": {"br"}}, []string{session(1), "1-1"}, protocol.CodeContentType},
		{"empty part", "put", nil, json, []string{session(1), "1-1"}, protocol.CodeMalformed},
		{"oversize part", "put", bytes.Repeat([]byte("x"), 512<<10+1), json, []string{session(1), "1-1"}, protocol.CodeTooBig},
		{"part beyond the series", "put", body, json, []string{session(1), "3-2"}, protocol.CodeSeries},
		{"part zero", "put", body, json, []string{session(1), "0-2"}, protocol.CodeSeries},
		{"part with leading zero", "put", body, json, []string{session(1), "01-2"}, protocol.CodeSeries},
		{"part is a star", "put", body, json, []string{session(1), "*"}, protocol.CodeSeries},
		{"session is a star", "put", body, json, []string{"*", "1-1"}, protocol.CodeName},
		{"session zero", "put", body, json, []string{session(0), "1-1"}, protocol.CodeName},
		{"session of capitals", "put", body, json, []string{"ABCDEF0123456789ABCDEF0123456789-1", "1-1"}, protocol.CodeName},
		{"page zero", "get", nil, nil, []string{session(1), "0"}, protocol.CodeNotFound},
		{"page star", "get", nil, nil, []string{session(1), "*"}, protocol.CodeNotFound},
		{"session star", "get", nil, nil, []string{"*", "1"}, protocol.CodeName},
		{"ack of all", "ack", nil, nil, []string{"*"}, protocol.CodeName},
		{"status of no session", "status", nil, nil, []string{"x"}, protocol.CodeName},
		{"enrolment is not JSON", "enrol", []byte("key"), nil, nil, protocol.CodeMalformed},
		{"key is not a user key", "enrol", []byte(`{"key":"AXXX"}`), nil, nil, protocol.CodeKey},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := d.ask(c.verb, c.data, c.header, c.tokens...)
			var e struct {
				protocol.Error
				In *protocol.Error `json:"error"`
			}
			e = decode[struct {
				protocol.Error
				In *protocol.Error `json:"error"`
			}](t, m)
			if e.In != nil {
				e.Error = *e.In
			}
			if e.Code != c.want || e.Message == "" {
				t.Errorf("got %s, want code %s", m.Data, c.want)
			}
		})
	}
	if depth, err := b.q.Depth(within(t)); err != nil || depth.Input.Messages != 0 {
		t.Fatalf("something was stored: %+v %v", depth, err)
	}
}

func TestBusyWhenFull(t *testing.T) {
	b := start(t, func(b *bench) { b.cfg.InputBytes = 64 << 10 })
	d := b.device("alice/phone")
	data := bytes.Repeat([]byte("x"), 20<<10)
	var last protocol.Receipt
	for n := range 5 {
		if last = d.put(session(n+1), "1-1", data, nil); last.Error != nil {
			break
		}
	}
	if last.Stored || last.Error == nil || last.Error.Code != protocol.CodeBusy || last.Error.Retry < 1 {
		t.Fatalf("receipt %+v", last)
	}
	parts := b.parts(3)
	if len(parts) != 3 {
		t.Fatal(len(parts), "parts")
	}
	if err := b.q.AckAll(within(t), parts); err != nil {
		t.Fatal(err)
	}
	if r := d.put(session(9), "1-1", data, nil); !r.Stored {
		t.Fatalf("receipt %+v", r)
	}
}

func TestRateLimits(t *testing.T) {
	b := start(t, func(b *bench) {
		b.gwcfg.CallsPerSec, b.gwcfg.CallBurst = 0.01, 5
		b.gwcfg.BytesPerSec, b.gwcfg.BytesBurst = 1, 1 // raised to one part
	})
	d, other := b.device("alice/phone"), b.device("bob/phone")
	if r := d.put(session(1), "1-2", bytes.Repeat([]byte("x"), 512<<10), nil); !r.Stored {
		t.Fatalf("receipt %+v", r)
	}
	if r := d.put(session(1), "2-2", []byte("xxxxxxxxxx"), nil); r.Stored || r.Error.Code != protocol.CodeBusy || r.Error.Retry < 5 {
		t.Fatalf("receipt %+v", r.Error)
	}
	for range 3 {
		d.ask("status", nil, nil, session(1))
	}
	if st := decode[protocol.Status](t, d.ask("status", nil, nil, session(1))); st.Error == nil || st.Error.Code != protocol.CodeBusy {
		t.Fatalf("status %+v", st)
	}
	if r := other.put(session(1), "1-1", []byte("x"), nil); !r.Stored {
		t.Fatalf("another device waits too: %+v", r)
	}
}

// TestRateLimitsOfAUser: more devices do not give one user more than a share; nobody else notices.
func TestRateLimitsOfAUser(t *testing.T) {
	const burst = 6
	b := start(t, func(b *bench) { b.gwcfg.CallsPerSec, b.gwcfg.CallBurst = 0.001, burst })
	answered, asked := 0, 0
	for i := range 8 {
		d := b.device(fmt.Sprint("alice/phone-", i))
		for range burst {
			asked++
			if st := decode[protocol.Status](t, d.ask("status", nil, nil, session(1))); st.Error == nil {
				answered++
			} else if st.Error.Code != protocol.CodeBusy || st.Error.Retry < 1 {
				t.Fatalf("%+v", st.Error)
			}
		}
	}
	if answered != 4*burst {
		t.Errorf("%d of %d calls were answered, want %d", answered, asked, 4*burst)
	}
	other := b.device("bob/phone")
	for range burst {
		if st := decode[protocol.Status](t, other.ask("status", nil, nil, session(1))); st.Error != nil {
			t.Fatalf("another user waits too: %+v", st.Error)
		}
	}
}
