// Package oidc lets devices in whose user has signed in at the company's OpenID Connect provider: it checks the JWT that the device
// brings, and says which user of ours it stands for, with which groups and attributes.
//
// It promises that only signatures by the provider's present public keys count, by algorithms that the operator allows, none of them
// symmetric; that issuer, audience and time are checked; that a JWT is neither stored nor logged; and that a provider which cannot be
// reached keeps nobody out whose key is known already. The auth callout (package queue) asks it; the keys are fetched over HTTP or
// read from a file.
package oidc

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// Config of a [Provider].
type Config struct {
	Issuer      string            // as in the JWTs, to the letter
	Audience    []string          // one of them must be in the JWT
	JWKSURL     string            // where the provider's keys are; empty: as its discovery document says
	JWKSFile    string            // keys in a file instead
	UserClaim   string            // whose value, in lower case, is our user's name (default "sub")
	UserSuffix  string            // what the value must end in and is cut off, e.g. "@example.org"
	GroupsClaim string            // empty: groups are not taken from the provider
	Groups      map[string]string // value in GroupsClaim -> group of ours; others count for nothing
	Attributes  map[string]string // attribute of ours -> claim
	Algorithms  []string          // allowed signatures (default RS256, ES256, EdDSA)
	Skew        time.Duration     // that clocks may differ by (default 1 minute)
	AutoCreate  bool              // make users known who are not

	Refresh  time.Duration // how old keys may be before they are fetched anew (default 1 hour)
	Cooldown time.Duration // shortest time between two fetches, whatever kid is asked for (default 30 seconds)
	Timeout  time.Duration // of a fetch; the login waits for it (default 3 seconds)
}

// Asymmetric are the signatures that can be allowed.
var Asymmetric = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}

const (
	maxSkew   = 10 * time.Minute
	maxGroups = 1000 // values of the groups claim that are looked at
)

