package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// patience only ends a hung test.
const patience = 30 * time.Second

// world is two network namespaces with a cable between them: a pod, and a server beyond.
type world struct {
	pod, server *os.File
	podIPs      []netip.Addr // v4, v6
	serverIPs   []netip.Addr
	own         func(fd int) error // told of listeners in the pod; nil: nobody is
}

// inNetns runs fn on a thread of its own in the namespace (nil: a fresh one).
func inNetns(t testing.TB, f *os.File, fn func() error) {
	t.Helper()
	ch := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with the goroutine
		var err error
		if f == nil {
			err = unix.Unshare(unix.CLONE_NEWNET)
		} else {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = fn()
		} else {
			err = fmt.Errorf("this test must run as root: %w", err)
		}
		ch <- err
	}()
	if err := <-ch; err != nil {
		t.Fatal(err)
	}
}

func newNetns(t testing.TB) (f *os.File) {
	inNetns(t, nil, func() (err error) {
		f, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	t.Cleanup(func() { f.Close() })
	return f
}

// newWorldOf is the world in two namespaces that are there.
func newWorldOf(pod, server *os.File) *world {
	w := &world{pod: pod, server: server}
	for _, s := range []string{"10.98.0.1", "fd98::1"} {
		w.podIPs = append(w.podIPs, netip.MustParseAddr(s))
	}
	for _, s := range []string{"10.98.0.2", "fd98::2"} {
		w.serverIPs = append(w.serverIPs, netip.MustParseAddr(s))
	}
	return w
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := newWorldOf(newNetns(t), newNetns(t))
	inNetns(t, w.pod, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(w.server.Fd()))})
	})
	for f, ips := range map[*os.File][]netip.Addr{w.pod: w.podIPs, w.server: w.serverIPs} {
		inNetns(t, f, func() error {
			eth, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			for _, ip := range ips {
				bits := 24
				if ip.Is6() {
					bits = 64
				}
				a, _ := netlink.ParseAddr(fmt.Sprintf("%s/%d", ip, bits))
				if ip.Is6() {
					a.Flags = unix.IFA_F_NODAD
				}
				if err := netlink.AddrAdd(eth, a); err != nil {
					return err
				}
			}
			return errors.Join(netlink.LinkSetUp(eth), netlink.LinkSetUp(lo))
		})
	}
	return w
}

// listenIn opens a listening socket in a namespace (nil: the node's).
func listenIn(t testing.TB, f *os.File, addr string) (ln net.Listener) {
	t.Helper()
	open := func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(context.Background(), "tcp", addr)
		return err
	}
	if f == nil {
		if err := open(); err != nil {
			t.Fatal(err)
		}
	} else {
		inNetns(t, f, open)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// listenFD does the same for a socket that is given away.
func listenFD(t testing.TB, f *os.File, addr string) (fd int) {
	t.Helper()
	ln := listenIn(t, f, addr)
	raw, _ := ln.(syscall.Conn).SyscallConn()
	_ = raw.Control(func(p uintptr) { fd, _ = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) })
	ln.Close()
	return fd
}

// dialIn connects from a namespace (nil: the node's).
func dialIn(t testing.TB, f *os.File, addr string) (*net.TCPConn, error) {
	var c net.Conn
	var err error
	open := func() error {
		d := net.Dialer{Timeout: patience}
		d.SetMultipathTCP(false)
		c, err = d.Dial("tcp", addr)
		return nil
	}
	if f == nil {
		_ = open()
	} else {
		inNetns(t, f, open)
	}
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn), nil
}

func mustDialIn(t testing.TB, f *os.File, addr string) *net.TCPConn {
	t.Helper()
	c, err := dialIn(t, f, addr)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// expectReset connects and wants the connection reset, which may show in connect or in read.
func expectReset(t testing.TB, f *os.File, addr, what string) {
	t.Helper()
	c, err := dialIn(t, f, addr)
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%s: %v", what, err)
	}
}

