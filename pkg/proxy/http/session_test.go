package http_test

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

const ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

// echoPath answers each request with its target as the body.
func echoPath(t testing.TB) *proxytest.Upstream {
	return proxytest.Serve(t, func(c *proxytest.Client) {
		for {
			head, err := proxytest.ReadHead(c.R)
			if err != nil {
				return
			}
			path := strings.Fields(head)[1]
			if strings.HasPrefix(path, "/slow") {
				time.Sleep(50 * time.Millisecond)
			}
			c.Send(fmt.Sprintf("HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s", len(path), path))
		}
	})
}

func start(t testing.TB, hcm string, u *proxytest.Upstream) *proxytest.Proxy {
	t.Helper()
	return proxytest.Start(t, proxytest.Bootstrap(hcm, toUpstream, proxytest.Cluster("u", "", u.Port)))
}

// status reads a response with a content-length and returns its status line, head and body.
func response(t testing.TB, c *proxytest.Client) (line, head, body string) {
	t.Helper()
	head = c.Head()
	line, _, _ = strings.Cut(head, "\r\n")
	var n int
	if _, rest, found := strings.Cut(strings.ToLower(head), "content-length: "); found {
		_, _ = fmt.Sscanf(rest, "%d", &n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c.R, b); err != nil {
		t.Fatalf("body after %q: %v", head, err)
	}
	return line, head, string(b)
}

func wantEnd(t testing.TB, c *proxytest.Client) {
	t.Helper()
	if rest, err := c.Rest(); rest != "" || err != nil {
		t.Errorf("the connection should have ended: %q, %v", rest, err)
	}
}

func TestPipelinedRequestsAreAnsweredInOrder(t *testing.T) {
	p := start(t, "", echoPath(t))
	c := proxytest.Dial(t, p.Addr)
	var all strings.Builder
	for i := range 50 {
		kind := "fast"
		if i%10 == 0 {
			kind = "slow"
		}
		fmt.Fprintf(&all, "GET /%s/%d HTTP/1.1\r\nHost: a\r\n\r\n", kind, i)
	}
	c.Send(all.String())
	for i := range 50 {
		_, _, body := response(t, c)
		if !strings.HasSuffix(body, fmt.Sprintf("/%d", i)) {
			t.Fatalf("answer %d is %q", i, body)
		}
	}
}

func TestARequestMayComeByteByByte(t *testing.T) {
	p := start(t, "", echoPath(t))
	c := proxytest.Dial(t, p.Addr)
	for _, b := range []byte("GET /x HTTP/1.1\r\nHost: a\r\nX-Y: z\r\n\r\n") {
		c.Send(string(b))
		time.Sleep(200 * time.Microsecond)
	}
	if _, _, body := response(t, c); body != "/x" {
		t.Errorf("body %q", body)
	}
}

func TestBlankLinesBetweenRequestsAreSkipped(t *testing.T) {
	p := start(t, "", echoPath(t))
	c := proxytest.Dial(t, p.Addr)
	c.Send("\r\nGET /1 HTTP/1.1\r\nHost: a\r\n\r\n\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n\r\n")
	for _, want := range []string{"/1", "/2"} {
		if _, _, body := response(t, c); body != want {
			t.Errorf("body %q, want %q", body, want)
		}
	}
}

func TestAResponseToHeadHasNoBody(t *testing.T) {
	u := proxytest.Answer(t, "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
	p := start(t, "", u)
	c := proxytest.Dial(t, p.Addr)
	for range 2 {
		c.Send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
		if head := c.Head(); !strings.Contains(head, "content-length: 1000\r\n") {
			t.Errorf("head %q", head)
		}
	}
	if u.Conns() != 1 {
		t.Errorf("%d upstream connections", u.Conns())
	}
}

func TestAContinueIsSentBeforeTheBody(t *testing.T) {
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		head, _ := proxytest.ReadHead(c.R)
		if strings.Contains(head, "\nexpect:") {
			t.Errorf("expect went upstream: %q", head)
		}
		c.Expect("hello")
		c.Send("HTTP/1.1 100 Continue\r\n\r\n" + ok)
	})
	c := proxytest.Dial(t, start(t, "", u).Addr)
	c.Send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
	c.Expect("HTTP/1.1 100 Continue\r\n\r\n")
	c.Send("hello")
	if line, _, body := response(t, c); line != "HTTP/1.1 200 OK" || body != "ok" {
		t.Errorf("%q %q", line, body)
	}
}

