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
	reasonOtherNode   = "its hints are for other nodes"
	reasonOtherZone   = "its hints are for other zones"
	reasonNoPort      = "its slice has no port of this name and protocol"
)

// candidate is an endpoint at the port that one of its slices gives it.
type candidate struct {
	*Endpoint
	addr  netip.AddrPort
	slice Name
}

// exclusions are the endpoints that take no traffic, each once for a reason.
type exclusions map[exclusion]*Endpoint

type exclusion struct {
	addr   netip.AddrPort
	reason string
}

// add notes an endpoint. Of several observations of one address the same one counts in whatever order they come.
func (x exclusions) add(addr netip.AddrPort, reason string, e *Endpoint) {
	k := exclusion{addr, reason}
	if before := x[k]; before == nil || cmp.Or(cmp.Compare(e.rank(), before.rank()), cmp.Compare(e.Node, before.Node),
		cmp.Compare(e.Zone, before.Zone), cmp.Compare(e.Pod, before.Pod), e.Hints.compare(before.Hints)) > 0 {
		x[k] = e
	}
}

// gather unites a Service's slices for one port and family: deduplicated by address and port, sorted by it. Where
// excluded is not nil, endpoints without the port are noted there.
func gather(eps []*Slice, v4 bool, port Port, excluded exclusions) []candidate {
	var all []candidate
	for _, slice := range eps {
		numbers := numbersOf(slice, port)
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			if e.Addr.Is4() != v4 {
				continue
			}
			if len(numbers) == 0 && excluded != nil {
				excluded.add(netip.AddrPortFrom(e.Addr, 0), reasonNoPort+": "+portLabel(port), e)
			}
			for _, n := range numbers {
				all = append(all, candidate{e, netip.AddrPortFrom(e.Addr, n), slice.Name})
			}
		}
	}
	slices.SortFunc(all, func(a, b candidate) int {
		return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(b.rank(), a.rank()), cmp.Compare(a.slice.Name, b.slice.Name),
			cmp.Compare(a.Node, b.Node), cmp.Compare(a.Zone, b.Zone), cmp.Compare(a.Pod, b.Pod), a.Hints.compare(b.Hints))
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

// use says which sets of endpoints a port needs.
type use struct {
	internalLocal, externalLocal bool
	// outside: it has addresses besides the cluster IP.
	outside bool
}

// cluster and local tell whether a traffic policy of this name is ever in force. Even if both policies are Local,
// clients inside that use an address of the outside reach every endpoint.
func (u use) cluster() bool { return !u.internalLocal || u.outside }
func (u use) local() bool   { return u.internalLocal || u.externalLocal && u.outside }

// sets are the endpoints of one port and family for each sort of client.
type sets struct {
	// internal is for the cluster IP, cluster for clients inside at all other addresses.
	internal, cluster []Backend
	external          *External // nil where there are no other addresses
}

// choose picks who takes new connections. The policies decide apart: Local may fall back to terminating endpoints of
// this node while others are ready elsewhere, but never to other nodes.
func choose(all []candidate, u use, namespace string, node *Node, excluded exclusions) sets {
	verdicts := make([]verdict, len(all))
	var s sets
	var local []Backend
	if u.local() {
		local = pick(all, policy{node: node, local: true}, namespace, verdicts)
	}
	if u.cluster() {
		s.cluster = pick(all, policy{node: node, prefer: prefer(all, node)}, namespace, verdicts)
	}
	for i, v := range verdicts {
		if !v.used {
			excluded.add(all[i].addr, v.reason, all[i].Endpoint)
		}
	}
	s.internal = s.cluster
	if u.internalLocal {
		s.internal = local
	}
	if u.outside {
		s.external = &External{Backends: s.cluster, Local: u.externalLocal}
		if u.externalLocal {
			s.external.Backends = local
			s.external.Silent = len(local) == 0 && slices.ContainsFunc(all, usable)
		}
	}
	return s
}

// verdict is whether any policy uses an endpoint, and why the last one that doesn't, doesn't.
type verdict struct {
	used   bool
	reason string
}

// policy is a traffic policy on a node.
type policy struct {
	node *Node
	// local: only endpoints of this node; preference: which hints count among ready ones.
	local    bool
	prefer   preference
	anyReady bool
}

// pick gives the endpoints that a policy uses: the ready ones within its reach; if there is none, those that are
// terminating but still serve.
func pick(all []candidate, p policy, namespace string, verdicts []verdict) []Backend {
	p.anyReady = slices.ContainsFunc(all, func(c candidate) bool { return c.Ready && (!p.local || c.local(p.node)) })
	backends := make([]Backend, 0, len(all))
	for i, c := range all {
		if reason := p.excludes(c); reason != "" {
			verdicts[i].reason = reason
			continue
		}
		verdicts[i].used = true
		backends = append(backends, c.backend(namespace, p.node))
	}
	return slices.Clip(backends)
}

// excludes says why a candidate takes no traffic; "": it takes it. Hints don't count among terminating endpoints.
func (p *policy) excludes(c candidate) string {
	switch {
	case p.local && !c.local(p.node):
		return reasonNotLocal
	case p.anyReady && c.Ready:
		return p.prefer.excludes(c, p.node)
	case p.anyReady && c.Terminating && c.Serving:
		return reasonTerminating
	case c.Terminating && c.Serving:
		return ""
	case c.Terminating:
		return reasonNotServing
	}
	return reasonNotReady
}

// usable tells whether an endpoint takes traffic from some node.
func usable(c candidate) bool { return c.Ready || c.Serving && c.Terminating }

// preference is which hints count.
type preference uint8

// Preferences.
const (
	anywhere preference = iota
	sameNode
	sameZone
)

// prefer works out which hints count: the node's, if every ready endpoint has hints for nodes and one is for this
// node; else the zone's by the same rule; else none. A ready endpoint without hints means that the controller has not
// finished its plan.
func prefer(all []candidate, node *Node) preference {
	forNodes, forZones, here, near := true, true, false, false
	for _, c := range all {
		if !c.Ready {
			continue
		}
		h := c.Hints.get()
		forNodes, forZones = forNodes && h.nodes != "", forZones && h.zones != ""
		if !forNodes && !forZones {
			return anywhere
		}
		here, near = here || contains(h.nodes, node.Name), near || contains(h.zones, node.Zone)
	}
	switch {
	case forNodes && here:
		return sameNode
	case forZones && near:
		return sameZone
	}
	return anywhere
}

func (p preference) excludes(c candidate, node *Node) string {
	switch {
	case p == sameNode && !contains(c.Hints.get().nodes, node.Name):
		return reasonOtherNode
	case p == sameZone && !contains(c.Hints.get().zones, node.Zone):
		return reasonOtherZone
	}
	return ""
}

func (c candidate) local(node *Node) bool { return node.Name != "" && c.Node == node.Name }

func (c candidate) backend(namespace string, node *Node) Backend {
	b := Backend{Addr: c.addr, Node: c.Node, Zone: c.Zone, Local: c.local(node), Terminating: !c.Ready}
	if c.Pod != "" {
		b.Pod = namespace + "/" + c.Pod
	}
	return b
}
