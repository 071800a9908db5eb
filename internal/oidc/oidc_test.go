package oidc_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/waystage/waystage/internal/oidc"
	"github.com/waystage/waystage/protocol"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// company is an identity provider on a real HTTP server: discovery document, keys, and a pen to sign with.
type company struct {
	t      *testing.T
	url    string
	mu     sync.Mutex
	keys   map[string]crypto.Signer // by kid
	issuer string                   // told by discovery; empty: the right one
	down   bool
	asked  int // for keys
	secret bool
	noKids bool
}

func newCompany(t *testing.T) *company {
	c := &company{t: t, keys: map[string]crypto.Signer{}}
	mux := http.NewServeMux()
	mux.HandleFunc("/realm/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		issuer := c.url + "/realm"
		if c.issuer != "" {
			issuer = c.issuer
		}
		if c.down {
			http.Error(w, "away", http.StatusServiceUnavailable)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]string{"issuer": issuer, "jwks_uri": c.url + "/keys"})
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, _ *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.asked++
		if c.down {
			http.Error(w, "away", http.StatusServiceUnavailable)
			return
		}
		_ = json.NewEncoder(w).Encode(c.jwks())
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	c.url = s.URL
	return c
}

func (c *company) jwks() jose.JSONWebKeySet {
	var set jose.JSONWebKeySet
	for _, kid := range slices.Sorted(maps.Keys(c.keys)) {
		k := jose.JSONWebKey{Key: c.keys[kid].Public(), KeyID: kid, Use: "sig"}
		if c.noKids {
			k.KeyID = ""
		}
		set.Keys = append(set.Keys, k)
	}
	if c.secret {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: []byte("0123456789abcdef0123456789abcdef"), KeyID: "oct", Algorithm: "HS256"})
	}
	return set
}

func (c *company) do(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

func (c *company) fetches() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked
}

var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
})

func ecKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func b64(v any) string {
	b, _ := json.Marshal(v)
	return base64.RawURLEncoding.EncodeToString(b)
}

