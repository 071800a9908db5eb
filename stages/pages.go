package stages

import (
	"context"
	"fmt"

	"github.com/waystage/waystage/protocol"
)

// pages cuts one reply into pages and puts each into the queue as soon as it is full; the last one waits for the cursor.
type pages struct {
	s      *session
	out    Output
	limit  int // bytes of a page before compression
	most   int // bytes of a message
	json   bool
	epoch  string
	first  protocol.Page // what only page 1 carries
	reply  string
	number int // of the page that is being filled
	rows   int64

	tables    []protocol.TableRows
	verdicts  []protocol.Verdict
	fileParts []protocol.FilesPart
	verify    *protocol.Verified // what the page carries of a verification
	size      int                // upper estimate of the page's encoded bytes

	arena []byte // bytes of the row that is being read

	common *common // what the pages of several replies have in common; nil: nothing

	stored func(context.Context) error // waits for the page that was started last; nil: it was waited for
	only   []byte                      // the reply's page, if it has one
}

// pageError refuses a session whose reply cannot be sent.
type pageError struct{ refusal protocol.Error }

func (e *pageError) Error() string { return e.refusal.Message }

// tooBig names what makes the page too large for the queue.
func (p *pages) tooBig(size int) protocol.Error {
	what := "verdicts"
	if len(p.tables) > 0 {
		t := p.tables[len(p.tables)-1]
		what = "a row of " + t.Table
	}
	return protocol.Error{Code: protocol.CodeTooBig, Message: fmt.Sprintf(
		"%s makes a page of %d bytes, the queue takes %d; ask the operator to leave the large column out of the subscription", what, size, p.most)}
}

func newPages(s *session, out Output, cfg ReplyConfig, epoch string) *pages {
	return &pages{
		s: s, out: out, limit: cfg.PageSize, most: cfg.MaxPage, json: s.contentType == protocol.ContentJSON, epoch: epoch,
		reply: randomID(), number: 1, size: pageOverhead,
	}
}

// Upper estimates of what the encodings add.
const (
	pageOverhead    = 512
	tableOverhead   = 64
	rowOverhead     = 48
	valueOverhead   = 9
	verdictOverhead = 320
)

// textSize bounds the encoded size of a text.
func (p *pages) textSize(s string) int {
	n := len(s) + valueOverhead
	if p.json {
		for i := 0; i < len(s); i++ {
			switch c := s[i]; {
			case c < 0x20, c == 0xe2: // 0xe2 begins U+2028, which encoding/json escapes
				n += 5
			case c == '"', c == '\\':
				n++
			}
		}
	}
	return n
}

// room makes sure that size more bytes fit on the page, with the header of the subscription's table if it is new there;
// a full page is put.
func (p *pages) room(ctx context.Context, sub *subscription, size int) error {
	need := size + p.header(sub)
	if p.size+need > p.limit && (len(p.tables)+len(p.verdicts)+len(p.fileParts) > 0 || p.verify != nil) {
		if err := p.put(ctx, false); err != nil {
			return err
		}
		need = size + p.header(sub)
	}
	p.size += need
	return nil
}

// header bounds what naming the subscription's table takes, 0 if it is named.
func (p *pages) header(sub *subscription) int {
	if n := len(p.tables); sub == nil || n > 0 && p.tables[n-1].Table == sub.Table {
		return 0
	}
	size := tableOverhead + p.textSize(sub.Table)
	for _, c := range sub.columns {
		size += p.textSize(c)
	}
	return size
}

// table is the place for a subscription's rows on the current page.
func (p *pages) table(sub *subscription) *protocol.TableRows {
	if n := len(p.tables); n > 0 && p.tables[n-1].Table == sub.Table {
		return &p.tables[n-1]
	}
	p.tables = append(p.tables, protocol.TableRows{Table: sub.Table, Columns: sub.columns})
	return &p.tables[len(p.tables)-1]
}

func (p *pages) gone(ctx context.Context, sub *subscription, key string) error {
	if err := p.room(ctx, sub, p.textSize(key)); err != nil {
		return err
	}
	t := p.table(sub)
	t.Gone = append(t.Gone, key)
	return nil
}

// texts copies a row of text values out of the connection's buffer: one string for all of them.
func (p *pages) texts(raw [][]byte) (vals []protocol.Value, size int) {
	p.arena = p.arena[:0]
	for _, v := range raw {
		p.arena = append(p.arena, v...)
	}
	all := string(p.arena)
	texts := make([]string, len(raw))
	vals = make([]protocol.Value, len(raw))
	at := 0
	for i, v := range raw {
		if v == nil {
			size += valueOverhead
			continue
		}
		texts[i] = all[at : at+len(v)]
		at += len(v)
		vals[i] = &texts[i]
		size += p.textSize(texts[i])
	}
	return vals, size
}

