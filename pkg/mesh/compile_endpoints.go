package mesh

import (
	"maps"
	"net/netip"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
)

// Endpoints is a compiled envoy.config.endpoint.v3.ClusterLoadAssignment.
type Endpoints struct {
	Name, Version string
	Localities    []Locality
	Endpoints     []Endpoint
	// Overprovisioning in percent; 0: not set.
	Overprovisioning uint32
	DropPPM          uint32

	names []DNSName // of DNS clusters
}

// CompileEndpoints turns a ClusterLoadAssignment into its runtime form.
func CompileEndpoints(m *endpointv3.ClusterLoadAssignment, version string) (*Endpoints, []Warning, error) {
	c := newCompiler("endpoint", m.GetClusterName())
	c.begin(m)
	e := c.endpoints(nil, m, false)
	e.Version = version
	if err := c.err(); err != nil {
		return nil, c.warnings, err
	}
	return e, c.warnings, nil
}

func (c *compiler) endpoints(at *path, m *endpointv3.ClusterLoadAssignment, namesAllowed bool) *Endpoints {
	e := &Endpoints{Name: m.GetClusterName(), Overprovisioning: m.GetPolicy().GetOverprovisioningFactor().GetValue()}
	priorities := map[uint32]bool{}
	for i, group := range m.GetEndpoints() {
		here := at.field("endpoints").at(i)
		loc := Locality{
			Region: group.GetLocality().GetRegion(), Zone: group.GetLocality().GetZone(), SubZone: group.GetLocality().GetSubZone(),
			Priority: group.GetPriority(), Weight: group.GetLoadBalancingWeight().GetValue(), First: len(e.Endpoints),
		}
		priorities[loc.Priority] = true
		for j, lb := range group.GetLbEndpoints() {
			c.endpoint(here.field("lb_endpoints").at(j), lb, namesAllowed, len(e.Localities), e)
		}
		loc.N = len(e.Endpoints) - loc.First
		e.Localities = append(e.Localities, loc)
	}
	for p := range priorities {
		if p > 0 && !priorities[p-1] {
			c.refuse(at.field("endpoints"), "priorities must be consecutive from 0; there is %d, but no %d (have %v)", p, p-1, slices.Sorted(maps.Keys(priorities)))
		}
	}
	c.dropOverloads(at.field("policy").field("drop_overloads"), m.GetPolicy().GetDropOverloads(), e)
	return e
}

func (c *compiler) endpoint(at *path, m *endpointv3.LbEndpoint, namesAllowed bool, locality int, e *Endpoints) {
	at = at.field("endpoint")
	socket := m.GetEndpoint().GetAddress().GetSocketAddress()
	if socket == nil {
		if m.GetEndpoint().GetAddress().GetAddress() == nil {
			c.refuse(at.field("address"), "an IP address and a port are needed")
		}
		return
	}
	at = at.field("address").field("socket_address")
	if socket.GetProtocol() != corev3.SocketAddress_TCP {
		c.refuse(at.field("protocol"), "%s is not supported, only TCP", socket.GetProtocol())
	}
	port := socket.GetPortValue()
	if port == 0 || port > 65535 {
		c.refuse(at.field("port_value"), "%d is not a port", port)
	}
	endpoint := Endpoint{
		Hostname: m.GetEndpoint().GetHostname(),
		Weight:   max(m.GetLoadBalancingWeight().GetValue(), 1),
		Health:   health(m.GetHealthStatus()),
	}
	if m.GetHealthStatus() < 0 || m.GetHealthStatus() > corev3.HealthStatus_DEGRADED {
		c.refuse(at.field("health_status"), "%d is not known", m.GetHealthStatus())
	}
	ip, err := netip.ParseAddr(socket.GetAddress())
	switch {
	case err == nil:
		endpoint.Addr = netip.AddrPortFrom(ip.Unmap(), uint16(port))
	case !namesAllowed:
		c.refuse(at.field("address"), "%q is not an IP address; names need a STRICT_DNS or LOGICAL_DNS cluster", socket.GetAddress())
		return
	case endpoint.Hostname == "":
		endpoint.Hostname = socket.GetAddress()
	}
	e.Endpoints = append(e.Endpoints, endpoint)
	if namesAllowed {
		e.names = append(e.names, DNSName{Host: socket.GetAddress(), Port: uint16(port), Locality: locality, Endpoint: endpoint})
	}
}

