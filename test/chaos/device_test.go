package chaos

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/protocol"
)

// The device runs in a process of its own, which is killed at any moment. It writes down what it is going to do, what it sends
// and what it hears; what it did it notes in its file, in the transaction in which it did it.

// task is what the process is told.
type task struct {
	User, Name, Password string
	Server               string
	File, Journal        string
	Steps                []step
}

// entry is a line of the journal.
type entry struct {
	At      time.Time          `json:"at"`
	Step    int                `json:"step,omitempty"`
	Edits   []edit             `json:"edits,omitempty"`   // about to be committed
	Session string             `json:"session,omitempty"` // of what was sent or came
	Sent    []sent             `json:"sent,omitempty"`
	Bogus   bool               `json:"bogus,omitempty"`
	Seen    []seen             `json:"seen,omitempty"`
	Told    []protocol.Verdict `json:"told,omitempty"`
	Heard   string             `json:"heard,omitempty"` // of what was sent, for people
	Synced  *synced            `json:"synced,omitempty"`
	Broken  string             `json:"broken,omitempty"` // a promise that the device itself sees broken
}

// edit is one changed row.
type edit struct {
	Table  string   `json:"table"`
	Op     string   `json:"op"`
	Key    []string `json:"key"`
	Tag    string   `json:"tag"`              // new; of a deleted row its last
	Poison bool     `json:"poison,omitempty"` // nobody must accept it
}

// sent is one record of a request.
type sent struct {
	Index int                `json:"index"`
	Unit  int64              `json:"unit,omitempty"`
	Table string             `json:"table"`
	Op    string             `json:"op"`
	Key   []string           `json:"key"`
	Base  map[string]*string `json:"base,omitempty"`
	New   map[string]*string `json:"new,omitempty"`
}

// seen is rows of one table on one page of a reply.
type seen struct {
	Table   string             `json:"table"`
	Columns []string           `json:"columns"`
	Rows    [][]protocol.Value `json:"rows"`
}

// synced is how a sync ended.
type synced struct {
	Open     string   `json:"open,omitempty"` // the session that an earlier sync left
	Sessions []string `json:"sessions,omitempty"`
	Forked   bool     `json:"forked,omitempty"`
	Error    string   `json:"error,omitempty"`
}

// answer is a line to the test.
type answer struct {
	Step    int      `json:"step,omitempty"` // done
	Ready   bool     `json:"ready,omitempty"`
	Done    bool     `json:"done,omitempty"` // with all steps
	Settled *settled `json:"settled,omitempty"`
}

// settled is how the device stands after a sync that the test asked for.
type settled struct {
	Error                string
	Unsent, Sent, Merged int
	Rows, Deleted        int64
	States               map[string]string // of all its sessions, by the server; asked for at the end
}

type phone struct {
	task
	d       *device.Device
	journal *os.File
	dial    device.Dialer
}

func deviceChild() int {
	p := &phone{}
	b, err := os.ReadFile(os.Getenv(envTask))
	if err == nil {
		err = json.Unmarshal(b, &p.task)
	}
	if err == nil {
		err = p.run(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "device:", err)
		return 1
	}
	return 0
}

func (p *phone) say(a answer) {
	b, _ := json.Marshal(a)
	_, _ = os.Stdout.Write(append(b, '\n'))
}

func (p *phone) write(e entry) {
	e.At = time.Now().UTC()
	b, _ := json.Marshal(e)
	if _, err := p.journal.Write(append(b, '\n')); err != nil {
		panic(err)
	}
}

func (p *phone) run(ctx context.Context) (err error) {
	if p.journal, err = os.OpenFile(p.Journal, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	p.dial = func(ctx context.Context, l device.Login) (device.Transport, error) {
		tr, err := device.DialNATS(ctx, l)
		if err != nil {
			return nil, err
		}
		return &wire{tr, p}, nil
	}
	if p.d, err = device.Open(ctx, p.File, device.Options{App: "chaos", Dial: p.dial}); err != nil {
		return err
	}
	db := p.d.DB()
	if _, err := db.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS chaos_step (n INTEGER PRIMARY KEY)"); err != nil {
		return err
	}
	// A broker under load may turn a login away.
	for deadline := time.Now().Add(patience / 2); ; time.Sleep(200 * time.Millisecond) {
		if err = p.enrol(ctx); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return err
		}
	}
	if err := p.look(ctx); err != nil {
		return err
	}
	p.say(answer{Ready: true})
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		switch in.Text() {
		case "go":
			if err := p.steps(ctx); err != nil {
				return err
			}
			p.say(answer{Done: true})
		case "settle":
			p.say(answer{Settled: p.settle(ctx)})
		case "states":
			p.say(answer{Settled: p.states(ctx)})
		case "end":
			return p.d.Close()
		}
	}
	return nil // the test is gone
}

