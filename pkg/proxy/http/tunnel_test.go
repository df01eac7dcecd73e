package http_test

import (
	"io"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

const (
	wsConfig  = "upgrade_configs: [{upgrade_type: websocket}]"
	wsRequest = "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n"
	wsAnswer  = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
)

// tunnel connects a client and an upstream by a WebSocket upgrade.
func tunnel(t *testing.T) (p *proxytest.Proxy, client, server *proxytest.Client) {
	t.Helper()
	servers, done := make(chan *proxytest.Client), make(chan struct{})
	t.Cleanup(func() { close(done) })
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		head, _ := proxytest.ReadHead(c.R)
		if !strings.Contains(head, "connection: upgrade\r\n") || !strings.Contains(head, "upgrade: websocket\r\n") {
			t.Errorf("head %q", head)
		}
		c.Send(wsAnswer)
		servers <- c
		<-done
	})
	p = start(t, wsConfig, u)
	client = proxytest.Dial(t, p.Addr)
	client.Send(wsRequest)
	server = <-servers
	if head := client.Head(); !strings.HasPrefix(head, "HTTP/1.1 101 ") || !strings.Contains(head, "upgrade: websocket\r\n") {
		t.Fatalf("head %q", head)
	}
	return p, client, server
}

func TestAWebSocketIsATunnelBothWays(t *testing.T) {
	p, client, server := tunnel(t)
	for range 100 {
		client.Send("ping")
		server.Expect("ping")
		server.Send("pong")
		client.Expect("pong")
	}
	// Something that looks like HTTP is not.
	client.Send("GET / HTTP/1.1\r\n\r\n")
	server.Expect("GET / HTTP/1.1\r\n\r\n")
	_ = client.CloseWrite()
	wantEnd(t, server)
	server.Send("after the client's end")
	_ = server.CloseWrite()
	if rest, err := client.Rest(); rest != "after the client's end" || err != nil {
		t.Errorf("%q %v", rest, err)
	}
	if r := p.Record(t); r.Status != 101 || r.Flags != "-" || r.Received != 400+18 {
		t.Errorf("%+v", r)
	}
	if st := p.Settled(t); st.UpstreamConnections != 0 {
		t.Errorf("%+v", st)
	}
}

func TestTheServersEndLeavesTheClientsDirectionOpen(t *testing.T) {
	p, client, server := tunnel(t)
	server.Send("bye")
	_ = server.CloseWrite()
	client.Expect("bye")
	wantEnd(t, client)
	client.Send("still here")
	server.Expect("still here")
	_ = client.Close()
	wantEnd(t, server)
	p.Settled(t)
}

func TestAResetGoesThroughATunnel(t *testing.T) {
	for _, byClient := range []bool{true, false} {
		p, client, server := tunnel(t)
		from, to := client, server
		if !byClient {
			from, to = server, client
		}
		from.Reset()
		if b, err := to.Rest(); b != "" || err == nil && !byClient {
			t.Errorf("reset by client %v: the other side read %q, %v", byClient, b, err)
		}
		p.Settled(t)
	}
}

func TestBytesBehindTheUpgradeRequestWaitForTheAnswer(t *testing.T) {
	arrived := make(chan struct{})
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		_, _ = proxytest.ReadHead(c.R)
		c.Send(wsAnswer + "hello")
		c.Expect("early bytes")
		close(arrived)
		_, _ = io.Copy(io.Discard, c.R)
	})
	c := proxytest.Dial(t, start(t, wsConfig, u).Addr)
	c.Send(wsRequest + "early bytes")
	c.Head()
	c.Expect("hello")
	<-arrived // not before the server has them may the test take the proxy down
}

func TestARefusedUpgradeIsAnOrdinaryResponse(t *testing.T) {
	u := proxytest.Answer(t, "HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno")
	p := start(t, wsConfig, u)
	c := proxytest.Dial(t, p.Addr)
	c.Send(wsRequest + "GET /must-not-be-seen HTTP/1.1\r\nHost: a\r\n\r\n")
	line, head, body := response(t, c)
	if line != "HTTP/1.1 404 Not Found" || body != "no" || !strings.Contains(head, "connection: close") {
		t.Errorf("%q %q", head, body)
	}
	_ = c.CloseWrite()
	wantEnd(t, c)
	p.Settled(t)
}

func TestAnUpgradeThatIsNotConfiguredIsForbidden(t *testing.T) {
	p := start(t, "", proxytest.Answer(t, ok))
	c := proxytest.Dial(t, p.Addr)
	c.Send(wsRequest)
	if line, _, _ := response(t, c); line != "HTTP/1.1 403 Forbidden" {
		t.Errorf("%q", line)
	}
	if r := p.Record(t); r.Details != "upgrade_failed" {
		t.Errorf("%+v", r)
	}
}

func TestA101ThatNobodyAskedForIsRefused(t *testing.T) {
	p := start(t, wsConfig, proxytest.Answer(t, wsAnswer))
	c := proxytest.Dial(t, p.Addr)
	c.Send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if line, _, _ := response(t, c); line != "HTTP/1.1 502 Bad Gateway" {
		t.Errorf("%q", line)
	}
	if r := p.Record(t); r.Flags != "UPE" {
		t.Errorf("%+v", r)
	}
}
