package queue

import (
	"context"
	"encoding/json"

	"github.com/waystage/waystage/protocol"
)

// maxEnrolment bounds the body of an enrolment or change of key, in bytes.
const maxEnrolment = 4096

// enter takes the key of a device that has proven in another way whose it is.
func (s *shift) enter(c *call) {
	var req protocol.Enrolment
	if !s.read(c, &req, `an enrolment is JSON: {"key": "U...", "app": "..."}`) {
		return
	}
	req.Token = "" // what it is not asked for is not looked at
	s.do(c, func(ctx context.Context) (any, error) { return s.enrol(ctx, c.user, c.device, req) })
}

// redeem does the same for a token, which is used up by it. A connection that came by a token can call nothing else.
func (s *shift) redeem(c *call) {
	var req protocol.Enrolment
	if !s.read(c, &req, `an enrolment by token is JSON: {"key": "U...", "token": "`+protocol.TokenPrefix+`...", "app": "..."}`) {
		return
	}
	if req.Token == "" {
		c.refuse(protocol.CodeTokenUnknown, 0, "the enrolment names no token")
		return
	}
	s.do(c, func(ctx context.Context) (any, error) { return s.enrol(ctx, c.user, c.device, req) })
}

// rotate takes the key that a device will log in with from now on.
func (s *shift) rotate(c *call) {
	var req protocol.Rotation
	if !s.read(c, &req, `a change of key is JSON: {"key": "U..."}`) {
		return
	}
	if s.cfg.Rotate == nil {
		c.refuse(protocol.CodeNotFound, 0, "keys do not change here")
		return
	}
	s.do(c, func(ctx context.Context) (any, error) {
		return protocol.Rotated{OK: true}, s.cfg.Rotate(ctx, c.user, c.device, req)
	})
}

// read reads a call's JSON; what is no such call is refused.
func (s *shift) read(c *call, into any, want string) bool {
	s.counts.enrols.Add(1)
	if err := json.Unmarshal(c.r.Data(), into); err != nil || len(c.r.Data()) > maxEnrolment {
		c.refuse(protocol.CodeMalformed, 0, "%s", want)
		return false
	}
	return true
}
