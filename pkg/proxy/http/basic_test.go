package http_test

import (
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

// toUpstream routes everything to one cluster.
const toUpstream = `
- match: {prefix: /}
  route: {cluster: u}
`

func TestARequestIsForwardedAndAnswered(t *testing.T) {
	u := proxytest.Answer(t, "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
	p := proxytest.Start(t, proxytest.Bootstrap("", toUpstream, proxytest.Cluster("u", "", u.Port)))
	c := proxytest.Dial(t, p.Addr)
	for range 3 {
		c.Send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		head := c.Head()
		if !strings.HasPrefix(head, "HTTP/1.1 200 OK\r\n") || !strings.Contains(head, "\r\nserver: envoy\r\n") {
			t.Fatalf("head %q", head)
		}
		c.Expect("hello")
		if r := p.Record(t); r.Status != 200 || r.Flags != "-" || r.Details != "via_upstream" || r.Sent != 5 {
			t.Errorf("record %+v", r)
		}
	}
	if u.Conns() != 1 {
		t.Errorf("%d upstream connections for three requests", u.Conns())
	}
}
