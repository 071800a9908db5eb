package cmd

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/errgroup"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
)

// loadDevice is a device without a database: it keeps what the protocol asks for and nothing else, so that the server
// is what is measured.
type loadDevice struct {
	t             device.Transport
	set           string
	inc           string
	n             int64
	cursor, epoch string
	hash          string
	columns       []string
	rows          []protocol.Row
}

func (b *bench) loadDevice(ctx context.Context, user, name, set string) (*loadDevice, error) {
	// A hundred logins by password at once may keep one waiting for longer than the broker does.
	t, err := backoff.Retry(ctx, func() (device.Transport, error) {
		return device.DialNATS(ctx, device.Login{Servers: []string{b.url}, User: user, Device: name, Password: benchPassword})
	}, backoff.WithMaxTries(5))
	if err != nil {
		return nil, err
	}
	inc := make([]byte, 16)
	if _, err := rand.Read(inc); err != nil {
		return nil, err
	}
	return &loadDevice{t: t, inc: hex.EncodeToString(inc), set: set}, nil
}

// put sends a session with these changes and returns its token.
func (d *loadDevice) put(ctx context.Context, changes []protocol.Change) (string, error) {
	d.n++
	token := protocol.SessionToken(d.inc, d.n)
	req := protocol.Request{V: protocol.Version, Incarnation: d.inc, N: d.n, Nonce: token[len(token)-8:], Set: d.set, Cursor: d.cursor, Schema: d.hash,
		Epoch: d.epoch, Changes: changes}
	if len(changes) > 0 {
		req.Columns = []protocol.Layout{{Table: "public.item", Columns: d.columns}}
	}
	body, err := protocol.Encode(&req, protocol.ContentCBOR)
	if err != nil {
		return "", err
	}
	encoding := protocol.Identity
	if len(body) > 1<<10 { // as a device does
		encoding = protocol.Zstd
	}
	if body, err = protocol.Compress(body, encoding); err != nil {
		return "", err
	}
	const size = 256 << 10
	parts := slices.Collect(slices.Chunk(body, size))
	for i, p := range parts {
		for {
			r, err := d.t.Put(ctx, token, protocol.PartToken(i+1, len(parts)), device.Payload{ContentType: protocol.ContentCBOR, Encoding: encoding, Data: p})
			if err == nil && r.Error != nil {
				err = r.Error
			}
			var refused *protocol.Error
			if errors.As(err, &refused) && refused.Code == protocol.CodeBusy {
				if err := sleep(ctx, time.Duration(refused.Retry)*time.Second); err != nil {
					return "", err
				}
				continue
			}
			if err != nil {
				return "", err
			}
			break
		}
	}
	return token, nil
}

// unhurried repeats a call that comes too often, when it may: few devices ask oftener than one may.
func unhurried(ctx context.Context, call func() error) error {
	for {
		err := call()
		var refused *protocol.Error
		if !errors.As(err, &refused) || refused.Code != protocol.CodeBusy {
			return err
		}
		if err := sleep(ctx, time.Duration(refused.Retry)*time.Second); err != nil {
			return err
		}
	}
}

