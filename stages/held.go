package stages

import (
	"errors"
	"sync"
	"time"
)

// held are the sessions and sets that failed by themselves and are left alone for a while, so that they stop no other.
type held struct {
	mu       sync.Mutex
	sessions map[int64]time.Time
	sets     map[string]time.Time
	careful  int // batches that still take one session only, to find the one that fails
}

func newHeld() *held { return &held{sessions: map[int64]time.Time{}, sets: map[string]time.Time{}} }

// now returns what is held, and whether to take one session only.
func (h *held) now() (sessions []int64, sets []string, one bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	sessions, sets = []int64{}, []string{}
	now := time.Now()
	for id, until := range h.sessions {
		if now.After(until) {
			delete(h.sessions, id)
			continue
		}
		sessions = append(sessions, id)
	}
	for set, until := range h.sets {
		if now.After(until) {
			delete(h.sets, set)
			continue
		}
		sets = append(sets, set)
	}
	one = h.careful > 0
	if one {
		h.careful--
	}
	return sessions, sets, one
}

// fail notes that these sessions failed together. A failure of the database's, that has nothing to do with them, holds
// nobody.
func (h *held) fail(err error, ids []int64, hold time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var set *setError
	var one *sessionError
	switch {
	case errors.As(err, &set):
		h.sets[set.set] = time.Now().Add(hold)
	case errors.As(err, &one):
		h.sessions[one.session] = time.Now().Add(hold)
	case transient(err) || len(ids) == 0:
	case len(ids) == 1:
		h.sessions[ids[0]] = time.Now().Add(hold)
	default:
		h.careful = max(h.careful, len(ids))
	}
}
