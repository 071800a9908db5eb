package protocol

import "fmt"

// Limits bound what a decoder takes. The zero value of a field means no limit.
type Limits struct {
	Encoded      int // bytes of a request as sent, all parts, compressed or not
	Decompressed int // bytes of its encoding
	Changes      int // changes in one request
	Row          int // bytes of one image; judged per record by intake, not by the decoder
	Columns      int // columns of one table
	Tables       int // layouts of one request
	Values       int // values in one message; every other element counts by its size in memory, 16 bytes to a value
	Name         int // bytes of a table or column name and of any other short text (cursor, epoch, app ...)
}

// DefaultLimits are the limits of a server that was not configured otherwise.
func DefaultLimits() Limits {
	return Limits{
		Encoded:      16 << 20,
		Decompressed: 64 << 20,
		Changes:      100_000,
		Row:          1 << 20,
		Columns:      1_600,
		Tables:       2_000,
		Values:       8 << 20,
		Name:         512,
	}
}

// Error is "code: message".
func (e *Error) Error() string { return string(e.Code) + ": " + e.Message }

func refuse(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}
