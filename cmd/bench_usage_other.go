//go:build !linux

package cmd

import "time"

// What the measurements cost is known on Linux only.

func ownCPU() time.Duration { return 0 }
func resetPeak()            {}
func peakMemory() int64     { return 0 }
