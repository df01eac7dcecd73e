package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// addPod gives the engine the world's pod with both in-pod listeners.
func (w *world) addPod(t testing.TB, e *Engine, key uint64) {
	t.Helper()
	fds := []int{listenFD(t, w.pod, "127.0.0.1:15001"), listenFD(t, w.pod, "[::1]:15001")}
	for _, fd := range fds {
		if w.own == nil {
			break
		}
		if err := w.own(fd); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.AddPod(Pod{Key: key, Namespace: "ns", Name: "client", IPs: w.podIPs, Netns: w.pod}, fds); err != nil {
		t.Fatal(err)
	}
}

func TestAPodsConnectionReachesTheServerFromThePodsAddress(t *testing.T) {
	w := newWorld(t)
	for i, bind := range []string{"10.98.0.2:8080", "[fd98::2]:8080"} {
		seen := make(chan netip.AddrPort, 1)
		go serveEcho(listenIn(t, w.server, bind), "", seen)
		t.Run(bind, func(t *testing.T) {
			o := &origin{}
			e := startEngine(t, Config{OriginalDst: o.lookUp})
			vip := []string{"10.96.0.1:80", "[fd96::1]:80"}[i]
			o.set(vip)
			e.SetSnapshot(snapshot(1, []*mesh.Listener{listener(t, "l", vip, false, tcpChain(to("a")))}, clusterOf("a", bind)))
			w.addPod(t, e, 7)
			c := mustDialIn(t, w.pod, []string{"127.0.0.1:15001", "[::1]:15001"}[i])
			_, _ = c.Write([]byte("hello"))
			if got := read(t, c, 5); got != "hello" {
				t.Fatalf("got %q", got)
			}
			if src := <-seen; src.Addr() != w.podIPs[i] {
				t.Errorf("the server was called from %s, want %s", src, w.podIPs[i])
			}
			s := e.Stats()
			if s.Accepted != 1 || s.Active != 1 || s.Pods != 1 || s.Refused.Sum() != 0 {
				t.Errorf("stats %+v", s)
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			cl, err := e.Clusters(ctx)
			if err != nil || len(cl) != 1 || cl[0].Connections != 1 || cl[0].Hosts[0].ActiveConns != 1 {
				t.Errorf("clusters %+v, %v", cl, err)
			}
		})
	}
}

func TestConnectionsWithoutADestinationOrAListenerAreResetAndCounted(t *testing.T) {
	w := newWorld(t)
	o := &origin{}
	e := startEngine(t, Config{OriginalDst: o.lookUp})
	w.addPod(t, e, 7)
	refused := func(what string) { t.Helper(); expectReset(t, w.pod, "127.0.0.1:15001", what) }
	refused("directly to 15001")
	o.set("127.0.0.1:15001")
	refused("redirected to itself")
	o.set("10.96.0.1:80")
	refused("before the first snapshot")
	e.SetSnapshot(snapshot(1, []*mesh.Listener{listener(t, "l", "10.96.0.2:80", false, tcpChain(to("a")))}))
	refused("another address than the listener's")
	e.SetSnapshot(snapshot(2, []*mesh.Listener{listener(t, "l", "10.96.0.1:80", false, nil)}))
	refused("no filter chain")
	if r := e.Stats().Refused; r.NoOriginalDst != 2 || r.NoListener != 2 || r.NoChain != 1 {
		t.Errorf("refused %+v", r)
	}
	eventually(t, "nothing active", func() bool { return e.Stats().Active == 0 })
}

func TestLimitsFailFast(t *testing.T) {
	w := newWorld(t)
	go serveEcho(listenIn(t, w.server, "10.98.0.2:8080"), "!", nil)
	for name, cfg := range map[string]Config{"pod": {MaxConnsPerPod: 3, MaxConns: 100}, "global": {MaxConns: 3}} {
		t.Run(name, func(t *testing.T) {
			o := &origin{}
			o.set("10.96.0.1:80")
			cfg.OriginalDst = o.lookUp
			e := startEngine(t, cfg)
			e.SetSnapshot(snapshot(1, []*mesh.Listener{listener(t, "l", "10.96.0.1:80", false, tcpChain(to("a")))}, clusterOf("a", "10.98.0.2:8080")))
			w.addPod(t, e, 7)
			var open []net.Conn
			for range 3 {
				c := mustDialIn(t, w.pod, "127.0.0.1:15001")
				read(t, c, 1)
				open = append(open, c)
			}
			expectReset(t, w.pod, "127.0.0.1:15001", "above the limit")
			if r := e.Stats().Refused; r.PodLimit+r.GlobalLimit != 1 {
				t.Errorf("refused %+v", r)
			}
			open[0].Close()
			eventually(t, "a place is free", func() bool { return e.Stats().Active == 2 })
			read(t, mustDialIn(t, w.pod, "127.0.0.1:15001"), 1)
		})
	}
}

func TestARemovedPodIsDrainedAndLeavesNothing(t *testing.T) {
	w := newWorld(t)
	go serveEcho(listenIn(t, w.server, "10.98.0.2:8080"), "!", nil)
	o := &origin{}
	o.set("10.96.0.1:80")
	e := startEngine(t, Config{OriginalDst: o.lookUp, PodDrain: 300 * time.Millisecond})
	e.SetSnapshot(snapshot(1, []*mesh.Listener{listener(t, "l", "10.96.0.1:80", false, tcpChain(to("a")))}, clusterOf("a", "10.98.0.2:8080")))
	eventually(t, "loops up", func() bool { return e.Stats().Loops[0].Wakeups > 0 && e.Stats().Loops[1].Wakeups > 0 })
	files := openFiles(t)
	for round := range 3 {
		w.addPod(t, e, 7)
		if err := e.AddPod(Pod{Key: 7, Name: "twin", Netns: w.pod}, nil); err == nil {
			t.Fatal("the same namespace was taken twice")
		}
		c := mustDialIn(t, w.pod, "127.0.0.1:15001")
		read(t, c, 1)
		e.RemovePod(7)
		for _, addr := range []string{"127.0.0.1:15001", "[::1]:15001"} {
			if _, err := dialIn(t, w.pod, addr); !errors.Is(err, unix.ECONNREFUSED) {
				t.Fatalf("a new connection to %s: %v", addr, err)
			}
		}
		if round == 0 { // what is open goes on for a while
			_, _ = c.Write([]byte("still here"))
			if got := read(t, c, 10); got != "still here" {
				t.Fatalf("got %q", got)
			}
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("after the drain: %v", err)
		}
		c.Close()
		eventually(t, "everything of the pod is closed", func() bool { return openFiles(t) <= files && e.Stats().Active == 0 })
	}
	e.RemovePod(7) // unknown: nothing
}

func TestLoadIsSharedByTheLoops(t *testing.T) {
	w := newWorld(t)
	go serveEcho(listenIn(t, w.server, "10.98.0.2:8080"), "!", nil)
	o := &origin{}
	o.set("10.96.0.1:80")
	e := startEngine(t, Config{OriginalDst: o.lookUp, Concurrency: 3})
	e.SetSnapshot(snapshot(1, []*mesh.Listener{listener(t, "l", "10.96.0.1:80", false, tcpChain(to("a")))}, clusterOf("a", "10.98.0.2:8080")))
	w.addPod(t, e, 7)
	for range 30 {
		read(t, mustDialIn(t, w.pod, "127.0.0.1:15001"), 1)
	}
	for i, l := range e.Stats().Loops {
		if l.Assigned != 10 {
			t.Errorf("loop %d has %d of 30 connections", i, l.Assigned)
		}
	}
}

func TestDrainLetsConnectionsEndAndAcceptsNoMore(t *testing.T) {
	w := newWorld(t)
	go serveEcho(listenIn(t, w.server, "10.98.0.2:8080"), "!", nil)
	o := &origin{}
	o.set("10.96.0.1:80")
	e := startEngine(t, Config{OriginalDst: o.lookUp})
	e.SetSnapshot(snapshot(1, []*mesh.Listener{listener(t, "l", "10.96.0.1:80", false, tcpChain(to("a")))}, clusterOf("a", "10.98.0.2:8080")))
	w.addPod(t, e, 7)
	c := mustDialIn(t, w.pod, "127.0.0.1:15001")
	read(t, c, 1)
	short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := e.Drain(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("drain with an open connection: %v", err)
	}
	if _, err := dialIn(t, w.pod, "127.0.0.1:15001"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("while draining: %v", err)
	}
	_, _ = c.Write([]byte("bye"))
	if got := read(t, c, 3); got != "bye" {
		t.Errorf("got %q", got)
	}
	done := make(chan error, 1)
	go func() { done <- e.Drain(context.Background()) }()
	_ = c.CloseWrite()
	if _, err := io.ReadAll(c); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := e.AddPod(Pod{Key: 8, Netns: w.pod}, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("a pod while draining: %v", err)
	}
}

// TestAPodThatComesBackWhileItIsDrainedIsServed: a label taken away and put back at once.
func TestAPodThatComesBackWhileItIsDrainedIsServed(t *testing.T) {
	w := newWorld(t)
	go serveEcho(listenIn(t, w.server, "10.98.0.2:8080"), "!", nil)
	o := &origin{}
	o.set("10.96.0.1:80")
	e := startEngine(t, Config{OriginalDst: o.lookUp, PodDrain: 200 * time.Millisecond})
	e.SetSnapshot(snapshot(1, []*mesh.Listener{listener(t, "l", "10.96.0.1:80", false, tcpChain(to("a")))}, clusterOf("a", "10.98.0.2:8080")))
	w.addPod(t, e, 7)
	old := mustDialIn(t, w.pod, "127.0.0.1:15001")
	read(t, old, 1)
	e.RemovePod(7)
	w.addPod(t, e, 7)
	c := mustDialIn(t, w.pod, "127.0.0.1:15001")
	read(t, c, 1)
	if _, err := old.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("what the drained pod still had: %v", err)
	}
	time.Sleep(400 * time.Millisecond) // the old drain would be over
	_, _ = c.Write([]byte("hello"))
	if got := read(t, c, 5); got != "hello" {
		t.Errorf("got %q", got)
	}
}

// TestPodsComeAndGo: many namespaces, each served and removed, some with connections.
func TestPodsComeAndGo(t *testing.T) {
	o := &origin{}
	e := startEngine(t, Config{OriginalDst: o.lookUp, PodDrain: -1})
	e.SetSnapshot(snapshot(1, []*mesh.Listener{listener(t, "l", "10.96.0.1:80", false, tcpChain(to("a")))}, clusterOf("a", "127.0.0.1:1")))
	o.set("10.96.0.1:80")
	n := 300
	if testing.Short() {
		n = 30
	}
	eventually(t, "loops up", func() bool { return e.Stats().Loops[0].Wakeups > 0 })
	files := openFiles(t)
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range n / 4 {
				f := newNetns(t)
				inNetns(t, f, func() error { return loopbackUp() })
				key := uint64(worker*1000 + i + 1)
				if err := e.AddPod(Pod{Key: key, Name: fmt.Sprint(key), Netns: f}, []int{listenFD(t, f, "127.0.0.1:15001")}); err != nil {
					t.Error(err)
					return
				}
				if i%3 == 0 {
					if c, err := dialIn(t, f, "127.0.0.1:15001"); err == nil {
						_, _ = c.Read(make([]byte, 1)) // reset: the endpoint refuses
						c.Close()
					}
				}
				e.RemovePod(key)
				f.Close()
			}
		}()
	}
	wg.Wait()
	eventually(t, "all closed", func() bool { return openFiles(t) <= files && e.Stats().Pods == 0 && e.Stats().Active == 0 })
	e.mu.Lock()
	defer e.mu.Unlock()
	eventually(t, "forgotten", func() bool {
		e.mu.Unlock()
		defer e.mu.Lock()
		time.Sleep(time.Millisecond)
		return len(e.removing) == 0
	})
}