func (p *pages) deleted(ctx context.Context, sub *subscription, raw [][]byte) error {
	key, size := p.texts(raw)
	if err := p.room(ctx, sub, size+rowOverhead); err != nil {
		return err
	}
	t := p.table(sub)
	t.Deletes = append(t.Deletes, key)
	return nil
}

// row adds a row: its version, then its values.
func (p *pages) row(ctx context.Context, sub *subscription, raw [][]byte) error {
	row, size := p.read(raw)
	return p.add(ctx, sub, row, size)
}

// read makes a row, of which several replies may have a part, and bounds its encoded size.
func (p *pages) read(raw [][]byte) (row protocol.Row, size int) {
	vals, size := p.texts(raw)
	return protocol.Row{Version: *vals[0], Values: vals[1:]}, size + rowOverhead
}

func (p *pages) add(ctx context.Context, sub *subscription, row protocol.Row, size int) error {
	if err := p.room(ctx, sub, size); err != nil {
		return err
	}
	t := p.table(sub)
	t.Rows = append(t.Rows, row)
	p.rows++
	return nil
}

func (p *pages) verdict(ctx context.Context, v protocol.Verdict) error {
	size := verdictOverhead + p.textSize(v.Table) + p.textSize(v.Detail) + p.textSize(v.Constraint)
	for _, k := range v.Key {
		if k != nil {
			size += p.textSize(*k)
		}
	}
	if err := p.room(ctx, nil, size); err != nil {
		return err
	}
	p.verdicts = append(p.verdicts, v)
	return nil
}

// empty tells whether nothing was added yet.
func (p *pages) empty() bool {
	return p.number == 1 && len(p.tables)+len(p.verdicts)+len(p.fileParts) == 0
}

// put encodes the current page and stores it; the last one is on its way then.
func (p *pages) put(ctx context.Context, last bool) error {
	page := protocol.Page{}
	if p.number == 1 {
		page = p.first
		if last && page.Rows == 0 {
			page.Rows = p.rows
		}
	}
	page.V, page.Incarnation, page.N, page.Nonce = protocol.Version, p.s.incarnation, p.s.n, p.s.nonce
	page.Reply, page.Page, page.Last, page.CursorFrom, page.Epoch = p.reply, p.number, last, p.s.cursorFrom, p.epoch
	page.Tables, page.Verdicts, page.Verify, page.Files = p.tables, p.verdicts, p.verify, p.fileParts
	if p.number == 1 && p.s.asked {
		if page.Verify == nil {
			page.Verify = &protocol.Verified{}
		}
		page.Verify.Ask = true
	}
	if last {
		page.Cursor, page.More = p.s.cursor, p.s.open
	}
	if err := p.start(&page); err != nil {
		return err
	}
	if !last {
		if err := p.wait(ctx); err != nil {
			return err
		}
		p.number++
		p.tables, p.verdicts, p.verify, p.fileParts, p.size = nil, nil, nil, nil, pageOverhead
	}
	return nil
}

// wait returns when the queue has the page that was started last.
func (p *pages) wait(ctx context.Context) error {
	if p.stored == nil {
		return nil
	}
	stored := p.stored
	p.stored = nil
	return stored(ctx)
}

// refuse makes the refusal the only page.
func (p *pages) refuse(e *protocol.Error) error {
	p.number = 1
	return p.start(&protocol.Page{
		V: protocol.Version, Incarnation: p.s.incarnation, N: p.s.n, Nonce: p.s.nonce, Reply: p.reply, Page: 1, Last: true,
		CursorFrom: p.s.cursorFrom, Epoch: p.epoch, Sets: p.first.Sets, Error: e,
	})
}

// start encodes a page and begins to store it.
func (p *pages) start(page *protocol.Page) error {
	body, err := p.common.encode(page, p.s.contentType, p.s.encoding)
	if err != nil {
		return &sessionError{p.s.id, fmt.Errorf("encode page %d of session %s: %w", page.Page, p.s.token, err)}
	}
	if len(body) > p.most && page.Error == nil {
		return &pageError{p.tooBig(len(body))}
	}
	stored := p.out.StartPage(p.s.user, p.s.device, p.s.token, page.Page, p.s.contentType, p.s.encoding, body)
	p.stored = func(ctx context.Context) error {
		if err := stored(ctx); err != nil {
			return &sessionError{p.s.id, fmt.Errorf("publish page %d of session %s: %w", page.Page, p.s.token, err)}
		}
		return nil
	}
	if p.only = nil; page.Page == 1 && page.Last {
		p.only = body
	}
	return nil
}
