package mesh

import (
	"fmt"
	"math/bits"
)

// Offload: a listener that is nothing but tcp_proxy needs no proxy. The kernel can draw the cluster and the
// endpoint at connect() and the bytes never meet user space. What the listener itself says against that is
// found when it is compiled (Listener.OffloadReason); what its clusters say depends on the snapshot and is
// found here.
//
// Kept in the proxy: anything that has to see bytes or the end of the connection (TLS, listener filters that
// read, access logs, an idle_timeout that was set, a maximum duration), several filter chains, clusters whose
// endpoints are not known addresses, and a max_connections circuit breaker that was set. The kernel draws at
// random by weight whatever the policy (round robin, random, least request): what it gives up is the order, not
// the shares. Envoy's default idle time-out of one
// hour does not keep a listener in the proxy: nobody asked for it, and losing it costs an idle socket, not a
// connection.

// maxOffloadEndpoints bounds what one listener may put into the BPF maps.
const maxOffloadEndpoints = 4096

// compileOffload returns the kernel's table for a listener, or the reason why there is none.
func compileOffload(l *Listener, clusters map[string]*Cluster) (*Offload, string) {
	tcp := l.soleTCPProxy()
	if tcp == nil {
		return nil, "filter_chains: not a single tcp_proxy"
	}
	offload := &Offload{}
	total := 0
	for i := range tcp.Clusters {
		w := &tcp.Clusters[i]
		if w.Weight == 0 && len(tcp.Clusters) > 1 {
			continue
		}
		cluster := clusters[w.Name]
		if cluster == nil {
			return nil, fmt.Sprintf("cluster %q: not known", w.Name)
		}
		endpoints, reason := cluster.offloadEndpoints()
		if reason != "" {
			return nil, fmt.Sprintf("cluster %q: %s", w.Name, reason)
		}
		if total += len(endpoints); total > maxOffloadEndpoints {
			return nil, fmt.Sprintf("more than %d endpoints", maxOffloadEndpoints)
		}
		offload.Clusters = append(offload.Clusters, OffloadCluster{Name: w.Name, Weight: max(w.Weight, 1), Endpoints: endpoints})
	}
	if len(offload.Clusters) == 0 {
		return nil, "weighted_clusters: every weight is zero"
	}
	return offload, ""
}

// soleTCPProxy is the tcp_proxy of a listener that has only this.
func (l *Listener) soleTCPProxy() *TCPProxy {
	switch {
	case len(l.Chains) == 1 && l.Default == nil:
		return l.Chains[0].TCP
	case len(l.Chains) == 0 && l.Default != nil:
		return l.Default.TCP
	}
	return nil
}

// offloadEndpoints are the endpoints that take traffic, weighted so that a plain draw among them is what the
// proxy's balancer would do; or the reason why that cannot be.
func (c *Cluster) offloadEndpoints() ([]OffloadEndpoint, string) {
	switch {
	case c.Discovery == OriginalDst:
		return nil, "type: ORIGINAL_DST"
	case c.Discovery == StrictDNS || c.Discovery == LogicalDNS:
		return nil, "type: names are resolved by the proxy"
	case c.OffloadReason != "":
		return nil, c.OffloadReason
	case c.DropPPM != 0:
		return nil, "load_assignment.policy.drop_overloads"
	}
	var result []OffloadEndpoint
	var weights []uint64
	total := uint64(0)
	healthy, known := 0, 0
	for _, loc := range c.Localities {
		if loc.Priority != 0 && loc.N > 0 {
			return nil, fmt.Sprintf("load_assignment.endpoints.priority: %d", loc.Priority)
		}
		if c.LocalityWeighted && loc.Weight == 0 {
			continue // Envoy: a locality without a weight takes nothing
		}
		endpoints := c.Endpoints[loc.First : loc.First+loc.N]
		sum := uint64(0)
		for _, e := range endpoints {
			if e.Health == HealthDegraded {
				return nil, "load_assignment.endpoints.health_status: DEGRADED"
			}
			if e.Health.Usable() {
				sum += uint64(e.Weight)
			}
		}
		known += len(endpoints)
		for _, e := range endpoints {
			if !e.Health.Usable() {
				continue
			}
			healthy++
			weight := uint64(e.Weight)
			if c.LocalityWeighted {
				weight = uint64(loc.Weight) << 24 * weight / sum // both below 2^20 in any sane configuration
			}
			total += weight
			weights = append(weights, weight)
			result = append(result, OffloadEndpoint{Addr: e.Addr})
		}
	}
	switch {
	case healthy == 0:
		return nil, "load_assignment: no endpoint that takes traffic"
	case float64(healthy)*100 < float64(known)*c.PanicThreshold:
		return nil, "common_lb_config.healthy_panic_threshold: fewer healthy endpoints than that"
	}
	// The kernel adds weights up in 32 bits.
	const limit = 1 << 28
	for i, weight := range weights {
		if total > limit {
			hi, lo := bits.Mul64(weight, limit)
			weight, _ = bits.Div64(hi, lo, total)
		}
		result[i].Weight = uint32(max(weight, 1))
	}
	return result, ""
}
