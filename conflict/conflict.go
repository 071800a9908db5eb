// Package conflict decides: a few facts about a record in, a verdict out.
//
// Its functions are pure and total: no I/O, no clock, no memory. The same functions run in production (merge, apply)
// and in the exhaustive model that explores their interleavings (model_test.go), so what was proven is what runs.
// The rules they implement, D3 and D11 (device and mirror), R2 to R4 (mirror and source), are explained in
// docs/ARCHITECTURE.md; R8 (what stands and falls together) is in unit.go.
package conflict

import "github.com/waystage/waystage/internal/sabotage"

// Op is what a record does to its row.
type Op byte

// Operations, as on the wire.
const (
	Insert Op = 'I'
	Update Op = 'U'
	Delete Op = 'D'
)

// Reason says why a record was not accepted. It is empty for an accepted one.
type Reason string

// Reasons. Their texts are the protocol's codes.
const (
	None        Reason = ""
	Stale       Reason = "stale_version"
	RowDeleted  Reason = "row_deleted"
	RowExists   Reason = "row_exists"
	Source      Reason = "source_conflict"
	Dependency  Reason = "dependency_rejected"
	Transaction Reason = "transaction_rejected"
)

// Facts are what rule D3 needs to know about one uploaded record and the mirror row of its key.
type Facts struct {
	Op        Op
	Exists    bool // the mirror has the row
	Version   bool // base version == the row's version (both 0 when absent)
	OwnEcho   bool // last device writer == this incarnation, and base version == the version of that merge, which is not 0
	SameImage bool // what the record would make of the row is what it already is (byte for byte); false when absent
	OldEpoch  bool // the base version was given by an earlier mirror: it means nothing, BaseImage counts instead (rule D13)
	BaseImage bool // base image == the row's image, or both absent; used with OldEpoch only
}

// Effect is what an accepted record does to the mirror row.
type Effect byte

// Effects.
const (
	Reject  Effect = iota // refused: the row stays
	Create                // insert the row
	Change                // update the row
	Remove                // delete the row
	Nothing               // accepted, the row is already so (still pending at the source, which judges for itself)
)

// Merge decides rule D3: accept iff the base version is the row's, or the record deletes an absent row, or it
// continues this incarnation's own last write, or the row already is what the record makes of it.
func Merge(f Facts) (Effect, Reason) {
	fresh := f.Version || sabotage.On(sabotage.MergeStale)
	if f.OldEpoch {
		fresh = f.BaseImage
	}
	switch {
	case f.Op == Delete && !f.Exists:
		return Nothing, None
	case f.Exists && f.SameImage && f.Op != Delete:
		return Nothing, None
	case !f.Exists && f.Op == Insert && fresh:
		return Create, None
	case f.Exists && f.Op == Update && (fresh || f.OwnEcho):
		return Change, None
	case f.Exists && f.Op == Delete && (fresh || f.OwnEcho):
		return Remove, None
	case !f.Exists:
		return Reject, RowDeleted
	case f.Op == Insert:
		return Reject, RowExists
	default:
		return Reject, Stale
	}
}

// Writer tells who wrote the source's image of a key last, as far as down has seen.
type Writer byte

// Writers.
const (
	Initial Writer = iota // nobody since the key's first pending change was merged
	Own                   // a transaction of the up worker (the change itself, a trigger, a cascade)
	Foreign               // anybody else
)

// After is base's writer once a transaction, our own or not, has written the source's image of the key again. Foreign
// stays foreign for as long as changes of the key are pending: none of their authors has seen the foreign image, even
// when a trigger of our own transaction has rewritten it since (docs/adr/0002-foreign-stays-foreign.md).
func (w Writer) After(own bool) Writer {
	if own && w != Foreign {
		return Own
	}
	return Foreign
}

// Route says where down writes a source image of a key: to the mirror row, or, while changes of the key are
// pending, to its base image only (rule R2).
func Route(pending int) (base bool) { return pending > 0 }

// Settlement is what happens to a mirror row when its key's last pending change has its verdict (rule R3).
type Settlement byte

// Settlements.
const (
	Keep    Settlement = iota // the row already equals base: no write, no new version
	Restore                   // row := base with a new version; the last device writer is the author of base's image (rule D11)
)

// Settle decides it. accepted: the last verdict was an acceptance; equal: base image == mirror row (both may be absent);
// w: base's writer. Where a trigger rewrote a device's own row, base's author is that device: its next edit, made on
// the version of its merge, passes as its own echo. Who wrote the mirror row last must not decide that: two devices may have
// written equal images (docs/adr/0004-the-author-of-base.md).
func Settle(accepted, equal bool, w Writer) Settlement {
	if accepted && equal && w != Foreign {
		return Keep
	}
	return Restore
}

// Attempt is what happens after a compare-and-set failed at the source and down has passed that moment (rule R4).
type Attempt byte

// Attempts.
const (
	Rebase Attempt = iota // expect base instead and try again
	Refuse                // a conflict: refuse the record
)

// MaxRebases bounds how often one record is rebased; a source that rewrites a row on every look would
// otherwise hold the queue for ever.
const MaxRebases = 8

// Retry decides rule R4: only a foreign writer makes a conflict; our own (a trigger, a cascade, an earlier edit)
// makes a new expectation, unless a change that the record was made on top of was refused: then the record falls with it,
// whoever wrote base (docs/adr/0006-on-top-of-a-refused-change.md). Initial without that means that the source has what
// was expected, and yet the write had no effect.
func Retry(w Writer, onRefused bool, rebases int) (Attempt, Reason) {
	switch {
	case w == Foreign:
		return Refuse, Source
	case onRefused || w == Initial:
		return Refuse, Dependency
	case rebases < MaxRebases:
		return Rebase, None
	default:
		return Refuse, Source
	}
}

// Victim is a row that a delete at the source would take along by a cascade, locked there, as the mirror knows it.
type Victim struct {
	Writer Writer // base's, while changes of its key are pending; else Initial
	Known  bool   // nobody but devices had written the mirror's row between the delete's merge and the first pending change's, or now
	// The source's row is what the mirror, or base under changes that were merged later, has; or the same transaction has compared
	// it. Never under a pending change that was merged before the delete: what it left at the source shows when it has come down.
	Same bool
}

// Fate is what happens to a victim, and with it to the delete.
type Fate byte

// Fates.
const (
	Goes     Fate = iota // it goes with the row that is deleted
	Unclear              // somebody has written it, and down has not brought that yet: look again when down has passed this moment
	Stranger             // somebody else wrote what nobody who deletes can have seen: the delete is refused
)

// Cascade decides the fate of a victim (docs/adr/0008-what-stands-in-the-way-at-the-source.md).
func Cascade(v Victim) Fate {
	switch {
	case v.Writer == Foreign || !v.Known:
		return Stranger
	case !v.Same:
		return Unclear
	default:
		return Goes
	}
}
