package queue

import (
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// rates limits what each device may ask of one gateway process, so that one device in a loop does not take the others' turn.
type rates struct {
	cfg GatewayConfig

	mu    sync.Mutex
	of    map[string]*deviceRate
	swept time.Time
}

type deviceRate struct {
	calls, bytes *rate.Limiter
	used         time.Time
}

// idleRate is how long a device's limiters are kept: by then they are full again.
const idleRate = 2 * time.Minute

func newRates(cfg GatewayConfig) *rates { return &rates{cfg: cfg, of: map[string]*deviceRate{}} }

func (r *rates) get(user, device string, now time.Time) *deviceRate {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.swept) > idleRate {
		r.swept = now
		for k, d := range r.of {
			if now.Sub(d.used) > idleRate {
				delete(r.of, k)
			}
		}
	}
	key := user + "/" + device
	d := r.of[key]
	if d == nil {
		d = &deviceRate{
			calls: rate.NewLimiter(rate.Limit(r.cfg.CallsPerSec), r.cfg.CallBurst),
			bytes: rate.NewLimiter(rate.Limit(r.cfg.BytesPerSec), r.cfg.BytesBurst),
		}
		r.of[key] = d
	}
	d.used = now
	return d
}

// call reports whether the device may make a call now.
func (r *rates) call(user, device string) bool {
	now := time.Now()
	return r.get(user, device, now).calls.AllowN(now, 1)
}

// bytes reports after how many seconds the device may put n bytes; 0: now, and they are counted.
func (r *rates) bytes(user, device string, n int) int {
	now := time.Now()
	l := r.get(user, device, now).bytes
	if l.AllowN(now, n) {
		return 0
	}
	missing := float64(n) - l.TokensAt(now)
	return max(1, int(math.Ceil(missing/float64(l.Limit()))))
}
