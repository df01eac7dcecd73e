package pod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// start runs a Manager on a world until the test ends.
func start(t *testing.T, w *world) (*Manager, *witness) {
	t.Helper()
	see := newWitness(t)
	m, err := New(Config{NetnsDir: w.dir, Handler: see})
	if err != nil {
		t.Fatal(err)
	}
	run(t, m)
	t.Cleanup(see.closeAll)
	return m, see
}

func run(t *testing.T, m *Manager) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// ready waits until a pod is announced with a number of listeners.
func ready(t *testing.T, m *Manager, see *witness, uid string, listeners int) seen {
	t.Helper()
	defer func() {
		if t.Failed() {
			for _, s := range m.Status() {
				t.Logf("%s: ready %v, %s", s.UID, s.Ready, s.Reason)
			}
		}
	}()
	eventually(t, fmt.Sprintf("pod %s with %d listeners", uid, listeners), func() bool {
		s, ok := see.get(uid)
		return ok && len(s.listeners) == listeners
	})
	s, _ := see.get(uid)
	return s
}

// reason waits until Status gives a reason that contains text.
func reason(t *testing.T, m *Manager, uid, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("pod %s: reason %q", uid, text), func() bool {
		for _, s := range m.Status() {
			if s.UID == uid && strings.Contains(s.Reason, text) {
				return true
			}
		}
		return false
	})
}

func gone(t *testing.T, see *witness, uid string) {
	t.Helper()
	eventually(t, "pod "+uid+" gone", func() bool { _, ok := see.get(uid); return !ok })
}

// cookieOf reads a namespace's cookie through its file.
func (w *world) cookieOf(name string) (cookie uint64) {
	w.t.Helper()
	w.in(name, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		cookie, err = netnsCookie(fd)
		return err
	})
	return cookie
}

func TestAPodIsFoundByItsAddressOfEitherFamily(t *testing.T) {
	for _, order := range []string{"namespace first", "pod first"} {
		for _, ip := range []string{"10.1.2.3", "fd00::1:3"} {
			t.Run(order+" "+ip, func(t *testing.T) {
				w := newWorld(t)
				m, see := start(t, w)
				net := podNet{addrs: []string{ip + "/64"}}
				if netip.MustParseAddr(ip).Is4() {
					net.addrs = []string{ip + "/24"}
				}
				if order == "pod first" {
					m.SetPods([]Spec{spec("a", ip)})
					reason(t, m, "a", "no network namespace under")
				}
				w.pod("cni-a", net)
				w.pod("cni-b", podNet{addrs: []string{"10.1.2.4/24"}})
				m.SetPods([]Spec{spec("a", ip)})
				p := ready(t, m, see, "a", 2)
				if want := w.cookieOf("cni-a"); p.Cookie != want || p.NetnsName != "cni-a" {
					t.Errorf("found in %s (cookie %d), want cni-a (%d)", p.NetnsName, p.Cookie, want)
				}
			})
		}
	}
}

func TestListenersAreOnThePodsLoopbackAndReadyForTheProxy(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	m.SetPod(spec("a", "10.0.0.1"))
	p := ready(t, m, see, "a", 2)
	for i, addr := range []string{"127.0.0.1:15001", "[::1]:15001"} {
		fd := p.listeners[i]
		w.in("a", func() error { // Dialled inside; accepted outside.
			conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
			if err == nil {
				defer conn.Close()
			}
			return err
		})
		accepted, _, err := unix.Accept(fd)
		if err != nil {
			t.Fatalf("accept on %s: %v", addr, err)
		}
		_ = unix.Close(accepted)
		if _, _, err := unix.Accept(fd); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("%s blocks: %v", addr, err)
		}
		if flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s survives exec", addr)
		}
		if protocol, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); protocol != unix.IPPROTO_TCP {
			t.Errorf("%s is protocol %d, want plain TCP", addr, protocol)
		}
		if cookie, _ := netnsCookie(fd); cookie != p.Cookie {
			t.Errorf("%s is in namespace %d, want %d", addr, cookie, p.Cookie)
		}
	}
	if _, err := net.DialTimeout("tcp", "127.0.0.1:15001", time.Second); err == nil {
		t.Error("the node can reach the pod's listener")
	}
	if _, id, err := openNetns(p.Netns.Name()); err != nil || func() spaceID { i, _ := identify(int(p.Netns.Fd())); return i }() != id {
		t.Errorf("Netns is not the pod's namespace: %v", err)
	}
}

func TestAnAddressThatComesLateIsNoticed(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	m.SetPod(spec("a", "10.0.0.9"))
	reason(t, m, "a", "owns 10.0.0.9")
	w.in("a", func() error { return addAddr("10.0.0.9/24") })
	ready(t, m, see, "a", 2)
}

func TestANamespaceIsFoundWhenItsFileIsMountedLater(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	m.SetPod(spec("a", "10.0.0.1"))
	ns := w.make(podNet{addrs: []string{"10.0.0.1/24"}})
	defer ns.Close()
	w.touch("a")
	time.Sleep(150 * time.Millisecond) // Long enough to be looked at several times.
	w.mount("a", ns)
	ready(t, m, see, "a", 2)
}

