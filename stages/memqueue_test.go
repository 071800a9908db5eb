package stages

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"
)

// memQueue is both queues in memory.
type memQueue struct {
	mu    sync.Mutex
	parts []*memPart
	pages map[string]memPage
	dead  []string
	ready []string
	fail  func(op, subject string) error // of a call, before it has had its effect
}

type memPart struct {
	Part
	taken bool
	gone  bool
	at    time.Time // not before
	q     *memQueue
}

type memPage struct {
	contentType, encoding string
	body                  []byte
}

func newMemQueue() *memQueue { return &memQueue{pages: map[string]memPage{}} }

func (q *memQueue) put(user, device, session string, i, k int, contentType, encoding string, data []byte) {
	q.putAt(time.Now(), user, device, session, i, k, contentType, encoding, data)
}

func (q *memQueue) putAt(at time.Time, user, device, session string, i, k int, contentType, encoding string, data []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	p := &memPart{q: q, Part: Part{User: user, Device: device, Session: session, Index: i, Total: k, ContentType: contentType,
		Encoding: encoding, Data: data, ReceivedAt: at}}
	p.Delivery = p
	q.parts = append(q.parts, p)
}

func (q *memQueue) failing(op, subject string) error {
	if q.fail != nil {
		return q.fail(op, subject)
	}
	return nil
}

func (q *memQueue) Fetch(ctx context.Context, limit int, wait time.Duration) ([]*Part, error) {
	for end := time.Now().Add(wait); ; {
		q.mu.Lock()
		var out []*Part
		for _, p := range q.parts {
			if !p.taken && !p.gone && time.Now().After(p.at) && len(out) < limit {
				p.taken = true
				p.Deliveries++
				c := p.Part
				out = append(out, &c)
			}
		}
		q.mu.Unlock()
		if len(out) > 0 || time.Now().After(end) {
			return out, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

func (q *memQueue) AckAll(_ context.Context, parts []*Part) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.failing("ack", ""); err != nil {
		return err
	}
	for _, p := range parts {
		p.Delivery.(*memPart).gone = true
	}
	q.parts = slices.DeleteFunc(q.parts, func(p *memPart) bool { return p.gone })
	return nil
}

func (p *memPart) Series(context.Context) ([]*Part, int, error) {
	p.q.mu.Lock()
	defer p.q.mu.Unlock()
	all := make([]*Part, p.Total)
	for _, o := range p.q.parts {
		if o.User == p.User && o.Device == p.Device && o.Session == p.Session && o.Total == p.Total && !o.gone {
			c := o.Part
			all[o.Index-1] = &c
		}
	}
	if i := slices.Index(all, nil); i >= 0 {
		return nil, i + 1, nil
	}
	return all, 0, nil
}

func (p *memPart) Nak(delay time.Duration) error {
	p.q.mu.Lock()
	defer p.q.mu.Unlock()
	p.taken, p.at = false, time.Now().Add(delay)
	return nil
}

func (p *memPart) DeadLetter(_ context.Context, reason string) error {
	p.q.mu.Lock()
	defer p.q.mu.Unlock()
	p.gone = true
	p.q.dead = append(p.q.dead, reason)
	return nil
}

// redeliver makes everything that was taken and not acknowledged available again, as after a crash.
func (q *memQueue) redeliver() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, p := range q.parts {
		p.taken, p.at = false, time.Time{}
	}
}

func (q *memQueue) waiting() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(slices.DeleteFunc(slices.Clone(q.parts), func(p *memPart) bool { return p.gone }))
}

func pageSubject(user, device, session string, page int) string {
	return user + "." + device + "." + session + "." + strconv.Itoa(page)
}

func (q *memQueue) PutPage(ctx context.Context, user, device, session string, page int, contentType, encoding string, data []byte) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	subject := pageSubject(user, device, session, page)
	if err := q.failing("page", subject); err != nil {
		return err
	}
	q.pages[subject] = memPage{contentType, encoding, bytes.Clone(data)}
	return nil
}

func (q *memQueue) StartPage(user, device, session string, page int, contentType, encoding string, data []byte) func(context.Context) error {
	return func(ctx context.Context) error {
		return q.PutPage(ctx, user, device, session, page, contentType, encoding, data)
	}
}

func (q *memQueue) Pages(_ context.Context, user, device, session string) (n int, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := 1; ; i++ {
		if _, ok := q.pages[pageSubject(user, device, session, i)]; !ok {
			return n, nil
		}
		n++
	}
}

func (q *memQueue) Ready(user, device, session string, pages int, _, _ string, _ []byte) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ready = append(q.ready, fmt.Sprintf("%s.%s.%s %d", user, device, session, pages))
	return nil
}

func (q *memQueue) get(user, device, session string, page int) (memPage, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	p, ok := q.pages[pageSubject(user, device, session, page)]
	return p, ok
}

func (q *memQueue) purge() {
	q.mu.Lock()
	defer q.mu.Unlock()
	clear(q.pages)
}

var errTest = errors.New("the test makes this fail")
