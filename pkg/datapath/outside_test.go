package datapath

import (
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
		for dst, gw := range map[string]netip.Addr{"192.0.2.0/24": node4, "2001:db8:80::/64": node6} {
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
func (n *ns) seenUDP(port uint16) {
	n.t.Helper()
	var c net.PacketConn
	n.do(func() {
		var err error
		c, err = net.ListenPacket("udp", fmt.Sprintf("[::]:%d", port))
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

func (n *ns) dialUDP(to netip.AddrPort) (c *net.UDPConn, err error) {
	n.do(func() { c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to)) })
	return c, err
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

func TestNodePortForClientsOutside(t *testing.T) {
	o := newOuter(t)
	pod := o.pod()
	pod.seen(8080)
	pod.seenUDP(5353)
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		for _, local := range []bool{false, true} {
			t.Run(map[bool]string{false: "Cluster", true: "Local"}[local], func(t *testing.T) {
				front := choose(v4, node4, node6)
				e := service.External{Local: local}
				d.Reconciler().SetService(external("tcp", service.TCP, ap(front, 30080), e, ap(pod.addr(v4), 8080)))
				d.Reconciler().SetService(external("udp", service.UDP, ap(front, 30080), e, ap(pod.addr(v4), 5353)))
				flush(t, d)
				want := choose(v4, o.node.v4, o.node.v6)
				if local {
					want = o.client.addr(v4)
				}
				if got, err := o.client.askSeen(ap(front, 30080)); err != nil || got.Addr().Unmap() != want {
					t.Errorf("TCP: the pod sees %v, %v; want %v", got, err, want)
				}
				if got, err := o.client.askUDP(ap(front, 30080)); err != nil || got.Addr().Unmap() != want {
					t.Errorf("UDP: the pod sees %v, %v; want %v", got, err, want)
				}
			})
		}
	})
	if t.Failed() {
		t.Logf("%+v", d.Status().Outside)
		c, _ := d.Counters()
		t.Logf("%+v", c)
		for _, m := range []string{"sm_outside", "sm_nat", "sm_nat_new", "sm_nat_in", "sm_nat_new_in", "sm_node"} {
			e, err := d.Dump(m)
			t.Log(m, err)
			for _, x := range e {
				t.Log(x)
			}
		}
	}
}
