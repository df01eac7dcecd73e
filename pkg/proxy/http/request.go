package http

import (
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/http1"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
)

// SendInformational does not happen upstream.
func (cc *clientConn) SendInformational(*header.Block) {}

// SendHeaders implements stream.Stream: the head of the request.
func (cc *clientConn) SendHeaders(h *header.Block, end bool) {
	f := http1.Framing{Length: -1, KeepAlive: true}
	length := contentLength(h)
	switch {
	case cc.upgrade:
		f.Body, f.Upgrade = http1.Raw, h.Has(header.Upgrade)
	case end && length < 0 && bodiless(h.MethodString()):
	case end:
		f.Length = 0
	case length >= 0:
		f.Body, f.Length = http1.FixedLength, length
	default:
		f.Body = http1.Chunked
	}
	cc.req = sender{body: f.Body, left: f.Length}
	srv := cc.p.pools.srv
	buf := http1.AppendRequestHead(srv.scratch[:0], h, f)
	cc.c.Write(buf)
	srv.scratch = buf
	cc.info.HeadSent = uint64(len(buf))
	cc.info.Sent = uint64(len(buf))
	cc.reqDone = end
}

// bodiless methods say nothing about a body that is not there; others say that its length is 0.
func bodiless(method string) bool {
	switch method {
	case "GET", "HEAD", "DELETE", "TRACE", "CONNECT":
		return true
	}
	return false
}

// Write counts what goes out; it makes the stream the sender's writer.
func (cc *clientConn) Write(b []byte) {
	cc.info.Sent += uint64(len(b))
	cc.c.Write(b)
}

// SendData implements stream.Stream.
func (cc *clientConn) SendData(b []byte, end bool) {
	if !cc.req.send(cc, &cc.p.pools.srv.scratch, b, end) {
		cc.keepAlive = false
	}
	if end {
		cc.reqDone = true
		if cc.tunnel {
			cc.c.CloseWrite()
			cc.endTunnel()
		}
	}
}

// SendTrailers implements stream.Stream.
func (cc *clientConn) SendTrailers(h *header.Block) {
	cc.reqDone = true
	if cc.req.body != http1.Chunked {
		return
	}
	srv := cc.p.pools.srv
	buf := http1.AppendLastChunk(srv.scratch[:0], h)
	cc.Write(buf)
	srv.scratch = buf
}

// Reset implements stream.Stream. HTTP/1 can take a request back only together with its connection.
func (cc *clientConn) Reset(stream.Reason) {
	if cc.state == busy {
		cc.release()
		cc.c.Abort()
	}
}

// Pause implements stream.Stream.
func (cc *clientConn) Pause() {
	cc.paused = true
	cc.c.PauseRead()
}

// Resume implements stream.Stream.
func (cc *clientConn) Resume() {
	if cc.paused {
		cc.paused = false
		cc.c.ResumeRead()
	}
}

// TunnelConn implements stream.Tunnel.
func (cc *clientConn) TunnelConn() *loop.Conn {
	if !cc.tunnel || cc.state != busy {
		return nil
	}
	return cc.c
}

// Blocked implements stream.Stream.
func (cc *clientConn) Blocked() bool { return cc.c.AboveHigh() }
