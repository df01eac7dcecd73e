package tcp

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop/looptest"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// patience only ends a hung test.
const patience = 30 * time.Second

// rig is a loop with a TCP server and one listener before it.
type rig struct {
	t      testing.TB
	loop   *loop.Loop
	server *Server
	snap   *mesh.Snapshot
	info   stream.ConnInfo
	addr   netip.AddrPort
	// ends receives the record of every finished session.
	ends chan telemetry.Record
}

func newRig(t testing.TB, p *mesh.TCPProxy, clusters ...*mesh.Cluster) *rig {
	t.Helper()
	before := openFiles(t)
	l, err := loop.New(loop.Config{IO: looptest.IO})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, loop: l, ends: make(chan telemetry.Record, 100_000)}
	r.snap = &mesh.Snapshot{Generation: 1, Clusters: map[string]*mesh.Cluster{}}
	for _, c := range clusters {
		r.snap.Clusters[c.Name] = c
	}
	snapshot := func() *mesh.Snapshot { return r.snap }
	r.server = NewServer(Deps{Loop: l, Upstreams: upstream.NewManager(l, upstream.Config{Snapshot: snapshot}), Snapshot: snapshot})
	r.info = stream.ConnInfo{
		Source: &stream.Source{}, Listener: &mesh.Listener{Name: "l", BufferLimit: 64 << 10}, Chain: &mesh.FilterChain{TCP: p},
	}
	r.server.onEnd = func(rec *telemetry.Record) { r.ends <- *rec }
	go func() {
		if err := l.Run(); err != nil {
			t.Error(err)
		}
	}()
	fd, addr := listenFD(t)
	r.addr = addr
	r.do(func() {
		if _, err := l.Listen(fd, func(fd int, peer netip.AddrPort) {
			info := r.info
			info.Peer = peer
			r.server.ServeConn(l.Adopt(fd, peer, nil, r.server.Options(&info)), &info)
		}); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		l.Stop()
		l.Wait()
		if s := l.Stats(); s.Conns != 0 || s.BufferBytes != 0 || s.Timers > 1 {
			t.Errorf("left over: %+v", s)
		}
		if r.server.count != 0 || r.server.sessions.next != &r.server.sessions {
			t.Errorf("%d sessions left over", r.server.count)
		}
		for end := time.Now().Add(patience); openFiles(t) > before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d descriptors, %d before", openFiles(t), before)
			}
		}
	})
	return r
}

func (r *rig) do(fn func()) {
	r.t.Helper()
	done := make(chan struct{})
	r.loop.Post(func() { fn(); close(done) })
	select {
	case <-done:
	case <-time.After(patience):
		r.t.Fatal("the loop hangs")
	}
}

func (r *rig) end() telemetry.Record {
	r.t.Helper()
	select {
	case rec := <-r.ends:
		return rec
	case <-time.After(patience):
		r.t.Fatal("the session never ended")
		return telemetry.Record{}
	}
}

func openFiles(t testing.TB) int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func listenFD(t testing.TB) (int, netip.AddrPort) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}
	if err == nil {
		err = unix.Listen(fd, 4096)
	}
	if err != nil {
		t.Fatal(err)
	}
	sa, _ := unix.Getsockname(fd)
	return fd, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(sa.(*unix.SockaddrInet4).Port))
}

// backend accepts connections and runs serve for each.
func backend(t testing.TB, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(patience))
			go serve(c)
		}
	}()
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

func clusterOf(name string, addrs ...netip.AddrPort) *mesh.Cluster {
	c := &mesh.Cluster{
		Name: name, StatName: name, ConnectTimeout: 5 * time.Second, BufferLimit: 64 << 10, Overprovisioning: 140, PanicThreshold: 50,
		Limits: [2]mesh.Limits{{MaxConnections: 10_000, MaxPendingRequests: 10_000, MaxRequests: 10_000, MaxRetries: 3}},
	}
	for _, a := range addrs {
		c.Endpoints = append(c.Endpoints, mesh.Endpoint{Addr: a, Weight: 1})
	}
	c.Localities = []mesh.Locality{{N: len(addrs)}}
	return c
}

func proxyTo(names ...string) *mesh.TCPProxy {
	p := &mesh.TCPProxy{IdleTimeout: time.Hour, MaxConnectAttempts: 1}
	for _, n := range names {
		p.Clusters = append(p.Clusters, mesh.WeightedCluster{Name: n, Weight: 1})
		p.TotalWeight++
	}
	return p
}

func dial(t testing.TB, addr netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { c.Close() })
	return c
}

func echo(c *net.TCPConn) {
	defer c.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := c.Read(b)
		if n > 0 {
			if _, err := c.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
