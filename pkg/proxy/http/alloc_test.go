package http_test

import (
	"io"
	"runtime"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

const browserRequest = "GET /api/v1/items?page=2 HTTP/1.1\r\nHost: shop.example.com:8080\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n" +
	"Accept: text/html,application/json\r\nAccept-Encoding: gzip, br\r\nAccept-Language: en\r\nCookie: session=0123456789abcdef\r\n" +
	"X-Request-Start: t=1\r\n\r\n"

// roundTrips sends n requests over one connection, reading each response of size bytes.
func roundTrips(t testing.TB, c *proxytest.Client, request string, size, n int) {
	t.Helper()
	buf := make([]byte, size)
	req := []byte(request)
	for range n {
		if _, err := c.TCPConn.Write(req); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c.TCPConn, buf); err != nil {
			t.Fatal(err)
		}
	}
}

// quietUpstream answers each head without allocating.
func quietUpstream(t testing.TB, response string) *proxytest.Upstream {
	return proxytest.Serve(t, func(c *proxytest.Client) {
		buf, answer, have := make([]byte, 64<<10), []byte(response), 0
		for {
			n, err := c.TCPConn.Read(buf[have:])
			if err != nil {
				return
			}
			have += n
			if have >= 4 && string(buf[have-4:have]) == "\r\n\r\n" {
				have = 0
				if _, err := c.TCPConn.Write(answer); err != nil {
					return
				}
			}
		}
	})
}

const fancyRoutes = `
- match: {prefix: /other}
  route: {cluster: u}
- match: {prefix: /api, headers: [{name: x-canary, string_match: {exact: always}}]}
  route: {cluster: u}
- match: {prefix: /api}
  request_headers_to_add:
  - header: {key: x-route, value: api}
  - header: {key: x-from, value: "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"}
  response_headers_to_remove: [x-internal, x-envoy-upstream-service-time]
  route:
    prefix_rewrite: /v2
    weighted_clusters: {clusters: [{name: u, weight: 90}, {name: v, weight: 10}]}
    retry_policy: {retry_on: "5xx,reset", num_retries: 2}
`

func TestASteadyRequestAllocatesNothing(t *testing.T) {
	const n = 2000
	response := "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Internal: 1\r\nContent-Length: 16\r\n\r\n0123456789abcdef"
	u := quietUpstream(t, response)
	p := proxytest.Start(t, proxytest.Bootstrap("", fancyRoutes, proxytest.Cluster("u", "", u.Port)+proxytest.Cluster("v", "", u.Port)))
	c := proxytest.Dial(t, p.Addr)
	c.Send(browserRequest)
	head := c.Head()
	c.Expect("0123456789abcdef")
	size := len(head) + 16
	// With the channel full, records are not copied for the test.
	for len(p.Records) < cap(p.Records) {
		p.Records <- proxytest.Record{}
	}
	roundTrips(t, c, browserRequest, size, 200)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	roundTrips(t, c, browserRequest, size, n)
	runtime.ReadMemStats(&after)
	if got := float64(after.Mallocs-before.Mallocs) / n; got > 0.2 {
		t.Errorf("%.2f allocations per request", got)
	}
}

func BenchmarkRequest(b *testing.B) {
	response := "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n0123456789abcdef"
	u := quietUpstream(b, response)
	p := proxytest.Start(b, proxytest.Bootstrap("", fancyRoutes, proxytest.Cluster("u", "", u.Port)+proxytest.Cluster("v", "", u.Port)))
	c := proxytest.Dial(b, p.Addr)
	c.Send(browserRequest)
	size := len(c.Head()) + 16
	c.Expect("0123456789abcdef")
	for len(p.Records) < cap(p.Records) {
		p.Records <- proxytest.Record{}
	}
	b.ReportAllocs()
	b.ResetTimer()
	roundTrips(b, c, browserRequest, size, b.N)
}
