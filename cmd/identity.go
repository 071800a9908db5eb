package cmd

import (
	"context"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/waystage/waystage/internal/oidc"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/queue"
)

// identityProviders are the ways in for a device that has no key yet, in the order in which they are asked. The first that takes a
// secret for its own decides. Another one is a type with the methods of queue.Provider, and a line here.
func identityProviders(c Config, users *registry.Registry, log *zap.Logger) ([]queue.Provider, error) {
	list := []queue.Provider{registry.EnrolTokens{Registry: users}}
	if c.Identity.OIDC.Issuer != "" {
		conf, _, err := c.Identity.OIDC.config()
		if err != nil {
			return nil, err
		}
		p, err := oidc.New(conf, signIn(users), log)
		if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	if c.Identity.Passwords {
		list = append(list, registry.Passwords{Registry: users})
	}
	return list, nil
}

// signIn is the registry as package oidc sees it.
func signIn(users *registry.Registry) oidc.SignIn {
	return func(ctx context.Context, user, device string, groups []string, set map[string]string, unset []string, create bool) error {
		return users.SignIn(ctx, user, device, registry.UserChange{Groups: groups, Set: set, Unset: unset}, create)
	}
}

// config reads the pairs; an error is that of the key.
func (o *OIDC) config() (c oidc.Config, key string, err error) {
	c = oidc.Config{Issuer: o.Issuer, Audience: o.Audience, JWKSURL: o.JWKSURL, JWKSFile: o.JWKSFile, UserClaim: o.UserClaim, UserSuffix: o.UserSuffix,
		GroupsClaim: o.GroupsClaim, Algorithms: o.Algorithms, Skew: time.Duration(o.ClockSkew), AutoCreate: o.AutoCreate}
	if c.Groups, err = pairs(o.Groups, strings.LastIndexByte); err != nil {
		return c, "groups", err
	}
	if c.Attributes, err = pairs(o.Attributes, strings.IndexByte); err != nil {
		return c, "attributes", err
	}
	return c, "", nil
}

// pairs reads A=B, cut where at says.
func pairs(list []string, at func(string, byte) int) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range list {
		i := at(s, '=')
		if i < 1 {
			return nil, fmt.Errorf("want A=B, not %q", s)
		}
		if _, double := out[s[:i]]; double {
			return nil, fmt.Errorf("%q is there twice", s[:i])
		}
		out[s[:i]] = s[i+1:]
	}
	return out, nil
}
