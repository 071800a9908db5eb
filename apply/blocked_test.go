package apply_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/waystage/waystage/apply"
)

// gauge reads one of up's figures.
func (r *rig) gauge(name string) (v float64) {
	r.t.Helper()
	ch := make(chan prometheus.Metric, 100)
	for _, c := range r.workers["up"].obj.(*apply.Up).Metrics() {
		c.Collect(ch)
	}
	close(ch)
	for m := range ch {
		var d dto.Metric
		if strings.Contains(m.Desc().String(), `"waystage_apply_`+name+`"`) && m.Write(&d) == nil {
			v = d.GetGauge().GetValue() + d.GetCounter().GetValue()
		}
	}
	return v
}

// Somebody holds a row at the source for longer than any timeout. Up says which row and who, goes on when it is free, and nothing
// is lost or out of order.
func TestLockedRowIsWaitedForAndNamed(t *testing.T) {
	r := newRig(t, notes, "public.note")
	r.start(allWorkers...)
	holder := r.connect(r.sourceDSN)
	r.exec(holder, "SET application_name = 'the office'", "BEGIN", "SELECT FROM public.note WHERE id = 3 FOR UPDATE")
	var ids []int64
	for i := range 5 {
		ids = append(ids, r.merge(upd("public.note", fmt.Sprint(i+1), map[string]any{"body": "mine"}))...)
	}
	up := r.workers["up"].obj.(*apply.Up)
	var b *apply.Blocked // it is looked at again and again, also while up rests between two attempts
	r.eventually("up says what it waits for", func() bool { b = up.Stats().Blocked; return b != nil && b.Table != "" && b.Key != nil })
	pid := fmt.Sprintf("pid %d ", holder.PgConn().PID())
	if b.Table != "public.note" || fmt.Sprint(b.Key) != "[3]" || len(b.By) != 1 || !strings.HasPrefix(b.By[0], pid) || !strings.Contains(b.By[0], "the office, idle in transaction") {
		t.Errorf("blocked: %+v", b)
	}
	if r.gauge("blocked_seconds") <= 0 {
		t.Error("the gauge says that nothing is in the way")
	}
	told := "SELECT coalesce(max(code || ' ' || detail), '') FROM waystage.trouble WHERE part = 'apply-up'"
	r.eventually("the mirror knows", func() bool {
		got := r.text(r.mirror, told)
		return strings.HasPrefix(got, "row_locked waits since ") && strings.Contains(got, "public.note (3)") && strings.Contains(got, pid)
	})
	r.eventually("it has been tried again", func() bool { return up.Stats().LockRetries > 1 })
	r.exec(holder, "COMMIT")
	r.settled()
	for _, id := range ids {
		r.wantVerdict(id, "applied")
	}
	r.eventually("nothing is in the way", func() bool { return up.Stats().Blocked == nil && r.text(r.mirror, told) == "" })
}

// A deadlock that PostgreSQL ends by failing our transaction is no refusal: the whole transaction is repeated.
func TestDeadlockIsRepeated(t *testing.T) {
	r := newRig(t, notes+`; CREATE FUNCTION unlucky() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF NEW.body LIKE 'fail %' AND nextval('luck') < 5 THEN RAISE EXCEPTION 'bad luck' USING ERRCODE = substr(NEW.body, 6); END IF; RETURN NEW; END $$;
		CREATE SEQUENCE luck; CREATE TRIGGER unlucky BEFORE UPDATE ON note FOR EACH ROW EXECUTE FUNCTION unlucky()`, "public.note")
	r.start(allWorkers...)
	var ids []int64
	for i, code := range []string{"40P01", "40001", "55P03"} {
		ids = append(ids, r.merge(upd("public.note", fmt.Sprint(i+1), map[string]any{"body": "fail " + code}), upd("public.note", fmt.Sprint(i+5), map[string]any{"body": "beside"}))...)
	}
	// A real one: we hold what the other wants and want what it holds.
	holder := r.connect(r.sourceDSN)
	r.exec(holder, "SET deadlock_timeout = '10min'", "BEGIN", "SELECT FROM public.note WHERE id = 10 FOR UPDATE")
	ids = append(ids, r.merge(upd("public.note", "9", map[string]any{"body": "a"}), upd("public.note", "10", map[string]any{"body": "b"}))...)
	up := r.workers["up"].obj.(*apply.Up)
	r.eventually("up waits for the row", func() bool { return up.Stats().Blocked != nil })
	r.exec(holder, "SET lock_timeout = '1min'", "SELECT FROM public.note WHERE id = 9 FOR UPDATE", "COMMIT")
	r.settled()
	for _, id := range ids {
		r.wantVerdict(id, "applied")
	}
	if up.Stats().LockRetries < 4 {
		t.Errorf("%d repetitions", up.Stats().LockRetries)
	}
	if got := r.text(r.mirror, "SELECT count(*)::text FROM waystage.change WHERE state = 'refused'"); got != "0" {
		t.Errorf("%s refused", got)
	}
}
