package pgerr

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/protocol"
)

func TestClass(t *testing.T) {
	for code, want := range map[string]Kind{
		"08006": Retryable, "08P01": Retryable, "40001": Retryable, "40P01": Retryable, "40003": Retryable, "55P03": Retryable,
		"55006": Retryable, "57014": Retryable, "57P01": Retryable, "57P03": Retryable, "53300": Retryable, "53100": Retryable,
		"25006": Retryable, "XX000": Retryable, "58030": Retryable,
		"23505": Refusal, "23503": Refusal, "23514": Refusal, "22P02": Refusal, "22003": Refusal, "P0001": Refusal,
		"P0004": Refusal, "42501": Refusal, "44000": Refusal, "54000": Refusal, "ZZ123": Refusal, "45000": Refusal,
		"42P01": Fatal, "42703": Fatal, "42804": Fatal, "28P01": Fatal, "3D000": Fatal, "55000": Fatal, "XX001": Fatal, "0A000": Fatal,
	} {
		err := fmt.Errorf("wrapped: %w", &pgconn.PgError{Code: code, Message: "deadlock detected"})
		if got := Class(err); got != want {
			t.Errorf("%s: %v, want %v", code, got, want)
		}
		if _, ok := Refused(err); ok != (want == Refusal) {
			t.Errorf("%s: Refused is %v", code, ok)
		}
		if Code(err) != code || !Is(err, "00000", code) {
			t.Errorf("%s: Code is %q", code, Code(err))
		}
	}
	for _, err := range []error{io.EOF, io.ErrUnexpectedEOF, context.DeadlineExceeded, context.Canceled, errors.New("x"), &pgconn.ConnectError{}} {
		if got := Class(err); got != Retryable {
			t.Errorf("%v: %v, want retryable", err, got)
		}
	}
	if Class(nil) != None || Code(nil) != "" || Is(nil, "") {
		t.Error("nil is an error")
	}
}

// The same SQLSTATE is our fault outside a trigger, and the customer's refusal inside one.
func TestErrorInsideTrigger(t *testing.T) {
	inside := &pgconn.PgError{Code: "42P01", InternalQuery: "select * from gone"}
	if Class(inside) != Refusal {
		t.Error("a trigger's missing table must refuse the record, not stop the worker")
	}
	stale := &pgconn.PgError{Code: "0A000", Routine: "RevalidateCachedQuery"}
	if Class(stale) != Retryable {
		t.Error("a stale plan must be retried")
	}
}

// ltree and hstore say of a value what the parser says of a statement; only the latter has a place in the statement.
func TestSyntaxOfAValue(t *testing.T) {
	value := &pgconn.PgError{Code: "42601", Message: "ltree syntax error at character 3"}
	if Class(value) != Refusal {
		t.Error("a value that an extension cannot read must refuse the record, not stop the table")
	}
	if d, ok := Refused(value); !ok || d.Reason() != protocol.CodeValue {
		t.Errorf("the reason is %q", d.Reason())
	}
	if Class(&pgconn.PgError{Code: "42601", Position: 8}) != Fatal {
		t.Error("a statement with a syntax error will not get better")
	}
}

func TestReason(t *testing.T) {
	for code, want := range map[string]protocol.Code{
		"23514": protocol.CodeConstraint, "22001": protocol.CodeValue, "42501": protocol.CodePermission,
		"P0001": protocol.CodeTrigger, "MY001": protocol.CodeTrigger, "40002": protocol.CodeConstraint, "44000": protocol.CodeConstraint,
	} {
		d, ok := Refused(&pgconn.PgError{Code: code, Message: "m", Detail: "d", ConstraintName: "c", ColumnName: "col"})
		if !ok || d.Reason() != want || d.Text() != "m: d" || d.Constraint != "c" || d.Column != "col" {
			t.Errorf("%s: %v %v", code, d, d.Reason())
		}
	}
}
