package stages

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/jackc/pgx/v5"

	"github.com/waystage/waystage/protocol"
	"github.com/waystage/waystage/schema"
)

// fileSub is a file subscription of a set.
type fileSub struct {
	*schema.FileSubscription
	keys    string // the user's keys: $1 user, $2 attributes; empty: files for everybody who has the set
	changed string // files, also removed ones, since the cursor: $1 xmin, and if there are keys $2 those kept
	whole   string // all files: if there are keys, of $1
	news    string // whether there is a change since the cursor that a snapshot does not see: $1 xmin, $2 snapshot, and if there are keys $3 those kept
}

func newFileSub(f *schema.FileSubscription) *fileSub {
	out := &fileSub{FileSubscription: f, keys: f.KeyQuery("$1", "$2")}
	key := "''"
	if f.Pattern.HasKey {
		key = f.KeyOf("f.path")
	}
	list := "SELECT f.path, f.version, coalesce(encode(f.sha256, 'hex'), ''), f.size, f.content_type, " + key + " AS key FROM waystage.file f"
	out.changed = list + " WHERE f.version >= $1 AND " + f.Covers("f.path")
	out.news = "SELECT EXISTS (SELECT FROM waystage.file f WHERE f.version >= $1 AND ($2::text IS NULL OR NOT pg_visible_in_snapshot(f.version::text::xid8, $2::pg_snapshot)) AND " + f.Covers("f.path")
	out.whole = list + " WHERE f.sha256 IS NOT NULL AND " + f.Covers("f.path")
	if f.Pattern.HasKey {
		out.changed += " AND " + key + " = ANY ($2::text[])"
		out.news += " AND " + key + " = ANY ($3::text[])"
		// Each key has a range of its own in the index of paths.
		out.whole = "SELECT x.* FROM unnest($1::text[]) k CROSS JOIN LATERAL (" + out.whole +
			" AND f.path >= " + schema.Literal(f.Pattern.Prefix) + " || k AND f.path < " + schema.Literal(f.Pattern.Prefix) + " || k || chr(1114111) OFFSET 0) x WHERE x.key = k"
	}
	out.news += ")"
	return out
}

// fileset is what a session gets of one file subscription.
type fileset struct {
	subset // of its keys; without a table
	file   *fileSub
	part   protocol.FilesPart
}

// keysetName is the file subscription's place among the key sets of a cursor; no table is called so.
func (f *fileset) keysetName() string { return "file:" + f.file.Name }

// fileKeys asks for the keys of the sessions' files; the role is that of rows queries. bad hears of a query that failed.
func (s *session) fileKeys(batch *pgx.Batch, settings func(), bad func(*setError)) {
	for i := range s.files {
		f := &s.files[i]
		if f.file.keys == "" || s.refusal != nil {
			continue
		}
		settings()
		batch.Queue(f.file.keys, s.user, s.attributes).Query(func(rows pgx.Rows) (err error) {
			if f.all, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
				bad(&setError{set: s.set, table: "files of " + f.file.Name, err: err})
			}
			slices.Sort(f.all)
			f.hash = hashKeys(f.all)
			return err
		})
	}
}

// compareFiles finds which keys of files are new to the devices, gone, or kept.
func (b *replyBatch) compareFiles() error {
	for _, s := range b.sessions {
		for i := range s.files {
			f := &s.files[i]
			if !f.file.Pattern.HasKey || s.refusal != nil {
				continue
			}
			f.keyset, f.kept, f.fresh, f.gone = 0, nil, f.all, nil
			if s.from == nil {
				continue
			}
			id := s.from.keysets.Tables[f.keysetName()]
			if s.from.hashes[strconv.FormatInt(id, 10)] == hex.EncodeToString(f.hash) {
				f.keyset, f.kept, f.fresh = id, f.all, nil
				continue
			}
			var old []string
			err := b.tx.QueryRow(b.ctx, `SELECT keys FROM waystage.keyset WHERE id = $1`, id).Scan(&old)
			if errors.Is(err, pgx.ErrNoRows) {
				// Nobody knows what the device has: everything anew, rows too.
				s.startAnew()
				continue
			}
			if err != nil {
				return err
			}
			f.kept, f.fresh, f.gone = diff(old, f.all)
		}
	}
	return nil
}

// startAnew makes a session one that gets everything.
func (s *session) startAnew() {
	s.from, s.pages.first.Refresh = nil, true
	for i := range s.tables {
		t := &s.tables[i]
		t.keyset, t.kept, t.fresh, t.gone = 0, nil, t.all, nil
	}
	for i := range s.files {
		f := &s.files[i]
		f.keyset, f.kept, f.fresh, f.gone = 0, nil, f.all, nil
	}
}