// sign signs claims as the library of another vendor would.
func sign(t *testing.T, kid string, alg jose.SignatureAlgorithm, key any, claims map[string]any) string {
	t.Helper()
	opts := &jose.SignerOptions{}
	if kid != "" {
		opts = opts.WithHeader("kid", kid)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, opts.WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := jwt.Signed(s).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// desk notes who was signed in.
type desk struct {
	user, device string
	groups       []string
	set          map[string]string
	unset        []string
	create       bool
	err          error
	times        int
}

func (d *desk) signIn(_ context.Context, user, device string, groups []string, set map[string]string, unset []string, create bool) error {
	d.user, d.device, d.groups, d.set, d.unset, d.create = user, device, groups, set, unset, create
	d.times++
	return d.err
}

func (c *company) config() oidc.Config {
	return oidc.Config{Issuer: c.url + "/realm", Audience: []string{"waystage"}, Cooldown: time.Nanosecond, Timeout: 30 * time.Second}
}

func provider(t *testing.T, cfg oidc.Config, d *desk) *oidc.Provider {
	t.Helper()
	p, err := oidc.New(cfg, d.signIn, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (c *company) claims(more map[string]any) map[string]any {
	all := map[string]any{"iss": c.url + "/realm", "aud": "waystage", "sub": "amina", "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix()}
	for k, v := range more {
		if v == nil {
			delete(all, k)
		} else {
			all[k] = v
		}
	}
	return all
}

func code(err error) protocol.Code {
	var r *oidc.Refusal
	if errors.As(err, &r) {
		return r.ErrorCode()
	}
	return ""
}

func TestEveryWayAJWTIsRefused(t *testing.T) {
	c := newCompany(t)
	ec := ecKey(t)
	c.keys["r1"], c.keys["e1"] = rsaKey(), ec
	c.secret = true
	d := &desk{}
	p := provider(t, c.config(), d)
	good := sign(t, "r1", jose.RS256, rsaKey(), c.claims(nil))
	if !p.Mine(good) || p.Mine("correct horse") || p.Mine("a.b.c") || p.Mine("..") || p.Only() != protocol.VerbEnrol {
		t.Error("takes the wrong secrets for its own")
	}
	public := x509.MarshalPKCS1PublicKey(&rsaKey().PublicKey)
	asPEM := pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: public})
	hs := func(key []byte) string {
		text := b64(map[string]string{"alg": "HS256", "kid": "r1", "typ": "JWT"}) + "." + b64(c.claims(nil))
		m := hmac.New(sha256.New, key)
		m.Write([]byte(text))
		return text + "." + base64.RawURLEncoding.EncodeToString(m.Sum(nil))
	}
	none := func(alg string) string {
		return b64(map[string]string{"alg": alg, "kid": "r1"}) + "." + b64(c.claims(nil)) + "."
	}
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(good, ".")
	r := func(more map[string]any) string { return sign(t, "r1", jose.RS256, rsaKey(), c.claims(more)) }
	unix := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	for name, x := range map[string]struct {
		token string
		want  protocol.Code
	}{
		"good":                      {good, ""},
		"good, elliptic":            {sign(t, "e1", jose.ES256, ec, c.claims(nil)), ""},
		"good, several audiences":   {r(map[string]any{"aud": []string{"other", "waystage"}}), ""},
		"within the skew":           {r(map[string]any{"exp": unix(-20 * time.Second)}), ""},
		"wrong issuer":              {r(map[string]any{"iss": "https://evil.example.org"}), "jwt_issuer"},
		"no issuer":                 {r(map[string]any{"iss": nil}), "jwt_issuer"},
		"issuer with a slash":       {r(map[string]any{"iss": c.url + "/realm/"}), "jwt_issuer"},
		"wrong audience":            {r(map[string]any{"aud": "payroll"}), "jwt_audience"},
		"no audience":               {r(map[string]any{"aud": nil}), "jwt_audience"},
		"expired":                   {r(map[string]any{"exp": unix(-2 * time.Minute)}), "jwt_expired"},
		"no expiry":                 {r(map[string]any{"exp": nil}), "jwt_expired"},
		"not yet valid":             {r(map[string]any{"nbf": unix(2 * time.Minute)}), "jwt_not_yet"},
		"issued in the future":      {r(map[string]any{"iat": unix(2 * time.Minute)}), "jwt_not_yet"},
		"expiry is text":            {r(map[string]any{"exp": "tomorrow"}), "jwt_malformed"},
		"alg none":                  {none("none"), "jwt_algorithm"},
		"alg None":                  {none("None"), "jwt_algorithm"},
		"alg missing":               {none(""), "jwt_malformed"},
		"HS256 with the public key": {hs(asPEM), "jwt_algorithm"},
		"HS256 with its bytes":      {hs(public), "jwt_algorithm"},
		"HS256 with the shared key": {hs([]byte("0123456789abcdef0123456789abcdef")), "jwt_algorithm"},
		"alg not allowed":           {sign(t, "r1", jose.PS256, rsaKey(), c.claims(nil)), "jwt_algorithm"},
		"another's signature":       {sign(t, "r1", jose.RS256, other, c.claims(nil)), "jwt_signature"},
		"signature cut":             {good[:len(good)-8], "jwt_signature"},
		"no signature":              {parts[0] + "." + parts[1] + ".", "jwt_signature"},
		"claims exchanged":          {parts[0] + "." + b64(c.claims(map[string]any{"sub": "boss"})) + "." + parts[2], "jwt_signature"},
		"key of another kind":       {sign(t, "e1", jose.RS256, rsaKey(), c.claims(nil)), "jwt_key"},
		"unknown kid":               {sign(t, "r9", jose.RS256, rsaKey(), c.claims(nil)), "jwt_key"},
		"huge":                      {r(map[string]any{"x": strings.Repeat("x", protocol.MaxSecret)}), "jwt_malformed"},
		"not JSON":                  {b64(map[string]string{"alg": "RS256"}) + ".e30x.AAAA", "jwt_signature"},
		"another user":              {r(map[string]any{"sub": "boss"}), "jwt_user"},
		"no user":                   {r(map[string]any{"sub": nil}), "jwt_claims"},
		"user is no name":           {r(map[string]any{"sub": "amina@example.org"}), "jwt_claims"},
		"user is a star":            {r(map[string]any{"sub": "*"}), "jwt_claims"},
		"user is a number":          {r(map[string]any{"sub": 7}), "jwt_claims"},
	} {
		t.Run(name, func(t *testing.T) {
			d.times = 0
			err := p.Identify(t.Context(), "amina", "phone", x.token)
			if got := code(err); got != x.want || (err == nil) != (x.want == "") {
				// "sub" of another type is found when the claims are read.
				if name != "user is a number" || got != "jwt_malformed" {
					t.Errorf("got %q (%v), want %q", got, err, x.want)
				}
			}
			if (d.times > 0) != (x.want == "") {
				t.Error("signed in", d.times)
			}
			if err != nil && len(x.token) > 60 && strings.Contains(err.Error(), x.token[len(x.token)-40:]) {
				t.Error("the error shows the JWT:", err)
			}
		})
	}
	// What the registry says of the user is passed on.
	d.err = errors.New("there is no such user")
	if err := p.Identify(t.Context(), "amina", "phone", good); !errors.Is(err, d.err) {
		t.Error(err)
	}
}

func TestMapping(t *testing.T) {
	c := newCompany(t)
	c.keys["r1"] = rsaKey()
	cfg := c.config()
	cfg.UserClaim, cfg.UserSuffix, cfg.AutoCreate = "email", "@Example.org", true
	cfg.GroupsClaim, cfg.Groups = "realm_access.roles", map[string]string{"/clinic/nurses": "nurses", "night": "night", "nurse2": "nurses"}
	cfg.Attributes = map[string]string{"ward": "department", "floor": "floor", "chief": "chief", "gone": "https://example.org/claims/gone"}
	d := &desk{}
	p := provider(t, cfg, d)
	claims := func(more map[string]any) string {
		all := c.claims(map[string]any{"email": "Amina@example.org", "realm_access": map[string]any{"roles": []string{"nurse2", "/clinic/nurses", "admin"}},
			"department": "north wing", "floor": 12345678901234567, "chief": true})
		maps.Copy(all, more)
		return sign(t, "r1", jose.RS256, rsaKey(), all)
	}
	if err := p.Identify(t.Context(), "amina", "phone", claims(nil)); err != nil {
		t.Fatal(err)
	}
	if d.user != "amina" || d.device != "phone" || !slices.Equal(d.groups, []string{"nurses"}) || !d.create || !slices.Equal(d.unset, []string{"gone"}) ||
		!maps.Equal(d.set, map[string]string{"ward": "north wing", "floor": "12345678901234567", "chief": "true"}) {
		t.Errorf("%+v", d)
	}
	if err := p.Identify(t.Context(), "amina", "phone", claims(map[string]any{"realm_access": map[string]any{}, "https://example.org/claims/gone": "back", "floor": nil})); err != nil {
		t.Fatal(err)
	}
	if d.groups == nil || len(d.groups) != 0 || d.set["gone"] != "back" || !slices.Equal(d.unset, []string{"floor"}) {
		t.Errorf("%+v", d)
	}
	for name, more := range map[string]map[string]any{
		"another domain": {"email": "amina@evil.org"}, "suffix alone": {"email": "@example.org"}, "a group that is a number": {"realm_access": map[string]any{"roles": []any{7}}},
		"groups that are a number": {"realm_access": map[string]any{"roles": 7}}, "an attribute that is a list": {"department": []string{"a"}},
		"too many groups": {"realm_access": map[string]any{"roles": make([]int, 1001)}},
	} {
		if err := p.Identify(t.Context(), "amina", "phone", claims(more)); code(err) != "jwt_claims" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The keys change, the provider is away, and neither keeps anybody out who need not be.
func TestKeysOfTheProvider(t *testing.T) {
	c := newCompany(t)
	e1, e2 := ecKey(t), ecKey(t)
	c.keys["e1"] = e1
	d := &desk{}
	login := func(p *oidc.Provider, kid string, key *ecdsa.PrivateKey) error {
		return p.Identify(t.Context(), "amina", "phone", sign(t, kid, jose.ES256, key, c.claims(nil)))
	}
	want := func(what string, err error, code_ protocol.Code) {
		t.Helper()
		if code(err) != code_ || (err == nil) != (code_ == "") {
			t.Errorf("%s: %v", what, err)
		}
	}
	p := provider(t, c.config(), d)
	// Away from the start: a failure, no refusal; and it mends itself.
	c.do(func() { c.down = true })
	if err := login(p, "e1", e1); err == nil || code(err) != "" {
		t.Error(err)
	}
	c.do(func() { c.down = false })
	want("there again", login(p, "e1", e1), "")
	n := c.fetches()
	want("known", login(p, "e1", e1), "")
	if c.fetches() != n {
		t.Error("known keys are fetched again")
	}
	// Away: what is known is good.
	c.do(func() { c.down = true })
	want("while it is away", login(p, "e1", e1), "")
	want("unknown while it is away", login(p, "e2", e2), "jwt_key")
	c.do(func() { c.down = false; c.keys = map[string]crypto.Signer{"e2": e2} })
	want("a new key", login(p, "e2", e2), "")
	want("the old key", login(p, "e1", e1), "jwt_key")

	// Old keys are fetched anew, and are good if that fails.
	cfg := c.config()
	cfg.Refresh = time.Nanosecond
	p = provider(t, cfg, d)
	want("first", login(p, "e2", e2), "")
	c.do(func() { c.down = true })
	want("cannot be fetched anew", login(p, "e2", e2), "")
	c.do(func() { c.down = false; c.keys = map[string]crypto.Signer{"e1": e1} })
	want("taken back", login(p, "e2", e2), "jwt_key")

	// Whoever invents names of keys does not flood the provider.
	cfg = c.config()
	cfg.Cooldown = time.Hour
	p = provider(t, cfg, d)
	n = c.fetches()
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() { want("invented", login(p, fmt.Sprint("x", i), e1), "jwt_key") })
	}
	wg.Wait()
	want("e1", login(p, "e1", e1), "")
	if got := c.fetches() - n; got != 1 {
		t.Errorf("%d fetches", got)
	}

	// Discovery that speaks for somebody else.
	c.do(func() { c.issuer = "https://evil.example.org" })
	if err := login(provider(t, c.config(), d), "e1", e1); err == nil || code(err) != "" {
		t.Error(err)
	}
	// Keys from an address, from a file; keys without names.
	cfg = c.config()
	cfg.JWKSURL = c.url + "/keys"
	want("jwks_url", login(provider(t, cfg, d), "e1", e1), "")
	c.do(func() { c.noKids = true })
	want("no names", login(provider(t, cfg, d), "", e1), "")
	cfg.JWKSURL, cfg.JWKSFile = "", filepath.Join(t.TempDir(), "keys.json")
	if err := login(provider(t, cfg, d), "e1", e1); err == nil || code(err) != "" {
		t.Error("no file:", err)
	}
	write := func(v any) {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(cfg.JWKSFile, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, seed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	write(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: seed.Public(), KeyID: "ed"}, {Key: e1.Public(), KeyID: "enc", Use: "enc"}, {Key: e2.Public(), KeyID: "twice"}, {Key: e1.Public(), KeyID: "twice"}}})
	p = provider(t, cfg, d)
	want("Ed25519", p.Identify(t.Context(), "amina", "phone", sign(t, "ed", jose.EdDSA, seed, c.claims(nil))), "")
	want("a key for something else", login(p, "enc", e1), "jwt_key")
	want("a name of two keys", login(p, "twice", e1), "jwt_key")
	want("no name, several keys", login(p, "", e1), "jwt_key")
	for name, doc := range map[string]any{"no keys": map[string]any{}, "secret keys alone": jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: []byte("0123456789abcdef0123456789abcdef"), KeyID: "e1"}}},
		"no JWKS": 7, "huge": strings.Repeat("x", 2<<20)} {
		write(doc)
		if err := login(provider(t, cfg, d), "e1", e1); err == nil || code(err) != "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestConfigurationIsChecked(t *testing.T) {
	good := oidc.Config{Issuer: "https://login.example.org", Audience: []string{"waystage"}}
	for key, change := range map[string]func(*oidc.Config){
		"":             func(*oidc.Config) {},
		"issuer":       func(c *oidc.Config) { c.Issuer = "http://login.example.org" },
		"audience":     func(c *oidc.Config) { c.Audience = nil },
		"jwks_url":     func(c *oidc.Config) { c.JWKSURL = "ftp://x/keys" },
		"jwks_file":    func(c *oidc.Config) { c.JWKSURL, c.JWKSFile = "https://x/keys", "keys.json" },
		"algorithms":   func(c *oidc.Config) { c.Algorithms = []string{"RS256", "HS256"} },
		"clock_skew":   func(c *oidc.Config) { c.Skew = time.Hour },
		"groups_claim": func(c *oidc.Config) { c.Groups = map[string]string{"a": "b"} },
		"groups":       func(c *oidc.Config) { c.GroupsClaim, c.Groups = "groups", map[string]string{"a": "No Good"} },
		"attributes":   func(c *oidc.Config) { c.Attributes = map[string]string{"no-name": "x"} },
	} {
		c := good
		change(&c)
		if got, err := c.Check(); got != key || (err == nil) != (key == "") {
			t.Errorf("want %q, got %q: %v", key, got, err)
		}
		if _, err := oidc.New(c, nil, nil); (err == nil) != (key == "") {
			t.Errorf("%s: %v", key, err)
		}
	}
	for _, alg := range []string{"none", "HS256", "", "rs256"} {
		c := good
		c.Algorithms = []string{alg}
		if _, err := c.Check(); err == nil {
			t.Errorf("%q is allowed", alg)
		}
	}
	for _, issuer := range []string{"", "login.example.org", "https://user:secret@login.example.org", "https://"} {
		c := good
		c.Issuer = issuer
		if _, err := c.Check(); err == nil {
			t.Errorf("issuer %q is allowed", issuer)
		}
	}
}

