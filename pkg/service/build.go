package service

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// Build gives a Service's meaning on a node; nil: there is none (headless, ExternalName, another proxy's).
//
// UDP ports become frontends like TCP ports: whoever cannot translate UDP skips frontends by Frontend.Protocol.
// The result does not depend on the order of slices. Frontends stand in the order of kinds, addresses and ports,
// backends in that of their addresses; frontends of one port share their backends' slices.
//
// An address of the outside counts only if the Service has a cluster IP of its family: the cluster IPs say which
// families a Service has endpoints of.
func Build(o *Object, eps []*Slice, node Node) *Service { return build(o, eps, &node, nil) }

// build is Build among other Services; owner names the one that has an address, where that is another one.
func build(o *Object, eps []*Slice, node *Node, owner func(key) (Name, bool)) *Service {
	if o == nil || !o.ours() {
		return nil
	}
	b := builder{
		o: o, node: node, owner: owner, excluded: exclusions{}, families: make(map[family][]sets, 2),
		out: &Service{
			Name: o.Name, UID: o.UID, Problems: o.Problems, Frontends: make([]Frontend, 0, len(o.ClusterIPs)*len(o.Ports)),
			InternalLocal: o.InternalLocal, ExternalLocal: o.ExternalLocal,
		},
	}
	for _, ip := range o.ClusterIPs {
		if v4 := family(ip.Is4()); b.families[v4] == nil {
			b.addFamily(eps, v4)
		}
	}
	for f := range o.addresses(node) {
		b.add(f)
	}
	b.remarks()
	b.strangers(eps)
	b.healthCheck(eps)
	for e, endpoint := range b.excluded {
		b.out.Excluded = append(b.out.Excluded, Excluded{e.addr, e.reason, endpoint})
	}
	slices.SortFunc(b.out.Excluded, func(a, b Excluded) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Reason, b.Reason))
	})
	return b.out
}

// builder makes one Service.
type builder struct {
	o     *Object
	node  *Node
	out   *Service
	owner func(key) (Name, bool)
	// families holds for each family of cluster IPs the endpoints of each of o.Ports.
	families map[family][]sets
	excluded exclusions
	// restricted are the External values with source ranges, by the ones without.
	restricted map[*External]*External
}

// family is true for IPv4.
type family bool

// String is the API's name.
func (f family) String() string {
	if f {
		return "IPv4"
	}
	return "IPv6"
}

// addFamily decides on the endpoints of one family, for each port.
func (b *builder) addFamily(eps []*Slice, v4 family) {
	all := make([]sets, len(b.o.Ports))
	for i, port := range b.o.Ports {
		candidates := gather(eps, bool(v4), port, b.excluded)
		all[i] = choose(candidates, b.use(v4, port), b.o.Name.Namespace, b.node, b.excluded)
	}
	b.families[v4] = all
}

// use says which sets of endpoints a port needs.
func (b *builder) use(v4 family, port Port) use {
	ofFamily := func(ip netip.Addr) bool { return ip.Is4() == bool(v4) }
	outside := port.NodePort != 0 || slices.ContainsFunc(b.o.LoadBalancerIPs, ofFamily) || slices.ContainsFunc(b.o.ExternalIPs, ofFamily)
	return use{internalLocal: b.o.InternalLocal, externalLocal: b.o.ExternalLocal, outside: outside}
}

// add adds a frontend, unless the address is another Service's.
func (b *builder) add(f front) {
	if b.owner != nil {
		if other, taken := b.owner(f.key); taken {
			b.problem(Problem{
				Field: fieldOf[f.kind], Detail: fmt.Sprintf("%s/%s is not served: it is an address of Service %s", f.addr, f.protocol, other),
				Reason: "AddressConflict", Cure: "give one of the two another address or port",
			})
			return
		}
	}
	port, s := &b.o.Ports[f.port], &b.families[family(f.addr.Addr().Is4())][f.port]
	out := Frontend{
		Addr:     f.addr,
		Protocol: f.protocol,
		Kind:     f.kind,
		PortName: port.Name,
		Affinity: b.o.Affinity,
		Backends: s.internal,
	}
	if f.kind != ClusterIP {
		out.Backends, out.External = s.cluster, s.external
	}
	if f.kind == LoadBalancer {
		out.External = b.restrict(s.external, b.sources(family(f.addr.Addr().Is4())))
	}
	if f.addr.Addr().IsLoopback() {
		b.out.Loopback = append(b.out.Loopback, out)
	} else {
		b.out.Frontends = append(b.out.Frontends, out)
	}
}

