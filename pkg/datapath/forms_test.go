package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// The forms in which packets of clients outside may come: with IP options or extension headers, without a checksum, tagged.
// What a pod's device saw is the witness that they came so, and unharmed.

// seeing returns a function that says whether a packet that satisfied ok has arrived at the namespace's eth0. Packets begin
// with the IP header.
func (n *ns) seeing(ok func(ip []byte) bool) func() bool { return n.seeingOn("eth0", ok) }

func (n *ns) seeingOn(dev string, ok func(ip []byte) bool) func() bool {
	n.t.Helper()
	var fd int
	n.do(func() {
		l, err := netlink.LinkByName(dev)
		must(n.t, err)
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		must(n.t, err)
		all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
		must(n.t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Attrs().Index}))
		must(n.t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}))
	})
	var mu sync.Mutex
	var seen, stop bool
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 65536)
		for {
			k, from, err := unix.Recvfrom(fd, b, 0)
			mu.Lock()
			if sa, is := from.(*unix.SockaddrLinklayer); err == nil && is && sa.Pkttype == unix.PACKET_HOST {
				seen = seen || ok(b[:k])
			}
			end := stop
			mu.Unlock()
			if end {
				return
			}
		}
	})
	n.t.Cleanup(func() {
		mu.Lock()
		stop = true
		mu.Unlock()
		wg.Wait()
		unix.Close(fd)
	})
	return func() bool {
		mu.Lock()
		defer mu.Unlock()
		return seen
	}
}

// form is a way in which a client's packets look, by what its socket is told.
type form struct {
	name string
	set  func(fd int) error
	// is recognises such a packet.
	is func(ip []byte) bool
	// clumsy: a refusal would have to be made of it, which isn't done.
	clumsy bool
	// udp: only datagrams can be like that.
	udp bool
}

func sticky(level, opt int, value string) func(int) error {
	return func(fd int) error { return unix.SetsockoptString(fd, level, opt, value) }
}

func option(level, opt, value int) func(int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, level, opt, value) }
}

// acceptUnsummed makes a socket take IPv6 datagrams without a checksum; on others it's of no consequence.
func acceptUnsummed(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_RX, 1); err != nil && !errors.Is(err, unix.ENOPROTOOPT) {
		return err
	}
	return nil
}

// Extension headers in the form in which sockets take them; the kernel fills in the first byte. One has only padding, of which
// Linux takes no more than 7 bytes; one an option for experiments (RFC 4727), which whoever doesn't know it is to skip.
const (
	padded  = "\x00\x00\x01\x04\x00\x00\x00\x00"
	unknown = "\x00\x01\x1e\x0c\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
)

// segments is a routing header (RFC 8754) with one segment, which is where the packet goes anyway: nothing is left to route.
func segments(to netip.Addr) string {
	only := to.As16()
	return "\x00\x02\x04\x00\x00\x00\x00\x00" + string(only[:])
}

// chain lists the extension headers of an IPv6 packet and the transport protocol.
func chain(ip []byte) (protos []byte) {
	if ip[0]>>4 != 6 {
		return nil
	}
	next, at := ip[6], 40
	for {
		protos = append(protos, next)
		size := 8
		switch next {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if len(ip) < at+8 {
				return protos
			}
			size = (int(ip[at+1]) + 1) * 8
		case unix.IPPROTO_FRAGMENT:
			if len(ip) < at+8 || binary.BigEndian.Uint16(ip[at+2:])&0xfff8 != 0 {
				return protos
			}
		default:
			return protos
		}
		next, at = ip[at], at+size
	}
}

// has recognises packets with just these extension headers before TCP or UDP.
func has(headers ...byte) func([]byte) bool {
	return func(ip []byte) bool {
		c := chain(ip)
		return len(c) == len(headers)+1 && bytes.Equal(c[:len(headers)], headers) && (c[len(headers)] == unix.IPPROTO_TCP || c[len(headers)] == unix.IPPROTO_UDP)
	}
}

// unsummed recognises datagrams without a checksum.
func unsummed(ip []byte) bool {
	at := 40
	if ip[0]>>4 == 4 {
		if at = int(ip[0]&15) * 4; ip[9] != unix.IPPROTO_UDP || binary.BigEndian.Uint16(ip[6:])&0x1fff != 0 {
			return false
		}
	} else if ip[6] != unix.IPPROTO_UDP {
		return false
	}
	return len(ip) >= at+8 && ip[at+6] == 0 && ip[at+7] == 0
}

