package cmd

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/protocol"
)

// The steps of the demonstration that a person follows. Each does something by ordinary SQL, on a device's SQLite file or at the
// source, and then looks whether what it said has happened; if not, it fails, and the demonstration with it.

// Rows that the steps use. Every fourth patient has two nurses; the first patient's are the first two nurses.
const (
	sharedPatient = nurse.FirstPatient
	newRecord     = "de000000-0000-4000-8000-000000000001"
)

// patience bounds how long a step waits for something to come true; usually it takes a fraction of a second.
const demoPatience = 30 * time.Second

func (d *demo) firstSync(ctx context.Context) error {
	for _, n := range d.nurses {
		began := time.Now()
		report, err := n.dev.Sync(ctx, device.SyncOptions{})
		if err != nil {
			return err
		}
		var want, got int
		if err := d.source.QueryRow(ctx, `SELECT count(*) FROM vn.assignment a JOIN vn.nurse n ON n.id = a.nurse_id WHERE n.login = $1`, n.Login).Scan(&want); err != nil {
			return err
		}
		if err := n.dev.DB().QueryRowContext(ctx, `SELECT count(*) FROM patient`).Scan(&got); err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("%s has %d patients at the source and %d on her device", n.Login, want, got)
		}
		d.fact("%s's device now holds the %d patients assigned to %s, nobody else's, and %s rows in all: %s in %s", n.Name, got, n.Login,
			thousands(report.Rows), human(report.BytesDown), span(time.Since(began)))
	}
	return nil
}

func (d *demo) offlineEdits(ctx context.Context) error {
	amina, bruno := d.nurses[0], d.nurses[1]
	if err := amina.write(ctx, 1, `UPDATE patient SET phone = ?, remarks = ? WHERE id = ?`, "+49 (30) 555-01 77", "Key is with the neighbour.", sharedPatient); err != nil {
		return err
	}
	d.tell("%s types a new telephone number for patient %d: +49 (30) 555-01 77", amina.Name, sharedPatient)
	if err := amina.write(ctx, 1, `INSERT INTO medical_record (id, patient_id, nurse_id, taken, systolic, diastolic, pulse, temperature, weight, note)
		VALUES (?, ?, ?, '2026-09-02 08:15:00+00', 138, 84, 72, '36.7', '63.50', 'Slept well.')`, newRecord, sharedPatient, amina.ID); err != nil {
		return err
	}
	d.tell("%s measures a blood pressure of 138/84 and writes a new medical record", amina.Name)
	visit, err := scanOne(ctx, bruno.dev.DB(), 1, `SELECT id FROM visit WHERE nurse_id = ? AND state = 'planned' ORDER BY planned LIMIT 1`, bruno.ID)
	if err != nil {
		return fmt.Errorf("find a planned visit of %s: %w", bruno.Name, err)
	}
	d.visit = visit[0]
	if err := bruno.write(ctx, 1, `UPDATE visit SET state = 'done', minutes = 25, mileage = '7.4' WHERE id = ?`, d.visit); err != nil {
		return err
	}
	d.tell("%s ticks off a visit: done, 25 minutes", bruno.Name)
	for n, want := range map[*demoNurse]int{amina: 2, bruno: 1} {
		pending, err := n.dev.Pending(ctx)
		if err != nil {
			return err
		}
		if len(pending) != want {
			return fmt.Errorf("%s's device remembers %d edits instead of %d", n.Name, len(pending), want)
		}
	}
	d.fact("no network was used; the devices remember 2 and 1 edits")
	return nil
}

func (d *demo) syncEdits(ctx context.Context) error {
	for i, n := range d.nurses {
		report, err := n.dev.Sync(ctx, device.SyncOptions{Wait: protocol.WaitSource})
		if err != nil {
			return err
		}
		if want := 2 - i; report.Sent != want || report.Rejected != 0 {
			return fmt.Errorf("%s sent %d edits instead of %d, %d were rejected", n.Name, report.Sent, want, report.Rejected)
		}
		if err := d.settle(ctx, n); err != nil {
			return err
		}
	}
	var phone, state, weight string
	var minutes int
	if err := d.source.QueryRow(ctx, `SELECT p.phone, v.state::text, v.minutes, r.weight::text FROM vn.patient p, vn.visit v, vn.medical_record r
		WHERE p.id = $1 AND v.id = $2 AND r.id = $3`, sharedPatient, d.visit, newRecord).Scan(&phone, &state, &minutes, &weight); err != nil {
		return fmt.Errorf("look for the edits at the source: %w", err)
	}
	if phone != "+49305550177" || state != "done" || minutes != 25 || weight != "63.50" {
		return fmt.Errorf("the source has %s, %s, %d minutes, %s kg", phone, state, minutes, weight)
	}
	d.fact("all three edits are in the company's database, and both devices know it")
	err := d.until(ctx, d.nurses[0], "the number in the company's notation", func() (bool, error) {
		row, err := scanOne(ctx, d.nurses[0].dev.DB(), 1, `SELECT phone FROM patient WHERE id = ?`, sharedPatient)
		return err == nil && row[0] == "+49305550177", err
	})
	if err != nil {
		return err
	}
	d.fact("a trigger there brought the number into its usual form, +49305550177, and that came back to %s's device", d.nurses[0].Name)
	return nil
}

