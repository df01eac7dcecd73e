package datapath

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// The tests run the real programs on real sockets. A world is one node: a network namespace without uplink (an
// untranslated Service address must not leave the machine), a bridge, pods on veth pairs, and a cgroup that is the
// datapath's root. Sockets belong to the cgroup of the process that makes them, so the test process itself moves
// into the world's cgroup. Hence tests here never run in parallel.

var cgroup2 string

func TestMain(m *testing.M) {
	if os.Getenv(victimEnv) != "" {
		runVictim()
	}
	var err error
	if os.Geteuid() != 0 {
		err = fmt.Errorf("these tests load BPF programs and make network namespaces: run them as root")
	} else {
		cgroup2, err = FindCgroupRoot()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// ns is a network namespace.
type ns struct {
	t      testing.TB
	h      netns.NsHandle
	cookie uint64
	v4, v6 netip.Addr
	locals []uint16 // ports that listenLocal gave out
}

// do runs f with the calling thread in the namespace.
func (n *ns) do(f func()) {
	runtime.LockOSThread()
	old, err := netns.Get()
	if err != nil {
		n.t.Fatal(err)
	}
	defer old.Close()
	if err := netns.Set(n.h); err != nil {
		n.t.Fatal(err)
	}
	defer func() {
		if err := netns.Set(old); err != nil {
			panic(err) // the thread is lost
		}
		runtime.UnlockOSThread()
	}()
	f()
}

func newNS(t testing.TB) *ns {
	n := &ns{t: t}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with the goroutine
		var err error
		n.h, err = netns.New()
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal("make a network namespace:", err)
	}
	t.Cleanup(func() { n.h.Close() })
	n.do(func() {
		lo, err := netlink.LinkByName("lo")
		must(t, err)
		must(t, netlink.LinkSetUp(lo))
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		must(t, err)
		defer unix.Close(fd)
		n.cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		must(t, err)
	})
	return n
}

type world struct {
	t      testing.TB
	node   *ns
	bridge netlink.Link
	pods   int
	cgroup string
	cfg    Config
}

var worlds int

func newWorld(t testing.TB) *world {
	worlds++
	w := &world{t: t, node: newNS(t)}
	w.node.v4, w.node.v6 = netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("fd77::1")
	w.node.do(func() {
		must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
		var err error
		w.bridge, err = netlink.LinkByName("br0")
		must(t, err)
		address(t, w.bridge, "10.77.0.1/16")
		address(t, w.bridge, "fd77::1/64")
		must(t, netlink.LinkSetUp(w.bridge))
	})
	w.cgroup = filepath.Join(cgroup2, fmt.Sprintf("sm-datapath-%d-%d", os.Getpid(), worlds))
	must(t, os.Mkdir(w.cgroup, 0o755))
	t.Cleanup(func() {
		joinCgroup(t, cgroup2)
		if err := os.Remove(w.cgroup); err != nil {
			t.Error(err)
		}
	})
	joinCgroup(t, w.cgroup)
	w.cfg = Config{
		CgroupRoot: w.cgroup, BPFFS: filepath.Join(t.TempDir(), "bpf"), Acceleration: true, Services: true,
		SyncTimeout: time.Hour, DriftInterval: time.Hour,
		Logger: slog.New(slog.NewTextHandler(logWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Sizes:  Sizes{Frontends: 1024, Backends: 4096, Slots: 8192, Claims: 256, Pods: 64, Locals: 128, Origins: 4096, Pairs: 4096},
	}
	t.Cleanup(func() {
		if err := Cleanup(w.cfg); err != nil {
			t.Error("cleanup:", err)
		}
	})
	return w
}

// logWriter sends the datapath's log lines to the test's output.
type logWriter struct{ t testing.TB }

func (l logWriter) Write(b []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func joinCgroup(t testing.TB, dir string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(os.Getpid())), 0))
}

// pod adds a pod with an address of each family.
func (w *world) pod() *ns {
	w.pods++
	i := w.pods + 1
	p := newNS(w.t)
	p.v4, p.v6 = netip.MustParseAddr(fmt.Sprintf("10.77.1.%d", i)), netip.MustParseAddr(fmt.Sprintf("fd77::1:%x", i))
	w.node.do(func() {
		name := fmt.Sprintf("veth%d", i)
		must(w.t, netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(p.h),
		}))
		l, err := netlink.LinkByName(name)
		must(w.t, err)
		must(w.t, netlink.LinkSetMaster(l, w.bridge))
		must(w.t, netlink.LinkSetUp(l))
	})
	// The kernel activates a device's queue up to a second after it got its carrier; what is sent before is dropped.
	up := func(n *ns, name string) {
		n.do(func() {
			eventually(w.t, name+" is up", func() bool {
				l, err := netlink.LinkByName(name)
				return err == nil && l.Attrs().OperState == netlink.OperUp
			})
		})
	}
	defer func() { up(p, "eth0"); up(w.node, fmt.Sprintf("veth%d", i)); up(w.node, "br0") }()
	p.do(func() {
		eth0, err := netlink.LinkByName("eth0")
		must(w.t, err)
		address(w.t, eth0, p.v4.String()+"/16")
		address(w.t, eth0, p.v6.String()+"/64")
		must(w.t, netlink.LinkSetUp(eth0))
		must(w.t, netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: net.IP(w.node.v4.AsSlice())}))
		must(w.t, netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: net.IP(w.node.v6.AsSlice())}))
	})
	return p
}

