// Package protocol defines the messages that a device and the server exchange, in one structure with two
// encodings (CBOR and JSON), and the limits and error codes that go with them.
//
// It promises that equal messages have equal bytes (deterministic encoding), that decoding refuses anything it
// does not fully understand with a stable [Code], and that no input makes it allocate more than the given limits.
// The device library and the server's stages (intake, reply) call it; an independent client can be written from
// docs/protocol.md alone.
//
// # Values
//
// A column value on the wire is a PostgreSQL text representation (datestyle ISO, UTC, bytea as \x hex,
// booleans t/f) or null: never a number, so nothing is rounded on the way (see docs/adr/0003-values-are-text.md).
package protocol

// Version is the protocol version that this package speaks.
const Version = 1

// Value is one column value: PostgreSQL text, or nil for NULL.
type Value = *string

// Request opens one sync session: the upload of one subscription set and the demand for what changed there.
// Its encoded bytes are frozen by the device before the first attempt and resent unchanged (rule D1).
type Request struct {
	V           int      `cbor:"1,keyasint" json:"v"`                            // protocol version
	Incarnation string   `cbor:"2,keyasint" json:"incarnation"`                  // random id of this life of the device's file, 32 hex digits
	N           int64    `cbor:"3,keyasint" json:"n"`                            // session number, 1, 2, 3 ... within the incarnation
	Nonce       string   `cbor:"4,keyasint" json:"nonce"`                        // random, echoed by the reply
	Set         string   `cbor:"5,keyasint" json:"set"`                          // subscription set
	Cursor      string   `cbor:"6,keyasint,omitempty" json:"cursor,omitempty"`   // opaque token of the last applied reply of this set; empty: send everything
	Schema      string   `cbor:"7,keyasint,omitempty" json:"schema,omitempty"`   // hash of the definitions that the device holds; differing: the reply carries them
	Epoch       string   `cbor:"8,keyasint,omitempty" json:"epoch,omitempty"`    // mirror epoch that the base versions belong to; empty: unknown
	Wait        string   `cbor:"9,keyasint,omitempty" json:"wait,omitempty"`     // "" or "merge": reply after the merge; "source": wait (bounded) for the source's verdict too
	App         string   `cbor:"10,keyasint,omitempty" json:"app,omitempty"`     // application version, for the operator's eyes
	Changes     []Change `cbor:"11,keyasint,omitempty" json:"changes,omitempty"` // at most one per row
	Columns     []Layout `cbor:"12,keyasint,omitempty" json:"columns,omitempty"` // column order of the images in Changes, one per table
	Oldest      string   `cbor:"13,keyasint,omitempty" json:"oldest,omitempty"`  // RFC 3339 time of the oldest unsent change, for the operator's eyes

	Verify *Verification `cbor:"14,keyasint,omitempty" json:"verify,omitempty"` // nil: the device does not know verification
	Files  *FilesRequest `cbor:"18,keyasint,omitempty" json:"files,omitempty"`  // nil: the device does not know files

	Built *Built `cbor:"15,keyasint,omitempty" json:"built,omitempty"` // what the application was built for; nil: whatever the set has

	Library string `cbor:"17,keyasint,omitempty" json:"library,omitempty"` // client library and version, for the operator's eyes; empty: one that does not know Page.NewKey
}

// Values of Request.Wait; empty is WaitMerge.
const (
	WaitMerge  = "merge"
	WaitSource = "source"
)

// Layout names the columns of a table in the order in which images carry their values.
type Layout struct {
	Table   string   `cbor:"1,keyasint" json:"table"` // "schema.table"
	Columns []string `cbor:"2,keyasint" json:"columns"`
}

// Operations of a [Change].
const (
	Insert = "I"
	Update = "U"
	Delete = "D"
)

// Change is one changed row: what the user's first edit was made on, and what the row is now (rule D2).
type Change struct {
	Table   string  `cbor:"1,keyasint" json:"table"`
	Op      string  `cbor:"2,keyasint" json:"op"`
	Key     []Value `cbor:"3,keyasint" json:"key"`                         // primary key values in key order; never null
	Version string  `cbor:"4,keyasint,omitempty" json:"version,omitempty"` // base version; empty: the device had no such row
	Base    []Value `cbor:"5,keyasint,omitempty" json:"base,omitempty"`    // base image in Layout order; absent for Insert
	New     []Value `cbor:"6,keyasint,omitempty" json:"new,omitempty"`     // new image in Layout order; absent for Delete
	Unit    int64   `cbor:"7,keyasint,omitempty" json:"unit,omitempty"`    // number of the device's transaction within the session, 1, 2, ... (rule R8); 0: none given
}

