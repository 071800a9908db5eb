// Command waystage is the Waystage sync server, its operator's tool and a device, in one binary.
package main

import (
	"os"

	"github.com/waystage/waystage/cmd"
)

func main() {
	os.Exit(cmd.Main(os.Args[1:], cmd.System()))
}
