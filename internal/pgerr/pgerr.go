// Package pgerr sorts PostgreSQL errors by SQLSTATE into what a worker does next: try again, refuse the record, or stop.
//
// It promises never to look at a message's text (servers translate them) and to call an error retryable when nothing
// is known against it. Every package that talks to a database calls it.
package pgerr

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/protocol"
)

// Kind is what to do about an error.
type Kind int

// Kinds.
const (
	None      Kind = iota // no error
	Retryable             // the same work may succeed later: connection lost, deadlock, timeout, server out of resources
	Refusal               // the data was refused: constraint, value, trigger, permission. Trying again unchanged fails again
	Fatal                 // neither time nor other data helps: a table or column is gone, the login is wrong
)

// String names the kind for logs.
func (k Kind) String() string {
	switch k {
	case None:
		return "none"
	case Retryable:
		return "retryable"
	case Refusal:
		return "refusal"
	default:
		return "fatal"
	}
}

// Code is the SQLSTATE of a server's error, or empty when err did not come from a server.
func Code(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return ""
}

// Is tells whether err is a server's error with one of the SQLSTATEs.
func Is(err error, codes ...string) bool {
	c := Code(err)
	for _, want := range codes {
		if c != "" && c == want {
			return true
		}
	}
	return false
}

// Class sorts an error. What is not from a server (a lost connection, a deadline, a cancelled context) is retryable: a
// caller that was told to stop looks at its own context first.
func Class(err error) Kind {
	if err == nil {
		return None
	}
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return Retryable
	}
	return classOf(pg)
}

// codes that differ from the rest of their class.
var codes = map[string]Kind{
	"25006": Retryable, // read only transaction: a standby, before or after a failover
	"25P03": Retryable, // idle in transaction timeout
	"25P04": Retryable, // transaction timeout
	"26000": Retryable, // unknown prepared statement: a pooler or a reset session
	"40002": Refusal,   // integrity constraint, found at commit
	"42501": Refusal,   // insufficient privilege, row security's WITH CHECK included
	"42P05": Retryable, // duplicate prepared statement: a pooler or a reset session
	"55006": Retryable, // object in use: a slot whose former reader is still leaving
	"55P03": Retryable, // lock not available
	"57P04": Fatal,     // database dropped
	"58P01": Fatal,     // file missing: an extension's library is not installed
	"58P02": Fatal,
	"XX001": Fatal, // data corrupted
	"XX002": Fatal, // index corrupted
}

// classes by the first two characters. A class that is not the server's own is a RAISE with the customer's code: a refusal.
var classes = map[string]Kind{
	"03": Fatal,
	"08": Retryable,
	"09": Refusal, // triggered action exception
	"0A": Fatal,
	"0B": Fatal,
	"0F": Fatal,
	"0L": Fatal,
	"0P": Fatal,
	"20": Refusal, // case not found, in a trigger
	"21": Fatal,
	"22": Refusal, // data exception
	"23": Refusal, // integrity constraint violation
	"24": Fatal,
	"25": Fatal,
	"27": Refusal, // triggered data change violation
	"28": Fatal,
	"2B": Fatal,
	"2D": Fatal,
	"2F": Refusal, // SQL routine exception
	"34": Fatal,
	"38": Refusal, // external routine exception
	"39": Refusal,
	"3B": Fatal,
	"3D": Fatal,
	"3F": Fatal,
	"40": Retryable,
	"42": Fatal,
	"44": Refusal, // WITH CHECK OPTION of a view
	"53": Retryable,
	"54": Refusal, // program limit: an index row or a statement grown too big by the data
	"55": Fatal,
	"57": Retryable,
	"58": Retryable,
	"72": Retryable,
	"F0": Fatal,
	"HV": Retryable, // a foreign server behind a trigger
	"P0": Refusal,   // RAISE and other PL/pgSQL errors
	"XX": Retryable,
}

func classOf(pg *pgconn.PgError) Kind {
	if k, ok := codes[pg.Code]; ok {
		return k
	}
	if len(pg.Code) != 5 {
		return Retryable
	}
	// A plan that a table's change made useless; the driver forgets it and prepares again.
	if pg.Code == "0A000" && pg.Routine == "RevalidateCachedQuery" {
		return Retryable
	}
	class := pg.Code[:2]
	// A statement inside a trigger failed, not ours: the customer's own code refused the row.
	if pg.InternalQuery != "" && (class == "42" || class == "21" || class == "0A" || class == "55") {
		return Refusal
	}
	if malformed(pg) {
		return Refusal
	}
	if k, ok := classes[class]; ok {
		return k
	}
	return Refusal
}

// malformed tells whether a syntax error is one of a value: extensions (ltree, hstore) have no other code for what their types
// cannot read. A syntax error of the statement has its place there.
func malformed(pg *pgconn.PgError) bool { return pg.Code == "42601" && pg.Position == 0 }

// Details are the parts of a refusal that a person or a device is told.
type Details struct {
	Code       string // SQLSTATE
	Message    string
	Detail     string
	Hint       string
	Schema     string
	Table      string
	Column     string
	Constraint string
}

// Refused extracts the details if err is a refusal.
func Refused(err error) (Details, bool) {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || classOf(pg) != Refusal {
		return Details{}, false
	}
	return Details{
		Code: pg.Code, Message: pg.Message, Detail: pg.Detail, Hint: pg.Hint, Schema: pg.SchemaName,
		Table: pg.TableName, Column: pg.ColumnName, Constraint: pg.ConstraintName,
	}, true
}

// Reason is the protocol's code for a refusal by the source.
func (d Details) Reason() protocol.Code {
	if d.Code == "42501" {
		return protocol.CodePermission
	}
	if len(d.Code) == 5 {
		switch d.Code[:2] {
		case "23":
			return protocol.CodeConstraint
		case "22":
			return protocol.CodeValue
		case "44":
			return protocol.CodeConstraint
		}
	}
	switch d.Code {
	case "40002":
		return protocol.CodeConstraint
	case "42601":
		return protocol.CodeValue
	}
	return protocol.CodeTrigger
}

// Text is the database's own words in one line: message, and detail where there is one.
func (d Details) Text() string {
	if d.Detail == "" {
		return d.Message
	}
	return d.Message + ": " + d.Detail
}

// Stopped tells whether err only says that ctx was cancelled, by whatever layer said it.
func Stopped(ctx context.Context, err error) bool {
	return err != nil && ctx.Err() != nil
}