// Page is one page of a reply. All pages of one composition carry the same Reply id; a device that sees two
// ids starts again at page 1. Only the last page carries the cursor.
type Page struct {
	V           int          `cbor:"1,keyasint" json:"v"`
	Incarnation string       `cbor:"2,keyasint" json:"incarnation"`
	N           int64        `cbor:"3,keyasint" json:"n"`
	Nonce       string       `cbor:"4,keyasint" json:"nonce"`
	Reply       string       `cbor:"5,keyasint" json:"reply"` // id of the composition
	Page        int          `cbor:"6,keyasint" json:"page"`  // 1, 2, ...
	Last        bool         `cbor:"7,keyasint,omitempty" json:"last,omitempty"`
	CursorFrom  string       `cbor:"8,keyasint,omitempty" json:"cursor_from,omitempty"`
	Cursor      string       `cbor:"9,keyasint,omitempty" json:"cursor,omitempty"` // on the last page: to be stored with the rows, in one commit
	Epoch       string       `cbor:"10,keyasint,omitempty" json:"epoch,omitempty"`
	Refresh     bool         `cbor:"11,keyasint,omitempty" json:"refresh,omitempty"` // page 1: rows of this set that the reply does not name are gone
	Sets        []string     `cbor:"12,keyasint,omitempty" json:"sets,omitempty"`    // page 1: the sets that this user has, in sync order
	Schema      *Definitions `cbor:"13,keyasint,omitempty" json:"schema,omitempty"`  // page 1, when the device's hash differs
	Tables      []TableRows  `cbor:"14,keyasint,omitempty" json:"tables,omitempty"`
	Verdicts    []Verdict    `cbor:"15,keyasint,omitempty" json:"verdicts,omitempty"`
	Error       *Error       `cbor:"16,keyasint,omitempty" json:"error,omitempty"` // the request as a whole was refused; nothing else is set but Sets
	More        bool         `cbor:"17,keyasint,omitempty" json:"more,omitempty"`  // last page: verdicts of this session are still open; sync again later
	Rows        int64        `cbor:"18,keyasint,omitempty" json:"rows,omitempty"`  // page 1: estimate of all rows in the reply, for a progress bar; 0: unknown
	Verify      *Verified    `cbor:"19,keyasint,omitempty" json:"verify,omitempty"`
	Files       []FilesPart  `cbor:"23,keyasint,omitempty" json:"files,omitempty"`   // nothing for a device that knows no files
	NewKey      bool         `cbor:"22,keyasint,omitempty" json:"new_key,omitempty"` // page 1: the operator wants the device to take another key
}

// TableRows carries what changed in one table. Apply order: Gone, then Deletes, then Rows.
type TableRows struct {
	Table   string    `cbor:"1,keyasint" json:"table"`
	Columns []string  `cbor:"2,keyasint,omitempty" json:"columns,omitempty"` // order of the values in Rows
	Gone    []string  `cbor:"3,keyasint,omitempty" json:"gone,omitempty"`    // subscription key values that left the subset: every row with one of them goes
	Deletes [][]Value `cbor:"4,keyasint,omitempty" json:"deletes,omitempty"` // primary keys
	Rows    []Row     `cbor:"5,keyasint,omitempty" json:"rows,omitempty"`
}

// Row is one row image with its version.
type Row struct {
	_       struct{} `cbor:",toarray"`
	Version string   `json:"version"`
	Values  []Value  `json:"values"`
}

// Verdict states.
const (
	Merged   = "merged"   // in the mirror at Version; the source has not answered yet
	Applied  = "applied"  // committed at the source: final
	Rejected = "rejected" // refused by the merge: final
	Refused  = "refused"  // refused by the source after the merge: final
)

// Verdict is the state of one uploaded record. A record may be told more than one (merged, later applied or
// refused); Rejected, Refused and Applied are final.
type Verdict struct {
	Incarnation string  `cbor:"1,keyasint" json:"incarnation"`
	N           int64   `cbor:"2,keyasint" json:"n"`     // session that carried the record
	Index       int     `cbor:"3,keyasint" json:"index"` // position in that session's Changes, from 0
	Table       string  `cbor:"4,keyasint" json:"table"`
	Key         []Value `cbor:"5,keyasint" json:"key"`
	State       string  `cbor:"6,keyasint" json:"state"`
	Version     string  `cbor:"7,keyasint,omitempty" json:"version,omitempty"` // Merged: version given to the row, or one that no row has; empty after a delete
	Code        Code    `cbor:"8,keyasint,omitempty" json:"code,omitempty"`
	Detail      string  `cbor:"9,keyasint,omitempty" json:"detail,omitempty"` // one sentence for a person; for source refusals the database's own words
	Constraint  string  `cbor:"10,keyasint,omitempty" json:"constraint,omitempty"`
	ID          int64   `cbor:"11,keyasint,omitempty" json:"id,omitempty"`     // number of the record in the server's log
	Policy      string  `cbor:"12,keyasint,omitempty" json:"policy,omitempty"` // Merged, Applied: the conflict policy that took it although somebody else had changed the row
}

