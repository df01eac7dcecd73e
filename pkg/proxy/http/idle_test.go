package http_test

import (
	"net/netip"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

// An idle connection must hold nothing but its own state: buffers are lent only while there are bytes in them.
func TestAnIdleConnectionHoldsLessThanFourKiB(t *testing.T) {
	const n = 1000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < 2*n+100 {
		t.Fatalf("the descriptor limit is %d (%v): this test needs %d", limit.Cur, err, 2*n+100)
	}
	u := quietUpstream(t, "HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n0123456789abcdef")
	p := proxytest.Start(t, proxytest.Bootstrap("", fancyRoutes, proxytest.Cluster("u", "", u.Port)+proxytest.Cluster("v", "", u.Port)))
	for len(p.Records) < cap(p.Records) {
		p.Records <- proxytest.Record{}
	}
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	// The client's sockets are bare descriptors, so that what grows is the proxy's.
	fds := make([]int, 0, n)
	t.Cleanup(func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	})
	buf := make([]byte, 4096)
	open := func() {
		fd := dialBare(t, p.Addr)
		fds = append(fds, fd)
		if _, err := unix.Write(fd, []byte(browserRequest)); err != nil {
			t.Fatal(err)
		}
		for got := ""; len(got) < 16 || got[len(got)-16:] != "0123456789abcdef"; {
			m, err := unix.Read(fd, buf)
			if err != nil || m == 0 {
				t.Fatalf("the answer ended after %q: %v", got, err)
			}
			got += string(buf[:m])
		}
	}
	open()
	before := heap()
	for range n {
		open()
	}
	after := heap()
	each := (float64(after) - float64(before)) / n
	t.Logf("%.0f bytes for an idle connection", each)
	if each > 4096 {
		t.Errorf("%.0f bytes for an idle connection; 4096 is the promise", each)
	}
	if each < 200 {
		t.Errorf("%.0f bytes for an idle connection: the connections are not there", each)
	}
}

// dialBare connects a blocking socket that no Go object stands for.
func dialBare(t *testing.T, addr string) int {
	t.Helper()
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
		t.Fatalf("connect to %s: %v", addr, err)
	}
	return fd
}
