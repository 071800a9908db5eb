package pgcluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// account is the system user that the server's processes run as. PostgreSQL refuses to run as root.
type account struct {
	name     string
	uid, gid uint32
	switched bool // another user than ours
}

// serverUser is ourselves, or where we are root an unprivileged user: postgres, or else nobody.
func serverUser() (account, error) {
	if os.Geteuid() != 0 {
		return account{uid: uint32(os.Geteuid()), gid: uint32(os.Getegid())}, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			var unknown user.UnknownUserError
			if errors.As(err, &unknown) {
				continue
			}
			return account{}, fmt.Errorf("look up user %s: %w", name, err)
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return account{}, fmt.Errorf("user %s: %w", name, err)
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			return account{}, fmt.Errorf("user %s: %w", name, err)
		}
		return account{name: name, uid: uint32(uid), gid: uint32(gid), switched: true}, nil
	}
	return account{}, errors.New("running as root, and there is no user postgres or nobody to run PostgreSQL as: create one (useradd --system postgres)")
}

// canEnter tells whether the account can use the folder: it and all above it must be enterable.
func (a account) canEnter(dir string) error {
	if !a.switched {
		return nil
	}
	for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
		info, err := os.Stat(d)
		if err != nil {
			return err
		}
		if !a.mayEnter(info) {
			return fmt.Errorf("%s: user %s, as whom PostgreSQL runs, may not enter %s (chmod o+x it, or use another folder)", dir, a.name, d)
		}
		if d == filepath.Dir(d) {
			return nil
		}
	}
}

func (a account) mayEnter(info fs.FileInfo) bool {
	perm := info.Mode().Perm()
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case ok && st.Uid == a.uid:
		return perm&0o100 != 0
	case ok && st.Gid == a.gid:
		return perm&0o010 != 0
	default:
		return perm&0o001 != 0
	}
}

// TempDir makes a new folder that the server's user can enter, so that clusters can be put inside it, and removes
// nothing: that is the caller's to do.
func TempDir(pattern string) (string, error) {
	u, err := serverUser()
	if err != nil {
		return "", err
	}
	var first error
	for _, base := range []string{os.TempDir(), "/tmp", "/var/tmp"} {
		if err := u.canEnter(base); err != nil {
			if first == nil {
				first = err
			}
			continue
		}
		dir, err := os.MkdirTemp(base, pattern)
		if err != nil {
			return "", err
		}
		return dir, os.Chmod(dir, 0o711)
	}
	return "", first
}
