package cmd

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// outcome of one command line.
type outcome struct {
	code     int
	out, err string
}

// waystage runs a command line in-process, in the given environment.
func waystage(t testing.TB, env []string, stdin string, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var out, err bytes.Buffer
	code := run(ctx, args, &terminal{in: strings.NewReader(stdin), out: &out, err: &err, env: env})
	return outcome{code, out.String(), err.String()}
}

// tempFile writes a file into a fresh folder.
func tempFile(t testing.TB, name, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const smallConfig = "source: {dsn: postgres://s@h/src}\nmirror: {dsn: postgres://m@h/mir}\n"

func TestConfigPrecedence(t *testing.T) {
	path := tempFile(t, "waystage.yaml", smallConfig+"limits: {records: 7, page: 64KiB, row: 2MiB}\npools: {capture-down: 2}\nnats: {external: {urls: [nats://a, nats://b], credentials_file: keys}}\n")
	c, err := load(&terminal{env: []string{"WAYSTAGE_LIMITS_PAGE=32KiB", "WAYSTAGE_LIMITS_ROW=3MiB", "WAYSTAGE_POOLS_APPLY_UP=0",
		"WAYSTAGE_RETENTION_TOMBSTONES=14d", "WAYSTAGE_SERVICE_HOST=10.0.0.1"}}, path, []string{"limits.row=4MiB", "reply.hold=1500ms"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	got := map[string]any{"records": c.Limits.Records, "page": c.Limits.Page, "row": c.Limits.Row, "session": c.Limits.Session,
		"capture-down": c.Pools.CaptureDown, "apply-up": c.Pools.ApplyUp, "tombstones": c.Retention.Tombstones, "hold": time.Duration(c.Reply.Hold),
		"urls": c.NATS.External.URLs, "keys": c.NATS.External.Credentials}
	want := map[string]any{"records": 7, "page": Size(32 << 10), "row": Size(4 << 20), "session": Size(64 << 20),
		"capture-down": 2, "apply-up": 0, "tombstones": Duration(14 * day), "hold": 1500 * time.Millisecond,
		"urls": []string{"nats://a", "nats://b"}, "keys": filepath.Join(filepath.Dir(path), "keys")}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	for key, from := range map[string]string{"limits.session": "default", "limits.records": "file", "limits.page": "environment", "limits.row": "flag"} {
		if c.origins[key] != from {
			t.Errorf("%s comes from %s, want %s", key, c.origins[key], from)
		}
	}
}

func TestConfigRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		body string
		env  []string
		args []string
		want []string
	}{
		"unknown key":        {body: smallConfig + "limits:\n  recrods: 5\n", want: []string{":4:3", `"limits.recrods"`, `did you mean "limits.records"`}},
		"unknown section":    {body: smallConfig + "retentoin: {}\n", want: []string{":3:1", `did you mean "retention"`}},
		"double key":         {body: smallConfig + "limits: {records: 1}\nlimits: {records: 2}\n", want: []string{":4:1", "twice", "limits"}},
		"not yaml":           {body: "source: [", want: []string{"not YAML"}},
		"scalar for section": {body: smallConfig + "limits: 5\n", want: []string{":3:9", "limits wants keys below it"}},
		"bad size":           {body: smallConfig + "limits: {page: lots}\n", want: []string{"lots", "64MiB"}},
		"bad duration":       {body: smallConfig + "reply: {hold: soon}\n", want: []string{"soon", "90s"}},
		"no source":          {body: "mirror: {dsn: postgres://h/m}\n", want: []string{"no source database"}},
		"out of range":       {body: smallConfig, env: []string{"WAYSTAGE_POOLS_MERGE=999"}, want: []string{"$WAYSTAGE_POOLS_MERGE", "999"}},
		"external, no keys":  {body: smallConfig + "nats: {external: {urls: [nats://h]}}\n", want: []string{"server keys file"}},
		"secret as flag":     {body: smallConfig, args: []string{"--set", "source.dsn=postgres://u:p@h/d"}, want: []string{"secret", "WAYSTAGE_SOURCE_DSN"}},
		"unknown flag key":   {body: smallConfig, args: []string{"--set", "log.levl=debug"}, want: []string{`did you mean "log.level"`}},
		"twice":              {body: smallConfig, env: []string{"WAYSTAGE_SOURCE_DSN_FILE=x"}, want: []string{"both set"}},
		"secret not there":   {body: "source: {dsn_file: nowhere}\nmirror: {dsn: postgres://h/m}\n", want: []string{"nowhere", "no such file"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := waystage(t, c.env, "", append([]string{"config", "check", "-c", tempFile(t, "waystage.yaml", c.body)}, c.args...)...)
			if got.code != exitUsage {
				t.Errorf("exit code %d, want %d\n%s", got.code, exitUsage, got.err)
			}
			for _, w := range c.want {
				if !strings.Contains(got.err, w) {
					t.Errorf("the error does not say %q:\n%s", w, got.err)
				}
			}
		})
	}
}

func TestSecretFromFile(t *testing.T) {
	secret := tempFile(t, "dsn", "postgres://u:geheim@h/src\n")
	c, err := load(&terminal{}, tempFile(t, "w.yaml", "mirror: {dsn: postgres://h/m}\nsource: {dsn_file: "+secret+"}\n"), nil)
	if err != nil || c.Source.DSN != "postgres://u:geheim@h/src" {
		t.Errorf("dsn %q, error %v", c.Source.DSN, err)
	}
}

func TestSecretsAreNeverPrinted(t *testing.T) {
	for _, dsn := range []string{"postgres://u:geheim@h/d", "postgres://h/d?user=u&password=geheim", "host=h user=u password=geheim",
		"host=h password = 'geheim x' user=u", "postgres://u:geheim@h:badport/d"} {
		env := []string{"WAYSTAGE_SOURCE_DSN=" + dsn, "WAYSTAGE_MIRROR_DSN=" + dsn}
		for _, args := range [][]string{{"config", "print"}, {"config", "print", "-o", "json"}, {"status"}, {"config", "check"}} {
			got := waystage(t, append(env, "WAYSTAGE_CONFIG="), "", append(args, "-c", tempFile(t, "w.yaml", "log: {level: warn}\n"))...)
			if strings.Contains(got.out+got.err, "geheim") {
				t.Errorf("%v with %s shows the password:\n%s%s", args, dsn, got.out, got.err)
			}
		}
	}
}

func TestConfigPrintShape(t *testing.T) {
	got := waystage(t, nil, "", "config", "print", "-o", "json", "-c", tempFile(t, "w.yaml", smallConfig))
	var rows []map[string]string
	if err := json.Unmarshal([]byte(got.out), &rows); err != nil {
		t.Fatal(err, got)
	}
	byKey := map[string]map[string]string{}
	for _, r := range rows {
		byKey[r["key"]] = r
	}
	if byKey["source.dsn"]["from"] != "file" || byKey["limits.page"]["value"] != "256KiB" || byKey["limits.page"]["from"] != "default" {
		t.Errorf("unexpected shape: %s", got.out)
	}
}

// TestReference checks that the reference names every key, and that what it shows is what an empty file means.
func TestReference(t *testing.T) {
	got := waystage(t, nil, "", "config", "reference")
	if got.code != exitOK {
		t.Fatal(got)
	}
	var open []string
	for _, line := range strings.Split(got.out, "\n") {
		if rest, ok := strings.CutPrefix(strings.TrimLeft(line, " "), "# "); ok {
			if name, _, isKey := strings.Cut(rest, ": "); isKey && !strings.Contains(name, " ") {
				line = line[:len(line)-len(strings.TrimLeft(line, " "))] + rest
			}
		}
		open = append(open, line)
	}
	path := tempFile(t, "all.yaml", strings.Join(open, "\n"))
	c, err := load(&terminal{}, path, nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, strings.Join(open, "\n"))
	}
	for _, k := range keys() {
		if k.doc == "" {
			t.Errorf("%s has no explanation", k.path)
		}
		if c.origins[k.path] != "file" {
			t.Errorf("the reference does not show %s", k.path)
		}
	}
	want := Defaults()
	c.file, c.origins = "", nil
	base := filepath.Dir(path)
	want.Definitions, want.NATS.Embedded.Store = filepath.Join(base, want.Definitions), filepath.Join(base, want.NATS.Embedded.Store)
	for _, list := range []*[]string{&c.NATS.External.URLs, &c.Identity.OIDC.Audience, &c.Identity.OIDC.Groups, &c.Identity.OIDC.Attributes} {
		if len(*list) == 0 {
			*list = nil // an empty list and none are the same
		}
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("the reference shows other values than the defaults:\n%+v\n%+v", c, want)
	}
	var doc map[string]any
	if err := yaml.Unmarshal([]byte(got.out), &doc); err != nil {
		t.Error(err)
	}
}

func TestDurationsAndSizes(t *testing.T) {
	for text, want := range map[string]time.Duration{"30d": 30 * day, "1.5d": 36 * time.Hour, "90s": 90 * time.Second, "0": 0} {
		var d Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || time.Duration(d) != want {
			t.Errorf("%s: %v, %v", text, d, err)
		}
		var again Duration
		if err := again.UnmarshalText([]byte(d.String())); err != nil || again != d {
			t.Errorf("%s prints as %s, which reads as %v", text, d, again)
		}
	}
	for text, want := range map[string]Size{"1024": 1024, "256KiB": 256 << 10, "1.5 MiB": 3 << 19, "2GB": 2e9, "0": 0} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%s: %v, %v", text, s, err)
		}
		var again Size
		if err := again.UnmarshalText([]byte(s.String())); err != nil || again != s {
			t.Errorf("%s prints as %s, which reads as %v", text, s, again)
		}
	}
	for _, text := range []string{"", "x", "-5KiB", "5 parsecs"} {
		if new(Size).UnmarshalText([]byte(text)) == nil {
			t.Errorf("%q is taken for a size", text)
		}
	}
}
