package protocol

import (
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden vectors instead of comparing with them")

type vector struct {
	name string
	msg  any // *Request or *Page
}

// file is a golden vector as other implementations read it.
type file struct {
	Message string          `json:"message"` // request or page
	CBOR    string          `json:"cbor"`    // hex
	SHA256  string          `json:"sha256"`  // of the CBOR form
	JSON    json.RawMessage `json:"json"`
}

func val(s string) Value { return &s }

func vectors(testing.TB) []vector {
	id := "3b1e9c6a-58f4-4c0e-9d6b-2f60b1a4c7aa"
	req := func(n int64) Request {
		return Request{V: Version, Incarnation: inc, N: n, Nonce: "8c1f0a37d2b94e65", Set: "field"}
	}
	page := func(n int64) Page {
		return Page{V: Version, Incarnation: inc, N: n, Nonce: "8c1f0a37d2b94e65", Reply: "r-7f3a", Page: 1}
	}
	first := req(1)
	edits := req(2)
	edits.Cursor, edits.Schema, edits.Epoch, edits.Wait, edits.App = "e1.734.a9", "5d41402abc4b2a76", "e1", WaitSource, "visits 2.4"
	edits.Oldest, edits.Library = "2026-11-22T20:15:00Z", "waystage-go/1.0"
	edits.Columns = []Layout{{Table: "care.visit", Columns: []string{"id", "patient_id", "note", "weight", "photo", "done"}}}
	edits.Changes = []Change{
		{Table: "care.visit", Op: Insert, Key: []Value{val(id)}, New: []Value{val(id), val("17"), val("first visit"), val("72.50"), val(`\x00ff`), val("f")}},
		{Table: "care.visit", Op: Update, Key: []Value{val("2")}, Version: "711", Base: []Value{val("2"), val("17"), nil, nil, nil, val("f")}, New: []Value{val("2"), val("17"), val("späť"), nil, nil, val("t")}},
		{Table: "care.visit", Op: Delete, Key: []Value{val("3")}, Version: "698", Base: []Value{val("3"), val("17"), val(""), nil, nil, val("t")}},
	}
	built := req(2)
	built.Built = &Built{Name: "version 3", Tables: []Layout{{Table: "care.patient"}, {Table: "care.visit", Columns: []string{"id", "patient_id", "note"}}}}
	units := req(3)
	units.Columns = []Layout{{Table: "care.visit", Columns: []string{"id", "note"}}}
	units.Changes = []Change{
		{Table: "care.visit", Op: Insert, Key: []Value{val("8")}, New: []Value{val("8"), val("a")}, Unit: 1},
		{Table: "care.visit", Op: Delete, Key: []Value{val("3")}, Version: "698", Base: []Value{val("3"), val("")}, Unit: 2},
		{Table: "care.visit", Op: Insert, Key: []Value{val("9")}, New: []Value{val("9"), nil}, Unit: 1},
		{Table: "care.visit", Op: Insert, Key: []Value{val("10")}, New: []Value{val("10"), val("b")}},
	}
	old := req(1)
	old.Changes = []Change{{Table: "care.visit", Op: Delete, Key: []Value{val("3")}, Version: "698", Base: []Value{val("3")}}}
	old.Columns = []Layout{{Table: "care.visit", Columns: []string{"id"}}}

	schema := page(1)
	schema.Epoch, schema.Refresh, schema.Sets, schema.Rows = "e1", true, []string{"field", "stock"}, 2
	schema.Schema = &Definitions{Hash: "5d41402abc4b2a76", Tables: []Table{{
		Name: "care.visit", Key: []string{"id"}, SubsetKey: "patient_id", Operations: "IUD",
		Columns: []Column{
			{Name: "id", Type: "uuid", NotNull: true}, {Name: "patient_id", Type: "integer", NotNull: true}, {Name: "note", Type: "text"},
			{Name: "weight", Type: "numeric(5,2)"}, {Name: "photo", Type: "bytea"}, {Name: "done", Type: "boolean", NotNull: true, Default: "f"},
		},
		Unique:  [][]string{{"patient_id", "note"}},
		Foreign: []ForeignKey{{Columns: []string{"patient_id"}, Table: "care.patient", Refers: []string{"id"}}},
	}}}
	schema.Tables = []TableRows{{Table: "care.visit", Columns: []string{"id", "patient_id", "note", "weight", "photo", "done"}, Rows: []Row{
		{Version: "711", Values: []Value{val("2"), val("17"), nil, nil, nil, val("f")}},
	}}}
	last := page(1)
	last.Page, last.Last, last.Cursor, last.Epoch = 2, true, "e1.734.a9", "e1"
	last.Tables = []TableRows{{Table: "care.visit", Columns: []string{"id", "patient_id", "note", "weight", "photo", "done"}, Rows: []Row{
		{Version: "698", Values: []Value{val("3"), val("17"), val(""), nil, nil, val("t")}},
	}}}
	delta := page(2)
	delta.Last, delta.CursorFrom, delta.Cursor, delta.Epoch, delta.More = true, "e1.734.a9", "e1.760.1c", "e1", true
	delta.NewKey = true
	delta.Tables = []TableRows{{
		Table: "care.visit", Columns: []string{"id", "patient_id", "note"}, Gone: []string{"18"}, Deletes: [][]Value{{val("3")}},
		Rows: []Row{{Version: "755", Values: []Value{val(id), val("17"), val("first visit")}}},
	}}
	verdicts := page(2)
	verdicts.Last, verdicts.CursorFrom, verdicts.Cursor, verdicts.Epoch = true, "e1.734.a9", "e1.760.1c", "e1"
	verdicts.Verdicts = []Verdict{
		{Incarnation: inc, N: 2, Index: 0, Table: "care.visit", Key: []Value{val(id)}, State: Merged, Version: "755", ID: 9001},
		{Incarnation: inc, N: 2, Index: 1, Table: "care.visit", Key: []Value{val("2")}, State: Rejected, Code: CodeStale, Detail: "the row was changed at the source since version 711", ID: 9002},
		{Incarnation: inc, N: 1, Index: 4, Table: "care.visit", Key: []Value{val("9")}, State: Refused, Code: CodeConstraint, Detail: `new row for relation "visit" violates check constraint "visit_weight_check"`, Constraint: "visit_weight_check", ID: 8977},
		{Incarnation: inc, N: 1, Index: 5, Table: "care.visit", Key: []Value{val("10")}, State: Applied, ID: 8978, Policy: "columns"},
	}
	sums, rows := req(3), req(4)
	sums.Cursor, sums.Verify = "e1.760.1c", &Verification{Buckets: 4}
	rows.Cursor, rows.Verify = "e1.760.1c", &Verification{Buckets: 4, Rows: []VerifyRows{{Table: "care.visit", Buckets: []int{0, 3}}}}
	told := req(5)
	told.Verify = &Verification{Result: &VerifyResult{Cursor: "e1.760.1c", At: "2026-11-22T20:15:00Z", Rows: 12, Different: 2, Repaired: 2, Sample: []Difference{
		{Table: "care.visit", Key: []Value{val("3")}, Kind: DiffMissing}, {Table: "care.visit", Key: []Value{val("2")}, Kind: DiffValues, Columns: []string{"note"}},
	}}}
	summed := page(3)
	key, version := val("2"), val("711")
	image := []Value{key, val("17"), nil}
	summed.Last, summed.CursorFrom, summed.Cursor, summed.Epoch = true, "e1.760.1c", "e1.760.1c", "e1"
	summed.Verify = &Verified{Ask: true, Buckets: 4, Tables: []VerifiedTable{{Table: "care.visit", Columns: []string{"id", "patient_id", "note"}, Sums: []Sum{
		{Bucket: Bucket([]Value{key}, 4), Rows: 1, Versions: HashText(RowHash(version, key)), Images: HashText(RowHash(image...))},
	}}}}
	listed := page(4)
	listed.Last, listed.CursorFrom, listed.Cursor, listed.Epoch = true, "e1.760.1c", "e1.760.1c", "e1"
	listed.Verify = &Verified{Buckets: 4, Tables: []VerifiedTable{{Table: "care.visit", Columns: []string{"id", "patient_id", "note"}, Rows: []Row{{Version: *version, Values: image}}}}}
	waiting := req(6)
	waiting.Files = &FilesRequest{Waiting: 2}
	filed := page(6)
	filed.Last, filed.CursorFrom, filed.Cursor, filed.Epoch = true, "e1.760.1c", "e1.771.2b", "e1"
	filed.Schema = &Definitions{Hash: "77ab402abc4b2a76", Tables: []Table{{Name: "care.wound", Key: []string{"id"}, Operations: "I", FileColumn: "photo", FileBefore: true,
		Columns: []Column{{Name: "id", Type: "integer", NotNull: true}, {Name: "photo", Type: "text"}}}},
		Files: []FileSubscription{{Name: "manuals", Path: "manuals/**"}, {Name: "wounds", Path: "patients/{key}/**", Upload: true, MaxSize: 10 << 20}}}
	filed.Files = []FilesPart{
		{Subscription: "manuals", Deletes: []string{"manuals/old.pdf"}, Files: []FileEntry{{Path: "manuals/pump.pdf", Version: "765", SHA256: FileHash([]byte("pump")), Size: 4, Type: "application/pdf"}}},
		{Subscription: "wounds", Gone: []string{"18"}, Files: []FileEntry{{Path: "patients/17/späť.jpg", Version: "770", SHA256: FileHash(nil), Key: "17"}}, Wanted: []string{FileHash([]byte("lost"))}},
	}
	refused := func(e Error) *Page {
		p := page(3)
		p.Last, p.Error = true, &e
		p.Sets = []string{"field"}
		return &p
	}
	return []vector{
		{"request-first", &first},
		{"request-changes", &edits},
		{"request-built", &built},
		{"request-units", &units},
		{"request-old-epoch", &old},
		{"page-schema", &schema},
		{"page-last", &last},
		{"page-delta", &delta},
		{"page-verdicts", &verdicts},
		{"request-verify-sums", &sums},
		{"request-verify-rows", &rows},
		{"request-verify-result", &told},
		{"page-verify-sums", &summed},
		{"page-verify-rows", &listed},
		{"request-files", &waiting},
		{"page-files", &filed},
		{"page-error-forked", refused(Error{Code: CodeForked, Message: "session 3 does not continue this incarnation: the device was restored or copied; it goes on under a new incarnation"})},
		{"page-error-epoch", refused(Error{Code: CodeEpoch, Message: "the mirror was rebuilt: send everything again under a new incarnation"})},
		{"page-error-busy", refused(Error{Code: CodeBusy, Message: "the input queue is full: try again in 5 seconds", Retry: 5})},
	}
}

// TestVectors holds the wire format still: a difference means that devices in the field would no longer understand.
func TestVectors(t *testing.T) {
	dir := filepath.Join("testdata", "vectors")
	if *update {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, v := range vectors(t) {
		t.Run(v.name, func(t *testing.T) {
			bin, text := must(t, v.msg, ContentCBOR), must(t, v.msg, ContentJSON)
			f := file{Message: "page", CBOR: hex.EncodeToString(bin), SHA256: hex.EncodeToString(Hash(bin)), JSON: text}
			if _, ok := v.msg.(*Request); ok {
				f.Message = "request"
			}
			name := filepath.Join(dir, v.name+".json")
			if *update {
				out, err := json.MarshalIndent(f, "", "  ")
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, append(out, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			raw, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			var want file
			if err := json.Unmarshal(raw, &want); err != nil {
				t.Fatal(err)
			}
			if want.CBOR != f.CBOR || want.SHA256 != f.SHA256 || want.Message != f.Message {
				t.Fatalf("CBOR differs from %s:\n%s\n%s", name, f.CBOR, want.CBOR)
			}
			for ct, data := range map[string][]byte{ContentCBOR: bin, ContentJSON: want.JSON} {
				var back any
				if f.Message == "request" {
					back, err = DecodeRequest(data, ct, DefaultLimits())
				} else {
					back, err = DecodePage(data, ct, DefaultLimits())
				}
				if err != nil {
					t.Fatalf("%s: %v", ct, err)
				}
				if !reflect.DeepEqual(back, v.msg) {
					t.Fatalf("%s: %s", ct, strings.TrimSpace(string(must(t, back, ContentJSON))))
				}
			}
		})
	}
}

// TestErrorsDocumented: docs/errors.md has every code.
func TestErrorsDocumented(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "docs", "errors.md"))
	if err != nil {
		t.Fatal(err)
	}
	src, err := os.ReadFile("code.go")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, m := range regexp.MustCompile(`Code = "([a-z_]+)"`).FindAllSubmatch(src, -1) {
		n++
		if !strings.Contains(string(doc), "| `"+string(m[1])+"` |") {
			t.Errorf("docs/errors.md does not explain %s", m[1])
		}
	}
	if n < 30 {
		t.Fatalf("only %d codes found", n)
	}
}

// TestFieldsDocumented: docs/protocol.md has every field with its CBOR key.
func TestFieldsDocumented(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "docs", "protocol.md"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(doc)
	seen := map[*shape]bool{}
	var look func(s *shape)
	look = func(s *shape) {
		if s == nil || seen[s] {
			return
		}
		seen[s] = true
		look(s.elem)
		for _, f := range s.fields {
			if s.kind == kObject && !strings.Contains(text, fmt.Sprintf("| %d | `%s` |", f.key, f.name)) && !strings.Contains(text, fmt.Sprintf("%d `%s`", f.key, f.name)) {
				t.Errorf("docs/protocol.md does not name field %d %s", f.key, f.name)
			}
			look(f.shape)
		}
	}
	look(requestShape())
	look(pageShape())
}
