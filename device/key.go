package device

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nkeys"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// Library is how this package names itself to the server.
const Library = "waystage-go/" + libraryVersion

const libraryVersion = "0.1"

// A device's key changes in steps, each durable before the next: the new key is stored beside the old one, announced at the
// server, and logged in with; only that makes the server forget the old one, and then the file does. A file that stopped in
// between has two keys, of which the server takes at least one: the next connection finds out which, and goes on.

// pendingKey is the key that is to take the place of the file's: the one that an earlier attempt has stored, or a fresh one, stored
// before anybody hears of it.
func (d *Device) pendingKey(ctx context.Context) (seed []byte, public string, err error) {
	err = d.write(ctx, func(t *txn) error {
		st, err := t.state()
		if err != nil {
			return err
		}
		seed = st.NextSeed
		if len(seed) == 0 {
			kp, err := nkeys.CreateUser()
			if err != nil {
				return err
			}
			if seed, err = kp.Seed(); err != nil {
				return err
			}
			if err := t.exec(`UPDATE _ws_state SET next_seed = ?`, seed); err != nil {
				return err
			}
		}
		public, err = publicKey(seed)
		return err
	})
	return seed, public, err
}

func publicKey(seed []byte) (string, error) {
	kp, err := nkeys.FromSeed(seed)
	if err != nil {
		return "", fmt.Errorf("the stored key is damaged: %w; enrol again", err)
	}
	return kp.PublicKey()
}

// takeKey makes the pending key the file's only one.
func (t *txn) takeKey(seed []byte) error {
	return t.exec(`UPDATE _ws_state SET seed = ?, next_seed = NULL, key_at = ?, new_key = 0`, seed, now())
}

// connect logs in: with the file's key, or, if the server does not know it any more, with the one that was to take its place.
func (d *Device) connect(ctx context.Context, st state) (Transport, error) {
	login, err := st.login()
	if err != nil {
		return nil, err
	}
	tr, err := d.opts.Dial(ctx, login)
	if err == nil || len(st.NextSeed) == 0 || !errors.Is(err, ErrLogin) {
		return tr, err
	}
	login.Seed = st.NextSeed
	tr, nerr := d.opts.Dial(ctx, login)
	if errors.Is(nerr, ErrLogin) {
		return nil, err
	} else if nerr != nil {
		return nil, nerr
	}
	if err := d.write(ctx, func(t *txn) error { return t.takeKey(st.NextSeed) }); err != nil {
		_ = tr.Close()
		return nil, err
	}
	return tr, nil
}

// Rotate gives the device another key. The present one is good until the device has logged in with the new one; after that
// it is refused everywhere. Broken off anywhere, the device can log in, and the next Sync or Rotate brings it to its end.
func (d *Device) Rotate(ctx context.Context) error {
	if !d.syncing.TryLock() {
		return fmt.Errorf("device: %w", ErrSyncing)
	}
	defer d.syncing.Unlock()
	st, err := d.state(ctx)
	if err != nil {
		return err
	}
	tr, err := d.connect(ctx, st)
	if err != nil {
		return err
	}
	defer func() { _ = tr.Close() }()
	return d.rotate(ctx, tr)
}

// rotate announces the pending key over a connection, and logs in with it.
func (d *Device) rotate(ctx context.Context, tr Transport) error {
	seed, public, err := d.pendingKey(ctx)
	if err != nil {
		return err
	}
	if err := tr.Rotate(ctx, protocol.Rotation{Key: public}); err != nil {
		return explain("change of key", err)
	}
	st, err := d.state(ctx)
	if err != nil {
		return err
	}
	login, err := st.login()
	if err != nil {
		return err
	}
	login.Seed = seed
	fresh, err := d.opts.Dial(ctx, login)
	if err != nil {
		return fmt.Errorf("device: the new key is not confirmed yet, the old one may be good: %w", err)
	}
	defer func() { _ = fresh.Close() }()
	return d.write(ctx, func(t *txn) error { return t.takeKey(seed) })
}

// RotateEvery has each Sync give the device another key when the present one is as old. 0: never. It is noted in the file.
func (d *Device) RotateEvery(ctx context.Context, age time.Duration) error {
	if age < 0 {
		return fmt.Errorf("device: a key cannot be %s old", age)
	}
	return d.write(ctx, func(t *txn) error { return t.exec(`UPDATE _ws_state SET key_life = ?`, age.Milliseconds()) })
}

