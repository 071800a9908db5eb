package device

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// Options of a Device. The zero value is good.
type Options struct {
	DB    *sql.DB // bring your own database handle; Open then ignores its path, and Close leaves the handle open
	Log   *zap.Logger
	Files string // folder for the contents of files; empty: beside the SQLite file, with -files after its name; with DB: none
	App   string // application version, told to the server for the operator's eyes

	// What the application was built for, as 'waystage subscriptions built-for' wrote it ([protocol.ParseBuilt]): with its next sync the
	// file gets these tables and columns and no others, whatever is added to the subscriptions, until an application opens it that
	// names more. Nil: as the file was opened last; without tables: everything.
	Built *protocol.Built

	Dial        Dialer // nil: DialNATS
	ContentType string // protocol.ContentCBOR (default) or protocol.ContentJSON
	Encoding    string // of larger requests: protocol.Zstd (default) or protocol.Gzip; "none" for neither

	MostChanges int             // changes per session; 0: 20,000. What is left follows in another session of the same sync
	MostBytes   int             // bytes of changes per session before encoding; 0: 8 MiB
	PartSize    int             // bytes per message; 0: 480 KiB, which leaves room for headers below the broker's 512 KiB
	Limits      protocol.Limits // zero: protocol.DefaultLimits
}

// Device is one synced file. Its methods may be called from any goroutine; one sync runs at a time.
type Device struct {
	db   *sql.DB
	own  bool // db was opened by Open
	opts Options
	log  *zap.Logger

	patience   patience
	durability string // of our own transactions: FULL (tests, which look at order and not at the disk, take OFF)
	syncing    sync.Mutex

	told map[string]bool // sets of which a session of this Device has told the server all that a session tells; guarded by syncing

	files    string      // folder of the contents of files; empty: the device keeps none
	sweepDue atomic.Bool // contents may be there that nothing names
}

// Open opens a file, and makes it one that can be enrolled if it is new. The application's tables appear with the
// first sync.
func Open(ctx context.Context, path string, o Options) (*Device, error) {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Dial == nil {
		o.Dial = DialNATS
	}
	if o.ContentType == "" {
		o.ContentType = protocol.ContentCBOR
	}
	switch o.Encoding {
	case "":
		o.Encoding = protocol.Zstd
	case "none":
		o.Encoding = protocol.Identity
	}
	if o.MostChanges <= 0 {
		o.MostChanges = 20_000
	}
	if o.MostBytes <= 0 {
		o.MostBytes = 8 << 20
	}
	if o.PartSize <= 0 {
		o.PartSize = 480 << 10
	}
	if o.Limits == (protocol.Limits{}) {
		o.Limits = protocol.DefaultLimits()
	}
	d := &Device{db: o.DB, opts: o, log: o.Log, patience: usual, durability: "FULL"}
	d.files = o.Files
	d.sweepDue.Store(true)
	if d.db == nil {
		if d.files == "" {
			d.files = path + "-files"
		}
		d.own = true
		// The file will hold the device's key: nobody else may read it.
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("device: %w", err)
		}
		if err := f.Close(); err != nil {
			return nil, fmt.Errorf("device: %w", err)
		}
		if d.db, err = openFile(path); err != nil {
			return nil, err
		}
	}
	if err := d.prepare(ctx); err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

// Close closes the file.
func (d *Device) Close() error {
	if !d.own {
		return nil
	}
	return d.db.Close()
}

// DB is the handle of the file, for the application's own SQL.
func (d *Device) DB() *sql.DB { return d.db }

// login is what the file connects with.
func (s state) login() (Login, error) {
	l := Login{User: s.User, Device: s.Device, Seed: s.Seed}
	if s.User == "" || len(s.Seed) == 0 {
		return l, fmt.Errorf("device: %w: run enrol first", ErrNotEnrolled)
	}
	if err := json.Unmarshal([]byte(s.Servers), &l.Servers); err != nil {
		return l, fmt.Errorf("device: %w", err)
	}
	return l, nil
}

// explain gives a refusal by the server its place among this package's errors.
func explain(doing string, err error) error {
	var e *protocol.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code {
	case protocol.CodeBlocked:
		return fmt.Errorf("device: %s: %w: %w", doing, ErrBlocked, e)
	case protocol.CodeSessionOpen:
		return fmt.Errorf("device: %s: %w: %w", doing, ErrInUse, e)
	case protocol.CodeTokenExpired, protocol.CodeTokenUsed, protocol.CodeTokenRevoked, protocol.CodeTokenUnknown:
		return fmt.Errorf("device: %s: %w: %w", doing, ErrToken, e)
	}
	return fmt.Errorf("device: %s: %w: %w", doing, ErrRefused, e)
}

// Repair makes the capture of every table anew, and has the next sync fetch all rows again. Unsent edits that the
// capture knows are kept; edits made while it was damaged are overwritten by what the server has.
func (d *Device) Repair(ctx context.Context) error {
	return d.write(ctx, func(t *txn) error {
		c, err := t.load()
		if err != nil {
			return err
		}
		for _, tab := range c.order {
			if err := t.install(tab); err != nil {
				return err
			}
			if err := t.verify(tab); err != nil {
				return err
			}
		}
		return t.exec(`UPDATE _ws_set SET cursor = ''`)
	})
}
