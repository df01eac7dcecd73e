package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// Clients outside, on real sockets: a client in a namespace of its own, a router between it and the node, pods behind the
// node's bridge. Nothing but the programs translates: no packet filter has a rule.

// outer is a world with clients outside.
type outer struct {
	*world
	client, router *ns
}

// Addresses outside; the documentation's ranges.
var (
	node4, node6 = netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:1::1")
	lb4, lb6     = netip.MustParseAddr("192.0.2.80"), netip.MustParseAddr("2001:db8:80::80")
)

func newOuter(t testing.TB) *outer {
	o := &outer{world: newWorld(t), client: newNS(t), router: newNS(t)}
	joinCgroup(t, cgroup2) // clients outside are not below the node's cgroup root: nothing is translated at connect
	o.cfg.Outside, o.cfg.Acceleration = true, false
	o.cfg.NodeNetns = fmt.Sprintf("/proc/self/fd/%d", int(o.node.h))
	o.cfg.Sizes.NAT = 4096
	o.client.v4, o.client.v6 = netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8:2::2")
	forward(o.node)
	forward(o.router)
	wire(t, o.node, "up0", "203.0.113.1/24", "2001:db8:1::1/64", o.router, "down0", "203.0.113.254/24", "2001:db8:1::fe/64")
	wire(t, o.client, "eth0", "198.51.100.2/24", "2001:db8:2::2/64", o.router, "out0", "198.51.100.254/24", "2001:db8:2::fe/64")
	route(o.node, "up0", "203.0.113.254", "2001:db8:1::fe")
	route(o.client, "eth0", "198.51.100.254", "2001:db8:2::fe")
	// What the outside world sends to load-balancer addresses goes to the node.
	o.router.do(func() {
		l, err := netlink.LinkByName("down0")
		must(t, err)
		for dst, gw := range map[string]netip.Addr{
			"192.0.2.0/24": node4, "2001:db8:80::/64": node6, "10.77.0.0/16": node4, "fd77::/64": node6, "10.78.0.0/24": node4, "fd78::/64": node6, // and to pods
		} {
			_, n, _ := net.ParseCIDR(dst)
			must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: n, Gw: gw.AsSlice()}))
		}
	})
	return o
}

// forward makes a namespace a router.
func forward(n *ns) {
	for _, f := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		n.sysctl(f, "1")
	}
}

func (n *ns) sysctl(name, value string) {
	n.t.Helper()
	n.do(func() { must(n.t, os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)) })
}

// wire connects two namespaces.
func wire(t testing.TB, a *ns, aName, a4, a6 string, b *ns, bName, b4, b6 string) {
	t.Helper()
	a.do(func() {
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: aName}, PeerName: bName, PeerNamespace: netlink.NsFd(b.h)}))
	})
	for _, end := range []struct {
		n            *ns
		name, v4, v6 string
	}{{a, aName, a4, a6}, {b, bName, b4, b6}} {
		end.n.do(func() {
			l, err := netlink.LinkByName(end.name)
			must(t, err)
			for _, cidr := range []string{end.v4, end.v6} {
				if cidr != "" {
					address(t, l, cidr)
				}
			}
			must(t, netlink.LinkSetUp(l))
		})
	}
	for _, end := range []struct {
		n    *ns
		name string
	}{{a, aName}, {b, bName}} {
		end.n.do(func() {
			eventually(t, end.name+" is up", func() bool {
				l, err := netlink.LinkByName(end.name)
				return err == nil && l.Attrs().OperState == netlink.OperUp
			})
		})
	}
}

// route is the default route.
func route(n *ns, dev, gw4, gw6 string) {
	n.t.Helper()
	n.do(func() {
		l, err := netlink.LinkByName(dev)
		must(n.t, err)
		for _, gw := range []string{gw4, gw6} {
			must(n.t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: netip.MustParseAddr(gw).AsSlice()}))
		}
	})
}

// seen is what a TCP server tells each client: whom it sees.
func (n *ns) seen(port uint16) {
	n.serve(port, func(c *net.TCPConn) {
		defer c.Close()
		if _, err := fmt.Fprintf(c, "%s\n", c.RemoteAddr()); err == nil {
			io.Copy(onlyWriter{c}, onlyReader{c})
		}
	})
}

// seenUDP answers each datagram with whom it sees, and the datagram.
func (n *ns) seenUDP(port uint16, before ...func(fd int) error) {
	n.t.Helper()
	var c net.PacketConn
	n.do(func() {
		var err error
		lc := net.ListenConfig{Control: control(func(fd int) error {
			var errs []error
			for _, f := range before {
				errs = append(errs, f(fd))
			}
			return errors.Join(errs...)
		})}
		c, err = lc.ListenPacket(context.Background(), "udp", fmt.Sprintf("[::]:%d", port))
		must(n.t, err)
	})
	n.t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 65536)
		for {
			k, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(append([]byte(from.String()+"\n"), b[:k]...), from)
		}
	}()
}

// askUDP sends a datagram from a fresh socket and returns whom the server saw.
func (n *ns) askUDP(to netip.AddrPort) (netip.AddrPort, error) {
	c, err := n.dialUDP(to)
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer c.Close()
	return sayHello(c)
}

