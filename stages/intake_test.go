package stages

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/waystage/waystage/protocol"
)

// refusal reads the error page of the open session.
func (d *dev) refusal() *protocol.Error {
	d.r.t.Helper()
	p := d.pages()
	if len(p) != 1 || p[0].Error == nil {
		d.r.t.Fatalf("session %s was not refused: %+v", d.token(), p[0])
	}
	return p[0].Error
}

func (d *dev) refused(code protocol.Code) {
	d.r.t.Helper()
	if e := d.refusal(); e.Code != code || len(e.Message) < 10 {
		d.r.t.Fatalf("refused with %s (%s), want %s", e.Code, e.Message, code)
	}
}

func (r *rig) nothingStaged() {
	r.t.Helper()
	if n := r.q.waiting(); n > 0 {
		r.t.Fatalf("%d parts are left in the queue", n)
	}
	r.want("0", `SELECT count(*) FROM waystage.staging`)
}

// testRefusedRequests: bad requests in one batch with a good one are answered alone.
func testRefusedRequests(t *testing.T, r *rig) {
	good := r.user("good", "nurses")
	type bad struct {
		d    *dev
		code protocol.Code
	}
	var list []bad
	add := func(name string, code protocol.Code, send func(d *dev)) {
		d := r.user(name, "nurses")
		send(d)
		list = append(list, bad{d, code})
	}
	raw := func(d *dev, contentType, encoding string, body []byte) {
		d.contentType = contentType
		r.q.put(d.user, d.name, d.token(), 1, 1, contentType, encoding, body)
	}
	add("empty", protocol.CodeMalformed, func(d *dev) { d.request("care"); raw(d, protocol.ContentCBOR, "", nil) })
	add("random", protocol.CodeMalformed, func(d *dev) { d.request("care"); raw(d, protocol.ContentCBOR, "", []byte{0xff, 1, 2, 3}) })
	add("truncated", protocol.CodeMalformed, func(d *dev) {
		body := d.encode(d.request("care"))
		raw(d, protocol.ContentCBOR, "", body[:len(body)-3])
	})
	add("trailing", protocol.CodeMalformed, func(d *dev) { raw(d, protocol.ContentCBOR, "", append(d.encode(d.request("care")), 0)) })
	add("json", protocol.CodeMalformed, func(d *dev) { d.request("care"); raw(d, protocol.ContentJSON, "", []byte(`{"v":1,"v":1}`)) })
	add("field", protocol.CodeMalformed, func(d *dev) { d.request("care"); raw(d, protocol.ContentJSON, "", []byte(`{"v":1,"x":1}`)) })
	add("version", protocol.CodeVersion, func(d *dev) { req := d.request("care"); req.V = 999; d.send(req) })
	add("type", protocol.CodeContentType, func(d *dev) { d.request("care"); raw(d, "text/plain", "", []byte("hello")) })
	add("coding", protocol.CodeContentType, func(d *dev) { raw(d, protocol.ContentCBOR, "br", d.encode(d.request("care"))) })
	add("bomb", protocol.CodeTooBig, func(d *dev) {
		d.request("care")
		body, err := protocol.Compress(make([]byte, 80<<20), protocol.Gzip)
		if err != nil {
			t.Fatal(err)
		}
		raw(d, protocol.ContentCBOR, protocol.Gzip, body)
	})
	add("token", protocol.CodeMalformed, func(d *dev) {
		body := d.encode(d.request("care"))
		d.n++
		d.last = &protocol.Request{Incarnation: d.inc, N: 2}
		raw(d, protocol.ContentCBOR, "", body)
	})
	add("nul", protocol.CodeMalformed, func(d *dev) { req := d.request("care"); req.App = "a\x00b"; d.send(req) })
	add("set", protocol.CodeUnknownSet, func(d *dev) { d.send(d.request("cure")) })
	add("setname", protocol.CodeName, func(d *dev) { d.send(d.request("ca*re")) })
	add("epoch", protocol.CodeEpoch, func(d *dev) { req := d.request("care"); req.Epoch = "e0"; d.send(req) })
	add("late", protocol.CodeForked, func(d *dev) { d.n = 6; d.send(d.request("care")) })
	add("blocked", protocol.CodeBlocked, func(d *dev) {
		r.exec(`UPDATE waystage.app_user SET blocked = true WHERE name = 'blocked'`)
		d.send(d.request("care"))
	})
	add("gone", protocol.CodeBlocked, func(d *dev) { r.exec(`DELETE FROM waystage.app_user WHERE name = 'gone'`); d.send(d.request("care")) })
	clerk := r.user("clerk", "clerks")
	clerk.send(clerk.request("care"))
	good.send(good.request("care"))
	r.pump()
	good.receive()
	for _, b := range list {
		b.d.refused(b.code)
	}
	clerk.refused(protocol.CodeUnknownSet)
	if sets := clerk.pages()[0].Sets; !slices.Equal(sets, []string{"base"}) {
		t.Fatalf("sets told: %v", sets)
	}
	r.nothingStaged()
	r.want("1", `SELECT count(*) FROM waystage.session`)
	r.want("1", `SELECT count(*) FROM waystage.incarnation`)
}

