// Package pgcluster starts PostgreSQL clusters of its own from the server programs that the machine has: for the
// demonstration, serve --dev, the benchmark and the tests.
//
// It promises a cluster that listens on a free port of 127.0.0.1 only, never runs as root, is ready for logical
// replication, keeps its port over a restart, and ends with the process that started it, however that ends
// (on Linux). Authentication is trust: any user of the machine can connect, so nothing but made-up data belongs in it.
package pgcluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
)

// Superuser owns every cluster that this package makes.
const Superuser = "waystage"

// Options says what cluster to start.
type Options struct {
	Dir    string            // folder of the cluster, made if missing; empty: a temporary one. An existing cluster in it is started as it is.
	Major  int               // PostgreSQL major version; 0: the first that Find finds
	Params map[string]string // settings over the defaults, e.g. shared_buffers
	Unsafe bool              // no fsync: faster, and a crash of the machine (not of the server) may spoil the cluster
	Log    *zap.Logger       // nil: silent
}

// Cluster is a running (or stopped) PostgreSQL cluster. Its methods may be called from several goroutines.
type Cluster struct {
	dir  string
	bin  Binaries
	user account
	log  *zap.Logger
	port int

	mu   sync.Mutex // held through each change of state
	proc *process   // nil when stopped
}

// Start makes a cluster if the folder holds none, starts it, and returns when it accepts connections.
// The context bounds the start, not the cluster's life: call Stop, and Remove for its folder.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	log := o.Log
	if log == nil {
		log = zap.NewNop()
	}
	bin, err := Find(o.Major)
	if err != nil {
		return nil, err
	}
	user, err := serverUser()
	if err != nil {
		return nil, err
	}
	temporary := o.Dir == ""
	if temporary {
		if o.Dir, err = TempDir("waystage-pg-*"); err != nil {
			return nil, err
		}
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir, bin: bin, user: user, log: log.With(zap.String("cluster", filepath.Base(dir)))}
	if err := c.setUp(ctx, o); err != nil {
		return nil, errors.Join(fmt.Errorf("start PostgreSQL %s in %s: %w", bin.Version, dir, err), c.discard(temporary))
	}
	c.log.Debug("PostgreSQL started", zap.String("version", bin.Version), zap.Int("port", c.port))
	return c, nil
}

func (c *Cluster) discard(temporary bool) error {
	if !temporary {
		return nil
	}
	return c.Remove()
}

func (c *Cluster) setUp(ctx context.Context, o Options) error {
	if err := os.MkdirAll(c.data(), 0o700); err != nil {
		return err
	}
	if c.user.switched {
		for _, d := range []string{c.dir, c.data()} {
			if err := os.Chown(d, int(c.user.uid), int(c.user.gid)); err != nil {
				return err
			}
		}
		if err := c.user.canEnter(c.data()); err != nil {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(c.data(), "PG_VERSION")); errors.Is(err, os.ErrNotExist) {
		if err := c.initdb(ctx); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	const tries = 5
	for try := 1; ; try++ {
		port, err := FreePort()
		if err != nil {
			return err
		}
		if err := c.configure(port, o); err != nil {
			return err
		}
		c.port = port
		err = c.start(ctx)
		if err == nil {
			return nil
		}
		// Between looking for a free port and binding it, another process may have taken it.
		if try == tries || !errors.Is(err, errTaken) {
			return err
		}
	}
}

func (c *Cluster) data() string    { return filepath.Join(c.dir, "data") }
func (c *Cluster) logFile() string { return filepath.Join(c.dir, "postgres.log") }
func (c *Cluster) pidFile() string { return filepath.Join(c.data(), "postmaster.pid") }

func (c *Cluster) initdb(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin.Dir, "initdb"), "-D", c.data(), "-U", Superuser,
		"-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions")
	cmd.Dir = c.dir
	cmd.Env = environment()
	out, err := runLocked(cmd, c.user)
	if err != nil {
		return fmt.Errorf("initdb: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// environment is ours without the PG... variables, which would change what server and initdb do.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "PG") || strings.HasPrefix(v, "LC_") || strings.HasPrefix(v, "LANG")
	})
}

