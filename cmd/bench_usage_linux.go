package cmd

import (
	"bytes"
	"os"
	"strconv"
	"syscall"
	"time"
)

// ownCPU is what this process has used since it started, and the programs that it ran and that have ended.
func ownCPU() (total time.Duration) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if syscall.Getrusage(who, &u) == nil {
			total += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return total
}

// resetPeak makes the kernel forget what most of this process was in memory so far.
func resetPeak() { _ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) } // without it the peak is that of the whole run: too high, at worst

// peakMemory is how much of this process was in memory at most since then, in bytes; 0: not known.
func peakMemory() int64 {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	_, after, _ := bytes.Cut(text, []byte("VmHWM:"))
	kib, _, _ := bytes.Cut(bytes.TrimLeft(after, " \t"), []byte(" "))
	n, _ := strconv.ParseInt(string(kib), 10, 64)
	return n << 10
}
