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

// connects measures connect, accept by the kernel, and reset, with as little else as possible.
func connects(b *testing.B, from *ns, to netip.AddrPort) {
	from.do(func() {
		sa := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
		for b.Loop() {
			must(b, connectAndReset(sa))
		}
	})
}

func connectAndReset(sa unix.Sockaddr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	err = unix.Connect(fd, sa)
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
	return err
}

// BenchmarkConnect is what our hooks cost a connect(): of a process that has nothing to do with us, and to a Service.
func BenchmarkConnect(b *testing.B) {
	w := newWorld(b)
	client, server := w.pod(), w.pod()
	server.serve(8080, func(c *net.TCPConn) { c.Close() })
	direct := ap(server.v4, 8080)
	b.Run("no hooks", func(b *testing.B) { connects(b, client, direct) })
	d := w.open()
	enrol(d, server)
	for i := range 1000 {
		d.Reconciler().SetService(svc("web", netip.AddrPortFrom(vip4.Addr(), uint16(80+i)), direct))
	}
	d.Reconciler().SetService(svc("web", vip4, direct))
	d.Reconciler().SetClaims([]mesh.Claim{claim(vip6)})
	synced(b, d)
	b.Run("not ours", func(b *testing.B) { connects(b, client, direct) })
	b.Run("Service", func(b *testing.B) { connects(b, client, vip4) })
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
