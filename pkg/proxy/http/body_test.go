package http_test

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

func TestChunksAndTrailersPassBothWays(t *testing.T) {
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		head, _ := proxytest.ReadHead(c.R)
		if !strings.Contains(head, "transfer-encoding: chunked\r\n") {
			t.Errorf("head %q", head)
		}
		c.Expect("3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n")
		c.Send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ndefg\r\n0\r\nX-Total: 2\r\n\r\n")
	})
	c := proxytest.Dial(t, start(t, "", u).Addr)
	c.Send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n")
	if head := c.Head(); !strings.Contains(head, "transfer-encoding: chunked\r\n") {
		t.Errorf("head %q", head)
	}
	c.Expect("4\r\ndefg\r\n0\r\nx-total: 2\r\n\r\n")
}

func TestABodyUntilCloseBecomesChunked(t *testing.T) {
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		_, _ = proxytest.ReadHead(c.R)
		c.Send("HTTP/1.1 200 OK\r\n\r\nall of it")
	})
	p := start(t, "", u)
	c := proxytest.Dial(t, p.Addr)
	for range 2 {
		c.Send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if head := c.Head(); !strings.Contains(head, "transfer-encoding: chunked\r\n") || strings.Contains(head, "connection: close") {
			t.Errorf("head %q", head)
		}
		c.Expect("9\r\nall of it\r\n0\r\n\r\n")
	}
	if u.Conns() != 2 {
		t.Errorf("%d upstream connections", u.Conns())
	}
}

// echo is an upstream that returns each request's body with the same framing. net/http's server, so that the proxy
// meets a codec that it has not been written against.
func echo(t testing.TB) *proxytest.Upstream {
	return proxytest.Serve(t, func(c *proxytest.Client) {
		for {
			req, err := http.ReadRequest(c.R)
			if err != nil {
				return
			}
			res := &http.Response{StatusCode: 200, ProtoMajor: 1, ProtoMinor: 1, ContentLength: req.ContentLength, Body: req.Body, Request: req}
			if req.ContentLength < 0 {
				res.TransferEncoding = []string{"chunked"}
			}
			if err := res.Write(c.TCPConn); err != nil {
				return
			}
		}
	})
}

func TestBodiesOfAllSizesArriveUnchanged(t *testing.T) {
	p := start(t, "", echo(t))
	rng := rand.New(rand.NewPCG(1, 2))
	body := make([]byte, 3<<20)
	for i := range body {
		body[i] = byte(rng.Uint32())
	}
	for _, chunked := range []bool{false, true} {
		c := proxytest.Dial(t, p.Addr)
		for _, n := range []int{0, 1, 2, 100, 4095, 4096, 8191, 8192, 8193, 65535, 65536, 65537, 200_000, 1 << 20, 3 << 20} {
			req, _ := http.NewRequest("POST", "http://a/", nil)
			req.ContentLength = int64(n)
			if chunked {
				req.ContentLength, req.TransferEncoding = -1, []string{"chunked"}
			}
			req.Body = io.NopCloser(&dribble{body[:n], rng})
			if n == 0 && !chunked {
				req.Body = http.NoBody
			}
			done := make(chan error, 1)
			go func() { done <- req.Write(c.TCPConn) }()
			res, err := http.ReadResponse(c.R, req)
			if err != nil {
				t.Fatalf("chunked %v, %d bytes: %v", chunked, n, err)
			}
			got, err := io.ReadAll(res.Body)
			if err != nil || sha256.Sum256(got) != sha256.Sum256(body[:n]) {
				t.Fatalf("chunked %v, %d bytes: %d came back (%v)", chunked, n, len(got), err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if res.Close { // the echo had begun before the request had ended
				c = proxytest.Dial(t, p.Addr)
			}
		}
	}
}

// dribble reads in pieces of random size.
type dribble struct {
	b   []byte
	rng *rand.Rand
}

func (d *dribble) Read(p []byte) (int, error) {
	if len(d.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), 1+int(d.rng.Uint32()%20000))], d.b)
	d.b = d.b[n:]
	return n, nil
}

// memory is what the process uses besides the kernel's buffers.
func memory() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapInuse
}

func TestASlowReaderHoldsUpTheSenderNotTheProxysMemory(t *testing.T) {
	const size = 200 << 20
	for _, upload := range []bool{false, true} {
		t.Run(fmt.Sprintf("upload=%v", upload), func(t *testing.T) {
			pause := make(chan struct{})
			drain := func(r *bufio.Reader) int64 {
				_, _ = io.CopyN(io.Discard, r, 1000)
				<-pause
				n, _ := io.CopyN(io.Discard, r, size-1000)
				return n + 1000
			}
			received := make(chan int64, 1)
			u := proxytest.Serve(t, func(c *proxytest.Client) {
				_, _ = proxytest.ReadHead(c.R)
				if upload {
					received <- drain(c.R)
					c.Send(ok)
					return
				}
				c.Send(fmt.Sprintf("HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n", size))
				pump(c, size)
			})
			p := start(t, "", u)
			c := proxytest.Dial(t, p.Addr)
			before := memory()
			if upload {
				c.Send(fmt.Sprintf("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", size))
				go pump(c, size)
			} else {
				c.Send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
				c.Head()
				go func() { received <- drain(c.R) }()
			}
			time.Sleep(500 * time.Millisecond)
			if grown := int64(memory()) - int64(before); grown > 16<<20 {
				t.Errorf("%d MiB more in use while nobody reads", grown>>20)
			}
			if n := p.Loop.Stats().BufferBytes; n > 6<<20 {
				t.Errorf("%d KiB of buffers lent", n>>10)
			}
			close(pause)
			if n := <-received; n != size {
				t.Errorf("%d bytes of %d arrived", n, size)
			}
			if upload {
				response(t, c)
			}
		})
	}
}

// pump writes n bytes.
func pump(c *proxytest.Client, n int) {
	piece := make([]byte, 256<<10)
	for n > 0 {
		m, err := c.TCPConn.Write(piece[:min(n, len(piece))])
		if n -= m; err != nil {
			return
		}
	}
}

func TestAResponseMayComeBeforeTheRequestHasEnded(t *testing.T) {
	u := proxytest.Serve(t, func(c *proxytest.Client) {
		_, _ = proxytest.ReadHead(c.R)
		c.Send(ok)
		_, _ = c.Rest()
	})
	p := start(t, "", u)
	c := proxytest.Dial(t, p.Addr)
	c.Send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc")
	if _, head, body := response(t, c); body != "ok" || !strings.Contains(head, "connection: close") {
		t.Errorf("%q %q", head, body)
	}
	c.Send("more of the body that nobody reads")
	_ = c.CloseWrite()
	wantEnd(t, c)
	if st := p.Settled(t); st.UpstreamConnections != 0 {
		t.Errorf("a connection with half a request on it was kept: %+v", st)
	}
}
