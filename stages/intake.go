package stages

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/waystage/waystage/internal/sabotage"
	"github.com/waystage/waystage/protocol"
)

// IntakeConfig bounds intake. The zero value of a field takes the default.
type IntakeConfig struct {
	Limits        protocol.Limits // of requests (default protocol.DefaultLimits)
	MaxParts      int             // parts taken at a time (default 500)
	Wait          time.Duration   // how long one fetch waits for parts (default 1 s)
	SeriesTimeout time.Duration   // how long a series may stay incomplete (default 1 min)
	SeriesRetry   time.Duration   // first delay before the parts of an incomplete series come again (default 1 s)
	Retry         time.Duration   // delay before a part comes again after a failure of ours (default 1 s)
	MaxDeliveries int             // a request that fails by itself as often becomes a dead letter (default 5)
	Lease         time.Duration   // since its last step, for which a session keeps other files of the same device waiting (default 10 s)
}

func (c IntakeConfig) withDefaults() IntakeConfig {
	def(&c.Limits, protocol.DefaultLimits())
	// A row goes back to other devices on a page, which the queue must take.
	c.Limits.Row = min(cmp.Or(c.Limits.Row, maxRow), maxRow)
	def(&c.MaxParts, 500)
	def(&c.Wait, time.Second)
	def(&c.SeriesTimeout, time.Minute)
	def(&c.SeriesRetry, time.Second)
	def(&c.Retry, time.Second)
	def(&c.MaxDeliveries, 5)
	def(&c.Lease, 10*time.Second)
	return c
}

// maxRow bounds the image of a row, in bytes.
const maxRow = 960 << 10

// Intake takes requests from the input queue into the staging tables, one commit for all that is queued.
type Intake struct {
	cfg      IntakeConfig
	db       *pgxpool.Pool
	catalogs Catalogs
	input    Input
	output   Output
	kick     kicks
	log      *zap.Logger
	metrics  *metrics
	now      func() time.Time
}

// NewIntake makes the stage. catalogs gives the newest catalog; kick wakes a stage in all processes.
func NewIntake(cfg IntakeConfig, db *pgxpool.Pool, catalogs Catalogs, input Input, output Output, kick func(stage string), log *zap.Logger) *Intake {
	return &Intake{
		cfg: cfg.withDefaults(), db: db, catalogs: catalogs, input: input, output: output, kick: kick, log: orNop(log),
		metrics: newMetrics(StageIntake), now: time.Now,
	}
}

// Metrics are the collectors of the stage.
func (in *Intake) Metrics() []prometheus.Collector { return in.metrics.collectors() }

// Worker makes a worker for a pool.
func (in *Intake) Worker() Worker { return in }

// Batch takes what is queued and stages it.
func (in *Intake) Batch(take, work context.Context, doing func(string)) (int, error) {
	parts, err := in.input.Fetch(take, in.cfg.MaxParts, in.cfg.Wait)
	if err != nil && take.Err() == nil {
		return 0, fmt.Errorf("take parts from the input queue: %w", err)
	}
	if len(parts) == 0 {
		return 0, nil
	}
	doing(fmt.Sprintf("%d parts", len(parts)))
	began := time.Now()
	if err := in.batch(work, parts); err != nil {
		return 0, err
	}
	in.metrics.batch(len(parts), time.Since(began))
	return len(parts), nil
}

// batch settles every part, whatever happens.
func (in *Intake) batch(ctx context.Context, parts []*Part) error {
	reqs, err := in.assemble(ctx, parts)
	if err != nil {
		in.giveBack(parts)
		return err
	}
	if err = in.process(ctx, reqs); err == nil {
		return nil
	}
	if transient(err) || ctx.Err() != nil {
		for _, r := range reqs {
			in.giveBack(r.parts)
		}
		return err
	}
	// Something in one of the requests: find it by taking them one at a time, so that it stops no other.
	in.log.Warn("a batch failed, its requests are taken one by one", zap.Int("requests", len(reqs)), zap.Error(err))
	var failed []error
	for _, r := range reqs {
		if r.outcome != refused || r.refusal == nil {
			r.outcome, r.records = undecided, nil
		}
		err := in.process(ctx, []*incoming{r})
		switch {
		case err == nil:
		case transient(err) || ctx.Err() != nil || r.deliveries < in.cfg.MaxDeliveries:
			in.giveBack(r.parts)
			failed = append(failed, err)
		default:
			in.deadLetter(ctx, r, err)
		}
	}
	return errors.Join(failed...)
}

