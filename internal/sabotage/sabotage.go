// Package sabotage holds the deliberate bugs that the checks of this project are tested with: a check that lets one of
// them pass proves nothing (see docs/chaos.md).
//
// It promises that a binary built without the tag "sabotage" contains none of them: there On is a constant. With the tag, the
// environment variable WAYSTAGE_SABOTAGE names the one bug that is active. The packages that have a bug to offer call it,
// and test/chaos, which must find every one.
package sabotage

// Env names the active bug.
const Env = "WAYSTAGE_SABOTAGE"

// Bug is one deliberate bug.
type Bug string

// The bugs.
const (
	AckEarly      Bug = "ack-early"       // capture tells the slot what was received, not what the target has (R7)
	SkipEchoes    Bug = "skip-echoes"     // down ignores the rows of our own transactions (R2)
	ForgetPending Bug = "forget-pending"  // down writes the mirror row although changes of the key are pending (R2)
	CompareKey    Bug = "compare-by-key"  // up compares the key only, not the image (R3, R5)
	CompareEqual  Bug = "compare-equal"   // up compares by = instead of byte for byte (R5)
	DropFence     Bug = "drop-fence"      // up does not prove that it is the only worker (R3)
	IgnoreAgain   Bug = "ignore-again"    // intake ignores a redelivered session whose reply is gone (D4, I7)
	LeakKey       Bug = "leak-key"        // reply goes on sending rows of a subset key that the user lost (I5)
	SkipTombstone Bug = "skip-tombstone"  // reply leaves out a part of the deletes (I4)
	OffByOne      Bug = "off-by-one"      // a cursor begins one version too late (D6)
	HalfPage      Bug = "half-page"       // the device applies the first half of a page's rows (D8)
	LogTwice      Bug = "log-twice"       // the device logs a rejection twice (D9)
	SwallowBad    Bug = "swallow-bad"     // merge drops records that cannot be read (I1)
	KeepRefused   Bug = "keep-refused"    // the mirror keeps what the source refused (R3)
	MergeStale    Bug = "merge-stale"     // merge accepts a change of an obsolete version (D3, I3)
	IgnoreGap     Bug = "ignore-gap"      // apply goes on over missing change data (R7)
	TornSnapshot  Bug = "torn-snapshot"   // reply reads without a snapshot (I6)
	DropLater     Bug = "drop-later-edit" // the device forgets an edit made after the one that was refused (D9, I1)
	MoveBase      Bug = "move-base"       // the device moves a dirty row's base version to what the server sent (D10, I3)
	MergeColumns  Bug = "merge-columns"   // the policy columns merges although both have changed the same column (I3)
	MergeVersion  Bug = "merge-version"   // a device is told the row's version for what a policy merged with others' work (D3, I3)
)

// All lists the bugs.
var All = []Bug{AckEarly, SkipEchoes, ForgetPending, CompareKey, CompareEqual, DropFence, IgnoreAgain, LeakKey, SkipTombstone, OffByOne, HalfPage,
	LogTwice, SwallowBad, KeepRefused, MergeStale, IgnoreGap, TornSnapshot, DropLater, MoveBase, MergeColumns, MergeVersion}
