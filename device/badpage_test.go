package device

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/protocol"
)

// liar changes the pages that pass through it.
type liar struct {
	Transport
	lie func(Payload) Payload
}

func (l *liar) Get(ctx context.Context, session string, page int) (Payload, error) {
	p, err := l.Transport.Get(ctx, session, page)
	if err == nil && l.lie != nil {
		p = l.lie(p)
	}
	return p, err
}

// TestBadPages: whatever a server answers, the device does not panic, loses no edit, applies no part of a reply that it
// cannot use, and goes on as soon as the server is mended.
func TestBadPages(t *testing.T) {
	dir, run := t.TempDir(), 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		ctx := context.Background()
		srv := newServer(nil)
		srv.foreign(item(1, "1", "old"))
		l := &liar{Transport: &wire{s: srv, device: "a"}}
		path := filepath.Join(dir, fmt.Sprint(run, ".db"))
		d, err := Open(ctx, path, Options{Encoding: "none", Dial: func(context.Context, Login) (Transport, error) { return l, nil }})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = d.Close()
			_ = os.Remove(path)
		}()
		d.patience, d.durability = impatient, "OFF"
		if err := d.Enrol(ctx, EnrolOptions{Servers: []string{"mem"}, User: "anna", Device: "a"}); err != nil {
			t.Fatal(err)
		}
		sync := func() error { _, err := d.Sync(ctx, SyncOptions{}); return err }
		if err := sync(); err != nil {
			t.Fatal(err)
		}
		for _, q := range []string{`UPDATE item SET val = 'mine' WHERE id = 1`, insertOf(2), `INSERT INTO note (id) VALUES ('n')`} {
			if _, err := d.db.Exec(q); err != nil {
				t.Fatal(err)
			}
		}
		srv.foreign(item(3, "1", "new"))
		before := images(t, d, "public.item")
		wreck := rapid.SampledFrom(wrecks).Draw(t, "wreck")
		used := false
		l.lie = func(p Payload) Payload {
			page, err := p.page(protocol.DefaultLimits())
			if err != nil || page.Error != nil {
				return p
			}
			if wreck.page == nil {
				used = true
				data := append([]byte{}, p.Data...)
				if n := rapid.IntRange(0, len(data)-1).Draw(t, "at"); rapid.Bool().Draw(t, "cut") {
					data = data[:n]
				} else {
					data[n] = 0xff // nowhere valid in CBOR but as the end of what nobody began, nor in UTF-8
				}
				p.Data = data
				return p
			}
			if !wreck.page(page) {
				return p
			}
			used = true
			data, err := protocol.Encode(page, p.ContentType)
			if err != nil {
				t.Fatal(err)
			}
			p.Data = data
			return p
		}
		err = sync()
		if !used {
			t.Fatalf("%s did not find a page", wreck.name)
		}
		if !errors.Is(err, ErrReply) {
			t.Fatalf("%s: %v", wreck.name, err)
		}
		now := images(t, d, "public.item")
		for k := range union(before, now) {
			if !imgEqual(before[k], now[k]) {
				t.Fatalf("%s: row %s became %s", wreck.name, k, show(now[k]))
			}
		}
		if p, err := d.Pending(ctx); err != nil || len(p) != 3 {
			t.Fatalf("%s: %v: %d edits of 3", wreck.name, err, len(p))
		}
		l.lie = nil
		for range 2 {
			if err := sync(); err != nil {
				t.Fatalf("after %s: %v", wreck.name, err)
			}
			srv.settleAll()
		}
		if err := sync(); err != nil {
			t.Fatal(err)
		}
		srv.same(t, d)
		if p, err := d.Pending(ctx); err != nil || len(p) != 0 {
			t.Fatalf("after %s: %v %+v", wreck.name, err, p)
		}
		if len(srv.problems) > 0 {
			t.Fatal(srv.problems)
		}
	})
}

// wrecks make a page unusable; they tell whether the page had what they need.
var wrecks = []struct {
	name string
	page func(*protocol.Page) bool
}{
	{"bytes", nil},
	{"unknown table", func(p *protocol.Page) bool {
		p.Tables = append(p.Tables, protocol.TableRows{Table: "public.nobody", Deletes: [][]protocol.Value{{ptr("1")}}})
		return true
	}},
	{"unknown column", func(p *protocol.Page) bool {
		return onRows(p, func(r *protocol.TableRows) { r.Columns[len(r.Columns)-1] = "nobody" })
	}},
	{"no key column", func(p *protocol.Page) bool {
		return onRows(p, func(r *protocol.TableRows) {
			r.Columns = r.Columns[1:]
			for i := range r.Rows {
				r.Rows[i].Values = r.Rows[i].Values[1:]
			}
		})
	}},
	{"null key", func(p *protocol.Page) bool {
		return onRows(p, func(r *protocol.TableRows) { r.Rows[0].Values[0] = nil })
	}},
	{"short row", func(p *protocol.Page) bool {
		return onRows(p, func(r *protocol.TableRows) { r.Rows[0].Values = r.Rows[0].Values[:1] })
	}},
	{"null key deleted", func(p *protocol.Page) bool {
		return onRows(p, func(r *protocol.TableRows) { r.Deletes = append(r.Deletes, []protocol.Value{nil}) })
	}},
	{"long key deleted", func(p *protocol.Page) bool {
		return onRows(p, func(r *protocol.TableRows) { r.Deletes = append(r.Deletes, []protocol.Value{ptr("1"), ptr("2")}) })
	}},
	{"no cursor", func(p *protocol.Page) bool { p.Cursor = ""; return p.Last }},
	{"unknown verdict", func(p *protocol.Page) bool {
		return onVerdict(p, func(v *protocol.Verdict) { v.State = "perhaps" })
	}},
	{"merged under a long key", func(p *protocol.Page) bool {
		return onVerdict(p, func(v *protocol.Verdict) { v.Key = append(v.Key, ptr("2")) })
	}},
}

func onRows(p *protocol.Page, fn func(*protocol.TableRows)) bool {
	for i := range p.Tables {
		if len(p.Tables[i].Rows) > 0 {
			fn(&p.Tables[i])
			return true
		}
	}
	return false
}

func onVerdict(p *protocol.Page, fn func(*protocol.Verdict)) bool {
	if len(p.Verdicts) > 0 {
		fn(&p.Verdicts[0])
	}
	return len(p.Verdicts) > 0
}
