package proxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// What may happen while a body skips the proxy: time-outs, an end in the middle, an upstream connection that is lent on, kill -9; and
// the bodies that must not skip it.

// serveBodies has the server of bodies listen at every port that the tests use.
func (h *hooked) serveBodies(t testing.TB) {
	for _, port := range []string{"8080", "8081"} {
		for _, host := range []string{"10.98.0.2", "fd98::2"} {
			ln := listenIn(t, h.server, net.JoinHostPort(host, port))
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					go serveBodies(c)
				}
			}()
		}
	}
}

// beginning reads a response's head and counts what comes of its body, until it ends somehow. Wrong bytes are an error.
func beginning(in *bufio.Reader, x *exchange) (n int, err error) {
	rs, err := http.ReadResponse(in, nil)
	if err != nil {
		return 0, fmt.Errorf("no response: %w", err)
	}
	want := bodyOf(x.id, x.down)
	b := make([]byte, 64<<10)
	for {
		m, err := rs.Body.Read(b)
		if string(b[:m]) != string(want[n:n+m]) {
			return n, fmt.Errorf("wrong bytes behind %d", n)
		}
		n += m
		if err != nil {
			return n, err
		}
	}
}

// The time-outs of streams and tries run by what skips the proxy. When nothing does any more they end the exchange.
func TestTimeOutsKnowOfBodiesThatSkipTheProxy(t *testing.T) {
	const idle = 1200 * time.Millisecond
	for name, set := range map[string]func(*setup){
		"stream": func(s *setup) { s.chain.HTTP.StreamIdleTimeout = idle },
		"try": func(s *setup) {
			s.chain.HTTP.Routes.Hosts[0].Routes[0].Action.Retry = &mesh.RetryPolicy{PerTryIdleTimeout: idle}
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newBodied(t, "", set)
			c, in := h.connect(t, proxiedPort)
			// 30 pieces in twice the time-out or more, and then silence: the server holds back the last byte for ever.
			x := exchange{id: 1, down: 30<<16 + 1, more: "X-Every: 80\r\nX-Cut: 1966080\r\nX-Hold: 1\r\n"}
			if err := x.send(c); err != nil {
				t.Fatal(err)
			}
			n, err := beginning(in, &x)
			if n != x.down-1 || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("after %d of %d bytes: %v", n, x.down, err)
			}
			if skipped := h.counters(t).AsideBodyBytes; skipped < uint64(x.down/2) {
				t.Errorf("only %d bytes skipped the proxy", skipped)
			}
			want := map[string]string{"stream": "SI", "try": "UT"}[name]
			if got := h.logged(t, 1); len(got) != 1 || got[0] != words(200, 0, n, want, 0, n) {
				t.Errorf("logged %q", got)
			}
		})
	}
}

// The route's time-out is about the whole response, skipped or not; and a client or a server that goes away in the middle ends
// it for the other. The log has the bytes that were carried until then.
func TestAnExchangeCutWhileItsBodySkipsTheProxyEndsForBoth(t *testing.T) {
	endless := exchange{id: 1, down: 1 << 25, piece: 20000, more: "X-Every: 5\r\n"}
	for _, backend := range backends {
		t.Run(backend, func(t *testing.T) {
			h := newBodied(t, backend)
			action := h.chain.HTTP.Routes.Hosts[0].Routes[0].Action
			for i, how := range []string{"route time-out", "client resets", "server resets", "server closes"} {
				x := endless
				switch how {
				case "server resets":
					x.more += "X-Cut: 5000000\r\n"
				case "server closes":
					x.more += "X-Cut: 5000000\r\nX-End: 1\r\n"
				}
				action.Timeout = 0
				if how == "route time-out" {
					action.Timeout = 2500 * time.Millisecond
				}
				before := h.counters(t).AsideBodyBytes
				c, in := h.connect(t, proxiedPort)
				if err := x.send(c); err != nil {
					t.Fatal(err)
				}
				if how == "client resets" {
					eventually(t, "bytes skip the proxy", func() bool { return h.counters(t).AsideBodyBytes-before > 1<<20 })
					_ = c.SetLinger(0)
					_ = c.Close()
				}
				n, err := beginning(in, &x)
				if err == nil || errors.Is(err, io.EOF) {
					t.Errorf("%s: the client took %d of %d bytes for all (%v)", how, n, x.down, err)
				}
				skipped := h.counters(t).AsideBodyBytes - before
				if skipped < 1<<20 {
					t.Errorf("%s: only %d bytes skipped the proxy", how, skipped)
				}
				if how == "server closes" && n != 5_000_000 {
					t.Errorf("%s: the client got %d bytes", how, n)
				}
				list := h.logged(t, i+1)
				if len(list) != i+1 {
					t.Fatalf("%s: %d lines are logged", how, len(list))
				}
				var sent, came int
				var flags string
				if _, err := fmt.Sscan(list[i], new(int), new(int), &sent, &flags, new(int), &came); err != nil {
					t.Fatalf("%q: %v", list[i], err)
				}
				if want := []string{"UT", "DC", "UPE", "UPE"}[i]; flags != want || sent != came || uint64(sent) < skipped {
					t.Errorf("%s: logged %q, when %d bytes had skipped the proxy; want the flag %s", how, list[i], skipped, want)
				}
				eventually(t, "the pairs are given back", func() bool { return h.d.Status().Acceleration.StepAside.Open == 0 })
			}
		})
	}
}

