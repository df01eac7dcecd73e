package upstream

import (
	"sync"
	"sync/atomic"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Resource is something that a circuit breaker limits.
type Resource uint8

// Resources.
const (
	Connections Resource = iota
	Pending
	Requests
	Retries
	resources
)

// Shared holds the circuit breakers' counters, which all loops of an engine share.
type Shared struct {
	mu sync.Mutex
	m  map[string]*usage // guarded by mu
}

// usage counts what a cluster uses, by priority (default, high).
type usage struct {
	refs   int // loops; guarded by Shared.mu
	active [2][resources]atomic.Int64
}

// NewShared returns counters for the managers of one engine.
func NewShared() *Shared { return &Shared{m: map[string]*usage{}} }

func (s *Shared) get(name string) *usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.m[name]
	if u == nil {
		u = &usage{}
		s.m[name] = u
	}
	u.refs++
	return u
}

func (s *Shared) put(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u := s.m[name]; u != nil {
		if u.refs--; u.refs == 0 {
			delete(s.m, name)
		}
	}
}

// limit of a resource.
func limit(l *mesh.Limits, r Resource) int64 {
	switch r {
	case Connections:
		return int64(l.MaxConnections)
	case Pending:
		return int64(l.MaxPendingRequests)
	case Requests:
		return int64(l.MaxRequests)
	default:
		return int64(l.MaxRetries)
	}
}

// Acquire takes one of a resource; false: the circuit breaker of that priority (0 default, 1 high) is open, and
// the overflow is counted. What was acquired must be released on the same Cluster.
func (c *Cluster) Acquire(r Resource, priority uint8) bool {
	if c.use.active[priority][r].Add(1) > limit(&c.conf.Limits[priority], r) {
		c.use.active[priority][r].Add(-1)
		c.Overflows[r]++
		return false
	}
	return true
}

// AcquireAnyway counts one of a resource without asking the breaker: a pool without a single connection may
// open one, as in Envoy.
func (c *Cluster) AcquireAnyway(r Resource, priority uint8) { c.use.active[priority][r].Add(1) }

// Release gives back what Acquire took.
func (c *Cluster) Release(r Resource, priority uint8) { c.use.active[priority][r].Add(-1) }

// InUse is how many of a resource all loops use.
func (c *Cluster) InUse(r Resource, priority uint8) int64 { return c.use.active[priority][r].Load() }
