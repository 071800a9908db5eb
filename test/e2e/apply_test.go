package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/waystage/waystage/cmd"
	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
	shared "github.com/waystage/waystage/test/world"
)

// editions are definitions one after the other, as tests apply them, and what each gives.
type editions struct {
	w       *world
	mu      sync.Mutex
	list    []edition
	settled atomic.Int64 // number of the newest whose apply has returned
}

// edition is a version that a test has made.
type edition struct {
	body   string
	defs   *schema.Definitions
	mine   string              // condition on vn.assignment a that the rows queries have beside the nurse
	wanted map[string][]string // table -> what devices get of it: columns
}

// old is what the application of the second nurse's device was built for: it gets no more than that of any edition.
var old = &protocol.Built{Name: "old", Tables: []protocol.Layout{
	{Table: "vn.patient", Columns: []string{"id", "remarks", "phone"}}, {Table: "vn.visit", Columns: []string{"id", "patient_id", "remarks"}}, {Table: "vn.nowhere"},
}}

// builtFor is what is left of an edition for an application; nil: all.
func (n edition) builtFor(built *protocol.Built) edition {
	if built == nil {
		return n
	}
	wanted := map[string][]string{}
	for _, l := range built.Tables {
		for _, c := range n.wanted[l.Table] {
			if slices.Contains(l.Columns, c) {
				wanted[l.Table] = append(wanted[l.Table], c)
			}
		}
	}
	n.wanted = wanted
	return n
}

// random makes an edition. Columns of patients and visits, tables, operations, rows and sets differ from one to the next.
func (e *editions) random(r *rand.Rand) edition {
	coin := func() bool { return r.IntN(2) == 0 }
	some := func(must []string, may ...string) []string {
		out := slices.Clone(must)
		for _, c := range may {
			if coin() {
				out = append(out, c)
			}
		}
		return out
	}
	n := edition{wanted: map[string][]string{}, mine: []string{"true", "a.patient_id % 2 = 0", "a.patient_id % 3 <> 0"}[r.IntN(3)]}
	rows := "rows: select a.patient_id from vn.assignment a join vn.nurse n on n.id = a.nurse_id where n.login = :user and " + n.mine
	var b strings.Builder
	fmt.Fprintf(&b, "# %d\nversion: 1\nsubscriptions:\n", r.Uint64())
	add := func(name, table string, columns []string, more string) {
		n.wanted[table] = columns
		fmt.Fprintf(&b, "  %s: {table: %s, columns: [%s]%s}\n", name, table, strings.Join(columns, ", "), more)
	}
	add("patients", "vn.patient", some([]string{"id", "name"}, "remarks", "phone", "balance"), fmt.Sprintf(", key: id, allow: [update], rows: %q", strings.TrimPrefix(rows, "rows: ")))
	sets := "  field: [patients]\n"
	groups := "field"
	visits := some([]string{"id", "patient_id", "nurse_id"}, "remarks", "state")
	switch r.IntN(3) {
	case 0:
		add("visits", "vn.visit", visits, fmt.Sprintf(", key: patient_id, direction: download-only, rows: %q", strings.TrimPrefix(rows, "rows: ")))
		sets = "  field: [patients, visits]\n"
	case 1:
		add("visits", "vn.visit", visits, fmt.Sprintf(", key: patient_id, direction: download-only, rows: %q", strings.TrimPrefix(rows, "rows: ")))
		sets += "  diary: [visits]\n"
		groups = []string{"field, diary", "diary, field"}[r.IntN(2)]
	}
	if coin() {
		add("medications", "vn.medication", []string{"code", "name"}, ", direction: download-only")
		sets += "  catalogue: [medications]\n"
		groups += ", catalogue"
	} else {
		b.WriteString("  medications: {table: vn.medication}\n")
	}
	b.WriteString("  assignments: {table: vn.assignment}\n  nurses: {table: vn.nurse}\n")
	b.WriteString("sets:\n" + sets + "groups:\n  nurses: {sets: [" + groups + "]}\n")
	n.body = b.String()
	var problems []schema.Problem
	if n.defs, problems = schema.ParseDefinitions("random", []byte(n.body)); n.defs == nil {
		e.w.t.Fatalf("%v in\n%s", problems, n.body)
	}
	return n
}

