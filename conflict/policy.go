package conflict

import "github.com/waystage/waystage/internal/sabotage"

// Policy says what becomes of a record that rule D3, or rule R4 at the source, would refuse because somebody else wrote the row
// since it was seen (docs/conflicts.md). What no policy takes is refused as without one.
type Policy string

// Policies. Their texts are those of the definitions.
const (
	RejectClash  Policy = "reject"
	MergeColumns Policy = "columns"     // taken, if nobody else has changed the columns that it changes
	LastWriter   Policy = "last-writer" // taken: the order is that of the merges
	SourceWins   Policy = "source"      // dropped: what stands there wins
	AskFunction  Policy = "function"    // an SQL function says, see Answered
)

// What becomes of a record by its policy.
const (
	Yields          Reason = "source_wins"      // dropped in favour of what stands there; nobody has to do anything about it
	FunctionRefuses Reason = "function_refused" // the function raised an error of its own
	FunctionFails   Reason = "function_failed"  // the function failed, took too long or gave nonsense
)

// For is the policy that counts for a record: where devices may not update, an insert does not become an update.
func (p Policy) For(op Op, mayUpdate bool) Policy {
	if p == LastWriter && op == Insert && !mayUpdate || p == "" {
		return RejectClash
	}
	return p
}

// Clash is a record that was made on another image than the one that stands there.
type Clash struct {
	Op      Op
	Exists  bool // a row stands there
	Known   bool // the image that an update was made on is known
	Overlap bool // some column that it changes was changed since, to another image; used with Known only
	Moved   bool // the row is of another subset now
}

// Resolve decides a clash by policy. why is the reason that it is refused for otherwise. What a policy takes is always written,
// even if the row has it all already: the device must be told a version of its own and get the row (docs/adr/0010-conflict-policies.md).
func Resolve(p Policy, why Reason, c Clash) (Effect, Reason) {
	overlap := c.Overlap && !sabotage.On(sabotage.MergeColumns)
	switch {
	case p == SourceWins:
		return Reject, Yields
	case !c.Exists || c.Moved:
		return Reject, why
	case p == MergeColumns && c.Op == Update && c.Known && !overlap, p == LastWriter && c.Op != Delete:
		return Change, None
	case p == LastWriter:
		return Remove, None
	}
	return Reject, why
}

// Answer is what a function said about a clash.
type Answer byte

// Answers. Their numbers are those of schema.Kind.
const (
	Silent    Answer = iota // null: refuse it as without a policy
	Absent                  // the row shall not be there
	Standing                // exactly what stands there
	Another                 // another row
	Refusing                // it raised an error of its own
	Senseless               // it failed, took too long, or gave what is no row of the table
)

// AnswerOf is the answer with a number, as they are listed above.
func AnswerOf(n byte) Answer { return min(Answer(n), Senseless) }

// Answered decides a clash by a function's answer.
func Answered(a Answer, why Reason, c Clash) (Effect, Reason) {
	switch {
	case a == Refusing:
		return Reject, FunctionRefuses
	case a == Senseless || a == Absent && c.Exists && c.Op != Delete:
		return Reject, FunctionFails
	case a == Standing || a == Absent && !c.Exists:
		return Reject, Yields
	case a == Absent:
		return Remove, None
	case a == Another && c.Exists:
		return Change, None
	case a == Another:
		return Create, None
	}
	return Reject, why
}

// Met tells whether a failed compare-and-set at the source is a clash that a policy may decide: base's writer is foreign, and
// no change that the record was made on top of was refused (docs/adr/0006-on-top-of-a-refused-change.md).
func Met(w Writer, onRefused bool, rebases int) bool {
	return w == Foreign && !onRefused && rebases < MaxRebases
}

// Reconsider is Retry for a record with a policy: where Met says so, effect and why are what Resolve or Answered made of
// the clash with base.
func Reconsider(w Writer, onRefused bool, rebases int, effect Effect, why Reason) (Attempt, Reason) {
	switch {
	case !Met(w, onRefused, rebases):
		return Retry(w, onRefused, rebases)
	case effect == Reject:
		return Refuse, why
	default:
		return Rebase, None
	}
}
