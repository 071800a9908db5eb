package cmd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/queue"
	"github.com/waystage/waystage/schema"
)

func newInit(a *app) *cobra.Command {
	var o initOptions
	c := &cobra.Command{Use: "init", Short: "Write a commented configuration and definitions from your source database", Args: cobra.NoArgs,
		Long: `Write waystage.yaml and definitions.yaml, both commented, from the tables of your source database. Nothing is changed there.

The connection strings come from --source and --mirror, the environment (WAYSTAGE_SOURCE_DSN, WAYSTAGE_MIRROR_DSN) or a question. One with a
password is written to a file of its own that only you can read.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.nats != "" {
				return a.initNATS(o)
			}
			return a.init(c.Context(), o)
		}}
	c.Flags().StringVar(&o.source, "source", "", "connection string of the source, without a password")
	c.Flags().StringVar(&o.mirror, "mirror", "", "connection string of the mirror, without a password")
	c.Flags().StringVar(&o.dir, "dir", ".", "folder to write to")
	c.Flags().BoolVar(&o.force, "force", false, "overwrite files that exist")
	c.Flags().StringVar(&o.nats, "nats", "", "write nats-server.conf and keys.json for NATS servers of your own to this folder, and nothing else")
	return c
}

type initOptions struct {
	source, mirror string
	dir            string
	force          bool
	nats           string
}

// init writes the two files.
func (a *app) init(ctx context.Context, o initOptions) error {
	var err error
	if o.source, err = a.dsn("source", o.source, ""); err != nil {
		return err
	}
	if o.mirror, err = a.dsn("mirror", o.mirror, "(the database of Waystage's own; it may be empty)"); err != nil {
		return err
	}
	conn, err := connectSource(ctx, o.source)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	beginning, left, err := schema.InitDefinitions(ctx, conn)
	if err != nil {
		return err
	}
	defs, problems := schema.ParseDefinitions("definitions.yaml", []byte(beginning))
	if _, err := schema.Refusing(problems); err != nil {
		return err
	}
	if len(defs.Subscriptions) == 0 {
		return &failure{code: exitPrecondition, what: "there is no table that can be synced", where: redactDSN(o.source),
			err: errors.New(orDash((&schema.ProblemsError{Problems: left}).Error())), remedy: "create tables with primary keys first"}
	}

	config := map[string]string{"definitions": "definitions.yaml"}
	files := []newFile{{"definitions.yaml", []byte(beginning), 0o644}}
	for name, dsn := range map[string]string{"source": o.source, "mirror": o.mirror} {
		if !hasPassword(dsn) {
			config[name+".dsn"] = dsn
			continue
		}
		config[name+".dsn_file"] = name + ".dsn"
		files = append(files, newFile{name + ".dsn", []byte(dsn + "\n"), 0o600})
	}
	var body strings.Builder
	if err := writeReference(&body, config); err != nil {
		return err
	}
	files = append(files, newFile{"waystage.yaml", []byte(body.String()), 0o600})
	slices.SortFunc(files, func(x, y newFile) int { return strings.Compare(x.name, y.name) })
	if err := writeFiles(o.dir, files, o.force); err != nil {
		return err
	}
	for _, f := range files {
		a.say("wrote %s", filepath.Join(o.dir, f.name))
	}
	for _, p := range left {
		word := "left out"
		if p.Warning {
			word = "note"
		}
		a.say("%s: %s", word, p)
	}
	at := filepath.Join(o.dir, "waystage.yaml")
	a.say(`
Next:
  1. edit %s: which tables, columns and rows go to whom (now: %s, everything to everybody)
  2. waystage check -c %s
  3. waystage serve -c %s
  4. waystage users add NAME --group everybody -c %s
  5. waystage device enrol --file NAME.db --server nats://127.0.0.1:4222 --user NAME --device phone`,
		filepath.Join(o.dir, "definitions.yaml"), count(len(defs.Subscriptions), "table"), at, at, at)
	return nil
}