// configure writes the settings; the file is wholly ours.
func (c *Cluster) configure(port int, o Options) error {
	settings := map[string]string{
		"listen_addresses":           "127.0.0.1",
		"unix_socket_directories":    "",
		"port":                       strconv.Itoa(port),
		"wal_level":                  "logical",
		"max_replication_slots":      "100",
		"max_wal_senders":            "100",
		"max_connections":            "200",
		"shared_buffers":             "32MB",
		"dynamic_shared_memory_type": "mmap", // in the cluster's folder: small /dev/shm of containers, nothing left after a kill
		"timezone":                   "UTC",
		"log_timezone":               "UTC",
		"datestyle":                  "ISO, MDY",
		"lc_messages":                "C",
		"log_line_prefix":            "%m [%p] %d %a ",
		"jit":                        "off",
	}
	if o.Unsafe {
		settings["fsync"] = "off"
		settings["full_page_writes"] = "off"
	}
	maps.Copy(settings, o.Params)
	var text strings.Builder
	text.WriteString("# written by waystage\n")
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&text, "%s = '%s'\n", name, strings.ReplaceAll(settings[name], "'", "''"))
	}
	path := filepath.Join(c.data(), "postgresql.conf")
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		return err
	}
	if c.user.switched {
		return os.Chown(path, int(c.user.uid), int(c.user.gid))
	}
	return nil
}

// FreePort is a port of 127.0.0.1 that nobody listens on, for a server that is yet to be started. It looks below the range from which
// systems take ports of outgoing connections, so that a stopped server finds its port free again, and one to come is not forestalled.
func FreePort() (int, error) {
	const low, high = 15000, 32000
	var last error
	for range 100 {
		port := low + rand.IntN(high-low)
		l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			last = err
			continue
		}
		return port, l.Close()
	}
	return 0, fmt.Errorf("no free port on 127.0.0.1: %w", last)
}

// errTaken: the port or the shared memory is somebody else's, maybe for a moment only.
var errTaken = errors.New("taken by another process")

// start runs the server and waits until it accepts connections. The caller has no process running.
func (c *Cluster) start(ctx context.Context) error {
	logFile, err := os.OpenFile(c.logFile(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer logFile.Close()
	from, err := logFile.Seek(0, 2)
	if err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(c.bin.Dir, "postgres"), "-D", c.data())
	cmd.Dir = c.dir
	cmd.Env = environment()
	cmd.Stdout, cmd.Stderr = logFile, logFile
	proc, err := run(cmd, c.user)
	if err != nil {
		return err
	}
	for {
		ready, err := c.ready(ctx, proc.pid)
		if ready {
			c.proc = proc
			return nil
		}
		select {
		case <-proc.done:
			text := c.logSince(from)
			// PostgreSQL has no codes for these; the messages are in English by our settings.
			if strings.Contains(text, "could not bind") || strings.Contains(text, "pre-existing shared memory") {
				return fmt.Errorf("%w: %s", errTaken, text)
			}
			return fmt.Errorf("the server ended (%w); its log says: %s", proc.err, text)
		case <-ctx.Done():
			proc.end(syscall.SIGQUIT)
			return fmt.Errorf("the server did not come up: %w (last: %v); its log says: %s", ctx.Err(), err, c.logSince(from))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ready looks at the server's lock file, as pg_ctl does, then connects: a port alone might be another server's.
func (c *Cluster) ready(ctx context.Context, pid int) (bool, error) {
	text, err := os.ReadFile(c.pidFile())
	if err != nil {
		return false, err
	}
	lines := strings.Split(string(text), "\n")
	if len(lines) < 8 || lines[0] != strconv.Itoa(pid) || strings.TrimSpace(lines[7]) != "ready" {
		return false, errors.New("not ready yet")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, c.DSN("postgres"))
	if err != nil {
		return false, err
	}
	return true, conn.Close(ctx)
}

// logSince is the last part of what the server logged from a position on.
func (c *Cluster) logSince(from int64) string {
	text, err := os.ReadFile(c.logFile())
	if err != nil {
		return err.Error()
	}
	if from <= int64(len(text)) {
		text = text[from:]
	}
	const limit = 2000
	if len(text) > limit {
		text = text[len(text)-limit:]
	}
	return strings.TrimSpace(string(text))
}

// DSN is the connection string of a database of this cluster, as its superuser.
func (c *Cluster) DSN(database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.User(Superuser), Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(c.port)),
		Path: "/" + database, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Port is the TCP port on 127.0.0.1; it stays the same over restarts.
func (c *Cluster) Port() int { return c.port }

// Dir is the cluster's folder: data/ and postgres.log are in it.
func (c *Cluster) Dir() string { return c.dir }

// Binaries are the programs that the cluster runs on.
func (c *Cluster) Binaries() Binaries { return c.bin }

// CPU is what the cluster's processes have used since it was started, as exact as the kernel counts it: to 10 ms a process. 0 when it
// is stopped, and where this is not known (on Linux it is).
func (c *Cluster) CPU() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.running() {
		return 0
	}
	total := used(c.proc.pid)
	for _, pid := range children(c.proc.pid) {
		total += used(pid)
	}
	return total
}

// Running tells whether the server's process is there.
func (c *Cluster) Running() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.running()
}

func (c *Cluster) running() bool {
	if c.proc == nil {
		return false
	}
	select {
	case <-c.proc.done:
		return false
	default:
		return true
	}
}

// Stop shuts the server down ("fast": open transactions are rolled back, connections closed) and waits for its end.
// A server that does not comply in time (a stuck replication client can hold it) is ended harder. Stopping a
// stopped cluster does nothing.
func (c *Cluster) Stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running() {
		c.proc.end(syscall.SIGINT)
		c.log.Debug("PostgreSQL stopped")
	}
	c.proc = nil
}

// Kill ends the server and all its processes with SIGKILL, as a crash does, and waits for their end.
func (c *Cluster) Kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running() {
		c.proc.kill()
	}
	c.proc = nil
}

