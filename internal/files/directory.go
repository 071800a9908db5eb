package files

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"mime"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
	"golang.org/x/text/unicode/norm"

	"github.com/waystage/waystage/protocol"
)

// DirectoryOptions say what of a directory is published, and how.
type DirectoryOptions struct {
	Prefix   string // put before the paths, e.g. "manuals"; empty: none
	Delete   bool   // remove files that were published from a directory, begin with Prefix, and are not there any more
	Empty    bool   // with Delete: even if nothing is left in the directory
	Over     bool   // publish also over what a device has changed since
	DryRun   bool   // only say what would be done
	By       string
	Progress func(done, total int64) // bytes; nil: nobody
}

// Synced is the outcome of publishing a directory.
type Synced struct {
	Published []string `json:"published"` // paths that are new or have another content
	Removed   []string `json:"removed"`
	Unchanged int      `json:"unchanged"`
	Skipped   []Skip   `json:"skipped"` // what cannot be published, with the reason
}

// Skip is a file of a directory that was left out.
type Skip struct {
	Path string `json:"path"` // in the directory
	Why  string `json:"why"`
}

// ErrEmpty refuses to remove everything: the directory may just not be mounted.
var ErrEmpty = errors.New("the directory has no files, but files were published from it: is it mounted?")

// errDevice keeps a directory from overwriting, unseen, what somebody in the field has done.
var errDevice = errors.New("a device has changed or removed the file since: take its content over ('waystage files get'), or publish over it ('waystage files put', 'waystage files sync --over')")

// Directory publishes a directory, and remembers what it has read: only what changed is read again.
type Directory struct {
	store *Store
	root  string
	seen  map[string]stat // by published path
}

type stat struct {
	size int64
	at   time.Time
	sha  string // hex
}

// NewDirectory makes one. It does no I/O.
func (s *Store) NewDirectory(root string) *Directory {
	return &Directory{store: s, root: root, seen: map[string]stat{}}
}

// Sync brings the published files into step with the directory. Hidden files, symbolic links and what is not a regular file
// are left alone. What cannot be published is skipped, and stops nothing else.
func (d *Directory) Sync(ctx context.Context, o DirectoryOptions) (r Synced, err error) {
	r = Synced{Published: []string{}, Removed: []string{}, Skipped: []Skip{}}
	root, err := os.OpenRoot(d.root) // nothing outside is reached by it, whatever links there are
	if err != nil {
		return r, fmt.Errorf("publish a directory: %w", err)
	}
	defer func() { _ = root.Close() }()
	found, total, err := d.walk(root, o, &r)
	if err != nil {
		return r, fmt.Errorf("publish directory %s: %w", d.root, err)
	}
	there, err := d.published(ctx, o)
	if err != nil {
		return r, err
	}
	var done int64
	for _, p := range slices.Sorted(maps.Keys(found)) {
		f := found[p]
		if err := ctx.Err(); err != nil {
			return r, err
		}
		now := there[p]
		if was, ok := d.seen[p]; ok && was.size == f.size && was.at.Equal(f.at) && was.sha == now.sha && !now.lost {
			r.Unchanged++
		} else if err := d.publish(ctx, root, p, f, o, now, &r); err != nil {
			return r, err
		}
		if done += f.size; o.Progress != nil {
			o.Progress(done, total)
		}
	}
	if !o.Delete {
		return r, nil
	}
	return r, d.remove(ctx, o, found, there, &r)
}

// entry is a file of the directory.
type entry struct {
	name string // in the directory
	size int64
	at   time.Time
}

// walk lists the files by the paths under which they are published.
func (d *Directory) walk(root *os.Root, o DirectoryOptions, r *Synced) (found map[string]entry, total int64, err error) {
	found = map[string]entry{}
	err = fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		switch {
		case err != nil && name == ".":
			return err
		case err != nil:
			r.Skipped = append(r.Skipped, Skip{name, err.Error()})
			return nil
		case name != "." && strings.HasPrefix(e.Name(), "."):
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		case !e.Type().IsRegular():
			return nil
		}
		p := norm.NFC.String(path.Join(o.Prefix, name)) // some systems keep names decomposed
		if err := protocol.CheckPath(p); err != nil {
			r.Skipped = append(r.Skipped, Skip{name, err.Error()})
			return nil
		}
		if other, ok := found[p]; ok {
			r.Skipped = append(r.Skipped, Skip{name, "it has the same path as " + other.name})
			return nil
		}
		info, err := e.Info()
		if err != nil {
			r.Skipped = append(r.Skipped, Skip{name, err.Error()})
			return nil
		}
		found[p] = entry{name, info.Size(), info.ModTime()}
		total += info.Size()
		return nil
	})
	return found, total, err
}

