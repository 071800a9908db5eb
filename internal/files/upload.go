package files

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// upload is a row of waystage.upload.
type upload struct {
	id, path, op     string
	base, sha        []byte
	size             int64
	typ              string
	chunks           [][]byte
	state            string
	code, detail     string
	right            []byte
	version          int64
	deviceID         int64
	user, deviceName string
}

const uploadColumns = `id, path, op, base, sha256, size, content_type, chunks, state, coalesce(code, ''), coalesce(detail, ''), right_sha256, version, device_id`

func scanUpload(row pgx.Row) (*upload, error) {
	u := &upload{}
	err := row.Scan(&u.id, &u.path, &u.op, &u.base, &u.sha, &u.size, &u.typ, &u.chunks, &u.state, &u.code, &u.detail, &u.right, &u.version, &u.deviceID)
	return u, err
}

// mostMissing bounds the chunks that one receipt names.
const mostMissing = 256

func (u *upload) receipt() protocol.FileReceipt {
	r := protocol.FileReceipt{State: u.state}
	switch u.state {
	case protocol.FileReceiving:
		for i, c := range u.chunks {
			if c == nil && len(r.Missing) < mostMissing {
				r.Missing = append(r.Missing, i+1)
			}
		}
		if len(r.Missing) == 0 {
			r.State = protocol.FileStored
		}
	case protocol.Applied:
		if u.version != 0 {
			r.Version = fmt.Sprint(u.version)
		}
	case protocol.Rejected:
		r.Code, r.Detail, r.Right = protocol.Code(u.code), u.detail, hex.EncodeToString(u.right)
	}
	return r
}

func (u *upload) reject(code protocol.Code, format string, args ...any) {
	u.state, u.code, u.detail = protocol.Rejected, string(code), fmt.Sprintf(format, args...)
}

// Offer takes a device's announcement of a change of a file, or answers how far it is. Nothing of the content is stored before
// the path, the right to change it, the size and the user's total are found good.
func (s *Store) Offer(ctx context.Context, user, device, id string, o protocol.FileOffer) (protocol.FileReceipt, error) {
	if !protocol.ValidUploadID(id) {
		return protocol.FileReceipt{}, refuse(protocol.CodeMalformed, 0, "an upload's id is %d lower-case hex digits", protocol.UploadIDLen)
	}
	if err := o.Check(); err != nil {
		var e *protocol.Error
		if errors.As(err, &e) && e.Code == protocol.CodePath { // final: it will never be one
			s.metrics.uploads.WithLabelValues(protocol.Rejected).Inc()
			return protocol.FileReceipt{State: protocol.Rejected, Code: e.Code, Detail: e.Message}, nil
		}
		return protocol.FileReceipt{}, err
	}
	v, err := s.viewer(ctx, user, device)
	if err != nil {
		return protocol.FileReceipt{}, err
	}
	u := &upload{id: id, path: o.Path, op: o.Op, size: o.Size, typ: o.Type, state: protocol.FileReceiving, deviceID: v.deviceID}
	if u.base, err = hexOrNil(o.Base); err != nil {
		return protocol.FileReceipt{}, err
	}
	if u.sha, err = hexOrNil(o.SHA256); err != nil {
		return protocol.FileReceipt{}, err
	}
	u.chunks = make([][]byte, protocol.FileChunks(o.Size))
	known, err := scanUpload(s.db.QueryRow(ctx, `UPDATE waystage.upload SET touched_at = clock_timestamp() WHERE device_id = $1 AND id = $2 RETURNING `+uploadColumns, v.deviceID, id))
	switch {
	case err == nil && known.same(u):
		return known.receipt(), nil
	case err == nil:
		return protocol.FileReceipt{}, refuse(protocol.CodeFileConflict, 0, "upload %s was announced as another change: draw a new id", id)
	case !errors.Is(err, pgx.ErrNoRows):
		return protocol.FileReceipt{}, fmt.Errorf("look for upload %s: %w", id, err)
	}
	if err := s.judge(ctx, v, u); err != nil {
		return protocol.FileReceipt{}, err
	}
	if u.state != protocol.Rejected && u.op == protocol.FilePut {
		// Only what the user may fetch anyway need not be sent: a hash alone is no proof of having the content.
		if may, err := s.sees(ctx, v, Hash(u.sha)); err != nil {
			return protocol.FileReceipt{}, err
		} else if may {
			if err := s.adopt(ctx, u); err != nil {
				return protocol.FileReceipt{}, err
			}
		}
	}
	if err := s.begin(ctx, v, u); err != nil {
		return protocol.FileReceipt{}, err
	}
	return u.receipt(), nil
}

