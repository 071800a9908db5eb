package cmd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/internal/pgcluster"
	"github.com/waystage/waystage/schema"
)

func newDemo(a *app) *cobra.Command {
	var keep bool
	c := &cobra.Command{Use: "demo", Short: "See everything work, on this machine, with invented data", Args: cobra.NoArgs,
		Long: `Start two PostgreSQL servers and a message broker of their own in a temporary folder, fill them with the invented data of a
home health care service, and show, step by step, how two nurses' devices are kept in step with the company's database.

Everything is real and runs on this machine only; every step checks what it says, and the exit status is 0 only if all of
it was true. The servers listen on 127.0.0.1 without passwords: other users of this machine could look in. At the end, or
on Ctrl-C, everything is removed.`,
		RunE: func(c *cobra.Command, _ []string) error {
			d := &demo{app: a}
			err := d.run(c.Context(), keep)
			if cerr := d.cleanUp(); err == nil {
				err = cerr
			}
			return err
		}}
	c.Flags().BoolVar(&keep, "keep", false, "leave everything running at the end, to explore, until Ctrl-C")
	return c
}

// demo is one run of the demonstration.
type demo struct {
	*app
	dir         string
	clusters    map[string]*pgcluster.Cluster // source, mirror
	sourceDSN   string
	mirrorDSN   string
	source      *pgx.Conn
	mirror      *pgx.Conn
	server      *demoServer
	definitions *schema.Definitions
	tables      []*schema.Table
	nurses      []*demoNurse // two who share some patients
	visit       string       // that one of them ticked off
}

// demoNurse is one of the two nurses with her or his device.
type demoNurse struct {
	nurse.Person
	file string
	dev  *device.Device
}

const demoPassword = "visiting-hours" // used once, to enrol; the devices have keys of their own afterwards

// run goes through the steps and stops at the first that is not as it should be.
func (d *demo) run(ctx context.Context, keep bool) error {
	began := time.Now()
	steps := []struct {
		title string
		run   func(context.Context) error
	}{
		{"Two PostgreSQL servers start: the company's (the source) and Waystage's own (the mirror)", d.startClusters},
		{"A visiting-nurse service moves into the source", d.loadSource},
		{"Waystage starts, and copies what is subscribed to from the source to the mirror", d.startServer},
		{"Two nurses get devices: SQLite files, which any application can use", d.enrol},
		{"First sync: each device receives its nurse's patients", d.firstSync},
		{"Out of coverage: both nurses work", d.offlineEdits},
		{"Back in coverage: both sync, and their work reaches the source", d.syncEdits},
		{"The office changes something at the source: it comes down to the devices", d.officeEdit},
		{"A conflict: both nurses edit the same record", d.conflict},
		{"The source refuses a change that Waystage had no reason to refuse", d.refusal},
		{"A large sync is cancelled half-way, twice, and resumed", d.interrupted},
		{"Three-way check: devices, mirror and source, value by value", d.agreement},
	}
	for i, s := range steps {
		fmt.Fprintf(d.out, "\n%2d. %s\n", i+1, s.title)
		stepBegan := time.Now()
		err := s.run(ctx)
		if err == nil {
			err = d.serverError()
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			fmt.Fprintf(d.out, "    ✗ after %s: %s\n", span(time.Since(stepBegan)), oneLine(err.Error()))
			d.showLog()
			return &failure{code: exitFailed, what: fmt.Sprintf("step %d of the demonstration did not do what it says", i+1), where: s.title, err: err}
		}
		fmt.Fprintf(d.out, "      (%s)\n", span(time.Since(stepBegan)))
	}
	fmt.Fprintf(d.out, "\nEvery step did what it says, in %s.\n", span(time.Since(began)))
	if !keep {
		return nil
	}
	d.explore()
	select {
	case <-ctx.Done():
		return nil // as promised
	case <-d.server.ended:
		return d.serverError()
	}
}

// tell prints a line of the story, fact one that was checked.
func (d *demo) tell(format string, args ...any) { fmt.Fprintf(d.out, "      "+format+"\n", args...) }
func (d *demo) fact(format string, args ...any) { fmt.Fprintf(d.out, "    ✓ "+format+"\n", args...) }

