package cmd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/schema"
)

// demoServer is the server that the demonstration runs in this process: the same as 'waystage serve' runs.
type demoServer struct {
	Info
	stop  context.CancelFunc
	ended chan struct{} // closed when it has ended
	err   error         // why; read after ended
	log   *os.File
}

// startServer writes the configuration that the other commands can use too, and starts the server with it.
func (d *demo) startServer(ctx context.Context) error {
	defs, problems := schema.ParseDefinitions("definitions.yaml", []byte(nurse.Definitions()))
	if _, err := schema.Refusing(problems); err != nil {
		return err
	}
	var err error
	var refused []schema.Problem
	if d.tables, refused, err = schema.ReadTables(ctx, d.source, defs.TableNames()); err != nil {
		return err
	}
	if _, err := schema.Refusing(refused); err != nil {
		return err
	}
	d.definitions = defs

	var text strings.Builder
	if err := writeReference(&text, map[string]string{
		"source.dsn":           d.sourceDSN,
		"mirror.dsn":           d.mirrorDSN,
		"definitions":          "definitions.yaml",
		"nats.embedded.store":  "nats",
		"nats.embedded.listen": "127.0.0.1:0",
		"health.listen":        "127.0.0.1:0",
		"limits.page":          "16KiB", // small pages, so that there is a half-way to cancel a download at
	}); err != nil {
		return err
	}
	if err := writeFiles(d.dir, []newFile{
		{"definitions.yaml", []byte(nurse.Definitions()), 0o644},
		{"waystage.yaml", []byte(text.String()), 0o600},
	}, false); err != nil {
		return err
	}
	conf, err := load(&terminal{}, filepath.Join(d.dir, "waystage.yaml"), nil)
	if err != nil {
		return err
	}
	s := &demoServer{ended: make(chan struct{})}
	if s.log, err = os.OpenFile(filepath.Join(d.dir, "waystage.log"), os.O_CREATE|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	enc := zap.NewDevelopmentEncoderConfig()
	enc.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
	log := zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(enc), zapcore.Lock(s.log), zapcore.InfoLevel))

	// The server's life is not the step's: it ends in cleanUp, after the devices.
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	ready := make(chan Info, 1)
	copying := d.copyProgress()
	conf.Progress = copying.hear
	d.server = s
	go func() {
		defer close(s.ended)
		s.err = Serve(life, conf, log, func(i Info) { ready <- i })
	}()
	select {
	case s.Info = <-ready:
		copying.end()
	case <-s.ended:
		return d.serverError()
	case <-ctx.Done():
		return ctx.Err()
	}
	var rows int64
	for _, t := range d.tables {
		var n int64
		if err := d.mirror.QueryRow(ctx, "SELECT count(*) FROM "+t.Ident()).Scan(&n); err != nil {
			return err
		}
		rows += n
	}
	d.fact("%d tables with %s rows are in the mirror; devices can connect to %s", len(d.tables), thousands(rows), s.NATS)
	return nil
}

// serverError tells why the server has ended, if it has.
func (d *demo) serverError() error {
	if d.server == nil {
		return nil
	}
	select {
	case <-d.server.ended:
		if d.server.err != nil {
			return fmt.Errorf("the server ended: %w", d.server.err)
		}
		return errors.New("the server ended by itself")
	default:
		return nil
	}
}

// stopServer lets the server finish what it has in hand and waits for its end.
func (d *demo) stopServer() {
	if d.server == nil {
		return
	}
	d.server.stop()
	<-d.server.ended
	_ = d.server.log.Close()
}

// addUser does what 'waystage users add' does.
func (d *demo) addUser(ctx context.Context, name, password string, groups ...string) error {
	pool, err := pgxpool.New(ctx, d.mirrorDSN)
	if err != nil {
		return err
	}
	defer pool.Close()
	return registry.New(pool, nil).AddUser(ctx, name, password, groups...)
}

// showLog prints what the server had to say, when a step has failed: its folder goes with the demonstration.
func (d *demo) showLog() {
	file, err := os.Open(filepath.Join(d.dir, "waystage.log"))
	if err != nil {
		return // it has not started yet
	}
	defer file.Close()
	var lines []string
	for s := bufio.NewScanner(file); s.Scan(); {
		lines = append(lines, s.Text())
	}
	const most = 40
	d.say("\nthe last of the server's log:\n%s", strings.Join(lines[max(0, len(lines)-most):], "\n"))
}