func (in *Intake) giveBack(parts []*Part) {
	for _, p := range parts {
		in.settled(p.Delivery.Nak(min(time.Duration(p.Deliveries), 30) * in.cfg.Retry))
	}
}

func (in *Intake) deadLetter(ctx context.Context, r *incoming, cause error) {
	in.log.Error("request is dead-lettered", zap.String("user", r.user), zap.String("device", r.device), zap.String("session", r.session), zap.Error(cause))
	in.metrics.count("dead", 1)
	r.refuse(protocol.CodeInternal, "the server could not take session %s after %d attempts; the operator has a copy of it", r.session, r.deliveries)
	if err := in.answer(ctx, r); err != nil {
		in.giveBack(r.parts)
		return
	}
	for _, p := range r.parts {
		in.settled(p.Delivery.DeadLetter(ctx, cause.Error()))
	}
}

// settled notes that a part could not be settled: it will be delivered again, which does no harm.
func (in *Intake) settled(err error) {
	if err != nil {
		in.log.Warn("part could not be settled, it will come again", zap.Error(err))
	}
}

// process judges and stages whole requests in one transaction, answers those that it refuses, and acknowledges all.
// After an error nothing is acknowledged.
func (in *Intake) process(ctx context.Context, reqs []*incoming) error {
	if len(reqs) == 0 {
		return nil
	}
	open := make([]*incoming, 0, len(reqs))
	for _, r := range reqs {
		if r.outcome == undecided {
			open = append(open, r)
		}
	}
	var back []*incoming // redelivered, with a reply that may be gone
	if len(open) > 0 {
		var err error
		_, err = byCatalog(ctx, in.catalogs, func(cat *Catalog) (int, error) {
			back, err = in.stage(ctx, cat, open)
			return 0, err
		})
		if err != nil {
			return err
		}
	}
	if err := in.reopen(ctx, back); err != nil {
		return err
	}
	staged, empty, records := 0, 0, 0
	for _, r := range reqs {
		switch r.outcome {
		case refused:
			if err := in.answer(ctx, r); err != nil {
				return err
			}
		case taken:
			if len(r.records) > 0 {
				staged++
			} else {
				empty++
			}
			records += len(r.records)
		}
	}
	var acks []*Part
	for _, r := range reqs {
		acks = append(acks, r.parts...)
	}
	in.settled(in.input.AckAll(ctx, acks))
	if staged > 0 {
		in.kick.to(StageMerge)
	}
	if empty+len(back) > 0 {
		in.kick.to(StageReply)
	}
	in.metrics.count("staged", staged+empty)
	in.metrics.count("again", countOf(reqs, again))
	in.metrics.records("staged", records)
	return nil
}

func countOf(reqs []*incoming, o outcome) (n int) {
	for _, r := range reqs {
		if r.outcome == o {
			n++
		}
	}
	return n
}

