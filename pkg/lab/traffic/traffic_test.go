package traffic

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// run lets a generator work until it has done at least n requests and returns the sum of its reports.
func run(t *testing.T, cfg Config, n uint64) Report {
	t.Helper()
	text, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- Main(ctx, []string{string(text)}, w)
		w.Close()
	}()
	var last Report
	var failures []Failure
	for lines := bufio.NewScanner(r); lines.Scan(); {
		last = Report{}
		if err := json.Unmarshal(lines.Bytes(), &last); err != nil {
			t.Fatal(err)
		}
		failures = append(failures, last.Failures...)
		if last.Requests >= n {
			cancel()
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	last.Failures = failures
	return last
}

// Every request is either counted under its answer or listed as a failure with its reason.
func TestEveryRequestIsAccountedFor(t *testing.T) {
	var n atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1)%10 == 0 {
			http.Error(w, "tenth", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintf(w, "%s rest of the body", r.Header.Get("X-Who"))
	}))
	defer server.Close()
	addr := strings.TrimPrefix(server.URL, "http://")
	r := run(t, Config{Addr: addr, Host: "x", Headers: map[string]string{"X-Who": "me"}, Connections: 4, Pause: time.Millisecond}, 200)
	if r.OK+r.Failed != r.Requests || r.Answers["me"] != r.OK || r.Failed != uint64(len(r.Failures)) {
		t.Errorf("the sums are wrong: %+v", r)
	}
	if served := uint64(n.Load()); r.Requests != served || r.Failed != served/10 {
		t.Errorf("the server saw %d requests: %+v", served, r)
	}
	for _, f := range r.Failures {
		if !strings.Contains(f.Error, "503") || f.Connected.IsZero() || f.At.Before(f.Connected) {
			t.Errorf("failure %+v", f)
		}
	}
}

// A server that asks for the end of the connection is obeyed, and that is no failure.
func TestConnectionCloseIsNoFailure(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "close")
		fmt.Fprint(w, "bye")
	}))
	defer server.Close()
	r := run(t, Config{Addr: strings.TrimPrefix(server.URL, "http://"), Host: "x", Connections: 2, Pause: time.Millisecond}, 50)
	if r.Failed != 0 || r.Connected < r.OK {
		t.Errorf("%+v", r)
	}
}

// Nobody listens: each attempt is a failure without a connection.
func TestRefusedConnectsAreFailures(t *testing.T) {
	server := httptest.NewServer(nil)
	server.Close()
	r := run(t, Config{Addr: strings.TrimPrefix(server.URL, "http://"), Host: "x", Connections: 1}, 3)
	if r.OK != 0 || r.Failed < 3 || !r.Failures[0].Connected.IsZero() || !strings.Contains(r.Failures[0].Error, "refused") {
		t.Errorf("%+v", r)
	}
}

// Every kind against the server of all of them: what comes back is what was sent, over several connections.
func TestEveryKindBringsItsBytesBack(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	port := freePorts(t)
	served := make(chan error, 1)
	go func() { served <- serve(ctx, Config{Kind: Serve, Addr: fmt.Sprintf("127.0.0.1:%d", port), Host: "me"}) }()
	for kind := range kinds {
		at := port
		if kind == TCP || kind == UDP {
			at++
		}
		cfg := Config{Kind: kind, Addr: fmt.Sprintf("127.0.0.1:%d", at), Host: "x", Size: 10_000, Connections: 2, PerConnection: 3, Pause: time.Millisecond}
		r := Report{Failed: 1}
		for range 100 { // until the server is up
			if r = run(t, cfg, 20); r.Failed == 0 {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if r.Failed > 0 {
			t.Errorf("%s: %+v", kind, r.Failures)
		} else if r.Connected < 6 || kind != HTTP && r.Bytes != 10_000*r.OK {
			t.Errorf("%s: %+v", kind, r)
		}
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// freePorts finds two in a row.
func freePorts(t *testing.T) int {
	t.Helper()
	for range 100 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := ln.Addr().(*net.TCPAddr).Port
		next, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port+1))
		ln.Close()
		if err == nil {
			next.Close()
			return port
		}
	}
	t.Fatal("no two ports in a row are free")
	return 0
}

// A server that changes or loses bytes is found out, and that is not an ordinary failure.
func TestWrongBytesAreCorruption(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.ContentLength > 100 {
			body[100]++
		} else {
			body = body[1:]
		}
		_, _ = w.Write(body)
	}))
	defer server.Close()
	for _, size := range []int{100, 1000} {
		r := run(t, Config{Kind: Large, Addr: strings.TrimPrefix(server.URL, "http://"), Host: "x", Size: size, Connections: 1}, 3)
		if r.OK != 0 || r.Failed == 0 || !r.Failures[0].Corrupt {
			t.Errorf("%d bytes: %+v", size, r)
		}
	}
}

// Neighbouring seeds and offsets have nothing in common, or a swap of two payloads would go unnoticed.
func TestPayloadsDiffer(t *testing.T) {
	seen := map[string]string{}
	b := make([]byte, 16)
	for seed := range uint64(50) {
		for offset := range uint64(200) {
			fill(b, seed, offset)
			at := fmt.Sprintf("seed %d, offset %d", seed, offset)
			if other, twice := seen[string(b)]; twice {
				t.Fatalf("%s and %s have the same bytes", at, other)
			}
			seen[string(b)] = at
		}
	}
}

// A server that dies in the middle of a WebSocket message has cut it off; one that sends another message than it got is
// wrong. The library doesn't tell the two apart.
func TestAMessageThatIsCutOffIsNoCorruption(t *testing.T) {
	for name, tt := range map[string]struct {
		answer  func(c *websocket.Conn, conn io.Writer, message []byte)
		corrupt bool
	}{
		"cut off": {func(_ *websocket.Conn, conn io.Writer, m []byte) {
			_, _ = conn.Write(append([]byte{0x82, 126, byte(len(m) >> 8), byte(len(m))}, m[:100]...))
		}, false},
		"shorter": {func(c *websocket.Conn, _ io.Writer, m []byte) {
			_ = websocket.Message.Send(c, m[:100])
			var more []byte
			_ = websocket.Message.Receive(c, &more) // until the client goes
		}, true},
		"shorter, and more": {func(c *websocket.Conn, _ io.Writer, m []byte) {
			_ = websocket.Message.Send(c, m[:100])
			_ = websocket.Message.Send(c, m[100:])
		}, true},
	} {
		var raw sync.Map // connections by remote address
		server := httptest.NewUnstartedServer(websocket.Handler(func(c *websocket.Conn) {
			var message []byte
			if websocket.Message.Receive(c, &message) == nil {
				conn, _ := raw.Load(c.Request().RemoteAddr)
				tt.answer(c, conn.(net.Conn), message)
			}
		}))
		server.Config.ConnState = func(c net.Conn, _ http.ConnState) { raw.Store(c.RemoteAddr().String(), c) }
		server.Start()
		r := run(t, Config{Kind: WebSocket, Addr: strings.TrimPrefix(server.URL, "http://"), Host: "x", Size: 1000, Connections: 1, Timeout: time.Second}, 1)
		server.Close()
		if r.OK != 0 || len(r.Failures) == 0 || r.Failures[0].Corrupt != tt.corrupt {
			t.Errorf("%s: %+v", name, r.Failures)
		}
	}
}