func hexOrNil(text string) ([]byte, error) {
	if text == "" {
		return nil, nil
	}
	return hex.DecodeString(text)
}

func (u *upload) same(o *upload) bool {
	return u.path == o.path && u.op == o.op && string(u.base) == string(o.base) && string(u.sha) == string(o.sha) && u.size == o.size && u.typ == o.typ
}

// judge decides whether a device may make this change at all.
func (s *Store) judge(ctx context.Context, v *viewer, u *upload) error {
	f, err := s.covering(ctx, v, []string{u.path}, true)
	if err != nil {
		return err
	}
	if f == nil {
		if heals, err := s.heals(ctx, v, u); err != nil || heals {
			return err
		}
		seen, err := s.covering(ctx, v, []string{u.path}, false)
		switch {
		case err != nil:
			return err
		case seen != nil:
			u.reject(protocol.CodeOperation, "file subscription %s does not let devices change files", seen.Name)
		default:
			u.reject(protocol.CodeNotSubscribed, "the path is outside the user's file subscriptions")
		}
		return nil
	}
	if u.size > f.MaxSize {
		u.reject(protocol.CodeFileTooBig, "the file has %d bytes; file subscription %s takes %d", u.size, f.Name, f.MaxSize)
		return nil
	}
	return s.rule(ctx, s.db, u)
}

// heals tells whether an upload brings back the lost content of a file: that may do who may have the content, or has brought it
// before.
func (s *Store) heals(ctx context.Context, v *viewer, u *upload) (bool, error) {
	if u.op != protocol.FilePut {
		return false, nil
	}
	var own bool
	err := s.db.QueryRow(ctx, `SELECT coalesce(f.device_id = $4, false) FROM waystage.file f JOIN waystage.blob b USING (sha256)
		WHERE f.path = $1 AND f.sha256 = $2 AND b.size = $3 AND b.lost_at IS NOT NULL`, u.path, u.sha, u.size, v.deviceID).Scan(&own)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for lost content of %s: %w", u.path, err)
	}
	if own {
		return true, nil
	}
	f, err := s.covering(ctx, v, []string{u.path}, false)
	return f != nil, err
}

type querier interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// rule is the version rule: a change made on an obsolete content never overwrites the newer one. What is so already is good.
func (s *Store) rule(ctx context.Context, q querier, u *upload) error {
	var now []byte
	err := q.QueryRow(ctx, `SELECT sha256 FROM waystage.file WHERE path = $1`, u.path).Scan(&now)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return fmt.Errorf("look up file %s: %w", u.path, err)
	}
	switch {
	case string(now) == string(u.base), string(now) == string(u.sha): // a removal has no hash
		return nil
	case now == nil:
		u.reject(protocol.CodeRowDeleted, "the file was removed since the version that the change was made on")
	case u.base == nil:
		u.reject(protocol.CodeRowExists, "there is a file with this path already")
	default:
		u.reject(protocol.CodeStale, "the file was changed since the version that the change was made on")
	}
	u.right = now
	return nil
}

// adopt takes the chunks of a content that is there.
func (s *Store) adopt(ctx context.Context, u *upload) error {
	var chunks [][]byte
	err := s.db.QueryRow(ctx, `SELECT chunks FROM waystage.blob WHERE sha256 = $1 AND size = $2 AND lost_at IS NULL`, u.sha, u.size).Scan(&chunks)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look up content: %w", err)
	}
	if len(chunks) == len(u.chunks) {
		u.chunks = chunks
	}
	return nil
}