// enrol makes the file that of the device, with all rows in it.
func (p *phone) enrol(ctx context.Context) error {
	s, err := p.d.Status(ctx)
	if err != nil {
		return err
	}
	if !s.Enrolled {
		if err := p.d.Enrol(ctx, device.EnrolOptions{Servers: []string{p.Server}, User: p.User, Device: p.Name, Password: p.Password}); err != nil {
			return err
		}
	}
	if s.N > 0 {
		return nil // it has been at work before
	}
	_, err = p.d.Sync(ctx, device.SyncOptions{})
	return err
}

// steps goes through the script, from where the file says that it stands.
func (p *phone) steps(ctx context.Context) error {
	var last int
	if err := p.d.DB().QueryRowContext(ctx, "SELECT coalesce(max(n), 0) FROM chaos_step").Scan(&last); err != nil {
		return err
	}
	for i := last; i < len(p.Steps); i++ {
		s := p.Steps[i]
		n := i + 1
		r := rand.New(rand.NewPCG(s.R, uint64(n)))
		var err error
		switch s.Kind {
		case stepEdit:
			err = p.edit(ctx, n, r, 1)
		case stepTx:
			err = p.edit(ctx, n, r, 2+r.IntN(3))
		case stepSync:
			err = p.sync(ctx, time.Duration(1500+r.IntN(3000))*time.Millisecond, []string{"", protocol.WaitMerge, protocol.WaitSource}[r.IntN(3)])
		case stepCut:
			err = p.sync(ctx, time.Duration(5+r.IntN(250))*time.Millisecond, []string{protocol.WaitMerge, protocol.WaitSource}[r.IntN(2)])
		case stepBogus:
			p.bogus(ctx, r)
		}
		if err == nil {
			_, err = p.d.DB().ExecContext(ctx, "INSERT OR IGNORE INTO chaos_step VALUES (?)", n)
		}
		if err != nil {
			return fmt.Errorf("step %d (%s): %w", n, s.Kind, err)
		}
		p.say(answer{Step: n})
		time.Sleep(time.Duration(s.Pause) * time.Millisecond)
	}
	return nil
}

// sync syncs once, and looks at what the user sees then. What kind of trouble a sync may end with is not judged here:
// at the end all must work.
func (p *phone) sync(ctx context.Context, most time.Duration, wait string) error {
	before, err := p.d.Status(ctx)
	if err != nil {
		return err
	}
	one, cancel := context.WithTimeout(ctx, most)
	rep, err := p.d.Sync(one, device.SyncOptions{Wait: wait})
	cancel()
	p.synced(before.Open, rep, err)
	return p.look(ctx)
}

func (p *phone) synced(open string, rep device.Report, err error) {
	s := &synced{Open: open, Forked: rep.Forked}
	if err != nil {
		s.Error = err.Error()
	}
	for _, set := range rep.Sets {
		s.Sessions = append(s.Sessions, set.Session)
	}
	p.write(entry{Synced: s})
	switch {
	case rep.Forked:
		p.write(entry{Broken: "I1: the device was taken for a copy of itself"})
	case open != "" && len(s.Sessions) > 0 && s.Sessions[0] != open:
		p.write(entry{Broken: fmt.Sprintf("I7: session %s was open, and the sync began with %s", open, s.Sessions[0])})
	}
}

