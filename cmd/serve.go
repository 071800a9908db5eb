package cmd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/waystage/waystage/apply"
	"github.com/waystage/waystage/capture"
	"github.com/waystage/waystage/internal/files"
	"github.com/waystage/waystage/internal/health"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/internal/trouble"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/queue"
	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/stages"
)

// Info says where a server that is ready can be reached.
type Info struct {
	NATS      string // where devices connect
	WebSocket string // the same for WebSocket, empty without
	Health    string // base URL of the health listener, empty without
	Epoch     string // of the mirror
	Tables    int    // synced
	Keys      queue.Secrets
}

// grace is how long work under way may take to end at shutdown.
const grace = 30 * time.Second

// Serve runs a whole server until ctx ends or something fails that retrying cannot mend. ready is called once, when
// devices can sync.
//
//	Serve ─┬─ support: ends last, so that work under way can finish
//	       │    ├─ health listener               1   /healthz /readyz /metrics
//	       │    ├─ callout                       1   decides devices' logins for the broker
//	       │    ├─ registry watch                1   closes connections of who is blocked
//	       │    ├─ definitions                   1   takes over what is applied
//	       │    ├─ kicks                         3   intake, merge, reply: "there is work"
//	       │    ├─ watch                         1   what waits for connected devices
//	       │    ├─ pool settings                 1   "the operator has changed something"
//	       │    ├─ files                         1   looks for lost contents, removes unused ones
//	       │    ├─ directory                     1   publishes files; one active in all processes
//	       │    └─ prune                         1   what the retention times have passed
//	       │
//	       └─ work: a pool for each stage, with as many workers as waystage.pool says
//	            ├─ gateway       devices' calls      -> input queue; output queue -> devices
//	            ├─ intake        input queue         -> staging tables
//	            ├─ merge         staging tables      -> mirror tables, ledger
//	            ├─ reply         mirror, ledger      -> output queue
//	            ├─ capture-up    mirror's log        -> change data up      one active in all processes
//	            ├─ apply-up      change data up      -> source              one active
//	            ├─ capture-down  source's log        -> change data down    one active
//	            └─ apply-down    change data down    -> mirror tables       one active
//
// Shutdown has two phases: when ctx ends the pools take nothing more and finish what they have; when they have ended,
// support ends, then queue and broker, then the databases' pools.
func Serve(ctx context.Context, c Config, log *zap.Logger, ready func(Info)) (err error) {
	if log == nil {
		log = zap.NewNop()
	}
	if err := c.Validate(); err != nil {
		return err
	}
	file, fileErr := definitionsOf(c) // counts at the first start only; afterwards the version in the mirror does (docs/adr/0009-definitions-in-force.md)

	mirror, err := openPool(ctx, "mirror", c.Mirror.DSN, c.mirrorConnections())
	if err != nil {
		return err
	}
	defer mirror.Close()
	if stored, err := anyVersion(ctx, mirror); err != nil {
		return err
	} else if !stored && fileErr != nil {
		return fileErr
	}
	staging, err := openPool(ctx, "mirror", c.Mirror.DSN, c.stageConnections(), schema.ByIndex)
	if err != nil {
		return err
	}
	defer staging.Close()
	source, err := openPool(ctx, "source", c.Source.DSN, 4)
	if err != nil {
		return err
	}
	defer source.Close()

	broker, openBroker, stopBroker, err := startBroker(c, log)
	if err != nil {
		return err
	}
	defer stopBroker()
	q, err := queue.Open(ctx, queue.Config{Broker: broker, Replicas: c.NATS.External.Replicas, InputBytes: int64(c.Limits.QueueBytes),
		OutputBytes: int64(c.Limits.OutputBytes), OutputAge: time.Duration(c.Retention.Replies), ChangeBytes: int64(c.Limits.ChangeBytes),
		FileBytes: int64(c.Limits.FileBytes)}, log)
	if err != nil {
		return err
	}
	defer q.Close()

	// Support lives until the work has ended. Whatever of it fails takes the work down, in order.
	support, stopSupport := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSupport()
	sup, support := errgroup.WithContext(support)
	work, cancelWork := context.WithCancel(ctx)
	defer cancelWork()
	context.AfterFunc(support, cancelWork)

	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	reader := health.NewReader(source, mirror, func(ctx context.Context) ([]health.Queue, error) { return depths(ctx, q) })
	metrics.MustRegister(health.NewCollector(reader.Read, 5*time.Second, log.Named("health")))
	var setUp atomic.Bool
	current := stages.NewFollower(mirror, log.Named("definitions"))
	listener := health.New(health.Config{Listen: c.Health.Listen, Metrics: metrics, Version: version,
		Checks: checks(source, mirror, q, current, &setUp, c.Retention.WAL)}, log.Named("health"))
	var healthURL string
	if c.Health.Listen != "" {
		l, err := listener.Listen(ctx)
		if err != nil {
			return &failure{code: exitPrecondition, what: "cannot open the health listener", where: c.Health.Listen, err: err,
				remedy: "is the port in use? change health.listen, or empty it for no listener"}
		}
		healthURL = "http://" + l.Addr().String()
		sup.Go(func() error { return listener.Run(support, l) })
	}
	// From here on every way out ends support and waits for it.
	defer func() {
		stopSupport()
		if serr := sup.Wait(); serr != nil && !errors.Is(serr, context.Canceled) && err == nil {
			err = serr
		}
	}()

	done, err := schema.Setup(ctx, schema.SetupOptions{SourceDSN: c.Source.DSN, MirrorDSN: c.Mirror.DSN, Definitions: file, KeepStored: true,
		Author: schema.Author{Who: "serve", Note: "first start"}, Recopy: c.Recopy, Progress: c.Progress, Log: log.Named("setup")})
	if err != nil {
		return setupFailure(c, err)
	}
	for _, w := range done.Warnings {
		log.Warn("definitions", zap.Stringer("note", w))
	}
	switch {
	case fileErr != nil:
		log.Warn("the definitions file cannot be used; the version in the mirror is in force", zap.String("file", c.Definitions), zap.Error(fileErr),
			zap.String("do", "waystage subscriptions export > FILE"))
	case file.SHA256() != done.Definitions.SHA256():
		log.Warn("the definitions file differs from the version in the mirror, which is in force", zap.String("file", c.Definitions),
			zap.String("do", "waystage subscriptions apply"))
	}
	setUp.Store(true)

	if err := current.Load(ctx); err != nil {
		return setupFailure(c, err)
	}
	// Asked at each session: another server may have added tables, and one that left the definitions stays in step.
	tables := func(ctx context.Context) ([]*schema.Table, error) { return schema.LoadTables(ctx, mirror) }
	kick := func(stage string) {
		if err := q.Kick(stage); err != nil {
			log.Debug("kick failed", zap.String("stage", stage), zap.Error(err)) // a stage also looks by itself
		}
	}

	users := registry.New(mirror, log)
	providers, err := identityProviders(c, users, log)
	if err != nil {
		return err
	}
	callout := queue.NewCallout(broker, users, providers, log)
	sup.Go(func() error { return callout.Run(support) })
	sup.Go(func() error { return users.Watch(support, q.Disconnect) })
	sup.Go(func() error { return current.Follow(support) })
	pruner := stages.NewPruner(stages.RetentionConfig{Changes: keep(c.Retention.Ledger), Sessions: keep(c.Retention.Ledger),
		Rejects: keep(c.Retention.Rejects), Handled: keep(c.Retention.Handled), Cursors: keep(c.Retention.Tombstones)}, mirror, log.Named("prune"))
	sup.Go(func() error { return pruner.Run(support) })

	limits := protocol.DefaultLimits()
	limits.Decompressed, limits.Changes, limits.Row = int(c.Limits.Session), c.Limits.Records, int(c.Limits.Row)
	limits.Encoded = min(limits.Encoded, limits.Decompressed)
	intake := stages.NewIntake(stages.IntakeConfig{Limits: limits}, staging, current, input{q}, q, kick, log.Named("intake"))
	merge := stages.NewMerge(stages.MergeConfig{}, staging, current, kick, log.Named("merge"))
	reply := stages.NewReply(stages.ReplyConfig{PageSize: int(c.Limits.Page), WaitSource: time.Duration(c.Reply.WaitSource)}, staging, current, q, log.Named("reply"))
	watch := stages.NewWatch(stages.WatchConfig{}, reply, log.Named("watch"))
	sup.Go(func() error { return watch.Run(support) })
	check := stages.NewCheck(stages.CheckConfig{}, reply, log.Named("check"))
	sessions := stages.NewSessions(staging)
	// A pool of their own: who fetches many files must not take the connections of the rows.
	filesPool, err := openPool(ctx, "mirror", c.Mirror.DSN, 4)
	if err != nil {
		return err
	}
	defer filesPool.Close()
	store := files.New(c.filesConfig(), filesPool, q.Chunks(), current.Definitions, log)
	sup.Go(func() error { return store.Keep(support, keepFiles) })
	if c.Files.Directory != "" {
		sup.Go(func() error { return watchDirectory(support, c, store, log) })
	}
	gateway := queue.NewGateway(q, queue.GatewayConfig{Hold: time.Duration(c.Reply.Hold), Applied: sessions.Close, News: watch.News, Check: check.News, Files: store, Bandwidth: current.Bandwidth,
		Rotate: func(ctx context.Context, user, device string, r protocol.Rotation) error {
			return users.Rotate(ctx, user, device, r.Key)
		}},
		enroller(users, current), sessions.Status, log)
	captureUp := capture.New(capture.Config{Direction: capture.Up, Server: c.Mirror.DSN, Mirror: c.Mirror.DSN, Slot: schema.SlotUp(done.Epoch),
		Publication: schema.PublicationUp, Queue: publisher{q, queue.Up}, Log: log})
	captureDown := capture.New(capture.Config{Direction: capture.Down, Server: c.Source.DSN, Mirror: c.Mirror.DSN, Slot: schema.SlotDown(done.Epoch),
		Publication: schema.PublicationDown, Queue: publisher{q, queue.Down}, Log: log})
	applyUp := apply.NewUp(apply.UpConfig{Mirror: c.Mirror.DSN, Source: c.Source.DSN, Tables: tables, Changes: changes{q, queue.Up}, Log: log})
	applyDown := apply.NewDown(apply.DownConfig{Mirror: c.Mirror.DSN, Tables: tables, Changes: changes{q, queue.Down}, Log: log})
	for _, list := range [][]prometheus.Collector{intake.Metrics(), merge.Metrics(), reply.Metrics(), captureUp.Metrics(), captureDown.Metrics(),
		applyUp.Metrics(), applyDown.Metrics(), store.Metrics()} {
		metrics.MustRegister(list...)
	}

	// What waits for work by itself is not polled for it (Poll < 0).
	sizes := c.Pools.sizes()
	var pools []*stages.Pool
	for _, p := range []struct {
		stage  string
		poll   time.Duration
		worker func() stages.Worker
		done   func() int64
		lag    func() int64
	}{
		{"gateway", -1, newRunners(gateway.Run, tellGateway(gateway)), func() int64 { s := gateway.Stats(); return s.Puts + s.Gets + s.Acks + s.Statuses + s.Enrols }, nil},
		{"intake", -1, intake.Worker, nil, nil},
		{"merge", 0, merge.Worker, nil, nil},
		{"reply", 0, reply.Worker, nil, nil},
		{"capture-up", -1, newRunner(captureUp.Run, tellCapture(captureUp)), captured(captureUp), lagging(captureUp)},
		{"apply-up", -1, newRunner(applyUp.Run, tellApply(applyUp.Stats)), applied(applyUp.Stats), nil},
		{"capture-down", -1, newRunner(captureDown.Run, tellCapture(captureDown)), captured(captureDown), lagging(captureDown)},
		{"apply-down", -1, newRunner(applyDown.Run, tellApply(applyDown.Stats)), applied(applyDown.Stats), nil},
	} {
		if sizes[p.stage] == 0 {
			continue // another process's work
		}
		pool := stages.NewPool(stages.PoolConfig{Stage: p.stage, Size: sizes[p.stage], Poll: p.poll, Grace: grace, Done: p.done, Lag: p.lag}, mirror, p.worker, log)
		pools = append(pools, pool)
		withdraw, err := q.Announce(p.stage, "1.0.0", func() any { return pool.Snapshot() })
		if err != nil {
			return err
		}
		defer withdraw()
	}
	if err := forwardKicks(support, sup, q, pools); err != nil {
		return err
	}

	// A pool ends when work ends, and not before, unless it fails for good.
	run, work := errgroup.WithContext(work)
	for _, p := range pools {
		run.Go(func() error { return p.Run(work) })
	}
	// Devices are let in when somebody can decide their logins and answer them, not before.
	gatewayReady := gateway.Ready()
	if sizes["gateway"] == 0 {
		gatewayReady = nil
	}
	await(work, callout.Ready(), 0)
	await(work, gatewayReady, 10*time.Second) // the operator may have paused it
	if err := openBroker(); err != nil {
		cancelWork()
		return errors.Join(err, run.Wait())
	}
	info := Info{NATS: natsAddress(c, broker), Health: healthURL, Epoch: done.Epoch, Tables: len(done.Tables), Keys: broker.Secrets}
	if broker.Embedded != nil {
		info.WebSocket, info.Keys = broker.Embedded.WebsocketURL(), broker.Embedded.Secrets()
	}
	log.Info("serving", zap.String("nats", info.NATS), zap.String("health", info.Health), zap.String("epoch", info.Epoch), zap.Int("tables", info.Tables))
	if ready != nil {
		ready(info)
	}
	<-work.Done()
	listener.Leave()
	log.Info("stopping: taking nothing more, finishing what is under way")
	return run.Wait()
}

