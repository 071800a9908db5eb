package registry_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nkeys"
	"go.uber.org/zap/zaptest"

	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

func TestMain(m *testing.M) { pgtest.MainNoLeaks(m) }

const patience = 90 * time.Second

func open(t *testing.T) (*registry.Registry, *pgxpool.Pool) {
	t.Helper()
	ctx := within(t)
	dsn := pgtest.Mirror(t)
	if err := schema.MigrateMirror(ctx, dsn); err != nil {
		t.Fatal(err)
	}
	cfg, err := schema.Config(dsn, "registry test")
	if err != nil {
		t.Fatal(err)
	}
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return registry.New(pool, zaptest.NewLogger(t)), pool
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func want(t *testing.T, what string, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("%s: got %v, want %v", what, err, target)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func key(t *testing.T) string {
	t.Helper()
	kp, err := nkeys.CreateUser()
	must(t, err)
	public, err := kp.PublicKey()
	must(t, err)
	return public
}

func TestUsersAndPasswords(t *testing.T) {
	r, pool := open(t)
	ctx := within(t)
	must(t, r.AddUser(ctx, "alice", "correct horse", "nurses", "north"))
	must(t, r.AddUser(ctx, "bob", "battery staple"))
	want(t, "twice", r.AddUser(ctx, "alice", "something else"), registry.ErrUserExists)
	want(t, "short password", r.AddUser(ctx, "carol", "seven77"), registry.ErrPassword)
	want(t, "long password", r.AddUser(ctx, "carol", strings.Repeat("x", 1025)), registry.ErrPassword)
	want(t, "group name", r.AddUser(ctx, "carol", "correct horse", "No Good"), registry.ErrName)
	for _, name := range []string{"", "*", ">", "a.b", "a b", "A", "алиса", strings.Repeat("x", 65), "a/b", "a\x00", "a\n"} {
		want(t, fmt.Sprintf("user %q", name), r.AddUser(ctx, name, "correct horse"), registry.ErrName)
		want(t, fmt.Sprintf("device %q", name), r.Password(ctx, "alice", name, "correct horse"), registry.ErrName)
		_, err := r.EnsureDevice(ctx, "alice", name)
		want(t, fmt.Sprintf("device %q", name), err, registry.ErrName)
	}

	must(t, r.Password(ctx, "alice", "phone", "correct horse"))
	want(t, "wrong password", r.Password(ctx, "alice", "phone", "battery staple"), registry.ErrCredentials)
	want(t, "no password", r.Password(ctx, "alice", "phone", ""), registry.ErrCredentials)
	want(t, "endless password", r.Password(ctx, "alice", "phone", strings.Repeat("x", 1<<20)), registry.ErrCredentials)
	want(t, "unknown user", r.Password(ctx, "mallory", "phone", "correct horse"), registry.ErrCredentials)

	must(t, r.SetPassword(ctx, "alice", "new password"))
	want(t, "old password", r.Password(ctx, "alice", "phone", "correct horse"), registry.ErrCredentials)
	must(t, r.Password(ctx, "alice", "phone", "new password"))
	want(t, "password of nobody", r.SetPassword(ctx, "mallory", "new password"), registry.ErrUnknownUser)

	must(t, r.SetGroups(ctx, "bob", []string{"doctors"}))
	users, err := r.ListUsers(ctx, "")
	must(t, err)
	if len(users) != 2 || users[0].Name != "alice" || users[0].Devices != 1 || strings.Join(users[0].Groups, " ") != "nurses north" ||
		users[1].Devices != 0 || users[1].Groups[0] != "doctors" || users[1].CreatedAt.IsZero() {
		t.Errorf("%+v", users)
	}
	var phc string
	must(t, pool.QueryRow(ctx, `SELECT password_hash FROM waystage.app_user WHERE name = 'alice'`).Scan(&phc))
	if !strings.HasPrefix(phc, "$argon2id$v=19$m=19456,t=2,p=1$") || strings.Contains(phc, "password") {
		t.Error(phc)
	}
	// A damaged hash lets nobody in, and takes no memory.
	for _, bad := range []string{"", "x", strings.Replace(phc, "m=19456", "m=999999999", 1), strings.Replace(phc, "argon2id", "argon2i", 1), strings.Replace(phc, "t=2", "t=0", 1)} {
		_, err := pool.Exec(ctx, `UPDATE waystage.app_user SET password_hash = $1 WHERE name = 'alice'`, bad)
		must(t, err)
		if err := r.Password(ctx, "alice", "phone", "new password"); err == nil || errors.Is(err, registry.ErrCredentials) {
			t.Errorf("hash %q: %v", bad, err)
		}
	}
	must(t, r.RemoveUser(ctx, "alice"))
	want(t, "twice", r.RemoveUser(ctx, "alice"), registry.ErrUnknownUser)
	devices, err := r.ListDevices(ctx, registry.DeviceFilter{})
	if must(t, err); len(devices) != 0 {
		t.Error(devices)
	}
}

func TestDevicesAndKeys(t *testing.T) {
	r, _ := open(t)
	ctx := within(t)
	must(t, r.AddUser(ctx, "alice", "correct horse"))
	must(t, r.AddUser(ctx, "bob", "battery staple"))
	k1, k2 := key(t), key(t)
	must(t, r.Enrol(ctx, "alice", "phone", protocol.Enrolment{Key: k1, App: "nurse\x00 1.0"}))
	login := func(k, user, device string, target error) {
		t.Helper()
		u, d, err := r.Key(ctx, k, "")
		if !errors.Is(err, target) || u != user || d != device {
			t.Errorf("got %s/%s, %v; want %s/%s, %v", u, d, err, user, device, target)
		}
	}
	login(k1, "alice", "phone", nil)
	login(k2, "", "", registry.ErrCredentials)
	login("", "", "", registry.ErrCredentials)
	want(t, "same key again", r.Enrol(ctx, "alice", "phone", protocol.Enrolment{Key: k1, App: ""}), nil)
	want(t, "another's key", r.Enrol(ctx, "bob", "phone", protocol.Enrolment{Key: k1, App: ""}), registry.ErrKeyInUse)
	for _, k := range []string{"", "x", "A" + k1[1:], k1[:55], strings.ToLower(k1)} {
		want(t, "key "+k, r.Enrol(ctx, "alice", "phone", protocol.Enrolment{Key: k, App: ""}), registry.ErrKey)
	}
	want(t, "unknown user", r.Enrol(ctx, "mallory", "phone", protocol.Enrolment{Key: k2, App: ""}), registry.ErrUnknownUser)

	// Enrolled again elsewhere: the old key is out.
	must(t, r.Enrol(ctx, "alice", "phone", protocol.Enrolment{Key: k2, App: "nurse 2.0"}))
	login(k1, "", "", registry.ErrCredentials)
	login(k2, "alice", "phone", nil)

	must(t, r.BlockDevice(ctx, "alice", "phone"))
	login(k2, "", "", registry.ErrBlocked)
	want(t, "blocked device", r.Password(ctx, "alice", "phone", "correct horse"), registry.ErrBlocked)
	want(t, "blocked device, wrong password", r.Password(ctx, "alice", "phone", "battery staple"), registry.ErrCredentials)
	want(t, "enrolment of a blocked device", r.Enrol(ctx, "alice", "phone", protocol.Enrolment{Key: key(t), App: ""}), registry.ErrBlocked)
	must(t, r.Password(ctx, "alice", "tablet", "correct horse"))
	must(t, r.BlockDevice(ctx, "alice", "stolen-before-first-login"))
	want(t, "blocked before the first login", r.Password(ctx, "alice", "stolen-before-first-login", "correct horse"), registry.ErrBlocked)
	must(t, r.UnblockDevice(ctx, "alice", "phone"))
	login(k2, "alice", "phone", nil)

	must(t, r.BlockUser(ctx, "alice"))
	login(k2, "", "", registry.ErrBlocked)
	want(t, "blocked user", r.Password(ctx, "alice", "tablet", "correct horse"), registry.ErrBlocked)
	must(t, r.UnblockUser(ctx, "alice"))
	login(k2, "alice", "phone", nil)

	devices, err := r.ListDevices(ctx, registry.DeviceFilter{User: "alice"})
	must(t, err)
	if len(devices) != 3 || devices[0].Name != "phone" || devices[0].PublicKey != k2 || devices[0].App != "nurse 2.0" || devices[0].EnrolledAt == nil ||
		devices[0].LastSeenAt == nil || !devices[1].Blocked || devices[2].PublicKey != "" {
		t.Errorf("%+v", devices)
	}
	must(t, r.RemoveDevice(ctx, "alice", "phone"))
	login(k2, "", "", registry.ErrCredentials)
	for what, err := range map[string]error{
		"remove": r.RemoveDevice(ctx, "alice", "phone"), "unblock": r.UnblockDevice(ctx, "alice", "phone"),
	} {
		want(t, what, err, registry.ErrUnknownDevice)
	}
	for what, err := range map[string]error{
		"block": r.BlockUser(ctx, "mallory"), "unblock": r.UnblockUser(ctx, "mallory"), "block device": r.BlockDevice(ctx, "mallory", "phone"),
		"groups": r.SetGroups(ctx, "mallory", nil),
	} {
		want(t, what, err, registry.ErrUnknownUser)
	}
	if code := registry.ErrBlocked.ErrorCode(); code != protocol.CodeBlocked {
		t.Error(code)
	}
}

func TestNoEndOfDevices(t *testing.T) {
	r, pool := open(t)
	ctx := within(t)
	must(t, r.AddUser(ctx, "alice", "correct horse"))
	_, err := pool.Exec(ctx, `INSERT INTO waystage.device (user_name, name) SELECT 'alice', 'd' || i FROM generate_series(2, $1) i`, registry.MaxDevices)
	must(t, err)
	first, err := r.EnsureDevice(ctx, "alice", "last")
	must(t, err)
	again, err := r.EnsureDevice(ctx, "alice", "last")
	if must(t, err); first != again || first == 0 {
		t.Error(first, again)
	}
	_, err = r.EnsureDevice(ctx, "alice", "one-more")
	want(t, "one more", err, registry.ErrTooMany)
	want(t, "one more", r.Password(ctx, "alice", "one-more", "correct horse"), registry.ErrTooMany)
}

// A flood of logins must not take more memory than there are cores, and each must be answered.
func TestManyLoginsAtOnce(t *testing.T) {
	r, _ := open(t)
	ctx := within(t)
	must(t, r.AddUser(ctx, "alice", "correct horse"))
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			pass, target := "correct horse", error(nil)
			if i%2 == 1 {
				pass, target = "wrong horse", registry.ErrCredentials
			}
			want(t, pass, r.Password(ctx, "alice", "phone", pass), target)
		})
	}
	wg.Wait()
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if err := r.Password(gone, "alice", "phone", "correct horse"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestWatchHearsOfBlocks(t *testing.T) {
	r, pool := open(t)
	ctx := within(t)
	must(t, r.AddUser(ctx, "alice", "correct horse"))
	must(t, r.AddUser(ctx, "bob", "battery staple"))
	must(t, r.BlockDevice(ctx, "bob", "old")) // before anybody listens

	heard := make(chan string, 100)
	run, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := r.Watch(run, func(_ context.Context, user, device, _ string) error {
			heard <- user + "/" + device
			return errors.New("cannot reach the broker") // logged, no more
		}); err != nil {
			t.Error(err)
		}
	})
	defer wg.Wait()
	defer stop()
	hear := func(who string) {
		t.Helper()
		deadline := time.After(patience)
		for {
			select {
			case got := <-heard:
				if got == who {
					return
				}
			case <-deadline:
				t.Fatalf("did not hear of %s", who)
			}
		}
	}
	hear("bob/old")
	must(t, r.BlockDevice(ctx, "alice", "phone"))
	hear("alice/phone")
	must(t, r.BlockUser(ctx, "alice"))
	hear("alice/")
	must(t, r.RemoveDevice(ctx, "bob", "old"))
	hear("bob/old")

	// The connection is lost: who was blocked meanwhile is named.
	// (All other connections to this database: what the backend that just notified waits for is not yet told.)
	_, err := pool.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`)
	must(t, err)
	hear("alice/")
	must(t, r.RemoveUser(ctx, "bob"))
	hear("bob/")
}