// fetch reads the reply and keeps rows (of a refresh, or of keep) and cursor. It returns the states of the verdicts.
func (d *loadDevice) fetch(ctx context.Context, token string) (verdicts []protocol.Verdict, err error) {
	for page := 1; ; page++ {
		var p device.Payload
		err := unhurried(ctx, func() (err error) {
			p, err = d.t.Get(ctx, token, page)
			return err
		})
		var refused *protocol.Error
		if errors.As(err, &refused) && refused.Code == protocol.CodePending {
			page--
			continue
		}
		if err != nil {
			return nil, err
		}
		body, err := protocol.Decompress(p.Data, p.Encoding, 64<<20)
		if err != nil {
			return nil, err
		}
		got, err := protocol.DecodePage(body, p.ContentType, protocol.DefaultLimits())
		if err != nil {
			return nil, err
		}
		if got.Error != nil {
			return nil, got.Error
		}
		if got.Schema != nil {
			d.hash = got.Schema.Hash
		}
		if page == 1 && got.Refresh {
			d.rows = nil
		}
		for _, t := range got.Tables {
			d.columns = t.Columns
			if d.cursor == "" {
				d.rows = append(d.rows, t.Rows...)
				continue
			}
			for _, r := range t.Rows { // later sessions change the first rows only
				if i := slices.IndexFunc(d.rows, func(x protocol.Row) bool { return *x.Values[0] == *r.Values[0] }); i >= 0 {
					d.rows[i] = r
				}
			}
		}
		verdicts = append(verdicts, got.Verdicts...)
		if got.Last {
			d.cursor, d.epoch = got.Cursor, got.Epoch
			return verdicts, unhurried(ctx, func() error { return d.t.Ack(ctx, token) })
		}
	}
}

// edit makes the change of a row: another ward and note.
func (d *loadDevice) edit(row protocol.Row, note string) protocol.Change {
	next := slices.Clone(row.Values)
	next[slices.Index(d.columns, "notes")] = &note
	return protocol.Change{Table: "public.item", Op: protocol.Update, Key: []protocol.Value{row.Values[slices.Index(d.columns, "id")]},
		Version: row.Version, Base: row.Values, New: next}
}

// fleet makes the devices, with their rows.
func (b *bench) fleet(ctx context.Context) ([]*loadDevice, error) {
	devices := make([]*loadDevice, b.users)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range devices {
		g.Go(func() error {
			user := fmt.Sprintf("u%04d", i)
			if err := b.addUser(gctx, user, "field"); err != nil {
				return err
			}
			d, err := b.loadDevice(gctx, user, "load", "own")
			if err != nil {
				return err
			}
			devices[i] = d
			token, err := d.put(gctx, nil)
			if err != nil {
				return err
			}
			if _, err := d.fetch(gctx, token); err != nil {
				return err
			}
			if len(d.rows) != b.rows {
				return fmt.Errorf("%s has %d rows of %d", user, len(d.rows), b.rows)
			}
			return nil
		})
	}
	return devices, g.Wait()
}

// plainInsert copies the device's item table into another SQLite file with a prepared statement in one transaction.
func plainInsert(ctx context.Context, from *sql.DB, file string) (time.Duration, error) {
	var ddl string
	if err := from.QueryRowContext(ctx, "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'item'").Scan(&ddl); err != nil {
		return 0, err
	}
	to, err := sql.Open("sqlite", "file:"+file+"?_pragma=journal_mode(wal)&_pragma=synchronous(full)")
	if err != nil {
		return 0, err
	}
	defer func() { _ = to.Close() }()
	if _, err := to.ExecContext(ctx, ddl); err != nil {
		return 0, err
	}
	rows, err := from.QueryContext(ctx, "SELECT * FROM item")
	if err != nil {
		return 0, err
	}
	defer func() { _ = rows.Close() }()
	columns, err := rows.Columns()
	if err != nil {
		return 0, err
	}
	var all [][]any
	for rows.Next() {
		values, into := make([]any, len(columns)), make([]any, len(columns))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			return 0, err
		}
		all = append(all, values)
	}
	if err := rows.Err(); err != nil {
		return 0, err
	}
	began := time.Now()
	tx, err := to.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer func() { _ = tx.Rollback() }()
	insert, err := tx.PrepareContext(ctx, "INSERT INTO item VALUES (?"+strings.Repeat(", ?", len(columns)-1)+")")
	if err != nil {
		return 0, err
	}
	for _, v := range all {
		if _, err := insert.ExecContext(ctx, v...); err != nil {
			return 0, err
		}
	}
	if err := tx.Commit(); err != nil {
		return 0, err
	}
	return time.Since(began), nil
}