// await waits for a signal, for at most so long (0: as long as it takes). A nil signal is not waited for.
func await(ctx context.Context, signal <-chan struct{}, atMost time.Duration) {
	if signal == nil {
		return
	}
	var late <-chan time.Time
	if atMost > 0 {
		t := time.NewTimer(atMost)
		defer t.Stop()
		late = t.C
	}
	select {
	case <-ctx.Done():
	case <-signal:
	case <-late:
	}
}

// stageConnections is how many connections to the mirror this process's stages use at the same time: one a worker, and those of
// who watches and of who closes sessions and tells of them.
func (c *Config) stageConnections() int { return c.Pools.Intake + c.Pools.Merge + c.Pools.Reply + 4 }

// mirrorConnections is how many everything else uses.
func (c *Config) mirrorConnections() int { return c.Pools.Gateway + 11 }

// forwardKicks wakes pools when there is work, and when their settings have changed.
func forwardKicks(ctx context.Context, g *errgroup.Group, q *queue.Queue, pools []*stages.Pool) error {
	forward := func(from <-chan struct{}, stop func(), to func()) {
		g.Go(func() error {
			defer stop()
			for {
				select {
				case <-ctx.Done():
					return nil
				case <-from:
					to()
				}
			}
		})
	}
	for _, p := range pools {
		switch p.Stage() {
		case stages.StageIntake, stages.StageMerge, stages.StageReply:
			kicks, stop, err := q.Kicked(p.Stage())
			if err != nil {
				return err
			}
			forward(kicks, stop, p.Kick)
		}
	}
	changed, stop, err := q.WatchPools()
	if err != nil {
		return err
	}
	forward(changed, stop, func() {
		for _, p := range pools {
			p.Wake()
		}
	})
	return nil
}

