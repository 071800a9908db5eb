// Package nurse is the data set of the demonstration, the benchmark and many tests: the database of a home health
// care service, whose nurses carry their patients' records with them.
//
// It promises the same rows for the same size, whenever and wherever it is loaded, and one row of each type and
// constraint that makes syncing hard: numeric scales, time zones, jsonb, uuid, bytea, enums, a trigger that stamps
// rows and one that rewrites what was typed. cmd and tests call it.
package nurse

import (
	"context"
	_ "embed"
	"fmt"
	"io"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Size says how much data to make.
type Size struct {
	Nurses   int
	Patients int
	Records  int // medical records, spread evenly over the patients
}

// Default is the size of the demonstration.
var Default = Size{Nurses: 50, Patients: 2000, Records: 20000}

// FirstPatient is the number of the first patient; the others follow without gaps.
const FirstPatient = 100001

// Person is a nurse.
type Person struct {
	ID    int
	Login string // valid as a user name
	Name  string
}

// Nurses lists the nurses of a data set with n of them. The second of any two neighbours (1 and 2, 2 and 3, ...)
// shares some patients with the first.
func Nurses(n int) []Person {
	people := make([]Person, n)
	for i := range people {
		first := nurseNames[i%len(nurseNames)]
		login := strings.ToLower(first)
		if round := i / len(nurseNames); round > 0 {
			login = fmt.Sprintf("%s%d", login, round+1)
		}
		people[i] = Person{ID: i + 1, Login: login, Name: first + " " + lastNames[(i*7)%len(lastNames)]}
	}
	return people
}

//go:embed schema.sql
var tables string

//go:embed constraints.sql
var constraints string

//go:embed definitions.yaml
var definitions string

// What [Definitions] says a nurse has.
const (
	Set   = "field"
	Group = "nurses"
)

// Definitions is the definitions file (YAML, see package schema) for the data set: set "field" for group "nurses", in
// which each nurse sees the patients assigned to her.
func Definitions() string { return definitions }

// Load makes the schema vn and fills it, in one transaction. The database must not have a schema of that name.
func Load(ctx context.Context, conn *pgx.Conn, size Size) error {
	if size.Nurses < 2 || size.Patients < 1 || size.Records < 0 {
		return fmt.Errorf("nurse: a data set needs 2 nurses and a patient at least, not %+v", size)
	}
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, tables); err != nil {
			return fmt.Errorf("make the tables: %w", err)
		}
		for _, t := range contents(size) {
			sql := fmt.Sprintf("COPY vn.%s FROM STDIN", t.name)
			if _, err := conn.PgConn().CopyFrom(ctx, &copyReader{rows: t.rows, n: t.count}, sql); err != nil {
				return fmt.Errorf("fill vn.%s: %w", t.name, err)
			}
		}
		if _, err := tx.Exec(ctx, constraints); err != nil {
			return fmt.Errorf("add constraints and triggers: %w", err)
		}
		return nil
	})
}

// table is a table's name and rows.
type table struct {
	name  string
	count int
	rows  func(i int) []string // row i in the order of the table's columns, as PostgreSQL text; null is NULL
}

// null stands for NULL: no text of the data set contains it.
const null = "\x00"

// copyReader turns rows into the text format of COPY as they are read.
type copyReader struct {
	rows func(i int) []string
	n    int // rows in all
	i    int // next row
	buf  []byte
}

var copyEscapes = strings.NewReplacer(`\`, `\\`, "\n", `\n`, "\r", `\r`, "\t", `\t`)

func (r *copyReader) Read(p []byte) (int, error) {
	for len(r.buf) < len(p) && r.i < r.n {
		for j, v := range r.rows(r.i) {
			if j > 0 {
				r.buf = append(r.buf, '\t')
			}
			if v == null {
				r.buf = append(r.buf, `\N`...)
			} else {
				r.buf = append(r.buf, copyEscapes.Replace(v)...)
			}
		}
		r.buf = append(r.buf, '\n')
		r.i++
	}
	if len(r.buf) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.buf)
	r.buf = append(r.buf[:0], r.buf[n:]...)
	return n, nil
}
