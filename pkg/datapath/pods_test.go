package datapath

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// --accelerate-pods: two enrolled pods of a node with no proxy between them. The oracle is a third pod, which is not enrolled
// and talks to the same server by plain TCP.

type podPair struct {
	*meshed
	stranger *ns
}

func newPodPair(t testing.TB) *podPair {
	m := newMeshed(t, func(c *Config) { c.AcceleratePods = true })
	m.d.Reconciler().SetClaims(nil)
	flush(t, m.d)
	return &podPair{m, m.w.pod()}
}

// ways are the addresses by which a pod reaches the server on port: directly, and through a Service.
func (p *podPair) ways(t testing.TB, fam family, port uint16) map[string]netip.AddrPort {
	direct := ap(fam.of(p.server), port)
	p.d.Reconciler().SetService(svc("web", fam.vip, direct))
	flush(t, p.d)
	return map[string]netip.AddrPort{"direct": direct, "service": fam.vip}
}

// Random conversations carry the same bytes between pods as over plain TCP, several at a time, whichever way they go.
func TestRandomConversationsOfPodsAreThoseOfPlainTCP(t *testing.T) {
	p := newPodPair(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	type script struct{ client, server stream }
	type result struct {
		got []byte
		err error
	}
	var mu sync.Mutex
	scripts, results := map[uint16]script{}, map[uint16]chan result{} // by the client's port; guarded by mu
	p.server.serve(8080, func(c *net.TCPConn) {
		defer c.Close()
		c.SetDeadline(time.Now().Add(60 * time.Second))
		var name [2]byte
		if _, err := io.ReadFull(onlyReader{c}, name[:]); err != nil {
			t.Error(err)
			return
		}
		n := uint16(name[0])<<8 | uint16(name[1])
		mu.Lock()
		s, to := scripts[n], results[n]
		mu.Unlock()
		got, err := s.server.play(c)
		to <- result{got, err}
	})
	converse := func(n uint16, s script, dial func() (*net.TCPConn, error)) error {
		done := make(chan result, 1)
		mu.Lock()
		scripts[n], results[n] = s, done
		mu.Unlock()
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(60 * time.Second))
		if _, err := c.Write([]byte{byte(n >> 8), byte(n)}); err != nil {
			return err
		}
		got, err := s.client.play(c)
		if err != nil {
			return fmt.Errorf("client: %w", err)
		}
		res := <-done
		if res.err != nil {
			return fmt.Errorf("server: %w", res.err)
		}
		if !bytes.Equal(got, s.server.data) || !bytes.Equal(res.got, s.client.data) {
			return fmt.Errorf("bytes differ (client got %d of %d, server %d of %d)", len(got), len(s.server.data), len(res.got), len(s.client.data))
		}
		return nil
	}
	count := uint16(0)
	families(t, func(t *testing.T, fam family) {
		before, err := p.d.Counters()
		must(t, err)
		var sent uint64
		for how, to := range p.ways(t, fam, 8080) {
			for range 8 {
				var wg sync.WaitGroup
				for range 3 {
					s := script{newStream(r), newStream(r)}
					sent += uint64(2 + len(s.client.data) + len(s.server.data))
					for who, from := range map[string]*ns{"enrolled": p.client, "plain": p.stranger} {
						count++
						n := count
						wg.Go(func() {
							if err := converse(n, s, func() (*net.TCPConn, error) { return fam.dial(from, to) }); err != nil {
								t.Errorf("conversation %d, %s, %s, seed %d: %v", n, how, who, seed, err)
							}
						})
					}
				}
				wg.Wait()
			}
		}
		after, err := p.d.Counters()
		must(t, err)
		redirected, passed := after.RedirectedBytes-before.RedirectedBytes, after.PassedBytes-before.PassedBytes
		t.Logf("redirected %d bytes, passed %d", redirected, passed)
		if redirected == 0 || redirected+passed > sent {
			t.Errorf("%d bytes were redirected and %d passed of the %d that enrolled pods sent", redirected, passed, sent)
		}
		eventually(t, "the sockets are gone", func() bool { return len(roles(t, p.d)) == 0 })
	})
	t.Logf("%d conversations", count)
}

