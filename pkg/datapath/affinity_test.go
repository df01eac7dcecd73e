package datapath

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// Session affinity inside: the client is its network namespace.

// stickyWorld is a node with a Service of n backends, TCP and UDP, and who they are.
type stickyWorld struct {
	*world
	d    *Datapath
	pods []*ns
}

func newStickyWorld(t *testing.T, n int) *stickyWorld {
	w := &stickyWorld{world: newWorld(t)}
	w.d = w.open()
	for i := range n {
		p := w.pod()
		p.server(fmt.Sprint("b", i), 8080)
		p.udpServer(fmt.Sprint("b", i), 8080)
		w.pods = append(w.pods, p)
	}
	synced(t, w.d)
	return w
}

// serve puts the Service in force; no TCP and UDP frontends share a pool, so each protocol has an affinity of its own.
func (w *stickyWorld) serve(fam family, timeout time.Duration, pods ...*ns) {
	w.t.Helper()
	var addrs []netip.AddrPort
	for _, p := range pods {
		addrs = append(addrs, ap(fam.of(p), 8080))
	}
	s := svc("sticky", fam.vip, addrs...)
	s.Frontends = append(s.Frontends, udpSvc("sticky", fam.vip, addrs...).Frontends...)
	for i := range s.Frontends {
		s.Frontends[i].Affinity = timeout
	}
	w.d.Reconciler().SetService(s)
	flush(w.t, w.d)
}

// asked is who answers a client's new connection, or the first datagram of a new socket.
func asked(t testing.TB, fam family, n *ns, proto service.Protocol) string {
	t.Helper()
	if proto == service.UDP {
		s := fam.udp(n)
		defer s.close()
		return s.ask(fam.vip)
	}
	name, err := fam.ask(n, fam.vip)
	must(t, err)
	return name
}

func bothProtocols(t *testing.T, f func(t *testing.T, fam family, proto service.Protocol)) {
	families(t, func(t *testing.T, fam family) {
		for _, p := range []service.Protocol{service.TCP, service.UDP} {
			t.Run(p.String(), func(t *testing.T) { f(t, fam, p) })
		}
	})
}

func TestClientStaysWithItsBackend(t *testing.T) {
	w := newStickyWorld(t, 6)
	clients := []*ns{w.pod(), w.pod(), w.pod(), w.node}
	bothProtocols(t, func(t *testing.T, fam family, proto service.Protocol) {
		w.serve(fam, time.Hour, w.pods...)
		for _, c := range clients {
			first := asked(t, fam, c, proto)
			for range 15 {
				if got := asked(t, fam, c, proto); got != first {
					t.Fatalf("went to %s after %s", got, first)
				}
			}
		}
	})
}

func TestAffinityIsSwitchedOnAndOff(t *testing.T) {
	w := newStickyWorld(t, 6)
	client := w.pod()
	spread := func(t *testing.T, fam family, proto service.Protocol) int {
		seen := map[string]bool{}
		for range 40 {
			seen[asked(t, fam, client, proto)] = true
		}
		return len(seen)
	}
	bothProtocols(t, func(t *testing.T, fam family, proto service.Protocol) {
		for range 2 {
			w.serve(fam, 0, w.pods...)
			if n := spread(t, fam, proto); n < 2 {
				t.Error("without affinity all connections went to one backend")
			}
			w.serve(fam, time.Hour, w.pods...)
			if n := spread(t, fam, proto); n != 1 {
				t.Errorf("with affinity the client saw %d backends", n)
			}
		}
	})
}

// A change that leaves the client's backend in place leaves the client there: the affinity survives every sync.
func TestAffinityEndsWithTheBackendAndNotBefore(t *testing.T) {
	w := newStickyWorld(t, 5)
	client := w.pod()
	bothProtocols(t, func(t *testing.T, fam family, proto service.Protocol) {
		left := append([]*ns(nil), w.pods...)
		w.serve(fam, time.Hour, left...)
		first := asked(t, fam, client, proto)
		for len(left) > 1 { // all others go, one by one
			for i, p := range left {
				if fmt.Sprint("b", indexOf(w.pods, p)) != first {
					left = append(left[:i:i], left[i+1:]...)
					break
				}
			}
			w.serve(fam, time.Hour, left...)
			if got := asked(t, fam, client, proto); got != first {
				t.Fatalf("went to %s although %s is still there", got, first)
			}
		}
		var others []*ns
		for i, p := range w.pods {
			if fmt.Sprint("b", i) != first {
				others = append(others, p)
			}
		}
		w.serve(fam, time.Hour, others...)
		next := asked(t, fam, client, proto)
		if next == first {
			t.Fatalf("went to %s, which is gone", first)
		}
		w.serve(fam, time.Hour, w.pods...)
		if got := asked(t, fam, client, proto); got != next {
			t.Errorf("went to %s after %s, which is still there", got, next)
		}
	})
}

func indexOf(list []*ns, n *ns) int {
	for i, p := range list {
		if p == n {
			return i
		}
	}
	return -1
}

// The time-out runs from the last use: as long as the client comes back in time it stays, afterwards it is drawn anew.
func TestAffinityTimesOutFromTheLastUse(t *testing.T) {
	w := newStickyWorld(t, 8)
	client := w.pod()
	fam := family{"v4", vip4, false}
	for _, proto := range []service.Protocol{service.TCP, service.UDP} {
		t.Run(proto.String(), func(t *testing.T) {
			const timeout = 5 * time.Second
			w.serve(fam, timeout, w.pods...)
			first, last := asked(t, fam, client, proto), time.Now()
			for range 8 {
				time.Sleep(time.Second)
				before := time.Now()
				got := asked(t, fam, client, proto)
				if time.Since(last) < timeout && got != first {
					t.Fatalf("went to %s %v after %s was used", got, time.Since(last), first)
				}
				first, last = got, before
			}
			// Several draws, because one may well fall on the same backend again.
			eventuallyMoves := false
			for range 6 {
				time.Sleep(timeout + 2*time.Second)
				if asked(t, fam, client, proto) != first {
					eventuallyMoves = true
					break
				}
			}
			if !eventuallyMoves {
				t.Errorf("six times past the time-out, and still at %s of 8", first)
			}
		})
	}
}

func TestFirstConnectionsAtOnceAgree(t *testing.T) {
	w := newStickyWorld(t, 8)
	fam := family{"v4", vip4, false}
	for round := range 10 {
		w.serve(fam, time.Hour, w.pods...)
		client := w.pod()
		var wg sync.WaitGroup
		names := make([]string, 16)
		for i := range names {
			wg.Go(func() {
				names[i], _ = client.ask(fam.vip)
			})
		}
		wg.Wait()
		for _, n := range names {
			if n == "" || n != names[0] {
				t.Fatalf("round %d: %v", round, names)
			}
		}
	}
}
