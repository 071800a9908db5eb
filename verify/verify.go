// Package verify compares mirror and source: it names every row and column in which they differ for good, and nothing that
// is only on its way. It also checks what must hold among Waystage's own tables on the mirror.
//
// It promises to read only (but for one row in Waystage's own table at the source, see [Options.Marker]), in short
// statements, without a lock that anybody waits for; to compare the bytes that the servers' output functions give, under the
// same settings on both sides; and to call a row different only after the mirror has passed the position at which the source
// was read, twice, the source's row being the same before and after. `waystage verify` calls it.
package verify

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/schema"
)

// Options of a comparison. The zero value of a field takes the default.
type Options struct {
	Source, Mirror *pgxpool.Pool // with canonical settings (schema.Config)

	Tables  []string      // "schema.table"; none: all synced tables
	Chunk   int           // rows that one statement reads, about (default 20,000)
	Rate    int           // rows a second that are read on each side at most; 0: no bound
	Pause   time.Duration // between two statements
	Timeout time.Duration // of one statement (default 30 s); one that takes longer is tried again on fewer rows
	Wait    time.Duration // how long the mirror may take to pass a position of the source (default 1 min)
	Most    int           // rows named per table (default 100)
	Marker  bool          // on an idle source, give the mirror something to pass: insert and delete a row of waystage.progress there

	Progress func(Progress) // may be nil
}

func (o Options) withDefaults() Options {
	if o.Chunk <= 0 {
		o.Chunk = 20_000
	}
	if o.Timeout <= 0 {
		o.Timeout = 30 * time.Second
	}
	if o.Wait <= 0 {
		o.Wait = time.Minute
	}
	if o.Most <= 0 {
		o.Most = 100
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	return o
}

// Progress says how far the comparison is.
type Progress struct {
	Table string
	Done  int64 // rows read on both sides
	Total int64 // estimate
}

// States of a table.
const (
	Equal     = "equal"
	Differs   = "different"
	Undecided = "undecided" // some rows changed at every look, or the mirror did not get to the source's position
	Skipped   = "skipped"   // the table takes no part in replication at present
	Failed    = "failed"    // could not be read
)

// Report of a comparison.
type Report struct {
	Epoch    string        `json:"epoch"`
	Position string        `json:"position"` // of the source: the mirror has passed it
	At       time.Time     `json:"at"`
	Took     time.Duration `json:"took_ns"`
	Values   bool          `json:"values"` // the values that differ are given
	Tables   []TableReport `json:"tables"`
	Checks   []Check       `json:"checks"`
}

// TableReport is what was found of one table.
type TableReport struct {
	Table      string  `json:"table"`
	State      string  `json:"state"`
	SourceRows int64   `json:"source_rows"`
	MirrorRows int64   `json:"mirror_rows"`
	InFlight   int64   `json:"in_flight"` // rows that differed at first, and no longer when the mirror had caught up
	Different  int64   `json:"different"` // rows that differ for good
	More       bool    `json:"more"`      // there may be more of them: not all were looked at
	Undecided  int64   `json:"undecided"` // rows that could not be decided
	Rows       []Row   `json:"rows"`      // the different ones, by key
	Why        string  `json:"why"`       // for undecided, skipped and failed
	Seconds    float64 `json:"seconds"`   // wall time
	err        error   // its error
}

// Kinds of a [Row].
const (
	MissingInMirror = "missing_in_mirror"
	MissingInSource = "missing_in_source"
	ValuesDiffer    = "values"
)

// Row is a row that differs.
type Row struct {
	Kind    string   `json:"kind"`
	Key     []string `json:"key"`     // in key order
	Pending bool     `json:"pending"` // device changes wait for the source's verdict: their base image was compared, not the mirror's row
	Columns []Column `json:"columns"` // for values: those that differ; else all
}

// Column of a [Row] that differs: PostgreSQL text, null for NULL or when there is no row.
type Column struct {
	Name   string  `json:"name"`
	Source *string `json:"source"`
	Mirror *string `json:"mirror"`
}

// Different tells whether anything differs for good or a check has failed.
func (r *Report) Different() bool {
	return slices.ContainsFunc(r.Tables, func(t TableReport) bool { return t.Different > 0 }) ||
		slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Count > 0 })
}

// Complete tells whether every table was decided.
func (r *Report) Complete() bool {
	return !slices.ContainsFunc(r.Tables, func(t TableReport) bool { return t.State != Equal && t.State != Differs })
}

// Err is the first failure to read a table, nil when all could be read.
func (r *Report) Err() error {
	for _, t := range r.Tables {
		if t.err != nil {
			return fmt.Errorf("table %s: %w", t.Table, t.err)
		}
	}
	return nil
}

// UnknownTableError says that a table which was asked for is not synced.
type UnknownTableError struct {
	Table string
	Known []string
}

func (e *UnknownTableError) Error() string {
	return fmt.Sprintf("table %q is not synced; synced are %v", e.Table, e.Known)
}

// ErrCopying says that there is nothing to compare yet.
var ErrCopying = errors.New("the initial copy is not complete: 'waystage status' shows it")

