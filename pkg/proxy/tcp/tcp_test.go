package tcp

import (
	"errors"
	"io"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

func TestTheServerMaySpeakFirst(t *testing.T) {
	greeter := backend(t, func(c *net.TCPConn) {
		_, _ = c.Write([]byte("5.5.5-MariaDB"))
		echo(c)
	})
	r := newRig(t, proxyTo("a"), clusterOf("a", greeter))
	c := dial(t, r.addr)
	b := make([]byte, 13)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "5.5.5-MariaDB" {
		t.Fatalf("%q, %v", b, err)
	}
	_ = c.CloseWrite()
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Fatal(err)
	}
	rec := r.end()
	if rec.BytesSent != 13 || rec.Flags != 0 || rec.UpstreamHost != greeter || rec.UpstreamCluster != "a" || rec.Listener != "l" || rec.End < rec.Begin {
		t.Errorf("record %+v", rec)
	}
}

func TestClustersAreDrawnByWeight(t *testing.T) {
	var hits [2]atomic.Int64
	name := func(i int) netip.AddrPort {
		return backend(t, func(c *net.TCPConn) { hits[i].Add(1); c.Close() })
	}
	p := proxyTo("v1", "v2")
	p.Clusters[0].Weight, p.Clusters[1].Weight, p.TotalWeight = 90, 10, 100
	r := newRig(t, p, clusterOf("v1", name(0)), clusterOf("v2", name(1)))
	const n = 1000
	for range n {
		c := dial(t, r.addr)
		_, _ = io.Copy(io.Discard, c)
		c.Close()
	}
	if got := float64(hits[1].Load()); math.Abs(got-n*.1) > 5*math.Sqrt(n*.1*.9) {
		t.Errorf("%v of %d went to the canary, want about a tenth", got, n)
	}
}

// refused is an address where nobody listens.
func refused(t *testing.T) netip.AddrPort {
	fd, addr := listenFD(t)
	_ = unix.Close(fd)
	return addr
}

func TestFailuresResetTheClientAndNameTheFlag(t *testing.T) {
	limited := clusterOf("limited", refused(t))
	limited.Limits[0].MaxConnections = 0
	for _, tc := range []struct {
		name     string
		clusters []*mesh.Cluster
		want     telemetry.Flags
	}{
		{"unknown", nil, telemetry.NC},
		{"empty", []*mesh.Cluster{clusterOf("empty")}, telemetry.UH},
		{"dead", []*mesh.Cluster{clusterOf("dead", refused(t))}, telemetry.UF | telemetry.URX},
		{"limited", []*mesh.Cluster{limited}, telemetry.UO},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, proxyTo(tc.name), tc.clusters...)
			c, err := net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(r.addr))
			if err == nil { // the reset may be faster than connect, and than write, which hears of it once: a read then sees an end
				_ = c.SetDeadline(time.Now().Add(patience))
				if _, err = c.Write([]byte("hello")); err == nil {
					_, err = c.Read(make([]byte, 1))
				}
				c.Close()
			}
			if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
				t.Errorf("client saw %v", err)
			}
			if rec := r.end(); rec.Flags != tc.want {
				t.Errorf("flags %s, want %s", rec.Flags, tc.want)
			}
		})
	}
}

func TestAnotherHostIsTriedWhenOneRefuses(t *testing.T) {
	live := backend(t, echo)
	p := proxyTo("a")
	p.MaxConnectAttempts = 3
	r := newRig(t, p, clusterOf("a", refused(t), refused(t), live))
	for range 30 {
		c := dial(t, r.addr)
		_, _ = c.Write([]byte("x"))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		c.Close()
		if rec := r.end(); rec.UpstreamHost != live || rec.Attempts < 1 || rec.Attempts > 3 {
			t.Errorf("record %+v", rec)
		}
	}
}