// look checks what holds in every state that a user sees (I5, I6).
func (p *phone) look(ctx context.Context) error {
	db := p.d.DB()
	var tables int
	if err := db.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('area', 'purse', 'item')").Scan(&tables); err != nil || tables < 3 {
		return err // before the first sync
	}
	pending, err := p.d.Pending(ctx)
	if err != nil {
		return err
	}
	edited := map[string]bool{}
	for _, e := range pending {
		edited[e.Local+"\x00"+key(e.Key)] = true
	}
	each := func(q string, tell func(get func(...any) error) error) error {
		rows, err := db.QueryContext(ctx, q)
		if err != nil {
			return err
		}
		defer func() { _ = rows.Close() }()
		for rows.Next() {
			if err := tell(rows.Scan); err != nil {
				return err
			}
		}
		return rows.Err()
	}
	err = each("SELECT a.id, a.pot + coalesce(sum(p.amount), 0), count(p.id) FROM area a LEFT JOIN purse p ON p.area_id = a.id GROUP BY a.id", func(get func(...any) error) error {
		var area, sum, n int64
		if err := get(&area, &sum, &n); err != nil {
			return err
		}
		if sum != 1000 || n != 3 {
			p.write(entry{Broken: fmt.Sprintf("I6: area %d has %d purses, and together with its pot they hold %d, not 1000: half a transaction of the office is on the device", area, n, sum)})
		}
		return nil
	})
	if err != nil {
		return err
	}
	return each(`SELECT 'item', CAST(id AS TEXT), '', area_id FROM item WHERE area_id NOT IN (SELECT id FROM area)
		UNION ALL SELECT 'line', CAST(item_id AS TEXT), pos, area_id FROM line WHERE area_id NOT IN (SELECT id FROM area)
		UNION ALL SELECT 'purse', CAST(id AS TEXT), '', area_id FROM purse WHERE area_id NOT IN (SELECT id FROM area)
		UNION ALL SELECT 'tally', CAST(area_id AS TEXT), '', area_id FROM tally WHERE area_id NOT IN (SELECT id FROM area)`, func(get func(...any) error) error {
		var table, first, second string
		var area int64
		if err := get(&table, &first, &second, &area); err != nil {
			return err
		}
		k := []*string{&first}
		if table == "line" {
			k = append(k, &second)
		}
		if !edited[table+"\x00"+key(k)] {
			p.write(entry{Broken: fmt.Sprintf("I5: %s %s %s of area %d is on the device, the area is not", table, first, second, area)})
		}
		return nil
	})
}

// key is a key as one string.
func key(values []*string) string {
	var s string
	for _, v := range values {
		if v == nil {
			s += "null\x00"
		} else {
			s += *v + "\x00"
		}
	}
	return s
}

// settle syncs in peace.
func (p *phone) settle(ctx context.Context) *settled {
	s := &settled{}
	before, err := p.d.Status(ctx)
	if err == nil {
		one, cancel := context.WithTimeout(ctx, 30*time.Second)
		var rep device.Report
		rep, err = p.d.Sync(one, device.SyncOptions{Wait: protocol.WaitSource})
		cancel()
		p.synced(before.Open, rep, err)
		s.Rows, s.Deleted = rep.Rows, rep.Deleted
	}
	if lerr := p.look(ctx); err == nil {
		err = lerr
	}
	if err == nil {
		var st device.Status
		st, err = p.d.Status(ctx)
		s.Unsent, s.Sent, s.Merged = st.Unsent, st.Sent, st.Merged
		if len(st.Problems) > 0 {
			p.write(entry{Broken: fmt.Sprintf("I4: the capture is damaged: %v", st.Problems)})
		}
	}
	if err != nil {
		s.Error = err.Error()
	}
	return s
}

// wire writes down what passes.
type wire struct {
	device.Transport
	p *phone
}

func (w *wire) Put(ctx context.Context, session, part string, pay device.Payload) (protocol.Receipt, error) {
	req, err := readRequest(pay)
	if err != nil {
		w.p.write(entry{Broken: "I1: the device sends what cannot be read: " + err.Error()})
		return protocol.Receipt{}, err
	}
	e := entry{Session: session, Sent: []sent{}}
	columns := map[string][]string{}
	for _, l := range req.Columns {
		columns[l.Table] = l.Columns
	}
	image := func(table string, values []protocol.Value) map[string]*string {
		if len(values) == 0 {
			return nil
		}
		m := map[string]*string{}
		for i, c := range columns[table] {
			m[c] = values[i]
		}
		return m
	}
	for i, c := range req.Changes {
		s := sent{Index: i, Unit: c.Unit, Table: c.Table, Op: c.Op, Base: image(c.Table, c.Base), New: image(c.Table, c.New)}
		for _, v := range c.Key {
			s.Key = append(s.Key, *v)
		}
		e.Sent = append(e.Sent, s)
	}
	w.p.write(e)
	rec, err := w.Transport.Put(ctx, session, part, pay)
	w.p.write(entry{Session: session, Heard: fmt.Sprintf("put: %+v, %v", rec, err)})
	return rec, err
}

