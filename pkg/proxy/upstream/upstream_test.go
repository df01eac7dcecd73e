package upstream

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// endpoint i of a test cluster.
func endpoint(i int, weight uint32, h mesh.Health) mesh.Endpoint {
	return mesh.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 80), Weight: weight, Health: h}
}

// group is one locality of a test cluster.
type group struct {
	priority, weight uint32
	weights          []uint32 // of healthy endpoints
	unhealthy        int
	degraded         int
}

func cluster(policy mesh.LBPolicy, localityWeighted bool, groups ...group) *mesh.Cluster {
	c := &mesh.Cluster{
		Name: "c", Policy: policy, LocalityWeighted: localityWeighted, Overprovisioning: 140, PanicThreshold: 50,
		Limits: [2]mesh.Limits{{MaxConnections: 2, MaxPendingRequests: 2, MaxRequests: 2, MaxRetries: 2}},
	}
	for _, g := range groups {
		l := mesh.Locality{Priority: g.priority, Weight: g.weight, First: len(c.Endpoints)}
		for _, w := range g.weights {
			c.Endpoints = append(c.Endpoints, endpoint(len(c.Endpoints), w, mesh.HealthHealthy))
		}
		for range g.unhealthy {
			c.Endpoints = append(c.Endpoints, endpoint(len(c.Endpoints), 1, mesh.HealthUnhealthy))
		}
		for range g.degraded {
			c.Endpoints = append(c.Endpoints, endpoint(len(c.Endpoints), 1, mesh.HealthDegraded))
		}
		l.N = len(c.Endpoints) - l.First
		c.Localities = append(c.Localities, l)
	}
	return c
}

func manager(conf ...*mesh.Cluster) (*Manager, *mesh.Snapshot) {
	s := &mesh.Snapshot{Generation: 1, Clusters: map[string]*mesh.Cluster{}}
	for _, c := range conf {
		s.Clusters[c.Name] = c
	}
	return NewManager(nil, Config{Seed: 1, Snapshot: func() *mesh.Snapshot { return s }}), s
}

// follows checks by chi-square that n draws went to the endpoints in the expected proportions. The bound is
// that of a one in a million chance, and the seeds are fixed.
func follows(t *testing.T, conf *mesh.Cluster, n int, want []float64, after func(*Host)) {
	t.Helper()
	m, _ := manager(conf)
	c := m.Cluster(conf)
	rng := rand.New(rand.NewPCG(7, 7))
	got := make([]int, len(conf.Endpoints))
	index := map[netip.AddrPort]int{}
	for i, e := range conf.Endpoints {
		index[e.Addr] = i
	}
	for range n {
		h, flags := c.Pick(&PickContext{Random: rng.Uint64()})
		if h == nil {
			t.Fatalf("no host: %s", flags)
		}
		got[index[h.Addr]]++
		if after != nil {
			after(h)
		}
	}
	sum := 0.0
	for _, w := range want {
		sum += w
	}
	chi, freedom := 0.0, -1.0
	for i, w := range want {
		if w == 0 {
			if got[i] > 0 {
				t.Errorf("endpoint %d got %d of %d, want none", i, got[i], n)
			}
			continue
		}
		expect := w / sum * float64(n)
		chi += (float64(got[i]) - expect) * (float64(got[i]) - expect) / expect
		freedom++
	}
	// Wilson and Hilferty's approximation of the quantile at 1-1e-6.
	bound := 1.0
	if freedom > 0 {
		k := 2 / (9 * freedom)
		bound = freedom * math.Pow(1-k+4.753*math.Sqrt(k), 3)
	}
	if chi > bound {
		t.Errorf("chi-square %.1f above %.1f: got %v, want proportions %v", chi, bound, got, want)
	}
}

func repeat(n int, w float64) []float64 {
	out := make([]float64, n)
	for i := range out {
		out[i] = w
	}
	return out
}

