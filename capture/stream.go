package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/waystage/waystage/change"
	"github.com/waystage/waystage/internal/pgerr"
	"github.com/waystage/waystage/schema"
)

const (
	statusMost   = 10 * time.Second // the server hears of us at least this often
	writeTimeout = 10 * time.Second
)

// stream is a replication connection in streaming mode. It is used by one goroutine.
type stream struct {
	conn  net.Conn
	fe    *pgproto3.Frontend
	in    *gather
	every time.Duration // between unsolicited status messages
	buf   []byte
}

// hello is what the server said about itself before streaming.
type hello struct {
	system    string
	timeline  int32
	flushed   change.LSN // end of the server's log
	confirmed change.LSN // the slot's
}

// dial connects, and looks at the server and the slot. It returns *Error for what retrying cannot mend.
func dial(ctx context.Context, c *Config) (*pgconn.PgConn, *gather, hello, error) {
	var h hello
	cfg, err := schema.ReplicationConfig(c.Server, c.application())
	if err != nil {
		return nil, nil, h, err
	}
	var in *gather
	cfg.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend {
		in = newGather(r)
		return pgproto3.NewFrontend(in, w)
	}
	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, nil, h, fmt.Errorf("connect for replication: %w", err)
	}
	if h, err = c.inspect(ctx, conn); err != nil {
		closePg(conn)
		return nil, nil, h, err
	}
	return conn, in, h, nil
}

func (c *Config) inspect(ctx context.Context, conn *pgconn.PgConn) (hello, error) {
	var h hello
	sys, err := pglogrepl.IdentifySystem(ctx, conn)
	if err != nil {
		return h, fmt.Errorf("IDENTIFY_SYSTEM: %w", err)
	}
	h.system, h.timeline, h.flushed = sys.SystemID, sys.Timeline, change.LSN(sys.XLogPos)
	row, err := queryRow(ctx, conn, "SELECT pg_is_in_recovery()::text")
	if err != nil {
		return h, err
	}
	if row[0] == "true" {
		return h, errors.New("the server is a standby: waiting until it is promoted, or the primary is there")
	}
	row, err = queryRow(ctx, conn, `SELECT plugin, coalesce(database, ''), (database = current_database())::text, coalesce(wal_status, ''),
		coalesce(confirmed_flush_lsn::text, '0/0'), coalesce(restart_lsn::text, ''), coalesce(to_jsonb(s)->>'invalidation_reason', '')
		FROM pg_replication_slots s WHERE slot_name = `+schema.Literal(c.Slot))
	if err != nil {
		return h, fmt.Errorf("read the slot: %w", err)
	}
	switch {
	case row == nil:
		return h, &Error{CodeSlotMissing, fmt.Sprintf("there is no replication slot %q", c.Slot), remedyResync}
	case row[0] != "pgoutput" || row[2] != "true":
		return h, &Error{CodeSlotForeign, fmt.Sprintf("slot %q is of plugin %q in database %q", c.Slot, row[0], row[1]), "Drop that slot, or give Waystage another slot name"}
	case schema.SlotTrouble(row[3], row[6]) != "":
		return h, &Error{CodeSlotLost, fmt.Sprintf("slot %q %s", c.Slot, schema.SlotTrouble(row[3], row[6])), remedyResync}
	case row[5] == "":
		return h, &Error{CodeSlotLost, fmt.Sprintf("slot %q is not usable: it keeps no log", c.Slot), remedyResync}
	}
	h.confirmed, err = change.ParseLSN(row[4])
	return h, err
}

// queryRow runs a simple query, the only kind on a replication connection. nil: no row.
func queryRow(ctx context.Context, conn *pgconn.PgConn, sql string) ([]string, error) {
	res, err := conn.Exec(ctx, sql).ReadAll()
	if err != nil {
		return nil, err
	}
	if len(res) != 1 || len(res[0].Rows) == 0 {
		return nil, nil
	}
	var out []string
	for _, v := range res[0].Rows[0] {
		out = append(out, string(v))
	}
	return out, nil
}

// start begins streaming and takes the connection over.
func start(ctx context.Context, c *Config, conn *pgconn.PgConn, in *gather) (*stream, error) {
	s := &stream{in: in, every: statusMost}
	row, err := queryRow(ctx, conn, "SELECT setting FROM pg_settings WHERE name = 'wal_sender_timeout'")
	if err != nil {
		return nil, err
	}
	if row != nil {
		if d, err := time.ParseDuration(row[0] + "ms"); err == nil && d > 0 {
			s.every = min(s.every, d/3)
		}
	}
	// 0/0: the server begins at what it has confirmed; what the target has beyond that is skipped by position.
	err = pglogrepl.StartReplication(ctx, conn, schema.Quote(c.Slot), 0, pglogrepl.StartReplicationOptions{PluginArgs: []string{
		"proto_version '1'", "publication_names " + schema.Literal(schema.Quote(c.Publication)), "messages 'true'"}})
	if err != nil {
		return nil, fmt.Errorf("START_REPLICATION: %w", err)
	}
	h, err := conn.Hijack()
	if err != nil {
		return nil, err
	}
	s.conn, s.fe = h.Conn, h.Frontend
	in.stream(h.Conn)
	return s, nil
}

