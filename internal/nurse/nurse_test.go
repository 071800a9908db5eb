package nurse_test

import (
	"context"
	"errors"
	"os"
	"regexp"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/schema"
)

func TestMain(m *testing.M) { pgtest.MainNoLeaks(m) }

func load(t *testing.T, size nurse.Size) *pgx.Conn {
	t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, pgtest.Source(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(ctx) })
	if _, err := conn.Exec(ctx, "set timezone to utc"); err != nil { // the fingerprint is of texts
		t.Fatal(err)
	}
	began := time.Now()
	if err := nurse.Load(ctx, conn, size); err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v loaded in %s", size, time.Since(began))
	return conn
}

func number(t *testing.T, conn *pgx.Conn, sql string, args ...any) int {
	t.Helper()
	var n int
	if err := conn.QueryRow(context.Background(), sql, args...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return n
}

func TestDefaultSize(t *testing.T) {
	t.Parallel()
	conn := load(t, nurse.Default)
	for table, want := range map[string]int{
		"nurse": 50, "patient": 2000, "assignment": 2500, "medication": 75, "prescription": 4000, "visit": 4000, "medical_record": 20000,
	} {
		if got := number(t, conn, "select count(*) from vn."+table); got != want {
			t.Errorf("%s has %d rows, want %d", table, got, want)
		}
	}
	people := nurse.Nurses(nurse.Default.Nurses)
	names := regexp.MustCompile(`^[a-z0-9_-]{1,64}$`)
	const patients = "select a.patient_id from vn.assignment a join vn.nurse n on n.id = a.nurse_id where n.login = $1"
	for i, p := range people {
		if !names.MatchString(p.Login) {
			t.Errorf("%q cannot be a user name", p.Login)
		}
		if got := number(t, conn, "select count(*) from ("+patients+") x", p.Login); got < 40 {
			t.Errorf("%s has %d patients only", p.Login, got)
		}
		if i == 0 {
			continue
		}
		shared := number(t, conn, "select count(*) from ("+patients+" intersect select a.patient_id from vn.assignment a join vn.nurse n on n.id = a.nurse_id where n.login = $2) x",
			people[0].Login, p.Login)
		if i == 1 && shared < 10 {
			t.Errorf("%s and %s share %d patients only", people[0].Login, p.Login, shared)
		}
	}
	if got := number(t, conn, `select count(distinct format_type(atttypid, null)) from pg_attribute a join pg_class c on c.oid = attrelid
		where relnamespace = 'vn'::regnamespace and relkind = 'r' and attnum > 0`); got < 11 {
		t.Errorf("%d column types only", got)
	}
}

func fingerprint(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	var sum string
	if err := conn.QueryRow(context.Background(), `
		select md5(string_agg(x, E'\n' order by x)) from (
			select r::text x from vn.nurse r union all select r::text from vn.patient r union all select r::text from vn.assignment r
			union all select r::text from vn.medication r union all select r::text from vn.prescription r
			union all select r::text from vn.visit r union all select r::text from vn.medical_record r) x`).Scan(&sum); err != nil {
		t.Fatal(err)
	}
	return sum
}

func TestSameRowsEachTime(t *testing.T) {
	t.Parallel()
	size := nurse.Size{Nurses: 70, Patients: 90, Records: 300}
	const want = "84c4aa89d89dfd6c90c5e3cf04bd968e"
	for range 2 {
		if got := fingerprint(t, load(t, size)); got != want {
			t.Errorf("fingerprint %s, want %s (if the data set was changed on purpose, change it here)", got, want)
		}
	}
}

func TestTheDatabaseJudges(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	conn := load(t, nurse.Size{Nurses: 2, Patients: 5, Records: 10})

	var name, phone string
	if err := conn.QueryRow(ctx, `update vn.patient set name = '  Ada   Quist ', phone = '+49 (30) 123-45' where id = $1 returning name, phone`,
		nurse.FirstPatient).Scan(&name, &phone); err != nil {
		t.Fatal(err)
	}
	if name != "Ada Quist" || phone != "+493012345" {
		t.Errorf("not normalised: %q, %q", name, phone)
	}
	if got := number(t, conn, `with u as (update vn.medical_record set pulse = 71, updated_at = '2000-01-01' returning updated_at)
		select count(*) from u where updated_at > now() - interval '1 hour'`); got != 10 {
		t.Errorf("%d records were stamped, want 10", got)
	}
	for constraint, sql := range map[string]string{
		"blood_pressure_possible":        "update vn.medical_record set systolic = 80, diastolic = 120",
		"pulse_possible":                 "update vn.medical_record set pulse = 7",
		"temperature_possible":           "update vn.medical_record set temperature = 99.9",
		"medical_record_patient_id_fkey": "update vn.medical_record set patient_id = 1",
		"prescription_medication_fkey":   "insert into vn.prescription values (100001, 'none', 1, 1, '2026-01-01')",
		"patient_allergies_check":        `update vn.patient set allergies = '{}'`,
		"patient_insurance_key":          `update vn.patient set insurance = 'cafecafe-0000-4000-8000-000000000000'`,
		"assignment_patient_id_fkey":     "delete from vn.patient",
	} {
		_, err := conn.Exec(ctx, sql)
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.ConstraintName != constraint {
			t.Errorf("%s: %v, want constraint %s", sql, err, constraint)
		}
	}
}

func TestLoadRefusesNonsense(t *testing.T) {
	t.Parallel()
	conn := load(t, nurse.Size{Nurses: 2, Patients: 1, Records: 0})
	if err := nurse.Load(context.Background(), conn, nurse.Size{Nurses: 1}); err == nil {
		t.Error("loaded with one nurse")
	}
	if err := nurse.Load(context.Background(), conn, nurse.Default); err == nil {
		t.Error("loaded twice")
	}
	if got := number(t, conn, "select count(*) from vn.patient"); got != 1 {
		t.Errorf("%d patients after the failed load", got)
	}
}

func TestDefinitionsFitTheTables(t *testing.T) {
	t.Parallel()
	conn := load(t, nurse.Size{Nurses: 2, Patients: 2, Records: 2})
	defs, problems := schema.ParseDefinitions("definitions.yaml", []byte(nurse.Definitions()))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	tables, problems, err := schema.ReadTables(context.Background(), conn, defs.TableNames())
	if err != nil {
		t.Fatal(err)
	}
	if len(problems) > 0 || len(tables) != 7 {
		t.Fatal(len(tables), problems)
	}
	if problems := defs.Check(tables); len(problems) > 0 {
		t.Fatal(problems)
	}
	if sets := defs.SetsFor([]string{nurse.Group}); len(sets) != 1 || sets[0] != nurse.Set {
		t.Errorf("sets of %s: %v", nurse.Group, sets)
	}
}

// docker-compose.yml starts its source from these files.
func TestComposeSample(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, pgtest.Source(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(ctx) })
	for _, file := range []string{"schema.sql", "../../deploy/sample.sql", "constraints.sql"} {
		body, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Exec(ctx, string(body)); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
	}
	if got := number(t, conn, "select count(*) from vn.medical_record"); got != 3 {
		t.Errorf("%d records", got)
	}
}
