package chaos

import (
	"net"
	"sync"
)

// proxy is a link that can be cut. It passes bytes between clients and a target until told otherwise.
type proxy struct {
	ln     net.Listener
	target string

	mu                sync.Mutex
	change            *sync.Cond
	refuse            bool
	requests, answers bool // held back
	conns             map[*pair]struct{}
}

type pair struct {
	client, server net.Conn
	closed         bool // under the proxy's lock
}

func newProxy(target string) (*proxy, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proxy{ln: ln, target: target, conns: map[*pair]struct{}{}}
	p.change = sync.NewCond(&p.mu)
	go p.accept()
	return p, nil
}

func (p *proxy) address() string { return p.ln.Addr().String() }

func (p *proxy) accept() {
	for {
		client, err := p.ln.Accept()
		if err != nil {
			return
		}
		go p.connect(client)
	}
}

func (p *proxy) connect(client net.Conn) {
	p.mu.Lock()
	refuse := p.refuse
	p.mu.Unlock()
	if refuse {
		_ = client.Close()
		return
	}
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		_ = client.Close()
		return
	}
	c := &pair{client: client, server: server}
	p.mu.Lock()
	p.conns[c] = struct{}{}
	p.mu.Unlock()
	go p.pipe(c, server, client, &p.requests)
	p.pipe(c, client, server, &p.answers)
}

func (p *proxy) pipe(c *pair, to, from net.Conn, held *bool) {
	defer p.close(c)
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			p.mu.Lock()
			for *held && !c.closed {
				p.change.Wait()
			}
			closed := c.closed
			p.mu.Unlock()
			if closed {
				return
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (p *proxy) close(c *pair) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closeLocked(c)
}

func (p *proxy) closeLocked(c *pair) {
	if !c.closed {
		c.closed = true
		_ = c.client.Close()
		_ = c.server.Close()
		delete(p.conns, c)
		p.change.Broadcast()
	}
}

// cut breaks every connection.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		p.closeLocked(c)
	}
}

// set says what does not pass from now on.
func (p *proxy) set(refuse, requests, answers bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse, p.requests, p.answers = refuse, requests, answers
	p.change.Broadcast()
}

func (p *proxy) end() {
	_ = p.ln.Close()
	p.set(true, false, false)
	p.cut()
}
