package proxy

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/internal/conversation"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// WebSockets and CONNECT tunnels skip the proxy once the upgrade has been answered.

// tunnelling is an engine with an HTTP listener, and a server that answers requests and accepts tunnels, behind the proxy
// and (on plainPort) without it.
type tunnelling struct {
	*hooked
	tunnels chan *net.TCPConn
}

const (
	proxiedPort = "10.98.0.2:8080"
	plainPort   = "10.98.0.2:9080"
)

func newTunnelling(t *testing.T, logs []*mesh.AccessLog, change ...func(*setup)) *tunnelling {
	h := &tunnelling{tunnels: make(chan *net.TCPConn)}
	h.hooked = newStepping(t, 3, append(change, func(s *setup) {
		s.chain = httpChain(t, "orig")
		hcm := s.chain.HTTP
		hcm.Upgrades = map[string]bool{"websocket": true, "connect": true}
		hcm.AccessLog = logs
		host := hcm.Routes.Hosts[0]
		connect := *host.Routes[0]
		connect.Match = mesh.RouteMatch{Kind: mesh.PathConnect}
		host.Routes = append([]*mesh.Route{&connect}, host.Routes...)
		if err := hcm.Routes.Init(); err != nil {
			t.Fatal(err)
		}
	})...)
	for _, addr := range []string{proxiedPort, plainPort} {
		ln := listenIn(t, h.server, addr)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go h.serve(c.(*net.TCPConn))
			}
		}()
	}
	return h
}

// serve answers requests until one wants a tunnel. No client here sends bytes behind that before it is answered.
func (h *tunnelling) serve(c *net.TCPConn) {
	_ = c.SetDeadline(time.Now().Add(patience))
	in := bufio.NewReader(c)
	for {
		rq, err := http.ReadRequest(in)
		if err != nil {
			_ = c.Close()
			return
		}
		switch {
		case rq.Method == http.MethodConnect:
			fmt.Fprint(c, "HTTP/1.1 200 OK\r\n\r\n"+rq.Header.Get("X-Greeting"))
		case rq.Header.Get("Upgrade") != "":
			fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"+rq.Header.Get("X-Greeting"))
		default:
			fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			continue
		}
		h.tunnels <- c
		return
	}
}

// connect makes a connection and, after so many ordinary requests, a tunnel of it.
func (h *tunnelling) connect(t *testing.T, addr, kind string, requests int, greeting string) (*net.TCPConn, error) {
	c, err := dialIn(t, h.pod, addr)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	for range requests {
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if line, err := head(c); err != nil || line != "HTTP/1.1 200 OK" {
			return nil, fmt.Errorf("%q, %w", line, err)
		}
		if _, err := io.ReadFull(c, make([]byte, 2)); err != nil {
			return nil, err
		}
	}
	request, want := "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n", "HTTP/1.1 101 Switching Protocols"
	if kind == "CONNECT" {
		request, want = "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n", "HTTP/1.1 200 OK"
	}
	fmt.Fprint(c, request+"X-Greeting: "+greeting+"\r\n\r\n")
	if line, err := head(c); err != nil || line != want {
		return nil, fmt.Errorf("%q, %w", line, err)
	}
	return c, nil
}

// head reads just a head and returns its first line.
func head(c net.Conn) (string, error) {
	var got []byte
	for b := make([]byte, 1); !strings.HasSuffix(string(got), "\r\n\r\n"); {
		if _, err := io.ReadFull(c, b); err != nil {
			return string(got), err
		}
		got = append(got, b...)
	}
	first, _, _ := strings.Cut(string(got), "\r\n")
	return first, nil
}

