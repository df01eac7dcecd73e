package http_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

// TestRandomConversations lets many clients talk at once, in every mixture of sizes, framings, pipelining, slowness,
// aborts, upstream failures and retries, and checks that whoever got an answer got his own, whole and unchanged, and
// that nothing is left behind. SEED= repeats a run.
func TestRandomConversations(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("SEED=%d", seed)
	u := proxytest.Serve(t, moody)
	b := proxytest.Bootstrap("", `
- match: {prefix: /}
  route: {cluster: u, timeout: 30s, retry_policy: {retry_on: "5xx,reset", num_retries: 3, retry_back_off: {base_interval: 0.001s}}}
`, proxytest.Cluster("u", "per_connection_buffer_limit_bytes: 32768\ncircuit_breakers: {thresholds: [{max_retries: 1000}]}", u.Port))
	b = strings.Replace(b, "  - name: test\n", "  - name: test\n    per_connection_buffer_limit_bytes: 32768\n", 1)
	p := proxytest.Start(t, b)
	go func() {
		for range p.Records {
		}
	}()
	var wg sync.WaitGroup
	var answers, aborted int
	var mu sync.Mutex
	for i := range 24 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			for range 40 {
				n, err := converse(t, p.Addr, rng)
				mu.Lock()
				answers += n
				if err != nil {
					aborted++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	st := p.Settled(t)
	t.Logf("%d answers, %d conversations aborted, %+v", answers, aborted, st)
	if answers < 500 {
		t.Errorf("only %d answers", answers)
	}
	if n := p.Loop.Stats().BufferBytes; n > 0 && st.UpstreamConnections == 0 {
		t.Errorf("%d bytes of buffers are lent to nobody", n)
	}
}

// pattern is n bytes that depend on id.
func pattern(id, n int) []byte {
	b := make([]byte, n)
	x := uint32(id)*2654435761 + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

var sizes = []int{0, 1, 100, 4096, 20_000, 70_000, 300_000}

// moody is an upstream that does what the path says: /id/size/mood.
func moody(c *proxytest.Client) {
	rng := rand.New(rand.NewPCG(rand.Uint64(), 7))
	for {
		req, err := http.ReadRequest(c.R)
		if err != nil {
			return
		}
		part := strings.Split(req.URL.Path, "/")
		id, _ := strconv.Atoi(part[1])
		size, _ := strconv.Atoi(part[2])
		mood := part[3]
		if mood == "flaky" && rng.IntN(2) == 0 {
			switch rng.IntN(3) {
			case 0:
				c.Reset()
				return
			case 1:
				return
			}
			_, _ = io.Copy(io.Discard, req.Body)
			c.Send("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy")
			continue
		}
		if mood != "early" {
			got, err := io.ReadAll(req.Body)
			if err != nil {
				return
			}
			want, _ := strconv.Atoi(req.Header.Get("x-size"))
			if !bytes.Equal(got, pattern(id+1, want)) {
				c.Send("HTTP/1.1 400 Bad Request\r\ncontent-length: 7\r\n\r\ncorrupt")
				return
			}
		}
		body := pattern(id, size)
		var out bytes.Buffer
		if chunked := rng.IntN(2) == 0; chunked {
			out.WriteString("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
			for rest := body; len(rest) > 0; {
				n := 1 + rng.IntN(min(len(rest), 30_000))
				fmt.Fprintf(&out, "%x\r\n%s\r\n", n, rest[:n])
				rest = rest[n:]
			}
			out.WriteString("0\r\n\r\n")
		} else {
			fmt.Fprintf(&out, "HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n", size)
			out.Write(body)
		}
		if mood == "slow" {
			for rest := out.Bytes(); len(rest) > 0; {
				n := 1 + rng.IntN(min(len(rest), 20_000))
				if _, err := c.TCPConn.Write(rest[:n]); err != nil {
					return
				}
				rest = rest[n:]
				time.Sleep(time.Duration(rng.IntN(300)) * time.Microsecond)
			}
		} else if _, err := c.TCPConn.Write(out.Bytes()); err != nil {
			return
		}
		if mood == "early" || mood == "closing" {
			return
		}
	}
}

// converse is one connection's worth of requests. It returns how many were answered, and an error if the
// conversation was broken off, which only some are allowed to be.
func converse(t *testing.T, addr string, rng *rand.Rand) (answered int, broken error) {
	c := proxytest.Dial(t, addr)
	defer c.Close()
	moods := []string{"good", "good", "slow", "flaky", "closing", "early"}
	var out bytes.Buffer
	type asked struct {
		id, size, body int
		mood           string
	}
	var list []asked
	for range 1 + rng.IntN(4) {
		a := asked{rng.IntN(1 << 20), sizes[rng.IntN(len(sizes))], sizes[rng.IntN(len(sizes))], moods[rng.IntN(len(moods))]}
		n := a.body
		method := "POST"
		if n == 0 {
			method = "GET"
		}
		fmt.Fprintf(&out, "%s /%d/%d/%s HTTP/1.1\r\nHost: a\r\nX-Size: %d\r\n", method, a.id, a.size, a.mood, n)
		body := pattern(a.id+1, n)
		switch {
		case n == 0:
			out.WriteString("\r\n")
		case rng.IntN(2) == 0:
			out.WriteString("Transfer-Encoding: chunked\r\n\r\n")
			for len(body) > 0 {
				k := 1 + rng.IntN(len(body))
				fmt.Fprintf(&out, "%X;x=y\r\n%s\r\n", k, body[:k])
				body = body[k:]
			}
			out.WriteString("0\r\n\r\n")
		default:
			fmt.Fprintf(&out, "Content-Length: %d\r\n\r\n", n)
			out.Write(body)
		}
		list = append(list, a)
	}
	abort := rng.IntN(10) == 0
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for b := out.Bytes(); len(b) > 0; {
			n := min(len(b), 1+int(pattern(len(b), 1)[0])*300)
			if _, err := c.TCPConn.Write(b[:n]); err != nil {
				return
			}
			b = b[n:]
		}
	}()
	defer func() { _ = c.Close(); <-sent }()
	if abort {
		_ = c.SetReadDeadline(time.Now().Add(time.Duration(rng.IntN(30)) * time.Millisecond))
		_, _ = io.CopyN(io.Discard, c.R, int64(rng.IntN(5000)))
		if rng.IntN(2) == 0 {
			c.Reset()
		}
		return 0, io.ErrClosedPipe
	}
	r := bufio.NewReaderSize(&slowly{c.R, rng}, 4096)
	for _, a := range list {
		res, err := http.ReadResponse(r, nil)
		if err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("no answer to %+v, number %d of %+v", a, answered, list)
		}
		if err != nil {
			return answered, err // after "connection: close", or an upstream that was not whole
		}
		got, err := io.ReadAll(res.Body)
		switch {
		case err != nil && strings.Contains(err.Error(), "timeout"):
			t.Errorf("%d bytes of the answer to %+v, number %d of %+v", len(got), a, answered, list)
		case res.StatusCode == 200 && err == nil:
			if !bytes.Equal(got, pattern(a.id, a.size)) {
				t.Errorf("request %d of %s: %d bytes came, another %d were asked for", a.id, a.mood, len(got), a.size)
			}
		case res.StatusCode == 503 && (a.mood == "flaky" || a.mood == "early"):
		case res.StatusCode == 503 && a.body > 32768: // met a connection that was just being closed, and could not be repeated
		case a.mood == "early" || err != nil && a.mood == "flaky":
			return answered, err
		default:
			t.Errorf("%d, %v for a %s request: %q", res.StatusCode, err, a.mood, got[:min(len(got), 100)])
		}
		answered++
		if res.Close {
			return answered, io.EOF
		}
	}
	return answered, nil
}

// slowly is a reader that takes a rest now and then.
type slowly struct {
	r   io.Reader
	rng *rand.Rand
}

func (s *slowly) Read(p []byte) (int, error) {
	if s.rng.IntN(20) == 0 {
		time.Sleep(time.Duration(s.rng.IntN(1000)) * time.Microsecond)
	}
	return s.r.Read(p[:1+s.rng.IntN(len(p))])
}
