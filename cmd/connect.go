package cmd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/term"

	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// openPool opens a pool with canonical settings (rule R5) and checks that the database answers. size 0 takes pgx's
// default.
func openPool(ctx context.Context, name, dsn string, size int, settings ...func(*pgx.ConnConfig)) (*pgxpool.Pool, error) {
	fail := func(err error, remedy string) error {
		return &failure{code: codeFor(err), what: "cannot connect to the " + name + " database", where: redactDSN(dsn), err: err, remedy: remedy}
	}
	c, err := schema.Config(dsn, "waystage")
	if err != nil {
		return nil, &failure{code: exitUsage, what: "the connection string of the " + name + " database is not valid", where: redactDSN(dsn),
			err: err, remedy: "see " + name + ".dsn, for example postgres://user@host:5432/database"}
	}
	if size > 0 {
		c.MaxConns = int32(size)
	}
	for _, set := range settings {
		set(c.ConnConfig)
	}
	pool, err := pgxpool.NewWithConfig(ctx, c)
	if err != nil {
		return nil, fail(err, "")
	}
	if err := pool.Ping(ctx); err != nil {
		pool.Close()
		return nil, fail(err, "is the server running, and do "+name+".dsn, pg_hba.conf and the password fit together?")
	}
	return pool, nil
}

// codeFor gives connection errors their exit code: not allowed, or unreachable.
func codeFor(err error) int {
	if code := exitCode(err); code == exitAuth || code == exitInterrupted {
		return code
	}
	return exitUnreachable
}

// withMirror runs an operator's command on the mirror database.
func (a *app) withMirror(ctx context.Context, do func(ctx context.Context, c Config, mirror *pgxpool.Pool) error) error {
	c, err := a.config()
	if err != nil {
		return err
	}
	pool, err := openPool(ctx, "mirror", c.Mirror.DSN, 4)
	if err != nil {
		return err
	}
	defer pool.Close()
	var there bool
	if err := pool.QueryRow(ctx, `SELECT to_regclass('waystage.meta') IS NOT NULL`).Scan(&there); err != nil {
		return err
	}
	if !there {
		return &failure{code: exitPrecondition, what: "the mirror database is not set up", where: redactDSN(c.Mirror.DSN),
			err: errors.New("it has no Waystage tables"), remedy: "start 'waystage serve' once: it sets the mirror up"}
	}
	return do(ctx, c, pool)
}

// refusal gives the registry's refusals their exit codes.
func refusal(what string, err error) error {
	var r *registry.Refusal
	if !errors.As(err, &r) {
		return err
	}
	code := exitPrecondition
	switch r.ErrorCode() {
	case protocol.CodeName, "invalid_password", "invalid_attribute", "invalid_expiry", protocol.CodeKey:
		code = exitUsage
	case protocol.CodeBlocked, "credentials":
		code = exitAuth
	}
	return &failure{code: code, what: what, err: err}
}

// password gets a secret from a file ("-": stdin), from the person at the terminal, or from stdin; never from a flag's
// value, which every user of the machine could read. A new password is asked for twice.
func (a *app) password(file, prompt string, fresh bool) (string, error) {
	var body []byte
	var err error
	stdin, isFile := a.in.(*os.File)
	switch {
	case file != "" && file != "-":
		if body, err = os.ReadFile(file); err != nil {
			return "", &failure{code: exitUsage, what: "cannot read the password", where: file, err: bare(err)}
		}
	case file == "" && a.inTTY && isFile:
		ask := func(prompt string) (string, error) {
			fmt.Fprint(a.err, prompt+": ")
			b, err := term.ReadPassword(int(stdin.Fd()))
			fmt.Fprintln(a.err)
			return string(b), err
		}
		first, err := ask(prompt)
		if err != nil || !fresh {
			return first, err
		}
		second, err := ask(prompt + " again")
		if err != nil {
			return "", err
		}
		if first != second {
			return "", &failure{code: exitUsage, what: "the two passwords differ", remedy: "try again"}
		}
		return first, nil
	default:
		if body, err = bufio.NewReader(io.LimitReader(a.in, protocol.MaxSecret+2)).ReadBytes('\n'); err != nil && !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("read the password from stdin: %w", err)
		}
	}
	text := strings.TrimRight(strings.SplitN(string(body), "\n", 2)[0], "\r")
	if text == "" {
		return "", usage("no password was given: type it, pipe it in, or use --password-file")
	}
	return text, nil
}

// confirm asks a person to type a name before something is destroyed. yes answers for scripts.
func (a *app) confirm(yes bool, what, name string) error {
	if yes {
		return nil
	}
	if !a.inTTY {
		return usage("%s needs a confirmation: use --yes", what)
	}
	fmt.Fprintf(a.err, "%s. Type %s to go on: ", what, name)
	line, err := bufio.NewReader(a.in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if strings.TrimSpace(line) != name {
		return &failure{code: exitPrecondition, what: "nothing was done: the name was not typed"}
	}
	return nil
}

// collect reads all rows of a query into structs by position.
func collect[T any](rows pgx.Rows, err error) ([]T, error) {
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[T])
}

// loopback tells whether an address is reachable from this machine only.
func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