// Nothing that is logged has a JWT in it.
func TestNoJWTIsLogged(t *testing.T) {
	c := newCompany(t)
	c.keys["r1"] = rsaKey()
	c.down = true
	var log strings.Builder
	z := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.AddSync(&log), zap.DebugLevel))
	p, err := oidc.New(c.config(), (&desk{}).signIn, z)
	if err != nil {
		t.Fatal(err)
	}
	token := sign(t, "r1", jose.RS256, rsaKey(), c.claims(nil))
	if err := p.Identify(t.Context(), "amina", "phone", token); err == nil || strings.Contains(err.Error(), token[:60]) {
		t.Error(err)
	}
	if log.Len() == 0 || strings.Contains(log.String(), token[:60]) {
		t.Error(log.String())
	}
}

func FuzzIdentify(f *testing.F) {
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("eyJhbGciOiJSUzI1NiIsImtpZCI6IngifQ.e30.AAAA")
	f.Add("..")
	file := filepath.Join(f.TempDir(), "keys.json")
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: rsaKey().Public(), KeyID: "x"}}})
	if err != nil {
		f.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		f.Fatal(err)
	}
	d := &desk{}
	p, err := oidc.New(oidc.Config{Issuer: "https://x", Audience: []string{"y"}, JWKSFile: file}, d.signIn, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, secret string) {
		p.Mine(secret)
		if err := p.Identify(t.Context(), "amina", "phone", secret); err == nil || d.times > 0 {
			t.Fatalf("%q was let in", secret)
		}
	})
}