func (n *ns) dialUDP(to netip.AddrPort, opts ...dialOption) (*net.UDPConn, error) {
	var d net.Dialer
	for _, o := range opts {
		o(&d)
	}
	var c net.Conn
	var err error
	n.do(func() { c, err = d.Dial("udp", to.String()) })
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

func sayHello(c *net.UDPConn) (netip.AddrPort, error) {
	if _, err := c.Write([]byte("hello")); err != nil {
		return netip.AddrPort{}, err
	}
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	b := make([]byte, 65536)
	k, err := c.Read(b)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var who, what string
	if _, err := fmt.Sscanf(string(b[:k]), "%s\n%s", &who, &what); err != nil || what != "hello" {
		return netip.AddrPort{}, fmt.Errorf("answer %q", b[:k])
	}
	return netip.ParseAddrPort(who)
}

// askSeen connects and returns whom the server sees.
func (n *ns) askSeen(to netip.AddrPort) (netip.AddrPort, error) {
	line, err := n.ask(to)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.ParseAddrPort(line)
}

// external makes a Service of one frontend for clients outside.
func external(name string, proto service.Protocol, front netip.AddrPort, e service.External, backends ...netip.AddrPort) *service.Service {
	s := svc(name, front, backends...)
	s.Frontends[0].Protocol, s.Frontends[0].Kind = proto, service.NodePort
	e.Backends = s.Frontends[0].Backends
	s.Frontends[0].External = &e
	return s
}

// bothFamilies runs a test for IPv4 and IPv6.
func bothFamilies(t *testing.T, f func(t *testing.T, v4 bool)) {
	t.Run("v4", func(t *testing.T) { f(t, true) })
	t.Run("v6", func(t *testing.T) { f(t, false) })
}

func choose(v4 bool, a, b netip.Addr) netip.Addr {
	if v4 {
		return a
	}
	return b
}

func (n *ns) addr(v4 bool) netip.Addr { return choose(v4, n.v4, n.v6) }

// routed adds a pod without bridge, as some networks do: addresses of its own on a device whose other end has none.
func (o *outer) routed() *ns {
	p := newNS(o.t)
	o.pods++
	p.v4, p.v6 = netip.MustParseAddr(fmt.Sprintf("10.78.0.%d", o.pods+1)), netip.MustParseAddr(fmt.Sprintf("fd78::%x", o.pods+1))
	name := fmt.Sprintf("cali%d", o.pods+1)
	wire(o.t, o.node, name, "", "", p, "eth0", p.v4.String()+"/32", p.v6.String()+"/128")
	o.node.do(func() {
		l, err := netlink.LinkByName(name)
		must(o.t, err)
		for _, a := range []netip.Addr{p.v4, p.v6} {
			must(o.t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: host(a), Scope: netlink.SCOPE_LINK}))
		}
	})
	p.do(func() {
		l, err := netlink.LinkByName("eth0")
		must(o.t, err)
		for _, gw := range []string{"169.254.1.1", "fe80::1"} { // nobody's: the node's end answers for it
			a := netip.MustParseAddr(gw)
			must(o.t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: host(a), Scope: netlink.SCOPE_LINK}))
			must(o.t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: a.AsSlice()}))
		}
	})
	o.node.sysctl("ipv4/conf/"+name+"/proxy_arp", "1")
	o.node.sysctl("ipv4/neigh/"+name+"/proxy_delay", "0")
	o.node.do(func() {
		l, err := netlink.LinkByName(name)
		must(o.t, err)
		address(o.t, l, "fe80::1/64")
	})
	return p
}

func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// second adds another node, on a network with this one, and a pod on it; the node forwards for its pod, and translates nothing.
func (o *outer) second() (pod *ns) {
	n := newNS(o.t)
	forward(n)
	wire(o.t, o.node, "peer0", "172.30.0.1/24", "fd30::1/64", n, "peer0", "172.30.0.2/24", "fd30::2/64")
	pod = newNS(o.t)
	pod.v4, pod.v6 = netip.MustParseAddr("10.79.0.2"), netip.MustParseAddr("fd79::2")
	wire(o.t, n, "pods0", "10.79.0.1/24", "fd79::1/64", pod, "eth0", "10.79.0.2/24", "fd79::2/64")
	route(pod, "eth0", "10.79.0.1", "fd79::1")
	route(n, "peer0", "172.30.0.1", "fd30::1")
	o.node.do(func() {
		l, err := netlink.LinkByName("peer0")
		must(o.t, err)
		for dst, gw := range map[string]string{"10.79.0.0/24": "172.30.0.2", "fd79::/64": "fd30::2"} {
			_, d, _ := net.ParseCIDR(dst)
			must(o.t, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: d, Gw: netip.MustParseAddr(gw).AsSlice()}))
		}
	})
	return pod
}

// say logs everything that is known, for a test that fails.
func (o *outer) say(d *Datapath) {
	if !o.t.Failed() {
		return
	}
	o.t.Logf("%+v", d.Status().Outside)
	c, _ := d.Counters()
	o.t.Logf("%+v", c)
	for _, m := range []string{"sm_outside", "sm_nat", "sm_nat_new", "sm_nat_in", "sm_nat_new_in", "sm_node"} {
		e, err := d.Dump(m)
		o.t.Log(m, err, e)
	}
}
