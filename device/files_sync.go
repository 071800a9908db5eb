package device

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// FileTransport carries the calls for files. A Transport that has them too lets the device keep files.
type FileTransport interface {
	FileGet(ctx context.Context, sha256 string, n int) ([]byte, error)
	FileOffer(ctx context.Context, id string, o protocol.FileOffer) (protocol.FileReceipt, error)
	FilePut(ctx context.Context, id string, n int, data []byte) (protocol.FileReceipt, error)
	FileCommit(ctx context.Context, id string) (protocol.FileReceipt, error)
}

// FileTotals count the files of a sync.
type FileTotals struct {
	Fetched  int   `json:"fetched"`  // contents
	Bytes    int64 `json:"bytes"`    // of them
	Sent     int   `json:"sent"`     // changes made here that got their outcome
	Rejected int   `json:"rejected"` // of these
	Missing  int   `json:"missing"`  // contents that are still to be fetched
}

// filing is the files' part of one sync.
type filing struct {
	d   *Device
	tr  FileTransport // nil: no files are kept, or the transport carries none
	rep *FileTotals
	o   SyncOptions
}

// before is what goes before the rows.
func (x *filing) before(ctx context.Context) error {
	if x.tr == nil {
		return nil
	}
	return x.send(ctx)
}

// after is what follows the rows; earlier is what went wrong before them.
func (x *filing) after(ctx context.Context, earlier error) error {
	if x.tr == nil {
		return nil
	}
	err := earlier
	if err == nil {
		err = x.send(ctx) // what the replies have asked for
	}
	if ferr := x.fetchAll(ctx); err == nil {
		err = ferr
	}
	if serr := x.d.sweep(ctx); err == nil {
		err = serr
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, ErrFiles) && !errors.Is(err, ErrBlocked) {
		err = fmt.Errorf("device: %w: rows are synced: %w", ErrFiles, err)
	}
	return err
}

// call repeats what the server is too busy for.
func (x *filing) call(ctx context.Context, f func() error) error {
	for tries := 1; ; tries++ {
		err := f()
		var e *protocol.Error
		switch {
		case err == nil, ctx.Err() != nil, tries >= transient:
			return err
		case !errors.As(err, &e):
			if errors.Is(err, ErrBlocked) || tries >= 2 {
				return err
			}
			if perr := pause(ctx, x.d.patience.busy); perr != nil {
				return perr
			}
		case e.Code == protocol.CodeBusy, e.Code == protocol.CodeInternal:
			wait := x.d.patience.busy
			if e.Retry > 0 {
				wait = min(time.Duration(e.Retry)*time.Second, x.d.patience.longest)
			}
			if perr := pause(ctx, wait); perr != nil {
				return perr
			}
		default:
			return err
		}
	}
}

// fetch brings one content here: chunk by chunk into a temporary file, which a break leaves for the next attempt, and under its
// name only when it has the right hash.
func (x *filing) fetch(ctx context.Context, sha string, size int64) error {
	if x.d.hasBlob(sha, size) {
		return x.arrived(ctx, sha, nil)
	}
	for again := false; ; again = true {
		whole, err := x.chunks(ctx, sha, size)
		if err != nil {
			if errors.Is(err, ErrDisk) { // the rows need the room more
				_ = os.Remove(x.d.part(sha))
			}
			return err
		}
		if whole {
			break
		}
		// A break in the power may have left anything in it; but the server's content twice in a row is the server's fault.
		if err := os.Remove(x.d.part(sha)); err != nil {
			return err
		}
		if again {
			return fmt.Errorf("%w: content %s has another hash", ErrReply, sha)
		}
	}
	x.rep.Fetched++
	return x.arrived(ctx, sha, func() error { return x.d.settleBlob(x.d.part(sha), sha) })
}

// chunks completes the temporary file, and tells whether it is what it should be.
func (x *filing) chunks(ctx context.Context, sha string, size int64) (whole bool, err error) {
	if err := os.MkdirAll(filepath.Join(x.d.files, "tmp"), 0o700); err != nil {
		return false, diskError(err)
	}
	part, err := os.OpenFile(x.d.part(sha), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return false, diskError(err)
	}
	defer func() { _ = part.Close() }()
	info, err := part.Stat()
	if err != nil {
		return false, err
	}
	have := int(info.Size() / protocol.FileChunk)
	if info.Size() >= size {
		have = protocol.FileChunks(size)
	}
	for n := have + 1; n <= protocol.FileChunks(size); n++ {
		var data []byte
		err := x.call(ctx, func() (err error) {
			data, err = x.tr.FileGet(ctx, sha, n)
			return err
		})
		if err != nil {
			return false, err
		}
		if len(data) != protocol.FileChunkSize(size, n) {
			return false, fmt.Errorf("%w: chunk %d of content %s has %d bytes", ErrReply, n, sha, len(data))
		}
		if _, err := part.WriteAt(data, int64(n-1)*protocol.FileChunk); err != nil {
			return false, diskError(err)
		}
		x.rep.Bytes += int64(len(data))
		x.o.Progress(Progress{Stage: StageFiles, Done: min(int64(n)*protocol.FileChunk, size), Total: size})
	}
	if err := part.Truncate(size); err != nil {
		return false, diskError(err)
	}
	if err := part.Sync(); err != nil {
		return false, diskError(err)
	}
	got, _, err := hashFile(ctx, part.Name())
	return got == sha, err
}