func address(t testing.TB, l netlink.Link, cidr string) {
	t.Helper()
	a, err := netlink.ParseAddr(cidr)
	must(t, err)
	a.Flags = unix.IFA_F_NODAD
	must(t, netlink.AddrAdd(l, a))
}

// open starts a datapath in the world and closes it with the test.
func (w *world) open(change ...func(*Config)) *Datapath {
	w.t.Helper()
	for _, c := range change {
		c(&w.cfg)
	}
	d, err := Open(w.cfg)
	must(w.t, err)
	w.t.Cleanup(func() { d.Close() })
	return d
}

// synced tells the reconciler that every source is complete, and writes.
func synced(t testing.TB, d *Datapath) {
	t.Helper()
	for _, s := range []string{SourceServices, SourceClaims, SourcePods} {
		d.Reconciler().Synced(s)
	}
	flush(t, d)
}

func flush(t testing.TB, d *Datapath) {
	t.Helper()
	must(t, d.Reconciler().Flush(context.Background()))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// server accepts connections on port of the pod's addresses, both families. It greets with its name and a newline
// (server first), then echoes until the client's end, then closes.
func (n *ns) server(name string, port uint16) {
	n.serve(port, func(c *net.TCPConn) {
		defer c.Close()
		if _, err := io.WriteString(c, name+"\n"); err == nil {
			io.Copy(onlyWriter{c}, onlyReader{c})
		}
	})
}

// The wrappers keep io.Copy from splicing, which never sees redirected bytes.
type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }

func (n *ns) serve(port uint16, handle func(*net.TCPConn)) {
	n.t.Helper()
	n.listen(fmt.Sprintf("[::]:%d", port), handle)
}

// listen accepts on addr inside the namespace until the test ends or the result is called.
func (n *ns) listen(addr string, handle func(*net.TCPConn), before ...func(fd int) error) (stop func()) {
	n.t.Helper()
	var l net.Listener
	n.do(func() {
		var lc net.ListenConfig
		for _, f := range before {
			lc.Control = control(f)
		}
		lc.SetMultipathTCP(false)
		var err error
		l, err = lc.Listen(context.Background(), "tcp", addr)
		must(n.t, err)
	})
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	var wg sync.WaitGroup
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				handle(c.(*net.TCPConn))
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	}()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			l.Close()
			mu.Lock()
			for c := range open {
				c.Close()
			}
			mu.Unlock()
			wg.Wait()
		})
	}
	n.t.Cleanup(stop)
	return stop
}

