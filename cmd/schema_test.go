package cmd

import (
	"strings"
	"testing"

	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/schema"
)

// TestSchema: a table that the source has altered is named, stops alone, and is taken over while the server runs.
func TestSchema(t *testing.T) {
	o := newOperator(t)
	o.init()
	if got := o.run(exitPrecondition, "", "schema diff"); !strings.Contains(got.err, "waystage serve") {
		t.Errorf("%s", got.err)
	}
	stop := o.serve(nurse.Definitions(), "health.listen=")
	defer stop()
	if got := o.run(exitOK, "", "schema diff"); !strings.Contains(got.err, "as they were set up") {
		t.Errorf("%s%s", got.out, got.err)
	}
	o.run(exitUsage, "", "schema diff vn.visit")
	o.at(o.source, "ALTER TABLE vn.visit DROP COLUMN minutes")
	o.at(o.source, "UPDATE vn.visit SET state = state")
	found := data[[]schema.Inspection](o, exitDiffers, "schema diff -o json")
	if len(found) != 1 || found[0].Table != "vn.visit" || found[0].Action != schema.ActResync || len(found[0].Differences) == 0 {
		t.Errorf("%+v", found)
	}
	o.eventually("the table is stopped", func() bool {
		return o.at(o.mirror, "SELECT coalesce(max(stopped_code), '') FROM waystage.synced_table") == string(schema.StopColumn)
	})
	if got := o.run(exitAttention, "", "status"); !strings.Contains(got.err, "waystage schema apply") {
		t.Errorf("%s%s", got.out, got.err)
	}
	o.run(exitPrecondition, "", "schema apply --yes --resync vn.vist")
	done := data[[]schema.Applied](o, exitOK, "schema apply --yes -o json")
	if len(done) != 1 || done[0].Table != "vn.visit" || done[0].Action != schema.ActResync || done[0].Compared == 0 {
		t.Errorf("%+v", done)
	}
	o.run(exitOK, "", "schema diff")
	o.run(exitOK, "", "status")
	if got := o.run(exitOK, "", "verify"); !strings.Contains(got.err, "are equal") {
		t.Errorf("%s%s", got.out, got.err)
	}
	if done := data[[]schema.Applied](o, exitOK, "schema apply --yes --resync vn.patient -o json"); len(done) != 1 || done[0].Written != 0 {
		t.Errorf("%+v", done)
	}
}
