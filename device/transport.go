package device

import (
	"context"

	"github.com/waystage/waystage/protocol"
)

// Transport carries the calls of docs/protocol.md section 3 between a device and a server. A refusal by the server is
// a *protocol.Error; every other error is one of transport, and the call may have had its effect or not.
// Dial makes one; its user is Device, one call at a time.
type Transport interface {
	Enrol(ctx context.Context, e protocol.Enrolment) (protocol.Enrolled, error) // with a token in it: redeem
	Rotate(ctx context.Context, r protocol.Rotation) error
	Put(ctx context.Context, session, part string, p Payload) (protocol.Receipt, error)
	// Get returns one page; the server may hold the call for some seconds while the page does not exist.
	Get(ctx context.Context, session string, page int) (Payload, error)
	Ack(ctx context.Context, session string) error
	Status(ctx context.Context, session string) (protocol.Status, error)
	// News waits until a sync would bring something, or the server does not hold the call any longer: then it names no set.
	News(ctx context.Context, ask protocol.Watch) (protocol.News, error)
	Close() error
}

// Checker is a Transport that can ask, at once and for certain, for which sets a session would bring something. It is used for sets
// that have nothing to send.
type Checker interface {
	Check(ctx context.Context, ask protocol.Watch) (protocol.News, error)
}

// Payload is the bytes of a request (or a part of it) or of a page, with the headers that say how to read them.
type Payload struct {
	ContentType string
	Encoding    string
	Data        []byte
}

// Login is what a connection is made with: password, enrolment token or JWT once, at enrolment, and the device's key ever after.
type Login struct {
	Servers   []string
	User      string
	Device    string
	Password  string
	EnrolOnly string // enrolment token or JWT: such a connection can enrol and nothing else
	Seed      []byte // NKEY seed of type user; nil: log in with one of the others
}

// Dialer connects. DialNATS is the usual one.
type Dialer func(ctx context.Context, l Login) (Transport, error)