// apply puts an edition in force. When it returns nothing that only those before it give may begin.
func (e *editions) apply(n edition) {
	w := e.w
	w.t.Helper()
	e.mu.Lock()
	e.list = append(e.list, n)
	number := int64(len(e.list) - 1)
	e.mu.Unlock()
	file := filepath.Join(w.dir, fmt.Sprintf("edition-%d.yaml", number))
	w.must(os.WriteFile(file, []byte(n.body), 0o600))
	if code := cmd.Main([]string{"subscriptions", "apply", "--yes", file, "-c", w.configFile()}, cmd.System()); code != 0 {
		w.t.Fatalf("apply: exit code %d for\n%s", code, n.body)
	}
	e.settled.Store(number)
}

// since are the editions that may have made a reply to a request that was sent when number was the newest settled one.
func (e *editions) since(number int64) []edition {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.list[number:])
}

// watched is a transport that holds each page against what may be on it.
type watched struct {
	device.Transport
	e     *editions
	login string
	built *protocol.Built
	sent  map[string]int64 // session -> newest settled edition when it was first sent
}

func (e *editions) watch(login string, built *protocol.Built) device.Dialer {
	return func(ctx context.Context, l device.Login) (device.Transport, error) {
		tr, err := device.DialNATS(ctx, l)
		if err != nil {
			return nil, err
		}
		return &watched{Transport: tr, e: e, login: login, built: built, sent: map[string]int64{}}, nil
	}
}

func (t *watched) Put(ctx context.Context, session, part string, p device.Payload) (protocol.Receipt, error) {
	if _, ok := t.sent[session]; !ok {
		t.sent[session] = t.e.settled.Load()
	}
	return t.Transport.Put(ctx, session, part, p)
}

func (t *watched) Get(ctx context.Context, session string, page int) (device.Payload, error) {
	p, err := t.Transport.Get(ctx, session, page)
	if err != nil {
		return p, err
	}
	from := t.sent[session] // 0 for one that an earlier sync has sent
	if data, derr := protocol.Decompress(p.Data, p.Encoding, 0); derr != nil {
		t.e.w.t.Error(derr)
	} else if body, derr := protocol.DecodePage(data, p.ContentType, protocol.Limits{}); derr != nil {
		t.e.w.t.Error(derr)
	} else {
		for _, rows := range body.Tables {
			if !slices.ContainsFunc(t.e.since(from), func(n edition) bool { return t.may(ctx, n, rows) }) {
				t.e.w.t.Errorf("page %d of %s brings %d rows of %s with the columns %v: no edition from number %d on gives them", page, session, len(rows.Rows), rows.Table, rows.Columns, from)
			}
		}
	}
	return p, err
}

// may tells whether an edition gives the rows.
func (t *watched) may(ctx context.Context, n edition, rows protocol.TableRows) bool {
	n = n.builtFor(t.built)
	columns := n.wanted[rows.Table]
	if columns == nil || slices.ContainsFunc(rows.Columns, func(c string) bool { return !slices.Contains(columns, c) }) {
		return false
	}
	key := slices.Index(rows.Columns, map[string]string{"vn.patient": "id", "vn.visit": "patient_id"}[rows.Table])
	if key < 0 || len(rows.Rows) == 0 {
		return true
	}
	var keys []string
	for _, r := range rows.Rows {
		keys = append(keys, *r.Values[key])
	}
	var outside int
	err := t.e.w.mirror.QueryRow(ctx, `SELECT count(*) FROM unnest($1::text[]) k WHERE k::bigint NOT IN (SELECT a.patient_id FROM vn.assignment a
		JOIN vn.nurse n ON n.id = a.nurse_id WHERE n.login = $2 AND `+n.mine+`)`, keys, t.login).Scan(&outside)
	return err == nil && outside == 0 || ctx.Err() != nil
}

// reach does something until the servers answer: on a machine with much to do a connection may take too long.
func (e *editions) reach(do func() error) {
	e.w.t.Helper()
	e.w.eventually("the servers are out of reach", func() error {
		err := do()
		if err != nil && !errors.Is(err, device.ErrUnreachable) {
			e.w.t.Fatal(err)
		}
		return err
	})
}

