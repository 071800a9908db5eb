package queue

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// ErrFull means that the store takes no more.
var ErrFull = errors.New("queue: the store of files is full (limits.file_bytes)")

// Chunks is the store of chunks of files, each under its SHA-256. Storing one twice is storing it once. Nothing rests on it:
// what it has lost is found out, and put there again by whoever has it.
type Chunks struct {
	nc       *nats.Conn
	js       jetstream.JetStream
	replicas int
	heal     func(error)
}

// Chunks is the queue's store of chunks.
func (q *Queue) Chunks() *Chunks {
	return &Chunks{nc: q.app, js: q.js, replicas: q.cfg.Replicas, heal: q.heal}
}

// NewChunks opens the store over a connection to account APP. The stream must exist.
func NewChunks(nc *nats.Conn) (*Chunks, error) {
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("queue: %w", err)
	}
	return &Chunks{nc: nc, js: js, replicas: 3, heal: func(error) {}}, nil // asks the leader too: right whatever the stream is
}

func chunkSubject(sha [sha256.Size]byte) string { return "sync.file." + hex.EncodeToString(sha[:]) }

// Put stores a chunk and returns its name.
func (c *Chunks) Put(ctx context.Context, data []byte) ([sha256.Size]byte, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	sha := sha256.Sum256(data)
	if _, err := c.js.Publish(ctx, chunkSubject(sha), data); err != nil {
		if isFull(err) {
			return sha, ErrFull
		}
		c.heal(err)
		return sha, fmt.Errorf("queue: store a chunk: %w", err)
	}
	return sha, nil
}

// Get reads a chunk and checks that it is the one. One that is damaged is not there.
func (c *Chunks) Get(ctx context.Context, sha [sha256.Size]byte) (data []byte, there bool, err error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	m, err := last(ctx, c.nc, StreamFile, chunkSubject(sha), c.replicas)
	switch {
	case errors.Is(err, errNoPage):
		return nil, false, nil
	case err != nil:
		c.heal(err)
		return nil, false, err
	case sha256.Sum256(m.Data) != sha:
		return nil, false, nil
	}
	return m.Data, true, nil
}

// Names lists what is stored.
func (c *Chunks) Names(ctx context.Context) (map[[sha256.Size]byte]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, 12*callTimeout)
	defer cancel()
	s, err := c.js.Stream(ctx, StreamFile)
	if err != nil {
		c.heal(err)
		return nil, fmt.Errorf("queue: list chunks: %w", err)
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter("sync.file.*"))
	if err != nil {
		return nil, fmt.Errorf("queue: list chunks: %w", err)
	}
	names := make(map[[sha256.Size]byte]bool, len(info.State.Subjects))
	for subject := range info.State.Subjects {
		b, err := hex.DecodeString(strings.TrimPrefix(subject, "sync.file."))
		if err == nil && len(b) == sha256.Size {
			names[[sha256.Size]byte(b)] = true
		}
	}
	return names, nil
}

// Drop removes a chunk that was last stored before the given time. One that is stored again meanwhile stays.
func (c *Chunks) Drop(ctx context.Context, sha [sha256.Size]byte, before time.Time) (bool, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	s, err := c.js.Stream(ctx, StreamFile)
	if err != nil {
		return false, fmt.Errorf("queue: drop a chunk: %w", err)
	}
	m, err := s.GetLastMsgForSubject(ctx, chunkSubject(sha))
	if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && !m.Time.Before(before) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("queue: drop a chunk: %w", err)
	}
	err = s.DeleteMsg(ctx, m.Sequence)
	if errors.Is(err, jetstream.ErrMsgNotFound) || errors.Is(err, jetstream.ErrMsgDeleteUnsuccessful) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("queue: drop a chunk: %w", err)
	}
	return true, nil
}
