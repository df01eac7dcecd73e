package datapath

import (
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// A flood of SYNs with forged addresses at a node port: the table is bounded, and nobody else notices.

// syn is a SYN segment with its IP header, as a forger sends it.
func syn(from, to netip.AddrPort) []byte {
	tcp := make([]byte, 20)
	binary.BigEndian.PutUint16(tcp[0:], from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	binary.BigEndian.PutUint32(tcp[4:], rand.Uint32())
	tcp[12], tcp[13] = 5<<4, 2
	binary.BigEndian.PutUint16(tcp[14:], 65535)
	src, dst := from.Addr().AsSlice(), to.Addr().AsSlice()
	var sum uint32
	add := func(b []byte) {
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	add(src)
	add(dst)
	add([]byte{0, unix.IPPROTO_TCP, 0, byte(len(tcp))})
	add(tcp)
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(tcp[16:], ^uint16(sum))
	var ip []byte
	if from.Addr().Is4() {
		ip = make([]byte, 12, 40) // the kernel fills in length and checksum
		ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
	} else {
		ip = make([]byte, 8, 60)
		ip[0], ip[5], ip[6], ip[7] = 0x60, byte(len(tcp)), unix.IPPROTO_TCP, 64
	}
	return append(append(append(ip, src...), dst...), tcp...)
}

// forger sends SYN segments of addresses that aren't its own until it's told to stop; sent counts them.
func (o *outer) forger(to netip.AddrPort) (sent *atomic.Int64, stop func()) {
	v4 := to.Addr().Is4()
	sent = &atomic.Int64{}
	end, ended := make(chan struct{}), make(chan struct{})
	var fd int
	// What is answered to them comes back as far as the client, which throws it away.
	forged, family := netip.MustParsePrefix("198.18.0.0/15"), unix.AF_INET
	if !v4 {
		forged, family = netip.MustParsePrefix("2001:db8:99::/48"), unix.AF_INET6
	}
	o.router.do(func() {
		l, err := netlink.LinkByName("out0")
		must(o.t, err)
		dst := &net.IPNet{IP: forged.Addr().AsSlice(), Mask: net.CIDRMask(forged.Bits(), forged.Addr().BitLen())}
		must(o.t, netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Gw: o.client.addr(v4).AsSlice()}))
	})
	o.client.do(func() {
		var err error
		fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		must(o.t, err)
	})
	go func() {
		defer close(ended)
		defer unix.Close(fd)
		for {
			for range 50 {
				a := forged.Addr().AsSlice()
				binary.BigEndian.PutUint16(a[len(a)-2:], uint16(rand.Uint32()))
				ip, _ := netip.AddrFromSlice(a)
				packet := syn(ap(ip, uint16(1024+rand.IntN(60000))), to)
				var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: to.Addr().As16()}
				if v4 {
					sa = &unix.SockaddrInet4{Addr: to.Addr().As4()}
				}
				if err := unix.Sendto(fd, packet, 0, sa); err == nil {
					sent.Add(1)
				}
			}
			select {
			case <-end:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	return sent, func() {
		close(end)
		<-ended
	}
}

// speak connects and has the first word: a server that is flooded answers with SYN cookies and doesn't ask for a lost third
// packet, so a client that waits for the server's first word may wait for ever, with and without us.
func (n *ns) speak(to netip.AddrPort) (*net.TCPConn, error) {
	c, err := n.dial(to)
	if err != nil {
		return nil, err
	}
	word := make([]byte, 5)
	if _, err = c.Write([]byte("hello")); err == nil {
		if _, err = greeting(c); err == nil {
			_, err = io.ReadFull(c, word)
		}
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// A flood of SYN segments from forged addresses, at a node port: the table of connections stays within its bounds, those that
// exist go on, and others still get served.
func TestSYNFloodPushesOutNoConnectionAndKeepsNobodyOut(t *testing.T) {
	for _, local := range []bool{false, true} {
		t.Run(map[bool]string{false: "Cluster", true: "Local"}[local], func(t *testing.T) {
			o := newOuter(t)
			pod := serving(o.pod())
			d := o.open(func(c *Config) { c.Sizes.NAT = 4096 })
			synced(t, d)
			bothFamilies(t, func(t *testing.T, v4 bool) {
				front := choose(v4, node4, node6)
				offer(t, d, front, service.External{Local: local}, v4, pod)
				before, err := d.Counters()
				must(t, err)
				exist := countEntries(d.objs.nat())
				var tcp *net.TCPConn
				eventually(t, "a connection comes about", func() (is bool) {
					tcp, err = o.client.speak(ap(front, 30080))
					return err == nil
				})
				defer tcp.Close()
				udp, err := o.client.dialUDP(ap(front, 30080))
				must(t, err)
				defer udp.Close()
				for range 3 {
					_, err = sayHello(udp)
					must(t, err)
				}
				sent, stop := o.forger(ap(front, 30080))
				tried, served := 0, 0
				for sent.Load() < 10_000 || served < 10 {
					echo(t, tcp, 1000)
					eventually(t, "a datagram is answered: the flood may fill queues on the way", func() bool {
						_, err := sayHello(udp)
						return err == nil
					})
					// One that is pushed out between two packets of its handshake, by more than there is room for, has to try again.
					eventually(t, "a new client is served during the flood", func() bool {
						tried++
						c, err := o.client.speak(ap(front, 30080))
						if err == nil {
							c.Close()
						}
						return err == nil
					})
					served++
				}
				if n, most := countEntries(d.objs.natNew()), int(d.objs.natNew().MaxEntries()); n == 0 || n > most {
					t.Errorf("%d connections without a handshake; there is room for %d", n, most)
				}
				stop()
				after, err := d.Counters()
				must(t, err)
				if n := after.Outside - before.Outside; n < 5000 {
					t.Errorf("only %d first packets of %d forged ones came by", n, sent.Load())
				}
				// The two that are held, those that were asked and have ended, and none of the flood's.
				if n := countEntries(d.objs.nat()) - exist; n < 2 || n > 2+tried {
					t.Errorf("%d connections are said to exist, of which 2 do and %d have ended", n, tried)
				}
				echo(t, tcp, 100_000)
				if _, err := sayHello(udp); err != nil {
					t.Error("the UDP flow, after the flood: ", err)
				}
			})
			o.say(d)
		})
	}
}
