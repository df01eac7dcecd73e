package datapath

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/sockmesh/sockmesh/pkg/nodeaddr"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// The table of connections of clients outside, what travels with them (errors, fragments), and the devices.

// shrink makes one link's both ends carry no more than mtu, while its far end still offers full-sized segments: only errors
// can tell the sender.
func shrink(t testing.TB, near *ns, nearDev string, far *ns, farDev string, mtu int) {
	t.Helper()
	for n, dev := range map[*ns]string{near: nearDev, far: farDev} {
		n.do(func() {
			l, err := netlink.LinkByName(dev)
			must(t, err)
			must(t, netlink.LinkSetMTU(l, mtu))
		})
	}
	far.do(func() {
		for family, mss := range map[int]int{netlink.FAMILY_V4: 1460, netlink.FAMILY_V6: 1440} {
			routes, err := nodeaddr.Whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, family) })
			must(t, err)
			for _, r := range routes {
				if r.Gw != nil {
					r.AdvMSS = mss
					must(t, netlink.RouteReplace(&r))
				}
			}
		}
	})
}

func TestPathMTUIsDiscoveredInBothDirections(t *testing.T) {
	o := newOuter(t)
	bridged, routed := serving(o.pod()), serving(o.routed())
	remote := serving(o.second())
	d := o.open()
	synced(t, d)
	shrink(t, o.router, "out0", o.client, "eth0", 1400)
	shrink(t, o.node, "cali3", routed, "eth0", 1300)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		front := choose(v4, node4, node6)
		for name, c := range map[string]struct {
			pod   *ns
			local bool
		}{"Local": {bridged, true}, "Cluster": {bridged, false}, "narrow pod, Local": {routed, true}, "narrow pod, Cluster": {routed, false},
			"other node, Cluster": {remote, false}} {
			t.Run(name, func(t *testing.T) {
				offer(t, d, front, service.External{Local: c.local}, v4, c.pod)
				tcp, err := o.client.dial(ap(front, 30080))
				must(t, err)
				defer tcp.Close()
				_, err = greeting(tcp)
				must(t, err)
				echo(t, tcp, 300_000)
			})
		}
	})
	c, err := d.Counters()
	must(t, err)
	if c.OutsideErrors == 0 {
		t.Error("no error was translated: the links weren't narrow")
	}
	o.say(d)
}

func TestFragmentsFollowTheFirst(t *testing.T) {
	o := newOuter(t)
	pod, routed := serving(o.pod()), serving(o.routed())
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		front := choose(v4, node4, node6)
		for _, p := range []*ns{pod, routed} {
			for _, local := range []bool{false, true} {
				offer(t, d, front, service.External{Local: local}, v4, p)
				c, err := o.client.dialUDP(ap(front, 30080))
				must(t, err)
				defer c.Close()
				big := bytes.Repeat([]byte("0123456789"), 500)
				_, err = c.Write(big)
				must(t, err)
				c.SetReadDeadline(time.Now().Add(5 * time.Second))
				b := make([]byte, 65536)
				n, err := c.Read(b)
				if err != nil || !bytes.HasSuffix(b[:n], big) {
					t.Errorf("local %v: %d bytes, %v", local, n, err)
				}
			}
		}
	})
	o.say(d)
}

// On a link that carries 1300 bytes a fragment has 1280 bytes of payload: the eighth begins at a multiple of 2048, where the low
// byte of its offset is zero as is that of a first fragment.
func TestManyFragmentsFollowTheFirst(t *testing.T) {
	o := newOuter(t)
	pod := serving(o.pod())
	d := o.open()
	synced(t, d)
	shrink(t, o.router, "out0", o.client, "eth0", 1300)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		front := choose(v4, node4, node6)
		for _, local := range []bool{false, true} {
			offer(t, d, front, service.External{Local: local}, v4, pod)
			udp, err := o.client.dialUDP(ap(front, 30080))
			must(t, err)
			defer udp.Close()
			eventually(t, "a datagram of 25 fragments is answered, once the pod knows of the narrow link", func() bool {
				return datagram(udp, 32_000, time.Second) == nil
			})
		}
	})
	o.say(d)
}

