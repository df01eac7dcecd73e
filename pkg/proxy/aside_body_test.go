package proxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// Bodies of known length skip the proxy, and the next message is the proxy's again.

// bodied is an engine with an HTTP listener, and a server that says what it is asked for.
type bodied struct {
	*hooked
	log string // its file
}

// backends are both ways to do I/O that the loop has.
var backends = []string{loop.IOEpoll, loop.IORing}

func newBodied(t *testing.T, backend string, change ...func(*setup)) *bodied {
	logs := telemetry.NewLogs()
	h := &bodied{log: filepath.Join(t.TempDir(), "access.log")}
	h.hooked = newStepping(t, 3, append([]func(*setup){func(s *setup) {
		s.chain = httpChain(t, "orig")
		s.chain.HTTP.AccessLog = []*mesh.AccessLog{{Path: h.log,
			Format: "%RESPONSE_CODE% %BYTES_RECEIVED% %BYTES_SENT% %RESPONSE_FLAGS% %UPSTREAM_WIRE_BYTES_SENT% %UPSTREAM_HEADER_BYTES_SENT% " +
				"%UPSTREAM_WIRE_BYTES_RECEIVED% %UPSTREAM_HEADER_BYTES_RECEIVED%\n"}}
		s.engine.Logs = logs
		s.engine.IO = backend
	}}, change...)...)
	t.Cleanup(func() {
		h.e.Close() // who logs ends before the logs do
		_ = logs.Close()
	})
	h.serveBodies(t)
	return h
}

// bodyOf is what a message with that number says.
func bodyOf(id uint32, size int) []byte {
	b := make([]byte, size)
	x := id*2654435761 + 977
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// serveBodies answers requests. X-Length is the answer's length, X-Piece that of the server's writes, X-Rest a pause after
// the first of them, X-Every one behind each, and X-Cut after how many bytes the server resets or, X-End, closes or, X-Hold, waits. It checks the requests' bodies.
func serveBodies(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * patience))
	in := bufio.NewReaderSize(c, 16<<10)
	for {
		rq, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		number := func(field string) int {
			n, _ := strconv.Atoi(rq.Header.Get(field))
			return n
		}
		got, err := io.ReadAll(onlyReader{rq.Body})
		if err != nil {
			return
		}
		id := uint32(number("X-Id"))
		verdict := "right"
		if !bytes.Equal(got, bodyOf(^id, int(max(rq.ContentLength, 0)))) {
			verdict = "wrong"
		}
		body := bodyOf(id, number("X-Length"))
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Verdict: %s\r\n\r\n", len(body), verdict)
		cut := len(body)
		if rq.Header.Get("X-Cut") != "" {
			cut = number("X-Cut")
		}
		rest, every := time.Duration(number("X-Rest"))*time.Millisecond, time.Duration(number("X-Every"))*time.Millisecond
		if err := inPieces(c, body[:cut], number("X-Piece"), rest, every); err != nil {
			return
		}
		if rq.Header.Get("X-Hold") != "" {
			_, _ = io.ReadAll(onlyReader{c}) // until the other gives up
			return
		}
		if cut < len(body) {
			if rq.Header.Get("X-End") == "" {
				_ = c.(*net.TCPConn).SetLinger(0)
			}
			return
		}
	}
}

// onlyReader keeps the standard library from splicing.
type onlyReader struct{ io.Reader }

// inPieces writes b in pieces, resting behind the first and behind every one.
func inPieces(c net.Conn, b []byte, piece int, rest, every time.Duration) error {
	if piece <= 0 {
		piece = 64 << 10
	}
	for len(b) > 0 {
		n, err := c.Write(b[:min(piece, len(b))])
		if err != nil {
			return err
		}
		b = b[n:]
		time.Sleep(rest + every)
		rest = 0
	}
	return nil
}

// exchange is one request and what should come of it.
type exchange struct {
	id          uint32
	up, down    int // lengths of the bodies
	piece, rest int
	more        string // fields
}

func (x *exchange) head() string {
	method := "GET"
	length := ""
	if x.up > 0 {
		method, length = "POST", fmt.Sprintf("Content-Length: %d\r\n", x.up)
	}
	return fmt.Sprintf("%s / HTTP/1.1\r\nHost: a\r\nX-Id: %d\r\nX-Length: %d\r\nX-Piece: %d\r\nX-Rest: %d\r\n%s%s\r\n", method, x.id, x.down, x.piece,
		x.rest, length, x.more)
}

