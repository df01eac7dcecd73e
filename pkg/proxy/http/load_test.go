package http_test

import (
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

// What a request costs the loop, without a kernel datapath and other proxies around it: for profiles, and to compare a change with what was.

// A small request and response as the benchmark's scenario http1-small has them: wrk's and nginx's heads.
const (
	smallRequest  = "GET /small HTTP/1.1\r\nHost: 10.0.0.1:8080\r\n\r\n"
	smallResponse = "HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Sat, 28 Nov 2026 23:00:00 GMT\r\nContent-Type: text/plain\r\n" +
		"Content-Length: 128\r\nConnection: keep-alive\r\n\r\n"
)

// BenchmarkLoad is what a request costs the loop's thread under load: many connections, each with one small request at a
// time, so that several are ready whenever the loop looks. user-ns/op is what is ours, loop-ns/op has the kernel's part, too.
// How the two are told apart is sampled by the kernel's clock: only runs of seconds compare.
func BenchmarkLoad(b *testing.B) {
	const connections = 64
	u := quietUpstream(b, smallResponse+strings.Repeat("x", 128))
	p := proxytest.Start(b, proxytest.Bootstrap("", `
- match: {prefix: /}
  route: {cluster: u}`, proxytest.Cluster("u", "", u.Port)))
	for len(p.Records) < cap(p.Records) {
		p.Records <- proxytest.Record{}
	}
	var fds [connections]int
	size := 0
	for i := range fds {
		c := proxytest.Dial(b, p.Addr)
		c.Send(smallRequest)
		size = len(c.Head()) + 128
		c.Expect(strings.Repeat("x", 128))
		fds[i] = blocking(b, c.TCPConn)
	}
	request, buf := []byte(smallRequest), make([]byte, size)
	round := func(n int) {
		for _, fd := range fds[:n] {
			if _, err := unix.Write(fd, request); err != nil {
				b.Fatal(err)
			}
		}
		for _, fd := range fds[:n] {
			for have := 0; have < size; {
				n, err := unix.Read(fd, buf[have:])
				if err == unix.EINTR {
					continue
				}
				if n <= 0 {
					b.Fatal("reading a response: ", n, err)
				}
				have += n
			}
		}
	}
	for range 100 {
		round(connections)
	}
	userBefore, allBefore := threadTimes(b, p)
	b.ResetTimer()
	for done := 0; done < b.N; done += connections {
		round(min(connections, b.N-done))
	}
	b.StopTimer()
	user, all := threadTimes(b, p)
	b.ReportMetric(float64((user-userBefore).Nanoseconds())/float64(b.N), "user-ns/op")
	b.ReportMetric(float64((all-allBefore).Nanoseconds())/float64(b.N), "loop-ns/op")
}

// blocking is the connection's own descriptor, used past Go's poller.
func blocking(b *testing.B, c *net.TCPConn) int {
	b.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		b.Fatal(err)
	}
	var fd int
	if err := raw.Control(func(n uintptr) { fd = int(n); err = syscall.SetNonblock(fd, false) }); err != nil {
		b.Fatal(err)
	}
	return fd
}

// threadTimes is what the loop's thread has used so far, outside the kernel and in all.
func threadTimes(b *testing.B, p *proxytest.Proxy) (user, all time.Duration) {
	b.Helper()
	var r unix.Rusage
	p.Do(func() {
		if err := unix.Getrusage(unix.RUSAGE_THREAD, &r); err != nil {
			b.Error(err)
		}
	})
	user = time.Duration(r.Utime.Nano())
	return user, user + time.Duration(r.Stime.Nano())
}
