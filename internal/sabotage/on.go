//go:build sabotage

package sabotage

import (
	"fmt"
	"os"
	"slices"
)

var active = func() Bug {
	name := Bug(os.Getenv(Env))
	if name != "" && !slices.Contains(All, name) {
		panic(fmt.Sprintf("%s=%s: there is no such bug; there are %v", Env, name, All))
	}
	return name
}()

// On tells whether a bug is active.
func On(b Bug) bool { return b == active }
