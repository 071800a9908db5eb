package capture

import (
	"net"
	"syscall"
)

// lowWater sets how many bytes must be there before the kernel calls a socket readable.
type lowWater struct {
	raw syscall.RawConn
	on  bool
}

// open does nothing for what is not a plain TCP socket: TLS and Unix sockets are read as they come.
func (l *lowWater) open(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		l.raw, _ = tcp.SyscallConn()
	}
}

func (l *lowWater) set(bytes int) {
	l.on = false
	if l.raw == nil {
		return
	}
	err := l.raw.Control(func(fd uintptr) {
		if syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVLOWAT, bytes) == nil {
			l.on = bytes > 1
		}
	})
	if err != nil {
		l.raw = nil
	}
}
