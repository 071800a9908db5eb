package capture

import (
	"io"
	"net"
	"time"
)

// gather reads ahead from the connection and, while data flows, lets the kernel collect the server's many small sends
// before it wakes us: with one wake-up for each message, the wake-ups cost ten times what the data does.
//
// Until stream is called it only passes reads on.
type gather struct {
	r        io.Reader
	conn     net.Conn // set while streaming
	deadline time.Time
	buf      []byte
	from, to int
	small    int // small reads in a row, one right after the other
	last     time.Time
	low      lowWater
}

const (
	gatherBuffer = 256 << 10
	gatherBytes  = 32 << 10 // the kernel wakes us for this much
	gatherWait   = 2 * time.Millisecond
	gatherAfter  = 16 // small reads in a row, each within gatherWait of the one before
)

func newGather(r io.Reader) *gather { return &gather{r: r} }

func (g *gather) stream(conn net.Conn) {
	g.conn, g.buf = conn, make([]byte, gatherBuffer)
	g.low.open(conn)
}

// Read implements io.Reader.
func (g *gather) Read(p []byte) (int, error) {
	if g.conn == nil {
		return g.r.Read(p)
	}
	if g.from == g.to {
		n, err := g.fill()
		if err != nil {
			return 0, err
		}
		g.from, g.to = 0, n
	}
	n := copy(p, g.buf[g.from:g.to])
	g.from += n
	return n, nil
}

func (g *gather) fill() (int, error) {
	n, err := g.read(g.deadline)
	now := time.Now()
	if err != nil {
		g.small = 0
		if g.low.on {
			g.low.set(1)
		}
		return n, err
	}
	if n < gatherBytes/2 && now.Sub(g.last) < gatherWait {
		g.small++
	} else {
		g.small = 0
	}
	g.last = now
	if g.small >= gatherAfter && !g.low.on {
		g.low.set(gatherBytes)
	}
	return n, nil
}

func (g *gather) read(deadline time.Time) (int, error) {
	for g.low.on {
		wait := time.Now().Add(gatherWait)
		if err := g.conn.SetReadDeadline(wait); err != nil {
			return 0, err
		}
		n, err := g.conn.Read(g.buf)
		if err == nil || !timeout(err) {
			return n, err
		}
		// Less than a full load came in time: take what is there, and wait for single bytes again.
		g.low.set(1)
	}
	if err := g.conn.SetReadDeadline(deadline); err != nil {
		return 0, err
	}
	return g.conn.Read(g.buf)
}

func timeout(err error) bool {
	t, ok := err.(interface{ Timeout() bool })
	return ok && t.Timeout()
}
