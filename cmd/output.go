package cmd

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
)

// terminal is everything of the outside world that a command talks to. Data goes to out, talk to err.
type terminal struct {
	in     io.Reader
	out    io.Writer
	err    io.Writer
	env    []string // "NAME=value"
	inTTY  bool     // a person types
	errTTY bool     // a person reads along: progress may move, colours may shine
}

// System is the real outside world.
func System() *terminal {
	tty := func(f *os.File) bool { return isatty.IsTerminal(f.Fd()) || isatty.IsCygwinTerminal(f.Fd()) }
	return &terminal{in: os.Stdin, out: os.Stdout, err: os.Stderr, env: os.Environ(),
		inTTY: tty(os.Stdin), errTTY: tty(os.Stderr)}
}

// getenv looks a variable up; the last one wins.
func (t *terminal) getenv(name string) string {
	for i := len(t.env) - 1; i >= 0; i-- {
		if k, v, ok := strings.Cut(t.env[i], "="); ok && k == name {
			return v
		}
	}
	return ""
}

// colour tells whether colours are wanted on stderr (https://no-color.org).
func (t *terminal) colour() bool {
	return t.errTTY && t.getenv("NO_COLOR") == "" && t.getenv("TERM") != "dumb"
}

// say prints one line of talk.
func (t *terminal) say(format string, args ...any) { fmt.Fprintf(t.err, format+"\n", args...) }

// format is the value of -o.
type format string

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "format" }
func (f *format) Set(s string) error {
	switch s {
	case "table", "json", "ndjson":
		*f = format(s)
		return nil
	}
	return fmt.Errorf("want table, json or ndjson, not %q", s)
}

// withOutput adds -o to a command that prints data.
func withOutput(c *cobra.Command, f *format) {
	*f = "table"
	c.Flags().VarP(f, "output", "o", "output format: table, json or ndjson")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "ndjson"}, cobra.ShellCompDirectiveNoFileComp))
}

// column is one column of a table.
type column[T any] struct {
	head string
	cell func(T) string
}

// printRows prints a list: a table for people, one JSON array, or one JSON object a line.
func printRows[T any](w io.Writer, f format, rows []T, cols []column[T]) error {
	switch f {
	case "json":
		if rows == nil {
			rows = []T{}
		}
		return printJSON(w, rows)
	case "ndjson":
		enc := json.NewEncoder(w)
		enc.SetEscapeHTML(false)
		for _, r := range rows {
			if err := enc.Encode(r); err != nil {
				return err
			}
		}
		return nil
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for i, c := range cols {
		fmt.Fprint(tw, strings.ToUpper(c.head), tail(i, len(cols)))
	}
	for _, r := range rows {
		for i, c := range cols {
			fmt.Fprint(tw, clean(c.cell(r)), tail(i, len(cols)))
		}
	}
	return tw.Flush()
}

func tail(i, n int) string {
	if i == n-1 {
		return "\n"
	}
	return "\t"
}

// clean keeps a table cell on its line and the terminal out of the data's hands.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return ' '
		}
		return r
	}, s)
	if s == "" {
		return "-"
	}
	return s
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// ago prints a point in time as a person says it.
func ago(t *time.Time) string {
	if t == nil || t.IsZero() {
		return "never"
	}
	return span(time.Since(*t)) + " ago"
}

// span prints a duration with at most two units.
func span(d time.Duration) string {
	if d < 0 {
		d = 0
	}
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h %d min", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	}
}

// progress shows how far something is: a moving bar for a person, a line now and then for a log.
type progress struct {
	t     *terminal
	bar   *progressbar.ProgressBar
	label string
	unit  string
	last  time.Time
	done  int64
	total int64
}

func (t *terminal) progress(label, unit string, total int64) *progress {
	p := &progress{t: t, label: label, unit: unit, total: total, last: time.Now()}
	if t.errTTY {
		p.bar = progressbar.NewOptions64(max(total, 1), progressbar.OptionSetWriter(t.err), progressbar.OptionSetDescription(label),
			progressbar.OptionSetWidth(30), progressbar.OptionShowCount(), progressbar.OptionThrottle(80*time.Millisecond),
			progressbar.OptionClearOnFinish(), progressbar.OptionEnableColorCodes(t.colour()))
	}
	return p
}

// set moves the bar. total may become better known on the way.
func (p *progress) set(done, total int64) {
	done = max(done, 0)
	if total < done {
		total = done
	}
	p.done, p.total = done, total
	if p.bar != nil {
		p.bar.ChangeMax64(max(total, 1))
		_ = p.bar.Set64(done)
		return
	}
	if time.Since(p.last) >= 2*time.Second {
		p.last = time.Now()
		p.t.say("%s: %d of %d %s", p.label, done, total, p.unit)
	}
}

// stop removes the bar without a word.
func (p *progress) stop() {
	if p.bar != nil {
		_ = p.bar.Finish()
	}
}

// end removes the bar and leaves one line.
func (p *progress) end(words string) {
	p.stop()
	p.t.say("%s", words)
}

// printOne prints a single object as JSON: indented, or on one line for ndjson.
func printOne[T any](w io.Writer, f format, v T) error {
	if f == "ndjson" {
		return printRows(w, f, []T{v}, nil)
	}
	return printJSON(w, v)
}

// count is a number of things, for a person.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
