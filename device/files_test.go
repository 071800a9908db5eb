package device

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/waystage/waystage/protocol"
)

// shelf is a server's door to contents, which a test makes lie.
type shelf struct {
	FileTransport
	content []byte
	bend    func(n int, chunk []byte) []byte
	gets    int
}

func (s *shelf) FileGet(_ context.Context, _ string, n int) ([]byte, error) {
	s.gets++
	c := bytes.Clone(s.content[(n-1)*protocol.FileChunk : min(n*protocol.FileChunk, len(s.content))])
	if s.bend != nil {
		c = s.bend(n, c)
	}
	return c, nil
}

// filesDevice is a device with one set that has files.
func filesDevice(t *testing.T) (*Device, string) {
	t.Helper()
	dir := t.TempDir()
	d, err := Open(t.Context(), filepath.Join(dir, "d.db"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	err = d.write(t.Context(), func(txn *txn) error {
		return errors.Join(txn.exec(`INSERT INTO _ws_set (name, bit, ord) VALUES ('field', 1, 0)`),
			txn.defineFiles("field", []protocol.FileSubscription{{Name: "all", Path: "**", Upload: true, MaxSize: 1000}}))
	})
	if err != nil {
		t.Fatal(err)
	}
	return d, dir
}

// told applies what a reply says of files.
func told(t *testing.T, d *Device, part protocol.FilesPart) error {
	t.Helper()
	return d.write(t.Context(), func(txn *txn) error {
		c, err := txn.load()
		if err != nil {
			return err
		}
		in := &incoming{t: txn, set: c.set("field"), gen: 1, rep: &SetReport{}}
		return errors.Join(d.filesPart(in, &part), txn.dropFiles())
	})
}

func entry(path string, content []byte) protocol.FileEntry {
	return protocol.FileEntry{Path: path, Version: "1", SHA256: protocol.FileHash(content), Size: int64(len(content))}
}

// lying lists what lies in a folder.
func lying(t *testing.T, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			rel, _ := filepath.Rel(dir, p)
			names = append(names, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// A hostile server names paths and hashes that lead elsewhere: the reply is refused, and nothing is written anywhere.
func TestHostileFiles(t *testing.T) {
	d, dir := filesDevice(t)
	before := len(lying(t, dir))
	good := protocol.FileHash([]byte("x"))
	for _, e := range []protocol.FileEntry{
		{Path: "../../etc/passwd", SHA256: good}, {Path: "/etc/passwd", SHA256: good}, {Path: `..\x`, SHA256: good}, {Path: "a/../../x", SHA256: good},
		{Path: "CON", SHA256: good}, {Path: "a\x00b", SHA256: good}, {Path: "", SHA256: good},
		{Path: "a", SHA256: "../../../../../tmp/x"}, {Path: "a", SHA256: strings.ToUpper(good)}, {Path: "a", SHA256: ""}, {Path: "a", SHA256: good[:63] + "/"},
		{Path: "a", SHA256: good, Size: -1}, {Path: "a", SHA256: good, Size: protocol.MaxFileSize + 1},
	} {
		if err := told(t, d, protocol.FilesPart{Subscription: "all", Files: []protocol.FileEntry{e}}); !errors.Is(err, ErrReply) {
			t.Errorf("%+v: %v", e, err)
		}
	}
	if err := told(t, d, protocol.FilesPart{Subscription: "all", Gone: []string{"../x"}, Deletes: []string{"../../x"}, Wanted: []string{"../../x", "x"}}); err != nil {
		t.Errorf("what names nothing does nothing: %v", err)
	}
	if list, err := d.Files().List(t.Context()); err != nil || len(list) > 0 {
		t.Errorf("%+v, %v", list, err)
	}
	if now := lying(t, dir); len(now) != before {
		t.Errorf("%v", now)
	}
}

// A content that is not what its hash says never shows, whatever is wrong with it; the next attempt mends it.
func TestContentIsVerified(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 3*protocol.FileChunk/16+1)
	for name, bend := range map[string]func(int, []byte) []byte{
		"flipped": func(n int, c []byte) []byte {
			if n == 2 {
				c[17] ^= 1
			}
			return c
		},
		"short": func(_ int, c []byte) []byte { return c[:len(c)-1] },
		"long":  func(_ int, c []byte) []byte { return append(c, 0) },
		"none":  func(int, []byte) []byte { return nil },
		"other": func(_ int, c []byte) []byte { return make([]byte, len(c)) },
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := filesDevice(t)
			if err := told(t, d, protocol.FilesPart{Subscription: "all", Files: []protocol.FileEntry{entry("a", content), entry("b", content)}}); err != nil {
				t.Fatal(err)
			}
			s := &shelf{content: content, bend: bend}
			x := &filing{d: d, tr: s, rep: &FileTotals{}, o: SyncOptions{Progress: func(Progress) {}}}
			if err := x.fetchAll(t.Context()); err != nil || x.rep.Missing != 1 {
				t.Errorf("%+v, %v", x.rep, err)
			}
			if _, _, err := d.Files().Open(t.Context(), "a"); !errors.Is(err, ErrFileAway) {
				t.Errorf("%v", err)
			}
			if _, err := os.Stat(d.blob(protocol.FileHash(content))); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%v", err)
			}
			s.bend, s.gets = nil, 0
			if err := x.fetchAll(t.Context()); err != nil || s.gets > protocol.FileChunks(int64(len(content))) {
				t.Errorf("%d calls, %v", s.gets, err)
			}
			for _, p := range []string{"a", "b"} {
				f, info, err := d.Files().Open(t.Context(), p)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(f)
				if err = errors.Join(err, f.Close()); err != nil || !bytes.Equal(got, content) || info.State != FileHere {
					t.Errorf("%s: %d bytes, %s, %v", p, len(got), info.State, err)
				}
			}
		})
	}
}