var attributeName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,62}$`)

func (c *Config) defaults() {
	if c.UserClaim == "" {
		c.UserClaim = "sub"
	}
	if len(c.Algorithms) == 0 {
		c.Algorithms = []string{"RS256", "ES256", "EdDSA"}
	}
	if c.Skew == 0 {
		c.Skew = time.Minute
	}
	if c.Refresh == 0 {
		c.Refresh = time.Hour
	}
	if c.Cooldown == 0 {
		c.Cooldown = 30 * time.Second
	}
	if c.Timeout == 0 {
		c.Timeout = 3 * time.Second
	}
}

// Check names the first thing that cannot work: the key of the configuration, and why.
func (c *Config) Check() (key string, err error) {
	if err := address(c.Issuer); err != nil {
		return "issuer", err
	}
	if len(c.Audience) == 0 || slices.Contains(c.Audience, "") {
		return "audience", errors.New("want the audience that the provider issues the JWTs for: without it any JWT of the provider would do")
	}
	if c.JWKSURL != "" {
		if err := address(c.JWKSURL); err != nil {
			return "jwks_url", err
		}
		if c.JWKSFile != "" {
			return "jwks_file", errors.New("want one of jwks_url and jwks_file")
		}
	}
	for _, a := range c.Algorithms {
		if !slices.Contains(Asymmetric, a) {
			return "algorithms", fmt.Errorf("%q is not one of %s", a, strings.Join(Asymmetric, ", "))
		}
	}
	if c.Skew < 0 || c.Skew > maxSkew {
		return "clock_skew", fmt.Errorf("want 0 to %s, not %s", maxSkew, c.Skew)
	}
	if len(c.Groups) > 0 && c.GroupsClaim == "" {
		return "groups_claim", errors.New("groups are mapped from no claim")
	}
	for from, to := range c.Groups {
		if from == "" || !protocol.ValidName(to) {
			return "groups", fmt.Errorf("want VALUE=GROUP with a group of 1 to 64 of a-z, 0-9, '_' and '-', not %q=%q", from, to)
		}
	}
	for to, from := range c.Attributes {
		if from == "" || !attributeName.MatchString(to) {
			return "attributes", fmt.Errorf("want ATTRIBUTE=CLAIM with an attribute that a rows query can name, not %q=%q", to, from)
		}
	}
	return "", nil
}

// address wants https, and allows http on this machine.
func address(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "" || u.User != nil:
		return fmt.Errorf("%q is not an address such as https://login.example.org/realm", s)
	case u.Scheme == "https", u.Scheme == "http" && (u.Hostname() == "127.0.0.1" || u.Hostname() == "localhost" || u.Hostname() == "::1"):
		return nil
	}
	return fmt.Errorf("%q: want https; keys that come over http are anybody's", s)
}

// Refusal is why a JWT is not good.
type Refusal struct {
	code protocol.Code
	text string
}

func (r *Refusal) Error() string { return r.text }

// ErrorCode is its stable name.
func (r *Refusal) ErrorCode() protocol.Code { return r.code }

func refuse(code protocol.Code, format string, args ...any) error {
	return &Refusal{code, fmt.Sprintf(format, args...)}
}

// SignIn takes over what the provider says of a user whose device comes: groups, unless nil, instead of the present ones, and attributes
// to set and to take away; with create a user who is not known becomes so.
type SignIn func(ctx context.Context, user, device string, groups []string, set map[string]string, unset []string, create bool) error

// Provider checks JWTs. It is safe for concurrent use.
type Provider struct {
	cfg    Config
	algs   []jose.SignatureAlgorithm
	keys   *keys
	signIn SignIn
	now    func() time.Time
}

// New makes one. It does no I/O: keys are fetched when the first JWT comes.
func New(cfg Config, signIn SignIn, log *zap.Logger) (*Provider, error) {
	cfg.defaults()
	if key, err := cfg.Check(); err != nil {
		return nil, fmt.Errorf("oidc: %s: %w", key, err)
	}
	if log == nil {
		log = zap.NewNop()
	}
	p := &Provider{cfg: cfg, signIn: signIn, now: time.Now}
	for _, a := range cfg.Algorithms {
		p.algs = append(p.algs, jose.SignatureAlgorithm(a))
	}
	p.keys = &keys{refresh: cfg.Refresh, cooldown: cfg.Cooldown, timeout: cfg.Timeout, log: log.Named("oidc"), read: source(cfg)}
	return p, nil
}

// Mine tells whether a secret is a JWT.
func (p *Provider) Mine(secret string) bool {
	if strings.Count(secret, ".") != 2 {
		return false
	}
	head, _, _ := strings.Cut(secret, ".")
	b, err := base64.RawURLEncoding.DecodeString(head)
	return err == nil && bytes.HasPrefix(b, []byte("{")) && json.Valid(b)
}

// Only is the one call that a login by JWT is good for.
func (p *Provider) Only() string { return protocol.VerbEnrol }

// Identify checks a JWT, and takes over what it says of its user. Refusals have codes that begin with jwt_; any other error means that the
// provider's keys, or our database, cannot be reached.
func (p *Provider) Identify(ctx context.Context, user, device, secret string) error {
	claims, err := p.verify(ctx, secret)
	if err != nil {
		return err
	}
	name, groups, set, unset, err := p.mapped(claims)
	if err != nil {
		return err
	}
	if name != user {
		return refuse("jwt_user", "the JWT is user %q's, not that of the login name", name)
	}
	return p.signIn(ctx, name, device, groups, set, unset, p.cfg.AutoCreate)
}

// verify returns the claims of a JWT that is good.
func (p *Provider) verify(ctx context.Context, secret string) (map[string]json.RawMessage, error) {
	if len(secret) > protocol.MaxSecret {
		return nil, refuse("jwt_malformed", "the JWT has %d bytes, more than %d", len(secret), protocol.MaxSecret)
	}
	token, err := jwt.ParseSigned(secret, p.algs)
	if err != nil || len(token.Headers) != 1 {
		// The words of the library may hold parts of the token.
		if alg := algorithm(secret); alg != "" && !slices.Contains(p.cfg.Algorithms, alg) {
			return nil, refuse("jwt_algorithm", "the JWT is signed with %.20q, which identity.oidc.algorithms does not allow", alg)
		}
		return nil, refuse("jwt_malformed", "the JWT cannot be read")
	}
	head := token.Headers[0]
	key, err := p.keys.find(ctx, head.KeyID, head.Algorithm)
	if err != nil {
		return nil, err
	}
	var std jwt.Claims
	claims := map[string]json.RawMessage{}
	if err := token.Claims(key.Key, &std, &claims); err != nil {
		if errors.Is(err, jose.ErrCryptoFailure) {
			return nil, refuse("jwt_signature", "the signature is not by the provider's key %.60q", head.KeyID)
		}
		return nil, refuse("jwt_malformed", "the JWT's claims or key cannot be read")
	}
	if std.Expiry == nil {
		return nil, refuse("jwt_expired", "the JWT has no expiry")
	}
	err = std.ValidateWithLeeway(jwt.Expected{Issuer: p.cfg.Issuer, AnyAudience: p.cfg.Audience, Time: p.now()}, p.cfg.Skew)
	switch {
	case err == nil:
		return claims, nil
	case errors.Is(err, jwt.ErrInvalidIssuer):
		return nil, refuse("jwt_issuer", "the JWT was issued by %.200q, not by %q", std.Issuer, p.cfg.Issuer)
	case errors.Is(err, jwt.ErrInvalidAudience):
		return nil, refuse("jwt_audience", "the JWT is for %.200q, not for %q", []string(std.Audience), p.cfg.Audience)
	case errors.Is(err, jwt.ErrExpired):
		return nil, refuse("jwt_expired", "the JWT has expired at %s", std.Expiry.Time().UTC().Format(time.RFC3339))
	case errors.Is(err, jwt.ErrNotValidYet), errors.Is(err, jwt.ErrIssuedInTheFuture):
		return nil, refuse("jwt_not_yet", "the JWT is not valid yet: do the clocks agree?")
	}
	return nil, refuse("jwt_malformed", "the JWT's claims are not valid")
}

// algorithm reads what the header of a token says, for the words of a refusal.
func algorithm(secret string) string {
	head, _, _ := strings.Cut(secret, ".")
	b, err := base64.RawURLEncoding.DecodeString(head)
	var h struct {
		Alg string `json:"alg"`
	}
	if err != nil || json.Unmarshal(b, &h) != nil {
		return ""
	}
	return h.Alg
}

// mapped says which user of ours a JWT stands for.
func (p *Provider) mapped(claims map[string]json.RawMessage) (user string, groups []string, set map[string]string, unset []string, err error) {
	bad := func(claim, want string) error {
		return refuse("jwt_claims", "the claim %q of the JWT is not there or is not %s", claim, want)
	}
	value, ok := find(claims, p.cfg.UserClaim)
	name, text := value.(string)
	if !ok || !text {
		return "", nil, nil, nil, bad(p.cfg.UserClaim, "text")
	}
	user, ok = strings.CutSuffix(strings.ToLower(name), strings.ToLower(p.cfg.UserSuffix))
	if !ok || !protocol.ValidName(user) {
		return "", nil, nil, nil, refuse("jwt_claims", "the claim %q of the JWT, %.100q, is not a user's name followed by %q", p.cfg.UserClaim, name, p.cfg.UserSuffix)
	}
	if p.cfg.GroupsClaim != "" {
		groups = []string{}
		value, _ := find(claims, p.cfg.GroupsClaim) // without the claim: in no group
		var list []any
		switch v := value.(type) {
		case nil:
		case string:
			list = []any{v}
		case []any:
			list = v
		default:
			return "", nil, nil, nil, bad(p.cfg.GroupsClaim, "a list of texts")
		}
		if len(list) > maxGroups {
			return "", nil, nil, nil, bad(p.cfg.GroupsClaim, fmt.Sprintf("a list of at most %d", maxGroups))
		}
		for _, g := range list {
			name, ok := g.(string)
			if !ok {
				return "", nil, nil, nil, bad(p.cfg.GroupsClaim, "a list of texts")
			}
			if to := p.cfg.Groups[name]; to != "" && !slices.Contains(groups, to) {
				groups = append(groups, to)
			}
		}
		slices.Sort(groups)
	}
	set = map[string]string{}
	for attribute, claim := range p.cfg.Attributes {
		value, _ := find(claims, claim)
		switch v := value.(type) {
		case nil:
			unset = append(unset, attribute)
		case string:
			set[attribute] = v
		case json.Number, bool:
			set[attribute] = fmt.Sprint(v)
		default:
			return "", nil, nil, nil, bad(claim, "a text, number or truth value")
		}
	}
	slices.Sort(unset)
	return user, groups, set, unset, nil
}

// find reads a claim: by its name, or, if none has that name, by a path with dots.
func find(claims map[string]json.RawMessage, name string) (any, bool) {
	decode := func(raw json.RawMessage) (v any) {
		d := json.NewDecoder(bytes.NewReader(raw))
		d.UseNumber()
		if d.Decode(&v) != nil {
			return nil
		}
		return v
	}
	if raw, ok := claims[name]; ok {
		return decode(raw), true
	}
	path := strings.Split(name, ".")
	raw, ok := claims[path[0]]
	if !ok {
		return nil, false
	}
	v := decode(raw)
	for _, step := range path[1:] {
		m, _ := v.(map[string]any)
		if v, ok = m[step]; !ok {
			return nil, false
		}
	}
	return v, true
}

// client fetches documents: small, soon, and from where it was told.
var client = &http.Client{
	Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}
