package chaos

import (
	"bufio"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/waystage/waystage/cmd"
	"github.com/waystage/waystage/internal/nettest"
	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/test/world"
)

//go:embed schema.sql
var schemaSQL string

//go:embed audit.sql
var auditSQL string

//go:embed definitions.yaml
var definitions string

// patience bounds every waiting; on an idle machine nothing takes a tenth of it.
const patience = 4 * time.Minute

// quiet is how long nothing may move at the end.
const quiet = 1500 * time.Millisecond

const password = "all-hands"

// Roles of a process that is this test binary again.
const (
	envChild = "WAYSTAGE_CHAOS_CHILD"
	envTask  = "WAYSTAGE_CHAOS_TASK"
)

func TestMain(m *testing.M) {
	switch os.Getenv(envChild) {
	case "device":
		os.Exit(deviceChild())
	case "nats":
		os.Exit(natsChild(os.Getenv(envTask)))
	}
	pgtest.Main(m)
}

// natsChild runs a stock NATS server until it is told to end.
func natsChild(conf string) int {
	o, err := server.ProcessConfigFile(conf)
	if err == nil {
		o.NoSigs = true
		var s *server.Server
		if s, err = server.NewServer(o); err == nil {
			s.ConfigureLogger()
			s.Start()
			end := make(chan os.Signal, 1)
			signal.Notify(end, os.Interrupt)
			<-end
			s.Shutdown()
			s.WaitForShutdown()
			return 0
		}
	}
	fmt.Fprintln(os.Stderr, "nats:", err)
	return 1
}

// rig is what all histories share.
type rig struct {
	program        string
	self           string
	source, mirror *pgcluster.Cluster

	natsAddress, natsConf, natsKeys, natsStore string
}

func newRig(t *testing.T) *rig {
	r := &rig{program: os.Getenv(EnvBinary)}
	var err error
	if r.self, err = os.Executable(); err != nil {
		t.Fatal(err)
	}
	if r.program == "" {
		r.program = filepath.Join(t.TempDir(), "waystage")
		if err := world.Build(r.program, buildTags); err != nil {
			t.Fatal(err)
		}
	}
	r.source, r.mirror = pgtest.SourceCluster(t), pgtest.MirrorCluster(t)
	if err := r.broker(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	return r
}

// witness is a login of the broker's that may see and write all of our streams, which none of Waystage's own may.
const witness = "witness"

// broker writes the broker's configuration.
func (r *rig) broker(dir string) (err error) {
	r.natsStore = filepath.Join(dir, "store")
	if r.natsAddress, err = world.FreeAddress(); err != nil {
		return err
	}
	if r.natsConf, r.natsKeys, err = world.Broker(dir, r.natsAddress); err != nil {
		return err
	}
	conf, err := os.ReadFile(r.natsConf)
	if err != nil {
		return err
	}
	text := strings.Replace(string(conf), `{ user: "app"`, `{ user: "`+witness+`", password: "`+password+`" }
      { user: "app"`, 1)
	text = strings.Replace(text, `auth_users: [`, `auth_users: ["`+witness+`", `, 1)
	return os.WriteFile(r.natsConf, []byte(text), 0o600)
}

// history is one plan being run.
type history struct {
	*rig
	t    *testing.T
	ctx  context.Context
	plan *plan
	dir  string

	source, mirror     *pgxpool.Pool
	sourceDB, mirrorDB string // connection strings, without a proxy
	nats               *world.Process
	links              map[string]*nettest.Proxy
	servers            []*world.Process
	devices            []*unit

	began    time.Time
	timeline sync.Mutex
	done     atomic.Int64 // steps
	total    int64
	clusters map[string]*sync.Mutex // held while a cluster is down
	acks     *acks
	counts   struct {
		sync.Mutex
		faults        map[string]int
		lost, doubled int
		office        int
	}
}

// must ends the history.
func (h *history) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *history) through(link, dsn string) string {
	u, err := url.Parse(dsn)
	h.must(err)
	if h.links[link] == nil {
		p, err := nettest.New(u.Host)
		h.must(err)
		h.t.Cleanup(p.Close)
		h.links[link] = p
	}
	u.Host = h.links[link].Address()
	return u.String()
}

