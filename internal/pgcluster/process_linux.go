package pgcluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// attributes makes a server process that runs as the account, does not get the terminal's Ctrl-C, and shuts down
// at once when the thread that started it ends (see run, which keeps that thread).
func attributes(a account) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGQUIT}
	if a.switched {
		attr.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid}
	}
	return attr
}

// children lists the processes that a process has started.
func children(pid int) []int {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	var found []int
	for _, dir := range dirs {
		child, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if _, parent := stat(child); parent == pid {
			found = append(found, child)
		}
	}
	return found
}

// state is the letter by which the kernel tells a process's state, "" when there is no such process.
func state(pid int) string {
	s, _ := stat(pid)
	return s
}

func stat(pid int) (state string, parent int) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", 0 // ended
	}
	// "pid (name) state ppid ...": the name may hold blanks and brackets.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 2 {
		return "", 0
	}
	parent, err = strconv.Atoi(fields[1])
	if err != nil {
		return "", 0
	}
	return fields[0], parent
}

// tick is the kernel's unit of CPU times in /proc.
const tick = time.Second / 100

// used is the CPU time of a process and of those of its children that have ended, which it has waited for.
func used(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0 // ended
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	const utime, cstime = 11, 14 // behind the name: utime, stime, cutime, cstime
	var total time.Duration
	for i := utime; i <= cstime && i < len(fields); i++ {
		n, _ := strconv.ParseInt(fields[i], 10, 64)
		total += time.Duration(n) * tick
	}
	return total
}

// removeSharedMemory removes the shared memory segment that a killed server left, named by its lock file.
func removeSharedMemory(pidFile string) error {
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return nil // no lock file: the server shut down in order
	}
	lines := strings.Split(string(text), "\n")
	if len(lines) < 7 {
		return nil
	}
	fields := strings.Fields(lines[6]) // key and id
	if len(fields) != 2 {
		return nil
	}
	id, err := strconv.Atoi(fields[1])
	if err != nil {
		return fmt.Errorf("%s: %w", pidFile, err)
	}
	if _, err := unix.SysvShmCtl(id, unix.IPC_RMID, nil); err != nil && err != unix.EINVAL && err != unix.EIDRM {
		return fmt.Errorf("remove shared memory segment %d: %w", id, err)
	}
	return nil
}
