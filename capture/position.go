package capture

import (
	"github.com/waystage/waystage/change"
)

// position is the bookkeeping of one run: what was received, what is durable at the target, and what the slot may be
// told. Nothing else decides an acknowledgement (rule R7).
type position struct {
	durable  change.LSN // everything up to here is committed at the target
	received change.LSN // highest log position that the server has told us
	sent     change.LSN // end of the last transaction with rows in it; it is in flight until durable reaches it
	quiet    change.LSN // end of log that had nothing for us in it after sent: needs no target
	inTx     bool
}

func newPosition(durable change.LSN) position { return position{durable: durable, received: durable} }

func (p *position) begin() { p.inTx = true }

// commit notes the end of a transaction; empty: it carried no rows, or is durable at the target already.
func (p *position) commit(end change.LSN, empty bool) {
	p.inTx = false
	p.received = max(p.received, end)
	if empty {
		p.quiet = max(p.quiet, end)
	} else {
		p.sent = max(p.sent, end)
	}
}

// keepalive notes how far the server has read its log. In the middle of a transaction that says nothing: the
// transaction's rows lie before that position and its commit may too.
func (p *position) keepalive(end change.LSN) {
	p.received = max(p.received, end)
	if !p.inTx {
		p.quiet = max(p.quiet, end)
	}
}

// target notes that the target is durable up to lsn. It never goes back.
func (p *position) target(lsn change.LSN) { p.durable = max(p.durable, lsn) }

// inFlight tells whether a transaction was received that the target does not have.
func (p *position) inFlight() bool { return p.inTx || p.sent > p.durable }

// flush is what the slot may be told: the target's durable position or, when nothing is in flight, the end of the log
// that had nothing for us. A wrong value here loses data for ever.
func (p *position) flush() change.LSN {
	if p.inFlight() {
		return p.durable
	}
	return max(p.durable, p.quiet)
}

// write is what has been received, for the server's statistics only.
func (p *position) write() change.LSN { return max(p.received, p.flush()) }