// dialer options.
type dialOption func(*net.Dialer)

// owned makes the socket the proxy's.
func owned(dp *Datapath) dialOption {
	return func(d *net.Dialer) { d.Control = control(dp.Own) }
}

// control calls f with a socket before it is bound or connected.
func control(f func(fd int) error) func(_, _ string, rc syscall.RawConn) error {
	return func(_, _ string, rc syscall.RawConn) (err error) {
		if e := rc.Control(func(fd uintptr) { err = f(int(fd)) }); e != nil {
			return e
		}
		return err
	}
}

// briefly gives up soon: for addresses that nobody answers.
func briefly(d *net.Dialer) { d.Timeout = 300 * time.Millisecond }

// dial connects from inside the namespace.
func (n *ns) dial(to netip.AddrPort, opts ...dialOption) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: 10 * time.Second}
	d.SetMultipathTCP(false)
	for _, o := range opts {
		o(&d)
	}
	var c net.Conn
	var err error
	n.do(func() { c, err = d.Dial("tcp", to.String()) })
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(60 * time.Second))
	return c.(*net.TCPConn), nil
}

// dialMapped connects an AF_INET6 socket to a v4-mapped address, as dual-stack applications do.
func (n *ns) dialMapped(to netip.AddrPort) (*net.TCPConn, error) {
	var c net.Conn
	var err error
	n.do(func() {
		var fd int
		if fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		c, err = finishConnect(fd, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()})
	})
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// dialBlocking connects a blocking socket and hands it over non-blocking afterwards.
func (f family) dialBlocking(n *ns, to netip.AddrPort) (*net.TCPConn, error) {
	af, sa := f.sockaddr(to)
	fd := n.stream(af, 0, 0)
	if err := unix.Connect(fd, sa); err != nil {
		unix.Close(fd)
		return nil, err
	}
	c, err := fileConn(fd)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func finishConnect(fd int, sa unix.Sockaddr) (net.Conn, error) {
	err := unix.Connect(fd, sa)
	if err == unix.EINPROGRESS {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if _, err = unix.Poll(p, 10000); err == nil {
			var e int
			if e, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && e != 0 {
				err = unix.Errno(e)
			}
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return fileConn(fd)
}

func fileConn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err == nil {
		c.SetDeadline(time.Now().Add(60 * time.Second))
	}
	return c, err
}

// ask connects and returns the server's name.
func (n *ns) ask(to netip.AddrPort, opts ...dialOption) (string, error) {
	c, err := n.dial(to, opts...)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return greeting(c)
}

// talks checks who is at the other end, and that n bytes come back.
func talks(t testing.TB, c net.Conn, who string, n int) {
	t.Helper()
	if got, err := greeting(c); err != nil || got != who {
		t.Fatalf("got %q, %v; want %q", got, err, who)
	}
	echo(t, c, n)
}

// greeting reads the server's first line.
func greeting(c net.Conn) (string, error) {
	var line []byte
	b := make([]byte, 1)
	for {
		if _, err := io.ReadFull(c, b); err != nil {
			return "", fmt.Errorf("read the greeting after %q: %w", line, err)
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
}

// svc makes a Service of one frontend.
func svc(name string, front netip.AddrPort, backends ...netip.AddrPort) *service.Service {
	f := service.Frontend{Addr: front, Protocol: service.TCP}
	for _, b := range backends {
		f.Backends = append(f.Backends, service.Backend{Addr: b})
	}
	return &service.Service{Name: service.Name{Namespace: "default", Name: name}, Frontends: []service.Frontend{f}}
}

func ap(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

var (
	vip4 = netip.MustParseAddrPort("10.96.0.10:80")
	vip6 = netip.MustParseAddrPort("[fd96::10]:80")
)
