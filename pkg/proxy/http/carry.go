package http

import (
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/http1"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
)

// Bodies with a Content-Length go over the wire as they are, so both kinds of connection may have them skip the proxy: the
// router asks for it, and here is what it must know of the two messages and change in them.

// Incoming implements stream.Carrier: the request's body.
func (s *session) Incoming() (*loop.Conn, int64) {
	if s.req == nil || s.dead || s.closing || s.tunnel || s.parser.Left() == 0 {
		return nil, 0
	}
	return s.c, s.parser.Left()
}

// Outgoing implements stream.Carrier: the response's.
func (s *session) Outgoing() (*loop.Conn, int64) {
	if s.req == nil || s.dead || s.closing || s.out.done || s.out.broken || s.out.body != http1.FixedLength {
		return nil, 0
	}
	return s.c, s.out.left
}

// Came implements stream.Carrier.
func (s *session) Came(n int64) { s.parser.Skip(n) }

// Went implements stream.Carrier.
func (s *session) Went(n int64) { s.out.left -= n }

// Watch implements stream.Carrier.
func (s *session) Watch(w stream.Settler) { s.settler = w }

// AsideEnd implements stream.Carrier.
func (s *session) AsideEnd() *aside.End { return &s.end }

// Incoming implements stream.Carrier: the response's body.
func (cc *clientConn) Incoming() (*loop.Conn, int64) {
	if cc.state != busy || cc.tunnel || cc.parser.Left() == 0 {
		return nil, 0
	}
	return cc.c, cc.parser.Left()
}

// Outgoing implements stream.Carrier: the request's.
func (cc *clientConn) Outgoing() (*loop.Conn, int64) {
	if cc.state != busy || cc.tunnel || cc.reqDone || cc.req.body != http1.FixedLength {
		return nil, 0
	}
	return cc.c, cc.req.left
}

// Came implements stream.Carrier.
func (cc *clientConn) Came(n int64) {
	cc.parser.Skip(n)
	cc.info.Received += uint64(n)
}

// Went implements stream.Carrier.
func (cc *clientConn) Went(n int64) {
	cc.req.left -= n
	cc.info.Sent += uint64(n)
}

// Watch implements stream.Carrier.
func (cc *clientConn) Watch(w stream.Settler) { cc.settler = w }

// AsideEnd implements stream.Carrier.
func (cc *clientConn) AsideEnd() *aside.End { return &cc.end }

var (
	_ stream.Carrier = (*session)(nil)
	_ stream.Carrier = (*clientConn)(nil)
)