func (d *demo) officeEdit(ctx context.Context) error {
	const address = "12 Garden Walk, Harwood"
	if _, err := d.source.Exec(ctx, `UPDATE vn.patient SET address = $1 WHERE id = $2`, address, sharedPatient); err != nil {
		return err
	}
	d.tell("somebody in the office runs: UPDATE vn.patient SET address = '%s' WHERE id = %d", address, sharedPatient)
	for _, n := range d.nurses {
		err := d.until(ctx, n, "the new address", func() (bool, error) {
			row, err := scanOne(ctx, n.dev.DB(), 1, `SELECT address FROM patient WHERE id = ?`, sharedPatient)
			return err == nil && row[0] == address, err
		})
		if err != nil {
			return err
		}
	}
	d.fact("it is on both nurses' devices after their next sync")
	return nil
}

func (d *demo) conflict(ctx context.Context) error {
	amina, bruno := d.nurses[0], d.nurses[1]
	const first, second = "Dizzy after lunch, lay down.", "No complaints."
	for n, note := range map[*demoNurse]string{amina: first, bruno: second} {
		if err := d.until(ctx, n, "the record", func() (bool, error) {
			_, err := scanOne(ctx, n.dev.DB(), 1, `SELECT id FROM medical_record WHERE id = ?`, newRecord)
			return err == nil, ignoreNoRows(err)
		}); err != nil {
			return err
		}
		if err := d.settle(ctx, n); err != nil {
			return err
		}
		if err := n.write(ctx, 1, `UPDATE medical_record SET note = ? WHERE id = ?`, note, newRecord); err != nil {
			return err
		}
	}
	d.tell("both have the same record in hand. %s writes %q, %s writes %q", amina.Name, first, bruno.Name, second)
	report, err := amina.dev.Sync(ctx, device.SyncOptions{Wait: protocol.WaitSource})
	if err != nil {
		return err
	}
	if report.Sent != 1 || report.Rejected != 0 {
		return fmt.Errorf("%s sent %d edits, %d were rejected", amina.Name, report.Sent, report.Rejected)
	}
	d.fact("%s syncs first: accepted", amina.Name)
	before, err := bruno.dev.Rejects(ctx)
	if err != nil {
		return err
	}
	if report, err = bruno.dev.Sync(ctx, device.SyncOptions{}); err != nil {
		return err
	}
	after, err := bruno.dev.Rejects(ctx)
	if err != nil {
		return err
	}
	if report.Rejected != 1 || len(after) != len(before)+1 {
		return fmt.Errorf("%s's edit should be rejected in this sync: %d rejected, %d new entries in the log", bruno.Name, report.Rejected, len(after)-len(before))
	}
	r := after[len(after)-1]
	if r.Code != protocol.CodeStale || text(r.Sent, "note") != second || text(r.Right, "note") != first {
		return fmt.Errorf("the log entry is another one than expected: %s, sent %q, right %q", r.Code, text(r.Sent, "note"), text(r.Right, "note"))
	}
	d.fact("%s syncs second: rejected in this very sync (%s), and nothing of %s's was overwritten", bruno.Name, r.Code, amina.Name)
	d.tell("The log of rejected records on %s's device has both beside each other:", bruno.Name)
	d.tell("    rejected       %s", text(r.Sent, "note"))
	d.tell("    right version  %s", text(r.Right, "note"))
	d.tell("    reason         %s", r.Detail)
	row, err := scanOne(ctx, bruno.dev.DB(), 1, `SELECT note FROM medical_record WHERE id = ?`, newRecord)
	if err != nil {
		return err
	}
	if row[0] != first {
		return fmt.Errorf("%s's record reads %q", bruno.Name, row[0])
	}
	d.fact("his table shows the right version")
	return nil
}

