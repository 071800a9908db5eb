// Package nettest puts a network that can fail between a test and its server. Only tests import it.
//
// It promises that a held direction looks like a machine that has vanished: connections stay open, new ones are accepted,
// what is sent is taken, and nothing comes; and that Close ends everything that it began.
package nettest

import (
	"io"
	"net"
	"net/url"
	"sync"
)

// Direction of bytes.
type Direction int

// Directions.
const (
	ToServer Direction = iota
	ToClient
)

// Verdict says what becomes of bytes.
type Verdict int

// Verdicts.
const (
	Pass     Verdict = iota
	CutAfter         // pass them to the server, which acts upon them, but its answer is lost: the client's end is closed
	CutNow           // close both ends without passing them
	HoldNow          // hold the direction, these bytes first
)

// Proxy forwards TCP connections to one server. It is safe for concurrent use.
type Proxy struct {
	listener net.Listener
	target   string
	wg       sync.WaitGroup

	mu    sync.Mutex
	moved *sync.Cond // held or closed has changed
	held  [2]bool
	judge func(Direction, []byte) Verdict
	open  map[*pair]struct{}
	done  bool
	conns int
}

type pair struct {
	client, server net.Conn
	closed         bool // guarded by the proxy's mu
}

// New begins to forward to a TCP address.
func New(target string) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{listener: l, target: target, open: map[*pair]struct{}{}}
	p.moved = sync.NewCond(&p.mu)
	p.wg.Go(p.accept)
	return p, nil
}

// InFrontOf begins to forward to the host of an address, a connection string or other URL, and returns the address by which
// clients go through the proxy.
func InFrontOf(address string) (*Proxy, string, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, "", err
	}
	p, err := New(u.Host)
	if err != nil {
		return nil, "", err
	}
	u.Host = p.Address()
	return p, u.String(), nil
}

// Address is where clients connect.
func (p *Proxy) Address() string { return p.listener.Addr().String() }

// Port is the address's port.
func (p *Proxy) Port() int { return p.listener.Addr().(*net.TCPAddr).Port }

// Hold lets nothing through in a direction, or lets it through again, with what was sent meanwhile.
func (p *Proxy) Hold(d Direction, held bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held[d] = held
	p.moved.Broadcast()
}

// Judge asks fn about all bytes from now on, a read at a time; nil: they pass.
func (p *Proxy) Judge(fn func(Direction, []byte) Verdict) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.judge = fn
}

// Cut closes all connections.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.open {
		p.closePair(c)
	}
}

// Connections is how many were accepted so far.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conns
}

// Close ends the proxy and its connections.
func (p *Proxy) Close() {
	_ = p.listener.Close()
	p.mu.Lock()
	p.done = true
	for c := range p.open {
		p.closePair(c)
	}
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *Proxy) closePair(c *pair) {
	c.closed = true
	_ = c.client.Close()
	if c.server != nil {
		_ = c.server.Close()
	}
	delete(p.open, c)
	p.moved.Broadcast()
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		c := &pair{client: client}
		p.mu.Lock()
		if p.done {
			p.mu.Unlock()
			_ = client.Close()
			return
		}
		p.conns++
		p.open[c] = struct{}{}
		p.mu.Unlock()
		p.wg.Go(func() { p.serve(c) })
	}
}

func (p *Proxy) serve(c *pair) {
	server, err := net.Dial("tcp", p.target)
	p.mu.Lock()
	if err != nil || c.closed {
		if err == nil {
			_ = server.Close()
		}
		p.closePair(c)
		p.mu.Unlock()
		return
	}
	c.server = server
	p.mu.Unlock()
	p.wg.Go(func() {
		p.pump(c, ToClient, server, c.client)
		p.drop(c)
	})
	if p.pump(c, ToServer, c.client, server) == CutAfter {
		_ = c.client.Close()
		if tcp, ok := server.(*net.TCPConn); ok {
			_ = tcp.CloseWrite() // the server ends by itself when it has done what it was told
			return
		}
	}
	p.drop(c)
}

func (p *Proxy) drop(c *pair) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closePair(c)
}

// wait returns when a direction is open, or the connection closed. The news of an end stays away too.
func (p *Proxy) wait(c *pair, d Direction) {
	for p.held[d] && !c.closed {
		p.moved.Wait()
	}
}

// pump forwards one direction until it ends, and tells by what verdict.
func (p *Proxy) pump(c *pair, d Direction, from io.Reader, to io.Writer) Verdict {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		p.mu.Lock()
		p.wait(c, d)
		verdict := Pass
		if p.judge != nil && n > 0 && !c.closed {
			if verdict = p.judge(d, buf[:n]); verdict == HoldNow {
				p.held[d] = true
				p.wait(c, d)
			}
		}
		closed := c.closed
		p.mu.Unlock()
		if closed || verdict == CutNow {
			return CutNow
		}
		if _, werr := to.Write(buf[:n]); werr != nil || err != nil || verdict == CutAfter {
			return verdict
		}
	}
}
