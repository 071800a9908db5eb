package schema

import "syscall"

const tcpUserTimeout = 18 // TCP_USER_TIMEOUT; package syscall has no name for it

// limitUnacknowledged has the kernel give a connection up whose peer does not acknowledge what was sent.
func limitUnacknowledged(_, _ string, raw syscall.RawConn) error {
	return raw.Control(func(fd uintptr) {
		// Not on Unix sockets; without it the kernel's own limit holds.
		_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(peerGone.Milliseconds()))
	})
}
