package capture

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/waystage/waystage/change"
)

// grouper packs pgoutput messages into change data messages: many small transactions to a message, a large one into
// parts. Every group brings the relation descriptions that its rows need, so a reader can begin at any group.
type grouper struct {
	run   string
	start change.LSN // the target had everything up to here when the run began; such transactions are skipped
	size  int        // a body is cut at this many bytes
	emit  func(change.Message) error
	proof *time.Time // commit time of the transaction that ends at start, which must come again before anything new; nil: it has, or need not

	seq  uint64
	rels map[uint32][]byte // latest description of each relation, as the server sent it
	name map[uint32]string

	// The group under construction.
	body      []byte
	have      map[uint32]bool // relations described in the group
	tables    map[string]bool
	prev      change.LSN // end of the transaction before the group
	end       change.LSN // end of the last whole transaction in the group
	committed time.Time  // when that transaction was committed
	part      int        // parts already emitted
	txs       int        // whole transactions since the last part
	rows      int

	// The transaction under construction.
	begin    []byte // not yet in the body: a transaction without rows leaves no trace
	inTx     bool
	skip     bool
	txStart  int               // offset in body
	txRows   int               // of rows
	txRels   map[uint32][]byte // descriptions that its rows need, as they were at its start
	txTables map[string]bool
}

func newGrouper(run string, start change.LSN, size int, emit func(change.Message) error) *grouper {
	return &grouper{run: run, start: start, size: size, emit: emit, prev: start, end: start,
		rels: map[uint32][]byte{}, name: map[uint32]string{}, have: map[uint32]bool{}, tables: map[string]bool{},
		txRels: map[uint32][]byte{}, txTables: map[string]bool{}}
}

// pending tells whether a whole group waits to be flushed.
func (g *grouper) pending() bool { return !g.inTx && (g.txs > 0 || g.part > 0) }

// add takes one pgoutput message, which it copies. pos is told of transaction boundaries.
func (g *grouper) add(frame []byte, pos *position) error {
	switch change.KindOf(frame) {
	case change.KindBegin:
		commit, _, err := change.BoundaryOf(frame)
		if err != nil {
			return err
		}
		if commit >= g.start && g.proof != nil {
			return g.unproven(commit)
		}
		pos.begin()
		g.inTx, g.skip = true, commit < g.start
		g.begin = append(g.begin[:0], frame...)
		g.txStart, g.txRows = len(g.body), 0
		clear(g.txRels)
		clear(g.txTables)
		return nil
	case change.KindCommit:
		end, at, err := change.BoundaryOf(frame)
		if err != nil {
			return err
		}
		g.inTx = false
		if g.skip {
			if err := g.prove(end, at); err != nil {
				return err
			}
		}
		if g.skip || len(g.begin) > 0 {
			pos.commit(end, true)
			return nil
		}
		pos.commit(end, false)
		g.body = change.AppendFrame(g.body, frame)
		g.end, g.committed = end, at
		g.txs++
		g.rows, g.txRows = g.rows+g.txRows, 0
		maps.Copy(g.tables, g.txTables)
		if g.part > 0 || len(g.body) >= g.size {
			return g.flush()
		}
		return nil
	case change.KindRelation:
		var ev change.Event
		if _, err := change.Decode(frame, &ev); err != nil {
			return err
		}
		g.rels[ev.Relation.ID] = append([]byte(nil), frame...)
		g.name[ev.Relation.ID] = plain(ev.Relation.Schema + "." + ev.Relation.Name)
		delete(g.have, ev.Relation.ID) // changed: to be described again before its next row
		return nil
	case change.KindInsert, change.KindUpdate, change.KindDelete, change.KindTruncate:
		if g.skip {
			return nil
		}
		return g.row(frame)
	}
	return nil // origins, types and logical messages carry nothing for us
}

func (g *grouper) row(frame []byte) error {
	if !g.inTx {
		return fmt.Errorf("%w: a row outside a transaction", change.ErrNotChangeData)
	}
	if len(g.begin) > 0 {
		g.body = change.AppendFrame(g.body, g.begin)
		g.begin = g.begin[:0]
	}
	var buf [4]uint32
	ids, err := change.RelationOf(frame, buf[:0])
	if err != nil {
		return err
	}
	for _, id := range ids {
		rel, ok := g.rels[id]
		if !ok {
			return fmt.Errorf("%w: a row of a relation that was not described", change.ErrNotChangeData)
		}
		if _, ok := g.txRels[id]; !ok {
			g.txRels[id] = rel
			g.txTables[g.name[id]] = true
		}
		if !g.have[id] {
			g.have[id] = true
			g.body = change.AppendFrame(g.body, rel)
		}
	}
	g.body = change.AppendFrame(g.body, frame)
	g.txRows++
	if len(g.body) < g.size {
		return nil
	}
	return g.overflow()
}

// overflow is called in the middle of a transaction when the body is full: whole transactions before it go as a group
// of their own, then it goes in parts.
func (g *grouper) overflow() error {
	if g.txs > 0 {
		rest, had := slices.Clone(g.body[g.txStart:]), maps.Clone(g.have)
		g.body = g.body[:g.txStart]
		if err := g.flush(); err != nil {
			return err
		}
		for id, rel := range g.txRels {
			g.have[id] = had[id] // not had: described anew since, and no row needed that yet
			g.body = change.AppendFrame(g.body, rel)
		}
		g.body = append(g.body, rest...)
	}
	for len(g.body) >= g.size {
		rest := slices.Clone(g.body[g.size:])
		g.body = g.body[:g.size]
		if err := g.send(false); err != nil {
			return err
		}
		g.body = rest
	}
	return nil
}

// flush ends the group.
func (g *grouper) flush() error {
	for len(g.body) > g.size+g.size/2 { // only a row larger than the size gets here
		rest := slices.Clone(g.body[g.size:])
		whole := g.txs
		g.body, g.txs = g.body[:g.size], 0
		if err := g.send(false); err != nil {
			return err
		}
		g.body, g.txs = rest, whole
	}
	if err := g.send(true); err != nil {
		return err
	}
	g.prev, g.part = g.end, 0
	clear(g.have)
	return nil
}

func (g *grouper) send(last bool) error {
	if !last { // the open transaction's rows travel in its own parts
		g.rows, g.txRows = g.rows+g.txRows, 0
		maps.Copy(g.tables, g.txTables)
	}
	g.seq++
	g.part++
	m := change.Message{Run: g.run, Seq: g.seq, Start: g.start, Prev: g.prev, Part: g.part, Last: last,
		Txs: g.txs, Rows: g.rows, Tables: slices.Sorted(maps.Keys(g.tables)), Body: g.body}
	if last {
		m.End = g.end
	}
	clear(g.tables)
	// The next body will be about as large as this one: growing into it would copy it several times.
	g.body, g.txs, g.rows = make([]byte, 0, max(4<<10, min(len(m.Body), g.size)+4<<10)), 0, 0
	return g.emit(m)
}

// heartbeat is an empty group. A reader that has everything skips it; one from whom the queue has lost something
// finds that it begins behind the reader's position.
func (g *grouper) heartbeat() error {
	g.seq++
	return g.emit(change.Message{Run: g.run, Seq: g.seq, Start: g.start, Prev: g.end, End: g.end, Part: 1, Last: true})
}

// plain makes a table's name fit for a header that people read.
func plain(name string) string {
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r == 0x7f {
			return '_'
		}
		return r
	}, name)
}
