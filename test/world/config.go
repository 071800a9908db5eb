// Package world is what tests of whole servers share: the real program as a child process, a stock broker's
// configuration, and the comparison of the three sides row by row. It promises nothing of its own to be tested; test/e2e and
// test/chaos call it.
package world

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/waystage/waystage/cmd"
)

// WriteConfig writes what the program needs of a configuration.
func WriteConfig(path string, c cmd.Config) error {
	nats := fmt.Sprintf("{embedded: {store: %q, listen: %q}}", c.NATS.Embedded.Store, c.NATS.Embedded.Listen)
	if len(c.NATS.External.URLs) > 0 {
		nats = fmt.Sprintf("{external: {urls: [%q], credentials_file: %q}}", c.NATS.External.URLs[0], c.NATS.External.Credentials)
	}
	return os.WriteFile(path, fmt.Appendf(nil, "source: {dsn: %q}\nmirror: {dsn: %q}\ndefinitions: %q\nnats: %s\nhealth: {listen: %q}\nlog: {level: %s, format: json}\n",
		c.Source.DSN, c.Mirror.DSN, c.Definitions, nats, c.Health.Listen, c.Log.Level), 0o600)
}

// Broker writes the configuration of a stock NATS server that listens on address and stores in dir/store, as
// `waystage init --nats` does: the server's file and the keys of Waystage's servers.
func Broker(dir, address string) (conf, keys string, err error) {
	if code := cmd.Main([]string{"init", "--nats", dir}, cmd.System()); code != 0 {
		return "", "", fmt.Errorf("init --nats: exit code %d", code)
	}
	conf = filepath.Join(dir, "nats-server.conf")
	text, err := os.ReadFile(conf)
	if err != nil {
		return "", "", err
	}
	text = regexp.MustCompile(`(?m)^listen: .*$`).ReplaceAll(text, fmt.Appendf(nil, "listen: %q", address))
	text = regexp.MustCompile(`(?m)^(\s*)store_dir: .*$`).ReplaceAll(text, fmt.Appendf(nil, "${1}store_dir: %q", filepath.Join(dir, "store")))
	return conf, filepath.Join(dir, "keys.json"), os.WriteFile(conf, text, 0o600)
}
