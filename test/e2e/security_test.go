package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/protocol"
)

// intruder is a valid user who speaks the protocol by hand, and not as agreed.
type intruder struct {
	w          *world
	nc         *nats.Conn
	user, name string
	inc        string
	n          int64
	set        string
	cursor     string
	epoch      string

	mu   sync.Mutex
	errs []error // that the broker has reported
}

func (w *world) intruder(user, name, set string) *intruder {
	w.t.Helper()
	x := &intruder{w: w, user: user, name: name, set: set, inc: strings.Repeat("bad0", 8)}
	var err error
	x.nc, err = nats.Connect("nats://"+w.nats, nats.UserInfo(user+"/"+name, password), nats.CustomInboxPrefix(protocol.InboxPrefix(user, name)),
		nats.Timeout(patience), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			x.mu.Lock()
			defer x.mu.Unlock()
			x.errs = append(x.errs, err)
		}))
	w.must(err)
	w.t.Cleanup(x.nc.Close)
	return x
}

func (x *intruder) violations() (n int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, err := range x.errs {
		if errors.Is(err, nats.ErrPermissionViolation) {
			n++
		}
	}
	return n
}

// call makes a gateway call under the intruder's own name.
func (x *intruder) call(data []byte, verb string, tokens ...string) *nats.Msg {
	x.w.t.Helper()
	m := nats.NewMsg(protocol.RequestSubject(x.user, x.name, verb, tokens...))
	m.Data = data
	m.Header.Set(protocol.HeaderContentType, protocol.ContentJSON)
	r, err := x.nc.RequestMsg(m, patience)
	x.w.must(err)
	return r
}

// code is the refusal in an answer, in whatever form; empty: none.
func code(m *nats.Msg) protocol.Code {
	if c := m.Header.Get(protocol.HeaderError); c != "" {
		return protocol.Code(c)
	}
	var a struct {
		Error *protocol.Error `json:"error"`
	}
	if json.Unmarshal(m.Data, &a) != nil || a.Error == nil {
		return ""
	}
	return a.Error.Code
}

// session sends changes and returns the reply.
func (x *intruder) session(edit func(*protocol.Request), changes ...protocol.Change) (pages []protocol.Page) {
	x.w.t.Helper()
	x.n++
	req := protocol.Request{V: protocol.Version, Incarnation: x.inc, N: x.n, Nonce: "n", Set: x.set, Cursor: x.cursor, Epoch: x.epoch, Changes: changes}
	if edit != nil {
		edit(&req)
	}
	body, err := protocol.Encode(&req, protocol.ContentJSON)
	x.w.must(err)
	token := protocol.SessionToken(req.Incarnation, req.N)
	if c := code(x.call(body, protocol.VerbPut, token, "1-1")); c != "" {
		x.w.t.Fatalf("put: %s", c)
	}
	for i := 1; ; i++ {
		var m *nats.Msg
		for deadline := time.Now().Add(patience); ; {
			m = x.call(nil, protocol.VerbGet, token, fmt.Sprint(i))
			if code(m) != protocol.CodePending || time.Now().After(deadline) {
				break
			}
		}
		if c := code(m); c != "" && m.Header.Get(protocol.HeaderError) != "" {
			x.w.t.Fatalf("get: %s", c)
		}
		var p protocol.Page
		x.w.must(json.Unmarshal(m.Data, &p))
		pages = append(pages, p)
		if p.Last || p.Error != nil {
			x.call(nil, protocol.VerbAck, token)
			if p.Error != nil {
				x.n-- // refused as a whole: the number is free
			} else {
				x.cursor, x.epoch = p.Cursor, p.Epoch
			}
			return pages
		}
	}
}

// rows are the rows of a table in a reply, by column.
func rows(pages []protocol.Page, table string) (list []map[string]string) {
	for _, p := range pages {
		for _, t := range p.Tables {
			for _, r := range t.Rows {
				row := map[string]string{"(version)": r.Version}
				for i, c := range t.Columns {
					if t.Table == table && r.Values[i] != nil {
						row[c] = *r.Values[i]
					}
				}
				if t.Table == table {
					list = append(list, row)
				}
			}
		}
	}
	return list
}

