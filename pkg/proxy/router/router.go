// Package router decides what happens to one HTTP request and sees it through: it settles the head, matches a
// route, answers by itself or picks a cluster and an endpoint, forwards, times out, retries, and writes down
// what happened. It is what Envoy calls connection manager and router filter, in one, and knows nothing of
// HTTP versions or sockets: both neighbours are stream.Streams.
//
// The rooms, in the order in which a request passes through them:
//
//	request.go    what the downstream stream says: head, body, end, reset
//	path.go       normalisation of the path
//	sanitize.go   x-forwarded-for and what of the head may be believed
//	route.go      route, redirect, direct response, cluster
//	rewrite.go    path and host as the upstream is to see them
//	mutate.go     header mutations of cluster, route, virtual host and route configuration
//	retry.go      whether a failed attempt is worth another
//	attempt.go    one try at one endpoint; what the upstream stream says
//	tunnel.go     what skips the proxy once an exchange is a tunnel
//	timeout.go    all deadlines of a request behind one timer
//	reply.go      answers that the proxy makes itself
//	finish.go     the telemetry record, and giving everything back
//
// A Router belongs to one loop. A Request is taken from its pool and returned to it; in steady state nothing
// is allocated. After a call that may end the request (reply, finish, whatever sends the last byte) the
// caller returns at once: the Request may already be serving somebody else.
package router

