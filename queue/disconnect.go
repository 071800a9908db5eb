package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/zap"
)

const (
	connPage    = 1024                   // connections in one answer of a server
	gatherFirst = 2 * time.Second        // for the first server to answer
	gatherMore  = 300 * time.Millisecond // for each further one
)

// connection is one connection of a device, at one of the servers.
type connection struct {
	server string
	cid    uint64
	name   string // "user/device"
	start  time.Time
}

// connName names a connection in the whole cluster.
func connName(server string, cid uint64) string { return server + ":" + strconv.FormatUint(cid, 10) }

// Disconnect closes the connections of a device, or of all of a user's devices when device is empty, on every server of the
// cluster. It is for a device that the Authenticator refuses from now on: else it is back at once. A login that was being
// decided at this moment is caught by a second look after the longest time that a login takes, which leaves alone what has come
// since: a device that was let in again in the meantime. The connection that except
// names (as [Authenticator] heard it) may stay.
func (q *Queue) Disconnect(ctx context.Context, user, device, except string) error {
	looked, err := q.disconnect(ctx, user, device, except, nil)
	q.mu.Lock()
	if q.ctx.Err() == nil {
		q.wg.Go(func() {
			if !sleep(q.ctx, authTimeout+time.Second) {
				return
			}
			if _, err := q.disconnect(q.ctx, user, device, except, looked); err != nil && q.ctx.Err() == nil {
				q.log.Warn("cannot look a second time for connections of a blocked device", zap.String("user", user), zap.String("device", device), zap.Error(err))
			}
		})
	}
	q.mu.Unlock()
	return err
}

// disconnect tells when it looked, by the clock of each server. before, if a server is in it, keeps connections that are younger.
func (q *Queue) disconnect(ctx context.Context, user, device, except string, before map[string]time.Time) (looked map[string]time.Time, err error) {
	all, looked, err := q.connections(ctx, user, device)
	errs := []error{err}
	for _, c := range all {
		if last, ok := before[c.server]; connName(c.server, c.cid) == except || ok && c.start.After(last) {
			continue
		}
		body, err := json.Marshal(map[string]uint64{"cid": c.cid})
		if err != nil {
			return looked, err
		}
		one, cancel := context.WithTimeout(ctx, gatherFirst)
		_, err = q.sys.RequestWithContext(one, "$SYS.REQ.SERVER."+c.server+".KICK", body)
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("queue: close connection %d of %s: %w", c.cid, c.name, err))
			continue
		}
		q.log.Info("closed a connection", zap.String("device", c.name), zap.Uint64("cid", c.cid))
	}
	return looked, errors.Join(errs...)
}

// connections asks every server which connections a device has, and tells when each has answered first, by its own clock.
func (q *Queue) connections(ctx context.Context, user, device string) ([]connection, map[string]time.Time, error) {
	ask := map[string]any{"auth": true, "acc": accountDevices, "limit": connPage}
	if device != "" {
		ask["user"] = user + "/" + device
	}
	var found []connection
	looked := map[string]time.Time{}
	for offset, more := 0, true; more; offset += connPage {
		more = false
		ask["offset"] = offset
		body, err := json.Marshal(ask)
		if err != nil {
			return nil, nil, err
		}
		answers, err := q.gather(ctx, "$SYS.REQ.SERVER.PING.CONNZ", body)
		if err != nil {
			return nil, nil, fmt.Errorf("queue: list connections: %w", err)
		}
		for _, a := range answers {
			var z struct {
				Server struct {
					ID string `json:"id"`
				} `json:"server"`
				Data struct {
					Now         time.Time `json:"now"`
					Total       int       `json:"total"`
					Connections []struct {
						CID   uint64    `json:"cid"`
						User  string    `json:"authorized_user"`
						Start time.Time `json:"start"`
					} `json:"connections"`
				} `json:"data"`
				Error any `json:"error"`
			}
			if err := json.Unmarshal(a, &z); err != nil || z.Error != nil || z.Server.ID == "" {
				return nil, nil, fmt.Errorf("queue: list connections: unexpected answer of a server: %.200q: %w", a, err)
			}
			if _, ok := looked[z.Server.ID]; !ok && !z.Data.Now.IsZero() {
				looked[z.Server.ID] = z.Data.Now
			}
			for _, c := range z.Data.Connections {
				if u, d, ok := strings.Cut(c.User, "/"); ok && u == user && (device == "" || d == device) {
					found = append(found, connection{z.Server.ID, c.CID, c.User, c.Start})
				}
			}
			if offset+len(z.Data.Connections) < z.Data.Total && len(z.Data.Connections) > 0 {
				more = true
			}
		}
	}
	return found, looked, nil
}

// gather collects the answers of all servers to one request.
func (q *Queue) gather(ctx context.Context, subject string, body []byte) ([][]byte, error) {
	inbox := q.sys.NewInbox()
	sub, err := q.sys.SubscribeSync(inbox)
	if err != nil {
		return nil, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := q.sys.PublishRequest(subject, inbox, body); err != nil {
		return nil, err
	}
	var answers [][]byte
	for wait := gatherFirst; ; wait = gatherMore {
		one, cancel := context.WithTimeout(ctx, wait)
		m, err := sub.NextMsgWithContext(one)
		cancel()
		switch {
		case err == nil:
			answers = append(answers, m.Data)
			if q.cfg.Broker.Embedded != nil {
				return answers, nil // there is one server
			}
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case len(answers) > 0 && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout)):
			return answers, nil
		default:
			return nil, err
		}
	}
}