// begin writes an upload down, if the user's total allows it.
func (s *Store) begin(ctx context.Context, v *viewer, u *upload) error {
	err := pgx.BeginFunc(ctx, s.db, func(tx pgx.Tx) error {
		// One offer of a user at a time, or two would both find room for one.
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(22358, hashtext($1))`, v.user); err != nil {
			return err
		}
		if u.state != protocol.Rejected && u.op == protocol.FilePut {
			if err := s.quota(ctx, tx, v, u); err != nil {
				return err
			}
		}
		var decided *time.Time
		if u.state == protocol.Rejected {
			now := time.Now()
			decided, u.chunks = &now, [][]byte{}
		}
		_, err := tx.Exec(ctx, `INSERT INTO waystage.upload (device_id, id, path, op, base, sha256, size, content_type, chunks, state, code, detail, right_sha256, decided_at)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, nullif($11, ''), nullif($12, ''), $13, $14)`,
			v.deviceID, u.id, u.path, u.op, u.base, u.sha, u.size, u.typ, u.chunks, u.state, u.code, u.detail, u.right, decided)
		return err
	})
	if err != nil {
		var e *protocol.Error
		if errors.As(err, &e) {
			return err
		}
		return fmt.Errorf("note upload %s: %w", u.id, err)
	}
	if u.state == protocol.Rejected {
		s.metrics.uploads.WithLabelValues(protocol.Rejected).Inc()
	}
	return nil
}

func (s *Store) quota(ctx context.Context, tx pgx.Tx, v *viewer, u *upload) error {
	var bytes, count int64
	var open int
	// What the upload takes the place of does not count.
	err := tx.QueryRow(ctx, `
		SELECT coalesce(sum(size), 0)::bigint, count(*), (SELECT count(*) FROM waystage.upload WHERE device_id = $4 AND state IN ('receiving', 'stored') AND op = 'put')
		FROM (SELECT f.size FROM waystage.file f WHERE f.origin = 'device' AND f.sha256 IS NOT NULL AND f.path <> $3
				AND f.published_by IN (SELECT $1 || '/' || d.name FROM waystage.device d WHERE d.user_name = $1)
			UNION ALL SELECT p.size FROM waystage.upload p JOIN waystage.device d ON d.id = p.device_id
				WHERE d.user_name = $1 AND p.state IN ('receiving', 'stored') AND p.op = 'put' AND p.id <> $2) x`, v.user, u.id, u.path, v.deviceID).Scan(&bytes, &count, &open)
	if err != nil {
		return err
	}
	switch {
	case open >= s.cfg.OpenUploads:
		return refuse(protocol.CodeBusy, 5, "the device has %d uploads under way: finish some first", open)
	case bytes+u.size > s.cfg.UserBytes:
		u.reject(protocol.CodeFileQuota, "the user's files have %d bytes; with this one more than %d", bytes, s.cfg.UserBytes)
	case count+1 > s.cfg.UserFiles:
		u.reject(protocol.CodeFileQuota, "the user has put %d files, the limit is %d", count, s.cfg.UserFiles)
	}
	return nil
}

// Put takes one chunk, from 1, of an upload.
func (s *Store) Put(ctx context.Context, user, device, id string, n int, data []byte) (protocol.FileReceipt, error) {
	u, err := s.load(ctx, user, device, id)
	if err != nil {
		return protocol.FileReceipt{}, err
	}
	if u.state != protocol.FileReceiving {
		return u.receipt(), nil
	}
	if want := protocol.FileChunkSize(u.size, n); want == 0 || len(data) != want {
		return protocol.FileReceipt{}, refuse(protocol.CodeFileContent, 0, "chunk %d has %d bytes, not the %d of this file's", n, len(data), want)
	}
	if u.chunks[n-1] == nil || Hash(u.chunks[n-1]) != sha256.Sum256(data) {
		sha, err := s.chunks.Put(ctx, data)
		if err != nil {
			s.log.Warn("a chunk could not be stored", zap.Error(err))
			return protocol.FileReceipt{}, refuse(protocol.CodeBusy, 10, "the store of files takes no more now: send the chunk again after the given time")
		}
		s.metrics.up(len(data))
		if u, err = scanUpload(s.db.QueryRow(ctx, `UPDATE waystage.upload SET chunks[$3] = $4, touched_at = clock_timestamp()
			WHERE device_id = $1 AND id = $2 AND state = 'receiving' RETURNING `+uploadColumns, u.deviceID, id, n, sha[:])); errors.Is(err, pgx.ErrNoRows) {
			u, err = s.load(ctx, user, device, id) // it has its outcome meanwhile
		}
		if err != nil {
			return protocol.FileReceipt{}, fmt.Errorf("note chunk %d of upload %s: %w", n, id, err)
		}
	}
	return u.receipt(), nil
}

func (s *Store) load(ctx context.Context, user, device, id string) (*upload, error) {
	none := refuse(protocol.CodeNotFound, 0, "no such upload of this device: offer it again")
	if !protocol.ValidUploadID(id) {
		return nil, none
	}
	u, err := scanUpload(s.db.QueryRow(ctx, `SELECT `+uploadColumns+` FROM waystage.upload p
		WHERE p.id = $3 AND p.device_id = (SELECT d.id FROM waystage.device d WHERE d.user_name = $1 AND d.name = $2)`, user, device, id))
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, none
	}
	if err != nil {
		return nil, fmt.Errorf("look up upload %s: %w", id, err)
	}
	u.user, u.deviceName = user, device
	return u, nil
}

// Commit decides an upload whose content is there, and makes it the file of its path, in one transaction. Called again it
// gives the same outcome.
func (s *Store) Commit(ctx context.Context, user, device, id string) (protocol.FileReceipt, error) {
	u, err := s.load(ctx, user, device, id)
	if err != nil {
		return protocol.FileReceipt{}, err
	}
	if u.state == protocol.Applied || u.state == protocol.Rejected {
		return u.receipt(), nil
	}
	if r := u.receipt(); u.op == protocol.FilePut && r.State == protocol.FileReceiving && len(u.chunks) > 0 {
		return r, nil
	}
	whole, err := s.assemble(ctx, u)
	if err != nil || !whole {
		return u.receipt(), err
	}
	v, err := s.viewer(ctx, user, device)
	if err != nil {
		return protocol.FileReceipt{}, err
	}
	// Assignments, definitions and the file itself may have changed since the offer.
	if u.state != protocol.Rejected {
		if err := s.judge(ctx, v, u); err != nil {
			return protocol.FileReceipt{}, err
		}
	}
	decided, err := s.decide(ctx, u)
	if err != nil {
		return protocol.FileReceipt{}, fmt.Errorf("decide upload %s: %w", id, err)
	}
	s.metrics.uploads.WithLabelValues(decided.state).Inc()
	return decided.receipt(), nil
}

// assemble reads the content from the store and checks it against what was announced. A chunk that the store has lost since is
// asked for again: then the content is not whole.
func (s *Store) assemble(ctx context.Context, u *upload) (bool, error) {
	if u.op == protocol.FileRemove {
		return true, nil
	}
	sum := sha256.New()
	for i, c := range u.chunks {
		sha, err := asHash(c)
		if err != nil {
			return false, err
		}
		data, there, err := s.chunks.Get(ctx, sha)
		if err != nil {
			return false, fmt.Errorf("read chunk %d of upload %s: %w", i+1, u.id, err)
		}
		if !there {
			u.chunks[i] = nil
			if _, err := s.db.Exec(ctx, `UPDATE waystage.upload SET chunks[$3] = NULL WHERE device_id = $1 AND id = $2 AND state = 'receiving'`, u.deviceID, u.id, i+1); err != nil {
				return false, fmt.Errorf("note the lost chunk %d of upload %s: %w", i+1, u.id, err)
			}
			return false, nil
		}
		sum.Write(data)
	}
	if string(sum.Sum(nil)) != string(u.sha) {
		u.reject(protocol.CodeFileContent, "the content that was sent does not have the hash that was announced")
	}
	return true, nil
}

// decide writes the outcome down.
func (s *Store) decide(ctx context.Context, u *upload) (now *upload, err error) {
	err = pgx.BeginFunc(ctx, s.db, func(tx pgx.Tx) error {
		if err := lockPath(ctx, tx, u.path); err != nil {
			return err
		}
		if now, err = scanUpload(tx.QueryRow(ctx, `SELECT `+uploadColumns+` FROM waystage.upload WHERE device_id = $1 AND id = $2 FOR UPDATE`, u.deviceID, u.id)); err != nil {
			return err
		}
		if now.state == protocol.Applied || now.state == protocol.Rejected {
			return nil // another call was faster
		}
		now.state, now.code, now.detail, now.right = protocol.Applied, "", "", nil
		if u.state == protocol.Rejected {
			now.state, now.code, now.detail, now.right = u.state, u.code, u.detail, u.right
		} else if err := s.rule(ctx, tx, now); err != nil {
			return err
		}
		if now.state == protocol.Applied {
			if now.op == protocol.FilePut {
				list := make([]Hash, len(u.chunks))
				for i := range list {
					list[i] = Hash(u.chunks[i])
				}
				if err := keepBlob(ctx, tx, Hash(now.sha), now.size, list); err != nil {
					return err
				}
			}
			if now.version, err = s.put(ctx, tx, u, now); err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, `UPDATE waystage.upload SET state = $3, code = nullif($4, ''), detail = nullif($5, ''), right_sha256 = $6, version = $7, chunks = '{}',
			decided_at = clock_timestamp(), touched_at = clock_timestamp() WHERE device_id = $1 AND id = $2`,
			u.deviceID, u.id, now.state, now.code, now.detail, now.right, now.version)
		return err
	})
	return now, err
}

// put makes the upload the file. One that is the same already stays whose it was.
func (s *Store) put(ctx context.Context, tx pgx.Tx, u, now *upload) (version int64, err error) {
	var there []byte
	err = tx.QueryRow(ctx, `SELECT sha256, version FROM waystage.file WHERE path = $1`, now.path).Scan(&there, &version)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return 0, err
	}
	if string(there) == string(now.sha) {
		return version, nil
	}
	c := change{path: now.path, sha: now.sha, size: now.size, typ: now.typ, by: u.user + "/" + u.deviceName, origin: "device", deviceID: &now.deviceID}
	if now.op == protocol.FileRemove {
		c.size, c.typ = 0, ""
	}
	_, version, err = setFile(ctx, tx, c)
	return version, err
}

// Upload is an upload as operators see it.
type Upload struct {
	User      string     `json:"user"`
	Device    string     `json:"device"`
	ID        string     `json:"id"`
	Path      string     `json:"path"`
	Op        string     `json:"op"`
	Size      int64      `json:"size"`
	State     string     `json:"state"`
	Code      string     `json:"code,omitempty"`
	Detail    string     `json:"detail,omitempty"`
	Missing   int        `json:"missing"` // chunks that are still to come
	CreatedAt time.Time  `json:"created_at"`
	TouchedAt time.Time  `json:"touched_at"`
	DecidedAt *time.Time `json:"decided_at,omitempty"`
}

// Uploads lists changes of files by devices, the newest first; empty user, device and state choose all.
func (s *Store) Uploads(ctx context.Context, user, device, state string, limit int) ([]Upload, error) {
	rows, err := s.db.Query(ctx, `SELECT d.user_name, d.name, p.id, p.path, p.op, p.size, p.state, coalesce(p.code, ''), coalesce(p.detail, ''),
			(SELECT count(*) FROM unnest(p.chunks) c WHERE c IS NULL)::int, p.created_at, p.touched_at, p.decided_at
		FROM waystage.upload p JOIN waystage.device d ON d.id = p.device_id
		WHERE $1 IN ('', d.user_name) AND $2 IN ('', d.name) AND $3 IN ('', p.state) ORDER BY p.created_at DESC, p.id LIMIT $4`, user, device, state, limit)
	if err != nil {
		return nil, fmt.Errorf("list uploads: %w", err)
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Upload])
	if err != nil {
		return nil, fmt.Errorf("list uploads: %w", err)
	}
	return list, nil
}
