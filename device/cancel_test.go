package device

import (
	"context"
	"path/filepath"
	"testing"
	"time"
)

// TestCancelledAnywhere lets the caller's context end at every moment of a local transaction, the beginning too: the
// connection goes back to the pool without one.
func TestCancelledAnywhere(t *testing.T) {
	d, err := Open(context.Background(), filepath.Join(t.TempDir(), "f.db"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	d.db.SetMaxOpenConns(1) // the next one gets what this one leaves
	cancelled := 0
	for i := range 600 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i%300)*time.Microsecond)
		err := d.write(ctx, func(*txn) error { return nil })
		cancel()
		if err != nil {
			cancelled++
		}
		if err := d.write(context.Background(), func(*txn) error { return nil }); err != nil {
			t.Fatalf("after %d cancelled transactions: %v", cancelled, err)
		}
	}
	if cancelled == 0 {
		t.Error("no transaction was cancelled: the test proves nothing")
	}
}