func TestPoliciesFollowTheWeights(t *testing.T) {
	for _, policy := range []mesh.LBPolicy{mesh.RoundRobin, mesh.LeastRequest, mesh.Random} {
		t.Run(fmt.Sprint(policy), func(t *testing.T) {
			follows(t, cluster(policy, false, group{weights: []uint32{1, 1, 1, 1, 1}}), 50_000, repeat(5, 1), nil)
			follows(t, cluster(policy, false, group{weights: []uint32{90, 10}}), 50_000, []float64{90, 10}, nil)
			follows(t, cluster(policy, false, group{weights: []uint32{1, 2, 3, 100}}), 50_000, []float64{1, 2, 3, 100}, nil)
			// Without locality weighting localities don't matter.
			follows(t, cluster(policy, false, group{weight: 1, weights: []uint32{1}}, group{weight: 99, weights: []uint32{1, 2}}), 50_000, []float64{1, 1, 2}, nil)
		})
	}
}

func TestLocalitiesAreDrawnByWeightAndAvailability(t *testing.T) {
	for _, policy := range []mesh.LBPolicy{mesh.RoundRobin, mesh.LeastRequest, mesh.Random} {
		follows(t, cluster(policy, true, group{weight: 1, weights: []uint32{1, 1}}, group{weight: 3, weights: []uint32{1, 3}}),
			60_000, []float64{0.125, 0.125, 0.1875, 0.5625}, nil)
		// A locality without a weight gets nothing.
		follows(t, cluster(policy, true, group{weights: []uint32{1}}, group{weight: 1, weights: []uint32{1}}), 1000, []float64{0, 1}, nil)
		// Half of the first locality is down: it keeps 1.4 * 1/2 of its weight.
		follows(t, cluster(policy, true, group{weight: 1, weights: []uint32{1, 1}, unhealthy: 2}, group{weight: 1, weights: []uint32{1, 1, 1, 1}}),
			60_000, []float64{0.35, 0.35, 0, 0, 0.25, 0.25, 0.25, 0.25}, nil)
	}
}

func TestPrioritiesSpillOver(t *testing.T) {
	// Envoy's table for the overprovisioning factor 1.4: healthy hosts of four in P0 -> share of P0.
	for up, share := range map[int]float64{4: 100, 3: 100, 2: 70, 1: 35} {
		weights := make([]uint32, up)
		for i := range weights {
			weights[i] = 1
		}
		conf := cluster(mesh.Random, false, group{weights: weights, unhealthy: 4 - up}, group{priority: 1, weights: []uint32{1}})
		want := append(repeat(up, share/float64(up)), repeat(4-up, 0)...)
		follows(t, conf, 40_000, append(want, 100-share), nil)
	}
	// Degraded hosts take what healthy ones don't.
	follows(t, cluster(mesh.Random, false, group{weights: []uint32{1}, degraded: 3}), 40_000,
		[]float64{35, 65.0 / 3, 65.0 / 3, 65.0 / 3}, nil)
}

func TestPanicUsesEveryHost(t *testing.T) {
	// One of four healthy, nowhere else to go: below 50 % health is ignored.
	follows(t, cluster(mesh.Random, false, group{weights: []uint32{1}, unhealthy: 3}), 40_000, repeat(4, 1), nil)
	// Nothing healthy at all: by number of hosts over all priorities.
	follows(t, cluster(mesh.Random, false, group{unhealthy: 3}, group{priority: 1, unhealthy: 1}), 40_000, repeat(4, 1), nil)
	// Switched off: only the healthy one.
	conf := cluster(mesh.Random, false, group{weights: []uint32{1}, unhealthy: 3})
	conf.PanicThreshold = 0
	follows(t, conf, 1000, []float64{1, 0, 0, 0}, nil)
	conf = cluster(mesh.Random, false, group{unhealthy: 3})
	conf.PanicThreshold = 0
	m, _ := manager(conf)
	if h, flags := m.Cluster(conf).Pick(&PickContext{}); h != nil || flags != telemetry.UH {
		t.Errorf("got %v, %s", h, flags)
	}
}

