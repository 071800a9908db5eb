// Package imports fences the direction of imports: data flows through the folders in the order of the drawing in
// docs/ARCHITECTURE.md, and neighbours do not know one another; only cmd wires them.
package imports

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/waystage/waystage"

// allowed says which of the project's packages each package may import.
var allowed = map[string][]string{
	"protocol":           {},
	"internal/sabotage":  {},
	"change":             {},
	"conflict":           {"internal/sabotage"},
	"schema":             {"protocol", "internal/pgerr", "internal/hours"},
	"internal/hours":     {},
	"internal/pgerr":     {"protocol"},
	"internal/leader":    {},
	"internal/trouble":   {},
	"internal/nettest":   {},
	"internal/registry":  {"protocol", "internal/pgerr"},
	"internal/oidc":      {"protocol"},
	"internal/health":    {"internal/trouble"},
	"internal/files":     {"protocol", "schema"},
	"internal/pgcluster": {},
	"internal/nurse":     {"schema"},
	"queue":              {"protocol", "change"},
	"stages":             {"protocol", "schema", "conflict", "internal/pgerr", "internal/sabotage"},
	"capture":            {"change", "schema", "internal/pgerr", "internal/leader", "internal/trouble", "internal/sabotage"},
	"apply":              {"change", "schema", "conflict", "internal/pgerr", "internal/leader", "internal/trouble", "internal/sabotage"},
	"verify":             {"schema", "internal/pgerr"},
	"device":             {"protocol", "internal/sabotage"},
}

// only says which packages alone may import a library.
var only = map[string][]string{
	"github.com/nats-io/nats-server/v2/server": {"queue"},
	"github.com/nats-io/nats.go/jetstream":     {"queue", "cmd"},
	"github.com/jackc/pglogrepl":               {"capture", "apply", "schema"},
	"github.com/spf13/cobra":                   {"cmd"},
	"modernc.org/sqlite":                       {"device"},
	"testing":                                  {"internal/pgtest"},
}

func TestImportDirection(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", module+"/...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	checked := 0
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, module+"/")
		may, fenced := allowed[name]
		for _, imp := range p.Imports {
			if pkgs, ok := only[imp]; ok && !slices.Contains(pkgs, name) {
				t.Errorf("%s imports %s, which is for %v alone", name, imp, pkgs)
			}
			if dep, ours := strings.CutPrefix(imp, module+"/"); ours && fenced && !slices.Contains(may, dep) {
				t.Errorf("%s imports %s; it may import %v", name, dep, may)
			}
		}
		if fenced {
			checked++
		} else if top, _, _ := strings.Cut(name, "/"); top != "cmd" && top != "test" && name != "internal/pgtest" {
			t.Errorf("%s has no place in the table of imports: give it one, or fold it into a package that has", name)
		}
	}
	if checked < len(allowed)/2 {
		t.Errorf("only %d of %d fenced packages were found", checked, len(allowed))
	}
}
