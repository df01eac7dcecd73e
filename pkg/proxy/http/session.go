package http

import (
	"net/http"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/http1"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/router"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// session is one downstream connection: the Handler of its socket, and the stream of the one request that it is
// working on. This file reads requests; respond.go writes responses.
type session struct {
	srv        *Server
	c          *loop.Conn
	in         *stream.ConnInfo
	hcm        *mesh.HTTPConnectionManager
	next, prev *session // of Server.sessions

	parser http1.RequestParser
	req    *router.Request // nil between requests
	handle telemetry.Handle
	timer  loop.Timer
	armed  int64 // what the timer is set to
	idleBy int64 // 0: not idle, or no time-out
	endBy  int64 // max_connection_duration
	count  uint32

	idleSince int64

	headDone  bool // the request's head has been read
	reqDone   bool // the request has been read completely
	paused    bool // the router does not want the body now
	upgrading bool // whether this becomes a tunnel is for the response to say
	tunnel    bool
	closing   bool // the last response was sent: what still comes is discarded
	draining  bool
	dead      bool

	// Of the request that is being answered.
	http10, keepAlive, isHead, isConnect bool

	out response

	settler stream.Settler // of a body that may skip the proxy; nil: there is none
	end     aside.End
}

func newSession(srv *Server, c *loop.Conn, in *stream.ConnInfo) {
	s := &session{srv: srv, c: c, in: in, hcm: in.Chain.HTTP}
	s.next, s.prev = srv.sessions.next, &srv.sessions
	s.next.prev, s.prev.next = s, s
	srv.count++
	s.parser.Init(srv.optionsOf(s.hcm))
	s.timer.Init(s.onTimer)
	s.draining = srv.draining
	c.SetBufferLimit(int(in.Listener.BufferLimit))
	now := srv.loop.Now()
	if d := s.hcm.MaxConnectionDuration; d > 0 {
		s.endBy = now + int64(d)
		s.arm(s.endBy)
	}
	s.becomeIdle()
	c.SetHandler(s)
}

// OnConnect does not happen to accepted connections.
func (s *session) OnConnect(*loop.Conn, error) {}

// OnData reads requests, one after the other.
func (s *session) OnData(_ *loop.Conn, b []byte) int {
	if s.settler != nil {
		s.settler.Settle()
	}
	used := 0
	for {
		switch {
		case s.closing || s.dead:
			return len(b)
		case s.tunnel:
			if s.paused || used == len(b) {
				return used
			}
			s.req.OnData(b[used:], false)
			return len(b)
		case s.req == nil:
			if used += blankLines(b[used:]); used == len(b) {
				return used
			}
			s.begin()
		case s.reqDone || s.upgrading || s.paused:
			if used < len(b) {
				s.c.PauseRead() // one buffer of what comes early is enough
			} else {
				s.waits()
			}
			return used
		}
		n, ev, err := s.parser.Parse(b[used:])
		used += n
		if !s.headDone {
			s.req.Record().RequestHeaderBytes += uint64(n)
		}
		if err != nil {
			s.refuse(err)
			continue
		}
		switch ev {
		case http1.NeedMore:
			s.waits()
			return used
		case http1.Headers:
			s.head()
		case http1.Data:
			s.reqDone = s.parser.Done()
			s.req.OnData(s.parser.Data(), s.reqDone)
		case http1.Trailers:
			s.reqDone = true
			s.req.OnTrailers()
		case http1.Complete:
			if !s.reqDone {
				s.reqDone = true
				s.req.OnData(nil, true)
			}
		}
	}
}

// waits tells the router that all has been offered, if much more is to come.
func (s *session) waits() {
	if s.parser.Left() >= aside.MinBody {
		s.req.OnWaiting()
	}
}

// blankLines is the length of the empty lines that some clients send between requests.
func blankLines(b []byte) int {
	n := 0
	for n+1 < len(b) && b[n] == '\r' && b[n+1] == '\n' {
		n += 2
	}
	return n
}

// begin makes ready for a request whose first byte is there.
func (s *session) begin() {
	if now := s.in.Chain.HTTP; now != s.hcm { // the engine has taken over another configuration
		s.hcm = now
		s.parser.Init(s.srv.optionsOf(now))
	}
	s.idleBy = 0
	s.headDone, s.reqDone, s.paused, s.upgrading = false, false, false, false
	s.http10, s.keepAlive, s.isHead, s.isConnect = false, false, false, false
	s.out = response{}
	s.req = s.srv.router.Begin(s, s.in, &s.handle)
	s.req.Record().Protocol = telemetry.HTTP11
	s.parser.Next(s.req.Head(), s.req.Trailers())
}

// head hands a complete head to the router.
func (s *session) head() {
	f := s.parser.Framing()
	h := s.req.Head()
	s.headDone = true
	if f.HTTP10 {
		s.req.Record().Protocol = telemetry.HTTP10
	}
	s.count++
	s.http10, s.keepAlive = f.HTTP10, f.KeepAlive
	if h.HasToken(header.ProxyConnection, "close") {
		s.keepAlive = false
	}
	method := h.MethodString()
	s.isHead, s.isConnect = method == http.MethodHead, method == http.MethodConnect
	s.upgrading = f.Body == http1.NoBody && (s.isConnect || f.Upgrade && !offersH2C(h))
	if !h.StripHopByHop(s.upgrading) {
		s.refuse(http1.ErrConnection)
		return
	}
	if f.Continue {
		// As Envoy: the client is told to go on at once, and the upstream is not asked.
		s.c.Write(continue100)
		h.Remove(header.Expect)
	}
	done := s.parser.Done()
	if s.upgrading {
		// The request goes on for as long as the tunnel; if there will be none, the connection ends.
		s.req.SetUpgrade()
		done = false
	}
	s.reqDone = done
	s.req.OnHeaders(done)
}

var continue100 = []byte(http1.Continue100)

// offersH2C: the client would go on in HTTP/2 without TLS. It may be refused, and is.
func offersH2C(h *header.Block) bool {
	return h.HasToken(header.Upgrade, "h2c")
}

// refuse answers what could not be parsed; nothing after it can be.
func (s *session) refuse(err error) {
	s.keepAlive = false
	s.srv.deps.Shard.Stats.ProtocolErrors++
	status, detail := http.StatusBadRequest, "http1.codec_error"
	if e, ok := err.(*http1.ParseError); ok {
		status, detail = e.Status, e.Detail
	}
	s.req.Reject(status, detail)
}

// OnEOF: the client has nothing more to say. In a tunnel that is one direction's end; otherwise the client is
// taken to be gone, as by Envoy: HTTP/1 has no other way to cancel a request.
func (s *session) OnEOF(c *loop.Conn) {
	switch {
	case s.closing || s.dead:
		c.Close()
	case s.tunnel:
		s.reqDone = true
		s.req.OnData(nil, true)
	case s.req == nil:
		s.closing = true
		c.Close()
	default:
		s.abandon()
		c.Close()
	}
}

// abandon tells the router that the client is gone.
func (s *session) abandon() {
	s.closing = true
	if r := s.req; r != nil {
		s.req = nil
		r.OnReset(stream.ConnectionTermination, "")
	}
}

// OnDrained lets the response go on.
func (s *session) OnDrained(*loop.Conn) {
	if s.req != nil {
		s.req.OnWritable()
	}
}

// OnClose is the end of the connection.
func (s *session) OnClose(*loop.Conn, error) {
	s.dead = true
	s.abandon()
	s.timer.Stop()
	s.next.prev, s.prev.next = s.prev, s.next
	s.next, s.prev = nil, nil
	s.srv.count--
}

// lull is how long a connection must have been idle to be closed without a warning. One that is in use is told
// by "connection: close" on its next response: a client that has its next request on the way already would lose
// it to a connection closed under its hands.
const lull = int64(time.Second)

// drain ends the connection when its request is done, or nothing has come for a while.
func (s *session) drain() {
	s.draining = true
	if s.req != nil || s.closing {
		return
	}
	if now := s.srv.loop.Now(); now-s.idleSince < lull {
		s.idleBy = s.idleSince + lull
		s.arm(s.idleBy)
		return
	}
	s.closing = true
	s.c.CloseDelayed(s.hcm.DelayedCloseTimeout)
}

// becomeIdle starts the wait for the next request.
func (s *session) becomeIdle() {
	s.idleSince = s.srv.loop.Now()
	if d := s.hcm.IdleTimeout; d > 0 {
		s.idleBy = s.idleSince + int64(d)
		s.arm(s.idleBy)
	}
}

// arm makes the timer fire at the deadline or earlier; it is not stopped when a deadline goes away.
func (s *session) arm(deadline int64) {
	if s.armed != 0 && s.armed <= deadline {
		return
	}
	s.armed = deadline
	s.srv.loop.StartTimer(&s.timer, time.Duration(deadline-s.srv.loop.Now()))
}

func (s *session) onTimer() {
	s.armed = 0
	if s.closing || s.dead {
		return
	}
	now := s.srv.loop.Now()
	switch {
	case s.idleBy != 0 && now >= s.idleBy:
		s.idleSince = now - lull // it is not in use, however short its time-out is
		s.drain()
	case s.endBy != 0 && now >= s.endBy:
		s.endBy = 0
		s.drain()
	}
	for _, t := range [...]int64{s.idleBy, s.endBy} {
		if t != 0 && !s.closing {
			s.arm(t)
		}
	}
}

// Pause implements stream.Stream.
func (s *session) Pause() {
	s.paused = true
	s.c.PauseRead()
}

// Resume implements stream.Stream.
func (s *session) Resume() {
	s.paused = false
	if !s.reqDone || s.tunnel {
		s.c.ResumeRead()
	}
}
