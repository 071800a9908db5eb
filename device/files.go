package device

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/waystage/waystage/protocol"
)

// Files are the files that the device's user subscribes to. Their contents lie in a folder beside the SQLite file, each under
// its hash: a path never becomes a name in the file system, equal contents are there once, and a content appears under
// its name only when it is whole and has been checked. Which path has which content is in the SQLite file.
type Files struct{ d *Device }

// Files gives access to the files.
func (d *Device) Files() *Files { return &Files{d} }

// States of a file, seen from the device.
const (
	FileHere    = "here"    // its content is here
	FileOlder   = "older"   // an older content is here, the newer one is to be fetched
	FileMissing = "missing" // its content is to be fetched
	FilePending = "pending" // put here, and without an outcome yet
)

// FileInfo is one file as the device shows it.
type FileInfo struct {
	Path   string `json:"path"`
	State  string `json:"state"`
	SHA256 string `json:"sha256,omitempty"` // of the content that is here
	Size   int64  `json:"size"`             // of the file as the server has it, or as it was put here
	Type   string `json:"type,omitempty"`
	Why    string `json:"why,omitempty"` // missing or older: what went wrong when it was last fetched
}

// FileUpload is a change of a file that was made here, and what has become of it.
type FileUpload struct {
	ID      string        `json:"id"`
	Path    string        `json:"path"`
	Op      string        `json:"op"`    // put, rm
	State   string        `json:"state"` // unsent, sent, applied, rejected
	SHA256  string        `json:"sha256,omitempty"`
	Size    int64         `json:"size"`
	Made    time.Time     `json:"made"`
	Final   time.Time     `json:"final,omitzero"`
	Version string        `json:"version,omitempty"`
	Code    protocol.Code `json:"code,omitempty"` // rejected: why
	Detail  string        `json:"detail,omitempty"`
	Right   string        `json:"right,omitempty"`  // rejected: hash of what the server has instead
	Record  string        `json:"record,omitempty"` // a record that names the file and was rejected: why
}

// Errors of Files.
var (
	ErrNoFiles   = errors.New("the device keeps no files: open it with a path, or set Options.Files")
	ErrNoFile    = errors.New("there is no such file")
	ErrFileAway  = errors.New("the content of the file is not here yet")
	ErrNoUpload  = errors.New("no file subscription lets this device put or remove the file")
	ErrFileLarge = errors.New("the file is larger than its file subscription allows")
	ErrDisk      = errors.New("the disk is full")
	ErrFiles     = errors.New("files are not complete")
)

// uploaded is how long a content that was put here is kept after its outcome: the server may lose it, and ask for it.
const uploaded = 7 * 24 * time.Hour

// blob is where a content lies.
func (d *Device) blob(sha string) string { return filepath.Join(d.files, sha[:2], sha) }

func (d *Device) part(sha string) string { return filepath.Join(d.files, "tmp", sha+".part") }

func (d *Device) hasBlob(sha string, size int64) bool {
	info, err := os.Stat(d.blob(sha))
	return err == nil && info.Size() == size
}

// diskError gives a full disk its name.
func diskError(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrDisk, err)
	}
	return err
}

// settleBlob lets a written content appear under its name, durably. Its transaction holds the lock of the SQLite file: nobody sweeps
// meanwhile.
func (d *Device) settleBlob(from, sha string) error {
	to := d.blob(sha)
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return diskError(err)
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(to))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) { // some systems cannot
		return err
	}
	return nil
}

// List lists the files as the device shows them, in the order of their paths.
func (f *Files) List(ctx context.Context) (list []FileInfo, err error) {
	err = f.d.read(ctx, func(t *txn) error {
		list = nil
		return t.each(visible+` ORDER BY path`, nil, func(scan func(...any) error) error {
			info, err := scanFile(scan)
			list = append(list, info)
			return err
		})
	})
	return list, err
}

