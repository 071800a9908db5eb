package schema

import (
	"strings"
	"testing"
)

// A conflict function is held against what it must be before definitions come into force; what is wrong has its place in the file.
func TestCheckConflictFunctions(t *testing.T) {
	ctx := testContext(t)
	d := define(t, `version: 1
subscriptions:
  a:
    table: public.a
    conflict: {function: care.good}
`)
	_, _, tables, dsn := mirrored(t, d, "CREATE TABLE public.a (id int PRIMARY KEY, t text)")
	conn := connect(t, dsn)
	const body = " RETURNS jsonb LANGUAGE sql STABLE AS 'SELECT NULL::jsonb'"
	exec(t, conn, "CREATE SCHEMA care", "CREATE SCHEMA closed", "GRANT USAGE ON SCHEMA care TO "+DeciderRole,
		"CREATE FUNCTION care.good(b jsonb, t jsonb, m jsonb, i jsonb)"+body,
		"CREATE FUNCTION care.three(b jsonb, t jsonb, m jsonb)"+body,
		"CREATE FUNCTION care.texts(b text, t text, m text, i text)"+body,
		"CREATE FUNCTION care.gives(b jsonb, t jsonb, m jsonb, i jsonb) RETURNS text LANGUAGE sql STABLE AS 'SELECT 1'",
		"CREATE FUNCTION care.many(b jsonb, t jsonb, m jsonb, i jsonb) RETURNS SETOF jsonb LANGUAGE sql STABLE AS 'SELECT b'",
		"CREATE FUNCTION care.writes(b jsonb, t jsonb, m jsonb, i jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT b'",
		"CREATE FUNCTION care.definer(b jsonb, t jsonb, m jsonb, i jsonb) RETURNS jsonb LANGUAGE sql STABLE SECURITY DEFINER AS 'SELECT b'",
		"CREATE FUNCTION care.revoked(b jsonb, t jsonb, m jsonb, i jsonb)"+body, "REVOKE ALL ON FUNCTION care.revoked FROM PUBLIC",
		"CREATE FUNCTION closed.good(b jsonb, t jsonb, m jsonb, i jsonb)"+body,
		`CREATE FUNCTION care."Odd-Name"(b jsonb, t jsonb, m jsonb, i jsonb)`+body,
		"CREATE FUNCTION care.over(b jsonb)"+body, "CREATE FUNCTION care.over(b jsonb, t jsonb, m jsonb, i jsonb)"+body)
	for name, want := range map[string]string{
		"care.good": "", "care.Odd-Name": "", "care.over": "",
		"care.nosuch":  "the mirror has no function care.nosuch",
		"none.good":    `the mirror has no schema "none"`,
		"care.three":   "takes (b jsonb, t jsonb, m jsonb)",
		"care.texts":   "takes (b text",
		"care.gives":   "does not return one jsonb",
		"care.many":    "does not return one jsonb",
		"care.writes":  "is VOLATILE",
		"care.definer": "is SECURITY DEFINER",
		"care.revoked": "role waystage_decider may not call care.revoked",
		"closed.good":  "role waystage_decider may not call closed.good",
	} {
		g := define(t, strings.Replace(d.Body, "care.good", name, 1))
		g.Check(tables)
		problems, err := g.CheckLive(ctx, conn)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		switch {
		case want == "" && len(problems) > 0:
			t.Errorf("%s: %v", name, problems)
		case want != "" && (len(problems) != 1 || !strings.Contains(problems[0].String(), want) || problems[0].Remedy == "" || problems[0].Warning):
			t.Errorf("%s: want %q, got %v", name, want, problems)
		case want != "" && !strings.Contains(problems[0].String(), ":5:26: "):
			t.Errorf("%s: its place is not in %s", name, problems[0].String())
		}
	}
	// The wrapper is not for everybody, and is made once.
	equal(t, column(t, conn, `SELECT r.rolname || ' ' || p.prosecdef || ' ' || has_function_privilege('waystage_reader', p.oid, 'EXECUTE') || ' ' || has_schema_privilege('waystage_decider', 'waystage', 'CREATE')
		FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner WHERE p.oid = 'waystage.decide'::regproc`), []string{"waystage_decider true false false"})
	before := column(t, conn, "SELECT 'waystage.decide'::regproc::oid::text")
	if err := EnsureMirror(ctx, conn, tables, d); err != nil {
		t.Fatal(err)
	}
	equal(t, column(t, conn, "SELECT 'waystage.decide'::regproc::oid::text"), before)
}
