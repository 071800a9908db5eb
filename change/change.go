// Package change is the vocabulary of change data: the messages that carry whole transactions of one PostgreSQL
// server, in commit order, from capture to apply.
//
// The body of a message is a stream of pgoutput messages exactly as the server sent them, each with its length in
// front; the header makes it readable for a person and chains it to its predecessor. It promises that a reader notices
// every lost, doubled or reordered message. Capture writes them, apply reads them, queue carries them unopened.
package change

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// LSN is a position in a server's write-ahead log, in bytes.
type LSN uint64

// String is PostgreSQL's form, "16/B374D848".
func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint32(l>>32), uint32(l)) }

// ParseLSN reads PostgreSQL's form.
func ParseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	h, err1 := strconv.ParseUint(hi, 16, 32)
	l, err2 := strconv.ParseUint(lo, 16, 32)
	if !ok || err1 != nil || err2 != nil {
		return 0, fmt.Errorf("change: %q is not a log position", s)
	}
	return LSN(h<<32 | l), nil
}

// Message is one queue message. Small transactions travel many to a message; a large one is cut into parts, all but
// the last with Last false, and a frame may continue in the next part.
type Message struct {
	Run    string   // random id of one run of a capture; sequence numbers count within it
	Seq    uint64   // 1, 2, 3 ... within the run
	Start  LSN      // where the run began: everything up to here was durable at the target then
	Prev   LSN      // end of the transaction before this group
	End    LSN      // end of the last transaction of the group; known on the last part only (0 before)
	Part   int      // 1, 2, ... within the group
	Last   bool     // the group ends here
	Txs    int      // transactions that end in this message
	Rows   int      // row messages in this message
	Tables []string // names of the tables touched, for people
	Body   []byte
}

// Header names.
const (
	hRun, hSeq, hStart, hPrev, hEnd = "Ws-Run", "Ws-Seq", "Ws-Start", "Ws-Prev", "Ws-End"
	hPart, hLast, hTxs, hRows, hTab = "Ws-Part", "Ws-Last", "Ws-Txs", "Ws-Rows", "Ws-Tables"
)

// Header renders everything but the body.
func (m *Message) Header() map[string][]string {
	h := map[string][]string{
		hRun: {m.Run}, hSeq: {strconv.FormatUint(m.Seq, 10)}, hStart: {m.Start.String()}, hPrev: {m.Prev.String()},
		hPart: {strconv.Itoa(m.Part)}, hTxs: {strconv.Itoa(m.Txs)}, hRows: {strconv.Itoa(m.Rows)},
	}
	if m.Last {
		h[hLast], h[hEnd] = []string{"true"}, []string{m.End.String()}
	}
	if len(m.Tables) > 0 {
		h[hTab] = []string{strings.Join(m.Tables, " ")}
	}
	return h
}

// ErrNotChangeData is returned for a message that this package did not write.
var ErrNotChangeData = errors.New("change: not a change data message")

// Parse reads a header and takes the body over.
func Parse(h map[string][]string, body []byte) (Message, error) {
	get := func(k string) string {
		if v := h[k]; len(v) == 1 {
			return v[0]
		}
		return ""
	}
	m := Message{Run: get(hRun), Last: get(hLast) == "true", Body: body}
	var errs [7]error
	m.Seq, errs[0] = strconv.ParseUint(get(hSeq), 10, 64)
	m.Start, errs[1] = ParseLSN(get(hStart))
	m.Prev, errs[2] = ParseLSN(get(hPrev))
	m.Part, errs[3] = strconv.Atoi(get(hPart))
	m.Txs, errs[4] = strconv.Atoi(get(hTxs))
	m.Rows, errs[5] = strconv.Atoi(get(hRows))
	if m.Last {
		m.End, errs[6] = ParseLSN(get(hEnd))
	}
	if t := get(hTab); t != "" {
		m.Tables = strings.Fields(t)
	}
	if err := errors.Join(errs[:]...); err != nil || m.Run == "" || m.Seq == 0 || m.Part < 1 {
		return Message{}, fmt.Errorf("%w: %v", ErrNotChangeData, err)
	}
	return m, nil
}

// AppendFrame appends one pgoutput message to a body.
func AppendFrame(body, msg []byte) []byte {
	return append(binary.AppendUvarint(body, uint64(len(msg))), msg...)
}

// Frames cuts the bodies of one group's messages back into pgoutput messages. The zero value is ready.
type Frames struct{ rest []byte }

// MaxFrame bounds one pgoutput message (one row): PostgreSQL's own limit for a field is 1 GiB.
const MaxFrame = 1 << 30

// Feed takes the next body and calls fn for every whole frame in it. The frame passed to fn is valid only during the call.
func (f *Frames) Feed(body []byte, fn func(frame []byte) error) error {
	buf, joined := body, len(f.rest) > 0
	if joined {
		// The partial frame grows in place: a frame over many parts costs its length, not its length squared.
		f.rest = append(f.rest, body...)
		buf = f.rest
	}
	for len(buf) > 0 {
		n, w := binary.Uvarint(buf)
		if w < 0 || n > MaxFrame || (w == 0 && len(buf) >= binary.MaxVarintLen64) {
			return fmt.Errorf("%w: frame length", ErrNotChangeData)
		}
		if w == 0 || uint64(len(buf)-w) < n {
			break
		}
		if err := fn(buf[w : w+int(n)]); err != nil {
			return err
		}
		buf = buf[w+int(n):]
	}
	switch {
	case len(buf) == 0:
		f.rest = nil
	case joined && len(buf) == len(f.rest): // nothing was whole yet
	default:
		f.rest = append([]byte(nil), buf...)
	}
	return nil
}

// Done reports whether no partial frame is left.
func (f *Frames) Done() bool { return len(f.rest) == 0 }
