package cmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// Exit codes, as documented in docs/operate.md. Scripts may rely on them.
const (
	exitOK           = 0
	exitFailed       = 1   // something went wrong that none of the others names
	exitUsage        = 2   // flags, arguments or configuration are wrong
	exitRejected     = 3   // the sync or import is complete, and records or lines were rejected
	exitAuth         = 4   // wrong password, blocked, or not allowed
	exitUnreachable  = 5   // a server did not answer: trying again may help
	exitPrecondition = 6   // the state of things does not allow it (exists already, a preflight check failed)
	exitAttention    = 7   // data needs a person: a forked device, a lost slot
	exitDiffers      = 8   // verify, schema diff: what should be equal is not
	exitInterrupted  = 130 // Ctrl-C
)

// failure is an error with everything a person needs: what failed, where, why, and what to do.
type failure struct {
	code   int
	what   string // "cannot read the configuration"
	where  string // file and line, server, table; may be empty
	err    error  // why
	remedy string // what to do; may be empty
}

func (f *failure) Error() string {
	var b strings.Builder
	b.WriteString(f.what)
	if f.where != "" {
		b.WriteString(" (" + f.where + ")")
	}
	if f.err != nil {
		b.WriteString(": " + f.err.Error())
	}
	return b.String()
}

func (f *failure) Unwrap() error { return f.err }

// usage makes a failure of the caller's.
func usage(format string, args ...any) error {
	return &failure{code: exitUsage, what: fmt.Sprintf(format, args...), remedy: "run the command with --help"}
}

// silent ends a command with a code and no further words: the command has said everything.
type silent int

func (s silent) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// exitCode sorts an error into the documented codes.
func exitCode(err error) int {
	var f *failure
	var s silent
	var pg *pgconn.PgError
	var conn *pgconn.ConnectError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &s):
		return int(s)
	case errors.As(err, &f) && f.code != 0:
		return f.code
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	case errors.As(err, &pg) && (strings.HasPrefix(pg.Code, "28") || pg.Code == "42501"):
		return exitAuth
	case errors.As(err, &conn), errors.Is(err, context.DeadlineExceeded):
		return exitUnreachable
	default:
		return exitFailed
	}
}

// report tells a person about an error, on stderr.
func report(w io.Writer, err error) {
	var s silent
	if err == nil || errors.As(err, &s) {
		return
	}
	var f *failure
	if !errors.As(err, &f) {
		fmt.Fprintf(w, "waystage: %s\n", oneLine(err.Error()))
		return
	}
	fmt.Fprintf(w, "waystage: %s\n", f.what)
	line := func(label, text string) {
		if text != "" {
			fmt.Fprintf(w, "  %-6s %s\n", label, strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n         "))
		}
	}
	line("where:", f.where)
	if f.err != nil {
		line("why:", f.err.Error())
	}
	line("do:", f.remedy)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
