package datapath

import (
	"maps"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// The alias table must give each backend exactly its weight's share, for any weights.
func TestSlotsHaveExactlyTheWeights(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for range 2000 {
		n := 1 + r.IntN(40)
		ids, weights := make([]uint32, n), make([]uint64, n)
		var total uint64
		for i := range n {
			ids[i] = uint32(i + 1)
			weights[i] = uint64(1 + r.IntN(1<<uint(1+r.IntN(30))))
			total += weights[i]
		}
		slots, sum := buildSlots(ids, weights)
		got := make([]*big.Rat, n+1)
		for i := range got {
			got[i] = new(big.Rat)
		}
		for _, s := range slots {
			if s.Keep > sum {
				t.Fatalf("keep %d of %d", s.Keep, sum)
			}
			den := new(big.Int).Mul(big.NewInt(int64(sum)), big.NewInt(int64(n)))
			got[s.Backend].Add(got[s.Backend], new(big.Rat).SetFrac(big.NewInt(int64(s.Keep)), den))
			got[s.Other].Add(got[s.Other], new(big.Rat).SetFrac(big.NewInt(int64(sum-s.Keep)), den))
		}
		for i, w := range weights {
			if want := big.NewRat(int64(w), int64(total)); got[i+1].Cmp(want) != 0 {
				t.Fatalf("weights %v: endpoint %d has %v, want %v", weights, i, got[i+1], want)
			}
		}
	}
}

func TestFlattenMultipliesClusterAndEndpointWeights(t *testing.T) {
	a, b, c := netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:1"), netip.MustParseAddrPort("10.0.0.3:1")
	got := flatten(&mesh.Offload{Clusters: []mesh.OffloadCluster{
		{Weight: 90, Endpoints: []mesh.OffloadEndpoint{{Addr: a, Weight: 1}, {Addr: b, Weight: 2}}},
		{Weight: 10, Endpoints: []mesh.OffloadEndpoint{{Addr: c, Weight: 5}, {Addr: a, Weight: 5}}},
		{Weight: 0, Endpoints: []mesh.OffloadEndpoint{{Addr: c, Weight: 5}}},
	}})
	want := map[netip.AddrPort]uint64{a: 7, b: 12, c: 1} // 30+5 : 60 : 5
	if len(got) != len(want) {
		t.Fatalf("got %v", got)
	}
	for _, w := range got {
		if want[w.addr] != w.weight {
			t.Errorf("%v has weight %d, want %d", w.addr, w.weight, want[w.addr])
		}
	}
}

func TestFlattenKeepsHugeWeightsInBounds(t *testing.T) {
	var clusters []mesh.OffloadCluster
	r := rand.New(rand.NewPCG(1, 1))
	for i := range 20 {
		c := mesh.OffloadCluster{Weight: 1<<31 - uint32(i)}
		for j := range 10 {
			c.Endpoints = append(c.Endpoints, mesh.OffloadEndpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), byte(j)}), 1), Weight: uint32(r.Int32())})
		}
		clusters = append(clusters, c)
	}
	var sum uint64
	got := flatten(&mesh.Offload{Clusters: clusters})
	for _, w := range got {
		sum += w.weight
	}
	if len(got) != 200 || sum == 0 || sum > maxWeight+200 {
		t.Errorf("%d endpoints with a sum of %d", len(got), sum)
	}
}

func TestEvenDropsDuplicates(t *testing.T) {
	a := netip.MustParseAddrPort("10.0.0.1:80")
	mapped := netip.MustParseAddrPort("[::ffff:10.0.0.1]:80")
	if got := even([]netip.AddrPort{a, mapped, a}); len(got) != 1 || got[0].addr != a {
		t.Errorf("got %v", got)
	}
}

// Patching must lead to the wanted set, whatever changes, without ever naming a backend that is neither old nor new.
func TestPatchLeadsToTheWantedSet(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	patched := 0
	for range 20000 {
		var now []slotValue
		in := map[uint32]bool{}
		for range r.IntN(60) {
			id := uint32(1 + r.IntN(100))
			if !in[id] || r.IntN(20) == 0 { // a crash may leave a backend twice
				in[id] = true
				now = append(now, evenSlot(id))
			}
		}
		var want []uint32
		wanted := map[uint32]bool{}
		for _, s := range now {
			if r.IntN(12) > 0 && !wanted[s.Backend] {
				want, wanted[s.Backend] = append(want, s.Backend), true
			}
		}
		for range r.IntN(4) {
			if id := uint32(1 + r.IntN(200)); !wanted[id] {
				want, wanted[id] = append(want, id), true
			}
		}
		r.Shuffle(len(want), func(i, j int) { want[i], want[j] = want[j], want[i] })
		before := append([]slotValue(nil), now...)
		any := r.IntN(4) == 0
		p, ok := planPatch(now, want, any)
		if any && !ok {
			t.Fatalf("%v to %v: no plan, although its size does not matter", now, want)
		}
		if !slices.Equal(now, before) {
			t.Fatal("the plan changed its input")
		}
		if !ok {
			continue
		}
		patched++
		after := append([]slotValue(nil), now...)
		for _, e := range p.set {
			if e.slot == len(after) {
				after = append(after, slotValue{})
			}
			after[e.slot] = evenSlot(e.backend)
			if !wanted[e.backend] && !in[e.backend] {
				t.Fatalf("slot %d gets backend %d, which is neither old nor new", e.slot, e.backend)
			}
		}
		got := map[uint32]bool{}
		for _, s := range after[:p.size] {
			if got[s.Backend] {
				t.Fatalf("%v to %v: backend %d twice", before, want, s.Backend)
			}
			got[s.Backend] = true
		}
		if !maps.Equal(got, wanted) {
			t.Fatalf("%v to %v gives %v", before, want, got)
		}
	}
	if patched < 1000 {
		t.Errorf("only %d of the changes were patched", patched)
	}
}

// The sizes that others found too small in practice, and Kubernetes' own limits, fit into the maps as they are by default; for
// slots with a Service of a thousand endpoints that is written anew beside its old ones.
func TestTheDefaultSizesHoldALargeCluster(t *testing.T) {
	s := DefaultSizes()
	for _, c := range []struct{ services, endpoints uint32 }{
		{2 * 2000, 2 * 2000 * 50}, // 2,000 Services of 50, of both families
		{10_000, 250_000},
	} {
		if s.Frontends < c.services || s.Backends < c.endpoints || s.Slots < c.endpoints+1000 {
			t.Errorf("%d addresses with %d endpoints don't fit into %+v", c.services, c.endpoints, s)
		}
	}
}
