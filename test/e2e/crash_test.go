package e2e

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/protocol"
	shared "github.com/waystage/waystage/test/world"
)

// EnvSeed repeats a run of the crash test with the same random choices; their timing stays the machine's.
const EnvSeed = "WAYSTAGE_TEST_SEED"

// EnvKills says how often the crash test kills the server; more for a night, fewer for a hurry.
const EnvKills = "WAYSTAGE_TEST_KILLS"

// TestKilledAtRandomMoments runs the real binary under a random workload of devices and office, kills it (SIGKILL) at
// random moments, again and again, and checks at the end, when nothing is in flight any more: the three sides agree, every
// record that a device sent has exactly one outcome, and no increment was lost or done twice.
func TestKilledAtRandomMoments(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv(EnvSeed); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	kills := 6
	if s := os.Getenv(EnvKills); s != "" {
		var err error
		if kills, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("to repeat: %s=%d", EnvSeed, seed)
	w := newWorld(t, nurse.Size{Nurses: 4, Patients: 24, Records: 240})
	s := newBinary(w)
	if err := s.run(); err != nil {
		t.Fatalf("%v\n%s", err, s.process.Tail(60))
	}
	w.addUsers(3)
	people := []nurse.Person{w.nurses[0], w.nurses[0], w.nurses[1], w.nurses[2]} // the first has two devices
	devices := map[*device.Device]nurse.Person{}
	var all []*device.Device
	for i, p := range people {
		d := w.enrol(p, fmt.Sprintf("device-%d", i))
		w.sync(d, protocol.WaitMerge)
		devices[d] = p
		all = append(all, d)
	}
	before := w.balances()

	// Workload and killer.
	g, ctx := errgroup.WithContext(w.ctx)
	work, stop := context.WithCancel(ctx)
	var users []*user
	for i, d := range all {
		u := &user{w: w, d: d, p: people[i], step: 101 + int64(i), random: mathrand.New(mathrand.NewPCG(seed, uint64(i)))}
		users = append(users, u)
		g.Go(func() error { return u.work(work) })
	}
	o := &office{w: w, random: mathrand.New(mathrand.NewPCG(seed, 99)), added: map[int64]int64{}}
	g.Go(func() error { return o.work(work) })
	g.Go(func() error {
		defer stop()
		random := mathrand.New(mathrand.NewPCG(seed, 100))
		for range kills {
			pause(work, time.Duration(200+random.IntN(1800))*time.Millisecond)
			if work.Err() != nil {
				return nil
			}
			s.process.Kill()
			pause(work, time.Duration(random.IntN(300))*time.Millisecond)
			if err := s.run(); err != nil {
				return err
			}
		}
		pause(work, time.Second)
		return nil
	})
	if err := g.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, s.process.Tail(60))
	}

	// Quiescence.
	defer func() {
		if t.Failed() {
			t.Logf("the end of the server's log:\n%s", s.process.Tail(60))
		}
	}()
	w.settle(all...)
	w.must(w.compare(devices))
	w.outcomes(all)
	for _, u := range users {
		u.outcomes()
	}
	w.conservation(before, o.added)
	edits := 0
	for _, u := range users {
		edits += u.edits
	}
	var applied, rejected, refused int
	w.must(w.mirror.QueryRow(w.ctx, `SELECT count(*) FILTER (WHERE state = 'applied'), count(*) FILTER (WHERE state = 'rejected'), count(*) FILTER (WHERE state = 'refused')
		FROM waystage.change`).Scan(&applied, &rejected, &refused))
	t.Logf("%d kills; %d edits on devices, %d at the office; records: %d applied, %d rejected, %d refused", kills, edits, o.edits, applied, rejected, refused)
	if applied == 0 || edits == 0 || o.edits == 0 {
		t.Error("nothing happened: the test proves nothing")
	}
	if err := s.process.Stop(patience); err != nil {
		t.Errorf("the server was asked to end: %v", err)
	}
}