func closePg(conn *pgconn.PgConn) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}

// Kinds of what the stream brings.
type received byte

const (
	gotNothing received = iota // the deadline passed
	gotData
	gotKeepalive
)

// next waits until the deadline. The frame is valid until the next call.
func (s *stream) next(deadline time.Time) (kind received, frame []byte, end change.LSN, reply bool, err error) {
	s.in.deadline = deadline
	msg, err := s.fe.Receive()
	if err != nil {
		var t interface{ Timeout() bool }
		if errors.As(err, &t) && t.Timeout() {
			return gotNothing, nil, 0, false, nil
		}
		return 0, nil, 0, false, fmt.Errorf("replication stream: %w", err)
	}
	switch m := msg.(type) {
	case *pgproto3.CopyData:
		switch {
		case len(m.Data) >= 25 && m.Data[0] == pglogrepl.XLogDataByteID:
			return gotData, m.Data[25:], change.LSN(binary.BigEndian.Uint64(m.Data[9:])), false, nil
		case len(m.Data) == 18 && m.Data[0] == pglogrepl.PrimaryKeepaliveMessageByteID:
			return gotKeepalive, nil, change.LSN(binary.BigEndian.Uint64(m.Data[1:])), m.Data[17] == 1, nil
		}
		return 0, nil, 0, false, fmt.Errorf("%w: replication message", change.ErrNotChangeData)
	case *pgproto3.ErrorResponse:
		return 0, nil, 0, false, fmt.Errorf("replication stream: %w", pgconn.ErrorResponseToPgError(m))
	case *pgproto3.NoticeResponse, *pgproto3.ParameterStatus:
		return gotNothing, nil, 0, false, nil
	default: // CopyDone, CommandComplete: the server has ended the stream
		return 0, nil, 0, false, fmt.Errorf("replication stream: the server ended it (%s)", strings.TrimPrefix(fmt.Sprintf("%T", m), "*pgproto3."))
	}
}

// status tells the server how far we are. All three positions are set: 0 would mean "the same as written". ask: the server is
// to answer at once.
func (s *stream) status(write, flush change.LSN, ask bool) error {
	b := s.buf[:0]
	b = append(b, 'd', 0, 0, 0, 4+34, pglogrepl.StandbyStatusUpdateByteID)
	b = binary.BigEndian.AppendUint64(b, uint64(write))
	b = binary.BigEndian.AppendUint64(b, uint64(flush))
	b = binary.BigEndian.AppendUint64(b, uint64(flush))
	b = binary.BigEndian.AppendUint64(b, uint64(time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)).Microseconds()))
	if ask {
		b = append(b, 1)
	} else {
		b = append(b, 0)
	}
	s.buf = b
	if err := s.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	if _, err := s.conn.Write(b); err != nil {
		return fmt.Errorf("status to the server: %w", err)
	}
	return nil
}

// close ends the stream politely: the server reads our last status, and the slot is free when it has hung up. Closing with
// data unread would throw away what the server has not read yet.
func (s *stream) close() {
	defer s.conn.Close()
	if s.conn.SetDeadline(time.Now().Add(2*time.Second)) != nil {
		return
	}
	if _, err := s.conn.Write([]byte{'c', 0, 0, 0, 4, 'X', 0, 0, 0, 4}); err != nil { // CopyDone, Terminate
		return
	}
	_, _ = io.Copy(io.Discard, s.conn) // until the server hangs up, or the time is over
}

// fatal finds the errors of the stream that retrying cannot mend.
func (c *Config) fatal(err error) *Error {
	var own *Error
	switch {
	case errors.As(err, &own):
		return own
	case pgerr.Is(err, "42704"): // undefined object: the slot was dropped between looking and starting, or the publication
		code := CodePublication
		var pg *pgconn.PgError
		if errors.As(err, &pg) && strings.HasPrefix(pg.Routine, "ReplicationSlot") {
			code = CodeSlotMissing
		}
		return &Error{code, fmt.Sprintf("slot %q or publication %q does not exist: %v", c.Slot, c.Publication, err), remedyResync}
	case pgerr.Is(err, "55000"): // object not in prerequisite state: "can no longer get changes from replication slot"
		return &Error{CodeSlotLost, fmt.Sprintf("slot %q cannot be read any more: %v", c.Slot, err), remedyResync}
	}
	return nil
}
