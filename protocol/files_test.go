package protocol

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestCheckPath(t *testing.T) {
	for _, p := range []string{"a", "manuals/pump.pdf", "patients/17/späť.jpg", "a/b c/d", ".hidden", "日本/語.txt", "com/console.txt", "com12", "a..b", strings.Repeat("a/", 31) + "a"} {
		if err := CheckPath(p); err != nil {
			t.Errorf("%q: %v", p, err)
		}
	}
	for _, p := range []string{"", "/", "/etc/passwd", "../x", "a/../b", "a/..", "..", ".", "a/./b", "a//b", "a/", `a\b`, "c:/x", "a:b", "a*", "a?", `a"`, "a<b", "a|b",
		"a\x00b", "a\nb", "a\x7f", "a\u202eb", "a\u200bb", "a\u0085", "\xff", "spa\u0301", "nul", "NUL.txt", "a/Con", "com1", "LPT9.log", "com¹", "aux .x", "CONIN$", "a.", "a ", " a", "a./b",
		strings.Repeat("x", 201), strings.Repeat("a/", 300) + "a", strings.Repeat("a/", 33) + "a", "\ue000", "a\u2028b"} {
		var e *Error
		if err := CheckPath(p); !errors.As(err, &e) || e.Code != CodePath {
			t.Errorf("%q: %v, want it refused with %s", p, err, CodePath)
		}
	}
}

// A path that is taken stays, joined to any folder, in that folder.
func FuzzCheckPath(f *testing.F) {
	for _, s := range []string{"a/b", "../a", "a/../../b", "/x", `..\x`, "a\x00", "CON", "a/ b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, p string) {
		if CheckPath(p) != nil {
			return
		}
		if !filepath.IsLocal(p) || filepath.ToSlash(filepath.Clean(p)) != p {
			t.Fatalf("%q was taken", p)
		}
	})
}

func TestPattern(t *testing.T) {
	for _, c := range []struct {
		pattern string
		prefix  string
		match   map[string]string // path -> key
		not     []string
	}{
		{"manuals/**", "manuals/", map[string]string{"manuals/a": "", "manuals/a/b/c": ""}, []string{"manuals", "manual/a", "x/manuals/a", "manualsx/a"}},
		{"**", "", map[string]string{"a": "", "a/b": ""}, nil},
		{"**/x.txt", "", map[string]string{"x.txt": "", "a/x.txt": "", "a/b/x.txt": ""}, []string{"ax.txt", "x.txt/a"}},
		{"a/*.pdf", "a/", map[string]string{"a/x.pdf": "", "a/.pdf": ""}, []string{"a/b/x.pdf", "a/x.pdfx", "a/xpdf"}},
		{"patients/{key}/**", "patients/", map[string]string{"patients/17/a.jpg": "17", "patients/a b/c/d": "a b"}, []string{"patients/17", "patients//a", "x/patients/17/a"}},
		{"photos/p-{key}.jpg", "photos/p-", map[string]string{"photos/p-9.jpg": "9", "photos/p-a.jpg.jpg": "a.jpg"}, []string{"photos/p-.jpg", "photos/p-9.jpgx", "photos/x/p-9.jpg"}},
		{"{key}/a(b)+/*", "", map[string]string{"1/a(b)+/x": "1"}, []string{"1/ab/x"}},
	} {
		p, err := ParsePattern(c.pattern)
		if err != nil {
			t.Errorf("%s: %v", c.pattern, err)
			continue
		}
		if p.Prefix != c.prefix {
			t.Errorf("%s: prefix %q, want %q", c.pattern, p.Prefix, c.prefix)
		}
		for path, want := range c.match {
			if key, ok := p.Match(path); !ok || key != want {
				t.Errorf("%s, path %s: key %q, %t; want %q", c.pattern, path, key, ok, want)
			}
			if !strings.HasPrefix(path, p.Prefix) {
				t.Errorf("%s: path %s does not begin with %q", c.pattern, path, p.Prefix)
			}
		}
		for _, path := range c.not {
			if _, ok := p.Match(path); ok {
				t.Errorf("%s matches %s", c.pattern, path)
			}
		}
	}
	for _, bad := range []string{"", "/a", "a//b", "../x", "a/../b", "a**", "**/**", "{key}/{key}", "{user}", "a/{key}*", "*/{key}", "**/{key}/a", "a:b", "{", "a\x00"} {
		if p, err := ParsePattern(bad); err == nil {
			t.Errorf("%q was taken: %s", bad, p.Regexp)
		}
	}
}

func TestFileChunks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(0, 10*FileChunk).Draw(t, "size")
		var sum int64
		for n := 1; n <= FileChunks(size); n++ {
			c := FileChunkSize(size, n)
			if c < 1 || c > FileChunk {
				t.Fatalf("chunk %d of %d bytes has %d", n, size, c)
			}
			sum += int64(c)
		}
		if sum != size || FileChunkSize(size, 0) != 0 || FileChunkSize(size, FileChunks(size)+1) != 0 {
			t.Fatalf("the chunks of %d bytes have %d", size, sum)
		}
	})
}
