package router

import (
	"net/http"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// retryState is what is left of a request's right to be tried again.
type retryState struct {
	enabled bool
	held    bool // one of the cluster's retries is taken
	on      mesh.RetryOn
	left    uint32
	policy  *mesh.RetryPolicy // nil if only headers asked
	base    int64
	max     int64
	next    int64 // upper bound of the next back-off
	tried   []*upstream.Host
	codes   [8]uint16 // of x-envoy-retriable-status-codes
	nCodes  int
	names   string // of x-envoy-retriable-header-names
}

// Envoy's defaults.
const (
	defaultBackOff = 25_000_000
	backOffFactor  = 10
)

func (s *retryState) clear() {
	tried := s.tried[:0]
	clear(s.tried)
	*s = retryState{tried: tried}
}

// release gives the cluster's retry back.
func (s *retryState) release(r *Request) {
	if s.held {
		s.held = false
		r.cluster.Release(upstream.Retries, r.route.Action.Priority)
	}
}

// retryPolicy is the route's, else the virtual host's.
func (r *Request) retryPolicy(a *mesh.RouteAction) *mesh.RetryPolicy {
	if a.Retry != nil || r.route.Host == nil {
		return a.Retry
	}
	return r.route.Host.Retry
}

// retryHeaders command the proxy and are not for the upstream.
var retryHeaders = header.SetOf(
	header.XEnvoyRetryOn, header.XEnvoyRetryGRPCOn, header.XEnvoyMaxRetries, header.XEnvoyHedgeOnPerTryTimeout,
	header.XEnvoyRetriableHeaderNames, header.XEnvoyRetriableStatusCodes,
)

// setUpRetries merges the route's policy with what the request itself asks for; what was not allowed to ask
// has been removed by sanitize.
func (r *Request) setUpRetries(a *mesh.RouteAction) {
	s, h := &r.retry, &r.head
	p := r.retryPolicy(a)
	s.policy = p
	s.left = 1
	if p != nil {
		s.on, s.left = p.On, p.Retries
		s.base, s.max = int64(p.BackOffBase), int64(p.BackOffMax)
	}
	if h.Has(header.XEnvoyRetryOn) {
		v, _ := h.Joined("x-envoy-retry-on")
		s.on |= parseRetryOn(v)
	}
	if s.on != 0 || h.Has(header.XEnvoyRetryGRPCOn) {
		if v, ok := h.GetString(header.XEnvoyMaxRetries); ok {
			if n, ok := parseUint(v); ok && n < 1<<32 {
				s.left = uint32(n)
			}
		}
		if v, ok := h.Joined("x-envoy-retriable-status-codes"); ok {
			s.parseCodes(v)
		}
		if v, ok := h.Joined("x-envoy-retriable-header-names"); ok {
			s.names = strings.ToLower(v)
		}
	}
	h.RemoveAll(&retryHeaders)
	if s.base <= 0 {
		s.base = defaultBackOff
	}
	if s.max <= 0 {
		s.max = s.base * backOffFactor
	}
	s.next = s.base
	s.enabled = s.on != 0
}

func parseRetryOn(list string) (on mesh.RetryOn) {
	for name := range strings.SplitSeq(list, ",") {
		switch strings.TrimSpace(name) {
		case "5xx":
			on |= mesh.Retry5xx
		case "gateway-error":
			on |= mesh.RetryGatewayError
		case "reset":
			on |= mesh.RetryReset
		case "reset-before-request":
			on |= mesh.RetryResetBeforeRequest
		case "connect-failure":
			on |= mesh.RetryConnectFailure
		case "envoy-ratelimited":
			on |= mesh.RetryEnvoyRateLimited
		case "retriable-4xx":
			on |= mesh.RetryRetriable4xx
		case "refused-stream":
			on |= mesh.RetryRefusedStream
		case "retriable-status-codes":
			on |= mesh.RetryRetriableStatusCodes
		case "retriable-headers":
			on |= mesh.RetryRetriableHeaders
		}
	}
	return on
}

func (s *retryState) parseCodes(list string) {
	for code := range strings.SplitSeq(list, ",") {
		if n, ok := parseUint(strings.TrimSpace(code)); ok && n < 1000 && s.nCodes < len(s.codes) {
			s.codes[s.nCodes] = uint16(n)
			s.nCodes++
		}
	}
}

// wantsStatus says whether the response is one to retry after.
func (r *Request) wantsStatus() bool {
	s := &r.retry
	status := r.resp.Status()
	if r.resp.Has(header.XEnvoyRateLimited) {
		return s.on&mesh.RetryEnvoyRateLimited != 0
	}
	switch {
	case s.on&mesh.Retry5xx != 0 && status >= 500 && status < 600,
		s.on&mesh.RetryGatewayError != 0 && status >= 502 && status <= 504,
		s.on&mesh.RetryRetriable4xx != 0 && status == http.StatusConflict:
		return true
	}
	if s.on&mesh.RetryRetriableStatusCodes != 0 {
		for _, c := range s.codes[:s.nCodes] {
			if int(c) == status {
				return true
			}
		}
		if s.policy != nil {
			for _, c := range s.policy.StatusCodes {
				if c == status {
					return true
				}
			}
		}
	}
	if s.on&mesh.RetryRetriableHeaders != 0 {
		for name := range strings.SplitSeq(s.names, ",") {
			if name = strings.TrimSpace(name); name != "" {
				if _, ok := r.resp.GetName(name); ok {
					return true
				}
			}
		}
		if s.policy != nil {
			for _, m := range s.policy.RetriableHeaders {
				if m.Matches(respView{r}) {
					return true
				}
			}
		}
	}
	return false
}

// respView lets header matchers look at the response.
type respView struct{ *Request }

// Header implements mesh.Request.
func (v respView) Header(name string) (string, bool) { return v.resp.Joined(name) }

// NextHeader implements mesh.Request.
func (v respView) NextHeader(name string, from int) (string, int) {
	return v.resp.NextValue(name, from)
}

// wantsReset says whether a broken attempt is one to retry after. sent: some of the request had been sent.
func (s *retryState) wantsReset(reason stream.Reason, sent bool) bool {
	switch {
	case reason == stream.Overflow:
		return false
	case s.on&(mesh.RetryReset|mesh.Retry5xx|mesh.RetryGatewayError) != 0,
		s.on&mesh.RetryResetBeforeRequest != 0 && !sent,
		s.on&mesh.RetryConnectFailure != 0 && reason.ConnectFailed(),
		s.on&mesh.RetryRefusedStream != 0 && reason == stream.RemoteRefused:
		return true
	}
	return false
}

// retryAfterHeaders returns true if the response is dropped and another attempt will be made.
func (r *Request) retryAfterHeaders(end bool) bool {
	if !r.wantsStatus() || !r.takeRetry() {
		return false
	}
	if end && r.reqEnded {
		r.try.leave() // complete: its connection can be used again
	} else {
		r.try.abandon()
	}
	r.backOff()
	return true
}

// retryAfterReset returns true if another attempt will be made.
func (r *Request) retryAfterReset(reason stream.Reason, sent bool) bool {
	if !r.retry.enabled || !r.retry.wantsReset(reason, sent) || !r.takeRetry() {
		return false
	}
	r.backOff()
	return true
}

// takeRetry uses up one retry; the flags say why it cannot.
func (r *Request) takeRetry() bool {
	s := &r.retry
	s.release(r)
	if s.left == 0 {
		r.rec.Flags |= telemetry.URX
		return false
	}
	s.left--
	if !r.cluster.Acquire(upstream.Retries, r.route.Action.Priority) {
		r.rec.Flags |= telemetry.UO
		return false
	}
	s.held = true
	return true
}

// backOff waits a random part of an interval that doubles, then tries again.
func (r *Request) backOff() {
	s := &r.retry
	if p := s.policy; p != nil && p.PreviousHosts {
		s.tried = append(s.tried, r.try.host)
		r.try.pick.Exclude = s.tried
		r.try.pick.Attempts = max(p.HostAttempts, 1)
	}
	bound := min(s.next, s.max)
	s.next = min(s.next*2, s.max)
	delay := int64(r.rt.rand.Uint64() % uint64(bound))
	r.due.backoff = r.rt.loop.Now() + delay
	r.arm(r.due.backoff)
}
