package router

import "github.com/sockmesh/sockmesh/pkg/proxy/stream"

// bodyCopy is the part of a request's body that may have to be sent (again): what comes while there is no
// upstream yet, and, where the route retries, everything up to the listener's buffer limit. A longer body is
// streamed and cannot be retried.
type bodyCopy struct {
	buf []byte
}

const (
	// maxKeptBody is the memory that stays with a pooled request.
	maxKeptBody = 16 << 10
	// waitLimit is how much of a body is taken in before there is an upstream; the rest stays in the socket.
	waitLimit = 32 << 10
)

func (c *bodyCopy) clear() {
	if cap(c.buf) > maxKeptBody {
		c.buf = nil
	}
	c.buf = c.buf[:0]
}

// bufferLimit bounds the copies that are kept for retries.
func (r *Request) bufferLimit() int {
	if n := int(r.info.Listener.BufferLimit); n > 0 {
		return n
	}
	return 1 << 20
}

// keep copies a piece of the body where that may be needed.
func (r *Request) keep(b []byte) {
	c := &r.body
	sending := r.try.phase == streaming
	if sending && (!r.retry.enabled || r.respStarted) {
		return
	}
	if len(c.buf)+len(b) > r.bufferLimit() {
		r.retry.enabled = false
		if sending {
			c.buf = nil
			return
		}
	}
	c.buf = append(c.buf, b...)
	if !sending && len(c.buf) >= waitLimit && !r.reqEnded {
		r.pause(noUpstream)
	}
}

// sendBody sends the copy to a stream that has just got its head.
func (r *Request) sendBody(s stream.Stream, end bool) {
	s.SendData(r.body.buf, end)
	if !r.retry.enabled {
		r.body.clear()
	}
}
