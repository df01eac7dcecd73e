package datapath

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// The ways in which clients connect, one by one, on the real kernel.

// stream makes a TCP socket of the given kind inside the namespace.
func (n *ns) stream(family, flags, proto int) int {
	n.t.Helper()
	fd := -1
	n.do(func() {
		var err error
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|flags, proto)
		must(n.t, err)
	})
	return fd
}

func (f family) sockaddr(to netip.AddrPort) (int, unix.Sockaddr) {
	s := udpSocket{family: unix.AF_INET}
	if f.mapped || f.vip.Addr().Is6() {
		s.family = unix.AF_INET6
	}
	return s.family, s.sockaddr(to)
}

func greeted(t testing.TB, c net.Conn, err error, want string) {
	t.Helper()
	must(t, err)
	defer c.Close()
	if got, err := greeting(c); err != nil || got != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

func TestMPTCPClientsReachServices(t *testing.T) {
	enabled, err := os.ReadFile("/proc/sys/net/mptcp/enabled")
	if err != nil || strings.TrimSpace(string(enabled)) != "1" {
		t.Fatalf("this kernel has no MPTCP (%s, %v): the test needs CONFIG_MPTCP and net.mptcp.enabled=1", enabled, err)
	}
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		d.Reconciler().SetService(svc("web", fam.vip, ap(fam.of(b), 8080)))
		flush(t, d)
		af, sa := fam.sockaddr(fam.vip)
		fd := client.stream(af, unix.SOCK_NONBLOCK, unix.IPPROTO_MPTCP)
		c, err := finishConnect(fd, sa)
		greeted(t, c, err, "b")
		d.Reconciler().SetService(svc("web", fam.vip))
		flush(t, d)
		fd = client.stream(af, unix.SOCK_NONBLOCK, unix.IPPROTO_MPTCP)
		if _, err := finishConnect(fd, sa); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("no backends: %v, want connection refused", err)
		}
	})
}

func TestFastOpenClientsReachServices(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.serve(8080, func(c *net.TCPConn) {
		defer c.Close()
		line, err := greeting(c)
		if err == nil {
			c.Write([]byte("got " + line + "\n"))
		}
	})
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		d.Reconciler().SetService(svc("web", fam.vip, ap(fam.of(b), 8080)))
		flush(t, d)
		af, sa := fam.sockaddr(fam.vip)
		fd := client.stream(af, 0, 0)
		if err := unix.Sendto(fd, []byte("hello\n"), unix.MSG_FASTOPEN, sa); err != nil {
			unix.Close(fd)
			t.Fatal("sendto with MSG_FASTOPEN:", err)
		}
		c, err := fileConn(fd)
		greeted(t, c, err, "got hello")

		fd = client.stream(af, 0, 0)
		must(t, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1))
		c, err = finishConnect(fd, sa)
		must(t, err)
		_, err = c.Write([]byte("again\n"))
		greeted(t, c, err, "got again")
	})
}

// A socket whose connect failed may connect again, elsewhere or to the same Service.
func TestConnectAfterAFailedConnect(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		af, sa := fam.sockaddr(fam.vip)
		for _, empty := range []bool{true, false} { // refused by us; refused by the endpoint
			s := svc("web", fam.vip)
			if !empty {
				s = svc("web", fam.vip, ap(fam.of(b), 9)) // nobody listens there
			}
			d.Reconciler().SetService(s)
			flush(t, d)
			fd := client.stream(af, 0, 0)
			if err := unix.Connect(fd, sa); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("empty %v: %v, want connection refused", empty, err)
			}
			d.Reconciler().SetService(svc("web", fam.vip, ap(fam.of(b), 8080)))
			flush(t, d)
			c, err := finishConnect(fd, sa)
			greeted(t, c, err, "b")
		}
	})
}

// Node ports on loopback are the host's; a pod's loopback is its own.
func TestNodePortsOnLoopbackAreTheHosts(t *testing.T) {
	w := newWorld(t)
	d := w.open(func(c *Config) { c.HostNetns = w.node.cookie })
	pod, b := w.pod(), w.pod()
	b.server("b", 8080)
	b.udpServer("b", 8080)
	synced(t, d)
	for _, fam := range []family{
		{"v4", netip.MustParseAddrPort("127.0.0.1:30080"), false},
		{"v6", netip.MustParseAddrPort("[::1]:30080"), false},
		{"mapped", netip.MustParseAddrPort("127.0.0.1:30080"), true},
	} {
		t.Run(fam.name, func(t *testing.T) {
			s := &service.Service{Name: service.Name{Namespace: "default", Name: "web"}}
			for _, p := range []service.Protocol{service.TCP, service.UDP} {
				s.Loopback = append(s.Loopback, service.Frontend{Addr: fam.vip, Protocol: p, Kind: service.NodePort,
					Backends: []service.Backend{{Addr: ap(fam.of(b), 8080)}}})
			}
			d.Reconciler().SetService(s)
			flush(t, d)
			if got, err := fam.ask(w.node, fam.vip); err != nil || got != "b" {
				t.Errorf("host, TCP: %q, %v", got, err)
			}
			if got := fam.udp(w.node).ask(fam.vip); got != "b" {
				t.Errorf("host, UDP: %q", got)
			}
			if _, err := fam.ask(pod, fam.vip); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("pod, TCP: %v, want connection refused by its own loopback", err)
			}
			c := fam.udp(pod)
			must(t, c.connect(fam.vip))
			must(t, c.write("who"))
			if _, _, err := c.receive(0); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("pod, UDP: %v, want connection refused by its own loopback", err)
			}
		})
	}
}