// arrived shows a content under the paths that want it.
func (x *filing) arrived(ctx context.Context, sha string, settle func() error) error {
	return x.d.write(ctx, func(t *txn) error {
		if settle != nil {
			if err := settle(); err != nil {
				return err
			}
		}
		x.d.sweepDue.Store(true)
		return t.exec(`UPDATE _ws_file SET have = sha, why = '' WHERE sha = ?`, sha)
	})
}

// wanted is a content that is to be fetched.
type wanted struct {
	sha  string
	size int64
}

// fetchAll brings what is missing, but for files of sets that are closed. What the server cannot give now is noted and stops nothing; trouble with the connection or
// the disk ends it.
func (x *filing) fetchAll(ctx context.Context) error {
	var list []wanted
	err := x.d.read(ctx, func(t *txn) error {
		list = nil
		now := time.Now().Unix()
		return t.each(`SELECT DISTINCT f.sha, f.size FROM _ws_file f WHERE f.have <> f.sha AND EXISTS (SELECT 1 FROM _ws_file_member m JOIN _ws_set s ON s.name = m.set_name
			WHERE m.path = f.path AND NOT (s.closed_at <= ? AND ? < s.closed_until)) ORDER BY f.size, f.sha`, []any{now, now}, func(scan func(...any) error) error {
			list = append(list, wanted{})
			return scan(&list[len(list)-1].sha, &list[len(list)-1].size)
		})
	})
	if err != nil {
		return err
	}
	for i, w := range list {
		err := x.fetch(ctx, w.sha, w.size)
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return err
		}
		x.rep.Missing++
		if nerr := x.d.write(ctx, func(t *txn) error {
			return t.exec(`UPDATE _ws_file SET why = ? WHERE sha = ? AND have <> sha`, err.Error(), w.sha)
		}); nerr != nil {
			return nerr
		}
		var e *protocol.Error
		if errors.As(err, &e) && e.Code != protocol.CodeBlocked || errors.Is(err, ErrReply) {
			x.d.log.Warn("the content of a file cannot be fetched now", zap.String("sha256", w.sha), zap.Error(err))
			continue
		}
		x.rep.Missing += len(list) - i - 1
		return fmt.Errorf("device: %w: rows are synced, the contents of %d files are to be fetched: %w", ErrFiles, x.rep.Missing, err)
	}
	return nil
}

// required brings, before a reply is applied, the contents of files that its rows name and must not come before. Those that the
// server does not have (any more) are not waited for: nobody knows when they come.
func (x *filing) required(ctx context.Context, sess *session) error {
	if x.tr == nil {
		return nil
	}
	var need []wanted
	err := x.d.read(ctx, func(t *txn) (err error) {
		need, err = x.d.requiredBy(t, sess)
		return err
	})
	if err != nil {
		return err
	}
	for _, w := range need {
		err := x.fetch(ctx, w.sha, w.size)
		var e *protocol.Error
		switch {
		case err == nil:
		case errors.As(err, &e) && (e.Code == protocol.CodeNotFound || e.Code == protocol.CodeFileLost):
			x.d.log.Warn("the content of a file that rows name is not at the server; the rows do not wait for it", zap.String("sha256", w.sha), zap.Error(err))
		case ctx.Err() != nil:
			return err
		default:
			return fmt.Errorf("device: %w: the rows of set %s wait for the content of a file: %w", ErrFiles, sess.Set, err)
		}
	}
	return nil
}

