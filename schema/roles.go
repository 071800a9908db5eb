package schema

import (
	"fmt"
	"strings"
)

// RolesScript is SQL for administrators who do not want Waystage to own anything: it makes a role with the least
// privileges at the source and another at the mirror. Passwords are left to be set with \password.
func RolesScript(sourceRole, sourceDatabase, mirrorRole, mirrorDatabase string, tables []*Table) string {
	var b strings.Builder
	role := Quote(sourceRole)
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("-- At the source, connected to its database, as an administrator:")
	p("CREATE ROLE %s LOGIN REPLICATION;", role)
	p("-- Row security must not hide rows from the copy. Needed only where tables have policies:")
	p("-- ALTER ROLE %s BYPASSRLS;", role)
	p("GRANT CONNECT, CREATE ON DATABASE %s TO %s;", Quote(sourceDatabase), role)
	p("CREATE SCHEMA IF NOT EXISTS waystage AUTHORIZATION %s;", role)
	seen := map[string]bool{}
	for _, t := range tables {
		if !seen[t.Schema] {
			seen[t.Schema] = true
			p("GRANT USAGE ON SCHEMA %s TO %s;", Quote(t.Schema), role)
		}
		p("GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO %s;", t.Ident(), role)
	}
	if len(tables) > 0 {
		p("-- Only a table's owner may publish it. The publication is Waystage's, to which its own table is added.")
		p("CREATE PUBLICATION %s FOR TABLE %s;", PublicationDown, idents(tables))
		p("ALTER PUBLICATION %s OWNER TO %s;", PublicationDown, role)
	}
	mirror := Quote(mirrorRole)
	p("")
	p("-- At the mirror, as an administrator:")
	p("CREATE ROLE %s LOGIN REPLICATION;", mirror)
	p("CREATE ROLE %s NOLOGIN NOINHERIT;", ReaderRole)
	p("GRANT %s TO %s;", ReaderRole, mirror)
	p("CREATE ROLE %s NOLOGIN NOINHERIT;", DeciderRole)
	p("GRANT %s TO %s;", DeciderRole, mirror)
	p("CREATE DATABASE %s OWNER %s TEMPLATE template0 ENCODING 'UTF8';", Quote(mirrorDatabase), mirror)
	return b.String()
}