func TestNoEndpointsIsUH(t *testing.T) {
	conf := cluster(mesh.RoundRobin, false)
	m, _ := manager(conf)
	if h, flags := m.Cluster(conf).Pick(&PickContext{}); h != nil || flags != telemetry.UH {
		t.Errorf("got %v, %s", h, flags)
	}
}

func TestWeightedRoundRobinSpreadsTheTurns(t *testing.T) {
	conf := cluster(mesh.RoundRobin, false, group{weights: []uint32{1, 4}})
	m, _ := manager(conf)
	c := m.Cluster(conf)
	run, longest := 0, 0
	for range 1000 {
		h, _ := c.Pick(&PickContext{})
		if h.Addr == conf.Endpoints[1].Addr {
			run++
		} else {
			run = 0
		}
		longest = max(longest, run)
	}
	if longest > 5 {
		t.Errorf("%d turns in a row for weight 4 against 1", longest)
	}
}

// TestLeastRequestAvoidsTheBusy uses the closed form for two choices: with one of n hosts busy it is taken only
// if both draws name it.
func TestLeastRequestAvoidsTheBusy(t *testing.T) {
	const n = 10
	conf := cluster(mesh.LeastRequest, false, group{weights: []uint32{1, 1, 1, 1, 1, 1, 1, 1, 1, 1}})
	conf.ChoiceCount = 2
	m, _ := manager(conf)
	c := m.Cluster(conf)
	c.hosts[conf.Endpoints[0].Addr].ActiveRequests = 5
	rng := rand.New(rand.NewPCG(3, 3))
	busy, draws := 0, 200_000
	for range draws {
		if h, _ := c.Pick(&PickContext{Random: rng.Uint64()}); h.ActiveRequests > 0 {
			busy++
		}
	}
	want := float64(draws) / (n * n)
	if math.Abs(float64(busy)-want) > 5*math.Sqrt(want) {
		t.Errorf("the busy host was taken %d times, want about %.0f", busy, want)
	}
	// With weights a busy cluster follows them: nobody ever finishes.
	conf = cluster(mesh.LeastRequest, false, group{weights: []uint32{1, 4}})
	follows(t, conf, 20_000, []float64{1, 4}, func(h *Host) { h.ActiveRequests++ })
}

func TestExcludedHostsAreAvoidedWhilePossible(t *testing.T) {
	conf := cluster(mesh.RoundRobin, false, group{weights: []uint32{1, 1}})
	m, _ := manager(conf)
	c := m.Cluster(conf)
	first, _ := c.Pick(&PickContext{})
	for i := range 100 {
		h, _ := c.Pick(&PickContext{Random: uint64(i), Exclude: []*Host{first}, Attempts: 3})
		if h == first {
			t.Fatal("took the excluded host")
		}
	}
	conf = cluster(mesh.RoundRobin, false, group{weights: []uint32{1}})
	m, _ = manager(conf)
	c = m.Cluster(conf)
	only, _ := c.Pick(&PickContext{})
	if h, _ := c.Pick(&PickContext{Exclude: []*Host{only}, Attempts: 3}); h != only {
		t.Error("the only host must be taken all the same")
	}
}

func TestDropOverloads(t *testing.T) {
	conf := cluster(mesh.Random, false, group{weights: []uint32{1}})
	conf.DropPPM = 250_000
	m, _ := manager(conf)
	c := m.Cluster(conf)
	rng := rand.New(rand.NewPCG(4, 4))
	dropped := 0
	for range 40_000 {
		if h, flags := c.Pick(&PickContext{Random: rng.Uint64()}); h == nil {
			if flags != telemetry.DO {
				t.Fatal(flags)
			}
			dropped++
		}
	}
	if math.Abs(float64(dropped)-10_000) > 5*math.Sqrt(40_000*.25*.75) {
		t.Errorf("dropped %d of 40000, want a quarter", dropped)
	}
}

