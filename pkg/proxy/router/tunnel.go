package router

import (
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
)

// Once the answer to an upgrade or a CONNECT has made a tunnel of an exchange, its bytes are nobody's business any more, and
// may skip the proxy (package aside). That is asked for a moment later, between events, when it is certain how many bytes
// either side has passed on; and a tunnel that is over by then was not worth the asking.

// asideAfter is that moment.
const asideAfter = 5 * time.Millisecond

// tunnelBegins sets the clock for stepAside.
func (r *Request) tunnelBegins() {
	if r.rt.deps.StepAside != nil {
		r.due.aside = r.rt.loop.Now() + int64(asideAfter)
		r.arm(r.due.aside)
	}
}

// stepAside lets the tunnel's bytes skip the proxy, if both its ends are connections of their own.
func (r *Request) stepAside() {
	if r.try.phase != streaming {
		return
	}
	down, up := connOf(r.down), connOf(r.try.up)
	if down == nil || up == nil || down.Closed() || up.Closed() {
		return
	}
	aside.Leave(endOf(r.down), endOf(r.try.up))
	r.aside.Step(r.rt.deps.StepAside, down, up, aside.Between(down, up))
}

func connOf(s stream.Stream) *loop.Conn {
	if t, ok := s.(stream.Tunnel); ok {
		return t.TunnelConn()
	}
	return nil
}

// noteAside makes the idle clocks aware of what has skipped the proxy.
func (r *Request) noteAside() {
	for i := range r.bodies {
		if b := &r.bodies[i]; b.in != nil {
			last := b.Active(r.rt.loop)
			r.active, r.try.active = max(r.active, last), max(r.try.active, last)
		}
	}
	if !r.aside.On() {
		return
	}
	last := r.aside.Active(r.rt.loop)
	r.active, r.try.active = max(r.active, last), max(r.try.active, last)
}

// countAside adds what has skipped the proxy to the record.
func (r *Request) countAside() {
	if !r.aside.On() {
		return
	}
	r.aside.End()
	toServer, toClient := r.aside.Carried(aside.ToServer), r.aside.Carried(aside.ToClient)
	rec := &r.rec
	rec.BytesReceived += toServer
	rec.BytesSent += toClient
	rec.UpstreamBytesSent += toServer
	rec.UpstreamBytesReceived += toClient
}
