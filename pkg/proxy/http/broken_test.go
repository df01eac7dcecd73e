package http_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

func TestAnUpstreamThatDiesAtAnyByteCostsOneRequest(t *testing.T) {
	const response200 = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n"
	const fixed = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789"
	for _, whole := range []string{response200, fixed} {
		for _, reset := range []bool{false, true} {
			n := 0
			u := proxytest.Serve(t, func(c *proxytest.Client) {
				if _, err := proxytest.ReadHead(c.R); err != nil {
					return
				}
				c.Send(whole[:n])
				if reset {
					time.Sleep(time.Millisecond) // or the kernel throws the bytes away with the connection
					c.Reset()
				}
			})
			p := start(t, "", u)
			for n = range whole {
				c := proxytest.Dial(t, p.Addr)
				c.Send("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
				got, _ := c.Rest()
				r := p.Record(t)
				headEnd := strings.Index(whole, "\r\n\r\n") + 4
				switch {
				case n == 0:
					if !strings.HasPrefix(got, "HTTP/1.1 503 ") || r.Flags != "UC" {
						t.Fatalf("cut before the response: %q %+v", got, r)
					}
				case n < headEnd:
					if !strings.HasPrefix(got, "HTTP/1.1 502 ") || r.Flags != "UPE" {
						t.Fatalf("cut at byte %d: %q %+v", n, got, r)
					}
				default:
					if !strings.HasPrefix(got, "HTTP/1.1 200 ") || r.Flags != "UPE" || complete(got) {
						t.Fatalf("cut at byte %d: %q %+v", n, got, r)
					}
				}
				_ = c.Close()
			}
			if st := p.Settled(t); st.UpstreamConnections != 0 {
				t.Errorf("%+v", st)
			}
		}
	}
}

// complete says whether a client would take the response to be whole.
func complete(response string) bool {
	head, body, _ := strings.Cut(response, "\r\n\r\n")
	if strings.Contains(head, "chunked") {
		return strings.Contains(body, "0\r\n")
	}
	return len(body) >= 10
}

func TestAClientThatDiesAtAnyByteCostsOneRequest(t *testing.T) {
	const whole = "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n"
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		for {
			if _, err := proxytest.ReadHead(c.R); err != nil {
				return
			}
			_, err := proxytest.ReadHead(c.R) // body and trailers end in an empty line too
			if err != nil {
				return
			}
			time.Sleep(2 * time.Millisecond)
			c.Send(ok)
		}
	})
	p := start(t, "", u)
	for _, reset := range []bool{false, true} {
		for n := range len(whole) + 1 {
			c := proxytest.Dial(t, p.Addr)
			c.Send(whole[:n])
			if n%3 == 0 {
				time.Sleep(time.Millisecond) // so that some are seen in pieces, some at once
			}
			if reset {
				c.Reset()
			} else {
				_ = c.Close()
			}
		}
	}
	p.Settled(t)
	// The proxy is none the worse for it.
	c := proxytest.Dial(t, p.Addr)
	c.Send(whole)
	if line, _, _ := response(t, c); line != "HTTP/1.1 200 OK" {
		t.Errorf("%q", line)
	}
}

func TestGarbageFromAnUpstreamIsABadGateway(t *testing.T) {
	for _, garbage := range []string{
		"garbage\r\n\r\n",
		"SSH-2.0-OpenSSH_9.2\r\n",
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"HTTP/1.1 abc\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("a", 100<<10) + "\r\n\r\n",
		"HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 1000) + "\r\n",
		strings.Repeat("HTTP/1.1 103 Early\r\n\r\n", 1000),
	} {
		u := proxytest.Answer(t, garbage)
		p := start(t, "", u)
		c := proxytest.Dial(t, p.Addr)
		c.Send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		line := ""
		for line == "" || strings.HasPrefix(line, "HTTP/1.1 103") {
			line, _, _ = strings.Cut(c.Head(), "\r\n")
		}
		if line != "HTTP/1.1 502 Bad Gateway" {
			t.Errorf("%.60q became %q", garbage, line)
		}
		if r := p.Record(t); r.Flags != "UPE" || r.Details != "upstream_reset_before_response_started{protocol_error}" {
			t.Errorf("%.60q: %+v", garbage, r)
		}
	}
}

func TestBadChunksInAResponseCutIt(t *testing.T) {
	u := proxytest.Answer(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n")
	p := start(t, "", u)
	c := proxytest.Dial(t, p.Addr)
	c.Send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	c.Head()
	c.Expect("3\r\nabc\r\n")
	if rest, _ := c.Rest(); rest != "" {
		t.Errorf("%q", rest)
	}
	if r := p.Record(t); r.Flags != "UPE" || r.Details != "upstream_reset_after_response_started{protocol_error}" {
		t.Errorf("%+v", r)
	}
}

// What a client has asked for before, on the same connection, and has not read yet must not be lost with an answer that can't
// be finished while it still sends: closing a socket that has unread bytes throws away what it was still to send.
func TestABrokenAnswerTakesNoEarlierOneAlong(t *testing.T) {
	first := strings.Repeat("first", 40_000)
	for name, broken := range map[string]string{
		"of a length": "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsecond",
		"chunked":     "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nsecond\r\n",
		"malformed":   "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nsecond\r\nwhat?\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			u := proxytest.Serve(t, func(c *proxytest.Client) {
				for {
					head, err := proxytest.ReadHead(c.R)
					if err != nil {
						return
					}
					if strings.HasPrefix(head, "POST") {
						c.Send(broken)
						return
					}
					c.Send(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(first), first))
				}
			})
			p := start(t, "", u)
			c := proxytest.Dial(t, p.Addr)
			defer c.Close()
			if err := c.TCPConn.SetReadBuffer(32 << 10); err != nil {
				t.Fatal(err)
			}
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				_, _ = io.WriteString(c.TCPConn, "GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n"+
					strings.Repeat("x", 4<<20))
			}()
			for range 2 { // the second answer has been begun and given up
				p.Record(t)
			}
			time.Sleep(50 * time.Millisecond)
			if res, err := http.ReadResponse(c.R, nil); err != nil {
				t.Error(err)
			} else if body, err := io.ReadAll(res.Body); err != nil || string(body) != first {
				t.Errorf("%d bytes of %d came of the answer before: %v", len(body), len(first), err)
			}
			if res, err := http.ReadResponse(c.R, nil); err == nil {
				if body, err := io.ReadAll(res.Body); err == nil {
					t.Errorf("the broken answer seems whole: %q", body)
				}
			}
			<-sent
		})
	}
}
