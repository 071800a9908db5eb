package capture

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/change"
)

func beginFrame(commit change.LSN) []byte {
	b := []byte{'B'}
	b = binary.BigEndian.AppendUint64(b, uint64(commit))
	b = binary.BigEndian.AppendUint64(b, 0)
	return binary.BigEndian.AppendUint32(b, 7)
}

func commitFrame(commit, end change.LSN) []byte {
	b := []byte{'C', 0}
	b = binary.BigEndian.AppendUint64(b, uint64(commit))
	b = binary.BigEndian.AppendUint64(b, uint64(end))
	return binary.BigEndian.AppendUint64(b, 0)
}

func relationFrame(id uint32, columns int) []byte {
	b := binary.BigEndian.AppendUint32([]byte{'R'}, id)
	b = append(b, "public\x00"...)
	b = append(b, fmt.Sprintf("t %d\x00d", id)...)
	b = binary.BigEndian.AppendUint16(b, uint16(columns))
	for i := range columns {
		b = append(b, 1)
		b = append(b, fmt.Sprintf("c%d\x00", i)...)
		b = binary.BigEndian.AppendUint64(b, 25<<32|0xffffffff)
	}
	return b
}

func insertFrame(id uint32, columns int, text string) []byte {
	b := binary.BigEndian.AppendUint32([]byte{'I'}, id)
	b = append(b, 'N')
	b = binary.BigEndian.AppendUint16(b, uint16(columns))
	for range columns {
		b = append(b, 't')
		b = binary.BigEndian.AppendUint32(b, uint32(len(text)))
		b = append(b, text...)
	}
	return b
}

// Whatever the transactions are like: the messages give back the same transactions, every group can be read alone, the
// chain has no hole, bodies keep to the size, and the bookkeeping adds up.
func TestGroupsCarryWholeTransactions(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 400
		var msgs []change.Message
		g := newGrouper("run", 1000, size, func(m change.Message) error {
			c, err := change.Parse(m.Header(), bytes.Clone(m.Body))
			msgs = append(msgs, c)
			return err
		})
		pos := newPosition(1000)
		feed := func(frame []byte) {
			scratch := bytes.Clone(frame)
			if err := g.add(scratch, &pos); err != nil {
				t.Fatal(err)
			}
			clear(scratch) // the grouper must have copied it
		}
		columns := map[uint32]int{}
		var want []string // rows, by transaction
		lsn := change.LSN(900)
		rows := 0
		for range rapid.IntRange(1, 25).Draw(t, "transactions") {
			lsn += 20
			feed(beginFrame(lsn))
			var tx string
			for range rapid.SampledFrom([]int{0, 1, 1, 1, 2, 5, 40}).Draw(t, "rows") {
				id := rapid.SampledFrom([]uint32{1, 2, 3}).Draw(t, "table")
				if columns[id] == 0 || rapid.IntRange(0, 9).Draw(t, "redefine") == 0 {
					columns[id]++
					feed(relationFrame(id, columns[id]))
				}
				frame := insertFrame(id, columns[id], rapid.SampledFrom([]string{"", "x", "some text", string(bytes.Repeat([]byte("long"), 300))}).Draw(t, "text"))
				feed(frame)
				tx += string(frame)
				if lsn >= 1000 {
					rows++
				}
			}
			feed(commitFrame(lsn, lsn+8))
			if tx != "" && lsn >= 1000 {
				want = append(want, tx)
			}
			if g.pending() && rapid.Bool().Draw(t, "idle") {
				if err := g.flush(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if g.pending() {
			if err := g.flush(); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		prev := change.LSN(1000)
		txs, counted := 0, 0
		var frames change.Frames
		var known map[uint32]int
		for i, m := range msgs {
			if m.Seq != uint64(i+1) || m.Start != 1000 || m.Prev != prev {
				t.Fatalf("message %d: %+v, previous end %s", i, m, prev)
			}
			if len(m.Body) > 2*size {
				t.Fatalf("a body of %d bytes", len(m.Body))
			}
			if m.Part == 1 {
				known = map[uint32]int{} // a reader may begin here
			}
			txs, counted = txs+m.Txs, counted+m.Rows
			err := frames.Feed(m.Body, func(frame []byte) error {
				var ev change.Event
				if _, err := change.Decode(frame, &ev); err != nil {
					return err
				}
				switch ev.Kind {
				case change.KindBegin:
					got = append(got, "")
				case change.KindRelation:
					known[ev.Relation.ID] = len(ev.Relation.Columns)
				case change.KindInsert:
					if known[ev.ID] != len(ev.New) {
						return fmt.Errorf("a row of %d columns, relation %d is known to have %d", len(ev.New), ev.ID, known[ev.ID])
					}
					got[len(got)-1] += string(frame)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if m.Last {
				if !frames.Done() {
					t.Fatal("a group ends in a partial frame")
				}
				prev = m.End
			}
		}
		if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
			t.Fatalf("transactions came out differently: %d, want %d", len(got), len(want))
		}
		if txs != len(want) || counted != rows {
			t.Fatalf("headers count %d transactions and %d rows, want %d and %d", txs, counted, len(want), rows)
		}
		if pos.sent > 1000 && prev != pos.sent {
			t.Fatalf("the last group ends at %s, the last transaction at %s", prev, pos.sent)
		}
	})
}