// visible are the files as the device shows them: a change made here stands over what the server has, until its outcome is known
// and the server's word has come.
const visible = `SELECT * FROM (
	SELECT f.path, f.have AS have, f.sha, f.size, f.type, f.why, 0 AS pending FROM _ws_file f
	WHERE NOT EXISTS (SELECT 1 FROM _ws_upload u WHERE u.path = f.path AND u.settled = 0)
	UNION ALL
	SELECT u.path, u.sha, u.sha, u.size, u.type, '', u.state <> 'applied' FROM _ws_upload u
	WHERE u.settled = 0 AND u.op = 'put' AND u.seq = (SELECT max(v.seq) FROM _ws_upload v WHERE v.path = u.path AND v.settled = 0)) AS visible`

func scanFile(scan func(...any) error) (FileInfo, error) {
	var i FileInfo
	var sha string
	var pending bool
	err := scan(&i.Path, &i.SHA256, &sha, &i.Size, &i.Type, &i.Why, &pending)
	switch {
	case pending:
		i.State = FilePending
	case i.SHA256 == sha:
		i.State = FileHere
	case i.SHA256 == "":
		i.State = FileMissing
	default:
		i.State = FileOlder
	}
	return i, err
}

// Open opens the content of a file for reading. ErrNoFile, ErrFileAway.
func (f *Files) Open(ctx context.Context, path string) (*os.File, FileInfo, error) {
	if f.d.files == "" {
		return nil, FileInfo{}, fmt.Errorf("device: %w", ErrNoFiles)
	}
	var info FileInfo
	var content *os.File
	err := f.d.read(ctx, func(t *txn) error {
		err := t.each(visible+` WHERE path = ?`, []any{path}, func(scan func(...any) error) (err error) {
			info, err = scanFile(scan)
			return err
		})
		switch {
		case err != nil:
			return err
		case info.Path == "":
			return fmt.Errorf("%s: %w", path, ErrNoFile)
		case info.SHA256 == "":
			return fmt.Errorf("%s: %w", path, ErrFileAway)
		}
		content, err = os.Open(f.d.blob(info.SHA256))
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s: %w: it was removed from %s by somebody else; 'check' fetches it again", path, ErrFileAway, f.d.files)
		}
		return err
	})
	return content, info, err
}

// Put makes a content the file of a path: visible here at once, and sent with the next sync. What the server decides comes
// with that, see Uploads. The content is kept until then. ErrNoUpload, ErrFileLarge, ErrDisk; a *protocol.Error for a path that cannot be one.
func (f *Files) Put(ctx context.Context, path, contentType string, content io.Reader) (up FileUpload, err error) {
	d := f.d
	if d.files == "" {
		return up, fmt.Errorf("device: %w", ErrNoFiles)
	}
	if err := protocol.CheckPath(path); err != nil {
		return up, fmt.Errorf("device: %w", err)
	}
	if err := protocol.CheckContentType(contentType); err != nil {
		return up, fmt.Errorf("device: %w", err)
	}
	def, err := f.subscription(ctx, path)
	if err != nil {
		return up, err
	}
	if err := os.MkdirAll(filepath.Join(d.files, "tmp"), 0o700); err != nil {
		return up, fmt.Errorf("device: %w", diskError(err))
	}
	tmp, err := os.CreateTemp(filepath.Join(d.files, "tmp"), "put-")
	if err != nil {
		return up, fmt.Errorf("device: %w", diskError(err))
	}
	defer func() {
		_ = tmp.Close()
		_ = os.Remove(tmp.Name()) // gone already if all went well
	}()
	sum := sha256.New()
	size, err := io.Copy(io.MultiWriter(tmp, sum), io.LimitReader(content, def.maxSize+1))
	switch {
	case err != nil:
		return up, fmt.Errorf("device: put %s: %w", path, diskError(err))
	case size > def.maxSize:
		return up, fmt.Errorf("device: put %s: %w: %d bytes", path, ErrFileLarge, def.maxSize)
	}
	if err := tmp.Sync(); err != nil {
		return up, fmt.Errorf("device: put %s: %w", path, diskError(err))
	}
	sha := hex.EncodeToString(sum.Sum(nil))
	err = d.write(ctx, func(t *txn) error {
		if err := d.settleBlob(tmp.Name(), sha); err != nil {
			return err
		}
		up, err = t.change(FileUpload{Path: path, Op: protocol.FilePut, SHA256: sha, Size: size}, contentType, def.set)
		return err
	})
	return up, err
}