// known is a published file, or one that was removed.
type known struct {
	sha    string // empty: removed
	lost   bool
	origin string
}

func (d *Directory) published(ctx context.Context, o DirectoryOptions) (map[string]known, error) {
	prefix := o.Prefix
	if prefix != "" {
		prefix += "/"
	}
	rows, err := d.store.db.Query(ctx, `SELECT f.path, coalesce(encode(f.sha256, 'hex'), ''), b.lost_at IS NOT NULL, f.origin
		FROM waystage.file f LEFT JOIN waystage.blob b USING (sha256) WHERE starts_with(f.path, $1)`, prefix)
	if err != nil {
		return nil, fmt.Errorf("list files: %w", err)
	}
	there := map[string]known{}
	var p string
	var k known
	_, err = pgx.ForEachRow(rows, []any{&p, &k.sha, &k.lost, &k.origin}, func() error { there[p] = k; return nil })
	if err != nil {
		return nil, fmt.Errorf("list files: %w", err)
	}
	return there, nil
}

func (d *Directory) publish(ctx context.Context, root *os.Root, p string, e entry, o DirectoryOptions, now known, r *Synced) error {
	skip := func(err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		r.Skipped = append(r.Skipped, Skip{e.name, err.Error()})
		return nil
	}
	f, err := root.Open(e.name)
	if err != nil {
		return skip(err)
	}
	defer func() { _ = f.Close() }()
	device := now.origin == "device" && !o.Over
	if o.DryRun || device {
		c, err := scan(f, d.store.cfg.MaxSize, nil)
		if err != nil {
			return skip(err)
		}
		switch same := hex.EncodeToString(c.sha[:]) == now.sha; {
		case !same && device:
			return skip(errDevice)
		case same && !now.lost:
			r.Unchanged++
			return nil
		case o.DryRun:
			r.Published = append(r.Published, p)
			return nil
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return skip(err)
		}
	}
	pub, changed, err := d.store.Publish(ctx, Publication{Path: p, Type: TypeOf(p), By: o.By, Origin: "directory", Again: now.lost}, f)
	var refused *protocol.Error
	switch {
	case errors.Is(err, ErrTooBig), errors.Is(err, ErrChanged), errors.As(err, &refused), errors.Is(err, fs.ErrPermission):
		return skip(err)
	case err != nil:
		return err
	case changed || now.lost:
		r.Published = append(r.Published, p)
	default:
		r.Unchanged++
	}
	// One that was written meanwhile is read again next time.
	if info, err := f.Stat(); err == nil && info.Size() == e.size && info.ModTime().Equal(e.at) && time.Since(e.at) > 2*time.Second {
		d.seen[p] = stat{e.size, e.at, pub.SHA256}
	}
	return nil
}

func (d *Directory) remove(ctx context.Context, o DirectoryOptions, found map[string]entry, there map[string]known, r *Synced) error {
	var gone []string
	for p, k := range there {
		if _, ok := found[p]; !ok && k.sha != "" && k.origin == "directory" {
			gone = append(gone, p)
		}
	}
	slices.Sort(gone)
	if len(gone) > 0 && len(found) == 0 && !o.Empty {
		return fmt.Errorf("%s: %w", d.root, ErrEmpty)
	}
	for _, p := range gone {
		delete(d.seen, p)
		if !o.DryRun {
			if err := d.store.Remove(ctx, p, o.By); err != nil && !errors.Is(err, ErrNoFile) {
				return err
			}
		}
		r.Removed = append(r.Removed, p)
	}
	return nil
}

// Watch keeps the published files in step with the directory until ctx ends, looking every so often.
func (d *Directory) Watch(ctx context.Context, every time.Duration, o DirectoryOptions) error {
	t := time.NewTimer(0)
	defer t.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		t.Reset(every)
		r, err := d.Sync(ctx, o)
		log := d.store.log.With(zap.String("directory", d.root))
		if len(r.Published)+len(r.Removed) > 0 {
			log.Info("published", zap.Int("changed", len(r.Published)), zap.Int("removed", len(r.Removed)))
		}
		now := fmt.Sprint(err, r.Skipped)
		if now != said && ctx.Err() == nil { // once, not at every look
			if err != nil {
				log.Error("the directory cannot be published; trying again", zap.Error(err))
			}
			for _, s := range r.Skipped {
				log.Warn("a file is not published", zap.String("file", s.Path), zap.String("why", s.Why))
			}
		}
		said = now
	}
}

// TypeOf guesses a content type by the name's ending; empty: unknown.
func TypeOf(name string) string {
	t := mime.TypeByExtension(path.Ext(name))
	if protocol.CheckContentType(t) != nil {
		return ""
	}
	return t
}
