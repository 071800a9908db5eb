package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/waystage/waystage/device"
)

// image is a row's values as text.
type image map[string]*string

func (g image) text(column string) string {
	if v := g[column]; v != nil {
		return *v
	}
	return ""
}

func (g image) number(column string) int64 {
	n, _ := strconv.ParseInt(g.text(column), 10, 64)
	return n
}

// written is one write of a row, as a trigger saw it.
type written struct {
	ID, Xid  int64
	Table    string
	Op       string
	Key      []string
	Old, New image
	Depth    int
	Cascade  bool // maybe no statement's work: PostgreSQL counts cascades as depth 1
	Carried  bool // the transaction is the up worker's
}

func (w *written) row() string { return w.Table + "\x00" + strings.Join(w.Key, "\x00") }

// record is a row of the ledger.
type record struct {
	ID                  int64
	Incarnation         string
	N                   int64
	Index               int
	Device              string
	Table, Op           string
	Key                 []string
	State, Code, Detail string
	Stamp, Version      int64
	OldVersion          int64
	Img, Base, Old      image
	Sent                *sent // by the device's journal
}

func (r *record) name() string {
	return fmt.Sprintf("record %d (%s, session %s-%d index %d: %s %s %s)", r.ID, r.Device, r.Incarnation[:6], r.N, r.Index, r.Op, r.Table, strings.Join(r.Key, "/"))
}

func (r *record) row() string {
	return strings.TrimPrefix(r.Table, "c.") + "\x00" + strings.Join(r.Key, "\x00")
}

// evidence is all that a history left behind.
type evidence struct {
	source   []*written
	mirror   []*written
	carries  map[int64][]int64 // by source transaction: ids of the ledger
	chain    []link            // the up worker's transactions, in their order
	ledger   []*record
	journals [][]entry
	done     []map[int]bool // by device: steps that it did
	rejected [][]device.Reject
}

// link is a transaction of the up worker, by what it says of itself.
type link struct{ worker, carries string }

func collect(ctx context.Context, h *history) (*evidence, error) {
	e := &evidence{carries: map[int64][]int64{}}
	var err error
	if e.source, err = audit(ctx, h.source); err != nil {
		return nil, err
	}
	if e.mirror, err = audit(ctx, h.mirror); err != nil {
		return nil, err
	}
	rows, err := h.source.Query(ctx, "SELECT xid, carries, worker FROM audit.marker ORDER BY id")
	if err != nil {
		return nil, err
	}
	var xid int64
	var carries, worker string
	_, err = pgx.ForEachRow(rows, []any{&xid, &carries, &worker}, func() error {
		e.chain = append(e.chain, link{worker, carries})
		for _, part := range strings.Split(carries, ",") {
			if part == "" {
				continue
			}
			from, to, ranged := strings.Cut(part, "-")
			if !ranged {
				to = from
			}
			a, err := strconv.ParseInt(from, 10, 64)
			if err != nil {
				return err
			}
			b, err := strconv.ParseInt(to, 10, 64)
			if err != nil {
				return err
			}
			for ; a <= b; a++ {
				e.carries[xid] = append(e.carries[xid], a)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	gone := map[string]bool{} // items, by transaction
	for _, w := range e.source {
		_, w.Carried = e.carries[w.Xid]
		if w.Table == "item" && w.New == nil {
			gone[fmt.Sprint(w.Xid, " ", w.Key[0])] = true
		}
	}
	for _, w := range e.source {
		w.Cascade = w.Table == "line" && w.New == nil && gone[fmt.Sprint(w.Xid, " ", w.Key[0])]
	}
	if err := e.readLedger(ctx, h.mirror); err != nil {
		return nil, err
	}
	for _, u := range h.devices {
		j, err := readJournal(u.task.Journal)
		if err != nil {
			return nil, err
		}
		e.journals = append(e.journals, j)
		d, err := device.Open(ctx, u.task.File, device.Options{})
		if err != nil {
			return nil, err
		}
		l, err := d.Rejects(ctx)
		if err != nil {
			return nil, err
		}
		e.rejected = append(e.rejected, l)
		done := map[int]bool{}
		steps, err := d.DB().QueryContext(ctx, "SELECT n FROM chaos_step")
		if err != nil {
			return nil, err
		}
		for steps.Next() {
			var n int
			if err := steps.Scan(&n); err != nil {
				return nil, err
			}
			done[n] = true
		}
		if err := steps.Close(); err != nil {
			return nil, err
		}
		e.done = append(e.done, done)
		if err := d.Close(); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// asText turns the JSON of a row into one of texts.
func asText(column string) string {
	return fmt.Sprintf("(SELECT jsonb_object_agg(key, value) FROM jsonb_each_text(%s))", column)
}

func audit(ctx context.Context, db *pgxpool.Pool) ([]*written, error) {
	rows, err := db.Query(ctx, fmt.Sprintf("SELECT id, xid, tbl, op, key, %s, %s, depth FROM audit.entry ORDER BY id", asText("old"), asText("new")))
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (*written, error) {
		w := &written{}
		return w, row.Scan(&w.ID, &w.Xid, &w.Table, &w.Op, &w.Key, &w.Old, &w.New, &w.Depth)
	})
}

func (e *evidence) readLedger(ctx context.Context, db *pgxpool.Pool) error {
	rows, err := db.Query(ctx, `SELECT c.id, c.incarnation, c.n, c.idx, d.user_name || '/' || d.name, c.tname, c.op, c.key, c.state, coalesce(c.code, ''), coalesce(c.detail, ''),
		c.stamp, c.version, c.old_version, c.img, c.base, c.old FROM waystage.change c JOIN waystage.device d ON d.id = c.device_id ORDER BY c.id`)
	if err != nil {
		return err
	}
	e.ledger, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (*record, error) {
		r := &record{}
		return r, row.Scan(&r.ID, &r.Incarnation, &r.N, &r.Index, &r.Device, &r.Table, &r.Op, &r.Key, &r.State, &r.Code, &r.Detail, &r.Stamp, &r.Version, &r.OldVersion, &r.Img, &r.Base, &r.Old)
	})
	return err
}

// write leaves the evidence in the history's folder, for people.
func (e *evidence) write(dir string) error {
	for name, list := range map[string]any{"audit-source.json": e.source, "audit-mirror.json": e.mirror, "ledger.json": e.ledger} {
		var b strings.Builder
		lines, err := json.Marshal(list)
		if err != nil {
			return err
		}
		b.WriteString(strings.ReplaceAll(string(lines), `},{"ID"`, "},\n{\"ID\""))
		if err := os.WriteFile(filepath.Join(dir, name), []byte(b.String()), 0o600); err != nil {
			return err
		}
	}
	return nil
}