// answer writes the error page of a refused request.
func (in *Intake) answer(ctx context.Context, r *incoming) error {
	in.metrics.refused(r.refusal.Code)
	page := &protocol.Page{
		V: protocol.Version, Incarnation: r.incarnation, N: r.n, Page: 1, Last: true, Error: r.refusal, Sets: r.sets,
	}
	if cat := in.catalogs.Now(); cat != nil {
		page.Epoch = cat.epoch
	}
	contentType, encoding := r.contentType, r.encoding
	if r.req != nil {
		page.Nonce, page.CursorFrom = r.req.Nonce, r.req.Cursor
	} else if _, err := protocol.ContentType(contentType); err != nil {
		contentType, encoding = protocol.ContentJSON, protocol.Identity
	}
	body, err := encodePage(page, contentType, encoding)
	if err != nil { // an encoding that nobody knows: what was refused
		contentType, encoding = protocol.ContentJSON, protocol.Identity
		if body, err = encodePage(page, contentType, encoding); err != nil {
			return fmt.Errorf("encode the refusal of session %s: %w", r.session, err)
		}
	}
	// The refusal takes the place of page 1. Another copy of the device may have a reply under this number: it is
	// composed again when that one asks for it.
	b := &pgx.Batch{}
	b.Queue(`UPDATE waystage.session SET pages = 0
		WHERE incarnation = $1 AND n = $2 AND user_name = $3 AND device_name = $4 AND pages > 0`, r.incarnation, r.n, r.user, r.device)
	b.Queue(refusalSQL, r.user, r.device, r.session, string(r.refusal.Code), clean(r.refusal.Message), r.received)
	if r.refusal.Code == protocol.CodeForked && !r.reset {
		b.Queue(forkedSQL, r.user, r.device, r.session)
	}
	if err := in.db.SendBatch(ctx, b).Close(); err != nil {
		return fmt.Errorf("note the refusal of session %s: %w", r.session, err)
	}
	if err := in.output.PutPage(ctx, r.user, r.device, r.session, 1, contentType, encoding, body); err != nil {
		return fmt.Errorf("publish the refusal of session %s: %w", r.session, err)
	}
	in.ready(r, 1, contentType, encoding, body)
	return nil
}

// reopen looks whether the replies to redelivered requests are still stored; those that are not are composed again
// (rule D7: either reply is as good).
func (in *Intake) reopen(ctx context.Context, back []*incoming) error {
	if sabotage.On(sabotage.IgnoreAgain) {
		return nil
	}
	var gone []int64
	for _, r := range back {
		stored, err := in.output.Pages(ctx, r.user, r.device, r.session)
		if err != nil {
			return fmt.Errorf("look for the reply to session %s: %w", r.session, err)
		}
		if r.pages > 0 && stored >= r.pages {
			in.ready(r, r.pages, "", "", nil)
		} else {
			gone = append(gone, r.sessionID)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	_, err := in.db.Exec(ctx, `UPDATE waystage.session SET state = 'merged' WHERE id = ANY ($1) AND state IN ('replied', 'closed')`, gone)
	if err != nil {
		return fmt.Errorf("have replies composed again: %w", err)
	}
	return nil
}

// ready tells the gateways of a reply, as a hint.
func (in *Intake) ready(r *incoming, pages int, contentType, encoding string, only []byte) {
	if err := in.output.Ready(r.user, r.device, r.session, pages, contentType, encoding, only); err != nil {
		in.log.Warn("gateways were not told of a reply", zap.String("session", r.session), zap.Error(err))
	}
}

// ledger is what is known of an incarnation (rule D4).
type ledger struct {
	deviceID  int64
	lastN     int64
	lastHash  []byte
	createdAt time.Time
}

// decide applies rule D4.
func (l *ledger) decide(r *incoming) outcome {
	switch {
	case l == nil:
		r.refuse(protocol.CodeForked, "session %d of an incarnation that this server does not know: the device's file is not the one that synced last; go on under a new incarnation", r.req.N)
	case l.deviceID != r.deviceID:
		r.refuse(protocol.CodeForked, "the incarnation belongs to another device: this file is a copy; go on under a new incarnation")
	case l.createdAt.Before(r.resetAt):
		r.reset = true
		r.refuse(protocol.CodeForked, "the operator has reset this device: go on under a new incarnation with a full refresh; unsent changes stay")
	case r.req.N == l.lastN+1:
		l.lastN, l.lastHash = r.req.N, r.hash
		return taken
	case r.req.N == l.lastN && bytes.Equal(r.hash, l.lastHash):
		return again
	case r.req.N == l.lastN:
		r.refuse(protocol.CodeForked, "another request was already taken as session %d: the device was restored or cloned; go on under a new incarnation", r.req.N)
	default:
		r.refuse(protocol.CodeForked, "session %d does not follow the last one taken, %d: the device was restored or cloned; go on under a new incarnation", r.req.N, l.lastN)
	}
	return refused
}
