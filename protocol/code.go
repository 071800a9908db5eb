package protocol

// Code is a stable name for a refusal. Codes are never renamed; docs/errors.md lists each with cause and remedy.
type Code string

// Refusals of a request or gateway call as a whole.
const (
	CodeMalformed   Code = "malformed"            // not decodable: empty, truncated, trailing bytes, duplicate or unknown field, bad UTF-8
	CodeVersion     Code = "protocol_version"     // a protocol version that this server does not speak
	CodeContentType Code = "content_type"         // neither application/cbor nor application/json, or an unknown encoding
	CodeTooBig      Code = "too_big"              // a message, session, depth or decompressed size over its limit
	CodeName        Code = "invalid_name"         // a user, device or session name that is not [a-z0-9_-]{1,64}
	CodeSeries      Code = "series"               // a multi-part request with missing, doubled or contradictory parts
	CodeForked      Code = "forked"               // session number and hash do not continue this incarnation (rule D4): restored or cloned device
	CodeEpoch       Code = "epoch"                // the mirror was rebuilt (rule D13)
	CodeUnknownSet  Code = "unknown_set"          // no such subscription set for this user
	CodeBlocked     Code = "blocked"              // the device or user is blocked
	CodeBusy        Code = "busy"                 // the queue is full: retry after the given time
	CodeOutside     Code = "outside_window"       // the set is not synced at this time: retry after the given time
	CodeNotFound    Code = "not_found"            // no such session or page (yet)
	CodePending     Code = "pending"              // the reply is not ready yet: ask again
	CodeInternal    Code = "internal"             // the server failed; the request is kept and retried
	CodeKey         Code = "invalid_key_material" // an enrolment key that is not a public user NKEY
)

// Refusals of an enrolment, and of a device that is there twice.
const (
	CodeTokenExpired Code = "token_expired" // the enrolment token is too old
	CodeTokenUsed    Code = "token_used"    // the enrolment token has enrolled a device already
	CodeTokenRevoked Code = "token_revoked" // the operator has taken the enrolment token back
	CodeTokenUnknown Code = "token_unknown" // no such enrolment token for this device
	CodeSessionOpen  Code = "session_open"  // another file of the same device has a session under way: retry after the given time
)

// Rejections of a device's change of a file, beside stale_version, row_deleted, not_subscribed and operation_not_allowed; and
// refusals of calls about files.
const (
	CodePath         Code = "invalid_path"  // not a path that a file can have
	CodeFileTooBig   Code = "file_too_big"  // the file is over the subscription's max_size
	CodeFileQuota    Code = "file_quota"    // the user's uploads are over their total
	CodeFileContent  Code = "file_content"  // the content is not what was announced: another size or hash
	CodeFileLost     Code = "file_lost"     // the server does not have the content now
	CodeFileConflict Code = "file_conflict" // the same upload id with another change
)

// Rejections of one record by the merge.
const (
	CodeStale         Code = "stale_version"         // the row has changed since the version that the edit was made on
	CodeRowDeleted    Code = "row_deleted"           // the row that was edited no longer exists
	CodeRowExists     Code = "row_exists"            // an insert met a row with the same key
	CodeUnknownTable  Code = "unknown_table"         // no such table in the device's subscriptions
	CodeUnknownColumn Code = "unknown_column"        // no such column in the subscription
	CodeInvalidValue  Code = "invalid_value"         // a value that does not fit its column's type
	CodeMissingKey    Code = "missing_key"           // key incomplete, null, or unlike the key columns of the image
	CodeKeyChange     Code = "key_change"            // an update that changes the primary key
	CodeNotSubscribed Code = "not_subscribed"        // the row is, or would be, outside the device's subset
	CodeOperation     Code = "operation_not_allowed" // the subscription does not allow this operation
	CodeDuplicate     Code = "duplicate_row"         // the same row twice in one session
	CodeRowTooBig     Code = "row_too_big"           // the row is over the row size limit
	CodeInvalidRecord Code = "invalid_record"        // image missing, superfluous or of the wrong length
)

// Rejections that a device makes by itself, beside those above that need no server (invalid_value, row_too_big,
// not_subscribed).
const (
	CodeSchema Code = "schema_changed" // the table was changed at the server so that the edit has no place in it
)

// Refusals of one record by the source.
const (
	CodeConstraint Code = "source_constraint"   // a constraint of the source; Constraint names it
	CodeTrigger    Code = "source_trigger"      // a trigger or function of the source raised; Detail is its message
	CodeSource     Code = "source_conflict"     // the source's row was changed by somebody else meanwhile
	CodeValue      Code = "source_value"        // the source's types refused a value
	CodePermission Code = "source_permission"   // row security or privileges of the source refused the change
	CodeDependency Code = "dependency_rejected" // the change was made on top of a change that was itself refused
)

// Rejections and refusals by the SQL function that a subscription names for conflicts.
const (
	CodeFunctionRefused Code = "function_refused" // it raised an error; Detail is its message
	CodeFunctionFailed  Code = "function_failed"  // it failed, took too long, or gave what is no row of the table
)

// Rejections and refusals of a record that has no fault of its own, by the merge or by the source.
const (
	CodeYields      Code = "source_wins"          // the subscription's conflict policy is source: what stands there wins
	CodeTransaction Code = "transaction_rejected" // another record of the same atomic device transaction failed; Detail names it
)
