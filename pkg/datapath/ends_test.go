package datapath

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// bothWays runs a test with the iterators that end sockets, and with sock_diag, which takes over where they are missing.
func bothWays(t *testing.T, test func(t *testing.T, w *world, d *Datapath)) {
	for _, without := range []bool{false, true} {
		t.Run(map[bool]string{false: "iterators", true: "sock_diag"}[without], func(t *testing.T) {
			w := newWorld(t)
			d := w.open(func(c *Config) { c.TCPGrace = time.Second })
			if without {
				d.objs.progs[progEndTCP], d.objs.progs[progEndUDP] = nil, nil
			} else if d.objs.progs[progEndTCP] == nil || d.objs.progs[progEndUDP] == nil {
				t.Fatal("the iterators that end sockets don't load on this kernel:", d.Probes())
			}
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() { defer close(done); _ = d.Reconciler().Run(ctx) }()
			t.Cleanup(func() { stop(); <-done })
			test(t, w, d)
		})
	}
}

func TestConnectedUDPEndsWithItsBackend(t *testing.T) {
	dns4, dns6 := netip.MustParseAddrPort("10.96.0.53:53"), netip.MustParseAddrPort("[fd96::53]:53")
	bothWays(t, func(t *testing.T, w *world, d *Datapath) {
		client, a, b := w.pod(), w.pod(), w.pod()
		a.udpServer("a", 5353)
		b.udpServer("b", 5353)
		set := func(s *ns) {
			d.Reconciler().SetService(udpSvc("dns4", dns4, ap(s.v4, 5353)))
			d.Reconciler().SetService(udpSvc("dns6", dns6, ap(s.v6, 5353)))
		}
		connected := func(to netip.AddrPort, want string) *udpSocket {
			s := client.udp(unix.AF_INET6) // IPv4 by its mapped address
			must(t, s.connect(to))
			must(t, s.write("who"))
			if got, from, err := s.receive(0); err != nil || got != want || from != to {
				t.Fatalf("%v: %q from %v, %v", to, got, from, err)
			}
			return s
		}
		set(a)
		synced(t, d)
		direct := connected(ap(a.v4, 5353), "a")
		var open []*udpSocket
		for _, to := range []netip.AddrPort{dns4, dns6, dns4, dns6} {
			open = append(open, connected(to, "a"))
		}
		set(b)
		for i, s := range open {
			if _, _, err := s.receive(0); !errors.Is(err, syscall.ECONNABORTED) {
				t.Errorf("socket %d waits for a backend that is gone: %v", i, err)
			}
		}
		must(t, direct.write("who"))
		if got, _, err := direct.receive(0); err != nil || got != "a" {
			t.Errorf("a socket that went there by itself: %q, %v", got, err)
		}
		for i, to := range []netip.AddrPort{dns4, dns6} {
			must(t, open[i].connect(to)) // the same socket connects anew
			must(t, open[i].write("who"))
			if got, from, err := open[i].receive(0); err != nil || got != "b" || from != to {
				t.Errorf("connected anew to %v: %q from %v, %v", to, got, from, err)
			}
		}
		eventually(t, "the ended sockets are counted", func() bool { return d.Status().Reconciler.EndedUDP == uint64(len(open)) })
	})
}

func TestTCPToAnEndpointThatLeftEndsAfterItsGrace(t *testing.T) {
	bothWays(t, func(t *testing.T, w *world, d *Datapath) {
		client, gone, drains, shared, stays := w.pod(), w.pod(), w.pod(), w.pod(), w.pod()
		for name, p := range map[string]*ns{"gone": gone, "drains": drains, "shared": shared, "stays": stays} {
			p.server(name, 8080)
		}
		conns := map[string]net.Conn{}
		connect := func(what string, backend netip.AddrPort, vip netip.AddrPort) {
			t.Helper()
			d.Reconciler().SetService(svc("web", vip, backend))
			flush(t, d)
			c, err := client.dial(vip)
			must(t, err)
			if _, err := greeting(c); err != nil {
				t.Fatal(err)
			}
			conns[what] = c
			t.Cleanup(func() { c.Close() })
		}
		synced(t, d)
		// Each step leaves the address of the one before out: all four connections are to earlier backends.
		connect("gone", ap(gone.v4, 8080), vip4)
		connect("gone6", ap(gone.v6, 8080), vip6)
		connect("shared", ap(shared.v4, 8080), vip4)
		connect("drains", ap(drains.v4, 8080), vip4)
		d.Reconciler().SetService(svc("other", ap(netip.MustParseAddr("10.96.7.7"), 80), ap(shared.v4, 8080)))
		next := svc("web", vip4, ap(stays.v4, 8080))
		next.Excluded = []service.Excluded{{Addr: ap(drains.v4, 8080), Reason: "terminating, and there are ready ones"}}
		d.Reconciler().SetService(next)
		flush(t, d)

		for _, what := range []string{"gone", "gone6"} {
			_ = conns[what].SetReadDeadline(time.Now().Add(30 * time.Second))
			if _, err := conns[what].Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: the connection to an endpoint that left goes on: %v", what, err)
			}
		}
		for _, what := range []string{"shared", "drains"} {
			_ = conns[what].SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.WriteString(conns[what], "x"); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if _, err := io.ReadFull(conns[what], make([]byte, 1)); err != nil {
				t.Errorf("%s: a connection that should go on: %v", what, err)
			}
		}
		// An application learns of it before the agent has counted it.
		eventually(t, "two TCP connections counted as ended", func() bool { return d.Status().Reconciler.EndedTCP == 2 })
		// The Service goes altogether: now the one that drained has left too.
		d.Reconciler().DeleteService(service.Name{Namespace: "default", Name: "web"})
		_ = conns["drains"].SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := conns["drains"].Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("after the Service was deleted: %v", err)
		}
	})
}