func (d *demo) refusal(ctx context.Context) error {
	amina := d.nurses[0]
	if err := d.settle(ctx, amina); err != nil {
		return err
	}
	if err := amina.write(ctx, 1, `UPDATE medical_record SET pulse = 7 WHERE id = ?`, newRecord); err != nil {
		return err
	}
	d.tell("%s types a pulse of 7 instead of 70. Her device has no such rule, and neither has the mirror", amina.Name)
	before, err := amina.dev.Rejects(ctx)
	if err != nil {
		return err
	}
	report, err := amina.dev.Sync(ctx, device.SyncOptions{Wait: protocol.WaitSource})
	if err != nil {
		return err
	}
	if report.Sent != 1 {
		return fmt.Errorf("%d edits were sent instead of 1", report.Sent)
	}
	if err := d.settle(ctx, amina); err != nil {
		return err
	}
	after, err := amina.dev.Rejects(ctx)
	if err != nil {
		return err
	}
	if len(after) != len(before)+1 {
		return fmt.Errorf("%d new entries in the log of rejected records instead of 1", len(after)-len(before))
	}
	r := after[len(after)-1]
	if r.State != protocol.Refused || r.Constraint != "pulse_possible" || text(r.Sent, "pulse") != "7" {
		return fmt.Errorf("the log entry is another one than expected: %s, constraint %q, sent %q", r.State, r.Constraint, text(r.Sent, "pulse"))
	}
	d.fact("the company's database refuses it, and its own words are in her log:")
	d.tell("    %s", r.Detail)
	return d.until(ctx, amina, "the old pulse", func() (bool, error) {
		row, err := scanOne(ctx, amina.dev.DB(), 1, `SELECT pulse FROM medical_record WHERE id = ?`, newRecord)
		if err == nil && row[0] == "72" {
			d.fact("her record shows 72 again, as the company's database does")
			return true, nil
		}
		return false, err
	})
}

// errPulled is what cancels the sync of [demo.interrupted].
var errPulled = errors.New("the demonstration cancels this sync")

func (d *demo) interrupted(ctx context.Context) error {
	bruno := d.nurses[1]
	if err := d.settle(ctx, bruno); err != nil {
		return err
	}
	const mark = " Checked in September."
	result, err := bruno.dev.DB().ExecContext(ctx, `UPDATE medical_record SET note = coalesce(note, '') || ? WHERE note IS NULL OR note NOT LIKE '%'||?`, mark, mark)
	if err != nil {
		return err
	}
	edits, err := result.RowsAffected()
	if err != nil {
		return err
	}
	d.tell("%s adds a remark to all his %d records and starts a sync", bruno.Name, edits)
	report, err := bruno.syncCancelled(ctx, func(p device.Progress) bool {
		return p.Stage == device.StageUpload && p.Total > 0 && p.Done > 0 && p.Done < p.Total
	})
	if err != nil {
		return err
	}
	d.fact("cancelled in the middle of the upload, after %s", human(report.BytesUp))
	status, err := bruno.dev.Status(ctx)
	if err != nil {
		return err
	}
	if status.Open == "" || int64(status.Sent) != edits {
		return fmt.Errorf("the device should remember an open session with %d edits, not %q with %d", edits, status.Open, status.Sent)
	}
	open := status.Open
	if _, err = bruno.syncCancelled(ctx, func(p device.Progress) bool { return p.Stage == device.StageDownload && p.Done > 0 }); err != nil {
		return err
	}
	if status, err = bruno.dev.Status(ctx); err != nil {
		return err
	}
	if status.Open != open {
		return fmt.Errorf("the session changed from %s to %q", open, status.Open)
	}
	d.fact("started again, and cancelled in the middle of the download: still the same session")
	if report, err = bruno.dev.Sync(ctx, device.SyncOptions{Wait: protocol.WaitSource}); err != nil {
		return err
	}
	if !report.Resumed || len(report.Sets) == 0 || report.Sets[0].Session != open {
		return errors.New("the third sync did not go on with the open session")
	}
	if err := d.settle(ctx, bruno); err != nil {
		return err
	}
	var atSource, twice, ledger int64
	if err := d.source.QueryRow(ctx, `SELECT count(*) FILTER (WHERE note LIKE '%' || $1), count(*) FILTER (WHERE note LIKE '%' || $1 || $1) FROM vn.medical_record`, mark).
		Scan(&atSource, &twice); err != nil {
		return err
	}
	if err := d.mirror.QueryRow(ctx, `SELECT count(*) FROM waystage.change c JOIN waystage.session s ON s.id = c.session_id WHERE s.token = $1 AND c.state = 'applied'`, open).
		Scan(&ledger); err != nil {
		return err
	}
	if atSource != edits || twice != 0 || ledger != edits {
		return fmt.Errorf("of %d edits %d are at the source, %d of them twice; %d were applied by the session", edits, atSource, twice, ledger)
	}
	d.fact("the third time it runs through: all %d edits are at the source exactly once", edits)
	return nil
}