func testJSONAndCompression(t *testing.T, r *rig) {
	r.exec(`INSERT INTO public.region SELECT g, 'region ' || g FROM generate_series(1, 50) g`)
	for _, enc := range []string{protocol.Identity, protocol.Gzip, protocol.Zstd} {
		for _, ct := range []string{protocol.ContentJSON, protocol.ContentCBOR} {
			d := r.user("u"+enc+ct[len("application/"):], "clerks")
			d.contentType, d.enc = ct, enc
			d.sync("base")
			d.want("region 7", "base", "public.region", "7", "name")
			m, _ := r.q.get(d.user, d.name, d.token(), 1)
			if m.contentType != ct || m.encoding != enc {
				t.Fatalf("asked in %q %q, answered in %q %q", ct, enc, m.contentType, m.encoding)
			}
		}
	}
	c := r.user("c", "clerks")
	c.contentType = "application/json; charset=utf-8"
	body, err := protocol.Encode(c.request("base"), protocol.ContentJSON)
	if err != nil {
		t.Fatal(err)
	}
	r.q.put(c.user, c.name, c.token(), 1, 1, c.contentType, "", body)
	r.pump()
	c.receive()
}

// testLedger goes through rule D4.
func testLedger(t *testing.T, r *rig) {
	amy, tab, _ := shared(r)
	req := amy.request("care", amy.edit("care", patients, "1", "name", "once"))
	amy.send(req)
	amy.send(req) // twice in one batch
	r.pump()
	first := amy.pages()
	amy.send(req) // again, later
	r.pump()
	r.want("1", `SELECT count(*) FROM waystage.change`)
	if again := amy.pages(); again[0].Reply != first[0].Reply {
		t.Fatal("a reply that was there was composed again")
	}
	amy.verdict(amy.receive(), "merged")
	// The reply is lost: it is composed again, with the same verdicts.
	r.q.purge()
	amy.send(req)
	r.pump()
	amy.verdict(amy.receive(), "merged")
	r.want("1", `SELECT count(*) FROM waystage.change`)
	amy.set("care").cursor = amy.pages()[0].Cursor

	// Other bytes under the same number, an older number, a gap: a restored or cloned device.
	twin := *amy
	twin.n--
	twin.send(twin.request("care", twin.edit("care", patients, "2", "name", "clone")))
	r.pump()
	twin.refused(protocol.CodeForked)
	r.want("bob", `SELECT name FROM public.patient WHERE id = 2`)
	// The clone's answer took the place of the reply; the device that asks again gets its own.
	amy.send(req)
	r.pump()
	amy.verdict(amy.receive(), "merged")
	for _, n := range []int64{0, 5} {
		old := *amy
		old.n = n
		old.send(old.request("care"))
		r.pump()
		old.refused(protocol.CodeForked)
	}
	// An incarnation that another device brings along.
	copied := *tab
	copied.inc, copied.n = amy.inc, amy.n
	copied.send(copied.request("care"))
	r.pump()
	copied.refused(protocol.CodeForked)
	// A new incarnation goes on.
	amy.inc, amy.n, amy.epoch, amy.sets = randomID()+randomID(), 0, "", map[string]*devSet{}
	amy.sync("care")
	amy.want("once", "care", patients, "1", "name")
	r.nothingStaged()
}

func cut(body []byte, k int) [][]byte {
	var out [][]byte
	for i := range k {
		out = append(out, body[i*len(body)/k:(i+1)*len(body)/k])
	}
	return out
}