// Endpoints leave while no agent runs: the next one ends what goes to them, and nothing else.
func TestEndpointsThatLeftWhileNoAgentRanAreNoticed(t *testing.T) {
	dns := netip.MustParseAddrPort("10.96.0.53:53")
	w := newWorld(t)
	client, gone, drains, stays := w.pod(), w.pod(), w.pod(), w.pod()
	for name, p := range map[string]*ns{"gone": gone, "drains": drains, "stays": stays} {
		p.server(name, 8080)
		p.udpServer(name, 5353)
	}
	runs := func() (*Datapath, func()) {
		d := w.open(func(c *Config) { c.TCPGrace = time.Second })
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = d.Reconciler().Run(ctx) }()
		return d, sync.OnceFunc(func() { stop(); <-done })
	}
	d, stop := runs()
	defer stop()
	synced(t, d)
	conns := map[string]net.Conn{}
	connect := func(what string, to netip.AddrPort) {
		t.Helper()
		c, err := client.dial(to)
		must(t, err)
		if _, err := greeting(c); err != nil {
			t.Fatal(err)
		}
		conns[what] = c
		t.Cleanup(func() { c.Close() })
	}
	var vips []netip.AddrPort
	for i, to := range []struct {
		what string
		pod  *ns
	}{{"gone", gone}, {"drains", drains}, {"stays", stays}} {
		vips = append(vips, ap(vip4.Addr(), uint16(80+i)), ap(vip6.Addr(), uint16(80+i)))
		d.Reconciler().SetService(svc(to.what+"4", vips[2*i], ap(to.pod.v4, 8080)))
		d.Reconciler().SetService(svc(to.what+"6", vips[2*i+1], ap(to.pod.v6, 8080)))
		flush(t, d)
		connect(to.what+"4", vips[2*i])
		connect(to.what+"6", vips[2*i+1])
	}
	connect("direct", ap(gone.v4, 8080)) // by no Service
	d.Reconciler().SetService(udpSvc("dns", dns, ap(gone.v4, 5353)))
	flush(t, d)
	resolver := client.udp(unix.AF_INET)
	must(t, resolver.connect(dns))
	must(t, resolver.write("who"))
	if got, _, err := resolver.receive(0); err != nil || got != "gone" {
		t.Fatal(got, err)
	}
	stop()
	must(t, d.Close())

	d, stop = runs()
	defer stop()
	for i, name := range []string{"4", "6"} {
		d.Reconciler().SetService(svc("gone"+name, vips[i], ap([]netip.Addr{stays.v4, stays.v6}[i], 8080)))
		s := svc("drains"+name, vips[2+i])
		s.Excluded = []service.Excluded{{Addr: ap([]netip.Addr{drains.v4, drains.v6}[i], 8080), Reason: "terminating, and there are ready ones"}}
		d.Reconciler().SetService(s)
		d.Reconciler().SetService(svc("stays"+name, vips[4+i], ap([]netip.Addr{stays.v4, stays.v6}[i], 8080)))
	}
	d.Reconciler().SetService(udpSvc("dns", dns, ap(stays.v4, 5353)))
	synced(t, d)
	if _, _, err := resolver.receive(0); !errors.Is(err, syscall.ECONNABORTED) {
		t.Errorf("connected UDP to a backend that left: %v", err)
	}
	for _, what := range []string{"gone4", "gone6"} {
		_ = conns[what].SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := conns[what].Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: the connection to an endpoint that left goes on: %v", what, err)
		}
	}
	for _, what := range []string{"drains4", "drains6", "stays4", "stays6", "direct"} {
		_ = conns[what].SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(conns[what], "x"); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := io.ReadFull(conns[what], make([]byte, 1)); err != nil {
			t.Errorf("%s: a connection that should go on: %v", what, err)
		}
	}
	eventually(t, "two TCP connections and one UDP socket counted as ended", func() bool {
		s := d.Status().Reconciler
		return s.EndedTCP == 2 && s.EndedUDP == 1
	})
}

func TestDeparturesForgetWhoComesBack(t *testing.T) {
	a, b := netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:1")
	with := func(addrs ...netip.AddrPort) *service.Service { return svc("s", vip4, addrs...) }
	now := time.Now()
	g := departures{}
	g.left(nil, with(a, b), now)
	g.left(with(a, b), with(a), now)
	if _, left := g[b]; len(g) != 1 || !left {
		t.Errorf("b left: %v", g)
	}
	g.left(with(a), with(a), now.Add(time.Second))
	if g[b] != now {
		t.Errorf("b's departure moved to %v", g[b])
	}
	g.left(with(a), with(a, b), now)
	if len(g) != 0 {
		t.Errorf("b is back: %v", g)
	}
	g.left(with(a, b), nil, now)
	if len(g) != 2 {
		t.Errorf("the Service is gone: %v", g)
	}
}
