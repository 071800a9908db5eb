package apply

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/waystage/waystage/change"
)

func txBody(body []byte, commit, end change.LSN, rows int) []byte {
	b := binary.BigEndian.AppendUint64([]byte{'B'}, uint64(commit))
	b = append(b, make([]byte, 12)...)
	body = change.AppendFrame(body, b)
	for range rows {
		r := binary.BigEndian.AppendUint32([]byte{'I'}, 1)
		r = binary.BigEndian.AppendUint32(append(r, 'N', 0, 1, 't'), uint32(len(end.String())))
		body = change.AppendFrame(body, append(r, end.String()...))
	}
	c := binary.BigEndian.AppendUint64([]byte{'C', 0}, uint64(commit))
	c = binary.BigEndian.AppendUint64(c, uint64(end))
	return change.AppendFrame(body, append(c, make([]byte, 8)...))
}

// runOf makes one capture's messages for the transactions that end behind start, cut at random.
func runOf(t *rapid.T, name string, start change.LSN, ends []change.LSN, rows []int) (out []change.Message) {
	prev, seq := start, uint64(0)
	for i := 0; i < len(ends); {
		if ends[i] <= start {
			i++
			continue
		}
		n := rapid.IntRange(1, 3).Draw(t, "transactions in the group")
		var body []byte
		end, txs := prev, 0
		for ; i < len(ends) && txs < n; i++ {
			body = txBody(body, ends[i]-8, ends[i], rows[i])
			end, txs = ends[i], txs+1
		}
		for part := 1; ; part++ {
			size := len(body)
			if rapid.IntRange(0, 2).Draw(t, "cut") == 0 && len(body) > 1 {
				size = rapid.IntRange(1, len(body)-1).Draw(t, "at")
			}
			seq++
			m := change.Message{Run: name, Seq: seq, Start: start, Prev: prev, Part: part, Body: body[:size]}
			body = body[size:]
			if len(body) == 0 {
				m.Last, m.End, m.Txs = true, end, txs
			}
			out = append(out, m)
			if m.Last {
				break
			}
		}
		prev = end
	}
	return out
}

// Whatever the queue loses, doubles or moves, and however many captures have written: every transaction is handed on once,
// whole and in order, or the gap is reported.
func TestHazardReplay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var ends []change.LSN
		var rows []int
		at := change.LSN(1000)
		for range rapid.IntRange(1, 15).Draw(t, "transactions") {
			at += change.LSN(rapid.IntRange(8, 40).Draw(t, "size"))
			ends, rows = append(ends, at), append(rows, rapid.IntRange(0, 4).Draw(t, "rows"))
		}
		position := change.LSN(1000)
		var done []string // what was committed
		for round := 0; ; round++ {
			starts := append([]change.LSN{1000}, ends...)
			start := starts[rapid.IntRange(0, slices.Index(starts, position)).Draw(t, "start")]
			msgs := runOf(t, fmt.Sprint("run", round), start, ends, rows)
			faults := 0
			if round < 5 {
				for range rapid.IntRange(0, 4).Draw(t, "faults") {
					if len(msgs) == 0 {
						break
					}
					i := rapid.IntRange(0, len(msgs)-1).Draw(t, "where")
					faults++
					switch rapid.IntRange(0, 3).Draw(t, "fault") {
					case 0:
						msgs = slices.Delete(msgs, i, i+1)
					case 1:
						msgs = slices.Insert(msgs, i, msgs[i])
					case 2:
						msgs[0], msgs[i] = msgs[i], msgs[0]
					case 3: // a capture that was thought dead goes on writing; every capture names its run anew
						old := runOf(t, fmt.Sprint("zombie", round, ".", faults), 1000, ends, rows)
						msgs = slices.Insert(msgs, i, old[rapid.IntRange(0, len(old)-1).Draw(t, "which"):]...)
					}
				}
			}
			f := newFeed(position)
			var open []string // of the batch, committed at the end of a group
			cur := 0
			var failed error
			for i := range msgs {
				err := f.take(&msgs[i], func(ev *change.Event) error {
					switch ev.Kind {
					case change.KindBegin:
						cur = 0
					case change.KindInsert:
						cur++
					case change.KindCommit:
						open = append(open, fmt.Sprintf("%s %d", ev.LSN, cur))
					}
					return nil
				})
				if err != nil {
					failed = err
					break
				}
				if !f.open {
					done, open, position = append(done, open...), nil, f.applied
				}
			}
			if failed != nil && !errors.Is(failed, errGap) && !errors.Is(failed, errCut) {
				t.Fatalf("%v", failed)
			}
			if failed != nil && faults == 0 {
				t.Fatalf("a good run fails: %v", failed)
			}
			if faults == 0 {
				break
			}
		}
		var want []string
		for i, e := range ends {
			want = append(want, fmt.Sprintf("%s %d", e, rows[i]))
		}
		if !slices.Equal(done, want) {
			t.Fatalf("got  %v\nwant %v", done, want)
		}
	})
}

func TestCarries(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ids := rapid.SliceOfNDistinct(rapid.Int64Range(1, 60), 0, 40, rapid.ID[int64]).Draw(t, "ids")
		got, err := parseCarries(formatCarries(ids))
		slices.Sort(ids)
		if err != nil || !slices.Equal(got, ids) {
			t.Fatalf("%q gave %v, %v; want %v", formatCarries(ids), got, err, ids)
		}
	})
	if got := formatCarries([]int64{9, 3, 4, 5, 7}); got != "3-5,7,9" {
		t.Error(got)
	}
	for _, bad := range []string{",", "x", "1-", "-1", "5-3", "0", "1-99999999999", "1,,2", "1-2-3", " 1"} {
		if ids, err := parseCarries(bad); err == nil {
			t.Errorf("%q: %v", bad, ids)
		}
	}
}

func FuzzParseCarries(f *testing.F) {
	f.Add("3-7,9")
	f.Add("1-1048577")
	f.Fuzz(func(t *testing.T, text string) {
		ids, err := parseCarries(text)
		if err == nil && len(ids) > maxCarries {
			t.Fatalf("%d ids", len(ids))
		}
	})
}