// Half-close, reset, close with bytes in flight: as between pods that are not enrolled.
func TestEndingsBetweenPodsLookLikePlainTCP(t *testing.T) {
	p := newPodPair(t)
	var handle func(c *net.TCPConn)
	p.server.serve(8080, func(c *net.TCPConn) { handle(c) })
	for _, tc := range endings() {
		t.Run(strings.ReplaceAll(tc.name, " ", "_"), func(t *testing.T) {
			handle = tc.server
			families(t, func(t *testing.T, fam family) {
				for how, to := range p.ways(t, fam, 8080) {
					run := func(from *ns) ending {
						c, err := fam.dial(from, to)
						must(t, err)
						defer c.Close()
						return tc.client(c)
					}
					for range 3 {
						if got, want := run(p.client), run(p.stranger); got != want {
							t.Fatalf("%s: redirected: %d bytes, %q; plain TCP: %d bytes, %q", how, len(got.data), got.err, len(want.data), want.err)
						}
					}
				}
			})
		})
	}
	c, err := p.d.Counters()
	must(t, err)
	if c.RedirectedBytes == 0 || c.EnrolFailed != 0 {
		t.Errorf("counters: %+v", c)
	}
}

// A listener that the kernel serves by itself chooses among pods, and those are redirected to as well.
func TestPodsBehindAnOffloadedListenerAreRedirected(t *testing.T) {
	p := newPodPair(t)
	p.server.server("b", 8080)
	families(t, func(t *testing.T, fam family) {
		c := claim(fam.vip)
		c.Offload = &mesh.Offload{Clusters: []mesh.OffloadCluster{{Name: "c", Weight: 1, Endpoints: []mesh.OffloadEndpoint{{Addr: ap(fam.of(p.server), 8080), Weight: 1}}}}}
		p.d.Reconciler().SetClaims([]mesh.Claim{c})
		flush(t, p.d)
		conn, err := fam.dial(p.client, fam.vip)
		must(t, err)
		defer conn.Close()
		talks(t, conn, "b", 50_000)
		if got := roles(t, p.d); got["offload enrolled redirect"] != 1 || got["pod-server enrolled redirect"] != 1 {
			t.Errorf("sockets: %v", got)
		}
		p.gone(t, conn)
	})
}

// Sockets that block when they connect are left alone, unless their pod asks for it.
func TestBlockingPodsAreLeftAloneUnlessTheyOptIn(t *testing.T) {
	p := newPodPair(t)
	p.server.server("b", 8080)
	for _, optedIn := range []bool{false, true} {
		p.d.Reconciler().SetPods([]Pod{
			{Name: "client", Cookie: p.client.cookie, IPs: []netip.Addr{p.client.v4, p.client.v6}, Enrolled: true, AccelerateBlocking: optedIn},
			{Name: "server", Cookie: p.server.cookie, IPs: []netip.Addr{p.server.v4, p.server.v6}, Enrolled: true},
		})
		families(t, func(t *testing.T, fam family) {
			before, err := p.d.Counters()
			must(t, err)
			for how, to := range p.ways(t, fam, 8080) {
				c, err := fam.dialBlocking(p.client, to)
				must(t, err)
				if got, err := greeting(c); err != nil || got != "b" {
					t.Fatal(got, err)
				}
				echo(t, c, 5000)
				s := p.listed(t, c)
				if plain := s.State == "plain" && strings.Contains(s.Reason, "blocking when it connected"); plain == optedIn || optedIn && s.Sends != "redirect" {
					t.Errorf("opted in %v, %s: the client is %+v", optedIn, how, s)
				}
				p.gone(t, c)
			}
			after, err := p.d.Counters()
			must(t, err)
			if n := after.SkippedBlocking - before.SkippedBlocking; (n == 2) == optedIn {
				t.Errorf("opted in %v: %d of 2 blocking clients were left alone", optedIn, n)
			}
		})
	}
}