func (w *wire) Status(ctx context.Context, session string) (protocol.Status, error) {
	st, err := w.Transport.Status(ctx, session)
	w.p.write(entry{Session: session, Heard: fmt.Sprintf("status: %s, %v", st.State, err)})
	return st, err
}

func readRequest(p device.Payload) (*protocol.Request, error) {
	lim := protocol.DefaultLimits()
	data, err := protocol.Decompress(p.Data, p.Encoding, lim.Decompressed)
	if err != nil {
		return nil, err
	}
	return protocol.DecodeRequest(data, p.ContentType, lim)
}

func (w *wire) Get(ctx context.Context, session string, page int) (device.Payload, error) {
	pay, err := w.Transport.Get(ctx, session, page)
	if err != nil {
		return pay, err
	}
	lim := protocol.DefaultLimits()
	data, derr := protocol.Decompress(pay.Data, pay.Encoding, lim.Decompressed)
	if derr != nil {
		return pay, err
	}
	pg, derr := protocol.DecodePage(data, pay.ContentType, lim)
	if derr != nil {
		return pay, err
	}
	e := entry{Session: session, Told: pg.Verdicts}
	for _, t := range pg.Tables {
		s := seen{Table: t.Table, Columns: t.Columns}
		for _, r := range t.Rows {
			s.Rows = append(s.Rows, r.Values)
		}
		e.Seen = append(e.Seen, s)
	}
	if len(e.Seen)+len(e.Told) > 0 {
		w.p.write(e)
	}
	return pay, err
}

// bogus puts bytes that are no request into the queue, under a session of the device's own.
func (p *phone) bogus(ctx context.Context, r *rand.Rand) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	tr, err := p.connect(ctx)
	if err != nil {
		return
	}
	defer func() { _ = tr.Close() }()
	session := protocol.SessionToken(fmt.Sprintf("%016x%016x", r.Uint64(), r.Uint64()), 1)
	junk := make([]byte, 1+r.IntN(300))
	for i := range junk {
		junk[i] = byte(r.Uint32())
	}
	p.write(entry{Session: session, Bogus: true})
	_, _ = tr.Put(ctx, session, protocol.PartToken(1, 1), device.Payload{ContentType: protocol.ContentCBOR, Encoding: protocol.Identity, Data: junk})
}

// connect logs in as the device.
func (p *phone) connect(ctx context.Context) (device.Transport, error) {
	var seed []byte
	if err := p.d.DB().QueryRowContext(ctx, "SELECT seed FROM _ws_state").Scan(&seed); err != nil {
		return nil, err
	}
	return device.DialNATS(ctx, device.Login{Servers: []string{p.Server}, User: p.User, Device: p.Name, Seed: seed})
}

// states asks the server for the state of every session that the device ever sent (I9).
func (p *phone) states(ctx context.Context) *settled {
	s := &settled{States: map[string]string{}}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tr, err := p.connect(ctx)
	if err != nil {
		s.Error = err.Error()
		return s
	}
	defer func() { _ = tr.Close() }()
	entries, err := readJournal(p.Journal)
	if err != nil {
		s.Error = err.Error()
		return s
	}
	for _, e := range entries {
		if e.Sent == nil || s.States[e.Session] != "" {
			continue
		}
		st, err := tr.Status(ctx, e.Session)
		if err != nil {
			s.Error = err.Error()
			return s
		}
		s.States[e.Session] = st.State
	}
	return s
}

func readJournal(path string) ([]entry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	var out []entry
	lines := bufio.NewReader(f)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return out, nil // a line without an end was being written when the process was killed
		}
		var e entry
		if json.Unmarshal(line, &e) == nil {
			out = append(out, e)
		}
	}
}

