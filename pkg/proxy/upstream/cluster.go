package upstream

import (
	"net/netip"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// Cluster is one cluster as one loop knows it.
type Cluster struct {
	m     *Manager
	name  string
	conf  *mesh.Cluster
	hosts map[netip.AddrPort]*Host
	use   *usage

	priorities []priority
	load       loads

	// Overflows counts what the circuit breakers refused on this loop, by resource. Dropped is drop_overloads.
	Overflows [resources]uint64
	Dropped   uint64
}

// Name of the cluster.
func (c *Cluster) Name() string { return c.name }

// Config is the configuration in force.
func (c *Cluster) Config() *mesh.Cluster { return c.conf }

// Hosts calls fn for every host.
func (c *Cluster) Hosts(fn func(*Host)) {
	for _, h := range c.hosts {
		fn(h)
	}
}

// PickContext is what a choice depends on. It may be reused.
type PickContext struct {
	// Random is the request's draw; each decision uses bits of its own.
	Random uint64
	// OriginalDst is where the client wanted to go, for ORIGINAL_DST clusters.
	OriginalDst netip.AddrPort
	// Exclude are hosts to avoid (tried already), if up to Attempts draws find another one.
	Exclude  []*Host
	Attempts int
}

// Pick chooses a host. If there is none the flags say why: UH, or DO and UDO for drop_overloads.
func (c *Cluster) Pick(p *PickContext) (*Host, telemetry.Flags) {
	r := rng{p.Random ^ 0x736f636b6d657368}
	if ppm := c.conf.DropPPM; ppm > 0 && r.below(1_000_000) < uint64(ppm) {
		c.Dropped++
		if ppm >= 1_000_000 {
			return nil, telemetry.UDO
		}
		return nil, telemetry.DO
	}
	if c.conf.Discovery == mesh.OriginalDst {
		return c.originalDst(p.OriginalDst)
	}
	h := c.choose(&r)
	for n := p.Attempts; n > 0 && h != nil && excluded(h, p.Exclude); n-- {
		h = c.choose(&r)
	}
	if h == nil {
		return nil, telemetry.UH
	}
	return h, 0
}

func excluded(h *Host, list []*Host) bool {
	for _, x := range list {
		if x == h {
			return true
		}
	}
	return false
}

func (c *Cluster) choose(r *rng) *Host {
	p, source := c.load.draw(r)
	if p < 0 {
		return nil
	}
	return c.priorities[p].sets[source].pick(c.conf, r)
}

// originalDst is the host at the address that the client asked for.
func (c *Cluster) originalDst(addr netip.AddrPort) (*Host, telemetry.Flags) {
	if !addr.IsValid() || addr.Port() == 0 || addr.Addr().IsUnspecified() {
		return nil, telemetry.UH
	}
	h := c.hosts[addr]
	if h == nil {
		h = &Host{Addr: addr, cluster: c}
		c.hosts[addr] = h
		if !c.m.sweep.Active() {
			c.m.loop.StartTimer(&c.m.sweep, sweepEvery)
		}
	}
	h.used = true
	return h, 0
}

// configure takes over another configuration, keeping the hosts that stay.
func (c *Cluster) configure(conf *mesh.Cluster) {
	changed := c.conf != nil && c.conf.Discovery != conf.Discovery
	c.conf = conf
	if conf.Discovery == mesh.OriginalDst {
		if changed {
			c.removeOthers(nil)
		}
		c.priorities, c.load = nil, loads{}
		return
	}
	if conf.Policy == mesh.RingHash || conf.Policy == mesh.Maglev {
		c.m.log.Error("this load-balancing policy is not built: choosing at random", "cluster", c.name, "lb_policy", conf.Policy)
	}
	stay := make(map[netip.AddrPort]bool, len(conf.Endpoints))
	for i := range conf.Endpoints {
		e := &conf.Endpoints[i]
		stay[e.Addr] = true
		h := c.hosts[e.Addr]
		if h == nil {
			h = &Host{Addr: e.Addr, cluster: c}
			c.hosts[e.Addr] = h
		}
		h.Hostname, h.Health = e.Hostname, e.Health
	}
	c.removeOthers(stay)
	c.build()
}

func (c *Cluster) removeOthers(stay map[netip.AddrPort]bool) {
	for addr, h := range c.hosts {
		if !stay[addr] {
			c.m.removeHost(h)
		}
	}
}

// rng derives independent draws from a request's random number (splitmix64).
type rng struct{ state uint64 }

func (r *rng) next() uint64 {
	r.state += 0x9e3779b97f4a7c15
	z := r.state
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// below draws from [0, n) without the bias and the division of a remainder.
func (r *rng) below(n uint64) uint64 {
	return (r.next() >> 32) * n >> 32
}

func (r *rng) unit() float64 { return float64(r.next()>>11) / (1 << 53) }
