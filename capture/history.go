package capture

import (
	"bufio"
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/waystage/waystage/change"
)

// sameHistory makes sure that a server on another timeline than before has everything that the target has: it branched off
// behind the target's position. A server that is back on an older timeline was restored.
func sameHistory(ctx context.Context, conn *pgconn.PgConn, have standing, h hello) error {
	switch {
	case have.timeline == 0 || have.timeline == h.timeline:
		return nil
	case h.timeline < have.timeline:
		return &Error{CodeServerBack, fmt.Sprintf("the server is on timeline %d, the target's position is of timeline %d", h.timeline, have.timeline), remedyBack}
	}
	res, err := pglogrepl.TimelineHistory(ctx, conn, h.timeline)
	if err != nil {
		return fmt.Errorf("TIMELINE_HISTORY %d: %w", h.timeline, err)
	}
	end, known := branchedAt(string(res.Content), have.timeline)
	switch {
	case !known:
		return &Error{CodeServerBack, fmt.Sprintf("the server's timeline %d does not come from timeline %d, which the target's position is of", h.timeline, have.timeline), remedyBack}
	case have.position > end:
		return &Error{CodeServerBack, fmt.Sprintf("timeline %d ended at %s, but the target has had it up to %s: the promoted server lacks those transactions",
			have.timeline, end, have.position), remedyBack}
	}
	return nil
}

// branchedAt finds in a timeline history file where a timeline was left.
func branchedAt(history string, timeline int32) (change.LSN, bool) {
	for sc := bufio.NewScanner(strings.NewReader(history)); sc.Scan(); {
		f := strings.Fields(sc.Text()) // "1\t0/3000000\treason"
		if len(f) < 2 {
			continue
		}
		if n, err := strconv.ParseInt(f[0], 10, 32); err != nil || int32(n) != timeline {
			continue
		}
		lsn, err := change.ParseLSN(f[1])
		return lsn, err == nil
	}
	return 0, false
}

// prove holds a transaction that is sent again against what the target knows of its last one: they end at the same place and
// were committed at the same time, or the server's log is another one.
func (g *grouper) prove(end change.LSN, at time.Time) error {
	switch {
	case g.proof == nil || end < g.start:
		return nil
	case end == g.start && at.Equal(*g.proof):
		g.proof = nil
		return nil
	case end == g.start:
		return &Error{CodeServerBack, fmt.Sprintf("the transaction that ends at %s was committed at %s, the target has had another one there, of %s",
			end, at.UTC().Format(time.RFC3339Nano), g.proof.UTC().Format(time.RFC3339Nano)), remedyBack}
	}
	return g.unproven(end)
}

// unproven is the error for a log that does not have the target's last transaction.
func (g *grouper) unproven(at change.LSN) error {
	return &Error{CodeServerBack, fmt.Sprintf("the server's log goes on to %s without the transaction that ends at %s, which the target has had", at, g.start), remedyBack}
}
