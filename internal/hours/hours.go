// Package hours knows spans of the day: those that an operator gives a subscription set, and those that a device keeps to by itself.
// It does no I/O; schema and cmd call it.
package hours

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Span is a span of the day, in minutes since midnight. It may go over midnight; From equal to To is the whole day, as is the zero value.
type Span struct{ From, To int }

// ErrSpan says that a text is no span.
var ErrSpan = errors.New("not a span of the day such as 09:00-22:00")

// Parse reads "15:04-16:05".
func Parse(s string) (Span, error) {
	from, to, ok := strings.Cut(s, "-")
	a, err1 := time.Parse("15:04", strings.TrimSpace(from))
	b, err2 := time.Parse("15:04", strings.TrimSpace(to))
	if !ok || err1 != nil || err2 != nil {
		return Span{}, fmt.Errorf("%q is %w", s, ErrSpan)
	}
	return Span{a.Hour()*60 + a.Minute(), b.Hour()*60 + b.Minute()}, nil
}

func (s Span) String() string {
	return fmt.Sprintf("%02d:%02d-%02d:%02d", s.From/60, s.From%60, s.To/60, s.To%60)
}

// MarshalText writes it as [Parse] reads it.
func (s Span) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Includes tells whether the clock of t's location shows a time within the span.
func (s Span) Includes(t time.Time) bool {
	m := t.Hour()*60 + t.Minute()
	switch {
	case s.From == s.To:
		return true
	case s.From < s.To:
		return m >= s.From && m < s.To
	default:
		return m >= s.From || m < s.To
	}
}

// Until is how long it takes from t until the span begins, by the clock of t's location; 0 within it.
func (s Span) Until(t time.Time) time.Duration {
	if s.Includes(t) {
		return 0
	}
	start := time.Date(t.Year(), t.Month(), t.Day(), s.From/60, s.From%60, 0, 0, t.Location())
	if !start.After(t) {
		start = time.Date(t.Year(), t.Month(), t.Day()+1, s.From/60, s.From%60, 0, 0, t.Location())
	}
	return start.Sub(t)
}

// UntilAny is how long it takes until the first of the spans begins; 0 within one of them, and if there are none.
func UntilAny(spans []Span, t time.Time) (wait time.Duration) {
	for i, s := range spans {
		if d := s.Until(t); i == 0 || d < wait {
			wait = d
		}
	}
	return wait
}
