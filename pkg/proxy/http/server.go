// Package http carries HTTP/1 over the connections of one loop: the server side of the connections that pods
// make (session), the client side of those to endpoints (clientConn), and the pools that keep the latter.
//
// Follow one request: a session parses it out of its connection's bytes (session.go) and hands it to a
// router.Request, which asks a pool (pool.go) for a stream. The pool gives it a clientConn (client.go) that was
// idle, or dials one. The clientConn writes the request, parses the response, and the router passes it back to
// the session, which writes it (respond.go). Neither side keeps a byte longer than its socket makes it.
//
// HTTP/1 answers in order, so a session works on one request at a time; requests that a client sends ahead wait
// unread in the connection's buffer, which is bounded. The codecs themselves are in pkg/proxy/http1.
package http

import (
	"log/slog"
	"net/netip"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/http1"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/router"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// Deps are what a Server works with.
type Deps struct {
	Loop      *loop.Loop
	Upstreams *upstream.Manager
	Snapshot  func() *mesh.Snapshot
	Shard     *telemetry.Shard
	Logs      *telemetry.Logs
	Logger    *slog.Logger
	// StepAside lets the bytes of tunnels skip the proxy; nil: never.
	StepAside aside.Func
	// PairUp lets bodies do so; nil: never.
	PairUp aside.PairFunc
	// Own is told of upstream sockets before they connect.
	Own func(fd int) error
	// LocalAddr stands in x-forwarded-for for clients that came by loopback. Optional.
	LocalAddr netip.Addr
	// Observe is called on the loop with the record of every finished request. Optional.
	Observe func(*telemetry.Record)
}

// Server serves the HTTP connections of one loop. It must be used only on the loop's thread.
type Server struct {
	deps    Deps
	loop    *loop.Loop
	router  *router.Router
	pools   *Pools
	scratch []byte // heads and small chunks on their way into a connection

	sessions session // list head
	count    int
	draining bool
	options  map[*mesh.HTTPConnectionManager]*http1.Options
}

// NewServer returns the server of a loop.
func NewServer(deps Deps) *Server {
	if deps.Logger == nil {
		deps.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		deps: deps, loop: deps.Loop, scratch: make([]byte, 0, 16<<10),
		options: map[*mesh.HTTPConnectionManager]*http1.Options{},
	}
	s.sessions.next, s.sessions.prev = &s.sessions, &s.sessions
	s.pools = newPools(s)
	s.router = router.New(router.Deps{
		Loop: deps.Loop, Upstreams: deps.Upstreams, Pools: s.pools, Snapshot: deps.Snapshot,
		Shard: deps.Shard, Logs: deps.Logs, Logger: deps.Logger, LocalAddr: deps.LocalAddr,
		Observe: deps.Observe, StepAside: deps.StepAside, PairUp: deps.PairUp,
	})
	return s
}

// Stats are a server's gauges.
type Stats struct {
	Connections, Requests                int
	Pools, UpstreamConnections, PoolIdle int
	PoolConnecting, PoolWaiting          int
}

// Stats counts what is there now.
func (s *Server) Stats() Stats {
	st := s.pools.stats()
	st.Connections, st.Requests = s.count, s.router.Live()
	return st
}

// ServeConn speaks HTTP on an accepted connection from now on; in.Chain.HTTP says how. in is kept; its
// owner may change Listener and Chain on the loop.
func (s *Server) ServeConn(c *loop.Conn, in *stream.ConnInfo) {
	newSession(s, c, in)
}

// Drain ends every connection as soon as HTTP allows: idle ones now, others with their present response.
func (s *Server) Drain() {
	s.draining = true
	for e := s.sessions.next; e != &s.sessions; {
		next := e.next
		e.drain()
		e = next
	}
}

// DrainListener does the same for the connections of one listener only, which has changed or gone.
func (s *Server) DrainListener(gone func(*stream.ConnInfo) bool) {
	for e := s.sessions.next; e != &s.sessions; {
		next := e.next
		if gone(e.in) {
			e.drain()
		}
		e = next
	}
}

// RemoveSource closes the upstream connections of a pod that is gone and forgets its pools, and resets what is
// left of its downstream connections.
func (s *Server) RemoveSource(key uint64) {
	s.pools.removeSource(key)
	for e := s.sessions.next; e != &s.sessions; {
		next := e.next
		if e.in.Source.Key == key {
			e.c.Abort()
		}
		e = next
	}
}

// optionsOf returns the parser's settings for a connection manager's.
func (s *Server) optionsOf(h *mesh.HTTPConnectionManager) *http1.Options {
	if o := s.options[h]; o != nil {
		return o
	}
	if len(s.options) > 256 {
		clear(s.options) // of listeners that are gone, mostly; sessions keep their own pointer
	}
	o := &http1.Options{
		Limits:         http1.Limits{HeadBytes: int(h.MaxRequestHeadersBytes), Fields: int(h.MaxHeadersCount)},
		AcceptHTTP10:   h.AcceptHTTP10,
		DefaultHost:    h.DefaultHostForHTTP10,
		Underscores:    h.HeadersUnderscores,
		NoAbsoluteForm: !h.AllowAbsoluteURL,
	}
	s.options[h] = o
	return o
}
