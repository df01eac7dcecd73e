package http

import (
	"errors"
	"net/http"
	"syscall"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/http1"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
)

// clientState is what a connection to an endpoint is doing.
type clientState uint8

const (
	connecting clientState = iota
	unused                 // in its pool's list
	busy                   // has a stream
	gone
)

// clientConn is one connection to an endpoint: the Handler of its socket, and the stream of the one request that
// it carries.
type clientConn struct {
	p          *pool
	c          *loop.Conn
	state      clientState
	next, prev *clientConn // of pool.idle, while unused

	parser  http1.ResponseParser
	handler stream.Handler
	head    *header.Block
	req     sender
	info    stream.UpstreamInfo
	timer   loop.Timer
	armed   bool
	since   int64 // became unused

	priority                   uint8
	fresh                      bool // the stream asked for a connection of its own
	reqDone, respDone          bool
	keepAlive, tunnel, upgrade bool
	paused                     bool
	born                       int64

	settler stream.Settler // of a body that may skip the proxy; nil: there is none
	end     aside.End
}

// options of parsers for responses: Envoy's limits.
var clientOptions http1.Options

// dial begins a connection for the pool.
func (p *pool) dial(priority uint8) {
	cc := &clientConn{p: p, priority: priority, born: p.pools.srv.loop.Now()}
	cc.parser.Init(&clientOptions)
	cc.timer.Init(cc.onTimer)
	conf := p.cluster.Config()
	o := loop.DialOptions{
		Own:     p.pools.srv.deps.Own,
		Timeout: conf.ConnectTimeout,
		Options: loop.Options{BufferLimit: int(conf.BufferLimit), KeepUnread: true},
	}
	if k := conf.Keepalive; k != nil {
		o.Keepalive = &loop.Keepalive{Probes: k.Probes, Time: k.Time, Interval: k.Interval}
	}
	p.conns++
	p.connecting++
	p.host.ActiveConns++
	p.host.Conns++
	p.pools.srv.deps.Shard.Stats.UpstreamConnects++
	cc.c = p.pools.srv.loop.Dial(p.src.Netns, p.host.Addr, cc, &o)
}

// OnConnect ends the dial.
func (cc *clientConn) OnConnect(c *loop.Conn, err error) {
	p := cc.p
	p.connecting--
	if err != nil {
		cc.state = gone
		p.host.ConnectFailures++
		p.pools.srv.deps.Shard.Stats.UpstreamConnectFailures++
		reason, detail := connectFailure(err)
		p.failAll(reason, detail)
		return
	}
	cc.info.Local, cc.info.Remote = c.LocalAddr(), p.host.Addr
	cc.state = unused
	p.ready(cc)
}

// connectFailure says in Envoy's words why there is no connection.
func connectFailure(err error) (stream.Reason, string) {
	if errors.Is(err, loop.ErrConnectTimeout) {
		return stream.ConnectionTimeout, ""
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		switch errno {
		case syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ETIMEDOUT, syscall.ECONNRESET, syscall.EHOSTDOWN:
			return stream.RemoteConnectionFailure, "delayed connect error: " + errorText(errno)
		}
		return stream.LocalConnectionFailure, "immediate connect error: " + errorText(errno)
	}
	return stream.LocalConnectionFailure, err.Error()
}

// errorText is the C library's text, which begins with a capital.
func errorText(e syscall.Errno) string {
	s := e.Error()
	if s != "" && s[0] >= 'a' && s[0] <= 'z' {
		s = string(s[0]-'a'+'A') + s[1:]
	}
	return s
}

