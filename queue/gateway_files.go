package queue

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/nats-io/nats.go/micro"

	"github.com/waystage/waystage/protocol"
)

// Files answers the calls of devices about files. Who calls is the broker's word; what they may is decided at each call. An error
// that is a [*protocol.Error] is told to the device.
type Files interface {
	Fetch(ctx context.Context, user, device, sha256 string, n int) ([]byte, error)
	Offer(ctx context.Context, user, device, id string, o protocol.FileOffer) (protocol.FileReceipt, error)
	Put(ctx context.Context, user, device, id string, n int, data []byte) (protocol.FileReceipt, error)
	Commit(ctx context.Context, user, device, id string) (protocol.FileReceipt, error)
}

// Calls about files that are worked on at the same time, by all devices and by one: one that asks for much must not take the
// others' turn, nor all of them that of the rows.
const (
	maxFiling       = 16
	maxFilingDevice = 2

	fileTimeout   = 5 * time.Second
	commitTimeout = 2 * time.Minute // the content is read once more
	maxOffer      = 4 << 10         // bytes
)

// filing counts calls about files.
type filing struct {
	mu  sync.Mutex
	all int
	of  map[string]int
}

func (f *filing) enter(who string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.all >= maxFiling || f.of[who] >= maxFilingDevice {
		return false
	}
	f.all++
	f.of[who]++
	return true
}

func (f *filing) leave(who string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all--
	if f.of[who]--; f.of[who] == 0 {
		delete(f.of, who)
	}
}

func (s *shift) file(c *call, limit time.Duration, f func(context.Context) error) {
	who := c.user + "/" + c.device
	if !s.filing.enter(who) {
		c.refuse(protocol.CodeBusy, 1, "too many calls about files at once: try again after the given time")
		return
	}
	s.counts.files.Add(1)
	if !s.work.run(func() {
		defer s.filing.leave(who)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), limit)
		defer cancel()
		if err := f(ctx); err != nil {
			c.refuseError(err)
		}
	}) {
		s.filing.leave(who)
	}
}

// fileGet answers with one chunk of a content.
func (s *shift) fileGet(c *call) {
	n, err := protocol.ParseChunk(c.args[1])
	if err != nil {
		c.refuseError(err)
		return
	}
	if s.slowed(c) {
		return
	}
	s.file(c, fileTimeout, func(ctx context.Context) error {
		data, err := s.cfg.Files.Fetch(ctx, c.user, c.device, c.args[0], n)
		if err != nil {
			return err
		}
		s.rates.spend(c.user, c.device, len(data))
		return c.r.Respond(data, micro.WithHeaders(micro.Headers{protocol.HeaderContentType: {protocol.ContentChunk}}))
	})
}

// fileOffer takes the announcement of a change.
func (s *shift) fileOffer(c *call) {
	var o protocol.FileOffer
	if len(c.r.Data()) > maxOffer || json.Unmarshal(c.r.Data(), &o) != nil {
		c.refuse(protocol.CodeMalformed, 0, `an offer is JSON: {"path": "...", "op": "put", "sha256": "...", "size": ..., "base": "..."}`)
		return
	}
	s.receipt(c, fileTimeout, func(ctx context.Context) (protocol.FileReceipt, error) {
		return s.cfg.Files.Offer(ctx, c.user, c.device, c.args[0], o)
	})
}

// filePut takes one chunk.
func (s *shift) filePut(c *call) {
	n, err := protocol.ParseChunk(c.args[1])
	if err != nil {
		c.refuseError(err)
		return
	}
	data := c.r.Data()
	if len(data) > protocol.FileChunk {
		c.refuse(protocol.CodeTooBig, 0, "a chunk has %d bytes at most, not %d", protocol.FileChunk, len(data))
		return
	}
	if !s.mayPut(c, len(data)) {
		return
	}
	s.receipt(c, fileTimeout, func(ctx context.Context) (protocol.FileReceipt, error) {
		return s.cfg.Files.Put(ctx, c.user, c.device, c.args[0], n, data)
	})
}

// fileCommit decides an upload.
func (s *shift) fileCommit(c *call) {
	s.receipt(c, commitTimeout, func(ctx context.Context) (protocol.FileReceipt, error) {
		return s.cfg.Files.Commit(ctx, c.user, c.device, c.args[0])
	})
}

func (s *shift) receipt(c *call, limit time.Duration, f func(context.Context) (protocol.FileReceipt, error)) {
	s.file(c, limit, func(ctx context.Context) error {
		r, err := f(ctx)
		if err == nil {
			c.answer(r)
		}
		return err
	})
}