func TestAChangeKeepsHostsThatStayAndAnnouncesThoseThatGo(t *testing.T) {
	a := cluster(mesh.RoundRobin, false, group{weights: []uint32{1, 1, 1}})
	m, s := manager(a)
	var removed []*Host
	m.OnHostRemoved(func(h *Host) { removed = append(removed, h) })
	c := m.Cluster(a)
	for _, h := range c.hosts {
		h.ActiveRequests = 7
	}
	b := cluster(mesh.RoundRobin, false, group{weights: []uint32{5, 5}})
	s.Clusters["c"] = b
	m.Update()
	if len(removed) != 1 || removed[0].Addr != a.Endpoints[2].Addr || !removed[0].Gone() {
		t.Fatalf("removed %v", removed)
	}
	if m.Cluster(a) != c || m.Cluster(b) != c || c.Config() != b {
		t.Error("an older request must use the present state")
	}
	for range 10 {
		if h, _ := c.Pick(&PickContext{}); h.ActiveRequests != 7 {
			t.Fatal("a host that stayed lost its counters")
		}
	}
	delete(s.Clusters, "c")
	m.Update()
	if len(removed) != 3 || len(m.byName) != 0 || len(m.byConf) != 0 || len(m.shared.m) != 0 {
		t.Errorf("after removal: %d hosts removed, %d names, %d configs, %d counters", len(removed), len(m.byName), len(m.byConf), len(m.shared.m))
	}
}

func TestCircuitBreakersAreSharedByLoops(t *testing.T) {
	conf := cluster(mesh.RoundRobin, false, group{weights: []uint32{1}})
	s := &mesh.Snapshot{Clusters: map[string]*mesh.Cluster{"c": conf}}
	shared := NewShared()
	var loops []*Cluster
	for range 2 {
		m := NewManager(nil, Config{Shared: shared, Snapshot: func() *mesh.Snapshot { return s }})
		loops = append(loops, m.Cluster(conf))
	}
	for r := range resources {
		if !loops[0].Acquire(r, 0) || !loops[1].Acquire(r, 0) {
			t.Fatal("refused within the limit")
		}
		if loops[0].Acquire(r, 0) || loops[1].Acquire(r, 0) {
			t.Fatal("granted above the limit")
		}
		if loops[0].Overflows[r] != 1 || loops[0].InUse(r, 0) != 2 {
			t.Error("not counted")
		}
		if loops[0].Acquire(r, 1) {
			t.Error("the high priority has a limit of its own: 0")
		}
		loops[1].Release(r, 0)
		if !loops[0].Acquire(r, 0) {
			t.Error("refused after a release")
		}
	}
}

func TestPickingAllocatesNothing(t *testing.T) {
	for _, policy := range []mesh.LBPolicy{mesh.RoundRobin, mesh.LeastRequest, mesh.Random} {
		conf := cluster(policy, true, group{weight: 1, weights: []uint32{1, 2}}, group{weight: 2, weights: []uint32{1}})
		m, s := manager(conf)
		p := &PickContext{}
		if n := testing.AllocsPerRun(1000, func() {
			p.Random++
			m.Named(s, "c").Pick(p)
		}); n != 0 {
			t.Errorf("policy %d: %v allocations", policy, n)
		}
	}
}

func BenchmarkPick(b *testing.B) {
	for _, policy := range []mesh.LBPolicy{mesh.RoundRobin, mesh.LeastRequest, mesh.Random} {
		conf := cluster(policy, false, group{weights: []uint32{1, 2, 3, 4, 5, 6, 7, 8}})
		m, s := manager(conf)
		p := &PickContext{}
		b.Run(fmt.Sprint(policy), func(b *testing.B) {
			for b.Loop() {
				p.Random++
				m.Named(s, "c").Pick(p)
			}
		})
	}
}