func testSeries(t *testing.T, r *rig) {
	amy, tab, ben := shared(r)
	put := func(d *dev, i, k int, part []byte) {
		r.q.put(d.user, d.name, d.token(), i, k, d.contentType, d.enc, part)
	}
	eventually := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
			r.pump()
			if time.Now().After(end) {
				t.Fatalf("%s did not come about", what)
			}
		}
	}
	replied := func(d *dev) func() bool {
		return func() bool { _, ok := r.q.get(d.user, d.name, d.token(), 1); return ok }
	}
	// In any order, between other requests, with a part that comes twice.
	parts := cut(amy.encode(amy.request("care", amy.edit("care", patients, "1", "name", "cut"))), 4)
	put(amy, 3, 4, parts[2])
	r.pump()
	put(amy, 1, 4, parts[0])
	put(amy, 1, 4, parts[0])
	ben.sync("care")
	put(amy, 4, 4, parts[3])
	r.pump()
	if replied(amy)() {
		t.Fatal("a request was taken that is not complete")
	}
	put(amy, 2, 4, parts[1])
	eventually("the reply", replied(amy))
	amy.verdict(amy.receive(), "merged")
	eventually("an empty queue", func() bool { return r.q.waiting() == 0 })
	r.want("1", `SELECT count(*) FROM waystage.change`)

	// Parts that come again after the session was staged are dropped.
	put(amy, 2, 4, parts[1])
	r.q.parts[0].ReceivedAt = time.Now().Add(-time.Minute)
	eventually("an empty queue", func() bool { return r.q.waiting() == 0 })

	// Whole again: a redelivery.
	for i, p := range parts {
		put(amy, i+1, 4, p)
	}
	eventually("an empty queue", func() bool { return r.q.waiting() == 0 })
	r.want("1", `SELECT count(*) FROM waystage.change`)
	amy.receive()

	// Doubled with other contents, or contradictory in the number of parts.
	body := tab.encode(tab.request("care"))
	parts = cut(body, 3)
	put(tab, 1, 3, parts[0])
	put(tab, 1, 3, []byte("other"))
	put(tab, 2, 3, parts[1])
	put(tab, 3, 3, parts[2])
	r.pump()
	tab.refused(protocol.CodeSeries)
	eventually("an empty queue", func() bool { return r.q.waiting() == 0 })
	put(tab, 1, 3, parts[0])
	put(tab, 2, 2, parts[1])
	r.pump()
	tab.refused(protocol.CodeSeries)
	put(tab, 1, 1, body)
	eventually("the reply", func() bool { return tab.pages()[0].Error == nil })
	tab.receive()

	// A part is missing for too long.
	parts = cut(ben.encode(ben.request("care")), 3)
	for _, i := range []int{1, 3} {
		r.q.putAt(time.Now().Add(-2*time.Minute), ben.user, ben.name, ben.token(), i, 3, ben.contentType, ben.enc, parts[i-1])
	}
	eventually("the refusal", replied(ben))
	ben.refused(protocol.CodeSeries)
	if !strings.Contains(ben.refusal().Message, "part 2 of 3") {
		t.Fatal(ben.refusal().Message)
	}
	r.nothingStaged()

	// Larger than allowed, which shows only when the parts are together.
	r.intake.cfg.Limits.Encoded = 100
	parts = cut(bytes.Repeat([]byte{1}, 120), 2)
	ben.n--
	ben.request("care")
	put(ben, 1, 2, parts[0])
	put(ben, 2, 2, parts[1])
	r.pump()
	ben.refused(protocol.CodeTooBig)
}

// testPoison: a request that fails in a way that nobody foresaw ends as a dead letter and stops no other.
func testPoison(t *testing.T, r *rig) {
	amy, tab, _ := shared(r)
	r.exec(`CREATE FUNCTION public.trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.note = 'trap' THEN RAISE 'trapped'; END IF; RETURN NEW; END $$;
		ALTER TABLE waystage.session ADD COLUMN note text GENERATED ALWAYS AS (CASE WHEN schema_hash = 'trap' THEN 'trap' END) STORED;
		CREATE TRIGGER trap AFTER INSERT ON waystage.session FOR EACH ROW EXECUTE FUNCTION public.trap()`)
	defer r.exec(`DROP TRIGGER trap ON waystage.session; DROP FUNCTION public.trap(); ALTER TABLE waystage.session DROP COLUMN note`)
	req := amy.request("care")
	req.Schema = "trap"
	amy.send(req)
	tab.send(tab.request("care"))
	failures := 0
	for end := time.Now().Add(30 * time.Second); r.q.waiting() > 0; time.Sleep(time.Millisecond) {
		if _, err := r.intake.Batch(r.ctx, r.ctx, noop); err != nil {
			failures++
		}
		if time.Now().After(end) {
			t.Fatal("the poison stays in the queue")
		}
	}
	r.pump()
	tab.receive()
	amy.refused(protocol.CodeInternal)
	if len(r.q.dead) != 1 || !strings.Contains(r.q.dead[0], "trapped") || failures != 4 {
		t.Fatalf("%d failures, dead letters: %v", failures, r.q.dead)
	}
	r.nothingStaged()
}