// Where only one of the two is enrolled, it is plain TCP, whichever one that is.
func TestPodsOfWhichOneIsNotEnrolledGoByTCP(t *testing.T) {
	p := newPodPair(t)
	p.server.server("b", 8080)
	for _, enrolled := range []string{"client", "server"} {
		p.d.Reconciler().SetPods([]Pod{
			{Name: "client", Cookie: p.client.cookie, IPs: []netip.Addr{p.client.v4, p.client.v6}, Enrolled: enrolled == "client"},
			{Name: "server", Cookie: p.server.cookie, IPs: []netip.Addr{p.server.v4, p.server.v6}, Enrolled: enrolled == "server"},
		})
		families(t, func(t *testing.T, fam family) {
			before, err := p.d.Counters()
			must(t, err)
			for how, to := range p.ways(t, fam, 8080) {
				c, err := fam.dial(p.client, to)
				must(t, err)
				if got, err := greeting(c); err != nil || got != "b" {
					t.Fatal(got, err)
				}
				echo(t, c, 50_000)
				for role := range roles(t, p.d) {
					if strings.Contains(role, "enrolled") {
						t.Errorf("only the %s is enrolled, %s: a socket is %q", enrolled, how, role)
					}
				}
				p.gone(t, c)
			}
			after, err := p.d.Counters()
			must(t, err)
			if after.Enrolled != before.Enrolled || after.RedirectedBytes != before.RedirectedBytes {
				t.Errorf("only the %s is enrolled: %d sockets were redirected", enrolled, after.Enrolled-before.Enrolled)
			}
		})
	}
}

// A pod is deleted under a live connection: its device goes, its processes are killed, the agent forgets it. What its peer
// sees is what a peer by plain TCP sees, and nothing of it stays in the maps.
func TestPodThatIsDeletedUnderARedirectedConnection(t *testing.T) {
	p := newPodPair(t)
	families(t, func(t *testing.T, fam family) {
		victim := p.w.pod()
		device := fmt.Sprintf("veth%d", p.w.pods+1)
		stop := victim.listen("[::]:8080", func(c *net.TCPConn) { defer c.Close(); io.Copy(onlyWriter{c}, onlyReader{c}) })
		enrol(p.d, p.client, p.server, victim)
		flush(t, p.d)
		var conns []*net.TCPConn
		for _, from := range []*ns{p.client, p.stranger} {
			c, err := fam.dial(from, ap(fam.of(victim), 8080))
			must(t, err)
			defer c.Close()
			echo(t, c, 10_000)
			conns = append(conns, c)
		}
		if s := p.listed(t, conns[0]); s.Sends != "redirect" {
			t.Fatalf("the client is %+v", s)
		}
		p.w.node.do(func() {
			l, err := netlink.LinkByName(device)
			must(t, err)
			must(t, netlink.LinkDel(l))
		})
		stop()
		enrol(p.d, p.client, p.server)
		flush(t, p.d)
		view := func(c *net.TCPConn) string {
			_, werr := c.Write([]byte("anybody there?"))
			c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			n, rerr := c.Read(make([]byte, 1))
			return fmt.Sprintf("write: %v; read: %d, timed out %v", werr, n, errors.Is(rerr, os.ErrDeadlineExceeded))
		}
		if got, want := view(conns[0]), view(conns[1]); got != want {
			t.Errorf("redirected: %s; plain TCP: %s", got, want)
		}
		if s := p.listed(t, conns[0]); s.Sends != "tcp" || !strings.Contains(s.Reason, "the other end has closed") {
			t.Errorf("the client is %+v", s)
		}
		conns[0].SetLinger(0)
		p.gone(t, conns[0])
		eventually(t, "nothing is left in sm_pairs", func() bool { return countEntries(p.d.objs.pairs()) == 0 })
	})
}

// What docs/security.md says of packet filters: one that is set up after the connect does not stop redirected bytes, and
// stops new connections as it stops plain TCP. Hence off by default.
func TestFiltersStopConnectsOfPodsButNotTheirBytes(t *testing.T) {
	p := newPodPair(t)
	p.server.server("b", 8080)
	families(t, func(t *testing.T, fam family) {
		to := ap(fam.of(p.server), 8080)
		var conns []*net.TCPConn
		for _, from := range []*ns{p.client, p.stranger} {
			c, err := fam.dial(from, to)
			must(t, err)
			defer c.Close()
			if got, err := greeting(c); err != nil || got != "b" {
				t.Fatal(got, err)
			}
			conns = append(conns, c)
		}
		release := p.server.dropOnEgress(asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()})
		defer release()
		echo(t, conns[0], 10_000)
		conns[1].SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := conns[1].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if n, err := conns[1].Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("plain TCP passes the filter: %d, %v", n, err)
		}
		if c, err := p.client.dial(to, briefly); err == nil {
			t.Error("a new connection passes the filter")
			c.Close()
		}
		conns[0].SetLinger(0)
		conns[1].SetLinger(0)
		p.gone(t, conns[0])
	})
}