func TestConnectTimeOut(t *testing.T) {
	fd, addr := listenFD(t)
	defer unix.Close(fd)
	_ = unix.Listen(fd, 0)
	for range 3 { // fill the backlog: further SYNs are dropped
		if c, err := net.DialTimeout("tcp", addr.String(), 100*time.Millisecond); err == nil {
			defer c.Close()
		}
	}
	conf := clusterOf("a", addr)
	conf.ConnectTimeout = 50 * time.Millisecond
	p := proxyTo("a")
	p.MaxConnectAttempts = 2
	r := newRig(t, p, conf)
	if _, err := dial(t, r.addr).Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("client saw %v", err)
	}
	if rec := r.end(); rec.Flags != telemetry.UF|telemetry.URX || rec.Attempts != 2 || rec.UpstreamTransportFailure == "" {
		t.Errorf("%s after %d attempts: %s", rec.Flags, rec.Attempts, rec.UpstreamTransportFailure)
	}
}

func TestIdleConnectionsAreClosedAndBusyOnesAreNot(t *testing.T) {
	p := proxyTo("a")
	p.IdleTimeout = 2 * time.Second
	r := newRig(t, p, clusterOf("a", backend(t, echo)))
	c := dial(t, r.addr)
	for range 16 { // longer than the time-out
		time.Sleep(150 * time.Millisecond)
		_, _ = c.Write([]byte("x"))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatalf("a busy connection was closed: %v", err)
		}
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("idle end: %v", err)
	}
	if rec := r.end(); rec.Flags != telemetry.SI {
		t.Errorf("flags %s", rec.Flags)
	}
}

func TestMaxDurationEndsABusyConnection(t *testing.T) {
	p := proxyTo("a")
	p.MaxDownstreamConnectionDuration = 200 * time.Millisecond
	r := newRig(t, p, clusterOf("a", backend(t, echo)))
	c := dial(t, r.addr)
	for err := error(nil); err == nil; {
		if _, err = c.Write([]byte("x")); err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
	}
	if rec := r.end(); rec.Flags != telemetry.DT {
		t.Errorf("flags %s", rec.Flags)
	}
}

func TestResetsAreFlagged(t *testing.T) {
	ready := make(chan *net.TCPConn, 1)
	r := newRig(t, proxyTo("a"), clusterOf("a", backend(t, func(c *net.TCPConn) { ready <- c })))
	c := dial(t, r.addr)
	s := <-ready
	// A reset that comes before the proxy has seen the handshake's end is a connect that failed.
	_, _ = s.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	_ = s.SetLinger(0)
	s.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("client saw %v", err)
	}
	if rec := r.end(); rec.Flags != telemetry.UC {
		t.Errorf("flags %s, want UC", rec.Flags)
	}
	c = dial(t, r.addr)
	s = <-ready
	_ = c.SetLinger(0)
	c.Close()
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("server saw %v", err)
	}
	s.Close()
	if rec := r.end(); rec.Flags != telemetry.DC {
		t.Errorf("flags %s, want DC", rec.Flags)
	}
}

// TestAReaderThatNeverReadsStopsItsSender lets both sides write without end to a peer that doesn't read: the
// senders must be stopped, and the proxy must hold no more than its watermarks.
func TestAReaderThatNeverReadsStopsItsSender(t *testing.T) {
	ready := make(chan *net.TCPConn, 100)
	r := newRig(t, proxyTo("a"), clusterOf("a", backend(t, func(c *net.TCPConn) { ready <- c })))
	const pairs = 10
	var wg sync.WaitGroup
	flood := func(c *net.TCPConn) {
		defer wg.Done()
		b := make([]byte, 256<<10)
		for err := error(nil); err == nil; {
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			_, err = c.Write(b)
		}
	}
	var conns []*net.TCPConn
	for range pairs {
		c := dial(t, r.addr)
		s := <-ready
		conns = append(conns, c, s)
		wg.Add(2)
		go flood(c)
		go flood(s)
	}
	wg.Wait()
	var buffered, most int
	var wakeups uint64
	r.do(func() {
		for ses := r.server.sessions.next; ses != &r.server.sessions; ses = ses.next {
			for _, d := range []*side{&ses.down, &ses.up} {
				buffered += d.conn.Buffered()
				most = max(most, d.conn.Buffered())
			}
		}
		wakeups = r.loop.Stats().Wakeups
	})
	// The watermark, and one read beyond it.
	if most > 64<<10+64<<10 || buffered == 0 {
		t.Errorf("up to %d bytes are held for one direction, %d in all", most, buffered)
	}
	time.Sleep(200 * time.Millisecond)
	r.do(func() {})
	r.do(func() {
		if n := r.loop.Stats().Wakeups - wakeups; n > 50 {
			t.Errorf("%d wake-ups while everybody waits", n)
		}
	})
	for _, c := range conns {
		c.Close()
	}
	for range pairs {
		r.end()
	}
}

