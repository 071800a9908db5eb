package schema

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/internal/pgerr"
)

// DeciderRole is the role as which conflict functions are called: it may do what the operator has granted to it (and to
// PUBLIC), and nothing else.
const DeciderRole = "waystage_decider"

// decideBody calls one conflict function; what it raises comes back as a value, so that many can be asked by one statement. A
// statement that is canceled ends as a whole.
const decideBody = `
BEGIN
    EXECUTE pg_catalog.format('SELECT %I.%I($1, $2, $3, $4)', nsp, fn) INTO answer USING base, theirs, mine, info;
EXCEPTION WHEN OTHERS THEN
    answer := NULL; code := SQLSTATE; message := SQLERRM;
END
`

// ensureDecide makes waystage.decide, which belongs to [DeciderRole]: in a SECURITY DEFINER function nothing that is called
// can become another role again.
func ensureDecide(ctx context.Context, tx pgx.Tx) error {
	var good bool
	err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_roles r ON r.oid = p.proowner
		WHERE n.nspname = 'waystage' AND p.proname = 'decide' AND p.prosrc = $1 AND r.rolname = $2 AND p.prosecdef)`, decideBody, DeciderRole).Scan(&good)
	if err != nil || good {
		return err
	}
	const signature = "waystage.decide(text, text, jsonb, jsonb, jsonb, jsonb)"
	for _, sql := range []string{
		"DROP FUNCTION IF EXISTS " + signature,
		`CREATE FUNCTION waystage.decide(nsp text, fn text, base jsonb, theirs jsonb, mine jsonb, info jsonb, OUT answer jsonb, OUT code text, OUT message text)
			LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS ` + Literal(decideBody),
		"REVOKE ALL ON FUNCTION " + signature + " FROM PUBLIC",
		"GRANT EXECUTE ON FUNCTION " + signature + " TO CURRENT_USER",
		"GRANT CREATE ON SCHEMA waystage TO " + DeciderRole, // to own something there; for this transaction
		"ALTER FUNCTION " + signature + " OWNER TO " + DeciderRole,
		"REVOKE CREATE ON SCHEMA waystage FROM " + DeciderRole,
	} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// function checks that a subscription's conflict function is there, can be called, and promises to change nothing.
func (c *checker) function(ctx context.Context, conn Beginner, s *Subscription) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	at := s.places["function"]
	nsp, name, _ := strings.Cut(s.Function, ".")
	const signature = "(base jsonb, theirs jsonb, mine jsonb, info jsonb) RETURNS jsonb"
	var namespace, usage bool
	if err := tx.QueryRow(ctx, `SELECT n.oid IS NOT NULL, coalesce(has_schema_privilege($2, n.oid, 'USAGE'), false)
		FROM (SELECT 1) one LEFT JOIN pg_namespace n ON n.nspname = $1`, nsp, DeciderRole).Scan(&namespace, &usage); err != nil {
		return err
	}
	rows, err := tx.Query(ctx, `SELECT pg_get_function_identity_arguments(p.oid), format_type(p.prorettype, NULL), p.prokind = 'f' AND NOT p.proretset,
		p.pronargs = 4 AND p.proargtypes = (SELECT array_to_string(array_fill('jsonb'::regtype::oid, ARRAY[4]), ' ')::oidvector),
		p.provolatile = 'v', p.prosecdef, has_function_privilege($3, p.oid, 'EXECUTE')
		FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = $1 AND p.proname = $2 ORDER BY 4 DESC, 1`, nsp, name, DeciderRole)
	if err != nil {
		return err
	}
	type candidate struct {
		Args, Returns                                 string
		Plain, Fits, Volatile, Definer, MayBeExecuted bool
	}
	found, err := pgx.CollectRows(rows, pgx.RowToStructByPos[candidate])
	if err != nil {
		return err
	}
	function := Quote(nsp) + "." + Quote(name)
	switch {
	case !namespace:
		c.bad(at, fmt.Sprintf("the mirror has no schema %q", nsp), "create it, and the function in it, in the mirror: CREATE FUNCTION "+function+" "+signature)
	case len(found) == 0:
		c.bad(at, fmt.Sprintf("the mirror has no function %s", s.Function), "create it in the mirror: CREATE FUNCTION "+function+" "+signature)
	case !found[0].Fits:
		c.bad(at, fmt.Sprintf("function %s takes (%s)", s.Function, found[0].Args), "its parameters are "+signature)
	case found[0].Returns != "jsonb" || !found[0].Plain:
		c.bad(at, fmt.Sprintf("function %s does not return one jsonb", s.Function), "it is "+signature)
	case found[0].Volatile:
		c.bad(at, fmt.Sprintf("function %s is VOLATILE", s.Function), "it may decide only, not write: declare it STABLE or IMMUTABLE")
	case found[0].Definer:
		c.bad(at, fmt.Sprintf("function %s is SECURITY DEFINER, so it would have its owner's rights", s.Function),
			"declare it SECURITY INVOKER, and grant what it reads to "+DeciderRole)
	case !usage || !found[0].MayBeExecuted:
		c.bad(at, fmt.Sprintf("role %s may not call %s", DeciderRole, s.Function),
			fmt.Sprintf("GRANT USAGE ON SCHEMA %s TO %s; GRANT EXECUTE ON FUNCTION %s TO %[2]s", Quote(nsp), DeciderRole, function))
	}
	return nil
}

// Question to a conflict function. Images are JSON objects of texts and nulls, by column.
type Question struct {
	Base   *string // what the change was made on; nil: no row
	Theirs *string // what stands there; nil: no row
	Mine   string  // what the change would make of the row; JSON null: a delete
	Info   string  // object
}

// Reply of a conflict function: Answer, or what went wrong.
type Reply struct {
	Answer  *string // jsonb; nil: null
	Code    string  // SQLSTATE of an error; 57014: it took too long
	Message string
}

// TimedOut is the SQLSTATE of a function that took too long.
const TimedOut = "57014"

const (
	decideTogether = 200             // questions in one statement
	decidePatience = 2 * time.Second // for one statement; also for a single question that was asked with others in vain
	decideHangs    = 3               // after so many questions without an answer in time the function is asked no more
)

// Transaction is what asking needs of one.
type Transaction interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
	Conn() *pgx.Conn
}

// Ask asks a conflict function, in a transaction, as [DeciderRole]. An error is none of the function's doing. When a function has hung
// a few times, what is left is answered as [TimedOut] at once: it must not hold up others.
func Ask(ctx context.Context, tx Transaction, function string, questions []Question) ([]Reply, error) {
	out := make([]Reply, 0, len(questions))
	hung, single := 0, 0 // so many are asked one by one, to know which one hangs
	for len(questions) > 0 {
		n := min(decideTogether, len(questions))
		if single > 0 {
			n = 1
		}
		if hung >= decideHangs {
			out, questions = append(out, Reply{Code: TimedOut, Message: "it was not asked, since it did not answer several times before"}), questions[1:]
			continue
		}
		replies, err := ask(ctx, tx, function, questions[:n])
		switch {
		case err != nil && (!pgerr.Is(err, TimedOut) || ctx.Err() != nil):
			return nil, fmt.Errorf("ask %s: %w", function, err)
		case err != nil && n > 1:
			single = n
			continue
		case err != nil:
			hung++
			replies = []Reply{{Code: TimedOut, Message: fmt.Sprintf("it did not answer within %s", decidePatience)}}
		}
		out, questions, single = append(out, replies...), questions[n:], max(0, single-1)
	}
	return out, nil
}

// ask asks by one statement. A rollback to the savepoint undoes the settings, whatever the function did.
func ask(ctx context.Context, tx Transaction, function string, questions []Question) (replies []Reply, err error) {
	nsp, name, _ := strings.Cut(function, ".")
	n := len(questions)
	base, theirs, mine, info := make([]*string, n), make([]*string, n), make([]string, n), make([]string, n)
	for i, q := range questions {
		base[i], theirs[i], mine[i], info[i] = q.Base, q.Theirs, q.Mine, q.Info
	}
	if _, err := tx.Exec(ctx, "SAVEPOINT ws_decide"); err != nil {
		return nil, err
	}
	batch := &pgx.Batch{}
	batch.Queue("SET LOCAL transaction_read_only = on")
	batch.Queue(fmt.Sprintf("SET LOCAL statement_timeout = %d", decidePatience.Milliseconds()))
	batch.Queue(`SELECT d.answer::text, coalesce(d.code, ''), left(coalesce(d.message, ''), 500)
		FROM unnest($3::jsonb[], $4::jsonb[], $5::jsonb[], $6::jsonb[]) WITH ORDINALITY AS q(base, theirs, mine, info, i),
			LATERAL waystage.decide($1, $2, q.base, q.theirs, q.mine, q.info) AS d ORDER BY q.i`, nsp, name, base, theirs, mine, info).Query(func(rows pgx.Rows) error {
		replies, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Reply])
		return err
	})
	err = tx.SendBatch(ctx, batch).Close()
	if tx.Conn().IsClosed() {
		return nil, err
	}
	for _, sql := range []string{"ROLLBACK TO SAVEPOINT ws_decide", "RELEASE SAVEPOINT ws_decide"} {
		if _, rerr := tx.Exec(ctx, sql); rerr != nil && err == nil {
			err = rerr
		}
	}
	return replies, err
}
