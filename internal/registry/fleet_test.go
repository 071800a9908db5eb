package registry_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
)

func TestEnrolmentTokens(t *testing.T) {
	r, pool := open(t)
	ctx := within(t)
	must(t, r.AddUser(ctx, "alice", "correct horse"))
	must(t, r.AddUser(ctx, "bob", "battery staple"))
	tokens := registry.EnrolTokens{Registry: r}
	want(t, "a password like a token", r.AddUser(ctx, "carol", "wst_correct horse"), registry.ErrPassword)

	_, _, err := r.NewToken(ctx, "nobody", "phone", "ops", time.Hour)
	want(t, "unknown user", err, registry.ErrUnknownUser)
	_, _, err = r.NewToken(ctx, "alice", "Phone", "ops", time.Hour)
	want(t, "device name", err, registry.ErrName)
	for _, life := range []time.Duration{0, -time.Hour, time.Second, 1000 * 24 * time.Hour} {
		_, _, err = r.NewToken(ctx, "alice", "phone", "ops", life)
		want(t, "life "+life.String(), err, registry.ErrTokenLife)
	}
	secret, made, err := r.NewToken(ctx, "alice", "phone", "ops", time.Hour)
	must(t, err)
	if !tokens.Mine(secret) || tokens.Mine("correct horse") || tokens.Only() != protocol.VerbRedeem || len(secret) != len(protocol.TokenPrefix)+43 {
		t.Fatal(secret)
	}
	var kept int
	must(t, pool.QueryRow(ctx, `SELECT count(*) FROM waystage.enrol_token t WHERE to_jsonb(t)::text LIKE '%' || $1 || '%'`, secret[len(protocol.TokenPrefix):]).Scan(&kept))
	if kept != 0 {
		t.Error("the token is stored")
	}

	// The login: only what is none of the device's is refused.
	must(t, tokens.Identify(ctx, "alice", "phone", secret))
	for _, login := range [][3]string{{"alice", "tablet", secret}, {"bob", "phone", secret}, {"alice", "phone", secret + "x"}, {"alice", "phone", "wst_"}} {
		want(t, strings.Join(login[:2], "/"), tokens.Identify(ctx, login[0], login[1], login[2]), registry.ErrTokenUnknown)
	}
	redeem := func(user, device, token, k string) error {
		return r.Redeem(ctx, user, device, protocol.Enrolment{Key: k, App: "nurse 1.0", Library: "lib 1", Token: token})
	}
	want(t, "another device", redeem("alice", "tablet", secret, key(t)), registry.ErrTokenUnknown)
	want(t, "another user", redeem("bob", "phone", secret, key(t)), registry.ErrTokenUnknown)
	want(t, "no key", redeem("alice", "phone", secret, "U"), registry.ErrKey)
	must(t, r.BlockDevice(ctx, "alice", "phone"))
	want(t, "blocked", redeem("alice", "phone", secret, key(t)), registry.ErrBlocked)
	must(t, r.UnblockDevice(ctx, "alice", "phone"))

	// Refusals have not used it up. Of many that race with keys of their own, one gets through.
	var wg sync.WaitGroup
	keys, errs := make([]string, 12), make([]error, 12)
	for i := range keys {
		keys[i] = key(t)
		wg.Go(func() { errs[i] = redeem("alice", "phone", secret, keys[i]) })
	}
	wg.Wait()
	winner := ""
	for i, err := range errs {
		switch {
		case err == nil && winner == "":
			winner = keys[i]
		case err == nil:
			t.Error("the token was good twice")
		default:
			want(t, "a loser", err, registry.ErrTokenUsed)
		}
	}
	u, d, err := r.Key(ctx, winner, "")
	if err != nil || u+"/"+d != "alice/phone" {
		t.Error(u, d, err)
	}
	must(t, redeem("alice", "phone", secret, winner)) // the answer was lost
	must(t, r.ResetDevice(ctx, "alice", "phone"))
	want(t, "again after a reset", redeem("alice", "phone", secret, winner), registry.ErrTokenUsed)
	want(t, "revoke what is used", r.RevokeToken(ctx, made.ID), registry.ErrTokenUsed)

	secret, made, err = r.NewToken(ctx, "alice", "phone", "ops", time.Hour)
	must(t, err)
	must(t, r.RevokeToken(ctx, made.ID))
	must(t, r.RevokeToken(ctx, made.ID))
	want(t, "revoked", redeem("alice", "phone", secret, key(t)), registry.ErrTokenRevoked)
	want(t, "revoke nothing", r.RevokeToken(ctx, 4711), registry.ErrTokenUnknown)
	must(t, tokens.Identify(ctx, "alice", "phone", secret)) // and is told so after the login
	secret, _, err = r.NewToken(ctx, "alice", "phone", "ops", time.Hour)
	must(t, err)
	_, err = pool.Exec(ctx, `UPDATE waystage.enrol_token SET expires_at = now() - interval '1 second' WHERE used_at IS NULL AND revoked_at IS NULL`)
	must(t, err)
	want(t, "expired", redeem("alice", "phone", secret, key(t)), registry.ErrTokenExpired)
	if _, _, err = r.NewToken(ctx, "bob", "phone", "ops", time.Hour); err != nil {
		t.Fatal(err)
	}
	must(t, r.RemoveDevice(ctx, "alice", "phone"))
	list, err := r.Tokens(ctx, "alice")
	must(t, err)
	var states []string
	for _, x := range list {
		states = append(states, x.State)
	}
	if got := strings.Join(states, " "); got != "revoked revoked used" { // the expired one went with its device
		t.Error(got)
	}
	if list, err = r.Tokens(ctx, ""); err != nil || len(list) != 4 || list[0].User != "bob" || list[0].State != "open" || list[0].CreatedBy != "ops" {
		t.Errorf("%+v %v", list, err)
	}
}

