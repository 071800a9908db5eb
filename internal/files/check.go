package files

import (
	"context"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// Checked is the outcome of [Store.Check].
type Checked struct {
	Files    int64  `json:"files"`
	Contents int64  `json:"contents"` // different ones
	Bytes    int64  `json:"bytes"`    // of these
	Lost     []File `json:"lost"`     // files whose content the store does not have
	Back     int64  `json:"back"`     // contents that were lost and are there again
}

// Check compares what the store has with what files need, and notes which contents are lost and which are back. Deep reads
// every chunk instead of looking at the names.
func (s *Store) Check(ctx context.Context, deep bool, progress func(done, total int64)) (c Checked, err error) {
	names, err := s.chunks.Names(ctx)
	if err != nil {
		return c, err
	}
	rows, err := s.db.Query(ctx, `SELECT sha256, size, chunks, lost_at IS NOT NULL FROM waystage.blob`)
	if err != nil {
		return c, fmt.Errorf("check files: %w", err)
	}
	type blob struct {
		sha    []byte
		size   int64
		chunks [][]byte
		lost   bool
	}
	blobs, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (b blob, err error) {
		return b, row.Scan(&b.sha, &b.size, &b.chunks, &b.lost)
	})
	if err != nil {
		return c, fmt.Errorf("check files: %w", err)
	}
	var total, done int64
	for _, b := range blobs {
		total += b.size
	}
	for _, b := range blobs {
		there := true
		for i, chunk := range b.chunks {
			sha, err := asHash(chunk)
			if err != nil {
				return c, fmt.Errorf("content %s: %w", hex.EncodeToString(b.sha), err)
			}
			if names[sha] && !deep {
				continue
			}
			data, found, err := s.chunks.Get(ctx, sha) // what is missing in the list may have come since
			if err != nil {
				return c, err
			}
			if !found || len(data) != protocol.FileChunkSize(b.size, i+1) {
				there = false
				break
			}
		}
		if done += b.size; progress != nil {
			progress(done, total)
		}
		c.Contents++
		c.Bytes += b.size
		switch {
		case there && b.lost:
			c.Back++
			_, err = s.db.Exec(ctx, `UPDATE waystage.blob SET lost_at = NULL WHERE sha256 = $1`, b.sha)
		case !there && !b.lost:
			s.lost(ctx, Hash(b.sha))
		}
		if err != nil {
			return c, fmt.Errorf("check files: %w", err)
		}
	}
	rows, err = s.db.Query(ctx, `SELECT `+fileColumns+` FROM waystage.file f JOIN waystage.blob b USING (sha256) WHERE b.lost_at IS NOT NULL ORDER BY f.path`)
	if err == nil {
		c.Lost, err = pgx.CollectRows(rows, pgx.RowToStructByPos[File])
	}
	if err == nil {
		err = s.db.QueryRow(ctx, `SELECT count(*) FROM waystage.file WHERE sha256 IS NOT NULL`).Scan(&c.Files)
	}
	if err != nil {
		return c, fmt.Errorf("check files: %w", err)
	}
	return c, nil
}

// Collected counts what [Store.Collect] has removed.
type Collected struct {
	Before, Uploads, Contents, Chunks int64
}

// Collect removes what nothing names any more and the grace time has passed for: replaced contents, uploads that were given
// up, old receipts, contents, chunks.
func (s *Store) Collect(ctx context.Context) (n Collected, err error) {
	exec := func(into *int64, sql string, args ...any) {
		if err != nil {
			return
		}
		tag, e := s.db.Exec(ctx, sql, args...)
		*into += tag.RowsAffected()
		err = e
	}
	exec(&n.Before, `DELETE FROM waystage.file_before WHERE replaced_at < now() - $1::interval`, s.cfg.Grace)
	exec(&n.Uploads, `DELETE FROM waystage.upload WHERE state IN ('receiving', 'stored') AND touched_at < now() - $1::interval`, s.cfg.Abandoned)
	exec(&n.Uploads, `DELETE FROM waystage.upload WHERE decided_at < now() - $1::interval`, s.cfg.Receipts)
	exec(&n.Contents, `DELETE FROM waystage.blob b WHERE stored_at < now() - $1::interval
		AND NOT EXISTS (SELECT FROM waystage.file f WHERE f.sha256 = b.sha256) AND NOT EXISTS (SELECT FROM waystage.file_before p WHERE p.sha256 = b.sha256)`, s.cfg.Grace)
	if err != nil {
		return n, fmt.Errorf("collect files: %w", err)
	}
	// First what is there, then what is needed: a chunk that comes in between is in neither list. One that was stored long ago and
	// is stored again now has a new date, and stays.
	before := time.Now().Add(-s.cfg.Grace)
	names, err := s.chunks.Names(ctx)
	if err != nil {
		return n, err
	}
	rows, err := s.db.Query(ctx, `SELECT c FROM (SELECT unnest(chunks) AS c FROM waystage.blob
		UNION SELECT unnest(chunks) FROM waystage.upload WHERE state IN ('receiving', 'stored')) x WHERE c IS NOT NULL`)
	if err != nil {
		return n, fmt.Errorf("collect files: %w", err)
	}
	var needed []byte
	if _, err := pgx.ForEachRow(rows, []any{&needed}, func() error {
		sha, err := asHash(needed)
		delete(names, sha)
		return err
	}); err != nil {
		return n, fmt.Errorf("collect files: %w", err)
	}
	for sha := range names {
		gone, err := s.chunks.Drop(ctx, sha, before)
		if err != nil {
			return n, err
		}
		if gone {
			n.Chunks++
		}
	}
	return n, nil
}

// Keep checks and collects at intervals until ctx ends. Any number may run at the same time.
func (s *Store) Keep(ctx context.Context, every time.Duration) error {
	t := time.NewTimer(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		t.Reset(every)
		if c, err := s.Check(ctx, false, nil); err != nil && ctx.Err() == nil {
			s.log.Warn("the files could not be checked, it is tried again", zap.Error(err))
			continue
		} else if len(c.Lost) > 0 {
			s.log.Error("contents of files are lost: 'waystage files check' names them", zap.Int("files", len(c.Lost)))
		}
		if n, err := s.Collect(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("unused contents of files could not be removed, it is tried again", zap.Error(err))
		} else if n != (Collected{}) {
			s.log.Info("removed what no file needs", zap.Any("rows", n))
		}
	}
}
