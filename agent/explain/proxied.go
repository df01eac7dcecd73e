package explain

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/sockmesh/sockmesh/agent/describe"
	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// proxied is what the proxy does with a connection that it accepted: filter chain, then TCP or HTTP.
func (e *explainer) proxied(l *mesh.Listener) {
	var src netip.AddrPort
	for _, ip := range e.pod.IPs {
		if ip.Is4() == e.t.addr.Addr().Is4() {
			src = netip.AddrPortFrom(ip, 0)
		}
	}
	in := mesh.ChainInput{Dst: e.t.addr, Src: src, DirectSrc: src.Addr(), Transport: "raw_buffer"}
	chain := l.Chain(&in)
	var others []string
	for i, c := range l.Chains {
		if c != chain {
			others = append(others, fmt.Sprintf("%s: %s", chainName(c, i), describe.ChainMatch(&c.Match)))
		}
	}
	if chain == nil {
		e.step("chain", "none matches", "the listener has no default_filter_chain", others...)
		e.end(Failed, "the proxy closes the connection: no filter chain of %s matches (NR)", l.Name)
		return
	}
	rule := describe.ChainMatch(&chain.Match)
	if chain == l.Default {
		rule = "default_filter_chain"
	}
	e.step("chain", chainName(chain, indexOf(l.Chains, chain)), rule, others...)
	switch {
	case chain.TCP != nil:
		e.tcp(chain.TCP)
	case e.t.http != nil:
		e.request(chain.HTTP)
	default:
		e.step("http", "the connection is read as HTTP", "http_connection_manager "+chain.HTTP.StatPrefix)
		e.kernelProxied()
		e.end(Proxied, "the proxy reads HTTP on this connection; ask with an http:// URL to see the route of a request")
	}
}

func chainName(c *mesh.FilterChain, index int) string {
	kind := "tcp_proxy"
	if c.HTTP != nil {
		kind = "http_connection_manager"
	}
	if c.Name != "" {
		return fmt.Sprintf("%q (%s)", c.Name, kind)
	}
	if index >= 0 {
		return fmt.Sprintf("filter_chains[%d] (%s)", index, kind)
	}
	return "default (" + kind + ")"
}

func indexOf(chains []*mesh.FilterChain, c *mesh.FilterChain) int {
	for i := range chains {
		if chains[i] == c {
			return i
		}
	}
	return -1
}

func (e *explainer) tcp(p *mesh.TCPProxy) {
	e.clusters(p.Clusters, p.TotalWeight)
	e.kernelProxied()
	if len(e.out.Destinations) == 0 {
		e.end(Failed, "the proxy closes the connection: no endpoint to connect to (UH)")
		return
	}
	e.end(Proxied, "the proxy forwards the bytes to %s", describe.Targets(p.Clusters, p.TotalWeight))
}

// request routes an HTTP request.
func (e *explainer) request(h *mesh.HTTPConnectionManager) {
	r := e.t.http
	rc := h.Routes
	if rc == nil {
		e.step("routes", "none yet", "RouteConfiguration "+h.RouteConfigName+" has not come")
		e.end(Failed, "404: there are no routes (NR)")
		return
	}
	host := rc.VirtualHost(r.authority)
	if host == nil {
		e.step("host", "no virtual host", fmt.Sprintf("RouteConfiguration %q has none for %q", rc.Name, r.authority))
		e.end(Failed, "404: no virtual host for %q (NR)", r.authority)
		return
	}
	e.step("host", fmt.Sprintf("virtual host %q", host.Name), fmt.Sprintf("domain %q matches %q in RouteConfiguration %q",
		domain(rc, host, r.authority), r.authority, rc.Name))
	if host.RequireTLS == mesh.TLSAll {
		e.step("tls", "redirect to https", "require_tls: ALL")
		e.end(Proxied, "the proxy answers 301 to https")
		return
	}
	route := host.Route(r)
	var rejected []string
	for i, other := range host.Routes {
		if other == route {
			break
		}
		rejected = append(rejected, fmt.Sprintf("route %s: %s", routeName(other, i), whyNot(&other.Match, r)))
	}
	if route == nil {
		e.step("route", "none matches", "", rejected...)
		e.end(Failed, "404: no route of virtual host %q matches (NR)", host.Name)
		return
	}
	e.step("route", "route "+routeName(route, route.Index), describe.Match(&route.Match), rejected...)
	e.action(route)
}