// binary is the real program, run as a child process.
type binary struct {
	w       *world
	process *shared.Process
}

func newBinary(w *world) *binary {
	path := filepath.Join(w.dir, "waystage")
	w.must(shared.Build(path, ""))
	s := &binary{w: w, process: &shared.Process{Args: []string{path, "serve", "-c", w.configFile()}, Log: filepath.Join(w.dir, "server.log")}}
	w.t.Cleanup(s.process.Kill)
	return s
}

// run starts the program and waits until it is ready.
func (s *binary) run() error {
	if err := s.process.Start(); err != nil {
		return err
	}
	return shared.Ready(s.w.config.Health.Listen, patience)
}

// user edits on a device at random, and syncs.
type user struct {
	w        *world
	d        *device.Device
	p        nurse.Person
	step     int64 // cents; each device's own, so that two increments of one value never make the same image
	random   *mathrand.Rand
	edits    int
	inserted []string // ids of records that it made
}

func (u *user) work(ctx context.Context) error {
	for ctx.Err() == nil {
		for range 1 + u.random.IntN(4) {
			if err := u.edit(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("edit on the device of %s: %w", u.p.Login, err)
			}
		}
		wait := protocol.WaitMerge
		if u.random.IntN(3) == 0 {
			wait = protocol.WaitSource
		}
		one, cancel := context.WithTimeout(ctx, time.Duration(50+u.random.IntN(4000))*time.Millisecond)
		rep, err := u.d.Sync(one, device.SyncOptions{Wait: wait})
		cancel()
		switch {
		case rep.Forked:
			return fmt.Errorf("the device of %s was taken for a copy", u.p.Login)
		case err == nil, errors.Is(err, device.ErrUnreachable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		case strings.Contains(err.Error(), string(protocol.CodeBusy)):
		default:
			return fmt.Errorf("sync of %s: %w", u.p.Login, err)
		}
		pause(ctx, time.Duration(u.random.IntN(100))*time.Millisecond)
	}
	return nil
}

// edit makes one change by ordinary SQL.
func (u *user) edit(ctx context.Context) error {
	db := u.d.DB()
	pick := func(q string) (id string, ok bool) {
		return id, db.QueryRowContext(ctx, q).Scan(&id) == nil
	}
	exec := func(q string, args ...any) error {
		_, err := db.ExecContext(ctx, q, args...)
		if err == nil {
			u.edits++
		}
		return err
	}
	record, have := pick("SELECT id FROM medical_record ORDER BY random() LIMIT 1")
	switch n := u.random.IntN(20); {
	case n < 8: // an increment: losing or doubling one shows in the sum
		patient, ok := pick("SELECT id FROM patient ORDER BY random() LIMIT 1")
		if !ok {
			return nil
		}
		var cents int64
		if err := db.QueryRowContext(ctx, "SELECT CAST(round(balance * 100) AS INTEGER) FROM patient WHERE id = ?", patient).Scan(&cents); err != nil {
			return err
		}
		return exec("UPDATE patient SET balance = ? WHERE id = ?", fmt.Sprintf("%d.%02d", (cents+u.step)/100, (cents+u.step)%100), patient)
	case n < 13:
		patient, ok := pick("SELECT id FROM patient ORDER BY random() LIMIT 1")
		if !ok {
			return nil
		}
		id := newUUID()
		if err := exec(`INSERT INTO medical_record (id, patient_id, nurse_id, taken, pulse, note) VALUES (?, ?, ?, '2026-01-01 00:00:00+00', ?, 'made')`,
			id, patient, u.p.ID, 40+u.random.IntN(100)); err != nil {
			return err
		}
		u.inserted = append(u.inserted, id)
		return nil
	case !have:
		return nil
	case n < 17:
		return exec("UPDATE medical_record SET note = coalesce(note, '') || '.' WHERE id = ?", record)
	case n < 18: // the source refuses it
		return exec("UPDATE medical_record SET pulse = 7 WHERE id = ?", record)
	case n < 19:
		return exec("DELETE FROM medical_record WHERE id = ?", record)
	default:
		visit, ok := pick("SELECT id FROM visit ORDER BY random() LIMIT 1")
		if !ok {
			return nil
		}
		return exec("UPDATE visit SET state = CASE state WHEN 'done' THEN 'planned' ELSE 'done' END, minutes = 20 WHERE id = ?", visit)
	}
}

// outcomes checks that each record that the user made has exactly one: it is at the source, or in the rejected log, or it
// was deleted again (by a device's record, applied, or by the office).
func (u *user) outcomes() {
	w := u.w
	w.t.Helper()
	rejects, err := u.d.Rejects(w.ctx)
	w.must(err)
	logged := map[string]int{}
	for _, r := range rejects {
		if r.Op == protocol.Insert && len(r.Key) == 1 {
			logged[*r.Key[0]]++
		}
	}
	for _, id := range u.inserted {
		var inserts, applied int
		w.must(w.mirror.QueryRow(w.ctx, `SELECT count(*), count(*) FILTER (WHERE state = 'applied') FROM waystage.change
			WHERE tname = 'vn.medical_record' AND op = 'I' AND key = ARRAY[$1::text]`, id).Scan(&inserts, &applied))
		var there, kept int
		w.must(w.source.QueryRow(w.ctx, "SELECT count(*) FROM vn.medical_record WHERE id = $1::text::uuid", id).Scan(&there))
		w.must(u.d.DB().QueryRowContext(w.ctx, "SELECT count(*) FROM medical_record WHERE id = ?", id).Scan(&kept))
		switch {
		case inserts == 0 && there == 0 && logged[id] == 0 && kept == 0: // made and deleted again before it was ever sent
		case applied == 1 && inserts == 1 && logged[id] == 0:
		case applied == 0 && there == 0 && inserts == logged[id] && inserts >= 1:
		default:
			w.t.Errorf("record %s of %s: %d records in the ledger, %d applied, %d at the source, %d entries in the device's log, %d on the device",
				id, u.p.Login, inserts, applied, there, logged[id], kept)
		}
	}
}

// outcomes checks that the ledger has a final state for every record, and that each device's rejected log is the
// server's.
func (w *world) outcomes(devices []*device.Device) {
	w.t.Helper()
	var open, staged int
	w.must(w.mirror.QueryRow(w.ctx, "SELECT (SELECT count(*) FROM waystage.change WHERE state = 'merged'), (SELECT count(*) FROM waystage.staging)").Scan(&open, &staged))
	if open+staged > 0 {
		w.t.Errorf("%d records without a verdict, %d in staging", open, staged)
	}
	for _, d := range devices {
		status, err := d.Status(w.ctx)
		w.must(err)
		l, err := d.Rejects(w.ctx)
		w.must(err)
		device := map[string]bool{}
		for _, r := range l {
			device[fmt.Sprintf("%s/%d", r.Session, r.Index)] = true
		}
		rows, err := w.mirror.Query(w.ctx, `SELECT c.incarnation || '-' || c.n || '/' || c.idx FROM waystage.change c JOIN waystage.device d ON d.id = c.device_id
			WHERE d.user_name = $1 AND d.name = $2 AND c.state IN ('rejected', 'refused')`, status.User, status.Device)
		w.must(err)
		server, err := pgx.CollectRows(rows, pgx.RowTo[string])
		w.must(err)
		if len(l) != len(server) || len(device) != len(l) {
			w.t.Errorf("%s/%s: %d entries in the device's rejected log (%d different), %d in the server's", status.User, status.Device, len(l), len(device), len(server))
		}
		for _, id := range server {
			if !device[id] {
				w.t.Errorf("%s/%s does not know that %s was rejected", status.User, status.Device, id)
			}
		}
	}
}

// balances reads every patient's balance at the source, in cents.
func (w *world) balances() map[int64]int64 {
	w.t.Helper()
	rows, err := w.source.Query(w.ctx, "SELECT id, (balance * 100)::bigint FROM vn.patient")
	w.must(err)
	out := map[int64]int64{}
	var id, cents int64
	_, err = pgx.ForEachRow(rows, []any{&id, &cents}, func() error { out[id] = cents; return nil })
	w.must(err)
	return out
}

// conservation checks that every patient's balance grew by exactly what the applied records and the office added: a lost
// update would be missing, a doubled one too much.
func (w *world) conservation(before, office map[int64]int64) {
	w.t.Helper()
	rows, err := w.mirror.Query(w.ctx, `SELECT key[1]::bigint, sum(((img->>'balance')::numeric - (base->>'balance')::numeric) * 100)::bigint FROM waystage.change
		WHERE tname = 'vn.patient' AND state = 'applied' AND img ? 'balance' GROUP BY 1`)
	w.must(err)
	applied := map[int64]int64{}
	var id, cents int64
	_, err = pgx.ForEachRow(rows, []any{&id, &cents}, func() error { applied[id] = cents; return nil })
	w.must(err)
	for id, now := range w.balances() {
		if want := before[id] + applied[id] + office[id]; now != want {
			w.t.Errorf("patient %d: balance went from %d to %d; devices added %d, the office %d", id, before[id], now, applied[id], office[id])
		}
	}
}

// office edits at the source.
type office struct {
	w      *world
	random *mathrand.Rand
	edits  int
	added  map[int64]int64 // cents by patient
}

func (o *office) work(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := o.edit(ctx); err != nil && ctx.Err() == nil {
			return fmt.Errorf("edit at the office: %w", err)
		}
		pause(ctx, time.Duration(5+o.random.IntN(60))*time.Millisecond)
	}
	return nil
}

