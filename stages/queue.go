package stages

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/waystage/waystage/protocol"
)

// Part is one message of the input queue: part Index of Total of an encoded request. Who sent it was checked by the
// gateway, and is not read from the body.
type Part struct {
	User, Device, Session string // Session: token of the subject
	Index, Total          int    // from 1
	ContentType, Encoding string // of the whole request
	Data                  []byte
	ReceivedAt            time.Time // when the queue stored it
	Deliveries            int       // 1 at the first delivery
	Delivery              Delivery
}

// Delivery is the queue's side of a part.
type Delivery interface {
	// Series looks up the other parts of the part's series and returns all Total of them in order, nil where one is not
	// in the queue, whichever workers they were delivered to.
	Series(ctx context.Context) (all []*Part, missing int, err error)
	// Nak gives the part back, to be delivered again after the delay.
	Nak(delay time.Duration) error
	// DeadLetter moves the part to the dead letters, with the reason.
	DeadLetter(ctx context.Context, reason string) error
}

// Input is what intake needs of the input queue.
type Input interface {
	// Fetch takes up to limit parts, waiting for the first until wait is over or ctx ends.
	Fetch(ctx context.Context, limit int, wait time.Duration) ([]*Part, error)
	// AckAll removes parts from the queue. It is called after the database commit; a lost one only means redelivery.
	AckAll(ctx context.Context, parts []*Part) error
}

// Output is what intake and reply need of the output queue.
type Output interface {
	// PutPage stores a page (from 1) in place of the one that had its number. It returns when the queue has it.
	PutPage(ctx context.Context, user, device, session string, page int, contentType, encoding string, data []byte) error
	// StartPage begins to do the same. The queue has the page when stored, which must be called, returns without an error.
	StartPage(user, device, session string, page int, contentType, encoding string, data []byte) (stored func(context.Context) error)
	// Pages counts the stored pages of a session.
	Pages(ctx context.Context, user, device, session string) (int, error)
	// Ready tells the gateways that a whole reply of so many pages is stored. It is a hint, it may be lost. only is the page of a
	// reply that has one, nil if it is not at hand.
	Ready(user, device, session string, pages int, contentType, encoding string, only []byte) error
}

// encodePage renders a page in the form of its request.
func encodePage(p *protocol.Page, contentType, encoding string) ([]byte, error) {
	body, err := protocol.Encode(p, contentType)
	if err != nil {
		return nil, err
	}
	return protocol.Compress(body, encoding)
}

func orNop(log *zap.Logger) *zap.Logger {
	if log == nil {
		return zap.NewNop()
	}
	return log
}

// kicks wakes the stages of all processes; nil is silent.
type kicks func(stage string)

func (k kicks) to(stage string) {
	if k != nil {
		k(stage)
	}
}
