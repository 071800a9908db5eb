package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/waystage/waystage/cmd"
	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/hours"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/internal/registry"
)

// broken is a transport whose connection breaks before the next page, while armed.
type broken struct {
	device.Transport
	armed *bool
}

func (c *broken) Get(ctx context.Context, session string, page int) (device.Payload, error) {
	if *c.armed {
		return device.Payload{}, errCut
	}
	return c.Transport.Get(ctx, session, page)
}

// TestServersWord: which set goes first, when a set may be synced, and how fast, is the server's to say; it changes while devices are out.
func TestServersWord(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 2, Patients: 20, Records: 1})
	now := time.Now().UTC()
	minute := now.Hour()*60 + now.Minute()
	span := func(from, to int) string {
		return hours.Span{From: (minute + from + 1440) % 1440, To: (minute + to + 1440) % 1440}.String()
	}
	closed, open := span(180, 240), span(-120, 120) // from three hours on; since two hours ago
	definitions := func(patients, medications string) string {
		return `version: 1
subscriptions:
  patients: {table: vn.patient, columns: [id, name, remarks], allow: [update]}
  medications: {table: vn.medication, direction: download-only}
sets:
  catalogue: {subscriptions: [medications]` + medications + `}
  patients: {subscriptions: [patients], priority: 10` + patients + `}
groups:
  nurses: {sets: [catalogue, patients]}
`
	}
	between := func(s string) string { return fmt.Sprintf(", between: [%q], zone: UTC", s) }
	n := 0
	apply := func(body string) {
		t.Helper()
		n++
		file := filepath.Join(w.dir, fmt.Sprintf("version-%d.yaml", n))
		w.must(os.WriteFile(file, []byte(body), 0o600))
		if code := cmd.Main([]string{"subscriptions", "apply", "--yes", file, "-c", w.configFile()}, cmd.System()); code != 0 {
			t.Fatalf("apply: exit code %d for\n%s", code, body)
		}
	}
	w.config.Limits.Page = 16 << 10
	w.must(os.WriteFile(w.config.Definitions, []byte(definitions("", between(closed))), 0o600))
	w.serve(t)
	w.addUsers(1)
	d := w.enrol(w.nurses[0], "phone")
	sets := func(r device.Report) (names []string) {
		for _, s := range r.Sets {
			if s.ClosedUntil.IsZero() {
				names = append(names, s.Set)
			} else {
				names = append(names, s.Set+" closed")
			}
		}
		return slices.Compact(names)
	}

	// The set of the higher priority first; the other one is closed, and costs the next sync nothing.
	rep := w.sync(d, "merge")
	if got := sets(rep); !slices.Equal(got, []string{"patients", "catalogue closed"}) {
		t.Fatalf("synced %v", got)
	}
	until := rep.Sets[len(rep.Sets)-1].ClosedUntil
	if d := time.Until(until); d < 2*time.Hour || d > 3*time.Hour {
		t.Errorf("closed until %s, in %s", until, d)
	}
	rep = w.sync(d, "merge")
	if i := slices.IndexFunc(rep.Sets, func(s device.SetReport) bool { return s.Set == "catalogue" }); i < 0 || rep.Sets[i].Session != "" || !rep.Sets[i].ClosedUntil.Equal(until) {
		t.Errorf("%+v: want no session of the closed set", rep.Sets)
	}
	if st, err := d.Status(w.ctx); err != nil || !slices.ContainsFunc(st.Sets, func(s device.SetStatus) bool { return s.Name == "catalogue" && s.Closed.Equal(until) }) {
		t.Errorf("%v: status %+v", err, st.Sets)
	}
	// One that is named is asked for all the same, and the server still says no.
	if rep, err := d.Sync(w.ctx, device.SyncOptions{Sets: []string{"catalogue"}}); err != nil || !slices.Equal(sets(rep), []string{"catalogue closed"}) || rep.Sets[0].Session == "" {
		t.Errorf("%v: %+v", err, rep.Sets)
	}

	// A watching device hears that the set was opened.
	type heard struct {
		wake device.Wake
		err  error
	}
	news := make(chan heard, 1)
	go func() {
		ctx, cancel := context.WithTimeout(w.ctx, patience)
		defer cancel()
		wake, err := d.Await(ctx)
		news <- heard{wake, err}
	}()
	apply(definitions(between(closed), between(open)))
	if h := <-news; h.err != nil || !slices.Contains(h.wake.Sets, "catalogue") {
		t.Fatalf("heard %+v", h)
	}
	// Now the patients are closed: edits wait and are not lost.
	w.exec(d, `UPDATE patient SET remarks = 'waits' WHERE id = (SELECT min(id) FROM patient)`)
	rep = w.sync(d, "merge")
	if got := sets(rep); !slices.Equal(got, []string{"patients closed", "catalogue"}) || rep.Sent != 0 {
		t.Fatalf("synced %v, sent %d", got, rep.Sent)
	}
	if got := w.text(d, `SELECT count(*) > 0 FROM medication`); got != "1" {
		t.Error("the opened set brought no rows")
	}
	if st, err := d.Status(w.ctx); err != nil || st.Unsent != 1 || st.Unfinished {
		t.Fatalf("%v: %+v", err, st)
	}
	if edits, err := d.Pending(w.ctx); err != nil || len(edits) != 1 || edits[0].State != device.Unsent {
		t.Fatalf("%v: %+v", err, edits)
	}

	// A session that was taken before its set was closed is answered.
	armed := true
	w.must(d.Close())
	d, err := device.Open(w.ctx, filepath.Join(w.dir, w.nurses[0].Login+"-phone.db"), device.Options{App: "e2e", Dial: func(ctx context.Context, l device.Login) (device.Transport, error) {
		tr, err := device.DialNATS(ctx, l)
		return &broken{tr, &armed}, err
	}})
	w.must(err)
	defer func() { _ = d.Close() }()
	apply(definitions("", between(open)))
	if _, err := d.Sync(w.ctx, device.SyncOptions{Sets: []string{"patients"}}); !errors.Is(err, errCut) {
		t.Fatalf("the connection broke, and the sync says %v", err)
	}
	w.eventually("the session is not merged", func() error {
		var n int
		if err := w.mirror.QueryRow(w.ctx, `SELECT count(*) FROM vn.patient WHERE remarks = 'waits'`).Scan(&n); err != nil || n != 1 {
			return fmt.Errorf("%d rows: %w", n, err)
		}
		return nil
	})
	apply(definitions(between(closed), between(open)))
	armed = false
	if rep := w.sync(d, "merge"); !rep.Resumed || rep.Sent != 1 || rep.Merged+rep.Applied == 0 {
		t.Fatalf("%+v: want the session that was under way", rep)
	}

	// So many bytes per second, and no more, from the first call on.
	const perSecond = 16 << 10
	apply(definitions("", "") + "  slow: {sets: [patients], bandwidth: 16KiB}\n")
	w.must(registry.New(w.mirror, nil).AddUser(w.ctx, w.nurses[1].Login, password, "slow"))
	_, err = w.source.Exec(w.ctx, `UPDATE vn.patient SET remarks = (SELECT string_agg(md5(random()::text || g || id), '') FROM generate_series(1, 200) g)`)
	w.must(err)
	w.eventually("the mirror does not have it", func() error {
		var n int
		if err := w.mirror.QueryRow(w.ctx, `SELECT count(*) FROM vn.patient WHERE length(remarks) = 6400`).Scan(&n); err != nil || n != 20 {
			return fmt.Errorf("%d rows: %w", n, err)
		}
		return nil
	})
	slow := w.enrol(w.nurses[1], "phone")
	began := time.Now()
	rep = w.sync(slow, "merge")
	bytes := rep.BytesDown + rep.BytesUp
	took, least := time.Since(began), time.Duration(float64(bytes-3*perSecond)/perSecond*float64(time.Second)) // a second's worth and a page are free
	if rep.Rows != 20 || bytes < 4*perSecond || took < least {
		t.Errorf("%d rows, %d bytes took %s: want %s at least", rep.Rows, bytes, took, least)
	}
}
