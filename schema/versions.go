package schema

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Version is a stored version of the definitions.
type Version struct {
	Number    int       `json:"version"` // from 1, without gaps
	SHA256    string    `json:"sha256"`  // of the body, hex
	AppliedAt time.Time `json:"applied_at"`
	Who       string    `json:"who"`
	Note      string    `json:"note"`
	Bytes     int       `json:"bytes"` // of the body
	Current   bool      `json:"current"`
	Body      string    `json:"-"`
}

// Author says whose a version is, and what for.
type Author struct{ Who, Note string }

// MostNote bounds the note of a version, in bytes.
const MostNote = 1000

// ErrNoVersion is returned when there is no stored version of that number.
var ErrNoVersion = errors.New("there is no such version of the definitions")

// Parse reads the version's body.
func (v *Version) Parse() (*Definitions, []Problem) {
	return ParseDefinitions(fmt.Sprintf("definitions version %d", v.Number), []byte(v.Body))
}

const versionColumns = `SELECT version, sha256, applied_at, who, note, octet_length(body), version = (SELECT max(version) FROM waystage.definition), body FROM waystage.definition`

func scanVersion(row pgx.CollectableRow) (Version, error) {
	var v Version
	return v, row.Scan(&v.Number, &v.SHA256, &v.AppliedAt, &v.Who, &v.Note, &v.Bytes, &v.Current, &v.Body)
}

// Versions lists the stored versions, the newest first.
func Versions(ctx context.Context, q Querier) ([]Version, error) {
	rows, err := q.Query(ctx, versionColumns+" ORDER BY version DESC")
	if err != nil {
		return nil, fmt.Errorf("list versions of the definitions: %w", err)
	}
	list, err := pgx.CollectRows(rows, scanVersion)
	if err != nil {
		return nil, fmt.Errorf("list versions of the definitions: %w", err)
	}
	return list, nil
}

// LoadVersion reads one stored version; number 0 is the one in force. [ErrNoVersion] when there is none.
func LoadVersion(ctx context.Context, q Querier, number int) (*Version, error) {
	rows, err := q.Query(ctx, versionColumns+" WHERE version = $1 OR $1 = 0 ORDER BY version DESC LIMIT 1", number)
	if err != nil {
		return nil, fmt.Errorf("read the definitions: %w", err)
	}
	v, err := pgx.CollectExactlyOneRow(rows, scanVersion)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, ErrNoVersion
	}
	if err != nil {
		return nil, fmt.Errorf("read the definitions: %w", err)
	}
	return &v, nil
}

// saveDefinitions stores the definitions as the version in force and returns its number. The body in force again is no
// new version. The set-up lock must be held.
func saveDefinitions(ctx context.Context, q Querier, d *Definitions, by Author) (int, error) {
	var version int
	err := q.QueryRow(ctx, `WITH last AS (SELECT version, sha256 FROM waystage.definition ORDER BY version DESC LIMIT 1),
		new AS (INSERT INTO waystage.definition (version, body, sha256, who, note)
			SELECT coalesce((SELECT version FROM last), 0) + 1, $1, $2, $3, $4 WHERE $2 IS DISTINCT FROM (SELECT sha256 FROM last) RETURNING version)
		SELECT coalesce((SELECT version FROM new), (SELECT version FROM last))`, d.Body, d.SHA256(), by.Who, by.Note).Scan(&version)
	if err != nil {
		return 0, fmt.Errorf("save definitions: %w", err)
	}
	return version, nil
}

// LoadDefinitions reads the version in force, and the tables, against which it is complete. [ErrNotSetUp] when there is none.
func LoadDefinitions(ctx context.Context, q Querier) (*Definitions, []*Table, error) {
	v, err := LoadVersion(ctx, q, 0)
	if errors.Is(err, ErrNoVersion) {
		return nil, nil, ErrNotSetUp
	}
	if err != nil {
		return nil, nil, err
	}
	tables, err := LoadTables(ctx, q)
	if err != nil {
		return nil, nil, err
	}
	d, problems := v.Parse()
	if d != nil {
		problems = append(problems, d.Check(tables)...)
	}
	if _, err := Refusing(problems); err != nil {
		return nil, nil, fmt.Errorf("load definitions: %w", err)
	}
	return d, tables, nil
}

// stored takes the version in force in place of the given definitions, if there is one.
func (s *setup) stored(ctx context.Context) error {
	v, err := LoadVersion(ctx, s.mirror, 0)
	if errors.Is(err, ErrNoVersion) {
		if s.Definitions == nil {
			return ErrNoDefinitions
		}
		return nil
	}
	if err != nil {
		return err
	}
	d, problems := v.Parse()
	if _, err := Refusing(problems); err != nil {
		return fmt.Errorf("version %d of the definitions, which is in force, is not one that this program reads: %w", v.Number, err)
	}
	s.Definitions = d
	return nil
}

// ErrNoDefinitions is returned when there are neither stored nor given definitions.
var ErrNoDefinitions = errors.New("no definitions")