// checks are the conditions of readiness. keep is how much log a slot may hold back without a warning; 0: any.
func checks(source, mirror *pgxpool.Pool, q *queue.Queue, current *stages.Follower, setUp *atomic.Bool, keep Size) []health.Check {
	ping := func(p *pgxpool.Pool) func(context.Context) error {
		return func(ctx context.Context) error {
			var one int
			return p.QueryRow(ctx, "SELECT 1").Scan(&one)
		}
	}
	return []health.Check{
		{Name: "source", Run: ping(source)},
		{Name: "mirror", Run: ping(mirror)},
		{Name: "broker", Run: func(context.Context) error {
			if !q.Connected() {
				return errors.New("not connected")
			}
			return nil
		}},
		{Name: "set-up", Run: func(context.Context) error {
			if !setUp.Load() {
				return errors.New("migrations and initial copy are not done yet")
			}
			return nil
		}},
		{Name: "definitions", Run: func(context.Context) error { return current.Err() }},
		{Name: "slots", Run: func(ctx context.Context) error {
			if !setUp.Load() {
				return nil
			}
			epoch, err := schema.Epoch(ctx, mirror)
			if err != nil {
				return err
			}
			return errors.Join(slotStands(ctx, source, schema.SlotDown(epoch)), slotStands(ctx, mirror, schema.SlotUp(epoch)))
		}},
		{Name: "wal", Advisory: true, Run: func(ctx context.Context) error {
			if !setUp.Load() || keep == 0 {
				return nil
			}
			epoch, err := schema.Epoch(ctx, mirror)
			if err != nil {
				return err
			}
			return errors.Join(slotKeeps(ctx, source, schema.SlotDown(epoch), keep), slotKeeps(ctx, mirror, schema.SlotUp(epoch), keep))
		}},
		{Name: "tables", Advisory: true, Run: func(ctx context.Context) error {
			if !setUp.Load() {
				return nil
			}
			list, err := health.ReadStopped(ctx, mirror)
			for _, t := range list {
				err = errors.Join(err, errors.New(t.String()))
			}
			return err
		}},
		{Name: "replication", Run: func(ctx context.Context) error {
			if !setUp.Load() {
				return nil
			}
			list, err := trouble.List(ctx, mirror)
			for _, t := range list {
				err = errors.Join(err, errors.New(t.String()))
			}
			return err
		}},
	}
}