// Remove removes a file: here at once, at the server with the next sync. ErrNoFile, ErrNoUpload.
func (f *Files) Remove(ctx context.Context, path string) (up FileUpload, err error) {
	if f.d.files == "" {
		return up, fmt.Errorf("device: %w", ErrNoFiles)
	}
	def, err := f.subscription(ctx, path)
	if err != nil {
		return up, err
	}
	err = f.d.write(ctx, func(t *txn) error {
		var there bool
		if err := t.get(`SELECT EXISTS (`+visible+` WHERE path = ?)`, []any{path}, &there); err != nil {
			return err
		}
		if !there {
			return fmt.Errorf("%s: %w", path, ErrNoFile)
		}
		up, err = t.change(FileUpload{Path: path, Op: protocol.FileRemove}, "", def.set)
		return err
	})
	f.d.sweepDue.Store(true)
	return up, err
}

// fileDef is a file subscription as the device knows it.
type fileDef struct {
	set     string
	maxSize int64
}

// subscription finds the file subscription by which a path may be changed.
func (f *Files) subscription(ctx context.Context, path string) (def fileDef, err error) {
	found := false
	err = f.d.read(ctx, func(t *txn) error {
		return t.each(`SELECT d.set_name, d.pattern, d.max_size FROM _ws_file_def d JOIN _ws_set s ON s.name = d.set_name WHERE d.upload = 1 AND s.gone = 0 ORDER BY s.ord, d.ord`,
			nil, func(scan func(...any) error) error {
				var one fileDef
				var pattern string
				if err := scan(&one.set, &pattern, &one.maxSize); err != nil {
					return err
				}
				p, err := protocol.ParsePattern(pattern)
				if err != nil {
					return err
				}
				if _, ok := p.Match(path); ok && !found {
					def, found = one, true
				}
				return nil
			})
	})
	if err == nil && !found {
		err = fmt.Errorf("device: %s: %w", path, ErrNoUpload)
	}
	return def, err
}

// change notes a change of a file. It is made on what the device shows: an earlier change that was not sent yet is replaced, one
// that is on its way is followed.
func (t *txn) change(up FileUpload, contentType, set string) (FileUpload, error) {
	up.ID, up.State, up.Made = randomHex(16), Unsent, time.Now().UTC().Truncate(time.Millisecond)
	var base, after, before, state, sha string
	err := t.get(`SELECT id, state, base, after, sha FROM _ws_upload WHERE path = ? AND settled = 0 ORDER BY seq DESC LIMIT 1`, []any{up.Path}, &before, &state, &base, &after, &sha)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		err = t.get(`SELECT CASE WHEN have <> '' THEN have ELSE sha END FROM _ws_file WHERE path = ?`, []any{up.Path}, &base)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return up, err
		}
	case err != nil:
		return up, err
	case state == Unsent:
		if err := t.exec(`DELETE FROM _ws_upload WHERE id = ?`, before); err != nil {
			return up, err
		}
		if up.Op == protocol.FileRemove && base == "" && after == "" { // nobody but this device has ever had it
			up.State = protocol.Applied
			return up, nil
		}
	case state == protocol.Applied:
		base, after = sha, ""
	default:
		base, after = "", before
	}
	seq, err := t.tick()
	if err != nil {
		return up, err
	}
	return up, t.exec(`INSERT INTO _ws_upload (id, seq, set_name, path, op, base, after, sha, size, type, state, made) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'unsent', ?)`,
		up.ID, seq, set, up.Path, up.Op, base, after, up.SHA256, up.Size, contentType, up.Made.UnixMilli())
}