// Restart starts a stopped or killed cluster again, on the same port; a running one is stopped first.
func (c *Cluster) Restart(ctx context.Context) error {
	c.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		err := c.start(ctx)
		if err == nil {
			return nil
		}
		// After a kill the last processes of the old server may hold port and memory for a moment.
		if !errors.Is(err, errTaken) || ctx.Err() != nil {
			return fmt.Errorf("restart PostgreSQL in %s: %w", c.dir, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Remove stops the cluster at once and deletes its folder.
func (c *Cluster) Remove() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running() {
		c.proc.end(syscall.SIGQUIT)
	}
	c.proc = nil
	return errors.Join(removeSharedMemory(c.pidFile()), os.RemoveAll(c.dir))
}

// process is a running server.
type process struct {
	pid  int
	os   *os.Process
	done chan struct{} // closed when it has ended
	err  error         // how; read after done
}

// run starts a command in a goroutine that keeps its thread to itself until the command ends: the kernel sends
// the parent-death signal when the *thread* ends that started the process, and Go ends idle threads as it likes.
func run(cmd *exec.Cmd, user account) (*process, error) {
	cmd.SysProcAttr = attributes(user)
	p := &process{done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			p.pid, p.os = cmd.Process.Pid, cmd.Process
		}
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			if p.err == nil {
				p.err = errors.New("exit status 0")
			}
			close(p.done)
		}
	}()
	return p, <-started
}

func runLocked(cmd *exec.Cmd, user account) ([]byte, error) {
	var out bytes.Buffer
	cmd.SysProcAttr = attributes(user)
	cmd.Stdout, cmd.Stderr = &out, &out
	errs := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		errs <- cmd.Run()
	}()
	err := <-errs
	return out.Bytes(), err
}

// How long a server may take to comply with a signal before the next harder one.
const patience = 15 * time.Second

// end sends the signal, then harder ones, until the process has ended.
func (p *process) end(signal syscall.Signal) {
	for _, s := range []syscall.Signal{signal, syscall.SIGQUIT} {
		_ = p.os.Signal(s) // an error says only that it has ended
		select {
		case <-p.done:
			return
		case <-time.After(patience):
		}
	}
	p.kill()
}

// kill ends the process and its children, and waits for the end of all. It is stopped first so that it starts no more
// of them.
func (p *process) kill() {
	_ = p.os.Signal(syscall.SIGSTOP)
	deadline := time.Now().Add(patience)
	for state(p.pid) != "T" && state(p.pid) != "" && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	killed := children(p.pid)
	for _, child := range killed {
		_ = syscall.Kill(child, syscall.SIGKILL)
	}
	_ = p.os.Kill()
	<-p.done
	for _, child := range killed {
		// A zombie holds nothing; its new parent may take its time.
		for state(child) != "" && state(child) != "Z" && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
	}
}