// A key changes in steps: after each of them the device can log in.
func TestKeysChange(t *testing.T) {
	r, _ := open(t)
	ctx := within(t)
	must(t, r.AddUser(ctx, "alice", "correct horse"))
	must(t, r.AddUser(ctx, "bob", "battery staple"))
	login := func(k string, target error) {
		t.Helper()
		_, _, err := r.Key(ctx, k, "server:7")
		want(t, "login", err, target)
	}
	k1, k2, k3 := key(t), key(t), key(t)
	want(t, "before the enrolment", r.Rotate(ctx, "alice", "phone", k2), registry.ErrNotEnrolled)
	must(t, r.Enrol(ctx, "alice", "phone", protocol.Enrolment{Key: k1}))
	want(t, "ask nobody", r.AskNewKey(ctx, "alice", "tablet"), registry.ErrUnknownDevice)
	must(t, r.AskNewKey(ctx, "alice", "phone"))
	must(t, r.Rotate(ctx, "alice", "phone", k2))
	login(k1, nil)                               // announced and not confirmed: the old one is good
	must(t, r.Rotate(ctx, "alice", "phone", k3)) // another attempt
	must(t, r.Rotate(ctx, "alice", "phone", k3))
	login(k2, registry.ErrCredentials)
	// Nobody else can take what is announced, or announce what somebody has.
	want(t, "an announced key", r.Enrol(ctx, "bob", "phone", protocol.Enrolment{Key: k3}), registry.ErrKeyInUse)
	must(t, r.Enrol(ctx, "bob", "phone", protocol.Enrolment{Key: k2}))
	want(t, "another's key", r.Rotate(ctx, "bob", "phone", k1), registry.ErrKeyInUse)
	want(t, "another's next key", r.Rotate(ctx, "bob", "phone", k3), registry.ErrKeyInUse)
	want(t, "no key", r.Rotate(ctx, "alice", "phone", "UX"), registry.ErrKey)
	must(t, r.BlockDevice(ctx, "alice", "phone"))
	login(k3, registry.ErrBlocked) // and does not take effect
	want(t, "blocked", r.Rotate(ctx, "alice", "phone", k3), registry.ErrBlocked)
	must(t, r.UnblockDevice(ctx, "alice", "phone"))
	if d, err := r.Device(ctx, "alice", "phone"); err != nil || d.NewKeyAsked == nil || d.NewKey != protocol.Fingerprint(k3) || d.Fingerprint != protocol.Fingerprint(k1) {
		t.Errorf("%+v %v", d, err)
	}

	heard := make(chan string, 10)
	run, stop := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() {
		_ = r.Watch(run, func(_ context.Context, user, device, except string) error {
			heard <- user + "/" + device + " but " + except
			return nil
		})
	})
	defer watching.Wait()
	defer stop()
	must(t, r.BlockDevice(ctx, "bob", "phone")) // told in any case, so the watch is there
	if got := <-heard; got != "bob/phone but " {
		t.Fatal(got)
	}
	var wg sync.WaitGroup
	for range 8 { // the first logins by the new key, all at once
		wg.Go(func() { login(k3, nil) })
	}
	wg.Wait()
	login(k1, registry.ErrCredentials)
	login(k3, nil)
	for deadline := time.After(patience); ; {
		select {
		case got := <-heard:
			if got == "bob/phone but " {
				continue // heard twice, from the list and by itself
			}
			if got != "alice/phone but server:7" {
				t.Error(got)
			}
		case <-deadline:
			t.Fatal("the other connections are not closed")
		}
		break
	}
	d, err := r.Device(ctx, "alice", "phone")
	if must(t, err); d.Fingerprint != protocol.Fingerprint(k3) || d.NewKey != "" || d.NewKeyAsked != nil || d.KeyAt == nil {
		t.Errorf("%+v", d)
	}
	must(t, r.Rotate(ctx, "alice", "phone", k3)) // told again: nothing to do
	login(k3, nil)
}

