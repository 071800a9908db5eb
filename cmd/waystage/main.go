// Command waystage is the Waystage sync server, its operator's tool and a device, in one binary.
package main

import (
	"os"
	_ "time/tzdata" // sets may be synced by the clock of any time zone, on machines without a database of them

	"github.com/waystage/waystage/cmd"
)

func main() {
	os.Exit(cmd.Main(os.Args[1:], cmd.System()))
}
