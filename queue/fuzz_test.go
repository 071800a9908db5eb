package queue

import (
	"strings"
	"testing"

	"github.com/waystage/waystage/protocol"
)

// An accepted reply subject is a literal subject in the caller's own inbox, whatever it looks like.
func FuzzOwnInbox(f *testing.F) {
	for _, s := range []string{"_INBOX.bob.d9.x", "_INBOX.bob.d9.x.y", "_INBOX.bob.d9", "_INBOX.bob.d9.", "_INBOX.bob.d9x.y", "_INBOX.bob.d9.*", "_INBOX.alice.d1.x",
		"_INBOX.bob.d9..x", "_INBOX.bob.d9.x\r\nPUB y", "$JS.API.STREAM.DELETE.WS_OUT", "sync.in.alice.d1.s.1-1", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, reply string) {
		if !ownInbox(reply, "bob", "d9") {
			return
		}
		tokens := strings.Split(reply, ".")
		if len(tokens) < 4 || tokens[0] != "_INBOX" || tokens[1] != "bob" || tokens[2] != "d9" {
			t.Fatalf("%q", reply)
		}
		for _, token := range tokens {
			if token == "" || strings.ContainsAny(token, "*> \t\r\n") {
				t.Fatalf("%q", reply)
			}
		}
	})
}

// Whatever names a login has: what it may do names exactly that identity, or there is no login.
func FuzzDeviceGrant(f *testing.F) {
	for _, s := range []string{"bob/d9", "a_b/c", "a/b_c", "*/>", "a.b/c", "a/b.c", "bob/ d9", "бob/d9", "a//b", "/", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, login string) {
		user, device, ok := strings.Cut(login, "/")
		if !ok || !protocol.ValidName(user) || !protocol.ValidName(device) {
			return // refused
		}
		g := deviceGrant(user, device)
		for _, s := range append(g.pub, g.sub...) {
			tokens := strings.Split(s, ".")
			if len(tokens) < 3 || tokens[1] != user || tokens[2] != device || strings.ContainsAny(strings.TrimSuffix(s, ".>"), "*> ") {
				t.Fatalf("%q gives %q", login, s)
			}
		}
	})
}

func FuzzOneLine(f *testing.F) {
	f.Add("a\r\nb\x00\xff")
	f.Add(strings.Repeat("ä", 600))
	f.Fuzz(func(t *testing.T, s string) {
		if got := oneLine(s); strings.ContainsAny(got, "\r\n\x00") || len(got) > 503 {
			t.Fatalf("%q", got)
		}
	})
}
