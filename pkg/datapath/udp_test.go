package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// UDP inside: what sendto and recvfrom do, and connected sockets, on plain system calls, because Go, Python and C wrap
// them differently and all come down to these.

// udpSvc makes a Service of one UDP frontend.
func udpSvc(name string, front netip.AddrPort, backends ...netip.AddrPort) *service.Service {
	s := svc(name, front, backends...)
	s.Frontends[0].Protocol = service.UDP
	return s
}

// udpSocket is a datagram socket with a receive time-out.
type udpSocket struct {
	t      testing.TB
	fd     int
	family int
}

func (n *ns) udp(family int) *udpSocket {
	n.t.Helper()
	s := &udpSocket{t: n.t, family: family}
	n.do(func() {
		var err error
		s.fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		must(n.t, err)
	})
	must(n.t, unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}))
	n.t.Cleanup(s.close)
	return s
}

func (s *udpSocket) close() {
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
	}
}

func (s *udpSocket) sockaddr(to netip.AddrPort) unix.Sockaddr {
	if s.family == unix.AF_INET6 {
		return &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
}

func addrOf(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}

func (s *udpSocket) connect(to netip.AddrPort) error { return unix.Connect(s.fd, s.sockaddr(to)) }

func (s *udpSocket) send(to netip.AddrPort, text string) error {
	return unix.Sendto(s.fd, []byte(text), 0, s.sockaddr(to))
}

// write sends on a connected socket.
func (s *udpSocket) write(text string) error {
	_, err := unix.Write(s.fd, []byte(text))
	return err
}

func (s *udpSocket) receive(flags int) (text string, from netip.AddrPort, err error) {
	b := make([]byte, 2048)
	n, sa, err := unix.Recvfrom(s.fd, b, flags)
	for err == unix.EINTR { // a signal of Go's scheduler; a socket with a time-out doesn't restart the call
		n, sa, err = unix.Recvfrom(s.fd, b, flags)
	}
	if err != nil {
		return "", netip.AddrPort{}, err
	}
	return string(b[:n]), addrOf(sa), nil
}

// ask sends and reads the answer, which must come from whom it was sent to.
func (s *udpSocket) ask(to netip.AddrPort) string {
	s.t.Helper()
	if err := s.send(to, "who"); err != nil {
		s.t.Fatalf("send to %v: %v", to, err)
	}
	text, from, err := s.receive(0)
	if err != nil {
		s.t.Fatalf("no answer from %v: %v", to, err)
	}
	if from != to {
		s.t.Errorf("sent to %v, and the answer shows %v", to, from)
	}
	return text
}

// udpServer answers every datagram with its name, from the address that it came to. What says "hold" is answered only when
// release is called.
type udpServer struct {
	fd   int
	mu   sync.Mutex
	held []unix.Sockaddr // guarded by mu
	name string
}

func (n *ns) udpServer(name string, port uint16) *udpServer {
	n.t.Helper()
	s := &udpServer{name: name}
	n.do(func() {
		var err error
		s.fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		must(n.t, err)
		must(n.t, unix.Bind(s.fd, &unix.SockaddrInet6{Port: int(port)}))
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 2048)
		for {
			m, from, err := unix.Recvfrom(s.fd, b, 0)
			if err != nil || from == nil {
				return
			}
			if string(b[:m]) == "hold" {
				s.mu.Lock()
				s.held = append(s.held, from)
				s.mu.Unlock()
				continue
			}
			unix.Sendto(s.fd, []byte(name), 0, from)
		}
	}()
	n.t.Cleanup(func() {
		unix.Shutdown(s.fd, unix.SHUT_RDWR)
		<-done
		unix.Close(s.fd)
	})
	return s
}

func (s *udpServer) holds() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.held)
}

func (s *udpServer) release(t testing.TB) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, to := range s.held {
		must(t, unix.Sendto(s.fd, []byte("late "+s.name), 0, to))
	}
	s.held = nil
}

