package http_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

// Every flag that the HTTP proxy itself raises, with the status and the details that go with it.
func TestEveryFlagIsRaised(t *testing.T) {
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		for {
			head, err := proxytest.ReadHead(c.R)
			if err != nil {
				return
			}
			switch path := strings.Fields(head)[1]; path {
			case "/hang":
				time.Sleep(2 * time.Second)
				return
			case "/close":
				return
			case "/garbage":
				c.Send("garbage\r\n\r\n")
			case "/cut":
				c.Send("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")
				return
			case "/stall":
				c.Send("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")
				time.Sleep(2 * time.Second)
				return
			default:
				c.Send("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno")
			}
		}
	})
	clusters := proxytest.Cluster("u", "", u.Port) + proxytest.Cluster("empty", "") + proxytest.Cluster("dead", "", proxytest.ClosedPort(t)) +
		proxytest.Cluster("narrow", "circuit_breakers: {thresholds: [{max_requests: 0}]}", u.Port) +
		proxytest.Cluster("noretry", "circuit_breakers: {thresholds: [{max_retries: 0}]}", u.Port)
	p := proxytest.Start(t, proxytest.Bootstrap("", `
- match: {prefix: /empty}
  route: {cluster: empty}
- match: {prefix: /dead}
  route: {cluster: dead}
- match: {prefix: /narrow}
  route: {cluster: narrow}
- match: {prefix: /unknown}
  route: {cluster: unknown}
- match: {prefix: /retries}
  route: {cluster: u, retry_policy: {retry_on: 5xx, num_retries: 2, retry_back_off: {base_interval: 0.001s}}}
- match: {prefix: /breaker}
  route: {cluster: noretry, retry_policy: {retry_on: 5xx, num_retries: 2}}
- match: {prefix: /hang, headers: [{name: x-idle, present_match: true}]}
  route: {cluster: u, timeout: 0s, idle_timeout: 0.1s}
  response_headers_to_add: [{header: {key: x-route-said, value: yes it did}}]
- match: {prefix: /hang}
  route: {cluster: u, timeout: 0.1s}
- match: {prefix: /stall}
  route: {cluster: u, timeout: 0.1s}
- match: {path: /close}
  route: {cluster: u}
- match: {path: /garbage}
  route: {cluster: u}
- match: {path: /cut}
  route: {cluster: u}
`, clusters))
	const before = "upstream_reset_before_response_started"
	for _, x := range []struct {
		path, extra, flags, details string
		status                      int
		cut                         bool
	}{
		{path: "/nothing", flags: "NR", details: "route_not_found", status: 404},
		{path: "/unknown", flags: "NC", details: "cluster_not_found", status: 503},
		{path: "/empty", flags: "UH", details: "no_healthy_upstream", status: 503},
		{path: "/dead", flags: "UF", details: before + "{remote_connection_failure|delayed_connect_error:_Connection_refused}", status: 503},
		{path: "/narrow", flags: "UO", details: before + "{overflow}", status: 503},
		{path: "/close", flags: "UC", details: before + "{connection_termination}", status: 503},
		{path: "/garbage", flags: "UPE", details: before + "{protocol_error}", status: 502},
		{path: "/cut", flags: "UPE", details: "upstream_reset_after_response_started{protocol_error}", status: 200, cut: true},
		{path: "/hang", flags: "UT", details: "response_timeout", status: 504},
		{path: "/stall", flags: "UT", details: "response_timeout", status: 200, cut: true},
		{path: "/hang", extra: "x-idle: 1\r\n", flags: "SI", details: "stream_idle_timeout", status: 504},
		{path: "/retries", flags: "URX", details: "via_upstream", status: 503},
		{path: "/breaker", flags: "UO", details: "via_upstream", status: 503},
		{path: "/x y", flags: "DPE", details: "http1.codec_error", status: 400},
	} {
		t.Run(strings.Trim(x.path+x.flags, "/"), func(t *testing.T) {
			c := proxytest.Dial(t, p.Addr)
			c.Send("POST " + x.path + " HTTP/1.1\r\nHost: a\r\n" + x.extra + "\r\n")
			head := c.Head()
			if !strings.HasPrefix(head, fmt.Sprintf("HTTP/1.1 %d ", x.status)) {
				t.Errorf("head %q", head)
			}
			// The proxy's own answers carry the route's header mutations, as Envoy's do.
			if strings.HasPrefix(x.extra, "x-idle") && !strings.Contains(head, "x-route-said: yes it did\r\n") {
				t.Errorf("head %q lacks what its route adds", head)
			}
			if x.cut {
				if got, _ := c.Rest(); got != "abc" {
					t.Errorf("body %q", got)
				}
			}
			if r := p.Record(t); r.Flags != x.flags || r.Details != x.details || r.Status != x.status {
				t.Errorf("%+v", r)
			}
		})
	}
	t.Run("DC", func(t *testing.T) {
		c := proxytest.Dial(t, p.Addr)
		c.Send("GET /hang HTTP/1.1\r\nHost: a\r\n\r\n")
		waitFor(t, func() bool { return p.Stats().Requests == 1 })
		_ = c.Close()
		if r := p.Record(t); r.Flags != "DC" || r.Details != "downstream_remote_disconnect" || r.Status != 0 {
			t.Errorf("%+v", r)
		}
	})
}

