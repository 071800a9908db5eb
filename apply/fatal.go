// Package apply writes change data into its target: Down the source's transactions into the mirror, Up the devices'
// merged changes into the source.
//
// It promises that every transaction is applied exactly once, by moving a position or a chain in the same target
// transaction; that a mirror row with pending changes is never overwritten, only its base image is (rule R2); that
// nothing is written to the source unless the row there is byte for byte what the change was made on (rule R3); and that
// every change gets exactly one verdict; and that a table whose shape the source has changed stops alone. What is decided
// is decided by package conflict. cmd runs one Down and one Up, any number of standbys.
package apply

import "fmt"

// Code is a stable name of a reason why apply cannot go on without an operator.
type Code string

// Codes.
const (
	CodeProgress   Code = "no_progress"    // a progress row is missing
	CodeServerBack Code = "server_is_back" // source or mirror lacks what the other one has had of it: restored, or failed over
)

// Error stops an apply for good: retrying cannot help and going on would lose changes.
type Error struct {
	Code   Code
	Detail string
	Remedy string
}

func (e *Error) Error() string { return fmt.Sprintf("apply: %s: %s. %s", e.Code, e.Detail, e.Remedy) }

const remedyIdentity = "ALTER TABLE ... REPLICA IDENTITY DEFAULT makes it so"

const remedyBack = "Was the server restored from a backup, or was a standby promoted that lacked its last transactions? " +
	"Then copy the tables anew: `waystage serve --recopy`; devices keep their changes"