// requiredBy lists what the reply in the inbox requires.
func (d *Device) requiredBy(t *txn, sess *session) ([]wanted, error) {
	pages, err := t.pages()
	if err != nil {
		if errors.Is(err, errNotOurs) {
			return nil, nil // apply finds out
		}
		return nil, err
	}
	columns := map[string]string{} // by table: the column that names the file
	note := func(tab protocol.Table) {
		delete(columns, tab.Name)
		if tab.FileBefore && tab.FileColumn != "" {
			columns[tab.Name] = tab.FileColumn
		}
	}
	c, err := t.load()
	if err != nil {
		return nil, err
	}
	if s := c.set(sess.Set); s != nil {
		for _, m := range s.Tables {
			note(m.Def)
		}
	}
	named, told := map[string]bool{}, map[string]wanted{}
	for _, p := range pages {
		page, err := d.page(t, p.page)
		if err != nil {
			return nil, err
		}
		if page.Schema != nil {
			for _, tab := range page.Schema.Tables {
				note(tab)
			}
		}
		for _, part := range page.Files {
			for _, e := range part.Files {
				if err := checkEntry(e); err != nil {
					return nil, err
				}
				told[e.Path] = wanted{e.SHA256, e.Size}
			}
		}
		for _, rows := range page.Tables {
			at := -1
			for i, col := range rows.Columns {
				if col == columns[rows.Table] {
					at = i
				}
			}
			for _, r := range rows.Rows {
				if at >= 0 && at < len(r.Values) && r.Values[at] != nil {
					named[*r.Values[at]] = true
				}
			}
		}
	}
	var need []wanted
	for path := range named {
		w, ok := told[path]
		if !ok {
			err := t.each(`SELECT sha, size FROM _ws_file WHERE path = ? AND have <> sha`, []any{path}, func(scan func(...any) error) error {
				ok = true
				return scan(&w.sha, &w.size)
			})
			if err != nil {
				return nil, err
			}
		}
		if ok && !d.hasBlob(w.sha, w.size) {
			need = append(need, w)
		}
	}
	return need, nil
}

// send brings the changes made here to the server, each to its outcome. What goes wrong with one is noted with it; trouble with the
// connection ends it, and the next sync goes on.
func (x *filing) send(ctx context.Context) error {
	for {
		var u outgoing
		err := x.d.write(ctx, func(t *txn) error {
			u = outgoing{}
			err := t.each(`SELECT id, path, op, base, sha, size, type, heal FROM _ws_upload WHERE state IN ('unsent', 'sent') AND after = '' ORDER BY seq LIMIT 1`, nil, func(scan func(...any) error) error {
				return scan(&u.id, &u.offer.Path, &u.offer.Op, &u.offer.Base, &u.offer.SHA256, &u.offer.Size, &u.offer.Type, &u.heal)
			})
			if err != nil || u.id == "" {
				return err
			}
			return t.exec(`UPDATE _ws_upload SET state = 'sent' WHERE id = ?`, u.id)
		})
		if err != nil || u.id == "" {
			return err
		}
		r, err := x.upload(ctx, &u)
		var e *protocol.Error
		if errors.As(err, &e) && e.Code != protocol.CodeBusy && e.Code != protocol.CodeInternal && e.Code != protocol.CodeBlocked {
			r, err = protocol.FileReceipt{State: protocol.Rejected, Code: e.Code, Detail: e.Message}, nil // the call itself: again would be the same
		}
		if err != nil {
			return explain("file "+u.offer.Path, err)
		}
		if !u.heal {
			x.rep.Sent++
			if r.State == protocol.Rejected {
				x.rep.Rejected++
			}
		}
		if err := x.d.write(ctx, func(t *txn) error { return t.decided(&u, r) }); err != nil {
			return err
		}
		x.d.sweepDue.Store(true)
	}
}

// outgoing is a change on its way.
type outgoing struct {
	id    string
	offer protocol.FileOffer
	heal  bool // not the user's: the server has lost the content and asked for it
}

