package envoydiff

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

// scripted is an upstream that does what a request's x-do header says, and remembers the requests.
type scripted struct {
	*proxytest.Upstream
	mu   sync.Mutex
	seen []string
	n    int
}

func newScripted(t *testing.T) *scripted {
	s := &scripted{}
	s.Upstream = proxytest.Serve(t, s.serve)
	return s
}

// take returns what was seen since the last call.
func (s *scripted) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := s.seen
	s.seen, s.n = nil, 0
	return seen
}

func (s *scripted) serve(c *proxytest.Client) {
	for {
		head, err := proxytest.ReadHead(c.R)
		if err != nil {
			return
		}
		do := field(head, "x-do")
		if do == "early" {
			c.Send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nearly")
		}
		body, err := readBody(c.R, head)
		s.mu.Lock()
		s.seen = append(s.seen, head+body)
		s.n++
		n := s.n
		s.mu.Unlock()
		if err != nil {
			return
		}
		// "a;b": a for the first request since take, b for the second and later.
		steps := strings.Split(do, ";")
		if !answer(c, steps[min(n, len(steps))-1], head) {
			return
		}
	}
}

// answer plays one step; false ends the connection.
func answer(c *proxytest.Client, do, head string) bool {
	name, arg, _ := strings.Cut(do, " ")
	switch name {
	case "", "ok":
		c.Send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
	case "early":
	case "status":
		c.Send("HTTP/1.1 " + arg + " Whatever\r\ncontent-length: 4\r\n\r\nbody")
	case "nobody":
		c.Send("HTTP/1.1 " + arg + " Whatever\r\n\r\n")
	case "headers":
		c.Send("HTTP/1.1 200 OK\r\n" + strings.ReplaceAll(arg, "^", "\r\n") + "\r\ncontent-length: 2\r\n\r\nok")
	case "raw":
		c.Send(strings.ReplaceAll(arg, "^", "\r\n"))
	case "rawclose":
		c.Send(strings.ReplaceAll(arg, "^", "\r\n"))
		return false
	case "close":
		return false
	case "reset":
		c.Reset()
		return false
	case "hang":
		time.Sleep(3 * time.Second)
		return false
	case "chunked":
		c.Send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
	case "trailers":
		c.Send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-t\r\n\r\n3\r\nabc\r\n0\r\nx-t: 1\r\n\r\n")
	case "upgrade":
		c.Send("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nwelcome")
		b, _ := io.ReadAll(c.R)
		c.Send("<" + string(b) + ">")
		return false
	default:
		panic("unknown step " + strconv.Quote(do) + " in " + head)
	}
	return true
}

func field(head, name string) string {
	for line := range strings.SplitSeq(head, "\r\n") {
		if n, v, ok := strings.Cut(line, ":"); ok && strings.EqualFold(n, name) {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// readBody reads what the head announces and gives it in a form that does not depend on how it was chunked.
func readBody(r *bufio.Reader, head string) (string, error) {
	if strings.EqualFold(field(head, "transfer-encoding"), "chunked") {
		var b strings.Builder
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return b.String() + "(cut)", err
			}
			n, err := strconv.ParseInt(strings.TrimSpace(line), 16, 32)
			if err != nil {
				return b.String() + fmt.Sprintf("(bad chunk %q)", line), err
			}
			if n == 0 {
				trailers, err := proxytest.ReadHead(r)
				return b.String() + "(chunked; trailers " + strconv.Quote(trailers) + ")", err
			}
			piece := make([]byte, n+2)
			if _, err := io.ReadFull(r, piece); err != nil {
				return b.String() + "(cut)", err
			}
			b.Write(piece[:n])
		}
	}
	n, _ := strconv.Atoi(field(head, "content-length"))
	b := make([]byte, n)
	got, err := io.ReadFull(r, b)
	return string(b[:got]), err
}
