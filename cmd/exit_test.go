package cmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

func TestExitCodes(t *testing.T) {
	for want, errs := range map[int][]error{
		exitOK:           {nil},
		exitFailed:       {errors.New("x"), &failure{what: "x"}},
		exitRejected:     {silent(exitRejected)},
		exitAuth:         {&pgconn.PgError{Code: "28P01"}, fmt.Errorf("deep: %w", &pgconn.PgError{Code: "42501"})},
		exitUnreachable:  {context.DeadlineExceeded, &pgconn.ConnectError{}},
		exitPrecondition: {fmt.Errorf("deep: %w", &failure{code: exitPrecondition})},
		exitInterrupted:  {context.Canceled},
	} {
		for _, err := range errs {
			if got := exitCode(err); got != want {
				t.Errorf("%#v: exit code %d, want %d", err, got, want)
			}
		}
	}
}

func TestUsageErrors(t *testing.T) {
	for line, want := range map[string]string{
		"pools scael merge 3": `did you mean "scale"`,
		"pools scale merge":   "accepts 2 arg",
		"rejects ls --usr x":  "--usr",
		"nonsense":            "unknown command",
		"version -o yaml":     "table, json or ndjson",
		"users add":           "accepts 1 arg",
	} {
		got := waystage(t, nil, "", strings.Fields(line)...)
		if got.code != exitUsage || !strings.Contains(got.err, want) || got.out != "" {
			t.Errorf("%s: exit code %d, stdout %q, stderr:\n%s", line, got.code, got.out, got.err)
		}
	}
}

func TestVersionShape(t *testing.T) {
	got := waystage(t, nil, "", "version", "-o", "json")
	var v struct {
		Version, Go, Platform string
		Protocol              int
	}
	if err := json.Unmarshal([]byte(got.out), &v); err != nil || v.Version == "" || v.Protocol != 1 || v.Go == "" || v.Platform == "" {
		t.Errorf("%v %+v", err, got)
	}
}

func TestCompletionAndHelp(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if got := waystage(t, nil, "", "completion", shell); got.code != exitOK || !strings.Contains(got.out, "waystage") {
			t.Errorf("completion %s: %+v", shell, got.code)
		}
	}
	for _, args := range [][]string{{}, {"--help"}, {"pools"}, {"device", "sync", "--help"}} {
		if got := waystage(t, nil, "", args...); got.code != exitOK || got.out == "" {
			t.Errorf("%v: exit code %d, %d bytes of help", args, got.code, len(got.out))
		}
	}
}

func TestUnreachableDatabase(t *testing.T) {
	env := []string{"WAYSTAGE_SOURCE_DSN=postgres://u@127.0.0.1:1/d?connect_timeout=2", "WAYSTAGE_MIRROR_DSN=postgres://u@127.0.0.1:1/d?connect_timeout=2"}
	got := waystage(t, env, "", "rejects", "ls", "-c", tempFile(t, "w.yaml", "log: {level: warn}\n"))
	if got.code != exitUnreachable || !strings.Contains(got.err, "cannot connect to the mirror database") || !strings.Contains(got.err, "do:") {
		t.Errorf("%+v", got)
	}
}
