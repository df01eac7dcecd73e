package loop

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// newNetns makes a network namespace with a loopback device that is up and has addr, and returns it.
func newNetns(t *testing.T, addr string) *os.File {
	t.Helper()
	type result struct {
		f   *os.File
		err error
	}
	ch := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- result{err: fmt.Errorf("this test must run as root: unshare: %w", err)}
			return
		}
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			a, _ := netlink.ParseAddr(addr)
			err = errors.Join(netlink.LinkSetUp(lo), netlink.AddrAdd(lo, a))
		}
		f, ferr := os.Open("/proc/thread-self/ns/net")
		ch <- result{f, errors.Join(err, ferr)}
	}()
	r := <-ch
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { r.f.Close() })
	return r.f
}

// inside runs fn on a thread in the namespace.
func inside(t *testing.T, f *os.File, fn func() error) {
	t.Helper()
	ch := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = fn()
		}
		ch <- err
	}()
	if err := <-ch; err != nil {
		t.Fatal(err)
	}
}

func TestDialHappensInThePodsNamespace(t *testing.T) {
	type pod struct {
		f    *os.File
		ns   *Netns
		addr netip.AddrPort
		seen chan string
	}
	pods := make([]*pod, 3)
	for i := range pods {
		p := &pod{f: newNetns(t, fmt.Sprintf("10.99.0.%d/32", i+1)), seen: make(chan string, 100)}
		p.addr = netip.MustParseAddrPort("10.99.0.1:7000")
		if i > 0 {
			p.addr = netip.MustParseAddrPort(fmt.Sprintf("10.99.0.%d:7000", i+1))
		}
		inside(t, p.f, func() error {
			ln, err := net.Listen("tcp", p.addr.String())
			if err != nil {
				return err
			}
			t.Cleanup(func() { ln.Close() })
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					p.seen <- c.RemoteAddr().(*net.TCPAddr).IP.String()
					c.Close()
				}
			}()
			return nil
		})
		pods[i] = p
	}
	l := startLoop(t)
	for i, p := range pods {
		ns, err := NewNetns(p.f, uint64(i+1))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(ns.Close)
		p.ns = ns
	}
	for round := range 4 {
		for i, p := range pods {
			do(t, l, func() { l.Dial(p.ns, p.addr, &hooks{}, nil) })
			select {
			case src := <-p.seen:
				if want := fmt.Sprintf("10.99.0.%d", i+1); src != want {
					t.Errorf("round %d: pod %d was called from %s", round, i, src)
				}
			case <-time.After(patience):
				t.Fatalf("pod %d was not reached", i)
			}
		}
	}
	// The address exists only there: another pod doesn't reach it.
	refused := make(chan error, 1)
	do(t, l, func() {
		l.Dial(pods[1].ns, pods[0].addr, &hooks{connect: func(_ *Conn, err error) { refused <- err }}, &DialOptions{Timeout: time.Second})
	})
	if err := <-refused; err == nil {
		t.Error("a pod's loopback address was reached from another pod")
	}
	// Switches are made only when the namespace differs.
	before := func() (n uint64) { do(t, l, func() { n = l.stats.netnsSwitches }); return }()
	for range 5 {
		do(t, l, func() { l.Dial(pods[2].ns, pods[2].addr, &hooks{}, nil) })
		<-pods[2].seen
	}
	if after := func() (n uint64) { do(t, l, func() { n = l.stats.netnsSwitches }); return }(); after-before > 1 {
		t.Errorf("%d switches for five connections of one pod", after-before)
	}
	// A pod that is gone is a clean error, also for the loop that is inside.
	pods[2].ns.Close()
	errs := make(chan error, 1)
	do(t, l, func() {
		l.Dial(pods[2].ns, pods[2].addr, &hooks{connect: func(_ *Conn, err error) { errs <- err }}, nil)
	})
	if err := <-errs; !errors.Is(err, ErrNetnsGone) {
		t.Errorf("got %v", err)
	}
	do(t, l, func() { l.LeaveNetns(pods[2].ns) })
	do(t, l, func() {
		if l.netns != l.home {
			t.Error("the loop is still inside")
		}
	})
}
