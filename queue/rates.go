package queue

import (
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// userShare is how many devices' worth of calls and bytes all devices of one user may have together.
const userShare = 4

// rates limits what each device, and each user with all devices, may ask of one gateway process, so that one device or user
// in a loop does not take the others' turn.
type rates struct {
	cfg GatewayConfig

	mu    sync.Mutex
	of    map[string]*allowance // by "user" and by "user/device"
	swept time.Time
}

// allowance is what one device or user may still have.
type allowance struct {
	calls, bytes *rate.Limiter
	debt         debt      // of a device
	band         bandwidth // of a user
	used         time.Time
}

// slowest is a bandwidth at which nobody's debt is forgotten too early, in bytes per second.
const slowest = 8 << 10

// idleRate is how long an allowance is kept: by then it is full again.
const idleRate = 2 * time.Minute

func newRates(cfg GatewayConfig) *rates { return &rates{cfg: cfg, of: map[string]*allowance{}} }

// get finds an allowance; share is how many devices' worth it is.
func (r *rates) get(key string, share int, now time.Time) *allowance {
	a := r.of[key]
	if a == nil {
		s := rate.Limit(share)
		a = &allowance{
			calls: rate.NewLimiter(s*rate.Limit(r.cfg.CallsPerSec), share*r.cfg.CallBurst),
			bytes: rate.NewLimiter(s*rate.Limit(r.cfg.BytesPerSec), share*r.cfg.BytesBurst),
		}
		r.of[key] = a
	}
	a.used = now
	return a
}

// take takes n of both the device's and its user's allowance, or of neither; then it returns after how many seconds it may succeed.
func (r *rates) take(user, device string, n int, of func(*allowance) *rate.Limiter) int {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.swept) > idleRate {
		r.swept = now
		for k, a := range r.of {
			if now.Sub(a.used) > idleRate && a.debt.left(slowest, now) == 0 {
				delete(r.of, k)
			}
		}
	}
	one, all := of(r.get(user+"/"+device, 1, now)), of(r.get(user, userShare, now))
	wait := 0
	for _, l := range []*rate.Limiter{one, all} {
		if missing := float64(n) - l.TokensAt(now); missing > 0 {
			wait = max(wait, 1, int(math.Ceil(missing/float64(l.Limit()))))
		}
	}
	if wait == 0 {
		one.AllowN(now, n)
		all.AllowN(now, n)
	}
	return wait
}

// call reports whether the device may make a call now.
func (r *rates) call(user, device string) bool {
	return r.take(user, device, 1, func(a *allowance) *rate.Limiter { return a.calls }) == 0
}

// bytes reports after how many seconds the device may put n bytes; 0: now, and they are counted.
func (r *rates) bytes(user, device string, n int) int {
	return r.take(user, device, n, func(a *allowance) *rate.Limiter { return a.bytes })
}