func (h *history) pool(dsn string) *pgxpool.Pool {
	cfg, err := schema.Config(dsn, "chaos")
	h.must(err)
	p, err := pgxpool.NewWithConfig(h.ctx, cfg)
	h.must(err)
	h.t.Cleanup(p.Close)
	return p
}

// build sets everything up: databases, broker, servers, devices that have synced once.
func (h *history) build() {
	h.sourceDB, h.mirrorDB = pgtest.Source(h.t), pgtest.Mirror(h.t)
	h.source, h.mirror = h.pool(h.sourceDB), h.pool(h.mirrorDB)
	h.clusters = map[string]*sync.Mutex{"source": {}, "mirror": {}}
	h.exec(h.source, schemaSQL)
	h.exec(h.source, auditSQL)

	h.must(os.RemoveAll(h.natsStore))
	var err error
	h.nats = &world.Process{Args: []string{h.self}, Env: []string{envChild + "=nats", envTask + "=" + h.natsConf}, Log: filepath.Join(h.dir, "nats.log"), Keep: true}
	h.must(h.nats.Start())
	h.t.Cleanup(h.nats.Kill)

	broker := "nats://" + h.natsAddress
	path := filepath.Join(h.dir, "definitions.yaml")
	h.must(os.WriteFile(path, []byte(definitions), 0o600))
	var health []string
	for i := range 2 {
		name := fmt.Sprint("server-", i)
		c := cmd.Defaults()
		c.Source.DSN, c.Mirror.DSN = h.through(name+"-source", h.sourceDB), h.through(name+"-mirror", h.mirrorDB)
		c.NATS.External.URLs, c.NATS.External.Credentials = []string{h.through(name+"-nats", broker)}, h.natsKeys
		c.Definitions, c.Log.Level = path, "info"
		c.Health.Listen, err = world.FreeAddress()
		h.must(err)
		health = append(health, c.Health.Listen)
		config := filepath.Join(h.dir, name+".yaml")
		h.must(world.WriteConfig(config, c))
		p := &world.Process{Args: []string{h.program, "serve", "-c", config}, Log: filepath.Join(h.dir, name+".log"), Keep: true}
		h.must(p.Start())
		h.t.Cleanup(p.Kill)
		h.servers = append(h.servers, p)
	}
	for i, address := range health {
		if err := world.Ready(address, patience); err != nil {
			h.t.Fatalf("server-%d: %v\n%s", i, err, h.servers[i].Tail(20))
		}
	}
	// From here on the witness writes: at the source also what our transactions say that they carry.
	h.exec(h.source, "CREATE TRIGGER audit AFTER UPDATE ON waystage.progress FOR EACH ROW EXECUTE FUNCTION audit.mark()")
	h.exec(h.mirror, auditSQL)
	users := registry.New(h.mirror, nil)
	for _, u := range []string{"ada", "ben"} {
		h.must(users.AddUser(h.ctx, u, password, "staff"))
	}
	address := h.through("devices-nats", broker)
	for i, d := range h.plan.Devices {
		h.devices = append(h.devices, h.newUnit(i, d, address))
	}
	for _, u := range h.devices {
		h.must(u.start())
	}
	for _, u := range h.devices {
		if _, err := u.until(func(a answer) bool { return a.Ready }); err != nil {
			b, _ := os.ReadFile(u.log)
			h.t.Fatalf("%s at its first sync: %v: %s", u.task.Name, err, b)
		}
	}
}

func (h *history) exec(db *pgxpool.Pool, q string) {
	h.t.Helper()
	_, err := db.Exec(h.ctx, q, pgx.QueryExecModeSimpleProtocol)
	h.must(err)
}

// streams connects to the account that has the streams, past all proxies.
func (h *history) streams() (*nats.Conn, error) {
	return nats.Connect("nats://"+h.natsAddress, nats.UserInfo(witness, password), nats.Timeout(3*time.Second), nats.NoReconnect())
}