func (e *explainer) action(route *mesh.Route) {
	switch {
	case route.Direct != nil:
		e.step("action", describe.Action(route), "direct_response")
		e.kernelProxied()
		e.end(Proxied, "the proxy answers %d itself", route.Direct.Status)
		return
	case route.Redirect != nil:
		e.step("action", describe.Action(route), "redirect")
		e.kernelProxied()
		e.end(Proxied, "the proxy answers %d itself", route.Redirect.Code)
		return
	}
	a := route.Action
	e.step("action", describe.Action(route), actionRule(a))
	clusters, total := a.Clusters, a.TotalWeight
	if len(clusters) == 1 && clusters[0].ClusterHeader != "" {
		header := clusters[0].ClusterHeader
		name, _ := e.t.http.Header(header)
		if name == "" {
			e.end(Failed, "503: header %s, which should name the cluster, is missing", header)
			return
		}
		clusters, total = []mesh.WeightedCluster{{Name: name, Weight: 1}}, 1
	}
	e.clusters(clusters, total)
	e.kernelProxied()
	if len(e.out.Destinations) == 0 {
		e.end(Failed, "503: no endpoint to connect to")
		return
	}
	e.end(Proxied, "the proxy forwards the request to %s", describe.Targets(clusters, total))
}

func actionRule(a *mesh.RouteAction) string {
	parts := []string{"timeout " + a.Timeout.String()}
	if a.Timeout == 0 {
		parts[0] = "no timeout"
	}
	if a.Retry != nil && a.Retry.On != 0 {
		parts = append(parts, fmt.Sprintf("up to %d retries", a.Retry.Retries))
	}
	return strings.Join(parts, ", ")
}

func routeName(r *mesh.Route, index int) string {
	if r.Name != "" {
		return fmt.Sprintf("%d %q", index, r.Name)
	}
	return fmt.Sprint(index)
}

// domain is the one of a virtual host's domains that brought the authority here, in Envoy's order: exact, longest
// suffix, longest prefix, star.
func domain(rc *mesh.RouteConfig, h *mesh.VirtualHost, authority string) string {
	name := strings.ToLower(authority)
	if rc.IgnorePort {
		if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, ']') {
			name = name[:i]
		}
	}
	best, rank := "*", 0
	for _, d := range h.Domains {
		low := strings.ToLower(d)
		r := 0
		switch {
		case low == name:
			r = 1 << 30
		case low != "*" && strings.HasPrefix(low, "*") && strings.HasSuffix(name, low[1:]) && len(name) >= len(low):
			r = 1<<20 + len(low)
		case low != "*" && strings.HasSuffix(low, "*") && strings.HasPrefix(name, low[:len(low)-1]) && len(name) >= len(low):
			r = len(low)
		}
		if r > rank {
			best, rank = d, r
		}
	}
	return best
}

// whyNot names the first condition of a route that the request does not meet, in words.
func whyNot(m *mesh.RouteMatch, r *request) string {
	path := &mesh.RouteMatch{Kind: m.Kind, Path: m.Path, Regex: m.Regex, IgnoreCase: m.IgnoreCase}
	if !matches(path, r) {
		return fmt.Sprintf("%s does not match path %q", describe.Path(m), pathOnly(r.path))
	}
	for _, h := range m.Headers {
		if h.Matches(r) {
			continue
		}
		if v, ok := r.Header(h.Name); ok {
			return fmt.Sprintf("header %s: it is %q", describe.Header(h), v)
		}
		return fmt.Sprintf("header %s: the request has none", describe.Header(h))
	}
	for _, q := range m.Query {
		if !q.Matches(r) {
			return "query " + describe.Query(q) + ": not so in " + fmt.Sprintf("%q", r.path)
		}
	}
	if m.GRPC {
		return "grpc: content-type is not application/grpc"
	}
	return "its runtime_fraction is 0"
}

// matches asks mesh about one condition alone, by a table that has only that route.
func matches(m *mesh.RouteMatch, r *request) bool {
	rc := &mesh.RouteConfig{Hosts: []*mesh.VirtualHost{{Domains: []string{"*"}, Routes: []*mesh.Route{{Match: *m}}}}}
	if err := rc.Init(); err != nil {
		return false
	}
	return rc.Match(r) != nil
}

func pathOnly(p string) string {
	if i := strings.IndexAny(p, "?#"); i >= 0 {
		return p[:i]
	}
	return p
}