func (o *office) edit(ctx context.Context) error {
	// A commit whose outcome is unknown would spoil the sums: the test's end must not cancel one.
	done := context.WithoutCancel(ctx)
	patient := int64(nurse.FirstPatient + o.random.IntN(o.w.size.Patients))
	exec := func(q string, args ...any) error {
		_, err := o.w.source.Exec(done, q, args...)
		if err == nil {
			o.edits++
		}
		return err
	}
	switch n := o.random.IntN(10); {
	case n < 4:
		err := exec("UPDATE vn.patient SET balance = balance + 10 WHERE id = $1", patient)
		if err == nil {
			o.added[patient] += 1000
		}
		return err
	case n < 6:
		return exec("UPDATE vn.medical_record SET note = 'office' WHERE id = (SELECT id FROM vn.medical_record ORDER BY random() LIMIT 1)")
	case n < 7:
		return exec("DELETE FROM vn.medical_record WHERE id = (SELECT id FROM vn.medical_record WHERE patient_id = $1 ORDER BY random() LIMIT 1)", patient)
	case n < 8: // a whole transaction
		return pgx.BeginFunc(done, o.w.source, func(tx pgx.Tx) error {
			for range 5 {
				if _, err := tx.Exec(done, "INSERT INTO vn.medical_record (id, patient_id, nurse_id, taken) VALUES ($1::text::uuid, $2, 1, now())", newUUID(), patient); err != nil {
					return err
				}
				o.edits++
			}
			return nil
		})
	case n < 9: // somebody's subset grows
		return exec("INSERT INTO vn.assignment VALUES ($1, $2, '2026-01-01') ON CONFLICT DO NOTHING", 1+o.random.IntN(3), patient)
	default: // or shrinks
		return exec("DELETE FROM vn.assignment WHERE nurse_id = $1 AND patient_id = $2", 1+o.random.IntN(3), patient)
	}
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
