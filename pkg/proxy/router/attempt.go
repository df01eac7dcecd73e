package router

import (
	"net/http"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// phase is how far an attempt has come.
type phase uint8

const (
	idle      phase = iota // there is none
	waiting                // for a connection
	streaming              // there is a stream
)

// attempt is one try at one endpoint. A request has at most one at a time, and uses the same value for all of
// them: it is the Opener that waits for a connection, then the Handler of the upstream stream.
type attempt struct {
	r        *Request
	phase    phase
	wait     stream.Wait
	up       stream.Stream
	info     *stream.UpstreamInfo
	host     *upstream.Host
	pick     upstream.PickContext
	active   int64
	replayed bool // a stale connection was replaced already
	wary     bool // the last one broke on a connection that had been used before
}

func (t *attempt) clear() {
	t.phase, t.up, t.info, t.host = idle, nil, nil, nil
	t.wait = stream.Wait{}
	t.pick = upstream.PickContext{}
	t.active, t.replayed, t.wary = 0, false, false
}

// pick chooses an endpoint, other than those tried already where the retry policy asks for that.
func (r *Request) pick() (*upstream.Host, telemetry.Flags) {
	p := &r.try.pick
	p.Random = r.random + uint64(r.rec.Attempts)*0x9e3779b97f4a7c15
	p.OriginalDst = r.info.Orig
	return r.cluster.Pick(p)
}

// begin makes the first attempt.
func (r *Request) begin(host *upstream.Host) { r.launch(host, false) }

// startAttempt makes another one, at an endpoint of its own choice.
func (r *Request) startAttempt() {
	host, flag := r.pick()
	if host == nil {
		r.noHost(flag)
		return
	}
	if v := r.route.Host; v != nil && v.IncludeAttemptCount {
		r.scratch = appendUint(r.scratch[:0], uint64(r.rec.Attempts)+1)
		r.head.SetBytes(header.XEnvoyAttemptCount, r.scratch)
	}
	if !r.hcm.SuppressEnvoyHeaders && r.timeout > 0 && r.due.response != 0 {
		r.announceTimeout(time.Duration(max(r.due.response-r.rt.loop.Now(), 0)))
	}
	r.rt.deps.Shard.Stats.Retries++
	r.launch(host, r.try.wary)
}

// launch asks for a stream to the host; fresh refuses connections that were used before.
func (r *Request) launch(host *upstream.Host, fresh bool) {
	t := &r.try
	t.host = host
	r.rec.Attempts++
	r.rec.UpstreamHost, r.rec.UpstreamHostName = host.Addr, host.Hostname
	if a := r.route.Action; a.AutoHostRewrite && host.Hostname != "" {
		r.setHost(a, host.Hostname)
	}
	w := &t.wait
	w.Opener, w.Handler = t, t
	w.Head, w.Trailers = &r.resp, &r.respTrailers
	w.Method = r.head.Method()
	w.Upgrade, w.Fresh, w.Priority = r.upgrade, fresh, r.route.Action.Priority
	t.phase = waiting
	r.rt.deps.Pools.Get(r.info.Source, r.cluster, host).Open(w)
}

// OnStream sends what there is of the request.
func (t *attempt) OnStream(s stream.Stream, info *stream.UpstreamInfo) {
	r := t.r
	t.phase, t.up, t.info = streaming, s, info
	r.rec.UpstreamLocal = info.Local
	r.rec.UpstreamProtocol = telemetry.HTTP11
	now := r.rt.loop.Now()
	t.active = now
	if r.rec.UpstreamBegin == 0 {
		r.rec.UpstreamBegin = now
	}
	whole := r.reqEnded && !r.hasTrailers
	if len(r.body.buf) == 0 {
		s.SendHeaders(&r.head, whole)
		if r.hasTrailers {
			s.SendTrailers(&r.trailers)
		}
	} else {
		s.SendHeaders(&r.head, false)
		r.sendBody(s, whole)
		if r.hasTrailers {
			s.SendTrailers(&r.trailers)
		}
	}
	if r.reqEnded {
		r.rec.UpstreamRequestEnd = now
		t.startTimer(now)
		return
	}
	if s.Blocked() {
		r.pause(upstreamFull)
	}
	if !r.upgrade {
		r.resume(noUpstream)
		r.carryWaiting()
	}
	if r.tryIdleLimit > 0 {
		r.arm(r.tryIdleDue())
	}
}

// startTimer begins the per-try time-out: the request has been sent completely.
func (t *attempt) startTimer(now int64) {
	r := t.r
	if r.tryTimeout > 0 {
		r.due.try = now + int64(r.tryTimeout)
		r.arm(r.due.try)
	}
	if r.tryIdleLimit > 0 {
		r.arm(r.tryIdleDue())
	}
}

func (t *attempt) send(b []byte, end bool) {
	t.active = t.r.active
	t.up.SendData(b, end)
	if end {
		t.r.rec.UpstreamRequestEnd = t.active
		if t.r.tunnel && t.r.respEnded {
			t.leave()
			t.r.finish()
		}
		return
	}
	if t.up.Blocked() {
		t.r.pause(upstreamFull)
	}
}

func (t *attempt) sendTrailers() {
	t.active = t.r.active
	t.r.rec.UpstreamRequestEnd = t.active
	t.up.SendTrailers(&t.r.trailers)
}

// abandon ends the attempt from our side.
func (t *attempt) abandon() {
	switch t.phase {
	case waiting:
		t.wait.Cancel()
		t.phase = idle
	case streaming:
		up := t.up
		t.leave()
		up.Reset(stream.LocalReset)
	}
	t.r.due.try = 0
}

// leave notes what the attempt has cost; its stream is not touched any more.
func (t *attempt) leave() {
	t.r.settleBodies()
	if i := t.info; i != nil {
		rec := &t.r.rec
		rec.UpstreamBytesSent += i.Sent
		rec.UpstreamBytesReceived += i.Received
		rec.UpstreamHeaderBytesSent += i.HeadSent
		rec.UpstreamHeaderBytesReceived += i.HeadReceived
	}
	t.phase, t.up, t.info = idle, nil, nil
	t.r.due.try = 0
}

// OnOpenFailed: there will be no stream.
func (t *attempt) OnOpenFailed(reason stream.Reason, detail string) {
	t.phase = idle
	if reason.ConnectFailed() {
		t.host.Errors++
	}
	t.r.attemptFailed(reason, detail, false)
}

// OnReset: the stream broke off.
func (t *attempt) OnReset(reason stream.Reason, detail string) {
	r := t.r
	t.host.Errors++
	t.wary = t.info.Requests > 0
	stale := reason == stream.ConnectionTermination && !t.info.Answered && t.info.Requests > 0
	if reason == stream.ProtocolError {
		r.rt.deps.Shard.Stats.ProtocolErrors++
	}
	t.leave()
	if stale && !t.replayed && r.repeatable() {
		// The upstream closed an idle connection just as we took it. That is nobody's failure: ask once more,
		// on a connection that cannot be stale.
		t.replayed = true
		r.rec.Attempts--
		r.launch(t.host, true)
		return
	}
	r.attemptFailed(reason, detail, true)
}

// repeatable says that doing the request twice is the same as doing it once, and that all of it is at hand.
func (r *Request) repeatable() bool {
	if !r.reqEnded || r.rec.BytesReceived != 0 || r.upgrade || r.hasTrailers || r.host().Gone() {
		return false
	}
	switch r.head.MethodString() {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodPut, http.MethodDelete, http.MethodTrace:
		return true
	}
	return false
}

func (r *Request) host() *upstream.Host { return r.try.host }

// attemptFailed decides between another attempt and telling the client.
func (r *Request) attemptFailed(reason stream.Reason, detail string, sent bool) {
	if !r.respStarted && r.retryAfterReset(reason, sent) {
		return
	}
	r.rec.Flags |= flagOf(reason)
	r.rec.UpstreamTransportFailure = detail
	if r.respStarted {
		r.cut(reason, resetDetails("upstream_reset_after_response_started", reason, detail))
		return
	}
	r.replyReset(reason, detail)
}

// OnInformational passes a 1xx head on, except 100: that one was answered by us, if it was asked for.
func (t *attempt) OnInformational(h *header.Block) {
	t.touch()
	if h.Status() != http.StatusContinue && !t.r.respStarted && t.r.rec.Protocol != telemetry.HTTP10 {
		t.r.down.SendInformational(h)
	}
}

func (t *attempt) touch() {
	t.active = t.r.rt.loop.Now()
	t.r.active = t.active
}

// OnHeaders passes the response on, or takes another try.
func (t *attempt) OnHeaders(end bool) {
	r := t.r
	t.touch()
	r.rec.ResponseBegin = t.active
	r.due.try = 0
	status := r.resp.Status()
	if status == http.StatusSwitchingProtocols || r.upgrade && r.head.MethodString() == http.MethodConnect && status/100 == 2 {
		r.tunnel = true
		r.due.response = 0
	} else if r.retry.enabled && r.retryAfterHeaders(end) {
		return
	}
	r.retry.release(r)
	r.forwardHead(end)
}

// forwardHead sends the upstream's head to the client, as the client is to see it.
func (r *Request) forwardHead(end bool) {
	h := &r.resp
	if !r.hcm.SuppressEnvoyHeaders && r.rec.RequestEnd != 0 {
		r.scratch = appendUint(r.scratch[:0], uint64(max(r.rt.loop.Now()-r.rec.RequestEnd, 0))/1e6)
		h.SetBytes(header.XEnvoyUpstreamServiceTime, r.scratch)
	}
	r.addAttemptCount()
	r.rec.Status = h.Status()
	r.rec.Response = h
	r.mutateResponse()
	r.rec.Details = "via_upstream"
	r.finishHead()
	r.respStarted = true
	r.rec.DownstreamBegin = r.active
	down := r.down
	down.SendHeaders(h, end)
	if end {
		r.responseEnded()
		return
	}
	if r.tunnel {
		r.resume(noUpstream)
		r.tunnelBegins()
	}
}

// OnData passes a piece of the response on.
func (t *attempt) OnData(b []byte, end bool) {
	r := t.r
	t.touch()
	r.rec.BytesSent += uint64(len(b))
	r.down.SendData(b, end)
	if end {
		r.responseEnded()
		return
	}
	if r.down.Blocked() {
		t.up.Pause()
	}
}

// OnWaiting: the rest of a long body may skip the proxy.
func (t *attempt) OnWaiting() { t.r.carry(aside.ToClient) }

// OnTrailers ends the response with trailers.
func (t *attempt) OnTrailers() {
	r := t.r
	t.touch()
	r.rec.ResponseTrailers = &r.respTrailers
	r.down.SendTrailers(&r.respTrailers)
	r.responseEnded()
}

// OnWritable: the upstream takes more of the request.
func (t *attempt) OnWritable() { t.r.resume(upstreamFull) }

// responseEnded ends the exchange. A request that is still coming is not wanted any more, except in a tunnel.
func (r *Request) responseEnded() {
	now := r.rt.loop.Now()
	r.respEnded = true
	r.rec.UpstreamEnd, r.rec.DownstreamEnd = now, now
	if r.tunnel && !r.reqEnded {
		return
	}
	if r.try.phase == streaming && r.reqEnded {
		r.try.leave() // the codec knows by itself that its stream is complete
	}
	r.finish()
}
