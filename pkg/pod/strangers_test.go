package pod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// agents stands for the datapath's memory of listeners that agents made.
type agents struct {
	mu      sync.Mutex
	cookies map[uint64]bool // guarded by mu
}

func (a *agents) own(fd int) error {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cookies[cookie] = true
	return err
}

func (a *agents) owns(cookie uint64) (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cookies[cookie], nil
}

// startKnown runs a Manager that knows its own listeners and those of other Managers of a.
func startKnown(t *testing.T, w *world, a *agents) (*Manager, *witness) {
	t.Helper()
	see := newWitness(t)
	m, err := New(Config{NetnsDir: w.dir, Handler: see, Own: a.own, Owns: a.owns})
	if err != nil {
		t.Fatal(err)
	}
	run(t, m)
	t.Cleanup(see.closeAll)
	return m, see
}

// join listens in the pod beside whoever is there, as the agent's own user may: the kernel spreads connections over both.
func (w *world) join(name, addr string) (l net.Listener) {
	w.t.Helper()
	w.in(name, func() (err error) {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		}}
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(context.Background(), "tcp", addr)
		return err
	})
	w.t.Cleanup(func() { _ = l.Close() })
	return l
}

// Whoever listens on the proxy's address before the agent came would share the pod's connections with it: the pod is
// enrolled without listeners, so its connections meet the fail mode, and its status says why, until the stranger goes.
func TestAStrangerThatWasThereFirstIsSaid(t *testing.T) {
	for i, addr := range []string{"127.0.0.1:15001", "[::1]:15001"} {
		w := newWorld(t)
		m, see := startKnown(t, w, &agents{cookies: map[uint64]bool{}})
		w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
		stranger := w.join("a", addr)
		m.SetPod(spec("a", "10.0.0.1"))
		reason(t, m, "a", fmt.Sprintf("a process of the pod (user id 0) listens on %s", addr))
		s := ready(t, m, see, "a", 0)
		if !s.Enrolled {
			t.Errorf("%d: the pod must stay enrolled, so that its connections meet the fail mode", i)
		}
		for _, st := range m.Status() {
			if st.Ready {
				t.Error("the pod looks ready")
			}
		}
		_ = stranger.Close()
		ready(t, m, see, "a", 2)
	}
}

// One that comes later, past a bind hook that the kernel doesn't have, is noticed and ends the service of the pod.
func TestAStrangerThatComesLaterIsNoticed(t *testing.T) {
	w := newWorld(t)
	m, see := startKnown(t, w, &agents{cookies: map[uint64]bool{}})
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	m.SetPod(spec("a", "10.0.0.1"))
	ready(t, m, see, "a", 2)
	stranger := w.join("a", "127.0.0.1:15001")
	reason(t, m, "a", "a process of the pod (user id 0) listens on 127.0.0.1:15001")
	ready(t, m, see, "a", 0)
	_ = stranger.Close()
	ready(t, m, see, "a", 2)
}

// A listener that an agent made is no stranger (an upgrade), nor is one on another address of the port: the kernel prefers
// the exact address, which is the proxy's.
func TestAnotherAgentIsNoStranger(t *testing.T) {
	w := newWorld(t)
	both := &agents{cookies: map[uint64]bool{}}
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	w.join("a", netip.AddrPortFrom(netip.IPv4Unspecified(), DefaultOutboundPort).String())
	for range 2 {
		m, see := startKnown(t, w, both)
		m.SetPod(spec("a", "10.0.0.1"))
		ready(t, m, see, "a", 2)
	}
}

// A process of another user never gets into the group: the kernel compares user ids.
func TestAnotherUserCannotListenBesideTheProxy(t *testing.T) {
	w := newWorld(t)
	m, see := startKnown(t, w, &agents{cookies: map[uint64]bool{}})
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	m.SetPod(spec("a", "10.0.0.1"))
	ready(t, m, see, "a", 2)
	for _, addr := range []netip.Addr{loopback4, loopback6} {
		var errs []error
		w.in("a", func() error {
			// The thread alone becomes nobody, and is given up afterwards.
			_, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0))
			if errno != 0 {
				return errno
			}
			fd, err := listen(netip.AddrPortFrom(addr, DefaultOutboundPort), &Config{})
			if err == nil {
				closeFD(fd)
			}
			errs = append(errs, err)
			_, _, errno = syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), 0, ^uintptr(0))
			if errno != 0 {
				panic(errno)
			}
			return nil
		})
		if len(errs) != 1 || !errors.Is(errs[0], unix.EADDRINUSE) {
			t.Errorf("%s: %v, want EADDRINUSE", addr, errs)
		}
	}
}
