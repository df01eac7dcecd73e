package router

import (
	"net/http"
	"net/netip"
	"time"
	"unsafe"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// Request is one request from its first byte to its access log line. It is the Handler of its downstream
// stream; its attempt is that of the upstream one.
type Request struct {
	rt     *Router
	next   *Request // in the pool
	serial uint64   // counts uses, so that who called out can tell whether it is still the same request

	down   stream.ServerStream // nil in the pool
	info   *stream.ConnInfo
	hcm    *mesh.HTTPConnectionManager
	snap   *mesh.Snapshot
	handle *telemetry.Handle
	random uint64

	head, trailers         header.Block
	resp, respTrailers     header.Block
	scratch                []byte
	pending                []pendingAdd
	clientAddr             netip.Addr
	route                  *mesh.Route
	split                  *mesh.WeightedCluster
	cluster                *upstream.Cluster
	retry                  retryState
	try                    attempt
	aside                  aside.Pair
	bodies                 [2]body // by direction
	carries                bool    // there is something in bodies
	body                   bodyCopy
	timer                  loop.Timer
	armed                  int64
	due                    deadlines
	active                 int64 // last byte in either direction
	idleLimit              time.Duration
	tryIdleLimit           time.Duration
	tryTimeout             time.Duration
	timeout                time.Duration
	timeoutCode            int
	rec                    telemetry.Record
	pausedFor              pauseReason
	isHead, upgrade        bool
	reqEnded, hasTrailers  bool
	respStarted, respEnded bool
	tunnel, routed         bool
}

// pauseReason is why the downstream is not read. It is read when there is none.
type pauseReason uint8

const (
	// noUpstream: there is no stream to put the body into.
	noUpstream pauseReason = 1 << iota
	// upstreamFull: there is, and it is Blocked.
	upstreamFull
)

// clear makes the request as new, keeping memory of ordinary size.
func (r *Request) clear() {
	r.serial++
	r.head.Trim()
	r.trailers.Trim()
	r.resp.Trim()
	r.respTrailers.Trim()
	if cap(r.scratch) > 16<<10 {
		r.scratch = nil
	}
	r.down, r.info, r.hcm, r.snap, r.handle = nil, nil, nil, nil, nil
	r.clientAddr = netip.Addr{}
	r.route, r.split, r.cluster = nil, nil, nil
	r.retry.clear()
	r.try.clear()
	r.aside = aside.Pair{}
	if r.carries {
		r.bodies, r.carries = [2]body{}, false
	}
	r.body.clear()
	r.due = deadlines{}
	r.active, r.idleLimit, r.tryIdleLimit, r.tryTimeout, r.timeout, r.timeoutCode = 0, 0, 0, 0, 0, 0
	r.rec = telemetry.Record{}
	r.pausedFor = 0
	r.isHead, r.upgrade, r.reqEnded, r.hasTrailers = false, false, false, false
	r.respStarted, r.respEnded, r.tunnel, r.routed = false, false, false, false
}

// Head is where the codec puts the request's head, Trailers its trailers.
func (r *Request) Head() *header.Block     { return &r.head }
func (r *Request) Trailers() *header.Block { return &r.trailers }

// Record is for what only the codec knows: protocol, sizes on the wire.
func (r *Request) Record() *telemetry.Record { return &r.rec }

// SetUpgrade says that the head asks for an upgrade, by its Upgrade field or as CONNECT, and that the codec can
// turn the stream into a tunnel. Before OnHeaders.
func (r *Request) SetUpgrade() { r.upgrade = true }

// Tunnel says that the stream is not a request and a response any more but bytes both ways.
func (r *Request) Tunnel() bool { return r.tunnel }

// Reject answers a request that the codec could not read.
func (r *Request) Reject(status int, detail string) {
	if detail == "missing_host_header" {
		// Well-formed, but not for us: the connection manager's complaint, not the codec's.
		r.reply(status, "", detail)
		return
	}
	r.rec.Flags |= telemetry.DPE
	if r.respStarted {
		r.cut(stream.ProtocolError, detail)
		return
	}
	r.reply(status, http.StatusText(status), detail)
}

// OnHeaders has the head in place.
func (r *Request) OnHeaders(end bool) {
	now := r.rt.loop.Now()
	r.active = now
	r.due.headers = 0
	r.isHead = r.head.MethodString() == http.MethodHead
	if d := r.hcm.RequestTimeout; d > 0 && !end {
		r.due.request = r.rec.Begin + int64(d)
		r.arm(r.due.request)
	}
	if end {
		r.requestEnded(now)
	}
	if !r.normalize() {
		return
	}
	r.sanitize()
	if r.clientAddr != r.info.Peer.Addr() {
		r.rec.DownstreamRemote = netip.AddrPortFrom(r.clientAddr, 0)
	}
	if d := r.hcm.MaxStreamDuration; d > 0 {
		r.setDuration(d)
	}
	r.dispatch()
}

// setDuration limits the life of the stream, counted from its first byte.
func (r *Request) setDuration(d time.Duration) {
	r.due.duration = 0
	if d > 0 {
		r.due.duration = r.rec.Begin + int64(d)
		r.arm(r.due.duration)
	}
}

// requestEnded notes the end of the request. The route's time-out counts from here.
func (r *Request) requestEnded(now int64) {
	r.reqEnded = true
	r.rec.RequestEnd = now
	r.due.request = 0
	if r.routed && !r.tunnel {
		r.startResponseTimer(now)
	}
}

func (r *Request) startResponseTimer(now int64) {
	if r.timeout > 0 {
		r.due.response = now + int64(r.timeout)
		r.arm(r.due.response)
	}
	if r.try.phase == streaming {
		r.try.startTimer(now)
	}
}

// OnData forwards a piece of the body, or keeps it while there is no upstream yet.
func (r *Request) OnData(b []byte, end bool) {
	now := r.rt.loop.Now()
	r.active = now
	r.rec.BytesReceived += uint64(len(b))
	if end {
		r.requestEnded(now)
	}
	if r.respEnded && !r.tunnel || !r.routed {
		return
	}
	r.keep(b)
	if t := &r.try; t.phase == streaming {
		t.send(b, end)
	}
}

// OnTrailers ends the request with trailers.
func (r *Request) OnTrailers() {
	now := r.rt.loop.Now()
	r.active = now
	r.hasTrailers = true
	r.rec.RequestTrailers = &r.trailers
	r.requestEnded(now)
	if t := &r.try; t.phase == streaming && !r.respEnded {
		t.sendTrailers()
	}
}

// OnInformational does not happen downstream.
func (r *Request) OnInformational(*header.Block) {}

// OnReset: the client is gone.
func (r *Request) OnReset(reason stream.Reason, detail string) {
	if reason == stream.ProtocolError {
		r.rec.Flags |= telemetry.DPE
	} else if !r.respEnded {
		r.rec.Flags |= telemetry.DC
	}
	if detail == "" {
		detail = "downstream_remote_disconnect"
	}
	if !r.respEnded {
		r.rec.Details = detail
	}
	r.down = nil
	r.finish()
}

// OnWritable: the client takes more of the response.
func (r *Request) OnWritable() {
	if r.try.phase == streaming {
		r.try.up.Resume()
	}
}

// pause stops the downstream for a reason; resume takes the reason away.
func (r *Request) pause(why pauseReason) {
	if r.pausedFor == 0 {
		r.down.Pause()
	}
	r.pausedFor |= why
}

func (r *Request) resume(why pauseReason) {
	if r.pausedFor == 0 {
		return
	}
	if r.pausedFor &^= why; r.pausedFor == 0 {
		r.down.Resume()
	}
}

// The methods of mesh.Request.

// Authority implements mesh.Request.
func (r *Request) Authority() string { return r.head.AuthorityString() }

// Path implements mesh.Request.
func (r *Request) Path() string { return r.head.PathString() }

// Method implements mesh.Request.
func (r *Request) Method() string { return r.head.MethodString() }

// Scheme implements mesh.Request.
func (r *Request) Scheme() string { return r.head.SchemeString() }

// Header implements mesh.Request.
func (r *Request) Header(name string) (string, bool) { return r.head.Joined(name) }

// NextHeader implements mesh.Request.
func (r *Request) NextHeader(name string, from int) (string, int) {
	return r.head.NextValue(name, from)
}

// Random implements mesh.Request.
func (r *Request) Random() uint64 { return r.random }

// unsafeString is a string that shares b's memory, for calls that copy it at once.
func unsafeString(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
