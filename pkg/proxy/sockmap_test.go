package proxy

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/internal/conversation"
)

// These tests run the engine behind the real hooks, with bytes going from socket to socket. The engine itself
// knows nothing of them, and must behave the same: that is what is tested.

// hooked is an engine whose pod's connections are redirected by the datapath.
type hooked struct {
	*world
	d *datapath.Datapath
	e *Engine
	setup
}

// setup is what a test may change before anything starts.
type setup struct {
	engine   Config
	datapath datapath.Config
	chain    *mesh.FilterChain // of every listener
	// bufferLimit of listeners and clusters, if it isn't the test's usual one.
	bufferLimit uint32
}

func cookie(t testing.TB, f *os.File) (c uint64) {
	inNetns(t, f, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		c, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	})
	return c
}

func newHooked(t *testing.T, bufferLimit uint32, accelerate bool, change ...func(*setup)) *hooked {
	t.Helper()
	h := newStage(t, accelerate, change...)
	h.start(t, bufferLimit)
	return h
}

// newStage is everything but the datapath and the engine.
func newStage(t *testing.T, accelerate bool, change ...func(*setup)) *hooked {
	t.Helper()
	h := &hooked{world: newWorld(t)}
	root, err := datapath.FindCgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	cg := filepath.Join(root, fmt.Sprintf("sm-proxy-%d-%d", os.Getpid(), time.Now().UnixNano()))
	join := func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(os.Getpid())), 0)
	}
	if err := os.Mkdir(cg, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := join(cg); err != nil { // sockets belong to the cgroup of the process that makes them
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = join(root)
		if err := os.Remove(cg); err != nil {
			t.Error(err)
		}
	})
	h.datapath = datapath.Config{
		CgroupRoot: cg, BPFFS: filepath.Join(t.TempDir(), "bpf"), Acceleration: accelerate, SyncTimeout: time.Hour, DriftInterval: time.Hour,
		Logger: slog.New(slog.DiscardHandler),
		Sizes:  datapath.Sizes{Frontends: 64, Backends: 64, Slots: 64, Claims: 64, Pods: 64, Locals: 64, Origins: 4096, Pairs: 4096},
	}
	t.Cleanup(func() {
		if err := datapath.Cleanup(h.datapath); err != nil {
			t.Error(err)
		}
	})
	h.prepare()
	for _, c := range change {
		c(&h.setup)
	}
	return h
}

// prepare sets up the engine and what its listeners do.
func (h *hooked) prepare() {
	h.chain = tcpChain(to("orig"))
	h.engine = Config{Own: func(fd int) error { return h.d.Own(fd) }, OriginalDst: func(fd int) (Origin, error) {
		addr, accelerated, err := h.d.OriginalDst(fd)
		return Origin{Addr: addr, Accelerated: accelerated}, err
	}}
}

