package stages

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// follower makes the rig's stages go by what the mirror has in force.
func (r *rig) follower() {
	r.t.Helper()
	r.exec(`INSERT INTO waystage.meta (key, value) VALUES ('epoch', 'e1') ON CONFLICT (key) DO UPDATE SET value = 'e1'`)
	r.enforce(definitions)
	r.follow = NewFollower(r.db, nil)
	r.stages()
}

// enforce puts definitions in force as schema.Apply does in the end.
func (r *rig) enforce(body string) {
	r.t.Helper()
	r.exec(`WITH moved AS (UPDATE waystage.meta SET value = (value::bigint + 1)::text WHERE key = 'layout' RETURNING value),
			new AS (INSERT INTO waystage.definition (version, body, sha256) SELECT coalesce(max(version), 0) + 1, $2::text, sha256(convert_to($2, 'UTF8'))::text FROM waystage.definition)
		SELECT pg_notify($1, value) FROM moved`, schema.LayoutChannel, body)
}

// TestNewDefinitionsCountAtOnce: whichever stage meets a new version first goes by it, also where nobody has told it; what was staged under the
// version before is judged by the new one, record by record.
func TestNewDefinitionsCountAtOnce(t *testing.T) {
	r := newRig(t)
	r.follower()
	if _, err := r.merge.Batch(r.ctx, r.ctx, noop); err == nil {
		t.Error("a merge without definitions went through")
	}
	if err := r.follow.Load(r.ctx); err != nil {
		t.Fatal(err)
	}
	r.exec(`INSERT INTO public.assignment (nurse, patient, _ws_version) SELECT 'amina', i, 1 FROM generate_series(1, 4) i`)
	r.exec(`INSERT INTO public.patient (id, name, weight, doc, _ws_version) SELECT i, 'p' || i, 50 + i, '{}', 1 FROM generate_series(1, 4) i`)
	amina := r.user("amina", "nurses")
	amina.sync("care")
	if got := len(amina.set("care").rows["public.patient"]); got != 4 {
		t.Fatalf("%d patients", got)
	}

	// Staged under the first version, merged under the second.
	amina.send(amina.request("care", amina.edit("care", "public.patient", "1", "weight", "80"), change("public.visit", "", nil, row("id", "v1", "patient", "2", "at", nil, "note", "x")),
		amina.edit("care", "public.patient", "2", "name", "new")))
	if _, err := r.intake.Batch(r.ctx, r.ctx, noop); err != nil {
		t.Fatal(err)
	}
	narrow := strings.Replace(definitions, "[id, name, weight, active, mood, doc, pic, tags]", "[id, name, active, mood, pic, tags]", 1)
	narrow = strings.Replace(narrow, "where nurse = :user\n  visits", "where nurse = :user and patient < 4\n  visits", 1)
	r.enforce(narrow)
	r.pump()
	pages := amina.pages()
	verdicts := map[int]protocol.Verdict{}
	for _, p := range pages {
		for _, v := range p.Verdicts {
			verdicts[v.Index] = v
		}
		for _, tab := range p.Tables {
			if tab.Table == "public.patient" && (strings.Contains(strings.Join(tab.Columns, ","), "weight") || len(tab.Rows) != 3) {
				t.Errorf("%d rows with the columns %v came", len(tab.Rows), tab.Columns)
			}
		}
	}
	if v := verdicts[0]; v.State != protocol.Rejected || v.Code != protocol.CodeUnknownColumn {
		t.Errorf("an edit of a column that is gone: %+v", v)
	}
	for i := 1; i <= 2; i++ {
		if v := verdicts[i]; v.State != protocol.Merged {
			t.Errorf("record %d, which does not touch such a column: %+v", i, v)
		}
	}
	r.want("{active,id,mood,name,pic,tags} {name}", `SELECT ARRAY(SELECT jsonb_object_keys(base) ORDER BY 1)::text || ' ' || ARRAY(SELECT jsonb_object_keys(img))::text
		FROM waystage.change WHERE tname = 'public.patient' AND state = 'merged'`)
	if pages[0].Schema == nil || !pages[0].Refresh {
		t.Error("the device is not told the table as it is now")
	}

	// Its set goes while the session is on its way: it has its verdicts, and is told that the set is gone.
	amina.apply(pages)
	amina.send(amina.request("care", change("public.visit", "", nil, row("id", "v2", "patient", "2", "at", nil, "note", "x"))))
	if _, err := r.intake.Batch(r.ctx, r.ctx, noop); err != nil {
		t.Fatal(err)
	}
	r.enforce(strings.Replace(definitions, "nurses: {sets: [care, base]}", "nurses: {sets: [base]}", 1))
	r.pump()
	pages = amina.pages()
	if e := pages[0].Error; e != nil || len(pages) != 1 || len(pages[0].Verdicts) == 0 || len(pages[0].Tables) != 0 || !pages[0].Refresh || len(pages[0].Sets) != 1 {
		t.Errorf("%+v, %v", pages[0], e)
	}
	amina.apply(pages)
	amina.send(amina.request("care"))
	r.pump()
	if e := amina.pages()[0].Error; e == nil || e.Code != protocol.CodeUnknownSet {
		t.Errorf("%v", e)
	}
	if sets, epoch, err := r.follow.SetsOf(r.ctx, "amina"); err != nil || len(sets) != 1 || sets[0] != "base" || epoch != "e1" {
		t.Errorf("%v, %s, %v", sets, epoch, err)
	}
}

// TestUnusableDefinitionsStopAProcess: a process that cannot read what is in force neither merges nor replies, loses nothing, says so, and goes
// on by itself when it can.
func TestUnusableDefinitionsStopAProcess(t *testing.T) {
	r := newRig(t)
	r.follower()
	if err := r.follow.Load(r.ctx); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	ctx, stop := context.WithCancel(r.ctx)
	defer stop()
	go func() { ended <- r.follow.Follow(ctx) }()
	ben := r.user("ben", "clerks")
	ben.sync("base")
	r.enforce("version: 2\n")
	within(t, "it is known that the version cannot be used", func() bool { return r.follow.Err() != nil })
	ben.send(ben.request("base", change("public.measure", "", nil, row("id", "7", "flag", "t"))))
	failed := 0
	within(t, "a request fails more often than what makes it a dead letter", func() bool {
		n, err := r.intake.Batch(r.ctx, r.ctx, noop)
		if n > 0 || r.ctx.Err() != nil {
			t.Fatal("a request was taken", r.ctx.Err())
		}
		if err != nil {
			failed++
		}
		return failed > 6
	})
	if len(r.q.dead) > 0 {
		t.Errorf("dead letters: %v", r.q.dead)
	}
	r.want("0", "SELECT count(*) FROM waystage.session WHERE state <> 'replied'")
	if r.follow.Now() == nil {
		t.Error("the catalog before is forgotten")
	}
	r.enforce(definitions)
	within(t, "the next version is taken over", func() bool { return r.follow.Err() == nil })
	r.pump()
	if v := ben.receive(); v[0].State != protocol.Merged {
		t.Errorf("%+v", v)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// within waits for a condition.
func within(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not in time: " + what)
		}
	}
}
