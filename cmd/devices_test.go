package cmd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
)

// notebook is a log that can be searched.
type notebook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (n *notebook) Write(b []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.b.Write(b)
}

func (n *notebook) text() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.b.String()
}

// clinic is the company's identity provider.
type clinic struct {
	url string
	key *ecdsa.PrivateKey
}

func newClinic(t *testing.T) *clinic {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &clinic{key: key}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "openid-configuration") {
			_ = json.NewEncoder(w).Encode(map[string]string{"issuer": c.url, "jwks_uri": c.url + "/keys"})
			return
		}
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "one"}}})
	}))
	t.Cleanup(s.Close)
	c.url = s.URL
	return c
}

// token is a JWT for somebody, with further claims.
func (c *clinic) token(t *testing.T, email string, more map[string]any) string {
	t.Helper()
	claims := map[string]any{"iss": c.url, "aud": "waystage", "sub": "x", "email": email, "exp": time.Now().Add(time.Hour).Unix()}
	for k, v := range more {
		claims[k] = v
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: c.key}, (&jose.SignerOptions{}).WithHeader("kid", "one"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// exec edits a device's file.
func (o *operator) exec(dev, sql string) {
	o.t.Helper()
	d, err := device.Open(o.t.Context(), strings.TrimPrefix(dev, " --file "), device.Options{})
	if err != nil {
		o.t.Fatal(err)
	}
	_, err = d.DB().Exec(sql)
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		o.t.Fatal(err)
	}
}

// A fleet's devices from the operator's side: tokens, keys, reset, removal, the company's provider; and nothing secret is logged or shown.
func TestDevices(t *testing.T) {
	o := newOperator(t)
	o.init()
	idp := newClinic(t)
	log := &notebook{}
	stop := o.serveLogging(zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.AddSync(log), zap.DebugLevel)),
		twoGroups, "health.listen=", "identity.oidc.issuer="+idp.url, "identity.oidc.audience=waystage", "identity.oidc.user_claim=email",
		"identity.oidc.user_suffix=@example.org", "identity.oidc.groups_claim=roles", "identity.oidc.groups=/c/nurses=nurses,/c/clerks=clerks",
		"identity.oidc.attributes=upto=floors", "identity.oidc.auto_create=true")
	defer func() { stop() }()
	secrets := []string{testPassword}
	secret := func(s string) string { secrets = append(secrets, s); return s }
	enrol := func(code int, who, file, flag, body string) outcome {
		t.Helper()
		user, name, _ := strings.Cut(who, "/")
		return o.run(code, body, "device enrol --server nats://"+o.nats+" --user "+user+" --device "+name+" --file "+filepath.Join(o.dir, file)+flag)
	}
	dev := func(file string) string { return " --file " + filepath.Join(o.dir, file) }
	show := func(who string) registry.DeviceDetail {
		t.Helper()
		return data[registry.DeviceDetail](o, exitOK, "devices show "+who+" -o json")
	}
	newToken := func(who string) string {
		t.Helper()
		return secret(strings.TrimSpace(o.run(exitOK, "", "devices token "+who).out))
	}

	// Tokens.
	o.run(exitOK, "", "users add amina --no-password --group nurses --attr upto=3")
	o.run(exitPrecondition, "", "devices token nobody/phone")
	o.run(exitUsage, "", "devices token amina")
	o.run(exitUsage, "", "devices token amina/Phone")
	o.run(exitUsage, "", "devices token amina/phone --expires 1s")
	o.run(exitUsage, "", "devices token amina/phone --expires soon")
	first := newToken("amina/phone")
	issued := data[issuedToken](o, exitOK, "devices token amina/tablet --expires 2h -o json")
	secret(issued.Secret)
	if !strings.HasPrefix(first, protocol.TokenPrefix) || issued.State != "open" || time.Until(issued.ExpiresAt) > 2*time.Hour {
		t.Errorf("%q %+v", first, issued)
	}
	enrol(exitAuth, "amina/tablet", "x.db", " --token", first) // another device's
	if _, err := os.Stat(filepath.Join(o.dir, "x.db")); err == nil {
		t.Error("a refused enrolment leaves a file")
	}
	enrol(exitOK, "amina/phone", "amina.db", " --token", first)
	if got := enrol(exitAuth, "amina/phone", "x.db", "", first+"\n"); !strings.Contains(got.err, "token_used") || !strings.Contains(got.err, "devices token") {
		t.Errorf("used: %s", got.err)
	}
	o.run(exitOK, "", "devices tokens revoke "+strconv.FormatInt(issued.ID, 10))
	o.run(exitPrecondition, "", "devices tokens revoke 1")
	o.run(exitRejected, "", "devices tokens revoke 1 "+strconv.FormatInt(issued.ID, 10))
	o.run(exitUsage, "", "devices tokens revoke one")
	if got := enrol(exitAuth, "amina/tablet", "x.db", " --token-file "+tempFile(t, "token", issued.Secret), ""); !strings.Contains(got.err, "token_revoked") {
		t.Errorf("revoked: %s", got.err)
	}
	enrol(exitUsage, "amina/tablet", "x.db", " --token --jwt", "x")
	list := data[[]registry.Token](o, exitOK, "devices tokens ls -o json")
	if len(list) != 2 || list[0].State != "revoked" || list[1].State != "used" || list[1].UsedAt == nil {
		t.Errorf("%+v", list)
	}

	// Syncs, and what is seen of them.
	o.sync(dev("amina.db"))
	o.exec(dev("amina.db"), "UPDATE patient SET remarks = 'seen'")
	o.sync(dev("amina.db"))
	d := show("amina/phone")
	status := data[device.Status](o, exitOK, "device status -o json"+dev("amina.db"))
	if d.Library != device.Library || !strings.HasPrefix(d.App, "waystage ") || d.Fingerprint == "" || d.Fingerprint != status.Fingerprint || len(d.Sets) != 1 || d.Sets[0].UpAt == nil || d.Sets[0].DownAt == nil ||
		d.Unmerged != 0 || len(d.Incarnations) != 1 || d.EnrolledAt == nil || d.Refused == nil || d.Refused.Code != protocol.CodeTokenUsed || d.Forks != 0 {
		t.Errorf("%+v", d)
	}
	text := o.run(exitOK, "", "devices show amina/phone").out
	for _, want := range []string{d.Fingerprint, "field", "forked: never", "rejects open: 0", "library: " + device.Library} {
		if !strings.Contains(text, want) {
			t.Errorf("show does not have %q:\n%s", want, text)
		}
	}
	o.run(exitPrecondition, "", "devices show amina/nothing")
	o.run(exitUsage, "", "devices show amina")
	names := func(line string) (n []string) {
		t.Helper()
		for _, d := range data[[]registry.Device](o, exitOK, "devices ls -o json "+line) {
			n = append(n, d.User+"/"+d.Name)
		}
		return n
	}
	if got := names("amina --app nothing"); len(got) != 0 {
		t.Error(got)
	}
	if got := names("--stale 1h --group nurses"); len(got) != 0 {
		t.Error(got)
	}
	o.run(exitUsage, "", "devices ls amina --user bruno")
	o.run(exitUsage, "", "devices ls --stale soon")

	// Another key: by the device, by age, by the operator. A copy from before is out.
	old, err := os.ReadFile(filepath.Join(o.dir, "amina.db"))
	if err != nil {
		t.Fatal(err)
	}
	o.run(exitOK, "", "device rotate"+dev("amina.db"))
	second := show("amina/phone").Fingerprint
	if second == d.Fingerprint {
		t.Error("the key is the same")
	}
	if err := os.WriteFile(filepath.Join(o.dir, "old.db"), old, 0o600); err != nil {
		t.Fatal(err)
	}
	o.run(exitAuth, "", "device sync"+dev("old.db"))
	if d := show("amina/phone"); d.Refused == nil || d.Refused.Code != "credentials" || d.Refused.Host == "" {
		t.Errorf("the refused login is not told: %+v", d.Refused)
	}
	o.run(exitOK, "", "devices rotate amina/phone")
	if d := show("amina/phone"); d.NewKeyAsked == nil {
		t.Error("not asked for")
	}
	if rep, _ := o.sync(dev("amina.db")); !rep.NewKey {
		t.Errorf("%+v", rep)
	}
	if d := show("amina/phone"); d.Fingerprint == second || d.NewKeyAsked != nil {
		t.Errorf("%+v", d)
	}
	o.run(exitUsage, "", "device rotate --every 1s"+dev("amina.db"))
	o.run(exitOK, "", "device rotate --every 90d"+dev("amina.db"))
	if rep, _ := o.sync(dev("amina.db")); rep.NewKey {
		t.Error("it is not old")
	}

	// Reset: edits stay, the file begins anew.
	o.exec(dev("amina.db"), "UPDATE patient SET remarks = 'unsent'")
	o.run(exitUsage, "", "devices reset amina/phone") // wants to be confirmed
	o.run(exitOK, "", "devices reset amina/phone --yes")
	o.run(exitAuth, "", "device sync"+dev("amina.db"))
	enrol(exitOK, "amina/phone", "amina.db", " --token", newToken("amina/phone"))
	rep, rows := o.sync(dev("amina.db"))
	if !rep.Forked || rep.Merged != 3 || rep.Rejected != 0 || rows["patient"] != 3 {
		t.Errorf("after the reset: %+v %v", rep, rows)
	}
	if d := show("amina/phone"); d.Forks != 0 || d.ResetAt == nil || len(d.Incarnations) != 2 {
		t.Errorf("%+v", d)
	}

	// A copied file forks, once, and the operator sees it.
	copied, err := os.ReadFile(filepath.Join(o.dir, "amina.db"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(o.dir, "copy.db"), copied, 0o600); err != nil {
		t.Fatal(err)
	}
	o.sync(dev("amina.db"))
	if got := o.run(exitOK, "", "device sync"+dev("copy.db")); !strings.Contains(got.err, "device of its own") {
		t.Errorf("a copy is told nothing: %s", got.err)
	}
	if d := show("amina/phone"); d.Forks != 1 || d.ForkedAt == nil {
		t.Errorf("%+v", d)
	}
	if got := names("--forked"); !slices.Equal(got, []string{"amina/phone"}) {
		t.Error(got)
	}

	// Several at once, each for itself.
	o.run(exitOK, "", "devices block amina/phone amina/lost")
	if got := names("--blocked"); len(got) != 2 {
		t.Error(got)
	}
	o.run(exitAuth, "", "device sync"+dev("amina.db"))
	if d := show("amina/phone"); d.Refused.Code != protocol.CodeBlocked {
		t.Errorf("%+v", d.Refused)
	}
	if got := enrol(exitAuth, "amina/lost", "x.db", " --token", newToken("amina/lost")); !strings.Contains(got.err, "blocked") {
		t.Errorf("who has a token is told: %s", got.err)
	}
	o.run(exitRejected, "", "devices unblock amina/phone amina/nothing")
	o.run(exitPrecondition, "", "devices rotate amina/lost")
	o.run(exitOK, "", "devices rm amina/lost --yes")
	o.run(exitPrecondition, "", "devices rm amina/lost --yes")
	if got := waystage(t, nil, "", "__complete", "devices", "show", "-c", o.config, "amina/"); !strings.Contains(got.out, "amina/phone") || strings.Contains(got.out, "lost") {
		t.Errorf("completion: %s", got.out)
	}

	// The company's provider.
	nurse := func(more map[string]any) string {
		return secret(idp.token(t, "Bruno@example.org", more))
	}
	floors := func(n int) map[string]any {
		return map[string]any{"roles": []string{"/c/nurses", "other"}, "floors": n}
	}
	enrol(exitAuth, "carla/phone", "x.db", " --jwt", nurse(floors(2))) // not hers
	enrol(exitAuth, "bruno/phone", "x.db", " --jwt", nurse(map[string]any{"exp": time.Now().Add(-time.Hour).Unix()}))
	enrol(exitAuth, "bruno/phone", "x.db", " --jwt", nurse(map[string]any{"aud": "payroll"}))
	enrol(exitOK, "bruno/phone", "bruno.db", " --jwt", nurse(floors(2)))
	u := data[registry.User](o, exitOK, "users show bruno -o json")
	if u.Password || !slices.Equal(u.Groups, []string{"nurses"}) || u.Attributes["upto"] != "2" {
		t.Errorf("%+v", u)
	}
	if _, rows := o.sync(dev("bruno.db")); rows["patient"] != 2 {
		t.Errorf("%v", rows)
	}
	// Taken over again with another login, in force with the next sync.
	enrol(exitOK, "bruno/phone", "bruno.db", " --jwt-file "+tempFile(t, "jwt", nurse(floors(5))), "")
	if _, rows := o.sync(dev("bruno.db")); rows["patient"] != 5 {
		t.Errorf("%v", rows)
	}
	large := floors(5)
	large["more"] = strings.Repeat("x", 6000)
	enrol(exitOK, "bruno/phone", "bruno.db", " --jwt", nurse(large))
	large["more"] = strings.Repeat("x", 12000)
	enrol(exitFailed, "bruno/phone", "bruno.db", " --jwt-file "+tempFile(t, "jwt", nurse(large)), "")
	o.run(exitOK, "", "users block bruno")
	if got := enrol(exitAuth, "bruno/phone", "bruno.db", " --jwt", nurse(floors(5))); !strings.Contains(got.err, "blocked") {
		t.Errorf("who has a good JWT is told: %s", got.err)
	}
	o.run(exitOK, "", "users rm bruno --yes")

	stop()
	stop = func() {}
	all := log.text()
	if !strings.Contains(all, "login refused") || !strings.Contains(all, "jwt_expired") || !strings.Contains(all, "jwt_audience") {
		t.Error("the log has no reasons")
	}
	for _, s := range secrets {
		if strings.Contains(all, s) || len(s) > 100 && strings.Contains(all, s[len(s)-60:]) {
			t.Errorf("the log has the secret %.12s...", s)
		}
	}
}

