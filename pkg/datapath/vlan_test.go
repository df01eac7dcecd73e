package datapath

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// Tagged frames. Kernels without VLAN devices (CONFIG_VLAN_8021Q; the one that the tests run on may be such) can still push and
// pop tags, so a device like eth0.100 is made of a veth pair here, and of programs that do what a VLAN's device does: what the
// parent's hooks see is the same.

// vlan makes the device of a VLAN on top of parent, with its hardware address.
func (n *ns) vlan(parent string, id int, addrs ...string) netlink.Link {
	n.t.Helper()
	name, trunk := fmt.Sprintf("%s.%d", parent, id), fmt.Sprintf("trunk%d", id)
	var l netlink.Link
	n.do(func() {
		up, err := netlink.LinkByName(parent)
		must(n.t, err)
		must(n.t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: up.Attrs().HardwareAddr}, PeerName: trunk}))
		t, err := netlink.LinkByName(trunk)
		must(n.t, err)
		must(n.t, netlink.LinkSetUp(t))
		l, err = netlink.LinkByName(name)
		must(n.t, err)
		for _, a := range addrs {
			address(n.t, l, a)
		}
		must(n.t, netlink.LinkSetUp(l))
		const present, tci = 20, 24  // in struct __sk_buff
		n.hook(up, asm.Instructions{ // a frame with the tag is the VLAN device's, without it
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.Mov.Imm(asm.R0, -1),
			asm.LoadMem(asm.R2, asm.R6, present, asm.Word),
			asm.JEq.Imm(asm.R2, 0, "next"),
			asm.LoadMem(asm.R2, asm.R6, tci, asm.Word),
			asm.And.Imm(asm.R2, 0xfff),
			asm.JNE.Imm(asm.R2, int32(id), "next"),
			asm.FnSkbVlanPop.Call(),
			asm.Mov.Imm(asm.R1, int32(t.Attrs().Index)),
			asm.Mov.Imm(asm.R2, 0),
			asm.FnRedirect.Call(),
			asm.Return().WithSymbol("next"),
		})
		n.hook(t, asm.Instructions{ // what it sends leaves by the parent, tagged
			asm.Mov.Imm(asm.R2, int32(binary.NativeEndian.Uint16([]byte{0x81, 0}))),
			asm.Mov.Imm(asm.R3, int32(id)),
			asm.FnSkbVlanPush.Call(),
			asm.Mov.Imm(asm.R1, int32(up.Attrs().Index)),
			asm.Mov.Imm(asm.R2, 0),
			asm.FnRedirect.Call(),
			asm.Return(),
		})
	})
	for _, dev := range []string{"all", parent} { // answers may come by the parent
		n.sysctl("ipv4/conf/"+dev+"/rp_filter", "0")
	}
	return l
}

// hook attaches a program to what comes in by a device.
func (n *ns) hook(l netlink.Link, ins asm.Instructions) {
	n.t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: ins})
	must(n.t, err)
	defer p.Close()
	at, err := link.AttachTCX(link.TCXOptions{Interface: l.Attrs().Index, Program: p, Attach: ebpf.AttachTCXIngress})
	must(n.t, err)
	n.t.Cleanup(func() { at.Close() })
}

// lead makes the way from n to each destination go by a device, to the neighbour with the hardware address.
func (n *ns) lead(l netlink.Link, hardware net.HardwareAddr, via map[netip.Prefix]netip.Addr) {
	n.t.Helper()
	n.do(func() {
		for dst, gw := range via {
			must(n.t, netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: gw.AsSlice(), HardwareAddr: hardware}))
			must(n.t, netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Flags: unix.RTNH_F_ONLINK, Gw: gw.AsSlice(),
				Dst: &net.IPNet{IP: dst.Addr().AsSlice(), Mask: net.CIDRMask(dst.Bits(), dst.Addr().BitLen())}}))
		}
	})
}

func (n *ns) hardware(dev string) (hw net.HardwareAddr) {
	n.t.Helper()
	n.do(func() {
		l, err := netlink.LinkByName(dev)
		must(n.t, err)
		hw = l.Attrs().HardwareAddr
	})
	return hw
}

// balancers are ways to the load balancers' addresses.
func balancers(via4, via6 netip.Addr) map[netip.Prefix]netip.Addr {
	return map[netip.Prefix]netip.Addr{netip.MustParsePrefix("192.0.2.0/24"): via4, netip.MustParsePrefix("2001:db8:80::/64"): via6}
}

