package files_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/waystage/waystage/internal/files"
	"github.com/waystage/waystage/internal/pgtest"
	"github.com/waystage/waystage/internal/registry"
	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/queue"
	"github.com/waystage/waystage/schema"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

const patience = time.Minute

const definitions = `version: 1
files:
  manuals: {path: "manuals/**"}
  wounds: {path: "patients/{key}/**", rows: "select unnest(string_to_array(:user.patients, ','))", upload: true, max_size: 1MiB}
  notes: {path: "notes/{key}.txt", rows: "select :user"}
sets: {field: [manuals, wounds, notes], desk: [notes]}
groups: {nurses: {sets: [field]}, office: {sets: [desk]}}
`

type rig struct {
	t      *testing.T
	ctx    context.Context
	db     *pgxpool.Pool
	q      *queue.Queue
	store  *files.Store
	cfg    files.Config
	chunks *queue.Chunks
}

func newRig(t *testing.T, cfg files.Config) *rig {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	t.Cleanup(cancel)
	r := &rig{t: t, ctx: ctx, cfg: cfg}
	dsn := pgtest.Mirror(t)
	r.must(schema.MigrateMirror(ctx, dsn))
	pc, err := schema.Config(dsn, "files test")
	r.must(err)
	r.db, err = pgxpool.NewWithConfig(ctx, pc)
	r.must(err)
	t.Cleanup(r.db.Close)
	// The role is of the cluster, and other tests may be making it now.
	for {
		_, err := r.db.Exec(ctx, "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'waystage_reader') THEN CREATE ROLE waystage_reader NOLOGIN NOINHERIT; END IF; END $$")
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	server, err := queue.StartServer(queue.ServerOptions{StoreDir: t.TempDir()}, zap.NewNop())
	r.must(err)
	t.Cleanup(server.Shutdown)
	r.q, err = queue.Open(ctx, queue.Config{Broker: queue.Broker{Embedded: server, Secrets: server.Secrets()}}, zap.NewNop())
	r.must(err)
	t.Cleanup(r.q.Close)
	r.chunks = r.q.Chunks()
	defs, problems := schema.ParseDefinitions("definitions.yaml", []byte(definitions))
	if defs == nil {
		t.Fatal(problems)
	}
	r.store = files.New(cfg, r.db, r.chunks, func(context.Context) (*schema.Definitions, error) { return defs, nil }, zaptest.NewLogger(t, zaptest.Level(zap.FatalLevel)))
	users := registry.New(r.db, nil)
	for name, u := range map[string]registry.UserChange{
		"anna":  {Groups: []string{"nurses"}, Set: map[string]string{"patients": "1,2"}},
		"bob":   {Groups: []string{"nurses"}, Set: map[string]string{"patients": "3"}},
		"clerk": {Groups: []string{"office"}},
	} {
		r.must(users.CreateUser(ctx, name, u))
		_, err := users.EnsureDevice(ctx, name, "phone")
		r.must(err)
	}
	return r
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) publish(path string, content []byte) (files.File, bool) {
	r.t.Helper()
	f, changed, err := r.store.Publish(r.ctx, files.Publication{Path: path, By: "test"}, bytes.NewReader(content))
	r.must(err)
	return f, changed
}

// wipe loses chunks of a content.
func (r *rig) wipe(content []byte) {
	r.t.Helper()
	for len(content) > 0 {
		n := min(len(content), protocol.FileChunk)
		gone, err := r.chunks.Drop(r.ctx, sha256.Sum256(content[:n]), time.Now().Add(time.Hour))
		r.must(err)
		if !gone {
			r.t.Fatal("the chunk was not there")
		}
		content = content[n:]
	}
}

// fetch gets a content as a device does.
func (r *rig) fetch(user string, content []byte) ([]byte, error) {
	var got []byte
	for n := 1; n <= protocol.FileChunks(int64(len(content))); n++ {
		data, err := r.store.Fetch(r.ctx, user, "phone", protocol.FileHash(content), n)
		if err != nil {
			return got, err
		}
		got = append(got, data...)
	}
	return got, nil
}

func (r *rig) code(what string, err error, want protocol.Code) {
	r.t.Helper()
	var e *protocol.Error
	if !errors.As(err, &e) || e.Code != want {
		r.t.Errorf("%s: %v, want %s", what, err, want)
	}
}

func content(seed uint64, size int) []byte {
	b := make([]byte, size)
	rnd := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
	return b
}

func id(n int) string { return fmt.Sprintf("%032x", n) }

func offer(path string, base, content []byte) protocol.FileOffer {
	o := protocol.FileOffer{Path: path, Op: protocol.FilePut, SHA256: protocol.FileHash(content), Size: int64(len(content))}
	if base != nil {
		o.Base = protocol.FileHash(base)
	}
	return o
}

// upload does what a device does until the outcome.
func (r *rig) upload(user, id string, o protocol.FileOffer, content []byte) protocol.FileReceipt {
	r.t.Helper()
	rec, err := r.store.Offer(r.ctx, user, "phone", id, o)
	r.must(err)
	for rec.State == protocol.FileReceiving || rec.State == protocol.FileStored {
		for rec.State == protocol.FileReceiving {
			n := rec.Missing[0]
			rec, err = r.store.Put(r.ctx, user, "phone", id, n, content[(n-1)*protocol.FileChunk:min(n*protocol.FileChunk, len(content))])
			r.must(err)
		}
		rec, err = r.store.Commit(r.ctx, user, "phone", id)
		r.must(err)
	}
	return rec
}

func TestPublish(t *testing.T) {
	r := newRig(t, files.Config{MaxSize: 4 << 20})
	one, two := content(1, 3*protocol.FileChunk+17), content(2, 100)
	f, changed := r.publish("manuals/pump.pdf", one)
	if !changed || f.Size != int64(len(one)) || f.SHA256 != protocol.FileHash(one) || f.Lost {
		t.Fatalf("%+v, %t", f, changed)
	}
	if again, changed := r.publish("manuals/pump.pdf", one); changed || again.Version != f.Version {
		t.Errorf("the same again: %+v, %t", again, changed)
	}
	var out bytes.Buffer
	if _, err := r.store.Copy(r.ctx, "manuals/pump.pdf", &out); err != nil || !bytes.Equal(out.Bytes(), one) {
		t.Errorf("copy: %d bytes, %v", out.Len(), err)
	}
	if next, changed := r.publish("manuals/pump.pdf", two); !changed || next.Version <= f.Version {
		t.Errorf("%+v, %t", next, changed)
	}
	if empty, changed := r.publish("manuals/empty", nil); !changed || empty.Size != 0 {
		t.Errorf("%+v, %t", empty, changed)
	}
	_, _, err := r.store.Publish(r.ctx, files.Publication{Path: "manuals/big"}, bytes.NewReader(make([]byte, 4<<20+1)))
	if !errors.Is(err, files.ErrTooBig) {
		t.Errorf("too big: %v", err)
	}
	_, _, err = r.store.Publish(r.ctx, files.Publication{Path: "../x"}, bytes.NewReader(one))
	r.code("path", err, protocol.CodePath)
	r.must(r.store.Remove(r.ctx, "manuals/pump.pdf", "test"))
	if err := r.store.Remove(r.ctx, "manuals/pump.pdf", "test"); !errors.Is(err, files.ErrNoFile) {
		t.Errorf("removed twice: %v", err)
	}
	list, err := r.store.List(r.ctx, "manuals/", false)
	if err != nil || len(list) != 1 || list[0].Path != "manuals/empty" {
		t.Errorf("%+v, %v", list, err)
	}
}

// One device gets no chunk of what another may have: not by hash, not after it was removed, not when the right is gone.
func TestFetchIsAuthorised(t *testing.T) {
	r := newRig(t, files.Config{})
	manual, wound, note := content(1, protocol.FileChunk+5), content(2, 2*protocol.FileChunk), content(3, 10)
	r.publish("manuals/pump.pdf", manual)
	r.publish("patients/1/a.jpg", wound)
	r.publish("notes/bob.txt", note)
	r.publish("elsewhere/secret", content(9, 7))
	none := func(user string, c []byte) {
		t.Helper()
		got, err := r.fetch(user, c)
		r.code(user, err, protocol.CodeNotFound)
		if len(got) > 0 {
			t.Errorf("%s got %d bytes", user, len(got))
		}
	}
	has := func(user string, c []byte) {
		t.Helper()
		if got, err := r.fetch(user, c); err != nil || !bytes.Equal(got, c) {
			t.Errorf("%s: %d bytes, %v", user, len(got), err)
		}
	}
	has("anna", manual)
	has("bob", manual)
	none("clerk", manual)
	has("anna", wound)
	none("bob", wound)
	has("bob", note)
	none("anna", note)
	none("anna", content(9, 7))
	// The answer is the same, word for word, for what does not exist.
	_, real := r.store.Fetch(r.ctx, "bob", "phone", protocol.FileHash(wound), 1)
	_, unreal := r.store.Fetch(r.ctx, "bob", "phone", protocol.FileHash([]byte("nothing")), 1)
	if real.Error() != unreal.Error() {
		t.Errorf("%q tells something, %q does not", real, unreal)
	}
	for _, sha := range []string{"", "*", ">", "../x", strings.ToUpper(protocol.FileHash(manual)), protocol.FileHash(manual) + " ", protocol.FileHash(manual)[:63]} {
		_, err := r.store.Fetch(r.ctx, "anna", "phone", sha, 1)
		r.code(sha, err, protocol.CodeNotFound)
	}
	for _, n := range []int{-1, 0, 3, 1 << 30} {
		_, err := r.store.Fetch(r.ctx, "anna", "phone", protocol.FileHash(manual), n)
		r.code(fmt.Sprint(n), err, protocol.CodeNotFound)
	}
	_, err := r.store.Fetch(r.ctx, "anna", "tablet", protocol.FileHash(manual), 1)
	r.code("unknown device", err, protocol.CodeBlocked)
	// A content that was replaced is under the path's rules for a while; a removed one is gone at once.
	r.publish("manuals/pump.pdf", content(4, 9))
	has("anna", manual)
	none("clerk", manual)
	r.must(r.store.Remove(r.ctx, "manuals/pump.pdf", "test"))
	none("anna", manual)
	none("anna", content(4, 9))
	// An assignment that ends.
	_, err = r.db.Exec(r.ctx, `UPDATE waystage.app_user SET attributes = '{"patients": "2"}' WHERE name = 'anna'`)
	r.must(err)
	none("anna", wound)
	_, err = r.db.Exec(r.ctx, `UPDATE waystage.app_user SET blocked = true WHERE name = 'bob'`)
	r.must(err)
	_, err = r.fetch("bob", note)
	r.code("blocked", err, protocol.CodeBlocked)
}

func TestUpload(t *testing.T) {
	r := newRig(t, files.Config{})
	one, two := content(1, 3*protocol.FileChunk+17), content(2, 100)
	o := offer("patients/1/a.jpg", nil, one)
	rec, err := r.store.Offer(r.ctx, "anna", "phone", id(1), o)
	if err != nil || rec.State != protocol.FileReceiving || !slices.Equal(rec.Missing, []int{1, 2, 3, 4}) {
		t.Fatalf("%+v, %v", rec, err)
	}
	// Out of order, twice, too early: nothing of it does harm.
	put := func(n int) protocol.FileReceipt {
		t.Helper()
		rec, err := r.store.Put(r.ctx, "anna", "phone", id(1), n, one[(n-1)*protocol.FileChunk:min(n*protocol.FileChunk, len(one))])
		r.must(err)
		return rec
	}
	if rec := put(3); !slices.Equal(rec.Missing, []int{1, 2, 4}) {
		t.Errorf("%+v", rec)
	}
	put(3)
	if rec, err := r.store.Commit(r.ctx, "anna", "phone", id(1)); err != nil || rec.State != protocol.FileReceiving {
		t.Errorf("too early: %+v, %v", rec, err)
	}
	_, err = r.store.Put(r.ctx, "anna", "phone", id(1), 1, one[:5])
	r.code("short chunk", err, protocol.CodeFileContent)
	_, err = r.store.Put(r.ctx, "anna", "phone", id(1), 5, one[:5])
	r.code("no such chunk", err, protocol.CodeFileContent)
	_, err = r.store.Put(r.ctx, "bob", "phone", id(1), 1, one[:protocol.FileChunk])
	r.code("another's upload", err, protocol.CodeNotFound)
	_, err = r.store.Commit(r.ctx, "bob", "phone", id(1))
	r.code("another's upload", err, protocol.CodeNotFound)
	put(1)
	put(2)
	if rec := put(4); rec.State != protocol.FileStored {
		t.Errorf("%+v", rec)
	}
	// The store loses a chunk between the last put and the commit.
	r.wipe(one[protocol.FileChunk : 2*protocol.FileChunk])
	rec, err = r.store.Commit(r.ctx, "anna", "phone", id(1))
	if err != nil || rec.State != protocol.FileReceiving || !slices.Equal(rec.Missing, []int{2}) {
		t.Fatalf("%+v, %v", rec, err)
	}
	put(2)
	var wg sync.WaitGroup
	for range 4 { // the same call, at the same time
		wg.Go(func() {
			rec, err := r.store.Commit(r.ctx, "anna", "phone", id(1))
			if err != nil || rec.State != protocol.Applied || rec.Version == "" {
				t.Errorf("%+v, %v", rec, err)
			}
		})
	}
	wg.Wait()
	f, err := r.store.Look(r.ctx, "patients/1/a.jpg")
	r.must(err)
	if f.SHA256 != protocol.FileHash(one) || f.PublishedBy != "anna/phone" || f.Origin != "device" {
		t.Errorf("%+v", f)
	}
	if again, err := r.store.Offer(r.ctx, "anna", "phone", id(1), o); err != nil || again.State != protocol.Applied || again.Version != fmt.Sprint(f.Version) {
		t.Errorf("again: %+v, %v", again, err)
	}
	other := o
	other.Path = "patients/2/a.jpg"
	_, err = r.store.Offer(r.ctx, "anna", "phone", id(1), other)
	r.code("the same id", err, protocol.CodeFileConflict)

	// The version rule.
	reject := func(n int, user string, o protocol.FileOffer, code protocol.Code, right string) {
		t.Helper()
		rec := r.upload(user, id(n), o, two)
		if rec.State != protocol.Rejected || rec.Code != code || rec.Right != right {
			t.Errorf("%+v, want %s", rec, code)
		}
		if again := r.upload(user, id(n), o, two); again.State != protocol.Rejected || again.Code != code {
			t.Errorf("again: %+v, want %s", again, code)
		}
	}
	reject(2, "anna", offer("patients/1/a.jpg", nil, two), protocol.CodeRowExists, protocol.FileHash(one))
	reject(3, "anna", offer("patients/1/a.jpg", two, content(3, 5)), protocol.CodeStale, protocol.FileHash(one))
	reject(4, "anna", offer("patients/2/new.jpg", two, two), protocol.CodeRowDeleted, "")
	reject(5, "anna", protocol.FileOffer{Path: "patients/1/a.jpg", Op: protocol.FileRemove, Base: protocol.FileHash(two)}, protocol.CodeStale, protocol.FileHash(one))
	// What is so already is good, whatever it was made on.
	if rec := r.upload("anna", id(6), offer("patients/1/a.jpg", two, one), one); rec.State != protocol.Applied || rec.Version != fmt.Sprint(f.Version) {
		t.Errorf("%+v", rec)
	}
	// Rights.
	reject(7, "bob", offer("patients/1/b.jpg", nil, two), protocol.CodeNotSubscribed, "")
	reject(8, "anna", offer("manuals/x", nil, two), protocol.CodeOperation, "")
	reject(9, "anna", offer("elsewhere", nil, two), protocol.CodeNotSubscribed, "")
	big := offer("patients/1/big", nil, two)
	big.Size = 1<<20 + 1
	reject(10, "anna", big, protocol.CodeFileTooBig, "")
	// 11: paths that lead elsewhere are final, and nothing of them is kept.
	for _, p := range []string{"patients/1/../2/x", "/patients/1/x", "patients/1/\x00", "patients/1/CON", "patients/1/..", "patients\\1\\x"} {
		rec, err := r.store.Offer(r.ctx, "anna", "phone", id(11), protocol.FileOffer{Path: p, Op: protocol.FilePut, SHA256: protocol.FileHash(two), Size: 100})
		if err != nil || rec.State != protocol.Rejected || rec.Code != protocol.CodePath {
			t.Errorf("%q: %+v, %v", p, rec, err)
		}
	}
	for _, bad := range []protocol.FileOffer{{Path: "patients/1/x", Op: "link"}, {Path: "patients/1/x", Op: protocol.FilePut, SHA256: "*", Size: 1}, {Path: "patients/1/x", Op: protocol.FilePut, SHA256: protocol.FileHash(two), Size: -1},
		{Path: "patients/1/x", Op: protocol.FileRemove, SHA256: protocol.FileHash(two)}, {Path: "patients/1/x", Op: protocol.FilePut, SHA256: protocol.FileHash(two), Base: "x"}, {Path: "patients/1/x", Op: protocol.FilePut, SHA256: protocol.FileHash(two), Type: "a\nb"}} {
		_, err := r.store.Offer(r.ctx, "anna", "phone", id(12), bad)
		r.code(fmt.Sprintf("%+v", bad), err, protocol.CodeMalformed)
	}
	// Another content than announced.
	rec, err = r.store.Offer(r.ctx, "anna", "phone", id(13), offer("patients/1/c.jpg", nil, two))
	r.must(err)
	if rec, err = r.store.Put(r.ctx, "anna", "phone", id(13), 1, content(8, 100)); err != nil || rec.State != protocol.FileStored {
		t.Errorf("%+v, %v", rec, err)
	}
	if rec, err = r.store.Commit(r.ctx, "anna", "phone", id(13)); err != nil || rec.State != protocol.Rejected || rec.Code != protocol.CodeFileContent {
		t.Errorf("%+v, %v", rec, err)
	}
	// Removing.
	if rec := r.upload("anna", id(14), protocol.FileOffer{Path: "patients/1/a.jpg", Op: protocol.FileRemove, Base: protocol.FileHash(one)}, nil); rec.State != protocol.Applied {
		t.Errorf("%+v", rec)
	}
	if _, err := r.store.Look(r.ctx, "patients/1/a.jpg"); !errors.Is(err, files.ErrNoFile) {
		t.Errorf("%v", err)
	}
	// A right that ends between offer and commit.
	_, err = r.store.Offer(r.ctx, "anna", "phone", id(15), offer("patients/1/d.jpg", nil, two))
	r.must(err)
	_, err = r.store.Put(r.ctx, "anna", "phone", id(15), 1, two)
	r.must(err)
	_, err = r.db.Exec(r.ctx, `UPDATE waystage.app_user SET attributes = '{"patients": "2"}' WHERE name = 'anna'`)
	r.must(err)
	if rec, err := r.store.Commit(r.ctx, "anna", "phone", id(15)); err != nil || rec.Code != protocol.CodeNotSubscribed {
		t.Errorf("%+v, %v", rec, err)
	}
	ups, err := r.store.Uploads(r.ctx, "anna", "", protocol.Rejected, 100)
	if err != nil || len(ups) != 9 {
		t.Errorf("%d rejected uploads, %v", len(ups), err)
	}
}

// A hash alone is no proof of having a content: whoever names that of another's file has to send it.
func TestHashIsNoTicket(t *testing.T) {
	r := newRig(t, files.Config{})
	secret := content(1, 1000)
	r.publish("patients/3/secret.jpg", secret) // bob's
	rec, err := r.store.Offer(r.ctx, "anna", "phone", id(1), offer("patients/1/mine.jpg", nil, secret))
	if err != nil || rec.State != protocol.FileReceiving {
		t.Fatalf("%+v, %v", rec, err)
	}
	if rec, err := r.store.Commit(r.ctx, "anna", "phone", id(1)); err != nil || rec.State != protocol.FileReceiving {
		t.Errorf("%+v, %v", rec, err)
	}
	_, err = r.fetch("anna", secret)
	r.code("by hash", err, protocol.CodeNotFound)
	// Bob may have it, and need not send it.
	if rec, err := r.store.Offer(r.ctx, "bob", "phone", id(1), offer("patients/3/copy.jpg", nil, secret)); err != nil || rec.State != protocol.FileStored {
		t.Errorf("%+v, %v", rec, err)
	}
}

func TestQuota(t *testing.T) {
	r := newRig(t, files.Config{UserBytes: 1000, UserFiles: 4, OpenUploads: 2})
	if rec := r.upload("anna", id(1), offer("patients/1/a", nil, content(1, 600)), content(1, 600)); rec.State != protocol.Applied {
		t.Fatalf("%+v", rec)
	}
	if rec := r.upload("anna", id(2), offer("patients/1/b", nil, content(2, 600)), content(2, 600)); rec.Code != protocol.CodeFileQuota {
		t.Errorf("%+v", rec)
	}
	// What takes another's place counts once.
	if rec := r.upload("anna", id(3), offer("patients/1/a", content(1, 600), content(2, 900)), content(2, 900)); rec.State != protocol.Applied {
		t.Errorf("%+v", rec)
	}
	if rec := r.upload("bob", id(1), offer("patients/3/a", nil, content(3, 900)), content(3, 900)); rec.State != protocol.Applied {
		t.Errorf("another user: %+v", rec)
	}
	for n := 4; n <= 5; n++ {
		if _, err := r.store.Offer(r.ctx, "anna", "phone", id(n), offer(fmt.Sprintf("patients/1/%d", n), nil, content(4, n))); err != nil {
			t.Error(err)
		}
	}
	_, err := r.store.Offer(r.ctx, "anna", "phone", id(6), offer("patients/1/6", nil, content(4, 6)))
	r.code("uploads at once", err, protocol.CodeBusy)
}

// What the store loses is known, and comes back from whoever publishes or brings it again.
func TestLostContent(t *testing.T) {
	r := newRig(t, files.Config{})
	manual, wound := content(1, 2*protocol.FileChunk+1), content(2, 50)
	r.publish("manuals/pump.pdf", manual)
	if rec := r.upload("anna", id(1), offer("patients/1/a.jpg", nil, wound), wound); rec.State != protocol.Applied {
		t.Fatalf("%+v", rec)
	}
	check := func(lost ...string) {
		t.Helper()
		c, err := r.store.Check(r.ctx, false, nil)
		r.must(err)
		var got []string
		for _, f := range c.Lost {
			got = append(got, f.Path)
		}
		if !slices.Equal(got, lost) || c.Files != 2 {
			t.Errorf("lost %v, want %v; %+v", got, lost, c)
		}
	}
	check()
	r.wipe(manual[protocol.FileChunk : 2*protocol.FileChunk])
	r.wipe(wound)
	_, err := r.fetch("anna", manual)
	r.code("lost", err, protocol.CodeFileLost)
	check("manuals/pump.pdf", "patients/1/a.jpg")
	if list, err := r.store.List(r.ctx, "", false); err != nil || len(list) != 2 || !list[0].Lost {
		t.Errorf("%+v, %v", list, err)
	}
	before, err := r.store.Look(r.ctx, "manuals/pump.pdf")
	r.must(err)
	if f, changed := r.publish("manuals/pump.pdf", manual); changed || f.Lost || f.Version != before.Version {
		t.Errorf("%+v, %t", f, changed)
	}
	check("patients/1/a.jpg")
	// Bob may not see it, and cannot bring it; anna can, and so could one who may see it without the right to put.
	if rec := r.upload("bob", id(1), offer("patients/1/a.jpg", wound, wound), wound); rec.Code != protocol.CodeNotSubscribed {
		t.Errorf("%+v", rec)
	}
	if rec := r.upload("anna", id(2), offer("patients/1/a.jpg", wound, wound), wound); rec.State != protocol.Applied {
		t.Errorf("%+v", rec)
	}
	check()
	r.wipe(manual[:protocol.FileChunk])
	check("manuals/pump.pdf")
	if rec := r.upload("clerk", id(1), offer("manuals/pump.pdf", manual, manual), manual); rec.Code != protocol.CodeNotSubscribed {
		t.Errorf("%+v", rec)
	}
	if rec := r.upload("bob", id(2), offer("manuals/pump.pdf", manual, manual), manual); rec.State != protocol.Applied {
		t.Errorf("%+v", rec)
	}
	check()
	if f, err := r.store.Look(r.ctx, "manuals/pump.pdf"); err != nil || f.Version != before.Version || f.Origin != "" {
		t.Errorf("%+v, %v", f, err)
	}
}

func TestCollect(t *testing.T) {
	r := newRig(t, files.Config{Grace: time.Nanosecond, Abandoned: time.Hour})
	shared := content(1, protocol.FileChunk)
	one, two := append(slices.Clone(shared), 1), append(slices.Clone(shared), 2)
	r.publish("manuals/a", one)
	r.publish("manuals/b", two)
	collect := func() files.Collected {
		t.Helper()
		n, err := r.store.Collect(r.ctx)
		r.must(err)
		return n
	}
	if n := collect(); n != (files.Collected{}) {
		t.Errorf("%+v", n)
	}
	r.must(r.store.Remove(r.ctx, "manuals/a", "test"))
	if n := collect(); n.Contents != 1 || n.Chunks != 1 { // the first chunk is b's, too
		t.Errorf("%+v", n)
	}
	if _, err := r.fetch("anna", two); err != nil {
		t.Error(err)
	}
	r.publish("manuals/b", content(5, 10))
	if n := collect(); n.Before != 1 || n.Contents != 1 || n.Chunks != 2 {
		t.Errorf("%+v", n)
	}
	// An upload under way keeps its chunks; one that was given up does not.
	up := content(6, 2*protocol.FileChunk)
	_, err := r.store.Offer(r.ctx, "anna", "phone", id(1), offer("patients/1/a", nil, up))
	r.must(err)
	_, err = r.store.Put(r.ctx, "anna", "phone", id(1), 1, up[:protocol.FileChunk])
	r.must(err)
	if n := collect(); n != (files.Collected{}) {
		t.Errorf("%+v", n)
	}
	_, err = r.db.Exec(r.ctx, `UPDATE waystage.upload SET touched_at = now() - interval '2 hours'`)
	r.must(err)
	if n := collect(); n.Uploads != 1 || n.Chunks != 1 {
		t.Errorf("%+v", n)
	}
	_, err = r.store.Put(r.ctx, "anna", "phone", id(1), 2, up[protocol.FileChunk:])
	r.code("forgotten", err, protocol.CodeNotFound)
	if rec := r.upload("anna", id(1), offer("patients/1/a", nil, up), up); rec.State != protocol.Applied {
		t.Errorf("%+v", rec)
	}
}

// Publishing, removing and collecting at the same time loses no content that a file has.
func TestCollectRaces(t *testing.T) {
	r := newRig(t, files.Config{Grace: time.Nanosecond})
	same := content(1, protocol.FileChunk+1)
	ctx, cancel := context.WithCancel(r.ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			if _, err := r.store.Collect(ctx); err != nil && ctx.Err() == nil && !strings.Contains(err.Error(), "23503") {
				t.Error(err)
			}
		}
	})
	for i := range 60 {
		path := fmt.Sprintf("manuals/%d", i%3)
		if i%4 == 3 {
			if err := r.store.Remove(r.ctx, path, "test"); err != nil && !errors.Is(err, files.ErrNoFile) {
				t.Error(err)
			}
		} else {
			r.publish(path, same)
		}
	}
	cancel()
	wg.Wait()
	c, err := r.store.Check(r.ctx, true, nil)
	r.must(err)
	// With no grace at all a chunk may go between its storing and its naming; then it is known to be lost, and publishing heals.
	for _, f := range c.Lost {
		r.publish(f.Path, same)
	}
	if c, err = r.store.Check(r.ctx, true, nil); err != nil || len(c.Lost) > 0 {
		t.Errorf("%+v, %v", c.Lost, err)
	}
}