// serveEcho echoes on a listener and sends the address of every caller to seen.
func serveEcho(ln net.Listener, greeting string, seen chan netip.AddrPort) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		if seen != nil {
			seen <- c.RemoteAddr().(*net.TCPAddr).AddrPort()
		}
		go func() {
			defer c.Close()
			_, _ = c.Write([]byte(greeting))
			b := make([]byte, 4096)
			for {
				n, err := c.Read(b)
				_, _ = c.Write(b[:n])
				if err != nil {
					return
				}
			}
		}()
	}
}

func read(t testing.TB, c net.Conn, n int) string {
	t.Helper()
	b := make([]byte, n)
	for got := 0; got < n; {
		k, err := c.Read(b[got:])
		got += k
		if err != nil {
			t.Fatalf("after %q: %v", b[:got], err)
		}
	}
	return string(b)
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

func openFiles(t testing.TB) int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// origin is a datapath that gives every connection the same original destination.
type origin struct {
	addr atomic.Pointer[netip.AddrPort]
}

func (o *origin) set(s string) {
	a := netip.MustParseAddrPort(s)
	o.addr.Store(&a)
}

func (o *origin) lookUp(int) (Origin, error) {
	if a := o.addr.Load(); a != nil {
		return Origin{Addr: *a}, nil
	}
	return Origin{}, errors.New("not redirected")
}

// startEngine runs an engine for the test and checks that it leaves nothing behind.
func startEngine(t testing.TB, cfg Config) *Engine {
	t.Helper()
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	if cfg.Concurrency == 0 {
		cfg.Concurrency = 2
	}
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	e.Start()
	t.Cleanup(func() {
		e.Close()
		e.Close() // twice does no harm
		eventually(t, "descriptors closed", func() bool { return openFiles(t) <= files })
		eventually(t, "goroutines ended", func() bool { return runtime.NumGoroutine() <= goroutines })
	})
	return e
}

func tcpChain(clusters ...mesh.WeightedCluster) *mesh.FilterChain {
	p := &mesh.TCPProxy{IdleTimeout: time.Hour, MaxConnectAttempts: 1, Clusters: clusters}
	for _, c := range clusters {
		p.TotalWeight += uint64(c.Weight)
	}
	return &mesh.FilterChain{TCP: p}
}

func listener(t testing.TB, name, addr string, bind bool, chain *mesh.FilterChain) *mesh.Listener {
	t.Helper()
	l := &mesh.Listener{
		Name: name, Addresses: []netip.AddrPort{netip.MustParseAddrPort(addr)}, BindToPort: bind, BufferLimit: 1 << 20,
		Default: chain,
	}
	if err := l.Init(); err != nil {
		t.Fatal(err)
	}
	return l
}

func clusterOf(name string, addrs ...string) *mesh.Cluster {
	c := &mesh.Cluster{
		Name: name, StatName: name, ConnectTimeout: 5 * time.Second, BufferLimit: 1 << 20, Overprovisioning: 140, PanicThreshold: 50,
		Limits: [2]mesh.Limits{{MaxConnections: 10_000, MaxPendingRequests: 10_000, MaxRequests: 10_000, MaxRetries: 3}},
	}
	for _, a := range addrs {
		c.Endpoints = append(c.Endpoints, mesh.Endpoint{Addr: netip.MustParseAddrPort(a), Weight: 1})
	}
	c.Localities = []mesh.Locality{{N: len(addrs)}}
	return c
}

func snapshot(generation uint64, listeners []*mesh.Listener, clusters ...*mesh.Cluster) *mesh.Snapshot {
	m := map[string]*mesh.Cluster{}
	for _, c := range clusters {
		m[c.Name] = c
	}
	return mesh.NewSnapshot(generation, listeners, m)
}

func to(name string) mesh.WeightedCluster { return mesh.WeightedCluster{Name: name, Weight: 1} }
