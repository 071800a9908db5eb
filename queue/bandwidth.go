package queue

import (
	"context"
	"math"
	"time"

	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// bandLife is how long what was heard of a user's bandwidth is taken for true.
const bandLife = 30 * time.Second

// debt is what a device has sent and received beyond its bandwidth: it shrinks with time, and while it is more than a second's
// worth the device waits. So a page or part is never cut, however slow the device is to be.
type debt struct {
	bytes float64
	at    time.Time
}

// bandwidth is what is known of a user's.
type bandwidth struct {
	perSecond int64 // 0: no limit
	known     bool
	asked     time.Time
}

// slowed refuses a call of a device that has had more than its bandwidth.
func (s *shift) slowed(c *call) bool {
	if s.cfg.Bandwidth == nil {
		return false
	}
	wait, ask := s.rates.owed(c.user, c.device)
	if ask {
		s.work.run(func() {
			ctx, cancel := context.WithTimeout(s.ctx, 5*time.Second)
			defer cancel()
			n, err := s.cfg.Bandwidth(ctx, c.user)
			if err != nil {
				if ctx.Err() == nil {
					s.log.Warn("the bandwidth of a user cannot be looked up; what it was holds", zap.String("user", c.user), zap.Error(err))
				}
				return
			}
			s.rates.limit(c.user, n)
		})
	}
	if wait > 0 {
		c.refuse(protocol.CodeBusy, wait, "this device has had the bandwidth of its group: go on in %d s", wait)
	}
	return wait > 0
}

// mayPut counts n bytes that a device sends, or refuses its call.
func (s *shift) mayPut(c *call, n int) bool {
	if wait := s.rates.bytes(c.user, c.device, n); wait > 0 {
		c.refuse(protocol.CodeBusy, wait, "this device sends too much at once: go on in %d s", wait)
		return false
	}
	if s.slowed(c) {
		return false
	}
	s.rates.spend(c.user, c.device, n)
	return true
}

// owed is after how many seconds the device may go on, and whether the user's bandwidth should be asked for.
func (r *rates) owed(user, device string) (wait int, ask bool) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.get(user, userShare, now)
	if ask = now.Sub(all.band.asked) > bandLife; ask {
		all.band.asked = now
	}
	if limit := float64(all.band.perSecond); limit > 0 {
		if over := r.get(user+"/"+device, 1, now).debt.left(limit, now) - limit; over > 0 {
			wait = int(math.Ceil(over / limit))
		}
	}
	return wait, ask
}

// spend counts n bytes that the device has sent or received. Before anything is known of its bandwidth they count, too.
func (r *rates) spend(user, device string, n int) {
	if r.cfg.Bandwidth == nil {
		return
	}
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	all, one := r.get(user, userShare, now), r.get(user+"/"+device, 1, now)
	if one.debt.bytes, one.debt.at = one.debt.left(float64(all.band.perSecond), now)+float64(n), now; all.band.known && all.band.perSecond == 0 {
		one.debt.bytes = 0
	}
}

func (r *rates) limit(user string, perSecond int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	band := &r.get(user, userShare, time.Now()).band
	band.perSecond, band.known = perSecond, true
}

func (d *debt) left(perSecond float64, now time.Time) float64 {
	return max(0, d.bytes-perSecond*now.Sub(d.at).Seconds())
}