func (d *demo) startClusters(ctx context.Context) error {
	dir, err := pgcluster.TempDir("waystage-demo-*")
	if err != nil {
		return err
	}
	d.dir = dir
	// Both at the same time: making a cluster takes a second or two.
	type started struct {
		name    string
		cluster *pgcluster.Cluster
		err     error
	}
	results := make(chan started)
	names := []string{"source", "mirror"}
	for _, name := range names {
		go func() {
			c, err := pgcluster.Start(ctx, pgcluster.Options{Dir: filepath.Join(dir, name)})
			results <- started{name, c, err}
		}()
	}
	d.clusters = map[string]*pgcluster.Cluster{}
	var errs []error
	for range names {
		r := <-results
		if r.err != nil {
			errs = append(errs, r.err)
			continue
		}
		d.clusters[r.name] = r.cluster
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	create := func(cluster, database string) (dsn string, conn *pgx.Conn, err error) {
		c := d.clusters[cluster]
		admin, err := schema.Connect(ctx, c.DSN("postgres"), "waystage-demo")
		if err != nil {
			return "", nil, err
		}
		_, err = admin.Exec(ctx, "CREATE DATABASE "+schema.Quote(database))
		if err = errors.Join(err, admin.Close(ctx)); err != nil {
			return "", nil, err
		}
		conn, err = schema.Connect(ctx, c.DSN(database), "waystage-demo")
		return c.DSN(database), conn, err
	}
	if d.sourceDSN, d.source, err = create("source", "vnurse"); err != nil {
		return err
	}
	if d.mirrorDSN, d.mirror, err = create("mirror", "mirror"); err != nil {
		return err
	}
	d.fact("PostgreSQL %s, on free ports of 127.0.0.1: %s and %s", d.clusters["source"].Binaries().Version, d.sourceDSN, d.mirrorDSN)
	return nil
}

func (d *demo) loadSource(ctx context.Context) error {
	if err := nurse.Load(ctx, d.source, nurse.Default); err != nil {
		return err
	}
	var nurses, patients, records, assignments int64
	if err := d.source.QueryRow(ctx, `SELECT (SELECT count(*) FROM vn.nurse), (SELECT count(*) FROM vn.patient), (SELECT count(*) FROM vn.medical_record), (SELECT count(*) FROM vn.assignment)`).
		Scan(&nurses, &patients, &records, &assignments); err != nil {
		return err
	}
	if nurses < 50 || patients < 2000 || records < 20000 {
		return fmt.Errorf("only %d nurses, %d patients and %d records are there", nurses, patients, records)
	}
	d.fact("%d nurses, %s patients, %s assignments of the ones to the others, %s medical records", nurses, thousands(patients), thousands(assignments), thousands(records))
	return nil
}

func (d *demo) enrol(ctx context.Context) error {
	people := nurse.Nurses(nurse.Default.Nurses)[:2]
	for _, p := range people {
		n := &demoNurse{Person: p, file: filepath.Join(d.dir, p.Login+".db")}
		if err := d.addUser(ctx, p.Login, demoPassword, nurse.Group); err != nil {
			return err
		}
		var err error
		// Small parts, so that there is a half-way to cancel a sync at.
		if n.dev, err = device.Open(ctx, n.file, device.Options{App: "waystage demo", PartSize: 48 << 10, Encoding: "none"}); err != nil {
			return err
		}
		d.nurses = append(d.nurses, n)
		if err := n.dev.Enrol(ctx, device.EnrolOptions{Servers: []string{d.server.NATS}, User: p.Login, Device: "phone", Password: demoPassword}); err != nil {
			return err
		}
		d.fact("%s: user %s, enrolled with a password once, from now on by a key in %s", p.Name, p.Login, n.file)
	}
	return nil
}

// explore says what to try while everything runs.
func (d *demo) explore() {
	binary := "waystage"
	if exe, err := os.Executable(); err == nil {
		binary = exe
		if strings.Contains(exe, "go-build") { // go run's, which may be gone
			binary = "go run ./cmd/waystage"
		}
	}
	config := filepath.Join(d.dir, "waystage.yaml")
	amina := d.nurses[0].file
	lines := []string{
		"", "Everything goes on running. Try, in another terminal:", "",
		"  # edit on a device with any SQLite tool, and sync",
		`  sqlite3 ` + amina + ` "UPDATE patient SET remarks = 'Hello from SQLite' WHERE id = ` + fmt.Sprint(sharedPatient) + `"`,
		"  " + binary + " device sync --file " + amina,
		"  " + binary + " device rejects --file " + amina,
		"",
		"  # look at the company's database, and edit there",
		"  psql '" + d.sourceDSN + `' -c "SELECT id, name, remarks FROM vn.patient WHERE id = ` + fmt.Sprint(sharedPatient) + `"`,
		"  psql '" + d.mirrorDSN + `' -c "SELECT id, n, state, code, detail FROM waystage.change ORDER BY id DESC LIMIT 10"`,
		"",
		"  # operate the server",
		"  export WAYSTAGE_CONFIG=" + config,
		"  " + binary + " status",
		"  " + binary + " pools ls",
		"  " + binary + " rejects ls",
		"  curl " + d.server.Health + "/metrics",
		"",
		"  # look at the queues with NATS's own tool",
		"  nats --server " + d.server.NATS + " --user app --password " + d.server.Keys.App + " stream ls",
		"", "Ctrl-C ends it and removes " + d.dir + ".",
	}
	fmt.Fprintln(d.out, strings.Join(lines, "\n"))
}

// cleanUp ends and removes everything, in the opposite order of its start, whatever has failed.
func (d *demo) cleanUp() error {
	if d.dir == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var errs []error
	for _, n := range d.nurses {
		if n.dev != nil {
			errs = append(errs, n.dev.Close())
		}
	}
	d.stopServer()
	for _, conn := range []*pgx.Conn{d.source, d.mirror} {
		if conn != nil {
			_ = conn.Close(ctx) // the server ends next
		}
	}
	var removing sync.WaitGroup
	var mu sync.Mutex
	for _, c := range d.clusters {
		removing.Go(func() {
			err := c.Remove()
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	removing.Wait()
	errs = append(errs, os.RemoveAll(d.dir))
	if err := errors.Join(errs...); err != nil {
		return &failure{code: exitFailed, what: "the demonstration could not remove everything", where: d.dir, err: err}
	}
	fmt.Fprintf(d.out, "Servers stopped, %s removed.\n", d.dir)
	return nil
}