// attach gives the connection to a stream.
func (cc *clientConn) attach(w *stream.Wait) {
	p := cc.p
	cc.state = busy
	cc.handler, cc.head = w.Handler, w.Head
	cc.priority, cc.fresh = w.Priority, w.Fresh
	cc.reqDone, cc.respDone, cc.tunnel, cc.paused = false, false, false, false
	cc.keepAlive, cc.upgrade = true, w.Upgrade
	cc.info.Sent, cc.info.Received, cc.info.HeadSent, cc.info.HeadReceived = 0, 0, 0, 0
	cc.info.Answered = false
	var kind http1.RequestKind
	switch {
	case string(w.Method) == http.MethodHead:
		kind = http1.ToHead
	case string(w.Method) == http.MethodConnect:
		kind = http1.ToConnect
	case w.Upgrade:
		kind = http1.ToUpgrade
	}
	cc.parser.Next(w.Head, w.Trailers, kind)
	p.host.ActiveRequests++
	p.host.Requests++
	if cc.info.Requests > 0 {
		p.pools.srv.deps.Shard.Stats.UpstreamReused++
	}
	w.Opener.OnStream(cc, &cc.info)
}

// detach ends the stream; the connection goes back to its pool if both messages were complete and both sides
// want to keep it.
func (cc *clientConn) detach() {
	p := cc.p
	cc.handler, cc.head = nil, nil
	p.host.ActiveRequests--
	p.cluster.Release(upstream.Requests, cc.priority)
	cc.info.Requests++
	if !cc.reqDone || !cc.respDone || !cc.keepAlive || cc.tunnel || cc.worn() {
		cc.state = gone
		cc.c.Close()
		return
	}
	if cc.paused {
		cc.paused = false
		cc.c.ResumeRead()
	}
	cc.state = unused
	p.ready(cc)
}

// worn says that the connection has served long or often enough.
func (cc *clientConn) worn() bool {
	conf := cc.p.cluster.Config()
	n, d := conf.MaxRequestsPerConn, conf.MaxConnDuration
	return cc.p.closing() || n > 0 && cc.info.Requests >= uint64(n) ||
		d > 0 && cc.p.pools.srv.loop.Now()-cc.born >= int64(d)
}

// OnData parses the response.
func (cc *clientConn) OnData(c *loop.Conn, b []byte) int {
	switch cc.state {
	case busy:
		cc.info.Answered = true
		if cc.settler != nil {
			cc.settler.Settle()
			if cc.parser.Left() > 0 && cc.parser.Left() < int64(len(b)) {
				// Bytes behind a body that skipped the proxy: either the endpoint talks unasked, or the count is wrong.
				cc.fail(stream.ProtocolError, "")
				return len(b)
			}
		}
	case unused:
		// Nothing was asked. An endpoint that talks all the same (a time-out's 408, a late byte of the last
		// response) must not have it taken for the answer to the next request.
		cc.p.drop(cc)
		return len(b)
	default:
		return len(b)
	}
	used := 0
	for cc.state == busy && !cc.paused {
		if cc.tunnel {
			if used < len(b) {
				cc.info.Received += uint64(len(b) - used)
				cc.handler.OnData(b[used:], false)
			}
			return len(b)
		}
		n, ev, err := cc.parser.Parse(b[used:])
		used += n
		cc.info.Received += uint64(n)
		if err != nil {
			cc.fail(stream.ProtocolError, "")
			return len(b)
		}
		if ev == http1.NeedMore {
			cc.waits()
			return used
		}
		if cc.event(ev) {
			// Bytes behind the response were not asked for. They must not be taken for the answer to the next
			// request, and nobody can say what they are.
			cc.keepAlive = cc.keepAlive && used == len(b)
			cc.detach()
			return len(b)
		}
	}
	if cc.state != busy {
		return len(b)
	}
	if used == len(b) {
		cc.waits()
	}
	return used
}

// waits tells the router that all has been offered, if much more is to come.
func (cc *clientConn) waits() {
	if cc.parser.Left() >= aside.MinBody {
		cc.handler.OnWaiting()
	}
}

