package capture

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/nettest"
	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/internal/trouble"
	"github.com/waystage/waystage/schema"
)

// The tests of docs/hazards.md that concern one server's stream.

// again starts another capture with an empty queue.
func (r *rig) again() {
	r.q.set(func() { r.q.msgs = nil })
	r.run()
}

// inQueue waits until the queue holds so many rows.
func (r *rig) inQueue(rows int) {
	r.t.Helper()
	r.eventually(fmt.Sprintf("%d rows in the queue", rows), func() bool { n, _ := r.q.rows(); return n == rows })
}

// followed waits until the slot has been told everything that the target has.
func (r *rig) followed() {
	r.t.Helper()
	_, end := r.q.rows()
	r.eventually("the slot follows the target", func() bool { return r.confirmed() >= end })
}

// troubles are what the mirror says about the capture.
func (r *rig) troubles() []trouble.Trouble {
	r.t.Helper()
	list, err := trouble.List(r.ctx, r.mirror)
	if err != nil {
		r.t.Fatal(err)
	}
	return list
}

// stands waits for the capture to give up for this reason, and checks that the mirror says so, with a remedy.
func (r *rig) stands(code Code, detail string) {
	r.t.Helper()
	err := r.fatal()
	if err.Code != code || !strings.Contains(err.Detail, detail) {
		r.t.Errorf("%v, want %s with %q", err, code, detail)
	}
	list := r.troubles()
	if len(list) != 1 || list[0].Part != "capture-down" || list[0].Code != string(code) || !strings.Contains(list[0].Detail, detail) || list[0].Remedy == "" || list[0].Process == "" {
		r.t.Errorf("the mirror says %+v", list)
	}
}