// upload brings one change to its outcome.
func (x *filing) upload(ctx context.Context, u *outgoing) (r protocol.FileReceipt, err error) {
	call := func(f func() (protocol.FileReceipt, error)) error {
		return x.call(ctx, func() error {
			r, err = f()
			return err
		})
	}
	var content *os.File
	if u.offer.Op == protocol.FilePut {
		if content, err = os.Open(x.d.blob(u.offer.SHA256)); err != nil {
			return protocol.FileReceipt{State: protocol.Rejected, Code: protocol.CodeFileContent, Detail: "the content is not on the device any more"}, nil
		}
		defer func() { _ = content.Close() }()
	}
	offer := func() (protocol.FileReceipt, error) { return x.tr.FileOffer(ctx, u.id, u.offer) }
	if err := call(offer); err != nil {
		return r, err
	}
	buf := make([]byte, protocol.FileChunk)
	for lost := 0; ; {
		switch r.State {
		case protocol.Applied, protocol.Rejected:
			return r, nil
		case protocol.FileReceiving:
			if len(r.Missing) == 0 {
				return r, fmt.Errorf("%w: an upload that waits for nothing", ErrReply)
			}
			n := r.Missing[0]
			size := protocol.FileChunkSize(u.offer.Size, n)
			if size == 0 {
				return r, fmt.Errorf("%w: it wants chunk %d of a file of %d bytes", ErrReply, n, u.offer.Size)
			}
			if _, err := content.ReadAt(buf[:size], int64(n-1)*protocol.FileChunk); err != nil {
				return protocol.FileReceipt{State: protocol.Rejected, Code: protocol.CodeFileContent, Detail: "the content on the device is damaged: " + err.Error()}, nil
			}
			err := call(func() (protocol.FileReceipt, error) { return x.tr.FilePut(ctx, u.id, n, buf[:size]) })
			var e *protocol.Error
			if errors.As(err, &e) && e.Code == protocol.CodeNotFound && lost < transient { // forgotten: from the beginning
				lost++
				err = call(offer)
			}
			if err != nil {
				return r, err
			}
			x.o.Progress(Progress{Stage: StageFiles, Done: int64(n-1)*protocol.FileChunk + int64(size), Total: u.offer.Size})
		case protocol.FileStored:
			if lost++; lost > 2*transient {
				return r, fmt.Errorf("%w: the server loses what it is sent", ErrReply)
			}
			err := call(func() (protocol.FileReceipt, error) { return x.tr.FileCommit(ctx, u.id) })
			var e *protocol.Error
			if errors.As(err, &e) && e.Code == protocol.CodeNotFound {
				err = call(offer)
			}
			if err != nil {
				return r, err
			}
		default:
			return r, fmt.Errorf("%w: unknown state %q of an upload", ErrReply, r.State)
		}
	}
}

// decided notes the outcome of a change. What was made on top of it goes on from there: on the new content if it was applied, on the
// old one if it was not (as rule D9 for rows).
func (t *txn) decided(u *outgoing, r protocol.FileReceipt) error {
	seq, err := t.tick()
	if err != nil {
		return err
	}
	settled, base := 0, u.offer.SHA256
	if r.State == protocol.Rejected {
		settled, base = 1, u.offer.Base
	}
	if u.heal {
		settled = 1
	}
	if err := t.exec(`UPDATE _ws_upload SET state = ?, version = ?, code = ?, detail = ?, right = ?, final = ?, final_seq = ?, settled = ? WHERE id = ?`,
		r.State, r.Version, string(r.Code), r.Detail, r.Right, now(), seq, settled, u.id); err != nil {
		return err
	}
	return t.exec(`UPDATE _ws_upload SET base = ?, after = '' WHERE after = ?`, base, u.id)
}

// sweep removes contents that nothing names any more, and what broken attempts have left. It holds the file's lock, under which
// contents come.
func (d *Device) sweep(ctx context.Context) error {
	if d.files == "" || !d.sweepDue.Swap(false) {
		return nil
	}
	return d.write(ctx, func(t *txn) error {
		if err := t.exec(`DELETE FROM _ws_upload WHERE final IS NOT NULL AND settled = 1 AND (heal = 1 OR final < ?)`, time.Now().Add(-usualRetention.Receipts).UnixMilli()); err != nil {
			return err
		}
		keep := map[string]bool{}
		err := t.each(`SELECT sha FROM _ws_file UNION SELECT have FROM _ws_file
			UNION SELECT sha FROM _ws_upload WHERE final IS NULL OR settled = 0 OR state = 'rejected' OR final >= ?`, []any{time.Now().Add(-uploaded).UnixMilli()}, func(scan func(...any) error) error {
			var sha string
			err := scan(&sha)
			keep[sha] = true
			return err
		})
		if err != nil {
			return err
		}
		folders, err := os.ReadDir(d.files)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			return err
		}
		for _, folder := range folders {
			list, err := os.ReadDir(filepath.Join(d.files, folder.Name()))
			if err != nil {
				continue // not a folder of ours
			}
			for _, e := range list {
				sha := strings.TrimSuffix(e.Name(), ".part")
				switch ours := protocol.ValidFileHash(sha); {
				case ours && keep[sha]:
					continue
				case !ours && folder.Name() == "tmp":
					info, err := e.Info()
					if err != nil || time.Since(info.ModTime()) < time.Hour {
						continue // somebody may be writing it
					}
				case !ours:
					continue
				}
				if err := os.Remove(filepath.Join(d.files, folder.Name(), e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
					return err
				}
			}
		}
		return nil
	})
}
