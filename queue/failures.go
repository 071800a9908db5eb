package queue

import (
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/waystage/waystage/protocol"
)

// Refused logins of one host in one user's name: so many at once, and so many a second on average. Only what failed counts: a
// fleet that enrols from behind one address is not slowed down.
const (
	failuresAtOnce = 20
	failuresPerSec = 0.5
	failuresKept   = 10_000 // pairs of host and user; with more of them, half is forgotten
)

// failures slows down whoever guesses passwords and tokens. It is of one process.
type failures struct {
	mu sync.Mutex
	of map[string]*failed
}

type failed struct {
	left *rate.Limiter
	at   time.Time
}

func newFailures() *failures { return &failures{of: map[string]*failed{}} }

// may tells whether a login may be looked at.
func (f *failures) may(host, user string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	one := f.of[host+" "+user]
	return one == nil || one.left.TokensAt(time.Now()) >= 1
}

// note counts a refused login.
func (f *failures) note(host, user string) {
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.of) >= failuresKept {
		f.forget(now)
	}
	one := f.of[host+" "+user]
	if one == nil {
		one = &failed{left: rate.NewLimiter(failuresPerSec, failuresAtOnce)}
		f.of[host+" "+user] = one
	}
	one.at = now
	one.left.AllowN(now, 1)
}

// forget drops those that would be full again, and if these are few any half.
func (f *failures) forget(now time.Time) {
	for k, one := range f.of {
		if one.left.TokensAt(now) >= failuresAtOnce {
			delete(f.of, k)
		}
	}
	for k := range f.of {
		if len(f.of) <= failuresKept/2 {
			return
		}
		delete(f.of, k)
	}
}

// errTooMany refuses a login without a look at it.
type errTooMany struct{}

func (errTooMany) Error() string {
	return "too many refused logins in this user's name from this host: it is looked at again in some seconds"
}
func (errTooMany) ErrorCode() protocol.Code { return "too_many_logins" }