// through puts a proxy before a server.
func through(t *testing.T, dsn string) (*nettest.Proxy, string) {
	t.Helper()
	p, address, err := nettest.InFrontOf(dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p, address
}

const otherLog = "INSERT INTO public.unpublished SELECT repeat('x', 1000) FROM generate_series(1, 2000)"

// Nothing that the target has not got durably is acknowledged, whatever keepalives and other log say.
func TestHazardAckBeforeDurable(t *testing.T) {
	r := newRig(t, pgtest.Source(t))
	r.cfg.IdleBytes = 64 << 10
	start := r.confirmed()
	r.run()
	for i := range 50 {
		r.exec(r.server, fmt.Sprintf("INSERT INTO public.t VALUES (%d, 'x')", i))
	}
	r.inQueue(50)
	r.exec(r.server, otherLog)
	end := r.lsn(r.server, "SELECT pg_current_wal_lsn()::text")
	r.eventually("a keepalive tells of the other log", func() bool { return r.capture.Stats().ServerEnd >= end })
	time.Sleep(1500 * time.Millisecond) // and more come
	if at := r.confirmed(); at > start {
		t.Fatalf("the slot is at %s, the target at %s", at, start)
	}
	r.eventually("the figures say so", func() bool { st := r.capture.Stats(); return st.LagBytes > 0 && st.Transactions == 50 })
	r.halt() // not even a clean stop acknowledges
	if at := r.confirmed(); at > start {
		t.Fatalf("after a stop the slot is at %s, the target at %s", at, start)
	}
	r.run()
	r.eventually("another run", func() bool { n, _ := r.q.rows(); return r.q.resets == 2 && n == 50 })
	r.apply()
	r.followed()
}

// What is acknowledged is a transaction's end: neither is it sent again, nor is the next one missing.
func TestHazardEndPosition(t *testing.T) {
	r := newRig(t, pgtest.Source(t))
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.inQueue(1)
	r.apply()
	r.followed()
	r.halt()
	r.exec(r.server, "INSERT INTO public.t VALUES (2, 'after')") // begins where the first one ends
	r.again()
	r.eventually("the next row", func() bool { n, _ := r.q.rows(); return n > 0 })
	if n, _ := r.q.rows(); n != 1 {
		t.Errorf("%d rows after a restart, want 1", n)
	}
	r.apply()
	r.halt()

	// The target is durable beyond what the slot was told (killed before the acknowledgement): skipped by position.
	r.exec(r.server, "INSERT INTO public.t VALUES (3, 'a')", "INSERT INTO public.t VALUES (4, 'b')")
	r.again()
	r.inQueue(2)
	for _, m := range r.q.msgs {
		r.exec(r.mirror, fmt.Sprintf("UPDATE waystage.progress SET position = '%s' WHERE direction = 'down' AND position < '%[1]s'", m.End))
	}
	r.exec(r.server, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '"+r.cfg.Slot+"'", "INSERT INTO public.t VALUES (5, 'c')")
	r.eventually("a run that skips what is applied", func() bool { n, _ := r.q.rows(); return r.capture.Stats().Runs == 2 && n == 1 })
}

// A server that writes much and nothing for us keeps no log for us, and what we tell it costs one row now and then.
func TestHazardIdleSlotAdvances(t *testing.T) {
	r := newRig(t, pgtest.Source(t))
	r.cfg.IdleBytes = 64 << 10
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.inQueue(1)
	r.apply()
	for range 3 {
		r.exec(r.server, otherLog)
		now := r.lsn(r.server, "SELECT pg_current_wal_lsn()::text")
		r.eventually("the slot advances", func() bool { return r.confirmed()+64<<10 >= now })
		// What the slot keeps begins where the decoder can begin: at a checkpoint that it has passed.
		r.eventually("the kept log shrinks", func() bool {
			r.exec(r.server, "CHECKPOINT", "INSERT INTO public.unpublished SELECT repeat('x', 1000) FROM generate_series(1, 200)")
			var kept int64
			if err := r.server.QueryRow(r.ctx, "SELECT (pg_current_wal_lsn() - restart_lsn)::bigint FROM pg_replication_slots WHERE slot_name = $1", r.cfg.Slot).Scan(&kept); err != nil {
				t.Fatal(err)
			}
			return kept < 2<<20
		})
	}
	if st := r.capture.Stats(); st.LagBytes != 0 {
		t.Errorf("lag without anything in flight: %+v", st)
	}
	if n, _ := r.q.rows(); n != 1 {
		t.Errorf("%d rows were published", n)
	}
}

// The queue, or the applier behind it, stands for longer than wal_sender_timeout: the server gets its answers.
func TestHazardSlowApply(t *testing.T) {
	r := newRig(t, pgtest.Source(t))
	var db string
	if err := r.server.QueryRow(r.ctx, "SELECT quote_ident(current_database())").Scan(&db); err != nil {
		t.Fatal(err)
	}
	r.exec(r.server, "ALTER DATABASE "+db+" SET wal_sender_timeout = '6s'")
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.inQueue(1)
	r.q.set(func() { r.q.refuse = errors.New("full") })
	for i := range 200 { // more than all buffers on the way hold
		r.exec(r.server, fmt.Sprintf("INSERT INTO public.t VALUES (%d, repeat('y', 20000))", 10+i))
	}
	time.Sleep(14 * time.Second)
	r.q.set(func() { r.q.refuse = nil })
	r.inQueue(201)
	time.Sleep(8 * time.Second) // taken by the queue, and not applied
	if st := r.capture.Stats(); st.Runs != 1 {
		t.Errorf("%d runs: the server has given us up. %+v", st.Runs, st)
	}
}

// A server that is told to stop waits for its readers: an idle capture must let it go, and go on when it is back.
func TestHazardServerStops(t *testing.T) {
	c := pgtest.Cluster(t, nil)
	r := newRig(t, c.DSN("postgres"))
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.inQueue(1)
	r.apply()
	r.followed()
	began := time.Now()
	if err := c.Restart(r.ctx); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	t.Logf("restart with an idle reader: %s", took)
	if took > 50*time.Second { // it would wait for wal_sender_timeout, 60 seconds
		t.Errorf("the server waited for us: %s", took)
	}
	r.server = r.connect(c.DSN("postgres"))
	r.exec(r.server, "INSERT INTO public.t VALUES (2, 'x')")
	r.eventually("the row after the restart", func() bool { n, _ := r.q.rows(); return n >= 1 })
}

// A connection on which nothing comes any more, without an end: noticed within a bound, whichever direction is dead, and the
// next run goes on. The server's own patience (here for ever) does not matter.
func TestHazardHalfOpenServer(t *testing.T) {
	dsn := pgtest.Source(t)
	proxy, far := through(t, dsn)
	r := newRig(t, dsn)
	var db string
	if err := r.server.QueryRow(r.ctx, "SELECT quote_ident(current_database())").Scan(&db); err != nil {
		t.Fatal(err)
	}
	r.exec(r.server, "ALTER DATABASE "+db+" SET wal_sender_timeout = 0")
	r.cfg.Server, r.cfg.Silence = far, 3*time.Second
	r.run()
	rows := 0
	for _, dead := range [][]nettest.Direction{{nettest.ToClient}, {nettest.ToServer}, {nettest.ToClient, nettest.ToServer}} {
		rows++
		r.exec(r.server, fmt.Sprintf("INSERT INTO public.t VALUES (%d, 'x')", rows))
		r.inQueue(rows)
		for _, d := range dead {
			proxy.Hold(d, true)
		}
		began := time.Now()
		r.eventually("the dead connection is noticed", func() bool { return r.capture.Stats().State != "streaming" })
		t.Logf("dead %v: noticed after %s", dead, time.Since(began))
		for _, d := range dead {
			proxy.Hold(d, false)
		}
		rows++
		r.exec(r.server, fmt.Sprintf("INSERT INTO public.t VALUES (%d, 'x')", rows))
		r.inQueue(rows)
	}
}

// The same for the mirror, where the target's position is: the capture does not go on with an old one for ever.
func TestHazardHalfOpenMirror(t *testing.T) {
	r := newRig(t, pgtest.Source(t))
	proxy, far := through(t, r.cfg.Mirror)
	r.cfg.Mirror, r.cfg.Silence = far, 3*time.Second
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.inQueue(1)
	proxy.Hold(nettest.ToClient, true)
	began := time.Now()
	r.eventually("the dead connection is noticed", func() bool { return r.capture.Stats().State != "streaming" })
	t.Logf("noticed after %s", time.Since(began))
	proxy.Hold(nettest.ToClient, false)
	r.exec(r.server, "INSERT INTO public.t VALUES (2, 'x')")
	r.inQueue(2)
}

// The server's patience ends (max_slot_wal_keep_size): named, visible and final, while we read and while we do not.
func TestHazardSlotLost(t *testing.T) {
	c := pgtest.Cluster(t, map[string]string{"max_slot_wal_keep_size": "16MB", "wal_keep_size": "0", "min_wal_size": "32MB", "max_wal_size": "48MB"})
	for name, reading := range map[string]bool{"while away": false, "while reading": true} {
		t.Run(name, func(t *testing.T) {
			db := "lost_" + strconv.FormatBool(reading)
			admin, err := schema.Connect(t.Context(), c.DSN("postgres"), "test")
			if err != nil {
				t.Fatal(err)
			}
			defer admin.Close(t.Context())
			if _, err := admin.Exec(t.Context(), "CREATE DATABASE "+db); err != nil {
				t.Fatal(err)
			}
			r := newRig(t, c.DSN(db))
			r.run()
			r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
			r.inQueue(1)
			if !reading {
				r.halt()
			}
			r.eventually("the server gives the slot up", func() bool {
				r.exec(r.server, "INSERT INTO public.unpublished SELECT repeat('x', 1000) FROM generate_series(1, 8000)", "SELECT pg_switch_wal()", "CHECKPOINT")
				var lost bool
				if err := r.server.QueryRow(r.ctx, "SELECT wal_status = 'lost' FROM pg_replication_slots WHERE slot_name = $1", r.cfg.Slot).Scan(&lost); err != nil {
					t.Fatal(err)
				}
				return lost
			})
			if !reading {
				r.run()
			}
			r.stands(CodeSlotLost, "")
			r.run() // a retry changes nothing, and does not hide it
			r.stands(CodeSlotLost, "max_slot_wal_keep_size")
		})
	}
}

// PostgreSQL 18 gives up slots that nobody reads for some time: told apart from a slot whose log was removed. Before 18 there
// is no such thing, which is checked too.
func TestHazardIdleSlotTimeout(t *testing.T) {
	major, err := pgtest.Major()
	if err != nil {
		t.Fatal(err)
	}
	if major < 18 {
		r := newRig(t, pgtest.Source(t))
		if got := r.text("SELECT coalesce(current_setting('idle_replication_slot_timeout', true), 'none')"); got != "none" {
			t.Errorf("PostgreSQL %d has idle_replication_slot_timeout = %s: its slots can be lost by it", major, got)
		}
		if got := schema.SlotTrouble("lost", "idle_timeout"); !strings.Contains(got, "idle_replication_slot_timeout") {
			t.Error(got)
		}
		return
	}
	c := pgtest.Cluster(t, map[string]string{"idle_replication_slot_timeout": "1s"})
	r := newRig(t, c.DSN("postgres"))
	found, err := schema.Preflight(r.ctx, c.DSN("postgres"), r.cfg.Mirror, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	warned := false
	for _, f := range found {
		warned = warned || f.Code == "idle_replication_slot_timeout" && f.Level == schema.Warning
	}
	if !warned {
		t.Error("the preflight does not warn")
	}
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.inQueue(1)
	r.halt()
	r.eventually("the server gives the slot up", func() bool {
		r.exec(r.server, "CHECKPOINT")
		return r.text("SELECT coalesce(invalidation_reason, '') FROM pg_replication_slots") == "idle_timeout"
	})
	r.run()
	r.stands(CodeSlotLost, "idle_replication_slot_timeout")
}

func (r *rig) text(sql string) (s string) {
	r.t.Helper()
	if err := r.server.QueryRow(r.ctx, sql).Scan(&s); err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
	return s
}

// applyReally moves the target's position as an applier does: with the commit time of the transaction that ends there.
func (r *rig) applyReally() {
	r.t.Helper()
	_, end := r.q.rows()
	var at time.Time
	var frames change.Frames
	r.q.set(func() {
		for _, m := range r.q.msgs {
			if err := frames.Feed(m.Body, func(frame []byte) error {
				if change.KindOf(frame) == change.KindCommit {
					_, t, err := change.BoundaryOf(frame)
					at = t
					return err
				}
				return nil
			}); err != nil {
				r.t.Fatal(err)
			}
		}
	})
	if _, err := r.mirror.Exec(r.ctx, "UPDATE waystage.progress SET position = $1::text::pg_lsn, committed_at = $2 WHERE direction = 'down'", end.String(), at); err != nil {
		r.t.Fatal(err)
	}
}

// copyData copies a stopped cluster's files.
func copyData(t *testing.T, c *pgcluster.Cluster, from, to string) {
	t.Helper()
	for _, args := range [][]string{{"rm", "-rf", filepath.Join(c.Dir(), to)}, {"cp", "-a", filepath.Join(c.Dir(), from), filepath.Join(c.Dir(), to)}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v %s", args, err, out)
		}
	}
}

// The source is restored from a copy of its disk, slots included, and has gone on: its log is as long as the target's
// position, or longer, but another one. Going on would skip what was written since, and say nothing.
func TestHazardRestoredServer(t *testing.T) {
	c := pgtest.Cluster(t, nil)
	r := newRig(t, c.DSN("postgres"))
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.inQueue(1)
	r.applyReally()
	r.followed()
	r.halt()
	restart := func() {
		t.Helper()
		if err := c.Restart(r.ctx); err != nil {
			t.Fatal(err)
		}
		r.server = r.connect(c.DSN("postgres"))
	}
	// Large: what a server that starts, or is at rest, writes to its log by itself does not make up for it.
	const lost = "INSERT INTO public.t SELECT 2, 'lost by the restore ' || string_agg(md5(i::text), '') FROM generate_series(1, 3000) AS i"
	c.Stop()
	copyData(t, c, "data", "backup")
	restart()
	r.again()
	r.exec(r.server, lost)
	r.inQueue(1)
	r.applyReally()
	r.followed()
	r.halt()
	slot := r.confirmed()

	c.Stop()
	copyData(t, c, "backup", "data")
	restart()
	r.again()
	r.stands(CodeServerBack, "the server's log ends at")
	// Other transactions take the place of the lost ones.
	for i := 0; r.lsn(r.server, "SELECT pg_current_wal_flush_lsn()::text") < slot+1<<16; i++ {
		r.exec(r.server, fmt.Sprintf("INSERT INTO public.t VALUES (%d, repeat('written after the restore', 40))", 100+i))
	}
	before := r.confirmed()
	r.again()
	r.stands(CodeServerBack, "")
	if at := r.confirmed(); at > before {
		t.Errorf("the slot was moved from %s to %s: what was written after the restore is lost", before, at)
	}

	// Even the same statement at the same place is another transaction.
	c.Stop()
	copyData(t, c, "backup", "data")
	restart()
	r.exec(r.mirror, "UPDATE waystage.progress SET position = '"+slot.String()+"'")
	r.exec(r.server, lost)
	for i := 0; r.lsn(r.server, "SELECT pg_current_wal_flush_lsn()::text") <= slot; i++ {
		r.exec(r.server, fmt.Sprintf("INSERT INTO public.t VALUES (%d, 'x')", 1000+i))
	}
	r.again()
	r.stands(CodeServerBack, "")

	// Copied anew (here: the position is the new slot's) it goes on, and the mirror says no more that it stands.
	r.exec(r.server, "SELECT pg_drop_replication_slot('"+r.cfg.Slot+"')")
	at := r.lsn(r.server, "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput')", r.cfg.Slot)
	r.exec(r.mirror, "UPDATE waystage.progress SET position = '"+at.String()+"', committed_at = NULL")
	r.again()
	r.exec(r.server, "INSERT INTO public.t VALUES (5000, 'x')")
	r.inQueue(1)
	if list := r.troubles(); len(list) != 0 {
		t.Errorf("the trouble is over, the mirror still says %+v", list)
	}
}

// A standby is promoted: with all that the target has it is the same server, under another timeline; without it not.
func TestHazardPromotedServer(t *testing.T) {
	c := pgtest.Cluster(t, nil)
	r := newRig(t, c.DSN("postgres"))
	r.exec(r.server, "ALTER SYSTEM SET restore_command = 'false'")
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.inQueue(1)
	r.applyReally()
	r.followed()
	r.halt()
	start := func(promote bool) {
		t.Helper()
		if promote { // an archive recovery without an archive: it ends at the end of the log, on a new timeline
			data := filepath.Join(c.Dir(), "data")
			if out, err := exec.Command("cp", "-a", filepath.Join(data, "PG_VERSION"), filepath.Join(data, "recovery.signal")).CombinedOutput(); err != nil {
				t.Fatalf("%v %s", err, out)
			}
		}
		if err := c.Restart(r.ctx); err != nil {
			t.Fatal(err)
		}
		r.server = r.connect(c.DSN("postgres"))
		r.eventually("the server is no standby", func() bool { return r.text("SELECT pg_is_in_recovery()::text") == "false" })
	}
	timeline := func() (n int) {
		t.Helper()
		if err := r.mirror.QueryRow(r.ctx, "SELECT timeline FROM waystage.progress WHERE direction = 'down' AND system <> ''").Scan(&n); err != nil && !errors.Is(err, pgx.ErrNoRows) {
			t.Fatal(err)
		}
		return n
	}
	first := timeline()
	c.Stop()
	start(true)
	r.again()
	r.exec(r.server, "INSERT INTO public.t VALUES (2, 'on the new timeline')")
	r.inQueue(1)
	r.applyReally()
	r.followed()
	r.halt()
	second := timeline()
	if first != 1 || second != 2 {
		t.Errorf("timelines %d and %d, want 1 and 2", first, second)
	}

	// Now one that branched off before the last transaction that the target has.
	c.Stop()
	copyData(t, c, "data", "standby")
	start(false)
	r.again()
	r.exec(r.server, "INSERT INTO public.t VALUES (3, 'not on the standby')")
	r.inQueue(1)
	r.applyReally()
	r.followed()
	r.halt()
	durable := r.confirmed()
	c.Stop()
	copyData(t, c, "standby", "data")
	start(true)
	for i := 0; r.lsn(r.server, "SELECT pg_current_wal_flush_lsn()::text") < durable+1<<12; i++ {
		r.exec(r.server, fmt.Sprintf("INSERT INTO public.t VALUES (%d, 'x')", 100+i))
	}
	r.again()
	r.stands(CodeServerBack, "timeline 2 ended at")
}

// The connection leads to another server, or somebody has moved our slot.
func TestHazardOtherServer(t *testing.T) {
	r := newRig(t, pgtest.Source(t))
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.inQueue(1)
	r.halt()
	var system string
	if err := r.mirror.QueryRow(r.ctx, "SELECT system FROM waystage.progress").Scan(&system); err != nil || system == "" {
		t.Fatalf("the position does not say whose it is: %q %v", system, err)
	}
	r.exec(r.mirror, "UPDATE waystage.progress SET system = system || '0'")
	r.run()
	r.stands(CodeSystem, system)
	r.exec(r.mirror, "UPDATE waystage.progress SET system = '"+system+"'")
	r.eventually("somebody moves the slot", func() bool {
		_, err := r.server.Exec(r.ctx, "SELECT pg_replication_slot_advance($1, pg_current_wal_lsn())", r.cfg.Slot)
		return err == nil
	})
	r.run()
	r.stands(CodeSlotAhead, "was moved to")
}

// A slot that is older than its publication cannot be read up to PostgreSQL 17, and misses what came between from 18 on;
// set-up makes the publication first. A publication that vanishes while we read is named on every version.
func TestHazardPublicationOrder(t *testing.T) {
	r := newRig(t, pgtest.Source(t))
	r.exec(r.mirror, "INSERT INTO waystage.meta VALUES ('publication', '"+r.text("SELECT oid::text FROM pg_publication")+"')") // as set-up does
	r.run()
	r.exec(r.server, "INSERT INTO public.t VALUES (1, 'x')")
	r.inQueue(1)
	r.exec(r.server, `DROP PUBLICATION "odd ""pub's"`, "INSERT INTO public.t VALUES (2, 'nobody is told')")
	r.stands(CodePublication, "odd")

	r.exec(r.server, `CREATE PUBLICATION "odd ""pub's" FOR TABLE public.t`, "INSERT INTO public.t VALUES (3, 'after')")
	r.again()
	r.stands(CodePublication, "odd")
}