func forms(to netip.Addr) []form {
	v4 := to.Is4()
	if v4 {
		optioned := func(n int) func([]byte) bool { return func(ip []byte) bool { return ip[0] == byte(0x45+n) } }
		return []form{
			{name: "an option that does nothing", set: sticky(unix.IPPROTO_IP, unix.IP_OPTIONS, "\x01\x01\x01\x00"), is: optioned(1), clumsy: true},
			{name: "record route, which routers write into", set: sticky(unix.IPPROTO_IP, unix.IP_OPTIONS, "\x01\x07\x0b\x04"+string(make([]byte, 8))),
				is: optioned(3), clumsy: true},
			{name: "40 bytes of options", set: sticky(unix.IPPROTO_IP, unix.IP_OPTIONS, "\x01\x07\x27\x04"+string(make([]byte, 36))), is: optioned(10), clumsy: true},
			{name: "no checksum", set: option(unix.SOL_SOCKET, unix.SO_NO_CHECK, 1), is: unsummed, udp: true},
		}
	}
	const routing, padding = unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS
	return []form{
		{name: "hop-by-hop options", set: sticky(unix.IPPROTO_IPV6, unix.IPV6_HOPOPTS, padded), is: has(unix.IPPROTO_HOPOPTS), clumsy: true},
		{name: "destination options", set: sticky(unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, unknown), is: has(padding), clumsy: true},
		{name: "a routing header", set: sticky(unix.IPPROTO_IPV6, unix.IPV6_RTHDR, segments(to)), is: has(routing), clumsy: true},
		{name: "all of them", set: func(fd int) error {
			var errs []error
			for opt, value := range map[int]string{unix.IPV6_HOPOPTS: padded, unix.IPV6_RTHDRDSTOPTS: padded, unix.IPV6_RTHDR: segments(to), unix.IPV6_DSTOPTS: unknown} {
				errs = append(errs, unix.SetsockoptString(fd, unix.IPPROTO_IPV6, opt, value))
			}
			return errors.Join(errs...)
		}, is: has(unix.IPPROTO_HOPOPTS, padding, routing, padding), clumsy: true},
		{name: "no checksum", set: option(unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_TX, 1), is: unsummed, udp: true},
	}
}

func TestPacketsOfEveryForm(t *testing.T) {
	o := newOuter(t)
	pod := o.pod()
	pod.seen(8080)
	// Answers have no checksum either; IPv6 takes such only if it's told to.
	pod.seenUDP(5353, option(unix.SOL_SOCKET, unix.SO_NO_CHECK, 1), option(unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_TX, 1), acceptUnsummed)
	pod.sysctl("ipv6/conf/all/seg6_enabled", "1") // else Linux takes no packet with such a routing header
	pod.sysctl("ipv6/conf/eth0/seg6_enabled", "1")
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		front := ap(choose(v4, lb4, lb6), 30080)
		for _, f := range forms(front.Addr()) {
			t.Run(f.name, func(t *testing.T) {
				told := func(d *net.Dialer) {
					d.Control = control(func(fd int) error { return errors.Join(f.set(fd), acceptUnsummed(fd)) })
				}
				for _, local := range []bool{true, false} {
					offer(t, d, front.Addr(), service.External{Local: local}, v4, pod)
					seen := pod.seeing(f.is)
					if !f.udp {
						tcp, err := o.client.dial(front, told)
						must(t, err)
						defer tcp.Close()
						_, err = greeting(tcp)
						must(t, err)
						echo(t, tcp, 100_000)
					}
					udp, err := o.client.dialUDP(front, told)
					must(t, err)
					defer udp.Close()
					for _, size := range []int{5, 5000} { // whole, and in fragments
						if err := datagram(udp, size); err != nil {
							t.Errorf("local %v, %d bytes: %v", local, size, err)
						}
					}
					eventually(t, "the pod sees such packets", seen)
				}
				// Where nobody serves, the client is refused, or left alone where that would take more than the packet's own headers.
				offer(t, d, front.Addr(), service.External{}, v4)
				udp, err := o.client.dialUDP(front, told)
				must(t, err)
				defer udp.Close()
				if err := datagram(udp, 5, 500*time.Millisecond); isRefused(err) == f.clumsy {
					t.Errorf("without a backend: %v", err)
				}
			})
		}
	})
	o.say(d)
}

// datagram sends a datagram of size bytes and compares what comes back.
func datagram(c *net.UDPConn, size int, wait ...time.Duration) error {
	out := bytes.Repeat([]byte("0123456789"), size/10+1)[:size]
	if _, err := c.Write(out); err != nil {
		return err
	}
	c.SetReadDeadline(time.Now().Add(append(wait, 5*time.Second)[0]))
	b := make([]byte, 65536)
	k, err := c.Read(b)
	if err == nil && !bytes.HasSuffix(b[:k], out) {
		err = fmt.Errorf("%d bytes of something else", k)
	}
	return err
}

// A packet whose routing header names more places to go isn't at its destination, whatever address it bears.
func TestPacketsOnTheWayToSomewhereElseAreLeftAlone(t *testing.T) {
	o := newOuter(t)
	pod := serving(o.pod())
	d := o.open()
	synced(t, d)
	offer(t, d, lb6, service.External{}, false, pod)
	before, err := d.Counters()
	must(t, err)
	last := netip.MustParseAddr("2001:db8:1::99").As16()
	via := lb6.As16()
	// Two segments, of which one is left: the packet goes to lb6 first, and its checksum is that for the last one.
	header := "\x00\x04\x04\x01\x01\x00\x00\x00" + string(last[:]) + string(via[:])
	c, err := o.client.dialUDP(ap(netip.AddrFrom16(last), 30080), func(d *net.Dialer) {
		d.Control = control(sticky(unix.IPPROTO_IPV6, unix.IPV6_RTHDR, header))
	})
	must(t, err)
	defer c.Close()
	at := o.node.seeingOn("up0", func(ip []byte) bool {
		return ip[0]>>4 == 6 && bytes.Equal(ip[24:40], via[:]) && bytes.Equal(chain(ip), []byte{unix.IPPROTO_ROUTING, unix.IPPROTO_UDP})
	})
	_, err = c.Write([]byte("hello"))
	must(t, err)
	eventually(t, "the packet comes by", at)
	expectSeen(t, o.client, lb6, o.node.v6) // what came after it has been served
	after, err := d.Counters()
	must(t, err)
	if n := after.Outside - before.Outside; n != 2 {
		t.Errorf("%d connections, 2 were made", n)
	}
}
