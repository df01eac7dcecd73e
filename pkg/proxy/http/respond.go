package http

import (
	"net/http"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/http1"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
)

// sender frames the body of one outgoing message.
type sender struct {
	body http1.BodyKind
	left int64 // of FixedLength
}

// response is what the session has to remember of the response that it is writing.
type response struct {
	sender
	started, done, close, broken bool
}

// small is up to where a chunk is copied together with its framing, so that the socket sees one piece.
const small = 8 << 10

// writer is the sending half of a loop.Conn.
type writer interface{ Write(b []byte) }

// send writes a piece of the body with its framing. It returns false if the message contradicts its
// Content-Length.
func (f *sender) send(w writer, scratch *[]byte, b []byte, end bool) bool {
	switch f.body {
	case http1.NoBody:
		return true
	case http1.FixedLength:
		over := int64(len(b)) > f.left
		if over {
			b = b[:f.left]
		}
		f.left -= int64(len(b))
		w.Write(b)
		return !over && !(end && f.left > 0)
	case http1.Chunked:
		f.chunk(w, scratch, b, end)
	default:
		w.Write(b)
	}
	return true
}

func (f *sender) chunk(w writer, scratch *[]byte, b []byte, end bool) {
	buf := (*scratch)[:0]
	if len(b) > 0 {
		buf = http1.AppendChunkHeader(buf, len(b))
		if len(b) < small {
			buf = append(buf, b...)
		} else {
			w.Write(buf)
			w.Write(b)
			buf = buf[:0]
		}
		buf = append(buf, http1.ChunkEnd...)
	}
	if end {
		buf = http1.AppendLastChunk(buf, nil)
	}
	w.Write(buf)
	*scratch = buf
}

// contentLength is the message's length as its head has it; -1 if it does not say.
func contentLength(h *header.Block) int64 {
	v, ok := h.Get(header.ContentLength)
	if !ok || len(v) == 0 || len(v) > 18 {
		return -1
	}
	var n int64
	for _, c := range v {
		if c < '0' || c > '9' {
			return -1
		}
		n = n*10 + int64(c-'0')
	}
	return n
}

// SendInformational implements stream.Stream.
func (s *session) SendInformational(h *header.Block) {
	if s.http10 || s.out.started {
		return
	}
	buf := http1.AppendResponseHead(s.srv.scratch[:0], h, http1.Framing{Length: -1, KeepAlive: true})
	s.c.Write(buf)
	s.srv.scratch = buf
}

// SendHeaders implements stream.Stream: it decides how the body will be framed and whether the connection can
// go on after it.
func (s *session) SendHeaders(h *header.Block, end bool) {
	status := h.Status()
	f := http1.Framing{Length: -1, HTTP10: s.http10, ProperCase: s.hcm.ProperCaseHeaders}
	length := contentLength(h)
	switch {
	case s.upgrading && (status == http.StatusSwitchingProtocols || s.isConnect && status/100 == 2):
		f.Body, f.Upgrade, f.KeepAlive = http1.Raw, status == http.StatusSwitchingProtocols, true
		s.tunnel = true
	case s.isHead, status == http.StatusNoContent, status == http.StatusNotModified:
		f.Length = length
	case end:
		f.Length = 0
	case length >= 0:
		f.Body, f.Length = http1.FixedLength, length
	case s.http10:
		f.Body = http1.UntilClose
	default:
		f.Body = http1.Chunked
	}
	if !s.tunnel {
		max := s.hcm.MaxRequestsPerConn
		f.KeepAlive = s.keepAlive && s.reqDone && !s.draining && f.Body != http1.UntilClose && (max == 0 || s.count < max) &&
			!h.HasToken(header.Connection, "close")
	}
	s.out = response{sender: sender{body: f.Body, left: f.Length}, started: true, close: !f.KeepAlive}
	buf := http1.AppendResponseHead(s.srv.scratch[:0], h, f)
	s.c.Write(buf)
	s.srv.scratch = buf
	s.req.Record().ResponseHeaderBytes = uint64(len(buf))
	if s.tunnel {
		s.paused = false
		s.c.ResumeRead()
	}
	s.out.done = end
}

// SendData implements stream.Stream.
func (s *session) SendData(b []byte, end bool) {
	if !s.out.send(s.c, &s.srv.scratch, b, end) {
		s.out.broken = true
	}
	if end {
		s.out.done = true
		if s.tunnel {
			s.c.CloseWrite()
		}
	}
}

// SendTrailers implements stream.Stream.
func (s *session) SendTrailers(h *header.Block) {
	s.out.done = true
	if s.out.body != http1.Chunked {
		return // no place for them
	}
	buf := http1.AppendLastChunk(s.srv.scratch[:0], h)
	s.c.Write(buf)
	s.srv.scratch = buf
}

// TunnelConn implements stream.Tunnel.
func (s *session) TunnelConn() *loop.Conn {
	if !s.tunnel || s.dead || s.closing {
		return nil
	}
	return s.c
}

// Blocked implements stream.Stream.
func (s *session) Blocked() bool { return s.c.AboveHigh() }

// Reset implements stream.Stream: the client must see that its response is not complete. It may still be sending, and may
// not have read yet what it was answered before, which must not be lost.
func (s *session) Reset(stream.Reason) {
	s.req = nil
	s.closing = true
	if s.tunnel || s.out.body == http1.UntilClose {
		s.c.CloseReset() // an orderly end would look like the end of the body
		return
	}
	s.c.CloseDelayed(s.hcm.DelayedCloseTimeout)
}

// Finish implements stream.ServerStream.
func (s *session) Finish() {
	s.req = nil
	switch {
	case s.dead:
	case s.tunnel:
		s.closing = true
		s.c.Close()
	case s.out.broken:
		s.closing = true
		s.c.CloseDelayed(s.hcm.DelayedCloseTimeout)
	case s.out.close:
		s.closing = true
		if s.reqDone && !s.keepAlive {
			s.c.Close() // as the client asked
			return
		}
		s.c.CloseDelayed(s.hcm.DelayedCloseTimeout)
	default:
		s.becomeIdle()
		if s.draining { // since the response began
			s.drain()
		}
		if s.c.ReadPaused() || s.c.Unconsumed() > 0 {
			s.c.ResumeRead()
		}
	}
}
