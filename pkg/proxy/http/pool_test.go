package http_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
)

const getRequest = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"

func TestPodsNeverShareAConnection(t *testing.T) {
	u := proxytest.Answer(t, ok)
	p := proxytest.Start(t, proxytest.Bootstrap("", toUpstream, proxytest.Cluster("u", "", u.Port)))
	pods := []*stream.Source{{Key: 1}, {Key: 2}, {Key: 3}}
	var next atomic.Int64
	p.SourceOf = func(netip.AddrPort) *stream.Source { return pods[int(next.Add(1)-1)%len(pods)] }
	for range 12 { // one after the other, so that any connection would be free to be taken
		c := proxytest.Dial(t, p.Addr)
		c.Send(getRequest)
		response(t, c)
		_ = c.Close()
		p.Settled(t)
	}
	if u.Conns() != len(pods) {
		t.Errorf("%d connections for %d pods", u.Conns(), len(pods))
	}
	p.Do(func() { p.Server.RemoveSource(2) })
	if st := p.Settled(t); st.UpstreamConnections != 2 || st.Pools != 2 {
		t.Errorf("after a pod went: %+v", st)
	}
}

func TestTheConnectionUsedLastIsUsedNext(t *testing.T) {
	var serial atomic.Int64
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		id := serial.Add(1)
		for {
			head, err := proxytest.ReadHead(c.R)
			if err != nil {
				return
			}
			if strings.HasPrefix(head, "GET /slow") {
				time.Sleep(100 * time.Millisecond)
			}
			c.Send(fmt.Sprintf("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n%d", id))
		}
	})
	p := start(t, "", u)
	a, b := proxytest.Dial(t, p.Addr), proxytest.Dial(t, p.Addr)
	a.Send("GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
	for p.Stats().Requests == 0 {
		time.Sleep(time.Millisecond)
	}
	b.Send(getRequest)
	response(t, b)
	_, _, last := response(t, a)
	for range 5 {
		b.Send(getRequest)
		if _, _, id := response(t, b); id != last {
			t.Errorf("connection %s was used, %s was used last", id, last)
		}
	}
}

func TestAStaleConnectionIsReplacedForARepeatableRequest(t *testing.T) {
	// The upstream answers one request per connection and then resets it as soon as the next one arrives: the
	// race between a keep-alive time-out and a request, made certain.
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		_, _ = proxytest.ReadHead(c.R)
		c.Send(ok)
		_, _ = proxytest.ReadHead(c.R)
		c.Reset()
	})
	p := start(t, "", u)
	c := proxytest.Dial(t, p.Addr)
	for range 5 {
		c.Send(getRequest)
		if line, _, _ := response(t, c); line != "HTTP/1.1 200 OK" {
			t.Fatalf("%q", line)
		}
		if r := p.Record(t); r.Flags != "-" || r.Attempts != 1 {
			t.Errorf("%+v", r)
		}
	}
	// A POST may have been executed: it is not sent twice.
	c.Send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
	if line, _, _ := response(t, c); line != "HTTP/1.1 503 Service Unavailable" {
		t.Errorf("%q", line)
	}
	if r := p.Record(t); r.Flags != "UC" {
		t.Errorf("%+v", r)
	}
}

func TestBytesThatNobodyAskedForDoNotBecomeTheNextAnswer(t *testing.T) {
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		for {
			if _, err := proxytest.ReadHead(c.R); err != nil {
				return
			}
			c.Send(ok + "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
		}
	})
	p := start(t, "", u)
	c := proxytest.Dial(t, p.Addr)
	for range 5 {
		c.Send(getRequest)
		if _, _, body := response(t, c); body != "ok" {
			t.Fatalf("%q", body)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if u.Conns() != 5 {
		t.Errorf("%d connections: one that said too much was used again", u.Conns())
	}
}

func TestAConnectionEndsWhenItsClusterSaysSo(t *testing.T) {
	u := proxytest.Answer(t, ok)
	const options = `
typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    common_http_protocol_options: {%s}
    explicit_http_config: {http_protocol_options: {}}
`
	p := proxytest.Start(t, proxytest.Bootstrap("", toUpstream, proxytest.Cluster("u", fmt.Sprintf(options, "max_requests_per_connection: 2"), u.Port)))
	c := proxytest.Dial(t, p.Addr)
	for range 6 {
		c.Send(getRequest)
		response(t, c)
	}
	if u.Conns() != 3 {
		t.Errorf("%d connections for 6 requests, 2 on each", u.Conns())
	}
	p = proxytest.Start(t, proxytest.Bootstrap("", toUpstream, proxytest.Cluster("u", fmt.Sprintf(options, "idle_timeout: 0.1s"), u.Port)))
	c = proxytest.Dial(t, p.Addr)
	c.Send(getRequest)
	response(t, c)
	for deadline := time.Now().Add(20 * time.Second); p.Stats().UpstreamConnections > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("an idle connection was kept")
		}
	}
}