func TestDirectory(t *testing.T) {
	r := newRig(t, files.Config{MaxSize: 1000})
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		r.must(os.MkdirAll(filepath.Dir(path), 0o755))
		r.must(os.WriteFile(path, []byte(text), 0o644))
	}
	write("a.txt", "a")
	write("sub/b.txt", "b")
	write("sub/spa\u0301t.txt", "decomposed")
	write(".git/config", "hidden")
	write("big", strings.Repeat("x", 1001))
	write("nul.txt", "reserved")
	r.must(os.Symlink("/etc/passwd", filepath.Join(dir, "link")))
	r.must(os.Symlink("/etc", filepath.Join(dir, "folder")))
	r.publish("manuals/by-hand", []byte("x"))
	d := r.store.NewDirectory(dir)
	o := files.DirectoryOptions{Prefix: "manuals", Delete: true, By: "test"}
	sync := func(published, removed string, skipped int) files.Synced {
		t.Helper()
		s, err := d.Sync(r.ctx, o)
		r.must(err)
		if got := strings.Join(s.Published, " "); got != published || strings.Join(s.Removed, " ") != removed || len(s.Skipped) != skipped {
			t.Errorf("%+v, want published %q, removed %q, %d skipped", s, published, removed, skipped)
		}
		return s
	}
	dry := o
	dry.DryRun = true
	if s, err := d.Sync(r.ctx, dry); err != nil || len(s.Published) != 3 {
		t.Errorf("%+v, %v", s, err)
	}
	sync("manuals/a.txt manuals/sub/b.txt manuals/sub/sp\u00e1t.txt", "", 2)
	sync("", "", 2)
	write("a.txt", "A")
	r.must(os.Remove(filepath.Join(dir, "sub/b.txt")))
	sync("manuals/a.txt", "manuals/sub/b.txt", 2)
	// The store loses a content: only the directory's next look brings it back.
	r.wipe([]byte("A"))
	if c, err := r.store.Check(r.ctx, false, nil); err != nil || len(c.Lost) != 1 {
		t.Fatalf("%+v, %v", c, err)
	}
	sync("manuals/a.txt", "", 2)
	if c, err := r.store.Check(r.ctx, true, nil); err != nil || len(c.Lost) != 0 {
		t.Errorf("%+v, %v", c, err)
	}
	// What a device has changed is not published over unseen.
	_, err := r.db.Exec(r.ctx, `UPDATE waystage.file SET origin = 'device' WHERE path = 'manuals/a.txt'`)
	r.must(err)
	write("a.txt", "again")
	sync("", "", 3)
	o.Over = true
	sync("manuals/a.txt", "", 2)
	// An empty directory removes nothing unless told to.
	r.must(os.RemoveAll(dir))
	if _, err := d.Sync(r.ctx, o); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	r.must(os.Mkdir(dir, 0o755))
	if _, err := d.Sync(r.ctx, o); !errors.Is(err, files.ErrEmpty) {
		t.Errorf("%v", err)
	}
	o.Empty = true
	sync("", "manuals/a.txt manuals/sub/sp\u00e1t.txt", 0)
	if list, err := r.store.List(r.ctx, "", false); err != nil || len(list) != 1 || list[0].Path != "manuals/by-hand" {
		t.Errorf("%+v, %v", list, err)
	}
}
