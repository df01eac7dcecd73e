package mesh

import (
	"net/netip"
	"slices"
)

// claimIndex finds the listener of an original destination. Exact addresses, then the port on every address,
// then the catch-all, each for its own address family.
type claimIndex struct {
	listeners map[netip.AddrPort]*Listener // keys as in Claim.Addr
	list      []Claim
}

// Outbound returns the listener that handles an enrolled pod's connection to dst: the one that claims exactly
// this address, else the one that claims its port on every address of the family, else the use_original_dst
// catch-all; nil if there is none. A catch-all that only passes through is found here although the datapath has
// no claim for it.
func (s *Snapshot) Outbound(dst netip.AddrPort) *Listener {
	addr := dst.Addr().Unmap().WithZone("")
	if l := s.claims.listeners[netip.AddrPortFrom(addr, dst.Port())]; l != nil {
		return l
	}
	any := netip.IPv6Unspecified()
	if addr.Is4() {
		any = netip.IPv4Unspecified()
	}
	if l := s.claims.listeners[netip.AddrPortFrom(any, dst.Port())]; l != nil {
		return l
	}
	return s.claims.listeners[netip.AddrPortFrom(any, 0)]
}

// Claims lists what the datapath has to do with connections of enrolled pods, ordered by address. There is
// none for a catch-all that only passes through: those connections stay in the kernel.
func (s *Snapshot) Claims() []Claim { return s.claims.list }

// buildClaims indexes the listeners, which are ordered by name: where two claim one address the first stays.
func buildClaims(listeners []*Listener, clusters map[string]*Cluster) claimIndex {
	index := claimIndex{listeners: map[netip.AddrPort]*Listener{}}
	for _, l := range listeners {
		if l.BindToPort || l.Direction == DirectionInbound {
			continue
		}
		addrs := l.claimedAddrs()
		silent := l.UseOriginalDst && l.onlyPassesThrough(clusters)
		var offload *Offload
		reason := l.OffloadReason
		if reason == "" {
			offload, reason = compileOffload(l, clusters)
		}
		for _, addr := range addrs {
			if index.listeners[addr] != nil {
				continue
			}
			index.listeners[addr] = l
			if !silent {
				index.list = append(index.list, Claim{Addr: addr, Listener: l.Name, Offload: offload, Reason: reason})
			}
		}
	}
	slices.SortFunc(index.list, func(a, b Claim) int { return a.Addr.Compare(b.Addr) })
	return index
}

// claimedAddrs are the addresses in the form of Claim.Addr. The catch-all's own address is only where Envoy
// would listen; what it claims is the whole family.
func (l *Listener) claimedAddrs() []netip.AddrPort {
	addrs := make([]netip.AddrPort, 0, len(l.Addresses))
	for _, a := range l.Addresses {
		if l.UseOriginalDst {
			any := netip.IPv6Unspecified()
			if a.Addr().Is4() {
				any = netip.IPv4Unspecified()
			}
			a = netip.AddrPortFrom(any, 0)
		}
		if !slices.Contains(addrs, a) {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// onlyPassesThrough says that every connection which the listener could take goes on to where it was going
// anyway. A chain for the listener's own port is not counted: it is the loop guard that Istio sends, and nobody
// connects to that port through us. An access log is a reason to look at the connection.
func (l *Listener) onlyPassesThrough(clusters map[string]*Cluster) bool {
	if len(l.AccessLog) > 0 {
		return false
	}
	passes := func(c *FilterChain) bool {
		if c.TCP == nil || len(c.TCP.Clusters) != 1 || len(c.TCP.AccessLog) > 0 {
			return false
		}
		cluster := clusters[c.TCP.Clusters[0].Name]
		return cluster != nil && cluster.Discovery == OriginalDst
	}
	found := false
	for _, c := range l.Chains {
		if l.isOwnPort(c.Match.DstPort) {
			continue
		}
		if !passes(c) {
			return false
		}
		found = true
	}
	if l.Default != nil {
		return passes(l.Default)
	}
	return found
}

func (l *Listener) isOwnPort(port uint16) bool {
	return port != 0 && slices.ContainsFunc(l.Addresses, func(a netip.AddrPort) bool { return a.Port() == port })
}
