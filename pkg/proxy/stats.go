package proxy

import (
	"context"
	"net/netip"
	"sort"

	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
)

// Stats are the engine's counters for status and metrics.
type Stats struct {
	Accepted uint64  `json:"accepted"` // connections served
	Active   int64   `json:"active"`
	Refused  Refused `json:"refused"`
	Pods     int     `json:"pods"`
	// MaxConns and MaxConnsPerPod are the limits in force.
	MaxConns       int             `json:"max_conns"`
	MaxConnsPerPod int             `json:"max_conns_per_pod"`
	Listeners      []ListenerStats `json:"listeners"` // of the node
	Loops          []LoopStats     `json:"loops"`
}

// Refused counts connections that were closed unserved, by reason.
type Refused struct {
	// NoOriginalDst: somebody connected to the proxy's own port.
	NoOriginalDst uint64 `json:"no_original_dst"`
	// NoListener and NoChain: nothing is configured for the destination (flag NR).
	NoListener   uint64 `json:"no_listener"`
	NoChain      uint64 `json:"no_filter_chain"`
	GlobalLimit  uint64 `json:"global_limit"`
	PodLimit     uint64 `json:"pod_limit"`
	ShuttingDown uint64 `json:"shutting_down"`
}

// Sum of all reasons.
func (r Refused) Sum() uint64 {
	return r.NoOriginalDst + r.NoListener + r.NoChain + r.GlobalLimit + r.PodLimit + r.ShuttingDown
}

// ListenerStats is one listening socket on the node.
type ListenerStats struct {
	Name    string         `json:"name"`
	Address netip.AddrPort `json:"address"`
	Error   string         `json:"error,omitempty"` // why it isn't bound
}

// LoopStats is one loop.
type LoopStats struct {
	loop.Stats
	Assigned int64 `json:"assigned"` // accepted connections
}

// Stats returns the counters. It doesn't wait for the loops.
func (e *Engine) Stats() Stats {
	s := Stats{
		Accepted: e.accepted.Load(), Active: e.active.Load(),
		MaxConns: e.cfg.MaxConns, MaxConnsPerPod: e.cfg.MaxConnsPerPod,
		Refused: Refused{
			NoOriginalDst: e.refused[noOriginalDst].Load(), NoListener: e.refused[noListener].Load(),
			NoChain: e.refused[noChain].Load(), GlobalLimit: e.refused[overGlobalLimit].Load(),
			PodLimit: e.refused[overPodLimit].Load(), ShuttingDown: e.refused[shuttingDown].Load(),
		},
	}
	for _, w := range e.workers {
		s.Loops = append(s.Loops, LoopStats{Stats: w.loop.Stats(), Assigned: w.load.Load()})
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	s.Pods = len(e.pods)
	for _, in := range e.ingress {
		l := ListenerStats{Name: in.name, Address: in.addr}
		if in.err != nil {
			l.Error = in.err.Error()
		}
		s.Listeners = append(s.Listeners, l)
	}
	sort.Slice(s.Listeners, func(i, j int) bool { return s.Listeners[i].Address.Compare(s.Listeners[j].Address) < 0 })
	return s
}

// ClusterStats is a cluster summed over the loops that have used it.
type ClusterStats struct {
	Name string `json:"name"`
	// In use now, over both priorities, as the circuit breakers count.
	Connections int64 `json:"connections"`
	Pending     int64 `json:"pending"`
	Requests    int64 `json:"requests"`
	Retries     int64 `json:"retries"`
	// Refused by the circuit breakers.
	ConnectionOverflows uint64 `json:"connection_overflows"`
	PendingOverflows    uint64 `json:"pending_overflows"`
	RequestOverflows    uint64 `json:"request_overflows"`
	RetryOverflows      uint64 `json:"retry_overflows"`
	// Dropped by drop_overloads.
	Dropped uint64      `json:"dropped"`
	Hosts   []HostStats `json:"hosts"`
}

// HostStats is an endpoint summed over loops.
type HostStats struct {
	Address         netip.AddrPort `json:"address"`
	Hostname        string         `json:"hostname,omitempty"`
	ActiveConns     int            `json:"active_connections"`
	ActiveRequests  int            `json:"active_requests"`
	Conns           uint64         `json:"connections"`
	Requests        uint64         `json:"requests"`
	ConnectFailures uint64         `json:"connect_failures"`
	Errors          uint64         `json:"errors"`
}

// Clusters asks every loop what it knows of its clusters.
func (e *Engine) Clusters(ctx context.Context) ([]ClusterStats, error) {
	parts := make(chan []ClusterStats, len(e.workers))
	asked := 0
	for _, w := range e.workers {
		if w.loop.Post(func() { parts <- w.clusters() }) {
			asked++
		}
	}
	sum := map[string]*ClusterStats{}
	for range asked {
		select {
		case list := <-parts:
			for i := range list {
				merge(sum, &list[i])
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	out := make([]ClusterStats, 0, len(sum))
	for _, c := range sum {
		sort.Slice(c.Hosts, func(i, j int) bool { return c.Hosts[i].Address.Compare(c.Hosts[j].Address) < 0 })
		out = append(out, *c)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

func (w *Worker) clusters() []ClusterStats {
	var list []ClusterStats
	w.upstreams.Each(func(c *upstream.Cluster) {
		use := func(r upstream.Resource) int64 { return c.InUse(r, 0) + c.InUse(r, 1) }
		s := ClusterStats{
			Name: c.Name(), Dropped: c.Dropped,
			Connections: use(upstream.Connections), Pending: use(upstream.Pending),
			Requests: use(upstream.Requests), Retries: use(upstream.Retries),
			ConnectionOverflows: c.Overflows[upstream.Connections], PendingOverflows: c.Overflows[upstream.Pending],
			RequestOverflows: c.Overflows[upstream.Requests], RetryOverflows: c.Overflows[upstream.Retries],
		}
		c.Hosts(func(h *upstream.Host) {
			s.Hosts = append(s.Hosts, HostStats{
				Address: h.Addr, Hostname: h.Hostname, ActiveConns: h.ActiveConns, ActiveRequests: h.ActiveRequests,
				Conns: h.Conns, Requests: h.Requests, ConnectFailures: h.ConnectFailures, Errors: h.Errors,
			})
		})
		list = append(list, s)
	})
	return list
}

// merge adds one loop's view. What is in use is shared between loops and the same in each.
func merge(sum map[string]*ClusterStats, c *ClusterStats) {
	t := sum[c.Name]
	if t == nil {
		sum[c.Name] = c
		return
	}
	t.ConnectionOverflows += c.ConnectionOverflows
	t.PendingOverflows += c.PendingOverflows
	t.RequestOverflows += c.RequestOverflows
	t.RetryOverflows += c.RetryOverflows
	t.Dropped += c.Dropped
	byAddr := map[netip.AddrPort]int{}
	for i := range t.Hosts {
		byAddr[t.Hosts[i].Address] = i
	}
	for _, h := range c.Hosts {
		i, ok := byAddr[h.Address]
		if !ok {
			t.Hosts = append(t.Hosts, h)
			continue
		}
		u := &t.Hosts[i]
		u.ActiveConns += h.ActiveConns
		u.ActiveRequests += h.ActiveRequests
		u.Conns += h.Conns
		u.Requests += h.Requests
		u.ConnectFailures += h.ConnectFailures
		u.Errors += h.Errors
	}
}
