package cmd

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"

	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
	"github.com/waystage/waystage/stages"
)

// workTables have something of everything that refuses a record.
const workTables = `
CREATE TABLE public.region (id int PRIMARY KEY, name text NOT NULL);
CREATE TABLE public.job (id int PRIMARY KEY, owner text NOT NULL, region int CONSTRAINT job_region REFERENCES public.region,
	hours numeric(5,1) CONSTRAINT job_hours CHECK (hours > 0), note text);
CREATE TABLE public.pair (id int PRIMARY KEY, n int);
CREATE TABLE public.plan (id int PRIMARY KEY, note text);
CREATE TABLE public.stock (id int PRIMARY KEY, pieces int);
CREATE FUNCTION public.picky() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	CASE NEW.name
	WHEN 'forbidden' THEN RAISE 'nobody calls it that';
	WHEN 'secret' THEN RAISE 'not yours' USING ERRCODE = 'insufficient_privilege';
	WHEN 'endless' THEN NEW.id := NEW.id / 0;
	ELSE
	END CASE;
	RETURN NEW;
END $$;
CREATE TRIGGER picky BEFORE INSERT OR UPDATE ON public.region FOR EACH ROW EXECUTE FUNCTION public.picky();
INSERT INTO public.region SELECT g, 'region ' || g FROM generate_series(1, 20) g;
INSERT INTO public.job SELECT g, 'amina', 1, g, 'note' FROM generate_series(1, 40) g;
INSERT INTO public.plan SELECT g, 'plan' FROM generate_series(1, 5) g;
INSERT INTO public.stock SELECT g, 10 FROM generate_series(1, 5) g;
INSERT INTO public.pair SELECT g, g FROM generate_series(1, 5) g;
`

const workDefinitions = `
version: 1
subscriptions:
  regions: {table: public.region}
  jobs: {table: public.job, key: owner, rows: "select :user", allow: [insert, update]}
  pairs: {table: public.pair, reject: transaction}
  plans: {table: public.plan, conflict: source}
  stock:
    table: public.stock
    conflict: {function: care.decide}
sets:
  work: [regions, jobs, pairs, plans, stock]
groups:
  crew: {sets: [work]}
`

// worker is a device that speaks the protocol by itself, and may say what no library would.
type worker struct {
	o          *operator
	nc         *nats.Conn
	user, inc  string
	n          int64
	cursor     string
	epoch      string
	rows       map[string]protocol.Row // "table key" -> row
	columns    map[string][]string
	lastStored string // session token
}

func (o *operator) worker(user string) *worker {
	o.t.Helper()
	nc, err := nats.Connect("nats://"+o.nats, nats.UserInfo(user+"/laptop", testPassword), nats.CustomInboxPrefix("_INBOX."+user+".laptop"), nats.Timeout(time.Minute))
	if err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(nc.Close)
	sum := protocol.Hash([]byte(user + o.dir))
	w := &worker{o: o, nc: nc, user: user, inc: fmt.Sprintf("%x", sum)[:32], rows: map[string]protocol.Row{}, columns: map[string][]string{
		"public.region": {"id", "name"}, "public.job": {"id", "owner", "region", "hours", "note"}, "public.pair": {"id", "n"},
		"public.plan": {"id", "note"}, "public.stock": {"id", "pieces"}}}
	w.session()
	return w
}

func (w *worker) call(subject string, body []byte) []byte {
	w.o.t.Helper()
	m := nats.NewMsg("rq." + w.user + ".laptop." + subject)
	m.Data = body
	m.Header.Set(protocol.HeaderContentType, protocol.ContentJSON)
	for deadline := time.Now().Add(3 * time.Minute); ; {
		r, err := w.nc.RequestMsg(m, time.Minute)
		if err != nil {
			w.o.t.Fatal(err)
		}
		code := r.Header.Get(protocol.HeaderError)
		if code == string(protocol.CodePending) && time.Now().Before(deadline) {
			continue
		}
		if code != "" {
			w.o.t.Fatalf("%s: %s %s", subject, code, r.Data)
		}
		return r.Data
	}
}

// put sends a session without waiting for its reply.
func (w *worker) put(change func(*protocol.Request), changes ...protocol.Change) string {
	w.o.t.Helper()
	w.n++
	req := &protocol.Request{V: protocol.Version, Incarnation: w.inc, N: w.n, Nonce: "x", Set: "work", Cursor: w.cursor, Epoch: w.epoch,
		Wait: protocol.WaitSource, Changes: changes}
	for _, name := range []string{"public.job", "public.pair", "public.plan", "public.region", "public.stock", "public.nothing"} {
		if slices.ContainsFunc(changes, func(c protocol.Change) bool { return c.Table == name }) {
			cols := w.columns[name]
			if cols == nil {
				cols = []string{"id"}
			}
			req.Columns = append(req.Columns, protocol.Layout{Table: name, Columns: cols})
		}
	}
	if change != nil {
		change(req)
	}
	body, err := protocol.Encode(req, protocol.ContentJSON)
	if err != nil {
		w.o.t.Fatal(err)
	}
	w.lastStored = protocol.SessionToken(w.inc, w.n)
	var receipt protocol.Receipt
	if err := json.Unmarshal(w.call("put."+w.lastStored+".1-1", body), &receipt); err != nil || !receipt.Stored {
		w.o.t.Fatalf("%+v %v", receipt, err)
	}
	return w.lastStored
}

