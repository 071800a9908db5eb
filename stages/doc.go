// Package stages holds the three workers between the queues: intake (input queue to staging tables), merge (staging
// tables to mirror tables and ledger) and reply (merged sessions to pages in the output queue), and the pools that run
// any number of each.
//
// It promises that a session is merged whole, once and in one transaction, however often its request is delivered and
// wherever a process dies (rules D3 to D6); that a record which cannot be merged is refused alone, and a request that
// cannot be taken is answered alone; that a reply is one consistent snapshot of the mirror, limited to what its user
// subscribes to; and that no statement is sent per row.
//
// cmd makes the stages, gives them the queue through the small interfaces [Input] and [Output], and runs each in a
// [Pool]. The gateway calls [Sessions].
package stages

// Names of the stages, in kicks (subject "ws.kick.<stage>") and pools.
const (
	StageIntake = "intake"
	StageMerge  = "merge"
	StageReply  = "reply"
)
