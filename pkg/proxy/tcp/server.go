// Package tcp carries connections of listeners whose filter chain ends in tcp_proxy: bytes of any protocol
// between a client and an endpoint of a (weighted) cluster.
//
// Nothing is sniffed and nothing is awaited: the upstream connection is begun when the client's is accepted, so
// protocols in which the server speaks first work. Until it stands the client isn't read from, so that what it
// sends stays in the kernel and counts against its window.
//
// The two directions are independent. An end (FIN) in one is passed on when the bytes before it have been sent
// and leaves the other alone; a reset is passed on as a reset, again behind the bytes before it. A direction
// whose receiver is slow stops its sender, by pausing the read, once the receiver's pending output passes the
// high watermark: a session holds two of those at most.
//
// Once a connection has shown that it goes on, the datapath is asked to carry its bytes past the proxy (package aside).
// Whether it does, when, and for how long is its own affair: what comes to the proxy is forwarded, and what was carried
// without it counts for the log, the metrics and the idle clock as if it had come.
package tcp

import (
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// reportEvery is how often the bytes of open connections are added to the metrics.
const reportEvery = 5 * time.Second

// Deps are what a Server works with.
type Deps struct {
	Loop      *loop.Loop
	Upstreams *upstream.Manager
	Snapshot  func() *mesh.Snapshot
	// Shard and Logs may be nil: no metrics, no access logs.
	Shard *telemetry.Shard
	Logs  *telemetry.Logs
	// StepAside lets bytes skip the proxy; nil: never. StepAsideAfter is after how many pieces of data; 0 means 3, so that a
	// question and its answer alone are not worth the asking.
	StepAside      aside.Func
	StepAsideAfter int
	// Own is told of upstream sockets before they connect.
	Own    func(fd int) error
	Logger *slog.Logger
}

// Server proxies the TCP connections of one loop. Its methods may be called only there.
type Server struct {
	deps Deps
	rand *rand.Rand

	sessions session // list head
	count    int
	report   loop.Timer

	loggers map[*mesh.AccessLog]*telemetry.Logger
	logGen  uint64
	onEnd   func(*telemetry.Record) // for tests

	// Totals since the start.
	total, connectFailures, idleTimeouts uint64
}

// Stats of a Server.
type Stats struct {
	Active                               int
	Total, ConnectFailures, IdleTimeouts uint64
}

// NewServer returns the server of a loop.
func NewServer(deps Deps) *Server {
	if deps.StepAsideAfter <= 0 {
		deps.StepAsideAfter = 3
	}
	if deps.Logger == nil {
		deps.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{deps: deps, rand: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())), loggers: map[*mesh.AccessLog]*telemetry.Logger{}}
	s.sessions.next, s.sessions.prev = &s.sessions, &s.sessions
	s.report.Init(s.reportBytes)
	return s
}

// Options are what a connection must be adopted with before it is given to ServeConn.
func (s *Server) Options(info *stream.ConnInfo) loop.Options {
	return loop.Options{BufferLimit: int(info.Listener.BufferLimit), KeepUnread: true, Paused: true}
}

// Stats returns the server's counters.
func (s *Server) Stats() Stats {
	return Stats{Active: s.count, Total: s.total, ConnectFailures: s.connectFailures, IdleTimeouts: s.idleTimeouts}
}

// ServeConn proxies an accepted connection whose chain has TCP set. It becomes the connection's handler.
func (s *Server) ServeConn(c *loop.Conn, info *stream.ConnInfo) {
	now := s.deps.Loop.Now()
	ses := &session{s: s, info: info, proxy: info.Chain.TCP, snap: s.deps.Snapshot(), random: s.rand.Uint64(), active: now}
	ses.down = side{s: ses, conn: c}
	ses.up = side{s: ses, up: true}
	ses.timer.Init(ses.onTimer)
	ses.record(now)
	ses.prev, ses.next = s.sessions.prev, &s.sessions
	ses.prev.next, s.sessions.prev = ses, ses
	s.count++
	s.total++
	if !s.report.Active() {
		s.deps.Loop.StartTimer(&s.report, reportEvery)
	}
	c.SetHandler(&ses.down)
	if d := ses.proxy.MaxDownstreamConnectionDuration; d > 0 {
		ses.expires = now + int64(d)
	}
	ses.arm()
	ses.connect()
}

// reportBytes adds what open connections have carried to the metrics, so that a connection that lives for days
// shows before its end.
func (s *Server) reportBytes() {
	for ses := s.sessions.next; ses != &s.sessions; ses = ses.next {
		ses.reportBytes()
	}
	if s.count > 0 {
		s.deps.Loop.StartTimer(&s.report, reportEvery)
	}
}

// Log writes the record of a connection that was refused before it came to a session.
func (s *Server) Log(list []*mesh.AccessLog, r *telemetry.Record) { s.log(list, r, s.rand.Uint64()) }

// log writes the record to the access logs of a connection.
func (s *Server) log(list []*mesh.AccessLog, r *telemetry.Record, random uint64) {
	if s.deps.Logs == nil || len(list) == 0 {
		return
	}
	if snap := s.deps.Snapshot(); snap != nil && snap.Generation != s.logGen {
		clear(s.loggers)
		s.logGen = snap.Generation
	}
	for _, al := range list {
		l, known := s.loggers[al]
		if !known {
			var err error
			if l, err = s.deps.Logs.Logger(al); err != nil {
				s.deps.Logger.Error("cannot open an access log", "path", al.Path, "error", err)
			}
			s.loggers[al] = l
		}
		if l != nil {
			l.Log(r, random)
		}
	}
}
