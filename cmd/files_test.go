package cmd

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/waystage/waystage/device"
	"github.com/waystage/waystage/internal/files"
)

const withFilesDefinitions = `version: 1
subscriptions:
  patients: {table: vn.patient, columns: [id, name]}
files:
  manuals: {path: manuals/**}
  wounds: {path: 'patients/{key}/**', rows: "select '7'", upload: true, max_size: 1KiB}
sets:
  field: [patients, manuals, wounds]
groups:
  nurses: {sets: [field]}
`

// TestFilesFromTheCommandLine: what an operator and a device do with files, by commands alone, beside a server that publishes a directory; with exit
// codes, JSON and metrics.
func TestFilesFromTheCommandLine(t *testing.T) {
	o := newOperator(t)
	o.init()
	published := filepath.Join(o.dir, "published")
	if err := os.MkdirAll(filepath.Join(published, "pumps"), 0o755); err != nil {
		t.Fatal(err)
	}
	o.write("published/pumps/old.txt", "turn left")
	o.write("published/.hidden", "not for anybody")
	health := freePort(t)
	t.Cleanup(o.serve(withFilesDefinitions, "health.listen="+health, "files.directory="+published, "files.prefix=manuals", "files.every=100ms"))
	o.run(exitOK, testPassword, "users add amina --group nurses")
	dev := " --file " + filepath.Join(o.dir, "amina.db")
	o.run(exitOK, testPassword, "device enrol --server nats://"+o.nats+" --user amina --device phone"+dev)
	metric := func(name string) string {
		res, err := http.Get("http://" + health + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(line, name+" "); ok {
				return strings.TrimSpace(value)
			}
		}
		return ""
	}
	listed := func(more string) map[string]files.File {
		out := map[string]files.File{}
		for _, f := range data[[]files.File](o, exitOK, "files ls -o json"+more) {
			out[f.Path] = f
		}
		return out
	}

	// The directory, as it is and as it changes; what is not in it any more is removed.
	o.eventually("the directory is published", func() bool { return len(listed("")) == 1 })
	if f := listed("")["manuals/pumps/old.txt"]; f.Size != 9 || f.Origin != "directory" || f.PublishedBy != "serve" || f.Type == "" {
		t.Fatalf("%+v", f)
	}
	o.write("published/pumps/new.txt", "turn right")
	if err := os.Remove(filepath.Join(published, "pumps", "old.txt")); err != nil {
		t.Fatal(err)
	}
	o.eventually("the directory is followed", func() bool {
		l := listed("")
		return len(l) == 1 && l["manuals/pumps/new.txt"].Size == 10
	})
	if f := listed(" --all")["manuals/pumps/old.txt"]; !f.Removed {
		t.Errorf("%+v", f)
	}

	// By command.
	photo := o.write("photo.jpg", strings.Repeat("p", 700))
	o.run(exitOK, "", "files put "+photo+" patients/7/")
	o.run(exitOK, "from stdin", "files put - manuals/typed.txt --type text/markdown")
	if f := data[files.File](o, exitOK, "files put -o json "+photo+" patients/8/photo.jpg"); f.Path != "patients/8/photo.jpg" || f.Size != 700 || f.Type != "image/jpeg" {
		t.Errorf("%+v", f)
	}
	if got := o.run(exitOK, "", "files put "+photo+" patients/7/photo.jpg"); !strings.Contains(got.err, "was so already") {
		t.Errorf("%s", got.err)
	}
	if got := o.run(exitOK, "", "files get manuals/typed.txt -"); got.out != "from stdin" {
		t.Errorf("%q", got.out)
	}
	if got := o.run(exitOK, "", "files ls manuals/"); !strings.Contains(got.out, "text/markdown") || strings.Contains(got.out, "photo") {
		t.Errorf("%s", got.out)
	}
	for line, code := range map[string]int{
		"files put " + photo + " ../etc/passwd": exitUsage, "files put " + filepath.Join(o.dir, "nothing") + " manuals/x": exitUsage, "files put " + o.dir + " manuals/x": exitUsage,
		"files get manuals/none -": exitPrecondition, "files rm manuals/none": exitPrecondition, "files sync " + filepath.Join(o.dir, "nowhere"): exitUsage,
		"files sync --prefix ../x " + published: exitUsage,
	} {
		o.run(code, "", line)
	}

	// On the device: what is its user's, and no more.
	rep, _ := o.sync(dev)
	if rep.Files.Fetched != 3 || rep.Files.Missing != 0 {
		t.Errorf("%+v", rep.Files)
	}
	has := map[string]device.FileInfo{}
	for _, f := range data[[]device.FileInfo](o, exitOK, "device files ls -o json"+dev) {
		has[f.Path] = f
	}
	if len(has) != 3 || has["patients/7/photo.jpg"].Size != 700 || has["manuals/pumps/new.txt"].State == "" || has["manuals/typed.txt"].Type != "text/markdown" {
		t.Errorf("%+v", has)
	}
	if got := o.run(exitOK, "", "device files get manuals/pumps/new.txt -"+dev); got.out != "turn right" {
		t.Errorf("%q", got.out)
	}
	if n := metric(`waystage_file_chunks_total{direction="down"}`); n != "3" {
		t.Errorf("%s chunks went down", n)
	}
	if n := metric(`waystage_file_bytes_total{direction="down"}`); n != "720" {
		t.Errorf("%s bytes went down", n)
	}
	// It puts one, and one that somebody else changed meanwhile.
	mine := o.write("mine.jpg", strings.Repeat("m", 300))
	o.run(exitOK, "", "device files put "+mine+" patients/7/mine.jpg"+dev)
	o.run(exitOK, "theirs", "files put - patients/7/photo.jpg")
	o.run(exitOK, "", "device files put "+mine+" patients/7/photo.jpg"+dev)
	for line, code := range map[string]int{
		"device files put " + o.write("large", strings.Repeat("l", 2000)) + " patients/7/large": exitUsage, "device files put " + mine + " manuals/mine": exitPrecondition,
		"device files get manuals/none -": exitPrecondition, "device files rm manuals/none": exitPrecondition,
	} {
		o.run(code, "", line+dev)
	}
	if got := o.run(exitRejected, "", "device sync"+dev); !strings.Contains(got.err, "1 changes of files were rejected") {
		t.Errorf("%s", got.err)
	}
	states := map[string]string{}
	for _, u := range data[[]device.FileUpload](o, exitOK, "device files log -o json"+dev) {
		states[u.Path] = strings.TrimSpace(u.State + " " + string(u.Code))
	}
	if states["patients/7/mine.jpg"] != "applied" || states["patients/7/photo.jpg"] != "rejected stale_version" {
		t.Errorf("%v", states)
	}
	if got := o.run(exitOK, "", "files get patients/7/photo.jpg -"); got.out != "theirs" {
		t.Errorf("%q", got.out)
	}
	if got := o.run(exitOK, "", "files uploads --user amina --state applied"); !strings.Contains(got.out, "patients/7/mine.jpg") || strings.Contains(got.out, "photo.jpg") {
		t.Errorf("%s", got.out)
	}
	if f := listed("")["patients/7/mine.jpg"]; f.Origin != "device" || f.PublishedBy != "amina/phone" {
		t.Errorf("%+v", f)
	}
	for name, want := range map[string]string{`waystage_file_chunks_total{direction="up"}`: "1", `waystage_file_bytes_total{direction="up"}`: "300",
		`waystage_file_uploads_total{outcome="applied"}`: "1", `waystage_file_uploads_total{outcome="rejected"}`: "1"} {
		if got := metric(name); got != want {
			t.Errorf("%s is %q, want %s", name, got, want)
		}
	}

	// Damage on the device is found and mended; removal leaves it.
	if got := o.run(exitOK, "", "device files check"+dev); !strings.Contains(got.err, "0 files are damaged") {
		t.Errorf("%s", got.err)
	}
	sum := sha256.Sum256([]byte("turn right"))
	name := hex.EncodeToString(sum[:])
	damaged := 0
	err := filepath.Walk(filepath.Join(o.dir, "amina.db-files"), func(path string, info os.FileInfo, err error) error {
		if err != nil || !strings.HasSuffix(path, name) && !strings.Contains(path, name[2:]) {
			return err
		}
		damaged++
		if err := os.Chmod(path, 0o600); err != nil {
			return err
		}
		return os.WriteFile(path, []byte("turn wrong"), 0o600)
	})
	if err != nil || damaged != 1 {
		t.Fatalf("%v: %d contents of that hash", err, damaged)
	}
	if got := o.run(exitDiffers, "", "device files check"+dev); !strings.Contains(got.out, "damaged manuals/pumps/new.txt") {
		t.Errorf("%s", got.out)
	}
	o.run(exitOK, "", "files rm manuals/typed.txt")
	if rep, _ := o.sync(dev); rep.Files.Fetched < 1 {
		t.Errorf("%+v", rep.Files)
	}
	if got := o.run(exitOK, "", "device files get manuals/pumps/new.txt -"+dev); got.out != "turn right" {
		t.Errorf("after the repair: %q", got.out)
	}
	o.run(exitPrecondition, "", "device files get manuals/typed.txt -"+dev)
	if got := o.run(exitOK, "", "files check --deep"); !strings.Contains(got.err, "0 files have lost theirs") {
		t.Errorf("%s", got.err)
	}

	// Once, of another directory.
	if err := os.Mkdir(filepath.Join(o.dir, "once"), 0o755); err != nil {
		t.Fatal(err)
	}
	o.write("once/a.txt", "a")
	o.write("once/b.txt", "b")
	if got := o.run(exitOK, "", "files sync --dry-run --prefix once "+filepath.Join(o.dir, "once")); !strings.Contains(got.out, "published once/a.txt") || len(listed(" once/")) != 0 {
		t.Errorf("%s", got.out)
	}
	o.run(exitOK, "", "files sync --prefix once "+filepath.Join(o.dir, "once"))
	if len(listed(" once/")) != 2 {
		t.Errorf("%v", listed(""))
	}
	if err := os.Remove(filepath.Join(o.dir, "once", "a.txt")); err != nil {
		t.Fatal(err)
	}
	o.run(exitOK, "", "files sync --delete --prefix once "+filepath.Join(o.dir, "once"))
	if l := listed(" once/"); len(l) != 1 || l["once/b.txt"].Size != 1 {
		t.Errorf("%v", l)
	}
	if err := os.Remove(filepath.Join(o.dir, "once", "b.txt")); err != nil {
		t.Fatal(err)
	}
	o.run(exitPrecondition, "", "files sync --delete --prefix once "+filepath.Join(o.dir, "once"))
}