// fetch reads and applies the reply; the verdicts on the session's records as "state code", or the refusal of the whole.
func (w *worker) fetch() (verdicts []string, refusal *protocol.Error) {
	w.o.t.Helper()
	for i := 1; ; i++ {
		p, err := protocol.DecodePage(w.call(fmt.Sprintf("get.%s.%d", w.lastStored, i), nil), protocol.ContentJSON, protocol.Limits{})
		if err != nil {
			w.o.t.Fatal(err)
		}
		if p.Error != nil {
			w.n--
			return nil, p.Error
		}
		for _, t := range p.Tables {
			for _, d := range t.Deletes {
				delete(w.rows, t.Table+" "+*d[0])
			}
			for _, r := range t.Rows {
				w.rows[t.Table+" "+*r.Values[0]] = r
			}
		}
		for _, v := range p.Verdicts {
			if v.Incarnation == w.inc && v.N == w.n {
				verdicts = append(verdicts, strings.TrimSpace(v.State+" "+string(v.Code)))
			}
		}
		if p.Last {
			w.cursor, w.epoch = p.Cursor, p.Epoch
			w.call("ack."+w.lastStored, nil)
			return verdicts, nil
		}
	}
}

func (w *worker) session(changes ...protocol.Change) []string {
	w.o.t.Helper()
	w.put(nil, changes...)
	verdicts, refusal := w.fetch()
	if refusal != nil {
		w.o.t.Fatal(refusal)
	}
	return verdicts
}

func texts(list ...string) []protocol.Value {
	out := make([]protocol.Value, len(list))
	for i, s := range list {
		if s != "<null>" {
			out[i] = &s
		}
	}
	return out
}

// edit changes a column of a row that the device has.
func (w *worker) edit(table, key, column, value string) protocol.Change {
	w.o.t.Helper()
	r, ok := w.rows[table+" "+key]
	if !ok {
		w.o.t.Fatalf("the device has no %s %s", table, key)
	}
	img := slices.Clone(r.Values)
	img[slices.Index(w.columns[table], column)] = &value
	return protocol.Change{Table: table, Op: protocol.Update, Key: texts(key), Version: r.Version, Base: r.Values, New: img}
}

func (w *worker) insert(table string, values ...string) protocol.Change {
	return protocol.Change{Table: table, Op: protocol.Insert, Key: texts(values[0]), New: texts(values...)}
}