func TestErrorOfABackendReachesTheClient(t *testing.T) {
	o := newOuter(t)
	pod := o.pod() // nobody listens
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		front := choose(v4, node4, node6)
		for _, local := range []bool{false, true} {
			offer(t, d, front, service.External{Local: local}, v4, pod)
			if _, err := o.client.askUDP(ap(front, 30080)); err == nil || !isRefused(err) {
				t.Errorf("UDP, local %v: %v; want connection refused", local, err)
			}
			if _, err := o.client.ask(ap(front, 30080)); err == nil || !isRefused(err) {
				t.Errorf("TCP, local %v: %v; want connection refused", local, err)
			}
		}
	})
	o.say(d)
}

func TestFewSourcePortsAreSharedAndRunOut(t *testing.T) {
	o := newOuter(t)
	a, b := serving(o.pod()), serving(o.pod())
	d := o.open(func(c *Config) { c.NATPorts = [2]uint16{20000, 20003} })
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		before, err := d.Counters()
		must(t, err)
		front := choose(v4, node4, node6)
		offer(t, d, front, service.External{}, v4, a)
		var held []net.Conn
		ports := map[uint16]bool{}
		for range 4 {
			c, err := o.client.dial(ap(front, 30080))
			must(t, err)
			defer c.Close()
			who, err := greeting(c)
			must(t, err)
			ports[netip.MustParseAddrPort(who).Port()] = true
			held = append(held, c)
		}
		if len(ports) != 4 || !ports[20000] || !ports[20003] {
			t.Errorf("the backend saw the ports %v", ports)
		}
		if _, err := o.client.ask(ap(front, 30080), briefly); err == nil {
			t.Error("a fifth connection came about with four ports")
		}
		after, err := d.Counters()
		must(t, err)
		if after.OutsideNoPort == before.OutsideNoPort {
			t.Error("and it wasn't counted")
		}
		for _, c := range held {
			echo(t, c.(*net.TCPConn), 1000)
		}
		offer(t, d, front, service.External{}, v4, b) // another backend: the ports are free towards it
		if _, err := o.client.ask(ap(front, 30080)); err != nil {
			t.Errorf("to another backend: %v", err)
		}
	})
	o.say(d)
}

func TestFloodPushesOutNoConnectionThatExists(t *testing.T) {
	o := newOuter(t)
	pod := serving(o.pod())
	d := o.open(func(c *Config) { c.Sizes.NAT = 1024 })
	synced(t, d)
	offer(t, d, node4, service.External{}, true, pod)
	tcp, err := o.client.dial(ap(node4, 30080))
	must(t, err)
	defer tcp.Close()
	_, err = greeting(tcp)
	must(t, err)
	udp, err := o.client.dialUDP(ap(node4, 30080))
	must(t, err)
	defer udp.Close()
	for range 3 {
		_, err = sayHello(udp)
		must(t, err)
	}
	o.client.do(func() {
		for i := range 3000 { // one datagram each; answered, but never continued
			from := ap(o.client.v4, uint16(2000+i))
			c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(from), net.UDPAddrFromAddrPort(ap(node4, 30080)))
			must(t, err)
			c.Write([]byte("flood"))
			c.Close()
		}
	})
	echo(t, tcp, 10_000)
	if _, err := sayHello(udp); err != nil {
		t.Error(err)
	}
	if n := countEntries(d.objs.nat()); n != 2 {
		t.Errorf("%d connections are said to exist, 2 do", n)
	}
	if _, err := o.client.askSeen(ap(node4, 30080)); err != nil {
		t.Errorf("a new connection after the flood: %v", err)
	}
	o.say(d)
}