// One upstream connection serves several clients in turn: its slot goes from one to the next.
func TestBodiesOnAConnectionThatIsLentToManySkipTheProxy(t *testing.T) {
	for _, backend := range backends {
		t.Run(backend, func(t *testing.T) {
			h := newBodied(t, backend, func(s *setup) { s.engine.Concurrency = 1 }) // each loop has connections of its own
			type conn struct {
				c  *net.TCPConn
				in *bufio.Reader
			}
			var clients []conn
			for range 3 {
				c, in := h.connect(t, proxiedPort)
				clients = append(clients, conn{c, in})
			}
			rng := rand.New(rand.NewPCG(1, 2))
			for i := range 30 {
				k := clients[rng.IntN(len(clients))]
				x := exchange{id: uint32(i), down: 1 << 20, rest: 30}
				if rng.IntN(3) == 0 {
					x.up = 1 << 20
				}
				var sent sync.WaitGroup
				sent.Go(func() { _ = x.send(k.c) })
				if err := x.receive(k.in); err != nil {
					t.Fatal(err)
				}
				sent.Wait()
			}
			c := h.counters(t)
			if c.AsideBodies < 15 || c.AsideBodyBytes < 15<<19 {
				t.Errorf("%d bytes of %d bodies skipped the proxy", c.AsideBodyBytes, c.AsideBodies)
			}
			servers := 0
			for _, s := range h.sockets(t) {
				if s.Role == "server" {
					servers++
				}
			}
			if servers != 1 {
				t.Errorf("there are %d connections to the server", servers)
			}
		})
	}
}

// What the proxy must see passes it.
func TestBodiesThatTheProxyMustSeeDoNotSkipIt(t *testing.T) {
	h := newBodied(t, "", func(s *setup) { s.bufferLimit = 1 << 20 })
	route := h.chain.HTTP.Routes.Hosts[0].Routes[0]
	c, in := h.connect(t, proxiedPort)
	ask := func(what string, x exchange, want bool) {
		t.Helper()
		before := h.counters(t)
		var sent sync.WaitGroup
		sent.Go(func() { _ = x.send(c) })
		if err := x.receive(in); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		sent.Wait()
		after := h.counters(t)
		if got := after.AsideBodies > before.AsideBodies; got != want {
			t.Errorf("%s: %d bytes skipped the proxy", what, after.AsideBodyBytes-before.AsideBodyBytes)
		}
	}
	ask("a body below 64 KiB", exchange{id: 1, down: 60 << 10, rest: 20}, false)
	ask("a long body", exchange{id: 2, down: 1 << 20, rest: 20}, true)
	ask("a long request", exchange{id: 3, up: 1 << 20, rest: 20}, true)
	kept := exchange{id: 4, up: 200 << 10, piece: 16 << 10, rest: 20} // less than the buffer limit, so that all of it is kept
	ask("a request that is sent once", kept, true)
	route.Action.Retry = &mesh.RetryPolicy{On: mesh.Retry5xx}
	ask("the same where it may have to be repeated", kept, false)
	route.Action.Retry = nil
	h.d.DisableStepAside("a test")
	ask("switched off", exchange{id: 5, down: 1 << 20, rest: 20}, true) // these two are a pair still
	c, in = h.connect(t, proxiedPort)
	ask("switched off, another connection", exchange{id: 6, down: 1 << 20, rest: 20}, false)
}

// kill -9 of the agent while bodies skip it: each end has a beginning of what the other sent, and then an end.
func TestKilledWhileBodiesSkipItTheProxyLeavesThemRight(t *testing.T) {
	h := newStage(t, true)
	h.serveBodies(t)
	rounds := 2
	if testing.Short() {
		rounds = 1
	}
	for range rounds {
		v := h.startVictim(t, victimHTTP+"=1")
		before := v.counters().AsideBodyBytes
		var all sync.WaitGroup
		for i := range 8 {
			c, err := dialIn(t, h.pod, proxiedPort)
			if err != nil {
				t.Fatal(err)
			}
			_ = c.SetDeadline(time.Now().Add(2 * patience))
			x := exchange{id: uint32(i), down: 1 << 24, piece: 16 << 10, more: "X-Every: 5\r\n"}
			if i%2 == 1 {
				x.up = 4 << 20
			}
			all.Go(func() {
				defer c.Close()
				go x.send(c)
				n, err := beginning(bufio.NewReader(c), &x)
				switch {
				case err == nil, errors.Is(err, io.EOF):
					t.Errorf("connection %d: %d bytes were taken for all", i, n)
				case strings.Contains(err.Error(), "wrong"), strings.Contains(err.Error(), "timeout"):
					t.Errorf("connection %d: %v", i, err)
				}
			})
		}
		for end := time.Now().Add(patience); v.counters().AsideBodyBytes-before < 4<<20 && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		if n := v.counters().AsideBodyBytes - before; n < 4<<20 {
			t.Errorf("%d bytes had skipped the proxy", n)
		}
		v.kill()
		all.Wait()
	}
}
