package upstream

import "github.com/sockmesh/sockmesh/pkg/mesh"

// source is which hosts of a priority a request may go to.
type source uint8

const (
	healthy source = iota
	degraded
	everyone // panic: health is ignored
	sources
)

// priority holds the hosts of one priority level.
type priority struct {
	sets     [sources]*set
	total    int
	up, down int // healthy and degraded hosts
}

// loads is the share of requests, in percent, that goes to each priority and source.
type loads struct {
	healthy, degraded []uint32
	panic             []bool
	// total panic: nothing is available anywhere, shares follow the number of hosts.
	hosts []int
	sum   int
}

// build sorts the endpoints into priorities, localities and health and computes the shares.
func (c *Cluster) build() {
	conf := c.conf
	n := 0
	for i := range conf.Localities {
		n = max(n, int(conf.Localities[i].Priority)+1)
	}
	if len(conf.Localities) == 0 && len(conf.Endpoints) > 0 {
		n = 1
	}
	c.priorities = make([]priority, n)
	for p := range c.priorities {
		pr := &c.priorities[p]
		for s := range pr.sets {
			pr.sets[s] = c.buildSet(uint32(p), source(s))
		}
		pr.total = len(pr.sets[everyone].entries)
		pr.up, pr.down = len(pr.sets[healthy].entries), len(pr.sets[degraded].entries)
	}
	c.load = shares(c.priorities, conf.Overprovisioning, conf.PanicThreshold)
}

func in(s source, h mesh.Health) bool {
	switch s {
	case healthy:
		return h == mesh.HealthUnknown || h == mesh.HealthHealthy
	case degraded:
		return h == mesh.HealthDegraded
	default:
		return true
	}
}

// buildSet gathers one source of one priority, and its localities where they are drawn by weight.
func (c *Cluster) buildSet(p uint32, s source) *set {
	conf := c.conf
	all := newSet()
	localities := conf.Localities
	if len(localities) == 0 {
		localities = []mesh.Locality{{N: len(conf.Endpoints)}}
	}
	var parts []*set
	var weights []float64
	for i := range localities {
		l := &localities[i]
		if l.Priority != p {
			continue
		}
		part := newSet()
		for j := l.First; j < l.First+l.N; j++ {
			e := &conf.Endpoints[j]
			if in(s, e.Health) {
				part.add(c.hosts[e.Addr], e.Weight)
				all.add(c.hosts[e.Addr], e.Weight)
			}
		}
		// In panic localities are ignored, as in Envoy.
		if conf.LocalityWeighted && s != everyone && l.Weight > 0 && len(part.entries) > 0 {
			available := float64(overprovisioning(conf)) / 100 * float64(len(part.entries)) / float64(l.N)
			part.finish(conf.Policy, c.m.rand)
			parts = append(parts, part)
			weights = append(weights, float64(l.Weight)*min(1, available))
		}
	}
	if len(parts) > 0 {
		all.localities, all.locality = parts, newAlias(weights)
	} else {
		all.finish(conf.Policy, c.m.rand)
	}
	return all
}

func overprovisioning(conf *mesh.Cluster) uint32 {
	if conf.Overprovisioning == 0 {
		return 140
	}
	return conf.Overprovisioning
}

// shares distributes 100 percent over priorities as Envoy's LoadBalancerBase does: a priority takes as much as
// its availability (share of healthy hosts times the overprovisioning factor), what is left goes on to the
// next, then to degraded hosts. Too few available hosts mean panic: every host of the priority is used.
func shares(priorities []priority, factor uint32, threshold float64) loads {
	n := len(priorities)
	l := loads{healthy: make([]uint32, n), degraded: make([]uint32, n), panic: make([]bool, n), hosts: make([]int, n)}
	if factor == 0 {
		factor = 140
	}
	up, down := make([]uint32, n), make([]uint32, n)
	var available uint32
	for i := range priorities {
		p := &priorities[i]
		if p.total == 0 {
			continue
		}
		up[i] = uint32(min(100, uint64(factor)*uint64(p.up)/uint64(p.total)))
		down[i] = uint32(min(100, uint64(factor)*uint64(p.down)/uint64(p.total)))
		available += up[i] + down[i]
	}
	available = min(available, 100)
	if available == 0 {
		for i := range priorities {
			l.panic[i] = threshold > 0
			if threshold > 0 {
				l.hosts[i] = priorities[i].total
				l.sum += priorities[i].total
			}
		}
		return l
	}
	left := uint32(100)
	distribute := func(out, by []uint32) {
		for i := range by {
			out[i] = min(left, by[i]*100/available)
			left -= out[i]
		}
	}
	distribute(l.healthy, up)
	distribute(l.degraded, down)
	if left > 0 { // rounding
		for i := range priorities {
			if up[i] > 0 {
				l.healthy[i] += left
				break
			}
			if down[i] > 0 {
				l.degraded[i] += left
				break
			}
		}
	}
	if available < 100 {
		for i := range priorities {
			p := &priorities[i]
			l.panic[i] = p.total == 0 || 100*float64(p.up+p.down)/float64(p.total) < threshold
		}
	}
	return l
}

// draw chooses priority and source; -1: there is no host.
func (l *loads) draw(r *rng) (int, source) {
	if l.sum > 0 {
		x := int(r.below(uint64(l.sum)))
		for i, n := range l.hosts {
			if x < n {
				return i, everyone
			}
			x -= n
		}
	}
	x := uint32(r.below(100))
	for _, s := range [...]source{healthy, degraded} {
		share := l.healthy
		if s == degraded {
			share = l.degraded
		}
		for i, n := range share {
			if x < n {
				if l.panic[i] {
					return i, everyone
				}
				return i, s
			}
			x -= n
		}
	}
	return -1, healthy
}
