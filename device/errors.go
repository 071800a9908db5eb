package device

import "errors"

// Errors that a caller may want to tell apart. Each comes wrapped in one that says what happened and what to do.
var (
	ErrNotEnrolled = errors.New("this file is not enrolled")
	ErrUnreachable = errors.New("the server cannot be reached")
	ErrLogin       = errors.New("the server refused the login")
	ErrBlocked     = errors.New("the device or its user is blocked")
	ErrToken       = errors.New("the enrolment token is not good")
	ErrInUse       = errors.New("another copy of this device's file is syncing")
	ErrCapture     = errors.New("the capture of changes is damaged")
	ErrSyncing     = errors.New("a sync of this file is already running")
	ErrReply       = errors.New("the server's reply cannot be used")
	ErrRefused     = errors.New("the server refused the session")

	// Of Resubmit, Restore and Discard. Nothing was done.
	ErrNoReject  = errors.New("no such entry in the rejected log")
	ErrHandled   = errors.New("the entry was dealt with in another way")
	ErrRowGone   = errors.New("the row is no more")
	ErrRowExists = errors.New("a row with that key exists")
	ErrRowEdited = errors.New("the row has another edit that is not final")
	ErrNoColumn  = errors.New("the column cannot be set")
	ErrNoTable   = errors.New("the table is not in the file any more")
)