// Whatever the power left in the temporary file, the content that shows is right.
func TestPartIsNotTrusted(t *testing.T) {
	d, _ := filesDevice(t)
	content := bytes.Repeat([]byte("abc"), protocol.FileChunk)
	sha := protocol.FileHash(content)
	for _, left := range [][]byte{make([]byte, protocol.FileChunk), make([]byte, len(content)), make([]byte, 2*len(content)), content[:protocol.FileChunk+7], content} {
		if err := told(t, d, protocol.FilesPart{Subscription: "all", Files: []protocol.FileEntry{entry("a", content)}}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(d.part(sha)), 0o700), os.WriteFile(d.part(sha), left, 0o600)); err != nil {
			t.Fatal(err)
		}
		x := &filing{d: d, tr: &shelf{content: content}, rep: &FileTotals{}, o: SyncOptions{Progress: func(Progress) {}}}
		if err := x.fetchAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got, _, err := hashFile(t.Context(), d.blob(sha)); err != nil || got != sha {
			t.Errorf("%d bytes were left: %s, %v", len(left), got, err)
		}
		if err := told(t, d, protocol.FilesPart{Subscription: "all", Deletes: []string{"a"}}); err != nil {
			t.Fatal(err)
		}
		if err := d.sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		if names := lying(t, d.files); len(names) > 0 {
			t.Errorf("it stays: %v", names)
		}
	}
}

// Changes made here stand over what the server has until their outcome; what was made on top of one goes on from it.
func TestChangesOfFilesFollowOneAnother(t *testing.T) {
	d, _ := filesDevice(t)
	ctx := t.Context()
	put := func(text string) {
		t.Helper()
		if _, err := d.Files().Put(ctx, "a", "", strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
	}
	shows := func(want string) {
		t.Helper()
		f, _, err := d.Files().Open(ctx, "a")
		if err != nil {
			if want != "" {
				t.Error(err)
			}
			return
		}
		got, err := io.ReadAll(f)
		if err = errors.Join(err, f.Close()); err != nil || string(got) != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
	// next is the change that would be sent.
	next := func() (u outgoing) {
		t.Helper()
		err := d.write(ctx, func(t *txn) error {
			err := t.each(`SELECT id, path, op, base, sha, size FROM _ws_upload WHERE state IN ('unsent', 'sent') AND after = '' ORDER BY seq LIMIT 1`, nil, func(scan func(...any) error) error {
				return scan(&u.id, &u.offer.Path, &u.offer.Op, &u.offer.Base, &u.offer.SHA256, &u.offer.Size)
			})
			return errors.Join(err, t.exec(`UPDATE _ws_upload SET state = 'sent' WHERE id = ?`, u.id))
		})
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	decide := func(u outgoing, state string) {
		t.Helper()
		if err := d.write(ctx, func(t *txn) error { return t.decided(&u, protocol.FileReceipt{State: state}) }); err != nil {
			t.Fatal(err)
		}
	}
	h := func(text string) string { return protocol.FileHash([]byte(text)) }
	put("one")
	put("two") // the first was not sent: it is replaced
	shows("two")
	u := next()
	if u.offer.SHA256 != h("two") || u.offer.Base != "" {
		t.Errorf("%+v", u)
	}
	put("three")
	shows("three")
	if again := next(); again.id != u.id {
		t.Errorf("two changes of one file are on their way: %+v", again)
	}
	decide(u, protocol.Applied)
	u = next()
	if u.offer.SHA256 != h("three") || u.offer.Base != h("two") {
		t.Errorf("%+v", u)
	}
	put("four")
	decide(u, protocol.Rejected)
	shows("four")
	if u = next(); u.offer.SHA256 != h("four") || u.offer.Base != h("two") { // as it was: it gets its own verdict
		t.Errorf("%+v", u)
	}
	decide(u, protocol.Applied)
	if _, err := d.Files().Remove(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	shows("")
	if u = next(); u.offer.Op != protocol.FileRemove || u.offer.Base != h("four") {
		t.Errorf("%+v", u)
	}
	ups, err := d.Files().Uploads(ctx)
	if err != nil || len(ups) != 4 {
		t.Errorf("%+v, %v", ups, err)
	}
}
