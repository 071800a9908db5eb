// Package device keeps a SQLite file in step with a Waystage server.
//
// An application writes ordinary SQL to ordinary tables of the file, through any connection and any process; triggers
// remember beside each touched row what it was before. Sync sends what changed, fetches what changed at the server,
// and applies it in one transaction.
//
// It promises, by the rules D1 to D13 of docs/protocol.md: no edit is lost or sent twice, whatever is cancelled,
// crashes or is delivered late; an edit stays visible until its outcome is known; what the server refused is in the
// rejected log exactly once, beside the right version; a reply is applied whole or not at all; edits of one unit (see
// Transaction) are in one session or in none. Log tells the way of each record; Resubmit, Restore and Discard deal with
// rejected ones, each in one local transaction.
//
// The command line's "waystage device" calls it, and so can any Go program.
package device
