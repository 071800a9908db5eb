// Package files keeps the files that devices subscribe to: what is true of them in the mirror's PostgreSQL, their contents, cut
// into chunks under their hashes, in the queue's store.
//
// It promises that a file's metadata is true whatever happens to the store (a content that is not there any more is known to be
// lost, and is put there again by whoever has it); that nobody gets a chunk, and nobody changes a path, without the one check
// that replies go by too; that an upload has exactly one outcome, however often its calls come; and that nothing is stored
// of it before its size is known to be allowed. The gateway calls it for devices, cmd for operators and for the directory that a
// server publishes.
package files

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// Hash is a SHA-256, of a content or a chunk.
type Hash = [sha256.Size]byte

// Errors of the operator's door.
var (
	ErrNoFile  = errors.New("there is no such file")
	ErrLost    = errors.New("the content is lost: publish the file again")
	ErrTooBig  = errors.New("the file is larger than files.max_size allows")
	ErrChanged = errors.New("the file was changed while it was read")
)

// Chunks is the store of chunks. Storing one twice is storing it once; it may lose any.
type Chunks interface {
	Put(ctx context.Context, data []byte) (Hash, error)
	Get(ctx context.Context, sha Hash) (data []byte, there bool, err error)
	Names(ctx context.Context) (map[Hash]bool, error)
	// Drop removes a chunk that was last stored before a time.
	Drop(ctx context.Context, sha Hash, before time.Time) (bool, error)
}

// Config bounds the files. Zero values mean the defaults.
type Config struct {
	MaxSize     int64         // of a file that is published (default 1 GiB); what devices put is bounded by its subscription
	UserBytes   int64         // of the files that a user's devices have put and that stand, with those on their way (default 1 GiB)
	UserFiles   int64         // number of the same (default 10,000)
	OpenUploads int           // uploads of one device at the same time (default 64)
	Grace       time.Duration // how long a content that nothing names is kept, and a replaced one may still be fetched (default 24 hours)
	Abandoned   time.Duration // an upload that is not heard of for so long is forgotten (default 7 days)
	Receipts    time.Duration // how long the outcome of an upload is kept (default 30 days)
}

func (c Config) withDefaults() Config {
	def(&c.MaxSize, 1<<30)
	def(&c.UserBytes, 1<<30)
	def(&c.UserFiles, 10_000)
	def(&c.OpenUploads, 64)
	def(&c.Grace, 24*time.Hour)
	def(&c.Abandoned, 7*24*time.Hour)
	def(&c.Receipts, 30*24*time.Hour)
	return c
}