// dsn takes a connection string from the flag, the environment or the person.
func (a *app) dsn(name, flag, note string) (string, error) {
	if flag != "" {
		if hasPassword(flag) {
			return "", usage("--%s: a password on the command line can be read by every user of the machine; use %s", name, envName(name+".dsn"))
		}
		return flag, nil
	}
	if v := a.getenv(envName(name + ".dsn")); v != "" {
		return v, nil
	}
	if file := a.getenv(envName(name + ".dsn_file")); file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", &failure{code: exitUsage, what: "cannot read a secret", where: file, err: bare(err)}
		}
		return strings.TrimSpace(string(b)), nil
	}
	if !a.inTTY {
		return "", usage("name the %s database with --%s or %s, for example postgres://user@host:5432/database", name, name, envName(name+".dsn"))
	}
	fmt.Fprintf(a.err, "Connection string of the %s database %s\n(for example postgres://user@host:5432/database): ", name, note)
	line, err := bufio.NewReader(a.in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	if line = strings.TrimSpace(line); line == "" {
		return "", usage("no connection string was given")
	}
	return line, nil
}

// hasPassword tells whether a connection string carries its password itself.
func hasPassword(dsn string) bool {
	without := redactDSN(dsn)
	if without != dsn && without != "" {
		c, err := pgconn.ParseConfig(dsn)
		return err != nil || c.Password != ""
	}
	return false
}

// newFile is a file to be written.
type newFile struct {
	name string
	body []byte
	mode os.FileMode
}

// writeFiles writes all files or, when one exists and force is not given, none.
func writeFiles(dir string, files []newFile, force bool) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return &failure{code: exitFailed, what: "cannot make the folder", where: dir, err: bare(err)}
	}
	for _, f := range files {
		path := filepath.Join(dir, f.name)
		if _, err := os.Lstat(path); err == nil && !force {
			return &failure{code: exitPrecondition, what: "nothing was written: a file exists already", where: path,
				remedy: "use --force to overwrite it, or --dir for another folder"}
		}
	}
	for _, f := range files {
		path := filepath.Join(dir, f.name)
		if err := os.WriteFile(path+".part", f.body, f.mode); err != nil {
			return &failure{code: exitFailed, what: "cannot write the file", where: path, err: bare(err)}
		}
		if err := os.Rename(path+".part", path); err != nil {
			return &failure{code: exitFailed, what: "cannot write the file", where: path, err: bare(err)}
		}
	}
	return nil
}

// initNATS writes what NATS servers of the user's own need.
func (a *app) initNATS(o initOptions) error {
	secrets, err := queue.NewSecrets()
	if err != nil {
		return err
	}
	conf, err := queue.ServerConfig(secrets, queue.ServerConfigOptions{})
	if err != nil {
		return err
	}
	keysPath := filepath.Join(o.nats, "keys.json")
	if _, err := os.Lstat(keysPath); err == nil && !o.force {
		return &failure{code: exitPrecondition, what: "nothing was written: a file exists already", where: keysPath,
			remedy: "use --force to overwrite it; servers that use the old keys are then locked out"}
	}
	if err := writeFiles(o.nats, []newFile{{"nats-server.conf", []byte(conf), 0o600}}, o.force); err != nil {
		return err
	}
	if err := writeKeys(keysPath, brokerKeys{Secrets: secrets}); err != nil {
		return err
	}
	a.say("wrote %s and %s", filepath.Join(o.nats, "nats-server.conf"), keysPath)
	a.say("Next: start the NATS servers with the first, and set nats.external.urls and nats.external.credentials_file: %s", keysPath)
	return nil
}

// readDefinitions reads and parses the definitions file.
func readDefinitions(path string) (*schema.Definitions, []schema.Problem, error) {
	body, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, &failure{code: exitUsage, what: "cannot read the definitions", where: path, err: bare(err),
			remedy: "see 'definitions' in the configuration; 'waystage init' writes a beginning"}
	}
	d, problems := schema.ParseDefinitions(path, body)
	return d, problems, nil
}

// slotSuffix is that of an installation's slots, "" before the first start or when the mirror does not answer.
func slotSuffix(ctx context.Context, mirrorDSN string) string {
	conn, err := schema.Connect(ctx, mirrorDSN, "waystage-check")
	if err != nil {
		return ""
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	var epoch string
	if err := conn.QueryRow(ctx, `SELECT value FROM waystage.meta WHERE key = 'epoch'`).Scan(&epoch); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return ""
	}
	return epoch[:min(8, len(epoch))]
}
