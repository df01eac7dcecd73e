package describe

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Modes of a listener.
const (
	ModeKernel      = "kernel"      // offloaded: chosen at connect, no proxy
	ModeProxy       = "proxy"       // claimed, handled by the proxy
	ModeNode        = "node"        // a real socket in the node's network namespace
	ModeInbound     = "inbound"     // connections to pods
	ModePassthrough = "passthrough" // a catch-all that leaves connections in the kernel
	ModeShadowed    = "shadowed"    // another listener claims its addresses
)

// Listeners are the rows of GET /listeners. bound are the node's listening sockets: an address that could not be bound
// is a listener's reason not to work.
func Listeners(s *mesh.Snapshot, bound []api.NodeListener) []api.Listener {
	if s == nil {
		return nil
	}
	claims := map[string][]mesh.Claim{}
	for _, c := range s.Claims() {
		claims[c.Listener] = append(claims[c.Listener], c)
	}
	var out []api.Listener
	for _, l := range s.Listeners {
		row := api.Listener{Name: l.Name, Version: l.Version, Direction: direction(l.Direction), Addresses: []string{}, Chains: []api.FilterChain{}}
		for _, a := range l.Addresses {
			row.Addresses = append(row.Addresses, a.String())
		}
		row.Mode, row.Reason = mode(s, l, claims[l.Name])
		for _, b := range bound {
			if l.BindToPort && b.Name == l.Name && b.Error != "" {
				row.Reason = strings.TrimPrefix(row.Reason+"; not bound: "+b.Error, "; ")
			}
		}
		for _, c := range l.Chains {
			row.Chains = append(row.Chains, chain(c, ChainMatch(&c.Match)))
		}
		if l.Default != nil {
			row.Chains = append(row.Chains, chain(l.Default, "default"))
		}
		out = append(out, row)
	}
	return out
}

// mode says where a listener's connections are handled, and if not in the kernel, why.
func mode(s *mesh.Snapshot, l *mesh.Listener, claims []mesh.Claim) (mode, reason string) {
	switch {
	case l.BindToPort:
		return ModeNode, ""
	case l.Direction == mesh.DirectionInbound:
		return ModeInbound, ""
	case len(claims) > 0 && claims[0].Offload != nil:
		return ModeKernel, ""
	case len(claims) > 0:
		return ModeProxy, claims[0].Reason
	}
	for _, a := range l.Addresses {
		if other := s.Outbound(a); other != nil && other != l && !l.UseOriginalDst {
			return ModeShadowed, "listener " + other.Name + " claims " + a.String() + " first"
		}
	}
	return ModePassthrough, ""
}

func chain(c *mesh.FilterChain, match string) api.FilterChain {
	row := api.FilterChain{Name: c.Name, Match: match}
	switch {
	case c.HTTP != nil:
		row.Kind = "http"
		row.Routes = c.HTTP.RouteConfigName
		if c.HTTP.Routes != nil && row.Routes == "" {
			row.Routes = c.HTTP.Routes.Name
		}
		if row.Routes == "" {
			row.Routes = "(inline)"
		}
	case c.TCP != nil:
		row.Kind = "tcp"
		row.Targets = Targets(c.TCP.Clusters, c.TCP.TotalWeight)
	}
	return row
}

func direction(d mesh.Direction) string {
	switch d {
	case mesh.DirectionInbound:
		return "inbound"
	case mesh.DirectionOutbound:
		return "outbound"
	}
	return "unspecified"
}

// Routes are the rows of GET /routes: each route of each configuration that a listener uses, in matching order.
func Routes(s *mesh.Snapshot) []api.Route {
	if s == nil {
		return nil
	}
	var out []api.Route
	for _, rc := range routeConfigs(s) {
		for _, h := range rc.Hosts {
			for _, r := range h.Routes {
				out = append(out, api.Route{
					Config: rc.Name, Version: rc.Version, Host: h.Name, Domains: h.Domains, Index: r.Index, Name: r.Name,
					Match: Match(&r.Match), Action: Action(r),
				})
			}
		}
	}
	return out
}

func routeConfigs(s *mesh.Snapshot) []*mesh.RouteConfig {
	var out []*mesh.RouteConfig
	add := func(c *mesh.FilterChain) {
		if c != nil && c.HTTP != nil && c.HTTP.Routes != nil && !slices.Contains(out, c.HTTP.Routes) {
			out = append(out, c.HTTP.Routes)
		}
	}
	for _, l := range s.Listeners {
		for _, c := range l.Chains {
			add(c)
		}
		add(l.Default)
	}
	slices.SortStableFunc(out, func(a, b *mesh.RouteConfig) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Clusters are the rows of GET /clusters, by name.
func Clusters(s *mesh.Snapshot) []api.Cluster {
	if s == nil {
		return nil
	}
	var out []api.Cluster
	for _, c := range sortedClusters(s) {
		row := api.Cluster{
			Name: c.Name, Version: c.Version, Discovery: discovery(c.Discovery), Policy: policy(c.Policy),
			Endpoints: len(c.Endpoints), TimeoutMS: c.ConnectTimeout.Milliseconds(),
		}
		for _, e := range c.Endpoints {
			if e.Health.Usable() {
				row.Usable++
			}
		}
		out = append(out, row)
	}
	return out
}

// Endpoints are the rows of GET /endpoints. podOf names the pod of this node that has an address, if one does.
func Endpoints(s *mesh.Snapshot, podOf func(netip.Addr) string) []api.Endpoint {
	if s == nil {
		return nil
	}
	var out []api.Endpoint
	for _, c := range sortedClusters(s) {
		for i := range c.Localities {
			l := &c.Localities[i]
			for _, e := range c.Endpoints[l.First : l.First+l.N] {
				out = append(out, api.Endpoint{
					Cluster: c.Name, Address: e.Addr.String(), Hostname: e.Hostname, Locality: locality(l), Priority: l.Priority,
					Weight: e.Weight, Health: Health(e.Health), Pod: podOf(e.Addr.Addr()),
				})
			}
		}
	}
	return out
}

func sortedClusters(s *mesh.Snapshot) []*mesh.Cluster {
	out := make([]*mesh.Cluster, 0, len(s.Clusters))
	for _, c := range s.Clusters {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *mesh.Cluster) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func locality(l *mesh.Locality) string {
	return strings.TrimRight(l.Region+"/"+l.Zone+"/"+l.SubZone, "/")
}

// Health is Envoy's name of a health state.
func Health(h mesh.Health) string {
	names := [...]string{"UNKNOWN", "HEALTHY", "UNHEALTHY", "DRAINING", "TIMEOUT", "DEGRADED"}
	if int(h) < len(names) {
		return names[h]
	}
	return "?"
}

func discovery(d mesh.Discovery) string {
	names := [...]string{"STATIC", "EDS", "STRICT_DNS", "LOGICAL_DNS", "ORIGINAL_DST"}
	if int(d) < len(names) {
		return names[d]
	}
	return "?"
}

func policy(p mesh.LBPolicy) string {
	names := [...]string{"ROUND_ROBIN", "LEAST_REQUEST", "RANDOM", "RING_HASH", "MAGLEV", "CLUSTER_PROVIDED"}
	if int(p) < len(names) {
		return names[p]
	}
	return "?"
}