// holds checks that a device has exactly what an edition gives, after one sync.
func (e *editions) holds(d *device.Device, p nurse.Person, n edition) error {
	tables, err := schema.LoadTables(e.w.ctx, e.w.mirror)
	if err != nil {
		return err
	}
	for _, t := range tables {
		var there int
		if err := d.DB().QueryRowContext(e.w.ctx, "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = ?", t.Name).Scan(&there); err != nil {
			return err
		}
		names := n.wanted[t.FullName()]
		if names == nil {
			if there > 0 {
				return fmt.Errorf("%s still has %s", p.Login, t.FullName())
			}
			continue
		}
		var columns []schema.Column
		for _, c := range t.Columns {
			if slices.Contains(names, c.Name) {
				columns = append(columns, c)
			}
		}
		var have int
		if err := d.DB().QueryRowContext(e.w.ctx, "SELECT count(*) FROM pragma_table_info(?)", t.Name).Scan(&have); err != nil {
			return err
		}
		if have != len(columns) {
			return fmt.Errorf("%s has %d columns of %s, not %v", p.Login, have, t.FullName(), names)
		}
		where := ofNurse(map[string]string{"vn.patient": "id", "vn.visit": "patient_id"}[t.FullName()], p.Login)
		if where != "" {
			where = strings.TrimSuffix(where, ")") + " AND " + n.mine + ")"
		}
		want, err := shared.Rows(e.w.ctx, e.w.mirror, t, columns, where)
		if err != nil {
			return err
		}
		got, err := shared.DeviceRows(e.w.ctx, d.DB(), t, columns)
		if err != nil {
			return err
		}
		if diff := shared.Difference(want, got); diff != "" {
			return fmt.Errorf("%s: mirror and %s's device differ: %s", t.FullName(), p.Login, diff)
		}
	}
	return nil
}

// TestAppliedWhileDevicesSync applies random definitions, one after the other, while devices of two servers edit and sync. No page whose
// request came after an apply had returned brings what that version does not give; each device has exactly its subset after one more sync; and
// each edit has its outcome. One of them runs an old application, which never gets more than it was built for.
func TestAppliedWhileDevicesSync(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 3, Patients: 18, Records: 30})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	e := &editions{w: w}
	first := e.random(r)
	e.list = []edition{first}
	w.must(os.WriteFile(w.config.Definitions, []byte(first.body), 0o600))
	externalBroker(w)
	w.serve(t)
	w.config.Health.Listen = freeAddress(t)
	w.serve(t)
	w.addUsers(2)
	var devices []*device.Device
	built := []*protocol.Built{nil, old}
	for i, p := range w.nurses[:2] {
		d, err := device.Open(w.ctx, filepath.Join(w.dir, p.Login+".db"), device.Options{App: "e2e", Built: built[i], Dial: e.watch(p.Login, built[i])})
		w.must(err)
		t.Cleanup(func() { _ = d.Close() })
		e.reach(func() error {
			return d.Enrol(w.ctx, device.EnrolOptions{Servers: []string{"nats://" + w.nats}, User: p.Login, Device: fmt.Sprint("device-", i), Password: password})
		})
		devices = append(devices, d)
	}
	const rounds = 4
	for round := range rounds {
		ctx, stop := context.WithCancel(w.ctx)
		var syncing sync.WaitGroup
		var synced atomic.Int64
		for i, d := range devices {
			syncing.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					// A column that is not there any more, or a table that has no rows: then there is no edit.
					_, _ = d.DB().ExecContext(ctx, "UPDATE patient SET remarks = ? WHERE id = (SELECT max(id) FROM patient)", fmt.Sprint(round, ".", i, ".", n))
					if _, err := d.Sync(ctx, device.SyncOptions{}); err != nil && ctx.Err() == nil && !errors.Is(err, device.ErrUnreachable) {
						t.Errorf("%s: %v", w.nurses[i].Login, err)
					}
					synced.Add(1)
				}
			})
		}
		w.eventually("the devices sync", func() error {
			if synced.Load() < 2 {
				return fmt.Errorf("%d times", synced.Load())
			}
			return nil
		})
		next := e.random(r)
		e.apply(next)
		stop()
		syncing.Wait()
		for i, d := range devices {
			// A session that was cut off may end with the reply that had been composed for it.
			e.reach(func() error {
				rep, err := d.Sync(w.ctx, device.SyncOptions{})
				if err == nil && rep.Resumed {
					_, err = d.Sync(w.ctx, device.SyncOptions{})
				}
				return err
			})
			if err := e.holds(d, w.nurses[i], next.builtFor(built[i])); err != nil {
				t.Error(err)
			}
		}
		if t.Failed() {
			t.Fatalf("round %d, from\n%s\nto\n%s", round, e.list[len(e.list)-2].body, next.body)
		}
	}
	w.settle(devices...)
	for i, d := range devices {
		w.must(e.holds(d, w.nurses[i], e.list[len(e.list)-1].builtFor(built[i])))
	}
	fresh := w.enrol(w.nurses[0], "new")
	s, err := fresh.Status(w.ctx)
	w.must(err)
	var told []string
	for _, set := range s.Sets {
		told = append(told, set.Name)
	}
	if want := e.list[len(e.list)-1].defs.SetsFor([]string{nurse.Group}); !slices.Equal(told, want) {
		t.Errorf("a new device is told %v, not %v", told, want)
	}
}