// restrict adds source ranges, by a copy that the load balancer's addresses share.
func (b *builder) restrict(x *External, sources []netip.Prefix) *External {
	if len(sources) == 0 {
		return x
	}
	if b.restricted[x] == nil {
		if b.restricted == nil {
			b.restricted = map[*External]*External{}
		}
		copied := *x
		copied.Sources = sources
		b.restricted[x] = &copied
	}
	return b.restricted[x]
}

// sources are the ranges of one family that may use load-balancer addresses; nil: all may. As with kube-proxy, that is
// also so where all ranges are of the other family.
func (b *builder) sources(v4 family) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range b.o.SourceRanges {
		if p.Addr().Is4() != bool(v4) {
			continue
		}
		if p.Bits() == 0 {
			return nil
		}
		out = append(out, p)
	}
	if len(out) == 0 && len(b.o.SourceRanges) > 0 {
		b.minor("spec.loadBalancerSourceRanges", fmt.Sprintf("no range is of family %s: its load-balancer addresses are open to all", v4))
	}
	return out
}

// fieldOf is where an object says its addresses of a kind.
var fieldOf = map[Kind]string{
	ClusterIP: "spec.clusterIPs", NodePort: "spec.ports[*].nodePort", LoadBalancer: "status.loadBalancer.ingress", ExternalIP: "spec.externalIPs",
}

// remarks notes what of the outside's addresses is not or only half served.
func (b *builder) remarks() {
	for kind, ips := range map[Kind][]netip.Addr{LoadBalancer: b.o.LoadBalancerIPs, ExternalIP: b.o.ExternalIPs} {
		for _, ip := range ips {
			if b.families[family(ip.Is4())] == nil {
				b.minor(fieldOf[kind], ip.String()+" is not served: the Service has no cluster IP of this family")
			} else if why := b.node.refuses(ip); kind == ExternalIP && why != "" {
				b.minor(fieldOf[kind], ip.String()+" "+why)
			}
		}
		if len(ips) > 0 && !b.node.Outside {
			b.minor(fieldOf[kind], notOutside)
		}
	}
	if b.o.hasNodePort() && !b.node.Outside {
		b.minor(fieldOf[NodePort], notOutside)
	}
	own := b.out.Problems[len(b.o.Problems):]
	slices.SortFunc(own, func(a, b Problem) int { return cmp.Or(cmp.Compare(a.Field, b.Field), cmp.Compare(a.Detail, b.Detail)) })
}

// strangers notes endpoints that no address of the Service can be sent to, where there are no others.
func (b *builder) strangers(eps []*Slice) {
	for _, slice := range eps {
		for i := range slice.Endpoints {
			if b.families[family(slice.Endpoints[i].Addr.Is4())] != nil {
				return
			}
		}
	}
	for _, slice := range eps {
		if len(slice.Endpoints) == 0 {
			continue
		}
		f := family(slice.Endpoints[0].Addr.Is4())
		b.problem(Problem{
			Field: "spec.ipFamilies", Detail: fmt.Sprintf("all endpoints are %s, and the Service has no %s cluster IP: connections are refused", f, f),
			Reason: "EndpointFamily", Cure: fmt.Sprintf("add %s to spec.ipFamilies, or give the Service endpoints of its own family", f),
		})
		return
	}
}

const notOutside = "not served yet to clients outside the cluster"

// minor notes what is worth listing and not worth an Event.
func (b *builder) minor(field, detail string) {
	b.problem(Problem{Field: field, Detail: detail, Minor: true})
}

// problem notes what is not honoured; the object's own list is shared and stays as it is.
func (b *builder) problem(p Problem) {
	if !slices.Contains(b.out.Problems, p) {
		b.out.Problems = append(slices.Clip(b.out.Problems), p)
	}
}

// healthCheck counts the ready endpoints on this node, over all ports of the slices, whether or not the Service has
// them: the check is of the Service and not of a port.
func (b *builder) healthCheck(eps []*Slice) {
	if b.o.HealthCheckNodePort == 0 {
		return
	}
	h := &HealthCheck{Port: b.o.HealthCheckNodePort, Addresses: b.node.NodePorts}
	ready := map[netip.Addr]bool{}
	seen := map[Port]bool{}
	for _, slice := range eps {
		for _, p := range slice.Ports {
			port := Port{Name: p.Name, Protocol: p.Protocol}
			if seen[port] {
				continue
			}
			seen[port] = true
			for v4 := range b.families {
				for _, c := range gather(eps, bool(v4), port, nil) {
					if c.Ready && c.local(b.node) {
						ready[c.Addr] = true
					}
				}
			}
		}
	}
	for ip := range ready {
		if ip.Is4() {
			h.LocalReady4++
		} else {
			h.LocalReady6++
		}
	}
	b.out.HealthCheck = h
}