func (f family) udp(n *ns) *udpSocket {
	if f.mapped || f.vip.Addr().Is6() {
		return n.udp(unix.AF_INET6)
	}
	return n.udp(unix.AF_INET)
}

func TestUDPAnswersComeFromTheServiceAddress(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.udpServer("b", 5353)
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		d.Reconciler().SetService(udpSvc("dns", fam.vip, ap(fam.of(b), 5353)))
		flush(t, d)
		for name, n := range map[string]*ns{"pod": client, "host process": w.node} {
			s := fam.udp(n)
			if got := s.ask(fam.vip); got != "b" {
				t.Errorf("%s: got %q", name, got)
			}
			must(t, s.send(fam.vip, "who"))
			_, from, err := s.receive(unix.MSG_PEEK)
			must(t, err)
			_, again, err := s.receive(0)
			must(t, err)
			if from != fam.vip || again != fam.vip {
				t.Errorf("%s: peeked from %v, read from %v; want %v", name, from, again, fam.vip)
			}
			c := fam.udp(n)
			must(t, c.connect(fam.vip))
			must(t, c.write("who"))
			text, from, err := c.receive(0)
			if err != nil || text != "b" || from != fam.vip {
				t.Errorf("%s, connected: %q from %v, %v", name, text, from, err)
			}
			peer, err := unix.Getpeername(c.fd)
			must(t, err)
			if addrOf(peer) != fam.vip {
				t.Errorf("%s: getpeername says %v, want %v", name, addrOf(peer), fam.vip)
			}
		}
	})
}

func TestUDPWithoutBackendsRefusesAtOnce(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client := w.pod()
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		d.Reconciler().SetService(udpSvc("dns", fam.vip))
		flush(t, d)
		s := fam.udp(client)
		if err := s.connect(fam.vip); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("connect: %v, want connection refused", err)
		}
		if err := s.send(fam.vip, "who"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("sendto: %v, want connection refused", err)
		}
		if _, err := unix.SendmsgN(s.fd, []byte("who"), nil, s.sockaddr(fam.vip), 0); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("sendmsg: %v, want connection refused", err)
		}
	})
}

func TestUDPSocketStaysWithItsBackendUntilThatIsGone(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client := w.pod()
	const n = 4
	pods, servers := map[string]*ns{}, map[string]*udpServer{}
	for i := range n {
		name := fmt.Sprint("b", i)
		pods[name] = w.pod()
		servers[name] = pods[name].udpServer(name, 5353)
	}
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		left := map[string]bool{}
		for name := range pods {
			left[name] = true
		}
		set := func() {
			var addrs []netip.AddrPort
			for name := range left {
				addrs = append(addrs, ap(fam.of(pods[name]), 5353))
			}
			d.Reconciler().SetService(udpSvc("dns", fam.vip, addrs...))
			flush(t, d)
		}
		set()
		s := fam.udp(client)
		for len(left) > 1 {
			first := s.ask(fam.vip)
			for range 20 {
				if got := s.ask(fam.vip); got != first {
					t.Fatalf("went from %s to %s, which is as good", first, got)
				}
			}
			must(t, s.send(fam.vip, "hold"))
			eventually(t, "the backend has the datagram", func() bool { return servers[first].holds() == 1 })
			delete(left, first)
			set()
			next := s.ask(fam.vip)
			if next == first {
				t.Fatalf("still goes to %s, which is gone", first)
			}
			servers[first].release(t)
			text, from, err := s.receive(0)
			if err != nil || text != "late "+first || from != fam.vip {
				t.Errorf("the late answer is %q from %v, %v; want it from %v", text, from, err, fam.vip)
			}
		}
	})
	c, err := d.Counters()
	must(t, err)
	if c.UdpRepicked != 3*(n-1) {
		t.Errorf("counted %d moves, want %d", c.UdpRepicked, 3*(n-1))
	}
}