func TestClientsComeByAVLAN(t *testing.T) {
	for _, clsact := range []bool{false, true} {
		t.Run(fmt.Sprint("clsact ", clsact), func(t *testing.T) {
			o := newOuter(t)
			pod := serving(o.pod())
			d := o.open(func(c *Config) { c.ForceClsact = clsact })
			synced(t, d)
			// The VLAN's device comes later than the agent, and has the way to and from everything outside.
			near := o.node.vlan("up0", 100, "203.0.113.65/27", "2001:db8:1:64::1/64")
			far := o.router.vlan("down0", 100, "203.0.113.66/27", "2001:db8:1:64::fe/64")
			node4v, node6v := netip.MustParseAddr("203.0.113.65"), netip.MustParseAddr("2001:db8:1:64::1")
			o.router.lead(far, o.node.hardware("up0"), balancers(node4v, node6v))
			o.node.lead(near, o.router.hardware("down0"), map[netip.Prefix]netip.Addr{
				netip.PrefixFrom(o.client.v4, 32): netip.MustParseAddr("203.0.113.66"), netip.PrefixFrom(o.client.v6, 128): netip.MustParseAddr("2001:db8:1:64::fe"),
			})
			eventually(t, "the VLAN's device is served", func() bool {
				for _, dev := range d.Status().Outside.Devices {
					if dev.Name == "up0.100" {
						return dev.Clients && dev.Mode != ""
					}
				}
				return false
			})
			tagged := o.node.seeingOn("up0.100", func(ip []byte) bool { return len(ip) > 9 && (ip[6] == unix.IPPROTO_UDP || ip[9] == unix.IPPROTO_UDP) })
			bothFamilies(t, func(t *testing.T, v4 bool) {
				for _, front := range []netip.Addr{choose(v4, node4v, node6v), choose(v4, lb4, lb6)} {
					offer(t, d, front, service.External{}, v4, pod)
					expectSeen(t, o.client, front, o.node.addr(v4))
					offer(t, d, front, service.External{Local: true}, v4, pod)
					expectSeen(t, o.client, front, o.client.addr(v4))
					refusedBothWays(t, o, d, front, v4)
				}
			})
			if !tagged() {
				t.Error("nothing came by the VLAN's device")
			}
			o.say(d)
		})
	}
}

// refusedBothWays: without a backend, by TCP and UDP.
func refusedBothWays(t testing.TB, o *outer, d *Datapath, front netip.Addr, v4 bool) {
	t.Helper()
	offer(t, d, front, service.External{}, v4)
	if _, err := o.client.ask(ap(front, 30080)); !isRefused(err) {
		t.Errorf("TCP without a backend: %v; want connection refused", err)
	}
	if _, err := o.client.askUDP(ap(front, 30080)); !isRefused(err) {
		t.Errorf("UDP without a backend: %v; want connection refused", err)
	}
}

// Frames of a VLAN that the node doesn't have are nobody's, though they come by a device with the address. Those of VLAN 0,
// whose tag only has a priority, are everybody's.
func TestTaggedFramesAtABareDevice(t *testing.T) {
	o := newOuter(t)
	pod := serving(o.pod())
	d := o.open()
	synced(t, d)
	to := o.node.hardware("up0")
	stranger := o.router.vlan("down0", 200, "172.31.200.1/24", "fd31:200::1/64")
	priority := o.router.vlan("down0", 0, "172.31.0.1/24", "fd31::1/64")
	// Gateways by name only: what counts is the hardware address, which is the node's.
	strangers := balancers(netip.MustParseAddr("172.31.200.2"), netip.MustParseAddr("fd31:200::2"))
	priorities := balancers(netip.MustParseAddr("172.31.0.2"), netip.MustParseAddr("fd31::2"))
	bothFamilies(t, func(t *testing.T, v4 bool) {
		front := choose(v4, lb4, lb6)
		offer(t, d, front, service.External{}, v4, pod)
		before, err := d.Counters()
		must(t, err)
		o.router.lead(stranger, to, strangers)
		seen := o.node.seeingOn("up0", func([]byte) bool { return true })
		if _, err := o.client.ask(ap(front, 30080), briefly); err == nil || isRefused(err) {
			t.Errorf("by another VLAN: %v; want no answer", err)
		}
		eventually(t, "frames came", seen)
		after, err := d.Counters()
		must(t, err)
		if after.Outside != before.Outside || after.OutsideStray != before.OutsideStray {
			t.Errorf("and it counts as a client of this node's: %d, %d strays", after.Outside-before.Outside, after.OutsideStray-before.OutsideStray)
		}
		o.router.lead(priority, to, priorities)
		expectSeen(t, o.client, front, o.node.addr(v4))
		refusedBothWays(t, o, d, front, v4)
	})
	o.say(d)
}
