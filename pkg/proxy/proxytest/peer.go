package proxytest

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a test waits for something that must happen.
const patience = 20 * time.Second

func dup(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0) }

// Client is a raw connection to the proxy.
type Client struct {
	*net.TCPConn
	R *bufio.Reader
	t testing.TB
}

// Dial connects to addr.
func Dial(t testing.TB, addr string) *Client {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(2 * patience))
	cl := &Client{TCPConn: c.(*net.TCPConn), R: bufio.NewReader(c), t: t}
	t.Cleanup(func() { _ = c.Close() })
	return cl
}

// Send writes bytes; a failure is for the following reads to show.
func (c *Client) Send(s string) {
	_, _ = io.WriteString(c.TCPConn, s)
}

// Expect reads exactly want.
func (c *Client) Expect(want string) {
	c.t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(c.R, got)
	if string(got[:n]) != want {
		c.t.Fatalf("got  %q (%v)\nwant %q", got[:n], err, want)
	}
}

// Head reads a head, up to the empty line.
func (c *Client) Head() string {
	c.t.Helper()
	h, err := ReadHead(c.R)
	if err != nil {
		c.t.Fatalf("head %q: %v", h, err)
	}
	return h
}

// Rest reads to the end.
func (c *Client) Rest() (string, error) {
	b, err := io.ReadAll(c.R)
	return string(b), err
}

// Reset closes with RST.
func (c *Client) Reset() {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// ReadHead reads up to and with the empty line.
func ReadHead(r *bufio.Reader) (string, error) {
	var b strings.Builder
	for {
		line, err := r.ReadString('\n')
		b.WriteString(line)
		if err != nil || line == "\r\n" {
			return b.String(), err
		}
	}
}

// Upstream is a scripted server: each connection is given to serve.
type Upstream struct {
	Addr string
	Port int

	ln    net.Listener
	mu    sync.Mutex
	conns int
	open  map[net.Conn]bool
}

// Serve starts a server on a free port of 127.0.0.1.
func Serve(t testing.TB, serve func(c *Client)) *Upstream {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u := &Upstream{Addr: ln.Addr().String(), Port: ln.Addr().(*net.TCPAddr).Port, ln: ln, open: map[net.Conn]bool{}}
	t.Cleanup(u.Close)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			u.mu.Lock()
			u.conns++
			u.open[c] = true
			u.mu.Unlock()
			go func() {
				defer c.Close()
				serve(&Client{TCPConn: c.(*net.TCPConn), R: bufio.NewReader(c), t: t})
			}()
		}
	}()
	return u
}

// Answer is a server that gives every request on a connection the same bytes.
func Answer(t testing.TB, response string) *Upstream {
	t.Helper()
	return Serve(t, func(c *Client) {
		for {
			if _, err := ReadHead(c.R); err != nil {
				return
			}
			c.Send(response)
		}
	})
}

// Conns is how many connections were accepted.
func (u *Upstream) Conns() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.conns
}

// Close ends the server and its connections.
func (u *Upstream) Close() {
	_ = u.ln.Close()
	u.mu.Lock()
	defer u.mu.Unlock()
	for c := range u.open {
		_ = c.Close()
	}
}

// ClosedPort is a port of 127.0.0.1 that nobody listens on.
func ClosedPort(t testing.TB) int {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port
}

// Cluster is the YAML of a static cluster with endpoints on 127.0.0.1; extra is more of its fields.
func Cluster(name, extra string, ports ...int) string {
	var b strings.Builder
	fmt.Fprintf(&b, `
  - name: %s
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: %s
      endpoints:
      - lb_endpoints:
`, name, name)
	for _, p := range ports {
		fmt.Fprintf(&b, "        - endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}\n", p)
	}
	if len(ports) == 0 {
		b.Reset()
		fmt.Fprintf(&b, "\n  - name: %s\n    type: STATIC\n    connect_timeout: 1s\n", name)
	}
	return b.String() + indent(extra, 4)
}

// Bootstrap is the YAML of a bootstrap with one HTTP listener. hcm is more of its connection manager's fields,
// routes a list of routes, clusters what Cluster gives.
func Bootstrap(hcm, routes, clusters string) string {
	return fmt.Sprintf(`
static_resources:
  listeners:
  - name: test
    address: {socket_address: {address: 127.0.0.1, port_value: 8080}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: test
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
%s
          route_config:
            name: test
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
%s
  clusters:
%s
`, indent(hcm, 10), indent(routes, 14), clusters)
}

func indent(s string, n int) string {
	s = strings.Trim(s, "\n")
	if s == "" {
		return ""
	}
	// Whatever indentation the text has in the test's source goes first.
	lines := strings.Split(s, "\n")
	own := len(lines[0]) - len(strings.TrimLeft(lines[0], " \t"))
	for i, l := range lines {
		if len(l) >= own {
			l = l[own:]
		}
		lines[i] = strings.Repeat(" ", n) + strings.ReplaceAll(l, "\t", "  ")
	}
	return strings.Join(lines, "\n") + "\n"
}

// ShrinkBacklog makes a listening socket's queue as short as can be.
func ShrinkBacklog(t testing.TB, ln *net.TCPListener) {
	t.Helper()
	raw, err := ln.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 0) })
	if err != nil {
		t.Fatal(err)
	}
}
