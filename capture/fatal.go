package capture

import "fmt"

// Code is a stable name of a reason why a capture cannot go on without an operator.
type Code string

// Codes.
const (
	CodeSlotMissing Code = "slot_missing"   // the replication slot does not exist
	CodePublication Code = "no_publication" // the publication does not exist, or is younger than the slot
	CodeSlotLost    Code = "slot_lost"      // the server has removed log that the slot still needed, or invalidated it
	CodeSlotForeign Code = "slot_foreign"   // the slot is of another plugin or database
	CodeSlotAhead   Code = "slot_ahead"     // somebody else has moved the slot past what the target has
	CodeSystem      Code = "other_system"   // the connection leads to another server than the one that was set up
	CodeServerBack  Code = "server_is_back" // the server's log ends before what the target has: restored, or failed over
	CodeProgress    Code = "no_progress"    // the mirror has no progress row for this direction
)

// Error stops a capture for good: retrying cannot help and going on would lose changes.
type Error struct {
	Code   Code
	Detail string
	Remedy string
}

func (e *Error) Error() string {
	return fmt.Sprintf("capture: %s: %s. %s", e.Code, e.Detail, e.Remedy)
}

const remedyResync = "Copy the tables anew: `waystage serve --recopy`; devices keep their changes"

const remedyBack = "Was the server restored from a backup, or was a standby promoted that lacked its last transactions? " +
	"Then copy the tables anew: `waystage serve --recopy`; devices keep their changes"
