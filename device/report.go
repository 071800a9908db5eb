package device

import "time"

// SyncOptions of one sync.
type SyncOptions struct {
	Wait     string         // "" or protocol.WaitMerge: replies come after the merge; protocol.WaitSource: they wait (bounded) for the source's verdict
	Sets     []string       // only these subscription sets; empty: all, in the server's order
	Progress func(Progress) // called from the syncing goroutine; nil: nobody looks
}

// Stages of a session, as Progress tells them.
const (
	StageConnect  = "connect"
	StageUpload   = "upload"
	StageWait     = "wait"
	StageDownload = "download"
	StageApply    = "apply"
	StageFiles    = "files" // contents of files, up or down
)

// Progress says where a sync is. Total is 0 where it is not known.
type Progress struct {
	Set         string
	Session     int64
	Stage       string
	Done, Total int64 // bytes at upload and files, pages at download, rows at apply
}

// Report is the outcome of one sync.
type Report struct {
	ID       int64         `json:"id,omitempty"` // in the log
	Started  time.Time     `json:"started"`
	Duration time.Duration `json:"duration"`
	Resumed  bool          `json:"resumed,omitempty"` // the sync went on where an earlier one had stopped
	Forked   bool          `json:"forked,omitempty"`  // the file goes on under a new incarnation (restored copy, or mirror rebuilt)
	NewKey   bool          `json:"new_key,omitempty"` // the device has another key now
	Sets     []SetReport   `json:"sets"`              // one per session
	Nothing  []string      `json:"nothing,omitempty"` // sets without a session: neither side had anything
	Files    FileTotals    `json:"files"`
	Error    string        `json:"error,omitempty"`

	KeyProblem string `json:"key_problem,omitempty"` // why the key was not changed although it was due; the next sync tries again
	Totals
}

// SetReport is the outcome of one session.
type SetReport struct {
	Set      string        `json:"set"`
	Session  string        `json:"session"`
	Duration time.Duration `json:"duration"`
	Resumed  bool          `json:"resumed,omitempty"`
	Refresh  bool          `json:"refresh,omitempty"` // all rows were sent, not only what changed
	More     bool          `json:"more,omitempty"`    // verdicts on this upload are still open: they come with a later sync
	Pages    int           `json:"pages"`

	ClosedUntil time.Time `json:"closed_until,omitzero"` // nothing was synced: the server takes no session of this set before that
	Totals
}

// Totals count.
type Totals struct {
	Sent      int   `json:"sent"`              // edits uploaded
	Merged    int   `json:"merged"`            // verdicts told: in the mirror
	Applied   int   `json:"applied"`           // at the source, final
	Rejected  int   `json:"rejected"`          // refused by merge or source, final
	Settled   int   `json:"settled,omitempty"` // given up for what the server had, as its conflict policy says, final
	Rows      int64 `json:"rows"`              // rows received
	Deleted   int64 `json:"deleted"`           // rows removed
	BytesUp   int64 `json:"bytes_up"`
	BytesDown int64 `json:"bytes_down"`
}

func (t *Totals) add(o Totals) {
	t.Sent += o.Sent
	t.Merged += o.Merged
	t.Applied += o.Applied
	t.Rejected += o.Rejected
	t.Settled += o.Settled
	t.Rows += o.Rows
	t.Deleted += o.Deleted
	t.BytesUp += o.BytesUp
	t.BytesDown += o.BytesDown
}
