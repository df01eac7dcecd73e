package service

import (
	"cmp"
	"net/netip"
	"slices"
)

// Why an endpoint takes no traffic.
const (
	reasonNotReady    = "not ready"
	reasonTerminating = "terminating, and there are ready ones"
	reasonNotServing  = "terminating and no longer serving"
	reasonNotLocal    = "on another node, and internalTrafficPolicy is Local"
	reasonNoPort      = "its slice has no port of this name and protocol"
)

// Build gives a Service's meaning on a node; nil: there is none (headless, ExternalName, another proxy's).
//
// UDP ports become frontends like TCP ports: whoever cannot translate UDP skips frontends by Frontend.Protocol.
// The result does not depend on the order of slices. Frontends stand in the order of cluster IPs and ports,
// backends in that of their addresses.
func Build(o *Object, eps []*Slice, node Node) *Service {
	if o == nil || !o.ours() {
		return nil
	}
	svc := &Service{Name: o.Name, UID: o.UID, Problems: o.Problems}
	excluded := map[Excluded]bool{}
	for _, ip := range o.ClusterIPs {
		for _, port := range o.Ports {
			candidates := gather(eps, ip.Is4(), port, excluded)
			svc.Frontends = append(svc.Frontends, Frontend{
				Addr:     netip.AddrPortFrom(ip, port.Port),
				Protocol: port.Protocol,
				Kind:     ClusterIP,
				PortName: port.Name,
				Affinity: o.Affinity,
				Backends: choose(candidates, o, node, excluded),
			})
		}
	}
	for e := range excluded {
		svc.Excluded = append(svc.Excluded, e)
	}
	slices.SortFunc(svc.Excluded, func(a, b Excluded) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Reason, b.Reason))
	})
	return svc
}

// candidate is an endpoint at the port that one of its slices gives it.
type candidate struct {
	*Endpoint
	addr  netip.AddrPort
	slice Name
}

// gather unites a Service's slices for one port and family: deduplicated by address and port, sorted by it.
func gather(eps []*Slice, v4 bool, port Port, excluded map[Excluded]bool) []candidate {
	var all []candidate
	for _, slice := range eps {
		numbers := numbersOf(slice, port)
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			if e.Addr.Is4() != v4 {
				continue
			}
			if len(numbers) == 0 {
				excluded[Excluded{Addr: netip.AddrPortFrom(e.Addr, 0), Reason: reasonNoPort + ": " + portLabel(port)}] = true
			}
			for _, n := range numbers {
				all = append(all, candidate{e, netip.AddrPortFrom(e.Addr, n), slice.Name})
			}
		}
	}
	slices.SortFunc(all, func(a, b candidate) int {
		return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(b.rank(), a.rank()), cmp.Compare(a.slice.Name, b.slice.Name),
			cmp.Compare(a.Node, b.Node), cmp.Compare(a.Zone, b.Zone), cmp.Compare(a.Pod, b.Pod))
	})
	return slices.CompactFunc(all, func(a, b candidate) bool { return a.addr == b.addr })
}

// numbersOf are the port numbers that a slice gives to a Service's port, by name and protocol.
func numbersOf(slice *Slice, port Port) []uint16 {
	var numbers []uint16
	for _, p := range slice.Ports {
		if p.Name == port.Name && p.Protocol == port.Protocol {
			numbers = append(numbers, p.Port)
		}
	}
	return numbers
}

func portLabel(p Port) string {
	if p.Name == "" {
		return "(unnamed) " + p.Protocol.String()
	}
	return p.Name + " " + p.Protocol.String()
}

// choose picks who takes new connections: the ready ones within the traffic policy's reach; if there is none, those
// that are terminating but still serve. A policy of Local never falls back to other nodes.
func choose(all []candidate, o *Object, node Node, excluded map[Excluded]bool) []Backend {
	reachable := func(c candidate) bool { return !o.InternalLocal || c.local(node) }
	anyReady := slices.ContainsFunc(all, func(c candidate) bool { return c.Ready && reachable(c) })
	var backends []Backend
	for _, c := range all {
		if reason := c.excludedBy(reachable(c), anyReady); reason != "" {
			excluded[Excluded{Addr: c.addr, Reason: reason}] = true
			continue
		}
		backends = append(backends, c.backend(o.Name.Namespace, node))
	}
	return backends
}

// excludedBy says why a candidate takes no traffic; "": it takes it.
func (c candidate) excludedBy(reachable, anyReady bool) string {
	switch {
	case !reachable:
		return reasonNotLocal
	case anyReady && c.Ready:
		return ""
	case anyReady && c.Terminating && c.Serving:
		return reasonTerminating
	case c.Terminating && c.Serving:
		return ""
	case c.Terminating:
		return reasonNotServing
	}
	return reasonNotReady
}

func (c candidate) local(node Node) bool { return node.Name != "" && c.Node == node.Name }

func (c candidate) backend(namespace string, node Node) Backend {
	b := Backend{Addr: c.addr, Node: c.Node, Zone: c.Zone, Local: c.local(node), Terminating: !c.Ready}
	if c.Pod != "" {
		b.Pod = namespace + "/" + c.Pod
	}
	return b
}
