package cmd

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/schema"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

const testPassword = "visiting-hours"

// operator has a source with data, an empty mirror, and files that init wrote for them.
type operator struct {
	t      testing.TB
	dir    string
	config string
	source string
	mirror string
	nats   string
}

func newOperator(t testing.TB) *operator {
	t.Helper()
	o := &operator{t: t, dir: t.TempDir(), source: pgtest.Source(t), mirror: pgtest.Mirror(t)}
	o.config = filepath.Join(o.dir, "waystage.yaml")
	conn, err := schema.Connect(t.Context(), o.source, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if err := nurse.Load(t.Context(), conn, nurse.Size{Nurses: 3, Patients: 12, Records: 36}); err != nil {
		t.Fatal(err)
	}
	return o
}

// init makes the configuration files.
func (o *operator) init() {
	o.t.Helper()
	if got := waystage(o.t, nil, "", "init", "--source", o.source, "--mirror", o.mirror, "--dir", o.dir); got.code != exitOK {
		o.t.Fatalf("%+v", got)
	}
}

// serve runs a server with these definitions and settings until stop.
func (o *operator) serve(definitions string, set ...string) (stop func()) {
	o.t.Helper()
	return o.serveLogging(zaptest.NewLogger(o.t, zaptest.Level(zap.ErrorLevel)), definitions, set...)
}

// serveLogging does so with a log of the test's own.
func (o *operator) serveLogging(log *zap.Logger, definitions string, set ...string) (stop func()) {
	o.t.Helper()
	if err := os.WriteFile(filepath.Join(o.dir, "definitions.yaml"), []byte(definitions), 0o600); err != nil {
		o.t.Fatal(err)
	}
	o.nats = freePort(o.t)
	conf, err := load(&terminal{}, o.config, append([]string{"nats.embedded.listen=" + o.nats}, set...))
	if err != nil {
		o.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(o.t.Context())
	ready, ended := make(chan Info, 1), make(chan error, 1)
	go func() {
		ended <- Serve(ctx, conf, log, func(i Info) { ready <- i })
	}()
	select {
	case <-ready:
	case err := <-ended:
		o.t.Fatal(err)
	case <-time.After(2 * time.Minute):
		o.t.Fatal("the server does not get ready")
	}
	return func() {
		cancel()
		if err := <-ended; err != nil {
			o.t.Errorf("the server ended with %v", err)
		}
	}
}

// run runs a command line that must end with the code.
func (o *operator) run(code int, stdin, line string) outcome {
	o.t.Helper()
	got := waystage(o.t, nil, stdin, strings.Fields(line+" -c "+o.config)...)
	if got.code != code {
		o.t.Fatalf("waystage %s: exit code %d, want %d\n%s%s", line, got.code, code, got.out, got.err)
	}
	return got
}

// data runs a command line and reads its JSON.
func data[T any](o *operator, code int, line string) T {
	o.t.Helper()
	var v T
	got := o.run(code, "", line)
	if err := json.Unmarshal([]byte(got.out), &v); err != nil {
		o.t.Fatalf("waystage %s: %v\n%s%s", line, err, got.out, got.err)
	}
	return v
}

// freePort is an address that nobody listens on.
func freePort(t testing.TB) string {
	t.Helper()
	port, err := pgcluster.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}

func TestInitAndCheck(t *testing.T) {
	o := newOperator(t)
	conn, err := pgx.Connect(t.Context(), o.source)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if _, err := conn.Exec(t.Context(), "CREATE TABLE public.keyless (a int)"); err != nil {
		t.Fatal(err)
	}
	args := []string{"init", "--source", o.source, "--mirror", o.mirror, "--dir", o.dir}
	got := waystage(t, nil, "", args...)
	if got.code != exitOK || !strings.Contains(got.err, "public.keyless") || !strings.Contains(got.err, "waystage serve") {
		t.Fatalf("%+v", got)
	}
	if again := waystage(t, nil, "", args...); again.code != exitPrecondition || !strings.Contains(again.err, "--force") {
		t.Errorf("a second init: %+v", again)
	}
	if forced := waystage(t, nil, "", append(args, "--force")...); forced.code != exitOK {
		t.Errorf("init --force: %+v", forced)
	}
	body, err := os.ReadFile(filepath.Join(o.dir, "definitions.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if _, problems := schema.ParseDefinitions("definitions.yaml", body); len(problems) > 0 {
		t.Errorf("what init wrote is not in order: %v", problems)
	}
	// What init wrote passes the preflight as it is.
	findings := data[[]schema.Finding](o, exitOK, "check -o json")
	seen := map[string]bool{}
	for _, f := range findings {
		seen[f.Code] = true
		if f.Level == schema.Failure {
			t.Errorf("%s: %s", f.Where, f.What)
		}
		if f.Level == schema.Failure && f.Remedy == "" {
			t.Errorf("%s has no remedy", f.Code)
		}
	}
	for _, code := range []string{"wal_level", "definitions", "broker", "connect"} {
		if !seen[code] {
			t.Errorf("check says nothing about %s", code)
		}
	}
	// A slip is found, with its place.
	if err := os.WriteFile(filepath.Join(o.dir, "definitions.yaml"), []byte(strings.Replace(string(body), "table: vn.patient", "table: vn.patent", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if bad := o.run(exitPrecondition, "", "check"); !strings.Contains(bad.err, "vn.patent") || !strings.Contains(bad.err, "do:") {
		t.Errorf("%s", bad.err)
	}
}

func TestInitKeepsPasswordsApart(t *testing.T) {
	o := newOperator(t)
	withPassword := strings.Replace(o.source, "waystage@", "waystage:geheim@", 1)
	if got := waystage(t, nil, "", "init", "--source", withPassword, "--mirror", o.mirror, "--dir", o.dir); got.code != exitUsage || strings.Contains(got.err, "geheim") {
		t.Errorf("a password on the command line: %+v", got)
	}
	got := waystage(t, []string{"WAYSTAGE_SOURCE_DSN=" + withPassword, "WAYSTAGE_MIRROR_DSN=" + o.mirror}, "", "init", "--dir", o.dir)
	if got.code != exitOK {
		t.Fatalf("%+v", got)
	}
	body, err := os.ReadFile(o.config)
	if err != nil || strings.Contains(string(body), "geheim") {
		t.Errorf("the configuration carries the password (%v)", err)
	}
	info, err := os.Stat(filepath.Join(o.dir, "source.dsn"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	c, err := load(&terminal{}, o.config, nil)
	if err != nil || c.Source.DSN != withPassword || c.Mirror.DSN != o.mirror {
		t.Errorf("%q %q %v", c.Source.DSN, c.Mirror.DSN, err)
	}
}

func TestInitNATS(t *testing.T) {
	dir := t.TempDir()
	if got := waystage(t, nil, "", "init", "--nats", dir); got.code != exitOK {
		t.Fatalf("%+v", got)
	}
	k, err := readKeys(filepath.Join(dir, "keys.json"))
	if err != nil || k.Secrets.App == "" || k.Secrets.IssuerSeed == "" {
		t.Errorf("%v", err)
	}
	conf, err := os.ReadFile(filepath.Join(dir, "nats-server.conf"))
	if err != nil || !strings.Contains(string(conf), "auth_callout") || !strings.Contains(string(conf), k.Secrets.App) {
		t.Errorf("%v\n%s", err, conf)
	}
	if got := waystage(t, nil, "", "init", "--nats", dir); got.code != exitPrecondition {
		t.Errorf("keys were overwritten: %+v", got)
	}
}

// TestOperate works every command of operator and device against a running server.
func TestOperate(t *testing.T) {
	o := newOperator(t)
	o.init()
	o.run(exitPrecondition, "", "users ls") // before the set-up
	health := freePort(t)
	stop := o.serve(nurse.Definitions(), "health.listen="+health, "retention.wal=1B")
	defer func() {
		if stop != nil {
			stop()
		}
	}()

	for _, path := range []string{"/healthz", "/readyz", "/metrics"} {
		resp, err := http.Get("http://" + health + path)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %v %v", path, resp, err)
		}
		_ = resp.Body.Close()
	}

	// A slot that holds back more than it should is told, and makes nobody unready.
	o.eventually("readyz tells of kept WAL", func() bool {
		resp, err := http.Get("http://" + health + "/readyz?verbose")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		var told struct {
			Ready  bool
			Checks []struct{ Name, Note string }
		}
		if err := json.NewDecoder(resp.Body).Decode(&told); err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(told.Checks, func(c struct{ Name, Note string }) bool { return c.Name == "wal" })
		return told.Ready && i >= 0 && strings.Contains(told.Checks[i].Note, "retention.wal (1B)")
	})

	// Users.
	o.run(exitOK, testPassword+"\n", "users add amina --group nurses")
	o.run(exitOK, "", "users add bruno --group nurses --password-file "+tempFile(t, "pw", testPassword))
	o.run(exitPrecondition, testPassword, "users add amina")
	o.run(exitUsage, "short", "users add carla")
	o.run(exitUsage, testPassword, "users add Carla")
	o.run(exitUsage, "", "users add carla")
	o.run(exitPrecondition, "", "users block nobody")
	users := data[[]map[string]any](o, exitOK, "users ls -o json")
	if len(users) != 2 || users[0]["name"] != "amina" || users[0]["blocked"] != false {
		t.Errorf("users: %v", users)
	}

	// A device.
	file := filepath.Join(o.dir, "amina.db")
	dev := " --file " + file
	o.run(exitPrecondition, "", "device sync"+dev)
	enrol := "device enrol --server nats://" + o.nats + " --user amina --device phone" + dev
	o.run(exitAuth, "wrong-password", enrol)
	if _, err := os.Stat(file); err == nil {
		t.Error("a refused enrolment left a file")
	}
	o.run(exitUsage, testPassword, "device enrol --server nats://"+o.nats+" --user a.b --device phone"+dev)
	o.run(exitOK, testPassword, enrol)
	rep := data[device.Report](o, exitOK, "device sync -o json"+dev)
	if rep.Rows == 0 || len(rep.Sets) != 1 || rep.Sets[0].Set != "field" {
		t.Errorf("first sync: %+v", rep)
	}
	status := data[device.Status](o, exitOK, "device status -o json"+dev)
	if !status.Enrolled || status.User != "amina" || len(status.Sets) != 1 {
		t.Errorf("status: %+v", status)
	}

	// An edit that the merge rejects: exit code 3, and both logs have it under one number.
	d, err := device.Open(t.Context(), file, device.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.DB().Exec(`INSERT INTO visit (id, patient_id, nurse_id, planned, state) VALUES ('0e000000-0000-4000-8000-000000000001', 999999, 1, '2026-01-01 00:00:00+00', 'planned')`); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if pending := data[[]device.Edit](o, exitOK, "device pending -o json"+dev); len(pending) != 1 || pending[0].Op != "I" {
		t.Errorf("pending: %+v", pending)
	}
	o.run(exitRejected, "", "device sync --wait source"+dev)
	local := data[[]device.Reject](o, exitOK, "device rejects -o json"+dev)
	server := data[[]reject](o, exitOK, "rejects ls -o json --user amina --table visit --since 1h")
	if len(local) != 1 || len(server) != 1 || local[0].ID != server[0].ID || server[0].Code != "not_subscribed" || server[0].Device != "phone" {
		t.Fatalf("the logs differ: %+v\n%+v", local, server)
	}
	if none := data[[]reject](o, exitOK, "rejects ls -o json --reason stale_version"); len(none) != 0 {
		t.Errorf("a filter lets through: %+v", none)
	}
	one := data[reject](o, exitOK, fmt.Sprintf("rejects show %d -o json", server[0].ID))
	if one.Sent["patient_id"] == nil || *one.Sent["patient_id"] != "999999" || one.Stood != nil {
		t.Errorf("show: %+v", one)
	}
	if shown := o.run(exitOK, "", fmt.Sprintf("rejects show %d", one.ID)); !strings.Contains(shown.out, "999999") || !strings.Contains(shown.out, "not_subscribed") {
		t.Errorf("show: %s", shown.out)
	}
	o.run(exitPrecondition, "", "rejects show 987654")
	o.run(exitUsage, "", "rejects ls --since yesterday-ish")
	lines, err := csv.NewReader(strings.NewReader(o.run(exitOK, "", "rejects export -o csv").out)).ReadAll()
	if err != nil || len(lines) != 2 || len(lines[1]) != len(lines[0]) || lines[1][10] != "not_subscribed" {
		t.Errorf("csv: %v %v", lines, err)
	}
	if got := data[[]reject](o, exitOK, "rejects export -o json"); len(got) != 1 || got[0].ID != one.ID {
		t.Errorf("json export: %+v", got)
	}
	exported := filepath.Join(o.dir, "rejects.ndjson")
	o.run(exitOK, "", "rejects export -f "+exported)
	if b, err := os.ReadFile(exported); err != nil || strings.Count(string(b), "\n") != 1 {
		t.Errorf("ndjson export: %q %v", b, err)
	}
	for _, line := range []string{"device log", "device syncs", "device rejects", "device pending", "device status", "device log -o json", "device rejects show 1 -a"} {
		if got := o.run(exitOK, "", line+dev); got.out == "" {
			t.Errorf("%s prints nothing", line)
		}
	}
	o.handleOnDevice(dev)

	// Pools: what is asked for is in force at once and visible from outside.
	o.eventually("each pool answers", func() bool { // on a busy machine some answers come too late
		rows := data[[]poolRow](o, exitOK, "pools ls -o json")
		return len(rows) == len(stageNames) && !slices.ContainsFunc(rows, func(r poolRow) bool {
			return len(r.Processes) != 1 || len(r.Processes[0].Workers) != r.Size
		})
	})
	o.run(exitOK, "", "pools scale merge 3")
	o.run(exitOK, "", "pools pause merge")
	o.eventually("the pool follows", func() bool {
		r := data[[]poolRow](o, exitOK, "pools ls merge -o json")
		return len(r) == 1 && r[0].Size == 3 && r[0].Mode == "pause" && len(r[0].Processes) == 1 && len(r[0].Processes[0].Workers) == 3 &&
			r[0].Processes[0].Workers[0].State == "paused"
	})
	o.run(exitOK, "", "pools resume merge")
	o.run(exitOK, "", "pools drain intake")
	o.run(exitOK, "", "pools resume intake")
	o.run(exitUsage, "", "pools pause nonsense")
	o.run(exitUsage, "", "pools scale merge 1000")
	o.eventually("pools ls -w shows what workers do", func() bool {
		got := o.run(exitOK, "", "pools ls -w")
		return strings.Contains(got.out, "capture-down") && strings.Contains(got.out, "streaming")
	})

	// What the long-running stages have done is counted too, and what waits is told.
	if conn, err := schema.Connect(t.Context(), o.source, "test"); err != nil {
		t.Fatal(err)
	} else if _, err := conn.Exec(t.Context(), "UPDATE vn.nurse SET phone = '+4930555'"); err != nil {
		t.Fatal(err)
	} else if err := conn.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	o.eventually("every stage tells what it has done", func() bool {
		for _, r := range data[[]poolRow](o, exitOK, "pools ls -o json") {
			up := r.Stage == "capture-up" || r.Stage == "apply-up" // no record of a device has come so far
			if len(r.Processes) != 1 || r.Processes[0].Items == 0 && !up || (r.Waiting == nil) != (r.Stage == "gateway") {
				t.Logf("%s: %+v, waiting %v", r.Stage, r.Processes, r.Waiting)
				return false
			}
		}
		return true
	})

	// Status.
	o.eventually("both slots are read", func() bool {
		s := data[map[string]any](o, exitOK, "status -o json")
		down, _ := s["down"].(map[string]any)
		up, _ := s["up"].(map[string]any)
		queues, _ := s["queues"].([]any)
		rejects, _ := s["rejects"].(map[string]any)
		return s["copy"] == "done" && down["lag_seconds"].(float64) < 3 && up["lag_seconds"].(float64) < 3 && down["slot_active"] == true && up["slot_active"] == true && len(queues) == 6 && rejects["not_subscribed"] == 2.0
	})
	if got := o.run(exitOK, "", "status"); !strings.Contains(got.out, "source to mirror") {
		t.Errorf("status:\n%s", got.out)
	}

	// Blocking: the device is out at once, and in again.
	o.run(exitOK, "", "devices block amina/phone")
	o.run(exitAuth, "", "device sync"+dev)
	if l := data[[]map[string]any](o, exitOK, "devices ls amina -o json"); len(l) != 1 || l[0]["blocked"] != true {
		t.Errorf("devices: %v", l)
	}
	o.run(exitOK, "", "devices unblock amina/phone")
	o.run(exitOK, "", "device sync"+dev)
	o.run(exitUsage, "", "devices rm amina/phone") // nobody there to ask
	o.run(exitOK, "", "devices rm amina/phone --yes")
	o.run(exitAuth, "", "device sync"+dev)

	// Without a server.
	stop()
	stop = nil
	o.run(exitUnreachable, "", "device sync"+dev)
	o.run(exitOK, "", "status")
	if got := o.run(exitOK, "", "pools ls"); !strings.Contains(got.err, "broker") {
		t.Errorf("pools ls without a server: %s", got.err)
	}

	// Nothing of ours is left at the source.
	o.run(exitUsage, "", "teardown")
	o.run(exitOK, "", "teardown --everything --yes")
	conn, err := schema.Connect(t.Context(), o.source, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	var left int
	if err := conn.QueryRow(t.Context(), `SELECT (SELECT count(*) FROM pg_replication_slots WHERE database = current_database()) +
		(SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'waystage%')`).Scan(&left); err != nil || left != 0 {
		t.Errorf("%d things of ours are left at the source (%v)", left, err)
	}
}

func (o *operator) eventually(what string, ok func() bool) {
	o.t.Helper()
	within(o.t, 3*time.Minute, what, func() error {
		if !ok() {
			return errors.New("not true in time")
		}
		return nil
	})
}