func slotStands(ctx context.Context, db *pgxpool.Pool, slot string) error {
	var status, reason string
	err := db.QueryRow(ctx, "SELECT coalesce(wal_status, ''), coalesce(to_jsonb(s)->>'invalidation_reason', '') FROM pg_replication_slots s WHERE slot_name = $1", slot).Scan(&status, &reason)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return fmt.Errorf("slot %s is missing", slot)
	case err != nil:
		return err
	}
	if lost := schema.SlotTrouble(status, reason); lost != "" {
		return fmt.Errorf("slot %s %s", slot, lost)
	}
	return nil
}

// slotKeeps complains of a slot that holds back more log than the configuration wants to hear of.
func slotKeeps(ctx context.Context, db *pgxpool.Pool, slot string, most Size) error {
	var kept int64
	err := db.QueryRow(ctx, `SELECT coalesce(max(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END - restart_lsn), 0)::int8
		FROM pg_replication_slots WHERE slot_name = $1`, slot).Scan(&kept)
	if err == nil && kept > int64(most) {
		err = fmt.Errorf("slot %s holds back %s of WAL, more than retention.wal (%s)", slot, human(kept), most)
	}
	return err
}

// depths are the streams' contents for the metrics.
func depths(ctx context.Context, q *queue.Queue) ([]health.Queue, error) {
	d, err := q.Depth(ctx)
	if err != nil {
		return nil, err
	}
	out := []health.Queue{}
	for _, s := range []struct {
		name string
		d    queue.StreamDepth
	}{{queue.StreamIn, d.Input}, {queue.StreamOut, d.Output}, {queue.StreamDead, d.Dead}, {queue.StreamDown, d.Down}, {queue.StreamUp, d.Up}, {queue.StreamFile, d.Files}} {
		h := health.Queue{Name: s.name, Direction: directionOf(s.name), Messages: s.d.Messages, Bytes: s.d.Bytes}
		if !s.d.Oldest.IsZero() && s.d.Messages > 0 {
			h.OldestSeconds = max(time.Since(s.d.Oldest).Seconds(), 0)
		}
		out = append(out, h)
	}
	return out, nil
}

