package device

import "errors"

// Errors that a caller may want to tell apart. Each comes wrapped in one that says what happened and what to do.
var (
	ErrNotEnrolled = errors.New("this file is not enrolled")
	ErrUnreachable = errors.New("the server cannot be reached")
	ErrLogin       = errors.New("the server refused the login")
	ErrBlocked     = errors.New("the device or its user is blocked")
	ErrCapture     = errors.New("the capture of changes is damaged")
	ErrSyncing     = errors.New("a sync of this file is already running")
	ErrReply       = errors.New("the server's reply cannot be used")
	ErrRefused     = errors.New("the server refused the session")
)