// send writes the request.
func (x *exchange) send(c net.Conn) error {
	if _, err := io.WriteString(c, x.head()); err != nil {
		return err
	}
	return inPieces(c, bodyOf(^x.id, x.up), x.piece, time.Duration(x.rest)*time.Millisecond, 0)
}

// receive reads the response and compares it.
func (x *exchange) receive(in *bufio.Reader) error {
	rs, err := http.ReadResponse(in, nil)
	if err != nil {
		return fmt.Errorf("message %d: %w", x.id, err)
	}
	if rs.StatusCode != 200 || rs.Header.Get("X-Verdict") != "right" {
		return fmt.Errorf("message %d: %d, the request's body came %q", x.id, rs.StatusCode, rs.Header.Get("X-Verdict"))
	}
	if rs.ContentLength != int64(x.down) {
		return fmt.Errorf("message %d has %d bytes instead of %d", x.id, rs.ContentLength, x.down)
	}
	want := bodyOf(x.id, x.down)
	b := make([]byte, 64<<10)
	for at := 0; at < len(want); {
		n, err := rs.Body.Read(b)
		if !bytes.Equal(b[:n], want[at:min(at+n, len(want))]) {
			return fmt.Errorf("message %d has wrong bytes behind %d of %d", x.id, at, len(want))
		}
		if at += n; err != nil && at < len(want) {
			return fmt.Errorf("message %d ends at %d of %d: %w", x.id, at, len(want), err)
		}
	}
	return nil
}

// connectBodied makes a client's connection.
func (h *bodied) connect(t testing.TB, addr string) (*net.TCPConn, *bufio.Reader) {
	t.Helper()
	c, err := dialIn(t, h.pod, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * patience))
	return c, bufio.NewReaderSize(c, 4<<10)
}

// logged waits for so many lines of the access log: status, the bodies' bytes from and to the client, flags, and the bodies' bytes
// to and from the endpoint.
func (h *bodied) logged(t testing.TB, lines int) (list []string) {
	t.Helper()
	var got []byte
	for end := time.Now().Add(patience); bytes.Count(got, []byte("\n")) < lines && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		got, _ = os.ReadFile(h.log)
	}
	for line := range bytes.Lines(got) {
		var status, received, sent int
		var flags string
		var wire [4]int
		if _, err := fmt.Sscan(string(line), &status, &received, &sent, &flags, &wire[0], &wire[1], &wire[2], &wire[3]); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		list = append(list, words(status, received, sent, flags, wire[0]-wire[1], wire[2]-wire[3]))
	}
	return list
}

// words are the arguments with spaces between them.
func words(args ...any) string { return strings.TrimSpace(fmt.Sprintln(args...)) }

func TestALongBodySkipsTheProxyAndTheNextMessageDoesNot(t *testing.T) {
	const big, small, n = 8 << 20, 100, 5
	for _, backend := range backends {
		t.Run(backend, func(t *testing.T) {
			h := newBodied(t, backend)
			for i, addr := range []string{"10.98.0.2:8080", "[fd98::2]:8080"} {
				c, in := h.connect(t, addr)
				for j := range n {
					// The sender rests once, so that the proxy catches up.
					x := exchange{id: uint32(j), up: small, down: small, rest: 30}
					switch j {
					case 1:
						x.down = big
					case 3:
						x.up = big
					}
					long := x.up+x.down > big
					before := h.counters(t)
					done := make(chan error, 1)
					go func() { done <- x.send(c) }()
					if err := errors.Join(x.receive(in), <-done); err != nil {
						t.Fatal(err)
					}
					after := h.counters(t)
					bytes, bodies := after.AsideBodyBytes-before.AsideBodyBytes, after.AsideBodies-before.AsideBodies
					if !long && (bytes > 0 || bodies > 0) {
						t.Errorf("%d bytes of a short message skipped the proxy", bytes)
					}
					if long && (bytes < big/2 || bytes >= big || bodies != 1) {
						t.Errorf("%s: %d bytes of %d bodies skipped the proxy, of %d", addr, bytes, bodies, big)
					}
					list := h.logged(t, i*n+j+1)
					if want := words(200, x.up, x.down, "-", x.up, x.down); list[len(list)-1] != want {
						t.Errorf("logged %q, want %q", list[len(list)-1], want)
					}
				}
			}
		})
	}
}