// event passes one piece of the response to the router. It returns true if that was the last one and the router
// has left the stream to complete.
func (cc *clientConn) event(ev http1.Event) (end bool) {
	switch ev {
	case http1.Informational:
		cc.handler.OnInformational(cc.head)
	case http1.Headers:
		cc.info.HeadReceived = cc.info.Received
		f := cc.parser.Framing()
		cc.keepAlive = f.KeepAlive
		if f.Body == http1.Raw {
			cc.tunnel = true
		}
		if !cc.head.StripHopByHop(cc.tunnel) {
			// What an endpoint nominates is no threat to anybody: forget the list, keep the fields.
			cc.head.Remove(header.Connection)
			cc.head.StripHopByHop(cc.tunnel)
		}
		end = cc.parser.Done()
		cc.respDone = end
		cc.handler.OnHeaders(end)
	case http1.Data:
		end = cc.parser.Done()
		cc.respDone = end
		cc.handler.OnData(cc.parser.Data(), end)
	case http1.Trailers:
		end, cc.respDone = true, true
		cc.handler.OnTrailers()
	case http1.Complete:
		end = true
		if !cc.respDone {
			cc.respDone = true
			cc.handler.OnData(nil, true)
		}
	case http1.Tunnel:
		cc.tunnel = true
	}
	return end && cc.state == busy
}

// OnEOF: the endpoint has ended its direction.
func (cc *clientConn) OnEOF(c *loop.Conn) {
	switch cc.state {
	case unused:
		cc.p.drop(cc)
	case busy:
		if cc.tunnel {
			cc.respDone = true
			cc.handler.OnData(nil, true)
			cc.endTunnel()
			return
		}
		if ev, err := cc.parser.EOF(); err == nil && ev == http1.Complete {
			cc.keepAlive = false
			if cc.event(ev) {
				cc.detach()
			}
			return
		}
		cc.fail(cc.cutReason(), "")
	default:
		c.Close()
	}
}

// cutReason is what an end in the middle of the exchange means: an endpoint that has begun to answer has broken the
// protocol, one that has not said a byte has just gone.
func (cc *clientConn) cutReason() stream.Reason {
	if cc.info.Answered && !cc.tunnel {
		return stream.ProtocolError
	}
	return stream.ConnectionTermination
}

// endTunnel closes when both directions have ended.
func (cc *clientConn) endTunnel() {
	if cc.state == busy && cc.reqDone && cc.respDone {
		cc.detach()
	}
}

// fail ends the stream for the endpoint's fault.
func (cc *clientConn) fail(reason stream.Reason, detail string) {
	h := cc.handler
	cc.keepAlive = false
	cc.release()
	cc.c.Abort()
	h.OnReset(reason, detail)
}

// release gives up the stream's share of host and cluster; the connection is finished.
func (cc *clientConn) release() {
	cc.state = gone
	cc.handler, cc.head = nil, nil
	cc.p.host.ActiveRequests--
	cc.p.cluster.Release(upstream.Requests, cc.priority)
}

// OnDrained lets the request go on.
func (cc *clientConn) OnDrained(*loop.Conn) {
	if cc.state == busy {
		cc.handler.OnWritable()
	}
}

// OnClose is the end of the connection.
func (cc *clientConn) OnClose(_ *loop.Conn, err error) {
	cc.timer.Stop()
	switch cc.state {
	case busy:
		h, reason := cc.handler, cc.cutReason()
		cc.release()
		h.OnReset(reason, "")
	case unused:
		cc.p.unlink(cc)
	case connecting:
		// The loop stops: it says so instead of how the dial went.
		cc.p.connecting--
		cc.p.failAll(stream.LocalConnectionFailure, "the proxy stops")
	}
	cc.state = gone
	cc.p.closed(cc)
}

// onTimer closes a connection that nobody has used for the cluster's idle time-out.
func (cc *clientConn) onTimer() {
	cc.armed = false
	if cc.state != unused {
		return // armed again when it becomes unused
	}
	limit := cc.p.cluster.Config().IdleTimeout
	if limit <= 0 {
		return
	}
	left := cc.since + int64(limit) - cc.p.pools.srv.loop.Now()
	if left <= 0 {
		cc.p.drop(cc)
		return
	}
	cc.armed = true
	cc.p.pools.srv.loop.StartTimer(&cc.timer, time.Duration(left))
}
