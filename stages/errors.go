package stages

import (
	"errors"
	"fmt"

	"github.com/waystage/waystage/internal/pgerr"
)

// errNoCatalog is returned while the definitions have not been read.
var errNoCatalog = errors.New("stages: no subscription definitions yet")

// transient tells whether the same work may succeed later.
func transient(err error) bool {
	var u *unusable
	return errors.As(err, &u) || pgerr.Class(err) == pgerr.Retryable
}

// setError is a failure of a set's definition: its key query cannot be evaluated.
type setError struct {
	set, table string
	err        error
}

func (e *setError) Error() string {
	return fmt.Sprintf("the key query of %s in set %s failed; the set's sessions wait until it works: %v", e.table, e.set, e.err)
}
func (e *setError) Unwrap() error { return e.err }

// sessionError is a failure of one session alone.
type sessionError struct {
	session int64
	err     error
}

func (e *sessionError) Error() string { return e.err.Error() }
func (e *sessionError) Unwrap() error { return e.err }