func TestResetAndRemove(t *testing.T) {
	r, pool := open(t)
	ctx := within(t)
	must(t, r.AddUser(ctx, "alice", "correct horse"))
	k := key(t)
	must(t, r.Enrol(ctx, "alice", "phone", protocol.Enrolment{Key: k, App: "v1", Library: "lib 1"}))
	must(t, r.ResetDevice(ctx, "alice", "phone"))
	if _, _, err := r.Key(ctx, k, ""); !errors.Is(err, registry.ErrCredentials) {
		t.Error(err)
	}
	want(t, "reset nothing", r.ResetDevice(ctx, "alice", "tablet"), registry.ErrUnknownDevice)
	must(t, r.Enrol(ctx, "alice", "phone", protocol.Enrolment{Key: k}))
	before, err := r.Device(ctx, "alice", "phone")
	if must(t, err); before.ResetAt == nil || before.EnrolledAt == nil {
		t.Errorf("%+v", before)
	}
	must(t, r.Refused(ctx, "alice", "phone", "credentials", "10.0.0.1"))
	must(t, r.Refused(ctx, "alice", "unknown", "credentials", "10.0.0.1"))
	must(t, r.Refused(ctx, "*", ">", "credentials", "10.0.0.1"))
	if d, err := r.Device(ctx, "alice", "phone"); err != nil || d.Refused == nil || d.Refused.Code != "credentials" || d.Refused.Host != "10.0.0.1" {
		t.Errorf("%+v %v", d, err)
	}
	// Another reason is told however soon it comes.
	for _, code := range []protocol.Code{protocol.CodeBlocked, protocol.CodeTokenUsed, "credentials"} {
		must(t, r.Refused(ctx, "alice", "phone", code, "10.0.0.2"))
		if d, err := r.Device(ctx, "alice", "phone"); err != nil || d.Refused.Code != code || d.Refused.Host != "10.0.0.2" {
			t.Errorf("%s: %+v %v", code, d.Refused, err)
		}
	}

	// A removed device is gone for everybody; enrolled again under its name it is the same for the ledger.
	must(t, r.RemoveDevice(ctx, "alice", "phone"))
	_, err = r.Device(ctx, "alice", "phone")
	want(t, "show", err, registry.ErrUnknownDevice)
	for what, err := range map[string]error{"rm": r.RemoveDevice(ctx, "alice", "phone"), "reset": r.ResetDevice(ctx, "alice", "phone"),
		"unblock": r.UnblockDevice(ctx, "alice", "phone"), "rotate": r.AskNewKey(ctx, "alice", "phone")} {
		want(t, what, err, registry.ErrUnknownDevice)
	}
	if u, err := r.User(ctx, "alice"); err != nil || u.Devices != 0 {
		t.Error(u, err)
	}
	must(t, r.Password(ctx, "alice", "phone", "correct horse"))
	if d, err := r.Device(ctx, "alice", "phone"); err != nil || d.ID != before.ID || d.Refused != nil || d.PublicKey != "" {
		t.Errorf("%+v %v", d, err)
	}

	// Filters.
	must(t, r.AddUser(ctx, "bob", "battery staple", "night"))
	must(t, r.Enrol(ctx, "bob", "old", protocol.Enrolment{Key: key(t), App: "v1"}))
	must(t, r.Enrol(ctx, "bob", "new", protocol.Enrolment{Key: key(t), App: "v2"}))
	_, err = pool.Exec(ctx, `UPDATE waystage.device SET last_sync_at = now() - CASE name WHEN 'old' THEN interval '8 days' ELSE interval '1 hour' END, forks = (name = 'new')::int WHERE user_name = 'bob'`)
	must(t, err)
	must(t, r.BlockDevice(ctx, "bob", "old"))
	for want, f := range map[string]registry.DeviceFilter{
		"alice/phone bob/new bob/old": {}, "bob/new bob/old": {User: "bob"}, "bob/old": {Blocked: true}, "bob/old bob/new": {Group: "night"},
		"bob/new": {App: "v2"}, "bob/old alice/phone": {StaleFor: 7 * 24 * time.Hour}, "alice/phone": {NotEnrolled: true}, " bob/new": {Forked: true},
		"": {User: "bob", App: "v3"},
	} {
		list, err := r.ListDevices(ctx, f)
		must(t, err)
		names := strings.Fields(want)
		for _, d := range list {
			if !strings.Contains(" "+want+" ", " "+d.User+"/"+d.Name+" ") {
				t.Errorf("%+v: %s/%s is there too", f, d.User, d.Name)
			}
		}
		if len(list) != len(names) {
			t.Errorf("%+v: %d devices", f, len(list))
		}
	}

	// A user with records that wait for the merge is blocked, and removed when they have been merged.
	_, err = pool.Exec(ctx, `INSERT INTO waystage.session (device_id, user_name, device_name, token, incarnation, n, hash, nonce, set_name, content_type, encoding, received_at, records)
		SELECT id, user_name, name, 'i-1', 'i', 1, '', '', 's', '', '', now(), 1 FROM waystage.device WHERE user_name = 'bob' AND name = 'new'`)
	must(t, err)
	done := make(chan error, 1)
	go func() { done <- r.RemoveUser(ctx, "bob") }()
	for {
		u, err := r.User(ctx, "bob")
		must(t, err)
		if u.Blocked {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	_, err = pool.Exec(ctx, `UPDATE waystage.session SET state = 'merged' WHERE token = 'i-1'`)
	must(t, err)
	must(t, <-done)
	_, err = r.User(ctx, "bob")
	want(t, "removed", err, registry.ErrUnknownUser)
}

func TestSignIn(t *testing.T) {
	r, _ := open(t)
	ctx := within(t)
	c := registry.UserChange{Groups: []string{"nurses"}, Set: map[string]string{"ward": "north"}, Unset: []string{"floor"}}
	want(t, "unknown", r.SignIn(ctx, "amina", "phone", c, false), registry.ErrUnknownUser)
	must(t, r.SignIn(ctx, "amina", "phone", c, true))
	u, err := r.User(ctx, "amina")
	if must(t, err); u.Password || u.Groups[0] != "nurses" || u.Attributes["ward"] != "north" || u.Devices != 1 {
		t.Errorf("%+v", u)
	}
	must(t, r.SignIn(ctx, "amina", "phone", registry.UserChange{Unset: []string{"ward"}}, false))
	u, err = r.User(ctx, "amina")
	if must(t, err); len(u.Attributes) != 0 || len(u.Groups) != 1 {
		t.Errorf("%+v", u)
	}
}
