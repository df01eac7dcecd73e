package datapath

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Figures of these are only worth something on a quiet machine, and as ratios within one run.

// BenchmarkCalls is what a system call costs a process that has nothing to do with Services or proxies: without our programs at
// the cgroup root, with them ("not-ours"), and beside that the same call to a Service. For TCP, connect() is a whole handshake over
// veth and a reset, as it is for an application; for UDP it is the call alone, and so tells most of the programs. sendto() goes
// to a socket that nobody reads, so that no wake-up is in it. Each repetition has a world of its own, so -count alternates:
//
//	go test ./pkg/datapath -run '^$' -bench BenchmarkCalls -benchtime 300ms -count 10
func BenchmarkCalls(b *testing.B) {
	for _, six := range []bool{false, true} {
		b.Run(map[bool]string{false: "v4", true: "v6"}[six], func(b *testing.B) {
			w := newWorld(b)
			client, server := w.pod(), w.pod()
			server.serve(8080, func(c *net.TCPConn) { c.Close() })
			sink := server.udp(unix.AF_INET6)
			must(b, unix.Bind(sink.fd, &unix.SockaddrInet6{Port: 5353}))
			addr, vip := server.v4, vip4.Addr()
			if six {
				addr, vip = server.v6, vip6.Addr()
			}
			tcp, udp := ap(addr, 8080), ap(addr, 5353)
			b.Run("without", func(b *testing.B) { calls(b, client, tcp, udp) })
			d := w.open()
			enrol(d, server)
			for i := range 1000 { // maps with something in them
				d.Reconciler().SetService(svc(fmt.Sprint("web", i), ap(vip, uint16(1000+i)), tcp))
			}
			d.Reconciler().SetService(svc("web", ap(vip, 80), tcp))
			d.Reconciler().SetService(udpSvc("dns", ap(vip, 53), udp))
			d.Reconciler().SetClaims([]mesh.Claim{claim(netip.MustParseAddrPort("10.96.99.99:80"))})
			synced(b, d)
			b.Run("not-ours", func(b *testing.B) { calls(b, client, tcp, udp) })
			b.Run("service", func(b *testing.B) { calls(b, client, ap(vip, 80), ap(vip, 53)) })
		})
	}
}

// calls measures each of them from a pod.
func calls(b *testing.B, from *ns, tcp, udp netip.AddrPort) {
	run := func(name string, kind int, to netip.AddrPort, call func(fd int, to unix.Sockaddr) error) {
		b.Run(name, func(b *testing.B) {
			from.do(func() {
				family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port()), Addr: [4]byte(to.Addr().AsSlice()[:4])})
				if to.Addr().Is6() {
					family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
				}
				if name == "connect-tcp" {
					for b.Loop() {
						must(b, connectAndReset(family, sa))
					}
					return
				}
				fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
				must(b, err)
				defer unix.Close(fd)
				if name != "sendto-udp" {
					must(b, unix.Connect(fd, sa))
				}
				for b.Loop() {
					must(b, call(fd, sa))
				}
			})
		})
	}
	peer := func(fd int, _ unix.Sockaddr) error { _, err := unix.Getpeername(fd); return err }
	datagram := make([]byte, 64)
	run("connect-tcp", unix.SOCK_STREAM, tcp, nil)
	run("connect-udp", unix.SOCK_DGRAM, udp, unix.Connect)
	run("sendto-udp", unix.SOCK_DGRAM, udp, func(fd int, to unix.Sockaddr) error { return unix.Sendto(fd, datagram, 0, to) })
	run("getpeername-tcp", unix.SOCK_STREAM, tcp, peer)
	run("getpeername-udp", unix.SOCK_DGRAM, udp, peer)
}

// connectAndReset is connect, accept by the kernel, and reset, with as little else as possible.
func connectAndReset(family int, sa unix.Sockaddr) error {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	err = unix.Connect(fd, sa)
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
	return err
}

// BenchmarkPingPong is 64 bytes there and back between two pods, over veth and redirected.
func BenchmarkPingPong(b *testing.B) {
	for _, on := range []bool{false, true} {
		name := "veth"
		if on {
			name = "redirected"
		}
		b.Run(name, func(b *testing.B) {
			w := newWorld(b)
			d := w.open(func(c *Config) { c.AcceleratePods = on })
			client, server := w.pod(), w.pod()
			enrol(d, client, server)
			synced(b, d)
			server.serve(8080, func(c *net.TCPConn) {
				defer c.Close()
				io.Copy(onlyWriter{c}, onlyReader{c})
			})
			c, err := client.dial(ap(server.v4, 8080))
			must(b, err)
			defer c.Close()
			c.SetDeadline(time.Time{})
			buf := make([]byte, 64)
			for b.Loop() {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkOneEndpointChanges is the cost of a change in a Service of a thousand endpoints, of ten, and of one.
func BenchmarkOneEndpointChanges(b *testing.B) {
	for _, n := range []int{1, 10, 1000} {
		b.Run(fmt.Sprint(n, " endpoints"), func(b *testing.B) {
			w := newWorld(b)
			d := w.open()
			synced(b, d)
			var addrs []netip.AddrPort
			for i := range n {
				addrs = append(addrs, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 80))
			}
			i := 0
			for b.Loop() {
				i++
				addrs[0] = netip.AddrPortFrom(addrs[0].Addr(), uint16(1+i%60000))
				d.Reconciler().SetService(svc("web", vip4, addrs...))
				flush(b, d)
			}
		})
	}
}
