package e2e

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/waystage/waystage/internal/nurse"
)

// root is the repository.
func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestReadmeProgramCompiles builds the program of the README.
func TestReadmeProgramCompiles(t *testing.T) {
	readme := read(t, filepath.Join(root(t), "README.md"))
	_, rest, ok := strings.Cut(readme, "```go\n")
	program, _, ok2 := strings.Cut(rest, "```")
	if !ok || !ok2 {
		t.Fatal("the README has no program")
	}
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	if err := os.WriteFile(source, []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {filepath.Join(root(t), "test", "readme", "main.go"): source}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("go", "build", "-overlay", file, "-o", filepath.Join(dir, "out"), "./test/readme")
	c.Dir = root(t)
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

var link = regexp.MustCompile(`\]\(([^)]+)\)`)

// TestLinks checks that every file that a document refers to is there.
func TestLinks(t *testing.T) {
	docs, err := filepath.Glob(filepath.Join(root(t), "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	adrs, err := filepath.Glob(filepath.Join(root(t), "docs", "adr", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range append(append(docs, adrs...), filepath.Join(root(t), "README.md"), filepath.Join(root(t), "CONTRIBUTING.md")) {
		for _, m := range link.FindAllStringSubmatch(read(t, doc), -1) {
			u, err := url.Parse(m[1])
			if err != nil || u.Scheme != "" || u.Path == "" {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(doc), u.Path)); err != nil {
				t.Errorf("%s refers to %s, which is not there", filepath.Base(doc), m[1])
			}
		}
	}
}

// TestByHand plays the README's session without our library: JSON over plain NATS requests, one edit, its outcome.
func TestByHand(t *testing.T) {
	w := newWorld(t, nurse.Size{Nurses: 2, Patients: 8, Records: 20})
	w.serve(t)
	w.addUsers(1)
	user := w.nurses[0].Login
	nc, err := nats.Connect("nats://"+w.nats, nats.UserInfo(user+"/laptop", password), nats.CustomInboxPrefix("_INBOX."+user+".laptop"), nats.Timeout(patience))
	w.must(err)
	defer nc.Close()
	const inc = "00112233445566778899aabbccddeeff"
	call := func(subject, body string) []byte {
		t.Helper()
		m := nats.NewMsg("rq." + user + ".laptop." + subject)
		m.Data = []byte(body)
		m.Header.Set("Content-Type", "application/json")
		for deadline := time.Now().Add(patience); ; {
			r, err := nc.RequestMsg(m, patience)
			w.must(err)
			code := r.Header.Get("Ws-Error")
			if code == "pending" && time.Now().Before(deadline) {
				continue
			}
			if code != "" {
				t.Fatalf("%s: %s %s", subject, code, r.Data)
			}
			return r.Data
		}
	}
	type page struct {
		Last          bool
		Cursor, Epoch string
		Tables        []struct {
			Table   string
			Columns []string
			Rows    []struct {
				Version string
				Values  []*string
			}
		}
		Verdicts []struct{ State, Code, Detail, Version string }
		Error    *struct{ Code, Message string }
	}
	session := func(n int, request string) (pages []page) {
		t.Helper()
		var receipt struct{ Stored bool }
		w.must(json.Unmarshal(call(fmt.Sprintf("put.%s-%d.1-1", inc, n), request), &receipt))
		if !receipt.Stored {
			t.Fatal("no receipt")
		}
		for i := 1; ; i++ {
			var p page
			w.must(json.Unmarshal(call(fmt.Sprintf("get.%s-%d.%d", inc, n, i), ""), &p))
			if p.Error != nil {
				t.Fatalf("session %d: %s %s", n, p.Error.Code, p.Error.Message)
			}
			pages = append(pages, p)
			if p.Last {
				break
			}
		}
		call(fmt.Sprintf("ack.%s-%d", inc, n), "")
		return pages
	}
	var columns []string
	var values []*string
	var version string
	pages := session(1, `{"v":1,"incarnation":"`+inc+`","n":1,"nonce":"one","set":"field"}`)
	for _, p := range pages {
		for _, tr := range p.Tables {
			if tr.Table == "vn.patient" && len(tr.Rows) > 0 && columns == nil {
				columns, values, version = tr.Columns, tr.Rows[0].Values, tr.Rows[0].Version
			}
		}
	}
	if columns == nil {
		t.Fatal("no patient came")
	}
	text := func(v any) string {
		b, err := json.Marshal(v)
		w.must(err)
		return string(b)
	}
	changed, key, mark := append([]*string(nil), values...), "", "by hand"
	for i, c := range columns {
		switch c {
		case "id":
			key = *values[i]
		case "remarks":
			changed[i] = &mark
		}
	}
	last := pages[len(pages)-1]
	pages = session(2, `{"v":1,"incarnation":"`+inc+`","n":2,"nonce":"two","set":"field","wait":"source","cursor":`+text(last.Cursor)+`,"epoch":`+text(last.Epoch)+
		`,"columns":[{"table":"vn.patient","columns":`+text(columns)+`}],"changes":[{"table":"vn.patient","op":"U","key":[`+text(key)+`],"version":`+text(version)+
		`,"base":`+text(values)+`,"new":`+text(changed)+`}]}`)
	var states []string
	for _, p := range pages {
		for _, v := range p.Verdicts {
			states = append(states, v.State)
		}
	}
	if len(states) == 0 || states[0] != "applied" && states[0] != "merged" {
		t.Errorf("verdicts: %v", states)
	}
	w.eventually("the edit does not reach the source", func() error {
		var got *string
		if err := w.source.QueryRow(w.ctx, "SELECT remarks FROM vn.patient WHERE id = $1::text::bigint", key).Scan(&got); err != nil {
			return err
		}
		if got == nil || *got != mark {
			return fmt.Errorf("remarks are %v", got)
		}
		return nil
	})
}