func TestIdentityConfiguration(t *testing.T) {
	base := []string{"nats.embedded.store=x", "identity.oidc.issuer=https://login.example.org", "identity.oidc.audience=waystage"}
	for _, c := range []struct{ set, want string }{
		{"", ""}, {"identity.oidc.audience=", "identity.oidc.audience"}, {"identity.oidc.issuer=http://login.example.org", "identity.oidc.issuer"},
		{"identity.oidc.algorithms=none", "identity.oidc.algorithms"}, {"identity.oidc.algorithms=HS256,RS256", "identity.oidc.algorithms"},
		{"identity.oidc.attributes=ward", "identity.oidc.attributes"}, {"identity.oidc.groups=a=b", "identity.oidc.groups_claim"},
		{"identity.oidc.attributes=a=b,a=c", "identity.oidc.attributes"}, {"identity.oidc.clock_skew=1h", "identity.oidc.clock_skew"},
	} {
		set := base
		if c.set != "" {
			set = append(slices.Clone(base), c.set)
		}
		term := &terminal{env: []string{"WAYSTAGE_SOURCE_DSN=postgres://x/y", "WAYSTAGE_MIRROR_DSN=postgres://x/z"}}
		conf, err := load(term, "", set)
		if err != nil {
			t.Fatal(c.set, err)
		}
		err = conf.Validate()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) && !strings.Contains(err.(*failure).remedy, c.want) {
			t.Errorf("%s: %v", c.set, err)
		}
	}
}
