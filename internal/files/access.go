package files

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// viewer is a device's user as rows queries see one.
type viewer struct {
	user, device string
	deviceID     int64
	attributes   string
	files        []*schema.FileSubscription // in sync order
}

func refuse(code protocol.Code, retry int, format string, args ...any) error {
	return &protocol.Error{Code: code, Retry: retry, Message: fmt.Sprintf(format, args...)}
}

// viewer finds who asks. The names are the broker's word.
func (s *Store) viewer(ctx context.Context, user, device string) (*viewer, error) {
	v := &viewer{user: user, device: device}
	var groups []string
	var blocked bool
	err := s.db.QueryRow(ctx, `SELECT d.id, d.blocked OR u.blocked, u.groups, u.attributes::text
		FROM waystage.device d JOIN waystage.app_user u ON u.name = d.user_name WHERE d.user_name = $1 AND d.name = $2`, user, device).
		Scan(&v.deviceID, &blocked, &groups, &v.attributes)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, refuse(protocol.CodeBlocked, 0, "device %s of user %s is not known any more; enrol it again", device, user)
	case err != nil:
		return nil, fmt.Errorf("look up device %s/%s: %w", user, device, err)
	case blocked:
		return nil, refuse(protocol.CodeBlocked, 0, "device %s or user %s is blocked; ask the operator", device, user)
	}
	defs, err := s.defs(ctx)
	if err != nil {
		return nil, err
	}
	v.files = defs.FilesFor(groups)
	return v, nil
}

// covering finds the first of the viewer's file subscriptions that has one of the paths; nil: none has. It is the one check
// of every door: what a key query gives decides, as in a reply. upload asks for one that lets devices change files.
func (s *Store) covering(ctx context.Context, v *viewer, paths []string, upload bool) (*schema.FileSubscription, error) {
	type asked struct {
		f    *schema.FileSubscription
		keys []string
	}
	var open []asked
	for _, f := range v.files {
		if upload && !f.Upload {
			continue
		}
		var keys []string
		found := false
		for _, p := range paths {
			if key, ok := f.Pattern.Match(p); ok {
				found, keys = true, append(keys, key)
			}
		}
		switch {
		case found && !f.Pattern.HasKey && len(open) == 0:
			return f, nil
		case found:
			open = append(open, asked{f, keys})
		}
	}
	if len(open) == 0 {
		return nil, nil
	}
	tx, err := s.db.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
	if err != nil {
		return nil, fmt.Errorf("look up the files of user %s: %w", v.user, err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	for _, sql := range []string{"SET LOCAL statement_timeout = '10s'", "SET LOCAL ROLE " + schema.Quote(schema.ReaderRole)} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return nil, fmt.Errorf("look up the files of user %s: %w", v.user, err)
		}
	}
	for _, a := range open {
		if !a.f.Pattern.HasKey {
			return a.f, nil
		}
		var may bool
		err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM ("+a.f.KeyQuery("$1", "$2")+") k WHERE k.key = ANY ($3::pg_catalog.text[]))", v.user, v.attributes, a.keys).Scan(&may)
		if err != nil {
			return nil, fmt.Errorf("evaluate the rows query of file subscription %s for user %s: %w", a.f.Name, v.user, err)
		}
		if may {
			return a.f, nil
		}
	}
	return nil, nil
}

// sees tells whether a content is one that the viewer may have now: that of a file of theirs, or what such a file was shortly
// before.
func (s *Store) sees(ctx context.Context, v *viewer, sha Hash) (bool, error) {
	rows, err := s.db.Query(ctx, `SELECT path FROM waystage.file WHERE sha256 = $1
		UNION SELECT p.path FROM waystage.file_before p JOIN waystage.file f USING (path)
			WHERE p.sha256 = $1 AND p.replaced_at > now() - $2::interval AND f.sha256 IS NOT NULL`, sha[:], s.cfg.Grace)
	if err != nil {
		return false, fmt.Errorf("look for the files with a content: %w", err)
	}
	paths, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return false, fmt.Errorf("look for the files with a content: %w", err)
	}
	if len(paths) == 0 {
		return false, nil
	}
	f, err := s.covering(ctx, v, paths, false)
	return f != nil, err
}

// Fetch gives a device one chunk of a content, from 1. The answer to who may not have it is the same as for one that does not
// exist.
func (s *Store) Fetch(ctx context.Context, user, device, sha256 string, n int) ([]byte, error) {
	none := refuse(protocol.CodeNotFound, 0, "no such content, or it is not that of a file of this user's: sync again")
	if !protocol.ValidFileHash(sha256) {
		return nil, none
	}
	sha, err := parseHash(sha256)
	if err != nil {
		return nil, none
	}
	v, err := s.viewer(ctx, user, device)
	if err != nil {
		return nil, err
	}
	if may, err := s.sees(ctx, v, sha); err != nil || !may {
		if err == nil {
			s.metrics.refused.Inc()
			err = none
		}
		return nil, err
	}
	b, err := s.blob(ctx, sha)
	switch {
	case errors.Is(err, pgx.ErrNoRows), err == nil && (n < 1 || n > len(b.chunks)):
		return nil, none
	case err != nil:
		return nil, fmt.Errorf("look up content %s: %w", sha256, err)
	}
	data, there, err := s.chunks.Get(ctx, b.chunks[n-1])
	if err != nil {
		return nil, fmt.Errorf("read chunk %d of content %s: %w", n, sha256, err)
	}
	if !there {
		s.lost(ctx, sha)
		return nil, refuse(protocol.CodeFileLost, 60, "the server has lost the content of the file; it comes when it is published again")
	}
	s.metrics.down(len(data))
	return data, nil
}