func def[T int | int64 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Store works on files. It is safe for concurrent use, in any number of processes.
type Store struct {
	cfg     Config
	db      *pgxpool.Pool
	chunks  Chunks
	defs    func(context.Context) (*schema.Definitions, error)
	log     *zap.Logger
	metrics *metrics
}

// New makes a store on a pool of the mirror database. It does no I/O. defs gives the definitions in force, checked; nil where no
// device is served.
func New(cfg Config, db *pgxpool.Pool, chunks Chunks, defs func(context.Context) (*schema.Definitions, error), log *zap.Logger) *Store {
	if log == nil {
		log = zap.NewNop()
	}
	return &Store{cfg: cfg.withDefaults(), db: db, chunks: chunks, defs: defs, log: log.Named("files"), metrics: newMetrics()}
}

// File is a file as it is now.
type File struct {
	Path        string    `json:"path"`
	Version     int64     `json:"version"`
	SHA256      string    `json:"sha256,omitempty"` // hex; empty: removed
	Size        int64     `json:"size"`             // bytes
	Type        string    `json:"type,omitempty"`
	PublishedAt time.Time `json:"published_at"`
	PublishedBy string    `json:"published_by"`
	Origin      string    `json:"origin,omitempty"` // directory, device; empty: by command
	Lost        bool      `json:"lost,omitempty"`   // the store does not have the content
	Removed     bool      `json:"removed,omitempty"`
}

const fileColumns = `f.path, f.version, coalesce(encode(f.sha256, 'hex'), ''), f.size, f.content_type, f.published_at, f.published_by, f.origin,
	b.lost_at IS NOT NULL, f.sha256 IS NULL`

// List lists files whose path begins with a prefix, in the order of their paths; removed ones, while devices have to hear of
// them, only if all is set.
func (s *Store) List(ctx context.Context, prefix string, all bool) ([]File, error) {
	rows, err := s.db.Query(ctx, `SELECT `+fileColumns+` FROM waystage.file f LEFT JOIN waystage.blob b USING (sha256)
		WHERE starts_with(f.path, $1) AND ($2 OR f.sha256 IS NOT NULL) ORDER BY f.path`, prefix, all)
	if err != nil {
		return nil, fmt.Errorf("list files: %w", err)
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[File])
	if err != nil {
		return nil, fmt.Errorf("list files: %w", err)
	}
	return list, nil
}

// Look finds one file. ErrNoFile.
func (s *Store) Look(ctx context.Context, path string) (File, error) {
	rows, err := s.db.Query(ctx, `SELECT `+fileColumns+` FROM waystage.file f LEFT JOIN waystage.blob b USING (sha256) WHERE f.path = $1 AND f.sha256 IS NOT NULL`, path)
	if err == nil {
		var f File
		if f, err = pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[File]); err == nil {
			return f, nil
		}
	}
	if errors.Is(err, pgx.ErrNoRows) {
		return File{}, fmt.Errorf("%s: %w", path, ErrNoFile)
	}
	return File{}, fmt.Errorf("look for file %s: %w", path, err)
}

// digest is what a content is called, whole and in chunks.
type digest struct {
	sha    Hash
	size   int64
	chunks []Hash
}

// scan reads a content chunk by chunk; each may be nil. It stops at more than most bytes.
func scan(r io.Reader, most int64, each func(chunk []byte) error) (d digest, err error) {
	whole := sha256.New()
	buf := make([]byte, protocol.FileChunk)
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			if d.size += int64(n); d.size > most {
				return d, ErrTooBig
			}
			whole.Write(buf[:n])
			d.chunks = append(d.chunks, sha256.Sum256(buf[:n]))
			if each != nil {
				if err := each(buf[:n]); err != nil {
					return d, err
				}
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			whole.Sum(d.sha[:0])
			return d, nil
		case err != nil:
			return d, err
		}
	}
}

// Publication says what is published under which name.
type Publication struct {
	Path   string
	Type   string // content type; empty: unknown
	By     string
	Origin string // "", directory
	Again  bool   // store the content even if it seems to be there
}

// Publish makes a content the file of a path; changed tells whether it was not yet. The content is read twice: to know its
// name, and to store it if it is not there.
func (s *Store) Publish(ctx context.Context, p Publication, content io.ReadSeeker) (f File, changed bool, err error) {
	if err := protocol.CheckPath(p.Path); err != nil {
		return File{}, false, err
	}
	if err := protocol.CheckContentType(p.Type); err != nil {
		return File{}, false, err
	}
	d, err := scan(content, min(s.cfg.MaxSize, protocol.MaxFileSize), nil)
	if err != nil {
		return File{}, false, fmt.Errorf("%s: %w", p.Path, err)
	}
	there := false
	if !p.Again {
		if there, changed, err = s.link(ctx, p, d, false); err != nil {
			return File{}, false, fmt.Errorf("publish %s: %w", p.Path, err)
		}
	}
	if !there {
		if _, err := content.Seek(0, io.SeekStart); err != nil {
			return File{}, false, fmt.Errorf("%s: %w", p.Path, err)
		}
		stored, err := scan(content, d.size, func(chunk []byte) error {
			_, err := s.chunks.Put(ctx, chunk)
			return err
		})
		switch {
		case errors.Is(err, ErrTooBig), err == nil && stored.sha != d.sha:
			return File{}, false, fmt.Errorf("%s: %w", p.Path, ErrChanged)
		case err != nil:
			return File{}, false, fmt.Errorf("publish %s: %w", p.Path, err)
		}
		if _, changed, err = s.link(ctx, p, d, true); err != nil {
			return File{}, false, fmt.Errorf("publish %s: %w", p.Path, err)
		}
	}
	f, err = s.Look(ctx, p.Path)
	return f, changed, err
}

