package router

import (
	"net/http"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// dispatch finds the route and does what it says.
func (r *Request) dispatch() {
	cfg := r.rt.routesIn(r.snap, r.hcm)
	if cfg == nil {
		r.rec.Flags |= telemetry.NR
		r.reply(http.StatusNotFound, "", "route_configuration_not_found")
		return
	}
	route := cfg.Match(r)
	if route == nil {
		r.rec.Flags |= telemetry.NR
		r.reply(http.StatusNotFound, "", "route_not_found")
		return
	}
	r.route = route
	r.rec.RouteName = route.Name
	if route.Host != nil {
		r.rec.VirtualHost = route.Host.Name
		if route.Host.RequireTLS != mesh.TLSNone && r.head.SchemeString() != schemeHTTPS &&
			(route.Host.RequireTLS == mesh.TLSAll || !r.head.Has(header.XEnvoyInternal)) {
			r.redirectToTLS()
			return
		}
	}
	if r.upgrade && !r.upgradeAllowed() {
		r.reply(http.StatusForbidden, "", "upgrade_failed")
		return
	}
	switch {
	case route.Redirect != nil:
		r.redirect(route.Redirect)
	case route.Direct != nil:
		r.direct(route.Direct)
	case route.Action != nil:
		r.forward(route.Action)
	default:
		r.rec.Flags |= telemetry.NR
		r.reply(http.StatusNotFound, "", "route_not_found")
	}
}

// upgradeAllowed looks the upgrade up in the route's settings and then in the connection manager's.
func (r *Request) upgradeAllowed() bool {
	kind := "connect"
	if r.head.MethodString() != http.MethodConnect {
		v, _ := r.head.GetString(header.Upgrade)
		kind = strings.ToLower(v)
	}
	if r.route.Action != nil {
		if on, ok := r.route.Action.Upgrades[kind]; ok {
			return on
		}
	}
	return r.hcm.Upgrades[kind]
}

// forward picks the cluster, settles what is particular to the route, and begins the first attempt.
func (r *Request) forward(a *mesh.RouteAction) {
	name := ""
	if a.ClusterHeader != "" {
		v, ok := r.head.GetName(a.ClusterHeader)
		if !ok || len(v) == 0 {
			r.noCluster(a)
			return
		}
		name = string(v)
	} else {
		r.split = a.PickCluster(r.random, r.headerValue)
		if r.split == nil {
			r.noCluster(a)
			return
		}
		name = r.split.Name
		if r.split.ClusterHeader != "" {
			v, _ := r.head.GetName(r.split.ClusterHeader)
			name = string(v)
		}
	}
	r.rec.UpstreamCluster = name
	mc := r.snap.Clusters[name]
	if mc == nil {
		r.noCluster(a)
		return
	}
	r.cluster = r.rt.deps.Upstreams.Cluster(mc)
	r.rec.UpstreamCluster = mc.Name
	host, flag := r.pick()
	if host == nil {
		r.noHost(flag)
		return
	}

	r.setTimeouts(a)
	if r.route.Host != nil && r.route.Host.IncludeAttemptCount {
		r.head.Set(header.XEnvoyAttemptCount, "1")
	}
	r.mutateRequest()
	r.rewriteHost(a)
	r.rewritePath(a)
	r.setUpRetries(a)
	r.routed = true
	if a.IdleTimeout != nil {
		r.idleLimit = *a.IdleTimeout
		if r.idleLimit > 0 {
			r.arm(r.idleDue())
		}
	}
	if a.MaxStreamDuration != nil {
		r.setDuration(*a.MaxStreamDuration)
	}
	if r.reqEnded {
		r.startResponseTimer(r.rt.loop.Now())
	}
	r.begin(host)
}

// headerValue is a header look-up for weighted clusters with use of a header.
func (r *Request) headerValue(name string) (string, bool) { return r.head.Joined(name) }

func (r *Request) noCluster(a *mesh.RouteAction) {
	code := a.ClusterNotFoundCode
	if code == 0 {
		code = http.StatusServiceUnavailable
	}
	r.rec.Flags |= telemetry.NC
	r.replyRouted(code, "", "cluster_not_found")
}

func (r *Request) noHost(flag telemetry.Flags) {
	if flag == 0 {
		flag = telemetry.UH
	}
	r.rec.Flags |= flag
	r.rec.Attempts++ // it counts as one, in Envoy too
	if flag == telemetry.DO || flag == telemetry.UDO {
		r.replyRouted(http.StatusServiceUnavailable, "drop overload", "drop_overload")
		return
	}
	r.replyRouted(http.StatusServiceUnavailable, "no healthy upstream", "no_healthy_upstream")
}

// setTimeouts settles the route's time-outs and those that an internal client may ask for by header.
func (r *Request) setTimeouts(a *mesh.RouteAction) {
	h := &r.head
	r.timeout, r.tryTimeout, r.timeoutCode = a.Timeout, 0, http.StatusGatewayTimeout
	if p := r.retryPolicy(a); p != nil {
		r.tryTimeout, r.tryIdleLimit = p.PerTryTimeout, p.PerTryIdleTimeout
	}
	expected, haveExpected := time.Duration(0), false
	if r.hcm.RespectExpectedRqTime {
		expected, haveExpected = milliseconds(h, header.XEnvoyExpectedRqTimeoutMS)
	}
	if haveExpected {
		r.timeout = expected
	} else if d, ok := milliseconds(h, header.XEnvoyUpstreamRqTimeoutMS); ok {
		r.timeout = d
	}
	h.Remove(header.XEnvoyUpstreamRqTimeoutMS)
	if d, ok := milliseconds(h, header.XEnvoyUpstreamRqPerTryTimeoutMS); ok {
		r.tryTimeout = d
	}
	h.Remove(header.XEnvoyUpstreamRqPerTryTimeoutMS)
	if r.tryTimeout >= r.timeout && r.timeout != 0 {
		r.tryTimeout = 0
	}
	if h.Has(header.XEnvoyUpstreamRqTimeoutAltResponse) {
		r.timeoutCode = http.StatusNoContent
		h.Remove(header.XEnvoyUpstreamRqTimeoutAltResponse)
	}
	if r.hcm.SuppressEnvoyHeaders {
		return
	}
	r.announceTimeout(r.timeout)
}

// announceTimeout tells the upstream how long its answer is waited for.
func (r *Request) announceTimeout(left time.Duration) {
	if t := r.tryTimeout; t > 0 && (t < left || r.timeout == 0) {
		left = t
	}
	if left > 0 {
		r.setMilliseconds(&r.head, header.XEnvoyExpectedRqTimeoutMS, left)
	}
}

func (r *Request) setMilliseconds(h *header.Block, id header.ID, d time.Duration) {
	r.scratch = appendUint(r.scratch[:0], uint64(d.Milliseconds()))
	h.SetBytes(id, r.scratch)
}

func milliseconds(h *header.Block, id header.ID) (time.Duration, bool) {
	v, ok := h.GetString(id)
	if !ok {
		return 0, false
	}
	n, ok := parseUint(v)
	return time.Duration(n) * time.Millisecond, ok && n < 1<<40
}

func appendUint(dst []byte, n uint64) []byte {
	var buf [20]byte
	i := len(buf)
	for {
		i--
		buf[i] = byte('0' + n%10)
		if n /= 10; n == 0 {
			return append(dst, buf[i:]...)
		}
	}
}
