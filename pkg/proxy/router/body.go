package router

// bodyCopy is what of a request's body must be sent again if an attempt fails. It is bounded by the listener's
// buffer limit; a longer body is streamed and cannot be retried.
type bodyCopy struct {
	buf      []byte
	overflow bool
}

// maxKeptBody is the memory that stays with a pooled request.
const maxKeptBody = 16 << 10

func (c *bodyCopy) clear() {
	if cap(c.buf) > maxKeptBody {
		c.buf = nil
	}
	c.buf = c.buf[:0]
	c.overflow = false
}

// keepForRetry copies a piece of the body if a retry may need it. It returns false if there is no room.
func (r *Request) keepForRetry(b []byte) bool {
	c := &r.body
	if c.overflow || (!r.retry.enabled && r.try.phase == streaming) || r.respStarted {
		return !c.overflow
	}
	limit := int(r.info.Listener.BufferLimit)
	if limit == 0 {
		limit = 1 << 20
	}
	if len(c.buf)+len(b) > limit {
		c.overflow = true
		c.buf = nil
		r.retry.disable()
		return false
	}
	c.buf = append(c.buf, b...)
	return true
}
