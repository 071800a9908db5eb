package registry

import (
	"context"
	"strings"
	"testing"
)

func TestHash(t *testing.T) {
	h, ctx := newHasher(), context.Background()
	a, err := h.make(ctx, "correct horse")
	if err != nil {
		t.Fatal(err)
	}
	b, err := h.make(ctx, "correct horse")
	if err != nil || a == b {
		t.Error("no salt", err)
	}
	for password, want := range map[string]bool{"correct horse": true, "correct horsf": false, "": false} {
		if ok, err := h.verify(ctx, a, password); ok != want || err != nil {
			t.Errorf("%q: %v %v", password, ok, err)
		}
	}
	// The argon2 reference implementation's own vector.
	const vector = "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc"
	if ok, err := h.verify(ctx, vector, "password"); !ok || err != nil {
		t.Error("another implementation's hash is not understood:", ok, err)
	}
	if d := h.decoy(); !strings.HasPrefix(d, a[:len("$argon2id$v=19$m=19456,t=2,p=1$")]) || h.decoy() != d {
		t.Error("the decoy costs something else:", d)
	}
}

func FuzzParsePHC(f *testing.F) {
	f.Add("$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc")
	f.Add("$argon2id$v=19$m=4294967295,t=4294967295,p=255$$")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parsePHC(s)
		if err == nil && (p.memory > 1<<20 || p.memory < 8 || p.passes < 1 || p.passes > 64 || p.lanes < 1 || len(p.salt) < 8 || len(p.key) < 16) {
			t.Fatalf("%q: %+v", s, p)
		}
	})
}