// at runs a statement on a database and reads one text, if it gives any.
func (o *operator) at(dsn, sql string, args ...any) string {
	o.t.Helper()
	conn, err := schema.Connect(o.t.Context(), dsn, "test")
	if err != nil {
		o.t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	rows, err := conn.Query(o.t.Context(), sql, args...)
	if err != nil {
		o.t.Fatalf("%s: %v", sql, err)
	}
	var out string
	for rows.Next() {
		v, err := rows.Values()
		if err != nil {
			o.t.Fatal(err)
		}
		out = fmt.Sprint(v[0])
	}
	if err := rows.Err(); err != nil {
		o.t.Fatalf("%s: %v", sql, err)
	}
	return out
}

// work is a running server with the work tables, its user amina, and her device, whose sessions wait for the source's verdict.
func work(t *testing.T, set ...string) (*operator, *worker) {
	o := newOperator(t)
	conn, err := schema.Connect(t.Context(), o.source, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if _, err := conn.Exec(t.Context(), workTables); err != nil {
		t.Fatal(err)
	}
	o.init()
	o.at(o.mirror, `CREATE SCHEMA care`)
	o.at(o.mirror, `GRANT USAGE ON SCHEMA care TO PUBLIC`)
	o.at(o.mirror, `CREATE FUNCTION care.decide(base jsonb, theirs jsonb, mine jsonb, info jsonb) RETURNS jsonb LANGUAGE plpgsql STABLE AS $$
		DECLARE pieces int := (theirs->>'pieces')::int + (mine->>'pieces')::int - (base->>'pieces')::int;
		BEGIN
			IF pieces < 0 THEN RAISE 'there are only % left', theirs->>'pieces'; END IF;
			RETURN jsonb_build_object('pieces', CASE WHEN pieces > 100 THEN 'too many' ELSE pieces::text END);
		END $$`)
	stop := o.serve(workDefinitions, append(set, "health.listen=", "reply.wait_source=2m")...)
	t.Cleanup(stop)
	o.run(exitOK, testPassword, "users add amina --group crew")
	return o, o.worker("amina")
}

func (o *operator) wantVerdicts(got []string, want ...string) {
	o.t.Helper()
	if !slices.Equal(got, want) {
		o.t.Fatalf("verdicts %q, want %q", got, want)
	}
}

func (o *operator) rejects(line string) []reject {
	o.t.Helper()
	return data[[]reject](o, exitOK, "rejects ls -o json "+line)
}

// foreign makes the source's office change something, and waits until the mirror has it.
func (o *operator) foreign(sql, check string) {
	o.t.Helper()
	o.at(o.source, sql)
	o.eventually("the mirror follows", func() bool { return o.at(o.mirror, check) == "true" })
}

// TestRejects works the log of rejected records from the command line, through the whole way to the source.
func TestRejects(t *testing.T) {
	o, amina := work(t)
	retry := func(code int, line string) []stages.Attempt {
		t.Helper()
		return data[[]stages.Attempt](o, code, "rejects retry -o json --as olga --wait 3m "+line)
	}

	// Refused by a constraint; as it is it is refused again, corrected it passes.
	o.wantVerdicts(amina.session(amina.edit("public.job", "1", "hours", "-1")), "refused source_constraint")
	first := o.rejects("--state open")
	if len(first) != 1 || first[0].Constraint != "job_hours" || first[0].Status != "open" || len(first[0].Actions) != 0 {
		t.Fatalf("%+v", first)
	}
	id := first[0].ID
	got := retry(exitRejected, fmt.Sprint(id))
	if len(got) != 1 || got[0].State != "refused" || got[0].Code != "source_constraint" || got[0].Constraint != "job_hours" || got[0].Result <= id {
		t.Fatalf("%+v", got)
	}
	failed := got[0].Result
	if again := data[reject](o, exitOK, fmt.Sprintf("rejects show %d -o json", failed)); again.Status != "superseded" || again.User != protocol.OperatorUser || again.Device != "olga" {
		t.Fatalf("%+v", again)
	}
	o.foreign(`UPDATE public.job SET note = 'by the office' WHERE id = 1`, `SELECT note = 'by the office' FROM public.job WHERE id = 1`)
	got = retry(exitOK, fmt.Sprintf("%d --set hours=2.5 --note asked-her", id))
	if len(got) != 1 || got[0].State != "applied" {
		t.Fatalf("%+v", got)
	}
	if v := o.at(o.source, `SELECT concat_ws(' ', hours, note) FROM public.job WHERE id = 1`); v != "2.5 by the office" {
		t.Errorf("the source has %s", v)
	}
	one := data[reject](o, exitOK, fmt.Sprintf("rejects show %d -o json", id))
	if one.Status != "retried" || len(one.Actions) != 2 || one.Actions[0].Who != "olga" || *one.Actions[0].Code != "source_constraint" ||
		one.Actions[1].Note != "asked-her" || *one.Actions[1].State != "applied" || *one.Actions[1].Result != got[0].Result {
		t.Fatalf("%+v", one)
	}
	if shown := o.run(exitOK, "", fmt.Sprintf("rejects show %d", id)); !strings.Contains(shown.out, "retry by olga: became record") || !strings.Contains(shown.out, "asked-her") || !strings.Contains(shown.out, "-1") {
		t.Errorf("%s", shown.out)
	}
	if got := retry(exitPrecondition, fmt.Sprint(id)); got[0].Problem != stages.ProblemRetried {
		t.Errorf("%+v", got)
	}
	// The device sees it as somebody else's change.
	amina.session()
	if v := amina.rows["public.job 1"].Values; *v[3] != "2.5" || *v[4] != "by the office" {
		t.Errorf("the device has %v", v)
	}
	o.wantVerdicts(amina.session(amina.edit("public.job", "1", "note", "mine again")), "applied")

	// Receipts: each step with its time.
	rc := data[[]recordReceipt](o, exitOK, fmt.Sprintf("receipts --record %d -o json", got[0].Result))
	if len(rc) != 1 || rc[0].State != "applied" || rc[0].Received == nil || rc[0].Staged == nil || rc[0].Merged == nil || rc[0].Version == "" ||
		rc[0].Decided == nil || rc[0].Applied == nil || !regexp.MustCompile(`^[0-9A-F]+/[0-9A-F]+$`).MatchString(rc[0].Position) || rc[0].Replied != nil {
		t.Errorf("%+v", rc)
	}
	rc = data[[]recordReceipt](o, exitOK, "receipts --user amina --table job --key 1 -o json")
	if len(rc) != 2 || rc[1].State != "refused" || *rc[1].ID != id || rc[1].Constraint != "job_hours" || rc[1].RightVersion == "" || rc[1].Stood["note"] == nil ||
		rc[1].Replied == nil || rc[1].ToldIn != rc[1].Session || rc[1].Confirmed == nil || rc[1].Applied != nil {
		t.Errorf("%+v", rc)
	}
	if p := o.at(o.source, `SELECT ($1::pg_lsn <= pg_current_wal_lsn())::text`, rc[0].Position); p != "true" {
		t.Errorf("position %s lies ahead of the source", rc[0].Position)
	}
	if shown := o.run(exitOK, "", fmt.Sprintf("receipts --record %d", *rc[0].ID)); !strings.Contains(shown.out, "at the source, position") || !strings.Contains(shown.out, "told") {
		t.Errorf("%s", shown.out)
	}
	if shown := o.run(exitOK, "", "receipts --since 1h --state refused"); !strings.Contains(shown.out, "source_constraint") {
		t.Errorf("%s", shown.out)
	}
	o.run(exitPrecondition, "", "receipts --record 987654")
	o.run(exitUsage, "", "receipts --state nonsense")
	o.run(exitUsage, "", "receipts --session nonsense")

	// In bulk: five that lost to the office, one of them for good.
	var changes []protocol.Change
	for i := 11; i <= 15; i++ {
		changes = append(changes, amina.edit("public.job", fmt.Sprint(i), "hours", "7"))
	}
	o.foreign(`UPDATE public.job SET note = 'office' WHERE id BETWEEN 11 AND 15`, `SELECT bool_and(note = 'office') FROM public.job WHERE id BETWEEN 11 AND 15`)
	o.wantVerdicts(amina.session(changes...), slices.Repeat([]string{"rejected stale_version"}, 5)...)
	o.foreign(`DELETE FROM public.job WHERE id = 13`, `SELECT count(*) = 0 FROM public.job WHERE id = 13`)
	if got := data[[]dry](o, exitOK, "rejects retry --all --reason stale_version --dry-run -o json"); len(got) != 5 {
		t.Errorf("%+v", got)
	}
	o.run(exitUsage, "", "rejects retry --all --reason stale_version") // nobody there to ask
	o.run(exitUsage, "", "rejects retry --reason stale_version")
	o.run(exitUsage, "", "rejects retry")
	o.run(exitUsage, "", "rejects retry nonsense")
	o.run(exitUsage, "", "rejects retry 1 --all")
	o.run(exitUsage, "", "rejects retry 1 2 --set a=b")
	o.run(exitUsage, "", "rejects retry 1 --set a")
	o.run(exitUsage, "", "rejects retry 1 --set a=b --null a")
	o.run(exitUsage, "", "rejects retry 1 --as Olga.K")
	o.run(exitUsage, "", "rejects retry 1 --wait soon")
	o.run(exitUsage, "", "rejects ls --unit 3")
	o.run(exitUsage, "", "rejects ls --state nonsense")
	got = retry(exitPrecondition, "--all --user amina --table job --reason stale_version --since 1h --yes")
	if len(got) != 5 || got[2].Problem != stages.ProblemRowGone {
		t.Fatalf("%+v", got)
	}
	for i, a := range got {
		if i != 2 && a.State != "applied" {
			t.Errorf("%+v", a)
		}
	}
	if v := o.at(o.source, `SELECT count(*) FROM public.job WHERE hours = 7 AND note = 'office'`); v != "4" {
		t.Errorf("%s rows are right at the source", v)
	}
	if got := data[[]stages.Attempt](o, exitPrecondition, fmt.Sprintf("rejects discard 987654 %d -o json --as olga --note no-such-job", got[2].Record)); got[0].State != stages.AttemptDiscarded || got[1].Problem != stages.ProblemUnknown {
		t.Errorf("%+v", got)
	}
	if open := o.rejects("--state open"); len(open) != 0 {
		t.Errorf("%+v", open)
	}
	if o.run(exitOK, "", "rejects retry --all --yes").err == "" || o.run(exitOK, "", "rejects discard --all").err == "" {
		t.Error("nothing is said about no records")
	}
	lines, err := csv.NewReader(strings.NewReader(o.run(exitOK, "", "rejects export -o csv --state discarded").out)).ReadAll()
	if err != nil || len(lines) != 2 || lines[1][slices.Index(lines[0], "status")] != "discarded" || !strings.Contains(lines[1][slices.Index(lines[0], "actions")], "no-such-job") {
		t.Errorf("%v %v", lines, err)
	}

	// The outcome is not known while the merge is paused; asked later it is.
	o.foreign(`UPDATE public.job SET note = 'office' WHERE id = 21`, `SELECT note = 'office' FROM public.job WHERE id = 21`)
	o.wantVerdicts(amina.session(amina.edit("public.job", "21", "hours", "8")), "rejected stale_version")
	id = o.rejects("--state open")[0].ID
	o.run(exitOK, "", "pools pause merge")
	o.eventually("the merge is paused", func() bool {
		r := data[[]poolRow](o, exitOK, "pools ls merge -o json")
		return len(r) == 1 && len(r[0].Processes) == 1 && len(r[0].Processes[0].Workers) == 1 && r[0].Processes[0].Workers[0].State == "paused"
	})
	got = data[[]stages.Attempt](o, exitUnreachable, fmt.Sprintf("rejects retry -o json --wait 0 %d", id))
	if got[0].State != stages.AttemptStaged || got[0].Session == "" {
		t.Fatalf("%+v", got)
	}
	if rc := data[[]recordReceipt](o, exitOK, "receipts -o json --session "+got[0].Session); len(rc) != 1 || rc[0].State != "staged" || rc[0].ID != nil || rc[0].Staged == nil {
		t.Errorf("%+v", rc)
	}
	o.run(exitOK, "", "pools resume merge")
	o.eventually("the retry is applied", func() bool {
		r := data[reject](o, exitOK, fmt.Sprintf("rejects show %d -o json", id))
		return len(r.Actions) == 1 && r.Actions[0].State != nil && *r.Actions[0].State == "applied"
	})

	// Sessions that are in the input queue only, and requests that were refused as a whole.
	o.run(exitOK, "", "pools pause intake")
	o.eventually("the intake is paused", func() bool {
		r := data[[]poolRow](o, exitOK, "pools ls intake -o json")
		return len(r) == 1 && len(r[0].Processes) == 1 && len(r[0].Processes[0].Workers) > 0 &&
			!slices.ContainsFunc(r[0].Processes[0].Workers, func(w stages.WorkerInfo) bool { return w.State != "paused" })
	})
	token := amina.put(nil)
	sessions := data[[]sessionRow](o, exitOK, "receipts sessions -o json --state received")
	if len(sessions) != 1 || sessions[0].Session != token || sessions[0].User != "amina" || sessions[0].Received == nil {
		t.Errorf("%+v", sessions)
	}
	if got := o.run(exitOK, "", "receipts --session "+token); !strings.Contains(got.err, "is received") {
		t.Errorf("%+v", got)
	}
	o.run(exitOK, "", "pools resume intake")
	amina.fetch()
	if s := data[[]sessionRow](o, exitOK, "receipts sessions -o json --session "+token); len(s) != 1 || s[0].State != "closed" || s[0].Closed == nil || s[0].Pages != 1 {
		t.Errorf("%+v", s)
	}
	token = amina.put(func(r *protocol.Request) { r.Set = "nonsense" })
	if _, refusal := amina.fetch(); refusal == nil || refusal.Code != protocol.CodeUnknownSet {
		t.Fatal(refusal)
	}
	if s := data[[]sessionRow](o, exitOK, "receipts sessions -o json --user amina --state refused"); len(s) != 1 || s[0].Session != token || s[0].Code != "unknown_set" || s[0].Refused == nil {
		t.Errorf("%+v", s)
	}
	var st protocol.Status
	if err := json.Unmarshal(amina.call("status."+token, nil), &st); err != nil || st.State != "refused" || st.Error == nil || st.Error.Code != protocol.CodeUnknownSet {
		t.Errorf("%+v %v", st, err)
	}
	if shown := o.run(exitOK, "", "receipts sessions"); !strings.Contains(shown.out, "refused: unknown_set") {
		t.Errorf("%s", shown.out)
	}

	// The operators' user is nobody's: not listed, not to be changed, and never let in.
	if users := data[[]map[string]any](o, exitOK, "users ls -o json"); len(users) != 1 {
		t.Errorf("%v", users)
	}
	if devices := data[[]map[string]any](o, exitOK, "devices ls -o json"); len(devices) != 1 {
		t.Errorf("%v", devices)
	}
	for _, line := range []string{"users rm @operator --yes", "users block @operator", "users groups @operator crew", "devices rm @operator/olga --yes", "devices unblock @operator/olga"} {
		o.run(exitPrecondition, "", line)
	}
	o.run(exitUsage, testPassword, "users add @operator")
	o.run(exitPrecondition, testPassword, "users passwd @operator")
	if v := o.at(o.mirror, `SELECT count(*) FROM waystage.device WHERE user_name = '@operator'`); v == "0" {
		t.Error("there is no operator to be kept out")
	}
	for _, login := range []string{"@operator/olga", "@operator", "*/olga"} {
		for _, password := range []string{"", "!", testPassword} {
			if nc, err := nats.Connect("nats://"+o.nats, nats.UserInfo(login, password), nats.Timeout(time.Minute)); err == nil {
				nc.Close()
				t.Errorf("%s is let in", login)
			} else if !errors.Is(err, nats.ErrAuthorization) {
				t.Error(err)
			}
		}
	}
	o.run(exitUsage, testPassword, "device enrol --server nats://"+o.nats+" --user @operator --device olga --file "+filepath.Join(o.dir, "op.db"))

	// Shell completion.
	for line, want := range map[string]string{"rejects ls --reason ": "source_trigger", "rejects ls --user ": "amina", "rejects retry --state ": "discarded",
		"rejects export --table ": "public.job", "receipts --state ": "applied", "receipts sessions --state ": "received", "rejects ls --device ": "laptop"} {
		if got := waystage(t, nil, "", append(append([]string{"__complete"}, strings.Fields("-c "+o.config+" "+line)...), "")...); !strings.Contains(got.out, want) {
			t.Errorf("completion of %q: %s%s", line, got.out, got.err)
		}
	}
}

// TestEveryReason has each code of the catalogue given to a record by the running server, and none beside them.
func TestEveryReason(t *testing.T) {
	o, amina := work(t, "limits.row=4KiB")
	give := func(change func(*protocol.Request), want string, changes ...protocol.Change) {
		t.Helper()
		amina.put(change, changes...)
		got, refusal := amina.fetch()
		if refusal != nil || len(got) == 0 || got[len(got)-1] != want {
			t.Fatalf("%v %v, want %s", got, refusal, want)
		}
	}
	job := func(key, column, value string) protocol.Change { return amina.edit("public.job", key, column, value) }
	region := func(id, name string) protocol.Change { return amina.insert("public.region", id, name) }

	stale := job("1", "note", "late")
	o.foreign(`UPDATE public.job SET note = 'office' WHERE id = 1`, `SELECT note = 'office' FROM public.job WHERE id = 1`)
	give(nil, "rejected stale_version", stale)
	gone := job("2", "note", "late")
	o.foreign(`DELETE FROM public.job WHERE id = 2`, `SELECT count(*) = 0 FROM public.job WHERE id = 2`)
	give(nil, "rejected row_deleted", gone)
	give(nil, "rejected row_exists", region("1", "another"))
	give(nil, "rejected unknown_table", protocol.Change{Table: "public.nothing", Op: "I", Key: texts("1"), New: texts("1")})
	give(func(r *protocol.Request) { r.Columns[0].Columns = []string{"id", "secret"} }, "rejected unknown_column", region("100", "x"))
	give(nil, "rejected invalid_value", job("3", "hours", "many"))
	give(nil, "rejected missing_key", protocol.Change{Table: "public.region", Op: "I", Key: texts("<null>"), New: texts("101", "x")})
	other := job("3", "note", "x")
	other.New[0] = texts("333")[0]
	give(nil, "rejected key_change", other)
	give(nil, "rejected not_subscribed", amina.insert("public.job", "102", "bruno", "1", "1", "x"))
	give(nil, "rejected operation_not_allowed", protocol.Change{Table: "public.job", Op: "D", Key: texts("3"), Version: amina.rows["public.job 3"].Version, Base: amina.rows["public.job 3"].Values})
	give(nil, "rejected duplicate_row", region("103", "x"), region("103", "y"))
	give(nil, "rejected row_too_big", region("104", strings.Repeat("x", 5000)))
	give(nil, "rejected invalid_record", protocol.Change{Table: "public.region", Op: "I", Key: texts("105")})
	give(nil, "refused source_constraint", job("4", "hours", "-4"))
	give(nil, "refused source_trigger", region("106", "forbidden"))
	give(nil, "refused source_permission", region("107", "secret"))
	give(nil, "refused source_value", region("108", "endless"))
	// A parent that is refused takes its child with it.
	give(nil, "refused dependency_rejected", region("109", "forbidden"), amina.insert("public.job", "109", "amina", "109", "1", "x"))
	// The source's row is changed before the mirror knows of it.
	o.run(exitOK, "", "pools pause apply-down")
	o.eventually("apply-down is paused", func() bool {
		r := data[[]poolRow](o, exitOK, "pools ls apply-down -o json")
		return len(r) == 1 && len(r[0].Processes) == 1 && len(r[0].Processes[0].Workers) == 1 && r[0].Processes[0].Workers[0].State == "paused"
	})
	o.at(o.source, `UPDATE public.job SET note = 'quick office' WHERE id = 5`)
	amina.put(nil, job("5", "note", "slow device"))
	o.eventually("the change is merged", func() bool {
		return o.at(o.mirror, `SELECT count(*) FROM waystage.change WHERE key = '{5}' AND state = 'merged'`) == "1"
	})
	o.run(exitOK, "", "pools resume apply-down")
	if got, refusal := amina.fetch(); refusal != nil || !slices.Equal(got, []string{"refused source_conflict"}) {
		t.Fatal(got, refusal)
	}
	// One record of an atomic transaction that fails takes the others with it.
	lost := amina.edit("public.pair", "1", "n", "11")
	o.foreign(`UPDATE public.pair SET n = 0 WHERE id = 1`, `SELECT n = 0 FROM public.pair WHERE id = 1`)
	kept := amina.edit("public.pair", "2", "n", "12")
	lost.Unit, kept.Unit = 1, 1
	give(nil, "rejected transaction_rejected", lost, kept)

	// Conflict policies.
	yields := amina.edit("public.plan", "1", "note", "late")
	o.foreign(`UPDATE public.plan SET note = 'office' WHERE id = 1`, `SELECT note = 'office' FROM public.plan WHERE id = 1`)
	give(nil, "rejected source_wins", yields)
	if r := o.rejects("--reason source_wins --state settled"); len(r) != 1 || r[0].Winner != "source" {
		t.Errorf("what gave way is not settled: %+v", r)
	}
	decided := []protocol.Change{amina.edit("public.stock", "1", "pieces", "8"), amina.edit("public.stock", "2", "pieces", "0"), amina.edit("public.stock", "3", "pieces", "200")}
	o.foreign(`UPDATE public.stock SET pieces = pieces - 5`, `SELECT bool_and(pieces = 5) FROM public.stock`)
	o.wantVerdicts(amina.session(decided...), "applied", "rejected function_refused", "rejected function_failed")
	if got := o.at(o.source, `SELECT pieces FROM public.stock WHERE id = 1`); got != "3" {
		t.Errorf("the source has %s pieces", got)
	}
	receipts := data[[]recordReceipt](o, exitOK, "receipts --table stock --key 1 -o json")
	if len(receipts) != 1 || receipts[0].Policy != "function" || receipts[0].Against != "source" || *receipts[0].Stood["pieces"] != "5" || *receipts[0].Sent["pieces"] != "8" {
		t.Errorf("the receipt does not say who met whom: %+v", receipts)
	}
	if out := o.run(exitOK, "", fmt.Sprintf("receipts --record %d", *receipts[0].ID)); !strings.Contains(out.out, "against the change of source") || !strings.Contains(out.out, "pieces=5") {
		t.Errorf("the receipt says\n%s", out.out)
	}

	var want []string
	for _, c := range protocol.RecordCodes() {
		if c != protocol.CodeSchema && c != protocol.CodeEpoch { // given when the mirror is changed or rebuilt: see the tests of schema and apply
			want = append(want, string(c))
		}
	}
	slices.Sort(want)
	if got := o.at(o.mirror, `SELECT string_agg(DISTINCT code, ' ' ORDER BY code) FROM waystage.change`); got != strings.Join(want, " ") {
		t.Errorf("given were %s\nthe catalogue has %s", got, strings.Join(want, " "))
	}
	// What was sent is in the log, also where it could not be read to the end.
	for _, code := range []string{"invalid_value", "key_change", "not_subscribed", "unknown_table", "source_trigger"} {
		if r := o.rejects("--reason " + code); len(r) == 0 || r[0].Sent == nil {
			t.Errorf("%s: %+v", code, r)
		}
	}
}

// TestReasonCatalogue: the codes of the protocol, the database's check and the two pages of documentation are the same.
func TestReasonCatalogue(t *testing.T) {
	mirror := pgtest.Mirror(t)
	if err := schema.MigrateMirror(t.Context(), mirror); err != nil {
		t.Fatal(err)
	}
	conn, err := schema.Connect(t.Context(), mirror, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	var check string
	if err := conn.QueryRow(t.Context(), `SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'waystage.change'::regclass AND conname = 'change_code_check'`).Scan(&check); err != nil {
		t.Fatal(err)
	}
	var taken, want []string
	for _, m := range regexp.MustCompile(`'([a-z_]+)'::text`).FindAllStringSubmatch(check, -1) {
		taken = append(taken, m[1])
	}
	page, err := os.ReadFile(filepath.Join("..", "docs", "rejects.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range protocol.RecordCodes() {
		want = append(want, string(c))
		if !strings.Contains(string(page), "| `"+string(c)+"` |") {
			t.Errorf("docs/rejects.md does not say what to do about %s", c)
		}
	}
	slices.Sort(taken)
	slices.Sort(want)
	if !slices.Equal(taken, want) {
		t.Errorf("the database takes %q, the catalogue has %q", taken, want)
	}
	// Every code that the sources name for records is in it.
	for _, file := range []string{"../protocol/code.go", "../apply/refuse.go", "../conflict/conflict.go", "../conflict/policy.go"} {
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := string(src)
		if strings.Contains(file, "protocol") { // whole requests come first; what a device says by itself is not the server's
			text = text[strings.Index(text, "// Rejections of one record"):]
		}
		for _, m := range regexp.MustCompile(`(?:Code|Reason|refused\w+)\s+= "([a-z_]+)"`).FindAllStringSubmatch(text, -1) {
			if !slices.Contains(want, m[1]) && m[1] != string(protocol.CodeSchema) {
				t.Errorf("%s has %s, which is not in the catalogue", file, m[1])
			}
		}
	}
	src, err := os.ReadFile("../stages/operator.go")
	if err != nil {
		t.Fatal(err)
	}
	problems := regexp.MustCompile(`Problem = "([a-z_]+)"`).FindAllStringSubmatch(string(src), -1)
	for _, m := range problems {
		if !strings.Contains(string(page), "| `"+m[1]+"` |") {
			t.Errorf("docs/rejects.md does not explain %s", m[1])
		}
	}
	if len(problems) < 10 {
		t.Errorf("only %d problems found", len(problems))
	}
}

// TestRejectWatch: each record is told once, whatever order transactions commit in and however often the connection breaks.
func TestRejectWatch(t *testing.T) {
	mirror := pgtest.Mirror(t)
	if err := schema.MigrateMirror(t.Context(), mirror); err != nil {
		t.Fatal(err)
	}
	open := func(name string) *pgxpool.Pool {
		c, err := schema.Config(mirror, name)
		if err != nil {
			t.Fatal(err)
		}
		c.MaxConns = 8
		p, err := pgxpool.NewWithConfig(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Close)
		return p
	}
	db, watched := open("test"), open("watch")
	write := func(tx pgx.Tx, n, table int) {
		_, err := tx.Exec(t.Context(), `INSERT INTO waystage.change (session_id, idx, device_id, incarnation, n, tbl, tname, op, key, state, stamp, code, decided_at)
			VALUES ($1, 0, 1, 'i', 1, 1, CASE $2::int WHEN 0 THEN 'public.job' ELSE 'public.other' END, 'I', '{1}', 'rejected', pg_current_xact_id()::text::bigint, 'row_exists', clock_timestamp())`, n, table)
		if err != nil {
			t.Error(err)
		}
	}
	one := func(n int) {
		tx, err := db.Begin(t.Context())
		if err != nil {
			t.Error(err)
			return
		}
		write(tx, n, n%2)
		time.Sleep(time.Duration(n*7919%60) * time.Millisecond) // so that they overtake one another
		if err := tx.Commit(t.Context()); err != nil {
			t.Error(err)
		}
	}
	one(1)
	one(2)
	const total = 300
	seen := map[string]map[int64]int{}
	var mu sync.Mutex
	var watchers sync.WaitGroup
	watch := func(name string, f rejectFilter, want int) {
		f.status = "all"
		mu.Lock()
		seen[name] = map[int64]int{}
		mu.Unlock()
		begun := make(chan struct{})
		watchers.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
			defer cancel()
			w := &rejectWatch{filter: f}
			if f.since == "" { // it begins before the others write
				if _, err := w.look(ctx, watched); err != nil {
					t.Error(err)
				}
			}
			close(begun)
			err := w.run(ctx, watched, func(string, ...any) {}, func(r reject) (bool, error) {
				mu.Lock()
				defer mu.Unlock()
				seen[name][r.ID]++
				return len(seen[name]) == want, nil
			})
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		<-begun
	}
	watch("all", rejectFilter{since: "1h"}, total)
	watch("new", rejectFilter{}, total-2)
	watch("table", rejectFilter{since: "1h", table: "job"}, total/2)
	var writers sync.WaitGroup
	for w := range 6 {
		writers.Go(func() {
			for n := 3 + w; n <= total; n += 6 {
				one(n)
			}
		})
	}
	done := make(chan struct{})
	go func() { watchers.Wait(); close(done) }()
	for cut := 0; ; cut++ {
		select {
		case <-done:
		case <-time.After(150 * time.Millisecond):
			if cut < 15 {
				if _, err := db.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'watch' AND datname = current_database()`); err != nil {
					t.Error(err)
				}
			}
			continue
		}
		break
	}
	writers.Wait()
	for name, of := range seen {
		for id, n := range of {
			if n != 1 {
				t.Errorf("%s: record %d was told %d times", name, id, n)
			}
		}
	}
	if len(seen["all"]) != total || len(seen["new"]) != total-2 || len(seen["table"]) != total/2 {
		t.Errorf("%d, %d, %d", len(seen["all"]), len(seen["new"]), len(seen["table"]))
	}
}

func TestLoginName(t *testing.T) {
	for login, want := range map[string]string{"olga": "olga", `CORP\Olga.K`: "olga-k", "": "unknown", strings.Repeat("x", 99): strings.Repeat("x", 64)} {
		if got := loginName(login); got != want || !protocol.ValidName(got) {
			t.Errorf("%q: %q", login, got)
		}
	}
}
