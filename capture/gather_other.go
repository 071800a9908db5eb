//go:build !linux

package capture

import "net"

// lowWater is known to work on Linux only; elsewhere data is read as it comes.
type lowWater struct{ on bool }

func (l *lowWater) open(net.Conn) {}
func (l *lowWater) set(int)       {}
