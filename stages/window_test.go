package stages

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/waystage/waystage/internal/hours"
	"github.com/waystage/waystage/protocol"
)

// testWindow: a set that is closed takes no new session, says when it opens, and costs the incarnation no number; a session that was taken before
// is answered.
func testWindow(t *testing.T, r *rig) {
	amy, _, _ := shared(r)
	amy.sync("care")
	before := r.cat
	taken := amy.request("care")
	amy.send(taken)
	now := time.Now().UTC()
	minute := now.Hour()*60 + now.Minute()
	closed := hours.Span{From: (minute + 120) % 1440, To: (minute + 180) % 1440}
	i := strings.Index(definitions, "\n  care: ")
	line, rest, _ := strings.Cut(definitions[i+len("\n  care: "):], "\n")
	r.cat = r.catalogOf(definitions[:i] + fmt.Sprintf("\n  care: {subscriptions: %s, between: [%q]}\n", line, closed) + rest)

	// It was sent in time, and is taken too late.
	r.pump()
	amy.refused(protocol.CodeOutside)
	if e := amy.pages()[0].Error; e.Retry < 3600 || e.Retry > 7200 || !strings.Contains(e.Message, "care") {
		t.Errorf("%+v", e)
	}
	r.want("0", `SELECT count(*) FROM waystage.session WHERE incarnation = $1 AND n = $2`, amy.inc, taken.N)
	// The same number, when it is open.
	r.cat = before
	amy.send(taken)
	r.pump()
	amy.apply(amy.pages())
	// Taken while it was open, asked for again when it is closed: answered.
	open := amy.request("care")
	amy.send(open)
	r.pump()
	r.cat = r.catalogOf(definitions[:i] + fmt.Sprintf("\n  care: {subscriptions: %s, between: [%q]}\n", line, closed) + rest)
	amy.send(open)
	r.pump()
	if e := amy.pages()[0].Error; e != nil {
		t.Errorf("a session that was taken: %+v", e)
	}
	amy.apply(amy.pages())
}