// Uploads lists the changes of files that were made here, the newest first; final ones as long as receipts are kept.
func (f *Files) Uploads(ctx context.Context) (list []FileUpload, err error) {
	err = f.d.read(ctx, func(t *txn) error {
		list = nil
		return t.each(`SELECT id, path, op, state, sha, size, made, final, version, code, detail, right, record FROM _ws_upload WHERE heal = 0 ORDER BY seq DESC`, nil, func(scan func(...any) error) error {
			var u FileUpload
			var made int64
			var final sql.NullInt64
			if err := scan(&u.ID, &u.Path, &u.Op, &u.State, &u.SHA256, &u.Size, &made, &final, &u.Version, &u.Code, &u.Detail, &u.Right, &u.Record); err != nil {
				return err
			}
			u.Made = time.UnixMilli(made).UTC()
			if final.Valid {
				u.Final = time.UnixMilli(final.Int64).UTC()
			}
			list = append(list, u)
			return nil
		})
	})
	return list, err
}

// OpenUpload opens the content of a change that was made here, also of a rejected one. ErrNoFile, ErrFileAway.
func (f *Files) OpenUpload(ctx context.Context, id string) (*os.File, error) {
	var sha string
	err := f.d.read(ctx, func(t *txn) error { return t.get(`SELECT sha FROM _ws_upload WHERE id = ?`, []any{id}, &sha) })
	switch {
	case errors.Is(err, sql.ErrNoRows), err == nil && sha == "":
		return nil, fmt.Errorf("device: upload %s: %w", id, ErrNoFile)
	case err != nil:
		return nil, err
	}
	c, err := os.Open(f.d.blob(sha))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("device: upload %s: %w", id, ErrFileAway)
	}
	return c, err
}

// FilesChecked is the outcome of Check.
type FilesChecked struct {
	Contents int      `json:"contents"` // looked at
	Bytes    int64    `json:"bytes"`
	Bad      []string `json:"bad"` // paths whose content is damaged or gone: it is fetched with the next sync
}

// Check reads and hashes the contents. What is damaged is removed, and fetched again with the next sync.
func (f *Files) Check(ctx context.Context) (c FilesChecked, err error) {
	c.Bad = []string{}
	var names []string
	err = f.d.read(ctx, func(t *txn) error {
		names = nil
		return t.each(`SELECT DISTINCT have FROM _ws_file WHERE have <> ''`, nil, func(scan func(...any) error) error {
			names = append(names, "")
			return scan(&names[len(names)-1])
		})
	})
	if err != nil {
		return c, err
	}
	for _, sha := range names {
		got, size, err := hashFile(ctx, f.d.blob(sha))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return c, fmt.Errorf("device: %w", err)
		}
		c.Contents++
		c.Bytes += size
		if got == sha {
			continue
		}
		err = f.d.write(ctx, func(t *txn) error {
			if err := os.Remove(f.d.blob(sha)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			if err := t.each(`SELECT path FROM _ws_file WHERE have = ?`, []any{sha}, func(scan func(...any) error) error {
				c.Bad = append(c.Bad, "")
				return scan(&c.Bad[len(c.Bad)-1])
			}); err != nil {
				return err
			}
			return t.exec(`UPDATE _ws_file SET have = '', why = 'its content was damaged' WHERE have = ?`, sha)
		})
		if err != nil {
			return c, err
		}
	}
	return c, nil
}

func hashFile(ctx context.Context, name string) (sha string, size int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", 0, err
	}
	defer func() { _ = f.Close() }()
	sum := sha256.New()
	buf := make([]byte, 1<<20)
	for {
		n, err := f.Read(buf)
		sum.Write(buf[:n])
		size += int64(n)
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(sum.Sum(nil)), size, nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return "", size, err
		}
	}
}