// edit changes n rows in one local transaction.
func (p *phone) edit(ctx context.Context, step int, r *rand.Rand, n int) error {
	tx, err := p.d.DB().BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	var edits []edit
	together := n > 1 && r.IntN(2) == 0 // the server is to judge them together, where the subscription says so
	if together {
		if _, err := tx.ExecContext(ctx, "INSERT INTO waystage_unit DEFAULT VALUES"); err != nil {
			return err
		}
	}
	memos := together && r.IntN(2) == 0
	for i := range n {
		e, err := (&hand{ctx, tx, r, fmt.Sprintf("%s.%d.%d", p.Name, step, i), memos}).work()
		if err != nil {
			// The file itself refused: that is the application's affair.
			if rerr := tx.Rollback(); rerr != nil && !errors.Is(rerr, sql.ErrTxDone) {
				return rerr
			}
			return nil
		}
		edits = append(edits, e...)
	}
	if together {
		if _, err := tx.ExecContext(ctx, "DELETE FROM waystage_unit"); err != nil {
			return err
		}
	}
	p.write(entry{Step: step, Edits: edits})
	if _, err := tx.ExecContext(ctx, "INSERT INTO chaos_step VALUES (?)", step); err != nil {
		return err
	}
	return tx.Commit()
}

// hand makes one edit.
type hand struct {
	ctx context.Context
	tx  *sql.Tx
	r   *rand.Rand
	tag string

	memos bool // and nothing else
}

// pick takes one row of a query, always the same of the same rows.
func (h *hand) pick(q string, args ...any) (row []string, err error) {
	rows, err := h.tx.QueryContext(h.ctx, q, args...)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	columns, err := rows.Columns()
	if err != nil {
		return nil, err
	}
	var all [][]string
	for rows.Next() {
		values, into := make([]sql.NullString, len(columns)), make([]any, len(columns))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			return nil, err
		}
		var l []string
		for _, v := range values {
			l = append(l, v.String)
		}
		all = append(all, l)
	}
	if len(all) == 0 || rows.Err() != nil {
		return nil, rows.Err()
	}
	return all[h.r.IntN(len(all))], nil
}

func (h *hand) exec(q string, args ...any) error {
	_, err := h.tx.ExecContext(h.ctx, q, args...)
	return err
}

func one(table, op, tag string, poison bool, key ...string) []edit {
	return []edit{{"c." + table, op, key, tag, poison}}
}

