package oidc

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/zap"
)

const (
	maxDocument = 1 << 20 // bytes
	maxKeys     = 100
	minRSA      = 2048 // bits
)

// keys are the provider's public keys. What was fetched is good until something newer has been fetched, however long the provider is away.
type keys struct {
	refresh, cooldown, timeout time.Duration
	read                       func(context.Context) ([]byte, error)
	log                        *zap.Logger

	fetching sync.Mutex // held over a fetch: whoever waits for it has it, too
	mu       sync.Mutex
	set      []jose.JSONWebKey
	at       time.Time // of the last success
	tried    time.Time // of the last attempt
}

// find is the key that has signed. An unknown one has the keys fetched, but not again and again.
func (k *keys) find(ctx context.Context, kid, alg string) (jose.JSONWebKey, error) {
	key, err := k.known(kid, alg)
	k.mu.Lock()
	old := time.Since(k.at) > k.refresh
	k.mu.Unlock()
	if err == nil && !old {
		return key, nil
	}
	if ferr := k.fetch(ctx); ferr != nil {
		k.log.Warn("the provider's keys cannot be fetched", zap.Error(ferr))
		if err == nil {
			return key, nil // what is known is good
		}
	}
	key, err = k.known(kid, alg)
	var r *Refusal
	if err != nil && !errors.As(err, &r) {
		return key, fmt.Errorf("oidc: the provider's keys are not known yet: %w", err)
	}
	return key, err
}

var errNoKeys = errors.New("they have not been fetched")

// known looks among the keys at hand. A JWT that names none may be signed by the only one.
func (k *keys) known(kid, alg string) (jose.JSONWebKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.at.IsZero() {
		return jose.JSONWebKey{}, errNoKeys
	}
	var found []jose.JSONWebKey
	for _, key := range k.set {
		if (kid == "" || key.KeyID == kid) && (key.Algorithm == "" || key.Algorithm == alg) && fits(key.Key, alg) {
			found = append(found, key)
		}
	}
	if len(found) != 1 {
		return jose.JSONWebKey{}, refuse("jwt_key", "the provider has %d keys for %s called %.60q, not one", len(found), alg, kid)
	}
	return found[0], nil
}

// fits keeps keys of one kind from being taken for another.
func fits(key any, alg string) bool {
	switch key.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(alg, "RS") || strings.HasPrefix(alg, "PS")
	case *ecdsa.PublicKey:
		return strings.HasPrefix(alg, "ES")
	case ed25519.PublicKey:
		return alg == string(jose.EdDSA)
	}
	return false
}

// fetch reads the keys, unless that was tried a moment ago.
func (k *keys) fetch(ctx context.Context) error {
	k.fetching.Lock()
	defer k.fetching.Unlock()
	k.mu.Lock()
	soon := !k.tried.IsZero() && time.Since(k.tried) < k.cooldown
	k.mu.Unlock()
	if soon {
		return nil
	}
	// The login that asks may be given up: the keys are for the next one, too.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), k.timeout)
	defer cancel()
	body, err := k.read(ctx)
	var set []jose.JSONWebKey
	if err == nil {
		set, err = usable(body)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tried = time.Now()
	if err != nil {
		return err
	}
	k.set, k.at = set, k.tried
	return nil
}

// usable reads a JWKS: the keys that can sign and are not secret. Others are passed over.
func usable(body []byte) ([]jose.JSONWebKey, error) {
	var doc struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		return nil, errors.New("the document is not a JWKS")
	}
	if len(doc.Keys) > maxKeys {
		return nil, fmt.Errorf("the document has %d keys, more than %d", len(doc.Keys), maxKeys)
	}
	var out []jose.JSONWebKey
	for _, raw := range doc.Keys {
		var key jose.JSONWebKey
		if json.Unmarshal(raw, &key) != nil || !key.Valid() || !key.IsPublic() || key.Use != "" && key.Use != "sig" {
			continue
		}
		if r, ok := key.Key.(*rsa.PublicKey); ok && r.N.BitLen() < minRSA {
			continue
		}
		out = append(out, key)
	}
	if len(out) == 0 {
		return nil, errors.New("the document has no public key that could have signed a JWT")
	}
	return out, nil
}

// source reads the JWKS from where the configuration says.
func source(cfg Config) func(context.Context) ([]byte, error) {
	switch {
	case cfg.JWKSFile != "":
		return func(context.Context) ([]byte, error) {
			f, err := os.Open(cfg.JWKSFile)
			if err != nil {
				return nil, err
			}
			defer func() { _ = f.Close() }()
			return limited(f)
		}
	case cfg.JWKSURL != "":
		return func(ctx context.Context) ([]byte, error) { return get(ctx, cfg.JWKSURL) }
	}
	return func(ctx context.Context) ([]byte, error) {
		body, err := get(ctx, strings.TrimSuffix(cfg.Issuer, "/")+"/.well-known/openid-configuration")
		if err != nil {
			return nil, err
		}
		var doc struct {
			Issuer string `json:"issuer"`
			JWKS   string `json:"jwks_uri"`
		}
		if err := json.Unmarshal(body, &doc); err != nil {
			return nil, errors.New("the discovery document is not JSON")
		}
		if doc.Issuer != cfg.Issuer {
			return nil, fmt.Errorf("the discovery document is of issuer %.200q, not of %q", doc.Issuer, cfg.Issuer)
		}
		if err := address(doc.JWKS); err != nil {
			return nil, fmt.Errorf("the discovery document's jwks_uri: %w", err)
		}
		return get(ctx, doc.JWKS)
	}
}

func get(ctx context.Context, address string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	r, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Body.Close() }()
	if r.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", address, r.Status)
	}
	return limited(r.Body)
}

func limited(r io.Reader) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err == nil && len(body) > maxDocument {
		err = fmt.Errorf("the document has more than %d bytes", maxDocument)
	}
	return body, err
}