func TestTheFolderMayAppearLater(t *testing.T) {
	w := newWorld(t)
	w.dir += "/run/netns"
	m, see := start(t, w)
	m.SetPod(spec("a", "10.0.0.1"))
	reason(t, m, "a", "no network namespace under")
	if err := os.MkdirAll(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	ready(t, m, see, "a", 2)
}

func TestLoopbackDownIsReportedAndRetried(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}, loDown: true})
	m.SetPod(spec("a", "10.0.0.1"))
	reason(t, m, "a", "loopback device in the pod's network namespace is down")
	w.in("a", func() error { return linkUp("lo") })
	ready(t, m, see, "a", 2)
	eventually(t, "no reason left", func() bool { return m.Status()[0].Reason == "" })
}

func TestAPodWithoutIPv6HasOneListener(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}, noIPv6: true})
	m.SetPod(spec("a", "10.0.0.1"))
	ready(t, m, see, "a", 1)

	// IPv6 is switched on in the running pod: it starts afresh, with both.
	w.in("a", func() error {
		for _, dev := range []string{"all", "lo"} {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+dev+"/disable_ipv6", []byte("0"), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	p := ready(t, m, see, "a", 2)
	if len(p.files) != 1 {
		t.Errorf("%d descriptors of the namespace, want 1", len(p.files))
	}
}

func TestAPortThatThePodUsesItselfIsReported(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	var squatter net.Listener
	w.in("a", func() (err error) {
		squatter, err = net.Listen("tcp4", "127.0.0.1:15001")
		return err
	})
	m.SetPod(spec("a", "10.0.0.1"))
	reason(t, m, "a", "a process of the pod holds this port")
	_ = squatter.Close()
	ready(t, m, see, "a", 2)
}

func TestEnrolmentChangesLive(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	p := spec("a", "10.0.0.1")
	p.Enrolled = false
	m.SetPod(p)
	if s := ready(t, m, see, "a", 0); s.Cookie == 0 || s.Enrolled {
		t.Errorf("a pod that is not enrolled is still found: %+v", s.Pod)
	}
	for range 3 {
		p.Enrolled = true
		m.SetPod(p)
		ready(t, m, see, "a", 2)
		p.Enrolled = false
		m.SetPod(p)
		if s := ready(t, m, see, "a", 0); s.Enrolled {
			t.Error("still enrolled")
		}
		w.in("a", func() error {
			if c, err := net.DialTimeout("tcp", "127.0.0.1:15001", 5*time.Second); err == nil {
				_ = c.Close()
				return fmt.Errorf("the listener of a pod that is no longer enrolled still answers")
			}
			return nil
		})
	}
}

func TestAChangedDescriptionIsAnnouncedWithoutNewSockets(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24", "fd00::1/64"}})
	m.SetPod(spec("a", "10.0.0.1"))
	ready(t, m, see, "a", 2)
	p := spec("a", "10.0.0.1", "fd00::1")
	p.AccelerateBlocking = true
	m.SetPod(p)
	eventually(t, "the new description", func() bool { s, _ := see.get("a"); return s.AccelerateBlocking && len(s.IPs) == 2 })
	if s, _ := see.get("a"); len(s.listeners) != 2 || s.Netns != nil {
		t.Errorf("got sockets again: %+v", s)
	}
}

func TestIgnoredPodsAreNotServed(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	p := spec("a", "10.0.0.1")
	m.SetPod(p)
	ready(t, m, see, "a", 2)
	p.Ignored = true // Succeeded or Failed.
	m.SetPod(p)
	gone(t, see, "a")
	reason(t, m, "a", "terminated")
}

func TestTheAgentsOwnNamespaceIsNobodys(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	own, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	w.touch("host")
	w.mount("host", own)
	w.touch("junk")
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.(*net.IPNet).IP); ok && !ip.IsLoopback() {
			m.SetPod(spec("host", ip.Unmap().String()))
		}
	}
	m.SetPod(spec("lo", "127.0.0.1"))
	w.pod("a", podNet{addrs: []string{"10.99.0.1/24"}})
	m.SetPod(spec("a", "10.99.0.1"))
	ready(t, m, see, "a", 2)
	if see.count() != 1 {
		t.Errorf("found %d pods, want 1", see.count())
	}
}

func TestOpenInNetnsBringsTheThreadHome(t *testing.T) {
	w := newWorld(t)
	before, err := identifyPath("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		inside := spaceID{}
		if err := OpenInNetns(w.node, func() (err error) {
			inside, err = identifyPath("/proc/thread-self/ns/net")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if inside == before {
			t.Fatal("not inside")
		}
	}
	// Every thread of the process is at home. One that an earlier test locked into a namespace may still be ending.
	var away []string
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		away = away[:0]
		for _, task := range tasks {
			if id, err := identifyPath("/proc/self/task/" + task.Name() + "/ns/net"); err == nil && id != before {
				away = append(away, task.Name())
			}
		}
		if len(away) == 0 || time.Now().After(deadline) {
			break
		}
	}
	if len(away) > 0 {
		t.Errorf("threads %v stay in another namespace", away)
	}
	if err := OpenInNetns(w.node, func() error { return os.ErrInvalid }); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("the error of open is lost: %v", err)
	}
	runtime.KeepAlive(w)
}
