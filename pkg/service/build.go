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
func Build(o *Object, eps []*Slice, node Node) *Service {
	if o == nil || !o.ours() {
		return nil
	}
	b := builder{o: o, node: &node, out: &Service{Name: o.Name, UID: o.UID, Problems: o.Problems}, excluded: map[Excluded]bool{}}
	for _, ip := range o.ClusterIPs {
		v4 := ip.Is4()
		if _, twice := b.families[family(v4)]; !twice {
			b.addFamily(eps, v4)
		}
	}
	b.clusterIPs()
	b.outside()
	b.nodePorts()
	b.loadBalancerIPs()
	b.externalIPs()
	b.healthCheck(eps)
	for e := range b.excluded {
		b.out.Excluded = append(b.out.Excluded, e)
	}
	slices.SortFunc(b.out.Excluded, func(a, b Excluded) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Reason, b.Reason))
	})
	return b.out
}

// builder makes one Service.
type builder struct {
	o    *Object
	node *Node
	out  *Service
	// families holds for each family of cluster IPs the endpoints of each of o.Ports.
	families map[family][]sets
	excluded map[Excluded]bool
	// taken are addresses that have a frontend already; only needed where there are kinds besides cluster IPs.
	taken map[key]bool
}

// family is true for IPv4.
type family bool

// key is what no two frontends share.
type key struct {
	addr     netip.AddrPort
	protocol Protocol
}

// addFamily decides on the endpoints of one family, for each port.
func (b *builder) addFamily(eps []*Slice, v4 bool) {
	if b.families == nil {
		b.families = make(map[family][]sets, 2)
	}
	all := make([]sets, len(b.o.Ports))
	for i, port := range b.o.Ports {
		candidates := gather(eps, v4, port, b.excluded)
		all[i] = choose(candidates, b.use(v4, port), b.o.Name.Namespace, b.node, b.excluded)
	}
	b.families[family(v4)] = all
}

// use says which sets of endpoints a port needs.
func (b *builder) use(v4 bool, port Port) use {
	ofFamily := func(ip netip.Addr) bool { return ip.Is4() == v4 }
	outside := port.NodePort != 0 || slices.ContainsFunc(b.o.LoadBalancerIPs, ofFamily) || slices.ContainsFunc(b.o.ExternalIPs, ofFamily)
	return use{internalLocal: b.o.InternalLocal, externalLocal: b.o.ExternalLocal, outside: outside}
}

// outside notes what is only half served.
func (b *builder) outside() {
	const detail = "not served yet to clients outside the cluster"
	if b.node.Outside {
		return
	}
	if b.o.hasNodePort() {
		b.problem("spec.ports[*].nodePort", detail)
	}
	if len(b.o.LoadBalancerIPs) > 0 {
		b.problem("status.loadBalancer.ingress", detail)
	}
	if len(b.o.ExternalIPs) > 0 {
		b.problem("spec.externalIPs", detail)
	}
}

func (b *builder) clusterIPs() {
	for _, ip := range b.o.ClusterIPs {
		for i, port := range b.o.Ports {
			b.out.Frontends = append(b.out.Frontends, b.frontend(ClusterIP, ip, port.Port, i))
		}
	}
}

func (b *builder) nodePorts() {
	for _, ip := range b.node.NodePorts {
		if b.families[family(ip.Is4())] == nil {
			continue
		}
		for i, port := range b.o.Ports {
			switch {
			case port.NodePort == 0:
			case ip.IsLoopback():
				b.out.Loopback = append(b.out.Loopback, b.frontend(NodePort, ip, port.NodePort, i))
			default:
				b.add(NodePort, ip, port.NodePort, i, nil)
			}
		}
	}
}

func (b *builder) loadBalancerIPs() {
	for _, ip := range b.o.LoadBalancerIPs {
		if !b.has(ip, "status.loadBalancer.ingress") {
			continue
		}
		sources := b.sources(ip.Is4())
		for i, port := range b.o.Ports {
			b.add(LoadBalancer, ip, port.Port, i, sources)
		}
	}
}

func (b *builder) externalIPs() {
	for _, ip := range b.o.ExternalIPs {
		if !b.has(ip, "spec.externalIPs") {
			continue
		}
		if why := b.node.refuses(ip); why != "" {
			b.problem("spec.externalIPs", ip.String()+" "+why)
			continue
		}
		for i, port := range b.o.Ports {
			b.add(ExternalIP, ip, port.Port, i, nil)
		}
	}
}

// has tells whether the Service has the address's family, and notes where not.
func (b *builder) has(ip netip.Addr, field string) bool {
	if b.families[family(ip.Is4())] != nil {
		return true
	}
	b.problem(field, ip.String()+" is not served: the Service has no cluster IP of this family")
	return false
}

// problem notes what is not honoured; the object's own list is shared and stays as it is.
func (b *builder) problem(field, detail string) {
	p := Problem{Field: field, Detail: detail, Minor: true}
	if !slices.Contains(b.out.Problems, p) {
		b.out.Problems = append(slices.Clip(b.out.Problems), p)
	}
}

// sources are the ranges of one family that may use load-balancer addresses; nil: all may. As with kube-proxy, that is
// also so where all ranges are of the other family.
func (b *builder) sources(v4 bool) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range b.o.SourceRanges {
		if p.Addr().Is4() != v4 {
			continue
		}
		if p.Bits() == 0 {
			return nil
		}
		out = append(out, p)
	}
	if len(out) == 0 && len(b.o.SourceRanges) > 0 {
		b.problem("spec.loadBalancerSourceRanges", fmt.Sprintf("no range is of family %s: its load-balancer addresses are open to all", familyName(v4)))
	}
	return out
}

func familyName(v4 bool) string {
	if v4 {
		return "IPv4"
	}
	return "IPv6"
}

// add adds a frontend unless the Service has one at the address: kinds come in the order of their rank.
func (b *builder) add(kind Kind, ip netip.Addr, number uint16, port int, sources []netip.Prefix) {
	if b.taken == nil {
		b.taken = make(map[key]bool, 2*len(b.out.Frontends))
		for _, f := range b.out.Frontends {
			b.taken[key{f.Addr, f.Protocol}] = true
		}
	}
	f := b.frontend(kind, ip, number, port)
	k := key{f.Addr, f.Protocol}
	if b.taken[k] {
		return
	}
	b.taken[k] = true
	if len(sources) > 0 {
		restricted := *f.External
		restricted.Sources = sources
		f.External = &restricted
	}
	b.out.Frontends = append(b.out.Frontends, f)
}

func (b *builder) frontend(kind Kind, ip netip.Addr, number uint16, port int) Frontend {
	p, s := &b.o.Ports[port], &b.families[family(ip.Is4())][port]
	f := Frontend{
		Addr:     netip.AddrPortFrom(ip, number),
		Protocol: p.Protocol,
		Kind:     kind,
		PortName: p.Name,
		Affinity: b.o.Affinity,
		Backends: s.internal,
	}
	if kind != ClusterIP {
		f.Backends, f.External = s.cluster, s.external
	}
	return f
}

// healthCheck counts the ready endpoints on this node, over all ports of the slices, whether or not the Service has
// them: the check is of the Service and not of a port.
func (b *builder) healthCheck(eps []*Slice) {
	if b.o.HealthCheckNodePort == 0 {
		return
	}
	h := &HealthCheck{Port: b.o.HealthCheckNodePort}
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