func verdicts(pages []protocol.Page) (list []string) {
	for _, p := range pages {
		for _, v := range p.Verdicts {
			list = append(list, strings.TrimSpace(v.State+" "+string(v.Code)))
		}
	}
	return list
}

func ptr(s string) *string { return &s }

const securityDefinitions = `
  salaries: {table: vn.medication, columns: [code, name], direction: download-only}
`

// TestOneDeviceAgainstAnother: a user who may sync, and knows names, keys, incarnation, session and cursor of another's device,
// gets nothing of it, changes nothing of it, and is in nobody's way.
func TestOneDeviceAgainstAnother(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 6, Patients: 24, Records: 48})
	defs := strings.Replace(nurse.Definitions(), "subscriptions:\n", "subscriptions:"+securityDefinitions, 1)
	defs = strings.Replace(defs, "columns: [id, login, name, phone, active]", "columns: [id, login, name]", 1)
	defs = strings.Replace(defs, "sets:\n", "sets:\n  pay: [salaries]\n", 1)
	defs = strings.Replace(defs, "groups:\n", "groups:\n  payroll:\n    sets: [pay]\n", 1)
	w.must(os.WriteFile(w.config.Definitions, []byte(defs), 0o600))
	w.serve(t)
	w.addUsers(6)
	victim, attacker := w.nurses[0], w.nurses[4]
	d := w.enrol(victim, "phone")
	w.sync(d, protocol.WaitSource)
	x := w.intruder(attacker.Login, "laptop", nurse.Set)
	pages := x.session(nil)

	mine := map[string]bool{}
	var own map[string]string
	for _, r := range rows(pages, "vn.patient") {
		mine[r["id"]] = true
		own = r
	}
	var theirs string
	w.must(w.source.QueryRow(w.ctx, `SELECT min(a.patient_id)::text FROM vn.assignment a JOIN vn.nurse n ON n.id = a.nurse_id WHERE n.login = $1
		AND NOT a.patient_id = ANY (SELECT patient_id FROM vn.assignment b JOIN vn.nurse m ON m.id = b.nurse_id WHERE m.login = $2)`, victim.Login, attacker.Login).Scan(&theirs))
	if len(mine) == 0 || mine[theirs] {
		t.Fatalf("the data set does not part the two: %v, %s", mine, theirs)
	}
	var inc, cursor, epoch string
	var n int64
	w.must(d.DB().QueryRow(`SELECT incarnation, n, epoch FROM _ws_state`).Scan(&inc, &n, &epoch))
	w.must(d.DB().QueryRow(`SELECT cursor FROM _ws_set WHERE name = ?`, nurse.Set).Scan(&cursor))
	foreign := func(pages []protocol.Page) (list []string) {
		for _, r := range rows(pages, "vn.patient") {
			if !mine[r["id"]] {
				list = append(list, r["id"])
			}
		}
		return list
	}
	// undisturbed is the proof after each attack: the victim's next sync goes through, with its edit, and nothing else has changed.
	round := 0
	undisturbed := func(t *testing.T) {
		t.Helper()
		round++
		words := fmt.Sprint("mine ", round)
		w.exec(d, "UPDATE patient SET remarks = ? WHERE id = ?", words, theirs)
		if rep := w.sync(d, protocol.WaitSource); rep.Forked || rep.Rejected != 0 || rep.Sent != 1 {
			t.Errorf("the victim's sync: %+v", rep)
		}
		w.eventually("the victim's edit", func() error {
			var have string
			if err := w.source.QueryRow(w.ctx, "SELECT coalesce(remarks, '') FROM vn.patient WHERE id::text = $1", theirs).Scan(&have); err != nil || have == words {
				return err
			}
			return errors.New("the source has " + have)
		})
	}

	w.step("subjects", func(t *testing.T) {
		heard := make(chan *nats.Msg, 100)
		bad := []string{">", "*", "rq.>", "ev.>", "_INBOX.>", protocol.InboxPrefix(victim.Login, "phone") + ".>", protocol.NoticeSubject(victim.Login, "phone"),
			"_INBOX." + attacker.Login + ".*.>", "ws.>", "sync.>", "$JS.>", "$SYS.>", "cd.>", "_R_.>"}
		for _, s := range bad {
			sub, err := x.nc.ChanSubscribe(s, heard)
			w.must(err)
			defer func() { _ = sub.Unsubscribe() }()
		}
		own := protocol.InboxPrefix(attacker.Login, "laptop") + ".x"
		publish := []string{protocol.RequestSubject(victim.Login, "phone", protocol.VerbPut, protocol.SessionToken(inc, n+1), "1-1"), protocol.RequestSubject(victim.Login, "phone", protocol.VerbGet, protocol.SessionToken(inc, n), "1"),
			protocol.RequestSubject(victim.Login, "phone", protocol.VerbEnrol), protocol.RequestSubject(attacker.Login, "tablet", protocol.VerbEnrol), protocol.InboxPrefix(victim.Login, "phone") + ".x",
			"$JS.API.STREAM.NAMES", "$JS.API.DIRECT.GET.WS_OUT.x", "$SYS.REQ.SERVER.PING", "sync.in." + victim.Login + ".phone.x.1-1", "ws.kick.merge", "ws.pools", "ws.ready." + victim.Login + ".phone.x", protocol.NoticeSubject(victim.Login, "phone")}
		for _, s := range publish {
			w.must(x.nc.PublishRequest(s, own, []byte("{}")))
		}
		w.must(x.nc.Flush())
		w.eventually("the broker refuses each of them", func() error {
			if n := x.violations(); n != len(bad)+len(publish) {
				return fmt.Errorf("%d violations of %d", n, len(bad)+len(publish))
			}
			return nil
		})
		undisturbed(t)
		select {
		case m := <-heard:
			t.Errorf("the intruder hears %s", m.Subject)
		default:
		}
	})

	w.step("sessions", func(t *testing.T) {
		w.must(d.DB().QueryRow(`SELECT n FROM _ws_state`).Scan(&n))
		token := protocol.SessionToken(inc, n)
		if m := x.call(nil, protocol.VerbGet, token, "1"); code(m) != protocol.CodePending && code(m) != protocol.CodeNotFound {
			t.Errorf("another's page: %s %s", code(m), m.Data)
		}
		var st protocol.Status
		w.must(json.Unmarshal(x.call(nil, protocol.VerbStatus, token).Data, &st))
		if st.State != "unknown" || st.Records != 0 || st.Pages != 0 {
			t.Errorf("another's session: %+v", st)
		}
		x.call(nil, protocol.VerbAck, token)
		// Taking over the incarnation, at its next number and at its last.
		for _, at := range []int64{n, n + 1} {
			refused := x.session(func(r *protocol.Request) { r.Incarnation, r.N, r.Cursor = inc, at, cursor })
			if e := refused[0].Error; e == nil || e.Code != protocol.CodeForked || len(rows(refused, "vn.patient")) > 0 {
				t.Errorf("session %d of another's incarnation: %+v", at, refused[0])
			}
		}
		undisturbed(t)
	})

	w.step("cursors and sets", func(t *testing.T) {
		got := x.session(func(r *protocol.Request) { r.Cursor = cursor })
		if l := foreign(got); len(l) > 0 || got[0].Error != nil || !got[0].Refresh {
			t.Errorf("another's cursor brings %v (refresh: %v, %v)", l, got[0].Refresh, got[0].Error)
		}
		for _, set := range []string{"pay", "nothing", "field'--"} {
			got := x.session(func(r *protocol.Request) { r.Set, r.Cursor = set, "" })
			if e := got[0].Error; e == nil || e.Code != protocol.CodeUnknownSet && e.Code != protocol.CodeMalformed && e.Code != protocol.CodeName || len(rows(got, "vn.medication")) > 0 {
				t.Errorf("set %q: %+v", set, got[0])
			}
		}
		undisturbed(t)
	})

	w.step("rows, versions and columns", func(t *testing.T) {
		var version string
		w.must(w.mirror.QueryRow(w.ctx, "SELECT _ws_version::text FROM vn.patient WHERE id::text = $1", theirs).Scan(&version))
		patient := protocol.Layout{Table: "vn.patient", Columns: []string{"id", "remarks"}}
		visit := protocol.Layout{Table: "vn.prescription", Columns: []string{"patient_id", "medication", "dose", "per_day", "starts"}}
		var drug string
		w.must(w.source.QueryRow(w.ctx, "SELECT m.code FROM vn.medication m WHERE NOT EXISTS (SELECT FROM vn.prescription p WHERE p.medication = m.code AND p.patient_id::text IN ($1, $2)) LIMIT 1", theirs, own["id"]).Scan(&drug))
		colleague := protocol.Layout{Table: "vn.nurse", Columns: []string{"id", "name", "phone"}}
		const evil = `x"; DROP TABLE vn.patient; --`
		for name, c := range map[string]struct {
			layout protocol.Layout
			change protocol.Change
			want   []protocol.Code
		}{
			"another's row, its right version":  {patient, protocol.Change{Op: "U", Key: []*string{&theirs}, Version: version, Base: []*string{&theirs, ptr("")}, New: []*string{&theirs, ptr("stolen")}}, []protocol.Code{protocol.CodeNotSubscribed}},
			"another's row, a forged version":   {patient, protocol.Change{Op: "U", Key: []*string{&theirs}, Version: "1", Base: []*string{&theirs, ptr("")}, New: []*string{&theirs, ptr("stolen")}}, []protocol.Code{protocol.CodeNotSubscribed}},
			"another's row as if it were new":   {patient, protocol.Change{Op: "I", Key: []*string{&theirs}, New: []*string{&theirs, ptr("stolen")}}, []protocol.Code{protocol.CodeNotSubscribed, protocol.CodeOperation}},
			"another's row deleted":             {patient, protocol.Change{Op: "D", Key: []*string{&theirs}, Version: version, Base: []*string{&theirs, ptr("")}}, []protocol.Code{protocol.CodeNotSubscribed, protocol.CodeOperation}},
			"a new row for another's key":       {visit, protocol.Change{Op: "I", Key: []*string{&theirs, &drug}, New: []*string{&theirs, &drug, ptr("1"), ptr("1"), ptr("2026-01-01")}}, []protocol.Code{protocol.CodeNotSubscribed}},
			"a forged version of an own row":    {patient, protocol.Change{Op: "U", Key: []*string{ptr(own["id"])}, Version: "9223372036854775807", Base: []*string{ptr(own["id"]), ptr("never so")}, New: []*string{ptr(own["id"]), ptr("forged")}}, []protocol.Code{protocol.CodeStale}},
			"a version that is none":            {patient, protocol.Change{Op: "U", Key: []*string{ptr(own["id"])}, Version: "1 OR true", Base: []*string{ptr(own["id"]), ptr("never so")}, New: []*string{ptr(own["id"]), ptr("forged")}}, []protocol.Code{protocol.CodeStale, protocol.CodeInvalidRecord}},
			"a row that may only be read":       {colleague, protocol.Change{Op: "U", Key: []*string{ptr("1")}, Version: "1", Base: []*string{ptr("1"), ptr("a"), ptr("b")}, New: []*string{ptr("1"), ptr("c"), ptr("d")}}, []protocol.Code{protocol.CodeOperation, protocol.CodeUnknownColumn}},
			"a column that is not subscribed":   {protocol.Layout{Table: "vn.patient", Columns: []string{"id", "_ws_version"}}, protocol.Change{Op: "U", Key: []*string{ptr(own["id"])}, Version: own["(version)"], Base: []*string{ptr(own["id"]), ptr("1")}, New: []*string{ptr(own["id"]), ptr("2")}}, []protocol.Code{protocol.CodeUnknownColumn}},
			"a column name that is SQL":         {protocol.Layout{Table: "vn.patient", Columns: []string{"id", evil}}, protocol.Change{Op: "U", Key: []*string{ptr(own["id"])}, Version: own["(version)"], Base: []*string{ptr(own["id"]), ptr("1")}, New: []*string{ptr(own["id"]), ptr("2")}}, []protocol.Code{protocol.CodeUnknownColumn}},
			"a table name that is SQL":          {protocol.Layout{Table: "vn." + evil, Columns: []string{"id"}}, protocol.Change{Op: "D", Key: []*string{ptr("1")}, Version: "1", Base: []*string{ptr("1")}}, []protocol.Code{protocol.CodeUnknownTable}},
			"a table of Waystage's":             {protocol.Layout{Table: "waystage.app_user", Columns: []string{"name", "password_hash"}}, protocol.Change{Op: "U", Key: []*string{&victim.Login}, Version: "1", Base: []*string{&victim.Login, ptr("x")}, New: []*string{&victim.Login, ptr("y")}}, []protocol.Code{protocol.CodeUnknownTable}},
			"a key that is SQL":                 {patient, protocol.Change{Op: "U", Key: []*string{ptr(evil)}, Version: "1", Base: []*string{ptr(evil), ptr("")}, New: []*string{ptr(evil), ptr("x")}}, []protocol.Code{protocol.CodeInvalidValue, protocol.CodeNotSubscribed, protocol.CodeStale, protocol.CodeRowDeleted}},
			"a value that breaks out of arrays": {patient, protocol.Change{Op: "U", Key: []*string{ptr(own["id"] + `","` + theirs)}, Version: "1", Base: []*string{ptr(own["id"] + `","` + theirs), ptr("")}, New: []*string{ptr(own["id"] + `","` + theirs), ptr("x")}}, []protocol.Code{protocol.CodeInvalidValue, protocol.CodeNotSubscribed, protocol.CodeRowDeleted}},
		} {
			c.change.Table = c.layout.Table
			got := x.session(func(r *protocol.Request) { r.Columns = []protocol.Layout{c.layout} }, c.change)
			if v := verdicts(got); len(v) == 0 || !slices.ContainsFunc(c.want, func(code protocol.Code) bool { return v[len(v)-1] == "rejected "+string(code) }) {
				t.Errorf("%s: %v, want %v (%+v)", name, v, c.want, got[0].Error)
			}
			if l := foreign(got); len(l) > 0 {
				t.Errorf("%s: the reply brings %v", name, l)
			}
		}
		// A value is a value, whatever it says.
		now := x.session(func(r *protocol.Request) { r.Cursor = "" })
		for _, r := range rows(now, "vn.patient") {
			if r["id"] == own["id"] {
				own = r
			}
		}
		base, words := ptr(own["remarks"]), evil+`'); \' {"} $1 %s`
		if own["remarks"] == "" {
			base = nil
		}
		got := x.session(func(r *protocol.Request) { r.Columns, r.Wait = []protocol.Layout{patient}, protocol.WaitSource },
			protocol.Change{Table: "vn.patient", Op: "U", Key: []*string{ptr(own["id"])}, Version: own["(version)"], Base: []*string{ptr(own["id"]), base}, New: []*string{ptr(own["id"]), &words}})
		if v := verdicts(got); len(v) != 1 || v[0] != "applied" && v[0] != "merged" {
			t.Errorf("hostile words: %v", v)
		}
		w.eventually("the words at the source", func() error {
			var have *string
			if err := w.source.QueryRow(w.ctx, "SELECT remarks FROM vn.patient WHERE id::text = $1", own["id"]).Scan(&have); err != nil || have != nil && *have == words {
				return err
			}
			return fmt.Errorf("the source has %v", have)
		})
		undisturbed(t)
	})

	w.step("verification and watching", func(t *testing.T) {
		var ask protocol.Watch
		ask.Sets, ask.Only = []protocol.WatchSet{{Set: nurse.Set, Cursor: cursor}, {Set: "pay"}}, true
		body, err := json.Marshal(ask)
		w.must(err)
		var news protocol.News
		w.must(json.Unmarshal(x.call(body, protocol.VerbWatch).Data, &news)) // both must be fetched anew or refused: that is news at once, and says nothing
		if news.Error != nil || len(news.Sets) != 2 {
			t.Errorf("news: %+v", news)
		}
		undisturbed(t)
	})
	w.settle(d)
	w.must(w.compareWith(defs, map[*device.Device]nurse.Person{d: victim}))
}