// directionOf tells which way a stream of change data flows; empty for the others.
func directionOf(stream string) string {
	return map[string]string{queue.StreamDown: queue.Down, queue.StreamUp: queue.Up}[stream]
}

// enroller lets the gateway give a device its key, for its token if there is one, and tells it its sets.
func enroller(users *registry.Registry, current *stages.Follower) queue.Enroller {
	return func(ctx context.Context, user, device string, req protocol.Enrolment) (protocol.Enrolled, error) {
		give := users.Enrol
		if req.Token != "" {
			give = users.Redeem
		}
		if err := give(ctx, user, device, req); err != nil {
			var r *registry.Refusal
			if errors.As(err, &r) { // the login was let in, and is as good as refused
				_ = users.Refused(ctx, user, device, r.ErrorCode(), "") // for show alone
			}
			return protocol.Enrolled{}, err
		}
		sets, epoch, err := current.SetsOf(ctx, user)
		return protocol.Enrolled{User: user, Device: device, Sets: sets, Epoch: epoch}, err
	}
}

// keep is a retention time as the pruner wants it: 0 keeps for ever.
func keep(d Duration) time.Duration {
	if d == 0 {
		return 100 * 365 * day
	}
	return time.Duration(d)
}

// anyVersion tells whether the mirror has definitions.
func anyVersion(ctx context.Context, mirror *pgxpool.Pool) (bool, error) {
	var there bool
	err := mirror.QueryRow(ctx, `SELECT to_regclass('waystage.definition') IS NOT NULL`).Scan(&there)
	if err != nil || !there {
		return false, err
	}
	err = mirror.QueryRow(ctx, `SELECT EXISTS (SELECT FROM waystage.definition)`).Scan(&there)
	return there, err
}