func TestRequestsWaitForAConnectionInOrderAndTheQueueIsBounded(t *testing.T) {
	release := make(chan struct{})
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		for {
			if _, err := proxytest.ReadHead(c.R); err != nil {
				return
			}
			<-release
			c.Send(ok)
		}
	})
	p := proxytest.Start(t, proxytest.Bootstrap("", toUpstream, proxytest.Cluster("u",
		"circuit_breakers: {thresholds: [{max_connections: 1, max_pending_requests: 2}]}", u.Port)))
	var clients []*proxytest.Client
	send := func() {
		c := proxytest.Dial(t, p.Addr)
		c.Send(getRequest)
		clients = append(clients, c)
	}
	send()
	waitFor(t, func() bool { st := p.Stats(); return st.Requests == 1 && st.PoolWaiting == 0 && st.PoolConnecting == 0 })
	send()
	send()
	waitFor(t, func() bool { return p.Stats().PoolWaiting == 2 })
	send()
	line, head, body := response(t, clients[3])
	if line != "HTTP/1.1 503 Service Unavailable" || !strings.Contains(head, "x-envoy-overloaded: true\r\n") || !strings.HasSuffix(body, "reset reason: overflow") {
		t.Errorf("%q %q", head, body)
	}
	if r := p.Record(t); r.Flags != "UO" || r.Details != "upstream_reset_before_response_started{overflow}" {
		t.Errorf("%+v", r)
	}
	close(release)
	for _, c := range clients[:3] {
		if line, _, _ := response(t, c); line != "HTTP/1.1 200 OK" {
			t.Errorf("%q", line)
		}
	}
	if u.Conns() != 1 {
		t.Errorf("%d connections though one is allowed", u.Conns())
	}
}

func waitFor(t testing.TB, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("did not happen in time")
		}
	}
}

func TestAClientThatLeavesTheQueueIsForgotten(t *testing.T) {
	release := make(chan struct{})
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		for {
			if _, err := proxytest.ReadHead(c.R); err != nil {
				return
			}
			<-release
			c.Send(ok)
		}
	})
	p := proxytest.Start(t, proxytest.Bootstrap("", toUpstream, proxytest.Cluster("u",
		"circuit_breakers: {thresholds: [{max_connections: 1}]}", u.Port)))
	first := proxytest.Dial(t, p.Addr)
	first.Send(getRequest)
	waitFor(t, func() bool { st := p.Stats(); return st.Requests == 1 && st.PoolConnecting == 0 })
	for range 10 {
		c := proxytest.Dial(t, p.Addr)
		c.Send(getRequest)
		waitFor(t, func() bool { return p.Stats().PoolWaiting == 1 })
		_ = c.Close()
		waitFor(t, func() bool { return p.Stats().PoolWaiting == 0 })
		if r := p.Record(t); r.Flags != "DC" {
			t.Errorf("%+v", r)
		}
	}
	close(release)
	response(t, first)
}

func TestAnEndpointThatIsTakenOutLosesItsIdleConnections(t *testing.T) {
	u, v := proxytest.Answer(t, ok), proxytest.Answer(t, ok)
	p := start(t, "", u)
	c := proxytest.Dial(t, p.Addr)
	c.Send(getRequest)
	response(t, c)
	p.Update(proxytest.Snapshot(t, proxytest.Bootstrap("", toUpstream, proxytest.Cluster("u", "", v.Port))))
	waitFor(t, func() bool { return p.Stats().UpstreamConnections == 0 })
	c.Send(getRequest) // the same client connection goes on, at the new endpoint
	if line, _, _ := response(t, c); line != "HTTP/1.1 200 OK" || v.Conns() != 1 {
		t.Errorf("%q, %d connections to the new endpoint", line, v.Conns())
	}
}

func TestAConnectThatIsNotAnsweredTimesOut(t *testing.T) {
	// A listening socket whose queue is full does not answer a SYN.
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	proxytest.ShrinkBacklog(t, ln)
	port := ln.Addr().(*net.TCPAddr).Port
	for range 8 {
		if c, err := net.DialTimeout("tcp", ln.Addr().String(), 100*time.Millisecond); err == nil {
			defer c.Close()
		}
	}
	p := proxytest.Start(t, strings.Replace(
		proxytest.Bootstrap("", toUpstream, proxytest.Cluster("u", "", port)), "connect_timeout: 1s", "connect_timeout: 0.2s", 1))
	c := proxytest.Dial(t, p.Addr)
	c.Send(getRequest)
	if line, _, body := response(t, c); line != "HTTP/1.1 503 Service Unavailable" || !strings.HasSuffix(body, "reset reason: connection timeout") {
		t.Errorf("%q %q", line, body)
	}
	if r := p.Record(t); r.Flags != "UF" {
		t.Errorf("%+v", r)
	}
}