func TestOtherInformationalResponsesPass(t *testing.T) {
	u := proxytest.Answer(t, "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n"+ok)
	c := proxytest.Dial(t, start(t, "", u).Addr)
	c.Send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	c.Expect("HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n")
	if line, _, _ := response(t, c); line != "HTTP/1.1 200 OK" {
		t.Errorf("%q", line)
	}
}

func TestConnectionCloseIsHonoured(t *testing.T) {
	c := proxytest.Dial(t, start(t, "", echoPath(t)).Addr)
	c.Send("GET /1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
	if _, head, _ := response(t, c); !strings.Contains(head, "connection: close\r\n") {
		t.Errorf("head %q", head)
	}
	wantEnd(t, c)
}

func TestAConnectionEndsAfterItsNumberOfRequests(t *testing.T) {
	c := proxytest.Dial(t, start(t, "common_http_protocol_options: {max_requests_per_connection: 2}", echoPath(t)).Addr)
	c.Send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\n")
	response(t, c)
	c.Send("GET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
	if _, head, _ := response(t, c); !strings.Contains(head, "connection: close\r\n") {
		t.Errorf("head %q", head)
	}
	_ = c.CloseWrite()
	wantEnd(t, c)
}

func TestAnIdleConnectionIsClosed(t *testing.T) {
	c := proxytest.Dial(t, start(t, "common_http_protocol_options: {idle_timeout: 0.2s}", echoPath(t)).Addr)
	c.Send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\n")
	response(t, c)
	wantEnd(t, c)
}

func TestASlowHeadIsAnsweredWith408(t *testing.T) {
	p := start(t, "request_headers_timeout: 0.2s", echoPath(t))
	c := proxytest.Dial(t, p.Addr)
	go func() { // a byte now and then does not help
		for range 100 {
			if _, err := c.TCPConn.Write([]byte("G")); err != nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	if line, head, body := response(t, c); line != "HTTP/1.1 408 Request Timeout" || body != "request header timeout" ||
		!strings.Contains(head, "connection: close") {
		t.Errorf("%q %q", head, body)
	}
	if r := p.Record(t); r.Details != "request_header_timeout" {
		t.Errorf("%+v", r)
	}
}

func TestASlowBodyIsAnsweredWith408(t *testing.T) {
	p := start(t, "request_timeout: 0.2s", echoPath(t))
	c := proxytest.Dial(t, p.Addr)
	c.Send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")
	// The upstream of this test answers after the head; the client never sees that its body was too slow then.
	if line, _, _ := response(t, c); line != "HTTP/1.1 200 OK" {
		t.Errorf("%q", line)
	}
	quiet := proxytest.Serve(t, func(c *proxytest.Client) { _, _ = c.Rest() })
	p = start(t, "request_timeout: 0.2s", quiet)
	c = proxytest.Dial(t, p.Addr)
	c.Send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")
	if line, _, body := response(t, c); line != "HTTP/1.1 408 Request Timeout" || body != "request timeout" {
		t.Errorf("%q %q", line, body)
	}
}

func TestAnEndlessHeadIsRefusedWhileItComes(t *testing.T) {
	p := start(t, "", echoPath(t))
	c := proxytest.Dial(t, p.Addr)
	sent := make(chan int)
	go func() {
		total := 0
		line := "X-Filler: " + strings.Repeat("a", 1000) + "\r\n"
		_, err := c.TCPConn.Write([]byte("GET / HTTP/1.1\r\nHost: a\r\n"))
		for err == nil && total < 100<<20 {
			var n int
			n, err = c.TCPConn.Write([]byte(line))
			total += n
		}
		sent <- total
	}()
	if line, _, _ := response(t, c); line != "HTTP/1.1 431 Request Header Fields Too Large" {
		t.Errorf("%q", line)
	}
	_ = c.Close()
	if n := <-sent; n >= 100<<20 {
		t.Errorf("the proxy went on reading")
	}
	if r := p.Record(t); r.Flags != "DPE" || r.Status != 431 {
		t.Errorf("%+v", r)
	}
}

func TestSmugglingShapesAreRefused(t *testing.T) {
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		if head, err := proxytest.ReadHead(c.R); err == nil {
			t.Errorf("went upstream: %q", head)
		}
	})
	p := start(t, "", u)
	for _, request := range []string{
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4, 5\r\n\r\nabcd",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +4\r\n\r\nabcd",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nX: a\nY: b\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: x-forwarded-for\r\n\r\n",
		"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
	} {
		c := proxytest.Dial(t, p.Addr)
		c.Send(request)
		line, head, _ := response(t, c)
		if !strings.HasPrefix(line, "HTTP/1.1 4") && !strings.HasPrefix(line, "HTTP/1.1 501") || !strings.Contains(head, "connection: close") {
			t.Errorf("%q was answered %q", request, head)
		}
		_ = c.CloseWrite()
		wantEnd(t, c)
		if r := p.Record(t); r.Flags != "DPE" {
			t.Errorf("%q: %+v", request, r)
		}
	}
	p.Settled(t)
}

func TestASenderOfMuchReadsItsEarlyRefusal(t *testing.T) {
	// The client is in the middle of a large body when it is refused. A proxy that closed at once would have
	// its answer destroyed by the RST that the rest of the body meets.
	p := proxytest.Start(t, proxytest.Bootstrap("", `
- match: {prefix: /}
  direct_response: {status: 413, body: {inline_string: too much}}
`, ""))
	for range 20 {
		c := proxytest.Dial(t, p.Addr)
		go c.Send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n\r\n" + strings.Repeat("x", 3000000))
		line, head, body := response(t, c)
		if line != "HTTP/1.1 413 Request Entity Too Large" || body != "too much" || !strings.Contains(head, "connection: close") {
			t.Fatalf("%q %q", head, body)
		}
		_ = c.Close()
	}
	p.Settled(t)
}

func TestAFloodOfPipelinedRequestsIsNotTakenIn(t *testing.T) {
	hold := make(chan struct{})
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		for {
			if _, err := proxytest.ReadHead(c.R); err != nil {
				return
			}
			<-hold
			c.Send(ok)
		}
	})
	p := start(t, "", u)
	c := proxytest.Dial(t, p.Addr)
	sent := make(chan int)
	go func() {
		n := 0
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		for n < 64<<20 {
			m, err := c.TCPConn.Write([]byte(strings.Repeat("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 1000)))
			n += m
			if err != nil {
				break
			}
		}
		sent <- n
	}()
	if n := <-sent; n >= 64<<20 {
		t.Error("the proxy took in 64 MiB of requests that it had not begun with")
	}
	if n := p.Loop.Stats().BufferBytes; n > 1<<20 {
		t.Errorf("%d bytes are kept", n)
	}
	close(hold)
}

func TestDrainEndsIdleConnectionsNowAndBusyOnesAfterTheirResponse(t *testing.T) {
	release := make(chan struct{})
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		for {
			head, err := proxytest.ReadHead(c.R)
			if err != nil {
				return
			}
			if strings.HasPrefix(head, "GET /wait") {
				<-release
			}
			c.Send(ok)
		}
	})
	p := start(t, "", u)
	idle, busy := proxytest.Dial(t, p.Addr), proxytest.Dial(t, p.Addr)
	idle.Send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	response(t, idle)
	busy.Send("GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
	for p.Stats().Requests == 0 {
		time.Sleep(time.Millisecond)
	}
	p.Do(p.Server.Drain)
	wantEnd(t, idle)
	close(release)
	if _, head, body := response(t, busy); body != "ok" || !strings.Contains(head, "connection: close\r\n") {
		t.Errorf("%q %q", head, body)
	}
	wantEnd(t, busy)
	p.Settled(t)
}

func TestManyRequestsLeaveNothingBehind(t *testing.T) {
	p := start(t, "", echoPath(t))
	for range 20 {
		c := proxytest.Dial(t, p.Addr)
		for range 100 {
			c.Send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\n")
			response(t, c)
		}
		_ = c.Close()
	}
	if st := p.Settled(t); st.UpstreamConnections != 1 || st.PoolIdle != 1 {
		t.Errorf("%+v", st)
	}
}

func TestARequestThatIsUnderWayWhenDrainBeginsIsAnswered(t *testing.T) {
	// Clients that are busy all the time: none of them may lose a request to the drain.
	p := start(t, "", echoPath(t))
	type result struct {
		answered int
		err      error
	}
	results := make(chan result)
	for range 8 {
		go func() {
			c := proxytest.Dial(t, p.Addr)
			for n := 0; ; n++ {
				c.Send("GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
				head, err := proxytest.ReadHead(c.R)
				if err != nil {
					results <- result{n, err}
					return
				}
				c.Expect("/x")
				if strings.Contains(head, "connection: close") {
					results <- result{n, nil}
					return
				}
			}
		}()
	}
	time.Sleep(50 * time.Millisecond)
	p.Do(p.Server.Drain)
	for range 8 {
		if r := <-results; r.err != nil {
			t.Errorf("after %d requests: %v", r.answered, r.err)
		}
	}
}
