package device

import (
	"database/sql"
	"errors"
	"fmt"

	"github.com/waystage/waystage/protocol"
)

// checkEntry refuses what a server must not send: whatever it says, no path leads out of where paths belong.
func checkEntry(e protocol.FileEntry) error {
	if err := protocol.CheckPath(e.Path); err != nil {
		return fmt.Errorf("%w: %w", ErrReply, err)
	}
	if !protocol.ValidFileHash(e.SHA256) || e.Size < 0 || e.Size > protocol.MaxFileSize {
		return fmt.Errorf("%w: file %s with hash %q and %d bytes", ErrReply, e.Path, e.SHA256, e.Size)
	}
	return nil
}

// defineFiles notes a set's file subscriptions.
func (t *txn) defineFiles(set string, files []protocol.FileSubscription) error {
	if err := t.exec(`DELETE FROM _ws_file_def WHERE set_name = ?`, set); err != nil {
		return err
	}
	for ord, f := range files {
		if _, err := protocol.ParsePattern(f.Path); err != nil {
			return fmt.Errorf("%w: file subscription %s: %w", ErrReply, f.Name, err)
		}
		if err := t.exec(`INSERT INTO _ws_file_def (set_name, ord, name, pattern, upload, max_size) VALUES (?, ?, ?, ?, ?, ?)`, set, ord, f.Name, f.Path, f.Upload, f.MaxSize); err != nil {
			return err
		}
	}
	return nil
}

// filesPart applies what is new of one file subscription.
func (d *Device) filesPart(in *incoming, part *protocol.FilesPart) error {
	t, set := in.t, in.set.Name
	if d.files == "" {
		return nil
	}
	for _, key := range part.Gone {
		if _, err := t.run(`DELETE FROM _ws_file_member WHERE set_name = ? AND sub = ? AND key = ?`, set, part.Subscription, key); err != nil {
			return err
		}
	}
	for _, path := range part.Deletes {
		if _, err := t.run(`DELETE FROM _ws_file_member WHERE set_name = ? AND sub = ? AND path = ?`, set, part.Subscription, path); err != nil {
			return err
		}
	}
	if len(part.Gone)+len(part.Deletes)+len(part.Files) > 0 {
		d.sweepDue.Store(true)
	}
	for _, e := range part.Files {
		if err := checkEntry(e); err != nil {
			return err
		}
		if _, err := t.run(`INSERT INTO _ws_file_member (set_name, sub, path, key, gen) VALUES (?, ?, ?, ?, ?)
			ON CONFLICT (set_name, sub, path) DO UPDATE SET key = excluded.key, gen = excluded.gen`, set, part.Subscription, e.Path, e.Key, in.gen); err != nil {
			return err
		}
		have := ""
		if d.hasBlob(e.SHA256, e.Size) {
			have = e.SHA256
		}
		if _, err := t.run(`INSERT INTO _ws_file (path, version, sha, size, type, have) VALUES (?, ?, ?, ?, ?, ?)
			ON CONFLICT (path) DO UPDATE SET version = excluded.version, sha = excluded.sha, size = excluded.size, type = excluded.type, why = '',
				have = CASE WHEN excluded.have <> '' THEN excluded.have ELSE have END`, e.Path, e.Version, e.SHA256, e.Size, e.Type, have); err != nil {
			return err
		}
	}
	for _, sha := range part.Wanted {
		if err := d.heal(t, set, sha); err != nil {
			return err
		}
	}
	return nil
}

