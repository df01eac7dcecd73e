// Package selftest tries the datapath's programs on real sockets, in a network namespace of its own, before any pod's
// connection is accelerated: what the kernel is said to do is not what a patched, hardened or newer kernel does.
//
// stage.go makes pairs of connected sockets, redirected or not; selftest.go has the cases. tests/traps uses the same
// stage for every trap that we know of sockmap.
package selftest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
)

// Addresses of documentation (RFC 5737, RFC 3849), which are no pod's.
var (
	addr4 = netip.MustParseAddr("192.0.2.77")
	addr6 = netip.MustParseAddr("2001:db8::77")
)

// Family is how a pair of sockets talks.
type Family string

// The three families: an AF_INET6 socket with v4-mapped addresses is the third.
const (
	IPv4   Family = "v4"
	IPv6   Family = "v6"
	Mapped Family = "mapped"
)

// Families are all of them.
var Families = []Family{IPv4, IPv6, Mapped}

// Sockaddr is a port of the stage's address as sockets of this family name it, with their domain.
func (f Family) Sockaddr(port int) (domain int, sa unix.Sockaddr) {
	switch f {
	case IPv4:
		return unix.AF_INET, &unix.SockaddrInet4{Addr: addr4.As4(), Port: port}
	case Mapped:
		return unix.AF_INET6, &unix.SockaddrInet6{Addr: addr4.As16(), Port: port}
	default:
		return unix.AF_INET6, &unix.SockaddrInet6{Addr: addr6.As16(), Port: port}
	}
}

// Port is the local port of a socket.
func Port(fd int) (int, error) {
	name, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	switch a := name.(type) {
	case *unix.SockaddrInet4:
		return a.Port, nil
	case *unix.SockaddrInet6:
		return a.Port, nil
	}
	return 0, fmt.Errorf("a socket with the name %v", name)
}

// Stage is a network namespace in which connections of the agent's own sockets are redirected.
type Stage struct {
	d      *datapath.Datapath
	cookie uint64
	work   chan func()
	end    func() error
}

// NewStage makes the namespace; Close gives it back.
func NewStage(d *datapath.Datapath) (*Stage, error) {
	s := &Stage{d: d, work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread and, with its sockets, the namespace end with the goroutine
		ready <- s.enter()
		for f := range s.work {
			f()
		}
	}()
	err := <-ready
	if err == nil {
		s.end, err = d.Rehearse(s.cookie, addr4, addr6)
	}
	if err != nil {
		close(s.work)
		return nil, err
	}
	return s, nil
}

func (s *Stage) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, a := range []netip.Addr{addr4, addr6} {
		ip := net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
		if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: &ip, Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("add %s to lo: %w", a, err)
		}
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	// The kernel makes an IPv6 address usable some time later; a connection that comes before it never gets through.
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		routes, err := netlink.RouteGet(addr6.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s does not become usable: %w", addr6, err)
		}
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	s.cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return err
}

// Do runs f inside the namespace.
func (s *Stage) Do(f func()) {
	done := make(chan struct{})
	s.work <- func() { defer close(done); f() }
	<-done
}

// Close ends the namespace, as soon as its sockets are closed.
func (s *Stage) Close() error {
	close(s.work)
	return s.end()
}

// Pair is one TCP connection: Proxy is the connecting end, App the accepted one. Both are non-blocking.
type Pair struct {
	Proxy, App int
	d          *datapath.Datapath
}

// Pair connects two sockets; redirected: as the proxy does, so that their bytes go socket to socket.
func (s *Stage) Pair(fam Family, redirected bool) (p *Pair, err error) {
	p = &Pair{Proxy: -1, App: -1, d: s.d}
	s.Do(func() { err = p.connect(s, fam, redirected) })
	if err == nil {
		err = Wait(p.Proxy, unix.POLLOUT)
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (p *Pair) connect(s *Stage, fam Family, redirected bool) error {
	domain, anyPort := fam.Sockaddr(0)
	const flags = unix.SOCK_STREAM | unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC
	l, err := unix.Socket(domain, flags, 0)
	if err != nil {
		return err
	}
	defer unix.Close(l)
	if err := unix.Bind(l, anyPort); err != nil {
		return fmt.Errorf("bind to the stage's %s address: %w", fam, err)
	}
	if err := unix.Listen(l, 1); err != nil {
		return err
	}
	port, err := Port(l)
	if err != nil {
		return err
	}
	if p.Proxy, err = unix.Socket(domain, flags, 0); err != nil {
		return err
	}
	if redirected {
		if err := s.d.Own(p.Proxy); err != nil {
			return err
		}
	}
	_, to := fam.Sockaddr(port)
	if err := unix.Connect(p.Proxy, to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("connect to the stage's %s address: %w", fam, err)
	}
	if err := Wait(l, unix.POLLIN); err != nil {
		return err
	}
	p.App, _, err = unix.Accept4(l, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	return err
}

// Close closes what is open of the pair.
func (p *Pair) Close() {
	for _, fd := range []*int{&p.Proxy, &p.App} {
		if *fd >= 0 {
			_ = unix.Close(*fd)
			*fd = -1
		}
	}
}

// Sends tells how the bytes of one end travel: redirect, tcp, empty before the first or for a socket that isn't ours.
func (p *Pair) Sends(fd int) string {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return ""
	}
	how, err := p.d.Sends(cookie)
	if err != nil {
		return ""
	}
	return how
}

// patience bounds every wait. Generous: a node that is busy while its agent starts is not a kernel that fails.
const patience = 5 * time.Second

// errTimeout: nothing came.
var errTimeout = errors.New("nothing happened in time")

// Wait polls for events.
func Wait(fd int, events int16) error {
	end := time.Now().Add(patience)
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: events}}
		n, err := unix.Poll(p, int(max(0, time.Until(end).Milliseconds())))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return errTimeout
		default:
			return nil
		}
	}
}

// Write writes all of b, waiting where it must.
func Write(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if errors.Is(err, unix.EAGAIN) {
			if err = Wait(fd, unix.POLLOUT); err == nil {
				continue
			}
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// Read reads n bytes, fewer only at the end of the stream or with an error.
func Read(fd, n int) ([]byte, error) {
	b := make([]byte, n)
	got := 0
	for got < n {
		m, err := unix.Read(fd, b[got:])
		if errors.Is(err, unix.EAGAIN) {
			if err = Wait(fd, unix.POLLIN); err == nil {
				continue
			}
		}
		if err != nil {
			return b[:got], err
		}
		if m == 0 {
			break
		}
		got += m
	}
	return b[:got], nil
}