import (
	crand "crypto/rand"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// Pools finds the connections to a host that belong to one source.
type Pools interface {
	Get(src *stream.Source, c *upstream.Cluster, h *upstream.Host) stream.Connector
}

// Deps are what a Router works with.
type Deps struct {
	Loop      *loop.Loop
	Upstreams *upstream.Manager
	Pools     Pools
	Snapshot  func() *mesh.Snapshot
	Shard     *telemetry.Shard
	Logs      *telemetry.Logs
	Logger    *slog.Logger
	// LocalAddr stands in x-forwarded-for where the client came by loopback, as in Envoy. Optional.
	LocalAddr netip.Addr
	// StepAside lets the bytes of tunnels skip the proxy. Optional.
	StepAside aside.Func
	// PairUp lets bodies do so. Optional.
	PairUp aside.PairFunc
	// Observe is called on the loop with every finished record, which is valid during the call. Optional.
	Observe func(*telemetry.Record)
}

// Router serves the requests of one loop.
type Router struct {
	deps Deps
	loop *loop.Loop
	ids  idSource
	rand *rand.ChaCha8

	free    *Request
	freeLen int
	live    int

	// clock: wall time and its text, brought up to date at most once a second.
	wall     int64 // Unix ns at mono
	mono     int64
	date     [len(http.TimeFormat)]byte
	routes   map[*mesh.HTTPConnectionManager]*mesh.RouteConfig // of routesOf
	routesOf *mesh.Snapshot
	// What routes was asked for last.
	lastManager *mesh.HTTPConnectionManager
	lastRoutes  *mesh.RouteConfig
	formats     map[*mesh.HeaderAdd]*telemetry.Format
	formatGen   uint64
	loggers     map[*mesh.AccessLog]*telemetry.Logger
	logGen      uint64
}

// maxFree bounds the requests kept for later use.
const maxFree = 512

// New returns a Router for the loop in deps.
func New(deps Deps) *Router {
	if deps.Logger == nil {
		deps.Logger = slog.New(slog.DiscardHandler)
	}
	var seed [32]byte
	_, _ = crand.Read(seed[:]) // never fails
	rt := &Router{
		deps: deps, loop: deps.Loop, rand: rand.NewChaCha8(seed),
		routes:  map[*mesh.HTTPConnectionManager]*mesh.RouteConfig{},
		formats: map[*mesh.HeaderAdd]*telemetry.Format{},
		loggers: map[*mesh.AccessLog]*telemetry.Logger{},
	}
	rt.ids.rand = rt.rand
	rt.mono = -int64(time.Hour)
	return rt
}

// Live is the number of requests in progress.
func (rt *Router) Live() int { return rt.live }

// Begin takes a request from the pool for a stream whose first byte has just come. The codec parses into its
// Head and Trailers and then calls it as the stream's Handler. handle is the connection's.
func (rt *Router) Begin(down stream.ServerStream, info *stream.ConnInfo, handle *telemetry.Handle) *Request {
	r := rt.free
	if r != nil {
		rt.free, r.next = r.next, nil
		rt.freeLen--
	} else {
		r = &Request{rt: rt}
		r.timer.Init(r.onTimer)
		r.try.r = r
	}
	rt.live++
	r.down, r.info, r.handle = down, info, handle
	r.hcm = info.Chain.HTTP
	r.snap = rt.deps.Snapshot()
	r.random = rt.rand.Uint64()
	now := rt.loop.Now()
	r.active = now
	r.rec.Begin = now
	r.rec.StartTime = rt.wallAt(now)
	r.rec.Request = &r.head
	r.rec.DownstreamDirect, r.rec.DownstreamRemote, r.rec.DownstreamLocal = info.Peer, info.Peer, info.Orig
	rt.deps.Shard.Stats.RequestsStarted++
	if d := r.hcm.RequestHeadersTimeout; d > 0 {
		r.due.headers = now + int64(d)
		r.arm(r.due.headers)
	}
	if d := r.hcm.StreamIdleTimeout; d > 0 {
		r.idleLimit = d
		r.arm(now + int64(d))
	}
	return r
}

// put gives a finished request back.
func (rt *Router) put(r *Request) {
	rt.live--
	r.clear()
	if rt.freeLen >= maxFree {
		r.timer.Stop()
		return
	}
	r.next, rt.free = rt.free, r
	rt.freeLen++
}

// routesIn are the routes that a snapshot has for a connection manager, which may be an older one's.
func (rt *Router) routesIn(s *mesh.Snapshot, h *mesh.HTTPConnectionManager) *mesh.RouteConfig {
	if s != rt.routesOf {
		clear(rt.routes)
		rt.routesOf, rt.lastManager, rt.lastRoutes = s, nil, nil
	}
	if h == rt.lastManager { // nearly always
		return rt.lastRoutes
	}
	rc, ok := rt.routes[h]
	if !ok {
		rc = s.Routes(h)
		rt.routes[h] = rc
	}
	rt.lastManager, rt.lastRoutes = h, rc
	return rc
}

// wallAt is the wall-clock time of a monotonic one.
func (rt *Router) wallAt(now int64) int64 {
	if now-rt.mono >= int64(time.Second) {
		t := time.Now()
		rt.wall, rt.mono = t.UnixNano(), now
		t.UTC().AppendFormat(rt.date[:0], http.TimeFormat)
	}
	return rt.wall + now - rt.mono
}

// dateText is the Date header's value, right to the second.
func (rt *Router) dateText(now int64) []byte {
	rt.wallAt(now)
	return rt.date[:]
}

// format returns the compiled form of a header value with command operators.
func (rt *Router) format(add *mesh.HeaderAdd, gen uint64) *telemetry.Format {
	if f, ok := rt.formats[add]; ok {
		return f
	}
	if gen != rt.formatGen && len(rt.formats) > 1024 {
		clear(rt.formats) // of snapshots that are gone, mostly
	}
	rt.formatGen = gen
	f, err := telemetry.CompileFormat(add.Value)
	if err != nil {
		// The compiler of the configuration has checked the value; say so once if it let one slip.
		rt.deps.Logger.Error("header value cannot be formatted", "header", add.Name, "value", add.Value, "error", err)
		f, _ = telemetry.CompileFormat("")
	}
	rt.formats[add] = f
	return f
}

// logger returns the compiled access log; nil if it cannot be written.
func (rt *Router) logger(al *mesh.AccessLog, gen uint64) *telemetry.Logger {
	if l, ok := rt.loggers[al]; ok {
		return l
	}
	if gen != rt.logGen && len(rt.loggers) > 256 {
		clear(rt.loggers)
	}
	rt.logGen = gen
	l, err := rt.deps.Logs.Logger(al)
	if err != nil {
		rt.deps.Logger.Error("access log cannot be written", "path", al.Path, "error", err)
		l = nil
	}
	rt.loggers[al] = l
	return l
}