func health(s corev3.HealthStatus) Health {
	switch s {
	case corev3.HealthStatus_HEALTHY:
		return HealthHealthy
	case corev3.HealthStatus_UNHEALTHY:
		return HealthUnhealthy
	case corev3.HealthStatus_DRAINING:
		return HealthDraining
	case corev3.HealthStatus_TIMEOUT:
		return HealthTimeout
	case corev3.HealthStatus_DEGRADED:
		return HealthDegraded
	}
	return HealthUnknown
}

// dropOverloads combines the categories into the share of requests that is dropped by any of them.
func (c *compiler) dropOverloads(at *path, list []*endpointv3.ClusterLoadAssignment_Policy_DropOverload, e *Endpoints) {
	keep := uint64(1_000_000)
	for i, d := range list {
		drop := uint64(c.fraction(at.at(i).field("drop_percentage"), d.GetDropPercentage()))
		keep = keep * (1_000_000 - drop) / 1_000_000
	}
	e.DropPPM = uint32(1_000_000 - keep)
}

// setEndpoints puts endpoints into a cluster that is not published yet.
func (cluster *Cluster) setEndpoints(e *Endpoints) {
	cluster.Localities, cluster.Endpoints = e.Localities, e.Endpoints
	cluster.DropPPM, cluster.EDSVersion = e.DropPPM, e.Version
	if e.Overprovisioning != 0 {
		cluster.Overprovisioning = e.Overprovisioning
	}
	if cluster.DNS != nil {
		cluster.DNS.Names = e.names
	}
}

// WithEndpoints returns a copy of an EDS cluster with these endpoints.
func (cluster *Cluster) WithEndpoints(e *Endpoints) *Cluster {
	joined := *cluster
	joined.setEndpoints(e)
	return &joined
}

// NeedsDNS says whether some endpoint of the cluster is a name.
func (cluster *Cluster) NeedsDNS() bool {
	return cluster.DNS != nil && slices.ContainsFunc(cluster.DNS.Names, func(n DNSName) bool { return !n.Endpoint.Addr.IsValid() })
}

// WithAddresses returns a copy of a DNS cluster whose names are replaced by their addresses: all of them for
// STRICT_DNS, the first for LOGICAL_DNS. Names without an address have no endpoint.
func (cluster *Cluster) WithAddresses(addresses func(host string) []netip.Addr) *Cluster {
	joined := *cluster
	joined.Localities = slices.Clone(cluster.Localities)
	joined.Endpoints = nil
	names := cluster.DNS.Names
	for i := range joined.Localities {
		loc := &joined.Localities[i]
		loc.First = len(joined.Endpoints)
		for ; len(names) > 0 && names[0].Locality == i; names = names[1:] {
			joined.Endpoints = append(joined.Endpoints, names[0].resolve(addresses, cluster.Discovery == LogicalDNS)...)
		}
		loc.N = len(joined.Endpoints) - loc.First
	}
	return &joined
}

func (n *DNSName) resolve(addresses func(host string) []netip.Addr, first bool) []Endpoint {
	if n.Endpoint.Addr.IsValid() {
		return []Endpoint{n.Endpoint}
	}
	var list []Endpoint
	for _, addr := range addresses(n.Host) {
		e := n.Endpoint
		e.Addr = netip.AddrPortFrom(addr, n.Port)
		list = append(list, e)
		if first {
			break
		}
	}
	return list
}
