package datapath

import (
	"math/big"
	"math/bits"
	"net/netip"
	"sort"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// How endpoints become slots. The kernel draws one slot evenly and, where weights differ, tosses one weighted coin: the
// alias method of Walker and Vose, in integers, so the odds are exactly the configured weights, at the cost of one
// look-up however many endpoints there are.

// maxWeight bounds the sum of weights, so that sum times slots stays within 64 bits. Greater sums, which only come
// from odd combinations of cluster and endpoint weights, are scaled down: an error below 1 in 2^40.
const maxWeight = 1 << 40

// weighted is one endpoint of a pool. An invalid address stands for a share of connections that is refused: a weighted
// cluster without endpoints.
type weighted struct {
	addr   netip.AddrPort
	weight uint64
}

// even gives every address the same weight, each once.
func even(addrs []netip.AddrPort) []weighted {
	out := make([]weighted, 0, len(addrs))
	seen := make(map[netip.AddrPort]bool, len(addrs))
	for _, a := range addrs {
		if a = normal(a); !seen[a] {
			seen[a] = true
			out = append(out, weighted{a, 1})
		}
	}
	sortWeighted(out)
	return out
}

// flatten turns weighted clusters of weighted endpoints into endpoints with the product's weights: endpoint j of
// cluster i gets cluster_i * endpoint_ij * lcm/sum_i, all integers.
func flatten(o *mesh.Offload) []weighted {
	lcm := big.NewInt(1)
	sums := make([]*big.Int, len(o.Clusters))
	for i, c := range o.Clusters {
		sum := new(big.Int)
		for _, e := range c.Endpoints {
			sum.Add(sum, big.NewInt(int64(e.Weight)))
		}
		sums[i] = sum
		if c.Weight > 0 && sum.Sign() > 0 {
			g := new(big.Int).GCD(nil, nil, lcm, sum)
			lcm.Div(lcm.Mul(lcm, sum), g)
		}
	}
	weights := map[netip.AddrPort]*big.Int{}
	add := func(a netip.AddrPort, w *big.Int) {
		if w.Sign() == 0 {
			return
		}
		if old := weights[a]; old != nil {
			w.Add(w, old) // the same address in two clusters, or twice in one
		}
		weights[a] = w
	}
	for i, c := range o.Clusters {
		base := new(big.Int).Mul(lcm, big.NewInt(int64(c.Weight)))
		if sums[i].Sign() == 0 {
			add(netip.AddrPort{}, base)
			continue
		}
		base.Div(base, sums[i])
		for _, e := range c.Endpoints {
			add(normal(e.Addr), new(big.Int).Mul(base, big.NewInt(int64(e.Weight))))
		}
	}
	return reduce(weights)
}

// reduce divides by the common divisor and brings the sum below maxWeight.
func reduce(weights map[netip.AddrPort]*big.Int) []weighted {
	gcd, sum := new(big.Int), new(big.Int)
	for _, w := range weights {
		gcd.GCD(nil, nil, gcd, w)
		sum.Add(sum, w)
	}
	out := make([]weighted, 0, len(weights))
	limit := big.NewInt(maxWeight)
	for a, w := range weights {
		w = new(big.Int).Div(w, gcd)
		if total := new(big.Int).Div(sum, gcd); total.Cmp(limit) > 0 {
			w.Div(w.Mul(w, limit), total)
			if w.Sign() == 0 {
				w.SetInt64(1)
			}
		}
		out = append(out, weighted{a, w.Uint64()})
	}
	sortWeighted(out)
	return out
}

// sortWeighted fixes the order, so that the same endpoints always make the same slots, whatever order they came in: a
// restart then finds nothing to write.
func sortWeighted(w []weighted) {
	sort.Slice(w, func(i, j int) bool { return w[i].addr.Compare(w[j].addr) < 0 })
}

func normal(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// buildSlots makes the alias table over backend ids, and returns the sum of weights that coins are drawn from.
func buildSlots(ids []uint32, weights []uint64) ([]slotValue, uint64) {
	n := uint64(len(ids))
	out := make([]slotValue, n)
	var sum uint64
	equal := true
	for _, w := range weights {
		sum += w
		equal = equal && w == weights[0]
	}
	if equal {
		for i, id := range ids {
			out[i] = evenSlot(id)
		}
		return out, 1
	}
	// Each column holds sum; an endpoint of weight w has n*w to spread. Those with less than one column's worth are
	// filled up by those with more.
	left := make([]uint64, n)
	var small, large []int
	for i, w := range weights {
		_, left[i] = bits.Mul64(w, n)
		if left[i] < sum {
			small = append(small, i)
		} else {
			large = append(large, i)
		}
	}
	for len(small) > 0 && len(large) > 0 {
		s, l := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		out[s] = slotValue{Keep: left[s], Backend: ids[s], Other: ids[l]}
		left[l] -= sum - left[s]
		if left[l] < sum {
			large = large[:len(large)-1]
			small = append(small, l)
		}
	}
	for _, i := range append(small, large...) {
		out[i] = slotValue{Keep: sum, Backend: ids[i], Other: ids[i]}
	}
	return out, sum
}