// renew changes the key at the end of a sync if the operator wants it, if it is old, or if an earlier change was broken off.
// The sync is complete without it: what goes wrong is told in the report, and tried again with the next one.
func (d *Device) renew(ctx context.Context, tr Transport, rep *Report) error {
	st, err := d.state(ctx)
	if err != nil || !st.keyDue(time.Now()) {
		return err
	}
	if err := d.rotate(ctx, tr); err != nil {
		if ctx.Err() != nil {
			return err
		}
		rep.KeyProblem = err.Error()
		d.log.Warn("the key was not changed; the next sync tries again", zap.Error(err))
		return nil
	}
	rep.NewKey = true
	return nil
}

func (s *state) keyDue(now time.Time) bool {
	return s.NewKey || len(s.NextSeed) > 0 || s.KeyLife > 0 && now.UnixMilli()-s.KeyAt >= s.KeyLife
}

// EnrolOptions say who enrols where, and what proves it: one of Password, Token and JWT. None of them is stored.
type EnrolOptions struct {
	Servers  []string // NATS addresses, e.g. "tls://sync.example.org:4222"
	User     string
	Device   string
	Password string // of the user
	Token    string // enrolment token for this very device; used up by it
	JWT      string // of the company's identity provider
}

// secret is what the connection is made with.
func (o *EnrolOptions) secret() (Login, error) {
	l := Login{Servers: o.Servers, User: o.User, Device: o.Device, Password: o.Password}
	given := 0
	for _, s := range []string{o.Password, o.Token, o.JWT} {
		if len(s) > protocol.MaxSecret {
			return l, fmt.Errorf("device: the password, token or JWT has %d bytes, more than %d", len(s), protocol.MaxSecret)
		}
		if s != "" {
			given++
		}
	}
	if given > 1 {
		return l, fmt.Errorf("device: want one of password, token and JWT")
	}
	l.EnrolOnly = o.Token + o.JWT
	return l, nil
}

// Enrol makes the file the given device of the given user: it logs in with password, token or JWT, registers a key made
// here, and stores the key. A file that is enrolled can be enrolled again as the same device (a new key, other addresses),
// not as another. Broken off anywhere it can be done again with the same token: the key was stored before.
func (d *Device) Enrol(ctx context.Context, o EnrolOptions) error {
	for what, name := range map[string]string{"user": o.User, "device": o.Device} {
		if !protocol.ValidName(name) {
			return fmt.Errorf("device: the %s name %q is not [a-z0-9_-]{1,64}", what, name)
		}
	}
	login, err := o.secret()
	if err != nil {
		return err
	}
	st, err := d.state(ctx)
	if err != nil {
		return err
	}
	if st.User != "" && (st.User != o.User || st.Device != o.Device) {
		return fmt.Errorf("device: this file belongs to %s/%s: use a new file for %s/%s", st.User, st.Device, o.User, o.Device)
	}
	seed, public, err := d.pendingKey(ctx)
	if err != nil {
		return err
	}
	tr, err := d.opts.Dial(ctx, login)
	if err != nil {
		return err
	}
	defer func() { _ = tr.Close() }()
	en, err := tr.Enrol(ctx, protocol.Enrolment{Key: public, App: d.opts.App, Library: Library, Token: o.Token})
	if err != nil {
		return explain("enrolment", err)
	}
	if en.User != o.User || en.Device != o.Device {
		return fmt.Errorf("device: %w: enrolled %s/%s, not %s/%s", ErrReply, en.User, en.Device, o.User, o.Device)
	}
	servers, err := json.Marshal(o.Servers)
	if err != nil {
		return fmt.Errorf("device: %w", err)
	}
	return d.write(ctx, func(t *txn) error {
		if err := t.exec(`UPDATE _ws_state SET user = ?, device = ?, servers = ?`, o.User, o.Device, string(servers)); err != nil {
			return err
		}
		if err := t.takeKey(seed); err != nil {
			return err
		}
		c, err := t.load()
		if err != nil {
			return err
		}
		return t.adopt(c, en.Sets, 0)
	})
}