// Definitions describe the tables of one subscription set to the device.
type Definitions struct {
	Hash   string  `cbor:"1,keyasint" json:"hash"`
	Tables []Table `cbor:"2,keyasint" json:"tables"`

	Files []FileSubscription `cbor:"18,keyasint,omitempty" json:"files,omitempty"`
}

// Table is a table as a device keeps it.
type Table struct {
	Name       string       `cbor:"1,keyasint" json:"name"` // "schema.table"
	Columns    []Column     `cbor:"2,keyasint" json:"columns"`
	Key        []string     `cbor:"3,keyasint" json:"key"`
	SubsetKey  string       `cbor:"4,keyasint,omitempty" json:"subset_key,omitempty"` // column whose values select the rows; empty: all rows
	Operations string       `cbor:"5,keyasint" json:"operations"`                     // allowed uploads: subset of "IUD"
	Unique     [][]string   `cbor:"6,keyasint,omitempty" json:"unique,omitempty"`     // further unique keys at the source, information only
	Foreign    []ForeignKey `cbor:"7,keyasint,omitempty" json:"foreign,omitempty"`    // information only

	FileColumn string `cbor:"18,keyasint,omitempty" json:"file_column,omitempty"` // column that holds the path of a file
	FileBefore bool   `cbor:"19,keyasint,omitempty" json:"file_before,omitempty"` // that file must be there before the row is applied
}

// Column is a column as a device keeps it.
type Column struct {
	_       struct{} `cbor:",toarray"`
	Name    string   `json:"name"`
	Type    string   `json:"type"` // PostgreSQL type as format_type prints it, e.g. "numeric(12,2)"
	NotNull bool     `json:"not_null"`
	Default string   `json:"default"` // constant default as PostgreSQL text, or empty
}

// ForeignKey says which table a table's rows refer to.
type ForeignKey struct {
	Columns []string `cbor:"1,keyasint" json:"columns"`
	Table   string   `cbor:"2,keyasint" json:"table"`
	Refers  []string `cbor:"3,keyasint" json:"refers"`
}

// Error refuses a whole request or gateway call.
type Error struct {
	Code    Code   `cbor:"1,keyasint" json:"code"`
	Message string `cbor:"2,keyasint" json:"message"`                         // what, where, why, what to do
	Retry   int    `cbor:"3,keyasint,omitempty" json:"retry_after,omitempty"` // seconds; 0: do not retry unchanged
}

// Receipt is the gateway's answer to one put, always JSON (as every gateway answer but pages).
type Receipt struct {
	Stored    bool   `json:"stored"`              // the part is in the input queue
	Sequence  uint64 `json:"sequence,omitempty"`  // its place there
	Duplicate bool   `json:"duplicate,omitempty"` // the queue already had it
	Error     *Error `json:"error,omitempty"`
}

// Status answers status: how far a session has come.
type Status struct {
	State   string `json:"state"`           // unknown, received, staged, merged, replied, refused
	Pages   int    `json:"pages,omitempty"` // of the reply, while they wait for the device; 0: not replied, or the reply is gone
	Records int    `json:"records,omitempty"`
	Error   *Error `json:"error,omitempty"`
}

// Watch asks to hear when a sync would bring something: the sets that the device holds, each with its cursor.
type Watch struct {
	Sets []WatchSet `json:"sets"`           // MaxWatched at most
	Only bool       `json:"only,omitempty"` // that the user has other sets is no news
	Now  bool       `json:"now,omitempty"`  // answer at once, and for certain: whether a session would bring anything
}

// WatchSet is a set as the device holds it.
type WatchSet struct {
	Set    string `json:"set"`
	Cursor string `json:"cursor,omitempty"` // of the last applied reply; empty: none
}

// MaxWatched bounds the sets of a Watch.
const MaxWatched = 256

// News answers a Watch, when there is something or the gateway does not hold the call any longer.
type News struct {
	Sets  []string `json:"sets"` // that a sync would bring something for; empty: none, ask again
	Error *Error   `json:"error,omitempty"`
}

// Enrolment asks for a device key: sent once, on a connection that was authenticated in another way. With a token it goes
// to VerbRedeem.
type Enrolment struct {
	Key     string `json:"key"` // the device's public NKEY (user type, "U...")
	App     string `json:"app,omitempty"`
	Library string `json:"library,omitempty"` // client library and version
	Token   string `json:"token,omitempty"`   // enrolment token
}

// Rotation announces the key that a device will log in with from now on. The present one stays good until it has.
type Rotation struct {
	Key string `json:"key"` // public NKEY
}

// Rotated answers a Rotation.
type Rotated struct {
	OK    bool   `json:"ok"`
	Error *Error `json:"error,omitempty"`
}

// Enrolled answers an Enrolment.
type Enrolled struct {
	User   string   `json:"user"`
	Device string   `json:"device"`
	Sets   []string `json:"sets"` // subscription sets in sync order
	Epoch  string   `json:"epoch"`
	Error  *Error   `json:"error,omitempty"`
}