func TestThousandsOfConnectionsLeaveNothingBehind(t *testing.T) {
	r := newRig(t, proxyTo("a"), clusterOf("a", backend(t, echo)))
	const n, workers = 3000, 20
	var wg sync.WaitGroup
	var failed atomic.Int64
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range n / workers {
				c, err := net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(r.addr))
				if err != nil {
					failed.Add(1)
					continue
				}
				_ = c.SetDeadline(time.Now().Add(patience))
				if (i+w)%3 != 0 {
					_, _ = c.Write([]byte("ping"))
					if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
						failed.Add(1)
					}
				}
				if (i+w)%5 == 0 {
					_ = c.SetLinger(0)
				}
				_ = c.Close()
			}
		}()
	}
	wg.Wait()
	if failed.Load() > 0 {
		t.Fatalf("%d connections failed", failed.Load())
	}
	for range n {
		r.end()
	}
	r.do(func() {
		c := r.server.deps.Upstreams.Named(r.snap, "a")
		if c.InUse(0, 0) != 0 {
			t.Errorf("the circuit breaker still counts %d connections", c.InUse(0, 0))
		}
		if s := r.server.Stats(); s.Active != 0 || s.Total != n {
			t.Errorf("stats %+v", s)
		}
	})
}

// TestOutOfDescriptorsCostsOneConnection: the client's socket takes the last descriptor, none is left for the
// upstream's.
func TestOutOfDescriptorsCostsOneConnection(t *testing.T) {
	r := newRig(t, proxyTo("a"), clusterOf("a", backend(t, echo)))
	good := dial(t, r.addr)
	turn := func(c *net.TCPConn) error {
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	if err := turn(good); err != nil {
		t.Fatal(err)
	}
	late, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(late)
	for fd := 3; fd < late; fd++ { // leave no gap
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			if n, err := unix.FcntlInt(uintptr(late), unix.F_DUPFD_CLOEXEC, fd); err == nil {
				defer unix.Close(n)
			}
		}
	}
	var was unix.Rlimit
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &was)
	low := was
	low.Cur = uint64(late + 2) // one more
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	cerr := unix.Connect(late, &unix.SockaddrInet4{Port: int(r.addr.Port()), Addr: r.addr.Addr().As4()})
	var rec telemetry.Record
	if cerr == nil || errors.Is(cerr, unix.ECONNRESET) {
		rec = r.end()
	}
	again := turn(good)
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	if rec.Flags != telemetry.UF|telemetry.URX || !strings.Contains(rec.UpstreamTransportFailure, "too many open files") {
		t.Errorf("flags %s, %q; connect %v", rec.Flags, rec.UpstreamTransportFailure, cerr)
	}
	if again != nil {
		t.Errorf("an open connection suffered: %v", again)
	}
	if err := turn(dial(t, r.addr)); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func BenchmarkEcho(b *testing.B) {
	r := newRig(b, proxyTo("a"), clusterOf("a", backend(b, echo)))
	c := dial(b, r.addr)
	_ = c.SetDeadline(time.Time{})
	buf := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		_, _ = c.Write(buf)
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBulk(b *testing.B) {
	r := newRig(b, proxyTo("a"), clusterOf("a", backend(b, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, struct{ io.Reader }{c}) })))
	c := dial(b, r.addr)
	_ = c.SetDeadline(time.Time{})
	buf := make([]byte, 64<<10)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
}
