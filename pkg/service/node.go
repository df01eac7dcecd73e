package service

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Node is the node that decisions are made for, and what is set for it.
type Node struct {
	Name string
	Zone string
	// NodePorts are the addresses on which node ports are served: what NodePortAddresses chooses. Loopback addresses
	// among them are served to the host's own network namespace.
	NodePorts []netip.Addr
	// Addresses are all addresses that the node has, for ExternalIPsOwn.
	Addresses []netip.Addr
	// ExternalIPs says which of spec.externalIPs are honoured.
	ExternalIPs ExternalIPPolicy
	// Outside: clients outside are served. Without it, Services that are meant for them get a note.
	Outside bool
}

// ExternalIPPolicy says which of a Service's externalIPs are honoured. Whoever may write Services can name any address
// there and so take connections that go to it (CVE-2020-8554).
type ExternalIPPolicy uint8

// Policies of --external-ips.
const (
	// ExternalIPsAll honours all, as kube-proxy does. An address and port that a cluster IP, a node port or a load
	// balancer has is not taken from it in any case.
	ExternalIPsAll ExternalIPPolicy = iota
	// ExternalIPsOwn honours those that this node has on a device, so that connections to anywhere else can't be taken.
	ExternalIPsOwn
	// ExternalIPsNone honours none.
	ExternalIPsNone
)

// ParseExternalIPPolicy reads the value of --external-ips.
func ParseExternalIPPolicy(s string) (ExternalIPPolicy, error) {
	switch s {
	case "", "all":
		return ExternalIPsAll, nil
	case "own":
		return ExternalIPsOwn, nil
	case "none":
		return ExternalIPsNone, nil
	}
	return 0, fmt.Errorf("--external-ips: %q is none of all, own and none", s)
}

// refuses says why an external IP is not honoured; "": it is.
func (n *Node) refuses(ip netip.Addr) string {
	switch {
	case n.ExternalIPs == ExternalIPsNone:
		return "is not honoured: --external-ips is none"
	case n.ExternalIPs == ExternalIPsOwn && !slices.Contains(n.Addresses, ip):
		return "is not honoured on this node, which doesn't have it: --external-ips is own"
	}
	return ""
}

// NodePortAddresses says on which of a node's addresses node ports are served. The zero value is "primary".
type NodePortAddresses struct {
	// ranges hold the addresses; empty: the primary ones.
	ranges []netip.Prefix
	// loopback adds loopback addresses, which no range but one that is within loopback itself includes.
	loopback bool
}

// ParseNodePortAddresses reads the value of --nodeport-addresses: "primary" (the node's own, by the Node object), "all",
// or ranges such as 192.168.0.0/16,fd00::/8, separated by commas. With "loopback" as one more word, or with a range
// within it, node ports are served on loopback to the host as well. As with kube-proxy, a family of which no range is
// given is served on all its addresses.
func ParseNodePortAddresses(s string) (NodePortAddresses, error) {
	var out NodePortAddresses
	primary := false
	for word := range strings.SplitSeq(s, ",") {
		switch word = strings.TrimSpace(word); word {
		case "", "primary":
			primary = primary || word != ""
		case "loopback":
			out.loopback = true
		case "all":
			out.ranges = append(out.ranges, netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0"))
		default:
			p, err := netip.ParsePrefix(word)
			if err != nil {
				return NodePortAddresses{}, fmt.Errorf("--nodeport-addresses: %q is none of primary, all, loopback and a range such as 192.168.0.0/16", word)
			}
			out.ranges = append(out.ranges, p.Masked())
		}
	}
	if primary && len(out.ranges) > 0 {
		return NodePortAddresses{}, fmt.Errorf("--nodeport-addresses: %q: primary can't stand beside ranges", s)
	}
	for _, all := range []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")} {
		family := func(p netip.Prefix) bool { return p.Addr().Is4() == all.Addr().Is4() }
		if len(out.ranges) > 0 && !slices.ContainsFunc(out.ranges, family) {
			out.ranges = append(out.ranges, all)
		}
	}
	return out, nil
}

// Choose picks among the node's addresses: primary are those of the Node object in its order, devices those that its
// network devices have. The result is sorted and has no address twice.
func (a NodePortAddresses) Choose(primary, devices []netip.Addr) []netip.Addr {
	var out []netip.Addr
	if len(a.ranges) == 0 {
		for _, v4 := range []bool{true, false} {
			if i := slices.IndexFunc(primary, func(ip netip.Addr) bool { return ip.Is4() == v4 }); i >= 0 {
				out = append(out, primary[i])
			}
		}
	}
	for _, ip := range slices.Concat(primary, devices) {
		if a.includes(ip) {
			out = append(out, ip)
		}
	}
	if a.loopback {
		out = append(out, netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback())
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// includes tells whether a range has the address. Link-local addresses mean nothing without their device.
func (a NodePortAddresses) includes(ip netip.Addr) bool {
	if ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() {
		return false
	}
	return slices.ContainsFunc(a.ranges, func(p netip.Prefix) bool {
		return p.Contains(ip) && (!ip.IsLoopback() || p.Addr().IsLoopback())
	})
}
