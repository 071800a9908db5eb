package change

import (
	"encoding/binary"
	"fmt"
	"time"
)

// Kind is the first byte of a pgoutput message (protocol version 1).
type Kind byte

// Kinds. Others (origin, type, logical message) carry nothing that Waystage uses.
const (
	KindBegin    Kind = 'B'
	KindCommit   Kind = 'C'
	KindRelation Kind = 'R'
	KindInsert   Kind = 'I'
	KindUpdate   Kind = 'U'
	KindDelete   Kind = 'D'
	KindTruncate Kind = 'T'
)

// State of one column's value in a tuple.
type State byte

// States.
const (
	Null      State = 'n'
	Unchanged State = 'u' // an out-of-line value that the update did not touch: keep what is there
	Text      State = 't'
)

// Value is one column of a tuple. Text is meaningful for state Text only.
type Value struct {
	State State
	Text  string
}

// Event is one decoded pgoutput message. Its strings share one copy of the frame, so they may be kept.
type Event struct {
	Kind Kind

	LSN  LSN       // begin: start of the commit record; commit: end of the transaction
	Time time.Time // begin, commit: commit time
	XID  uint32    // begin

	Relation *Relation // relation

	ID  uint32  // insert, update, delete: relation
	Old []Value // update, delete: the old tuple if one was sent, else nil
	Key bool    // Old holds the replica identity's columns only; its other values are no data
	New []Value // insert, update

	IDs []uint32 // truncate: relations

	oldBuf, newBuf []Value // kept from event to event
}

// Relation describes the columns of the tuples that follow.
type Relation struct {
	ID       uint32
	Schema   string // never empty; pg_catalog is spelled out
	Name     string
	Identity byte // 'd' default, 'i' index, 'f' full, 'n' nothing
	Columns  []RelationColumn
}

// RelationColumn is one column of a relation.
type RelationColumn struct {
	Name string
	Key  bool // part of the replica identity
	Type uint32
	Mod  int32
}

// KindOf is the kind of a frame, 0 for an empty one.
func KindOf(frame []byte) Kind {
	if len(frame) == 0 {
		return 0
	}
	return Kind(frame[0])
}

// RelationOf reads the relation ids that a row or truncate frame refers to, without decoding it.
func RelationOf(frame []byte, ids []uint32) ([]uint32, error) {
	d := decoder{raw: frame, s: ""}
	switch KindOf(frame) {
	case KindInsert, KindUpdate, KindDelete, KindRelation:
		d.at = 1
		return append(ids, d.u32()), d.err
	case KindTruncate:
		d.at = 1
		n := d.u32()
		d.u8()
		for i := uint32(0); i < n && d.err == nil; i++ {
			ids = append(ids, d.u32())
		}
		return ids, d.err
	}
	return ids, nil
}

// BoundaryOf reads position and commit time of a begin frame (start of the commit record) or a commit frame (end of the transaction).
func BoundaryOf(frame []byte) (LSN, time.Time, error) {
	d := decoder{raw: frame, at: 1}
	switch KindOf(frame) {
	case KindBegin:
		lsn := LSN(d.u64())
		return lsn, d.time(), d.err
	case KindCommit:
		d.u8()
		d.u64()
		lsn := LSN(d.u64())
		return lsn, d.time(), d.err
	}
	return 0, time.Time{}, fmt.Errorf("%w: not a transaction boundary", ErrNotChangeData)
}