// unit is a device's process.
type unit struct {
	h    *history
	i    int
	task task
	file string // of the task
	log  string

	mu      sync.Mutex
	cmd     *exec.Cmd
	in      io.WriteCloser
	out     chan answer // closed when the process ends
	working bool        // at its steps
	struck  bool        // killed meanwhile
	step    int
}

func (h *history) newUnit(i int, d deviceplan, server string) *unit {
	u := &unit{h: h, i: i}
	base := filepath.Join(h.dir, d.Name)
	u.task = task{User: d.User, Name: d.Name, Password: password, Server: server, File: base + ".db", Journal: base + ".journal", Steps: d.Steps}
	u.file, u.log = base+".json", base+".log"
	b, err := json.Marshal(u.task)
	h.must(err)
	h.must(os.WriteFile(u.file, b, 0o600))
	h.t.Cleanup(u.kill)
	return u
}

// start runs the process. The kernel kills the child when the thread ends that started it, so that thread stays.
func (u *unit) start() error {
	log, err := os.OpenFile(u.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	cmd := exec.Command(u.h.self)
	cmd.Env = append(os.Environ(), envChild+"=device", envTask+"="+u.file)
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	started, answers := make(chan error), make(chan answer, 1000)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		_ = log.Close()
		started <- err
		if err != nil {
			return
		}
		defer close(answers)
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var a answer
			if json.Unmarshal(lines.Bytes(), &a) != nil {
				continue
			}
			answers <- a
		}
		_ = cmd.Wait()
	}()
	if err := <-started; err != nil {
		return err
	}
	u.mu.Lock()
	u.cmd, u.in, u.out = cmd, in, answers
	u.mu.Unlock()
	return nil
}

// strike kills the process at work; work starts it again.
func (u *unit) strike() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.working {
		u.struck = true
		_ = u.cmd.Process.Kill()
	}
}

// kill ends the process for good.
func (u *unit) kill() {
	u.mu.Lock()
	cmd, out := u.cmd, u.out
	u.mu.Unlock()
	if cmd != nil {
		_ = cmd.Process.Kill()
		for range out { // until the process has ended
		}
	}
}

func (u *unit) tell(what string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	_, err := io.WriteString(u.in, what+"\n")
	return err
}

var errEnded = errors.New("the device's process has ended")

// until reads answers until one is what is waited for; done steps are counted on the way.
func (u *unit) until(is func(answer) bool) (answer, error) {
	u.mu.Lock()
	out := u.out
	u.mu.Unlock()
	late := time.After(patience)
	for {
		select {
		case a, ok := <-out:
			if !ok {
				return a, errEnded
			}
			if a.Step > u.step {
				u.h.done.Add(int64(a.Step - u.step))
				u.step = a.Step
			}
			if is(a) {
				return a, nil
			}
		case <-late:
			return answer{}, fmt.Errorf("%s says nothing", u.task.Name)
		}
	}
}

// work takes the device through its steps, over kills.
func (u *unit) work() error {
	for {
		u.mu.Lock()
		u.working = true
		u.mu.Unlock()
		err := u.tell("go")
		if err == nil {
			_, err = u.until(func(a answer) bool { return a.Done })
		}
		u.mu.Lock()
		u.working = false
		struck := u.struck
		u.struck = false
		u.mu.Unlock()
		if err == nil {
			u.h.done.Add(int64(len(u.task.Steps) - u.step))
			u.step = len(u.task.Steps)
			if !struck {
				return nil
			}
		} else if !struck {
			b, _ := os.ReadFile(u.log)
			return fmt.Errorf("%s: %w: %s", u.task.Name, err, b)
		}
		u.kill() // waits for its end
		if err := u.start(); err != nil {
			return err
		}
		if _, err := u.until(func(a answer) bool { return a.Ready }); err != nil {
			b, _ := os.ReadFile(u.log)
			return fmt.Errorf("%s after it was killed: %w: %s", u.task.Name, err, b)
		}
	}
}