func TestATunnelSkipsTheProxy(t *testing.T) {
	logs := telemetry.NewLogs()
	file := filepath.Join(t.TempDir(), "access.log")
	h := newTunnelling(t, []*mesh.AccessLog{{Path: file, Format: "%RESPONSE_CODE% %BYTES_RECEIVED% %BYTES_SENT% %RESPONSE_FLAGS%\n"}},
		func(s *setup) { s.engine.Logs = logs })
	want := ""
	for _, kind := range []string{"WebSocket", "CONNECT"} {
		for _, requests := range []int{0, 3} {
			before := h.counters(t)
			c, err := h.connect(t, proxiedPort, kind, requests, "hello")
			if err != nil {
				t.Fatal(err)
			}
			s := <-h.tunnels
			if got := read(t, c, 5); got != "hello" {
				t.Errorf("%s: the server's greeting came as %q", kind, got)
			}
			n := 0
			for skipped := false; !skipped; n++ {
				before := h.counters(t).AsideMessages
				say(t, c, s, []byte("question"))
				say(t, s, c, []byte("answer"))
				if skipped = h.counters(t).AsideMessages-before == 2; !skipped && n > 1000 {
					t.Fatalf("%s: the tunnel does not skip the proxy: %+v", kind, h.sockets(t))
				}
			}
			big := noise(300_000)
			say(t, c, s, big)
			say(t, s, c, big)
			if got := h.counters(t).AsideBytes - before.AsideBytes; got < uint64(2*len(big)) {
				t.Errorf("%s: only %d bytes skipped the proxy", kind, got)
			}
			_ = c.CloseWrite()
			if got := ending(t, s); got != "0 bytes, end" {
				t.Errorf("%s: the server saw %s", kind, got)
			}
			say(t, s, c, []byte("last words"))
			_ = s.Close()
			if got := ending(t, c); got != "0 bytes, end" {
				t.Errorf("%s: the client saw %s", kind, got)
			}
			want += strings.Repeat("200 0 2 -\n", requests)
			status := 101
			if kind == "CONNECT" {
				status = 200
			}
			want += fmt.Sprintf("%d %d %d -\n", status, n*8+len(big), 5+n*6+len(big)+10)
		}
	}
	var got []byte
	for end := time.Now().Add(patience); len(got) < len(want) && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		got, _ = os.ReadFile(file)
	}
	if string(got) != want {
		t.Errorf("logged\n%swant\n%s", got, want)
	}
	if err := logs.Close(); err != nil {
		t.Error(err)
	}
}

// Random conversations in tunnels, through the proxy and without it.
func TestRandomConversationsInTunnelsAreThoseOfPlainTCP(t *testing.T) {
	h := newTunnelling(t, nil)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rounds := uint64(120)
	if testing.Short() {
		rounds = 30
	}
	for i := range rounds {
		n := seed + i
		client, server := conversation.Dialogue(n)
		for _, p := range []*conversation.Part{client, server} { // the hand-over comes after 5 ms
			for j := range p.Rests {
				p.Rests[j] += time.Duration(n*uint64(j+1)%4) * time.Millisecond
			}
		}
		kind := []string{"WebSocket", "CONNECT"}[n%2]
		dial := func(addr string) func() (*net.TCPConn, error) {
			return func() (*net.TCPConn, error) { return h.connect(t, addr, kind, int(n%3), "") }
		}
		plainC, plainS, err := conversation.Play(dial(plainPort), h.tunnels, client, server)
		if err != nil {
			t.Fatal(err)
		}
		proxyC, proxyS, err := conversation.Play(dial(proxiedPort), h.tunnels, client, server)
		if err != nil {
			t.Fatal(err)
		}
		if err := conversation.Differs(plainC, proxyC, client, server); err != nil {
			t.Errorf("conversation %d (%s; %v, %v): the client %v", n, kind, client.End, server.End, err)
		}
		if err := conversation.Differs(plainS, proxyS, server, client); err != nil {
			t.Errorf("conversation %d (%s; %v, %v): the server %v", n, kind, client.End, server.End, err)
		}
	}
	c := h.counters(t)
	t.Logf("%d of %d tunnels, %d bytes skipped the proxy", c.SteppedAside, rounds, c.AsideBytes)
	if c.SteppedAside < rounds/4 {
		t.Error("hardly any tunnel skipped the proxy")
	}
}

// A tunnel's idle time-out runs by the bytes that skip the proxy.
func TestATunnelsIdleTimeOutKnowsWhatSkipsTheProxy(t *testing.T) {
	const idle = 1500 * time.Millisecond
	h := newTunnelling(t, nil)
	// The listener's connection manager is read at each request.
	h.chain.HTTP.StreamIdleTimeout = idle
	c, err := h.connect(t, proxiedPort, "WebSocket", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	s := <-h.tunnels
	for end := time.Now().Add(2 * idle); time.Now().Before(end); time.Sleep(idle / 15) {
		say(t, c, s, []byte("still here"))
	}
	if h.counters(t).AsideBytes == 0 {
		t.Error("nothing skipped the proxy")
	}
	for name, conn := range map[string]*net.TCPConn{"client": c, "server": s} {
		if got := ending(t, conn); got != "0 bytes, reset" {
			t.Errorf("the %s saw %s", name, got)
		}
		_ = conn.Close()
	}
}
