package cmd

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/waystage/waystage/internal/nurse"
	"github.com/waystage/waystage/schema"
)

// What needs a person is said wherever a person looks, with what to do, while servers run and while none does; and no longer
// once it is mended.
func TestHazardFatalIsVisible(t *testing.T) {
	o := newOperator(t)
	o.init()
	health := freePort(t)
	stop := o.serve(nurse.Definitions(), "health.listen="+health)
	defer func() { stop() }()
	mirror, err := schema.Connect(t.Context(), o.mirror, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer mirror.Close(t.Context())
	source, err := schema.Connect(t.Context(), o.source, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close(t.Context())
	get := func(path string) (int, string) {
		t.Helper()
		res, err := http.Get("http://" + health + path)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body)
	}
	o.eventually("the server is ready", func() bool { code, _ := get("/readyz"); return code == http.StatusOK })
	var system string
	o.eventually("down's position says whose it is", func() bool {
		return mirror.QueryRow(t.Context(), "SELECT system FROM waystage.progress WHERE direction = 'down'").Scan(&system) == nil && system != ""
	})

	// The connection string leads to another server from now on.
	if _, err := mirror.Exec(t.Context(), "UPDATE waystage.progress SET system = '4711' WHERE direction = 'down'"); err != nil {
		t.Fatal(err)
	}
	o.eventually("readyz says it", func() bool {
		if _, err := source.Exec(t.Context(), "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = current_database() AND active_pid IS NOT NULL"); err != nil {
			t.Fatal(err)
		}
		code, body := get("/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(body, "not ready: replication")
	})
	if _, body := get("/readyz?verbose"); !strings.Contains(body, "other_system") || !strings.Contains(body, "--recopy") {
		t.Errorf("readyz?verbose: %s", body)
	}
	visible := func() {
		t.Helper()
		got := o.run(exitAttention, "", "status")
		if !strings.Contains(got.out, "STANDS STILL: other_system") || !strings.Contains(got.err, "attention: capture-down stands still (other_system)") || !strings.Contains(got.err, "--recopy") {
			t.Errorf("status:\n%s%s", got.out, got.err)
		}
		s := data[struct {
			Troubles []struct{ Part, Code, Remedy string }
		}](o, exitAttention, "status -o json")
		if len(s.Troubles) != 1 || s.Troubles[0].Part != "capture-down" || s.Troubles[0].Code != "other_system" || s.Troubles[0].Remedy == "" {
			t.Errorf("status -o json: %+v", s)
		}
		if got := o.run(exitOK, "", "pools ls capture-down"); !strings.Contains(got.err, "other_system") || !strings.Contains(got.err, "--recopy") {
			t.Errorf("pools ls:\n%s%s", got.out, got.err)
		}
		rows := data[[]poolRow](o, exitOK, "pools ls -o json")
		for _, r := range rows {
			if (r.Trouble != nil) != (r.Stage == "capture-down") {
				t.Errorf("pool %s: trouble %v", r.Stage, r.Trouble)
			}
		}
	}
	visible()
	stop()
	stop = func() {}
	visible()

	// Mended.
	if _, err := mirror.Exec(t.Context(), "UPDATE waystage.progress SET system = '"+system+"' WHERE direction = 'down'"); err != nil {
		t.Fatal(err)
	}
	stop = o.serve(nurse.Definitions(), "health.listen="+health)
	o.eventually("all is well again", func() bool { code, _ := get("/readyz"); return code == http.StatusOK })
	o.eventually("status says no more", func() bool { return waystage(t, nil, "", "status", "-c", o.config).code == exitOK })
}
