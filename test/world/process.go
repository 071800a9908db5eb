package world

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/waystage/waystage/internal/pgcluster"
)

// FreeAddress is an address of this machine that nobody listens on.
func FreeAddress() (string, error) {
	port, err := pgcluster.FreePort()
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), err
}

// Build compiles the program waystage into a file, with build tags if any.
func Build(file, tags string) error {
	out, err := exec.Command("go", "build", "-tags", tags, "-o", file, "github.com/waystage/waystage/cmd/waystage").CombinedOutput()
	if err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	return nil
}

// Process is a program that runs as a child of the test, can be killed and paused at any moment, and dies with the test.
type Process struct {
	Args  []string // program and arguments
	Env   []string // over the test's own environment
	Log   string   // file that stdout and stderr are appended to
	Keep  bool     // started again when it ends by itself, as a service manager does
	Stdin io.Reader

	mu     sync.Mutex
	pid    *os.Process
	wanted bool
	ended  chan struct{} // closed when the process has ended and will not be started again
	err    error         // of its last end
	exits  int
}

// Start starts the program.
func (p *Process) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wanted {
		return nil
	}
	p.wanted, p.ended = true, make(chan struct{})
	started := make(chan error, 1)
	go p.run(p.ended, started)
	err := <-started
	p.wanted = err == nil
	return err
}

// ofTests tells of a variable of the environment whether it is for tests alone: the program warns of what it does not know.
func ofTests(v string) bool {
	return strings.HasPrefix(v, "WAYSTAGE_TEST_") || strings.HasPrefix(v, "WAYSTAGE_CHAOS_")
}

// run keeps its thread for itself: the kernel kills the child when the thread ends that started it.
func (p *Process) run(ended chan struct{}, started chan error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(ended)
	for {
		log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			started <- err
			return
		}
		cmd := exec.Command(p.Args[0], p.Args[1:]...)
		cmd.Env = append(slices.DeleteFunc(os.Environ(), ofTests), p.Env...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = p.Stdin, log, log
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		err = cmd.Start()
		_ = log.Close()
		if started != nil {
			if err == nil {
				p.pid = cmd.Process // Start holds the lock
			}
			started <- err
			started = nil
		} else {
			p.mu.Lock()
			if err == nil {
				p.pid = cmd.Process
				if !p.wanted {
					_ = cmd.Process.Kill()
				}
			}
			p.mu.Unlock()
		}
		if err == nil {
			err = cmd.Wait()
		}
		p.mu.Lock()
		p.pid, p.err = nil, err
		again := p.wanted && p.Keep
		if again {
			p.exits++
		} else {
			p.wanted = false
		}
		p.mu.Unlock()
		if !again {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// Signal sends a signal; a process that is not there gets none.
func (p *Process) Signal(s os.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pid != nil {
		_ = p.pid.Signal(s)
	}
}

// Kill ends the process as a power cut would, and waits for its end.
func (p *Process) Kill() { _, _ = p.end(os.Kill, time.Hour) }

// Stop asks the process to end and tells how it ended; one that takes longer than patience is killed, which is an error.
func (p *Process) Stop(patience time.Duration) error {
	there, err := p.end(os.Interrupt, patience)
	if !there {
		return errors.New("the process had ended before")
	}
	return err
}

func (p *Process) end(s os.Signal, patience time.Duration) (there bool, err error) {
	p.mu.Lock()
	there, ended := p.wanted && p.pid != nil, p.ended
	p.wanted = false
	if p.pid != nil {
		_ = p.pid.Signal(s)
	}
	p.mu.Unlock()
	if ended == nil {
		return false, nil
	}
	select {
	case <-ended:
	case <-time.After(patience):
		p.Signal(os.Kill)
		<-ended
		return there, fmt.Errorf("the process did not end within %s", patience)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return there, p.err
}

// Ended is closed when the process has ended and will not be started again.
func (p *Process) Ended() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ended
}

// Exits counts how often the process ended by itself and was started again.
func (p *Process) Exits() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exits
}

// Tail is the end of the process's log.
func (p *Process) Tail(lines int) string {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	l := bytes.Split(b, []byte("\n"))
	return string(bytes.Join(l[max(0, len(l)-lines):], []byte("\n")))
}

// Ready waits until a server's health listener says that devices can sync.
func Ready(health string, patience time.Duration) error {
	client := http.Client{Timeout: 10 * time.Second}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		r, err := client.Get("http://" + health + "/readyz")
		if err != nil {
			continue
		}
		_ = r.Body.Close()
		if r.StatusCode == http.StatusOK {
			return nil
		}
	}
	return errors.New("the server does not get ready")
}
