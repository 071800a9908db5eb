package schema

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Kind of a conflict function's ruling.
type Kind byte

// Kinds.
const (
	Silent    Kind = iota // it gave null
	Absent                // the row shall be absent
	Standing              // it gave what stands there
	Another               // another row
	Raised                // it raised an error of its own
	Senseless             // it failed, took too long, or gave no row of the table
)

// Ruling is a conflict function's reply, understood.
type Ruling struct {
	Kind  Kind
	Write string // Another: the columns that differ from what stands there, as a JSON object of texts and nulls
	Why   string // Raised, Senseless: a sentence for the device's user, which shows no value that is not the function's own message
	Log   string // what the operator must know beside it
}

// Rule holds replies against a table: that they are rows of it, with values that fit their columns.
func Rule(ctx context.Context, q Querier, t *Table, questions []Question, replies []Reply) ([]Ruling, error) {
	out := make([]Ruling, len(replies))
	var places []int
	var writes []string
	for i, r := range replies {
		out[i] = t.ruling(questions[i], r)
		if out[i].Kind == Another {
			places, writes = append(places, i), append(writes, out[i].Write)
		}
	}
	if len(places) == 0 {
		return out, nil
	}
	rows, err := q.Query(ctx, `SELECT u.i, v.col, v.why FROM unnest($1::jsonb[]) WITH ORDINALITY AS u(vals, i), LATERAL waystage.bad_value(`+
		Literal(t.Ident())+`::regclass, u.vals) AS v WHERE v.why IS NOT NULL`, writes)
	if err != nil {
		return nil, fmt.Errorf("check a function's rows: %w", err)
	}
	var i int
	var col, why string
	_, err = pgx.ForEachRow(rows, []any{&i, &col, &why}, func() error {
		out[places[i-1]] = Ruling{Kind: Senseless, Why: fmt.Sprintf("it gave a value that does not fit column %s", col), Log: why}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("check a function's rows: %w", err)
	}
	return out, nil
}

func (t *Table) ruling(q Question, r Reply) Ruling {
	senseless := func(why, log string) Ruling { return Ruling{Kind: Senseless, Why: why, Log: log} }
	switch {
	case r.Code == "P0001": // RAISE EXCEPTION
		return Ruling{Kind: Raised, Why: r.Message}
	case r.Code == TimedOut:
		return senseless(r.Message, r.Message)
	case r.Code != "":
		return senseless("it failed, SQLSTATE "+r.Code, r.Code+": "+r.Message)
	case r.Answer == nil:
		return Ruling{Kind: Silent}
	case *r.Answer == "null":
		if q.Mine != "null" && q.Theirs != nil {
			return senseless("it gave JSON null, which is for deletes", "JSON null for what is no delete")
		}
		return Ruling{Kind: Absent}
	}
	answer := map[string]json.RawMessage{}
	if err := json.Unmarshal([]byte(*r.Answer), &answer); err != nil {
		return senseless("it gave no JSON object", err.Error())
	}
	var theirs, mine map[string]*string
	if q.Theirs != nil {
		if err := json.Unmarshal([]byte(*q.Theirs), &theirs); err != nil {
			return senseless("what stands there cannot be read", err.Error())
		}
	}
	if err := json.Unmarshal([]byte(q.Mine), &mine); err != nil {
		return senseless("the change cannot be read", err.Error())
	}
	write := map[string]*string{}
	for col, raw := range answer {
		value, err := scalar(raw)
		c, ok := t.Column(col)
		switch {
		case err != nil:
			return senseless("it gave a value that cannot be read", err.Error())
		case !ok:
			return senseless("it gave a column that the table does not have", fmt.Sprintf("%s has no column %q", t.FullName(), col))
		case t.IsKey(c.Name):
			is := func(m map[string]*string) bool { v, ok := m[col]; return ok && equalText(v, value) }
			if !is(theirs) && !is(mine) {
				return senseless("it changed the primary key", fmt.Sprintf("key column %s", col))
			}
			continue
		}
		if was, ok := theirs[col]; !ok || !equalText(was, value) {
			write[col] = value
		}
	}
	if q.Theirs != nil && len(write) == 0 {
		return Ruling{Kind: Standing}
	}
	text, err := json.Marshal(write)
	if err != nil {
		return senseless("it gave a value that cannot be read", err.Error())
	}
	return Ruling{Kind: Another, Write: string(text)}
}

func equalText(a, b *string) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

// scalar is a JSON value as a column's text: strings as they are, null as null, all else as it is written.
func scalar(raw json.RawMessage) (*string, error) {
	raw = bytes.TrimSpace(raw)
	if slices.Equal(raw, []byte("null")) {
		return nil, nil
	}
	text := string(raw)
	if strings.HasPrefix(text, `"`) {
		if err := json.Unmarshal(raw, &text); err != nil {
			return nil, err
		}
	}
	return &text, nil
}
