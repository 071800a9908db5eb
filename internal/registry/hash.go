package registry

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/crypto/argon2"

	"github.com/waystage/waystage/protocol"
)

// Cost of one hash: 19 MiB and two passes are OWASP's first choice for argon2id. Logins by password are rare (enrolment).
const (
	memoryKiB = 19 * 1024
	passes    = 2
	lanes     = 1
	saltSize  = 16
	keySize   = 32

	minPassword, maxPassword = 8, 1024 // bytes
)

// hasher makes and checks argon2id hashes, no more at a time than there are cores: more would not be faster and
// each takes 19 MiB.
type hasher struct {
	slots chan struct{}
	decoy func() string // the hash of a password that nobody knows
}

func newHasher() *hasher {
	return &hasher{
		slots: make(chan struct{}, runtime.GOMAXPROCS(0)),
		decoy: sync.OnceValue(func() string {
			salt, key := make([]byte, saltSize), make([]byte, keySize)
			rand.Read(salt)
			rand.Read(key)
			return phc(memoryKiB, passes, lanes, salt, key)
		}),
	}
}

// make hashes a password as a PHC string.
func (h *hasher) make(ctx context.Context, password string) (string, error) {
	if len(password) < minPassword || len(password) > maxPassword || strings.HasPrefix(password, protocol.TokenPrefix) {
		return "", ErrPassword
	}
	salt := make([]byte, saltSize)
	rand.Read(salt)
	key, err := h.derive(ctx, password, salt, memoryKiB, passes, lanes, keySize)
	if err != nil {
		return "", err
	}
	return phc(memoryKiB, passes, lanes, salt, key), nil
}

// verify reports whether the password is the one that was hashed.
func (h *hasher) verify(ctx context.Context, hash, password string) (bool, error) {
	if len(password) > maxPassword {
		return false, nil
	}
	p, err := parsePHC(hash)
	if err != nil {
		return false, err
	}
	key, err := h.derive(ctx, password, p.salt, p.memory, p.passes, p.lanes, uint32(len(p.key)))
	if err != nil {
		return false, err
	}
	return subtle.ConstantTimeCompare(key, p.key) == 1, nil
}

func (h *hasher) derive(ctx context.Context, password string, salt []byte, memory, passes uint32, lanes uint8, size uint32) ([]byte, error) {
	select {
	case h.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting to hash a password: %w", ctx.Err())
	}
	defer func() { <-h.slots }()
	return argon2.IDKey([]byte(password), salt, passes, memory, lanes, size), nil
}

func phc(memory, passes uint32, lanes uint8, salt, key []byte) string {
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, memory, passes, lanes,
		base64.RawStdEncoding.EncodeToString(salt), base64.RawStdEncoding.EncodeToString(key))
}

type phcHash struct {
	memory, passes uint32
	lanes          uint8
	salt, key      []byte
}

var errHash = errors.New("stored password hash is not an argon2id PHC string with sensible costs: set the password again")

// parsePHC reads a stored hash. The bounds keep a damaged row from taking the server's memory.
func parsePHC(s string) (phcHash, error) {
	var p phcHash
	var version int
	parts := strings.Split(s, "$")
	if len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" {
		return p, errHash
	}
	if n, err := fmt.Sscanf(parts[2], "v=%d", &version); n != 1 || err != nil || version != argon2.Version {
		return p, errHash
	}
	if n, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &p.memory, &p.passes, &p.lanes); n != 3 || err != nil {
		return p, errHash
	}
	var err1, err2 error
	p.salt, err1 = base64.RawStdEncoding.DecodeString(parts[4])
	p.key, err2 = base64.RawStdEncoding.DecodeString(parts[5])
	if err1 != nil || err2 != nil || len(p.salt) < 8 || len(p.key) < 16 || len(p.key) > 128 ||
		p.memory < 8 || p.memory > 1<<20 || p.passes < 1 || p.passes > 64 || p.lanes < 1 || p.lanes > 64 {
		return p, errHash
	}
	return p, nil
}
