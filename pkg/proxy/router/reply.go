package router

import (
	"net/http"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// flagOf is the response flag of a failed attempt.
func flagOf(reason stream.Reason) telemetry.Flags {
	switch reason {
	case stream.LocalConnectionFailure, stream.RemoteConnectionFailure, stream.ConnectionTimeout:
		return telemetry.UF
	case stream.ConnectionTermination:
		return telemetry.UC
	case stream.Overflow:
		return telemetry.UO
	case stream.RemoteReset, stream.RemoteRefused:
		return telemetry.UR
	case stream.ProtocolError:
		return telemetry.UPE
	}
	return telemetry.LR
}

// reply answers for the connection manager; r.resp is overwritten. Once there is a route, its header mutations
// apply to this too. Who is told that his request is bad is not listened to any further.
func (r *Request) reply(code int, body, details string) {
	r.resp.Reset()
	if r.route != nil {
		r.resp.SetStatus(code)
		r.rec.Response = &r.resp
		r.mutateResponse()
	}
	if code == http.StatusBadRequest {
		r.resp.Add(header.Connection, "close")
	}
	r.replyWith(code, body, details)
}

// replyRouted answers for the route, so that its header mutations apply.
func (r *Request) replyRouted(code int, body, details string) {
	r.resp.Reset()
	r.resp.SetStatus(code)
	r.rec.Response = &r.resp
	r.mutateResponse()
	r.addAttemptCount()
	r.replyWith(code, body, details)
}

// replyReset tells the client that the upstream failed.
func (r *Request) replyReset(reason stream.Reason, detail string) {
	code := http.StatusServiceUnavailable
	if reason == stream.ProtocolError {
		code = http.StatusBadGateway
	}
	body := "upstream connect error or disconnect/reset before headers. "
	if r.rec.Attempts > 1 {
		body += "retried and the latest "
	}
	body += "reset reason: " + reason.String()
	r.resp.Reset()
	r.resp.SetStatus(code)
	r.rec.Response = &r.resp
	r.mutateResponse()
	r.addAttemptCount()
	if reason == stream.Overflow {
		r.addOverloaded()
	}
	r.replyWith(code, body, resetDetails("upstream_reset_before_response_started", reason, detail))
}

// resetDetails is a response code detail with the reason in braces, without white space.
func resetDetails(what string, reason stream.Reason, detail string) string {
	s := reason.String()
	if detail != "" {
		s += "|" + detail
	}
	return what + "{" + strings.ReplaceAll(s, " ", "_") + "}"
}

func (r *Request) addOverloaded() {
	if !r.hcm.SuppressEnvoyHeaders {
		r.resp.Set(header.XEnvoyOverloaded, "true")
	}
}

func (r *Request) addAttemptCount() {
	if v := r.route.Host; v != nil && v.AttemptCountInResponse && r.rec.Attempts > 0 {
		r.scratch = appendUint(r.scratch[:0], uint64(r.rec.Attempts))
		r.resp.SetBytes(header.XEnvoyAttemptCount, r.scratch)
	}
}

// replyWith sends a response whose extra fields are in r.resp, and ends the request.
func (r *Request) replyWith(code int, body, details string) {
	if r.try.phase != idle {
		r.try.abandon()
	}
	h := &r.resp
	h.SetStatus(code)
	r.rec.Status, r.rec.Response, r.rec.Details = code, h, details
	if body == "" {
		h.Remove(header.ContentType)
		h.Remove(header.ContentLength)
	} else {
		r.scratch = appendUint(r.scratch[:0], uint64(len(body)))
		h.SetBytes(header.ContentLength, r.scratch)
		if !h.Has(header.ContentType) {
			h.Set(header.ContentType, "text/plain")
		}
	}
	r.finishHead()
	now := r.rt.loop.Now()
	r.respStarted, r.respEnded = true, true
	r.rec.DownstreamBegin, r.rec.DownstreamEnd = now, now
	if body == "" || r.isHead {
		r.down.SendHeaders(h, true)
	} else {
		r.rec.BytesSent += uint64(len(body))
		r.down.SendHeaders(h, false)
		// The body may be the snapshot's own memory or a constant: SendData only reads it.
		r.down.SendData(unsafeBytes(body), true)
	}
	r.finish()
}

// finishHead adds what every response of the connection manager has.
func (r *Request) finishHead() {
	h, cfg := &r.resp, r.hcm
	if !h.Has(header.Date) {
		h.AddBytes(header.Date, r.rt.dateText(r.rt.loop.Now()))
	}
	r.setServer()
	if cfg.AlwaysSetReqIDInResp || r.head.Has(header.XEnvoyForceTrace) {
		if id, ok := r.head.GetString(header.XRequestID); ok {
			h.Set(header.XRequestID, id)
		}
	}
	if cfg.Via != "" {
		h.Append(header.Via, cfg.Via)
	}
}