// definitionsFailure says that the definitions file cannot be used.
func definitionsFailure(c Config, err error) error {
	return &failure{code: exitUsage, what: "the definitions cannot be used", where: c.Definitions, err: err,
		remedy: "'waystage check' names everything at once"}
}

// setupFailure gives the set-up's refusals their exit codes.
func setupFailure(c Config, err error) error {
	var problems *schema.ProblemsError
	switch {
	case errors.As(err, &problems):
		return &failure{code: exitPrecondition, what: "the set-up was refused", where: c.Definitions, err: problems,
			remedy: "'waystage check' names everything at once"}
	case errors.Is(err, schema.ErrRecopy):
		return &failure{code: exitAttention, what: "the mirror cannot go on as it is", err: err,
			remedy: "look before anything else; then 'waystage serve --recopy' makes a new epoch and copies all tables anew (devices keep their unsent changes)"}
	case errors.Is(err, schema.ErrNewer), errors.Is(err, schema.ErrWrongDatabase):
		return &failure{code: exitPrecondition, what: "the set-up was refused", err: err}
	case errors.Is(err, context.Canceled):
		return err
	}
	return &failure{code: exitCode(err), what: "the set-up failed", err: err, remedy: "it can be started again: it goes on or begins anew"}
}

// natsAddress is where devices connect.
func natsAddress(c Config, b queue.Broker) string {
	if b.Embedded != nil {
		return b.Embedded.URL()
	}
	return strings.Join(c.NATS.External.URLs, ",")
}

// splitAddress cuts host and port of a listen address; port 0 takes a free one.
func splitAddress(key, address string) (host string, port int, err error) {
	bad := func(why error) error {
		return &failure{code: exitUsage, what: "an address of the configuration cannot be used", where: key, err: why, remedy: "write host:port, for example 0.0.0.0:4222"}
	}
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, bad(err)
	}
	p, err := net.LookupPort("tcp", text)
	if err != nil {
		return "", 0, bad(err)
	}
	return host, p, nil
}