// files reads what is new of the sessions' files, in the snapshot of the rows.
func (b *replyBatch) files() error {
	batch := &pgx.Batch{}
	for _, s := range b.sessions {
		if s.refusal != nil {
			continue
		}
		for i := range s.files {
			f := &s.files[i]
			f.part.Subscription, f.part.Gone = f.file.Name, f.gone
			take := func(rows pgx.Rows) error { return f.take(rows) }
			switch {
			case !f.file.Pattern.HasKey && s.from == nil:
				batch.Queue(f.file.whole).Query(take)
			case !f.file.Pattern.HasKey:
				batch.Queue(f.file.changed, s.from.xmin).Query(take)
			default:
				if len(f.kept) > 0 {
					batch.Queue(f.file.changed, s.from.xmin, f.kept).Query(take)
				}
				if len(f.fresh) > 0 {
					batch.Queue(f.file.whole, f.fresh).Query(take)
				}
			}
		}
	}
	if batch.Len() == 0 {
		return nil
	}
	var lost []lostFile
	batch.Queue(lostSQL).Query(func(rows pgx.Rows) (err error) {
		lost, err = pgx.CollectRows(rows, pgx.RowToStructByPos[lostFile])
		return err
	})
	if err := b.tx.SendBatch(b.ctx, batch).Close(); err != nil {
		return fmt.Errorf("read files: %w", err)
	}
	for _, s := range b.sessions {
		s.want(lost)
		for i := range s.files {
			if s.refusal != nil {
				break
			}
			if err := s.refuseOn(s.pages.files(b.ctx, &s.files[i].part)); err != nil {
				return err
			}
		}
	}
	return nil
}

// lostFile is a file whose content the store has lost.
type lostFile struct {
	Path, SHA string
	DeviceID  *int64 // that has put it
}

const lostSQL = `SELECT f.path, encode(b.sha256, 'hex'), f.device_id FROM waystage.blob b JOIN waystage.file f USING (sha256) WHERE b.lost_at IS NOT NULL LIMIT 10000`

// want asks the device for lost contents that it has put, or that its user may have: whoever has one may bring it again.
func (s *session) want(lost []lostFile) {
	for _, l := range lost {
		for i := range s.files {
			f := &s.files[i]
			key, ok := f.file.Pattern.Match(l.Path)
			if ok && f.file.Pattern.HasKey {
				_, ok = slices.BinarySearch(f.all, key)
			}
			if ok || l.DeviceID != nil && *l.DeviceID == s.deviceID {
				f.part.Wanted = append(f.part.Wanted, l.SHA)
				break
			}
		}
	}
}

func (f *fileset) take(rows pgx.Rows) error {
	for rows.Next() {
		var e protocol.FileEntry
		var version int64
		if err := rows.Scan(&e.Path, &version, &e.SHA256, &e.Size, &e.Type, &e.Key); err != nil {
			return err
		}
		if e.SHA256 == "" {
			f.part.Deletes = append(f.part.Deletes, e.Path)
			continue
		}
		e.Version = strconv.FormatInt(version, 10)
		f.part.Files = append(f.part.Files, e)
	}
	return rows.Err()
}

// files puts one subscription's part on the pages, cut where one is full.
func (p *pages) files(ctx context.Context, whole *protocol.FilesPart) error {
	part := func(size int) (*protocol.FilesPart, error) {
		if err := p.room(ctx, nil, size+tableOverhead+p.textSize(whole.Subscription)); err != nil {
			return nil, err
		}
		if n := len(p.fileParts); n == 0 || p.fileParts[n-1].Subscription != whole.Subscription {
			p.fileParts = append(p.fileParts, protocol.FilesPart{Subscription: whole.Subscription})
		}
		return &p.fileParts[len(p.fileParts)-1], nil
	}
	for _, key := range whole.Gone {
		on, err := part(p.textSize(key))
		if err != nil {
			return err
		}
		on.Gone = append(on.Gone, key)
	}
	for _, path := range whole.Deletes {
		on, err := part(p.textSize(path))
		if err != nil {
			return err
		}
		on.Deletes = append(on.Deletes, path)
	}
	for _, e := range whole.Files {
		on, err := part(2*rowOverhead + p.textSize(e.Path) + p.textSize(e.SHA256) + p.textSize(e.Type) + p.textSize(e.Key))
		if err != nil {
			return err
		}
		on.Files = append(on.Files, e)
	}
	for _, sha := range whole.Wanted {
		on, err := part(p.textSize(sha))
		if err != nil {
			return err
		}
		on.Wanted = append(on.Wanted, sha)
	}
	return nil
}

// withoutFiles is a set's description for a device that knows no files. Where it is another, its hash is too, so that the device
// hears of the files when it has learnt of them.
func withoutFiles(d *protocol.Definitions) *protocol.Definitions {
	if d == nil || len(d.Files) == 0 && !slices.ContainsFunc(d.Tables, func(t protocol.Table) bool { return t.FileColumn != "" }) {
		return d
	}
	plain := &protocol.Definitions{Hash: d.Hash + "-plain", Tables: slices.Clone(d.Tables)}
	for i := range plain.Tables {
		plain.Tables[i].FileColumn, plain.Tables[i].FileBefore = "", false
	}
	return plain
}

// wireFor is a set's description for the session's device.
func (s *set) wireFor(x *session) *protocol.Definitions {
	if x.filesKnown == nil {
		return s.plain
	}
	return s.wire
}

// showFiles finds out, for a session that only looks, whether its device knows files.
func (b *replyBatch) showFiles(s *session, c *cursor) {
	if set := s.view; set != nil && set.plain != set.wire && c.keysets.Schema == set.plain.Hash {
		s.filesKnown, s.files = nil, nil
	}
}

// filesDemand is a request's word on files as the session keeps it; nil: the device knows none.
func filesDemand(f *protocol.FilesRequest) (*string, error) {
	if f == nil {
		return nil, nil
	}
	b, err := json.Marshal(f)
	if err != nil {
		return nil, err
	}
	text := string(b)
	return &text, nil
}
