package device

import (
	"context"
	"fmt"
	"testing"
)

// BenchmarkFirstSync applies 20,000 rows of a new device.
func BenchmarkFirstSync(b *testing.B) {
	const rows = 20_000
	srv := newServer(b)
	srv.perPage = 2000
	for i := range rows {
		srv.foreign("public.item", []string{fmt.Sprint(i)}, image{"id": ptr(fmt.Sprint(i)), "grp": ptr("1"), "val": ptr(fmt.Sprintf("value %d", i))})
	}
	for b.Loop() {
		d := srv.device(b, "a", Options{})
		rep, err := d.Sync(context.Background(), SyncOptions{})
		if err != nil || rep.Rows != rows {
			b.Fatal(err, rep.Rows)
		}
		_ = d.Close()
	}
	b.ReportMetric(rows*float64(b.N)/b.Elapsed().Seconds(), "rows/s")
}

// BenchmarkUpload freezes, sends and settles 5,000 edits.
func BenchmarkUpload(b *testing.B) {
	const rows = 5_000
	srv := newServer(b)
	srv.perPage = 2000
	d := srv.device(b, "a", Options{})
	if _, err := d.Sync(context.Background(), SyncOptions{}); err != nil {
		b.Fatal(err)
	}
	n := 0
	for b.Loop() {
		b.StopTimer()
		n++
		for i := range rows {
			mustExec(b, d, `INSERT INTO item VALUES (?, 1, ?) ON CONFLICT DO UPDATE SET val = excluded.val`, i, fmt.Sprint(n))
		}
		b.StartTimer()
		rep, err := d.Sync(context.Background(), SyncOptions{})
		if err != nil || rep.Merged != rows {
			b.Fatal(err, rep)
		}
	}
	b.ReportMetric(rows*float64(b.N)/b.Elapsed().Seconds(), "edits/s")
}

// BenchmarkCapture edits rows, each for the first time, in transactions of a thousand.
func BenchmarkCapture(b *testing.B) {
	srv := newServer(b)
	d := srv.device(b, "a", Options{})
	if _, err := d.Sync(context.Background(), SyncOptions{}); err != nil {
		b.Fatal(err)
	}
	for i := range b.N {
		if i%1000 == 0 {
			mustExec(b, d, `DELETE FROM _ws_s_item`)
			mustExec(b, d, `WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 999) INSERT INTO item SELECT i, 1, 'x' FROM n WHERE 1 ON CONFLICT DO UPDATE SET val = val || 'y'`)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "edits/s")
}
