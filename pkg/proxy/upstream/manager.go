// Package upstream chooses the endpoint of a cluster for a request or connection, and keeps what a loop knows
// of clusters and hosts between choices: how busy each is, and what the circuit breakers allow.
//
// A Manager belongs to one loop and is used only on it, so that choosing takes no lock. What loops share are
// the circuit breakers' counters (Shared): a limit of 100 connections means 100, however many loops there are.
//
// Clusters are known by name, hosts by cluster and address. When a new snapshot brings a cluster with other
// endpoints, the hosts that stay keep their counters and their connections; those that are gone are announced
// to whoever watches (the connection pools) and refuse nothing that is under way.
//
// How a choice is made follows Envoy: a priority by health and overprovisioning (priority.go), a locality by
// weight where that is asked for, an endpoint by the policy (set.go).
package upstream

import (
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
)

// sweepEvery is how often unused hosts of ORIGINAL_DST clusters are forgotten (Envoy's cleanup_interval).
const sweepEvery = 5 * time.Second

// Manager is one loop's view of all clusters.
type Manager struct {
	loop     *loop.Loop // nil in tests of the balancers alone
	shared   *Shared
	snapshot func() *mesh.Snapshot
	log      *slog.Logger
	rand     *rand.Rand

	byConf map[*mesh.Cluster]*Cluster
	byName map[string]*Cluster
	watch  []func(*Host)
	sweep  loop.Timer
}

// Config of a Manager.
type Config struct {
	// Shared is the same for all loops of an engine; nil gives the manager counters of its own.
	Shared *Shared
	// Snapshot returns the configuration in force.
	Snapshot func() *mesh.Snapshot
	Logger   *slog.Logger
	// Seed of the balancers' own randomness; 0 takes a random one. Choices draw from the request's.
	Seed uint64
}

// NewManager makes the manager of a loop, which may be nil if no ORIGINAL_DST cluster is used.
func NewManager(l *loop.Loop, cfg Config) *Manager {
	if cfg.Shared == nil {
		cfg.Shared = NewShared()
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Seed == 0 {
		cfg.Seed = rand.Uint64()
	}
	m := &Manager{
		loop: l, shared: cfg.Shared, snapshot: cfg.Snapshot, log: cfg.Logger,
		rand:   rand.New(rand.NewPCG(cfg.Seed, cfg.Seed)),
		byConf: map[*mesh.Cluster]*Cluster{}, byName: map[string]*Cluster{},
	}
	m.sweep.Init(m.sweepHosts)
	return m
}

// OnHostRemoved has fn called, on the loop, for every host that has left its cluster. Its pools should take no
// new work and close when idle.
func (m *Manager) OnHostRemoved(fn func(*Host)) { m.watch = append(m.watch, fn) }

// Named returns the cluster of that name in the snapshot; nil if there is none (flag NC).
func (m *Manager) Named(s *mesh.Snapshot, name string) *Cluster {
	if s == nil {
		return nil
	}
	conf := s.Clusters[name]
	if conf == nil {
		return nil
	}
	return m.Cluster(conf)
}

// Cluster returns the runtime state of a cluster. It may come from an older snapshot than the present one (a
// request keeps the one that it began with): the state is the present one's then, as in Envoy.
func (m *Manager) Cluster(conf *mesh.Cluster) *Cluster {
	if c := m.byConf[conf]; c != nil {
		return c
	}
	return m.adopt(conf)
}

func (m *Manager) adopt(conf *mesh.Cluster) *Cluster {
	current := conf
	if m.snapshot != nil {
		if s := m.snapshot(); s != nil {
			if now := s.Clusters[conf.Name]; now != nil {
				current = now
			}
		}
	}
	c := m.byName[conf.Name]
	if c == nil {
		c = &Cluster{m: m, name: conf.Name, hosts: map[netip.AddrPort]*Host{}, use: m.shared.get(conf.Name)}
		m.byName[conf.Name] = c
	}
	if c.conf != current {
		delete(m.byConf, c.conf)
		c.configure(current)
		m.byConf[current] = c
	}
	return c
}

// Update brings the manager in line with the present snapshot: on each loop, after a new one was published.
func (m *Manager) Update() {
	s := m.snapshot()
	if s == nil {
		return
	}
	for name, c := range m.byName {
		conf := s.Clusters[name]
		switch {
		case conf == nil:
			m.drop(c)
		case conf != c.conf:
			m.adopt(conf)
		}
	}
}

func (m *Manager) drop(c *Cluster) {
	delete(m.byName, c.name)
	delete(m.byConf, c.conf)
	for _, h := range c.hosts {
		m.removeHost(h)
	}
	m.shared.put(c.name)
}

func (m *Manager) removeHost(h *Host) {
	if h.gone {
		return
	}
	h.gone = true
	delete(h.cluster.hosts, h.Addr)
	for _, fn := range m.watch {
		fn(h)
	}
}

// Each calls fn for every cluster that this loop has used.
func (m *Manager) Each(fn func(*Cluster)) {
	for _, c := range m.byName {
		fn(c)
	}
}

func (m *Manager) sweepHosts() {
	again := false
	for _, c := range m.byName {
		if c.conf.Discovery != mesh.OriginalDst {
			continue
		}
		for _, h := range c.hosts {
			switch {
			case h.ActiveConns > 0 || h.ActiveRequests > 0 || h.used:
				h.used = false
				again = true
			default:
				m.removeHost(h)
			}
		}
	}
	if again {
		m.loop.StartTimer(&m.sweep, sweepEvery)
	}
}
