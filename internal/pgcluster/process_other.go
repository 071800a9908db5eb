//go:build !linux

package pgcluster

import (
	"syscall"
	"time"
)

// attributes makes a server process that runs as the account and does not get the terminal's Ctrl-C. Only Linux can
// end it with its starter: elsewhere a server outlives a starter that was killed.
func attributes(a account) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setpgid: true}
	if a.switched {
		attr.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid}
	}
	return attr
}

func children(int) []int { return nil }

func state(int) string { return "" }

func used(int) time.Duration { return 0 }

func removeSharedMemory(string) error { return nil }
