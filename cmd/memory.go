package cmd

import (
	"os"
	"runtime/debug"
)

// garbagePercent lets a server's heap grow to three times what lives in it before it is collected: little lives there (some tens of MiB),
// and collecting was a quarter of its CPU with Go's default of 100. The variable GOGC decides otherwise.
const garbagePercent = 200

func collectLess() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbagePercent)
	}
}