func (h *hand) work() ([]edit, error) {
	r := h.r
	area, err := h.pick("SELECT id FROM area ORDER BY id")
	if err != nil || area == nil {
		return nil, err
	}
	item, err := h.pick("SELECT id, tag, area_id FROM item ORDER BY id")
	if err != nil {
		return nil, err
	}
	line, err := h.pick("SELECT item_id, pos, tag FROM line ORDER BY item_id, pos")
	if err != nil {
		return nil, err
	}
	memo, err := h.pick("SELECT area_id, title, tag FROM memo ORDER BY area_id, title")
	if err != nil {
		return nil, err
	}
	n := r.IntN(100)
	if h.memos {
		n = 74 + r.IntN(14)
	}
	switch {
	case n >= 88 && n < 91: // a key that somebody else may take, too
		id := fmt.Sprint(700 + r.IntN(6))
		if old, err := h.pick("SELECT id FROM item WHERE id = ?", id); err != nil || old != nil {
			return nil, err
		}
		err = h.exec("INSERT INTO item (id, area_id, name, qty, tag, updated_at) VALUES (?, ?, ' New ', 5, ?, '2026-01-01 00:00:00+00')", id, area[0], h.tag)
		return one("item", "I", h.tag, false, id), err
	case n >= 91 && n < 93: // a download-only table
		err = h.exec("UPDATE tally SET writes = -1 WHERE area_id = ?", area[0])
		return nil, err
	case item == nil && !h.memos:
		return nil, nil
	case n < 28:
		err = h.exec("UPDATE item SET name = ?, qty = ?, tag = ? WHERE id = ?", " Item "+fmt.Sprint(r.IntN(1000))+" ", r.IntN(100), h.tag, item[0])
		return one("item", "U", h.tag, false, item[0]), err
	case n < 31: // the CHECK refuses
		err = h.exec("UPDATE item SET qty = 1000, tag = ? WHERE id = ?", h.tag, item[0])
		return one("item", "U", h.tag, true, item[0]), err
	case n < 33: // the deferred trigger refuses
		err = h.exec("UPDATE item SET name = 'LATE', tag = ? WHERE id = ?", h.tag, item[0])
		return one("item", "U", h.tag, true, item[0]), err
	case n < 35: // not a number
		err = h.exec("UPDATE item SET qty = 'many', tag = ? WHERE id = ?", h.tag, item[0])
		return one("item", "U", h.tag, true, item[0]), err
	case n < 40: // maybe somebody has that code
		err = h.exec("UPDATE item SET code = ?, tag = ? WHERE id = ?", fmt.Sprintf("code-%d%d", 1+r.IntN(5), 1+r.IntN(4)), h.tag, item[0])
		return one("item", "U", h.tag, false, item[0]), err
	case n < 44: // to another area, maybe one of somebody else
		err = h.exec("UPDATE item SET area_id = ?, tag = ? WHERE id = ?", 1+r.IntN(6), h.tag, item[0])
		return one("item", "U", h.tag, false, item[0]), err
	case n < 48:
		err = h.exec("DELETE FROM item WHERE id = ?", item[0])
		return one("item", "D", item[1], false, item[0]), err
	case n < 58:
		pos := fmt.Sprint("pos ", r.IntN(5))
		if old, err := h.pick("SELECT pos FROM line WHERE item_id = ? AND pos = ?", item[0], pos); err != nil || old != nil {
			return nil, err
		}
		err = h.exec("INSERT INTO line (item_id, pos, area_id, note, amount, tag) VALUES (?, ?, ?, 'new', '2.50', ?)", item[0], pos, item[2], h.tag)
		return one("line", "I", h.tag, false, item[0], pos), err
	case line != nil && n < 68:
		err = h.exec("UPDATE line SET note = ?, amount = ?, tag = ? WHERE item_id = ? AND pos = ?", "note "+h.tag, fmt.Sprintf("%d.00", r.IntN(100)), h.tag, line[0], line[1])
		return one("line", "U", h.tag, false, line[0], line[1]), err
	case line != nil && n < 70: // the CHECK refuses
		err = h.exec("UPDATE line SET amount = '-1.00', tag = ? WHERE item_id = ? AND pos = ?", h.tag, line[0], line[1])
		return one("line", "U", h.tag, true, line[0], line[1]), err
	case line != nil && n < 74:
		err = h.exec("DELETE FROM line WHERE item_id = ? AND pos = ?", line[0], line[1])
		return one("line", "D", line[2], false, line[0], line[1]), err
	case n >= 93 && n < 96: // an item with its lines, in one transaction
		id := fmt.Sprint(710 + r.IntN(6))
		if old, err := h.pick("SELECT id FROM item WHERE id = ?", id); err != nil || old != nil {
			return nil, err
		}
		qty := []int{1, 1000}[r.IntN(2)]
		err = h.exec("INSERT INTO item (id, area_id, name, qty, code, tag, updated_at) VALUES (?, ?, 'whole', ?, ?, ?, '2026-01-01 00:00:00+00')", id, area[0], qty, "code-"+id, h.tag)
		if err != nil {
			return nil, err
		}
		err = h.exec("INSERT INTO line (item_id, pos, area_id, note, amount, tag) VALUES (?, 'pos 9', ?, 'new', '2.50', ?)", id, area[0], h.tag)
		return append(one("item", "I", h.tag, qty == 1000, id), one("line", "I", h.tag, false, id, "pos 9")...), err
	case memo != nil && n < 84:
		err = h.exec("UPDATE memo SET body = ?, weight = ?, tag = ? WHERE area_id = ? AND title = ?", "by "+h.tag, []string{"1.0", "1.00", "2", "0.1"}[r.IntN(4)], h.tag, memo[0], memo[1])
		return one("memo", "U", h.tag, false, memo[0], memo[1]), err
	case memo != nil && n < 86:
		err = h.exec("DELETE FROM memo WHERE area_id = ? AND title = ?", memo[0], memo[1])
		return one("memo", "D", memo[2], false, memo[0], memo[1]), err
	default:
		title := fmt.Sprint("Memo ", r.IntN(6))
		if old, err := h.pick("SELECT title FROM memo WHERE area_id = ? AND title = ?", area[0], title); err != nil || old != nil {
			return nil, err
		}
		err = h.exec("INSERT INTO memo (area_id, title, body, weight, tag) VALUES (?, ?, 'new', '1.50', ?)", area[0], title, h.tag)
		return one("memo", "I", h.tag, false, area[0], title), err
	}
}
