package hours

import (
	"testing"
	"time"
)

func at(t *testing.T, zone, clock string) time.Time {
	t.Helper()
	loc, err := time.LoadLocation(zone)
	if err != nil {
		t.Fatal(err)
	}
	when, err := time.ParseInLocation("2006-01-02 15:04", clock, loc)
	if err != nil {
		t.Fatal(err)
	}
	return when
}

func TestSpans(t *testing.T) {
	for _, c := range []struct{ span, zone, now, wait string }{
		{"09:00-22:00", "UTC", "2026-05-04 08:59", "1m"}, {"09:00-22:00", "UTC", "2026-05-04 09:00", "0s"},
		{"09:00-22:00", "UTC", "2026-05-04 21:59", "0s"}, {"09:00-22:00", "UTC", "2026-05-04 22:00", "11h"},
		{"22:00-06:00", "UTC", "2026-05-04 21:00", "1h"}, {"22:00-06:00", "UTC", "2026-05-04 23:00", "0s"},
		{"22:00-06:00", "UTC", "2026-05-04 05:59", "0s"}, {"22:00-06:00", "UTC", "2026-05-04 06:00", "16h"},
		{"08:00 - 08:00", "UTC", "2026-05-04 12:00", "0s"},
		// The clocks go forward on the 29th of March at 2, and back on the 25th of October at 3.
		{"04:00-05:00", "Europe/Berlin", "2026-03-28 23:00", "4h"}, {"04:00-05:00", "Europe/Berlin", "2026-10-24 23:00", "6h"},
		{"02:15-02:45", "Europe/Berlin", "2026-03-28 22:15", "4h"},
	} {
		s, err := Parse(c.span)
		if err != nil {
			t.Fatal(err)
		}
		want, err := time.ParseDuration(c.wait)
		if err != nil {
			t.Fatal(err)
		}
		now := at(t, c.zone, c.now)
		if got := s.Until(now); got != want || s.Includes(now) != (want == 0) {
			t.Errorf("%s at %s: %s, want %s", c.span, c.now, got, want)
		}
		if again, err := Parse(s.String()); err != nil || again != s {
			t.Errorf("%v is written %s, and read as %v: %v", s, s, again, err)
		}
	}
	for _, bad := range []string{"", "9", "09:00", "09:00-25:00", "a-b", "09:00-10:00-11:00"} {
		if _, err := Parse(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestUntilAny(t *testing.T) {
	now := at(t, "UTC", "2026-05-04 12:00")
	day, night := Span{9 * 60, 11 * 60}, Span{22 * 60, 6 * 60}
	for _, c := range []struct {
		spans []Span
		want  time.Duration
	}{{nil, 0}, {[]Span{day}, 21 * time.Hour}, {[]Span{day, night}, 10 * time.Hour}, {[]Span{night, {11 * 60, 13 * 60}}, 0}} {
		if got := UntilAny(c.spans, now); got != c.want {
			t.Errorf("%v: %s, want %s", c.spans, got, c.want)
		}
	}
}
