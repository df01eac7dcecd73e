package upstream

import (
	"math/rand/v2"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

type entry struct {
	host     *Host
	weight   uint32
	deadline float64 // of the weighted round robin
}

// set is a group of hosts that a policy chooses from: a priority's hosts of one health, or one locality of it.
type set struct {
	entries []entry
	equal   bool   // all weights are the same
	turn    uint64 // round robin without weights
	heap    []int32
	draw    *alias // by weight

	// localities are drawn first, if there are any.
	localities []*set
	locality   *alias
}

func newSet() *set { return &set{equal: true} }

func (s *set) add(h *Host, weight uint32) {
	weight = max(weight, 1)
	s.entries = append(s.entries, entry{host: h, weight: weight})
	s.equal = s.equal && weight == s.entries[0].weight
}

// finish prepares the tables of the policy. random starts each loop's round robin elsewhere, otherwise all
// would send their first requests to the same host.
func (s *set) finish(policy mesh.LBPolicy, random *rand.Rand) {
	if len(s.entries) == 0 {
		return
	}
	switch {
	case s.equal:
		s.turn = uint64(random.IntN(len(s.entries)))
	case policy == mesh.RoundRobin:
		s.buildHeap(random)
	default:
		weights := make([]float64, len(s.entries))
		for i := range s.entries {
			weights[i] = float64(s.entries[i].weight)
		}
		s.draw = newAlias(weights)
	}
}

// pick chooses a host; nil if the set is empty.
func (s *set) pick(conf *mesh.Cluster, r *rng) *Host {
	if s.localities != nil {
		s = s.localities[s.locality.pick(r)]
	}
	switch {
	case len(s.entries) == 0:
		return nil
	case len(s.entries) == 1:
		return s.entries[0].host
	case conf.Policy == mesh.RoundRobin:
		return s.roundRobin()
	case conf.Policy == mesh.LeastRequest:
		return s.leastRequest(r, max(conf.ChoiceCount, 2))
	default:
		return s.random(r).host
	}
}

func (s *set) random(r *rng) *entry {
	if s.equal {
		return &s.entries[r.below(uint64(len(s.entries)))]
	}
	return &s.entries[s.draw.pick(r)]
}

// leastRequest draws candidates by weight and takes the one with the fewest requests for its weight. Drawing
// by weight makes an idle cluster follow the weights; comparing active/weight makes a busy one do so.
func (s *set) leastRequest(r *rng, choices uint32) *Host {
	best := s.random(r)
	for range choices - 1 {
		e := s.random(r)
		if uint64(e.host.ActiveRequests)*uint64(best.weight) < uint64(best.host.ActiveRequests)*uint64(e.weight) {
			best = e
		}
	}
	return best.host
}

func (s *set) roundRobin() *Host {
	if s.equal {
		s.turn++
		return s.entries[s.turn%uint64(len(s.entries))].host
	}
	// Earliest deadline first: each host is due again 1/weight later, which spreads a heavy host's turns
	// between those of the others.
	e := &s.entries[s.heap[0]]
	e.deadline += 1 / float64(e.weight)
	s.sink(0)
	return e.host
}

func (s *set) buildHeap(random *rand.Rand) {
	s.heap = make([]int32, len(s.entries))
	for i := range s.entries {
		s.entries[i].deadline = (1 - random.Float64()) / float64(s.entries[i].weight)
		s.heap[i] = int32(i)
	}
	for i := len(s.heap)/2 - 1; i >= 0; i-- {
		s.sink(i)
	}
}

func (s *set) sink(i int) {
	h := s.heap
	for {
		child := 2*i + 1
		if child >= len(h) {
			return
		}
		if child+1 < len(h) && s.entries[h[child+1]].deadline < s.entries[h[child]].deadline {
			child++
		}
		if s.entries[h[i]].deadline <= s.entries[h[child]].deadline {
			return
		}
		h[i], h[child] = h[child], h[i]
		i = child
	}
}

// alias draws from a discrete distribution in constant time (Vose).
type alias struct {
	keep  []float64
	other []int32
}

func newAlias(weights []float64) *alias {
	n := len(weights)
	a := &alias{keep: make([]float64, n), other: make([]int32, n)}
	sum := 0.0
	for _, w := range weights {
		sum += w
	}
	var small, large []int32
	for i, w := range weights {
		a.keep[i] = w * float64(n) / sum
		if a.keep[i] < 1 {
			small = append(small, int32(i))
		} else {
			large = append(large, int32(i))
		}
	}
	for len(small) > 0 && len(large) > 0 {
		s, g := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		a.other[s] = g
		if a.keep[g] -= 1 - a.keep[s]; a.keep[g] < 1 {
			large = large[:len(large)-1]
			small = append(small, g)
		}
	}
	for _, i := range append(small, large...) { // what rounding left
		a.keep[i] = 1
	}
	return a
}

func (a *alias) pick(r *rng) int {
	i := r.below(uint64(len(a.keep)))
	if r.unit() < a.keep[i] {
		return int(i)
	}
	return int(a.other[i])
}
