package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// bridge is the node's end of the pod network.
const bridge = "br0"

// buildNode gives the node its loopback and its bridge. It forwards, so that an address that is nobody's gets an
// ICMP error at once instead of silence, however many ask; as it has no other link, nothing leaves it.
func (l *Lab) buildNode() error {
	if err := l.Node.sysctl(map[string]string{
		"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1",
		"net/ipv4/icmp_ratelimit": "0", "net/ipv6/icmp/ratelimit": "0",
	}); err != nil {
		return err
	}
	h, err := l.Node.netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	if err := linkUp(h, "lo"); err != nil {
		return err
	}
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}); err != nil {
		return fmt.Errorf("make the bridge: %w", err)
	}
	for _, subnet := range l.cfg.Subnets {
		if err := addAddress(h, bridge, netip.PrefixFrom(gateway(subnet), subnet.Bits())); err != nil {
			return err
		}
	}
	return linkUp(h, bridge)
}

// connect gives a pod its loopback and an eth0 on the node's bridge.
func (l *Lab) connect(p *Pod) error {
	if err := p.sysctl(nil); err != nil {
		return err
	}
	node, err := l.Node.netlink()
	if err != nil {
		return err
	}
	defer node.Close()
	pod, err := p.netlink()
	if err != nil {
		return err
	}
	defer pod.Close()

	if err := linkUp(pod, "lo"); err != nil {
		return err
	}
	br, err := node.LinkByName(bridge)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.links++
	port := fmt.Sprintf("veth%d", l.links)
	l.mu.Unlock()
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: port, MasterIndex: br.Attrs().Index},
		PeerName:  "eth0", PeerNamespace: netlink.NsFd(p.netns.Fd()),
	}
	if err := node.LinkAdd(veth); err != nil {
		return fmt.Errorf("make the veth pair of %s: %w", p.Place.Name, err)
	}
	if err := linkUp(node, port); err != nil {
		return err
	}
	if err := linkUp(pod, "eth0"); err != nil {
		return err
	}
	for _, addr := range p.Addrs {
		subnet, err := l.subnetOf(addr)
		if err != nil {
			return err
		}
		if err := addAddress(pod, "eth0", netip.PrefixFrom(addr, subnet.Bits())); err != nil {
			return err
		}
		if err := addDefaultRoute(pod, gateway(subnet)); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) subnetOf(addr netip.Addr) (netip.Prefix, error) {
	for _, s := range l.cfg.Subnets {
		if s.Contains(addr) {
			return s, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("%s is in none of the lab's subnets %v", addr, l.cfg.Subnets)
}

// gateway is the node's own address in a subnet, its first.
func gateway(subnet netip.Prefix) netip.Addr { return subnet.Masked().Addr().Next() }

func (p *Place) netlink() (*netlink.Handle, error) {
	h, err := netlink.NewHandleAt(netns.NsHandle(p.netns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink in %s: %w", p.Name, err)
	}
	return h, nil
}

// sysctl sets the namespace's own kernel parameters. Duplicate address detection is off everywhere: it would make
// every IPv6 address unusable for its first second.
func (p *Place) sysctl(values map[string]string) error {
	all := map[string]string{"net/ipv6/conf/all/accept_dad": "0", "net/ipv6/conf/default/accept_dad": "0"}
	for k, v := range values {
		all[k] = v
	}
	return p.Do(func() error {
		for name, value := range all {
			if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil {
				return fmt.Errorf("set %s in %s: %w", name, p.Name, err)
			}
		}
		return nil
	})
}

func linkUp(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err == nil {
		err = h.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	return nil
}

func addAddress(h *netlink.Handle, name string, addr netip.Prefix) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: ipNet(addr)}
	if addr.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrAdd(link, a); err != nil {
		return fmt.Errorf("give %s the address %s: %w", name, addr, err)
	}
	return nil
}

func addDefaultRoute(h *netlink.Handle, via netip.Addr) error {
	any := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if via.Is6() {
		any = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	err := h.RouteAdd(&netlink.Route{Dst: ipNet(any), Gw: via.AsSlice()})
	if err != nil && !errors.Is(err, unix.EEXIST) { // a second address of the family
		return fmt.Errorf("default route via %s: %w", via, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