// link makes a content the file of a path. Unless it was just stored, it does so only if the store is thought to have it.
func (s *Store) link(ctx context.Context, p Publication, d digest, stored bool) (there, changed bool, err error) {
	err = pgx.BeginFunc(ctx, s.db, func(tx pgx.Tx) error {
		if stored {
			if err := keepBlob(ctx, tx, d.sha, d.size, d.chunks); err != nil {
				return err
			}
		} else {
			// The date keeps the collector off, which looks at it again when it has waited for this row.
			tag, err := tx.Exec(ctx, `UPDATE waystage.blob SET stored_at = now() WHERE sha256 = $1 AND lost_at IS NULL`, d.sha[:])
			if err != nil || tag.RowsAffected() == 0 {
				return err
			}
		}
		there = true
		changed, _, err = setFile(ctx, tx, change{path: p.Path, sha: d.sha[:], size: d.size, typ: p.Type, by: p.By, origin: p.Origin})
		return err
	})
	return there, changed, err
}

// keepBlob notes a content whose chunks were just stored.
func keepBlob(ctx context.Context, tx pgx.Tx, sha Hash, size int64, chunks []Hash) error {
	list := make([][]byte, len(chunks))
	for i := range chunks {
		list[i] = chunks[i][:]
	}
	_, err := tx.Exec(ctx, `INSERT INTO waystage.blob (sha256, size, chunks) VALUES ($1, $2, $3)
		ON CONFLICT (sha256) DO UPDATE SET stored_at = now(), lost_at = NULL`, sha[:], size, list)
	return err
}