func (d *demo) agreement(ctx context.Context) error {
	var last error
	deadline := time.Now().Add(demoPatience)
	for {
		for _, n := range d.nurses {
			if err := d.settle(ctx, n); err != nil {
				return err
			}
		}
		c, err := d.compare(ctx)
		if err == nil {
			d.fact("source and mirror: %d tables, %s rows, equal in every value", c.tables, thousands(int64(c.rows)))
			d.fact("the two devices: %s rows, exactly what their nurses should have, equal in every value", thousands(int64(c.deviceRows)))
			return nil
		}
		last = err
		// What was just done at the source may still be on its way down.
		if ctx.Err() != nil || time.Now().After(deadline) {
			return fmt.Errorf("they do not agree: %w", last)
		}
		pause(ctx, 200*time.Millisecond)
	}
}

// settle syncs until every edit of the device has its final outcome.
func (d *demo) settle(ctx context.Context, n *demoNurse) error {
	deadline := time.Now().Add(demoPatience)
	for {
		report, err := n.dev.Sync(ctx, device.SyncOptions{Wait: protocol.WaitSource})
		if err != nil {
			return err
		}
		pending, err := n.dev.Pending(ctx)
		if err != nil {
			return err
		}
		if len(pending) == 0 && report.Rows == 0 && report.Deleted == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s's device does not come to rest: %d edits without an outcome", n.Name, len(pending))
		}
		pause(ctx, 50*time.Millisecond)
	}
}

// until syncs until something has come true.
func (d *demo) until(ctx context.Context, n *demoNurse, what string, done func() (bool, error)) error {
	deadline := time.Now().Add(demoPatience)
	for {
		if _, err := n.dev.Sync(ctx, device.SyncOptions{}); err != nil {
			return err
		}
		ok, err := done()
		if err != nil || ok {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s did not arrive on %s's device", what, n.Name)
		}
		pause(ctx, 100*time.Millisecond)
	}
}

// syncCancelled starts a sync and cancels it as soon as the condition holds.
func (n *demoNurse) syncCancelled(ctx context.Context, when func(device.Progress) bool) (device.Report, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	report, err := n.dev.Sync(ctx, device.SyncOptions{Progress: func(p device.Progress) {
		if when(p) {
			cancel(errPulled)
		}
	}})
	switch {
	case !errors.Is(context.Cause(ctx), errPulled):
		if err != nil {
			return report, err
		}
		return report, errors.New("the sync was over before it could be cancelled")
	case err == nil:
		return report, errors.New("the sync was cancelled and yet complete")
	}
	return report, nil
}

// write runs SQL on the device's file, as any application would, and checks how many rows it changed.
func (n *demoNurse) write(ctx context.Context, rows int64, query string, args ...any) error {
	result, err := n.dev.DB().ExecContext(ctx, query, args...)
	if err != nil {
		return fmt.Errorf("write to %s: %w", n.file, err)
	}
	changed, err := result.RowsAffected()
	if err != nil {
		return err
	}
	if changed != rows {
		return fmt.Errorf("write to %s: %d rows changed instead of %d", n.file, changed, rows)
	}
	return nil
}

func ignoreNoRows(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	return err
}

// text is a column of an image, for a person.
func text(image map[string]*string, column string) string {
	if v := image[column]; v != nil {
		return *v
	}
	return ""
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// thousands prints a number with commas.
func thousands(n int64) string {
	s := fmt.Sprint(n)
	var parts []string
	for len(s) > 3 {
		parts = append([]string{s[len(s)-3:]}, parts...)
		s = s[:len(s)-3]
	}
	return strings.Join(append([]string{s}, parts...), ",")
}