func TestFullTableDelaysNewConnectionsAndKeepsTheOthers(t *testing.T) {
	o := newOuter(t)
	pod := serving(o.pod())
	d := o.open(func(c *Config) { c.Sizes.NAT = 8 })
	synced(t, d)
	offer(t, d, node4, service.External{}, true, pod)
	var held []*net.TCPConn
	for len(held) < 20 {
		c, err := o.client.dial(ap(node4, 30080))
		if err != nil {
			break
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := greeting(c); err != nil {
			break
		}
		c.SetDeadline(time.Now().Add(time.Minute))
		held = append(held, c)
	}
	if len(held) < 8 || len(held) == 20 {
		t.Errorf("%d connections came about in a table of 8", len(held))
	}
	for _, c := range held {
		echo(t, c, 1000)
	}
	c, err := d.Counters()
	must(t, err)
	if c.OutsideFull == 0 {
		t.Error("nothing was counted")
	}
	o.say(d)
}

func TestCollectorRemovesWhatIsOver(t *testing.T) {
	o := newOuter(t)
	pod := serving(o.pod())
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		offer(t, d, choose(v4, node4, node6), service.External{}, v4, pod)
		tcp, err := o.client.dial(ap(choose(v4, node4, node6), 30080))
		must(t, err)
		defer tcp.Close()
		_, err = greeting(tcp)
		must(t, err)
		must(t, d.nat.collect(true))
		if countEntries(d.objs.nat()) != 1 || countEntries(d.objs.natIn()) != 2 {
			t.Fatalf("%d connections, %d leads", countEntries(d.objs.nat()), countEntries(d.objs.natIn()))
		}
		var k natKey
		var v natValue
		it := d.objs.nat().Iterate()
		for it.Next(&k, &v) {
		}
		must(t, it.Err())
		v.Used = ktime() - uint32(d.cfg.NATEstablished/time.Second) + 60
		must(t, d.objs.nat().Put(k, v))
		must(t, d.nat.collect(true))
		echo(t, tcp, 1000) // not yet; and used again
		v.Used = ktime() - uint32(d.cfg.NATEstablished/time.Second) - 60
		must(t, d.objs.nat().Put(k, v))
		must(t, d.nat.collect(true))
		if countEntries(d.objs.nat()) != 0 || countEntries(d.objs.natIn()) != 0 {
			t.Errorf("%d connections, %d leads are left", countEntries(d.objs.nat()), countEntries(d.objs.natIn()))
		}
		// The client learns of it as soon as it speaks.
		_, err = tcp.Write([]byte("x")) // an acknowledgement may have been first, and the reset be here already
		if err == nil {
			_, err = tcp.Read(make([]byte, 1))
		}
		if !isReset(err) {
			t.Errorf("after it was forgotten: %v; want a reset", err)
		}
	})
	o.say(d)
}

func TestLifetimes(t *testing.T) {
	c := Config{NATEstablished: 2 * time.Hour}
	tcp, udp := &natKey{Proto: 6}, &natKey{Proto: 17}
	for _, x := range []struct {
		name  string
		key   *natKey
		flags uint16
		fresh bool
		want  uint32
	}{
		{"SYN without answer", tcp, 0, true, 20},
		{"answer without the third packet", tcp, natAnswered, true, 60},
		{"refused by the backend", tcp, natAnswered | natRstBackend, true, 10},
		{"established", tcp, natAnswered, false, 7200},
		{"one side has ended", tcp, natAnswered | natFinClient, false, 120},
		{"both have", tcp, natAnswered | natFinClient | natFinBackend, false, 120},
		{"reset", tcp, natAnswered | natRstClient, false, 10},
		{"query", udp, 0, true, 30},
		{"query and answer", udp, natAnswered, true, 30},
		{"stream", udp, natAnswered, false, 180},
	} {
		if got := c.lifetime(x.key, &natValue{Flags: x.flags}, x.fresh); got != x.want {
			t.Errorf("%s: %d s, want %d", x.name, got, x.want)
		}
	}
}

func TestConnectionsOutliveTheAgent(t *testing.T) {
	for _, clsact := range []bool{false, true} {
		t.Run(fmt.Sprint("clsact ", clsact), func(t *testing.T) {
			o := newOuter(t)
			pod := serving(o.pod())
			d := o.open(func(c *Config) { c.ForceClsact = clsact })
			synced(t, d)
			offer(t, d, node4, service.External{}, true, pod)
			offer(t, d, node6, service.External{}, false, pod)
			var held []*net.TCPConn
			for _, front := range []netip.Addr{node4, node6} {
				c, err := o.client.dial(ap(front, 30080))
				must(t, err)
				defer c.Close()
				_, err = greeting(c)
				must(t, err)
				held = append(held, c)
			}
			for range 3 {
				must(t, d.Close()) // closes descriptors, as the end of a killed process does
				for _, c := range held {
					echo(t, c, 1000)
				}
				d = o.open()
				for _, c := range held {
					echo(t, c, 1000)
				}
				if in, out := o.attached(t, "up0"); in != 1 || out != 1 {
					t.Errorf("%d programs on the way in, %d on the way out", in, out)
				}
			}
			synced(t, d)
			for _, c := range held {
				echo(t, c, 1000)
			}
			o.say(d)
		})
	}
}