// lockPath makes changes of one path follow one another.
func lockPath(ctx context.Context, tx pgx.Tx, path string) error {
	_, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(22357, hashtext($1))`, path)
	return err
}

// change of a file, as it is written down.
type change struct {
	path, typ, by, origin string
	sha                   []byte // nil: removed
	size                  int64
	deviceID              *int64
}

// setFile writes a file. One that is so already stays as it is. What it was before may still be fetched for a while, unless it is
// removed.
func setFile(ctx context.Context, tx pgx.Tx, c change) (changed bool, version int64, err error) {
	if err := lockPath(ctx, tx, c.path); err != nil {
		return false, 0, err
	}
	var before []byte
	var typ string
	err = tx.QueryRow(ctx, `SELECT sha256, content_type, version FROM waystage.file WHERE path = $1`, c.path).Scan(&before, &typ, &version)
	switch {
	case errors.Is(err, pgx.ErrNoRows) && c.sha == nil:
		return false, 0, nil
	case err != nil && !errors.Is(err, pgx.ErrNoRows):
		return false, 0, err
	case err == nil && string(before) == string(c.sha) && (c.sha == nil || typ == c.typ):
		return false, version, nil
	}
	err = tx.QueryRow(ctx, `INSERT INTO waystage.file (path, sha256, size, content_type, published_by, origin, device_id) VALUES ($1, $2, $3, $4, $5, $6, $7)
		ON CONFLICT (path) DO UPDATE SET version = pg_current_xact_id()::text::bigint, sha256 = excluded.sha256, size = excluded.size, content_type = excluded.content_type,
			published_at = now(), published_by = excluded.published_by, origin = excluded.origin, device_id = excluded.device_id
		RETURNING version`, c.path, c.sha, c.size, c.typ, c.by, c.origin, c.deviceID).Scan(&version)
	if err != nil {
		return false, 0, err
	}
	if c.sha == nil { // who removes a file may want nobody to get it any more
		_, err = tx.Exec(ctx, `WITH old AS (DELETE FROM waystage.file_before WHERE path = $1 RETURNING sha256)
			UPDATE waystage.blob SET stored_at = now() WHERE sha256 = $2 OR sha256 IN (SELECT sha256 FROM old)`, c.path, before)
		return true, version, err
	}
	if before != nil && string(before) != string(c.sha) {
		_, err = tx.Exec(ctx, `INSERT INTO waystage.file_before (path, sha256) VALUES ($1, $2)
			ON CONFLICT (sha256, path) DO UPDATE SET replaced_at = now()`, c.path, before)
	}
	return true, version, err
}

// Remove removes a file. ErrNoFile.
func (s *Store) Remove(ctx context.Context, path, by string) error {
	var changed bool
	err := pgx.BeginFunc(ctx, s.db, func(tx pgx.Tx) (err error) {
		changed, _, err = setFile(ctx, tx, change{path: path, by: by})
		return err
	})
	switch {
	case err != nil:
		return fmt.Errorf("remove %s: %w", path, err)
	case !changed:
		return fmt.Errorf("%s: %w", path, ErrNoFile)
	}
	return nil
}

// Copy writes a file's content and checks it on the way. ErrNoFile, ErrLost.
func (s *Store) Copy(ctx context.Context, path string, w io.Writer) (File, error) {
	f, err := s.Look(ctx, path)
	if err != nil {
		return f, err
	}
	sha, err := parseHash(f.SHA256)
	if err != nil {
		return f, err
	}
	b, err := s.blob(ctx, sha)
	if err != nil {
		return f, fmt.Errorf("read %s: %w", path, err)
	}
	whole := sha256.New()
	for _, c := range b.chunks {
		data, there, err := s.chunks.Get(ctx, c)
		if err != nil {
			return f, fmt.Errorf("read %s: %w", path, err)
		}
		if !there {
			s.lost(ctx, sha)
			return f, fmt.Errorf("%s: %w", path, ErrLost)
		}
		whole.Write(data)
		if _, err := w.Write(data); err != nil {
			return f, fmt.Errorf("write %s: %w", path, err)
		}
	}
	if Hash(whole.Sum(nil)) != sha {
		return f, fmt.Errorf("%s: %w", path, ErrLost)
	}
	return f, nil
}

// blob reads what is known of a content. pgx.ErrNoRows.
func (s *Store) blob(ctx context.Context, sha Hash) (d digest, err error) {
	var chunks [][]byte
	if err := s.db.QueryRow(ctx, `SELECT size, chunks FROM waystage.blob WHERE sha256 = $1`, sha[:]).Scan(&d.size, &chunks); err != nil {
		return d, err
	}
	d.sha, d.chunks, err = sha, make([]Hash, len(chunks)), nil
	for i, c := range chunks {
		if d.chunks[i], err = asHash(c); err != nil {
			return d, err
		}
	}
	return d, nil
}

// lost notes that the store does not have a content any more.
func (s *Store) lost(ctx context.Context, sha Hash) {
	tag, err := s.db.Exec(ctx, `UPDATE waystage.blob SET lost_at = now() WHERE sha256 = $1 AND lost_at IS NULL`, sha[:])
	switch {
	case err != nil:
		s.log.Warn("a lost content could not be noted", zap.String("sha256", hex.EncodeToString(sha[:])), zap.Error(err))
	case tag.RowsAffected() > 0:
		s.log.Error("the content of a file is lost: publish it again", zap.String("sha256", hex.EncodeToString(sha[:])))
	}
}

func asHash(b []byte) (h Hash, err error) {
	if len(b) != len(h) {
		return h, fmt.Errorf("a hash of %d bytes", len(b))
	}
	return Hash(b), nil
}

func parseHash(text string) (h Hash, err error) {
	b, err := hex.DecodeString(text)
	if err != nil {
		return h, err
	}
	return asHash(b)
}