// Decode reads one frame into ev, whose slices are reused: what is to be kept of them must be copied, the strings need not be. It returns false for kinds that carry nothing used here.
func Decode(frame []byte, ev *Event) (bool, error) {
	kind := KindOf(frame)
	*ev = Event{Kind: kind, IDs: ev.IDs[:0], oldBuf: ev.oldBuf[:0], newBuf: ev.newBuf[:0]}
	d := decoder{raw: frame, at: 1}
	switch kind {
	case KindBegin:
		ev.LSN, ev.Time, ev.XID = LSN(d.u64()), d.time(), d.u32()
	case KindCommit:
		d.u8()
		d.u64()
		ev.LSN, ev.Time = LSN(d.u64()), d.time()
	case KindRelation:
		d.s = string(frame)
		ev.Relation = d.relation()
	case KindInsert:
		d.s = string(frame)
		ev.ID = d.u32()
		d.expect('N')
		ev.newBuf = d.tuple(ev.newBuf)
		ev.New = ev.newBuf
	case KindUpdate:
		d.s = string(frame)
		ev.ID = d.u32()
		t := d.u8()
		if t == 'K' || t == 'O' {
			ev.Key = t == 'K'
			ev.oldBuf = d.tuple(ev.oldBuf)
			ev.Old = ev.oldBuf
			t = d.u8()
		}
		if t != 'N' {
			d.fail("tuple kind")
		}
		ev.newBuf = d.tuple(ev.newBuf)
		ev.New = ev.newBuf
	case KindDelete:
		d.s = string(frame)
		ev.ID = d.u32()
		t := d.u8()
		if t != 'K' && t != 'O' {
			d.fail("tuple kind")
		}
		ev.Key = t == 'K'
		ev.oldBuf = d.tuple(ev.oldBuf)
		ev.Old = ev.oldBuf
	case KindTruncate:
		n := d.u32()
		d.u8()
		for i := uint32(0); i < n && d.err == nil; i++ {
			ev.IDs = append(ev.IDs, d.u32())
		}
	case 'O', 'Y', 'M':
		return false, nil
	default:
		// An unknown message may change the meaning of those that follow.
		return false, fmt.Errorf("%w: message kind %q", ErrNotChangeData, byte(kind))
	}
	if d.err == nil && d.at != len(frame) {
		d.fail("length")
	}
	return true, d.err
}

// decoder reads a frame with bounds checks; after the first error everything reads as zero.
type decoder struct {
	raw []byte
	s   string // copy of raw that values may refer to
	at  int
	err error
}

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %s at byte %d of a %q message", ErrNotChangeData, what, d.at, d.raw[:1])
	}
}

func (d *decoder) need(n int) bool {
	if d.err != nil || n < 0 || len(d.raw)-d.at < n {
		d.fail("truncated")
		return false
	}
	return true
}

func (d *decoder) u8() byte {
	if !d.need(1) {
		return 0
	}
	d.at++
	return d.raw[d.at-1]
}

func (d *decoder) u16() uint16 {
	if !d.need(2) {
		return 0
	}
	d.at += 2
	return binary.BigEndian.Uint16(d.raw[d.at-2:])
}

func (d *decoder) u32() uint32 {
	if !d.need(4) {
		return 0
	}
	d.at += 4
	return binary.BigEndian.Uint32(d.raw[d.at-4:])
}

func (d *decoder) u64() uint64 {
	if !d.need(8) {
		return 0
	}
	d.at += 8
	return binary.BigEndian.Uint64(d.raw[d.at-8:])
}

var postgresEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

func (d *decoder) time() time.Time {
	us := int64(d.u64())
	return postgresEpoch.Add(time.Duration(us/1e6) * time.Second).Add(time.Duration(us%1e6) * time.Microsecond)
}

func (d *decoder) expect(b byte) {
	if d.u8() != b {
		d.fail("tuple kind")
	}
}

func (d *decoder) cstring() string {
	for i := d.at; i < len(d.raw) && d.err == nil; i++ {
		if d.raw[i] == 0 {
			s := d.s[d.at:i]
			d.at = i + 1
			return s
		}
	}
	d.fail("unterminated string")
	return ""
}

func (d *decoder) relation() *Relation {
	r := &Relation{ID: d.u32(), Schema: d.cstring(), Name: d.cstring(), Identity: d.u8()}
	if r.Schema == "" {
		r.Schema = "pg_catalog"
	}
	n := int(d.u16())
	for i := 0; i < n && d.err == nil; i++ {
		flags := d.u8()
		r.Columns = append(r.Columns, RelationColumn{Name: d.cstring(), Key: flags&1 != 0, Type: d.u32(), Mod: int32(d.u32())})
	}
	return r
}

func (d *decoder) tuple(vals []Value) []Value {
	n := int(d.u16())
	for i := 0; i < n && d.err == nil; i++ {
		switch st := State(d.u8()); st {
		case Null, Unchanged:
			vals = append(vals, Value{State: st})
		case Text:
			size := int(d.u32())
			if !d.need(size) {
				return vals
			}
			vals = append(vals, Value{State: Text, Text: d.s[d.at : d.at+size]})
			d.at += size
		default:
			d.fail("value kind")
		}
	}
	return vals
}
