package queue_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/waystage/waystage/protocol"
)

// TestWatchThroughTheGateway: a watch is held until there is news for that very device.
func TestWatchThroughTheGateway(t *testing.T) {
	b := start(t)
	d := b.device("alice/phone")
	heard := make(chan protocol.News, 1)
	listen := func(body string) {
		go func() {
			var n protocol.News
			m := d.ask("watch", []byte(body), nil)
			if err := json.Unmarshal(m.Data, &n); err != nil {
				n.Error = &protocol.Error{Message: fmt.Sprintf("%q: %v", m.Data, err)}
			}
			heard <- n
		}()
	}
	asked := func() watched {
		t.Helper()
		select {
		case w := <-b.watched:
			return w
		case <-within(t).Done():
			t.Fatal("nobody was asked")
			return watched{}
		}
	}

	listen(`{"sets":[{"set":"field","cursor":"e.1.x"},{"set":"new"}],"only":true}`)
	w := asked()
	if w.user != "alice" || w.device != "phone" || !w.ask.Only || len(w.ask.Sets) != 2 || w.ask.Sets[0].Cursor != "e.1.x" {
		t.Fatalf("%+v", w)
	}
	eventually(t, "held watch", func() error {
		if s := b.gw.Stats(); s.Held != 1 || s.Watches != 1 {
			return errors.New("not held")
		}
		return nil
	})
	w.answer <- []string{"field"}
	if n := <-heard; n.Error != nil || !slices.Equal(n.Sets, []string{"field"}) {
		t.Fatalf("%+v", n)
	}
	// Nothing for as long as it is held: an empty list, not null.
	listen(`{"sets":[]}`)
	w = asked()
	close(w.answer)
	if n := <-heard; n.Error != nil || n.Sets == nil || len(n.Sets) != 0 {
		t.Fatalf("%+v", n)
	}

	for name, body := range map[string]string{
		"empty": "", "no JSON": "{", "another type": `{"sets":"field"}`,
		"too many": `{"sets":[` + strings.Repeat(`{"set":"a"},`, protocol.MaxWatched) + `{"set":"a"}]}`,
		"too long": `{"sets":[{"set":"` + strings.Repeat("a", 64<<10) + `"}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			if n := decode[protocol.News](t, d.ask("watch", []byte(body), nil)); n.Error == nil || n.Error.Code != protocol.CodeMalformed || n.Error.Retry != 0 {
				t.Fatalf("%+v", n)
			}
		})
	}

	// Another device's watch is not hers to ask, and the broker says so.
	if err := d.nc.PublishRequest(protocol.RequestSubject("bob", "phone", protocol.VerbWatch), protocol.InboxPrefix("alice", "phone")+".x", []byte(`{"sets":[]}`)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the broker's refusal", func() error {
		select {
		case w := <-b.watched:
			t.Fatalf("a watch under another name: %+v", w)
		default:
		}
		if d.violations() != 1 {
			return errors.New("not refused")
		}
		return nil
	})
}

// watched is a watch that the gateway has taken.
type watched struct {
	user, device string
	ask          protocol.Watch
	answer       chan []string
}

// news hands watches over to the test.
func (b *bench) news(ctx context.Context, user, device string, ask protocol.Watch) []string {
	w := watched{user, device, ask, make(chan []string, 1)}
	select {
	case b.watched <- w:
	case <-ctx.Done():
		return nil
	}
	select {
	case sets := <-w.answer:
		return sets
	case <-ctx.Done():
		return nil
	}
}
