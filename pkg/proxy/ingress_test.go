package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
)

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// freePort returns a loopback address where nobody listens.
func freePort(t testing.TB) string {
	ln := listenIn(t, nil, "127.0.0.1:0")
	ln.Close()
	return ln.Addr().String()
}

func TestIngressFollowsTheSnapshotAndKeepsWhatIsOpen(t *testing.T) {
	one, two := listenIn(t, nil, "127.0.0.1:0"), listenIn(t, nil, "127.0.0.1:0")
	go serveEcho(one, "1", nil)
	go serveEcho(two, "2", nil)
	e := startEngine(t, Config{})
	a, b := freePort(t), freePort(t)
	clusters := []*mesh.Cluster{clusterOf("one", one.Addr().String()), clusterOf("two", two.Addr().String())}
	la := listener(t, "a", a, true, tcpChain(to("one")))
	e.SetSnapshot(snapshot(1, []*mesh.Listener{la}, clusters...))
	c := mustDialIn(t, nil, a)
	if got := read(t, c, 1); got != "1" {
		t.Fatalf("got %q", got)
	}
	// Another listener comes, the first is unchanged, then changed, then gone.
	lb := listener(t, "b", b, true, tcpChain(to("two")))
	e.SetSnapshot(snapshot(2, []*mesh.Listener{la, lb}, clusters...))
	if got := read(t, mustDialIn(t, nil, b), 1); got != "2" {
		t.Fatalf("got %q", got)
	}
	e.SetSnapshot(snapshot(3, []*mesh.Listener{listener(t, "a", a, true, tcpChain(to("two"))), lb}, clusters...))
	eventually(t, "new connections use the new chain", func() bool { return read(t, mustDialIn(t, nil, a), 1) == "2" })
	e.SetSnapshot(snapshot(4, []*mesh.Listener{lb}, clusters...))
	if _, err := dialIn(t, nil, a); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a listener that is gone: %v", err)
	}
	_, _ = c.Write([]byte("still"))
	if got := read(t, c, 5); got != "still" {
		t.Fatalf("the open connection said %q", got)
	}
}

// TestNoConnectionFailsWhileTheConfigurationChanges connects without pause while snapshots come that change
// everything but the listener's address.
func TestNoConnectionFailsWhileTheConfigurationChanges(t *testing.T) {
	one, two := listenIn(t, nil, "127.0.0.1:0"), listenIn(t, nil, "127.0.0.1:0")
	go serveEcho(one, "1", nil)
	go serveEcho(two, "2", nil)
	e := startEngine(t, Config{})
	addr := freePort(t)
	publish := func(g uint64) {
		// The cluster's name changes too: chain and cluster must switch together.
		name := fmt.Sprintf("c%d", g%3)
		target := one
		if g%2 == 0 {
			target = two
		}
		e.SetSnapshot(snapshot(g, []*mesh.Listener{listener(t, "l", addr, true, tcpChain(to(name)))}, clusterOf(name, target.Addr().String())))
	}
	publish(1)
	read(t, mustDialIn(t, nil, addr), 1)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var made atomic.Int64
	for range 3 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := dialIn(t, nil, addr)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := c.Read(make([]byte, 1)); err != nil {
					t.Error(err)
					return
				}
				c.Close()
				made.Add(1)
			}
		}()
	}
	for g := uint64(2); g < 300; g++ {
		publish(g)
		before := made.Load()
		eventually(t, "traffic", func() bool { return made.Load() > before || t.Failed() })
	}
	close(stop)
	wg.Wait()
	if r := e.Stats().Refused.Sum(); r != 0 {
		t.Errorf("%d refused", r)
	}
}

func TestAnAddressThatCannotBeBoundIsReportedAndTriedAgain(t *testing.T) {
	squatter := listenIn(t, nil, "127.0.0.1:0")
	addr := squatter.Addr().String()
	back := listenIn(t, nil, "127.0.0.1:0")
	go serveEcho(back, "1", nil)
	e := startEngine(t, Config{})
	s := snapshot(1, []*mesh.Listener{listener(t, "l", addr, true, tcpChain(to("one")))}, clusterOf("one", back.Addr().String()))
	e.SetSnapshot(s)
	if l := e.Stats().Listeners; len(l) != 1 || !strings.Contains(l[0].Error, "another program") {
		t.Fatalf("listeners %+v", l)
	}
	squatter.Close()
	e.SetSnapshot(s)
	if l := e.Stats().Listeners; len(l) != 1 || l[0].Error != "" {
		t.Fatalf("listeners %+v", l)
	}
	if got := read(t, mustDialIn(t, nil, addr), 1); got != "1" {
		t.Fatalf("got %q", got)
	}
}

// recorder is an HTTP server that only remembers.
type recorder struct {
	mu     sync.Mutex
	infos  []*stream.ConnInfo
	drains atomic.Int64
}

func (r *recorder) ServeConn(c *loop.Conn, in *stream.ConnInfo) {
	c.SetHandler(ignore{})
	r.mu.Lock()
	r.infos = append(r.infos, in)
	r.mu.Unlock()
}
func (r *recorder) Drain() {}
func (r *recorder) DrainListener(which func(*stream.ConnInfo) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, in := range r.infos {
		if which(in) {
			r.drains.Add(1)
		}
	}
}
func (r *recorder) RemoveSource(uint64) {}

type ignore struct{}

func (ignore) OnConnect(*loop.Conn, error)       {}
func (ignore) OnData(_ *loop.Conn, b []byte) int { return len(b) }
func (ignore) OnEOF(c *loop.Conn)                { c.Close() }
func (ignore) OnDrained(*loop.Conn)              {}
func (ignore) OnClose(*loop.Conn, error)         {}

func TestAnOpenHTTPConnectionLearnsItsListenersNewRoutes(t *testing.T) {
	rec := &recorder{}
	e := startEngine(t, Config{Concurrency: 1, NewHTTP: func(*Worker) HTTPServer { return rec }})
	addr := freePort(t)
	chain := func(route string) *mesh.FilterChain {
		return &mesh.FilterChain{HTTP: &mesh.HTTPConnectionManager{Routes: &mesh.RouteConfig{Name: route}}}
	}
	e.SetSnapshot(snapshot(1, []*mesh.Listener{listener(t, "l", addr, true, chain("r1"))}))
	mustDialIn(t, nil, addr)
	eventually(t, "served", func() bool { return e.Stats().Active == 1 })
	routes := func() (name string) {
		done := make(chan struct{})
		e.workers[0].loop.Post(func() { name = rec.infos[0].Chain.HTTP.Routes.Name; close(done) })
		<-done
		return name
	}
	if got := routes(); got != "r1" {
		t.Fatal(got)
	}
	e.SetSnapshot(snapshot(2, []*mesh.Listener{listener(t, "l", addr, true, chain("r2"))}))
	if got := routes(); got != "r2" || rec.drains.Load() != 0 {
		t.Fatal(got, rec.drains.Load())
	}
	if o := rec.infos[0].Orig; o != netip.MustParseAddrPort(addr) {
		t.Errorf("original destination %s", o)
	}
	// Gone, or of another kind: it keeps what it has and is asked to leave.
	e.SetSnapshot(snapshot(3, []*mesh.Listener{listener(t, "l", addr, true, tcpChain(to("x")))}))
	if got := routes(); got != "r2" || rec.drains.Load() != 1 {
		t.Fatal(got, rec.drains.Load())
	}
}
