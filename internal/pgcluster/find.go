package pgcluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// MinMajor is the oldest PostgreSQL major version that Waystage works with.
const MinMajor = 15

// EnvBin names the environment variable that points to the folders of server programs to be preferred
// (a list, separated like PATH).
const EnvBin = "WAYSTAGE_PG_BIN"

// ErrNoServer is returned (wrapped) where no fitting server programs are installed.
var ErrNoServer = errors.New("no PostgreSQL server programs")

// Binaries is a folder with PostgreSQL's server programs.
type Binaries struct {
	Dir     string // holds initdb and postgres
	Major   int    // e.g. 15
	Version string // e.g. "15.18"
}

// Find looks for server programs of the given major version; 0 means any that Waystage works with, newest first.
// It looks at the folders in [EnvBin], then PATH, then the system's usual folders, then the cache folders that
// scripts/postgresql.sh fills. The error says what to run.
func Find(major int) (Binaries, error) {
	all, passed := FindAll()
	for _, b := range all {
		if major == 0 || b.Major == major {
			return b, nil
		}
	}
	want, script := strconv.Itoa(major), strconv.Itoa(major)
	if major == 0 {
		want, script = strconv.Itoa(MinMajor)+" or later", "any"
	}
	var seen strings.Builder
	for _, p := range passed {
		seen.WriteString("\n  passed over: " + p)
	}
	for _, b := range all {
		seen.WriteString(fmt.Sprintf("\n  found, but not wanted: PostgreSQL %s in %s", b.Version, b.Dir))
	}
	return Binaries{}, fmt.Errorf("%w (initdb, postgres) of version %s found. Run:\n"+
		"  scripts/postgresql.sh %s\n"+
		"or name the folder that holds them in %s.%s", ErrNoServer, want, script, EnvBin, seen.String())
}

// FindAll lists all usable server programs in order of preference, and the reasons for those passed over.
func FindAll() (found []Binaries, passed []string) {
	seen := map[string]bool{}
	look := func(dir string) {
		if real, err := filepath.EvalSymlinks(filepath.Join(dir, "initdb")); err == nil {
			dir = filepath.Dir(real) // a folder of links (as on PATH) stands for the folder that they lead to
		}
		if dir == "" || seen[dir] {
			return
		}
		seen[dir] = true
		b, err := inspect(dir)
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err != nil:
			passed = append(passed, err.Error())
		default:
			found = append(found, b)
		}
	}
	for _, dir := range filepath.SplitList(os.Getenv(EnvBin)) {
		look(dir)
	}
	if p, err := exec.LookPath("initdb"); err == nil {
		look(filepath.Dir(p))
	}
	preferred := len(found)
	patterns := []string{
		"/usr/lib/postgresql/*/bin", // Debian, Ubuntu
		"/usr/pgsql-*/bin",          // Red Hat
		"/opt/homebrew/opt/postgresql@*/bin",
		"/usr/local/opt/postgresql@*/bin",
	}
	for _, c := range CacheDirs() {
		patterns = append(patterns, filepath.Join(c, "*", "bin"))
	}
	for _, p := range patterns {
		dirs, err := filepath.Glob(p)
		if err != nil {
			continue // only a malformed pattern: a cache folder with odd signs in its name
		}
		for _, dir := range dirs {
			look(dir)
		}
	}
	slices.SortStableFunc(found[preferred:], func(a, b Binaries) int { return b.Major - a.Major })
	return found, passed
}

// CacheDirs are the folders in which scripts/postgresql.sh puts server programs, each under its major version:
// the user's cache, and one for all users (used by root, whose own folders the server's user cannot enter).
func CacheDirs() []string {
	var dirs []string
	if d, err := os.UserCacheDir(); err == nil {
		dirs = append(dirs, filepath.Join(d, "waystage", "postgresql"))
	}
	return append(dirs, "/var/cache/waystage/postgresql")
}

var versionPattern = regexp.MustCompile(`\(PostgreSQL\) ((\d+)[.\w]*)`)

func inspect(dir string) (Binaries, error) {
	for _, prog := range []string{"initdb", "postgres"} {
		if _, err := os.Stat(filepath.Join(dir, prog)); err != nil {
			return Binaries{}, err
		}
	}
	out, err := exec.Command(filepath.Join(dir, "postgres"), "--version").CombinedOutput()
	if err != nil {
		return Binaries{}, fmt.Errorf("%s: postgres --version: %w: %s", dir, err, strings.TrimSpace(string(out)))
	}
	m := versionPattern.FindStringSubmatch(string(out))
	if m == nil {
		return Binaries{}, fmt.Errorf("%s: not a PostgreSQL version: %s", dir, strings.TrimSpace(string(out)))
	}
	major, err := strconv.Atoi(m[2])
	if err != nil {
		return Binaries{}, fmt.Errorf("%s: %w", dir, err)
	}
	if major < MinMajor {
		return Binaries{}, fmt.Errorf("%s: PostgreSQL %s is older than %d", dir, m[1], MinMajor)
	}
	user, err := serverUser()
	if err != nil {
		return Binaries{}, err
	}
	if err := user.canEnter(dir); err != nil {
		return Binaries{}, err
	}
	return Binaries{Dir: dir, Major: major, Version: m[1]}, nil
}