// heal offers a content again that the server has lost and asks for, if it is here.
func (d *Device) heal(t *txn, set, sha string) error {
	var path, typ string
	var size int64
	err := t.get(`SELECT path, type, size FROM _ws_file WHERE sha = ? AND have = sha LIMIT 1`, []any{sha}, &path, &typ, &size)
	if errors.Is(err, sql.ErrNoRows) {
		err = t.get(`SELECT path, type, size FROM _ws_upload WHERE sha = ? AND state = 'applied' AND heal = 0 ORDER BY seq DESC LIMIT 1`, []any{sha}, &path, &typ, &size)
	}
	if errors.Is(err, sql.ErrNoRows) || err == nil && !d.hasBlob(sha, size) {
		return nil
	}
	if err != nil {
		return err
	}
	var under bool
	if err := t.get(`SELECT EXISTS (SELECT 1 FROM _ws_upload WHERE sha = ? AND final IS NULL)`, []any{sha}, &under); err != nil || under {
		return err
	}
	seq, err := t.tick()
	if err != nil {
		return err
	}
	return t.exec(`INSERT INTO _ws_upload (id, seq, set_name, path, op, base, sha, size, type, state, made, heal, settled) VALUES (?, ?, ?, ?, 'put', ?, ?, ?, ?, 'unsent', ?, 1, 1)`,
		randomHex(16), seq, set, path, sha, sha, size, typ, now())
}

// settleFiles ends a reply's part of the files: what a refresh did not name goes, and so do paths that nothing has any more; changes
// made here that the server had decided before it composed the reply are its word now.
func (d *Device) settleFiles(in *incoming, sess *session, refresh bool) error {
	t := in.t
	if refresh {
		if err := t.exec(`DELETE FROM _ws_file_member WHERE set_name = ? AND gen <> ?`, sess.Set, in.gen); err != nil {
			return err
		}
		d.sweepDue.Store(true)
	}
	if err := t.exec(`UPDATE _ws_upload SET settled = 1 WHERE set_name = ? AND state = 'applied' AND settled = 0
		AND final_seq < (SELECT seq FROM _ws_outbox WHERE incarnation = ? AND n = ?)`, sess.Set, sess.Incarnation, sess.N); err != nil {
		return err
	}
	return t.dropFiles()
}

// dropFiles removes the paths that no set has.
func (t *txn) dropFiles() error {
	return t.exec(`DELETE FROM _ws_file WHERE NOT EXISTS (SELECT 1 FROM _ws_file_member m WHERE m.path = _ws_file.path)`)
}

// leaveFiles takes away what sets that are gone had.
func (t *txn) leaveFiles() error {
	for _, q := range []string{
		`DELETE FROM _ws_file_member WHERE set_name NOT IN (SELECT name FROM _ws_set WHERE gone = 0)`,
		`DELETE FROM _ws_file_def WHERE set_name NOT IN (SELECT name FROM _ws_set WHERE gone = 0)`,
		`UPDATE _ws_upload SET settled = 1 WHERE state = 'applied' AND set_name NOT IN (SELECT name FROM _ws_set WHERE gone = 0)`,
	} {
		if err := t.exec(q); err != nil {
			return err
		}
	}
	return t.dropFiles()
}

// filesTold is what a request says of files; nil: the device keeps none.
func (d *Device) filesTold(t *txn) (*protocol.FilesRequest, error) {
	if d.files == "" {
		return nil, nil
	}
	r := &protocol.FilesRequest{}
	return r, t.get(`SELECT count(*) FROM _ws_file WHERE have <> sha`, nil, &r.Waiting)
}

// recordRejected tells a file that was put here that a record which names it was rejected.
func (t *txn) recordRejected(set string, c *catalogue, f *frozen, v protocol.Verdict) error {
	s := c.set(set)
	if s == nil {
		return nil
	}
	m := s.member(f.Table)
	if m == nil || m.Def.FileColumn == "" {
		return nil
	}
	path := f.image(f.New)[m.Def.FileColumn]
	if path == nil {
		return nil
	}
	return t.exec(`UPDATE _ws_upload SET record = ? WHERE path = ? AND heal = 0 AND seq = (SELECT max(seq) FROM _ws_upload WHERE path = ? AND heal = 0)`,
		fmt.Sprintf("%s of %s: %s", v.State, f.Table, v.Code), *path, *path)
}