// start opens the datapath and starts the engine on it.
func (h *hooked) start(t testing.TB, bufferLimit uint32) {
	t.Helper()
	var err error
	if h.d, err = datapath.Open(h.datapath); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.d.Close() })
	h.e = startEngine(t, h.engine)
	if h.bufferLimit > 0 {
		bufferLimit = h.bufferLimit
	}
	var listeners []*mesh.Listener
	for _, addr := range []string{"0.0.0.0:8080", "[::]:8080", "0.0.0.0:8081", "[::]:8081", "0.0.0.0:8082", "[::]:8082"} {
		l := listener(t, "l"+addr, addr, false, h.chain)
		l.BufferLimit = bufferLimit
		listeners = append(listeners, l)
	}
	orig := clusterOf("orig")
	orig.Discovery, orig.Policy, orig.BufferLimit = mesh.OriginalDst, mesh.ClusterProvided, bufferLimit
	h.e.SetSnapshot(snapshot(1, listeners, orig))
	h.own = h.d.OwnListener
	h.addPod(t, h.e, cookie(t, h.pod))

	r := h.d.Reconciler()
	r.SetPods([]datapath.Pod{
		{Namespace: "ns", Name: "client", Cookie: cookie(t, h.pod), IPs: h.podIPs, Enrolled: true},
		{Namespace: "ns", Name: "server", Cookie: cookie(t, h.server), IPs: h.serverIPs, Enrolled: true},
	})
	var claims []mesh.Claim
	for _, l := range listeners {
		claims = append(claims, mesh.Claim{Addr: l.Addresses[0], Listener: l.Name})
	}
	r.SetClaims(claims)
	for _, s := range []string{datapath.SourceServices, datapath.SourceClaims, datapath.SourcePods} {
		r.Synced(s)
	}
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestRandomConversationsBehindTheHooksAreThoseOfPlainTCP(t *testing.T) {
	for _, accelerate := range []bool{true, false} {
		for i, family := range []string{"IPv4", "IPv6"} {
			t.Run(fmt.Sprintf("%s accelerated %v", family, accelerate), func(t *testing.T) {
				h := newHooked(t, 64<<10, accelerate)
				accepted := make(chan *net.TCPConn)
				serve := func(port uint16) func() (*net.TCPConn, error) {
					addr := netip.AddrPortFrom(h.serverIPs[i], port).String()
					ln := listenIn(t, h.server, addr)
					go func() {
						for {
							c, err := ln.Accept()
							if err != nil {
								return
							}
							accepted <- c.(*net.TCPConn)
						}
					}()
					return func() (*net.TCPConn, error) { return dialIn(t, h.pod, addr) }
				}
				plain, proxied := serve(9090), serve(8080)
				rounds := uint64(64)
				if testing.Short() {
					rounds = 16
				}
				for seed := range rounds {
					client, server := conversation.Pair(seed)
					plainC, plainS, err := conversation.Play(plain, accepted, client, server)
					if err != nil {
						t.Fatal(err)
					}
					proxyC, proxyS, err := conversation.Play(proxied, accepted, client, server)
					if err != nil {
						t.Fatal(err)
					}
					if err := conversation.Differs(plainC, proxyC, client, server); err != nil {
						t.Errorf("conversation %d (%v, %v): the client %v", seed, client.End, server.End, err)
					}
					if err := conversation.Differs(plainS, proxyS, server, client); err != nil {
						t.Errorf("conversation %d (%v, %v): the server %v", seed, client.End, server.End, err)
					}
				}
				s := h.e.Stats()
				if s.Accepted != rounds || s.Refused.Sum() != 0 {
					t.Errorf("of %d connections %d were proxied, %+v refused", rounds, s.Accepted, s.Refused)
				}
				c, err := h.d.Counters()
				if err != nil {
					t.Fatal(err)
				}
				if (c.RedirectedBytes > 0) != accelerate {
					t.Errorf("accelerated %v, yet %d bytes went from socket to socket", accelerate, c.RedirectedBytes)
				}
			})
		}
	}
}

// TestAnAcceleratedReaderThatNeverReadsStopsItsSender: redirected bytes pass no TCP window, so that it is the
// sockets' memory limits that must stop the sender.
func TestAnAcceleratedReaderThatNeverReadsStopsItsSender(t *testing.T) {
	h := newHooked(t, 64<<10, true)
	ln := listenIn(t, h.server, "10.98.0.2:8080")
	accepted := make(chan net.Conn, 1)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	c := mustDialIn(t, h.pod, "10.98.0.2:8080")
	s := <-accepted
	defer s.Close()
	piece := make([]byte, 64<<10)
	for i := range piece {
		piece[i] = byte(i)
	}
	sent := 0
	for err := error(nil); err == nil && sent < 1<<30; {
		var n int
		_ = c.SetWriteDeadline(time.Now().Add(2 * time.Second))
		n, err = c.Write(piece)
		sent += n
	}
	t.Logf("the sender was stopped after %d KiB", sent>>10)
	// Two legs of two sockets each; how much the kernel lets a receiver have (tcp_rmem) is the node's affair.
	if sent > 256<<20 {
		t.Errorf("the sender could send %d MiB to a reader that doesn't read", sent>>20)
	}
	// Now it reads, and everything is there.
	_ = c.CloseWrite()
	_ = s.SetDeadline(time.Now().Add(patience))
	got, err := io.ReadAll(s)
	if err != nil || len(got) != sent {
		t.Fatalf("%d of %d bytes arrived: %v", len(got), sent, err)
	}
	for i, b := range got {
		if b != byte(i%(64<<10)) {
			t.Fatalf("byte %d is wrong", i)
		}
	}
}
