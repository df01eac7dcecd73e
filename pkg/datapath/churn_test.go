package datapath

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// While endpoints, weights and modes change without pause, every connection must reach one of the endpoints that are
// or were in force.
func TestChangesUnderTrafficLoseNoConnection(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client := w.pod()
	var addrs []netip.AddrPort
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		p := w.pod()
		p.server(name, 8080)
		addrs = append(addrs, ap(p.v4, 8080))
	}
	p := startProxy(t, d, client)
	p.to = addrs[4]
	enrol(d, client)
	claimed := netip.MustParseAddrPort("10.96.0.11:80")
	r := d.Reconciler()
	set := func(i int) {
		r.SetService(svc("web", vip4, addrs[i%5:]...)) // one to five endpoints: patched and replaced
		c := claim(claimed)
		if i%3 != 0 {
			c.Offload = &mesh.Offload{Clusters: []mesh.OffloadCluster{
				{Name: "x", Weight: uint32(i % 7), Endpoints: []mesh.OffloadEndpoint{{Addr: addrs[0], Weight: 1}, {Addr: addrs[1], Weight: uint32(1 + i%2)}}},
				{Name: "y", Weight: uint32(1 + i%5), Endpoints: []mesh.OffloadEndpoint{{Addr: addrs[2], Weight: 3}}},
			}}
		}
		r.SetClaims([]mesh.Claim{c})
		flush(t, d)
	}
	set(0)
	synced(t, d)

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	var asked, failed atomic.Int64
	var wg sync.WaitGroup
	for _, to := range []netip.AddrPort{vip4, vip4, claimed, claimed} {
		wg.Go(func() {
			for ctx.Err() == nil {
				asked.Add(1)
				if name, err := client.ask(to); err != nil || len(name) != 1 {
					failed.Add(1)
					t.Logf("%v: %q, %v", to, name, err)
				}
			}
		})
	}
	changes := 0
	for ; ctx.Err() == nil; changes++ {
		set(changes)
	}
	wg.Wait()
	c, err := d.Counters()
	must(t, err)
	t.Logf("%d connections during %d changes: %d failed, %d looked twice", asked.Load(), changes, failed.Load(), c.PoolRetries)
	if failed.Load() > 0 || asked.Load() == 0 || changes == 0 {
		t.Fail()
	}
}