// A socket that talks to more Services at once than its storage has room for, some of which have the same backend.
func TestUDPSocketTalksToManyServicesAtOnce(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	const n = 12
	for i := range n {
		b.udpServer(fmt.Sprint("b", i), uint16(6000+i))
	}
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		front := func(i int) netip.AddrPort { return ap(fam.vip.Addr(), uint16(5000+i)) }
		for i := range n {
			d.Reconciler().SetService(udpSvc(fmt.Sprint("s", i), front(i), ap(fam.of(b), uint16(6000+i/2*2))))
		}
		flush(t, d)
		s := fam.udp(client)
		for range 3 {
			for i := range n {
				must(t, s.send(front(i), "who"))
				text, from, err := s.receive(0)
				if want := fmt.Sprint("b", i/2*2); err != nil || text != want || from != front(i) {
					t.Errorf("asked %v: %q from %v, %v; want %s", front(i), text, from, err, want)
				}
			}
		}
	})
}

func TestUDPSocketThatAlsoTalksToABackendItself(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.udpServer("b", 5353)
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		d.Reconciler().SetService(udpSvc("dns", fam.vip, ap(fam.of(b), 5353)))
		flush(t, d)
		s := fam.udp(client)
		for range 2 {
			s.ask(fam.vip) // both check whom the answer shows
			s.ask(ap(fam.of(b), 5353))
		}
	})
}

// connect to nobody, to a Service again, and to what is no Service.
func TestUDPSocketConnectsAgain(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, a, b := w.pod(), w.pod(), w.pod()
	a.udpServer("a", 5353)
	b.udpServer("b", 5353)
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		other := ap(fam.vip.Addr(), 81)
		d.Reconciler().SetService(udpSvc("one", fam.vip, ap(fam.of(a), 5353)))
		d.Reconciler().SetService(udpSvc("two", other, ap(fam.of(b), 5353)))
		flush(t, d)
		s := fam.udp(client)
		for _, to := range []struct {
			addr netip.AddrPort
			name string
		}{{fam.vip, "a"}, {other, "b"}, {ap(fam.of(b), 5353), "b"}, {fam.vip, "a"}} {
			must(t, s.connect(to.addr))
			must(t, s.write("who"))
			text, from, err := s.receive(0)
			peer, _ := unix.Getpeername(s.fd)
			if err != nil || text != to.name || from != to.addr || addrOf(peer) != to.addr {
				t.Errorf("connected to %v: %q from %v, peer %v, %v", to.addr, text, from, addrOf(peer), err)
			}
			raw := unix.RawSockaddrInet4{Family: unix.AF_UNSPEC}
			if _, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(s.fd), uintptr(ptrOf(&raw)), unix.SizeofSockaddrInet4); e != 0 {
				t.Fatal("connect(AF_UNSPEC):", e)
			}
			// The same peer: a disconnected AF_INET6 socket hears nobody else, whoever runs below it (sk_v6_daddr stays).
			if got := s.ask(to.addr); got != to.name {
				t.Errorf("unconnected again: %q", got)
			}
		}
	})
}

func TestTCPAndUDPOfOnePortAreDistinct(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, a, b := w.pod(), w.pod(), w.pod()
	a.server("tcp", 8080)
	b.udpServer("udp", 5353)
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		s := svc("both", fam.vip, ap(fam.of(a), 8080))
		s.Frontends = append(s.Frontends, udpSvc("both", fam.vip, ap(fam.of(b), 5353)).Frontends...)
		d.Reconciler().SetService(s)
		flush(t, d)
		if got, err := fam.ask(client, fam.vip); err != nil || got != "tcp" {
			t.Errorf("TCP: %q, %v", got, err)
		}
		if got := fam.udp(client).ask(fam.vip); got != "udp" {
			t.Errorf("UDP: %q", got)
		}
	})
}