// run is one comparison.
type run struct {
	o        Options
	epoch    string
	seed     int64
	hash     func(text string) string // SQL that makes a bigint of a text
	position string                   // of the source, the last that the mirror has passed
}

// Compare compares. A table that cannot be read is reported as failed and does not keep the others from being compared;
// an error is returned when nothing can be said at all. [schema.ErrNotSetUp] when the mirror is not set up.
func Compare(ctx context.Context, o Options) (*Report, error) {
	r := &run{o: o.withDefaults(), seed: rand.Int64()} // another seed at each run: no collision of hashes stays hidden for ever
	began := time.Now()
	tables, err := r.tables(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.agree(ctx); err != nil {
		return nil, err
	}
	rep := &Report{Epoch: r.epoch, At: began.UTC(), Tables: []TableReport{}}
	for _, t := range tables {
		start := time.Now()
		tr := r.table(ctx, t)
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		tr.Seconds = time.Since(start).Seconds()
		rep.Tables = append(rep.Tables, tr)
	}
	if rep.Checks, err = r.checks(ctx); err != nil {
		return nil, err
	}
	rep.Position, rep.Took = r.position, time.Since(began)
	return rep, nil
}

// tables are those to be compared.
func (r *run) tables(ctx context.Context) ([]*schema.Table, error) {
	all, err := schema.LoadTables(ctx, r.o.Mirror)
	if err != nil {
		return nil, err
	}
	err = r.o.Mirror.QueryRow(ctx, "SELECT value FROM waystage.meta WHERE key = 'epoch'").Scan(&r.epoch)
	var copied bool
	if err == nil {
		err = r.o.Mirror.QueryRow(ctx, "SELECT EXISTS (SELECT FROM waystage.meta WHERE key = 'copy' AND value = 'done')").Scan(&copied)
	}
	switch {
	case errors.Is(err, pgx.ErrNoRows), err == nil && len(all) == 0:
		return nil, schema.ErrNotSetUp
	case err != nil:
		return nil, fmt.Errorf("read the epoch: %w", err)
	case !copied:
		return nil, ErrCopying
	}
	if len(r.o.Tables) == 0 {
		return all, nil
	}
	var out []*schema.Table
	for _, name := range r.o.Tables {
		i := slices.IndexFunc(all, func(t *schema.Table) bool { return t.FullName() == name })
		if i < 0 {
			e := &UnknownTableError{Table: name}
			for _, t := range all {
				e.Known = append(e.Known, t.FullName())
			}
			return nil, e
		}
		if !slices.Contains(out, all[i]) {
			out = append(out, all[i])
		}
	}
	return out, nil
}

// agree finds a hash that both servers compute alike: the built-in one is fast, but bound to byte order and encoding.
func (r *run) agree(ctx context.Context) error {
	fast := func(text string) string {
		return fmt.Sprintf(`pg_catalog.hashtextextended(%s COLLATE "C", %d)`, text, r.seed)
	}
	probe := func(db *pgxpool.Pool, side string) (hash int64, encoding string, err error) {
		err = db.QueryRow(ctx, "SELECT "+fast("'waystage'::text")+", pg_catalog.current_setting('server_encoding')").Scan(&hash, &encoding)
		if err != nil {
			err = fmt.Errorf("%s: %w", side, err)
		}
		return hash, encoding, err
	}
	h1, e1, err := probe(r.o.Source, "source")
	if err != nil {
		return err
	}
	h2, e2, err := probe(r.o.Mirror, "mirror")
	if err != nil {
		return err
	}
	r.hash = fast
	if h1 != h2 || e1 != e2 {
		r.hash = func(text string) string {
			return fmt.Sprintf(`('x' || pg_catalog.left(pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(%s || %s, 'UTF8')), 'hex'), 16))::bit(64)::bigint`,
				text, schema.Literal(fmt.Sprint(r.seed)))
		}
	}
	return nil
}

// table compares one table.
func (r *run) table(ctx context.Context, t *schema.Table) TableReport {
	rep := TableReport{Table: t.FullName(), State: Equal, Rows: []Row{}}
	if t.Stop != nil {
		rep.State, rep.Why = Skipped, fmt.Sprintf("the table is stopped since %s: %s; see 'waystage schema diff'", t.Stop.At.UTC().Format(time.RFC3339), t.Stop.Code)
		return rep
	}
	fail := func(err error) TableReport {
		rep.State, rep.Why, rep.err = Failed, err.Error(), err
		return rep
	}
	c, err := r.comparison(ctx, t)
	if err != nil {
		return fail(err)
	}
	suspects, err := c.scan(ctx, &rep)
	if err != nil {
		return fail(err)
	}
	pending, err := c.pendingKeys(ctx)
	if err != nil {
		return fail(err)
	}
	for id, key := range pending {
		suspects[id] = key
	}
	err = c.recheck(ctx, suspects, &rep)
	var behind *BehindError
	switch {
	case errors.As(err, &behind):
		rep.State, rep.Why = Undecided, err.Error()
	case err != nil:
		return fail(err)
	case rep.Undecided > 0:
		rep.State, rep.Why = Undecided, "rows changed at every look, or a transaction of the source's server stayed open"
	}
	if rep.Different > 0 {
		rep.State = Differs
	}
	return rep
}
