package router

import (
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
)

// The rest of a long body may skip the proxy, if both its ends are connections that carry it as it is (package aside). It
// counts in the record, and for the idle clocks, as if it had come: that is settled whenever something comes from the
// connection that carries it, before that is looked at, and at the end.

// body is one direction's.
type body struct {
	aside.Body
	in, out stream.Carrier // nil: it doesn't skip the proxy
	refused bool
}

// OnWaiting: the rest of a long body may skip the proxy.
func (r *Request) OnWaiting() { r.carry(aside.ToServer) }

// carryWaiting is for a request that has waited for its upstream. Where more of it is at hand, that comes first.
func (r *Request) carryWaiting() {
	if c, ok := r.down.(stream.Carrier); ok && r.rt.deps.PairUp != nil {
		if from, left := c.Incoming(); left >= aside.MinBody && !from.Offering() && from.Unconsumed() == 0 {
			r.carry(aside.ToServer)
		}
	}
}

// carry lets what is left of a direction's body skip the proxy. It may be called at any time; whoever calls it too early has to call it
// again.
func (r *Request) carry(direction int) {
	b := &r.bodies[direction]
	if r.rt.deps.PairUp == nil || b.in != nil || b.refused || r.tunnel || r.try.phase != streaming || r.down == nil {
		return
	}
	down, isDown := r.down.(stream.Carrier)
	up, isUp := r.try.up.(stream.Carrier)
	if !isDown || !isUp {
		return
	}
	in, out := down, up
	if direction == aside.ToClient {
		in, out = up, down
	} else if r.retry.enabled && !r.respStarted {
		return // whoever may have to send the body again needs all of it
	}
	from, left := in.Incoming()
	to, more := out.Outgoing()
	if from == nil || to == nil || left != more || left < aside.MinBody || from.Closed() || to.Closed() || from.EOF() {
		return
	}
	if left < aside.LongBody && !from.Emptied() {
		return
	}
	downConn, upConn := from, to
	if direction == aside.ToClient {
		downConn, upConn = to, from
	}
	link := aside.Join(r.rt.deps.PairUp, down.AsideEnd(), up.AsideEnd(), downConn, upConn)
	r.carries = true
	if !b.Begin(link, direction, left) {
		b.refused = true
		return
	}
	b.in, b.out = in, out
	in.Watch(r)
}

// Settle implements stream.Settler.
func (r *Request) Settle() {
	for direction := range r.bodies {
		b := &r.bodies[direction]
		if b.in == nil {
			continue
		}
		n := b.Body.Settle()
		if n == 0 {
			continue
		}
		b.in.Came(n)
		b.out.Went(n)
		if direction == aside.ToServer {
			r.rec.BytesReceived += uint64(n)
		} else {
			r.rec.BytesSent += uint64(n)
		}
	}
}

// settleBodies does so for the last time.
func (r *Request) settleBodies() {
	if !r.carries {
		return
	}
	r.Settle()
	for direction := range r.bodies {
		if b := &r.bodies[direction]; b.in != nil {
			b.in.Watch(nil)
			*b = body{refused: true}
		}
	}
}

// endOf is a stream's connection in the eyes of package aside; nil if it has none.
func endOf(s stream.Stream) *aside.End {
	if c, ok := s.(stream.Carrier); ok {
		return c.AsideEnd()
	}
	return nil
}