// attached counts the programs on a device, by tcx and by clsact.
func (o *outer) attached(t testing.TB, dev string) (in, out int) {
	t.Helper()
	o.node.do(func() {
		l, err := netlink.LinkByName(dev)
		must(t, err)
		for at, n := range map[ebpf.AttachType]*int{ebpf.AttachTCXIngress: &in, ebpf.AttachTCXEgress: &out} {
			q, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: at})
			must(t, err)
			*n += len(q.Programs)
		}
		for parent, n := range map[uint32]*int{netlink.HANDLE_MIN_INGRESS: &in, netlink.HANDLE_MIN_EGRESS: &out} {
			filters, err := filtersOf(l, parent)
			if err == nil {
				*n += len(filters)
			}
		}
	})
	return in, out
}

func TestCleanupTakesEverythingOffTheDevicesAndLeavesOthersPrograms(t *testing.T) {
	for _, clsact := range []bool{false, true} {
		t.Run(fmt.Sprint("clsact ", clsact), func(t *testing.T) {
			o := newOuter(t)
			pod := serving(o.pod())
			other, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
				asm.Mov.Imm(asm.R0, -1), asm.Return(),
			}})
			must(t, err)
			defer other.Close()
			o.node.do(func() {
				l, err := netlink.LinkByName("up0")
				must(t, err)
				theirs, err := link.AttachTCX(link.TCXOptions{Interface: l.Attrs().Index, Program: other, Attach: ebpf.AttachTCXIngress})
				must(t, err)
				t.Cleanup(func() { theirs.Close() })
			})
			d := o.open(func(c *Config) { c.ForceClsact = clsact })
			synced(t, d)
			offer(t, d, node4, service.External{}, true, pod)
			expectSeen(t, o.client, node4, o.node.v4)
			if in, out := o.attached(t, "up0"); in != 2 || out != 1 {
				t.Errorf("%d programs on the way in, %d on the way out", in, out)
			}
			must(t, d.Close())
			must(t, Cleanup(o.cfg))
			if in, out := o.attached(t, "up0"); in != 1 || out != 0 {
				t.Errorf("after cleanup %d programs on the way in, %d on the way out", in, out)
			}
			o.node.do(func() {
				for _, name := range []string{"up0", "br0"} {
					l, err := netlink.LinkByName(name)
					must(t, err)
					qdiscs, err := nodeaddr.Whole(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(l) })
					must(t, err)
					for _, q := range qdiscs {
						if q.Type() == "clsact" {
							t.Errorf("%s still has a clsact qdisc", name)
						}
					}
				}
			})
		})
	}
}

func TestDevicesThatComeLaterAndThoseThatAreNotMeant(t *testing.T) {
	o := newOuter(t)
	pod := serving(o.pod())
	d := o.open(func(c *Config) { c.Devices = []string{"up*", "late?"} })
	synced(t, d)
	late := newNS(t)
	late.v4, late.v6 = netip.MustParseAddr("172.29.0.2"), netip.MustParseAddr("fd29::2")
	offer(t, d, netip.MustParseAddr("172.29.0.1"), service.External{}, true, pod)
	wire(t, o.node, "late0", "172.29.0.1/24", "fd29::1/64", late, "eth0", "172.29.0.2/24", "fd29::2/64")
	eventually(t, "the new device is served", func() bool {
		_, err := late.askSeen(ap(netip.MustParseAddr("172.29.0.1"), 30080))
		return err == nil
	})
	for _, dev := range d.Status().Outside.Devices {
		if want := dev.Name == "up0" || dev.Name == "late0"; dev.Clients != want {
			t.Errorf("%+v", dev)
		}
	}
	o.node.do(func() {
		l, err := netlink.LinkByName("late0")
		must(t, err)
		must(t, netlink.LinkDel(l))
	})
	eventually(t, "and forgotten when it goes", func() bool {
		for _, dev := range d.Status().Outside.Devices {
			if dev.Name == "late0" {
				return false
			}
		}
		return len(pinnedOutside(d.dir)) == 4
	})
	expectOff := o.open
	must(t, d.Close())
	d = expectOff(func(c *Config) { c.Outside = false })
	if in, out := o.attached(t, "up0"); in+out != 0 {
		t.Errorf("switched off: %d programs on the way in, %d on the way out", in, out)
	}
	if s := d.Status().Outside; s.Active || s.Reason == "" {
		t.Errorf("status says %+v", s)
	}
}