func TestTheBodyIsSentAgainUpToTheBufferLimit(t *testing.T) {
	for _, x := range []struct {
		size   int
		status string
	}{{1000, "HTTP/1.1 200 OK"}, {60_000, "HTTP/1.1 200 OK"}, {100_000, "HTTP/1.1 503 Service Unavailable"}} {
		n := 0
		u := proxytest.Serve(t, func(c *proxytest.Client) {
			for {
				if _, err := proxytest.ReadHead(c.R); err != nil {
					return
				}
				body := make([]byte, x.size)
				for i := range body {
					b, err := c.R.ReadByte()
					if err != nil {
						return
					}
					body[i] = b
				}
				if strings.Trim(string(body), "x") != "" {
					t.Errorf("another body arrived")
				}
				if n++; n == 1 {
					c.Send("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno")
				} else {
					c.Send(ok)
				}
			}
		})
		b := proxytest.Bootstrap("", `
- match: {prefix: /}
  route: {cluster: u, retry_policy: {retry_on: 5xx, retry_back_off: {base_interval: 0.001s}}}
`, proxytest.Cluster("u", "", u.Port))
		p := proxytest.Start(t, strings.Replace(b, "  - name: test\n", "  - name: test\n    per_connection_buffer_limit_bytes: 65536\n", 1))
		c := proxytest.Dial(t, p.Addr)
		c.Send(fmt.Sprintf("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", x.size) + strings.Repeat("x", x.size))
		if line, _, _ := response(t, c); line != x.status {
			t.Errorf("%d bytes: %q", x.size, line)
		}
	}
}

func TestARetryAvoidsTheHostThatFailed(t *testing.T) {
	bad := proxytest.Answer(t, "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno")
	good := proxytest.Answer(t, ok)
	p := proxytest.Start(t, proxytest.Bootstrap("", `
- match: {prefix: /}
  route:
    cluster: u
    retry_policy:
      retry_on: 5xx
      retry_back_off: {base_interval: 0.001s}
      retry_host_predicate: [{name: envoy.retry_host_predicates.previous_hosts, typed_config: {"@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}}]
      host_selection_retry_max_attempts: 20
`, proxytest.Cluster("u", "lb_policy: RANDOM", bad.Port, good.Port)))
	c := proxytest.Dial(t, p.Addr)
	for range 100 {
		c.Send(getRequest)
		if line, _, _ := response(t, c); line != "HTTP/1.1 200 OK" {
			t.Fatalf("%q", line)
		}
		if r := p.Record(t); r.Upstream != good.Addr {
			t.Fatalf("%+v", r)
		}
	}
}

func TestARequestKeepsTheSnapshotThatItBeganWith(t *testing.T) {
	release := make(chan struct{})
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		_, _ = proxytest.ReadHead(c.R)
		<-release
		c.Send(ok)
	})
	config := func(mark string) string {
		return proxytest.Bootstrap("", `
- match: {prefix: /}
  response_headers_to_add: [{header: {key: x-config, value: `+mark+`}}]
  route: {cluster: u}
`, proxytest.Cluster("u", "", u.Port))
	}
	p := proxytest.Start(t, config("old"))
	c := proxytest.Dial(t, p.Addr)
	c.Send(getRequest)
	waitFor(t, func() bool { st := p.Stats(); return st.Requests == 1 && st.PoolConnecting == 0 })
	p.Update(proxytest.Snapshot(t, config("new")))
	close(release)
	if _, head, _ := response(t, c); !strings.Contains(head, "x-config: old\r\n") {
		t.Errorf("head %q", head)
	}
}
